"""Stories and results: files, tables, prompts, what is refused, defaults, choices and reruns."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
from pydantic import BaseModel

from refimg import Pipeline, Scene, Story, StoryResult, choose, defaults
from refimg.engine.decisions import vetoes
from refimg.enhance import Reply
from refimg.generate import Candidate, GeneratedImage
from refimg.pipeline import compose_prompt, rescore, scene_context, veto
from tests.fakes import FakeChat, FakeImages, FakeScorer, critic, critique, director, picture
from tests.test_pipeline import a_pipeline, a_story, at, drawn, received


@pytest.fixture
def run(tmp_path):
    """Runs a story as "x" in a folder of its own."""

    async def go(pipeline, story=None, **over):
        over = {"generation_id": "x", "output_dir": tmp_path / "images"} | over
        return await pipeline.run(story or a_story(), **over)

    return go


@pytest.fixture
def user_image(tmp_path) -> Path:
    path = tmp_path / "user.png"
    path.write_bytes(picture(99))
    return path


# the prompt that is sent


SAID = "The reference image is the scene before: keep its look."


def sent(
    number: int = 1, references: tuple = (), story: Story | None = None, legacy: bool = False,
    **markers,
) -> str:
    """What `compose_prompt` adds to "text"."""
    story = story or a_story(3, consistency_markers=markers)
    whole = compose_prompt("text", story, number, references=references, legacy=legacy)
    assert whole.startswith("text")
    return whole.removeprefix("text").strip()


def test_markers_come_in_their_order_strangers_last():
    given = {"era": "1920s", "mood": "f", "subject_description": "g", "composition": "e"}
    given |= {"lighting": "d", "color_palette": "c", "camera body": "h", "style": "b"}
    assert sent(**given) == (
        "Style: b. Color palette: c. Lighting: d. Composition: e. Mood: f. "
        "Subject description: g. Era: 1920s. Camera body: h."
    )


@pytest.mark.parametrize(
    "key", ["color_palette", "colour_palette", "Color Palette", " COLOUR_palette "]
)
def test_both_spellings_of_colour_have_the_same_place(key):
    assert sent(mood="z", **{key: "teal"}).endswith("alette: teal. Mood: z.")


@pytest.mark.parametrize(
    "value, text",
    [
        (["teal", "amber"], "Style: teal, amber."),
        (("teal", "amber"), "Style: teal, amber."),
        (["teal", "", None, " "], "Style: teal."),
        (35, "Style: 35."),
        ("  film noir.  ", "Style: film noir."),
        *((blank, "") for blank in ("", "  ", None, [], ["", " "])),
    ],
)
def test_marker_values_become_text_and_blank_ones_are_left_out(value, text):
    assert sent(style=value) == text


@pytest.mark.parametrize("number", [1, 2, 3])
def test_notes_on_the_scene_before_begin_with_the_second_scene(number):
    notes = {"continuity_note": "same coat.", "consistency_guideline": "red door"}
    scenes = [Scene(prompt="p", transition_note="a dissolve", **notes)] * 3
    text = sent(number, story=Story(scenes=scenes))
    assert "red door" in text
    assert ("same coat" in text) == ("a dissolve" in text) == (number > 1)
    assert ".." not in text


def test_blank_notes_are_left_out():
    scenes = [Scene(prompt="p")] * 2
    blank = Scene(prompt="p", continuity_note=" ", consistency_guideline="\n", transition_note="")
    assert sent(3, story=Story(scenes=[*scenes, blank])) == ""


def test_the_subject_is_described_only_where_it_is_present():
    markers = {"style": "ink", "subject_description": "a keeper", "Subject": "keeper"}
    scenes = [Scene(prompt="p", subject_present=here) for here in (True, False)]
    story = Story(scenes=scenes, consistency_markers=markers)
    there, away = (sent(n, story=story) for n in (1, 2))
    assert "a keeper" in there
    assert "keeper" not in away and "subject" not in away.lower() and "Style: ink" in away
    there, away = (sent(n, (SAID,), story, legacy=True) for n in (1, 2))
    assert "keep its subject" in there and "subject" not in away.lower()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_reference_is_spoken_of_only_where_one_is_sent(legacy):
    for number in (1, 2):
        assert sent(number, (), legacy=legacy) == ""
        said = sent(number, (SAID,), legacy=legacy)
        old = "Match the reference image: keep its subject, style and colours."
        assert said == (old if legacy else SAID)


def test_the_brand_reaches_the_image_model_but_not_in_the_words_of_0_1():
    scenes = [Scene(prompt="p", consistency_guideline="one light")]
    story = Story(scenes=scenes, consistency_markers={"mood": "calm"}, brand="Acme, plain.")
    assert sent(story=story) == "Mood: calm. Brand: Acme, plain. Keep consistent: one light."
    assert sent(story=story, legacy=True) == "Mood: calm. Keep consistent: one light."


def test_the_agents_context_says_what_the_prompt_will_say_and_the_brand():
    scenes = [Scene(prompt="p", continuity_note="same coat", subject_present=False)] * 2
    markers = {"mood": "calm", "style": "ink", "subject_description": "a keeper"}
    story = Story(scenes=scenes, consistency_markers=markers, brand="Acme", title="secret")
    told = "Style: ink\nMood: calm\nBrand: Acme"
    assert scene_context(story, 1) == f"{told}\nNext scene, do not draw it: p"
    assert scene_context(story, 1, legacy=True) == told
    assert "same coat" in scene_context(story, 2)


def test_markers_that_differ_only_in_case_and_mappings_all_reach_the_agents():
    markers = {"style": "ink", "Style": "gouache", "subject": {"hair": "red", "coat": ["long"]}}
    story = Story(scenes=[Scene(prompt="p")], consistency_markers=markers)
    assert scene_context(story, 1).splitlines() == [
        "Style: ink", "Style: gouache", "Subject: hair red, coat long"
    ]


# a story in a file


FIELDS = {
    "title": "Harbour 🌊",
    "scenes": [{"prompt": "a calm harbour 灯台", "subject_present": False}, {"prompt": "a beach"}],
    "consistency_markers": {"style": "ink", "palette": ["teal", "amber"]},
    "brand": "Acme",
}


def as_yaml(fields) -> str:
    import yaml

    return yaml.safe_dump(fields, allow_unicode=True)


WRITERS = {
    "yaml": as_yaml,
    "json": lambda fields: json.dumps(fields, ensure_ascii=False),
    "json, indented": lambda fields: json.dumps(fields, ensure_ascii=False, indent=2),
    "json, indented with tabs": lambda fields: json.dumps(fields, ensure_ascii=False, indent="\t"),
    "json, ASCII only": json.dumps,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_story_is_read_from_yaml_and_json(tmp_path, write):
    path = tmp_path / ("story.yaml" if write is as_yaml else "story.json")
    path.write_text(write(FIELDS), "utf-8")
    assert Story.load(path) == Story.load(str(path)) == Story(**FIELDS)


@pytest.mark.parametrize("relative", [True, False])
def test_a_path_in_a_story_is_meant_from_its_folder(tmp_path, monkeypatch, user_image, relative):
    (tmp_path / "stories").mkdir()
    image = "../user.png" if relative else str(user_image)
    path = tmp_path / "stories" / "s.yaml"
    path.write_text(as_yaml(FIELDS | {"initial_reference_image": image}), "utf-8")
    monkeypatch.chdir("/")
    found = Story.load(path).initial_reference_image
    assert found.is_absolute() and found.resolve() == user_image.resolve()


BAD_STORIES = {
    "unknown field": ("scenes: [{prompt: a}]\nmoood: calm", "moood"),
    "unknown field of a scene": ("scenes: [{prompt: a, continuty_note: b}]", "scene 1, cont"),
    "no scenes": ("title: a", "scenes"),
    "a scene without a prompt": ("scenes: [{continuity_note: a}]", "prompt"),
    "scenes that are none": ("scenes: [a, b]", "scene 2"),
    "a list": ("[1, 2]", "mapping"),
    "a text": ("hello", "mapping"),
    "nothing": ("", "mapping"),
    "no yaml": ("scenes: [", "read"),
    "an image that is a list": (
        "scenes: [{prompt: a}]\ninitial_reference_image: [a]",
        "initial_ref",
    ),
    "a field that is a number": ("scenes: [{prompt: a}]\n5: b", "5"),
}


@pytest.mark.parametrize("text, word", BAD_STORIES.values(), ids=BAD_STORIES)
def test_a_file_that_is_no_story_is_refused_by_name(tmp_path, text, word):
    path = tmp_path / "story.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=word) as caught:
        Story.load(path)
    assert "story.yaml" in str(caught.value)


def test_a_story_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("missing", "folder", "binary"):
        with pytest.raises(ValueError, match=name):
            Story.load(tmp_path / name)


# a result in a file


@pytest.fixture
async def result(run, user_image) -> StoryResult:
    """Three scenes, the second of them carried; two rounds, a user image, two scorers."""
    judge = FakeChat(lambda messages, schema, number: critique(40 + 2 * number), name="judge")
    images = drawn(lambda s, v, a: RuntimeError("boom") if s == 2 else picture(40 * v + s))
    scorers = [FakeScorer(), FakeScorer("clip_score", lambda image, prompt: None)]
    rounds = {"critic": judge, "max_enhancement_iterations": 2}
    pipeline = a_pipeline(images, scorers=scorers, seed=7, **rounds)
    markers = {"style": "ink 灯", "palette": ["teal", "amber"]}
    return await run(
        pipeline, a_story(3, initial_reference_image=user_image, consistency_markers=markers)
    )


def every_path(value) -> list[Path]:
    """All paths in a record."""
    if isinstance(value, Path):
        return [value]
    if isinstance(value, BaseModel):
        value = [getattr(value, name) for name in type(value).model_fields]
    inside = list(value.values()) if isinstance(value, dict) else value
    return [p for x in inside for p in every_path(x)] if isinstance(inside, (list, tuple)) else []


def test_a_saved_result_comes_back_equal(result, tmp_path):
    path = tmp_path / "deep" / "er" / "run.json"
    result.save(path)
    assert StoryResult.load(path) == StoryResult.load(str(path)) == result
    assert list(path.parent.iterdir()) == [path]


def test_paths_are_relative_in_the_file_only(result, tmp_path):
    result.save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text("utf-8")
    assert str(tmp_path) not in text and "images/x_scene_01_v2.png" in text
    paths = every_path(StoryResult.load(tmp_path / "run.json"))
    assert len(paths) > 10 and all(p.is_absolute() and p.is_file() for p in paths)


def test_a_moved_folder_takes_its_paths_along(result, tmp_path):
    result.save(tmp_path / "run.json")
    new = tmp_path.with_name(tmp_path.name + "-moved")
    shutil.move(tmp_path, new)
    paths = every_path(StoryResult.load(new / "run.json"))
    assert all(p.is_file() and p.is_relative_to(new) for p in paths)


def test_saving_over_an_older_result_replaces_it_whole(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result.save("run.json")
    other = result.model_copy(update={"generation_id": "y"})
    other.save("run.json")
    assert StoryResult.load("run.json").generation_id == "y"
    assert [p.name for p in tmp_path.iterdir() if "run" in p.name] == ["run.json"]


def test_a_record_that_is_not_as_it_was_saved_is_warned_of(result, tmp_path, caplog):
    path = tmp_path / "run.json"
    result.save(path)
    text = path.read_text("utf-8")
    for same in (text, json.dumps(json.loads(text)), json.dumps(json.loads(text), indent=4)):
        path.write_text(same, encoding="utf-8")
        assert StoryResult.load(path) == result and not caplog.text
    path.write_text(text.replace('"generation_id": "', '"generation_id": "x', 1), encoding="utf-8")
    assert StoryResult.load(path) != result
    assert f"{path} is not as it was saved" in caplog.text


async def test_a_result_whose_markers_are_tuples_comes_back_equal(run, tmp_path):
    result = await run(a_pipeline(), a_story(1, consistency_markers={"palette": ("teal", "amber")}))
    result.save(tmp_path / "run.json")
    assert StoryResult.load(tmp_path / "run.json") == result


def test_a_file_that_holds_no_result_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"scenes": 1}')
    with pytest.raises(ValueError, match="generation_id"):
        StoryResult.load(tmp_path / "run.json")


# tables


def test_the_frame_has_one_row_a_variation_with_the_records_values(result):
    frame = result.frame()
    assert list(frame.columns) == [
        "generation_id", "scene", "variation", "rank", "selected", "overall", "pickscore",
        "clip_score", "raw_pickscore", "raw_clip_score", "seed", "model", "cost", "path",
    ]  # fmt: skip
    assert list(zip(frame.scene, frame.variation, strict=True)) == [(1, 1), (1, 2), (3, 1), (3, 2)]
    made = [v for scene in result.scenes for v in scene.variations]
    for (_, row), variation in zip(frame.iterrows(), made, strict=True):
        assert (row.overall, row.pickscore) == (
            variation.scores.overall,
            variation.scores.pickscore,
        )
        assert row.raw_pickscore == variation.scores.raw["pickscore"]
        assert (row["rank"], row.selected) == (variation.rank, variation.selected)
        assert (row.seed, row.path) == (variation.image.seed, str(variation.image.image_path))
    assert set(frame.generation_id) == {"x"} and set(frame.model) == {"fake-images"}
    assert frame.clip_score.isna().all() and frame.cost.isna().all()


@pytest.mark.parametrize("name", ["scene", "path", "rank"])
async def test_a_scorers_name_does_not_overwrite_another_column(run, name):
    try:
        result = await run(a_pipeline(scorers=[FakeScorer(name)]))
    except ValueError as error:
        assert name in str(error)
        return
    row = result.frame().iloc[3]
    variation = result.scenes[1].variations[1]
    assert (row.scene, row["rank"], row.path) == (2, 1, str(variation.image.image_path))
    assert variation.scores.metrics[name] in list(row)


async def test_the_frame_of_an_unscored_run_has_its_rows(run):
    frame = (await run(a_pipeline(scorers=[]))).frame()
    assert len(frame) == 4 and frame.overall.isna().all() and frame["rank"].isna().all()


def test_the_table_of_rounds_has_one_row_a_round(result):
    frame = result.iterations_frame()
    assert list(zip(frame.scene, frame.iteration, strict=True)) == [
        (s.scene, i.number) for s in result.scenes for i in s.enhancement.iterations
    ]
    critiques = [i.critique for s in result.scenes for i in s.enhancement.iterations]
    for name in ("completeness", "specificity", "professionalism", "cinematography",
                 "brand_alignment", "overall"):  # fmt: skip
        assert list(frame[name]) == [getattr(c, name) for c in critiques]
    assert (frame.groupby("scene").best.sum() == 1).all()


async def test_of_two_equal_rounds_only_the_earlier_is_the_best(run):
    result = await run(a_pipeline(critic=critic(60), max_enhancement_iterations=2), a_story(1))
    assert result.scenes[0].enhancement.total_iterations == 2
    assert list(result.iterations_frame().best) == [True, False]


async def test_without_rounds_the_table_of_rounds_is_empty_but_has_its_columns(run):
    frame = (await run(a_pipeline(max_enhancement_iterations=0))).iterations_frame()
    assert len(frame) == 0 and "overall" in frame.columns


# what the record says of the run


async def test_settings_say_what_was_asked_for_and_versions_what_it_ran_on(run):
    asked = {"num_variations": 3, "seed": 5, "chain": "first", "aspect_ratio": "1:1"}
    asked |= {"score_text": "enhanced", "quality_threshold": 12.5, "score_threshold": 70}
    asked |= {"max_enhancement_iterations": 2, "weights": {"pickscore": 2.0}, "max_concurrency": 3}
    result = await run(a_pipeline(**asked))
    assert asked.items() <= result.settings.items()
    assert result.settings["image_model"] == "fake-images"
    assert (result.settings["director"], result.settings["critic"]) == (
        "fake-director",
        "fake-critic",
    )
    assert result.settings["scorers"] == [
        {"name": "pickscore", "model": "fake-model", "calibration": "fake-identity"}
    ]
    assert {"refimg", "python", "pillow"} <= set(result.versions)
    assert json.loads(json.dumps(result.settings)) == result.settings


def sandbox_scorer() -> FakeScorer:
    scorer = FakeScorer()
    scorer.model = "sandbox-pickscore"
    return scorer


STAND_INS = {
    "none": ({}, False),
    "director": ({"director": FakeChat(name="sandbox-director")}, True),
    "critic": ({"critic": FakeChat([critique(90)], name="sandbox-critic")}, True),
    "painter": ({"image_model": FakeImages(name="sandbox-painter")}, True),
    "scorer": ({"scorers": [sandbox_scorer()]}, True),
    "one scorer of two": ({"scorers": [FakeScorer("clip_score"), sandbox_scorer()]}, True),
}


@pytest.mark.parametrize("over, sandbox", STAND_INS.values(), ids=STAND_INS)
async def test_one_stand_in_makes_it_a_sandbox_run(run, over, sandbox):
    assert (await run(a_pipeline(**over))).sandbox is sandbox


async def test_prompts_that_stand_ins_wrote_make_it_a_sandbox_run(run):
    stand_ins = {"director": FakeChat(name="sandbox-director")}
    made = await a_pipeline(**stand_ins).enhance(a_story(2))
    assert (await run(a_pipeline(), enhancements=made)).sandbox is True


async def test_the_table_of_rounds_says_sandbox_where_stand_ins_wrote(run):
    result = await run(a_pipeline(director=FakeChat(name="sandbox-director")))
    assert "sandbox" in result.iterations_frame().to_csv()


def priced(cost: float | None) -> FakeImages:
    return FakeImages(lambda request, number: GeneratedImage(picture(number), cost=cost))


def paid(text: str, cost: float | None = 0.01) -> FakeChat:
    return FakeChat([Reply(text=text, cost=cost)])


async def test_the_cost_is_the_sum_of_all_calls(run):
    agents = {"director": paid("better"), "critic": paid(critique(90))}
    result = await run(a_pipeline(priced(0.04), **agents))
    assert result.cost == pytest.approx(2 * (0.01 + 0.01) + 4 * 0.04)
    assert list(result.frame().cost) == [0.04] * 4


@pytest.mark.parametrize("unknown", ["director", "critic", "images"])
async def test_the_cost_is_unknown_where_one_price_is(run, unknown):
    prices = dict.fromkeys(("director", "critic", "images"), 0.01) | {unknown: None}
    agents = {"director": paid("better", prices["director"])}
    agents["critic"] = paid(critique(90), prices["critic"])
    assert (await run(a_pipeline(priced(prices["images"]), **agents))).cost is None


async def test_without_agents_only_images_cost(run):
    result = await run(a_pipeline(priced(0.04), max_enhancement_iterations=0))
    assert result.cost == pytest.approx(0.16)


async def test_an_image_that_was_paid_for_and_not_written_is_not_free(run, monkeypatch):
    save = Candidate.save

    async def failing(take, **where):
        if take.pixels.getpixel((0, 0))[0] == 1:
            raise OSError(28, "No space left on device")
        return await save(take, **where)

    monkeypatch.setattr(Candidate, "save", failing)
    result = await run(a_pipeline(priced(0.04), max_enhancement_iterations=0), a_story(1))
    assert result.cost is None or result.cost == pytest.approx(0.08)


# what is refused before anything is paid


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path):
    """Runs what must be refused; checks the words, that no model was asked, no file written."""

    async def check(words, story=None, run=None, images=None, **settings):
        pipeline, before = a_pipeline(images, **settings), tree(tmp_path)
        with pytest.raises(ValueError) as caught:
            where = {"generation_id": "x", "output_dir": tmp_path / "deep" / "images"}
            await pipeline.run(story or a_story(), **where | (run or {}))
        for word in words:
            assert str(word) in str(caught.value)
        asked = (pipeline.image_model.requests, pipeline.director.calls, pipeline.critic.calls)
        assert asked == ([], [], []) and tree(tmp_path) == before
        assert all(scorer.batches == [] for scorer in pipeline.scorers)

    return check


NAN, INF = math.nan, math.inf
BAD_NUMBERS = {
    "num_variations": ((0, 21, -1, True, 2.0, "4", None), "1 to 20"),
    "max_enhancement_iterations": ((-1, 11, True, False, 1.5, "4", None), "0 to 10"),
    "score_threshold": ((-0.1, 100.1, NAN, INF, True, "85", None), "0 to 100"),
    "quality_threshold": ((-0.1, 100.1, NAN, -INF, False, "30", None), "0 to 100"),
    "max_concurrency": ((0, -1, True, 1.5), "1 to"),
}


@pytest.mark.parametrize(
    "field, value, allowed",
    [(name, v, allowed) for name, (values, allowed) in BAD_NUMBERS.items() for v in values],
)
async def test_numbers_out_of_range_are_refused(refused, field, value, allowed):
    await refused([field, repr(value), allowed], **{field: value})


@pytest.mark.parametrize("field", ["quality_threshold", "max_concurrency", "num_variations"])
async def test_a_number_beyond_all_floats_is_refused_like_any_other(refused, field):
    await refused([field], **{field: 10**400})


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("chain", "last", "previous, first, none"),
        ("score_text", "sent", "original, enhanced"),
        ("seed", True, "whole number"),
        ("seed", 1.5, "whole number"),
        ("seed", "7", "whole number"),
        ("aspect_ratio", "wide", "16:9"),
        ("aspect_ratio", None, "16:9"),
        ("budget_usd", 5.0, "price"),
        ("budget_usd", 0, "above 0"),
        ("journal", "run.db", "None"),
        ("weights", {"clip_score": 1.0}, "pickscore"),
        ("weights", {"pickscore": -1.0}, ">= 0"),
        ("weights", {"pickscore": NAN}, "finite"),
    ],
)
async def test_settings_that_do_not_exist_are_refused(refused, field, value, allowed):
    await refused([field, allowed], **{field: value})


async def test_an_aspect_ratio_that_the_model_lacks_is_refused_with_those_it_has(refused):
    images = FakeImages(aspect_ratios=("1:1", "4:3"))
    await refused(["aspect_ratio", "'16:9'", "1:1", "4:3"], images=images)


async def test_two_scorers_of_one_name_are_refused(refused):
    await refused(["scorers", "pickscore"], scorers=[FakeScorer(), FakeScorer()])


ODD = ["", " ", ".", "..", "../x", "a/b", "a b", ".x", "-x", "x" * 65, "ä", "x\n", "x\0", 5]


@pytest.mark.parametrize("name", ODD)
async def test_names_that_are_no_safe_file_names_are_refused(refused, name):
    await refused(["generation_id", repr(name)[:20], "[A-Za-z0-9]"], run={"generation_id": name})


@pytest.mark.parametrize("scenes", [[], ["a", " \n"], [""]])
async def test_no_scenes_and_blank_prompts_are_refused(refused, scenes):
    story = Story(scenes=[Scene(prompt=prompt) for prompt in scenes])
    words = ["prompt", len(scenes), repr(scenes[-1])] if scenes else ["scenes", "one"]
    await refused(words, story)


@pytest.mark.parametrize("field", ["prompt", "continuity_note", "marker"])
async def test_text_that_is_no_unicode_is_refused_in_a_story_that_was_not_checked(refused, field):
    half, story = "half of an emoji: \ud83c", a_story(2)
    if field == "marker":
        story = story.model_copy(update={"consistency_markers": {"style": half}})
    else:
        scene = story.scenes[1].model_copy(update={field: half})
        story = story.model_copy(update={"scenes": [story.scenes[0], scene]})
    await refused([], story)


@pytest.mark.parametrize(
    "scenes, chain, user", [(2, "previous", 0), (2, "first", 0), (1, "previous", 1), (2, "none", 1)]
)
async def test_a_chain_or_a_user_image_needs_a_model_that_takes_references(
    refused, user_image, scenes, chain, user
):
    story = a_story(scenes, initial_reference_image=user_image if user else None)
    await refused(
        ["reference", "fake-images"], story, images=FakeImages(max_references=0), chain=chain
    )


@pytest.mark.parametrize("kind", ["missing", "text", "folder", "bmp", "empty", "truncated"])
async def test_a_user_image_that_is_none_is_refused(refused, tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    contents = {
        "text": b"hello",
        "bmp": picture(1, form="BMP"),
        "empty": b"",
        "truncated": picture(1)[:60],
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])
    await refused([path], a_story(1, initial_reference_image=path))


async def test_a_user_image_that_is_refused_is_named_as_a_field(refused, tmp_path):
    story = a_story(1, initial_reference_image=tmp_path / "missing.png")
    await refused(["initial_reference_image", "missing.png"], story)


@pytest.mark.parametrize("length", [0, 1, 3])
async def test_enhancements_of_another_length_are_refused(refused, length):
    made = await a_pipeline().enhance(a_story(3))
    await refused(["enhancements", length, 2], run={"enhancements": made[:length]})


async def test_what_run_refuses_enhance_refuses_too():
    pipeline = a_pipeline(num_variations=21)
    with pytest.raises(ValueError, match="num_variations"):
        await pipeline.enhance(a_story())
    assert pipeline.director.calls == []


# a person chooses


def shaded(chain: str = "previous", **settings) -> Pipeline:
    """Variation 2 of 3 wins everywhere."""
    images = drawn(lambda scene, v, attempt: picture({1: 51, 2: 204, 3: 102}[v]))
    return a_pipeline(images, num_variations=3, chain=chain, **settings)


async def test_a_choice_changes_the_reference_and_keeps_the_reason(run):
    before = await run(shaded(), a_story(3))
    copy = before.model_copy(deep=True)
    after = choose(before, 2, 3, "softer light 灯")
    scene = after.scenes[1]
    assert before == copy
    assert scene.reference_from == "human"
    assert scene.reference == before.scenes[1].variations[2].image.image_path
    assert after.references == [s.reference for s in after.scenes]
    assert [v.selected for v in scene.variations] == [False, False, True]
    assert [v.rank for v in scene.variations] == [v.rank for v in before.scenes[1].variations]
    assert after.history[-1].reason == "softer light 灯" and after.scenes[0] == before.scenes[0]


@pytest.mark.parametrize(
    "chain, scene, stale",
    [
        ("previous", 1, [2, 3, 4]),
        ("previous", 3, [4]),
        ("previous", 4, []),
        ("first", 1, [2, 3, 4]),
        ("first", 2, []),
        ("none", 1, []),
    ],
)
async def test_scenes_that_depend_on_a_choice_say_that_they_are_stale(run, chain, scene, stale):
    result = choose(await run(shaded(chain), a_story(4)), scene, 1, "because")
    assert [s.scene for s in result.scenes if s.stale] == stale


async def test_choosing_what_is_chosen_makes_nothing_stale(run):
    result = choose(await run(shaded(), a_story(3)), 1, 2, "I agree")
    assert result.scenes[0].reference_from == "human"
    assert not any(s.warnings for s in result.scenes)


async def test_all_choices_and_their_reasons_are_kept_through_a_file(run, tmp_path):
    result = choose(choose(await run(shaded(), a_story(3)), 1, 1, "one"), 1, 3, "two")
    result.save(tmp_path / "run.json")
    again = StoryResult.load(tmp_path / "run.json")
    assert again == result and [event.reason for event in again.history] == ["one", "two"]
    assert [bool(s.stale) for s in again.scenes] == [False, True, True]


@pytest.mark.parametrize("threshold, chosen, below", [(30, 1, True), (30, 3, False), (90, 2, True)])
async def test_whether_a_choice_is_below_the_threshold_is_said_of_the_choice(
    run, threshold, chosen, below
):
    result = choose(await run(shaded(quality_threshold=threshold), a_story(1)), 1, chosen, "so")
    assert result.scenes[0].below_threshold is below


@pytest.mark.parametrize("number", [0, -1, 4, True, 1.0, "1", None])
async def test_scenes_and_variations_that_are_not_there_cannot_be_chosen(run, number):
    result = await run(shaded(), a_story(3))
    with pytest.raises(ValueError, match="scene"):
        choose(result, number, 1, "so")
    with pytest.raises(ValueError, match="variation"):
        choose(result, 1, number, "so")


def test_a_carried_scene_has_nothing_to_choose_from(result):
    with pytest.raises(ValueError, match="variation"):
        choose(result, 2, 1, "so")


# a scene again


@pytest.mark.parametrize(
    "chain, scene, again",
    [
        ("previous", 1, {1, 2, 3}),
        ("previous", 2, {2, 3}),
        ("previous", 3, {3}),
        ("first", 1, {1, 2, 3}),
        ("first", 2, {2}),
        ("none", 1, {1}),
    ],
)
async def test_only_what_depends_on_a_scene_is_made_again(run, chain, scene, again):
    pipeline = shaded(chain)
    before = await run(pipeline, a_story(3))
    pipeline.image_model.requests.clear()
    asked = len(pipeline.director.calls), len(pipeline.critic.calls)
    after = await pipeline.rerun(before, scene)
    assert {at(r)[0] for r in pipeline.image_model.requests} == again
    assert (len(pipeline.director.calls), len(pipeline.critic.calls)) == asked
    for old, new in zip(before.scenes, after.scenes, strict=True):
        assert new.enhancement == old.enhancement
        assert (new != old and new.reference != old.reference) == (new.scene in again)
        assert old.reference.is_file() and new.reference.is_file()
    assert after.references == [s.reference for s in after.scenes]


async def test_a_rerun_goes_by_the_reference_that_a_person_chose(run):
    pipeline = shaded()
    chosen = choose(await run(pipeline, a_story(3)), 1, 3, "softer light")
    pipeline.image_model.requests.clear()
    after = await pipeline.rerun(chosen, 2)
    assert {r.references for r in pipeline.image_model.requests if at(r)[0] == 2} == {
        (chosen.references[0],)
    }
    assert after.scenes[0] == chosen.scenes[0]
    assert not any(scene.stale for scene in after.scenes)


async def test_a_rerun_keeps_the_reasons_of_earlier_choices(run):
    pipeline = shaded()
    chosen = choose(await run(pipeline, a_story(3)), 1, 3, "softer light")
    after = await pipeline.rerun(chosen, 2)
    assert after.scenes[0].reference_from == "human"
    assert [event.reason for event in after.events_since_drawn(1)] == ["softer light"]


async def test_a_choice_that_was_drawn_over_is_forgotten(run):
    pipeline = shaded()
    chosen = choose(await run(pipeline, a_story(3)), 2, 3, "softer light")
    after = await pipeline.rerun(chosen, 2)
    assert after.scenes[1].reference_from == "ranked" and after.events_since_drawn(2) == []


async def test_the_cost_of_a_rerun_counts_every_call_that_was_ever_paid(run):
    pipeline = a_pipeline(priced(0.04), max_enhancement_iterations=0)
    before = await run(pipeline, a_story(3))
    after = await pipeline.rerun(before, 3)
    assert (before.cost, after.cost) == (pytest.approx(0.24), pytest.approx(0.32))


async def test_a_paid_image_that_does_not_decode_and_a_call_that_raised_are_not_free(run):
    bad = GeneratedImage(data=b"<html>", cost=0.04)
    good = GeneratedImage(data=picture(9), cost=0.04)
    images = FakeImages(lambda request, number: bad if number == 1 else good)
    pipeline = a_pipeline(images, max_enhancement_iterations=0, num_variations=2)
    assert (await run(pipeline, a_story(1))).cost == pytest.approx(0.08)
    raising = FakeImages(lambda request, number: RuntimeError("x") if number == 1 else good)
    pipeline = a_pipeline(raising, max_enhancement_iterations=0, num_variations=2)
    assert (await run(pipeline, a_story(1), generation_id="y")).cost is None


async def test_a_rerun_keeps_the_first_settings_and_says_how_the_scene_was_made_again(run):
    before = await run(a_pipeline(seed=1), a_story(2))
    after = await a_pipeline(seed=2).rerun(before, 2)
    assert after.settings["seed"] == 1
    assert after.settings_of(1)["seed"] == 1 and after.settings_of(2)["seed"] == 2
    scored = await rescore(after, weights={"pickscore": 1})
    again = await a_pipeline(seed=3).rerun(scored, 2)
    assert again.settings_of(2)["seed"] == 3 and again.times_rerun(2) == 2
    kinds = [[event.kind for event in again.events_since_drawn(n)] for n in (1, 2)]
    assert kinds == [["rescore"], []]


async def test_a_veto_does_not_pass_on_to_the_pictures_that_replace_the_vetoed(run):
    before = await run(a_pipeline(), a_story(3))
    vetoed = veto(veto(before, 1, 1, "blurred"), 2, 1, "blurred")
    after = await a_pipeline().rerun(vetoed, 2)
    assert [list(vetoes(after, n)) for n in (1, 2)] == [[1], []]


async def test_what_is_made_again_from_a_stale_scene_is_stale(run):
    pipeline = a_pipeline()
    chosen = choose(await run(pipeline, a_story(3)), 1, 1, "better")
    after = await pipeline.rerun(chosen, 3)
    assert after.scenes[2].stale == chosen.scenes[1].stale


@pytest.mark.parametrize("order", [[1, 0], [0, 0]])
async def test_enhancements_of_other_scenes_are_refused(run, order):
    pipeline = a_pipeline()
    made = await pipeline.enhance(a_story(2))
    with pytest.raises(ValueError, match="enhancements: entry"):
        await run(pipeline, a_story(2), enhancements=[made[i] for i in order])
    assert pipeline.image_model.requests == []


async def test_a_new_prompt_is_enhanced_that_of_the_others_is_not(run):
    pipeline = shaded()
    before = await run(pipeline, a_story(3))
    pipeline.director.calls.clear()
    after = await pipeline.rerun(before, 2, prompt="a stormy harbour")
    assert len(pipeline.director.calls) == 1
    assert "a stormy harbour" in pipeline.director.calls[0][0][1].content
    assert [s.prompt[:8] for s in after.scenes] == ["a calm h", "a stormy", "a calm h"]
    assert after.scenes[1].enhancement.original_prompt == "a stormy harbour"
    assert after.scenes[2].enhancement == before.scenes[2].enhancement
    assert after.story.scenes[1].prompt == "a stormy harbour"
    assert before.story.scenes[1].prompt == "a calm harbour, view b"


async def test_a_saved_and_moved_result_can_be_rerun(run, tmp_path, user_image):
    pipeline = shaded()
    before = await run(pipeline, a_story(3, initial_reference_image=user_image))
    before.save(tmp_path / "run.json")
    new = tmp_path.with_name(tmp_path.name + "-moved")
    shutil.move(tmp_path, new)
    loaded = StoryResult.load(new / "run.json")
    pipeline.image_model.requests.clear()
    asked = len(pipeline.director.calls)
    after = await pipeline.rerun(loaded, 2)
    assert len(pipeline.director.calls) == asked and after.scenes[0] == loaded.scenes[0]
    assert {p.parent for p in after.references} == {new / "images"}
    everywhere = await pipeline.rerun(loaded, 1)
    images = pipeline.image_model
    assert received(FakeRequests(images.requests[-9:]), 3)[0] == new / "user.png"
    assert len(everywhere.references) == 3


class FakeRequests:
    """Some of a model's requests."""

    def __init__(self, requests):
        self.requests = requests


