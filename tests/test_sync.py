"""`run_sync`: the same run for those who do not await, in a script and inside a running loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings

import pytest

from refimg.generate import GenerationFailed
from refimg.pipeline import GenerationCancelled, Pipeline, Scene, Story, StoryResult

from .fakes import FakeImages, FakeScorer, critic, director, picture

WHO = contextvars.ContextVar("who", default="nobody")


class Watching(FakeImages):
    """An image model that notes the thread, the loop and the context it is called in."""

    def __init__(self, script=None):
        super().__init__(script)
        self.threads, self.loops, self.who = set(), set(), set()

    async def generate(self, request):
        self.threads.add(threading.current_thread())
        self.loops.add(asyncio.get_running_loop())
        self.who.add(WHO.get())
        WHO.set("the model")
        return await super().generate(request)


class WatchingScorer(FakeScorer):
    def score(self, batch):
        self.thread = threading.current_thread()
        return super().score(batch)


@pytest.fixture
def story() -> Story:
    return Story(scenes=[Scene(prompt=f"The keeper, scene {n}.") for n in (1, 2)])


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(director=director(), critic=critic(90), image_model=Watching(),
                    scorers=[WatchingScorer()], num_variations=2, seed=3)


def both_ways(call):
    """What `call` gives in a script, and what it gives inside a running loop."""

    async def inside():
        return call()

    return [call(), asyncio.run(inside())]


def test_without_a_loop(tmp_path, story, pipeline):
    made = pipeline.run_sync(story, generation_id="id", output_dir=tmp_path / "images")
    assert isinstance(made, StoryResult) and len(made.references) == 2
    assert pipeline.image_model.threads == {threading.current_thread()}
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


async def test_inside_a_running_loop(tmp_path, story, pipeline):
    """On a loop and in a thread of its own; the caller's loop is as before."""
    made = pipeline.run_sync(story, generation_id="id", output_dir=tmp_path / "images")
    assert len(made.references) == 2
    assert threading.current_thread() not in pipeline.image_model.threads
    assert asyncio.get_running_loop() not in pipeline.image_model.loops
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await asyncio.sleep(0)


def test_no_thread_is_left_but_those_a_process_keeps(tmp_path, story, pipeline):
    before = set(threading.enumerate())
    both_ways(lambda: pipeline.run_sync(story, output_dir=tmp_path / "images"))
    left = set(threading.enumerate()) - before - {pipeline.scorers[0].thread}
    assert all(thread.name.startswith(("refimg-disk", "refimg-pixels")) for thread in left)


def test_both_give_what_run_gives(tmp_path, story):
    """The same records, but for times and file numbers."""

    def essence(result: StoryResult):
        return [(s.sent_prompt, s.reference_from, s.enhancement.final_prompt,
                 [(v.image.seed, v.image.sha256, v.scores, v.rank) for v in s.variations])
                for s in result.scenes]

    def fresh(folder: str, way):
        pipeline = Pipeline(director=director(), critic=critic(90), image_model=FakeImages(),
                            scorers=[FakeScorer()], num_variations=2, seed=3)
        return essence(way(pipeline, tmp_path / folder))

    async def inside(pipeline, folder):
        return pipeline.run_sync(story, output_dir=folder)

    awaited = fresh("a", lambda p, f: asyncio.run(p.run(story, output_dir=f)))
    assert fresh("b", lambda p, f: p.run_sync(story, output_dir=f)) == awaited
    assert fresh("c", lambda p, f: asyncio.run(inside(p, f))) == awaited


def test_the_callers_context_is_carried_over(tmp_path, story, pipeline):
    """The models see it; what they set does not come back."""
    token = WHO.set("the caller")
    try:
        both_ways(lambda: pipeline.run_sync(story, output_dir=tmp_path / "images"))
        assert WHO.get() == "the caller" and "nobody" not in pipeline.image_model.who
        assert "the caller" in pipeline.image_model.who
    finally:
        WHO.reset(token)


def test_every_option_of_run_is_passed_on(tmp_path, story, pipeline):
    reports, looks = [], []
    given = asyncio.run(pipeline.enhance(story))
    pipeline.director.calls.clear()
    made = pipeline.run_sync(story, generation_id="a-name", output_dir=tmp_path / "images",
                             enhancements=given, on_progress=reports.append,
                             cancellation_check=lambda: looks.append(1))
    assert made.generation_id == "a-name" and pipeline.director.calls == []
    assert [s.enhancement for s in made.scenes] == given
    assert len(reports) == 6 and looks


def raised(call) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def test_a_value_error_comes_out_as_it_is(tmp_path, story, pipeline):
    pipeline.num_variations = 99
    for error in both_ways(lambda: raised(lambda: pipeline.run_sync(story, output_dir=tmp_path))):
        assert type(error) is ValueError and "99" in str(error)


def test_generation_failed_comes_out_with_the_very_causes(tmp_path, story, pipeline):
    causes = []

    def fail(request, number):
        causes.append(RuntimeError(f"call {number}"))
        return causes[-1]

    pipeline.image_model.script = fail
    for error in both_ways(
        lambda: raised(lambda: pipeline.run_sync(story, output_dir=tmp_path / "images"))
    ):
        assert type(error) is GenerationFailed
        assert error.causes and all(any(c is known for known in causes) for c in error.causes)


def test_cancelled_comes_out_as_it_is(tmp_path, story, pipeline):
    for error in both_ways(lambda: raised(lambda: pipeline.run_sync(
            story, output_dir=tmp_path / "images", cancellation_check=lambda: True))):
        assert type(error) is GenerationCancelled
    assert pipeline.image_model.requests == []


def test_an_unknown_option_is_an_error_and_no_coroutine_is_lost(story, pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for error in both_ways(lambda: raised(lambda: pipeline.run_sync(story, nonsense=1))):
            assert type(error) is TypeError and "nonsense" in str(error)


def test_many_threads_may_run_at_once(tmp_path, story):
    """Each with a loop of its own; the one scoring thread serves them all."""
    made: dict[int, StoryResult] = {}

    def work(i: int) -> None:
        model = FakeImages(lambda request, number: picture(40 * i + number))
        pipeline = Pipeline(director=director(), critic=critic(90), image_model=model,
                            scorers=[FakeScorer()], num_variations=2)
        made[i] = pipeline.run_sync(story, generation_id=f"id{i}", output_dir=tmp_path / "images")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in made.items():
        raws = [v.scores.raw["pickscore"] for s in result.scenes for v in s.variations]
        assert raws == [40 * i + n for n in (1, 2, 3, 4)]
    assert len(made) == 4
