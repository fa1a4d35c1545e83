"""The event loop belongs to the backend: a run never holds it for long."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from refimg.generate import GeneratedImage
from refimg.pipeline import Pipeline, Scene, Story

from .fakes import FakeImages, FakeScorer, critic, director, picture

SECONDS, MARGIN, TRIES = 0.050, 5, 3
SIZE = (768, 432)


def noise() -> bytes:
    """A PNG that is slow to decode and to encode: nothing in it can be compressed."""
    import io

    from PIL import Image

    out = io.BytesIO()
    pixels = random.Random(3).randbytes(3 * SIZE[0] * SIZE[1])
    Image.frombytes("RGB", SIZE, pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


async def longest_gap(stop: asyncio.Event) -> float:
    """The longest time in which the loop did nothing else, until `stop` is set."""
    longest, last = 0.0, time.perf_counter()
    while not stop.is_set():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last - 0.005), now
    return longest


async def watched(pipeline: Pipeline, folder: Path, reference: bytes) -> float:
    """The longest time for which a run of three scenes held the loop."""
    folder.mkdir()
    (folder / "mine.png").write_bytes(reference)
    story = Story(scenes=[Scene(prompt=f"The keeper, scene {n}.") for n in range(1, 4)],
                  initial_reference_image=folder / "mine.png")
    stop = asyncio.Event()
    ticker = asyncio.create_task(longest_gap(stop))
    result = await pipeline.run(story, output_dir=folder / "images")
    stop.set()
    assert [s.reference_from for s in result.scenes] == ["ranked"] * 3
    assert [len(s.variations) for s in result.scenes] == [4] * 3
    return await ticker


async def test_the_loop_contract(tmp_path):
    """Decoding, encoding, writing and scoring happen in threads."""
    png = noise()
    model = FakeImages(lambda request, number: GeneratedImage(data=png))
    pipeline = Pipeline(director=director(), critic=critic(50, 70), image_model=model,
                        scorers=[FakeScorer(seconds=0.05)])
    best = []
    while len(best) < TRIES and (not best or min(best) > SECONDS * MARGIN):
        best.append(await watched(pipeline, tmp_path / str(len(best)), png))
    assert min(best) <= SECONDS * MARGIN, best


async def test_a_scorer_that_blocks_is_waited_for_without_holding_the_loop(tmp_path):
    """While a scorer sits in its thread, the next thing of the caller's gets its turn."""
    pipeline = Pipeline(director=director(), critic=critic(90), num_variations=2,
                        image_model=FakeImages(lambda request, number: picture(number)),
                        scorers=[FakeScorer(seconds=0.2)])
    run = asyncio.create_task(pipeline.run(Story(scenes=[Scene(prompt="A keeper.")]),
                                           output_dir=tmp_path / "images"))
    turns = 0
    while not run.done():
        await asyncio.sleep(0)
        turns += 1
    assert run.result().scenes[0].reference_from == "ranked" and turns > 100
