"""The package works without its extras, and says which one it lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from refimg.storage.extras import EXTRAS, missing_extra

from .sampling import sampled
from .test_import import ALL_MODULES
from .test_project import named, wheel  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parent.parent
SCORE = 'pip install "refimg[score]"'
STORY = {"scenes": [{"prompt": "A red fox in the snow at dawn"},
                    {"prompt": "A red fox by a lake at night"}]}  # fmt: skip

BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted({m for extra in EXTRAS.values() for m in extra})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""

RUNS = """
import asyncio, json, sys
from pathlib import Path
from refimg import Pipeline, Story, defaults
FAKES

def told(result):
    scenes = [[w for w in scene.warnings if "refimg[score]" in w] for scene in result.scenes]
    best = result.scenes[0].variations[0].scores
    files = all(Path(path).is_file() for path in result.references)
    return {"warnings": scenes, "overall": best.overall, "notes": best.notes, "files": files}

async def main():
    story, found = Story.model_validate(json.loads(sys.argv[1])), {}
    sandbox = Pipeline.from_env(num_variations=2, max_enhancement_iterations=1)
    real = Pipeline(director=director(), critic=critic(90), image_model=FakeImages(),
                    num_variations=2, max_enhancement_iterations=1)
    for name, pipeline in (("sandbox", sandbox), ("real", real)):
        result = await pipeline.run(story, output_dir=f"{sys.argv[2]}/{name}")
        found[name] = told(result)
        try:
            await pipeline.load()
        except OSError as error:
            found[name]["load"] = str(error)
        scorers = defaults.scorers(pipeline.image_model)
        found[name]["missing"] = [scorer.missing() for scorer in scorers]
    found["available"] = defaults.available()
    print(json.dumps(found))

asyncio.run(main())
"""


def python(code: str, *words: object) -> subprocess.CompletedProcess:
    """What a fresh interpreter does with the code."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def check(found: dict) -> None:
    """Both stories have their images, no scores, and one reason in one warning a scene."""
    reason = missing_reason(found["available"])
    for world in ("sandbox", "real"):
        told = found[world]
        assert told["files"] and told["overall"] is None
        assert [len(warnings) for warnings in told["warnings"]] == [1, 1]
        for (warning,) in told["warnings"]:
            assert warning.startswith("unscored: ") and warning.count(reason) == 1
        metrics = {"pickscore", "clip_score", "aesthetic"}
        assert {told["notes"][name] for name in metrics} == {reason}
        assert "no reference" in told["notes"]["consistency"]
        assert told["missing"] == [reason] * 4
        assert all(f"{name}: {reason}" in told["load"] for name in (*metrics, "consistency"))


def missing_reason(found: dict[str, str]) -> str:
    """The one reason of all metrics; it names every module and the extra."""
    (reason,) = set(found.values())
    assert reason == f"{', '.join(EXTRAS['score'])} are not installed: {SCORE}"
    return reason


# what an extra is


