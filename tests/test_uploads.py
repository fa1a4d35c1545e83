"""What an anchored chain costs, through both SDKs: each file goes to Replicate once."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from refimg import Pipeline, Scene, Story, Subject
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from refimg.storage.files import read_image
from tests.fakes import FakeScorer, critic, director, picture
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

TOKEN = "r8_" + "test0123456789abcdefghijklmnopqrstuv"


@pytest.fixture(scope="module")
def shared():
    with start_image_server(seconds=0.01) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.script()
    return shared


def pipeline(server, **settings) -> Pipeline:
    drawing = ReplicateImages(api_token=TOKEN, base_url=server.base_url)
    plain = {"max_enhancement_iterations": 0, "chain": "anchored", "image_model": drawing,
             "director": director(), "critic": critic(), "scorers": [FakeScorer()]}
    return Pipeline(**plain | settings)


def sent(server) -> list[dict]:
    """The inputs of the predictions, in order of arrival."""
    return [r["json"]["input"] for r in server.requests() if r["kind"] == "create"]


async def test_four_anchored_scenes_are_16_images_and_three_uploads(server, tmp_path):
    story = Story(scenes=[Scene(prompt=f"a keeper, view {n}") for n in "abcd"])
    with start_llm_server() as agents:
        chat = OpenAIChat("any-model", base_url=agents.base_url, api_key="sk-test-0123456789")
        made = pipeline(server, director=chat, critic=chat, max_enhancement_iterations=1,
                        plan=False)
        result = await made.run(story, generation_id="x", output_dir=tmp_path / "images")
        asked = [message["content"] for r in agents.requests() if r["role"] == "director"
                 for message in r["json"]["messages"]]
    for told in ("Image 1 is the scene before", "Image 2 "):  # the director knows what goes along
        assert sum(told in text for text in asked) == 2
    inputs = sent(server)
    assert Counter(r["kind"] for r in server.requests())["upload"] == 3
    assert Counter(len(i.get("image_input") or []) for i in inputs) == {0: 4, 1: 4, 2: 8}
    by_scene = {n: [i for i in inputs if f"view {n}" in i["prompt"]] for n in "abcd"}
    files = {n: {tuple(i.get("image_input") or ()) for i in found} for n, found in by_scene.items()}
    assert all(len(found) == 1 for found in files.values())
    (first,), (second, again), (third, anchor) = (min(files[n]) for n in "bcd")
    assert again == first == anchor and len({first, second, third}) == 3
    for n, told in {"a": [], "b": [], "c": ["1", "2"], "d": ["1", "2"]}.items():
        assert {tuple(re.findall(r"Image (\d)", i["prompt"])) for i in by_scene[n]} == {tuple(told)}
    assert [[s.scene for s in scene.sent_references] for scene in result.scenes] == [
        [], [1], [2, 1], [3, 1]]


async def test_a_subjects_image_goes_there_once_for_all_scenes(server, tmp_path):
    (sheet := tmp_path / "mara.png").write_bytes(picture(90))
    story = Story(scenes=[Scene(prompt=f"Mara, view {n}") for n in "abcd"],
                  subjects=[Subject(name="Mara", images=[sheet])])
    await pipeline(server, num_variations=2, chain="none").run(story, output_dir=tmp_path / "x")
    assert Counter(r["kind"] for r in server.requests())["upload"] == 1
    assert len({tuple(i["image_input"]) for i in sent(server)}) == 1 and len(sent(server)) == 8


async def test_sheets_and_looks_are_drawn_and_what_is_uploaded_is_the_sheet(server, tmp_path):
    story = Story(scenes=[Scene(prompt="Mara")], subjects=[
        Subject(name="Mara", looks={"wet": "soaked", "torn": "a torn coat"})])
    made = pipeline(server, num_variations=2)
    drawn = await made.draw_subjects(story, output_dir=tmp_path, generation_id="x")
    inputs = sent(server)
    assert Counter(len(i.get("image_input") or []) for i in inputs) == {0: 2, 1: 4}
    assert Counter(r["kind"] for r in server.requests())["upload"] == 1
    assert all("keep the identity of Mara" in i["prompt"] for i in inputs if i.get("image_input"))
    for path in drawn.subjects[0].sheets("wet"):
        assert read_image(path).size == (96, 54)
