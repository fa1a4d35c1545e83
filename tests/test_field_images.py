"""What image models take and give, as people met it: each test is named after a kind of fault."""

from __future__ import annotations

import base64
import io
import logging
import struct
import zlib
from urllib.parse import quote

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from refimg import Pipeline, Scene, Story
from refimg.adapters import predictions, replicate, retry
from refimg.adapters.download import NoImage, fetch
from refimg.adapters.inputs import Capabilities, read_schema
from refimg.adapters.replicate import ReplicateImages
from refimg.adapters.retry import ProviderError
from refimg.generate import GenerationFailed, ImageRequest, generate_images
from refimg.storage.images import decode_image, is_blank, read_image, small_jpeg
from tests.fakes import FakeImages, FakeScorer, critic, director, picture
from tests.servers.images import IMAGES, PROMPT, URI, schema, start_image_server

TOKEN = "r8_" + "test0123456789abcdefghijklmnopqrstuv"
FLUX = "black-forest-labs/flux-2-pro"
NOISE = Image.effect_noise((96, 54), 60).convert("RGB")


@pytest.fixture(scope="module")
def shared():
    with start_image_server(seconds=0.02) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.script()
    return shared


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "_BACKOFF", (0.02, 0.05))
    monkeypatch.setattr(replicate, "_FETCH", (0.02, 0.05))
    monkeypatch.setattr(predictions, "_POLL", (0.03, 0.3))


def images(server, model: str = FLUX, **more) -> ReplicateImages:
    return ReplicateImages(model, base_url=server.base_url, api_token=TOKEN, **more)


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def story(*prompts: str, **more) -> Story:
    return Story(scenes=[Scene(prompt=p) for p in prompts or ("a keeper", "her lamp")], **more)


def pipeline(model, **more) -> Pipeline:
    settings = {"num_variations": 2, "max_enhancement_iterations": 1, "seed": 7} | more
    return Pipeline(director(), critic(90), model, [FakeScorer()], **settings)


async def refused_unpaid(run: Pipeline, told: str, output_dir, **more) -> None:
    """The run is a ValueError with that text, and neither an agent nor an image was asked for."""
    with pytest.raises(ValueError, match=told):
        await run.run(more.pop("story", story()), output_dir=output_dir, **more)
    assert run.director.calls == run.critic.calls == [] and not output_dir.exists()


# --- what a prediction gives --------------------------------------------------------------------


@pytest.mark.parametrize("output", [
    [None, "{url}"], ["a caption of it", "{url}"], [[None], ["{url}"]],
    {"image": "{url}"}, {"images": ["{url}"]}, {"seed": 7, "files": [{"url": "{url}"}]},
    {"mask": "{url}?mask", "image": "{url}"}, ["https://replicate.delivery/a/log.txt", "{url}"],
])  # fmt: skip
async def test_the_image_is_found_wherever_it_stands_in_an_output(server, output):
    server.script([{"output": output}])
    made = await images(server).generate(ImageRequest(prompt="a keeper"))
    assert decode_image(made.data).size == (96, 54)
    (asked,) = server.requests("output")
    assert asked["path"].endswith(".png") and len(server.requests("create")) == 1


@pytest.mark.parametrize("output", [{"score": 0.7}, 5, [0.1, 0.2], {"caption": "a keeper"}, "yes"])
async def test_an_output_that_can_hold_no_image_is_not_paid_for_again(server, tmp_path, output):
    server.script([{"output": output}] * 9)
    before, model = len(server.predictions()), images(server)
    with pytest.raises(GenerationFailed, match="no image"):
        await pipeline(model).run(story("a keeper"), output_dir=tmp_path / "o")
    assert len(server.predictions()) - before == 2  # the first variations, 5 in all before
    with pytest.raises(ProviderError) as caught:
        await model.generate(ImageRequest(prompt="a keeper"))
    assert caught.value.failure.kind == "never" and not caught.value.paid


