"""What every test relies on: no keys, no settings and no models from the machine it runs on."""

from __future__ import annotations

import os
import re

import pytest

OURS = re.compile(r"(REFIMG|OPENAI|REPLICATE)_")


@pytest.fixture(autouse=True)
def without_keys(monkeypatch):
    """Removes what would turn the sandbox off; forbids downloads."""
    for name in [n for n in os.environ if OURS.match(n)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
