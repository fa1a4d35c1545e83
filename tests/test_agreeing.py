"""Images that agree, through a whole run: what goes along with a request, and what is compared."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from refimg import GenerationFailed, Pipeline, Scene, Story, Subject
from refimg.pipeline import rescore
from refimg.score import RawScore
from tests.fakes import FakeImages, FakeScorer, critic, director, picture


class Likeness(FakeScorer):
    """A scorer of consistency: how near the red of an image is to that of its references."""

    def __init__(self):
        super().__init__("consistency")

    def to_100(self, raw):
        return raw

    def score(self, batch):
        self.batches.append(batch)
        if not batch.references:
            return [RawScore(None, "no reference to agree with", False)] * len(batch.images)
        reds = [image.getpixel((0, 0))[0] for image in batch.references]
        far = [sum(abs(image.getpixel((0, 0))[0] - red) for red in reds) for image in batch.images]
        return [RawScore(100 - distance / len(reds) / 3) for distance in far]


def at(request) -> tuple[int, int]:
    """Scene and variation of a request."""
    return tuple(map(int, re.search(r"_scene_(\d+)/v(\d+)/", request.slot).groups()))


def shades(table: dict[int, tuple[int, int]], **settings) -> FakeImages:
    """An image model that draws the two reds of each scene, or fails where there are none."""
    def draw(request, number):
        scene, variation = at(request)
        found = table.get(scene, (10, 20))
        return picture(found[variation - 1]) if found else RuntimeError("no image")

    return FakeImages(draw, **{"max_references": 14} | settings)


def pipeline(images: FakeImages, scorers=(), **settings) -> Pipeline:
    return Pipeline(director=director(), critic=critic(), image_model=images, scorers=list(scorers),
                    **{"num_variations": 2, "max_enhancement_iterations": 0} | settings)


def reds(batch) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in batch.references]


@pytest.fixture
def run(tmp_path):
    async def go(made: Pipeline, story: Story, **over):
        async with asyncio.timeout(30):
            return await made.run(story, **{"generation_id": "x",
                                            "output_dir": tmp_path / "images"} | over)

    return go


def sheet(tmp_path: Path, name: str, red: int) -> Path:
    path = tmp_path / name
    path.write_bytes(picture(red))
    return path


def three(**more) -> Story:
    return Story(scenes=[Scene(prompt=f"a keeper, view {n}") for n in "abc"], **more)


async def test_consistency_is_measured_against_the_anchor_and_selects(run):
    images, likeness = shades({1: (200, 90), 2: (90, 180), 3: (60, 190)}), Likeness()
    result = await run(pipeline(images, [FakeScorer(), likeness], weights={
        "pickscore": 0.25, "consistency": 0.75}, chain="anchored"), three())
    assert [s.variations.index(next(v for v in s.variations if v.selected)) for s in result.scenes
            ] == [0, 1, 1]
    assert {tuple(reds(batch)) for batch in likeness.batches} == {(), (200,)}
    first, second, _ = result.scenes
    assert all(v.scores.consistency is None and v.scores.overall for v in first.variations)
    assert "no reference" in first.variations[0].scores.notes["consistency"]
    assert [round(v.scores.consistency) for v in second.variations] == [63, 93]


@pytest.mark.parametrize("chain", ["none", "previous"])
async def test_the_anchor_is_waited_for_only_where_a_scorer_compares(run, chain):
    """Without a chain scenes are drawn at once; the scorer of consistency is worth the wait."""
    for scorers in ([], [Likeness()]):
        images = shades({n: (50 * n, 10) for n in (1, 2, 3)})
        await run(pipeline(images, scorers, chain=chain), three())
        order = [at(request)[0] for request in images.requests]
        assert order[:2] == [1, 1]
        if scorers and chain == "none":
            assert all(reds(batch) in ([], [50], [10]) for batch in scorers[0].batches)
            assert len({tuple(reds(b)) for b in scorers[0].batches}) == 2


async def test_a_scene_without_the_subject_neither_breaks_the_chain_nor_is_compared(run):
    story = Story(scenes=[Scene(prompt="a keeper, view a"),
                          Scene(prompt="an empty sea", subject_present=False),
                          Scene(prompt="a keeper, view c")])
    images, likeness = shades({1: (100, 0), 2: (150, 0), 3: (200, 0)}), Likeness()
    result = await run(pipeline(images, [FakeScorer(), likeness]), story)
    sent = {at(r)[0]: r for r in images.requests}
    assert sent[3].references == (result.references[0],) == sent[2].references
    assert [v.scores.consistency for v in result.scenes[1].variations] == [None, None]
    assert "keep only the style and the medium; what is shown, place" in sent[2].prompt
    assert "keep the look of the subject, the style and the medium" in sent[3].prompt


async def test_subjects_go_along_are_described_and_numbered(run, tmp_path):
    mara = Subject(name="Mara", description="a tall keeper", looks={"torn coat": "in a torn coat"},
                   images=[sheet(tmp_path, "mara.png", 70)])
    lamp = Subject(name="Lumen", kind="object", description="a brass lamp")
    story = Story(subjects=[mara, lamp], scenes=[
        Scene(prompt="mara on a stair"), Scene(prompt="a pier", subjects=["Mara/torn coat"]),
        Scene(prompt="the LUMEN's light"), Scene(prompt="rain", subjects=[])])
    images, likeness = shades({}), Likeness()
    result = await run(pipeline(images, [FakeScorer(), likeness], chain="anchored"), story)
    sent = {at(r)[0]: r for r in images.requests}
    own, refs = mara.images[0], result.references
    assert sent[1].references == (own,) and "Mara: a tall keeper." in sent[1].prompt
    assert "The reference image shows Mara: keep the look of Mara" in sent[1].prompt
    assert sent[2].references == (refs[0], own)
    assert "Mara: a tall keeper, in a torn coat." in sent[2].prompt
    assert "Image 1 is the scene before" in sent[2].prompt
    assert "Image 2 shows Mara" in sent[2].prompt
    assert "Lumen: a brass lamp." in sent[3].prompt and "tall" not in sent[3].prompt
    assert "Lumen" not in sent[4].prompt and "Mara" not in sent[4].prompt
    assert reds(likeness.batches[0]) == [70]
    assert [v.image.references for v in result.scenes[1].variations] == [sent[2].references] * 2


@pytest.mark.parametrize("most, model, count", [(3, 14, 3), (1, 14, 1), (3, 2, 2), (0, 14, 0)])
async def test_what_does_not_fit_is_left_out_and_named(run, tmp_path, most, model, count):
    names = ("Ann", "Bo", "Cy")
    cast = [Subject(name=n, images=[sheet(tmp_path, f"{n}.png", 9 * k)])
            for k, n in enumerate(names, 2)]
    story = Story(subjects=cast, scenes=[Scene(prompt="Ann, Bo and Cy")] * 2)
    images = shades({}, max_references=model)
    result = await run(pipeline(images, max_references=most), story)
    assert {len(r.references) for r in images.requests if at(r)[0] == 2} == {count}
    told = [w for w in result.scenes[1].warnings if "left out" in w]
    assert len(told) == 1 and told[0].count(".png") == 4 - count - (count == 0)


@pytest.mark.parametrize("broken", ["missing", "text"])
async def test_a_subjects_image_that_cannot_be_read_is_an_error_before_anything_is_paid(
    run, tmp_path, broken
):
    path = tmp_path / "mara.png"
    if broken == "text":
        path.write_text("no image")
    images = shades({})
    story = three(subjects=[Subject(name="Mara", images=[path])])
    with pytest.raises(ValueError, match=r"images of Mara must be an image file, got .*mara\.png"):
        await run(pipeline(images), story)
    assert not images.requests and not (tmp_path / "images").exists()


async def test_an_image_to_compare_with_that_is_gone_costs_no_scene(run, tmp_path, caplog):
    """Somebody clears up between two scenes; nothing that can be drawn is lost by it."""
    def draw(request, number):
        if at(request)[0] == 1:
            return picture(90)
        for path in (tmp_path / "images").glob("x_scene_01_*"):
            path.unlink()
        return picture(180)

    images, likeness = FakeImages(draw, max_references=0), Likeness()
    story = Story(scenes=[Scene(prompt="a keeper, view a"), Scene(prompt="a keeper, view b"),
                          Scene(prompt="a keeper, view c")])
    made = pipeline(images, [FakeScorer(), likeness], chain="none", max_concurrency=1)
    result = await run(made, story)
    assert [s.reference_from for s in result.scenes] == ["ranked"] * 3
    assert "not compared with an image that is gone" in caplog.text


async def test_a_scene_goes_on_without_its_anchor_and_says_so(run):
    result = await run(pipeline(shades({1: ()}), chain="anchored"), three())
    assert [s.reference_from for s in result.scenes] == ["carried", "first", "first"]
    assert "without its anchor, since scene 1 has no image" in " ".join(result.scenes[1].warnings)
    with pytest.raises(GenerationFailed):
        await run(pipeline(shades({1: (), 2: (), 3: ()}), chain="anchored"), three())


async def test_a_cutaway_follows_what_it_is_told_to(run):
    story = Story(scenes=[Scene(prompt="a"), Scene(prompt="b", follows="none"),
                          Scene(prompt="c"), Scene(prompt="d", follows=1)])
    images = shades({})
    result = await run(pipeline(images, chain="previous"), story)
    sent = {at(r)[0]: r.references for r in images.requests}
    refs = result.references
    assert sent == {1: (), 2: (), 3: (refs[1],), 4: (refs[0],)}


async def test_a_rerun_draws_what_was_drawn_from_the_scene_and_nothing_else(run):
    story = Story(scenes=[Scene(prompt="a"), Scene(prompt="b", follows="none"),
                          Scene(prompt="c"), Scene(prompt="d", follows=1)])
    images = shades({})
    made = pipeline(images)
    result = await run(made, story)
    images.requests.clear()
    again = await made.rerun(result, 2)
    assert {at(r)[0] for r in images.requests} == {2, 3}
    assert again.scenes[3] == result.scenes[3]


async def test_rescoring_compares_with_the_same_images_as_the_run(run):
    images, likeness = shades({1: (200, 90), 2: (90, 180), 3: (60, 190)}), Likeness()
    result = await run(pipeline(images, [FakeScorer(), likeness], chain="anchored"), three())
    again = await rescore(result, [FakeScorer(), Likeness()], reselect=False)
    assert [[v.scores.consistency for v in s.variations] for s in again.scenes] == [
        [v.scores.consistency for v in s.variations] for s in result.scenes]
    weighed = await rescore(result, weights={"pickscore": 0, "consistency": 1})
    assert weighed.scenes[0].variations[0].scores.overall is None
    assert weighed.scenes[1].variations[1].selected
