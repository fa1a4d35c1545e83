"""A scale from one's own runs, and how sure a choice is."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refimg.pipeline import Pipeline, Scene, Story
from refimg.score import Batch, Calibration, ImageScores, calibrate, calibrated, grade, p_best
from refimg.score import raw_scores as ask

from .fakes import FakeImages, FakeScorer, critic, director

PICTURES = tuple(Image.new("RGB", (8, 8), (shade, 80, 120)) for shade in (40, 200))


class Full(FakeScorer):
    """A scorer with everything that a scorer may have beside the protocol."""

    def __init__(self):
        super().__init__()
        self.log = []

    def load(self):
        self.log.append("load")

    def embed_text(self, prompt):
        self.log.append(prompt)


def share_below(values: list[float], raw: float) -> float:
    """The plain definition: the per cent of values that are lower, equal ones counted half."""
    lower, equal = sum(v < raw for v in values), sum(v == raw for v in values)
    return 100 * (lower + equal / 2) / len(values)


# the map


@pytest.mark.parametrize("draw", [
    lambda rng: rng.gauss(21.5, 1.0),
    lambda rng: rng.random() ** 8,
    lambda rng: round(rng.gauss(0, 2)),
    lambda rng: rng.choice([0.0, 0.0, 0.0, 1.0]),
])  # fmt: skip
def test_it_is_the_share_of_ones_own_pictures_that_score_lower(draw):
    rng = random.Random(5)
    values = [float(draw(rng)) for _ in range(2000)]
    made = calibrate(values, FakeScorer())
    for raw in [*values[:300], min(values) - 1, max(values) + 1]:
        assert made.to_100(raw) == pytest.approx(share_below(values, raw), abs=1.1)


@pytest.mark.parametrize("draw", [
    lambda rng: rng.uniform(-1e6, 1e6),
    lambda rng: 10 ** rng.uniform(-300, 300),
    lambda rng: rng.choice([0.1, 0.2, 0.3]),
])  # fmt: skip
def test_never_down_and_never_outside(draw):
    for seed in range(50):
        rng = random.Random(seed)
        values = [draw(rng) for _ in range(rng.randint(100, 150))]
        made = calibrate(values, FakeScorer())
        probes = [*values, *(draw(rng) for _ in range(50)), *made.quantiles, -1e300, 0.15, 1e301]
        places = [made.to_100(raw) for raw in sorted(probes)]
        assert places == sorted(places)
        assert (places[0], places[-1]) == (0, 100)


def test_only_finite_values_count_and_a_hundred_are_needed():
    odd = [None, math.nan, math.inf, -math.inf]
    with pytest.raises(ValueError, match="100 or more finite values, got 99"):
        calibrate([*map(float, range(99)), *odd], FakeScorer())
    assert calibrate([*map(float, range(100)), *odd], FakeScorer()).images == 100
    with pytest.raises(ValueError, match="of two values or more"):
        calibrate([0.5] * 200, FakeScorer())


def test_the_id_is_of_the_content():
    values = [float(n) for n in range(120)]
    made = calibrate(values, FakeScorer())
    other = FakeScorer()
    other.model = "another@checkpoint"
    shifted = [value + 1e-9 for value in values]
    same = calibrate(values[::-1], FakeScorer())
    others = [calibrate(shifted, FakeScorer()), calibrate(values, FakeScorer("clip_score")),
              calibrate(values, other)]
    assert same.id == made.id
    assert len({made.id, *(different.id for different in others)}) == 4
    assert made.id.startswith("quantiles-") and len(made.id) == 18


def test_saved_and_loaded_it_is_the_same(tmp_path):
    rng = random.Random(1)
    made = calibrate([rng.gauss(0.1, 1 / 3) for _ in range(777)], FakeScorer())
    made.save(tmp_path / "scale.json")
    again = Calibration.load(tmp_path / "scale.json")
    assert (again, again.id) == (made, made.id)
    assert json.loads((tmp_path / "scale.json").read_text())["model"] == "fake-model"


@pytest.mark.parametrize("spoil", [
    lambda text: text[:200],
    lambda text: text.replace("0.0", "NaN", 1),
    lambda text: json.dumps(json.loads(text) | {"quantiles": [0.0, 1.0]}),
    lambda text: json.dumps(json.loads(text) | {"quantiles": list(range(101, 0, -1))}),
])  # fmt: skip
def test_a_spoilt_file_is_refused_by_name(tmp_path, spoil):
    file = tmp_path / "scale.json"
    calibrate([float(n) for n in range(120)], FakeScorer()).save(file)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ValueError, match=r"saved calibration, got .*scale\.json"):
        Calibration.load(file)


# a scorer with it


def test_nothing_but_the_map_changes():
    scorer = Full()
    wrapped = calibrated(scorer, calibrate([float(n) for n in range(256)], scorer))
    batch = Batch(PICTURES, "noise")
    assert (wrapped.name, wrapped.model) == (scorer.name, scorer.model)
    plain, other = (grade(ask(batch, [s]), [s])[0] for s in (scorer, wrapped))
    assert plain.raw == other.raw and plain.models == other.models
    assert plain.metrics["pickscore"] == pytest.approx(other.metrics["pickscore"], abs=1)
    assert other.calibrations == {"pickscore": wrapped.calibration}
    assert wrapped.calibration != scorer.calibration == "fake-identity"
    wrapped.load()
    wrapped.embed_text("noise")
    assert scorer.log == ["load", "noise"]


def test_what_a_scorer_lacks_the_calibrated_one_lacks():
    made = calibrate([float(n) for n in range(256)], FakeScorer())
    assert not hasattr(calibrated(FakeScorer(), made), "embed_text")


def test_it_can_be_copied_and_calibrated_again():
    scorer = Full()
    one = calibrate([float(n) for n in range(256)], scorer)
    two = calibrate([float(n) for n in range(500)], scorer)
    wrapped = calibrated(calibrated(scorer, one), two)
    for same in (copy.copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(one))):
        assert same.to_100(50.0) == (wrapped if same != one else one).to_100(50.0)
    assert wrapped.calibration == two.id


def test_a_scale_of_another_checkpoint_is_refused():
    other = FakeScorer()
    other.model = "fake-model@2"
    made = calibrate([float(n) for n in range(256)], other)
    with pytest.raises(ValueError, match="fake-model@2"):
        calibrated(FakeScorer(), made)
    with pytest.raises(ValueError, match="clip_score"):
        calibrated(FakeScorer("clip_score"), made)


async def test_a_run_records_it_and_its_table_makes_the_next_one(tmp_path):
    p = Pipeline(director(), critic(), FakeImages(), [FakeScorer()], num_variations=20)
    story = Story(scenes=[Scene(prompt=f"scene {n}") for n in range(5)])
    result = await p.run(story, output_dir=tmp_path)
    made = calibrate(result.frame()["raw_pickscore"], p.scorers[0])
    assert made.images == 100
    p.scorers = [calibrated(FakeScorer(), made)]
    again = await p.run(Story(scenes=story.scenes[:1]), output_dir=tmp_path)
    assert again.settings["scorers"][0]["calibration"] == made.id
    for variation in again.scenes[0].variations:
        assert variation.scores.calibrations == {"pickscore": made.id}
        assert variation.scores.pickscore == made.to_100(variation.scores.raw["pickscore"])


# how sure


def records(*raws: float | None) -> list[ImageScores]:
    return [ImageScores(raw={} if raw is None else {"pickscore": raw}) for raw in raws]


def test_two_pictures_are_bradley_and_terry():
    first, second = p_best(records(22.1, 21.0))
    assert first == pytest.approx(1 / (1 + math.exp(-1.1)))
    assert first + second == pytest.approx(1)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20), st.floats(-100, 100))
def test_a_softmax_that_no_size_upsets(raws, shift):
    found = p_best(records(*raws))
    assert math.fsum(found) == pytest.approx(1)
    assert max(found) >= 1 / len(raws) - 1e-12
    assert found == pytest.approx(p_best(records(*(raw + shift for raw in raws))), abs=1e-6)


def test_without_pickscore_there_is_no_chance():
    assert p_best([]) == []
    assert p_best(records(None, None)) == [None, None]
    assert p_best([ImageScores(raw={"pickscore": None, "clip_score": 0.3})]) == [None]
    assert p_best(records(21.0, None, 21.0)) == [0.5, None, 0.5]
