"""Pictures are fetched from where they may be, and nobody else is asked."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
import subprocess

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimg.adapters import download, network
from refimg.adapters.download import NoImage, fetch, is_public
from tests.servers.images import draw, start_image_server

PUBLIC = "93.184.216.34"
NAME = "pbxt.replicate.delivery"


@pytest.fixture(scope="module")
def servers():
    with start_image_server() as own, start_image_server() as other:
        yield own, other


@pytest.fixture
def own(servers):
    servers[0].script()
    return servers[0]


@pytest.fixture
def other(servers):
    servers[1].script()
    return servers[1]


def output_with(server, fault: str | None, **more) -> str:
    """The address of a new picture whose delivery goes wrong like this."""
    server.script([{"fault": fault, **more} if fault else None])
    url = f"{server.base_url}/v1/models/google/nano-banana/predictions"
    wish = {"input": {"prompt": "a", "aspect_ratio": "16:9"}}
    headers = {"Authorization": "Bearer r8_test", "Prefer": "wait"}
    return httpx.post(url, json=wish, headers=headers).json()["output"]


def resolve_to(monkeypatch, *answers: list[str]) -> list[str]:
    """The names looked up from now on; each look-up gets the next answer, the last for ever."""
    asked: list[str] = []

    async def getaddrinfo(self, host, port, **options):
        addresses = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


# --- who is asked -----------------------------------------------------------------------------


FOREIGN = (
    "{other}/output/1.png",  # another port of this machine
    "https://127.0.0.1:{port}/output/1.png",  # our server by another scheme
    "http://replicate.delivery/1.png",
    "https://replicate.delivery:8443/1.png",
    "https://replicate.delivery.example.com/1.png",
    "https://notreplicate.delivery/1.png",
    "https://replicate.delivery./1.png",
    "https://replicate.delivery@127.0.0.1:{oport}/1.png",
    "http://127.0.0.1:{port}@127.0.0.1:{oport}/1.png",
    "http://127.0.0.1:{oport}\\@127.0.0.1:{port}/1.png",
    "http://127.0.0.1:{oport}#@replicate.delivery/1.png",
    "//127.0.0.1:{oport}/1.png",
    "file:///etc/passwd",
    "ftp://replicate.delivery/1.png",
    "http://[::ffff:127.0.0.1]:{oport}/1.png",
    "http://169.254.169.254/latest/meta-data/",
    "https://93.184.216.34/1.png",
    "https://xn--replicte-56a.delivery/1.png",
    "",
    None,
    7,
    ["https://replicate.delivery/1.png"],
)


@pytest.mark.parametrize("url", FOREIGN)
async def test_nobody_else_is_asked(own, other, monkeypatch, url):
    looked_up = resolve_to(monkeypatch, ["127.0.0.1"])
    if isinstance(url, str):
        port, oport = (server.base_url.rpartition(":")[2] for server in (own, other))
        url = url.format(other=other.base_url, port=port, oport=oport)
    with pytest.raises(ValueError):
        await fetch(url, own=own.base_url)
    assert own.requests() == other.requests() == []
    assert looked_up == []


PRIVATE = ("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
           "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::",
           "224.0.0.1", "240.0.0.1")  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_that_leads_inside_is_not_followed(monkeypatch, address):
    resolve_to(monkeypatch, [PUBLIC, address])
    monkeypatch.setattr(download, "_answer", None)  # any request would be a TypeError
    with pytest.raises(ValueError, match="must be public"):
        await fetch(f"https://{NAME}/1.png")


@given(st.ip_addresses())
def test_no_special_address_is_public(address):
    inner = getattr(address, "ipv4_mapped", None)
    special = (inner or address).is_private or (inner or address).is_multicast
    assert not (special and is_public(str(address)))


@given(st.ip_addresses(v=4))
def test_a_dressed_address_is_as_public_as_the_naked_one(address):
    for prefix in ("::ffff:", "64:ff9b::"):
        assert is_public(prefix + str(address)) == is_public(str(address))


# --- the address that was checked is the one that is asked ------------------------------------


@pytest.fixture
async def tls_server(tmp_path, monkeypatch):
    """A TLS server with a certificate for one name, at which every connection ends."""
    pem, seen = tmp_path / "both.pem", []
    subject = ["-subj", "/CN=test", "-addext", f"subjectAltName=DNS:{NAME}"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    keys = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run([*made, *keys], check=True, capture_output=True)
    pem.write_text((tmp_path / "key").read_text() + (tmp_path / "cert").read_text())
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.load_cert_chain(pem)
    ours.load_verify_locations(tmp_path / "cert")
    monkeypatch.setattr(network, "trust", lambda: ours)

    async def talk(reader, writer):
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        data = draw({"prompt": "a"}, 1)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=theirs)
    port, reached = server.sockets[0].getsockname()[1], []
    import anyio

    connect = anyio.connect_tcp

    async def redirected(remote_host, remote_port, **options):
        reached.append((remote_host, remote_port))
        if remote_host == "93.184.216.35":
            raise OSError("unreachable")
        return await connect("127.0.0.1", port, **options)

    monkeypatch.setattr(anyio, "connect_tcp", redirected)
    async with server:
        yield seen, reached


async def test_a_second_look_up_cannot_lead_elsewhere(tls_server, monkeypatch):
    seen, reached = tls_server
    asked = resolve_to(monkeypatch, [PUBLIC], ["127.0.0.1"])
    assert await fetch(f"https://{NAME}/a.png?x=1") == draw({"prompt": "a"}, 1)
    assert asked == [NAME] and reached == [(PUBLIC, 443)]
    assert seen[0].startswith("GET /a.png?x=1 ") and f"Host: {NAME}\r\n" in seen[0]


async def test_the_next_address_is_tried_where_one_cannot_be_reached(tls_server, monkeypatch):
    _, reached = tls_server
    resolve_to(monkeypatch, ["93.184.216.35", PUBLIC])
    await fetch(f"https://{NAME}/a.png")
    assert [host for host, _ in reached] == ["93.184.216.35", PUBLIC]


async def test_the_certificate_must_be_made_out_to_the_name(tls_server, monkeypatch):
    seen, reached = tls_server
    resolve_to(monkeypatch, [PUBLIC])
    with pytest.raises(httpx.ConnectError, match=r"(?i)certificate|hostname"):
        await fetch("https://other.replicate.delivery/a.png")
    assert reached and not seen


# --- redirects --------------------------------------------------------------------------------


async def test_redirects_within_the_own_server_are_followed(own):
    target = output_with(own, None)
    first = output_with(own, "redirect", url=target)
    assert (await fetch(first, own=own.base_url)).startswith(b"\x89PNG")


@pytest.mark.parametrize("to", ["{other}/x.png", "//{host}/x.png", "http://replicate.delivery/x",
                                "file:///etc/passwd", "https://10.0.0.1/x", "http://[::1]:{port}/"])
async def test_redirects_elsewhere_are_not(own, other, to):
    host = other.base_url.partition("//")[2]
    to = to.format(other=other.base_url, host=host, port=host.rpartition(":")[2])
    url = output_with(own, "redirect", url=to)
    with pytest.raises(ValueError, match="url must be"):
        await fetch(url, own=own.base_url)
    assert other.requests() == [] and len(own.requests("output")) == 1


async def test_redirects_in_a_circle_end(own):
    url = output_with(own, "redirect", url="")
    own.script([{"on": "output", "fault": "redirect", "url": url}] * 9)
    with pytest.raises(ValueError, match="redirects"):
        await fetch(url, own=own.base_url)
    assert len(own.requests("output")) == 4


# --- what arrives -----------------------------------------------------------------------------


BROKEN = {
    "empty": (NoImage, "0 bytes"),
    "html": (NoImage, "<html>"),
    "truncated": (httpx.RemoteProtocolError, "complete"),
    "gone": (httpx.HTTPStatusError, "404"),
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_what_is_no_picture_is_an_error(own, fault):
    kind, text = BROKEN[fault]
    with pytest.raises(kind, match=text):
        await fetch(output_with(own, fault), own=own.base_url)


async def test_an_endless_picture_is_not_read_to_its_end(own):
    with pytest.raises(ValueError, match="at most 1000000 bytes"):
        await fetch(output_with(own, "endless"), own=own.base_url, most=1_000_000)


async def test_a_slow_picture_has_a_deadline(own):
    with pytest.raises(TimeoutError):
        await fetch(output_with(own, "slow"), own=own.base_url, seconds=0.5)


async def test_compression_is_neither_asked_for_nor_undone(own):
    url = output_with(own, None)
    await fetch(url, own=own.base_url)
    assert own.requests("output")[0]["headers"]["accept-encoding"] == "identity"


async def test_a_picture_may_come_inside_its_address():
    data = draw({"prompt": "a"}, 1)
    assert await fetch("data:image/png;base64," + base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:image/png;base64,%%%", "data:",
                                 "data:image/png;base64," + "A" * 2000])
async def test_other_data_addresses_are_refused(url):
    with pytest.raises((ValueError, NoImage)):
        await fetch(url, most=1000)


def test_the_test_address_is_public():
    assert ipaddress.ip_address(PUBLIC).is_global and is_public(PUBLIC)
