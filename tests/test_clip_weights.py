"""Fetching: a server that stands for the hub and breaks off, stalls, lies; what is left on disk."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import pytest
import stamina

from refimg.adapters.clip import ClipScore, PickScore
from refimg.adapters.towers import load_open_clip
from refimg.adapters.weights import (
    HEADS,
    OPENAI_L14,
    PICKSCORE,
    Checkpoint,
    Folder,
    WebFile,
    is_sound,
    is_whole,
    missing,
)
from refimg.score import Batch

from .clips import picture, register, tiny_open_clip, tiny_transformers
from .sampling import sampled

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Serves files as the hub does; `faults[name]` are played one a GET, then all is well."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.gets, self.heads = files, {}, [], []
        self.commits: dict[str, str] = {}  # of a file that is of another commit than the rest
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                if "/api/" not in self.path:
                    hub.heads.append(self.path)
                hub.answer(self, body=False)

            def do_GET(self):
                if "/api/" not in self.path:
                    hub.gets.append(self.path.rpartition("/")[2])
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request, body: bool) -> None:
        found = re.fullmatch(r"/(?:[\w.-]+/[\w.-]+/resolve/[\w.]+/)?([\w.%+-]+)", request.path)
        name = found[1] if found else ""
        fault = self.faults[name].pop(0) if body and self.faults.get(name) else ""
        if fault == "503" or name not in self.files:
            request.send_response(503 if fault else 404)
            request.send_header("X-Error-Code", "" if fault else "EntryNotFound")
            request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = self.files[name]
        etag = hashlib.sha256(data).hexdigest() if len(data) > 5000 else git_name(data)
        first = int(re.findall(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))[0])
        request.send_response(206 if first else 200)
        if first:
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        commit = self.commits.get(name, COMMIT)
        for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes",
                           "Content-Length": len(data) - first}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if body:
            self.send(request, data[first:], fault)

    def send(self, request, data: bytes, fault: str) -> None:
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        half = len(data) // 2
        request.wfile.write(data[:half])
        if fault == "cut":
            request.close_connection = True
            return
        if fault == "slow":
            request.wfile.flush()
            time.sleep(0.3)
        request.wfile.write(data[half:])


@pytest.fixture
def online(monkeypatch, tmp_path):
    """An empty cache of its own, downloads allowed; a function that opens a hub."""
    from huggingface_hub import constants

    hubs: list[Hub] = []

    def start(files: dict[str, bytes]) -> Hub:
        hubs.append(Hub(files))
        url = hubs[-1].url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hubs[-1]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(stamina, "retry_context", quick(stamina.retry_context))
    yield start
    for hub in hubs:
        hub.server.shutdown()


def quick(retry):
    """The same retries without their pauses."""
    return lambda **options: retry(**options, wait_initial=0.0, wait_max=0.0, wait_jitter=0.0)


@pytest.fixture
def hub(online):
    """A hub with the tiny CLIP of transformers in the place of PickScore."""
    return online({p.name: p.read_bytes() for p in tiny_transformers().iterdir()})


class Terminal(io.StringIO):
    """A stream that says it is a terminal: bars are drawn on nothing else."""

    def isatty(self) -> bool:
        return True


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix in (".incomplete", ".tmp")]


def score(scorer):
    return scorer.score(Batch((picture(1),), "a fox"))[0]


def test_pickscore_is_fetched_once_checked_and_scores(hub, tmp_path):
    scorer = PickScore(device="cpu")
    assert score(scorer).value is None and "3.94 GB" in score(scorer).note and not hub.gets
    scorer.fetch()
    assert scorer.missing() is None
    assert score(scorer).value == score(PickScore(tiny_transformers(), device="cpu")).value
    assert set(hub.gets) == set(hub.files) - {"processor_config.json"}
    assert all(f"/{PICKSCORE.revision}/" in path for path in hub.heads)
    count = len(hub.gets) + len(hub.heads)
    scorer.fetch()
    PickScore().fetch()
    assert len(hub.gets) + len(hub.heads) == count, "the network was asked for files that are here"
    assert not leftovers(tmp_path)


def test_a_bar_shows_a_download_in_a_terminal_and_only_there(hub, monkeypatch):
    file = web_file(hub, b"x" * 100_000)
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        PickScore().fetch()
        file.fetch()
        for name in ("head.pth", "model.safetensors"):
            assert (name in stream.getvalue()) is stream.isatty()
        file.place().unlink()
        (PICKSCORE.here() / "model.safetensors").resolve().unlink()


@pytest.mark.parametrize("faults", sampled(
    [["cut", "flip"], ["cut"], ["503"], ["cut", "cut"], ["slow"], ["flip"]], 6))
def test_a_download_that_goes_wrong_is_mended(hub, faults, tmp_path):
    hub.faults["model.safetensors"] = list(faults)
    scorer = PickScore(device="cpu")
    scorer.fetch()
    assert not hub.faults["model.safetensors"], "the fault was not played"
    assert scorer.missing() is None and is_sound(scorer.source.here() / "model.safetensors")
    assert not leftovers(tmp_path)
    wanted = score(PickScore(tiny_transformers(), device="cpu")).value
    assert score(scorer).value == wanted


def test_what_is_wrong_twice_is_deleted_and_said(hub, tmp_path):
    hub.faults["model.safetensors"] = ["flip"] * 9
    with pytest.raises(OSError, match=r"model\.safetensors arrived damaged twice"):
        PickScore().fetch()
    assert not any(path.is_file() for path in tmp_path.rglob("model.safetensors"))
    hub.faults.clear()
    PickScore().fetch()
    assert PickScore().missing() is None


@pytest.mark.parametrize(("name", "harm"), sampled(
    product(["model.safetensors", "config.json"], ["cut", "flip", "empty", "gone"]), 3))
def test_a_file_that_was_damaged_later_is_replaced(hub, name, harm):
    PickScore().fetch()
    blob = (PICKSCORE.here() / name).resolve()
    data = blob.read_bytes()
    if harm == "gone":
        blob.unlink()
    else:
        blob.write_bytes({"cut": data[:-7], "flip": data[:-1] + b"\0", "empty": b""}[harm])
    if harm in ("empty", "gone") or (harm == "cut" and name == "model.safetensors"):
        assert "not whole" in PickScore().missing()
    hub.gets.clear()
    PickScore().fetch()
    assert name in hub.gets and (PICKSCORE.here() / name).read_bytes() == data


def test_no_network_and_no_repository_are_said(hub, online, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(OSError, match=r"PickScore_v1: tokenizer_config\.json was not fetched"):
        PickScore().fetch()
    online({"config.json": b"{}"})
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        PickScore().fetch()


def test_offline_nothing_is_asked_for(hub, monkeypatch):
    from huggingface_hub import constants

    PickScore().fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.server.shutdown()
    hub.server.server_close()
    PickScore().fetch()
    assert score(PickScore(device="cpu")).value is not None
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        ClipScore().fetch()


def test_a_checkpoint_by_name_prefers_safetensors_and_records_the_commit(online):
    data = (tiny_open_clip() / "open_clip_model.safetensors").read_bytes()
    online({"open_clip_model.safetensors": data, "open_clip_pytorch_model.bin": b"never"})
    assert ClipScore(view="center").model == f"{OPENAI_L14.name}@main"
    ClipScore().fetch()
    assert ClipScore(view="center").model == f"{OPENAI_L14.name}@{COMMIT}"
    assert [path.name for path in OPENAI_L14.here().iterdir()] == ["open_clip_model.safetensors"]


def test_a_checkpoint_that_is_only_a_pickle_is_read_for_its_numbers(online, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    name = register(monkeypatch, "tiny-quickgelu")
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(load_file(tiny_open_clip() / "open_clip_model.safetensors"), file)
    online({file.name: file.read_bytes()})
    scorer = ClipScore(name, "tiny", device="cpu")
    scorer.fetch()
    assert score(scorer).value == score(ClipScore(tiny_open_clip(), device="cpu")).value
    torch.save({"a": Path("x")}, file)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_open_clip(tmp_path, name, "tiny")


def web_file(hub: Hub, data: bytes) -> WebFile:
    hub.files["head.pth"] = data
    return WebFile(f"{hub.url}/head.pth", hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("faults", [[], ["cut"], ["503"], ["flip", "cut"], ["slow"]])
def test_the_head_is_fetched_whatever_happens_on_the_way(hub, faults, tmp_path):
    file = web_file(hub, bytes(range(256)) * 400)
    hub.faults["head.pth"] = list(faults)
    assert file.here() is None
    assert file.fetch() == file.here() == file.place()
    assert file.place().read_bytes() == hub.files["head.pth"]
    assert len(hub.gets) == len([f for f in faults if f != "slow"]) + 1
    file.fetch()
    assert len(hub.gets) == len([f for f in faults if f != "slow"]) + 1
    assert not leftovers(tmp_path)


def test_a_head_that_is_another_file_is_never_kept(hub, tmp_path):
    file = web_file(hub, b"x" * 1000)
    hub.files["head.pth"] = b"y" * 1000
    with pytest.raises(OSError, match="is not the file with sha256"):
        file.fetch()
    assert len(hub.gets) == 3 and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_head_that_was_damaged_later_is_replaced(hub):
    file = web_file(hub, b"x" * 1000)
    file.fetch()
    file.place().write_bytes(b"z" * 1000)
    assert "not whole" in missing("aesthetic", file)
    assert file.fetch().read_bytes() == b"x" * 1000


def test_the_known_heads_are_those_of_the_facts():
    assert HEADS["v2"].sha256.startswith("21dd590f3ccdc646")
    assert HEADS["v2"].name == "sac+logos+ava1-l14-linearMSE.pth"
    for head in HEADS.values():
        assert re.search(r"/[0-9a-f]{40}/", head.url), "not pinned to a commit"


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, b"{}", bytes(500)])
def test_what_is_no_safetensors_file_is_not_whole(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert not is_whole(path)
    assert not is_whole(tmp_path) and not is_whole(tmp_path / "absent")


def test_every_cut_of_a_pickle_is_seen(tmp_path):
    import torch

    torch.save({"a": torch.ones(3000)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    assert is_whole(tmp_path / "a.pth")
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "b.pth").write_bytes(data[: int(share * len(data))])
        assert not is_whole(tmp_path / "b.pth")


def test_a_folder_of_the_hubs_cache_has_the_checksum_for_free(hub):
    PickScore().fetch()
    folder = Folder(PICKSCORE.here(), PICKSCORE.needs)
    digest = hashlib.sha256((folder.path / "model.safetensors").read_bytes()).hexdigest()
    assert folder.version() == f"sha256:{digest[:12]}"
    assert Folder(Path("absent"), PICKSCORE.needs).version() == "incomplete"


def test_revisions_are_told_apart(online, tmp_path):
    online({"model.bin": b"", "model.safetensors": b"\x02" + bytes(7) + b"{}"})
    one = Checkpoint("a/b", "main", (("model.safetensors",),))
    one.fetch()
    assert one.here() and Checkpoint("a/b", "f" * 40, one.needs).here() is None


def test_a_branch_that_moves_between_two_downloads_is_fetched_again(online):
    hub = online({"config.json": b"{}", "merges.txt": b"a b"})
    hub.commits["config.json"] = "e" * 40
    moving = Checkpoint("a/b", "main", (("config.json",), ("merges.txt",)))
    with pytest.raises(OSError, match="changed meanwhile: fetch"):
        moving.fetch()
    hub.commits.clear()
    assert moving.fetch() == moving.here()


def test_files_that_go_between_two_looks_are_said_to_be_gone(tmp_path, monkeypatch):
    scorer = PickScore(tiny_transformers(), device="cpu")
    monkeypatch.setattr(type(scorer.source), "here", lambda self: None)
    monkeypatch.setattr(scorer, "missing", lambda: None)
    with pytest.raises(ValueError, match="are gone: fetch"):
        scorer.embedder()
