"""The journal: nothing is paid twice, nothing that was paid for is lost, whenever it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from bench import commit
from refimg.engine.protocols import Call
from refimg.enhance import Critique, Message, Reply, Usage
from refimg.generate import GeneratedImage, ImageRequest, generate_images
from refimg.storage import database
from refimg.storage import journal as module
from refimg.storage.database import Database, _File, _Row
from refimg.storage.journal import Journal, default_folder
from tests.fakes import FakeChat, FakeImages, critic, director
from tests.sampling import sampled

ROOT = Path(__file__).resolve().parent.parent
ASK = [Message(role="system", content="be brief"), Message(role="user", content="a cat \ud83c")]


def request(slot: str = "s_scene_01/v1/a1", **fields) -> ImageRequest:
    return ImageRequest(prompt="a harbour", **{"slot": slot} | fields)


def images(folder: Path, model, run: str = "run", out: str = "out", **options):
    return Journal(folder, **options).images(model, output_dir=folder / out, generation_id=run)


def chat(folder: Path, model, scene: int = 1, role: str = "director", run: str = "run", **options):
    own = Journal(folder, **options)
    return own.chat(model, output_dir=folder, generation_id=run, scene=scene, role=role)


class Paid:
    """An image model that counts, and draws something else each time."""

    name, max_references, takes_seed, takes_negative_prompt = "paid", 4, False, False
    aspect_ratios = None

    def __init__(self, seconds: float = 0.0, **facts):
        self.calls, self.seconds, self.facts = 0, seconds, facts

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        self.calls = number = self.calls + 1
        await asyncio.sleep(self.seconds)
        return GeneratedImage(data=b"image %d" % number, **self.facts)


# what comes back


@pytest.mark.parametrize("answer", [
    Reply(text=""), Reply(text="ünïcode 漢 🎬\n\x00", cost=0.1 + 0.2),
    Reply(text="x", usage=Usage(input_tokens=7, output_tokens=0), cost=0.0),
])
async def test_a_reply_comes_back_as_it_was(tmp_path, answer):
    model = FakeChat([answer])
    found = [await chat(tmp_path, model).reply(ASK, schema=Critique) for _ in range(2)]
    assert found == [answer, answer] and len(model.calls) == 1


@pytest.mark.parametrize("facts", [
    {}, {"seed": 2**32 - 1, "provider_id": "p-1", "cost": 0.1 + 0.2}, {"seed": 0, "cost": 0.0},
])
async def test_an_image_comes_back_as_it_was(tmp_path, facts):
    model = Paid(**facts)
    first, second = [await images(tmp_path, model).generate(request()) for _ in range(2)]
    assert first == second == GeneratedImage(data=b"image 1", **facts) and model.calls == 1


async def test_the_wrapper_is_the_model_with_a_memory(tmp_path):
    class Loading(Paid):
        async def load(self):
            return "loaded"

    model = images(tmp_path, Loading())
    assert (model.name, model.max_references, model.takes_seed) == ("paid", 4, False)
    assert await model.load() == "loaded"
    bare = images(tmp_path, Paid())
    assert getattr(bare, "load", None) is None and getattr(bare, "adopt", None) is None


async def test_a_director_gets_no_schema_it_was_not_given(tmp_path):
    class Plain:
        name = "plain"

        async def reply(self, messages):
            return Reply(text="yes")

    assert (await chat(tmp_path, Plain()).reply(ASK)).text == "yes"


# which calls are the same


async def test_four_variations_of_a_seedless_model_are_four_calls(tmp_path):
    model = Paid()
    for _ in range(2):
        slots = [f"s_scene_01/v{k}/a1" for k in range(1, 5)]
        found = await asyncio.gather(*(images(tmp_path, model).generate(request(s)) for s in slots))
        assert len({image.data for image in found}) == 4
    assert model.calls == 4


@pytest.mark.parametrize("other", [
    {"run": "run2"}, {"out": "elsewhere"}, {"request": {"slot": "s_scene_01/v1/a2"}},
    {"request": {"slot": "s_scene_02/v1/a1"}}, {"request": {"seed": 1}},
    {"request": {"negative_prompt": "fog"}}, {"request": {"aspect_ratio": "1:1"}},
])
async def test_what_differs_is_paid(tmp_path, other):
    model, fields = Paid(), other.pop("request", {})
    await images(tmp_path, model).generate(request())
    await images(tmp_path, model, **other).generate(request(**fields))
    assert model.calls == 2


async def test_another_model_is_paid(tmp_path):
    models = Paid(), Paid()
    models[1].name = "other"
    for model in models:
        await images(tmp_path, model).generate(request())
    assert [model.calls for model in models] == [1, 1]


async def test_references_count_by_content(tmp_path):
    model, first, second = Paid(), tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    for path in (first, second):
        await images(tmp_path, model).generate(request(references=(path,)))
    assert model.calls == 1
    second.write_bytes(b"two")
    await images(tmp_path, model).generate(request(references=(second,)))
    await images(tmp_path, model).generate(request(references=(second, first)))
    await images(tmp_path, model).generate(request(references=(first, second)))
    await images(tmp_path, model).generate(request())
    assert model.calls == 5


async def test_each_call_of_a_role_is_its_own(tmp_path):
    model = FakeChat(["one", "two", "three"])
    for _ in range(2):
        wrapped = chat(tmp_path, model)
        assert [(await wrapped.reply(ASK)).text for _ in range(3)] == ["one", "two", "three"]
    assert len(model.calls) == 3


@pytest.mark.parametrize("other", [{"scene": 2}, {"role": "critic"}, {"run": "run2"}])
async def test_scenes_roles_and_runs_are_apart(tmp_path, other):
    model = FakeChat(["one", "two"])
    await chat(tmp_path, model).reply(ASK)
    assert (await chat(tmp_path, model, **other).reply(ASK)).text == "two"


async def test_a_schema_may_be_given_by_position(tmp_path):
    model = FakeChat(["one", "two"])
    await chat(tmp_path, model).reply(ASK, Critique)
    assert (await chat(tmp_path, model).reply(ASK, schema=Critique)).text == "one"
    assert model.calls[0][1] is Critique


async def test_an_adoption_that_fails_pays_nothing(tmp_path):
    class Unsure(Remote):
        async def adopt(self, prediction, *, call):
            raise OSError("503")

    with pytest.raises(asyncio.CancelledError):
        await images(tmp_path, Remote(die=True)).generate(request())
    later = Unsure()
    with pytest.raises(OSError, match="503"):
        await images(tmp_path, later).generate(request())
    there = Remote({"p-1": GeneratedImage(data=b"old")})
    assert (await images(tmp_path, there).generate(request())).data == b"old"
    assert (later.calls, there.calls) == (0, 0)


async def test_other_words_or_another_schema_are_another_call(tmp_path):
    model = FakeChat(["one", "two", "three"])
    for ask, shape in ((ASK, {}), (ASK, {"schema": Critique}), (ASK[:1], {})):
        await chat(tmp_path, model).reply(ask, **shape)
    assert len(model.calls) == 3


async def test_no_slot_no_call(tmp_path):
    model = Paid()
    with pytest.raises(ValueError, match="slot must be the place"):
        await images(tmp_path, model).generate(request(""))
    assert model.calls == 0


async def test_refresh_pays_again_and_keeps_the_new_answer(tmp_path):
    model = Paid()
    await images(tmp_path, model).generate(request())
    assert (await images(tmp_path, model, refresh=True).generate(request())).data == b"image 2"
    assert (await images(tmp_path, model).generate(request())).data == b"image 2"


async def test_a_refresh_that_fails_leaves_the_old_answer(tmp_path):
    await images(tmp_path, Paid()).generate(request())
    with pytest.raises(OSError, match="503"):
        await images(tmp_path, Broken(), refresh=True).generate(request())
    assert (await images(tmp_path, Broken()).generate(request())).data == b"image 1"


class Broken(Paid):
    async def generate(self, request: ImageRequest) -> GeneratedImage:
        self.calls += 1
        raise OSError("503")


async def test_a_failure_is_not_remembered(tmp_path):
    with pytest.raises(OSError, match="503"):
        await images(tmp_path, Broken()).generate(request())
    assert (await images(tmp_path, Paid()).generate(request())).data == b"image 1"


# damage


def results(folder: Path) -> list[Path]:
    return sorted((folder / "results").iterdir())


@pytest.mark.parametrize("damage", [
    Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"image 2"),
    lambda p: p.write_bytes(p.read_bytes()[:-1]),
])
async def test_a_damaged_answer_is_no_answer(tmp_path, damage):
    model = Paid()
    await images(tmp_path, model).generate(request())
    (path,) = results(tmp_path)
    damage(path)
    assert (await images(tmp_path, model).generate(request())).data == b"image 2"
    assert (await images(tmp_path, model).generate(request())).data == b"image 2"
    assert model.calls == 2


async def test_a_damaged_file_is_repaired_by_the_same_answer(tmp_path):
    model = FakeChat(["same"])
    await chat(tmp_path, model).reply(ASK)
    results(tmp_path)[0].write_bytes(b"rubbish")
    for _ in range(2):
        assert (await chat(tmp_path, model).reply(ASK)).text == "same"
    assert len(model.calls) == 2


async def test_what_is_paid_is_returned_even_if_it_cannot_be_written(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert (await images(tmp_path, Paid()).generate(request())).data == b"image 1"
    assert "not in the journal" in caplog.text and not results(tmp_path)


async def test_where_no_journal_can_be_nothing_is_paid(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model, journal = Paid(), Journal(tmp_path / "file" / "journal")
    with pytest.raises(ValueError, match="journal must be a folder that can be written"):
        await journal.check()
    with pytest.raises(OSError):
        await journal.images(model, output_dir=tmp_path, generation_id="run").generate(request())
    assert model.calls == 0


@pytest.mark.parametrize("broken", ["find", "begin", "keep"])
async def test_a_call_that_cannot_be_written_down_is_made_and_used(
    tmp_path, monkeypatch, caplog, broken
):
    journal, model, whole = Journal(tmp_path), Paid(), _File.execute
    await journal.check()

    def fails(self, line, *values):
        if line.startswith("SELECT" if broken == "find" else "INSERT") and (
            (broken == "keep") == ("excluded.done" in line)
        ):
            raise sqlite3.OperationalError("disk I/O error")
        return whole(self, line, *values)

    monkeypatch.setattr(_File, "execute", fails)
    wrapped = journal.images(model, output_dir=tmp_path, generation_id="run")
    assert (await wrapped.generate(request())).data == b"image 1" and model.calls == 1
    assert caplog.text.count("disk I/O error") == 1


@pytest.mark.parametrize("damage", ["text", "zeros", "short", "empty", "gone", "another"])
async def test_a_damaged_database_is_built_again_and_nothing_is_paid_again(
    tmp_path, caplog, damage
):
    model, slots = Paid(), [f"s_scene_{n:02d}/v1/a1" for n in range(30)]
    journal, path = Journal(tmp_path), tmp_path / "journal.db"
    wrapped = journal.images(model, output_dir=tmp_path / "out", generation_id="run")
    first = [await wrapped.generate(request(slot)) for slot in slots]
    journal.database._file.close()
    data = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "another":
            path.unlink()
            with closing(sqlite3.connect(path)) as other:
                other.execute("CREATE TABLE calls (number)")
        case _:
            path.write_bytes({"text": b"this is no database" * 100, "empty": b"",
                              "zeros": data[:4096] + bytes(8192) + data[12288:],
                              "short": data[: len(data) // 2]}[damage])
    again = [await images(tmp_path, model).generate(request(slot)) for slot in slots]
    assert again == first and model.calls == 30
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "30 of 30 answers were saved" in record.getMessage()
    assert (damage in ("empty", "gone")) is not bool(list(tmp_path.glob("journal.db.damaged-*")))


@pytest.mark.parametrize("damage", ["text", "empty", "gone"])
async def test_what_a_run_has_spent_is_known_after_any_damage(tmp_path, caplog, damage):
    run = {"output_dir": tmp_path / "out", "generation_id": "run"}
    journal, slots = Journal(tmp_path), [f"s_scene_{n:02d}/v1/a1" for n in range(4)]
    wrapped = journal.images(Paid(cost=0.5), **run)
    for slot in slots:
        await wrapped.generate(request(slot))
    for usd in (1.75, 2.25):
        await journal.book(usd, **run)
    journal.database._file.close()
    (tmp_path / "journal.db").write_bytes(b"no database" * 100 if damage == "text" else b"")
    if damage == "gone":
        (tmp_path / "journal.db").unlink()
    lost, *_ = (path for path in results(tmp_path) if path.read_bytes() == b"image 1")
    lost.unlink()
    assert await Journal(tmp_path).spent(**run) == await Journal(tmp_path).spent(**run) == 2.25
    (record,) = caplog.records
    assert "3 of 4 answers were saved" in record.getMessage()


async def test_a_damaged_copy_is_told_once(tmp_path, caplog):
    wrapped = images(tmp_path, Paid())
    for n in range(2):
        await wrapped.generate(request(f"s_scene_{n:02d}/v1/a1"))
    wrapped._journal.database._file.close()
    (tmp_path / "journal.db").unlink()
    next((tmp_path / "rows").iterdir()).write_bytes(b"")
    for _ in range(2):
        await Journal(tmp_path).check()
    (record,) = caplog.records
    assert "1 of 2 answers were saved" in record.getMessage()
    assert len(list((tmp_path / "rows").glob("*.damaged"))) == 1


async def test_a_budget_in_the_log_of_the_database_is_known_without_it(tmp_path):
    run, journal = {"output_dir": tmp_path / "out", "generation_id": "run"}, Journal(tmp_path)
    await journal.check()
    await journal.book(1.0, **run)
    journal.database._file.close()
    old = (tmp_path / "journal.db").read_bytes()
    await journal.book(2.0, **run)
    journal.database._file.close()
    (tmp_path / "journal.db").write_bytes(old)
    assert await Journal(tmp_path).spent(**run) == 2.0


async def test_an_answer_whose_row_a_kill_cut_off_is_no_loss(tmp_path, caplog):
    wrapped = images(tmp_path, Paid(cost=0.5))
    await wrapped.generate(request())
    wrapped._journal.database.run("UPDATE calls SET done = NULL, result = NULL, facts = NULL")
    spent = Journal(tmp_path).spent(output_dir=tmp_path / "out", generation_id="run")
    assert await spent == 0.5 and not caplog.records


async def test_copies_are_read_only_where_the_database_lacks_their_rows(tmp_path, monkeypatch):
    wrapped = images(tmp_path, Paid())
    for n in range(3):
        await wrapped.generate(request(f"s_scene_{n:02d}/v1/a1"))
    await wrapped._journal.book(1.0, output_dir=tmp_path, generation_id="other")
    read, load = [], _Row.load
    monkeypatch.setattr(_Row, "load", lambda path: read.append(path) or load(path))
    await Journal(tmp_path).check()
    assert read == []
    wrapped._journal.database.run("DELETE FROM calls WHERE slot GLOB '*_00/*'")
    await Journal(tmp_path).check()
    assert len(read) == 1


@pytest.mark.parametrize("facts", [
    """'{"seed": 7, "cost'""", "'null'", "'[]'", """'{"colour": 1}'""", "7",
    "CAST(x'ff00fe' AS TEXT)",
])  # fmt: skip
async def test_a_row_whose_facts_are_damaged_comes_from_its_copy(tmp_path, caplog, facts):
    model = Paid(seed=7, cost=0.5)
    first = await images(tmp_path, model).generate(request())
    Journal(tmp_path).database.run(f"UPDATE calls SET facts = {facts}")
    spent = Journal(tmp_path).spent(output_dir=tmp_path / "out", generation_id="run")
    assert await spent == 0.5
    assert await images(tmp_path, model).generate(request()) == first and model.calls == 1
    assert "comes from the copy" in caplog.text


@pytest.mark.parametrize("column", ["output_dir", "generation_id", "slot", "key", "facts"])
async def test_a_flipped_bit_hides_no_money_and_no_answer(tmp_path, caplog, column):
    model, run = Paid(cost=0.5), {"output_dir": tmp_path / "out", "generation_id": "run"}
    first = await images(tmp_path, model).generate(request())
    change = f"UPDATE calls SET {column} = replace({column}, '0.5', '0.1') || ' '"
    Journal(tmp_path).database.run(change)
    assert await Journal(tmp_path).spent(**run) == (1.0 if column == "key" else 0.5)
    again = await images(tmp_path, model).generate(request())
    assert again.data == first.data and model.calls == 1
    assert len(caplog.records) == (column != "facts")


LOCK = """
    import sqlite3, sys
    database = sqlite3.connect(sys.argv[1], isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def locked():
    """Locks a database from another process, until it is called again or the test ends."""
    running = []

    def lock(path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(LOCK), str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield lock
    for process in running:
        process.communicate()


async def test_an_answer_is_used_while_another_process_holds_the_journal(
    tmp_path, monkeypatch, caplog, locked
):
    class Locking(Paid):
        async def generate(self, request):
            await asyncio.to_thread(locked, tmp_path / "journal.db")
            return await super().generate(request)

    monkeypatch.setattr(database, "_BUSY", 0.2)
    wrapped = images(tmp_path, Locking())
    assert (await wrapped.generate(request())).data == b"image 1"
    (record,) = caplog.records
    assert "has an answer that is not in the journal" in record.getMessage()
    assert "locked" in record.getMessage()


async def test_another_process_is_waited_for_in_vain_once(tmp_path, monkeypatch, locked):
    waits, connect = [], sqlite3.connect

    def connecting(*args, timeout, **how):
        waits.append(timeout)
        return connect(*args, timeout=timeout, **how)

    monkeypatch.setattr(database, "_BUSY", 0.2)
    monkeypatch.setattr(database, "_BRIEF", 0.1)
    wrapped = images(tmp_path, Paid())
    await wrapped._journal.check()
    monkeypatch.setattr(sqlite3, "connect", connecting)
    holder = locked(tmp_path / "journal.db")
    for n in range(2):
        await wrapped.generate(request(f"s_scene_{n:02d}/v1/a1"))
    assert 0.1 in waits and 0.2 not in waits[waits.index(0.1) :]
    holder.communicate()
    waits.clear()
    for n in range(2, 4):
        await wrapped.generate(request(f"s_scene_{n:02d}/v1/a1"))
    assert waits[-1] == 0.2


async def test_a_lost_log_of_the_database_loses_no_answer(tmp_path, caplog):
    model, wrapped = Paid(), images(tmp_path, Paid())
    first = await wrapped.generate(request())
    wal = tmp_path / "journal.db-wal"
    assert wal.exists()
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy"))
    (copy / "journal.db-wal").write_bytes(wal.read_bytes()[:5000])
    (copy / "journal.db-shm").unlink()
    again = Journal(copy).images(model, output_dir=tmp_path / "out", generation_id="run")
    assert await again.generate(request()) == first and model.calls == 0
    assert "1 of 1 answers were saved" in caplog.text


async def test_a_row_that_is_lost_meanwhile_comes_from_its_copy(tmp_path, caplog):
    wrapped = images(tmp_path, Paid())
    first = await wrapped.generate(request())
    wrapped._journal.database.run("DELETE FROM calls")
    assert await wrapped.generate(request()) == first
    assert "comes from the copy" in caplog.text


async def test_the_inputs_of_a_model_are_part_of_what_is_asked(tmp_path):
    model = Paid()
    for guidance in (2, 9, 2):
        model.inputs = {"guidance": guidance}
        await images(tmp_path, model).generate(request())
    model.inputs = {}
    await images(tmp_path, model).generate(request())
    assert model.calls == 3


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
async def test_a_new_journal_that_another_process_is_opening_is_waited_for(tmp_path, lock):
    other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE other (x)")
    other.execute(lock)
    free = threading.Timer(0.2, other.execute, ["COMMIT"])
    free.start()
    assert (await images(tmp_path, Paid()).generate(request())).data == b"image 1"
    free.join()
    other.close()


async def test_old_parts_are_swept_and_new_ones_are_not(tmp_path):
    await images(tmp_path, Paid()).generate(request())
    names = ("old.part", ".refimg-old.tmp", "new.part", ".refimg-new.tmp")
    parts = [tmp_path / "results" / name for name in names]
    for path in parts:
        path.touch()
    for path in parts[:2]:
        os.utime(path, (0, 0))
    await images(tmp_path, Paid()).generate(request())
    assert [path.exists() for path in parts] == [False, False, True, True]


# where it is, and what it says


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMG_CACHE", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "journal" == Journal().folder
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("REFIMG_CACHE")
    assert default_folder().parts[-2:] == ("refimg", "journal")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
async def test_nobody_else_can_read_it(tmp_path):
    before = os.umask(0)
    try:
        model = images(tmp_path / "new" / "journal", Paid())
        await model.generate(request())
        reader = sqlite3.connect(tmp_path / "new" / "journal" / "journal.db")
        reader.execute("SELECT count(*) FROM calls").fetchall()
        await model.generate(request("s_scene_01/v2/a1"))
        found = [(p.name, p.is_dir(), stat.S_IMODE(p.stat().st_mode))
                 for p in (tmp_path / "new").rglob("*")]
        reader.close()
    finally:
        os.umask(before)
    folders, files = ({name: mode for name, is_folder, mode in found if is_folder is kind}
                      for kind in (True, False))
    assert folders == dict.fromkeys(["journal", "results", "rows"], 0o700)
    assert set(files.values()) == {0o600} and {"journal.db", "journal.db-wal"} <= files.keys()


async def test_no_prompt_and_no_key_is_written(tmp_path):
    secret = "sk-" + "a1" * 12
    said = [Message(role="user", content=f"a very particular heron {secret}")]
    await chat(tmp_path, FakeChat(["answer"])).reply(said, schema=Critique)
    await images(tmp_path, Paid()).generate(request(negative_prompt=said[0].content))
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"answer" in written and b"particular heron" not in written
    assert secret.encode() not in written and b"pickle" not in written


def noting(threads: set[int], inner):
    """The function, with the thread of every call put down."""
    def spy(*args):
        threads.add(threading.get_ident())
        return inner(*args)

    return spy


async def test_the_event_loop_never_touches_the_disk(tmp_path, monkeypatch):
    threads = set()
    methods = ((Database, name) for name in ("find", "begin", "note", "keep"))
    for owner, name in (*methods, (module, "_image_request")):
        monkeypatch.setattr(owner, name, noting(threads, getattr(owner, name)))
    await images(tmp_path, Remote()).generate(request())
    assert threads and threading.get_ident() not in threads


# at once


async def test_the_same_call_in_flight_is_awaited_once(tmp_path):
    model = Paid(seconds=0.05)
    calls = (images(tmp_path, model).generate(request()) for _ in range(8))
    assert {image.data for image in await asyncio.gather(*calls)} == {b"image 1"}
    assert model.calls == 1 and not module._flights


async def test_a_failure_in_flight_is_everybodys(tmp_path):
    model = Broken()
    calls = [images(tmp_path, model).generate(request()) for _ in range(4)]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(end) for end in ends] == ["503"] * 4 and model.calls == 1


async def test_if_the_first_is_cancelled_the_next_takes_over(tmp_path):
    model = Paid(seconds=0.2)
    first, second = (asyncio.create_task(images(tmp_path, model).generate(request()))
                     for _ in range(2))
    while not model.calls:
        await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).data == b"image 2" and not module._flights


