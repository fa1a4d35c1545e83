"""What a run writes about itself while it goes: complete, gone afterwards, never in the way."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from refimg.engine.protocols import visible_text
from refimg.generate import GenerationFailed
from refimg.pipeline import GenerationCancelled, Pipeline, Scene, Story
from refimg.storage import files, traces

from .fakes import FakeChat, FakeImages, FakeScorer, critic, critique, director, picture
from .test_view import HOSTILE

ROOT = Path(__file__).resolve().parent.parent
TRACES = "reference_image_traces"
ROUNDS = [
    "00_original_prompt.txt",
    "01_agent1_iteration_1.txt",
    "02_agent2_iteration_1.txt",
    "03_agent1_iteration_2.txt",
    "04_agent2_iteration_2.txt",
]
END = ["final_enhanced_prompt.txt", "prompt_trace_summary.json"]
GENERATION = "generation_trace.json"


def story(scenes: int = 2, **options) -> Story:
    return Story(scenes=[Scene(prompt=f"The keeper, scene {n}.") for n in range(1, scenes + 1)],
                 **options)


def pipeline(**options) -> Pipeline:
    """Two rounds a scene, two variations, one scorer."""
    defaults = {"director": director(), "critic": critic(50, 70, 50, 70, 50, 70),
                "image_model": FakeImages(), "scorers": [FakeScorer()],
                "num_variations": 2, "max_enhancement_iterations": 2, "max_concurrency": 1}
    return Pipeline(**defaults | options)


def tree(root: Path, name: str = "id") -> Path:
    return root / TRACES / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def text(path: Path) -> str:
    return path.read_text("utf-8")


def state(root: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: files with their content, links with their target."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


async def kept(root: Path, given: Story | None = None, **options):
    """The result of a run whose traces stay."""
    made = pipeline(keep_traces=True, **options)
    return await made.run(given or story(), generation_id="id", output_dir=root / "images")


async def test_the_names_are_exactly_these(tmp_path):
    await kept(tmp_path)
    assert names(tree(tmp_path)) == ["scene_1", "scene_2"]
    for scene in ("scene_1", "scene_2"):
        assert names(tree(tmp_path) / scene) == sorted([*ROUNDS, *END, GENERATION])


async def test_the_texts_are_what_was_said(tmp_path):
    result = await kept(tmp_path)
    for scene in result.scenes:
        folder = tree(tmp_path) / f"scene_{scene.scene}"
        done = scene.enhancement
        assert text(folder / ROUNDS[0]) == scene.prompt
        assert text(folder / END[0]) == done.final_prompt
        for number, item in enumerate(done.iterations):
            assert text(folder / ROUNDS[2 * number + 1]) == item.enhanced_prompt
            said = json.loads(text(folder / ROUNDS[2 * number + 2]))
            assert said == item.critique.model_dump()
            assert said["overall"] == item.critique.overall


async def test_the_summary_says_how_the_rounds_went(tmp_path):
    result = await kept(tmp_path)
    summary = json.loads(text(tree(tmp_path) / "scene_1" / END[1]))
    done = result.scenes[0].enhancement
    assert set(summary) == {"original_prompt", "final_prompt", "iterations", "final_score",
                            "total_iterations", "stop_reason"}
    assert summary["original_prompt"] == "The keeper, scene 1."
    assert summary["final_prompt"] == done.final_prompt
    assert (summary["total_iterations"], summary["stop_reason"]) == (2, "max_iterations")
    assert [set(item) for item in summary["iterations"]] == [
        {"number", "scores", "seconds", "timestamp"}] * 2
    assert [item["number"] for item in summary["iterations"]] == [1, 2]
    assert [item["scores"]["completeness"] for item in summary["iterations"]] == [50, 70]
    assert summary["final_score"]["overall"] == 70


@pytest.mark.parametrize("best", [1, 2])
async def test_each_variation_stands_with_its_own_scores(tmp_path, best):
    """The picture on disk, its score and its rank belong together, whichever wins."""
    shades = {1: 40, 2: 20} if best == 1 else {1: 20, 2: 40}
    model = FakeImages(lambda request, n: picture(shades[2 - n % 2] + 50 * ("02" in request.slot)))
    result = await kept(tmp_path, image_model=model, seed=7)
    for scene in result.scenes:
        trace = json.loads(text(tree(tmp_path) / f"scene_{scene.scene}" / GENERATION))
        assert set(trace) == {"scene", "sent_prompt", "model", "references", "variations",
                              "selected"}
        assert (trace["scene"], trace["model"]) == (scene.scene, "fake-images")
        assert trace["sent_prompt"] == scene.sent_prompt
        assert trace["selected"] == str(scene.reference)
        assert trace["references"] == [str(r) for r in result.references[: scene.scene - 1]]
        assert [set(v) for v in trace["variations"]] == [{"path", "seed", "scores", "rank"}] * 2
        for told, made in zip(trace["variations"], scene.variations, strict=True):
            with Image.open(told["path"]) as image:
                assert told["scores"]["raw"]["pickscore"] == image.getpixel((0, 0))[0]
            assert told["path"] == str(made.image.image_path)
            assert told["scores"] == made.scores.model_dump()
            assert (told["seed"], told["rank"]) == (made.image.seed, made.rank)
        assert [v["rank"] for v in trace["variations"]] == ([1, 2] if best == 1 else [2, 1])


async def test_the_user_image_is_named_as_the_reference(tmp_path):
    (tmp_path / "mine.png").write_bytes(picture(9))
    await kept(tmp_path, story(1, initial_reference_image=tmp_path / "mine.png"))
    trace = json.loads(text(tree(tmp_path) / "scene_1" / GENERATION))
    assert trace["references"] == [str((tmp_path / "mine.png").resolve())]


async def test_unicode_is_written_as_it_is(tmp_path):
    prompt = "Wärterin 守灯人 🗼 «du coup»"
    await kept(tmp_path, Story(scenes=[Scene(prompt=prompt)]))
    assert text(tree(tmp_path) / "scene_1" / ROUNDS[0]) == prompt
    assert "守灯人 🗼" in text(tree(tmp_path) / "scene_1" / END[1])


async def test_enhancements_handed_in_are_traced_the_same_way(tmp_path):
    made = pipeline(keep_traces=True)
    given = await made.enhance(story())
    await made.run(story(), generation_id="id", output_dir=tmp_path / "images", enhancements=given)
    assert names(tree(tmp_path) / "scene_2") == sorted([*ROUNDS, *END, GENERATION])
    assert text(tree(tmp_path) / "scene_2" / END[0]) == given[1].final_prompt


async def test_prompts_left_as_they_are_have_a_trace_too(tmp_path):
    await kept(tmp_path, max_enhancement_iterations=0)
    folder = tree(tmp_path) / "scene_1"
    assert names(folder) == sorted([ROUNDS[0], *END, GENERATION])
    assert json.loads(text(folder / END[1]))["stop_reason"] == "skipped"


async def test_the_traces_lie_beside_the_resolved_folder(tmp_path):
    """A link to the output folder does not move them; nor does a relative path."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "images")
    made = pipeline(keep_traces=True)
    await made.run(story(1), generation_id="id", output_dir=tmp_path / "link")
    assert names(tree(tmp_path / "disk")) == ["scene_1"]
    assert not (tmp_path / TRACES).exists()


