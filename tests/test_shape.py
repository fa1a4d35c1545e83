"""The shape of the package: sizes, methods, private functions, and who may know whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import pytest

from . import house
from .house import (
    DOOR,
    FUNCTION,
    IMPORT,
    PACKAGE,
    PUBLIC,
    ROOT,
    WINGS,
    Definition,
    Found,
    Module,
    body_lines,
    books,
    docstring_lines,
    functions,
    hold,
    longer,
    modules,
    rule,
    signature_lines,
)

MAX_LINES, MAX_BODY, MAX_CLASS = 450, 40, 120
HOOK = re.compile(r"_(?:repr_\w+|ipython_\w+)_$")  # methods that IPython calls


# sizes


@rule
def test_a_module_has_at_most_450_lines() -> Found:
    for module in modules():
        lines, most = module.text.count("\n"), MAX_LINES
        if lines > most:
            yield module.name, f"{lines} lines, at most {most}"


@rule
def test_the_body_of_a_function_has_at_most_40_lines() -> Found:
    """The backend's door is free."""
    for f in functions():
        if (lines := body_lines(f.node)) > MAX_BODY and f.name != DOOR:
            yield f.where, f"{lines} lines"


def class_lines(node: ast.ClassDef) -> int:
    """The lines of a class, without the signatures and docstrings in it."""
    inner = [n for n in ast.walk(node) if isinstance(n, FUNCTION)]
    return body_lines(node) - sum(signature_lines(n) + docstring_lines(n) for n in inner)


@rule
def test_a_class_has_at_most_120_lines() -> Found:
    for c in (c for module in modules() for c in module.classes):
        if (lines := class_lines(c.node)) > MAX_CLASS:
            yield c.where, f"{lines} lines"


# methods


def is_protocol(c: Definition) -> bool:
    return any("Protocol" in ast.unparse(base) for base in c.node.bases)


@cache
def fixed_names() -> frozenset[str]:
    """Functions that the design and 0.1's pages name, so they stay functions."""
    names = [name.split(".") for name in PUBLIC.read_text("utf-8").split()]
    return frozenset(parts[-1] for parts in names if parts[-2:-1] and parts[-2].islower())


@rule
def test_a_function_of_an_object_of_its_module_is_a_method() -> Found:
    """By the annotation of its first argument; the public names of 0.1 stay what they are."""
    for module in modules():
        own = {c.name for c in module.classes if c.top and not is_protocol(c)}
        for f in (f for f in module.functions if f.top and f.name not in fixed_names()):
            first = f.arguments[0].annotation if f.arguments else None
            text = ast.unparse(first).strip("'\"") if first else ""
            if text.removesuffix(" | None") in own:
                yield f.where, f"a method of {text}"


@cache
def free_functions() -> frozenset[str]:
    return frozenset(f.name for f in functions() if f.top)


def forwards_to(f: Definition) -> str | None:
    """The free function to which a method hands all its arguments, and that is all it does."""
    body = f.node.body[bool(docstring_lines(f.node)) :]
    body = [node for node in body if not isinstance(node, IMPORT)]
    value = getattr(body[0], "value", None) if len(body) == 1 else None
    call = value.value if isinstance(value, ast.Await) else value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        return None
    path = ast.unparse(call.func)
    name = None if path.startswith("self.") else path.rpartition(".")[2]
    given = [*call.args, *(k.value for k in call.keywords)]
    plain = [a.value if isinstance(a, ast.Starred) else a for a in given]
    if name not in free_functions() or not all(isinstance(a, ast.Name) for a in plain):
        return None
    handed, own = {a.id for a in plain}, {a.arg for a in f.arguments}
    return name if own - {"self", "cls"} <= handed <= own and handed else None


@rule
def test_no_method_only_forwards_to_a_function() -> Found:
    for f in (f for f in functions() if f.owner and not HOOK.match(f.name)):
        if name := forwards_to(f):
            yield f.where, f"hands everything to {name}"


# private functions


def is_private(name: str) -> bool:
    return name[0] == "_" and name[:2] != "__" and not HOOK.match(name)


@dataclass(frozen=True)
class Use:
    """A name that is read: alone, or as an attribute of `self` or of anything else."""

    name: str
    inside: tuple[str, ...]  # the definitions around it, outermost first
    owner: str | None  # the class of the method around it
    of: str | None  # None: a plain name; "self"; or what it is an attribute of


