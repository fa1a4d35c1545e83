"""The pages of nbs/pages, with what is filled in from the repository when the site is built.

A line `<!-- fields: engine.story.Story -->` becomes a table of its parameters, read from the code;
`<!-- include: FILE | text where there is none -->` becomes that Markdown file, without its title.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

from docs_api import FUNCTIONS
from docs_stage import linked

ROOT = Path(__file__).resolve().parent.parent
FIELDS = re.compile(r"^<!-- fields: ([\w.]+) -->$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (\S+) \| (.*) -->$", re.MULTILINE)
RANGE = re.compile(r"(?<![\w.])(\d+)(?: to |–|\.\.)(\d+)\b")
HEAD = "| parameter | type and range | default | what it is |\n|---|---|---|---|\n"


def comments(text: str) -> dict[int, str]:
    """The comment at the end of each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def find(tree: ast.AST, names: list[str]) -> ast.AST:
    """The definition with this dotted name."""
    for name in names:
        tree = next(n for n in tree.body if getattr(n, "name", None) == name)
    return tree


def arguments(node: ast.FunctionDef) -> list[tuple[str, ast.expr | None, ast.expr | None, int]]:
    """Name, annotation, default and line of each argument."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults + a.kw_defaults
    pairs = zip([*plain, *a.kwonlyargs], defaults, strict=True)
    kept = [(x, d) for x, d in pairs if x.arg not in ("self", "cls")]
    return [(x.arg, x.annotation, d, (d or x).end_lineno) for x, d in kept]


def parameters(node: ast.AST) -> list[tuple[str, ast.expr | None, ast.expr | None, int]]:
    """Name, annotation, default and line of each argument of a function or field of a class."""
    if isinstance(node, FUNCTIONS):
        return arguments(node)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return [(n.target.id, n.annotation, n.value, n.end_lineno) for n in fields]


def kind(annotation: ast.expr | None, said: str) -> str:
    """The type, with the range or the choices where code or comment name them."""
    text = ast.unparse(annotation) if annotation else ""
    if choices := re.search(r"Literal\[(.*)\]", text):
        return " or ".join(f"`{choice}`" for choice in choices[1].split(", "))
    found = RANGE.search(said)
    return cell(text, True) + (f", {found[1]} to {found[2]}" if found else "")


def cell(text: str, code: bool = False) -> str:
    """A text as one cell of a Markdown table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if code and text else text


def row(item: tuple, notes: dict[int, str]) -> str:
    """One line of the table."""
    name, annotation, default, line = item
    said = notes.get(line, "").replace("->", "→")
    given = cell(ast.unparse(default), True) if default else "required"
    parts = [cell(name, True), kind(annotation, said), given, cell(said)]
    return f"| {' | '.join(parts)} |"


def table(name: str) -> str:
    """The table of what `module.Definition` takes, from the code as it stands."""
    path, names = ROOT / "refimg", name.split(".")
    while path.is_dir():
        path /= names.pop(0)
    text = path.with_suffix(".py").read_text("utf-8")
    found = parameters(find(ast.parse(text), names))
    return HEAD + "\n".join(row(item, comments(text)) for item in found)


def included(found: re.Match) -> str:
    """The body of a Markdown file of the repository, or the text for where there is none."""
    path = ROOT / found[1]
    if not path.is_file():
        return found[2]
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text("utf-8"), flags=re.DOTALL)
    return re.sub(r"\A\s*# .*\n", "", text).strip()


def filled(text: str) -> str:
    """A page of nbs/pages with everything filled in, and names linked to what documents them."""
    return linked(INCLUDE.sub(included, FIELDS.sub(lambda m: table(m[1]), text)), "../")


def stage(source: Path, target: Path) -> None:
    """Writes one page as readers should see it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(filled(source.read_text("utf-8")), encoding="utf-8")
