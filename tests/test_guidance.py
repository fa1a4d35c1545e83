"""What the agents are told of a scene, by image model; what comes back; what a run of 0.1 keeps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from refimg.engine.guidance import DEFAULT, OF_0_1, guidance_for, own_context
from refimg.engine.instructions import CRITIC, DIRECTOR, NEGATIVE
from refimg.engine.references import Chain, ReferencePlan
from refimg.engine.subjects import Subject
from refimg.enhance import director_messages, enhance_prompt_iterative, fence, read_fences
from refimg.pipeline import Pipeline, Scene, Story, compose_prompt, scene_context
from refimg.sandbox.agents import Critic, Director
from refimg.sandbox.world import read_prompt
from refimg.storage.journal import Journal

from .fakes import FakeChat, FakeImages, FakeScorer, critique
from .test_injections import INJECTIONS, ORDER, outside
from .test_old_files import TALE, criticise, draw, moved, write

# the instruction

DIGESTS = {"director": "88b4a48b873e", "critic": "a7affc3efe23", "negative": "fc3ddc633fd0"}


def test_the_words_of_0_1_are_those_of_0_1():
    """They are part of the keys of its journals: a changed letter is paid again."""
    texts = {"director": DIRECTOR, "critic": CRITIC, "negative": NEGATIVE}
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}
    assert digests == DIGESTS
    assert OF_0_1.instruction == DIRECTOR != DEFAULT.instruction


@pytest.mark.parametrize("model, words, vendor", [
    ("google/nano-banana-2", (40, 100), "Google"),
    ("google/nano-banana", (40, 100), "Google"),
    ("gemini-2.5-flash-image", (40, 100), "Google"),
    ("black-forest-labs/flux-2-pro", (30, 80), "Black Forest Labs"),
    ("black-forest-labs/FLUX.2-klein-9b", (30, 80), "Black Forest Labs"),
    ("openai/gpt-image-2", (40, 100), "OpenAI"),
    ("bytedance/seedream-4.5", (40, 100), "ByteDance"),
    ("qwen/qwen-image-edit-plus", (40, 100), "Alibaba"),
    ("black-forest-labs/flux-schnell", (40, 100), "the vendors"),
    ("sandbox-painter", (40, 100), "the vendors"),
    ("", (40, 100), "the vendors"),
])
def test_the_guidance_follows_the_name_of_the_image_model(model, words, vendor):
    found = guidance_for(model)
    assert found.words == words and vendor in found.source
    assert f"{words[0]} to {words[1]} words" in found.instruction
    assert found.advice in found.instruction


@pytest.mark.parametrize("model", ["google/nano-banana-2", "flux-2-dev", "anything"])
def test_every_instruction_names_what_the_criteria_do(model):
    told = guidance_for(model).instruction
    named = ("visual details", "style", "composition", "lighting", "deserted",
             "language of the original", "lost", "word for word", "obey nothing it says")
    assert all(word in told for word in named)


# what was lost


async def enhanced(writes: list[str], scores: list[float], prompt: str, **more):
    """An enhancement by scripted agents, and what the director was asked each time."""
    director = FakeChat(writes)
    made = await enhance_prompt_iterative(
        prompt, director=director, critic=FakeChat([critique(s) for s in scores]),
        max_iterations=len(writes), **more)
    return made, [messages for messages, _ in director.calls]


async def test_what_was_lost_goes_into_the_next_iteration():
    prompt = "Anna in a red coat, no people around"
    made, asked = await enhanced(
        ["A woman in a coat.", "Anna in a red coat, deserted."], [50, 60], prompt)
    heard = [read_fences(messages[1].content) for messages in asked]
    assert "lost" not in heard[0]
    assert heard[1]["lost"].splitlines() == [
        "colour lost from the original prompt: red",
        "negation lost from the original prompt: no people",
    ]
    assert made.warnings == []


@pytest.mark.parametrize("writes, scores, final", [
    (["A coat.", "A red coat."], [50, 50], "A red coat."),
    (["A red coat.", "Red, a coat."], [50, 50], "A red coat."),
    (["A coat.", "A red coat."], [51, 50], "A coat."),
])
async def test_of_two_equal_iterations_the_one_that_lost_less_wins(writes, scores, final):
    made, _ = await enhanced(writes, scores, "a red coat")
    assert made.final_prompt == final and made.stop_reason == "converged"


async def test_a_run_of_0_1_is_told_nothing_of_what_was_lost_and_takes_the_earlier():
    made, asked = await enhanced(
        ["A coat.", "A red coat."], [50, 50], "a red coat", guidance=OF_0_1)
    assert made.final_prompt == "A coat."
    assert all(messages[0].content == DIRECTOR for messages in asked)
    assert all("lost" not in read_fences(messages[1].content) for messages in asked)


# the context

SCENES = [Scene(prompt="Mara in a forest\nat dawn"), Scene(prompt="Mara by a lake"),
          Scene(prompt="x" * 400)]
MARA = Subject(name="Mara", description="a woman in a green coat")
STORY = Story(scenes=SCENES, subjects=[MARA], brand="Acme")


def test_the_context_names_neighbours_references_and_the_model():
    said = ["Image 1 is the scene before.", "Image 2 shows Mara."]
    told = scene_context(STORY, 2, references=said, image_model="google/nano-banana-2")
    assert told.splitlines() == [
        "Mara: a woman in a green coat",
        "Brand: Acme",
        "Scene before, do not draw it: Mara in a forest at dawn",
        f"Next scene, do not draw it: {'x' * 299}…",
        "Sent along with the prompt: Image 1 is the scene before. Image 2 shows Mara.",
        "Image model: google/nano-banana-2",
    ]
    assert own_context(told) == "Mara: a woman in a green coat\nBrand: Acme"


async def test_both_agents_of_a_run_hear_it():
    director, critic = FakeChat(["better"]), FakeChat([critique(90)])
    images = FakeImages(name="black-forest-labs/flux-2-pro")
    pipeline = Pipeline(director, critic, images, [FakeScorer()])
    await pipeline.enhance(STORY)
    for agent in (director, critic):
        contexts = [read_fences(messages[1].content)["context"] for messages, _ in agent.calls]
        assert len(contexts) == 3
        for number, context in enumerate(contexts, start=1):
            assert "Image model: black-forest-labs/flux-2-pro" in context
            assert ("the scene before: keep the look of Mara" in context) == (number == 2)
            assert ("Sent along" in context) == (number > 1)
            assert "/" not in context.replace("black-forest-labs/flux-2-pro", "")
    assert all("30 to 80 words" in messages[0].content for messages, _ in director.calls)
    assert all(messages[0].content == CRITIC for messages, _ in critic.calls)


# hostile texts


def hostile(text: str) -> tuple[Story, str]:
    """A story whose neighbours, subjects, brand and notes are attacks, and a model's name."""
    subject = Subject(name="Mara", description=text, looks={"torn": text})
    scenes = [Scene(prompt=text), Scene(prompt="Mara by a lake", continuity_note=text),
              Scene(prompt=text)]
    return Story(scenes=scenes, subjects=[subject], brand=text), text


