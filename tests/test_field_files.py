"""Files as people write them, and the places they keep them."""

from __future__ import annotations

import errno
import io
import json
import logging
import ntpath
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path, PurePosixPath, PureWindowsPath

import filelock
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refimg import Pipeline, Scene, Story, StoryResult, cli, defaults
from refimg.adapters.clip import Aesthetic, ClipScore, PickScore
from refimg.adapters.prices import PRICES, PriceTable
from refimg.engine import results
from refimg.engine.prompts import compose_prompt
from refimg.engine.protocols import ImageOrder
from refimg.enhance import enhance_prompt_iterative
from refimg.generate import generate_images
from refimg.score import Calibration, calibrate, score_images
from refimg.storage.journal import Journal
from refimg.storage.traces import TraceTree
from refimg.validate import load_runs, runs_table, score_csv
from refimg.view import Gallery, report, save_table
from refimg.view.gallery_state import GalleryState

from .fakes import FakeImages, FakeScorer, critic, director, picture
from .sampling import sampled

BODY = {"scenes": [{"prompt": "ein Fuchs 🦊"}], "title": "Füchse"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder of its own; the working folder is another one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def standard_input(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "cp1252"))


# byte order marks


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-le-bom", "utf-8"])
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_story_with_a_byte_order_mark_is_read(tmp_path, monkeypatch, kind, coding):
    text = json.dumps(BODY, ensure_ascii=False, indent=2).replace("\n", "\r\n")
    data = b"\xff\xfe" + text.encode("utf-16-le") if "bom" in coding else text.encode(coding)
    path = tmp_path / f"s.{kind}"
    path.write_bytes(data)
    assert Story.load(path) == Story(**BODY)
    standard_input(monkeypatch, data)
    assert cli._story_of("-") == Story(**BODY)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_no_byte_order_mark_is_left_in_a_prompt(monkeypatch, coding):
    standard_input(monkeypatch, "a fox\r\n".encode(coding))
    assert cli._prompt_of("-") == "a fox"
    assert Scene(prompt="\ufeffa fox").prompt == "a fox"


# what YAML makes of plain values


AS_WRITTEN = ["19:30", "16:9", "off", "on", "yes", "No", "1.40", "007", "0x1F", "0o17", "1e3",
              "1_000", "2026-11-29", ".5", "true", "False", "12", "-3", "=", ".inf", "1:30:00.5"]


@pytest.mark.parametrize("value", AS_WRITTEN)
def test_a_plain_value_is_the_text_as_written(tmp_path, value):
    text = (f"title: {value}\nbrand: {value}\nscenes:\n- prompt: {value}\n"
            f"consistency_markers:\n  style: {value}\n  lens: [{value}]\n  {value}: x\n")
    story = Story.load(written(tmp_path / "s.yaml", text))
    assert (story.title, story.brand, story.scenes[0].prompt) == (value,) * 3
    assert story.consistency_markers == {"style": value, "lens": [value], value: "x"}
    assert f"Style: {value.rstrip('.')}." in compose_prompt("p", story, 1)


@pytest.mark.parametrize("value, meant", [("no", False), ("off", False), ("false", False),
                                          ("yes", True), ("On", True), ("true", True)])
def test_a_truth_value_of_a_story_may_be_written_in_any_of_yamls_ways(tmp_path, value, meant):
    path = written(tmp_path / "s.yml", f"scenes: [{{prompt: a, subject_present: {value}}}]")
    assert Story.load(path).scenes[0].subject_present is meant


@pytest.mark.parametrize("value", ["~", "null", "", "Null"])
def test_no_value_is_still_none(tmp_path, value):
    path = written(tmp_path / "s.yaml", f"brand: {value}\nscenes: [{{prompt: a}}]")
    assert Story.load(path).brand is None


def test_merges_and_anchors_still_work(tmp_path):
    text = "scenes:\n- &one\n  prompt: a\n  transition_note: b\n- <<: *one\n  prompt: c\n"
    scenes = Story.load(written(tmp_path / "s.yaml", text)).scenes
    assert [(s.prompt, s.transition_note) for s in scenes] == [("a", "b"), ("c", "b")]


# silent losses