@cache
def uses(module: Module) -> tuple[Use, ...]:
    """Every name that a module reads; imports and annotations that are texts aside."""
    found = []

    def walk(node: ast.AST, inside: tuple[str, ...], owner: str | None) -> None:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.append(Use(node.id, inside, owner, None))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            found.append(Use(node.attr, inside, owner, "self" if base in ("self", "cls") else base))
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            for outer in [*node.decorator_list, *getattr(node, "bases", ())]:
                walk(outer, inside, owner)
            own = node.name if isinstance(node, ast.ClassDef) else owner
            for child in (n for n in ast.iter_child_nodes(node) if n not in node.decorator_list):
                walk(child, (*inside, node.name), own)
            return
        for child in ast.iter_child_nodes(node):
            walk(child, inside, owner)

    walk(module.tree, (), None)
    return tuple(found)


def families(module: Module) -> dict[str, set[str]]:
    """Each class of a module with its ancestors and descendants there."""
    bases = {c.name: {ast.unparse(b) for b in c.node.bases} for c in module.classes}

    def above(name: str) -> set[str]:
        return {name}.union(*(above(b) for b in bases[name] if b in bases))

    kin = {name: above(name) for name in bases}
    return {name: kin[name] | {n for n in bases if name in kin[n]} for name in bases}


@cache
def importers() -> dict[tuple[str, str], list[Module]]:
    """The modules that import a name from a module, by both."""
    found: dict[tuple[str, str], list[Module]] = {}
    for module in modules():
        for node in (n for n in ast.walk(module.tree) if isinstance(n, ast.ImportFrom)):
            for alias in node.names:
                found.setdefault((source_of(module, node), alias.name), []).append(module)
    return found


def callers(module: Module, f: Definition) -> int:
    """The places, outside of its own body, that read a private function or method."""
    family, count = families(module), 0
    for use in uses(module):
        if use.name != f.name or f.name in use.inside:
            continue
        if f.owner is None:
            count += use.of is None
        elif use.of == "self" and use.owner in family:
            count += f.owner in family[use.owner]
        else:
            count += use.of is not None
    for other in importers().get((module.name, f.name), ()) if f.top else ():
        count += sum(use.name == f.name and use.of is None for use in uses(other))
    if f.top:
        count += attributes_elsewhere(module, f.name)
    return count


def attributes_elsewhere(module: Module, name: str) -> int:
    """The places in other modules that read `module.name`."""
    last, package = module.name.rpartition(".")[2], module.name.rpartition(".")[0]
    others = importers().get((package, last), ())
    return sum(use.name == name and use.of == last for other in others for use in uses(other))


def one_callers(module: Module) -> tuple[list[str], list[str]]:
    """The private functions and methods of a module, and those of them with one caller or none."""
    private = [f for f in module.functions if is_private(f.name)]
    return [f.qualname for f in private], [f.qualname for f in private if callers(module, f) <= 1]


@rule
def test_few_private_functions_have_one_caller() -> Found:
    """At most 35 % of eight or more; 50 % in adapters, sandbox and storage."""
    for module in modules():
        private, once = one_callers(module)
        most = 0.5 if module.folder in WINGS else 0.35
        if len(private) >= 8 and len(once) > most * len(private):
            count = f"{len(once)} of {len(private)} private functions"
            yield module.name, f"{count} have one caller, at most {most:.0%}: {' '.join(once)}"


@rule
def test_what_two_modules_need_is_public() -> Found:
    for module in modules():
        for node in (n for n in ast.walk(module.tree) if isinstance(n, ast.ImportFrom)):
            inside = node.level or node.module.partition(".")[0] == "refimg"
            for name in (a.name for a in node.names if inside and is_private(a.name)):
                yield f"{module.name} <- {source_of(module, node)}.{name}", f"line {node.lineno}"


@cache
def words() -> dict[str, set[str]]:
    """The words of every file that may use a name; by path."""
    folders = ("refimg", "tests", "bench", "tools", "examples")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    paths = [p for p in paths if p.name != "_modidx.py"]
    found = {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in paths}
    found |= {b.name: "\n".join(c.source for c in b.cells) for b in books()}
    pages = [ROOT / "README.md", *(ROOT / "nbs").rglob("*.md")]
    found |= {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in pages}
    return {path: set(re.findall(r"[A-Za-z_]\w*", text)) for path, text in found.items()}


