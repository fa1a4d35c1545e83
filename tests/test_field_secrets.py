"""What giving a key away looks like in the field, and texts that do more than they say."""

from __future__ import annotations

import html
import json
import logging
import re
from urllib.parse import quote

import pytest
from PIL import Image

from refimg import Pipeline, Scene, Story, StoryResult, choose
from refimg.enhance import Reply, enhance_prompt_iterative
from refimg.generate import generate_images
from refimg.score import score_images
from refimg.storage import secrets
from refimg.storage.secrets import log_line, redact, remember
from refimg.storage.traces import write_trace
from refimg.view import save_table

from .fakes import FakeChat, FakeImages, FakeScorer, critic, director, picture
from .sampling import sampled

KEY = "sk-" + "proj-Zt7Qm2Xv9Lp4Rw8Kd3Nf6Hs1Jb5Gc0Ty_Ue-Oa"


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    monkeypatch.setattr(secrets, "_remembered", set())
    remember(KEY)


def gives_away(text: str, size: int = 12) -> list[str]:
    """The runs of the key's letters and digits that a reader of the text could put together."""
    row = re.sub(r"[\W_]", "", re.sub(r"\x1b\[[0-9;]*m|\\+[nrt]", "", text))
    own = re.sub(r"[\W_]", "", KEY)
    return [own[i : i + size] for i in range(len(own) - size + 1) if own[i : i + size] in row]


def split(key: str, size: int, between: str) -> str:
    return between.join(key[i : i + size] for i in range(0, len(key), size))


