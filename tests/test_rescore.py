"""Other judges over the same images: what changes, what stays, and that nothing is paid."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

import refimg
from refimg.pipeline import Pipeline, Scene, Story, StoryResult, choose, rescore
from refimg.score import RawScore, grade

from .fakes import FakeImages, FakeScorer, critic, director, picture


def red(image, prompt) -> float:
    return float(image.getpixel((0, 0))[0])


def dark(image, prompt) -> float:
    return 255 - red(image, prompt)


BRIGHT, DARK = FakeScorer(value=red), FakeScorer("clip_score", value=dark)
NOBODY = FakeScorer(value=lambda image, prompt: RawScore(None, "no weights here"))


async def made(
    folder: Path, scenes: int = 3, images: FakeImages | None = None, **over
) -> StoryResult:
    """A run in which the last variation of each scene is the brightest."""
    options = {"scorers": [FakeScorer()], "num_variations": 3, "quality_threshold": 1.0,
               "plan": False} | over
    p = Pipeline(director(), critic(), images or FakeImages(), **options)
    story = Story(scenes=[Scene(prompt=f"scene {n}") for n in range(1, scenes + 1)])
    return await p.run(story, output_dir=folder, generation_id="run")


def chosen(result: StoryResult) -> list[int]:
    """The number of the selected variation of each scene; 0 for none."""
    return [next((k for k, v in enumerate(s.variations, 1) if v.selected), 0)
            for s in result.scenes]


def stale(result) -> list[list[str]]:
    """Why each scene is stale, one entry per changed reference."""
    return [scene.stale.split("; ") if scene.stale else [] for scene in result.scenes]


# other scorers


async def test_the_new_judges_choose_and_nothing_is_paid(tmp_path):
    images = FakeImages()
    result = await made(tmp_path, images=images)
    before = result.model_dump()
    again = await rescore(result, [DARK])
    assert len(images.requests) == 9
    assert result.model_dump() == before
    assert (chosen(result), chosen(again)) == ([3, 3, 3], [1, 1, 1])
    assert again.references == [s.variations[0].image.image_path for s in result.scenes]
    for old, new in zip(result.scenes, again.scenes, strict=True):
        assert new.reference == new.variations[0].image.image_path
        assert new.reference_from == "ranked"
        assert [v.rank for v in new.variations] == [1, 2, 3]
        assert [set(v.scores.metrics) for v in new.variations] == [{"clip_score"}] * 3
        assert [v.image for v in new.variations] == [v.image for v in old.variations]
    kept = {"scenes", "references", "history"}
    assert again.model_dump(exclude=kept) == result.model_dump(exclude=kept)


async def test_the_same_judges_change_nothing(tmp_path):
    result = await made(tmp_path, scorers=[BRIGHT, DARK], weights={"pickscore": 2, "clip_score": 1})
    again = await rescore(result, [BRIGHT, DARK], {"pickscore": 2, "clip_score": 1})
    assert again.scenes == result.scenes
    assert again.history[-1].after["changed"] == []


@pytest.mark.parametrize("score_text", ["original", "enhanced"])
async def test_each_scene_is_judged_on_the_text_of_its_run(tmp_path, score_text):
    result = await made(tmp_path, scenes=2, score_text=score_text)
    other = "enhanced" if score_text == "original" else "original"
    p = Pipeline(director(), critic(), FakeImages(), [BRIGHT], num_variations=1, score_text=other)
    result = await p.rerun(result, 2)
    scorer = FakeScorer()
    await rescore(result, [scorer])
    texts = {"original": [s.prompt for s in result.scenes],
             "enhanced": [s.enhancement.final_prompt for s in result.scenes]}
    assert [b.prompt for b in scorer.batches] == [texts[score_text][0], texts[other][1]]
    assert texts["original"] != texts["enhanced"]


async def test_it_runs_in_the_scoring_thread_and_holds_nobody_up(tmp_path):
    result, names, ticks = await made(tmp_path, scenes=1), set(), 0

    def slow(image, prompt):
        names.add(threading.current_thread().name)
        threading.Event().wait(0.2)
        return red(image, prompt)

    task = asyncio.create_task(rescore(result, [FakeScorer(value=slow)]))
    while not task.done():
        ticks += 1
        await asyncio.sleep(0.01)
    assert all(name.startswith("refimg-score") for name in names) and names
    assert ticks >= 5


async def test_a_lost_file_is_unscored_alone(tmp_path):
    result = await made(tmp_path, scenes=1)
    result.scenes[0].variations[2].image.image_path.unlink()
    again = await rescore(result, [FakeScorer()])
    lost = again.scenes[0].variations[2]
    assert (lost.rank, lost.scores.overall) == (None, None)
    assert "could not be opened" in lost.scores.notes["pickscore"]
    assert (chosen(again), [v.rank for v in again.scenes[0].variations]) == ([2], [2, 1, None])


# other weights


async def test_weights_alone_open_no_image_and_keep_the_raw_values(tmp_path):
    scorers = [BRIGHT, DARK]
    result = await made(tmp_path, scorers=scorers, weights={"pickscore": 1, "clip_score": 0})
    for variation in (v for s in result.scenes for v in s.variations):
        variation.image.image_path.unlink()
    weights = {"pickscore": 1, "clip_score": 3}
    again = await rescore(result, weights=weights)
    assert (chosen(result), chosen(again)) == ([3, 3, 3], [1, 1, 1])
    for old, new in zip(result.scenes, again.scenes, strict=True):
        raws = [{n: RawScore(r) for n, r in v.scores.raw.items()} for v in old.variations]
        assert [v.scores for v in new.variations] == grade(raws, scorers, weights)
    back = await rescore(again, weights={"pickscore": 1, "clip_score": 0})
    assert [s.variations for s in back.scenes] == [s.variations for s in result.scenes]


async def test_the_rule_of_the_group_is_kept_and_its_notes_too(tmp_path):
    half = FakeScorer("clip_score", value=lambda image, prompt: (
        RawScore(None, "too dark") if red(image, prompt) < 15 else RawScore(9.0, "seen")))
    result = await made(tmp_path, scenes=1, scorers=[BRIGHT, half])
    first = result.scenes[0].variations[0].scores
    assert first.overall is None and "lacks clip_score" in first.notes["overall"]
    again = await rescore(result, weights={"pickscore": 1, "clip_score": 0})
    first, second = (v.scores for v in again.scenes[0].variations[:2])
    assert first.overall == first.pickscore
    assert (first.notes, second.notes) == ({"clip_score": "too dark"}, {"clip_score": "seen"})
    back = await rescore(again, weights={"pickscore": 0.5, "clip_score": 0.25})
    assert back.scenes == result.scenes


# what stays


async def test_a_choice_by_a_person_stays(tmp_path):
    result = choose(await made(tmp_path), 2, 2, "softer light")
    again = await rescore(result, [DARK])
    assert chosen(again) == [1, 2, 1]
    assert again.scenes[1].reference_from == "human"
    assert [v.rank for v in again.scenes[1].variations] == [1, 2, 3]
    assert again.history[:-1] == result.history
    assert again.history[-1].after["changed"] == [1, 3]


async def test_asked_to_stay_all_references_stay(tmp_path):
    result = await made(tmp_path)
    again = await rescore(result, [DARK], reselect=False)
    assert again.references == result.references and chosen(again) == [3, 3, 3]
    assert [[v.rank for v in s.variations] for s in again.scenes] == [[1, 2, 3]] * 3
    assert stale(again) == [[], [], []]
    assert again.history[-1].after["reselect"] is False


async def test_judges_without_a_number_move_nothing(tmp_path):
    result = await made(tmp_path)
    again = await rescore(result, [NOBODY])
    assert again.references == result.references and chosen(again) == [3, 3, 3]
    for scene in again.scenes:
        assert scene.below_threshold is None
        assert [w for w in scene.warnings if w.startswith("unscored: ")]
        assert [v.rank for v in scene.variations] == [None] * 3
    back = await rescore(again, [FakeScorer()])
    assert back.scenes == result.scenes


async def test_unscored_images_get_judges_at_last(tmp_path):
    result = await made(tmp_path, scorers=[])
    assert {s.reference_from for s in result.scenes} == {"first"}
    again = await rescore(result, [BRIGHT])
    assert chosen(again) == [3, 3, 3]
    assert {s.reference_from for s in again.scenes} == {"ranked"}
    assert not [w for s in again.scenes for w in s.warnings if w.startswith("unscored")]


async def test_fallbacks_and_borrowed_references_stay(tmp_path):
    def script(request, number):
        fails = "scene 2" in request.prompt or "number 2" in request.prompt
        return RuntimeError("no") if fails else picture(10 * number)

    result = await made(tmp_path, images=FakeImages(script), scenes=2)
    plain = FakeImages(lambda r, n: picture(90) if r.prompt == "scene 1" else RuntimeError("no"))
    fallback = await made(tmp_path, images=plain, scenes=1)
    assert result.scenes[1].reference_from == "carried" and not result.scenes[1].variations
    assert fallback.scenes[0].reference_from == "fallback"
    again = await rescore(result, [DARK])
    assert (chosen(again), again.scenes[1].reference_from) == ([1, 0], "carried")
    assert again.scenes[1].reference == result.scenes[1].reference
    assert stale(again)[1]
    same = (await rescore(fallback, [DARK])).scenes[0]
    assert (same.reference_from, same.reference) == ("fallback", fallback.scenes[0].reference)
    assert same.variations[0].scores.clip_score is not None


# what is said


@pytest.mark.parametrize("chain", ["previous", "first", "none"])
async def test_later_scenes_are_stale_as_after_a_choice(tmp_path, chain):
    result = await made(tmp_path, chain=chain)
    again, by_hand = await rescore(result, [DARK]), result
    for scene in (1, 2, 3):
        by_hand = choose(by_hand, scene, 1, "as the judges")
    assert stale(again) == stale(by_hand)
    counts = {"previous": [0, 1, 2], "first": [0, 1, 1], "none": [0, 0, 0]}
    assert [len(warnings) for warnings in stale(again)] == counts[chain]


async def test_the_warning_is_of_the_new_scores(tmp_path):
    result = await made(tmp_path, quality_threshold=50.0)
    assert all(s.below_threshold for s in result.scenes)
    good = FakeScorer(value=lambda image, prompt: 200 + red(image, prompt) / 10)
    again = await rescore(result, [good])
    assert [s.below_threshold for s in again.scenes] == [False] * 3
    assert not [w for s in again.scenes for w in s.warnings if w.startswith("below")]
    back = await rescore(again, [FakeScorer()])
    assert [s.warnings for s in back.scenes] == [s.warnings for s in result.scenes]


async def test_the_threshold_is_that_of_the_scenes_own_run(tmp_path):
    result = await made(tmp_path, scenes=2, quality_threshold=0.0)
    p = Pipeline(director(), critic(), FakeImages(), [BRIGHT], num_variations=1,
                 quality_threshold=100.0)
    again = await rescore(await p.rerun(result, 2), [FakeScorer()])
    assert [s.below_threshold for s in again.scenes] == [False, True]


async def test_what_was_done_is_in_the_history_and_on_disk(tmp_path):
    result = await made(tmp_path)
    again = await rescore(await rescore(result, [DARK]), weights={"clip_score": 1.0})
    judge = {"name": "clip_score", "model": "fake-model", "calibration": "fake-identity"}
    done = [{k: v for k, v in e.after.items() if k != "seconds"} for e in again.history]
    assert done == [
        {"scorers": [judge], "weights": None, "reselect": True, "changed": [1, 2, 3]},
        {"scorers": None, "weights": {"clip_score": 1.0}, "reselect": True, "changed": []},
    ]
    assert again.settings["scorers"] == result.settings["scorers"]
    again.save(tmp_path / "result.json")
    assert StoryResult.load(tmp_path / "result.json") == again


async def test_a_sandbox_judge_is_said(tmp_path):
    result, stand_in = await made(tmp_path), FakeScorer("clip_score")
    stand_in.model = "sandbox-eye"
    judged = await rescore(result, [stand_in])
    assert (result.sandbox, judged.sandbox) == (False, True)
    assert (await rescore(judged, [BRIGHT])).sandbox, "its choices may still be there"


@pytest.mark.parametrize(("arguments", "said"), [
    ({}, "None for both"),
    ({"scorers": BRIGHT}, "must be a list of scorers"),
    ({"scorers": [BRIGHT, BRIGHT]}, "twice"),
    ({"scorers": [object()]}, "a text as `name`"),
    ({"scorers": [FakeScorer("seed")]}, "none of the columns"),
    ({"scorers": [DARK], "weights": {"pickscore": 1}}, "weights must be for"),
    ({"weights": {"clip_score": 1}}, "weights must be for"),
    ({"weights": {"pickscore": -1}}, ">= 0"),
])  # fmt: skip
async def test_what_is_refused(tmp_path, arguments, said):
    result = await made(tmp_path, scenes=1)
    with pytest.raises(ValueError, match=said):
        await rescore(result, **arguments)


def test_it_is_at_the_top():
    assert refimg.rescore is rescore
