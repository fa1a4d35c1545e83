"""Do the statistics of refimg.validate hold? Simulated studies, analysed by the package.

Intervals: two arms of n units, 4,000 studies a cell; a study is covered if the 95 % interval of the
mean difference holds the true effect. A/A: one arm of eight images a scene, odd against even, best
of four each; a false positive is an interval without 0. Best of k: the estimate from eight images
against the exact expectation. Bars: coverage .93 to .97 and false positives .03 to .07 in every
cell, bias below .01 sd at every k. `--quick N` uses N studies a cell.
"""

import argparse
import json
import math
import sys
import time
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import numpy as np
from scipy.stats import expon, norm

from refimg.validate import best_weights, paired_interval, win_rate

UNITS = (20, 50, 100)
SCENES = 4  # of a story; one number a story is left, its mean over them
ICC = 0.3  # correlation of the scenes of one story, within an arm
IMAGES = 8
RHO = 0.5  # correlation of the held-out verifier with the score that chooses
STEP = 0.5  # sd; scores rounded to it have many ties
CHUNK = 250  # studies at once


def noise(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Values of mean 0 and sd 1."""
    return rng.exponential(1, shape) - 1 if kind == "exponential" else rng.normal(0, 1, shape)


def arm(rng: np.random.Generator, kind: str, *shape: int, scenes: int, images: int) -> np.ndarray:
    """Scores of sd 1 with shape (…, units, scenes, images); images share story and scene."""
    own = noise(rng, kind, *shape, scenes, images)
    if scenes == 1:
        return own
    return math.sqrt(ICC) * noise(rng, kind, *shape, 1, 1) + math.sqrt(1 - ICC) * own


def chunks(studies: int):
    """How many studies to make at once, until all are made."""
    while studies > 0:
        yield min(CHUNK, studies)
        studies -= CHUNK


def coverage(rng, studies: int, kind: str, n: int, scenes: int, effect: float) -> float:
    """The share of studies whose interval holds the true effect."""
    held = 0
    for many in chunks(studies):
        text = noise(rng, kind, many, n, scenes, 1)
        a, b = (arm(rng, kind, many, n, scenes=scenes, images=1) + text for _ in "ab")
        found = paired_interval((b - a + effect).mean((-1, -2)))
        held += ((found.low <= effect) & (effect <= found.high)).sum()
    return held / studies


def false_positives(rng, studies: int, kind: str, n: int, scenes: int) -> float:
    """The share of studies in which two halves of one arm seem to differ."""
    wrong = 0
    for many in chunks(studies):
        scores = arm(rng, kind, many, n, scenes=scenes, images=IMAGES)
        odd, even = (half_best(scores[..., start::2]) for start in (0, 1))
        wrong += (paired_interval(odd - even).p < 0.05).sum()
    return wrong / studies


def half_best(scores: np.ndarray) -> np.ndarray:
    """The mean over scenes of the best of all images."""
    return (best_weights(scores, scores.shape[-1]) * scores).sum(-1).mean(-1)


def one_sided(rng, studies: int, n: int) -> float:
    """Coverage where the differences themselves are exponential."""
    found = paired_interval(noise(rng, "exponential", studies, n))
    return float(((found.low <= 0) & (found.high >= 0)).mean())


def wins(rng, studies: int, kind: str, n: int, effect: float, step: float) -> float:
    """Coverage of the win rate's interval; scores rounded to `step` have ties."""
    def differences(*shape: int) -> np.ndarray:
        a, b = (noise(rng, kind, *shape) for _ in "ab")
        b = b + effect
        return np.round(b / step) - np.round(a / step) if step else b - a

    true = win_rate(differences(2_000_000)).rate
    found = win_rate(differences(studies, n))
    return float(((found.low <= true) & (true <= found.high)).mean())


def best_exactly(kind: str, k: int, ties: bool) -> float:
    """The expectation of the best of k scores, of mean 0 and sd 1 before rounding."""
    law = norm() if kind == "normal" else expon(loc=-1)
    if not ties:
        grid = np.linspace(-12 if kind == "normal" else -1, 40, 2_000_001)
        below = law.cdf(grid) ** k
        negative = grid <= 0
        return float(np.trapezoid(1 - below[~negative], grid[~negative])
                     - np.trapezoid(below[negative], grid[negative]))
    values = np.arange(-30, 81) * STEP
    below = law.cdf(values + STEP / 2) ** k - law.cdf(values - STEP / 2) ** k
    return float((values * below).sum())


def biases(rng, prompts: int, kind: str, ties: bool) -> list[tuple[float, float]]:
    """At each k the error of the mean estimate, for the score that chooses and a held-out one."""
    scores = noise(rng, kind, prompts, IMAGES)
    scores = np.round(scores / STEP) * STEP if ties else scores
    looked = RHO * scores + math.sqrt(1 - RHO**2) * noise(rng, kind, prompts, IMAGES)
    found = []
    for k in range(1, IMAGES + 1):
        weights, exact = best_weights(scores, k), best_exactly(kind, k, ties)
        means = [(weights * y).sum(-1).mean() for y in (scores, looked)]
        found.append((means[0] - exact, means[1] - RHO * exact))
    return found


def report_intervals(rng, studies: int) -> tuple[list[float], list[float]]:
    """Prints and returns coverage and false positives, cell by cell."""
    error = math.sqrt(0.95 * 0.05 / studies)
    print(f"{studies} studies a cell, Monte-Carlo error {error:.4f}; bars .93-.97 and .03-.07\n")
    print(f"{'arms':<12} {'unit':<24} {'n':>4}  coverage 0 sd  .5 sd   A/A")
    held, wrong = [], []
    for kind, scenes, n in product(("normal", "exponential"), (1, SCENES), UNITS):
        pair = [coverage(rng, studies, kind, n, scenes, effect) for effect in (0.0, 0.5)]
        wrong.append(false_positives(rng, studies, kind, n, scenes))
        held += pair
        unit = "prompt" if scenes == 1 else f"story of {scenes}, ICC {ICC}"
        print(f"{kind:<12} {unit:<24} {n:>4}  {pair[0]:13.4f}  {pair[1]:.4f}  {wrong[-1]:.4f}")
    return held, wrong


def report_beside(rng, studies: int) -> dict:
    """Prints and returns what has no bar: one-sided differences, and the win rate."""
    skewed = {n: one_sided(rng, studies, n) for n in UNITS}
    print("\ncoverage where the differences themselves are exponential (no bar):",
          *(f"n = {n}: {value:.4f}" for n, value in skewed.items()))
    rates: dict = {}
    for kind, effect, step in product(("normal", "exponential"), (0.0, 0.5), (0.0, 2.0)):
        name = f"{kind}, {effect} sd{', many ties' if step else ''}"
        rates[name] = {n: wins(rng, studies, kind, n, effect, step) for n in UNITS}
        cells = " ".join(f"n = {n}: {value:.4f}" for n, value in rates[name].items())
        print(f"coverage of the win rate (no bar), {name}: {cells}")
    return {"one_sided": skewed, "win_rate": rates}


def report_best(rng, prompts: int) -> float:
    """Prints the bias at every k and returns the largest."""
    error = 1.24 / math.sqrt(prompts)  # the best of 8 exponentials has the widest spread, 1.24 sd
    print(f"\nbest of k = 1..{IMAGES} from {IMAGES} images, bias in sd, {prompts} prompts, "
          f"Monte-Carlo error up to {error:.4f}; bar .01")
    worst = 0.0
    for kind, ties in product(("normal", "exponential"), (False, True)):
        found = biases(rng, prompts, kind, ties)
        worst = max(worst, *(abs(value) for pair in found for value in pair))
        for role, place in (("chooses", 0), ("held out", 1)):
            line = " ".join(f"{pair[place]:+.4f}" for pair in found)
            print(f"{kind + (', ties' if ties else ''):<18} {role:<9} {line}")
    return worst


def main() -> None:
    """Prints the tables and, as the last line, the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, default=4000, metavar="N", help="studies a cell")
    studies, began = parser.parse_args().quick, time.time()
    rng = np.random.default_rng(20261123)
    held, wrong = report_intervals(rng, studies)
    beside = report_beside(rng, studies)
    bias = report_best(rng, 250 * studies)
    print(f"\n{time.time() - began:.0f} s")
    print(json.dumps({
        "coverage": float(max(held, key=lambda share: abs(share - 0.95))),
        "aa_false_positive": float(max(wrong, key=lambda share: abs(share - 0.05))),
        "best_of_k_bias": float(bias), "studies": studies, **beside}))


if __name__ == "__main__":
    main()
