"""The folder `latest`: the newest version as plain files, whatever happened to it before."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import stat as stat_bits
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FOLDER, World, halted, rewrite, wait_until
from test_restore import (
    MIB,
    NOON,
    count_children,
    damage,
    describe,
    describe_crowd,
    is_running,
    list_helpers,
    list_makers,
    list_packs,
    list_tree,
    look_at,
    make_snapshot,
)

import zbackup

Entries = list[tuple[zbackup.Stat, Any]]


def update(store: Path, snapshot: zbackup.Snapshot, workers: zbackup.Workers | None = None) -> list[zbackup.Problem]:
    """Bring latest up to date, as the end of a pull does."""
    with contextlib.closing(zbackup.open_store(str(store))) as opened:
        reader = opened.reader()
        try:
            return zbackup.Latest(opened.node(FOLDER), reader, workers).update(snapshot)
        finally:
            reader.close()


class Series:
    """Snapshot after snapshot, each shown in latest."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.latest = store / FOLDER / "latest"
        self.state = store / FOLDER / "latest.json"
        self.count = 0

    def make(self, *entries: tuple[zbackup.Stat, Any], **fields: Any) -> zbackup.Snapshot:
        """Store the next snapshot."""
        self.count += 1
        return make_snapshot(self.store, list(entries), at=NOON + self.count * 10**9, **fields)

    def show(self, *entries: tuple[zbackup.Stat, Any], **fields: Any) -> list[zbackup.Problem]:
        """Store the next snapshot and bring latest up to date."""
        return update(self.store, self.make(*entries, **fields))

    def texts(self) -> dict[str, str]:
        """Return what the files of latest have in them."""
        files = (path for path in sorted(self.latest.rglob("*")) if path.is_file() and not path.is_symlink())
        return {str(path.relative_to(self.latest)): path.read_text() for path in files}


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return Series(tmp_path / "backups")


def file(path: str, mtime: int = NOON, **fields: Any) -> zbackup.Stat:
    return describe(path, mtime=mtime, **fields)


def folder(path: str) -> zbackup.Stat:
    return describe(path, "directory")


def link(path: str, target: bytes) -> zbackup.Stat:
    return describe(path, "symlink", target=target)


# ---- what is not seen for a while ----


def test_kind_that_changed_while_a_root_was_missing(series: Series) -> None:
    """What older snapshots had there is gone already: what stands there now is of a newer one."""
    first = [(folder("files"), None), (link("files/p", b"target"), None), (file("files/q"), b"a file")]
    second = [(folder("files"), None), (file("files/p"), b"now a file"), (link("files/q", b"target"), None)]
    disk = [(folder("disk"), None), (file("disk/a"), b"a")]
    assert series.show(*disk, *first) == []
    for missing in (("disk",), ()):
        for _ in range(2):
            assert series.show(*([] if missing else disk), *second, missing=missing) == []
            assert series.texts() == {"disk/a": "a", "files/p": "now a file"}
            assert os.readlink(series.latest / "files/q") == "target"


def test_folder_of_an_older_snapshot_that_goes_with_what_a_newer_one_had_in_it(series: Series) -> None:
    old = [(folder("D"), None), (file("D/x"), b"x")]
    assert series.show((file("disk"), b"disk"), *old) == []
    assert series.show(*old, (file("D/y"), b"y"), missing=("disk",)) == []
    assert series.show((file("disk"), b"disk")) == []
    assert list_tree(series.latest) == {"disk": "file"}


def test_what_could_not_be_looked_at_stays(series: Series) -> None:
    """It is listed as a file, whatever it is: a folder may be listed that may not be searched."""
    whole = [(folder("p"), None), (file("p/f"), b"f"), (link("p/ln", b"f"), None), (folder("p/sub"), None)]
    whole.append((file("p/sub/g"), b"g"))
    assert series.show(*whole) == []
    said = "Permission denied"
    denied = [(file(f"p/{name}", error=said), zbackup.Content(error=said)) for name in ("f", "ln", "sub")]
    before = list_tree(series.latest)
    for _ in range(2):
        assert series.show((folder("p"), None), *denied) == []
        assert list_tree(series.latest) == before
    assert series.show((folder("p"), None), (file("p/f"), b"new!")) == []
    assert series.texts() == {"p/f": "new!"} and not (series.latest / "p/sub").exists()


def test_many_snapshots_without_a_root_keep_the_first_in_mind(series: Series) -> None:
    """It alone knows what else the root had, which may have gone when the root is back."""
    rest = (file("b"), b"b")
    assert series.show(rest, (file("disk"), b"disk")) == []
    for _ in range(zbackup.OLDER_KEPT + 2):
        assert series.show(rest, missing=("disk",)) == []
    assert (series.latest / "disk").exists()
    assert series.show(rest) == []
    assert list_tree(series.latest) == {"b": "file"}


