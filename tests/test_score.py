"""What may go wrong between pictures and their ranks: scorers that fail, weights, groups, files."""

import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from refimg.score import (
    Batch,
    ImageScores,
    RawScore,
    check_weights,
    grade,
    group_overalls,
    rank_images_by_quality,
    raw_scores,
    score_image,
    score_images,
    scoring_thread,
    shares,
)
from tests.fakes import FakeScorer, picture

FOUR = ("pickscore", "clip_score", "vqa_score", "aesthetic")


def named(*names: str) -> list[FakeScorer]:
    return [FakeScorer(name) for name in names]


def plain(*shades: int) -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in shades)


def identity(name: str, to_100=lambda raw: raw) -> SimpleNamespace:
    return SimpleNamespace(name=name, model=f"{name}@1", calibration="identity", to_100=to_100)


def raws(*rows: dict[str, float | None]) -> list[dict[str, RawScore]]:
    return [{n: RawScore(v, "" if v is not None else "down") for n, v in r.items()} for r in rows]


def overalls(*rows: dict[str, float | None], weights=None) -> list[float | None]:
    return [s.overall for s in grade(raws(*rows), [identity(n) for n in rows[0]], weights)]


# Batch.once


def test_threads_that_ask_at_once_get_one_and_the_same_thing():
    batch, made, start = Batch((), "x"), [], threading.Barrier(8)

    def make():
        time.sleep(0.02)
        made.append(object())
        return made[-1]

    def ask(i):
        start.wait()
        got[i] = batch.once("key", make)

    got: list = [None] * 8
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and all(item is made[0] for item in got)


def test_a_make_that_raises_is_not_remembered():
    batch, answers = Batch((), "x"), iter([OSError("gone"), "here", "never"])

    def make():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(OSError, match="gone"):
        batch.once("key", make)
    assert [batch.once("key", make), batch.once("key", make)] == ["here", "here"]


def test_none_is_remembered_and_keys_do_not_meet():
    batch, calls = Batch((), "x"), []
    for key in ("a", ("a",), "a", ("a",)):
        assert batch.once(key, lambda key=key: calls.append(key)) is None
    assert calls == ["a", ("a",)]


def test_a_make_may_ask_for_another_key():
    batch = Batch((), "x")
    assert batch.once("outer", lambda: batch.once("inner", lambda: 2) + 1) == 3
    assert batch.once("inner", lambda: "made again") == 2


def test_a_key_that_is_being_made_does_not_hold_up_another():
    batch = Batch((), "x")

    def outer():
        other = threading.Thread(target=lambda: batch.once("other", lambda: 1), daemon=True)
        other.start()
        other.join(10)
        return other.is_alive()

    assert batch.once("key", outer) is False


def test_batches_share_nothing():
    one, two = Batch((), "x"), Batch((), "x")
    assert one.once("key", lambda: 1) == 1 and two.once("key", lambda: 2) == 2


# records


def test_raw_scores_take_the_numbers_of_numpy():
    assert RawScore(np.float32(0.5)).value == 0.5
    assert type(RawScore(np.float64(0.5)).value) is float


def test_records_are_frozen_and_round_trip_through_json():
    row = {"pickscore": 40.0, "aesthetic": None}
    scores = grade(raws(row), [identity(name) for name in row])[0]
    assert ImageScores.model_validate_json(scores.model_dump_json()) == scores
    assert ImageScores.model_validate(json.loads(scores.model_dump_json())) == scores
    raw = RawScore(None, "why")
    assert RawScore.model_validate_json(raw.model_dump_json()) == raw
    with pytest.raises(ValidationError):
        scores.overall = 1.0


def test_a_record_holds_no_number_that_is_none():
    with pytest.raises(ValidationError):
        ImageScores(metrics={"pickscore": float("nan")})
    with pytest.raises(ValidationError):
        ImageScores(overall=float("inf"))


