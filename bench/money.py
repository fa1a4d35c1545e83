"""Stories with a budget, random prices, and servers that bill what they can.

The chat server bills answers of 128,000 tokens, or as many as the request allows, also for a 500,
for an answer that hangs and for one without usage; the image server bills failed predictions, and
each second that a prediction runs. Budgets, prices by tokens, image or second, single stories,
`run_many` and runs that are resumed change from case to case. `over` counts the cases in which the
servers' own ledger is above the cap, `worst` is the largest ledger as a share of its cap, and
`spent` the mean share. `--quick N` plays N cases.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from tests.money import Bill, spend

LONG = True
SEED, CASES, EACH = 20261129, 300, 25


def quiet() -> None:
    """No warnings of what was meant to go wrong."""
    logging.disable(logging.WARNING)


def bills(cases: int) -> list[Bill]:
    """What each case came to, in two processes."""
    firsts = range(0, cases, EACH)
    counts = [min(EACH, cases - first) for first in firsts]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=quiet) as pool:
        parts = pool.map(spend, [SEED] * len(counts), firsts, counts)
        return [one for part in parts for one in part]


def main() -> None:
    """Plays the cases and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=int, metavar="N", help="cases")
    found = bills(parser.parse_args().quick or CASES)
    for one in found:
        if one.over:
            print(f"case {one.number}: {one.chat:.4f} + {one.images:.4f} of {one.budget:.4f}")
    shares = [(one.chat + one.images) / one.budget for one in found]
    print(", ".join(f"{n} {end}" for end, n in Counter(b.end for b in found).most_common()))
    result = {
        "cases": len(found), "calls": sum(one.calls for one in found),
        "over": sum(one.over > 0 for one in found), "worst": round(max(shares), 4),
        "spent": round(sum(shares) / len(shares), 4),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
