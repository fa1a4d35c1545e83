"""Whatever goes wrong, S scenes in means S references out, or one error that says why not."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from refimg import generate
from refimg.generate import GeneratedImage, GenerationFailed
from refimg.pipeline import Pipeline, Scene, SceneResult, Story, StoryResult
from refimg.score import Batch, RawScore

from .fakes import FakeChat, FakeImages, FakeScorer, critique, picture

STEP = 8  # the red channel of the picture of call n is STEP * n: JPEG cannot mix two of them up

IMAGES = ("ok", "jpeg", "raises", "truncated", "html", "empty", "cancelled", "no bytes")
GOOD = {"ok", "jpeg"}
DIRECTORS = ("ok", "fenced", "raises", "empty", "cancelled")
CRITICS = ("ok", "fenced", "raises", "empty", "no json", "nan", "missing", "cancelled")
SCORERS = ("ok", "none", "nan", "batches", "always", "one", "short", "none for one", "no record")


@dataclass(frozen=True)
class Pattern:
    """What goes wrong in one run; the lists go round."""

    scenes: int = 1
    variations: int = 1
    rounds: int = 2
    chain: str = "previous"
    user_image: bool = False
    negative: bool = False
    images: tuple[str, ...] = ("ok",)
    director: tuple[str, ...] = ("ok",)
    critic: tuple[str, ...] = ("ok",)
    scorers: tuple[str, ...] = ("ok", "ok")
    broken_progress: bool = False
    existing: frozenset[tuple[int, int]] = frozenset()  # (scene, number) of files already there


def faults(kinds: tuple[str, ...], longest: int) -> st.SearchStrategy:
    """Lists in which a fault is as likely as none, and some that hold nothing but faults."""
    weighted = (*kinds[:1] * (len(kinds) - 2), *kinds)
    some = st.lists(st.sampled_from(weighted), min_size=2, max_size=longest)
    only = st.lists(st.sampled_from(kinds[1:]), min_size=1, max_size=longest)
    return st.one_of(some, some, some, some, only).map(tuple)


PATTERNS = st.builds(
    Pattern,
    scenes=st.integers(1, 4),
    variations=st.integers(1, 3),
    rounds=st.sampled_from([2, 2, 1, 1, 0]),
    chain=st.sampled_from(["anchored", "previous", "first", "none"]),
    user_image=st.booleans(),
    negative=st.booleans(),
    images=faults(IMAGES, 9),
    director=faults(DIRECTORS, 5),
    critic=faults(CRITICS, 5),
    scorers=st.tuples(st.sampled_from(SCORERS), st.sampled_from(SCORERS)),
    broken_progress=st.sampled_from([False, False, False, True]),
    existing=st.frozensets(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4),
)


def image_of(kind: str, number: int, request) -> object:
    """What the image model does in call `number`."""
    png = picture(STEP * number)
    return {
        "ok": png,
        "jpeg": picture(STEP * number, form="JPEG"),
        "raises": RuntimeError(f"call {number} failed"),
        "truncated": png[: len(png) // 2],
        "html": b"<!doctype html><title>502 Bad Gateway</title>",
        "empty": b"",
        "cancelled": asyncio.CancelledError("the provider's own"),
        "no bytes": GeneratedImage(data=None),
    }[kind]


def prompt_of(kind: str, number: int) -> object:
    """What the director answers in call `number`."""
    text = f"A better prompt, number {number}, of a lighthouse keeper."
    return {
        "ok": text,
        "fenced": f"<think>hm</think>\n```\n{text}\n```",
        "raises": RuntimeError("no director"),
        "empty": "",
        "cancelled": asyncio.CancelledError("the provider's own"),
    }[kind]


def critique_of(kind: str, number: int) -> object:
    """What the critic answers in call `number`."""
    good = critique(40 + 5 * number % 60)
    return {
        "ok": good,
        "fenced": f"Here you are:\n```json\n{good}\n```",
        "raises": RuntimeError("no critic"),
        "empty": "",
        "no json": "I like it {a lot}.",
        "nan": critique(70, completeness=float("nan")),
        "missing": json.dumps({"completeness": 70}),
        "cancelled": asyncio.CancelledError("the provider's own"),
    }[kind]


class FaultyScorer(FakeScorer):
    """Reads the red channel, or fails in one of the ways of SCORERS."""

    def __init__(self, name: str, kind: str):
        super().__init__(name)
        self.kind = kind

    def score(self, batch: Batch) -> list[RawScore]:
        made = super().score(batch)
        hit = [round(raw.value / STEP) % 3 == 0 for raw in made]
        if self.kind == "always" or (self.kind == "batches" and len(made) > 1):
            raise RuntimeError("out of memory")
        if self.kind == "one" and any(hit):
            raise RuntimeError("I do not like this one")
        if self.kind == "short":
            return made[:-1] or made
        if self.kind == "no record":
            return [raw.value for raw in made]
        values = {"none": [None] * len(made), "nan": [float("nan")] * len(made)}
        if self.kind == "none for one":
            return [RawScore(None, "hit") if h else r for h, r in zip(hit, made, strict=True)]
        return [RawScore(v) for v in values.get(self.kind, [raw.value for raw in made])]

    def expected(self, red: int) -> float | None:
        """The raw value that an image of this red channel must have in the end."""
        hit = round(red / STEP) % 3 == 0
        lost = self.kind in {"none", "nan", "always", "no record"}
        return None if lost or (hit and self.kind in {"one", "none for one"}) else float(red)


class World:
    """One run over fakes that follow a pattern, in a folder of its own."""

    def __init__(self, pattern: Pattern, root: Path):
        self.pattern, self.root, self.out = pattern, root, root / "images"
        self.fates: list[str] = []
        self.reports: list = []
        director, critic = itertools.cycle(pattern.director), itertools.cycle(pattern.critic)
        self.model = FakeImages(self.draw, max_references=1,
                                takes_negative_prompt=pattern.negative)
        self.scorers = [
            FaultyScorer(name, kind)
            for name, kind in zip(("pickscore", "clip_score"), pattern.scorers, strict=True)
        ]
        self.pipeline = Pipeline(
            director=FakeChat(lambda m, s, n: prompt_of(next(director), n)),
            critic=FakeChat(lambda m, s, n: critique_of(next(critic), n)),
            image_model=self.model, scorers=self.scorers, num_variations=pattern.variations,
            max_enhancement_iterations=pattern.rounds, chain=pattern.chain, seed=7,
        )
        self.out.mkdir()
        self.existing = {self.out / f"id_scene_{n:02d}_v{k}.png" for n, k in pattern.existing}
        for path in self.existing:
            path.write_bytes(b"not ours")
        self.user_image = None
        if pattern.user_image:
            self.user_image = root / "user.png"
            self.user_image.write_bytes(picture(255))
        self.story = Story(
            scenes=[Scene(prompt=f"Scene {n}: the keeper.") for n in range(1, pattern.scenes + 1)],
            initial_reference_image=self.user_image,
        )

    def draw(self, request, number: int) -> object:
        kinds = self.pattern.images
        self.fates.append(kinds[(number - 1) % len(kinds)])
        return image_of(self.fates[-1], number, request)

    def progress(self, report) -> None:
        self.reports.append(report)
        if self.pattern.broken_progress:
            raise ValueError("the caller's own mistake")

    async def run(self) -> StoryResult | GenerationFailed:
        before = asyncio.all_tasks()
        try:
            async with asyncio.timeout(20):
                return await self.pipeline.run(
                    self.story, generation_id="id", output_dir=self.out, on_progress=self.progress)
        except GenerationFailed as error:
            return error
        finally:
            assert asyncio.all_tasks() == before

    def calls(self, scene: int) -> list[int]:
        """The numbers of the image calls of a scene, from 1."""
        stem = f"id_scene_{scene:02d}/"
        return [n for n, r in enumerate(self.model.requests, 1) if r.slot.startswith(stem)]

    def good(self, scene: int) -> list[int]:
        return [n for n in self.calls(scene) if self.fates[n - 1] in GOOD]


def red(path: Path) -> int:
    """The red channel of a picture on disk, which must be whole."""
    with Image.open(path) as image:
        image.load()
        assert image.size == (64, 36)
        return image.getpixel((0, 0))[0]


def check_attempts(world: World, scene: SceneResult) -> None:
    """All variations, all again, one from the original: no more than that, and none in vain."""
    requests = [world.model.requests[n - 1] for n in world.calls(scene.scene)]
    attempts = [int(request.slot.rsplit("/a", 1)[1]) for request in requests]
    failed = scene.enhancement.stop_reason == "failed"
    v = 1 if failed else world.pattern.variations
    full = [*[1] * v, *[2] * v, 3]
    assert attempts == full[: len(attempts)] and attempts.count(attempts[-1]) in (v, 1)
    assert len(attempts) <= 2 * world.pattern.variations + 1
    good = [int(world.model.requests[n - 1].slot.rsplit("/a", 1)[1])
            for n in world.good(scene.scene)]
    assert set(good) <= {attempts[-1]}
    assert good or attempts == full
    for request, attempt in zip(requests, attempts, strict=True):
        if failed or attempt == 3:
            assert request.prompt.startswith(scene.prompt)
    assert scene.sent_prompt == requests[-1].prompt
    expected = "carried" if not good else "fallback" if failed or good == [3] else None
    assert scene.reference_from == expected or (expected is None
                                                and scene.reference_from in ("ranked", "first"))


def check_variations(world: World, scene: SceneResult) -> None:
    """Each variation's file, record and scores are those of one and the same call."""
    reds = [red(v.image.image_path) for v in scene.variations]
    numbers = [round(shade / STEP) for shade in reds]
    assert sorted(numbers) == sorted(world.good(scene.scene))
    for variation, number, shade in zip(scene.variations, numbers, reds, strict=True):
        request, image = world.model.requests[number - 1], variation.image
        assert (image.provider_id, image.prompt) == (f"p{number}", request.prompt)
        assert (image.seed, image.references) == (request.seed, request.references)
        for scorer in world.scorers:
            assert variation.scores.raw[scorer.name] == scorer.expected(shade)
            if scorer.expected(shade) is None:
                assert variation.scores.metrics[scorer.name] is None
                assert variation.scores.notes[scorer.name]
        assert (variation.rank is None) == (variation.scores.overall is None)
    slots = [world.model.requests[number - 1].slot for number in numbers]
    assert slots == sorted(slots)


