"""ReplicateImages against a server in its own process: the real SDK, real sockets, bad days."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import math
import random
import time
import traceback
import weakref

import pytest
from PIL import Image
from replicate import Client

from refimg import Pipeline, Scene, Story
from refimg.adapters import predictions, replicate, retry
from refimg.adapters.predictions import (
    Connection,
    PendingCreates,
    Prediction,
    Refusal,
    failure,
)
from refimg.adapters.replicate import ReplicateImages
from refimg.adapters.retry import Account, ProviderError, RunLimits
from refimg.engine.protocols import Call
from refimg.generate import GenerationFailed, ImageRequest, generate_images
from refimg.sandbox.agents import Critic, Director
from refimg.storage.images import small_jpeg
from tests.fakes import FakeScorer
from tests.sampling import sampled
from tests.servers.images import TERMINAL, start_image_server

TOKEN = "r8_" + "test0123456789abcdefghijklmnopqrstuv"
GRACE = predictions._GRACE  # seconds, as people have it
NANO, FLUX = "google/nano-banana", "black-forest-labs/flux-2-pro"


@pytest.fixture(scope="module")
def shared():
    with start_image_server(seconds=0.02) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.script()
    return shared


@pytest.fixture(scope="module")
def other():
    """A host that should never be asked."""
    with start_image_server() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let every wait take a fraction of its time; what the server does is as much faster."""
    for module, name, value in [
        (retry, "_BACKOFF", (0.02, 0.05)), (retry, "_SPREAD", 0.05), (retry, "_LONGEST", 0.3),
        (replicate, "_FETCH", (0.02, 0.05)), (predictions, "_POLL", (0.03, 0.3)),
        (predictions, "_CANCEL", (0.6, 0.05)), (predictions, "_LATE", 0.6),
        (predictions, "_GRACE", 2.0),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.png"
    Image.linear_gradient("L").resize((2000, 1200)).convert("RGB").save(path)
    return path


def images(server, model: str = NANO, **more) -> ReplicateImages:
    return ReplicateImages(model, base_url=server.base_url, api_token=TOKEN, **more)


async def client_of(server) -> Client:
    return await asyncio.to_thread(Client, api_token=TOKEN, base_url=server.base_url)


def request(prompt: str = "a keeper", **more) -> ImageRequest:
    return ImageRequest(prompt=prompt, **more)


def made_since(server, before: int) -> list[dict]:
    """The predictions made since there were so many."""
    return server.predictions()[before:]


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


async def until(condition) -> None:
    """Waits until the condition holds, at most 5 s."""
    for _ in range(250):
        if await asyncio.to_thread(condition):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


# --- a good day -------------------------------------------------------------------------------


async def test_a_picture_comes_back(server):
    model = images(server)
    made = await model.generate(request(aspect_ratio="16:9"))
    assert open_image(made.data).size == (96, 54)
    assert made.seed is None and made.cost is None
    assert model.metrics[made.provider_id]["predict_time"] == 0.02
    create, *rest = server.requests()
    assert create["json"] == {"input": {"prompt": "a keeper", "aspect_ratio": "16:9"}}
    assert create["headers"]["cancel-after"] == "300s"
    assert create["path"] == f"/v1/models/{NANO}/predictions"
    assert [r["kind"] for r in rest] == ["get", "output"]
    assert rest[0]["at"] - create["at"] < 0.5


async def test_a_seed_is_sent_and_recorded(server):
    model = images(server, FLUX)
    made = [await model.generate(request(seed=seed)) for seed in (7, 7, 8)]
    assert [m.seed for m in made] == [7, 7, 8]
    assert made[0].data == made[1].data != made[2].data


async def test_the_picture_is_asked_for_without_the_token(server, reference):
    made = await images(server).generate(request(references=(reference,)))
    assert made.data
    for arrived in server.requests():
        inside = TOKEN in str(arrived)
        assert inside == (arrived["kind"] != "output"), arrived["kind"]
        assert ("authorization" in arrived["headers"]) == inside


async def test_more_inputs_of_the_model_are_sent(server):
    await images(server, inputs={"output_format": "png"}).generate(request())
    assert server.requests("create")[0]["json"]["input"]["output_format"] == "png"
    with pytest.raises(ValueError, match=r"inputs must be .*, got prompt, seed"):
        images(server, inputs={"seed": 1, "prompt": "x"})


@pytest.mark.parametrize("name", ["nano-banana", "a/b/c", "https://replicate.com/a/b", "../b", ""])
def test_a_name_that_is_none_is_refused(server, name):
    with pytest.raises(ValueError, match="owner/name"):
        images(server, name)


# --- what the model takes ---------------------------------------------------------------------


async def test_an_unknown_model_is_asked_for_its_schema(server):
    model = images(server, "lab/portrait")
    with pytest.raises(ValueError, match=r"await load\(\)"):
        _ = model.takes_seed
    await model.load()
    assert (model.max_references, model.takes_seed, model.takes_negative_prompt) == (1, True, True)
    made = await model.generate(request(aspect_ratio="2:1", seed=3, negative_prompt="blur"))
    create = server.requests("create")[0]
    assert create["path"] == "/v1/predictions" and len(create["json"]["version"]) == 64
    assert create["json"]["input"] == {
        "prompt": "a keeper", "negative_prompt": "blur", "seed": 3, "width": 1456, "height": 720,
    }  # fmt: skip
    assert open_image(made.data).width == 96


async def test_an_unknown_model_may_be_used_without_load(server):
    made = await images(server, "lab/words").generate(request())
    assert made.data and len(server.requests("model")) == 1


async def test_load_brings_the_models_own_aspect_ratios(server):
    model = images(server, FLUX)
    assert "2:3" not in model.aspect_ratios
    await model.load()
    assert "2:3" in model.aspect_ratios and "match_input_image" not in model.aspect_ratios
    assert model.max_references == 8


async def test_a_version_can_be_named(server):
    plain = images(server, "lab/words")
    await plain.load()
    model = images(server, f"lab/words:{plain.version}")
    assert (await model.generate(request())).data
    assert server.requests("create")[0]["json"]["version"] == plain.version


async def test_a_model_that_does_not_exist_is_said_not_to(server):
    with pytest.raises(ProviderError, match="404"):
        await images(server, "lab/nothing").load()


async def test_what_the_model_cannot_take_costs_nothing(server, reference):
    words, portrait = images(server, "lab/words"), images(server, "lab/portrait")
    await words.load()
    assert words.max_references == 0
    with pytest.raises(ValueError, match="references must be at most 0"):
        await words.generate(request(references=(reference,)))
    with pytest.raises(ValueError, match="steps must be 1 to 50, got 99"):
        await images(server, "lab/portrait", inputs={"steps": 99}).generate(request())
    with pytest.raises(ValueError, match="must be one that 256, …, 2048 wide"):
        await portrait.generate(request(aspect_ratio="20:1"))
    with pytest.raises(ValueError, match=r"reference_input must be .*, got 'face'"):
        await images(server, NANO, reference_input="face").load()
    assert not server.requests("create") and not server.requests("upload")


async def test_an_override_names_the_reference(server, reference):
    model = images(server, "lab/portrait", reference_input="style_image")
    await model.generate(request(references=(reference,)))
    assert server.requests("create")[0]["json"]["input"]["style_image"].startswith("http")


# --- the reference ----------------------------------------------------------------------------


async def test_a_reference_is_uploaded_once_for_all_variations(server, reference, tmp_path):
    model = images(server)
    options = {"output_dir": tmp_path / "out", "model": model, "references": [reference]}
    await generate_images("a keeper", 4, **options)
    await generate_images("the keeper again", 2, **options)
    (upload,) = server.requests("upload")
    assert b"\xff\xd8\xff".decode("latin-1") in upload["text"]
    sent = [r["json"]["input"]["image_input"] for r in server.requests("create")]
    assert len(sent) == 6 and all(one == sent[0] and len(one) == 1 for one in sent)


async def test_another_content_is_another_upload(server, reference):
    model = images(server)
    await model.generate(request(references=(reference,)))
    Image.new("RGB", (64, 64), "red").save(reference)
    await model.generate(request(references=(reference,)))
    assert len(server.requests("upload")) == 2


async def test_an_old_upload_is_sent_anew(server, reference, monkeypatch):
    monkeypatch.setattr(replicate, "_KEEP", 0.0)
    model = images(server)
    for _ in range(2):
        await model.generate(request(references=(reference,)))
    assert len(server.requests("upload")) == 2


def test_a_reference_is_made_small(reference):
    small = open_image(small_jpeg(reference))
    assert small.format == "JPEG" and small.size == (1536, 922)


async def test_whoever_uploads_may_be_cancelled(server, reference):
    server.script([{"on": "upload", "fault": "hang"}])
    model = images(server)
    first = asyncio.create_task(model.generate(request(references=(reference,))))
    await until(lambda: server.requests("upload"))
    second = asyncio.create_task(model.generate(request(references=(reference,))))
    await asyncio.sleep(0.1)
    first.cancel()
    assert (await second).data
    assert first.cancelled() and len(server.requests("upload")) == 2


# --- a create that goes wrong -----------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"fault": "429", "seconds": 0}, "500", "502", "503", "reset"])
async def test_a_create_that_failed_is_made_again(server, fault):
    before = len(server.predictions())
    server.script([fault, fault])
    made = await images(server).generate(request())
    assert made.data and len(server.requests("create")) == 3
    assert len(made_since(server, before)) == 1


@pytest.mark.parametrize("fault", ["lost", "garbage", {"fault": "late", "seconds": 1.5}])
async def test_a_create_without_an_answer_is_looked_for(server, fault):
    before = len(server.predictions())
    server.script([fault])
    made = await images(server, timeout=0.6).generate(request())
    assert [p["id"] for p in made_since(server, before)] == [made.provider_id]
    assert len(server.requests("create")) == len(server.requests("list")) == 1


async def test_equal_inputs_never_share_a_prediction(server):
    before = len(server.predictions())
    server.script(["lost", None, {"fault": "late", "seconds": 1.6}, "lost"])
    model = images(server, timeout=0.8)
    made = await asyncio.gather(*(model.generate(request()) for _ in range(4)))
    ids = sorted(p["id"] for p in made_since(server, before))
    assert sorted(m.provider_id for m in made) == ids and len(ids) == 4
    assert len({m.data for m in made}) == 4


async def test_whose_prediction_is_taken_for_a_lost_one_makes_another(server):
    """One create is on its way while another of equal input failed, and looks for its own."""
    before, model = len(server.predictions()), images(server)
    server.script([{"fault": "late", "seconds": 0.8}, "500"])
    slow = asyncio.create_task(model.generate(request()))
    await until(lambda: len(made_since(server, before)) == 1)
    made = [await model.generate(request()), await slow]
    assert [m.provider_id for m in made] == [p["id"] for p in made_since(server, before)]


async def test_nobody_tidies_up_while_another_still_waits(server):
    """A call with a failed create ends while another of equal input is on its way."""
    before, model = len(server.predictions()), images(server)
    server.script(["500", {"takes": 0.4}, {"fault": "late", "seconds": 1.2}])
    first = asyncio.create_task(model.generate(request()))
    await until(lambda: len(made_since(server, before)) == 1)
    second = await model.generate(request())
    ids = [(await first).provider_id, second.provider_id]
    assert ids == [p["id"] for p in made_since(server, before)]
    assert not server.requests("cancel")


async def test_an_earlier_prediction_is_not_taken_for_a_lost_one(server):
    client = await client_of(server)
    wish = {"prompt": "an old one", "aspect_ratio": "16:9"}
    old = await client.models.predictions.async_create(NANO, wish)
    server.advance(3.1)
    server.script(["500"])
    made = await images(server).generate(request("an old one"))
    assert made.provider_id != old.id and server.requests("list")


@pytest.mark.parametrize(("age", "found"), [(1.0, True), (3.1, False)])
async def test_a_lost_prediction_is_at_most_two_seconds_older_than_its_create(server, age, found):
    client, wish = await client_of(server), {"prompt": f"a keeper, {age} s ago"}
    old = await client.models.predictions.async_create(NANO, wish)
    server.advance(age)
    path, body = f"/v1/models/{NANO}/predictions", {"input": wish}
    creates = PendingCreates(Connection(client, Account("replicate")), path, body, NANO, lost=1)
    assert ((await creates.create()).id == old.id) == found
    assert len(server.requests("create")) == 2 - found and creates.lost == 1 - found


@pytest.mark.parametrize("skew", [-3600, 3600])
async def test_a_wrong_clock_changes_nothing(skew):
    with start_image_server(skew=skew) as server:
        server.script(["lost"])
        made = await images(server).generate(request())
        assert [p["id"] for p in server.predictions()] == [made.provider_id]


async def test_a_create_that_arrives_after_all_is_cancelled(server):
    """Nothing is found at first and another one is made; then the first one appears."""
    before = len(server.predictions())
    server.script([{"fault": "delayed", "seconds": 1.2, "takes": 60}])
    made = await images(server, timeout=0.7).generate(request())
    statuses = {p["id"]: p["status"] for p in made_since(server, before)}
    assert statuses.pop(made.provider_id) == "succeeded"
    assert list(statuses.values()) == ["canceled"]


async def test_a_hint_and_a_header_say_how_long_to_wait(server):
    server.script([{"fault": "429", "seconds": 1}])
    begun = time.perf_counter()
    await images(server).generate(request())
    assert time.perf_counter() - begun >= 0.3
    assert failure(Refusal(429, "Too many requests, resets in ~3s", "7")).wait == 7


@pytest.mark.parametrize("status", ["401", "402"])
async def test_without_a_valid_account_nobody_is_asked_again(server, status):
    server.script([status])
    model = images(server)
    call = Call(limits=RunLimits(8))
    for _ in range(3):
        with pytest.raises(ProviderError) as caught:
            await model.generate(request(), call=call)
        assert caught.value.failure.kind == "down"
    assert len(server.requests()) == 1


@pytest.mark.parametrize("status", ["403", "404", "422"])
async def test_a_clear_no_is_not_asked_again(server, status):
    server.script([status])
    with pytest.raises(ProviderError, match=status):
        await images(server).generate(request())
    assert len(server.requests()) == 1


async def test_a_burst_of_one_is_lived_with():
    """An account that may create one prediction at a time gets its four images all the same."""
    limits = RunLimits(100)
    with start_image_server(gap=0.3) as slow:
        model, call = images(slow), Call(limits=limits)
        made = await asyncio.gather(*(model.generate(request(), call=call) for _ in range(4)))
        assert len({m.provider_id for m in made}) == len(slow.predictions()) == 4
    assert limits.tokens > 0


# --- how predictions end ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["failed", "canceled", "aborted"])
async def test_a_prediction_that_fails_is_a_failure(server, fault):
    server.script([fault])
    model = images(server)
    with pytest.raises(ProviderError, match=fault):
        await model.generate(request())
    assert len(server.requests("create")) == 1 and not server.requests("cancel")
    assert [m["status"] for m in model.metrics.values()] == [fault]


@pytest.mark.parametrize("name", [NANO, FLUX])
async def test_a_refused_content_gets_one_more_prediction(server, name):
    server.script(["nsfw"])
    seed = 7 if name == FLUX else None
    made = await images(server, name).generate(request(seed=seed))
    seeds = [r["json"]["input"].get("seed") for r in server.requests("create")]
    assert len(seeds) == 2 and seeds[1] == made.seed
    assert (seeds[0] != seeds[1]) == (name == FLUX)


async def test_the_safe_ones_are_kept(tmp_path):
    """Two refusals in a row for one of four variations: it is lost, and nothing else."""
    with start_image_server(seconds=0.6) as server:  # all four are asked for before one ends
        server.script(["nsfw", None, None, None, "nsfw"])
        made = await generate_images("a keeper", 4, output_dir=tmp_path, model=images(server))
        assert len(made) == 3 and len(server.requests("create")) == 5


async def test_one_more_prediction_needs_money(server):
    server.script(["nsfw"])
    asked = []
    call = Call(may_retry=asked.append)
    with pytest.raises(ProviderError, match="NSFW"):
        await images(server).generate(request(), call=call)
    assert asked == [True] and len(server.requests("create")) == 1


@pytest.mark.parametrize(("script", "paid"), [
    (["422"], False), ([{"fault": "429", "seconds": 0}] * 9, False), (["500"] * 9, True),
    (["failed"], True), (["canceled"], True), (["aborted"], False), (["forever"], True),
    (["gone"], True), ([{"on": "get", "fault": "404"}], True),
    ([{"on": "upload", "fault": "hang"}] * 9, False),
])  # fmt: skip
async def test_what_may_be_billed_is_said_to_be(server, reference, monkeypatch, script, paid):
    monkeypatch.setattr(replicate, "_UPLOAD", 0.1)
    server.script(script)
    with pytest.raises(ProviderError) as caught:
        await images(server, timeout=0.5).generate(request(references=(reference,)))
    assert caught.value.failure.paid is paid


async def test_an_interrupted_prediction_gets_one_more_with_its_seed(server):
    server.script(["interrupted"])
    assert (await images(server, FLUX).generate(request(seed=7))).seed == 7
    server.script(["interrupted", "interrupted"])
    with pytest.raises(ProviderError, match="interrupted"):
        await images(server, FLUX).generate(request(seed=7))


async def test_a_prediction_without_end_is_cancelled(server):
    server.script(["forever"])
    with pytest.raises(ProviderError, match=r"had not ended after 0\.5 s"):
        await images(server, timeout=0.5).generate(request())
    assert len(server.requests("cancel")) == 1 and server.orphans() == []


@pytest.mark.parametrize("fault", ["429", "500", "502", "garbage", "no text", "reset"])
async def test_a_status_that_is_not_to_be_had_is_asked_for_again(server, fault):
    server.script([{"on": "get", "fault": fault}] * 2)
    assert (await images(server).generate(request())).data
    assert len(server.requests("create")) == 1 and not server.requests("cancel")


async def test_a_status_that_can_never_be_read_is_a_failure_that_may_be_billed(server):
    server.script([{"on": "get", "fault": "deep"}])
    with pytest.raises(ProviderError, match="no JSON that can be read") as caught:
        await images(server).generate(request())
    assert caught.value.paid and server.orphans() == []


@pytest.mark.parametrize("fault", ["no text", "deep", "garbage"])
async def test_a_prediction_whose_page_cannot_be_read_is_not_adopted(server, fault):
    server.script([{"on": "get", "fault": fault}] * 9)
    assert await images(server).adopt("p1") is None


async def test_the_sdk_repeats_nothing_by_itself(server):
    server.script([{"on": "model", "fault": "429"}] * 9)
    with pytest.raises(ProviderError, match="429"):
        await images(server, "lab/new").load()
    assert len(server.requests("model")) == 4  # a call that is alone is made again three times


async def test_a_throttled_status_waits_within_bounds_and_slows_no_other_call(server):
    server.script([{"on": "get", "fault": "429", "retry_after": 99}] * 2)
    model = images(server, timeout=5)
    assert (await model.generate(request())).data
    assert (await model.server.connection()).account.lane.limit == math.inf


# --- pictures that are none -------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["empty", "truncated", "html", "gone", "500", "reset"])
async def test_a_picture_that_does_not_arrive_is_fetched_again(server, fault):
    server.script([{"on": "output", "fault": fault}] * 2)
    assert open_image((await images(server).generate(request())).data).size == (96, 54)
    assert len(server.requests("create")) == 1 and len(server.requests("output")) == 3


@pytest.mark.parametrize("fault", ["empty", "truncated", "html", "gone"])
async def test_a_picture_that_never_arrives_is_a_failure(server, fault):
    server.script([fault])
    with pytest.raises(ProviderError, match="the image of prediction"):
        await images(server).generate(request())
    assert len(server.requests("create")) == 1 and len(server.requests("output")) == 4


async def test_a_bomb_is_not_decoded(server, tmp_path):
    server.script(["bomb"])
    with pytest.raises(GenerationFailed, match="bomb"):
        await generate_images("a keeper", 1, output_dir=tmp_path, model=images(server))


OUTSIDE = ["http://127.0.0.1:{port}/x.png", "https://127.0.0.1:{port}/x.png",
           "http://localhost:{port}/x.png", "http://10.0.0.1/x.png", "https://example.com/x.png",
           "https://replicate.delivery@127.0.0.1:{port}/x.png", "file:///etc/passwd"]  # fmt: skip


@pytest.mark.parametrize("way", ["elsewhere", "redirect"])
@pytest.mark.parametrize("url", OUTSIDE)
async def test_nobody_else_is_asked_for_a_picture(server, other, way, url):
    port, own = (s.base_url.rpartition(":")[2] for s in (other, server))
    server.script([{"fault": way, "url": url.format(port=port, own=own)}])
    with pytest.raises(ProviderError, match="url must be"):
        await images(server).generate(request())
    assert other.requests() == [] and len(server.requests("output")) == (way == "redirect")


@pytest.mark.parametrize("output", [None, [], {}, 5, [None], [[]], "a", {"a": "b c"}])
def test_an_output_without_a_picture_has_no_address(output):
    made = Prediction.read({"id": "p1", "status": "succeeded", "output": output})
    assert made.addresses == [] and "no image in its output" in made.failure.text
    assert made.failure.kind == "never" and made.failure.paid


def test_the_first_of_several_pictures_counts():
    made = {"id": "p1", "status": "succeeded", "output": ["https://a/1", "https://a/2"]}
    assert Prediction.read(made).addresses == ["https://a/1", "https://a/2"]


# --- cancelling -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
async def test_what_is_not_wanted_any_more_is_cancelled(server, count):
    before = len(server.predictions())
    server.script(["forever"] * count)
    model = images(server)
    tasks = [asyncio.create_task(model.generate(request())) for _ in range(count)]
    await until(lambda: len(made_since(server, before)) == count and server.requests("get"))
    begun = time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert time.perf_counter() - begun < 5 and all(task.cancelled() for task in tasks)
    assert server.orphans() == [] and len(server.requests("cancel")) == count


@pytest.mark.parametrize("fault", [{"fault": "late", "seconds": 0.4},
                                   {"fault": "late", "seconds": 1.2},
                                   {"fault": "lost", "seconds": 0.4},
                                   {"fault": "delayed", "seconds": 0.3}])  # fmt: skip
@pytest.mark.parametrize("count", [1, 4])
async def test_a_create_on_its_way_is_cancelled_too(server, fault, count):
    before = len(server.predictions())
    server.script([{**fault, "takes": 60}] * count)
    model = images(server)
    tasks = [asyncio.create_task(model.generate(request())) for _ in range(count)]
    await until(lambda: len(server.requests("create")) == count)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=5)
    assert all(task.cancelled() for task in tasks)
    statuses = [p["status"] for p in made_since(server, before)]
    assert statuses == ["canceled"] * count and server.orphans() == []


