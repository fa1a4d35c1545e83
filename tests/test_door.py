"""The backend's door: one call, lists in, absolute paths out, from a process without notebooks."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import refimg
from refimg import defaults
from refimg.generate import GenerationFailed
from refimg.pipeline import GenerationCancelled
from refimg.pipeline import generate_enhanced_reference_images_with_sequential_references as door

from .fakes import FakeChat, FakeImages, FakeScorer, critic, critique, director, picture

ROOT = Path(__file__).resolve().parent.parent
SIGNATURE = {  # DESIGN §2: "order and defaults as given"
    "prompts": inspect.Parameter.empty,
    "output_dir": inspect.Parameter.empty,
    "generation_id": inspect.Parameter.empty,
    "consistency_markers": None,
    "continuity_notes": None,
    "consistency_guidelines": None,
    "transition_notes": None,
    "initial_reference_image": None,
    "cancellation_check": None,
    "quality_threshold": 30.0,
    "num_variations": 4,
    "max_enhancement_iterations": 4,
}
MARKERS = ("style", "color_palette", "lighting", "composition", "mood", "subject_description")
NOT_NEEDED = {"nbdev", "fastcore", "IPython", "openai", "replicate", "matplotlib", "pandas",
              "ipywidgets"}


class Models:
    """The fakes that the door is given in place of what the environment asks for."""

    def __init__(self, monkeypatch):
        self.director, self.critic = director(), critic(90)
        self.images, self.scorer = FakeImages(), FakeScorer()
        monkeypatch.setattr(defaults, "director", lambda: self.director)
        monkeypatch.setattr(defaults, "critic", lambda: self.critic)
        monkeypatch.setattr(defaults, "image_model", lambda: self.images)
        monkeypatch.setattr(defaults, "scorers", lambda image_model=None, view=None: [self.scorer])

    def sent(self, scene: int) -> str:
        """The prompt that the image model got for a scene, the same for all its variations."""
        prompts = {r.prompt for r in self.images.requests if f"scene_{scene:02d}/" in r.slot}
        assert len(prompts) == 1
        return prompts.pop()

    @property
    def calls(self) -> int:
        return len(self.director.calls) + len(self.critic.calls) + len(self.images.requests)


@pytest.fixture
def models(monkeypatch) -> Models:
    return Models(monkeypatch)


def test_names_order_and_defaults_are_the_agreed_ones():
    parameters = inspect.signature(door).parameters
    assert {name: p.default for name, p in parameters.items()} == SIGNATURE
    assert list(parameters) == list(SIGNATURE)
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert inspect.iscoroutinefunction(door)
    assert inspect.signature(door).return_annotation == "list[str]"


def test_the_package_offers_it_by_name():
    assert refimg.generate_enhanced_reference_images_with_sequential_references is door


async def test_it_can_be_called_by_position(tmp_path, models):
    made = await door(["one", "two"], str(tmp_path / "images"), "id", {"style": "ink"}, ["", "c"],
                      ["g"], [None, "t"], None, lambda: False, 10.0, 2, 1)
    assert len(made) == 2 and len(models.images.requests) == 4
    assert len(models.director.calls) == 2


async def test_it_returns_absolute_paths_as_strings(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = await door(["one", "two", "three"], "out/images", "id", num_variations=2)
    assert [type(path) for path in made] == [str] * 3
    folder = (tmp_path / "out" / "images").resolve()
    for number, path in enumerate(map(Path, made), 1):
        assert path.is_absolute() and path.parent == folder
        assert path.name == f"id_scene_{number:02d}_v2.png"  # the later call is the brighter one
        with Image.open(path) as image:
            image.load()
    assert [p.name for p in tmp_path.joinpath("out").iterdir()] == ["images"]


async def test_defaults_are_four_variations_and_the_users_image_is_scene_1s_reference(
    tmp_path, models
):
    (tmp_path / "mine.png").write_bytes(picture(200))
    made = await door(["one", "two"], tmp_path / "images", "id",
                      initial_reference_image=str(tmp_path / "mine.png"))
    sent = [request.references for request in models.images.requests]
    assert sent == [((tmp_path / "mine.png").resolve(),)] * 4 + [(Path(made[0]),)] * 4


async def test_markers_and_notes_reach_the_prompt_that_is_sent(tmp_path, models):
    markers = {name: f"marker {name}" for name in MARKERS}
    markers |= {"weather of the day": "sleet", "palette": ["teal", "ochre"], "empty": ""}
    await door(
        ["one", "two", "three"], tmp_path / "images", "id", markers,
        continuity_notes=["never sent 1", "continuity 2", "continuity 3"],
        consistency_guidelines=["guideline 1", "guideline 2", "guideline 3"],
        transition_notes=["never sent 2", "transition 2", "transition 3"], num_variations=1)
    for scene in (1, 2, 3):
        sent = models.sent(scene)
        for value in ("sleet", "teal, ochre", *(f"marker {name}" for name in MARKERS)):
            assert value in sent
        assert f"guideline {scene}" in sent and "never sent" not in sent
        for kind in ("continuity", "transition"):
            assert (f"{kind} {scene}" in sent) == (scene > 1)
        assert ("reference image" in sent) == (scene > 1)
        others = {f"guideline {n}" for n in (1, 2, 3) if n != scene}
        assert not any(other in sent for other in others)


async def test_both_spellings_of_the_palette_are_known(tmp_path, models):
    for spelling in ("color_palette", "colour_palette"):
        models.images.requests.clear()
        await door(["one"], tmp_path / "images", "id",
                   {"mood": "calm", spelling: "teal and ochre"}, num_variations=1)
        sent = models.sent(1)
        assert sent.index("teal and ochre") < sent.index("calm")


async def test_both_agents_are_told_of_markers_and_notes(tmp_path, models):
    await door(["one", "two"], tmp_path / "images", "id", {"style": "linocut"},
               continuity_notes=[None, "the same red coat"], num_variations=1)
    for agent in (models.director, models.critic):
        told = ["\n".join(m.content for m in messages) for messages, _ in agent.calls]
        assert all("linocut" in text for text in told)
        assert sum("the same red coat" in text for text in told) == 1


@pytest.mark.parametrize("name", ["continuity_notes", "consistency_guidelines",
                                  "transition_notes"])
class TestLists:
    """Element i belongs to scene i+1."""

    async def test_a_shorter_list_is_padded(self, tmp_path, models, name):
        await door(["one", "two", "three"], tmp_path / "images", "id", num_variations=1,
                   **{name: [None, "only the second"]})
        assert ["only the second" in models.sent(n) for n in (1, 2, 3)] == [False, True, False]

    async def test_an_empty_text_counts_as_none(self, tmp_path, models, name):
        await door(["one", "two"], tmp_path / "a", "id", num_variations=1, **{name: ["", ""]})
        with_empty = [models.sent(1), models.sent(2)]
        models.images.requests.clear()
        models.director.calls.clear()
        await door(["one", "two"], tmp_path / "b", "id", num_variations=1, **{name: None})
        assert [models.sent(1), models.sent(2)] == with_empty

    @pytest.mark.parametrize("values", [[], ()], ids=["list", "tuple"])
    async def test_an_empty_list_is_fine(self, tmp_path, models, name, values):
        assert await door(["one"], tmp_path / "images", "id", num_variations=1, **{name: values})

    async def test_a_longer_list_is_an_error(self, tmp_path, models, name):
        with pytest.raises(ValueError, match=name) as caught:
            await door(["one", "two"], tmp_path / "images", "id", **{name: ["a", "b", "c"]})
        assert "3" in str(caught.value) and "2" in str(caught.value)
        check_untouched(tmp_path, models)

    async def test_a_bare_text_is_an_error(self, tmp_path, models, name):
        """It would be taken letter by letter."""
        with pytest.raises(ValueError, match=name):
            await door(["one", "two", "three"], tmp_path / "images", "id", **{name: "red"})
        check_untouched(tmp_path, models)


@pytest.mark.parametrize("prompts", [None, 7, [None], {"a": "b"}])
async def test_prompts_that_are_no_list_of_texts_are_refused(tmp_path, models, prompts):
    with pytest.raises(ValueError, match="prompts"):
        await door(prompts, tmp_path / "images", "id")
    check_untouched(tmp_path, models)


def check_untouched(root: Path, models: Models) -> None:
    """Nothing was paid and nothing written."""
    assert models.calls == 0 and not list(root.iterdir())


async def test_a_bare_text_as_prompts_is_an_error(tmp_path, models):
    with pytest.raises(ValueError, match="prompts"):
        await door("A keeper on the beach", tmp_path / "images", "id")
    check_untouched(tmp_path, models)


WRONG = [
    ({"prompts": []}, "scenes|prompts"),
    ({"prompts": ["one", " \n"]}, "scene 2"),
    ({"prompts": ["one", None]}, "prompts"),
    ({"generation_id": "../etc"}, "generation_id.*etc"),
    ({"generation_id": ""}, "generation_id"),
    ({"generation_id": "a\n"}, "generation_id"),
    ({"generation_id": "x" * 65}, "generation_id"),
    ({"generation_id": 7}, "generation_id"),
    ({"num_variations": 0}, "num_variations.*0"),
    ({"num_variations": 21}, "num_variations.*21"),
    ({"num_variations": True}, "num_variations"),
    ({"max_enhancement_iterations": 11}, "max_enhancement_iterations.*11"),
    ({"max_enhancement_iterations": -1}, "max_enhancement_iterations.*-1"),
    ({"quality_threshold": 100.5}, "quality_threshold.*100.5"),
    ({"quality_threshold": float("nan")}, "quality_threshold.*nan"),
    ({"initial_reference_image": "/no/such/image.png"}, "initial_reference_image.*/no/such"),
    ({"initial_reference_image": __file__}, "initial_reference_image.*test_door.py"),
    ({"output_dir": __file__}, "output_dir.*test_door.py"),
    ({"consistency_markers": ["style"]}, "consistency_markers"),
]


@pytest.mark.parametrize("over, match", WRONG, ids=[str(over)[:40] for over, _ in WRONG])
async def test_what_is_wrong_is_named_before_anything_is_paid(tmp_path, models, over, match):
    good = {"prompts": ["one", "two"], "output_dir": tmp_path / "images", "generation_id": "id"}
    with pytest.raises(ValueError, match=match):
        await door(**good | over)
    check_untouched(tmp_path, models)


async def test_the_threshold_only_warns(tmp_path, models, caplog):
    with caplog.at_level(logging.WARNING, "refimg"):
        made = await door(["one"], tmp_path / "images", "id", quality_threshold=100,
                          num_variations=1)
    assert len(made) == 1
    assert any("100" in record.getMessage() for record in caplog.records)


async def test_no_rounds_means_the_prompts_as_they_are(tmp_path, models):
    await door(["one"], tmp_path / "images", "id", max_enhancement_iterations=0, num_variations=1)
    assert (models.sent(1), models.director.calls) == ("one", [])


async def test_rounds_are_limited(tmp_path, models):
    models.critic.script = [critique(score) for score in (10, 30, 50, 70, 80)]
    await door(["one"], tmp_path / "images", "id", max_enhancement_iterations=3, num_variations=1)
    assert len(models.director.calls) == 3


async def test_a_scene_that_cannot_be_drawn_still_has_a_path(tmp_path, models):
    models.images.script = lambda request, number: (
        RuntimeError("no") if "scene_02" in request.slot else picture(number))
    made = await door(["one", "two", "three"], tmp_path / "images", "id", num_variations=1)
    assert made[1] == made[0] and len(made) == 3


async def test_a_broken_director_still_gives_pictures_with_the_markers(tmp_path, models):
    models.director = FakeChat([RuntimeError("down")])
    made = await door(["A keeper"], tmp_path / "images", "id", {"style": "linocut"})
    assert len(made) == 1 == len(models.images.requests)
    assert models.sent(1).startswith("A keeper") and "linocut" in models.sent(1)


async def test_its_errors_are_the_documented_ones(tmp_path, models):
    models.images.script = lambda request, number: RuntimeError("no")
    with pytest.raises(GenerationFailed):
        await door(["one"], tmp_path / "images", "id")
    with pytest.raises(GenerationCancelled):
        await door(["one"], tmp_path / "images", "id", cancellation_check=lambda: True)

    async def stop() -> bool:
        return True

    with pytest.raises(GenerationCancelled):
        await door(["one"], tmp_path / "images", "id", cancellation_check=stop)


@pytest.mark.parametrize("over", [{"num_variations": 0}, {"prompts": []}])
async def test_calls_side_by_side_do_not_disturb_each_other(tmp_path, models, over):
    """What a backend does: several stories at once, one of them wrong."""
    good = (door([f"story {i}", "two"], tmp_path / "images", f"id{i}", num_variations=2)
            for i in range(3))
    bad = {"prompts": ["one"], "output_dir": tmp_path / "images", "generation_id": "bad"} | over
    *made, wrong = await asyncio.gather(*good, door(**bad), return_exceptions=True)
    assert isinstance(wrong, ValueError)
    for i, paths in enumerate(made):
        assert [Path(path).name[:12] for path in paths] == [f"id{i}_scene_{n:02d}" for n in (1, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


@pytest.mark.parametrize("present, missing", [
    ("OPENAI_BASE_URL", "REPLICATE_API_TOKEN"), ("REFIMG_IMAGE_MODEL", "OPENAI_BASE_URL"),
    ("REPLICATE_API_TOKEN", "OPENAI_API_KEY")])
async def test_half_of_the_keys_is_an_error_that_names_the_other_half(
    tmp_path, monkeypatch, present, missing
):
    values = {"OPENAI_BASE_URL": "http://localhost:1/v1", "REFIMG_IMAGE_MODEL": "openai:tiny"}
    monkeypatch.setenv(present, values.get(present, "a-secret-key"))
    with pytest.raises(ValueError, match=missing) as caught:
        await door(["one"], tmp_path / "images", "id")
    assert "a-secret-key" not in str(caught.value)
    assert not list(tmp_path.iterdir())


async def test_a_forbidden_sandbox_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMG_SANDBOX", "0")
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        await door(["one"], tmp_path / "images", "id")
    assert not list(tmp_path.iterdir())


BACKEND = """
import asyncio, json, logging, sys

