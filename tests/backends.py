"""The backend of examples/ in a process of its own: real uvicorn, on fakes or from keys."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from examples.backend.app import create_app
from refimg import Pipeline
from refimg.storage.journal import Journal
from tests.fakes import FakeImages, FakeScorer, critic, director, picture

ROOT = Path(__file__).resolve().parent.parent
FAKES, FROM_ENV = "tests.backends:fakes", "examples.backend.app:create_app"
ENDED = ("done", "failed", "cancelled")


def fake_pipeline(folder: Path, seconds: float = 0.0) -> Pipeline:
    """A pipeline whose images take that long, and whose agents take a fifth of it."""
    images = FakeImages(lambda request, number: picture(number, (640, 360)), seconds=seconds)
    return Pipeline(
        director=director(seconds / 5), critic=critic(60, seconds=seconds / 5), image_model=images,
        scorers=[FakeScorer()], journal=Journal(folder / "journal"),
    )  # fmt: skip


def fakes() -> FastAPI:
    """The application on fakes, for uvicorn."""
    seconds = float(os.environ["FAKE_SECONDS"])
    return create_app(fake_pipeline(Path(os.environ["REFIMG_BACKEND_FOLDER"]), seconds))


class Backend:
    """A running backend; leaving the `with` ends its process."""

    def __init__(self, factory: str, folder: Path, **env: str):
        self.folder, self.log = folder, folder.parent / f"{folder.name}.log"
        own = {"REFIMG_BACKEND_FOLDER": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(ROOT), "FAKE_SECONDS": "0.1"}  # fmt: skip
        command = [sys.executable, "-m", "uvicorn", "--factory", factory, "--port", "0",
                   "--no-access-log", "--timeout-graceful-shutdown", "2"]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log,
                                            env=os.environ | own | env)  # fmt: skip
        self.client = httpx.Client(base_url=self._address(), timeout=30)

    def _address(self) -> str:
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"running on (http://\S+)", self.log.read_text("utf-8")):
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(self.log.read_text("utf-8"))

    def start(self, order: dict[str, Any]) -> str:
        """The id of a new generation."""
        answer = self.client.post("/generations", json=order)
        assert answer.status_code == 202, answer.text
        return answer.json()["generation_id"]

    def get(self, path: str) -> Any:
        """What a GET answers."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status(self, name: str) -> dict[str, Any]:
        """How far a generation is."""
        return self.get(f"/generations/{name}")

    def wait(self, name: str, seconds: float = 120) -> dict[str, Any]:
        """The status of a generation that has ended."""
        until = time.monotonic() + seconds
        while (now := self.status(name))["state"] not in ENDED:
            assert time.monotonic() < until, now
            time.sleep(0.05)
        return now

    def events(self, name: str, last: int | None = None) -> Iterator[tuple[str, str, dict]]:
        """Name, id and data of each event, until the server ends the stream."""
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        with self.client.stream("GET", f"/generations/{name}/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                if line and not line.startswith(":"):
                    key, _, value = line.partition(": ")
                    assert key not in event
                    event[key] = value
                elif event:
                    yield event["event"], event["id"], json.loads(event["data"])
                    event = {}

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(15)
        finally:
            self.process.kill()


def order(scenes: int = 4, name: str | None = None, **more: Any) -> dict[str, Any]:
    """What a client sends to start a generation."""
    made = [{"prompt": f"The keeper on stair {n}."} for n in range(1, scenes + 1)]
    return {"scenes": made} | ({"generation_id": name} if name else {}) | more
