"""Stories of two scenes on bad days, and stories whose process is killed, through both real SDKs.

Local servers stand for the providers and fail by seeded scripts; timeouts are scaled. `failures`
counts broken promises: a scene without a reference, another order, a path that does not decode, a
trace or a part of a file left behind, an error that is none of the documented ones. `leaks` counts
texts and files that hold a key, `overspend` is in USD, `orphans` are predictions that nobody ended,
`repaid` are calls made again after a kill although their answer was in the journal, `alike` killed
stories whose files are in the end those of a story that was not, and `leftovers` other files.
`--quick N` runs N stories and six kill points.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from tests.bad_days import Report, spend_all
from tests.killed import kill_and_run_again
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

LONG = True
SEED = 20261123


def kill(count: int) -> dict:
    """What came of a story that was killed at so many steps, evenly spread."""
    with (tempfile.TemporaryDirectory() as folder, start_llm_server() as llm,
          start_image_server(seconds=0.2) as images):
        return kill_and_run_again(Path(folder), llm, images, count)


def show(found: Report, kills: dict) -> None:
    """Prints what happened."""
    ends = ", ".join(f"{count} {end}" for end, count in found.ends.most_common())
    print(f"{found.stories} stories: {ends}; {found.pictures} pictures")
    print(f"{sum(found.faults.values())} faults of {len(found.faults)} kinds:")
    for kind, count in found.faults.most_common():
        print(f"  {kind:<22} {count:5}")
    for name in ("failures", "leaks", "orphans"):
        for text in getattr(found, name):
            print(f"{name}: {text}")
    print(f"killed {kills['killed']} of {kills['kill_points']}, finished {kills['finished']}, "
          f"byte-identical {kills['alike']}; {kills['lost']} calls were in flight at a kill and "
          f"made again, {kills['repaid']} others")


def main() -> None:
    """Prints the tables and, as the last line, the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, metavar="N", help="stories; six kill points")
    given = parser.parse_args()
    found, kills = spend_all(SEED, given.quick or 5000), kill(6 if given.quick else 120)
    show(found, kills)
    undone = 3 * kills["kill_points"] - kills["killed"] - kills["finished"] - kills["alike"]
    result = {
        "stories": found.stories, "faults": sum(found.faults.values()), "kinds": len(found.faults),
        "failures": len(found.failures) + undone, "leaks": len(found.leaks),
        "overspend": round(found.overspend, 6), "orphans": len(found.orphans),
        "kill_points": kills["kill_points"], "repaid": kills["repaid"],
        "alike": kills["alike"], "leftovers": len(kills["left"]),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
