"""OpenAIChat against a server in a process of its own: the real SDK, real sockets, bad days."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import subprocess
import sys
import threading
import time
import weakref
from functools import partial

import openai
import pytest
from openai.types.shared import chat_model

from refimg.adapters import retry
from refimg.adapters.openai import DEFAULT_MODELS, OpenAIChat
from refimg.adapters.retry import ProviderError, RunLimits
from refimg.engine.protocols import Call
from refimg.enhance import (
    Critique,
    Message,
    Usage,
    critic_messages,
    director_messages,
    enhance_prompt_iterative,
    parse_critique,
)
from tests.sampling import sampled
from tests.servers.llm import start_llm_server

PROMPT = "A lighthouse keeper in a red coat reads to 3 cats."
ASKED = director_messages(PROMPT)
JUDGED = critic_messages(f"{PROMPT} Version 1: a wide shot.", PROMPT)
KEY = "sk-" + "test-0123456789abcdef"


@pytest.fixture(scope="module")
def shared():
    with start_llm_server() as server:
        yield server


@pytest.fixture
def server(shared):
    shared.script()
    return shared


@pytest.fixture
def once(monkeypatch):
    """No call is tried again."""
    monkeypatch.setattr(retry, "_TRIES", 1)


def chat_with(server, model: str = "m", **more) -> OpenAIChat:
    return OpenAIChat(model, base_url=server.base_url, api_key=KEY, **more)


async def failed(chat: OpenAIChat, messages=ASKED, **more):
    """The failure of a call that fails."""
    with pytest.raises(ProviderError) as caught:
        await chat.reply(messages, **more)
    return caught.value.failure


# --- what is sent, and what comes back ------------------------------------------------------


async def test_a_question_is_model_and_messages_and_no_more(server):
    reply = await chat_with(server).reply(ASKED)
    assert reply.text == f"{PROMPT} Version 1: a wide shot in soft light."
    assert (reply.usage, reply.cost) == (Usage(input_tokens=100, output_tokens=20), None)
    (seen,) = server.requests()
    assert (seen["method"], seen["path"]) == ("POST", "/v1/chat/completions")
    assert seen["headers"]["authorization"] == f"Bearer {KEY}"
    assert seen["json"] == {"model": "m", "messages": [m.model_dump() for m in ASKED]}


async def test_a_critique_is_asked_for_by_its_schema_and_in_words(server):
    reply = await chat_with(server).reply(JUDGED, Critique)
    assert parse_critique(reply.text).overall == 66
    (seen,) = server.requests()
    form = seen["json"]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["required"] == [*Critique.model_fields] == [*schema["properties"]]
    words = seen["json"]["messages"][0]["content"]
    assert "JSON" in words and all(f'"{name}":' in words for name in Critique.model_fields)


async def test_the_same_question_is_the_same_bytes(server):
    bodies = []
    for _ in range(2):
        server.script([None, {"fault": "nan", "role": "critic"}])
        chat = chat_with(server)
        await enhance_prompt_iterative(PROMPT, director=chat, critic=chat, context="style: ink")
        bodies.append([seen["body"] for seen in server.requests()])
    assert bodies[0] == bodies[1] and len(bodies[0]) == 9


@pytest.mark.parametrize("fault", ["no-usage", "odd-usage"])
async def test_tokens_that_were_not_counted_are_unknown(server, fault):
    server.script([fault])
    reply = await chat_with(server).reply(ASKED)
    assert reply.usage is None and PROMPT in reply.text


async def test_an_answer_without_text_is_empty(server):
    server.script(["no-text"])
    assert (await chat_with(server).reply(ASKED)).text == ""


# --- the form of the answer, and what a server knows of it ----------------------------------


@pytest.mark.parametrize(
    "formats, tried",
    sampled([
        ([], ["json_schema", "json_object", None]),
        (["json_schema"], ["json_schema"]),
        (["json_object"], ["json_schema", "json_object"]),
    ], 3),
)
async def test_a_server_is_asked_in_the_best_form_it_knows(formats, tried):
    with start_llm_server(formats=formats) as server:
        for model, expected in (("m", tried), ("m", tried[-1:]), ("other", tried)):
            server.script()
            reply = await chat_with(server, model).reply(JUDGED, Critique)
            forms = [seen["json"].get("response_format", {}) for seen in server.requests()]
            assert parse_critique(reply.text).overall == 66
            assert [form.get("type") for form in forms] == expected


async def test_many_at_once_step_down_together():
    with start_llm_server(formats=[]) as server:
        chat = chat_with(server)
        replies = await asyncio.gather(*(chat.reply(JUDGED, Critique) for _ in range(8)))
        assert {parse_critique(reply.text).overall for reply in replies} == {66}
        server.script()
        await chat.reply(JUDGED, Critique)
        assert "response_format" not in server.requests()[0]["json"]


@pytest.mark.parametrize("fault", ["400-form", "422"])
async def test_however_a_server_refuses_the_form_it_is_understood(server, fault):
    server.script([fault])
    await chat_with(server, f"strict-{fault}").reply(JUDGED, Critique)
    forms = [seen["json"]["response_format"]["type"] for seen in server.requests()]
    assert forms == ["json_schema", "json_object"]


async def test_a_400_about_something_else_is_an_error(server, once):
    chat = chat_with(server, "m400")
    await chat.reply(JUDGED, Critique)
    server.script(["400"])
    failure = await failed(chat, JUDGED, schema=Critique)
    assert (failure.kind, len(server.requests())) == ("never", 1)


async def test_a_director_is_asked_in_no_form(server, once):
    server.script(["422"])
    assert (await failed(chat_with(server))).kind == "never"
    assert "response_format" not in server.requests()[0]["json"]


# --- what went wrong ------------------------------------------------------------------------

FAULTS = [
    ("400", "never", None, False, "bad request"),
    ("401", "down", None, False, "Incorrect API key"),
    ("402", "down", None, False, "Payment required"),
    ("403", "never", None, False, "no access"),
    ("404", "never", None, False, "does not exist"),
    ("429", "again", None, True, "Rate limit"),
    ({"fault": "429-after", "after": 7}, "again", 7, True, "Rate limit"),
    ({"fault": "429-after", "after": "nan"}, "again", None, True, "Rate limit"),
    ({"fault": "429-after", "after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"},
     "again", None, True, "Rate limit"),
    ({"fault": "429-after", "after": -3}, "again", None, True, "Rate limit"),
    ({"fault": "429-after", "after": "soon"}, "again", None, True, "Rate limit"),
    ({"fault": "429-after", "after": "Mon, 01 Jan 2001 00:00:00 GMT"}, "again", 0, True, "Rate"),
    ({"fault": "429-ms", "after": 2.5}, "again", 2.5, True, "Rate limit"),
    ({"fault": "429-hint", "after": 20}, "again", 20, True, "try again in 20s"),
    ({"fault": "429-hint", "after": "1m2.5"}, "again", 62.5, True, "try again"),
    ({"fault": "429-hint", "after": "250m"}, "again", 0.25, True, "try again"),
    ("quota", "down", None, False, "exceeded your current quota"),
    ("500", "again", None, False, "had an error"),
    ("502", "again", None, False, "502 Bad Gateway"),
    ({"fault": "503", "after": 5}, "again", 5, False, "Overloaded"),
    ("html", "again", None, False, "no answer: '<html>"),
    ("no-json", "again", None, False, "no JSON"),
    ("empty", "again", None, False, "no answer"),
    ("null", "again", None, False, "no answer"),
    ("error", "again", None, False, "no model is free"),
    ("odd", "again", None, False, "no answer"),
    ("reset", "again", None, False, "Connection error"),
    ("cut", "again", None, False, "Connection error"),
    ("refusal", "never", None, False, "the model refused: I can't help"),
    ("filtered", "never", None, False, "finish_reason=content_filter"),
    ("length", "never", None, False, "finish_reason=length"),
]


MAYBE_BILLED = {
    *("html", "no-json", "empty", "null", "error", "odd", "reset", "cut"),
    *("refusal", "filtered", "length"),
    *("500", "502", str({"fault": "503", "after": 5})),
}


@pytest.mark.parametrize("fault, kind, wait, throttled, text", FAULTS)
async def test_every_failure_says_whether_to_try_again(
    server, once, fault, kind, wait, throttled, text
):
    server.script([fault])
    failure = await failed(chat_with(server))
    assert (failure.kind, failure.wait, failure.throttled) == (kind, wait, throttled)
    assert text in failure.text and "\n" not in failure.text and len(failure.text) <= 500
    assert failure.paid == (str(fault) in MAYBE_BILLED)
    assert len(server.requests()) == 1


@pytest.mark.parametrize("fault", [{"fault": "hang"}, {"fault": "drip", "seconds": 0.05}])
async def test_the_timeout_is_one_for_the_whole_answer(server, once, fault):
    server.script([fault])
    started = time.monotonic()
    assert (await failed(chat_with(server, timeout=0.4))).kind == "again"
    assert 0.35 < time.monotonic() - started < 2


async def test_a_server_that_is_not_there_is_said_so(once):
    with start_llm_server() as gone:
        pass
    failure = await failed(chat_with(gone))
    assert failure.kind == "again" and "Connection error" in failure.text
    assert failure.paid is False


# --- trying again ---------------------------------------------------------------------------


async def test_a_bad_moment_is_survived(server):
    server.script(["500", "reset"])
    reply = await chat_with(server).reply(ASKED, call=Call(limits=RunLimits(40)))
    assert PROMPT in reply.text
    assert [seen["fault"] for seen in server.requests()] == ["500", "reset", None]


async def test_the_server_says_how_long_to_wait(server):
    server.script([{"fault": "429-after", "after": 1.2}])
    await chat_with(server).reply(ASKED, call=Call(limits=RunLimits(40)))
    first, second = (seen["at"] for seen in server.requests())
    assert second - first >= 1.2


@pytest.mark.parametrize("fault", ["401", "402", "quota"])
async def test_after_no_money_nobody_is_asked_again(server, fault):
    server.script([fault])
    chat, call = chat_with(server), Call(limits=RunLimits(40))
    first = await failed(chat, call=call)
    second = await failed(chat, JUDGED, schema=Critique, call=call)
    assert first.kind == second.kind == "down" and len(server.requests()) == 1


async def test_a_cancelled_call_is_over_at_once(server):
    server.script(["hang"])
    task = asyncio.create_task(chat_with(server).reply(ASKED))
    while not server.requests():
        await asyncio.sleep(0.01)
    task.cancel()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 0.5 and len(server.requests()) == 1


# --- an enhancement through it --------------------------------------------------------------


@pytest.mark.parametrize("fault", ["think", "fences", "strings", "above", "no-usage", "parts"])
async def test_a_critique_in_wrappings_costs_no_second_call(server, fault):
    server.script([{"fault": fault, "role": "critic"}])
    chat = chat_with(server)
    result = await enhance_prompt_iterative(PROMPT, director=chat, critic=chat, max_iterations=1)
    assert len(server.requests()) == 2 and result.warnings == []
    assert result.final_score.overall == (100 if fault == "above" else 66)
    assert (result.iterations[0].usage is None) == (fault == "no-usage")


@pytest.mark.parametrize("fault", ["truncated", "nan", "bools", "no-text", "unclosed-think"])
async def test_a_bad_critique_is_repaired_once(server, fault):
    server.script([{"fault": fault, "role": "critic"}])
    chat = chat_with(server)
    result = await enhance_prompt_iterative(PROMPT, director=chat, critic=chat, max_iterations=1)
    roles = [seen["role"] for seen in server.requests()]
    assert roles == ["director", "critic", "critic"] and result.warnings == []
    assert result.final_score.overall == 66
    repair = server.requests()[2]["json"]["messages"]
    assert [m["role"] for m in repair] == ["system", "user", "assistant", "user"]


async def test_a_bad_critique_twice_keeps_the_original(server):
    server.script([{"fault": "nan", "role": "critic"}] * 2)
    chat = chat_with(server)
    result = await enhance_prompt_iterative(PROMPT, director=chat, critic=chat)
    assert (result.stop_reason, result.final_prompt) == ("failed", PROMPT)


async def test_a_model_that_runs_wild_is_not_sent_all_of_it_again():
    from tests.fakes import FakeChat, critique

    judges = FakeChat(["{" * 100_000, critique(90)])
    await enhance_prompt_iterative(PROMPT, director=FakeChat([PROMPT]), critic=judges)
    assert len(judges.calls[1][0][2].content) == 4000


async def test_a_refused_scene_says_who_refused_what(server):
    server.script(["refusal"])
    chat = chat_with(server)
    result = await enhance_prompt_iterative(PROMPT, director=chat, critic=chat)
    assert result.stop_reason == "failed" and result.cost is None
    assert "the director's answer" in result.warnings[0] and "refused" in result.warnings[0]


# --- clients and event loops ----------------------------------------------------------------


def test_each_loop_has_a_client_that_ends_with_it(server, recwarn):
    chat, clients, loops = chat_with(server), [], []

    async def talk():
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await asyncio.gather(*(chat.reply(ASKED) for _ in range(4)))
        clients.append(await chat.server.client())
        assert not clients[-1].is_closed() and await chat.server.client() is clients[-1]

    for _ in range(3):
        asyncio.run(talk())
    assert len({id(client) for client in clients}) == 3
    assert all(client.is_closed() for client in clients)
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3
    assert [str(w.message) for w in recwarn if w.category is ResourceWarning] == []


def test_loops_in_threads_do_not_meet(server):
    chat, replies = chat_with(server), []

    def work():
        replies.append(asyncio.run(chat.reply(ASKED)).text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(replies) == 4 and len(set(replies)) == 1


async def test_a_model_that_is_gone_leaves_no_open_client(server):
    chat = chat_with(server)
    await chat.reply(ASKED)
    client = await chat.server.client()
    del chat
    gc.collect()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if client.is_closed():
            break
    assert client.is_closed()


HELD = """
import asyncio, sys, time
from refimg.adapters.openai import OpenAIChat
from refimg.enhance import Message
worst = 0.0

