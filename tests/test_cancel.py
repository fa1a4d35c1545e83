"""However a run is stopped, it ends at once, tidies up, and says which way it was stopped."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from refimg.engine import tasks
from refimg.engine.candidates import CandidateGroup
from refimg.engine.run import StoryRun
from refimg.enhance import Reply
from refimg.generate import GeneratedImage
from refimg.pipeline import GenerationCancelled, Pipeline, Scene, Story

from .fakes import FakeChat, FakeImages, FakeScorer, critique, picture

ROOT = Path(__file__).resolve().parent.parent
CANCEL_SECONDS, STOP_SECONDS, MARGIN, TRIES = 0.5, 1.0, 5, 3
TRACES = "reference_image_traces"
OWN_TICK = tasks.TICK
pytestmark = [  # a coroutine that is made and never awaited is lost work
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
TICK = 0.02  # seconds between two looks of `cancellation_check`, where no contract is timed
QUIET = 0.1  # seconds in which nothing more may happen: five of those looks


class Hanging(FakeChat):
    """A chat model that hangs from call `at` on, and counts how often it was cancelled."""

    def __init__(self, script, at: int | None = None):
        super().__init__(script)
        self.at, self.cancelled = at, 0
        self.reached = asyncio.Event()

    async def reply(self, messages, schema=None) -> Reply:
        if self.at is not None and len(self.calls) + 1 >= self.at:
            self.calls.append((messages, schema))
            self.reached.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return await super().reply(messages, schema)


class HangingImages(FakeImages):
    """An image model that hangs from call `at` on; `on_cancel` says what it does when cancelled."""

    def __init__(self, at: int | None = None, on_cancel=None, script=None):
        super().__init__(script)
        self.at, self.on_cancel = at, on_cancel
        self.reached = asyncio.Event()

    async def generate(self, request):
        if self.at is None or len(self.requests) + 1 < self.at:
            return await super().generate(request)
        self.requests.append(request)
        self.reached.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            if self.on_cancel is None:
                raise
            return await self.on_cancel(self)


class BlockingScorer(FakeScorer):
    """A scorer that blocks its thread until it is released."""

    blocked: ClassVar[list[threading.Event]] = []

    def __init__(self):
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.reached, self.go_on = asyncio.Event(), threading.Event()
        self.blocked.append(self.go_on)

    @classmethod
    def release_all(cls) -> None:
        while cls.blocked:
            cls.blocked.pop().set()

    def score(self, batch):
        self.loop.call_soon_threadsafe(self.reached.set)
        self.go_on.wait(20)
        return super().score(batch)


class Stage:
    """A run that hangs at `where`, in its own folder."""

    def __init__(self, where: str, root: Path, variations: int = 2, **options):
        self.root, self.out = root, root / "images"
        self.director = Hanging(lambda m, s, n: f"Prompt {n}.", 2 if where == "director" else None)
        self.critic = Hanging([critique(50)], 1 if where == "critic" else None)
        first = {"generate": 1, "some drawn": 2, "between scenes": variations + 1}
        self.images = options.pop("images", None) or HangingImages(first.get(where))
        self.scorer = BlockingScorer() if where == "score" else FakeScorer()
        hanging = {"director": self.director, "critic": self.critic, "score": self.scorer}
        self.reached = getattr(hanging.get(where, self.images), "reached", None)
        if where == "some drawn":
            self.reached, self.images.reached = asyncio.Event(), asyncio.Event()
            self.scorer.value = self.seen
        self.loop, self.noise = asyncio.get_running_loop(), []
        self.loop.set_exception_handler(lambda loop, what: self.noise.append(what))
        self.pipeline = Pipeline(
            director=self.director, critic=self.critic, image_model=self.images,
            scorers=[self.scorer], num_variations=variations, **options)
        self.story = Story(scenes=[Scene(prompt=f"Scene {n}.") for n in range(1, 4)])

    def seen(self, image, prompt) -> float:
        """The score of a picture that has arrived, which is what the test waits for."""
        self.loop.call_soon_threadsafe(self.reached.set)
        return float(image.getpixel((0, 0))[0])

    @property
    def calls(self) -> tuple[int, int, int]:
        return len(self.director.calls), len(self.critic.calls), len(self.images.requests)

    async def run(self, **options):
        return await self.pipeline.run(
            self.story, generation_id="id", output_dir=self.out, **options)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*")) if self.out.exists() else []

    async def check_gone(self) -> None:
        """Nothing runs, nothing lies about, nothing begins any more."""
        calls = self.calls
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not (self.root / TRACES).exists()
        assert not list(self.root.rglob(".refimg-*"))
        await asyncio.sleep(QUIET)
        assert self.calls == calls
        for path in self.out.glob("*.png"):
            with Image.open(path) as image:
                image.load()
        gc.collect()
        assert not self.noise  # no exception that nobody looked at


async def by_check(stage: Stage) -> None:
    with pytest.raises(GenerationCancelled):
        await stage.run(cancellation_check=stage.reached.is_set)


async def by_async_check(stage: Stage) -> None:
    async def check() -> bool:
        await asyncio.sleep(0)
        return stage.reached.is_set()

    with pytest.raises(GenerationCancelled):
        await stage.run(cancellation_check=check)


async def by_cancelling_the_task(stage: Stage) -> None:
    task = asyncio.create_task(stage.run())
    await stage.reached.wait()
    task.cancel("from outside")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def by_a_timeout(stage: Stage) -> None:
    async def shorten() -> None:
        await stage.reached.wait()
        limit.reschedule(asyncio.get_running_loop().time())

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            shortening = asyncio.create_task(shorten())
            await stage.run()
    await shortening


async def by_a_group(stage: Stage) -> None:
    """A sibling task in the caller's TaskGroup fails."""

    async def fail() -> None:
        await stage.reached.wait()
        raise LookupError("the sibling")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(stage.run())
    assert [type(error) for error in caught.value.exceptions] == [LookupError]


