"""Repairs, edits by hand and the judge's look: what they may never do, whatever goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refimg import Pipeline, Scene, Story, StoryResult
from refimg.adapters.prices import PriceTable
from refimg.engine.decisions import choice, preference_rows
from refimg.engine.protocols import Reply
from refimg.enhance import read_fences
from refimg.pipeline import choose
from refimg.sandbox.inspector import Inspector
from refimg.storage.journal import Journal
from tests.fakes import FakeChat, FakeImages, FakeScorer, critic, picture

TWO = {"questions": [{"text": "Is there a fox?", "about": "subject"},
                     {"text": "Is it red?", "about": "attribute", "parent": 0}]}
STORY = Story(scenes=[Scene(prompt="a red fox"), Scene(prompt="the fox by a lake")])


def shade_of(image: bytes) -> int:
    return Image.open(io.BytesIO(image)).convert("RGB").getpixel((5, 5))[0]


class Eyes:
    """An inspector to whom whatever is darker than `right` is not red; `fails(n)` may raise."""

    name, sees_images = "eyes", True

    def __init__(self, right: int = 200, fails=lambda number: None):
        self.right, self.fails, self.written, self.images = right, fails, 0, []

    async def reply(self, messages, schema=None):
        if not messages[-1].images:
            self.written += 1
            return Reply(text=json.dumps(TWO), cost=0.01)
        self.images.append(messages[-1].images)
        if (fault := self.fails(len(self.images))) is not None:
            if isinstance(fault, BaseException):
                raise fault
            return Reply(text=fault, cost=0.02)
        count = read_fences(messages[-1].content)["questions"].count("\n") + 1
        red = "yes" if shade_of(messages[-1].images[0]) >= self.right else "no"
        told = [{"question": n, "verdict": "yes" if n == 0 else red, "reason": "grey"}
                for n in range(count)]
        return Reply(text=json.dumps({"answers": told}), cost=0.02)


def writer(edit: str | BaseException = "Make it red.") -> FakeChat:
    """A director that also writes edit instructions."""
    def write(messages, schema, number):
        told = any("failed" in read_fences(message.content) for message in messages)
        return edit if told else "a better prompt of a red fox"
    return FakeChat(write, name="writer")


def edits_of(brighter: int = 60, edit=None):
    """An image model: shades 20, 40, 60 … and edits that are brighter than the first reference."""
    def draw(request, number):
        if not request.prompt.startswith("Edit image 1:"):
            return picture(20 * (int(request.slot.split("/v")[1].split("/")[0])))
        if edit is not None:
            return edit(request, number)
        base = shade_of(request.references[0].read_bytes())
        return picture(min(base + brighter + number % 2, 250))
    return draw


def pipeline(images=None, eyes=None, **more) -> Pipeline:
    asked = {"num_variations": 3, "repair_rounds": 2, "plan": False,
             "max_enhancement_iterations": 1, "seed": 1} | more
    return Pipeline(more.pop("director", None) or writer(), critic(), images or FakeImages(
        edits_of(), max_references=3), [FakeScorer()], inspector=eyes or Eyes(), **{
            name: value for name, value in asked.items() if name != "director"})


def winner(scene):
    return next(item for item in scene.variations if item.selected)


# repair


async def test_what_failed_is_edited_until_nothing_fails(tmp_path):
    made = FakeImages(edits_of(), max_references=3)
    result = await pipeline(made, Eyes(right=110)).run(STORY, output_dir=tmp_path / "i")
    for scene in result.scenes:
        assert scene.reference_from == "repaired"
        assert [item.edits for item in scene.variations] == [None] * 3 + [3, 3]
        assert {item.instruction for item in scene.variations[3:]} == {"Make it red."}
        assert winner(scene).inspection.score == 100 and "repair" in scene.timings
        assert not any("near copy" in text for text in scene.warnings)
    asked = [one for one in made.requests if one.prompt.startswith("Edit image 1:")]
    assert asked[0].references[0].name.endswith("scene_01_v3.png")
    second = next(one for one in asked if "scene_02" in one.slot)
    assert [path.name[-6:] for path in second.references[:1]] == ["v3.png"]
    assert second.references[1] == result.scenes[0].reference and "Image 2" in second.prompt
    assert len({one.slot for one in made.requests}) == len(made.requests)
    assert len({one.seed for one in made.requests}) == len(made.requests)


async def test_a_second_repair_edits_the_best_edit_and_then_it_ends(tmp_path):
    result = await pipeline(eyes=Eyes(right=255)).run(STORY, output_dir=tmp_path / "i")
    edits = [item.edits for item in result.scenes[0].variations]
    assert edits[:5] == [None] * 3 + [3, 3] and len(edits) == 7
    assert edits[5] in (4, 5) and edits[5] == edits[6]


async def test_it_ends_where_a_round_brings_nothing(tmp_path):
    same = FakeImages(edits_of(brighter=-1), max_references=3)
    result = await pipeline(same).run(STORY, output_dir=tmp_path / "i")
    assert [len(scene.variations) for scene in result.scenes] == [5, 5]
    assert {scene.reference_from for scene in result.scenes} == {"ranked"}


async def test_nothing_is_edited_where_nothing_fails_or_nobody_asks(tmp_path):
    right = await pipeline(eyes=Eyes(right=0)).run(STORY, output_dir=tmp_path / "a")
    off = await pipeline(repair_rounds=0).run(STORY, output_dir=tmp_path / "b")
    assert [len(s.variations) for s in (*right.scenes, *off.scenes)] == [3] * 4
    assert "repair" not in off.scenes[0].timings


@pytest.mark.parametrize("broken", [RuntimeError("no"), "", "I'm sorry, I can't help with that.",
                                    asyncio.CancelledError()])
async def test_a_director_without_an_instruction_changes_nothing(tmp_path, broken):
    result = await pipeline(director=writer(broken)).run(STORY, output_dir=tmp_path / "i")
    for scene in result.scenes:
        assert scene.reference_from == "ranked" and len(scene.variations) == 3
        assert any(text.startswith("not repaired: ") for text in scene.warnings)


async def test_edits_that_fail_are_a_warning(tmp_path):
    def fail(request, number):
        raise RuntimeError("the edit broke")

    made = FakeImages(edits_of(edit=fail), max_references=3)
    result = await pipeline(made).run(STORY, output_dir=tmp_path / "i")
    for scene in result.scenes:
        assert scene.reference_from == "ranked"
        assert any("no edit could be drawn" in text for text in scene.warnings)


async def test_one_edit_of_two_is_enough(tmp_path):
    def half(request, number):
        if "/v4/" in request.slot:
            raise RuntimeError("the edit broke")
        return picture(240)

    made = FakeImages(edits_of(edit=half), max_references=3)
    result = await pipeline(made).run(STORY, output_dir=tmp_path / "i")
    assert [item.edits for item in result.scenes[0].variations] == [None] * 3 + [3]
    assert result.scenes[0].reference_from == "repaired"


EXAMPLES = 80 if os.environ.get("REFIMG_TEST_ALL") == "1" else 20
FAULTS = (None, None, None, "", "[", '{"answers": []}', "Yes, all of it.", RuntimeError("down"))


@settings(max_examples=EXAMPLES)
@given(seed=st.integers(0, 2**32))
def test_what_is_returned_is_never_worse_than_before(tmp_path_factory, seed):
    """Inspector, director and edits fail at random; some images are defective, or lack scores."""
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("i")

    def edit(request, number):
        fate = rng.random()
        if fate < 0.2:
            raise RuntimeError("the edit broke")
        return b"no image" if fate < 0.3 else picture(rng.randrange(256))

    def value(image, prompt):
        shade = float(image.getpixel((0, 0))[0])
        return RuntimeError("scorer") if rng.random() < 0.1 else shade

    def run(rounds: int):
        return pipeline(
            FakeImages(edits_of(edit=edit), max_references=3),
            Eyes(220, lambda number: rng.choice(FAULTS)), repair_rounds=rounds,
            director=writer(rng.choice(["Make it red.", RuntimeError("no"), ""])))

    made = run(3)
    made.scorers = [FakeScorer(value=value), FakeScorer("aesthetic", value)]
    result = asyncio.run(made.run(STORY, output_dir=folder / "i"))
    for scene in result.scenes:
        first = [item.scores.overall for item in scene.variations if item.edits is None]
        before = max((one for one in first if one is not None), default=None)
        if before is not None:
            assert winner(scene).scores.overall >= before
    assert len(result.references) == 2


async def test_an_edit_with_a_score_that_the_others_lack_gains_nothing_by_it(tmp_path):
    """No first image has an aesthetic score; an edit that has one is compared without it."""
    def value(image, prompt):
        return 255.0 if image.getpixel((0, 0))[0] > 60 else None

    from refimg.score import RawScore
    lacks = FakeScorer("aesthetic", lambda image, prompt: RawScore(value(image, prompt), "lacks"))
    made = pipeline(FakeImages(edits_of(brighter=1), max_references=3), repair_rounds=1)
    made.scorers = [FakeScorer(), lacks]
    scene = (await made.run(STORY, output_dir=tmp_path / "i")).scenes[0]
    first, edit = scene.variations[2], scene.variations[3]
    assert first.scores.overall is not None and edit.scores.metrics["aesthetic"] == 100
    assert abs(edit.scores.overall - first.scores.overall) < 2


# money, resuming, stopping


def priced(monkeypatch, usd=1.0) -> None:
    """An image costs so much, a call of a chat model at most two cents."""
    monkeypatch.setattr(PriceTable, "image_cost", lambda self, order, **more: usd)
    monkeypatch.setattr(PriceTable, "most_for_image", lambda self, order, **more: usd)
    monkeypatch.setattr(PriceTable, "most_for_chat", lambda self, *a: 0.02)
    monkeypatch.setattr(PriceTable, "chat_cost", lambda self, *a: 0.0)
    monkeypatch.setattr(PriceTable, "limits", lambda self, name: {})


@pytest.mark.parametrize(("budget", "edits"), [(6.3, 0), (7.5, 0), (8.5, 1), (10.5, 2)])
async def test_no_repair_begins_without_money_for_it_and_the_scenes_to_come(
        tmp_path, monkeypatch, budget, edits):
    priced(monkeypatch)
    made = FakeImages(edits_of(), max_references=3)
    run = pipeline(made, Eyes(right=110), budget_usd=budget)
    result = await run.run(STORY, output_dir=tmp_path / "i")
    assert [len([v for v in s.variations if not v.edits]) for s in result.scenes] == [3, 3]
    assert sum(scene.reference_from == "repaired" for scene in result.scenes) == edits
    assert len(made.requests) <= budget
    told = [text for scene in result.scenes for text in scene.warnings]
    assert sum("the images to come" in text for text in told) == 2 - edits


async def test_a_repaired_run_is_resumed_without_a_call(tmp_path, monkeypatch):
    priced(monkeypatch)
    where = {"output_dir": tmp_path / "i", "generation_id": "fox"}
    made, eyes = FakeImages(edits_of(), max_references=3), Eyes(right=110)
    first = await pipeline(made, eyes, journal=Journal(tmp_path / "j"), budget_usd=10.5).run(
        STORY, **where)
    again = FakeImages(lambda request, number: RuntimeError("asked again"), max_references=3)
    blind = Eyes(fails=lambda number: RuntimeError("asked again"))
    second = await pipeline(again, blind, journal=Journal(tmp_path / "j"), budget_usd=10.5,
                            director=writer(RuntimeError("asked again"))).run(STORY, **where)
    assert not again.requests and not blind.images and not blind.written
    assert second.references == first.references
    assert [s.reference_from for s in second.scenes] == ["repaired"] * 2
    names = [[v.image.image_path.name for v in s.variations] for s in first.scenes]
    assert names == [[f"fox_scene_0{n}_v{k}.png" for k in range(1, 6)] for n in (1, 2)]


async def test_all_that_a_repair_costs_is_on_the_bill(tmp_path):
    def edit(request, number):
        from refimg.generate import GeneratedImage
        return GeneratedImage(data=picture(240), cost=0.5)

    chat = writer(Reply(text="Make it red.", cost=0.25))
    made = FakeImages(edits_of(edit=edit), max_references=3)
    inner = made.script
    from refimg.generate import GeneratedImage
    made.script = lambda r, n: (found if isinstance(found := inner(r, n), GeneratedImage)
                                else GeneratedImage(data=found, cost=0.5))
    one = Story(scenes=STORY.scenes[:1])
    chat.script = (lambda write: lambda *a: (found if isinstance(found := write(*a), Reply)
                                             else Reply(text=found, cost=0.0)))(chat.script)
    check = critic()
    check.script = [Reply(text=check.script[0], cost=0.0)]
    run = pipeline(made, Eyes(right=230), director=chat)
    run.critic = check
    result = await run.run(one, output_dir=tmp_path / "i")
    assert result.cost == pytest.approx(5 * 0.5 + 0.25 + 0.01 + 5 * 0.02)


async def test_a_stop_during_a_repair_begins_nothing_and_keeps_what_is_paid(tmp_path):
    made = FakeImages(edits_of(), seconds=0.05, max_references=3)
    begun = asyncio.Event()

    def edit(request, number):
        begun.set()
        return picture(240)

    made.script = edits_of(edit=edit)
    run = asyncio.create_task(pipeline(made).run(
        STORY, output_dir=tmp_path / "i", generation_id="fox",
        cancellation_check=lambda: begun.is_set()))
    with pytest.raises(RuntimeError, match="cancelled"):
        await run
    count = len(made.requests)
    await asyncio.sleep(0.2)
    assert len(made.requests) == count
    assert {p.name for p in (tmp_path / "i").glob("*.png")} >= {
        f"fox_scene_01_v{k}.png" for k in (1, 2, 3)}


# bad input, before anything is paid


@pytest.mark.parametrize(("change", "said"), [
    ({"inspector": None}, "inspector must be"),
    ({"inspector": FakeChat(name="blind")}, "inspector must be a chat model that sees images"),
    ({"judge": FakeChat(name="blind")}, "judge must be a chat model that sees images"),
    ({"image_model": FakeImages(max_references=0), "chain": "none"}, "repair_rounds must be 0"),
    ({"max_references": 0, "chain": "none"}, "repair_rounds must be 0"),
    ({"repair_rounds": -1}, "repair_rounds must be a whole number from 0 to 10"),
    ({"repair_rounds": "2"}, "repair_rounds must be"),
    ({"repair_variations": 0}, "repair_variations must be a whole number from 1 to 20"),
])
async def test_what_cannot_be_repaired_is_refused_before_a_call(tmp_path, change, said):
    made = pipeline()
    for name, value in change.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=said):
        await made.run(STORY, output_dir=tmp_path / "i")
    assert not made.director.calls and not (tmp_path / "i").exists()


# edits by hand


async def test_an_edit_joins_its_scene_and_what_depends_on_it_is_drawn_again(tmp_path):
    made = FakeImages(edits_of(brighter=100), max_references=3)
    run = pipeline(made, repair_rounds=0)
    result = await run.run(STORY, output_dir=tmp_path / "i", generation_id="fox")
    drawn = len(made.requests)
    edited = await run.edit(result, 1, "Make it red.")
    scene, later = edited.scenes
    assert scene.reference_from == "repaired" and [v.edits for v in scene.variations[3:]] == [3, 3]
    assert scene.variations[:2] == [v.model_copy(update={"rank": v.rank + 2})
                                    for v in result.scenes[0].variations[:2]]
    assert later.variations[0].image.references[0] == scene.reference and later.stale is None
    assert len(made.requests) == drawn + 2 + 3
    event = edited.history[-1]
    assert (event.kind, event.scene, event.variation, event.reason) == (
        "edit", 1, 3, "Make it red.")
    assert event.after["scenes"] == [2] and event.after["variation"] in (4, 5)
    saved = tmp_path / "run.json"
    edited.save(saved)
    assert StoryResult.load(saved) == edited
    once_more = await run.edit(edited, 1, "Make it redder.", only=True)
    names = [v.image.image_path for v in once_more.scenes[0].variations]
    assert len(names) == 7 == len(set(names)) and once_more.scenes[0].variations[5].edits in (4, 5)


async def test_only_that_scene_leaves_the_others_and_says_they_are_stale(tmp_path):
    made = FakeImages(edits_of(brighter=100), max_references=3)
    run = pipeline(made, repair_rounds=0)
    result = await run.run(STORY, output_dir=tmp_path / "i")
    edited = await run.edit(result, 1, "Make it red.", only=True, variation=2)
    assert edited.scenes[0].variations[3].edits == 2
    assert edited.scenes[1].model_copy(update={"stale": None}) == result.scenes[1]
    assert "scene 1 was changed" in edited.scenes[1].stale
    again = await run.rerun(result, 1, only=True)
    assert again.scenes[1].variations == result.scenes[1].variations
    assert again.scenes[0].reference != result.scenes[0].reference
    assert "scene 1 was changed" in again.scenes[1].stale
    assert again.history[-1].after["scenes"] == [1]


async def test_an_edit_that_is_no_better_changes_no_reference_and_costs_no_later_scene(tmp_path):
    made = FakeImages(edits_of(brighter=-10), max_references=3)
    run = pipeline(made, repair_rounds=0)
    result = await run.run(STORY, output_dir=tmp_path / "i")
    drawn = len(made.requests)
    edited = await run.edit(result, 1, "Make it red.")
    assert edited.references == result.references and len(made.requests) == drawn + 2
    assert edited.scenes[0].reference_from == "ranked" and edited.history[-1].after["scenes"] == []
    assert edited.scenes[1] == result.scenes[1]


async def test_a_persons_choice_is_only_replaced_by_a_better_edit_of_it(tmp_path):
    made = FakeImages(edits_of(brighter=10), max_references=3)
    run = pipeline(made, repair_rounds=0)
    result = choose(await run.run(STORY, output_dir=tmp_path / "i"), 1, 1, "her eyes")
    edited = await run.edit(result, 1, "Make it red.", only=True)
    scene = edited.scenes[0]
    assert winner(scene).edits == 1 and winner(scene).rank > 1
    worse = FakeImages(edits_of(brighter=-15), max_references=3)
    kept = await pipeline(worse, repair_rounds=0).edit(result, 1, "Make it red.", only=True)
    assert kept.scenes[0].reference == result.scenes[0].reference
    assert kept.scenes[0].reference_from == "human"


async def test_edits_that_fail_leave_the_scene_as_it_was(tmp_path):
    result = await pipeline(repair_rounds=0).run(STORY, output_dir=tmp_path / "i")
    broken = FakeImages(lambda request, number: RuntimeError("down"), max_references=3)
    edited = await pipeline(broken, repair_rounds=0).edit(result, 1, "Make it red.")
    assert edited.references == result.references
    assert edited.scenes[0].variations == result.scenes[0].variations
    assert any("no edit could be drawn" in text for text in edited.scenes[0].warnings)


async def test_an_edit_by_other_scorers_scores_all_images_again(tmp_path):
    run = pipeline(repair_rounds=0)
    result = await run.run(STORY, output_dir=tmp_path / "i")
    run.scorers = [FakeScorer("clip_score", lambda image, _: 255.0 - image.getpixel((0, 0))[0])]
    edited = await run.edit(result, 1, "Make it red.", only=True)
    assert all("clip_score" in item.scores.metrics for item in edited.scenes[0].variations)


@pytest.mark.parametrize(("asked", "said"), [
    ({"scene": 3}, "scene must be a whole number from 1 to 2"),
    ({"instruction": " "}, "instruction must be a text that is not blank"),
    ({"variation": 4}, "variation must be a whole number from 1 to 3"),
    ({"variation": 0}, "variation must be"),
])
async def test_an_edit_of_nothing_is_refused(tmp_path, asked, said):
    run = pipeline(repair_rounds=0)
    result = await run.run(STORY, output_dir=tmp_path / "i")
    drawn = len(run.image_model.requests)
    with pytest.raises(ValueError, match=said):
        await run.edit(result, **{"scene": 1, "instruction": "Make it red."} | asked)
    assert len(run.image_model.requests) == drawn


# the environment


async def test_the_environment_turns_eyes_on(monkeypatch):
    for name in ("REFIMG_INSPECTOR", "REFIMG_REPAIR", "REFIMG_JUDGE"):
        monkeypatch.delenv(name, raising=False)
    plain = Pipeline.from_env()
    assert plain.inspector is plain.judge is None and plain.repair_rounds == 0
    monkeypatch.setenv("REFIMG_REPAIR", "2")
    made = Pipeline.from_env()
    assert made.repair_rounds == 2 and isinstance(made.inspector, Inspector)
    assert made.scorers[-1].name == "checklist"
    assert Pipeline.from_env(repair_rounds=1).repair_rounds == 1
    monkeypatch.setenv("REFIMG_REPAIR", "twice")
    with pytest.raises(ValueError, match="REFIMG_REPAIR must be a whole number from 0 to 10"):
        Pipeline.from_env()


def test_edits_and_all_that_is_asked_about_them_is_in_the_estimate():
    off, on = (pipeline(repair_rounds=rounds).estimate(STORY) for rounds in (0, 2))
    assert (off.images, off.edits) == (6, 0) and (on.images, on.edits) == (6, 8)
    assert on.chat_calls - off.chat_calls == 2 * 2 * (1 + 2)


# what was wrong once


async def test_an_edited_scene_still_says_what_was_sent_for_it(tmp_path):
    run = pipeline(repair_rounds=0)
    result = await run.run(STORY, output_dir=tmp_path / "i")
    edited = await run.edit(result, 2, "Make it red.", only=True)
    old, new = result.scenes[1], edited.scenes[1]
    assert old.sent_prompt and old.sent_references and len(new.variations) > len(old.variations)
    assert (new.sent_prompt, new.sent_references) == (old.sent_prompt, old.sent_references)


async def test_a_choice_ends_when_an_edit_of_it_wins_and_its_preferences_stay(tmp_path):
    run = pipeline(repair_rounds=0)
    result = choose(await run.run(STORY, output_dir=tmp_path / "i"), 1, 1, "her eyes")
    assert choice(result, 1).variation == 1
    before = preference_rows(result)
    edited = await run.edit(result, 1, "Make it red.", only=True)
    assert edited.scenes[0].reference_from == "repaired" and choice(edited, 1) is None
    assert preference_rows(edited) == before and len(before) == 2
    worse = pipeline(FakeImages(edits_of(brighter=-15), max_references=3), repair_rounds=0)
    kept = await worse.edit(result, 1, "Make it red.", only=True)
    assert choice(kept, 1).variation == 1 and preference_rows(kept) == before


async def test_looks_that_overlap_count_once(tmp_path):
    class Slow(Eyes):
        async def reply(self, messages, schema=None):
            await asyncio.sleep(0.2 if messages[-1].images else 0)
            return await super().reply(messages, schema)

    run = pipeline(eyes=Slow(), num_variations=8, repair_rounds=0)
    result = await run.run(Story(scenes=STORY.scenes[:1]), output_dir=tmp_path / "i")
    assert 0.2 <= result.scenes[0].timings["inspect"] < 8 * 0.2


class Doubting(Eyes):
    """Unsure where it would say no, and sure of a no about images darker than `fails`."""

    async def reply(self, messages, schema=None):
        made = await super().reply(messages, schema)
        if messages[-1].images and shade_of(messages[-1].images[0]) >= 50:
            return made.model_copy(update={"text": made.text.replace('"no"', '"unsure"')})
        return made


async def test_what_is_unsure_is_edited_once_nothing_is_plainly_wrong(tmp_path):
    made = writer()
    run = pipeline(FakeImages(edits_of(), max_references=3), Doubting(right=150), director=made)
    result = await run.run(Story(scenes=STORY.scenes[:1]), output_dir=tmp_path / "i")
    (scene,) = result.scenes
    first = [item.inspection.answers[1].verdict for item in scene.variations[:3]]
    assert first == ["no", "no", "unsure"]
    asked = [read_fences(message.content)["failed"] for messages, _ in made.calls
             for message in messages if "failed" in read_fences(message.content)]
    assert all(text.startswith("Is it red? – unsure: ") for text in asked) and asked
    assert scene.reference_from == "repaired" and winner(scene).inspection.score == 100
