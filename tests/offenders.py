"""Write tests/data/offenders.json anew: what still offends the rules. No rule's list gets longer.

    python tests/offenders.py

After a merge with a conflict in the file, take one of the two versions and run this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import test_cells, test_english, test_shape  # noqa: F401  (they fill RULES)
from tests.house import OFFENDERS, RULES, listed, longer


def main() -> None:
    found = {name: sorted({where for where, _ in RULES[name]()}) for name in sorted(RULES)}
    new, old = {name: rows for name, rows in found.items() if rows}, listed()
    if OFFENDERS.exists() and (told := longer(new, old)):
        sys.exit("\n".join([*told, "nothing was written: no list may get longer"]))
    OFFENDERS.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name in sorted({*new, *old}):
        now, before = len(new.get(name, ())), len(old.get(name, ()))
        print(f"{now:5}  {name}" + (f" ({now - before:+})" if now != before else ""))


if __name__ == "__main__":
    main()
