"""The rules for notebooks, held for every one in nbs/."""

from __future__ import annotations

import ast
import base64
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from .house import (
    DEFINITION,
    FUNCTION,
    IMPORT,
    NBS,
    PACKAGE,
    ROOT,
    WINGS,
    Cell,
    Found,
    Notebook,
    books,
    rule,
)

HEAVY = {
    "torch", "torchvision", "open_clip", "transformers", "diffusers", "ray", "openai", "replicate",
    "matplotlib", "pandas", "scipy", "ipywidgets", "nbdev", "fastcore",
}  # fmt: skip
MAX_BYTES, MAX_CELLS = 1_000_000, 110
MAX_IMAGE, MAX_PNG = 250_000, 10_000  # bytes; line art of that size is smaller as PNG
ABSOLUTE = re.compile(
    r"(?<![\w.:/])(?:/(?:home|root|Users|tmp|work|private|mnt)/|[A-Z]:\\{1,2}Users)"
)
KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[\w-]{16,}|r8_\w{16,}|hf_\w{20,}|gh[po]_\w{20,}|AKIA[0-9A-Z]{16})"
)
DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")
ASSIGN = (ast.Assign, ast.AnnAssign, ast.AugAssign)
FIRST_RUN = 12  # the cell of 03 by which a run is seen


def roots(node: ast.AST) -> list[str]:
    """The dotted modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module]
    return []


def packages(node: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in roots(node)}


# 1: showing


@rule
def test_at_most_three_export_cells_in_a_row() -> Found:
    """Only a live cell ends a row, and imports alone show nothing."""
    for book in books():
        row: list[Cell] = []
        for c in [*book.code, None]:
            if c is None or (c.live and not c.imports_only):
                if len(row) > 3:
                    yield row[0].says(f"{len(row)} export cells in a row, at most 3")
                row = []
            elif c.export:
                row.append(c)


@rule
def test_there_are_enough_live_cells() -> Found:
    """At least one for each export cell; six for ten in adapters, sandbox and storage."""
    for book in (b for b in books() if b.module):
        live, exports = sum(c.live for c in book.code), len(book.exports)
        least = 0.6 if book.room.split("/")[0] in WINGS else 1
        if live < least * exports:
            yield book.name, f"{live} live cells for {exports} export cells, at least {least} each"


def shows_nothing(node: ast.stmt) -> bool:
    """Tell whether a last line only lists fields or constants."""
    text = ast.unparse(node)
    names = re.fullmatch(r"\(?[A-Z][A-Z_]+(?:, [A-Z][A-Z_]+)+\)?", text)
    fields = re.fullmatch(r"(?:list|sorted|tuple|set|len)\([\w.]+\.model_fields[\w.()]*\)", text)
    return bool(names or fields or re.fullmatch(r"sum\([A-Z_]+\.values\(\)\)", text))


@rule
def test_an_example_shows_more_than_fields_or_constants() -> Found:
    for c in (c for book in books() for c in book.code if c.shown):
        if shows_nothing(c.tree.body[-1]):
            yield c.says(f"`{c.code.splitlines()[-1]}` shows nothing worth seeing")


@rule
def test_03_runs_in_its_first_dozen_cells() -> Found:
    for book in (b for b in books() if b.room == "03_pipeline.ipynb"):
        seen = [c for c in book.cells[:FIRST_RUN] if c.kind == "code" and c.live]
        if not any(re.search(r"\.run(_sync)?\(", c.code) for c in seen):
            yield book.name, f"no `.run(…)` in the first {FIRST_RUN} cells"


# 2: size


@rule
def test_a_notebook_has_at_most_110_cells() -> Found:
    for book in books():
        if len(book.cells) > MAX_CELLS:
            yield book.name, f"{len(book.cells)} cells"


@rule
def test_a_notebook_has_at_most_a_megabyte() -> Found:
    for book in books():
        if (size := book.path.stat().st_size) > MAX_BYTES:
            yield book.name, f"{size:,} bytes"


@rule
def test_lines_fit_in_100_columns() -> Found:
    for c in (c for book in books() for c in book.code):
        for i, line in enumerate(c.code.splitlines(), 1):
            if len(line) > 100:
                yield c.says(f"{len(line)} columns", i)


# 5: other code cells


def comments(code: str) -> list[tuple[int, str]]:
    """The comments of some code, with their lines; `# noqa` is none."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except tokenize.TokenError:
        return []
    kept = [t for t in tokens if t.type == tokenize.COMMENT and "noqa" not in t.string]
    return [(t.start[0], t.string) for t in kept]


@rule
def test_other_code_cells_have_at_most_8_lines() -> Found:
    for c in (c for book in books() for c in book.code if c.other):
        if (lines := len(c.code.splitlines())) > 8:
            yield c.says(f"{lines} lines")


@rule
def test_other_code_cells_have_no_comments() -> Found:
    for c in (c for book in books() for c in book.code if c.other):
        for line, text in comments(c.code):
            yield c.says(text, line)


