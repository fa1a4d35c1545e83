"""The gallery: what a person can see, decide and pay for, without a browser."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import ipywidgets
import pytest

from refimg.engine.decisions import vetoes
from refimg.engine.protocols import visible_text
from refimg.enhance import Critique
from refimg.gallery import Gallery, human_agreement, preferences, veto
from refimg.pipeline import Pipeline, Scene, Story, StoryResult, choose, rescore
from refimg.view import report

from .fakes import FakeImages, FakeScorer, critic, director, picture
from .test_view import FEW, read


def pipeline(images=None, **over) -> Pipeline:
    """A pipeline on fakes: a picture's score is its shade, and the second is always the best."""
    shades = (40, 200, 120)
    model = images or FakeImages(lambda request, number: picture(shades[number % 3]))
    settings = {"num_variations": 3, "max_enhancement_iterations": 1, "quality_threshold": 0}
    return Pipeline(director=director(), critic=critic(), image_model=model,
                    scorers=[FakeScorer(), FakeScorer("flat", lambda image, prompt: 10.0)],
                    **settings | over)  # fmt: skip


def story(count: int = 3, **over) -> Story:
    return Story(scenes=[Scene(prompt=f"a keeper, scene {n}") for n in range(1, count + 1)], **over)


@pytest.fixture
def p() -> Pipeline:
    return pipeline()


@pytest.fixture
async def result(p, tmp_path) -> StoryResult:
    return await p.run(story(), generation_id="run", output_dir=tmp_path / "images")


def widgets(box) -> list:
    """All widgets of a gallery that are shown."""
    found = [box]
    for child in getattr(box, "children", ()):
        if child.layout.display != "none":
            found += widgets(child)
    return found


def press(gallery: Gallery, text: str) -> None:
    """Presses the button with that text, as a front end does."""
    gallery._repr_mimebundle_()
    buttons = [w for w in widgets(gallery.widgets.box) if isinstance(w, ipywidgets.Button)]
    [found] = [b for b in buttons if b.description == text]
    assert not found.disabled
    found.click()


def shown(gallery: Gallery) -> str:
    """The words of all HTML widgets, after what must hold for each."""
    gallery._repr_mimebundle_()
    html = [w.value for w in widgets(gallery.widgets.box) if isinstance(w, ipywidgets.HTML)]
    return " ".join(read(source).words for source in html if source)


async def finished(gallery: Gallery) -> None:
    """Returns when what was begun has ended."""
    await asyncio.wait_for(gallery.task, 20)


# decisions


def loser(result: StoryResult, scene: int = 1) -> int:
    return next(k for k, v in enumerate(result.scenes[scene - 1].variations, 1) if v.rank == 3)


def reasons(result) -> list[str]:
    """Why each choice was made, in order."""
    return [event.reason for event in result.history if event.kind == "choose"]


async def test_one_click_overrules_and_a_click_before_it_gives_the_reason(p, result, tmp_path):
    gallery, worst = Gallery(p, result), loser(result)
    gallery._repr_mimebundle_()
    gallery.widgets.reasons.value = "better made"
    press(gallery, f"choose v{worst}")
    kept = StoryResult.load(tmp_path / "images" / "run.json")
    assert kept.scenes[0].reference == result.scenes[0].variations[worst - 1].image.image_path
    (event,) = kept.history
    assert (event.kind, event.scene, event.variation, event.reason) == (
        "choose", 1, worst, "better made")
    assert event.after == {"variation": worst, "blind": False} and kept.scenes[1].stale
    assert "better made" in shown(gallery)
    assert gallery.widgets.why.value == "" and gallery.widgets.reasons.value is None


async def test_a_restart_loses_no_decision(p, result):
    first = Gallery(p, result)
    first.choose(1, loser(result), "why not")
    first.veto(2, 1, "blurred")
    second = Gallery(p, first.path)
    assert second.result == first.result
    assert preferences(second.result).equals(preferences(first.result))
    assert "blurred" in shown(second)
    second.scene = 2
    assert "vetoed: <bdi>blurred" in str(second.static())


async def test_running_the_cell_again_finds_what_was_decided_and_drawn(p, result):
    Gallery(p, result).choose(1, loser(result), "why not")
    again = Gallery(p, result)
    assert reasons(again.result) == ["why not"]
    await again.rerun(3)
    again.veto(2, 1, "blurred")
    third = Gallery(p, result)
    assert third.result == again.result and "blurred" in shown(third)