async def test_a_cancelled_call_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    begun, replace = threading.Event(), os.replace

    def slowly(*paths):
        begun.set()
        time.sleep(0.05)
        replace(*paths)

    monkeypatch.setattr(os, "replace", slowly)
    call = asyncio.create_task(images(tmp_path, Paid()).generate(request()))
    await asyncio.to_thread(begun.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not [*tmp_path.rglob("*.part")]


async def test_if_one_who_waits_is_cancelled_the_first_goes_on(tmp_path):
    model = Paid(seconds=0.2)
    first, second = (asyncio.create_task(images(tmp_path, model).generate(request()))
                     for _ in range(2))
    while not model.calls:
        await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await first).data == b"image 1" and model.calls == 1


def test_threads_with_loops_of_their_own_share_one_call(tmp_path):
    model, found, gate = Paid(seconds=0.3), [], threading.Barrier(4)

    def run():
        gate.wait()
        found.append(asyncio.run(images(tmp_path, model).generate(request())).data)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"image 1"] * 4 and model.calls == 1


# predictions


class Remote(Paid):
    """A model whose predictions live on a server: `there` holds what they have become."""

    takes_call = True

    def __init__(self, there=None, die: bool = False):
        super().__init__()
        self.there, self.die, self.adopted = there or {}, die, []

    async def generate(self, request: ImageRequest, *, call: Call) -> GeneratedImage:
        self.calls += 1
        call.started(f"p-{self.calls}")
        if self.die:
            await asyncio.sleep(0.1)
            raise asyncio.CancelledError
        return GeneratedImage(data=b"new", provider_id=f"p-{self.calls}")

    async def adopt(self, prediction: str, *, call: Call | None) -> GeneratedImage | None:
        self.adopted.append(prediction)
        return self.there.get(prediction)


