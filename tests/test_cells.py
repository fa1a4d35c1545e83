"""The house rules for cells, held for every notebook in nbs/."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
DOOR = "generate_enhanced_reference_images_with_sequential_references"
HEAVY = {
    "torch", "torchvision", "open_clip", "transformers", "openai", "replicate", "matplotlib",
    "pandas", "scipy", "ipywidgets", "nbdev", "fastcore",
}  # fmt: skip
DIRECTIVE = re.compile(r"^#\|\s*(\S+?):?(?:[ \t]+(.*))?$", re.MULTILINE)
MAX_BYTES = 1_000_000
ABSOLUTE = re.compile(
    r"(?<![\w.:/])(?:/(?:home|root|Users|tmp|work|private|mnt)/|[A-Z]:\\{1,2}Users)"
)
KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[\w-]{16,}|r8_\w{16,}|hf_\w{20,}|gh[po]_\w{20,}|AKIA[0-9A-Z]{16})"
)
DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")
IMPORT = (ast.Import, ast.ImportFrom)
ASSIGN = (ast.Assign, ast.AnnAssign, ast.AugAssign)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION, ast.ClassDef)


def docstring_lines(node: ast.AST) -> int:
    """The lines of a definition's docstring."""
    first = node.body[0]
    has = ast.get_docstring(node, clean=False) is not None
    return first.end_lineno - first.lineno + 1 if has else 0


def signature_lines(node: ast.AST) -> int:
    """The lines from a definition's first decorator to its body."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return max(0, node.body[0].lineno - start)


def names_of(node: ast.stmt) -> list[str]:
    """The names that a top-level statement binds; imports and loggers aside."""
    if isinstance(node, DEFINITION):
        return [node.name]
    if isinstance(node, ast.Assign) and "getLogger" not in ast.unparse(node.value):
        return [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def is_import(node: ast.stmt) -> bool:
    """True for an import, and for `if TYPE_CHECKING:` over imports."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return all(isinstance(n, IMPORT) for n in node.body)
    return isinstance(node, IMPORT)


def roots(node: ast.AST) -> list[str]:
    """The dotted modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module]
    return []


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
    def hidden(self) -> bool:
        return "hide" in self.directives

    @property
    def imports_only(self) -> bool:
        return bool(self.tree.body) and all(is_import(n) for n in self.tree.body)

    @property
    def shown(self) -> bool:
        """An example: code that is neither exported, hidden, imports nor a mere directive."""
        other = self.export or self.hidden or self.imports_only
        return self.kind == "code" and bool(self.code) and not other

    @cached_property
    def definitions(self) -> list[ast.stmt]:
        return [n for n in self.tree.body if names_of(n)]

    @cached_property
    def public(self) -> list[str]:
        names = [name for n in self.definitions for name in names_of(n)]
        return [n for n in names if not n.startswith("_")] if self.export else []

    def says(self, line: int, text: str) -> str:
        shift = len(self.source) - len(self.source.lstrip("\n"))
        first = shift + sum(1 for _ in DIRECTIVE.finditer(self.source))
        return f"{self.notebook} cell {self.number} line {line + first}: {text}"


@dataclass(frozen=True)
class Notebook:
    """A notebook, read once."""

    path: Path
    nb: nbformat.NotebookNode = field(repr=False)

    @property
    def name(self) -> str:
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

    @property
    def exports(self) -> list[Cell]:
        return [c for c in self.code if c.export]

    @property
    def module(self) -> str | None:
        stated = (c.directives.get("default_exp") for c in self.code)
        return next(filter(None, stated), None)


def paths() -> list[Path]:
    """Every notebook below nbs/ that nbdev reads."""
    found = NBS.rglob("*.ipynb")
    return sorted(p for p in found if not any(x[0] in "._" for x in p.relative_to(NBS).parts))


@pytest.fixture(scope="module", params=paths(), ids=lambda p: p.relative_to(NBS).as_posix())
def book(request) -> Notebook:
    return Notebook(request.param, nbformat.read(request.param, as_version=4))


def expect(problems: list[str]) -> None:
    """Fails with every problem on a line of its own."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


