"""Constants of the scales for views that the models did not learn from: tiles and the middle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from refimg.engine.protocols import Batch
from refimg.sandbox.painter import paint_picture
from refimg.sandbox.scorers import SandboxClipScore, SandboxPickScore

from . import measure
from .captions import caption
from .pictures import make_specs

VIEWS = ("tiles", "center")
PAIRS, SIZE = 400, (384, 216)  # held out; pixels, at 16:9


def raws(scorer, images: list, texts: list[str]) -> np.ndarray:
    """The raw scores of each image on its own text."""
    return np.array([scorer.score(Batch((image,), text))[0].value
                     for image, text in zip(images, texts, strict=True)])


def held_out(pairs: int) -> tuple[list, list[str]]:
    """Images, partners next to each other, and for each a text that states what tells them."""
    specs = make_specs("held-out", pairs)
    texts = [caption(np.random.default_rng(i), spec.attributes, spec.changed)
             or spec.attributes["subject"] for i, spec in enumerate(specs)]
    return [paint_picture(spec.attributes, spec.seed, *SIZE) for spec in specs], texts


def constants(folder: Path, view: str, images: list, texts: list[str]) -> dict[str, dict]:
    """By card, the constants of that view: from images, their partners and unrelated ones."""
    n = np.arange(len(images))
    order = {"right": n, "wrong": n ^ 1, "other": (n + 2 * (len(n) // 6)) % len(n)}

    def by_kind(scorer, *kinds: str) -> list[np.ndarray]:
        return [raws(scorer, [images[i] for i in order[kind]], texts) for kind in kinds]

    clip = SandboxClipScore(folder / "sandbox-clip", view=view)
    pick = SandboxPickScore(folder / "sandbox-pickscore", view=view)
    return {
        "sandbox-clip/refimg.json": measure.band(np.concatenate(by_kind(clip, "right", "other"))),
        "sandbox-pickscore/refimg.json": measure.fit_logistic(*by_kind(pick, "right", "wrong")),
    }


def write(folder: Path, pairs: int = PAIRS) -> dict:
    """Adds the constants to the cards of a folder of weights; what was measured, by view."""
    held = held_out(pairs)
    found = {view: constants(folder, view, *held) for view in VIEWS}
    for view, cards in found.items():
        for name, own in cards.items():
            card = json.loads((folder / name).read_text("utf-8"))
            text = json.dumps(card | {view: own}, indent=1)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    return found
