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

# The same examples everywhere; a busy machine is no failure.
settings.register_profile("refimg", derandomize=True, deadline=None)
settings.load_profile("refimg")


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what is marked `all`, unless it is asked for."""
    if os.environ.get("REFIMG_TEST_ALL") != "1" and not config.option.markexpr:
        config.option.markexpr = "not all"


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list) -> None:
    """The slow files first, to end two processes together; each file in one of them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True, scope="module")
def collector() -> None:
    """What stands in memory by now need not be looked through by every later collection."""
    gc.collect()
    gc.freeze()
