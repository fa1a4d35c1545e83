"""Hostile answers of providers: little memory, a loop that comes back, no key shown, an end."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from bench import hostile
from bench._lives import Lives

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
BORNE = {"finished", "errors"}


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory) -> Iterator[hostile.Ordeal]:
    with hostile.Ordeal(tmp_path_factory.mktemp("hostile").resolve()) as made:
        yield made


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with hostile.wicked() as made:
        yield made


def outcome(ordeal: hostile.Ordeal, lives: Lives, place: str, name: str) -> list[tuple[str, str]]:
    """What is to be counted of an answer; how long the loop was held is not a test's question."""
    [number] = [n for n, c in enumerate(ordeal.cases) if (c.place, c.name) == (place, name)]
    found = hostile.judge(ordeal.cases[number], ordeal.one(lives, number))
    return [one for one in found if one[0] not in BORNE | {"over_hold"}]


@pytest.mark.all
@pytest.mark.parametrize("place, name", [
    ("director", "gzip bomb"), ("model", "gzip bomb error"), ("create", "endless chunks"),
    ("critic", "key coloured"), ("create", "huge error"), ("upload", "key wrapped"),
    ("director", "text nasty"), ("create", "nasty error"), ("create", "key half"),
    ("critic", "wait 'nan'"), ("critic", "deep"), ("create", "status nested"),
    ("model", "latest_version.openapi_schema.components.schemas.aspect_ratio.enum nan"),
    ("output", "picture wide bomb"),
])  # fmt: skip
def test_a_hostile_answer_does_no_harm(ordeal, lives, place, name):
    assert outcome(ordeal, lives, place, name) == []


def test_what_shows_a_key_is_seen():
    """Whole, half, coded, or with only marks between its letters; a text without it is none."""
    assert not hostile.leaking("the server said: no such model, bad key [redacted] given")
    for name, text in hostile._wire.reflected(hostile.KEYS[0]).items():
        assert hostile.leaking(f"said {text}!"), name


def test_there_are_at_least_400_answers_and_no_two_alike():
    names = [(case.place, case.name) for case in hostile.cases()]
    assert len(names) == len(set(names)) >= 400


@pytest.mark.all
@pytest.mark.slow
def test_a_sample_of_hostile_answers(tmp_path):
    result, said = hostile.measure(tmp_path.resolve(), every=13)
    wrong = {key: result[key] for key in hostile.COUNTED
             if key not in BORNE | {"over_hold"} and result[key]}
    assert wrong == {}, "\n".join(said)
    assert result["answers"] >= 60
