"""Costs: every price has a source, no sum hides an unknown, no budget is passed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import random
import re
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from refimg.adapters import retry
from refimg.adapters.prices import (
    MAX_COMPLETION,
    PRICES,
    Price,
    PriceTable,
)
from refimg.adapters.retry import Account, Failure, ProviderError, RunLimits
from refimg.engine.costs import Budget, BudgetSpent, estimate
from refimg.engine.protocols import Call, ImageOrder
from refimg.engine.usage import expected_usage
from refimg.enhance import Message, Reply, Usage, read_fences
from refimg.generate import GeneratedImage, ImageRequest
from refimg.pipeline import Pipeline, Scene, Story
from refimg.sandbox.painter import Painter
from refimg.storage.journal import Journal
from tests.fakes import FakeChat, FakeImages, FakeScorer, critique, picture

ASK = [Message(role="user", content="a cat")]
REQUEST = ImageRequest(prompt="a cat", slot="s/v1/a1")
BANANA = 0.039
TABLE = PriceTable()


class Limited(FakeChat):
    takes_call = True


class Chat(Limited):
    def __init__(self, *script, name="gpt-5.4-mini", **kwargs):
        super().__init__(list(script), name=name, **kwargs)


def banana(script=None, **kwargs) -> FakeImages:
    return FakeImages(script, name="replicate:google/nano-banana", **kwargs)


# the table


def test_every_row_has_a_date_and_a_source():
    for name, row in PRICES.items():
        assert date.fromisoformat(row.date) >= date(2026, 9, 1), name
        assert re.match(r"[a-z.]+\.(com|ai)/", row.source), name
        assert row.image or row.megapixel or 0 < row.input < row.output, name


def test_no_row_is_of_a_model_that_the_sdk_does_not_know_or_says_will_end():
    openai = Path(importlib.util.find_spec("openai").origin).parent
    text = (openai / "types" / "shared" / "chat_model.py").read_text("utf-8")
    names, notes = text.split('"""Deprecated values', 1)
    for name, row in PRICES.items():
        if row.input is not None and not row.tokens:
            assert f'"{name}"' in names and f'"{name}"' not in notes, name


@pytest.mark.parametrize(("name", "known"), [
    ("gpt-5.5", True), ("openai:gpt-5.5", True), ("openai/gpt-5.5-2026-04-23", True),
    ("openai:gpt-5.5 @ localhost:11434", False), ("gpt-5.5-pro", False), ("", False),
    ("replicate:google/nano-banana", True), ("replicate/google/nano-banana", True),
    ("google/nano-banana-pro", True), ("black-forest-labs/flux-2-pro", True),
    ("runwayml/gen4-image-turbo", False), ("openai:gpt-image-2-2026-04-21", True),
])
def test_which_names_have_a_price(name, known):
    assert (TABLE.price_of(name) is not None) is known


def test_costs():
    usage = Usage(input_tokens=2_000_000, output_tokens=1_000)
    assert TABLE.chat_cost("gpt-5.4-mini", usage) == pytest.approx(1.5045)
    assert TABLE.chat_cost("gpt-5.4-mini", Usage(input_tokens=0, output_tokens=0)) == 0
    assert TABLE.image_cost(ImageOrder("google/nano-banana"), seconds=99) == BANANA


@pytest.mark.parametrize("cost", [
    TABLE.chat_cost("gpt-5.5", None),
    TABLE.chat_cost("llama", Usage(input_tokens=1, output_tokens=1)),
    TABLE.chat_cost("google/nano-banana", Usage(input_tokens=1, output_tokens=1)),
    TABLE.image_cost(ImageOrder("gpt-5.5")), TABLE.image_cost(ImageOrder("me/mine")),
])
def test_what_is_not_known_is_none_and_not_zero(cost):
    assert cost is None


def test_rows_of_the_user(tmp_path, monkeypatch):
    path = tmp_path / "prices.json"
    monkeypatch.setenv("REFIMG_PRICES", str(path))
    path.write_text(json.dumps({"gpt-5.5": {"input": 1, "output": 2}, "me/x": {"second": 0.01}}))
    assert TABLE.chat_cost("gpt-5.5", Usage(input_tokens=10**6, output_tokens=10**6)) == 3
    assert [TABLE.image_cost(ImageOrder("me/x"), seconds=n) for n in (2.5, None)] == [0.025, None]
    assert TABLE.rows()["gpt-5.4"] == PRICES["gpt-5.4"]
    path.write_text(json.dumps({"openai:qwen @ local": {"input": 0, "output": 0}}))
    assert TABLE.chat_cost("openai:qwen @ local", Usage(input_tokens=5, output_tokens=5)) == 0
    assert TABLE.price_of("me/x") is None


