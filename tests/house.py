"""What the rules of the house are checked on: notebooks, modules, and the list of offenders.

A rule is a function that yields (identifier, what is wrong). `@rule` makes a test of it, which
fails for offenders that are not in tests/data/offenders.json, and for entries there that offend no
more. Identifiers hold no line numbers and no counts: a notebook's path, or module:qualified.name.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pytest
from fastcore.basics import AttrDict
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "refimg"
OFFENDERS = Path(__file__).resolve().parent / "data" / "offenders.json"
DOOR = "generate_enhanced_reference_images_with_sequential_references"
WINGS = ("adapters", "sandbox", "storage")  # with the wider limits
PUBLIC = Path(__file__).resolve().parent / "data" / "v0_1" / "public_names.txt"

IMPORT = (ast.Import, ast.ImportFrom)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION, ast.ClassDef)
DIRECTIVE = re.compile(r"^#\|\s*(\S+?):?(?:[ \t]+(.*))?$", re.MULTILINE)

Found = Iterator[tuple[str, str]]


# rules and offenders

RULES: dict[str, Callable[[], Found]] = {}


@cache
def listed() -> dict[str, list[str]]:
    """The offenders that may still be there, by rule."""
    return json.loads(OFFENDERS.read_text("utf-8")) if OFFENDERS.exists() else {}


def hold(name: str, found: Iterable[tuple[str, str]]) -> None:
    """Fail for each offender that is not listed, and for each listed one that offends no more."""
    found, known = list(found), set(listed().get(name, ()))
    told = [f"{where}: {what}" for where, what in found if where not in known]
    gone = sorted(known - {where for where, _ in found})
    told += [f"{where}: offends no more; run `python tests/offenders.py`" for where in gone]
    if told:
        pytest.fail("\n".join(told), pytrace=False)


def longer(new: dict[str, list[str]], old: dict[str, list[str]]) -> list[str]:
    """The rules that have more offenders than were listed, and which ones are not listed."""
    told = []
    for name, rows in new.items():
        known = old.get(name, [])
        if len(rows) > len(known):
            told.append(f"{name}: {len(rows)} offenders, {len(known)} are listed; new:")
            told += [f"    {where}" for where in rows if where not in known]
    return told


def rule(function: Callable[[], Found]) -> Callable[[], None]:
    """Make a test of a rule; its name without `test_`, in words, is the rule's."""
    name = function.__name__.removeprefix("test_").replace("_", " ")
    RULES[name] = function

    def test() -> None:
        hold(name, function())

    test.__name__, test.__doc__ = function.__name__, function.__doc__
    test.__module__ = function.__module__
    return test


# notebooks


def is_import(node: ast.stmt) -> bool:
    """Tell whether a statement is an import, or `if TYPE_CHECKING:` over imports."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return all(isinstance(n, IMPORT) for n in node.body)
    return isinstance(node, IMPORT)


@dataclass(frozen=True)
class Cell:
    """One cell; `number` counts all cells of the notebook from 1."""

    notebook: str
    number: int
    kind: str
    source: str = field(repr=False)
    outputs: tuple = field(repr=False)

    @cached_property
    def directives(self) -> dict[str, str]:
        found = DIRECTIVE.findall(self.source) if self.kind == "code" else []
        return {name: value.strip() for name, value in found}

    @cached_property
    def code(self) -> str:
        return DIRECTIVE.sub("", self.source).strip("\n")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(TransformerManager().transform_cell(self.code))

    @property
    def export(self) -> bool:
        return bool({"export", "exporti", "exports"} & self.directives.keys())

    @property
    def live(self) -> bool:
        """Code that begins with no directive: what a reader sees run."""
        return self.kind == "code" and bool(self.source.strip()) and self.source[:2] != "#|"

    @property
    def hidden(self) -> bool:
        return "hide" in self.directives

    @property
    def imports_only(self) -> bool:
        return bool(self.tree.body) and all(is_import(n) for n in self.tree.body)

    @property
    def other(self) -> bool:
        """Code that is neither exported nor hidden nor a mere directive."""
        return self.kind == "code" and bool(self.code) and not self.export and not self.hidden

    @property
    def shown(self) -> bool:
        """An example: other code than imports."""
        return self.other and not self.imports_only

    def says(self, text: object, line: int | None = None) -> tuple[str, str]:
        """An offence: the notebook, and where in it."""
        at = f"cell {self.number}"
        if line is not None:
            shift = len(self.source) - len(self.source.lstrip("\n"))
            at += f" line {line + shift + sum(1 for _ in DIRECTIVE.finditer(self.source))}"
        return self.notebook, f"{at}: {text}"


@dataclass(frozen=True)
class Notebook:
    """A notebook, read once."""

    path: Path
    nb: AttrDict = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def room(self) -> str:
        """Its path below nbs/."""
        return self.path.relative_to(NBS).as_posix()

    @cached_property
    def cells(self) -> list[Cell]:
        made = (
            Cell(self.name, i, c.cell_type, c.source, tuple(c.get("outputs", ())))
            for i, c in enumerate(self.nb.cells, 1)
        )
        return list(made)

    @cached_property
    def code(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "code" and c.source.strip()]

    @cached_property
    def prose(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "markdown"]

    @property
    def exports(self) -> list[Cell]:
        return [c for c in self.code if c.export]

    @property
    def module(self) -> str | None:
        stated = (c.directives.get("default_exp") for c in self.code)
        return next(filter(None, stated), None)


def read_notebook(path: Path) -> AttrDict:
    """The notebook, its texts in one piece; importing nbformat takes seconds."""
    def joined(value: object) -> object:
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            return "".join(value)
        if isinstance(value, list):
            return [joined(part) for part in value]
        return AttrDict({k: joined(v) for k, v in value.items()}) if isinstance(
            value, dict) else value

    nb = joined(json.loads(path.read_text("utf-8")))
    for cell in nb.cells:
        cell.source = cell.source or ""
    return nb


@cache
def books() -> tuple[Notebook, ...]:
    """Every notebook below nbs/ that nbdev reads."""
    paths = sorted(NBS.rglob("*.ipynb"))
    seen = [p for p in paths if not any(x[0] in "._" for x in p.relative_to(NBS).parts)]
    return tuple(Notebook(p, read_notebook(p)) for p in seen)


# modules


def docstring_lines(node: ast.AST) -> int:
    """The lines of a definition's docstring."""
    first = node.body[0]
    has = ast.get_docstring(node, clean=False) is not None
    return first.end_lineno - first.lineno + 1 if has else 0


