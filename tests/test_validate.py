"""Wrong use of refimg.validate is an error or "cannot tell", and its results say what they are."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimg.validate import (
    Comparison,
    aa_check,
    agreement,
    best_of_k,
    cells_chart,
    compare,
    critic_agreement,
    curve_chart,
    distribution_chart,
    distributions,
    forest_chart,
    four_cells,
    paired_interval,
    pass_rates,
    stop_reasons,
    threshold_errors,
    unit_values,
    verifier_error,
)

from .arms import arm, random_arm
from .sampling import sampled
from .test_view import HOSTILE

A, B = random_arm(1), random_arm(2, better=5)
CHAINED = {"scenes": 3, "chain": "previous"}


def refused(words: str, *args, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        compare(*args, **options)


# what is refused


def test_more_than_a_fifth_of_the_scenes_in_one_arm_only():
    gone = B["story"].isin(["s3", "s4", "s5"])  # of 12
    refused("('s3', 1) only in a", A, B[~gone])
    refused("('s3', 1) only in b", A[~gone], B)
    one = random_arm(1, scenes=2)
    refused("('s0', 2) only in a", one, B)
    with pytest.raises(ValueError, match="only in a"):
        four_cells(A, B[B["story"] != "s3"].assign(max_enhancement_iterations=4), 2)


def test_other_texts():
    other = B.assign(text=B["text"].where(B["story"] != "s5", "something else"))
    refused("a and b must be of the same texts, got others for ('s5', 1)", A, other)
    two = pd.concat([B, other.assign(generation_id="again")])
    refused("got several texts for ('s5', 1)", A, two)


def test_texts_of_the_enhanced_prompts():
    refused("on the same text, got 'enhanced'", A, B.assign(score_text="enhanced"))
    refused("on the same text, got None", A, B.assign(score_text=None))


def test_another_number_of_images():
    single = B[B["selected"]]
    refused("unless matched=False, got images a scene: a 4, b 1", A, single)
    found = compare(A, single, matched=False)
    assert "images a scene: a 4, b 1" in found.notes
    lost = B.drop(B[(B["story"] == "s2") & ~B["selected"]].index[:1])
    refused("images a scene: a 4, b 3 to 4", A, lost)


@pytest.mark.parametrize("pair", [5, (1, 5), (5, 1)])
def test_more_than_there_are(pair):
    refused("k must be at most 4, the images that", A, B, k=pair)


@pytest.mark.parametrize("k", [0, -1, 2.5, "4", (1, 2, 3), (), True, [1, 4]])
def test_a_k_that_is_no_number_of_images(k):
    refused(f"k must be a whole number from 1, a pair of them, or None, got {k!r}", A, B, k=k)


def test_chained_scenes_are_no_units_and_cannot_be_drawn_from():
    a, b = random_arm(1, **CHAINED), random_arm(2, **CHAINED)
    refused("its scenes are not independent", a, b, "prompt")
    refused("its scenes follow other images", a, b, k=2)
    refused("its scenes are not independent", a, b.assign(chain="none"), unit="prompt")
    refused("got chain None", a.assign(chain=None), b.assign(chain=None), unit="prompt")
    assert compare(a, b).units == 12
    with pytest.raises(ValueError, match="follow other images"):
        best_of_k(a)
    with pytest.raises(ValueError, match="follow other images"):
        four_cells(a, b.assign(max_enhancement_iterations=4), k=2, unit="story")


def test_single_scenes_are_units_whatever_the_chain():
    assert compare(A.assign(chain="previous"), B.assign(chain=None), "prompt", k=2).units == 12


def test_the_sandbox_and_the_world():
    refused("a and b must be both from the sandbox, or neither", A, B.assign(sandbox=True))
    mixed = B.assign(sandbox=B["story"] == "s1")
    refused("b must be one arm, got sandbox False, True", A, mixed)


@pytest.mark.parametrize("other", ["pick @ 2 · map", "pick @ 1 · another map"])
def test_other_judges(other):
    words = "a and b: scorer_pickscore must be one scorer, got "
    refused(words, A, B.assign(scorer_pickscore=other))


@pytest.mark.parametrize("setting", [
    {"max_enhancement_iterations": 4}, {"chain": "first"}, {"model": "another"},
    {"num_variations": 8}, {"arm": "b"}, {"effect": 0.08},
])  # fmt: skip
def test_several_arms_in_one_table(setting):
    before = {"model": "one", "arm": "a", "effect": 0.0}
    both = pd.concat([A.assign(**before), random_arm(3).assign(**before | setting)])
    refused(f"a must be one arm, got {next(iter(setting))} ", both, B)


def test_the_same_image_twice():
    words = "a must be without repeated images, got twice: ('r1-0', 's0', 1, 1)"
    refused(words, pd.concat([A, A]), B)


def test_no_choice_or_two():
    refused("a: selected must be true for one image a scene", A.assign(selected=False), B)
    refused("b: selected must be true for one image a scene", A, B.assign(selected=True))
    assert compare(A.assign(selected=False), B.assign(selected=False), k=2).units == 12


def test_no_table_at_all():
    refused("of `runs_table`, got no column generation_id", pd.DataFrame({"overall": [1.0]}), B)
    refused("a must be at least one row, got none", A.iloc[:0], B)
    gaps = B.assign(story=B["story"].where(B["story"] != "s1"))
    refused("b must be complete in generation_id, story, scene, variation, text, got gaps", A, gaps)
    refused("results must be StoryResult objects, got a str", "runs", B)
    refused("results must be of at least one image, got 0 without any", [], B)


def test_other_words():
    refused("unit must be 'story' or 'prompt', got 'scene'", A, B, "scene")
    refused("by must be one of overall, pickscore, seen, got 'beauty'", A, B, k=2, by="beauty")


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_scores_that_are_no_numbers(value):
    seen = B["seen"].where(B["story"] != "s1", value)
    refused("b must be finite in all scores", A, B.assign(seen=seen))


# what cannot be told


def test_one_unit():
    found = compare(A[A["story"] == "s1"], B[B["story"] == "s1"])
    assert found.units == 1
    for d in found.differences:
        assert (d.verdict, d.low, d.high, d.p, d.p_holm, d.sd) == ("cannot tell", *[None] * 5)
        assert d.reason == "one unit says nothing about others"


def test_all_ties():
    for d in compare(A, A.assign(generation_id="again")).differences:
        assert (d.wins, d.ties, d.losses) == (0, 12, 0)
        assert (d.low, d.p, d.p_sign, d.p_wilcoxon, d.skewness) == (None,) * 5
        assert (d.verdict, d.reason) == ("cannot tell", "every pair is a tie")


@pytest.mark.all
def test_the_same_difference_everywhere():
    moved = A.assign(**{m: A[m] + 2 for m in ("overall", "pickscore", "seen")})
    d = compare(A, moved)["seen"]
    assert (d.difference, d.low, d.p) == (pytest.approx(2), None, None)
    assert (d.verdict, d.reason) == ("cannot tell", "all differences are the same")


@pytest.mark.parametrize("k", [None, 2])
def test_a_score_that_is_missing_takes_its_metric_along_and_no_other(k):
    rows = B["selected"] & (B["story"] == "s3")
    found = compare(A, B.assign(seen=B["seen"].mask(rows)), k=k)
    rest = compare(A[A["story"] != "s3"], B[B["story"] != "s3"], k=k)["seen"]
    d = found["seen"]
    assert (d.units, d.missing, found["overall"].units, found["overall"].missing) == (11, 1, 12, 0)
    assert (d.difference, d.low, d.high, d.p, d.wins) == pytest.approx(
        (rest.difference, rest.low, rest.high, rest.p, rest.wins))
    assert found["overall"].worst is None and "left out" not in str(found["overall"])
    assert "1 scene left out, with which the difference is between" in str(d)
    assert d.gaps in found._repr_html_()


def test_what_is_missing_is_bounded_by_its_worst_and_its_best():
    gone = {"a": A["story"] == "s2", "b": B["story"].isin(["s2", "s7"])}
    first, second = (t.assign(seen=t["seen"].mask(gone[n]), right=t["seen"].mask(gone[n]) / 100)
                     for n, t in (("a", A), ("b", B)))
    d = compare(first, second)
    means = [t[t["selected"]].set_index("story") for t in (first, second)]
    for metric, most in (("seen", 100), ("right", 1)):
        one, two = (t[metric].tolist() for t in means)
        known = [(x, y) for x, y in zip(one, two, strict=True) if x == x and y == y]
        for bound, (low, high) in (("worst", (most, 0)), ("best", (0, most))):
            filled = [(high if y != y else y) - (low if x != x else x)
                      for x, y in zip(one, two, strict=True)]
            assert getattr(d[metric], bound) == pytest.approx(sum(filled) / 12)
        assert d[metric].difference == pytest.approx(sum(y - x for x, y in known) / 10)
        assert d[metric].worst < d[metric].difference < d[metric].best
        assert (d[metric].missing, d[metric].units) == (2, 10)


def test_a_scene_that_one_arm_lacks_is_left_out_of_both():
    for one, other in ((A, B[B["story"] != "s3"]), (A[A["story"] != "s3"], B)):
        found, rest = compare(one, other), compare(A[A["story"] != "s3"], B[B["story"] != "s3"])
        assert found.units == 12
        assert all((d.missing, d.units) == (1, 11) for d in found.differences)
        assert [d.low for d in found.differences] == [d.low for d in rest.differences]


def test_a_fifth_of_the_scores_may_be_missing_and_no_more():
    a, b = random_arm(1, scenes=5, chain="none"), random_arm(2, scenes=5, chain="none")
    for gone, is_known in ((range(12), True), (range(13), False)):
        rows = [(s, n) in {(f"s{k}", 1 + k // 12) for k in gone} | ({("s0", 2)} if len(gone) == 13
                else set()) for s, n in zip(b["story"], b["scene"], strict=True)]
        d = compare(a, b.assign(seen=b["seen"].mask(np.array(rows))))["seen"]
        assert (d.low is not None) == is_known and d.missing == len(gone)
    assert d.units == 0 and d.reason.startswith("13 of 60 scenes lack this score, more than 20")


def test_unscored_images_are_not_scored_zero():
    rows = B["story"] == "s3"
    unscored = B.assign(overall=B["overall"].mask(rows), pickscore=B["pickscore"].mask(rows))
    found, rest = compare(A, unscored), compare(A[A["story"] != "s3"], B[~rows])
    assert found["overall"].difference == rest["overall"].difference
    assert found["overall"].missing == 1 and found["seen"].missing == 0
    assert all(d.missing == 1 for d in compare(A, unscored, k=2).differences)


def test_a_missing_scene_score_is_not_averaged_away():
    a, b = random_arm(1, **CHAINED), random_arm(2, **CHAINED)
    gap = b["selected"] & (b["story"] == "s3") & (b["scene"] == 2)
    found = compare(a, b.assign(seen=b["seen"].mask(gap)))["seen"]
    assert (found.missing, found.units) == (1, 12)
    pairs = [t[t["selected"]].set_index(["story", "scene"])["seen"].drop(("s3", 2)) for t in (a, b)]
    own = (pairs[1] - pairs[0]).groupby("story").mean()
    assert found.difference == pytest.approx(own.mean())
    seeds = pd.concat([b.assign(seen=b["seen"].mask(gap)), random_arm(5, **CHAINED)])
    assert compare(a, seeds)["seen"].missing == 1


def test_a_metric_that_one_arm_lacks_is_named():
    found = compare(A, B.drop(columns=["seen", "raw_seen"]))
    assert [d.metric for d in found.differences] == ["overall", "pickscore"]
    assert "not compared, because only one arm has it: seen" in found.notes
    assert any(note.startswith("no metric was held out") for note in found.notes)


# what is said


def test_who_chose_and_who_looked():
    roles = {d.metric: d.selects for d in compare(A, B).differences}
    assert roles == {"overall": True, "pickscore": True, "seen": False}
    unknown = [t.drop(columns=["selected_by", "overall_of"]) for t in (A, B)]
    assert all(d.selects for d in compare(*unknown).differences)
    by = {d.metric: d.selects for d in compare(A, B, k=2, by="seen").differences}
    assert by == {"overall": False, "pickscore": False, "seen": True}
    assert not any(d.selects for d in compare(A, B, k=1).differences)
    single = [t[t["variation"] == 1].assign(selected=True) for t in (A, B)]
    assert not any(d.selects for d in compare(*single).differences)


def test_an_overall_that_did_not_choose_is_held_out():
    rescored = [t.assign(overall_of="pickscore, seen") for t in (A, B)]
    roles = {d.metric: d.selects for d in compare(*rescored).differences}
    assert roles == {"overall": False, "pickscore": True, "seen": False}
    drawn = {d.metric: d.selects for d in compare(*rescored, k=2).differences}
    assert drawn == {"overall": True, "pickscore": True, "seen": True}


def test_truth_is_a_metric_that_looks():
    a, b = (t.assign(right=t["seen"] / 100, all_right=t["seen"] > 60) for t in (A, B))
    found = compare(a, b)
    assert not found["right"].selects and not found["all_right"].selects
    assert found["all_right"].mean_a == pytest.approx(a[a["selected"]]["all_right"].mean())


def test_notes_on_what_weakens_the_result():
    a, b = random_arm(1, scenes=2), random_arm(2, scenes=2)
    assert "prompts of one story are counted as independent" in compare(a, b, "prompt").notes
    assert not any("independent" in note for note in compare(a, b).notes)
    skewed = A.assign(seen=A["seen"] + 400 * (A["story"] == "s1"))
    assert any("one-sided differences in seen" in note for note in compare(A, skewed).notes)


@pytest.mark.all
def test_the_words_follow_the_interval():
    up, down = compare(A, random_arm(1, better=30)), compare(random_arm(1, better=30), A)
    assert up["seen"].verdict == "cannot tell"  # every difference is 30: no spread
    b = random_arm(3, better=40)
    assert (compare(A, b)["seen"].verdict, compare(b, A)["seen"].verdict) == ("higher", "lower")
    assert "higher, +" in str(compare(A, b)) and "lower, -" in str(compare(b, A)["seen"])
    assert down["seen"].difference == pytest.approx(-30)


@pytest.mark.all
@settings(max_examples=4)
@given(st.integers(0, 10_000), st.floats(-20, 20))
def test_turning_the_arms_round_turns_the_signs(seed, better):
    a, b = random_arm(seed, 5), random_arm(seed + 1, 5, better=better)
    there, back = compare(a, b), compare(b, a)
    for one, other in zip(there.differences, back.differences, strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
        assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
        assert (one.p_holm, one.p_sign) == pytest.approx((other.p_holm, other.p_sign))
        assert (one.verdict == "cannot tell") == (one.low <= 0 <= one.high)
    shuffled = b.sample(frac=1, random_state=seed)
    assert compare(a, shuffled) == there


def test_the_tables_given_are_left_as_they_are():
    before = A.copy(deep=True), B.copy(deep=True)
    compare(A, B, k=2), aa_check(A), best_of_k(A), distributions(A), threshold_errors(A)
    pd.testing.assert_frame_equal(A, before[0])
    pd.testing.assert_frame_equal(B, before[1])


def test_indices_of_joined_tables_may_repeat():
    joined = pd.concat([t for _, t in A.reset_index(drop=True).groupby("story")])
    joined.index = [0] * len(joined)
    assert compare(joined, B, k=2) == compare(A, B, k=2)


def test_scores_as_text_or_objects_are_read_as_numbers():
    objects = B.assign(seen=B["seen"].astype(object), selected=B["selected"].astype(object))
    assert compare(A, objects) == compare(A, B)


def test_a_comparison_is_frozen_and_goes_through_json():
    found = compare(A, B.assign(seen=np.nan), k=(1, 4))
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValueError):
        found.units = 3
    assert found.frame()["verdict"].tolist() == [d.verdict for d in found.differences]


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.alts: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("img", "br"):
            self.alts += [value for name, value in attrs if name == "alt"]
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(html) -> Balanced:
    parser = Balanced()
    parser.feed(str(html))
    assert parser.open == []
    return parser


OWN_TAGS = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "img", "span", "strong",
            "figure", "figcaption", "bdi"}  # fmt: skip


@pytest.mark.parametrize("name", sampled(HOSTILE, 11))
def test_names_of_strangers_are_text(name):
    bad = {"seen": name, "raw_seen": f"raw_{name}"}
    a, b = (t.rename(columns=bad).assign(story=name + t["story"], arm=name) for t in (A, B))
    found = compare(a, b.assign(**{name: np.nan}))
    cells = four_cells(a, b.assign(max_enhancement_iterations=4), 2)
    for html in (found._repr_html_(), forest_chart(found), curve_chart(best_of_k(a)),
                 distribution_chart(a), cells_chart(cells)):
        assert read(html).tags <= OWN_TAGS


@pytest.mark.parametrize("sandbox", sampled([True, False], 2))
def test_everything_says_whether_it_is_the_sandboxs(sandbox):
    a, b = A.assign(sandbox=sandbox), B.assign(sandbox=sandbox, max_enhancement_iterations=4)
    found = compare(a, b)
    tables = [found.frame(), best_of_k(a), four_cells(a, b, 2), distributions(a), pass_rates(a),
              stop_reasons(a), agreement(a), critic_agreement(a), verifier_error(a, "seen")]
    assert all((table["sandbox"] == sandbox).all() for table in tables)
    shown = [found._repr_html_(), forest_chart(found), curve_chart(best_of_k(a)),
             distribution_chart(pd.concat([a, b])), cells_chart(four_cells(a, b, 2))]
    assert all(("sandbox" in str(html)) == sandbox for html in shown)
    assert ("sandbox" in str(found)) == sandbox


def test_charts_say_in_words_what_they_show():
    found, curve = compare(A, B), best_of_k(A)
    cells = four_cells(A, B.assign(max_enhancement_iterations=4), 2)
    for html in (forest_chart(found), curve_chart(curve), distribution_chart(A)):
        assert len(read(html).alts) == 1
    chosen = cells.set_index(["metric", "what"]).loc[("seen", "selection")]
    span = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*chosen[["mean", "low", "high"]])
    assert f"seen, selection: {span}" in read(cells_chart(cells)).alts[0]
    ends = curve[curve["metric"] == "seen"]["mean"].iloc[[0, -1]]
    assert "seen {:.2f} to {:.2f}".format(*ends) in read(curve_chart(curve)).alts[0]
    assert str(found["seen"]) in read(forest_chart(found)).alts[0]


@pytest.mark.parametrize("missing", [None, np.nan])
def test_an_arm_whose_rounds_are_not_known_is_shown_all_the_same(missing):
    unknown = A.assign(max_enhancement_iterations=missing)
    assert "seen, iterations: unknown: median" in read(distribution_chart(unknown)).alts[0]
    assert len(distributions(unknown)) == len(distributions(A))


def test_charts_of_what_cannot_be_told():
    nothing = A.assign(seen=np.nan)
    assert "cannot tell" in read(forest_chart(compare(nothing, B))).alts[0]
    assert len(read(curve_chart(best_of_k(nothing[nothing["story"] == "s1"]))).alts) == 1
    assert len(read(distribution_chart(nothing)).alts) == 1
    cells = four_cells(nothing, B.assign(max_enhancement_iterations=4), 2)
    assert "seen, selection: –;" in read(cells_chart(cells)).alts[0]


# the same arm twice


def test_one_arm_by_halves_and_by_runs():
    found = aa_check(random_arm(1, 40, images=8))
    assert (found.k, found.units) == ((4, 4), 40)
    assert {d.verdict for d in found.differences} == {"cannot tell"}
    runs = pd.concat([random_arm(s, 40, scenes=3, chain="previous") for s in (1, 2)])
    found = aa_check(runs)
    assert found == compare(runs[runs["generation_id"].str.startswith("r1")],
                            runs[runs["generation_id"].str.startswith("r2")])


@pytest.mark.parametrize("table", [random_arm(1, images=1), random_arm(1, **CHAINED)])
def test_an_arm_that_cannot_be_split(table):
    with pytest.raises(ValueError, match="two runs of every story"):
        aa_check(table)


def test_seven_images_make_halves_of_three():
    assert aa_check(random_arm(1, images=7), "prompt").k == (3, 3)


# distributions


def test_scenes_that_pass():
    table = arm([[[10, 20]], [[30, 5]], [[49, 50]], [[np.nan, np.nan]]])
    table.loc[6, "selected"] = True
    found = pass_rates(table).iloc[0]
    assert found[["scenes", "unscored", "pass 20", "pass 30", "pass 40", "pass 50"]].tolist() == [
        4, 1, 3, 2, 1, 1]


def test_distributions_by_arm():
    both = pd.concat([A.assign(arm="plain"), B.assign(arm="sharp", seen=np.nan)])
    found = distributions(both).set_index(["arm", "metric"])
    assert found.loc[("plain", "overall"), "mean"] == pytest.approx(A["overall"].mean())
    assert found.loc[("plain", "overall"), "selected"] == pytest.approx(
        A[A["selected"]]["overall"].mean())
    row = found.loc[("sharp", "seen")]
    assert (row["unscored"], row["images"]) == (48, 48) and np.isnan(row["mean"])


@pytest.mark.parametrize(("change", "wrong"), [
    ({}, 0), ({"below_threshold": False}, 1), ({"below_threshold": True}, 2),
    ({"below_threshold": None}, 3), ({"warned": False}, 1), ({"warned": True}, 3),
    ({"quality_threshold": 10.0}, 1),
])  # fmt: skip
def test_every_wrong_warning_is_found(change, wrong):
    table = arm([[[10, 20]], [[30, 5]], [[49, 50]], [[np.nan, np.nan]]])
    table.loc[6, "selected"] = True
    expected = {"below_threshold": {False: 2, True: 3, None: 3}}.get(next(iter(change), ""), {})
    wrong = expected.get(change.get("below_threshold", 0), wrong)
    assert len(threshold_errors(table.assign(**change))) == wrong


def test_a_threshold_must_be_known():
    with pytest.raises(ValueError, match="got none for 12 scenes"):
        threshold_errors(A.assign(quality_threshold=None))


def test_rounds_are_counted_once_a_scene():
    both = pd.concat([A.assign(arm="plain"),
                      B.assign(arm="sharp", iterations=2, stop_reason="threshold")])
    found = stop_reasons(both)
    assert found[["arm", "iterations", "stop_reason", "scenes"]].to_numpy().tolist() == [
        ["plain", 0, "skipped", 12], ["sharp", 2, "threshold", 12]]


def test_agreement_within_scenes_by_hand():
    table = arm([[[1, 2, 3, 4]], [[10, 20, 30, 40]]], [[[2, 1, 3, 4]], [[4, 3, 2, 1]]])
    row = agreement(table).set_index(["one", "other"]).loc[("pickscore", "seen")]
    span = paired_interval([0.8, -1.0])
    assert [row["correlation"], row["low"], row["high"]] == pytest.approx([*span[:3]])
    assert (row["same winner"], row["by chance"], row["scenes"]) == (0.5, 0.25, 2)


def test_agreement_with_ties_and_gaps():
    table = arm([[[1, 2, 2]], [[1, 2, 3]], [[5, 5, 5]]],
                [[[3, 9, 4]], [[np.nan] * 3], [[1, 2, 3]]])
    row = agreement(table).set_index(["one", "other"]).loc[("pickscore", "seen")]
    assert row["scenes"] == 1 and row["same winner"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_the_critic_and_the_images():
    scores = np.random.default_rng(0).uniform(20, 80, (30, 1, 4))
    table = arm(scores).assign(critic_score=np.repeat(scores.mean((1, 2)), 4) / 2)
    row = critic_agreement(table, "prompt").iloc[0]
    assert (row["correlation"], row["units"]) == (pytest.approx(1), 30)
    blind = critic_agreement(table.assign(critic_score=70.0)).iloc[0]
    assert np.isnan(blind["correlation"]) and blind["reason"] == "all units have the same score"
    none = critic_agreement(arm(scores)).iloc[0]
    assert np.isnan(none["low"]) and none["reason"].startswith("no score in s0")
    few = critic_agreement(table[table["story"].isin(["s1", "s2", "s3"])]).iloc[0]
    assert few["reason"] == "3 units; at least 4 are needed"


def test_unit_values_of_a_chain_are_means_over_scenes():
    table = arm([[[1, 3], [5, 2]], [[4, 4.5], [0, 1]]], chain="previous")
    assert unit_values(table)["overall"].tolist() == [4.0, 2.75]


# one measure a metric


def weighed(table, made: str = "1 pickscore", where=slice(None)):
    """The table, its overall made of that where `where` says."""
    made_of = pd.Series("0.5 pickscore + 0.5 seen", table.index)
    made_of[where] = made
    return table.assign(overall_from=made_of)


SOME = A["story"] == "s3"
MIXED = weighed(A, "1 pickscore", SOME)
WHY = ("made of other weights or scorers in (runs, 's0' scene 1: 0.5 pickscore + 0.5 seen), "
       "(runs, 's3' scene 1: 1 pickscore)")


@pytest.mark.parametrize("k", [None, 2])
def test_overalls_made_in_two_ways_are_not_compared(k):
    found, plain = compare(weighed(A), weighed(B, "1 seen"), k=k), compare(A, B, k=k)
    d = found["overall"]
    assert (d.verdict, d.difference, d.mean_a, d.p_holm) == ("cannot tell", None, None, None)
    assert d.reason == ("made of other weights or scorers in (a, 's0' scene 1: 1 pickscore), "
                        "(b, 's0' scene 1: 1 seen)")
    assert found["seen"].low == plain["seen"].low and found["seen"].hacking is None
    assert compare(weighed(A), weighed(B), k=k) == plain
    assert compare(weighed(A), B, k=k) == compare(A, B.assign(overall_from=None), k=k) == plain


def test_overalls_made_in_two_ways_in_one_arm_of_two():
    assert compare(MIXED, MIXED.assign(generation_id="b"))["overall"].reason.startswith("made of")
    cells = four_cells(MIXED, B.assign(max_enhancement_iterations=4), 2).set_index("metric")
    assert cells.loc["overall", "mean"].isna().all() and cells.loc["seen", "mean"].notna().all()
    assert cells.loc["overall", "reason"].str.startswith("made of other weights").all()
    assert aa_check(MIXED)["overall"].low is None and aa_check(MIXED)["seen"].low is not None


@pytest.mark.parametrize(("function", "key", "number"), [
    (best_of_k, "metric", "mean"), (agreement, "one", "correlation"),
    (lambda t: verifier_error(t, "seen"), "verifier", "mean"),
    (lambda t: critic_agreement(t.assign(critic_score=t["seen"].groupby(t["story"]).transform(
        "mean"))), "metric", "correlation"),
])  # fmt: skip
def test_one_arm_gives_no_number_for_a_mixed_overall(function, key, number):
    found, plain = (function(t).set_index(key) for t in (MIXED, A))
    assert found.loc[["overall"], number].isna().all()
    assert set(found.loc[["overall"], "reason"]) == {WHY}
    others = found.index != "overall"
    pd.testing.assert_frame_equal(found[others], plain[others])


def test_mixed_overalls_agree_with_nothing():
    assert agreement(MIXED).set_index("one").loc["overall", "same winner"].isna().all()


def test_charts_of_a_mixed_overall():
    told = read(forest_chart(compare(MIXED, B))).alts[0]
    assert "overall: cannot tell, made of other weights or scorers in (a, " in told
    assert "overall" in read(curve_chart(best_of_k(MIXED))).alts[0]
    cells = four_cells(MIXED, B.assign(max_enhancement_iterations=4), 2)
    assert "overall, selection: –;" in read(cells_chart(cells)).alts[0]


def test_unit_values_say_why_there_is_no_overall():
    with pytest.warns(UserWarning, match=re.escape(f"no overall: {WHY}")):
        found = unit_values(MIXED)
    assert found["overall"].isna().all()
    pd.testing.assert_frame_equal(found[["seen"]], unit_values(A)[["seen"]])


@pytest.mark.parametrize("function", [
    unit_values, best_of_k, agreement, critic_agreement, aa_check,
    lambda t: verifier_error(t, "seen"), lambda t: compare(t, t), lambda t: four_cells(t, t),
])  # fmt: skip
def test_two_checkpoints_under_one_name(function):
    other = A["scorer_pickscore"].mask(SOME, "pick @ 2 · map")
    with pytest.raises(ValueError, match="scorer_pickscore must be one scorer, got pick @ 1"):
        function(A.assign(scorer_pickscore=other))


def test_a_person_chose_some_scenes():
    people = B.assign(selected_by=B["selected_by"].mask(SOME, "a person"))
    found, plain = compare(A, people), compare(A, B)
    assert found.differences == plain.differences
    assert set(found.notes) - set(plain.notes) == {"1 scene was chosen by a person"}
    assert "2 scenes were chosen by a person" in compare(people, people).notes
    assert compare(A, people, k=2) == compare(A, B, k=2)
    bare = [t.drop(columns=["seen", "raw_seen"]) for t in (A, people)]
    assert any(note.startswith("no metric was held out") for note in compare(*bare).notes)
    every = [t.assign(selected_by="a person") for t in (A, B)]
    assert not any(d.selects for d in compare(*every).differences)


def test_one_name_for_two_stories():
    long = random_arm(5, scenes=2)
    with pytest.raises(ValueError, match=r"title of one story, got several.*s0"):
        unit_values(pd.concat([random_arm(1), long]))
    assert len(unit_values(pd.concat([random_arm(2, scenes=2), long]))) == 12
    told = random_arm(1).assign(story_id="ink"), random_arm(2).assign(story_id="oil")
    refused("b: story must be the title of one story", A, pd.concat(told))
    assert compare(*told).units == 12
    lost = long[(long["story"] != "s1") | (long["scene"] == 1)]
    both = pd.concat([random_arm(2, scenes=2), lost]).assign(story_id="one")
    assert len(unit_values(both)) == 12


@pytest.mark.parametrize(("plain", "sharp", "fits"), [
    ("0", "4", True), (0, "4", True), (None, None, True), (np.nan, 4, True), (None, 0, False),
    ("4", "4", False), ("0", "0", False),
])  # fmt: skip
def test_rounds_may_be_text(plain, sharp, fits):
    a, b = (t.assign(max_enhancement_iterations=n) for t, n in ((A, plain), (B, sharp)))
    if fits:
        assert len(four_cells(a, b, 2))
    else:
        with pytest.raises(ValueError, match="must be 0 in original"):
            four_cells(a, b, 2)
