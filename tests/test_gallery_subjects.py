"""The subjects in the gallery: another variation, a file of one's own, and what is stale then."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from refimg import Pipeline, Scene, Story, StoryResult, Subject
from refimg.engine.sheets import replace_image
from refimg.gallery import Gallery
from refimg.storage.files import read_image
from refimg.view.tables import history_table
from tests.fakes import FakeImages, critic, director, picture

MARA = Subject(name="Mara", looks={"wet": "soaked"})


def told() -> Story:
    prompts = ("Mara", "the sea", "Mara", "a lamp")
    subjects = (["Mara"], [], ["Mara/wet"], ["Lamp"])
    return Story(subjects=[MARA, Subject(name="Lamp")], scenes=[
        Scene(prompt=p, subjects=s, follows="none" if n else None)
        for n, (p, s) in enumerate(zip(prompts, subjects, strict=True))])


def pipeline() -> Pipeline:
    return Pipeline(director=director(), critic=critic(), scorers=[], num_variations=2,
                    image_model=FakeImages(max_references=3), max_enhancement_iterations=0)


@pytest.fixture
async def drawn(tmp_path) -> StoryResult:
    place = {"output_dir": tmp_path / "images", "generation_id": "x"}
    async with asyncio.timeout(20):
        story = await pipeline().draw_subjects(told(), **place)
        return await pipeline().run(story, **place)


def stale(result: StoryResult) -> list[bool]:
    return [scene.stale is not None for scene in result.scenes]


def own(tmp_path: Path, data: bytes | None = None) -> Path:
    (path := tmp_path / "own.png").write_bytes(data or picture(200))
    return path


@pytest.mark.parametrize(("subject", "look", "scenes"), [
    ("Mara", None, [True, False, True, False]), ("MARA", "Wet", [False, False, True, False]),
    ("lamp", None, [False, False, False, True])])
def test_the_scenes_that_show_it_are_stale_and_no_others(drawn, tmp_path, subject, look, scenes):
    new = replace_image(drawn, subject, own(tmp_path), look, reason="nearer to the book")
    assert stale(new) == scenes and stale(drawn) == [False] * 4
    one = next(s for s in new.story.subjects if s.name.lower() == subject.lower())
    assert (one.look_images["wet"] if look else one.images[0]) == tmp_path / "own.png"
    event = new.history[-1]
    assert event.kind == "edit" and event.reason == "nearer to the book"
    assert event.after["image"] == "own.png" and event.before["image"].startswith("x_subject_")
    assert f"another image of {one.name}" in str(history_table(new))
    again = replace_image(new, subject, own(tmp_path), look)
    assert [s.stale for s in again.scenes] == [s.stale for s in new.scenes]


async def test_what_was_drawn_from_such_a_scene_is_stale_too(tmp_path):
    story = Story(scenes=[Scene(prompt="Mara"), Scene(prompt="the sea", follows=1),
                          Scene(prompt="a lamp", follows="none")],
                  subjects=[Subject(name="Mara", images=[own(tmp_path)])])
    result = await pipeline().run(story, output_dir=tmp_path / "images")
    assert stale(replace_image(result, "Mara", own(tmp_path))) == [True, True, False]


async def test_a_scene_drawn_again_is_sent_the_new_image_and_is_no_longer_stale(drawn, tmp_path):
    new, made = replace_image(drawn, "Mara", own(tmp_path)), pipeline()
    again = await made.rerun(new, 1)
    assert {r.references for r in made.image_model.requests} == {(tmp_path / "own.png",)}
    assert stale(again) == [False, False, True, False]


def test_what_is_wrong_is_a_value_error(drawn, tmp_path):
    for image in (tmp_path / "gone.png", own(tmp_path, b"no image")):
        with pytest.raises(ValueError, match=image.name):
            replace_image(drawn, "Mara", image)
    with pytest.raises(ValueError, match="subject must be a known name, such as 'Mara', got"):
        replace_image(drawn, "Mira", own(tmp_path))
    with pytest.raises(ValueError, match="look of 'Mara' must be a known name"):
        replace_image(drawn, "Mara", own(tmp_path), "dry")
    with pytest.raises(ValueError, match="does not hold its story"):
        replace_image(drawn.model_copy(update={"story": None}), "Mara", own(tmp_path))


def card(gallery: Gallery, number: int):
    """Card of the subjects and looks, in their order: the buttons to use, and the upload."""
    bundle = gallery._repr_mimebundle_()
    assert "text/html" in bundle
    box = gallery.widgets.body.children[0].children[number]
    _, others, upload = box.children
    return [other.children[1] for other in others.children], upload


def sent(name: str, data: bytes) -> tuple[dict, ...]:
    """What the field holds once a browser has sent a file."""
    now = datetime.now(UTC)
    return ({"name": name, "type": "image/png", "size": len(data), "content": memoryview(data),
             "last_modified": now},)


async def test_a_click_takes_another_variation_and_the_file_says_so(drawn, tmp_path):
    gallery = Gallery(pipeline(), drawn)
    (use,), _ = card(gallery, 0)
    assert use.description == "use v2"
    use.click()
    assert gallery.message == "" and stale(gallery.drawn) == [True, False, True, False]
    saved = StoryResult.load(gallery.path)
    assert saved.story.subjects[0].images == [tmp_path / "images" / "x_subject_Mara_v2.png"]
    (use,), _ = card(gallery, 0)
    assert use.description == "use v1"


async def test_a_file_of_ones_own_is_saved_beside_the_others_and_used(drawn, tmp_path):
    gallery = Gallery(pipeline(), drawn)
    _, upload = card(gallery, 1)
    upload.value = sent("../../x.png", picture(200))
    path = gallery.drawn.story.subjects[0].look_images["wet"]
    assert path == tmp_path / "images" / "x_subject_Mara_wet_v3.png"
    assert read_image(path).getpixel((0, 0))[0] == 200
    assert [p.name for p in gallery.sheets("Mara", "wet")] == [
        f"x_subject_Mara_wet_v{n}.png" for n in (1, 2, 3)]
    before = gallery.path.read_bytes()
    _, upload = card(gallery, 0)
    upload.value = sent("x.png", b"no image")
    assert "ValueError" in gallery.message and gallery.path.read_bytes() == before
    assert len(gallery.sheets("Mara")) == 2


async def test_while_images_are_drawn_nothing_is_taken(drawn):
    gallery = Gallery(pipeline(), drawn)
    buttons, upload = card(gallery, 0)
    gallery.begin(lambda: asyncio.sleep(0.2), "Drawing …")
    await asyncio.sleep(0)
    assert all(b.disabled for b in buttons) and upload.disabled
    with pytest.raises(ValueError, match="images are being drawn"):
        gallery.replace_image("Mara", gallery.sheets("Mara")[1])
    await gallery.task
    assert not upload.disabled


async def test_it_opens_again_with_the_story_it_began_with(drawn, tmp_path):
    story = drawn.story
    gallery = Gallery(pipeline(), drawn)
    gallery.replace_image("Mara", own(tmp_path))
    for source in (story, drawn, gallery.path):
        again = Gallery(pipeline(), source, path=gallery.path)
        assert again.drawn.story.subjects[0].images == [tmp_path / "own.png"]
    other = Story(scenes=story.scenes[1:2], subjects=[Subject(name="Kit")])
    with pytest.raises(ValueError, match="the result of another story"):
        Gallery(pipeline(), other, path=gallery.path)


def test_a_hostile_name_stays_text(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    story = Story(scenes=[Scene(prompt="a")], subjects=[Subject(name=name, looks={name: ""})])
    page = Gallery(pipeline(), story).page
    assert "<img src=x" not in str(page.subject(story.subjects[0], name))
    assert "no image" in str(page.subject(story.subjects[0]))