def given_back(module: Module) -> set[str]:
    """The words in the annotations of public functions' results and of public records' fields."""
    notes = [f.node.returns for f in module.functions if f.public]
    fields = (n for c in module.classes if c.public for n in c.node.body)
    notes += [n.annotation for n in fields if isinstance(n, ast.AnnAssign)]
    return {word for note in notes if note for word in re.findall(r"\w+", ast.unparse(note))}


@rule
def test_every_public_name_has_a_user() -> Found:
    """In another module or notebook, a page, a test, a tool; or it is what something returns.

    Commands are used by people.
    """
    own = {f"refimg.{b.module}": b.name for b in books() if b.module}
    for module in (m for m in modules() if m.name != "refimg"):
        mine = {module.path.relative_to(ROOT).as_posix(), own.get(module.name)}
        used = set().union(*(found for path, found in words().items() if path not in mine))
        for d in (d for d in module.definitions if d.top and d.public and d.name not in used):
            is_command = any("command" in name or "callback" in name for name in d.decorators)
            if not is_command and d.name not in given_back(module):
                yield d.where, "nobody else uses it"


# definitions


@rule
def test_public_arguments_are_annotated() -> Found:
    for f in (f for f in functions() if f.public):
        bare = [a.arg for a in f.arguments if a.annotation is None]
        if bare := [name for name in bare if name not in ("self", "cls")]:
            yield f.where, f"no annotation for {', '.join(bare)}"


@rule
def test_public_definitions_have_a_docstring() -> Found:
    for d in (d for module in modules() for d in module.definitions if d.public):
        if (d.is_function or d.top) and not ast.get_docstring(d.node):
            yield d.where, "no docstring"


@rule
def test_docstrings_are_short() -> Found:
    """At most three lines; the backend's door is free."""
    for f in (f for f in functions() if f.name != DOOR):
        if (lines := (ast.get_docstring(f.node) or "").count("\n") + 1) > 3:
            yield f.where, f"a docstring of {lines} lines"


@rule
def test_the_package_never_prints() -> Found:
    for module in modules():
        for node in (n for n in ast.walk(module.tree) if isinstance(n, ast.Call)):
            if getattr(node.func, "id", "") == "print":
                yield module.at(node.lineno), f"line {node.lineno}: print"


@rule
def test_annotations_come_from_the_future() -> Found:
    for module in (m for m in modules() if not m.is_package):
        first = next((n for n in module.tree.body if isinstance(n, IMPORT)), None)
        if first is None or ast.unparse(first) != "from __future__ import annotations":
            yield module.name, "no `from __future__ import annotations`"


LAZY = {"refimg", "refimg.view"}  # whose `__getattr__` imports names when they are asked for


@rule
def test_state_is_passed_and_returned() -> Found:
    """No ContextVar, no `SimpleNamespace` stand-in; `__getattr__` for lazy names only."""
    for module in modules():
        for node in ast.walk(module.tree):
            name = getattr(node, "id", getattr(node, "attr", ""))
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ("ContextVar", "SimpleNamespace"):
                    yield module.at(node.lineno), f"line {node.lineno}: {name}"
        lazy = [d for d in module.definitions if d.top and d.name == "__getattr__"]
        if lazy and module.name not in LAZY:
            yield lazy[0].where, "a module's __getattr__"


# who may know whom: DESIGN, section 1


LAYERS = (
    ("__main__", "cli", "fleet", "view.gallery", "gallery"),
    ("pipeline",),
    ("engine.run", "engine.agents", "engine.attempts", "engine.candidates", "engine.handover",
     "engine.refining", "engine.many", "engine.decisions", "engine.reruns", "engine.sheets",
     "engine.rewording"),
    ("engine.results", "engine.settings", "engine.planning", "engine.usage", "engine.defects",
     "engine.outliers"),
    ("enhance", "generate", "score", "inspection", "engine.asking"),
    ("engine.story", "engine.references", "engine.prompts", "engine.tasks", "engine.costs"),
    ("storage",),
    ("engine.protocols", "engine.calibration", "engine.subjects", "engine.fence",
     "engine.instructions", "engine.guidance", "engine.answers", "engine.intent"),
)  # from the top; arrows point down, or to a neighbour of the same layer
STAGES = ("enhance", "generate", "score", "inspection", "engine.planning",
          "validate.drift")  # may ask `defaults`
