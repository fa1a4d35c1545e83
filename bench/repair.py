"""Does editing what failed beat drawing more? Four images and two repair rounds, against eight.

    python bench/repair.py                  2,000 prompts, 500 for where it vanishes (an hour)
    python bench/repair.py --prompts 400    fewer of them

Every prompt states four attributes or more, and each of them goes wrong with p = .2. Both ways use
at most eight images, the same scorers (the sandbox's, and the checklist of its inspector) and
select by overall; the first four images are the same ones. A line below the table compares with
the best of only as many images as the repairs used. The painter's truth says who is right:
"all right" is the share of selected images that show everything that is stated. In an edit each
named attribute fails with p = .2 and every other one is lost with p = .03. Both numbers are those
of the sandbox's author, so the gain is planted. What the bench shows is where it would vanish:
edits that fail half the time, an inspector that errs twice as often, and both.
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import numpy as np

from bench.study import told
from refimg import Pipeline, Scene, Story
from refimg.sandbox.inspector import Inspector
from refimg.sandbox.painter import Painter, truth
from refimg.sandbox.world import read_prompt
from refimg.validate.statistics import paired_interval
from tools.train_sandbox.pictures import attributes_by_chance

LONG = True
SEED, WIDTH, ROUNDS = 33_2026, 256, 2
DOUBLED = 0.035  # of verdicts turned around, as many as are wrong without it
WORLDS = {  # name: edit failure, turned verdicts
    "repaired": (0.2, 0.0), "edits fail at .5": (0.5, 0.0),
    "inspector errs twice as often": (0.2, DOUBLED), "both": (0.5, DOUBLED)}


def pipeline(number: int, failure: float, turned: float, **settings: int) -> Pipeline:
    """The sandbox with an inspector; a prompt's first images are the same in all ways."""
    painter = Painter(width=WIDTH, edit_error=failure)
    return Pipeline(image_model=painter, inspector=Inspector(error=turned), seed=number,
                    max_enhancement_iterations=0, plan=False, **settings)


async def selected(made: Pipeline, prompt: str) -> dict:
    """What is right in the image that a run selects, and what that took."""
    stated = read_prompt(prompt)
    with tempfile.TemporaryDirectory() as folder:
        result = await made.run(Story(scenes=[Scene(prompt=prompt)]), output_dir=folder)
        scene = result.scenes[0]
        shown = [truth(item.image.image_path)["attributes"] for item in scene.variations]
    right = [sum(own.get(a) == v for a, v in stated.items()) / len(stated) for own in shown]
    overall = [item.scores.overall for item in scene.variations]
    drawn = sum(item.edits is None for item in scene.variations)
    best = [max(range(n), key=lambda k: (not scene.variations[k].defects, overall[k]))
            for n in range(1, drawn + 1)]
    at = next(k for k, item in enumerate(scene.variations) if item.selected)
    return {"right": right[at], "images": len(shown), "gain": overall[at] - overall[best[-1]],
            "best_of": [right[k] for k in best]}


async def examine(number: int) -> dict[str, dict]:
    """One prompt in all ways."""
    rng = np.random.default_rng([SEED, number])
    prompt = told(rng, attributes_by_chance(rng), {"subject"}, 4)
    ways = {"best of 8": pipeline(number, 0.2, 0.0, num_variations=8)}
    ways |= {name: pipeline(number, *world, num_variations=4, repair_rounds=ROUNDS)
             for name, world in WORLDS.items() if name == "repaired" or number % 4 == 0}
    return {name: await selected(made, prompt) for name, made in ways.items()}


def work(numbers: list[int]) -> list[dict]:
    """Examine some prompts, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    return [asyncio.run(examine(number)) for number in numbers]


def report(rows: list[dict]) -> dict:
    """Print the table and return the figures."""
    base = np.array([row["best of 8"]["right"] == 1 for row in rows], float)
    drawn = np.array([row["best of 8"]["best_of"] for row in rows]) == 1
    result, lines = {"prompts": len(rows), "best_of_n": round(float(base.mean()), 4)}, []
    lines.append(f"  {'':32} all right   right   images   all right less best of 8")
    for name in rows[0]:
        here = np.array([name in row for row in rows])
        own = [row[name] for row in rows if name in row]
        all_right = np.array([one["right"] == 1 for one in own], float)
        gap = paired_interval(all_right - base[here])
        right, images = (np.mean([one[key] for one in own]) for key in ("right", "images"))
        told = "" if name == "best of 8" else f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
        lines.append(f"  {name:32} {all_right.mean():9.3f} {right:7.3f} {images:8.2f}   {told}")
        if name in WORLDS:
            key = "" if name == "repaired" else f"_{name.replace(' ', '_')}"
            figures = {"repaired": all_right.mean(), "images": images, "gain": gap.mean,
                       "gain_low": gap.low, "gain_high": gap.high}
            result |= {f"{part}{key}": round(float(x), 4) for part, x in figures.items()}
    as_many = math.ceil(np.mean([row["repaired"]["images"] for row in rows]))
    gap = paired_interval(np.array([row["repaired"]["right"] == 1 for row in rows], float)
                          - drawn[:, as_many - 1])
    result |= {"best_of": [round(float(x), 4) for x in drawn.mean(0)], "as_many": as_many,
               "gain_of_as_many": [round(x, 4) for x in (gap.mean, gap.low, gap.high)]}
    lines.append("  best of 1 to 8: " + " ".join(f"{x:.3f}" for x in drawn.mean(0)))
    lines.append(f"  repaired less best of {as_many}, as many images as it used: "
                 f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
    result["lowered"] = sum(row[name]["gain"] < 0 for row in rows for name in WORLDS if name in row)
    print(f"{len(rows)} prompts, 95 % intervals by prompt", *lines, sep="\n")
    print(f"  runs that returned a lower overall than before their repair: {result['lowered']}")
    return result


def main() -> None:
    """Examine the prompts in two processes, and print tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2000)
    count, started = parser.parse_args().prompts, time.time()
    parts = [[*range(at, min(at + 20, count))] for at in range(0, count, 20)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = [row for part in pool.map(work, parts) for row in part]
    result = report(rows) | {"minutes": round((time.time() - started) / 60, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
