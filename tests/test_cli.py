"""The command `refimg`: what goes to which stream, how it ends, and what strangers may write."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refimg import Story, StoryResult, defaults, draft_story
from refimg.cli import app
from refimg.engine.results import Event
from refimg.enhance import read_fences
from refimg.pipeline import choose, veto
from refimg.sandbox.agents import Director

from .fakes import FakeImages, FakeScorer, critic, director, picture, until
from .sampling import sampled
from .servers.images import start_image_server
from .servers.llm import start_llm_server
from .test_project import wheel  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("enhance", "generate", "score", "draft", "estimate", "run", "report", "load", "doctor")
HOSTILE = "<img src=x onerror=alert(1)> [/red] \x1b]0;owned\x07\x1b[2J \u202egnp.exe =HYPERLINK(1)"
HARMLESS = "<img src=x onerror=alert(1)> [/red]  gnp.exe =HYPERLINK(1)"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
STORY = {"scenes": [{"prompt": "A keeper at dawn."}, {"prompt": "The keeper at night."}]}


def refimg(*words: object, stdin: str | None = None):
    """What a command did, in this process."""
    return CliRunner().invoke(app, list(map(str, words)), input=stdin)


def value(done) -> object:
    """The one JSON value on standard output."""
    assert done.stdout.endswith("\n") and done.stdout.count("\n") == 1 and done.stdout.isascii()
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))


@pytest.fixture
def world(monkeypatch):
    """Fakes in the place of the default models; a test may change them."""
    made = {"director": director(), "critic": critic(90), "image_model": FakeImages()}
    for role, model in made.items():
        monkeypatch.setattr(defaults, role, lambda model=model: model)
    monkeypatch.setattr(defaults, "scorers", lambda image_model=None, view=None: [FakeScorer()])
    return made


@pytest.fixture
def story(tmp_path) -> Path:
    path = tmp_path / "story.json"
    path.write_text(json.dumps(STORY))
    return path


# help and mistakes


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command):
    done = refimg(command, "--help")
    assert done.exit_code == 0 and not done.stderr
    examples = done.stdout.partition("Examples:\n")[2]
    assert all(f"refimg {command}" in line for line in examples.strip().splitlines())
    assert f"refimg {command}" in examples and "--json" in done.stdout


def test_help_names_the_commands_and_the_exit_codes():
    done = refimg("--help")
    assert done.exit_code == 0
    assert all(re.search(rf"^  {name} ", done.stdout, re.M) for name in COMMANDS)
    assert "130 cancelled" in " ".join(done.stdout.split())


MISTAKES = {
    "no command": (),
    "no such command": ("paint",),
    "no such option": ("run", "story.yaml", "--fast"),
    "no argument": ("run",),
    "no number": ("run", "story.yaml", "-n", "many"),
    "no prompt": ("score", __file__),
    "no such file": ("score", "nowhere.png", "--prompt", "x"),
    "no such story": ("run", "nowhere.yaml"),
    "no such record": ("report", "nowhere.json"),
    "no story": ("estimate", __file__),
    "too many": ("generate", "A keeper.", "-n", 21),
    "blank": ("generate", "  "),
    "no brief": ("draft", " "),
    "no scenes": ("draft", "A lamp.", "-n", 0),
    "too many scenes": ("draft", "A lamp.", "--scenes", 51),
    "iterations": ("enhance", "A keeper.", "-i", 11),
    "no image": ("generate", "A keeper.", "--reference", __file__),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_bad_input_is_exit_1_and_said_once(world, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    done = refimg(*MISTAKES[what])
    assert done.exit_code == 1 and not done.stdout
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    told = value(refimg(*MISTAKES[what], "--json"))
    assert told["exit_code"] == 1 and told["error"]
    assert not world["image_model"].requests and not world["director"].calls


@pytest.mark.parametrize("words", [
    ("--generation-id", "../x"), ("--generation-id", ""), ("-n", 0), ("--aspect-ratio", "wide"),
    ("--budget-usd", "1"),
])  # fmt: skip
def test_settings_of_a_run_are_checked_before_it_begins(world, story, tmp_path, words):
    done = refimg("run", story, "-o", tmp_path / "out", *words, "--json")
    assert done.exit_code == 1 and words[0].strip("-").split("-")[0][:3] in value(done)["error"]
    assert not world["image_model"].requests and not (tmp_path / "out").exists()


def test_half_a_set_of_keys_is_bad_input(story, monkeypatch):
    monkeypatch.setenv("REPLICATE_API_TOKEN", "a-key-that-is-long")
    done = refimg("run", story, "--json")
    assert done.exit_code == 1 and "OPENAI_API_KEY" in value(done)["error"]


# what commands give


def test_a_run_gives_the_record_and_tells_the_rest_elsewhere(world, story, tmp_path):
    out = tmp_path / "images"
    done = refimg("run", story, "-n", 2, "-o", out, "--generation-id", "fox", "--json")
    assert done.exit_code == 0
    told = value(done)
    assert [Path(path).parent for path in told["references"]] == [out, out]
    saved = StoryResult.load(told["record"])
    assert saved == StoryResult.model_validate(told) and told["record"] == str(out / "fox.json")
    percents = [int(line.split()[0]) for line in done.stderr.splitlines() if " %  " in line]
    assert len(percents) == 6 and percents == sorted(percents) and percents[-1] == 100


def test_a_run_in_a_few_lines(world, story, tmp_path):
    done = refimg("run", story, "-n", 2, "-o", tmp_path, "--generation-id", "fox")
    first, second, last = done.stdout.splitlines()
    assert first.split()[:2] == ["1", "ranked"] and first.split()[3].endswith("_scene_01_v2.png")
    assert second.split()[:2] == ["2", "ranked"] and last.startswith("cost not known; record")


def test_story_and_prompt_from_standard_input(world, tmp_path):
    for text in (json.dumps(STORY), "scenes:\n- prompt: A keeper.\n"):
        done = refimg("run", "-", "-n", 1, "-o", tmp_path, "--json", stdin=text)
        assert done.exit_code == 0, done.stderr
    assert value(done)["story"]["scenes"][0]["prompt"] == "A keeper."
    assert value(refimg("enhance", "-", "--json", stdin="A dog.\n"))["original_prompt"] == "A dog."
    made = refimg("generate", "-", "-n", 2, "-o", tmp_path, "--seed", 3, "--json", stdin="A cat.")
    assert [image["prompt"] for image in value(made)] == ["A cat."] * 2
    paths = [image["image_path"] for image in value(made)]
    scored = refimg("score", *paths, "--prompt", "-", "--json", stdin="A cat.")
    assert scored.exit_code == 0 and [row["rank"] for row in value(scored)] == [1, 2]
    for text in ("scenes: {", "[]", "\x00", "scenes: []", "[" * 5000):
        done = refimg("run", "-", "--json", stdin=text)
        assert done.exit_code == 1 and value(done)["error"]


def test_an_estimate_has_prices_or_says_whose_are_missing(world, story, monkeypatch):
    for role, name in {"director": "gpt-5.5", "critic": "gpt-5.4-mini"}.items():
        monkeypatch.setattr(world[role], "name", name)
    assert "no price is known for fake-images" in refimg("estimate", story).stdout
    world["image_model"].name = "google/nano-banana"
    told = value(refimg("estimate", story, "-n", 3, "-i", 2, "--json"))
    assert told["images"] == 6 and 6 * 0.039 < told["low"] < told["high"]
    assert " USD: 24 images" not in refimg("estimate", story).stdout
    assert " USD: 8 images" in refimg("estimate", story).stdout


def test_fallbacks_are_exit_3(world, story, tmp_path):
    world["director"].script = lambda *call: ValueError("not today")
    enhanced = refimg("enhance", "A keeper.", "--json")
    assert enhanced.exit_code == 3 and value(enhanced)["final_prompt"] == "A keeper."
    done = refimg("run", story, "-n", 2, "-o", tmp_path, "--json")
    assert done.exit_code == 3 and "fallback" in done.stderr
    assert {scene["reference_from"] for scene in value(done)["scenes"]} == {"fallback"}


def test_a_carried_reference_is_exit_3(world, story, tmp_path):
    def draw(request, number):
        return ValueError("no") if "night" in request.prompt else picture(number)

    def write(messages, schema, number):
        original = read_fences(messages[1].content).get("original", "")
        return "At night." if "night" in original else "At dawn."

    world["director"].script = write
    world["image_model"].script = draw
    done = refimg("run", story, "-n", 1, "-o", tmp_path, "--json")
    assert [scene["reference_from"] for scene in value(done)["scenes"]] == ["ranked", "carried"]
    assert done.exit_code == 3


def test_no_score_at_all_is_exit_3_for_score_and_a_warning_for_run(
    world, story, tmp_path, monkeypatch
):
    blind = FakeScorer(value=lambda image, prompt: ValueError("no weights"))
    monkeypatch.setattr(defaults, "scorers", lambda image_model=None, view=None: [blind])
    run = refimg("run", story, "-n", 1, "-o", tmp_path)
    assert run.exit_code == 0 and run.stdout.count("unscored") == 2 and "WARNING" in run.stderr
    image = next(tmp_path.glob("*.png"))
    done = refimg("score", image, "--prompt", "A keeper.")
    assert done.exit_code == 3 and "no weights" in done.stdout


def test_no_image_at_all_is_exit_1(world, story, tmp_path):
    world["image_model"].script = lambda request, number: ValueError("no paint")
    for words in (("run", story), ("generate", "A keeper.")):
        done = refimg(*words, "-n", 1, "-o", tmp_path, "--json")
        assert done.exit_code == 1 and "no paint" in value(done)["error"]


def test_what_nobody_foresaw_comes_with_its_traceback(world, monkeypatch):
    monkeypatch.setattr(defaults, "director", lambda: {}["director"])
    done = refimg("enhance", "A keeper.", "--json")
    assert done.exit_code == 1 and value(done) == {"error": "'director'", "exit_code": 1}
    assert "Traceback" in done.stderr and "KeyError" in done.stderr


def test_the_log_is_left_as_it_was(world, story, tmp_path):
    before = list(logging.getLogger("refimg").handlers)
    refimg("run", story, "-n", 1, "-o", tmp_path)
    assert logging.getLogger("refimg").handlers == before


def test_load_fetches_what_is_missing_and_says_what_failed(monkeypatch):
    class Scorer(FakeScorer):
        error, fetched = None, 0

        def fetch(self):
            self.fetched += 1
            print("a library that prints")
            if self.error:
                raise self.error

    both = [Scorer("pickscore"), Scorer("aesthetic")]
    monkeypatch.setattr(defaults, "real_scorers", lambda: both)
    done = refimg("load", "--json")
    assert done.exit_code == 0 and value(done) == {"pickscore": None, "aesthetic": None}
    both[0].error = OSError("disk full\x1b[2J")
    done = refimg("load")
    assert done.exit_code == 1 and [one.fetched for one in both] == [2, 2]
    assert done.stdout == "pickscore: disk full\\x1b[2J\naesthetic: ready\n"


def test_report_writes_one_page(world, story, tmp_path):
    record = value(refimg("run", story, "-n", 1, "-o", tmp_path / "images", "--json"))["record"]
    done = refimg("report", record, "--json")
    page = Path(value(done)["report"])
    assert done.exit_code == 0 and page == Path(record).with_suffix(".html")
    assert "<html" in page.read_text("utf-8")
    other = tmp_path / "other.html"
    assert refimg("report", record, "-o", other).stdout == f"{other}\n" and other.is_file()
    assert refimg("report", record, "-o", record).exit_code == 1
    assert StoryResult.load(record).references


def test_report_into_a_folder_is_refused_and_leaves_nothing(world, story, tmp_path):
    record = value(refimg("run", story, "-n", 1, "-o", tmp_path / "images", "--json"))["record"]
    out = tmp_path / "pages"
    out.mkdir()
    done = refimg("report", record, "-o", out, "--json")
    assert done.exit_code == 1 and "output must be a file" in value(done)["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "pages", "story.json"]


# the record of another run


def named(story: object, folder: Path, **more: str):
    """What `refimg run` did under the name `fox`."""
    return refimg("run", story, "-n", 2, "-i", 0, "-o", folder, "--generation-id", "fox", "--json",
                  **more)  # fmt: skip


def decide(result: StoryResult, kind: str) -> StoryResult:
    """The result, after a person decided something."""
    if kind == "choose":
        return choose(result, 1, 1, "the better light")
    if kind == "veto":
        return veto(result, 1, 1, "a third hand")
    after = {"rerun": {"scenes": [1]}, "rescore": {"changed": [1]}}[kind]
    return result.model_copy(update={"history": [Event(kind=kind, after=after)]})


@pytest.mark.parametrize("kind", ["choose", "veto", "rerun", "rescore"])
def test_a_run_never_replaces_what_was_decided(world, story, tmp_path, kind):
    record = tmp_path / "out" / "fox.json"
    assert named(story, record.parent).exit_code == 0
    decide(StoryResult.load(record), kind).save(record)
    before, paid = record.read_bytes(), len(world["image_model"].requests)
    done = named(story, record.parent)
    assert done.exit_code == 1 and str(record) in value(done)["error"]
    assert kind in value(done)["error"] and "--generation-id" in value(done)["error"]
    assert record.read_bytes() == before and len(world["image_model"].requests) == paid
    assert named(story, tmp_path / "elsewhere").exit_code == 0


def test_a_run_never_replaces_the_record_of_another_story(world, story, tmp_path):
    record = tmp_path / "fox.json"
    assert named(story, tmp_path).exit_code == 0
    paid = len(world["image_model"].requests)
    others = [STORY | {"title": "another"}, {"scenes": STORY["scenes"][:1]}]
    for other in others:
        done = named("-", tmp_path, stdin=json.dumps(other))
        told = "--generation-id must be another one, .+ got 'fox': .+ the record of another story"
        assert done.exit_code == 1 and re.match(told, value(done)["error"])
    assert StoryResult.load(record).story.title == ""
    for text in ("{}", "no JSON", "[1]"):
        record.write_text(text)
        done = named(story, tmp_path)
        assert done.exit_code == 1 and "is not the record of a run" in value(done)["error"]
        assert record.read_text() == text
    assert len(world["image_model"].requests) == paid


def test_the_same_story_again_goes_on(world, tmp_path, monkeypatch):
    (tmp_path / "first.png").write_bytes(picture(7))
    text = ("scenes: [{prompt: A keeper.}]\ninitial_reference_image: first.png\n"
            "consistency_markers: {odd: .nan, day: 2026-11-23, deep: {1: [a, 0.1]}}\n")  # fmt: skip
    (tmp_path / "story.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for words in ("story.yaml", tmp_path / "story.yaml"):
        assert named(words, Path("out")).exit_code == 0
    done = named("-", Path("out"), stdin=text)
    assert done.exit_code == 0, done.stderr


# draft


def drafted(**scene) -> str:
    """A draft as a director answers it, of one scene."""
    return json.dumps({"scenes": [{"prompt": "Mara waits"} | scene],
                       "subjects": [{"name": "Mara"}], "consistency_markers": {"style": "ink"}})


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_draft_is_a_story_that_the_command_reads_again(world, tmp_path, monkeypatch, words):
    monkeypatch.setattr(defaults, "director", Director)
    done = refimg("draft", "-", "-n", 3, *words, stdin="an ad for a lamp\n")
    assert done.exit_code == 0 and done.stderr.count("WARNING: no keys are set") == 1
    story = asyncio.run(draft_story("an ad for a lamp", scenes=3, director=Director()))
    path = tmp_path / ("story.json" if words else "story.yaml")
    path.write_text(done.stdout, "utf-8")
    assert Story.load(path) == story
    assert value(refimg("estimate", "-", "--json", stdin=done.stdout))["images"] == 12
    assert words or not re.search("null|~|\\[|''|kind: character", done.stdout)


@pytest.mark.parametrize("text", [
    "no", "1:30", "# red", "a: b", "\U0001f98a \U0001f469\u200d\U0001f680", "caf\xe9 \u706f",
    HOSTILE, "[x](y) " * 100,
])  # fmt: skip
@pytest.mark.parametrize("charset", ["utf-8", "ascii", "cp1252"])
def test_a_draft_arrives_whatever_it_says_and_wherever_it_goes(world, tmp_path, text, charset):
    world["director"].script = [drafted(prompt=text, transition_note=text, subjects=["Mara"])]
    done = CliRunner(charset=charset).invoke(app, ["draft", "a lamp", "-n", "1"])
    assert done.exit_code == 0 and not OBEYED.search(done.stdout)
    (tmp_path / "story.yaml").write_bytes(done.stdout_bytes)
    story = asyncio.run(draft_story("a lamp", scenes=1, director=world["director"]))
    assert Story.load(tmp_path / "story.yaml") == story


def test_a_draft_never_shows_a_key(world, tmp_path):
    key = "r8_" + "q7" * 20
    world["director"].script = [drafted(prompt=key)]
    done = refimg("draft", "a lamp", "-n", 1)
    assert done.exit_code == 0 and key not in done.output
    assert Story.read(done.stdout, "it", as_json=False).scenes[0].prompt == "[redacted]"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_draft_that_cannot_be_used_is_exit_1_and_no_story(world, words):
    world["director"].script = ["no", drafted(subjects=["Mira"])]
    done = refimg("draft", "a lamp", "-n", 1, *words)
    assert done.exit_code == 1 and len(world["director"].calls) == 2
    assert "error: the director's draft: ValueError: unusable" in done.stderr
    assert value(done)["exit_code"] == 1 if words else not done.stdout


# doctor


BROKEN = {
    "REFIMG_SANDBOX": "perhaps", "OPENAI_BASE_URL": "http://me:the-secret@llm.example:8000/v1?k=v",
    "REPLICATE_BASE_URL": "http://[broken", "REPLICATE_API_TOKEN": "r8_" + "q7" * 20,
    "OPENAI_API_KEY": "a-key-without-a-shape", "REFIMG_PRICES": "/nowhere/prices.json",
    "REFIMG_CACHE": "~nobody-of-that-name/x", "REFIMG_DIRECTOR": "\x1b[2J\u202e",
    "HF_HUB_DOWNLOAD_TIMEOUT": "soon", "HF_ENDPOINT": "nonsense", "HF_HOME": "\x01",
    "COLUMNS": "-5",
}  # fmt: skip


@pytest.mark.parametrize("sandbox", sampled(["perhaps", "0", "1"], 3))
def test_doctor_never_raises_and_never_tells_a_key(sandbox):
    env = os.environ | BROKEN | {"REFIMG_SANDBOX": sandbox, "PYTHONPATH": str(ROOT)}
    for words in (["--json"], []):
        command = [sys.executable, "-c", "from refimg.cli import app; app()", "doctor", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        for secret in ("the-secret", "a-key-without-a-shape", "r8_q7", "k=v"):
            assert secret not in done.stdout + done.stderr
        assert not OBEYED.search(done.stdout)
        if words:
            told = value(done)
    assert told["keys"]["OPENAI_API_KEY"] == told["keys"]["REPLICATE_API_TOKEN"] == "set"
    assert told["hosts"]["OpenAI's protocol"] == "llm.example:8000"
    assert told["hosts"]["Replicate's protocol"] == "REPLICATE_BASE_URL is no address"
    assert ("ValueError" in told["world"]) == (sandbox == "perhaps")


@pytest.mark.parametrize(("env", "choice"), [
    ({}, "the sandbox, since no key is set"),
    ({"REFIMG_SANDBOX": "1", "OPENAI_API_KEY": "k"}, "the sandbox, since REFIMG_SANDBOX is 1"),
    ({"OPENAI_API_KEY": "k"}, "OPENAI_API_KEY says who writes, OPENAI_API_KEY says who draws"),
    ({"OPENAI_BASE_URL": "http://h/v1", "OPENAI_API_KEY": "k", "REPLICATE_API_TOKEN": "t"},
     "OPENAI_BASE_URL says who writes, REPLICATE_API_TOKEN says who draws"),
    ({"OPENAI_API_KEY": "k", "REPLICATE_API_TOKEN": "t", "REFIMG_IMAGE_MODEL": "a/b"},
     "OPENAI_API_KEY says who writes, REFIMG_IMAGE_MODEL says who draws"),
    ({"OPENAI_BASE_URL": "http://h/v1"}, "ValueError: REFIMG_IMAGE_MODEL is not set"),
])
def test_doctor_explains_the_choice(monkeypatch, env, choice):
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    assert value(refimg("doctor", "--json"))["choice"].startswith(choice)


def test_prices_have_a_line_each_with_date_and_source(monkeypatch, tmp_path):
    (tmp_path / "own.json").write_text('{"me/x": {"second": 0.01}}')
    monkeypatch.setenv("REFIMG_PRICES", str(tmp_path / "own.json"))
    lines = refimg("prices").stdout.splitlines()
    told = value(refimg("prices", "--json"))
    assert len(lines) == len(told) > 20 and told["me/x"] == {"second": 0.01}
    assert "me/x: second 0.01" in lines
    assert any(line.startswith("gpt-image-2: input 5.0") and "2026-11-22" in line for line in lines)


def test_doctor_says_what_is_here():
    told = value(refimg("doctor", "--json"))
    assert told["world"] == "sandbox" and set(told["keys"].values()) == {"not set"}
    assert told["versions"]["torch"] and list(told["weights"]) == [
        "pickscore", "clip_score", "aesthetic", "consistency"]  # fmt: skip
    assert told["hosts"]["OpenAI's protocol"] == "api.openai.com"


# texts of strangers


def test_a_terminal_obeys_nothing_that_a_stranger_wrote(world, tmp_path):
    world["director"].script = lambda m, s, n: f"{HOSTILE} {n}"
    prompt = HOSTILE + "\nsecond line"
    enhanced, exact = refimg("enhance", prompt), refimg("enhance", prompt, "--json")
    assert enhanced.stdout.startswith(HARMLESS)
    assert value(exact)["final_prompt"].startswith(HARMLESS)
    assert value(exact)["original_prompt"] == f"{HARMLESS}\nsecond line"
    world["image_model"].script = lambda request, number: ValueError(HOSTILE)
    story = {"scenes": [{"prompt": prompt}], "consistency_markers": {"x": HOSTILE}}
    runs = [refimg("run", "-", "-n", 1, "-o", tmp_path, *words, stdin=json.dumps(story))
            for words in ([], ["--json"])]  # fmt: skip
    assert HOSTILE in value(runs[1])["error"]
    other = [refimg("paint" + HOSTILE), refimg("run", HOSTILE), refimg("run", "x", f"--{HOSTILE}"),
             refimg("run", "-", stdin=f"scenes: 7\n? {json.dumps(HOSTILE)}")]  # fmt: skip
    for done in (enhanced, exact, *runs, *other):
        assert not OBEYED.search(done.stdout + done.stderr), repr(done.stdout + done.stderr)


def test_a_record_is_exact_and_its_numbers_are_json(world, tmp_path):
    story = {"scenes": [{"prompt": HOSTILE}], "title": HOSTILE + "🦊",
             "consistency_markers": {"x": HOSTILE, "odd": float("nan")}}  # fmt: skip
    done = refimg("run", "-", "-n", 1, "-o", tmp_path, "--json", stdin=json.dumps(story))
    assert done.exit_code == 0, done.stderr
    told = value(done)["story"]
    assert told["scenes"][0]["prompt"] + "🦊" == told["title"] == HARMLESS + "🦊"
    assert told["consistency_markers"] == {"x": HARMLESS}
    assert "odd has no value" in done.stderr


def test_what_a_library_prints_is_not_the_result(world):
    def write(messages, schema, number):
        print("a library that prints")
        return "A better keeper."

    world["director"].script = write
    done = refimg("enhance", "A keeper.", "--json")
    assert value(done)["final_prompt"] == "A better keeper."
    assert "a library that prints" in done.stderr


def test_a_key_in_an_error_is_cut_out(world, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-without-a-shape")
    world["image_model"].script = lambda *call: ValueError("bad a-key-without-a-shape")
    for words in ([], ["--json"]):
        done = refimg("generate", "A keeper.", "-n", 1, *words)
        assert done.exit_code == 1 and "a-key-without-a-shape" not in done.stdout + done.stderr


# streams that are closed, and bytes that are no text


@pytest.mark.parametrize("words", [
    ("enhance", "-"), ("generate", "-", "-n", 1), ("run", "-", "-n", 1), ("estimate", "-"),
    ("score", __file__, "--prompt", "-"),
])  # fmt: skip
def test_standard_input_is_utf_8_or_refused(world, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner(charset="ascii").invoke(app, [*map(str, words), "--json"], b"scenes: caf\xe9")
    assert done.exit_code == 1 and value(done)["error"].startswith("standard input must be UTF-8")
    assert "Traceback" not in done.stderr and not world["image_model"].requests
    assert not world["director"].calls


def test_standard_input_is_utf_8_whatever_the_locale(world):
    done = CliRunner(charset="ascii").invoke(app, ["enhance", "-", "--json"], "a café".encode())
    assert value(done)["original_prompt"] == "a café"


@pytest.mark.parametrize("words", [("enhance",), ("generate",), ("draft",),
                                   ("score", __file__, "--prompt")])  # fmt: skip
def test_an_argument_that_is_no_text_is_refused(world, words):
    done = refimg(*words, "caf\udce9", "--json")
    assert done.exit_code == 1 and "must be UTF-8, got" in value(done)["error"]
    assert not world["image_model"].requests and not world["director"].calls


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize(("words", "closed"), sampled([
    ("run -", "input"), ("enhance -", "input"), ("doctor", "output"),
], 3))  # fmt: skip
def test_a_closed_stream_is_one_line_and_exit_1(words, closed):
    stream = {"input": "<&-", "output": ">&-"}[closed]
    line = f"'{sys.executable}' -c 'from refimg.cli import app; app()' {words} {stream}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "REFIMG_SANDBOX": "1"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: standard {closed} ") and "closed" in done.stderr


# whole processes


@pytest.fixture(scope="module")
def servers():
    with start_llm_server() as llm, start_image_server() as images:
        yield llm, images


def process(servers, folder: Path, *words: object) -> subprocess.Popen:
    """`refimg` in a process of its own, on the real SDKs."""
    llm, images = servers
    env = {"OPENAI_BASE_URL": llm.base_url, "REPLICATE_BASE_URL": images.base_url,
           "REPLICATE_API_TOKEN": "not-a-token", "REFIMG_CACHE": str(folder / "cache"),
           "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-c", "from refimg.cli import app; app(prog_name='refimg')"]
    return subprocess.Popen([*command, *map(str, words)], cwd=folder, env=os.environ | env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_hanging_run_is_cancelled_at_the_provider_too_and_resumed(
    servers, story, tmp_path, stop, code
):
    llm, images = servers
    llm.script()
    images.script([None, "forever", "forever"])
    words = ("run", story, "-n", 3, "-i", 1, "--generation-id", "fox", "--json")
    hanging = process(servers, tmp_path, *words)
    until(lambda: len(images.requests("create")) == 3 and len(images.orphans()) == 2)
    begun, before = time.monotonic(), len(llm.requests())
    hanging.send_signal(stop)
    out, err = hanging.communicate(timeout=60)
    assert hanging.returncode == code and time.monotonic() - begun < 15
    assert json.loads(out)["exit_code"] == code and out.count("\n") == 1
    assert "generation fox" in err and "Traceback" not in err
    assert images.orphans() == [] and len(images.requests("create")) == 3
    resumed = process(servers, tmp_path, *words)
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert len(json.loads(out)["references"]) == 2 and "unscored" in err
    assert len(images.requests("create")) == 3 + 2 + 3 and len(llm.requests()) == before


@pytest.mark.slow
@pytest.mark.all
def test_a_run_on_fallbacks_keeps_the_streams_apart(servers, story, tmp_path):
    llm, images = servers
    llm.script(["401"] * 20)
    images.script()
    done = process(servers, tmp_path, "run", story, "-n", 2, "--json")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 3, err
    assert {scene["reference_from"] for scene in json.loads(out)["scenes"]} == {"fallback"}
    assert "fallback: scene 1" in err and "100 %" in err and out.count("\n") == 1


# from the wheel, as a user has it


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of an environment that has the wheel, and borrows what it depends on."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
               "--no-index", wheel.filename]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the layout of an environment")
def test_the_command_from_the_wheel_in_a_clean_environment(installed, tmp_path):
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1",
           "OMP_NUM_THREADS": "1"}  # fmt: skip

    def shell(*words: object, stdin: str = "") -> tuple[int, str]:
        command = [installed / "bin" / "refimg", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=env, input=stdin, capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    where = [installed / "bin" / "python", "-c", "import refimg; print(refimg.__file__)"]
    place = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path(place.stdout.strip()).is_relative_to(installed)
    for command in COMMANDS:
        code, text = shell(command, "--help")
        assert code == 0 and "Examples:" in text
        assert shell(command, "--nonsense", "--json")[0] == 1
    few = ("-n", 2, "--seed", 1, "--json")
    story = json.dumps({"scenes": [{"prompt": "A red fox in the snow at dawn"}]})
    code, text = shell("enhance", "-", "--json", stdin="A red fox in the snow")
    assert code == 0 and json.loads(text)["director"] == "sandbox-director"
    code, text = shell("generate", "A red fox in the snow", *few)
    images = [one["image_path"] for one in json.loads(text)]
    assert code == 0 and len(images) == 2
    code, text = shell("score", *images, "--prompt", "A red fox in the snow", "--json")
    assert code == 0 and all(row["overall"] is not None for row in json.loads(text))
    code, text = shell("draft", "a red fox in the snow", "-n", 1)
    assert code == 0 and Story.read(text, "it", as_json=False).subjects[0].name == "fox"
    code, text = shell("estimate", "-", "--json", stdin=story)
    assert code == 0 and json.loads(text)["images"] == 4
    code, text = shell("run", "-", *few, "--generation-id", "fox", stdin=story)
    assert code == 0 and json.loads(text)["sandbox"] is True
    code, text = shell("report", "output/images/fox.json")
    assert code == 0 and Path(tmp_path, text.strip()).stat().st_size > 10_000
    code, text = shell("doctor", "--json")
    assert code == 0 and json.loads(text)["world"] == "sandbox"
    code, text = shell("load", "--json")
    assert code == 1 and all("HF_HUB_OFFLINE" in why for why in json.loads(text).values())
