"""What a reader sees of a definition: its signature as written, what it returns, its source.

Everything is read from the text of the code; nothing is imported and nothing runs.
"""

import ast
import re
from dataclasses import dataclass

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
SHORT = 10
UNSEEN = {"_logger"}


@dataclass(frozen=True)
class Definition:
    """A function or class and the text it stands in."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    text: str

    @property
    def first(self) -> int:
        """Its first line, decorators included, from 1."""
        return min([self.node.lineno, *(d.lineno for d in self.node.decorator_list)])

    def lines(self, first: int, last: int) -> list[str]:
        """The lines of the text from first to last, both counted from 1."""
        return self.text.splitlines()[first - 1 : last]


def definitions(text: str) -> list[Definition]:
    """The functions and classes at the top of a text."""
    return [Definition(n, text) for n in ast.parse(text).body if isinstance(n, DEFINITIONS)]


def assigned(text: str) -> list[str]:
    """The names that a text assigns at its top."""
    found = [n for n in ast.parse(text).body if isinstance(n, ast.Assign | ast.AnnAssign)]
    targets = [t for n in found for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def header(found: Definition) -> list[str]:
    """The lines of a function from its decorators to the colon."""
    return found.lines(found.first, found.node.body[0].lineno - 1) or found.lines(
        found.first, found.node.lineno
    )


def says(node: ast.AST) -> ast.Expr | None:
    """The docstring's node, if there is one."""
    first = node.body[0]
    has = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if has and isinstance(first.value.value, str) else None


def inside(found: Definition, child: ast.AST) -> bool:
    """True for what a reader of a class need not see: its docstring and what is private."""
    name = getattr(child, "name", None) or getattr(getattr(child, "target", None), "id", "")
    return child is says(found.node) or (name.startswith("_") and name != "__init__")


def inner(found: Definition, child: ast.AST) -> list[str]:
    """A line of a class body: a field with its comment, or a method without its code."""
    if inside(found, child):
        return []
    if not isinstance(child, FUNCTIONS):
        return found.lines(child.lineno, child.end_lineno)
    method = Definition(child, found.text)
    text = says(child)
    doc = [] if text is None else found.lines(text.lineno, text.end_lineno)
    return ["", *header(method), *doc]


def outline(found: Definition) -> str:
    """The definition without code: a function's signature, a class's fields and methods."""
    if isinstance(found.node, FUNCTIONS):
        return "\n".join(header(found))
    body = [line for child in found.node.body for line in inner(found, child)]
    head = found.lines(found.first, found.node.body[0].lineno - 1)
    while head and not head[-1].strip():
        head.pop()
    return "\n".join([*head, *(body[1:] if body[:1] == [""] else body)])


def docstring(found: Definition) -> str:
    """The docstring as Markdown: its first paragraph as it is, the rest as plain text."""
    first, _, rest = (ast.get_docstring(found.node) or "").partition("\n\n")
    first = re.sub(r"([*_<\[])(?![^`]*`)", r"\\\1", first) if "`" not in first else first
    return f"{first}\n\n```text\n{rest}\n```" if rest else first


def folded(title: str, text: str) -> str:
    """Source code under a title that opens it."""
    opening = f'<details class="source"><summary>{title}</summary>'
    return f"{opening}\n\n```python\n{text.strip()}\n```\n\n</details>"


def entry(found: Definition, link: str) -> str:
    """The Markdown of one definition, its source folded where the outline is not all of it."""
    name = found.node.name
    children = found.node.body if isinstance(found.node, ast.ClassDef) else [found.node]
    source = "\n".join(found.lines(found.first, found.node.end_lineno))
    parts = [
        f"### {name}",
        f'<p class="source-link"><a href="{link}">source</a></p>' if link else "",
        f"```python\n{outline(found)}\n```",
        docstring(found),
        folded("Code", source) if any(isinstance(c, FUNCTIONS) for c in children) else "",
    ]
    return "\n\n".join(part for part in parts if part)


def hidden(text: str) -> str:
    """The Markdown of code that only its module uses, folded."""
    names = [d.node.name for d in definitions(text)] + assigned(text)
    names = [name for name in names if name not in UNSEEN]
    title = ", ".join(f"<code>{name}</code>" for name in names)
    return folded(f"Inside the module: {title}", text) if names else ""


def document(text: str, links: dict[str, str]) -> str:
    """The Markdown of an export cell: its public definitions, or what it holds in private."""
    text = text.strip()
    public = [d for d in definitions(text) if not d.node.name.startswith("_")]
    if public:
        return "\n\n".join(entry(d, links.get(d.node.name, "")) for d in public)
    if any(not name.startswith("_") for name in assigned(text)) and text.count("\n") < SHORT:
        return f"```python\n{text}\n```"
    return hidden(text)