async def test_a_result_and_a_file_that_went_apart_are_not_chosen_between(p, result, tmp_path):
    first = Gallery(p, result)
    first.choose(1, loser(result), "theirs")
    before = first.path.read_bytes()
    for own in (choose(result, 2, 1, "mine"), veto(result, 2, 1, "mine")):
        with pytest.raises(ValueError, match=r"path must be a new file, got .*run\.json"):
            Gallery(p, own)
        assert Gallery(p, own, path=tmp_path / "own.json").result == own
    assert first.path.read_bytes() == before


async def test_a_result_that_goes_on_from_the_file_is_shown(p, result):
    first = Gallery(p, result)
    first.choose(1, loser(result), "why not")
    more = veto(choose(first.result, 2, 1, "more"), 1, 1, "no")
    drawn = await p.rerun(first.result, 2)
    for own in (more, drawn):
        assert Gallery(p, own).result == own


async def test_pictures_drawn_anew_elsewhere_do_not_take_decisions_away(p, result, tmp_path):
    first = Gallery(p, result)
    first.choose(3, loser(result, 3), "the old one")
    drawn = await p.rerun(first.result, 3)
    assert preferences(drawn).equals(preferences(first.result))
    assert Gallery(p, drawn).result == drawn
    forgetful = drawn.model_copy(update={"history": [
        event.model_copy(update={"before": {}}) for event in drawn.history]})
    with pytest.raises(ValueError, match="does not go on"):
        Gallery(p, forgetful)
    await first.rerun(3)
    assert Gallery(p, result).result == first.result
    kept = Gallery(p, first.result, path=tmp_path / "other.json")
    kept.veto(1, 1, "more")
    assert Gallery(p, kept.path, path=first.path).result == kept.result


async def test_of_two_galleries_the_second_refuses_and_goes_on_when_shown_again(p, result):
    a, b = Gallery(p, result), Gallery(p, result)
    b._repr_mimebundle_()
    a.choose(1, 2, "A likes it")
    before = a.path.read_bytes()
    b.widgets.cards[2].choose.click()
    assert "show this one again" in b.message and "show this one again" in b.widgets.status.value
    for decide in (b.choose, b.veto):
        with pytest.raises(ValueError, match="changed by another gallery"):
            decide(2, 3, "B likes it")
    with pytest.raises(ValueError, match="changed by another gallery"):
        await b.rerun(1)
    assert a.path.read_bytes() == before and reasons(b.result) == []
    assert "A likes it" in shown(b)
    b.choose(2, 3, "B likes it")
    assert reasons(StoryResult.load(a.path)) == ["A likes it", "B likes it"]


async def test_a_decision_made_while_another_gallery_draws_is_not_overwritten(tmp_path):
    p = pipeline(FakeImages(seconds=0.2))
    result = await p.run(story(2), generation_id="run", output_dir=tmp_path)
    a, b = Gallery(p, result), Gallery(p, result)
    drawing = asyncio.create_task(b.rerun(2))
    await asyncio.sleep(0.05)
    a.choose(1, 2, "meanwhile")
    with pytest.raises(ValueError, match="changed by another gallery"):
        await drawing
    assert StoryResult.load(a.path) == a.result
    assert [b.result.times_rerun(n) for n in (1, 2)] == [0, 1]
    assert "does not go on" in shown(b)


async def test_a_decision_by_code_while_a_scene_is_drawn_is_refused(tmp_path):
    p = pipeline(FakeImages(seconds=0.1))
    gallery = Gallery(p, await p.run(story(1), generation_id="run", output_dir=tmp_path))
    press(gallery, "Draw this scene again")
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="are being drawn"):
        gallery.choose(1, 2, "too early")
    await finished(gallery)
    gallery.choose(1, 2, "now")


async def test_the_cell_of_a_rerun_result_finds_what_was_decided(p, result):
    rerun = await p.rerun(result, 2)
    first = Gallery(p, rerun)
    first.choose(1, 2, "first")
    first.choose(3, 1, "second")
    again = Gallery(p, rerun)
    assert again.result == first.result
    again.choose(2, 2, "third")
    assert reasons(StoryResult.load(first.path)) == ["first", "second", "third"]


