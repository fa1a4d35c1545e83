"""Sheets of the subjects: what is drawn, kept, paid and told before a story has a scene."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refimg import GenerationCancelled, GenerationFailed, Pipeline, Scene, Story, Subject
from refimg.engine.costs import BudgetSpent
from refimg.engine.sheets import sheet_stem, sheet_story
from refimg.sandbox.painter import Painter, truth
from refimg.sandbox.world import read_prompt
from refimg.score import RawScore
from refimg.storage.files import check_stem
from refimg.storage.journal import Journal
from tests.fakes import FakeChat, FakeImages, FakeScorer, critic, director, picture

MARA = Subject(name="Mara", description="a keeper with a grey beard",
               looks={"storm coat": "a long yellow coat", "wet": "soaked"})
LAMP = Subject(name="The lamp", description="a brass lamp", kind="object")
BAY = Subject(name="North Bay", description="a rocky coast", kind="place")


def story(*subjects: Subject, **more) -> Story:
    scenes = [Scene(prompt="the keeper lights the lamp"), Scene(prompt="the end of the night")]
    return Story(scenes=scenes, subjects=list(subjects), **more)


def pipeline(images=None, scorers=(), **settings) -> Pipeline:
    images = images or FakeImages(max_references=3)
    return Pipeline(director=director(), critic=critic(), image_model=images, scorers=list(scorers),
                    **{"num_variations": 2} | settings)


@pytest.fixture
def draw(tmp_path):
    async def go(made: Pipeline, told: Story, **over) -> Story:
        place = {"output_dir": tmp_path / "images", "generation_id": "x"}
        async with asyncio.timeout(20):
            return await made.draw_subjects(told, **place | over)

    return go


def by_stem(images: FakeImages) -> dict[str, list]:
    """The requests of each sheet."""
    found: dict[str, list] = {}
    for request in images.requests:
        found.setdefault(request.slot.split("/")[0], []).append(request)
    return found


async def test_each_subject_and_look_without_an_image_is_drawn_and_the_best_is_kept(
    draw, tmp_path
):
    images, scorer = FakeImages(max_references=3), FakeScorer()
    markers = {"style": "ink", "color_palette": ["teal"], "lighting": "moonlight"}
    drawn = await draw(pipeline(images, [scorer]), story(MARA, LAMP, consistency_markers=markers))
    mara, lamp = drawn.subjects
    asked = by_stem(images)
    assert {stem: len(found) for stem, found in asked.items()} == dict.fromkeys(
        ["x_subject_Mara", "x_subject_Mara_storm-coat", "x_subject_Mara_wet",
         "x_subject_The-lamp"], 2)
    assert mara.images == [tmp_path / "images" / "x_subject_Mara_v2.png"]
    assert set(mara.look_images) == set(mara.looks) and len(lamp.images) == 1
    assert len(list((tmp_path / "images").iterdir())) == 8
    own, look = asked["x_subject_Mara"][0], asked["x_subject_Mara_storm-coat"][0]
    assert own.references == () and look.references == tuple(mara.images)
    for request in images.requests:
        assert "Style: ink" in request.prompt and "teal" in request.prompt
        assert "moonlight" not in request.prompt and "plain, pale background" in request.prompt
        assert not re.search(r"\b(no|not|without|never)\b", request.prompt)
    assert "grey beard" in look.prompt and "yellow coat" in look.prompt
    assert "keep the identity of Mara" in look.prompt and "yellow coat" not in own.prompt
    assert {batch.prompt for batch in scorer.batches} == {
        found[0].prompt.partition(" The reference image")[0] for found in asked.values()}
    assert drawn.model_copy(update={"subjects": [MARA, LAMP]}) == story(
        MARA, LAMP, consistency_markers=markers)
    assert Story.model_validate_json(drawn.model_dump_json()) == drawn


async def test_a_look_is_compared_with_the_sheet_that_it_is_an_edit_of(draw):
    class Likeness(FakeScorer):
        def score(self, batch):
            self.batches.append(batch)
            return [RawScore(50 if batch.references else None, "", bool(batch.references))
                    for _ in batch.images]

    likeness = Likeness("consistency")
    await draw(pipeline(scorers=[FakeScorer(), likeness]), story(MARA))
    compared = {batch.prompt.partition(". One")[0]: len(batch.references)
                for batch in likeness.batches}
    assert sorted(compared.values()) == [0, 1, 1]


async def test_what_has_an_image_is_left_alone_but_for_the_looks_it_lacks(draw, tmp_path):
    (own := tmp_path / "own.png").write_bytes(picture(9))
    (wet := tmp_path / "wet.png").write_bytes(picture(8))
    mara = MARA.model_copy(update={"images": [own], "look_images": {"wet": wet}})
    images = FakeImages(max_references=3)
    drawn = (await draw(pipeline(images), story(mara))).subjects[0]
    assert drawn.images == [own] and drawn.look_images["wet"] == wet
    assert list(by_stem(images)) == ["x_subject_Mara_storm-coat"]
    assert all(request.references == (own,) for request in images.requests)


@pytest.mark.parametrize("subjects", [[], ["has"]])
async def test_a_story_that_lacks_nothing_is_returned_as_it_is(draw, tmp_path, subjects):
    (own := tmp_path / "own.png").write_bytes(picture(9))
    told, images = story(*(Subject(name=name, images=[own]) for name in subjects)), FakeImages()
    seen = []
    assert await draw(pipeline(images), told, on_progress=seen.append) == told
    assert not images.requests and not seen and not (tmp_path / "images").exists()


@pytest.mark.parametrize("most", ["model", "settings"])
async def test_without_references_looks_are_drawn_from_text_and_it_says_so(draw, caplog, most):
    images = FakeImages(max_references=0 if most == "model" else 3)
    limits = {} if most == "model" else {"max_references": 0}
    drawn = await draw(pipeline(images, chain="none", **limits), story(MARA))
    assert set(drawn.subjects[0].look_images) == set(MARA.looks)
    assert not any(request.references for request in images.requests)
    assert caplog.text.count("drawn from its text alone, since no reference can go along") == 2


async def test_a_subject_that_cannot_be_drawn_costs_no_other(draw, caplog):
    def some(request, number):
        return RuntimeError("refused") if "_Mara" in request.slot else picture(number)

    images = FakeImages(some, max_references=3)
    mara, lamp = (await draw(pipeline(images), story(MARA, LAMP))).subjects
    assert mara == MARA and lamp.images
    assert "_Mara_" not in "".join(by_stem(images))
    assert "subject Mara: no image of it was drawn: RuntimeError('refused')" in caplog.text
    assert "subject Mara/wet: not drawn, since the subject has no image" in caplog.text


async def test_a_look_that_cannot_be_drawn_leaves_the_subject_its_image(draw):
    def some(request, number):
        return RuntimeError("refused") if request.references else picture(number)

    mara, = (await draw(pipeline(FakeImages(some, max_references=3)), story(MARA))).subjects
    assert len(mara.images) == 1 and not mara.look_images


@pytest.mark.parametrize("fails", ["call", "pixels", "cancels itself"])
async def test_only_if_nothing_could_be_drawn_is_that_an_error(draw, fails):
    def nothing(request, number):
        wrong = {"call": RuntimeError("refused"), "pixels": b"no image"}
        return wrong.get(fails, asyncio.CancelledError("by the model"))

    with pytest.raises(GenerationFailed, match="no image of a subject was drawn") as raised:
        await draw(pipeline(FakeImages(nothing, max_references=3)), story(MARA, LAMP))
    assert len(raised.value.causes) == 4


async def test_with_a_journal_the_same_call_returns_the_same_paths_and_pays_nothing(
    draw, tmp_path
):
    told, pays = story(MARA, LAMP), []
    for _ in range(2):
        images = FakeImages(max_references=3)
        made = pipeline(images, [FakeScorer()], journal=Journal(tmp_path / "journal"), seed=3)
        pays.append((await draw(made, told), len(images.requests)))
    (first, paid), (again, nothing) = pays
    assert first == again and paid == 8 and nothing == 0
    assert len(list((tmp_path / "images").iterdir())) == 8


async def test_without_a_journal_nothing_is_overwritten(draw, tmp_path):
    first = await draw(pipeline(), story(LAMP))
    before = first.subjects[0].images[0].read_bytes()
    again = await draw(pipeline(FakeImages(lambda *_: picture(77))), story(LAMP))
    assert again.subjects[0].images[0].name == "x_subject_The-lamp_v3.png"
    assert first.subjects[0].images[0].read_bytes() == before


async def test_seeds_follow_the_name_and_not_the_place(draw, tmp_path):
    seeds = []
    for subjects in ([MARA, LAMP], [BAY, LAMP, MARA]):
        images = FakeImages(max_references=3)
        await draw(pipeline(images, seed=5), story(*subjects), output_dir=tmp_path / "b")
        seeds.append({r.slot: r.seed for r in images.requests})
    assert seeds[0].items() <= seeds[1].items()
    assert len(set(seeds[1].values())) == len(seeds[1]) == 10


PRICED = "replicate:google/nano-banana"


async def test_the_budget_holds_and_the_run_of_the_same_id_goes_on_from_there(draw, tmp_path):
    """One image costs .039 USD: of four sheets' images three can be had, and then nothing."""
    images = FakeImages(name=PRICED, max_references=3)
    chat = FakeChat(name="gpt-5.4-mini")
    chat.takes_call = True
    made = Pipeline(director=chat, critic=chat, image_model=images, scorers=[], num_variations=2,
                    max_enhancement_iterations=0, budget_usd=0.12,
                    journal=Journal(tmp_path / "journal"))
    drawn = await draw(made, story(LAMP, BAY))
    assert len(images.requests) == 3 and all(s.images for s in drawn.subjects)
    with pytest.raises(GenerationFailed) as raised:
        await made.run(drawn, output_dir=tmp_path / "images", generation_id="x")
    assert len(images.requests) == 3
    assert any(isinstance(cause, BudgetSpent) for cause in raised.value.causes)


