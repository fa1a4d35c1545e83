"""A chat server that speaks OpenAI's protocol, and fails as it is told.

    with start_llm_server() as server:
        chat = OpenAIChat("any-model", base_url=server.base_url, api_key="x")
        server.script(["429", {"fault": "hang", "seconds": 5}, None, {"fault": "nan"}])
        ...
        server.requests()                 # what arrived: path, headers, body, json, role, fault, at

A script has one item a request, in order of arrival: a fault's name, the name with its values, or
None for a good answer; an item with a role waits for that role, one with a `match` for a request
whose body contains it. After the script all answers are good: the director's is the original with a
version number, the critic's 60 + 6 for each version. With `lengths` they are as long as real ones,
and the usage follows from the bytes; what was counted stands in the record, whatever was sent.
Images are drawn by `drawing.py`; their role is "image".
An item with `long` is billed as an answer of 128,000 tokens, or of as many as the request allows,
also where it is an error.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from refimg.enhance import read_fences

from . import drawing
from .bombs import zip_bomb

ROOT = Path(__file__).resolve().parent.parent.parent
DIMENSIONS = ("completeness", "specificity", "professionalism", "cinematography", "brand_alignment")
FORMATS = ("json_schema", "json_object")
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
IMAGE = 765  # tokens of 1024 x 576 at high detail by OpenAI's formula of tiles, 85 + 4 x 170
LIMIT = "Unrecognized request argument supplied: max_completion_tokens"
HTML = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"


class LLMServer:
    """A running server; leaving the `with` ends its process."""

    def __init__(
        self, seconds: float = 0.0, formats: Iterable[str] = FORMATS, lengths: bool = False,
        bucket: tuple[float, float] | None = None, refusal: tuple[int, str] | None = None,
    ):
        command = [sys.executable, "-m", "tests.servers.llm", str(seconds), *formats]
        command += ["--lengths"] * lengths
        command += ["--bucket", *map(str, bucket)] if bucket else []
        command += ["--refusal", *map(str, refusal)] if refusal else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.origin = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.base_url = f"{self.origin}/v1"

    def _control(self, name: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"{self.origin}/_control/{name}", data=data), timeout=30) as answer:
            return json.load(answer)

    def script(self, faults: Iterable[str | dict | None] = ()) -> None:
        """Nothing; from here on these faults, and an empty record of requests."""
        self._control("script", list(faults))

    def requests(self) -> list[dict[str, Any]]:
        """What arrived since the script was set, in order of arrival."""
        return self._control("requests")

    def stop(self) -> None:
        """Nothing; the process ends when its input does."""
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def __enter__(self) -> LLMServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start_llm_server(**options: Any) -> LLMServer:
    """A server that is ready; `seconds` a good answer takes, `formats` of answers it knows,
    `lengths` for answers of lifelike length and the usage that follows from it, `bucket` for a
    token bucket that fills at so many calls a second and holds so many, `refusal` for the status
    and the words with which it refuses a format that it does not know."""
    return LLMServer(**options)


# --- what it says when nothing is wrong -------------------------------------------------------


def parts_of(body: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The parts of all messages that are of that kind: "text" or "image_url"."""
    said = [m.get("content") for m in body.get("messages", ()) if isinstance(m, dict)]
    return [part for content in said if isinstance(content, list) for part in content
            if isinstance(part, dict) and part.get("type") == kind]


def material(body: dict[str, Any]) -> dict[str, str]:
    """The fenced texts of the user's messages."""
    said = [m.get("content") for m in body.get("messages", ()) if m.get("role") == "user"]
    said += [part.get("text") for part in parts_of(body, "text")]
    found = [read_fences(text) for text in said if isinstance(text, str)]
    return {slot: text for each in found for slot, text in each.items()}


