"""Consistency: whole frames compared with references that pass through the model once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refimg.adapters.clip import ClipConsistency, ClipScore
from refimg.adapters.dino import DinoConsistency, grid, load_dino
from refimg.adapters.towers import import_open_clip, import_transformers
from refimg.adapters.weights import DINOV2_BASE
from refimg.score import Batch, grade, raw_scores, score_images

from .clips import new_folder, picture, seeded, tiny_open_clip

PROMPT = "A red fox on a beach"
SIZES = [(320, 180), (180, 320), (256, 256), (320, 180), (37, 411)]
PUBLISHED = {  # preprocessor_config.json of facebook/dinov2-base
    "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224}}


@cache
def tiny_dino(seed: int = 1) -> Path:
    """A Dinov2Model with random weights, in a folder."""
    library, folder = import_transformers(), new_folder()
    config = library.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    seeded(library.Dinov2Model(config), seed).save_pretrained(folder)
    return folder


def dino(**options) -> DinoConsistency:
    return DinoConsistency(tiny_dino(), device="cpu", **options)


def clip(**options) -> ClipConsistency:
    return ClipConsistency(tiny_open_clip(), device="cpu", **options)


@pytest.fixture(scope="module", autouse=True)
def kept():
    """Both models stay in memory from one test to the next."""
    held = dino(), clip()
    for scorer in held:
        scorer.load()
    yield held


def batch(*seeds: int, references: tuple[int, ...] = (7, 8), size=(320, 180)) -> Batch:
    images, shown = ([picture(seed, size).copy() for seed in some] for some in (seeds, references))
    return Batch(tuple(images), PROMPT, tuple(shown))


def values(scorer, given: Batch) -> list[float]:
    return [found.value for found in scorer.score(given)]


@pytest.fixture
def passes(monkeypatch):
    """How many images each forward pass of a DINO or a CLIP image tower had."""
    library, counts = import_transformers(), []

    def counted(owner, name, given):
        real = getattr(owner, name)

        def call(self, *args, **options):
            counts.append(len(given(args, options)))
            return real(self, *args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(library.Dinov2Model, "forward", lambda args, options: options["pixel_values"])
    counted(import_open_clip().CLIP, "encode_image", lambda args, options: args[0])
    return counts


# the number


def by_hand(image, columns: int, rows: int):
    """One vector, from plain Pillow, numpy and the model's last hidden state."""
    import torch

    model = import_transformers().Dinov2Model.from_pretrained(tiny_dino()).eval()
    small = image.resize((14 * columns, 14 * rows), Image.Resampling.BICUBIC)
    pixels = (np.asarray(small) / 255 - PUBLISHED["image_mean"]) / PUBLISHED["image_std"]
    with torch.no_grad():
        tensor = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
        token = model(tensor).last_hidden_state[0, 0].double()
    return token / token.norm()


def test_it_is_the_mean_cosine_of_the_cls_tokens():
    given = batch(1, 2, 3)
    refs = [by_hand(image, 21, 12) for image in given.references]
    wanted = [np.mean([float(by_hand(image, 21, 12) @ ref) for ref in refs])
              for image in given.images]
    found = values(dino(), given)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert np.ptp(found) > 1e-3, "all alike: nothing was compared"


def test_a_square_has_the_pixels_of_the_published_processor_without_its_crop(monkeypatch):
    import torch

    library, seen = import_transformers(), []
    theirs = library.BitImageProcessorPil(**PUBLISHED | {
        "do_center_crop": False, "size": {"height": 224, "width": 224}})
    real = library.Dinov2Model.forward

    def forward(self, pixel_values):
        seen.append(pixel_values)
        return real(self, pixel_values)

    monkeypatch.setattr(library.Dinov2Model, "forward", forward)
    images = [picture(1, (256, 256)), picture(2, (900, 900))]
    load_dino(tiny_dino()).images(images)
    assert torch.equal(seen[0], theirs(images=images, return_tensors="pt")["pixel_values"])


def test_the_vector_is_transformers_own_pooled_output():
    import torch

    library = import_transformers()
    process = library.BitImageProcessorPil(**PUBLISHED)
    model = library.Dinov2Model.from_pretrained(tiny_dino()).eval()
    image = picture(4, (256, 256)).crop((16, 16, 240, 240))  # what their processor leaves of it
    with torch.no_grad():
        theirs = model(**process(images=picture(4, (256, 256)), return_tensors="pt"))
    wanted = torch.nn.functional.normalize(theirs.pooler_output, dim=-1)
    assert torch.allclose(load_dino(tiny_dino()).images([image]), wanted, atol=1e-6)


@pytest.mark.parametrize("make", [dino, clip])
def test_a_batch_of_odd_shapes_is_one_by_one_in_order(make):
    images = tuple(picture(i, size) for i, size in enumerate(SIZES))
    shown = (picture(8, (200, 300)), picture(9, (300, 200)))
    together = values(make(), Batch(images, PROMPT, shown))
    alone = [values(make(), Batch((image,), PROMPT, shown))[0] for image in images]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 5) for value in together}) == len(SIZES)