WAYS = (by_check, by_async_check, by_cancelling_the_task, by_a_timeout, by_a_group)
PLACES = ("director", "critic", "generate", "some drawn", "between scenes", "score")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    """Five seconds for a clean-up are too long for a test; what needs longer says so."""
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 1.0)
    monkeypatch.setattr("refimg.engine.tasks.TICK", TICK)
    yield
    BlockingScorer.release_all()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__[3:])
@pytest.mark.parametrize("where", PLACES)
async def test_a_run_is_stopped_wherever_it_is(tmp_path, where, way):
    stage = Stage(where, tmp_path, variations=1 if where == "score" else 2)
    async with asyncio.timeout(15):
        await way(stage)
    scored = where == "score" and stage.scorer.go_on.is_set()
    await stage.check_gone()
    directors, critics, images = stage.calls
    if where == "director":
        assert images == 0 and stage.director.cancelled == directors - 1 >= 1
    if where == "critic":
        assert images == 0 and stage.critic.cancelled == critics >= 1
    if where in ("generate", "some drawn"):
        assert images == 2 and stage.images.cancelled == (2 if where == "generate" else 1)
        assert stage.files() == ([] if where == "generate" else ["id_scene_01_v1.png"])
    if where == "between scenes":
        assert (images, stage.images.cancelled) == (4, 2)
        assert stage.files() == ["id_scene_01_v1.png", "id_scene_01_v2.png"]
    if where == "score":
        assert images == 1 and not scored
        assert stage.files() == ["id_scene_01_v1.png"]


async def test_the_next_run_works_under_the_same_id(tmp_path):
    """The lock is released, the pictures that were paid for stay where they are."""
    stage = Stage("some drawn", tmp_path)
    await by_check(stage)
    stage.images.at = None
    made = await stage.run()
    names = [v.image.image_path.name for v in made.scenes[0].variations]
    assert names == ["id_scene_01_v2.png", "id_scene_01_v3.png"]


