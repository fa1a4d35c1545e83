"""One prompt, V pictures: order, failures, seeds, cancellation, and what is refused for nothing."""

import asyncio
import hashlib
import io
import logging
import pickle
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refimg import generate
from refimg.engine.protocols import Call
from refimg.generate import (
    GeneratedImage,
    GenerationFailed,
    ImageGenerationResult,
    ImageRequest,
    check_model,
    check_references,
    generate_images,
    request_image,
    variation_seed,
)
from tests.fakes import FakeImages, picture


def red(path: Path) -> int:
    return Image.open(path).getpixel((0, 0))[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)


# Order and numbers


async def test_results_follow_the_variations_and_not_the_clock(tmp_path):
    class Slower(FakeImages):
        async def generate(self, request):
            variation = int(request.slot.split("/")[1][1:])
            await asyncio.sleep(0.05 * (5 - variation))
            return GeneratedImage(data=picture(variation))

    made = await generate_images("p", 4, output_dir=tmp_path, model=Slower())
    assert [red(result.image_path) for result in made] == [1, 2, 3, 4]
    assert [r.image_path for r in made] == [tmp_path / f"image_v{k}.png" for k in range(1, 5)]


async def test_all_calls_are_under_way_at_once(tmp_path):
    started, go = [], asyncio.Event()

    class Waiting(FakeImages):
        async def generate(self, request):
            started.append(request.slot)
            if len(started) == 20:
                go.set()
            await asyncio.wait_for(go.wait(), 10)
            return GeneratedImage(data=picture(len(started)))

    made = await generate_images("p", 20, output_dir=tmp_path, model=Waiting(), stem="many")
    assert started == [f"many/v{k}/a1" for k in range(1, 21)]
    assert [r.image_path.name for r in made] == [f"many_v{k}.png" for k in range(1, 21)]


async def test_the_same_stem_in_turn_and_at_once_overwrites_nothing(tmp_path):
    first = await generate_images("p", 2, output_dir=tmp_path, model=FakeImages(), stem="s")
    kept = {r.image_path: r.image_path.read_bytes() for r in first}
    pair = await asyncio.gather(
        *(
            generate_images(name, 4, output_dir=tmp_path, model=FakeImages(), stem="s")
            for name in ("left", "right")
        )
    )
    assert names(tmp_path) == sorted(f"s_v{k}.png" for k in range(1, 11))
    assert {path: path.read_bytes() for path in kept} == kept
    for made, prompt in zip(pair, ("left", "right"), strict=True):
        assert [text_of(r.image_path)["prompt"] for r in made] == [prompt] * 4
        numbers = [int(r.image_path.stem[3:]) for r in made]
        assert numbers == sorted(numbers)


async def test_relative_folders_become_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (made,) = await generate_images("p", 1, output_dir="a/b", model=FakeImages())
    assert made.image_path == tmp_path / "a" / "b" / "image_v1.png"


# Failures