async def watch():
    global worst
    while True:
        before = time.thread_time()
        await asyncio.sleep(0.001)
        worst = max(worst, time.thread_time() - before)

async def main():
    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    await OpenAIChat("m", base_url=sys.argv[1]).reply([Message(role="user", content="x")])
    watcher.cancel()

asyncio.run(main())
print(worst)
"""


def test_the_first_call_imports_the_sdk_without_holding_the_loop(server):
    """Measured in CPU seconds of the loop's thread, which a busy machine does not change."""
    for _ in range(3):
        command = [sys.executable, "-c", HELD, server.base_url]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        if float(made.stdout) < 0.25:
            return
    pytest.fail(f"the loop was held for {float(made.stdout):.2f} s")


async def test_an_own_client_is_used_as_it_is_and_left_open(server, once):
    own = openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY)
    chat = OpenAIChat("m", client=own)
    assert chat.server.base_url == server.base_url and chat.server.host in chat.name
    server.script([None, "500"])
    assert PROMPT in (await chat.reply(ASKED)).text
    assert (await failed(chat)).kind == "again"
    assert len(server.requests()) == 2 and not own.is_closed()
    await own.close()


# --- what is given, and what is refused -----------------------------------------------------


def test_names_say_the_model_and_any_host_but_openais(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert OpenAIChat().name == f"openai:{DEFAULT_MODELS['director']}"
    assert OpenAIChat("gpt-x", base_url="https://api.openai.com/v1/").name == "openai:gpt-x"
    assert "@" in OpenAIChat("gpt-x", base_url="http://api.openai.com/v1").name
    local = OpenAIChat("qwen3", base_url="http://localhost:11434/v1")
    assert local.name == "openai:qwen3 @ localhost:11434"
    assert local.server.account.provider == "openai @ localhost:11434"
    assert repr(local) == f"OpenAIChat({local.name!r})"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://stray.example/v1")
    assert OpenAIChat("gpt-x").name == "openai:gpt-x @ stray.example"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"base_url": "localhost:11434"}, "http://host/path"),
        ({"base_url": "ftp://host/v1"}, "http://host/path"),
        ({"base_url": "https:///v1"}, "http://host/path"),
        ({"base_url": "http://user:secret-word@host/v1"}, "pass the key as api_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({}, "OPENAI_API_KEY"),
        ({"api_key": " "}, "OPENAI_API_KEY"),
    ],
)
def test_what_cannot_be_right_is_refused(given, said):
    with pytest.raises(ValueError, match=said) as caught:
        OpenAIChat("m", **given)
    assert "secret-word" not in str(caught.value)


