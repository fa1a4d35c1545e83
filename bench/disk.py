"""Stories on a bad disk: each file call of a run fails in turn, and the power is cut.

A shim (`tests/disk_shim.c`) lets the n-th call of a story of two scenes fail with ENOSPC, EIO or
EMFILE, once or from there on; then the same story runs again on a good disk. A first run must give
a reference for each scene or one clear error (OSError, GenerationFailed, ValueError, without the
database's own words), the second must finish. `unused` are answers that a run paid for and did not
use, `unkept` images that it could write nowhere since every call failed; `repaid` were paid again
by the second run, `repaid_unsaid` those of them without a warning that names the journal.

The power cuts end the process before a call. `kill` keeps all that was written, `cut` all names but
only contents that were synced, `strict` only names whose folder was synced too. `repaid` are calls
whose answer had come more than 100 ms before, `repaid_late` the others. `returned` runs are cut off
after they have returned and their record was saved: `cut_lost` and `strict_lost` are images and
records that were not whole then.
`--quick N` takes N points for each error and N power cuts; without it, every call and 120.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from bench import _lives
from bench._lives import SCENES, Lives, bill_of, leftovers, pictures
from refimg import StoryResult

LONG = True
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EMFILE": errno.EMFILE}
TIMES = {"once": 1, "on": 0}
CUTS = ("kill", "cut", "strict")
LATE = 0.1  # seconds before a kill
OWN_WORDS = ("sqlite", "OperationalError", "DatabaseError", "IntegrityError", "Traceback")
CLEAR = ("OSError", "GenerationFailed", "ValueError")
SOURCE = Path(_lives.ROOT, "tests", "disk_shim.c")


def build(folder: Path) -> Path:
    """Compiles the shim into a folder."""
    made = folder / "shim.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return made


def spread(count: int, points: int | None) -> list[int]:
    """So many numbers from 1 to the count, evenly spread; None: all."""
    if points is None or points >= count:
        return list(range(1, count + 1))
    return [1 + (count - 1) * (2 * k + 1) // (2 * points) for k in range(points)]


class Bench:
    """A folder, the shim, and a story that was left in peace."""

    def __init__(self, folder: Path):
        self.folder, self.numbers = folder, itertools.count()
        self.shim = build(folder)
        with Lives(self.shim) as lives:
            self.whole = pictures(self.checked(lives.live(self.fresh(), shim={})))
            self.calls = {}
            for name, error in {"": 0, **ERRORS}.items():
                found = self.checked(lives.live(self.fresh(), shim={"error": error}))
                self.calls[name] = found["calls"]

    def checked(self, found: dict[str, Any]) -> dict[str, Any]:
        """The same, if a story left in peace has finished."""
        if found["end"] != "finished":
            raise RuntimeError(f"a story on a good disk did not finish: {found}")
        return found

    def fresh(self) -> Path:
        """A new folder."""
        folder = self.folder / f"story{next(self.numbers)}"
        folder.mkdir()
        return folder

    def renewed(self, folder: Path) -> Path:
        """The folder, empty again."""
        shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def all(self, judge: Callable, points: list[tuple]) -> tuple[Counter, list[str]]:
        """What came of all points, in two processes, and what there is to say of them."""
        counts, said = Counter(), []

        def some(mine: list[tuple]) -> None:
            with Lives(self.shim) as lives:
                for point in mine:
                    folder = self.fresh()
                    for key, text in judge(self, lives, folder, *point):
                        counts[key] += 1
                        if text:
                            said.append(f"{key}: {point}: {text}")
                    shutil.rmtree(folder, ignore_errors=True)
                    bill_of(folder).path.unlink(missing_ok=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(some, (points[::2], points[1::2])))
        return counts, said


def unclear(found: dict[str, Any]) -> str:
    """Why an error is not clear; "" where it is."""
    if found["end"] == "killed":
        return "hung" if found["signal"] else "no word"
    text = found["text"]
    if not set(CLEAR) & set(found["classes"]):
        return f"{found['classes'][0]}: {text[:200]}"
    own = [word for word in OWN_WORDS if word in text]
    return f"{found['classes'][0]} with {own[0]}: {text[:200]}" if own or not text.strip() else ""


def whole_references(found: dict[str, Any]) -> bool:
    """Whether there is a reference for each scene, each an image."""
    made = pictures(found)
    return len(made) == SCENES and None not in made


def fail(bench: Bench, lives: Lives, folder: Path, name: str, times: str, at: int) -> list[tuple]:
    """What is to be counted of a run in which calls fail, and of the next one."""
    shim = {"error": ERRORS[name], "at": at, "times": TIMES[times]}
    first = lives.live(folder, shim=shim)
    kept = whole_references(first)  # what the second run may add changes nothing
    second, bill = lives.live(folder, life=2), bill_of(folder)
    paid, again = bill.times("paid", 1), bill.times("paid", 2)
    found = [("runs", "")]
    if first["end"] == "finished":
        found.append(("finished", "") if kept else ("broken", "references that are no images"))
    else:
        why = unclear(first)
        found.append(("unclear", why) if why else ("clear_errors", ""))
    used = first.get("record", "")
    used += second.get("record", "") if first["end"] != "finished" else ""
    for call in paid:
        if call not in used:
            lost = times == "on" and call.startswith("image")
            warned = str(first["warnings"])[:300]
            found.append(("unkept" if lost else "unused", f"{call} {first['end']} {warned}"))
    named = any("journal" in text for text in first["warnings"])
    repaid = (paid & again).total() + (paid - Counter(set(paid))).total()
    found += [("repaid", "")] * repaid
    if repaid and not named:
        found += [("repaid_unsaid", f"{first['end']} {first.get('text', '')[:200]}")] * repaid
    if not whole_references(second):
        found.append(("second_failed", second.get("text", "no reference")[:300]))
    return found + [("leftovers", path) for path in leftovers(folder)]


def ids(record: Path) -> tuple[dict[int, str], float]:
    """The number of each inode in a record, and when the process was killed."""
    known, killed = {}, 0.0
    for line in (record / "log").read_text("utf-8").splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "new":
            inode, number = rest.split()
            known[int(inode)] = number
        elif kind == "kill":
            killed = float(rest)
    return known, killed


def without_unsynced(dead: Path, record: Path, known: dict[int, str], target: Path) -> None:
    """Makes what a power cut leaves of a folder, if it leaves all names."""
    target.mkdir()
    for path in dead.iterdir():
        kept = record / known.get(path.lstat().st_ino, "none")
        if path.is_dir():
            without_unsynced(path, record, known, target / path.name)
        else:
            (target / path.name).write_bytes(kept.read_bytes() if kept.exists() else b"")


def only_synced(record: Path, number: str, target: Path) -> None:
    """Makes what a power cut leaves of a folder, if it leaves only names that were synced."""
    target.mkdir()
    names = record / f"{number}.names"
    for line in names.read_text("utf-8").splitlines() if names.exists() else ():
        kind, inside, name = line.split(" ", 2)
        if kind == "d":
            only_synced(record, inside, target / name)
        else:
            kept = record / inside
            (target / name).write_bytes(kept.read_bytes() if kept.exists() else b"")


def cut(bench: Bench, lives: Lives, folder: Path, at: int) -> list[tuple]:
    """What is to be counted of a run that ends before a call, and of the next one."""
    record, dead = (folder.with_name(f"{folder.name}.{kind}") for kind in ("record", "dead"))
    record.mkdir()
    first = lives.live(folder, shim={"record": str(record), "kill": at})
    if first["end"] != "killed":  # it had fewer calls than others
        shutil.rmtree(record)
        bill_of(folder).path.unlink()
        return cut(bench, lives, bench.renewed(folder), at - at // 20)
    found = [("cuts", "")]
    (known, killed), bill = ids(record), bill_of(folder)
    folder.rename(dead)
    paid = bill.lines("paid", 1)
    for life, how in enumerate(CUTS, 2):
        shutil.rmtree(folder, ignore_errors=True)
        if how == "kill":
            shutil.copytree(dead, folder)
        elif how == "cut":
            without_unsynced(dead, record, known, folder)
        else:
            only_synced(record, "1", folder)
        second = lives.live(folder, life=life)
        if whole_references(second):
            found.append((f"{how}_finished", ""))
        else:
            found.append((f"{how}_failed", unclear(second) or second["text"][:300]))
        found += [(f"{how}_alike", "")] * (pictures(second) == bench.whole)
        for call in bill.lines("paid", life):
            if call in paid:
                late = killed - paid[call] < LATE
                found.append((f"{how}_repaid" + "_late" * late, "" if late else call))
        found += [(f"{how}_leftovers", path) for path in leftovers(folder)]
    shutil.rmtree(dead)
    shutil.rmtree(record)
    return found


def returned(bench: Bench, lives: Lives, folder: Path, number: int) -> list[tuple]:
    """What is to be counted of power that goes once a run has returned and its record is saved."""
    kept, dead = (folder.with_name(f"{folder.name}.{kind}") for kind in ("record", "dead"))
    kept.mkdir()
    saved = folder / "records" / "run.json"
    bench.checked(lives.live(folder, shim={"record": str(kept)}, save=str(saved),
                             text=f"a keeper at door {number}"))
    found, (known, _) = [("returned", "")], ids(kept)
    folder.rename(dead)
    for how in CUTS[1:]:
        shutil.rmtree(folder, ignore_errors=True)
        if how == "cut":
            without_unsynced(dead, kept, known, folder)
        else:
            only_synced(kept, "1", folder)
        try:
            scenes = StoryResult.load(saved).scenes
        except (OSError, ValueError) as error:
            found.append((f"{how}_lost", f"the record: {error!r:.200}"))
            continue
        for image in (made.image for scene in scenes for made in scene.variations):
            path = image.image_path
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != image.sha256:
                found.append((f"{how}_lost", path.name))
    shutil.rmtree(dead)
    shutil.rmtree(kept)
    return found


FAILED = ("runs", "finished", "clear_errors", "unclear", "broken", "unused", "unkept", "repaid",
          "repaid_unsaid", "second_failed", "leftovers")
LOST = ("returned", "cut_lost", "strict_lost")
AFTER = ("finished", "failed", "alike", "repaid", "repaid_late", "leftovers")


def measure(folder: Path, points: int | None, cuts: int) -> tuple[dict[str, int], list[str]]:
    """The figures, and a line for each point that was not right."""
    bench = Bench(folder)
    failing = [(name, times, at) for name in ERRORS for times in TIMES
               for at in spread(bench.calls[name], points)]
    counts, said = bench.all(fail, failing)
    cutting, more = bench.all(cut, [(at,) for at in spread(bench.calls[""], cuts)])
    ended, rest = bench.all(returned, [(n,) for n in range(1 + cuts // 12)])
    names = ["cuts", *(f"{how}_{key}" for how in CUTS for key in AFTER)]
    result = {"calls": bench.calls[""]} | {key: counts[key] for key in FAILED}
    result |= {key: cutting[key] for key in names} | {key: ended[key] for key in LOST}
    return result, said + more + rest


def main() -> None:
    """Prints what was not right and, as the last line, the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, metavar="N", help="points per error, and power cuts")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        result, said = measure(Path(folder).resolve(), quick, quick or 120)
    for text in sorted(said):
        print(text)
    for key, value in result.items():
        print(f"{key:<18} {value:6}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
