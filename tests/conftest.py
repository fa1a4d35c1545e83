"""What every test relies on: no keys, no settings and no downloads, whatever the machine has."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

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


def pytest_collection_modifyitems(items: list) -> None:
    """The slow files first, to end two processes together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


TORCH = re.compile("(clip_.*|consistency|sandbox_trained|tiles|vqa)$")  # files that import it


class OneProcess(LoadFileScheduling):
    """Each file in one process, and those that import torch all in the same one."""

    def _split_scope(self, nodeid: str) -> str:
        """The name of the group that a test belongs to."""
        name = Path(super()._split_scope(nodeid)).stem.removeprefix("test_")
        return "torch" if TORCH.match(name) else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcess:
    """By file, since `loadgroup` of xdist 3.8 finds no group under pytest 9.2."""
    return OneProcess(config, log)


@pytest.fixture(autouse=True, scope="module")
def collector() -> None:
    """What stands in memory by now need not be looked through by every later collection."""
    gc.collect()
    gc.freeze()
