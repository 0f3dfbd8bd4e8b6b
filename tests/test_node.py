"""Chapter 9, NODE, its second half: databases and the answers to READ."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, World, make_database, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_node_scan import ROOT, make_source, scan

import zbackup
from zbackup import CHUNK, PAGE, Ask, Files

MIB = b"\x01" * CHUNK


class Reader:
    """What a server gets of a node's files."""

    def __init__(self, base: Path, *files: str, **options: Any) -> None:
        # Every database is young, so that it is frozen, however slow the machine is.
        self.source = make_source(base, *files, **{"margin": 3600.0, **options})
        self.files = Files(self.source)

    def read(
        self, path: bytes, chunk: int = 0, base: bytes = b"", state: list[int] | None = None, **more: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Return the answer to a READ; `base` is what the server has of the chunk."""
        fields, parts = self.files.read(Ask(path, chunk, state or [], zbackup.hash_pages(base), **more))
        return fields, b"".join(parts)

    def copy(self, path: bytes) -> tuple[dict[str, Any], bytes]:
        """Read all of a file; returns the first answer and the content."""
        first, data = self.read(path)
        fields, whole = first, bytearray()
        while len(whole) < first.get("size", 0):
            assert fields["status"] in ("whole", "zeros"), fields
            whole += data or bytes(min(fields["count"] * CHUNK, first["size"] - len(whole)))
            fields, data = self.read(path, len(whole) // CHUNK)
        return first, bytes(whole)

    def close(self) -> None:
        self.files.close()
        self.source.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path


def copy(base: Path, path: bytes = b"files/bd", **options: Any) -> tuple[dict[str, Any], bytes]:
    reader = Reader(base, **options)
    try:
        return reader.copy(path)
    finally:
        reader.close()


def status(base: Path, path: bytes) -> str:
    reader = Reader(base)
    try:
        return str(reader.read(path)[0]["status"])
    finally:
        reader.close()


def query(base: Path, data: bytes, sql: str) -> list[Any]:
    """Return what the copied database `data` says; it must be sound."""
    path = base / f"query-{random.random()}"
    path.write_bytes(data)
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def fingerprint(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time and content of each file of a folder."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def run_child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


# ---- databases: which files are ----


def test_database_recognised_by_its_header(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    (tree / "files/cut").write_bytes((tree / "files/bd").read_bytes()[:1000])
    (tree / "files/text").write_bytes(b"SQLite format 3" + b" " * 4081)
    (tree / "files/empty").touch()
    (tree / "files/folder").mkdir()
    listed = scan(tree)
    assert [path for path in listed if listed[path].database] == [b"files/bd"]
    assert listed[b"files/bd"].wal == ()


def test_companions_left_out_only_beside_a_database(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    (tree / "files/notes").write_text("no database")
    heads = {"-wal": "377f0682", "-shm": "00", "-journal": "d9d505f920a163d7", "-walrus": "00"}
    for name in ("bd", "notes", "nothing"):
        for end, head in heads.items():
            (tree / f"files/{name}{end}").write_bytes(bytes.fromhex(head) + b"data")
    (tree / "files/dir-wal").mkdir()
    left_out = {b"files/bd-wal", b"files/bd-shm", b"files/bd-journal"}
    there = {b"files/" + os.fsencode(path.name) for path in (tree / "files").iterdir()}
    assert set(scan(tree)) == there - left_out | {b"files"}


@pytest.mark.parametrize("end", ["wal", "journal"])
def test_companions_by_name_alone_are_files_like_others(tree: Path, end: str) -> None:
    """A diary is called so, beside a database of the same name; a log that is done holds nothing."""
    make_database(tree / "files/trip").close()
    path = tree / f"files/trip-{end}"
    for content, there in (
        (b"day one", True),
        (b"", False),
        (bytes(512), False),
        (zbackup.LOG_HEADS[end.encode()], False),
    ):
        path.write_bytes(content)
        assert (os.fsencode(f"files/trip-{end}") in scan(tree)) == there, content


def test_companions_not_readable(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    (tree / "files/bd-wal").write_bytes(zbackup.LOG_HEADS[b"wal"])
    assert status(tree, b"files/bd-wal") == "gone"


@pytest.mark.parametrize("size", [1000, 8192])
def test_companions_of_what_is_no_database_kept(tree: Path, size: int) -> None:
    (tree / "files/bd").write_bytes(zbackup.DATABASE_MAGIC + b"\xaa" * (size - 16))
    (tree / "files/bd-journal").write_text("the only way to mend it")
    assert copy(tree)[0]["grade"] == "stable"
    assert b"files/bd-journal" in scan(tree)


# ---- databases: read where they lie, when nobody writes them ----


def make_later(seconds: float = 60) -> zbackup.Clock:
    """Return a clock that is ahead, so that all files are old."""
    clock = zbackup.make_clock()
    return replace(clock, now=lambda: clock.now() + int(seconds * 1e9))


@pytest.fixture
def reader(tree: Path) -> Iterator[Reader]:
    """A node for which all files are old."""
    reader = Reader(tree, clock=make_later(), margin=0.0)
    yield reader
    reader.close()


@pytest.mark.parametrize("wal", [False, True])
def test_database_at_rest_read_where_it_lies(tree: Path, reader: Reader, wal: bool) -> None:
    make_database(tree / "files/bd", rows=20000, wal=wal).close()
    before = fingerprint(tree / "files")
    (tree / "spool").chmod(0o500)
    (tree / "spool").rmdir()  # there is nowhere to put a copy
    fields, data = reader.copy(b"files/bd")
    assert (fields["status"], fields["grade"]) == ("whole", "stable")
    assert data == before["bd"][1]
    assert "note" not in reader.read(b"files/bd", (len(data) - 1) // CHUNK)[0]
    assert fingerprint(tree / "files") == before, "nothing is left beside it"


def test_database_read_where_it_lies_does_not_hold_its_writers_up(tree: Path, reader: Reader) -> None:
    connection = make_database(tree / "files/bd", rows=20000)
    state = reader.read(b"files/bd")[0]["state"]
    connection.execute("INSERT INTO t VALUES (99999, 'x')")
    connection.commit()
    connection.close()
    fields, _ = reader.read(b"files/bd", 1)
    assert fields["state"] != state, "the server reads it again"
    fields, data = reader.copy(b"files/bd")
    assert fields["grade"] == "frozen", "not in place a second time"
    assert query(tree, data, "SELECT b FROM t WHERE a = 99999") == [("x",)]


@pytest.mark.parametrize("age", [1.9, 2.1])
def test_young_database_is_frozen(tree: Path, age: float) -> None:
    """Within MARGIN a second change need not show in its times, whatever --margin says."""
    make_database(tree / "files/bd").close()
    found = (tree / "files/bd").stat()
    clock = replace(zbackup.make_clock(), now=lambda: found.st_ctime_ns + int(age * 1e9))
    assert copy(tree, clock=clock, margin=0.0)[0]["grade"] == ("frozen" if age < zbackup.MARGIN else "stable")


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_database_in_use_is_frozen(tree: Path, reader: Reader, mode: str) -> None:
    """Its log is there, or its journal, or a lock."""
    connection = make_database(tree / "files/bd", wal=mode == "WAL")
    connection.execute("INSERT INTO t VALUES (5000, 'late')")
    if mode == "WAL":
        connection.commit()
    fields, data = reader.copy(b"files/bd")
    assert (fields["grade"], fields.get("note")) == ("frozen", None)
    assert len(query(tree, data, "SELECT b FROM t WHERE a = 5000")) == (mode == "WAL")
    connection.close()


def test_database_without_a_journal_locked_by_its_writer(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    with held(tree / "files/bd"):
        fields, _ = copy(tree, clock=make_later(), margin=0.0, locked_timeout=0.3)
    assert "locked" in fields["error"]


def test_database_that_changes_while_it_is_opened_is_frozen(
    tree: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_database(tree / "files/bd").close()
    opened = zbackup.open_database

    def open_and_change(origin: zbackup.Origin, way: str, *rest: Any) -> sqlite3.Connection:
        connection = opened(origin, way, *rest)
        if way == zbackup.IMMUTABLE:
            os.utime(tree / "files/bd", ns=(1, 1))
        return connection

    monkeypatch.setattr(zbackup, "open_database", open_and_change)
    assert reader.read(b"files/bd")[0]["grade"] == "frozen"


def test_database_that_changes_before_it_is_read_where_it_lies_is_frozen(
    tree: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_database(tree / "files/bd").close()
    at_rest = zbackup.open_at_rest

    def open_and_change(*arguments: Any) -> Any:
        found = at_rest(*arguments)
        os.utime(tree / "files/bd", ns=(1, 1))
        return found

    monkeypatch.setattr(zbackup, "open_at_rest", open_and_change)
    assert reader.read(b"files/bd")[0]["grade"] == "frozen"


@pytest.mark.parametrize("rows", [500, 20000])
def test_damage_in_a_database_at_rest_noted_at_its_end(tree: Path, reader: Reader, rows: int) -> None:
    make_database(tree / "files/bd", rows=rows).close()
    with open(tree / "files/bd", "r+b") as file:
        file.seek(10 * PAGE)
        file.write(b"\xff" * PAGE)
    last = ((tree / "files/bd").stat().st_size - 1) // CHUNK
    notes = [reader.read(b"files/bd", number)[0].get("note", "") for number in range(last + 1)]
    assert [note.partition(":")[0] for note in notes] == [""] * last + [zbackup.DAMAGED]


def test_check_of_a_database_ends_with_its_reading(tree: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    make_database(tree / "files/bd", rows=20000).close()
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    ended: list[str] = []

    def check(connection: sqlite3.Connection) -> str:
        try:
            connection.execute(endless).fetchall()
        except sqlite3.OperationalError as error:
            ended.append(str(error))
        return ""

    monkeypatch.setattr(zbackup, "run_check", check)
    reader.read(b"files/bd")
    assert ended == []
    reader.files.close()
    assert ended == ["interrupted"]


# ---- databases: what a copy holds ----

PRAGMAS = {
    "plain": (),
    "wal": ("journal_mode = WAL",),
    "persist": ("journal_mode = PERSIST",),
    "page 512": ("page_size = 512",),
    "page 65536": ("page_size = 65536",),
    "vacuum": ("auto_vacuum = INCREMENTAL",),
    "utf-16": ("encoding = 'UTF-16be'",),
    "ids": ("user_version = 77", "application_id = 78"),
}


@pytest.mark.parametrize("pragmas", PRAGMAS.values(), ids=PRAGMAS)
def test_database_at_rest_copied_bit_for_bit(tree: Path, pragmas: tuple[str, ...]) -> None:
    connection = sqlite3.connect(tree / "files/bd")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b)")
    connection.executemany("INSERT INTO t (b) VALUES (?)", ((os.urandom(300),) for _ in range(5000)))
    connection.commit()
    connection.execute("DELETE FROM t WHERE a % 3")  # leaves free pages
    connection.execute("CREATE INDEX i ON t (b)")
    connection.commit()
    connection.close()
    before = fingerprint(tree / "files")
    fields, data = copy(tree)
    assert fields["grade"] == "frozen"
    assert "note" not in fields
    assert data == before["bd"][1]
    assert fingerprint(tree / "files") == before, "the source is as it was, with nothing left beside it"


def test_database_at_rest_in_wal_mode_leaves_its_folder_alone(tree: Path) -> None:
    make_database(tree / "files/bd", wal=True).close()
    os.utime(tree / "files", ns=(0, 0))
    copy(tree)
    assert (tree / "files").stat().st_mtime_ns == 0


def test_wal_not_checkpointed_is_in_the_copy(tree: Path) -> None:
    connection = make_database(tree / "files/bd", wal=True)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("INSERT INTO t VALUES (5000, 'late')")
    connection.commit()
    before = (tree / "files/bd").read_bytes(), (tree / "files/bd-wal").read_bytes()
    fields, data = copy(tree)
    assert query(tree, data, "SELECT b FROM t WHERE a = 5000") == [("late",)]
    assert (fields["grade"], scan(tree)[b"files/bd"].state) == ("frozen", fields["state"])
    assert ((tree / "files/bd").read_bytes(), (tree / "files/bd-wal").read_bytes()) == before
    connection.close()


def test_wal_without_its_index_leaves_no_litter(tree: Path) -> None:
    connection = make_database(tree / "bd", wal=True)
    for name in ("bd", "bd-wal"):  # as a restore or a crash of the machine leaves them
        shutil.copyfile(tree / name, tree / "files" / name)
    connection.close()
    assert query(tree, copy(tree)[1], "SELECT count(*) FROM t") == [(1000,)]
    assert sorted(os.listdir(tree / "files")) == ["bd", "bd-wal"]


def test_empty_wal_counts_as_none(tree: Path) -> None:
    connection = make_database(tree / "files/bd", wal=True)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert (tree / "files/bd-wal").stat().st_size == 0
    fields, data = copy(tree)
    connection.close()
    assert (fields["state"][4:], fields["grade"], data) == ([], "frozen", (tree / "files/bd").read_bytes())


def test_uncommitted_is_not_in_the_copy(tree: Path) -> None:
    connection = make_database(tree / "files/bd")
    connection.execute("INSERT INTO t VALUES (5000, 'never')")
    assert query(tree, copy(tree)[1], "SELECT count(*) FROM t") == [(1000,)]
    connection.rollback()
    connection.close()


WRITER = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
number = 100000
while True:
    number += 1
    connection.execute("INSERT INTO t VALUES (?, ?)", (number, os.urandom(500)))
    if number == 100020:
        print("writing", flush=True)
"""


def newest_row(path: Path) -> int:
    """Return the newest committed row, through the small gaps that a busy writer leaves."""
    found: list[int] = []

    def look() -> bool:
        connection = sqlite3.connect(path, timeout=0)
        with contextlib.suppress(sqlite3.OperationalError):
            found.extend(connection.execute("SELECT max(a) FROM t").fetchone())
        connection.close()
        return bool(found)

    while not look():
        time.sleep(random.random() / 200)
    return found[0]


@pytest.mark.parametrize("mode", ["WAL", "DELETE", "TRUNCATE"])
def test_copy_beside_a_writer_without_pause(tree: Path, mode: str) -> None:
    connection = make_database(tree / "files/bd", rows=20000)
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.close()
    writer = run_child(WRITER, tree / "files/bd")
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        for _ in range(4):
            committed = newest_row(tree / "files/bd")
            fields, data = copy(tree)
            assert fields["grade"] == "frozen", fields
            assert "note" not in fields
            [(newest, count)] = query(tree, data, "SELECT max(a), count(*) FROM t")
            assert newest >= committed
            assert count == 20000 + newest - 100000, "no row is missing"
        assert writer.poll() is None, "the writer was not disturbed"
    finally:
        writer.kill()
        writer.communicate()


DYING = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 5")
connection.execute("BEGIN")
connection.execute("UPDATE t SET b = zeroblob(100)")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("wal", [False, True])
def test_copy_after_a_writer_was_killed(tree: Path, wal: bool) -> None:
    make_database(tree / "files/bd", rows=5000, wal=wal).close()
    whole = (tree / "files/bd").read_bytes()
    run_child(DYING, tree / "files/bd").communicate()
    before = fingerprint(tree / "files")
    assert "bd-wal" in before if wal else (before["bd"][1] != whole and "bd-journal" in before)
    fields, data = copy(tree)
    assert fields["grade"] == "frozen"
    assert "note" not in fields
    assert query(tree, data, "SELECT count(*) FROM t WHERE b != zeroblob(100)") == [(5000,)]
    after = fingerprint(tree / "files")
    for files in (before, after):
        files.pop("bd-shm", None)  # a reader may rebuild it
    assert after == before


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds a database."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def test_database_locked_for_too_long(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    with held(tree / "files/bd"):
        started = time.monotonic()
        fields, data = copy(tree, locked_timeout=0.3)
        took = time.monotonic() - started
    assert (fields["status"], data) == ("error", b"")
    assert "locked" in fields["error"]
    assert 0.3 <= took < 3


def test_database_locked_for_a_while(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    with held(tree / "files/bd") as holder:
        late = run_child("import os, sys, time; time.sleep(0.5); os.kill(int(sys.argv[1]), 9)", holder.pid)
        fields, data = copy(tree, locked_timeout=20)
        late.communicate()
    assert query(tree, data, "SELECT count(*) FROM t") == [(1000,)]
    assert fields["grade"] == "frozen"


def test_database_of_garbage_copied_as_a_plain_file(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    head = (tree / "files/bd").read_bytes()[: zbackup.DATABASE_HEAD]
    garbage = head + random.Random(1).randbytes(3 * CHUNK // 2 - len(head))
    (tree / "files/bd").write_bytes(garbage)
    fields, data = copy(tree)
    assert (fields["grade"], data) == ("stable", garbage)
    assert "copied as a plain file" in fields["note"]


def test_file_with_no_more_than_the_magic_is_a_plain_file(tree: Path) -> None:
    garbage = zbackup.DATABASE_MAGIC + random.Random(1).randbytes(8192 - 16)
    (tree / "files/bd").write_bytes(garbage)
    fields, data = copy(tree)
    assert (fields["grade"], data) == ("stable", garbage)
    assert "note" not in fields


def test_damaged_database_copied_with_a_note(tree: Path) -> None:
    make_database(tree / "files/bd", rows=5000).close()
    with open(tree / "files/bd", "r+b") as file:
        file.seek(20 * PAGE)
        file.write(b"\xff" * PAGE)
    fields, data = copy(tree)
    assert "damage" in fields["note"]
    assert data == (tree / "files/bd").read_bytes()


def test_database_with_a_collation_of_its_program_is_no_damage(tree: Path) -> None:
    connection = sqlite3.connect(tree / "files/bd")
    connection.create_collation("ours", lambda a, b: (a > b) - (a < b))
    connection.execute("CREATE TABLE t (a TEXT COLLATE ours)")
    connection.execute("CREATE INDEX i ON t (a)")
    connection.executemany("INSERT INTO t VALUES (?)", (("x",), ("y",)))
    connection.commit()
    connection.close()
    fields, data = copy(tree)
    assert data == (tree / "files/bd").read_bytes()
    assert "note" not in fields


def test_database_with_a_module_of_its_program_is_no_damage(tree: Path) -> None:
    connection = make_database(tree / "files/bd")
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "INSERT INTO sqlite_master VALUES ('table', 'v', 'v', 0, 'CREATE VIRTUAL TABLE v USING ours(a)')"
    )
    connection.commit()
    connection.close()
    fields, data = copy(tree)
    assert data == (tree / "files/bd").read_bytes()
    assert "note" not in fields


@pytest.mark.parametrize("wal", [False, True])
def test_database_with_an_odd_name(tree: Path, wal: bool) -> None:
    name = b"a?mode=memory#%41\n\xff bd"
    connection = make_database(tree / "plain", wal=wal)
    connection.close()
    shutil.copyfile(tree / "plain", os.path.join(os.fsencode(tree), b"files", name))
    fields, data = copy(tree, b"files/" + name)
    assert (fields["grade"], data) == ("frozen", (tree / "plain").read_bytes())
    assert os.listdir(os.fsencode(tree / "files")) == [name]


def test_database_deeper_than_sqlite_can_open(tree: Path) -> None:
    deep = tree / "files" / "/".join(["x" * 200] * 4)
    deep.mkdir(parents=True)
    make_database(tree / "bd").close()
    shutil.copyfile(tree / "bd", deep / "bd")
    fields, data = copy(tree, os.fsencode((deep / "bd").relative_to(tree)))
    assert (fields["grade"], data) == ("frozen", (tree / "bd").read_bytes())


def test_database_that_changes_beyond_sqlites_reach_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_database(tree / "files/bd").close()
    plain, path = zbackup._copy_plainly, str(tree / "files/bd")

    def copy_and_change(fd: int, target: str) -> None:
        plain(fd, target)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(zbackup, "_copy_plainly", copy_and_change)
    with open(path, "rb") as file, pytest.raises(OSError, match="changed while it was copied"):
        zbackup.recover_database(zbackup.Origin(path, file.fileno()), str(tree / "copy"), zbackup.make_clock())


EXCLUSIVE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA synchronous = OFF")
connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("INSERT INTO t VALUES (3000, 'x')")
print("open", flush=True)
while sys.argv[2] == "busy":
    connection.execute("UPDATE t SET b = randomblob(100) WHERE a = 1")
sys.stdin.read()
"""


@pytest.mark.parametrize("work", ["idle", "busy"])
def test_database_that_its_program_holds_for_itself(tree: Path, work: str) -> None:
    """Its log has no index, so it is copied plainly: only where nothing changes it, which its times must tell."""
    make_database(tree / "files/bd", rows=3000).close()
    holder = run_child(EXCLUSIVE, tree / "files/bd", work)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        assert not (tree / "files/bd-shm").exists()
        fields, data = copy(tree)
    finally:
        holder.kill()
        holder.communicate()
    if work == "idle":
        assert fields["grade"] == "frozen"
        assert query(tree, data, "SELECT count(*) FROM t") == [(3001,)]
    else:
        assert fields["status"] == "error"
        assert re.search("changed while it was copied|without a pause", fields["error"])


def test_database_copied_plainly_waits_for_the_grain_of_its_times(tree: Path) -> None:
    moment = [0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        moment[0] += int(seconds * 1e9)

    path = tree / "files/bd"
    make_database(path).close()
    (tree / "files/bd-journal").write_bytes(b"x")
    newest = max(zbackup.stat_database(str(path))[2][1:3])  # type: ignore[index]
    clock = zbackup.Clock(lambda: moment[0], time.monotonic, sleep)
    moment[0] = newest + 10**6
    assert zbackup.stat_settled(str(path), clock) == zbackup.stat_database(str(path))
    assert slept == [zbackup.GRAIN]
    restless = zbackup.Clock(lambda: newest + 10**6, time.monotonic, slept.append)
    with pytest.raises(OSError, match="without a pause"):
        zbackup.stat_settled(str(path), restless)
    assert len(slept) == 1 + zbackup.SETTLINGS


def test_log_beside_a_database_that_has_none_leaves_no_index(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    with contextlib.closing(make_database(tree / "logged", wal=True)):
        shutil.copyfile(tree / "logged-wal", tree / "files/bd-wal")
    fields, data = copy(tree)
    assert sorted(os.listdir(tree / "files")) == ["bd", "bd-wal"]
    assert fields["grade"] == "frozen"
    assert query(tree, data, "SELECT count(*) FROM t")


def test_unreadable_page_of_a_database_is_damage(tree: Path) -> None:
    """What SQLite reports of the disk is of the same class as what it says of an unknown collation."""

    class Failing:
        def execute(self, statement: str) -> None:
            raise sqlite3.OperationalError("disk I/O error")

    assert zbackup.run_check(Failing()) == "disk I/O error"  # type: ignore[arg-type]


def test_file_written_without_a_pause_is_noted(tree: Path) -> None:
    """Its times cannot tell whether it changed while it was read."""
    path = tree / "files/bd"
    path.write_bytes(b"1")

    def touch(seconds: float = 0) -> None:
        time.sleep(seconds)
        os.utime(path)

    clock = zbackup.Clock(time.time_ns, time.monotonic, touch)
    source = make_source(tree, clock=clock)
    reader = Files(source)
    touch()
    restless = reader.read(Ask(b"files/bd", 0, [], b""))[0]
    time.sleep(2 * zbackup.GRAIN)
    at_rest = reader.read(Ask(b"files/bd", 0, [], b""))[0]
    reader.close()
    source.close()
    assert "restless" not in at_rest and "restless" not in restless  # read twice alike
    path.write_bytes(bytes(2 * CHUNK))
    source = make_source(tree, clock=clock)
    reader = Files(source)
    touch()
    assert reader.read(Ask(b"files/bd", 0, [], b""))[0]["restless"]
    reader.close()
    source.close()


def test_small_file_that_two_readings_differ_of_is_restless(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree / "files/bd"
    path.write_bytes(b"1")
    read, found = zbackup.read_range, [b"1", b"2"]
    monkeypatch.setattr(zbackup, "read_range", lambda *given: found.pop(0) if found else read(*given))
    source = make_source(tree, clock=zbackup.Clock(lambda: path.stat().st_ctime_ns, time.monotonic, lambda s: None))
    reader = Files(source)
    fields, _ = reader.read(Ask(b"files/bd", 0, [], b""))
    reader.close()
    source.close()
    assert fields["restless"]


def test_database_at_rest_whose_times_cannot_tell(tree: Path) -> None:
    """It is opened, written and closed all the time: the copy is good where it equals what is read once more."""
    path = tree / "files/bd"
    make_database(path, wal=True).close()
    newest = path.stat().st_ctime_ns
    clock = zbackup.Clock(lambda: newest, time.monotonic, lambda seconds: None)
    with open(path, "rb") as file:
        origin = zbackup.Origin(str(path), file.fileno())
        assert zbackup.copy_database(origin, str(tree / "copy"), 1, clock) == ""
        assert (tree / "copy").read_bytes() == path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zbackup, "_are_equal", lambda path, other: False)
            with pytest.raises(OSError, match="opened and closed all the time"):
                zbackup.copy_database(origin, str(tree / "copy"), 1, clock)


def test_failed_try_to_copy_a_database_leaves_nothing_to_the_next(tree: Path) -> None:
    """SQLite would play the log of the one into the copy of the other."""
    path = tree / "files/bd"
    make_database(path).close()
    (tree / "work").mkdir()
    for end in ("", "-wal", "-journal"):
        (tree / f"work/copy{end}").write_bytes(os.urandom(100_000))
    with open(path, "rb") as file:
        origin = zbackup.Origin(str(path), file.fileno())
        assert zbackup.copy_database(origin, str(tree / "work/copy"), 1, zbackup.make_clock()) == ""
    assert (tree / "work/copy").read_bytes() == path.read_bytes()
    assert os.listdir(tree / "work") == ["copy"]


def test_log_that_cannot_be_opened_is_told_of(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a file of the user that only has the name: not left out without a word."""
    make_database(tree / "files/bd").close()
    (tree / "files/bd-wal").write_text("a file of the user")
    opened, numbers = os.open, [errno.EMFILE, errno.EACCES]

    def fail(name: Any, *arguments: Any, **options: Any) -> int:
        if name == b"bd-wal" and numbers:
            raise OSError(numbers.pop(0), "refused")
        return opened(name, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    clock = zbackup.Clock(time.time_ns, time.monotonic, lambda seconds: None)
    assert b"files/bd-wal" in [stat.path for stat in zbackup.scan(make_source(tree, clock=clock))]
    assert numbers == []


def test_frozen_copies_leave_nothing_in_the_spool(tree: Path) -> None:
    make_database(tree / "files/bd").close()
    (tree / "files/garbage").write_bytes(zbackup.DATABASE_MAGIC + b"\xaa" * 4080)
    copy(tree)
    copy(tree, b"files/garbage")
    assert os.listdir(tree / "spool") == []


def test_full_spool_is_an_error(tree: Path) -> None:
    make_database(tree / "files/bd", rows=20000).close()
    (tree / "spool").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tree / "spool"], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        fields, _ = copy(tree)
    finally:
        subprocess.run(["umount", tree / "spool"], check=True)
    assert fields["status"] == "error"
    assert "full" in fields["error"]


def test_two_sessions_copy_one_database_beside_a_writer(world: World) -> None:
    make_database(world.files / "bd", rows=20000).close()
    writer = run_child(WRITER, world.files / "bd")
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        world.node()
        servers = [world.server("--store", f"store-{number}") for number in range(3)]
        assert [server.process.wait(60) for server in servers] == [0, 0, 0], [server.output for server in servers]
    finally:
        writer.kill()
        writer.communicate()


# ---- answers to READ ----


def test_read_same_patch_whole(tree: Path) -> None:
    old = random.Random(1).randbytes(20 * PAGE + 100)
    reader = Reader(tree)
    path = tree / "files/a"
    path.write_bytes(old)
    assert reader.read(b"files/a", base=old)[0]["status"] == "same"
    new = bytearray(old)
    new[3 * PAGE] ^= 1
    new[5 * PAGE - 1] ^= 1
    new[-1] ^= 1
    path.write_bytes(new)
    fields, data = reader.read(b"files/a", base=old)
    assert (fields["status"], fields["runs"]) == ("patch", [[3, 2], [20, 1]])
    assert data == new[3 * PAGE : 5 * PAGE] + new[20 * PAGE :]
    assert fields["digest"] == zbackup.digest_pages(zbackup.hash_pages(new)).hex()
    path.write_bytes(random.Random(2).randbytes(20 * PAGE))
    assert reader.read(b"files/a", base=old)[0]["status"] == "whole"
    assert reader.read(b"files/a")[1] == path.read_bytes()
    reader.close()


def test_read_tells_of_a_chunk_that_is_not_nearly_the_same(tree: Path) -> None:
    old = random.Random(1).randbytes(20 * PAGE + 100)
    reader = Reader(tree)
    path = tree / "files/a"
    path.write_bytes(old)
    assert reader.read(b"files/a", base=old, tell=True)[0]["status"] == "same"
    for changed, status in ((5, "patch"), (6, "pages")):
        new = random.Random(2).randbytes(changed * PAGE) + old[changed * PAGE :]
        path.write_bytes(new)
        fields, data = reader.read(b"files/a", base=old, tell=True)
        assert fields["status"] == status
        assert reader.read(b"files/a", base=old)[0]["status"] == "patch"
    told = zbackup.decode_told(bytes.fromhex(fields["digest"]), fields["length"], data)
    assert len(data) == 21 * (zbackup.PAGE_HASH + zbackup.NEEDLE)
    assert told.hashes == zbackup.hash_pages(new)
    assert [told.needle(page) for page in range(21)] == [new[at : at + 16] for at in range(0, len(new), PAGE)]
    assert reader.read(b"files/a", tell=True)[1] == data  # also where the server has nothing
    reader.close()


def test_read_gives_the_part_that_is_needed(tree: Path) -> None:
    data = random.Random(1).randbytes(CHUNK + 2 * PAGE + 5)
    (tree / "files/a").write_bytes(data)
    reader = Reader(tree)
    first = reader.read(b"files/a", tell=True)[0]
    (tree / "files/new").write_bytes(b"another file")
    (tree / "files/new").rename(tree / "files/a")
    for chunk, need in ((0, ((0, PAGE), (3 * PAGE, 5 * PAGE))), (1, ((2 * PAGE, 2 * PAGE + 5),)), (1, ((0, CHUNK),))):
        fields, part = reader.read(b"files/a", chunk, need=need)
        assert fields["status"] == "part"
        assert fields["state"][::3] == first["state"][::3]  # size and inode of the file that was opened
        assert "digest" not in fields and "size" not in fields
        whole = data[chunk * CHUNK : (chunk + 1) * CHUNK]
        assert fields["length"] == len(whole)
        assert part == b"".join(whole[start:end] for start, end in need)
    assert reader.read(b"files/a", 2, need=((0, PAGE),))[0]["status"] == "end"
    reader.close()
    assert reader.read(b"files/a", need=((0, PAGE),))[0]["status"] == "lost"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=12), st.binary(max_size=12), st.integers(1, PAGE))
def test_patch_on_its_base_gives_the_new_chunk(old: bytes, new: bytes, cut: int) -> None:
    def spread(pages: bytes) -> bytes:
        return b"".join(bytes([page]) * PAGE for page in pages)[: len(pages) * PAGE - PAGE + cut]

    base, data = spread(old), spread(new)
    runs = zbackup.compare_pages(zbackup.hash_pages(data), zbackup.hash_pages(base), len(data))
    if runs is not None:
        made = bytearray(base[: len(data)].ljust(len(data)))
        for first, count in runs:
            made[first * PAGE : (first + count) * PAGE] = data[first * PAGE : (first + count) * PAGE]
        assert made == data
        assert sum(count for _, count in runs) * PAGE <= max(len(data), 2 * PAGE)


def test_read_zeros_and_end(tree: Path) -> None:
    (tree / "files/empty").touch()
    (tree / "files/zeros").write_bytes(bytes(CHUNK + 5))
    reader = Reader(tree)
    fields, data = reader.read(b"files/empty")
    assert (fields["status"], fields["size"], data) == ("end", 0, b"")
    for chunk in (0, 1):
        fields, data = reader.read(b"files/zeros", chunk)
        assert (fields["status"], fields["count"], data) == ("zeros", 1, b"")
    assert reader.read(b"files/zeros", 2)[0]["status"] == "end"
    assert reader.read(b"files/zeros", 1 << 40)[0]["status"] in ("end", "error")
    reader.close()


@pytest.mark.parametrize("name", [b"plain", b"sparse"])
def test_read_of_the_highest_chunk(tree: Path, name: bytes) -> None:
    (tree / "files/plain").write_bytes(MIB)
    with open(tree / "files/sparse", "wb") as file:
        file.truncate(CHUNK)
    reader = Reader(tree)
    reader.read(b"files/" + name)
    assert reader.read(b"files/" + name, zbackup.FILE_LIMIT // CHUNK)[0]["status"] in ("end", "error")
    reader.close()


def test_holes_skipped(tree: Path) -> None:
    with open(tree / "files/holes", "wb") as file:
        file.truncate(10 << 30)
        file.seek((5 << 30) + 7 * CHUNK + 100)
        file.write(b"data")
    reader = Reader(tree)
    started = time.process_time()  # a busy machine takes nothing of that
    chunk, answers = 0, []
    while chunk < 10240:
        fields, data = reader.read(b"files/holes", chunk)
        answers.append((chunk, fields["status"], data.strip(b"\0")))
        chunk += fields.get("count", 1)
    assert answers == [(0, "zeros", b""), (5127, "whole", b"data"), (5128, "zeros", b"")]
    assert time.process_time() - started < 1
    reader.close()


def test_read_gone_and_error(tree: Path) -> None:
    (tree / "files/folder").mkdir()
    (tree / "files/a").write_text("data")
    for path in (b"files", b"files/no", b"files/no/no", b"files/folder", b"files/a/b", b"etc/passwd", b"filesx", b"a"):
        assert status(tree, path) == "gone", path
    assert status(tree, b"files/" + b"x" * 256) == "error"


def test_read_lost(tree: Path) -> None:
    for number in range(6):
        (tree / f"files/{number}").write_bytes(MIB + b"more")
    reader = Reader(tree)
    assert reader.read(b"files/0", 1)[0] == {"status": "lost"}, "never begun"
    for number in range(5):
        reader.read(b"files/%d" % number)
    assert reader.read(b"files/0", 1)[0] == {"status": "lost"}, "four others were begun since"
    assert reader.read(b"files/1", 1)[1] == b"more"
    reader.close()


def test_state_tells_that_a_file_changed(tree: Path) -> None:
    path = tree / "files/a"
    path.write_bytes(MIB * 2)
    stat = scan(tree)[b"files/a"]
    reader = Reader(tree)
    first = reader.read(b"files/a", state=stat.state)[0]
    assert first["state"] == stat.state
    assert "line" not in first
    with open(path, "r+b") as file:
        file.seek(CHUNK)
        file.write(b"changed")
    second, data = reader.read(b"files/a", 1)
    assert data.startswith(b"changed")
    assert second["state"] != stat.state
    again = reader.read(b"files/a", state=stat.state)[0]
    assert zbackup.decode_stat(again["line"].encode()).state == again["state"] == second["state"]
    reader.close()


def test_file_that_shrinks_or_grows_while_read(tree: Path) -> None:
    for name in ("less", "more"):
        (tree / "files" / name).write_bytes(MIB * 3)
    reader = Reader(tree)
    first = {name: reader.read(b"files/" + name)[0] for name in (b"less", b"more")}
    os.truncate(tree / "files/less", CHUNK + 10)
    with open(tree / "files/more", "ab") as file:
        file.write(MIB)
    assert reader.read(b"files/less", 1)[1] == MIB[:10]
    fields, _ = reader.read(b"files/less", 2)
    assert (fields["status"], fields["state"] == first[b"less"]["state"]) == ("end", False)
    assert reader.read(b"files/more", 2)[0]["state"] != first[b"more"]["state"]
    reader.close()


def test_file_replaced_while_read_stays_the_one_that_was_opened(tree: Path) -> None:
    (tree / "files/a").write_bytes(MIB + b"old")
    (tree / "files/b").write_bytes(MIB + b"new")
    reader = Reader(tree)
    first = reader.read(b"files/a")[0]
    os.replace(tree / "files/b", tree / "files/a")
    fields, data = reader.read(b"files/a", 1)
    assert (data, fields["state"][3]) == (b"old", first["state"][3])
    reader.close()


def test_swapped_in_symlinks_give_no_data(tree: Path) -> None:
    (tree / "secret").mkdir()
    (tree / "secret/key").write_text("secret")
    (tree / "files/folder").mkdir()
    (tree / "files/folder/key").write_text("data")
    (tree / "files/file").write_text("data")
    make_database(tree / "files/bd").close()
    make_database(tree / "secret/bd").close()
    reader = Reader(tree)
    paths = (b"files/folder/key", b"files/file", b"files/bd")
    assert [reader.read(path)[0]["status"] for path in paths] == ["whole"] * 3
    shutil.rmtree(tree / "files/folder")
    for name, target in (("folder", "secret"), ("file", "secret/key"), ("bd", "secret/bd")):
        with contextlib.suppress(FileNotFoundError):
            (tree / "files" / name).unlink()
        (tree / "files" / name).symlink_to(tree / target)
    assert [reader.read(path) for path in paths] == [({"status": "gone"}, b"")] * 3
    reader.close()


def test_file_that_became_a_fifo_is_gone_at_once(tree: Path) -> None:
    os.mkfifo(tree / "files/a")
    (tree / "files/b").write_text("data")
    reader = Reader(tree)
    folder, name = reader.source.parent(b"files/a")
    with pytest.raises(FileNotFoundError):
        reader.files._open_file(b"files/a", folder, name)
    assert reader.read(b"files/a")[0] == {"status": "gone"}
    reader.close()


def test_file_closed_when_its_attributes_cannot_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "files/a").write_text("data")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "listxattr", lambda *args, **more: [f"user.{n}" for n in range(3)])
    monkeypatch.setattr(os, "getxattr", lambda *args, **more: bytes(zbackup.XATTR_LIMIT // 4))
    reader = Reader(tree)
    fields, _ = reader.read(b"files/a")
    reader.close()
    assert (fields["status"], "extended attributes" in fields["error"]) == ("error", True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_do_not_pile_up(tree: Path) -> None:
    for number in range(50):
        (tree / f"files/{number}").write_text("data")
        make_database(tree / f"files/bd{number}", rows=1).close()
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(tree)
    for number in range(50):
        reader.read(b"files/%d" % number)
        reader.read(b"files/bd%d" % number)
    assert len(os.listdir("/proc/self/fd")) <= before + Files.MOST + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_that_keeps_changing_is_torn(world: World) -> None:
    quick = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # no journal that holds writers up
    path = Path(quick, "a")
    path.write_bytes(MIB * 4)
    world.node("--file", quick)
    changer = run_child("import sys\nwhile True: open(sys.argv[1], 'r+b').write(b'x')", path)
    try:
        wait_until(lambda: path.read_bytes()[0] == ord("x"))
        node = world.sweep("--tries", "2", "--pause", "0.01", code=1)["nodes"][0]
    finally:
        changer.kill()
        changer.communicate()
        shutil.rmtree(quick)
    assert node["snapshot"]["grade"] == "torn"


def test_small_files_sent_together_are_compressed_one_level_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    monkeypatch.setattr(zbackup, "compress", lambda codec, data, level: levels.append(level) or (codec, data))
    for level in (1, zbackup.MOST_LEVEL):
        for items in ([{}], [{}, {}]):
            zbackup.encode_answer(zbackup.Answer(zbackup.READ, 1, {"items": items}, b"some bytes"), level)
        zbackup.encode_answer(zbackup.Answer(zbackup.LIST, 1, {"more": False}, b"some lines"), level)
    assert levels == [1, 2, 1, *[zbackup.MOST_LEVEL] * 3]


def test_small_file_is_read_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    real, calls = os.pread, []
    monkeypatch.setattr(os, "pread", lambda fd, length, at: calls.append(length) or real(fd, length, at))
    with open(tmp_path / "a", "rb") as file:
        for expected, times in ((10, 1), (9, 2), (-1, 2)):
            calls.clear()
            assert zbackup.read_range(file.fileno(), 11, 0, expected) == b"0123456789"
            assert len(calls) == times


# ---- clones ----


@pytest.fixture(scope="module", params=["btrfs", "xfs"])
def cloning(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a filesystem that can clone files."""
    tool = shutil.which(f"mkfs.{request.param}")
    if not tool or not ROOT:
        pytest.skip(f"mkfs.{request.param} is not installed, or this is not root")
    top = tmp_path_factory.mktemp(request.param)
    image, folder = top / "image", top / "mount"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    subprocess.run([tool, "-q", image], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount {request.param}: {done.stderr.strip()}")
    (folder / "files").mkdir()
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_clone_is_frozen_at_its_first_chunk(cloning: Path) -> None:
    path = cloning / "files/large"
    path.write_bytes(MIB * 3 + b"end")
    reader = Reader(cloning)
    first = reader.read(b"files/large")[0]
    path.write_bytes(b"other")
    rest = [reader.read(b"files/large", chunk) for chunk in (1, 2, 3)]
    reader.close()
    assert first["grade"] == "frozen"
    assert b"".join(data for _, data in rest) == MIB * 2 + b"end"
    assert all(fields["state"] == first["state"] for fields, _ in rest)
    assert os.listdir(cloning / "files") == ["large"]


def test_clone_of_a_file_on_a_mount_without_room_or_rights(cloning: Path) -> None:
    (cloning / "files/large").write_bytes(MIB * 2)
    subprocess.run(["mount", "-o", "remount,ro", cloning], check=True)
    try:
        reader = Reader(cloning.parent, "mount/files")
        fields = reader.read(b"mount/files/large")[0]
        reader.close()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", cloning], check=True)
    assert (fields["status"], fields["grade"]) == ("whole", "stable")


# ---- hooks ----


def test_hook_tells_what_went_wrong() -> None:
    assert zbackup.run_hook("exit 0") == ""
    assert zbackup.run_hook("exit 7") == "ended with code 7"
    assert zbackup.run_hook("echo one; printf '\\033two\\n' >&2; exit 1") == "ended with code 1: one | \\x1btwo"
    said = zbackup.run_hook("head -c 1000000 /dev/zero | tr '\\0' x; exit 1")
    assert len(said) < zbackup.HOOK_OUTPUT + 100
    assert zbackup.run_hook(f"kill -{signal.SIGKILL:d} $$") == "ended with code -9"


def test_answer_that_cannot_be_made_is_an_error(world: World) -> None:
    """A fault of the node's own does not leave the server waiting, and the node goes on to answer."""
    (world.files / "file").write_text("data")
    program = world.path / "faulty.py"
    broken = PROGRAM.read_text().replace(
        "def encode_answer(",
        "def encode_answer(answer: Answer, level: int) -> Any:\n"
        "    if answer.kind == LIST:\n        raise ValueError('planted')\n    return encode_well(answer, level)\n\n\n"
        "def encode_well(",
    )
    program.write_text(broken)
    world.node(program=program)
    for _ in range(2):
        [row] = world.sweep(code=1)["nodes"]
        assert "a fault of zbackup" in row["error"] and "planted" in row["error"]