# 1: export cells


def one_liner(node: ast.stmt) -> bool:
    if isinstance(node, DEFINITION):
        body = node.body[1:] if docstring_lines(node) else node.body
        return sum(n.end_lineno - n.lineno + 1 for n in body) <= 1
    return node.lineno == node.end_lineno


def kind_of(node: ast.stmt) -> str:
    if isinstance(node, FUNCTION):
        return "function"
    return "class" if isinstance(node, ast.ClassDef) else "constant"


def crowded(cell: Cell) -> bool:
    """True where an export cell holds more than one thing to learn."""
    public = [n for n in cell.definitions if not all(x.startswith("_") for x in names_of(n))]
    if len(public) <= 1:
        private = [n for n in cell.definitions if n not in public]
        return bool(public) and any(isinstance(n, DEFINITION) for n in private)
    alike = len({kind_of(n) for n in cell.definitions}) == 1
    return not (len(cell.definitions) <= 3 and alike and all(map(one_liner, cell.definitions)))


def length(cell: Cell) -> int:
    """An export cell's lines less signatures and docstrings."""
    nodes = [n for n in ast.walk(cell.tree) if isinstance(n, DEFINITION)]
    lines = len(cell.code.splitlines())
    return lines - sum(signature_lines(n) + docstring_lines(n) for n in nodes)


def test_an_export_cell_holds_one_public_definition(book):
    cells = [c for c in book.exports if crowded(c)]
    held = [", ".join(n for d in c.definitions for n in names_of(d)) for c in cells]
    pairs = zip(cells, held, strict=True)
    expect([c.says(1, f"one public definition a cell, not {h}") for c, h in pairs])


def test_export_cells_are_short(book):
    problems = []
    for c in book.exports:
        limit = 45 if any(isinstance(n, ast.ClassDef) for n in c.tree.body) else 30
        if length(c) > limit and DOOR not in c.public and not c.imports_only:
            problems.append(c.says(1, f"{length(c)} lines, at most {limit}"))
    expect(problems)


def test_lines_fit_in_100_columns(book):
    expect([
        c.says(i, f"{len(line)} columns, at most 100")
        for c in book.code
        for i, line in enumerate(c.code.splitlines(), 1) if len(line) > 100
    ])


# 2: shown before the next


def used(cell: Cell) -> set[str]:
    """The names that a cell's code reads or calls."""
    found = {n.id for n in ast.walk(cell.tree) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(cell.tree) if isinstance(n, ast.Attribute)}


def test_each_public_definition_is_used_before_the_next(book):
    problems, waiting = [], None
    for c in [*book.code, None]:
        if c is None or c.public:
            if waiting:
                names = ", ".join(waiting.public)
                problems.append(waiting.says(1, f"no visible cell uses {names} before the next"))
            waiting = c
        elif waiting and c.shown and used(c) & set(waiting.public):
            waiting = None
    expect(problems)


# 3: other code cells