async def test_a_prediction_that_was_begun_is_adopted(tmp_path):
    with pytest.raises(asyncio.CancelledError):
        await images(tmp_path, Remote(die=True)).generate(request())
    later = Remote({"p-1": GeneratedImage(data=b"old", provider_id="p-1", cost=0.04)})
    for _ in range(2):
        assert (await images(tmp_path, later).generate(request())).data == b"old"
    assert later.calls == 0 and later.adopted == ["p-1"]


async def test_a_prediction_that_is_gone_is_paid_again(tmp_path):
    with pytest.raises(asyncio.CancelledError):
        await images(tmp_path, Remote(die=True)).generate(request())
    later = Remote()
    assert (await images(tmp_path, later).generate(request())).data == b"new"
    assert later.calls == 1 and later.adopted == ["p-1"]


async def test_refresh_adopts_nothing(tmp_path):
    with pytest.raises(asyncio.CancelledError):
        await images(tmp_path, Remote(die=True)).generate(request())
    later = Remote({"p-1": GeneratedImage(data=b"old")})
    assert (await images(tmp_path, later, refresh=True).generate(request())).data == b"new"
    assert later.adopted == []


async def test_a_done_call_whose_file_is_lost_is_adopted_too(tmp_path):
    await images(tmp_path, Remote()).generate(request())
    results(tmp_path)[0].unlink()
    later = Remote({"p-1": GeneratedImage(data=b"new", provider_id="p-1")})
    assert (await images(tmp_path, later).generate(request())).data == b"new"
    assert later.calls == 0


