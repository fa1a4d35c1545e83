"""What inspectors, repairs and judges did, as people see it: failed questions, before and after."""

from __future__ import annotations

import sys

import pytest

from refimg.engine.results import Comparison, Event
from refimg.inspection.checklist import Answer, Checklist, Inspection, Question
from refimg.pipeline import SceneResult, StoryResult, Variation
from refimg.score import ImageScores
from refimg.view import failure_chart, repairs, report, score_table, variation_grid
from refimg.view.checks import Checks, checklist_html, comparison_html
from refimg.view.html import root_html
from refimg.view.repairs import Edits
from refimg.view.tables import history_table

from .sampling import sampled
from .test_report import Page
from .test_view import FEW, HOSTILE, chain_of, read, scene_of, shot, story_of, variation, views
from .test_view_charts import alt, written

ASKED = [
    Question(text="Is there a fox?", about="subject"),
    Question(text="Is the fox red?", about="attribute", parent=0),
    Question(text="Is it night?", about="setting"),
    Question(text="Is it a watercolour?", about="style"),
]


def seen(*verdicts: str, reason: str = "it looks like {}", cost: float | None = 0.25) -> Inspection:
    """What an inspector answered, one verdict per question."""
    answers = [Answer(question=k, verdict=verdict, reason=reason.replace("{}", str(k)))
               for k, verdict in enumerate(verdicts)]
    return Inspection(answers=answers, model="acme/eyes", score=50.0, cost=cost, seconds=1.0)


def checklist(*questions: Question) -> Checklist:
    return Checklist(prompt="p", questions=list(questions) or ASKED, author="acme/author", cost=0.5)


def made(folder, number: int, *verdicts: str, overall=50.0, **over) -> Variation:
    """A variation that was inspected, where there are verdicts."""
    scores = ImageScores(metrics={"checklist": 50.0}, overall=overall,
                         notes={"checklist": "Is there a note?"})
    one = variation(shot(folder, 1, number), rank=number, scores=scores,
                    selected=over.pop("selected", False))
    looked = {"inspection": seen(*verdicts)} if verdicts else {}
    return one.model_copy(update=looked | over)


def scene(folder, *variations: Variation, source="ranked", **over) -> SceneResult:
    return scene_of(folder, 1, [*variations], source=source,
                    **({"checklist": checklist()} | over))


@pytest.fixture
def repaired(tmp_path) -> SceneResult:
    """v1 was drawn, v2 and v3 are edits of it, v4 of v3; v4 won."""
    first = {"edits": 1, "instruction": "Make it night."}
    return scene(
        tmp_path,
        made(tmp_path, 1, "yes", "no", "no", "yes", overall=40.0),
        made(tmp_path, 2, "no", "no", "yes", "unsure", overall=30.0, **first),
        made(tmp_path, 3, "yes", "no", "yes", "yes", overall=60.0, **first),
        made(tmp_path, 4, "yes", "unsure", "yes", "no", overall=80.0, edits=3, selected=True,
             instruction="Make the fox red."),
        source="repaired",
    )


def words(view) -> str:
    return read(root_html(view)).words


# what failed


def test_failed_questions_stand_below_the_image_in_words(repaired):
    told = read(variation_grid(repaired)).words
    assert "✗ Is the fox red? no, it looks like 1" in " ".join(told.split())
    assert "Is there a note?" not in told, "the same, a second time"


def test_unsure_is_no_failure_and_neither_is_what_only_follows(repaired):
    assert Checks(repaired, 2).failed == {0: "Is there a fox? no, it looks like 0"}
    assert Checks(repaired, 4).failed == {3: "Is it a watercolour? no, it looks like 3"}


def test_nothing_failed_is_said_with_what_is_unsure(tmp_path):
    one = scene(tmp_path, made(tmp_path, 1, "yes", "yes", "unsure", "unsure", selected=True))
    told = [f"?  Is it {what}? unsure, it looks like {k}"
            for k, what in ((2, "night"), (3, "a watercolour"))]
    assert words(Checks(one, 1).html()) == " ".join(["✓ nothing failed", *told])