async def test_a_rescored_result_is_shown_and_its_cell_may_run_again(p, result):
    result.save(Gallery(p, result).path)
    judges = [FakeScorer("mine", lambda image, prompt: 1.0)]
    new = await rescore(result, scorers=judges)
    gallery = Gallery(p, new)
    assert gallery.result == new
    gallery.choose(1, 2, "why not")
    assert Gallery(p, await rescore(result, scorers=judges)).result == gallery.result
    assert Gallery(p, result).result == gallery.result
    with pytest.raises(ValueError, match="does not go on"):
        Gallery(p, await rescore(result, weights={"pickscore": 1.0, "flat": 3.0}))


async def test_a_file_without_a_rerun_that_the_result_has_is_not_shown(p, result, tmp_path):
    first = Gallery(p, result)
    first.veto(1, 1, "before")
    drawn = await p.rerun(first.result, 3)
    assert Gallery(p, drawn).result == drawn
    other = result.model_copy(update={"scenes": [*reversed(result.scenes)]})
    with pytest.raises(ValueError, match="does not go on"):
        Gallery(p, other)


async def test_lifted_and_repeated_vetoes_are_no_parting(p, result):
    given = veto(result, 1, 1, "a first look")
    first = Gallery(p, given)
    first.veto(1, 1, "a second look")
    assert Gallery(p, given).result == first.result
    first.choose(1, 1, "after all")
    assert Gallery(p, given).result == first.result
    assert vetoes(first.result, 1) == {}


OTHER_STORIES = [
    {"consistency_markers": {"style": "oil"}},
    {"brand": "acme"},
    {"scenes": [Scene(prompt="a keeper, scene 1", consistency_guideline="a red coat")]},
    {"scenes": [Scene(prompt="a keeper, scene 1", subject_present=False)]},
    {"initial_reference_image": Path("first.png")},
]


@pytest.mark.parametrize("over", OTHER_STORIES, ids=lambda over: next(iter(over)))
async def test_a_story_that_differs_in_more_than_prompts_is_another(p, tmp_path, over):
    one = story(1, consistency_markers={"style": "ink", "palette": ("a", "b")})
    settings = {"generation_id": "run", "output_dir": tmp_path}
    await Gallery(p, one, **settings).run()
    assert Gallery(p, one, **settings).result is not None
    with pytest.raises(ValueError, match="another story"):
        Gallery(p, one.model_copy(update=over), **settings)


async def test_a_result_does_not_take_the_place_of_another(p, result, tmp_path):
    other = await p.run(story(), output_dir=tmp_path / "images")
    Gallery(p, other).choose(1, loser(other), "kept")
    with pytest.raises(ValueError, match="another story"):
        Gallery(p, result, path=Gallery(p, other).path)


async def test_a_veto_of_the_reference_takes_the_next_best_and_a_choice_lifts_it(p, result):
    best = next(k for k, v in enumerate(result.scenes[0].variations, 1) if v.rank == 1)
    second = next(k for k, v in enumerate(result.scenes[0].variations, 1) if v.rank == 2)
    gallery = Gallery(p, result)
    gallery.veto(1, best, "wrong coat")
    assert gallery.result.scenes[0].variations[second - 1].selected
    assert set(preferences(gallery.result)["by"]) == {"veto"}
    gallery.choose(1, best, "right after all")
    assert vetoes(gallery.result, 1) == {}
    assert set(preferences(gallery.result)["by"]) == {"choice"}


async def test_when_all_are_vetoed_the_reference_stays_and_says_so(result):
    new = result
    for k in (1, 2, 3):
        new = veto(new, 1, k, "no")
    assert any(w.startswith("vetoed") for w in new.scenes[0].warnings)
    assert new.scenes[0].reference.exists()
    assert preferences(new).empty
    with pytest.raises(ValueError, match=r"variation must be .* got 4"):
        veto(result, 1, 4, "no")


async def test_a_choice_after_all_were_vetoed_takes_the_warning_away(p, result):
    gallery = Gallery(p, result)
    for k in (1, 2, 3):
        gallery.veto(1, k, "no")
    gallery.choose(1, 2, "after all")
    assert not any(w.startswith("vetoed") for w in gallery.result.scenes[0].warnings)
    assert list(vetoes(gallery.result, 1)) == [1, 3]