TWICE = {
    "prompt.yaml": ("scenes:\n- prompt: a\n  prompt: b\n", "prompt.*line 3"),
    "scenes.yaml": ("scenes: [{prompt: a}]\nscenes: [{prompt: b}]\n", "scenes.*line 2"),
    "marker.yaml": ("scenes: [{prompt: a}]\nconsistency_markers:\n  mood: a\n  mood: b",
                    "mood.*line 4"),
    "quoted.yaml": ("scenes:\n- prompt: a\n  'prompt': b\n", "prompt.*line 3"),
    "prompt.json": ('{"scenes": [{"prompt": "a", "prompt": "b"}]}', "prompt"),
    "scenes.json": ('{"scenes": [], "scenes": [{"prompt": "b"}]}', "scenes"),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_stands_twice_is_refused(tmp_path, monkeypatch, name):
    text, words = TWICE[name]
    with pytest.raises(ValueError, match=words) as caught:
        Story.load(written(tmp_path / name, text))
    assert "twice" in str(caught.value) and name in str(caught.value)
    standard_input(monkeypatch, text.encode())
    with pytest.raises(ValueError, match=f"{words.split('.')[0]}.*twice"):
        cli._story_of("-")


@pytest.mark.parametrize("line, key, lost", [
    ("palette: #ff0000", "palette", "#ff0000"), ("lens: 35 #mm", "lens", "#mm"),
    ("mood: calm  #1 of 2", "mood", "#1 of 2"), ("mood:", "mood", ""), ("mood: ~", "mood", ""),
])
def test_what_a_number_sign_took_away_is_warned_of(tmp_path, caplog, line, key, lost):
    text = f"scenes: [{{prompt: a}}]\nconsistency_markers:\n  {line}\n"
    Story.load(written(tmp_path / "s.yaml", text))
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said and all(key in text and "quotes" in text for text in said)
    assert lost in " ".join(said)


@pytest.mark.parametrize("block, line, lost", [
    ("\n  - #ff0000\n  - #00ff00", 4, "#ff0000"), ("\n  - red #1\n  - blue", 4, "#1"),
    (" [#ff0000\n    ]", 3, "#ff0000"), ("\n    sky: #00ff00", 4, "#00ff00"),
    (" [\n    #ff0000,\n    red]", 4, "#ff0000"), (" [red,\n    blue #2\n    ]", 4, "#2"),
    (" ['#1', a#b, #ff0000\n    ]", 3, "#ff0000"),
    ("\n    calm #1 of 2", 4, "#1 of 2"), ("\n  - # a comment\n  - red", 0, "item 1"),
    ("\n    sky:", 0, "palette, sky"),
])  # fmt: skip
def test_what_a_number_sign_took_from_a_list_is_warned_of(tmp_path, caplog, block, line, lost):
    text = f"scenes: [{{prompt: a}}]\nconsistency_markers:\n  palette:{block}\n"
    Story.load(written(tmp_path / "s.yaml", text))
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert all("quotes" in text for text in said)
    found = [text for text in said if lost in text and (not line or f"line {line}" in text)]
    assert len(found) == 1, said


@pytest.mark.parametrize("markers, named", [
    ({"palette": None}, ["palette"]), ({"palette": [None, "red"]}, ["palette, item 1"]),
    ({"light": {"sky": None, "sea": [None]}, "mood": "calm"}, ["light, sky", "light, sea, item 1"]),
])  # fmt: skip
async def test_a_marker_without_a_value_is_warned_of_once(tmp_path, caplog, markers, named):
    story = Story(scenes=[Scene(prompt="a")], consistency_markers=markers)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [f"consistency_markers, {name} has no value" in text
            for name, text in zip(named, said, strict=True)] == [True] * len(named)
    caplog.clear()
    pipeline = Pipeline(director(), critic(), FakeImages(), [FakeScorer()], num_variations=1,
                        max_enhancement_iterations=0)
    result = await pipeline.run(story, output_dir=tmp_path / "images", generation_id="x")
    result.save(tmp_path / "run.json")
    assert StoryResult.load(tmp_path / "run.json") == result
    assert not [r for r in caplog.records if "no value" in r.getMessage()]


def test_a_prompt_that_a_number_sign_cut_short_is_warned_of(tmp_path, caplog):
    Story.load(written(tmp_path / "s.yaml", "scenes:\n- prompt: fox #1 of the den\n"))
    assert "prompt" in caplog.text and "#1 of the den" in caplog.text


@pytest.mark.parametrize("line", ["mood: calm  # a comment", "mood: '#ff0000'", "mood: a#b",
                                  "mood: calm  #", "mood: |\n    one #1\n    two",
                                  "mood:\n  - a#b  # one\n  #- two\n  - '#3'",
                                  "mood: ['#1', a#b]  # two", "mood: [ # colours\n    red]"])
def test_comments_and_quoted_signs_are_not_warned_of(tmp_path, caplog, line):
    text = f"scenes: [{{prompt: a}}]\nconsistency_markers:\n  {line}\n"
    Story.load(written(tmp_path / "s.yaml", text))
    assert not caplog.records


# references


@pytest.mark.parametrize("url", ["https://x.example/a.png", "http://x/a.png", "s3://b/a.png",
                                 "file:///a.png", "data:image/png;base64,AAAA"])
def test_an_address_as_image_of_a_story_is_refused_as_one(tmp_path, url):
    text = f"scenes: [{{prompt: a}}]\ninitial_reference_image: {url}\n"
    with pytest.raises(ValueError, match="file on this machine") as caught:
        Story.load(written(tmp_path / "s.yaml", text))
    assert url in str(caught.value) and "initial_reference_image" in str(caught.value)
    with pytest.raises(ValueError, match="file on this machine"):
        Story(scenes=[Scene(prompt="a")], initial_reference_image=Path(url))


@pytest.mark.parametrize("path", ["C:\\images\\a.png", "C:/images/a.png", "a:b.png", "./x/a.png"])
def test_a_path_is_no_address(path):
    Story(scenes=[Scene(prompt="a")], initial_reference_image=path)


# the home folder


async def test_a_tilde_is_the_home_folder(home):
    (home / "me.png").write_bytes(picture(1))
    written(home / "s.yaml", "scenes: [{prompt: a}]\ninitial_reference_image: ~/me.png\n")
    story = Story.load("~/s.yaml")
    pipeline = Pipeline(director(), critic(), FakeImages(), [FakeScorer()], num_variations=1,
                        max_enhancement_iterations=0, keep_traces=True)
    result = await pipeline.run(story, output_dir="~/refs", generation_id="x")
    assert result.references == [home / "refs" / "x_scene_01_v1.png"]
    assert (home / "reference_image_traces" / "x").is_dir()
    result.save("~/records/run.json")
    assert (home / "records" / "run.json").is_file()
    assert StoryResult.load("~/records/run.json") == result
    (made,) = await generate_images("a", 1, output_dir="~/own", model=FakeImages(),
                                    references=["~/me.png"])
    assert made.image_path.parent == home / "own"
    assert (await score_images(["~/own/image_v1.png"], "a", scorers=[FakeScorer()]))[0].overall
    assert not [*Path().iterdir()]


def test_a_tilde_is_the_home_folder_for_commands_and_files(home, monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    monkeypatch.setattr(defaults, "scorers", lambda image_model=None, view=None: [FakeScorer()])
    written(home / "s.yaml", "scenes: [{prompt: a red fox}]\n")
    words = ["run", "~/s.yaml", "--output-dir", "~/refs", "--generation-id", "x", "-n", "1"]
    done = CliRunner().invoke(cli.app, [*words, "-i", "0", "--json"])
    assert done.exit_code == 0, done.output
    assert (home / "refs" / "x.json").is_file() and (home / "refs" / "x_scene_01_v1.png").is_file()
    done = CliRunner().invoke(cli.app, ["report", "~/refs/x.json", "-o", "~/x.html"])
    assert done.exit_code == 0 and (home / "x.html").is_file()
    assert not [*Path().iterdir()]


async def _traced(result: StoryResult) -> Path:
    await enhance_prompt_iterative("a fox", director=director(), critic=critic(),
                                   trace_dir="~/trace")
    return Path("trace/00_original_prompt.txt")


async def _calibrated(result: StoryResult) -> Path:
    made = calibrate(range(100), FakeScorer())
    made.save("~/map.json")
    assert Calibration.load("~/map.json") == made
    return Path("map.json")


async def _tabled(result: StoryResult) -> Path:
    save_table(runs_table([result]), "~/runs.csv")
    assert len(load_runs("~/records")) == 1
    return Path("runs.csv")


async def _scored(result: StoryResult) -> Path:
    csv = Path("~/list.csv").expanduser()
    csv.write_text(f"story,scene,text,image\ns,1,a,{result.references[0].name}\n")
    assert len(await score_csv("~/list.csv", "~/refs", scorers=[FakeScorer()])) == 1
    return Path("list.csv")


async def _written_report(result: StoryResult) -> Path:
    report(result, "~/page.html")
    return Path("page.html")


async def _shown(result: StoryResult) -> Path:
    assert GalleryState("~/records/run.json").path == Path("~/records/run.json").expanduser()
    gallery = Gallery(None, result.story, generation_id="y", output_dir="~/refs")
    assert gallery.path == Path("~/refs/y.json").expanduser()
    return Path("records/run.json")


async def _journaled(result: StoryResult) -> Path:
    assert Journal("~/journal").folder == Path("~/journal").expanduser()
    await Journal("~/journal").check()
    return Path("journal")


async def _weighed(result: StoryResult) -> Path:
    for scorer in (ClipScore("~/weights"), Aesthetic(folder="~/weights"), PickScore("~/weights")):
        assert scorer.source.path == Path("~/weights").expanduser()
    return Path("weights")


@pytest.mark.parametrize("use", [
    _traced, _calibrated, _tabled, _scored, _written_report, _shown, _journaled, _weighed])
async def test_a_tilde_is_the_home_folder_for_every_path(home, use):
    pipeline = Pipeline(director(), critic(), FakeImages(), [FakeScorer()], num_variations=1,
                        max_enhancement_iterations=0)
    story = Story(scenes=[Scene(prompt="a")])
    result = await pipeline.run(story, output_dir="~/refs", generation_id="x")
    result.save("~/records/run.json")
    (home / "weights").mkdir()
    assert (home / await use(result)).exists()
    assert not [*Path().iterdir()]


def test_the_price_file_may_be_in_the_home_folder(home, monkeypatch):
    written(home / "prices.json", '{"mine": {"image": 0.01}}')
    monkeypatch.setenv("REFIMG_PRICES", "~/prices.json")
    assert PriceTable().rows().keys() == {*PRICES, "mine"}


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_a_price_file_with_a_byte_order_mark_is_read(tmp_path, monkeypatch, coding):
    path = tmp_path / "prices.json"
    path.write_bytes('{"mine": {"image": 1}}\r\n'.encode(coding))
    monkeypatch.setenv("REFIMG_PRICES", str(path))
    assert PriceTable().image_cost(ImageOrder("mine")) == 1.0


@pytest.mark.parametrize("text, key", [
    ('{"mine": {"image": 0.01}, "mine": {"image": 9}}', "mine"),
    ('{"mine": {"image": 0.01, "image": 9}}', "image"),
])
def test_a_price_that_stands_twice_is_refused(tmp_path, monkeypatch, text, key):
    monkeypatch.setenv("REFIMG_PRICES", str(written(tmp_path / "prices.json", text)))
    with pytest.raises(ValueError, match=rf"REFIMG_PRICES must be .*prices\.json.*'{key}' twice"):
        PriceTable()


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "1", '{"m": {"image": true}}',
                                  '{"m": {"image": "1"}}', '{"m": {"image": NaN}}',
                                  '{"m": {"image": Infinity}}'])
