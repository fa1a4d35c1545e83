"""The English of the house: docstrings, errors, and one word for one thing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .house import DEFINITION, ROOT, Found, Module, books, modules, rule

# docstrings


@cache
def docstrings() -> tuple[tuple[str, ast.AST, str], ...]:
    """Every docstring of the package: where, of what, and its text."""
    found = []
    for module in modules():
        found.append((module.name, module.tree, ast.get_docstring(module.tree)))
        found += [(d.where, d.node, ast.get_docstring(d.node)) for d in module.definitions]
    return tuple((where, node, text) for where, node, text in found if text)


@rule
def test_no_docstring_begins_with_nothing() -> Found:
    for where, _, text in docstrings():
        if re.match(r"(Nothing|None)[;:,]", text):
            yield where, text.splitlines()[0]


@rule
def test_docstrings_begin_with_a_capital_and_end_with_a_stop() -> Found:
    """A module's is its notebook's line below the title, without a stop."""
    for where, node, text in docstrings():
        first = text.partition("\n\n")[0].rstrip()
        ends = isinstance(node, ast.Module) or first[-1] in ".!?:…)`"
        if re.match(r"[a-z]+\s", first) or not ends:
            yield where, first.splitlines()[0]


NO_IMPERATIVE = re.compile(
    r"(?:The|A|An|True|False|None|Nothing|What|Where|Whether|How|Who|Why|One|Its|Their|This|"
    r"These|That|Those|All|Every|Each|Both|Some|Any|No|Which|"
    r"Returns|Gives|Makes|Writes|Removes|Reads|Tells|Says|Keeps|Takes|Raises|Adds|Asks|Waits)\b"
)
NOUNS = {"property", "cached_property", "functools.cached_property", "computed_field"}


@rule
def test_docstrings_of_functions_are_imperative() -> Found:
    """No imperative sentence begins with one of these words; properties may be nouns."""
    named = {d.where: d for module in modules() for d in module.definitions}
    for where, node, text in docstrings():
        is_function = not isinstance(node, ast.Module | ast.ClassDef)
        if is_function and not named[where].decorators & NOUNS and NO_IMPERATIVE.match(text):
            yield where, text.splitlines()[0]


# errors


GRAMMAR = re.compile(r"\bmust (?:not )?be .+, got ", re.DOTALL)
OLD_FORMS = re.compile(
    r"; allowed: |: allowed (?:is|are) |\ballowed is one of|\{\}: (?:it )?must be "
)
STATES = {  # how an error begins that is about a state, or about no argument -> why it may be so
    "rerun() needs result.story": "a state, and what to do",
    "REPLICATE_API_TOKEN": "half of a set of keys: names what must be set",
    "OPENAI_API_KEY": "half of a set of keys: names what must be set",
    "REFIMG_IMAGE_MODEL": "a setting that lacks another: names what must be set",
    "budget_usd needs prices": "a state, and what to do",
    "the file was changed by another gallery": "a state, and what to do",
    "images are being drawn": "a state, and what to do",
    "the images are there": "a state, and what to do",
    "there are no images yet": "a state, and what to do",
    "the result does not hold its story": "a state, and what to do",
    "the answer ": "about a model's answer, and not about an argument",
    "the model refused": "the same",
    "there is no JSON object in the answer": "goes to a model, in its repair turn",
    "there is no prompt in the answer": "goes to a model, in its repair turn",
    "unusable after one repair turn": "about a model's answer; the cause follows",
    "must be a number from 0 to 100, not": "goes to a model, in its repair turn; in keys of calls",
    "must be a finite number from 0 to 100, not": "goes to a model, as the one before",
}
CAUSE = re.compile(r"\b(?:cannot|could not) be \w+\b.*: \{\}$")  # about a file; the cause follows


def text_of(node: ast.AST | None, module: Module) -> str | None:
    """The text of an error with `{}` for each value; None where it is made elsewhere."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (n.value if isinstance(n, ast.Constant) else "{}" for n in node.values)
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [text_of(n, module) for n in (node.left, node.right)]
        return "".join(p if p is not None else "{}" for p in parts) if any(parts) else None
    if isinstance(node, ast.IfExp):
        return text_of(node.body, module)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return text_of(node.func.value, module) if node.func.attr == "format" else None
    if isinstance(node, ast.Name):
        made = [n for n in module.tree.body if isinstance(n, ast.Assign)]
        values = [n.value for n in made if ast.unparse(n.targets[0]) == node.id]
        return text_of(values[-1], module) if values else None
    return None


