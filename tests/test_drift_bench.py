"""The drift study: its stories say what they should, and its figures count what is true."""

from __future__ import annotations

import pandas as pd
import pytest

from bench import drift
from refimg.sandbox.world import read_prompt

PLAIN, GAP = drift.DEFAULT, drift.DEFAULT._replace(gap="gap")


def row(scene: int, k: int, colour: str, selected: bool, **scores: float) -> dict:
    metrics = {"pickscore": 50.0, "clip_score": 50.0, "aesthetic": 50.0, "consistency": 50.0}
    return {"arm": PLAIN.name, "story": 1, "scene": scene, "k": k, "selected": selected,
            "subject": "fox", "colour": colour, "style": "oil", "right": 1.0} | metrics | scores


@pytest.mark.parametrize("number", range(3))
def test_only_the_first_scene_states_colour_and_style(number):
    first, *later = [read_prompt(scene.prompt) for scene in drift.story_of(number, PLAIN).scenes]
    assert set(drift.CARRIED) <= first.keys() and len(later) == drift.SCENES - 1
    for said in later:
        assert said["subject"] == first["subject"] and not {"colour", "style"} & said.keys()


def test_arms_share_their_stories_and_seeds():
    first, *others = [drift.story_of(7, arm) for group in drift.arms_of("all") for arm in group]
    prompts = [scene.prompt for scene in first.scenes]
    assert all([scene.prompt for scene in story.scenes] == prompts for story in others)
    assert {drift.pipeline_of(7, arm).seed for arm in drift.MAIN} == {drift.SEED + 7}
    names = [arm.name for group in drift.arms_of("all") for arm in group]
    assert len(set(names)) == len(names)


def test_a_gap_is_a_scene_that_shows_nothing():
    story, whole = drift.story_of(3, GAP), drift.story_of(3, PLAIN._replace(gap="no gap"))
    assert [len(story.shows(n)) for n in (1, 2, 3)] == [1, 0, 1]
    assert "subject" not in read_prompt(story.scenes[1].prompt)
    assert story.scenes[2].prompt == whole.scenes[2].prompt


def test_kept_is_told_by_the_selected_image_of_scene_1():
    rows = [row(1, 1, "red", False), row(1, 2, "blue", True),
            row(2, 1, "blue", True), row(2, 2, "red", False)]
    table = drift.with_kept(pd.DataFrame(rows))
    assert table.kept.tolist() == [False, True, True, False]
    assert table.carried.tolist() == pytest.approx([2 / 3, 1, 1, 2 / 3])


def test_the_auc_counts_pairs_of_one_scene_at_a_weight():
    rows = [row(1, 1, "red", True),
            row(2, 1, "red", True, consistency=90.0, clip_score=40.0),
            row(2, 2, "blue", False, consistency=10.0, clip_score=60.0),
            row(3, 1, "red", True), row(3, 2, "blue", False)]
    table = drift.with_kept(pd.DataFrame(rows))
    found = [drift.auc(table, weight, "kept")[1] for weight in (0.0, 0.25)]
    assert found == pytest.approx([(0 + 0.5) / 2, (1 + 0.5) / 2])