async def test_a_vetoed_choice_is_no_choice(p, result):
    gallery = Gallery(p, result, blind=True)
    for k in (1, 3):
        gallery.veto(1, k, "no")
    gallery.choose(1, 2, "best of a bad lot")
    assert len(preferences(gallery.result)) == 2
    gallery.veto(1, 2, "no, bad too")
    assert preferences(gallery.result).empty and human_agreement(gallery.result).empty
    assert "chosen by a person" not in str(gallery.static())


async def test_agreement_is_the_share_of_pairs_ordered_as_the_person_did(result):
    variations = result.scenes[0].variations
    middle = next(k for k, v in enumerate(variations, 1) if v.rank == 2)
    table = human_agreement(choose(result, 1, middle, "")).set_index("scorer")
    assert table.loc["pickscore", ["pairs", "agreement"]].tolist() == [2, 0.5]
    assert table.loc["flat", ["pairs", "agreement"]].tolist() == [2, 0.5]
    confirmed = choose(result, 1, next(k for k, v in enumerate(variations, 1) if v.rank == 1), "")
    table = human_agreement(confirmed).set_index("scorer")
    assert table.loc["pickscore", "agreement"] == 1
    assert table.loc["flat", "agreement"] == 0.5
    assert human_agreement(result).empty


async def test_a_missing_score_is_no_vote(result):
    scene = result.scenes[0]
    bare = scene.variations[0].scores.model_copy(update={"metrics": {"pickscore": None, "flat": 1}})
    variations = [scene.variations[0].model_copy(update={"scores": bare}), *scene.variations[1:]]
    scenes = [scene.model_copy(update={"variations": variations}), *result.scenes[1:]]
    table = human_agreement(choose(result.model_copy(update={"scenes": scenes}), 1, 2, ""))
    assert table.set_index("scorer").loc["pickscore", "pairs"] == 1


async def test_what_was_decided_outlives_a_scene_that_is_drawn_again(p, result):
    gallery = Gallery(p, result)
    gallery.choose(2, loser(result, 2), "softer")
    gallery.veto(2, 1, "dark")
    before = preferences(gallery.result)
    await gallery.rerun(2)
    assert len(before) > 0
    assert preferences(StoryResult.load(gallery.path)).to_dict("records") == before.to_dict(
        "records")
    assert vetoes(gallery.result, 2) == {}


# blind


async def test_blind_hides_models_scores_ranks_and_verifiers(p, result):
    scored = result.model_copy(update={"scenes": [
        s.model_copy(update={"warnings": ["below threshold: 12.5 < 30"]}) for s in result.scenes]})
    gallery = Gallery(p, scored)
    seen = shown(gallery)
    assert "rank 1" in seen and "overall" in seen and "12.5" in seen
    blind = Gallery(p, scored, blind=True)
    blind.choose(1, loser(result), "by eye")
    for words in (shown(blind), read(blind.static()).words):
        for secret in ("rank", "overall", "pickscore", "fake-images", "winner", "12.5", "agrees"):
            assert secret not in words
    assert blind.result.history[-1].after["blind"] is True
    assert preferences(blind.result)["blind"].all()
    descriptions = [w.description for w in widgets(blind.widgets.box)
                    if isinstance(w, ipywidgets.Button)]  # fmt: skip
    assert not [text for text in descriptions if text.startswith("keep")]


async def test_blind_a_veto_does_not_tell_what_the_scores_put_first_and_next(p, result):
    blind = Gallery(p, result, blind=True)
    pictures = [v.image.image_path.name for s in result.scenes for v in s.variations]
    before = [str(blind.static()), shown(blind)]
    best = next(k for k, v in enumerate(result.scenes[0].variations, 1) if v.rank == 1)
    blind.veto(1, best, "wrong coat")
    for number, source in ((1, blind.static()), (2, None)):
        blind.scene = number
        words = read(source or blind.static()).words + shown(blind)
        assert "chosen by a person" not in words and "stale" not in words
    assert blind.result.scenes[0].reference_from == "human"
    assert blind.result.scenes[1].stale
    assert not [name for name in pictures for text in before if name in text]
    blind.scene = 1
    blind.choose(1, loser(result), "the quiet one")
    assert shown(blind).count("chosen by a person") == 1