async def test_cancelling_is_tried_again(server):
    server.script(["forever", *({"on": "cancel", "fault": f} for f in ("500", "reset", "hang"))])
    task = asyncio.create_task(images(server).generate(request()))
    await until(lambda: server.requests("get"))
    task.cancel()
    await asyncio.wait([task], timeout=6)
    assert task.cancelled() and server.orphans() == []


async def test_a_second_cancellation_waits_for_the_first(server):
    server.script(["forever", {"on": "cancel", "fault": "delayed", "seconds": 0.3}])
    task = asyncio.create_task(images(server).generate(request()))
    await until(lambda: server.requests("get"))
    task.cancel()
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled() and server.orphans() == []


async def test_a_server_that_does_not_cancel_is_not_waited_for(server, caplog, monkeypatch):
    assert GRACE < 5
    monkeypatch.setattr(predictions, "_GRACE", 0.8)
    server.script(["forever", *({"on": "cancel", "fault": "hang"} for _ in range(9))])
    model = images(server, timeout=0.3)
    begun = time.perf_counter()
    with pytest.raises(ProviderError, match="had not ended"):
        await model.generate(request())
    assert 1.1 < time.perf_counter() - begun < 1.8
    assert "may still run" in caplog.text
    server.script()
    await (await client_of(server)).predictions.async_cancel(server.orphans()[-1])


