"""The report of 20 scenes with 4 pictures each: how long it takes, and how much it weighs.

The pictures are the sandbox's, 1280 pixels wide and all different; a first report of one scene
pays for what is imported once.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from refimg import Pipeline, Scene, Story
from refimg.sandbox.painter import Painter
from refimg.view import report
from tests.fakes import FakeScorer

SCENES, VARIATIONS = 20, 4
SECONDS, MEGABYTES = 5, 10
PLACES = ("on the beach at dawn", "in a storm at night", "in the harbour", "on the cliffs at dusk")


def story(scenes: int) -> Story:
    """A story of so many scenes."""
    prompts = [f"A keeper in a red coat {PLACES[n % 4]}, {n} gulls" for n in range(scenes)]
    return Story(scenes=[Scene(prompt=prompt) for prompt in prompts], title="Twenty scenes")


def measured(folder: Path) -> dict[str, float]:
    """Seconds and megabytes of a report."""
    pipeline = Pipeline.from_env(image_model=Painter(width=1280), scorers=[FakeScorer()], seed=1,
                                 num_variations=VARIATIONS, chain="none")
    result = asyncio.run(pipeline.run(story(SCENES), output_dir=folder))
    report(result.model_copy(update={"scenes": result.scenes[:1]}), folder / "first.html")
    began = time.perf_counter()
    path = report(result, folder / "report.html")
    return {"report_s": time.perf_counter() - began, "report_mb": path.stat().st_size / 1e6}


def main() -> None:
    """Measures and reports; an AssertionError where a limit is passed."""
    with tempfile.TemporaryDirectory() as folder:
        result = {name: round(value, 2) for name, value in measured(Path(folder)).items()}
    print(f"report of {SCENES} scenes with {VARIATIONS} pictures each")
    print(f"{'seconds':>10} {result['report_s']:8.2f}   allowed {SECONDS}")
    print(f"{'MB':>10} {result['report_mb']:8.2f}   allowed {MEGABYTES}")
    print(json.dumps(result))
    assert result["report_s"] <= SECONDS and result["report_mb"] <= MEGABYTES


if __name__ == "__main__":
    main()
