"""A story without markers is planned before its agents begin, in one call, or told why not."""

from __future__ import annotations

import asyncio
import json

import pytest

from refimg.enhance import Reply
from refimg.generate import GeneratedImage
from refimg.pipeline import GenerationCancelled, Pipeline, Scene, Story, StoryResult
from refimg.storage.journal import Journal

from .fakes import FakeChat, FakeImages, FakeScorer, critic, critique, picture

PLAN = {"style": "ink drawing", "color_palette": "blue and white"}


def director(*plans: object) -> FakeChat:
    """Answers with these plans, one after another, and to all else with a prompt."""
    left = list(plans)

    def write(messages, schema, number):
        if schema is None or schema.__name__ != "Plan":
            return "a better prompt"
        answer = left.pop(0)
        return answer if isinstance(answer, (str, Exception)) else json.dumps(answer)

    return FakeChat(write, name="a-director")


def planned_calls(chat: FakeChat) -> list[int]:
    """At which of its calls the director was asked for a plan."""
    asked = [schema is not None and schema.__name__ == "Plan" for _, schema in chat.calls]
    return [number for number, is_plan in enumerate(asked) if is_plan]


def pipeline(chat: FakeChat, **settings) -> Pipeline:
    rest = {"num_variations": 1, "max_enhancement_iterations": 1, "quality_threshold": 0.0}
    return Pipeline(chat, critic(), settings.pop("images", FakeImages()), [FakeScorer()],
                    **rest | settings)


def story(scenes: int = 2, **fields) -> Story:
    return Story(scenes=[Scene(prompt=f"a fox, scene {n + 1}") for n in range(scenes)], **fields)


@pytest.fixture
def run(tmp_path):
    async def go(made: Pipeline, tale: Story, **over) -> StoryResult:
        async with asyncio.timeout(30):
            return await made.run(
                tale, **{"generation_id": "x", "output_dir": tmp_path / "images"} | over)

    return go


async def test_the_plan_is_made_first_and_reaches_agents_and_image_model(run):
    chat, images = director(PLAN), FakeImages()
    result = await run(pipeline(chat, images=images), story())
    assert planned_calls(chat) == [0] and len(chat.calls) == 3
    told = ["\n".join(m.content for m in messages) for messages, _ in chat.calls[1:]]
    assert all("ink drawing" in text and "blue and white" in text for text in told)
    assert all("Style: ink drawing." in request.prompt for request in images.requests)
    assert result.planned_markers == PLAN and result.planner == "a-director"
    assert result.story.consistency_markers == {}


@pytest.mark.parametrize("tale, settings", [
    (story(1), {}),
    (story(consistency_markers={"mood": "calm"}), {}),
    (story(), {"plan": False}),
    (story(), {"max_enhancement_iterations": 0}),
], ids=["one scene", "a marker", "not wanted", "no agents"])
async def test_nothing_is_planned_where_there_is_nothing_to_plan(run, tale, settings):
    chat = director()
    result = await run(pipeline(chat, **settings), tale)
    assert not planned_calls(chat)
    assert result.planned_markers is None and result.planner is None


async def test_prompts_that_are_handed_in_are_not_planned(run):
    chat = director()
    made = pipeline(chat)
    result = await run(made, story(), enhancements=await made.enhance(story()))
    assert not planned_calls(chat) and result.planned_markers is None


@pytest.mark.parametrize("answers", [
    ("no idea", "still none"), (RuntimeError("503"),), ({"title": "x"}, [1]),
    (asyncio.CancelledError(),),
], ids=["text", "error", "shape", "cancelled by its client"])
async def test_a_failed_plan_is_a_warning_and_the_run_goes_on(run, answers):
    result = await run(pipeline(director(*answers)), story())
    told = [[w for w in s.warnings if "not planned" in w] for s in result.scenes]
    assert [len(texts) for texts in told] == [1, 0]
    assert result.planned_markers is None and [s.reference_from for s in result.scenes] == [
        "ranked"] * 2


async def test_one_repair_turn_saves_a_plan(run):
    chat = director("not JSON", PLAN)
    result = await run(pipeline(chat), story())
    assert planned_calls(chat) == [0, 1] and result.planned_markers == PLAN


async def test_a_plan_is_paid_for_once_with_a_journal_and_counts_in_the_cost(run, tmp_path):
    def answer(messages, schema, number):
        text = json.dumps(PLAN) if schema is not None else "a better prompt"
        return Reply(text=text, cost=0.25)

    chat = FakeChat(answer)
    images = FakeImages(lambda request, number: GeneratedImage(picture(10 * number), cost=1.0))
    agents = {"images": images, "journal": Journal(tmp_path / "journal")}
    made = pipeline(chat, **agents)
    made.critic = FakeChat(lambda *_: Reply(text=critique(90), cost=0.5))
    first = await run(made, story())
    again = await run(made, story())
    assert len(chat.calls) == 3 and again.planned_markers == first.planned_markers == PLAN
    assert first.cost == 3 * 0.25 + 2 * 0.5 + 2 * 1.0
    assert len(made.critic.calls) == len(images.requests) == 2


async def test_a_rerun_keeps_the_plan(run, tmp_path):
    chat, images = director(PLAN), FakeImages()
    made = pipeline(chat, images=images)
    result = await run(made, story())
    result.save(tmp_path / "run.json")
    images.requests.clear()
    again = await made.rerun(StoryResult.load(tmp_path / "run.json"), 2, prompt="a fox asleep")
    assert planned_calls(chat) == [0] and again.planned_markers == PLAN
    assert again.planner == "a-director"
    assert ["Style: ink drawing." in r.prompt for r in images.requests] == [True]


async def test_no_plan_begins_after_the_end(run):
    chat = director(PLAN)
    with pytest.raises(GenerationCancelled):
        await run(pipeline(chat), story(), cancellation_check=lambda: True)
    assert len(chat.calls) <= 1


def test_the_estimate_counts_the_plan():
    planned, plain = (pipeline(director(), plan=plan).estimate(story()) for plan in (True, False))
    assert planned.chat_calls == plain.chat_calls + 1


@pytest.mark.parametrize("given, chain", [("first", "first"), (" none ", "none"), ("", "anchored")])
async def test_the_environment_names_the_chain(run, monkeypatch, given, chain):
    monkeypatch.setenv("REFIMG_CHAIN", given)
    made = Pipeline.from_env(director=FakeChat(), critic=critic(), scorers=[FakeScorer()],
                             image_model=FakeImages(max_references=3), num_variations=1,
                             max_enhancement_iterations=0)
    assert (await run(made, story())).settings["chain"] == chain


def test_a_chain_of_the_environment_is_checked_and_an_own_one_wins(monkeypatch):
    monkeypatch.setenv("REFIMG_CHAIN", "last")
    with pytest.raises(ValueError, match=r"REFIMG_CHAIN must be one of anchored, .* got 'last'"):
        Pipeline.from_env()
    assert Pipeline.from_env(chain="first").chain == "first"
