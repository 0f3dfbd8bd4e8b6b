"""Chapter 10, the pull: what is copied, what is sent, what is kept when something breaks; end to end."""

from __future__ import annotations

import functools
import json
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROGRAM, Process, World, path_before, wait_until

import zbackup

MIB = 1 << 20
PAGE = zbackup.PAGE


def pull(world: World, *flags: str, code: int | None = 0) -> dict[str, Any]:
    """Make a sweep over the one node; returns the report of its snapshot."""
    row = world.sweep(*flags, code=code)["nodes"][0]
    snapshot: dict[str, Any] = row["snapshot"]
    return snapshot


def read_tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Return kind, mode, mtime and content of every path below a folder."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            seen = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(seen.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(seen.st_mode):
                content = Path(path).read_bytes()
            found[os.path.relpath(path, root)] = (seen.st_mode, seen.st_mtime_ns, content)
    return found


def check_restored(world: World, to: str = "restored") -> Path:
    """Restore the last snapshot and compare it with the files."""
    back = world.restore(to=to) / "files"
    assert read_tree(back) == read_tree(world.files)
    return back


def find_packs(world: World) -> list[Path]:
    return [path for path in (world.store / "packs").rglob("*") if path.is_file()]


def change_pages(path: Path, pages: list[int]) -> None:
    """Write new bytes in some pages of a file."""
    with open(path, "r+b") as file:
        for page in pages:
            os.pwrite(file.fileno(), os.urandom(PAGE), page * PAGE)


@pytest.fixture
def calm(world: World) -> World:
    """A world with a node that takes timestamps at their word, so that a file is not read again for its youth."""
    world.node("--margin", "0s")
    return world


