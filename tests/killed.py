"""A story whose process is killed at a chosen step, and what is left to pay when it runs again.

As a program it runs the story and, at step `at` (0: never), ends itself: with SIGKILL at an even
one, with SIGTERM at an odd one. A step is the beginning or the end of a line written to the
journal, of a result in its folder, or of an image.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from refimg.storage.database import FORMAT

ROOT = Path(__file__).resolve().parent.parent
SCENES, VARIATIONS, ROUNDS = 2, 2, 2
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def keys(name: str) -> tuple[str, str]:
    """Key and token by which the servers know this run from others."""
    return f"key-{name}-of-the-chat", f"token-{name}-of-the-images"


def main() -> None:
    """Prints the paths of the result, if the process lives."""
    parser = argparse.ArgumentParser()
    for option in ("folder", "llm", "images", "name"):
        parser.add_argument(option)
    parser.add_argument("at", type=int)
    options = parser.parse_args()

    from refimg import Pipeline, Scene, Story, generate
    from refimg.adapters.openai import OpenAIChat
    from refimg.adapters.replicate import ReplicateImages
    from refimg.storage import database, journal
    from refimg.storage.database import _File

    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == options.at:
            os.kill(os.getpid(), SIGNALS[options.at % 2])
            time.sleep(9)  # a signal may come a moment later

    def stepped(work: Callable) -> Callable:
        def both(*args: Any, **how: Any) -> Any:
            step()
            made = work(*args, **how)
            step()
            return made

        return both

    owned = (_File, "execute"), (database, "write_atomic"), (generate, "save_numbered")
    for owner, name in owned:
        setattr(owner, name, stepped(getattr(owner, name)))
    folder, (key, token) = Path(options.folder), keys(options.name)
    chat = OpenAIChat("gpt", base_url=options.llm, api_key=key)
    images = ReplicateImages(
        "black-forest-labs/flux-2-pro", base_url=options.images, api_token=token
    )
    pipeline = Pipeline(
        director=chat, critic=chat, image_model=images, scorers=[], num_variations=VARIATIONS,
        max_enhancement_iterations=ROUNDS, seed=11, journal=journal.Journal(folder / "journal"),
    )  # fmt: skip
    scenes = [Scene(prompt=f"a keeper on stair {n}") for n in range(1, SCENES + 1)]
    story = Story(scenes=scenes, consistency_markers={"mood": "calm"})
    result = asyncio.run(pipeline.run(story, generation_id="story", output_dir=folder / "images"))
    print(json.dumps({"references": [str(path) for path in result.references],
                      "steps": next(steps) - 1}))


class Life:
    """One story in a folder of its own: killed, looked at, and run again."""

    def __init__(self, folder: Path, llm: Any, images: Any, name: str):
        self.folder, self.name, self.llm, self.images = folder / name, name, llm, images
        self.folder.mkdir(parents=True)

    def live(self, at: int = 0) -> dict[str, Any] | None:
        """What the process printed; None where it was killed."""
        where = [self.folder, self.llm.base_url, self.images.base_url, self.name, at]
        made = subprocess.run([sys.executable, "-m", "tests.killed", *map(str, where)], cwd=ROOT,
                              capture_output=True, text=True, timeout=120)
        if made.returncode not in (0, *(-number for number in SIGNALS)):
            raise RuntimeError(made.stderr)
        return json.loads(made.stdout) if made.returncode == 0 else None

    def known(self) -> tuple[int, int]:
        """How many chats are done, and how many images are done or begun, by the journal."""
        folder, rows = self.folder / "journal", []
        if (folder / "journal.db").exists():
            no_table = suppress(sqlite3.OperationalError)  # killed before there was one
            with closing(sqlite3.connect(folder / "journal.db")) as database, no_table:
                rows = database.execute("SELECT slot, done, prediction FROM calls").fetchall()
        copies = (json.loads(path.read_bytes())["row"] for path in folder.glob("rows/*.json"))
        rows += [(copy["entry"]["slot"], copy["done"], None) for copy in copies]
        known = {slot for slot, done, begun in rows
                 if slot != FORMAT and (done or (begun and slot.startswith("story_")))}
        images = sum(slot.startswith("story_") for slot in known)
        return len(known) - images, images

    def asked(self) -> tuple[int, int]:
        """How many chats and how many images the servers were asked for, by this story."""
        key, token = keys(self.name)
        chats = [r for r in self.llm.requests() if key in r["headers"].get("authorization", "")]
        made = [r for r in self.images.requests("create") if token in str(r["headers"])]
        return len(chats), len(made)

    def pictures(self) -> dict[str, bytes]:
        """Every file by its path below the folder, but for what a kill cut off while written."""
        folder = self.folder / "images"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
                if not p.name.startswith(".refimg-")}


def kill_and_run_again(folder: Path, llm: Any, images: Any, count: int) -> dict[str, Any]:
    """What came of a story that was killed at so many steps, evenly spread, once at each."""
    whole = Life(folder, llm, images, "whole")
    told = whole.live()
    planned, pictures = whole.asked(), whole.pictures()
    points = [int(0.98 * told["steps"]) * k // count for k in range(1, count + 1)]
    lives = [Life(folder, llm, images, f"kill{at}") for at in points]
    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(Life.live, lives, points))
        known, before = [life.known() for life in lives], [life.asked() for life in lives]
        second = list(pool.map(Life.live, lives))
    repaid = lost = 0
    for life, had, was in zip(lives, known, before, strict=True):
        for kind in (0, 1):
            now = life.asked()[kind] - was[kind]
            repaid += abs(now - (planned[kind] - had[kind]))
            lost += was[kind] - had[kind]
    return {
        "kill_points": count, "repaid": repaid, "lost": lost, "steps": told["steps"],
        "killed": sum(one is None for one in first), "planned": planned,
        "known": known,
        "finished": sum(one is not None for one in second),
        "alike": sum(life.pictures() == pictures for life in lives), "images": len(pictures),
        "references": [[Path(p).name for p in one["references"]] == [
            Path(p).name for p in told["references"]] for one in second if one],
        "left": [str(p) for life in lives for name in ("reference_image_traces*", ".refimg-*")
                 for p in life.folder.rglob(name)],
    }  # fmt: skip


if __name__ == "__main__":
    main()