async def test_scoring_goes_on_after_a_run_was_stopped_while_it_scored(tmp_path):
    stage = Stage("score", tmp_path)
    await by_check(stage)
    BlockingScorer.release_all()
    made = await stage.run()
    assert [s.reference_from for s in made.scenes] == ["ranked"] * 3


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_check_that_is_true_at_once_costs_nothing(tmp_path, kind):
    async def answer() -> bool:
        return True

    stage = Stage("generate", tmp_path)
    with pytest.raises(GenerationCancelled):
        await stage.run(cancellation_check=(lambda: True) if kind == "sync" else answer)
    assert stage.calls == (0, 0, 0)
    await stage.check_gone()


async def test_a_check_may_be_an_object_and_answer_anything_true(tmp_path):
    class Check:
        async def __call__(self) -> str:
            return "yes"

    stage = Stage("generate", tmp_path)
    with pytest.raises(GenerationCancelled):
        await stage.run(cancellation_check=Check())
    assert stage.calls == (0, 0, 0)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_check_that_raises_means_go_on_and_is_logged_once(tmp_path, caplog, kind):
    asked = []

    def check() -> bool:
        asked.append(1)
        raise OSError("no database")

    async def later() -> bool:
        await asyncio.sleep(0)
        return check()

    stage = Stage("", tmp_path)
    stage.images.seconds = 0.15
    with caplog.at_level(logging.WARNING):
        made = await stage.run(cancellation_check=check if kind == "sync" else later)
    assert len(made.references) == 3 and len(asked) > 2
    records = [r for r in caplog.records if "no database" in r.getMessage()]
    assert [(r.name, r.levelname) for r in records] == [("refimg.pipeline", "WARNING")]


async def test_a_check_that_is_true_after_it_raised_still_stops_the_run(tmp_path):
    answers = iter([OSError("no database"), False, True])

    def check() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    stage = Stage("generate", tmp_path)
    with pytest.raises(GenerationCancelled):
        await stage.run(cancellation_check=check)
    await stage.check_gone()


async def test_a_check_that_cancels_the_task_leaves_no_watch_behind(tmp_path):
    """The first look happens before the work begins: that moment, too, is tidied up."""
    stage = Stage("generate", tmp_path)
    asked = []

    def check() -> bool:
        asked.append(1)
        task.cancel()
        return False

    task = asyncio.create_task(stage.run(cancellation_check=check))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asked) == 1
    await stage.check_gone()


