"""What a text states: traps, long texts, hostile texts, and speed that grows with length only."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimg.sandbox.world import EMPTY, VOCABULARY, plural, read_prompt

PHRASES = [
    (attribute, value, phrase)
    for attribute, values in VOCABULARY.items()
    for value, phrases in values.items()
    for phrase in phrases
]
FREE = ("setting", "time", "weather", "framing", "style")


def test_the_vocabulary_is_large_enough_and_has_no_phrase_twice_in_one_attribute():
    least = {"setting": 8, "time": 4, "weather": 4, "subject": 12, "colour": 8, "style": 5}
    assert all(len(VOCABULARY[a]) >= n for a, n in least.items())
    assert {"red", "orange", "pink", "teal", "blue", "navy"} <= set(VOCABULARY["colour"])
    for attribute, values in VOCABULARY.items():
        phrases = [p for group in values.values() for p in group]
        assert len(phrases) == len(set(phrases)), attribute
        assert all(p == p.lower() for p in phrases)


@pytest.mark.parametrize(("attribute", "value", "phrase"), PHRASES)
def test_every_phrase_is_read_as_its_value(attribute, value, phrase):
    text = {
        "colour": f"A woman in a {phrase} coat",
        "count": f"{phrase} woman",
        "companion": f"A woman beside a {phrase}",
        "relation": f"A woman with a bench {phrase} her",
    }.get(attribute, f"Seen here: {phrase}, as said")
    if attribute == "relation" and phrase.split()[-1] not in ("of", "behind"):
        text = f"A woman, and a bench {phrase}"
    assert read_prompt(text).get(attribute) == value


@pytest.mark.parametrize("phrase", EMPTY)
def test_empty_phrases_state_nothing(phrase):
    assert read_prompt(f"Something with {phrase} and no more") == {}


@pytest.mark.parametrize(("text", "expected"), [
    ("A fox in a green field", {"subject": "fox", "setting": "meadow"}),
    ("A fox at golden hour", {"subject": "fox", "time": "sunset"}),
    ("A fox at blue hour", {"subject": "fox", "time": "dusk"}),
    ("A fox under a blue sky", {"subject": "fox"}),
    ("A man in a midnight blue coat", {"subject": "man", "colour": "navy"}),
    ("A man in a raincoat", {"subject": "man"}),
    ("GRAY SKIES, a HORSE", {"subject": "horse", "weather": "cloudy"}),
    ("snow-capped peaks and a horse", {"subject": "horse", "setting": "mountains"}),
    ("Black and white picture of a car", {"subject": "car", "style": "noir"}),
    ("A foxglove, a catalogue, a boathouse and a bookkeeper", {}),
    ("An old man", {"subject": "old man"}),
    ("Two old men", {"subject": "old man", "count": "two"}),
    ("A lighthouse", {}),
    ("A lighthouse keeper", {"subject": "lighthouse keeper"}),
    ("A child on a mountain bike", {"subject": "child"}),
    ("A car, wide-angle lens, shallow depth of field", {"subject": "car"}),
    ("A car, 35 mm, warm soft light, film grain", {"subject": "car"}),
])
def test_words_that_look_like_something_else(text, expected):
    assert read_prompt(text) == expected


@pytest.mark.parametrize(("text", "colour"), [
    ("A woman in a red coat with a brown dog", "red"),
    ("A woman with a brown dog", None),
    ("A white lighthouse and a man in teal", "teal"),
    ("Orange light, a boy in navy under pink clouds", "navy"),
    ("A man. Colour palette: amber and navy", None),
    ("A man, palette of amber and navy", None),
    ("A man walks the pier. His jacket is old. A purple coat suits him", "purple"),
    ("A black horse and a white cat", "black"),
    ("A boat in red, sunset", "red"),
    ("Green hills, yellow sand, white foam, a musician", None),
    ("A man in a grey coat", None),
    ("A jet-black horse", "black"),
])
def test_the_colour_is_the_subjects(text, colour):
    assert read_prompt(text).get("colour") == colour


@pytest.mark.parametrize(("text", "companion", "relation"), [
    ("A man to the left of a tree", "tree", "right of"),
    ("A man behind a bench", "bench", "in front of"),
    ("A man in front of a lighthouse", "lighthouse", "behind"),
    ("A man with a dog behind him", "dog", "behind"),
    ("A man, on his right a lantern", "lantern", "right of"),
    ("A man. A dog sits to the left of him.", "dog", "left of"),
    ("A man on a beach, in the background a boat", "boat", "behind"),
    ("A man on the left, a dog on the right", "dog", "right of"),
    ("A man beside a tree", "tree", None),
    ("A man among trees", None, None),
    ("A man. The day is long. Far away there is a boat.", None, None),
    ("A dog to the left of a cat", "cat", "right of"),
    ("A dog and a dog", None, None),
])
def test_where_the_companion_stands(text, companion, relation):
    found = read_prompt(text)
    assert (found.get("companion"), found.get("relation")) == (companion, relation)


@pytest.mark.parametrize(("text", "count"), [
    ("Three small white boats", "three"),
    ("A pair of horses", "two"),
    ("A lone keeper", "one"),
    ("A keeper", None),
    ("Two trees and a keeper", None),
    ("Two. A keeper", None),
    ("One light in the fog, a keeper", None),
    ("3 dogs", "three"),
])
def test_counts_stand_before_the_subject(text, count):
    assert read_prompt(text).get("count") == count


@pytest.mark.parametrize("text", [
    "No rain", "without any fog", "never at night", "not a dog", "a picture without a red boat",
    "rain-free… no snow, no fog", "anything instead of a desert", "rather than watercolour",
])  # fmt: skip
def test_what_is_denied_is_not_stated(text):
    stated = read_prompt(text)
    assert set(stated) <= {"weather"} and stated.get("weather") in (None, "rain")


def test_the_first_statement_wins():
    text = "A fox in a forest at dawn in fog. Later a horse in the desert at night in a storm."
    assert read_prompt(text) == {
        "setting": "forest", "time": "dawn", "weather": "fog", "subject": "fox",
    }  # fmt: skip


SHORT = "Wide shot of two women in teal coats on the quay at dusk in the rain, a dog to their left"


@pytest.mark.parametrize("mess", [
    "\n\nStyle: oil painting. Colour palette: amber, white and red. Lighting: bright midday sun. "
    "Mood: calm as a lake. Subject: an old man in a pink coat. Continuity with the previous scene:"
    " The fox is gone. Snow falls on the desert. Match the reference image: keep its subject.",
    "\n\nStyle: oil painting. Mood: calm. Brand: Red Fox, a bakery in the snow at noon. Keep "
    "consistent: a black horse. The reference image is the scene before: keep the look of the "
    "subject, the style and the medium; place, light and framing are those described here.",
    "\nCamera: close-up lens\nPalette: green and gold\nNote: no boats\nPreviously: a horse at dawn",
    " The picture is seen through a 40 mm lens. The palette stays cool, in slate, navy and pink. "
    "In the previous scene a cat sat in the forest at night.",
])
def test_a_long_text_states_what_its_first_sentence_does(mess):
    short, long = read_prompt(SHORT), read_prompt(SHORT + "." + mess)
    assert len(short) == 9
    assert {a: long[a] for a in short} == short
    assert set(long) - set(short) <= {"style"}


def test_labels_add_what_the_body_leaves_open():
    text = "A boat on a lake.\nStyle: ink drawing\nLighting: dawn\nComposition: wide shot"
    assert read_prompt(text) == {
        "setting": "lake", "time": "dawn", "subject": "boat", "framing": "wide", "style": "ink",
    }  # fmt: skip
    only = read_prompt("Subject: three orange cats. Mood: red rage")
    assert only == {"subject": "cat", "colour": "orange", "count": "three"}


def test_a_label_cannot_state_what_is_not_its_own():
    found = read_prompt("A fox.\nStyle: a desert at night with a red horse, watercolour")
    assert found == {"subject": "fox", "style": "watercolour"}


@pytest.mark.parametrize("text", [
    "", " ", "\n\n\n", ":", "Style:", "Style: Style: Style:", "a" * 10_000, "\x00\x01", "🦊" * 999,
    "({[\\^$*+?.|", "Subject: " * 1000, "no " * 3000, "، 。 ！", "%s {0} {{}}", "\ud800 fox \udfff",
])  # fmt: skip
def test_hostile_texts_are_read_without_harm(text):
    assert set(read_prompt(text)) <= set(VOCABULARY)


@given(st.text(max_size=400))
def test_any_text_gives_only_words_of_the_world(text):
    found = read_prompt(text)
    assert all(value in VOCABULARY[attribute] for attribute, value in found.items())
    assert found == read_prompt(text)


@given(st.lists(st.sampled_from(PHRASES), max_size=8), st.randoms(use_true_random=False))
def test_any_mixture_of_phrases_is_read(phrases, chance):
    words = [p for _, _, p in phrases] + ["and", "to the left of", ".", ",", "not", "Style:"]
    chance.shuffle(words)
    found = read_prompt(" ".join(words))
    assert all(value in VOCABULARY[attribute] for attribute, value in found.items())


FORMS = ["\uff46\uff4f\uff58 at night", "FOX AT NIGHT"]
FORMS += ["fox\u2014at night", "\u201cFox\u201d at \u2018night\u2019"]


@pytest.mark.parametrize("text", FORMS)
def test_forms_of_letters_do_not_matter(text):
    assert read_prompt(text) == {"subject": "fox", "time": "night"}


def test_time_grows_with_length_only():
    def seconds(words: int) -> float:
        text = ("no not : , Style boat to the left of the old wide long " * words)[: words * 8]
        start = time.process_time()
        read_prompt(text)
        return time.process_time() - start

    seconds(100)
    assert seconds(16_000) < 40 * max(seconds(1_000), 1e-3)


def test_plurals_are_never_their_singular():
    subjects = [p for values in VOCABULARY["subject"].values() for p in values]
    assert all(plural(p) != p and re.fullmatch(r"[a-z -]+", plural(p)) for p in subjects)