def test_the_sandbox_costs_nothing_before_a_run_and_after_it(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "1")
    sandbox = Pipeline.from_env(image_model=Painter(width=64), budget_usd=0.01, num_variations=2)
    story = Story(scenes=[Scene(prompt="A red fox in a forest")])
    told = sandbox.estimate(story)
    result = sandbox.run_sync(story, output_dir=tmp_path / "images")
    assert (told.low, told.high, told.unpriced, result.cost) == (0, 0, [], 0)
    assert len(result.scenes[0].variations) == 2
    for other in ("me/sandbox-painter", "openai:sandbox-agents @ example.com", "sandbox-x @ host"):
        assert TABLE.price_of(other) is None


@pytest.mark.parametrize("text", [
    None, "", "[]", '{"m": 3}', '{"m": {}}', '{"m": {"input": 1}}', '{"m": {"image": -1}}',
    '{"m": {"image": NaN}}', '{"m": {"image": 1, "second": 1}}', '{"m": {"imgae": 1}}',
    '{"m": {"input": 1, "image": 1}}',
])
def test_a_bad_price_file_is_a_value_error_that_names_it(tmp_path, monkeypatch, text):
    path = tmp_path / "prices.json"
    monkeypatch.setenv("REFIMG_PRICES", str(path))
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"REFIMG_PRICES must be .*, got '.*prices\.json'"):
        TABLE.price_of("m")


# a budget


@pytest.mark.parametrize("limit", [0, -1, math.inf, math.nan, "5", None, True])
def test_a_limit_is_a_number_above_zero(limit):
    with pytest.raises(ValueError, match="budget_usd must be"):
        Budget(limit, TABLE)


@pytest.mark.parametrize("name", ["llama", "gpt-5.5 @ localhost", "google/nano-banana"])
def test_a_chat_model_without_a_price_cannot_have_a_budget(name):
    with pytest.raises(ValueError, match=f"{name} has none by input"):
        Budget(1, TABLE).chat(Chat(name=name))


def test_an_image_model_without_a_price_cannot_have_a_budget():
    with pytest.raises(ValueError, match=r"gpt-5\.5 has none by image or second"):
        Budget(1, TABLE).images(FakeImages(name="gpt-5.5"))


async def test_the_whole_budget_can_be_spent_and_no_more():
    budget, model = Budget(3 * BANANA, TABLE), banana()
    paid = budget.images(model)
    for _ in range(3):
        await paid.generate(REQUEST)
    with pytest.raises(BudgetSpent, match=r"budget of 0\.117 USD is spent: 0\.1170 are gone"):
        await paid.generate(REQUEST)
    assert len(model.requests) == 3 and budget.spent == pytest.approx(0.117)


@pytest.mark.parametrize(("answer", "spent"), [
    (GeneratedImage(data=b"x"), BANANA), (GeneratedImage(data=b"x", cost=0.01), 0.01),
    (GeneratedImage(data=b"x", cost=0.0), 0.0),
])
async def test_an_image_costs_what_it_says_or_what_the_table_says(answer, spent):
    budget = Budget(1, TABLE)
    assert await budget.images(banana(lambda *_: answer)).generate(REQUEST) == answer
    assert (budget.spent, budget.reserved) == (spent, 0)


@pytest.mark.parametrize(("reply", "spent"), [
    (Reply(text="x", cost=0.5), 0.5),
    (Reply(text="x", usage=Usage(input_tokens=1000, output_tokens=100)), 0.0012),
    (Reply(text="x"), None),
])
async def test_a_reply_without_usage_is_charged_its_reservation(reply, spent):
    budget, held = Budget(1, TABLE), []

    def say(*_):
        held.append(budget.reserved)
        return reply

    assert await budget.chat(Limited(say, name="gpt-5.4-mini")).reply(ASK) == reply
    assert held[0] > MAX_COMPLETION * 4.5e-6 and budget.reserved == 0
    assert budget.spent == pytest.approx(held[0] if spent is None else spent)


@pytest.mark.parametrize(("error", "charged"), [
    (ProviderError("p", Failure("never", "400")), False),
    (ProviderError("p", Failure("again", "late", paid=True)), True),
    (RuntimeError("who knows"), True), (asyncio.CancelledError(), True),
])
async def test_what_a_failure_costs(error, charged):
    budget = Budget(1, TABLE)
    with pytest.raises(type(error)):
        await budget.images(banana(lambda *_: error)).generate(REQUEST)
    assert (budget.spent, budget.reserved) == (BANANA if charged else 0, 0)


