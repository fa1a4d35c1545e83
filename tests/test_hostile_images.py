"""The zoo: every kind of bytes that a provider, a user or an enemy may send through the door."""

import io
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from refimg.storage.files import decode_image, encode_png
from tests.fakes import picture

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    size: tuple[int, int],
    depth: int,
    colour: int,
    rows: bytes,
    extra: bytes = b"",
    end: bytes = b"",
) -> bytes:
    """A PNG by hand, so that it may say what Pillow would not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + end + chunk(b"IEND", b"")
    return SIGNATURE + header + extra + body


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def shorts(*values: int) -> bytes:
    return b"\0" + struct.pack(f">{len(values)}H", *values)


def values(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(int(v) for v in pixel) for pixel in np.asarray(image).reshape(-1, 3)]


NOISE = Image.effect_noise((256, 256), 80).convert("RGB")


def webp_header(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n"
TEXT_BOMB = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(50_000_000), 9))
MANY_TEXTS = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1_000_000), 9)) * 80
LOUD = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(50_000_000), 9))

REFUSED = {
    "nothing": (b"", "0 bytes are no image"),
    "one byte": (b"\x89", "not a readable PNG, JPEG, WebP, AVIF or GIF"),
    "HTML": (b"<!DOCTYPE html><title>502</title>", "not a readable"),
    "JSON": (b'{"error": "rate limit"}', "not a readable"),
    "SVG": (SVG, "not a readable"),
    "EPS": (EPS, "not a readable"),
    "TIFF": (saved(NOISE, "TIFF"), "not a readable"),
    "BMP": (saved(NOISE, "BMP"), "not a readable"),
    "ICO": (saved(NOISE, "ICO"), "not a readable"),
    "PDF": (saved(NOISE, "PDF"), "first b'%PDF"),
    "zip": (b"PK\x03\x04" + bytes(100), "not a readable"),
    "PNG signature only": (SIGNATURE, "refused|not a readable"),
    "JPEG marker only": (b"\xff\xd8\xff", "refused|not a readable"),
    "WebP header only": (b"RIFF\x04\0\0\0WEBP", "refused|not a readable"),
    "PNG of no width": (png((0, 5), 8, 2, b""), "refused|not a readable"),
    "PNG bomb": (png((40_000, 40_000), 8, 0, b""), "refused"),
    "PNG bomb under Pillow's limit": (png((8000, 8000), 8, 0, b""), "at most 50000000 pixels"),
    "PNG bomb in Pillow's warning zone": (png((10_000, 10_000), 8, 0, b""), "pixels"),
    "PNG of the largest size": (png((2**31 - 1, 2**31 - 1), 8, 0, b""), "refused"),
    "JPEG bomb": (jpeg_claiming(65_000, 65_000), "refused"),
    "JPEG bomb under Pillow's limit": (jpeg_claiming(8000, 8000), "at most 50000000 pixels"),
    "WebP bomb": (webp_header(16_000, 16_000), "refused|not a readable"),
    "a line": (saved(Image.new("L", (20_000, 10)), "PNG"), "16384 a side"),
    "PNG with broken zlib": (
        SIGNATURE
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", b"junk")
        + chunk(b"IEND", b""),
        "refused",
    ),
    "PNG of an unknown type": (png((1, 1), 7, 5, b"\0\0"), "refused|not a readable"),
}


TEXTS = {
    "a text bomb": png((1, 1), 8, 0, b"\0\0", TEXT_BOMB),
    "many texts": png((1, 1), 8, 0, b"\0\0", MANY_TEXTS),
    "a text bomb behind the pixels": png((1, 1), 8, 0, b"\0\0", end=TEXT_BOMB),
    "a loud profile": png((1, 1), 8, 0, b"\0\0", LOUD),
    "a text named transparency": png(
        (1, 1), 8, 2, b"\0\0\0\0", chunk(b"tEXt", b"transparency\0nonsense")),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_a_png_are_passed_over(name):
    image = decode_image(TEXTS[name])
    assert values(image) == [(0, 0, 0)] and image.info == {}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    data, reason = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=reason) as refusal:
            decode_image(data)
    assert type(refusal.value) is ValueError
    assert "0x7" not in str(refusal.value), "an address of an object is no reason"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_every_truncation_is_refused(form, share):
    whole = saved(NOISE, form)
    with pytest.raises(ValueError, match=r"refused|not a readable"):
        decode_image(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("data", [None, "", "text", 7, [1], {"b64": ""}], ids=repr)
def test_what_is_not_bytes_is_refused_as_a_value(data):
    with pytest.raises(ValueError):
        decode_image(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_flipped_bytes_never_escape_as_another_exception(form):
    whole, random = saved(NOISE.resize((40, 40)), form), np.random.default_rng(7)
    for _ in range(150):
        data = bytearray(whole)
        for at in random.integers(0, len(data), size=4):
            data[at] = random.integers(0, 256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ValueError as refusal:
            assert str(refusal)


def test_pillows_warning_is_an_error_here_even_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="refused"):
            decode_image(png((10_000, 10_000), 8, 0, b""))


def test_max_pixels_is_the_callers():
    data = saved(NOISE, "PNG")
    assert decode_image(data, max_pixels=256 * 256).size == (256, 256)
    with pytest.raises(ValueError, match="got 256x256"):
        decode_image(data, max_pixels=256 * 256 - 1)


def test_no_global_state_is_touched():
    before = (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PngImagePlugin.MAX_TEXT_CHUNK,
        warnings.filters[:],
    )
    for data, _ in list(REFUSED.values())[:12]:
        with pytest.raises(ValueError):
            decode_image(data)
    decode_image(picture())
    assert before == (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PngImagePlugin.MAX_TEXT_CHUNK,
        warnings.filters[:],
    )


def test_threads_do_not_disturb_each_other():
    good = [(saved(NOISE.resize((n, n)), form), n) for n in (20, 30) for form in ("PNG", "WEBP")]

    def work(k: int) -> bool:
        if k % 3 == 0:
            with pytest.raises(ValueError):
                decode_image(saved(NOISE, "PNG")[:5000])
            return True
        data, side = good[k % 4]
        return decode_image(data).size == (side, side)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(120)))


# What is let in


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_one_pixel_is_an_image(form):
    assert decode_image(saved(Image.new("RGB", (1, 1), "white"), form)).size == (1, 1)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("tail", ["html", "zip", "image"])
def test_nothing_of_a_polyglot_survives(form, tail):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("payload.py", "print('ALIVE')")
    tails = {
        "html": b"<script>ALIVE</script>",
        "zip": archive.getvalue(),
        "image": saved(Image.new("RGB", (5, 5), "red"), "PNG"),
    }
    image = decode_image(saved(NOISE, form) + tails[tail])
    again = encode_png(image, {"prompt": "p"})
    assert image.size == (256, 256)
    assert again.endswith(b"IEND\xaeB`\x82")
    assert again.count(b"IHDR") == 1
    for trace in (b"ALIVE", b"payload", b"PK\x03\x04"):
        assert trace not in again


def test_nothing_hidden_in_metadata_survives():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "ALIVE")
    notes.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta>ALIVE</x:xmpmeta>")
    notes.add(b"prVt", b"ALIVE")
    exif = Image.Exif()
    exif[0x010E] = "ALIVE"
    for data in (
        saved(NOISE, "PNG", pnginfo=notes, exif=exif, icc_profile=b"ALIVE" * 40),
        saved(NOISE, "JPEG", exif=exif, comment=b"ALIVE"),
        saved(NOISE, "WEBP", exif=exif, xmp=b"ALIVE", icc_profile=b"ALIVE" * 40),
    ):
        assert b"ALIVE" in data
        image = decode_image(data)
        assert image.info == {}
        assert type(image) is Image.Image
        assert b"ALIVE" not in encode_png(image, {})


def frames(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (16, 9), colour) for colour in colours]


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(form):
    first, *rest = frames("#ff0000", "#00ff00", "#0000ff")
    lossless = {"lossless": True} if form == "WEBP" else {}
    data = saved(first, form, save_all=True, append_images=rest, duration=50, **lossless)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    image = decode_image(data)
    assert set(values(image)) == {(255, 0, 0)}
    assert not getattr(image, "is_animated", False)


def quadrants() -> Image.Image:
    image = Image.new("RGB", (64, 32))
    places = {"red": (0, 0), "lime": (32, 0), "blue": (0, 16), "white": (32, 16)}
    for colour, (x, y) in places.items():
        image.paste(colour, (x, y, x + 32, y + 16))
    return image


CORNERS = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}
LETTERS = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_every_orientation_is_turned_upright_once(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(saved(quadrants(), form, exif=exif, quality=95))
    w, h = image.size
    assert (w, h) == ((64, 32) if orientation < 5 else (32, 64))
    at = [(w // 4, h // 4), (3 * w // 4, h // 4), (w // 4, 3 * h // 4), (3 * w // 4, 3 * h // 4)]
    seen = "".join(LETTERS[tuple(round(v / 255) for v in image.getpixel(xy))] for xy in at)
    assert seen == CORNERS[orientation]
    assert decode_image(encode_png(image, {})).tobytes() == image.tobytes()


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"MM\0*"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_orientation_costs_no_picture(exif):
    data = saved(quadrants(), "PNG")
    at = data.index(b"IDAT") - 4
    assert decode_image(data[:at] + chunk(b"eXIf", exif) + data[at:]).size == (64, 32)


def test_sixteen_bit_grey_is_scaled_and_never_clipped():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    grey = decode_image(saved(Image.fromarray(ramp), "PNG"))
    assert [v[0] for v in values(grey)] == list(range(256))
    assert set(values(decode_image(png((1, 1), 16, 0, shorts(300))))) == {(1, 1, 1)}


def test_sixteen_bits_in_the_other_colour_types():
    assert values(decode_image(png((2, 1), 16, 2, shorts(65535, 32768, 0, 257, 511, 0)))) == [
        (255, 128, 0),
        (1, 1, 0),
    ]
    assert values(decode_image(png((2, 1), 16, 4, shorts(0, 65535, 0, 0)))) == [
        (0, 0, 0),
        (255, 255, 255),
    ]
    assert values(decode_image(png((1, 1), 16, 6, shorts(65535, 0, 0, 65535)))) == [(255, 0, 0)]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_few_bits_of_grey_span_black_to_white(depth):
    row = b"\0" + bytes([(2**depth - 1) << (8 - depth)]) + bytes(depth // 8)
    assert values(decode_image(png((2, 1), depth, 0, row))) == [(255, 255, 255), (0, 0, 0)]


def test_transparency_of_every_kind_lies_over_white():
    white = (255, 255, 255)
    key = chunk(b"tRNS", struct.pack(">HHH", 5, 5, 5))
    palette = chunk(b"PLTE", b"\xff\0\0\0\0\xff") + chunk(b"tRNS", b"\x00")
    assert values(decode_image(png((2, 1), 8, 2, b"\0\5\5\5\6\6\6", key))) == [white, (6, 6, 6)]
    assert values(decode_image(png((2, 1), 8, 3, b"\0\0\1", palette))) == [white, (0, 0, 255)]
    grey = chunk(b"tRNS", b"\0\5")
    assert values(decode_image(png((2, 1), 8, 0, b"\0\5\6", grey))) == [white, (6, 6, 6)]
    assert values(decode_image(png((2, 1), 8, 4, b"\0\0\x80\0\xff")))[0] == (127, 127, 127)
    for form in ("PNG", "WEBP"):
        hidden = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
        exact = {"lossless": True, "exact": True} if form == "WEBP" else {}
        assert set(values(decode_image(saved(hidden, form, **exact)))) == {white}


def test_a_palette_keeps_its_colours():
    image = quadrants().quantize(8)
    assert decode_image(saved(image, "PNG")).tobytes() == image.convert("RGB").tobytes()


def test_cmyk_jpegs_come_out_in_their_colours():
    ink = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    (pixel,) = {values(decode_image(saved(ink, "JPEG", quality=100)))[500]}
    assert pixel[0] > 240
    assert max(pixel[1:]) < 15


def test_adobes_inverted_cmyk_is_inverted_back():
    ink = saved(Image.new("CMYK", (16, 16), (255, 255, 255, 0)), "JPEG", quality=100)
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 0)
    marked = ink if b"Adobe" in ink else ink[:2] + adobe + ink[2:]
    assert max(values(decode_image(marked))[0]) < 15


def test_grey_and_progressive_jpegs():
    grey = decode_image(saved(Image.new("L", (16, 16), 77), "JPEG"))
    assert set(values(grey)) == {(77, 77, 77)}
    assert decode_image(saved(NOISE, "JPEG", progressive=True)).size == (256, 256)


# The one note that is let through


def truthful(text: str, kind: str = "iTXt", key: str = "refimg-truth") -> bytes:
    notes = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        notes.add_itxt(key, text)
    else:
        notes.add_text(key, text, zip=kind == "zTXt")
    return saved(Image.new("RGB", (2, 2)), "PNG", pnginfo=notes)


@pytest.mark.parametrize("kind", ["tEXt", "iTXt", "zTXt"])
def test_the_truth_is_kept_as_plain_text(kind):
    info = decode_image(truthful('{"painter": 1}', kind)).info
    assert info == {"refimg-truth": '{"painter": 1}'}
    assert type(info["refimg-truth"]) is str


def test_the_truth_is_measured_in_bytes_of_utf8():
    assert decode_image(truthful("é" * 2048)).info == {"refimg-truth": "é" * 2048}
    assert decode_image(truthful("é" * 2049)).info == {}
    assert decode_image(truthful("x" * 4097)).info == {}
    assert decode_image(truthful("x", key="refimg-truth2")).info == {}


def test_the_truth_is_found_behind_the_pixels_too():
    late = chunk(b"tEXt", b"refimg-truth\0late")
    assert decode_image(png((1, 1), 8, 0, b"\0\0", end=late)).info == {"refimg-truth": "late"}
