import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench import study
from refimg.generate import ImageRequest
from refimg.pipeline import compose_prompt
from refimg.sandbox.painter import (
    PAINTER_VERSION,
    answer,
    choose_attributes,
    error_rates,
    restated,
)
from refimg.sandbox.world import VOCABULARY, read_prompt
from tests.sampling import sampled

ROOT = Path(__file__).resolve().parent.parent
ARM = {(arm.part, arm.name, arm.effect): arm for arm in study.ARMS}
KEYS = ["part", "arm", "effect", "story", "scene", "variation"]
PLAIN = "A red fox on a beach at dawn. A dog to its left."
TWICE = f"{PLAIN} In short, a scarlet vixen at sunrise."


def within(hits: int, n: int, p: float) -> bool:
    return abs(hits - n * p) <= 4 * math.sqrt(n * p * (1 - p))


# the planted effect


@pytest.mark.parametrize(("prompt", "found"), [
    ("", set()),
    (PLAIN, set()),
    (TWICE, {"subject", "colour", "time"}),
    ("A red fox, scarlet vixen, red fox", set()),
    ("A red fox. A blue fox.", {"subject"}),
    ("A fox.\nA fox", {"subject"}),
    ("A fox, oil painting.\n\nStyle: oil painting.", {"style"}),
    ("A fox at dawn. Match the reference image: a fox at dawn.", set()),
    ("A fox. Not a fox.", set()),
])  # fmt: skip
def test_what_is_restated(prompt, found):
    assert restated(prompt) == found


@pytest.mark.all
def test_a_restated_attribute_fails_as_often_as_planted():
    stated, n = read_prompt(TWICE), 2500
    rates = error_rates(TWICE, 0.2, 0.12)
    assert rates == dict.fromkeys(stated, 0.2) | dict.fromkeys(restated(TWICE), 0.12)
    drawn = [choose_attributes(stated, seed, rates) for seed in range(n)]
    for attribute, value in stated.items():
        wrong = sum(d[attribute] != value for d in drawn)
        assert within(wrong, n, rates[attribute]), attribute
        other = 0.12 if rates[attribute] == 0.2 else 0.2
        assert not within(wrong, n, other), attribute


@pytest.mark.parametrize("settings", sampled([((),), ((0.2,),), ((0.2, None),), ((0.2, 0.2),)], 2))
def test_without_an_effect_the_painter_is_what_it_was(settings):
    for seed in range(4):
        request = ImageRequest(prompt=TWICE, seed=seed)
        chosen = choose_attributes(read_prompt(TWICE), seed, 0.2)
        made = answer(request, 64, *settings)
        assert made == answer(request, 64)
        assert f'"{chosen["colour"]}"'.encode() in made.data


def test_the_effect_changes_nothing_where_nothing_is_restated():
    for seed in range(4):
        request = ImageRequest(prompt=PLAIN, seed=seed)
        assert answer(request, 64, 0.2, 0.0) == answer(request, 64)


def test_rates_by_attribute_must_name_what_is_stated():
    with pytest.raises(KeyError, match="colour"):
        choose_attributes({"colour": "red"}, 1, {"subject": 0.1})


# prompts, stories and arms


@pytest.mark.parametrize("part", ["prompts", "stories"])
def test_units_are_as_described_and_differ(part):
    units = [study.unit(part, number) for number in range(30)]
    assert study.unit(part, 7) == units[7]
    assert len({s.prompt for u in units for s in u.scenes}) == sum(len(u.scenes) for u in units)
    for unit in units:
        said = [read_prompt(scene.prompt) for scene in unit.scenes]
        assert len(said) == (1 if part == "prompts" else 4) and len(said[0]) >= 4
        assert all(len(s) >= 3 for s in said)
        assert len({s["subject"] for s in said}) == 1
        if part == "stories":
            assert set(study.CARRIED) <= set(said[0])
            assert not any({"colour", "style"} & set(s) for s in said[1:])


async def test_the_study_s_director_restates_and_the_sandbox_s_own_does_not():
    from refimg.enhance import enhance_prompt_iterative
    from refimg.sandbox.agents import Critic, Director

    for number in range(25):
        prompt = study.unit("prompts", number).scenes[0].prompt
        agents = study.RestatingDirector(), Director()
        twice, once = [await enhance_prompt_iterative(prompt, director=d, critic=Critic())
                       for d in agents]
        stated = read_prompt(prompt)
        assert restated(once.final_prompt) == set()
        again = restated(twice.final_prompt)
        assert {"subject"} <= again <= set(stated)
        assert again | {"companion", "relation"} >= set(stated)
        assert stated.items() <= read_prompt(twice.final_prompt).items()


