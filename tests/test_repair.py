"""Repair: what is damaged goes aside, all that can be saved restores, the rest is marked, and heals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import FOLDER, PROGRAM, World, held
from test_restore import NOON, describe, make_snapshot
from test_verify import (
    WAYS,
    Restored,
    break_byte,
    break_content,
    command,
    copy_small_world,
    find_lost,
    find_packs,
    has_patches,
    list_harmed,
    load_tree,
    read_all,
    save_tree,
    verify,
)

import zbackup as z


@pytest.fixture
def small(world: World) -> World:
    """A store of some kilobytes with every kind of file, and the files that its node had."""
    return copy_small_world(world)


def repair(store: Path) -> str:
    """Repair in this process; returns what it said."""
    code, out, err = command(store, "repair", "--reserve", "64")
    assert (code, err) == (0, "")
    return out


def check_repaired(store: Path, before: Restored, lost: set[tuple[str, str, str]]) -> None:
    """All but what is lost restores; verify names just that; nothing is left to do."""
    assert find_lost(before, store) == lost
    code, report = verify(store)
    assert (code, report["marked"], report["damaged"], report["files"]) == (1 if lost else 0, True, {}, {})
    assert list_harmed(report, before, store) == lost
    tree = save_tree(store)
    assert "put aside" not in repair(store)
    now = save_tree(store)
    for file in ("verified.json", "index.sqlite"):
        del tree[file], now[file]
    assert now == tree


def find_moved(tree: dict[str, bytes], store: Path) -> set[str]:
    """Return the files whose bytes are in `tree`, and nowhere in the store; a pack made whole again is not one."""
    now = save_tree(store)
    there = set(now.values())
    gone = {file for file, data in tree.items() if data not in there}
    return {f for f in gone if f not in now or hashlib.sha256(now[f]).hexdigest() != Path(f).stem}


def find_plain_pack(world: World) -> Path:
    """Return the pack of the first snapshot, from whose chunks the patches draw."""
    (pack,) = (pack for pack in find_packs(world.store) if not has_patches(pack))
    return pack


# ---- each kind of damage ----


@pytest.mark.parametrize("inside", [False, True], ids=["beside data", "in data"])
def test_repair_of_a_damaged_pack(small: World, inside: bool) -> None:
    """One byte of one pack: what that hit is lost at most; the pack as it was found is kept."""
    seed = int(os.environ.get("ZBACKUP_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    chance = random.Random(seed)
    tree, before = save_tree(small.store), read_all(small.store)
    places = []
    for pack in find_packs(small.store):
        with open(pack, "rb") as file:
            for record in z.scan_records(file.fileno(), pack.stat().st_size):
                data = range(record.data_offset, record.data_offset + record.stored)
                head = range(record.offset, record.data_offset)
                if record.kind == z.FRAME:
                    places += [(pack, at) for at in (data[chance.randrange(60) :: 60] or data[:1] if inside else head)]
        if not inside:
            footer = z.TRAILER.unpack(pack.read_bytes()[-z.TRAILER.size :])[0]
            places += [(pack, at) for at in range(footer, pack.stat().st_size)]
    for turn, (pack, at) in enumerate(places if inside else chance.sample(places, 24)):
        way = WAYS[0] if inside else WAYS[turn % 4]
        what = f"{pack.name}, byte {at}, {way}"
        break_byte(pack, at, way, chance.randrange(8))
        damaged = save_tree(small.store)
        lost = find_lost(before, small.store)
        said = repair(small.store)
        assert re.search("[1-3] packs mended", said), what
        repair(small.store)  # for patches that draw from what was lost just now
        left = find_lost(before, small.store)
        assert left <= lost, what
        check_repaired(small.store, before, left)
        assert find_moved(damaged, small.store) <= {"verified.json", "index.sqlite"}, what
        load_tree(small.store, tree)
        for end in ("-wal", "-shm"):
            (small.store / f"index.sqlite{end}").unlink(missing_ok=True)


def test_repair_is_done_after_one_run(small: World) -> None:
    """Damage to what patches draw from: verify then says 1, marked, and names no damaged pack."""
    with contextlib.closing(z.open_store(str(small.store))) as store, contextlib.closing(store.reader()) as reader:
        patched = next(pack for pack in find_packs(small.store) if has_patches(pack))
        _, runs = next(z.list_patches(str(patched)))
        places = [reader.find(run.source)[0] for run in runs]
        place = next(place for place in places if place.pack != patched.stem)
        record = reader.record(place)
    pack = small.store / "packs" / place.pack[:2] / f"{place.pack}.pack"
    at = record.starts[place.place] + 10 if record.codec == z.PLAIN else 0
    break_byte(pack, record.data_offset + at)
    repair(small.store)
    code, report = verify(small.store)
    assert (code, report["damaged"], report["marked"]) == (1, {}, True)


def test_patch_of_sound_bytes_of_a_damaged_chunk_is_saved(world: World) -> None:
    """The version that restores without the damaged page restores after repair, too."""
    data = os.urandom(64 << 10)
    (world.files / "file").write_bytes(data)
    node = world.node("--margin", "0")
    world.sweep("--reserve", "0")
    (pack,) = find_packs(world.store)
    (world.files / "file").write_bytes(b"new" * 1000 + data[3000:])
    world.sweep("--reserve", "0")
    node.stop()
    before = read_all(world.store)
    break_byte(pack, pack.read_bytes().index(data[100:140]))
    first, second = (row["SNAPSHOT"] for row in world.listed(FOLDER))
    assert {key for key in find_lost(before, world.store) if key[2] == "files/file"} == {(FOLDER, first, "files/file")}
    repair(world.store)
    assert (FOLDER, second, "files/file") not in find_lost(before, world.store)


@pytest.mark.parametrize("how", ["verify", "repair"])
def test_patch_with_a_run_that_is_too_long_is_no_sound_one(small: World, how: str) -> None:
    """One bit of its length: the page hashes are the same, the bytes are not."""
    before = read_all(small.store)
    pack = next(pack for pack in find_packs(small.store) if has_patches(pack))
    with open(pack, "rb") as file:
        (record,) = (r for r in z.scan_records(file.fileno(), pack.stat().st_size) if r.kind == z.PATCHES)
    assert record.codec == z.PLAIN
    break_byte(pack, record.data_offset + record.stored - 4)  # the length of the last run
    lost = find_lost(before, small.store)
    assert lost
    if how == "repair":
        repair(small.store)
        repair(small.store)
    _, report = verify(small.store)
    assert list_harmed(report, before, small.store) == lost


def test_repair_saves_all_of_a_pack_whose_end_is_gone(small: World) -> None:
    """Footer and trailer say nothing that the records do not."""
    before = read_all(small.store)
    for pack in find_packs(small.store):
        with open(pack, "r+b") as file:
            file.truncate(z.TRAILER.unpack(pack.read_bytes()[-z.TRAILER.size :])[0])
    (small.store / "index.sqlite").unlink()
    repair(small.store)
    check_repaired(small.store, before, set())
    assert len(list((small.store / "aside").iterdir())) in (2, 3)


def test_repair_saves_what_stands_behind_a_byte_that_is_gone(small: World) -> None:
    before = read_all(small.store)
    break_byte(find_plain_pack(small), 3, "removed")
    assert find_lost(before, small.store)
    repair(small.store)
    check_repaired(small.store, before, set())


def test_lost_pack_is_marked_and_what_is_marked_stays_so(small: World) -> None:
    """Each run of each other command then says 0, not 4: the user knows."""
    before = read_all(small.store)
    pack = find_plain_pack(small)
    pack.unlink()
    lost = find_lost(before, small.store)
    assert small.run("list", code=4).stderr.count("is lost") == 1
    small.run("repair", "--reserve", "64")
    small.run("list")
    check_repaired(small.store, before, lost)
    assert "damaged, see `verify`" in small.run("list", FOLDER).stdout


def test_damaged_file_of_a_node_is_made_anew_or_put_aside(small: World) -> None:
    """All that is neither a pack nor a snapshot: what holds something is kept, and the store works on."""
    before = read_all(small.store)
    with contextlib.closing(z.open_store(str(small.store))) as store:
        identity = store.load_known(FOLDER).identity
    small.store.joinpath("damage").mkdir(exist_ok=True)
    for file in ("progress.json", "latest.json", "node.json"):
        break_byte(small.store / FOLDER / file, 30)
    (small.store / "damage/lost.json").write_bytes(b"{}")
    for file in ("drill.json", "README.txt", "zbackup.json", "reserve"):
        break_byte(small.store / file, 30)
    damaged = save_tree(small.store)
    said = repair(small.store)
    assert "zbackup.json was damaged or missing, and is made anew" in said
    check_repaired(small.store, before, set())
    gone = find_moved(damaged, small.store)
    assert gone <= {"verified.json", "index.sqlite", "README.txt", "reserve"}  # these hold nothing
    assert (small.store / "README.txt").read_text() == z.STORE_README
    with contextlib.closing(z.open_store(str(small.store))) as store:
        known = store.load_known(FOLDER)
        assert known.identity == identity
        assert not store.problems
    small.node()
    assert small.sweep("--reserve", "64")["nodes"][0]["snapshot"]["grade"] in ("stable", "frozen")
    assert len(list(small.store.glob("127.*"))) == 1
    small.run("verify")


@pytest.mark.parametrize("file", ["zbackup.json", f"{FOLDER}/node.json", f"{FOLDER}/latest.json"])
def test_file_that_is_gone_is_made_anew(small: World, file: str) -> None:
    """By repair, or at the latest by the sweep after it."""
    before = read_all(small.store)
    (small.store / file).unlink()
    repair(small.store)
    check_repaired(small.store, before, set())
    small.node()
    small.sweep("--reserve", "64", code=None)
    assert (small.store / file).exists()
    small.run("verify")
    small.run("list")
    assert find_lost(before, small.store) == set()


@pytest.mark.parametrize("file", [f"{FOLDER}/node.json", "README.txt"])
def test_file_that_is_gone_is_made_anew_by_repair(small: World, file: str) -> None:
    """What every other command calls a problem, or what was there for who has only the folder."""
    (small.store / file).unlink()
    repair(small.store)
    assert (small.store / file).exists()


def test_identity_of_the_store_that_cannot_be_read_is_not_made_anew(small: World) -> None:
    """A new one would make every node take the server for another."""
    path = small.store / "zbackup.json"
    path.rename(small.path / "kept")
    path.mkdir()
    done = small.run("repair", code=4)
    assert "zbackup.json cannot be read: Is a directory" in done.stderr
    assert path.is_dir()


def test_identity_of_the_store_that_the_disk_lost_is_put_aside(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small.store / "zbackup.json"
    before = path.read_bytes()

    def fail(name: str, mode: str) -> Any:
        assert name == str(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(z, "open", fail, raising=False)
    assert z.repair_identity(str(small.store))
    monkeypatch.undo()
    assert [file.read_bytes() for file in (small.store / "aside").glob("zbackup.json.*")] == [before]
    with contextlib.closing(z.open_store(str(small.store))) as store:
        assert store.identity.encode() not in before


def test_identity_of_the_store_outlives_a_new_readme(small: World) -> None:
    """zbackup.json, which proves README.txt, is written anew with it."""
    with contextlib.closing(z.open_store(str(small.store))) as store:
        identity = store.identity
    break_byte(small.store / "README.txt", 5)
    repair(small.store)
    with contextlib.closing(z.open_store(str(small.store))) as store:
        assert store.identity == identity


def list_content(restored: Restored, snapshot: str) -> dict[str, tuple[bytes, bytes]]:
    """Return the content of one snapshot by path."""
    return {path: content for (_, name, path), content in restored.items() if name == snapshot}


def test_damaged_snapshot_is_saved_as_a_partial_one(small: World) -> None:
    """All that its file still names; the file itself goes aside, and the next sweep makes a whole one."""
    before = read_all(small.store)
    path = max((small.store / FOLDER / "snapshots").iterdir(), key=lambda path: (len(path.name), path.name))
    data = path.read_bytes()
    break_byte(path, data.index(b'"grade"') + 12)
    repair(small.store)
    (aside,) = (small.store / "aside").iterdir()
    assert aside.read_bytes() != data
    assert len(aside.read_bytes()) == len(data)
    assert not path.exists()
    rows = small.listed(FOLDER)
    assert [row["GRADE"] for row in rows].count("partial") == 1
    (name,) = (row["SNAPSHOT"] for row in rows if row["GRADE"] == "partial")
    assert list_content(read_all(small.store), name) == list_content(before, path.stem)
    small.run("verify")
    assert "put aside" not in repair(small.store)
    small.node()
    small.sweep("--reserve", "64")
    assert small.listed(FOLDER)[-1]["GRADE"] != "partial"
    small.run("verify")


def test_snapshot_that_was_saved_before_is_saved_again(small: World) -> None:
    """Damaged, repaired, damaged again: still one version, of the time that it was made at."""
    before = read_all(small.store)
    snapshots = small.store / FOLDER / "snapshots"
    (first, *_) = sorted(snapshots.iterdir())
    names, path = set(snapshots.iterdir()), first
    for _ in range(3):
        break_byte(path, 40)
        repair(small.store)
        (path,) = set(snapshots.iterdir()) - (names - {first})
    assert len(list(snapshots.iterdir())) == 2
    now = read_all(small.store)
    assert list_content(now, path.stem) == list_content(before, first.stem)
    with contextlib.closing(z.open_store(str(small.store))) as store:
        saved = store.node(FOLDER).load_snapshot(path.stem)
    assert z.name_time(saved.started) == first.stem[:20]
    small.run("list", FOLDER, "--at", path.stem)


def test_snapshot_that_names_nothing_goes_aside(small: World) -> None:
    """Its version is gone from the list; its bytes are not."""
    (path, *_) = (small.store / FOLDER / "snapshots").iterdir()
    path.write_bytes(b"nothing that could be saved")
    repair(small.store)
    (aside,) = (small.store / "aside").iterdir()
    assert aside.read_bytes() == b"nothing that could be saved"
    assert len(small.listed(FOLDER)) == 1
    small.run("verify")


def test_damaged_snapshot_in_the_trash_goes_aside(small: World) -> None:
    (path,) = (small.store / FOLDER / "trash").iterdir()
    break_byte(path, 50)
    data = path.read_bytes()
    repair(small.store)
    assert [aside.read_bytes() for aside in (small.store / "aside").iterdir()] == [data]
    small.run("verify")


def test_pack_goes_aside_once_where_there_are_no_hard_links(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept there before anything is done, and is there again when it is taken out of the packs."""

    def fail(source: str, path: str, **options: Any) -> None:
        number = errno.EEXIST if os.path.lexists(path) else errno.EPERM
        raise OSError(number, os.strerror(number))

    with contextlib.closing(z.open_store(str(small.store))) as store:
        path = min(z.list_packs(store.packs).values())
        break_byte(Path(path), 100)
        data = Path(path).read_bytes()
        monkeypatch.setattr(os, "link", fail)
        places = [z.keep_aside(store, path), z.put_aside(store, path)]
    assert places[0] == places[1]
    assert [file.read_bytes() for file in (small.store / "aside").iterdir()] == [data]
    assert not os.path.exists(path)