def test_a_record_says_who_spoke_and_how_it_was_mapped():
    scores = grade(raws({"a": 40.0, "b": None}), [identity("a"), identity("b")])[0]
    assert scores.models == {"a": "a@1", "b": "b@1"}
    assert scores.calibrations == {"a": "identity", "b": "identity"}
    assert scores.raw == {"a": 40.0, "b": None} == scores.metrics
    assert scores.notes == {"b": "down"}


def test_a_note_on_a_value_is_kept():
    row = {"a": RawScore(40.0, "2 text windows")}
    assert grade([row], [identity("a")])[0].notes == {"a": "2 text windows"}


# scorers that fail


def test_every_scorer_gets_one_batch_with_all_images():
    scorers = named("pickscore", "clip_score")
    rows = raw_scores(Batch(plain(10, 20, 30), "x"), scorers)
    assert [[row[s.name].value for row in rows] for s in scorers] == [[10, 20, 30]] * 2
    assert scorers[0].batches == scorers[1].batches and len(scorers[0].batches) == 1


def test_no_images_are_no_work():
    scorer = FakeScorer()
    assert raw_scores(Batch((), "x"), [scorer]) == [] and scorer.batches == []


def test_a_scorer_that_fails_on_batches_is_tried_image_by_image(caplog):
    class Small(FakeScorer):
        def score(self, batch):
            if len(batch.images) > 1:
                self.batches.append(batch)
                raise MemoryError("too many")
            return super().score(batch)

    scorer = Small()
    rows = raw_scores(Batch(plain(10, 20), "x"), [scorer])
    assert [row["pickscore"] for row in rows] == [RawScore(10), RawScore(20)]
    assert [len(batch.images) for batch in scorer.batches] == [2, 1, 1]
    assert len({id(batch) for batch in scorer.batches}) == 3
    assert {batch.prompt for batch in scorer.batches} == {"x"}
    assert "MemoryError: too many" in caplog.text


def test_what_a_failed_call_had_made_is_gone_before_the_second_try():
    class Tensor:
        pass

    alive = []

    def score(batch):
        gc.collect()
        alive.append([ref() for ref in made])
        tensor = Tensor()
        made.append(weakref.ref(tensor))
        if len(batch.images) > 1:
            raise MemoryError("out of memory")
        return [RawScore(1)]

    made: list = []
    scorer = identity("a")
    scorer.score = score
    raw_scores(Batch(plain(1, 2), "x"), [scorer])
    assert alive == [[], [None], [None, None]]


def test_one_poisonous_image_costs_the_others_nothing():
    def value(image, prompt):
        return ValueError("no face") if image.getpixel((0, 0))[0] == 20 else 5.0

    rows = raw_scores(Batch(plain(10, 20, 30), "x"), [FakeScorer(value=value), FakeScorer("other")])
    assert [row["pickscore"].value for row in rows] == [5.0, None, 5.0]
    assert rows[1]["pickscore"].note == "ValueError: no face"
    assert [row["other"].value for row in rows] == [10, 20, 30]


def test_a_scorer_that_always_raises_is_called_once_more_an_image():
    scorer = FakeScorer(value=lambda image, prompt: RuntimeError("no weights"))
    rows = raw_scores(Batch(plain(1, 2, 3), "x"), [scorer])
    assert [row["pickscore"] for row in rows] == [RawScore(None, "RuntimeError: no weights")] * 3
    assert len(scorer.batches) == 1 + 3