# a stage on top


async def test_generate_images_again_costs_nothing_and_gives_the_same_files(tmp_path):
    model = FakeImages()
    one, two = [
        await generate_images("a harbour", 4, output_dir=tmp_path / "out", seed=5,
                              model=images(tmp_path, model)) for _ in range(2)
    ]
    assert len(model.requests) == 4
    assert [i.sha256 for i in one] == [i.sha256 for i in two]


async def test_an_enhancement_again_costs_nothing(tmp_path):
    from refimg.enhance import enhance_prompt_iterative

    agents, ends = {"director": director(), "critic": critic(50, 60)}, []
    for _ in range(2):
        wrapped = {role: chat(tmp_path, model, role=role) for role, model in agents.items()}
        ends.append(await enhance_prompt_iterative("A keeper", max_iterations=2, **wrapped))
    assert [len(model.calls) for model in agents.values()] == [2, 2]
    assert ends[0].final_prompt == ends[1].final_prompt


async def test_the_benchmark_of_commits_sees_every_answer(tmp_path):
    took = await commit.kept(tmp_path, 12)
    assert {name: len(seconds) for name, seconds in took.items()} == {
        "ask": 12, "keep": 12, "fsync": 3}  # fmt: skip
    assert min(map(min, took.values())) > 0 and len(results(tmp_path)) == 12


