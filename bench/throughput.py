"""Many stories at once, beside a bare asyncio sketch that makes the same calls.

A thousand stories of four chained scenes: one round of the agents, then four images of 64x36
pixels a scene. Chat and image models answer after 20 ms. The scorer answers at once: scoring has
one thread, so one batch a scene of 20 ms could not give more than 50 scenes a second.
The sketch has no checks, no fallbacks, no records, no traces and no threads.
"""

import asyncio
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from refimg import Pipeline, Scene, Story, StoryResult
from refimg.enhance import Message, Reply
from refimg.generate import GeneratedImage, ImageRequest
from refimg.score import Batch, RawScore
from tests.fakes import critique, picture

STORIES = 1000
SCENES = VARIATIONS = 4
CONCURRENCY, SECONDS = 32, 0.02
PICTURES = [picture(40 * k) for k in range(VARIATIONS)]
MEGABYTE = 2**20


class Chat:
    """A chat model that gives one answer and keeps nothing."""

    def __init__(self, name: str, answer: str):
        self.name, self.answer = name, answer

    async def reply(self, messages: list[Message], schema: type | None = None) -> Reply:
        await asyncio.sleep(SECONDS)
        return Reply(text=self.answer)


class Images:
    """An image model that has four pictures and keeps nothing."""

    name, max_references, aspect_ratios = "four-pictures", 1, None
    takes_seed = takes_negative_prompt = False
    count = itertools.count()

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        await asyncio.sleep(SECONDS)
        return GeneratedImage(data=PICTURES[next(self.count) % VARIATIONS])


class Scorer:
    """A scorer that looks at one pixel and counts."""

    name, model, calibration = "pickscore", "one-pixel", "identity"

    def __init__(self):
        self.batches = self.images = 0

    def to_100(self, raw: float) -> float:
        return raw * 100 / 255

    def score(self, batch: Batch) -> list[RawScore]:
        self.batches, self.images = self.batches + 1, self.images + len(batch.images)
        return [RawScore(image.getpixel((0, 0))[0]) for image in batch.images]


def stories() -> Iterator[Story]:
    """One story after another."""
    for number in range(STORIES):
        scenes = [Scene(prompt=f"a keeper, scene {n}") for n in range(1, SCENES + 1)]
        yield Story(title=f"story {number}", scenes=scenes, consistency_markers={"mood": "calm"})


def pipeline() -> Pipeline:
    """The pipeline under test."""
    return Pipeline(director=Chat("director", "A better prompt of a keeper."),
                    critic=Chat("critic", critique(70)), image_model=Images(), scorers=[Scorer()],
                    num_variations=VARIATIONS, max_enhancement_iterations=1)


async def measured(p: Pipeline, folder: Path) -> tuple[float, list[float]]:
    """Scenes a second of `run_many`, and the MB that the process has after every 100 stories."""
    process, memory, started = psutil.Process(), [], time.perf_counter()
    async for result in p.run_many(stories(), concurrency=CONCURRENCY, output_dir=folder):
        assert isinstance(result, StoryResult), result
        if len(result.references) == SCENES:
            memory.append(process.memory_info().rss / MEGABYTE)
    speed = SCENES * STORIES / (time.perf_counter() - started)
    assert len(memory) == STORIES and len(list(folder.iterdir())) == STORIES * SCENES * VARIATIONS
    assert p.scorers[0].images == STORIES * SCENES * VARIATIONS
    return speed, memory[99::100]


async def sketched(p: Pipeline, story: Story, folder: Path, name: str) -> list[Path]:
    """One story, as one would write it down first."""

    async def enhanced(prompt: str) -> str:
        better = await p.director.reply([Message(role="user", content=prompt)])
        judged = await p.critic.reply([Message(role="user", content=better.text)])
        return better.text if json.loads(judged.text)["completeness"] > 50 else prompt

    prompts = await asyncio.gather(*(enhanced(scene.prompt) for scene in story.scenes))
    winners = []
    for number, (scene, prompt) in enumerate(zip(story.scenes, prompts, strict=True), start=1):
        request = ImageRequest(prompt=prompt, references=tuple(winners[-1:]))
        calls = (p.image_model.generate(request) for _ in range(VARIATIONS))
        made = [Image.open(BytesIO(g.data)).convert("RGB") for g in await asyncio.gather(*calls)]
        paths = [folder / f"{name}_scene_{number:02d}_v{k}.png" for k in range(1, VARIATIONS + 1)]
        for image, path in zip(made, paths, strict=True):
            image.save(path, compress_level=1)
        scores = [raw.value for raw in p.scorers[0].score(Batch(tuple(made), scene.prompt))]
        winners.append(paths[scores.index(max(scores))])
    return winners


async def bare(p: Pipeline, folder: Path) -> float:
    """Scenes a second of the sketch, as many stories at once."""
    folder.mkdir()
    numbered, started = enumerate(stories()), time.perf_counter()

    async def work() -> None:
        for number, story in numbered:
            assert len(await sketched(p, story, folder, f"story-{number}")) == SCENES

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return SCENES * STORIES / (time.perf_counter() - started)


def slope(memory: list[float]) -> float:
    """MB that each 100 stories add after the first 100."""
    return float(np.polyfit(range(len(memory)), memory, 1)[0])


def main() -> None:
    """Runs both and reports."""
    with tempfile.TemporaryDirectory() as folder:
        p = pipeline()
        speed, memory = asyncio.run(measured(p, Path(folder) / "images"))
        batches = p.scorers[0].batches
        gc.collect()
        sketch = asyncio.run(bare(pipeline(), Path(folder) / "sketch"))
    print(f"{STORIES} stories of {SCENES} scenes, {CONCURRENCY} at once, "
          f"{batches / STORIES / SCENES:.2f} batches a scene")
    print(f"refimg     {speed:8.1f} scenes/s   {100 * speed / sketch:.0f} % of the sketch")
    print(f"sketch     {sketch:8.1f} scenes/s")
    print("memory     " + " ".join(f"{mb:.1f}" for mb in memory) + " MB, every 100 stories")
    result = {"scenes_per_s": speed, "sketch_scenes_per_s": sketch, "rss_slope_mb": slope(memory)}
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))
    if speed < max(60, 0.2 * sketch) or slope(memory) > 1:
        sys.exit("allowed: 60 scenes/s, 20 % of the sketch, 1 MB per 100 stories")


if __name__ == "__main__":
    main()
