"""The backend of examples/: many generations at once, followed, cancelled, killed and resumed."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from examples.backend.app import create_app
from examples.backend.generations import Generations, Order, Record
from refimg import StoryResult
from refimg.enhance import Reply
from refimg.storage.database import FORMAT
from tests.backends import ENDED, FAKES, FROM_ENV, Backend, fake_pipeline, order
from tests.fakes import FakeChat, picture, until
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

STAGES = ["enhance", "generate", "score"]
MESSAGES = [
    "Enhancing prompts for reference images",
    "Generating reference image variations",
    "Scoring and ranking reference images",
]
HOSTILE = (
    '<img src=x onerror=alert(1)></script> $\\frac{ [/red] \x1b[31m \u202eevil =HYPERLINK("x")'
    "\n\ndata: {}\r\nevent: end"
)
HARMLESS = HOSTILE.replace("\x1b[31m", "").replace("\u202e", "")


# whole processes


def check_events(events: list[tuple[str, str, dict]], scenes: int) -> None:
    """Each scene's three messages once each and in order; percent rises to 100; then the end."""
    steps, end = events[:-1], events[-1]
    assert [name for name, _, _ in steps] == ["progress"] * (3 * scenes)
    assert [number for _, number, _ in steps] == [str(n) for n in range(1, 3 * scenes + 1)]
    for scene in range(1, scenes + 1):
        assert [data["message"] for _, _, data in steps if data["scene"] == scene] == MESSAGES
    percents = [data["percent"] for _, _, data in events]
    assert percents == sorted(percents) and percents[-1] == 100
    assert end[0] == "end" and end[2]["state"] == "done"


@pytest.mark.slow
@pytest.mark.all
def test_ten_generations_of_four_scenes_at_once_all_end(tmp_path):
    names = [f"story-{n}" for n in range(10)]
    with Backend(FAKES, tmp_path / "backend") as backend, ThreadPoolExecutor(10) as pool:
        assert [backend.start(order(name=name)) for name in names] == names
        followed = list(pool.map(lambda name: list(backend.events(name)), names))
        assert backend.get("/health") == {"live": 0, "unscored": None}
        for name, events in zip(names, followed, strict=True):
            check_events(events, 4)
            result = backend.get(f"/generations/{name}/result")
            assert len(result["references"]) == len(result["scenes"]) == 4
            for scene, url in zip(result["scenes"], result["references"], strict=True):
                made = scene["variations"]
                (best,) = [one for one in made if one["selected"]]
                assert best["overall"] == max(one["overall"] for one in made)
                assert len(made) == 4 and scene["reference_from"] == "ranked"
                seen = [backend.client.get(one).content for one in (url, best["url"])]
                assert seen[0] == seen[1]
            assert Image.open(io.BytesIO(seen[0])).size == (640, 360)


@pytest.fixture(scope="module")
def servers():
    with start_llm_server() as llm, start_image_server(seconds=0.3) as images:
        yield llm, images


