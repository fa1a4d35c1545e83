"""The part of the chat server that draws: OpenAI's `/v1/images/*`, strict about what it is sent.

A request that OpenAI's own models would refuse is refused: an unknown field, a size off the rules,
a file whose type is not the one that is said. Tokens are counted by rules of this file's own, from
the published prices of an image, and stand in the record with what they cost, whatever was sent.

Faults of an item, beside those of the chat server: `blocked` (the moderation), `lost` (drawn and
billed, then the connection is broken), `cut` (billed, half of the answer), `no-usage`,
`other-size`, `address` (in place of base64), `no-base64`, `empty`, `html`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from PIL import Image

FIELDS = {"model", "prompt", "n", "size", "quality", "background", "output_format", "moderation",
          "output_compression", "input_fidelity", "safety_identifier"}
OUTPUT = {"low": 460, "medium": 1767, "high": 7033}  # tokens of 1024 x 1024: .0138, .053, .211 USD
SEEN = (1250, 2250)  # tokens of a reference: .010 to .018 USD
PRICE = {"text": 5.0, "image": 8.0, "output": 30.0}  # USD per million tokens
MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class Refusal(ValueError):
    """What the server would not take; a status and a code."""

    def __init__(self, said: str, code: str | None = None, status: int = 400):
        super().__init__(said)
        self.code, self.status = code, status


def parts_of(raw: bytes, kind: str) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
    """Fields and files of a multipart form; a file is its type as it is said, and its bytes."""
    head = b"Content-Type: " + kind.encode() + b"\r\n\r\n"
    form = BytesParser(policy=HTTP).parsebytes(head + raw)
    fields, files = {}, []
    for part in form.iter_parts():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        if part.get_filename() is None:
            fields[name] = data.decode()
        elif name in ("image", "image[]"):
            files.append((part.get_content_type(), data))
        else:
            raise Refusal(f"Unknown parameter: '{name}'.", "unknown_parameter")
    return fields, files


def checked(body: dict[str, Any]) -> tuple[int, int]:
    """The size that is asked for; a Refusal where a field is not as it must be."""
    if unknown := sorted(body.keys() - FIELDS):
        raise Refusal(f"Unknown parameter: '{unknown[0]}'.", "unknown_parameter")
    if not str(body.get("model", "")).startswith("gpt-image"):
        raise Refusal(f"The model '{body.get('model')}' does not exist.", "model_not_found", 404)
    if not 0 < len(body.get("prompt") or "") <= 32_000:
        raise Refusal("Invalid 'prompt': it must have 1 to 32000 characters.", "invalid_value")
    if str(body.get("n", 1)) != "1":
        raise Refusal("This server draws one image a call.", "invalid_value")
    if body.get("quality") not in OUTPUT or body.get("output_format", "png") not in (
            "png", "jpeg", "webp"):
        raise Refusal("Invalid value: 'quality' or 'output_format'.", "invalid_value")
    size = re.fullmatch(r"(\d+)x(\d+)", str(body.get("size")))
    width, height = map(int, size.groups()) if size else (1, 1)
    fits = not (width % 16 or height % 16) and 655_360 <= width * height <= 8_294_400
    if not fits or not 1 / 3 <= width / height <= 3:
        raise Refusal(f"Invalid size '{body.get('size')}'.", "invalid_value")
    return width, height


def check_files(files: list[tuple[str, bytes]]) -> None:
    """A Refusal where a file is not what it is said to be, or there are too many."""
    if not 1 <= len(files) <= 16:
        raise Refusal(f"Invalid 'image': 1 to 16 images, got {len(files)}.", "invalid_value")
    for kind, data in files:
        true = next((mime for magic, mime in MAGIC.items() if data.startswith(magic)), "?")
        if true != kind:
            raise Refusal(f"Invalid image file: {kind} holds {true}.", "invalid_image_file")


def counted(prompt: str, size: tuple[int, int], quality: str, files: list) -> dict[str, Any]:
    """The usage of an image, as the server bills it."""
    area = size[0] * size[1] / 2**20
    seen = 0
    for _, data in files:
        width, height = Image.open(io.BytesIO(data)).size
        seen += round(min(max(SEEN[0] * width * height / 2**20, SEEN[0]), SEEN[1]))
    text, output = math.ceil(len(prompt.encode()) / 4), round(OUTPUT[quality] * area)
    details = {"text_tokens": text, "image_tokens": seen}
    return {"input_tokens": text + seen, "input_tokens_details": details, "output_tokens": output,
            "total_tokens": text + seen + output}


def bill(usage: dict[str, Any]) -> float:
    """The USD of a usage."""
    details = usage["input_tokens_details"]
    return (details["text_tokens"] * PRICE["text"] + details["image_tokens"] * PRICE["image"]
            + usage["output_tokens"] * PRICE["output"]) / 1e6


def drawn(seed: str, size: tuple[int, int], form: str) -> bytes:
    """An image that the seed decides."""
    tones = hashlib.sha256(seed.encode()).digest()
    slope = Image.linear_gradient("L").resize(size)
    bands = [slope.point([(i * (40 + tones[k]) // 255 + tones[k + 3]) % 256 for i in range(256)])
             for k in range(3)]
    out = io.BytesIO()
    options = {"compress_level": 1} if form == "png" else {}
    Image.merge("RGB", bands).save(out, form.upper(), **options)
    return out.getvalue()


def answer(path: str, raw: bytes, kind: str, item: dict[str, Any], number: int
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    """The body of an answer, and what the record holds of it; a Refusal where it is refused."""
    edit, files = path.endswith("/edits"), []
    if edit:
        if not kind.startswith("multipart/form-data"):
            raise Refusal("Unsupported content type: edits are multipart/form-data.")
        body, files = parts_of(raw, kind)
    else:
        body = json.loads(raw)
    size = checked(body)
    if edit:
        check_files(files)
    name = item.get("fault")
    if name == "blocked" and item.get("text", "") in body["prompt"]:
        raise Refusal("Your request was rejected by the safety system.", "moderation_blocked")
    usage = counted(body["prompt"], size, body["quality"], files)
    seen = {"usage": usage, "billed": bill(usage), "files": [mime for mime, _ in files],
            "form": {**body}, "size": list(size)}
    given = (size[1], size[0]) if name == "other-size" else size
    coded = base64.b64encode(drawn(f"{body['prompt']}/{number}", given,
                                   body.get("output_format", "png"))).decode()
    image = {"b64_json": coded}
    if name == "no-base64":
        image = {"b64_json": "!" + coded[:100]}
    if name == "address":
        image = {"url": f"data:image/png;base64,{coded}"}
    made = {"created": 0, "data": [] if name == "empty" else [image], "size": body["size"],
            "quality": body["quality"], "usage": usage}
    if name == "no-usage":
        del made["usage"]
    return made, seen
