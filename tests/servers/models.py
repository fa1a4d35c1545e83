"""The inputs of well-known image models of Replicate, as their pages describe them.

Written down from facts read on 2026-11-22, not recorded from the API. Nothing else may be sent:
a server that has these schemas answers 422 to an input that they do not know.
"""

from __future__ import annotations

from typing import Any

from .images import IMAGES, PROMPT, SEED, URI, schema

WIDE = ["1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9"]
MATCHING = ["match_input_image", *WIDE]
OFF = {"type": "boolean", "default": False}
ON = OFF | {"default": True}


def words(*values: str, **more: Any) -> dict[str, Any]:
    """An input that takes one of these words."""
    return {"type": "string", "enum": list(values)} | more


def images(most: int, **more: Any) -> dict[str, Any]:
    """A list of at most that many images."""
    return IMAGES | {"maxItems": most} | more


def banana(most: int, *sizes: str, ratios: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the models of that family take."""
    return {"image_input": images(most), "aspect_ratio": words(*MATCHING, *ratios),
            "output_format": words("jpg", "png")} | ({"resolution": words(*sizes)} if sizes else {})


def flux(most: int, field: str = "input_images", **more: Any) -> dict[str, Any]:
    """What the second FLUX takes."""
    return {field: images(most), "aspect_ratio": words("match_input_image", "custom", *WIDE),
            "seed": SEED, "output_format": words("webp", "jpg", "png")} | more


def seedream(most: int, *sizes: str) -> dict[str, Any]:
    """What Seedream takes."""
    several = {"sequential_image_generation": words("disabled", "auto"),
               "max_images": {"type": "integer", "minimum": 1, "maximum": 15, "default": 1}}
    return {"image_input": images(most), "size": words(*sizes),
            "aspect_ratio": words("match_input_image", *WIDE)} | several


def ideogram(**more: Any) -> dict[str, Any]:
    """What Ideogram takes: an image is painted over, where a mask says so."""
    over = {"description": "An image file to use for inpainting. You must also use a mask."}
    return {"image": URI | over, "mask": URI, "seed": SEED | {"maximum": 2147483647},
            "magic_prompt_option": words("Auto", "On", "Off", default="Auto"),
            "aspect_ratio": words(*WIDE), "resolution": words("None", "1312x736")} | more


def gpt(most: int) -> dict[str, Any]:
    """What OpenAI's models take on Replicate: three aspect ratios."""
    return {"input_images": images(most), "aspect_ratio": words("1:1", "3:2", "2:3"),
            "quality": words("low", "medium", "high", "auto"), "moderation": words("auto", "low"),
            "number_of_images": {"type": "integer", "minimum": 1, "maximum": 10, "default": 1}}


STYLE = {"style_reference_images": images(3)}
TAGS = {"type": "array", "items": {"type": "string", "pattern": "^[a-zA-Z][a-zA-Z0-9]{2,14}$"}}
INPUTS: dict[str, dict[str, Any]] = {
    "google/nano-banana": banana(3),
    "google/nano-banana-2": banana(14, "1K", "2K", "4K", ratios=("1:4", "4:1", "1:8", "8:1")),
    "google/nano-banana-pro": banana(14, "1K", "2K", "4K"),
    "google/imagen-4": {"aspect_ratio": words("1:1", "9:16", "16:9", "3:4", "4:3")},
    "black-forest-labs/flux-kontext-pro": {
        "input_image": URI, "aspect_ratio": words(*MATCHING), "seed": SEED,
        "prompt_upsampling": OFF},
    "black-forest-labs/flux-2-pro": flux(8, resolution=words("0.5 MP", "1 MP", "2 MP", "4 MP")),
    "black-forest-labs/flux-2-max": flux(8, resolution=words("0.5 MP", "1 MP", "2 MP", "4 MP")),
    "black-forest-labs/flux-2-flex": flux(10, prompt_upsampling=ON),
    "black-forest-labs/flux-2-dev": flux(4, go_fast=ON),
    "black-forest-labs/flux-2-klein-4b": flux(5, "images", go_fast=ON),
    "black-forest-labs/flux-2-klein-9b": flux(5, "images", go_fast=ON),
    "bytedance/seedream-4": seedream(10, "1K", "2K", "4K", "custom"),
    "bytedance/seedream-4.5": seedream(14, "2K", "4K"),
    "bytedance/seedream-5-lite": seedream(14, "2K", "3K"),
    "bytedance/seedream-5-pro": seedream(10, "1K", "2K"),
    "openai/gpt-image-1.5": gpt(10),
    "openai/gpt-image-2": gpt(16),
    "qwen/qwen-image-edit": {"image": URI, "aspect_ratio": words(*MATCHING), "seed": SEED},
    "qwen/qwen-image-edit-plus": {
        "image": images(3), "aspect_ratio": words(*MATCHING), "seed": SEED, "go_fast": ON},
    "ideogram-ai/ideogram-character": ideogram(character_reference_image=URI),
    "ideogram-ai/ideogram-v3-turbo": ideogram(**STYLE),
    "ideogram-ai/ideogram-v3-balanced": ideogram(**STYLE),
    "ideogram-ai/ideogram-v3-quality": ideogram(**STYLE),
    "runwayml/gen4-image": {
        "reference_images": images(3), "reference_tags": TAGS, "seed": SEED,
        "aspect_ratio": words("16:9", "9:16", "4:3", "3:4", "1:1", "21:9"),
        "resolution": words("720p", "1080p")},
    "luma/photon": {
        "image_reference": URI, "style_reference": URI, "character_reference": URI,
        "aspect_ratio": words("1:1", "3:4", "4:3", "9:16", "16:9", "9:21", "21:9"), "seed": SEED},
    "luma/photon-flash": {
        "image_reference": URI, "style_reference": URI, "character_reference": URI,
        "aspect_ratio": words("1:1", "3:4", "4:3", "9:16", "16:9", "9:21", "21:9"), "seed": SEED},
    "minimax/image-01": {
        "subject_reference": URI, "prompt_optimizer": ON, "aspect_ratio": words(*WIDE),
        "number_of_images": {"type": "integer", "minimum": 1, "maximum": 9, "default": 1}},
    "xai/grok-imagine-image-2": {"image": URI, "aspect_ratio": words(*WIDE)},
}
NEEDED = {"qwen/qwen-image-edit": "image", "qwen/qwen-image-edit-plus": "image",
          "ideogram-ai/ideogram-character": "character_reference_image"}


def strict(name: str) -> dict[str, Any]:
    """The schema of that model, which allows nothing else."""
    made = schema({"prompt": PROMPT} | INPUTS[name], ["prompt", *filter(None, [NEEDED.get(name)])])
    made["components"]["schemas"]["Input"]["additionalProperties"] = False
    return made