SEES = ("cli", "fleet", "pipeline")
GROUND = (*LAYERS[-1], "storage")
READ = ("engine.results", "engine.settings", "engine.decisions", "engine.story", "engine.costs",
        "engine.tasks", "engine.sheets",
        "inspection", "enhance", "generate", "score", *GROUND)
WINGS_KNOW = {  # beside their own rooms
    "adapters": GROUND,
    "sandbox": (*GROUND, "adapters.towers", "adapters.tiles", "adapters.consistency"),
    "defaults": ("adapters", "sandbox", "engine.costs", *GROUND),
    "view": READ,
    "validate": (*READ, "view"),
}
FACADES = {"view", "validate", "inspection"}  # packages that hand on their rooms' names


@dataclass(frozen=True)
class Edge:
    """One import of a module of ours by another."""

    source: str  # without "refimg."
    target: str
    name: str | None  # what is imported from it
    line: int
    inside: str | None  # the function that holds it
    typing: bool  # under TYPE_CHECKING

    @property
    def where(self) -> str:
        return f"{self.source} -> {self.target}"


def source_of(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of the module that an import names."""
    if not node.level:
        return node.module
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


@cache
def rooms() -> frozenset[str]:
    return frozenset(m.name for m in modules())


def targets(module: Module, node: ast.Import | ast.ImportFrom) -> Iterable[tuple[str, str | None]]:
    """The modules of ours that an import reads, and the name taken from each."""
    if isinstance(node, ast.Import):
        yield from ((a.name, None) for a in node.names if a.name in rooms())
        return
    source = source_of(module, node)
    for alias in node.names:
        if f"{source}.{alias.name}" in rooms():
            yield f"{source}.{alias.name}", None
        elif source in rooms():
            yield source, alias.name


@cache
def edges() -> tuple[Edge, ...]:
    """Every import of a module of ours, at the top of a module or in a function."""
    found = []

    def walk(module: Module, node: ast.AST, inside: str | None, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, IMPORT):
                for target, name in targets(module, child):
                    a, b = (n.removeprefix("refimg").lstrip(".") for n in (module.name, target))
                    if a != b:
                        found.append(Edge(a, b, name, child.lineno, inside, typing))
                continue
            held = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            own = child.name if isinstance(child, FUNCTION) else inside
            walk(module, child, own, typing or held)

    for module in modules():
        walk(module, module.tree, None, False)
    return tuple(found)


def among(room: str, names: Iterable[str]) -> bool:
    """Tell whether a room is one of those, or stands in one of those wings."""
    return any(room == name or room.startswith(f"{name}.") for name in names)


def layer(room: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if among(room, names)), None)


def wing(room: str) -> str | None:
    """The wing with rules of its own that a room stands in."""
    held = room.split(".")[0]
    return held if held in WINGS_KNOW and room != "view.gallery" else None


def is_shown(edge: Edge) -> bool:
    """Tell whether a record imports how it looks, when it is asked."""
    return bool(edge.inside and HOOK.match(edge.inside)) and wing(edge.target) == "view"


def asks_defaults(edge: Edge) -> bool:
    """Tell whether a stage asks for its default in a function: the one arrow that runs up."""
    return among(edge.source, STAGES) and edge.target == "defaults" and bool(edge.inside)


def may_know(edge: Edge) -> bool:
    """Tell whether the design lets one room import from another."""
    a, b = edge.source, edge.target
    if a == "" or (edge.name == "__version__" and b == ""):
        return True
    if a.split(".")[0] in FACADES and a.split(".")[0] == b.split(".")[0] and "." not in a:
        return True
    if is_shown(edge) or asks_defaults(edge):
        return True
    if b == "defaults":
        return among(a, SEES)
    if own := wing(a):
        lazy = own != "defaults" or bool(edge.inside) or edge.typing or among(b, GROUND)
        return lazy and (among(b, WINGS_KNOW[own]) or wing(b) == own) and b != "view.gallery"
    if wing(b) in ("view", "validate"):
        return layer(a) is not None and layer(a) <= 1
    if layer(a) is None or layer(b) is None:
        return False
    return layer(a) <= layer(b)


@rule
def test_every_room_has_its_place() -> Found:
    for module in modules():
        room = module.name.removeprefix("refimg").lstrip(".")
        is_empty = module.is_package and not module.tree.body
        if room and not is_empty and layer(room) is None and wing(room) is None:
            yield module.name, "the design has no such room"


@rule
def test_arrows_point_down() -> Found:
    """Imports of modules, in functions and for type checkers too."""
    for edge in edges():
        if not may_know(edge):
            how = " for types" if edge.typing else f" in {edge.inside}" if edge.inside else ""
            yield edge.where, f"line {edge.line}{how}"


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of rooms that reach each other, sorted."""
    near: dict[str, set[str]] = {}
    for a, b in arrows:
        near.setdefault(a, set()).add(b)

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = near.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    far = {room: reach(room) for room in near}
    groups = {frozenset(b for b in far[a] if a in far.get(b, ())) for a in near if a in far[a]}
    return sorted(sorted(group) for group in groups)


@rule
def test_there_is_no_circle() -> Found:
    """Imports in functions count, but for how a record looks and for lazy names."""
    free = {e for e in edges() if not is_shown(e) and "" not in (e.source, e.target)}
    arrows = {(e.source, e.target) for e in free if not (e.source in FACADES and e.inside)}
    for group in circles(arrows):
        yield group[0], ", ".join(f"{a} -> {b}" for a, b in sorted(arrows) if {a, b} <= set(group))


# the checks themselves


def test_an_arrow_is_judged_as_the_design_says() -> None:
    def ok(a: str, b: str, inside: str | None = None, typing: bool = False) -> bool:
        return may_know(Edge(a, b, "x", 1, inside, typing))

    good = [("cli", "pipeline"), ("pipeline", "engine.run"), ("engine.run", "score"),
            ("score", "storage.files"), ("storage.files", "engine.protocols"),
            ("view.gallery", "pipeline"), ("view.charts", "engine.results"),
            ("adapters.clip", "adapters.towers"), ("sandbox.scorers", "adapters.towers"),
            ("inspection.judge", "enhance"), ("gallery", "view.gallery"), ("pipeline", "defaults")]
    bad = [("score", "pipeline"), ("storage.journal", "adapters.retry"), ("score", "adapters.clip"),
           ("adapters.openai", "enhance"), ("sandbox.scorers", "score"), ("score", "defaults"),
           ("engine.protocols", "storage.files"), ("pipeline", "adapters.clip"),
           ("view.charts", "pipeline"), ("engine.results", "view.tables"),
           ("sandbox.scorers", "adapters.clip"), ("defaults", "adapters.clip")]
    assert [pair for pair in good if not ok(*pair)] == []
    assert [pair for pair in bad if ok(*pair)] == []
    assert ok("score", "defaults", "score_images") and ok("defaults", "adapters.clip", "scorers")
    assert ok("engine.results", "view.tables", "_repr_html_")
    assert not ok("engine.run", "defaults", "_judge") and not ok("score", "pipeline", typing=True)


def test_circles_are_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "b"), ("d", "a")]) == [["b", "c"]]
    assert circles([("a", "b"), ("b", "c")]) == []