def is_print(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"


@rule
def test_an_example_ends_in_a_value() -> Found:
    for c in (c for book in books() for c in book.code if c.shown):
        last = c.tree.body[-1]
        if is_print(last) or isinstance(last, ASSIGN):
            kind = "print" if is_print(last) else "an assignment"
            yield c.says(f"ends in {kind}, not in a value worth seeing", last.lineno)


# 5: prose


def headings(cell: Cell) -> list[str]:
    text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{1,6} .*$", text, flags=re.MULTILINE)


@rule
def test_there_is_a_markdown_cell_for_two_code_cells() -> Found:
    for book in books():
        if 2 * len(book.prose) < len(book.code):
            yield book.name, f"{len(book.prose)} markdown cells for {len(book.code)} code cells"


@rule
def test_the_first_cell_is_title_and_description() -> Found:
    for first in (book.cells[0] for book in books()):
        if first.kind != "markdown" or not re.match(r"# \S.*\n+> \S", first.source):
            yield first.says("must be `# Title` and `> one line`")


@rule
def test_a_heading_stands_alone() -> Found:
    for c in (c for book in books() for c in book.cells[1:] if c.kind == "markdown"):
        if headings(c) and len([x for x in c.source.splitlines() if x.strip()]) > 1:
            yield c.says(f"`{headings(c)[0]}` shares its cell")


@rule
def test_no_filler() -> Found:
    for c in (c for book in books() for c in book.prose):
        if re.search(r"\bnow we\b", c.source, re.I):
            yield c.says("`Now we …`")


# 6: imports


@rule
def test_import_cells_only_import() -> Found:
    for c in (c for book in books() for c in book.code if not c.hidden):
        is_mixed = any(isinstance(n, IMPORT) for n in c.tree.body) and not c.imports_only
        if is_mixed:
            yield c.says("imports stand in a cell of their own")


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: nothing in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(tree):
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not typing and not isinstance(child, FUNCTION):
            yield child
            yield from at_import(child)


@rule
def test_heavy_packages_are_imported_where_they_are_used() -> Found:
    for c in (c for book in books() for c in book.exports):
        for node in at_import(c.tree):
            if heavy := packages(node) & HEAVY:
                yield c.says(f"{', '.join(sorted(heavy))} at module level", node.lineno)


@rule
def test_no_nbdev_or_fastcore_in_the_package() -> Found:
    for c in (c for book in books() for c in book.exports):
        for node in ast.walk(c.tree):
            if packages(node) & {"nbdev", "fastcore"}:
                yield c.says("nbdev and fastcore are for developers only", node.lineno)


@rule
def test_no_star_imports() -> Found:
    for c in (c for book in books() for c in book.code):
        for node in (n for n in ast.walk(c.tree) if isinstance(n, ast.ImportFrom)):
            if any(a.name == "*" for a in node.names):
                yield c.says("star import", node.lineno)


# 7: nothing hidden, nothing left over


@rule
def test_at_most_three_hidden_code_cells() -> Found:
    for book in books():
        hidden = [c.number for c in book.code if c.hidden]
        if len(hidden) > 3:
            yield book.name, f"{len(hidden)} hidden code cells: {hidden}"


@rule
def test_nothing_is_left_unrun() -> Found:
    for c in (c for book in books() for c in book.code):
        if c.directives.get("eval", "").lower() == "false":
            yield c.says("eval: false")


@rule
def test_no_todo() -> Found:
    word = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XXX)\b")
    for c in (c for book in books() for c in book.cells):
        if found := word.search(c.source):
            yield c.says(found[0])


def is_code(comment: str) -> bool:
    """Tell whether a comment reads as a statement that was commented out."""
    try:
        body = ast.parse(comment.lstrip("#! ").strip()).body
    except SyntaxError:
        return False
    kinds = (ast.Assign, ast.AugAssign, *IMPORT, ast.Return, ast.Raise, ast.Assert)
    called = (isinstance(getattr(n, "value", None), ast.Call) for n in body)
    return any(called) or any(isinstance(n, kinds) for n in body)


@rule
def test_no_commented_out_code() -> Found:
    for c in (c for book in books() for c in book.exports):
        for line, text in comments(c.code):
            alone = c.code.splitlines()[line - 1].strip() == text
            if alone and is_code(text):
                yield c.says(text, line)


# 7: outputs


def texts(cell: Cell) -> list[str]:
    """What a cell shows as text: source and outputs, without the bytes of images."""
    shown = [cell.source]
    for out in cell.outputs:
        shown += [out.get("text", ""), *out.get("traceback", ())]
        data = out.get("data", {})
        shown += [str(data[k]) for k in data if not k.startswith("image/") or "svg" in k]
    return [DATA_URI.sub("", text) for text in shown]


