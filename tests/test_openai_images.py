"""OpenAI's images through the real SDK and a real socket: what is sent, billed, refused, lost."""

from __future__ import annotations

import asyncio
import json
import random
import re
from itertools import product
from pathlib import Path

import pytest

from refimg import GenerationFailed, Pipeline, Scene, Story
from refimg.adapters import openai_server, retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.openai_images import OpenAIImages, image_size
from refimg.adapters.retry import ProviderError, Refused
from refimg.engine.costs import Budget, image_order
from refimg.engine.protocols import ImageRequest
from refimg.sandbox.agents import Critic, Director
from refimg.storage.images import decode_image
from tests.fakes import FakeScorer, critic, director, picture
from tests.sampling import sampled
from tests.servers.llm import start_llm_server

KEY = "sk-" + "t3st" * 6
ASKED = ImageRequest(prompt="a keeper under a lamp, in pale light")
BROKEN = ("lost", "cut", "no-base64", "html", "empty")  # drawn and billed, and no image came


@pytest.fixture(scope="module")
def shared():
    with start_llm_server() as server:
        yield server


@pytest.fixture
def server(shared, monkeypatch):
    """The server in OpenAI's place: its prices and its rules hold, and the one key is for it."""
    monkeypatch.setattr(openai_server, "_OPENAI", shared.base_url)
    monkeypatch.setattr(retry, "_BACKOFF", (0.01, 0.05))
    monkeypatch.setattr(retry, "_SPREAD", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    shared.script()
    return shared


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """References in the formats that users have, one of them under another format's name."""
    made = [tmp_path / name for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.png")]
    for k, (path, form) in enumerate(zip(made, ("PNG", "JPEG", "WEBP", "GIF", "JPEG"),
                                         strict=True)):
        decode_image(picture(k, size=(1800, 900))).save(path, form)
    return made


def drawn(server) -> list[dict]:
    """What arrived at the part of the server that draws."""
    return [request for request in server.requests() if request["role"] == "image"]


# what is sent


async def test_without_references_it_generates(server):
    made = await OpenAIImages().generate(ASKED)
    asked, = drawn(server)
    assert asked["path"] == "/v1/images/generations"
    assert asked["form"] == {"model": "gpt-image-2", "prompt": ASKED.prompt, "n": 1,
                             "size": "1536x864", "quality": "medium"}
    assert decode_image(made.data).size == (1536, 864) and made.seed is None
    assert made.cost == pytest.approx(asked["billed"], abs=1e-9)


async def test_references_are_true_jpegs_in_their_order(server, files):
    made = await OpenAIImages(inputs={"quality": "low"}).generate(
        ASKED.model_copy(update={"references": tuple(files), "aspect_ratio": "9:16"}))
    asked, = drawn(server)
    assert asked["path"] == "/v1/images/edits" and asked["files"] == ["image/jpeg"] * 5
    assert asked["form"] == {"model": "gpt-image-2", "prompt": ASKED.prompt, "n": "1",
                             "size": "864x1536", "quality": "low"}
    assert made.cost == pytest.approx(asked["billed"], abs=1e-9)


async def test_the_inputs_of_the_user_go_along(server):
    inputs = {"quality": "high", "output_format": "webp", "background": "opaque",
              "size": "2048x1152", "output_compression": 80}
    made = await OpenAIImages(inputs=inputs).generate(ASKED)
    assert inputs.items() <= drawn(server)[0]["form"].items()
    assert decode_image(made.data).size == (2048, 1152) and made.data[:4] == b"RIFF"


@pytest.mark.parametrize("ratio", ["16:9", "9:16", "1:1", "3:2", "2:3", "4:3", "3:4", "4:5", "5:4",
                                   "21:9", "2:1", "1:2", "3:1", "1:3", "17:10", "32:18"])
def test_every_size_has_its_ratio_exactly_and_keeps_the_rules(ratio):
    wide, high = map(int, ratio.split(":"))
    width, height = image_size(ratio)
    assert width * high == height * wide and not width % 16 and not height % 16
    assert 655_360 <= width * height <= 8_294_400


@pytest.mark.parametrize(("wrong", "told"), [
    ({"model": "gpt-5.5"}, "model must be an image model"),
    ({"inputs": {"n": 4}}, "got n"), ({"inputs": {"prompt": "x", "mask": "m"}}, "got mask, prompt"),
    ({"inputs": {"quality": "best"}}, "quality must be one of"),
    ({"inputs": {"output_format": "svg"}}, "output_format must be"),
    ({"inputs": {"background": "transparent", "output_format": "jpeg"}}, "output_format must be"),
    ({"inputs": {"input_fidelity": "high"}}, "input_fidelity must not"),
    ({"timeout": 0}, "timeout must be"), ({"base_url": "http://h/v1/images/edits"}, "base_url"),
])
def test_what_cannot_be_asked_is_refused_at_once(server, wrong, told):
    with pytest.raises(ValueError, match=told):
        OpenAIImages(**wrong)


@pytest.mark.parametrize(("inputs", "request_", "told"), [
    ({}, {"aspect_ratio": "4:1"}, "aspect_ratio must be"),
    ({}, {"aspect_ratio": "1000:999"}, "aspect_ratio must be"),
    ({"size": "1920x1080"}, {}, "divisible by 16"), ({"size": "auto"}, {}, "size must be"),
    ({"size": "1024x1024"}, {}, "size must be 16:9"),
    ({}, {"prompt": "x" * 32_001}, "at most 32000"),
    ({}, {"references": [Path("x.png")] * 17}, "at most 16"),
])
async def test_what_cannot_be_drawn_is_refused_unpaid(server, inputs, request_, told):
    model, asked = OpenAIImages(inputs=inputs), ASKED.model_copy(update=request_)
    with pytest.raises(ValueError, match=told):
        model.check_request(asked)
    with pytest.raises(ValueError, match=told):
        await model.generate(asked)
    assert not server.requests()


async def test_no_key_is_in_any_body(server, files):
    await OpenAIImages().generate(ASKED.model_copy(update={"references": tuple(files[:1])}))
    told = json.dumps([{**request, "headers": 0} for request in server.requests()])
    assert KEY not in told


# what goes wrong


@pytest.mark.parametrize("fault", ["429", "429-after", "429-ms", "500", "502", "503"])
async def test_what_made_no_image_is_asked_again(server, fault):
    server.script([{"fault": fault, "after": 0.05}])
    made = await OpenAIImages().generate(ASKED)
    assert [request["billed"] > 0 for request in drawn(server)] == [False, True]
    assert made.cost == pytest.approx(drawn(server)[1]["billed"])


@pytest.mark.parametrize("fault", [*BROKEN, "hang"])
async def test_what_is_billed_is_not_asked_again(server, fault):
    server.script([{"fault": fault, "seconds": 0.3 if fault == "hang" else 0}])
    with pytest.raises(ProviderError) as caught:
        await OpenAIImages(timeout=0.2 if fault == "hang" else 10).generate(ASKED)
    assert len(drawn(server)) == 1 and caught.value.paid and not caught.value.refused


@pytest.mark.parametrize(("fault", "kind"), [("401", "down"), ("quota", "down"), ("400", "never"),
                                             ("403", "never"), ("404", "never")])
async def test_what_will_not_mend_is_asked_once_and_costs_nothing(server, fault, kind):
    server.script([fault])
    with pytest.raises(ProviderError) as caught:
        await OpenAIImages().generate(ASKED)
    assert (caught.value.failure.kind, caught.value.paid) == (kind, False)
    assert len(drawn(server)) == 1 and KEY not in str(caught.value)


async def test_a_refusal_is_an_error_of_its_own(server):
    server.script(["blocked"])
    with pytest.raises(Refused, match="rejected by the safety system") as caught:
        await OpenAIImages().generate(ASKED)
    assert caught.value.refused and not caught.value.paid and len(drawn(server)) == 1


async def test_usage_that_is_absent_is_an_unknown_cost(server):
    server.script(["no-usage"])
    assert (await OpenAIImages().generate(ASKED)).cost is None


async def test_an_address_in_place_of_the_image_is_fetched(server):
    server.script(["address"])
    assert decode_image((await OpenAIImages().generate(ASKED)).data).size == (1536, 864)


async def test_a_slow_answer_is_waited_for(server):
    """300 s for a limit of 360 s, a hundred times as fast."""
    server.script([{"fault": "late", "seconds": 3.0}])
    assert (await OpenAIImages(timeout=3.6).generate(ASKED)).data


async def test_an_image_of_another_size_is_said_in_the_record(server, tmp_path):
    server.script(["other-size"])
    result = await story_of(1, server, num_variations=1).run(
        a_story(1), output_dir=tmp_path / "images")
    image = result.scenes[0].variations[0].image
    assert (image.width, image.height) == (864, 1536)


# a server of one's own


async def test_a_server_of_ones_own_gets_no_quality_and_any_model(shared):
    shared.script()
    model = OpenAIImages("tiny", base_url=shared.base_url, inputs={"steps": 4})
    with pytest.raises(ProviderError, match="Unknown parameter: 'steps'"):  # it arrived
        await model.generate(ASKED)
    assert "quality" not in model.inputs and model.name.startswith("openai:tiny @ 127.0.0.1")
    with pytest.raises(ValueError, match="has none by image"):
        Budget(1, model.prices).images(model)


# what it costs


SIZES = ["16:9", "9:16", "1:1", "3:2", "4:5", "21:9"]


@pytest.mark.parametrize(("ratio", "quality", "references"), sampled(
    list(product(SIZES, ["low", "medium", "high"], [0, 1, 2, 3])), 6))
async def test_the_price_before_is_the_bill_within_5_percent(server, tmp_path, ratio, quality,
                                                            references):
    """72 combinations; references are images that the model drew, as in a chain."""
    model = OpenAIImages(inputs={"quality": quality})
    paths = []
    for k in range(references):
        paths.append(tmp_path / f"{k}.png")
        decode_image(picture(k, size=image_size(ratio))).save(paths[-1])
    asked = ImageRequest(prompt="a keeper under a lamp, " * 30, aspect_ratio=ratio,
                         references=tuple(paths))
    order = image_order(model, ratio, references, len(asked.prompt))
    made = await model.generate(asked)
    billed = drawn(server)[0]["billed"]
    assert made.cost == pytest.approx(billed, abs=1e-9)
    assert model.prices.image_cost(order) == pytest.approx(billed, rel=0.05)
    assert billed <= model.prices.most_for_image(order)


# stories


def a_story(scenes: int) -> Story:
    return Story(scenes=[Scene(prompt=f"a keeper under a lamp, view {n}") for n in range(scenes)])


def story_of(scenes: int, server, **settings) -> Pipeline:
    plain = {"max_enhancement_iterations": 0, "director": director(), "critic": critic(),
             "image_model": OpenAIImages(inputs={"quality": "low"}), "scorers": [FakeScorer()],
             "num_variations": 2}
    return Pipeline(**plain | settings)


@pytest.mark.parametrize("point", sampled(list(range(20)), 9))
async def test_a_cut_connection_is_charged_and_said(server, tmp_path, point):
    """The server bills and then cuts, at one of 20 images of a story."""
    fault = BROKEN[point % 2]
    server.script([None] * point + [fault])
    run = story_of(10, server, budget_usd=20.0, chain="none", director=Director(), critic=Critic())
    result = await run.run(a_story(10), output_dir=tmp_path / "images")
    assert len(result.references) == 10 and len(drawn(server)) == 20
    lost = [scene for scene in result.scenes if len(scene.variations) == 1]
    assert len(lost) == 1 and any("could not be drawn" in told for told in lost[0].warnings)
    assert result.cost is None  # what the lost one cost is not known
    billed = sum(request["billed"] for request in drawn(server))
    assert billed > 0


async def test_a_budget_is_charged_for_what_was_cut(server):
    server.script(["lost"])
    model = OpenAIImages(inputs={"quality": "low"})
    budget = Budget(5, model.prices)
    with pytest.raises(ProviderError):
        await budget.images(model).generate(ASKED)
    held = budget.spent
    assert held >= drawn(server)[0]["billed"] and budget.reserved == 0
    await budget.images(model).generate(ASKED)
    assert budget.spent - held == pytest.approx(drawn(server)[1]["billed"])


async def test_one_key_runs_a_story(server, tmp_path, monkeypatch):
    """Agents and images by one key: the cost is what the server bills, to the cent and below."""
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    run = Pipeline.from_env(scorers=[FakeScorer()], num_variations=2, journal=None,
                            max_enhancement_iterations=1, plan=False)
    assert [model.name for model in (run.director, run.critic, run.image_model)] == [
        "openai:gpt-5.5", "openai:gpt-5.4-mini", "openai:gpt-image-2"]
    result = await run.run(a_story(3), output_dir=tmp_path / "images")
    requests = server.requests()
    assert len(result.references) == 3 and result.sandbox is False
    paths = [request["path"] for request in requests]
    assert paths.count("/v1/images/generations") == 2 and paths.count("/v1/images/edits") == 4
    assert result.cost == pytest.approx(bill(requests), abs=1e-6)


def bill(requests: list[dict]) -> float:
    """What the server charges for these requests, in USD."""
    chat, charged = {"gpt-5.5": (5, 30), "gpt-5.4-mini": (0.75, 4.5)}, 0.0
    for request in requests:
        charged += request.get("billed") or 0.0
        if request["role"] != "image" and (usage := request["usage"]):
            read, written = chat[request["json"]["model"]]
            charged += (usage["prompt_tokens"] * read + usage["completion_tokens"] * written) / 1e6
    return charged


STORIES = Path(__file__).resolve().parents[2] / "shared/data/prompts/stories"
names = sorted(path.stem for path in STORIES.glob("*.json")) or ["none"]


@pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared/data/prompts/stories here")
@pytest.mark.parametrize("name", sampled(names, 8))
async def test_stories_of_others_by_one_key_with_15_percent_faults(server, tmp_path, name):
    """As many references as scenes, true types, no key in a body, and the cost is the bill."""
    chance = random.Random(name)
    free = {"image": ("429", "500", "503", "blocked"), "director": ("429", "500", "503"),
            "critic": ("429", "500", "503")}  # nothing is charged for these
    server.script([{"fault": chance.choice(free[role]) if chance.random() < 0.15 else None,
                    "role": role} for _ in range(60) for role in free])
    scenes = json.loads((STORIES / f"{name}.json").read_text("utf-8"))["scenes"]
    frames = [shot["first_frame"] for scene in scenes for shot in scene["shots"]][:4]
    story = Story(scenes=[Scene(prompt=frame) for frame in frames])
    run = Pipeline.from_env(scorers=[FakeScorer()], num_variations=2, journal=None,
                            max_enhancement_iterations=2, plan=False)
    result = await run.run(story, output_dir=tmp_path / "images")
    requests = server.requests()
    assert len(result.references) == len(story.scenes)
    assert all(decode_image(path.read_bytes()).size == (1536, 864) for path in result.references)
    assert {kind for each in drawn(server) for kind in each.get("files", ())} == {"image/jpeg"}
    assert not any(KEY in str(each.get("body", "")) for each in requests)
    assert any(each["fault"] for each in requests)
    assert result.cost == pytest.approx(bill(requests), abs=1e-6)


FAULTS = ["429", "500", "blocked", "lost", "cut", "no-base64", "empty", "503", "no-usage"]


@pytest.mark.parametrize("seed", sampled(list(range(12)), 6))
async def test_as_many_references_come_out_whatever_fails(server, tmp_path, seed):
    """About 15 % of all calls fail, each in its own way."""
    chance = random.Random(seed)
    server.script([{"fault": chance.choice(FAULTS) if chance.random() < 0.15 else None,
                    "role": "image"} for _ in range(80)])
    result = await story_of(5, server).run(a_story(5), output_dir=tmp_path / "images")
    assert len(result.references) == 5 and all(path.is_file() for path in result.references)
    mime = {kind for request in drawn(server) for kind in request.get("files", ())}
    assert mime <= {"image/jpeg"}


async def test_a_refused_prompt_is_reworded_once_and_said(server, tmp_path):
    server.script([{"fault": "blocked", "role": "image", "text": "bleeds"}] * 9)
    chat = OpenAIChat("gpt-5.5")
    story = Story(scenes=[Scene(prompt="A keeper bleeds by his lamp")])
    result = await story_of(1, server, director=chat).run(story, output_dir=tmp_path / "images")
    prompts = [request["form"]["prompt"] for request in drawn(server) if request.get("form")]
    asked = [request for request in server.requests() if request["role"] == "reworder"]
    assert len(asked) == 1 and "safety system" in asked[0]["body"]
    assert len(drawn(server)) == 4
    assert set(prompts) == {"A keeper rests by his lamp, in pale light."}
    scene = result.scenes[0]
    assert scene.sent_prompt == prompts[0] and scene.reference_from == "ranked"
    assert any("refused the prompt" in told and "anew" in told for told in scene.warnings)
    billed = sum(request["billed"] for request in drawn(server))
    words = (100 * 5 + 20 * 30) / 1e6  # of the director; what was refused is not billed
    assert result.cost == pytest.approx(billed + words)


async def test_the_same_text_is_never_sent_again_after_a_refusal(server, tmp_path):
    """The other words are refused too: one image of the original is what is left, if it differs."""
    server.script([{"fault": "blocked", "role": "image"}] * 50)
    story = Story(scenes=[Scene(prompt="A keeper bleeds by his lamp")])
    with pytest.raises(GenerationFailed):
        await story_of(1, server, director=OpenAIChat("gpt-5.5")).run(
            story, output_dir=tmp_path / "images")
    assert len(drawn(server)) == 4  # the prompt twice, the other words twice; the original is known


async def test_all_refused_is_a_failure_with_its_reason(server, tmp_path):
    server.script([{"fault": "blocked", "role": "image"}] * 50)
    with pytest.raises(GenerationFailed, match="rejected by the safety system"):
        await story_of(1, server).run(a_story(1), output_dir=tmp_path / "images")
    assert re.match("sk-", KEY) and asyncio.get_running_loop()
