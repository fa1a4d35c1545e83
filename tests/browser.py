"""A headless browser and a small web server, for the tests that look at pages."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_core_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

NAMES = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
]  # fmt: skip


def executable() -> str:
    """The path of a Chromium; the test is skipped where there is none."""
    named = os.environ.get("REFIMG_CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        where = f"REFIMG_CHROMIUM={named} is no program" if named else "install Chromium"
        pytest.skip(f"no browser: {where}, or name one in REFIMG_CHROMIUM")
    return found


@contextmanager
def opened(**options) -> Iterator:
    """A page of a headless browser."""
    path = executable()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(**options)
        try:
            yield page
        finally:
            browser.close()


def barriers(page, but: str | None = None) -> list[str]:
    """What keeps people from reading a page: axe-core's serious and critical findings.

    What the selector `but` finds is not looked at.
    """
    where = {"include": [["html"]], "exclude": [[but]] if but else []}
    found = Axe().run(page, where, {"resultTypes": ["violations"]})["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {node['html'][:200]}" for v in grave for node in v["nodes"]]


class Trouble:
    """Everything that a reader of a page would not want: errors, missing files, foreign hosts."""

    def __init__(self, page):
        self.found: list[str] = []
        page.on("pageerror", lambda error: self.found.append(f"error: {error}"))
        page.on("console", self._console)
        page.on("response", self._response)
        page.on("requestfailed", self._failed)
        page.on("request", self._request)

    def _failed(self, request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left before it had come
            self.found.append(f"failed: {request.url}")

    def _console(self, message) -> None:
        if message.type == "error":
            self.found.append(f"console: {message.text}")

    def _response(self, response) -> None:
        if response.status >= 400:
            self.found.append(f"{response.status}: {response.url}")

    def _request(self, request) -> None:
        place = urlsplit(request.url)
        if place.scheme not in ("data", "blob") and place.hostname != "127.0.0.1":
            self.found.append(f"outside: {request.url}")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which a folder can be read."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