@pytest.mark.parametrize("steps", range(6))
async def test_a_task_cancelled_in_any_of_its_first_steps_tidies_up(tmp_path, steps):
    stage = Stage("generate", tmp_path)
    task = asyncio.create_task(stage.run())
    for _ in range(steps):
        await asyncio.sleep(0.0005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    await stage.check_gone()


async def test_a_check_that_raises_cancelled_error_itself_means_go_on(tmp_path):
    """A check that raises counts as "go on", whatever it raises."""

    async def check() -> bool:
        raise asyncio.CancelledError("the caller's own client was closed")

    made = await Stage("", tmp_path).run(cancellation_check=check)
    assert len(made.references) == 3


async def test_a_check_that_hangs_holds_nothing_up(tmp_path):
    async def check() -> bool:
        await asyncio.sleep(60)
        return True

    stage = Stage("", tmp_path)
    async with asyncio.timeout(10):
        made = await stage.run(cancellation_check=check)
    assert len(made.references) == 3
    await stage.check_gone()


async def test_a_callback_that_raises_cancelled_error_still_gets_the_later_reports(tmp_path):
    """An exception in a callback is ignored, whatever it is."""
    reports = []

    async def report(progress) -> None:
        reports.append(progress)
        raise asyncio.CancelledError("the browser has gone")

    await Stage("", tmp_path).run(on_progress=report)
    assert len(reports) == 9 and reports[-1].percent == 100


async def returns_a_picture(model):
    return GeneratedImage(data=picture(40 * model.cancelled))


async def returns_rubbish(model):
    return GeneratedImage(data=b"<html>")


async def raises_an_ordinary_error(model):
    raise ConnectionError("the connection was closed")


@pytest.mark.parametrize("way", [by_check, by_cancelling_the_task], ids=lambda w: w.__name__[3:])
@pytest.mark.parametrize("on_cancel", [returns_a_picture, returns_rubbish,
                                       raises_an_ordinary_error])
async def test_an_image_model_that_swallows_the_cancellation_is_not_called_again(
    tmp_path, on_cancel, way
):
    stage = Stage("generate", tmp_path, images=HangingImages(1, on_cancel))
    async with asyncio.timeout(20):
        await way(stage)
    assert stage.calls[2] == 2 == stage.images.cancelled
    await stage.check_gone()
    kept = 2 if on_cancel is returns_a_picture else 0
    assert stage.files() == [f"id_scene_01_v{k}.png" for k in range(1, kept + 1)]


class SwallowingChat(FakeChat):
    """A chat model that hangs in call `at`; cancelled, it answers, or raises an ordinary error."""

    def __init__(self, script, at: int, answer):
        super().__init__(script)
        self.at, self.answer, self.reached = at, answer, asyncio.Event()

    async def reply(self, messages, schema=None) -> Reply:
        if len(self.calls) + 1 != self.at:
            return await super().reply(messages, schema)
        self.calls.append((messages, schema))
        self.reached.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if isinstance(self.answer, Exception):
                raise self.answer from None
            return Reply(text=self.answer)


@pytest.mark.parametrize("way", [by_check, by_cancelling_the_task], ids=lambda w: w.__name__[3:])
@pytest.mark.parametrize("answer", ["A prompt after all.", "", ConnectionError("closed")],
                         ids=["answers", "says nothing", "raises"])
@pytest.mark.parametrize("role", ["director", "critic"])
async def test_an_agent_that_swallows_the_cancellation_is_not_asked_again(
    tmp_path, role, answer, way
):
    """Neither it nor its partner: no call begins after the run was told to stop."""
    if role == "critic" and answer:
        answer = critique(60) if isinstance(answer, str) else answer
    script = (lambda m, s, n: f"Prompt {n}.") if role == "director" else [critique(50)]
    stage = Stage("", tmp_path)
    stage.story = Story(scenes=stage.story.scenes[:1])
    agent = SwallowingChat(script, 2, answer)
    setattr(stage, role, agent)
    setattr(stage.pipeline, role, agent)
    stage.images.takes_negative_prompt = True
    stage.reached = agent.reached
    async with asyncio.timeout(20):
        await way(stage)
    assert stage.calls == ((2, 1, 0) if role == "director" else (2, 2, 0))
    await stage.check_gone()


@pytest.mark.parametrize("way", [by_check, by_cancelling_the_task], ids=lambda w: w.__name__[3:])
@pytest.mark.parametrize("step", ["refimg.generate.decode_image", "refimg.generate.save_numbered"],
                         ids=["decoded", "written"])
async def test_a_picture_that_is_being_decoded_or_written_is_kept(
    tmp_path, monkeypatch, step, way
):
    """It was paid for and is here: stopping the run must not lose it."""
    module, name = step.rsplit(".", 1)
    plain, stage = getattr(sys.modules[module], name), Stage("", tmp_path, variations=1)
    stage.reached = asyncio.Event()

    def slow(*args, **options):
        stage.loop.call_soon_threadsafe(stage.reached.set)
        time.sleep(0.3)
        return plain(*args, **options)

    monkeypatch.setattr(step, slow)
    await way(stage)
    assert stage.files() == ["id_scene_01_v1.png"] and stage.calls[2] == 1
    await stage.check_gone()


async def test_a_task_that_is_cancelled_twice_tidies_up_too(tmp_path):
    """The impatient: the second time during the clean-up of the first."""

    async def slowly(model):
        await asyncio.sleep(0.3)
        raise asyncio.CancelledError

    stage = Stage("", tmp_path, images=HangingImages(2, slowly))
    task = asyncio.create_task(stage.run())
    while not stage.scorer.batches:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / TRACES).exists()
    await asyncio.sleep(0.4)
    assert stage.files() == ["id_scene_01_v1.png"]
    await stage.check_gone()


