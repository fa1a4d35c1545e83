"""Nothing that is a key, or looks like one, gets out of the package's texts and logs."""

from __future__ import annotations

import base64
import importlib
import io
import json
import logging
import pkgutil
import re
import time
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimg
from refimg.storage import secrets
from refimg.storage.secrets import Redactor, guard_loggers, log_line, redact, remember

KEY = 'k3y/with+odd "letters" & ünïcode%'


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(secrets, "_remembered", set())
    guard_loggers("refimg", refimg.__path__)


@pytest.mark.parametrize("shape", [
    lambda key: key,
    lambda key: quote(key),
    lambda key: quote_plus(key),
    lambda key: re.sub("%..", lambda hit: hit[0].lower(), quote(key, safe="")),
    lambda key: urlencode({"token": key}),
    lambda key: json.dumps({"token": key}),
    lambda key: json.dumps({"token": key}, ensure_ascii=False),
    lambda key: json.dumps(key).replace("/", r"\/"),
    lambda key: repr({"token": key}),
    lambda key: base64.b64encode(key.encode()).decode(),
    lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
    lambda key: base64.b64encode(f"u:{key}:more".encode()).decode(),
    lambda key: base64.urlsafe_b64encode(f"ab{key}".encode()).decode(),
])
def test_a_remembered_secret_is_hidden_in_every_shape(shape):
    remember(KEY)
    hidden = redact(f"before {shape(KEY)} after")
    assert hidden.startswith("before ") and hidden.endswith(" after")
    assert "[redacted]" in hidden
    for part in (KEY, "k3y", "odd", quote("letters"), base64.b64encode(KEY[:9].encode()).decode()):
        assert part not in hidden


@given(st.text(min_size=8, max_size=60), st.binary(max_size=7), st.binary(max_size=7))
def test_base64_of_a_text_that_holds_the_secret_hides_it(key, before, after):
    key = key.strip().encode("utf-8", "replace").decode()
    if len(key) < 8:
        return
    secrets._remembered.clear()
    remember(key)
    text = base64.b64encode(before + key.encode() + after).decode()
    hidden = redact(text).replace("[redacted]", "")
    assert len(hidden) <= len(text) - len(key.encode()) * 4 // 3 + 4


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "REPLICATE_API_TOKEN", "HF_TOKEN"])
def test_keys_of_the_environment_are_read_when_used(monkeypatch, name):
    assert redact("it is plain-looking-value") == "it is plain-looking-value"
    monkeypatch.setenv(name, "plain-looking-value\n")
    assert redact("it is plain-looking-value") == "it is [redacted]"


@pytest.mark.parametrize("text", [
    "sk-" + "a1" * 12, "sk-proj-" + "a_-1" * 8, "sk-ab12" + "*" * 20 + "wxyz", "r8_" + "Ab1" * 12,
    "hf_" + "aB" * 16, "Bearer " + "x" * 24, "Authorization: bearer abc.def-123",
])
def test_what_looks_like_a_key_is_hidden(text):
    hidden = redact(f'{{"said": "{text}"}}')
    assert "[redacted]" in hidden and text.split()[-1] not in hidden
    assert hidden.startswith('{"said": "') and hidden.endswith('"}')


@pytest.mark.parametrize("text", [
    "the flag bearer approaches slowly", "a risk-taking, desk-bound clerk", "hf_hub_download",
    "sk-ii bottle", "", "ask-me-anything-about-it", "r8_short",
])
def test_ordinary_words_stay(text):
    assert redact(text) == text


def test_a_short_secret_is_not_replaced_blindly(monkeypatch):
    remember("none")
    remember(None)
    remember(" \n")
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert redact("none of six boxes") == "none of six boxes"


def test_the_longer_of_two_secrets_is_hidden_whole():
    remember("abcdefgh")
    remember("abcdefgh-and-more")
    assert "more" not in redact("say abcdefgh-and-more")


def test_long_texts_take_no_time():
    remember(KEY)
    remember("another-secret-value")
    text = "a picture of a lighthouse, sk- r8_ hf_ Bearer " * 50_000
    began = time.perf_counter()
    assert redact(text) == text
    assert time.perf_counter() - began < 30


CONTROLS = "\x00\t\n\r\x0b\x1b\x7f\x85\x9b\u2028\u2029\u200b\u202e\u2066\ufeff"


@pytest.mark.parametrize("sign", CONTROLS)
def test_control_characters_are_written_out(sign):
    line = log_line(f"a{sign}b")
    assert sign not in line and line.isprintable()
    assert line.startswith("a\\") and line.endswith("b")


def test_letters_of_every_language_stay_and_halves_of_pairs_do_not():
    assert log_line("Ünïcödé 漢字 🎬 ok") == "Ünïcödé 漢字 🎬 ok"
    assert log_line("half \ud83c!").encode()


def emitted(caplog, **options) -> str:
    logger = logging.getLogger("refimg.pipeline")
    try:
        try:
            raise ValueError(f"inner {KEY}\x1b[2J")
        except ValueError as error:
            raise RuntimeError(f"outer Bearer {'x' * 30}") from error
    except RuntimeError:
        logger.error("failed: %s\nforged", KEY, **options)
    return caplog.text


def test_a_record_of_the_package_holds_no_key_whoever_reads_it(caplog):
    remember(KEY)
    own = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger("refimg.pipeline").addHandler(own)
    try:
        text = emitted(caplog, exc_info=True, stack_info=True)
    finally:
        logging.getLogger("refimg.pipeline").removeHandler(own)
    for seen in (text, stream.getvalue()):
        assert "RuntimeError: outer Bearer [redacted]" in seen
        assert "ValueError: inner [redacted]\\x1b[2J" in seen and "\x1b" not in seen
        assert "k3y" not in seen and "x" * 30 not in seen
        assert "\nforged" not in seen and "\\nforged" in seen
    (record,) = [r for r in caplog.records if r.name == "refimg.pipeline"]
    assert record.exc_info is None and KEY not in repr(vars(record))


def test_every_module_has_one_filter_before_it_is_imported():
    names = [m.name for m in pkgutil.walk_packages(refimg.__path__, "refimg.")]
    assert {"refimg.pipeline", "refimg.adapters.retry", "refimg.storage.files"} <= set(names)
    for _ in range(2):
        guard_loggers("refimg", refimg.__path__)
    for name in ("refimg", *names):
        found = [f for f in logging.getLogger(name).filters if isinstance(f, Redactor)]
        assert len(found) == 1, name


def test_modules_log_under_their_own_name_or_that_of_the_run():
    for module in pkgutil.walk_packages(refimg.__path__, "refimg."):
        logger = getattr(importlib.import_module(module.name), "_logger", None)
        assert logger is None or logger.name in (module.name, "refimg.pipeline"), module.name


def test_a_broken_format_string_loses_no_record_and_no_key(caplog):
    remember(KEY)
    logging.getLogger("refimg.pipeline").warning("%s %s", KEY)
    assert KEY not in caplog.text and "%s %s (arguments without a text)" in caplog.text
