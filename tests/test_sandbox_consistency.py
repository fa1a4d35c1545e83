"""The sandbox's consistency: the head sees the look, not the scene, and the painter's truth."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from refimg import defaults
from refimg.adapters.towers import Embedder
from refimg.sandbox.painter import PAINTER_VERSION, paint_picture
from refimg.sandbox.scorers import SandboxClipScore, SandboxConsistency
from refimg.score import Batch, grade, normalized_weights, raw_scores

CARD = Path(str(files("refimg.sandbox") / "weights" / "sandbox-clip" / "consistency.json"))
SIZE = (192, 108)
KEEPER = {"subject": "lighthouse keeper", "colour": "yellow", "style": "watercolour",
          "count": "one"}
FOX = {"subject": "fox", "colour": "blue", "style": "noir", "count": "one"}
COAST = {"setting": "coast", "time": "day", "weather": "clear", "framing": "medium"}
CITY = {"setting": "city", "time": "night", "weather": "rain", "framing": "wide"}


@cache
def painting(seed: int, **attributes: str):
    return paint_picture(attributes, seed, *SIZE)


def values(images, references) -> list[float]:
    found = SandboxConsistency().score(Batch(tuple(images), "", tuple(references)))
    return [one.value for one in found]


def test_it_is_the_mean_cosine_of_the_heads_vectors():
    card = json.loads(CARD.read_text("utf-8"))
    shown = [painting(k, **KEEPER, **COAST) for k in range(4)]
    tower = SandboxClipScore().embedder.images(Batch(tuple(shown), ""), "whole").double().numpy()
    looks = (tower - card["mean"]) @ np.array(card["head"])
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    wanted = (looks[:2] @ looks[2:].T).mean(1)
    assert values(shown[:2], shown[2:]) == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.all
@pytest.mark.parametrize("changed", ["colour", "style"])
def test_a_changed_look_scores_lower_than_a_changed_scene(changed):
    reference = painting(1, **KEEPER, **COAST)
    kept = [painting(k, **KEEPER, **CITY) for k in (2, 3, 4)]
    lost = [painting(k, **KEEPER | {changed: FOX[changed]}, **CITY) for k in (2, 3, 4)]
    pairs = zip(values(kept, [reference]), values(lost, [reference]), strict=True)
    assert all(a > b for a, b in pairs)


def test_the_plain_cosine_prefers_the_scene_and_the_head_the_look():
    reference = painting(1, **KEEPER, **COAST)
    same_look, same_scene = painting(2, **KEEPER, **CITY), painting(3, **FOX, **COAST)
    look, scene = values([same_look, same_scene], [reference])
    assert look > scene + 0.2


def test_without_references_it_does_not_apply():
    scorer = SandboxConsistency()
    rows = raw_scores(Batch((painting(1, **KEEPER, **COAST),), "a keeper"), [scorer])
    assert not rows[0]["consistency"].applicable
    assert grade(rows, [scorer])[0].models == {}


def test_references_pass_the_tower_once_and_images_share_a_pass_with_clip_score(monkeypatch):
    passed, real = [], Embedder.images

    def images(self, batch, *view, **more):
        passed.append(batch)
        return real(self, batch, *view, **more)

    monkeypatch.setattr(Embedder, "images", images)
    scorer, references = SandboxConsistency(), (painting(1, **KEEPER, **COAST),)
    for seed in (2, 3, 4):
        batch = Batch((painting(seed, **KEEPER, **CITY),), "a keeper", references)
        raw_scores(batch, [SandboxClipScore(), scorer])
    assert len({id(batch) for batch in passed}) == 4, "three batches, and the reference once"


def test_the_map_has_its_middle_and_its_id():
    scorer, card = SandboxConsistency(), json.loads(CARD.read_text("utf-8"))
    assert scorer.to_100(card["middle"]) == pytest.approx(50)
    assert 0 <= scorer.to_100(-1) < 1 and 95 < scorer.to_100(1) <= 100
    assert scorer.model == f"sandbox-consistency@painter-{PAINTER_VERSION}"
    assert scorer.calibration == card["calibration"] == "sandbox-consistency-logistic-1"


@pytest.mark.parametrize("view", ["tiles", "center"])
def test_another_view_has_a_curve_of_its_own(view):
    scorer, card = SandboxConsistency(view=view), json.loads(CARD.read_text("utf-8"))
    assert scorer.to_100(card[view]["middle"]) == pytest.approx(50)
    assert scorer.calibration.endswith(f"-{view}") and card[view]["middle"] != card["middle"]
    reference, same = painting(1, **KEEPER, **COAST), painting(2, **KEEPER, **CITY)
    seen = Batch((same,), "", (reference,))
    assert scorer.score(seen)[0].value != SandboxConsistency().score(seen)[0].value


@pytest.mark.parametrize("text", ["", "{", "[1]", None])
def test_a_card_that_is_missing_or_broken_is_refused(text, tmp_path):
    folder = Path(shutil.copytree(CARD.parent, tmp_path / "copy"))
    card = folder / "consistency.json"
    card.unlink() if text is None else card.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"consistency\.json"):
        SandboxConsistency(folder)


def test_it_is_a_default_with_its_weight():
    names = [scorer.name for scorer in defaults.scorers()]
    assert names == ["pickscore", "clip_score", "aesthetic", "consistency"]
    assert normalized_weights(names)["consistency"] == pytest.approx(0.25 / 1.1)


def test_real_images_are_compared_by_dino_only_where_its_weights_are(monkeypatch):
    from refimg.adapters.dino import DinoConsistency

    def default():
        (scorer,) = [s for s in defaults.real_scorers() if s.name == "consistency"]
        return type(scorer).__name__

    monkeypatch.setattr(DinoConsistency, "missing", lambda self: "no weights")
    assert default() == "ClipConsistency"
    monkeypatch.setattr(DinoConsistency, "missing", lambda self: None)
    assert default() == "DinoConsistency"