async def test_what_worked_is_kept_and_numbered_without_gaps(tmp_path, caplog):
    script = [RuntimeError("503"), picture(2), b"<html>", picture(4), GeneratedImage(data=b"")]
    model = FakeImages(lambda request, number: script[number - 1])
    with caplog.at_level(logging.WARNING, "refimg.generate"):
        made = await generate_images("p", 5, output_dir=tmp_path, model=model, seed=7)
    assert [(r.image_path.name, red(r.image_path)) for r in made] == [
        ("image_v1.png", 2),
        ("image_v2.png", 4),
    ]
    assert [r.seed for r in made] == [variation_seed(7, 1, 2), variation_seed(7, 1, 4)]
    assert names(tmp_path) == ["image_v1.png", "image_v2.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "image/v1/a1" in caplog.text
    assert "503" in caplog.text


async def test_no_picture_at_all_lists_every_cause_in_order(tmp_path):
    script = [RuntimeError("first"), TimeoutError("second"), b"GIF89a third"]
    model = FakeImages(lambda request, number: script[number - 1])
    with pytest.raises(GenerationFailed) as failed:
        await generate_images("p", 3, output_dir=tmp_path, model=model)
    assert [type(cause) for cause in failed.value.causes] == [
        RuntimeError,
        TimeoutError,
        ValueError,
    ]
    message = str(failed.value)
    assert message.index("first") < message.index("second") < message.index("GIF89a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("answer", [None, "text", 7, {"data": picture()}])
async def test_an_answer_of_the_wrong_type_is_one_failed_variation(tmp_path, answer):
    class Odd(FakeImages):
        async def generate(self, request):
            return GeneratedImage(picture(1)) if "/v1/" in request.slot else answer

    assert len(await generate_images("p", 2, output_dir=tmp_path, model=Odd())) == 1


@pytest.mark.parametrize("data", [None, "text", 7])
async def test_data_of_the_wrong_type_is_one_failed_variation(tmp_path, data):
    script = [picture(1), GeneratedImage(data=data)]
    model = FakeImages(lambda request, number: script[number - 1])
    assert len(await generate_images("p", 2, output_dir=tmp_path, model=model)) == 1


def test_the_error_lists_at_most_twenty_causes_and_no_novels():
    error = GenerationFailed([ValueError(f"<{k}>" + "x" * 10_000) for k in range(25)])
    assert len(error.causes) == 25
    assert "<19>" in str(error)
    assert "<20>" not in str(error)
    assert "and 5 more" in str(error)
    assert len(str(error)) < 12_000


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(GenerationFailed([ValueError("a")], "scene 3")))
    assert [str(cause) for cause in error.causes] == ["a"]
    assert str(error) == "scene 3; ValueError: a"
    assert isinstance(error, RuntimeError)


async def test_a_full_disk_is_no_failed_variation(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "save_numbered", full)
    with pytest.raises(OSError, match="No space left"):
        await generate_images("p", 2, output_dir=tmp_path, model=FakeImages())


# Cancellation


async def test_cancelling_stops_every_call_and_writes_nothing(tmp_path):
    model = FakeImages(seconds=30)
    task = asyncio.create_task(generate_images("p", 4, output_dir=tmp_path, model=model))
    while len(model.requests) < 4:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.cancelled == 4
    assert names(tmp_path) == []


async def test_a_call_that_cancels_itself_is_one_failed_variation(tmp_path):
    class Stopped(FakeImages):
        async def generate(self, request):
            if "/v2/" in request.slot:
                await asyncio.sleep(0.02)
                raise asyncio.CancelledError
            return await super().generate(request)

    made = await generate_images("p", 4, output_dir=tmp_path, model=Stopped())
    assert len(made) == 3
    assert names(tmp_path) == ["image_v1.png", "image_v2.png", "image_v3.png"]


async def test_what_arrived_before_a_cancellation_is_kept(tmp_path):
    class Slow(FakeImages):
        async def generate(self, request):
            await asyncio.sleep(30 if "/v3/" in request.slot else 0)
            return await super().generate(request)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await generate_images("p", 3, output_dir=tmp_path, model=Slow())
    assert names(tmp_path) == ["image_v1.png", "image_v2.png"]


async def test_what_is_being_decoded_at_a_cancellation_is_written_and_leaves_no_task(
    tmp_path, monkeypatch
):
    decoding, decode = threading.Event(), generate.decode_image

    def slow(data):
        decoding.set()
        time.sleep(0.1)
        return decode(data)

    monkeypatch.setattr(generate, "decode_image", slow)
    made = generate_images("p", 2, output_dir=tmp_path, model=FakeImages())
    task = asyncio.create_task(made)
    while not decoding.is_set():
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert names(tmp_path) == ["image_v1.png", "image_v2.png"]


async def test_a_bad_reference_leaves_no_folder_behind(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match="missing"):
        await generate_images(
            "p", 1, output_dir=folder, model=FakeImages(), references=[tmp_path / "missing.png"])
    assert not folder.exists()


async def test_a_file_that_cannot_be_written_costs_only_itself(tmp_path, monkeypatch):
    real, calls = generate.save_numbered, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(generate, "save_numbered", failing)
    assert len(await generate_images("p", 3, output_dir=tmp_path, model=FakeImages())) == 2


async def test_siblings_have_cleaned_up_before_the_cancellation_goes_on(tmp_path):
    cleaned = []

    class Tidy(FakeImages):
        async def generate(self, request):
            try:
                await asyncio.sleep(30)
            finally:
                await asyncio.sleep(0.05)
                cleaned.append(request.slot)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(generate_images("p", 3, output_dir=tmp_path, model=Tidy()), 0.1)
    assert len(cleaned) == 3
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others


async def test_an_exit_is_not_swallowed(tmp_path):
    class Exit(BaseException):
        pass

    model = FakeImages(lambda request, number: Exit() if number == 2 else picture(), seconds=0.01)
    with pytest.raises(Exit):
        await generate_images("p", 3, output_dir=tmp_path, model=model)


# Seeds and negative prompts


def test_seeds_are_the_documented_ones():
    digest = hashlib.sha256(b"7/2/3/1").digest()
    assert variation_seed(7, 2, 3) == int.from_bytes(digest[:4], "big")
    assert variation_seed(7, 2, 3, 2) != variation_seed(7, 2, 3, 1)
    assert variation_seed(0, 1, 1) is not None


@given(st.integers(), st.integers(1, 500), st.integers(1, 20), st.integers(1, 3))
def test_every_seed_fits_32_bits(seed, scene, variation, attempt):
    assert 0 <= variation_seed(seed, scene, variation, attempt) < 2**32


async def test_each_variation_is_sent_its_own_seed_and_they_repeat(tmp_path):
    first, second, plain = FakeImages(), FakeImages(), FakeImages()
    for model, seed in ((first, 7), (second, 7), (plain, None)):
        await generate_images("p", 4, output_dir=tmp_path, model=model, seed=seed)
    assert [r.seed for r in first.requests] == [variation_seed(7, 1, k) for k in (1, 2, 3, 4)]
    assert [r.seed for r in second.requests] == [r.seed for r in first.requests]
    assert [r.seed for r in plain.requests] == [None] * 4


@pytest.mark.parametrize(
    ("sent", "reported", "recorded"),
    [(7, 99, 99), (7, 0, 0), (7, None, "derived"), (None, 5, 5), (None, None, None)],
)
async def test_the_recorded_seed_is_the_providers_else_the_sent_one(
    tmp_path, sent, reported, recorded
):
    model = FakeImages(lambda request, number: GeneratedImage(picture(), seed=reported))
    (made,) = await generate_images("p", 1, output_dir=tmp_path, model=model, seed=sent)
    expected = variation_seed(7, 1, 1) if recorded == "derived" else recorded
    assert made.seed == expected
    assert text_of(made.image_path).get("seed") == (None if expected is None else str(expected))


async def test_what_the_model_cannot_take_is_left_out_with_one_warning_each(tmp_path, caplog):
    model = FakeImages(
        lambda request, number: GeneratedImage(picture()),
        takes_seed=False,
        takes_negative_prompt=False,
    )
    with caplog.at_level(logging.WARNING, "refimg.generate"):
        made = await generate_images(
            "p", 3, output_dir=tmp_path, model=model, seed=7, negative_prompt="text"
        )
    assert [(r.seed, r.negative_prompt) for r in model.requests] == [(None, None)] * 3
    assert [r.seed for r in made] == [None] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "fake-images takes no seed: 7 is not sent",
        "fake-images takes no negative prompt: 'text' is not sent",
    ]


