"""Do a judge and an inspector select better images? On the painter's truth, best of four.

    python bench/inspection.py                 300 prompts (minutes)
    python bench/inspection.py --prompts 1000  more of them

Every prompt states four attributes or more; its four images get each of them wrong with p = .2.
Right is the share of what is stated that was drawn, and "all right" the share of selected images
that show all of it. "Trained" selects by the sandbox's PickScore, CLIP-Score and aesthetic at their
weights. The judge is asked about the two best of them, and a win of the second swaps; it prefers
the first image in 15 of 100 questions whatever it sees. Asked once it is told the best image first,
or second; "judge" is asked in both orders, as `judge_pair` does it. "Checklist" selects by the
inspector alone, and its ties go to the earlier image. The intervals are over prompts. All models
are the sandbox's: the figures say that selection works as it is written, and nothing about real
models.
"""

import argparse
import asyncio
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import numpy as np

from bench.study import told
from refimg.inspection import ChecklistScorer, ask_judge
from refimg.inspection.checklist import as_jpeg
from refimg.inspection.judge import judge_messages
from refimg.sandbox.inspector import Inspector
from refimg.sandbox.judge import Judge
from refimg.sandbox.painter import choose_attributes, paint_picture
from refimg.sandbox.questions import meant
from refimg.sandbox.scorers import SandboxAesthetic, SandboxClipScore, SandboxPickScore
from refimg.sandbox.world import read_prompt
from refimg.score import WEIGHTS, Batch, raw_scores
from refimg.validate.statistics import Interval, paired_interval
from tools.train_sandbox.pictures import attributes_by_chance

LONG = True
SEED, COUNT, SIZE = 29_2026, 4, (448, 252)
KINDS = ("subject", "attribute", "count", "relation", "setting", "style")


async def compare(judge: Judge, pair: list, prompt: str) -> dict:
    """What the judge says of two images: once in each order, and of both orders together."""
    told = [json.loads((await judge.reply(judge_messages(prompt, two))).text)["winner"]
            for two in (tuple(map(as_jpeg, pair)), tuple(map(as_jpeg, pair[::-1])))]
    both = [(await ask_judge(judge, *two, prompt)).verdict for two in (pair, pair[::-1])]
    return {"once": told, "both": both}


async def examine(number: int) -> dict:
    """Paint, score, inspect and compare the images of one prompt."""
    rng = np.random.default_rng([SEED, number])
    prompt = told(rng, attributes_by_chance(rng), {"subject"}, 4)
    stated, seeds = read_prompt(prompt), [1000 * number + k for k in range(COUNT)]
    drawn = [choose_attributes(stated, seed) for seed in seeds]
    images = [paint_picture(a, seed, *SIZE) for a, seed in zip(drawn, seeds, strict=True)]
    for image in images:
        image.info = {}  # nobody reads the truth
    kinds = [SandboxPickScore(), SandboxClipScore(), SandboxAesthetic()]
    rows = raw_scores(Batch(tuple(images), prompt), kinds)
    total = sum(WEIGHTS[kind.name] for kind in kinds)
    trained = [sum(WEIGHTS[k.name] * k.to_100(row[k.name].value) for k in kinds) / total
               for row in rows]
    looking = ChecklistScorer(Inspector())
    seen = await looking.ascore(Batch(tuple(images), prompt))
    asked = (await looking.checklist(prompt)).questions
    order = sorted(range(COUNT), key=lambda k: -trained[k])
    right = [{a: own.get(a) == value for a, value in stated.items()} for own in drawn]
    answers = [[about.about, meant(about.text)[0], [one.inspection.answers[at].verdict
                                                    for one in seen]]
               for at, about in enumerate(asked)]
    return {"right": [sum(own.values()) / len(own) for own in right], "each": right,
            "trained": trained, "pickscore": [row["pickscore"].value for row in rows],
            "checklist": [one.value for one in seen], "answers": answers, "best": order[:2],
            "judge": await compare(Judge(), [images[k] for k in order[:2]], prompt)}


