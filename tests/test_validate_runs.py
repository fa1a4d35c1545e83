"""Where runs tables come from: results, files and images that something else made."""

from __future__ import annotations

import json
import shutil
import warnings
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from refimg.pipeline import Pipeline, Scene, Story, StoryResult, choose, rescore
from refimg.score import RawScore
from refimg.validate import (
    aa_check,
    compare,
    critic_agreement,
    four_cells,
    load_runs,
    runs_table,
    score_csv,
    stop_reasons,
    threshold_errors,
    unit_values,
)

from .fakes import FakeImages, FakeScorer, critic, director, picture

pytestmark = pytest.mark.filterwarnings("error")

RED = FakeScorer()
DARK = FakeScorer("clip_score", value=lambda image, text: 255.0 - image.getpixel((0, 0))[0])
NOBODY = FakeScorer("vqa_score", value=lambda image, text: RawScore(None, "no weights"))


async def made(folder: Path, name: str = "run", scenes: int = 3, **over) -> StoryResult:
    """A run whose images have the shades that `shades` says, else brighter each time."""
    shades = over.pop("shades", None)
    script = (lambda request, n: picture(shades[(n - 1) % len(shades)])) if shades else None
    options = {"scorers": [RED], "num_variations": 2, "chain": "none", "seed": 3} | over
    images = options.pop("images", None) or FakeImages(script)
    story = Story(title=options.pop("title", ""),
                  scenes=[Scene(prompt=f"view {n}") for n in range(1, scenes + 1)])
    p = Pipeline(director(), critic(70, 80, 90), images, max_concurrency=1, **options)
    return await p.run(story, output_dir=folder / "images", generation_id=name)


async def test_a_row_says_what_its_run_was(tmp_path):
    result = await made(tmp_path, max_enhancement_iterations=2, quality_threshold=5.0)
    table = runs_table(result)
    assert len(table) == 6 and table["selected"].sum() == 3
    row, scene = table.iloc[3], result.scenes[1]
    settings = ("chain", "max_enhancement_iterations", "score_text", "num_variations", "run_seed",
                "quality_threshold", "sandbox", "iterations", "stop_reason", "reference_from")
    assert [row[name] for name in settings] == [
        "none", 2, "original", 2, 3, 5.0, False, scene.enhancement.total_iterations,
        scene.enhancement.stop_reason, "ranked"]
    assert row["text"] == "view 2" and row["critic_score"] == scene.enhancement.final_score.overall
    assert row["story"] == sha256(b"view 1\nview 2\nview 3").hexdigest()[:12]
    assert row["refimg"] == result.versions["refimg"] and row["path"].endswith(".png")
    assert row["scorer_pickscore"] == "fake-model · fake-identity"
    assert row["overall"] == row["pickscore"] == pytest.approx(row["raw_pickscore"] * 100 / 255)
    assert not table["below_threshold"].any() and not table["warned"].any()


async def test_a_title_names_the_story(tmp_path):
    assert set(runs_table(await made(tmp_path, title=" Views "))["story"]) == {"Views"}


async def test_what_has_no_score_is_nan_and_a_number_all_the_same(tmp_path):
    table = runs_table([await made(tmp_path, scorers=[RED, NOBODY])])
    assert table["vqa_score"].dtype == table["raw_vqa_score"].dtype == float
    assert table["vqa_score"].isna().all() and table["overall"].notna().all()
    unscored = runs_table(await made(tmp_path, "bare", scorers=[]))
    assert unscored["overall"].isna().all() and set(unscored["reference_from"]) == {"first"}
    assert unscored["below_threshold"].isna().all() and len(threshold_errors(unscored)) == 0


async def test_a_scene_without_an_image_is_named(tmp_path):
    def script(request, number):
        return RuntimeError("no") if "view 2" in request.prompt else picture(10 * number)

    result = await made(tmp_path, images=FakeImages(script), max_enhancement_iterations=0)
    with pytest.warns(UserWarning, match=r"not in the table: '\w{12}' scene 2 \(run\)"):
        table = runs_table(result)
    assert set(table["scene"]) == {1, 3}
    with pytest.raises(ValueError, match=r"2\) only in b"):
        compare(table, runs_table(await made(tmp_path, "whole", max_enhancement_iterations=0)))


