"""The schedule of `schedule.py` with both real SDKs, over sockets, beside the same work one by one.

Two servers in processes of their own answer with the same fixed latencies; clients are warm.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.append(sys.path.pop(0))  # bench/ comes last: it has a statistics.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from schedule import (
    BOUND,
    IMAGE,
    LLM,
    ROUNDS,
    SCENES,
    SCORE,
    VARIATIONS,
    report,
    sequential,
    story,
    timed,
)

from refimg import Pipeline
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from tests.fakes import FakeScorer
from tests.servers.images import ImageServer, start_image_server
from tests.servers.llm import LLMServer, start_llm_server

LIMIT = 1.15 * BOUND + 1  # seconds


def pipeline(llm: LLMServer, images: ImageServer) -> Pipeline:
    """The pipeline under test, on real adapters."""
    director, critic = (OpenAIChat(name, base_url=llm.base_url) for name in ("director", "critic"))
    model = ReplicateImages(base_url=images.base_url, api_token="not-a-token")
    return Pipeline(director=director, critic=critic, image_model=model,
                    scorers=[FakeScorer(seconds=SCORE)], num_variations=VARIATIONS,
                    max_enhancement_iterations=ROUNDS, quality_threshold=0)


async def measured(llm: LLMServer, images: ImageServer, folder: Path) -> tuple[float, ...]:
    """Seconds of one warm run, the longest hold of the loop, seconds of the same one by one."""
    p = pipeline(llm, images)
    await p.load()
    await p.run(story(), output_dir=folder / "warm")
    took = []
    for run in (timed, sequential):
        llm.script()
        images.script()
        took.append(await run(p, folder / run.__name__))
        assert len(llm.requests()) == 2 * ROUNDS * SCENES == 32
        assert len(images.requests("create")) == VARIATIONS * SCENES == 16
    return *took[0], took[1]


def main() -> None:
    """Runs both and reports; an AssertionError where the limit is passed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_llm_server(seconds=LLM) as llm,
        start_image_server(seconds=IMAGE) as images,
    ):
        wall, block, one_by_one = asyncio.run(measured(llm, images, Path(folder)))
    report(wall, block, one_by_one, "1.15 x bound + 1 s")
    assert wall <= LIMIT, f"{wall:.2f} s, allowed: {LIMIT:.2f} s"


if __name__ == "__main__":
    main()