def test_the_thread_is_not_caught_when_it_is_to_stop():
    scorer = FakeScorer(value=lambda image, prompt: KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        raw_scores(Batch(plain(1), "x"), [scorer])


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (lambda n: [], "ValueError: scores must be 1, one per image, got 0"),
        (lambda n: [RawScore(1)] * (n + 1), "ValueError: scores must be 1, one per image, got 2"),
        (lambda n: [0.5] * n, "TypeError: scores must be RawScore objects, got float"),
        (lambda n: ["good"] * n, "TypeError: scores must be RawScore objects, got str"),
        (lambda n: [None] * n, "TypeError: scores must be RawScore objects, got NoneType"),
        (lambda n: None, "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_an_answer_that_is_no_answer_is_none_with_the_reason(answer, note):
    scorer = identity("a")
    scorer.score = lambda batch: answer(len(batch.images))
    rows = raw_scores(Batch(plain(1, 2), "x"), [scorer])
    assert [row["a"] for row in rows] == [RawScore(None, note)] * 2


def test_the_value_of_a_result_must_be_a_number():
    row = raw_scores(Batch(plain(1), "x"), [FakeScorer(value=lambda image, prompt: "good")])[0]
    assert row["pickscore"].value is None and row["pickscore"].note.startswith("ValidationError")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_value_that_is_not_finite_is_none_and_is_not_tried_again(value):
    scorer = FakeScorer(value=lambda image, prompt: RawScore(value, "2 windows"))
    row = raw_scores(Batch(plain(1), "x"), [scorer])[0]
    assert row["pickscore"] == RawScore(None, f"not finite: {float(value)}; 2 windows")
    assert len(scorer.batches) == 1


def test_results_may_come_from_a_generator():
    scorer = identity("a")
    scorer.score = lambda batch: (RawScore(i) for i, _ in enumerate(batch.images))
    assert [row["a"].value for row in raw_scores(Batch(plain(1, 2), "x"), [scorer])] == [0, 1]


def test_an_error_with_lone_surrogates_can_still_be_written():
    error = ValueError("a file named \udcff.png")
    scorer = FakeScorer(value=lambda image, prompt: error)
    graded = grade(raw_scores(Batch(plain(1), "x"), [scorer]), [scorer])[0]
    assert "a file named \ufffd.png" in graded.model_dump_json()


# the map to 0..100


@pytest.mark.parametrize(
    ("mapped", "metric"), [(-7.0, 0.0), (107.0, 100.0), (-0.0, 0.0), (np.float32(50), 50.0)]
)
def test_the_map_is_clipped(mapped, metric):
    scores = grade(raws({"a": 1.0}), [identity("a", lambda raw: mapped)])[0]
    assert scores.metrics == {"a": metric} and str(scores.overall) == str(metric)


def broken(raw):
    raise ZeroDivisionError("no scale")


@pytest.mark.parametrize(
    ("to_100", "note"),
    [
        (broken, "to_100(1.0) failed, ZeroDivisionError: no scale"),
        (lambda raw: None, "to_100(1.0) failed, TypeError"),
        (lambda raw: "high", "to_100(1.0) failed, ValueError"),
        (lambda raw: float("nan"), "to_100(1.0) is nan"),
        (lambda raw: float("inf"), "to_100(1.0) is inf"),
    ],
)
def test_a_map_that_fails_leaves_the_raw_value_and_the_reason(to_100, note):
    scores = grade(raws({"a": 1.0}), [identity("a", to_100)])[0]
    assert scores.raw == {"a": 1.0} and scores.metrics == {"a": None}
    assert scores.notes["a"].startswith(note) and scores.overall is None


def test_the_map_is_not_asked_about_none():
    scores = grade([{"a": RawScore(None)}], [identity("a", broken)])[0]
    assert scores.notes["a"] == "the scorer gave no value and no reason"


def test_a_scorer_that_was_not_asked_is_none():
    one, two = grade([{"a": RawScore(40)}, {"a": RawScore(60)}], [identity("a"), identity("b")])
    assert (one.overall, two.overall) == (40, 60) and one.notes["b"] == "the scorer was not asked"


# weights and shares


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (FOUR, (0.5, 0.25, 0.15, 0.1)),
        (("aesthetic", "pickscore", "clip_score"), (0.1 / 0.85, 0.5 / 0.85, 0.25 / 0.85)),
        (("pickscore",), (1,)),
        (("vqa_score", "aesthetic"), (0.6, 0.4)),
        (("pickscore", "truth"), (0.5, 0.5)),
        ((*FOUR, "truth"), (0.2,) * 5),
        (("truth",), (1,)),
    ],
)
def test_shares_are_those_of_the_configured_scorers(names, expected):
    assert shares(named(*names)) == pytest.approx(dict(zip(names, expected, strict=True)))
    assert list(shares(named(*names))) == list(names)