def work(numbers: list[int]) -> list[dict]:
    """Examine some prompts, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    return [asyncio.run(examine(number)) for number in numbers]


# tables


def show(title: str, lines: list[list]) -> None:
    """Print a table."""
    print(f"\n{title}")
    wide = [max(len(str(row[at])) for row in lines) for at in range(len(lines[0]))]
    for row in lines:
        print("  " + "  ".join(str(cell).ljust(w) for cell, w in zip(row, wide, strict=True)))


def written(found: Interval) -> str:
    """A mean with its interval, where units differ."""
    if np.isnan(found.low):
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def selections(rows: list[dict]) -> dict[str, list[int]]:
    """Which image each way of selecting takes."""
    def best(key: str) -> list[int]:
        return [max(range(COUNT), key=lambda k, own=row[key]: (own[k], -k)) for row in rows]

    def judged(way: str, at: int) -> list[int]:
        loses = {"both": ("b", "a")[at], "once": ("second", "first")[at]}[way]
        return [row["best"][row["judge"][way][at] == loses] for row in rows]

    return {"first image": [0] * len(rows), "trained": best("trained"),
            "judge once, best first": judged("once", 0),
            "judge once, best second": judged("once", 1), "judge": judged("both", 0),
            "judge, exchanged": judged("both", 1), "checklist": best("checklist"),
            "oracle": best("right")}


def show_selections(rows: list[dict]) -> dict:
    """How right the selected images are."""
    lines = [["selected by", "right", "all right", "right, against trained", "all right, against"]]
    result, right = {}, {name: np.array([row["right"][k] for row, k in zip(rows, ks, strict=True)])
                         for name, ks in selections(rows).items()}
    base = right["trained"]
    for name, own in right.items():
        gains = [paired_interval(own - base), paired_interval((own == 1.0) - (base == 1.0) * 1.0)]
        lines.append([name, f"{own.mean():.3f}", f"{(own == 1).mean():.3f}", *map(written, gains)])
        key = name.replace(",", "").replace(" ", "_")
        result[f"right_{key}"] = round(float(own.mean()), 4)
        result[f"all_right_{key}"] = round(float((own == 1).mean()), 4)
        if name in ("judge", "judge once, best second", "checklist"):
            result |= {f"{part}_{key}": [round(float(x), 4) for x in gain[:3]]
                       for part, gain in zip(("gain", "gain_all"), gains, strict=True)}
    show(f"{len(rows)} prompts, best of {COUNT}", lines)
    over_first = paired_interval(right["checklist"] - right["first image"])
    print(f"  checklist against the first image: {written(over_first)}")
    return result | {"checklist_over_first": [round(float(x), 4) for x in over_first[:3]]}


def show_judge(rows: list[dict]) -> dict:
    """How often the judge is right about the two best, and what their order does to it."""
    pairs = [(row["right"][row["best"][0]] - row["right"][row["best"][1]], row["judge"])
             for row in rows]
    signs = {"first": 1, "second": -1, "tie": 0, "a": 1, "b": -1}
    lines, result = [["asked", "right", "wrong", "tie", "first wins - second wins"]], {}
    for way in ("once", "both"):
        said = np.array([[signs[v] for v in judge[way]] for _, judge in pairs])
        differ = [(d > 0) - (d < 0) for d, _ in pairs]
        agreed = (said * [[d, -d] for d in differ])[np.array(differ) != 0]
        shares = [(agreed == s).mean() for s in (1, -1, 0)]
        place = paired_interval(said.mean(1))  # of both orders: what is seen cancels out
        lines.append([way, *(f"{s:.3f}" for s in shares), written(place)])
        result |= {f"judge_{way}_right": round(float(shares[0]), 4),
                   f"judge_{way}_wrong": round(float(shares[1]), 4),
                   f"judge_{way}_position": round(float(place.mean), 4)}
    differ = sum(d != 0 for d, _ in pairs)
    show(f"The judge on the two best: {differ} pairs of which one is more right", lines)
    return result | {"judge_pairs": differ}


def show_kinds(rows: list[dict]) -> dict:
    """The inspector's verdicts against the truth, and PickScore's order, by kind of question."""
    lines, result = [["about", "right things", "yes", "wrong things", "no", "AUC", "PickScore"]], {}
    points = {"yes": 1.0, "unsure": 0.5, "no": 0.0}
    for kind in (*KINDS, "all"):
        said: dict[bool, list[str]] = {True: [], False: []}
        order: list[tuple[float, float]] = []
        for row in rows:
            for about, attribute, verdicts in row["answers"]:
                if kind not in (about, "all"):
                    continue
                truths = [each[attribute] for each in row["each"]]
                for is_right, verdict in zip(truths, verdicts, strict=True):
                    said[is_right].append(verdict)
                for good, bad in product(range(COUNT), repeat=2):
                    if truths[good] and not truths[bad]:
                        leads = (points[verdicts[good]] - points[verdicts[bad]],
                                 row["pickscore"][good] - row["pickscore"][bad])
                        order.append(tuple((lead > 0) + (lead == 0) / 2 for lead in leads))
        yes, no = said[True].count("yes") / len(said[True]), said[False].count("no") / len(
            said[False])
        auc = np.mean(order, axis=0)
        lines.append([kind, len(said[True]), f"{yes:.3f}", len(said[False]), f"{no:.3f}",
                      *(f"{own:.3f}" for own in auc)])
        result[kind] = {"yes_if_right": round(yes, 3), "no_if_wrong": round(no, 3),
                        "auc": round(float(auc[0]), 3), "auc_pickscore": round(float(auc[1]), 3)}
    show("The checklist against the truth; AUC: an image that has it is before one that has not",
         lines)
    return {"kinds": result}


def main() -> None:
    """Examine the prompts, print the tables and, as the last line, a JSON object."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--prompts", type=int, default=300)
    count, started = asked.parse_args().prompts, time.time()
    parts = [list(range(at, count, 20)) for at in range(20)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rows = [row for part in pool.map(work, parts) for row in part]
    result = {"prompts": len(rows)} | show_selections(rows) | show_judge(rows) | show_kinds(rows)
    print(json.dumps(result | {"minutes": round((time.time() - started) / 60, 1)}))


if __name__ == "__main__":
    main()
