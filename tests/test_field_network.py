"""The environment is checked before anything is paid, and there is one way to the network."""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest

from refimg import Pipeline, Scene, Story, defaults
from refimg.adapters import download, openai_server, predictions, replicate, retry
from refimg.adapters import openai as chats
from refimg.adapters.download import fetch
from refimg.adapters.network import Unreadable, _Body
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.prices import PRICES, PriceTable
from refimg.adapters.replicate import ReplicateImages
from refimg.adapters.retry import ProviderError
from refimg.engine.protocols import ImageOrder, ImageRequest
from refimg.enhance import director_messages
from tests.fakes import FakeScorer, critic, director, picture
from tests.sampling import sampled
from tests.servers.images import ROOT, draw, start_image_server
from tests.servers.llm import start_llm_server
from tests.servers.proxy import start_proxy

ASKED = director_messages("A lighthouse keeper reads a letter.")
WISH = ImageRequest(prompt="a keeper", aspect_ratio="16:9", slot="a")
KEY, TOKEN = "key-of-this-test-0123456789", "r8_" + "q7" * 20
FILE_HOST = "x.replicate.delivery"
DEAD = "http://me:the-password@127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def servers():
    with start_llm_server() as llm, start_image_server() as images:
        yield llm, images


@pytest.fixture
def two(servers, monkeypatch):
    """Both servers with nothing wrong, and an environment that says nothing of the network."""
    for name in list(os.environ):
        if re.fullmatch(r"\w+_proxy|SSL_CERT_\w+|REQUESTS_CA_BUNDLE", name, re.I):
            monkeypatch.delenv(name)
    for server in servers:
        server.script()
    return servers


@pytest.fixture
def once(monkeypatch):
    """No call is tried again."""
    monkeypatch.setattr(retry, "_TRIES", 1)
    monkeypatch.setattr(replicate, "_FETCH", (0.01, 0.01))


def chat(two, **more) -> OpenAIChat:
    return OpenAIChat("m", base_url=two[0].base_url, api_key=KEY, **more)


def images(two, **more) -> ReplicateImages:
    return ReplicateImages(base_url=two[1].base_url, api_token=TOKEN, **more)


def both(two) -> list:
    """What makes a model of either provider."""
    return [lambda: chat(two), lambda: images(two)]


def nothing_was_asked(two) -> bool:
    return two[0].requests() == [] and two[1].requests() == []


async def use(two) -> None:
    """A chat answer, and an image from the prediction to the file."""
    assert (await chat(two).reply(ASKED)).text
    made = await images(two).generate(WISH)
    assert made.data.startswith(b"\x89PNG")


# --- proxies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["[::1]", "fe80::/10", "[fe80::]/10", "::1", "[::1]:8080",
                                   "10.0.0.0/8", "*.example.com:81", "http://example.com/"])
async def test_a_no_proxy_of_any_form_does_not_end_a_run(two, monkeypatch, entry):
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    monkeypatch.setenv("NO_PROXY", f"{entry}, 127.0.0.0/8")
    await use(two)
    assert len(two[1].requests("create")) == len(two[1].requests("output")) == 1


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "[zz]", "fe80::/200", "[::1"])
def test_a_no_proxy_that_is_no_address_is_refused(two, monkeypatch, entry):
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    monkeypatch.setenv("NO_PROXY", entry)
    for make in both(two):
        with pytest.raises(ValueError, match="NO_PROXY must be"):
            make()
    assert nothing_was_asked(two)