# ---- a tree of real files ----


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Some 1000 files of the standard library, with symlinks and odd modes, and a node that serves them."""
    world = World(tmp_path_factory.mktemp("library"))
    source = Path(sysconfig.get_paths()["stdlib"])
    count = 0
    for folder, names, files in os.walk(source):
        names[:] = sorted(set(names) - {"site-packages"})
        target = world.files / os.path.relpath(folder, source)
        target.mkdir(exist_ok=True)
        for name in sorted(files):
            if count < 1000:
                shutil.copy2(os.path.join(folder, name), target / name, follow_symlinks=False)
                count += 1
    assert count == 1000
    (world.files / "json link").symlink_to("json")
    (world.files / "nowhere").symlink_to("/does/not/exist")
    (world.files / "os.py").chmod(0o4751)
    (world.files / "locked").mkdir(mode=0o500)
    (world.files / "a\nb \udcff").write_text("an odd name")
    os.utime(world.files / "json link", ns=(5, 1234567890123456789), follow_symlinks=False)
    os.utime(world.files / "re", ns=(5, -1_000_000_007))
    world.node("--margin", "0s")
    yield world
    world.close()


def test_library_is_restored_as_it_was(library: World) -> None:
    first = pull(library)
    assert (first["files"], first["changed"], first["grade"]) == (1001, 1001, "stable")
    assert first["added"] < first["sent"] * 1.2 < first["size"]  # compressed on the way
    check_restored(library)


def test_library_unchanged(library: World) -> None:
    pull(library)
    second = pull(library)
    assert (second["files"], second["changed"], second["deleted"]) == (1001, 0, 0)
    assert second["sent"] < 200_000  # the listing, compressed
    assert second["added"] < 1000
    check_restored(library, "unchanged")


def test_library_compared_by_checksum(library: World) -> None:
    pull(library)
    third = pull(library, "--checksum")
    assert (third["files"], third["changed"], third["grade"]) == (1001, 0, "stable")
    assert third["sent"] < 0.1 * third["size"]


# ---- what a change costs ----


def test_small_file_changed(calm: World) -> None:
    for name in ("a", "b", "c"):
        (calm.files / name).write_bytes(os.urandom(30_000))
    pull(calm)
    (calm.files / "b").write_bytes(os.urandom(30_000))
    second = pull(calm)
    assert second["changed"] == 1 and 30_000 < second["sent"] < 40_000
    check_restored(calm)


def test_appended_file_sends_its_tail(calm: World) -> None:
    (calm.files / "log").write_bytes(os.urandom(5 * MIB + 123))
    pull(calm)
    with open(calm.files / "log", "ab") as file:
        file.write(os.urandom(100_000))
    second = pull(calm)
    assert second["changed"] == 1 and 100_000 < second["sent"] < 115_000
    assert second["added"] < 115_000
    check_restored(calm)


def test_one_percent_of_pages_changed(calm: World) -> None:
    big = calm.files / "big"
    big.write_bytes(os.urandom(20 * MIB))
    pull(calm)
    change_pages(big, random.Random(1).sample(range(20 * MIB // PAGE), 51))
    second = pull(calm)
    assert 51 * PAGE < second["sent"] < 0.02 * 20 * MIB
    assert 51 * PAGE < second["added"] < 0.02 * 20 * MIB
    assert second["changed"] == 1
    check_restored(calm)


@pytest.mark.parametrize(
    "size", [0, 1, PAGE, MIB // 2, MIB // 2 + 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 5 * PAGE, 3 * MIB - 1]
)
def test_truncated_file(calm: World, size: int) -> None:
    (calm.files / "big").write_bytes(os.urandom(3 * MIB))
    pull(calm)
    os.truncate(calm.files / "big", size)
    second = pull(calm, code=1 if 2 * size < 3 * MIB else 0)  # half of its bytes gone: that is an alarm
    assert second["sent"] < 10_000 and second["size"] == size
    check_restored(calm)


@pytest.mark.parametrize("size", [1, PAGE, 10_000, MIB - 1, MIB])
def test_grown_file(calm: World, size: int) -> None:
    first = os.urandom(size)
    (calm.files / "big").write_bytes(first)
    pull(calm)
    (calm.files / "big").write_bytes(first + os.urandom(3 * MIB - size))
    second = pull(calm)
    assert second["size"] == 3 * MIB and second["sent"] < 3 * MIB + 20_000
    check_restored(calm)


# ---- content that moved ----

TOLD = 8192  # bytes of hashes and needles of a chunk
OLD = random.Random(11).randbytes(12 * MIB + 12_345)
NEW = random.Random(12).randbytes(6 * MIB)
SHIFTS: dict[str, tuple[bytes, int]] = {  # what became of OLD, and how much of it is new
    "in front": (NEW[:1000] + OLD, 1000),
    "half a chunk in front": (NEW[: MIB // 2] + OLD, MIB // 2),
    "a byte in front": (b"x" + OLD, 1),
    "in the middle": (OLD[:5_000_001] + NEW[:77] + OLD[5_000_001:], 77),
    "deleted": (OLD[:3_333_333] + OLD[4_444_444:], 0),
    "deleted in front": (OLD[700_001:], 0),
    "two insertions": (
        OLD[: 2 * MIB + 9] + NEW[:50_000] + OLD[2 * MIB + 9 : 9 * MIB] + NEW[50_000:50_300] + OLD[9 * MIB :],
        50_300,
    ),
    "5 MiB": (OLD[:6_000_000] + NEW[: 5 * MIB] + OLD[6_000_000:], 5 * MIB),
    "cut and pasted": (OLD[: 4 * MIB] + OLD[4_700_000:5_200_000] + OLD[4 * MIB : 4_700_000] + OLD[5_200_000:], 0),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifted_content_is_found(calm: World, name: str) -> None:
    new, count = SHIFTS[name]
    (calm.files / "big").write_bytes(OLD)
    pull(calm, "--no-latest")
    (calm.files / "big").write_bytes(new)
    second = pull(calm, "--no-latest")
    told = (len(new) // MIB + 1) * TOLD
    # Where stretches meet, whole pages are sent, and a chunk of which nearly all is new.
    assert second["sent"] < count + told + 0.8 * MIB
    assert second["added"] < count + 0.8 * MIB
    if name in ("in front", "a byte in front", "deleted in front"):  # else a fourth of a chunk may be patched
        assert second["sent"] < count + told + 20 * PAGE
        assert second["added"] < count + 8192
    check_restored(calm)
    assert pull(calm, "--no-latest")["changed"] == 0
    assert pull(calm, "--no-latest", "--checksum")["sent"] < 0.01 * len(new)


OVERWRITTEN = {  # of each chunk that is changed, first byte and end
    "a few pages": [(5 * PAGE, 7 * PAGE), (90 * PAGE, 91 * PAGE)],
    "nearly a fourth": [(100 * PAGE, 160 * PAGE)],  # more than fits one answer to a question about eight chunks
    "less than half": [(9 * PAGE, 50 * PAGE), (130 * PAGE, 200 * PAGE)],
    "its start": [(0, 100 * PAGE)],
    "its end": [(200 * PAGE, MIB)],
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_overwritten_pages_alone_are_sent(calm: World, name: str) -> None:
    """Of chunks that are asked for together."""
    old = bytearray(random.Random(7).randbytes(21 * MIB + 100))
    (calm.files / "big").write_bytes(old)
    pull(calm, "--no-latest")
    count = 0
    for number in (1, 2, *range(4, 20)):
        for start, end in OVERWRITTEN[name]:
            old[number * MIB + start : number * MIB + end] = random.Random(number + start).randbytes(end - start)
            count += end - start
    (calm.files / "big").write_bytes(old)
    second = pull(calm, "--no-latest")
    assert count < second["sent"] < count + 22 * TOLD + 10_000
    assert second["added"] < count + 40_000
    check_restored(calm)
    assert pull(calm, "--no-latest")["changed"] == 0


def test_shifted_again_and_again(calm: World) -> None:
    choice = random.Random(5)
    data, versions = OLD[: 3 * MIB], []
    for _ in range(22):
        at = choice.randrange(len(data))
        data = data[:at] + choice.randbytes(choice.choice([0, 1, 5000, 200_000])) + data[at + choice.randrange(9000) :]
        versions.append(data)
        (calm.files / "big").write_bytes(data)
        pull(calm, "--no-latest")
    store = zbackup.open_store(str(calm.store))
    reader = store.reader()
    for snapshot, version in zip(store.node("127.0.0.9").list_snapshots(), versions):
        entry = next(e for e in zbackup.list_entries(reader, snapshot.blocks) if e.stat.kind == "file")
        digests = [chunk for chunk in zbackup.list_chunks(reader, entry.content) if isinstance(chunk, bytes)]
        assert b"".join(map(reader.get, digests)) == version
        for runs in map(reader.runs, digests):
            assert len({run.source for run in runs}) <= zbackup.MOST_SOURCES
            assert {reader.record(reader.find(run.source)[0]).kind for run in runs} == {zbackup.FRAME}
    reader.close()
    store.close()
    calm.run("prune", "--keep", "last 2", "--grace", "0s")
    calm.run("verify")
    check_restored(calm)


def make_log(lines: int, start: int = 0) -> bytes:
    choice = random.Random(start)
    return b"".join(
        b"2026-11-25T%02d:%02d GET /item/%d 200 %d\n" % (i % 24, i % 60, i, choice.randrange(10**6))
        for i in range(start, start + lines)
    )


def test_shifted_log_with_lines_before_it(calm: World) -> None:
    old = make_log(100_000)
    (calm.files / "log").write_bytes(old)
    first = pull(calm, "--no-latest")
    (calm.files / "log").write_bytes(make_log(30_000, 10**6) + old)  # the last chunks are beyond the old end
    second = pull(calm, "--no-latest")
    assert second["sent"] < 0.6 * first["sent"] and second["added"] < 0.6 * first["sent"]
    check_restored(calm)


def test_renamed_large_file_is_not_sent_again(calm: World) -> None:
    (calm.files / "big").write_bytes(OLD)
    pull(calm, "--no-latest")
    (calm.files / "big").rename(calm.files / "another name")
    second = pull(calm, "--no-latest")
    assert (second["files"], second["deleted"]) == (1, 1)
    assert second["sent"] < 13 * TOLD + 5000 and second["added"] < 5000
    check_restored(calm)


def test_rotated_log_is_not_sent_again(calm: World) -> None:
    log, older = make_log(90_000), make_log(50_000, 10**7)
    (calm.files / "log").write_bytes(log)
    (calm.files / "log.1").write_bytes(older)
    first = pull(calm, "--no-latest")
    (calm.files / "log.1").rename(calm.files / "log.2")
    (calm.files / "log").rename(calm.files / "log.1")
    (calm.files / "log").write_bytes(make_log(1000, 2 * 10**7))
    second = pull(calm, "--no-latest")
    assert second["sent"] < 0.15 * first["sent"] and second["added"] < 40_000
    check_restored(calm)


def test_all_new_content_of_a_large_file(calm: World) -> None:
    (calm.files / "big").write_bytes(os.urandom(20 * MIB))
    pull(calm, "--no-latest")
    (calm.files / "big").write_bytes(os.urandom(20 * MIB))
    second = pull(calm, "--no-latest")
    assert 20 * MIB < second["sent"] < 20 * MIB + 18 * TOLD + 20_000  # no longer told of after some chunks in vain
    check_restored(calm)


def test_shifted_content_with_holes(calm: World) -> None:
    def write(shift: int) -> None:
        with open(calm.files / "big", "wb") as file:
            file.write(NEW[:shift] + OLD[: 3 * MIB])
            file.truncate(20 * MIB)
            file.seek(20 * MIB)
            file.write(OLD[3 * MIB : 6 * MIB])
            file.truncate(30 * MIB)

    write(0)
    pull(calm, "--no-latest")
    write(1234)
    second = pull(calm, "--no-latest")
    assert second["sent"] < 10 * TOLD + 20 * PAGE and second["added"] < 40_000
    check_restored(calm)


def test_shifted_content_whose_base_is_damaged(calm: World) -> None:
    (calm.files / "big").write_bytes(OLD)
    pull(calm, "--no-latest", "--pack-size", "4MiB")
    pack = max(find_packs(calm), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) * 3 // 8] ^= 1  # in the content of a chunk
    pack.chmod(0o600)
    pack.write_bytes(data)
    (calm.files / "big").write_bytes(b"some bytes" + OLD)
    second = pull(calm, "--no-latest", code=None)
    assert second["grade"] == "stable" and MIB < second["sent"] < 4 * MIB
    check_restored(calm)


def test_file_becomes_a_folder_and_a_file_again(calm: World) -> None:
    thing = calm.files / "thing"
    thing.write_bytes(b"a file")
    pull(calm)
    thing.unlink()
    thing.mkdir()
    (thing / "inside").write_bytes(b"inside")
    second = pull(calm)
    assert (second["files"], second["folders"]) == (1, 2)
    check_restored(calm)
    shutil.rmtree(thing)
    thing.write_bytes(b"a file again")
    assert pull(calm)["deleted"] == 1
    check_restored(calm, "again")
    assert (calm.store / "127.0.0.9/latest/files/thing").read_bytes() == b"a file again"


def test_renamed_file_is_stored_once(calm: World) -> None:
    (calm.files / "old name").write_bytes(os.urandom(2 * MIB))
    pull(calm)
    (calm.files / "old name").rename(calm.files / "new name")
    second = pull(calm)
    assert second["deleted"] == 1 and second["added"] < 5000
    check_restored(calm)


def test_deleted_files_are_counted(calm: World) -> None:
    for name in ("a", "b", "c", "d"):
        (calm.files / name).write_text(name)
    pull(calm)
    for name in ("a", "c", "d"):
        (calm.files / name).unlink()
    second = pull(calm, code=1)
    assert second["alarm"].startswith("it has 1 files, where 20")
    assert (second["deleted"], second["files"], second["changed"]) == (3, 1, 0)
    check_restored(calm)


def test_touched_file_sends_no_content(calm: World) -> None:
    (calm.files / "big").write_bytes(os.urandom(3 * MIB))
    (calm.files / "small").write_bytes(os.urandom(50_000))
    pull(calm)
    for name in ("big", "small"):
        os.utime(calm.files / name, ns=(1, 10**18))
    second = pull(calm)
    assert second["changed"] == 0 and second["sent"] < 5000
    check_restored(calm)


def test_empty_files_and_folders(calm: World) -> None:
    (calm.files / "empty").touch()
    (calm.files / "folder").mkdir()
    first = pull(calm)
    assert (first["files"], first["folders"], first["size"]) == (1, 2, 0)
    (calm.files / "empty").write_text("not any more")
    pull(calm)
    check_restored(calm)


@pytest.mark.parametrize("size", [100, MIB, 5 * MIB + 7])
def test_zeros_store_nothing(calm: World, size: int) -> None:
    (calm.files / "zeros").write_bytes(bytes(size))
    first = pull(calm)
    assert first["size"] == size and first["sent"] < 3000 and first["added"] < 3000
    check_restored(calm)


def test_sparse_file_keeps_its_holes(calm: World) -> None:
    with open(calm.files / "sparse", "wb") as file:
        for at in (0, 30 * MIB + 12345, 49 * MIB):
            os.pwrite(file.fileno(), os.urandom(10_000), at)
        file.truncate(60 * MIB + 99)
    first = pull(calm)
    assert first["size"] == 60 * MIB + 99 and first["sent"] < 60_000
    back = check_restored(calm)
    assert (back / "sparse").stat().st_blocks * 512 < 3 * MIB
    os.truncate(calm.files / "sparse", 3 << 40)  # lists of nothing but zeros
    second = pull(calm, "--no-latest")
    assert second["size"] == 3 << 40 and second["sent"] < 100_000


def test_inode_alone_changed(calm: World) -> None:
    for name, size in (("small", 10_000), ("big", 3 * MIB)):
        (calm.files / name).write_bytes(os.urandom(size))
    pull(calm)
    for name in ("small", "big"):
        shutil.copy2(calm.files / name, calm.path / "copy")
        os.replace(calm.path / "copy", calm.files / name)
    second = pull(calm)
    assert second["changed"] == 0 and second["sent"] < 5000
    check_restored(calm)


def test_hard_links_are_sent_once(calm: World) -> None:
    for name, size in (("a", 2 * MIB), ("b", 50_000)):
        (calm.files / f"{name}1").write_bytes(os.urandom(size))
        for number in "234":
            os.link(calm.files / f"{name}1", calm.files / f"{name}{number}")
    first = pull(calm)
    assert first["files"] == 8 and first["sent"] < 2 * MIB + 60_000
    check_restored(calm)
    os.link(calm.files / "a1", calm.files / "c")
    second = pull(calm)
    assert second["files"] == 9 and second["sent"] < 10_000
    check_restored(calm, "again")


# ---- changes that are easily missed ----


def test_content_changed_under_the_same_mtime(calm: World) -> None:
    file = calm.files / "file"
    file.write_bytes(b"before" * 1000)
    pull(calm)
    seen = file.stat()
    file.write_bytes(b"behind" * 1000)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert pull(calm)["changed"] == 1
    check_restored(calm)


def test_content_changed_within_one_tick(world: World) -> None:
    """A page that is dirty already can be written through a map without any timestamp to show for it."""
    file = world.files / "file"
    file.write_bytes(bytes(range(256)) * 16)
    world.node("--margin", "5s")
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as view:
        for number in range(5):
            view[0:8] = b"before %d" % number
            seen = file.stat()
            pull(world, "--no-latest")
            view[0:8] = b"behind %d" % number
            if file.stat() == seen:
                break
        else:
            pytest.skip("the filesystem always wrote the page back meanwhile, and set its times")
        assert pull(world, "--no-latest")["changed"] == 1
    check_restored(world)


def test_fresh_file_is_read_until_it_is_old(world: World) -> None:
    (world.files / "file").write_bytes(os.urandom(50_000))
    node = world.node("--margin", "1h")
    for _ in range(2):
        pull(world)
        assert read_entries(world)[-1].stat.fresh
    node.stop()
    world.node("--margin", "1s")
    wait_until(lambda: pull(world)["sent"] >= 0 and not read_entries(world)[-1].stat.fresh, what="age")
    assert pull(world)["changed"] == 0
    check_restored(world)


def read_entries(world: World, number: int = -1) -> list[zbackup.Entry]:
    """Return the entries of a snapshot of the node."""
    store = zbackup.open_store(str(world.store))
    reader = store.reader()
    try:
        return list(zbackup.list_entries(reader, store.node("127.0.0.9").list_snapshots()[number].blocks))
    finally:
        reader.close()
        store.close()


# ---- whole blocks that are as they were ----


def list_blocks(world: World) -> list[bytes]:
    """Return the blocks of the last snapshot of the node."""
    store = zbackup.open_store(str(world.store))
    try:
        return list(store.node("127.0.0.9").list_snapshots()[-1].blocks)
    finally:
        store.close()


def make_crowd(world: World, count: int = 1500) -> None:
    for number in range(count):
        (world.files / f"{number:04}").write_text(f"content {number}")


def test_unchanged_blocks_are_taken_over(calm: World) -> None:
    make_crowd(calm)
    (calm.files / "link").symlink_to("0000")
    first = pull(calm)
    before = list_blocks(calm)
    again = pull(calm)
    assert list_blocks(calm) == before
    assert len(before) > 3
    for field in ("files", "folders", "others", "size", "grade"):
        assert again[field] == first[field]
    assert (again["changed"], again["deleted"]) == (0, 0)
    (calm.files / "0700").write_text("another content")
    (calm.files / "0900").unlink()
    (calm.files / "0901x").touch()
    third = pull(calm)
    assert (third["changed"], third["deleted"], third["files"]) == (2, 1, 1500)
    assert len(set(before) - set(list_blocks(calm))) <= 4
    check_restored(calm)


def test_block_with_a_file_to_be_read_again_is_not_taken_over(world: World) -> None:
    make_crowd(world, 600)
    node = world.node("--margin", "1h")
    assert pull(world)["changed"] == 600
    assert all(entry.stat.fresh for entry in read_entries(world) if entry.stat.kind == "file")
    before = (world.files / "0300").stat()
    (world.files / "0300").write_text("CONTENT 300")
    os.utime(world.files / "0300", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pull(world)["changed"] == 1
    check_restored(world)
    node.stop()


def test_checksum_reads_the_files_of_a_block(calm: World) -> None:
    make_crowd(calm, 600)
    pull(calm)
    assert pull(calm)["sent"] < pull(calm, "--checksum")["sent"] / 2


def test_block_of_which_a_chunk_is_lost_is_read_anew(calm: World) -> None:
    make_crowd(calm, 1200)
    assert pull(calm, "--pack-chunks", "300")["changed"] == 1200
    packs = sorted(find_packs(calm), key=lambda path: path.stat().st_mtime_ns)
    assert len(packs) > 2
    packs[0].unlink()
    pull(calm, code=4)  # it tells of the pack
    assert calm.run("repair", "--store", str(calm.store)).returncode == 0
    pull(calm, code=None)
    check_restored(calm)


def make_block(digest: bytes, *names: str) -> zbackup.Block:
    lines = [zbackup.encode_stat(zbackup.Stat(name.encode(), "file", size=1)) for name in names]
    return zbackup.Block(digest, lines, [b"{}"] * len(lines))


def test_base_offers_a_block_only_from_its_start() -> None:
    whole, lacking, part, last = (
        make_block(*row) for row in ((b"1", "a", "b"), (b"2", "c", "d"), (b"", "e"), (b"3", "f"))
    )
    rows = [(whole, set()), (lacking, {1}), (zbackup.Block(b"4", [], []), set()), (part, set()), (last, set())]
    base = zbackup.Base(iter(rows))
    assert base.whole_block() is whole
    base.match_block()
    assert base.whole_block() is None  # the store has not all of it
    present = []
    for line in (*lacking.lines, *part.lines):
        found, stat = base.match(line)
        assert found and found.line == line and stat is None
        present.append(base.present)
        assert base.whole_block() is (last if line in part.lines else None)
    assert present == [True, False, True]
    with pytest.raises(zbackup.ProtocolError, match="out of order"):
        base.match(make_block(b"", "d").lines[0])
    base.match_block()
    assert base.whole_block() is None
    base.finish()
    assert base.deleted == 0
    with pytest.raises(zbackup.ProtocolError, match="out of order"):
        base.match(last.lines[0])


# ---- many versions ----


def test_many_versions_of_one_file(calm: World) -> None:
    choice = random.Random(7)
    file = calm.files / "file"
    file.write_bytes(os.urandom(3 * MIB))
    versions = []
    for number in range(18):  # more than one patch may draw from
        change_pages(file, choice.sample(range(768), 20))
        if number % 8 == 5:
            os.truncate(file, 3 * MIB - choice.randrange(2 * MIB))
        elif number % 8 == 6:
            os.truncate(file, 3 * MIB)
        versions.append(file.read_bytes())
        pull(calm, "--no-latest", code=None)  # where it became much shorter there is an alarm
    store = zbackup.open_store(str(calm.store))
    reader = store.reader()
    snapshots = store.node("127.0.0.9").list_snapshots()
    kinds = set()
    assert len(snapshots) == 18 > zbackup.MOST_SOURCES
    for snapshot, content in zip(snapshots, versions):
        entry = next(e for e in zbackup.list_entries(reader, snapshot.blocks) if e.stat.kind == "file")
        parts = []
        for chunk in zbackup.list_chunks(reader, entry.content):
            parts.append(bytes(chunk * MIB) if isinstance(chunk, int) else reader.get(chunk))
            if isinstance(chunk, bytes):
                kinds.add(reader.record(reader.find(chunk)[0]).kind)
                sources = {run.source for run in reader.runs(chunk)}
                assert {reader.record(reader.find(source)[0]).kind for source in sources} == {zbackup.FRAME}
                assert len(sources) <= zbackup.MOST_SOURCES
        assert b"".join(parts)[: len(content)] == content
        assert entry.content.size == len(content)
    assert kinds == {zbackup.FRAME, zbackup.PATCHES}
    reader.close()
    store.close()
    name = snapshots[3].name
    back = calm.restore("127.0.0.9", "--at", name)
    assert (back / "files/file").read_bytes() == versions[3]


def test_many_roots(calm: World) -> None:
    calm.nodes[0].stop()
    for number in range(4097):
        (calm.files / f"{number:04}").touch()
    calm.node("--margin", "0s", "--file", "files/*")
    assert pull(calm, "--no-latest")["files"] == 4097
    assert pull(calm, "--no-latest")["changed"] == 0
    check_restored(calm)


# ---- files that cannot be read, or not in one piece ----


def start_unprivileged(world: World) -> None:
    """Start a node whose root may not read everything."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv here to take a capability from root")
    flags = ["node", "--bind", "127.0.0.9", "--port", str(world.port), "--file", "files"]
    caps = "-dac_override,-dac_read_search"
    log = world.path / "unprivileged.log"
    with open(log, "wb") as out:
        command = ["setpriv", "--bounding-set", caps, sys.executable, str(PROGRAM), *flags]
        process = subprocess.Popen(command, cwd=world.path, env=world.env, stdout=out, stderr=out)
    node = Process.__new__(Process)
    node.log, node.process = log, process
    world.nodes.append(node)
    wait_until(lambda: "serving" in node.output, what="the node")


