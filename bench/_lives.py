"""Lives of a small story: each in a fork of a process that has imported everything.

The providers are fakes whose answers follow from what they are asked; a bill, a file outside of the
story's folder, has a line when a call begins and when its answer was paid for. What an image model
was once asked for it still has, so a prediction can be adopted in a later life.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENES, VARIATIONS, ITERATIONS, SECONDS = 2, 2, 1, 0.02
ANSWER, IMAGE = 0.001, 0.04  # USD
LIMIT = 90  # seconds for one life
PARTS = (".part", ".tmp")  # how the names of half-written files end


class Bill:
    """What was asked and paid, by all lives of a folder."""

    def __init__(self, path: str | Path, life: int):
        self.path, self.life = Path(path), life

    def write(self, what: str, call: str) -> None:
        """Adds a line."""
        line = {"life": self.life, "what": what, "call": call, "at": time.monotonic()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, what: str, life: int | None = None) -> dict[str, float]:
        """When each call was asked for, or paid."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        found = map(json.loads, text.splitlines())
        return {line["call"]: line["at"] for line in found
                if line["what"] == what and life in (None, line["life"])}

    def times(self, what: str, life: int) -> Counter:
        """How often each call was asked for, or paid."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        found = map(json.loads, text.splitlines())
        return Counter(one["call"] for one in found if (one["what"], one["life"]) == (what, life))


def digest(kind: str, *asked: Any) -> str:
    """The name of a call, by what it asks."""
    return f"{kind}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"


class Chat:
    """A director or a critic whose every answer holds the name of its call."""

    def __init__(self, role: str, bill: Bill):
        self.name, self.role, self.bill = f"fake-{role}", role, bill

    async def reply(self, messages: list, schema: type | None = None) -> Any:
        """Returns the answer, paid for."""
        from refimg.enhance import Reply
        from tests.fakes import critique

        call = digest(self.role, [[m.role, m.content] for m in messages])
        self.bill.write("asked", call)
        await asyncio.sleep(SECONDS)
        self.bill.write("paid", call)
        if self.role == "critic":
            return Reply(text=critique(90, critique=f"as scripted {call}"), cost=ANSWER)
        text = f"A keeper in a red coat on a stair, wide shot, {call}"
        return Reply(text=text, cost=ANSWER)


class Images:
    """An image model that finds again what it was asked for before."""

    name, takes_call, max_references, takes_seed = "fake-images", True, 1, True
    takes_negative_prompt, aspect_ratios = False, None

    def __init__(self, bill: Bill):
        self.bill = bill

    def _image(self, call: str) -> Any:
        from refimg.generate import GeneratedImage
        from tests.servers.images import draw

        data = draw({"prompt": call, "seed": 1}, 1)
        return GeneratedImage(data=data, provider_id=call, cost=IMAGE)

    async def generate(self, request: Any, *, call: Any = None) -> Any:
        """Returns an image, paid for."""
        sent = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in request.references]
        name = digest("image", request.prompt, request.seed, sent)
        self.bill.write("asked", name)
        if call and call.started:
            call.started(name)
        await asyncio.sleep(SECONDS)
        self.bill.write("paid", name)
        return self._image(name)

    async def adopt(self, prediction_id: str, *, call: Any = None) -> Any:
        """Returns the image of a prediction that was begun; None where there is none."""
        return self._image(prediction_id) if prediction_id in self.bill.lines("asked") else None


def live(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the story in its folder and says what came of it."""
    from refimg import Pipeline, Scene, Story
    from refimg.storage.journal import Journal
    from tests.fakes import FakeScorer

    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("refimg").addHandler(handler)
    folder, bill = Path(job["folder"]), Bill(job["bill"], job.get("life", 1))
    shim = job.get("shim")
    if shim:
        arm(folder, **shim)
    found: dict[str, Any] = {"warnings": texts}
    journal, name = Journal(folder / "journal"), job.get("id", "story")
    where = {"output_dir": folder / "images", "generation_id": name}
    try:
        if job.get("spent"):
            found["spent"] = asyncio.run(journal.spent(**where))
        told = [Scene(prompt=f"{job.get('text', 'a keeper')}, scene {n + 1}")
                for n in range(SCENES)]
        pipeline = Pipeline(
            director=Chat("director", bill), critic=Chat("critic", bill), image_model=Images(bill),
            scorers=[FakeScorer()], num_variations=VARIATIONS, quality_threshold=0, seed=11,
            max_enhancement_iterations=ITERATIONS, journal=journal)
        story = Story(scenes=told, consistency_markers={"mood": "calm"})
        result = asyncio.run(pipeline.run(story, **where))
        found |= {"end": "finished", "references": [str(path) for path in result.references],
                  "record": result.model_dump_json()}
        if where := job.get("save"):
            result.save(where)
    except Exception as error:
        every = [error, *getattr(error, "causes", ())]
        found |= {"end": "error", "classes": [c.__name__ for c in type(error).__mro__],
                  "text": str(error), "causes": [type(one).__name__ for one in every[1:]]}
    if shim:
        import ctypes

        count = ctypes.CDLL(None).refimg_shim_calls
        count.restype = ctypes.c_long
        found["calls"] = count()
    return found