def check_choice(scene: SceneResult) -> None:
    """The best is the reference; nothing scored: the first, and neither good nor bad."""
    selected = [v for v in scene.variations if v.selected]
    if scene.reference_from == "carried":
        assert not scene.variations and scene.below_threshold is None and scene.warnings
        return
    assert [v.image.image_path for v in selected] == [scene.reference]
    overalls = [v.scores.overall for v in scene.variations]
    known = [o for o in overalls if o is not None]
    if known:
        assert selected[0] is scene.variations[overalls.index(max(known))]
        assert (selected[0].rank, scene.reference_from == "first") == (1, False)
        assert scene.below_threshold == (max(known) < 30)
    else:
        assert selected[0] is scene.variations[0]
        assert scene.below_threshold is None and scene.reference_from in ("first", "fallback")


def check_chain(world: World, result: StoryResult) -> None:
    """What each scene was sent as reference, and what stands in for a scene without an image."""
    own = [s.reference if s.reference_from != "carried" else None for s in result.scenes]
    given = world.user_image.resolve() if world.user_image else None
    passed: list[Path | None] = []
    for n, scene in enumerate(result.scenes):
        before = passed[-1] if passed else None
        later = {"previous": before, "anchored": before, "none": None,
                 "first": given or (passed[0] if passed else None)}[world.pattern.chain]
        sent = given if n == 0 else later
        for call in world.calls(scene.scene):
            assert world.model.requests[call - 1].references == ((sent,) if sent else ())
        passed.append(own[n] or sent)
    last = given or next(path for path in own if path)
    for scene, path in zip(result.scenes, own, strict=True):
        last = path or last
        assert scene.reference == last


