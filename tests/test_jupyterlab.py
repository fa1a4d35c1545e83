"""A reader opens the pipeline's notebook in JupyterLab and runs it from top to bottom."""

from __future__ import annotations

import importlib.util
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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A copy of what a reader has, so that a run changes nothing here."""
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
    folder.mkdir(parents=True)
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
        server.wait(SECONDS)


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


@pytest.mark.slow
def test_the_pipeline_notebook_runs_in_jupyterlab(workplace):
    executable()
    for name in ("jupyterlab", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    with lab(workplace) as url, opened(viewport={"width": 1360, "height": 1300}) as page:
        trouble = Trouble(page)
        page.goto(f"{url}/lab/tree/{NOTEBOOK}?reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=1000 * SECONDS)
        page.wait_for_function(READY, timeout=1000 * SECONDS)
        cells = run_to_the_end(page)
        errors = page.evaluate(ERRORS)
        page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    assert not errors
    assert not [cell["source"] for cell in cells if cell["count"] is None]
    assert any("execute_result" in cell["outputs"] for cell in cells)
    outside = [what for what in trouble.found if what.startswith(("error", "outside"))]
    assert not outside, trouble.found
