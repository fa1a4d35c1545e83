"""Damaged journals, answers, images and records: what the next runs make of them.

Two stories are in one journal. A file of it, of its answers or of the first story's images is
damaged; then the first story runs again, and the other. `wrong_images` are references that are no
image or not those of the undisturbed run, `harmed_others` runs of the other story that failed,
`failed` those of the first, `repaid` calls that were paid for again, and `unsaid` runs in which
that happened without a warning that names the journal. `underspent` are runs whose journal knew of
less money than before the damage, `noisy` those that told of the database more than once, or of
more rows than had a flipped bit. A damaged record must load, or give one error that names the file:
`unclear_loads` do neither; `loaded_other` are not what was saved, and no warning says so.
`--quick N` takes every N-th damage.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import random
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from bench._lives import SCENES, Lives, bill_of, pictures
from refimg import StoryResult
from refimg.storage.journal import Journal

LONG = True
OTHER = {"id": "other", "text": "a diver"}
SOME = ("zeroed", "truncated", "flipped")  # these are repeated at other places
KINDS = (*SOME, "appended", "emptied", "text", "deleted", "swapped")
RECORD = "run.json"
BOOKED = 1.5  # USD that the budget of a story wrote down, more than its answers cost


def damaged(data: bytes, kind: str, number: int, other: bytes) -> bytes | None:
    """The content after the damage; None: the file is gone."""
    chance, size = random.Random(f"{kind}/{number}/{len(data)}"), len(data)
    at = chance.randrange(size)
    if kind == "zeroed":
        page = 4096 if size > 8192 else max(1, size // 8)
        at -= at % page
        return data[:at] + bytes(len(data[at : at + page])) + data[at + page :]
    if kind == "flipped":
        changed = bytearray(data)
        for place in (at, *(chance.randrange(size) for _ in range(number % 8))):
            changed[place] ^= 1 << chance.randrange(8)
        return bytes(changed)
    return {"truncated": data[:at], "appended": data + chance.randbytes(1000), "emptied": b"",
            "text": b"This is not the file that you look for.\n" * 20, "deleted": None,
            "swapped": other}[kind]


def points() -> list[tuple[str, str, int]]:
    """What is damaged, how, and the number of the damage."""
    made = []
    for target, times in (("journal.db", 14), ("journal.db-wal", 14), (RECORD, 6)):
        made += [(target, kind, n) for kind in KINDS
                 for n in range(times if kind in SOME else 1 + (kind == "appended"))]
    made += [("results", kind, n) for n in range(4) for kind in KINDS]
    return made + [("images", kind, n) for n in range(4) for kind in KINDS]


class Ruin:
    """A folder with two stories, that is made whole again before each damage."""

    def __init__(self, folder: Path, lives: Lives):
        self.folder, self.lives, self.life, self.flips = folder / "here", lives, 2, 0
        self.folder.mkdir(parents=True)
        self.database = self.folder / "journal" / "journal.db"
        self.others = pictures(lives.live(self.folder, **OTHER))
        with closing(sqlite3.connect(self.database)) as held:  # so that there stays a WAL
            held.execute("SELECT count(*) FROM sqlite_master").fetchall()
            self.whole = pictures(lives.live(self.folder, save=str(self.folder / RECORD)))
            self.spent = asyncio.run(self.booked())
            shutil.copytree(self.folder, folder / "open")
        shutil.copytree(self.folder, folder / "closed")
        self.bill = bill_of(self.folder).path.read_bytes()
        self.answers = set(bill_of(self.folder).lines("paid"))
        self.record = StoryResult.load(self.folder / RECORD)
        if len(self.whole) != SCENES or None in self.whole + self.others:
            raise RuntimeError("a story on a good disk did not finish")

    async def booked(self) -> dict[str, float]:
        """What each story has spent, once the budget of the first has written down its sum."""
        journal, known = Journal(self.folder / "journal"), {}
        where = {"output_dir": self.folder / "images"}
        await journal.check()
        await journal.book(BOOKED, generation_id="story", **where)
        for name in ("story", OTHER["id"]):
            known[name] = await journal.spent(generation_id=name, **where)
        journal.database._file.close()
        return known

    def restore(self, how: str) -> None:
        """Makes the folder as it was, with a database that is closed or open."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.folder.with_name(how), self.folder)
        bill_of(self.folder).path.write_bytes(self.bill)

    def target(self, name: str, number: int) -> tuple[Path, Path]:
        """The file of that name, and another that may stand in its place."""
        journal, images = self.folder / "journal", sorted((self.folder / "images").glob("story_*"))
        if name == RECORD:
            return self.folder / RECORD, images[0]
        if name == "results":
            every = sorted((journal / "results").iterdir())
            answers = [path for path in every if path.stat().st_size]  # an empty one has no damage
            return answers[5 * number % len(answers)], answers[(5 * number + 1) % len(answers)]
        if name == "images":
            return images[number % len(images)], images[(number + 1) % len(images)]
        return journal / name, images[0]

    def damage(self, name: str, kind: str, number: int) -> list[tuple[str, str]]:
        """What is to be counted of a damage and the runs after it."""
        self.restore("open" if name.endswith("-wal") else "closed")
        path, other = self.target(name, number)
        data = damaged(path.read_bytes(), kind, number, other.read_bytes())
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        found, self.flips = [("damages", "")], 1 + number % 8 if kind == "flipped" else 0
        return found + (self.loaded(path) if name == RECORD else [*self.again(), *self.beside()])

    def loaded(self, path: Path) -> list[tuple[str, str]]:
        """What comes of loading a damaged record."""
        said = io.StringIO()
        heard = logging.StreamHandler(said)
        logging.getLogger("refimg").addHandler(heard)
        try:
            made = StoryResult.load(path)
        except (OSError, ValueError) as error:
            named = path.name in str(error)
            return [] if named else [("unclear_loads", f"{type(error).__name__}: {error}"[:200])]
        except Exception as error:
            return [("unclear_loads", f"{error!r:.200}")]
        finally:
            logging.getLogger("refimg").removeHandler(heard)
        told = made == self.record or path.name in said.getvalue()
        return [] if told else [("loaded_other", "")]

    def run(self, wanted: list, failed: str, **job: Any) -> list[tuple[str, str]]:
        """What comes of a story that runs again."""
        self.life += 1
        made = self.lives.live(self.folder, life=self.life, spent=True, **job)
        found, images, bill = [], pictures(made), bill_of(self.folder)
        known, before = made.get("spent", 0.0), self.spent[job.get("id", "story")]
        if known < before:
            found.append(("underspent", f"{known} of {before}"))
        told = [text for text in made["warnings"] if "database" in text or "the copy" in text]
        if len(told) > 1 + self.flips:
            found.append(("noisy", str(told)[:300]))
        if len(images) != SCENES:
            found.append((failed, made.get("text", made["end"])[:300]))
        for number, image in enumerate(images):
            if image is None or image != wanted[number]:
                found.append(("wrong_images", "no image" if image is None else "another image"))
        paid = [call for call in bill.lines("paid", self.life) if call in self.answers]
        found += [("repaid", "")] * len(paid)
        if paid and not any("journal" in text for text in made["warnings"]):
            found.append(("unsaid", f"{len(paid)} {made['warnings']}"[:300]))
        return found

    def again(self) -> list[tuple[str, str]]:
        """What comes of the story itself."""
        return self.run(self.whole, "failed")

    def beside(self) -> list[tuple[str, str]]:
        """What comes of the other story."""
        return self.run(self.others, "harmed_others", **OTHER)


NAMES = ("damages", "wrong_images", "harmed_others", "failed", "unsaid", "repaid", "underspent",
         "noisy", "unclear_loads", "loaded_other")


def measure(folder: Path, wanted: list[tuple[str, str, int]]) -> tuple[dict[str, int], list[str]]:
    """The figures, and a line for each damage that was not borne."""
    counts, said = Counter(), []

    def some(number: int) -> None:
        with Lives() as lives:
            ruin = Ruin(folder / str(number), lives)
            for point in wanted[number::2]:
                for key, text in ruin.damage(*point):
                    counts[key] += 1
                    if text:
                        said.append(f"{key}: {point}: {text}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(some, range(2)))
    return {key: counts[key] for key in NAMES}, said


def main() -> None:
    """Prints what was not borne and, as the last line, the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, metavar="N", default=1, help="every N-th damage")
    with tempfile.TemporaryDirectory() as folder:
        every = points()[:: parser.parse_args().quick]
        result, said = measure(Path(folder).resolve(), every)
    for text in sorted(said):
        print(text)
    for key, value in result.items():
        print(f"{key:<14} {value:6}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
