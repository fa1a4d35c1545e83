"""Pictures to learn from: attributes by chance, partners with one thing changed, small renderings.

A split is a range of seeds that no other split uses. Pictures 2i and 2i + 1 are partners: they
differ in exactly one attribute. One half of the partners also share the composition's seed.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from refimg.sandbox.painter import PAINTER_VERSION, paint_picture
from refimg.sandbox.world import VOCABULARY

ATTRIBUTES = tuple(VOCABULARY)
VALUES = {name: tuple(values) for name, values in VOCABULARY.items()}
SIZE = (176, 99)  # pixels; the composition is the same at every size
INPUT = 96  # pixels, what the models see: the whole frame, squashed to a square
FIRST = {"clip": 10_000_000, "pickscore": 20_000_000, "held-out": 30_000_000}
OFTEN = {"count": (0.64, 0.2, 0.16), "framing": (0.34, 0.38, 0.28)}
CHANGED = {"colour": 1.6, "count": 1.4, "relation": 2.0, "companion": 1.2, "subject": 1.3}
COMPANY = 0.5  # of the pictures; the painter alone adds one to a third


@dataclass(frozen=True)
class Spec:
    """What a picture shows and the seed of its composition."""

    attributes: dict[str, str]
    seed: int
    changed: str  # the attribute in which it differs from its partner


def attributes_by_chance(rng: np.random.Generator) -> dict[str, str]:
    """One value for each attribute; a companion in half of the pictures."""
    chosen = {}
    for name in ATTRIBUTES[:-2]:
        chosen[name] = VALUES[name][rng.choice(len(VALUES[name]), p=OFTEN.get(name))]
    if rng.random() < COMPANY:
        others = [v for v in VALUES["companion"] if v != chosen["subject"]]
        chosen["companion"] = others[rng.integers(len(others))]
        chosen["relation"] = VALUES["relation"][rng.integers(len(VALUES["relation"]))]
    return chosen


def change_one(attributes: dict[str, str], name: str, rng: np.random.Generator) -> dict[str, str]:
    """The same with another value of one attribute."""
    taken = {attributes[name], attributes.get({"companion": "subject", "subject": "companion"}
                                              .get(name, ""))}
    left = [v for v in VALUES[name] if v not in taken]
    return attributes | {name: left[rng.integers(len(left))]}


def make_pair(seed: int, name: str | None = None, alike: bool | None = None) -> tuple[Spec, Spec]:
    """Two partners; `name`: the attribute that differs, `alike`: whether they share the seed."""
    rng = np.random.default_rng(seed)
    first = attributes_by_chance(rng)
    while name in ("companion", "relation") and "companion" not in first:
        first = attributes_by_chance(rng)
    share = np.array([CHANGED.get(n, 1.0) for n in first])
    drawn = str(rng.choice(list(first), p=share / share.sum()))
    name = name or drawn
    same = bool(rng.random() < 0.5) if alike is None else alike
    second = change_one(first, name, rng)
    return Spec(first, seed, name), Spec(second, seed if same else seed + 5_000_000, name)


def make_specs(split: str, pairs: int) -> list[Spec]:
    """The pictures of a split, partners next to each other."""
    return [spec for i in range(pairs) for spec in make_pair(FIRST[split] + i)]


def squash(image: Image.Image) -> np.ndarray:
    """The pixels as the models' own preprocessing makes them, uint8."""
    return np.asarray(image.resize((INPUT, INPUT), Image.Resampling.BICUBIC))


def _render_part(split: str, pairs: int, part: int, parts: int, path: str) -> None:
    """One process's share of a split, written into the file all share."""
    shape = (2 * pairs, INPUT, INPUT, 3)
    pixels = np.memmap(path, np.uint8, "r+", shape=shape)
    for i, spec in enumerate(make_specs(split, pairs)):
        if i % parts == part:
            pixels[i] = squash(paint_picture(spec.attributes, spec.seed, *SIZE))
    pixels.flush()


def render(split: str, pairs: int, folder: Path, processes: int = 2) -> np.ndarray:
    """The pixels of a split, (2 * pairs, 96, 96, 3) uint8, in a file that is painted once."""
    path = folder / f"{split}-{pairs}-painter{PAINTER_VERSION}.u8"
    if not path.exists():
        _render_all(split, pairs, path, processes)
    return np.memmap(path, np.uint8, "r", shape=(2 * pairs, INPUT, INPUT, 3))


def _render_all(split: str, pairs: int, path: Path, processes: int) -> None:
    """Paints a split with some processes of one thread each."""
    part = path.with_suffix(".part")
    np.memmap(part, np.uint8, "w+", shape=(2 * pairs, INPUT, INPUT, 3)).flush()
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_render_part, split, pairs, k, processes, str(part))
                for k in range(processes)]
        for job in jobs:
            job.result()
    del os.environ["OPENBLAS_NUM_THREADS"], os.environ["OMP_NUM_THREADS"]
    part.rename(path)


def codes(specs: list[Spec]) -> np.ndarray:
    """Each picture's values as numbers, (n, attributes); -1 where there is none."""
    index = {name: {v: i for i, v in enumerate(VALUES[name])} for name in ATTRIBUTES}
    rows = [[index[a].get(s.attributes.get(a), -1) for a in ATTRIBUTES] for s in specs]
    return np.array(rows, np.int64)
