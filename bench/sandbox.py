"""The sandbox's trained scorers on pictures they have not seen, and against the oracle.

Pairs: two pictures of the same composition that differ in one attribute, and a caption that
states it; a scorer is right if it puts the picture of the caption first. Selection: four pictures
a caption, by a painter that errs with p = .2 an attribute; counted is how often the pick has
everything right that is stated. `--quick N` uses N pairs and N groups.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import statistics

import numpy as np

from refimg.sandbox.painter import choose_attributes, paint_picture
from refimg.sandbox.scorers import (
    SandboxAesthetic,
    SandboxClipScore,
    SandboxPickScore,
    TruthScorer,
)
from refimg.sandbox.world import read_prompt
from refimg.score import Batch, grade, raw_scores
from tools.train_sandbox.captions import caption
from tools.train_sandbox.pictures import ATTRIBUTES, make_pair

LONG = True
ROOT = Path(__file__).resolve().parent.parent
PAIRS_FROM, GROUPS_FROM = 50_000_000, 60_000_000  # seeds that no training uses
GROUP_SIZE = (384, 216)  # pixels; pairs have 768 x 432
ERROR = 0.2
TEXT_SCORERS = ("pickscore", "clip_score")
PICKERS = (*TEXT_SCORERS, "overall", "truth")


def one_thread() -> None:
    """Two processes share two cores."""
    import torch

    torch.set_num_threads(1)


def pair(number: int) -> tuple[str, dict[str, bool]]:
    """What differs in one pair, and which scorers prefer the right picture."""
    name = ATTRIBUTES[number % len(ATTRIBUTES)]
    right, wrong = make_pair(PAIRS_FROM + number, name, alike=True)
    text = caption(np.random.default_rng(number), right.attributes, name)
    images = tuple(paint_picture(s.attributes, s.seed) for s in (right, wrong))
    found = raw_scores(Batch(images, text), [SandboxPickScore(), SandboxClipScore()])
    return name, {s: found[0][s].value > found[1][s].value for s in TEXT_SCORERS}


def group(number: int) -> dict[str, bool | float]:
    """Whether each picker's choice of four has all that is stated; "random": the share of all."""
    rng = np.random.default_rng(GROUPS_FROM + number)
    text = caption(rng, make_pair(GROUPS_FROM + number)[0].attributes)
    stated, images = read_prompt(text), []
    for k in range(4):
        seed = GROUPS_FROM + 4 * number + k
        images.append(paint_picture(choose_attributes(stated, seed, ERROR), seed, *GROUP_SIZE))
    batch, scorers = Batch(tuple(images), text), [SandboxPickScore(), SandboxClipScore()]
    scorers.append(SandboxAesthetic())
    raws, truth = raw_scores(batch, scorers), TruthScorer().score(batch)
    values = {s: [row[s].value for row in raws] for s in TEXT_SCORERS}
    values["overall"] = [scores.overall for scores in grade(raws, scorers)]
    values["truth"] = [found.value for found in truth]
    right = [found.value == 1 for found in truth]
    picked = {p: right[int(np.argmax(values[p]))] for p in PICKERS}
    return {"random": float(np.mean(right))} | picked


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, extra = hits / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * (share * (1 - share) / n + extra / (4 * n)) ** 0.5
    return middle - half, middle + half


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The mean of paired differences and its 95 % interval."""
    gap = a.astype(float) - b.astype(float)
    half = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
    return gap.mean(), gap.mean() - half, gap.mean() + half


def report_pairs(found: list[tuple[str, dict[str, bool]]]) -> dict:
    """Prints and returns the share of right preferences, by attribute and in all."""
    print(f"\nthe right picture of two preferred, {len(found)} pairs at 768 x 432, 95 % intervals")
    result: dict = {s: {} for s in TEXT_SCORERS}
    for name in (*ATTRIBUTES, "all"):
        line = f"{name:<10}"
        for scorer in TEXT_SCORERS:
            hits = [h[scorer] for changed, h in found if name in (changed, "all")]
            low, high = wilson(sum(hits), len(hits)) if hits else (0, 1)
            share = statistics.fmean(hits) if hits else None
            result[scorer][name] = [share, round(low, 4), round(high, 4), len(hits)]
            line += f"  {scorer} {share or 0:.3f} [{low:.3f}, {high:.3f}] of {len(hits):<5}"
        print(line)
    return result


def report_groups(found: list[dict]) -> dict:
    """Prints and returns how often each picker picks a picture with nothing wrong."""
    print(f"\npicks with nothing wrong, best of 4, {len(found)} groups at {GROUP_SIZE}, paired")
    columns = {p: np.array([row[p] for row in found], float) for p in ("random", *PICKERS)}
    result: dict = {"random": round(float(columns["random"].mean()), 4)}
    print(f"{'random':<11} {result['random']:.3f}")
    for p in PICKERS:
        above = [round(float(v), 4) for v in difference(columns[p], columns["random"])]
        below = [round(float(v), 4) for v in difference(columns[p], columns["truth"])]
        share = round(float(columns[p].mean()), 4)
        result[p] = {"share": share, "less_random": above, "less_oracle": below}
        print(f"{p:<11} {share:.3f}   less random {above}   less oracle {below}")
    return result


SPEED = """
import json, time, torch
from refimg.adapters.towers import import_open_clip, import_transformers
import_open_clip()
import_transformers().CLIPModel
from refimg.sandbox.painter import paint_picture
from refimg.sandbox.scorers import SandboxAesthetic, SandboxClipScore, SandboxPickScore
from refimg.score import Batch, raw_scores
from tools.train_sandbox.pictures import make_pair
torch.set_num_threads(2)
specs = [spec for seed in (1, 2) for spec in make_pair(seed)]
images = tuple(paint_picture(s.attributes, s.seed) for s in specs)
scorers = [SandboxPickScore(), SandboxClipScore(), SandboxAesthetic()]
begin = time.perf_counter()
for scorer in scorers: scorer.load()
load, times = time.perf_counter() - begin, []
for k in range(20):
    begin = time.perf_counter()
    raw_scores(Batch(images, f"a fox in the snow, take {k}"), scorers)
    times.append(time.perf_counter() - begin)
print(json.dumps([load, sorted(times)[10], min(times)]))
"""


def speed() -> dict:
    """Seconds to load after imports, and to score four new images on a new text."""
    made = subprocess.run([sys.executable, "-c", SPEED], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    load, middle, best = json.loads(made.stdout.strip().splitlines()[-1])
    print(f"\nload {load:.2f} s after imports; four images, three scorers: {1000 * middle:.0f} ms "
          f"(median of 20), {1000 * best:.0f} ms (best)")
    return {"load_s": round(load, 3), "score4_ms": round(1000 * middle, 1),
            "score4_best_ms": round(1000 * best, 1)}


def spread(work, numbers: range) -> list:
    """The results of all numbers, from two processes."""
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    context = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=one_thread) as pool:
        found = list(pool.map(work, numbers, chunksize=10))
    del os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]
    return found


def main() -> None:
    """Prints the tables and, as the last line, the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, default=2000, metavar="N", help="pairs and groups")
    parser.add_argument("--groups", type=int, help="groups, if not as many as pairs")
    given, started = parser.parse_args(), time.time()
    result = {"speed": speed()}
    result["pairs"] = report_pairs(spread(pair, range(given.quick)))
    groups = given.quick if given.groups is None else given.groups
    result["selection"] = report_groups(spread(group, range(groups)))
    result["minutes"] = round((time.time() - started) / 60, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
