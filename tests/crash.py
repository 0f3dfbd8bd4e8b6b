"""The harness of the crash matrix: record what a command does to the disk, cut it off at every instant.

A `Recorder` wraps the calls by which zbackup changes a store, and runs a command in this process
(with a real node beside it).  A `Disk` is a model of a filesystem that keeps apart what was made
durable and what was only written; it replays any prefix of a record, and draws the tree as a
kill -9 or a power cut at that instant may leave it.  A `Case` is one command with the state that
it starts from and what must be true after each such end.  `Matrix` tries the instants, and the
same command with its N-th call failing.

The recorder is checked against the disk: what its record gives, replayed to the end, must be
what stands there, so nothing that zbackup writes can go past it unseen.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import stat as stat_bits
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

from conftest import FOLDER, PROGRAM, World

import zbackup

SECTOR = 512  # bytes that a disk writes whole or not at all
TIMEOUT = 60  # s; a command that takes longer hangs
INDEX = ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm")
LEFTOVERS = ("incoming-", ".zbackup-tmp-")
Blobs = tuple[Any, ...]  # what the files of INDEX hold, None for one that is absent


class Hang(BaseException):
    """A command did not end; no `except Exception` of the command may take it."""


# ---- the model of a filesystem ----


@dataclass
class Inode:
    """A file, folder or symlink: as programs see it, and as far as it was made durable."""

    kind: str  # "file", "folder" or "link"
    target: str = ""  # of a symlink
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    mode: int = 0
    mtime: int | None = None  # ns, where one was set after the last write
    durable_mode: int = 0
    durable_mtime: int | None = None
    names: dict[str, int] = field(default_factory=dict)  # of a folder
    durable_names: dict[str, int] = field(default_factory=dict)
    passed: dict[str, list[int | None]] = field(default_factory=dict)  # all that a name stood for since the last fsync
    frozen: bytes | None = b""  # `data`, until it changes
    begun: Inode | None = None  # what it was when the sync began that goes on

    def sync(self) -> None:
        """Make all durable, as fsync does."""
        self.durable, self.durable_names = self.now(), dict(self.names)
        self.durable_mode, self.durable_mtime = self.mode, self.mtime
        self.passed = {}
        self.begun = None  # an older state, of which nothing is to come back

    def begin_sync(self) -> None:
        """Note what a sync will have made durable when it ends."""
        passed = {name: list(inodes) for name, inodes in self.passed.items()}
        self.begun = Inode(
            self.kind, durable=self.now(), mode=self.mode, mtime=self.mtime, names=dict(self.names), passed=passed
        )

    def end_sync(self) -> None:
        """Make durable what was there when the sync began, and nothing that came after."""
        begun, self.begun = self.begun, None
        if begun is None:
            return  # made since then, or synced by itself since then
        self.durable, self.durable_names = begun.durable, begun.names
        self.durable_mode, self.durable_mtime = begun.mode, begun.mtime
        later = {name: inodes[max(0, len(begun.passed.get(name, ())) - 1) :] for name, inodes in self.passed.items()}
        self.passed = {name: inodes for name, inodes in later.items() if len(inodes) > 1}

    def now(self) -> bytes:
        """Return the data as programs see it."""
        if self.frozen is None:
            self.frozen = bytes(self.data)
        return self.frozen

    def name(self, name: str, inode: int | None) -> None:
        """Let a name of the folder stand for an inode, or for none."""
        self.passed.setdefault(name, [self.durable_names.get(name)]).append(inode)
        if inode is None:
            self.names.pop(name, None)
        else:
            self.names[name] = inode


@dataclass(frozen=True)
class Op:
    """One recorded call, in terms of inodes."""

    kind: str
    inode: int = 0  # that it is about
    folder: int = 0
    name: str = ""
    folder2: int = 0
    name2: str = ""
    at: int = 0  # offset, size, mode or time
    data: Any = None
    words: str = ""  # for people


@dataclass(frozen=True)
class Look:
    """What stands at one path of a tree that is drawn."""

    inode: int
    kind: str
    data: bytes
    mode: int
    mtime: int | None


class Choice:
    """What a crash leaves of what was not made durable; this one is kill -9: all of it."""

    name = "kill -9"
    durable_names = durable_data = False

    def names(self, folder: Inode) -> dict[str, int]:
        return folder.durable_names if self.durable_names else folder.names

    def content(self, inode: Inode) -> bytes:
        return inode.durable if self.durable_data else inode.now()

    def attributes(self, inode: Inode) -> tuple[int, int | None]:
        lost = self.durable_names and self.durable_data
        return (inode.durable_mode, inode.durable_mtime) if lost else (inode.mode, inode.mtime)

    def index(self, history: Sequence[Blobs]) -> Blobs:
        """Return the files of the index, of those that there were."""
        return history[-1]


class Lost(Choice):
    """Power cut: all that was not fsynced is lost; the index too."""

    name = "power cut, all unsynced lost"
    durable_names = durable_data = True

    def index(self, history: Sequence[Blobs]) -> Blobs:
        return (None, None, None)


class Empty(Choice):
    """Power cut: the names are there, what is behind them is not; the index is an older one."""

    name = "power cut, names without data"
    durable_data = True

    def index(self, history: Sequence[Blobs]) -> Blobs:
        table, log, _ = history[max(0, len(history) - 3)]
        return table, log, None


class Zeros(Choice):
    """Power cut: names, sizes and times are there, the sectors are zeros."""

    name = "power cut, zeros for data"

    def content(self, inode: Inode) -> bytes:
        return inode.durable[: len(inode.now())].ljust(len(inode.now()), b"\0")

    def index(self, history: Sequence[Blobs]) -> Blobs:
        table, log, _ = history[len(history) // 2]
        return table, log, None


class Torn(Choice):
    """Power cut: each name and each sector is lost or kept, as a die says; the index is anything."""

    name = "power cut, torn"

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def names(self, folder: Inode) -> dict[str, int]:
        found = dict(folder.names)
        kept = self.dice.choice((0.1, 0.5, 0.9))
        for name in sorted(folder.passed):
            passed = folder.passed[name]
            chosen = passed[-1] if self.dice.random() < kept else self.dice.choice(passed)
            found.pop(name, None)
            if chosen is not None:
                found[name] = chosen
        return found

    def content(self, inode: Inode) -> bytes:
        old, new = inode.durable, inode.now()
        if old == new:
            return new
        kept = self.dice.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        least, most = sorted((len(old), len(new)))
        size = self.dice.choice((least, most, min(most, least + SECTOR * self.dice.randint(0, most // SECTOR))))
        sectors = []
        for start in range(0, size, SECTOR):
            before, after = (data[start : start + SECTOR].ljust(SECTOR, b"\0") for data in (old, new))
            lost = (
                before if start < len(old) else self.dice.choice((before, bytes(SECTOR), self.dice.randbytes(SECTOR)))
            )
            sectors.append(after if self.dice.random() < kept else lost)
        return b"".join(sectors)[:size]

    def attributes(self, inode: Inode) -> tuple[int, int | None]:
        return self.dice.choice(((inode.mode, inode.mtime), (inode.durable_mode, inode.durable_mtime)))

    def index(self, history: Sequence[Blobs]) -> Blobs:
        table, log, _ = self.dice.choice(history)
        settled = -(-len(history[0][1] or b"") // SECTOR)  # sectors of the log with what SQLite has synced
        sectors = len(log or b"") // SECTOR
        if log and sectors > settled and self.dice.random() < 0.5:
            start = SECTOR * self.dice.randrange(settled, sectors)
            rest = self.dice.choice((b"", log[start + SECTOR :]))
            log = log[:start] + self.dice.randbytes(SECTOR) + rest
        return table, log, self.dice.choice((None, self.dice.randbytes(4096))) if table else None


class Disk:
    """A tree of inodes to which a record is applied, call by call; inode 0 is its root."""

    def __init__(self, inodes: dict[int, Inode], index: Blobs) -> None:
        self.inodes = inodes
        self.index = [index]  # what the index was, the newest last
        self.reported: list[str] = []  # snapshots whose making has been reported
        self.syncing = 0  # the sync that goes on

    def apply(self, op: Op) -> None:
        """Do what one recorded call did."""
        getattr(self, "_" + op.kind)(op)

    def _create(self, op: Op) -> None:
        self.inodes[op.inode] = Inode(op.data, op.name2, mode=op.at, durable_mode=op.at)
        self.inodes[op.folder].name(op.name, op.inode)

    def _write(self, op: Op) -> None:
        inode = self.inodes[op.inode]
        inode.data.extend(bytes(max(0, op.at - len(inode.data))))
        inode.data[op.at : op.at + len(op.data)] = op.data
        inode.mtime = inode.frozen = None

    def _truncate(self, op: Op) -> None:
        inode = self.inodes[op.inode]
        del inode.data[op.at :]
        inode.data.extend(bytes(op.at - len(inode.data)))
        inode.mtime = inode.frozen = None

    def _mode(self, op: Op) -> None:
        self.inodes[op.inode].mode = op.at

    def _mtime(self, op: Op) -> None:
        self.inodes[op.inode].mtime = op.at

    def _fsync(self, op: Op) -> None:
        self.inodes[op.inode].sync()

    def _sync(self, op: Op) -> None:
        for inode in self.inodes.values():
            inode.sync()

    def _begin_sync(self, op: Op) -> None:
        self.syncing = op.at
        for inode in self.inodes.values():
            inode.begin_sync()

    def _end_sync(self, op: Op) -> None:
        if op.at == self.syncing:  # of one that another one has overtaken nothing is known, so nothing is promised
            for inode in self.inodes.values():
                inode.end_sync()

    def _link(self, op: Op) -> None:
        self.inodes[op.folder].name(op.name, op.inode)

    def _unlink(self, op: Op) -> None:
        self.inodes[op.folder].name(op.name, None)

    def _rename(self, op: Op) -> None:
        inode = self.inodes[op.folder].names[op.name]
        self.inodes[op.folder].name(op.name, None)
        self.inodes[op.folder2].name(op.name2, inode)

    def _index(self, op: Op) -> None:
        self.index.append(op.data)

    def _settle(self, op: Op) -> None:
        self.index = self.index[-1:]

    def _report(self, op: Op) -> None:
        self.reported.append(op.name)

    def draw(self, choice: Choice, store: str) -> dict[str, Look]:
        """Return the tree as `choice` leaves it, the index of the store in it; by path, folders first."""
        found: dict[str, Look] = {}
        met: dict[int, tuple[bytes, tuple[int, int | None]]] = {}  # one inode looks the same under all of its names
        waiting = [("", 0)]
        while waiting:
            above, number = waiting.pop()
            for name, below in sorted(choice.names(self.inodes[number]).items()):
                inode = self.inodes[below]
                if inode.kind == "folder" and below in met:
                    continue  # under both names of a rename: the first one is as good
                if below not in met:
                    data = inode.target.encode() if inode.kind == "link" else choice.content(inode)
                    met[below] = data, choice.attributes(inode)
                path = os.path.join(above, name)
                found[path] = Look(below, inode.kind, met[below][0], *met[below][1])
                if inode.kind == "folder":
                    waiting.append((path, below))
        if store in found:
            for name, blob in zip(INDEX, choice.index(self.index)):
                if blob is not None:
                    found[os.path.join(store, name)] = Look(-1, "file", blob, 0o600, None)
        return found


def fingerprint(tree: dict[str, Look]) -> int:
    """Return a number that two trees share when they are alike."""
    return hash(tuple((path, look.kind, look.data, look.mode, look.mtime) for path, look in sorted(tree.items())))


def write_tree(tree: dict[str, Look], target: Path) -> None:
    """Write a drawn tree below an empty folder."""
    first: dict[int, str] = {}
    for path, look in tree.items():
        there = os.path.join(target, path)
        if look.kind == "folder":
            os.mkdir(there, 0o700)  # as the program makes all of them
        elif look.kind == "link":
            os.symlink(os.fsdecode(look.data), there)
        elif look.inode >= 0 and look.inode in first:
            os.link(first[look.inode], there)
        else:
            first[look.inode] = there
            fd = os.open(there, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, look.data)
            os.fchmod(fd, look.mode)
            if look.mtime is not None:
                os.utime(fd, ns=(look.mtime, look.mtime))
            os.close(fd)


# ---- the recorder ----


@dataclass(frozen=True)
class Fault:
    """The call that fails, and how."""

    number: int  # errno
    at: int  # which call, from 1
    lasting: bool = False  # whether all later calls that take space fail too


class Beside:
    """When a sync in a thread of its own has begun, and when somebody waits for its end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.awaited = threading.Event()


