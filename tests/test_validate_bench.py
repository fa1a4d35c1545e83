"""bench/statistics.py runs, keeps its keys, and does not stand in the way of its neighbours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = sorted((ROOT / "bench").glob("[!_]*.py"))


@pytest.mark.all
def test_the_benchmark_runs_small():
    command = [sys.executable, "bench/statistics.py", "--quick", "200"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(made.stdout.strip().splitlines()[-1])
    assert {"coverage", "aa_false_positive", "best_of_k_bias"} <= set(result)
    assert 0.88 < result["coverage"] < 1 and result["aa_false_positive"] < 0.12
    assert result["best_of_k_bias"] < 0.05
    assert set(result["one_sided"]) == {"20", "50", "100"} and "Monte-Carlo error" in made.stdout


@pytest.mark.parametrize("script", BENCH, ids=lambda path: path.stem)
def test_its_name_does_not_hide_the_standard_librarys(script):
    head, moved, _ = script.read_text("utf-8").partition("sys.path[0] = ")
    assert moved, f"{script.name}: bench/ must not be on sys.path, it has a statistics.py"
    assert "import statistics" not in head