async def test_progress_tells_each_sheet_twice_and_ends_at_100(draw, caplog):
    caplog.set_level(logging.INFO, "refimg.pipeline")
    seen = []
    fails = FakeImages(lambda r, n: RuntimeError("x") if "_Mara" in r.slot else picture(n),
                       max_references=3)
    await draw(pipeline(fails), story(MARA, LAMP), on_progress=seen.append)
    assert sorted((p.scene, p.stage) for p in seen) == [
        (n, stage) for n in (1, 2, 3, 4) for stage in ("generate", "score")]
    percents = [p.percent for p in seen]
    assert percents == sorted(percents) and percents[-1] == 100 and seen[0].scenes == 4
    assert "(sheet 1 of 4, 0 %)" in caplog.text


@pytest.mark.parametrize("how", ["check", "task"])
async def test_it_stops_as_a_run_does_and_what_arrived_is_on_disk(draw, tmp_path, how):
    async def slow(request):
        images.requests.append(request)
        if request.slot.endswith("v1/a1"):
            return await plain(request)
        await asyncio.sleep(30)

    images = FakeImages(max_references=3)
    plain, images.generate = images.generate, slow
    began = time.monotonic()
    if how == "check":
        with pytest.raises(GenerationCancelled):
            await draw(pipeline(images), story(LAMP, BAY),
                       cancellation_check=lambda: len(images.requests) > 3)
    else:
        task = asyncio.create_task(draw(pipeline(images), story(LAMP, BAY)))
        while len(images.requests) < 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert time.monotonic() - began < 15
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["x_subject_North-Bay_v1.png", "x_subject_The-lamp_v1.png"]