def test_unreadable_file_and_folder(world: World) -> None:
    for name in ("a", "b", "z"):
        (world.files / name).write_text(name)
    (world.files / "big").write_bytes(os.urandom(2 * MIB))
    (world.files / "folder").mkdir()
    (world.files / "folder" / "inside").write_text("inside")
    start_unprivileged(world)
    for name in ("b", "big", "folder"):
        (world.files / name).chmod(0)
    first = pull(world, code=1)
    assert (first["grade"], first["failed"]) == ("partial", 3)
    said = {problem["path"]: problem["message"] for problem in first["problems"]}
    assert said == dict.fromkeys(("files/b", "files/big", "files/folder"), "Permission denied")
    back = world.restore(code=None)
    assert (back / "files/a").read_text() == "a" and (back / "files/z").read_text() == "z"
    assert "Permission denied" in world.run(*world.server_flags(), code=1).stderr
    for name in ("b", "big", "folder"):
        (world.files / name).chmod(0o700)
    assert pull(world)["grade"] == "stable"
    check_restored(world, "whole")


def test_missing_root_until_it_comes(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--file", "files", "--file", "later")
    first = pull(world, code=1)
    assert (first["grade"], first["failed"], first["files"]) == ("partial", 1, 1)
    assert first["problems"] == [{"path": "later", "message": "does not exist on the node"}]
    (world.path / "later").write_text("here")
    second = pull(world)
    assert (second["grade"], second["files"]) == ("stable", 2)


def start_writer(world: World, script: str) -> Iterator[None]:
    """Run a Python program that keeps changing `files/file`, in a process of its own."""
    head = "import os, time\nfd = os.open('files/file', os.O_RDWR)\nend = os.lseek(fd, 0, 2)\n"
    with subprocess.Popen([sys.executable, "-c", head + script], cwd=world.path) as writer:
        try:
            yield
        finally:
            writer.kill()


REWRITE = "while True: os.pwrite(fd, os.urandom(4096), 4096 * (os.urandom(1)[0] * 20 % (end // 4096)))"
GROW = "while True: end += os.pwrite(fd, os.urandom(3000), end); time.sleep(0.0005)"
LOG = "while True: end += os.pwrite(fd, b'a line of a log\\n', end); time.sleep(0.2)"


def test_file_that_changes_all_the_time(world: World) -> None:
    (world.files / "file").write_bytes(os.urandom(20 * MIB))
    (world.files / "quiet").write_text("quiet")
    world.node()
    for _ in start_writer(world, REWRITE):
        torn = pull(world, "--pause", "50ms", code=1)
    assert (torn["grade"], torn["torn"], torn["files"]) == ("torn", 1, 2)
    assert torn["problems"] == [{"path": "files/file", "message": "was changing all the time; read 5 times"}]
    assert torn["finished"] - torn["started"] > 750_000_000  # 50 + 100 + 200 + 400 ms
    (entry,) = (entry for entry in read_entries(world) if entry.stat.path == b"files/file")
    assert entry.content.grade == "torn"
    back = world.restore(code=None)
    assert (back / "files/file").stat().st_size == 20 * MIB
    assert pull(world)["grade"] == "stable"
    check_restored(world, "stable")


def test_file_that_grows_all_the_time(world: World) -> None:
    start = os.urandom(8 * MIB)
    (world.files / "file").write_bytes(start)
    world.node()
    for _ in start_writer(world, GROW):
        torn = pull(world, "--pause", "10ms", "--tries", "3", code=1)
    assert (torn["grade"], torn["torn"]) == ("torn", 1)
    assert torn["problems"][0]["message"] == "was changing all the time; read 3 times"
    back = world.restore(code=None)
    assert (back / "files/file").read_bytes()[: 8 * MIB] == start
    assert not [problem for problem in torn["problems"] if "length" in problem["message"]]


def test_log_that_grows_slowly(world: World) -> None:
    start = os.urandom(5 * MIB)
    (world.files / "file").write_bytes(start)
    world.node()
    for _ in start_writer(world, LOG):
        reports = [pull(world) for _ in range(3)]
    assert [report["grade"] for report in reports] == ["stable"] * 3
    assert reports[2]["sent"] < 50_000
    whole = (world.files / "file").read_bytes()
    back = (world.restore() / "files/file").read_bytes()
    assert whole.startswith(back) and len(back) > len(start)


def test_file_that_cannot_be_read_to_its_end(world: World) -> None:
    """/proc/PID/mem is a regular file whose every read fails with EIO."""
    world.node("--file", "files", "--file", f"/proc/{os.getpid()}/mem")
    (world.files / "a").write_text("a")
    report = pull(world, code=1)
    assert (report["grade"], report["failed"]) == ("partial", 1)
    assert report["problems"][0]["message"] == "Input/output error"
    assert (world.restore(code=None) / "files/a").read_text() == "a"


# ---- processes that die ----


def find_progress(world: World) -> dict[str, Any]:
    """Return the progress.json of the node, {} where there is none."""
    try:
        found: dict[str, Any] = json.loads((world.store / "127.0.0.9/progress.json").read_bytes())
    except FileNotFoundError:
        return {}
    return found


def count_sealed(world: World) -> int:
    """Return the bytes in sealed packs."""
    return sum(path.stat().st_size for path in find_packs(world) if path.suffix == ".pack")


def test_node_killed_then_server_killed(world: World) -> None:
    flags = ("--pack-size", "16MiB", "--window", "1MiB")
    (world.files / "a").write_text("the first version")
    world.node()
    pull(world)
    (world.files / "a").write_text("the second version")
    (world.files / "big").write_bytes(os.urandom(300 * MIB))

    server = world.server(*flags)
    wait_until(lambda: find_progress(world), what="progress")
    world.nodes[0].kill()
    assert server.process.wait(30) == 1
    assert "connection to the node was lost" in server.output and "Traceback" not in server.output
    rows = world.listed("127.0.0.9")
    assert [row["GRADE"] for row in rows] == ["stable", "partial"]
    assert rows[1]["NOTE"].startswith("cut off: the connection")
    assert (world.store / "127.0.0.9/latest/files/a").read_text() == "the first version"
    assert (world.restore() / "files/a").read_text() == "the first version"
    after_node = count_sealed(world)
    assert after_node > 16 * MIB
    before = find_progress(world)

    world.node()
    server = world.server(*flags)
    wait_until(lambda: find_progress(world) != before, what="more progress")
    server.kill()
    assert "Traceback" not in server.output
    sealed = count_sealed(world)
    assert after_node + 16 * MIB <= sealed < 300 * MIB
    assert len(world.listed("127.0.0.9")) == 2

    report = pull(world)
    assert report["grade"] == "stable"
    assert report["sent"] < 300 * MIB - sealed + 2 * MIB
    assert [path for path in find_packs(world) if path.suffix != ".pack"] == []
    assert not find_progress(world)
    check_restored(world, "whole")
    assert (world.store / "127.0.0.9/latest/files/a").read_text() == "the second version"
    assert count_sealed(world) < 302 * MIB


def test_server_killed_between_many_files(world: World) -> None:
    for number in range(400):
        (world.files / f"{number:03}").write_bytes(os.urandom(200_000))
    world.node("--margin", "0s")
    server = world.server("--pack-size", "4MiB", "--window", "1MiB")
    wait_until(lambda: find_progress(world), what="progress")
    server.kill()
    sealed = count_sealed(world)
    assert sealed < 80_000_000
    report = pull(world)
    assert (report["grade"], report["files"]) == ("stable", 400)
    assert report["sent"] < 80_000_000 - sealed + 3 * MIB
    check_restored(world)


def test_node_stopped_in_the_middle(world: World) -> None:
    (world.files / "big").write_bytes(os.urandom(60 * MIB))
    node = world.node()
    server = world.server("--window", "1MiB", "--answer-timeout", "1s")
    wait_until(lambda: any(p.stat().st_size > MIB for p in find_packs(world)), what="some bytes")
    node.process.send_signal(signal.SIGSTOP)
    assert server.process.wait(20) == 1
    assert "did not answer within 1 s" in server.output
    node.process.send_signal(signal.SIGCONT)
    assert pull(world)["grade"] == "stable"
    check_restored(world)


def test_progress_that_is_damaged(calm: World) -> None:
    (calm.files / "a").write_text("a")
    pull(calm)
    progress = calm.store / "127.0.0.9/progress.json"
    progress.write_text("{]")
    assert pull(calm)["changed"] == 0
    progress.write_bytes(zbackup.encode_file({"blocks": ["00" * 32], "tail": [], "current": ""}))
    report = calm.sweep(code=4)
    assert report["nodes"][0]["snapshot"]["grade"] == "stable"
    assert "entries of the last snapshot are lost" in report["problems"][0]
    assert not progress.exists() and pull(calm)["problems"] == []


def test_lost_pack_is_sent_again(calm: World) -> None:
    (calm.files / "a").write_bytes(os.urandom(3 * MIB))
    (calm.files / "b").write_bytes(os.urandom(1000))
    pull(calm)
    for path in find_packs(calm):
        path.unlink()
    report = calm.sweep(code=4)
    snapshot = report["nodes"][0]["snapshot"]
    assert snapshot["sent"] > 3 * MIB and snapshot["grade"] == "stable"
    assert "is lost" in report["problems"][0] and "entries of the last snapshot are lost" in report["problems"][-1]
    check_restored(calm)
    assert calm.sweep()["problems"] == []


def test_lost_pack_of_one_file_is_mended(calm: World) -> None:
    (calm.files / "a").write_bytes(os.urandom(3 * MIB))
    pull(calm)
    before = set(find_packs(calm))
    (calm.files / "b").write_bytes(os.urandom(3 * MIB))
    (calm.files / "a").write_bytes(os.urandom(3 * MIB))
    pull(calm)
    for path in set(find_packs(calm)) - before:
        os.rename(path, calm.path / path.name)
    pull(calm, code=None)  # compared with nothing: the entries were in that pack too
    check_restored(calm)


def test_lost_pack_of_content_alone_is_mended(calm: World) -> None:
    (calm.files / "a").write_bytes(os.urandom(3 * MIB))
    pull(calm, "--pack-size", "1MiB")
    for path in find_packs(calm):
        if path.stat().st_size > MIB:
            path.unlink()
    os.utime(calm.files / "a")
    report = pull(calm, code=4)
    assert report["grade"] == "stable" and report["sent"] >= MIB
    calm.run("repair")
    check_restored(calm)


# ---- hooks, packs, codecs ----


def test_hooks_around_a_copy(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node(
        "--before", "echo made > files/dump; echo before >> hooks", "--after", "rm files/dump; echo after >> hooks"
    )
    report = pull(world)
    assert report["files"] == 2
    assert (world.path / "hooks").read_text().split() == ["before", "after"]
    assert (world.restore() / "files/dump").read_text() == "made\n"
    assert not (world.files / "dump").exists()


def test_hook_before_fails(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--before", "echo no room; echo for it >&2; exit 7")
    row = world.sweep(code=1)["nodes"][0]
    assert row["snapshot"] is None
    assert row["error"] == "--before ended with code 7: no room | for it"


def test_hook_after_fails(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--before", "true", "--after", "echo it broke; exit 3")
    row = world.sweep(code=1)["nodes"][0]
    assert row["snapshot"]["grade"] == "stable"
    assert row["problems"] == [{"path": "", "message": "--after ended with code 3: it broke"}]


def test_hook_after_without_before(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--after", "echo after >> hooks")
    pull(world)
    assert (world.path / "hooks").read_text() == "after\n"


def test_hook_after_a_copy_that_failed(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--before", "false", "--after", "echo after >> hooks")
    world.sweep(code=1)
    wait_until((world.path / "hooks").exists, what="--after")


def test_hook_after_a_server_that_was_killed(world: World) -> None:
    """The next copy must not find its --before undone by the --after of the last one."""
    (world.files / "big").write_bytes(os.urandom(60 * MIB))
    world.node("--before", "echo before >> hooks", "--after", "echo after >> hooks", "--session-timeout", "5s")
    server = world.server("--window", "1MiB")
    wait_until(lambda: any(p.stat().st_size > MIB for p in find_packs(world)), what="some bytes")
    server.kill()
    pull(world)
    assert (world.path / "hooks").read_text().split() == ["before", "after"] * 2


def test_hook_that_takes_long(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--before", "sleep 4", "--working-every", "200ms")
    assert pull(world, "--answer-timeout", "3s")["grade"] == "stable"


def test_packs_of_few_chunks(calm: World) -> None:
    for number in range(300):
        (calm.files / f"{number:03}").write_bytes(os.urandom(20_000))
    pull(calm, "--pack-chunks", "50")
    assert len(find_packs(calm)) >= 5
    assert pull(calm, "--pack-chunks", "50")["changed"] == 0
    check_restored(calm)


def hide_zstd(world: World) -> dict[str, str]:
    """Return an environment in which Python has no zstd."""
    hidden = world.path / "hidden"
    for package in ("backports", "compression"):
        (hidden / package).mkdir(parents=True, exist_ok=True)
        (hidden / package / "__init__.py").write_text("")
        (hidden / package / "zstd.py").write_text("raise ImportError('hidden')\n")
    return {**world.env, "PYTHONPATH": path_before(hidden)}


def find_codecs(world: World) -> set[int]:
    """Return the codecs of all records of all packs."""
    found = set()
    for path in find_packs(world):
        data = path.read_bytes()
        for _, record, _ in zbackup.read_pack_index(str(path)):
            found.add(zbackup.decode_record_head(data[record : record + zbackup.RECORD.size], record)[1])
    return found


@pytest.mark.parametrize(("node_has", "server_has"), [(True, False), (False, True), (False, False)])
def test_zlib_where_zstd_is_missing(world: World, node_has: bool, server_has: bool) -> None:
    (world.files / "text").write_bytes(b"".join(b"line %d\n" % i for i in range(300_000)))
    (world.files / "small").write_text("small " * 1000)
    full, poor = world.env, hide_zstd(world)
    world.env = full if node_has else poor
    world.node()
    world.env = full if server_has else poor
    report = pull(world)
    assert report["sent"] < report["size"] / 2
    assert zbackup.ZLIB in find_codecs(world)
    assert (zbackup.ZSTD in find_codecs(world)) <= server_has
    world.env = full
    check_restored(world)


def test_zstd_store_without_zstd(world: World) -> None:
    (world.files / "text").write_bytes(b"".join(b"line %d\n" % i for i in range(300_000)))
    world.node()
    pull(world)
    world.env = hide_zstd(world)
    said = world.run("restore", "127.0.0.9", "--to", "restored", code=None)
    assert said.returncode and "install backports.zstd" in said.stderr


def test_pages_that_the_store_has_as_a_patch(calm: World) -> None:
    """A patch draws from whole chunks only, also where what is new in it is known as a small file, kept as a patch."""
    big, pages = os.urandom(2 * MIB), os.urandom(2 * PAGE)
    (calm.files / "big").write_bytes(big)
    (calm.files / "small").write_bytes(pages)
    pull(calm, "--no-latest")
    pages = os.urandom(PAGE) + pages[PAGE:]
    (calm.files / "small").write_bytes(pages)
    pull(calm, "--no-latest")
    (calm.files / "big").write_bytes(big[: 9 * PAGE] + pages + big[11 * PAGE :])
    pull(calm, "--no-latest")
    check_restored(calm)
    (calm.files / "big").write_bytes(big[: 9 * PAGE + 77] + pages + big[9 * PAGE + 77 :])
    pull(calm, "--no-latest")
    check_restored(calm, "again")


# ---- changes that the times of a file do not show ----


def test_change_through_a_shared_map_after_the_copy(world: World) -> None:
    """A store into a page that is not clean yet sets no time: what is dirty is written before the file is read."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("the syncs of a store on the same filesystem would write it, too")
    world.store = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        path = world.files / "map"
        path.write_bytes(bytes(3 << 20))
        world.node("--margin", "0s")
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            os.fsync(file.fileno())
            mapped[:6] = b"first "
            time.sleep(0.1)
            world.sweep("--store", str(world.store))
            before = path.stat().st_mtime_ns
            mapped[:6] = b"second"
            assert path.stat().st_mtime_ns != before, "the times do not tell"
        world.sweep("--store", str(world.store))
        assert (world.restore("--store", str(world.store)) / "files/map").read_bytes()[:6] == b"second"
    finally:
        shutil.rmtree(world.store)


def test_change_within_one_tick_of_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read when its times are older than their grain: a second change could not be told from the first."""
    path = tmp_path / "f"
    path.write_bytes(b"1")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        moment[0] += int(seconds * 1e9)

    settler = zbackup.Settler(zbackup.Clock(lambda: moment[0], time.monotonic, sleep))
    with open(path, "rb") as file:
        newest = max(os.fstat(file.fileno()).st_mtime_ns, os.fstat(file.fileno()).st_ctime_ns)
        for age, pauses in ((0.001, [zbackup.GRAIN]), (0.019, [zbackup.GRAIN]), (0.03, []), (-5, [])):
            moment = [newest + int(age * 1e9)]
            slept.clear()
            settler.settle(file.fileno(), os.fstat(file.fileno()))
            assert slept == pauses, age
        whole = newest // 10**9 * 10**9
        for always, pauses in ((False, [zbackup.COARSE_GRAIN]), (True, [zbackup.GRAIN] * 4)):
            moment = [whole + 10**9]  # of times in whole seconds; then of a file that is written without a pause
            slept.clear()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fstat", functools.partial(describe_times, moment, 0 if always else whole))
                settler.settle(file.fileno(), os.fstat(file.fileno()))
            assert slept == pauses


def describe_times(moment: list[int], newest: int, fd: int) -> Any:
    """Return what fstat says of a file that was written at `newest`, or else just now."""
    return SimpleNamespace(st_mtime_ns=newest or moment[0] - 1, st_ctime_ns=newest or moment[0] - 1, st_dev=1)


def test_time_that_a_program_sets_to_a_whole_second() -> None:
    """It does not say that the filesystem knows no others: that the file changed shows in the second time."""
    now = 1_000_000_000 * 10**9
    clock = zbackup.Clock(lambda: now, time.monotonic, time.sleep)
    assert zbackup.find_wait(clock, now - 10**9, now - 10**9 + 1) == 0
    assert zbackup.find_wait(clock, now, now - 10**9 + 1) == zbackup.GRAIN
    assert zbackup.find_wait(clock, now - 10**9, now - 10**9) == zbackup.COARSE_GRAIN


def test_small_file_written_without_a_pause_for_a_while(world: World) -> None:
    """It is read again, with pauses, until its times can tell."""
    (world.files / "log").write_text("")
    (world.files / "other").write_text("other")
    world.node()
    script = "for _ in range(150): end += os.pwrite(fd, b'x', end); time.sleep(0.01)"
    with subprocess.Popen(
        [sys.executable, "-c", f"import os, time; fd = os.open('files/log', os.O_RDWR); end = 0\n{script}"],
        cwd=world.path,
    ):
        time.sleep(0.2)
        snapshot = pull(world)
    assert (snapshot["grade"], snapshot["torn"]) == ("stable", 0)
    assert (world.restore() / "files/log").read_text().strip("x") == ""


def test_log_that_grows_all_the_time_slowly(world: World) -> None:
    """A line each 10 ms: what is read twice alike was there, and nothing that it had before is sent as too much."""
    (world.files / "file").write_bytes(b"")
    world.node()
    for _ in start_writer(world, "while True: end += os.pwrite(fd, b'a line\\n', end); time.sleep(0.01)"):
        time.sleep(0.5)
        grades = [pull(world, code=None)["grade"] for _ in range(4)]
    assert set(grades) <= {"stable", "torn"} and "stable" in grades
    assert set((world.restore(code=None) / "files/file").read_text().splitlines()) <= {"a line", "a lin", "a li"}


def test_many_young_files_are_synced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one by one, which would take a while for each."""
    alone: list[int] = []
    together: list[int] = []
    monkeypatch.setattr(os, "fdatasync", alone.append)
    monkeypatch.setattr(zbackup, "sync_filesystem", together.append)
    settler = zbackup.Settler(zbackup.Clock(time.time_ns, time.monotonic, time.sleep))
    old = SimpleNamespace(st_mtime_ns=time.time_ns() - 61 * 10**9, st_ctime_ns=0, st_dev=1)
    young = SimpleNamespace(st_mtime_ns=time.time_ns() - 10 * 10**9, st_ctime_ns=0, st_dev=1)
    for found in [old] * 100 + [young] * 1000:
        settler._sync(7, found)  # type: ignore[arg-type]
    assert (len(alone), len(together)) == (zbackup.Settler.ALONE, 1)
    newer = SimpleNamespace(st_mtime_ns=time.time_ns(), st_ctime_ns=0, st_dev=1)
    settler._sync(7, newer)  # type: ignore[arg-type]
    assert (len(alone), len(together)) == (zbackup.Settler.ALONE + 1, 1)