async def test_the_warnings_of_runs_are_those_of_their_threshold(tmp_path):
    runs = [await made(tmp_path, f"t{t}", scenes=6, quality_threshold=float(t),
                       shades=[20, 60, 90, 30, 0, 10, 200, 255, 51, 51, 130, 120])
            for t in (0, 10, 20, 35, 51, 100)]
    table = runs_table(runs)
    assert table["warned"].any() and not table["warned"].all()
    assert len(threshold_errors(table)) == 0
    assert len(threshold_errors(table.assign(warned=~table["warned"]))) == 36


async def test_who_selected_is_known_after_other_scorers(tmp_path):
    result = await made(tmp_path, scorers=[RED])
    looked = await rescore(result, [RED, DARK], reselect=False)
    table = runs_table(looked)
    assert set(table["selected_by"]) == {"pickscore"}
    assert set(table["overall_of"]) == {"pickscore, clip_score"}
    again = runs_table(await rescore(looked, [RED, DARK], {"pickscore": 0, "clip_score": 1}))
    assert set(again["selected_by"]) == set(again["overall_of"]) == {"clip_score"}
    light = await rescore(again_result := await rescore(result, [RED, DARK]),
                          weights={"pickscore": 1, "clip_score": 0}, reselect=False)
    assert again_result is not light
    assert set(runs_table(light)["selected_by"]) == {"pickscore, clip_score"}


async def test_a_scene_drawn_after_a_rescore_was_selected_by_its_own_scorers(tmp_path):
    result = await rescore(await made(tmp_path, scorers=[RED]), [RED, DARK],
                           {"pickscore": 0, "clip_score": 1})
    p = Pipeline(director(), critic(90), FakeImages(), scorers=[RED], num_variations=2,
                 chain="none")
    again = await p.rerun(result, 2)
    columns = ["overall_of", "overall_from", "selected_by"]
    table = runs_table(again).groupby("scene")[columns].first()
    assert table.to_numpy().tolist() == [
        ["clip_score", "1 clip_score", "clip_score"], ["pickscore", "1 pickscore", "pickscore"],
        ["clip_score", "1 clip_score", "clip_score"]]
    last = runs_table(await rescore(again, [DARK]))
    assert set(last["selected_by"]) == set(last["overall_of"]) == {"clip_score"}


async def test_what_the_overall_was_really_made_of(tmp_path):
    judges = {"scorers": [RED, DARK, FakeScorer("vqa_score", value=lambda image, text: RawScore(
        None, "out") if text == "view 2" else 9.0)]}
    result = await made(tmp_path, **judges, weights={
        "pickscore": 3, "clip_score": 1, "vqa_score": 2})
    whole, without = ("0.1667 clip_score + 0.5 pickscore + 0.3333 vqa_score",
                      "0.25 clip_score + 0.75 pickscore")
    table = runs_table(result)
    assert table.groupby("scene")["overall_from"].first().tolist() == [whole, without, whole]
    assert set(table["overall_of"]) == {"pickscore, clip_score, vqa_score"}
    unscored = runs_table(await made(tmp_path, "bare", scorers=[NOBODY]))
    assert unscored["overall_from"].isna().all() and unscored["overall"].isna().all()


async def test_the_same_images_do_not_differ(tmp_path):
    runs = [await made(tmp_path, f"r{n}", title=f"s{n}", scorers=[RED, DARK],
                       shades=[20 * n, 90, 7 * n, 40, 5, 60]) for n in range(6)]
    light = [await rescore(run, weights={"pickscore": 1, "clip_score": 9}, reselect=False)
             for run in runs]
    fewer = [await rescore(run, [RED], reselect=False) for run in runs]
    for other in (light, fewer, [*fewer[:1], *runs[1:]]):
        found = compare(runs, other)
        assert found["overall"].verdict == "cannot tell" and found["overall"].difference is None
        assert found["overall"].reason.startswith("made of other weights or scorers in")
        assert found["pickscore"].reason == "every pair is a tie"