def test_own_weights_have_any_scale_and_win_over_the_names():
    assert shares(named("pickscore", "truth"), {"truth": 30, "pickscore": 10}) == {
        "pickscore": 0.25,
        "truth": 0.75,
    }
    assert shares(named("a", "b"), {"a": np.float32(1), "b": np.int64(3)}) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("names", "weights", "says"),
    [
        (("a", "b", "a"), None, "got 'a' twice"),
        (("overall",), None, "'overall'"),
        (("a",), {"a": 1, "b": 1}, "['a', 'b']"),
        (("a", "b"), {"a": 1}, "['a', 'b']"),
        (("a", "b"), {}, "['a', 'b']"),
        ((), {"a": 1}, "['a']"),
        (("a", "b"), {"a": -1, "b": 2}, "weights['a'] must be a finite number >= 0, got -1"),
        (("a", "b"), {"a": math.nan, "b": 1}, "weights['a'] must be a finite number >= 0, got nan"),
        (("a", "b"), {"a": math.inf, "b": 1}, "weights['a'] must be a finite number >= 0, got inf"),
        (("a", "b"), {"a": "1", "b": 1}, "weights['a'] must be a finite number >= 0, got '1'"),
        (("a", "b"), {"a": None, "b": 1}, "weights['a'] must be a finite number >= 0, got None"),
        (("a", "b"), {"a": 0, "b": 0}, "sum of the weights must be above 0"),
        (("a", "b"), {"a": 1e308, "b": 1e308}, "sum of the weights must be above 0 and finite"),
    ],
)
async def test_names_and_weights_that_are_refused(names, weights, says, tmp_path):
    scorers = named(*names)
    for refused in (
        lambda: check_weights([s.name for s in scorers], weights),
        lambda: grade([], scorers, weights),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        assert says in str(error.value)
    with pytest.raises(ValueError):
        await score_images(write(tmp_path, 1), "x", scorers=scorers, weights=weights)
    assert all(scorer.batches == [] for scorer in scorers)


def test_no_scorers_need_no_weights():
    check_weights([])
    check_weights([], {})


# the group rule


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((80, 40, 20, 60), 0.5 * 80 + 0.25 * 40 + 0.15 * 20 + 0.1 * 60),
        ((80, 40, 20, None), (0.5 * 80 + 0.25 * 40 + 0.15 * 20) / 0.9),
        ((80, 40, None, None), (0.5 * 80 + 0.25 * 40) / 0.75),
        ((80, None, None, None), 80),
        ((None, 40, 20, 60), (0.25 * 40 + 0.15 * 20 + 0.1 * 60) / 0.5),
        ((None, 40, 20, None), None),
        ((None, None, None, None), None),
        ((0, 0, 0, 0), 0),
    ],
)
def test_what_no_image_has_drops_out_and_half_of_the_weight_is_enough(row, expected):
    metrics = dict(zip(FOUR, row, strict=True))
    found = overalls(metrics, metrics)
    assert found == ([None, None] if expected is None else pytest.approx([expected] * 2))


def test_exactly_half_is_enough_however_the_halves_are_made():
    for count in (2, 4, 6, 10, 14, 50):
        row = {f"m{i}": 30.0 if i % 2 else None for i in range(count)}
        assert overalls(row) == [30.0], count
    row = {"a": None, "b": 1.0, "c": 1.0, "d": 1.0}
    assert overalls(row, weights={"a": 0.3, "b": 0.1, "c": 0.1, "d": 0.1}) == [1.0]
    for halves in ({"a": 0.1, "b": 2.1}, {"a": 0.3, "b": 2.8}, {"a": 1.9, "b": 1.8, "c": 0.7}):
        total = round(sum(halves.values()), 1)
        known = dict.fromkeys(halves, 5.0) | {"z": None}
        assert overalls(known, weights=halves | {"z": total}) == [5.0], halves
    assert overalls(row, weights={"a": 0.301, "b": 0.1, "c": 0.1, "d": 0.1}) == [None]


