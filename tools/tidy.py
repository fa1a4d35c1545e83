"""A notebook as a reader should see it: no directives, no hidden cells."""

import re

from nbformat import NotebookNode

DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
UNSEEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.MULTILINE)


def tidy(nb: NotebookNode) -> NotebookNode:
    """The same notebook without hidden and empty cells; directives are stripped from the rest."""
    nb.cells = [c for c in nb.cells if c.cell_type != "code" or not UNSEEN.search(c.source)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
    nb.cells = [c for c in nb.cells if c.source.strip()]
    return nb
