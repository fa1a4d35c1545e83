"""Do the prompts of a planned story contradict each other? Stories of other people, no markers.

What the original says counts for nothing: what the director adds is looked at. Two scenes share a
place where both name the same setting, or where nothing is said of one; so all scenes of a story
are compared with each other, which asks more.
"""

from __future__ import annotations

import json
from itertools import combinations, islice
from pathlib import Path

import pytest

from refimg.enhance import enhance_prompt_iterative
from refimg.pipeline import Scene, Story, plan_story, scene_context
from refimg.sandbox.agents import Critic, Director
from refimg.sandbox.aspects import tones
from refimg.sandbox.world import read_prompt

PROMPTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "prompts"
PALETTES = {"warm", "cool", "muted", "vivid", "mono"}
NUMBER = 20


def stories() -> list[Story]:
    """Fifteen long stories, and short prompts by four for the rest."""
    found = []
    for path in sorted((PROMPTS / "stories").glob("*.json")):
        scenes = json.loads(path.read_text("utf-8"))["scenes"]
        frames = [shot["first_frame"] for scene in scenes for shot in scene["shots"]]
        found.append(Story(scenes=[Scene(prompt=frame) for frame in frames[:6]]))
    rows = (PROMPTS / "partiprompts_dev.tsv").read_text("utf-8").splitlines()[1:]
    texts = iter([row.split("\t")[0] for row in rows])
    while len(found) < NUMBER and (four := list(islice(texts, 4))):
        found.append(Story(scenes=[Scene(prompt=text) for text in four]))
    return found


def added(original: str, final: str) -> dict[str, set[str]]:
    """What the final prompt has of hour, style and palette that the original has not."""
    before, after = read_prompt(original), read_prompt(final)
    new = {name: {after[name]} - {before.get(name)} if name in after else set()
           for name in ("time", "style")}
    return new | {"palette": (tones(final) - tones(original)) & PALETTES}


async def contradictions(story: Story, planned: bool) -> dict[str, int]:
    """How many pairs of scenes were given two different hours, styles or palettes."""
    director = Director()
    told = await plan_story(story, director=director) if planned else story
    new = []
    for number, scene in enumerate(told.scenes, start=1):
        made = await enhance_prompt_iterative(
            scene.prompt, director=director, critic=Critic(), max_iterations=2,
            context=scene_context(told, number))
        new.append(added(scene.prompt, made.final_prompt))
    return {kind: sum(bool(a[kind] and b[kind] and a[kind] != b[kind])
                      for a, b in combinations(new, 2)) for kind in ("time", "style", "palette")}


@pytest.mark.skipif(not PROMPTS.is_dir(), reason="the shared example data is not here")
async def test_scenes_of_a_planned_story_do_not_contradict_each_other():
    told = stories()
    assert len(told) == NUMBER
    counts = [await contradictions(story, planned=True) for story in told]
    assert [sum(one.values()) for one in counts] == [0] * NUMBER, counts


@pytest.mark.all
@pytest.mark.skipif(not PROMPTS.is_dir(), reason="the shared example data is not here")
async def test_without_a_plan_most_of_them_do():
    """So that the other test can fail."""
    counts = [await contradictions(story, planned=False) for story in stories()]
    assert sum(any(one.values()) for one in counts) > NUMBER / 2
