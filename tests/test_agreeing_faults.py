"""S scenes in, S references out: subjects, absent scenes, cutaways, plans, and any image model."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimg import GenerationFailed, Pipeline, Scene, Story, StoryResult, Subject
from refimg.storage.files import read_image

from .fakes import FakeChat, FakeImages, FakeScorer, critic, picture
from .test_agreeing import Likeness, at

NAMES = ("Mara", "the old boat", "Grünau", "灯台")
PLANS = ('{"style": "ink"}', "no plan", "")


@dataclass(frozen=True)
class Shot:
    """One scene: who is in it, what it follows, and how its images fare."""

    shown: frozenset[int] | None  # of NAMES; None: whom the prompt names
    named: int  # whom the prompt names
    present: bool
    follows: int | None  # taken modulo what is allowed; 0: "none"; None: the chain
    fails: tuple[bool, ...]


@dataclass(frozen=True)
class Pattern:
    """A story, and the pipeline that draws it."""

    shots: tuple[Shot, ...]
    sheets: tuple[int, ...]  # images of each subject; none at all: a story without subjects
    looks: bool
    user_image: bool
    takes: int
    most: int
    chain: str | None
    compares: bool
    plan: str


SHOTS = st.builds(
    Shot, shown=st.none() | st.frozensets(st.integers(0, 3), max_size=3), named=st.integers(0, 3),
    present=st.booleans(), follows=st.sampled_from([None, None, None, 0, 1, 2]),
    fails=st.lists(st.sampled_from([False, False, False, True]), min_size=1, max_size=3).map(tuple))
PATTERNS = st.builds(
    Pattern, shots=st.lists(SHOTS, min_size=1, max_size=5).map(tuple),
    sheets=st.just(()) | st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple),
    looks=st.booleans(), user_image=st.booleans(), takes=st.sampled_from([0, 1, 3, 14]),
    most=st.integers(0, 5), chain=st.sampled_from([None, "anchored", "previous", "first", "none"]),
    compares=st.booleans(), plan=st.sampled_from(PLANS))


def image(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    path.write_bytes(picture(40 + 10 * len(list(folder.iterdir()))))
    return path


def story(pattern: Pattern, folder: Path) -> Story:
    """The story of a pattern, its files in the folder."""
    subjects = [
        Subject(name=NAMES[k], images=[image(folder, f"s{k}{i}") for i in range(count)],
                looks={"torn coat": "a torn coat"} if pattern.looks else {},
                look_images={"torn coat": image(folder, f"look{k}")}
                if pattern.looks and count % 2 else {})
        for k, count in enumerate(pattern.sheets)]
    scenes = []
    for number, shot in enumerate(pattern.shots, start=1):
        listed = None
        if shot.shown is not None and subjects:
            every = [NAMES[k] for k in sorted(shot.shown) if k < len(subjects)]
            listed = [f"{name}/torn coat" if pattern.looks and number % 2 else name
                      for name in every]
        earlier = shot.follows and min(shot.follows, number - 1)
        scenes.append(Scene(
            prompt=f"{NAMES[shot.named]}, scene {number}", subjects=listed,
            subject_present=shot.present,
            follows=None if shot.follows is None else earlier or "none"))
    return Story(scenes=scenes, subjects=subjects,
                 initial_reference_image=image(folder, "user") if pattern.user_image else None)


def pipeline(pattern: Pattern) -> Pipeline:
    """The pipeline of a pattern, on fakes that remember."""
    def draw(request, number):
        scene, variation = at(request)
        fates = pattern.shots[scene - 1].fails
        fails = fates[(variation + number) % len(fates)]
        return RuntimeError("no image") if fails else picture(5 * number)

    def write(messages, schema, number):
        return pattern.plan if schema is not None else "a better prompt"

    return Pipeline(
        FakeChat(write), critic(), FakeImages(draw, max_references=pattern.takes),
        [FakeScorer(), *([Likeness()] if pattern.compares else [])], num_variations=2,
        max_enhancement_iterations=1, chain=pattern.chain, max_references=pattern.most, seed=3)


def check_request(pattern: Pattern, request) -> None:
    """As many images as allowed, none twice, each there, and each named by its number."""
    sent = request.references
    assert len(sent) <= min(pattern.takes, pattern.most)
    assert len({os.path.realpath(path) for path in sent}) == len(sent)
    assert all(path.is_file() for path in sent)
    numbers = [int(n) for n in re.findall(r"\bImage (\d+) (?:is|shows) ", request.prompt)]
    assert numbers == (list(range(1, len(sent) + 1)) if len(sent) > 1 else [])


def check(pattern: Pattern, made: Pipeline, told: Story, result: StoryResult) -> None:
    """What is promised of every story that ends well."""
    assert [s.scene for s in result.scenes] == [*range(1, len(told.scenes) + 1)]
    assert result.references == [s.reference for s in result.scenes]
    for path in result.references:
        read_image(path)
    for request in made.image_model.requests:
        check_request(pattern, request)
    planned = pattern.plan == PLANS[0] and len(told.scenes) > 1
    assert result.planned_markers == (json.loads(pattern.plan) if planned else None)
    for number, scene in enumerate(result.scenes, start=1):
        for one in scene.variations:
            value = one.scores.metrics.get("consistency")
            assert value is None or told.shows(number)
            assert one.scores.overall is not None


def play(pattern: Pattern) -> None:
    """One run of a pattern."""
    with tempfile.TemporaryDirectory(prefix="refimg-agree-") as name:
        folder = Path(name)
        told, made = story(pattern, folder), pipeline(pattern)

        async def run() -> StoryResult:
            async with asyncio.timeout(20):
                return await made.run(told, output_dir=folder / "images")

        blind = pattern.takes == 0 and (
            pattern.user_image or (len(told.scenes) > 1 and pattern.chain not in (None, "none")))
        try:
            result = asyncio.run(run())
        except ValueError as error:
            assert blind and "takes no reference images" in str(error)
            assert not made.image_model.requests and not made.director.calls
        except GenerationFailed:
            assert all(any(shot.fails) for shot in pattern.shots)
        else:
            assert not blind
            check(pattern, made, told, result)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


EXAMPLES = 1000 if os.environ.get("REFIMG_TEST_ALL") == "1" else 60


@settings(max_examples=EXAMPLES, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(pattern=PATTERNS)
def test_as_many_references_come_out_as_scenes_went_in(pattern):
    play(pattern)
