"""The image models people use on Replicate: drawn with as they want it, or refused unpaid."""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import date, timedelta
from itertools import product

import pytest

from refimg import Pipeline, Scene, Story
from refimg.adapters.inputs import ENDS, KNOWN_MODELS, known_capabilities, read_schema, warn_of_end
from refimg.adapters.prices import PRICES
from refimg.adapters.replicate import ReplicateImages
from refimg.adapters.shapes import nearest_ratio
from refimg.engine.protocols import ImageRequest
from tests.fakes import FakeScorer, critic, director, picture
from tests.servers.images import IMAGES, PROMPT, URI, schema, start_image_server
from tests.servers.models import INPUTS, NEEDED, strict

TOKEN = "r8_" + "a" * 37
WANTED = {  # which input takes the references, where a model has several files
    "ideogram-ai/ideogram-character": "character_reference_image",
    "ideogram-ai/ideogram-v3-turbo": "style_reference_images",
    "luma/photon": "image_reference",
    "runwayml/gen4-image": "reference_images",
    "qwen/qwen-image-edit-plus": "image",
}


@pytest.fixture(scope="module")
def server():
    with start_image_server(seconds=0.0) as made:
        made.models({name: strict(name) for name in INPUTS})
        yield made


@pytest.fixture
def files(tmp_path):
    """Three reference images."""
    paths = [tmp_path / f"reference{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        path.write_bytes(picture(50 * n))
    return tuple(paths)


def model_of(server, name: str, **more) -> ReplicateImages:
    return ReplicateImages(name, base_url=server.base_url, api_token=TOKEN, **more)


def test_every_row_of_the_table_has_its_schema_and_a_date():
    assert KNOWN_MODELS.keys() == INPUTS.keys()
    assert all(date.fromisoformat(row.read_on) for row in KNOWN_MODELS.values())


@pytest.mark.parametrize("name", INPUTS)
async def test_a_model_is_asked_as_it_wants_or_refused_unpaid(server, files, name):
    """Scene 1, and scene 2 with one and three references, wide and upright: by a strict schema."""
    server.script()
    model = model_of(server, name)
    await model.load()
    drawn, refused = 0, []
    for ratio, references in product(("16:9", "9:16"), (0, 1, 3)):
        request = ImageRequest(prompt="Image 1 is the keeper. A lamp.", aspect_ratio=ratio,
                               references=files[:references], seed=7 if model.takes_seed else None)
        try:
            model.check_request(request)
        except ValueError as error:
            refused.append((ratio, references, str(error)))
            continue
        assert (await model.generate(request)).data.startswith(b"\x89PNG")
        drawn += 1
    sent = [request["json"]["input"] for request in server.requests("create")]
    assert len(sent) == drawn  # none is refused there and asked again
    for ratio, references, told in refused:
        shape = "nearest" in told and ratio not in (model.aspect_ratios or (ratio,))
        few = references == 0 and name in NEEDED
        assert shape or few or references > model.max_references, told
        assert f"got {references}" in told or repr(ratio) in told
    reference = known_capabilities(name).reference
    assert reference == WANTED.get(name, reference)
    for inputs in sent:
        assert "mask" not in inputs and not ("image" in inputs and "mask" in INPUTS[name])


async def test_nothing_lets_a_model_rewrite_the_prompt(server):
    for name in INPUTS:
        model = model_of(server, name)
        await model.load()
        for row in (model.capabilities, KNOWN_MODELS[name]):
            made = row.build_input(prompt="a keeper", aspect_ratio=row.aspect_ratios[0],
                                   references=["u"] * row.needs_reference)
            rewriting = {"prompt_upsampling", "magic_prompt_option", "prompt_optimizer"}
            for switch in rewriting & INPUTS[name].keys():
                off = made.get(switch, INPUTS[name][switch].get("default"))
                assert off in (False, "Off") or row is KNOWN_MODELS[name], (name, switch)


async def test_whoever_wants_the_prompt_rewritten_says_so(server):
    server.script()
    model = model_of(server, "black-forest-labs/flux-2-flex", inputs={"prompt_upsampling": True})
    await model.generate(ImageRequest(prompt="a keeper", aspect_ratio="16:9"))
    assert server.requests("create")[0]["json"]["input"]["prompt_upsampling"] is True


@pytest.mark.parametrize(("prompt", "references", "sent"), [
    ("The reference image is the keeper.", 1, "@image1 is the keeper."),
    ("Image 1 is the keeper. Image 2 is the scene before.", 2,
     "@image1 is the keeper. @image2 is the scene before."),
    ("Image 4 of a series", 2, "Image 4 of a series\nKeep to @image1 and @image2."),
    ("A keeper", 0, "A keeper"),
])  # fmt: skip
def test_references_have_tags_where_a_model_wants_them(prompt, references, sent):
    takes = read_schema(strict("runwayml/gen4-image"))
    urls = [f"https://…/{n}" for n in range(references)]
    made = takes.build_input(prompt=prompt, aspect_ratio="16:9", references=urls)
    assert made["prompt"] == sent
    assert made.get("reference_tags", []) == [f"image{n + 1}" for n in range(references)]
    assert made.get("reference_images", []) == urls


@pytest.mark.parametrize(("fields", "found"), [
    ({"image": URI | {"description": "An image to inpaint"}, "mask": URI}, None),
    ({"image": URI | {"description": "Used with a mask"}, "mask": URI, "input_image": URI},
     "input_image"),
    ({"image": URI, "character_reference_image": URI}, "character_reference_image"),
    ({"image": URI | {"description": "Input for img2img or inpaint mode"}, "mask": URI}, "image"),
    ({"image": URI | {"description": "An image to edit; no mask is needed"}}, "image"),
    ({"image": URI, "reference_images": IMAGES}, "reference_images"),
])  # fmt: skip
def test_an_image_to_be_painted_over_is_no_reference(fields, found):
    assert read_schema(schema({"prompt": PROMPT} | fields)).reference == found


@pytest.mark.parametrize("name", NEEDED)
async def test_a_model_that_only_edits_is_refused_before_the_agents_are_paid(server, files, name):
    server.script()
    writer = director()
    plain = {"director": writer, "critic": critic(), "scorers": [FakeScorer()]}
    pipeline = Pipeline(image_model=model_of(server, name), num_variations=1, **plain)
    scenes = [Scene(prompt="a keeper"), Scene(prompt="his lamp")]
    with pytest.raises(ValueError, match="references must be at least 1 for this model"):
        await pipeline.run(Story(scenes=scenes), output_dir=files[0].parent / "a")
    assert not writer.calls and not server.requests("create")
    story = Story(scenes=scenes, initial_reference_image=files[0])
    result = await pipeline.run(story, output_dir=files[0].parent / "b")
    assert len(result.references) == 2 and len(server.requests("create")) == 2


async def test_the_nearest_aspect_ratio_is_offered(server, files):
    model = model_of(server, "openai/gpt-image-2")
    await model.load()
    for wanted, near in (("16:9", "3:2"), ("9:16", "2:3"), ("6:5", "1:1")):
        with pytest.raises(ValueError, match=f"the nearest is '{near}'"):
            model.check_request(ImageRequest(prompt="a", aspect_ratio=wanted))
    assert nearest_ratio("16:9", []) is None and nearest_ratio("auto", ["1:1"]) is None


@pytest.mark.parametrize("name", ENDS)
def test_a_model_whose_end_has_come_is_named_with_its_successor(name, caplog):
    day, successor = ENDS[name]
    ended = date.fromisoformat(day)
    assert name in KNOWN_MODELS and successor in KNOWN_MODELS and successor not in ENDS
    assert not warn_of_end(name, ended - timedelta(days=1)) and not caplog.text
    assert warn_of_end(f"{name}:abc", ended)
    assert re.search(f"{name}.*{day}.*{successor}", caplog.text)


async def test_the_end_of_a_model_is_a_warning_and_not_the_end_of_a_run(server, caplog):
    server.script()
    with caplog.at_level(logging.WARNING, "refimg.adapters"):
        for name in ("google/imagen-4", "google/nano-banana-2"):
            asked = ImageRequest(prompt="a keeper", aspect_ratio="16:9")
            assert (await model_of(server, name).generate(asked)).data
    [told] = [record.getMessage() for record in caplog.records]
    assert "google/imagen-4" in told and "google/nano-banana-2" in told


def test_the_default_model_has_a_price_and_no_end():
    model = ReplicateImages(api_token=TOKEN).model
    assert model in PRICES and model in KNOWN_MODELS and model not in ENDS


def test_each_model_is_asked_for_by_itself(server):
    """What one model takes is not what another takes."""

    async def takes() -> list:
        models = [model_of(server, name) for name in INPUTS]
        await asyncio.gather(*(model.load() for model in models))
        return [(m.model, m.capabilities.reference, m.max_references) for m in models]

    for name, reference, most in asyncio.run(takes()):
        row = KNOWN_MODELS[name]
        assert (reference, most) == (row.reference, row.max_references), name