async def test_blind_a_scene_without_pictures_names_none_of_another_scene(p, result):
    scene = result.scenes[1].model_copy(update={
        "variations": [], "reference": result.scenes[0].reference, "reference_from": "carried"})
    scenes = [result.scenes[0], scene, result.scenes[2]]
    gallery = Gallery(p, result.model_copy(update={"scenes": scenes}), blind=True)
    gallery.scene = 2
    name = result.scenes[0].reference.name
    for source in (str(gallery.static()), shown(gallery)):
        assert "no image of its own" in source and name not in source and "carried" not in source
    gallery.blind = False
    assert name in str(gallery.static())


async def test_blind_nothing_can_be_sorted(p, result):
    gallery = Gallery(p, result)
    gallery._repr_mimebundle_()
    switch = gallery.widgets.blind
    assert not gallery.widgets.sort.disabled
    switch.value = True
    assert gallery.widgets.sort.disabled
    assert [c.number for c in gallery.widgets.cards] == [1, 2, 3]


async def test_pictures_are_sorted_by_what_is_asked_for(p, result):
    gallery = Gallery(p, result)
    gallery._repr_mimebundle_()
    ranks = [result.scenes[0].variations[c.number - 1].rank for c in gallery.widgets.cards]
    assert ranks == [1, 2, 3]
    sort = gallery.widgets.sort
    assert sort.options == ("overall", "pickscore", "flat", "as drawn")
    sort.value = "as drawn"
    assert [c.number for c in gallery.widgets.cards] == [1, 2, 3]


async def test_two_pictures_at_most_are_looked_at_closely(p, result):
    gallery = Gallery(p, result)
    gallery._repr_mimebundle_()
    for card in gallery.widgets.cards:
        card.look.click()
    numbers = [card.number for card in gallery.widgets.cards]
    assert gallery.closer == numbers[1:]
    assert len(read(gallery.widgets.closer.value).all("img")) == 2
    gallery.widgets.cards[2].look.click()
    assert gallery.closer == [numbers[1]]


# money


async def test_nothing_is_paid_before_prompts_are_seen_and_an_edit_is_what_is_sent(tmp_path):
    p = pipeline()
    gallery = Gallery(p, story(2), generation_id="new", output_dir=tmp_path)
    assert "no price of" in shown(gallery)
    press(gallery, "Enhance the prompts")
    await finished(gallery)
    assert p.image_model.requests == []
    fields = [w for w in widgets(gallery.widgets.box) if isinstance(w, ipywidgets.Textarea)]
    fields[1].value = "a keeper, scene 2, in the fog"
    assert "in the fog" in shown(gallery)
    press(gallery, "Draw the images")
    await finished(gallery)
    assert gallery.message == ""
    prompts = {r.slot.split("/")[0]: r.prompt for r in p.image_model.requests}
    assert prompts["new_scene_02"].startswith("a keeper, scene 2, in the fog")
    second = gallery.result.scenes[1]
    assert second.enhancement.final_score is None
    assert "the enhanced prompt was edited by a person" in second.warnings
    assert isinstance(gallery.result.scenes[0].enhancement.final_score, Critique)
    again = Gallery(p, story(2), generation_id="new", output_dir=tmp_path)
    assert again.result == gallery.result


async def test_a_blank_prompt_is_refused_in_words_and_nothing_is_drawn(tmp_path):
    p = pipeline()
    gallery = Gallery(p, story(1), output_dir=tmp_path)
    await gallery.enhance()
    gallery.prompts[0] = "  "
    press(gallery, "Draw the images")
    await finished(gallery)
    assert "not blank" in shown(gallery)
    assert p.image_model.requests == []


@pytest.mark.parametrize(("chain", "drawn"), [("previous", {2, 3}), ("first", {2}), ("none", {2})])
async def test_drawing_again_draws_what_depends_on_it_and_nothing_else(tmp_path, chain, drawn):
    p = pipeline(chain=chain)
    result = await p.run(story(), generation_id="run", output_dir=tmp_path)
    before, asked = len(p.image_model.requests), len(p.director.calls)
    gallery = Gallery(p, result)
    gallery._repr_mimebundle_()
    toggles = [w for w in widgets(gallery.widgets.box) if isinstance(w, ipywidgets.ToggleButtons)]
    toggles[0].value = 2
    gallery.widgets.editor.value = "a keeper, in the snow"
    press(gallery, "Draw this scene again")
    await finished(gallery)
    requests = p.image_model.requests[before:]
    assert {int(r.slot.split("_")[2].split("/")[0]) for r in requests} == drawn
    assert len(requests) == 3 * len(drawn)
    assert len(p.director.calls) == asked
    assert all("in the snow" in r.prompt for r in requests if "scene_02" in r.slot)
    kept = [s for s in gallery.result.scenes if s.scene not in drawn]
    assert kept == [s for s in result.scenes if s.scene not in drawn]


