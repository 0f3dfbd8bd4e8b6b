"""A chunk that is lost or damaged in the store is stored anew when the node still has it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import World, wait_until

import zbackup

MIB = 1 << 20


def put(store: zbackup.Store, what: Callable[[zbackup.PackWriter], Any]) -> Any:
    """Put something into a pack of its own."""
    writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
    found = what(writer)
    writer.seal()
    return found


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


@pytest.mark.parametrize("turn", range(6))  # the order of the packs' names is chance
def test_whole_chunk_is_not_hidden_by_a_patch_of_the_same_digest(tmp_path: Path, turn: int) -> None:
    """Two pulls side by side may store one content whole and as a patch."""
    path = str(tmp_path / "backups")
    data = os.urandom(8 * zbackup.PAGE)
    part = zbackup.digest_pages(zbackup.hash_pages(data[: zbackup.PAGE]))
    with contextlib.closing(zbackup.open_store(path, create=True)) as store:
        whole = put(store, lambda w: w.put_chunk(data))
        put(store, lambda w: w.put_patch(part, [zbackup.Run(whole, 0, zbackup.PAGE)]))
        other = put(store, lambda w: w.put_chunk(data[:100] + data))
        put(store, lambda w: w.distrusted.add(whole) or w.put_patch(whole, [zbackup.Run(other, 100, len(data))]))
    Path(path, "index.sqlite").unlink()
    with contextlib.closing(zbackup.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert len(reader.find(whole)) == 2
        assert reader.get(part) == data[: zbackup.PAGE]
        assert reader.pages(part) == zbackup.hash_pages(data[: zbackup.PAGE])
        assert reader.get(whole) == data


def test_copy_of_a_damaged_chunk_is_found_in_another_pack(tmp_path: Path) -> None:
    path = str(tmp_path / "backups")
    data = os.urandom(MIB)
    with contextlib.closing(zbackup.open_store(path, create=True)) as store:
        digest = put(store, lambda w: w.put_chunk(data))
        (damaged,) = (tmp_path / "backups/packs").rglob("*.pack")
        put(store, lambda w: w.distrusted.add(digest) or (w.put_chunk(data), w.put_chunk(b"so it is another pack")))
    broken = bytearray(damaged.read_bytes())
    broken[MIB // 2] ^= 1
    damaged.write_bytes(broken)
    Path(path, "index.sqlite").unlink()
    with contextlib.closing(zbackup.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert reader.get(digest) == data


def test_lost_list_of_a_file_is_made_again(world: World) -> None:
    with open(world.files / "long", "wb") as file:
        file.truncate(1100 * MIB)
        file.write(b"start")
    world.node()
    world.sweep("--no-latest")
    (pack,) = find_packs(world)
    (world.files / "other").write_text("other")
    world.sweep("--no-latest")
    pack.unlink()
    assert world.sweep("--no-latest", code=4)["nodes"][0]["snapshot"]["grade"] == "stable"
    world.run("repair")
    world.sweep("--no-latest")
    with open(world.restore() / "files/long", "rb") as restored:
        assert restored.read(6) == b"start\0"


def test_latest_is_not_up_to_date_before_it_is(world: World) -> None:
    world.node()
    world.sweep()
    latest = world.store / "127.0.0.9/latest/files"
    (latest / "a").mkdir(parents=True)  # in the way
    (world.files / "a").write_text("a")
    for _ in range(3):
        assert "files/a" in str(world.sweep(code=1)["nodes"][0]["problems"])
    (latest / "a").rmdir()
    world.sweep()
    assert (latest / "a").read_text() == "a"


def test_snapshot_folder_with_a_dangling_link(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node()
    world.sweep()
    (world.store / "127.0.0.9/snapshots/9999.json").symlink_to("nowhere")
    assert world.sweep()["nodes"][0]["snapshot"]["sequence"] == 2
    assert "9999 cannot be read" in world.run("list", "127.0.0.9", code=4).stderr


def test_after_is_run_where_the_store_fails(world: World) -> None:
    (world.files / "a").write_bytes(os.urandom(60 * MIB))
    world.node("--before", "echo before >> hooks", "--after", "echo after >> hooks")
    server = world.server("--window", "1MiB", "--pack-size", "4MiB")
    wait_until(lambda: any((world.store / "packs").glob("??/*.pack")), what="a pack")
    (world.store / "packs").rename(world.path / "elsewhere")
    assert server.process.wait(30) == 4, server.output
    wait_until(lambda: "after" in (world.path / "hooks").read_text(), what="--after")
