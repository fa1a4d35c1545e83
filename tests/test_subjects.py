"""Subjects: where a text names them, what a scene shows, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimg
from refimg.engine.subjects import comparable, find_named, mentioned
from refimg.pipeline import Scene, Story, Subject


def test_the_package_exports_the_record():
    assert refimg.Subject is Subject and "Subject" in refimg.__all__


# where a text names them


NAMED = {
    "a name": ("Mara climbs", "Mara"),
    "in another case": ("MARA climbs", "mara"),
    "at the end, before a stop": ("The lamp of Mara.", "Mara"),
    "English possessive": ("Mara's coat", "Mara"),
    "with a curly apostrophe": ("Mara\u2019s coat", "Mara"),
    "German possessive": ("Jonas' Mantel", "Jonas"),
    "French elision": ("la lampe d'Anna", "Anna"),
    "in quotation marks": ("\u201eMara\u201c ruft", "Mara"),
    "between dashes": ("the girl\u2014Mara\u2014runs", "Mara"),
    "of several words": ("old captain Ann Lee waits", "Ann Lee"),
    "across a line break": ("old Ann\n  Lee waits", "Ann Lee"),
    "with an apostrophe, typed otherwise": ("Miss O\u2019Neill", "O'Neill"),
    "with a hyphen": ("Mary-Jane runs", "Mary-Jane"),
    "with a digit": ("R2-D2 rolls", "R2-D2"),
    "decomposed accents": ("Zoe\u0308 runs", "Zo\u00eb"),
    "composed accents": ("Zo\u00eb runs", "Zoe\u0308"),
    "full width": ("\uff2d\uff41\uff52\uff41 runs", "Mara"),
    "with a soft hyphen": ("Ma\u00adra runs", "Mara"),
    "sharp s": ("STRASSE im Regen", "Straße"),
    "Turkish dotted": ("İPEK gülüyor", "ipek"),
    "Turkish dotless": ("IŞIL gülüyor", "Işıl"),
    "Greek with a final sigma": ("Ο ΝΙΚΟΣ τρέχει", "Νίκος".replace("ί", "ι")),
    "Cyrillic": ("МАРА у моря", "Мара"),
    "Arabic": ("تقف مارا عند البحر", "مارا"),
    "Hebrew": ("מארה רצה", "מארה"),
    "Hindi": ("राम खड़ा है", "राम"),
    "Chinese": ("老灯塔里花子在看书", "花子"),
    "Japanese before a particle": ("灯台で花子が走る", "花子"),
    "Japanese kana": ("むかしさくらは走った", "さくら"),
    "Japanese katakana": ("海辺のマラが走る", "マラ"),
    "half-width katakana": ("海辺のﾏﾗが走る", "マラ"),
    "Thai": ("หญิงชื่อมาลียืนอยู่", "มาลี"),
    "Latin inside Chinese": ("灯塔里Mara在看书", "Mara"),
    "Korean with a particle": ("바닷가에서 지수는 웃는다", "지수"),
    "an emoji": ("a 🐉 over the hills", "🐉"),
    "an emoji with its variant sign": ("a ❤\ufe0f on the wall", "❤"),
}

NOT_NAMED = {
    "inside a word": ("Anna runs", "Ann"),
    "at the end of a word": ("Joann runs", "Ann"),
    "in a word with a hyphen": ("Ann-Kathrin runs", "Ann"),
    "behind a hyphen": ("a moth-lamp", "lamp"),
    "with a digit behind": ("R2D2 rolls", "R2"),
    "in a longer number": ("Lamp 30", "Lamp 3"),
    "with another accent": ("Zoë runs", "Zoe"),
    "words apart": ("Ann and Lee", "Ann Lee"),
    "inside a Cyrillic word": ("Марафон", "Мара"),
    "before a vowel sign": ("रामायण", "राम"),
    "inside a run of katakana": ("マラソンの朝", "マラ"),
    "inside a Korean word": ("한지수는 웃는다", "지수"),
    "before a Thai tone mark": ("ม่า", "ม"),
    "in no way": ("", "Mara"),
}


@pytest.mark.parametrize("text, name", NAMED.values(), ids=NAMED)
def test_a_name_is_found(text, name):
    assert mentioned(text, ["somebody else", name]) == [name]


@pytest.mark.parametrize("text, name", NOT_NAMED.values(), ids=NOT_NAMED)
def test_a_name_is_not_found_inside_other_words(text, name):
    assert mentioned(text, [name]) == []


OVERLAPS = [
    ("Ann Lee waits", ["Ann", "Ann Lee"], ["Ann Lee"]),
    ("Ann Lee waits", ["Ann Lee", "Ann", "Lee"], ["Ann Lee"]),
    ("Ann waits for Ann Lee", ["Ann Lee", "Ann"], ["Ann", "Ann Lee"]),
    ("Ann Lee waits for Ann", ["Ann", "Ann Lee"], ["Ann Lee", "Ann"]),
    ("Old Tom Bombadil", ["Old Tom", "Tom Bombadil"], ["Tom Bombadil"]),
    ("小花子和花子", ["花子", "小花子"], ["小花子", "花子"]),
    ("Theo, Mara, Theo", ["Mara", "Theo"], ["Theo", "Mara"]),
]


@pytest.mark.parametrize("text, names, found", OVERLAPS)
def test_the_longer_name_wins_and_names_come_in_the_order_of_the_text(text, names, found):
    assert mentioned(text, names) == found


WORDS = st.text("aAbB '-.\u00e9\u0301猫マ지ม่", max_size=12)


@given(WORDS, st.lists(WORDS.filter(comparable), unique_by=comparable, max_size=4))
def test_what_is_found_was_asked_for_and_stands_there(text, names):
    found = mentioned(text, names)
    assert len(set(found)) == len(found) and set(found) <= set(names)
    assert all(comparable(name) in comparable(text) for name in found)
    assert set(mentioned(text.upper(), names)) == set(found)


@given(WORDS.filter(lambda name: comparable(name)[:1].strip("\u0301\u0e48")))
def test_a_name_that_stands_alone_between_commas_is_found(name):
    assert mentioned(f"x , {name} , y", [name]) == [name]


@given(st.text())
def test_the_form_for_comparing_is_final(text):
    assert comparable(comparable(text)) == comparable(text)


def test_a_long_prompt_with_many_names_is_read():
    names = [f"a {'a ' * k}b" for k in range(40)]
    assert mentioned("a " * 3000, names) == []


def test_the_nearest_name_is_told():
    assert find_named(" MARA ", ["Theo", "Mara"], "x") == "Mara"
    with pytest.raises(ValueError, match=r"^x must be a known name, such as 'Mara', got 'Maria'$"):
        find_named("Maria", ["Theo", "Mara"], "x")
    with pytest.raises(ValueError, match=r"^x must be left out: none is known, got 'Mara'$"):
        find_named("Mara", [], "x")


# the record


BAD_SUBJECTS = {
    "blank": ({"name": " "}, "name.*on one line without /, got ' '"),
    "invisible": ({"name": "\u200b\u00ad"}, "name.*on one line"),
    "two lines": ({"name": "Mara\nTheo"}, "name.*on one line"),
    "a slash": ({"name": "Mara/coat"}, "name.*without /"),
    "the mark of a story's only subject": ({"name": " * "}, "name"),
    "another kind": ({"name": "M", "kind": "animal"}, "kind"),
    "a misspelt field": ({"name": "M", "image": "a.png"}, "image"),
    "an address": ({"name": "M", "images": ["https://a.b/c.png"]}, "images.*this machine"),
    "a data address": ({"name": "M", "images": ["data:image/png;base64,AA"]}, "images.*this"),
    "an address of a look": (
        {"name": "M", "looks": {"x": ""}, "look_images": {"x": "s3://a/b.png"}},
        "look_images.*this machine",
    ),
    "a look twice": ({"name": "M", "looks": {"Coat": "a", "coat ": "b"}}, "looks.*differently"),
    "a blank look": ({"name": "M", "looks": {"": "a"}}, "looks.*on one line, got ''"),
    "an image of no look": (
        {"name": "M", "looks": {"coat": "a"}, "look_images": {"cot": "a.png"}},
        "look_images.*such as 'coat', got 'cot'",
    ),
    "two images of a look": (
        {"name": "M", "looks": {"coat": "a"}, "look_images": {"coat": "a", "COAT": "b"}},
        "look_images.*differently",
    ),
}


@pytest.mark.parametrize("fields, match", BAD_SUBJECTS.values(), ids=BAD_SUBJECTS)
def test_a_bad_subject_is_refused(fields, match):
    with pytest.raises(ValueError, match=f"(?s){match}"):
        Subject(**fields)


def test_names_lose_only_the_blanks_around_them():
    made = Subject(name=" Ann Lee ", looks={" torn coat ": "x"}, look_images={"TORN COAT": "a.png"})
    assert made.name == "Ann Lee" and made.looks == {"torn coat": "x"}
    assert list(made.look_images) == ["torn coat"]
    assert Subject.model_validate_json(made.model_dump_json()) == made


def test_the_image_of_a_look_comes_before_the_others():
    made = Subject(name="M", images=["a.png", "b.png"], looks={"x": "", "y": ""},
                   look_images={"x": "b.png"})
    told = {look: [path.name for path in made.sheets(look)] for look in (None, "x", "y")}
    assert told == {None: ["a.png", "b.png"], "x": ["b.png", "a.png"], "y": ["a.png", "b.png"]}


# a story of subjects


def story(*scenes, subjects=("Mara", "Theo", "Ann", "Ann Lee"), **fields) -> Story:
    listed = [{"name": name} if isinstance(name, str) else name for name in subjects]
    scenes = [{"prompt": s} if isinstance(s, str) else {"prompt": "p"} | s for s in scenes]
    return Story(scenes=scenes, subjects=listed, **fields)


MARA = {"name": "Mara", "looks": {"torn coat": "grey", "red dress": "silk"}}

SHOWN = {
    "by its prompt": ("Theo and Mara", ["Theo", "Mara"]),
    "nobody": ("the sea", []),
    "by its list": ({"prompt": "Theo", "subjects": ["mara"]}, ["Mara"]),
    "an empty list": ({"prompt": "Theo", "subjects": []}, []),
    "absent": ({"prompt": "Theo", "subject_present": False}, []),
    "absent, but listed": ({"subject_present": False, "subjects": ["Theo"]}, ["Theo"]),
}


@pytest.mark.parametrize("scene, found", SHOWN.values(), ids=SHOWN)
def test_what_a_scene_shows(scene, found):
    assert list(story(scene).shows(1)) == found


def test_a_scene_may_show_a_look():
    made = story({"subjects": ["MARA / Torn Coat", "Theo"]}, subjects=[MARA, "Theo"])
    assert made.shows(1) == {"Mara": "torn coat", "Theo": None}


def test_a_story_without_subjects_shows_its_own():
    made = story("a fox", {"subject_present": False}, {"subjects": []}, subjects=())
    assert [made.shows(n) for n in (1, 2, 3)] == [{"*": None}, {}, {}]


BAD_STORIES = {
    "unknown": (["a", {"subjects": ["Marra"]}], "subjects of scene 2 must be .*'Mara', got"),
    "an unknown look": (
        [{"subjects": ["mara/torn cot"]}],
        "subjects of scene 1, look of 'Mara' must be .*'torn coat', got 'torn cot'",
    ),
    "a look that is blank": ([{"subjects": ["Mara/"]}], "look of 'Mara' must be .*got ''"),
    "twice in a scene": (
        [{"subjects": ["Mara", "mara/torn coat"]}],
        "subjects of scene 1 must be each there once",
    ),
    "follows itself": (["a", {"follows": 2}], r"follows of scene 2 must be .*\(1 to 1\).*got 2"),
    "follows a later one": (["a", {"follows": 3}, "b"], "follows of scene 2 .*got 3"),
    "follows scene 0": (["a", {"follows": 0}], "follows of scene 2 .*got 0"),
    "follows one before 0": (["a", {"follows": -1}], "follows of scene 2 .*got -1"),
    "the first follows": ([{"follows": 1}], "follows of scene 1 must be 'none' or left out, got 1"),
    "follows a word": (["a", {"follows": "first"}], "number of an earlier scene or 'none', got"),
    "follows a truth value": (["a", {"follows": True}], "number of an earlier scene .*got True"),
    "follows half a scene": (["a", {"follows": 1.5}], "number of an earlier scene .*got 1.5"),
}


@pytest.mark.parametrize("scenes, match", BAD_STORIES.values(), ids=BAD_STORIES)
def test_a_bad_scene_is_refused(scenes, match):
    with pytest.raises(ValueError, match=match):
        story(*scenes, subjects=[MARA, "Theo"])


@pytest.mark.parametrize(
    "one, other", [("Mara", "mara"), ("Zoë", "Zoe\u0308"), ("Mara", "\uff2dara"), ("ß", "SS"),
                   ("Mara", "Ma\u200bra"), ("Ann Lee", "ann  lee")],
)
def test_a_subject_twice_is_refused(one, other):
    with pytest.raises(ValueError, match="subjects must be named differently"):
        story("a", subjects=[one, "Theo", other])


def test_a_subject_in_a_story_without_any_is_refused():
    with pytest.raises(ValueError, match="subjects of scene 1 must be left out: none is known"):
        story({"subjects": ["Mara"]}, subjects=())


@pytest.mark.parametrize("given, kept", [("1", 1), (" 1 ", 1), (1, 1), ("none", "none"),
                                         ("None", "none"), (None, None)])
def test_what_a_scene_may_follow(given, kept):
    made = story("a", {"follows": given})
    assert made.scenes[1].follows == kept
    assert Story.model_validate_json(made.model_dump_json()) == made


# in files


TEXT = """\
scenes:
  - prompt: Mara in the fog
  - prompt: The sea
    subjects: []
    follows: none
  - prompt: She runs
    subjects: [Mara/torn coat]
    follows: 1
