"""What `import refimg` costs, and what it must not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "torch", "torchvision", "open_clip", "transformers", "openai", "replicate", "matplotlib",
    "pandas", "scipy", "ipywidgets", "nbdev", "fastcore",
}  # fmt: skip
SECONDS, MARGIN, TRIES = 0.5, 5, 3

ALL_MODULES = """
import importlib, pkgutil, refimg
for found in pkgutil.walk_packages(refimg.__path__, "refimg."):
    importlib.import_module(found.name)
"""

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"nbdev", "fastcore", "execnb", "ghapi"}:
            raise ImportError(f"{name} is for developers only")
sys.meta_path.insert(0, Block())
"""

TIMED = """
import time
start = time.perf_counter()
import refimg
print(time.perf_counter() - start)
"""

LOADED = "import json, sys\nprint(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_importing_the_package_loads_nothing_heavy():
    assert not HEAVY & set(json.loads(python("import refimg\n" + LOADED)))


def test_no_module_loads_anything_heavy():
    assert not HEAVY & set(json.loads(python(ALL_MODULES + LOADED)))


def test_the_package_runs_without_the_developers_tools():
    python(BLOCKED + ALL_MODULES)


def test_importing_is_quick():
    times = []
    while len(times) < TRIES and (not times or min(times) > SECONDS * MARGIN):
        times.append(float(python(TIMED)))
    assert min(times) <= SECONDS * MARGIN, times
