"""No host but the one that was chosen is asked, and no key is seen anywhere."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import traceback

import pytest

from refimg.adapters import retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.retry import ProviderError
from refimg.enhance import director_messages, enhance_prompt_iterative
from tests.servers.llm import start_llm_server

ASKED = director_messages("A lighthouse keeper reads a letter.")
KEY, OTHER = "sk-" + "test-0123456789abcdef", "gw-token-fedcba9876543210"
SHAPELESS = "word-of-this-server"  # nothing about it looks like a key
ENVIRONMENT = {
    "OPENAI_API_KEY": KEY,
    "OPENAI_ADMIN_KEY": OTHER,
    "OPENAI_ORG_ID": "org-of-the-user",
    "OPENAI_PROJECT_ID": "project-of-the-user",
    "OPENAI_CUSTOM_HEADERS": f"X-Gateway: {OTHER}\nauthorization: Bearer {OTHER}\nno header",
}


@pytest.fixture(scope="module")
def servers():
    with start_llm_server() as chosen, start_llm_server() as foreign:
        yield chosen, foreign


@pytest.fixture
def two(servers):
    for server in servers:
        server.script()
    return servers


@pytest.fixture
def once(monkeypatch):
    """No call is tried again."""
    monkeypatch.setattr(retry, "_TRIES", 1)


# --- redirects ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["{foreign}/v1/chat/completions", "//{host}/v1", "/v1/other"])
async def test_no_redirect_is_followed(two, once, status, where):
    chosen, foreign = two
    to = where.format(foreign=foreign.origin, host=foreign.origin.removeprefix("http://"))
    chosen.script([{"fault": "redirect", "status": status, "to": to}])
    with pytest.raises(ProviderError) as caught:
        await OpenAIChat("m", base_url=chosen.base_url, api_key=KEY).reply(ASKED)
    assert caught.value.failure.kind == "never" and "redirect" in str(caught.value)
    assert len(chosen.requests()) == 1 and foreign.requests() == []


async def test_the_same_redirect_would_reach_the_foreign_host(two):
    """The attack is real: the SDK's own client follows it, prompt and all."""
    import openai

    chosen, foreign = two
    to = f"{foreign.origin}/v1/chat/completions"
    chosen.script([{"fault": "redirect", "to": to}])
    async with openai.AsyncOpenAI(base_url=chosen.base_url, api_key=KEY) as client:
        said = [message.model_dump() for message in ASKED]
        await client.chat.completions.create(model="m", messages=said)
    assert foreign.requests()[0]["json"]["messages"] == said


# --- whose key goes where -------------------------------------------------------------------


async def test_a_server_named_by_argument_gets_nothing_of_the_environment(two, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    chosen, _ = two
    for given, sent in ((None, "none"), ("key-of-this-server", "key-of-this-server")):
        chosen.script()
        await OpenAIChat("m", base_url=chosen.base_url, api_key=given).reply(ASKED)
        (seen,) = chosen.requests()
        assert seen["headers"]["authorization"] == f"Bearer {sent}"
        everything = str(seen["headers"]) + seen["body"]
        assert KEY not in everything and OTHER not in everything
        assert "of-the-user" not in everything


async def test_the_server_of_the_environment_gets_the_key_of_the_environment(two, monkeypatch):
    chosen, foreign = two
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", chosen.base_url)
    await OpenAIChat("m").reply(ASKED)
    await OpenAIChat("m", base_url=chosen.origin + "/v1/").reply(ASKED)
    assert [s["headers"]["authorization"] for s in chosen.requests()] == [f"Bearer {KEY}"] * 2
    await OpenAIChat("m", base_url=foreign.base_url).reply(ASKED)
    assert foreign.requests()[0]["headers"]["authorization"] == "Bearer none"


async def test_a_stray_address_is_in_every_name(two, monkeypatch):
    chosen, _ = two
    monkeypatch.setenv("OPENAI_BASE_URL", chosen.base_url)
    chat = OpenAIChat("gpt-5.5")
    done = await enhance_prompt_iterative("A boat.", director=chat, critic=chat, max_iterations=1)
    host = chosen.origin.removeprefix("http://")
    assert done.director == done.critic == f"openai:gpt-5.5 @ {host}"


# --- nothing is seen ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["401", "reset", "html", {"fault": "redirect", "to": "/x"}])
async def test_a_key_is_in_no_log_error_trace_or_repr(two, once, fault, caplog):
    chosen, _ = two
    chosen.script([fault])
    chat = OpenAIChat("m", base_url=chosen.base_url, api_key=KEY)
    with caplog.at_level(logging.DEBUG), pytest.raises(ProviderError) as caught:
        await chat.reply(ASKED)
    assert chosen.requests()[0]["headers"]["authorization"] == f"Bearer {KEY}"
    shown = [str(caught.value), repr(caught.value), repr(chat), chat.name, caplog.text]
    shown += traceback.format_exception(caught.value)
    shown += [str(vars(record)) for record in caplog.records]
    assert caplog.records and KEY not in "".join(shown)


async def test_a_key_that_a_server_echoes_is_in_no_record(two, tmp_path):
    chosen, _ = two
    chosen.script(["401"])
    chat = OpenAIChat("m", base_url=chosen.base_url, api_key=SHAPELESS)
    traced = {"director": chat, "critic": chat, "trace_dir": tmp_path}
    result = await enhance_prompt_iterative("A boat.", **traced)
    written = "".join(path.read_text("utf-8") for path in tmp_path.iterdir())
    assert result.stop_reason == "failed" and "Incorrect API key" in result.warnings[0]
    assert SHAPELESS not in result.model_dump_json() + written


def test_importing_reads_no_variable_and_no_sdk():
    code = """
import os, sys
read = []
class Watched(dict):
    def get(self, name, default=None): read.append(name); return super().get(name, default)
    def __getitem__(self, name): read.append(name); return super().__getitem__(name)
os.environ = Watched(os.environ)
import refimg.adapters.openai
print([n for n in read if n.startswith(("OPENAI", "REFIMG"))], "openai" in sys.modules)
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[] False"


def test_the_servers_are_strangers_to_each_other(two):
    """The tests above lean on this: each counts what reaches itself."""
    chosen, foreign = two
    asyncio.run(OpenAIChat("m", base_url=foreign.base_url).reply(ASKED))
    assert (len(chosen.requests()), len(foreign.requests())) == (0, 1)