def raised(module: Module) -> Iterator[tuple[int, str]]:
    """The texts of a module's ValueErrors and TypeErrors, with their lines."""
    for node in (n for n in ast.walk(module.tree) if isinstance(n, ast.Raise)):
        call = node.exc
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("ValueError", "TypeError"):
            text = text_of(call.args[0], module) if call.args else None
            if text is not None and text != "{}":
                yield node.lineno, text


@rule
def test_errors_have_one_grammar() -> Found:
    """`{field} must be {what is allowed}, got {value!r}`, or a sentence that STATES explains."""
    for module in modules():
        for line, text in raised(module):
            known = GRAMMAR.search(text) or CAUSE.search(text) or text.startswith(tuple(STATES))
            if not known:
                yield module.at(line), f"line {line}: {text[:100]}"


@rule
def test_no_text_has_an_old_form_of_error() -> Found:
    """In any text: some errors are put together elsewhere."""
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                text = text_of(node, module) or ""
                if found := OLD_FORMS.search(text):
                    yield module.at(node.lineno), f"line {node.lineno}: …{found[0]}…"


# one word for one thing


SHOWN = ("refimg.view", "refimg.validate", "refimg.cli")  # every text is shown
SAID = {"warning", "info", "error", "debug", "exception", "warn", "echo", "secho"}


@cache
def sentences(module: Module) -> tuple[tuple[int, str, str], ...]:
    """What a module says: lines, kind and text of docstrings, comments, errors and log lines."""
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, (*DEFINITION, ast.Module)) and (text := ast.get_docstring(node)):
            found.append((node.body[0].lineno, "docstring", text))
        is_said = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in SAID
        if isinstance(node, ast.Raise) or is_said:
            inner = (n for n in ast.walk(node) if isinstance(n, ast.Constant))
            said = [n for n in inner if isinstance(n.value, str)]
            found += [(n.lineno, "text", n.value) for n in said]
    if module.name.startswith(SHOWN):
        told = [n.body[0].value for n in ast.walk(module.tree)
                if isinstance(n, (*DEFINITION, ast.Module)) and ast.get_docstring(n)]
        texts = (n for n in ast.walk(module.tree) if isinstance(n, ast.Constant) and n not in told)
        texts = (n for n in texts if isinstance(n.value, str) and re.search(r"\w \w", n.value))
        found += [(n.lineno, "text", n.value) for n in texts]
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        generated = token.string.startswith(("# %% ", "# AUTOGENERATED"))
        if token.type == tokenize.COMMENT and not generated:
            found.append((token.start[0], "comment", token.string))
    return tuple(found)


HIDDEN = re.compile(
    r"^(```|~~~).*?^\1|`[^`\n]*`|\]\([^)\s]*\)|<[^>\n]*>|https?://\S+", re.MULTILINE | re.DOTALL
)  # code, targets of links, HTML


