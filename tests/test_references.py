"""The plan of references: who waits for whom, what goes along, and what images are compared with.

A story is written as one word for each scene: the letters are the subjects that it shows, "*" the
story's own one, "-" nothing; what follows a colon is `Scene.follows`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimg.engine.references import Chain, Reference, ReferencePlan, References
from refimg.pipeline import Story

KINDS = ("previous", "first", "anchored", "none")
USER = "user.png"


def a_story(scenes: str, user: str | None = None, **images: str) -> Story:
    """The images of a subject are given by its letter, separated by blanks."""
    words = [word.partition(":") for word in scenes.split()]
    letters = sorted({c for shown, *_ in words for c in shown if c.isalpha()} | set(images))
    told = [{"prompt": "p", "follows": follows or None, "subject_present": shown != "-"}
            | ({"subjects": list(shown.strip("-"))} if letters else {})
            for shown, _, follows in words]
    subjects = [{"name": c, "images": images.get(c, "").split()} for c in letters]
    return Story(scenes=told, subjects=subjects, initial_reference_image=user)


def made(story: Story, *lost: int) -> dict[int, Path | None]:
    """A reference "N.png" for each scene but for the lost ones."""
    return {n: None if n in lost else Path(f"{n}.png") for n in range(1, len(story.scenes) + 1)}


def sent(story: Story, kind: str, number: int, most: int = 14, *lost: int) -> str:
    plan = ReferencePlan(Chain(story, kind), most)
    return " ".join(path.stem for path in plan.references(number, made(story, *lost)).paths)


def agreed(story: Story, kind: str, number: int, *lost: int) -> str:
    plan = ReferencePlan(Chain(story, kind), 1)
    return " ".join(path.stem for path in plan.agreement(number, made(story, *lost)))


def by_scene(function, story: Story, kind: str, *more) -> list[str]:
    return [function(story, kind, n, *more) for n in range(1, len(story.scenes) + 1)]


# what goes along, computed by hand: for each scene the images in their order


TABLES = {
    # the story's own subject
    ("* * * *", "previous"): ["", "1", "2", "3"],
    ("* * * *", "first"): ["", "1", "1", "1"],
    ("* * * *", "anchored"): ["", "1", "2 1", "3 1"],
    ("* * * *", "none"): ["", "", "", ""],
    # a scene without it is passed over, and takes the style alone
    ("* - * *", "previous"): ["", "1", "1", "3"],
    ("* - * *", "first"): ["", "1", "1", "1"],
    ("* - * *", "anchored"): ["", "1", "1", "3 1"],
    ("* - - *", "previous"): ["", "1", "2", "1"],
    ("* - - *", "first"): ["", "1", "1", "1"],
    ("* - - *", "anchored"): ["", "1", "2", "1"],
    # the anchor is the first scene that shows something
    ("- * * *", "previous"): ["", "1", "2", "3"],
    ("- * * *", "first"): ["", "1", "2", "2"],
    ("- * * *", "anchored"): ["", "1", "2", "3 2"],
    ("- - * -", "first"): ["", "1", "2", "3"],
    ("- - * -", "anchored"): ["", "1", "2", "3"],
    # nothing is shown at all: the style alone
    ("- - -", "previous"): ["", "1", "2"],
    ("- - -", "first"): ["", "1", "1"],
    ("- - -", "anchored"): ["", "1", "2"],
    # subjects without images: the nearest scene with all of them, else with most of them
    ("M T MT M", "previous"): ["", "1", "2", "3"],
    ("M T M T", "previous"): ["", "1", "1", "2"],
    ("MT M T MT", "previous"): ["", "1", "1", "1"],
    ("MT TA MA M", "previous"): ["", "1", "2", "3"],
    ("M T M T", "first"): ["", "1", "1", "1"],
    ("M T M T", "anchored"): ["", "1", "1", "2 1"],
    ("M - T TM", "anchored"): ["", "1", "2 1", "3 1"],
}  # fmt: skip


@pytest.mark.parametrize("scenes, kind", TABLES)
def test_what_the_chain_hands_on(scenes, kind):
    assert by_scene(sent, a_story(scenes), kind) == TABLES[scenes, kind]


WITH_USER = {
    ("* * *", "previous"): ["user", "1", "2"],
    ("* * *", "first"): ["user", "user", "user"],
    ("* * *", "anchored"): ["user", "1 user", "2 user"],
    ("* * *", "none"): ["user", "", ""],
    ("- * -", "previous"): ["user", "user", "2"],
    ("- * -", "first"): ["user", "user", "user"],
    ("- * -", "anchored"): ["user", "user", "2"],
    ("- * *", "anchored"): ["user", "user", "2 user"],
}


@pytest.mark.parametrize("scenes, kind", WITH_USER)
def test_the_users_image_is_the_anchor(scenes, kind):
    assert by_scene(sent, a_story(scenes, USER), kind) == WITH_USER[scenes, kind]


WITH_IMAGES = {  # Mara has two images, Theo one, Ann none
    ("M MT - T MTA", "previous"): ["m1 m2", "1 m1 t1 m2", "2", "2 t1", "2 m1 t1 m2"],
    ("M MT - T MTA", "first"): ["m1 m2", "1 m1 t1 m2", "1", "1 t1", "1 m1 t1 m2"],
    ("M MT - T MTA", "anchored"): ["m1 m2", "1 m1 t1 m2", "2", "2 t1", "2 m1 t1 1 m2"],
    ("M MT - T MTA", "none"): ["m1 m2", "m1 t1 m2", "", "t1", "m1 t1 m2"],
    ("A A M A", "anchored"): ["", "1", "2 m1 m2", "2 1"],
}


@pytest.mark.parametrize("scenes, kind", WITH_IMAGES)
def test_the_images_of_the_subjects_shown_go_along(scenes, kind):
    story = a_story(scenes, M="m1.png m2.png", T="t1.png")
    assert by_scene(sent, story, kind) == WITH_IMAGES[scenes, kind]


@pytest.mark.parametrize("most, found, left", [
    (0, "", "scene 4; M (m1.png); its anchor, scene 1; M (m2.png)"),
    (1, "4", "M (m1.png); its anchor, scene 1; M (m2.png)"),
    (2, "4 m1", "its anchor, scene 1; M (m2.png)"),
    (3, "4 m1 1", "M (m2.png)"),
    (14, "4 m1 1 m2", None),
])
def test_what_does_not_fit_is_left_out_from_the_end_and_told(most, found, left):
    story = a_story("MA T T MA MA", M="m1.png m2.png")
    assert sent(story, "anchored", 5, most) == found
    warnings = ReferencePlan(Chain(story, "anchored"), most).references(5, made(story)).warnings
    told = f"left out, since references are limited to {most}: {left}"
    assert warnings == ([told] if left else [])


FOLLOWS = {
    ("* * *:1 *", "previous"): ["", "1", "1", "3"],
    ("* * *:1 *", "anchored"): ["", "1", "1", "3 1"],
    ("* * *:2 *", "first"): ["", "1", "2", "1"],
    ("* * *:2 *", "none"): ["", "", "2", ""],
    ("* * *:none *", "previous"): ["", "1", "", "3"],
    ("* * *:none *", "anchored"): ["", "1", "", "3 1"],
    ("M M M:none M", "first"): ["m", "1 m", "m", "1 m"],
    ("*:none *", "previous"): ["", "1"],
}


@pytest.mark.parametrize("scenes, kind", FOLLOWS)
def test_a_scene_may_follow_another_one_or_none(scenes, kind):
    story = a_story(scenes, USER if scenes == "*:none *" else None,
                    **({"M": "m.png"} if "M" in scenes else {}))
    assert by_scene(sent, story, kind) == FOLLOWS[scenes, kind]


# what a scene waits for


WAITS = {
    ("* * * *", "previous"): [set(), {1}, {2}, {3}],
    ("* * * *", "first"): [set(), {1}, {1}, {1}],
    ("* * * *", "anchored"): [set(), {1}, {1, 2}, {1, 3}],
    ("* * * *", "none"): [set(), set(), set(), set()],
    ("* - * *", "previous"): [set(), {1}, {1}, {3}],
    ("- * - *", "first"): [set(), {1}, {2}, {2}],
    ("* * *:1 *:none", "anchored"): [set(), {1}, {1}, set()],
    ("M M M M", "anchored"): [set(), {1}, {2}, {3}],
}


@pytest.mark.parametrize("scenes, kind", WAITS)
def test_what_a_scene_waits_for(scenes, kind):
    chain = Chain(a_story(scenes, **({"M": "m.png"} if "M" in scenes else {})), kind)
    assert [chain.predecessors(n) for n in (1, 2, 3, 4)] == WAITS[scenes, kind]


def test_a_scene_that_is_compared_waits_for_the_anchor_too():
    chain = Chain(a_story("* - * *"), "none")
    assert [chain.predecessors(n, compared=True) for n in (1, 2, 3, 4)] == [set(), set(), {1}, {1}]
    chain = Chain(a_story("* * *", USER), "none")
    assert [chain.predecessors(n, compared=True) for n in (1, 2, 3)] == [set()] * 3


DEPENDENTS = {
    ("* * * *", "previous"): [[2, 3, 4], [3, 4], [4], []],
    ("* * * *", "first"): [[2, 3, 4], [], [], []],
    ("* - * *", "previous"): [[2, 3, 4], [], [4], []],
    ("* - * *", "none"): [[], [], [], []],
    ("* * *:1 *", "previous"): [[2, 3, 4], [], [4], []],
}


@pytest.mark.parametrize("scenes, kind", DEPENDENTS)
def test_which_later_scenes_are_drawn_from_a_scene(scenes, kind):
    chain = Chain(a_story(scenes), kind)
    assert [chain.dependents(n) for n in (1, 2, 3, 4)] == DEPENDENTS[scenes, kind]


def test_a_chain_of_before_has_the_dependents_of_before():
    """In a story that always shows its subject."""
    for n in range(1, 6):
        found = [Chain(a_story("* * * * *"), kind).dependents(n)
                 for kind in ("previous", "first", "none")]
        assert found == [list(range(n + 1, 6)), [2, 3, 4, 5] if n == 1 else [], []]


# what images are compared with


AGREED = {
    ("* * - *", None, ""): ["", "1", "", "1"],
    ("- * - *", None, ""): ["", "", "", "2"],
    ("* * - *", USER, ""): ["user", "user", "", "user"],
    ("- * -", USER, ""): ["", "user", ""],
    ("M T MT", None, ""): ["", "", "1"],
    ("M T MT", None, "m1.png m2.png"): ["m1 m2", "", "m1 m2 1"],
    ("* * *:2 *:none", None, ""): ["", "1", "2", ""],
    ("M M M:none", None, "m1.png"): ["m1", "m1 1", "m1"],
    ("M M", USER, "user.png"): ["user", "user"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenes, user, images", AGREED)
def test_what_images_are_compared_with_does_not_depend_on_the_chain(scenes, user, images, kind):
    story = a_story(scenes, user, **({"M": images} if "M" in scenes else {}))
    assert by_scene(agreed, story, kind) == AGREED[scenes, user, images]


# scenes without an image of their own


@pytest.mark.parametrize("kind, number, lost, found, told", [
    ("previous", 3, [2], "1", []),
    ("previous", 4, [2, 3], "1", []),
    ("first", 3, [1], "", ["it goes on without its anchor, since scene 1 has no image"]),
    ("anchored", 3, [1], "2", ["it goes on without its anchor, since scene 1 has no image"]),
    ("anchored", 4, [3], "2 1", []),
    ("anchored", 3, [2], "1", []),
    ("none", 3, [1, 2], "", []),
])
def test_a_scene_without_an_image_is_passed_over(kind, number, lost, found, told):
    story = a_story("* * * *")
    assert sent(story, kind, number, 14, *lost) == found
    plan = ReferencePlan(Chain(story, kind), 14)
    assert plan.references(number, made(story, *lost)).warnings == told
    missing = {n: path for n, path in made(story, *lost).items() if path}
    assert plan.references(number, missing) == plan.references(number, made(story, *lost))


def test_the_users_image_stands_in_for_a_scene_without_one():
    story = a_story("* * *", USER)
    assert [sent(story, kind, 2, 14, 1) for kind in KINDS] == ["user", "user", "user", ""]
    story = a_story("* * *:2", USER)
    assert [sent(story, "none", 3, 14, *lost) for lost in ([], [2])] == ["2", "user"]


def test_only_scenes_that_are_sure_to_be_done_stand_in():
    """Scene 3 does not wait for scene 2, so what it gets cannot depend on whether that is done."""
    story = a_story("* - * *")
    assert sent(story, "previous", 3, 14, 1) == "" and sent(story, "previous", 4, 14, 3) == "1"


def test_a_lost_anchor_is_compared_with_no_more():
    assert agreed(a_story("* * *"), "anchored", 3, 1) == ""


# what each is for


def told(story: Story, kind: str, number: int, most: int = 14) -> list[str]:
    return ReferencePlan(Chain(story, kind), most).references(number, made(story)).sentences


def test_each_reference_says_what_to_keep_and_what_is_new():
    story = a_story("MT - MT", USER, M="m.png")
    new = "place, light and framing are those described here."
    assert told(story, "anchored", 1) == [
        f"Image 1 is the image that the story starts from: keep the look of M and T, the style and "
        f"the medium; {new}",
        f"Image 2 shows M: keep the look of M; pose, {new}",
    ]
    assert told(story, "anchored", 2) == [
        "The reference image is the scene before: keep only the style and the medium; what is "
        f"shown, {new}"
    ]
    assert [text.partition(":")[0] for text in told(story, "anchored", 3)] == [
        "Image 1 is an earlier scene", "Image 2 shows M",
        "Image 3 is the image that the story starts from",
    ]
    assert told(a_story("* *"), "first", 2) == [
        f"The reference image is the scene before: keep the look of the subject, the style and the "
        f"medium; {new}"
    ]
    assert told(a_story("* *"), "none", 2) == []


def test_a_place_that_is_kept_is_not_new():
    scenes = [{"prompt": "Mara in the Harbour"}, {"prompt": "The Harbour"}, {"prompt": "Mara"}]
    places = [{"name": "Harbour", "kind": "place", "images": ["h.png"]}, {"name": "Mara"}]
    story = Story(scenes=scenes, subjects=places)
    assert told(story, "previous", 2)[1].endswith("keep the look of Harbour; light and framing "
                                                  "are those described here.")
    assert "place" not in told(story, "previous", 2)[0] and "place" in told(story, "previous", 3)[0]


LOOKS = {"name": "M", "images": ["m.png"], "looks": {"wet": "", "old": ""},
         "look_images": {"wet": "wet.png"}}


def test_the_image_of_a_look_comes_first_and_another_look_is_told():
    scenes = [{"prompt": "p", "subjects": [entry]} for entry in ("M", "M/wet", "M/wet", "M/old")]
    story = Story(scenes=scenes, subjects=[LOOKS])
    assert by_scene(sent, story, "previous") == ["m", "1 wet m", "2 wet m", "3 m"]
    assert by_scene(agreed, story, "previous") == ["m", "wet 1", "wet 1", "m 1"]
    other = "keep the identity of M (the look is another one)"
    assert [other in text for text in told(story, "previous", 2)] == [True, False, True]
    assert [other in text for text in told(story, "previous", 3)] == [False, False, True]
    assert [other in text for text in told(story, "previous", 4)] == [True, True]


def test_a_file_goes_along_once_and_shows_all_that_it_shows(tmp_path):
    (tmp_path / "both.png").write_bytes(b"x")
    os.symlink("both.png", tmp_path / "link.png")
    story = a_story("- MT", USER, M=f"{tmp_path}/both.png", T=f"{tmp_path}/link.png {USER}")
    plan = ReferencePlan(Chain(story, "anchored"), 3)
    first, second = plan.references(2, made(story)).sent
    assert (first.role, first.path.name, first.subjects) == ("initial", USER, ["M", "T"])
    assert (second.role, second.path.name, second.subjects) == ("subject", "both.png", ["M", "T"])
    assert [path.name for path in plan.agreement(2, made(story))] == ["both.png", USER]


def test_what_went_along_can_be_kept_in_a_record():
    story = a_story("MT M", M="m.png")
    found = ReferencePlan(Chain(story, "anchored"), 1).references(2, made(story))
    assert found.warnings and References.model_validate_json(found.model_dump_json()) == found
    assert found.sent[0] == Reference(path=Path("1.png"), role="previous", scene=1, subjects=["M"],
                                      purpose=found.sent[0].purpose)


# properties


@st.composite
def stories(draw) -> Story:
    own = draw(st.booleans())
    shown = st.sampled_from(["*", "-"]) if own else st.sampled_from(["M", "T", "MT", "TMA", "-"])
    words = []
    for number in range(1, draw(st.integers(1, 7)) + 1):
        follows = draw(st.sampled_from(["", "", "", "none", *map(str, range(1, number))]))
        words.append(f"{draw(shown)}:{follows}")
    files = st.lists(st.sampled_from(["a.png", "b.png", "c.png", USER]), max_size=3).map(" ".join)
    images = {} if own else {c: draw(files) for c in "MTA"}
    return a_story(" ".join(words), draw(st.sampled_from([None, USER])), **images)


@given(stories(), st.sampled_from(KINDS), st.sampled_from([0, 1, 2, 3, 14]), st.data())
def test_what_holds_for_every_plan(story, kind, most, data):
    count = len(story.scenes)
    lost = data.draw(st.sets(st.integers(1, count)))
    chain, have = Chain(story, kind), made(story, *lost)
    plan = ReferencePlan(chain, most)
    for n in range(1, count + 1):
        earlier = {m: path for m, path in have.items() if m < n}
        found, agreement = plan.references(n, earlier), plan.agreement(n, earlier)
        assert len(set(found.paths)) == len(found.paths) <= most
        assert len(set(agreement)) == len(agreement)
        assert all(m < n for m in chain.predecessors(n, compared=True))
        assert all(n in chain.dependents(m) for m in chain.ancestors(n))
        from_scenes = [item for item in found.sent if item.scene]
        assert all(have[item.scene] == item.path for item in from_scenes)
        assert {item.scene for item in from_scenes} <= chain.ancestors(n)
        shows = story.shows(n)
        assert all(set(item.subjects) <= set(shows) for item in found.sent)
        assert bool(shows) or not agreement
        assert have.get(n) not in agreement
        needed = chain.predecessors(n, compared=True) | chain.ancestors(n)
        assert plan.references(n, {m: have[m] for m in needed}) == found
        assert plan.agreement(n, {m: have[m] for m in needed}) == agreement
        whole = ReferencePlan(chain, 99).references(n, earlier)
        assert found.sent == whole.sent[:most]
        assert len(found.warnings) == len(whole.warnings) + (len(whole.sent) > most)
        roles = [item.role for item in whole.sent]
        handed = [role for role in roles if role != "subject"]
        assert len(handed) <= 2 and (not handed or roles[0] == handed[0] or kind == "anchored")
        assert len(found.sentences) == len(found.sent)
