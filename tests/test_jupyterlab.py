"""A reader opens a notebook in JupyterLab, runs it from top to bottom, and uses the gallery."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from refimg import StoryResult

from .browser import Trouble, executable, opened

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "nbs/03_pipeline.ipynb"
SECONDS = 240
LOCAL = {
    "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython",
}  # fmt: skip
OPTIONS = [
    "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0",
    "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.expose_app_in_browser=True",
]  # fmt: skip

READY = """() => {
    const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
    return session?.isReady && session.session?.kernel?.status === "idle";
}"""
CELLS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
    .filter(cell => cell.type === "code" && cell.sharedModel.getSource().trim())
    .map(cell => ({
        source: cell.sharedModel.getSource(),
        count: cell.executionCount,
        outputs: cell.sharedModel.getOutputs().map(output => output.output_type),
    }))"""
ERRORS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
    .filter(cell => cell.type === "code")
    .flatMap(cell => cell.sharedModel.getOutputs())
    .filter(output => output.output_type === "error")
    .map(output => `${output.ename}: ${output.evalue}`)"""


PRESS = ".jp-OutputArea-output button"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A copy of what a reader has, so that a run changes nothing here."""
    executable()
    place = tmp_path_factory.mktemp("lab")
    ignore = shutil.ignore_patterns("output", "__pycache__", ".ipynb_checkpoints", "_*.yml")
    for name in ("nbs", "examples", "refimg"):
        shutil.copytree(ROOT / name, place / "work" / name, ignore=ignore)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy2(ROOT / name, place / "work" / name)
    return place


def quiet(place: Path) -> dict[str, str]:
    """An environment in which Jupyter keeps its own things in the temporary folder."""
    folder = place / "settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True, exist_ok=True)
    news = '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'
    (folder / "notification.jupyterlab-settings").write_text(news, encoding="utf-8")
    return os.environ | {name: str(place / folder) for name, folder in LOCAL.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


@contextmanager
def lab(place: Path):
    """The address of a JupyterLab on a copy of the notebooks."""
    port, log = free_port(), place / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", *OPTIONS]
    command += [f"--port={port}", f"--ServerApp.root_dir={place / 'work'}"]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=quiet(place), cwd=place, stdout=out, stderr=out)
    try:
        end = time.monotonic() + SECONDS
        while not answers(f"http://127.0.0.1:{port}/api/status"):
            assert server.poll() is None and time.monotonic() < end, log.read_text("utf-8")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:  # its extensions sometimes wait for a page that has left
            server.kill()
            server.wait()


def run_to_the_end(page) -> list[dict]:
    """The code cells after a run of all of them, or after the first error."""
    end = time.monotonic() + SECONDS
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    while time.monotonic() < end:
        cells = page.evaluate(CELLS)
        done = all(cell["count"] is not None for cell in cells) and page.evaluate(READY)
        if done or any("error" in cell["outputs"] for cell in cells):
            break
        page.wait_for_timeout(300)
    return cells