def role_of(body: dict[str, Any]) -> str:
    """Who is asked: "critic", "director", "planner", "author", "inspector", "judge", and so on."""
    given = material(body)
    if "original" in given:
        return "critic" if "prompt" in given else "director"
    if parts_of(body, "image_url"):
        return "inspector" if "questions" in given else "judge"
    slots = {"story": "planner", "failed": "editor", "reason": "reworder", "prompt": "author"}
    return next((role for slot, role in slots.items() if slot in given), "other")


QUESTIONS = {"questions": [
    {"text": text, "about": "subject", "parent": None} for text in (
        "Is there a keeper who stands under a lamp?", "Is the light of the lamp pale and cold?",
        "Is the coat of the keeper red?", "Are there boats behind the keeper?",
        "Is the sea calm, with no waves to be seen?", "Does it look like a drawing in ink?")]}
REASON = "in the middle of the image there is one, half in the shadow of the lamp"


def answers(count: int, right: int = 99) -> str:
    """Verdicts on so many questions, of which the first ones are yes and the others no."""
    told = [{"question": n, "verdict": "yes" if n < right else "no", "reason": REASON}
            for n in range(count)]
    return json.dumps({"answers": told})


def version(text: str) -> int:
    """The number of the last version that a text names, 0 for none."""
    return int((re.findall(r"Version (\d+):", text) or ["0"])[-1])


def good(body: dict[str, Any]) -> str:
    """The answer of a model that does what it is asked."""
    given, role = material(body), role_of(body)
    if role == "director":
        number = version(given.get("last_version", "")) + 1
        return f"{given['original']} Version {number}: a wide shot in soft light."
    if role == "critic":
        scores = dict.fromkeys(DIMENSIONS, min(100, 60 + 6 * version(given["prompt"])))
        return json.dumps(scores | {"critique": "Clear.", "improvements": ["name the lens"]})
    if role == "inspector":
        return answers(given["questions"].count("\n") + 1)
    return {"planner": json.dumps({"style": "ink drawing"}), "author": json.dumps(QUESTIONS),
            "reworder": "A keeper rests by his lamp, in pale light.",
            "editor": "Make the coat red, and keep the lamp where it is.",
            "judge": json.dumps({"winner": "first", "reason": "Its lamp is lit."}),
            }.get(role, "blur, watermark")


WORDS = ("keeper", "under", "the", "lamp", "in", "pale", "light", "as", "red", "boats", "come home")


def written(seed: str, low: int, high: int) -> str:
    """Words that only the seed decides, at least `low` of them and at most `high`."""
    chance = random.Random(seed)
    return " ".join(chance.choices(WORDS, k=chance.randint(low, high)))


def lifelike(body: dict[str, Any], text: str) -> str:
    """The good answer, as long as is asked for: 40 to 100 words, or two to four improvements."""
    role, seed = role_of(body), json.dumps(body)
    if role == "director":
        return f"{text} {written(seed, 40, 100)}."
    if role == "critic":
        more = [written(f"{seed}{k}", 5, 20) for k in range(random.Random(seed).randint(2, 4))]
        return json.dumps(json.loads(text) | {"critique": written(seed, 15, 45),
                                              "improvements": more})
    return text


def counted(body: dict[str, Any], text: str) -> dict[str, int]:
    """The usage of a call: a token for four bytes, four for each message, 765 for each image."""
    said = [message.get("content") for message in body.get("messages", ())]
    texts = [text for text in said if isinstance(text, str)]
    texts += [part["text"] for part in parts_of(body, "text")]
    read = sum(math.ceil(len(text.encode()) / 4) for text in texts) + 4 * len(said)
    read += IMAGE * len(parts_of(body, "image_url"))
    wrote = math.ceil(len(text.encode()) / 4)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


def completion(body: dict[str, Any], text: str | None, **over: Any) -> dict[str, Any]:
    """A completion around a text."""
    message = {"role": "assistant", "content": text, "refusal": over.pop("refusal", None)}
    choice = {"index": 0, "message": message, "finish_reason": over.pop("finish", "stop")}
    head = {"id": "chatcmpl-test", "object": "chat.completion", "created": 0}
    return head | {"model": body.get("model"), "choices": [choice], "usage": USAGE} | over