async def test_a_rerun_that_fails_carries_what_the_chain_gives(run):
    before = await run(shaded(), a_story(3))
    broken = a_pipeline(
        drawn(lambda scene, v, a: RuntimeError("boom") if scene == 2 else picture(v))
    )
    after = await broken.rerun(before, 2)
    assert [s.reference_from for s in after.scenes] == ["ranked", "carried", "ranked"]
    assert after.references[1] == before.references[0]


async def test_what_the_sandbox_made_stays_marked_after_a_rerun(run):
    stand_in = shaded()
    stand_in.image_model.name = "sandbox-painter"
    before = await run(stand_in, a_story(2))
    after = await shaded().rerun(before, 2)
    assert before.sandbox is True and after.sandbox is True


@pytest.mark.parametrize(
    "scene, prompt, word",
    [(0, None, "scene"), (3, None, "scene"), (True, None, "scene"), (1, " ", "prompt")],
)
async def test_a_rerun_of_what_is_not_there_is_refused(run, scene, prompt, word):
    pipeline = shaded()
    result = await run(pipeline, a_story(2))
    pipeline.image_model.requests.clear()
    with pytest.raises(ValueError, match=word):
        await pipeline.rerun(result, scene, prompt=prompt)
    assert pipeline.image_model.requests == []


