"""Stories with a budget, random prices, and servers that bill what they can: who paid how much?

`spend(seed, first, count)` runs that many stories against two servers of their own and returns a
`Bill` for each. What was billed is the servers' own count: the tokens that were written, also for
an answer that failed, hung or came without its usage, and each second that a prediction ran. Time
is scaled: a prediction may run for `LIMIT` seconds and would take many times as long.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from refimg import GenerationFailed, Pipeline, Scene, Story
from refimg.adapters import download, prices, replicate, retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from refimg.storage.journal import Journal
from tests.fakes import FakeScorer
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

LIMIT, ARRIVAL = 0.4, 1.0  # seconds that a prediction may run, and until its cancellation arrives
LONG = 3.0  # seconds that a prediction takes which takes too long
TOO_LARGE = "max_tokens is too large: 8192. This model supports at most 4096 completion tokens."
CHAT = (
    {"long": True}, {"fault": "no-usage", "long": True}, {"fault": "500", "long": True},
    {"fault": "hang", "seconds": 1.2, "long": True}, {"fault": "reset", "long": True},
    {"fault": "no-json", "long": True}, {"fault": "cut", "long": True}, {"fault": "429"}, {},
    {"fault": "odd-usage", "long": True}, {"fault": "truncated"},
)  # fmt: skip
IMAGES = ("500-made", "lost", "failed", "interrupted", "nsfw", "canceled", "gone", "500", None)


@dataclass
class Case:
    """One story: its prices, its budget, and what its servers do."""

    number: int
    budget: float
    chat: dict[str, float]  # its price
    image: dict[str, float]  # its price
    stories: int = 1  # 2 or more: by `run_many`, with the budget for all
    runs: int = 1  # of the same id, with a journal
    faults: list[dict] = field(default_factory=list)
    image_faults: list[dict] = field(default_factory=list)

    @property
    def tag(self) -> str:
        """What stands in every prompt of the case."""
        return f"money{self.number:05d}."


@dataclass
class Bill:
    """What the servers count, beside the cap."""

    number: int
    budget: float
    chat: float
    images: float
    end: str
    calls: int

    @property
    def over(self) -> float:
        """USD above the cap."""
        return max(0.0, self.chat + self.images - self.budget - 1e-9)


def made(seed: int, number: int) -> Case:
    """The case that seed and number decide."""
    chance = random.Random(f"{seed}/{number}")
    free = chance.random() < 0.05
    tokens = {"input": 0.0 if free else 10 ** chance.uniform(-2, 1.5),
              "output": 0.0 if free else 10 ** chance.uniform(-1, 2)}
    timed = chance.random() < 0.5
    image = {"second" if timed else "image": 10 ** chance.uniform(-3, -0.5)}
    case = Case(number, 10 ** chance.uniform(-1, 0.7), tokens, image)
    case.stories, case.runs = chance.choice([1, 1, 1, 3]), chance.choice([1, 1, 2])
    limit = chance.random() < 0.3
    case.faults = [{"fault": "400-limit", "match": "max_completion_tokens"}] * 60 * limit
    if chance.random() < 0.2:
        case.faults += [{"fault": "400-limit", "says": TOO_LARGE, "match": ": 8192"}] * 60
    case.faults += [dict(chance.choice(CHAT)) for _ in range(chance.randint(0, 60))]
    takes = [LONG, LONG, 0.05] if timed else [0.05]
    case.image_faults = [{"fault": chance.choice(IMAGES), "takes": chance.choice(takes)}
                         for _ in range(chance.randint(0, 40))]
    for fault in (*case.faults, *case.image_faults):
        fault["match"] = fault.get("match", "") or case.tag
    return case


@contextmanager
def hurried() -> Iterator[None]:
    """Waits in hundredths, and a limit of time that is scaled."""
    own = [(retry, "_BACKOFF", (0.01, 0.05)), (retry, "_SPREAD", 0.02), (retry, "_LONGEST", 0.05),
           (prices, "MAX_SECONDS", LIMIT), (prices, "CANCELLING", ARRIVAL),
           (replicate, "_FETCH", (0.01, 0.02)),
           (replicate, "fetch", partial(download.fetch, seconds=1.0, most=1_000_000))]
    before = [getattr(module, name, None) for module, name, _ in own]
    for module, name, value in own:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(own, before, strict=True):
            setattr(module, name, value)


async def play(case: Case, llm: Any, images: Any, folder: Path) -> str:
    """How the case ends."""
    ends = []
    scenes = [Scene(prompt=f"{case.tag} A keeper on stair {n}") for n in (1, 2)]
    for _ in range(case.runs):
        chat = OpenAIChat(f"gpt-{case.number}", base_url=llm.base_url, api_key="x", timeout=1.0)
        drawn = ReplicateImages(base_url=images.base_url, api_token="x", timeout=10)
        await asyncio.gather(chat.load(), drawn.load())
        many = case.stories > 1
        pipeline = Pipeline(
            director=chat, critic=chat, image_model=drawn, scorers=[FakeScorer()], seed=1,
            num_variations=2, max_enhancement_iterations=2, chain="none",
            budget_usd=None if many else case.budget,
            journal=Journal(folder / "journal") if case.runs > 1 else None)  # fmt: skip
        where = {"generation_id": "m", "output_dir": folder / "images"}
        try:
            if many:
                told = [Story(scenes=scenes[:1])] * case.stories
                each = pipeline.run_many(told, budget_usd=case.budget, **where)
                ends += [type(one).__name__ async for one in each]
            else:
                ends.append(type(await pipeline.run(Story(scenes=scenes), **where)).__name__)
        except GenerationFailed:
            ends.append("GenerationFailed")
    return ",".join(sorted(set(ends)))


def bill(case: Case, llm: Any, images: Any, end: str) -> Bill:
    """What the servers counted for the case."""
    tokens = [one["usage"] for one in llm.requests() if one["usage"]]
    chat = sum(used["prompt_tokens"] * case.chat["input"]
               + used["completion_tokens"] * case.chat["output"] for used in tokens) / 1e6
    drawn = [one for one in images.predictions() if case.tag in one["input"]["prompt"]
             and one["status"] != "aborted"]
    each = case.image.get("image")
    ran = (one["metrics"].get("predict_time", LONG) for one in drawn)
    usd = sum(seconds * case.image["second"] for seconds in ran) if each is None else (
        each * len(drawn))
    return Bill(case.number, case.budget, chat, usd, end, len(tokens) + len(drawn))


def settle(case: Case, llm: Any, images: Any) -> Bill:
    """Play a case, and return its bill."""
    with hurried(), tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), os.environ.get("REFIMG_PRICES")
        table = {f"openai:gpt-{case.number} @ {llm.origin[7:]}": case.chat,
                 f"replicate:google/nano-banana-2 @ {images.base_url[7:]}": case.image}
        (folder / "prices.json").write_text(json.dumps(table), "utf-8")
        os.environ["REFIMG_PRICES"] = str(folder / "prices.json")
        llm.script(case.faults)
        images.script(case.image_faults)
        try:
            return bill(case, llm, images, asyncio.run(play(case, llm, images, folder)))
        finally:
            del os.environ["REFIMG_PRICES"]
            if before is not None:
                os.environ["REFIMG_PRICES"] = before


def spend(seed: int, first: int, count: int) -> list[Bill]:
    """The bills of cases `first` to `first + count - 1`."""
    with start_llm_server() as llm, start_image_server() as images:
        return [settle(made(seed, first + k), llm, images) for k in range(count)]