def test_a_long_list_is_folded(tmp_path):
    asked = [Question(text=f"Is it number {k}?", about="count") for k in range(6)]
    one = scene(tmp_path, made(tmp_path, 1, *["no"] * 6, selected=True),
                checklist=checklist(*asked))
    shown, folded = str(Checks(one, 1).html()).split("<details>")
    assert shown.count("✗") == folded.count("✗") == 3 and "3 more failed" in folded


def test_where_nobody_looked_nothing_is_shown(tmp_path):
    blank = scene(tmp_path, made(tmp_path, 1, selected=True))
    assert Checks(blank, 1).failed is Checks(blank, 1).html() is None
    told = read(variation_grid(blank)).words
    assert "✗" not in told and "✓" not in told


def test_answers_to_other_questions_are_none(tmp_path):
    assert Checks(scene(tmp_path, made(tmp_path, 1, "no", selected=True)), 1).failed is None


def test_the_score_table_repeats_it_for_selected_images_only(tmp_path):
    pair = [made(tmp_path, 1, *["no"] * 4, selected=True), made(tmp_path, 2, *["no"] * 4)]
    assert "Is there a note?" in read(score_table(scene(tmp_path, *pair))).words
    lost = [made(tmp_path, 1, selected=True), made(tmp_path, 2, *["no"] * 4)]
    lost[0].scores.notes.clear()
    assert "Is there a note?" not in read(score_table(scene(tmp_path, *lost))).words


def test_a_result_without_inspection_says_nothing_of_it(tmp_path):
    result = chain_of(tmp_path, 2, 3)
    told = "".join(map(str, views(result))) + report(result, tmp_path / "r.html").read_text("utf-8")
    for word in ("✗", "✓", "checklist", "edit", "compared v", "inspect", "repair"):
        assert word not in told, word


# before and after


def test_edits_stand_beside_what_they_edit(repaired):
    told = " ".join(read(repairs(repaired)).words.split())
    first, second = told.split("Edits of ")[1:]
    for text in ("v1, asked for: Make it night.", "The edit v3 was edited again, below.",
                 "before: v1", "✓ now right: Is it night?", "✗ still wrong: Is the fox red? no"):
        assert text in first, text
    assert "✗ now wrong: Is there a fox? no" in first
    assert "✗ still wrong: Is the fox red? what it asks of is missing" in first
    for text in ("v3, asked for: Make the fox red.", "? now unsure: Is the fox red?",
                 "The edit v4 won: it is the scene's reference, overall 60.0 before and 80.0"):
        assert text in second, text


def test_no_image_is_shown_twice_but_as_what_was_there_before(repaired):
    images = [image["alt"] for image in read(variation_grid(repaired)).all("img")]
    assert len(images) == 4 + 2 and sum(alt.startswith("Before") for alt in images) == 2


def test_an_edit_that_lost_is_told_as_plainly(tmp_path):
    lost = scene(tmp_path, made(tmp_path, 1, selected=True),
                 made(tmp_path, 2, edits=1, instruction="Make it blue."), checklist=None)
    assert Edits(lost, 1, "Make it blue.").outcome() == "No edit won: v1 is the scene's reference."


def test_a_person_may_choose_an_edit(tmp_path):
    chosen = scene(tmp_path, made(tmp_path, 1), made(tmp_path, 2, edits=1, instruction="Blue.",
                   selected=True), source="human")
    assert Edits(chosen, 1, "Blue.").outcome().startswith("A person chose the edit v2")


@pytest.mark.parametrize("source", [None, 9])
def test_an_edit_of_an_image_that_was_not_written_has_a_box_before_it(tmp_path, source):
    lost = scene(tmp_path, made(tmp_path, 1, *["yes"] * 4, selected=True),
                 made(tmp_path, 2, *["no"] * 4, edits=source, instruction="Make it blue."))
    told = " ".join(read(variation_grid(lost)).words.split())
    assert "Edits of a lost image, asked for: Make it blue." in told
    assert "the image that was edited is not in the record" in told