@cache
def prose() -> tuple[tuple[str, str, str], ...]:
    """What people read beside the code: where, which part of it, and its text without code."""
    found = [(b.name, f"cell {c.number}", c.source) for b in books() for c in b.prose]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "nbs").rglob("*.md"))]
    seen = [p for p in pages if not any(x[0] in "._" for x in p.relative_to(ROOT).parts)]
    found += [(name_of(p), "page", p.read_text("utf-8")) for p in seen if p.exists()]
    return tuple((where, part, HIDDEN.sub(" ", text)) for where, part, text in found)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FREE: dict[str, dict[str, str]] = {  # word -> where it may stand -> why
    "verifier": {
        "nbs/02_score.ipynb": "a weight of 0: a scorer that is held out, and selects nothing",
        "nbs/04_validate.ipynb": "a scorer that is held out, and selects nothing",
        "nbs/validate/": "a scorer that is held out, and selects nothing",
        "refimg.validate": "a scorer that is held out, and selects nothing",
    },
    "judge": {
        "refimg.inspection": "the judge of DESIGN: a chat model that compares two images",
        "nbs/inspection/": "the judge of DESIGN: a chat model that compares two images",
        "refimg.sandbox.judge": "its stand-in", "nbs/sandbox/judge.ipynb": "its stand-in",
        "nbs/pages/model-card.md": "its stand-in, and what was measured of it",
        "nbs/pages/notebooks.md": "the names of both notebooks",
        "nbs/pages/does-looking-help.md": "what it is worth", "nbs/index.ipynb": "its stand-in",
        "README.md": "the same",
        "nbs/pages/real-and-sandbox.md": "its stand-in",
        "refimg.cli": "the option --judge", "refimg.defaults": "who the judge is",
        "refimg.engine.candidates": "what it said", "refimg.engine.results": "what it said",
        "refimg.engine.refining": "who asks it", "nbs/engine/refining.ipynb": "who asks it",
        "refimg.view.checks": "what that judge answered", "nbs/view/checks.ipynb": "the same",
    },
    "picture": {
        "refimg.sandbox.world": "a word of the sandbox's language",
        "nbs/sandbox/world.ipynb": "a word of the sandbox's language",
    },
    "round": {
        "refimg.inspection.repair": "repair rounds", "nbs/inspection/repair.ipynb": "repair rounds",
        "refimg.sandbox.figures": "a shape", "nbs/sandbox/figures.ipynb": "a shape",
        "refimg.sandbox.scenery": "a shape", "nbs/sandbox/scenery.ipynb": "a shape",
    },
    "pick": {},
}
WORDS = {
    "picture": r"pictures?|pictured",
    "verifier": r"verifiers?",
    "judge": r"judge[sd]?|judging",
    "round": (r"(?<!repair )(?<!all )(?<!way )(?<!turned )rounds?"
              r"(?! (?:to|trip|number|up|down|off|hole)\b)(?![-(])"),
    "pick": r"picks?(?!-a-Pic)|picked|picking",
}  # what is written in place of image, scorer, scorer, iteration and select


def said(word: str) -> Found:
    """Where a word stands in code and prose, but for where it may."""
    pattern = re.compile(rf"(?<![\w./_-])(?:{WORDS[word]})(?![\w_])(?!\.\w)", re.I)
    for module in modules():
        for line, kind, text in sentences(module):
            for found in pattern.finditer(re.sub(r"`[^`\n]*`", " ", text)):
                where = module.at(line)
                if not where.startswith(tuple(FREE[word])):
                    yield where, f"line {line}, {kind}: {around(found)}"
    for where, part, text in prose():
        for found in pattern.finditer(text):
            if not where.startswith(tuple(FREE[word])):
                yield where, f"{part}: {around(found)}"


def around(found: re.Match) -> str:
    """The word with a few words about it."""
    return " ".join(found.string[max(0, found.start() - 30) : found.end() + 20].split())


@rule
def test_an_image_is_no_picture() -> Found:
    yield from said("picture")


@rule
def test_a_scorer_is_a_verifier_only_where_it_is_held_out() -> Found:
    yield from said("verifier")


@rule
def test_a_scorer_is_no_judge() -> Found:
    yield from said("judge")


@rule
def test_an_iteration_is_no_round() -> Found:
    yield from said("round")


@rule
def test_images_are_selected_not_picked() -> Found:
    yield from said("pick")


# the checks themselves


def test_the_grammar_knows_good_errors_from_bad() -> None:
    good = ["num_variations must be a whole number from 1 to 20, got {}", "k must not be 0, got {}"]
    bad = ["k is {}; allowed: 1 to 20", "k={}: allowed are 1 to 20", "width {}: must be from 32"]
    assert all(GRAMMAR.search(text) and not OLD_FORMS.search(text) for text in good)
    assert not any(GRAMMAR.search(text) for text in bad) and all(map(OLD_FORMS.search, bad))
