"""The band of `consistency`: pairs of pictures that share nothing, and pairs that share a look."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refimg.engine.protocols import Batch
from refimg.sandbox.painter import paint_picture
from refimg.sandbox.scorers import SandboxClipScore

from .models import seal
from .pictures import SIZE, attributes_by_chance

FIRST, TRIPLES = 70_000_000, 600  # seeds that no other split uses
CARRIED = ("subject", "colour", "style")  # what the painter hands on from a reference


def attributes_of(seed: int) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """A picture, one of the same look in a scene of its own, one that shares nothing of the look."""
    rng = np.random.default_rng(seed)
    first = attributes_by_chance(rng)
    same = attributes_by_chance(rng) | {name: first[name] for name in CARRIED}
    other = attributes_by_chance(rng)
    while any(other[name] == first[name] for name in CARRIED):
        other = attributes_by_chance(rng)
    return first, same, other


def cosines(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The cosines of `count` pairs of the same look (row 0) and of pairs that share nothing."""
    embedder, found = SandboxClipScore().embedder, []
    for seed in range(FIRST, FIRST + 10 * count, 10):
        first, same, other = attributes_of(seed)
        painted = (paint_picture(first, seed, *size, look=seed),
                   paint_picture(same, seed + 1, *size, look=seed),
                   paint_picture(other, seed + 2, *size))
        vectors = embedder.images(Batch(painted, "")).numpy()
        found.append(vectors[1:] @ vectors[0])
    return np.array(found).T


def measure(folder: Path, count: int = TRIPLES) -> dict:
    """Writes the card beside the tower's weights; what was measured."""
    same, other = cosines(count)
    low, high = np.quantile(other, 0.01), np.quantile(same, 0.99)
    seal(folder / "consistency.json", {
        "calibration": "sandbox-clip-image-band-1",
        "low": round(float(low), 4), "high": round(float(high), 4)})
    return {"same": np.quantile(same, [0.05, 0.5, 0.95]).round(3).tolist(),
            "other": np.quantile(other, [0.05, 0.5, 0.95]).round(3).tolist(),
            "auc": round(float((same[:, None] > other).mean()), 3)}