def opened_in(page, url: str, name: str) -> None:
    """Returns when the notebook is shown and its kernel waits."""
    page.goto(f"{url}/lab/tree/{name}?reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=1000 * SECONDS)
    page.wait_for_function(READY, timeout=1000 * SECONDS)


@pytest.mark.all
@pytest.mark.slow
def test_the_pipeline_notebook_runs_and_its_gallery_overrules(workplace):
    demo = workplace / "work" / "output" / "demo"
    with lab(workplace) as url, opened(viewport={"width": 1360, "height": 1300}) as page:
        trouble = Trouble(page)
        opened_in(page, url, NOTEBOOK)
        cells = run_to_the_end(page)
        errors = page.evaluate(ERRORS)
        pictures = sorted(demo.rglob("*.png"))
        page.click(f"{PRESS}:has-text('better made')", timeout=1000 * SECONDS)
        page.click(f"{PRESS}:has-text('choose v'):visible")
        page.wait_for_selector("td:has-text('better made')")
        page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    assert not errors
    decided = json.loads((demo / "decided.json").read_text("utf-8"))["history"]
    assert [choice["reason"] for choice in decided] == ["better made"]
    assert pictures and sorted(demo.rglob("*.png")) == pictures
    assert not [cell["source"] for cell in cells if cell["count"] is None]
    assert any("execute_result" in cell["outputs"] for cell in cells)
    outside = [what for what in trouble.found if what.startswith(("error", "outside"))]
    assert not outside, trouble.found


STORY = '''
from fakes import FakeImages, FakeScorer, critic, director, picture
from refimg import Pipeline, Scene, Story
from refimg.view import Gallery

shades = (40, 200, 120)
images = FakeImages(lambda request, number: picture(shades[number % 3], size=(320, 180)))
pipeline = Pipeline(
    director=director(), critic=critic(), image_model=images, scorers=[FakeScorer()],
    num_variations=3, max_enhancement_iterations=1)
prompts = ("<img src=x onerror=\'document.title = 1\'> $\\\\frac{", "a keeper", "a boat")
story = Story(scenes=[Scene(prompt=prompt) for prompt in prompts])
'''
GALLERY = '''
gallery = Gallery(pipeline, story, generation_id="run", output_dir="images")
if gallery.result is None:
    await gallery.run()
gallery
'''


FOCUS = """() => {
    const held = document.activeElement;
    return held.closest(".jp-OutputArea-output") ? held.textContent : "";
}"""


def tab_to(page, text: str) -> None:
    """Goes on with Tab until a button with that text has the focus."""
    for _ in range(60):
        if page.evaluate(FOCUS).startswith(text):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab does not reach {text!r}")


def gallery_notebook(place: Path) -> Path:
    """A notebook that shows a gallery over models that cost nothing, and the JSON it keeps."""
    shutil.copy2(ROOT / "tests" / "fakes.py", place / "work" / "fakes.py")
    import nbformat  # takes seconds
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell(STORY.strip()), new_code_cell(GALLERY.strip())]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    made = new_notebook(cells=cells, metadata=kernel)
    nbformat.write(made, place / "work" / "gallery.ipynb")
    return place / "work" / "images" / "run.json"


@pytest.mark.all
@pytest.mark.slow
def test_a_person_overrules_in_two_clicks_or_by_keyboard_and_a_reload_keeps_it(workplace):
    kept = gallery_notebook(workplace)
    with lab(workplace) as url, opened(viewport={"width": 1360, "height": 1300}) as page:
        trouble = Trouble(page)
        opened_in(page, url, "gallery.ipynb")
        cells = run_to_the_end(page)
        errors = page.evaluate(ERRORS)
        page.click(f"{PRESS}:has-text('better made')", timeout=1000 * SECONDS)
        page.click(f"{PRESS}:has-text('choose v'):visible")
        page.wait_for_selector("text=Your decisions")
        chosen = StoryResult.load(kept).history

        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        opened_in(page, url, "gallery.ipynb")
        page.wait_for_selector("text=Your decisions", timeout=1000 * SECONDS)
        after_reload = page.locator("td:has-text('better made')").count()

        page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activate(); }")
        for text in ("fits the other scenes", "choose v"):
            tab_to(page, text)
            page.keyboard.press("Enter")
        page.wait_for_selector("td:has-text('fits the other scenes')", timeout=10_000)
        mode = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.mode")

        page.click(f"{PRESS}:text-is('3')")
        page.click(f"{PRESS}:has-text('Draw this scene again')")
        end = time.monotonic() + SECONDS
        while not StoryResult.load(kept).times_rerun(3) and time.monotonic() < end:
            page.wait_for_timeout(200)
        title = page.title()
        page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    result = StoryResult.load(kept)
    assert not errors and all(cell["count"] is not None for cell in cells)
    assert [event.reason for event in chosen] == ["better made"]
    assert after_reload == 1
    assert mode == "command"
    assert result.history[:1] == chosen
    assert [(event.kind, event.reason) for event in result.history[1:]] == [
        ("choose", "fits the other scenes"), ("rerun", "")]
    assert [result.times_rerun(n) for n in (1, 2, 3)] == [0, 0, 1]
    files = sorted(path.name for path in kept.parent.glob("*.png"))
    assert files == [f"run_scene_0{s}_v{k}.png" for s, last in ((1, 3), (2, 3), (3, 6))
                     for k in range(1, last + 1)]  # fmt: skip
    assert title != "1"
    outside = [what for what in trouble.found if what.startswith(("error", "outside"))]
    assert not outside, trouble.found
