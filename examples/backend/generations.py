"""Start, follow and cancel generations, and resume them after a restart.

All files are in one folder, which belongs to one process at a time:

    records/ID.json    the order and its progress; written before the client gets its answer
    results/ID.json    the `StoryResult`, once there is one
    images/            the images          uploads/  images of clients, by their checksum
    journal/           refimg's journal of paid calls, so that nothing is paid twice
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import AfterValidator, BaseModel, Field

from refimg import GenerationCancelled, Pipeline, Scene, Story, StoryResult
from refimg.engine.results import threshold_warning
from refimg.pipeline import Progress
from refimg.score import normalized_weights
from refimg.storage.files import check_id, decode_image, encode_png
from refimg.storage.secrets import log_line

logger = logging.getLogger("refimg.backend")
GenerationId = Annotated[str, AfterValidator(check_id)]
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
State = Literal["waiting", "running", "cancelling", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")


class Order(BaseModel, frozen=True, extra="forbid"):
    """The request of a client: a story, and the settings of its run."""

    scenes: Annotated[list[Scene], Field(min_length=1, max_length=50)]
    title: str = ""
    consistency_markers: dict[str, Any] = {}
    brand: str | None = None
    initial_reference_image: Checksum | None = None  # of an upload: clients name no paths
    num_variations: Annotated[int, Field(ge=1, le=20)] = 4
    max_enhancement_iterations: Annotated[int, Field(ge=0, le=10)] = 4
    seed: int | None = None


class Record(BaseModel, frozen=True):
    """One generation as it is kept on disk, with all that a restart needs."""

    generation_id: str
    order: Order
    state: State = "waiting"
    steps: list[Progress] = []  # three per scene, in the order in which they came
    error: str | None = None
    unscored: str | None = None  # why an image was not scored

    @property
    def percent(self) -> float:
        """Progress from 0 to 100; it never falls, not even after a restart."""
        return 100.0 if self.state == "done" else max([0.0, *(s.percent for s in self.steps)])


@dataclass
class Live:
    """A generation of this process that has not ended."""

    record: Record
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task | None = None


class Taken(ValueError):
    """The generation_id belongs to another order."""


class Unreadable(RuntimeError):
    """A file of the folder is damaged; its content is not repeated."""


def read(path: Path, parse: Callable[[Path], Any], what: str) -> Any:
    """Return the content of a file; if it cannot be read, log why."""
    try:
        return parse(path)
    except (OSError, ValueError) as error:
        logger.error("%s cannot be read: %s", path, log_line(str(error))[:500])
        raise Unreadable(f"the generation is there, but its {what} cannot be read") from None


def read_record(path: Path) -> Record:
    """Read the record in a file."""
    return read(path, lambda path: Record.model_validate_json(path.read_bytes()), "record")


def write(path: Path, data: bytes) -> None:
    """Replace the content of a file as a whole: it is never partly written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.write_bytes(data)
    os.replace(part, path)