UNUSABLE = {
    "ALL_PROXY": "socks://me:the-password@127.0.0.1:1080",
    "HTTPS_PROXY": "socks5://me:the-password@127.0.0.1:1080",  # the package socksio is not here
    "HTTP_PROXY": "ftp://me:the-password@127.0.0.1",
    "all_proxy": "http://me:the-password@[::1:1080",
    "http_proxy": "http://",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_proxy_that_cannot_be_used_is_refused(two, monkeypatch, name):
    monkeypatch.setenv(name, UNUSABLE[name])
    for make in both(two):
        with pytest.raises(ValueError, match=f"{name.upper()} must be") as caught:
            make()
        assert "the-password" not in f"{caught.value!r}{caught.value.__context__!r}"
    assert nothing_was_asked(two)


NO_PLACE = ["127.0.0.1:99999", "http://127.0.0.1:65536", "http://127.0.0.1:-1", "http://a b",
            "http://a b:80", "http://a..b:80", "http://a;b", "a,b:80", "http://a\\b",
            f"http://{'a' * 64}:80"]  # fmt: skip


@pytest.mark.parametrize("text", NO_PLACE)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "all_proxy"])
def test_a_proxy_that_cannot_exist_is_refused(two, monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    for make in both(two):
        with pytest.raises(ValueError, match=f"{name.upper()} must be http://host:port"):
            make()
    assert nothing_was_asked(two)


@pytest.mark.parametrize("text", ["localhost:65535", "http://my_proxy.lan.:8080", "http://[::1]:80",
                                  "http://me:p%40ss@a-b.example", "http://bücher.example:3128",
                                  "http://[fe80::1%25eth0]:80", "http://10.0.0.1"])
def test_a_proxy_that_can_exist_is_taken(two, monkeypatch, text):
    monkeypatch.setenv("HTTPS_PROXY", text)
    for make in both(two):
        make()


@pytest.mark.parametrize("url", ["http://127.0.0.1:70000", "http://a b/v1", "http://a..b", "ftp://a"])
def test_an_address_of_an_image_server_that_cannot_exist_is_refused(url):
    with pytest.raises(ValueError, match="url must be"):
        ReplicateImages(base_url=url, api_token=TOKEN)


async def test_a_proxy_that_nobody_would_use_is_not_looked_at(two, monkeypatch):
    with start_proxy() as proxy:
        monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        await use(two)
    monkeypatch.setenv("HTTP_PROXY", "socks://127.0.0.1:1080")
    monkeypatch.setenv("NO_PROXY", "*")
    await use(two)


async def test_every_client_uses_the_proxy(two, tmp_path, monkeypatch):
    """A chat answer, an upload, and a prediction from its model's page to its image."""
    (tmp_path / "mine.png").write_bytes(picture(90))
    wish = ImageRequest(prompt="a keeper", references=(tmp_path / "mine.png",), slot="a")
    two[1].script([{"takes": 0.3}])
    with start_proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        model = ReplicateImages("lab/portrait", base_url=two[1].base_url, api_token=TOKEN)
        assert (await chat(two).reply(ASKED)).text
        assert (await model.generate(wish)).data.startswith(b"\x89PNG")
    monkeypatch.delenv("HTTP_PROXY")
    seen = [f"{r['method']} {server.base_url.removesuffix('/v1')}{r['path']}"
            for server in two for r in server.requests()]
    assert sorted(proxy.asked) == sorted(seen)
    kinds = {r["kind"] for r in two[1].requests()}
    assert kinds == {"model", "upload", "create", "get", "output"}
    (sent,) = two[1].requests("create")
    assert "/v1/files/" in str(sent["json"]["input"])


async def test_a_proxy_waits_for_no_connection_that_was_to_be_closed(two):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(two[1].base_url[17:]))
    for close in (False, True):
        head = "Connection: close\r\n" * close
        writer.write(f"GET /v1/predictions HTTP/1.1\r\nAuthorization: x\r\n{head}\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", answer)[1])
        await reader.readexactly(length)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_a_dead_proxy_is_named_in_the_error(two, monkeypatch, once, caplog):
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    for call in (chat(two).reply(ASKED), images(two).generate(WISH)):
        with pytest.raises(ProviderError, match=r"proxy http://127\.0\.0\.1:9") as caught:
            await call
        assert "HTTP_PROXY" in str(caught.value) and not caught.value.paid
        assert "the-password" not in f"{caught.value!r}{caplog.text}"