def test_disk_that_was_too_small_for_a_file_that_has_gone(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        series = Series(small / "backups")
        assert series.show((file("a"), b"a")) == []
        with pytest.raises(zbackup.FullStore):
            series.show((file("a"), b"a"), (file("giant"), b"x" * (20 * MIB)))
        assert series.show((file("a", NOON + 1), b"b")) == []
        assert list_tree(series.latest) == {"a": "file"} and series.texts() == {"a": "b"}
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- beside a real sweep ----


def test_latest_after_each_sweep(world: World) -> None:
    node = world.node()
    latest = world.store / FOLDER / "latest/files"
    (world.files / "sub").mkdir()
    (world.files / "sub/a").write_text("one")
    (world.files / "b").write_text("stays")
    (world.files / "b").chmod(0o4755)
    os.symlink("b", world.files / "c")
    os.mkfifo(world.files / "fifo")
    os.link(world.files / "b", world.files / "b2")
    world.sweep()
    assert list_tree(latest) == {"b": "file", "b2": "file", "c": "link", "sub": "folder", "sub/a": "file"}
    assert (latest / "b").stat().st_mtime_ns == (world.files / "b").stat().st_mtime_ns
    assert stat_bits.S_IMODE((latest / "b").stat().st_mode) == 0o700
    assert stat_bits.S_IMODE((latest / "sub/a").stat().st_mode) == 0o600
    assert stat_bits.S_IMODE((latest / "sub").stat().st_mode) == 0o700
    assert (latest / "b").stat().st_ino != (latest / "b2").stat().st_ino
    (world.files / "sub/a").write_text("two!")
    (world.files / "c").unlink()
    (world.files / "new").write_text("new")
    kept = (latest / "b").stat().st_ino
    assert world.sweep()["exit_code"] == 0
    assert list_tree(latest) == {"b": "file", "b2": "file", "new": "file", "sub": "folder", "sub/a": "file"}
    assert (latest / "sub/a").read_text() == "two!"
    assert (latest / "b").stat().st_ino == kept
    assert node.process.poll() is None


def test_latest_not_made(world: World) -> None:
    world.node()
    (world.files / "a").write_text("a")
    world.sweep("--no-latest")
    assert not (world.store / FOLDER / "latest").exists()
    world.sweep()
    assert (world.store / FOLDER / "latest/files/a").read_text() == "a"


def test_latest_follows_after_sweeps_without_it(world: World) -> None:
    world.node()
    (world.files / "a").write_text("a")
    world.sweep()
    (world.files / "b").write_text("b")
    world.sweep("--no-latest")
    (world.files / "a").unlink()
    world.sweep("--no-latest")
    world.sweep()
    assert list_tree(world.store / FOLDER / "latest/files") == {"b": "file"}


def test_latest_made_again_after_deletion(world: World) -> None:
    world.node()
    (world.files / "a").write_text("a")
    world.sweep()
    shutil.rmtree(world.store / FOLDER / "latest")
    world.sweep()
    assert (world.store / FOLDER / "latest/files/a").read_text() == "a"


def test_latest_keeps_last_good_copy_of_unreadable_file(series: Series) -> None:
    series.show((file("a"), b"good"), (file("b"), b"b"))
    problems = series.show((file("a"), zbackup.Content(error="Permission denied")), (file("b"), b"b"), grade="partial")
    assert problems == []
    assert series.texts() == {"a": "good", "b": "b"}
    series.show((file("a"), b"better"), (file("b"), b"b"))
    assert series.texts() == {"a": "better", "b": "b"}


def test_latest_keeps_content_of_unreadable_folder(series: Series) -> None:
    closed = folder("d")._replace(error="Permission denied")
    series.show((folder("d"), None), (folder("d/e"), None), (file("d/e/f"), b"f"), (file("g"), b"g"))
    assert series.show((closed, None), (file("g"), b"g"), grade="partial") == []
    assert series.texts() == {"d/e/f": "f", "g": "g"}


def test_latest_forgets_what_went_while_unreadable(series: Series) -> None:
    closed = folder("d")._replace(error="Permission denied")
    series.show((folder("d"), None), (file("d/a"), b"a"), (file("d/b"), b"b"))
    series.show((closed, None), grade="partial")
    series.show((folder("d"), None), (file("d/b"), b"b"))
    assert series.texts() == {"d/b": "b"}


# ---- file by file ----


def test_latest_replaces_files_whole(series: Series) -> None:
    series.show((file("a"), b"old"), (file("b"), b"same"))
    inodes = [(series.latest / name).stat().st_ino for name in ("a", "b")]
    with open(series.latest / "a") as opened:
        series.show((file("a", NOON + 1), b"new"), (file("b"), b"same"))
        assert opened.read() == "old"
    assert series.texts() == {"a": "new", "b": "same"}
    assert (series.latest / "a").stat().st_mtime_ns == NOON + 1
    assert (series.latest / "a").stat().st_ino != inodes[0]
    assert (series.latest / "b").stat().st_ino == inodes[1]


def test_latest_takes_over_time_and_mode_alone(series: Series) -> None:
    series.show((file("a"), b"same"))
    series.show((file("a", NOON + 5, mode=0o755), b"same"))
    found = (series.latest / "a").stat()
    assert (found.st_mtime_ns, stat_bits.S_IMODE(found.st_mode)) == (NOON + 5, 0o700)


def test_latest_leaves_what_differs_in_owner_alone(series: Series) -> None:
    series.show((file("a", uid=1), b"same"), (folder("d"), None))
    before = (series.latest / "a").stat().st_ino
    series.show((file("a", uid=2), b"same"), (describe("d", "directory", mtime=NOON + 1), None))
    assert (series.latest / "a").stat().st_ino == before


FORMS: dict[str, tuple[Entries, dict[str, str]]] = {
    "file": ([(file("x"), b"x")], {"x": "file"}),
    "folder": ([(folder("x"), None), (folder("x/y"), None), (file("x/y/z"), b"z")], {"x": "folder"}),
    "symlink": ([(link("x", b"elsewhere"), None)], {"x": "link"}),
    "fifo": ([(describe("x", "fifo"), None)], {}),
    "nothing": ([], {}),
}


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_latest_changes_kind(series: Series, before: str, after: str) -> None:
    around: Entries = [(file("w"), b"w")]
    assert series.show(*around, *FORMS[before][0], (file("z"), b"z")) == []
    assert series.show(*around, *FORMS[after][0], (file("z"), b"z")) == []
    tree = list_tree(series.latest)
    assert {name: kind for name, kind in tree.items() if name == "x"} == FORMS[after][1]
    assert ("x/y/z" in tree) == (after == "folder")
    assert tree["w"] == tree["z"] == "file"


def test_latest_removes_folders_that_are_gone(series: Series) -> None:
    deep: Entries = [(folder("a"), None), (folder("a/b"), None), (file("a/b/c"), b"c"), (folder("a/d"), None)]
    series.show(*deep, (folder("e"), None))
    assert series.show((folder("e"), None)) == []
    assert list_tree(series.latest) == {"e": "folder"}


def test_latest_symlink_changes_target(series: Series) -> None:
    series.show((link("x", b"one"), None))
    series.show((link("x", b"two"), None))
    assert os.readlink(series.latest / "x") == "two"


# ---- what others do to it ----


def test_latest_leaves_files_of_the_user(series: Series) -> None:
    series.show((folder("d"), None), (file("d/a"), b"a"))
    (series.latest / "d/notes").write_text("mine")
    (series.latest / "top").write_text("mine")
    series.show((folder("d"), None), (file("d/a", NOON + 1), b"b"))
    problems = series.show((file("z"), b"z"))
    assert [problem.path for problem in problems] == ["latest/d"]
    assert series.texts() == {"d/notes": "mine", "top": "mine", "z": "z"}


@pytest.mark.parametrize("dangling", [False, True])
def test_latest_as_symlink_is_not_written_through(series: Series, dangling: bool) -> None:
    elsewhere = series.store.parent / "elsewhere"
    series.show((file("a"), b"a"))
    shutil.rmtree(series.latest)
    if not dangling:
        elsewhere.mkdir()
    os.symlink(elsewhere, series.latest)
    problems = series.show((file("a", NOON + 1), b"b"), (file("new"), b"new"))
    assert [problem.path for problem in problems] == ["latest"]
    assert not elsewhere.exists() or list_tree(elsewhere) == {}


def test_latest_folder_as_symlink_is_not_written_through(series: Series) -> None:
    elsewhere = series.store.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "gone").write_text("mine")
    series.show((folder("d"), None), (file("d/a"), b"a"), (file("d/gone"), b"g"))
    shutil.rmtree(series.latest / "d")
    os.symlink(elsewhere, series.latest / "d")
    problems = series.show((folder("d"), None), (file("d/a", NOON + 1), b"b"), (file("d/new"), b"n"))
    assert {problem.path for problem in problems} == {"d/a", "d/new"}
    assert list_tree(elsewhere) == {"gone": "file"}


