"""The phases of a training: paint, learn, measure, write."""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from refimg.sandbox.painter import PAINTER_VERSION

from .pictures import make_specs, render

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "refimg" / "sandbox" / "weights"


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    pairs: int  # pictures and their partners, to learn from
    steps: int  # batches of 64 pairs
    rate: float  # highest learning rate
    judge_from: float  # share of the steps after which preferences are learned; 1: never
    seed: int


PLANS = {
    "clip": Plan(4000, 1450, 2e-3, 1.0, 11),
    "pickscore": Plan(4000, 1520, 2e-3, 0.88, 22)}
HELD_OUT = 800  # pairs


def say(started: float, text: str) -> None:
    """Prints a line with the minutes since the start."""
    print(f"{(time.time() - started) / 60:5.1f} min  {text}", flush=True)


def learner_of(kind: str, vocabulary: int):
    """An untrained model of that kind, ready to learn."""
    from . import learn, models

    make = models.make_open_clip if kind == "clip" else models.make_transformers
    return learn.Learner(make(vocabulary), models.WIDTH)


def lessons_of(split: str, pairs: int, path: str, tokens, seed: int):
    """The pictures of a file and captions for them."""
    import numpy as np

    from . import learn

    pixels = np.memmap(path, np.uint8, "r", shape=(2 * pairs, 96, 96, 3))
    return learn.lessons(pixels, make_specs(split, pairs), tokens, seed)


def learn_one(kind: str, plan: Plan, files: dict[str, str], folder: Path) -> dict:
    """Trains one model in this process, writes its folder, and returns what was measured."""
    import torch

    from . import learn, models

    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    tokens = models.tokenizer(folder / "sandbox-clip")
    data = lessons_of(kind, plan.pairs, files[kind], tokens, plan.seed)
    learner = learner_of(kind, tokens.vocab_size)
    show = lambda text: print(f"{kind:>9}{text}", flush=True)  # noqa: E731
    learner.model = learn.train(learner, data, plan.steps, plan.rate, plan.seed,
                                plan.judge_from, show)
    learner.scale = learner.model.logit_scale
    count = int(files["n"])
    held = lessons_of("held-out", count, files["held-out"], tokens, plan.seed)
    finish = finish_clip if kind == "clip" else finish_pickscore
    return finish(learner, held, make_specs("held-out", count), data, tokens.vocab_size, folder)


def finish_clip(learner, held, specs, data, vocabulary: int, folder: Path) -> dict:
    """Writes the model of clip_score and the head of aesthetic, with their scales."""
    import numpy as np

    from . import measure, models

    right, wrong, other = measure.right_and_wrong(learner, held)
    found = {"pairs": measure.accuracy(right, wrong, specs)}
    rng = np.random.default_rng(0)
    scale = measure.band(np.concatenate([right, rng.choice(other, len(right))]))
    place = folder / "sandbox-clip"
    models.save_open_clip(learner.model, vocabulary, place)
    models.seal(place / "refimg.json", {"calibration": "sandbox-clip-band-1", **scale})
    head = measure.fit_head(*measure.spoilt(learner, data.pixels[:6000], 1))
    seen, sound = measure.spoilt(learner, held.pixels, 2)
    raw = (seen @ head[:-1] + head[-1]).numpy()
    found["defects"] = {"spearman": measure.spearman(raw, sound.numpy()),
                        **measure.by_defect(learner, held.pixels, head, 3)}
    constants = {"calibration": "sandbox-aesthetic-band-1", **measure.band(raw),
                 "bias": round(head[-1].item(), 5),
                 "head": [round(v, 5) for v in head[:-1].tolist()]}
    models.seal(place / "aesthetic.json", constants)
    return found


def finish_pickscore(learner, held, specs, data, vocabulary: int, folder: Path) -> dict:
    """Writes the model of pickscore and its scale."""
    from . import measure, models

    factor = float(learner.scale.detach().half().float().exp())
    right, wrong, _ = measure.right_and_wrong(learner, held)
    place = folder / "sandbox-pickscore"
    models.save_transformers(learner.model, vocabulary, place)
    scale = measure.fit_logistic(factor * right, factor * wrong)
    models.seal(place / "refimg.json", {"calibration": "sandbox-pickscore-logistic-2", **scale})
    pairs = measure.accuracy(right, wrong, specs)
    return {"pairs": pairs, "scale": round(factor, 2)}


def paint_all(plans: dict[str, Plan], held_out: int, work: Path, started: float) -> dict:
    """Paints every split; the files they are in."""
    files = {"n": str(held_out)}
    for split, n in (*((k, p.pairs) for k, p in plans.items()), ("held-out", held_out)):
        files[split] = str(render(split, n, work).filename)
        say(started, f"painted {2 * n} pictures for {split}")
    return files


def learn_all(plans: dict[str, Plan], files: dict, folder: Path) -> dict:
    """Trains the models side by side; what was measured."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = {k: pool.submit(learn_one, k, plan, files, folder) for k, plan in plans.items()}
        return {kind: job.result() for kind, job in jobs.items()}


def install(folder: Path, results: dict, minutes: float) -> None:
    """Copies the finished folders into the package, with a record of the measurements."""
    from . import models, views

    TARGET.mkdir(exist_ok=True)
    for name in ("sandbox-clip", "sandbox-pickscore"):
        models.replace(folder / name, TARGET / name)
    views.write(TARGET)
    record = {"painter": PAINTER_VERSION, "minutes": round(minutes, 1), "held_out": results}
    (TARGET / "measured.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure_consistency() -> dict:
    """Writes the card of `consistency` beside the installed tower; what was measured."""
    from .consistency import measure

    return measure(TARGET / "sandbox-clip")
