"""The numbers of refimg.validate against scipy, brute force and formulas written another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from refimg.validate import (
    best_of_k,
    best_weights,
    compare,
    four_cells,
    holm,
    paired_interval,
    power,
    unit_values,
    verifier_error,
    wilson,
    win_rate,
)

from .arms import arm, random_arm

SMALL = st.integers(0, 4).map(float)  # few values: many ties
NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))


def by_hand(scores, values, k: int) -> float:
    """The mean over every subset of k of what its best image has; ties share."""
    means = []
    for subset in itertools.combinations(range(len(scores)), k):
        top = max(scores[i] for i in subset)
        means.append(np.mean([values[i] for i in subset if scores[i] == top]))
    return float(np.mean(means))


# best of k


@given(st.lists(st.tuples(SMALL, NUMBERS), min_size=1, max_size=7), st.data())
def test_the_estimate_is_the_mean_over_all_subsets(pairs, data):
    scores, values = map(list, zip(*pairs, strict=True))
    k = data.draw(st.integers(1, len(pairs)))
    assert (best_weights(scores, k) * values).sum() == pytest.approx(by_hand(scores, values, k))


def test_ties_share_as_a_draw_by_lot_would():
    rng, scores, values = np.random.default_rng(0), np.array([1, 2, 2, 2, 3.0]), np.arange(5.0)
    draws = []
    for _ in range(20_000):
        subset = rng.permutation(5)[:2]
        draws.append(values[max(subset, key=lambda i: scores[i])])
    assert (best_weights(scores, 2) * values).sum() == pytest.approx(np.mean(draws), abs=0.03)


@given(st.lists(SMALL, min_size=1, max_size=9), st.data())
def test_weights_sum_to_one_and_do_not_depend_on_the_order(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    weights = best_weights(scores, k)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    order = data.draw(st.permutations(range(len(scores))))
    assert best_weights(np.array(scores)[order], k) == pytest.approx(weights[list(order)])


@given(st.lists(NUMBERS, min_size=2, max_size=9))
def test_the_best_of_more_is_never_worse(scores):
    means = [(best_weights(scores, k) * scores).sum() for k in range(1, len(scores) + 1)]
    assert means[0] == pytest.approx(np.mean(scores))
    assert means[-1] == pytest.approx(max(scores))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(means))


def test_a_missing_score_makes_the_whole_scene_unknown():
    weights = best_weights([[1, 2, 3], [1, np.nan, 3]], 2)
    assert not np.isnan(weights[0]).any() and np.isnan(weights[1]).all()


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_is_between_one_and_the_number_of_images(k):
    with pytest.raises(ValueError, match=rf"k must be from 1 to 3, the number of images, got {k}"):
        best_weights([1, 2, 3], k)


def test_the_curve_is_brute_force_over_scenes_and_runs():
    first, second = random_arm(1, 5, images=5), random_arm(2, 5, images=4)
    curve = best_of_k(pd.concat([first, second]).assign(num_variations=5))
    assert curve["k"].max() == 4
    for k, metric in itertools.product((1, 2, 4), ("overall", "seen")):
        units = np.mean([
            [by_hand(g["overall"].tolist(), g[metric].tolist(), k) for _, g in t.groupby("story")]
            for t in (first, second)], axis=0)
        row = curve[(curve["k"] == k) & (curve["metric"] == metric)].iloc[0]
        span = stats.ttest_1samp(units, 0).confidence_interval()
        assert [row["mean"], row["low"], row["high"]] == pytest.approx([units.mean(), *span])
        assert (row["selects"], row["units"]) == (metric == "overall", 5)


def test_the_curve_follows_another_score_and_the_truth():
    a = random_arm(3, images=4)
    a = a.assign(right=a["seen"].rank(pct=True), all_right=a["seen"] > 50)
    curve = best_of_k(a, by="seen").set_index(["metric", "k"])
    assert curve.loc[("all_right", 4), "mean"] == pytest.approx(
        (a.groupby("story")["seen"].max() > 50).mean())
    assert curve["selects"].groupby("metric").first().to_dict() == {
        "overall": False, "pickscore": False, "seen": True, "right": False, "all_right": False}


# intervals


def test_the_interval_is_students_by_its_own_formula():
    d = np.random.default_rng(0).normal(1, 2, 17)
    found = paired_interval(d, level=0.9)
    half = stats.t.ppf(0.95, 16) * d.std(ddof=1) / math.sqrt(17)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(17))
    assert found == pytest.approx(
        (d.mean(), d.mean() - half, d.mean() + half, 2 * stats.t.sf(abs(t), 16)))


def test_many_studies_at_once_are_the_studies_one_by_one():
    d = np.random.default_rng(0).normal(0, 1, (3, 4, 9))
    d[1, 2] = 5.0
    many, rate = paired_interval(d), win_rate(d)
    for place in np.ndindex(3, 4):
        assert [v[place] for v in many] == pytest.approx([*paired_interval(d[place])], nan_ok=True)
        assert [v[place] for v in rate] == pytest.approx([*win_rate(d[place])])
    assert np.isnan(many.low[1, 2]) and np.isnan(many.p[1, 2]) and many.mean[1, 2] == 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("d", [[3.0], [0.0, 0.0], [2.0, 2.0, 2.0 + 1e-13], [0.1 + 0.2, 0.3]])
def test_no_spread_no_interval(d):
    found = paired_interval(d)
    assert found.mean == pytest.approx(np.mean(d))
    assert np.isnan([found.low, found.high, found.p]).all()


@given(st.integers(1, 60), st.data())
def test_wilson_is_scipys_for_whole_numbers(n, data):
    wins = data.draw(st.integers(0, n))
    theirs = stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert wilson(wins, n) == pytest.approx([*theirs], abs=1e-12)


@given(st.integers(0, 40))
def test_wilson_solves_its_equation_for_half_a_tie(doubled):
    n, share = 20, doubled / 40
    for bound in wilson(doubled / 2, n):
        z = (share - bound) / math.sqrt(max(bound * (1 - bound), 1e-300) / n)
        assert abs(z) == pytest.approx(1.959964, rel=1e-4) or bound == pytest.approx(share)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm_steps_down(p_values):
    adjusted = holm(p_values)
    known = [(p, a) for p, a in zip(p_values, adjusted, strict=True) if p is not None]
    assert [a is None for a in adjusted] == [p is None for p in p_values]
    for p, a in known:
        steps = [(sum(q >= r for q, _ in known)) * r for r in {q for q, _ in known} if r <= p]
        assert a == pytest.approx(min(1.0, max(steps)))
        assert a >= p


def test_holm_as_in_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# a comparison against scipy


def test_every_number_of_a_comparison():
    a, b = random_arm(1, 15), random_arm(2, 15, better=8)
    b.loc[b["story"].isin(["s3", "s4"]), ["overall", "pickscore", "seen"]] = a.loc[
        a["story"].isin(["s3", "s4"]), ["overall", "pickscore", "seen"]].to_numpy()
    b["selected"] = b.groupby("story")["overall"].transform("max").eq(b["overall"])
    found = compare(a, b)["seen"]
    first, second = (t[t["selected"]].set_index("story")["seen"] for t in (a, b))
    d = (second - first).to_numpy()
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    assert (found.wins, found.ties, found.losses) == (wins, 2, losses)
    assert found.p == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert (found.mean_a, found.mean_b) == pytest.approx((first.mean(), second.mean()))
    assert (found.low, found.high) == pytest.approx(
        [*stats.ttest_rel(second, first).confidence_interval()])
    assert found.p_sign == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(d[d != 0]).pvalue)
    assert (found.win_rate, found.skewness) == pytest.approx(((wins + 1) / 15, stats.skew(d)))
    assert (found.win_low, found.win_high) == pytest.approx([*wilson(wins + 1, 15)])


def test_the_hacking_index_by_hand():
    a, b = random_arm(1, 20), random_arm(2, 20, better=5)
    found = compare(a, b)
    gain = {}
    for metric in ("overall", "seen"):
        spread = np.mean([t.groupby("story")[metric].var().to_numpy() for t in (a, b)]) ** 0.5
        gain[metric] = found[metric].difference / spread
    assert found["seen"].hacking == pytest.approx(gain["overall"] - gain["seen"])
    assert found["overall"].hacking is None


def test_seeds_are_averaged_before_units_are_counted():
    runs = [random_arm(seed, 6, scenes=3, chain="previous") for seed in (1, 2, 3)]
    chosen = pd.concat(runs).query("selected")
    wanted = chosen.groupby(["story", "scene"])["seen"].mean().groupby("story").mean()
    assert unit_values(pd.concat(runs))["seen"].tolist() == pytest.approx(wanted.tolist())
    assert compare(pd.concat(runs), random_arm(4, 6, scenes=3, chain="previous")).units == 6


# the 2 x 2


def test_four_cells_by_other_code():
    plain = random_arm(1, 10, images=8)
    sharp = random_arm(2, 10, images=8, better=6, max_enhancement_iterations=4)
    found = four_cells(plain, sharp, k=4).set_index(["metric", "what"])
    cells = {}
    for name, table in (("original", plain), ("enhanced", sharp)):
        for what, k in (("first", 1), ("best", 4)):
            cells[f"{name}, {what}"] = np.array([
                by_hand(g["overall"].tolist(), g["seen"].tolist(), k)
                for _, g in table.groupby("story")])
    of, ob, ef, eb = cells.values()
    effects = {"enhancement": ef - of, "selection": ob - of, "both": eb - of,
               "interaction": (eb - ef) - (ob - of)}
    for what, values in (cells | effects).items():
        row = found.loc[("seen", what)]
        span = stats.ttest_1samp(values, 0).confidence_interval()
        assert [row["mean"], row["low"], row["high"]] == pytest.approx([values.mean(), *span]), what
    assert (found["units"].unique().item(), found["k"].unique().item()) == (10, 4)


@pytest.mark.parametrize("k", [1, 9, (1, 4), 2.5])
def test_four_cells_need_a_k_to_choose_from(k):
    with pytest.raises(ValueError, match="k must be"):
        four_cells(random_arm(1, images=8), random_arm(2, images=8), k=k)


def test_four_cells_know_their_arms():
    plain, sharp = random_arm(1), random_arm(2, max_enhancement_iterations=4)
    with pytest.raises(ValueError, match="0 in original and more in enhanced, got 4 and 0"):
        four_cells(sharp, plain, k=2)


# power


@given(st.sampled_from([0.2, 0.25, 0.4, 0.8, 1.5]))
def test_power_is_the_smallest_number_that_is_enough(effect):
    def chance(units: int) -> float:
        edge, shift = stats.t.ppf(0.975, units - 1), effect * math.sqrt(units)
        return 1 - stats.nct.cdf(edge, units - 1, shift) + stats.nct.cdf(-edge, units - 1, shift)

    units = power(effect)
    assert chance(units) >= 0.8 > chance(units - 1)
    assert power(-effect) == units


def test_power_by_simulation():
    d = np.random.default_rng(0).normal(0.5, 1, (4000, power(0.5)))
    assert (paired_interval(d).p < 0.05).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("rate", [0.45, 0.4, 0.35, 0.3])
def test_losing_is_as_hard_to_see_as_winning(rate):
    assert power(win_rate=rate) == power(win_rate=1 - rate)


@pytest.mark.parametrize("wrong", [
    {}, {"effect": 0}, {"effect": math.nan}, {"effect": math.inf}, {"win_rate": 0.5},
    {"win_rate": 1.0}, {"win_rate": math.nan}, {"effect": 0.3, "win_rate": 0.6},
    {"effect": 0.3, "chance": 1.0}, {"effect": 0.3, "level": 0.0},
])  # fmt: skip
def test_power_refuses_what_has_no_answer(wrong):
    with pytest.raises(ValueError, match="must be"):
        power(**wrong)


def test_the_arm_helper_is_what_it_says():
    table = arm([[[1, 5, 3]], [[9, 2, 4]]])
    assert table.query("selected")["variation"].tolist() == [2, 1]


# verifiers against the truth


@pytest.mark.all
@settings(max_examples=30)
@given(st.lists(st.tuples(SMALL, SMALL), min_size=2, max_size=6))
def test_a_verifier_is_judged_by_what_it_puts_first(pairs):
    scores, right = map(list, zip(*pairs, strict=True))
    runs = arm([[scores]], [[right]], overall_of="pickscore")
    found = verifier_error(runs, truth="seen").set_index(["verifier", "what"])["mean"]
    flat = [0.0] * len(scores)
    for name, by in (("pickscore", scores), ("random", flat), ("oracle", right)):
        picked = by_hand(by, right, len(by))
        assert found[name, "picked"] == pytest.approx(picked)
        assert found[name, "lost"] == pytest.approx(max(right) - picked, abs=1e-12)
        top = by_hand(by, [float(r == max(right)) for r in right], len(by))
        assert found[name, "none better"] == pytest.approx(top)
    assert ("seen", "picked") not in found


def test_what_people_said_can_be_the_truth():
    runs = random_arm(3).assign(rating=lambda t: t["pickscore"].rank())
    found = verifier_error(runs, truth="rating").set_index(["verifier", "what"])
    assert found.loc[("pickscore", "none better"), "mean"] == 1
    assert found.loc[("random", "lost"), "low"] > 0 and found["units"].eq(12).all()


@pytest.mark.parametrize("column", ["pickscore", "rating"])
def test_an_unknown_score_or_truth_makes_no_verdict(column):
    runs = random_arm(3).assign(rating=1.0)
    runs.loc[5, column] = math.nan
    found = verifier_error(runs, truth="rating").set_index(["verifier", "what"])
    assert math.isnan(found.loc[("pickscore", "picked"), "mean"])
    assert "s1" in found.loc[("pickscore", "picked"), "reason"]


def test_verifiers_need_a_choice_and_a_truth():
    with pytest.raises(ValueError, match=r"two images a scene or more, got one for .*s0"):
        verifier_error(random_arm(3, images=1), truth="seen")
    with pytest.raises(ValueError, match="got no column right"):
        verifier_error(random_arm(3))
    chained = random_arm(3, scenes=2, chain="previous")
    with pytest.raises(ValueError, match="not independent"):
        verifier_error(chained, truth="seen", unit="prompt")
    assert verifier_error(chained, truth="seen")["units"].eq(12).all()