SVG = b'<?xml version="1.0"?>\n<!-- a tool -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'
NEVER = {
    "an ending": {"output": "https://x.replicate.delivery/a/out.svg?x=1"},
    "SVG in the address": {"output": "data:image/svg+xml;base64,PHN2Zy8+"},
    "a document in the address": {"output": "data:application/pdf;base64,JVBERi0xLjcK"},
    "a host": {"output": "https://example.com/a.png"},
    "a port": {"output": ["https://x.replicate.delivery:8443/a.png", "ftp://x/a.png"]},
    "a redirect": {"fault": "redirect", "url": "https://example.com/a.png"},
    "SVG": {"body": base64.b64encode(SVG).decode()},
    "PDF": {"body": base64.b64encode(b"%PDF-1.7").decode()},
    "TIFF": {"body": base64.b64encode(saved(NOISE, "TIFF")).decode()},
    "video": {"body": base64.b64encode(b"\0\0\0 ftypisom" + bytes(40)).decode()},
}  # fmt: skip


@pytest.mark.parametrize("kind", NEVER)
async def test_an_output_whose_kind_is_never_fetched_is_not_paid_for_again(server, tmp_path, kind):
    server.script([NEVER[kind]] * 9)
    before, model = len(server.predictions()), images(server)
    with pytest.raises(GenerationFailed, match=r"no image|must be"):
        await pipeline(model).run(story("a keeper"), output_dir=tmp_path / "o")
    assert len(server.predictions()) - before == 2  # the first variations, 5 in all before
    with pytest.raises(ValueError, match="model must be one that gives images"):
        await pipeline(model).run(story("a keeper"), output_dir=tmp_path / "p")
    assert len(server.predictions()) - before == 2


@pytest.mark.parametrize("fault", [
    {"fault": "html"}, {"fault": "empty"}, {"fault": "gone"}, {"body": "bm9uc2Vuc2U="},
    {"output": ["https://example.com/a.png", "{url}"], "fault": "html"},
    {"output": ["{url}", "https://example.com/a.png"], "fault": "gone"},
])  # fmt: skip
async def test_a_fault_that_may_pass_does_not_condemn_the_model(server, fault):
    server.script([fault])
    model, wish = images(server), ImageRequest(prompt="a keeper")
    with pytest.raises(ProviderError) as caught:
        await model.generate(wish)
    assert caught.value.paid and model.server.imageless == ""
    assert (await model.generate(wish)).data.startswith(b"\x89PNG")


async def test_an_address_that_may_not_be_asked_hides_no_other(server):
    server.script([{"output": ["https://example.com/a.png", "{url}"]}] * 2 + [NEVER["a host"]])
    model, wish = images(server), ImageRequest(prompt="a keeper")
    assert (await model.generate(wish)).data.startswith(b"\x89PNG")
    assert model.server.imageless is None and len(server.requests("create")) == 1
    await model.generate(wish)
    with pytest.raises(ProviderError, match="url must be"):
        await model.generate(wish)
    assert model.server.imageless is None, "a model that gave an image gives images"


async def test_a_model_whose_output_is_no_image_is_refused_at_the_start(server, tmp_path):
    text = {"type": "array", "items": {"type": "string"}, "x-cog-array-display": "concatenate"}
    numbers = {"type": "array", "items": {"type": "number"}}
    for number, output in enumerate([text, numbers, {"type": "integer"}]):
        name = f"lab/none{number}"
        server.models({name: schema({"prompt": PROMPT, "image": URI}, Output=output)})
        run = pipeline(images(server, name))
        await refused_unpaid(run, "must be one that gives images", tmp_path / "o")


