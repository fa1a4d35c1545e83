"""Which of many cases `make test` runs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def sampled(cases: Iterable, every: int) -> list:
    """All cases, of which `make test` runs every so many and `make test-all` the others too."""
    given = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if n % every == 0 else pytest.mark.all)
            for n, case in enumerate(given)]
