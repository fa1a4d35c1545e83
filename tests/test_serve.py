"""A server that nobody here wrote: `transformers serve`, with tiny models of random weights.

It accepts the schema and ignores it, and answers rubbish: the run ends on its fallbacks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from refimg import Pipeline, Scene, Story
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.towers import import_transformers
from refimg.enhance import Critique, critic_messages, parse_critique
from refimg.inspection import Checklist, Question, inspect_image
from tests.fakes import FakeImages, FakeScorer, picture
from tests.tiny_vlm import qwen

pytestmark = [pytest.mark.slow, pytest.mark.all]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


DECODER = """
import torchvision.transforms.functional as tensors
from transformers import image_processing_backends, image_utils
image_processing_backends.load_image_as_tensor = lambda source: tensors.pil_to_tensor(
    image_utils.load_image(source))
"""  # a torchvision without its extension decodes no files


def tiny_model(folder) -> None:
    """A Llama with random weights and a vocabulary of bytes, which stops after some words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    import_transformers()
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 256}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes, **heads))
    model.generation_config.update(do_sample=True, eos_token_id=[256, *range(20)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Base URL and model name of a running `transformers serve`, and what it logs."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model(folder)
    yield from serving(folder)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The same with a Qwen2.5-VL, which sees images."""
    folder = qwen(tmp_path_factory.mktemp("tiny-eyes"))
    ends = {"do_sample": True, "eos_token_id": [*range(0, 300, 3)]}  # it stops after some words
    (folder / "generation_config.json").write_text(json.dumps(ends))
    yield from serving(folder)


def serving(folder):
    code = "from refimg.adapters.towers import import_transformers; import_transformers()\n"
    code += DECODER + "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    said: list[str] = []
    threading.Thread(target=said.extend, args=(server.stdout,), daemon=True).start()
    try:
        yield f"{started(server, said)}/v1", str(folder), said
    finally:
        server.terminate()
        server.wait(timeout=20)


def started(server: subprocess.Popen, said: list[str]) -> str:
    """The address that the server names as soon as it listens."""
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        if found := re.search(r"running on (http://\S+)", "".join(said)):
            return found[1]
        time.sleep(0.05)
    pytest.fail("".join(said))


async def test_it_accepts_the_schema_ignores_it_and_answers_rubbish(served):
    url, model, said = served
    chat = OpenAIChat(model, base_url=url)
    reply = await chat.reply(critic_messages("A boat.", "A boat."), Critique)
    assert reply.usage.input_tokens > 1000 and reply.usage.output_tokens > 0
    with pytest.raises(ValueError):
        parse_critique(reply.text)
    assert "response_format" in "".join(said)


async def test_a_run_ends_on_its_fallbacks(served, tmp_path):
    url, model, _ = served
    chat, images = OpenAIChat(model, base_url=url), FakeImages()
    agents = {"director": chat, "critic": chat, "max_enhancement_iterations": 2}
    pipeline = Pipeline(image_model=images, scorers=[FakeScorer()], num_variations=2, **agents)
    story = Story(scenes=[Scene(prompt=text) for text in ("A boat at dusk.", "A boat at dawn.")])
    result = await pipeline.run(story, output_dir=tmp_path / "images")
    assert [scene.reference_from for scene in result.scenes] == ["fallback"] * 2
    assert [scene.enhancement.stop_reason for scene in result.scenes] == ["failed"] * 2
    assert [scene.enhancement.final_prompt for scene in result.scenes] == [
        "A boat at dusk.",
        "A boat at dawn.",
    ]
    assert len(images.requests) == 2 and all(path.is_file() for path in result.references)
    assert result.scenes[0].enhancement.critic.startswith("openai:")


async def test_eyes_that_answer_rubbish_leave_a_reason(seeing):
    url, model, _ = seeing
    eyes = OpenAIChat(model, base_url=url)
    asked = Checklist(prompt="A boat.", author="x", questions=[
        Question(text="Is there a boat?", about="subject")])
    with pytest.raises(RuntimeError, match=r"inspector: .*unusable after one repair turn"):
        await inspect_image(picture(90), asked, inspector=eyes)


async def test_a_run_with_such_eyes_is_scored_by_the_others(seeing, tmp_path):
    url, model, _ = seeing
    eyes = OpenAIChat(model, base_url=url)
    pipeline = Pipeline(image_model=FakeImages(), scorers=[FakeScorer()], inspector=eyes,
                        judge=eyes, repair_rounds=1, num_variations=2, plan=False,
                        max_enhancement_iterations=0)
    result = await pipeline.run(Story(scenes=[Scene(prompt="A boat.")]), output_dir=tmp_path)
    (scene,) = result.scenes
    assert scene.reference_from == "ranked" and scene.comparison is None
    assert any("the two best images are not compared" in text for text in scene.warnings)
    assert all(item.inspection is None and item.scores.notes["checklist"]
               for item in scene.variations)
