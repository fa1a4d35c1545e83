"""The documentation site: built without a warning, complete, and asking nobody for anything.

`make test` looks at the pages as Sphinx gets them; building all of them belongs to make test-all.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml

import refimg

from .browser import Trouble, barriers, opened, served
from .fakes import FakeScorer

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
DOOR = refimg.generate_enhanced_reference_images_with_sequential_references


def sources() -> list[Path]:
    """The files that are pages, relative to nbs/."""
    books = (p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return sorted(p.relative_to(NBS) for p in [*books, *(NBS / "pages").glob("*.md")])


def address(source: Path) -> str:
    """Where a page stands on the site: a notebook's number is not part of it."""
    return source.with_name(re.sub(r"^\d+[a-z]?_", "", source.stem) + ".html").as_posix()


PAGES = [address(source) for source in sources()]


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    """The pages as Sphinx gets them."""
    folder = tmp_path_factory.mktemp("staged")
    code = "import sys, pathlib, docs; docs.stage(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT / "tools", check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The site's folder, and how building it went."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, ROOT / "tools" / "docs.py", "--to", folder]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return folder, made


@pytest.fixture(scope="module")
def site(built) -> Path:
    folder, made = built
    if made.returncode:
        pytest.skip("the site could not be built, another test says why")
    return folder


@pytest.fixture(scope="module")
def base(site):
    with served(site) as url:
        yield url


@pytest.fixture(scope="module")
def page():
    with opened(viewport={"width": 1280, "height": 900}) as page:
        yield page


@cache
def text(path: Path) -> str:
    return path.read_text("utf-8")


@cache
def anchors(path: Path) -> frozenset[str]:
    return frozenset(html.unescape(name) for name in re.findall(r'\bid="([^"]+)"', text(path)))


def shown(path: Path) -> str:
    """A page's text without Markdown's marks."""
    return " ".join(re.sub(r"[`|*]", " ", text(path)).split())


# without building it


@pytest.mark.parametrize("source", sources(), ids=str)
def test_every_link_leads_to_a_page(staged, source):
    page = text(staged / source)
    if source.suffix == ".ipynb":
        page = "\n".join("".join(c["source"]) for c in json.loads(page)["cells"]
                         if c["cell_type"] == "markdown")
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page, flags=re.DOTALL | re.MULTILINE)
    links = [unquote(urlsplit(link).path) for link in re.findall(r"\]\(([^)\s]+)\)", prose)
             if not urlsplit(link).scheme]
    assert not [link for link in links if not (staged / source.parent / link).exists()]


def test_the_sidebar_names_every_page_once():
    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))
    index, *sections = settings["website"]["sidebar"]["contents"]
    named = [index, *(name for section in sections for name in section["contents"])]
    assert sorted(named) == sorted(source.as_posix() for source in sources())


def test_parameters_has_every_setting_and_its_default(staged):
    said = shown(staged / "pages" / "parameters.md")
    for setting in dataclasses.fields(refimg.Pipeline):
        assert re.search(rf"\b{setting.name} .{{1,80}}? {re.escape(repr(setting.default))}", said)
    for name in inspect.signature(DOOR).parameters:
        assert re.search(rf"\b{name}\b", said)


def test_trace_files_are_those_of_a_run(staged, tmp_path):
    from refimg.sandbox.painter import Painter

    settings = {"num_variations": 1, "keep_traces": True, "image_model": Painter(width=64),
                "scorers": [FakeScorer()]}  # fmt: skip
    pipeline = refimg.Pipeline.from_env(score_threshold=100, **settings)
    story = refimg.Story(scenes=[refimg.Scene(prompt="a fox in the snow")])
    pipeline.run_sync(story, output_dir=tmp_path / "images", generation_id="x")
    folder = tmp_path / "reference_image_traces" / "x" / "scene_1"
    said = shown(staged / "pages" / "traces.md")
    names = {p.name for p in folder.iterdir()}
    assert len(names) >= 6
    later = {n for n in names if re.fullmatch(r"\d\d_agent[12]_iteration_\d+\.txt", n)} - {
        "01_agent1_iteration_1.txt", "02_agent2_iteration_1.txt", "03_agent1_iteration_2.txt",
    }  # fmt: skip
    assert not [n for n in names - later if n not in said]


def test_every_way_to_a_reference_is_among_the_fallbacks(staged):
    from refimg.enhance import StopReason
    from refimg.pipeline import SceneResult

    said = shown(staged / "pages" / "fallbacks.md")
    ways = SceneResult.model_fields["reference_from"].annotation.__args__
    assert not [way for way in ways if way not in said.split()]
    assert not {"failed", "error"} - {*said.split()} & {*StopReason.__args__}


# only in make test-all


@pytest.mark.all
def test_the_site_is_built_without_a_warning(built):
    folder, made = built
    if made.returncode:
        pytest.fail(made.stdout + made.stderr, pytrace=False)
    assert (folder / "index.html").is_file()


@pytest.mark.all
@pytest.mark.parametrize("name", PAGES)
def test_every_internal_link_leads_somewhere(site, name):
    broken = []
    for link in set(re.findall(r'<a\b[^>]*?\bhref="([^"]+)"', text(site / name))):
        place = urlsplit(html.unescape(urljoin(f"/{name}", link)))
        if place.scheme:
            continue
        target = site / unquote(place.path).lstrip("/")
        if not target.is_file() or (place.fragment and place.fragment not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.all
def test_no_page_holds_a_path_of_this_machine(site):
    found = [n for n in PAGES if str(ROOT) in text(site / n) or str(Path.home()) in text(site / n)]
    assert not found


# in a browser: only in make test-all


@pytest.mark.all
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_trouble(base, page, name):
    trouble = Trouble(page)
    page.goto(f"{base}/{name}", wait_until="load")
    broken = "images => images.filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    assert not page.eval_on_selector_all("img", broken)
    assert page.locator("h1").count() == 1
    title = page.locator("h1").evaluate("h => h.firstChild.textContent").strip()
    assert title
    assert page.title().startswith(title)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert not trouble.found


WITH_CODE = ("index.html", "storage/secrets.html")  # elsewhere its colours are the same, and many


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_keeps_nobody_out(base, page, name):
    coloured = None if name in WITH_CODE else "div.highlight"
    page.goto(f"{base}/{name}", wait_until="load")
    try:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert not barriers(page, but=coloured), scheme
    finally:
        page.emulate_media(color_scheme="light")


@pytest.mark.all
def test_pages_fit_a_telephone(base, page):
    page.set_viewport_size({"width": 390, "height": 800})
    try:
        for name in ("index.html", "view.html", "pages/parameters.html"):
            page.goto(f"{base}/{name}", wait_until="load")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.all
def test_search_finds_a_page_offline(base, page):
    trouble = Trouble(page)
    page.goto(f"{base}/search.html?q=calibration")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    assert page.locator("#search-results li a").count()
    assert not trouble.found


@pytest.mark.all
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(base, page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{base}/view.html", wait_until="load")
    style = "name => getComputedStyle(document.body)[name]"
    levels = []
    for name in ("color", "backgroundColor"):
        colour = page.evaluate(style, name)
        levels.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    page.emulate_media(color_scheme="light")
    assert (levels[0] > levels[1]) == (scheme == "dark")
    assert abs(levels[0] - levels[1]) > 300