def test_latest_file_as_symlink_is_replaced(series: Series) -> None:
    mine = series.store.parent / "mine"
    mine.write_text("mine")
    large = random.Random(1).randbytes(2 * MIB)
    series.show((file("a"), large))
    (series.latest / "a").unlink()
    os.symlink(mine, series.latest / "a")
    series.show((file("a", NOON + 1), large[:-1] + b"!"))
    assert mine.read_text() == "mine"
    assert (series.latest / "a").read_bytes() == large[:-1] + b"!"


def test_latest_tries_again_what_failed(series: Series) -> None:
    series.show((file("a"), b"one"))
    (series.latest / "a").unlink()
    (series.latest / "a").mkdir()
    changed = (file("a", NOON + 1), b"two")
    assert series.show(changed) != []
    (series.latest / "a").rmdir()
    series.show(changed)
    assert series.texts() == {"a": "two"}


# ---- what it was shows in latest.json ----


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"snapshot": 5}', '{"snapshot": "2000-01-01T00-00-00Z"}'])
def test_latest_json_lost_or_damaged(series: Series, text: str | None) -> None:
    series.show((file("a"), b"a"), (file("b"), b"b"))
    series.state.unlink()
    if text is not None:
        series.state.write_text(text)
    assert series.show((file("a", NOON + 1), b"new"), (file("b"), b"b")) == []
    assert series.texts() == {"a": "new", "b": "b"}
    series.show((file("b"), b"b"))
    assert series.texts() == {"b": "b"}


