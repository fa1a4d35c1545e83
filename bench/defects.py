"""How often does refimg.engine.defects err? Sound images flagged, and made-up defects found.

Sound: painted stories of three images (an image, another one of the same prompt that follows it,
and the next scene that follows it), and squares and strips of the photographs that installed
packages ship. A sound image is flagged if anything is said of it; the two that follow are compared
with the image they follow. Defective: each of them darkened, with bars of several widths, as
panels, and as copies: cut by 2, 4 or 8 %, with noise, as JPEG. Bar: at most 1 in 200 sound images
flagged. `--stories N` paints N stories (100).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import numpy as np
from PIL import Image, ImageOps

from refimg.engine.defects import find_defects
from refimg.engine.protocols import ImageRequest
from refimg.sandbox.painter import answer
from refimg.sandbox.world import VOCABULARY
from refimg.storage.images import read_image

PHOTOGRAPHS = {  # of packages that may be installed
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "skimage": [f"data/{n}" for n in (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")],
    "sklearn": [f"datasets/images/{n}" for n in ("china.jpg", "flower.jpg")],
    "gradio": [f"media_assets/images/{n}" for n in (
        "cheetah.jpg", "cheetah1.jpg", "groot.jpeg", "lion.jpg", "tower.jpg")],
    "ultralytics": ["assets/bus.jpg", "assets/zidane.jpg"],
    "imgaug": ["quokka.jpg"],
    "insightface": ["data/images/t1.jpg"],
    "mahotas": ["demos/data/luispedro.jpg"],
}
SIZE = (448, 252)
SAID = ("subject", "colour", "style", "setting", "framing", "time", "weather")


def paint(story: int, folder: Path) -> list[Image.Image]:
    """An image, another one of the same prompt that follows it, and a next scene that does."""
    rng, paths = Random(story), []

    def value(attribute: str) -> str:
        return rng.choice(VOCABULARY[attribute][rng.choice([*VOCABULARY[attribute]])])

    said = {attribute: value(attribute) for attribute in SAID}
    later = said | {attribute: value(attribute) for attribute in ("framing", "weather")}
    for number, words in enumerate((said, said, later)):
        request = ImageRequest(prompt=", ".join(words.values()), seed=10 * story + number,
                               aspect_ratio="16:9", references=tuple(paths[:1]))
        paths.append(folder / f"{story}_{number}.png")
        paths[-1].write_bytes(answer(request, width=SIZE[0]).data)
    return [read_image(path) for path in paths]


def photographs() -> dict[str, Image.Image]:
    """The photographs that are there, by file."""
    found = {}
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        root = Path(spec.origin).parent if spec and spec.origin else Path("none")
        found |= {name: read_image(root / name) for name in names if (root / name).is_file()}
    return found


def cuttings(image: Image.Image) -> Iterable[Image.Image]:
    """The whole, and overlapping parts of it."""
    yield image
    for share in (0.75, 0.5):
        wide, high = (round(share * side) for side in image.size)
        for x in (0, (image.width - wide) // 2, image.width - wide):
            for y in (0, (image.height - high) // 2, image.height - high):
                yield image.crop((x, y, x + wide, y + high))


def barred(image: Image.Image, rng: Random) -> Image.Image:
    """The image with bars along two edges, 4 to 15 % each."""
    colour, level = rng.choice(["black", "black", "white", "#123"]), rng.random() < 0.5
    share = rng.choice([0.04, 0.06, 0.1, 0.15])
    wide, high = image.size
    bars = (0, round(share * high)) if level else (round(share * wide), 0)
    inner = ImageOps.fit(image, (wide - 2 * bars[0], high - 2 * bars[1]))
    return ImageOps.expand(inner, bars, colour)


def panelled(images: list[Image.Image], rng: Random) -> Image.Image:
    """Several images in one, with or without lines between them."""
    columns, rows = rng.choice([(2, 1), (3, 1), (2, 2), (3, 2), (1, 2)])
    gap, page = rng.choice([0, 0, 4, 8]), Image.new("RGB", SIZE, rng.choice(["black", "white"]))
    for column in range(columns):
        for row in range(rows):
            x, y = column * SIZE[0] // columns, row * SIZE[1] // rows
            size = SIZE[0] // columns - gap, SIZE[1] // rows - gap
            page.paste(ImageOps.fit(rng.choice(images), size), (x + gap // 2, y + gap // 2))
    return page


def copied(image: Image.Image, rng: Random) -> Image.Image:
    """The image, cut a little, or with noise, or neither."""
    kind, (wide, high) = rng.choice(["cut", "noise", "plain"]), image.size
    if kind == "cut":
        share = rng.choice([0.02, 0.04, 0.08])
        x, y = (rng.random() * share * side for side in image.size)
        box = (x, y, x + (1 - share) * wide, y + (1 - share) * high)
        return image.resize(image.size, Image.Resampling.BICUBIC, box)
    if kind == "noise":
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 8, (high, wide, 3))
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image as it comes out of a JPEG."""
    page = BytesIO()
    image.save(page, "JPEG", quality=quality)
    return Image.open(page).convert("RGB")


def found(
    images: list[Image.Image], make: Callable[[Image.Image], Image.Image], word: str, rng: Random
) -> float:
    """The share of made-up defects that are named."""
    named = []
    for image in images:
        made = as_jpeg(make(image), rng.choice([70, 85, 95]))
        references = [image] if word == "near copy" else []
        named.append(any(word in text for text in find_defects(made, references)))
    return sum(named) / len(named)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--stories", type=int, default=100)
    stories, rng = asked.parse_args().stories, Random(1)
    with TemporaryDirectory() as folder:
        painted = [paint(story, Path(folder)) for story in range(stories)]
    photos = photographs()
    cut = [part for photo in photos.values() for part in cuttings(photo)]
    print(f"{3 * stories} painted images; {len(cut)} parts of {len(photos)} photographs: "
          f"{', '.join(photos) or 'none'}")
    flagged = {"painted": [find_defects(image) for first, *_ in painted for image in (first,)],
               "same prompt": [find_defects(second, [first]) for first, second, _ in painted],
               "next scene": [find_defects(third, [first]) for first, _, third in painted],
               "photographs": [find_defects(part) for part in cut]}
    for name, said in flagged.items():
        print(f"{name:12} {sum(map(bool, said)):4} of {len(said)} flagged "
              f"{[text for texts in said for text in texts][:4]}")
    firsts = [first for first, *_ in painted] + cut
    makers = {
        "nearly black": lambda image: image.point(lambda value: value * 0.06),
        "bars": lambda image: barred(image, rng),
        "panels": lambda image: panelled(firsts, rng),
        "near copy": lambda image: copied(image, rng),
    }
    shares = {word: found(firsts, make, word, rng) for word, make in makers.items()}
    for word, share in shares.items():
        print(f"{word:12} {share:.3f} of {len(firsts)} found")
    big, other = (ImageOps.fit(image, (1344, 768)) for image in firsts[:2])
    started = time.perf_counter()
    for _ in range(20):
        find_defects(big, [other])
    ms = 50 * (time.perf_counter() - started)
    print(f"{ms:.1f} ms an image of 1344 x 768 with one reference")
    wrong, sound = (sum(map(f, flagged.values())) for f in (lambda s: sum(map(bool, s)), len))
    print(json.dumps({"sound": sound, "flagged": wrong / sound, "ms": round(ms, 2),
                      "photographs": len(photos)} | {f"found_{word.replace(' ', '_')}": share
                                                     for word, share in shares.items()}))


if __name__ == "__main__":
    main()
