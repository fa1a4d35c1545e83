"""Makes the files beside it; runs with refimg 0.1 only, see README.md."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path

from refimg.gallery import Gallery, veto
from refimg.pipeline import GenerationCancelled, Pipeline, Scene, Story, choose, rescore
from refimg.sandbox.painter import Painter
from refimg.sandbox.scorers import SandboxAesthetic, SandboxClipScore
from refimg.storage.journal import Journal
from tests.fakes import FakeChat, FakeImages, FakeScorer, critique, picture

HERE = Path(__file__).resolve().parent
OUTPUT = Path("/srv/refimg-0.1/images")  # of the journaled run, as its rows name it
STORY = Story(
    title="A keeper's evening",
    consistency_markers={"style": "watercolor", "mood": "calm"},
    scenes=[
        Scene(prompt="a lighthouse keeper in a red coat by the sea at dusk"),
        Scene(prompt="the keeper in a red coat in a forest, in fog",
              continuity_note="the same keeper"),
        Scene(prompt="the keeper in a red coat in a harbour at night"),
    ],
)


def sandbox(**options) -> Pipeline:
    """A pipeline of the sandbox that draws small images."""
    return Pipeline(
        image_model=Painter(width=192), num_variations=3, max_enhancement_iterations=2, seed=7,
        chain="previous", **options)


async def plain() -> None:
    folder = HERE / "plain"
    result = await sandbox().run(STORY, generation_id="plain", output_dir=folder / "images")
    result.save(folder / "run.json")


async def choices() -> None:
    """Two choices and three vetoes; the choice of a vetoed variation lifts its veto."""
    folder, p = HERE / "choices", sandbox()
    story = STORY.model_copy(update={"scenes": STORY.scenes[:2]})
    result = await p.run(story, generation_id="choices", output_dir=folder / "images")
    ranked = [{v.rank: k for k, v in enumerate(s.variations, 1)} for s in result.scenes]
    result = choose(result, 1, ranked[0][2], "the coat is redder")
    result = veto(result, 1, ranked[0][3], "no sea")
    result = veto(result, 2, ranked[1][1], "too dark")
    result.save(folder / "run.json")
    gallery = Gallery(p, folder / "run.json", blind=True)
    gallery.veto(2, ranked[1][3], "blurred")
    gallery.choose(2, ranked[1][1], "after all, it is the best")


async def reruns() -> None:
    """A choice and a veto that reruns outlive or not, three reruns, two rescores."""
    folder, p = HERE / "reruns", sandbox()
    result = await p.run(STORY, generation_id="reruns", output_dir=folder / "images")
    result = choose(result, 1, 2, "the coat is redder")
    result = choose(result, 3, 2, "the better harbour")
    result = veto(result, 3, 1, "no ships")
    result = await rescore(result, weights={"pickscore": 0, "clip_score": 0, "aesthetic": 1})
    result.save(folder / "run.json")
    gallery = Gallery(p, folder / "run.json")
    await gallery.rerun(3)
    result = await p.rerun(gallery.result, 2, prompt="the keeper in a red coat on a beach, in fog")
    result = await rescore(result, [SandboxClipScore(), SandboxAesthetic()])
    result = await p.rerun(result, 3)
    result.save(folder / "run.json")
    named = {v.image.image_path for s in result.scenes for v in s.variations}
    for path in set((folder / "images").iterdir()) - named:
        path.unlink()


TALE = Story(
    title="Three places",
    consistency_markers={"style": "watercolor", "mood": "calm"},
    brand="a paper mill",
    scenes=[
        Scene(prompt='a lighthouse, with "OPEN" on its door'),
        Scene(prompt="a harbour at dusk", continuity_note="the same coast",
              consistency_guideline="one light, from the left"),
        Scene(prompt="a forest, 3 deer", transition_note="the path leads inland"),
    ],
)
PLACES = ("lighthouse", "harbour", "forest")


def write(messages, schema, number):
    """A director whose answer follows from what it is asked."""
    asked = " ".join(m.content for m in messages)
    place = next(name for name in PLACES if name in asked)
    return f"a wide view of a {place} at dawn, version {len(asked)}"


def criticise(messages, schema, number):
    """A critic who needs a repair turn for the harbour."""
    asked = " ".join(m.content for m in messages)
    bad = "harbour" in asked and not any(m.role == "assistant" for m in messages)
    return critique(70, completeness="many") if bad else critique(70)


class Stuck(FakeImages):
    """Images of which the second variation of scene 2 never comes."""

    async def generate(self, request):
        if "scene_02/v2" in request.slot:
            await asyncio.Event().wait()
        return await super().generate(request)


def draw(request, number):
    """The image of a slot: the same bytes for the same scene and variation."""
    scene, variation = (int(p[-2:].lstrip("0_v")) for p in request.slot.split("/")[:2])
    return picture(60 * scene + 20 * variation)


async def journal() -> None:
    """A run that is cancelled while scene 2 waits for its second image."""
    folder = HERE / "journal"
    book = Journal(folder / "journal")
    p = Pipeline(
        FakeChat(write, name="fake-director"), FakeChat(criticise, name="fake-critic"),
        Stuck(draw, name="fake-images", takes_negative_prompt=True), [FakeScorer()],
        num_variations=2, max_enhancement_iterations=2, seed=7, chain="previous", journal=book)

    def done() -> bool:
        rows = book.database.run("SELECT count(*) FROM calls WHERE done IS NOT NULL")
        return rows[0][0] == 20

    with suppress(GenerationCancelled):
        await p.run(TALE, generation_id="broken", output_dir=OUTPUT, cancellation_check=done)
        sys.exit("the run was not broken off")
    with sqlite3.connect(folder / "journal" / "journal.db") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode=DELETE")
    shutil.copytree(OUTPUT, folder / "images")
    shutil.rmtree(OUTPUT.parent)


if __name__ == "__main__":
    for make in [globals()[name] for name in sys.argv[1:]] or (plain, choices, reruns, journal):
        shutil.rmtree(HERE / make.__name__, ignore_errors=True)
        asyncio.run(make())