def signature_lines(node: ast.AST) -> int:
    """The lines from a definition's first decorator to its body."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return max(0, node.body[0].lineno - start)


def body_lines(node: ast.AST) -> int:
    """The lines of a definition's body, its docstring not counted."""
    body = node.body[bool(docstring_lines(node)) :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@dataclass(frozen=True)
class Definition:
    """A class, function or method; `public`: no underscore on the way there."""

    module: str
    qualname: str
    node: ast.AST = field(repr=False)
    public: bool
    owner: str | None  # the class that it is a method of

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def where(self) -> str:
        return f"{self.module}:{self.qualname}"

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, FUNCTION)

    @property
    def top(self) -> bool:
        return "." not in self.qualname

    @property
    def decorators(self) -> set[str]:
        return {ast.unparse(d).partition("(")[0] for d in self.node.decorator_list}

    @property
    def arguments(self) -> list[ast.arg]:
        """Its arguments in order, `self` and `cls` too."""
        a = self.node.args
        every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
        return [*every, *([a.kwarg] if a.kwarg else [])]


@dataclass(frozen=True)
class Module:
    """A module of the package, read once."""

    path: Path
    text: str = field(repr=False)

    @cached_property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """The wing that it stands in; "" for the ground floor."""
        parts = self.path.relative_to(PACKAGE).parts
        return parts[0] if len(parts) > 1 else ""

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def definitions(self) -> list[Definition]:
        """Every class and function, nested ones too."""
        made = []

        def walk(node: ast.AST, public: bool, prefix: str, owner: str | None) -> None:
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, DEFINITION):
                    walk(child, public, prefix, owner)
                    continue
                seen, qualname = public and child.name[0] != "_", prefix + child.name
                made.append(Definition(self.name, qualname, child, seen, owner))
                is_class = isinstance(child, ast.ClassDef)
                walk(child, seen and is_class, f"{qualname}.", child.name if is_class else None)

        walk(self.tree, True, "", None)
        return made

    @property
    def functions(self) -> list[Definition]:
        return [d for d in self.definitions if d.is_function]

    @property
    def classes(self) -> list[Definition]:
        return [d for d in self.definitions if not d.is_function]

    def at(self, line: int) -> str:
        """The identifier of the innermost definition around a line, or the module's name."""
        around = [
            d for d in self.definitions
            if min([d.node.lineno, *(x.lineno for x in d.node.decorator_list)])
            <= line <= d.node.end_lineno
        ]
        return max(around, key=lambda d: d.node.lineno).where if around else self.name


@cache
def modules() -> tuple[Module, ...]:
    """The modules of the package; nbdev's index is none."""
    paths = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
    return tuple(Module(p, p.read_text("utf-8")) for p in paths)


def functions() -> list[Definition]:
    return [f for module in modules() for f in module.functions]