# --- adopting ---------------------------------------------------------------------------------


async def test_the_id_is_told_as_soon_as_it_is_known(server):
    server.script([{"takes": 0.4}])
    told: list[str] = []
    call = Call(started=told.append)
    task = asyncio.create_task(images(server, FLUX).generate(request(seed=7), call=call))
    await until(lambda: told)
    assert not task.done() and [(await task).provider_id] == told


@pytest.mark.parametrize("seconds", [0, 0.3])
async def test_a_prediction_of_a_killed_run_is_adopted(server, seconds):
    first = images(server, FLUX)
    client = await client_of(server)
    server.script([{"takes": seconds}])
    wish = {"prompt": "a keeper", "seed": 7, "aspect_ratio": "16:9"}
    left = await client.models.predictions.async_create(FLUX, wish)
    made = await first.adopt(left.id)
    assert (made.provider_id, made.seed) == (left.id, 7)
    assert made.data == (await first.generate(request(seed=7))).data
    assert len(server.requests("create")) == 2


@pytest.mark.parametrize("fault", ["failed", "canceled", "aborted", "gone", "elsewhere"])
async def test_what_has_no_picture_is_not_adopted(server, fault):
    client = await client_of(server)
    server.script([{"fault": fault, "url": "https://example.com/x.png"}])
    left = await client.models.predictions.async_create(NANO, {"prompt": "a"})
    assert await images(server).adopt(left.id) is None
    assert await images(server).adopt("0" * 26) is None


