"""Every result says how long each stage of each scene took, whatever became of the scene."""

from __future__ import annotations

import pytest

from refimg.engine.attempts import Attempts
from refimg.pipeline import Pipeline, Scene, SceneResult, Story, StoryResult, rescore

from .fakes import FakeChat, FakeImages, FakeScorer, critic, director, picture

STAGES = ("enhance", "wait", "generate", "score")
LLM, IMAGE, SCORE = 0.03, 0.1, 0.05


def make_pipeline(images=None, **options) -> Pipeline:
    options = {"director": director(LLM), "critic": critic(90, seconds=LLM)} | options
    return Pipeline(image_model=images or FakeImages(seconds=IMAGE), num_variations=2,
                    scorers=[FakeScorer(seconds=SCORE)], quality_threshold=0, **options)


def make_story(scenes: int = 2) -> Story:
    return Story(scenes=[Scene(prompt=f"scene {n}") for n in range(1, scenes + 1)])


def check(result: StoryResult) -> list[SceneResult]:
    """The scenes, each with the seconds of its four stages and where three of them lie."""
    for scene in result.scenes:
        assert all(0 <= scene.timings[stage] < 60 for stage in STAGES), scene.timings
        for stage in ("enhance", "generate", "score"):
            start = scene.timings.get(f"{stage}_start")
            assert start is not None or scene.timings[stage] == 0
            assert start is None or start + scene.timings[stage] <= result.timings["total"]
    return result.scenes


async def test_a_run_says_how_long_each_stage_took(tmp_path):
    first, second = check(await make_pipeline().run(make_story(), output_dir=tmp_path / "i"))
    for scene in (first, second):
        assert scene.timings["enhance"] >= 2 * LLM
        assert scene.timings["generate"] >= IMAGE
        assert scene.timings["score"] >= SCORE
    assert second.timings["wait"] >= IMAGE
    before = first.timings["score_start"] + first.timings["score"]
    assert second.timings["generate_start"] >= before


async def test_a_fallback_has_its_times(tmp_path):
    broken = FakeChat([OSError("no answer")], seconds=LLM)
    scenes = check(await make_pipeline(director=broken).run(
        make_story(), output_dir=tmp_path / "i"))
    assert [scene.reference_from for scene in scenes] == ["fallback"] * 2
    assert all(scene.timings["enhance"] >= LLM for scene in scenes)
    assert all(scene.timings["generate"] >= IMAGE for scene in scenes)


async def test_a_carried_scene_has_the_time_of_all_that_was_tried(tmp_path):
    def paint(request, number):
        return OSError("no paint") if "scene_02" in request.slot else picture(number)

    pipeline = make_pipeline(FakeImages(paint, seconds=IMAGE), max_enhancement_iterations=0)
    scenes = check(await pipeline.run(make_story(3), output_dir=tmp_path / "i"))
    assert scenes[1].reference_from == "carried"
    assert scenes[1].timings["generate"] >= 3 * IMAGE


async def test_a_scene_that_broke_off_has_the_time_until_then(tmp_path, monkeypatch):
    """A stage that it never came to took no time."""
    fill = Attempts.fill

    async def broken(attempts, *args):
        if attempts.images.notes.number == 2:
            raise ZeroDivisionError("not meant to happen")
        return await fill(attempts, *args)

    monkeypatch.setattr(Attempts, "fill", broken)
    carried = check(await make_pipeline().run(make_story(), output_dir=tmp_path / "i"))[1]
    assert carried.reference_from == "carried"
    assert carried.timings["score"] == 0 and "score_start" not in carried.timings
    assert "generate_start" in carried.timings


async def test_a_rerun_keeps_the_times_of_what_it_keeps(tmp_path):
    pipeline = make_pipeline()
    done = await pipeline.run(make_story(3), output_dir=tmp_path / "i")
    again = await pipeline.rerun(done, 3)
    assert [s.timings for s in again.scenes[:2]] == [s.timings for s in done.scenes[:2]]
    made = again.scenes[2].timings
    assert made["enhance"] >= 0 and made["generate"] >= IMAGE and made["score"] >= SCORE
    assert made["score_start"] + made["score"] <= again.timings["total"]


@pytest.mark.parametrize("how", [{"scorers": [FakeScorer("other", seconds=SCORE)]},
                                 {"weights": {"pickscore": 2}}], ids=["scorers", "weights"])
async def test_rescore_says_its_own_time_and_keeps_the_others(tmp_path, how):
    done = await make_pipeline().run(make_story(), output_dir=tmp_path / "i")
    made = await rescore(done, **how)
    assert [s.timings for s in made.scenes] == [s.timings for s in done.scenes]
    taken = made.history[-1].after["seconds"]
    assert len(taken) == 2 and min(taken) >= (2 * SCORE if "scorers" in how else 0)


async def test_many_stories_have_the_times_of_their_own(tmp_path):
    async for made in make_pipeline().run_many([make_story()] * 3, output_dir=tmp_path / "i"):
        assert all(scene.timings["generate"] >= IMAGE for scene in check(made))


async def test_times_go_through_the_disk(tmp_path):
    made = await make_pipeline().run(make_story(), output_dir=tmp_path / "i")
    made.save(tmp_path / "run.json")
    assert [s.timings for s in check(StoryResult.load(tmp_path / "run.json"))] == [
        s.timings for s in made.scenes]