@pytest.mark.parametrize("value", [0.3, 0.6, 99.9, 100.0])
def test_the_mean_of_equal_metrics_is_that_number(value):
    assert overalls(dict.fromkeys(("pickscore", "clip_score", "aesthetic"), value)) == [value]
    assert overalls(dict.fromkeys(("pickscore", "vqa_score", "aesthetic"), value)) == [value]


def test_half_is_half_of_what_was_configured():
    three = {"pickscore": None, "clip_score": 50.0, "aesthetic": 50.0}
    assert overalls(three) == [None]
    assert overalls({"clip_score": 50.0, "aesthetic": None}) == [50.0]
    assert overalls({"clip_score": None, "aesthetic": 50.0}) == [None]


def test_an_image_that_lacks_what_another_has_is_unscored_and_changes_nothing():
    full = {"pickscore": 40.0, "clip_score": 60.0, "aesthetic": 50.0}
    alone = overalls(full)[0]
    for lost in full:
        lacking = dict.fromkeys(full, 100.0) | {lost: None}
        assert overalls(full, lacking) == [alone, None]
        assert overalls(lacking, full, lacking) == [None, alone, None]


def test_images_that_lack_each_other_s_metrics_are_all_unscored():
    assert overalls({"a": 50.0, "b": None}, {"a": None, "b": 50.0}) == [None, None]


def test_an_unscored_image_still_keeps_a_metric_in_the_group():
    rows = raws({"a": 90.0, "b": None}, {"a": 50.0, "b": 50.0})
    scores = grade(rows, [identity("a"), identity("b")])
    assert [s.overall for s in scores] == [None, 50.0]
    assert "b" in scores[0].notes["overall"] and "overall" not in scores[1].notes


def test_a_weight_of_nothing_is_an_observer():
    rows = ({"a": 40.0, "seen": None}, {"a": 60.0, "seen": 99.0})
    assert overalls(*rows, weights={"a": 1, "seen": 0}) == [40.0, 60.0]
    assert overalls({"a": None, "seen": 99.0}, weights={"a": 1, "seen": 0}) == [None]


def test_no_scorer_and_no_image_are_no_errors():
    assert grade([], []) == [] == grade([], named("a"))
    assert [s.notes for s in grade([{}, {}], [])] == [{"overall": "no scorer is configured"}] * 2
    assert group_overalls([], {"a": 1.0}) == []


def test_a_scorer_that_does_not_apply_is_no_missing_score():
    apart = RawScore(None, "no reference to agree with", applicable=False)
    rows = [{"pickscore": RawScore(40), "consistency": apart},
            {"pickscore": RawScore(60), "consistency": apart}]
    scorers = [identity("pickscore"), identity("consistency")]
    weights = {"pickscore": 1, "consistency": 3}
    scores = grade(rows, scorers, weights)
    assert [s.overall for s in scores] == [40, 60]
    assert [s.metrics["consistency"] for s in scores] == [None, None] == [
        s.consistency for s in scores]
    assert scores[0].notes == {"consistency": "no reference to agree with"}
    assert list(scores[0].models) == list(scores[0].calibrations) == ["pickscore"]
    down = [row | {"consistency": RawScore(None, "down")} for row in rows]
    assert [s.overall for s in grade(down, scorers, weights)] == [None, None]


def test_where_no_scorer_applies_the_group_is_unscored_with_that_reason():
    row = {"a": RawScore(None, "no reference", False), "seen": RawScore(50)}
    (scores,) = grade([row], [identity("a"), identity("seen")], {"a": 1, "seen": 0})
    assert scores.overall is None and scores.notes["overall"] == "no scorer with a weight applies"


@pytest.mark.parametrize("answers", [
    (RawScore(50), RawScore(None, "", False)),
    (RawScore(None, "down"), RawScore(None, "", False)),
    (RawScore(50, "", False), RawScore(50, "", False)),
])
def test_a_scorer_applies_to_the_whole_batch_or_to_none_of_it(answers):
    class Half(FakeScorer):
        def score(self, batch):
            return list(answers[: len(batch.images)])

    rows = raw_scores(Batch(plain(10, 20), "x"), [Half("half")])
    assert all(row["half"].applicable or row["half"].value is None for row in rows)
    assert len({row["half"].applicable for row in rows}) == 1