def test_a_client_and_an_address_are_one_too_many():
    own = openai.AsyncOpenAI(base_url="http://localhost:1/v1", api_key=KEY)
    with pytest.raises(ValueError, match="client"):
        OpenAIChat("m", client=own, base_url="http://localhost:2/v1")


def test_an_empty_variable_is_no_address(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert OpenAIChat("m", api_key=KEY).server.base_url == "https://api.openai.com/v1"


# --- models that retire ---------------------------------------------------------------------


def ending() -> set[str]:
    """The models that the SDK's own notes say are deprecated."""
    notes = inspect.getsource(chat_model).partition('"""Deprecated values:')[2]
    return {word for word in notes.split('"') if word.startswith(("gpt", "o", "chatgpt", "codex"))}


def test_no_default_model_is_announced_to_end():
    known = set(chat_model.ChatModel.__args__)
    assert {"gpt-5", "gpt-4o"} <= ending() < known
    assert set(DEFAULT_MODELS.values()) <= known - ending()
    assert set(DEFAULT_MODELS) == {"director", "critic"}


def test_the_server_forgets_nothing_that_it_was_sent(server):
    """The tests above lean on this record."""
    ask = partial(chat_with(server).reply, [Message(role="user", content="x")])
    asyncio.run(ask())
    (seen,) = server.requests()
    assert json.loads(seen["body"])["messages"] == [{"role": "user", "content": "x"}]