async def test_an_enhancement_is_on_disk_when_its_images_begin(tmp_path):
    """Seen from `on_progress`: written as the run goes, not at its end."""
    seen = {}

    def look(progress) -> None:
        if progress.stage == "generate":
            seen[progress.scene] = names(tree(tmp_path) / f"scene_{progress.scene}")

    await pipeline().run(story(), generation_id="id", output_dir=tmp_path / "images",
                         on_progress=look)
    assert {n: sorted({*ROUNDS, *END} - {*found}) for n, found in seen.items()} == {1: [], 2: []}
    assert not (tmp_path / TRACES).exists()


async def test_the_first_agents_words_are_on_disk_while_the_second_speaks(tmp_path):
    seen = []

    def judge(messages, schema, number):
        seen.append(names(tree(tmp_path) / "scene_1"))
        return critique(40 + 10 * number)

    await pipeline(critic=FakeChat(judge)).run(
        story(1), generation_id="id", output_dir=tmp_path / "images")
    assert seen == [ROUNDS[:2], ROUNDS[:4]]


async def test_a_scenes_generation_is_on_disk_while_the_next_is_drawn(tmp_path):
    class Patient(FakeImages):
        async def generate(self, request):
            if "scene_02" in request.slot:
                async with asyncio.timeout(10):
                    while not (tree(tmp_path) / "scene_1" / GENERATION).exists():
                        await asyncio.sleep(0.01)
            return await super().generate(request)

    made = await pipeline(image_model=Patient()).run(
        story(), generation_id="id", output_dir=tmp_path / "images")
    assert [s.reference_from for s in made.scenes] == ["ranked", "ranked"]