async def test_a_negative_prompt_reaches_a_model_that_takes_one(tmp_path, caplog):
    model = FakeImages(takes_negative_prompt=True)
    await generate_images("p", 1, output_dir=tmp_path, model=model, negative_prompt="text")
    await generate_images("p", 1, output_dir=tmp_path, model=model, negative_prompt="")
    assert [r.negative_prompt for r in model.requests] == ["text", None]
    assert caplog.records == []


# Refused before anything is paid


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_variations": 0}, r"^num_variations must be .* got "),
        ({"num_variations": 21}, r"^num_variations must be .* got "),
        ({"num_variations": True}, r"^num_variations must be .* got "),
        ({"num_variations": 2.0}, r"^num_variations must be .* got "),
        ({"num_variations": "4"}, r"^num_variations must be .* got "),
        ({"num_variations": None}, r"^num_variations must be .* got "),
        ({"prompt": ""}, r"^prompt must be .* got "),
        ({"prompt": " \n\t\u3000"}, r"^prompt must be .* got "),
        ({"prompt": None}, r"^prompt must be .* got "),
        ({"prompt": ["p"]}, r"^prompt must be .* got "),
        ({"aspect_ratio": "16-9"}, r"^aspect_ratio must be .* got "),
        ({"aspect_ratio": None}, r"^aspect_ratio must be .* got "),
        ({"seed": "7"}, r"^seed must be .* got "),
        ({"seed": True}, r"^seed must be .* got "),
        ({"seed": 1.5}, r"^seed must be .* got "),
        ({"stem": "../x"}, "^stem"),
        ({"references": ["/nowhere.png"]}, "nowhere.png"),
        ({"references": "/nowhere.png"}, "nowhere.png"),
        ({"references": [Path(__file__)]}, "test_generate.py"),
        ({"references": ["a.png", "b.png"]},
         "references must be at most 1 images for fake-images, got 2"),
    ],
    ids=str,
)
async def test_wrong_arguments_cost_nothing(tmp_path, wrong, reason):
    model = FakeImages()
    arguments = {"prompt": "p", "num_variations": 2} | wrong
    with pytest.raises(ValueError, match=r".") as refusal:
        await generate_images(output_dir=tmp_path / "new", model=model, **arguments)
    assert re.search(reason, str(refusal.value), re.DOTALL)
    assert model.requests == []


