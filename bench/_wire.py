"""Hostile answers of providers, and a server that gives each of them on a port of its own.

As a program it serves every case and prints its ports; the last one is that of a good server.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from tests.servers import images, llm

KEYS = ("kP4tQ0Zr9XwVb2Nc7Ys5LdGh81", "Wq8Hs3Jf6Pk1Zx0Rm4Tv7BnYc9")  # of no known form
MODEL = "black-forest-labs/flux-2-pro"
PLACES = ("director", "critic", "model", "create", "get", "upload", "output")
BOMB = 400_000_000  # bytes of a bomb when it is inflated
DEEP, HUGE = 100_000, 20_000_000
NASTY = "\x1b[2J\x1b]0;owned\x07\x00\u202egnp.exe\u2066\u200b\ud800 \x9b31m"


@dataclass(frozen=True)
class Wire:
    """An answer as it goes over the wire."""

    body: bytes = b""
    status: int | str = 200
    headers: dict[str, str] = field(default_factory=dict)
    how: str = ""  # "", "cut", "longer", "shorter", "endless", "chunks", "raw"


@dataclass(frozen=True)
class Case:
    """An answer that the server gives to each request at one place."""

    name: str
    place: str  # one of PLACES
    make: Callable[[str, dict], Wire]  # of the key that was sent, and the good document


def js(value: Any, **over: Any) -> Wire:
    """An answer of JSON."""
    return Wire(json.dumps(value).encode(), **over)


def nested(depth: int) -> list:
    """A list in a list in a list."""
    made: list = []
    for _ in range(depth):
        made = [made]
    return made


VALUES: dict[str, Any] = {
    "null": None, "true": True, "minus": -1, "nan": float("nan"), "infinite": float("inf"),
    "vast": 10**30, "empty": "", "long": "x" * 300_000, "list": [], "object": {},
    "odd": [None, {"a": [1]}, "x"], "nested": nested(400), "nasty": NASTY,
}  # fmt: skip
CHAT_FIELDS = (
    "id", "object", "created", "model", "error", "choices", "choices.0", "choices.0.message",
    "choices.0.message.content", "choices.0.message.refusal", "choices.0.message.role",
    "choices.0.message.tool_calls", "choices.0.finish_reason", "usage", "usage.prompt_tokens",
)  # fmt: skip
PREDICTION_FIELDS = (
    "id", "status", "output", "error", "logs", "metrics", "metrics.predict_time", "urls",
    "urls.get", "created_at", "input", "model",
)  # fmt: skip
SCHEMA_FIELDS = (
    "latest_version", "latest_version.id", "latest_version.openapi_schema",
    "latest_version.openapi_schema.components.schemas",
    "latest_version.openapi_schema.components.schemas.Input",
    "latest_version.openapi_schema.components.schemas.Input.properties",
    "latest_version.openapi_schema.components.schemas.Input.required",
    "latest_version.openapi_schema.components.schemas.Input.properties.prompt",
    "latest_version.openapi_schema.components.schemas.Input.properties.seed",
    "latest_version.openapi_schema.components.schemas.Input.properties.aspect_ratio",
    "latest_version.openapi_schema.components.schemas.Input.properties.input_images.items",
    "latest_version.openapi_schema.components.schemas.aspect_ratio.enum",
)  # fmt: skip


def put(document: Any, path: str, value: Any) -> Any:
    """A copy of the document with another value at the path."""
    copy = json.loads(json.dumps(document))
    *above, last = (int(step) if step.isdigit() else step for step in path.split("."))
    inner = copy
    for step in above:
        inner = inner[step]
    inner[last] = value
    return copy


def with_value(path: str, name: str) -> Callable[[str, dict], Wire]:
    """What makes the good document with a wrong value at the path."""
    return lambda key, good: js(put(good, path, VALUES[name]))


@cache
def bomb(form: str) -> bytes:
    """Much compressed, in which a JSON text begins."""
    if form == "gzip":
        return gzip.compress(b'{"id": "' + b" " * BOMB, 6)
    squeeze = zlib.compressobj(6)
    return squeeze.compress(b'{"id": "' + b" " * BOMB) + squeeze.flush()


def reflected(key: str) -> dict[str, str]:
    """The key as a server may send it back."""
    coloured = "\x1b[31m".join((key[:9], key[9:]))
    return {
        "plain": key, "header": f"Authorization: Bearer {key}", "coloured": coloured,
        "wrapped": "\n".join((key[:13], key[13:])), "hidden": "\u200b".join((key[:7], key[7:])),
        "percent": "".join(f"%{ord(c):02X}" for c in key), "quoted": quote(key[:5]) + key[5:],
        "escaped": "".join(f"\\u{ord(c):04x}" for c in key), "spaced": " ".join(key),
        "base64": base64.b64encode(key.encode()).decode(), "half": key[:16], "rest": key[10:],
        "repr": repr(repr(f"'{key}\n")), "query": f"token={key}&x=1",
    }  # fmt: skip


REFLECTIONS = tuple(reflected(KEYS[0]))
WAITS = ("nan", "inf", "-5", "1e9", "1e999", "soon", "", "Fri, 31 Dec 9999 23:59:59 GMT", "\xff",
         "99999999999999999999", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT")


def wire_faults() -> dict[str, Callable[[str, dict], Wire]]:
    """What may happen at any place."""
    html, loop = {"content-type": "text/html"}, {"location": "/again"}
    made: dict[str, Callable[[str, dict], Wire]] = {
        "gzip bomb": lambda k, g: Wire(bomb("gzip"), headers={"content-encoding": "gzip"}),
        "deflate bomb": lambda k, g: Wire(bomb("zip"), headers={"content-encoding": "deflate"}),
        "gzip bomb error": lambda k, g: Wire(bomb("gzip"), 400, {"content-encoding": "gzip"}),
        "no gzip": lambda k, g: Wire(b"plain", headers={"content-encoding": "gzip"}),
        "odd coding": lambda k, g: js(g, headers={"content-encoding": "zstd, br, x"}),
        "deep": lambda k, g: Wire(b"[" * DEEP),
        "deep objects": lambda k, g: Wire(b'{"detail":' * DEEP),
        "deep error": lambda k, g: Wire(b'{"error":' * DEEP + b"1" + b"}" * DEEP, 400),
        "huge": lambda k, g: Wire(b'{"id": "' + b"a" * HUGE + b'"}'),
        "huge list": lambda k, g: Wire(b"[" + b"1," * (HUGE // 8) + b"1]"),
        "huge error": lambda k, g: Wire(b"e" * HUGE, 422),
        "endless": lambda k, g: Wire(b" " * 65536, how="endless"),
        "endless error": lambda k, g: Wire(b"e" * 65536, 403, how="endless"),
        "endless chunks": lambda k, g: Wire(b"1\r\na\r\n" * 1000, how="endless chunks"),
        "cut": lambda k, g: js(g, how="cut"), "longer": lambda k, g: js(g, how="longer"),
        "shorter": lambda k, g: js(g, how="shorter"),
        "broken chunks": lambda k, g: Wire(b"zz\r\nabc\r\n", how="chunks"),
        "two lengths": lambda k, g: Wire(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n"
                                         b"Content-Length: 5\r\n\r\nabcde", how="raw"),
        "no http": lambda k, g: Wire(b"\x16\x03\x01\x00\x05hello\r\n\r\n", how="raw"),
        "long header": lambda k, g: js(g, headers={"x-long": "h" * 200_000}),
        "many headers": lambda k, g: js(g, headers={f"x-{n}": "1" for n in range(2000)}),
        "nothing": lambda k, g: Wire(b"", 204), "blank": lambda k, g: Wire(b""),
        "html": lambda k, g: Wire(images.HTML, headers=html),
        "image": lambda k, g: js(g, headers={"content-type": "image/png"}),
        "events": lambda k, g: js(g, headers={"content-type": "text/event-stream"}),
        "charset": lambda k, g: js(g, headers={"content-type": "application/json; charset=x-no"}),
        "utf-16": lambda k, g: Wire(json.dumps(g).encode("utf-16")),
        "latin": lambda k, g: Wire(b'{"id": "\xe9\xff\xfe"}'),
        "nasty error": lambda k, g: js({"error": {"message": NASTY}, "detail": NASTY}, status=400),
        "listed error": lambda k, g: js({"error": nested(50), "detail": nested(50)}, status=422),
        "error with 200": lambda k, g: js({"error": {"message": "no", "code": 429}}),
        "loop": lambda k, g: Wire(b"", 307, loop),
        "status 999": lambda k, g: js(g, status=999), "status 101": lambda k, g: js(g, status=101),
        "status text": lambda k, g: js(g, status="2OO"),
    }  # fmt: skip
    for n, wait in enumerate(WAITS):
        status = (429, 503)[n % 2]
        made[f"wait {wait!r}"] = lambda k, g, w=wait, s=status: js(
            {"detail": "slow down", "error": {"message": "slow down"}}, status=s,
            headers={"retry-after": w, "retry-after-ms": w})
    for name in REFLECTIONS:
        made[f"key {name}"] = lambda k, g, n=name: js(
            {"error": {"message": f"bad key {reflected(k)[n]} given"},
             "detail": f"bad key {reflected(k)[n]} given"}, status=400)
    return made


TEXTS: dict[str, Callable[[str], str]] = {
    "nasty": lambda key: f"A keeper {NASTY} on a stair in the rain.",
    "huge": lambda key: "a keeper on a stair " * 250_000, "brackets": lambda key: "[" * DEEP,
    "braces": lambda key: '{"a":' * DEEP, "digits": lambda key: '{"completeness": ' + "9" * 9000,
    "spaces": lambda key: " " * 1_000_000 + "x", "quotes": lambda key: '"' * 200_000,
    "fences": lambda key: "```json\n" * 50_000, "thoughts": lambda key: "<think>" * 50_000,
    "half thought": lambda key: "<think>" + "so " * 200_000, "backslashes": lambda key: "\\" * DEEP,
    "objects": lambda key: "{} " * 100_000, "lines": lambda key: "\n" * 300_000 + "a",
    "scores": lambda key: json.dumps(dict.fromkeys(llm.DIMENSIONS, 10**400)),
    "deep scores": lambda key: json.dumps(dict.fromkeys(llm.DIMENSIONS, nested(200))),
    "text scores": lambda key: json.dumps(dict.fromkeys(llm.DIMENSIONS, NASTY)),
    "key": lambda key: f"A keeper with the key {key} on a stair.",
}  # fmt: skip


def header(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are not there."""
    return images.png(width, height, b"")


