"""The shape of the package: short functions, annotated arguments, one-line docstrings."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "refimg"
DOOR = "generate_enhanced_reference_images_with_sequential_references"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """A function or method, where it stands, and whether users may call it."""

    where: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    public: bool

    @property
    def length(self) -> int:
        """The lines of its body, docstring aside."""
        body = self.node.body[bool(ast.get_docstring(self.node)) :]
        return body[-1].end_lineno - body[0].lineno + 1 if body else 0

    @property
    def bare(self) -> list[str]:
        """Its arguments that have no annotation."""
        a = self.node.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        return [x.arg for x in every if x.annotation is None and x.arg not in ("self", "cls")]


def modules() -> list[Path]:
    """The modules of the package; nbdev's index is none."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def functions(path: Path) -> list[Function]:
    """Every function of a module, nested ones too; public: no underscore on the way there."""
    made = []

    def walk(node: ast.AST, public: bool, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = getattr(child, "name", "")
            if isinstance(child, (*FUNCTION, ast.ClassDef)):
                seen = public and not name.startswith("_")
                if isinstance(child, FUNCTION):
                    where = f"{path.relative_to(ROOT)}:{child.lineno} {prefix}{name}"
                    made.append(Function(where, child, seen))
                walk(child, seen and isinstance(child, ast.ClassDef), f"{prefix}{name}.")
            else:
                walk(child, public, prefix)

    walk(tree(path), True, "")
    return made


def everything() -> list[Function]:
    return [f for path in modules() for f in functions(path)]


def expect(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_no_function_is_above_30_lines():
    long = [f for f in everything() if f.length > 30 and f.node.name != DOOR]
    expect([f"{f.where}: {f.length} lines, at most 30" for f in long])


def test_half_of_the_functions_have_at_most_10_lines():
    lengths = [f.length for f in everything()]
    assert not lengths or median(lengths) <= 10


def test_public_arguments_are_annotated():
    found = [f for f in everything() if f.public and f.bare]
    expect([f"{f.where}: no annotation for {', '.join(f.bare)}" for f in found])


def test_public_definitions_say_what_comes_back():
    found = [f.where for f in everything() if f.public and not ast.get_docstring(f.node)]
    for path in modules():
        classes = [n for n in tree(path).body if isinstance(n, ast.ClassDef)]
        bare = [c for c in classes if c.name[0] != "_" and not ast.get_docstring(c)]
        found += [f"{path.relative_to(ROOT)}:{c.lineno} {c.name}" for c in bare]
    expect([f"{where}: no docstring" for where in found])


def test_docstrings_are_short():
    texts = [(f, ast.get_docstring(f.node) or "") for f in everything()]
    long = [(f, t) for f, t in texts if t.count("\n") > 2 and f.node.name != DOOR]
    expect([f"{f.where}: a docstring of {t.count(chr(10)) + 1} lines" for f, t in long])


def test_the_package_never_prints():
    calls = [(p, n) for p in modules() for n in ast.walk(tree(p)) if isinstance(n, ast.Call)]
    named = [(p, n) for p, n in calls if getattr(n.func, "id", "") == "print"]
    expect([f"{p.relative_to(ROOT)}:{n.lineno}: print" for p, n in named])


def test_annotations_come_from_the_future():
    problems = []
    for path in (p for p in modules() if p.name != "__init__.py"):
        imports = (n for n in tree(path).body if isinstance(n, ast.Import | ast.ImportFrom))
        first = next(imports, None)
        if first is None or ast.unparse(first) != "from __future__ import annotations":
            problems.append(f"{path.relative_to(ROOT)}: no `from __future__ import annotations`")
    expect(problems)