async def test_an_output_folder_that_cannot_be_made_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    model = FakeImages()
    with pytest.raises(ValueError, match="output_dir must be"):
        await generate_images("p", 1, output_dir=tmp_path / "file" / "images", model=model)
    assert model.requests == []


@pytest.mark.parametrize("ratio", ["1:1", "16:9", "9:16", "1000:1", "21:9"])
def test_a_model_without_a_list_takes_any_ratio(ratio):
    check_model(FakeImages(), num_variations=20, aspect_ratio=ratio)


@pytest.mark.parametrize(
    "ratio", ["", ":", "0:1", "1:0", "-1:2", "1.5:1", "16:9\n", " 16:9", "١:٢", "16x9", "1:2:3", 1]
)
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="W:H in whole numbers"):
        check_model(FakeImages(), num_variations=1, aspect_ratio=ratio)


def test_a_model_that_takes_no_reference_says_so():
    model = FakeImages(max_references=0)
    check_model(model, num_variations=1, aspect_ratio="1:1")
    with pytest.raises(ValueError, match="at most 0 images for fake-images, got 1"):
        check_model(model, num_variations=1, aspect_ratio="1:1", references=1)


# References


async def test_references_are_sent_and_recorded_as_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.webp"):
        Path(name).write_bytes(picture(1, form="WEBP"))
    model = FakeImages(max_references=2)
    (made,) = await generate_images(
        "p", 1, output_dir="out", model=model, references=["a.png", Path("b.webp")]
    )
    assert made.references == (tmp_path / "a.png", tmp_path / "b.webp")
    assert model.requests[0].references == made.references


async def test_one_reference_may_stand_alone_and_an_iterator_will_do(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    for given_as in (path, str(path), iter([path])):
        model = FakeImages()
        await generate_images("p", 1, output_dir=tmp_path, model=model, references=given_as)
        assert model.requests[0].references == (path,)


def test_references_are_decoded_and_not_only_found(tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(picture(size=(300, 300))[:-200])
    with pytest.raises(ValueError, match=r"half\.png"):
        check_references([path])


# Prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "東京の灯台 👩‍👩‍👧 e\u0301 \u202e",
        "a\0b",
        "half \ud83d",
        "<script>alert('x')</script> {braces} %s $x$ \\n",
        "x" * 10_000,
        "𝕏" * 10_000,
    ],
    ids=ascii,
)
async def test_any_prompt_is_drawn_recorded_and_stored(tmp_path, prompt):
    model = FakeImages()
    (made,) = await generate_images(prompt, 1, output_dir=tmp_path, model=model)
    sent = re.sub("[\0\u202e]", "", prompt.replace("\ud83d", "\ufffd"))
    assert model.requests[0].prompt == sent
    assert made.prompt == sent
    assert text_of(made.image_path)["prompt"] == sent
    assert ImageGenerationResult.model_validate_json(made.model_dump_json()) == made


# Records


async def test_a_record_is_true_to_its_file(tmp_path):
    def script(request, number):
        data = picture(number, size=(80, 45), form="WEBP")
        return GeneratedImage(data=data, seed=5, provider_id="p-1", cost=0.03)

    before = datetime.now(UTC) - timedelta(seconds=1)
    model = FakeImages(script, seconds=0.05, name="prov/model@1")
    (made,) = await generate_images("p", 1, output_dir=tmp_path, model=model, aspect_ratio="4:3")
    assert hashlib.sha256(made.image_path.read_bytes()).hexdigest() == made.sha256
    assert (made.width, made.height) == Image.open(made.image_path).size == (80, 45)
    assert (made.model_name, made.aspect_ratio, made.seed) == ("prov/model@1", "4:3", 5)
    assert (made.provider_id, made.cost) == ("p-1", 0.03)
    assert 0.05 <= made.generation_time < 5
    assert before <= datetime.fromisoformat(made.timestamp) <= datetime.now(UTC)
    assert text_of(made.image_path) == {"prompt": "p", "model": "prov/model@1", "seed": "5"}


async def test_nothing_is_made_up(tmp_path):
    model = FakeImages(lambda request, number: GeneratedImage(data=picture()))
    (made,) = await generate_images("p", 1, output_dir=tmp_path, model=model)
    assert (made.seed, made.cost, made.provider_id) == (None, None, None)