async def test_a_call_waits_for_money_that_calls_in_flight_may_not_need():
    budget = Budget(0.1, TABLE)
    first = await budget.reserve(0.08)
    waiting = asyncio.create_task(budget.reserve(0.05))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    budget.settle(first, 0.02)
    assert await waiting and budget.reserved == 0.05


async def test_a_call_that_waits_in_vain_is_refused():
    budget = Budget(0.1, TABLE)
    first = await budget.reserve(0.08)
    waiting = [asyncio.create_task(budget.reserve(0.05)) for _ in range(3)]
    await asyncio.sleep(0.01)
    budget.settle(first, None)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [BudgetSpent] * 3


async def test_a_token_is_settled_once():
    budget = Budget(1, TABLE)
    token = await budget.reserve(0.1)
    budget.settle(token, 0.1)
    with pytest.raises(KeyError):
        budget.settle(token, 0.1)


async def test_an_answer_that_costs_more_than_was_held_is_charged_in_full():
    budget = Budget(0.05, TABLE)
    paid = budget.images(banana(lambda *_: GeneratedImage(data=b"x", cost=0.06)))
    await paid.generate(REQUEST)
    assert budget.spent == 0.06
    with pytest.raises(BudgetSpent):
        await paid.generate(REQUEST)


@pytest.mark.parametrize("seed", range(10))
async def test_32_calls_in_flight_never_pass_the_budget(seed):
    chance, spent = random.Random(seed), []
    budget = Budget(chance.uniform(0.1, 1), TABLE)

    async def work(request):
        await asyncio.sleep(chance.random() / 100)
        cost = chance.choice([BANANA, BANANA, chance.uniform(0, BANANA), None])
        spent.append(BANANA if cost is None else cost)
        assert budget.spent + budget.reserved <= budget.limit + 1e-9
        return GeneratedImage(data=b"x", cost=cost)

    model = banana()
    model.generate = work
    calls = [budget.images(model).generate(REQUEST) for _ in range(32)]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(end) for end in ends} <= {GeneratedImage, BudgetSpent}
    assert math.fsum(spent) == pytest.approx(budget.spent) and budget.spent <= budget.limit + 1e-9
    assert budget.reserved == 0
    assert len(spent) == 32 or budget.limit - budget.spent < BANANA


# retries are paid too


class Hanging:
    """An image model that answers late the first times, as a real adapter sees it."""

    name, max_references, takes_call = "google/nano-banana", 0, True

    def __init__(self, late: int):
        self.late, self.calls = late, 0

    async def generate(self, request, *, call=None):
        async def once():
            self.calls += 1
            await asyncio.sleep(9 if self.calls <= self.late else 0)
            return GeneratedImage(data=b"x")

        def read(error):
            return Failure("never", repr(error))

        return await Account("p").attempts(once, read, seconds=0.02, call=call)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(retry, "_BACKOFF", (0.001, 0.01))


async def test_an_attempt_that_was_late_is_charged_too(fast):
    budget, model = Budget(1, TABLE), Hanging(2)
    await budget.images(model).generate(REQUEST, call=Call(limits=RunLimits(100)))
    assert model.calls == 3 and budget.spent == pytest.approx(3 * BANANA)


async def test_a_retry_that_the_budget_does_not_allow_is_not_made(fast):
    budget, model = Budget(2 * BANANA, TABLE), Hanging(9)
    with pytest.raises(ProviderError, match="no answer within"):
        await budget.images(model).generate(REQUEST, call=Call(limits=RunLimits(100)))
    assert model.calls == 2 and budget.spent == pytest.approx(2 * BANANA)


async def test_what_the_journal_knows_is_not_paid_again(tmp_path):
    for spent in (BANANA, 0):
        budget, run = Budget(1, TABLE), {"output_dir": tmp_path, "generation_id": "run"}
        await Journal(tmp_path).images(budget.images(banana()), **run).generate(REQUEST)
        assert budget.spent == spent


# a whole run


def counted(messages, text: str) -> Reply:
    """A reply whose usage is counted from the texts, with 4.3 bytes a token."""
    read = sum(len(m.content.encode()) / 4.3 + 5 for m in messages)
    usage = Usage(input_tokens=round(read), output_tokens=round(len(text.encode()) / 4.3))
    return Reply(text=text, usage=usage)