def check_files(world: World, result: StoryResult) -> None:
    """Every image has a file of its own; the numbers are the next free ones, in order."""
    paths = [v.image.image_path for s in result.scenes for v in s.variations]
    assert len(set(paths)) == len(paths) and not set(paths) & world.existing
    assert all(path.is_absolute() and path.parent == world.out.resolve() for path in paths)
    assert {*world.out.iterdir()} == {*paths} | world.existing
    assert all(path.read_bytes() == b"not ours" for path in world.existing)


def check_reports(world: World) -> None:
    """Three reports a scene in their order, the percentage rising to 100."""
    percents = [report.percent for report in world.reports]
    assert percents == sorted(percents) and percents[-1] == 100
    for number in range(1, world.pattern.scenes + 1):
        stages = [report.stage for report in world.reports if report.scene == number]
        assert stages == ["enhance", "generate", "score"]


def check_round_trip(world: World, result: StoryResult) -> None:
    assert StoryResult.model_validate_json(result.model_dump_json()) == result
    result.save(world.root / "result.json")
    assert StoryResult.load(world.root / "result.json") == result


def check_result(world: World, result: StoryResult) -> None:
    """Everything that DESIGN promises of a run that ends well."""
    scenes = world.pattern.scenes
    assert [s.scene for s in result.scenes] == [*range(1, scenes + 1)]
    assert [s.prompt for s in result.scenes] == [s.prompt for s in world.story.scenes]
    assert result.references == [s.reference for s in result.scenes]
    for path in result.references:
        red(path)
    for scene in result.scenes:
        check_attempts(world, scene)
        check_variations(world, scene)
        check_choice(scene)
    check_chain(world, result)
    check_files(world, result)
    check_reports(world)
    check_round_trip(world, result)


