"""Stories on bad days: the real pipeline and both SDKs, servers that fail by a seeded script.

`spend(seed, first, count)` runs that many stories at once, against two servers of their own, and
returns a `Report` of what was promised and did not come. It changes timeouts of the process it runs
in, so `spend_all` gives it processes of its own.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from refimg import GenerationCancelled, GenerationFailed, Pipeline, Scene, Story
from refimg.adapters import download, replicate, retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from refimg.storage.journal import Journal
from tests.fakes import FakeScorer
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

SCENES = VARIATIONS = ROUNDS = 2
AT_ONCE = 24  # stories
KEYS = ("kP4tQ0Zr9XwVb2Nc7Ys5LdGh81", "Wq8Hs3Jf6Pk1Zx0Rm4Tv7BnYc9")  # of no known form
CHATS = ("gpt-steady", "gpt-odd")  # the second meets servers that do not know a form of answer
IMAGES = ("google/nano-banana", "black-forest-labs/flux-2-pro", "lab/portrait")
CHAT_PRICE, IMAGE_PRICE = {"input": 0.75, "output": 4.5}, 0.039

FATAL = ("401", "402", "quota")  # nothing more can be had from that provider
FORM = ("400-form", "422")
CHAT_FAULTS = (
    "400", "403", "404", "429", "429-after", "429-ms", "429-hint", "500", "502", "503", "html",
    "no-json", "redirect", "truncated", "think", "unclosed-think", "fences", "nan", "strings",
    "bools", "above", "no-text", "refusal", "parts", "filtered", "length", "empty", "null", "error",
    "odd", "no-usage", "odd-usage", "late", "hang", "reset", "drip", "cut",
)  # fmt: skip
CREATE_FAULTS = (
    "422", "429", "500", "502", "503", "hang", "reset", "late", "delayed", "lost", "garbage",
    "failed", "interrupted", "canceled", "aborted", "nsfw", "forever", "empty", "truncated", "html",
    "bomb", "endless", "gone", "redirect", "elsewhere", "slow",
)  # fmt: skip
OTHER_FAULTS = (
    ("get", "500"), ("get", "502"), ("get", "garbage"), ("get", "reset"), ("get", "404"),
    ("list", "500"), ("list", "reset"), ("list", "garbage"), ("upload", "500"), ("upload", "429"),
    ("upload", "garbage"), ("output", "404"), ("output", "reset"), ("cancel", "500"),
    ("model", "500"), ("model", "garbage"),
)  # fmt: skip
NOWHERE = "http://127.0.0.1:9/secret.png"


@dataclass
class Report:
    """What a number of stories came to; all but the first four should be empty or 0."""

    stories: int = 0
    ends: Counter = field(default_factory=Counter)  # how the stories ended
    faults: Counter = field(default_factory=Counter)  # that were delivered, by kind
    pictures: int = 0  # variations in the results
    failures: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    overspend: float = 0.0  # USD
    orphans: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Nothing; the other's numbers are counted here too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Plan:
    """One story and what is to go wrong with it."""

    number: int
    chance: random.Random
    budget: float | None
    stop_after: float | None  # seconds
    chat: str
    images: str

    @property
    def tag(self) -> str:
        """What stands in every prompt of the story."""
        return f"story{self.number:05d}."

    def story(self) -> Story:
        """Two scenes."""
        scenes = [Scene(prompt=f"{self.tag} A keeper on stair {n}") for n in (1, 2)]
        return Story(scenes=scenes, consistency_markers={"style": "ink"})


def plan(seed: int, number: int) -> Plan:
    """The plan of a story, decided by seed and number alone."""
    chance = random.Random(f"{seed}/{number}")
    budget = chance.uniform(0.05, 0.25) if chance.random() < 0.4 else None
    stop = chance.uniform(0.02, 2) if chance.random() < 0.15 else None
    return Plan(number, chance, budget, stop, CHATS[chance.random() < 0.1], chance.choice(IMAGES))


def chat_faults(p: Plan) -> list[dict]:
    """What the chat server does to a story."""
    kinds = [*CHAT_FAULTS, *(FORM if p.chat == "gpt-odd" else ())]
    names = p.chance.choices(kinds, k=p.chance.choice([0, 1, 1, 2, 3, 5]))
    if p.chance.random() < 0.03:
        names.insert(0, p.chance.choice(FATAL))
    more = {"after": 0.02, "to": NOWHERE, "match": p.tag}
    times = {"late": 0.2, "hang": 3, "drip": 0.02}
    return [{"fault": n, "seconds": times.get(n, 0)} | more for n in names]


def image_faults(p: Plan) -> list[dict]:
    """What the image server does to a story, and, now and then, to whoever comes next."""
    names = p.chance.choices(CREATE_FAULTS, k=p.chance.choice([0, 1, 1, 2, 4]))
    if p.chance.random() < 0.03:
        names.insert(0, p.chance.choice(FATAL[:2]))
    more = {"match": p.tag, "url": NOWHERE, "retry_after": 0.02}
    times = {"late": 3, "delayed": 0.2, "hang": 3}
    made = [{"fault": n, "seconds": times.get(n, 0)} | more for n in names]
    on, name = p.chance.choice(OTHER_FAULTS)
    return made + [{"on": on, "fault": name, "retry_after": 0.02}] * (p.chance.random() < 0.5)


def hurry() -> None:
    """Nothing; from here on this process waits in hundredths of what it would wait."""
    retry._BACKOFF, retry._SPREAD, retry._LONGEST = (0.01, 0.05), 0.05, 0.1
    replicate.fetch = partial(download.fetch, seconds=1.0, most=1_000_000)


@dataclass
class Day:
    """The servers, the folder and the log of one process."""

    llm: Any
    images: Any
    folder: Path
    log: io.StringIO
    report: Report = field(default_factory=Report)


def pipeline(day: Day, p: Plan, folder: Path) -> Pipeline:
    """The real pipeline of one story."""
    chat = OpenAIChat(p.chat, base_url=day.llm.base_url, api_key=KEYS[0], timeout=1.5)
    images = ReplicateImages(p.images, base_url=day.images.base_url, api_token=KEYS[1], timeout=2)
    return Pipeline(
        director=chat, critic=chat, image_model=images, num_variations=VARIATIONS, seed=p.number,
        scorers=[FakeScorer()] if p.number % 2 else [], max_enhancement_iterations=ROUNDS,
        budget_usd=p.budget, journal=Journal(folder / "journal") if p.number % 4 == 0 else None,
    )  # fmt: skip


def shapes(key: str) -> list[bytes]:
    """The key as it may stand in a file."""
    return [key.encode(), base64.b64encode(key.encode())[:-4]]


def leaking(data: bytes) -> bool:
    """Whether a key stands in there."""
    return any(shape in data for key in KEYS for shape in shapes(key))


def broken(p: Plan, folder: Path, result: Any) -> list[str]:
    """What is wrong with a story's result."""
    found = []
    if [s.prompt for s in result.scenes] != [s.prompt for s in p.story().scenes]:
        found.append("scenes in another number or order")
    if result.references != [s.reference for s in result.scenes]:
        found.append("references are not those of the scenes")
    for number, scene in enumerate(result.scenes, 1):
        stem = f"{result.generation_id}_scene_{number:02d}_v"
        if scene.scene != number or not scene.reference.is_relative_to(folder):
            found.append(f"scene {number} is {scene.scene}, at {scene.reference}")
        if scene.reference_from != "carried" and not scene.reference.name.startswith(stem):
            found.append(f"scene {number} has {scene.reference.name}")
        if number > 1 and scene.variations:
            sent = {v.image.references for v in scene.variations}
            if sent - {(result.references[number - 2],), ()}:
                found.append(f"scene {number} was drawn from {sent}")
    for path in {*result.references, *(v.image.image_path for s in result.scenes
                                       for v in s.variations)}:
        try:
            Image.open(path).load()
        except Exception as error:
            found.append(f"{path}: {error!r}")
    return found