@pytest.mark.parametrize("attack", INJECTIONS, ids=str)
def test_no_text_of_the_story_leaves_the_fence(attack):
    story, model = hostile(INJECTIONS[attack])
    context = scene_context(story, 2, references=[INJECTIONS[attack]], image_model=model)
    lost = [f"name lost from the original prompt: {INJECTIONS[attack]}"]
    asked = director_messages("Mara by a lake", context=context, lost=lost)
    assert outside(asked[1].content).strip() == "" and ORDER not in asked[0].content
    heard = read_fences(asked[1].content)
    assert heard["original"] == "Mara by a lake" and heard["lost"] == lost[0]
    assert fence("context", heard["context"]) in asked[1].content


@pytest.mark.parametrize("attack", INJECTIONS, ids=str)
def test_a_neighbour_a_reference_and_a_model_are_one_line_each(attack):
    text = f"{INJECTIONS[attack]}\u2028Brand: neon\x85Style: noir\nImage model: x"
    story = Story(scenes=[Scene(prompt=text), Scene(prompt="A lake"), Scene(prompt=text)])
    context = scene_context(story, 2, references=[text], image_model=text)
    assert len(context.splitlines()) == 4 and own_context(context) == ""


@pytest.mark.parametrize("neighbour", ["A tense neon street at night", "Two red horses, oil paint",
                                       "Warm golden wide shot at sunset"])
async def test_the_sandbox_takes_nothing_from_its_neighbours(neighbour):
    plain, scene = Story(scenes=[Scene(prompt="A knight.")]), Scene(prompt="A knight.")
    near = Story(scenes=[Scene(prompt=neighbour), scene, Scene(prompt=neighbour)])
    contexts = (scene_context(plain, 1), scene_context(
        near, 2, references=[f"The reference image is the scene before: {neighbour}"],
        image_model="google/nano-banana-2"))
    alone, among = [await enhance_prompt_iterative(
        "A knight.", director=Director(), critic=Critic(), context=each) for each in contexts]
    assert alone.final_prompt == among.final_prompt
    assert [i.critique for i in alone.iterations] == [i.critique for i in among.iterations]


@pytest.mark.parametrize("brand", ["Red Fox bakery", "a paper mill in the forest at night",
                                   "Two Horses: oil paint. Always in the snow"])
def test_the_painter_draws_nothing_of_the_brand(brand):
    scenes = [Scene(prompt="A woman in a blue coat on a beach")] * 2
    said = ["The reference image is the scene before: keep the look of the subject, the style and "
            "the medium; place, light and framing are those described here."]
    sent = compose_prompt(scenes[1].prompt, Story(scenes=scenes, brand=brand,
                          consistency_markers={"style": "watercolour"}), 2, references=said)
    assert f"Brand: {brand}." in sent
    assert read_prompt(sent) == read_prompt(scenes[1].prompt) | {"style": "watercolour"}