def test_two_files_of_one_name_go_aside(small: World) -> None:
    """The second time it gets another name: nothing is overwritten."""
    for turn in (1, 2, 3):
        (small.store / "drill.json").write_bytes(b"%d" % turn)
        repair(small.store)
    found = sorted((path.name, path.read_bytes()) for path in (small.store / "aside").iterdir())
    assert found == [("drill.json", b"1"), ("drill.json.2", b"2"), ("drill.json.3", b"3")]


def test_latest_changed_by_hand_is_made_what_it_was(small: World) -> None:
    latest = small.store / FOLDER / "latest"
    tree = save_tree(latest)
    (latest / "files/text").write_text("changed")
    (latest / "files/zeros").unlink()
    (latest / "files/link").unlink()
    shutil.rmtree(latest / "files/folder")
    assert "write it anew" in repair(small.store)
    assert save_tree(latest) == tree
    assert os.readlink(latest / "files/link") == "folder/inner"
    check_repaired(small.store, read_all(small.store), set())


def test_latest_is_made_what_it_was_from_a_pack_just_mended(small: World) -> None:
    """Both at once: the pack is made whole under its own name, and its files are written from it."""
    latest = small.store / FOLDER / "latest"
    tree = save_tree(latest)
    break_byte(find_plain_pack(small), 3, "removed")
    (latest / "files/folder/same").write_text("changed")
    repair(small.store)
    assert save_tree(latest) == tree


