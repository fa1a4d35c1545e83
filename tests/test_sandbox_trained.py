"""The trained scorers: real loaders, right before wrong, and no number from weights that lack."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from refimg import Pipeline, Scene, Story
from refimg.adapters import towers as adapter
from refimg.adapters.towers import Embedder, load_open_clip, load_transformers, split_text
from refimg.sandbox import scorers as module
from refimg.sandbox.painter import PAINTER_VERSION, paint_picture
from refimg.sandbox.scorers import SandboxAesthetic, SandboxClipScore, SandboxPickScore
from refimg.sandbox.world import read_prompt
from refimg.score import Batch, raw_scores

WEIGHTS = Path(str(files("refimg.sandbox") / "weights"))
TEXT_SCORERS = [SandboxPickScore, SandboxClipScore]
ALL = [*TEXT_SCORERS, SandboxAesthetic]
SIZE = (192, 108)
BASE = {
    "setting": "coast", "time": "day", "weather": "clear", "subject": "lighthouse keeper",
    "colour": "yellow", "framing": "medium", "style": "watercolour", "count": "one",
    "companion": "tree", "relation": "left of",
}  # fmt: skip
TEXT = ("A lighthouse keeper in a yellow coat on a rocky coast by day, under a clear sky, "
        "with a tree to the left of him, medium shot, watercolour")
WRONG = {
    "setting": "city", "time": "night", "weather": "rain", "subject": "horse", "colour": "blue",
    "framing": "wide", "style": "noir", "count": "three", "companion": "lighthouse",
    "relation": "right of",
}  # fmt: skip
CLEAR = ["setting", "time", "weather", "subject", "style"]  # what both see well
SEEDS = range(4)


@cache
def painting(attribute: str | None, seed: int):
    """The base picture of that seed, or the one with a single attribute changed."""
    changed = {attribute: WRONG[attribute]} if attribute else {}
    return paint_picture(BASE | changed, seed, *SIZE)


@cache
def values(kind: type, attribute: str | None) -> tuple[float, ...]:
    """The raw scores of the base pictures, or of those with one attribute changed."""
    batch = Batch(tuple(painting(attribute, seed) for seed in SEEDS), TEXT)
    return tuple(found.value for found in kind().score(batch))


def copy_of(name: str, folder: Path) -> Path:
    """A copy of shipped weights that a test may break."""
    return Path(shutil.copytree(WEIGHTS / name, folder / name))


def folder_of(kind: type) -> str:
    """The folder in which a scorer's weights are shipped."""
    return "sandbox-pickscore" if kind is SandboxPickScore else "sandbox-clip"


def card_of(kind: type) -> str:
    """The card that a scorer reads."""
    return "aesthetic.json" if kind is SandboxAesthetic else "refimg.json"


def test_the_text_of_these_tests_states_less_than_the_count():
    assert read_prompt(TEXT) == {k: v for k, v in BASE.items() if k != "count"}


def share_right(kind: type, attributes) -> float:
    """The share of pairs, over attributes and seeds, in which the right picture scores higher."""
    pairs = [pair for a in attributes
             for pair in zip(values(kind, None), values(kind, a), strict=True)]
    return sum(right > wrong for right, wrong in pairs) / len(pairs)


@pytest.mark.all
@pytest.mark.parametrize("attribute", CLEAR)
@pytest.mark.parametrize("kind", TEXT_SCORERS)
def test_a_right_picture_beats_a_wrong_one(kind, attribute):
    assert share_right(kind, [attribute]) >= 0.75
    assert sum(values(kind, None)) > sum(values(kind, attribute))


@pytest.mark.all
@pytest.mark.parametrize("kind", TEXT_SCORERS)
def test_over_all_attributes_right_beats_wrong(kind):
    assert share_right(kind, [a for a in WRONG if a != "count"]) >= 0.7


@pytest.mark.parametrize("kind", ALL)
def test_names_models_and_calibrations_are_said(kind):
    scorer = kind()
    assert scorer.name in ("pickscore", "clip_score", "aesthetic")
    assert scorer.model.startswith("sandbox-")
    assert scorer.model.endswith(f"@painter-{PAINTER_VERSION}")
    assert scorer.calibration == json.loads(
        (WEIGHTS / folder_of(kind) / card_of(kind)).read_text("utf-8"))["calibration"]
    assert scorer.calibration.startswith(f"sandbox-{scorer.name.split('_')[0]}-")


@pytest.mark.parametrize("kind", ALL)
def test_the_map_to_100_rises_and_uses_its_range(kind):
    scorer = kind()
    found = values(kind, None) + values(kind, "subject")
    mapped = [scorer.to_100(v) for v in sorted(found)]
    assert mapped == sorted(mapped) and -50 < mapped[0] <= mapped[-1] < 150
    assert scorer.to_100(max(values(kind, None))) > 40