@pytest.mark.parametrize("output", [
    {"type": "string", "format": "uri"}, {"type": "array", "items": URI}, {"title": "Output"},
    {"type": "object", "properties": {"image": URI}}, {"anyOf": [{"type": "integer"}, URI]},
    {"$ref": "#/components/schemas/Made"}, {"type": "string"},
])  # fmt: skip
def test_an_output_that_may_hold_an_image_is_not_refused(output):
    made = {"type": "object", "properties": {"files": {"type": "array", "items": URI}}}
    assert read_schema(schema({"prompt": PROMPT}, Output=output, Made=made)).gives_images


# --- refused content ----------------------------------------------------------------------------


@pytest.mark.parametrize("output", [[], None, [None, None], {"images": []}, "NSFW content"])
async def test_an_empty_output_gets_one_more_prediction_with_a_new_seed(server, output):
    server.script([{"output": output}])
    made = await images(server).generate(ImageRequest(prompt="a keeper", seed=7))
    seeds = [r["json"]["input"]["seed"] for r in server.requests("create")]
    assert len(seeds) == 2 and seeds[0] == 7 and seeds[1] == made.seed != 7


BLACK = {form: saved(Image.new("RGB", (96, 54)), form) for form in ("PNG", "JPEG", "WEBP")}


@pytest.mark.parametrize("form", BLACK)
async def test_a_black_image_is_a_failed_variation_and_never_a_reference(server, tmp_path, form):
    black = {"body": base64.b64encode(BLACK[form]).decode()}
    server.script([black, black])
    result = await pipeline(images(server)).run(story("a keeper"), output_dir=tmp_path)
    seeds = [r["json"]["input"]["seed"] for r in server.requests("create")]
    assert len(seeds) == len(set(seeds)) == 4
    assert not is_blank(read_image(result.references[0]))
    assert "blank" in str(result.scenes[0].warnings)


async def test_one_black_image_of_several_is_warned_of_and_loses(tmp_path):
    model = FakeImages(lambda request, n: BLACK["PNG"] if n == 1 else picture(10 * n))
    result = await pipeline(model).run(story("a keeper"), output_dir=tmp_path)
    assert len(model.requests) == 2 and "blank" in str(result.scenes[0].warnings)
    (kept,) = result.scenes[0].variations
    assert kept.selected
    (alone,) = await generate_images("a keeper", 2, output_dir=tmp_path, stem="x", model=FakeImages(
        lambda request, n: BLACK["PNG"] if n == 1 else picture(10)))
    assert not is_blank(read_image(alone.image_path))


def test_a_dark_night_is_not_blank():
    night = Image.new("RGB", (640, 360), (2, 2, 5))
    night.paste((9, 9, 14), (100, 200, 300, 360))  # a house that can just be made out
    for form in ("PNG", "JPEG", "WEBP"):
        assert not is_blank(decode_image(saved(night, form)))
    stars = Image.new("RGB", (640, 360))
    stars.putpixel((320, 50), (250, 250, 240))
    assert not is_blank(stars)
    assert all(is_blank(Image.new("RGB", (640, 360), c)) for c in ("black", "white", "#808080"))
    assert not is_blank(Image.new("RGB", (640, 360), "gold"))


# --- formats, colour and size of what comes in --------------------------------------------------


@pytest.mark.parametrize("head", [
    "data:image/png,", "data:image/png;base64,", "data:image/png;name=a.png;BASE64,",
    "data:;base64,", "DATA:image/png;base64,",
])  # fmt: skip
async def test_a_data_uri_may_be_coded_either_way(head):
    data = saved(NOISE, "PNG")
    text = base64.b64encode(data).decode()
    bodies = [text, quote(text, safe=""), text.rstrip("=")] if "base64" in head.lower() else [
        quote(data)]
    for body in bodies:
        assert await fetch(head + body) == data


async def test_a_data_uri_has_its_limit_either_way():
    for url in ("data:image/png," + "%89" * 1001, "data:image/png;base64," + "iVBO" * 400):
        with pytest.raises(ValueError, match="at most 1000 bytes"):
            await fetch(url, most=1000)
    with pytest.raises(NoImage, match="AVIF"):
        await fetch("data:image/png,hello")