def test_a_price_is_a_finite_number(tmp_path, monkeypatch, text):
    monkeypatch.setenv("REFIMG_PRICES", str(written(tmp_path / "prices.json", text)))
    with pytest.raises(ValueError, match="REFIMG_PRICES must be a JSON file"):
        PriceTable()


# drives


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_drive_without_locks_is_named_with_a_way_round(tmp_path, monkeypatch, number):
    def refuse(self, *args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(ValueError, match=r"file locks.*disk of this machine") as caught:
        TraceTree.open(tmp_path / "images", "x")
    assert str(tmp_path) in str(caught.value)


WITHOUT_LOCKS = """
import asyncio, json, sys
from pathlib import Path
from refimg import Pipeline, Scene, Story
from refimg.storage import database
from refimg.storage.journal import Journal
from tests.fakes import FakeImages, FakeScorer, critic, director

database._BUSY, folder, agent = 0.2, Path(sys.argv[1]), director()
journal = Journal(folder / "journal") if sys.argv[2] == "journal" else None
run = Pipeline(agent, critic(90), FakeImages(), [FakeScorer()], num_variations=1, journal=journal)
try:
    asyncio.run(run.run(Story(scenes=[Scene(prompt="a")]), output_dir=folder / "images"))
    told = ""
except ValueError as error:
    told = str(error)
print(json.dumps([told, len(agent.calls)]))
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory) -> Path:
    """What takes the locks of files away from a process that loads it."""
    made = tmp_path_factory.mktemp("shim") / "no_locks.so"
    source = Path(__file__).with_name("no_locks.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the shim is built with gcc")
@pytest.mark.parametrize(("what", "number"), sampled(product(
    ["traces", "journal"], [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]), 6))
def test_a_run_on_a_drive_without_locks_is_refused_unpaid(no_locks, tmp_path, what, number):
    """Without `flock` at all, ENOSYS, a lock file does for the traces; SQLite has none."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "NO_LOCKS": str(number),
                        "LD_PRELOAD": str(no_locks)}
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    told, calls = json.loads(done.stdout)
    if (what, number) == ("traces", errno.ENOSYS):
        assert told == "" and calls
    else:
        named, way = {"traces": ("output_dir", "file locks.*disk of this machine"),
                      "journal": ("journal", "file locks")}[what]
        assert re.match(f"({named}) must be .*{way}.*{tmp_path}", told) and calls == 0


