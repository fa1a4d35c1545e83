"""Without the extra `validate` an ImportError names it; tables need nothing of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sampling import sampled

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = """
import sys
import numpy as np
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import refimg.validate as v
from tests.arms import random_arm
a, b = random_arm(1), random_arm(2, max_enhancement_iterations=4)
"""


def python(blocked: set[str], code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that cannot import some packages."""
    text = BLOCKED.replace("{blocked}", repr(blocked)) + code
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("blocked", "calls"), sampled([
    ("scipy", ["v.paired_interval(np.arange(5))", "v.wilson(3, 5)", "v.power(0.3)",
               "v.compare(a, b)", "v.best_of_k(a)"]),
    ("matplotlib", ["v.distribution_chart(a)", "v.forest_chart(v.compare(a, b))"]),
], 2))  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(blocked, calls):
    made = python({blocked}, f"""
for call in {calls!r}:
    try:
        eval(call)
        print("no error")
    except ImportError as error:
        print(error)
""")
    told = made.stdout.strip().splitlines()
    assert len(told) == len(calls), made.stderr
    for line in told:
        assert line.startswith(f"{blocked} is not installed") and "refimg[validate]" in line


@pytest.mark.all
def test_tables_need_no_extra():
    made = python({"scipy", "matplotlib", "pyarrow"}, "v.distributions(a), v.pass_rates(a)\n"
                  "v.stop_reasons(a), v.threshold_errors(a), v.best_weights([1], 1), v.holm([1])")
    assert made.returncode == 0, made.stderr