async def test_one_title_for_several_stories(tmp_path):
    def told(style="ink", scenes=1):
        return Story(title="demo", scenes=[Scene(prompt=f"view {n}") for n in range(scenes)],
                     consistency_markers={"style": style})

    p = Pipeline(director(), critic(90), FakeImages(), scorers=[RED], num_variations=2,
                 chain="none", max_enhancement_iterations=0)
    ink, again, oil, longer = [await p.run(story, output_dir=tmp_path) for story in (
        told(), told(), told("oil"), told(scenes=2))]
    assert len(unit_values([ink, again])) == 1
    for other in (oil, longer):
        with pytest.raises(ValueError, match=r"title of one story.* of the name demo"):
            unit_values([ink, other])


async def test_a_person_is_no_verifier(tmp_path):
    result = choose(await made(tmp_path), 2, 1, "the light")
    table = runs_table(result)
    assert table.groupby("scene")["selected_by"].first().tolist() == [
        "pickscore", "a person", "pickscore"]
    assert compare(table, table.assign(generation_id="b")).units == 1


async def test_a_scene_made_again_keeps_its_own_settings(tmp_path):
    result = await made(tmp_path, num_variations=2)
    p = Pipeline(director(), critic(90), FakeImages(), scorers=[RED], num_variations=3,
                 chain="none")
    table = runs_table(await p.rerun(result, 2))
    assert table.groupby("scene")["num_variations"].first().tolist() == [2, 3, 2]
    with pytest.raises(ValueError, match="got num_variations 2, 3"):
        unit_values(table)


async def test_enhanced_texts_are_refused_from_the_run_on(tmp_path):
    result = await made(tmp_path, score_text="enhanced")
    with pytest.raises(ValueError, match=r"must be 'original'.* got 'enhanced'"):
        compare(result, result)


async def test_results_need_no_table(tmp_path):
    a = [await made(tmp_path, "a1", seed=1), await made(tmp_path, "a2", seed=2)]
    b = [await made(tmp_path, "b1", seed=1, shades=[200, 220])]
    found = compare(iter(a), b)
    assert found == compare(runs_table(a), runs_table(b))
    assert (found.units, found["overall"].verdict) == (1, "cannot tell")
    assert unit_values(a[0], "prompt").shape[0] == 3
    assert aa_check(a, "prompt").units == 3


async def test_rounds_and_the_critic_come_from_the_run(tmp_path):
    table = runs_table([await made(tmp_path, "a", max_enhancement_iterations=2),
                        await made(tmp_path, "b", max_enhancement_iterations=0)])
    assert stop_reasons(table)["scenes"].sum() == 6
    plain = table[table["max_enhancement_iterations"] == 0]
    assert critic_agreement(plain, "prompt")["reason"].str.startswith("no score in").all()


# files


