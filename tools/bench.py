"""Run the files of bench/ and keep each one's last line, a JSON object, in bench/results/.

Those with a line `LONG = True` run only with --long; the others only without.
"""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = re.compile(r"^LONG = True$", re.MULTILINE)


def machine() -> dict:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "refimg": version("refimg"),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def run(script: Path) -> None:
    """Runs one benchmark, shows what it prints and writes its result down."""
    print(f"== {script.name}", flush=True)
    made = subprocess.run([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(made.stdout, flush=True)
    if made.returncode:
        sys.exit(f"{script.name} failed")
    result = {"machine": machine(), "result": json.loads(made.stdout.strip().splitlines()[-1])}
    target = ROOT / "bench" / "results" / f"{script.stem}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the short benchmarks, or the long ones."""
    wanted = "--long" in sys.argv
    scripts = sorted((ROOT / "bench").glob("[!_]*.py"))
    for script in scripts:
        if bool(LONG.search(script.read_text("utf-8"))) == wanted:
            run(script)


if __name__ == "__main__":
    main()
