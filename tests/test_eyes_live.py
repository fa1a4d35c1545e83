"""Inspector, repair and judge through the real SDKs: what is asked, what it costs, who refuses."""

from __future__ import annotations

import json
from base64 import b64encode
from itertools import count

import pytest

from refimg import Pipeline, Scene, Story
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from refimg.adapters.retry import ProviderError
from refimg.engine.fence import fence
from refimg.engine.protocols import Message
from refimg.inspection import ChecklistScorer
from refimg.score import score_images
from refimg.storage.journal import Journal
from tests.fakes import FakeImages, FakeScorer, director, picture
from tests.servers.images import start_image_server
from tests.servers.llm import answers, parts_of, start_llm_server

STORY = Story(scenes=[Scene(prompt="A keeper in a red coat under a lamp, ink drawing, calm sea."),
                      Scene(prompt="The keeper of the lamp waves at the boats behind him.")])
SMALL, LARGE, IMAGE = {"input": 0.25, "output": 2.0}, {"input": 1.25, "output": 10.0}, 0.04
NAMES = (f"blind-{number}" for number in count(1))  # a refusal is remembered by model
REFUSALS = {
    "openai": (400, "Invalid content type. image_url is only supported by certain models."),
    "vllm": (400, "gpt is not a multimodal model None"),
    "vllm-limit": (400, "At most 0 image(s) may be provided in one prompt."),
    "llama.cpp": (500, "image input is not supported - hint: if this is unexpected, you may need "
                       "to provide the mmproj"),
    "lm-studio": (400, "Model does not support images. Please use a model that does."),
    "openrouter": (404, "No endpoints found that support image input"),
    "deepseek": (400, "Failed to deserialize: messages[1]: unknown variant `image_url`, expected "
                      "`text`"),
    "groq": (400, "messages[1].content must be a string"),
    "azure": (400, "This model does not support image inputs."),
    "unsupported": (422, "Unsupported content type 'image_url' for this deployment"),
}
OTHERS = {
    "broken": (400, "Invalid image: the data could not be decoded."),
    "large": (400, "The image exceeds the maximum size of 20 MB."),
    "form": (400, "bad request"),
    "format": (400, "The image format is not supported: use one of ['png', 'jpeg', 'webp']."),
    "type": (415, "The server does not support image/jpeg in this field, only supports image/png."),
    "resolution": (400, "This image resolution is not allowed for the model."),
}


@pytest.fixture(scope="module")
def servers():
    with start_llm_server(lengths=True) as llm, start_image_server() as images:
        yield llm, images


def refusing(status: int, words: str) -> dict:
    return {"fault": "refuses", "status": status, "says": words, "role": "inspector"}


def looked_at(llm) -> list[dict]:
    """The requests that carried an image."""
    return [one for one in llm.requests() if parts_of(one["json"], "image_url")]


SEEN = [Message(role="system", content="Look."),
        Message(role="user", content=fence("questions", "0. Is it red?"),
                images=(b"\xff\xd8\xff",))]


@pytest.mark.parametrize(("status", "words"), REFUSALS.values(), ids=list(REFUSALS))
async def test_a_server_that_refuses_images_is_named_and_not_asked_again(servers, status, words):
    llm, _ = servers
    llm.script([refusing(status, words)] * 9)
    chat = OpenAIChat(next(NAMES), base_url=llm.base_url, api_key="x")
    for _ in range(3):
        with pytest.raises(ProviderError, match=f"{chat.model} takes no images: ") as caught:
            await chat.reply(SEEN)
        assert words[:30] in str(caught.value) and not caught.value.paid
    assert len(looked_at(llm)) == 1
    assert (await chat.reply([Message(role="user", content="x")])).text


@pytest.mark.parametrize(("status", "words"), OTHERS.values(), ids=list(OTHERS))
async def test_a_refusal_of_one_image_is_no_blindness(servers, status, words):
    llm, _ = servers
    llm.script([refusing(status, words)])
    chat = OpenAIChat(next(NAMES), base_url=llm.base_url, api_key="x")
    with pytest.raises(ProviderError):
        await chat.reply(SEEN)
    assert (await chat.reply(SEEN)).text