async def test_no_more_sheets_at_once_than_the_settings_say(draw):
    busy = most = 0

    async def count(request):
        nonlocal busy, most
        busy, most = busy + 1, max(most, busy + 1)
        await asyncio.sleep(0.01)
        busy -= 1
        return await plain(request)

    images = FakeImages(max_references=3)
    plain, images.generate = images.generate, count
    await draw(pipeline(images, max_concurrency=2), story(*(
        Subject(name=f"Number {n}") for n in range(6))))
    assert most == 4


@pytest.mark.parametrize("over", [
    {"generation_id": "../x"}, {"output_dir": 3}, {"output_dir": "/dev/null/x"}])
async def test_what_is_wrong_is_said_before_anything_is_paid(draw, over):
    images = FakeImages(max_references=3)
    with pytest.raises(ValueError, match="must be"):
        await draw(pipeline(images), story(MARA), **over)
    assert not images.requests


@pytest.mark.parametrize("broken", ["missing", "text", "look"])
async def test_an_image_that_cannot_be_read_is_an_error_before_anything_is_paid(
    draw, tmp_path, broken
):
    (path := tmp_path / "mara.png").write_text("no image")
    gone = tmp_path / "gone.png"
    more = {"missing": {"images": [gone]}, "text": {"images": [path]},
            "look": {"look_images": {"wet": path}}}[broken]
    images = FakeImages(max_references=3)
    with pytest.raises(ValueError, match="images of Mara must be an image file, got"):
        await draw(pipeline(images), story(MARA.model_copy(update=more), LAMP))
    assert not images.requests


