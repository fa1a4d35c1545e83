"""Edits in the gallery: what failed is suggested; what a person writes is drawn and paid for."""

from __future__ import annotations

import asyncio

import pytest

from refimg.enhance import Reply
from refimg.gallery import Gallery
from refimg.pipeline import Pipeline, StoryResult, choose
from refimg.view.gallery_edits import EditForm, suggest_edit

from .fakes import FakeChat, FakeImages, picture
from .test_gallery import finished, pipeline, press, shown, story
from .test_seen_repairs import checklist, seen
from .test_view import FEW, read

WRITTEN = "Paint the fox red."


@pytest.fixture
def p() -> Pipeline:
    made = pipeline(max_enhancement_iterations=0, repair_variations=2, plan=False)
    made.director = FakeChat([Reply(text=WRITTEN, cost=0.5)])
    return made


def inspected(result: StoryResult, *verdicts: str, reason: str = "it is {}") -> StoryResult:
    """The result, with these answers about every image."""
    scenes = [scene.model_copy(update={
        "checklist": checklist(),
        "variations": [v.model_copy(update={"inspection": seen(*verdicts, reason=reason)})
                       for v in scene.variations]}) for scene in result.scenes]
    return result.model_copy(update={"scenes": scenes, "cost": 1.0})


@pytest.fixture
async def result(p, tmp_path) -> StoryResult:
    drawn = await p.run(story(), generation_id="run", output_dir=tmp_path / "images")
    p.image_model.requests.clear()
    return inspected(drawn, "yes", "no", "yes", "yes")


def form(gallery: Gallery) -> EditForm:
    gallery._repr_mimebundle_()
    return gallery.widgets.edit


async def test_a_persons_words_are_drawn_and_the_best_edit_is_selected(p, result, tmp_path):
    gallery = Gallery(p, result)
    form(gallery).image.value = 3
    form(gallery).text.value = "Make it a winter day."
    p.image_model.script = lambda request, number: picture(250)
    press(gallery, "Edit v3")
    await finished(gallery)
    kept = StoryResult.load(tmp_path / "images" / "run.json")
    assert kept.history[-1].reason == "Make it a winter day." and kept.history[-1].variation == 3
    assert [(v.edits, v.instruction) for v in kept.scenes[0].variations[3:]] == [
        (3, "Make it a winter day.")] * 2
    assert kept.scenes[0].reference_from == "repaired" and kept.scenes[1].stale
    assert "Make it a winter day." in p.image_model.requests[0].prompt
    assert "v4 · edit of v3" in shown(gallery)
    assert "asked for: Make it a winter day." in shown(gallery)
    assert len(gallery.widgets.cards) == 5


async def test_what_failed_is_shown_and_suggested_and_may_be_changed(p, result):
    gallery = Gallery(p, result)
    assert "Is the fox red? no, it is 1" in read(form(gallery).failed.value).words
    press(gallery, "Write it from what failed")
    await finished(gallery)
    assert form(gallery).text.value == WRITTEN and not p.image_model.requests, "nothing is paid yet"
    assert gallery.result.cost == 1.5 and StoryResult.load(gallery.path).cost == 1.5
    form(gallery).text.value = f"{WRITTEN} And its tail white."
    press(gallery, form(gallery).draw.description)
    await finished(gallery)
    assert all("And its tail white." in r.prompt for r in p.image_model.requests)


async def test_the_director_is_asked_about_what_failed_alone(p, result):
    assert await suggest_edit(Gallery(p, result), 1, 1) == WRITTEN
    (messages, _) = p.director.calls[-1]
    told = messages[-1].content
    assert "Is the fox red? – no: it is 1" in told and "Is it night?" not in told


async def test_a_call_of_unknown_price_makes_the_cost_unknown(p, result):
    p.director = FakeChat([Reply(text=WRITTEN)])
    gallery = Gallery(p, result)
    await suggest_edit(gallery, 1, 1)
    assert gallery.result.cost is None


async def test_a_director_that_fails_is_told_in_words(p, result):
    p.director = FakeChat([RuntimeError("<b>no</b> credit")])
    gallery = Gallery(p, result)
    press(gallery, "Write it from what failed")
    await finished(gallery)
    assert "no</b> credit" in shown(gallery) and form(gallery).text.value == ""


@pytest.mark.parametrize("verdicts", [("yes",) * 4, ("yes", "unsure", "yes", "yes"), ()])
async def test_nothing_is_suggested_where_nothing_failed_or_nobody_looked(p, result, verdicts):
    gallery = Gallery(p, inspected(result, *verdicts))
    assert form(gallery).suggest.layout.display == "none"
    with pytest.raises(ValueError, match="variation must be one in which a question failed, got 1"):
        await suggest_edit(gallery, 1, 1)