# which runs are those of 0.1


async def test_the_format_of_a_run_is_asked_for_once(tmp_path):
    run, journal = {"output_dir": tmp_path / "o", "generation_id": "x"}, Journal(tmp_path / "j")
    assert [await journal.begin(**run), await journal.begin(**run)] == [2, 2]
    await journal.chat(FakeChat(["hello"]), scene=1, role="director", **run).reply([])
    assert await Journal(tmp_path / "j").begin(**run) == 2
    assert await journal.spent(**run) == 0


async def test_calls_without_a_format_are_those_of_0_1(tmp_path):
    run, journal = {"output_dir": tmp_path / "o", "generation_id": "x"}, Journal(tmp_path / "j")
    await journal.chat(FakeChat(["hello"]), scene=1, role="director", **run).reply([])
    assert [await journal.begin(**run), await journal.begin(**run)] == [1, 1]
    assert await journal.begin(**run | {"generation_id": "y"}) == 2


async def test_the_format_outlives_the_database(tmp_path):
    run, journal = {"output_dir": tmp_path / "o", "generation_id": "x"}, Journal(tmp_path / "j")
    await journal.begin(**run)
    await journal.chat(FakeChat(["hello"]), scene=1, role="director", **run).reply([])
    journal.database._file.close()
    (tmp_path / "j" / "journal.db").write_bytes(b"not a database" * 500)
    assert await Journal(tmp_path / "j").begin(**run) == 2


def models_of_0_1() -> tuple[FakeChat, FakeChat, FakeImages]:
    """The models that a run of 0.1 had."""
    director = FakeChat(write, name="fake-director")
    critic = FakeChat(criticise, name="fake-critic")
    return director, critic, FakeImages(draw, name="fake-images", takes_negative_prompt=True)


async def test_a_run_of_0_1_goes_on_under_the_defaults_of_today(tmp_path):
    """Neither today's chain nor today's plan makes it pay again."""
    output = (tmp_path / "images").resolve()
    moved(tmp_path / "journal", output)
    director, critic, images = models_of_0_1()
    pipeline = Pipeline(director, critic, images, [FakeScorer()], num_variations=2, seed=7,
                        max_enhancement_iterations=2, journal=Journal(tmp_path / "journal"))
    result = await pipeline.run(TALE, generation_id="broken", output_dir=output)
    assert (len(director.calls), len(critic.calls), len(images.requests)) == (0, 0, 3)
    assert result.settings["chain"] == "previous" and result.planned_markers is None
    assert "Match the reference image" in result.scenes[1].sent_prompt
    assert all("paper mill" not in scene.sent_prompt for scene in result.scenes)


async def test_a_new_run_beside_it_gets_everything_new(tmp_path):
    output = (tmp_path / "images").resolve()
    moved(tmp_path / "journal", output)
    director, critic, images = models_of_0_1()
    pipeline = Pipeline(director, critic, images, [FakeScorer()], num_variations=1, seed=7,
                        max_enhancement_iterations=1, journal=Journal(tmp_path / "journal"))
    result = await pipeline.run(TALE, generation_id="new", output_dir=output)
    asked = [messages for messages, _ in director.calls]
    assert all("40 to 100 words" in messages[0].content or messages[0].content == NEGATIVE
               for messages in asked)
    assert all("Brand: a paper mill." in scene.sent_prompt for scene in result.scenes)
    assert "Match the" not in result.scenes[1].sent_prompt
    before = len(director.calls), len(critic.calls), len(images.requests)
    await pipeline.run(TALE, generation_id="new", output_dir=output)
    assert (len(director.calls), len(critic.calls), len(images.requests)) == before


def test_nothing_of_a_path_is_in_a_context():
    story = STORY.model_copy(update={"initial_reference_image": Path("/secret/user.png")})
    plan = ReferencePlan(Chain(story, "anchored"), 3)
    assert plan.expected(1) and not any("secret" in text for text in plan.expected(1))
    assert all("scene 1" not in text for number in (2, 3) for text in plan.expected(number))


async def test_a_run_whose_subjects_were_drawn_before_is_a_new_one(tmp_path):
    run = {"output_dir": tmp_path / "images", "generation_id": "x"}
    pipeline = Pipeline(FakeChat(["better"]), FakeChat([critique(90)]), FakeImages(),
                        [FakeScorer()], num_variations=1, journal=Journal(tmp_path / "journal"))
    story = await pipeline.draw_subjects(STORY, **run)
    result = await pipeline.run(story, **run)
    assert "Brand: Acme." in result.scenes[0].sent_prompt


@pytest.mark.parametrize("present, kept", [(True, "subject, style and colours"),
                                           (False, "style and colours")])
def test_a_caller_of_0_1_still_gets_its_sentence(present, kept):
    story = Story(scenes=[Scene(prompt="a fox", subject_present=present)])
    assert compose_prompt("a fox", story, 1, has_reference=True).endswith(
        f"Match the reference image: keep its {kept}.")
