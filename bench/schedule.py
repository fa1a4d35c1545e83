"""The schedule of a story against its bound: chained images, overlapped agents and scoring.

Fakes with fixed latencies stand for the models. `sequential_s` is the same story done one scene
after another and one stage after another, really run, with the package's own stage functions.
"""

import asyncio
import functools
import json
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(sys.path.pop(0))  # bench/ comes last: it has a statistics.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from refimg import Pipeline, Scene, Story, enhance_prompt_iterative, generate_images, score_images
from tests.fakes import FakeChat, FakeImages, FakeScorer, critique

SCENES = VARIATIONS = ROUNDS = 4
LLM, IMAGE, SCORE = 0.15, 0.5, 0.075
BOUND = 2 * ROUNDS * LLM + SCENES * (IMAGE + VARIATIONS * SCORE)
OVERALL = (60, 65, 70, 75)


def agents() -> tuple[FakeChat, FakeChat]:
    """A director that numbers its versions, and a critic that scores by that number."""

    def write(messages, schema, number):
        last = re.findall(r"prompt, version (\d)", messages[-1].content)
        return f"A better prompt, version {int(last[-1]) + 1 if last else 1}"

    def judge(messages, schema, number):
        version = re.findall(r"prompt, version (\d)", messages[-1].content)[-1]
        return critique(OVERALL[int(version) - 1])

    make = functools.partial(FakeChat, seconds=LLM)
    return make(write, name="director"), make(judge, name="critic")


def story() -> Story:
    """Four scenes."""
    return Story(scenes=[Scene(prompt=f"a keeper, scene {n}") for n in range(1, SCENES + 1)])


def pipeline() -> Pipeline:
    """The pipeline under test, on fresh fakes."""
    director, critic = agents()
    return Pipeline(director=director, critic=critic, image_model=FakeImages(seconds=IMAGE),
                    scorers=[FakeScorer(seconds=SCORE)], num_variations=VARIATIONS,
                    max_enhancement_iterations=ROUNDS)


async def hold(longest: list[float]) -> None:
    """Notes the longest time for which the event loop did not come back, until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.002)
        longest[0] = max(longest[0], time.perf_counter() - before - 0.002)


async def timed(p: Pipeline, folder: Path) -> tuple[float, float]:
    """Seconds of one run and the longest hold of the loop."""
    longest = [0.0]
    ticker = asyncio.create_task(hold(longest))
    started = time.perf_counter()
    await p.run(story(), output_dir=folder)
    seconds = time.perf_counter() - started
    ticker.cancel()
    return seconds, longest[0]


async def chained(folder: Path) -> tuple[float, float]:
    """Seconds of one run and the longest hold of the loop, after a warm-up run."""
    await pipeline().run(story(), output_dir=folder / "warm")
    p = pipeline()
    measured = await timed(p, folder / "run")
    assert len(p.director.calls) + len(p.critic.calls) == 2 * ROUNDS * SCENES == 32
    assert len(p.image_model.requests) == VARIATIONS * SCENES == 16
    assert sum(len(batch.images) for batch in p.scorers[0].batches) == 16
    return measured


async def sequential(p: Pipeline, folder: Path) -> float:
    """Seconds of the same work, one scene and one stage after another."""
    reference, started = (), time.perf_counter()
    for scene in story().scenes:
        best = await enhance_prompt_iterative(scene.prompt, director=p.director, critic=p.critic)
        images = await generate_images(best.final_prompt, VARIATIONS, output_dir=folder,
                                       model=p.image_model, references=reference)
        scores = await score_images([i.image_path for i in images], scene.prompt, scorers=p.scorers)
        ranked = sorted(zip(images, scores, strict=True), key=lambda pair: -pair[1].overall)
        reference = (ranked[0][0].image_path,)
    return time.perf_counter() - started


def report(wall: float, block: float, one_by_one: float, limits: str) -> None:
    """Prints a table and, as the last line, the result as JSON."""
    rows = {"bound of a chain": BOUND, "this schedule": wall, "one by one": one_by_one}
    for name, seconds in rows.items():
        print(f"{name:<18} {seconds:6.2f} s  {seconds / BOUND:5.2f} x")
    print(f"event loop held at most {1000 * block:.1f} ms; limits: {limits}, 50 ms")
    result = {"wall_s": wall, "t_chain_s": BOUND, "sequential_s": one_by_one,
              "ratio": wall / BOUND, "max_block_ms": 1000 * block}
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


def main() -> None:
    """Runs both and reports."""
    with tempfile.TemporaryDirectory() as folder:
        wall, block = asyncio.run(chained(Path(folder)))
        one_by_one = asyncio.run(sequential(pipeline(), Path(folder) / "sequential"))
    report(wall, block, one_by_one, "1.05 x bound + 0.3 s")


if __name__ == "__main__":
    main()
