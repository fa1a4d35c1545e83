"""What every test relies on: no keys, no settings and no downloads, whatever the machine has."""

from __future__ import annotations

import os
import re

from hypothesis import settings

OURS = re.compile(r"REFIMG_(?!CHROMIUM$)|OPENAI_|REPLICATE_")

for name in [n for n in os.environ if OURS.match(n)]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("refimg", derandomize=True)  # the same examples everywhere
settings.load_profile("refimg")


def pytest_collection_modifyitems(items: list) -> None:
    """The slow files first: two processes then end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
