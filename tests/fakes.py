"""Fakes that speak the three protocols, with scripts: what a test wants to go wrong, goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from refimg.enhance import Message, Reply
from refimg.generate import GeneratedImage, ImageRequest
from refimg.score import Batch, RawScore

DIMENSIONS = ("completeness", "specificity", "professionalism", "cinematography", "brand_alignment")


def until(happens: Callable[[], Any], seconds: float = 60) -> None:
    """Returns as soon as it happens."""
    limit = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < limit
        time.sleep(0.02)


def critique(score: float, **over: Any) -> str:
    """A critique's JSON in which every dimension, and so the overall, has the same score."""
    body = dict.fromkeys(DIMENSIONS, score) | {"critique": "as scripted", "improvements": ["more"]}
    return json.dumps(body | over)


class FakeChat:
    """A chat model that plays a script: items are texts, Replies, exceptions or functions."""

    takes_call = False  # a test may set it

    def __init__(self, script: Any = (), *, name: str = "fake-chat", seconds: float = 0.0):
        self.name, self.seconds = name, seconds
        self.script = list(script) if not callable(script) else script
        self.calls: list[tuple[list[Message], type | None]] = []

    async def reply(
        self, messages: list[Message], schema: type | None = None, *, call: Any = None
    ) -> Reply:
        self.calls.append((messages, schema))
        number = len(self.calls)
        await asyncio.sleep(self.seconds)
        item = self.script
        if not callable(item):
            item = item[min(number, len(item)) - 1] if item else f"a better prompt, {number}"
        if callable(item):
            item = item(messages, schema, number)
        if isinstance(item, BaseException):
            raise item
        return item if isinstance(item, Reply) else Reply(text=item)


def director(seconds: float = 0.0, **kwargs: Any) -> FakeChat:
    """A director that keeps the original prompt and adds a version number."""

    def write(messages: list[Message], schema: type | None, number: int) -> str:
        return f"A better prompt, number {number}, of a lighthouse keeper."

    return FakeChat(write, name="fake-director", seconds=seconds, **kwargs)


def critic(*scores: float, seconds: float = 0.0) -> FakeChat:
    """A critic whose overall is the next of `scores` at each call, the last one for ever after."""
    return FakeChat([critique(s) for s in scores or (90,)], name="fake-critic", seconds=seconds)


def picture(shade: int = 0, size: tuple[int, int] = (64, 36), form: str = "PNG") -> bytes:
    """The bytes of a plain image whose red channel is `shade`."""
    out = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 80, 120)).save(out, form)
    return out.getvalue()


class FakeImages:
    """An image model; `script(request, number)` may raise, or return bytes or a GeneratedImage."""

    def __init__(
        self,
        script: Callable[[ImageRequest, int], Any] | None = None,
        *,
        name: str = "fake-images",
        seconds: float = 0.0,
        max_references: int = 1,
        takes_seed: bool = True,
        takes_negative_prompt: bool = False,
        aspect_ratios: tuple[str, ...] | None = None,
    ):
        self.name, self.script, self.seconds = name, script, seconds
        self.max_references, self.takes_seed = max_references, takes_seed
        self.takes_negative_prompt, self.aspect_ratios = takes_negative_prompt, aspect_ratios
        self.requests: list[ImageRequest] = []
        self.cancelled = 0

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        self.requests.append(request)
        number = len(self.requests)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        made = self.script(request, number) if self.script else picture(10 * number)
        if isinstance(made, BaseException):
            raise made
        if isinstance(made, bytes):
            made = GeneratedImage(data=made, seed=request.seed, provider_id=f"p{number}")
        return made


class FakeScorer:
    """A scorer; its value is the image's red channel, or what `value(image, prompt)` says."""

    model = "fake-model"
    calibration = "fake-identity"

    def __init__(
        self,
        name: str = "pickscore",
        value: Callable[[Image.Image, str], Any] | None = None,
        seconds: float = 0.0,
    ):
        self.name, self.seconds = name, seconds
        self.value = value or (lambda image, prompt: float(image.getpixel((0, 0))[0]))
        self.batches: list[Batch] = []

    def to_100(self, raw: float) -> float:
        return raw * 100 / 255

    def score(self, batch: Batch) -> list[RawScore]:
        self.batches.append(batch)
        time.sleep(self.seconds * len(batch.images))
        made = [self.value(image, batch.prompt) for image in batch.images]
        for item in made:
            if isinstance(item, BaseException):
                raise item
        return [m if isinstance(m, RawScore) else RawScore(value=m) for m in made]