subjects:
  - name: Mara
    description: a keeper of forty, red hair
    images: [sheets/mara.png]
    looks:
      torn coat: a grey coat, torn at the hem
    look_images:
      torn coat: sheets/torn.png
  - {name: 007, kind: object}
"""


def test_a_story_with_subjects_is_read_from_yaml(tmp_path):
    path = tmp_path / "story.yaml"
    path.write_text(TEXT, "utf-8")
    made = Story.load(path)
    assert [list(made.shows(n).items()) for n in (1, 2, 3)] == [
        [("Mara", None)], [], [("Mara", "torn coat")]]
    assert [scene.follows for scene in made.scenes] == [None, "none", 1]
    mara, other = made.subjects
    assert mara.sheets("torn coat") == [tmp_path / "sheets/torn.png", tmp_path / "sheets/mara.png"]
    assert (other.name, other.kind, other.sheets()) == ("007", "object", [])


def test_paths_are_absolute_once_a_story_is_normalized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    look = {"looks": {"x": ""}, "look_images": {"x": "b.png"}}
    made = story("a", subjects=[{"name": "M", "images": ["a.png"]} | look]).normalized()
    assert made.subjects[0].sheets("x") == [tmp_path / "b.png", tmp_path / "a.png"]


@pytest.mark.parametrize("text, told", [
    ("scenes: [{prompt: a, subjects: [Marra]}]\nsubjects: [{name: Mara}]",
     ": subjects of scene 1 must be a known name, such as 'Mara', got 'Marra'"),
    ("scenes: [{prompt: a}]\nsubjects: [{name: Mara}, {name: a/b}]",
     ": subject 2, name: must be a name on one line without /, got 'a/b'"),
    ("scenes: [{prompt: a}, {prompt: a, follows: first}]",
     ": scene 2, follows: must be the number of an earlier scene or 'none', got 'first'"),
    ("scenes: [{prompt: a}]\nsubjects: [{name: M, images: ['http://a/b.png']}]",
     ": subject 1, images, 0: must be the path of a file on this machine, so save the image first"),
])
def test_what_is_wrong_in_a_file_is_told_in_one_line(tmp_path, text, told):
    path = tmp_path / "story.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError) as caught:
        Story.load(path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_story_of_before_is_read_as_it_was():
    old = {"scenes": [{"prompt": "a"}], "title": "", "consistency_markers": {}, "brand": None,
           "initial_reference_image": None}
    made = Story.model_validate_json(json.dumps(old))
    assert made.subjects == [] and made.scenes == [Scene(prompt="a")]
    assert made.scenes[0].subjects is None and made.scenes[0].follows is None
