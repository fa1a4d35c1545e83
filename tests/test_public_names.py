"""Every name that README, tutorials, pages, examples and design took from 0.1 is still there."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

LIST = Path(__file__).parent / "data" / "v0_1" / "public_names.txt"
NAMES = LIST.read_text("utf-8").split()


def test_the_list_is_sorted_and_has_no_name_twice():
    assert sorted(set(NAMES)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name):
    assert pkgutil.resolve_name(name) is not None
