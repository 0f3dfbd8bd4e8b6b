"""A chunk that is lost or damaged in the store is stored anew when the node still has it."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import World, wait_until

import zbackup

MIB = 1 << 20


def find_packs(world: World) -> list[Path]:
    return sorted((world.store / "packs").rglob("*.pack"))


def test_damaged_page_hashes_are_sent_again(world: World) -> None:
    """Hashes of the base that do not fit its digest: the chunk is sent whole, and mended."""
    path = world.files / "a"
    path.write_bytes(os.urandom(3 * MIB))
    world.node()
    world.sweep()
    (pack,) = find_packs(world)
    data = bytearray(pack.read_bytes())
    start = data.index(zbackup.RECORD_MAGIC) + zbackup.RECORD.size + zbackup.TABLE_ROW.size
    data[start] ^= 1  # a page hash of the first chunk
    stored = start + 256 * zbackup.PAGE_HASH + 5000
    data[stored] ^= 1  # and its content, so that it cannot be found out from that
    pack.write_bytes(data)
    with open(path, "r+b") as file:
        file.write(b"changed")
    report = world.sweep(code=None)
    assert report["nodes"][0]["snapshot"]["grade"] == "stable"
    assert MIB < report["nodes"][0]["snapshot"]["sent"] < 1.2 * MIB
    assert (world.restore() / "files/a").read_bytes() == path.read_bytes()


def test_damaged_base_of_a_scattered_patch_is_stored_whole(world: World) -> None:
    """The base is read where a patch has become too scattered; its damage must not end the copy."""
    path = world.files / "a"
    path.write_bytes(os.urandom(2 * MIB))
    (world.files / "z").write_bytes(b"after it")
    world.node()
    world.sweep()
    (pack,) = find_packs(world)
    data = bytearray(pack.read_bytes())
    start = data.index(zbackup.RECORD_MAGIC) + zbackup.RECORD.size + zbackup.TABLE_ROW.size
    data[start + 256 * zbackup.PAGE_HASH + 1000 * 1000] ^= 1
    pack.write_bytes(data)
    for turn in range(8):
        with open(path, "r+b") as file:
            for page in range(turn * 30, turn * 30 + 30):
                file.seek(page * 4096)
                file.write(os.urandom(10))
        world.sweep(code=None)
    assert world.sweep(code=None)["nodes"][0]["snapshot"]["files"] == 2
    back = world.restore(code=None)
    assert (back / "files/z").read_bytes() == b"after it"
    assert (back / "files/a").read_bytes() == path.read_bytes()


def test_poisoned_digest_is_refused() -> None:
    """A patch may not stand for a chunk that its base does not reach to the end of."""
    page = zbackup.PAGE
    assert zbackup.covers([], 2 * page, 2 * page)
    assert zbackup.covers([], page, 2 * page)  # cut off at a page
    assert not zbackup.covers([], page + 100, 2 * page)  # the base's hash is of a whole page
    assert not zbackup.covers([], 2 * page, page)
    assert not zbackup.covers([(2 * page, 3 * page)], 3 * page, page + 100)  # a short page in the middle
    assert zbackup.covers([(page, 3 * page)], 3 * page, page + 100)
    assert zbackup.covers([(0, page)], page + 100, page + 100)
    assert not zbackup.covers([(0, page)], page + 100, page)


def test_file_that_grows_behind_zeros_is_read_on(world: World) -> None:
    """Listed as one chunk of zeros, read when that is only its start."""
    (world.files / "a").write_bytes(os.urandom(60 * MIB))
    zeros = world.files / "z"
    zeros.write_bytes(bytes(500_000))
    world.node()
    server = world.server("--window", "1MiB", "--no-latest")
    wait_until(lambda: any((world.store / "packs").glob("incoming-*")), what="the first bytes")
    with open(zeros, "ab") as file:
        file.write(bytes(MIB) + os.urandom(2 * MIB))
    assert server.process.wait(60) == 0, server.output
    back = world.restore()
    assert (back / "files/z").read_bytes() in (zeros.read_bytes(), bytes(500_000))


def test_latest_keeps_its_files_where_a_root_is_missing(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node()
    world.sweep()
    latest = world.store / "127.0.0.9/latest/files"
    world.files.rename(world.path / "not mounted")
    world.sweep(code=1)
    assert (latest / "a").read_text() == "a"
    (world.path / "not mounted").rename(world.files)
    (world.files / "a").rename(world.files / "b")
    world.sweep()
    assert [path.name for path in latest.iterdir()] == ["b"]


def test_log_file_that_is_full_ends_no_backup(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node()
    done = world.run(*world.server_flags("--log-file", "/dev/full"), code=0)
    assert done.stderr.count("--log-file cannot be written") == 1