PICTURES: dict[str, Callable[[], bytes]] = {
    "wide bomb": lambda: header(60_000, 60_000), "flat bomb": lambda: header(2**31 - 1, 1),
    "no size": lambda: header(0, 0), "no pixels": lambda: header(64, 64),
    "inflating": lambda: images.png(64, 64, bytes(200_000_000)),
    "text bomb": lambda: images.png(8, 8, bytes(8 * 25)).replace(
        b"\x00\x00\x00\x00IEND", chunk(b"zTXt", b"a\0\0" + zlib.compress(b"t" * 50_000_000))
        + b"\x00\x00\x00\x00IEND"),
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "gif": lambda: b"GIF89a" + b"x" * 99, "jpeg": lambda: b"\xff\xd8\xff" + b"j" * 999,
    "half": lambda: images.draw({"prompt": "a"}, 1)[:200], "dots": lambda: b"." * HUGE,
    "webp": lambda: b"RIFF\xff\xff\xff\xffWEBP" + b"w" * 999,
    "random": lambda: bytes(range(256)) * 99,
    "trailing": lambda: images.draw({"prompt": "a"}, 1) + b"x" * HUGE,
}  # fmt: skip
OUTPUTS = (
    "http://169.254.169.254/latest/", "file:///etc/passwd", "data:image/png;base64,AAAA",
    "data:image/png," + "%00" * 100_000, "data:;base64," + "A" * 400_000, "https://replicate.delivery:1/",
    "http://[::1", "javascript:1", "//x", "https://user:pw@replicate.delivery/x", "h" * 100_000,
    "https://replicate.delivery.evil.example/x",
)  # fmt: skip


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def cases() -> Iterator[Case]:
    """Every hostile answer."""
    for place in PLACES:
        for name, make in wire_faults().items():
            if place != "output" or not name.startswith(("html", "image", "key half")):
                yield Case(name, place, make)
    for path, place in (*((f, ("director", "critic")[n % 2]) for n, f in enumerate(CHAT_FIELDS)),
                        *((f, "create") for f in PREDICTION_FIELDS),
                        *((f, "get") for f in PREDICTION_FIELDS[::4]),
                        *((f, "model") for f in SCHEMA_FIELDS), ("urls", "upload"),
                        ("urls.get", "upload"), ("id", "upload")):
        yield from (Case(f"{path} {name}", place, with_value(path, name)) for name in VALUES)
    for name, text in TEXTS.items():
        for place in ("director", "critic"):
            yield Case(f"text {name}", place, lambda key, good, t=text: js(
                put(good, "choices.0.message.content", t(key))))
    for name, picture in PICTURES.items():
        yield Case(f"picture {name}", "output", lambda key, good, p=picture: Wire(
            p(), headers={"content-type": "image/png"}))
    for url in OUTPUTS:
        yield Case(f"output {url[:40]}", "create", lambda key, good, u=url: js(
            put(good, "output", u), status=201))