PIECES = {
    "wrapped": split(KEY, 12, "\n    "),
    "wrapped with CRLF": split(KEY, 10, "\r\n"),
    "in words of four": split(KEY, 4, " "),
    "as a list": json.dumps([KEY[i : i + 9] for i in range(0, len(KEY), 9)]),
    "as added texts": split(KEY, 8, '" + "'),
    "coloured": split(KEY, 7, "\x1b[1;31m"),
    "colours written out": split(KEY, 7, "\\x1b[0m"),
    "every sign percent-coded": "".join(f"%{ord(c):02X}" for c in KEY),
    "percent-coded twice": quote(quote("".join(f"%{ord(c):02x}" for c in KEY[:20]))) + KEY[20:],
    "every sign as JSON": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "JSON in JSON": "".join(f"\\\\u{ord(c):04x}" for c in KEY),
    "as HTML": "".join(f"&#{ord(c)};" for c in KEY),
    "as HTML with names": html.escape(split(KEY, 6, "&")),
    "wrapped, and the repr of it": repr(split(KEY, 12, "\n")),
    "the repr of the repr": repr(repr(split(KEY, 12, "\n"))),
    "its first half": KEY[: len(KEY) // 2],
    "its second half": KEY[len(KEY) // 2 :],
    "its middle": KEY[12:34],
    "a zero-width space in it": split(KEY, 11, "\u200b"),
}


@pytest.mark.parametrize("said", PIECES.values(), ids=PIECES)
def test_a_key_in_pieces_or_escaped_gives_nothing_away(said):
    for text in (said, f"invalid key: {said}.", log_line(said)):
        hidden = redact(text)
        assert "[redacted]" in hidden and not gives_away(hidden)
    for coded in (f"%{ord(KEY[-1]):02X}%", f"u{ord(KEY[-1]):04x}\\", f"&#{ord(KEY[-1])};&"):
        assert coded not in redact(said)
    assert redact(f"before {said} after").startswith("before ")
    assert redact(f"before {said} after").endswith(" after")


@pytest.mark.parametrize("sign", sampled(
    ["\\", "%", "%25", "&", "&#", "\x1b", "\x1b[", "\\u00", "\\x1b["], 3))
def test_a_long_text_of_marks_is_looked_through_once(sign):
    """What once took the square of its length would not end here."""
    long = sign * 200_000
    assert redact(f"{long} {KEY}").endswith("[redacted]")


def test_a_traceback_with_a_wrapped_key_gives_nothing_away(caplog):
    try:
        raise ValueError(split(KEY, 10, "\n"))
    except ValueError:
        logging.getLogger("refimg.pipeline").exception("failed")
    assert "[redacted]" in caplog.text and not gives_away(caplog.text)


def reflects(*_):
    return RuntimeError(f"no access for {split(KEY, 10, chr(10))} {KEY[:24]}")


async def test_a_reflected_key_is_in_no_record_trace_log_or_error(tmp_path, caplog):
    pipeline = Pipeline(
        director(), critic(), FakeImages(lambda r, n: reflects() if n == 1 else picture(n)),
        [FakeScorer("pickscore", lambda image, prompt: reflects())],
        num_variations=2, max_enhancement_iterations=1, keep_traces=True)
    story = Story(scenes=[Scene(prompt="a fox")])
    result = await pipeline.run(story, output_dir=tmp_path / "images", generation_id="x")
    assert result.scenes[0].warnings and "[redacted]" in "".join(result.scenes[0].warnings)
    assert "[redacted]" in result.scenes[0].variations[0].scores.notes["pickscore"]
    result.save(tmp_path / "run.json")
    pipeline.image_model = FakeImages(reflects)
    with pytest.raises(RuntimeError) as caught:
        await pipeline.run(story, output_dir=tmp_path / "images", generation_id="y")
    seen = [caplog.text, str(caught.value), (tmp_path / "run.json").read_text("utf-8")]
    seen += [p.read_text("utf-8") for p in tmp_path.rglob("*.*") if p.suffix in (".txt", ".json")]
    assert len(seen) > 6
    assert not [found for text in seen for found in gives_away(text)]


async def test_agents_that_reflect_a_key_leave_it_in_no_warning_and_no_trace(tmp_path):
    judge = FakeChat(lambda *_: reflects())
    made = await enhance_prompt_iterative("a fox", director=director(), critic=judge,
                                          max_iterations=1, trace_dir=tmp_path)
    assert made.warnings and not gives_away(made.model_dump_json())
    write_trace(tmp_path, "x.json", {"said": [f"{KEY[:30]}"], "n": 1})
    assert json.loads((tmp_path / "x.json").read_text())["said"] == ["[redacted]"]
    assert not gives_away("".join(p.read_text("utf-8") for p in tmp_path.iterdir()))


@pytest.mark.parametrize("text", [
    "a standard bearer 1920s-style", "the sk-proj line", "%41 of 100 % \\n \\u0041 &amp; C:\\new",
    "a fox, Zt7Qm and 9Lp4R", "x" * 200,
])
def test_texts_without_the_key_stay(text):
    assert secrets.hide_secrets(text) == text


# texts that act


HOSTILE = {
    "colour": ("a \x1b[31mred\x1b[0m fox", "a red fox"),
    "8-bit colour": ("a \x9b31mred fox", "a red fox"),
    "screen": ("\x1b[2J\x1b[Ha fox", "a fox"),
    "link": ("\x1b]8;;http://x.example\x07a fox\x1b]8;;\x1b\\", "a fox"),
    "unended": ("a \x1b]0;fox", "a 0;fox"),
    "overrides": ("a \u202efox\u202c \u2066x\u2069", "a fox x"),
    "nul": ("a\0 fox\x08\x7f", "a fox"),
    "mark": ("\ufeffa fox", "a fox"),
    "half": ("a \ud83c fox \ud83e\udd8a", "a \ufffd fox 🦊"),
    "breaks": ("a\rfox\x0bx\x85y", "a\nfox\nx\ny"),
    "kept": ("a\tfox\nin Persian می\u200cخواهم \u200f👩\u200d👧\r\n", None),
}


@pytest.mark.parametrize("given, plain", HOSTILE.values(), ids=HOSTILE)
def test_texts_are_plain_where_they_enter(given, plain):
    plain = given if plain is None else plain
    scene = Scene(prompt=given, continuity_note=given, consistency_guideline=given,
                  transition_note=given)
    markers = {f"style {given}": given, "palette": [given, {"a": given}]}
    story = Story(scenes=[scene], title=given, brand=given, consistency_markers=markers)
    apart = {"subject_present", "subjects", "follows"}
    assert set(scene.model_dump(exclude=apart).values()) == {plain}
    assert (story.title, story.brand) == (plain, plain)
    kept = {f"style {plain}": plain, "palette": [plain, {"a": plain}]}
    assert story.consistency_markers == kept
    assert Reply(text=given).text == plain
    assert Story.model_validate_json(story.model_dump_json()) == story


ACTS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "".join(given for given, plain in HOSTILE.values() if plain is not None)


async def test_a_run_of_hostile_texts_gives_a_record_tables_and_a_page_that_do_not_act(tmp_path):
    pipeline = Pipeline(
        FakeChat([f"a fox {EVIL}"], name=f"d{EVIL}"), critic(),
        FakeImages(lambda r, n: picture(n), name=f"m{EVIL}"), [FakeScorer()],
        num_variations=1, max_enhancement_iterations=1)
    story = Story(scenes=[Scene(prompt=f"a fox {EVIL}")], title=EVIL,
                  consistency_markers={f"style{EVIL}": EVIL})
    result = choose(await pipeline.run(story, output_dir=tmp_path / "i"), 1, 1, f"nicer {EVIL}")
    result = await pipeline.rerun(result, 1, prompt=f"a crow {EVIL}")
    result.save(tmp_path / "run.json")
    assert StoryResult.load(tmp_path / "run.json") == result

    def texts(value):
        if isinstance(value, dict):
            value = [*value, *value.values()]
        return [t for v in value for t in texts(v)] if isinstance(value, list) else [value]

    record = json.loads((tmp_path / "run.json").read_text())
    inside = [text for text in texts(record) if isinstance(text, str)]
    assert len(inside) > 40 and not [t for t in inside if ACTS.search(t)]
    for frame in (result.frame(), result.iterations_frame()):
        save_table(frame, tmp_path / "t.csv")
        assert not ACTS.search((tmp_path / "t.csv").read_text("utf-8"))


async def test_the_stages_on_their_own_make_texts_plain_too(tmp_path):
    model = FakeImages()
    (made,) = await generate_images(f"a fox {EVIL}", 1, output_dir=tmp_path, model=model)
    enhanced = await enhance_prompt_iterative(f"a fox {EVIL}", director=director(),
                                              critic=critic(), max_iterations=1, context=EVIL)
    assert not ACTS.search(made.prompt + model.requests[0].prompt + enhanced.original_prompt)
    with pytest.raises(ValueError, match="prompt"):
        await generate_images("\0\x1b[0m", 1, output_dir=tmp_path, model=model)


def test_markers_that_only_hidden_signs_tell_apart_are_refused():
    with pytest.raises(ValueError, match="style"):
        Story(scenes=[Scene(prompt="a")], consistency_markers={"style": "a", "style\0": "b"})


# what scorers say, and what their libraries must not


@pytest.fixture
def said():
    """All that is logged anywhere, transformers' own logger included."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    keep, loggers = Keep(), [logging.getLogger(), logging.getLogger("transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(keep)
        logger.setLevel(logging.INFO)
    yield records
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(keep)
        logger.setLevel(level)


def test_long_texts_are_scored_without_a_warning_of_transformers(said, tmp_path):
    from refimg.adapters.clip import PickScore
    from refimg.adapters.vqa import VqaScore
    from refimg.score import Batch

    from . import tiny_vlm
    from .clips import tiny_transformers

    batch = Batch((Image.new("RGB", (64, 36)),), "A keeper walks along the shore. " * 60)
    vqa = VqaScore(tiny_vlm.qwen(tmp_path))
    vqa.reader().processor.tokenizer.model_max_length = 64
    for scorer in (vqa, PickScore(tiny_transformers())):
        assert scorer.score(batch)[0].value is not None
    assert not [text for text in said if "indexing errors" in text]


def test_open_clip_logs_nothing_at_the_root(said):
    from refimg.adapters.towers import load_open_clip

    from .clips import tiny_open_clip

    load_open_clip(tiny_open_clip())
    assert not [text for text in said if re.search("model|checkpoint|config|token", text, re.I)]


# half precision


@pytest.mark.parametrize("device, capability, kind", [
    ("cuda", {0: (8, 0)}, "bfloat16"), ("cuda", {0: (7, 5)}, "float16"),
    ("cuda:1", {0: (9, 0), 1: (7, 5)}, "float16"), ("cuda:1", {0: (6, 1), 1: (8, 6)}, "bfloat16"),
])
def test_half_precision_is_what_the_device_itself_computes(monkeypatch, device, capability, kind):
    import torch

    from refimg.adapters import clip, towers, vqa

    def of(place=None):
        number = torch.device("cuda" if place is None else place).index
        return capability[number or 0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        including_emulation or of() >= (8, 0)))
    assert towers.resolve_placement(device) == (device, kind)
    assert vqa.resolve_placement is clip.resolve_placement is towers.resolve_placement


# the names of scorers


@pytest.mark.parametrize("name", ["red\x1b[31m", "nul\0", "bidi\u202e", "half\ud83d", "two\nlines",
                                  "\ufeffmark", ""])
async def test_the_name_of_a_scorer_that_no_reader_can_see_is_refused(tmp_path, name):
    pipeline = Pipeline(director(), critic(), FakeImages(), [FakeScorer(name)], num_variations=1)
    told = "the name of a scorer must be a text on one line that can be seen, got "
    with pytest.raises(ValueError, match=told) as caught:
        await pipeline.run(Story(scenes=[Scene(prompt="a")]), output_dir=tmp_path / "o")
    assert str(caught.value).endswith(repr(name)) and pipeline.director.calls == []
    (tmp_path / "a.png").write_bytes(picture(1))
    with pytest.raises(ValueError, match=told):
        await score_images([tmp_path / "a.png"], "a", scorers=[FakeScorer(name)])


@pytest.mark.parametrize("name", ["pickscore", "my score 2", "Größe", "美感", "🦊"])
async def test_the_name_of_a_scorer_may_be_of_any_script(tmp_path, name):
    pipeline = Pipeline(director(), critic(), FakeImages(), [FakeScorer(name)], num_variations=1,
                        max_enhancement_iterations=0)
    result = await pipeline.run(Story(scenes=[Scene(prompt="a")]), output_dir=tmp_path / "o")
    result.save(tmp_path / "run.json")
    assert StoryResult.load(tmp_path / "run.json") == result
    assert [*result.scenes[0].variations[0].scores.metrics] == [name]