def test_a_source_whose_file_is_gone_is_a_box_too(repaired):
    repaired.variations[0].image.image_path.unlink()
    told = read(repairs(repaired)).words
    assert "run_scene_01_v1.png is missing or unreadable" in told


def test_without_edits_there_is_a_sentence(tmp_path):
    assert read(repairs(chain_of(tmp_path, 2))).words == "No image was edited."


# the checklist and the comparison


def test_the_checklist_is_a_folded_table(repaired):
    told = " ".join(words(checklist_html(repaired)).split())
    assert told.startswith("the checklist: 4 questions, nothing failed in 0 of 4 images")
    assert "Is there a fox? subject yes ✗ no yes yes" in told
    assert "↳ Is the fox red? attribute ✗ no ✗ no ✗ no unsure" in told
    assert "Asked by acme/author, answered by acme/eyes, for 1.5000 USD." in told


def test_a_yes_to_what_is_not_there_stands_in_brackets(tmp_path):
    odd = scene(tmp_path, made(tmp_path, 1, "no", "yes", "yes", "yes", selected=True),
                made(tmp_path, 2))
    told = " ".join(words(checklist_html(odd)).split())
    assert "↳ Is the fox red? attribute (yes) –" in told and told.endswith("– nobody looked.")


def compared(winner: int | None, *reasons: str) -> Comparison:
    return Comparison(first=1, second=2, winner=winner, reasons=[*reasons], model="acme/judge",
                      cost=None, seconds=2.0)


@pytest.mark.parametrize(("winner", "text"), [
    (1, "It prefers v1, as the scores do."),
    (2, "It prefers v2, which the scores rank second: v2 goes first."),
    (None, "It cannot tell which is better, so the order of the scores holds."),
])
def test_the_comparison_is_told_with_its_reasons(tmp_path, winner, text):
    pair = scene(tmp_path, made(tmp_path, 1, selected=True), made(tmp_path, 2),
                 comparison=compared(winner, "more snow", "a better fox"))
    told = " ".join(words(comparison_html(pair)).split())
    assert f"The judge acme/judge compared v1 and v2. {text}" in told
    assert "shown v1, then v2: more snow shown v2, then v1: a better fox" in told
    assert "at an unknown cost" in told
    assert text in " ".join(read(variation_grid(pair)).words.split())


def test_a_comparison_without_reasons_has_none(tmp_path):
    pair = scene(tmp_path, made(tmp_path, 1, selected=True), comparison=compared(None, "", ""))
    assert "shown" not in words(comparison_html(pair))


# the report and the history


def test_the_report_holds_all_of_it(repaired, tmp_path):
    judged = repaired.model_copy(update={
        "comparison": compared(None, "x", "y").model_copy(update={"cost": 2.0}),
        "timings": {"inspect": 3.0, "repair": 4.0}})
    page = Page(report(story_of([judged]), tmp_path / "r.html"))
    for text in ("Edits of v1, asked for: Make it night.", "✗ Is the fox red? no", "inspect, s",
                 "the checklist: 4 questions", "The two best compared", "acme/judge"):
        assert text in page.text, text


def test_the_price_of_a_scene_holds_every_look_and_is_at_least(repaired, tmp_path):
    free = {"cost": 0.0}
    cheap = [v.model_copy(update={"image": v.image.model_copy(update=free)})
             for v in repaired.variations]
    enhanced = repaired.enhancement.model_copy(update=free)
    own = repaired.model_copy(update={"variations": cheap, "enhancement": enhanced,
                                      "comparison": compared(None).model_copy(update=free)})
    page = Page(report(story_of([own]), tmp_path / "r.html"))
    assert "at least 1.5000" in page.text.split("What each scene cost")[1], "what an edit asked for"


