"""The two small models and the one vocabulary they share."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np

from refimg.adapters.towers import import_open_clip
from refimg.sandbox.painter import PAINTER_VERSION

from .captions import FILLERS, caption
from .pictures import INPUT, make_pair

CONTEXT = 64
WIDTH = 128  # of the shared space and of both text towers
COMMON = 2300  # merges of CLIP's own list that are kept whatever they are good for
STORIES = (
    "A lighthouse keeper in a yellow raincoat climbs the rocks of a storm-beaten coast at dawn. "
    "He carries a brass lantern; the sea breaks behind him, waves crash against the shore.",
    "An old man and his dog sit on a wooden bench at the end of the pier and watch the boats "
    "come home through the evening fog while seagulls circle overhead.",
    "A cinematic establishing shot of a young woman on a red bicycle who rides through a quiet "
    "mountain village, soft morning light on the rooftops, painted in watercolour on rough paper.",
    "Match the reference image. Style, colour palette, lighting, composition, mood, subject "
    "description: the same keeper, continuity with the previous scene, transition, guideline.",
)


def tokenizer(folder: Path):
    """open_clip's tokenizer on the shortened list of merges in a folder."""
    kind = import_open_clip().tokenizer.SimpleTokenizer
    return kind(bpe_path=str(folder / "bpe.txt.gz"), context_length=CONTEXT)


def _words() -> set[str]:
    """The words of captions, fillers and story-like prompts."""
    rng = np.random.default_rng(5)
    texts = [caption(rng, make_pair(seed)[0].attributes) or "" for seed in range(6000)]
    texts += [*FILLERS, *STORIES]
    return {word for text in texts for word in text.lower().replace(",", " ").split()}


def cut_vocabulary(folder: Path) -> int:
    """Writes CLIP's merges less those that no word here needs; the number of tokens."""
    tokens = import_open_clip().tokenizer
    whole = tokens.SimpleTokenizer()
    merges = sorted(whole.bpe_ranks, key=whole.bpe_ranks.get)
    pieces = {p for word in _words() for p in whole.bpe(word.strip(".;:-")).split(" ")}
    needed, want = set(), set(pieces)
    for left, right in reversed(merges):
        if left + right in want:
            needed.add((left, right))
            want |= {left, right}
    kept = [m for i, m in enumerate(merges) if i < COMMON or m in needed]
    text = "\n".join(["#version: 0.2", *(" ".join(m) for m in kept)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return 512 + len(kept) + 2


def open_clip_config(vocabulary: int) -> dict:
    """What open_clip needs to know to build the model of clip_score."""
    vision = {"image_size": INPUT, "patch_size": 12, "layers": 4, "width": 128, "head_width": 32}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": WIDTH, "heads": 4,
            "layers": 2}
    half = [0.5, 0.5, 0.5]
    look = {"size": [INPUT, INPUT], "mode": "RGB", "mean": half, "std": half,
            "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text},
            "preprocess_cfg": look}


def make_open_clip(vocabulary: int):
    """The untrained model of clip_score."""
    config = open_clip_config(vocabulary)["model_cfg"]
    return import_open_clip().model.CLIP(**config)


def make_transformers(vocabulary: int):
    """The untrained model of pickscore."""
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": WIDTH,
            "max_position_embeddings": CONTEXT, "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1,
            "hidden_act": "gelu"}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
              "num_attention_heads": 4, "image_size": INPUT, "patch_size": 12,
              "projection_dim": WIDTH, "hidden_act": "gelu"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def _half(model) -> dict:
    """The weights in sixteen bits."""
    return {name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in model.state_dict().items()}


def save_open_clip(model, vocabulary: int, folder: Path) -> None:
    """Writes the folder that open_clip reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_half(model), folder / "open_clip_model.safetensors")
    text = json.dumps(open_clip_config(vocabulary), indent=1)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


def save_transformers(model, vocabulary: int, folder: Path) -> None:
    """Writes the folder that transformers reads, tokenizer and image processor included."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_half(model), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    write_tokenizer(folder.parent / "sandbox-clip" / "bpe.txt.gz", folder)
    half, square = [0.5, 0.5, 0.5], {"height": INPUT, "width": INPUT}
    look = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": square,
            "resample": 3, "do_center_crop": False, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": half,
            "image_std": half, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(look, indent=1) + "\n")


def write_tokenizer(merges: Path, folder: Path) -> None:
    """Writes the same vocabulary as transformers reads it, under its names for start and end."""
    tokens = tokenizer(merges.parent)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(t, t): i for t, i in tokens.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    text = gzip.decompress(merges.read_bytes()).decode()
    (folder / "merges.txt").write_text(text + "\n", encoding="utf-8")
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT,
             "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
             "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def seal(path: Path, constants: dict) -> None:
    """Writes the card of some weights: the painter they know and the constants of their scale."""
    about = {"painter": PAINTER_VERSION, **constants}
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def replace(made: Path, target: Path) -> None:
    """Puts a finished folder where the package looks for it."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(made, target)
    for file in target.iterdir():
        file.chmod(0o644)