def test_repair_leaves_other_files_in_latest_alone(small: World) -> None:
    latest = small.store / FOLDER / "latest/files"
    (latest / "mine").write_text("put here by the user")
    (latest / "text").write_text("changed")
    repair(small.store)
    assert (latest / "mine").read_text() == "put here by the user"
    small.run("verify")


# ---- healing ----


def test_lost_pack_heals_when_the_node_has_it_still(small: World) -> None:
    """Lost, marked, asked for again, whole: also the older versions that share what was lost."""
    before = read_all(small.store)
    find_plain_pack(small).unlink()
    lost = find_lost(before, small.store)
    small.run("repair")
    small.run("verify", code=1)
    small.node()
    report = small.sweep("--reserve", "64")
    assert report["nodes"][0]["snapshot"]["grade"] in ("stable", "frozen")
    left = find_lost(before, small.store)
    assert left <= lost
    newest = small.listed(FOLDER)[-1]
    assert "damaged" not in newest["NOTE"]
    code, found = verify(small.store)
    assert (code, list_harmed(found, before, small.store)) == (1 if left else 0, left)
    small.restore()
    assert (small.path / "restored/files/folder/same").read_bytes() == (small.files / "folder/same").read_bytes()


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_unchanged_files_heal_in_all_their_versions(world: World, how: str) -> None:
    """The node's files are what they were: in the end verify has nothing to say, and `list` neither."""
    for number in range(5):
        (world.files / f"file {number}").write_bytes(os.urandom(20_000))
    world.node("--margin", "0")
    world.sweep("--reserve", "0")
    before = read_all(world.store)
    (pack,) = find_packs(world.store)
    if how == "lost":
        pack.unlink()
    else:
        break_content(pack)
    world.run("repair", "--reserve", "0")
    lost = find_lost(before, world.store)
    assert lost
    world.run("verify", code=1)
    assert "damaged, see `verify`" in world.listed(FOLDER)[0]["NOTE"]
    world.sweep("--reserve", "0")
    assert find_lost(before, world.store) == set()
    code, report = verify(world.store)
    assert (code, report["harmed"]) == (0, [])
    assert not [row["NOTE"] for row in world.listed(FOLDER) if "damaged" in row["NOTE"]]
    assert not (world.store / "damage/lost.json").exists()


