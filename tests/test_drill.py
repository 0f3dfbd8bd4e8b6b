"""Drill: a restore for practice, compared and checked; it remembers when it last succeeded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FOLDER, PROGRAM, World, halted, held, make_database
from test_restore import describe, make_snapshot
from test_verify import break_content, command, copy_small_world, find_packs, has_patches, save_tree

import zbackup as z


@pytest.fixture
def small(world: World) -> World:
    """A store of some kilobytes with every kind of file."""
    return copy_small_world(world)


def drill(world: World, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """Run a drill; returns its JSON report."""
    found: list[dict[str, Any]] = json.loads(world.run("drill", "--json", *arguments, code=code).stdout)
    return found


def load_succeeded(world: World) -> dict[str, int]:
    """Return when the last drill of each node succeeded."""
    times: dict[str, int] = json.loads((world.store / "drill.json").read_text())["times"]
    return times


def damage_newest(world: World) -> None:
    """Damage what the newest database is made of."""
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        last = next(store.node(FOLDER).newest())
        (entry,) = (entry for entry in z.list_entries(reader, last.blocks) if entry.stat.path == b"files/base.db")
        place = reader.find(reader.runs(next(c for c in entry.content.chunks if isinstance(c, bytes)))[0].source)[0]
        record = reader.record(place)
    pack = world.store / "packs" / place.pack[:2] / f"{place.pack}.pack"
    data = bytearray(pack.read_bytes())
    data[record.data_offset + record.stored // 2] ^= 1
    pack.write_bytes(data)


def test_drill_that_succeeds(small: World) -> None:
    """All files of the newest version, the database among them; nothing of it is left."""
    (small.store / "drill.json").unlink()
    scratch = small.path / "scratch"
    scratch.mkdir()
    tree = save_tree(small.store)
    done = small.run("drill", "--to", "scratch")
    assert done.stderr == ""
    assert re.fullmatch(
        r"drill: 127\.0\.0\.9: 6 files \(\S+ \w+\) of 2\S+Z(-\d)? restored and compared, "
        r"integrity_check of files/base\.db ok, \S+( \w+)?\n",
        done.stdout,
    )
    assert list(scratch.iterdir()) == []
    now = save_tree(small.store)
    assert {file: now[file] for file in tree if file != "index.sqlite"} == {
        file: data for file, data in tree.items() if file != "index.sqlite"
    }
    assert now.keys() - tree.keys() == {"drill.json"}
    assert load_succeeded(small).keys() == {FOLDER}
    assert small.run("drill", "--quiet").stdout == ""


def test_drill_in_json(small: World) -> None:
    before = load_succeeded(small)[FOLDER]
    (found,) = drill(small)
    newest = small.listed(FOLDER)[-1]["SNAPSHOT"]
    assert (found["node"], found["snapshot"], found["files"]) == (FOLDER, newest, 6)
    assert (found["database"], found["problems"]) == ("files/base.db", [])
    assert found["succeeded"] == load_succeeded(small)[FOLDER] > before
    sizes = (path.stat().st_size for path in small.files.rglob("*") if path.is_file() and not path.is_symlink())
    assert found["size"] == sum(sizes)
    assert load_succeeded(small)[FOLDER] > before


def test_sample_of_a_drill(world: World) -> None:
    """So many files by chance, others each time, and always the database that was written last."""
    for number in range(30):
        (world.files / f"file {number}").write_text(str(number))
    make_database(world.files / "old.db", 10).close()
    make_database(world.files / "new.db", 10).close()
    os.utime(world.files / "old.db", (1, 1))
    node = world.node()
    world.sweep("--reserve", "0")
    node.stop()
    for count in (1, 3, 100):
        (found,) = drill(world, "--sample", str(count))
        assert found["database"] == "files/new.db"
        assert count <= found["files"] <= count + 1 or (count, found["files"]) == (100, 32)
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        entries = list(z.list_entries(reader, next(store.node(FOLDER).newest()).blocks))
    chosen = [entry.key for _ in range(200) for entry in z.choose_files(entries, 3)]
    assert set(chosen) == {entry.key for entry in entries if entry.stat.kind == "file"}
    counts = [chosen.count(key) for key in set(chosen) if b"new.db" not in key]
    assert 2 < min(counts) <= max(counts) < 60  # 19 expected of each


def test_drill_finds_damage_and_tells_of_the_last_success(small: World) -> None:
    """Exit code 4; when it succeeded last stays what it was."""
    before = load_succeeded(small)[FOLDER]
    damage_newest(small)
    done = small.run("drill", code=4)
    assert re.search(
        r"^drill: 127\.0\.0\.9: FAILED with 2\S+; the last drill that succeeded was at 20\d\d-", done.stderr, re.M
    )
    assert re.search("^  .* is damaged: ", done.stderr, re.MULTILINE)
    assert done.stdout == ""
    (found,) = drill(small, code=4)
    assert found["succeeded"] == before
    assert found["problems"]
    assert load_succeeded(small) == {FOLDER: before}
    (small.store / "drill.json").unlink()
    assert "none has succeeded yet" in small.run("drill", code=4).stderr
    assert load_succeeded(small) == {}


def test_lost_block_of_entries_fails_a_drill(small: World) -> None:
    """Whichever pack is lost, the newest version suffers or not: the drill says so, as a restore does."""
    for pack in find_packs(small.store):
        moved = small.path / "elsewhere"
        pack.rename(moved)
        code = small.run("restore", FOLDER, "--to", pack.stem, code=None).returncode
        assert code == 4  # a lost pack is told of by each command
        assert small.run("drill", code=4).stderr
        moved.rename(pack)
        shutil.rmtree(small.store / "damage", ignore_errors=True)
    small.run("drill")


@pytest.mark.parametrize("grade", ["stable", "torn"])
def test_integrity_check_finds_a_bad_database(world: World, grade: str) -> None:
    """Restored bit by bit, and no database all the same; where that was told when it was copied, it is not counted.

    A node looks at a database that it copies: one that calls itself sound and is not comes from elsewhere.
    """
    data = bytearray(4096 * 4)
    with contextlib.closing(make_database(world.path / "made.db", 200)):
        data[:] = (world.path / "made.db").read_bytes()
    data[4096:4120] = b"\xff" * 24
    (world.files / "base.db").write_bytes(data)
    node = world.node()
    assert world.sweep("--reserve", "0", code=1)["nodes"][0]["snapshot"]["grade"] == "torn"
    node.stop()
    with contextlib.closing(z.open_store(str(world.store))) as store:
        folder = store.node(FOLDER)
        last = next(folder.newest())
        writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
        blocks = z.BlockWriter(writer)
        with contextlib.closing(store.reader()) as reader:
            for entry in z.list_entries(reader, last.blocks):
                if entry.stat.database:
                    read = re.sub(rb'"grade":"\w+"', b'"grade":"%s"' % grade.encode(), entry.read)
                    assert b'"grade":"%s"' % grade.encode() in read
                    entry = z.Entry(entry.line, read)
                blocks.put(entry)
        new = z.replace(last, blocks=blocks.close(), name="2040-01-01T00-00-00Z", sequence=9, grade=grade)
        writer.seal()
        folder.save_snapshot(new)
    (found,) = drill(world, code=0 if grade == "torn" else 4)
    assert (found["snapshot"], found["files"]) == (new.name, 1)
    assert found["database"] == ("" if grade == "torn" else "files/base.db")
    assert ["integrity_check says" in problem["message"] for problem in found["problems"]] == (
        [] if grade == "torn" else [True]
    )


def test_drill_of_an_empty_store(world: World) -> None:
    """Nothing to restore: 5, as where nobody answered."""
    world.run(*world.server_flags("--reserve", "0"), code=5)
    assert drill(world, code=5) == []


def test_drill_of_a_node_without_files(world: World) -> None:
    world.node()
    world.sweep("--reserve", "0")
    (found,) = drill(world, code=5)
    assert (found["files"], found["succeeded"]) == (0, 0) and load_succeeded(world) == {}


def test_first_drill_tells_when_it_succeeded(small: World) -> None:
    (found,) = drill(small)
    assert found["succeeded"] == load_succeeded(small)[FOLDER] > 0


def test_drill_of_a_hole_does_not_read_it(world: World) -> None:
    with open(world.files / "image", "wb") as image:
        image.write(b"x")
        image.truncate(4 << 40)
    world.node()
    world.sweep("--reserve", "0")
    assert drill(world)[0]["files"] == 1  # 4 TiB: else this takes hours
    world.run("verify")


def test_drill_of_a_node_that_has_no_whole_version(small: World) -> None:
    """A copy that was cut off is no version to restore; an older whole one is."""
    with contextlib.closing(z.open_store(str(small.store))) as store:
        folder = store.node(FOLDER)
        last = next(folder.newest())
        cut = z.replace(last, name="2040-01-01T00-00-00Z", sequence=9, grade="partial", cut_off="the node went away")
        folder.save_snapshot(cut)
    (found,) = drill(small)
    assert found["snapshot"] == last.name
    for path in (small.store / FOLDER / "snapshots").iterdir():
        if path.stem != cut.name:
            path.unlink()
    assert drill(small, code=5) == []


def test_drill_of_several_nodes(world: World) -> None:
    """Each on its own: one that fails does not end the others', nor hides their success."""
    for last in (9, 10, 11):
        files = world.path / f"files{last}"
        files.mkdir()
        make_database(files / "base.db", 100).close()
        (files / "data").write_bytes(os.urandom(5000))
        flags = ("--file", f"files{last}", "--state", f"state{last}")
        world.node(*flags, address=f"127.0.0.{last}")
        world.sweep("--reserve", "0", "--range", str(last))
    for node in world.nodes:
        node.stop()
    assert [found["node"] for found in drill(world)] == [f"127.0.0.{last}" for last in (10, 11, 9)]
    before = load_succeeded(world)
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        (entry,) = (
            entry
            for entry in z.list_entries(reader, next(store.node("127.0.0.10").newest()).blocks)
            if entry.stat.path.endswith(b"data")
        )
        (place,) = reader.find(next(c for c in entry.content.chunks if isinstance(c, bytes)))
    break_content(world.store / "packs" / place.pack[:2] / f"{place.pack}.pack")
    found = drill(world, code=4)
    assert [bool(node["problems"]) for node in found] == [True, False, False]
    now = load_succeeded(world)
    assert [now[name] > before[name] for name in sorted(now)] == [False, True, True]


