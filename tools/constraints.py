"""Write constraints.txt: the exact version of everything settings.ini asks for, as installed here.

To move to newer versions: `.venv/bin/pip install --upgrade NAME`, then this, then `make test`.
"""

import re
import shlex
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FIRST = ["torch", "torchvision"]
KINDS = ("", "score_", "notebook_", "validate_", "backend_", "dev_")  # of `requirements`
GPU = re.compile(r"(nvidia|triton|cuda)\b")
HEAD = "# Made by tools/constraints.py: every install of this project uses it. torch comes first.\n"


def asked() -> list[Requirement]:
    """The requirements in settings.ini, those of the extras and of developers too."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    texts = shlex.split(" ".join(settings[f"{kind}requirements"] for kind in KINDS))
    return [Requirement(text) for text in texts]


def needs(requirement: Requirement) -> list[Requirement]:
    """What the installed distribution of this requirement needs, with the extras asked for."""
    found = [Requirement(text) for text in distribution(requirement.name).requires or ()]
    extras = [{"extra": name} for name in ("", *requirement.extras)]
    return [r for r in found if not r.marker or any(r.marker.evaluate(e) for e in extras)]


def installed() -> dict[str, str]:
    """The version of each package that the requirements pull in; nothing made for one GPU."""
    queue, seen, pins = asked(), set(), {}
    while queue:
        requirement = queue.pop()
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if GPU.match(key) or (key, *sorted(requirement.extras)) in seen:
            continue
        seen.add((key, *sorted(requirement.extras)))
        pins[key] = distribution(key).version.partition("+")[0]
        queue += needs(requirement)
    return pins


def text() -> str:
    """The constraints file's content."""
    pins = installed()
    names = FIRST + sorted(set(pins) - set(FIRST))
    return HEAD + "".join(f"{name}=={pins[name]}\n" for name in names)


if __name__ == "__main__":
    (ROOT / "constraints.txt").write_text(text(), encoding="utf-8")
