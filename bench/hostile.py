"""Hostile answers of providers over real sockets, through both real SDKs, a process for each.

A story of one scene runs against a server that gives one of the answers of `_wire.py` whenever its
place is asked. `memory_mb` is the most that a process grew, `hold_ms` the longest time for which
its event loop did not come back (the better of two runs), `leaks` texts and files that show a key,
its half, or a key that only control characters cut, `controls` logs, warnings and records with raw
control characters, `unfinished` runs without an end, `unexpected` other errors than those that are
documented, also as a cause within them, and `unheard` what only the event loop was told.
`--quick N` takes every N-th answer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from bench import _wire
from bench._lives import ROOT, Lives, serve
from bench._wire import KEYS, MODEL, Case, cases

LONG = True
MEMORY, HOLD, NOISE = 200.0, 50.0, 500.0  # MB and ms that are allowed; ms that a machine may add
SECONDS = 30  # for one story
EXPECTED = ("GenerationFailed", "ProviderError", "ValueError", "OSError")
BUGS = re.compile(r"\b(Attribute|Type|Key|Index|Recursion|Memory|Overflow|ZeroDivision|Assertion|"
                  r"Unicode\w*|NotImplemented)Error\b")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BETWEEN = re.compile("\x1b\\[[0-9;]*m|\\\\x1b\\[[0-9;]*m|\\\\u200b|\\\\n|[^A-Za-z0-9]")
NEW = "lab/odd"  # a model that no table knows


def leaking(text: str) -> bool:
    """Whether a key, or half of one, can be read there."""
    with suppress(ValueError):
        text += unquote(text)
    text += re.sub(r"\\u([0-9a-f]{4})", lambda hit: chr(int(hit[1], 16)), text)
    plain = BETWEEN.sub("", text)
    halves = [part for key in KEYS for part in (key[:14], key[-14:])]
    coded = [_wire.reflected(key)["base64"][:-4] for key in KEYS]
    return any(part in text or part in plain for part in (*halves, *coded))


def memory(what: str) -> float:
    """MB of this process: "VmRSS" now, "VmHWM" at most."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    return int(found[1]) / 1024


async def hold(longest: list[float]) -> None:
    """Notes the longest time for which the event loop did not come back, until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.002)
        longest[0] = max(longest[0], time.perf_counter() - before - 0.002)


def hurry() -> None:
    """Lets this process wait in hundredths of what it would wait."""
    from refimg.adapters import download, replicate, retry

    retry._BACKOFF, retry._SPREAD, retry._LONGEST = (0.01, 0.05), 0.05, 0.1
    replicate._FETCH = (0.02, 0.1)
    replicate.fetch = partial(download.fetch, seconds=1.0)


async def tell(port: int, model: str, folder: Path) -> Any:
    """What comes of a story at a server."""
    from refimg import Pipeline, Scene, Story
    from refimg.adapters.openai import OpenAIChat
    from refimg.adapters.replicate import ReplicateImages
    from refimg.storage.journal import Journal

    url = f"http://127.0.0.1:{port}"
    chat = OpenAIChat("any", base_url=f"{url}/v1", api_key=KEYS[0], timeout=1.0)
    drawing = ReplicateImages(model, base_url=url, api_token=KEYS[1], timeout=2.0)
    pipeline = Pipeline(
        director=chat, critic=chat, image_model=drawing, scorers=[], num_variations=1, seed=1,
        max_enhancement_iterations=1, journal=Journal(folder / "journal"), keep_traces=True)
    story = Story(scenes=[Scene(prompt="A keeper on a stair")],
                  initial_reference_image=folder / "first.png")
    return await pipeline.run(story, generation_id="story", output_dir=folder / "images")


async def suffer(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a hostile server did to a story, after one at a good server."""
    unheard, longest = [], [0.0]
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: unheard.append(repr(context.get("exception") or context["message"])))
    await tell(job["good"], MODEL, folder / "warm")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # VmHWM begins anew
    before, found = memory("VmRSS"), {}
    ticker = asyncio.create_task(hold(longest))
    try:
        async with asyncio.timeout(SECONDS) as limit:
            result = await tell(job["port"], job["model"], folder / "told")
        found |= {"end": "finished", "texts": [repr(result), result.model_dump_json()],
                  "said": [w for scene in result.scenes for w in scene.warnings]}
    except BaseException as error:
        every = [error, *getattr(error, "causes", ())]
        classes = [[c.__name__ for c in type(one).__mro__] for one in every]
        end = "unfinished" if limit.expired() else "error"
        found |= {"end": end, "classes": classes, "said": [str(one) for one in every],
                  "texts": ["".join(traceback.format_exception(one)) for one in every]}
    ticker.cancel()
    gc.collect()
    return found | {"memory": memory("VmHWM") - before, "hold": 1000 * longest[0],
                    "unheard": unheard}