async def test_a_proxy_that_wants_another_password_is_asked_once(two, monkeypatch):
    with start_proxy() as proxy:
        proxy.closed = True
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        model = OpenAIChat("m", base_url="https://llm.invalid/v1", api_key=KEY)
        with pytest.raises(ProviderError, match="407") as caught:
            await model.reply(ASKED)
    assert caught.value.failure.kind == "never" and not caught.value.paid
    assert proxy.asked == ["CONNECT llm.invalid:443"]


# --- certificates -----------------------------------------------------------------------------


class Everything(BaseHTTPRequestHandler):
    """A chat answer, a model's page, and an image."""

    def log_message(self, *words: object) -> None:
        """Nothing is printed."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        message = {"role": "assistant", "content": "A keeper."}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        said = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        body = json.dumps({**said, "choices": [choice], "latest_version": {}}).encode()
        data = draw({"prompt": "a"}, 1) if self.path.endswith(".png") else body
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """The file of a certificate for this machine and the file host, and a server that has it."""
    folder = tmp_path_factory.mktemp("tls")
    names = f"subjectAltName=DNS:localhost,IP:127.0.0.1,DNS:{FILE_HOST}"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
            "/CN=test", "-addext", names]  # fmt: skip
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "cert.pem")]
    subprocess.run([*made, *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "cert.pem", folder / "key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Everything)
    server.daemon_threads = True
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield str(folder / "cert.pem"), server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
async def test_every_client_trusts_the_certificates_of_the_environment(
    two, secure, monkeypatch, name
):
    file, port = secure
    url = f"https://localhost:{port}"
    monkeypatch.setenv(name, file)
    assert (await OpenAIChat("m", base_url=f"{url}/v1").reply(ASKED)).text == "A keeper."
    connection = await ReplicateImages(base_url=url, api_token=TOKEN).server.connection()
    assert (await connection.ask("GET", "/v1/models/lab/other")).status_code == 200
    assert (await fetch(f"{url}/a.png", own=url)).startswith(b"\x89PNG")


async def test_no_client_trusts_a_stranger_or_asks_it_again(two, secure, monkeypatch):
    url = f"https://localhost:{secure[1]}"
    calls = (OpenAIChat("m", base_url=f"{url}/v1").reply(ASKED),
             ReplicateImages("lab/other", base_url=url, api_token=TOKEN).load())  # fmt: skip
    for call in calls:
        with pytest.raises(ProviderError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            await call
        assert caught.value.failure.kind == "never"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await fetch(f"{url}/a.png", own=url)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR"])
@pytest.mark.parametrize("text", [None, "no certificate"])
def test_certificates_that_are_none_are_refused(two, tmp_path, monkeypatch, name, text):
    path = tmp_path / "ca.pem"
    if text:
        path.write_text(text)
    monkeypatch.setenv(name, str(path))
    for make in both(two):
        with pytest.raises(ValueError, match=rf"{name} must be certificates .*, got '.*ca\.pem'"):
            make()


# --- the file host ----------------------------------------------------------------------------


@pytest.fixture
def no_look_up(monkeypatch):
    """The names that were looked up on this machine, where nobody knows them."""
    asked = []

    async def getaddrinfo(self, host, port, **options):
        if host == "127.0.0.1":
            return await asyncio.to_thread(real, host, port, **options)
        asked.append(host)
        raise OSError("no such name here")

    real = __import__("socket").getaddrinfo
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


async def test_a_host_that_only_the_proxy_knows_is_fetched_through_it(
    two, secure, monkeypatch, no_look_up
):
    file, port = secure
    monkeypatch.setenv("SSL_CERT_FILE", file)
    with start_proxy({f"{FILE_HOST}:443": ("127.0.0.1", port)}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert await fetch(f"https://{FILE_HOST}/a.png") == draw({"prompt": "a"}, 1)
        for url in (f"http://{FILE_HOST}/a.png", "https://example.com/a.png",
                    f"https://{FILE_HOST}:8443/a.png"):  # fmt: skip
            with pytest.raises(ValueError, match="url must be https on port 443"):
                await fetch(url)
        assert proxy.asked == [f"CONNECT {FILE_HOST}:443"] and no_look_up == []


async def test_a_host_that_needs_no_proxy_is_still_pinned(two, monkeypatch):
    reached = []

    async def look_up(self, host, port, **options):
        reached.append(host)
        return [(2, 1, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    with start_proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", ".replicate.delivery")
        with pytest.raises(ValueError, match="must be public"):
            await fetch(f"https://{FILE_HOST}/a.png")
    assert reached == [FILE_HOST] and proxy.asked == []


async def test_a_pinned_address_goes_the_way_of_its_name(two, monkeypatch):
    """The request is for the address that was looked up; the proxy is chosen by the name."""
    async def look_up(self, host, port, **options):
        return [(2, 1, 6, "", ("93.184.216.34", port))]

    async def refuse(*words, **options):
        raise OSError("nobody is asked in a test")

    import anyio

    monkeypatch.setattr(anyio, "connect_tcp", refuse)
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    monkeypatch.setenv("NO_PROXY", ".replicate.delivery")
    with pytest.raises(httpx.ConnectError) as caught:
        await fetch(f"https://{FILE_HOST}/a.png")
    assert "proxy" not in str(caught.value)


@pytest.mark.parametrize("name", ["localhost", "[::1]"])
async def test_this_machine_by_another_name_is_the_same_server(two, name):
    made = await images(two).generate(WISH)
    (seen,) = two[1].requests("output")
    port = two[1].base_url.rpartition(":")[2]
    url = f"http://{name}:{port}{seen['path']}"
    assert await fetch(url, own=two[1].base_url) == made.data
    for wrong in (f"http://{name}:9{seen['path']}", f"https://{name}:{port}/", "http://10.0.0.1/"):
        with pytest.raises(ValueError, match="url must be"):
            await fetch(wrong, own=two[1].base_url)


@pytest.mark.parametrize(("base", "output"), [
    ("localhost", "127.0.0.1"), ("127.0.0.1", "localhost"), ("localhost", "localhost")])
async def test_a_whole_run_on_this_machine_by_another_name(two, tmp_path, base, output):
    port = two[1].base_url.rpartition(":")[2]
    two[1].script([{"output": f"http://{output}:{port}/{{path}}"}] * 4)
    model = ReplicateImages(base_url=f"http://{base}:{port}", api_token=TOKEN)
    run = Pipeline(director(), critic(90), model, [FakeScorer()], num_variations=2,
                   max_enhancement_iterations=0)
    result = await run.run(Story(scenes=[Scene(prompt="a"), Scene(prompt="b")]),
                           output_dir=tmp_path / "o")
    assert [len(scene.variations) for scene in result.scenes] == [2, 2]
    assert len(two[1].requests("create")) == len(two[1].requests("output")) == 4


# --- keys, organisations, addresses -----------------------------------------------------------


SPOILED = ["sk-first-half\nsecond-half-0123", "sk-first-half\u200bsecond-half",
           "\u201csk-first-half-second-half\u201d", "sk-first-half second-half",
           "sk-first-half\rsecond-half", "sk-first-half\x00second-half"]  # fmt: skip


@pytest.mark.parametrize("key", SPOILED)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(two, monkeypatch, caplog, key, by):
    llm, server = two
    if by == "environment" and "\0" not in key:
        monkeypatch.setenv("OPENAI_BASE_URL", llm.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        monkeypatch.setenv("REPLICATE_BASE_URL", server.base_url)
        monkeypatch.setenv("REPLICATE_API_TOKEN", key)
        key = None
    makers = [lambda: OpenAIChat("m", base_url=llm.base_url, api_key=key),
              lambda: ReplicateImages(base_url=server.base_url, api_token=key)]  # fmt: skip
    for make in makers:
        with pytest.raises(ValueError, match="must be ASCII without blanks") as caught:
            make()
        assert "half" not in f"{caught.value!r}{caught.value.__context__!r}{caplog.text}"
    assert nothing_was_asked(two)


async def test_an_organisation_that_ends_in_a_newline_is_stripped(two, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", two[0].base_url)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-7\n")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "\r\n")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: lights and sounds\r\n\n")
    assert (await OpenAIChat("m").reply(ASKED)).text
    (seen,) = two[0].requests()
    assert seen["headers"]["authorization"] == f"Bearer {KEY}"
    assert seen["headers"]["openai-organization"] == "org-7"
    assert seen["headers"]["x-team"] == "lights and sounds"
    assert "openai-project" not in seen["headers"]


@pytest.mark.parametrize(("name", "value"), [
    ("OPENAI_ORG_ID", "org\u200b7"), ("OPENAI_PROJECT_ID", "one\ntwo"),
    ("OPENAI_CUSTOM_HEADERS", "X-Team: \u201clights\u201d"), ("OPENAI_CUSTOM_HEADERS", "a b: c"),
])
def test_a_header_that_cannot_be_sent_is_refused(two, monkeypatch, name, value):
    monkeypatch.setenv("OPENAI_BASE_URL", two[0].base_url)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be"):
        OpenAIChat("m")


@pytest.mark.parametrize("error", [httpx.LocalProtocolError("Illegal header value b'x\\n'"),
                                   httpx.UnsupportedProtocol("no ftp"),
                                   httpx.ProxyError("407 Proxy Authentication Required")])
def test_what_can_never_work_is_not_tried_again(error):
    sent = httpx.Request("POST", "http://llm.example/v1/chat/completions")
    wrapped = openai.APIConnectionError(request=sent)
    wrapped.__cause__ = error
    for found in (chats.failure(wrapped), predictions.failure(error)):
        assert found.kind == "never"
    assert not chats.failure(wrapped).paid
    assert predictions.failure(httpx.ProxyError("503 Busy")).kind == "again"


async def test_the_query_of_an_address_goes_along(two, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{two[0].base_url}?api-version=2026-01-01&x=")
    model = OpenAIChat("m")
    assert (await model.reply(ASKED)).text
    (seen,) = two[0].requests()
    assert seen["path"] == "/v1/chat/completions?api-version=2026-01-01&x="
    assert "?" not in model.name + model.server.base_url


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1#x", "http://127.0.0.1:70000/v1",
                                 "http://a b/v1", "http://[::1/v1"])
def test_a_base_url_that_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="base_url must be"):
        OpenAIChat("m", base_url=url)


async def test_an_address_that_ends_in_v1_is_the_same_image_server(two):
    for end in ("/v1", "/v1/", "/"):
        made = ReplicateImages(base_url=two[1].base_url + end, api_token=TOKEN)
        assert made.name == images(two).name
        assert (await made.generate(WISH)).data.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="base_url must be"):
        ReplicateImages(base_url=two[1].base_url + "?v=1", api_token=TOKEN)


@pytest.mark.parametrize("end", ["/v1/predictions", "/predictions/", "/v1/chat/completions",
                                 "/v1/models/lab/words/predictions", "/v1/models/lab/words",
                                 "/v1/files"])
def test_an_address_of_one_call_is_no_base_url_of_an_image_server(two, end):
    with pytest.raises(ValueError, match=rf"base_url must be .* got one that ends in '{end}'"):
        ReplicateImages(base_url=two[1].base_url + end, api_token=TOKEN)
    assert ReplicateImages(base_url=two[1].base_url + "/predictions-proxy", api_token=TOKEN)


async def test_an_address_without_v1_is_hinted_at(two):
    for path in ("", "/api"):
        with pytest.raises(ProviderError, match="does not end in /v1"):
            await OpenAIChat("m", base_url=two[0].origin + path).reply(ASKED)
    assert len(two[0].requests()) == 2
    for end in ("/chat/completions", "/v1/chat/completions/", "/v1/completions"):
        with pytest.raises(ValueError, match="base_url must be the address before"):
            OpenAIChat("m", base_url=two[0].origin + end)
    two[0].script(["404"])
    with pytest.raises(ProviderError) as caught:
        await chat(two).reply(ASKED)
    assert "/v1" not in str(caught.value)


# --- prices and time limits -------------------------------------------------------------------


@pytest.fixture
def real(two, monkeypatch):
    """The environment of a real run."""
    monkeypatch.setenv("OPENAI_BASE_URL", two[0].base_url)
    monkeypatch.setenv("REPLICATE_BASE_URL", two[1].base_url)
    monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
    return two


@pytest.mark.parametrize("text", [None, "{", '{"m": {"image": -1}}'])
async def test_a_price_file_that_is_none_is_refused_without_a_budget(
    real, tmp_path, monkeypatch, text
):
    path = tmp_path / "prices.json"
    if text:
        path.write_text(text)
    monkeypatch.setenv("REFIMG_PRICES", str(path))
    monkeypatch.setenv("REFIMG_CACHE", str(tmp_path / "cache"))
    story = Story(scenes=[Scene(prompt="A keeper.")])
    with pytest.raises(ValueError, match="REFIMG_PRICES must be a JSON file"):
        await Pipeline.from_env(scorers=[], num_variations=1).run(story, output_dir=tmp_path / "o")
    for make in both(real):
        with pytest.raises(ValueError, match="REFIMG_PRICES must be a JSON file"):
            make()
    assert nothing_was_asked(real)


async def test_a_price_file_that_goes_bad_costs_no_image(two, tmp_path, monkeypatch):
    path = tmp_path / "prices.json"
    path.write_text('{"google/nano-banana": {"image": 0.5}}')
    monkeypatch.setenv("REFIMG_PRICES", str(path))
    table, model = PriceTable(), images(two)
    path.unlink()
    assert (await model.generate(WISH)).data.startswith(b"\x89PNG")
    assert table.rows() == PRICES | {"google/nano-banana": table.rows()["google/nano-banana"]}
    assert table.image_cost(ImageOrder("google/nano-banana")) == 0.5


def test_time_limits_come_from_the_environment(real, monkeypatch):
    assert (defaults.director().server.timeout, defaults.image_model().timeout) == (60, 300)
    monkeypatch.setenv("REFIMG_LLM_TIMEOUT", "240")
    monkeypatch.setenv("REFIMG_IMAGE_TIMEOUT", " 900.5 ")
    made = defaults.director().server, defaults.critic().server, defaults.image_model()
    assert [each.timeout for each in made] == [240, 240, 900.5]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1 min"])
def test_a_time_limit_is_a_number_of_seconds(real, monkeypatch, text):
    for name, make in (("REFIMG_LLM_TIMEOUT", defaults.critic),
                       ("REFIMG_IMAGE_TIMEOUT", defaults.image_model)):  # fmt: skip
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, got"):
            make()


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", sampled([["--version"], ["doctor", "--help"]], 2))
def test_the_package_is_the_command(words):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "refimg", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = r"refimg \d+\.\d+\S*\n" if words == ["--version"] else r"Usage: refimg doctor.*"
    assert re.fullmatch(expected, done.stdout, re.S)


# --- bodies -----------------------------------------------------------------------------------


BOMBS = """
import asyncio, json, resource, sys
from refimg.adapters import retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from refimg.adapters.retry import ProviderError
from refimg.engine.protocols import ImageRequest
from refimg.enhance import director_messages