@pytest.mark.parametrize("kind", ALL)
def test_another_painter_version_is_refused_with_both_versions(kind, tmp_path):
    folder = copy_of(folder_of(kind), tmp_path)
    card = json.loads((folder / card_of(kind)).read_text("utf-8"))
    (folder / card_of(kind)).write_text(json.dumps(card | {"painter": 98}), "utf-8")
    with pytest.raises(ValueError, match=rf"version {PAINTER_VERSION}.*version 98"):
        kind(folder)


@pytest.mark.parametrize("broken", ["", "{", "[1]", "null", "7", None])
def test_a_card_that_is_missing_or_broken_is_refused(broken, tmp_path):
    folder = copy_of("sandbox-clip", tmp_path)
    if broken is None:
        (folder / "refimg.json").unlink()
    else:
        (folder / "refimg.json").write_text(broken, "utf-8")
    with pytest.raises(ValueError, match=r"refimg\.json"):
        SandboxClipScore(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(500))


def one_less(path: Path) -> None:
    """The file with its last tensor left out."""
    from safetensors.torch import load_file, save_file

    kept = dict(sorted(load_file(path).items())[:-1])
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("harm", [Path.unlink, cut, zeros, one_less])
@pytest.mark.parametrize("kind, file", [
    (SandboxClipScore, "open_clip_model.safetensors"), (SandboxPickScore, "model.safetensors")])
def test_weights_that_lack_something_give_no_scores(kind, file, harm, tmp_path):
    folder = copy_of(folder_of(kind), tmp_path)
    harm(folder / file)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        kind(folder).load()
    found = raw_scores(Batch((painting(None, 0),), TEXT), [kind(folder)])[0][kind.name]
    assert found.value is None and file in found.note


@pytest.mark.parametrize("kind", TEXT_SCORERS)
def test_a_long_text_is_scored_in_windows_and_says_so(kind):
    scorer, images = kind(), (painting(None, 0), painting("subject", 0))
    plain = scorer.score(Batch(images, TEXT))
    long = scorer.score(Batch(images, " ".join([TEXT + "."] * 5)))
    assert [found.note for found in plain] == ["", ""]
    assert all("windows" in found.note for found in long)
    same = scorer.score(Batch(images, TEXT + "."))
    for one, other in zip(same, long, strict=True):
        assert one.value == pytest.approx(other.value, rel=0.1, abs=0.02)


def test_the_end_of_a_long_text_counts():
    filler = "The wind has risen and much is still to be done before the evening comes. " * 6
    other = TEXT.replace("A lighthouse keeper in a yellow coat", "A blue horse")
    image, scorer = painting(None, 0), SandboxClipScore()
    right, wrong = (scorer.score(Batch((image,), filler + end))[0] for end in (TEXT, other))
    assert right.value > wrong.value and "windows" in right.note


@pytest.mark.parametrize("load, name", [
    (load_open_clip, "sandbox-clip"), (load_transformers, "sandbox-pickscore")])
def test_a_text_that_fits_is_scored_as_one(load, name):
    import torch

    embedder = Embedder(WEIGHTS / name, load)
    towers = embedder.towers()
    vector, count = embedder.text(TEXT)
    assert count == 1 and torch.equal(vector, towers.texts([TEXT])[0])
    assert towers.count("") == 0 and towers.count("snow") == 1


def test_both_libraries_read_the_same_tokens():
    ours, theirs = (load(WEIGHTS / name) for load, name in (
        (load_open_clip, "sandbox-clip"), (load_transformers, "sandbox-pickscore")))
    for text in (TEXT, "Été, 2 foxes; snow-white!", "", "a  b\nc"):
        assert ours.count(text) == theirs.count(text)


