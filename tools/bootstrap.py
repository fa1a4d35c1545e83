"""Make .venv with everything the project needs; do nothing where it is there already.

Run by every `make` target with the machine's own Python, so it uses the standard library only.
What is installed counts as current while the content of FILES stays what it was.
"""

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "refimg-installed"
HERE = tuple(sys.version_info[:2])
KINDS = ("", "score_", "notebook_", "validate_", "backend_", "dev_")  # of `requirements`
FILES = ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "tools/bootstrap.py")


def settings():
    """The settings in settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(str(ROOT / "settings.ini"), encoding="utf-8")
    return config["DEFAULT"]


def check_python():
    """Stops with a clear message on a Python that the project does not run on."""
    low, high = settings()["min_python"], settings()["max_python"]
    first, end = (tuple(map(int, text.split("."))) for text in (low, high))
    if not first <= HERE < end:
        found = f"{sys.executable} is {HERE[0]}.{HERE[1]}"
        hint = f"name another one, for example: make test PYTHON=python{low}"
        sys.exit(f"refimg needs Python >= {low}, < {high}; {found}: {hint}")
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit("This Python makes no virtual environments: install python3-venv and try again.")


def fingerprint():
    """A hash of the place, the Python and the content of what decides about the installation."""
    mark = hashlib.sha256(f"{ROOT} {HERE}".encode())
    for name in FILES:
        mark.update(hashlib.sha256((ROOT / name).read_bytes()).digest())
    return mark.hexdigest()


def python():
    """The path of the environment's Python."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def usable():
    """True where .venv holds a working Python of the same version, with pip."""
    probe = "from importlib.util import find_spec as f; import sys; "
    probe += f"sys.exit(f('pip') is None or sys.version_info[:2] != {HERE})"
    try:
        return not subprocess.run([str(python()), "-c", probe]).returncode
    except OSError:
        return False


def pip(*arguments):
    """Installs with the environment's pip under the constraints; a failure ends the set-up."""
    command = [str(python()), "-m", "pip", "install", "--quiet", "--no-compile",
               "-c", "constraints.txt"]
    print("pip install", *arguments, flush=True)
    if subprocess.run([*command, *arguments], cwd=str(ROOT), stdin=subprocess.DEVNULL).returncode:
        sys.exit("The set-up failed at: pip install " + " ".join(arguments))


def install():
    """Installs torch alone, torchvision, all extras and the project itself; leaves the stamp."""
    if not usable():
        venv.create(str(VENV), clear=True, with_pip=True)
    STAMP.unlink(missing_ok=True)
    pins = (ROOT / "constraints.txt").read_text("utf-8").split()
    pip(next(p for p in pins if p.startswith("torch==")))
    pip(next(p for p in pins if p.startswith("torchvision==")))
    pip(*shlex.split(" ".join(settings()[f"{kind}requirements"] for kind in KINDS)))
    pip("--no-deps", "--no-build-isolation", "--editable", ".")
    STAMP.write_text(fingerprint(), encoding="utf-8")


if __name__ == "__main__":
    for name in ("PYTHONPATH", "PYTHONHOME"):
        os.environ.pop(name, None)
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    check_python()
    if not (STAMP.exists() and STAMP.read_text("utf-8") == fingerprint() and usable()):
        install()