async def test_blind_nobody_is_told_what_failed_or_which_image_is_selected(p, result):
    gallery = Gallery(p, result, blind=True)
    assert form(gallery).suggest.layout.display == "none" and form(gallery).failed.value == ""
    assert form(gallery).image.value == 1 and "fox" not in shown(gallery)


async def test_a_click_on_blind_takes_it_away(p, result):
    gallery = Gallery(p, result)
    assert form(gallery).suggest.layout.display is None
    gallery.widgets.blind.value = True
    assert form(gallery).suggest.layout.display == "none" and form(gallery).failed.value == ""


async def test_later_scenes_are_drawn_again_only_where_the_box_is_ticked(p, result):
    gallery = Gallery(p, result)
    assert "Edits: 2 images" in read(form(gallery).price.value).words
    p.image_model.script = lambda request, number: picture(250)
    form(gallery).later.value = True
    assert "Then scenes 2, 3: 6 images" in read(form(gallery).price.value).words
    form(gallery).text.value = "Winter."
    press(gallery, form(gallery).draw.description)
    await finished(gallery)
    assert len(p.image_model.requests) == 2 + 6 and not any(s.stale for s in gallery.result.scenes)


async def test_words_for_one_image_do_not_go_to_another(p, result):
    gallery = Gallery(p, result)
    form(gallery).image.value = 1
    form(gallery).text.value = "for v1"
    form(gallery).image.value = 2
    assert form(gallery).text.value == ""
    gallery.widgets.scene.value = 2
    assert form(gallery).text.value == ""
    gallery.widgets.scene.value = 1
    form(gallery).image.value = 1
    assert form(gallery).text.value == "for v1"


async def test_a_suggestion_that_comes_late_waits_for_its_image(p, result):
    p.director = FakeChat([Reply(text=WRITTEN, cost=0.0)], seconds=0.2)
    gallery = Gallery(p, result)
    asked = form(gallery).image.value
    press(gallery, "Write it from what failed")
    await asyncio.sleep(0.05)
    gallery.widgets.scene.value = 2
    await finished(gallery)
    assert form(gallery).text.value == ""
    gallery.widgets.scene.value = 1
    form(gallery).image.value = asked
    assert form(gallery).text.value == WRITTEN


@pytest.mark.parametrize("text", ["", " \n"])
async def test_blank_words_are_refused_in_words(p, result, text):
    gallery = Gallery(p, result)
    form(gallery).text.value = text
    press(gallery, form(gallery).draw.description)
    await finished(gallery)
    assert "instruction must be a text that is not blank" in shown(gallery)
    assert not p.image_model.requests


async def test_a_model_that_takes_no_reference_is_told_in_words(p, result):
    p.image_model.max_references = 0
    gallery = Gallery(p, result)
    form(gallery).text.value = "Winter."
    press(gallery, form(gallery).draw.description)
    await finished(gallery)
    assert "takes a reference image" in shown(gallery)


async def test_while_it_is_drawn_buttons_are_off_and_stop_ends_it(p, result):
    p.image_model = FakeImages(seconds=30)
    gallery = Gallery(p, result)
    form(gallery).text.value = "Winter."
    press(gallery, form(gallery).draw.description)
    await asyncio.sleep(0.3)
    assert form(gallery).draw.disabled and form(gallery).suggest.disabled
    press(gallery, "Stop")
    await finished(gallery)
    assert "Stopped" in shown(gallery) and not form(gallery).draw.disabled
    assert len(gallery.result.scenes[0].variations) == 3


async def test_the_cell_of_the_result_finds_its_edits(p, result):
    gallery = Gallery(p, result)
    await gallery.edit(1, "Winter.")
    again = Gallery(p, result)
    assert again.result == gallery.result
    other = result.scenes[0].model_copy(update={"variations": result.scenes[0].variations[::-1]})
    with pytest.raises(ValueError, match="path must be a new file"):
        Gallery(p, result.model_copy(update={"scenes": [other, *result.scenes[1:]]}))


async def test_after_another_gallery_no_edit_is_drawn(p, result):
    first, second = Gallery(p, result), Gallery(p, result)
    first.keep(choose(result, 1, 2, "better"))
    with pytest.raises(ValueError, match="changed by another gallery"):
        await second.edit(1, "Winter.")
    with pytest.raises(ValueError, match="changed by another gallery"):
        await suggest_edit(second, 1, 1)
    assert not p.image_model.requests and not p.director.calls


async def test_without_the_story_there_is_no_form(p, result):
    gallery = Gallery(p, result.model_copy(update={"story": None}))
    assert form(gallery).box.layout.display == "none"
    assert "does not hold its story" in gallery.price_edit(1)


@pytest.mark.parametrize("text", FEW)
async def test_no_text_becomes_markup(p, result, text):
    gallery = Gallery(p, inspected(result, "no", "no", "no", "no", reason=text))
    form(gallery).text.value = text
    assert shown(gallery)
    await gallery.edit(1, f"edit {text}")
    assert shown(gallery)
    assert read(gallery.static()).words