async def test_references_reach_the_scorers_as_pixels_also_image_by_image(tmp_path):
    seen = []

    class Alone(FakeScorer):
        def score(self, batch):
            seen.append([image.size for image in batch.references])
            if len(batch.images) > 1:
                raise MemoryError
            return super().score(batch)

    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        Image.new("RGB", (16 + n, 9), (200, 10, 10)).save(path)
    await score_images(paths[:2], "x", scorers=[Alone("alone")], references=paths[2:])
    await score_image(paths[0], "x", scorers=[Alone("alone")], references=iter(paths[2:]))
    assert seen == [[(18, 9)]] * 4
    with pytest.raises(ValueError, match="an image must be"):
        await score_image(paths[0], "x", scorers=[], references=[tmp_path / "none.png"])


METRIC = st.one_of(st.none(), st.floats(0, 100))
NAMES = st.lists(st.sampled_from([*FOUR, "truth", "other"]), min_size=1, max_size=5, unique=True)


@st.composite
def groups(draw):
    names = draw(NAMES)
    return names, draw(st.lists(st.tuples(*[METRIC] * len(names)), min_size=1, max_size=6))


def graded(names, rows):
    dicts = [dict(zip(names, row, strict=True)) for row in rows]
    return grade(raws(*dicts), [identity(name) for name in names])


@given(groups(), st.randoms(use_true_random=False))
def test_an_image_s_scores_do_not_depend_on_its_place(group, random):
    names, rows = group
    order = random.sample(range(len(rows)), len(rows))
    one, two = graded(names, rows), graded(names, [rows[i] for i in order])
    assert [one[i] for i in order] == two


@given(groups(), st.randoms(use_true_random=False))
def test_the_overall_does_not_depend_on_the_order_of_the_scorers(group, random):
    names, rows = group
    order = random.sample(range(len(names)), len(names))
    other = graded([names[i] for i in order], [tuple(row[i] for i in order) for row in rows])
    for one, two in zip(graded(names, rows), other, strict=True):
        assert (one.overall is None) == (two.overall is None)
        assert one.overall is None or one.overall == pytest.approx(two.overall, abs=1e-9)


@given(groups())
def test_the_overall_lies_among_the_metrics_or_has_a_reason(group):
    for scores in graded(*group):
        known = [value for value in scores.metrics.values() if value is not None]
        assert (scores.overall is None) == ("overall" in scores.notes)
        assert scores.overall is None or min(known) <= scores.overall <= max(known)


# ranks


def scored(overall: float | None) -> ImageScores:
    return ImageScores(overall=overall)


def test_ties_keep_their_order_and_unscored_images_come_last():
    overalls = [None, 50.0, 70.0, 50.0, None, 0.0, 70.0]
    given_in = [(Path(f"v{i}.png"), scored(overall)) for i, overall in enumerate(overalls)]
    ranked = rank_images_by_quality(given_in)
    assert [path.stem for path, _, _ in ranked] == ["v2", "v6", "v1", "v3", "v5", "v0", "v4"]
    assert [rank for _, _, rank in ranked] == [1, 2, 3, 4, 5, 6, 7]
    assert [(path, scores) for path, scores, _ in sorted(ranked, key=lambda r: r[0])] == given_in


def test_nothing_to_rank():
    assert rank_images_by_quality([]) == []


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 10.0, 10.5, 100.0])), max_size=12))
def test_ranking_again_changes_nothing(overalls):
    ranked = rank_images_by_quality([(Path(f"{i:02}"), scored(o)) for i, o in enumerate(overalls)])
    assert rank_images_by_quality([(path, scores) for path, scores, _ in ranked]) == ranked
    for (path, one, _), (later, two, _) in pairwise(ranked):
        assert one.overall != two.overall or path < later


