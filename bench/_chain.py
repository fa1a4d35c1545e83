"""What the benchmarks of one story share: fakes with fixed latencies, the bound, two schedules."""

import asyncio
import functools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from refimg import Pipeline, Scene, Story, enhance_prompt_iterative, generate_images, score_images
from tests.fakes import FakeChat, FakeImages, FakeScorer, critique

OVERALL = (60, 65, 70, 75)
MARKERS = {"style": "ink drawing"}


@dataclass(frozen=True)
class Figures:
    """The latencies of a story's calls, in seconds, and how many there are."""

    llm: float  # one call of an agent
    image: float  # one image
    score: float  # one image in one batch
    scenes: int = 4
    variations: int = 4
    rounds: int = 4

    @property
    def enhancement(self) -> float:
        """Seconds of a scene's enhancement."""
        return 2 * self.rounds * self.llm

    @property
    def scoring(self) -> float:
        """Seconds of scoring a scene's images."""
        return self.variations * self.score

    @property
    def bound(self) -> float:
        """Seconds of the fastest schedule that keeps the chain; all images come at once."""
        return self.enhancement + self.scenes * (self.image + self.scoring)

    @property
    def one_by_one(self) -> float:
        """Seconds of one scene after another, one stage after another."""
        return self.scenes * (self.enhancement + self.image + self.scoring)


def agents(figures: Figures) -> tuple[FakeChat, FakeChat]:
    """A director that numbers its versions, and a critic that scores by that number."""

    def write(messages, schema, number):
        if schema is not None:
            return json.dumps(MARKERS)
        last = re.findall(r"prompt, version (\d)", messages[-1].content)
        return f"A better prompt, version {int(last[-1]) + 1 if last else 1}"

    def judge(messages, schema, number):
        version = re.findall(r"prompt, version (\d)", messages[-1].content)[-1]
        return critique(OVERALL[int(version) - 1])

    make = functools.partial(FakeChat, seconds=figures.llm)
    return make(write, name="director"), make(judge, name="critic")


def inspector(figures: Figures) -> FakeChat:
    """Writes a question per scene, and says yes to it for each image."""

    def look(messages, schema, number):
        if messages[-1].images:
            return json.dumps({"answers": [{"question": 0, "verdict": "yes", "reason": "seen"}]})
        return json.dumps({"questions": [{"text": "Is there a keeper?", "about": "subject"}]})

    made = FakeChat(look, name="inspector", seconds=figures.llm)
    made.sees_images = True
    return made


def story(scenes: int, markers: dict[str, str] = MARKERS) -> Story:
    """A story of so many scenes; without markers it is planned."""
    told = [Scene(prompt=f"a keeper, scene {n}") for n in range(1, scenes + 1)]
    return Story(scenes=told, consistency_markers=markers)


def pipeline(figures: Figures, inspected: bool = False) -> Pipeline:
    """The pipeline under test, on fresh fakes."""
    director, critic = agents(figures)
    return Pipeline(director=director, critic=critic, image_model=FakeImages(seconds=figures.image),
                    scorers=[FakeScorer(seconds=figures.score)], num_variations=figures.variations,
                    inspector=inspector(figures) if inspected else None,
                    max_enhancement_iterations=figures.rounds, quality_threshold=0)


async def hold(longest: list[float]) -> None:
    """Notes the longest time for which the event loop did not come back, until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.002)
        longest[0] = max(longest[0], time.perf_counter() - before - 0.002)


async def timed(p: Pipeline, told: Story, folder: Path) -> tuple[float, float]:
    """Seconds of one run and the longest hold of the loop."""
    longest = [0.0]
    ticker = asyncio.create_task(hold(longest))
    started = time.perf_counter()
    await p.run(told, output_dir=folder)
    seconds = time.perf_counter() - started
    ticker.cancel()
    return seconds, longest[0]


async def chained(
    figures: Figures, folder: Path, markers: dict[str, str] = MARKERS, inspected: bool = False
) -> tuple[float, float]:
    """Seconds of one run of a new pipeline and the longest hold of the loop; its calls counted."""
    p = pipeline(figures, inspected)
    measured = await timed(p, story(figures.scenes, markers), folder)
    images, plans = figures.variations * figures.scenes, int(not markers)
    calls = len(p.director.calls) + len(p.critic.calls)
    assert calls == plans + 2 * figures.rounds * figures.scenes
    assert len(p.image_model.requests) == images
    assert sum(len(batch.images) for batch in p.scorers[0].batches) == images
    assert not inspected or len(p.inspector.calls) == images + figures.scenes
    return measured


async def sequential(p: Pipeline, told: Story, folder: Path) -> float:
    """Seconds of the same work, one scene and one stage after another."""
    reference, started = (), time.perf_counter()
    for scene in told.scenes:
        best = await enhance_prompt_iterative(scene.prompt, director=p.director, critic=p.critic)
        images = await generate_images(best.final_prompt, p.num_variations, output_dir=folder,
                                       model=p.image_model, references=reference)
        scores = await score_images([i.image_path for i in images], scene.prompt, scorers=p.scorers)
        ranked = sorted(zip(images, scores, strict=True), key=lambda pair: -pair[1].overall)
        reference = (ranked[0][0].image_path,)
    return time.perf_counter() - started


def keys(wall: float, bound: float, one_by_one: float, block: float) -> dict[str, float]:
    """One measurement under the names that every benchmark of a story uses."""
    result = {"wall_s": wall, "t_chain_s": bound, "sequential_s": one_by_one,
              "ratio": wall / bound, "max_block_ms": 1000 * block}
    return {key: round(value, 3) for key, value in result.items()}


def report(wall: float, bound: float, one_by_one: float, block: float, limits: str) -> None:
    """Prints a table and, as the last line, the result as JSON."""
    rows = {"bound of a chain": bound, "this schedule": wall, "one by one": one_by_one}
    for name, seconds in rows.items():
        print(f"{name:<18} {seconds:6.2f} s  {seconds / bound:5.2f} x")
    print(f"event loop held at most {1000 * block:.1f} ms; limits: {limits}, 50 ms")
    print(json.dumps(keys(wall, bound, one_by_one, block)))
