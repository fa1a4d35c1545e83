"""Files of 0.1, see tests/data/v0_1: results load, a broken run resumes from its journal."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from refimg.engine.decisions import vetoes as held_vetoes
from refimg.pipeline import (
    Pipeline,
    Scene,
    Story,
    StoryResult,
    choose,
    human_agreement,
    preferences,
    rescore,
)
from refimg.storage.files import read_image
from refimg.storage.journal import Journal

from .fakes import FakeChat, FakeImages, FakeScorer, critique, picture

OLD = Path(__file__).parent / "data" / "v0_1"
RESULTS = ("plain", "choices", "reruns")


def load(name: str) -> StoryResult:
    return StoryResult.load(OLD / name / "run.json")


# what people did to a result, as this version keeps it: the only place to change with the record


def choices(result: StoryResult) -> list[tuple[int, int, str]]:
    """Scene, variation and reason of each choice that holds, in order."""
    held = [e for s in result.scenes for e in result.events_since_drawn(s.scene)
            if e.kind == "choose"]
    return [(event.scene, event.variation, event.reason) for event in held]


def vetoes(result: StoryResult) -> list[tuple[int, int, str]]:
    """Scene, variation and reason of each veto that holds, in order."""
    held = [e for s in result.scenes for e in held_vetoes(result, s.scene).values()]
    return [(event.scene, event.variation, event.reason) for event in held]


def reruns(result: StoryResult) -> dict[int, int]:
    """How often each scene was drawn again."""
    counts = {s.scene: result.times_rerun(s.scene) for s in result.scenes}
    return {scene: times for scene, times in counts.items() if times}


def rescores(result: StoryResult) -> list[tuple[list[str] | None, dict | None, list[int]]]:
    """Scorers, weights and the scenes whose reference changed, of each rescoring in order."""
    found = [event.after for event in result.history if event.kind == "rescore"]
    names = [r["scorers"] and [s["name"] for s in r["scorers"]] for r in found]
    return [(n, r["weights"], r["changed"]) for n, r in zip(names, found, strict=True)]


# results


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_loads_with_its_images(name):
    result = load(name)
    assert result.generation_id == name and result.sandbox
    assert result.references == [scene.reference for scene in result.scenes]
    for scene in result.scenes:
        assert scene.reference.is_absolute() and len(scene.variations) == 3
        assert [v.image.image_path for v in scene.variations if v.selected] == [scene.reference]
        for v in scene.variations:
            assert read_image(v.image.image_path).size == (v.image.width, v.image.height)
            assert hashlib.sha256(v.image.image_path.read_bytes()).hexdigest() == v.image.sha256


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_tells_what_it_was_made_by(name):
    result = load(name)
    assert result.versions["refimg"] == "0.1.0"
    assert [scene.prompt for scene in result.scenes] == [s.prompt for s in result.story.scenes]
    given = {"num_variations": 3, "max_enhancement_iterations": 2, "seed": 7, "chain": "previous",
             "quality_threshold": 30.0, "score_text": "original", "aspect_ratio": "16:9",
             "director": "sandbox-director", "image_model": "sandbox-painter"}
    assert {key: result.settings[key] for key in given} == given
    assert [s["name"] for s in result.settings["scorers"]] == [
        "pickscore", "clip_score", "aesthetic"]


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_of_a_result(name):
    result = load(name)
    table, iterations = result.frame(), result.iterations_frame()
    head = ["generation_id", "scene", "variation", "rank", "selected", "overall"]
    assert list(table)[:6] == head and len(table) == 3 * len(result.scenes)
    assert table.groupby("scene")["rank"].apply(sorted).tolist() == [[1, 2, 3]] * len(result.scenes)
    assert table["selected"].sum() == len(result.scenes)
    assert table["seed"].notna().all() and table["overall"].between(0, 100).all()
    assert set(iterations["scene"]) == set(table["scene"])
    assert iterations.groupby("scene")["best"].sum().eq(1).all()


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_goes_through_a_file_of_today(name, tmp_path):
    shutil.copytree(OLD / name, tmp_path / name)
    old = StoryResult.load(tmp_path / name / "run.json")
    old.save(tmp_path / name / "again.json")
    assert StoryResult.load(tmp_path / name / "again.json") == old
    assert str(tmp_path) not in (tmp_path / name / "again.json").read_text("utf-8")


def test_a_plain_result_has_no_history():
    result = load("plain")
    assert (choices(result), vetoes(result), reruns(result), rescores(result)) == ([], [], {}, [])
    assert [s.reference_from for s in result.scenes] == ["ranked"] * 3
    assert all(v.rank == 1 for s in result.scenes for v in s.variations if v.selected)


def test_what_was_decided_is_kept():
    result = load("choices")
    assert choices(result) == [
        (1, 2, "the coat is redder"), (2, 2, "after all, it is the best"),
    ]
    assert vetoes(result) == [(1, 1, "no sea"), (2, 3, "blurred")]
    assert [s.reference_from for s in result.scenes] == ["human", "human"]
    assert result.scenes[1].stale and not result.scenes[0].stale
    assert not any("stale" in warning for s in result.scenes for warning in s.warnings)
    lifted = result.history[1]
    assert (lifted.kind, lifted.scene, lifted.variation) == ("veto", 2, 2)
    assert lifted.after["variation"] == 1 and lifted.at is None


def test_who_preferred_what_is_kept():
    pairs = preferences(load("choices")).sort_values(["scene", "preferred", "other"])
    assert pairs[["scene", "by"]].value_counts().to_dict() == {
        (1, "choice"): 2, (1, "veto"): 1, (2, "choice"): 2, (2, "veto"): 1}
    assert pairs.loc[pairs["scene"] == 2].groupby("by")["blind"].all().all()
    assert set(human_agreement(load("choices"))["pairs"]) == {6}
    before = preferences(load("reruns"))
    assert (before["scene"] == 3).sum() == 3 and (before["scene"] == 1).sum() == 2


def test_what_was_drawn_and_scored_again_is_kept():
    result = load("reruns")
    assert reruns(result) == {2: 1, 3: 3}
    assert rescores(result) == [
        (None, {"pickscore": 0, "clip_score": 0, "aesthetic": 1}, [2]),
        (["clip_score", "aesthetic"], None, []),
    ]
    assert choices(result) == [(1, 2, "the coat is redder")] and vetoes(result) == []
    assert result.scenes[1].prompt == "the keeper in a red coat on a beach, in fog"
    metrics = [set(s.variations[0].scores.metrics) for s in result.scenes]
    assert metrics == [{"clip_score", "aesthetic"}] * 2 + [{"pickscore", "clip_score", "aesthetic"}]


async def test_an_old_result_is_decided_scored_and_drawn_again(tmp_path):
    shutil.copytree(OLD / "reruns", tmp_path / "run")
    old, images = StoryResult.load(tmp_path / "run" / "run.json"), FakeImages()
    chosen = choose(old, 2, 1, "the beach is wider")
    assert choices(chosen) == [*choices(old), (2, 1, "the beach is wider")]
    scored = await rescore(chosen, [FakeScorer()])
    assert len(rescores(scored)) == 3
    p = Pipeline(FakeChat(), FakeChat([critique(90)]), images, [FakeScorer()],
                 num_variations=1, max_enhancement_iterations=1, chain="previous")
    again = await p.rerun(scored, 3)
    assert len(images.requests) == 1 and reruns(again) == {2: 1, 3: 4}
    assert images.requests[0].references == (chosen.references[1],)


# the journal of a run that was broken off


TALE = Story(
    title="Three places",
    consistency_markers={"style": "watercolor", "mood": "calm"},
    brand="a paper mill",
    scenes=[
        Scene(prompt='a lighthouse, with "OPEN" on its door'),
        Scene(prompt="a harbour at dusk", continuity_note="the same coast",
              consistency_guideline="one light, from the left"),
        Scene(prompt="a forest, 3 deer", transition_note="the path leads inland"),
    ],
)
PLACES = ("lighthouse", "harbour", "forest")


def write(messages, schema, number):
    """A director whose answer follows from what it is asked."""
    asked = " ".join(m.content for m in messages)
    place = next(name for name in PLACES if name in asked)
    return f"a wide view of a {place} at dawn, version {len(asked)}"


def criticise(messages, schema, number):
    """A critic who needs a repair turn for the harbour."""
    asked = " ".join(m.content for m in messages)
    bad = "harbour" in asked and not any(m.role == "assistant" for m in messages)
    return critique(70, completeness="many") if bad else critique(70)


def draw(request, number):
    """The image of a slot: the same bytes for the same scene and variation."""
    scene, variation = (int(p[-2:].lstrip("0_v")) for p in request.slot.split("/")[:2])
    return picture(60 * scene + 20 * variation)


COLUMNS = "output_dir", "generation_id", "slot", "model", "request"


def key(row: dict[str, Any]) -> str:
    """The key of a journaled call."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def moved(folder: Path, output: Path) -> list[dict[str, Any]]:
    """The rows of the old journal, which now stands in `folder` and is about `output`."""
    shutil.copytree(OLD / "journal" / "journal", folder)
    with closing(sqlite3.connect(folder / "journal.db")) as database:
        lines = database.execute(f"SELECT key, {', '.join(COLUMNS)} FROM calls").fetchall()
        rows = {old: dict(zip(COLUMNS, values, strict=True)) for old, *values in lines}
        assert {old: key(row) for old, row in rows.items()} == {old: old for old in rows}
        for old, row in rows.items():
            row["output_dir"] = str(output)
            change = "UPDATE calls SET key = ?, output_dir = ? WHERE key = ?"
            database.execute(change, (key(row), row["output_dir"], old))
        database.commit()
    return list(rows.values())


