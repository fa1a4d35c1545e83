"""Execute notebooks in place, so that their outputs can be committed.

Cells under `#| notest` (they need a key) keep the outputs they have; the export cell is not run.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SKIP = re.compile(r"^#\|\s*notest\b", re.MULTILINE)


class Runner(NotebookClient):
    """A notebook client that leaves live and export cells alone."""

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if SKIP.search(cell.source) or "nbdev_export(" in cell.source:
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def execute(source: Path, target: Path | None = None) -> None:
    """Runs the notebook in its own folder and writes it, with outputs, to `target` (itself)."""
    nb = nbformat.read(source, as_version=4)
    where = {"metadata": {"path": str(source.resolve().parent)}}
    Runner(nb, timeout=300, kernel_name="python3", resources=where).execute()
    nbformat.write(nb, target or source)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
        print("ran", name)
