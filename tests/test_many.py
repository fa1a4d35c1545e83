"""Many stories at once: one that fails fails alone, and nothing is begun too early or kept."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import weakref
from contextlib import aclosing, suppress

import pytest

from refimg.pipeline import (
    GenerationCancelled,
    ManyProgress,
    Pipeline,
    Scene,
    Story,
    StoryFailure,
    StoryResult,
)
from refimg.storage.journal import Journal

from .fakes import FakeImages, FakeScorer, critic, director, picture

pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 1.0)


def make_story(text: str = "a keeper", scenes: int = 1, **fields) -> Story:
    return Story(scenes=[Scene(prompt=text)] * scenes, **fields)


def make_pipeline(images: FakeImages | None = None, **options) -> Pipeline:
    options = {"num_variations": 1, "max_enhancement_iterations": 0, "quality_threshold": 0,
               "scorers": [FakeScorer()]} | options
    return Pipeline(director=director(), critic=critic(90), image_model=images or FakeImages(),
                    **options)


async def collect(made) -> dict[int, StoryResult | StoryFailure]:
    """What came of each story, by index; no index comes twice."""
    outcomes = [outcome async for outcome in made]
    by_index = {outcome.index: outcome for outcome in outcomes}
    assert len(by_index) == len(outcomes)
    return by_index


async def assert_only_we_are_left() -> None:
    """Whatever Python itself schedules gets a moment; then there is no other task."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Held(FakeImages):
    """An image model that waits until `go` is set; prompts that say "now" do not wait."""

    def __init__(self):
        super().__init__()
        self.go, self.inside, self.most, self.waiting = asyncio.Event(), 0, 0, 0

    async def generate(self, request):
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            if "now" not in request.prompt:
                self.waiting += 1
                await self.go.wait()
            return await super().generate(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def failing(request, number):
    return OSError("no paint") if "bad" in request.prompt else picture(number)


async def test_a_story_that_fails_fails_alone(tmp_path, caplog):
    stories = [
        make_story("fine"),
        make_story("bad", title="the second"),
        Story(scenes=[], title="empty"),
        make_story(" "),
        {"scenes": []},
        make_story("fine too", scenes=2),
        make_story(initial_reference_image=tmp_path / "missing.png"),
    ]
    pipeline = make_pipeline(FakeImages(failing))
    with caplog.at_level(logging.ERROR, "refimg.pipeline"):
        made = await collect(pipeline.run_many(stories, output_dir=tmp_path / "i", concurrency=3))
    assert sorted(made) == list(range(7))
    assert [len(made[i].references) for i in (0, 5)] == [1, 2]
    assert [made[i].story.scenes[0].prompt for i in (0, 5)] == ["fine", "fine too"]
    failed = {i: (made[i].error_type, made[i].title) for i in made if i not in (0, 5)}
    assert failed == {1: ("GenerationFailed", "the second"), 2: ("ValueError", "empty"),
                      3: ("ValueError", ""), 4: ("ValueError", ""), 6: ("ValueError", "")}
    said = {1: "no paint", 2: "scenes must be", 3: "prompt of scene 1", 4: "must be a Story",
            6: "missing.png"}
    assert all(text in made[i].error for i, text in said.items())
    logged = [record.getMessage() for record in caplog.records]
    assert all(any(made[i].generation_id in line for line in logged) for i in failed)


async def test_a_failure_goes_through_json_whatever_its_text(tmp_path):
    def broken(request, number):
        raise OSError("half a letter: \ud800")

    (made,) = (await collect(make_pipeline(FakeImages(broken)).run_many(
        [make_story()], output_dir=tmp_path / "i"))).values()
    assert StoryFailure.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(ValueError, match="frozen"):
        made.error = ""


async def test_an_index_survives_the_disk(tmp_path):
    async for made in make_pipeline().run_many([make_story()], output_dir=tmp_path / "i"):
        made.save(tmp_path / "run.json")
        assert StoryResult.load(tmp_path / "run.json") == made and made.index == 0
        again = await make_pipeline().rerun(made, 1)
        assert again.index == 0
    alone = await make_pipeline().run(make_story(), output_dir=tmp_path / "i")
    assert alone.index is None


async def test_names_are_unique_and_can_be_given(tmp_path):
    pipeline, stories = make_pipeline(), [make_story()] * 40
    named = await collect(pipeline.run_many(stories, output_dir=tmp_path / "i", generation_id="x"))
    assert {i: made.generation_id for i, made in named.items()} == {i: f"x-{i}" for i in range(40)}
    others = [await collect(pipeline.run_many(stories[:20], output_dir=tmp_path / "i"))
              for _ in range(2)]
    names = [made.generation_id for one in others for made in one.values()]
    assert len(set(names)) == 40
    paths = [made.references[0] for one in (named, *others) for made in one.values()]
    assert len(set(paths)) == 80 and all(path.is_file() for path in paths)


async def test_with_a_journal_the_same_call_pays_only_for_what_is_missing(tmp_path):
    def paint(request, number):
        return OSError("no paint") if "study-2" in request.slot and not mended else picture(number)

    images, mended = FakeImages(paint), []
    pipeline = make_pipeline(images, journal=Journal(tmp_path / "journal"))
    stories = [make_story(f"story {n}", scenes=2) for n in range(6)]
    options = {"generation_id": "study", "output_dir": tmp_path / "i"}
    first = await collect(pipeline.run_many(stories, **options))
    assert [i for i, made in first.items() if isinstance(made, StoryFailure)] == [2]
    mended.append(True)
    images.requests.clear()
    again = await collect(pipeline.run_many(stories, **options))
    assert {request.slot.partition("_")[0] for request in images.requests} == {"study-2"}
    assert all(again[i].references == first[i].references for i in (0, 1, 3, 4, 5))


async def test_a_result_comes_when_it_is_there_not_when_its_turn_has_come(tmp_path):
    images = Held()
    stories = [make_story("later"), make_story("now"), make_story("now")]
    order = []
    async for made in make_pipeline(images).run_many(stories, output_dir=tmp_path / "i"):
        order.append(made.index)
        if len(order) == 2:
            images.go.set()
    assert order[2] == 0 and sorted(order) == [0, 1, 2]


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_an_endless_generator_is_read_no_further_than_asked(tmp_path, concurrency):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield make_story(f"story {number}")

    images, taken = FakeImages(), 0
    many = make_pipeline(images).run_many(
        endless(), concurrency=concurrency, output_dir=tmp_path / "i")
    assert not read
    async with aclosing(many):
        async for _ in many:
            taken += 1
            assert len(read) <= taken - 1 + concurrency + 1
            await asyncio.sleep(0.05)  # whoever consumes slowly is not run away from
            assert len(read) <= taken + concurrency
            if taken == 6:
                break
    await assert_only_we_are_left()
    assert len(read) == len(set(read)) <= 6 + concurrency


async def test_as_many_stories_as_asked_for_are_on_their_way(tmp_path):
    images = Held()
    many = make_pipeline(images).run_many(
        (make_story() for _ in range(9)), concurrency=4, output_dir=tmp_path / "i")
    consumer = asyncio.create_task(collect(many))
    await until(lambda: images.inside == 4)
    images.go.set()
    assert len(await consumer) == 9 and images.most == 4


async def test_an_async_iterable_may_be_slow(tmp_path):
    """Results do not wait for the next story to come in."""
    more = asyncio.Event()

    async def slow():
        yield make_story("first")
        await more.wait()
        yield make_story("second")

    many = make_pipeline().run_many(slow(), output_dir=tmp_path / "i")
    async with asyncio.timeout(20):
        assert (await anext(many)).index == 0
        more.set()
        assert (await anext(many)).index == 1
        with pytest.raises(StopAsyncIteration):
            await anext(many)
    await assert_only_we_are_left()


@pytest.mark.parametrize("kind", [list, tuple, iter])
async def test_no_stories_give_no_results(tmp_path, kind):
    assert await collect(make_pipeline().run_many(kind([]), output_dir=tmp_path / "i")) == {}
    await assert_only_we_are_left()


async def test_an_error_of_the_iterable_comes_after_what_was_begun(tmp_path):
    def broken():
        yield make_story()
        yield make_story()
        raise LookupError("the file of stories is broken")

    seen = []
    with pytest.raises(LookupError, match="file of stories"):
        async for made in make_pipeline().run_many(broken(), output_dir=tmp_path / "i"):
            seen.append(made.index)
    assert sorted(seen) == [0, 1]
    await assert_only_we_are_left()


async def test_no_result_is_kept(tmp_path):
    """But for the last one, until the next is asked for."""
    given = []
    async for made in make_pipeline().run_many(
            (make_story() for _ in range(30)), concurrency=2, output_dir=tmp_path / "i"):
        given.append(weakref.ref(made))
        del made
        gc.collect()
        assert not any(result() for result in given[:-1])
    gc.collect()
    assert len(given) == 30 and not any(result() for result in given)


@pytest.mark.parametrize("wrong", [
    {"concurrency": 0}, {"concurrency": 1001}, {"concurrency": 2.0}, {"concurrency": True},
    {"generation_id": "../x"}, {"generation_id": "x" * 64}, {"output_dir": 7},
    {"stories": make_story()}, {"stories": "stories.yaml"}, {"stories": 3}, {"stories": None},
], ids=str)  # fmt: skip
def test_bad_arguments_are_said_at_the_call(tmp_path, wrong):
    given = {"stories": iter(lambda: pytest.fail("a story was read"), None),
             "output_dir": tmp_path / "i"} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_pipeline().run_many(**given)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("wrong", [
    {"chain": "next"}, {"max_concurrency": 0}, {"score_threshold": 101}, {"scorers": [object()]},
], ids=lambda wrong: next(iter(wrong)))  # fmt: skip
def test_what_is_wrong_with_the_pipeline_is_said_at_the_call(tmp_path, wrong):
    pipeline = make_pipeline()
    for name, value in wrong.items():
        setattr(pipeline, name, value)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        pipeline.run_many([make_story()], output_dir=tmp_path / "i")


# progress


@pytest.mark.parametrize("known", [True, False])
async def test_progress_counts_results_and_failures(tmp_path, known):
    reports = []
    stories = [make_story("bad"), *[make_story("good")] * 3]
    await collect(make_pipeline(FakeImages(failing)).run_many(
        stories if known else iter(stories), output_dir=tmp_path / "i",
        on_progress=reports.append))
    assert [r.done + r.failed for r in reports] == [1, 2, 3, 4]
    assert (reports[-1].done, reports[-1].failed) == (3, 1)
    assert {r.total for r in reports} == {4}  # all were read before the first had ended
    assert all(isinstance(r, ManyProgress) for r in reports)


async def test_the_total_is_not_known_while_stories_come_in(tmp_path):
    reports = []
    endless = (make_story() for _ in itertools.count())
    async with aclosing(make_pipeline().run_many(
            endless, output_dir=tmp_path / "i", on_progress=reports.append)) as many:
        await anext(many)
        await until(lambda: reports)
    assert reports[0].total is None


async def test_progress_may_be_async_and_may_raise(tmp_path, caplog):
    reports = []

    async def report(progress):
        await asyncio.sleep(0)
        reports.append(progress)
        raise OSError("the browser has gone")

    made = await collect(make_pipeline().run_many(
        [make_story()] * 3, output_dir=tmp_path / "i", on_progress=report))
    assert len(made) == len(reports) == 3
    assert len([r for r in caplog.records if "browser has gone" in r.getMessage()]) == 1


async def test_a_listener_that_hangs_holds_nothing_up(tmp_path):
    async def report(progress):
        await asyncio.sleep(60)

    async with asyncio.timeout(20):
        made = await collect(make_pipeline().run_many(
            [make_story()] * 3, output_dir=tmp_path / "i", on_progress=report))
    assert len(made) == 3
    await assert_only_we_are_left()


# stopping


class Stopped:
    """Three stories that hang while they are drawn, one that is ready."""

    def __init__(self, root):
        self.root, self.images = root, Held()
        self.stories = (make_story("now" if n == 0 else "later") for n in itertools.count())

    def many(self, **options):
        return make_pipeline(self.images).run_many(
            self.stories, concurrency=4, output_dir=self.root / "i", **options)

    def hangs(self) -> bool:
        """Every slot but that of the ready story is taken by one that hangs."""
        return self.images.waiting >= 3

    async def check_gone(self) -> None:
        await assert_only_we_are_left()
        calls = len(self.images.requests)
        await asyncio.sleep(0.15)
        assert self.images.inside == 0 and len(self.images.requests) == calls == 1
        assert self.images.cancelled >= 3
        assert not (self.root / "reference_image_traces").exists()
        assert not list(self.root.rglob(".refimg-*"))
        assert len(list((self.root / "i").iterdir())) == 1


async def test_closing_the_iterator_stops_what_is_on_its_way(tmp_path):
    stage = Stopped(tmp_path)
    async with aclosing(stage.many()) as many:
        assert (await anext(many)).index == 0
        await until(stage.hangs)
    await stage.check_gone()


async def test_a_plain_break_stops_it_too(tmp_path):
    stage = Stopped(tmp_path)
    async for made in stage.many():
        assert made.index == 0
        await until(stage.hangs)
        break
    await until(lambda: len(asyncio.all_tasks()) == 1)
    await stage.check_gone()


async def deaf(*progress):
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("role", ["on_progress", "cancellation_check"])
async def test_a_function_that_swallows_its_cancellation_holds_nothing_up(tmp_path, role):
    images = FakeImages(seconds=0.01)
    async with asyncio.timeout(10):
        async with aclosing(make_pipeline(images).run_many(
                itertools.repeat(make_story()), concurrency=2, output_dir=tmp_path / "i",
                **{role: deaf})) as made:
            await anext(made)
            await asyncio.sleep(0.05)  # the function has begun
    await assert_only_we_are_left()


async def test_cancelling_the_consumer_stops_what_is_on_its_way(tmp_path):
    stage = Stopped(tmp_path)
    consumer = asyncio.create_task(collect(stage.many()))
    await until(lambda: len(stage.images.requests) == 1 and stage.hangs())
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert consumer.cancelled()
    await until(lambda: len(asyncio.all_tasks()) == 1)
    await stage.check_gone()


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_check_that_is_true_stops_all_and_is_raised(tmp_path, kind):
    stage, stop = Stopped(tmp_path), asyncio.Event()

    async def later() -> bool:
        return stop.is_set()

    seen = []
    with pytest.raises(GenerationCancelled):
        async for made in stage.many(cancellation_check=stop.is_set if kind == "sync" else later):
            seen.append(made.index)
            await until(stage.hangs)
            stop.set()
    assert seen == [0]
    await stage.check_gone()


async def test_a_check_is_heard_while_the_consumer_is_busy(tmp_path):
    """And what was ready before it is still given back."""
    stage, stop = Stopped(tmp_path), asyncio.Event()
    async with aclosing(stage.many(cancellation_check=stop.is_set)) as many:
        first = asyncio.create_task(anext(many))
        await until(stage.hangs)
        assert (await first).index == 0
        stop.set()
        await until(lambda: stage.images.inside == 0)
        with pytest.raises(GenerationCancelled):
            await anext(many)
    await stage.check_gone()


async def test_a_check_that_is_true_at_once_costs_nothing(tmp_path):
    images = FakeImages()
    with pytest.raises(GenerationCancelled):
        await collect(make_pipeline(images).run_many(
            [make_story()], output_dir=tmp_path / "i", cancellation_check=lambda: True))
    assert not images.requests
    await assert_only_we_are_left()


async def test_stopping_twice_does_not_break_off_the_clean_up(tmp_path):
    """The check stops the story; when the iterator ends it is still tidying up, and may."""

    class Slow(FakeImages):
        tidied = False

        async def generate(self, request):
            if "now" in request.prompt:
                return await super().generate(request)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                await asyncio.sleep(0.4)  # what a client needs to cancel a prediction
                self.tidied = True
                raise

    images, stop = Slow(), asyncio.Event()
    async with aclosing(make_pipeline(images).run_many(
            [make_story("now"), make_story("later")], output_dir=tmp_path / "i",
            cancellation_check=stop.is_set)) as many:
        assert (await anext(many)).index == 0
        stop.set()
        await until(lambda: images.cancelled)
        with pytest.raises(GenerationCancelled):
            await anext(many)
        assert (images.cancelled, images.tidied) == (1, True)
    await assert_only_we_are_left()


async def test_stories_share_the_thread_of_scoring_and_go_to_it_in_whole_groups(tmp_path):
    """What has piled up while another story was scored is one batch."""
    scorer = FakeScorer(seconds=0.03)
    pipeline = make_pipeline(scorers=[scorer], num_variations=4)
    await collect(pipeline.run_many([make_story()] * 8, output_dir=tmp_path / "i"))
    assert sum(len(batch.images) for batch in scorer.batches) == 32
    assert sum(len(batch.images) == 4 for batch in scorer.batches) >= 4
