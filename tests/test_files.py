"""Names, pictures out and numbers, where the names are hostile and the writers many."""

import contextlib
import errno
import io
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from refimg.storage import files, images
from refimg.storage.files import (
    check_id,
    check_stem,
    clean_text,
    decode_image,
    encode_png,
    read_image,
    save_numbered,
)
from tests.fakes import picture

HOSTILE = [
    "",
    ".",
    "..",
    "a/b",
    "a\\b",
    "/etc",
    "a\n",
    "\na",
    "a b",
    "a\0",
    "\0",
    ".hidden",
    "-rf",
    "_a",
    "~root",
    "$HOME",
    "C:",
    "café",
    "ａ",
    "１",
    "東京",
    "a\u202e",
    "a\ud800",
    None,
    7,
    b"abc",
    Path("abc"),
]


@pytest.mark.parametrize("name", [*HOSTILE, "a" * 65], ids=ascii)
def test_hostile_ids_are_refused_with_field_value_and_rule(name):
    with pytest.raises(ValueError) as refusal:
        check_id(name)
    assert "generation_id must be" in str(refusal.value)
    assert f"got {name!r:.120}" in str(refusal.value)
    assert "{0,63}" in str(refusal.value)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "a..", "A.b_c-D", "20261123T1200"])
def test_ordinary_ids_pass_unchanged(name):
    assert check_id(name) == name


@pytest.mark.parametrize("stem", [*HOSTILE, "a" * 201], ids=ascii)
def test_hostile_stems_write_nothing(stem, tmp_path):
    with pytest.raises(ValueError, match="stem must be"):
        check_stem(stem)
    with pytest.raises(ValueError, match="stem must be"):
        save_numbered(b"x", tmp_path / "new", stem)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_stem_fits_a_file_name(tmp_path):
    assert save_numbered(b"x", tmp_path, "a" * 200, first=10_000).read_bytes() == b"x"


# Texts and PNG


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    at, found = 8, []
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += size + 12
    return found


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a\0b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("x\udc80\udc81y", "x\ufffd\ufffdy"),
        ("\ud83d\ude00", "😀"),
        ("e\u0301 \u202e עברית 東京 👩‍👩‍👧", "e\u0301 \u202e עברית 東京 👩‍👩‍👧"),
        ("line\r\nline\ttab", "line\r\nline\ttab"),
        ("", ""),
        ("é" * 10_000, "é" * 10_000),
        ("𝕏" * 10_000, "𝕏" * 10_000),
    ],
    ids=ascii,
)
def test_any_prompt_fits_a_png(given, kept):
    png = encode_png(Image.new("RGB", (3, 2)), {"prompt": given})
    read = Image.open(io.BytesIO(png))
    read.load()
    assert read.text == {"prompt": kept}
    assert [name for name, _ in chunks(png)].count(b"iTXt") == 1


def test_clean_text_is_idempotent_and_leaves_good_text_alone():
    for text in ("plain", "\ud83d", "😀\ude00", "東京\0"):
        once = clean_text(text)
        assert clean_text(once) == once
        assert once.encode("utf-8").decode("utf-8") == once
    assert clean_text("東京\0😀") == "東京\0😀"


def test_a_png_says_nothing_but_pixels_and_text():
    source = Image.new("RGB", (3, 2), "teal")
    source.info = {"icc_profile": b"p", "dpi": (72, 72), "exif": b"Exif\0\0", "gamma": 0.4}
    png = encode_png(source, {"model": "m"})
    assert {name for name, _ in chunks(png)} == {b"IHDR", b"iTXt", b"IDAT", b"IEND"}
    assert source.info["dpi"] == (72, 72)


def test_the_same_picture_gives_the_same_bytes_in_any_order_of_work():
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: encode_png(image, {"a": "1", "b": "2"}), range(12)))
    assert len(made) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_any_mode_becomes_an_rgb_png(mode):
    png = encode_png(Image.new(mode, (3, 2)), {})
    assert Image.open(io.BytesIO(png)).mode == "RGB"


def test_pixels_survive_exactly():
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    assert decode_image(encode_png(image, {})).tobytes() == image.tobytes()


