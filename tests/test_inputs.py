"""What a model takes, read from schemas of every shape, and what it cannot take."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimg.adapters.inputs import KNOWN_MODELS, Capabilities, known_capabilities, read_schema
from tests.servers.images import IMAGES, MODELS, PROMPT, URI, schema

ASKED = {"prompt": "a keeper", "aspect_ratio": "16:9"}


@pytest.mark.parametrize(("fields", "found", "many"), [
    ({"image": URI}, "image", False),
    ({"mask_image": URI, "control_image": URI, "style_reference": URI, "input_image": URI},
     "input_image", False),
    ({"first_frame": URI, "last_frame_image": URI, "subject_reference": URI},
     "subject_reference", False),
    ({"input_images": IMAGES, "image": URI}, "input_images", True),
    ({"image": {"anyOf": [URI, {"type": "null"}]}}, "image", False),
    ({"images": {"anyOf": [{"type": "null"}, IMAGES]}}, "images", True),
    ({"image_url": {"type": "string"}}, None, False),
    ({"lora_weights": URI}, None, False),
])  # fmt: skip
def test_the_reference_input_is_found(fields, found, many):
    takes = read_schema(schema({"prompt": PROMPT} | fields))
    assert (takes.reference, takes.many) == (found, many)


def test_the_order_of_the_page_decides_not_that_of_the_file():
    made = schema({"second_image": URI, "first_image": URI})
    fields = made["components"]["schemas"]["Input"]["properties"]
    fields["second_image"]["x-order"], fields["first_image"]["x-order"] = 9, 1
    assert read_schema(made).reference == "first_image"


def test_an_override_counts_and_must_exist():
    made = schema({"prompt": PROMPT, "image": URI, "style_image": URI})
    assert read_schema(made, reference_input="style_image").reference == "style_image"
    with pytest.raises(ValueError, match=r"\['image', 'style_image'\], got 'face'"):
        read_schema(made, reference_input="face")


def test_the_table_names_the_reference_where_the_schema_has_several():
    fields = {"character_reference": URI, "image_reference": URI, "style_reference": URI}
    made = schema({"prompt": PROMPT} | fields)
    assert read_schema(made).reference == "character_reference"
    known = known_capabilities("luma/photon-flash")
    assert read_schema(made, known=known).reference == "image_reference"


def test_the_schema_counts_where_the_table_is_out_of_date():
    known = Capabilities("image_input", True, 14, seed=True)
    takes = read_schema(schema({"prompt": PROMPT, "image": URI}), known=known)
    assert (takes.reference, takes.many, takes.most, takes.seed) == ("image", False, 1, False)


@pytest.mark.parametrize("broken", [
    None, [], {}, {"components": {}}, {"components": {"schemas": {"Input": {}}}},
    {"components": {"schemas": {"Input": {"properties": {"prompt": 5}}}}},
    schema({"prompt": PROMPT, "seed": {"maximum": "many"}}),
    schema({"prompt": PROMPT, "seed": {"maximum": float("inf")}}),
    schema({"prompt": PROMPT, "images": {"type": "array", "items": "uri"}}),
    schema({"prompt": PROMPT, "images": {"type": "array", "maxItems": "3"}}),
    schema({"prompt": PROMPT, "style": {"enum": 7}}),
    schema({"prompt": PROMPT, "style": {"allOf": [{"$ref": ["A"]}]}}),
    schema({"prompt": PROMPT}, [{}]),
    schema({"prompt": PROMPT}, Output={"type": "object", "properties": ["image"]}),
])  # fmt: skip
def test_an_unreadable_schema_is_said_to_be_one(broken):
    with pytest.raises(ValueError, match="schema cannot be read") as caught:
        read_schema(broken)
    assert not re.search(r"\w+Error|pydantic", str(caught.value))


def test_a_definition_elsewhere_may_refer_to_another():
    takes = read_schema(MODELS["google/nano-banana"])
    assert "match_input_image" not in takes.aspect_ratios and "16:9" in takes.aspect_ratios
    assert takes.reference == "image_input" and not takes.seed


@pytest.mark.parametrize(("more", "said"), [
    ({"aspect_ratio": "5:1"}, "aspect_ratio must be one of .*, got '5:1'"),
    ({"more": {"stepps": 5}}, "inputs must be among .*, got 'stepps'"),
    ({"seed": 1}, "seed must be None for this model, got 1"),
    ({"negative_prompt": "blur"}, "negative_prompt"),
    ({"references": ["a", "b"]}, "references must be at most 1 for this model, got 2"),
])  # fmt: skip
def test_what_a_model_cannot_take_is_refused(more, said):
    takes = read_schema(MODELS["google/nano-banana"])
    with pytest.raises(ValueError, match=said):
        takes.build_input(**(ASKED | more))


def test_ranges_and_required_inputs_are_held():
    takes = read_schema(MODELS["lab/portrait"])
    with pytest.raises(ValueError, match="steps must be 1 to 50, got 99"):
        takes.build_input(**ASKED, more={"steps": 99})
    needed = read_schema(schema({"prompt": PROMPT, "image": URI}, ["prompt", "image"]))
    with pytest.raises(ValueError, match=r"references must be at least 1 for this model, .*got 0"):
        needed.build_input(**ASKED)
    other = read_schema(schema({"prompt": PROMPT, "mode": {"type": "string"}}, ["mode"]))
    with pytest.raises(ValueError, match="inputs must hold mode, which the model requires"):
        other.build_input(**ASKED)


def test_a_reference_is_never_dropped():
    with pytest.raises(ValueError, match="references must be at most 0 for this model, got 1"):
        read_schema(MODELS["lab/words"]).build_input(**ASKED, references=["https://…/1"])


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31 - 1))
def test_a_seed_is_folded_into_the_models_range(seed, largest):
    takes = Capabilities(seed=True, fields={"seed": {"maximum": largest}, "prompt": {}})
    sent = takes.build_input(**ASKED, seed=seed)["seed"]
    assert 0 <= sent <= largest and (seed > largest or sent == seed)


@given(st.integers(1, 21), st.integers(1, 21))
def test_width_and_height_keep_ratio_and_area(wide, high):
    sized = read_schema(schema({"prompt": PROMPT, "width": {}, "height": {}}))
    made = sized.build_input(prompt="a", aspect_ratio=f"{wide}:{high}")
    width, height = made["width"], made["height"]
    assert width % 16 == height % 16 == 0 and "aspect_ratio" not in made
    assert math.isclose(width / height, wide / high, rel_tol=0.05)
    assert math.isclose(width * height, 2**20, rel_tol=0.06)


@pytest.mark.parametrize("name", [n for n, row in KNOWN_MODELS.items() if row.reference])
def test_a_row_of_the_table_can_be_filled(name):
    takes = KNOWN_MODELS[name]
    made = takes.build_input(prompt="a", aspect_ratio="1:1", references=["u"])
    assert made[takes.reference] == (["u"] if takes.many else "u")