async def test_nothing_is_left_after_success(tmp_path):
    await pipeline().run(story(), generation_id="id", output_dir=tmp_path / "images")
    assert names(tmp_path) == ["images"] and not list(tmp_path.rglob(".*"))


async def test_the_traces_of_others_stay(tmp_path):
    """The common folder goes only when it is empty; another run's tree is not touched."""
    (tree(tmp_path, "other")).mkdir(parents=True)
    (tree(tmp_path, "other") / "mine.txt").write_text("mine")
    await pipeline().run(story(), generation_id="id", output_dir=tmp_path / "images")
    assert state(tmp_path / TRACES) == {"other": None, "other/mine.txt": b"mine"}


async def test_nothing_is_left_after_an_error(tmp_path):
    model = FakeImages(lambda request, number: RuntimeError("no"))
    with pytest.raises(GenerationFailed):
        await pipeline(image_model=model).run(
            story(), generation_id="id", output_dir=tmp_path / "images")
    assert not (tmp_path / TRACES).exists() and not list(tmp_path.rglob(".*"))


async def test_nothing_is_left_after_a_cancel(tmp_path):
    model = FakeImages(seconds=60)
    with pytest.raises(GenerationCancelled):
        await pipeline(image_model=model).run(
            story(), generation_id="id", output_dir=tmp_path / "images",
            cancellation_check=lambda: bool(model.requests))
    assert not (tmp_path / TRACES).exists() and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("end", ["error", "cancel"])
async def test_kept_traces_stay_however_the_run_ends(tmp_path, end):
    model = FakeImages(lambda request, number: RuntimeError("no")) if end == "error" else (
        FakeImages(seconds=60))
    with pytest.raises((GenerationFailed, GenerationCancelled)):
        await pipeline(image_model=model, keep_traces=True).run(
            story(1), generation_id="id", output_dir=tmp_path / "images",
            cancellation_check=lambda: end == "cancel" and bool(model.requests))
    assert {*ROUNDS, *END} <= {*names(tree(tmp_path) / "scene_1")}


async def test_kept_traces_are_replaced_by_those_of_the_next_run(tmp_path):
    await kept(tmp_path, story(3))
    await kept(tmp_path, story(1))
    assert names(tree(tmp_path)) == ["scene_1"]
    await pipeline().run(story(1), generation_id="id", output_dir=tmp_path / "images")
    assert not (tmp_path / TRACES).exists()


async def test_a_fallback_scene_has_its_traces(tmp_path):
    """No usable round, and the one image from the original prompt."""
    result = await kept(tmp_path, story(1), director=FakeChat([RuntimeError("down")]))
    folder = tree(tmp_path) / "scene_1"
    assert names(folder) == sorted([ROUNDS[0], *END, GENERATION])
    assert text(folder / END[0]) == "The keeper, scene 1."
    summary = json.loads(text(folder / END[1]))
    assert (summary["stop_reason"], summary["iterations"], summary["final_score"]) == (
        "failed", [], None)
    trace = json.loads(text(folder / GENERATION))
    assert len(trace["variations"]) == 1 and trace["sent_prompt"].startswith("The keeper, scene 1.")
    assert trace["selected"] == str(result.references[0])


async def test_a_fallback_after_the_agents_own_cancellation_has_the_same_traces(tmp_path):
    await kept(tmp_path, story(1), director=FakeChat([asyncio.CancelledError("a closed client")]))
    folder = tree(tmp_path) / "scene_1"
    assert names(folder) == sorted([ROUNDS[0], *END, GENERATION])


async def test_a_scene_without_an_image_has_a_trace_that_says_so(tmp_path):
    def fail(request, number):
        return RuntimeError("no") if "scene_02" in request.slot else picture(number)

    result = await kept(tmp_path, image_model=FakeImages(fail))
    assert result.scenes[1].reference_from == "carried"
    trace = json.loads(text(tree(tmp_path) / "scene_2" / GENERATION))
    assert (trace["variations"], trace["selected"]) == ([], None)
    assert trace["references"] == [str(result.references[0])]