def comments(code: str) -> list[tuple[int, str]]:
    """The comments of some code, with their lines; `# noqa` is none."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except tokenize.TokenError:
        return []
    kept = [t for t in tokens if t.type == tokenize.COMMENT and "noqa" not in t.string]
    return [(t.start[0], t.string) for t in kept]


def test_examples_have_at_most_8_lines(book):
    long = [(c, len(c.code.splitlines())) for c in book.code if c.shown]
    expect([c.says(1, f"{n} lines, at most 8") for c, n in long if n > 8])


def test_examples_have_no_comments(book):
    expect([c.says(i, text) for c in book.code if c.shown for i, text in comments(c.code)])


def is_print(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"


def test_examples_end_in_something_to_see(book):
    problems = []
    for c in (c for c in book.code if c.shown):
        last = c.tree.body[-1]
        if is_print(last) or isinstance(last, ASSIGN):
            kind = "print" if is_print(last) else "an assignment"
            problems.append(c.says(last.lineno, f"ends in {kind}, not in a value worth seeing"))
    expect(problems)


# 4: prose


def headings(cell: Cell) -> list[str]:
    text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{1,6} .*$", text, flags=re.MULTILINE)


def test_half_as_much_prose_as_code(book):
    prose = sum(c.kind == "markdown" for c in book.cells)
    counts = f"{prose} markdown cells for {len(book.code)} code cells"
    assert 2 * prose >= len(book.code), f"{book.name}: {counts}"


def test_the_first_cell_is_title_and_description(book):
    first = book.cells[0]
    assert first.kind == "markdown", f"{book.name} cell 1: must be markdown"
    assert re.match(r"# \S.*\n+> \S", first.source), f"{book.name} cell 1: `# Title`, `> one line`"


def test_a_heading_stands_alone(book):
    prose = [c for c in book.cells[1:] if c.kind == "markdown" and headings(c)]
    found = [(c, len([x for x in c.source.splitlines() if x.strip()])) for c in prose]
    expect([c.says(1, f"`{headings(c)[0]}` shares its cell") for c, lines in found if lines > 1])


def test_no_filler(book):
    prose = [c for c in book.cells if c.kind == "markdown"]
    expect([c.says(1, "`Now we …`") for c in prose if re.search(r"\bnow we\b", c.source, re.I)])


# 5: imports


def test_import_cells_only_import(book):
    mixed = [c for c in book.code if not c.hidden and any(is_import(n) for n in c.tree.body)]
    expect([c.says(1, "imports stand in a cell of their own") for c in mixed if not c.imports_only])


def test_heavy_packages_are_imported_where_used(book):
    expect([
        c.says(n.lineno, f"{', '.join(roots(n))} at module level")
        for c in book.exports
        for n in c.tree.body if {r.partition(".")[0] for r in roots(n)} & HEAVY
    ])


def test_no_nbdev_or_fastcore_in_the_package(book):
    expect([
        c.says(n.lineno, "nbdev and fastcore are for developers only")
        for c in book.exports
        for n in ast.walk(c.tree) if {r.partition(".")[0] for r in roots(n)} & {"nbdev", "fastcore"}
    ])


def test_no_star_imports(book):
    expect([
        c.says(n.lineno, "star import")
        for c in book.code
        for n in ast.walk(c.tree)
        if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)
    ])


# 6: nothing hidden, nothing left over


def test_at_most_three_hidden_code_cells(book):
    hidden = [c.number for c in book.code if c.hidden]
    assert len(hidden) <= 3, f"{book.name}: {len(hidden)} hidden code cells ({hidden}), at most 3"


def test_nothing_is_left_unrun(book):
    off = [c for c in book.code if c.directives.get("eval", "").lower() == "false"]
    expect([c.says(1, "eval: false") for c in off])


def test_no_todo(book):
    word = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XXX)\b")
    expect([c.says(1, word.search(c.source)[0]) for c in book.cells if word.search(c.source)])


def is_code(comment: str) -> bool:
    """True for a comment that reads as a statement that was commented out."""
    try:
        body = ast.parse(comment.lstrip("#! ").strip()).body
    except SyntaxError:
        return False
    kinds = (ast.Assign, ast.AugAssign, *IMPORT, ast.Return, ast.Raise, ast.Assert)
    called = (isinstance(getattr(n, "value", None), ast.Call) for n in body)
    return any(called) or any(isinstance(n, kinds) for n in body)


def test_no_commented_out_code(book):
    found = [(c, i, text) for c in book.exports for i, text in comments(c.code)]
    alone = [(c, i, t) for c, i, t in found if c.code.splitlines()[i - 1].strip() == t]
    expect([c.says(i, text) for c, i, text in alone if is_code(text)])


# 7: outputs


def texts(cell: Cell) -> list[str]:
    """What a cell shows as text: source and outputs, without the bytes of images."""
    shown = [cell.source]
    for out in cell.outputs:
        shown += [out.get("text", ""), *out.get("traceback", ())]
        data = out.get("data", {})
        shown += [str(data[k]) for k in data if not k.startswith("image/") or "svg" in k]
    return [DATA_URI.sub("", text) for text in shown]


def silent(node: ast.stmt) -> bool:
    """True for a last statement that shows nothing: not an expression, or a `test_…` call."""
    call = getattr(node, "value", None)
    called = call.func if isinstance(call, ast.Call) else None
    name = getattr(called, "id", getattr(called, "attr", ""))
    return not isinstance(node, ast.Expr) or name.startswith("test_")


def test_outputs_are_committed(book):
    assert any(c.outputs for c in book.code) or not book.exports, f"{book.name}: no outputs at all"
    cells = [c for c in book.code if c.shown and "notest" not in c.directives]
    bare = [c for c in cells if not c.outputs and not silent(c.tree.body[-1])]
    expect([c.says(c.tree.body[-1].lineno, "ends in a value, but has no output") for c in bare])


def test_no_errors_in_outputs(book):
    failed = [c for c in book.code for o in c.outputs if o.output_type == "error"]
    expect([c.says(1, "its output is an error") for c in failed])


def test_no_widget_state(book):
    assert "widgets" not in book.nb.metadata, f"{book.name}: widget state in the metadata"
    kinds = [(c, kind) for c in book.code for o in c.outputs for kind in o.get("data", ())]
    expect([c.says(1, "shows a live widget") for c, kind in kinds if "widget-view" in kind])


def test_no_machine_paths(book):
    own = "|".join([ABSOLUTE.pattern, re.escape(f"{ROOT}/"), re.escape(f"{Path.home()}/")])
    found = [(c, re.search(own, text)) for c in book.cells for text in texts(c)]
    expect([c.says(1, f"absolute path {m.string[m.start():][:40]!r}") for c, m in found if m])


def test_no_keys(book):
    found = [(c, KEY.search(text)) for c in book.cells for text in texts(c)]
    expect([c.says(1, f"looks like a key: {m[0][:6]}…") for c, m in found if m])


def test_at_most_a_megabyte(book):
    size = book.path.stat().st_size
    assert size <= MAX_BYTES, f"{book.name}: {size:,} bytes, at most {MAX_BYTES:,}"


def test_the_kernel_is_python3(book):
    assert book.nb.metadata.get("kernelspec", {}).get("name") == "python3", book.name


# 9: one notebook, one module


def expected_module(path: Path) -> str:
    parts = path.relative_to(NBS).with_suffix("").parts
    return ".".join(re.sub(r"^\d+[a-z]?_", "", part) for part in parts)


def test_one_notebook_is_one_module(book):
    stated = [c.directives["default_exp"] for c in book.code if "default_exp" in c.directives]
    article = book.path.stem == "index" or book.path.parent.name == "tutorials"
    wanted = [] if article else [expected_module(book.path)]
    assert stated == wanted, f"{book.name}: default_exp {stated}, not {wanted}"
    other = [c for c in book.exports if c.directives.get("export")]
    expect([c.says(1, f"exports to {c.directives['export']}") for c in other])


def imported(node: ast.AST) -> set[str]:
    """Every dotted name that an import statement could mean."""
    names = set(roots(node))
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def test_a_notebook_never_imports_its_own_module(book):
    own = f"refimg.{book.module}"
    nodes = [(c, n) for c in book.code for n in ast.walk(c.tree) if own in imported(n)]
    expect([c.says(n.lineno, f"imports {own}, which it makes") for c, n in nodes])


def test_no_patch(book):
    found = [(c, n) for c in book.code for n in ast.walk(c.tree) if isinstance(n, DEFINITION)]
    named = [(c, n, ast.unparse(d)) for c, n in found for d in n.decorator_list]
    expect([c.says(n.lineno, f"@{d}") for c, n, d in named if d.startswith("patch")])


def test_no_assert_in_the_package(book):
    nodes = [(c, n) for c in book.exports for n in ast.walk(c.tree) if isinstance(n, ast.Assert)]
    expect([c.says(n.lineno, "assert: raise ValueError") for c, n in nodes])
