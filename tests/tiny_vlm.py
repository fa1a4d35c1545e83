"""Vision-language models of real classes, a few thousand random weights each, made in a folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refimg.adapters.towers import import_transformers

WORDS = ["Yes yes No no YES NO Yes yesterday", " Does this figure show", " Please answer yes"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"height": 56, "width": 56}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 8192,
}  # fmt: skip


def tokenizer(special: list[str], sentencepiece: bool = False, words: bool = True):
    """A tokenizer with a token for each spelling of yes: with bytes as GPT's, or with "▁"."""
    kind = pre_tokenizers.Metaspace() if sentencepiece else pre_tokenizers.ByteLevel(False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = kind
    bpe.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", *special], show_progress=False,
        vocab_size=600 if words else 0, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(WORDS * 3 if words else [], trainer)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>")


def save(folder: Path, model, processor) -> Path:
    """The folder, as a checkpoint on the hub looks."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def seeded(make, config):
    """The model with the same random weights every time."""
    import torch

    torch.manual_seed(0)
    return make(config)


def qwen(folder: Path, chat: str = CHAT, words: bool = True) -> Path:
    """A Qwen2.5-VL: pictures in their own resolution, tied weights, a chat template."""
    library = import_transformers()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(special, words=words)
    ids = words.convert_tokens_to_ids
    config = library.Qwen2_5_VLConfig(
        text_config=TEXT | {
            "vocab_size": len(words), "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56,
            "initializer_range": 0.3},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)  # fmt: skip
    processor = library.Qwen2_5_VLProcessor(
        image_processor=library.Qwen2VLImageProcessor(
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}),
        tokenizer=words, video_processor=library.Qwen2VLVideoProcessor(),
        chat_template=chat.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return save(folder, seeded(library.Qwen2_5_VLForConditionalGeneration, config), processor)


def llava(folder: Path) -> Path:
    """A LLaVA: square pictures, tokens with "▁", no chat template."""
    library, words = import_transformers(), tokenizer(["<image>"], sentencepiece=True)
    config = library.LlavaConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(words)},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
            "initializer_factor": 10.0},
        image_token_index=words.convert_tokens_to_ids("<image>"))  # fmt: skip
    processor = library.LlavaProcessor(
        image_processor=library.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SIZES),
        tokenizer=words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1)  # fmt: skip
    return save(folder, seeded(library.LlavaForConditionalGeneration, config), processor)


def idefics(folder: Path) -> Path:
    """An Idefics3: large pictures are split, so that questions have very different lengths."""
    library = import_transformers()
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", *rows])
    config = library.Idefics3Config(
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2,
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(words) + 1},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
            "initializer_range": 0.3})  # fmt: skip
    processor = library.Idefics3Processor(
        image_processor=library.Idefics3ImageProcessor(
            size={"longest_edge": 168}, max_image_size={"longest_edge": 56}),
        tokenizer=words, image_seq_len=4, chat_template=CHAT.replace("PICTURE", "<image>"),
    )  # fmt: skip
    return save(folder, seeded(library.Idefics3ForConditionalGeneration, config), processor)
