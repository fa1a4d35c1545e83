"""Damaged journals, answers, images and records: no wrong image, no run harmed, no silent loss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import damage
from bench._lives import Lives

WRONG = ("wrong_images", "harmed_others", "failed", "unsaid", "underspent", "noisy",
         "unclear_loads")  # fmt: skip


@pytest.fixture(scope="module")
def ruin(tmp_path_factory) -> Iterator[damage.Ruin]:
    with Lives() as lives:
        yield damage.Ruin(tmp_path_factory.mktemp("damage").resolve(), lives)


@pytest.mark.parametrize("target, kind", [
    ("journal.db", "zeroed"), ("journal.db", "truncated"), ("journal.db", "deleted"),
    ("journal.db", "emptied"), ("journal.db", "swapped"), ("journal.db-wal", "flipped"),
    ("journal.db-wal", "truncated"), ("journal.db-wal", "deleted"), ("results", "emptied"),
    ("images", "truncated"), (damage.RECORD, "text"),
])  # fmt: skip
def test_a_damaged_file_harms_no_run_and_no_loss_is_silent(ruin, target, kind):
    found = ruin.damage(target, kind, 1)
    assert [one for one in found if one[0] in WRONG] == []
    assert target != "journal.db" or not [one for one in found if one[0] == "repaid"]


def test_a_damage_is_one(ruin):
    """Each kind changes the file, or takes it away."""
    data = bytes(range(1, 256)) * 200
    for kind in damage.KINDS:
        assert damage.damaged(data, kind, 3, b"other") != data


@pytest.mark.all
@pytest.mark.slow
def test_a_sample_of_damages(tmp_path):
    result, said = damage.measure(tmp_path.resolve(), damage.points()[::3])
    assert result["damages"] >= 50
    assert {key: result[key] for key in WRONG if result[key]} == {}, "\n".join(said)
