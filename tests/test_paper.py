"""The study on the page of `validate`: its numbers, made again by other code, and its prose.

Nothing of `refimg.validate` is used here: sets of k pictures are enumerated one by one, intervals
are written out. What is compared with is the output that is committed in the notebook.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd
import pytest
from scipy.stats import t

from .house import read_notebook
from .sampling import sampled

ROOT = Path(__file__).resolve().parent.parent
PAGE = read_notebook(ROOT / "nbs" / "04_validate.ipynb").cells
STUDY = pd.read_parquet(ROOT / "bench" / "results" / "study.parquet")
LATENCY = ROOT / "bench" / "results" / "story_latency.json"
NUMBER = re.compile(r"[-+]?\d*\.?\d+")
K = 4
PLANTED = [(part, effect) for part in ("prompts", "stories") for effect in (0.0, 0.08)]


def printed(code: str) -> list[list[str]]:
    """The rows of the table under the only cell that holds that code."""
    cell, = [c for c in PAGE if c.cell_type == "code" and code in c.source]
    rows = re.findall(r"<tr.*?</tr>", cell.outputs[-1].data["text/html"], re.DOTALL)
    texts = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(text).strip() for text in row] for row in texts]


def pictures(part: str, arm: str, effect: float) -> dict[str, list[dict]]:
    """The pictures of an arm by unit."""
    found: dict[str, list[dict]] = {}
    for row in STUDY.to_dict("records"):
        if (row["part"], row["arm"], row["effect"]) == (part, arm, effect):
            found.setdefault(row["story"], []).append(row)
    return found


def best(rows: list[dict], metric: str, k: int) -> float:
    """The mean over every set of k pictures of what its best one has, by the overall."""
    means = []
    for some in itertools.combinations(rows, k):
        top = max(row["overall"] for row in some)
        means.append(fmean(float(row[metric]) for row in some if row["overall"] == top))
    return fmean(means)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and t interval, written out."""
    mean, n = fmean(values), len(values)
    half = t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def same(text: str, numbers: tuple[float, ...]) -> bool:
    """Whether a text shows these numbers, at the precision it has."""
    shown = NUMBER.findall(text)
    steps = [10.0 ** -len(one.partition(".")[2]) for one in shown]
    return len(shown) == len(numbers) and all(
        abs(float(one) - value) <= step / 2 + 1e-9
        for one, step, value in zip(shown, steps, numbers, strict=True))


@pytest.mark.parametrize("metric", sampled(["right", "overall", "all_right"], 3))
def test_the_four_cells(metric):
    arms = pictures("prompts", "original", 0.0), pictures("prompts", "enhanced", 0.08)
    assert len(arms[0]) == 200 and arms[0].keys() == arms[1].keys()
    units = [[best(arm[story], metric, k) for arm in arms for k in (1, K)] for story in arms[0]]
    expected = dict(zip(("original, first", "original, best", "enhanced, first", "enhanced, best"),
                        map(interval, zip(*units, strict=True)), strict=True))
    expected["enhancement"] = interval([c - a for a, _, c, _ in units])
    expected["selection"] = interval([b - a for a, b, _, _ in units])
    expected["both"] = interval([d - a for a, _, _, d in units])
    expected["interaction"] = interval([(d - c) - (b - a) for a, b, c, d in units])
    head, _, *rows = printed('four_cells(prompts["original"], prompts["enhanced .08"], k=4)')
    shown = {row[0]: row[head.index(metric)] for row in rows}
    assert shown.keys() == expected.keys()
    assert {what: text for what, text in shown.items() if not same(text, expected[what])} == {}


def difference(part: str, effect: float, column: str) -> list[float]:
    """By unit: the mean of all enhanced pictures less the mean of all plain ones."""
    plain, sharp = pictures(part, "original", 0.0), pictures(part, "enhanced", effect)
    return [fmean(row[column] for row in sharp[story]) - fmean(row[column] for row in plain[story])
            for story in plain]


@pytest.mark.all
@pytest.mark.parametrize(("part", "effect"), PLANTED)
def test_the_planted_effects_are_covered(part, effect):
    found, planted = interval(difference(part, effect, "right")), fmean(
        difference(part, effect, "planted"))
    assert (planted == 0) if effect == 0 else (0.06 < planted <= effect)
    assert found[1] < planted < found[2]
    row = printed('"planted": d["planted"].mean()')[1 + PLANTED.index((part, effect))]
    assert same(row[-2], (planted,)) and same(row[-1], found)


def test_the_seconds_are_those_of_the_benchmark():
    cases = json.loads(LATENCY.read_text("utf-8"))["result"]["cases"]
    keys = "sequential_s", "wall_s", "t_chain_s"
    shown = printed('"t_chain_s": "bound"')[2:]
    assert len(shown) == len(cases) == 8
    for row, case in zip(shown, cases, strict=True):
        assert same(" ".join(row[-4:-1]), tuple(case["scale"] * case[key] for key in keys))
        assert case["figures"] in row and row[-1] == f"1/{case['scale']}"


def test_no_result_is_typed_by_hand():
    prose = [c.source for c in PAGE if c.cell_type == "markdown"]
    typed = {n for text in prose for n in NUMBER.findall(re.sub(r"`.*?`|\]\(\S+\)", "", text))}
    set_by_hand = {"0", ".2", ".12", ".08"}  # what the painter was given
    given_to_fakes = {"33", "70", "10", "20", "15", "30", "8"}
    assert typed - set_by_hand - given_to_fakes == {"1"}  # scene 1