def keys(llm, images) -> dict[str, str]:
    """The environment of a backend that calls these servers through the real SDKs."""
    return {"OPENAI_BASE_URL": llm.base_url, "REPLICATE_BASE_URL": images.base_url,
            "REPLICATE_API_TOKEN": "not-a-token", "REFIMG_IMAGE_MODEL":
            "black-forest-labs/flux-2-pro", "REFIMG_SANDBOX": "0"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.all
def test_cancel_ends_within_the_contract_and_at_the_provider_too(tmp_path, servers):
    llm, images = servers
    llm.script()
    images.script(["forever"] * 4)
    with Backend(FROM_ENV, tmp_path / "backend", **keys(llm, images)) as backend:
        name = backend.start(order(2, num_variations=4, max_enhancement_iterations=1))
        until(lambda: len(images.requests("create")) == 4)
        asked = backend.client.post(f"/generations/{name}/cancel")
        begun = time.monotonic()
        assert asked.status_code == 202 and asked.json()["state"] == "cancelling"
        time.sleep(0.5)
        calls = len(llm.requests()), len(images.requests("create"))
        assert backend.wait(name)["state"] == "cancelled"
        assert time.monotonic() - begun <= 0.5 + 5 + 0.5
        time.sleep(0.5)
        assert (len(llm.requests()), len(images.requests("create"))) == calls
        assert images.orphans() == []
        assert backend.client.get(f"/generations/{name}/result").status_code == 409
        assert [event for event, _, _ in backend.events(name)][-1] == "end"


def paid(folder: Path) -> tuple[int, int]:
    """How many answers of agents, and how many images, done or begun, are in the journal."""
    with closing(sqlite3.connect(folder / "journal" / "journal.db")) as database:
        rows = database.execute("SELECT slot, done, prediction FROM calls").fetchall()
    chats = [done for slot, done, _ in rows if slot.startswith("scene ")]
    images = [done or begun for slot, done, begun in rows
              if not slot.startswith("scene ") and slot != FORMAT]
    return sum(map(bool, chats)), sum(map(bool, images))


@pytest.mark.all
@pytest.mark.slow
def test_after_kill_9_a_restart_goes_on_and_pays_nothing_twice(tmp_path, servers):
    llm, images = servers
    llm.script()
    images.script([{"takes": 2}] * 12)  # so that the third scenes have not begun at the kill
    folder, env = tmp_path / "backend", keys(llm, images)
    asked = {"scenes": 3, "num_variations": 2, "max_enhancement_iterations": 2}
    names, plan = ["one", "two", "three"], (3 * (1 + 3 * 2 * 2), 3 * 3 * 2)
    with Backend(FROM_ENV, folder, **env) as backend:
        for name in names:
            backend.start(order(name=name, **asked))
        until(lambda: len(images.requests("create")) >= 7)
        before = {name: backend.status(name) for name in names}
        backend.kill()
    had, was = paid(folder), (len(llm.requests()), len(images.requests("create")))
    assert any(now["state"] == "running" for now in before.values()) and 0 < had[1] < plan[1]
    with Backend(FROM_ENV, folder, **env) as backend:
        for name in names:
            first = backend.status(name)
            assert first["percent"] >= before[name]["percent"]
            assert "HF_HUB_OFFLINE" in backend.get("/health")["unscored"]
            assert backend.wait(name)["state"] == "done"
            check_events(list(backend.events(name)), 3)
            assert backend.status(name)["unscored"].startswith("unscored: no weights for")
            result = backend.get(f"/generations/{name}/result")
            assert {scene["reference_from"] for scene in result["scenes"]} == {"first"}
            assert [v["overall"] for s in result["scenes"] for v in s["variations"]] == [None] * 6
        again = [now - old for now, old in zip(
            (len(llm.requests()), len(images.requests("create"))), was, strict=True)]
        assert again == [planned - known for planned, known in zip(plan, had, strict=True)]
        assert images.orphans() == []
        backend.start(order(name="one", **asked))
        assert backend.status("one")["state"] == "done"


# one process, no socket


@pytest.fixture
def client(tmp_path):
    with TestClient(create_app(fake_pipeline(tmp_path), tmp_path)) as client:
        yield client


def ended(client: TestClient, name: str) -> dict:
    until(lambda: client.get(f"/generations/{name}").json()["state"] in ENDED)
    return client.get(f"/generations/{name}").json()


BAD = {
    "no scenes": order(0),
    "blank": {"scenes": [{"prompt": "  "}]},
    "no text": {"scenes": [{"prompt": 7}]},
    "unknown field": order(output_dir="/etc"),
    "unknown field of a scene": {"scenes": [{"prompt": "A keeper.", "reference": "/etc/passwd"}]},
    "variations": order(num_variations=21),
    "rounds": order(max_enhancement_iterations=-1),
    "path as id": order(name="../../etc/x"),
    "path as image": order(initial_reference_image="/etc/passwd"),
    "no such upload": order(initial_reference_image="0" * 64),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_refused_before_anything_begins(client, tmp_path, what):
    answer = client.post("/generations", json=BAD[what])
    assert answer.status_code == 422 and answer.json()["detail"]
    assert not (tmp_path / "records").exists()


def test_bodies_that_are_no_order(client):
    surrogate = b'{"scenes": [{"prompt": "a \\ud800 keeper"}]}'
    for body in (b"", b"{", b"[]", b"\xff", surrogate, b"[" * 100_000):
        assert client.post("/generations", content=body).status_code in (400, 422), body[:50]
    assert client.post("/generations", content=b" " * 1_000_001).status_code == 413


@pytest.mark.parametrize("path", ["/generations/nobody", "/generations/nobody/events",
                                  "/generations/nobody/result",
                                  "/generations/nobody/scenes/1/reference"])  # fmt: skip
def test_what_nobody_started_is_not_found(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", ["..%2F..%2Fetc", ".hidden", "a" * 65, "x%0A", "%00"])
def test_addresses_reach_no_file_outside(client, name):
    for path in ("", "/events", "/result", "/scenes/1/reference"):
        assert client.get(f"/generations/{name}{path}").status_code in (404, 422)


def test_the_same_order_again_is_the_same_generation_another_is_refused(client):
    assert client.post("/generations", json=order(1, "twice")).status_code == 202
    ended(client, "twice")
    again = client.post("/generations", json=order(1, "twice"))
    assert again.status_code == 202 and again.json()["state"] == "done"
    assert client.post("/generations", json=order(2, "twice")).status_code == 409


def test_hostile_text_stays_text(client):
    sent = order(name="hostile", title=HOSTILE, consistency_markers={HOSTILE: HOSTILE})
    sent["scenes"] = [{"prompt": HOSTILE, "consistency_guideline": HOSTILE}]
    assert client.post("/generations", json=sent).status_code == 202
    assert ended(client, "hostile")["state"] == "done"
    result = client.get("/generations/hostile/result")
    assert result.headers["content-type"] == "application/json"
    assert result.json()["scenes"][0]["prompt"] == HARMLESS
    with client.stream("GET", "/generations/hostile/events") as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert {line.partition(": ")[0] for line in lines} == {"event", "data", "id"}
    assert len(lines) == 3 * (3 + 1)


def test_an_error_of_a_provider_is_one_harmless_line(tmp_path):
    pipeline = fake_pipeline(tmp_path)
    pipeline.image_model.script = lambda request, number: ValueError(f"r8_{'a1' * 20} {HOSTILE}")
    with TestClient(create_app(pipeline, tmp_path)) as client:
        client.post("/generations", json=order(1, "bad"))
        failed = ended(client, "bad")
    assert failed["state"] == "failed" and failed["error"].startswith("no image was generated")
    assert "r8_" not in failed["error"] and failed["error"].isprintable()


def test_an_upload_is_the_first_reference(client, tmp_path):
    upload = client.post("/uploads", content=picture(9, form="JPEG"))
    assert upload.status_code == 201
    body = order(1, "mine", initial_reference_image=upload.json()["image"])
    assert client.post("/generations", json=body).status_code == 202
    assert ended(client, "mine")["state"] == "done"
    asked = client.app.state.generations.pipeline.image_model.requests
    assert {path.parent for one in asked for path in one.references} == {tmp_path / "uploads"}
    assert client.post("/uploads", content=b"<svg onload=alert(1)>").status_code == 422
    for scene, variation in ((0, 1), (2, 1), (1, 0), (1, 5), (-1, -1)):
        address = f"/generations/mine/scenes/{scene}/variations/{variation}"
        assert client.get(address).status_code == 404


def test_the_stream_goes_on_where_it_was_cut(client):
    client.post("/generations", json=order(2, "cut"))
    ended(client, "cut")
    with client.stream("GET", "/generations/cut/events", headers={"Last-Event-ID": "4"}) as answer:
        ids = [line for line in answer.iter_lines() if line.startswith("id: ")]
    assert ids == ["id: 5", "id: 6", "id: 6"]


class Unloaded:
    """A scorer whose files cannot be had."""

    name, model, calibration = "pickscore", "none", "none"

    def missing(self):
        return "no weights for pickscore"

    def load(self):
        raise ValueError(self.missing())

    def to_100(self, raw):
        return raw

    def score(self, batch):
        raise ValueError(self.missing())


def test_unscored_is_said_while_it_runs_and_at_the_end(tmp_path):
    pipeline = fake_pipeline(tmp_path, seconds=0.2)
    pipeline.scorers = [Unloaded()]
    with TestClient(create_app(pipeline, tmp_path)) as client:
        now = client.post("/generations", json=order(1, "blind")).json()
        assert "no weights for pickscore" in now["unscored"]
        assert ended(client, "blind")["unscored"].startswith("unscored: ")
        scene = client.get("/generations/blind/result").json()["scenes"][0]
    assert scene["reference_from"] == "first" and scene["variations"][0]["overall"] is None


def test_what_else_cannot_be_loaded_leaves_the_scores_alone(tmp_path):
    pipeline = fake_pipeline(tmp_path)
    pipeline.director.load = lambda: exec("raise OSError('no network')")
    with TestClient(create_app(pipeline, tmp_path)) as client:
        assert client.get("/health").json()["unscored"] is None


async def follow(service: Generations, name: str) -> list[Record]:
    return [record async for record in service.follow(name)]


async def test_a_restart_resumes_what_a_stop_has_cut(tmp_path):
    asked = Order.model_validate(order(2, num_variations=2))
    async with Generations(fake_pipeline(tmp_path, 0.2), tmp_path) as service:
        await service.start(asked, "cut")
        while len(service.find("cut").steps) < 3:
            await asyncio.sleep(0.01)
        before = service.find("cut")
    assert asyncio.all_tasks() == {asyncio.current_task()} and not service.live
    pipeline = fake_pipeline(tmp_path, 0.01)
    async with Generations(pipeline, tmp_path) as service:
        told = await follow(service, "cut")
    assert told[-1].state == "done" and told[-1].percent == 100
    assert told[-1].steps[: len(before.steps)] == before.steps
    percents = [record.percent for record in told]
    assert percents == sorted(percents) and len(told) == 6 + 1


async def test_a_generation_that_was_being_cancelled_is_not_resumed(tmp_path):
    record = Record(generation_id="id", order=Order.model_validate(order(1)), state="cancelling")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "id.json").write_text(record.model_dump_json())
    (tmp_path / "records" / "torn.json").write_text("{")
    pipeline = fake_pipeline(tmp_path)
    async with Generations(pipeline, tmp_path) as service:
        assert service.find("id").state == "cancelled" and not service.live
    assert not pipeline.director.calls


async def test_what_waits_is_cancelled_at_once(tmp_path):
    asked = Order.model_validate(order(1))
    async with Generations(fake_pipeline(tmp_path, 0.3), tmp_path, at_once=1) as service:
        await service.start(asked, "first")
        await asyncio.sleep(0.05)
        await service.start(asked, "second")
        service.cancel("second")
        assert [r.state for r in await follow(service, "second")] == ["cancelled"]
        assert service.find("first").state == "running"
        assert (await follow(service, "first"))[-1].state == "done"


async def test_after_a_restart_too_what_waits_is_cancelled_and_not_paid(tmp_path):
    asked = Order.model_validate(order(1, num_variations=1))
    (tmp_path / "records").mkdir()
    for name in ("first", "second"):
        record = Record(generation_id=name, order=asked, state="running")
        (tmp_path / "records" / f"{name}.json").write_text(record.model_dump_json())
    pipeline = fake_pipeline(tmp_path, 0.1)
    async with Generations(pipeline, tmp_path, at_once=1) as service:
        await asyncio.sleep(0.05)
        assert [service.find(name).state for name in ("first", "second")] == ["running", "waiting"]
        service.cancel("second")
        assert [r.state for r in await follow(service, "second")] == ["cancelled"]
        assert (await follow(service, "first"))[-1].state == "done"
    assert len(pipeline.image_model.requests) == 1
    assert service.find("second").state == "cancelled"


async def test_a_cancel_that_comes_with_the_end_changes_nothing(tmp_path):
    async with Generations(fake_pipeline(tmp_path), tmp_path) as service:
        await service.start(Order.model_validate(order(1)), "id")
        live = service.live["id"]
        while live.record.state != "done":
            await live.changed.wait()
        assert service.live
        service.cancel("id")
        assert service.find("id").state == "done"
    assert service.find("id").state == "done" and service.result("id").references


@pytest.mark.parametrize("waits", [True, False])
async def test_many_cancels_are_one(tmp_path, waits):
    asked = Order.model_validate(order(1))
    async with Generations(fake_pipeline(tmp_path, 0.3), tmp_path, at_once=1) as service:
        for name in ("first", "second"):
            await service.start(asked, name)
            await asyncio.sleep(0.05)
        name = "second" if waits else "first"
        states = []
        for _ in range(40):
            service.cancel(name)
            states.append(service.find(name).state)
        assert set(states) == {"cancelled" if waits else "cancelling"}
        assert (await follow(service, name))[-1].state == "cancelled"
    assert service.find(name).state == "cancelled"


async def test_what_is_cancelled_while_it_is_saved_ends_as_cancelled(tmp_path, monkeypatch):
    save = StoryResult.save
    async with Generations(fake_pipeline(tmp_path), tmp_path) as service:
        loop = asyncio.get_running_loop()

        def slow(result, path):
            loop.call_soon_threadsafe(service.cancel, "id")
            until(lambda: service.find("id").state == "cancelling")
            save(result, path)

        monkeypatch.setattr(StoryResult, "save", slow)
        await service.start(Order.model_validate(order(1)), "id")
        assert (await follow(service, "id"))[-1].state == "cancelled"


DAMAGED = {"torn": b'{"generation_id": "id", "a secret', "empty": b"", "no text": b"\xff a secret"}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_said_and_never_repeated(client, tmp_path, caplog, data):
    client.post("/generations", json=order(1, "id"))
    ended(client, "id")
    page, result = "/generations/id", tmp_path / "results" / "id.json"
    result.write_bytes(data)
    pictures = [f"{page}/scenes/1/reference", f"{page}/scenes/1/variations/1"]
    answers = [(client.get(path), "result") for path in (f"{page}/result", *pictures)]
    result.unlink()
    answers.append((client.get(f"{page}/result"), "result"))
    assert client.get(page).json()["state"] == "done"
    (tmp_path / "records" / "id.json").write_bytes(data)
    answers += [(client.get(path), "record") for path in (page, f"{page}/events", *pictures)]
    answers += [(client.post(f"{page}/cancel"), "record"),
                (client.post("/generations", json=order(1, "id")), "record")]  # fmt: skip
    for answer, what in answers:
        assert answer.status_code == 500
        assert answer.json() == {
            "detail": f"the generation is there, but its {what} cannot be read"}  # fmt: skip
    logged = [record.getMessage() for record in caplog.records if record.name == "refimg.backend"]
    assert len(logged) == len(answers) and all("id.json cannot be read: " in one for one in logged)


async def test_one_process_a_folder(tmp_path):
    async with Generations(fake_pipeline(tmp_path), tmp_path):
        with pytest.raises(TimeoutError):
            await Generations(fake_pipeline(tmp_path), tmp_path).__aenter__()


async def test_two_who_start_the_same_at_once_start_it_once(tmp_path):
    pipeline = fake_pipeline(tmp_path)
    pipeline.director = FakeChat(lambda m, s, n: Reply(text="A better keeper."))
    asked = Order.model_validate(order(1, max_enhancement_iterations=1))
    async with Generations(pipeline, tmp_path) as service:
        both = await asyncio.gather(*(service.start(asked, "same") for _ in range(2)))
        assert both[0].order == both[1].order == asked and len(service.live) == 1
        await follow(service, "same")
    assert len(pipeline.director.calls) == 1
    assert json.loads((tmp_path / "records" / "same.json").read_text())["state"] == "done"