def test_callers_are_counted_by_place() -> None:
    text = (
        "def _a(): return _a()\ndef _b(): return _a() + _a()\ndef _c(): pass\n"
        "class A:\n    def _m(self): return self._n()\n    def _n(self): return 1\n"
        "class B:\n    def _n(self): return 2\n    def f(self): return self._n(), self._n(), _c()\n"
    )
    module = Module(PACKAGE / "made_up.py", text)
    found = {f.qualname: callers(module, f) for f in module.functions if is_private(f.name)}
    assert found == {"_a": 2, "_b": 0, "_c": 1, "A._m": 0, "A._n": 1, "B._n": 2}


def test_a_list_of_offenders_only_gets_shorter(monkeypatch) -> None:
    monkeypatch.setattr(house, "listed", lambda: {"some rule": ["a", "b"]})
    hold("some rule", [("a", "why"), ("b", "why")])
    with pytest.raises(pytest.fail.Exception, match="c: why"):
        hold("some rule", [("a", "why"), ("b", "why"), ("c", "why")])
    with pytest.raises(pytest.fail.Exception, match="b: offends no more"):
        hold("some rule", [("a", "why")])
    with pytest.raises(pytest.fail.Exception, match="a: why"):
        hold("another rule", [("a", "why")])
    assert longer({"some rule": ["a", "c"]}, {"some rule": ["a", "b"]}) == []
    assert longer({"some rule": ["a", "c"]}, {"some rule": ["a"]})[1].strip() == "c"