@pytest.mark.parametrize(("key", "goes"), [
    ("style", True), ("Art Style", True), ("color_palette", True), ("colour palette", True),
    ("medium", True), ("lighting", False), ("mood", False), ("composition", False),
    ("subject_description", False), ("lifestyle", False), ("era", False)])
def test_of_the_markers_only_those_of_style_go_into_a_sheet(key, goes):
    alone = sheet_story(story(MARA, LAMP, consistency_markers={key: "as told"}), LAMP)
    assert bool(alone.consistency_markers) == goes and len(alone.subjects) == 1


NAMES = ["Mara", "mara lind", "Mara-Lind", "Mara_Lind", "Mara  Lind!", "Zoe", "Zoë", "真央", "真夫",
         "🦊", "..", "CON", "x", "a" * 300, "a" * 301, "Мара", "مارا", "v1", "Mara v1", "Mara.v1"]


def test_no_two_names_share_a_file_name_and_every_one_is_safe():
    stems = [sheet_stem("g" * 64, name, look) for name in NAMES for look in [None, *NAMES]]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    assert [check_stem(stem) for stem in stems] == stems
    assert sheet_stem("x", "Mara", "torn coat") == "x_subject_Mara_torn-coat"


async def test_names_in_every_script_are_drawn(draw):
    told = story(Subject(name="真央", looks={"雨": "濡れた"}), Subject(name="Мара"),
                 Subject(name="🦊"))
    drawn = await draw(pipeline(), told)
    found = [path for subject in drawn.subjects
             for path in (*subject.images, *subject.look_images.values())]
    assert len({*found}) == 4 and all(path.is_file() for path in found)


async def test_a_run_sends_the_sheets_that_were_drawn(draw, tmp_path):
    images = FakeImages(max_references=3)
    made = pipeline(images, max_enhancement_iterations=0, chain="none")
    told = story(MARA).model_copy(update={"scenes": [Scene(prompt="Mara", subjects=["Mara/wet"])]})
    drawn = await draw(made, told)
    result = await made.run(drawn, output_dir=tmp_path / "images", generation_id="x")
    assert [sent.path for sent in result.scenes[0].sent_references] == drawn.subjects[0].sheets(
        "wet")


@pytest.mark.parametrize(("subject", "stated"), [
    (Subject(name="Mara", description="a lighthouse keeper in a yellow coat"),
     {"subject": "lighthouse keeper", "colour": "yellow", "framing": "medium"}),
    (Subject(name="Skiff", description="a red boat", kind="object"),
     {"subject": "boat", "colour": "red", "framing": "medium"}),
    (Subject(name="Bay", description="a rocky coast", kind="place"),
     {"setting": "coast", "framing": "wide"})])
async def test_the_sandbox_draws_what_the_sheet_asks_for(draw, subject, stated):
    made = pipeline(Painter(width=64, error=0), num_variations=1, seed=1)
    told = story(subject, consistency_markers={"style": "watercolour"})
    path: Path = (await draw(made, told)).subjects[0].images[0]
    stated = stated | {"style": "watercolour", "time": "day"}
    shown = truth(path)["attributes"]
    assert {name: shown[name] for name in stated} == stated
    assert read_prompt(f"{subject.name}: {subject.description}").items() <= shown.items()


def noise(seed: int) -> bytes:
    """An image full of details, whose first pixel is red."""
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 16, 3), np.uint8)
    image, out = Image.fromarray(pixels).resize((160, 90), Image.Resampling.BICUBIC), io.BytesIO()
    image.putpixel((0, 0), (255 - 10 * seed, 0, 0))
    image.save(out, "PNG")
    return out.getvalue()


async def test_an_edit_that_repeats_its_sheet_is_no_copy_to_be_avoided(draw):
    images = FakeImages(lambda request, n: noise(0 if "/v1/" in request.slot else 5),
                        max_references=3)
    drawn = await draw(pipeline(images, [FakeScorer()]), story(MARA))
    assert {path.stem[-3:] for path in drawn.subjects[0].look_images.values()} == {"_v1"}
