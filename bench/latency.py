"""The schedule of `schedule.py` with both real SDKs, over sockets, beside the same work one by one.

Two servers in processes of their own answer with the same fixed latencies; clients are warm.
With --openai the images come from OpenAI's protocol, where an answer is the image itself.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from bench._chain import report, sequential, story, timed
from bench.schedule import FIGURES
from refimg import Pipeline
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.openai_images import OpenAIImages
from refimg.adapters.replicate import ReplicateImages
from tests.fakes import FakeScorer
from tests.servers.images import ImageServer, start_image_server
from tests.servers.llm import LLMServer, start_llm_server

LIMIT = 1.15 * FIGURES.bound + 1  # seconds


def pipeline(llm: LLMServer, images: ImageServer | LLMServer) -> Pipeline:
    """The pipeline under test, on real adapters."""
    director, critic = (OpenAIChat(name, base_url=llm.base_url) for name in ("director", "critic"))
    small = {"size": "1280x720", "quality": "low"}
    model = (OpenAIImages("gpt-image-2", base_url=images.base_url, inputs=small)
             if isinstance(images, LLMServer) else
             ReplicateImages(base_url=images.base_url, api_token="not-a-token"))
    return Pipeline(director=director, critic=critic, image_model=model,
                    scorers=[FakeScorer(seconds=FIGURES.score)], quality_threshold=0,
                    num_variations=FIGURES.variations, max_enhancement_iterations=FIGURES.rounds)


async def measured(
    llm: LLMServer, images: ImageServer | LLMServer, folder: Path
) -> tuple[float, ...]:
    """Seconds of one warm run, the longest hold of the loop, seconds of the same one by one."""
    p, told = pipeline(llm, images), story(FIGURES.scenes)
    await p.load()
    await p.run(told, output_dir=folder / "warm")
    took = []
    for run in (timed, sequential):
        llm.script()
        images.script()
        took.append(await run(p, told, folder / run.__name__))
        assert len(llm.requests()) == 2 * FIGURES.rounds * FIGURES.scenes == 32
        kind = {"create", "image"}
        drawn = [r for r in images.requests() if kind & {r.get("kind"), r.get("role")}]
        assert len(drawn) == FIGURES.variations * FIGURES.scenes == 16
    return *took[0], took[1]


def main() -> None:
    """Runs both and reports; an AssertionError where the limit is passed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_llm_server(seconds=FIGURES.llm) as llm,
        (start_llm_server if "--openai" in sys.argv else start_image_server)(
            seconds=FIGURES.image) as images,
    ):
        wall, block, one_by_one = asyncio.run(measured(llm, images, Path(folder)))
    report(wall, FIGURES.bound, one_by_one, block, "1.15 x bound + 1 s")
    assert wall <= LIMIT, f"{wall:.2f} s, allowed: {LIMIT:.2f} s"


if __name__ == "__main__":
    main()
