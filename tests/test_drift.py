"""Does a story keep together: the drift meter, its charts, its warning, and comparing by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from PIL import Image

from refimg.engine.story import Scene, Story, Subject
from refimg.pipeline import Pipeline
from refimg.score import Batch, RawScore
from refimg.validate import compare, drift, drift_chart, slopes
from refimg.validate.drift import colours
from refimg.view import report
from refimg.view.together import consistency_chart

from .fakes import FakeImages, FakeScorer, picture


class Reds:
    """Images agree if they are equally red; 100 where they are, less a point for each level."""

    name, model, calibration = "consistency", "reds", "reds"

    def to_100(self, raw: float) -> float:
        return raw

    def score(self, batch: Batch) -> list[RawScore]:
        if not batch.references:
            return [RawScore(None, "none", applicable=False)] * len(batch.images)

        def red(image: Image.Image) -> int:
            return image.getpixel((0, 0))[0]

        gaps = [[abs(red(i) - red(r)) for r in batch.references] for i in batch.images]
        return [RawScore(100.0 - sum(row) / len(row)) for row in gaps]


def run(folder: Path, shades: list[int], subjects: bool = False, **over):
    """A story of as many scenes as shades; the third does not show the subject."""
    folder.mkdir(exist_ok=True)
    sheet = folder / "mara.png"
    sheet.write_bytes(picture(100))
    known = [Subject(name="Mara", images=[sheet])] if subjects else []
    text = "Mara in place" if subjects else "A fox in place"
    scenes = [Scene(prompt="A desert" if n == 3 else f"{text} {n}", subject_present=n != 3)
              for n in range(1, len(shades) + 1)]
    model = FakeImages(lambda request, number: picture(shades[number - 1]), max_references=3)
    scorers = [FakeScorer(value=lambda image, prompt: 100.0), Reds()]
    pipeline = Pipeline(image_model=model, scorers=scorers, num_variations=1, seed=1,
                        max_enhancement_iterations=0, **over)
    story = Story(scenes=scenes, subjects=known, title="fox")
    return asyncio.run(pipeline.run(story, output_dir=folder / "images"))


def test_drift_compares_each_scene_with_anchor_previous_and_subject(tmp_path: Path):
    result = run(tmp_path, [100, 110, 120, 130], subjects=True)
    table = asyncio.run(drift(result, Reds()))
    assert table["anchor"].fillna(-1).tolist() == [-1, 90, 80, 70]
    assert table["previous"].fillna(-1).tolist() == [-1, 90, 90, 90]
    assert table["subject Mara"].tolist() == [100, 90, 80, 70]
    assert table["shown Mara"].tolist() == table["shown"].tolist() == [True, True, False, True]


def test_a_slope_leaves_out_what_is_not_shown_and_has_an_interval(tmp_path: Path):
    table = asyncio.run(drift(run(tmp_path, [100, 110, 200, 130, 145], subjects=True), Reds()))
    found = slopes(table).set_index("value")
    row = found.loc["subject Mara"]
    assert row["scenes"] == 4 and row["low"] < row["slope"] < row["high"] < 0
    assert row["slope"] == pytest.approx(-11, abs=1)
    short = slopes(table.head(2)).set_index("value")
    assert short["slope"].isna().all() and "at least 3" in short.loc["contrast", "reason"]


def test_colours_are_those_of_the_image():
    assert colours(Image.new("RGB", (9, 9), "red")) == {
        "saturation": 100, "contrast": 0, "hue": 0}
    half = Image.new("RGB", (128, 128), "black")
    half.paste("white", (0, 0, 64, 128))
    assert colours(half)["contrast"] == pytest.approx(100)
    assert colours(Image.new("RGB", (9, 9), (0, 255, 0)))["hue"] == pytest.approx(120, abs=1)


def test_only_a_consistency_scorer_measures_drift(tmp_path: Path):
    result = run(tmp_path, [100, 110])
    with pytest.raises(ValueError, match="scorer must be one of the name consistency, got 'pick"):
        asyncio.run(drift(result, FakeScorer()))


def test_images_of_a_real_model_are_never_measured_by_the_sandbox(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(OSError, match="consistency cannot be measured: no weights"):
        asyncio.run(drift(run(tmp_path, [100, 110, 120])))


def test_the_charts_say_in_words_what_they_show(tmp_path: Path):
    result = run(tmp_path, [100, 110, 120, 130], subjects=True)
    text = str(drift_chart(asyncio.run(drift(result, Reds()))))
    assert "subject Mara: 100, 90, 80, 70" in text and "Change per scene: " in text
    text = str(consistency_chart(result))
    assert "Not compared: scene 3." in text and "scene 4 70.0" in text
    assert "No selected image was compared" in str(
        consistency_chart(run(tmp_path / "x", [100])))


@pytest.mark.parametrize("compared", [True, False])
def test_the_report_asks_only_where_images_were_compared(tmp_path: Path, compared: bool):
    result = run(tmp_path, [100, 110, 120] if compared else [100])
    page = report(result, tmp_path / "report.html").read_text()
    assert ("does-it-keep-together" in page) == compared


def test_a_scene_far_below_the_others_is_a_warning(tmp_path: Path):
    result = run(tmp_path, [100, 102, 100, 180, 104, 103])
    told = [[w for w in scene.warnings if "far below" in w] for scene in result.scenes]
    assert [bool(texts) for texts in told] == [False, False, False, True, False, False]
    assert told[3][0].startswith("consistency 20.0 is far below the other scenes' 97.0")
    near = run(tmp_path / "near", [100, 102, 100, 109, 104, 103])
    assert not any("far below" in w for scene in near.scenes for w in scene.warnings)


def test_stories_are_compared_by_consistency_without_the_scenes_it_says_nothing_of(tmp_path: Path):
    def arm(name: str, step: int) -> list:
        found = []
        for k in range(2):
            made = run(tmp_path / f"{name}{k}", [100, 100 + step + k, 250, 100 + step])
            story = made.story.model_copy(update={"title": f"fox {k}"})
            found.append(made.model_copy(update={"story": story}))
        return found

    found = compare(arm("a", 20), arm("b", 10))
    (row,) = [d for d in found.differences if d.metric == "consistency"]
    assert row.units == 2 and row.missing == 0 and row.difference == pytest.approx(10)


def test_a_scene_that_lost_its_consistency_is_missing(tmp_path: Path):
    one = run(tmp_path / "a", [100, 110, 250, 110, 110, 110, 110])
    other = run(tmp_path / "b", [100, 110, 250, 110, 110, 110, 110])
    scenes = list(other.scenes)
    scores = scenes[1].variations[0].scores
    gone = scores.model_copy(update={"metrics": scores.metrics | {"consistency": None}})
    scenes[1] = scenes[1].model_copy(update={
        "variations": [scenes[1].variations[0].model_copy(update={"scores": gone})]})
    found = compare([one], [other.model_copy(update={"scenes": scenes})])
    (row,) = [d for d in found.differences if d.metric == "consistency"]
    assert row.missing == 1 and row.units == 1
