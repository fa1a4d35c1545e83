"""A story on its way: the chain, what is sent, who wins, and what happens when things break."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import threading
from pathlib import Path

import pytest
from PIL import Image

from refimg import GenerationFailed, Pipeline, Scene, Story
from refimg.enhance import read_fences
from refimg.generate import Candidate, GeneratedImage
from refimg.score import RawScore
from refimg.storage.journal import Journal
from refimg.storage.traces import TraceTree
from tests.fakes import FakeChat, FakeImages, FakeScorer, critic, critique, director, picture

BOOM = RuntimeError("boom")


def a_story(scenes: int = 2, **fields) -> Story:
    """Scenes whose prompts differ in their last letter, and hold nothing that could get lost."""
    named = [Scene(prompt=f"a calm harbour, view {chr(96 + n)}") for n in range(1, scenes + 1)]
    return Story(scenes=named, **fields)


def at(request) -> tuple[int, int, int]:
    """Scene, variation and attempt of a request."""
    return tuple(map(int, re.search(r"_scene_(\d+)/v(\d+)/a(\d+)$", request.slot).groups()))


def drawn(rule, **settings) -> FakeImages:
    """An image model that draws, or raises, what `rule(scene, variation, attempt)` says."""
    return FakeImages(lambda request, number: rule(*at(request)), **settings)


def a_pipeline(images: FakeImages | None = None, **settings) -> Pipeline:
    """Two variations, one round, red wins, no threshold; whatever `settings` do not say."""
    models = {"director": director(), "critic": critic(), "image_model": images or FakeImages()}
    rest = {"num_variations": 2, "max_enhancement_iterations": 1, "quality_threshold": 0.0,
            "plan": False}
    return Pipeline(**models | {"scorers": [FakeScorer()]} | rest | settings)


@pytest.fixture
def run(tmp_path):
    """Runs a story as "x" in a folder of its own; a run that hangs fails."""

    async def go(pipeline, story=None, **over):
        over = {"generation_id": "x", "output_dir": tmp_path / "images"} | over
        async with asyncio.timeout(30):
            return await pipeline.run(story or a_story(), **over)

    return go


@pytest.fixture
def user_image(tmp_path) -> Path:
    path = tmp_path / "user.png"
    path.write_bytes(picture(99))
    return path


def reds(result, scene: int = 1) -> list[int]:
    """What the scorer saw of each variation: its red channel."""
    return [round(v.scores.raw["pickscore"]) for v in result.scenes[scene - 1].variations]


def received(images: FakeImages, scenes: int) -> list[Path | None]:
    """The references that the requests of each scene carried: None, one, or a tuple."""
    found = [{r.references for r in images.requests if at(r)[0] == n + 1} for n in range(scenes)]
    assert all(len(each) == 1 for each in found), "requests of a scene disagree"
    return [own[0] if len(own) == 1 else own or None for (own,) in found]


def in_story(places: list, references: list[Path], user: Path) -> list[Path | None]:
    """Paths for a row of "user", None and scene numbers."""
    def path(place):
        if isinstance(place, tuple):
            return tuple(map(path, place))
        return user if place == "user" else place and references[place - 1]

    return [path(place) for place in places]


# the chain


@pytest.mark.parametrize(
    "chain, with_user, carried",
    [
        ("previous", False, [None, 1, 2]),
        ("previous", True, ["user", 1, 2]),
        ("first", False, [None, 1, 1]),
        ("first", True, ["user"] * 3),  # the anchor
        ("anchored", False, [None, 1, (2, 1)]),
        ("anchored", True, ["user", (1, "user"), (2, "user")]),
        ("none", False, [None, None, None]),
        ("none", True, ["user", None, None]),
    ],
)
async def test_each_request_carries_the_reference_that_the_chain_gives(
    run, user_image, chain, with_user, carried
):
    images = drawn(lambda scene, variation, attempt: picture(200 if variation == 2 else scene))
    images.max_references = 2
    story = a_story(3, initial_reference_image=user_image if with_user else None)
    result = await run(a_pipeline(images, chain=chain), story)
    assert received(images, 3) == in_story(carried, result.references, user_image)
    assert [p.name for p in result.references] == [f"x_scene_0{n}_v2.png" for n in (1, 2, 3)]
    assert [{v.image.references for v in s.variations} for s in result.scenes] == [
        {sent if isinstance(sent, tuple) else (sent,) if sent else ()}
        for sent in received(images, 3)
    ]


async def test_a_reference_is_on_disk_whole_when_it_is_sent(run):
    def look(request, number):
        return (
            picture(number)
            if all(p.read_bytes()[-8:-4] == b"IEND" for p in request.references)
            else BOOM
        )

    result = await run(a_pipeline(FakeImages(look)), a_story(4))
    assert [s.reference_from for s in result.scenes] == ["ranked"] * 4


@pytest.mark.parametrize("scenes, chain", [(1, "previous"), (3, "none")])
async def test_a_model_without_references_can_draw_what_needs_none(run, scenes, chain):
    images = FakeImages(max_references=0)
    await run(a_pipeline(images, chain=chain), a_story(scenes))
    assert received(images, scenes) == [None] * scenes


class Meeting(FakeImages):
    """Draws only when `size` calls are under way at once; knows the most it has seen."""

    def __init__(self, size: int, **settings):
        super().__init__(**settings)
        self.barrier, self.now, self.most = asyncio.Barrier(size), 0, 0

    async def generate(self, request):
        self.now += 1
        self.most = max(self.most, self.now)
        async with asyncio.timeout(10):
            await self.barrier.wait()
        try:
            return await super().generate(request)
        finally:
            self.now -= 1


async def test_the_variations_of_a_scene_are_drawn_together_scenes_in_turn(run):
    images = Meeting(5)
    result = await run(a_pipeline(images, num_variations=5), a_story(2))
    assert images.most == 5 and len(result.scenes[1].variations) == 5


async def test_without_a_chain_scenes_are_drawn_together_within_the_limit(run):
    images, limits = Meeting(4, seconds=0.01), {"max_concurrency": 2}
    await run(a_pipeline(images, chain="none", max_enhancement_iterations=0, **limits), a_story(4))
    assert images.most == 4


@pytest.mark.parametrize("slots", [1, 2, 8])
async def test_slots_for_enhancement_go_to_scenes_in_order(run, slots):
    order = []

    def write(messages, schema, number):
        order.append(re.search(r"view (\w)", messages[1].content).group(1))
        return "a better prompt" if schema is None else critique(90)

    writer = FakeChat(write, seconds=0.001)
    await run(a_pipeline(director=writer, critic=writer, max_concurrency=slots), a_story(4))
    assert list(dict.fromkeys(order)) == list("abcd")
    assert order == list("aabbccdd") if slots == 1 else order[:2] == ["a", "b"]


@pytest.mark.parametrize("slots", [1, 8])
async def test_later_scenes_are_enhanced_while_the_first_is_drawn(run, slots):
    last = asyncio.Event()

    class Patient(FakeImages):
        async def generate(self, request):
            async with asyncio.timeout(10):
                await last.wait()
            return await super().generate(request)

    def write(messages, schema, number):
        if "view d" in messages[1].content:
            last.set()
        return "a better prompt"

    result = await run(
        a_pipeline(Patient(), director=FakeChat(write), max_concurrency=slots), a_story(4)
    )
    assert not any(s.warnings for s in result.scenes)


async def test_an_image_is_scored_while_another_is_being_drawn(run):
    scored = threading.Event()
    scorer = FakeScorer(value=lambda image, prompt: scored.set() or 100.0)

    class Slow(FakeImages):
        async def generate(self, request):
            if at(request)[1] == 2:
                assert await asyncio.to_thread(scored.wait, 10)
            return await super().generate(request)

    result = await run(a_pipeline(Slow(), scorers=[scorer]), a_story(1))
    assert [len(batch.images) for batch in scorer.batches] == [1, 1]
    assert len(result.scenes[0].variations) == 2


@pytest.mark.parametrize("breaks", [False, True])
async def test_the_text_is_embedded_while_images_are_drawn(run, breaks):
    texts, embedded = [], threading.Event()

    def embed(text):
        texts.append(text)
        embedded.set()
        if breaks:
            raise BOOM

    class Slow(FakeImages):
        async def generate(self, request):
            assert await asyncio.to_thread(embedded.wait, 10)
            return await super().generate(request)

    scorer = FakeScorer()
    scorer.embed_text = embed
    result = await run(a_pipeline(Slow(), scorers=[scorer]))
    assert texts == [scene.prompt for scene in result.scenes]
    assert [s.reference_from for s in result.scenes] == ["ranked", "ranked"]


async def test_only_the_winners_file_holds_up_the_next_scene(run, monkeypatch):
    second, save = asyncio.Event(), Candidate.save

    async def slow_for_losers(take, **where):
        if take.pixels.getpixel((0, 0))[0] < 200:
            async with asyncio.timeout(10):
                await second.wait()
        return await save(take, **where)

    def rule(scene, variation, attempt):
        if scene == 2:
            second.set()
        return picture(200 if variation == 1 else 50)

    monkeypatch.setattr(Candidate, "save", slow_for_losers)
    result = await run(a_pipeline(drawn(rule)))
    assert reds(result) == [200, 50]
    assert all(v.image.image_path.is_file() for s in result.scenes for v in s.variations)


# files


@pytest.mark.parametrize("winner", [1, 2, 3, 4])
async def test_files_are_numbered_in_order_of_variation_whoever_wins(run, winner):
    images = drawn(
        lambda scene, variation, attempt: picture(200 if variation == winner else variation)
    )
    result = await run(a_pipeline(images, num_variations=4), a_story(1))
    made = [v.image.image_path.name for v in result.scenes[0].variations]
    assert made == [f"x_scene_01_v{k}.png" for k in (1, 2, 3, 4)]


async def test_the_same_id_again_takes_the_next_numbers_and_overwrites_nothing(run, tmp_path):
    pipeline, folder = a_pipeline(num_variations=4), tmp_path / "images"
    first = await run(pipeline)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    second = await run(pipeline)
    assert sorted(path.name for path in before) == [
        f"x_scene_0{n}_v{k}.png" for n in (1, 2) for k in (1, 2, 3, 4)
    ]
    assert {path: path.read_bytes() for path in before} == before
    numbers = [v.image.image_path.name[-6:] for v in second.scenes[1].variations]
    assert numbers == ["v5.png", "v6.png", "v7.png", "v8.png"]
    assert first.generation_id == second.generation_id == "x"


async def test_without_an_id_a_run_gets_twelve_hex_digits_of_its_own(run):
    names = {(await run(a_pipeline(), a_story(1), generation_id=None)).generation_id for _ in "ab"}
    assert len(names) == 2 and all(re.fullmatch("[0-9a-f]{12}", name) for name in names)


async def test_two_runs_at_once_do_not_meet(run):
    one, other = a_pipeline(FakeImages(seconds=0.01)), a_pipeline(FakeImages(seconds=0.01))
    made = await asyncio.gather(
        *(run(p, a_story(3), generation_id=name) for p, name in ((one, "one"), (other, "other")))
    )
    for result, pipeline in zip(made, (one, other), strict=True):
        assert [p.name.split("_")[0] for p in result.references] == [result.generation_id] * 3
        assert received(pipeline.image_model, 3) == [None, *result.references[:2]]


async def test_one_pipeline_can_run_two_stories_at_once(run):
    pipeline = a_pipeline(FakeImages(seconds=0.005))
    made = await asyncio.gather(*(run(pipeline, generation_id=name) for name in ("a", "b")))
    assert [r.references[1].name.split("_")[0] for r in made] == ["a", "b"]
    assert all(len(s.variations) == 2 for r in made for s in r.scenes)


async def test_an_id_that_is_running_is_refused_and_the_run_is_not_disturbed(run):
    begun = asyncio.Event()
    first = a_pipeline(FakeImages(seconds=0.05))
    task = asyncio.create_task(run(first, on_progress=lambda step: begun.set()))
    await begun.wait()
    second = a_pipeline()
    with pytest.raises(ValueError, match="x"):
        await run(second)
    assert second.image_model.requests == [] and second.director.calls == []
    result = await task
    assert [len(s.variations) for s in result.scenes] == [2, 2]
    assert not any(s.warnings for s in result.scenes)


@pytest.mark.parametrize("scenes, variations", [(1, 1), (12, 1), (1, 20), (2, 20)])
async def test_the_smallest_and_the_largest_runs(run, scenes, variations):
    result = await run(a_pipeline(num_variations=variations), a_story(scenes))
    assert [s.scene for s in result.scenes] == list(range(1, scenes + 1))
    assert [len(s.variations) for s in result.scenes] == [variations] * scenes
    assert len(set(result.references)) == scenes
    assert sorted(v.rank for v in result.scenes[-1].variations) == list(range(1, variations + 1))


@pytest.mark.parametrize("text", ["Ein Leuchtturm 灯台 🌊 \u200f \t e\u0301", "word " * 2000])
async def test_long_and_foreign_prompts_arrive_as_they_are(run, text):
    images, scorer = FakeImages(), FakeScorer()
    story = Story(scenes=[Scene(prompt=text)])
    result = await run(a_pipeline(images, scorers=[scorer], max_enhancement_iterations=0), story)
    assert result.scenes[0].prompt == text
    assert {r.prompt for r in images.requests} == {text.strip()}
    assert {batch.prompt for batch in scorer.batches} == {text}


@pytest.mark.parametrize("keep", [False, True])
async def test_a_run_leaves_images_and_only_on_request_traces(run, tmp_path, keep):
    result = await run(a_pipeline(keep_traces=keep))
    images = {v.image.image_path for s in result.scenes for v in s.variations}
    others = {p for p in tmp_path.rglob("*") if p.is_file()} - images
    assert bool(others) == keep
    assert {p.relative_to(tmp_path).parts[0] for p in others} <= {"reference_image_traces"}


# what is sent


async def test_the_enhanced_prompt_is_sent_with_markers_and_is_in_the_record(run):
    images = FakeImages()
    story = a_story(2, consistency_markers={"style": "watercolour"})
    result = await run(a_pipeline(images), story)
    for scene in result.scenes:
        sent = {r.prompt for r in images.requests if at(r)[0] == scene.scene}
        assert sent == {scene.sent_prompt} == {v.image.prompt for v in scene.variations}
        assert scene.sent_prompt.startswith(scene.enhancement.final_prompt)
        assert "Style: watercolour." in scene.sent_prompt
    assert "reference" not in result.scenes[0].sent_prompt
    assert "The reference image is the scene before" in result.scenes[1].sent_prompt


async def test_the_agents_get_markers_notes_and_brand_as_context(run):
    scenes = [
        Scene(prompt="a calm harbour", continuity_note="unheard", consistency_guideline="same hat"),
        Scene(prompt="a calm sea", continuity_note="same boat", transition_note="dissolve"),
    ]
    story = Story(scenes=scenes, consistency_markers={"mood": "hopeful"}, brand="Acme Sails")
    pipeline = a_pipeline()
    await run(pipeline, story)
    for agent in (pipeline.director, pipeline.critic):
        given = [read_fences(messages[1].content) for messages, _ in agent.calls]
        heard = {each["original"].removeprefix("a "): each["context"] for each in given
                 if "original" in each}
        assert set(heard) == {"calm harbour", "calm sea"}
        for text in heard.values():
            assert "Mood: hopeful" in text and "Acme Sails" in text
        assert "same hat" in heard["calm harbour"] and "unheard" not in heard["calm harbour"]
        assert "same boat" in heard["calm sea"] and "dissolve" in heard["calm sea"]


@pytest.mark.parametrize("score_text", ["original", "enhanced"])
async def test_images_are_scored_against_the_text_that_was_asked_for(run, score_text):
    scorer = FakeScorer()
    story = a_story(2, consistency_markers={"style": "watercolour"})
    result = await run(a_pipeline(scorers=[scorer], score_text=score_text), story)
    original = [scene.prompt for scene in result.scenes]
    enhanced = [scene.enhancement.final_prompt for scene in result.scenes]
    judged = list(dict.fromkeys(batch.prompt for batch in scorer.batches))
    assert judged == (original if score_text == "original" else enhanced)


def seed_of(seed: int, scene: int, variation: int, attempt: int) -> int:
    """The design's formula, written a second time."""
    digest = hashlib.sha256(f"{seed}/{scene}/{variation}/{attempt}".encode()).hexdigest()
    return int(digest[:8], 16)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**70])