async def test_a_rerun_whose_reference_is_gone_is_refused_before_anything_is_paid(run):
    pipeline = shaded()
    result = await run(pipeline, a_story(3))
    result.references[0].unlink()
    pipeline.image_model.requests.clear()
    with pytest.raises(ValueError, match=result.references[0].name):
        await pipeline.rerun(result, 2)
    assert pipeline.image_model.requests == []


async def test_a_result_without_its_story_cannot_be_rerun(run):
    result = (await run(a_pipeline())).model_copy(update={"story": None})
    with pytest.raises(ValueError, match="story"):
        await a_pipeline().rerun(result, 1)


# doors


def test_a_script_gets_its_result_without_awaiting(tmp_path):
    result = a_pipeline().run_sync(a_story(), generation_id="x", output_dir=tmp_path / "images")
    assert len(result.references) == 2


async def test_so_does_a_cell_of_a_notebook(tmp_path):
    result = a_pipeline().run_sync(a_story(), generation_id="x", output_dir=tmp_path / "images")
    assert len(result.references) == 2


async def test_load_gets_every_model_ready():
    loaded = []

    def loadable(model, role):
        model.load = lambda: loaded.append(role)
        return model

    scorer = loadable(FakeScorer(), "scorer")
    images = loadable(FakeImages(), "images")
    await a_pipeline(images, scorers=[scorer], director=loadable(director(), "director")).load()
    assert sorted(loaded) == ["director", "images", "scorer"]