def play(runner: asyncio.Runner, pattern: Pattern) -> StoryResult | GenerationFailed:
    """One run of a pattern, checked from all sides."""
    with tempfile.TemporaryDirectory(prefix="refimg-faults-") as folder:
        world = World(pattern, Path(folder))
        result = runner.run(world.run())
        assert not list(world.root.rglob(".refimg-*"))
        assert not (world.root / "reference_image_traces").exists()
        assert isinstance(result, GenerationFailed) == (not GOOD & set(world.fates))
        if isinstance(result, GenerationFailed):
            assert {*world.out.iterdir()} == world.existing
            v, s = world.pattern.variations, world.pattern.scenes
            assert s <= len(world.model.requests) <= s * (2 * v + 1)
        else:
            check_result(world, result)
    return result


@pytest.fixture(scope="module")
def runner():
    """One event loop for all patterns, with nothing logged: a thousand runs log a lot."""
    logging.disable(logging.CRITICAL)
    with asyncio.Runner() as runner:
        yield runner
    logging.disable(logging.NOTSET)


EXAMPLES = 1000 if os.environ.get("REFIMG_TEST_ALL") == "1" else 50


@settings(max_examples=EXAMPLES, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(pattern=PATTERNS)
@example(pattern=Pattern(scenes=4, variations=3, images=("raises",)))
@example(pattern=Pattern(scenes=4, variations=3, images=("cancelled",), director=("cancelled",)))
@example(pattern=Pattern(scenes=3, variations=2, images=(*["raises"] * 5, "ok")))
def test_any_pattern_of_faults(runner, pattern):
    play(runner, pattern)


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_picture_fault_alone(runner, kind):
    made = play(runner, Pattern(scenes=2, variations=2, images=(kind,)))
    assert isinstance(made, StoryResult) == (kind in GOOD)


@pytest.mark.parametrize("kind", DIRECTORS)
def test_every_kind_of_director_fault_alone(runner, kind):
    made = play(runner, Pattern(scenes=2, variations=2, director=(kind,)))
    lost = kind not in ("ok", "fenced")
    assert [s.reference_from == "fallback" for s in made.scenes] == [lost] * 2
    assert [len(s.variations) for s in made.scenes] == [1 if lost else 2] * 2


@pytest.mark.parametrize("kind", CRITICS)
def test_every_kind_of_critic_fault_alone(runner, kind):
    made = play(runner, Pattern(scenes=2, variations=2, critic=(kind,)))
    lost = kind not in ("ok", "fenced")
    assert [s.reference_from == "fallback" for s in made.scenes] == [lost] * 2


@pytest.mark.parametrize("kind", SCORERS)
def test_every_kind_of_scorer_fault_alone(runner, kind):
    made = play(runner, Pattern(scenes=2, variations=3, scorers=(kind, kind)))
    unscored = kind in {"none", "nan", "always", "no record"}
    assert [s.reference_from == "first" for s in made.scenes] == [unscored] * 2


def test_a_later_round_that_is_cancelled_by_the_model_keeps_the_best_before_it(runner):
    """DESIGN: that round is lost, never those before it."""
    made = play(runner, Pattern(director=("ok", "cancelled"), rounds=2))
    assert (made.scenes[0].enhancement.stop_reason, made.scenes[0].reference_from) == (
        "error", "ranked")


def test_a_scorer_that_raises_cancelled_error_leaves_the_images_unscored(tmp_path):
    """A scorer's own CancelledError must not strand the scenes that wait for this one."""

    class Broken(FakeScorer):
        def score(self, batch):
            raise asyncio.CancelledError("a pool of its own was closed")

    world = World(Pattern(scenes=2), tmp_path)
    world.pipeline.scorers = [Broken()]

    async def run() -> StoryResult:
        async with asyncio.timeout(5):
            return await world.pipeline.run(world.story, output_dir=world.out)

    made = asyncio.run(run())
    assert [s.reference_from for s in made.scenes] == ["first", "first"]


def test_failed_says_why_each_call_failed_and_nothing_else(tmp_path):
    world = World(Pattern(scenes=2, variations=2, images=("raises", "html")), tmp_path)
    error = asyncio.run(world.run())
    assert isinstance(error, GenerationFailed)
    assert "call 1 failed" in str(error) and "not a readable PNG" in str(error)
    assert len(error.causes) == len(world.model.requests) == 10


def break_disk(monkeypatch, broken: Callable[[int], bool]) -> None:
    """From here on the files of calls for which `broken` is true cannot be written."""

    save = generate.Candidate.save

    async def failing(candidate, **where):
        if broken(int(candidate.generated.provider_id[1:])):
            raise OSError(28, "No space left on device")
        return await save(candidate, **where)

    monkeypatch.setattr(generate.Candidate, "save", failing)


def test_the_next_best_is_taken_where_the_best_cannot_be_written(tmp_path, monkeypatch):
    break_disk(monkeypatch, lambda call: call % 3 == 0)
    world = World(Pattern(scenes=2, variations=3), tmp_path)
    made = asyncio.run(world.run())
    for scene in made.scenes:
        shades = [red(v.image.image_path) for v in scene.variations]
        assert [round(shade / STEP) % 3 for shade in shades] == [1, 2]
        assert red(scene.reference) == max(shades) and scene.variations[1].selected
        assert sum("No space left" in warning for warning in scene.warnings) == 1


def test_a_disk_that_is_full_for_one_scene_does_not_stop_the_story(tmp_path, monkeypatch):
    break_disk(monkeypatch, lambda call: 3 <= call <= 4)
    world = World(Pattern(scenes=3, variations=2), tmp_path)
    made = asyncio.run(world.run())
    assert [s.reference_from for s in made.scenes] == ["ranked", "carried", "ranked"]
    assert made.references[1] == made.references[0]
    check_chain(world, made)


def test_a_full_disk_is_the_cause_that_is_named(tmp_path, monkeypatch):
    break_disk(monkeypatch, lambda call: True)
    error = asyncio.run(World(Pattern(scenes=2, variations=2), tmp_path).run())
    assert isinstance(error, GenerationFailed) and "No space left" in str(error)
    assert not (tmp_path / "reference_image_traces").exists()


@pytest.mark.parametrize("winner", [1, 2, 3])
def test_files_are_numbered_in_generation_order_whichever_wins(tmp_path, winner):
    """`{id}_scene_{NN}_v{k}.png`, k the next free number: no gap where the winner came first."""
    world = World(Pattern(variations=3, existing=frozenset({(1, 2)})), tmp_path)
    world.model.script = lambda request, n: picture(200 if n == winner else STEP * n)
    made = asyncio.run(world.run())
    assert [v.selected for v in made.scenes[0].variations].index(True) == winner - 1
    names = [v.image.image_path.name for v in made.scenes[0].variations]
    assert names == [f"id_scene_01_v{k}.png" for k in (1, 3, 4)]


def test_the_same_id_again_takes_the_next_free_numbers(tmp_path):
    """Without a journal a second run draws anew, beside the files of the first."""

    async def twice() -> list[StoryResult]:
        world = World(Pattern(scenes=2, variations=3), tmp_path)
        return [await world.run(), await world.run()]

    first, second = asyncio.run(twice())
    names = [[v.image.image_path.name for s in r.scenes for v in s.variations]
             for r in (first, second)]
    assert names == [[f"id_scene_{n:02d}_v{k}.png" for n in (1, 2) for k in range(start, start + 3)]
                     for start in (1, 4)]


def test_two_runs_at_once_do_not_mix(tmp_path):
    """Two ids in one folder: every path, record and score belongs to its own run."""
    rng = random.Random(5)
    fates = tuple(rng.choice(["ok", "jpeg", "raises"]) for _ in range(20))

    async def both() -> list[World]:
        worlds = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            worlds.append(World(Pattern(scenes=3, variations=3, images=fates), tmp_path / name))
        shared = tmp_path / "images"
        for world in worlds:
            world.model.seconds = 0.001
        runs = (w.pipeline.run(w.story, generation_id=f"id{i}", output_dir=shared)
                for i, w in enumerate(worlds))
        for world, result in zip(worlds, await asyncio.gather(*runs), strict=True):
            world.result = result
        return worlds

    paths = []
    for i, world in enumerate(asyncio.run(both())):
        variations = [v for s in world.result.scenes for v in s.variations]
        paths += [v.image.image_path for v in variations]
        for v in variations:
            shade = red(v.image.image_path)
            assert v.scores.raw["pickscore"] == shade
            assert v.image.provider_id == f"p{round(shade / STEP)}"
            assert v.image.image_path.name.startswith(f"id{i}_scene_")
    assert len(set(paths)) == len(paths)
