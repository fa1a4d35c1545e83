"""Execute notebooks in place, so that their outputs can be committed.

Cells under `#| notest` (they need a key) keep the outputs they have; the export cell is not run.
The kernel is this environment's, whatever else the machine has. What only a live page can show is
left out: widgets, and bars that write over themselves. An image that comes as JPEG and as PNG is
kept as JPEG.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SKIP = re.compile(r"^#\|\s*notest\b", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"


class Runner(NotebookClient):
    """A notebook client that leaves live and export cells alone."""

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if SKIP.search(cell.source) or "nbdev_export(" in cell.source:
            return cell
        done = await super().async_execute_cell(cell, cell_index, **kwargs)
        if done.cell_type == "code":
            done.outputs = [output for output in done.outputs if lasts(output)]
        return done


def lasts(output: nbformat.NotebookNode) -> bool:
    """Whether there is something to keep in an output, once its widget is taken out."""
    if output.output_type == "stream":
        return "\r" not in output.text
    if "image/jpeg" in output.get("data", {}):  # Pillow shows an image as both
        output.data.pop("image/png", None)
    live = output.get("data", {}).pop(WIDGET, None)
    return live is None or bool(output.data.keys() - {"text/plain"})


def executed(source: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in its own folder."""
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    nb = nbformat.read(source, as_version=4)
    where = {"metadata": {"path": str(source.resolve().parent)}}
    quiet = ["--IPKernelApp.log_level=40"]
    options = {"timeout": 300, "kernel_name": "python3", "extra_arguments": quiet,
               "store_widget_state": False}
    return Runner(nb, resources=where, **options).execute()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(executed(Path(name)), name)
        print("ran", name)
