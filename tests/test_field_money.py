"""Budgets hold in the provider's own ledger, or a run is refused before anything is paid."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from itertools import count

import pytest

from refimg import GenerationFailed, Pipeline, Scene, Story
from refimg.adapters import prices, retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.prices import MAX_COMPLETION, PriceTable
from refimg.adapters.replicate import ReplicateImages
from refimg.engine.costs import Budget, BudgetSpent
from refimg.engine.protocols import ImageRequest, Message, Reply, Usage
from refimg.storage.journal import Journal

from .fakes import FakeChat, FakeImages, FakeScorer, critic, director, picture
from .money import TOO_LARGE, Case, hurried, made, settle
from .sampling import sampled
from .servers.images import start_image_server
from .servers.llm import start_llm_server

BANANA, TABLE = 0.039, PriceTable()
ASK = [Message(role="user", content="a cat")]
TOKENS, IMAGE = {"input": 5.0, "output": 30.0}, {"image": 0.04}
NUMBERS = count(100)
LONG = {"long": True, "match": "money"}


@pytest.fixture(scope="module")
def servers():
    with start_llm_server() as llm, start_image_server() as images:
        yield llm, images


def case(**over) -> Case:
    """A case of its own number."""
    own = {"number": next(NUMBERS), "budget": 1.0, "chat": TOKENS, "image": IMAGE}
    return Case(**own | over)


# the servers' ledgers


@pytest.mark.parametrize("faults", [
    [LONG] * 40,
    [LONG | {"fault": "no-usage"}] * 40,
    [LONG | {"fault": "500"}] * 40,
    [LONG | {"fault": "hang", "seconds": 1.2}] * 40,
    [LONG | {"fault": "reset"}] * 40,
    [{"fault": "400-limit", "match": "max_completion_tokens"}] * 40 + [LONG] * 40,
], ids=["long", "no-usage", "500", "hang", "reset", "another-limit"])
def test_answers_that_are_billed_at_their_most_stay_within_the_cap(servers, faults):
    bill = settle(case(faults=faults), *servers)
    assert bill.chat > 0 and bill.chat + bill.images <= 1


@pytest.mark.parametrize("fault", [None, "failed", "lost", "500-made"])
def test_predictions_priced_by_the_second_are_cancelled_within_the_cap(servers, fault):
    faults = [{"fault": fault, "takes": 3.0, "match": "money"}] * 40
    bill = settle(case(chat={"input": 0.1, "output": 0.4}, image={"second": 0.2},
                       image_faults=faults), *servers)
    assert bill.images > 0 and bill.chat + bill.images <= 1


@pytest.mark.parametrize("number", sampled(range(6), 2))
def test_random_prices_and_servers_stay_within_the_cap(servers, number):
    bill = settle(made(7, number), *servers)
    assert bill.calls and bill.over == 0


def test_all_stories_together_and_all_their_runs_stay_within_one_cap(servers):
    many = case(stories=3, runs=3, budget=0.5, faults=[LONG] * 9)
    bill = settle(many, *servers)
    assert bill.calls > 3 and bill.over == 0


# what goes along with a call


async def asked(servers, monkeypatch, tmp_path, faults, budget=True) -> tuple[list[dict], object]:
    """The bodies that a chat server saw of one call, and the answer or error."""
    llm, _ = servers
    (tmp_path / "prices.json").write_text(json.dumps({f"openai:m @ {llm.origin[7:]}": TOKENS}))
    monkeypatch.setenv("REFIMG_PRICES", str(tmp_path / "prices.json"))
    monkeypatch.setattr("refimg.adapters.openai._limits", {}, raising=False)
    llm.script(faults)
    chat = OpenAIChat("m", base_url=llm.base_url, api_key="x")
    model = Budget(9, PriceTable()).chat(chat) if budget else chat
    ends = await asyncio.gather(model.reply(ASK), return_exceptions=True)
    return [one["json"] for one in llm.requests()], ends[0]


@pytest.mark.parametrize(("faults", "sent"), [
    ([], [("max_completion_tokens", MAX_COMPLETION)]),
    (["400-limit"], [("max_completion_tokens", MAX_COMPLETION), ("max_tokens", MAX_COMPLETION)]),
    ([{"fault": "400-limit", "says": TOO_LARGE}],
     [("max_completion_tokens", MAX_COMPLETION), ("max_completion_tokens", MAX_COMPLETION // 2)]),
])
async def test_a_call_from_a_budget_carries_its_limit_by_a_name_and_size_that_the_server_takes(
    servers, monkeypatch, tmp_path, faults, sent
):
    bodies, answer = await asked(servers, monkeypatch, tmp_path, faults)
    limits = [(name, body[name]) for body in bodies for name in body if name.startswith("max_")]
    assert isinstance(answer, Reply) and limits == sent


async def test_a_server_that_takes_no_limit_is_not_asked_without_one(
    servers, monkeypatch, tmp_path
):
    bodies, error = await asked(servers, monkeypatch, tmp_path, ["400-limit"] * 9)
    assert len(bodies) == 2 and "max_completion_tokens" in str(error)


async def test_without_a_budget_no_limit_is_sent(servers, monkeypatch, tmp_path):
    bodies, _ = await asked(servers, monkeypatch, tmp_path, [], budget=False)
    assert not [name for body in bodies for name in body if name.startswith("max_")]


def test_an_answer_cut_by_its_limit_is_a_lost_iteration_and_never_the_prompt(servers):
    llm, images = servers
    cut = case(budget=9.0, faults=[LONG] * 40)
    bill = settle(cut, llm, images)
    prompts = {one["input"]["prompt"] for one in images.predictions()
               if cut.tag in one["input"]["prompt"]}
    assert bill.calls > 3 and not [text for text in prompts if "Version" in text]


# what has no bound


def test_a_model_that_cannot_be_given_a_limit_has_no_budget(tmp_path, monkeypatch):
    table = {"me/x": {"second": 0.01}}
    (tmp_path / "prices.json").write_text(json.dumps(table))
    monkeypatch.setenv("REFIMG_PRICES", str(tmp_path / "prices.json"))
    with pytest.raises(ValueError, match=r"budget_usd must be None for gpt-5\.5"):
        Budget(1, TABLE).chat(FakeChat(name="gpt-5.5"))
    with pytest.raises(ValueError, match="budget_usd must be None for me/x"):
        Budget(1, TABLE).images(FakeImages(name="me/x"))
    Budget(1, TABLE).images(FakeImages(name="google/nano-banana"))


SIZED = [{"resolution": "8K"}, {"quality": "high"}, {"megapixels": "2"}, {"output_resolution": 2},
         {"size": "4K"}, {"image_size": "4K"}, {"width": 4096}, {"output_megapixels": "4"}]


@pytest.mark.parametrize("inputs", SIZED, ids=[*map(str, SIZED)])
async def test_a_price_of_the_defaults_is_not_that_of_another_size(tmp_path, monkeypatch, inputs):
    monkeypatch.setattr(ReplicateImages, "load", lambda self, call=None: asyncio.sleep(0))
    (named,), agent = inputs, FakeChat(name="gpt-5.5")
    agent.takes_call = True
    model = ReplicateImages("google/nano-banana-2", api_token="x", inputs=inputs)
    run = Pipeline(agent, agent, model, [], num_variations=1, budget_usd=9,
                   max_enhancement_iterations=0)
    told = run.estimate(Story(scenes=[Scene(prompt="a")]))
    assert told.low is None and told.unpriced == [f"{model.name} with own {named}"]
    with pytest.raises(ValueError, match=f"nano-banana-2 with own {named} has none by image"):
        await run.run(Story(scenes=[Scene(prompt="a")]), output_dir=tmp_path / "o")
    assert model.name == "replicate:google/nano-banana-2"
    (tmp_path / "prices.json").write_text(json.dumps({"google/nano-banana-2": {"image": 0.151}}))
    monkeypatch.setenv("REFIMG_PRICES", str(tmp_path / "prices.json"))
    assert run.estimate(Story(scenes=[Scene(prompt="a")])).low == 0.151
    assert Budget(1, PriceTable()).images(model).name == model.name


@pytest.mark.parametrize("inputs", [{}, {"output_format": "png"}, {"output_quality": 90}])
def test_what_changes_no_size_changes_no_price(inputs):
    model = ReplicateImages("google/nano-banana-2", api_token="x", inputs=inputs)
    run = Pipeline(director(), critic(), model, [], num_variations=1, max_enhancement_iterations=0)
    assert run.estimate(Story(scenes=[Scene(prompt="a")])).low == 0.067
    Budget(1, TABLE).images(model)


@pytest.mark.parametrize("inputs, cost", [({}, 0.067), ({"width": 512}, None)])
async def test_an_image_of_another_size_has_no_cost_rather_than_a_wrong_one(
    servers, monkeypatch, inputs, cost
):
    model = ReplicateImages("lab/portrait", base_url=servers[1].base_url, api_token="x",
                            inputs=inputs)
    monkeypatch.setitem(prices.PRICES, model.name, prices.Price(image=0.067))
    made = await model.generate(ImageRequest(prompt="a keeper", aspect_ratio="1:1"))
    assert made.cost == cost


async def test_a_model_that_ignores_its_limit_is_not_called_again():
    usage = Usage(input_tokens=10, output_tokens=128_000)
    model = FakeChat([Reply(text="a", usage=usage)], name="gpt-5.5")
    model.takes_call = True
    budget = Budget(100, TABLE)
    paid = budget.chat(model)
    await paid.reply(ASK)
    with pytest.raises(BudgetSpent, match="keeps no limit"):
        await paid.reply(ASK)
    assert len(model.calls) == 1 and budget.spent == pytest.approx(128_000 * 30e-6 + 10 * 5e-6)


@pytest.mark.parametrize("row", [
    {"image": True}, {"image": "0.04"}, {"image": -1}, {"token": 1}, {"second": float("nan")},
    {"input": float("inf"), "output": 1}, {"input": 1, "output": 1, "second": 1},
])
def test_a_price_that_is_no_number_of_usd_or_of_no_known_unit_is_refused(
    tmp_path, monkeypatch, row
):
    (tmp_path / "prices.json").write_text(json.dumps({"m": row}))
    monkeypatch.setenv("REFIMG_PRICES", str(tmp_path / "prices.json"))
    with pytest.raises(ValueError, match="REFIMG_PRICES must be"):
        PriceTable()


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
async def test_a_cost_that_cannot_be_is_charged_by_reservation(cost):
    budget = Budget(1, TABLE)
    token = await budget.reserve(0.25)
    budget.settle(token, cost)
    assert (budget.spent, budget.reserved) == (0.25, 0)


# many stories, and runs that are resumed


def drawn(tmp_path, **options) -> tuple[Pipeline, FakeImages]:
    """A pipeline whose images have a price, and its image model."""
    images = FakeImages(lambda *_: picture(9), name="replicate:google/nano-banana")
    agents = {"director": director(), "critic": critic(90)}
    for agent in agents.values():
        agent.name, agent.takes_call = "gpt-5.4-mini", True
    options = {"num_variations": 1, "max_enhancement_iterations": 0, "quality_threshold": 0,
               "scorers": [FakeScorer()], "journal": Journal(tmp_path / "journal")} | options
    return Pipeline(image_model=images, **agents, **options), images


TOLD = [Story(scenes=[Scene(prompt=f"a keeper, {n}")]) for n in range(5)]


async def many(pipeline: Pipeline, tmp_path, stories=TOLD, **options) -> list[str]:
    where = {"generation_id": "m", "output_dir": tmp_path / "out"} | options
    return [type(one).__name__ async for one in pipeline.run_many(stories, **where)]


async def test_one_budget_caps_all_stories(tmp_path):
    pipeline, images = drawn(tmp_path, journal=None)
    ends = await many(pipeline, tmp_path, budget_usd=2 * BANANA)
    assert len(images.requests) == 2 and sorted(ends) == ["StoryFailure"] * 3 + ["StoryResult"] * 2


async def test_the_budget_of_each_story_holds_beside_that_of_all(tmp_path):
    pipeline, images = drawn(tmp_path, journal=None, num_variations=2, budget_usd=BANANA)
    ends = await many(pipeline, tmp_path, budget_usd=3 * BANANA)
    assert len(images.requests) == 3 and ends.count("StoryResult") == 3


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), True, "1"])
def test_a_budget_for_all_that_is_none_is_refused_at_once(tmp_path, wrong):
    with pytest.raises(ValueError, match="budget_usd must be a number of USD above 0"):
        drawn(tmp_path)[0].run_many(TOLD, budget_usd=wrong)


async def test_many_stories_that_are_resumed_go_on_from_what_they_have_spent(tmp_path):
    drew = []
    for _ in range(5):
        pipeline, images = drawn(tmp_path)
        ends = await many(pipeline, tmp_path, budget_usd=2 * BANANA)
        drew.append(len(images.requests))
        assert ends.count("StoryResult") == 2
    assert drew == [2, 0, 0, 0, 0]


async def test_a_run_that_is_resumed_goes_on_from_what_it_has_spent(tmp_path):
    drew, lost = [], iter([None, RuntimeError("lost"), *[None] * 9])
    for _ in range(3):
        pipeline, images = drawn(tmp_path, num_variations=3, budget_usd=3 * BANANA)
        images.script = lambda *_: next(lost) or picture(9)
        await pipeline.run(TOLD[0], generation_id="r", output_dir=tmp_path / "out")
        drew.append(len(images.requests))
    assert drew == [3, 0, 0]
    other = await pipeline.journal.spent(output_dir=tmp_path / "out", generation_id="s")
    spent = await pipeline.journal.spent(output_dir=tmp_path / "out", generation_id="r")
    assert (other, spent) == (0, pytest.approx(3 * BANANA))


async def test_what_an_earlier_run_without_a_budget_paid_counts_too(tmp_path):
    where = {"generation_id": "r", "output_dir": tmp_path / "out"}
    chat = FakeChat([Reply(text="a", cost=0.5)], name="gpt-5.4-mini")
    await Journal(tmp_path / "journal").chat(chat, scene=1, role="director", **where).reply(ASK)
    pipeline, images = drawn(tmp_path, budget_usd=0.51)
    with pytest.raises(GenerationFailed, match=r"0\.5000 are gone"):
        await pipeline.run(TOLD[0], **where)
    assert not images.requests


async def test_a_call_that_was_under_way_at_a_kill_counts_at_its_most(tmp_path):
    journal, where = Journal(tmp_path), {"generation_id": "r", "output_dir": tmp_path}
    told = {"spent": partial(journal.spent, **where), "book": partial(journal.book, **where)}
    await Budget(1, TABLE, **told).reserve(0.25)
    again = Budget(1, TABLE, **told)
    assert await again.reserve(0.1) and again.spent == 0.25


def test_time_is_scaled_only_while_a_case_is_played():
    before = prices.MAX_SECONDS, retry._BACKOFF
    with hurried():
        assert before != (prices.MAX_SECONDS, retry._BACKOFF)
    assert before == (prices.MAX_SECONDS, retry._BACKOFF)