async def test_load_fetches_first_and_what_one_model_lacks_costs_the_others_nothing():
    done = []
    lost, found = FakeScorer("clip_score"), FakeScorer()
    lost.fetch = lambda: (_ for _ in ()).throw(OSError("no route to the hub"))
    lost.load = lambda: done.append("loaded what was not there")
    found.fetch, found.load = lambda: done.append("fetched"), lambda: done.append("loaded")
    with pytest.raises(OSError, match="clip_score: no route to the hub"):
        await a_pipeline(FakeImages(), scorers=[lost, found]).load()
    assert done == ["fetched", "loaded"]


# defaults


KEY, BASE, TOKEN = "OPENAI_API_KEY", "OPENAI_BASE_URL", "REPLICATE_API_TOKEN"
MODEL = "REFIMG_IMAGE_MODEL"


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, "sandbox"),
        ({KEY: "k"}, "real"),
        ({KEY: "k", TOKEN: ""}, "real"),
        ({KEY: "k", BASE: " "}, "real"),
        ({"REFIMG_SANDBOX": "0", KEY: "k"}, "real"),
        ({BASE: "http://localhost", MODEL: "openai:tiny"}, "real"),
        ({KEY: "k", TOKEN: "t"}, "real"),
        ({BASE: "http://localhost", TOKEN: "t"}, "real"),
        ({KEY: "k", BASE: "http://localhost", TOKEN: "t"}, "real"),
        ({KEY: "", TOKEN: ""}, "sandbox"),
        ({"REFIMG_SANDBOX": "1"}, "sandbox"),
        ({"REFIMG_SANDBOX": "1", KEY: "k", TOKEN: "t"}, "sandbox"),
        ({"REFIMG_SANDBOX": "1", KEY: "k"}, "sandbox"),
        ({"REFIMG_SANDBOX": "0", KEY: "k", TOKEN: "t"}, "real"),
        ({"REFIMG_SANDBOX": "", KEY: "k", TOKEN: "t"}, "real"),
    ],
)
def test_the_environment_says_which_world(monkeypatch, env, expected):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert defaults.world() == expected