def live(job: dict[str, Any]) -> dict[str, Any]:
    """What came of a hostile answer, with all that it left judged."""
    from tests.fakes import picture

    log, folder = io.StringIO(), Path(job["folder"])
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    logging.getLogger("refimg").setLevel(logging.DEBUG)
    hurry()
    for name in ("warm", "told"):
        (folder / name).mkdir()
        (folder / name / "first.png").write_bytes(picture(50))
    found = asyncio.run(suffer(job, folder))
    texts = found.pop("texts") + found["said"]
    logged = log.getvalue().split("\n")
    places = {"log": [line for line in logged if leaking(line)] or
              [log.getvalue()] * leaking(log.getvalue()), "text": filter(leaking, texts)}
    found["leaks"] = [f"{where}: {text[:300]}" for where, some in places.items() for text in some]
    for path in filter(Path.is_file, folder.rglob("*")):
        if leaking(path.read_bytes().decode("utf-8", "replace")):
            found["leaks"].append(f"file: {path.relative_to(folder)}")
    found["controls"] = [ascii(text[:200]) for text in (*logged, *texts)
                         if CONTROL.search(text.replace("\t", " "))]
    found["said"] = [text[:300] for text in found["said"]]
    return found


def unexpected(found: dict[str, Any]) -> list[str]:
    """Errors that are none of the documented ones."""
    odd = [names[0] for names in found.get("classes", ()) if not set(EXPECTED) & set(names)]
    return odd + [text for text in found["said"] if BUGS.search(text)]


def judge(case: Case, found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is to be counted of one case."""
    if found["end"] == "killed":
        return [("unfinished", f"killed by {found['signal']}")]
    out = [("finished" if found["end"] == "finished" else "errors", "")]
    if found["end"] == "unfinished":
        out = [("unfinished", str(found["said"])[:200])]
    elif odd := unexpected(found):
        out.append(("unexpected", f"{odd[0]:.300}"))
    for key in ("leaks", "controls", "unheard"):
        out += [(key, f"{found[key][0]:.300}")] if found[key] else []
    out += [("over_memory", f"{found['memory']:.0f} MB")] if found["memory"] > MEMORY else []
    return out + ([("over_hold", f"{found['hold']:.0f} ms")] if found["hold"] > HOLD else [])


class Ordeal:
    """The servers of all cases; leaving the `with` ends them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._process = subprocess.Popen([sys.executable, _wire.__file__], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ports = json.loads(self._process.stdout.readline())
        self.cases = list(cases())

    def one(self, lives: Lives, number: int) -> dict[str, Any]:
        """What came of the case of that number."""
        folder = self.folder / str(number)
        folder.mkdir()
        case = self.cases[number]
        model = NEW if case.place == "model" else MODEL
        found = lives.live(folder, port=self.ports[number], good=self.ports[-1], model=model)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def better(self, lives: Lives, number: int) -> dict[str, Any]:
        """The same; where the loop was held, the better of two runs."""
        found = self.one(lives, number)
        if HOLD < found.get("hold", 0) < NOISE:
            again = self.one(lives, number)
            found["hold"] = min(found["hold"], again.get("hold", found["hold"]))
        return found

    def __enter__(self) -> Ordeal:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


COUNTED = ("finished", "errors", "unfinished", "unexpected", "unheard", "leaks", "controls",
           "over_memory", "over_hold")


def wicked() -> Lives:
    """The process whose forks suffer."""
    return Lives(command=(__file__, "--live"))


def measure(folder: Path, every: int = 1) -> tuple[dict[str, Any], list[str]]:
    """The figures, and a line for each answer that was not borne."""
    counts, said, worst = Counter(), [], {"memory": 0.0, "hold": 0.0}
    with Ordeal(folder) as ordeal:
        wanted = range(0, len(ordeal.cases), every)

        def some(mine: range) -> None:
            with wicked() as lives:
                for number in mine:
                    case, found = ordeal.cases[number], ordeal.better(lives, number)
                    for key in worst:
                        worst[key] = max(worst[key], found.get(key, 0.0))
                    for key, text in judge(case, found):
                        counts[key] += 1
                        if text:
                            said.append(f"{key}: {case.place}, {case.name}: {text}")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(some, (wanted[::2], wanted[1::2])))
    result = {"answers": len(wanted), "memory_mb": round(worst["memory"], 1),
              "hold_ms": round(worst["hold"], 1)}
    return result | {key: counts[key] for key in COUNTED}, said


def main() -> None:
    """Prints what was not borne and, as the last line, the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, metavar="N", default=1, help="every N-th answer")
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live:
        return serve(live, ("openai.resources.chat", "replicate.client", "stamina", "httpx",
                            "refimg.pipeline", "refimg.adapters.openai", "tests.fakes",
                            "refimg.adapters.replicate", "refimg.storage.journal"))
    with tempfile.TemporaryDirectory() as folder:
        result, said = measure(Path(folder).resolve(), options.quick)
    for text in sorted(said):
        print(ascii(text)[1:-1])
    for key, value in result.items():
        print(f"{key:<12} {value:8}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