@pytest.mark.parametrize("path, folder, text", [
    ("C:\\refs\\images\\a.png", "C:\\refs", "images/a.png"),
    ("C:\\refs\\images\\a.png", "C:\\refs\\records\\old", "../../images/a.png"),
    ("D:\\images\\a.png", "C:\\refs", "D:/images/a.png"),
    ("\\\\server\\share\\a.png", "C:\\refs", "//server/share/a.png"),
])
def test_windows_paths_are_written_with_forward_slashes_also_across_drives(path, folder, text):
    found = results._written(PureWindowsPath(path), PureWindowsPath(folder))
    assert found == text
    read = results._read(found, PureWindowsPath(folder))
    assert ntpath.normcase(read) == ntpath.normcase(path)


def test_posix_paths_are_written_as_they_are():
    assert results._written(PurePosixPath("/a/b\\c.png"), PurePosixPath("/a")) == "b\\c.png"


async def test_a_record_that_windows_wrote_is_read_here(tmp_path):
    pipeline = Pipeline(director(), critic(), FakeImages(), [FakeScorer()], num_variations=1,
                        max_enhancement_iterations=0)
    story = Story(scenes=[Scene(prompt="a")])
    result = await pipeline.run(story, output_dir=tmp_path / "images", generation_id="x")
    result.save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text("utf-8")
    assert '"images/x_scene_01_v1.png"' in text
    written(tmp_path / "run.json", text.replace("images/x_scene", "images\\\\x_scene"))
    assert StoryResult.load(tmp_path / "run.json") == result


# many large images


async def test_many_large_images_are_scored_in_small_groups(tmp_path):
    noise = Image.fromarray(np.zeros((3000, 4000, 3), "uint8"))
    noise.save(tmp_path / "a.jpg", quality=20)
    held, most = [], []

    class Watching(FakeScorer):
        def score(self, batch):
            held.append(sum(image.width * image.height for image in batch.images))
            most.append(len(batch.images))
            return super().score(batch)

    paths = [tmp_path / "a.jpg"] * 5 + [tmp_path / "none.jpg"] + [tmp_path / "a.jpg"] * 2
    found = await score_images(paths, "a", scorers=[Watching()])
    assert [scores.overall is None for scores in found] == [False] * 5 + [True] + [False] * 2
    assert sum(most) == 7 and max(held) <= 24_000_000


async def test_small_images_are_scored_in_one_call(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    scorer = FakeScorer()
    await score_images([tmp_path / "a.png"] * 40, "a", scorers=[scorer])
    assert [len(batch.images) for batch in scorer.batches] == [40]