# killed


CHILD = """
    import asyncio, json, os, signal, sys, time
    from pathlib import Path
    from refimg.generate import GeneratedImage, ImageRequest
    from refimg.storage import journal as module
    from refimg.storage.database import Database

    folder, point, scenes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, before=None, after=None, slot="v2"):
        inner = getattr(owner, name)
        def wrapped(*args):
            hit = name == "replace" or slot in str(args[1])
            if before and hit and COUNT(name) >= 1: before()
            result = inner(*args)
            if after and hit and COUNT(name) >= 1: after()
            return result
        setattr(owner, name, wrapped)

    counts = {}
    def COUNT(name):
        counts[name] = counts.get(name, -2) + 1  # the first answer is two files
        return counts[name] if name == "replace" else 1

    def log(kind, what):
        with (folder / "paid.log").open("a") as file:
            file.write(json.dumps([kind, what]) + "\\n"); file.flush(); os.fsync(file.fileno())

    class Model:
        name, max_references, takes_seed, takes_call = "m", 1, True, True
        async def generate(self, request, *, call):
            prediction = request.slot.replace("/", "_")
            log("paid", request.slot)
            call.started(prediction)
            await asyncio.sleep(0.02)
            if point == "running" and "v2" in request.slot: die()
            return GeneratedImage(data=f"{request.prompt} {request.seed}".encode() * 1000,
                                  seed=request.seed, provider_id=prediction)
        async def adopt(self, prediction, *, call):
            log("adopted", prediction)
            seed = int(prediction.split("_")[-2][1:])
            return GeneratedImage(data=f"a harbour {seed}".encode() * 1000, seed=seed,
                                  provider_id=prediction)

    database = Database
    if point == "before begin": around(database, "begin", before=die)
    if point == "after begin": around(database, "begin", after=die)
    if point == "before keep": around(database, "keep", before=die)
    if point == "before rename": around(os, "replace", before=die)
    if point == "after rename": around(os, "replace", after=die)
    if point == "after done": around(database, "keep", after=die)

    async def main():
        log("ready", "")
        model = module.Journal(folder / "journal").images(
            Model(), output_dir=folder, generation_id="run")
        for scene in range(1, scenes + 1):
            requests = [ImageRequest(prompt="a harbour", seed=k, slot=f"s{scene}/v{k}/a1")
                        for k in (1, 2, 3)]
            images = [await model.generate(request) for request in requests]
            for request, image in zip(requests, images):
                (folder / request.slot.replace("/", "_")).write_bytes(image.data)
        log("finished", "")

    asyncio.run(main())
"""


