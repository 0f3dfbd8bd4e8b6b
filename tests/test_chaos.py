"""Chaos: processes killed at random moments, many of them at once, and a disk that is full.

What is served proves itself: it is known of each path what stood there and when, so that each
file of each copy can be checked to have been just so at some moment of that copy's making.
ZBACKUP_CHAOS_SECONDS is how long the killing goes on in test_chaos, and the crowd in test_together;
by default 10 s and 6 s.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from conftest import Process, World, uncovered

import zbackup as z

PAGE = 4096
KIB, MIB = 1 << 10, 1 << 20
SEED = "ZBACKUP_CHAOS_SEED"
SECONDS = "ZBACKUP_CHAOS_SECONDS"


# ---- files that change all the time, and prove what they are ----


class Steps:
    """Counts the changes of a thing, and knows when each began and was done."""

    def __init__(self) -> None:
        self.begun: list[int] = []  # ns
        self.done: list[int] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[int]:
        """Make the next change; yields its number, from 1 on."""
        self.begun.append(time.time_ns())
        yield len(self.begun)
        self.done.append(time.time_ns())

    def check(self, seen: int, span: tuple[int, int]) -> None:
        """Check that a copy made in this span of time may have seen so many changes."""
        low, high = bisect.bisect_left(self.done, span[0]), bisect.bisect_right(self.begun, span[1])
        assert low <= seen <= high, f"it shows {seen} changes, but there were {low} to {high} when it was copied"


def make_page(number: int, version: int) -> bytes:
    """Return a page that says and proves what it is."""
    head = f"page {number} version {version}\n".encode()
    return head + (hashlib.sha256(head).digest() * (PAGE // 32))[: PAGE - len(head)]


class Pages:
    """A file changed in place, page by page: at each moment its pages say how many changes it saw.

    A copy that took one page at one moment and another page at another does not add up, since
    the pages change in an order that no reader follows.
    """

    def __init__(self, path: Path, offsets: list[int], size: int) -> None:
        self.path, self.offsets, self.size = path, offsets, size
        self.order = [number * 7 % len(offsets) for number in range(len(offsets))]
        assert len(set(self.order)) == len(offsets)
        self.steps = Steps()
        with open(path, "wb") as file:
            file.truncate(size)
            for number, offset in enumerate(offsets):
                file.seek(offset)
                file.write(make_page(number, 0))

    def change(self, count: int) -> None:
        with open(self.path, "r+b") as file:
            for _ in range(count):
                with self.steps.step() as step:
                    version, at = divmod(step - 1, len(self.order))
                    number = self.order[at]
                    os.pwrite(file.fileno(), make_page(number, 1 + version), self.offsets[number])
                time.sleep(0.005)  # longer than a tick of a filesystem's clock: no two writes with the same time

    def check(self, copy: Path, grade: str, span: tuple[int, int]) -> None:
        assert copy.stat().st_size == self.size
        assert copy.stat().st_blocks * 512 < self.size or self.size < MIB, "its holes are gone"
        versions = []
        with open(copy, "rb") as file:
            for number, offset in enumerate(self.offsets):
                page = os.pread(file.fileno(), PAGE, offset)
                said = re.match(rb"page (\d+) version (\d+)\n", page)
                versions.append(int(said[2]) if said and page == make_page(number, int(said[2])) else -1)
        if grade == "torn":
            assert versions.count(-1) <= 1, versions  # read in the middle of a write
            return
        seen = sum(versions)
        newer = self.order[: seen % len(versions)]
        right = [seen // len(versions) + (number in newer) for number in range(len(versions))]
        assert versions == right, f"a {grade} copy that mixes versions: {versions}"
        self.steps.check(seen, span)


LINE = 64  # bytes: never across the end of a page


def make_line(number: int) -> bytes:
    """Return one line of the log."""
    return b"%010d %052d\n" % (number, number * 7919)


class Log:
    """A file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = Steps()
        path.write_bytes(b"")

    def change(self, count: int) -> None:
        with open(self.path, "ab", buffering=0) as file:
            for _ in range(count):
                with self.steps.step() as step:
                    file.write(make_line(step))

    def check(self, copy: Path, grade: str, span: tuple[int, int]) -> None:
        data = copy.read_bytes()
        assert data == b"".join(map(make_line, range(1, 1 + len(data) // LINE)))
        if grade != "torn":
            self.steps.check(len(data) // LINE, span)


class Database(threading.Thread):
    """A SQLite database in which money moves from row to row; the sum stays."""

    ROWS, SUM = 300, 300 * 100

    def __init__(self, path: Path, mode: str, stop: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self.path, self.mode, self.stop = path, mode, stop
        self.random = random.Random(seed)
        self.steps = Steps()
        self.error: Exception | None = None
        with contextlib.closing(self._connect()) as connection:
            connection.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, money INTEGER, note BLOB)")
            connection.execute("CREATE TABLE change (count INTEGER)")
            rows = ((number, self.SUM // self.ROWS, os.urandom(500)) for number in range(self.ROWS))
            connection.executemany("INSERT INTO account VALUES (?, ?, ?)", rows)
            connection.execute("INSERT INTO change VALUES (0)")
            connection.commit()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute(f"PRAGMA journal_mode = {self.mode}")
        connection.execute("PRAGMA synchronous = OFF")  # the machine itself is not killed
        return connection

    def run(self) -> None:
        try:
            with contextlib.closing(self._connect()) as connection:
                while not self.stop.wait(self.random.uniform(0.002, 0.02)):
                    self._change(connection)
        except Exception as error:
            self.error = error

    def _change(self, connection: sqlite3.Connection) -> None:
        with self.steps.step():
            for _ in range(self.random.randrange(1, 4)):
                one, two = self.random.sample(range(self.ROWS), 2)
                note, sum_ = os.urandom(self.random.randrange(200, 800)), self.random.randrange(50)
                connection.execute("UPDATE account SET money = money - ?, note = ? WHERE id = ?", (sum_, note, one))
                connection.execute("UPDATE account SET money = money + ? WHERE id = ?", (sum_, two))
            connection.execute("UPDATE change SET count = count + 1")
            connection.commit()

    def check(self, copy: Path, grade: str, span: tuple[int, int]) -> None:
        assert grade in ("frozen", "stable")  # a machine at its limits may keep the writer still for two seconds
        with contextlib.closing(sqlite3.connect(f"file:{copy}?immutable=1", uri=True)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("SELECT sum(money), count(*) FROM account").fetchone() == (self.SUM, self.ROWS)
            self.steps.check(connection.execute("SELECT count FROM change").fetchone()[0], span)


class Span:
    """What stood at a path, and from when to when at most."""

    def __init__(self, what: str, start: int) -> None:
        self.what, self.start, self.end = what, start, 1 << 63


FOLDER = "folder"


class Seen(NamedTuple):
    """What stands at a path."""

    what: str  # FOLDER, or a digest of the content
    mode: int
    mtime: int


def see(folder: Path) -> dict[str, Seen]:
    """Return all that is in a folder."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        what = FOLDER if stat.S_ISDIR(told.st_mode) else hashlib.sha256(path.read_bytes()).hexdigest()
        seen[str(path.relative_to(folder))] = Seen(what, told.st_mode, told.st_mtime_ns)
    return seen


class Tree(threading.Thread):
    """A served folder that changes all the time, and remembers what stood in it, and when."""

    MOST = 30  # files
    SIZES = (0, 0, 100, 3000, 3000, 5000, 20_000, 20_000, 100_000, 100_000, 300_000, MIB, 2 * MIB + 77, 3 * MIB)

    def __init__(self, path: Path, mode: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.random = random.Random(seed)
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.error: Exception | None = None
        self.spans: dict[str, list[Span]] = {}
        self.outside = path.with_name(path.name + "-outside")  # where files are written before they appear
        self.serial = 0
        self.older: list[bytes] = []  # some of the versions that there were
        path.mkdir(exist_ok=True)
        self.outside.mkdir()
        self.special: dict[str, Any] = {
            "log": Log(path / "log"),
            "small.pages": Pages(path / "small.pages", [number * PAGE for number in range(40)], 40 * PAGE),
            "sparse.pages": Pages(path / "sparse.pages", [number * MIB for number in range(12)], 32 * MIB),
            "bd.sqlite": Database(path / "bd.sqlite", mode, self.stop, seed),
        }
        for _ in range(self.MOST * 2 // 3):
            self._add()

    def run(self) -> None:
        self.special["bd.sqlite"].start()
        calls: dict[Callable[[], None], int] = {  # and how often each
            self._add: 6,
            self._replace: 5,
            self._overwrite: 3,
            self._delete: 3,
            self._rename: 3,
            self._rename_folder: 1,
            lambda: self.special["log"].change(self.random.randrange(1, 20)): 2,
            lambda: self.special["small.pages"].change(self.random.randrange(1, 80)): 2,
            lambda: self.special["sparse.pages"].change(self.random.randrange(1, 80)): 2,
        }
        try:
            while not self.stop.wait(self.random.uniform(0.002, 0.03)):
                if self.random.random() < 0.01:
                    self.stop.wait(self.random.uniform(0.5, 1.5))  # so that some copies find all at rest
                self.random.choices([*calls], [*calls.values()])[0]()
        except Exception as error:
            self.error = error

    def close(self) -> None:
        """End all changes; an error in one is raised here."""
        self.stop.set()
        for thread in (self, self.special["bd.sqlite"]):
            if thread.ident:
                thread.join()
            if thread.error:
                raise thread.error

    # ---- the changes ----

    @contextlib.contextmanager
    def _changing(self, gone: dict[str, str], come: dict[str, str]) -> Iterator[None]:
        """Record that during the block some paths lose what stood there, and others (or the same) get something."""
        with self.lock:
            start = time.time_ns()
            yield
            end = time.time_ns()
            for path in gone:
                self.spans[path][-1].end = end
            for path, what in come.items():
                self.spans.setdefault(path, []).append(Span(what, start))

    def present(self) -> dict[str, str]:
        return {path: spans[-1].what for path, spans in self.spans.items() if spans[-1].end == 1 << 63}

    def _files(self) -> list[str]:
        return sorted(path for path, what in self.present().items() if what != FOLDER)

    def _pick(self) -> str:
        """Return a path at which nothing stands, in a folder that exists."""
        folder = f"d{self.random.randrange(6)}"
        if folder not in self.present():
            with self._changing({}, {folder: FOLDER}):
                (self.path / folder).mkdir()
        names = {f"{folder}/f{number}" for number in range(self.MOST)}
        return self.random.choice(sorted(names.difference(self._files())))

    def _write(self, old: bytes = b"") -> tuple[Path, str]:
        """Write a new version outside of the tree; returns it and its digest."""
        if self.older and self.random.random() < 0.1:  # what was there once comes back
            return self._put_outside(self.random.choice(self.older))
        self.serial += 1
        if old and self.random.random() < 0.7:  # some pages of it change
            data = bytearray(old)
            for _ in range(self.random.randrange(1, 6)):
                at = self.random.randrange(len(data))
                data[at : at + 16] = self.random.getrandbits(128).to_bytes(16, "little")
        else:
            size = self.random.choice(self.SIZES)
            # Digits, which compress to half: random bytes would look encrypted, and raise the alarm.
            data = bytearray(b"%0*x" % (size, self.random.getrandbits(4 * size)) if size else b"")
            if self.random.random() < 0.3:
                data[size // 4 :] = b"all the same " * ((size - size // 4) // 13)  # what can be compressed
        data[:0] = b"" if old and data.startswith(b"version") else b"version 0000000000\n"
        data[8:18] = b"%010d" % self.serial
        if self.random.random() < 0.2:
            self.older = [*self.older[-9:], bytes(data)]
        return self._put_outside(bytes(data))

    def _put_outside(self, data: bytes) -> tuple[Path, str]:
        path = self.outside / "new"
        path.write_bytes(data)
        return path, hashlib.sha256(data).hexdigest()

    def _add(self) -> None:
        if len(self._files()) < self.MOST:
            name = self._pick()
            new, what = self._write()
            with self._changing({}, {name: what}):
                new.rename(self.path / name)

    def _replace(self) -> None:
        for name in self._choose():
            new, what = self._write((self.path / name).read_bytes())
            with self._changing({name: ""}, {name: what}):
                new.rename(self.path / name)

    def _overwrite(self) -> None:
        """Change the one page of a small file in place: nothing but its times tells."""
        for name in self._choose():
            data = (self.path / name).read_bytes()
            if 100 <= len(data) <= PAGE:
                self.serial += 1
                data = b"version %010d" % self.serial + data[18:]
                come = {name: hashlib.sha256(data).hexdigest()}
                with open(self.path / name, "r+b", buffering=0) as file, self._changing({name: ""}, come):
                    file.write(data)

    def _delete(self) -> None:
        for name in self._choose():
            with self._changing({name: ""}, {}):
                (self.path / name).unlink()

    def _rename(self) -> None:
        for name in self._choose():
            new = self._pick()
            with self._changing({name: ""}, {new: self.present()[name]}):
                (self.path / name).rename(self.path / new)

    def _rename_folder(self) -> None:
        present = self.present()
        folders = [f"d{number}" for number in range(6)]
        old, new = self.random.choice(folders), self.random.choice(folders)
        if old in present and new not in present:
            moved = {path: what for path, what in present.items() if path == old or path.startswith(old + "/")}
            with self._changing(moved, {new + path[len(old) :]: what for path, what in moved.items()}):
                (self.path / old).rename(self.path / new)
        elif old in present and not any(path.startswith(old + "/") for path in present):
            with self._changing({old: ""}, {}):
                (self.path / old).rmdir()

    def _choose(self) -> list[str]:
        files = self._files()
        return [self.random.choice(files)] if files else []

    # ---- the checks ----

    def check(self, copy: Path, seen: dict[str, Seen], grades: dict[str, str], told: dict[str, Any]) -> None:
        """Check a restored copy: all in it stood there while it was made, and nothing lacks."""
        span, whole = (told["started"], told["finished"]), not told["cut_off"]
        for name, thing in self.special.items():
            if name in seen or whole:
                assert name in seen, f"{name} is not in the copy"
                with self._naming(name, grades[name]):
                    thing.check(copy / name, grades[name], span)
        with self.lock:
            for name in seen.keys() - self.special.keys():
                self._check_path(copy / name, name, seen[name].what, span)
            left = [name for name in self.spans if name not in seen and self._stood(name, span)]
        assert not (whole and left), f"{left} were there all the time, and are not in the copy"

    @contextlib.contextmanager
    def _naming(self, name: str, grade: str) -> Iterator[None]:
        try:
            yield
        except (AssertionError, sqlite3.Error) as error:
            raise AssertionError(f"{self.path.name}/{name} ({grade}): {error}") from error

    def _check_path(self, path: Path, name: str, what: str, span: tuple[int, int]) -> None:
        fitting = [s for s in self.spans.get(name, []) if s.what == what]
        head = what if what == FOLDER else f"{path.read_bytes()[:18]!r}, {path.stat().st_size} bytes"
        assert fitting, f"{name} never was as it is in the copy: {head}"
        if not any(s.start <= span[1] and s.end >= span[0] for s in fitting):
            times = [f"{(s.start - span[0]) / 1e9:.3f} to {(s.end - span[0]) / 1e9:.3f} s" for s in fitting]
            took = (span[1] - span[0]) / 1e9
            raise AssertionError(f"{name} ({head}) was so at {times}; the copy was made from 0 to {took:.3f} s")

    def _stood(self, name: str, span: tuple[int, int]) -> bool:
        """Tell whether something stood at a path all the time."""
        reached = span[0]
        for s in self.spans[name]:
            if s.start < reached:
                reached = max(reached, s.end)
        return reached > span[1]


# ---- the chaos ----

ONE, TWO = "127.0.0.9", "127.0.0.10"
LAST = 3  # good snapshots of each node that a prune keeps
Key = tuple[str, str]  # the names of a node and of a snapshot


def names(folder: Path) -> list[str]:
    """Return the names in a folder, which may come or go meanwhile."""
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def load_snapshot(world: World, folder: str, name: str) -> dict[str, Any]:
    """Return what the file of a snapshot says."""
    told: dict[str, Any] = json.loads((world.store / folder / "snapshots" / f"{name}.json").read_bytes())
    return told


class Chaos:
    """Two nodes, a store, and what was seen of its snapshots."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        world.env = uncovered(world.env)  # quicker, so that more happens; other tests reach the same lines
        self.random = random.Random(seed)
        self.trees = {
            ONE: Tree(world.path / "one", "WAL", seed),
            TWO: Tree(world.path / "two", "DELETE", seed + 1),
        }
        self.nodes: dict[str, Process] = {}
        self.seen: dict[Key, dict[str, Seen]] = {}  # what each snapshot restores to
        self.grades: dict[Key, str] = {}  # of all snapshots that were reported or listed
        self.pruned = False  # since the store was looked at
        self.gone: set[Key] = set()  # snapshots that a prune has removed, as it may
        self.events: list[str] = []
        self.counts: dict[str, int] = {}

    def note(self, what: str, **more: object) -> None:
        """Remember what was done, for the message of a failure."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.events.append(f"{time.strftime('%H:%M:%S')} {what} " + " ".join(f"{k}={v}" for k, v in more.items()))

    # ---- nodes ----

    def start_node(self, address: str) -> None:
        """Start a node, or start it again."""
        name = self.trees[address].path.name
        self.nodes[address] = self.world.node("--file", name, "--state", f"state-{name}", address=address)
        self.note("node started", address=address)

    def kill_node(self, address: str) -> None:
        self.nodes.pop(address).kill()
        self.note("node killed", address=address)

    # ---- one round ----

    def sweep(self) -> dict[Key, str]:
        """Make a sweep in which something may be killed; returns the snapshots that it reported, and their grades."""
        flags = ["--json", "--range", "9-10", "--window", "1MiB", "--timeout", "0.5s"]
        flags += ["--pack-size", self.random.choice(["128KiB", "1MiB", "64MiB"])]
        for rarely in (["--checksum"], ["--no-latest"], ["--tries", "2", "--pause", "5ms"]):
            flags += rarely if self.random.random() < 0.15 else []
        victims = self.random.choice([[], ["server"], ["server"], ["server"], [ONE], [TWO], [ONE, "server"]])
        there = set(self.nodes)
        beside = self.start_command() if self.random.random() < 0.3 and self.seen else None
        server = self.world.server(*flags)
        for victim in victims:
            self._wait_for_moment(server)
            if victim == "server":
                server.kill()
            elif victim in self.nodes:
                self.kill_node(victim)
        server.process.wait(90)
        if beside:
            self.end_command(*beside)
        reported = self._check_sweep(server, there)
        for address in (ONE, TWO):
            if address not in self.nodes and self.random.random() < 0.8:
                self.start_node(address)
        return reported

    def _wait_for_moment(self, process: Process) -> None:
        """Wait for a random moment: some time, or soon after something appears in the store."""
        store, moment = self.world.store, time.monotonic() + self.random.uniform(0.1, 0.6)

        def count(folders: str) -> int:
            return sum(len(names(folder)) for folder in store.glob(folders))

        happens: Callable[[], object] = self.random.choice(
            [
                lambda: time.monotonic() > moment,
                lambda: time.monotonic() > moment,
                lambda: any(name.startswith("incoming") for name in names(store / "packs")),
                lambda: count("packs/*") != packs,
                lambda: count("*/snapshots") != snapshots,
                lambda: any("progress.json" in names(store / node) for node in (ONE, TWO)),
                lambda: any(".zbackup-tmp" in name for node in (ONE, TWO) for name in names(store / node / "latest")),
            ]
        )
        packs, snapshots = count("packs/*"), count("*/snapshots")
        while process.process.poll() is None and not happens():
            time.sleep(0.0005)
        pause = self.random.choice([0, 0, self.random.uniform(0, 0.01), self.random.uniform(0, 0.1)])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.process.wait(pause)

    def _check_sweep(self, server: Process, there: set[str]) -> dict[Key, str]:
        code, output = server.process.returncode, server.output
        assert "Traceback" not in output, output
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if code == -signal.SIGKILL:
            self.note("server killed")
            return {}
        assert lines, f"exit code {code} without a report: {output}"
        report = json.loads(lines[0])
        assert report["problems"] == [], output
        lasting = there & set(self.nodes)  # those that nobody killed meanwhile
        reported: dict[Key, str] = {}
        for node in report["nodes"]:
            allowed = ["was changing all the time"]
            if node["snapshot"]:
                reported[node["folder"], node["snapshot"]["name"]] = node["snapshot"]["grade"]
            if node["address"].split(":")[0] in lasting:
                assert node["snapshot"] and not node["error"] and not node["snapshot"]["cut_off"], output
            else:
                allowed += ["the node did not end it"]
            for problem in node["problems"] + (node["snapshot"] or {"problems": []})["problems"]:
                assert any(words in problem["message"] for words in allowed), output
        assert len(reported) >= len(lasting), output
        assert code in ((0, 1) if lasting else (0, 1, 5) if there else (5,)), output
        self.note("sweep ended", code=code, reported=len(reported))
        return reported

    # ---- what else the server's side does ----

    def start_command(self) -> tuple[Process, str]:
        """Start a command that looks through the store, or changes it."""
        prune = ["prune", "--keep", f"last {LAST}", "--lock-wait", "60s", "--grace"]
        arguments = self.random.choice([[*prune, "0s"], [*prune, "0s"], [*prune, "1h"], ["verify"], ["repair"]])
        self.pruned |= arguments[0] == "prune"
        process = Process(arguments, self.world.path, self.world.env)
        self.world.nodes.append(process)
        return process, " ".join(arguments)

    def end_command(self, process: Process, what: str) -> None:
        """Kill such a command, or wait for its end, which must be a good one."""
        if self.random.random() < 0.5:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(self.random.uniform(0.1, 0.6))
            process.kill()
        code = process.process.wait(90)
        self.note(what.split()[0] + (" killed" if code == -signal.SIGKILL else " ended"))
        assert code in (0, -signal.SIGKILL) and "Traceback" not in process.output, f"{what}: {code}: {process.output}"

    def undelete(self) -> None:
        """Bring back what the trash has."""
        for folder in {folder for folder, _ in self.seen}:
            if self.world.listed(folder, "--trash"):
                self.world.run("undelete", folder, "--all")
                self.note("undeleted", folder=folder)

    # ---- what the store holds ----

    def list_rows(self) -> dict[Key, dict[str, str]]:
        """Return the rows of all snapshots, in the order they were made."""
        rows = {}
        for folder in (ONE, TWO):
            if (self.world.store / folder / "node.json").exists():
                for row in self.world.listed(folder):
                    rows[folder, row["SNAPSHOT"]] = row
        return rows

    def look(self, reported: dict[Key, str]) -> None:
        """Check that all snapshots seen before are there, and restore those that are new."""
        if not (self.world.store / "zbackup.json").exists():
            return
        rows = self.list_rows()
        lost = (self.seen.keys() - self.gone | reported.keys()) - rows.keys()
        self.grades.update({**reported, **{key: row["GRADE"] for key, row in rows.items()}})
        if self.pruned:
            lost -= self._find_removable()
            self.gone |= self.grades.keys() - rows.keys() - lost
            self.pruned = False
        assert not lost, f"not listed any more: {lost}"
        self.gone -= rows.keys()
        for key in rows:
            if key not in self.seen:
                self.seen[key] = self.restore(*key, check=True)
        if rows and self.random.random() < 0.5:
            self.look_again(self.random.choice(sorted(rows)))

    def _find_removable(self) -> set[Key]:
        """Return the snapshots that a prune may have removed, among all that were ever listed."""
        removable = set()
        for folder in (ONE, TWO):
            there = {key: grade for key, grade in self.grades.items() if key[0] == folder and key not in self.gone}
            good = sorted(key for key, grade in there.items() if grade in ("stable", "frozen"))
            for key in there:
                filled = len([one for one in good if one > key])
                if filled >= (LAST if key in good else 1):
                    removable.add(key)
        return removable

    def look_again(self, key: tuple[str, str]) -> None:
        assert self.restore(*key) == self.seen[key], f"{key} does not restore to what it did"

    def restore(self, folder: str, name: str, check: bool = False) -> dict[str, Seen]:
        """Restore a snapshot; returns what that gave."""
        to = self.world.path / "copy"
        code = 1 if load_snapshot(self.world, folder, name)["cut_off"] else 0
        if self.random.random() < 0.1:
            restoring = Process(["restore", folder, "--at", name, "--to", "copy"], self.world.path, self.world.env)
            with contextlib.suppress(subprocess.TimeoutExpired):
                restoring.process.wait(self.random.uniform(0.1, 0.6))
            restoring.kill()
            self.note("restore killed")
            self.world.run("restore", folder, "--at", name, "--to", "copy", "--overwrite", "--quiet", code=code)
        else:
            self.world.run("restore", folder, "--at", name, "--to", "copy", "--quiet", code=code)
        seen = see(to)
        if check:
            told = load_snapshot(self.world, folder, name)
            self.check_copy(to, seen, told, self.world.listed(folder, "--at", name))
        shutil.rmtree(to)
        return seen

    def check_copy(self, copy: Path, seen: dict[str, Seen], told: dict[str, Any], listed: list[dict[str, str]]) -> None:
        """Check that a restored copy is what was served while it was made."""
        tree = next(tree for address, tree in self.trees.items() if told["address"].startswith(f"{address}:"))
        whole = not told["cut_off"]
        assert told["grade"] in (("frozen", "stable", "torn") if whole else ("partial",)), told
        served = tree.path.name
        grades = {row["PATH"][len(served) + 1 :]: row["GRADE"] for row in listed}
        inside = {path[len(served) + 1 :]: what for path, what in seen.items() if path.startswith(served + "/")}
        assert seen.keys() - {served} == {f"{served}/{path}" for path in inside}
        try:
            tree.check(copy / served, inside, grades, told)
        except AssertionError as error:
            raise AssertionError(f"a snapshot of {tree.path.name}, {told['grade']}: {error}") from error
        self.note(f"snapshot {told['grade']}", address=told["address"], sequence=told["sequence"])


@contextlib.contextmanager
def running(chaos: Chaos, seed: int) -> Iterator[None]:
    """Let the files change; a failure tells the seed and what was done before it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # s; the threads that change files must not make the one that kills late
    for tree in chaos.trees.values():
        tree.start()
    try:
        yield
    except BaseException as error:
        told = "\n".join(chaos.events[-25:])
        raise AssertionError(f"{error}\n\n{SEED}={seed} repeats this; before it:\n{told}") from error
    finally:
        sys.setswitchinterval(interval)
        for tree in chaos.trees.values():
            tree.close()


def test_chaos(world: World) -> None:
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
    print(f"{SEED}={seed} repeats this run")
    end = time.monotonic() + float(os.environ.get(SECONDS) or 10)
    chaos = Chaos(world, seed)
    with running(chaos, seed):
        for address in (ONE, TWO):
            chaos.start_node(address)
        while time.monotonic() < end:
            reported: dict[Key, str] = {}
            for _ in range(chaos.random.randrange(1, 5)):
                reported.update(chaos.sweep())
            if chaos.random.random() < 0.5 and chaos.seen:
                chaos.end_command(*chaos.start_command())
            if chaos.random.random() < 0.2:
                chaos.undelete()
            if chaos.random.random() < 0.2:
                z.remove_index(str(world.store / "index.sqlite"))  # it is made again
            chaos.look(reported)
        for address in (ONE, TWO):
            if address not in chaos.nodes:
                chaos.start_node(address)
        for tree in chaos.trees.values():
            tree.close()
        report = world.sweep("--range", "9-10", "--pack-size", "1MiB")
        assert [node["snapshot"]["problems"] for node in report["nodes"]] == [[], []]
        chaos.look({(node["folder"], node["snapshot"]["name"]): node["snapshot"]["grade"] for node in report["nodes"]})
        check_clean(chaos)
        for key in chaos.seen.keys() - chaos.gone:
            chaos.look_again(key)
    print(json.dumps(chaos.counts))


def check_clean(chaos: Chaos) -> None:
    """Check that the newest copies are what is served now, and that nothing is left of what was killed."""
    for address, tree in chaos.trees.items():
        copy = see(chaos.world.restore(address, to=f"last-{address}") / tree.path.name)
        latest = see(chaos.world.store / address / "latest" / tree.path.name)
        assert {path: seen.what for path, seen in latest.items()} == {path: seen.what for path, seen in copy.items()}
        for end in ("-wal", "-shm"):
            (tree.path / f"bd.sqlite{end}").unlink(missing_ok=True)
        served = see(tree.path)
        assert served.keys() == {*tree.present(), *tree.special}
        assert copy == served, "the last copy is not what is served"
        assert not list((chaos.world.path / f"state-{tree.path.name}").rglob("freeze-*"))
    left = [path for name in ("incoming-*", ".zbackup-tmp-*") for path in chaos.world.store.rglob(name)]
    assert not left, left
    verify_clean(chaos.world)
    for _ in range(2):  # what a patch in a rewritten pack drew from may go with the second one
        chaos.world.run("prune", "--grace", "0s")
    assert find_dead_packs(chaos.world.store) == []
    assert [path for path in chaos.world.store.glob("*/trash/*") if path.suffix == ".json"] == []
    verify_clean(chaos.world)


def verify_clean(world: World, *arguments: str) -> None:
    """Check that `verify` finds nothing amiss, the index included."""
    told = json.loads(world.run("verify", "--json", *arguments).stdout)
    wrong = {name: told[name] for name in ("index", "damaged", "lost", "files", "problems", "harmed") if told[name]}
    assert not wrong and told["checked"] == told["packs"], told


def find_dead_packs(path: Path) -> list[str]:
    """Return the packs that hold nothing that a snapshot needs, nor what a patch draws from."""
    with contextlib.closing(z.open_store(str(path))) as store, contextlib.closing(store.reader()) as reader:
        live: set[bytes] = set()
        for node in store.list_nodes():
            for snapshot in store.node(node.folder).list_snapshots():
                live.update(snapshot.blocks)
                for entry in z.list_entries(reader, snapshot.blocks):
                    live.update(entry.content.lists)
                    live.update(chunk for chunk in z.list_chunks(reader, entry.content) if isinstance(chunk, bytes))
        packs = z.list_packs(store.packs)
        for pack in packs.values():
            live.update(run.source for _, runs in z.list_patches(pack) for run in runs)
        held = {name: {digest for digest, _, _ in z.read_pack_index(pack)} for name, pack in packs.items()}
        return [name for name, digests in held.items() if not digests & live]


# ---- many processes at once ----


class Loop(threading.Thread):
    """Runs one kind of command again and again, and counts how often it ended in which way."""

    def __init__(self, call: Callable[[], str], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.call, self.stop = call, stop
        self.counts: dict[str, int] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                how = self.call()
                self.counts[how] = self.counts.get(how, 0) + 1
        except BaseException as error:
            self.error = error
            self.stop.set()


LOCKED = "try again later, or with a longer --lock-wait"


class Together:
    """Commands that run beside each other on one store; each call makes one run and tells how it ended."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos, self.world = chaos, chaos.world
        self.random = chaos.random
        self.seen: dict[Key, dict[str, Seen]] = {}

    def sweep(self, number: str) -> str:
        """Copy one node."""
        flags = (
            "--json",
            "--latest-jobs",
            "2",
            "--range",
            number,
            "--pack-size",
            self.random.choice(["256KiB", "4MiB"]),
            "--lock-wait",
            "60s",
        )
        done = self.world.run(*self.world.server_flags(*flags), code=None)
        said = f"{done.returncode}: {done.stdout} {done.stderr}"
        report = json.loads(done.stdout)
        assert report["problems"] == [], said
        (node,) = report["nodes"]
        if node["error"]:
            assert node["error"] == f"another run is copying 127.0.0.{number} at this moment", said
            assert done.returncode == 4, said
            return "the node was taken"
        assert node["snapshot"] and not node["snapshot"]["cut_off"], said
        problems = node["problems"] + node["snapshot"]["problems"]
        assert all("was changing all the time" in problem["message"] for problem in problems), said
        assert done.returncode == (1 if problems else 0), said
        return node["snapshot"]["grade"]

    def prune(self) -> str:
        """Remove all but two snapshots of each node."""
        done = self.world.run("prune", "--keep", "last 2", "--grace", "0s", "--lock-wait", "20s", code=None)
        if done.returncode == 4:
            assert LOCKED in done.stderr, done.stderr
            return "locked"
        assert done.returncode == 0, done.stderr
        return "pruned"

    def _choose(self) -> Key:
        chosen = self.random.choice(sorted(self.world.store.glob("*/snapshots/*.json")))
        return chosen.parent.parent.name, chosen.stem

    def _was_pruned(self, done: subprocess.CompletedProcess[str]) -> bool:
        """Tell whether a command found its snapshot, which must be the only reason to fail."""
        if done.returncode == 2:
            assert "has no snapshot" in done.stderr, done.stderr
            return True
        assert done.returncode == 0, f"{done.args}: {done.returncode}: {done.stdout} {done.stderr}"
        return False

    def restore(self) -> str:
        """Restore a snapshot, which may be removed at any moment before that begins."""
        key = self._choose()
        try:
            told = load_snapshot(self.world, *key)
        except FileNotFoundError:
            return "pruned before"
        listed = self.world.run("list", key[0], "--at", key[1], "--json", code=None)
        if self._was_pruned(listed):
            return "pruned before"
        to = self.world.path / "together"
        shutil.rmtree(to, ignore_errors=True)
        if self._was_pruned(self.world.run("restore", key[0], "--at", key[1], "--to", str(to), code=None)):
            return "pruned before"
        seen = see(to)
        assert self.seen.setdefault(key, seen) == seen, f"{key} does not restore to what it did"
        self.chaos.check_copy(to, seen, told, json.loads(listed.stdout))
        return "right"

    def cat(self) -> str:
        """Write the log of some snapshot to a pipe."""
        key = self._choose()
        tree = self.chaos.trees[key[0]]
        done = self.world.run("cat", key[0], f"{tree.path.name}/log", "--at", key[1], code=None)
        if self._was_pruned(done):
            return "pruned before"
        assert done.stdout.encode() == b"".join(map(make_line, range(1, 1 + len(done.stdout) // LINE)))
        return "right"

    def verify(self) -> str:
        """Read the whole store."""
        self.world.run("verify")
        return "well"


def list_what_did_not_happen(loops: list[Loop]) -> list[str]:
    """Return what the commands beside each other should have met, and have not yet."""
    first, second, third, prune, restore, cat, verify = (loop.counts for loop in loops)
    met = {
        "a node is taken": "the node was taken" in first or "the node was taken" in third,
        "a copy": "stable" in second or "frozen" in second,
        "a prune": "pruned" in prune,
        "a restore": "right" in restore,
        "a cat": "right" in cat,
        "a verify": "well" in verify,
    }
    return [what for what, happened in met.items() if not happened]


def test_together(world: World) -> None:
    """Two servers, a third one at the node of the first, a prune beside them, and three readers beside all."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
    print(f"{SEED}={seed}")
    chaos = Chaos(world, seed)
    with running(chaos, seed):
        for address in (ONE, TWO):
            chaos.start_node(address)
        world.sweep("--range", "9-10", code=None)  # so that there is a store
        together = Together(chaos)
        stop = threading.Event()
        calls = [lambda: together.sweep("9"), lambda: together.sweep("10"), lambda: together.sweep("9")]
        calls += [together.prune, together.restore, together.cat, together.verify]
        loops = [Loop(call, stop) for call in calls]
        for loop in loops:
            loop.start()
        stop.wait(float(os.environ.get(SECONDS) or 6))
        patience = time.monotonic() + 60  # what has not happened by then on a busy machine
        while not stop.wait(0.1) and list_what_did_not_happen(loops) and time.monotonic() < patience:
            pass
        stop.set()
        for loop in loops:
            loop.join()
        print(json.dumps([loop.counts for loop in loops]))
        for loop in loops:
            if loop.error:
                raise loop.error
        for tree in chaos.trees.values():
            tree.close()
        verify_clean(world)
        world.sweep("--range", "9-10")
        chaos.look({})
        check_clean(chaos)
    assert list_what_did_not_happen(loops) == []


def test_latest_that_changes_while_it_is_verified(world: World) -> None:
    for name in ("a", "b", "c"):
        (world.files / name).write_text(name)
    world.node()
    world.sweep()
    (world.files / "b").unlink()
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        swept: list[bool] = []

        def wanted(entry: z.Entry) -> bool:
            if not swept:
                swept.append(bool(world.sweep()))
            return True

        assert z.verify_latest(store.node(ONE), reader, wanted) == []
    assert swept


# ---- a disk that is full ----

RESERVE = 2 * MIB


class Disk:
    """A store on a small filesystem."""

    def __init__(self, world: World, path: Path) -> None:
        self.world, self.path = world, path
        self.store = path / "store"
        self.flags = ("--store", str(self.store), "--reserve", str(RESERVE))
        self.kept: dict[str, dict[str, Seen]] = {}  # what each snapshot must restore to

    def sweep(self, *arguments: str, code: int = 0) -> str:
        """Make a sweep; returns what it said of problems."""
        before = set(self.list_names())
        done = self.world.run(*self.world.server_flags(*self.flags, "--no-latest", *arguments), code=code)
        for name in set(self.list_names()) - before:
            self.kept[name] = {f"files/{path}": seen for path, seen in see(self.world.files).items()}
        return done.stderr

    def list_names(self) -> list[str]:
        return [path.stem for path in self.store.glob("*/snapshots/*.json")]

    def prune(self, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.world.run("prune", *self.flags, "--keep", "last 1", "--grace", "0s", code=code)

    def fill(self, left: int = 0) -> Path:
        """Fill the disk with a foreign file, but for some bytes."""
        foreign = self.path / "foreign"
        with open(foreign, "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, z.count_free(str(self.path)) - left)
        assert z.count_free(str(self.path)) == left
        return foreign

    def check(self) -> None:
        """Check that each snapshot there is restores to what was copied."""
        names = self.list_names()
        assert names
        for name in names:
            to = self.world.path / "back"
            shutil.rmtree(to, ignore_errors=True)
            self.world.run("restore", "127.0.0.9", "--store", str(self.store), "--at", name, "--to", str(to))
            seen = see(to)
            del seen["files"]
            assert seen == self.kept[name], name

    def check_reserve(self) -> None:
        found = (self.store / "reserve").stat()
        assert found.st_size == RESERVE and found.st_blocks * 512 >= RESERVE


@pytest.fixture
def disk(world: World) -> Iterator[Disk]:
    path = world.path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small filesystem can be mounted here: {done.stderr.strip()}")
    yield Disk(world, path)
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk_in_the_middle_of_a_pull(world: World, disk: Disk) -> None:
    world.node("--margin", "0s")  # so that only what changed is to be copied
    said = ""
    for number in range(20):
        (world.files / "large").write_bytes(os.urandom(7 * MIB))
        (world.files / f"small{number}").write_bytes(os.urandom(1000))
        done = world.run(*world.server_flags(*disk.flags, "--no-latest", "--pack-size", "1MiB"), code=None)
        if done.returncode:
            said = done.stderr
            assert done.returncode == 4, said
            break
        (name,) = set(disk.list_names()) - disk.kept.keys()
        disk.kept[name] = {f"files/{path}": seen for path, seen in see(world.files).items()}
    told = re.search(
        r"the store is full: (\d+) files of ([\d.]+) MiB are still to be copied, and ([\d.]+ \w+) are free", said
    )
    assert told, said
    assert (int(told[1]), float(told[2])) == (2, 7.0)
    assert len(disk.list_names()) == len(disk.kept) == number >= 4
    disk.check_reserve()
    disk.check()
    verify_clean(world, "--store", str(disk.store))
    assert not list(disk.store.rglob("incoming-*")) and not list(disk.store.rglob(".zbackup-tmp-*"))

    disk.prune()
    assert len(disk.list_names()) == 1
    disk.check_reserve()
    disk.sweep()
    assert len(disk.list_names()) == 2
    disk.check()
    verify_clean(world, "--store", str(disk.store))


def test_disk_full_to_the_last_byte(world: World, disk: Disk) -> None:
    world.node()
    for _ in range(3):
        (world.files / "a").write_bytes(os.urandom(4 * MIB))
        disk.sweep()
    foreign = disk.fill()
    said = disk.sweep(code=4)
    assert "full" in said and len(said.splitlines()) == 1, said
    assert len(disk.list_names()) == 3
    disk.prune()
    disk.check_reserve()
    assert len(disk.list_names()) == 1
    disk.check()
    (world.files / "a").write_bytes(os.urandom(4 * MIB))
    disk.sweep()
    foreign.unlink()
    disk.check()
    verify_clean(world, "--store", str(disk.store))


def test_full_disk_is_read(world: World, disk: Disk) -> None:
    world.node()
    (world.files / "a").write_bytes(os.urandom(4 * MIB))
    disk.sweep()
    disk.fill()
    disk.check()


def test_full_disk_in_the_middle_of_a_rewriting(world: World, disk: Disk) -> None:
    """Packs of which less than half is needed, and no room to write that half anew."""
    world.node()
    for number in range(4):
        (world.files / f"kept{number}").write_bytes(os.urandom(3 * MIB))
        (world.files / "changing").write_bytes(os.urandom(4 * MIB))
        disk.sweep()
    foreign = disk.fill(MIB)
    done = disk.prune(code=4)
    assert "not all packs could be rewritten: the store is full" in done.stderr
    assert len(disk.list_names()) == 1
    disk.check()
    verify_clean(world, "--store", str(disk.store))
    foreign.unlink()
    done = disk.prune()
    assert re.search(r"[1-9] rewritten", done.stdout)
    disk.check_reserve()
    disk.check()
    verify_clean(world, "--store", str(disk.store))
    disk.sweep()
    disk.check()


def test_full_disk_with_room_for_one_pack_at_a_time(world: World, disk: Disk) -> None:
    world.node()
    for number in range(4):
        (world.files / f"kept{number}").write_bytes(os.urandom(3 * MIB))
        (world.files / "changing").write_bytes(os.urandom(4 * MIB))
        disk.sweep()
    disk.fill(2 * MIB)  # with the reserve enough for one of three packs, and each gives back 7 MiB
    disk.prune()
    assert z.count_free(str(disk.path)) > 12 * MIB
    disk.check()


def test_content_that_comes_back_after_a_prune(world: World) -> None:
    """What a removed snapshot had as a patch, whose other half went, is not there any more."""
    world.node()
    older = b"one" + os.urandom(MIB - 3)
    (world.files / "a").write_bytes(older)
    world.sweep()
    (world.files / "a").write_bytes(b"two" + older[3:])
    (world.files / "b").write_bytes(os.urandom(3 * MIB))  # so that the pack of the patch stays
    world.sweep()
    (world.files / "a").write_bytes(os.urandom(MIB))
    world.sweep()
    world.run("prune", "--keep", "last 1", "--grace", "0s")
    verify_clean(world)
    (world.files / "a").write_bytes(b"two" + older[3:])
    world.sweep()
    assert (world.restore() / "files/a").read_bytes() == b"two" + older[3:]
    verify_clean(world)