def test_latest_json_says_what_is_shown(series: Series) -> None:
    first = series.make((file("a"), b"a"))
    update(series.store, first)
    state = json.loads(series.state.read_text())
    assert (state["snapshot"], state["next"]) == (first.name, "")


# ---- interrupted ----

OLD: Entries = [
    (file("changed"), b"old"),
    (file("deleted"), b"old"),
    (folder("dir"), None),
    (file("dir/inside"), b"old"),
    (file("kind"), b"old"),
    (file("same"), b"same"),
]
NEW: Entries = [
    (file("added"), b"new"),
    (file("changed", NOON + 1), b"new"),
    (link("dir", b"same"), None),
    (folder("kind"), None),
    (file("kind/inside"), b"new"),
    (file("same"), b"same"),
]
LATER: Entries = [(file("added"), b"new"), (file("later"), b"later"), (file("same"), b"same")]


class Cut(Exception):
    """Stands for a power cut."""


def cut_after(monkeypatch: pytest.MonkeyPatch, series: Series, snapshot: zbackup.Snapshot, steps: int) -> bool:
    """Update latest until `steps` changes were made to the disk; tells whether it got to the end."""
    left = [steps]

    def limit(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] <= 0:
                raise Cut
            left[0] -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("unlink", "rmdir", "symlink", "mkdir", "replace", "rename", "ftruncate", "utime", "link"):
        limit(name)
    try:
        update(series.store, snapshot)
        return True
    except Cut:
        return False
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("again", ["same", "later"])
@pytest.mark.parametrize("steps", [*range(24), 1000])
def test_latest_cut_off_at_any_step_is_completed(
    series: Series, monkeypatch: pytest.MonkeyPatch, steps: int, again: str
) -> None:
    series.show(*OLD)
    snapshot = series.make(*NEW)
    done = cut_after(monkeypatch, series, snapshot, steps)
    assert not done if steps == 0 else done or steps < 1000
    (series.latest / "mine").write_text("mine")
    problems = series.show(*LATER) if again == "later" else update(series.store, snapshot)
    assert {problem.path for problem in problems} <= {"latest/kind"}  # see the next test
    wanted = {"added": "new", "later": "later", "same": "same"}
    if again == "same":
        wanted = {"added": "new", "changed": "new", "kind/inside": "new", "same": "same"}
        assert os.readlink(series.latest / "dir") == "same"
    assert series.texts() == {**wanted, "mine": "mine"}
    assert list(series.latest.rglob(zbackup.TEMPORARY + "*")) == []