def left(folder: Path) -> list[str]:
    """Files of a run that should not be there when it is over."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    pictures = {path for path in files if path.suffix == ".png" and not path.name.startswith(".")}
    journal = {path for path in files if path.is_relative_to(folder / "journal")}
    parts = {path for path in journal if path.name.startswith(".refimg-")}
    return [str(path.relative_to(folder)) for path in {*files} - pictures - (journal - parts)]


async def run(day: Day, p: Plan, folder: Path) -> tuple[str, Any]:
    """How the story ends, and its result or the error."""
    stop = asyncio.get_running_loop().time() + (p.stop_after or 1e9)
    check = (lambda: asyncio.get_running_loop().time() > stop) if p.number % 2 else None
    try:
        work = pipeline(day, p, folder).run(
            p.story(), generation_id=f"s{p.number}", output_dir=folder / "images",
            cancellation_check=check)
        async with asyncio.timeout(None if check else p.stop_after):
            return "done", await work
    except (GenerationCancelled, TimeoutError) as error:
        return ("cancelled" if p.stop_after else "broken"), error
    except GenerationFailed as error:
        return "failed", error
    except BaseException as error:
        return "broken", error


async def one(day: Day, p: Plan, slots: asyncio.Semaphore) -> None:
    """Nothing; the story has ended, and what can be said at once is in the report."""
    folder, report = day.folder / f"s{p.number}", day.report
    async with slots:
        folder.mkdir()
        end, result = await run(day, p, folder)
    report.stories, report.ends[end] = report.stories + 1, report.ends[end] + 1
    texts, wrong = [repr(result), str(result)], []
    if end == "done":
        texts += [result.model_dump_json(), result._repr_html_() if p.number % 50 == 0 else ""]
        wrong = broken(p, folder / "images", result)
        report.pictures += sum(len(scene.variations) for scene in result.scenes)
    else:
        every = (result, *getattr(result, "causes", ()))
        texts += ["".join(traceback.format_exception(error)) for error in every]
    if end == "failed" and list(folder.rglob("*.png")):
        wrong = [f"failed in spite of its pictures: {result}"]
    if end == "broken":
        wrong = [texts[-1]]
    wrong += [f"left behind: {name}" for name in left(folder)]
    report.failures += [f"{p.tag} {text}" for text in wrong]
    report.leaks += [f"{p.tag} {text[:500]}" for text in texts if leaking(text.encode())]
    for path in filter(Path.is_file, folder.rglob("*")):
        report.leaks += [f"{p.tag} {path}"] * leaking(path.read_bytes())


def chat_ledger(requests: list[dict]) -> Counter:
    """The USD of each request's tag, as the chat server counted them."""
    spent: Counter = Counter()
    for asked in requests:
        if used := asked["usage"]:
            tokens = [used["prompt_tokens"], used["completion_tokens"]]
            usd = sum(n * p / 1e6 for n, p in zip(tokens, CHAT_PRICE.values(), strict=True))
            spent[asked["body"].partition("story")[2][:6]] += usd
    return spent