@pytest.mark.parametrize(
    "env, named",
    [
        ({BASE: "http://localhost"}, f"{MODEL} is not set, nor {TOKEN}"),
        ({BASE: "http://localhost", KEY: "k"}, f"{MODEL} is not set, nor {TOKEN}"),
        ({MODEL: "openai:gpt-image-2"}, f"{KEY} is not set, nor {BASE}"),
        ({MODEL: "google/nano-banana-2"}, f"{KEY} is not set, nor {BASE}"),
        ({KEY: "k", MODEL: "midjourney:7"}, MODEL), ({KEY: "k", MODEL: "openai:"}, MODEL),
        ({KEY: "k", MODEL: "openai:gpt-5.5"}, "model must be an image model"),
        ({KEY: "k", MODEL: "replicate:a/b"}, TOKEN),
        ({TOKEN: "t"}, KEY),
        ({"REFIMG_SANDBOX": "0", TOKEN: "t"}, KEY),
        ({"REFIMG_SANDBOX": "0"}, "REFIMG_SANDBOX"),
        ({"REFIMG_SANDBOX": "yes"}, "REFIMG_SANDBOX"),
    ],
)
def test_half_of_what_is_needed_is_an_error_that_names_the_rest(monkeypatch, env, named):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        defaults.world()
        Pipeline.from_env()
    with pytest.raises(ValueError, match=named):
        Pipeline.from_env()