async def test_unscored_variations_are_traced_with_the_reason(tmp_path):
    await kept(tmp_path, story(1), scorers=[FakeScorer(value=lambda image, prompt: None)])
    trace = json.loads(text(tree(tmp_path) / "scene_1" / GENERATION))
    assert [(v["rank"], v["scores"]["overall"]) for v in trace["variations"]] == [(None, None)] * 2
    assert all(v["scores"]["notes"]["overall"] for v in trace["variations"])


async def refused(root: Path, match: str) -> None:
    """A run that must not begin: a ValueError, nothing paid, nothing changed on disk."""
    made, before = pipeline(), state(root)
    with pytest.raises(ValueError, match=match):
        await made.run(story(), generation_id="id", output_dir=root / "images")
    assert (made.director.calls, made.critic.calls, made.image_model.requests) == ([], [], [])
    assert state(root) == before


def make_foreign_folder(root: Path) -> None:
    tree(root).mkdir(parents=True)
    (tree(root) / "thesis.tex").write_text("five years of work")


def make_empty_folder(root: Path) -> None:
    tree(root).mkdir(parents=True)


def make_file(root: Path) -> None:
    (root / TRACES).mkdir()
    tree(root).write_text("a file of that name")


def make_link(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "thesis.tex").write_text("five years of work")
    (root / TRACES).mkdir()
    tree(root).symlink_to(root / "elsewhere")


def make_dangling_link(root: Path) -> None:
    (root / TRACES).mkdir()
    tree(root).symlink_to(root / "nowhere")


def make_linked_root(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / TRACES).symlink_to(root / "elsewhere")


def make_root_a_file(root: Path) -> None:
    (root / TRACES).write_text("a file of that name")


OBSTACLES = [make_foreign_folder, make_empty_folder, make_file, make_link, make_dangling_link,
             make_linked_root, make_root_a_file]


@pytest.mark.parametrize("make", OBSTACLES, ids=lambda make: make.__name__[5:])
async def test_what_is_not_ours_is_left_alone(tmp_path, make):
    make(tmp_path)
    await refused(tmp_path, str(tmp_path / TRACES))


async def test_a_link_to_one_of_our_own_trees_is_refused(tmp_path):
    """Its marker is ours, but it lies elsewhere."""
    (tmp_path / "there").mkdir()
    await kept(tmp_path / "there")
    (tmp_path / TRACES).mkdir()
    tree(tmp_path).symlink_to(tree(tmp_path / "there"))
    await refused(tmp_path, TRACES)


async def test_a_link_inside_our_tree_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("five years of work")
    await kept(tmp_path)
    (tree(tmp_path) / "scene_1" / "link").symlink_to(tmp_path / "elsewhere")
    with suppress(ValueError):
        await pipeline().run(story(), generation_id="id", output_dir=tmp_path / "images")
    assert text(tmp_path / "elsewhere" / "thesis.tex") == "five years of work"


async def test_a_live_run_keeps_its_name_to_itself(tmp_path):
    model = FakeImages(seconds=60)
    running = asyncio.create_task(pipeline(image_model=model).run(
        story(1), generation_id="id", output_dir=tmp_path / "images"))
    while not model.requests:
        await asyncio.sleep(0.01)
    await refused(tmp_path, "id")
    other = await pipeline().run(story(), generation_id="id2", output_dir=tmp_path / "images")
    assert len(other.references) == 2 and tree(tmp_path).is_dir()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert not (tmp_path / TRACES).exists()