def test_links_special_files_and_odd_names(world: World) -> None:
    """Only files are restored; their names are shown so that a terminal takes no harm, and are valid JSON."""
    odd = os.fsencode(world.files) + b"/\xff\n\x1b[31m odd"
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    with contextlib.closing(make_database(Path(os.fsdecode(odd + b".db")), 10)):
        pass
    (world.files / "hard").hardlink_to(os.fsdecode(odd)) if sys.version_info >= (3, 10) else os.link(
        odd, os.fsencode(world.files) + b"/hard"
    )
    (world.files / "link").symlink_to("nowhere")
    (world.files / "out").symlink_to("/etc/passwd")
    os.mkfifo(world.files / "fifo")
    (world.files / "closed").mkdir(mode=0o700)
    (world.files / "closed/inner").write_text("inner")
    (world.files / "closed").chmod(0o500)
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(world.files)  # the path of a socket may be 108 bytes long
    listener.bind("socket")
    node = world.node()
    world.sweep("--reserve", "0", code=None)
    listener.close()
    node.stop()
    (world.path / "scratch").mkdir()
    (found,) = drill(world, "--to", "scratch")
    assert (found["files"], found["problems"]) == (4, [])
    assert found["database"] == r"files/\udcff\n\x1b[31m odd.db"
    assert list((world.path / "scratch").iterdir()) == []
    for pack in find_packs(world.store):
        with open(pack, "rb") as file:
            records = list(z.scan_records(file.fileno(), pack.stat().st_size))
        for number, record in enumerate(records):
            if record.stored > 500 and not has_patches(pack):
                break_content(pack, number)
    done = world.run("drill", code=4)
    assert b"\x1b" not in done.stderr.encode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_scratch_is_removed_when_interrupted(world: World, number: int) -> None:
    """In the middle of a restore of many files."""
    for count in range(20):
        (world.files / f"file {count}").write_bytes(b"%d" % count * 1000)
    node = world.node()
    world.sweep("--reserve", "0", "--no-latest")
    node.stop()
    scratch = world.path / "scratch"
    scratch.mkdir()
    with halted(world, "os.utime", 8, "drill", "--to", "scratch", "--sample", "20") as process:
        assert list(scratch.glob("*/files/*"))
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(scratch.iterdir()) == []
    assert not (world.store / "drill.json").exists()


