"""What is seen to be wrong with an image, and what follows from it in a run."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from refimg.engine.decisions import rescore, veto
from refimg.engine.defects import find_bars, find_defects, find_panels, likeness
from refimg.engine.results import StoryResult
from refimg.engine.story import Scene, Story
from refimg.generate import ImageRequest
from refimg.pipeline import Pipeline
from refimg.sandbox.painter import answer, paint_picture
from refimg.storage.images import read_image
from refimg.view import contact_sheet, report, score_table, variation_grid

from .fakes import FakeImages, FakeScorer
from .sampling import sampled

LOOK = {"setting": "harbour", "time": "day", "weather": "clear", "subject": "boat",
        "colour": "red", "framing": "medium", "style": "oil", "count": "one"}


@cache
def _painted(seed: int, **over: str) -> Image.Image:
    return paint_picture(LOOK | over, seed, 448, 252)


def painted(seed: int, **over: str) -> Image.Image:
    return _painted(seed, **over).copy()


def boxed(image: Image.Image, level: bool = True, colour: str = "black") -> Image.Image:
    inner = ImageOps.fit(image, (448, 192) if level else (348, 252))
    return ImageOps.expand(inner, (0, 30) if level else (50, 0), colour)


def panels(columns: int, rows: int) -> Image.Image:
    page, size = Image.new("RGB", (448, 252)), (448 // columns, 252 // rows)
    places = ("harbour", "city", "lake", "forest", "desert", "beach")
    for k in range(columns * rows):
        image = ImageOps.fit(painted(k, setting=places[k]), size)
        page.paste(image, (k % columns * size[0], k // columns * size[1]))
    return page


def png(image: Image.Image) -> bytes:
    page = BytesIO()
    image.save(page, "PNG")
    return page.getvalue()


# pixels


def test_sound_images_have_no_defects():
    first = painted(1)
    assert find_defects(first) == [] and find_bars(first) == find_panels(first) == ""
    assert find_defects(painted(2), [first], "A red boat") == []
    assert find_defects(painted(3, framing="wide"), [first]) == []
    lamp = ImageOps.expand(painted(1, framing="close-up").resize((90, 160)), (180, 46), "white")
    assert find_defects(Image.new("RGB", (64, 36), (200, 80, 120)), [first, lamp]) == []


@pytest.mark.parametrize("level, colour, words", [
    (True, "black", "black bars at top and bottom"), (False, "white", "white bars left and right"),
    (True, "#345", "bars at top and bottom")])
def test_bars(level: bool, colour: str, words: str):
    image = boxed(painted(1), level, colour)
    (said,) = find_defects(image)
    assert said.startswith(words)
    for prompt in ("A boat, letterboxed", "a boat with a black border", "black bars, please",
                   "a wooden frame around it"):
        assert find_defects(image, prompt=prompt) == []
    for prompt in ("no borders", "A boat without letterbox", "framing of a boat in the frame"):
        assert find_defects(image, prompt=prompt) == [said]


@pytest.mark.parametrize("columns, rows", sampled([(2, 1), (3, 1), (3, 2), (2, 2)], 2))
def test_panels(columns: int, rows: int):
    image = panels(columns, rows)
    assert find_defects(image) == [f"panels: {columns} × {rows} images in one"]
    for prompt in ("A comic of a boat", "a split-screen", "triptych", "contact sheet of boats"):
        assert find_defects(image, prompt=prompt) == []
    assert find_defects(image, prompt="no panels")


def test_a_copy_of_any_reference_in_spite_of_a_cut_and_a_jpeg():
    first, other = painted(1), painted(2, setting="city")
    page = BytesIO()
    first.crop((14, 8, 440, 246)).resize(first.size).save(page, "JPEG", quality=70)
    copy = Image.open(page).convert("RGB")
    (said,) = find_defects(copy, [other, first])
    assert said.startswith("near copy of reference 2: likeness 0.")
    assert likeness(first, first) > 0.95 > 0.5 > likeness(other, first)


def test_what_follows_a_reference_is_no_copy(tmp_path: Path):
    for seed in range(3):
        first = tmp_path / f"{seed}.png"
        text = "A red boat in a harbour, oil painting"
        first.write_bytes(answer(ImageRequest(prompt=text, seed=seed, aspect_ratio="16:9"),
                                 width=320).data)
        again = answer(ImageRequest(prompt=text, seed=seed + 50, aspect_ratio="16:9",
                                    references=(first,)), width=320).data
        (tmp_path / "again.png").write_bytes(again)
        assert find_defects(read_image(tmp_path / "again.png"), [read_image(first)], text) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2), (9, 7), (23, 24), (40, 30)])
def test_any_size_can_be_looked_at(size: tuple[int, int]):
    image = painted(1).resize(size)
    assert find_defects(Image.new("RGB", size, "black"), [image])[0].startswith("nearly black")
    assert all(isinstance(text, str) for text in find_defects(image, [painted(2)]))


# a run


def run(images: list[Image.Image], folder: Path, scenes: int = 1) -> StoryResult:
    """A run whose images come one after another, each redder one with the higher score."""
    data = [png(image) for image in images]
    model = FakeImages(lambda request, number: data[(number - 1) % len(data)])
    scorer = FakeScorer(value=lambda image, prompt: float(image.getpixel((224, 126))[0]))
    pipeline = Pipeline(
        image_model=model, scorers=[scorer],
        num_variations=len(images) // scenes, max_enhancement_iterations=0, seed=1)
    story = Story(scenes=[Scene(prompt=f"A boat, number {n}") for n in range(scenes)])
    return asyncio.run(pipeline.run(story, output_dir=folder / "images"))


@pytest.fixture
def made(tmp_path: Path) -> StoryResult:
    """One scene: dull and sound, bright with bars, brighter and sound."""
    tones = [painted(seed) for seed in (1, 2, 3)]
    for image, red in zip(tones, (90, 250, 120), strict=True):
        image.paste((red, 60, 60), (214, 116, 234, 136))
    tones[1] = boxed(tones[1])
    tones[1].paste((250, 60, 60), (214, 116, 234, 136))
    return run(tones, tmp_path)


def test_a_defective_image_ranks_after_all_others_and_is_a_warning(made: StoryResult):
    (scene,) = made.scenes
    assert [v.rank for v in scene.variations] == [2, 3, 1]
    assert [v.selected for v in scene.variations] == [False, False, True]
    assert max(scene.variations, key=lambda v: v.scores.overall or 0) is scene.variations[1]
    (defect,) = scene.variations[1].defects
    assert f"variation 2: {defect}" in scene.warnings


def test_where_all_are_defective_the_best_is_selected(tmp_path: Path):
    images = [boxed(painted(seed)) for seed in (1, 2)]
    (scene,) = run(images, tmp_path).scenes
    best = max(scene.variations, key=lambda v: v.scores.overall or 0)
    assert best.selected and best.rank == 1 and best.defects and scene.reference_from == "ranked"


def test_an_image_that_repeats_its_reference_is_not_selected(tmp_path: Path):
    first = painted(1)
    first.paste((255, 60, 60), (214, 116, 234, 136))
    images = [first, painted(2, setting="lake"), first, painted(3, setting="city")]
    result = run(images, tmp_path, scenes=2)
    told = [v.defects for v in result.scenes[1].variations]
    assert told[0][0].startswith("near copy of reference 1") and told[1] == []
    assert result.scenes[1].variations[1].selected


def test_other_scores_and_vetoes_do_not_select_a_defective_image(made: StoryResult):
    again = asyncio.run(rescore(made, weights={"pickscore": 2.0}))
    assert [v.rank for v in again.scenes[0].variations] == [2, 3, 1]
    unscored = [v.model_copy(update={"rank": None}) if not v.defects else v
                for v in made.scenes[0].variations]
    scene = made.scenes[0].model_copy(update={"variations": unscored})
    left = veto(made.model_copy(update={"scenes": [scene]}), 1, 3, "no")
    assert left.scenes[0].variations[0].selected


def test_defects_are_saved_and_a_record_without_them_loads(made: StoryResult, tmp_path: Path):
    path = tmp_path / "run.json"
    made.save(path)
    assert StoryResult.load(path).scenes == made.scenes
    record = json.loads(path.read_text())
    for variation in record["scenes"][0]["variations"]:
        del variation["defects"]
    del record["sha256"]
    path.write_text(json.dumps(record))
    assert [v.defects for v in StoryResult.load(path).scenes[0].variations] == [[], [], []]


def test_defects_are_shown_and_escaped(made: StoryResult, tmp_path: Path):
    hostile = "<b>bars</b>: & more"
    scene = made.scenes[0]
    shown = [v.model_copy(update={"defects": [hostile]}) if v.defects else v
             for v in scene.variations]
    scene = scene.model_copy(update={"variations": shown, "warnings": []})
    result = made.model_copy(update={"scenes": [scene]})
    texts = [str(variation_grid(scene)), str(score_table(scene)),
             report(result, tmp_path / "r.html").read_text()]
    for text in texts:
        assert "⚠" in text and "&lt;b&gt;bars" in text and "<b>bars" not in text
    bare = scene.model_copy(update={
        "variations": [v.model_copy(update={"defects": []}) for v in shown]})
    assert contact_sheet(scene).tobytes() != contact_sheet(bare).tobytes()