def test_the_truth_goes_through_png_and_nothing_longer_does():
    image = Image.new("RGB", (3, 2))
    image.info["refimg-truth"] = '{"painter": 1, "attributes": {"colour": "rød"}}'
    assert decode_image(encode_png(image, {"prompt": "p"})).info == image.info
    image.info["refimg-truth"] = "x" * 4097
    assert decode_image(encode_png(image, {})).info == {}


# Numbers


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_many(folder: Path, writer: int, number: int) -> list[Path]:
    return [save_numbered(f"{writer}/{k}".encode(), folder, "s") for k in range(number)]


def test_threads_lose_and_overwrite_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        lists = list(pool.map(lambda writer: save_many(tmp_path, writer, 25), range(8)))
    assert sorted(p.name for paths in lists for p in paths) == sorted(
        f"s_v{k}.png" for k in range(1, 201)
    )
    assert sorted(written(tmp_path).values()) == sorted(
        f"{w}/{k}".encode() for w in range(8) for k in range(25)
    )
    for writer, paths in enumerate(lists):
        assert [p.read_bytes() for p in paths] == [f"{writer}/{k}".encode() for k in range(25)]


WRITER = """
import sys
from pathlib import Path
from tests.test_files import save_many
print("ready", flush=True)
sys.stdin.readline()
save_many(Path(sys.argv[1]), int(sys.argv[2]), 20)
"""


@pytest.mark.all
def test_processes_lose_and_overwrite_nothing(tmp_path):
    def start(writer: int) -> subprocess.Popen:
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(writer)]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes)

    running = [start(writer) for writer in range(3)]
    for process in running:
        assert process.stdout.readline() == b"ready\n"
    for process in running:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait(60) for process in running] == [0, 0, 0]
    for process in running:
        process.stdin.close()
        process.stdout.close()
    assert set(written(tmp_path)) == {f"s_v{k}.png" for k in range(1, 61)}
    assert len(set(written(tmp_path).values())) == 60


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK])
def no_links(request, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


def test_a_file_system_without_hard_links_keeps_the_promise(tmp_path, no_links):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda writer: save_many(tmp_path, writer, 5), range(8)))
    assert set(written(tmp_path)) == {f"s_v{k}.png" for k in range(1, 41)}
    assert len(set(written(tmp_path).values())) == 40


