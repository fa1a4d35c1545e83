"""The project around the package: settings, pins, workflows, and what is shipped."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import refimg

ROOT = Path(__file__).resolve().parent.parent
NBDEV = {"nbdev", "execnb", "fastcore", "ghapi"}
EXTRAS = ("score", "notebook", "validate")
HOST = re.compile(r"\b(?:pypi|pythonhosted|npmjs|anaconda|conda)\.(?:org|com|io)\b", re.I)
INDEX = re.compile(r"--(?:extra-)?index-url|--find-links|download\.pytorch\.", re.I)
PLACE = re.compile(r"(?<![\w.:/])/(?:work|root|Users|home/\w+)/|/opt/(?:wheels|pypi)")
KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[\w-]{20,}|r8_\w{20,}|hf_\w{20,}|gh[po]_\w{20,}|AKIA[0-9A-Z]{16})"
)
OWN = Path(__file__).name
BUILT_FROM = (
    "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt",
    "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
)  # fmt: skip
MADE_HERE = sys.platform == "linux" and sys.version_info[:2] == (3, 11)


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def named(key: str) -> dict[str, Requirement]:
    """The requirements under a key of settings.ini, by name."""
    return {r.name.lower(): r for r in map(Requirement, shlex.split(settings()[key]))}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed() -> list[Path]:
    """The files and links of the repository, those not yet committed too; without git, none."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        pytest.skip("not a git repository")
    return [ROOT / name for name in made.stdout.splitlines()]


def tracked() -> list[Path]:
    """The files among them."""
    return [f for f in listed() if f.is_file() and not f.is_symlink()]


def found(pattern: re.Pattern) -> list[str]:
    """Where a pattern stands in the repository's text files."""
    lines = []
    for path in tracked():
        if path.suffix != ".ipynb" and path.name != OWN and b"\0" not in path.read_bytes():
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if match := pattern.search(line):
                    lines.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    return lines


def test_links_lead_to_files_of_the_repository():
    links = {path: os.readlink(path) for path in listed() if path.is_symlink()}
    lost = [path.name for path, to in links.items()
            if os.path.isabs(to) or not path.resolve().is_relative_to(ROOT) or not path.exists()]
    assert not lost


# settings and pins


def test_every_requirement_is_pinned_to_a_version_it_allows():
    kinds = ("", *(f"{extra}_" for extra in (*EXTRAS, "backend", "dev")))
    every = [asked for kind in kinds for asked in named(f"{kind}requirements").items()]
    for name, asked in every:
        assert pins().get(canonical(name)) is not None, f"{name} is not in constraints.txt"
        assert asked.specifier.contains(pins()[canonical(name)]), f"{asked}: {pins()[name]}"


def test_torch_is_pinned_first():
    assert list(pins())[:2] == ["torch", "torchvision"]


def test_nothing_for_one_gpu_is_pinned():
    assert not [n for n in pins() if n.startswith(("nvidia", "triton", "cuda"))]


@pytest.mark.skipif(not MADE_HERE, reason="the pins are made on Linux with Python 3.11")
def test_everything_the_requirements_pull_in_is_pinned():
    wanted = runpy.run_path(str(ROOT / "tools" / "constraints.py"))["installed"]()
    assert sorted(wanted) == sorted(pins())


def test_users_need_no_nbdev_and_the_base_is_small():
    big = {name for extra in EXTRAS for name in named(f"{extra}_requirements")}
    assert not (NBDEV | big) & set(named("requirements"))
    assert set(named("dev_requirements")) >= NBDEV


def test_one_version():
    assert settings()["version"] == refimg.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == refimg.__version__
    assert f"## {refimg.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


# what must not be in the repository


@pytest.mark.parametrize("kind", ["HOST", "INDEX", "PLACE", "KEY"])
def test_no_host_place_or_key(kind):
    if lines := found(globals()[kind]):
        pytest.fail("\n".join(lines), pytrace=False)


def test_no_host_in_notebooks():
    books = [p for p in tracked() if p.suffix == ".ipynb"]
    assert not [p.name for p in books if HOST.search(p.read_text("utf-8"))]


# workflows, docs, licence


@pytest.mark.parametrize(("name", "commands"), [
    ("test", {"test": ".ci/run", "all": "make test-all"}), ("docs", {"docs": "make docs"}),
])
def test_workflows_do_what_a_person_does(name, commands):
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs.keys() == commands.keys()
    for job, command in commands.items():
        assert command in [step.get("run") for step in jobs[job]["steps"]]


def test_the_test_workflow_covers_every_python():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8")
    versions = yaml.safe_load(text)["jobs"]["test"]["strategy"]["matrix"]["python"]
    low, high = (int(settings()[k].split(".")[1]) for k in ("min_python", "max_python"))
    assert versions == [f"3.{minor}" for minor in range(low, high)]


def test_ci_runs_make_test():
    path = ROOT / ".ci" / "run"
    assert "make --no-print-directory test" in path.read_text("utf-8")
    assert os.access(path, os.X_OK)


def test_quarto_settings_are_linked():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink()
    assert os.readlink(link) == "../_quarto.yml"


def test_the_licence_is_there():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_readme_is_in_step(tmp_path):
    source = ROOT / "nbs" / "index.ipynb"
    command = [sys.executable, "-c", "import sys; from pathlib import Path; import readme; "
               "readme.write(Path(sys.argv[1]), Path(sys.argv[2]))", tmp_path, source]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT / "tools")
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    stale = [str(p) for p, data in made.items() if (ROOT / p).read_bytes() != data]
    assert not stale, f"{stale}: make readme"


def test_models_and_prices_of_the_readme_are_the_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("REFIMG_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    p = refimg.Pipeline.from_env()
    cost = p.estimate(refimg.Story.load(ROOT / "examples" / "lighthouse.yaml"))
    text = (ROOT / "README.md").read_text("utf-8")
    names = [m.name.partition(":")[2] for m in (p.director, p.critic, p.image_model)]
    assert "director is `{}`, the critic `{}`, the image model `{}`.".format(*names) in text
    assert f"the estimate is {cost.low:.2f} to {cost.high:.2f} USD, by list prices" in text


# the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy of the tree."""
    place = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "refimg", place / "source" / "refimg", ignore=ignore)
    for name in BUILT_FROM:
        shutil.copy2(ROOT / name, place / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", place, place / "source"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return zipfile.ZipFile(next(place.glob("*.whl")))


@pytest.mark.all
@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(wheel):
    files = {p for p in (ROOT / "refimg").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {p.relative_to(ROOT).as_posix() for p in files} <= set(wheel.namelist())


@pytest.mark.all
@pytest.mark.slow
def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"refimg", f"refimg-{refimg.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


@pytest.mark.all
@pytest.mark.slow
def test_the_wheel_asks_for_what_settings_say(wheel):
    name = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
    asked = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", wheel.read(name).decode(), re.M)
    assert {a.lower() for a in asked} == set(named("requirements"))


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.parametrize("extra", [*EXTRAS, "backend", "all"])
def test_an_extra_of_the_wheel_asks_for_what_settings_say(wheel, extra):
    name = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
    line = re.compile(rf"^Requires-Dist: ([\w.-]+)[^;\n]*; extra == .{extra}.$", re.M)
    kinds = EXTRAS if extra == "all" else (extra,)
    wanted = {n for kind in kinds for n in named(f"{kind}_requirements")}
    assert {a.lower() for a in line.findall(wheel.read(name).decode())} == wanted