@pytest.mark.parametrize("make", [dino, clip])
def test_the_image_itself_is_100_and_the_text_plays_no_part(make):
    scorer, image = make(), picture(3)
    (found,) = values(scorer, Batch((image,), PROMPT, (image.copy(),)))
    assert found == pytest.approx(1, abs=1e-5)
    assert scorer.to_100(found) == pytest.approx(100, abs=0.01)
    scorer.embed_text("a text that nobody reads")
    given = batch(1)
    other = Batch(given.images, "A grey cat at sea", given.references)
    assert values(make(), given) == values(make(), other)


def test_half_precision_changes_little_and_the_sum_is_made_in_32_bits():
    exact, half = values(dino(), batch(1, 2)), values(dino(dtype="bfloat16"), batch(1, 2))
    assert half == pytest.approx(exact, abs=0.05)
    vectors = load_dino(tiny_dino(), dtype="bfloat16").images([picture(1)])
    assert str(vectors.dtype) == "torch.float32"
    assert float(vectors.norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scorer, raw, mapped", [
    (DinoConsistency, -0.2, 0), (DinoConsistency, 0.42, 42), (DinoConsistency, 1.0, 100),
    (ClipConsistency, 0.4, 0), (ClipConsistency, 0.65, 30), (ClipConsistency, 1.0, 100)])
def test_the_maps(scorer, raw, mapped):
    assert scorer().to_100(raw) == pytest.approx(mapped)
    assert scorer().calibration == {
        DinoConsistency: "dino-band-0-1", ClipConsistency: "clip-image-band-0.5-1-tiles"}[scorer]


# the whole frame


