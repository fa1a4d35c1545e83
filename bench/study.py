"""The sandbox study: enhancement and selection, each picture beside the truth of what it shows.

    python bench/study.py              all of it, into bench/results/study.parquet
    python bench/study.py --quick 3    three prompts, three stories, into output/study/quick.parquet

Killed and started again it goes on with the parts that are missing (output/study/), and makes the
same table, byte for byte. Everything runs through the pipeline: the sandbox's agents, its painter
at 384 x 216, its three trained scorers. Pictures are deleted once their row is made.

Arms. `prompts`: single scenes, eight pictures each, `original` and `enhanced`. `stories`: four
scenes, each from the winner before; `previous` (one picture, as it was done before), `original`
and `enhanced` (best of four). The director of the enhanced arms ends by stating again what the
author stated. `effect` is what the painter's author planted: how much less often a restated
attribute goes wrong, 0 or .08. It is the same in both enhanced arms but for that.

Pairing. All arms have the same prompts and stories, but each run has a seed of its own: the same
seeds would draw the same mistakes, and no effect would be a difference of exactly zero.

A row's `right` is the share of what its `text`, the author's prompt, states that was drawn.
`expected_right` is what that share must be on average, from the probabilities of the painter, for
the prompt that was sent and the reference that went with it; `planted` is the part of it that comes
from the planted effect. A mistake has probability .2 (restated, with the effect: .12), half of that
where the reference shows what is stated. `kept_subject` and `kept_colour`: as scene 1 states them.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import numpy as np
import pandas as pd

from refimg import Pipeline, Scene, Story, __version__
from refimg.enhance import read_fences
from refimg.pipeline import SceneResult, StoryResult, Variation
from refimg.sandbox.agents import Critic, Director
from refimg.sandbox.painter import PAINTER_VERSION, Painter, error_rates, restated, truth
from refimg.sandbox.scorers import SandboxAesthetic, SandboxClipScore, SandboxPickScore
from refimg.sandbox.world import VOCABULARY, read_prompt
from refimg.score import Batch
from tools.train_sandbox.captions import caption, parts_of
from tools.train_sandbox.pictures import attributes_by_chance

LONG = True
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "bench" / "results" / "study.parquet"
SEED = 6_2026
PROMPTS, STORIES, SCENES = 200, 100, 4
WIDTH, ERROR = 384, 0.2
CHUNK = 10  # prompts or stories a part
CARRIED = ("subject", "colour", "style")  # what a reference of the painter hands on
WEIGHTS = "refimg/sandbox/weights/*/*"
SOURCES = ("bench/study.py", "tools/train_sandbox/captions.py", "tools/train_sandbox/pictures.py",
           "refimg/*.py", "refimg/*/*.py", WEIGHTS)


class Arm(NamedTuple):
    """One way of working."""

    part: str  # "prompts" or "stories"
    name: str
    iterations: int  # of the two agents, at most
    variations: int
    effect: float = 0.0  # planted: how much less often a restated attribute goes wrong

    @property
    def code(self) -> str:
        """A name for files."""
        return f"{self.part}-{self.name}-{round(100 * self.effect):02d}"


ARMS = (
    Arm("prompts", "original", 0, 8),
    Arm("prompts", "enhanced", 4, 8),
    Arm("prompts", "enhanced", 4, 8, 0.08),
    Arm("stories", "previous", 0, 1),
    Arm("stories", "original", 0, 4),
    Arm("stories", "enhanced", 4, 4),
    Arm("stories", "enhanced", 4, 4, 0.08),
)


def told(rng: np.random.Generator, attributes: dict, must: set[str], least: int) -> str:
    """A text about the picture that states `must`, and `least` attributes in all."""
    while True:
        text = caption(rng, attributes)
        stated = read_prompt(text or "")
        if must <= stated.keys() and len(stated) >= least:
            return text


def unit(part: str, number: int) -> Story:
    """The prompt or the story of that number: four attributes stated or more, later scenes three.

    Scene 1 of a story states subject, colour and style; the others name the subject and a place.
    """
    rng = np.random.default_rng([SEED, part == "stories", number])
    first = attributes_by_chance(rng)
    if part == "prompts":
        return Story(scenes=[Scene(prompt=told(rng, first, {"subject"}, 4))])
    texts = [told(rng, first, set(CARRIED), 4)]
    while len(texts) < SCENES:
        later = attributes_by_chance(rng) | {"subject": first["subject"], "count": "one"}
        later = {a: v for a, v in later.items() if a not in ("colour", "style")}
        if later.get("companion") != first["subject"]:
            texts.append(told(rng, later, {"subject", "setting"}, 3))
    return Story(scenes=[Scene(prompt=text) for text in texts])


def again(original: str) -> str:
    """One sentence in other words that states what the original states, no more and no less."""
    said = read_prompt(original)
    rng = np.random.default_rng(list(hashlib.sha256(original.encode()).digest()))
    while True:
        parts = parts_of(rng, said, said["subject"])
        first = f"{parts.pop('what')} {parts.pop('company', '')}".strip()
        text = f"In short, {', '.join([first, *parts.values()])}."
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        if read_prompt(text) == said:
            return text


class RestatingDirector(Director):
    """The sandbox's director, who ends by stating again what the author stated."""

    name = "sandbox-restating-director"

    async def reply(self, messages, schema=None):
        """The next version of the prompt, with one sentence more."""
        made = await super().reply(messages, schema)
        given = [read_fences(m.content) for m in messages if m.role == "user"]
        original = next(fences["original"] for fences in given if "original" in fences)
        return made.model_copy(update={"text": f"{made.text} {again(original)}"})


