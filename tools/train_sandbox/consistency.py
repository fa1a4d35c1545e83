"""The head of `consistency`: what the tower's vectors say of a look, whatever the scene; its map.

Three pictures belong together: one, another of the same subject, colour and style in a scene of
its own, and one that shares none of the three. What differs between the first two is not the look,
so the head counts it less (linear discriminant analysis). The map is fitted on others, which are
harder: the third picture differs from the first in one of the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from refimg.adapters.tiles import VIEWS, View
from refimg.engine.protocols import Batch
from refimg.sandbox.painter import paint_picture
from refimg.sandbox.scorers import SandboxClipScore

from .measure import fit_logistic
from .models import seal
from .pictures import SIZE, attributes_by_chance, change_one

FIRST, TRIPLES, HELD_OUT = 70_000_000, 600, 300  # seeds that no other split uses
CARRIED = ("subject", "colour", "style")  # what the painter hands on from a reference
DIMENSIONS, SHRINK = 32, 0.3


def attributes_of(seed: int, near: bool) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """A picture, one of the same look in another scene, and one of another look.

    `near`: one thing is another in the last; else all three are.
    """
    rng = np.random.default_rng(seed)
    first = attributes_by_chance(rng)
    same = attributes_by_chance(rng) | {name: first[name] for name in CARRIED}
    if near:
        return first, same, change_one(same, CARRIED[rng.integers(3)], rng)
    other = attributes_by_chance(rng)
    while any(other[name] == first[name] for name in CARRIED):
        other = attributes_by_chance(rng)
    return first, same, other


def painted(numbers: range, near: bool = False) -> Iterator[tuple[Image.Image, ...]]:
    """The pictures of triples."""
    for seed in (FIRST + 10 * n for n in numbers):
        looks = (seed, seed, seed + 2)
        yield tuple(paint_picture(attributes, seed + k, *SIZE, look=look) for k, (
            attributes, look) in enumerate(zip(attributes_of(seed, near), looks, strict=True)))


def vectors(triples: Iterable[tuple[Image.Image, ...]], view: View = "whole") -> np.ndarray:
    """The tower's vectors of triples, (n, 3, d)."""
    embedder = SandboxClipScore().embedder
    return np.array([embedder.images(Batch(three, ""), view).numpy() for three in triples])


def fit(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, (d,), and the head, (d, k): directions in which looks differ and scenes do not."""
    flat, size = seen.reshape(-1, seen.shape[-1]), seen.shape[-1]
    scene = (seen[:, 0] - seen[:, 1]) / 2**0.5
    within = scene.T @ scene / len(scene)
    within += SHRINK * np.trace(within) / size * np.eye(size)
    root = np.linalg.cholesky(np.linalg.inv(within))
    _, directions = np.linalg.eigh(root.T @ np.cov(flat.T) @ root)
    head = root @ directions[:, ::-1][:, :DIMENSIONS]
    return flat.mean(0).round(4), (head / np.abs(head).max()).round(3)


def cosines(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the first picture with the second, and with the third."""
    unit = seen / np.linalg.norm(seen, axis=-1, keepdims=True)
    return (unit[:, 0] * unit[:, 1]).sum(-1), (unit[:, 0] * unit[:, 2]).sum(-1)


def auc(same: np.ndarray, other: np.ndarray) -> float:
    """How often a pair of the same look has the higher cosine."""
    return round(float((same[:, None] > other).mean()), 3)


def measure(folder: Path) -> dict:
    """Writes the card beside the tower's weights; what was measured, by view."""
    mean, head = fit(vectors(painted(range(TRIPLES))))
    held, cards, found = list(painted(range(TRIPLES, TRIPLES + HELD_OUT), near=True)), {}, {}
    for view in VIEWS:
        seen = vectors(held, view)
        same, other = cosines((seen - mean) @ head)
        cards[view] = fit_logistic(same, other)
        found[view] = {"auc": auc(same, other), "auc_without_head": auc(*cosines(seen))}
    seal(folder / "consistency.json", {
        "calibration": "sandbox-consistency-logistic-1", **cards.pop("whole"), **cards,
        "mean": mean.tolist(), "head": head.tolist()})
    return found