async def test_a_second_click_while_it_runs_is_harmless(tmp_path):
    p = pipeline(FakeImages(seconds=0.2))
    gallery = Gallery(p, story(1), output_dir=tmp_path)
    await gallery.enhance()
    gallery._repr_mimebundle_()
    [draw] = [w for w in widgets(gallery.widgets.box) if isinstance(w, ipywidgets.Button)]
    draw.click()
    first = gallery.task
    draw.click()
    await asyncio.sleep(0.05)
    draw.click()
    assert gallery.task is first and draw.disabled
    await finished(gallery)
    assert len(p.image_model.requests) == 3


async def test_a_decision_made_while_a_scene_is_drawn_is_refused_not_lost(tmp_path):
    p = pipeline(FakeImages(seconds=0.1))
    result = await p.run(story(1), generation_id="run", output_dir=tmp_path)
    gallery = Gallery(p, result)
    gallery._repr_mimebundle_()
    gallery.widgets.again.click()
    gallery.widgets.cards[2].choose.click()
    assert reasons(gallery.result) == []
    await finished(gallery)
    assert not gallery.widgets.cards[2].choose.disabled


async def test_stop_ends_it_and_says_so(tmp_path):
    p = pipeline(FakeImages(seconds=30))
    gallery = Gallery(p, story(1), output_dir=tmp_path)
    await gallery.enhance()
    press(gallery, "Draw the images")
    await asyncio.sleep(0.3)
    press(gallery, "Stop")
    await finished(gallery)
    assert "Stopped" in shown(gallery)
    assert p.image_model.cancelled == 3


async def test_an_error_is_told_and_the_next_click_works(tmp_path):
    broken = pipeline(FakeImages(lambda request, number: RuntimeError("<b>no</b> credit\x1b[31m")))
    gallery = Gallery(broken, story(1), generation_id="run", output_dir=tmp_path)
    await gallery.enhance()
    press(gallery, "Draw the images")
    await finished(gallery)
    assert "<b>no</b> credit" in shown(gallery)
    broken.image_model.script = None
    press(gallery, "Draw the images")
    await finished(gallery)
    assert gallery.result is not None


async def test_a_file_that_cannot_be_written_is_told(p, result, tmp_path):
    gallery = Gallery(p, result, path=tmp_path / "images" / "run_scene_01_v1.png" / "x.json")
    gallery._repr_mimebundle_()
    gallery.widgets.cards[2].choose.click()
    assert "Error" in shown(gallery)


async def test_the_kernel_is_not_held_while_pictures_are_drawn(tmp_path):
    gallery = Gallery(pipeline(FakeImages(seconds=0.3)), story(1), output_dir=tmp_path)
    await gallery.enhance()
    press(gallery, "Draw the images")
    ticks = 0
    while not gallery.task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks >= 5


# what is shown, and to whom


async def test_it_is_a_widget_where_that_works_and_html_everywhere(p, result, monkeypatch):
    bundle = Gallery(p, result)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert read(bundle["text/html"]).all("img")
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    bare = Gallery(p, result)._repr_mimebundle_()
    assert set(bare) == {"text/plain", "text/html"}


@pytest.mark.parametrize("text", FEW)
async def test_no_text_becomes_markup(tmp_path, text):
    p = pipeline()
    prompt = text.strip("\x00") or "x"
    tale = Story(scenes=[Scene(prompt=prompt)], title=text)
    gallery = Gallery(p, tale, generation_id="run", output_dir=tmp_path)
    assert shown(gallery)
    await gallery.enhance()
    gallery.prompts[0] = f"{text} x"
    await gallery.run()
    gallery.choose(1, 2, text)
    gallery.veto(1, 1, text)
    gallery.closer = [1, 2]
    assert shown(gallery) and read(gallery.static()).words
    kept = visible_text(text)
    assert json.loads(gallery.path.read_text("utf-8"))["history"][-1]["reason"] == kept
    assert preferences(StoryResult.load(gallery.path))["reason"].tolist()[0] == kept
    assert report(gallery.result).stat().st_size > 1000