@pytest.mark.parametrize("size", [(320, 180), (180, 320)])
def test_the_outer_fifths_count(size):
    plain, changed = picture(0, size), picture(0, size).copy()
    wide, long = size[0] > size[1], max(size)
    for start in (0, long - long // 5):
        box = (start, 0, start + long // 5, size[1])
        changed.paste("red", box if wide else (box[1], box[0], size[0], box[2]))
    both = Batch((plain, changed), PROMPT, (picture(7), picture(8)))
    whole, cut = values(dino(), both), values(clip(view="center"), both)
    assert abs(whole[0] - whole[1]) > 1e-3
    assert cut[0] == pytest.approx(cut[1], abs=1e-6), "CLIP's own crop saw the sides"
    assert "whole frame" in dino().model and "whole" not in clip().model
    seen = values(clip(view="whole"), both)
    assert abs(seen[0] - seen[1]) > 1e-4


@pytest.mark.parametrize("width, height", [
    (1024, 1024), (1344, 768), (768, 1344), (1152, 896), (1536, 640), (1216, 832), (2048, 1024)])
def test_a_grid_keeps_the_proportions_and_costs_no_more_than_the_square(width, height):
    columns, rows = grid(width, height)
    assert 230 <= columns * rows <= 256
    assert columns / rows == pytest.approx(width / height, rel=0.06)


@pytest.mark.parametrize("size", [(16000, 10), (10, 16000), (16384, 1), (1, 1), (9, 1)])
def test_a_strip_costs_no_memory(size):
    columns, rows = grid(*size)
    assert columns >= 1 <= rows and columns * rows <= 256
    (found,) = values(dino(), Batch((picture(2, size),), PROMPT, (picture(3),)))
    assert np.isfinite(found)


# references


@pytest.mark.parametrize("make, tiles", [(dino, 1), (clip, 2)])
def test_references_pass_once_through_the_model_in_a_whole_run(make, tiles, passes):
    scorer = make()
    first = values(scorer, batch(1, 2, references=(7, 8, 7)))
    assert passes == [2 * tiles] * 2
    for seed in range(10, 16):
        scorer.score(batch(seed, references=(8, 7)))  # decoded anew: other objects, same pixels
    assert passes == [2 * tiles] * 2 + [tiles] * 6
    assert values(scorer, batch(1, 2, references=(7, 8, 7))) == pytest.approx(first, abs=1e-6)


def test_a_reference_that_was_scored_before_passes_no_more(passes):
    scorer = dino()
    scorer.score(batch(1, 2))
    del passes[:]
    scorer.score(batch(3, 4, references=(2,)))
    assert passes == [2]


def test_pixels_that_differ_by_one_are_another_reference(passes):
    scorer, given = dino(), batch(1, references=(7,))
    before = values(scorer, given)
    other = given.references[0].copy()
    other.putpixel((0, 0), (1, 2, 3))
    same_bytes = Image.frombytes("RGB", other.size[::-1], other.tobytes())
    del passes[:]
    after = values(scorer, Batch(given.images, PROMPT, (other,)))
    last = values(scorer, Batch(given.images, PROMPT, (same_bytes,)))
    assert passes == [1] * 4 and len({*before, *after, *last}) == 3


def test_the_memory_is_bounded_and_holds_what_is_used(passes, monkeypatch):
    monkeypatch.setattr(DinoConsistency, "remember", 4)
    scorer = dino()
    for seed in range(10, 20):
        scorer.score(batch(seed, references=(7,)))
        assert len(scorer._known) <= 4
    assert passes == [1] * 11, "the reference was embedded more than once"
    many = values(scorer, batch(1, references=tuple(range(20, 28))))
    assert len(scorer._known) == 4
    each = [values(dino(), batch(1, references=(seed,)))[0] for seed in range(20, 28)]
    assert many == pytest.approx([np.mean(each)], abs=1e-6)


def test_a_scorer_that_was_unloaded_begins_anew(passes):
    scorer = dino()
    before = values(scorer, batch(1))
    scorer.unload()
    del passes[:]
    assert values(scorer, batch(1)) == before and passes == [1, 2]


@pytest.mark.parametrize("scorers", [
    lambda: (clip(), ClipScore(tiny_open_clip(), device="cpu")),
    lambda: (ClipScore(tiny_open_clip(), device="cpu"), clip())])
def test_clips_consistency_reads_the_vectors_of_clip_score(scorers, passes):
    pair = scorers()
    assert pair[0].embedder() is pair[1].embedder()
    rows = raw_scores(batch(1, 2, 3), pair)
    assert sorted(passes) == [4, 6], "the tiles of three images and two references, each once"
    assert all(row[name].value is not None for row in rows for name in row)


# what cannot be answered


@pytest.mark.parametrize("make", [dino, clip, DinoConsistency, ClipConsistency])
def test_without_references_it_does_not_apply(make, passes):
    found = make().score(batch(1, 2, references=()))
    assert [(one.value, one.applicable) for one in found] == [(None, False)] * 2
    assert "no reference" in found[0].note and passes == []


def test_what_does_not_apply_leaves_the_overall_alone():
    pair = [ClipScore(tiny_open_clip(), device="cpu"), dino()]
    given = batch(1, 2, references=())
    for scores in grade(raw_scores(given, pair), pair):
        assert scores.overall == pytest.approx(scores.clip_score)
        assert scores.consistency is None and "consistency" not in scores.models


async def test_from_files_with_references(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    found = await score_images(paths[:2], PROMPT, scorers=[dino()], references=paths[2:])
    wanted = values(dino(), batch(0, 1, references=(2, 3)))
    assert [one.raw["consistency"] for one in found] == pytest.approx(wanted, abs=1e-6)
    assert found[0].models["consistency"].endswith(", whole frame")


def test_without_its_files_a_scorer_says_so_and_stays_applicable(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for scorer in (DinoConsistency(), ClipConsistency()):
        found = scorer.score(batch(1, 2))
        assert [(one.value, one.applicable) for one in found] == [(None, True)] * 2
        assert {one.note for one in found} == {scorer.missing()}
        assert scorer.missing().startswith("no weights for consistency: ")
        with pytest.raises(ValueError, match="no weights for consistency"):
            scorer.load()
        with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
            scorer.fetch()
    for part in ("facebook/dinov2-base@f9e44c814b77", "346 MB", "fetch()"):
        assert part in DinoConsistency().missing()
    assert not list(tmp_path.iterdir())


def test_files_in_the_cache_are_found_without_torch(tmp_path):
    commit = DINOV2_BASE.revision
    place = tmp_path / "models--facebook--dinov2-base" / "snapshots" / commit
    code = ("import sys\nfrom refimg.adapters.dino import DinoConsistency\n"
            "scorer = DinoConsistency()\nprint(scorer.missing() is None, scorer.model)\n"
            "print({'torch', 'open_clip', 'transformers'} & set(sys.modules))")

    def answer() -> str:
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env={"HF_HUB_CACHE": str(tmp_path), "PATH": ""},
                              cwd=Path(__file__).parent.parent)
        return made.stdout

    named = f"facebook/dinov2-base@{commit}, whole frame\nset()\n"
    assert answer() == f"False {named}"
    shutil.copytree(tiny_dino(), place)
    assert answer() == f"True {named}"


def test_a_folder_that_lacks_a_file_or_a_weight_says_which(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_dino(), tmp_path / "mine"))
    (folder / "config.json").rename(folder / "aside")
    assert "must hold model.safetensors, config.json" in DinoConsistency(folder).missing()
    (folder / "aside").rename(folder / "config.json")
    assert DinoConsistency(folder).missing() is None
    assert DinoConsistency(folder).model.startswith("mine@sha256:")
    state = load_file(folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, the first is layernorm\.weight"):
        load_dino(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_dino(folder)


def test_a_text_is_refused():
    with pytest.raises(ValueError, match="DINOv2 reads images alone, got 1"):
        load_dino(tiny_dino()).texts([PROMPT])


@pytest.mark.parametrize("make", [DinoConsistency, ClipConsistency])
def test_a_wrong_placement_is_refused_when_the_scorer_is_made(make):
    with pytest.raises(ValueError, match="device must be"):
        make(device="tpu")
    with pytest.raises(ValueError, match="dtype must be"):
        make(dtype="int8")
