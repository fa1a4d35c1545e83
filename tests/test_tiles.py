"""Views of images that are not square: tiles that cover them, their middle, and the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from refimg import defaults
from refimg.adapters.clip import Aesthetic, ClipConsistency, ClipScore, PickScore
from refimg.adapters.dino import DinoConsistency
from refimg.adapters.tiles import VIEWS, cut_frame, tiles
from refimg.adapters.towers import import_open_clip
from refimg.cli import app
from refimg.pipeline import Pipeline, Scene, Story
from refimg.sandbox import scorers as sandbox
from refimg.score import Batch, raw_scores

from .clips import picture, tiny_open_clip, tiny_transformers
from .fakes import FakeImages, critic, director
from .sampling import sampled
from .test_clip_scorers import Counting, authors_pickscore, head, open_clips_cosine  # noqa: F401
from .test_consistency import tiny_dino

PROMPT = "A red fox on a beach"
SANDBOX = [sandbox.SandboxPickScore, sandbox.SandboxClipScore, sandbox.SandboxAesthetic]
STORY = Story(scenes=[Scene(prompt="A fox")])


def pick(**options) -> PickScore:
    return PickScore(tiny_transformers(), device="cpu", **options)


def clip(**options) -> ClipScore:
    return ClipScore(tiny_open_clip(), device="cpu", **options)


def aesthetic(**options) -> Aesthetic:
    return Aesthetic(folder=tiny_open_clip(), device="cpu", **options)


def agree(**options) -> ClipConsistency:
    return ClipConsistency(tiny_open_clip(), device="cpu", **options)


def dino(**options) -> DinoConsistency:
    return DinoConsistency(tiny_dino(), device="cpu", **options)


@pytest.fixture(scope="module", autouse=True)
def kept():
    """The models stay in memory from one test to the next."""
    held = pick(), clip(), dino()
    for scorer in held:
        scorer.load()
    yield held


def values(scorer, images, references=()) -> list[float]:
    found = scorer.score(Batch(tuple(images), PROMPT, tuple(references)))
    return [raw.value for raw in found]


def with_red_ends(size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """An image, and the same with its outer fifths painted over."""
    plain, (width, height) = picture(0, size), size
    changed = plain.copy()
    if width > height:
        boxes = (0, 0, width // 5, height), (width - width // 5, 0, width, height)
    else:
        boxes = (0, 0, width, height // 5), (0, height - height // 5, width, height)
    for box in boxes:
        changed.paste("red", box)
    return plain, changed


# the squares


@settings(max_examples=60)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_tiles_are_the_fewest_squares_that_cover_the_image(width, height):
    marked = np.arange(width * height, dtype=np.int32).reshape(height, width)
    short, long = sorted((width, height))
    found = [np.asarray(tile) for tile in tiles(Image.fromarray(marked, "I"))]
    assert {tile.shape for tile in found} == {(short, short)}
    assert len(found) == min(8, -(-long // short))
    seen = set(np.concatenate([tile.ravel() for tile in found]).tolist())
    assert {0, width * height - 1} <= seen
    if long <= 8 * short:
        assert len(seen) == width * height


@pytest.mark.parametrize("size, count", [
    ((1024, 1024), 1), ((1344, 768), 2), ((1344, 756), 2), ((756, 1344), 2), ((1536, 656), 3),
    ((2048, 1024), 2), ((3072, 384), 8), ((16000, 10), 8), ((10, 16000), 8), ((16384, 1), 8)])
def test_how_many_tiles_a_shape_has(size, count):
    assert len(tiles(Image.new("1", size))) == count


def test_two_tiles_of_an_image_at_16_9_are_its_ends():
    image = picture(1, (320, 180))
    left, right = tiles(image)
    assert left.tobytes() == image.crop((0, 0, 180, 180)).tobytes()
    assert right.tobytes() == image.crop((140, 0, 320, 180)).tobytes()


@pytest.mark.parametrize("size", [(320, 181), (181, 320), (320, 180), (7, 4)])
def test_the_middle_is_a_square_for_models_that_cut_nothing(size):
    (middle,) = cut_frame(picture(1, size), "center", 96, cuts=False)
    assert middle.size == (min(size), min(size))


# values


@pytest.mark.parametrize("make", [pick, clip, aesthetic])
@pytest.mark.parametrize("size", sampled(
    [((320, 180),), ((180, 320),), ((420, 180),)], 3))
def test_the_outer_fifths_move_every_scorer_and_not_the_center(make, size, head):  # noqa: F811
    moved = {view: np.ptp(values(make(view=view), with_red_ends(size))) for view in VIEWS}
    assert moved["tiles"] > 1e-4 and moved["whole"] > 3e-5
    assert moved["center"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("make", [agree, dino])
def test_the_outer_fifths_move_consistency_and_not_its_center(make):
    shown = picture(7), picture(8)
    moved = {view: np.ptp(values(make(view=view), with_red_ends((320, 180)), shown))
             for view in VIEWS}
    assert moved["tiles"] > 1e-4 and moved["whole"] > 3e-5
    assert moved["center"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", SANDBOX)
def test_the_outer_fifths_move_the_sandbox_too(kind):
    moved = {view: np.ptp(values(kind(view=view), with_red_ends((320, 180)))) for view in VIEWS}
    assert moved["tiles"] > 1e-3 < moved["whole"]
    assert moved["center"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [(320, 180), (180, 320), (420, 180), (256, 256)])
def test_a_score_is_the_mean_of_the_reference_implementations_on_each_tile(size):
    image = picture(3, size)
    alone = Batch(tuple(tiles(image)), PROMPT)
    scale = pick().embedder().towers().scale
    assert values(pick(), [image])[0] / scale == pytest.approx(
        np.mean(authors_pickscore(alone)) / scale, abs=1e-6)
    assert values(clip(), [image])[0] == pytest.approx(np.mean(open_clips_cosine(alone)), abs=1e-5)


def test_the_aesthetic_score_is_the_mean_of_its_tiles_scores(head):  # noqa: F811
    image = picture(3, (420, 180))
    each = values(aesthetic(view="center"), tiles(image))
    assert np.ptp(each) > 1e-4
    assert values(aesthetic(), [image])[0] == pytest.approx(np.mean(each), abs=1e-5)


@pytest.mark.parametrize("make", [pick, clip, aesthetic, agree])
def test_a_square_has_the_same_value_by_tiles_and_by_center(make, head):  # noqa: F811
    squares, shown = [picture(1, (256, 256)), picture(2, (90, 90))], [picture(3, (128, 128))]
    assert values(make(), squares, shown) == values(make(view="center"), squares, shown)


@pytest.mark.parametrize("make", [pick, clip, agree])
def test_a_batch_of_many_shapes_is_one_by_one_in_order(make):
    sizes = [(320, 180), (180, 320), (256, 256), (640, 80), (31, 17), (1, 1)]
    images, shown = [picture(i, size) for i, size in enumerate(sizes)], [picture(9, (200, 300))]
    alone = [values(make(), [image], shown)[0] for image in images]
    assert values(make(), images, shown) == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 4) for value in alone}) == len(sizes)


@pytest.mark.parametrize("make", [agree, dino])
@pytest.mark.parametrize("view", VIEWS)
def test_an_image_agrees_with_itself_by_1(make, view):
    (found,) = values(make(view=view), [picture(3)], [picture(3).copy()])
    assert found == pytest.approx(1, abs=1e-5)


def test_the_whole_frame_is_open_clips_own_squash():
    import torch

    library = import_open_clip().transform
    theirs = library.image_transform_v2(
        library.PreprocessCfg(resize_mode="squash"), is_train=False)
    own = library.image_transform_v2(library.PreprocessCfg(), is_train=False)
    (squashed,) = cut_frame(picture(5, (320, 160)), "whole", 224)
    assert torch.equal(own(squashed), theirs(picture(5, (320, 160))))


# one pass


def test_all_tiles_of_all_scorers_are_one_pass(head, monkeypatch):  # noqa: F811
    counts, sizes = Counting(monkeypatch, "load_open_clip"), [(320, 180), (180, 320), (256, 256)]
    images = tuple(picture(i, size) for i, size in enumerate(sizes))
    given_to = Batch(images, PROMPT, (images[0],))
    rows = raw_scores(given_to, [clip(), aesthetic(), agree()])
    assert (counts.loads, counts.images, counts.texts) == (1, 1, 1)
    assert all(raw.value is not None for row in rows for raw in row.values())


# what records say


@pytest.mark.parametrize("make, name", [
    (pick, "pickscore-logistic-21.5"), (clip, "clip-band-0.15-0.35"),
    (aesthetic, "laion-v2-band-3-7.5"), (agree, "clip-image-band-0.5-1")])
def test_model_and_calibration_say_which_view_it_is(make, name):
    made = {view: make(view=view) for view in VIEWS}
    assert make().view == "tiles"
    assert {view: scorer.calibration for view, scorer in made.items()} == {
        "tiles": f"{name}-tiles", "center": name, "whole": f"{name}-whole"}
    assert len({scorer.model for scorer in made.values()}) == 3


def test_the_view_of_consistency_by_dino_is_the_whole_frame():
    assert dino().view == "whole" and dino().calibration == "dino-band-0-1"
    assert dino(view="tiles").calibration == "dino-band-0-1-tiles"


@pytest.mark.parametrize("kind", SANDBOX)
def test_the_sandbox_sees_whole_frames_unless_asked(kind):
    plain = kind()
    assert plain.view == "whole" and "whole" not in plain.calibration
    for view in ("tiles", "center"):
        assert kind(view=view).calibration == f"{plain.calibration}-{view}"
        assert kind(view=view).model == f"{plain.model}, {view}"


@pytest.mark.parametrize("folder", ["sandbox-clip", "sandbox-pickscore"])
def test_the_cards_have_a_scale_for_each_view(folder):
    path = Path(str(files("refimg.sandbox") / "weights" / folder / "refimg.json"))
    card = json.loads(path.read_text("utf-8"))
    for view in ("tiles", "center"):
        assert card[view].keys() <= card.keys() and len(card[view]) == 2
    kind = sandbox.SandboxClipScore if folder == "sandbox-clip" else sandbox.SandboxPickScore
    own = card["tiles"].get("middle", card["tiles"].get("high"))
    assert kind(view="tiles").to_100(own) == pytest.approx(100 if "high" in card else 50)


# how it is asked for


@pytest.mark.parametrize("make", [pick, clip, aesthetic, agree, dino, *SANDBOX])
@pytest.mark.parametrize("view", ["crop", "", "Tiles", None, 3])
def test_what_is_no_view_is_refused(make, view):
    with pytest.raises(ValueError, match="view must be one of tiles, center, whole, got"):
        make(view=view)


def test_the_default_scorers_of_both_worlds(monkeypatch):
    monkeypatch.delenv("REFIMG_VIEW", raising=False)
    painter = FakeImages(name="sandbox-painter")
    real = FakeImages()
    assert {s.view for s in defaults.scorers(real)} == {"tiles"}
    assert {s.view for s in defaults.scorers(painter)} == {"whole"}
    for model in (real, painter):
        assert {s.view for s in defaults.scorers(model, "center")} == {"center"}
    monkeypatch.setenv("REFIMG_VIEW", "center")
    for model in (real, painter):
        assert {s.view for s in defaults.scorers(model)} == {"center"}
        assert {s.view for s in defaults.scorers(model, "tiles")} == {"tiles"}


def pipeline(**options) -> Pipeline:
    return Pipeline(director=director(), critic=critic(90), **options)


async def test_a_bad_view_is_refused_before_anything_is_paid(tmp_path, monkeypatch):
    images = FakeImages()
    with pytest.raises(ValueError, match="view must be one of tiles, center, whole, got 'crop'"):
        await pipeline(image_model=images, view="crop").run(STORY, output_dir=tmp_path / "out")
    monkeypatch.setenv("REFIMG_VIEW", "crop")
    with pytest.raises(ValueError, match=r"REFIMG_VIEW must be one of tiles, .*, got 'crop'"):
        await pipeline(image_model=images).run(STORY, output_dir=tmp_path / "out")
    assert not images.requests and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scorers", [[], [sandbox.TruthScorer()], [PickScore()]])
async def test_a_view_beside_own_scorers_is_refused(scorers, tmp_path):
    made = pipeline(image_model=FakeImages(), scorers=scorers, view="tiles")
    with pytest.raises(ValueError, match="view must be None where scorers are given, got 'tiles'"):
        await made.run(STORY, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


async def test_a_run_is_scored_by_the_view_and_records_it(tmp_path):
    made = pipeline(view="tiles", num_variations=1, image_model=FakeImages(name="sandbox-fake"))
    result = await made.run(STORY, output_dir=tmp_path)
    said = result.scenes[0].variations[0].scores.calibrations
    assert said and all(name.endswith("-tiles") for name in said.values())
    again = await replace(made, seed=3).run(STORY, output_dir=tmp_path / "again")
    assert again.scenes[0].variations[0].scores.calibrations == said
    other = await replace(made, view="center").run(STORY, output_dir=tmp_path / "other")
    assert all(name.endswith("-center") for name in
               other.scenes[0].variations[0].scores.calibrations.values())


def command(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_commands_take_a_view(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    picture().save(tmp_path / "a.png")
    (tmp_path / "story.json").write_text(STORY.model_dump_json())
    score = "score", tmp_path / "a.png", "--prompt", "a fox", "--json"
    (row,) = json.loads(command(*score, "--view", "tiles").stdout)
    assert all(name.endswith("-tiles") for name in row["calibrations"].values())
    monkeypatch.setenv("REFIMG_VIEW", "center")
    (row,) = json.loads(command(*score).stdout)
    assert all(name.endswith("-center") for name in row["calibrations"].values())
    run = "run", tmp_path / "story.json", "-o", tmp_path / "out", "-n", 1, "-i", 0, "--json"
    made = json.loads(command(*run, "--view", "tiles").stdout)
    assert all(s["calibration"].endswith("-tiles") for s in made["settings"]["scorers"])


@pytest.mark.parametrize("asked", ["option", "variable"])
def test_a_bad_view_ends_a_command(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    picture().save(tmp_path / "a.png")
    (tmp_path / "story.json").write_text(STORY.model_dump_json())
    words = ("--view", "crop") if asked == "option" else ()
    if asked == "variable":
        monkeypatch.setenv("REFIMG_VIEW", "crop")
    for start in (("score", tmp_path / "a.png", "--prompt", "a fox"),
                  ("run", tmp_path / "story.json", "-o", tmp_path / "out")):
        ended = command(*start, *words)
        assert ended.exit_code == 1
        assert "must be one of tiles, center, whole, got 'crop'" in ended.output
    assert not (tmp_path / "out").exists()