async def test_records_round_trip_through_json(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    model = FakeImages()
    made = await generate_images("p", 2, output_dir=tmp_path, model=model, references=[path])
    for record in (*made, *model.requests):
        again = type(record).model_validate_json(record.model_dump_json())
        assert again == record
        assert hash(again) == hash(record)


def test_records_are_frozen():
    request = ImageRequest(prompt="p")
    with pytest.raises(ValueError):
        request.prompt = "q"
    with pytest.raises(AttributeError):
        GeneratedImage(data=b"").seed = 1


async def test_a_candidate_is_decoded_and_saved_once(tmp_path):
    request = ImageRequest(prompt="p", slot="s/v1/a1")
    model = FakeImages(lambda *_: picture(9, form="JPEG"))
    candidate = await request_image(model, request, number=3)
    assert candidate.pixels is None and candidate.image is None
    await asyncio.gather(candidate.decode(), candidate.decode())
    assert (candidate.pixels.mode, candidate.request, candidate.model_name, candidate.number) == (
        "RGB", request, "fake-images", 3)
    where = {"output_dir": tmp_path / "deep" / "er", "stem": "s", "first": 3}
    made = await asyncio.gather(*(candidate.save(**where) for _ in range(3)))
    assert {image.image_path.name for image in made} == {"s_v3.png"}
    assert candidate.image is made[0]
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 1
    with pytest.raises(ValueError, match="0 bytes"):
        await (await request_image(FakeImages(lambda *_: b""), request)).decode()


async def test_one_caller_who_is_cancelled_leaves_the_pixels_to_the_others():
    candidate = await request_image(FakeImages(), ImageRequest(prompt="p"))
    first, second = (asyncio.create_task(candidate.decode()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is candidate and candidate.pixels is not None
    assert first.cancelled()


@pytest.mark.parametrize("takes_call", [True, False])
async def test_a_call_is_handed_to_a_model_that_takes_it(takes_call):
    class Told(FakeImages):
        async def generate(self, request, **more):
            self.more = more
            return await super().generate(request)

    model, call = Told(), Call()
    model.takes_call = takes_call
    await request_image(model, ImageRequest(prompt="p"), call=call)
    assert model.more == ({"call": call} if takes_call else {})
    await request_image(model, ImageRequest(prompt="p"))
    assert model.more == {}


async def test_what_is_being_saved_is_finished_though_its_caller_is_cancelled(tmp_path):
    request = ImageRequest(prompt="p", slot="s/v1/a1")
    candidate = await request_image(FakeImages(), request)
    task = asyncio.create_task(candidate.save(output_dir=tmp_path, stem="s"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await candidate.save(output_dir=tmp_path, stem="s")).image_path.is_file()
    assert len(list(tmp_path.iterdir())) == 1


async def test_decoding_and_encoding_leave_the_event_loop_alone(tmp_path, monkeypatch):
    loop_thread, seen = threading.get_ident(), []

    def watch(name):
        original = getattr(generate, name)

        def watched(*args, **kwargs):
            seen.append((name, threading.get_ident() == loop_thread))
            return original(*args, **kwargs)

        monkeypatch.setattr(generate, name, watched)

    reference = tmp_path / "a.png"
    reference.write_bytes(picture())
    for name in ("decode_image", "encode_png", "save_numbered", "read_image"):
        watch(name)
    model = FakeImages()
    await generate_images("p", 1, output_dir=tmp_path, model=model, references=[reference])
    assert sorted(seen) == [
        ("decode_image", False),
        ("encode_png", False),
        ("read_image", False),
        ("save_numbered", False),
    ]


FORKED = """
import asyncio, os, sys
from pathlib import Path
from refimg.generate import generate_images
from tests.fakes import FakeImages

def once(stem):
    to = Path(sys.argv[1])
    asyncio.run(generate_images("p", 2, output_dir=to, model=FakeImages(), stem=stem))

once("parent")
child = os.fork()
if not child:
    once("child")
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_forked_child_has_threads_of_its_own(tmp_path):
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, timeout=60)
    assert names(tmp_path) == [f"{who}_v{k}.png" for who in ("child", "parent") for k in (1, 2)]


async def test_the_painters_truth_goes_from_the_bytes_into_the_file(tmp_path):
    gold = Image.new("RGB", (4, 4), "gold")
    notes = generate.encode_png(gold, {"refimg-truth": '{"painter": 1}'})
    (made,) = await generate_images("p", 1, output_dir=tmp_path, model=FakeImages(lambda *_: notes))
    assert text_of(made.image_path)["refimg-truth"] == '{"painter": 1}'


async def test_nothing_foreign_reaches_the_disk(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "gold").save(out, "PNG")
    model = FakeImages(lambda *_: out.getvalue() + b"<script>ALIVE</script>")
    (made,) = await generate_images("p", 1, output_dir=tmp_path, model=model)
    assert b"ALIVE" not in made.image_path.read_bytes()