async def test_an_adopted_prediction_is_cancelled_like_any_other(server):
    client = await client_of(server)
    server.script(["forever"])
    left = await client.models.predictions.async_create(NANO, {"prompt": "a"})
    task = asyncio.create_task(images(server).adopt(left.id))
    await until(lambda: len(server.requests("get")) > 1)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled() and server.orphans() == []


# --- keys, addresses, loops -------------------------------------------------------------------


@pytest.mark.parametrize("on", ["create", "get"])
async def test_the_token_is_in_no_error_log_or_repr(server, caplog, on):
    caplog.set_level(logging.DEBUG)
    server.script([{"on": on, "fault": "401"}])
    model = images(server)
    with pytest.raises(ProviderError) as caught:
        await model.generate(request())
    shown = "".join(traceback.format_exception(caught.value))
    assert "not a valid token" in shown
    assert TOKEN not in f"{shown} {caught.value!r} {model!r} {caplog.text}"


def test_the_token_of_the_environment_stays_with_its_address(monkeypatch):
    monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
    assert ReplicateImages().name == "replicate:google/nano-banana-2"
    with pytest.raises(ValueError, match="token of its own"):
        ReplicateImages(base_url="https://images.example.com")
    monkeypatch.setenv("REPLICATE_BASE_URL", "https://images.example.com:8443")
    model = ReplicateImages()
    assert model.name == "replicate:google/nano-banana-2 @ images.example.com:8443"
    assert model.server.token == TOKEN
    with pytest.raises(ValueError, match="token of its own"):
        ReplicateImages(base_url="https://api.replicate.com")


