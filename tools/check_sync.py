"""Check that notebooks and modules are in step: nbdev_export and nbdev_clean must change nothing.

Both run on a copy, so the check never touches the tree, committed or not.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("settings.ini", "setup.py", "pyproject.toml", "README.md", "refimg", "nbs")
IGNORED = ("__pycache__", ".ipynb_checkpoints", "*.pyc", "output")


def copy(target: Path) -> None:
    """Copies what nbdev reads and writes; links stay links."""
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns(*IGNORED)
            shutil.copytree(source, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, target / name)


def content(root: Path) -> dict[str, bytes]:
    """The bytes of every file below root, by its relative path."""
    files = (p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def nbdev(command: str, folder: Path) -> None:
    """Runs an nbdev command of this environment in a folder."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program = Path(sysconfig.get_path("scripts")) / command
    subprocess.run([program], cwd=folder, env=env, check=True, stdin=subprocess.DEVNULL)


def check(command: str, folder: Path, advice: str) -> list[str]:
    """One line for each file that the command changed in the folder."""
    before = content(folder)
    nbdev(command, folder)
    after = content(folder)
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return [f"{name}: {advice}" for name in names]


def main() -> None:
    """Prints what is out of step and exits with 1; exits with 0 where nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        found = check("nbdev_export", Path(folder), "not what the notebooks export: nbdev_export")
        found += check("nbdev_clean", Path(folder), "not clean: nbdev_clean")
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
