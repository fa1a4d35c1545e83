"""Train the sandbox's scorers: pictures, two models, a head, scales, and the files of all that.

    python tools/train_sandbox                  # writes refimg/sandbox/weights
    python tools/train_sandbox --quick          # a few batches, to see that it runs; writes nothing
    python tools/train_sandbox --consistency    # only the band of `consistency`, on those weights

Pictures are painted here, by two processes; then the two models learn at the same time, each in a
process of its own with one thread. Everything is seeded. No network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tools.train_sandbox import models, phases


def main() -> None:
    """Runs all phases and prints what they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few batches; writes nothing")
    parser.add_argument("--consistency", action="store_true", help="only its band, measured again")
    parser.add_argument("--work", type=Path, help="folder whose pictures are kept and reused")
    given, started, plans = parser.parse_args(), time.time(), phases.PLANS
    if given.consistency:
        print(phases.measure_consistency())
        return
    if given.quick:
        plans = {kind: replace(plan, pairs=150, steps=12) for kind, plan in plans.items()}
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        files = phases.paint_all(plans, 100 if given.quick else phases.HELD_OUT, work, started)
        models.cut_vocabulary(work / "weights" / "sandbox-clip")
        results = phases.learn_all(plans, files, work / "weights")
        phases.say(started, "learned and measured")
        if not given.quick:
            phases.install(work / "weights", results, (time.time() - started) / 60)
            results["consistency"] = phases.measure_consistency()
    for kind, found in results.items():
        print(kind, found)


if __name__ == "__main__":
    main()