@pytest.mark.parametrize("token", [None, "", "  \n", "r8_half\nr8_half", "r8_…"])
def test_without_a_good_token_nothing_is_sent(server, token):
    with pytest.raises(ValueError, match=r"REPLICATE_API_TOKEN|other characters") as caught:
        ReplicateImages(base_url=server.base_url, api_token=token)
    assert "r8" not in str(caught.value)


async def test_a_client_of_ones_own_is_used(server):
    client = await client_of(server)
    model = ReplicateImages(client=client)
    assert model.server.base_url == server.base_url and (await model.generate(request())).data
    with pytest.raises(ValueError, match="base_url and api_token must be None"):
        ReplicateImages(client=client, api_token=TOKEN)


def test_each_event_loop_has_its_own_client(server):
    model, clients = images(server), []

    async def once():
        data = (await model.generate(request())).data
        ((_, connection),) = model.server.connections.values()
        clients.append(weakref.ref(connection.client))
        return data

    assert all(asyncio.run(once()) for _ in range(3))
    gc.collect()
    assert model.server.connections == {} and [ref() for ref in clients] == [None] * 3


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(server, timeout):
    with pytest.raises(ValueError, match="timeout"):
        images(server, timeout=timeout)


# --- a run ------------------------------------------------------------------------------------