HANGING = """
import sys
from refimg.pipeline import Pipeline, Scene, Story
from tests.fakes import FakeImages, FakeScorer, critic, director

class Images(FakeImages):
    async def generate(self, request):
        print("drawing", flush=True)
        return await super().generate(request)

Pipeline(director=director(), critic=critic(90), image_model=Images(seconds=60),
         scorers=[FakeScorer()], num_variations=1).run_sync(
    Story(scenes=[Scene(prompt="A keeper.")]), generation_id="id", output_dir=sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
async def test_the_tree_of_a_killed_run_is_taken_over(tmp_path):
    """While the other process lives its name is taken; once killed, the name is free again."""
    command = [sys.executable, "-c", HANGING, str(tmp_path / "images")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "drawing\n"
            await refused(tmp_path, "id")
            other.send_signal(signal.SIGKILL)
            other.wait(30)
        finally:
            other.kill()
    assert ROUNDS[0] in names(tree(tmp_path) / "scene_1")
    (tree(tmp_path) / "scene_9").mkdir()
    result = await kept(tmp_path)
    assert [s.reference_from for s in result.scenes] == ["ranked", "ranked"]
    assert names(tree(tmp_path)) == ["scene_1", "scene_2"]
    await pipeline().run(story(), generation_id="id", output_dir=tmp_path / "images")
    assert not (tmp_path / TRACES).exists()


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def check_unharmed(result) -> None:
    """The run is as it would have been without the trouble."""
    assert [s.reference_from for s in result.scenes] == ["ranked", "ranked"]
    assert [s.enhancement.stop_reason for s in result.scenes] == ["max_iterations"] * 2
    assert [len(s.variations) for s in result.scenes] == [2, 2]


async def test_trace_files_that_cannot_be_written_do_not_matter(tmp_path, monkeypatch, caplog):
    plain = files._write_temporary
    monkeypatch.setattr(files, "_write_temporary", lambda folder, data, **how: (
        full_disk() if folder.name.startswith("scene_") else plain(folder, data, **how)))
    with caplog.at_level(logging.WARNING):
        check_unharmed(await pipeline().run(
            story(), generation_id="id", output_dir=tmp_path / "images"))
    assert any(GENERATION in record.getMessage() for record in caplog.records)
    assert not (tmp_path / TRACES).exists()


async def test_a_scenes_folder_that_cannot_be_made_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(traces.TraceTree, "scene", full_disk)
    check_unharmed(await pipeline().run(
        story(), generation_id="id", output_dir=tmp_path / "images"))


@pytest.mark.parametrize("stage", ["enhance", "generate", "score"])
async def test_a_tree_that_is_deleted_under_a_run_does_not_matter(tmp_path, stage):
    """Somebody clears up; the images are paid for, and come."""

    def clear_up(progress) -> None:
        if progress.stage == stage:
            shutil.rmtree(tmp_path / TRACES, ignore_errors=True)

    check_unharmed(await pipeline().run(story(), generation_id="id",
                                        output_dir=tmp_path / "images", on_progress=clear_up))
    assert not tree(tmp_path).exists()


@pytest.mark.parametrize("given", [False, True], ids=["enhanced", "handed in"])
async def test_a_file_in_the_place_of_a_scenes_folder_does_not_matter(tmp_path, given):
    def obstruct(progress) -> None:
        with suppress(OSError):
            (tree(tmp_path) / "scene_2").write_text("in the way")

    made = pipeline()
    enhancements = await made.enhance(story()) if given else None
    check_unharmed(await made.run(story(), generation_id="id", output_dir=tmp_path / "images",
                                  on_progress=obstruct, enhancements=enhancements))


async def test_a_tree_that_cannot_be_removed_does_not_fail_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(traces.shutil, "rmtree", full_disk)
    check_unharmed(await pipeline().run(
        story(), generation_id="id", output_dir=tmp_path / "images"))


async def test_a_place_where_no_tree_can_be_made_is_named_or_does_without(tmp_path, monkeypatch):
    """Images can be written, the folder beside them cannot be made: a volume of a container."""
    monkeypatch.setattr(traces.TraceTree, "_take", full_disk)
    made = pipeline()
    try:
        check_unharmed(await made.run(
            story(), generation_id="id", output_dir=tmp_path / "images"))
    except ValueError as error:
        assert str(tmp_path) in str(error) and not made.image_model.requests


async def test_hostile_texts_are_kept_as_they_can_be_seen_and_stay_in_their_files(tmp_path):
    told = Story(title=HOSTILE[0], scenes=[Scene(prompt=text) for text in HOSTILE])
    plain = pipeline(max_enhancement_iterations=0, keep_traces=True)
    await plain.run(told, generation_id="t", output_dir=tmp_path / "images")
    for number, text in enumerate(map(visible_text, HOSTILE), start=1):
        folder = tmp_path / TRACES / "t" / f"scene_{number}"
        assert (folder / "00_original_prompt.txt").read_bytes().decode() == text
        assert json.loads((folder / END[1]).read_text("utf-8"))["original_prompt"] == text
    names = {path.name for path in (tmp_path / TRACES / "t").rglob("*.*")}
    assert names <= {*ROUNDS, *END, GENERATION, ".refimg-trace"}