# files and the scoring thread


def write(folder: Path, *shades: int) -> list[Path]:
    paths = [folder / f"{i}.png" for i, _ in enumerate(shades)]
    for path, shade in zip(paths, shades, strict=True):
        path.write_bytes(picture(shade))
    return paths


async def test_files_become_one_graded_group(tmp_path):
    scorer = FakeScorer()
    scores = await score_images(write(tmp_path, 51, 102), "a lighthouse", scorers=[scorer])
    assert [s.overall for s in scores] == pytest.approx([20.0, 40.0])
    assert [(b.prompt, len(b.images)) for b in scorer.batches] == [("a lighthouse", 2)]


async def test_a_group_of_one_is_a_group(tmp_path):
    path = write(tmp_path, 51)[0]
    one = await score_image(path, "x", scorers=[FakeScorer()])
    assert [one] == await score_images([path], "x", scorers=[FakeScorer()])
    assert one == await score_image(str(path), "x", scorers=[FakeScorer()])


async def test_images_that_cannot_be_opened_cost_the_others_nothing(tmp_path):
    good = write(tmp_path, 51, 102)
    page, empty = tmp_path / "page.png", tmp_path / "empty.png"
    page.write_text("<html>out of credit</html>")
    empty.write_bytes(b"")
    scorer = FakeScorer()
    paths = [tmp_path / "lost.png", good[0], page, tmp_path, good[1], empty]
    scores = await score_images(paths, "x", scorers=[scorer, FakeScorer("clip_score")])
    assert [s.overall for s in scores] == [None, 20.0, None, None, pytest.approx(40.0), None]
    assert [len(batch.images) for batch in scorer.batches] == [2]
    for i in (0, 2, 3, 5):
        assert scores[i].metrics == {"pickscore": None, "clip_score": None}
        assert set(scores[i].notes) == {"pickscore", "clip_score", "overall"}
        assert "could not be opened" in scores[i].notes["pickscore"]
    assert "lost.png" in scores[0].notes["clip_score"]


async def test_a_group_that_cannot_be_opened_is_unscored_without_a_call(tmp_path):
    scorer = FakeScorer()
    scores = await score_images([tmp_path / "a.png", tmp_path / "b.png"], "x", scorers=[scorer])
    assert [s.overall for s in scores] == [None, None] and scorer.batches == []


async def test_no_scorer_no_image_no_text(tmp_path):
    paths = write(tmp_path, 1, 2)
    assert [s.notes["overall"] for s in await score_images(paths, "x", scorers=[])] == [
        "no scorer is configured"
    ] * 2
    assert await score_images([], "x", scorers=[FakeScorer()]) == []
    for text in ("", " \n\t"):
        with pytest.raises(ValueError, match="prompt_text"):
            await score_image(paths[0], text, scorers=[FakeScorer()])


async def test_none_asks_the_defaults(tmp_path, monkeypatch):
    defaults = SimpleNamespace(scorers=lambda: [FakeScorer("vqa_score")])
    monkeypatch.setitem(sys.modules, "refimg.defaults", defaults)
    scores = await score_image(write(tmp_path, 255)[0], "x")
    assert scores.metrics == {"vqa_score": 100.0}


async def test_all_blocking_work_is_done_in_one_thread_beside_the_loop(tmp_path):
    threads = []

    def value(image, prompt):
        threads.append(threading.current_thread())
        return 1.0

    scorers = [FakeScorer("a", value), FakeScorer("b", value)]
    for _ in range(2):
        await score_images(write(tmp_path, 1, 2), "x", scorers=scorers)
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()
    assert scoring_thread() is scoring_thread()
    assert scoring_thread().submit(threading.current_thread).result() is threads[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_scoring_thread_of_its_own():
    code = """
import os, refimg.score as s
s.scoring_thread().submit(int).result()
child = os.fork()
if not child:
    s.scoring_thread().submit(int).result(timeout=20)
    os._exit(7)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ran = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    assert ran.returncode == 7, ran.stderr.decode()