def arm(folder: Path, record: str | None = None, at: int = 0, times: int = 0, error: int = 0,
        kill: int = 0) -> None:
    """Lets the shim, loaded before, count and fail from here on."""
    import ctypes

    shim = ctypes.CDLL(None).refimg_shim_arm
    shim.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_long] * 2 + [ctypes.c_int, ctypes.c_long]
    shim.restype = None
    shim(os.fsencode(folder), record and os.fsencode(record), at, times, error, kill)


def _fork(job: dict[str, Any], live: Callable[[dict], dict]) -> dict[str, Any]:
    """What a life in a process of its own said, and the signal that ended it."""
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        os.close(reading)
        signal.alarm(LIMIT)
        text = json.dumps(live(job))
        with os.fdopen(writing, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return (json.loads(text) if text else {"end": "killed", "warnings": []}) | {"signal": ended}


def serve(live: Callable[[dict], dict], modules: Iterable[str]) -> None:
    """Imports the modules, then reads a job a line, lives it, and prints what came of it."""
    sys.path.insert(0, str(ROOT))
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line), live)), flush=True)


class Lives:
    """The process that forks; leaving the `with` ends it."""

    def __init__(self, preload: Path | None = None, command: Iterable[str] = (__file__,)):
        environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
        self._process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def live(self, folder: Path, **job: Any) -> dict[str, Any]:
        """Runs the story in that folder; its bill lies beside it."""
        work = {"folder": str(folder), "bill": str(bill_of(folder).path), **job}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=LIMIT + 10)
        self._process.stdout.close()


def bill_of(folder: Path, life: int = 1) -> Bill:
    """The bill of a folder, which lies beside it."""
    return Bill(folder.with_name(f"{folder.name}.bill"), life)


def pictures(found: dict[str, Any]) -> list[bytes | None]:
    """The files of a finished life's references; None for one that is no image."""
    from refimg.storage.files import read_image

    made = []
    for path in found.get("references", ()):
        try:
            read_image(Path(path))
            made.append(Path(path).read_bytes())
        except ValueError:
            made.append(None)
    return made


def leftovers(folder: Path) -> list[str]:
    """Files that a run may not leave behind; of its traces, the folder above them."""
    traces, found = folder / "reference_image_traces", []
    for path in folder.rglob("*"):
        part = path.suffix in PARTS or path.name.startswith(".refimg-")
        if path == traces or (part and traces not in path.parents):
            found.append(str(path.relative_to(folder)))
    return sorted(found)


if __name__ == "__main__":
    serve(live, ("refimg.pipeline", "refimg.storage.journal", "tests.fakes",
                 "tests.servers.images"))