def settle(day: Day, plans: list[Plan]) -> None:
    """Nothing; what the servers say of money, orphans and faults is in the report."""
    chats, made, report = day.llm.requests(), day.images.predictions(), day.report
    spent = chat_ledger(chats)
    for one in made:
        billed = one["status"] in ("succeeded", "canceled") and not one["expired"]
        spent[one["input"]["prompt"].partition("story")[2][:6]] += billed * IMAGE_PRICE
        if one["expired"] or one["status"] in ("processing", "starting"):
            report.orphans.append(f"{one['id']}: {one['input']['prompt'][-60:]!r}")
    for p in plans:
        over = spent[p.tag[5:]] - (p.budget or 1e9)
        report.overspend += max(0.0, over - 1e-9)
        if over > 1e-9:
            report.failures.append(f"{p.tag} spent {spent[p.tag[5:]]:.4f} of {p.budget:.4f}")
    report.faults.update(f"chat {r['fault']}" for r in chats if r["fault"])
    report.faults.update(f"{r['kind']} {r['fault']}" for r in day.images.requests() if r["fault"])


async def live(day: Day, plans: list[Plan]) -> None:
    """Nothing; all stories have run, so many at once."""
    slots = asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(one(day, p, slots) for p in plans))


def spend(seed: int, first: int, count: int) -> Report:
    """What becomes of stories `first` to `first + count - 1`."""
    hurry()
    plans, folder = [plan(seed, first + k) for k in range(count)], Path(tempfile.mkdtemp())
    log, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(log)
    root.addHandler(handler)
    logging.getLogger("refimg").setLevel(logging.DEBUG)
    with start_llm_server() as llm, start_image_server() as images:
        day = Day(llm, images, folder, log)
        names = [f"openai:{c} @ {llm.origin[7:]}" for c in CHATS]
        table = dict.fromkeys(names, CHAT_PRICE)
        table |= {f"replicate:{n} @ {images.base_url[7:]}": {"image": IMAGE_PRICE} for n in IMAGES}
        (folder / "prices.json").write_text(json.dumps(table), "utf-8")
        os.environ["REFIMG_PRICES"] = str(folder / "prices.json")
        llm.script([fault for p in plans for fault in chat_faults(p)])
        images.script([fault for p in plans for fault in image_faults(p)])
        asyncio.run(live(day, plans))
        settle(day, plans)
    root.removeHandler(handler)
    lines = log.getvalue().splitlines()
    day.report.leaks += [f"log: {line[:500]}" for line in lines if leaking(line.encode())]
    shutil.rmtree(folder, ignore_errors=True)
    return day.report


def spend_all(seed: int, stories: int, each: int = 125, processes: int = 2) -> Report:
    """What becomes of so many stories, `each` to a pair of servers, in two processes."""
    parts = [(seed, k, min(each, stories - k)) for k in range(0, stories, each)]
    total = Report()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for report in pool.map(spend, *zip(*parts, strict=True)):
            total.add(report)
    return total