class Generations:
    """The generations of one folder."""

    def __init__(self, pipeline: Pipeline, folder: Path, at_once: int = 16):
        self.pipeline, self.folder = pipeline, folder
        self.unscored: str | None = None  # why the images of the next run cannot be scored
        self.live: dict[str, Live] = {}
        self.slots = asyncio.Semaphore(at_once)
        self.lock = FileLock(folder / "lock")

    async def __aenter__(self) -> Generations:
        """Load the models, then continue all generations that have not ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.acquire(blocking=False)  # a second process would pay for the same runs
        await self._load()
        for path in sorted((self.folder / "records").glob("*.json")):
            try:
                record = read_record(path)
            except Unreadable:
                continue
            if record.state == "cancelling":
                self._write(record.model_copy(update={"state": "cancelled"}))
            elif record.state not in ENDED:
                self._begin(record.model_copy(update={"state": "waiting"}))
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop all generations; the next start resumes them, as their records have not ended."""
        tasks = [live.task for live in self.live.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.lock.release()

    async def _load(self) -> None:
        """Load the models; without them the service starts too, and says what is missing."""
        try:
            await self.pipeline.load()
        except Exception as error:
            logger.warning("%s", reason := log_line(str(error)))
            scorers = self.pipeline.scorers
            lacking = {s.name for s in scorers if getattr(s, "missing", lambda: None)()}
            weights = normalized_weights([s.name for s in scorers], self.pipeline.weights)
            if sum(weight for name, weight in weights.items() if name not in lacking) < 0.5:
                self.unscored = reason

    # requests of clients

    async def start(self, order: Order, generation_id: str | None = None) -> Record:
        """Start a generation, or return the one that this order has started before."""
        name = secrets.token_hex(8) if generation_id is None else generation_id
        if known := self.find(name):
            return self._same(known, order)
        pipeline, story = self._pipeline(order), self._story(order)
        await asyncio.to_thread(pipeline.estimate, story)  # a ValueError says what is wrong
        if known := self.find(name):
            return self._same(known, order)
        record = Record(generation_id=name, order=order)
        self._write(record)
        return self._begin(record)

    def find(self, generation_id: str) -> Record | None:
        """Return the record, or None if there is no such generation; it may be `Unreadable`."""
        if live := self.live.get(generation_id):
            return live.record
        path = self.folder / "records" / f"{generation_id}.json"
        return read_record(path) if path.exists() else None

    def cancel(self, generation_id: str) -> None:
        """Let the generation make no new call; one that has ended stays as it is."""
        live = self.live.get(generation_id)
        state = live and live.record.state
        if state == "waiting":
            self._change(live, state="cancelled")
            live.task.cancel()
        elif state == "running":
            self._change(live, state="cancelling")

    def result(self, generation_id: str) -> StoryResult:
        """Return the result of a generation that is done; it may be `Unreadable`."""
        return read(self._result_path(generation_id), StoryResult.load, "result")

    async def follow(self, generation_id: str, step: int = 0) -> AsyncIterator[Record]:
        """Yield the record after each step from that one on, and at its end."""
        while True:
            live = self.live.get(generation_id)
            changed, record = live and live.changed, self.find(generation_id)
            while step < len(record.steps):
                step += 1
                yield record.model_copy(update={"steps": record.steps[:step], "state": "running"})
            if live is None or record.state in ENDED:
                yield record
                return
            await changed.wait()

    def keep_upload(self, data: bytes) -> str:
        """Keep an image and return its checksum; raise a ValueError for anything else."""
        png = encode_png(decode_image(data), {})
        name = hashlib.sha256(png).hexdigest()
        write(self.folder / "uploads" / f"{name}.png", png)
        return name

    # running

    def _same(self, record: Record, order: Order) -> Record:
        if record.order != order:
            raise Taken(f"generation_id {record.generation_id!r} belongs to another order")
        return record

    def _pipeline(self, order: Order) -> Pipeline:
        """Return the service's pipeline, with its loaded models and the order's settings."""
        return replace(self.pipeline, num_variations=order.num_variations, seed=order.seed,
                       max_enhancement_iterations=order.max_enhancement_iterations)

    def _story(self, order: Order) -> Story:
        given = order.initial_reference_image
        image = given and self.folder / "uploads" / f"{given}.png"
        return Story(scenes=order.scenes, title=order.title, brand=order.brand,
                     consistency_markers=order.consistency_markers, initial_reference_image=image)

    def _result_path(self, generation_id: str) -> Path:
        return self.folder / "results" / f"{generation_id}.json"

    def _write(self, record: Record) -> None:
        data = record.model_dump_json().encode()
        write(self.folder / "records" / f"{record.generation_id}.json", data)

    def _change(self, live: Live, **update: Any) -> None:
        """Change the record, in memory and on disk, and wake its followers."""
        live.record = live.record.model_copy(update=update)
        self._write(live.record)
        live.changed.set()
        live.changed = asyncio.Event()

    def _change_unless_cancelled(self, live: Live, **update: Any) -> None:
        """Do the same, but never overwrite a cancel."""
        if live.record.state not in ("waiting", "running"):
            raise GenerationCancelled
        self._change(live, **update)

    def _begin(self, record: Record) -> Record:
        live = self.live[record.generation_id] = Live(record)
        live.task = asyncio.create_task(self._run(live))
        live.task.add_done_callback(lambda task: self._forget(live))
        return record

    def _forget(self, live: Live) -> None:
        """Remove a generation that has ended, or is left to the next start, from memory."""
        del self.live[live.record.generation_id]
        live.changed.set()

    def _step(self, live: Live, step: Progress) -> None:
        """Add a step, unless a resumed run reports it for the second time."""
        if (step.stage, step.scene) not in {(s.stage, s.scene) for s in live.record.steps}:
            percent = max(step.percent, live.record.percent)
            told = step.model_copy(update={"percent": percent})
            self._change(live, steps=[*live.record.steps, told])

    async def _run(self, live: Live) -> None:
        """Run a generation to its end; only a shutdown interrupts it."""
        name, order = live.record.generation_id, live.record.order
        try:
            async with self.slots:
                self._change_unless_cancelled(live, state="running")
                result = await self._pipeline(order).run(
                    self._story(order), generation_id=name, output_dir=self.folder / "images",
                    on_progress=partial(self._step, live),
                    cancellation_check=lambda: live.record.state == "cancelling")
            path = self._result_path(name)
            path.parent.mkdir(exist_ok=True)
            await asyncio.to_thread(result.save, path)
            selected = (v.scores for s in result.scenes for v in s.variations if v.selected)
            unscored = (scores for scores in selected if scores.overall is None)
            reason = next((threshold_warning(scores, 0) for scores in unscored), None)
            told = reason and log_line(reason)
            self._change_unless_cancelled(live, state="done", unscored=told)
        except GenerationCancelled:
            self._change(live, state="cancelled")
        except Exception as error:
            logger.exception("generation %s failed", name)
            self._change(live, state="failed", error=log_line(str(error) or repr(error))[:2000])