async def test_a_model_is_given_time_to_clean_up(tmp_path):
    """A remote prediction is cancelled by a call of its own, which takes a moment."""
    cleaned = []

    async def clean_up(model):
        await asyncio.sleep(0.2)
        cleaned.append(model.cancelled)
        raise asyncio.CancelledError

    stage = Stage("generate", tmp_path, images=HangingImages(1, clean_up))
    await by_check(stage)
    assert cleaned == [2, 2]
    await stage.check_gone()


@pytest.mark.parametrize("way", [by_check, by_cancelling_the_task, by_a_timeout],
                         ids=lambda w: w.__name__[3:])
async def test_a_model_that_never_ends_is_given_up(tmp_path, monkeypatch, way):
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 0.2)
    end = asyncio.Event()

    async def stay(model):
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        raise asyncio.CancelledError

    stage = Stage("generate", tmp_path, images=HangingImages(1, stay))
    async with asyncio.timeout(10):
        await way(stage)
    assert not (tmp_path / TRACES).exists()
    end.set()
    await asyncio.sleep(0.1)
    await stage.check_gone()
    assert stage.calls[2] == 2


async def test_a_deaf_model_and_a_deaf_listener_share_one_grace(tmp_path, monkeypatch):
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 1.0)
    end = asyncio.Event()

    async def stay(_):
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue

    seconds = []
    for attempt in range(TRIES):
        images = HangingImages(1, stay)
        pipeline = Pipeline(director=FakeChat([RuntimeError("no")]), critic=FakeChat(),
                            image_model=images, scorers=[FakeScorer()])
        began = time.perf_counter()
        with pytest.raises(GenerationCancelled):
            await pipeline.run(Story(scenes=[Scene(prompt="a")]), output_dir=tmp_path / "images",
                               generation_id=f"try{attempt}", on_progress=stay,
                               cancellation_check=images.reached.is_set)
        seconds.append(time.perf_counter() - began)
        if seconds[-1] < 1.9:
            break
    end.set()
    await asyncio.sleep(0.1)
    assert min(seconds) < 1.9, f"twice the grace: {seconds}"


async def test_a_callback_that_hangs_does_not_hold_up_the_stop(tmp_path):
    async def report(progress) -> None:
        await asyncio.sleep(60)

    stage = Stage("generate", tmp_path)
    async with asyncio.timeout(10):
        with pytest.raises(GenerationCancelled):
            await stage.run(cancellation_check=stage.reached.is_set, on_progress=report)
    await stage.check_gone()


async def test_a_callback_that_hangs_is_given_up_at_the_end_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 0.2)

    async def report(progress) -> None:
        await asyncio.sleep(60)

    stage = Stage("", tmp_path)
    async with asyncio.timeout(10):
        made = await stage.run(on_progress=report)
    assert len(made.references) == 3
    await asyncio.sleep(0)
    await stage.check_gone()


async def test_a_callback_may_stop_the_run_through_its_check(tmp_path):
    """What a web handler does: the report of a stage raises the flag that the check reads."""
    seen = []
    stage = Stage("", tmp_path)
    stage.images.seconds = 0.05
    with pytest.raises(GenerationCancelled):
        await stage.run(on_progress=seen.append,
                        cancellation_check=lambda: any(p.scene == 2 and p.stage == "generate"
                                                       for p in seen))
    assert stage.calls[2] <= 6 and len(stage.files()) >= 2
    await stage.check_gone()


async def test_both_at_once_the_callers_cancellation_wins(tmp_path):
    """A check that turns true must not turn the caller's cancellation into an ordinary error."""

    async def slowly(model):
        await asyncio.sleep(0.3)
        raise asyncio.CancelledError

    stage = Stage("generate", tmp_path, images=HangingImages(1, slowly))
    task = asyncio.create_task(stage.run(cancellation_check=stage.reached.is_set))
    while not stage.images.cancelled:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.5)
    await stage.check_gone()