class OneByOne:
    """A scorer that sees one picture at a time, however many have piled up.

    The last digits of a score depend on the size of the batch, and that depends on the clock.
    """

    def __init__(self, scorer):
        self.scorer, self.to_100 = scorer, scorer.to_100
        self.name, self.model, self.calibration = scorer.name, scorer.model, scorer.calibration

    def score(self, batch):
        """One result a picture, in order."""
        return [self.scorer.score(Batch((image,), batch.prompt))[0] for image in batch.images]


def run_seed(arm: Arm, number: int) -> int:
    """The seed of one run, another one in each arm."""
    return int.from_bytes(hashlib.sha256(f"{SEED}/{arm.code}/{number}".encode()).digest()[:4])


def pipeline(arm: Arm, number: int) -> Pipeline:
    """The pipeline of one run."""
    scorers = [SandboxPickScore(), SandboxClipScore(), SandboxAesthetic()]
    return Pipeline(
        director=RestatingDirector(), critic=Critic(),
        image_model=Painter(width=WIDTH, error=ERROR, restated_error=restated_error(arm)),
        scorers=[OneByOne(scorer) for scorer in scorers],
        num_variations=arm.variations, max_enhancement_iterations=arm.iterations,
        chain="previous" if arm.part == "stories" else "none", plan=False,
        seed=run_seed(arm, number), max_concurrency=1,
    )


def restated_error(arm: Arm) -> float | None:
    """The probability that a restated attribute goes wrong; None: the same as any other."""
    return round(ERROR - arm.effect, 6) if arm.effect else None


def chances(sent: str, stated: dict, shown: dict, again: float | None) -> list[float]:
    """For each stated attribute the probability that it is drawn right, from a prompt as sent."""
    read, rates = read_prompt(sent), error_rates(sent, ERROR, again)
    if any(read.get(a) != v for a, v in stated.items()):
        raise ValueError(f"the prompt that was sent states {read}, not {stated}: {sent}")
    agrees = {a for a in CARRIED if a in stated and shown.get(a) == stated[a]}
    return [1 - rates[a] / (2 if a in agrees else 1) for a in stated]


def drawn(path: Path) -> dict[str, str]:
    """What a picture of the painter shows."""
    return truth(path)["attributes"]


def about_truth(arm: Arm, scene: SceneResult, variation: Variation, first: dict) -> dict:
    """The columns that compare a picture with the truth."""
    stated, found = read_prompt(scene.prompt), drawn(variation.image.image_path)
    shown = drawn(variation.image.references[0]) if variation.image.references else {}
    right = {a: found.get(a) == v for a, v in stated.items()}
    due = [float(np.mean(chances(scene.sent_prompt, stated, shown, error)))
           for error in (restated_error(arm), None)]
    kept = {a: found[a] == first[a] if arm.part == "stories" else None
            for a in ("subject", "colour")}
    return {
        "stated": len(stated), "restated": len(restated(scene.sent_prompt) & stated.keys()),
        "right": sum(right.values()) / len(stated), "all_right": all(right.values()),
        "expected_right": due[0], "planted": due[0] - due[1],
        **{f"right_{a}": right.get(a) for a in VOCABULARY},
        **{f"kept_{a}": value for a, value in kept.items()},
    }


def about_scene(scene: SceneResult) -> dict:
    """The columns that all pictures of a scene share."""
    made = scene.enhancement
    return {
        "text": scene.prompt, "sent_prompt": scene.sent_prompt,
        "reference_from": scene.reference_from, "below_threshold": scene.below_threshold,
        "warned": any(text.startswith("below threshold") for text in scene.warnings),
        "iterations": made.total_iterations, "stop_reason": made.stop_reason,
        "critic_score": made.final_score.overall if made.final_score else None,
    }


def rows(arm: Arm, number: int, result: StoryResult) -> pd.DataFrame:
    """One row a picture: what was asked, what the scorers said, what is true."""
    settings = {"run_seed": result.settings["seed"], "sandbox": result.sandbox} | {
        name: result.settings[name] for name in
        ("chain", "max_enhancement_iterations", "num_variations", "score_text", "quality_threshold")
    }
    first = read_prompt(result.scenes[0].prompt)
    more = [about_scene(scene) | about_truth(arm, scene, variation, first) | settings
            for scene in result.scenes for variation in scene.variations]
    head = {"part": arm.part, "arm": arm.name, "effect": arm.effect,
            "story": f"{arm.part}-{number:03d}"}
    frame = result.frame().drop(columns=["path", "cost"])
    return pd.concat([pd.DataFrame([head] * len(frame)), frame, pd.DataFrame(more)], axis=1)


