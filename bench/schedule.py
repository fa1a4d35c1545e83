"""The schedule of a story against its bound: chained images, overlapped agents and scoring.

Fakes with fixed latencies stand for the models. `sequential_s` is the same story done one scene
after another and one stage after another, really run, with the package's own stage functions.
A story without markers is planned first, which is one call more before all others. An inspector
writes a checklist while the agents are at work and looks at all images of a scene at once, so a
scene takes at most one look longer.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from bench._chain import Figures, chained, pipeline, report, sequential, story

FIGURES = Figures(llm=0.15, image=0.5, score=0.075)


def main() -> None:
    """Runs both, after a warm-up, and reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asyncio.run(chained(FIGURES, folder / "warm"))
        wall, block = asyncio.run(chained(FIGURES, folder / "run"))
        looked, held = asyncio.run(chained(FIGURES, folder / "looked", inspected=True))
        planned, _ = asyncio.run(chained(FIGURES, folder / "planned", {}))
        one_by_one = asyncio.run(
            sequential(pipeline(FIGURES), story(FIGURES.scenes), folder / "sequential"))
    bound = FIGURES.bound + FIGURES.llm
    print(f"with a plan        {planned:6.2f} s  {planned / bound:5.2f} x {bound:.2f} s")
    bound = FIGURES.bound + FIGURES.scenes * FIGURES.llm
    print(f"with an inspector  {looked:6.2f} s  {looked / bound:5.2f} x {bound:.2f} s, "
          f"loop held at most {1000 * held:.1f} ms")
    report(wall, FIGURES.bound, one_by_one, block, "1.05 x bound + 0.3 s")


if __name__ == "__main__":
    main()
