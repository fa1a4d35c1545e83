"""An image server that speaks Replicate's protocol, and fails as it is told.

    with start_image_server() as server:
        model = ReplicateImages(base_url=server.base_url, api_token="r8_test")
        server.script(["429", {"fault": "late", "seconds": 2}, None, {"on": "get", "fault": "500"}])
        ...
        server.requests()   # what arrived: kind, method, path, headers, json, size, fault, at

A script has one item a request, in order of arrival: a fault's name, the name with its values, or
None for a good answer. An item waits for a request of its kind (`on`: create, get, list, cancel,
model, upload or output; create if not said), and for one whose body contains `match`, where given.
`delayed` waits and then does it, `late` does it and then waits, `lost` does it and hangs up,
`500-made` does it and says 500.
What goes wrong later, with the prediction or its output, is told at its create; there `output` is
what the prediction gives, with "{url}" for its image's address and "{path}" for the end of that,
and `body` that image in base64.
Images depend on prompt and seed; without a seed, on prompt and the number of the prediction.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import re
import secrets
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from .bombs import zip_bomb

ROOT = Path(__file__).resolve().parent.parent.parent
TERMINAL = ("succeeded", "failed", "canceled", "aborted")
OUTCOMES = {  # name -> how the prediction ends
    "failed": ("failed", "CUDA out of memory"),
    "interrupted": ("failed", "Prediction interrupted; please retry (code: PA)"),
    "canceled": ("canceled", None),
    "aborted": ("aborted", None),
    "nsfw": ("failed", "NSFW content detected. Try running it again, or try a different prompt."),
    "forever": ("processing", None),
}
OUTPUTS = ("empty", "truncated", "html", "bomb", "endless", "gone", "redirect", "elsewhere", "slow")
DETAILS = {
    401: "Unauthenticated: {authorization} is not a valid token",
    402: "Insufficient credit: you have run out of free time",
    404: "The requested resource could not be found.",
    422: "input: prompt is not allowed",
    429: "Request was throttled. Your rate limit resets in ~{seconds}s.",
    500: "Internal server error",
    503: "Service unavailable",
}
HTML = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"


class ImageServer:
    """A running server; leaving the `with` ends its process."""

    def __init__(self, seconds: float = 0.05, gap: float = 0.0, skew: float = 0.0):
        options = map(str, (seconds, gap, skew))
        command = [sys.executable, "-m", "tests.servers.images", *options]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.base_url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def _control(self, name: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"{self.base_url}/_control/{name}", data=data), timeout=30) as answer:
            return json.load(answer)

    def script(self, faults: Iterable[str | dict | None] = ()) -> None:
        """Nothing; from here on these faults, and an empty record of requests."""
        self._control("script", list(faults))

    def models(self, inputs: dict[str, dict]) -> None:
        """Nothing; these models exist too: name -> the schema of its input."""
        self._control("models", inputs)

    def advance(self, seconds: float) -> None:
        """Set the server's clock ahead; what was made before is older by so much."""
        self._control("advance", seconds)

    def requests(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What arrived since the script was set, in order of arrival; of that kind."""
        return [r for r in self._control("requests") if kind in (None, r["kind"])]

    def predictions(self) -> list[dict[str, Any]]:
        """Every prediction ever made, the oldest first."""
        return self._control("predictions")

    def orphans(self) -> list[str]:
        """The ids of predictions that still run: neither ended nor cancelled."""
        return [p["id"] for p in self.predictions() if p["status"] not in TERMINAL]

    def stop(self) -> None:
        """Nothing; the process ends when its input does."""
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def __enter__(self) -> ImageServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start_image_server(**options: Any) -> ImageServer:
    """A server that is ready; `seconds` a prediction takes, `gap` between creates it insists on,
    `skew` its clock is fast."""
    return ImageServer(**options)


# --- pictures ---------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG file; `rows` are filter byte and RGB, row after row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def size(wanted: dict[str, Any]) -> tuple[int, int]:
    """Width and height of an input's picture, the longer side 96 pixels."""
    ratio = re.fullmatch(r"(\d+):(\d+)", str(wanted.get("aspect_ratio", "")))
    pair = ratio.groups() if ratio else (wanted.get("width", 1), wanted.get("height", 1))
    width, height = map(int, pair)
    return tuple(max(1, 96 * side // max(width, height)) for side in (width, height))


def draw(wanted: dict[str, Any], number: int) -> bytes:
    """The PNG of an input: stripes of colours that only prompt and seed, or number, decide."""
    (width, height), source = size(wanted), (wanted.get("prompt"), wanted.get("seed", f"n{number}"))
    colours = hashlib.sha256(json.dumps(source).encode()).digest() * 2
    rows = []
    for y in range(height):
        k = 3 * (8 * y // height)
        left, right = colours[k : k + 3], colours[k + 3 : k + 6]
        rows.append(b"\0" + left * (width // 2) + right * (width - width // 2))
    return png(width, height, b"".join(rows))


# --- models -----------------------------------------------------------------------------------

URI = {"type": "string", "format": "uri"}
RATIOS = ["match_input_image", "1:1", "2:3", "3:2", "3:4", "4:3", "9:16", "16:9", "21:9"]


def schema(properties: dict[str, Any], required: Iterable[str] = ("prompt",), **more: Any) -> dict:
    """What a model's page says of its input, as OpenAPI."""
    numbered = {name: {**field, "x-order": n} for n, (name, field) in enumerate(properties.items())}
    made = {"type": "object", "required": list(required), "properties": numbered}
    return {"components": {"schemas": {"Input": made, **more}}}


RATIO = {"allOf": [{"$ref": "#/components/schemas/aspect_ratio"}], "default": "1:1"}
ENUM = {"aspect_ratio": {"type": "string", "enum": RATIOS}}
PROMPT, SEED = {"type": "string"}, {"type": "integer", "nullable": True}
IMAGES = {"type": "array", "items": URI, "default": []}
MODELS = {
    "google/nano-banana": schema(
        {"prompt": PROMPT, "image_input": IMAGES, "aspect_ratio": RATIO}, **ENUM
    ),
    "google/nano-banana-2": schema(
        {"prompt": PROMPT, "image_input": IMAGES, "aspect_ratio": RATIO}, **ENUM
    ),
    "black-forest-labs/flux-2-pro": schema(
        {"prompt": PROMPT, "input_images": IMAGES, "aspect_ratio": RATIO, "seed": SEED}, **ENUM
    ),
    "lab/portrait": schema({
        "prompt": PROMPT, "mask_image": URI, "style_image": URI, "subject_image": URI,
        "negative_prompt": PROMPT, "width": {"type": "integer", "minimum": 256, "maximum": 2048},
        "height": {"type": "integer", "minimum": 256, "maximum": 2048}, "seed": SEED,
        "steps": {"type": "integer", "minimum": 1, "maximum": 50},
    }),
    "lab/words": schema({"prompt": PROMPT, "aspect_ratio": RATIO}, **ENUM),
}


def fits(wanted: dict[str, Any], described: dict[str, Any]) -> bool:
    """Whether a schema that allows nothing else allows this input."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator(described).is_valid(wanted)


def version_of(model: str) -> str:
    """The id of a model's only version."""
    return hashlib.sha256(model.encode()).hexdigest()


def model_json(name: str) -> dict[str, Any]:
    """A model as the API shows it; those of "lab" are not official."""
    owner, _, short = name.partition("/")
    version = {
        "id": version_of(name), "created_at": "2026-01-01T00:00:00Z", "cog_version": "0.16",
        "openapi_schema": MODELS[name],
    }
    return {
        "url": f"https://replicate.com/{name}", "owner": owner, "name": short, "run_count": 1,
        "visibility": "public", "latest_version": version, "is_official": owner != "lab",
    }


# --- predictions ------------------------------------------------------------------------------


SKEW = [0.0]  # seconds that the server's clock is fast


def moment(seconds: float) -> str:
    """A time as the API writes it."""
    return datetime.fromtimestamp(seconds + SKEW[0], UTC).isoformat().replace("+00:00", "Z")


class Prediction:
    """One prediction: what was asked, what will become of it, and when."""

    def __init__(self, model: str, wanted: dict, number: int, seconds: float, fault: dict):
        self.id = secrets.token_hex(13)
        self.model, self.wanted, self.number, self.fault = model, wanted, number, fault
        self.born, self.stopped, self.cancel_after = time.time(), None, None
        self.created = moment(self.born)
        self.seconds = float(fault.get("takes", seconds))
        self.outcome, self.error = OUTCOMES.get(fault.get("fault"), ("succeeded", None))
        self.error, self.expired = fault.get("error", self.error), False

    def status(self) -> str:
        """Where it is now."""
        if self.stopped:
            return "canceled"
        age = time.time() - self.born
        done = age >= self.seconds and self.outcome in TERMINAL
        if not done and self.cancel_after is not None and age >= self.cancel_after:
            self.expired = True
            return "canceled"
        return self.outcome if done else "processing"

    def json(self, origin: str) -> dict[str, Any]:
        """What the API shows of it."""
        status = self.status()
        ended, good = status in TERMINAL, status == "succeeded"
        output = self.fault.get("url") if self.fault.get("fault") == "elsewhere" else None
        output = output or f"{origin}/output/{self.id}.png"
        if "output" in self.fault:
            said = json.dumps(self.fault["output"]).replace("{url}", output)
            output = json.loads(said.replace("{path}", f"output/{self.id}.png"))
        ran = min(self.seconds, (self.stopped or float("inf")) - self.born)
        ran = min(ran, self.cancel_after or ran) if self.expired else ran
        times = {"predict_time": ran, "total_time": ran} if ended else {}
        return {
            "id": self.id, "model": self.model, "version": version_of(self.model),
            "input": self.wanted, "output": output if good else None, "logs": "", "status": status,
            "error": self.error if status == "failed" else None, "created_at": self.created,
            "metrics": times, "urls": {"get": f"{origin}/v1/predictions/{self.id}"},
            "expired": self.expired,
        }


# --- answers ----------------------------------------------------------------------------------


class Answer(Exception):
    """An answer: status, body, headers."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.headers = status, headers
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            self.headers = {"content-type": "application/json"} | headers
        self.body = body


def problem(status: int, fault: dict, headers: dict[str, str]) -> Answer:
    """An error as the API words it; `retry_after` and `seconds` are what it asks to wait."""
    if status == 502:
        return Answer(502, HTML, **{"content-type": "text/html"})
    said = {"seconds": fault.get("seconds", 1), "authorization": headers.get("authorization")}
    detail = DETAILS.get(status, "An error.").format(**said)
    after = {"retry-after": str(fault["retry_after"])} if "retry_after" in fault else {}
    return Answer(status, {"title": "Problem", "detail": detail, "status": status}, **after)


KINDS = (
    ("create", "POST", r"/v1/(?:models/([^/]+/[^/]+)/)?predictions"),
    ("list", "GET", r"/v1/predictions"),
    ("get", "GET", r"/v1/predictions/([^/]+)"),
    ("cancel", "POST", r"/v1/predictions/([^/]+)/cancel"),
    ("model", "GET", r"/v1/models/([^/]+/[^/]+)(?:/versions/[^/]+)?"),
    ("upload", "POST", r"/v1/files"),
    ("output", "GET", r"/output/([0-9a-f]+)\.png"),
    ("control", "GET|POST", r"/_control/(\w+)"),
)


def kind_of(method: str, path: str) -> tuple[str, str | None]:
    """Which door a request knocks at, and what stands in its path."""
    for kind, methods, pattern in KINDS:
        found = re.fullmatch(pattern, path)
        if found and method in methods.split("|"):
            return kind, (found.groups() or (None,))[0]
    return "other", None


class World:
    """What the server knows."""

    def __init__(self, seconds: float, gap: float):
        self.seconds, self.gap, self.last = seconds, gap, 0.0
        self.predictions: dict[str, Prediction] = {}
        self.uploads = 0
        self.requests: list[dict] = []
        self.faults: list[dict] = []
        self.origin = ""

    def fault(self, kind: str, body: str) -> dict:
        """The next item of the script that is meant for this request; it is used up."""
        for item in self.faults:
            if item["on"] == kind and item.get("match", "") in body:
                self.faults.remove(item)
                return item
        return {}

    def control(self, name: str, body: Any) -> Any:
        """What the test's own door answers."""
        if name == "script":
            plain = ({"fault": f} if isinstance(f, str) else f or {} for f in body)
            self.faults, self.requests = [{"on": "create", **item} for item in plain], []
        if name == "models":
            MODELS.update(body)
        if name == "advance":
            SKEW[0] += body
        if name == "predictions":
            return [p.json(self.origin) for p in self.predictions.values()]
        return self.requests if name == "requests" else {}

    def known(self, number: str) -> Prediction:
        """The prediction of that id, or a 404."""
        if number not in self.predictions:
            raise problem(404, {}, {})
        return self.predictions[number]

    async def create(self, model: str | None, body: dict, headers: dict, fault: dict) -> Answer:
        """A new prediction; held back as `Prefer: wait` asks."""
        names = {version_of(name): name for name in MODELS}
        model = model or names.get(body.get("version", "").rpartition(":")[2])
        if model not in MODELS:
            raise problem(404, fault, headers)
        if not {"prompt", "text"} & body.get("input", {}).keys():
            raise problem(422, fault, headers)
        described = MODELS[model]["components"]["schemas"]["Input"]
        if described.get("additionalProperties") is False and not fits(body["input"], described):
            raise problem(422, fault, headers)
        if time.time() - self.last < self.gap:
            raise problem(429, {"seconds": 1}, headers)
        self.last = time.time()
        made = Prediction(model, body["input"], len(self.predictions) + 1, self.seconds, fault)
        after = re.fullmatch(r"(\d+)(s|m|h)?", headers.get("cancel-after", ""))
        if after:
            made.cancel_after = int(after[1]) * {"m": 60, "h": 3600}.get(after[2], 1)
        self.predictions[made.id] = made
        wait = re.search(r"wait(?:=(\d+))?", headers.get("prefer", ""))
        until = time.time() + int(wait[1] or 60) if wait else 0
        while time.time() < until and made.status() not in TERMINAL:
            await asyncio.sleep(0.005)
        return Answer(201, made.json(self.origin))

    async def answer(self, kind: str, name: str, request: dict, fault: dict) -> Answer:
        """The answer when the network and the server are well."""
        headers = request["headers"]
        if kind not in ("output", "control", "other") and "authorization" not in headers:
            raise problem(401, fault, {"authorization": "nothing"})
        if kind == "control":
            return Answer(200, self.control(name, request["json"]))
        if kind == "create":
            return await self.create(name, request["json"], headers, fault)
        if kind == "list":
            newest = list(self.predictions.values())[: -101 : -1]
            return Answer(200, {"next": None, "results": [p.json(self.origin) for p in newest]})
        if kind == "get":
            return Answer(200, self.known(name).json(self.origin))
        if kind == "cancel":
            found = self.known(name)
            found.cancel_after, found.expired = None, False  # whoever asks is heard
            if not found.stopped and found.status() not in TERMINAL:
                found.stopped = time.time()
            return Answer(200, found.json(self.origin))
        if kind == "model" and name in MODELS:
            made = model_json(name)
            return Answer(200, made["latest_version"] if "/versions/" in request["path"] else made)
        if kind == "upload":
            self.uploads += 1
            url = f"{self.origin}/v1/files/file{self.uploads}"
            made = {
                "id": f"file{self.uploads}", "name": "reference.jpg", "content_type": "image/jpeg",
                "size": request["size"], "etag": "0", "checksums": {}, "metadata": {},
                "created_at": moment(time.time()), "urls": {"get": url},
            }  # fmt: skip
            return Answer(201, made)
        raise problem(404, fault, headers)


# --- the wire ---------------------------------------------------------------------------------


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next request of a connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ", 2)
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    try:
        parsed = json.loads(body) if body else None
    except ValueError:
        parsed = None
    return {
        "method": method, "path": path, "headers": headers, "json": parsed, "size": len(body),
        "text": body.decode("utf-8", "replace") if parsed else body[:200].decode("latin-1"),
        "at": time.time(),
    }


def head_of(answer: Answer, length: int | None) -> bytes:
    """The first bytes of an answer; without a length it ends with the connection."""
    headers = {"date": formatdate(time.time() + SKEW[0], usegmt=True), **answer.headers}
    headers |= {"connection": "close"} if length is None else {"content-length": str(length)}
    lines = [f"HTTP/1.1 {answer.status} Answer", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    """Nothing; the whole answer is sent."""
    writer.write(head_of(answer, len(answer.body)) + answer.body)
    await writer.drain()


async def send_output(writer: asyncio.StreamWriter, made: Prediction, fault: dict) -> bool:
    """Whether the connection may live on; the picture is sent, or what stands for it."""
    name = fault.get("fault")
    data = base64.b64decode(made.fault.get("body", "")) or draw(made.wanted, made.number)
    good = Answer(200, data, **{"content-type": "image/png"})
    if name == "truncated":
        writer.write(head_of(good, len(data)) + data[: len(data) // 2])
        await writer.drain()
        return False
    if name == "endless":
        writer.write(head_of(good, None) + data)
        while not writer.is_closing():
            writer.write(b"\0" * 65536)
            await writer.drain()
        return False
    if name == "slow":
        writer.write(head_of(good, len(data)))
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.2)
    answers = {
        "empty": Answer(200, b"", **{"content-type": "image/png"}),
        "html": Answer(200, HTML, **{"content-type": "text/html"}),
        "bomb": Answer(200, png(60_000, 60_000, bytes(1_000_000))),
        "gone": Answer(404, HTML),
        "redirect": Answer(302, b"", location=fault.get("url", "")),
    }
    await send(writer, answers.get(name, good))
    return True


async def serve_one(world: World, request: dict, writer: asyncio.StreamWriter) -> bool:
    """Whether the connection may live on; one request is answered, or not."""
    kind, name = kind_of(request["method"], request["path"])
    fault = world.fault(kind, request["text"])
    if kind != "control":
        world.requests.append({**request, "kind": kind, "fault": fault.get("fault")})
    what = str(fault.get("fault"))
    if what == "hang":
        await asyncio.sleep(fault.get("seconds", 3600))
    if what in ("hang", "reset"):
        writer.transport.abort()
        return False
    if what == "zip-bomb":
        encoding, body = zip_bomb(fault)
        headers = {"content-type": "application/json", "content-encoding": encoding}
        await send(writer, Answer(fault.get("status", 200), body, **headers))
        return False
    if what.isdigit():
        await send(writer, problem(int(what), fault, request["headers"]))
        return True
    if kind == "output" and name in world.predictions:
        made = world.predictions[name]
        own = made.fault if made.fault.get("fault") in OUTPUTS else {}
        return await send_output(writer, made, fault or own)
    if what == "delayed":
        await asyncio.sleep(fault.get("seconds", 1))
    try:
        answer = await world.answer(kind, name, request, fault)
    except Answer as refusal:
        answer = refusal
    if what == "500-made":
        answer = problem(500, fault, request["headers"])
    if what in ("late", "lost"):
        await asyncio.sleep(fault.get("seconds", 1 if what == "late" else 0))
    if what == "lost":
        writer.transport.abort()
        return False
    odd = {"garbage": ["garbage"], "no text": b'{"id": "\xe9"}', "deep": b"[" * 100_000}
    await send(writer, Answer(200, odd[what]) if what in odd else answer)
    return True


async def serve(seconds: float, gap: float, skew: float) -> None:
    """Nothing, ever; prints the port, then serves until the process ends."""
    world, SKEW[0] = World(seconds, gap), skew

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            lives = True
            while lives:
                request = await read_request(reader)
                lives = request["headers"].get("connection", "").lower() != "close"
                lives &= await serve_one(world, request, writer)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=2**24)
    port = server.sockets[0].getsockname()[1]
    world.origin = f"http://127.0.0.1:{port}"
    print(port, flush=True)
    await server.serve_forever()


def end_with_input() -> None:
    """Nothing; the process ends when its parent closes the pipe, or dies."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("seconds", "gap", "skew"):
        parser.add_argument(name, type=float)
    threading.Thread(target=end_with_input, daemon=True).start()
    asyncio.run(serve(**vars(parser.parse_args())))