def test_the_history_says_what_became_of_an_edit(repaired):
    event = Event(kind="edit", at="2026", scene=1, variation=1, reason="Make it night.",
                  before={"variation": 1}, after={"variation": 3, "asked": 2, "scenes": []})
    result = story_of([repaired], history=[event])
    told = " ".join(read(root_html(history_table(result))).words.split())
    assert "1 edit 1 1 2 edits of it asked for; selected: v3 Make it night. 2026" in told
    same = event.model_copy(update={"after": {"variation": 1, "asked": 1}})
    told = read(root_html(history_table(result.model_copy(update={"history": [same]})))).words
    assert "selected: v1; the edits did not win" in told


# the chart


def test_the_chart_counts_what_failed_as_first_drawn_and_of_the_selected(repaired):
    told = alt(failure_chart(story_of([repaired])))
    assert ("2 of 4 answers failed in the images as first drawn, 1 of 4 in the selected ones"
            in told)
    for text in ("attribute: 1 of 1 as first drawn, 0 of 1 selected",
                 "style: 0 of 1 as first drawn, 1 of 1 selected"):
        assert text in told, text
    assert "1/1" in written(failure_chart(story_of([repaired])))


def test_images_at_which_nobody_looked_are_not_counted(repaired):
    blank = [v.model_copy(update={"inspection": None}) for v in repaired.variations]
    missing = repaired.model_copy(update={"variations": blank})
    told = words(failure_chart(story_of([missing])))
    assert "No image of this run was inspected." in told
    some = repaired.model_copy(update={"variations": [*blank[:3], repaired.variations[3]]})
    assert "0 of 0 answers failed" in alt(failure_chart(story_of([some])))


def test_the_chart_is_marked_where_a_stand_in_looked(repaired):
    mark = "sandbox · not from real models"
    assert mark not in alt(failure_chart(story_of([repaired])))
    odd = repaired.model_copy(update={
        "checklist": checklist().model_copy(update={"author": "sandbox-x"})})
    assert mark in alt(failure_chart(story_of([odd])))


@pytest.mark.all
def test_a_hundred_scenes_still_make_a_chart(repaired):
    many = [repaired.model_copy(update={"scene": number}) for number in range(1, 101)]
    assert "Failed questions of 100 scenes by kind" in alt(failure_chart(story_of(many)))


def test_the_report_has_the_chart_only_where_somebody_looked(repaired, tmp_path, monkeypatch):
    def text(result) -> str:
        return Page(report(result, tmp_path / "r.html")).text

    assert "What fails" in text(story_of([repaired]))
    assert "What fails" not in text(chain_of(tmp_path, 1))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = text(story_of([repaired]))
    assert "The charts are left out" in told and "What fails" not in told
    assert "✗ Is the fox red? no" in told and "Edits of v1" in told


# hostile texts


@pytest.mark.parametrize("text", sampled((text for text in HOSTILE if text.strip()), 4))
def test_no_text_of_an_inspection_becomes_markup(tmp_path, text):
    result = hostile(tmp_path, text)
    for view in (*views(result), repairs(result), root_html(history_table(result))):
        assert read(view).words
    Page(report(result, tmp_path / "r.html"))


def hostile(folder, text: str) -> StoryResult:
    """A repaired scene in which every text of others is this one."""
    told = Inspection(answers=[Answer(question=0, verdict="no", reason=text)], model=text,
                      score=0.0, seconds=0.0)
    asked = Checklist(prompt=text, questions=[Question(text=text, about="style")], author=text)
    own = [made(folder, 1, selected=True, inspection=told),
           made(folder, 2, edits=1, instruction=text, inspection=told)]
    pair = compared(None, text, text, text).model_copy(update={"model": text})
    event = Event(kind="edit", scene=1, variation=1, reason=text, after={"asked": 1})
    return story_of([scene(folder, *own, checklist=asked, comparison=pair)], history=[event])


@pytest.mark.parametrize("text", FEW[:1])
def test_a_hostile_text_is_read_as_it_was_written(tmp_path, text):
    told = read(repairs(hostile(tmp_path, text))).words
    assert told.count(text) >= 3