def test_windows_lose_no_word():
    def count(text: str) -> int:
        return sum(-(-len(word) // 4) for word in text.split())

    for text in (TEXT, TEXT * 3, "x" * 400, "a. b! c? d; e\nf " * 30, "", " ", "one " * 99):
        found = split_text(text, 12, count)
        assert all(count(part) <= 12 for part in found)
        assert "".join("".join(found).split()) == "".join(text.split())


class Counted:
    """A load function whose towers count their passes."""

    def __init__(self, load):
        self.load, self.loads, self.images, self.texts = load, 0, 0, 0
        self.__name__ = load.__name__

    def __call__(self, folder):
        self.loads += 1
        towers = self.load(folder)

        def images(pictures):
            self.images += 1
            return towers.images(pictures)

        def texts(prompts):
            self.texts += 1
            return towers.texts(prompts)

        return adapter.Towers(images, texts, towers.count, towers.limit, towers.scale)


@pytest.fixture
def counted(monkeypatch):
    """The loader of clip_score and aesthetic, with a count of what is done."""
    made = Counted(load_open_clip)
    monkeypatch.setattr(module._Trained, "_load", made)
    return made


def test_two_scorers_share_one_pass_and_one_model(counted):
    scorers = [SandboxClipScore(), SandboxAesthetic()]
    for _ in range(2):
        raw_scores(Batch((painting(None, 0), painting(None, 1)), TEXT), scorers)
    assert (counted.loads, counted.images, counted.texts) == (1, 2, 1)


def test_nothing_is_loaded_before_it_is_needed_and_texts_are_embedded_once(counted):
    scorer = SandboxClipScore()
    assert counted.loads == 0
    scorer.embed_text(TEXT)
    scorer.embed_text(TEXT)
    assert (counted.loads, counted.texts, counted.images) == (1, 1, 0)
    scorer.score(Batch((painting(None, 0),), TEXT))
    assert (counted.texts, counted.images) == (1, 1)


def test_old_texts_are_forgotten(counted):
    embedder = Embedder(WEIGHTS / "sandbox-clip", counted, remember=2)
    for text in ("a fox", "a cat", "a dog", "a fox", "a dog"):
        embedder.text(text)
    assert counted.texts == 4


def test_threads_load_once_and_agree(counted):
    scorer = SandboxClipScore()
    batch = Batch((painting(None, 0), painting("time", 0)), TEXT)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scorer.score(Batch(batch.images, TEXT)), range(8)))
    assert counted.loads == 1 and all(one == found[0] for one in found)


@pytest.mark.parametrize("kind", ALL)
def test_scores_do_not_change(kind):
    batch = Batch((painting(None, 2), painting("weather", 2)), TEXT)
    first = kind().score(batch)
    assert kind().score(Batch(batch.images, TEXT)) == first
    alone = kind().score(Batch(batch.images[:1], TEXT))[0].value
    assert alone == pytest.approx(first[0].value, abs=1e-3)


def test_defects_are_seen_and_text_is_not():
    from PIL import ImageEnhance, ImageFilter

    clean = painting(None, 3)
    spoilt = (clean.filter(ImageFilter.GaussianBlur(9)), ImageEnhance.Contrast(clean).enhance(0.3))
    scorer = SandboxAesthetic()
    found = scorer.score(Batch((clean, *spoilt), TEXT))
    assert all(found[0].value > worse.value for worse in found[1:])
    assert all("not taste" in item.note for item in found)
    assert scorer.score(Batch((clean, *spoilt), "a red car in the snow")) == found


def test_the_weights_are_small_and_safe():
    shipped = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in shipped) <= 8_000_000
    assert not {p.suffix for p in shipped} - {".safetensors", ".json", ".txt", ".gz", ".md"}


MEND = """
import sys
from refimg.adapters.towers import import_open_clip, _declared
from refimg.sandbox.scorers import SandboxPickScore
scorer = SandboxPickScore()
assert not {"torch", "open_clip", "transformers"} & set(sys.modules)
scorer.load()
module = import_open_clip()
assert module is import_open_clip() is sys.modules["open_clip"] and len(_declared) <= 1
import torchvision.transforms
print("declared" if _declared else "whole")
"""

BREAK = """
import sys, importlib
from refimg.adapters import towers
calls = []
def fail(name):
    calls.append(name)
    raise RuntimeError("something else is broken")
towers.importlib.import_module = fail
try:
    towers.import_open_clip()
except RuntimeError as error:
    print(error, calls, len(towers._declared))
"""


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    root = Path(__file__).resolve().parent.parent
    made = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.mark.all
def test_both_libraries_are_imported_whatever_torchvision_lacks():
    assert run(MEND) in ("declared", "whole")


def test_other_errors_of_the_import_are_not_mended():
    assert run(BREAK) == "something else is broken ['open_clip'] 0"


ROOT_HANDLERS = """
import logging
from refimg.sandbox.scorers import SandboxClipScore
SandboxClipScore().load()
print(logging.getLogger().handlers)
"""


@pytest.mark.all
def test_loading_leaves_the_root_logger_as_it_is():
    made = subprocess.run([sys.executable, "-c", ROOT_HANDLERS], capture_output=True, text=True,
                          check=True, timeout=120)
    assert made.stdout.strip() == "[]"


async def test_a_pipeline_without_models_finds_them_once(caplog):
    pipeline = Pipeline()
    with caplog.at_level(logging.WARNING, "refimg.defaults"):
        await pipeline.load()
        found = (pipeline.director, pipeline.image_model, pipeline.scorers)
        await pipeline.enhance(Story(scenes=[Scene(prompt="A fox in snow")]))
    assert None not in found
    assert found == (pipeline.director, pipeline.image_model, pipeline.scorers)
    assert len(caplog.records) == 1
