"""Stories through the real pipeline on bad days, and budgets, counted where money is asked for."""

from __future__ import annotations

import asyncio
import json

import pytest

from refimg import GenerationCancelled, Pipeline, Scene, Story
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from refimg.generate import GenerationFailed
from refimg.storage.journal import Journal
from tests import bad_days
from tests.sampling import sampled
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

FLUX = "black-forest-labs/flux-2-pro"
CHAT, IMAGE = {"input": 5, "output": 30}, 0.039


@pytest.mark.slow
@pytest.mark.parametrize(("stories", "kinds"), [
    (10, 10), pytest.param(500, 60, marks=pytest.mark.all),
])
def test_on_bad_days_every_promise_is_kept(capsys, stories, kinds):
    found = bad_days.spend_all(seed=7, stories=stories, each=min(stories, 125))
    with capsys.disabled():
        print(f"\n{found.stories} stories, {dict(found.ends)}, {sum(found.faults.values())} faults "
              f"of {len(found.faults)} kinds: {dict(found.faults.most_common())}")
    assert (found.failures, found.leaks, found.orphans) == ([], [], [])
    assert found.overspend == 0 and found.stories == sum(found.ends.values()) == stories
    assert set(found.ends) == {"done", "cancelled", "failed"} and found.ends["done"] > stories / 3
    assert len(found.faults) > kinds and found.pictures > 1.2 * stories


@pytest.fixture(scope="module")
def llm():
    with start_llm_server(lengths=True) as server:
        yield server


@pytest.fixture(scope="module")
def images():
    with start_image_server() as server:
        yield server


@pytest.fixture
def servers(llm, images, tmp_path, monkeypatch):
    """Both servers with nothing wrong, and prices for what they have."""
    llm.script()
    images.script()
    names = [f"openai:gpt @ {llm.origin[7:]}", f"replicate:{FLUX} @ {images.base_url[7:]}"]
    table = dict(zip(names, [CHAT, {"image": IMAGE}], strict=True))
    (tmp_path / "prices.json").write_text(json.dumps(table), "utf-8")
    monkeypatch.setenv("REFIMG_PRICES", str(tmp_path / "prices.json"))
    return llm, images


def pipeline(servers, **settings) -> Pipeline:
    llm, images = servers
    chat = OpenAIChat("gpt", base_url=llm.base_url, api_key=bad_days.KEYS[0])
    drawn = ReplicateImages(FLUX, base_url=images.base_url, api_token=bad_days.KEYS[1])
    return Pipeline(director=chat, critic=chat, image_model=drawn, scorers=[], seed=3, **settings)


def story(scenes: int) -> Story:
    """Scenes of a sentence each, all in one style."""
    prompts = [f"Scene {n}: a keeper in a red coat mends a lamp" for n in range(1, scenes + 1)]
    markers = {"style": "watercolour", "mood": "quiet"}
    return Story(scenes=[Scene(prompt=p) for p in prompts], consistency_markers=markers)


def ledger(servers) -> float:
    """The USD that both servers would ask for since their script was set."""
    llm, images = servers
    used = [asked["usage"] for asked in llm.requests() if asked["usage"]]
    chats = sum(u["prompt_tokens"] * CHAT["input"] + u["completion_tokens"] * CHAT["output"]
                for u in used) / 1e6
    return chats + IMAGE * len(images.requests("create"))


def paid_calls(servers) -> int:
    return len(servers[0].requests()) + len(servers[1].requests("create"))


async def test_the_high_estimate_is_what_a_run_of_all_rounds_costs(servers, tmp_path):
    p = pipeline(servers, chain="none", budget_usd=50)
    high = p.estimate(story(8)).high
    result = await p.run(story(8), output_dir=tmp_path / "images")
    assert paid_calls(servers) == 8 * (2 * 4 + 4)
    assert ledger(servers) == pytest.approx(result.cost)
    print(f"estimate {high:.4f}, ledger {ledger(servers):.4f} USD")
    assert high == pytest.approx(ledger(servers), rel=0.05)


@pytest.mark.parametrize("budget", sampled([0.5, 0.8, 1.1], 3))
@pytest.mark.parametrize("chain", ["none", "previous"])
async def test_a_budget_is_never_passed_and_what_it_does_not_reach_is_carried(
    servers, tmp_path, budget, chain
):
    p = pipeline(servers, chain=chain, budget_usd=budget)
    result = await p.run(story(8), output_dir=tmp_path / "images")
    assert budget / 2 < ledger(servers) <= budget
    assert len(result.references) == 8 and all(path.is_file() for path in result.references)
    carried = [scene for scene in result.scenes if scene.reference_from == "carried"]
    assert carried
    for scene in carried:
        assert "is spent" in str(scene.warnings) and "stands in" in scene.warnings[-1]


async def test_a_picture_that_is_lost_on_the_way_is_charged(servers, tmp_path):
    servers[1].script(["aborted", "gone", "gone", "canceled", "canceled"])  # the first is free
    p = pipeline(servers, num_variations=1, max_enhancement_iterations=0, budget_usd=4.5 * IMAGE)
    with pytest.raises(GenerationFailed, match="is spent"):
        await p.run(story(2), output_dir=tmp_path / "images")
    assert len(servers[1].requests("create")) == 5


async def test_an_unchanged_second_run_pays_nothing(servers, tmp_path):
    paths = []
    for expected in (2 * (2 * 2 + 2), 0):
        for server in servers:
            server.script()
        p = pipeline(servers, num_variations=2, max_enhancement_iterations=2,
                     journal=Journal(tmp_path / "journal"))
        result = await p.run(story(2), generation_id="again", output_dir=tmp_path / "images")
        paths.append((result.references, [v.image for s in result.scenes for v in s.variations]))
        assert paid_calls(servers) == expected
    assert paths[0][0] == paths[1][0]
    assert [image.sha256 for image in paths[0][1]] == [image.sha256 for image in paths[1][1]]
    assert len(list((tmp_path / "images").iterdir())) == 4


async def test_a_run_can_be_stopped_while_it_asks_what_a_model_takes(servers, tmp_path):
    servers[1].script([{"on": "model", "fault": "hang", "seconds": 20}])
    stop = asyncio.get_running_loop().time() + 0.3
    check = lambda: asyncio.get_running_loop().time() > stop  # noqa: E731
    with pytest.raises(GenerationCancelled):
        async with asyncio.timeout(5):
            await pipeline(servers).run(story(1), output_dir=tmp_path, cancellation_check=check)
    assert servers[1].requests("model") and paid_calls(servers) == 0


async def test_a_known_model_is_used_where_it_cannot_be_asked(servers, tmp_path):
    servers[1].script([{"on": "model", "fault": "404"}])
    p = pipeline(servers, num_variations=1, max_enhancement_iterations=0)
    result = await p.run(story(1), output_dir=tmp_path)
    assert len(result.scenes[0].variations) == 1


async def test_a_wrong_token_ends_the_run_before_anything_is_paid(servers, tmp_path):
    servers[1].script([{"on": "model", "fault": "401"}])
    with pytest.raises(GenerationFailed, match="does not say what it takes") as caught:
        await pipeline(servers).run(story(1), output_dir=tmp_path)
    assert not bad_days.leaking(str(caught.value).encode()) and paid_calls(servers) == 0