def test_latest_completed_without_false_alarm(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    series.show((file("kind"), b"old"))
    snapshot = series.make((folder("kind"), None), (file("kind/inside"), b"new"))
    monkeypatch.setattr(zbackup, "sync_filesystem", lambda fd: (_ for _ in ()).throw(Cut))
    with pytest.raises(Cut):
        update(series.store, snapshot)
    monkeypatch.undo()
    assert (series.latest / "kind").is_dir()
    assert update(series.store, snapshot) == []


def test_latest_cut_off_before_its_snapshot_was_lost(series: Series) -> None:
    """The snapshot that was to be shown next is gone: nothing can be made of it, and that is said."""
    series.show(*OLD)
    name = json.loads(series.state.read_text())["snapshot"]
    rewrite(series.state, snapshot=name, next="2001-01-01T00-00-00Z")
    problems = series.show(*NEW)
    assert problems == [] or "could not be brought up to date" in problems[0].message


def test_latest_recovers_from_lost_next(series: Series) -> None:
    series.show(*OLD)
    name = json.loads(series.state.read_text())["snapshot"]
    rewrite(series.state, snapshot=name, next="2001-01-01T00-00-00Z")
    series.show(*NEW)
    series.show(*LATER)
    assert series.texts()["later"] == "later"


def test_latest_disk_full(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC between two files: the old ones stay, and the next sweep completes it."""
    series.show(*OLD)
    snapshot = series.make(*NEW)

    def write(fd: int, data: Any) -> None:
        raise OSError(zbackup.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zbackup, "write_content", lambda reader, content, fd, sparse: write(fd, b""))
    with pytest.raises(zbackup.FullStore, match="the store is full: No space left on device"):
        update(series.store, snapshot)
    monkeypatch.undo()
    assert (series.latest / "changed").read_text() == "old"
    assert list(series.latest.rglob(zbackup.TEMPORARY + "*")) == []
    assert update(series.store, snapshot) == []
    assert (series.latest / "changed").read_text() == "new"


def test_latest_compares_no_blocks_that_both_snapshots_have(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(file(f"{number:04}"), b"%d" % number) for number in range(2000)]
    series.show(*files)
    pairs: list[Any] = []
    real = zbackup.compare_entries

    def compare(old: Any, new: Any) -> Any:
        for pair in real(old, new):
            pairs.append(pair)
            yield pair

    monkeypatch.setattr(zbackup, "compare_entries", compare)
    assert series.show(*files) == [] and pairs == []
    files[1000] = (file("1000", NOON + 1), b"new")
    assert series.show(*files[:1500], *files[1501:]) == []
    assert 0 < len(pairs) < 3000  # twice 2,000 with all of them
    assert (series.latest / "1000").read_text() == "new"
    assert len(os.listdir(series.latest)) == 1999 and not (series.latest / "1500").exists()


def test_latest_reads_a_block_with_an_error_that_both_snapshots_have(series: Series) -> None:
    """What a folder held that cannot be listed stays, however often it cannot, until it can."""
    unread = (folder("a")._replace(error="Permission denied"), None)
    series.show((folder("a"), None), (file("a/b"), b"old"), (file("c"), b"1"))
    for number in range(3):
        assert series.show(unread, (file("c"), b"1")) == [], number
        assert series.texts() == {"a/b": "old", "c": "1"}
    assert series.show((folder("a"), None), (file("c"), b"1")) == []
    assert series.texts() == {"c": "1"}


# ---- large files: only changed chunks are written ----

LARGE = random.Random(7).randbytes(3 * MIB + 100)


def edit(at: int, data: bytes) -> bytes:
    return LARGE[:at] + data + LARGE[at + len(data) :]


CHANGES = {
    "one byte": edit(MIB + 5, b"!"),
    "first and last chunk": edit(0, b"!")[:-1] + b"!",
    "growing in the last chunk": LARGE + b"more",
    "growing by chunks": LARGE + random.Random(8).randbytes(2 * MIB),
    "shrinking in the last chunk": LARGE[:-50],
    "shrinking by chunks": LARGE[: MIB + 1],
    "shrinking to a border": LARGE[: 2 * MIB],
    "shrinking to nothing": b"",
    "zeros in the middle": edit(MIB, bytes(MIB)),
    "same": LARGE,
}


@pytest.mark.parametrize("change", CHANGES)
def test_latest_large_file_changed(series: Series, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    series.show((file("large"), LARGE))
    calls = []
    real = zbackup.write_changes
    monkeypatch.setattr(zbackup, "write_changes", lambda *args: (calls.append(1), real(*args)))
    assert series.show((file("large", NOON + 1), CHANGES[change])) == []
    assert calls == [1]
    assert (series.latest / "large").read_bytes() == CHANGES[change]


def show_chunks(series: Series, mtime: int, size: int, chunks: list[bytes | int]) -> list[zbackup.Problem]:
    """Show a file made of chunks: data, or a number of chunks of zeros."""
    with contextlib.closing(zbackup.open_store(str(series.store), create=True)) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
        digests = tuple(writer.put_chunk(chunk) if isinstance(chunk, bytes) else chunk for chunk in chunks)
        writer.seal()
    return series.show((file("large", mtime, size=size), zbackup.Content(size, digests, (), "stable")))


X, Y = b"x" * MIB, b"y" * MIB


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([X, Y, X], [X, 1, X]),
        ([X, 2, X], [X, Y, 1, X]),
        ([X, 3], [X, 3, Y]),
        ([X, 3, Y], [X, 3]),
        ([2], [5]),
        ([5], [2]),
        ([X, 1, b"end"], [X, 1]),
        ([X, 1, b"end"], [X, 2, b"end"]),
    ],
)
def test_latest_chunks_of_zeros(series: Series, before: list[bytes | int], after: list[bytes | int]) -> None:
    def join(chunks: list[bytes | int]) -> bytes:
        return b"".join(bytes(chunk * MIB) if isinstance(chunk, int) else chunk for chunk in chunks)

    for mtime, chunks in ((NOON, before), (NOON + 1, after)):
        assert show_chunks(series, mtime, len(join(chunks)), chunks) == []
        assert (series.latest / "large").read_bytes() == join(chunks)


@pytest.mark.parametrize("cut", [1, MIB - 1])
def test_latest_zeros_that_end_inside_a_chunk(series: Series, cut: int) -> None:
    show_chunks(series, NOON, 4 * MIB - cut, [X, 3])
    assert show_chunks(series, NOON + 1, 3 * MIB - cut, [X, 2]) == []
    assert (series.latest / "large").read_bytes() == X + bytes(2 * MIB - cut)
    assert show_chunks(series, NOON + 2, 5 * MIB - cut, [X, 4]) == []
    assert (series.latest / "large").read_bytes() == X + bytes(4 * MIB - cut)


def make_patched(series: Series, places: dict[int, bytes]) -> tuple[list[bytes], bytes]:
    """Store LARGE's first chunk, and a patch of it with other pages; returns both digests and what it gives."""
    before = LARGE[:MIB]
    after = bytearray(before)
    for at, page in places.items():
        after[at : at + zbackup.PAGE] = page
    with contextlib.closing(zbackup.open_store(str(series.store), create=True)) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
        whole = writer.put_chunk(before)
        writer.seal()
        piece = writer.put_chunk(b"".join(places.values()))
        changed = [(at, at + zbackup.PAGE) for at in places]
        digest = zbackup.digest_pages(zbackup.hash_pages(after))
        writer.put_patch(digest, zbackup.patch_runs([zbackup.Run(whole, 0, MIB)], changed, piece, MIB))
        writer.seal()
    return [whole, digest], bytes(after)


PATCHED = {5 * zbackup.PAGE: b"p" * zbackup.PAGE, 255 * zbackup.PAGE: b"q" * zbackup.PAGE}


def show_patched(series: Series, digests: list[bytes]) -> list[list[zbackup.Problem]]:
    """Show a file of two chunks, the second before and after its patch."""
    tail = LARGE[MIB : 2 * MIB]
    return [
        series.show(
            (
                file("large", NOON + i, size=2 * MIB),
                zbackup.Content(2 * MIB, (digest, tail_of(series, tail)), (), "stable"),
            )
        )
        for i, digest in enumerate(digests)
    ]


def tail_of(series: Series, data: bytes) -> bytes:
    with contextlib.closing(zbackup.open_store(str(series.store))) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
        digest = writer.put_chunk(data)
        writer.seal()
    return digest


def test_latest_patched_chunk_costs_its_pages_alone(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, after = make_patched(series, PATCHED)
    written: list[tuple[int, int]] = []
    real = zbackup.write_at
    monkeypatch.setattr(
        zbackup, "write_at", lambda fd, data, at: (written.append((at, len(data))), real(fd, data, at))[1]
    )
    assert show_patched(series, digests) == [[], []]
    assert written == [(0, MIB), (MIB, MIB), (5 * zbackup.PAGE, zbackup.PAGE), (255 * zbackup.PAGE, zbackup.PAGE)]
    assert (series.latest / "large").read_bytes() == after + LARGE[MIB : 2 * MIB]


def test_latest_damaged_source_of_a_patch_is_never_written(series: Series) -> None:
    digests, _ = make_patched(series, PATCHED)
    (pack,) = [path for path in list_packs(series.store) if path.read_bytes().count(PATCHED[5 * zbackup.PAGE])]
    damage(pack, pack.read_bytes().index(b"p" * zbackup.PAGE) + 100)
    first, second = show_patched(series, digests)
    assert first == [] and [problem.path for problem in second] == ["large"]
    assert pack.stem in second[0].message
    assert (series.latest / "large").read_bytes() == LARGE[: 2 * MIB]


def test_latest_patch_of_what_is_lost_is_read_whole(series: Series) -> None:
    """The old chunk need not be in the store any more: the file has its bytes, but not which pages they were."""
    tail = LARGE[MIB : 2 * MIB]
    old = os.urandom(MIB)
    assert show_chunks(series, NOON, 2 * MIB, [old, tail]) == []
    for pack in list_packs(series.store):
        if old[:MIB] in pack.read_bytes():
            pack.unlink()
    (series.store / "index.sqlite").unlink()
    new = b"n" + old[1:]
    show_chunks(series, NOON + 1, 2 * MIB, [new, tail])
    assert (series.latest / "large").read_bytes() == new + tail


def test_latest_large_file_tampered_with(series: Series) -> None:
    series.show((file("large"), LARGE))
    damage(series.latest / "large", 5)
    series.show((file("large", NOON + 1), edit(MIB + 5, b"!")))
    assert (series.latest / "large").read_bytes() == edit(MIB + 5, b"!")


def test_latest_large_file_of_wrong_length_in_store(series: Series) -> None:
    show_chunks(series, NOON, 2 * MIB, [X, X])
    problems = show_chunks(series, NOON + 1, 2 * MIB, [X, b"short"])
    assert [problem.path for problem in problems] == ["large"]
    assert (series.latest / "large").read_bytes() == X + X


# ---- damage ----


def test_latest_damaged_pack_costs_only_its_files(series: Series) -> None:
    show_chunks(series, NOON, MIB, [random.Random(1).randbytes(MIB)])
    shutil.rmtree(series.latest)
    damage(list_packs(series.store)[-1], MIB // 2)
    problems = series.show((file("a"), b"a"), (file("large"), random.Random(1).randbytes(MIB)))
    assert [problem.path for problem in problems] == ["large"]
    assert list_tree(series.latest) == {"a": "file"}


def lose_packs(world: World) -> dict[str, Any]:
    """Make a sweep, lose all packs, make another one; returns its report."""
    world.node()
    (world.files / "a").write_text("a")
    world.sweep()
    for pack in list_packs(world.store):
        pack.unlink()
    (world.files / "b").write_text("b")
    return world.sweep(code=None)


def test_latest_whose_blocks_are_lost_shows_in_exit_code(world: World) -> None:
    assert lose_packs(world)["exit_code"] in (1, 4)
    world.run("repair")
    assert len(world.listed(FOLDER)) == 2


def test_latest_whose_blocks_are_lost_hides_no_snapshot(world: World) -> None:
    assert lose_packs(world)["nodes"][0]["snapshot"]["files"] == 2


def test_latest_whose_blocks_are_lost_is_made_again(world: World) -> None:
    lose_packs(world)
    world.sweep(code=None)
    assert list_tree(world.store / FOLDER / "latest/files") == {"a": "file", "b": "file"}


def test_latest_with_file_called_like_a_temporary_one(series: Series) -> None:
    leftover = zbackup.TEMPORARY + zbackup.hashlib.sha256(b"x").hexdigest()[:16]
    series.show((file(leftover), b"leftover"), (file("x"), b"right"))
    assert series.texts()["x"] == "right"


# ---- several processes ----


@pytest.fixture
def workers() -> Iterator[zbackup.Workers]:
    with contextlib.closing(zbackup.Workers(2, zbackup.opened_maker, "--latest-jobs")) as made:
        yield made
    assert count_children() == 0


def test_latest_by_several_processes_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makers = list_makers(monkeypatch, tmp_path / "makers")
    first = describe_crowd()
    changed = bytearray(first[-4][1])
    changed[5 * MIB : 5 * MIB + 4096] = bytes(4096)
    second = [(describe(f"a/f{i:03}", mtime=NOON + 1), b"%d" % (i * i)) for i in range(50, 350)]
    second = [first[0], *second, (describe("large2", mtime=NOON + 2), bytes(changed))]
    looks = []
    with contextlib.closing(zbackup.Workers(2, zbackup.opened_maker, "--latest-jobs")) as workers:
        for name, some in (("alone", None), ("together", workers)):
            series = Series(tmp_path / name)
            makers.unlink(missing_ok=True)
            for entries in (first, second):
                assert update(series.store, series.make(*entries), some) == []
                looks.append({name: seen for name, seen in look_at(series.latest).items() if "content" in seen})
            owners = set(makers.read_text().split())
            assert len(owners) == (2 if some else 1) and (str(os.getpid()) in owners) == (not some)
    assert looks[:2] == looks[2:] and (len(looks[0]), len(looks[1])) == (307, 301)
    assert count_children() == 0


def test_latest_while_another_node_has_the_processes(
    series: Series, workers: zbackup.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers.begin("another place")
    snapshot = series.make(*describe_crowd())
    makers = list_makers(monkeypatch, tmp_path / "makers")
    assert update(series.store, snapshot, workers) == []
    assert len(look_at(series.latest)) == 310 and set(makers.read_text().split()) == {str(os.getpid())}
    workers.end()
    assert workers.begin("it")
    workers.end()


def test_latest_while_the_index_is_made_anew(
    series: Series, workers: zbackup.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = series.make(*describe_crowd())
    makers = list_makers(monkeypatch, tmp_path / "makers")
    with contextlib.closing(zbackup.open_store(str(series.store))) as store:
        with contextlib.closing(zbackup.Index(store.index.path)) as other:  # of a `verify` beside it
            other.reset()
        with contextlib.closing(store.reader()) as reader:
            assert zbackup.Latest(store.node(FOLDER), reader, workers).update(snapshot) == []
    assert len(look_at(series.latest)) == 310 and set(makers.read_text().split()) == {str(os.getpid())}


def test_latest_whose_process_is_killed_is_tried_again_without(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = series.make(*describe_crowd())
    real, own = zbackup.FileMaker.do, os.getpid()

    def do(maker: zbackup.FileMaker, steps: Any) -> Any:
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(maker, steps)

    monkeypatch.setattr(zbackup.FileMaker, "do", do)
    with contextlib.closing(zbackup.Workers(2, zbackup.opened_maker, "--latest-jobs")) as workers:
        (problem,) = update(series.store, snapshot, workers)
        assert problem.message == (
            "could not be brought up to date: one of the processes that write files was killed, perhaps for want of "
            "memory; try it again with --latest-jobs 1"
        )
        assert update(series.store, snapshot, workers) == []
    assert len(look_at(series.latest)) == 310 and count_children() == 0


def test_latest_whose_process_was_killed_before(series: Series, workers: zbackup.Workers) -> None:
    for pid in list_helpers(os.getpid()):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_running(pid))
    assert update(series.store, series.make(*describe_crowd()), workers) == []
    assert len(look_at(series.latest)) == 310


def test_latest_that_fails_leaves_the_processes_to_the_next_node(
    series: Series, workers: zbackup.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(zbackup.errno.EIO, "Input/output error")

    snapshot = series.make(*describe_crowd())
    monkeypatch.setattr(zbackup, "sync_filesystem", fail)
    (problem,) = update(series.store, snapshot, workers)
    assert problem.message == "could not be brought up to date: Input/output error"
    monkeypatch.undo()
    assert workers.begin("another place")
    workers.end()
    assert update(series.store, snapshot, workers) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_sweep_that_is_ended_ends_those_who_write_latest(world: World, number: int) -> None:
    for i in range(600):
        (world.files / f"f{i:03}").write_text(str(i))
    world.node()
    flags = world.server_flags("--latest-jobs", "2")
    with halted(world, "os.rename", 30, *flags) as process:
        helpers = list_helpers(process.pid)
        assert len(helpers) == 2
        for pid in [process.pid] if number == signal.SIGKILL else [*helpers, process.pid]:  # as systemd does
            os.kill(pid, number)
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=60)
        wait_until(lambda: not any(map(is_running, helpers)), what="the end of the helpers")
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), said
    assert "Traceback" not in said[1] and "killed" not in said[1]
    world.sweep()
    latest = world.store / FOLDER / "latest/files"
    assert {path.name: path.read_text() for path in latest.iterdir()} == {f"f{i:03}": str(i) for i in range(600)}
    assert not list(world.store.rglob(f"{zbackup.TEMPORARY}*"))


@pytest.mark.parametrize(
    "flags, count", [(["--latest-jobs", "3"], 3), (["--latest-jobs", "1"], 0), (["--no-latest"], 0)]
)
def test_sweep_begins_as_many_processes_as_it_is_told(world: World, flags: list[str], count: int) -> None:
    world.node()
    with halted(world, "sqlite3.connect", 1, *world.server_flags(*flags)) as process:
        assert len(list_helpers(process.pid)) == count
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)


def test_verify_of_latest_goes_on_after_what_cannot_be_read(series: Series) -> None:
    """A folder of the file's own size stands in its place, as ext4 makes them."""
    series.show((file("a"), b"x" * 4096), (file("b"), b"good"))
    (series.latest / "a").unlink()
    (series.latest / "a").mkdir()
    if (series.latest / "a").stat().st_size != 4096:
        pytest.skip("folders have other sizes here")
    (series.latest / "b").write_text("bad!")
    with (
        contextlib.closing(zbackup.open_store(str(series.store))) as store,
        contextlib.closing(store.reader()) as reader,
    ):
        problems = zbackup.verify_latest(store.node(FOLDER), reader, lambda entry: True)
    assert [problem.path for problem in problems] == ["a", "b"]
    assert "Is a directory" in problems[0].message