def test_version_that_the_node_has_no_more_stays_marked(world: World) -> None:
    """Of two files one has changed since: its old version is lost for good, and is called so, the other heals."""
    (world.files / "changes").write_bytes(os.urandom(20_000))
    (world.files / "stays").write_bytes(os.urandom(20_000))
    world.node("--margin", "0")
    world.sweep("--reserve", "0")
    before = read_all(world.store)
    first = world.listed(FOLDER)[0]["SNAPSHOT"]
    data = (world.files / "changes").read_bytes()
    (world.files / "changes").write_bytes(data[::-1])
    (pack,) = find_packs(world.store)
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        frame = reader.record(reader.find(z.digest_pages(z.hash_pages(data)))[0])
    break_byte(pack, frame.data_offset + frame.stored // 4)
    break_byte(pack, frame.data_offset + 3 * frame.stored // 4)
    world.run("repair", "--reserve", "0")
    key = (FOLDER, first, "files/changes")
    assert key in find_lost(before, world.store)
    world.sweep("--reserve", "0")
    assert find_lost(before, world.store) == {key}
    code, report = verify(world.store)
    assert (code, list_harmed(report, before, world.store), report["marked"]) == (1, {key}, True)
    assert ["damaged" in row["NOTE"] for row in world.listed(FOLDER)] == [True, False]
    world.run("restore", FOLDER, "--to", "new")
    assert (world.path / "new/files/changes").read_bytes() == data[::-1]
    world.run("restore", FOLDER, "--at", first, "--to", "old", code=4)
    assert (world.path / "old/files/stays").read_bytes() == (world.files / "stays").read_bytes()


@pytest.mark.parametrize("kept", ["sources", "patches"])
def test_pack_put_back_by_the_user_heals(small: World, kept: str) -> None:
    """From a copy of the store elsewhere, after it was lost and repair had marked what was in it."""
    before = read_all(small.store)
    plain = find_plain_pack(small)
    packs = [plain] if kept == "patches" else [pack for pack in find_packs(small.store) if pack != plain]
    data = {pack: pack.read_bytes() for pack in packs}
    for pack in packs:
        pack.unlink()
    repair(small.store)
    assert verify(small.store)[0] == 1
    for pack in packs:
        pack.write_bytes(data[pack])
    code, report = verify(small.store)
    assert find_lost(before, small.store) == set()
    assert (code, report["harmed"]) == (0, [])
    check_repaired(small.store, before, set())


def test_lost_pack_that_is_back_restores_at_once(small: World) -> None:
    """A disk that was not mounted: no repair, no verify between."""
    before = read_all(small.store)
    pack = find_plain_pack(small)
    pack.rename(small.path / "elsewhere")
    assert find_lost(before, small.store)
    (small.path / "elsewhere").rename(pack)
    assert find_lost(before, small.store) == set()


def test_pack_that_is_sound_again_is_left_where_it_is(small: World) -> None:
    """Found damaged once, as by a bad cable; read without fault now."""
    (pack, *_) = find_packs(small.store)
    data = pack.read_bytes()
    break_content(pack)
    assert verify(small.store)[0] == 4
    pack.write_bytes(data)
    repair(small.store)
    assert pack.read_bytes() == data
    assert not (small.store / "aside").exists()


def test_pack_that_is_sound_again_is_no_damage(small: World) -> None:
    """A look at all of the store that finds all well has the last word."""
    (pack, *_) = find_packs(small.store)
    data = pack.read_bytes()
    break_content(pack)
    assert verify(small.store)[0] == 4
    pack.write_bytes(data)
    code, report = verify(small.store)
    assert (code, report["damaged"]) == (0, {})


def test_store_without_any_pack_begins_anew(small: World) -> None:
    """All packs lost: the next sweep stores all again; the snapshots of before stay, marked."""
    for pack in find_packs(small.store):
        pack.unlink()
    small.run("repair")
    small.run("verify", code=1)
    small.node()
    small.sweep("--reserve", "64")
    back = small.restore() / "files"
    assert (back / "base.db").read_bytes() == (small.files / "base.db").read_bytes()
    assert len(small.listed(FOLDER)) == 3
    code, report = verify(small.store)
    assert (code, report["marked"]) in ((0, True), (1, True))


# ---- interrupted ----


def damage_all(store: Path) -> None:
    """Damage a pack, node.json and progress.json; all versions can be saved."""
    (plain,) = (pack for pack in find_packs(store) if not has_patches(pack))
    break_byte(plain, 3, "removed")
    break_byte(store / FOLDER / "node.json", 40)
    break_byte(store / FOLDER / "progress.json", 40)


def check_interrupted(store: Path, before: Restored) -> None:
    """Repair again after an interruption: as if there had been none."""
    repair(store)
    assert find_lost(before, store) == set()
    assert verify(store)[0] == 0
    assert "put aside" not in repair(store)
    with contextlib.closing(z.open_store(str(store))) as opened:  # what a kill left is removed by the next sweep
        assert set(map(str, store.rglob(".zbackup-tmp-*"))) <= set(z.plan_leftovers(opened).paths)


def test_repair_killed_at_any_time_is_run_again(small: World) -> None:
    """SIGKILL after a time by chance; the damage is such that nothing need be lost."""
    seed = int(os.environ.get("ZBACKUP_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    chance = random.Random(seed)
    tree, before = save_tree(small.store), read_all(small.store)
    flags = [sys.executable, str(PROGRAM), "repair", "--reserve", "64"]
    began = time.monotonic()
    damage_all(small.store)
    subprocess.run(flags, cwd=small.path, env=small.env, check=True, capture_output=True)
    span = time.monotonic() - began
    killed = 0
    for _ in range(8):
        load_tree(small.store, tree)
        damage_all(small.store)
        damaged = {f: d for f, d in save_tree(small.store).items() if f.startswith("packs/") or "progress" in f}
        with subprocess.Popen(
            flags, cwd=small.path, env=small.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            time.sleep(chance.uniform(0.3, 1) * span)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        check_interrupted(small.store, before)
        assert find_moved(damaged, small.store) == set()
    assert killed > 2


@pytest.mark.parametrize("name", ["node.json", "progress.json"])
def test_repair_that_the_disk_stops_is_run_again(small: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Before the move of one file to aside/."""
    before = read_all(small.store)
    damage_all(small.store)
    stop_at(small, monkeypatch, name)
    check_interrupted(small.store, before)


def stop_at(small: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk fail while repair puts a file aside."""
    real, stopped = z.put_aside, []

    def fail(store: z.Store, path: str) -> str:
        if path.endswith(name):
            stopped.append(path)
            raise z.StoreError("the disk fails")
        return real(store, path)

    with monkeypatch.context() as patch:
        patch.setattr(z, "put_aside", fail)
        assert command(small.store, "repair", "--reserve", "64")[0] == 4
    assert stopped


def test_snapshot_is_saved_once_however_often_repair_is_interrupted(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = min((small.store / FOLDER / "snapshots").iterdir())
    break_byte(path, 40)
    stop_at(small, monkeypatch, path.name)
    repair(small.store)
    assert [row["GRADE"] for row in small.listed(FOLDER)].count("partial") == 1


# ---- what repair does not do ----


def test_dry_run_changes_nothing(small: World) -> None:
    """It says what would be done; 4 where something would."""
    assert "dry run" in small.run("repair", "--dry-run").stdout
    damage_all(small.store)
    (small.store / FOLDER / "latest/files/text").write_text("changed")
    (small.store / "zbackup.json").rename(small.path / "z")
    small.run("repair", "--dry-run", code=4)
    (small.path / "z").rename(small.store / "zbackup.json")
    tree = save_tree(small.store)
    done = small.run("repair", "--dry-run", code=4)
    assert "make it anew or put it aside" in done.stdout
    assert "write it anew" in done.stdout
    now = save_tree(small.store)
    changed = {file for file in tree.keys() | now.keys() if tree.get(file) != now.get(file)}
    assert {file for file in changed if not file.startswith("damage/")} <= {"verified.json", "index.sqlite"}


def test_repair_of_what_is_no_store(world: World) -> None:
    world.store.mkdir()
    (world.store / "photo").write_text("mine")
    done = world.run("repair", code=4)
    assert "not a zbackup store" in done.stderr
    assert os.listdir(world.store) == ["photo"]


def test_repair_leaves_a_store_of_a_newer_format_alone(small: World) -> None:
    """Its zbackup.json is whole, and says what this program does not know."""
    data = z.encode_file({"id": "0" * 32, "features": ["of tomorrow"]})
    (small.store / "zbackup.json").write_bytes(data)
    assert "use a newer one" in small.run("repair", code=4).stderr
    assert (small.store / "zbackup.json").read_bytes() == data


@pytest.mark.parametrize("how", ["shared", "exclusive"])
def test_repair_wants_the_store_for_itself(small: World, how: str) -> None:
    with held(small.store / "lock", how):
        tree = save_tree(small.store)
        assert "try again later" in small.run("repair", "--lock-wait", "0s", code=4).stderr
        assert save_tree(small.store) == tree


def test_repair_of_a_sound_store_changes_nothing(small: World) -> None:
    check_repaired(small.store, read_all(small.store), set())
    assert not (small.store / "aside").exists()


def test_damaged_lost_json_is_made_anew(small: World) -> None:
    """What is lost is found out again from the packs and the snapshots."""
    before = read_all(small.store)
    find_plain_pack(small).unlink()
    repair(small.store)
    lost = find_lost(before, small.store)
    path = small.store / "damage/lost.json"
    digests = set(json.loads(path.read_text())["digests"])
    break_byte(path, 60)
    code, report = verify(small.store)
    assert (code, report["marked"], list(report["files"])) == (4, False, [str(path)])
    repair(small.store)
    assert set(json.loads(path.read_text())["digests"]) == digests
    check_repaired(small.store, before, lost)


def test_index_that_names_packs_of_another_store_is_made_anew(small: World) -> None:
    """Packs that only the index knows count as lost until repair; then they are forgotten."""
    before = read_all(small.store)
    with contextlib.closing(z.open_store(str(small.path / "other"), create=True)) as other:
        writer = z.PackWriter(other.packs, other.index, z.ZLIB, 1)
        writer.put_chunk(b"of another store")
        writer.seal()
    shutil.copy(small.path / "other/index.sqlite", small.store / "index.sqlite")
    assert verify(small.store)[0] == 4
    repair(small.store)
    check_repaired(small.store, before, set())


def test_patch_that_nothing_names_any_more_is_no_loss(world: World) -> None:
    """What it draws from was pruned, and its own pack was not rewritten: repair has nothing to tell of."""
    world.node("--margin", "0")
    flags = ("--no-latest", "--reserve", "0")
    older = os.urandom(1 << 20)
    for data in (older, b"two" + older[3:], os.urandom(1 << 20)):
        (world.files / "a").write_bytes(data)
        if data.startswith(b"two"):
            (world.files / "b").write_bytes(os.urandom(1 << 20))  # so that the pack of the patch stays
        world.sweep(*flags)
    world.run("prune", "--keep", "last 1", "--grace", "0s", "--reserve", "0")
    assert any(has_patches(pack) for pack in find_packs(world.store))
    assert "are lost" not in world.run("repair", "--reserve", "0").stdout
    assert not (world.store / "damage/lost.json").exists()
    world.run("verify")


def test_repair_of_a_node_that_is_called_latest(world: World) -> None:
    for at in (NOON, NOON + 10**9):
        last = make_snapshot(world.store, [(describe("a"), b"content")], at=at, node="latest")
    path = world.store / "latest/snapshots" / f"{last.name}.json"
    path.write_bytes(path.read_bytes()[:-9])
    world.run("verify", code=4)
    world.run("repair")
    world.run("verify")


def test_snapshot_that_the_disk_does_not_give_is_not_put_aside(world: World) -> None:
    """It may give it tomorrow; until then it keeps what it names, and the sentence says which file it is."""
    make_snapshot(world.store, [(describe("a"), b"content")])
    (path,) = (world.store / FOLDER / "snapshots").iterdir()
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        path.unlink()
        path.mkdir()
        with pytest.raises(z.StoreError, match=re.escape(f"{path} cannot be read: Is a directory")):
            z.salvage_snapshot(reader, store.node(FOLDER), str(path))