def test_cancelled_is_a_runtime_error():
    assert issubclass(GenerationCancelled, RuntimeError)
    assert not issubclass(GenerationCancelled, asyncio.CancelledError)


async def seconds_to_cancel(root: Path) -> tuple[float, float]:
    """Seconds from the check's turning true to the end of the run, and to the last call's begin."""

    class Timed(HangingImages):
        async def generate(self, request):
            begun.append(time.monotonic())
            return await super().generate(request)

    begun: list[float] = []
    turned: list[float] = []

    def check() -> bool:
        if stage.reached.is_set():
            turned.append(time.monotonic())
        return bool(turned)

    stage = Stage("between scenes", root, images=Timed(3), chain="none")
    with pytest.raises(GenerationCancelled):
        await stage.run(cancellation_check=check)
    return time.monotonic() - turned[0], max(begun) - turned[0]


async def test_the_cancel_contract(tmp_path, monkeypatch):
    """No new call starts 0.5 s after, and the run ends then."""
    monkeypatch.setattr("refimg.engine.tasks.TICK", OWN_TICK)
    best = []
    while len(best) < TRIES and (not best or min(best) > CANCEL_SECONDS * MARGIN):
        best.append(max(await seconds_to_cancel(tmp_path / str(len(best)))))
    assert min(best) <= CANCEL_SECONDS * MARGIN, best


SCRIPT = """
import asyncio, sys
from refimg.pipeline import Pipeline, Scene, Story
from tests.fakes import FakeImages, FakeScorer, critic, director

class Images(FakeImages):
    async def generate(self, request):
        print("drawing", flush=True)
        try:
            return await super().generate(request)
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise

pipeline = Pipeline(director=director(), critic=critic(90), image_model=Images(seconds=60),
                    scorers=[FakeScorer()], num_variations=1)
story = Story(scenes=[Scene(prompt="A keeper.")])

def run():
    return pipeline.run_sync(story, generation_id="id", output_dir=sys.argv[1])
"""
IN_A_SCRIPT = SCRIPT + "run()\n"
INSIDE_A_LOOP = SCRIPT + """
loop = asyncio.new_event_loop()
async def main(): return run()
loop.run_until_complete(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("code", [IN_A_SCRIPT, INSIDE_A_LOOP], ids=["script", "inside a loop"])
def test_ctrl_c_ends_a_script_and_leaves_nothing(tmp_path, code):
    command = [sys.executable, "-c", code, str(tmp_path / "images")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as script:
        try:
            assert script.stdout.readline() == "drawing\n"
            assert (tmp_path / TRACES / "id").is_dir()
            script.send_signal(signal.SIGINT)
            out, errors = script.communicate(timeout=30)
        finally:
            script.kill()
    assert script.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    assert out == "cancelled\n"
    assert "never retrieved" not in errors and "was destroyed" not in errors
    assert not (tmp_path / TRACES).exists()


CELL = inspect.cleandoc("""
    import asyncio, os, sys
    sys.path.insert(0, {root!r})
    from refimg.pipeline import Pipeline, Scene, Story
    from tests.fakes import FakeImages, FakeScorer, critic, director

    class Images(FakeImages):
        async def generate(self, request):
            print("drawing", flush=True)
            return await super().generate(request)

    images = Images(seconds=60)
    pipeline = Pipeline(director=director(), critic=critic(90), image_model=images,
                        scorers=[FakeScorer()], num_variations=1)
    story = Story(scenes=[Scene(prompt="A keeper.")])
    options = dict(generation_id="id", output_dir={out!r})
