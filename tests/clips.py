"""Tiny CLIPs with random weights, of the same classes as the public ones, saved as those are."""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from refimg.adapters.towers import import_open_clip, import_transformers

_folders: list[TemporaryDirectory] = []  # removed when the interpreter ends
VISION = {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIG = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}


def new_folder() -> Path:
    """An empty folder that lives as long as the tests."""
    _folders.append(TemporaryDirectory(prefix="refimg-clip-"))
    return Path(_folders[-1].name)


def seeded(model, seed: int):
    """The model in eval mode, its weights random, its logit scale 100 and its biases not zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name == "logit_scale":
                value.fill_(4.6052)
            else:
                centre = 1.0 if value.ndim == 1 and "bias" not in name else 0.0
                value.copy_(centre + 0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """CLIP's own vocabulary as transformers reads it, from the list in open_clip's wheel."""
    library = import_open_clip()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(t, t): i for t, i in library.SimpleTokenizer().encoder.items()}
    packed = (files("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    end = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    about = end | {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"model_max_length": 77}))


@cache
def tiny_transformers(seed: int = 1) -> Path:
    """A CLIPModel with tokenizer and preprocessing, in a folder."""
    library, folder = import_transformers(), new_folder()
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "projection_dim": 24}
    text = common | {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406,
                     "eos_token_id": 49407, "pad_token_id": 49407}
    vision = common | {"image_size": 224, "patch_size": 32}
    config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    seeded(library.CLIPModel(config), seed).save_pretrained(folder)
    library.CLIPImageProcessorPil().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@cache
def tiny_open_clip(seed: int = 1) -> Path:
    """An open_clip model whose vectors are as long as ViT-L/14's, in a folder."""
    from safetensors.torch import save_file

    library, folder = import_open_clip(), new_folder()
    model = seeded(library.CLIP(**CONFIG), seed)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    look = {"mean": library.OPENAI_DATASET_MEAN, "std": library.OPENAI_DATASET_STD}
    config = {"model_cfg": CONFIG, "preprocess_cfg": look}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@cache
def picture(seed: int = 0, size: tuple[int, int] = (320, 180)) -> Image.Image:
    """Coarse coloured noise: every crop of it looks different."""
    import random

    pixels = random.Random(seed).randbytes(3 * 16 * 9)
    return Image.frombytes("RGB", (16, 9), pixels).resize(size, Image.Resampling.BICUBIC)


def register(monkeypatch, name: str, quick_gelu: bool = True, **tag) -> str:
    """Makes the tiny model known to open_clip under that name, with a tag `tiny`."""
    factory, known = import_open_clip().factory, import_open_clip().pretrained._PRETRAINED
    monkeypatch.setitem(factory._MODEL_CONFIGS, name, CONFIG | {"quick_gelu": quick_gelu})
    about = {"hf_hub": "someone/tiny/", "quick_gelu": quick_gelu, "resize_mode": "shortest"}
    monkeypatch.setitem(known, name, {"tiny": about | tag})
    return name
