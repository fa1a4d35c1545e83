"""What every test relies on: no keys, no settings and no downloads, whatever the machine has."""

from __future__ import annotations

import gc
import os
import re

import pytest
from hypothesis import settings

OURS = re.compile(r"REFIMG_(?!CHROMIUM$|TEST_ALL$)|OPENAI_|REPLICATE_")

for name in [n for n in os.environ if OURS.match(n)]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
gc.set_threshold(100_000, 20, 20)  # a session makes much that stays

settings.register_profile("refimg", derandomize=True)  # the same examples everywhere
settings.load_profile("refimg")


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """The slow files first, to end two processes together; `all` only where it is asked for."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if os.environ.get("REFIMG_TEST_ALL") != "1":
        left_out = [item for item in items if item.get_closest_marker("all")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("all")]


@pytest.fixture(autouse=True, scope="module")
def collector() -> None:
    """What stands in memory by now need not be looked through by every later collection."""
    gc.collect()
    gc.freeze()