def test_without_links_a_failed_write_gives_the_number_back(tmp_path, no_links, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_numbered(b"x", tmp_path, "s")
    assert written(tmp_path) == {}


def test_gaps_are_filled_from_the_first_allowed_number(tmp_path):
    for k in (1, 2, 4):
        (tmp_path / f"s_v{k}.png").write_bytes(b"old")
    names = [save_numbered(b"new", tmp_path, "s").name for _ in range(3)]
    assert names == ["s_v3.png", "s_v5.png", "s_v6.png"]
    assert save_numbered(b"new", tmp_path, "s", first=9).name == "s_v9.png"
    assert [(tmp_path / f"s_v{k}.png").read_bytes() for k in (1, 2, 4)] == [b"old"] * 3


@pytest.mark.parametrize("links", [True, False])
def test_folders_and_links_in_the_way_are_stepped_over(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    folder, outside = tmp_path / "pictures", tmp_path / "outside"
    folder.mkdir()
    outside.write_bytes(b"precious")
    (folder / "s_v1.png").mkdir()
    (folder / "s_v2.png").symlink_to(outside)
    (folder / "s_v3.png").symlink_to(tmp_path / "nowhere")
    assert save_numbered(b"new", folder, "s").name == "s_v4.png"
    assert outside.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_old_temporary_files_go_and_young_ones_and_others_stay(tmp_path):
    old = time.time() - 3700
    for name in (".refimg-dead.tmp", ".refimg-young.tmp", ".other-old", "refimg-old"):
        (tmp_path / name).write_bytes(b"")
        if "young" not in name:
            os.utime(tmp_path / name, (old, old))
    (tmp_path / ".refimg-folder").mkdir()
    os.utime(tmp_path / ".refimg-folder", (old, old))
    save_numbered(b"x", tmp_path, "s")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".refimg-young.tmp", ".other-old", "refimg-old", ".refimg-folder", "s_v1.png"}


def dead_process() -> int:
    """The number of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(os.name != "posix", reason="elsewhere only the age counts")
@pytest.mark.parametrize("whose, goes", [
    ("dead", True), ("own", False), ("living", False), ("elsewhere", False),
    ("other namespace", False), ("odd name", False),
])  # fmt: skip
def test_what_a_dead_process_left_is_swept_at_once(tmp_path, whose, goes):
    here, number = files._system(os.getpid()), dead_process()
    space = here.partition("-")[2]
    name = {
        "dead": f"{here}-{number}", "own": f"{here}-{os.getpid()}", "living": f"{here}-1",
        "elsewhere": f"{int(here[:8], 16) ^ 1:08x}-{space}-{number}",
        "other namespace": f"{here}1-{number}", "odd name": f"{here}-{number}-x",
    }[whose]  # fmt: skip
    young, old = (tmp_path / f".refimg-{name}-{k * 16}.tmp" for k in "0a")
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    files.sweep_temporary(tmp_path, ".refimg-*")
    assert [path.exists() for path in (young, old)] == [not goes, False]


@pytest.mark.parametrize("call", ["fsync", "open", "mkdir"])
def test_an_image_is_written_though_the_disk_fails_once(tmp_path, monkeypatch, call):
    inner, failed = getattr(os, call), []

    def once(*args, **how):
        if not failed:
            failed.append(call)
            raise OSError(5, "Input/output error")
        return inner(*args, **how)

    monkeypatch.setattr(os, call, once)
    made = save_numbered(b"x", tmp_path / "new" / "folder", "s")
    assert failed and made.read_bytes() == b"x" and list(made.parent.iterdir()) == [made]


def test_an_image_is_on_the_disk_before_its_name_counts(tmp_path, monkeypatch):
    told, inner = [], {name: getattr(os, name) for name in ("fsync", "link")}

    def fsync(number):
        told.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        inner["fsync"](number)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", lambda *paths: told.append("name") or inner["link"](*paths))
    save_numbered(b"x", tmp_path, "s")
    assert told == ["file", "name", "folder"]


@pytest.mark.parametrize("number, raises", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_drive_that_cannot_sync_a_folder_is_no_error(tmp_path, monkeypatch, number, raises):
    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError) if raises else contextlib.nullcontext():
        files.sync_folder(tmp_path)


def test_a_crash_between_writing_and_naming_leaves_one_temporary_file(tmp_path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from refimg.storage.files import save_numbered\n"
        "os.link = lambda *_: os.kill(os.getpid(), 9)\n"
        "save_numbered(b'x' * 1000, Path(sys.argv[1]), 's')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert run.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".refimg-")
    assert save_numbered(b"y", tmp_path, "s").name == "s_v1.png"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_numbered(b"x", tmp_path, "s")
    assert written(tmp_path) == {}


def test_pictures_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    saved = save_numbered(b"x", tmp_path, "s")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert saved.stat().st_nlink == 1


def test_the_folder_may_be_a_string_and_is_made_once_for_all(tmp_path):
    barrier, made = threading.Barrier(4), []

    def save() -> None:
        barrier.wait()
        made.append(save_numbered(b"x", str(tmp_path / "a" / "b"), "s"))

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 4


# The user's files


def test_read_image_names_the_path_in_every_refusal(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(images, "_MAX_BYTES", 1000)
    (tmp_path / "large.png").write_bytes(b"x" * 1001)
    reasons = {
        "text.png": "not a readable",
        "empty.png": "0 bytes",
        "": "not a file",
        "pipe": "not a file",
        "loop": "image",
        "large.png": "1001 bytes, at most 1000",
        "nul\0.png": "image",
        "x" * 300: "image",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as refusal:
            read_image(tmp_path / name)
        assert repr(str(tmp_path / name)) in str(refusal.value)


def test_read_image_follows_content_and_not_the_name(tmp_path):
    path = tmp_path / "photo.gif"
    path.write_bytes(picture(10, form="JPEG"))
    assert read_image(str(path)).size == (64, 36)