async def test_a_folder_is_read_with_all_below_it(tmp_path):
    results = [await made(tmp_path, name) for name in ("one", "two")]
    results[0].save(tmp_path / "one.json")
    results[1].save(tmp_path / "deep" / "er" / "two.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = load_runs(tmp_path)
    assert set(table["generation_id"]) == {"one", "two"}
    wanted = runs_table(sorted(results, key=lambda r: r.generation_id == "one"))
    pd.testing.assert_frame_equal(table, wanted)


async def test_what_is_no_result_is_named(tmp_path):
    (await made(tmp_path)).save(tmp_path / "run.json")
    (tmp_path / "notes.json").write_text('{"a": 1}', "utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "half.json").write_text((tmp_path / "run.json").read_text()[:99], "utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning) as caught:
        table = load_runs(str(tmp_path))
    assert [str(w.message) for w in caught] == [
        "no saved results: binary.json, deep/half.json, notes.json"]
    assert len(table) == 6


def test_a_folder_without_results(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"folder must be one of `StoryResult.save` files"):
            load_runs(folder)


async def test_a_result_that_was_copied_counts_once_or_not_at_all(tmp_path):
    (await made(tmp_path)).save(tmp_path / "run.json")
    shutil.copy(tmp_path / "run.json", tmp_path / "copy.json")
    with pytest.raises(ValueError, match="must be without repeated images"):
        unit_values(load_runs(tmp_path))


async def test_settings_survive_the_file(tmp_path):
    looked = await rescore(await made(tmp_path), [RED, DARK], reselect=False)
    looked.save(tmp_path / "run.json")
    pd.testing.assert_frame_equal(load_runs(tmp_path), runs_table(looked))
    assert json.loads((tmp_path / "run.json").read_text())["history"][0]["kind"] == "rescore"


# images made elsewhere


def listed(folder: Path, rows: list[dict] | None = None, **changes) -> Path:
    """A CSV of two scenes with two images each, and the images."""
    rows = rows or [
        {"story": "s", "scene": scene, "text": f"view {scene}", "image": f"{scene}{image}.png"}
        for scene in (1, 2) for image in (1, 2)
    ]
    for number, row in enumerate(rows):
        (folder / row["image"]).write_bytes(picture(50 * number + 5))
    rows[2] |= changes
    pd.DataFrame(rows).to_csv(folder / "list.csv", index=False)
    return folder / "list.csv"


async def test_images_from_elsewhere_become_an_arm(tmp_path):
    judge = FakeScorer(value=lambda image, text: float(image.getpixel((0, 0))[0]))
    table = await score_csv(listed(tmp_path), tmp_path, scorers=[judge, DARK],
                            weights={"pickscore": 1, "clip_score": 0})
    assert table["raw_pickscore"].tolist() == [5, 55, 105, 155]
    assert table["selected"].tolist() == [False, True, False, True]
    assert table["variation"].tolist() == [1, 2, 1, 2]
    assert [batch.prompt for batch in judge.batches] == ["view 1", "view 2"]
    assert set(table["selected_by"]) == {"pickscore"} and not table["sandbox"].any()
    assert set(table["scorer_pickscore"]) == {"fake-model · fake-identity"}
    assert unit_values(table, "story").shape[0] == 1
    with pytest.raises(ValueError, match="got chain None"):
        unit_values(table, "prompt")


async def test_a_file_may_stand_in_two_scenes(tmp_path):
    table = await score_csv(listed(tmp_path, image="11.png"), tmp_path, scorers=[RED])
    assert table["path"].nunique() == 3 and len(unit_values(table)) == 1


async def test_numbers_of_a_csv_are_numbers(tmp_path):
    csv, arms = listed(tmp_path), {}
    known = pd.read_csv(csv).assign(chain="none", quality_threshold="12.5")
    for rounds in (0, 4, ""):
        known.assign(max_enhancement_iterations=rounds).to_csv(csv, index=False)
        arms[rounds] = await score_csv(csv, tmp_path, scorers=[RED, DARK])
    assert set(arms[0]["max_enhancement_iterations"]) == {0}
    assert set(arms[0]["quality_threshold"]) == {12.5}
    assert set(arms[0]["overall_from"]) == {"0.3333 clip_score + 0.6667 pickscore"}
    for original, enhanced in ((0, 4), (0, ""), ("", 4), ("", "")):
        assert (four_cells(arms[original], arms[enhanced], k=2)["units"] == 2).all()
    with pytest.raises(ValueError, match="0 in original and more in enhanced, got 4 and 0"):
        four_cells(arms[4], arms[0], k=2)


async def test_a_csv_and_a_run_compare(tmp_path):
    result = await made(tmp_path, scenes=2, title="s")
    listed(tmp_path)
    known = pd.read_csv(tmp_path / "list.csv").assign(chain="none")
    known.to_csv(tmp_path / "list.csv", index=False)
    table = await score_csv(tmp_path / "list.csv", tmp_path, scorers=[RED])
    found = compare(table, result, "prompt", k=2)
    assert (found.units, found["overall"].ties) == (2, 0)
    with pytest.raises(ValueError, match="scorer_pickscore must be one scorer"):
        other = FakeScorer()
        other.model = "another @ 1"
        compare(await score_csv(tmp_path / "list.csv", tmp_path, scorers=[other]), result)


@pytest.mark.parametrize(("changes", "words"), [
    ({"text": " "}, "row 3: text must be a text, got ' '"),
    ({"story": ""}, "row 3: story must be a text"),
    ({"image": ""}, "row 3: image must be a text"),
    ({"image": "gone.png"}, "row 3: image must be a file inside the folder, got 'gone.png'"),
    ({"image": "../outside.png"}, "inside the folder, got '../outside.png'"),
    ({"image": "."}, "inside the folder, got '.'"),
    ({"scene": 0}, "row 3: scene must be a whole number from 1, got '0'"),
    ({"scene": "two"}, "row 3: scene must be a whole number from 1, got 'two'"),
    ({"scene": "1.5"}, "from 1, got '1.5'"),
    ({"text": "another"}, "got several texts for ('s', 2)"),
    ({"image": "22.png"}, "row 4: image must be a file once a scene, got '22.png' again"),
    ({"image": "../in/22.png"}, "row 4: image must be a file once a scene, got '22.png' again"),
    ({"num_variations": "many"}, "row 3: num_variations must be a number from 0, got 'many'"),
    ({"max_enhancement_iterations": "-1"},
     "row 3: max_enhancement_iterations must be a number from 0"),
])  # fmt: skip
async def test_a_bad_row_is_named_before_anything_is_scored(tmp_path, changes, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.png").write_bytes(picture())
    judge = FakeScorer()
    with pytest.raises(ValueError) as error:
        await score_csv(listed(tmp_path / "in", **changes), tmp_path / "in", scorers=[judge])
    assert words in str(error.value) and judge.batches == []


async def test_a_csv_without_a_column_or_rows(tmp_path):
    csv = listed(tmp_path)
    pd.read_csv(csv).drop(columns=["text", "image"]).to_csv(csv, index=False)
    with pytest.raises(ValueError, match=r"list.csv must be .* no column text, image"):
        await score_csv(csv, tmp_path)
    csv.write_text("story,scene,text,image\n", "utf-8")
    with pytest.raises(ValueError, match=r"list.csv must be at least one row, got none"):
        await score_csv(csv, tmp_path)


async def test_the_same_variation_twice(tmp_path):
    csv = listed(tmp_path)
    pd.read_csv(csv).assign(variation=1).to_csv(csv, index=False)
    with pytest.raises(ValueError, match="must be without repeated images"):
        await score_csv(csv, tmp_path, scorers=[RED])


async def test_a_file_that_is_no_image_has_no_score(tmp_path):
    csv = listed(tmp_path)
    (tmp_path / "21.png").write_bytes(b"no image")
    table = await score_csv(csv, tmp_path, scorers=[RED])
    assert np.isnan(table["overall"]).tolist() == [False, False, True, False]
    assert table["selected"].tolist() == [False, True, False, True]
    moved = table.assign(generation_id="b", chain="none")
    found = compare(table.assign(chain="none"), moved, "prompt", k=2)
    assert found["overall"].reason == (
        "1 of 2 scenes lack this score, more than 20%: ('s', 2)")


async def test_texts_that_look_like_nothing_stay_texts(tmp_path):
    rows = [{"story": "NA", "scene": 1, "text": "null", "image": f"{k}.png"} for k in range(3)]
    table = await score_csv(listed(tmp_path, rows), tmp_path, scorers=[RED])
    assert table[["story", "text"]].drop_duplicates().to_numpy().tolist() == [["NA", "null"]]