async def test_a_story_is_drawn(server, tmp_path):
    """Three scenes: the chain's two references are uploaded once each, and nothing is left over."""
    before = len(server.predictions())
    pipeline = Pipeline(director=Director(), critic=Critic(), image_model=images(server),
                        scorers=[FakeScorer()], num_variations=3)  # fmt: skip
    story = Story(scenes=[Scene(prompt=f"a keeper, scene {n}") for n in (1, 2, 3)])
    result = await pipeline.run(story, output_dir=tmp_path)
    assert [scene.reference_from for scene in result.scenes] == ["ranked"] * 3
    assert len(server.requests("upload")) == 2 and len(made_since(server, before)) == 9
    assert all(v.image.seed is None for scene in result.scenes for v in scene.variations)


FAULTS = [*({"fault": "429", "seconds": 0},), "500", "502", "reset", "lost", "garbage", "nsfw",
          "failed", "aborted", "forever", {"fault": "late", "seconds": 1.6}]  # fmt: skip
LATER = [("get", "500"), ("get", "reset"), ("list", "500"), ("list", "garbage"), ("cancel", "500"),
         ("output", "empty"), ("output", "gone"), ("output", "reset")]  # fmt: skip


@pytest.mark.parametrize("seed", sampled(range(2), 2))
async def test_whatever_happens_nothing_runs_on_and_nothing_is_paid_for_twice(server, seed):
    """Twenty-four calls, two with each input, some cancelled, on a very bad day."""
    chance = random.Random(seed)
    script = [chance.choice(FAULTS) if chance.random() < 0.4 else None for _ in range(50)]
    script += [{"on": on, "fault": fault} for on, fault in chance.choices(LATER, k=20)]
    chance.shuffle(script)
    before = len(server.predictions())
    server.script(script)
    model, call = images(server, timeout=1.2), Call(limits=RunLimits(1000))

    async def one(number: int):
        task = asyncio.create_task(model.generate(request(f"scene {number % 12}"), call=call))
        if number % 6 == 5:
            await asyncio.sleep(chance.random() / 4)
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    ends = await asyncio.gather(*(one(number) for number in range(24)))
    made = made_since(server, before)
    assert all(p["status"] in TERMINAL for p in made)
    good = [end.provider_id for end in ends if hasattr(end, "data")]
    assert len(good) == len(set(good)) > 3
    kinds = {type(end) for end in ends}
    assert kinds <= {type(ends[0]), ProviderError, asyncio.CancelledError, replicate.GeneratedImage}
    assert not any(TOKEN in str(r) for r in server.requests("output"))