@pytest.mark.parametrize(("env", "name"), [
    ({KEY: "k"}, "openai:gpt-image-2"),
    ({KEY: "k", MODEL: "openai:gpt-image-1.5"}, "openai:gpt-image-1.5"),
    ({KEY: "k", TOKEN: "t"}, "replicate:google/nano-banana-2"),
    ({KEY: "k", TOKEN: "t", MODEL: "openai:gpt-image-2"}, "openai:gpt-image-2"),
    ({KEY: "k", TOKEN: "t", MODEL: "replicate:a/b"}, "replicate:a/b"),
    ({BASE: "http://here:1/v1", TOKEN: "t", MODEL: "a/b:c1"}, "replicate:a/b:c1"),
    ({BASE: "http://here:1/v1", MODEL: "openai:tiny"}, "openai:tiny @ here:1"),
])
def test_the_environment_says_what_draws(monkeypatch, env, name):
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert Pipeline.from_env(scorers=[], journal=None).image_model.name == name


async def test_the_sandbox_is_announced_with_one_warning(run, caplog):
    caplog.set_level(logging.INFO, "refimg")
    pipeline = Pipeline.from_env(
        num_variations=1, max_enhancement_iterations=0, quality_threshold=0.0
    )
    result = await run(pipeline, a_story(1))
    said = [r for r in caplog.records if "sandbox" in r.getMessage() and r.levelname == "WARNING"]
    assert len(said) == 1 and result.sandbox is True
    assert all(name in said[0].getMessage() for name in ("sandbox-painter", "sandbox-director"))