async def run_unit(arm: Arm, number: int) -> pd.DataFrame:
    """The rows of one run; its pictures are gone."""
    with tempfile.TemporaryDirectory() as folder:
        result = await pipeline(arm, number).run(
            unit(arm.part, number), generation_id=f"{arm.code}-{number:03d}",
            output_dir=Path(folder) / "images")
        return rows(arm, number, result)


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with columns of one type, whatever is missing in them."""
    flags = [c for c in frame if c.startswith(("right_", "kept_")) or c == "below_threshold"]
    return frame.astype(dict.fromkeys(flags, "boolean") | {"critic_score": "float64"})


def save(frame: pd.DataFrame, path: Path) -> None:
    """Nothing; the table is on disk, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    frame.to_parquet(part, engine="pyarrow", compression="zstd", index=False)
    os.replace(part, path)


def make_part(path: Path, arm: Arm, numbers: range) -> Path:
    """The path of a part, made if it is not there."""
    if not path.exists():

        async def work() -> list[pd.DataFrame]:
            return [await run_unit(arm, number) for number in numbers]

        save(typed(pd.concat(asyncio.run(work()), ignore_index=True)), path)
    return path


def fingerprint(*patterns: str) -> str:
    """A digest of the files that match."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def jobs(folder: Path, prompts: int, stories: int) -> list[tuple[Path, Arm, range]]:
    """All parts of a study, in the order of the table; those of other code lie elsewhere."""
    many, folder = {"prompts": prompts, "stories": stories}, folder / fingerprint(*SOURCES)
    return [
        (folder / f"{arm.code}-{numbers[0]:03d}-{numbers[-1]:03d}.parquet", arm, numbers)
        for arm in ARMS
        for start in range(0, many[arm.part], CHUNK)
        for numbers in [range(start, min(start + CHUNK, many[arm.part]))]
    ]


def prepare() -> None:
    """This process has one core, and says nothing of single scenes."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("refimg").setLevel(logging.ERROR)


def make(prompts: int, stories: int, folder: Path, workers: int = 1) -> pd.DataFrame:
    """The table of a study, from parts that are there and parts that are made now."""
    todo = jobs(folder, prompts, stories)
    if workers == 1:
        paths = [make_part(*job) for job in todo]
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare) as pool:
            paths = list(pool.map(make_part, *zip(*todo, strict=True)))
    table = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
    table.attrs = about_study() | {"prompts": prompts, "stories": stories}
    return table


def about_study() -> dict:
    """What the table says of itself, in `attrs`."""
    scorers = [SandboxPickScore(), SandboxClipScore(), SandboxAesthetic()]
    return {
        "refimg": __version__, "painter": PAINTER_VERSION, "weights": fingerprint(WEIGHTS),
        "seed": SEED, "width": WIDTH, "error": ERROR,
        "models": {s.name: s.model for s in scorers},
        "calibrations": {s.name: s.calibration for s in scorers},
    }


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By arm: the mean share of right, of all pictures and of the selected ones."""
    keys = ["part", "arm", "effect"]
    all_of, picked = table.groupby(keys), table[table.selected].groupby(keys)
    return pd.DataFrame({
        "pictures": all_of.size(), "expected": all_of.expected_right.mean(),
        "right": all_of.right.mean(), "picked": picked.right.mean(),
        "all_right": all_of.all_right.mean(), "picked_all": picked.all_right.mean(),
    }).round(4)


def interval(differences: pd.Series) -> dict[str, float]:
    """The mean over units and its 95 % interval."""
    mean, half = differences.mean(), 1.96 * differences.std() / len(differences) ** 0.5
    return {"found": mean, "low": mean - half, "high": mean + half}


def gain(table: pd.DataFrame, part: str, effect: float) -> dict[str, float]:
    """Enhanced - original: the difference to be expected, what of it is planted, and the found."""
    rows = table[table.part == part]
    enhanced, original = (
        rows[(rows.arm == name) & (rows.effect == planted)].groupby("story")[
            ["right", "expected_right", "planted"]].mean()
        for name, planted in (("enhanced", effect), ("original", 0.0)))
    d = enhanced - original
    result = {"planted": d.planted.mean(), "expected": d.expected_right.mean()} | interval(d.right)
    return {name: round(float(value), 4) for name, value in result.items()}


def main() -> None:
    """Makes the table, prints a summary and, as the last line, a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, metavar="N", help="N prompts and N stories only")
    parser.add_argument("--workers", type=int, default=2)
    given, started = parser.parse_args(), time.time()
    prepare()
    parts = ROOT / "output" / "study"
    target = parts / "quick.parquet" if given.quick else TARGET
    table = make(given.quick or PROMPTS, given.quick or STORIES, parts, given.workers)
    save(table, target)
    print(summary(table).to_string(), flush=True)
    result = {"rows": len(table), "bytes": target.stat().st_size, "seed": SEED,
              "minutes": round((time.time() - started) / 60, 1)}
    for part in ("prompts", "stories"):
        result[part] = {str(effect): gain(table, part, effect) for effect in (0.0, 0.08)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