""")
AWAITED = "result = await pipeline.run(story, **options)"
SYNC = "result = pipeline.run_sync(story, **options)"
AFTER = inspect.cleandoc("""
    left = [t for t in asyncio.all_tasks() if "refimg" in str(t.get_coro().__qualname__.lower())
            or "_scene" in t.get_coro().__qualname__ or "_watch" in t.get_coro().__qualname__]
    assert not left, left
    assert not os.path.exists(os.path.join(os.path.dirname(options["output_dir"]), {traces!r}))
    assert images.cancelled == 1, images.cancelled
    images.seconds = 0
""")


class Kernel:
    """A Jupyter kernel of this interpreter; `execute` returns what a cell's reply says."""

    def __init__(self, folder: Path):
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import KernelManager

        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.manager = KernelManager(kernel_name="python3")
        self.manager._kernel_spec = KernelSpec(
            argv=argv, display_name="test", language="python", interrupt_mode="signal")
        env = os.environ | {"IPYTHONDIR": str(folder / "ipython")}
        self.manager.start_kernel(cwd=str(folder), env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def execute(self, code: str) -> dict:
        return self.reply(self.client.execute(code, store_history=False))

    def reply(self, sent: str, timeout: float = 60) -> dict:
        while True:
            message = self.client.get_shell_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") == sent:
                return message["content"]

    def run_until_drawing(self, code: str) -> str:
        """The id of a cell that is sent and has begun to draw; its error aborts no later cell."""
        sent = self.client.execute(code, store_history=False, stop_on_error=False)
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            ours = message["parent_header"].get("msg_id") == sent
            if ours and "drawing" in message["content"].get("text", ""):
                return sent
            assert not (ours and message["msg_type"] == "error"), message["content"]

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    made = Kernel(tmp_path_factory.mktemp("kernel"))
    yield made
    made.stop()


def seconds_to_stop(kernel: Kernel, cell: str) -> float:
    """Seconds from Stop to the cell's reply, which must be an error."""
    sent = kernel.run_until_drawing(cell)
    begun = time.monotonic()
    kernel.manager.interrupt_kernel()
    reply = kernel.reply(sent)
    assert reply["status"] == "error", reply
    assert reply["ename"] in ("CancelledError", "KeyboardInterrupt"), reply
    return time.monotonic() - begun


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("cell", [AWAITED, SYNC], ids=["await", "run_sync"])
def test_the_stop_contract(tmp_path, kernel, cell):
    """Jupyter's Stop is heard within a second, and the next cell runs as if nothing had been."""
    best = []
    while len(best) < TRIES and (not best or min(best) > STOP_SECONDS * MARGIN):
        out = str(tmp_path / str(len(best)) / "images")
        assert kernel.execute(CELL.format(root=str(ROOT), out=out))["status"] == "ok"
        best.append(seconds_to_stop(kernel, cell))
        after = kernel.execute(AFTER.format(traces=TRACES))
        assert after["status"] == "ok", after
        again = kernel.execute(cell + "\nassert len(result.references) == 1")
        assert again["status"] == "ok", again
    assert min(best) <= STOP_SECONDS * MARGIN, best


async def test_a_run_that_is_cancelled_in_its_last_moment_leaves_no_task(tmp_path, monkeypatch):
    made, ending = asyncio.Event(), asyncio.Event()
    whole, rest = StoryRun.result, CandidateGroup.save_rest

    def made_whole(run):
        made.set()
        return whole(run)

    async def slowly(group):
        if made.is_set():
            ending.set()
            await asyncio.sleep(0.1)
        await rest(group)

    monkeypatch.setattr(StoryRun, "result", made_whole)
    monkeypatch.setattr(CandidateGroup, "save_rest", slowly)
    p = Pipeline(director=FakeChat(), critic=FakeChat(), image_model=FakeImages(),
                 scorers=[FakeScorer()], num_variations=1, max_enhancement_iterations=0)
    story = Story(scenes=[Scene(prompt="a keeper")])
    task = asyncio.create_task(p.run(story, output_dir=tmp_path / "images"))
    await ending.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.3)
    assert asyncio.all_tasks() == {asyncio.current_task()}