async def test_a_blind_inspector_is_asked_once_and_the_run_goes_on(servers, tmp_path, caplog):
    llm, _ = servers
    llm.script([refusing(*REFUSALS["openai"])] * 99)
    eyes = OpenAIChat(next(NAMES), base_url=llm.base_url, api_key="x")
    pipeline = Pipeline(
        director(), director(), FakeImages(lambda request, number: picture(20 * number)),
        [FakeScorer()], inspector=eyes, repair_rounds=1, num_variations=2, plan=False,
        max_enhancement_iterations=0, max_concurrency=1)
    result = await pipeline.run(STORY, output_dir=tmp_path)
    assert len(looked_at(llm)) == 1
    assert caplog.text.count("takes no images") >= 1 and eyes.model in caplog.text
    for scene in result.scenes:
        assert len(scene.variations) == 2 and scene.reference_from == "ranked"
        for item in scene.variations:
            assert item.scores.overall is not None and item.inspection is None
            assert "takes no images" in item.scores.notes["checklist"]


def seen_by(llm, images, folder, monkeypatch) -> Pipeline:
    """Everything real but the servers; each repair gains, and leaves something to be repaired."""
    at, shop = llm.origin[7:], images.base_url[7:]
    table = {f"openai:{name} @ {at}": price for name, price in (
        ("boss", LARGE), ("critic", SMALL), ("eyes", SMALL), ("scales", LARGE))}
    table[f"replicate:google/nano-banana-2 @ {shop}"] = {"image": IMAGE}
    (folder / "prices.json").write_text(json.dumps(table))
    monkeypatch.setenv("REFIMG_PRICES", str(folder / "prices.json"))
    boss, critic, eyes, scales = (OpenAIChat(name, base_url=llm.base_url, api_key="x")
                                  for name in ("boss", "critic", "eyes", "scales"))
    return Pipeline(
        boss, critic, ReplicateImages(base_url=images.base_url, api_token="r8_x"), [],
        inspector=eyes, judge=scales, repair_rounds=2, num_variations=4, seed=3,
        max_concurrency=1, journal=Journal(folder / "journal.db"))


def told(right: int) -> dict:
    return {"fault": "content", "content": answers(6, right), "role": "inspector"}


async def test_the_bill_is_the_servers_and_the_highest_estimate_is_near(
    servers, tmp_path, monkeypatch
):
    llm, images = servers
    pipeline = seen_by(llm, images, tmp_path, monkeypatch)
    llm.script([told(right) for right in (3, 3, 3, 3, 4, 4, 5, 5)] * 2)
    images.script([{"body": b64encode(picture(40 + 10 * n)).decode()} for n in range(16)])
    before = len(images.predictions())
    high = pipeline.estimate(STORY)
    result = await pipeline.run(STORY, generation_id="bill", output_dir=tmp_path / "i")
    asked, drawn = llm.requests(), len(images.predictions()) - before
    prices = {"boss": LARGE, "critic": SMALL, "eyes": SMALL, "scales": LARGE}
    owed = IMAGE * drawn + sum(
        (prices[one["json"]["model"]][side] * one["usage"][kind]) / 1e6 for one in asked
        for side, kind in (("input", "prompt_tokens"), ("output", "completion_tokens")))
    assert result.cost == pytest.approx(owed) and drawn == high.images + high.edits == 16
    roles = [one["role"] for one in asked]
    counts = {"author": 2, "inspector": 16, "editor": 4, "judge": 4, "planner": 1, "critic": 8}
    assert {role: roles.count(role) for role in counts} == counts
    assert len(asked) == high.chat_calls and not high.unpriced
    assert abs(high.high / owed - 1) <= 0.05 and high.low < owed
    assert [scene.reference_from for scene in result.scenes] == ["repaired"] * 2

    again = await seen_by(llm, images, tmp_path, monkeypatch).run(
        STORY, generation_id="bill", output_dir=tmp_path / "i")
    assert len(llm.requests()) == len(asked) and len(images.predictions()) - before == drawn
    assert again.references == result.references


async def test_a_scorer_of_ones_own_is_found_blind_by_its_first_look(servers, tmp_path):
    llm, _ = servers
    llm.script([refusing(*REFUSALS["vllm"])] * 9)
    eyes = OpenAIChat(next(NAMES), base_url=llm.base_url, api_key="x")
    files = [tmp_path / f"{shade}.png" for shade in (9, 99)]
    for file in files:
        file.write_bytes(picture(int(file.stem)))
    scorer = ChecklistScorer(eyes)
    scored = [await score_images([file], "a red fox", scorers=[scorer]) for file in files]
    assert all("takes no images" in one.notes["checklist"] for one, in scored)
    assert len(looked_at(llm)) == 1