def images(cell: Cell) -> list[tuple[str, int]]:
    """The images in a cell's outputs: format, and size in bytes."""
    found = []
    for data in (out.get("data", {}) for out in cell.outputs):
        raw = [(kind, "".join(data[kind])) for kind in data if re.fullmatch(r"image/\w+", kind)]
        html = re.findall(r"data:(image/\w+);base64,([\w+/=\s]+)", str(data.get("text/html")))
        found += [(kind, len(base64.b64decode(body))) for kind, body in [*raw, *html]]
    return found


def is_silent(node: ast.stmt) -> bool:
    """Tell whether a last statement shows nothing: no expression, or a `test_…` call."""
    call = getattr(node, "value", None)
    called = call.func if isinstance(call, ast.Call) else None
    name = getattr(called, "id", getattr(called, "attr", ""))
    return not isinstance(node, ast.Expr) or name.startswith("test_")


@rule
def test_outputs_are_committed() -> Found:
    for book in books():
        if book.exports and not any(c.outputs for c in book.code):
            yield book.name, "no outputs at all"
        for c in (c for c in book.code if c.shown and "notest" not in c.directives):
            if not c.outputs and not is_silent(c.tree.body[-1]):
                yield c.says("ends in a value, but has no output", c.tree.body[-1].lineno)


@rule
def test_images_in_outputs_are_small_jpeg_or_webp() -> Found:
    for c in (c for book in books() for c in book.code):
        for kind, size in images(c):
            photo = kind in ("image/jpeg", "image/webp")
            if size > (MAX_IMAGE if photo else MAX_PNG):
                yield c.says(f"{kind} of {size:,} bytes")


@rule
def test_no_errors_in_outputs() -> Found:
    for c in (c for book in books() for c in book.code):
        if any(o.output_type == "error" for o in c.outputs):
            yield c.says("its output is an error")


@rule
def test_no_widget_state() -> Found:
    for book in books():
        if "widgets" in book.nb.metadata:
            yield book.name, "widget state in the metadata"
        for c in book.code:
            if any("widget-view" in kind for o in c.outputs for kind in o.get("data", ())):
                yield c.says("shows a live widget")


@rule
def test_no_machine_paths() -> Found:
    own = "|".join([ABSOLUTE.pattern, re.escape(f"{ROOT}/"), re.escape(f"{Path.home()}/")])
    for c in (c for book in books() for c in book.cells):
        for found in filter(None, (re.search(own, text) for text in texts(c))):
            yield c.says(f"absolute path {found.string[found.start():][:40]!r}")


@rule
def test_no_keys() -> Found:
    for c in (c for book in books() for c in book.cells):
        for found in filter(None, map(KEY.search, texts(c))):
            yield c.says(f"looks like a key: {found[0][:6]}…")


@rule
def test_the_kernel_is_python3() -> Found:
    for book in books():
        if (name := book.nb.metadata.get("kernelspec", {}).get("name")) != "python3":
            yield book.name, f"kernel {name}"


# 8: one notebook, one module


def expected_module(path: Path) -> str:
    parts = path.relative_to(NBS).with_suffix("").parts
    return ".".join(re.sub(r"^\d+[a-z]?_", "", part) for part in parts)


def is_article(book: Notebook) -> bool:
    """Tell whether a notebook makes no module: a page, or one that shows a whole wing."""
    own = expected_module(book.path)
    wing = (PACKAGE / own).is_dir() and "." not in own
    return book.path.stem == "index" or book.path.parent.name == "tutorials" or wing


@rule
def test_one_notebook_is_one_module() -> Found:
    for book in books():
        stated = [c.directives["default_exp"] for c in book.code if "default_exp" in c.directives]
        wanted = [] if is_article(book) else [expected_module(book.path)]
        if stated != wanted:
            yield book.name, f"default_exp {stated}, not {wanted}"
        for c in (c for c in book.exports if c.directives.get("export")):
            yield c.says(f"exports to {c.directives['export']}")


def imported(node: ast.AST) -> set[str]:
    """Every dotted name that an import statement could mean."""
    names = set(roots(node))
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


@rule
def test_a_notebook_never_imports_its_own_module() -> Found:
    for book in (b for b in books() if b.module):
        for c in book.code:
            for node in ast.walk(c.tree):
                if f"refimg.{book.module}" in imported(node):
                    yield c.says(f"imports refimg.{book.module}, which it makes", node.lineno)


@rule
def test_no_patch() -> Found:
    for c in (c for book in books() for c in book.code):
        for node in (n for n in ast.walk(c.tree) if isinstance(n, DEFINITION)):
            if any(ast.unparse(d).startswith("patch") for d in node.decorator_list):
                yield c.says(f"@patch on {node.name}", node.lineno)


@rule
def test_no_assert_in_the_package() -> Found:
    for c in (c for book in books() for c in book.exports):
        for node in (n for n in ast.walk(c.tree) if isinstance(n, ast.Assert)):
            yield c.says("assert: raise ValueError", node.lineno)
