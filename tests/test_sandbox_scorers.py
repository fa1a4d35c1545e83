"""The oracle: what it reads, what it cannot know, and that nothing it finds in a file breaks it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refimg.generate import ImageRequest
from refimg.sandbox.painter import Painter
from refimg.sandbox.scorers import TruthScorer, agreement
from refimg.sandbox.world import VOCABULARY, read_prompt
from refimg.score import Batch, RawScore, raw_scores, score_images
from refimg.storage.files import decode_image, encode_png
from tests.fakes import picture

TEXT = "a lighthouse keeper on a rocky coast at night, in fog"
STATED = read_prompt(TEXT)


def another(name: str) -> str:
    """A value of the attribute that the text does not state."""
    return next(value for value in VOCABULARY[name] if value != STATED.get(name))


def painted(chunk: object) -> bytes:
    """A PNG with that truth chunk; what is no text is written as JSON."""
    text = chunk if isinstance(chunk, str) else json.dumps(chunk)
    return encode_png(Image.new("RGB", (8, 8)), {"refimg-truth": text})


def of(attributes: dict[str, str]) -> bytes:
    return painted({"painter": 1, "attributes": attributes})


def truths(*images: bytes, text: str = TEXT) -> list[RawScore]:
    batch = Batch(tuple(decode_image(data) for data in images), text)
    return [row["truth"] for row in raw_scores(batch, [TruthScorer()])]


def test_the_text_of_these_tests_states_something():
    assert set(STATED) >= {"setting", "time", "weather", "subject"}


def test_each_stated_attribute_counts_the_same():
    for name in STATED:
        missing = {n: value for n, value in STATED.items() if n != name}
        for drawn in (STATED | {name: another(name)}, missing):
            found = truths(of(drawn))[0]
            assert found.value == pytest.approx(1 - 1 / len(STATED))
            assert found.note.startswith(f"{name} is ") and STATED[name] in found.note


def test_all_right_all_wrong_and_more_than_was_asked_for():
    more_than_stated = {name: another(name) for name in VOCABULARY} | STATED
    right, wrong, more = truths(of(STATED), of({}), of(more_than_stated))
    assert (right, more) == (RawScore(1), RawScore(1)) and wrong.value == 0


@pytest.mark.parametrize(
    "chunk",
    ["", "night", "{", "null", "[]", "7", {}, {"painter": 1}, {"painter": 1, "attributes": None}]
    + [{"painter": 1, "attributes": a} for a in ("night", 3, ["night"], [["time", "night"]])],
)
def test_a_broken_truth_is_none_and_costs_the_others_nothing(chunk):
    good, bad, photo = truths(of(STATED), painted(chunk), picture(90))
    assert good == RawScore(1)
    assert bad.value is None and bad.note and photo.value is None and photo.note


@pytest.mark.parametrize("value", [None, 3, ["night"], {"night": 1}, ""])
def test_a_truth_with_odd_values_is_wrong_or_unknown_but_no_error(value):
    found = truths(of(STATED | {"time": value}))[0]
    assert found.value is None or found.value < 1
    assert found.note


@pytest.mark.all
async def test_the_oracle_of_files_is_the_oracle_of_what_was_painted(tmp_path):
    requests = [ImageRequest(prompt=TEXT, seed=seed) for seed in range(3)]
    images = [(await Painter().generate(request)).data for request in requests]
    paths = [tmp_path / f"{i}.png" for i, _ in enumerate(images)]
    for path, data in zip(paths, images, strict=True):
        path.write_bytes(encode_png(decode_image(data), {"prompt": TEXT}))
    scores = await score_images(paths, TEXT, scorers=[TruthScorer()])
    assert [s.raw["truth"] for s in scores] == [found.value for found in truths(*images)]
    assert [s.overall for s in scores] == [s.metrics["truth"] for s in scores]
    assert {s.models["truth"] for s in scores} == {"sandbox-truth"}


@pytest.mark.all
async def test_pictures_of_another_text_are_worse():
    other = "a red cat in a city by day, clear sky, close up"
    requests = [ImageRequest(prompt=text, seed=s) for s in range(6) for text in (TEXT, other)]
    found = truths(*[(await Painter().generate(request)).data for request in requests])
    mine, theirs = ([item.value for item in found[i::2]] for i in (0, 1))
    assert sum(mine) / 6 > 0.5 > sum(theirs) / 6


ATTRIBUTES = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"))


@given(ATTRIBUTES, ATTRIBUTES)
def test_agreement_is_a_share_of_what_is_stated(stated, drawn):
    found = agreement(stated, drawn)
    if not stated:
        assert found.value is None and found.note
    else:
        right = len(stated.items() & drawn.items())
        assert found.value == pytest.approx(right / len(stated)) and 0 <= found.value <= 1
        assert (found.value == 1) == (not found.note)