# --- the server -------------------------------------------------------------------------------


def place_of(request: dict[str, Any]) -> str:
    """Which of the places a request is for."""
    if request["path"].endswith("/chat/completions"):
        role = llm.role_of(request["json"] or {})
        return "critic" if role == "critic" else "director"
    return images.kind_of(request["method"], request["path"])[0]


def good_document(place: str, request: dict[str, Any], origin: str, slow: bool) -> Any:
    """What a good server says there; None: it has an image."""
    if place in ("director", "critic"):
        return llm.completion(request["json"], llm.good(request["json"]), usage=llm.USAGE)
    if place == "model":
        return images.model_json(MODEL)
    if place == "upload":
        return {"id": "f1", "name": "r.jpg", "content_type": "image/jpeg", "size": 9, "etag": "0",
                "checksums": {}, "metadata": {}, "created_at": "2026-01-01T00:00:00Z",
                "urls": {"get": f"{origin}/v1/files/f1"}}  # fmt: skip
    if place == "list":
        return {"next": None, "results": []}
    made = images.Prediction(MODEL, (request["json"] or {}).get("input", {}), 1, 0.0, {})
    if place in ("get", "cancel"):
        made.id = request["path"].split("/")[3]
    made.outcome = "processing" if slow and place == "create" else "succeeded"
    return made.json(origin)