@pytest.mark.parametrize("with_images", [True, False])
async def test_a_broken_run_of_0_1_pays_only_for_what_is_missing(tmp_path, with_images):
    output = (tmp_path / "images").resolve()
    assert len(moved(tmp_path / "journal", output)) == 21
    if with_images:
        shutil.copytree(OLD / "journal" / "images", output)
    chats = FakeChat(write, name="fake-director"), FakeChat(criticise, name="fake-critic")
    images = FakeImages(draw, name="fake-images", takes_negative_prompt=True)
    p = Pipeline(*chats, images, [FakeScorer()], num_variations=2, max_enhancement_iterations=2,
                 seed=7, chain="previous", journal=Journal(tmp_path / "journal"))
    result = await p.run(TALE, generation_id="broken", output_dir=output)
    assert [len(chat.calls) for chat in chats] == [0, 0]
    paid = [f"broken_scene_{slot}/a1" for slot in ("02/v2", "03/v1", "03/v2")]
    assert sorted(r.slot for r in images.requests) == paid
    names = [f"broken_scene_0{n}_v{k}.png" for n in (1, 2, 3) for k in (1, 2)]
    assert sorted(path.name for path in output.iterdir()) == names
    assert [s.reference.name for s in result.scenes] == names[1::2]
    await p.run(TALE, generation_id="broken", output_dir=output)
    assert len(images.requests) == 3 and [len(chat.calls) for chat in chats] == [0, 0]