def test_scratch_that_is_no_folder(small: World) -> None:
    """Said in one sentence that names it."""
    before = load_succeeded(small)
    done = small.run("drill", "--to", "not there", code=1)
    assert "not there" in done.stderr
    assert "--to" in done.stderr
    assert load_succeeded(small) == before


def test_scratch_that_is_full(small: World) -> None:
    """The store is not at fault; what was begun is removed."""
    scratch = small.path / "scratch"
    scratch.mkdir()
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=12k none scratch && "$@"; ls -A scratch >&2', "sh"]
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a small disk needs root and unshare")
    before = load_succeeded(small)
    done = subprocess.run(
        [*mount, sys.executable, str(PROGRAM), "drill", "--to", "scratch"],
        cwd=small.path,
        env=small.env,
        capture_output=True,
        text=True,
    )
    assert "No space left on device" in done.stderr
    assert "zbackup-drill-" not in done.stderr
    assert "Traceback" not in done.stderr
    assert load_succeeded(small) == before


def test_database_with_a_log_is_checked(world: World) -> None:
    """In WAL mode: the copy is one file, and sound."""
    connection = make_database(world.files / "base.db", 100, wal=True)
    connection.execute("INSERT INTO t (b) VALUES ('in the log')")
    connection.commit()
    world.node()
    world.sweep("--reserve", "0")
    connection.close()
    (found,) = drill(world)
    assert (found["database"], found["problems"]) == ("files/base.db", [])
    assert found["files"] in (1, 2, 3)