TAKES_SPACE = {"open", "write", "mkdir", "link", "symlink", "copy_file_range", "ftruncate", "fsync", "sync", "index"}


class Recorder:
    """Wraps the calls that change what is below `root`, while it is entered.

    The calls are found by the inode of what they are about, whatever path or descriptor names it.
    SQLite's own calls cannot be seen: its files are copied whenever they have changed.
    A sync in a thread of its own is recorded as it is at its worst: it begins at once, and so knows of nothing
    that is written beside it, and it ends when somebody waits for it, or never.  With `batch`, the program
    syncs so many files together, not thousands.
    """

    def __init__(self, program: ModuleType, root: Path, store: str, fault: Fault | None = None, batch: int = 0) -> None:
        self.program = program
        self.batch = batch
        self.root = root
        self.store = root / store
        self.ops: list[Op] = []
        self.fault = fault
        self.hit = ""  # the call that was made to fail
        self.gated: list[str] = []  # all calls that could have failed, in words
        self._lock = threading.RLock()
        self._ids: dict[tuple[int, int], int] = {}  # device and inode -> number in the model
        self._count = 0
        self._undo = contextlib.ExitStack()
        self._own = threading.local()  # `beside`: the Beside whose thread this is
        self._beside: list[Beside] = []
        self._over = False
        self.before = self._scan()

    # -- the state at the start --

    def _scan(self) -> Disk:
        inodes: dict[int, Inode] = {0: Inode("folder")}
        found = os.stat(self.root)
        self._ids[found.st_dev, found.st_ino] = 0
        self._scan_folder(self.root, inodes, 0)
        for inode in inodes.values():
            inode.sync()
        self._blobs = self._read_index()
        return Disk(inodes, self._blobs)

    def _scan_folder(self, folder: Path, inodes: dict[int, Inode], number: int) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name in INDEX:
                continue
            found = entry.stat(follow_symlinks=False)
            key = found.st_dev, found.st_ino
            if key not in self._ids or entry.is_dir(follow_symlinks=False):
                below = self._ids[key] = self._new_number()
                inode = inodes[below] = Inode("file", mode=stat_bits.S_IMODE(found.st_mode), mtime=found.st_mtime_ns)
                if entry.is_symlink():
                    inode.kind, inode.target = "link", os.readlink(entry.path)
                elif entry.is_dir():
                    inode.kind = "folder"
                    self._scan_folder(Path(entry.path), inodes, below)
                else:
                    inode.data = bytearray(Path(entry.path).read_bytes())
                    inode.frozen = None
            inodes[number].names[entry.name] = self._ids[key]

    def _new_number(self) -> int:
        self._count += 1
        return self._count

    def _read_index(self) -> Blobs:
        return tuple(path.read_bytes() if path.exists() else None for path in (self.store / name for name in INDEX))

    # -- recording --

    def _put(self, kind: str, words: str = "", **fields: Any) -> None:
        self._note_index()
        self.ops.append(Op(kind, words=words or kind, **fields))

    def _note_index(self) -> None:
        if self.fault is None:
            with contextlib.suppress(FileNotFoundError):  # removed between the look and the reading: next time
                blobs = self._read_index()
                if blobs != self._blobs:
                    self._blobs = blobs
                    self.ops.append(Op("index", data=blobs, words="SQLite changed the index"))

    def _gate(self, kind: str, what: object) -> None:
        """Count a call that may fail, and let it fail when it is its turn."""
        self.gated.append(f"{kind} of {what}")
        if self.fault is None:
            self._note_index()  # as it was up to this call
            return
        later = self.fault.lasting and len(self.gated) > self.fault.at and kind in TAKES_SPACE
        if len(self.gated) == self.fault.at or later:
            self.hit = self.hit or self.gated[-1]
            raise OSError(self.fault.number, os.strerror(self.fault.number))

    def _find_fd(self, fd: int) -> int | None:
        try:
            found = os.fstat(fd)
        except OSError:
            return None
        return self._ids.get((found.st_dev, found.st_ino))

    def _find(self, path: Any, folder: int | None) -> tuple[int, str] | None:
        """Return the folder of the model that a path lies in, and its last part; None outside of the root."""
        if isinstance(path, int):
            return None
        above, name = os.path.split(os.fsdecode(path))
        try:
            found = os.stat(above or ".", dir_fd=folder)
        except OSError:
            return None
        number = self._ids.get((found.st_dev, found.st_ino))
        return None if number is None or name in INDEX else (number, name)

    def _take_id(self, path: Any, folder: int | None) -> int:
        found = os.stat(path, dir_fd=folder, follow_symlinks=False)
        number = self._ids[found.st_dev, found.st_ino] = self._new_number()
        return number

    # -- the wrapped calls --

    def _os_open(self, real: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = self._find(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        if where is None:
            return real(path, flags, mode, dir_fd=dir_fd)
        with self._lock:
            existed = None
            with contextlib.suppress(FileNotFoundError):
                existed = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
            if existed is None or flags & os.O_TRUNC:
                self._gate("open", where[1])
            fd: int = real(path, flags, mode, dir_fd=dir_fd)
            if existed is None:
                mode = stat_bits.S_IMODE(os.fstat(fd).st_mode)
                number = self._take_id(path, dir_fd)
                words = f"create {where[1]}"
                self._put("create", words, inode=number, folder=where[0], name=where[1], data="file", at=mode)
            elif flags & os.O_TRUNC:
                self._put("truncate", f"empty {where[1]}", inode=self._find_fd(fd) or 0, at=0)
            return fd

    def _os_write(self, real: Any, fd: int, data: Any) -> int:
        number = self._find_fd(fd)
        if number is None:
            return real(fd, data)
        with self._lock:
            view = memoryview(data).cast("B") if len(data) else memoryview(b"")
            at = os.lseek(fd, 0, os.SEEK_CUR)
            try:
                self._gate("write", self._say(fd))
            except OSError:
                real(fd, view[: len(view) // 2])  # a disk that gets full in the middle of a write
                raise
            done: int = real(fd, data)
            if done:
                what = f"write {done} bytes at {at} of {self._say(fd)}"
                self._put("write", what, inode=number, at=at, data=bytes(view[:done]))
            return done

    def _os_pwrite(self, real: Any, fd: int, data: Any, offset: int) -> int:
        number = self._find_fd(fd)
        if number is None:
            return real(fd, data, offset)
        with self._lock:
            self._gate("write", self._say(fd))
            done: int = real(fd, data, offset)
            self._put("write", inode=number, at=offset, data=bytes(memoryview(data)[:done]))
            return done

    @staticmethod
    def _say(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def _os_copy_file_range(
        self, real: Any, src: int, dst: int, count: int, offset_src: int | None = None, offset_dst: int | None = None
    ) -> int:
        number = self._find_fd(dst)
        if number is None:
            return real(src, dst, count, offset_src, offset_dst)
        with self._lock:
            self._gate("copy_file_range", self._say(dst))
            at = os.lseek(dst, 0, os.SEEK_CUR) if offset_dst is None else offset_dst
            done: int = real(src, dst, count, offset_src, offset_dst)
            words = f"copy {done} bytes to {self._say(dst)}"
            self._put("write", words, inode=number, at=at, data=os.pread(dst, done, at))
            return done

    def _os_posix_fallocate(self, real: Any, fd: int, offset: int, length: int) -> None:
        number = self._find_fd(fd)
        if number is None:
            real(fd, offset, length)
            return
        with self._lock:
            self._gate("write", self._say(fd))
            real(fd, offset, length)
            self._put("truncate", f"take {length} bytes", inode=number, at=os.fstat(fd).st_size)

    def _os_ftruncate(self, real: Any, fd: int, length: int) -> None:
        number = self._find_fd(fd)
        if number is None:
            real(fd, length)
            return
        with self._lock:
            self._gate("ftruncate", self._say(fd))
            real(fd, length)
            self._put("truncate", f"truncate {self._say(fd)} to {length}", inode=number, at=length)

    def _os_fsync(self, real: Any, fd: int) -> None:
        number = self._find_fd(fd)
        if number is None:
            real(fd)
            return
        with self._lock:
            self._gate("fsync", self._say(fd))
            self._put("fsync", f"fsync {self._say(fd)}", inode=number)

    def _os_rename(
        self, real: Any, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        one, two = self._find(src, src_dir_fd), self._find(dst, dst_dir_fd)
        if one is None or two is None:
            real(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            return
        with self._lock:
            self._gate("rename", f"{one[1]} to {two[1]}")
            real(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            words = f"rename {one[1]} to {two[1]}"
            self._put("rename", words, folder=one[0], name=one[1], folder2=two[0], name2=two[1])

    def _os_link(
        self,
        real: Any,
        src: Any,
        dst: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        where = self._find(dst, dst_dir_fd)
        options = {"src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd, "follow_symlinks": follow_symlinks}
        if where is None:
            real(src, dst, **options)
            return
        with self._lock:
            self._gate("link", where[1])
            real(src, dst, **options)
            found = os.stat(dst, dir_fd=dst_dir_fd, follow_symlinks=False)
            number = self._ids[found.st_dev, found.st_ino]
            self._put("link", f"link {where[1]}", inode=number, folder=where[0], name=where[1])

    def _os_unlink(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", real, path, dir_fd)

    def _os_rmdir(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", real, path, dir_fd)

    def _remove(self, kind: str, real: Any, path: Any, folder: int | None) -> None:
        where = self._find(path, folder)
        if where is None:
            real(path, dir_fd=folder)
            return
        with self._lock:
            os.stat(path, dir_fd=folder, follow_symlinks=False)  # nothing there: no call that could fail otherwise
            self._gate(kind, where[1])
            real(path, dir_fd=folder)
            self._put("unlink", f"{kind} {where[1]}", folder=where[0], name=where[1])

    def _os_mkdir(self, real: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        where = self._find(path, dir_fd)
        if where is None:
            real(path, mode, dir_fd=dir_fd)
            return
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            self._gate("mkdir", where[1])
            real(path, mode, dir_fd=dir_fd)
            number = self._take_id(path, dir_fd)
            words = f"mkdir {where[1]}"
            self._put("create", words, inode=number, folder=where[0], name=where[1], data="folder", at=mode)

    def _os_symlink(self, real: Any, src: Any, dst: Any, *, dir_fd: int | None = None) -> None:
        where = self._find(dst, dir_fd)
        if where is None:
            real(src, dst, dir_fd=dir_fd)
            return
        with self._lock:
            self._gate("symlink", where[1])
            real(src, dst, dir_fd=dir_fd)
            number, target = self._take_id(dst, dir_fd), os.fsdecode(src)
            words = f"symlink {where[1]}"
            self._put("create", words, inode=number, folder=where[0], name=where[1], name2=target, data="link")

    def _os_fchmod(self, real: Any, fd: int, mode: int) -> None:
        number = self._find_fd(fd)
        if number is None:
            real(fd, mode)
            return
        with self._lock:
            self._gate("fchmod", self._say(fd))
            real(fd, mode)
            self._put("mode", f"fchmod {self._say(fd)}", inode=number, at=mode)

    def _os_utime(self, real: Any, path: Any, times: Any = None, **options: Any) -> None:
        number = self._find_fd(path) if isinstance(path, int) else None
        if number is None:
            real(path, times, **options) if times else real(path, **options)
            return
        with self._lock:
            self._gate("utime", self._say(path))
            real(path, **options)
            self._put("mtime", f"utime {self._say(path)}", inode=number, at=options["ns"][1])

    def _sync_filesystem(self, real: Any, fd: int) -> None:
        beside: Beside | None = getattr(self._own, "beside", None)
        with self._lock:
            self._gate("sync", "the filesystem")
            if beside is None:
                self._put("sync", "sync the filesystem")
                return
            self._beside.append(beside)
            number = len(self._beside)
            self._put("begin_sync", f"begin sync {number} of the filesystem", at=number)
        beside.begun.set()
        beside.awaited.wait()
        with self._lock:
            if not self._over:
                self._put("end_sync", f"end sync {number} of the filesystem", at=number)

    def _slow_syncing(self, real: Any) -> Any:
        """Return the program's Syncing, made to begin before it is returned and to end when it is waited for."""
        own = self._own

        class Slow(real):  # type: ignore
            def __init__(self, fd: int) -> None:
                self._times = Beside()
                super().__init__(fd)
                self._times.begun.wait()

            def _run(self) -> None:
                own.beside = self._times
                super()._run()
                self._times.begun.set()  # where it has failed, too

            def join(self) -> None:
                self._times.awaited.set()
                super().join()

        return Slow

    def _clone_file(self, real: Any, source: int, target: int) -> bool:
        number = self._find_fd(target)
        with self._lock:
            done: bool = real(source, target)
            if done and number is not None:
                size = os.fstat(target).st_size
                self._put("write", f"clone to {self._say(target)}", inode=number, at=0, data=os.pread(target, size, 0))
            return done

    def _save_snapshot(self, real: Any, folder: Any, snapshot: Any) -> Any:
        saved = real(folder, snapshot)
        with self._lock:
            self._put("report", f"snapshot {saved.name} is reported", name=saved.name)
        return saved

    def _connect(self, real: Any, database: Any, *arguments: Any, **options: Any) -> Any:
        recorder = self
        if os.path.basename(os.fsdecode(database)) != INDEX[0]:
            return real(database, *arguments, **options)

        class Connection(sqlite3.Connection):
            """The index's connection, whose transactions fail as SQLite lets them fail on such a disk."""

            full = False  # whether a commit is durable at once

            def execute(self, sql: str, *values: Any) -> Any:
                if sql.startswith("PRAGMA synchronous"):
                    self.full = sql.endswith("FULL")
                if sql in ("BEGIN IMMEDIATE", "COMMIT"):
                    with recorder._lock:
                        try:
                            recorder._gate("index", "the index")
                        except OSError as error:
                            if self.in_transaction:  # as SQLite itself does after such an error
                                super().execute("ROLLBACK")
                            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                            raise sqlite3.OperationalError(
                                "database or disk is full" if full else "disk I/O error"
                            ) from None
                done = super().execute(sql, *values)
                if self.full and sql == "COMMIT":
                    with recorder._lock:
                        recorder._put("settle", "the index is synced")
                return done

        return real(database, *arguments, factory=Connection, **options)

    # -- on and off --

    def __enter__(self) -> Recorder:
        for name in dir(self):
            if name.startswith("_os_"):
                self._wrap(os, name[4:], getattr(self, name))
        self._wrap(os, "replace", self._os_rename)
        self._wrap(os, "remove", self._os_unlink)
        self._wrap(os, "fdatasync", self._os_fsync)
        self._wrap(self.program, "sync_filesystem", self._sync_filesystem)
        self._wrap(self.program, "clone_file", self._clone_file)
        self._wrap(self.program.NodeFolder, "save_snapshot", self._save_snapshot)
        self._wrap(sqlite3, "connect", self._connect)
        self._replace(self.program, "Syncing", self._slow_syncing(self.program.Syncing))
        if self.batch:
            self._replace(self.program, "PUBLISH_FILES", self.batch)
            self._replace(self.program, "BATCH_FILES", max(1, self.batch // 2))
        return self

    def _wrap(self, owner: Any, name: str, wrapper: Any) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            return wrapper(real, *arguments, **options)

        self._replace(owner, name, call)

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, new)

    def __exit__(self, *reason: object) -> None:
        self._undo.close()
        with self._lock:
            self._over = True
        for beside in self._beside:
            beside.awaited.set()  # nobody did: its end is not recorded, but its thread goes away
        self._note_index()


# ---- running commands in this process ----


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    said: str

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.said[self.said.index("{") :].splitlines()[0])
        return found


def run(program: ModuleType, *arguments: str) -> Done:
    """Run a command in this process; Hang where it does not end."""

    def on_alarm(number: int, frame: object) -> None:
        raise Hang(f"{arguments} did not end within {TIMEOUT} s")

    said = io.StringIO()
    before = signal.signal(signal.SIGALRM, on_alarm)
    dup2 = os.dup2
    signal.alarm(TIMEOUT)
    try:
        # main() gives up standard output after an error that nobody turned into a sentence.
        os.dup2 = lambda *ignored: said.write("Traceback: an OSError got out of the command")  # type: ignore
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = program.main(arguments)
        return Done(code, said.getvalue())
    except SystemExit as ended:
        return Done(int(ended.code or 0), said.getvalue())
    finally:
        os.dup2 = dup2
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def load_changed(*changes: tuple[str, str]) -> ModuleType:
    """Return zbackup with its source changed: each old text, which must be there once, becomes the new one."""
    text = PROGRAM.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"zbackup.py has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    name = f"zbackup_changed_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module


# ---- what must be true ----


State = dict[str, tuple[Any, ...]]  # path -> kind, content or target, and the time of a file


def read_state(top: Path, times: bool = True) -> State:
    """Return all that stands below a folder."""
    found: State = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = ("symlink", os.readlink(path))
        elif path.is_dir():
            found[name] = ("directory",)
        else:
            found[name] = ("file", path.read_bytes(), path.stat().st_mtime_ns if times else 0)
    return found


def read_snapshot(program: ModuleType, reader: Any, snapshot: Any, damaged: bool = False) -> State:
    """Return all that a snapshot holds, every chunk checked; with `damaged`, of what can be read."""
    found: State = {}
    faults = (program.StoreError, program.FormatError) if damaged else ()
    for entry in program.list_entries(reader, snapshot.blocks, (lambda error: None) if damaged else None):
        stat = entry.stat
        if stat.kind == "file":
            stream = io.BytesIO()
            with contextlib.suppress(*faults):
                program.write_stream(reader, entry.content, stream)
                found[os.fsdecode(stat.path)] = ("file", stream.getvalue(), stat.mtime)
        elif stat.kind == "symlink":
            found[os.fsdecode(stat.path)] = ("symlink", os.fsdecode(stat.target))
        else:
            found[os.fsdecode(stat.path)] = (stat.kind,)
    return found


def differ(found: State, wanted: State) -> str:
    """Say where two states differ; "" where they do not."""
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            one, two = (str(state.get(path, "absent"))[:60] for state in (found, wanted))
            return f"{path}: {one} instead of {two}"
    return ""


class Loss(Exception):
    """Something that a crash must not cost."""


def demand(condition: object, sentence: str) -> None:
    """Raise Loss unless the condition holds."""
    if not condition:
        raise Loss(sentence)


def shift_clock(clock: Any, ago: int) -> Any:
    """Return a clock that is late by some nanoseconds."""
    return dataclasses.replace(clock, now=lambda: clock.now() - ago)


class Scene:
    """A node that runs, its files, and the folders in which stores are tried."""

    def __init__(self, world: World, program: ModuleType = zbackup) -> None:
        self.world = world
        self.program = program
        shared = Path("/dev/shm")  # in memory: there are thousands of trees to write
        where = shared if os.access(shared, os.W_OK) else world.path
        self.ground = Path(tempfile.mkdtemp(prefix="zbackup-crash-", dir=where))
        self.states: dict[str, State] = {}  # of the snapshots made before the command
        self.free: set[str] = set()  # those of them that need not be there any more
        world.node("--margin", "0")  # what it serves is at rest

    def close(self) -> None:
        """Remove all trees."""
        shutil.rmtree(self.ground)

    def folder(self, name: str, like: Path | None = None) -> Path:
        """Return an empty folder for a store called `backups`, or a copy of another one."""
        path = self.ground / name
        shutil.rmtree(path, ignore_errors=True)
        if like:
            shutil.copytree(like, path, symlinks=True)
        else:
            path.mkdir()
        return path

    def source(self) -> State:
        """Return what the node serves now, as snapshots name it."""
        below = read_state(self.world.files)
        return {"files": ("directory",), **{f"files/{path}": what for path, what in below.items()}}

    def server(self, place: Path, *flags: str) -> list[str]:
        """Return the arguments of one sweep into the store in a folder."""
        limits = ["--pack-size", "48KiB", "--reserve", "16KiB", "--timeout", "5s"]
        return [*self.world.server_flags("--json", *limits, *flags), "--store", str(place / "backups")]

    def sweep(self, place: Path, *flags: str) -> str:
        """Make one sweep, which must be good; returns the name of its snapshot."""
        done = run(self.program, *self.server(place, *flags))
        demand(done.code == 0, f"the sweep ended with {done.code}: {done.said[-800:]}")
        (node,) = done.report["nodes"]
        return str(node["snapshot"]["name"])

    def find_states(self, name: str) -> list[State]:
        """Return what a snapshot may hold: what it held, what the node has, what `repair` makes of a damaged one."""
        if name in self.states:
            return [self.states[name]]
        return [self.source(), *(self.states[free] for free in sorted(self.free))]

    def keep(self, place: Path, *flags: str) -> None:
        """Make a snapshot that the store has before the command that is tried, as if some days ago."""
        real = self.program.make_clock
        ago = (100 - len(self.states)) * 3600 * 10**9  # so that no later snapshot gets the same name
        self.program.make_clock = lambda: shift_clock(real(), ago)
        try:
            self.states[self.sweep(place, *flags)] = self.source()
        finally:
            self.program.make_clock = real


def check_snapshots(scene: Scene, place: Path, required: set[str], new: str = "", damaged: bool = False) -> None:
    """Demand that the store opens by itself, and that its snapshots are there and whole, the newest called `new`.

    With `damaged` parts may be missing, but nothing may be other than it was.
    """
    program = scene.program
    with contextlib.closing(program.open_store(str(place / "backups"))) as store:
        snapshots = store.node(FOLDER).list_snapshots()
        missing = (required | {new} - {""}) - {snapshot.name for snapshot in snapshots}
        demand(not missing, f"lost: the snapshots {sorted(missing)}")
        with contextlib.closing(store.reader()) as reader:
            for snapshot in snapshots:
                found = read_snapshot(program, reader, snapshot, damaged)
                wrong = [
                    differ(found, {p: wanted[p] for p in found if p in wanted} if damaged else wanted)
                    for wanted in ([scene.source()] if snapshot.name == new else scene.find_states(snapshot.name))
                ]
                demand("" in wrong, f"the snapshot {snapshot.name} is not what it was: {wrong}")
        demand(damaged or not store.problems, f"the store is damaged: {store.problems}")
        newest = snapshots[-1].name if snapshots else ""
        demand(not new or newest == new, f"the newest snapshot is {newest}, not {new}")


def check_half(scene: Scene, top: Path) -> None:
    """Demand that each file below a folder is as it was in some snapshot, or as it is now: never a half."""
    known = [*scene.states.values(), scene.source()]
    for path, found in read_state(top, times=False).items() if top.is_dir() else ():
        if found[0] == "file" and not os.path.basename(path).startswith(LEFTOVERS):
            whole = any(state.get(path, ("",))[:2] == found[:2] for state in known)
            demand(whole, f"{top.name} has {path} as it never was: {found[1][:60]!r} ({len(found[1])} bytes)")


def check_restored(scene: Scene, place: Path, ended: bool) -> None:
    """Demand that what a restore left has no half file, that another one completes it, and that one that ended has."""
    check_half(scene, place / "restored")
    if not ended:
        must(scene, place, *RESTORE_AGAIN, str(place / "restored"))
    (wanted,) = scene.states.values()
    wrong = differ(read_state(place / "restored"), wanted)
    demand(not wrong, f"what was restored is not the snapshot: {wrong}")


def check_latest(scene: Scene, place: Path) -> None:
    """Demand that `latest` is what the node serves, file for file."""
    wrong = differ(read_state(place / "backups" / FOLDER / "latest"), scene.source())
    demand(not wrong, f"latest is not the newest snapshot: {wrong}")


def check_leftovers(place: Path) -> None:
    """Demand that no unfinished file is left anywhere."""
    left = [path for path in sorted((place / "backups").rglob("*")) if path.name.startswith(LEFTOVERS)]
    demand(not left, f"leaked: {[str(path.relative_to(place)) for path in left]}")


def find_live(program: ModuleType, store: Any) -> set[bytes]:
    """Return all digests that the snapshots of a store name, at whatever remove."""
    live: set[bytes] = set()
    with contextlib.closing(store.reader()) as reader:
        for node in store.list_nodes():
            for snapshot in store.node(node.folder).list_snapshots():
                live.update(snapshot.blocks)
                for entry in program.list_entries(reader, snapshot.blocks):
                    if entry.stat.kind == "file":
                        live.update(entry.content.lists)
                        live.update(c for c in program.list_chunks(reader, entry.content) if isinstance(c, bytes))
        for digest in list(live):
            live.update(run.source for run in reader.runs(digest))
    return live


def check_packs(scene: Scene, place: Path) -> None:
    """Demand that every pack holds something that a snapshot names, and the trash nothing."""
    program = scene.program
    with contextlib.closing(program.open_store(str(place / "backups"))) as store:
        live = find_live(program, store)
        for name, path in program.list_packs(store.packs).items():
            held = {row[0] for row in program.read_pack_index(path)}
            demand(held & live, f"leaked: pack {name} holds nothing that a snapshot names")
    trash = [path.name for path in (place / "backups").glob("*/trash/*")]
    demand(not trash, f"leaked: {trash} in the trash")


def must(scene: Scene, place: Path, *command: str) -> None:
    """Run a command on a store, and demand that it ends well."""
    done = run(scene.program, *command, "--store", str(place / "backups"))
    demand(done.code == 0, f"{' '.join(command)} ended with {done.code}: {done.said[-800:]}")


def check(scene: Scene, case: Case, place: Path, required: set[str], ended: bool = False) -> None:
    """Demand of what a crash left: nothing is lost, the next sweep is good, and nothing leaks.

    With `ended` the command had ended, and well.
    """
    made = (place / "backups" / "zbackup.json").exists()
    demand(made or not required, "lost: the whole store")
    if case.mend:
        check_snapshots(scene, place, set(), damaged=True)
        must(scene, place, *case.mend)
    if made and not case.damaged:
        check_snapshots(scene, place, required)
        check_half(scene, place / "backups" / FOLDER / "latest")
    if case.also:
        case.also(scene, place, ended)
    name = scene.sweep(place)
    check_snapshots(scene, place, required, name)
    check_latest(scene, place)
    check_leftovers(place)
    must(scene, place, "prune", "--grace", "0s", "--quiet")
    must(scene, place, "verify", "--quiet")
    check_snapshots(scene, place, required, name)
    check_packs(scene, place)
    check_leftovers(place)


# ---- the matrix ----


@dataclass(frozen=True)
class Case:
    """One command: what stands before it, how it is called, what it may take away."""

    name: str
    prepare: Callable[[Scene, Path], None]  # makes the store, then changes what the node serves
    command: Callable[[Scene, Path], list[str]]
    removes: bool = False  # whether it may take away the snapshots that it does take away
    again: Callable[[Scene, Path], list[str]] | None = None  # how it is called after a failure, if not the same way
    mend: tuple[str, ...] = ()  # a command that a user would run after the crash
    damaged: bool = False  # whether the store has damage, which is healed by `mend` and the next sweep
    batch: int = 0  # how many files are synced together, beside the writing of the next ones; 0: all of them, at last
    also: Callable[[Scene, Path, bool], None] | None = None  # what else must be true, and whether the command had ended
    codes: tuple[int, ...] = (0, 4)  # how it may end when a call fails


CUT_OFF = "cut off"


@dataclass
class Result:
    """What was tried of one case in one way."""

    case: str
    how: str
    recorded: int = 0  # calls
    tried: int = 0
    trees: int = 0  # that differ, among those that crashes left
    lost: list[str] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # exit codes of commands with a failing call
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def __str__(self) -> str:
        codes = ", ".join(f"{count} with {code}" for code, count in sorted(self.codes.items()))
        ended = f"; ended {codes}" if codes else f", {self.trees} different trees"
        what = f"{self.case}, {self.how}: {self.recorded} calls, {self.tried} tried{ended}"
        return f"{what}; {len(self.lost)} lost; {self.seconds:.0f} s"


def write_table(results: Sequence[Result]) -> str:
    """Return the table of the README: what was tried, and what it cost."""
    lines = [
        "| operation | calls recorded | crashes tried | different trees | failing calls tried | lost |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(result.case for result in results):
        mine = [result for result in results if result.case == case]
        cut = [result for result in mine if result.how == CUT_OFF]
        failing = sum(result.tried for result in mine if result.how != CUT_OFF)
        recorded, tried, trees = ([getattr(result, name) for result in cut] for name in ("recorded", "tried", "trees"))
        lost = sum(len(result.lost) for result in mine)
        lines.append(f"| {case} | {sum(recorded)} | {sum(tried)} | {sum(trees)} | {failing} | {lost} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Effort:
    """How much is tried: all in order, or a sample in random order."""

    seed: int
    seconds: float | None = None  # for which a sample goes on
    least: int = 5  # how many a sample tries at least, or it would say nothing
    first: bool = False  # whether the first loss is enough

    @property
    def sampled(self) -> bool:
        """Whether the order is random."""
        return self.seconds is not None or self.first

    def order(self, numbers: Sequence[int]) -> list[int]:
        """Return numbers in the order in which they are tried."""
        return random.Random(self.seed).sample(numbers, len(numbers)) if self.sampled else list(numbers)

    def over(self, result: Result) -> bool:
        """Tell whether it is enough."""
        result.seconds = time.monotonic() - result.started
        late = self.seconds is not None and result.seconds > self.seconds and result.tried >= self.least
        return late or (self.first and bool(result.lost))


class Matrix:
    """One case, cut off at every instant, and with every call failing."""

    def __init__(self, scene: Scene, case: Case) -> None:
        self.scene = scene
        self.case = case
        self.base = scene.folder("base")
        case.prepare(scene, self.base)
        place = scene.folder("record", self.base)
        with Recorder(scene.program, place, "backups", batch=case.batch) as recorder:
            done = run(scene.program, *case.command(scene, place))
        assert done.code == 0, f"{case.name} ended with {done.code}: {done.said}"
        self.ops, self.calls, self.before = recorder.ops, recorder.gated, recorder.before
        self._compare(place)
        assert not case.batch or self._syncs_beside(), f"{case.name} wrote nothing beside a sync"
        there = {path.stem for path in (place / "backups" / FOLDER / "snapshots").glob("2*.json")}
        gone = set(scene.states) - there - scene.free
        assert case.removes == bool(gone), f"{case.name} took the snapshots {sorted(gone)} away"
        self.kept = set(scene.states) - scene.free - (set() if case.mend else gone)

    def _syncs_beside(self) -> bool:
        """Tell whether files were written while others were synced, and whether that happened twice."""
        kinds = [op.kind for op in self.ops]
        starts = [at for at, kind in enumerate(kinds) if kind == "begin_sync"]
        return len(starts) > 1 and all("create" in kinds[one:two] for one, two in zip(starts, starts[1:]))

    def _compare(self, place: Path) -> None:
        """Check that the record has all that was done."""
        drawn = self.replay(len(self.ops)).draw(Choice(), "backups")
        again = self.scene.folder("again")
        write_tree(drawn, again)
        for one, two in ((again, place), (place, again)):
            for path in one.rglob("*"):
                other = two / path.relative_to(one)
                assert other.is_symlink() or other.exists(), f"{path} was not seen by the recorder"
                if path.is_file() and not path.is_symlink() and path.name != INDEX[2]:
                    assert path.read_bytes() == other.read_bytes(), f"{path} is not as recorded"
                    assert path.stat().st_mode == other.stat().st_mode, f"{path} has another mode than recorded"

    def replay(self, count: int) -> Disk:
        """Return the disk after the first calls of the record."""
        disk = copy.deepcopy(self.before)
        for op in self.ops[:count]:
            disk.apply(op)
        return disk

    def choices(self, instant: int, seed: int) -> list[Choice]:
        """Return what may be left at an instant."""
        torn = [Torn(random.Random(f"{seed}/{instant}/{number}")) for number in range(3)]
        return [Choice(), Lost(), Empty(), Zeros(), *torn]

    def crash(self, effort: Effort) -> Result:
        """Cut the command off at instants, each in all ways."""
        result = Result(self.case.name, CUT_OFF, len(self.ops))
        seen: set[object] = set()
        for instant in effort.order(range(len(self.ops) + 1)):
            for choice in self.choices(instant, effort.seed):
                if effort.over(result):
                    return result
                disk = self.replay(instant)
                tree = disk.draw(choice, "backups")
                required = self.kept | set(disk.reported)
                result.tried += 1
                mark = fingerprint(tree), frozenset(required), instant == len(self.ops)
                if mark in seen:
                    continue  # the same bytes as at another instant
                seen.add(mark)
                result.trees += 1
                place = self.scene.folder("crashed")
                write_tree(tree, place)
                last = self.ops[instant - 1].words if instant else "nothing"
                where = f"{choice.name} at instant {instant} of {len(self.ops)}, after: {last}, seed {effort.seed}"
                self._try(result, where, place, required, self.case, instant == len(self.ops))
        return result

    def _try(self, result: Result, where: str, place: Path, required: set[str], case: Case, ended: bool) -> None:
        try:
            check(self.scene, case, place, required, ended)
        except (Loss, Hang, OSError, sqlite3.Error, self.scene.program.BackupError) as error:
            kind = "" if isinstance(error, Loss) else f"{type(error).__name__}: "
            result.lost.append(f"{self.case.name}, {where}: {kind}{error}")

    def fail(self, number: int, lasting: bool, effort: Effort) -> Result:
        """Let each call of the command fail, and run it again."""
        how = f"{errno.errorcode[number]}{' from then on' if lasting else ''}"
        result = Result(self.case.name, how, len(self.calls))
        most = len(self.calls) * (1 if effort.sampled else 2)  # the record's run may have made fewer calls
        for at in effort.order(range(1, most + 1)):
            if effort.over(result) or not (self._fail(result, Fault(number, at, lasting)) or effort.sampled):
                break
        return result

    def fail_calls(self, number: int, pattern: str) -> Result:
        """Let each of the calls fail whose words match a pattern."""
        result = Result(self.case.name, errno.errorcode[number], len(self.calls))
        for at, call in enumerate(self.calls, 1):
            if re.search(pattern, call):
                self._fail(result, Fault(number, at))
        assert result.tried, f"no call matches {pattern}"
        return result

    def _fail(self, result: Result, fault: Fault) -> bool:
        """Try one failing call; False where the command made fewer calls."""
        scene = self.scene
        place = scene.folder("failed", self.base)
        where = f"{result.how} at call {fault.at}"
        try:
            with Recorder(scene.program, place, "backups", fault, self.case.batch) as recorder:
                done = run(scene.program, *self.case.command(scene, place))
            if not recorder.hit:
                demand(done.code == 0, f"ended with {done.code} without a fault: {done.said}")
                return False
            where += f", {recorder.hit}"
            result.tried += 1
            result.codes[done.code] = result.codes.get(done.code, 0) + 1
            said = f"it ended with {done.code} and said: {done.said[-800:]}"
            reported = {op.name for op in recorder.ops if op.kind == "report"}
            # 1: the snapshot is there, latest is not
            demand(done.code in ((0, 1, 4) if reported else self.case.codes), said)
            demand("Traceback" not in done.said and "a fault of zbackup" not in done.said, said)
            if done.code == 0:
                demand("server" not in self.case.command(scene, place) or reported, f"silent: {said}")
            else:
                again = run(scene.program, *(self.case.again or self.case.command)(scene, place))
                demand(again.code == 0, f"the next run ended with {again.code}: {again.said[-800:]}")
        except (Loss, Hang) as error:
            result.lost.append(f"{self.case.name}, {where}: {error}")
            return True
        # A repair has ended well by now, and is not run once more.
        case = dataclasses.replace(self.case, mend=()) if self.case.damaged else self.case
        self._try(result, where, place, self.kept | reported, case, ended=True)
        return True


# ---- the cases of pulls ----


NOON = 1_700_000_000 * 10**9


def put(path: Path, data: bytes, at: int) -> None:
    """Write a file of the node with a time of its own."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(NOON + at, NOON + at))


def fill_database(path: Path, first: int, last: int) -> None:
    """Add rows that do not compress well to a database, at rest afterwards."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS t (a INTEGER PRIMARY KEY, b BLOB)")
        dice = random.Random(first)
        rows = [(i, dice.randbytes(300)) for i in range(first, last)]
        database.executemany("INSERT OR REPLACE INTO t VALUES (?, ?)", rows)
        database.commit()


def fill(scene: Scene) -> None:
    """Give the node its first files: small ones, one of two chunks, a database, links, an empty one."""
    files, dice = scene.world.files, random.Random(1)
    for number in range(6):
        put(files / f"text{number}", b"line %d\n" % number * 50 * number, number)
    put(files / "sub" / "noise", dice.randbytes(60_000), 10)
    put(files / "sub" / "empty", b"", 11)
    put(files / "long", b"".join(b"%7d\n" % (i // 64) for i in range(150_000)), 12)  # 1.2 MB, of two chunks
    (files / "old").mkdir()
    put(files / "old" / "noise", dice.randbytes(30_000), 13)
    os.symlink("text1", files / "link")
    fill_database(files / "base.db", 0, 300)


def change(scene: Scene) -> None:
    """Change, add and delete files, and patch the database."""
    files, dice = scene.world.files, random.Random(2)
    put(files / "text1", b"another line\n", 100)
    put(files / "text2", b"", 101)
    (files / "text3").unlink()
    put(files / "text4", b"line 4, changed\n", 105)  # with it an odd number of files: `latest in batches` has a rest
    shutil.rmtree(files / "old")
    put(files / "new" / "noise", dice.randbytes(70_000), 102)
    put(files / "old", b"a file where a folder was", 103)
    data = bytearray((files / "long").read_bytes())
    data[500_000:500_008] = b"changed\n"
    put(files / "long", bytes(data), 104)
    fill_database(files / "base.db", 100, 140)


def prepare_first(scene: Scene, place: Path) -> None:
    """There is no store."""
    fill(scene)


def prepare_second(scene: Scene, place: Path) -> None:
    """There is a store with one snapshot; then the files change."""
    fill(scene)
    scene.keep(place)
    change(scene)


def prepare_latest(scene: Scene, place: Path) -> None:
    """There is a store with two snapshots, and `latest` shows the first one."""
    prepare_second(scene, place)
    scene.keep(place, "--no-latest")


def prepare_killed(
    prepare: Callable[[Scene, Path], None], word: str, count: int, batch: int = 0
) -> Callable[[Scene, Path], None]:
    """Return a function that makes a store whose last pull was killed after its `count`-th call with a word."""

    def make(scene: Scene, place: Path) -> None:
        prepare(scene, place)
        with Recorder(scene.program, place, "backups", batch=batch) as recorder:
            done = run(scene.program, *scene.server(place))
        demand(done.code == 0, done.said)
        calls = [number for number, op in enumerate(recorder.ops, 1) if word in op.words]
        disk = recorder.before
        for op in recorder.ops[: calls[count - 1]]:
            disk.apply(op)
        shutil.rmtree(place)
        place.mkdir()
        write_tree(disk.draw(Choice(), "backups"), place)
        scene.states.update(dict.fromkeys(disk.reported, scene.source()))

    return make


def prepare_many(scene: Scene, place: Path) -> None:
    """There is a store with five snapshots, whose packs are needed in full, in part and not at all."""
    fill(scene)
    scene.keep(place)
    files, dice = scene.world.files, random.Random(3)
    for number in range(4):
        put(files / "sub" / "noise", dice.randbytes(50_000), 200 + number)  # replaced each time
        put(files / f"kept{number}", dice.randbytes(20_000), 210 + number)
        if number == 1:
            change(scene)
        scene.keep(place)


def prepare_trash(scene: Scene, place: Path) -> None:
    """There is a store with three snapshots in the trash."""
    prepare_many(scene, place)
    must(scene, place, "prune", "--keep", "last 2")
    scene.free.update(sorted(scene.states)[:-2])


def prepare_undelete(scene: Scene, place: Path) -> None:
    """The same, and they are wanted back."""
    prepare_trash(scene, place)
    scene.free.clear()


def prepare_damaged_pack(scene: Scene, place: Path) -> None:
    """There is a store with two snapshots and a pack of which a part is damaged that the node still has."""
    prepare_second(scene, place)
    scene.keep(place)
    program = scene.program
    with contextlib.closing(program.open_store(str(place / "backups"))) as store:
        noise = scene.world.files / "sub" / "noise"
        digest = program.digest_pages(program.hash_pages(noise.read_bytes()))
        (found,) = store.index.find_all([digest])[digest]
        path = program.list_packs(store.packs)[found.pack]
    data = bytearray(Path(path).read_bytes())
    at = data.index(noise.read_bytes()[1000:1100])  # noise does not compress
    data[at : at + 10] = bytes(10)
    Path(path).write_bytes(data)


def prepare_damaged_snapshot(scene: Scene, place: Path) -> None:
    """There is a store with two snapshots, of which the first one's file is damaged."""
    prepare_second(scene, place)
    scene.keep(place)
    name = min(scene.states)
    path = place / "backups" / FOLDER / "snapshots" / f"{name}.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"sequence": 1', b'"sequence": 7'))
    scene.free.add(name)


def sweep(scene: Scene, place: Path) -> list[str]:
    return scene.server(place)


# By one process: what others do is not recorded.
RESTORE_AGAIN = ("restore", FOLDER, "--quiet", "--jobs", "1", "--overwrite", "--to")


def restore(scene: Scene, place: Path) -> list[str]:
    return [
        "restore",
        FOLDER,
        "--quiet",
        "--jobs",
        "1",
        "--to",
        str(place / "restored"),
        "--store",
        str(place / "backups"),
    ]


def restore_again(scene: Scene, place: Path) -> list[str]:
    return [*RESTORE_AGAIN, str(place / "restored"), "--store", str(place / "backups")]


def on_store(*command: str) -> Callable[[Scene, Path], list[str]]:
    """Return a function that gives the arguments of a command for a store."""
    return lambda scene, place: [*command, "--store", str(place / "backups")]


def tear_index(place: Path, sector: int, dice: random.Random) -> None:
    """Put garbage into a sector of the index, which SQLite itself never leaves after a power cut."""
    with open(place / "backups" / INDEX[0], "r+b") as file:
        file.seek(sector * SECTOR)
        file.write(dice.randbytes(SECTOR))


CASES = {
    case.name: case
    for case in (
        Case("first pull", prepare_first, lambda scene, place: scene.server(place, "--no-latest")),
        Case("second pull", prepare_second, lambda scene, place: scene.server(place, "--no-latest")),
        Case("pull and latest", prepare_second, sweep),
        Case("latest alone", prepare_latest, sweep),
        Case("latest in batches", prepare_latest, sweep, batch=2),
        Case("pull after a killed pull", prepare_killed(prepare_second, "to progress.json", 1), sweep),
        Case("pull after a killed latest", prepare_killed(prepare_second, "to text", 1, batch=2), sweep, batch=2),
        Case(
            "pull and prune",
            prepare_many,
            lambda scene, place: scene.server(place, "--keep", "last 2", "--grace", "0s"),
            removes=True,
            again=sweep,  # the same command would keep two new ones
        ),
        Case("prune", prepare_many, on_store("prune", "--keep", "last 2", "--grace", "0s"), removes=True),
        Case(
            "prune to the trash",
            prepare_many,
            on_store("prune", "--keep", "last 2"),
            removes=True,
            mend=("undelete", FOLDER, "--all"),
        ),
        Case("prune of the trash", prepare_trash, on_store("prune", "--grace", "0s")),
        Case("restore", prepare_second, restore, again=restore_again, batch=4, also=check_restored, codes=(0, 1, 4)),
        Case("undelete", prepare_undelete, on_store("undelete", FOLDER, "--all"), mend=("undelete", FOLDER, "--all")),
        Case("repair of a pack", prepare_damaged_pack, on_store("repair"), mend=("repair",), damaged=True),
        Case("repair of a snapshot", prepare_damaged_snapshot, on_store("repair"), mend=("repair",), damaged=True),
    )
}