async def test_seeds_follow_the_formula_over_scenes_variations_and_attempts(run, seed):
    images = drawn(lambda s, v, a: BOOM if (s, a) == (1, 1) or (s == 2 and a < 3) else picture(v))
    result = await run(a_pipeline(images, seed=seed))
    places = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)]
    places += [(2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (2, 1, 3)]
    assert [at(r) for r in images.requests] == places
    assert [r.seed for r in images.requests] == [seed_of(seed, *place) for place in places]
    seeds = [v.image.seed for v in result.scenes[0].variations]
    assert seeds == [seed_of(seed, 1, 1, 2), seed_of(seed, 1, 2, 2)]


async def test_without_a_seed_none_is_sent_and_the_providers_own_is_kept(run):
    images = FakeImages(lambda request, number: GeneratedImage(picture(number), seed=40 + number))
    result = await run(a_pipeline(images), a_story(1))
    assert [r.seed for r in images.requests] == [None, None]
    assert [v.image.seed for v in result.scenes[0].variations] == [41, 42]


async def test_a_seedless_model_is_sent_no_seed_and_the_run_says_so_once(run, caplog):
    images = FakeImages(takes_seed=False)
    result = await run(a_pipeline(images, seed=7), a_story(3))
    assert [r.seed for r in images.requests] == [None] * 6
    assert [v.image.seed for v in result.scenes[0].variations] == [None, None]
    assert all("seed" in " ".join(s.warnings) for s in result.scenes)
    said = [r for r in caplog.records if r.levelno == logging.WARNING and "seed" in r.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("takes", [False, True])
async def test_a_negative_prompt_is_asked_for_and_sent_only_where_it_is_taken(run, takes):
    def write(messages, schema, number):
        return "blur, text" if "negative prompt" in messages[0].content else "a better prompt"

    images, writer = FakeImages(takes_negative_prompt=takes), FakeChat(write)
    result = await run(a_pipeline(images, director=writer), a_story(2))
    expected = "blur, text" if takes else None
    assert {r.negative_prompt for r in images.requests} == {expected}
    assert {s.enhancement.negative_prompt for s in result.scenes} == {expected}
    assert len(writer.calls) == (4 if takes else 2)


async def test_a_negative_prompt_that_cannot_be_sent_is_warned_of(run, caplog):
    giver = a_pipeline(FakeImages(takes_negative_prompt=True))
    made = await giver.enhance(a_story(1))
    assert made[0].negative_prompt
    images = FakeImages(takes_negative_prompt=False)
    result = await run(a_pipeline(images), a_story(1), enhancements=made)
    assert {r.negative_prompt for r in images.requests} == {None}
    assert "negative" in " ".join(result.scenes[0].warnings)
    assert any("negative" in r.getMessage() for r in caplog.records)


async def test_enhancements_that_are_handed_in_are_used_and_no_agent_is_asked(run):
    pipeline = a_pipeline()
    made = await pipeline.enhance(a_story(3))
    asked = len(pipeline.director.calls), len(pipeline.critic.calls)
    assert pipeline.image_model.requests == [] and asked == (3, 3)
    result = await run(pipeline, a_story(3), enhancements=made)
    assert (len(pipeline.director.calls), len(pipeline.critic.calls)) == asked
    assert [s.enhancement for s in result.scenes] == made


async def test_no_rounds_means_the_prompt_as_it_is_and_all_variations(run):
    pipeline = a_pipeline(max_enhancement_iterations=0)
    scene = (await run(pipeline, a_story(1))).scenes[0]
    assert pipeline.director.calls == [] and scene.sent_prompt == scene.prompt
    assert (scene.enhancement.stop_reason, scene.reference_from) == ("skipped", "ranked")
    assert len(scene.variations) == 2 and scene.warnings == []


# who wins


def shade(image, prompt) -> float:
    return float(image.getpixel((0, 0))[0])


SHADES = {1: 51, 2: 204, 3: 102}  # 20, 80 and 40 on the scale of 100


def three(**settings) -> Pipeline:
    """Three variations of known shades."""
    images = drawn(lambda scene, variation, attempt: picture(SHADES[variation]))
    return a_pipeline(images, num_variations=3, **settings)


def overalls(scene) -> list[float | None]:
    return [v.scores.overall and round(v.scores.overall, 6) for v in scene.variations]


@pytest.mark.parametrize(
    "names, weights, expected",
    [
        (["pickscore"], None, [20, 80, 40]),
        (["pickscore", "clip_score"], None, [130 / 3, 190 / 3, 140 / 3]),
        (["pickscore", "house"], None, [55, 55, 50]),
        (["pickscore", "clip_score"], {"pickscore": 1, "clip_score": 0}, [20, 80, 40]),
        (["pickscore", "clip_score"], {"pickscore": 1, "clip_score": 3}, [72.5, 42.5, 55]),
    ],
)
async def test_weights_go_by_name_are_equal_for_strangers_or_as_given(
    run, names, weights, expected
):
    other = {51: 229.5, 204: 76.5, 102: 153.0}  # 90, 30 and 60 on the scale of 100
    values = [shade, lambda image, prompt: other[image.getpixel((0, 0))[0]]]
    scorers = [FakeScorer(name, value) for name, value in zip(names, values, strict=False)]
    result = await run(three(scorers=scorers, weights=weights), a_story(1))
    scene = result.scenes[0]
    assert overalls(scene) == pytest.approx(expected)
    best = expected.index(max(expected))
    assert [v.selected for v in scene.variations] == [k == best for k in range(3)]
    assert scene.reference == result.references[0] == scene.variations[best].image.image_path
    assert [s["name"] for s in result.settings["scorers"]] == names


async def test_each_image_keeps_its_own_scores(run):
    result = await run(three(), a_story(1))
    assert [v.scores.raw["pickscore"] for v in result.scenes[0].variations] == [51, 204, 102]
    assert [v.rank for v in result.scenes[0].variations] == [3, 1, 2]


async def test_a_scorer_that_finds_nothing_at_all_drops_out(run):
    blind = FakeScorer("clip_score", lambda image, prompt: None)
    scene = (await run(three(scorers=[FakeScorer(), blind]), a_story(1))).scenes[0]
    assert overalls(scene) == [20, 80, 40] and scene.reference_from == "ranked"


async def test_an_image_that_lacks_a_metric_is_last_and_changes_nothing_for_others(run):
    def half_blind(image, prompt):
        return RawScore(None, "too dark") if shade(image, prompt) == 204 else 255.0

    scorers = [FakeScorer(), FakeScorer("clip_score", half_blind)]
    scene = (await run(three(scorers=scorers), a_story(1))).scenes[0]
    assert overalls(scene) == pytest.approx([140 / 3, None, 60])
    assert [v.rank for v in scene.variations] == [2, None, 1]
    assert (scene.reference_from, scene.below_threshold) == ("ranked", False)
    assert scene.variations[1].scores.notes["clip_score"] == "too dark"


async def test_a_scorer_that_raises_on_one_image_costs_only_that_image(run):
    def picky(image, prompt):
        return BOOM if shade(image, prompt) == 204 else shade(image, prompt)

    scene = (await run(three(scorers=[FakeScorer(value=picky)]), a_story(1))).scenes[0]
    assert overalls(scene) == [20, None, 40]
    assert [v.selected for v in scene.variations] == [False, False, True]
    assert "boom" in scene.variations[1].scores.notes["pickscore"]


async def test_of_equal_images_the_earlier_wins(run):
    class Reversed(FakeImages):
        async def generate(self, request):
            await asyncio.sleep(0.01 * (3 - at(request)[1]))
            return await super().generate(request)

    images = Reversed(lambda request, number: picture(100 if at(request)[1] > 1 else 50))
    scene = (await run(a_pipeline(images, num_variations=3), a_story(1))).scenes[0]
    assert [v.rank for v in scene.variations] == [3, 1, 2]
    assert scene.reference.name == "x_scene_01_v2.png"


@pytest.mark.parametrize(
    "scorers",
    [
        [],
        [FakeScorer(value=lambda image, prompt: None)],
        [FakeScorer(value=lambda image, prompt: BOOM)],
        [FakeScorer(value=lambda image, prompt: None), FakeScorer("clip_score")],
    ],
    ids=["none", "blind", "broken", "under half of the weight"],
)
async def test_unscored_is_neither_a_pass_nor_a_zero(run, caplog, scorers):
    result = await run(three(scorers=scorers, quality_threshold=30.0), a_story(2))
    scene = result.scenes[0]
    assert (scene.reference_from, scene.below_threshold) == ("first", None)
    assert [v.selected for v in scene.variations] == [True, False, False]
    assert (
        {v.rank for v in scene.variations} == {v.scores.overall for v in scene.variations} == {None}
    )
    assert len(scene.warnings) == 1 and "unscored" in scene.warnings[0]
    said = [
        r for r in caplog.records if r.name == "refimg.pipeline" and "unscored" in r.getMessage()
    ]
    assert [r.levelname for r in said] == ["WARNING", "WARNING"]


async def test_what_several_scorers_say_alike_stands_once_in_a_warning(run):
    class Lost(FakeScorer):
        def score(self, batch):
            raise OSError(f"no weights for {self.name}; fetch it")

    lost = [Lost("a"), Lost("b")]
    result = await run(a_pipeline(scorers=lost), a_story(1))
    [warning] = result.scenes[0].warnings
    assert warning.count("fetch it") == 1
    assert "no weights for a; OSError: no weights for b; fetch it; only 0 %" in warning


async def test_below_the_threshold_is_a_warning_with_the_score_and_on(run, caplog):
    result = await run(three(quality_threshold=80.5), a_story(2))
    for scene in result.scenes:
        assert (scene.reference_from, scene.below_threshold) == ("ranked", True)
        assert len(scene.warnings) == 1 and "80.0" in scene.warnings[0]
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [(r.levelname, "80.0" in r.getMessage()) for r in said] == [("WARNING", True)] * 2


@pytest.mark.parametrize("threshold", [0, 80, 80.0])
async def test_at_the_threshold_is_good_enough(run, threshold):
    scene = (await run(three(quality_threshold=threshold), a_story(1))).scenes[0]
    assert scene.below_threshold is False and scene.warnings == []


async def test_a_score_just_below_the_threshold_is_not_said_to_be_the_threshold(run):
    almost = FakeScorer(value=lambda image, prompt: 76.4)  # 29.96 of 100
    scene = (await run(three(scorers=[almost], quality_threshold=30.0), a_story(1))).scenes[0]
    assert scene.below_threshold is True and "30.0 < 30" not in scene.warnings[0]


# enhancement that fails


def says(answer) -> FakeChat:
    return FakeChat([answer])


BROKEN_AGENTS = {
    "director raises": {"director": says(RuntimeError("agent down"))},
    "director is silent": {"director": says("<think>hm</think>")},
    "director cancels itself": {"director": says(asyncio.CancelledError())},
    "critic raises": {"critic": says(RuntimeError("agent down"))},
    "critic talks": {"critic": says("very nice")},
    "critic cancels itself": {"critic": says(asyncio.CancelledError())},
}


@pytest.mark.parametrize("agents", BROKEN_AGENTS.values(), ids=BROKEN_AGENTS)
async def test_a_failed_enhancement_makes_one_image_of_the_original_prompt(run, caplog, agents):
    images, story = FakeImages(), a_story(1, consistency_markers={"mood": "hopeful"})
    result = await run(
        a_pipeline(images, num_variations=4, quality_threshold=50.0, **agents), story
    )
    scene = result.scenes[0]
    assert len(images.requests) == len(scene.variations) == 1
    assert images.requests[0].prompt == "a calm harbour, view a\n\nMood: hopeful."
    assert (scene.reference_from, scene.below_threshold) == ("fallback", True)
    assert (scene.variations[0].rank, scene.variations[0].selected) == (1, True)
    assert scene.enhancement.stop_reason == "failed" and scene.enhancement.cost is None
    errors = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and "scene 1" in errors[0].getMessage()


async def test_the_cause_of_a_failed_enhancement_is_in_the_record_and_the_error_log(run, caplog):
    result = await run(a_pipeline(director=says(RuntimeError("agent down"))), a_story(1))
    assert "agent down" in " ".join(result.scenes[0].warnings)
    assert any(r.levelname == "ERROR" and "agent down" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("role", ["director", "critic"])
@pytest.mark.parametrize("answer", ["a text", None], ids=["text", "None"])
async def test_an_agent_that_does_not_answer_with_a_reply_has_failed(run, role, answer):
    class Odd(FakeChat):
        async def reply(self, messages, schema=None):
            return answer

    scene = (await run(a_pipeline(**{role: Odd()}), a_story(1))).scenes[0]
    assert (scene.enhancement.stop_reason, scene.reference_from) == ("failed", "fallback")


async def test_a_failed_enhancement_leaves_the_other_scenes_alone(run):
    def write(messages, schema, number):
        original = read_fences(messages[1].content)["original"]
        return BOOM if "view b" in original else "a better prompt"

    images = FakeImages()
    result = await run(a_pipeline(images, director=FakeChat(write)), a_story(3))
    assert [s.reference_from for s in result.scenes] == ["ranked", "fallback", "ranked"]
    assert [len(s.variations) for s in result.scenes] == [2, 1, 2]
    assert received(images, 3) == [None, *result.references[:2]]


async def test_a_lost_later_round_is_no_fallback(run):
    agents = {"director": FakeChat(["one", BOOM]), "critic": critic(50)}
    pipeline = a_pipeline(max_enhancement_iterations=3, **agents)
    scene = (await run(pipeline, a_story(1))).scenes[0]
    assert (scene.enhancement.stop_reason, scene.sent_prompt) == ("error", "one")
    assert (scene.reference_from, len(scene.variations)) == ("ranked", 2)


@pytest.mark.parametrize("agents", BROKEN_AGENTS.values(), ids=BROKEN_AGENTS)
async def test_looking_at_the_prompts_first_survives_broken_agents_too(agents):
    async with asyncio.timeout(10):
        made = await a_pipeline(**agents).enhance(a_story(2))
    assert [m.stop_reason for m in made] == ["failed", "failed"]
    assert [m.final_prompt for m in made] == [s.prompt for s in a_story(2).scenes]


async def test_a_scene_with_a_failed_enhancement_and_failing_images_tries_the_model_again(run):
    images = drawn(lambda scene, variation, attempt: BOOM if attempt < 3 else picture(9))
    result = await run(a_pipeline(images, director=says(BOOM), num_variations=4), a_story(1))
    assert len(images.requests) <= 9 and {r.prompt for r in images.requests} == {
        "a calm harbour, view a"
    }
    assert result.scenes[0].reference_from == "fallback" and len(result.scenes[0].variations) == 1


# images that fail


async def test_what_worked_is_kept_in_order_with_its_own_scores(run):
    def rule(scene, variation, attempt):
        return BOOM if variation in (1, 3) else picture({2: 90, 4: 30, 5: 60}[variation])

    images = drawn(rule)
    scene = (await run(a_pipeline(images, num_variations=5, seed=7), a_story(1))).scenes[0]
    assert [round(v.scores.raw["pickscore"]) for v in scene.variations] == [90, 30, 60]
    assert [v.rank for v in scene.variations] == [1, 3, 2]
    assert [v.image.seed for v in scene.variations] == [seed_of(7, 1, k, 1) for k in (2, 4, 5)]
    assert [v.image.image_path.name[-6:] for v in scene.variations] == [
        "v1.png",
        "v2.png",
        "v3.png",
    ]
    assert (scene.reference_from, len(images.requests)) == ("ranked", 5)
    assert len(scene.warnings) == 2 and all("boom" in warning for warning in scene.warnings)


async def test_when_no_variation_worked_all_are_tried_again_with_other_seeds(run, caplog):
    images = drawn(lambda s, variation, attempt: BOOM if attempt == 1 else picture(variation))
    scene = (await run(a_pipeline(images, num_variations=3, seed=7), a_story(1))).scenes[0]
    assert [at(r) for r in images.requests] == [(1, k, a) for a in (1, 2) for k in (1, 2, 3)]
    assert [v.image.seed for v in scene.variations] == [seed_of(7, 1, k, 2) for k in (1, 2, 3)]
    assert scene.sent_prompt == scene.enhancement.final_prompt and scene.reference_from == "ranked"
    assert any(r.levelname == "ERROR" and "boom" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("variations", [1, 2, 5])
async def test_the_last_try_is_one_image_of_the_original_prompt_with_its_markers(run, variations):
    images = drawn(lambda s, variation, attempt: BOOM if attempt < 3 else picture(102))
    story = a_story(1, consistency_markers={"lighting": "dusk"})
    pipeline = a_pipeline(images, num_variations=variations, quality_threshold=50.0, seed=7)
    scene = (await run(pipeline, story)).scenes[0]
    assert len(images.requests) == 2 * variations + 1
    assert (
        scene.sent_prompt
        == images.requests[-1].prompt
        == "a calm harbour, view a\n\nLighting: dusk."
    )
    assert (scene.reference_from, scene.below_threshold) == ("fallback", True)
    assert [v.image.seed for v in scene.variations] == [seed_of(7, 1, 1, 3)]
    assert "40.0" in scene.warnings[-1]


async def test_an_unscored_fallback_is_still_a_fallback(run):
    images = drawn(lambda s, variation, attempt: BOOM if attempt < 3 else picture(102))
    scene = (await run(a_pipeline(images, scorers=[]), a_story(1))).scenes[0]
    assert (scene.reference_from, scene.below_threshold) == ("fallback", None)


@pytest.mark.parametrize("number", [1, 2])
async def test_the_fallback_prompt_speaks_of_the_reference_where_one_is_sent(run, number):
    images = drawn(lambda s, v, attempt: BOOM if s == number and attempt < 3 else picture(v))
    result = await run(a_pipeline(images), a_story(2))
    assert ("The reference image is" in result.scenes[number - 1].sent_prompt) == (number == 2)


CARRIED = [
    ("previous", False, {2}, [1, 1, 3], [None, 1, 1]),
    ("previous", False, {2, 3}, [1, 1, 1], [None, 1, 1]),
    ("previous", False, {1}, [2, 2, 3], [None, None, 2]),
    ("previous", False, {1, 2}, [3, 3, 3], [None, None, None]),
    ("previous", True, {1}, ["user", 2, 3], ["user", "user", 2]),
    ("previous", True, {1, 2}, ["user", "user", 3], ["user", "user", "user"]),
    ("first", False, {2}, [1, 1, 3], [None, 1, 1]),
    ("first", False, {3}, [1, 2, 2], [None, 1, 1]),
    ("first", False, {1}, [2, 2, 3], [None, None, None]),
    ("first", True, {1}, ["user", 2, 3], ["user", "user", "user"]),
    ("none", False, {1, 3}, [2, 2, 2], [None, None, None]),
    ("none", False, {2, 3}, [1, 1, 1], [None, None, None]),
    ("none", True, {1}, ["user", 2, 3], ["user", None, None]),
]


@pytest.mark.parametrize("chain, with_user, failing, ends, sent", CARRIED)
async def test_a_scene_without_an_image_carries_one(
    run, caplog, user_image, chain, with_user, failing, ends, sent
):
    images = drawn(
        lambda scene, variation, attempt: BOOM if scene in failing else picture(variation)
    )
    story = a_story(3, initial_reference_image=user_image if with_user else None)
    result = await run(a_pipeline(images, chain=chain), story)
    own = [Path(f"{user_image.parent}/images/x_scene_0{n}_v2.png") for n in (1, 2, 3)]
    assert result.references == in_story(ends, own, user_image)
    assert result.references == [scene.reference for scene in result.scenes]
    assert received(images, 3) == in_story(sent, own, user_image)
    for scene in result.scenes:
        lost = scene.scene in failing
        assert scene.reference_from == ("carried" if lost else "ranked")
        assert (scene.below_threshold, len(scene.variations)) == ((None, 0) if lost else (False, 2))
        unanchored = chain == "first" and not with_user and 1 in failing
        assert bool(scene.warnings) == (lost or unanchored)
    told = [
        r.getMessage()
        for r in caplog.records
        if r.levelname == "ERROR" and "carried" in r.getMessage()
    ]
    assert [f"scene {n}" in text for n, text in zip(sorted(failing), told, strict=True)]


@pytest.mark.parametrize("with_user", [False, True])
async def test_only_a_story_without_any_image_has_failed(run, tmp_path, user_image, with_user):
    images = drawn(lambda s, variation, attempt: ConnectionError(f"line {s}{variation}{attempt}"))
    story = a_story(2, initial_reference_image=user_image if with_user else None)
    with pytest.raises(GenerationFailed) as caught:
        await run(a_pipeline(images), story)
    assert len(caught.value.causes) == len(images.requests) == 10
    assert "ConnectionError: line 113" in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [user_image]


@pytest.mark.parametrize("everything", [False, True])
async def test_a_model_that_cancels_itself_is_a_failed_variation(run, everything):
    def rule(scene, variation, attempt):
        lost = scene == 2 and (everything or variation == 1)
        return asyncio.CancelledError("of its own") if lost else picture(variation)

    result = await run(a_pipeline(drawn(rule)), a_story(3))
    assert [s.reference_from for s in result.scenes] == [
        "ranked", "carried" if everything else "ranked", "ranked"]  # fmt: skip
    assert len(result.scenes[1].variations) == (0 if everything else 1)


BAD_BYTES = {
    "a web page": b"<!doctype html><title>502 Bad Gateway</title>",
    "truncated": picture(5)[:-30],
    "nothing": b"",
    "a BMP": picture(5, form="BMP"),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "no bytes": GeneratedImage(data=None),
    "None": None,
}


@pytest.mark.parametrize("data", BAD_BYTES.values(), ids=BAD_BYTES)
async def test_bytes_that_are_no_image_are_a_failed_variation(run, data):
    class Foreign(FakeImages):
        async def generate(self, request):
            made = await super().generate(request)
            if at(request)[1] == 2:
                return made
            return GeneratedImage(data=data) if isinstance(data, bytes) else data

    result = await run(a_pipeline(Foreign()))
    assert [len(s.variations) for s in result.scenes] == [1, 1]
    assert [len(s.warnings) for s in result.scenes] == [1, 1]


@pytest.fixture
def full_disk(monkeypatch):
    """Makes `Candidate.save` fail for images of these shades; the list grows with each try."""

    def fail_for(shades, error=None):
        tried, save = [], Candidate.save

        async def failing(take, **where):
            tried.append(take.pixels.getpixel((0, 0))[0])
            if tried[-1] in shades:
                raise error or OSError(28, "No space left on device")
            return await save(take, **where)

        monkeypatch.setattr(Candidate, "save", failing)
        return tried

    return fail_for


async def test_when_the_winner_cannot_be_written_the_next_best_is_taken(run, caplog, full_disk):
    full_disk({204})
    scene = (await run(three(), a_story(1))).scenes[0]
    assert overalls(scene) == [20, 40]
    assert [(v.rank, v.selected) for v in scene.variations] == [(3, False), (2, True)]
    assert scene.reference == scene.variations[1].image.image_path
    assert "No space left" in scene.warnings[0]
    assert any(r.levelname == "ERROR" and "No space left" in r.getMessage() for r in caplog.records)


async def test_a_file_that_cannot_be_written_is_told_once(run, caplog, full_disk):
    full_disk({204})
    scene = (await run(three(), a_story(1))).scenes[0]
    assert len(scene.warnings) == 1
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1


async def test_a_loser_that_cannot_be_written_changes_nothing_for_the_winner(run, full_disk):
    full_disk({51})
    scene = (await run(three(), a_story(1))).scenes[0]
    assert overalls(scene) == [80, 40] and scene.reference_from == "ranked"
    assert scene.variations[0].selected


async def test_a_scene_of_which_nothing_can_be_written_is_carried(run, full_disk):
    full_disk({1, 2})
    images = drawn(
        lambda scene, variation, attempt: picture(variation if scene == 2 else 90 + variation)
    )
    result = await run(a_pipeline(images), a_story(3))
    assert [s.reference_from for s in result.scenes] == ["ranked", "carried", "ranked"]
    assert result.references[1] == result.references[0] == received(images, 3)[2]


async def test_when_nothing_can_be_written_the_failure_names_the_cause(run, full_disk):
    full_disk(set(SHADES.values()))
    with pytest.raises(GenerationFailed, match="No space left"):
        await run(three(), a_story(2))


async def test_an_unexpected_error_while_writing_costs_only_that_image(run, full_disk):
    full_disk({204}, TypeError("no such encoder"))
    scene = (await run(three(), a_story(1))).scenes[0]
    assert overalls(scene) == [20, 40]


async def test_a_trace_that_cannot_be_written_does_not_stop_the_run(run, monkeypatch):
    def full(self, n):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceTree, "scene", full)
    result = await run(a_pipeline())
    assert [s.reference_from for s in result.scenes] == ["ranked", "ranked"]


# progress and log


MESSAGES = {
    "enhance": "Enhancing prompts for reference images",
    "generate": "Generating reference image variations",
    "score": "Scoring and ranking reference images",
}


def check_reports(steps, scenes: int) -> None:
    """Three reports a scene, in order, with the exact words, to 100 %."""
    assert len(steps) == 3 * scenes
    for number in range(1, scenes + 1):
        assert [s.stage for s in steps if s.scene == number] == list(MESSAGES)
    assert all(s.message == MESSAGES[s.stage] and s.scenes == scenes for s in steps)
    percents = [s.percent for s in steps]
    assert percents == sorted(percents) and percents[0] >= 0 and percents[-1] == 100


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("scenes, chain", [(1, "previous"), (3, "previous"), (5, "none")])
async def test_each_scene_reports_its_three_stages(run, kind, scenes, chain):
    steps = []

    async def wait_and_append(step):
        await asyncio.sleep(0.001)
        steps.append(step)

    listener = steps.append if kind == "sync" else wait_and_append
    await run(a_pipeline(chain=chain), a_story(scenes), on_progress=listener)
    check_reports(steps, scenes)


async def test_a_picture_keeps_its_place_when_a_journaled_run_goes_on(run, tmp_path):
    def half(scene, variation, attempt):
        return BOOM if variation == 1 else picture(variation)

    journal = Journal(tmp_path / "journal")
    await run(a_pipeline(drawn(half), journal=journal), a_story(1))
    whole = drawn(lambda scene, variation, attempt: picture(variation))
    await run(a_pipeline(whole, journal=journal), a_story(1))
    shades = {path.name: Image.open(path).getpixel((0, 0))[0]
              for path in (tmp_path / "images").iterdir()}
    assert shades == {"x_scene_01_v1.png": 1, "x_scene_01_v2.png": 2}
    assert len(whole.requests) == 1


@pytest.mark.parametrize("kind", ["file in the way", "read-only place"])
async def test_a_journal_that_cannot_be_is_refused_before_anything_is_asked(
    run, tmp_path, monkeypatch, kind
):
    place, mkdir = tmp_path / "place", os.mkdir

    def refusing(path, *args, **how):
        if place in Path(path).parents:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *args, **how)

    if kind == "file in the way":
        place.write_text("a file")
    else:
        monkeypatch.setattr(os, "mkdir", refusing)
    pipeline = a_pipeline(journal=Journal(place / "journal"))
    with pytest.raises(ValueError, match="journal must be a folder that can be written"):
        await run(pipeline)
    assert pipeline.director.calls == pipeline.critic.calls == pipeline.image_model.requests == []
    assert [path for path in tmp_path.iterdir() if path != place] == []


@pytest.mark.parametrize("price", [0.25, None])
async def test_a_report_says_what_the_run_has_cost_so_far(run, price):
    images = drawn(lambda *place: GeneratedImage(data=picture(1), cost=price))
    steps = []
    result = await run(a_pipeline(images, max_enhancement_iterations=0), a_story(3),
                       on_progress=steps.append)
    costs = {(step.scene, step.stage): step.cost for step in steps}
    assert [costs[scene, "generate"] for scene in (1, 2)] == [0, price and 0.5]
    assert [costs[scene, "score"] for scene in (1, 2, 3)] == [price and 0.5 * n for n in (1, 2, 3)]
    assert result.cost == steps[-1].cost


async def test_a_call_on_its_way_does_not_hide_the_cost_so_far(run):
    images = drawn(lambda *place: GeneratedImage(data=picture(1), cost=0.25), seconds=0.01)
    costs = []
    pipeline = a_pipeline(images, max_enhancement_iterations=0, chain="none")
    await run(pipeline, a_story(4), on_progress=lambda step: costs.append(step.cost))
    assert costs == sorted(costs) and costs[-1] == 2


@pytest.mark.parametrize("broken", ["agents", "images"])
async def test_scenes_that_fail_report_like_any_other(run, broken):
    def rule(scene, variation, attempt):
        return BOOM if broken == "images" and scene != 2 else picture(variation)

    steps, over = [], {"director": says(BOOM)} if broken == "agents" else {}
    await run(a_pipeline(drawn(rule), **over), a_story(3), on_progress=steps.append)
    check_reports(steps, 3)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_story_that_fails_has_reported_all_the_same(run, kind):
    steps = []

    async def wait_and_append(step):
        await asyncio.sleep(0.005)
        steps.append(step)

    listener = steps.append if kind == "sync" else wait_and_append
    with pytest.raises(GenerationFailed):
        await run(a_pipeline(drawn(lambda *place: BOOM)), on_progress=listener)
    check_reports(steps, 2)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_listener_that_raises_is_logged_once_and_goes_on_hearing(run, caplog, kind):
    steps = []

    def listen(step):
        steps.append(step)
        raise BOOM

    async def listen_later(step):
        listen(step)

    result = await run(a_pipeline(), on_progress=listen if kind == "sync" else listen_later)
    check_reports(steps, 2)
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and "boom" in said[0].getMessage()
    assert not any(s.warnings for s in result.scenes)


async def test_a_listener_that_is_cancelled_once_goes_on_hearing(run):
    steps = []

    async def listen(step):
        steps.append(step)
        if len(steps) == 1:
            raise asyncio.CancelledError

    await run(a_pipeline(), on_progress=listen)
    check_reports(steps, 2)


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_listener_that_hangs_does_not_keep_the_run_from_ending(run, monkeypatch, stubborn):
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 0.05)
    let_go, steps = asyncio.Event(), []

    async def hang(step):
        steps.append(step)
        with contextlib.suppress(asyncio.CancelledError if stubborn else ()):
            await let_go.wait()
        await let_go.wait()

    async with asyncio.timeout(10):
        result = await run(a_pipeline(), on_progress=hang)
    let_go.set()
    assert len(result.references) == 2 and len(steps) == 1


async def test_the_log_of_a_run_that_goes_well(run, caplog):
    caplog.set_level(logging.INFO, "refimg.pipeline")
    result = await run(a_pipeline(), a_story(2))
    records = [r for r in caplog.records if r.name == "refimg.pipeline"]
    assert {r.levelname for r in records} == {"INFO"}
    lines = [r.getMessage() for r in records]
    for message in MESSAGES.values():
        assert sum(message in line for line in lines) == 2
    for scene in result.scenes:
        (choice,) = [line for line in lines if str(scene.reference) in line]
        best = next(v.scores for v in scene.variations if v.selected)
        for part in (f"overall {best.overall:.1f}", "pickscore", "ranked", f"scene {scene.scene}:"):
            assert part in choice
        for stage in ("enhance", "generate", "score", "wait"):
            assert re.search(rf"{stage} \d+\.\d+ s", choice)


async def test_the_log_names_scene_step_and_cause_of_each_fallback(run, caplog):
    images = drawn(lambda scene, variation, attempt: BOOM if scene == 2 else picture(variation))
    await run(a_pipeline(images), a_story(2))
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 4 and all("scene 2" in text for text in errors)
    assert ["boom" in text for text in errors] == [True, True, True, False]
    assert "carried" in errors[3]


# found by a reader


async def test_a_slow_listener_hears_every_report(run, monkeypatch):
    monkeypatch.setattr("refimg.engine.tasks.GRACE", 0.2)
    heard = []

    async def slow(step):
        await asyncio.sleep(0.05)
        heard.append(step.percent)

    await run(a_pipeline(), a_story(3), on_progress=slow)
    assert len(heard) == 9
    assert heard[-1] == 100


async def test_every_cause_of_a_failed_attempt_is_in_the_record(run):
    def rule(scene, variation, attempt):
        return RuntimeError(f"cause {attempt}{variation}") if attempt < 3 else picture(7)

    result = await run(a_pipeline(drawn(rule)), a_story(1))
    said = " ".join(result.scenes[0].warnings)
    assert all(f"cause {cause}" in said for cause in ("11", "12", "21", "22"))


async def test_the_reason_why_a_scene_is_unscored_is_the_scorers_own(run):
    scorer = FakeScorer(value=lambda *_: RuntimeError("weights are corrupt"))
    result = await run(a_pipeline(scorers=[scorer]), a_story(1))
    assert "weights are corrupt" in " ".join(result.scenes[0].warnings)


@pytest.mark.parametrize("missing", ["model", "calibration"])
async def test_a_scorer_without_provenance_is_refused_before_anything_is_paid(run, missing):
    scorer, images = FakeScorer(), FakeImages()
    setattr(scorer, missing, None)
    with pytest.raises(ValueError, match=missing):
        await run(a_pipeline(images, scorers=[scorer]))
    assert images.requests == []


async def test_a_scorer_that_stands_in_no_list_is_refused(run):
    with pytest.raises(ValueError, match="scorers must be a list"):
        await run(a_pipeline(scorers=FakeScorer()))


async def test_a_chain_that_cannot_be_is_named_as_the_chain(run):
    with pytest.raises(ValueError, match=r"chain must be 'none'.* got 'previous'"):
        await run(a_pipeline(FakeImages(max_references=0), chain="previous"))


@pytest.mark.parametrize("most, asked, chain", [
    (0, None, "none"), (1, None, "previous"), (2, None, "anchored"), (14, None, "anchored"),
    (14, "none", "none"), (1, "first", "first"),
])
async def test_the_chain_is_the_best_that_the_model_can_do(run, caplog, most, asked, chain):
    result = await run(a_pipeline(FakeImages(max_references=most), chain=asked), a_story(3))
    assert result.settings["chain"] == chain
    told = "no reference image can go along: each scene is drawn on its own"
    assert [told in scene.warnings for scene in result.scenes] == [not most] * 3
    assert caplog.text.count(told) == (not most)


async def test_a_rerun_keeps_the_chain_of_its_run(run):
    images = FakeImages(max_references=3)
    result = await run(a_pipeline(images, chain="first"), a_story(3))
    images.requests.clear()
    again = await a_pipeline(images).rerun(result, 3)
    assert {r.references for r in images.requests} == {(result.references[0],)}
    assert again.settings_of(3)["chain"] == "first"


async def test_what_can_be_loaded_is_loaded_sync_or_async():
    loaded = []

    async def later():
        loaded.append("images")

    images, scorer = FakeImages(), FakeScorer()
    images.load, scorer.load = later, lambda: loaded.append("scorer")
    await a_pipeline(images, scorers=[scorer]).load()
    assert loaded == ["images", "scorer"]
