"""The record of what went along with each request: saved, moved, resumed, rerun, shown."""

from __future__ import annotations

import asyncio
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from refimg import Pipeline, Scene, Story, StoryResult, Subject
from refimg.engine import handover
from refimg.storage.journal import Journal
from refimg.view import report
from tests.fakes import FakeImages, critic, director, picture

MARKUP = "Mara<b>"


def story(tmp_path: Path, name: str = "Mara") -> Story:
    (sheet := tmp_path / "mara.png").write_bytes(picture(90))
    (first := tmp_path / "first.png").write_bytes(picture(91))
    scenes = [Scene(prompt=f"{name}, view {n}", subjects=[name]) for n in "abc"]
    scenes.append(Scene(prompt="the empty sea", subjects=[], follows=2))
    return Story(scenes=scenes, subjects=[Subject(name=name, images=[sheet])],
                 initial_reference_image=first)


def pipeline(images=None, **settings) -> Pipeline:
    plain = {"num_variations": 2, "max_enhancement_iterations": 0, "chain": "anchored"}
    return Pipeline(director=director(), critic=critic(), scorers=[],
                    image_model=images or FakeImages(max_references=3), **plain | settings)


@pytest.fixture
def run(tmp_path):
    async def go(made: Pipeline, told: Story) -> StoryResult:
        async with asyncio.timeout(20):
            return await made.run(told, output_dir=tmp_path / "images", generation_id="x")

    return go


def roles(result: StoryResult) -> list[list[tuple[str, int | None]]]:
    return [[(sent.role, sent.scene) for sent in s.sent_references] for s in result.scenes]


def check_hashes(result: StoryResult) -> None:
    for sent in (sent for scene in result.scenes for sent in scene.sent_references):
        assert sent.path.is_absolute()
        assert sent.sha256 == sha256(sent.path.read_bytes()).hexdigest()


async def test_it_holds_file_hash_role_and_order_of_what_was_sent(run, tmp_path):
    images = FakeImages(max_references=3)
    result = await run(pipeline(images), story(tmp_path))
    assert roles(result) == [[("initial", None), ("subject", None)],
                             [("previous", 1), ("subject", None)],
                             [("previous", 2), ("subject", None)], [("follows", 2)]]
    check_hashes(result)
    for scene in result.scenes:
        asked = [r for r in images.requests if f"_scene_{scene.scene:02d}/" in r.slot]
        paths = tuple(sent.path for sent in scene.sent_references)
        assert {request.references for request in asked} == {paths}
    assert [sent.subjects for sent in result.scenes[1].sent_references] == [["Mara"], ["Mara"]]
    assert result.scenes[3].sent_references[0].subjects == []


async def test_only_a_given_file_is_read_once_and_off_the_loop(run, tmp_path, monkeypatch):
    read = []

    def count(file, name):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        read.append(Path(file.name).name)
        return sha256(file.read())

    monkeypatch.setattr(handover, "file_digest", count)
    check_hashes(await run(pipeline(), story(tmp_path)))
    assert sorted(read) == ["first.png", "mara.png"]


async def test_a_saved_record_is_right_wherever_the_folder_goes(run, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    made = pipeline()
    async with asyncio.timeout(20):
        result = await made.run(story(work), output_dir=work / "images", generation_id="x")
    result.save(work / "run.json")
    assert str(tmp_path) not in (work / "run.json").read_text("utf-8")
    moved = Path(shutil.move(work, tmp_path / "elsewhere"))
    loaded = StoryResult.load(moved / "run.json")
    assert roles(loaded) == roles(result)
    check_hashes(loaded)
    assert {sent.path.parent for s in loaded.scenes for sent in s.sent_references} == {
        moved, moved / "images"}


async def test_a_resumed_run_has_the_same_record_and_pays_nothing(run, tmp_path):
    told, found = story(tmp_path), []
    for _ in range(2):
        images = FakeImages(max_references=3)
        result = await run(pipeline(images, journal=Journal(tmp_path / "journal")), told)
        found.append((len(images.requests), [s.sent_references for s in result.scenes]))
    assert [count for count, _ in found] == [8, 0] and found[0][1] == found[1][1]


async def test_a_rerun_keeps_the_record_of_the_scenes_that_it_keeps(run, tmp_path):
    result = await run(made := pipeline(), story(tmp_path))
    again = await made.rerun(result, 3)
    assert [s.sent_references for s in again.scenes[:2]] == [
        s.sent_references for s in result.scenes[:2]]
    assert roles(again) == roles(result)
    check_hashes(again)


async def test_a_record_without_it_still_loads(run, tmp_path):
    result = await run(pipeline(), story(tmp_path))
    result.save(path := tmp_path / "run.json")
    fields = json.loads(path.read_bytes())
    for scene in fields["scenes"]:
        del scene["sent_references"]
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != "sha256"}))
    assert [s.sent_references for s in StoryResult.load(path).scenes] == [[]] * 4


async def test_a_file_that_is_gone_has_no_hash(run, tmp_path):
    (tmp_path / "images").mkdir()

    def draw(request, number):
        (tmp_path / "mara.png").unlink(missing_ok=True)
        return picture(number)

    result = await run(pipeline(FakeImages(draw, max_references=3), chain="none"), Story(
        scenes=[Scene(prompt="x"), Scene(prompt="y", follows=1, subjects=["Mara"])],
        subjects=story(tmp_path).subjects))
    by_role = {sent.role: sent.sha256 for sent in result.scenes[1].sent_references}
    assert by_role["subject"] is None and by_role["follows"]


async def test_the_report_says_what_went_along_in_one_line_each(run, tmp_path):
    result = await run(pipeline(), story(tmp_path, MARKUP))
    page = report(result).read_text("utf-8")
    first, second = result.scenes[1].sent_references
    assert f"Image 1: scene 1 (previous); x_scene_01_v1.png, SHA-256 {first.sha256}" in page
    assert f"Image 2: Mara&lt;b&gt; (subject); mara.png, SHA-256 {second.sha256}" in page
    assert "Image 1: the story&#x27;s image (initial); first.png" in page
    assert page.count("Image 1: ") >= 4 and "Image 3: " not in page
