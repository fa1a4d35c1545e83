"""How long a story takes with the latencies that its providers had: 33 to 70 s a scene.

A scene's prompt takes 10 to 20 s, its images 15 to 30 s, their scores 8 to 20 s. Fakes run ten
times as fast, and fifty times for long stories. Both schedules are really run: the pipeline's, and
one scene after another, one stage after another. The table is in seconds of the story; the JSON is
in seconds of the run, `scale` seconds of the story each.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from bench._chain import Figures, chained, keys, pipeline, sequential, story

LONG = True
STAGES = {"lower": (10, 15, 8), "upper": (20, 30, 20)}  # seconds of a scene: prompt, images, scores
PLAN = [(1, 10), (4, 10), (12, 50), (30, 50)]  # scenes, scale
ALLOWED = "1.05 x bound + 0.3 s of the run"


def figures(which: str, scenes: int, scale: float) -> Figures:
    """The latencies of single calls that make up the stages' figures: 4 rounds, 4 images."""
    prompt, images, scores = STAGES[which]
    return Figures(llm=prompt / 8 / scale, image=images / scale, score=scores / 4 / scale,
                   scenes=scenes)


def measured(which: str, scenes: int, scale: float, folder: Path) -> dict:
    """One case: the pipeline's seconds, the bound, and the seconds of one by one."""
    plan = figures(which, scenes, scale)
    wall, block = asyncio.run(chained(plan, folder / "run"))
    one_by_one = asyncio.run(sequential(pipeline(plan), story(scenes), folder / "sequential"))
    assert one_by_one >= plan.one_by_one, "the calls were shorter than planned"
    return {"figures": which, "scenes": scenes, "scale": scale} | keys(
        wall, plan.bound, one_by_one, block)


def is_kept(case: dict) -> bool:
    """Whether the case is within the limit."""
    return case["wall_s"] <= 1.05 * case["t_chain_s"] + 0.3


def show(case: dict) -> None:
    """One line of the table, in seconds of the story."""
    seconds = (case["scale"] * case[key] for key in ("sequential_s", "wall_s", "t_chain_s"))
    columns = " ".join(f"{value:9.0f} s" for value in seconds)
    print(f"{case['scenes']:6} {case['figures']:>7} {columns} {case['ratio']:9.3f}"
          f"  1/{case['scale']}  {'yes' if is_kept(case) else 'NO'}", flush=True)


def main() -> None:
    """Runs every case and reports; the case of the limit is four scenes, upper figures."""
    print(f"scenes figures  one by one    pipeline       bound     ratio  scale  {ALLOWED}")
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(chained(figures("lower", 1, 1000), Path(folder) / "warm"))
        for scenes, scale in PLAN:
            for which in STAGES:
                cases.append(measured(which, scenes, scale, Path(folder) / f"{which}-{scenes}"))
                show(cases[-1])
    limit = next(c for c in cases if (c["scenes"], c["figures"]) == (4, "upper"))
    print(json.dumps({name: limit[name] for name in keys(1, 1, 1, 1)} | {"cases": cases}))
    if not is_kept(limit):
        sys.exit(f"four scenes took {limit['wall_s']} s, allowed: {ALLOWED}")


if __name__ == "__main__":
    main()