@pytest.mark.parametrize("form", ["AVIF", "GIF"])
async def test_avif_and_gif_are_drawn_from(server, tmp_path, form):
    more = {"save_all": True, "append_images": [Image.new("RGB", NOISE.size, "red")]}
    body = base64.b64encode(saved(NOISE, form, **more)).decode()
    server.script([{"body": body}])
    (made,) = await generate_images("a keeper", 1, output_dir=tmp_path, model=images(server))
    with Image.open(made.image_path) as image:
        assert image.format == "PNG" and image.size == NOISE.size
        assert image.getpixel((5, 5)) != (255, 0, 0), "the first frame, not the last"


@pytest.mark.parametrize("form", ["AVIF", "GIF"])
def test_the_new_formats_are_guarded_as_the_others(form):
    whole = saved(NOISE, form)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match=r"refused|not a readable"):
            decode_image(whole[: int(len(whole) * share)])
    for at in range(12, len(whole), len(whole) // 40):
        data = bytearray(whole)
        data[at] ^= 0xFF
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert type(error) is ValueError
    with pytest.raises(ValueError, match="at most 1000 pixels"):
        decode_image(whole, max_pixels=1000)


def test_a_gif_that_claims_a_giant_screen_is_not_decoded():
    data = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(ValueError, match="refused"):
        decode_image(bytes(data))


def test_avif_without_support_is_said_to_be_that(monkeypatch):
    from refimg.storage import images as room

    monkeypatch.setattr(room, "_formats", lambda: ("PNG", "JPEG", "WEBP", "GIF"))
    with pytest.raises(ValueError, match=r"AVIF.*Pillow 11\.3"):
        decode_image(saved(NOISE, "AVIF"))


def profile(gamma: float = 2.2) -> bytes:
    """An ICC profile with the primaries of Display P3."""
    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        at = 128 + 4 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", at, len(value))
        body += value + bytes(-len(value) % 4)
    head = bytearray(128)
    head[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    head[8:12], head[12:24], head[36:40] = b"\2\x40\0\0", b"mntrRGB XYZ ", b"acsp"
    head[68:80] = struct.pack(">iii", 63190, 65536, 54061)
    return bytes(head) + table + body


def near(image: Image.Image, colour: tuple[int, ...], by: int = 4) -> bool:
    return all(abs(a - b) <= by for a, b in zip(image.getpixel((1, 1)), colour, strict=True))


@pytest.mark.parametrize(("mode", "form"), [
    ("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGB", "AVIF"), ("RGBA", "PNG"),
    ("P", "PNG"),
])  # fmt: skip
def test_a_colour_profile_is_converted_to_srgb(tmp_path, mode, form):
    image = Image.new("RGB", (16, 16), (180, 60, 40))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    data = saved(image, form, icc_profile=profile(), quality=100)
    assert near(decode_image(data), (197, 43, 19)) and decode_image(data).info == {}
    (tmp_path / "mine").write_bytes(data)
    assert near(read_image(tmp_path / "mine"), (197, 43, 19))
    sent = Image.open(io.BytesIO(small_jpeg(tmp_path / "mine")))
    assert near(sent, (197, 43, 19), by=8)


def test_transparency_and_greys_keep_their_sense_with_a_profile():
    half = Image.new("RGBA", (16, 16), (180, 60, 40, 128))
    assert near(decode_image(saved(half, "PNG", icc_profile=profile())), (226, 149, 137))
    grey = Image.new("L", (16, 16), 100)
    assert near(decode_image(saved(grey, "PNG", icc_profile=profile())), (97, 97, 97), by=8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = decode_image(saved(NOISE, "PNG", icc_profile=srgb))
    assert same.tobytes() == NOISE.tobytes()


@pytest.mark.parametrize("broken", [b"ALIVE" * 40, profile()[:300], profile()[:128], bytes(128)])
def test_a_broken_profile_is_ignored_with_a_note(broken, caplog):
    image = Image.new("RGB", (16, 16), (180, 60, 40))
    with caplog.at_level(logging.INFO, "refimg"):
        assert near(decode_image(saved(image, "PNG", icc_profile=broken)), (180, 60, 40), by=0)
    assert "colour profile" in caplog.text and len(caplog.records) == 1


def test_a_profile_of_another_kind_of_image_is_ignored_with_a_note(caplog):
    image = Image.new("CMYK", (16, 16), (0, 200, 200, 20))
    plain = decode_image(saved(image, "JPEG", quality=100))
    assert decode_image(saved(image, "JPEG", quality=100, icc_profile=profile())) == plain
    assert "colour profile" in caplog.text


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_a_png_with_much_text_is_read(kind):
    notes, text = PngImagePlugin.PngInfo(), "a graph of nodes " * 80_000
    if kind == "iTXt":
        notes.add_itxt("workflow", text, zip=True)
    else:
        notes.add_text("workflow", text, zip=kind == "zTXt")
    notes.add_itxt("refimg-truth", "kept")
    image = decode_image(saved(NOISE, "PNG", pnginfo=notes))
    assert image.tobytes() == NOISE.tobytes() and image.info == {"refimg-truth": "kept"}


def test_much_hidden_text_is_still_bounded(caplog):
    import tracemalloc

    bomb, hidden = zlib.compress(bytes(200_000_000), 9), b""
    for name, body in [(b"zTXt", b"note\0\0"), (b"zTXt", b"refimg-truth\0\0"), (b"iCCP", b"p\0\0"),
                       (b"iTXt", b"refimg-truth\0\1\0\0\0")]:
        check = zlib.crc32(name + body + bomb)
        size = struct.pack(">I", len(body + bomb))
        hidden += size + name + body + bomb + struct.pack(">I", check)
    plain = saved(NOISE, "PNG")
    data = plain[:33] + hidden + plain[33:]
    tracemalloc.start()
    try:
        image = decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert image.tobytes() == NOISE.tobytes() and image.info == {}
    assert "colour profile" in caplog.text


# --- what a model takes -------------------------------------------------------------------------

SIDE = {"type": "integer", "minimum": 256, "maximum": 1280}
STABLE = [128, 256, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024]


@pytest.mark.parametrize(("side", "sizes"), [
    (SIDE, {"16:9": (1280, 720), "9:16": (720, 1280), "1:1": (1024, 1024)}),
    ({**SIDE, "maximum": 1024, "multipleOf": 64}, {"16:9": (1024, 576), "1:1": (1024, 1024)}),
    ({"enum": STABLE}, {"16:9": (1024, 576), "3:2": (960, 640), "4:3": (1024, 768)}),
    ({**SIDE, "maximum": 700}, {"1:1": (688, 688)}),
    ({}, {"16:9": (1360, 768), "1:1": (1024, 1024)}),
])  # fmt: skip
def test_a_size_within_the_limits_has_the_ratio(side, sizes):
    takes = read_schema(schema({"prompt": PROMPT, "width": side, "height": side}))
    for ratio, size in sizes.items():
        made = takes.build_input(prompt="a", aspect_ratio=ratio)
        assert (made["width"], made["height"]) == size


async def test_a_sized_model_draws_within_its_limits(server, tmp_path):
    server.models({"lab/sized": schema(
        {"prompt": PROMPT, "image": URI, "width": SIDE, "height": SIDE, "seed": PROMPT})})
    run = pipeline(images(server, "lab/sized"))
    result = await run.run(story(), output_dir=tmp_path / "o")
    assert [s.reference_from for s in result.scenes] == ["ranked", "ranked"]
    sent = server.requests("create")[0]["json"]["input"]
    assert (sent["width"], sent["height"]) == (1280, 720)


async def test_a_ratio_that_no_size_has_is_refused_at_the_start(server, tmp_path):
    coarse = {"type": "integer", "enum": [768, 1024]}
    server.models({"lab/coarse": schema(
        {"prompt": PROMPT, "image": URI, "width": coarse, "height": coarse})})
    run = pipeline(images(server, "lab/coarse"))
    told = "aspect_ratio must be one that 768, 1024 wide and 768, 1024 high can have, got '16:9'"
    await refused_unpaid(run, told, tmp_path / "o")


@pytest.mark.parametrize(("fields", "required", "told"), [
    ({"prompt": PROMPT, "style": PROMPT}, ["prompt", "style"], "inputs must hold style"),
    ({"prompt": PROMPT, "image": URI, "mask": URI}, ["mask"], "inputs must hold mask"),
    ({"prompt": PROMPT, "image": URI}, ["prompt", "image"], "initial_reference_image"),
    ({"query": PROMPT, "steps": {"type": "integer"}}, ["query"], "prompt"),
])  # fmt: skip
async def test_what_a_model_requires_is_known_before_an_agent_is_paid(
    server, tmp_path, fields, required, told
):
    server.models({"lab/strict": schema({"image": URI, **fields}, required)})
    await refused_unpaid(pipeline(images(server, "lab/strict")), told, tmp_path / "o")


async def test_a_model_that_only_edits_works_with_an_image_of_ones_own(server, tmp_path):
    server.models({"lab/edit": schema({"prompt": PROMPT, "image": URI}, ["prompt", "image"])})
    (tmp_path / "mine.png").write_bytes(picture(90))
    own = story(initial_reference_image=tmp_path / "mine.png")
    run = pipeline(images(server, "lab/edit"))
    assert len((await run.run(own, output_dir=tmp_path / "o")).references) == 2
    alone = pipeline(images(server, "lab/edit"), chain="none")
    await refused_unpaid(alone, "references must be at least 1", tmp_path / "p", story=own)
    with pytest.raises(ValueError, match="references must be at least 1"):
        await generate_images("a", 1, output_dir=tmp_path / "q", model=run.image_model)


async def test_wrong_inputs_of_the_model_are_found_at_the_start(server, tmp_path):
    for wrong, told in [({"steps": 99}, "steps must be 1 to 50"), ({"stepps": 5}, "got 'stepps'")]:
        run = pipeline(images(server, "lab/portrait", inputs=wrong))
        await refused_unpaid(run, told, tmp_path / "o")


async def test_a_prompt_by_another_name_is_sent_by_it(server, tmp_path):
    server.models({"lab/named": schema({"text": PROMPT, "image": URI, "seed": PROMPT}, ["text"])})
    run = pipeline(images(server, "lab/named"))
    await run.run(story(), output_dir=tmp_path / "o")
    sent = server.requests("create")[0]["json"]["input"]
    assert "lighthouse" in sent["text"] and "prompt" not in sent


def test_a_required_input_with_a_default_or_a_value_is_no_obstacle():
    mode = {"type": "string", "default": "fast"}
    made = schema({"prompt": PROMPT, "mode": mode, "style": PROMPT}, ["prompt", "mode", "style"])
    sent = read_schema(made).build_input(prompt="a", aspect_ratio="16:9", more={"style": "oil"})
    assert sent == {"prompt": "a", "style": "oil"}


WORDS = ["square", "square_hd", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"]


@pytest.mark.parametrize(("name", "words", "sent"), [
    ("aspect_ratio", WORDS, {"16:9": "landscape_16_9", "9:16": "portrait_16_9", "1:1": "square"}),
    ("image_size", WORDS, {"4:3": "landscape_4_3", "3:4": "portrait_4_3"}),
    ("aspect_ratio", ["16:9 (landscape)", "portrait 2x3"], {"16:9": "16:9 (landscape)",
                                                            "2:3": "portrait 2x3"}),
    ("size", ["auto", "1024x1024", "1365x1024", "1024x1820"],
     {"1:1": "1024x1024", "4:3": "1365x1024", "9:16": "1024x1820"}),
    ("aspect_ratio", ["landscape_16_9", "16:9"], {"16:9": "16:9"}),
])  # fmt: skip
def test_aspect_ratios_in_words_are_understood_where_they_are_clear(name, words, sent):
    takes = read_schema(schema({"prompt": PROMPT, name: {"type": "string", "enum": words}}))
    for ratio, word in sent.items():
        assert ratio in takes.aspect_ratios
        assert takes.build_input(prompt="a", aspect_ratio=ratio) == {"prompt": "a", name: word}


def worded(*words: str) -> dict:
    ratio = {"type": "string", "enum": list(words)}
    return schema({"prompt": PROMPT, "image": URI, "aspect_ratio": ratio})


async def test_aspect_ratios_that_are_not_clear_are_listed_and_can_be_chosen(
    server, tmp_path, caplog
):
    server.models({"lab/wordy": worded("landscape", "portrait"), "lab/some": worded("1:1", "wide")})
    for name, told in [("lab/wordy", "landscape, portrait"), ("lab/some", "1:1, wide")]:
        run = pipeline(images(server, name))
        await refused_unpaid(run, f"aspect_ratio .*{told}.*inputs", tmp_path / "o")
    chosen = images(server, "lab/wordy", inputs={"aspect_ratio": "landscape"})
    await pipeline(chosen).run(story(), output_dir=tmp_path / "o")
    assert server.requests("create")[0]["json"]["input"]["aspect_ratio"] == "landscape"
    assert "is sent no aspect ratio" in caplog.text
    wrong = pipeline(images(server, "lab/wordy", inputs={"aspect_ratio": "round"}))
    await refused_unpaid(wrong, "one of landscape, portrait, got 'round'", tmp_path / "p")


async def test_a_size_of_ones_own_is_not_replaced(server):
    model = images(server, "lab/portrait", inputs={"width": 512, "height": 768})
    await model.generate(ImageRequest(prompt="a keeper", aspect_ratio="16:9"))
    sent = server.requests("create")[0]["json"]["input"]
    assert (sent["width"], sent["height"]) == (512, 768)


def test_the_inputs_of_a_model_can_be_read(server):
    given = {"guidance": 2}
    model = images(server, inputs=given)
    assert model.inputs == given and type(model.inputs) is dict and model.inputs is not given


# --- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [
    "https://example.com/a.png", "http://example.com//a.png", "s3://bucket/a.png",
    "file:///home/me/a.png",
])  # fmt: skip
async def test_an_address_as_reference_is_said_to_be_no_file(tmp_path, url):
    with pytest.raises(ValueError, match="references are files") as caught:
        await generate_images("a", 1, output_dir=tmp_path / "o", model=FakeImages(), references=url)
    assert f"{url.partition('//')[0]}//" in str(caught.value), "not as a path shows it"


async def test_image_data_as_reference_is_said_to_be_no_file(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(saved(NOISE, "PNG")).decode()
    with pytest.raises(ValueError, match="references are files") as caught:
        read_image(url)
    assert len(str(caught.value)) < 400


def test_capabilities_stand_alone():
    takes = Capabilities("images", True, 3, fields={"prompt": {}, "images": IMAGES})
    assert takes.build_input(prompt="a", aspect_ratio="16:9", references=["u"])["images"] == ["u"]


# --- one image a prediction -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_outputs", "number_of_images", "max_images", "batch_size"])
def test_no_image_is_paid_for_that_is_not_kept(name):
    with pytest.raises(ValueError, match=f"^{name} must be 1, .*got 4$"):
        ReplicateImages("lab/new", inputs={name: 4})
    count = {"type": "integer", "default": 4, "minimum": 1, "maximum": 8}
    takes = read_schema(schema({"prompt": PROMPT, name: count}))
    assert takes.build_input(prompt="a", aspect_ratio="1:1")[name] == 1
