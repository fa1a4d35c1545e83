"""The trace tree: one run at a time, nobody else's files, no link followed, nothing left behind."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from refimg.storage.traces import TraceTree, write_trace
from tests.sampling import sampled

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run" / "images"


@pytest.fixture
def root(output):
    return output.parent / "reference_image_traces"


def snapshot(folder: Path) -> dict[str, str]:
    """Every entry below a folder with its kind and content, links unfollowed."""

    def describe(path: Path) -> str:
        if path.is_symlink():
            return f"link to {os.readlink(path)}"
        return "folder" if path.is_dir() else path.read_text("utf-8", "replace")

    return {str(p.relative_to(folder)): describe(p) for p in sorted(folder.rglob("*"))}


HOLDER = """
import sys, time
from refimg.storage.traces import TraceTree, write_trace
tree = TraceTree.open(sys.argv[1], sys.argv[2])
write_trace(tree.scene(1), "00_original_prompt.txt", "of the killed run")
print("held", flush=True)
sys.stdin.readline()
tree.close()
"""


@pytest.fixture
def hold(output):
    """Starts processes that hold a tree; whatever still runs at the end is killed by its id."""
    started = []

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(output), name]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        started.append(subprocess.Popen(command, cwd=REPOSITORY, **pipes))
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_nothing_is_left_after_a_run(output, root):
    tree = TraceTree.open(output, "a")
    assert tree.path == root / "a"
    write_trace(tree.scene(12), "00_original_prompt.txt", "p")
    assert tree.scene(12) == root / "a" / "scene_12"
    tree.close()
    assert list(output.parent.iterdir()) == []


def test_the_folder_lies_beside_the_resolved_output(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    tree = TraceTree.open(tmp_path / "link" / "images", "a")
    assert tree.path == tmp_path / "real" / "reference_image_traces" / "a"
    tree.close()


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a\n", "a" * 65])
def test_hostile_ids_touch_nothing(output, name):
    with pytest.raises(ValueError, match="generation_id must be"):
        TraceTree.open(output, name)
    assert not output.parent.exists()


def test_the_marker_names_refimg(output):
    tree = TraceTree.open(output, "a")
    assert any("refimg" in p.read_text() for p in tree.path.iterdir() if p.is_file())
    tree.close()


def test_kept_traces_stay_and_the_next_run_of_that_name_starts_empty(output, root):
    tree = TraceTree.open(output, "a")
    write_trace(tree.scene(1), "x.txt", "kept")
    tree.close(keep=True)
    assert (root / "a" / "scene_1" / "x.txt").read_text() == "kept"
    again = TraceTree.open(output, "a")
    assert not (root / "a" / "scene_1").exists()
    again.close()
    assert not root.exists()


def test_close_is_idempotent_and_works_from_another_thread(output, root):
    tree = TraceTree.open(output, "a")
    worker = threading.Thread(target=tree.close)
    worker.start()
    worker.join()
    assert not root.exists()
    later = TraceTree.open(output, "a")
    tree.close()
    tree.close(keep=True)
    assert later.path.is_dir()
    with pytest.raises(ValueError, match="live run"):
        TraceTree.open(output, "a")
    later.close()


# Live and dead holders


def test_a_live_process_is_respected(output, root, hold):
    process = hold("a")
    before = snapshot(root)
    with pytest.raises(ValueError, match="not in use by a live run, got 'a'"):
        TraceTree.open(output, "a")
    assert snapshot(root) == before
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    assert not root.exists()


def test_a_killed_process_is_taken_over(output, root, hold):
    process = hold("a")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (root / "a" / "scene_1" / "00_original_prompt.txt").exists()
    tree = TraceTree.open(output, "a")
    assert not (root / "a" / "scene_1").exists()
    tree.close()
    assert list(output.parent.iterdir()) == []


DYING = """
import os, shutil, sys
from refimg.storage import traces
tree = traces.TraceTree.open(sys.argv[1], "a")
traces.write_trace(tree.scene(1), "x.txt", "x")
die = lambda *_, **__: os.kill(os.getpid(), 9)
{patch}
tree.close()
"""


@pytest.mark.parametrize("patch", sampled(["os.rename = die", "shutil.rmtree = die"], 2))
def test_a_run_killed_while_closing_blocks_and_leaves_nothing(output, patch):
    command = [sys.executable, "-c", DYING.format(patch=patch), str(output)]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -9
    TraceTree.open(output, "a").close()
    assert list(output.parent.iterdir()) == []


OPENING = """
import os, sys
from refimg.storage import traces
os.rename = lambda *_: os.kill(os.getpid(), 9)
traces.TraceTree.open(sys.argv[1], "a")
"""


def test_a_run_killed_while_opening_blocks_and_leaves_nothing(output):
    command = [sys.executable, "-c", OPENING, str(output)]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -9
    TraceTree.open(output, "a").close()
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("foreign", [
    None, "notes.md", "scene_1/photo.png", "scene_1/more/x_trace.json", "pictures/00_a.txt",
])  # fmt: skip
def test_a_tree_whose_marker_was_cut_off_is_taken_over_where_all_is_ours(output, root, foreign):
    tree = TraceTree.open(output, "a")
    for name in ("00_original_prompt.txt", "final_enhanced_prompt.txt", "generation_trace.json"):
        write_trace(tree.scene(1), name, "x")
    tree.close(keep=True)
    (root / "a" / ".refimg-trace").write_bytes(b"")
    if foreign:
        (root / "a" / foreign).parent.mkdir(exist_ok=True)
        (root / "a" / foreign).write_text("precious")
        before = snapshot(root)
        with pytest.raises(ValueError, match="was not made by refimg"):
            TraceTree.open(output, "a")
        assert snapshot(root) == before
    else:
        TraceTree.open(output, "a").close()
        assert not root.exists()


def test_what_other_names_left_half_removed_goes_after_an_hour(output, root):
    young, old = (root / f".refimg-{name}-0123456789abcdef" for name in ("young", "old"))
    for path in (young, old):
        path.mkdir(parents=True)
    (old / "x.txt").write_text("x")
    an_hour_ago = time.time() - 3700
    os.utime(old, (an_hour_ago, an_hour_ago))
    TraceTree.open(output, "a").close()
    assert list(root.iterdir()) == [young]


def test_of_many_at_once_exactly_one_gets_the_name(output, root):
    barrier = threading.Barrier(8)

    def attempt(_: int) -> TraceTree | None:
        barrier.wait()
        try:
            return TraceTree.open(output, "a")
        except ValueError:
            return None

    for _ in range(15):
        with ThreadPoolExecutor(8) as pool:
            (winner,) = [tree for tree in pool.map(attempt, range(8)) if tree]
        assert [name for name in os.listdir(root) if not name.startswith(".")] == ["a"]
        winner.close()
        assert not root.exists()


def test_runs_of_other_names_come_and_go_at_the_same_time(output, root):
    barrier = threading.Barrier(6)

    def live(k: int) -> None:
        barrier.wait()
        for turn in range(25):
            tree = TraceTree.open(output, f"run-{k}")
            write_trace(tree.scene(1), "x.json", {"turn": turn})
            assert json.loads((tree.scene(1) / "x.json").read_text()) == {"turn": turn}
            tree.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(live, range(6)))
    assert not root.exists()


def test_runs_of_one_name_come_and_go_at_the_same_time(output, root):
    barrier, inside, most = threading.Barrier(6), [], []

    def live(k: int) -> int:
        barrier.wait()
        won = 0
        for _ in range(40):
            with suppress(ValueError):
                tree = TraceTree.open(output, "a")
                inside.append(k)
                most.append(len(inside))
                assert tree.scene(1).is_dir()
                inside.remove(k)
                tree.close()
                won += 1
        return won

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(live, range(6))) > 0
    assert set(most) == {1}
    TraceTree.open(output, "a").close()
    assert list(output.parent.iterdir()) == []


def test_the_common_parent_stays_while_another_run_lives(output, root):
    first, second = TraceTree.open(output, "a"), TraceTree.open(output, "a-b")
    first.close()
    assert second.scene(1).is_dir()
    second.close()
    assert not root.exists()


# What is not ours


def plant(kind: str, at: Path, elsewhere: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        at.mkdir()
    elif kind == "full folder":
        (at / "scene_1").mkdir(parents=True)
        (at / "scene_1" / "thesis.txt").write_text("years of work")
    elif kind == "file":
        at.write_text("years of work")
    elif kind == "link":
        at.symlink_to(elsewhere, target_is_directory=True)
    elif kind == "dangling link":
        at.symlink_to(elsewhere / "nowhere")
    elif kind == "forged marker":
        at.mkdir()
        (at / ".refimg-trace").write_text("something else")
    elif kind == "linked marker":
        at.mkdir()
        (elsewhere / "marker").write_text("refimg trace tree")
        (at / ".refimg-trace").symlink_to(elsewhere / "marker")
    elif kind == "marker is a folder":
        (at / ".refimg-trace").mkdir(parents=True)
    elif kind == "marker is a pipe":
        at.mkdir()
        os.mkfifo(at / ".refimg-trace")


KINDS = ["folder", "full folder", "file", "link", "dangling link", "forged marker"]
KINDS += ["linked marker", "marker is a folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_trees_are_refused_untouched(kind, output, root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "scene_1").mkdir(parents=True)
    (elsewhere / "scene_1" / "thesis.txt").write_text("years of work")
    plant(kind, root / "a", elsewhere)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="left alone"):
        TraceTree.open(output, "a")
    assert snapshot(tmp_path) == before


def test_a_pipe_as_marker_does_not_hang(output, root, tmp_path):
    plant("marker is a pipe", root / "a", tmp_path)
    with pytest.raises(ValueError, match="left alone"):
        TraceTree.open(output, "a")


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_a_common_parent_that_is_no_folder_is_refused(kind, output, root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "a").mkdir(parents=True)
    (elsewhere / "a" / ".refimg-trace").write_text("refimg trace tree")
    (elsewhere / "a" / "thesis.txt").write_text("years of work")
    plant(kind, root, elsewhere)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="got a link or a file"):
        TraceTree.open(output, "a")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["scene_1", "scene_1/00_original_prompt.txt", ".hidden"])
def test_a_link_inside_a_dead_tree_is_refused_untouched(place, output, root, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    (root / "a").mkdir(parents=True)
    (root / "a" / ".refimg-trace").write_text("refimg trace tree")
    (root / "a" / place).parent.mkdir(exist_ok=True)
    (root / "a" / place).symlink_to(outside)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="contains a link"):
        TraceTree.open(output, "a")
    assert snapshot(tmp_path) == before


def test_closing_removes_links_and_never_what_they_point_to(output, root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("years of work")
    tree = TraceTree.open(output, "a")
    (tree.scene(1) / "folder").symlink_to(outside, target_is_directory=True)
    (tree.scene(1) / "file").symlink_to(outside / "thesis.txt")
    (tree.path / "scene_2").symlink_to(outside, target_is_directory=True)
    with pytest.raises(ValueError, match="link or a file"):
        tree.scene(2)
    tree.close()
    assert not root.exists()
    assert snapshot(outside) == {"thesis.txt": "years of work"}


@pytest.mark.parametrize("kind", ["full folder", "file", "link"])
def test_what_replaced_the_tree_during_the_run_is_left_alone(kind, output, root, tmp_path):
    outside = tmp_path / "outside"
    tree = TraceTree.open(output, "a")
    os.rename(tree.path, outside)
    plant(kind, root / "a", outside)
    before = snapshot(root / "a") if kind != "link" else os.readlink(root / "a")
    tree.close()
    assert before == (snapshot(root / "a") if kind != "link" else os.readlink(root / "a"))
    assert os.listdir(root) == ["a"]
    TraceTree.open(output, "b").close()


def test_a_tree_deleted_by_hand_is_no_error_at_the_end(output, root):
    tree = TraceTree.open(output, "a")
    for path in tree.path.iterdir():
        path.unlink()
    tree.path.rmdir()
    tree.close()
    assert not root.exists()


def test_the_name_stays_taken_when_the_tree_is_moved_away(output, root):
    tree = TraceTree.open(output, "a")
    os.rename(tree.path, output.parent / "moved")
    with pytest.raises(ValueError, match="live run"):
        TraceTree.open(output, "a")
    tree.close()
    assert not root.exists()


def test_another_run_may_own_the_name_after_everything_was_deleted_by_hand(output, root):
    first = TraceTree.open(output, "a")
    shutil.rmtree(root)
    second = TraceTree.open(output, "a")
    write_trace(second.scene(1), "x.txt", "of the second run")
    before = snapshot(root)
    first.close()
    assert snapshot(root) == before
    second.close()
    assert not root.exists()


def test_a_linked_lock_is_not_followed(output, root, tmp_path):
    root.mkdir(parents=True)
    (tmp_path / "outside").write_text("years of work")
    (root / ".refimg-a.lock").symlink_to(tmp_path / "outside")
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, OSError)):
        TraceTree.open(output, "a")
    assert snapshot(tmp_path) == before


# Files of a trace


def test_texts_and_json_are_utf8_and_keep_no_surrogate(tmp_path):
    write_trace(tmp_path, "a.txt", "東京 \ud83d")
    write_trace(tmp_path, "b.json", {"é": ["\ud800", {"path": Path("x")}], "none": None})
    assert (tmp_path / "a.txt").read_bytes() == "東京 \ufffd".encode()
    text = (tmp_path / "b.json").read_text("utf-8")
    assert text.startswith('{\n  "é": [')
    assert json.loads(text) == {"é": ["\ufffd", {"path": "x"}], "none": None}


def test_a_trace_is_replaced_whole_and_leaves_no_temporary_file(tmp_path):
    for k in range(3):
        write_trace(tmp_path, "a.txt", f"{k}" * 10_000)
    assert snapshot(tmp_path) == {"a.txt": "2" * 10_000}


def test_a_trace_never_writes_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    (tmp_path / "a.txt").symlink_to(outside)
    write_trace(tmp_path, "a.txt", "trace")
    assert outside.read_text() == "years of work"
    assert (tmp_path / "a.txt").read_text() == "trace"


def test_no_folder_means_no_trace(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_trace(None, "a.txt", "x")
    assert list(tmp_path.iterdir()) == []
    assert caplog.records == []


@pytest.mark.parametrize("broken", ["missing", "file", "occupied"])
def test_what_cannot_be_written_is_a_warning(broken, tmp_path, caplog):
    folder = tmp_path / "folder"
    if broken == "file":
        folder.write_text("x")
    elif broken == "occupied":
        (folder / "a.txt").mkdir(parents=True)
    with caplog.at_level(logging.INFO, "refimg"):
        write_trace(folder, "a.txt", "x")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a.txt" in caplog.text
    assert not list(tmp_path.rglob(".refimg-*"))