def test_each_run_has_a_seed_of_its_own():
    seeds = [study.run_seed(arm, number) for arm in study.ARMS for number in range(200)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.all
@pytest.mark.parametrize(("shown", "again"), [
    ({}, None), ({"subject": "fox", "colour": "red"}, 0.12), ({"subject": "cat"}, 0.12),
])  # fmt: skip
def test_the_chances_are_those_of_the_painter(again, shown):
    stated, n = read_prompt(TWICE), 2000
    chances = study.chances(TWICE, stated, shown, again)
    rates = error_rates(TWICE, 0.2, again)
    drawn = [choose_attributes(stated, seed, rates, shown) for seed in range(n)]
    for (attribute, value), chance in zip(stated.items(), chances, strict=True):
        assert within(sum(d[attribute] == value for d in drawn), n, chance), attribute


def test_no_chances_for_a_prompt_that_says_something_else():
    with pytest.raises(ValueError, match="not"):
        study.chances("A cat.", {"subject": "fox"}, {}, None)


# the table


def check_rows(table: pd.DataFrame, prompts: int, stories: int) -> None:
    """Arms are complete, keys are unique, columns agree with each other and with the texts."""
    assert not table.duplicated(KEYS).any() and table.sandbox.all()
    for key, arm in ARM.items():
        rows = table[(table.part == arm.part) & (table.arm == arm.name)
                     & (table.effect == arm.effect)]
        units, scenes = (prompts, 1) if arm.part == "prompts" else (stories, study.SCENES)
        assert len(rows) == units * scenes * arm.variations, key
        numbers = [f"{arm.part}-{number:03d}" for number in range(units)]
        assert list(dict.fromkeys(rows.story)) == numbers
        seeds = [study.run_seed(arm, number) for number in range(units)]
        assert list(dict.fromkeys(rows.run_seed)) == seeds
        assert (rows.num_variations == arm.variations).all()
        assert (rows.max_enhancement_iterations == arm.iterations).all()
        check_choice(rows)
        check_truth(rows, arm)


def check_choice(rows: pd.DataFrame) -> None:
    """One picture a scene is selected, the best; a warning stands where it is below."""
    for _, scene in rows.groupby(["story", "scene"]):
        picked = scene[scene.selected]
        assert len(picked) == 1 and picked.overall.item() == scene.overall.max()
        below = picked.overall.item() < picked.quality_threshold.item()
        assert (scene.below_threshold == below).all() and (scene.warned == below).all()
    assert set(rows.reference_from) == {"ranked"} and (rows.score_text == "original").all()


def check_truth(rows: pd.DataFrame, arm: study.Arm) -> None:
    """What is stated, restated and right, from the texts and the columns of each attribute."""
    right = rows[[f"right_{a}" for a in VOCABULARY]]
    for row, flags in zip(rows.itertuples(), right.to_numpy(), strict=True):
        stated = read_prompt(row.text)
        known = {a: f for a, f in zip(VOCABULARY, flags, strict=True) if not pd.isna(f)}
        assert known.keys() == stated.keys() and row.stated == len(stated)
        assert row.right == pytest.approx(sum(known.values()) / len(stated))
        assert row.all_right == all(known.values())
        assert row.restated == len(restated(row.sent_prompt) & stated.keys())
        low = 1 - study.ERROR
        assert low - 1e-9 <= row.expected_right - row.planted <= 1 - study.ERROR / 2
        if arm.part == "prompts":
            assert row.expected_right - row.planted == pytest.approx(low)
            assert row.planted == pytest.approx(arm.effect * row.restated / row.stated)
    assert (rows.planted > 0).any() == (arm.effect > 0)
    assert (rows.restated > 0).all() == (arm.name == "enhanced")
    chained = arm.part == "stories"
    assert rows[["kept_subject", "kept_colour"]].notna().all(axis=None) == chained
    assert (rows.chain == ("previous" if chained else "none")).all()


def small(folder: Path) -> pd.DataFrame:
    return study.make(2, 1, folder)


@pytest.mark.all
@pytest.mark.slow
def test_a_killed_study_goes_on_and_makes_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CHUNK", 1)
    code = ("import sys; from pathlib import Path; from bench import study; study.CHUNK = 1; "
            "study.make(2, 1, Path(sys.argv[1]))")
    killed = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", code, killed], cwd=ROOT,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 240
    while len(list(killed.glob("*/*.parquet"))) < 2 and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in killed.glob("*/*.parquet")}
    assert 2 <= len(before) < len(study.jobs(killed, 2, 1))
    tables = small(killed), small(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    for table, name in zip(tables, ("killed", "whole"), strict=True):
        study.save(table, tmp_path / f"{name}.parquet")
        check_rows(table, 2, 1)
    one, two = ((tmp_path / f"{name}.parquet").read_bytes() for name in ("killed", "whole"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()


# the table that is shipped; it was drawn when a reference was announced in other words, which the
# painter does not read

OLD_WORDS = "Match the reference image: keep its subject, style and colours."
NEW_WORDS = ("The reference image is the scene before: keep the look of the subject, the style and "
             "the medium; place, light and framing are those described here.")


@pytest.fixture(scope="module")
def shipped() -> pd.DataFrame:
    return pd.read_parquet(study.TARGET)


@pytest.mark.all
def test_the_shipped_table_is_whole(shipped):
    assert study.PROMPTS >= 200 and study.STORIES >= 100
    check_rows(shipped, study.PROMPTS, study.STORIES)
    assert study.TARGET.stat().st_size <= 1_500_000


def test_the_shipped_table_is_of_this_painter_these_weights_and_these_texts(shipped):
    about = study.about_study() | {"prompts": study.PROMPTS, "stories": study.STORIES}
    assert {**shipped.attrs, "refimg": ""} == {**about, "refimg": ""}
    assert shipped.attrs["painter"] == PAINTER_VERSION
    firsts = shipped[shipped.variation == 1].groupby(["part", "story"])
    for part, number in (("prompts", 3), ("prompts", 199), ("stories", 0), ("stories", 99)):
        unit = study.unit(part, number)
        rows = firsts.get_group((part, f"{part}-{number:03d}"))
        for row in rows.itertuples():
            assert row.text == unit.scenes[row.scene - 1].prompt
            if row.arm != "enhanced":
                said = ("the words of 0.1, in which the table was drawn",) * (row.scene > 1)
                sent = compose_prompt(row.text, unit, row.scene, references=said, legacy=True)
                assert row.sent_prompt == sent


@pytest.mark.all
@pytest.mark.parametrize("part", ["prompts", "stories"])
def test_a_part_of_the_shipped_table_can_be_made_again(shipped, tmp_path, part):
    arm = ARM[part, "enhanced", 0.08]
    path = study.make_part(tmp_path / "part.parquet", arm, range(1))
    made = pd.read_parquet(path)
    same = (shipped.part == arm.part) & (shipped.arm == arm.name) & (shipped.effect == arm.effect)
    kept = shipped[same & (shipped.story == f"{part}-000")].reset_index(drop=True)
    kept["sent_prompt"] = kept.sent_prompt.str.replace(OLD_WORDS, NEW_WORDS, regex=False)
    pd.testing.assert_frame_equal(made, kept, rtol=1e-3, atol=0.05)


def test_the_shares_that_are_right_are_those_to_be_expected(shipped):
    """In each arm, by unit: what is right less what should be is zero but for chance."""
    for key, rows in shipped.groupby(["part", "arm", "effect"]):
        gap = (rows.right - rows.expected_right).groupby(rows.story).mean()
        assert abs(gap.mean()) < 3.5 * gap.std() / math.sqrt(len(gap)), key


@pytest.mark.parametrize("effect", [0.0, 0.08])
@pytest.mark.parametrize("part", ["prompts", "stories"])
def test_the_planted_effects_are_covered(shipped, part, effect):
    found = study.gain(shipped, part, effect)
    assert found["low"] <= found["expected"] <= found["high"], found


def test_no_two_arms_share_their_pictures(shipped):
    counts = Counter(shipped.seed)
    assert sum(count > 1 for count in counts.values()) <= 3
    assert np.isfinite(shipped[["overall", "pickscore", "clip_score", "aesthetic"]]).all(axis=None)


def test_the_table_is_not_in_the_wheel():
    assert "bench" not in json.dumps((ROOT / "MANIFEST.in").read_text("utf-8"))
    assert not list((ROOT / "refimg").rglob("*.parquet"))