def long_usage(body: dict[str, Any]) -> dict[str, int]:
    """The usage of 128,000 tokens, or as many as the request allows, and a token a byte read."""
    said = [str(message.get("content")) for message in body.get("messages", ())]
    read = sum(len(content.encode()) + 8 for content in said)
    wrote = min(128_000, body.get("max_completion_tokens", body.get("max_tokens", 128_000)))
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


# --- what can go wrong ------------------------------------------------------------------------


def rescored(text: str, change: Any) -> str:
    """The critique with its scores changed; another text as it is."""
    try:
        body = json.loads(text)
    except ValueError:
        return text
    return json.dumps({k: change(v) if k in DIMENSIONS else v for k, v in body.items()})


TEXTS = {  # a completion around a text that is not the good one
    "truncated": lambda text: text[: len(text) // 2],
    "think": lambda text: f'<think>Perhaps {{"completeness": 3}}?\n\nNo.</think>\n{text}',
    "unclosed-think": lambda text: f"<think>I wonder. {text}",
    "fences": lambda text: f"Here you are:\n```json\n{text}\n```" if "{" in text else text,
    "nan": lambda text: rescored(text, lambda score: float("nan")),
    "strings": lambda text: rescored(text, str),
    "bools": lambda text: rescored(text, lambda score: True),
    "above": lambda text: rescored(text, lambda score: score + 1000),
    "no-text": lambda text: None,
    "refusal": lambda text: None,
    "parts": lambda text: [{"type": "text", "text": text}],
}
FORMS = {  # a completion of another form
    "refusal": {"refusal": "I can't help with that."},
    "filtered": {"finish": "content_filter"},
    "length": {"finish": "length"},
    "empty": {"choices": []},
    "null": {"choices": None},
    "error": {"choices": None, "error": {"message": "no model is free"}},
    "odd": {"choices": [{"message": None}]},
    "no-usage": {"usage": None},
    "odd-usage": {"usage": {"prompt_tokens": "many"}},
}


def error(message: str, code: str | None = None, kind: str = "server_error") -> str:
    """The body of an error."""
    return json.dumps({"error": {"message": message, "type": kind, "code": code, "param": None}})


def refused(item: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict, str] | None:
    """Status, headers and body of a fault that is an answer of its own."""
    after = item.get("after", 1)
    quota = "You exceeded your current quota, please check your plan and billing details."
    key = headers.get("authorization", "").removeprefix("Bearer ")
    return {
        "400": (400, {}, error("bad request", None, "invalid_request_error")),
        "400-limit": (400, {}, error(item.get("says", LIMIT), None, "invalid_request_error")),
        "400-form": (400, {}, json.dumps({"error": "'response_format.type' must be 'text'"})),
        "401": (401, {}, error(f"Incorrect API key provided: {key}.", "invalid_api_key")),
        "402": (402, {}, error("Payment required")),
        "refuses": (item.get("status", 400), {}, error(item.get("says", ""), None, "invalid")),
        "403": (403, {}, error("This project has no access to the model", "model_not_found")),
        "404": (404, {}, error("The model does not exist", "model_not_found")),
        "422": (422, {}, json.dumps({"detail": "body.response_format: extra field"})),
        "429": (429, {}, error("Rate limit reached", "rate_limit_exceeded")),
        "429-after": (429, {"Retry-After": str(after)}, error("Rate limit", "rate_limit_exceeded")),
        "429-ms": (429, {"Retry-After-Ms": str(1000 * after)}, error("Rate limit reached")),
        "429-hint": (429, {}, error(f"Rate limit reached. Please try again in {after}s. See …")),
        "quota": (429, {"Retry-After": "1"}, error(quota, "insufficient_quota")),
        "500": (500, {}, error("The server had an error")),
        "502": (502, {"Content-Type": "text/html"}, HTML),
        "503": (503, {"Retry-After": str(after)}, error("Overloaded")),
        "html": (200, {"Content-Type": "text/html"}, HTML),
        "no-json": (200, {}, '{"id": "chatcmpl-1", "choices": [{"mess'),
        "redirect": (item.get("status", 307), {"Location": item.get("to", "/")}, ""),
    }.get(item["fault"])


def formless(
    body: dict[str, Any], formats: list[str], refusal: list[str] | None
) -> tuple[int, str] | None:
    """What a server says that does not know the form of answer it is asked for: status, body."""
    kind = (body.get("response_format") or {}).get("type")
    if kind is None or kind in formats:
        return None
    said = f"'response_format.type' of {kind!r} is not supported"
    status, said = (int(refusal[0]), refusal[1]) if refusal else (400, said)
    return status, error(said, "400" if status == 200 else None, "invalid_request")


def told(item: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """A completion that holds an error instead of an answer."""
    where, what = item.get("where", "body"), item["error"]
    if where == "choice":
        made["choices"][0] |= {"finish_reason": "error", "error": what}
        return made
    return what if where == "top" else {"error": what}


# --- the server -------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(
        self, seconds: float, formats: list[str], lengths: bool, bucket: list[float] | None,
        refusal: list[str] | None,
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.tokens, self.filled = bucket, bucket and bucket[1], time.monotonic()
        self.seconds, self.formats, self.lock = seconds, formats, threading.Lock()
        self.faults, self.record, self.lengths, self.refusal = [], [], lengths, refusal

    def handle_error(self, request: Any, address: Any) -> None:
        """Nothing: a client that hung up is no news."""

    def throttle(self) -> dict[str, Any] | None:
        """A 429 with the time to the next token, where the bucket is empty."""
        rate, most = self.bucket
        now = time.monotonic()
        self.tokens = min(most, self.tokens + (now - self.filled) * rate)
        self.filled = now
        if self.tokens < 1:
            return {"fault": "429-ms", "after": (1 - self.tokens) / rate}
        self.tokens -= 1
        return None

    def take(self, role: str, raw: str) -> dict[str, Any]:
        """The first item of the script that is for this role and body, taken out of it."""
        if self.bucket and (throttled := self.throttle()):
            return throttled
        for at, item in enumerate(self.faults):
            made = item if isinstance(item, dict) else {"fault": item}
            if made.get("role") in (None, role) and made.get("match", "") in raw:
                del self.faults[at]
                return made
        return {"fault": None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1
    server: _Server

    def log_message(self, *parts: Any) -> None:
        """Nothing."""

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        raw = sent.decode("utf-8", "replace")
        if self.path.startswith("/_control/"):
            self.answer(200, {}, json.dumps(self.control(self.path.rpartition("/")[2], raw)))
        elif self.path.startswith("/v1/images/") and self.command == "POST":
            self.draw(sent, raw)
        else:
            self.play(raw)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _any

    def control(self, name: str, raw: str) -> Any:
        """What the test asks of the server itself."""
        with self.server.lock:
            if name == "script":
                self.server.faults, self.server.record = json.loads(raw), []
            return self.server.record

    def play(self, raw: str) -> None:
        """One request: into the record, then what the script says."""
        try:
            body = json.loads(raw)
        except ValueError:
            body = {}
        headers, role = {k.lower(): v for k, v in self.headers.items()}, role_of(body)
        with self.server.lock:
            wrong = formless(body, self.server.formats, self.server.refusal)
            item = {"fault": "format"} if wrong else self.server.take(role, raw)
            seen = {"method": self.command, "path": self.path, "headers": headers, "role": role}
            seen |= {"body": raw, "json": body, "fault": item.get("fault"), "at": time.time()}
            self.server.record.append(seen | {"usage": None})
            self.seen = self.server.record[-1]
        if wrong:
            self.answer(wrong[0], {}, wrong[1])
        elif self.path.partition("?")[0] != "/v1/chat/completions" or self.command != "POST":
            self.answer(404, {}, error(f"no such path: {self.path}"))
        else:
            self.fault(item, body, headers)

    def draw(self, sent: bytes, raw: str) -> None:
        """One request for an image: into the record, then what the script says."""
        headers = {k.lower(): v for k, v in self.headers.items()}
        with self.server.lock:
            item = self.server.take("image", raw)
            seen = {"method": self.command, "path": self.path, "headers": headers, "role": "image",
                    "fault": item.get("fault"), "at": time.time(), "usage": None, "billed": 0.0}
            self.server.record.append(seen)
            number = len(self.server.record)
        name = item.get("fault")
        if made := name and refused(item, headers):
            return self.answer(*made)
        try:
            body, told = drawing.answer(
                self.path, sent, headers.get("content-type", ""), item, number)
        except drawing.Refusal as refusal:
            said = error(str(refusal), refusal.code, "invalid_request_error")
            return self.answer(refusal.status, {}, said)
        with self.server.lock:
            seen |= told
        time.sleep(item.get("seconds", self.server.seconds))
        if name in ("lost", "hang"):
            return self.reset()
        text = json.dumps(body)
        return self.answer(200, {}, text[: len(text) // 2] if name == "cut" else text,
                           len(text) if name == "cut" else 0)

    def fault(self, item: dict[str, Any], body: dict[str, Any], headers: dict[str, str]) -> None:
        """The answer to a chat request."""
        name, text = item.get("fault"), good(body)
        if item.get("long"):
            self.seen["usage"] = long_usage(body)
        if made := name and refused(item, headers):
            return self.answer(*made)
        if name == "zip-bomb":
            return self.bomb(item)
        if name == "hang":
            time.sleep(item.get("seconds", 60))
        if name in ("reset", "hang"):
            return self.reset()
        time.sleep(item.get("seconds", 0) if name == "late" else self.server.seconds)
        text = lifelike(body, text) if self.server.lengths else text
        if not item.get("long"):
            self.seen["usage"] = counted(body, text) if self.server.lengths else USAGE
        text = TEXTS.get(name, str)(text)
        over = {"usage": self.seen["usage"]}
        if item.get("long") and over["usage"]["completion_tokens"] < 128_000:
            over["finish"] = "length"
        over |= FORMS.get(name, {})
        if name in ("usage", "ended"):
            over |= {"usage": item["usage"]} if name == "usage" else {"finish": item["reason"]}
            text = text if name == "usage" else text[: len(text) // 2]
        text = item["content"] if name == "content" else text
        made = completion(body, text, **over)
        sent = json.dumps(told(item, made) if name == "told" else made)
        if name == "drip":
            return self.drip(sent, item.get("seconds", 0.05))
        extra = 100 if name == "cut" else 0
        return self.answer(200, {}, sent, extra)

    def head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def answer(self, status: int, headers: dict[str, str], text: str, extra: int = 0) -> None:
        """A whole answer; with `extra`, one that ends too early."""
        data = text.encode()
        self.head(status, headers, len(data) + extra)
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection |= bool(extra)

    def bomb(self, item: dict[str, Any]) -> None:
        """A body that is large when it is unpacked."""
        encoding, data = zip_bomb(item)
        self.head(item.get("status", 200), {"Content-Encoding": encoding}, len(data))
        self.close_connection = True
        with suppress(OSError):
            self.wfile.write(data)

    def drip(self, text: str, seconds: float) -> None:
        """The answer, byte by byte."""
        data = text.encode()
        self.head(200, {}, len(data))
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(seconds)

    def reset(self) -> None:
        """The connection, broken without a word."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def main() -> None:
    """Serves until standard input ends, so that no server outlives the one who started it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--bucket", nargs=2, type=float)
    parser.add_argument("--refusal", nargs=2)
    server = _Server(**vars(parser.parse_args()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
