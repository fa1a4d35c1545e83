"""Jupyter's Stop while both SDKs wait, in a real kernel, for providers that do not answer."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator

import pytest

from .servers.images import ImageServer, start_image_server
from .servers.llm import LLMServer, start_llm_server
from .test_cancel import AWAITED, MARGIN, ROOT, STOP_SECONDS, SYNC, TRACES, TRIES, Kernel

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
SCENES = VARIATIONS = 2
LATE = {"fault": "late", "seconds": 600, "takes": 600}  # made, but its create is not answered
HANGING = {  # what hangs -> the scripts of both servers, and the calls they get before Stop
    "agents": (["hang"] * SCENES, [], SCENES, 0),
    "predictions": ([], ["forever", LATE], 2 * SCENES, VARIATIONS),
}
LIMITS = {"agents": STOP_SECONDS * MARGIN, "predictions": 5.5}  # seconds until the run has ended
CELL = inspect.cleandoc("""
    import asyncio, os, sys
    sys.path.insert(0, {root!r})
    os.environ.update({env!r})
    from refimg import Pipeline, Scene, Story
    from tests.fakes import FakeScorer

    pipeline = Pipeline.from_env(scorers=[FakeScorer()], quality_threshold=0,
                                 num_variations=2, max_enhancement_iterations=1)
    story = Story(scenes=[Scene(prompt="A keeper."), Scene(prompt="The keeper climbs.")],
                  consistency_markers={{"mood": "calm"}})
    options = dict(generation_id="id", output_dir={out!r})
    idle = len(asyncio.all_tasks())
""")
AFTER = inspect.cleandoc("""
    assert len(asyncio.all_tasks()) == idle, asyncio.all_tasks()
    traces = os.path.join(os.path.dirname(options["output_dir"]), {traces!r})
    assert not os.path.exists(traces)
""")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[Kernel]:
    made = Kernel(tmp_path_factory.mktemp("kernel"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[LLMServer, ImageServer]]:
    with start_llm_server() as llm, start_image_server() as images:
        yield llm, images


def calls(llm: LLMServer, images: ImageServer) -> tuple[int, int]:
    """How many chat calls, and how many orders of a picture, have arrived."""
    return len(llm.requests()), len(images.requests("create"))


def execute(kernel: Kernel, code: str) -> None:
    """Nothing; the cell ran without an error."""
    reply = kernel.execute(code)
    assert reply["status"] == "ok", "\n".join(reply["traceback"])


def seconds_to_stop(kernel: Kernel, cell: str, servers, hanging: tuple[int, int]) -> float:
    """Seconds from Stop to the cell's reply, an error, after which no call has been made."""
    sent = kernel.client.execute(cell, store_history=False, stop_on_error=False)
    until = time.monotonic() + 60
    while calls(*servers) != hanging:
        assert time.monotonic() < until, calls(*servers)
        time.sleep(0.05)
    begun = time.monotonic()
    kernel.manager.interrupt_kernel()
    reply = kernel.reply(sent)
    took = time.monotonic() - begun
    assert reply["ename"] in ("CancelledError", "KeyboardInterrupt"), reply
    time.sleep(0.5)
    assert calls(*servers) == hanging
    return took


@pytest.mark.parametrize("cell", [
    pytest.param(AWAITED, id="await"), pytest.param(SYNC, id="run_sync", marks=pytest.mark.all),
])  # fmt: skip
@pytest.mark.parametrize("what", HANGING)
def test_stop_ends_calls_that_hang_and_leaves_no_orphan(tmp_path, kernel, servers, what, cell):
    llm, images = servers
    env = {"OPENAI_BASE_URL": llm.base_url, "REPLICATE_BASE_URL": images.base_url,
           "REPLICATE_API_TOKEN": "not-a-token", "REFIMG_CACHE": str(tmp_path / "cache")}
    chat_faults, image_faults, *hanging = HANGING[what]
    best = []
    while len(best) < TRIES and (not best or min(best) > LIMITS[what]):
        out, before = tmp_path / str(len(best)) / "images", len(images.predictions())
        execute(kernel, CELL.format(root=str(ROOT), env=env, out=str(out)))
        llm.script(chat_faults)
        images.script(image_faults)
        best.append(seconds_to_stop(kernel, cell, servers, tuple(hanging)))
        execute(kernel, AFTER.format(traces=TRACES))
        stopped = images.predictions()[before:]
        assert [p["status"] for p in stopped] == ["canceled"] * hanging[1]
        llm.script()
        images.script()
        execute(kernel, f"{cell}\nassert len(result.references) == {SCENES}")
        paid = 0 if what == "predictions" else 2 * SCENES  # what was answered is in the journal
        assert calls(llm, images) == (paid, SCENES * VARIATIONS) and not images.orphans()
    assert min(best) <= LIMITS[what], best