def test_a_sandbox_that_was_asked_for_is_one_quiet_line(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "refimg")
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    Pipeline.from_env()
    said = [r for r in caplog.records if r.name == "refimg.defaults"]
    assert [r.levelname for r in said] == ["INFO"]
    assert "sandbox-painter" in said[0].getMessage()


async def test_a_pipeline_of_ones_own_models_says_nothing_of_the_sandbox(run, caplog):
    caplog.set_level(logging.INFO, "refimg.defaults")
    assert (await run(a_pipeline())).sandbox is False
    assert not [r for r in caplog.records if r.name == "refimg.defaults"]


JUDGES = ["pickscore", "clip_score", "aesthetic", "consistency"]


@pytest.mark.parametrize("keys", [False, True])
async def test_real_images_without_weights_are_unscored_never_judged_by_stand_ins(
    run, tmp_path, monkeypatch, keys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for name in (KEY, TOKEN) if keys else ():
        monkeypatch.setenv(name, "secret")
    result = await run(a_pipeline(scorers=None))
    judges = [judge["name"] for judge in result.settings["scorers"]]
    assert judges == JUDGES == [*defaults.available()]
    assert all("HF_HUB_OFFLINE" in reason for reason in defaults.available().values())
    best = result.scenes[0].variations[0].scores
    assert best.overall is None and "no weights for pickscore" in best.notes["pickscore"]
    assert result.sandbox is False
    assert [(s.reference_from, s.below_threshold) for s in result.scenes] == [("first", None)] * 2
    assert all("unscored" in s.warnings[-1] for s in result.scenes)


def test_the_sandboxs_images_are_judged_by_its_own_scorers():
    pipeline = Pipeline.from_env()
    assert [s.name for s in pipeline.scorers] == JUDGES
    assert all(s.model.startswith("sandbox") for s in pipeline.scorers)
    assert [s.name for s in defaults.scorers(pipeline.image_model)] == JUDGES


def test_settings_given_to_from_env_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    images, scorer = FakeImages(), FakeScorer()
    pipeline = Pipeline.from_env(image_model=images, scorers=[scorer], chain="none")
    assert (pipeline.image_model, pipeline.scorers, pipeline.chain) == (images, [scorer], "none")


async def test_a_result_is_short_in_print(run):
    result = await run(a_pipeline(), a_story(1))
    assert len(str(result)) < 100 and len(str(result.scenes[0])) < 100


async def test_a_result_saved_through_a_link_comes_back(run, tmp_path):
    result = await run(a_pipeline(), a_story(1))
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "run.json"
    link.symlink_to(tmp_path / "elsewhere" / "run.json")
    result.save(link)
    assert StoryResult.load(link).references == result.references


async def test_a_rerun_draws_with_other_seeds(run):
    pipeline = a_pipeline(seed=1)
    before = await run(pipeline, a_story(2))
    after = await pipeline.rerun(before, 2)
    seeds = [v.image.seed for r in (before, after) for v in r.scenes[1].variations]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("chosen, said", [(1, ["below threshold: 3.9 < 5"]), (2, [])])
async def test_the_verdict_in_the_warnings_is_the_choices_not_the_old_winners(run, chosen, said):
    images = FakeImages(lambda request, number: picture(10 * number))
    before = await run(a_pipeline(images, quality_threshold=5.0), a_story(1))
    after = choose(choose(before, 1, 1, "softer"), 1, chosen, "on second thoughts")
    assert [w for w in after.scenes[0].warnings if w.startswith("below")] == said