class Keep(logging.Handler):
    def emit(self, record):
        warnings.append((record.name, record.getMessage()))

warnings = []
logging.getLogger().addHandler(Keep(level=logging.WARNING))
from refimg import generate_enhanced_reference_images_with_sequential_references as door

async def handler():
    return await door(["A lighthouse keeper in a red coat on a beach at dawn",
                       "The keeper lights the lamp during a storm"], sys.argv[1], "story-1")

async def main():
    ticks = 0
    request = asyncio.create_task(handler())
    while not request.done():
        await asyncio.sleep(0.01)
        ticks += 1
    return request.result(), ticks

paths, ticks = asyncio.run(main())
print(json.dumps({"paths": paths, "ticks": ticks, "warnings": warnings,
                  "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> dict:
    """What a process of its own saw that called the door with defaults only, without any key."""
    folder = tmp_path_factory.mktemp("backend")
    ours = ("REFIMG_", "OPENAI_", "REPLICATE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    made = subprocess.run([sys.executable, "-c", BACKEND, str(folder / "images")], cwd=ROOT,
                          env=env, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.splitlines()[-1]) | {"folder": folder}


@pytest.mark.all
class TestSandbox:
    """Without keys the door opens on the sandbox."""

    @pytest.fixture(autouse=True)
    def look(self, backend):
        self.seen = backend

    def test_every_scene_has_an_image(self):
        assert len(self.seen["paths"]) == 2 == len(set(self.seen["paths"]))
        for number, path in enumerate(map(Path, self.seen["paths"]), 1):
            assert path.is_absolute()
            assert path.name.startswith(f"story-1_scene_{number:02d}_v")
            with Image.open(path) as image:
                image.load()
                assert abs(image.width / image.height - 16 / 9) < 0.02

    def test_all_variations_are_there_and_no_traces(self):
        folder = self.seen["folder"]
        assert [path.name for path in folder.iterdir()] == ["images"]
        assert sorted(path.name for path in (folder / "images").iterdir()) == [
            f"story-1_scene_{n:02d}_v{k}.png" for n in (1, 2) for k in (1, 2, 3, 4)]

    def test_one_warning_says_that_it_is_the_sandbox(self):
        told = [text for name, text in self.seen["warnings"]
                if "sandbox" in text.lower() and name.startswith("refimg")]
        assert len(told) == 1

    def test_nothing_of_a_notebook_and_no_provider_was_loaded(self):
        assert not NOT_NEEDED & set(self.seen["modules"])

    def test_the_callers_loop_went_on(self):
        assert self.seen["ticks"] > 3