retry._TRIES, (llm, images) = 1, sys.argv[1:]
chat = OpenAIChat("m", base_url=llm, api_key="a-key")
model = ReplicateImages("lab/portrait", base_url=images, api_token="a-token")
wish = ImageRequest(prompt="a keeper", aspect_ratio="16:9", slot="a")

async def one(call):
    try:
        await call
    except ProviderError as error:
        return error.failure.kind, error.paid, str(error)
    return "done", True, ""

async def all_of_them():
    chats = [await one(chat.reply(director_messages("A fox."))) for _ in range(CHATS)]
    drawn = [await one(model.generate(wish)) for _ in range(IMAGES)]
    return chats, drawn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = asyncio.run(one(chat.reply(director_messages("A fox.")))) and peak()
chats, drawn = asyncio.run(all_of_them())
print(json.dumps([chats, drawn, peak() - before]))
"""


def bombed(two, chat_faults: list, image_faults: list) -> tuple[list, list, int]:
    """How the calls of a process of its own end, and the megabytes by which it grew."""
    two[0].script([None, *chat_faults])
    two[1].script(image_faults)
    code = BOMBS.replace("CHATS", str(len(chat_faults))).replace("IMAGES", str(len(image_faults)))
    command = [sys.executable, "-c", code, two[0].base_url, two[1].base_url]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BOMB = {"fault": "zip-bomb"}


@pytest.mark.skipif(os.name == "nt", reason="the peak of memory is measured as POSIX has it")
@pytest.mark.parametrize("packing", sampled(["gzip", "deflate", "raw deflate"], 3))
def test_a_body_that_grows_takes_no_memory(two, packing):
    bomb = {**BOMB, "packing": packing}
    chats, drawn, grown = bombed(two, [bomb, {**bomb, "status": 500}, {**bomb, "status": 400}],
                                 [{**bomb, "on": "model"}, bomb, {**bomb, "status": 503},
                                  {**bomb, "on": "get"}])  # fmt: skip
    assert grown < 200
    assert [end[:2] for end in chats] == [["never", True], ["again", True], ["never", False]]
    assert "must be at most 2000000 bytes" in chats[0][2]
    assert [end[0] for end in drawn] == ["never", "never", "again", "never"]
    assert [end[1] for end in drawn] == [False, True, True, True]


async def test_a_body_within_the_bounds_is_read(two, once):
    """A page of a model may be longer than an answer; an error is cut, and keeps its status."""
    long = {"megabytes": 1, **BOMB}
    two[0].script([long, {**long, "status": 429}, {"megabytes": 3, **BOMB}])
    ends = []
    for _ in range(3):
        with pytest.raises(ProviderError) as caught:
            await chat(two).reply(ASKED)
        ends.append(caught.value.failure)
    assert "at most" not in ends[0].text + ends[1].text and ends[1].throttled
    assert ends[2].kind == "never" and "at most" in ends[2].text
    two[1].script([{"on": "model", **long, "megabytes": 5}, {"on": "model", **long,
                                                             "megabytes": 9}])  # fmt: skip
    with pytest.raises(ProviderError) as caught:
        await images(two).server.connection()
        await ReplicateImages("lab/x", base_url=two[1].base_url, api_token=TOKEN).load()
    assert "at most" not in str(caught.value)
    with pytest.raises(ProviderError, match="at most 8000000 bytes"):
        await ReplicateImages("lab/x", base_url=two[1].base_url, api_token=TOKEN).load()


async def test_an_answer_in_single_bytes_lets_others_work_and_ends():
    class Dripping(httpx.AsyncByteStream):
        async def __aiter__(self):
            for _ in range(1_000_000):
                yield b"a"  # at hand at once, so that nothing waits here

    async def others() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    turns, working = [], asyncio.create_task(others())
    with pytest.raises(Unreadable, match="at most 50000 pieces"):
        async for _ in _Body(Dripping(), "", 2_000_000):
            pass
    working.cancel()
    assert len(turns) >= 400


@pytest.mark.parametrize("packing", ["br", "zstd", "gzip, gzip, br"])
async def test_a_packing_that_nobody_asked_for_is_an_error(two, packing):
    two[0].script([{**BOMB, "packing": packing, "megabytes": 1}])
    with pytest.raises(ProviderError, match="packed by gzip or deflate") as caught:
        await chat(two).reply(ASKED)
    assert caught.value.failure.kind == "never" and caught.value.paid
    (seen,) = two[0].requests()
    assert seen["headers"]["accept-encoding"] == "gzip, deflate"


async def test_an_image_is_unpacked_within_its_bound(two):
    await images(two).generate(WISH)
    (seen,) = two[1].requests("output")
    two[1].script([{"on": "output", **BOMB}])
    with pytest.raises(ValueError, match="at most 1000000 bytes"):
        await fetch(two[1].base_url + seen["path"], own=two[1].base_url, most=1_000_000)


def test_the_download_has_no_client_of_its_own():
    """The name is taken from the room that all clients share."""
    assert download.Transport is replicate.Transport is openai_server.Transport