IMPORTED_AS = {"open_clip_torch": "open_clip"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_what_settings_say(extra):
    asked = [IMPORTED_AS.get(name, name) for name in named(f"{extra}_requirements")]
    assert sorted(EXTRAS[extra]) == sorted(asked)


def test_a_blocked_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert missing_extra("validate") == 'scipy is not installed: pip install "refimg[validate]"'
    assert missing_extra("score") is None


# modules blocked


def test_every_module_can_be_imported_without_extras():
    made = python(BLOCK + ALL_MODULES)
    assert made.returncode == 0, made.stderr


def test_stories_run_without_extras_and_say_why_they_are_unscored(tmp_path):
    code = BLOCK + RUNS.replace("FAKES", "from tests.fakes import FakeImages, critic, director")
    made = python(code, json.dumps(STORY), tmp_path)
    assert made.returncode == 0, made.stderr
    check(json.loads(made.stdout))


LOADS = """
from pathlib import Path
from refimg.adapters.clip import Aesthetic, PickScore
from refimg.adapters.dino import DinoConsistency, load_dino
from refimg.adapters.towers import load_open_clip, load_transformers, resolve_placement
from refimg.adapters.vqa import VqaScore
from refimg.sandbox.scorers import SandboxClipScore
for work in (lambda: load_open_clip(Path(".")), lambda: load_transformers(Path(".")),
             lambda: load_dino(Path(".")), DinoConsistency().load, DinoConsistency().fetch,
             resolve_placement, SandboxClipScore().load, PickScore().load, PickScore().fetch,
             Aesthetic().load, VqaScore("a/b").load, VqaScore("a/b").fetch):
    try:
        work()
    except ImportError as error:
        assert "refimg[score]" in str(error), error
    else:
        raise AssertionError(work)
PickScore().unload()
print(VqaScore("a/b").missing())
"""


@pytest.mark.all
def test_what_cannot_go_on_is_an_import_error_that_names_the_extra():
    made = python(BLOCK + LOADS)
    assert made.returncode == 0, made.stderr
    assert SCORE in made.stdout


CHART = """
import asyncio, sys
from refimg import Pipeline, Scene, Story
from refimg.view import timeline
pipeline = Pipeline.from_env(num_variations=1, max_enhancement_iterations=0, scorers=[])
story = Story(scenes=[Scene(prompt="A red fox in the snow")])
result = asyncio.run(pipeline.run(story, output_dir=sys.argv[1]))
result._repr_html_()
try:
    timeline(result)
except ImportError as error:
    print(error)
"""


@pytest.mark.all
def test_a_chart_names_the_extra(tmp_path):
    made = python(BLOCK + CHART, tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == 'matplotlib is not installed: pip install "refimg[notebook]"'


@pytest.mark.parametrize("command, code", sampled([("load", 1), ("doctor", 0)], 2))
def test_the_command_says_what_to_install(command, code):
    made = python(f"{BLOCK}\nfrom refimg.cli import app\napp()", command, "--json")
    found = json.loads(made.stdout)
    assert made.returncode == code, made.stderr
    reason = missing_reason(found["weights"] if command == "doctor" else found)
    if command == "doctor":
        assert found["extras"]["score"] == reason


# a wheel without extras


@pytest.mark.all
@pytest.mark.skipif(os.name == "nt", reason="the layout of an environment")
def test_a_wheel_without_extras_runs_stories(wheel, tmp_path):  # noqa: F811
    venv.create(tmp_path / "venv", with_pip=True)
    folder, work = tmp_path / "venv" / "bin", tmp_path / "work"
    work.mkdir()
    env = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    env |= {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    if "XDG_CACHE_HOME" in os.environ or (Path.home() / ".cache" / "pip").is_dir():
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pip"
        env |= {"PIP_CACHE_DIR": str(cache)}

    def shell(*words: object, code: int = 0) -> str:
        done = subprocess.run([*map(str, words)], cwd=work, env=env, capture_output=True,
                              text=True, timeout=600)  # fmt: skip
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    python = folder / "python"
    shell(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel.filename)
    listed = json.loads(shell(python, "-m", "pip", "list", "--format", "json"))
    present = {package["name"].lower().replace("_", "-") for package in listed}
    absent = {"torch", "torchvision", "open-clip-torch", "transformers", "matplotlib", "scipy",
              "ipywidgets", "jupyterlab", "pyarrow"}  # fmt: skip
    assert "refimg" in present and not absent & present
    shutil.copy2(ROOT / "tests" / "fakes.py", work)
    code = RUNS.replace("FAKES", "from fakes import FakeImages, critic, director")
    check(json.loads(shell(python, "-c", code, json.dumps(STORY), work)))
    (work / "story.json").write_text(json.dumps(STORY), "utf-8")
    result = json.loads(shell(folder / "refimg", "run", "story.json", "-n", 2, "--json"))
    assert all(SCORE in scene["warnings"][-1] for scene in result["scenes"])
    found = json.loads(shell(folder / "refimg", "doctor", "--json"))
    assert found["versions"]["torch"] == "not installed"
    assert SCORE in found["extras"]["score"] and missing_reason(found["weights"])
    assert missing_reason(json.loads(shell(folder / "refimg", "load", "--json", code=1)))
