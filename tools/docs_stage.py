"""nbdev's notebooks for readers (what it calls _proc), with the definitions from docs_api.

nbdev would run every exported cell to show its documentation, and stops at annotations that only
a type checker can see. Here the text of the cells is enough, so nothing runs.
"""

import ast
import re
from functools import cache
from pathlib import Path

import docs_api
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
EXPORT = {"export", "exports"}
SECTION = re.compile(r"^##+ ", re.MULTILINE)
SHOW = re.compile(r"^show_doc\(", re.MULTILINE)
FIXED = re.compile(r"(^```.*?^```[ \t]*$|^#[^\n]*$)", re.MULTILINE | re.DOTALL)
BACKTICKS = re.compile(r"(?<![\[`])`([\w/]+)(\(\))?`(?![`\]])")
REPLACED = {"add_show_docs", "exec_show_docs", "clean_show_doc", "mv_exports", "add_links"}


def module_of(path: Path) -> str | None:
    """The file that a notebook exports to, relative to the repository."""
    found = re.search(r"#\|\s*default_exp\s+([\w.]+)", path.read_text("utf-8"))
    return f"refimg/{found[1].replace('.', '/')}.py" if found else None


def page(path: Path) -> str:
    """The name of a notebook's page below nbs/, without its number and its ending."""
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem)).as_posix()


def notebooks() -> list[Path]:
    """The notebooks of nbs/, checkpoints aside."""
    return [p for p in sorted(NBS.rglob("*.ipynb")) if not {".ipynb_checkpoints"} & {*p.parts}]


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its path in the repository."""
    files = sorted((ROOT / "refimg").rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text("utf-8")) for p in files}


def taken() -> set[str]:
    """The names of arguments and fields: in prose they need not mean the definition."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    fields = [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    names = {target.id for target in fields if isinstance(target, ast.Name)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


@cache
def targets() -> dict[str, str]:
    """Public name -> the notebook and anchor that document it, where the name means only that."""
    found, twice, known, used = {}, set(), trees(), taken()
    for path in notebooks():
        found[path.relative_to(NBS).with_suffix("").as_posix()] = path.relative_to(NBS).as_posix()
        tree = known.get(module_of(path) or "", ast.Module(body=[]))
        for node in (n for n in tree.body if isinstance(n, docs_api.DEFINITIONS)):
            twice |= {node.name} & found.keys()
            found[node.name] = f"{path.relative_to(NBS).as_posix()}#{node.name.lower()}"
    return {n: to for n, to in found.items() if n[0] != "_" and n not in twice | used}


@cache
def line_numbers(module: str) -> dict[str, int]:
    """Where each definition of a module begins."""
    nodes = trees()[module].body
    return {n.name: n.lineno for n in nodes if isinstance(n, docs_api.DEFINITIONS)}


def linked(text: str, above: str) -> str:
    """Prose in which names in backticks lead to their documentation; code and headings stay."""

    def link(found: re.Match) -> str:
        to = targets().get(found[1])
        return f"[{found[0]}]({above}{to})" if to else found[0]

    parts = FIXED.split(text)
    parts[::2] = [BACKTICKS.sub(link, part) for part in parts[::2]]
    return "".join(parts)


class Api(Processor):
    """Puts after each exported cell what a reader should see of it, and links names in prose."""

    def begin(self) -> None:
        path = Path(self.nb.path_)
        above = "../" * len(path.resolve().relative_to(NBS).parents[1:])
        cells = []
        for cell in self.nb.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, above)
            cells.append(cell)
            shown = self.shown(cell, module_of(path))
            if not any(SECTION.search(c.source) for c in cells if c.cell_type == "markdown"):
                shown = re.sub(r"^### ", "## ", shown, flags=re.MULTILINE)
            cells += [mk_cell(shown, "markdown")] if shown else []
        self.nb.cells = [c for c in cells if not SHOW.search(c.source or "")]

    def shown(self, cell, module: str | None) -> str:
        """The Markdown for an exported cell; none for imports and for what is hidden."""
        if cell.cell_type != "code" or not EXPORT & set(cell.directives_):
            return ""
        settings = get_config()
        file = f"{settings.git_url}/blob/{settings.branch}/{module}"
        links = {name: f"{file}#L{line}" for name, line in line_numbers(module).items()}
        return "" if "hide" in cell.directives_ else docs_api.document(cell.source, links)


class Readable(FilterDefaults):
    """nbdev's own processors, less those that run code."""

    def base_procs(self) -> list:
        """The processors in order."""
        kept = [p for p in super().base_procs() if p.__name__ not in REPLACED]
        at = 1 + [p.__name__ for p in kept].index("FrontmatterProc")
        return [*kept[:at], Api, *kept[at:]]


def stage(source: Path, target: Path) -> None:
    """Writes one notebook as readers should see it."""
    nb = read_nb(source)
    Readable()(nb)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)