async def send(writer: asyncio.StreamWriter, wire: Wire) -> bool:
    """Whether the connection may live on; the answer is sent as it is said to be."""
    body, headers = wire.body, {"content-type": "application/json"} | wire.headers
    if wire.how == "raw":
        writer.write(body)
        await writer.drain()
        return False
    length = {"cut": len(body), "longer": len(body) + 1000, "shorter": max(0, len(body) - 7)}
    if "chunks" in wire.how:
        headers["transfer-encoding"] = "chunked"
    elif wire.how != "endless":
        headers["content-length"] = str(length.get(wire.how, len(body)))
    head = [f"HTTP/1.1 {wire.status} Answer", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    writer.write("\r\n".join(head).encode("latin-1"))
    writer.write(body[: len(body) // 2] if wire.how == "cut" else body)
    await writer.drain()
    while wire.how.startswith("endless") and not writer.is_closing():
        writer.write(body)
        await writer.drain()
        await asyncio.sleep(0.001)
    return not wire.how


async def serve_case(case: Case | None) -> asyncio.Server:
    """A server that is good but for the case."""
    origin = ""

    async def one(request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        place = place_of(request)
        if place == "output" and (case is None or case.place != "output"):
            return await send(writer, Wire(images.draw({"prompt": "a", "seed": 1}, 1)))
        slow = case is not None and case.place == "get"
        good = {} if place == "output" else good_document(place, request, origin, slow)
        if case is None or place != case.place:
            return await send(writer, js(good, status=201 if place == "create" else 200))
        key = request["headers"].get("authorization", KEYS[1]).rpartition(" ")[2]
        return await send(writer, case.make(key, good))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await one(await images.read_request(reader), writer):
                pass
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=2**24)
    origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    return server


async def serve() -> None:
    """Serves every case, until standard input ends."""
    servers = [await serve_case(case) for case in (*cases(), None)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await asyncio.Event().wait()


def end_with_input() -> None:
    """Ends the process when its parent closes the pipe, or dies."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_input, daemon=True).start()
    asyncio.run(serve())