def test_drill_of_a_store_that_is_locked(small: World) -> None:
    with held(small.store / "lock", "exclusive"):
        assert "locked by another run" in small.run("drill", "--lock-wait", "0s", code=4).stderr


def test_damaged_drill_json_does_not_stop_a_drill(small: World) -> None:
    (small.store / "drill.json").write_bytes(b"{")
    small.run("drill")
    assert load_succeeded(small).keys() == {FOLDER}


def test_database_that_needs_what_only_its_program_has_is_not_bad(world: World) -> None:
    """An index with a collation of its own: nothing can be said, and nothing is."""
    with contextlib.closing(sqlite3.connect(world.files / "base.db", isolation_level=None)) as connection:
        connection.create_collation("own", lambda a, b: (a > b) - (a < b))
        connection.execute("CREATE TABLE t (a TEXT COLLATE own)")
        connection.execute("CREATE INDEX i ON t (a)")
        connection.execute("INSERT INTO t VALUES ('x'), ('y')")
    world.node()
    world.sweep("--reserve", "0")
    (found,) = drill(world)
    assert (found["database"], found["problems"]) == ("files/base.db", [])


def test_node_that_cannot_be_drilled_does_not_stop_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of room, which is counted without holes, or since what is stored of it is wrong."""
    size = 8 * z.CHUNK
    for node, stat, content in (
        ("10.0.0.1", describe("a"), b"a"),
        ("10.0.0.2", describe("sparse", size=size, sparse=True), z.Content(size, (size // z.CHUNK,), (), "stable")),
        ("10.0.0.3", describe("full"), os.urandom(size)),
        ("10.0.0.4", describe("a"), z.Content(1, (1 << 30,), (), "stable")),
        ("10.0.0.5", describe("a"), b"a"),
    ):
        make_snapshot(world.store, [(stat, content)], node=node)
    monkeypatch.setattr(z, "count_free", lambda path: 2 * z.CHUNK)
    code, out, _ = command(world.store, "drill", "--json")
    found = json.loads(out)
    assert code == 4 and load_succeeded(world).keys() == {"10.0.0.1", "10.0.0.2", "10.0.0.5"}
    assert [row["hindered"][:25] for row in found] == ["", "", "the drill needs 8.0 MiB, ", "", ""]
    assert [row["problems"] for row in found] == [[], [], [], [{"path": "", "message": "not a digest: 1073741824"}], []]
    shutil.rmtree(world.store / "10.0.0.4")
    code, _, err = command(world.store, "drill")
    assert code == 1 and err.startswith("drill: 10.0.0.3: not made: the drill needs 8.0 MiB, ")


def test_drill_of_folders_deeper_than_python_recurses(world: World) -> None:
    parts = [describe("/".join(["d"] * depth), "directory") for depth in range(1, 1500)]
    leaf = describe("/".join(["d"] * 1499 + ["leaf"]))
    make_snapshot(world.store, [*((stat, None) for stat in parts), (leaf, b"leaf")])
    (world.path / "scratch").mkdir()
    world.run("drill", "--to", "scratch")
    assert os.listdir(world.path / "scratch") == []