def child(folder: Path, point: str, scenes: int = 2, seconds: float = 300.0) -> int:
    """The exit code of a run that is killed at that point, or so many seconds after its start."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), point, str(scenes)]
    runs = log_of(folder).count(["ready", ""])
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while process.poll() is None and log_of(folder).count(["ready", ""]) == runs:
        time.sleep(0.005)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def log_of(folder: Path) -> list[list[str]]:
    path = folder / "paid.log"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def done(folder: Path) -> set[str]:
    """The slots that a killed run left as done."""
    path = folder / "journal" / "journal.db"
    if not path.exists():
        return set()
    with sqlite3.connect(path) as database:
        try:
            return {slot for (slot,) in database.execute("SELECT slot FROM calls WHERE done > 0")}
        except sqlite3.OperationalError:
            return set()


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("s*_v*_a1")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert child(folder, "none", scenes=5) == 0 and len(log_of(folder)) == 17
    return pictures(folder)


POINTS = {
    "before keep": (1, 1), "before begin": (1, 0), "after begin": (1, 0), "running": (1, 1),
    "before rename": (1, 1), "after rename": (1, 1), "after done": (2, 0),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("point", sampled(POINTS, 7))
def test_killed_at_a_point_and_run_again(tmp_path, whole, point):
    finished, adopted = POINTS[point]
    assert child(tmp_path, point) == -signal.SIGKILL
    before = done(tmp_path)
    assert len(before) == finished
    paid = len(log_of(tmp_path))
    assert child(tmp_path, "none") == 0
    later = log_of(tmp_path)[paid:]
    assert not before & {what for kind, what in later if kind == "paid"}
    assert [kind for kind, _ in later].count("adopted") == adopted
    assert len([kind for kind, _ in log_of(tmp_path) if kind == "paid"]) == 6
    assert pictures(tmp_path) == {name: whole[name] for name in whole if name[:2] in ("s1", "s2")}


@pytest.mark.all
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_any_moment_and_run_again(tmp_path, whole):
    chance, kills, longest = random.Random(5), 0, 0.2
    while len(before := done(tmp_path)) < 15:
        known = len(log_of(tmp_path))
        kills += child(tmp_path, "none", 5, chance.uniform(0.02, longest)) == -signal.SIGKILL
        longest *= 1.25
        assert not before & {what for kind, what in log_of(tmp_path)[known:] if kind == "paid"}
    assert child(tmp_path, "none", 5) == 0 and kills
    assert pictures(tmp_path) == whole


MANY = """
    import asyncio, sys
    from refimg.generate import GeneratedImage, ImageRequest
    from refimg.storage.journal import Journal

    class Model:
        name = "m"
        async def generate(self, request):
            return GeneratedImage(data=request.slot.encode())

    async def main():
        for k in range(5):
            model = Journal(sys.argv[1]).images(Model(), output_dir="o", generation_id=sys.argv[2])
            slots = [f"{sys.argv[2]}/{k}/{n}" for n in range(6)]
            asked = (model.generate(ImageRequest(prompt="p", slot=slot)) for slot in slots)
            images = await asyncio.gather(*asked)
            assert [image.data.decode() for image in images] == slots

    asyncio.run(main())
"""


@pytest.mark.all
def test_processes_share_a_journal(tmp_path):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(MANY), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([*command, f"run{n}"], cwd=ROOT, env=env) for n in range(6)]
    assert [process.wait(300) for process in running] == [0] * 6
    with sqlite3.connect(tmp_path / "journal.db") as database:
        assert database.execute("SELECT count(*) FROM calls WHERE done > 0").fetchone() == (180,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_process_may_use_it(tmp_path):
    own = Journal(tmp_path)
    run = {"output_dir": tmp_path, "generation_id": "run"}
    await own.images(Paid(), **run).generate(request())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            own.database.run("UPDATE calls SET prediction = 'child'")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert own.database.run("SELECT prediction FROM calls") == [("child",)]