def agents(seed: int):
    """A director and a critic that never come to an end, each answer of another length."""
    chance, rounds = random.Random(seed), Counter()

    def direct(messages, schema, number):
        words = chance.randint(60, 150)
        return counted(messages, " ".join(chance.choices(WORDS, k=words)))

    def judge(messages, schema, number):
        scene = read_fences(messages[-1].content)["original"]
        rounds[scene] += 1
        notes = [" ".join(chance.choices(WORDS, k=chance.randint(5, 15))) for _ in range(4)]
        said = " ".join(chance.choices(WORDS, k=chance.randint(15, 45)))
        text = critique(30 + 5 * rounds[scene], critique=said, improvements=notes)
        return counted(messages, text)

    return Limited(direct, name="openai:gpt-5.5"), Limited(judge, name="openai:gpt-5.4-mini")


WORDS = ("a", "the", "of", "harbour", "light", "keeper", "lens", "crimson", "weathered", "stone")


def story(scenes: int) -> Story:
    own = [Scene(prompt=f"Scene {k}: a keeper climbs the lighthouse stairs at dawn, fog below",
                 continuity_note="the same red coat") for k in range(scenes)]
    return Story(scenes=own, consistency_markers={"style": "watercolour", "mood": "calm"})


def budgeted(budget: Budget, seed: int = 1, script=None) -> Pipeline:
    director, critic = agents(seed)
    model = banana(script or (lambda request, number: picture(number)))
    return Pipeline(budget.chat(director), budget.chat(critic), budget.images(model),
                    [FakeScorer()], num_variations=4, max_enhancement_iterations=4)


@pytest.mark.parametrize("scenes", [1, 3, 8])
async def test_high_is_within_5_percent_of_the_ledger(tmp_path, scenes):
    budget, own = Budget(100, TABLE), story(scenes)
    result = await budgeted(budget, scenes).run(own, output_dir=tmp_path / "out")
    assert all(scene.enhancement.stop_reason == "max_iterations" for scene in result.scenes)
    told = budgeted(budget, scenes).estimate(own)
    assert told.low < told.high and told.chat_calls == 8 * scenes and told.images == 4 * scenes
    assert abs(told.high - budget.spent) <= 0.05 * budget.spent


@pytest.mark.parametrize("limit", [0.3, 0.6, 1.0])
async def test_a_run_out_of_money_ends_with_every_reference_and_says_so(tmp_path, limit):
    budget = Budget(limit, TABLE)
    result = await budgeted(budget).run(story(8), output_dir=tmp_path / "out")
    assert budget.spent <= limit and budget.reserved == 0
    assert len(result.references) == 8 and all(path.exists() for path in result.references)
    assert result.scenes[-1].reference_from == "carried"
    assert any("is spent" in warning for warning in result.scenes[-1].warnings)


USED = Usage(input_tokens=500, output_tokens=100), Usage(input_tokens=500, output_tokens=100)


def test_an_estimate_with_an_unknown_price_is_none():
    models = {"director": "gpt-5.5", "critic": "llama",
              "order": lambda *size: ImageOrder("me/x")}
    told = estimate([USED], [USED], chat_calls=4, images=[(0, 9)] * 4, prices=TABLE, **models)
    assert (told.low, told.high, told.unpriced) == (None, None, ["llama", "me/x"])
    assert (told.images, told.chat_calls) == (4, 4)


def test_an_estimate_without_agents_is_the_images():
    models = {"director": "llama", "critic": "llama",
              "order": lambda *size: ImageOrder("google/nano-banana")}
    told = estimate([USED] * 2, [USED] * 2, chat_calls=0, images=[(0, 9)] * 6, prices=TABLE,
                    **models)
    assert told.low == told.high == pytest.approx(6 * BANANA)
    assert (told.unpriced, told.chat_calls) == ([], 0)


def test_what_is_read_grows_with_rounds_prompt_and_context():
    def read(*args, **options):
        return sum(usage.input_tokens for usage in expected_usage(*args, **options))

    one = read("a cat", "", 1)
    assert read("a cat", "", 0) == 0 and read("a cat", "", 2) > 2 * one
    assert read("a cat", "", 1, negative=True) > one
    assert read("a cat" * 100, "", 1) >= one + 2 * 120
    assert read("a cat", "mood: calm\n" * 50, 1) >= one + 2 * 130


def test_the_reservation_is_an_upper_bound_of_what_is_read():
    text = "漢字🎬" * 100
    messages = [Message(role="user", content=text)]
    more = TABLE.most_for_chat("gpt-5.5", messages) - TABLE.most_for_chat("gpt-5.5", [])
    assert more * 1e6 / PRICES["gpt-5.5"].input >= 3 * len(text)


def test_an_unpriced_row_cannot_be_made():
    with pytest.raises(ValueError, match="must be input and output, image, megapixel or second"):
        Price(date="2026-11-23")
