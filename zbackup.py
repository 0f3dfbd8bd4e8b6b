#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pyzmq>=24", "backports.zstd; python_version < '3.14'"]
# ///
"""zbackup: a central server backs up the machines of a LAN over ZeroMQ.

    python zbackup.pyz server --range 9-12      sweep 127.0.0.9 to .12 every hour
    python zbackup.pyz node --file files/bd     on each machine: what it may serve

Chapters, in order; each uses only what stands above it:

     1. SETTINGS   every figure, its unit and why
     2. ERRORS     what can go wrong, and the exit code of each
     3. RECORDS    the nouns, and each format beside its struct
     4. DISK       durable writes, locks, folders that cannot be left
     5. KEYS       who a node is, and whom it trusts
     6. WIRE       sockets, kinds of message, credit
     7. STORE      packs, index, snapshots
     8. KEEP       what may go, what is damaged, and what is done about it
     9. NODE       scan, freeze, read, answer
    10. SWEEP      probe, pull, schedule
    11. RESTORE    a snapshot back to files
    12. REPORT     records in, text and JSON out
    13. COMMANDS   flags, signals, the clock; the only chapter that prints

Words: a *page* is 4 KiB of a file, the grain of change.  A *chunk* is up to
1 MiB of a file at a 1 MiB boundary, named by its *digest*: the SHA-256 of its
pages' hashes, each a SHA-256 cut to 16 bytes.  A chunk is kept *whole* or as a
*patch*, runs of bytes of whole chunks.  A *frame* is about 1 MiB of chunks
compressed together, a *pack* an append-only file of frames, the *index* a
SQLite table from digest to place.  A *needle* is the first 16 bytes of a page,
by which it is looked for in the old version of its file.  An *entry* is one
path and its content, a *block* some hundred entries, a *snapshot* all entries
of one node at one time.  A *sweep* is one pass over the addresses.

On disk (the formats stand in RECORDS):

    backups/zbackup.json                      the store's format, id and required features
    backups/lock                              shared to write, exclusive to delete
    backups/index.sqlite                      rebuilt from the packs when lost
    backups/keys/server                       the secret key; nodes have its public half
    backups/reserve                           given back when the disk is full
    backups/verified.json, drill.json         when each pack was read, each node drilled
    backups/damage/                           packs known lost or damaged; what is lost for good
    backups/aside/                            damaged files that `repair` moved away
    backups/packs/3f/3f09….pack               named by the SHA-256 of its bytes
    backups/127.0.0.9/node.json               identity, addresses, first and last seen
    backups/127.0.0.9/snapshots/2026-….json   one version of all the node's files
    backups/127.0.0.9/trash/2026-…~2026-….json  one that was removed, and when
    backups/127.0.0.9/progress.json           what a pull that was cut off had
    backups/127.0.0.9/latest/                 the newest version as plain files
    backups/127.0.0.9/latest.json             which snapshot `latest` shows

On the wire, each message is two frames, a JSON head and a binary body; the
server (DEALER) asks, the node (ROUTER) answers in the order of the questions.
The server's connecting socket is the CURVE server, the node's bound one its
client: so a node needs the server's public key, and the server learns the
node's, which is who it is, in the handshake.

    HELLO  version and codecs      ->  version, identity, name, wish for a folder, roots
    OPEN   codec                   ->  roots that are missing, what --before said
    LIST                           ->  the next entries, sorted by path
    READ   files, chunks, hashes   ->  for each: same, patch, whole or zeros; or, where the
                                       server wants to be told, pages (their hashes and
                                       needles); asked again then, the part that is needed
    CLOSE                          ->  done; --after has run
    Any of them may answer WORKING (not done yet) or ERROR (one sentence).

Invariants, cited as I1 … I8:

    I1  A snapshot exists only when its JSON file does: written to a temporary
        name, synced, renamed, folder synced, after everything it names.
    I2  Order: pack, sync, rename, sync folder; then index; then snapshot.
    I3  Nothing that a snapshot names is ever overwritten or appended to.
    I4  The index holds nothing that the packs do not.
    I5  What is received is decoded and its digest checked before it is kept.
    I6  Deletion follows a plan made under the exclusive lock.
    I7  Times that decide come from the server's clock; sequence numbers break
        ties.  A node's times are compared for equality only.
    I8  A file that changed while being read is never recorded as good.

Exit codes: 0 all good; 1 a node failed, or a copy is torn or partial; 2 wrong
usage; 3 a node is missing for too long; 4 the store is damaged, full or
locked; 5 nobody answered; 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import stat as stat_bits
import struct
import sys
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, NamedTuple, NoReturn, TextIO, Union

if TYPE_CHECKING:
    import io
    import ipaddress
    import socket
    import sqlite3

    import zmq

# Imported where they are used, for a quick start and `--help`: zmq, sqlite3,
# datetime, fcntl, glob, grp, ipaddress, pickle, pwd, queue, secrets, shlex,
# socket, subprocess, tempfile, time.


# ==== 1. SETTINGS: every figure, its unit and why ====

VERSION = "0.1.0"

# The format: part of what is stored and sent.  Changing one makes another format.
PROTOCOL = 1  # stands in HELLO
FORMAT = 1  # stands in zbackup.json
FEATURES: tuple[str, ...] = ()  # what a reader of our stores must know beyond FORMAT
PAGE = 4096  # bytes; the page of SQLite and of most filesystems
CHUNK = 1 << 20  # bytes; about 1 MiB a message is where ZeroMQ is fastest
PAGE_HASH = 16  # bytes of each page's SHA-256: 0.4 % of the content in hashes
DIGEST = 32  # bytes of a SHA-256
LIST_SPAN = 1024  # chunks named by one list: 1 GiB of a file, so that memory stays flat
NEEDLE = 16  # bytes at the start of a page by which it is looked for in older content
MOST_SOURCES = 16  # chunks that one patch may draw from before it is written whole again
MOST_RUNS = 1024  # the same of its runs: content that moves again and again splits them
PUBLIC_FILE = "zbackup.pub"  # the server's public key, where a node looks for it
PATH_LIMIT = 32768  # bytes of one path; folders opened one by one may nest beyond PATH_MAX
FILE_LIMIT = 1 << 46  # bytes of one file: 64 TiB name 65,536 lists, 4 MB in one entry
ENTRY_LIMIT = 8 << 20  # bytes of one entry's line
OWNER_LIMIT = (1 << 32) - 2  # of user and group numbers; the next one means "none" to chown(2)

# Limits against a hostile or broken peer.
HEAD_LIMIT = 4 << 20  # bytes of a message's JSON head
NEST_LIMIT = 1 << 17  # lists and objects in a head: each takes some 60 bytes; an honest READ has a quarter of it
UNFINISHED_LIMIT = 64 << 20  # bytes that may come without a whole message: libzmq bounds one frame, not their number
BODY_LIMIT = 2 << 20  # bytes of a message's body, a frame of incompressible chunks included
XATTR_LIMIT = 256 << 10  # bytes of the extended attributes of one file
READ_LIMIT = 256  # files in one READ: their items fit the head
QUESTION_LIMIT = 1 << 20  # bytes of the head of a question: what a server asks at once is below it
WAITING_LIMIT = 8 << 20  # bytes of questions that wait in one session; decoded, they may take 25 times as much
RAW_LIMIT = 64 << 20  # bytes of decompressed frames that a reader keeps
ROWS_LIMIT = 16_384  # rows of the tables of records that it keeps: a frame of small files has a thousand, of 0.2 KiB
QUEUE_LIMIT = 64  # requests waiting in one session: four times the default window
RECORD_LIMIT = 64 << 20  # bytes of one record of a pack, before memory is taken for it
UNREAD_LIMIT = 16  # messages that a server lets libzmq take in before it looks at them; the rest waits in the kernel
UNREAD_QUESTIONS = 40  # the same for a node: what a server has in flight is below it
WORKING_LIMIT = 100  # of "still working" in answer to one question, and as many again in each second
NEIGHBOURS = 1024  # addresses in the kernel's table of neighbours; silent ones may fill half of it
NEIGHBOUR_TIME = 3.2  # s that a silent address keeps its place in the kernel's table
FEWEST_DESCRIPTORS = 64  # that this process must be allowed: libzmq ends one that has none left
DESCRIPTORS = 8192  # that a node uses at most: half-open connections take 10 KB of memory each

# What decides in KEEP.
MOST_DEAD = 0.4  # of a pack's bytes: beyond it the pack is rewritten
SCRAMBLED = 0.95  # of its size: what does not compress below it looks encrypted
LOOK = 4096  # bytes at the start, the middle and the end of a chunk that tell

# Defaults of flags.
NETWORK = "127.0.0"
PORT = 4545
STORE = "backups"
FILE = "files/bd"
EVERY = 3600.0  # s between the starts of two sweeps
HELLO_TIMEOUT = 1.5  # s; a LAN answers in milliseconds, but TCP asks again after 1 s where a packet was lost
ANSWER_TIMEOUT = 30.0  # s without any sign of a node that owes a reply
FREEZE_TIMEOUT = 3600.0  # s that one request may take while the node says "still working"
JOBS = 4  # nodes pulled side by side
WINDOW = 8 << 20  # bytes asked for and not yet received, for each node
TRIES = 5  # readings of a file that keeps changing, before it counts as torn
PAUSE = 0.2  # s before a changed file is read again; doubled at each try
STALE = 3 * 86400.0  # s that a known node may be missing before the exit code says so
PACK_SIZE = 64 << 20  # bytes; what a kill -9 can cost is one pack not yet sealed
PACK_CHUNKS = 20000  # chunks; bounds the memory of a pack of tiny files
LEVEL = 1  # of zstd or zlib: the network and the hash are slower than level 1
MARGIN = 2.0  # s; a file younger than this may change again within one tick of its timestamps
WORKING_EVERY = 1.0  # s between two "still working"
SESSION_TIMEOUT = 120.0  # s without a request before a node drops a server's session
SESSIONS = 4  # servers that one node serves at once
LOCKED_TIMEOUT = 60.0  # s to wait for a SQLite database that another program holds
HEARTBEAT = 5.0  # s between the ZMTP pings that find a dead peer
GRACE = 7 * 86400.0  # s that a removed snapshot stays in the trash
MAX_REPACK = 1 << 40  # bytes of packs that one prune rewrites at most
RESERVE = 16 << 20  # bytes given back when the disk is full, so that prune can write what it must
LOCK_WAIT = 60.0  # s to wait for a store that another run has locked
HANDSHAKE_TIMEOUT = 5.0  # s for a peer to prove its key; until then it holds a descriptor of the node
MOST_FILES = 20_000_000  # entries that one node may list
MOST_BYTES = 1 << 44  # bytes that one node may send in one copy: 16 TiB take two days at 1 Gbit/s
LONGEST = 3 * 86400.0  # s that one copy may take; what arrived is kept and the next one goes on from there
DRILL_FILES = 20  # files of each node that a drill restores, beside its newest database


# ==== 2. ERRORS: what can go wrong, and the exit code of each ====


class BackupError(Exception):
    """What zbackup reports in one sentence; the class says the exit code."""

    exit_code = 1


class UsageError(BackupError):
    """A flag or an argument that cannot be meant."""

    exit_code = 2


class NodeError(BackupError):
    """A node that failed, went away or refused; other nodes go on."""

    def __init__(self, sentence: str, code: str = "failed") -> None:
        super().__init__(sentence)
        self.code = code  # as in an ERROR reply


class ProtocolError(NodeError):
    """A peer that sent what the protocol does not allow."""


class FormatError(BackupError):
    """Bytes that do not decode as what they should be."""


class OtherFormat(FormatError):
    """A file of the store that another version of zbackup wrote."""


class CodecError(FormatError):
    """Bytes in a codec that this Python lacks."""


class StoreError(BackupError):
    """A store that is damaged, full, locked or of another kind."""

    exit_code = 4


class FullStore(StoreError):
    """A disk or a quota that has no room left for the store."""


class LockedStore(StoreError):
    """A store in which another run deletes, or is at work where this one would."""


class CodecMissing(StoreError):
    """A pack that this Python cannot read; it is not damaged."""


class MissingChunk(StoreError):
    """A digest that no pack of the store holds."""


class RestoreError(BackupError):
    """A file that could not be restored; the others are."""


class Interrupted(BackupError):
    """Ctrl-C or SIGTERM; what arrived is kept."""

    exit_code = 130


def explain(error: OSError) -> str:
    """Return the reason of an OSError as words, without its number and path."""
    return error.strerror or str(error) or type(error).__name__


def explain_fault(error: Exception) -> str:
    """Return a sentence about an error that nobody foresaw: where it was, for the report of a bug."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    line = frame.tb_lineno if frame else 0
    return f"a fault of zbackup {VERSION} itself, please report it: {type(error).__name__} at line {line}: {error}"


# ==== 3. RECORDS: the nouns, and each format beside its struct ====


@dataclass(frozen=True)
class Clock:
    """The only ways to tell the time; COMMANDS makes the real one."""

    now: Callable[[], int]  # ns since 1970, UTC
    monotonic: Callable[[], float]  # s
    sleep: Callable[[float], None]  # s


# ---- words and paths: bytes inside, UTF-8 with surrogate escapes in JSON ----


def encode_path(path: bytes) -> str:
    """Return `path` as text that JSON can carry and decode_path gives back."""
    return path.decode("utf-8", "surrogateescape")


def show(text: str | bytes) -> str:
    """Return `text` for a terminal or a log: what does not print is escaped."""
    if isinstance(text, bytes):
        text = encode_path(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def explain_at(error: OSError) -> str:
    """Return the same with the path that it is about, where it names one."""
    return f"{show(error.filename)}: {explain(error)}" if isinstance(error.filename, (str, bytes)) else explain(error)


def format_size(size: int) -> str:
    """Return bytes as people read them, in powers of 1024."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


NOT_PLAIN = {b"", b".", b".."}  # no part of a path is one of these


def decode_path(text: str) -> bytes:
    """Return the path in `text`; FormatError when it could lead out of its root."""
    try:
        path = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FormatError(f"a path with characters that no file name has: {show(text)}") from None
    if not path or len(path) > PATH_LIMIT or b"\0" in path:
        raise FormatError(f"a path that is empty, too long or has a NUL: {show(text[:100])}")
    if not NOT_PLAIN.isdisjoint(path.split(b"/")):
        raise FormatError(f"a path that is not plain: {show(text[:1000])}")
    return path


def path_key(path: bytes) -> bytes:
    """Return the sort key of `path`: a folder's content follows it at once."""
    return path.replace(b"/", b"\0")


# ---- JSON that came from elsewhere: every field is checked when it is taken ----

write_json = json.JSONEncoder(separators=(",", ":")).encode
read_json = json.JSONDecoder().decode


def decode_digest(text: object) -> bytes:
    """Return the 32 bytes of a digest written as 64 hexadecimal characters."""
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        digest = b""
    if len(digest) != DIGEST:
        raise FormatError(f"not a digest: {show(repr(text)[:80])}")
    return digest


class Fields:
    """A JSON object from a peer or a disk, whose values are checked as they are taken."""

    def __init__(self, data: bytes | str | memoryview, what: str) -> None:
        self.what = what  # names the object in errors
        try:
            values = read_json(data if isinstance(data, str) else str(data, "utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{what} is not JSON: {str(error)[:100]}") from None
        if not isinstance(values, dict):
            raise FormatError(f"{what} is not a JSON object")
        self.values: dict[str, Any] = values

    @classmethod
    def inside(cls, value: object, what: str) -> Fields:
        """Return the Fields of an object that stands inside another."""
        fields = cls.__new__(cls)
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not a JSON object")
        fields.what, fields.values = what, value
        return fields

    def wrong(self, name: str) -> NoReturn:
        """Raise FormatError about a field."""
        raise FormatError(f"{self.what}: wrong value of {name}: {show(repr(self.values.get(name))[:80])}")

    def integer(self, name: str, default: int | None = None, low: int = 0, high: int = 1 << 63) -> int:
        """Return a whole number from `low` to `high`."""
        value = self.values.get(name, default)
        if type(value) is not int or not low <= value <= high:
            self.wrong(name)
        return value

    def text(self, name: str, default: str | None = None, limit: int = 4096) -> str:
        """Return a string of at most `limit` characters."""
        value = self.values.get(name, default)
        if type(value) is not str or len(value) > limit:
            self.wrong(name)
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; false where the field is missing."""
        value = self.values.get(name, False)
        if type(value) is not bool:
            self.wrong(name)
        return value

    def path(self, name: str) -> bytes:
        """Return a path that cannot lead out of its root."""
        return decode_path(self.text(name, limit=PATH_LIMIT))

    def items(self, name: str, limit: int) -> list[Any]:
        """Return a list of at most `limit` items; empty where the field is missing."""
        value = self.values.get(name, [])
        if type(value) is not list or len(value) > limit:
            self.wrong(name)
        return value

    def texts(self, name: str, limit: int = 4096, length: int = PATH_LIMIT) -> list[str]:
        """Return a list of at most `limit` strings of at most `length` characters."""
        value = self.items(name, limit)
        if any(type(text) is not str or len(text) > length for text in value):
            self.wrong(name)
        return value

    def integers(self, name: str, limit: int, high: int = 1 << 63) -> list[int]:
        """Return a list of at most `limit` whole numbers from -`high` to `high`."""
        value = self.items(name, limit)
        for number in value:
            if type(number) is not int or not -high <= number <= high:
                self.wrong(name)
        return value

    def digest(self, name: str) -> bytes:
        """Return the bytes of a digest."""
        return decode_digest(self.text(name, limit=2 * DIGEST))

    def xattrs(self) -> dict[str, str]:
        """Return the extended attributes; most paths have none."""
        if "xattrs" not in self.values:
            return {}
        inside = Fields.inside(self.values["xattrs"], "extended attributes")
        return {name: inside.text(name, limit=XATTR_LIMIT) for name in inside.values}


# ---- a JSON file of the store: its last member is the SHA-256 of all bytes before it ----


def seal(body: bytes) -> bytes:
    """Return the last member of a JSON file whose bytes before it are `body`."""
    return b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode("ascii")


SEAL_SIZE = len(seal(b""))


def encode_file(fields: Mapping[str, Any]) -> bytes:
    """Return a JSON file of the store."""
    body = json.dumps({"format": FORMAT, **fields}, indent=1)[: -len("\n}")].encode("ascii")
    return body + seal(body)


def decode_file(data: bytes, what: str) -> Fields:
    """Return the Fields of a JSON file of the store; FormatError where a byte is not what it was."""
    fields = Fields(data, what)
    if fields.integer("format") != FORMAT:
        raise OtherFormat(f"{what} is of format {fields.integer('format')}, this zbackup knows {FORMAT}")
    if data[-SEAL_SIZE:] != seal(data[:-SEAL_SIZE]):
        raise FormatError(f"{what} is damaged: it does not have the checksum that it names")
    return fields


# ---- times ----

TIME_NAME = "%Y-%m-%dT%H-%M-%SZ"  # UTC, without a character that a filesystem minds


def name_time(moment: int) -> str:
    """Return a moment (ns) as snapshots are named."""
    import datetime

    return datetime.datetime.fromtimestamp(moment // 10**9, datetime.timezone.utc).strftime(TIME_NAME)


def parse_time(name: str) -> int:
    """Return the moment (ns) that a snapshot's name starts with; FormatError where it has none."""
    import datetime

    try:
        moment = datetime.datetime.strptime(name[:20], TIME_NAME).replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        raise FormatError(f"{show(name)} does not start with a time") from None
    return int(moment.timestamp()) * 10**9


# ---- digests ----


def hash_pages(data: bytes | memoryview) -> bytes:
    """Return the hashes of the pages of `data`, 16 bytes each, joined."""
    view, sha256 = memoryview(data), hashlib.sha256
    if 0 not in bytes(view[::PAGE]):
        return b"".join([sha256(view[i : i + PAGE]).digest()[:PAGE_HASH] for i in range(0, len(view), PAGE)])
    pages = (bytes(view[i : i + PAGE]) for i in range(0, len(view), PAGE))
    zeros = bytes(PAGE)  # as in a hole: hashed once
    hashed = sha256(zeros).digest()[:PAGE_HASH]
    return b"".join([hashed if page == zeros else sha256(page).digest()[:PAGE_HASH] for page in pages])


def find_stretches(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """Yield first page and end of each stretch of pages that are not what they were, by their hashes."""
    first = None
    for number in range(len(new) // PAGE_HASH):
        at = slice(number * PAGE_HASH, (number + 1) * PAGE_HASH)
        if old[at] == new[at]:
            if first is not None:
                yield first, number
            first = None
        elif first is None:
            first = number
    if first is not None:
        yield first, len(new) // PAGE_HASH


def cut_needles(data: bytes | memoryview) -> bytes:
    """Return the first bytes of the pages of `data`, joined: NEEDLE of each, fewer of a last page that is shorter."""
    view = memoryview(data)
    return b"".join([view[i : i + NEEDLE] for i in range(0, len(view), PAGE)])


def digest_pages(pages: bytes) -> bytes:
    """Return the digest of the chunk whose page hashes are `pages`."""
    return hashlib.sha256(pages).digest()


def count_pages(length: int) -> int:
    """Return the number of pages, the last one perhaps short, in `length` bytes."""
    return -(-length // PAGE)


def count_chunks(length: int) -> int:
    """Return the number of chunks, the last one perhaps short, in `length` bytes."""
    return -(-length // CHUNK)


@dataclass(frozen=True)
class Told:
    """What a node tells of a chunk before it sends it."""

    digest: bytes
    length: int  # bytes of the chunk
    hashes: bytes  # of its pages, joined
    needles: bytes  # as cut_needles gives them

    @property
    def count(self) -> int:
        """The number of its pages."""
        return count_pages(self.length)

    def hash(self, page: int) -> bytes:
        """Return the hash of a page."""
        return self.hashes[page * PAGE_HASH : (page + 1) * PAGE_HASH]

    def needle(self, page: int) -> bytes:
        """Return the first bytes of a page."""
        return self.needles[page * NEEDLE : (page + 1) * NEEDLE]

    def size(self, page: int) -> int:
        """Return the bytes of a page: of the last one there may be fewer."""
        return min(PAGE, self.length - page * PAGE)


def encode_told(data: bytes | memoryview, pages: bytes) -> bytes:
    """Return what is told of a chunk whose page hashes are `pages`: these, then its needles."""
    return pages + cut_needles(data)


def size_told(length: int) -> int:
    """Return the bytes that encode_told gives for a chunk of `length` bytes."""
    count = count_pages(length)
    return count * PAGE_HASH + (count - 1) * NEEDLE + min(NEEDLE, length - (count - 1) * PAGE)


def decode_told(digest: bytes, length: int, data: bytes) -> Told:
    """Return the Told in `data`; FormatError unless its hashes give the digest."""
    end = count_pages(length) * PAGE_HASH
    if len(data) != size_told(length) or digest_pages(data[:end]) != digest:
        raise FormatError("page hashes that do not give the digest beside them")
    return Told(digest, length, data[:end], data[end:])


def decode_stretches(fields: Fields, name: str, length: int) -> list[tuple[int, int]]:
    """Return start and end, in bytes, of the stretches of a chunk that a field names as [first page, pages].

    They are sorted and apart; FormatError unless they begin within `length` bytes, where the last one ends then.
    """
    ranges = []
    end = 0
    for run in fields.items(name, CHUNK // PAGE):
        if type(run) is not list or len(run) != 2 or any(type(n) is not int or n < 0 for n in run):
            fields.wrong(name)
        start = run[0] * PAGE
        if start < end or run[1] < 1 or start >= length:
            fields.wrong(name)
        end = min(start + run[1] * PAGE, length)
        ranges.append((start, end))
    return ranges


def encode_stretches(stretches: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return stretches of a chunk as decode_stretches takes them."""
    return [[start // PAGE, count_pages(end - start)] for start, end in stretches]


# ---- codecs: how a frame is compressed ----

PLAIN, ZLIB, ZSTD = 0, 1, 2
CODECS = {"plain": PLAIN, "zlib": ZLIB, "zstd": ZSTD}
MOST_LEVEL = 19  # beyond it zstd takes much memory, to read, too
SAMPLE = 16 << 10  # bytes tried first: what does not shrink in these is sent as it is
SAMPLES = 4  # parts of the sample, evenly spread: a frame of small files has some that shrink beside others


@functools.lru_cache(maxsize=1)
def load_zstd() -> Any:
    """Return the zstd module of this Python, its backport, or None."""
    with contextlib.suppress(ImportError):
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        return zstd
    with contextlib.suppress(ImportError):
        from backports import zstd as backport

        return backport
    return None


def list_codecs() -> list[str]:
    """Return the names of the codecs of this Python, the best first."""
    return (["zstd"] if load_zstd() else []) + ["zlib", "plain"]


def _compress(codec: int, data: bytes | memoryview, level: int) -> bytes:
    if codec == ZSTD:
        packed: bytes = load_zstd().compress(data, level)
        return packed
    return zlib.compress(data, min(level, 9))


def _shrinks(codec: int, data: bytes | memoryview, level: int) -> bool:
    size = SAMPLE // SAMPLES
    step = (len(data) - size) // (SAMPLES - 1)
    sample = b"".join([data[at : at + size] for at in range(0, SAMPLES * step, step)])
    return len(_compress(codec, sample, level)) < 0.97 * len(sample)


def compress(codec: int, data: bytes | memoryview, level: int) -> tuple[int, bytes | memoryview]:
    """Return `data` compressed, and the codec used: PLAIN where it does not pay."""
    if codec == PLAIN or (len(data) > 2 * SAMPLE and not _shrinks(codec, data, level)):
        return PLAIN, data
    packed = _compress(codec, data, level)
    return (codec, packed) if len(packed) < len(data) else (PLAIN, data)


def _decompress(decoder: Any, data: bytes | memoryview, size: int, failure: type[Exception]) -> bytes:
    try:
        raw: bytes = decoder.decompress(data, size + 1)
    except (failure, ValueError, MemoryError) as error:
        raise FormatError(f"a frame does not decompress: {error}") from None
    if not decoder.eof or decoder.unused_data:
        raise FormatError(f"a frame is cut off, or longer than its {size} bytes")
    return raw


def decompress(codec: int, data: bytes | memoryview, size: int) -> bytes:
    """Return the `size` bytes in `data`; never takes more memory than that."""
    if codec == PLAIN:
        raw = bytes(data)
    elif codec == ZLIB:
        raw = _decompress(zlib.decompressobj(), data, size, zlib.error)
    elif codec == ZSTD and load_zstd():
        raw = _decompress(load_zstd().ZstdDecompressor(), data, size, load_zstd().ZstdError)
    elif codec == ZSTD:
        raise CodecError("compressed with zstd, which this Python lacks: install backports.zstd")
    else:
        raise FormatError(f"unknown codec {codec}")
    if len(raw) != size:
        raise FormatError(f"a frame of {size} bytes decodes to {len(raw)}")
    return raw


# ---- an entry: what a listing says of a path, a tab, what was read of it ----

KIND_BITS = {  # as stat(2) has them
    "file": stat_bits.S_IFREG,
    "directory": stat_bits.S_IFDIR,
    "symlink": stat_bits.S_IFLNK,
    "fifo": stat_bits.S_IFIFO,
    "socket": stat_bits.S_IFSOCK,
    "block": stat_bits.S_IFBLK,
    "character": stat_bits.S_IFCHR,
}


NO_XATTRS: Mapping[str, str] = MappingProxyType({})


class Stat(NamedTuple):
    """What a listing says of one path; equal bytes mean an unchanged file.

    A tuple, as what else is made for each file: a frozen dataclass takes four times as long to make.
    """

    path: bytes
    kind: str  # one of KIND_BITS
    mode: int = 0  # permissions, setuid, setgid and sticky; not the type
    uid: int = 0
    gid: int = 0
    user: str = ""
    group: str = ""
    size: int = 0  # bytes
    mtime: int = 0  # ns
    ctime: int = 0  # ns
    inode: int = 0
    device: int = 0  # only for files with more than one name
    links: int = 1
    rdev: int = 0  # of a device file
    target: bytes = b""  # of a symlink
    sparse: bool = False
    database: bool = False  # a SQLite database
    wal: tuple[int, ...] = ()  # size and mtime of the database's write-ahead log
    fresh: bool = False  # too young for its timestamps to prove anything
    xattrs: Mapping[str, str] = NO_XATTRS  # base64; a file's stand in Content
    error: str = ""  # why the path cannot be read

    @property
    def state(self) -> list[int]:
        """What must stay the same while the file is read."""
        return [self.size, self.mtime, self.ctime, self.inode, *self.wal]

    @property
    def link_key(self) -> tuple[int, int] | None:
        """What all names of one file have in common, where it has several."""
        return (self.device, self.inode) if self.links > 1 and self.kind == "file" else None


RARE = ("target", "device", "rdev", "sparse", "database", "wal", "fresh", "xattrs", "error")  # in their order
RARE_VALUES = operator.attrgetter(*RARE)


@functools.lru_cache(maxsize=64)  # a hostile node's names may take 100 KB each
def _encode_owner(uid: int, gid: int, user: str, group: str) -> str:
    return f',"uid":{uid},"gid":{gid},"user":{write_json(user)},"group":{write_json(group)}'


def _encode_rare(stat: Stat) -> str:
    """Return what few paths have, each with a comma before it."""
    rare = RARE_VALUES(stat)
    if stat.links == 1 and not any(rare):
        return ""
    fields = {name: value for name, value in zip(RARE, rare) if value}
    if stat.target:
        fields["target"] = encode_path(stat.target)
    if stat.links != 1:
        fields["links"] = stat.links
    return "," + write_json(fields)[1:-1]


def encode_stat(stat: Stat) -> bytes:
    """Return the listing line of `stat`, without its end of line.

    A JSON object in ASCII; `path` and `kind` come first, what is at its default is left out.
    """
    path, owner = write_json(encode_path(stat.path)), _encode_owner(stat.uid, stat.gid, stat.user, stat.group)
    line = f'{{"path":{path},"kind":"{stat.kind}","mode":{stat.mode}{owner}'
    if stat.kind == "file":
        line += f',"size":{stat.size},"mtime":{stat.mtime},"ctime":{stat.ctime},"inode":{stat.inode}'
    else:
        line += f',"mtime":{stat.mtime}'
    return f"{line}{_encode_rare(stat)}}}".encode("ascii")


# What a listing line may hold: of a text the length, of a number the value; the rest is looked into where it is taken.
STAT_LIMITS: dict[str, tuple[type, int, int]] = {
    "path": (str, 0, PATH_LIMIT),
    "kind": (str, 0, 10),
    "user": (str, 0, 4096),
    "group": (str, 0, 4096),
    "target": (str, 0, PATH_LIMIT),
    "error": (str, 0, 4096),
    "mode": (int, 0, 0o7777),
    "uid": (int, 0, OWNER_LIMIT),
    "gid": (int, 0, OWNER_LIMIT),
    "size": (int, 0, 1 << 63),
    "mtime": (int, -(1 << 63), 1 << 63),
    "ctime": (int, -(1 << 63), 1 << 63),
    "inode": (int, 0, 1 << 64),
    "device": (int, 0, 1 << 64),
    "links": (int, 0, 1 << 63),
    "rdev": (int, 0, 1 << 64),
    "sparse": (bool, 0, 1),
    "database": (bool, 0, 1),
    "fresh": (bool, 0, 1),
    "wal": (list, 0, 0),
    "xattrs": (dict, 0, 0),
}
NO_FIELD = (type(None), 0, 0)


def decode_stat(line: bytes) -> Stat:
    """Return the Stat of a listing line; FormatError unless encode_stat gives the same line."""
    fields = Fields(line, "an entry")
    told = fields.values
    for name, value in told.items():
        kind, low, high = STAT_LIMITS.get(name, NO_FIELD)
        outside = isinstance(value, int) and not low <= value <= high
        if type(value) is not kind or outside or (isinstance(value, str) and len(value) > high):
            fields.wrong(name)
    told["path"] = fields.path("path")
    if "wal" in told:
        told["wal"] = tuple(fields.integers("wal", 2))
    if "xattrs" in told:
        told["xattrs"] = fields.xattrs()
    try:
        if "target" in told:
            told["target"] = told["target"].encode("utf-8", "surrogateescape")
        stat = Stat(**told)
        canonical = encode_stat(stat)
    except (UnicodeEncodeError, TypeError):
        raise FormatError("an entry without a kind, or with characters that no file name has") from None
    if canonical != line or stat.kind not in KIND_BITS or b"\0" in stat.target:
        raise FormatError(f"an entry that is not in its one right form: {show(stat.path)}")
    return stat


class Content(NamedTuple):
    """What was read of one file.

    A file of up to LIST_SPAN chunks names them in `chunks`, a longer one in `lists`: digests
    of chunks that each hold such a list.  A number in place of a digest is that many chunks of
    zeros; it never reaches past the end of a list.
    """

    size: int = 0  # bytes
    chunks: tuple[bytes | int, ...] = ()
    lists: tuple[bytes, ...] = ()
    grade: str = ""  # frozen, stable or torn; "" where nothing was to be read
    error: str = ""  # why the file is not whole; then it has no chunks
    xattrs: Mapping[str, str] = NO_XATTRS  # base64


GRADES = ("frozen", "stable", "torn", "")
NOTHING = Content()


def encode_chunks(chunks: Iterable[bytes | int]) -> list[str | int]:
    """Return chunks as JSON carries them."""
    return [chunk if isinstance(chunk, int) else chunk.hex() for chunk in chunks]


def decode_chunks(values: Iterable[object]) -> tuple[bytes | int, ...]:
    """Return chunks from JSON; FormatError for anything that is none."""
    return tuple(v if type(v) is int and 0 < v <= LIST_SPAN else decode_digest(v) for v in values)


def encode_content(content: Content) -> bytes:
    """Return the second half of an entry's line: a JSON object, {} where nothing was read."""
    told = [f'"size":{content.size}'] if content.size else []
    for name, chunks in (("chunks", content.chunks), ("lists", content.lists)):
        if chunks:
            named = [str(chunk) if isinstance(chunk, int) else f'"{chunk.hex()}"' for chunk in chunks]
            told.append(f'"{name}":[{",".join(named)}]')
    for name, value in (("grade", content.grade), ("error", content.error), ("xattrs", content.xattrs)):
        if value:
            told.append(f'"{name}":{write_json(value)}')
    return f"{{{','.join(told)}}}".encode("ascii")


def decode_content(data: bytes) -> Content:
    """Return the Content of the second half of an entry's line."""
    fields = Fields(data, "the content of an entry")
    grade = fields.text("grade", "")
    if grade not in GRADES:
        fields.wrong("grade")
    return Content(
        size=fields.integer("size", 0),
        chunks=decode_chunks(fields.items("chunks", LIST_SPAN)),
        lists=tuple(decode_digest(text) for text in fields.texts("lists", 1 << 24)),
        grade=grade,
        error=fields.text("error", ""),
        xattrs=fields.xattrs(),
    )


# What an entry says, found without decoding it.
SIZE_TOLD = re.compile(rb'\{"size":(\d+)')
GRADE_TOLD = re.compile(rb'"grade":"(\w+)"')
PLAIN_FILE = re.compile(  # one name, and nothing of RARE; no character that JSON escapes
    rb'\{"path":"([ !#-\[\]-\x7f]+)","kind":"file","mode":\d+,"uid":\d+,"gid":\d+,"user":"[^"\\]*","group":"[^"\\]*"'
    rb',"size":\d+,"mtime":-?\d+,"ctime":\d+,"inode":\d+\}'
)
PLAIN_CONTENT = re.compile(rb'\{"size":(\d{1,7}),"chunks":\["[0-9a-f]{64}"\],"grade":"\w+"\}')


def split_entry(line: bytes) -> tuple[bytes, bytes]:
    """Return the halves of a snapshot's line; FormatError where it has not two."""
    head, tab, read = line.partition(b"\t")
    if not tab:
        raise FormatError("an entry without its content")
    return head, read


@dataclass(frozen=True)
class Entry:
    """One line of a snapshot, decoded only where it is looked into."""

    line: bytes  # the listing's line
    read: bytes  # the content's half

    @functools.cached_property
    def stat(self) -> Stat:
        """The listing half, decoded."""
        return decode_stat(self.line)

    @functools.cached_property
    def content(self) -> Content:
        """The other half, decoded."""
        return decode_content(self.read)

    @functools.cached_property
    def key(self) -> bytes:
        """Where the entry stands in the order of a snapshot."""
        return path_key(self.stat.path)

    @property
    def plain(self) -> tuple[bytes, int] | None:
        """Path and size of a file of one chunk about which nothing is rare; None for all else.

        Found without decoding: what else the entry says may still be wrong.
        """
        line, read = PLAIN_FILE.fullmatch(self.line), PLAIN_CONTENT.fullmatch(self.read)
        return (decode_path(str(line[1], "ascii")), int(read[1])) if line and read else None

    def __reduce__(self) -> tuple[type[Entry], tuple[bytes, bytes]]:
        return Entry, (self.line, self.read)  # to another process: not what was decoded

    def encode(self) -> bytes:
        """Return the line with its end."""
        return b"%s\t%s\n" % (self.line, self.read)

    @classmethod
    def decode(cls, line: bytes) -> Entry:
        """Return the Entry of a line; FormatError where it has not two halves."""
        return cls(*split_entry(line.rstrip(b"\n")))


@dataclass(frozen=True)
class Block:
    """Some entries of a snapshot that follow each other, not decoded: the halves of their lines."""

    digest: bytes  # b"" where they are not all that one block of the snapshot has
    lines: Sequence[bytes]
    reads: Sequence[bytes]

    @classmethod
    def decode(cls, digest: bytes, data: bytes) -> Block:
        """Return the Block in the bytes of a chunk; FormatError where a line has not two halves."""
        halves = [split_entry(line) for line in data.split(b"\n")[:-1]]
        return cls(digest, [line for line, _ in halves], [read for _, read in halves])

    @functools.cached_property
    def halves(self) -> tuple[bytes, bytes]:
        """All lines joined, and all that was read: what one entry says without being decoded, these say of all."""
        return b"\n".join(self.lines), b"\n".join(self.reads)

    def list_entries(self) -> Iterator[Entry]:
        """Yield its entries."""
        return map(Entry, self.lines, self.reads)


def ends_block(line: bytes) -> bool:
    """Tell whether a block ends with the entry of a listing line: by chance of its path, one of 256 does."""
    return zlib.crc32(line[9 : line.index(b'","kind"')]) % 256 == 0


def is_at_or_below(path: bytes, folder: bytes) -> bool:
    """Tell whether `path` is `folder` or lies in it; the folder b"" holds all."""
    return not folder or path == folder or path.startswith(folder + b"/")


# ---- a pack: header, records, footer, trailer; named by the SHA-256 of all its bytes ----
#
# Each record is RECORD, a table, data.  The table has a TABLE_ROW (digest, length) for each
# chunk or patch; a frame's table goes on with the chunks' page hashes.  The data is what the
# rows' bytes, joined, compress to.  The footer has, for each record, a FOOTER_ROW and the
# digests; the trailer says where it starts and proves it.

PACK_HEADER = b"zbpack1\n"
RECORD = struct.Struct("<4sBBHIIII8x")  # magic, kind, codec, 0, rows, bytes of table, raw, stored
RECORD_MAGIC = b"ZREC"
FRAME, PATCHES = 1, 2  # kinds of record
TABLE_ROW = struct.Struct("<32sI")  # digest, bytes of it in the raw data
FOOTER_ROW = struct.Struct("<QBxxxI")  # offset of the record, its kind, number of digests
TRAILER = struct.Struct("<Q32s8s")  # offset of the footer, SHA-256 of it, magic
TRAILER_MAGIC = b"zbindex\n"
PATCH_HEAD = struct.Struct("<HI")  # number of sources, of runs; then the sources' digests
PATCH_RUN = struct.Struct("<HII")  # which source, offset in it, length

if (RECORD.size, TABLE_ROW.size, FOOTER_ROW.size, TRAILER.size) != (32, 36, 16, 48):
    raise AssertionError("a struct of the pack format has changed its size")


class Piece(NamedTuple):
    """One whole chunk inside a frame that is about to be stored."""

    digest: bytes
    pages: bytes  # its page hashes
    data: memoryview


@dataclass(frozen=True)
class Run:
    """Bytes of a whole chunk that stand in a patched one."""

    source: bytes  # digest
    offset: int
    length: int


@dataclass(frozen=True)
class Record:
    """The head and table of one record of a pack."""

    offset: int  # of the record in its pack
    kind: int
    codec: int
    raw: int  # bytes of data, decompressed
    stored: int  # bytes of data as stored
    rows: tuple[tuple[bytes, int], ...]  # digest and length of each chunk or patch
    hashes: bytes  # page hashes of all chunks of a frame, joined
    data_offset: int  # of the stored data in its pack

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each row starts in the raw data, and where the last one ends."""
        return list(itertools.accumulate((length for _, length in self.rows), initial=0))

    @functools.cached_property
    def hash_starts(self) -> list[int]:
        """Where each chunk's page hashes start in `hashes`, and where the last ones end."""
        sizes = (PAGE_HASH * count_pages(length) for _, length in self.rows)
        return list(itertools.accumulate(sizes, initial=0))

    def pages(self, place: int) -> bytes:
        """Return the page hashes of chunk `place` of a frame."""
        return self.hashes[self.hash_starts[place] : self.hash_starts[place + 1]]


def encode_record(
    kind: int, rows: Sequence[tuple[bytes, int]], hashes: bytes, frame: tuple[int, int, bytes | memoryview]
) -> bytes:
    """Return a record; `frame` is the codec, the raw size and the stored data."""
    codec, raw, data = frame
    table = b"".join([TABLE_ROW.pack(*row) for row in rows])
    head = RECORD.pack(RECORD_MAGIC, kind, codec, 0, len(rows), len(table) + len(hashes), raw, len(data))
    return b"".join([head, table, hashes, data])


def decode_record_head(data: bytes, offset: int) -> tuple[int, int, int, int, int, int]:
    """Return kind, codec, number of rows, bytes of table, raw and stored of a record's head."""
    if len(data) != RECORD.size:
        raise FormatError(f"the pack ends inside the record at byte {offset}")
    magic, kind, codec, zero, count, table, raw, stored = RECORD.unpack(data)
    if magic != RECORD_MAGIC or zero or kind not in (FRAME, PATCHES) or max(table, raw, stored) > RECORD_LIMIT:
        raise FormatError(f"no record stands at byte {offset}")
    if count * TABLE_ROW.size > table:
        raise FormatError(f"the table of the record at byte {offset} is too short")
    return kind, codec, count, table, raw, stored


def decode_record(head: bytes, table: bytes, offset: int) -> Record:
    """Return the Record of a head and a table; FormatError unless its lengths add up."""
    kind, codec, count, size, raw, stored = decode_record_head(head, offset)
    if len(table) != size:
        raise FormatError(f"the pack ends inside the record at byte {offset}")
    end = count * TABLE_ROW.size
    rows = tuple(TABLE_ROW.iter_unpack(table[:end]))
    pages = sum(count_pages(length) for _, length in rows) if kind == FRAME else 0
    if sum(length for _, length in rows) != raw or len(table) - end != pages * PAGE_HASH:
        raise FormatError(f"the lengths in the record at byte {offset} do not add up")
    return Record(offset, kind, codec, raw, stored, rows, table[end:], offset + RECORD.size + size)


def encode_footer(records: Iterable[tuple[int, int, Sequence[bytes]]], offset: int) -> bytes:
    """Return the footer of (offset, kind, digests) rows and the trailer, for a footer at `offset`."""
    footer = b"".join(FOOTER_ROW.pack(at, kind, len(digests)) + b"".join(digests) for at, kind, digests in records)
    return footer + TRAILER.pack(offset, hashlib.sha256(footer).digest(), TRAILER_MAGIC)


def decode_footer(footer: bytes, proof: bytes) -> Iterator[tuple[int, int, list[bytes]]]:
    """Yield the offset, the kind and the digests of each record; FormatError unless `proof` fits."""
    if hashlib.sha256(footer).digest() != proof:
        raise FormatError("the index at the end of the pack is damaged")
    at = 0
    while at < len(footer):
        start = at + FOOTER_ROW.size
        offset, kind, count = FOOTER_ROW.unpack(footer[at:start].ljust(FOOTER_ROW.size, b"\xff"))
        at = start + count * DIGEST
        if at > len(footer) or offset >= 1 << 63:
            raise FormatError("the index at the end of the pack is cut off, or names no place in it")
        yield offset, kind, [footer[i : i + DIGEST] for i in range(start, at, DIGEST)]


def encode_patch(runs: Sequence[Run]) -> bytes:
    """Return a patch: its sources, then its runs."""
    sources = list(dict.fromkeys(run.source for run in runs))
    places = {source: i for i, source in enumerate(sources)}
    body = b"".join(PATCH_RUN.pack(places[run.source], run.offset, run.length) for run in runs)
    return PATCH_HEAD.pack(len(sources), len(runs)) + b"".join(sources) + body


def decode_patch(data: bytes) -> tuple[Run, ...]:
    """Return the runs of a patch; FormatError unless it is well formed."""
    try:
        count, total = PATCH_HEAD.unpack_from(data)
        start = PATCH_HEAD.size + count * DIGEST
        if total > CHUNK // 16 or len(data) != start + total * PATCH_RUN.size:  # before any is made
            raise FormatError("a patch is longer or shorter than it says")
        sources = [data[i : i + DIGEST] for i in range(PATCH_HEAD.size, start, DIGEST)]
        runs = tuple(Run(sources[i], offset, length) for i, offset, length in PATCH_RUN.iter_unpack(data[start:]))
    except (struct.error, IndexError):
        raise FormatError("a patch is cut off or names a source that it has not") from None
    if sum(run.length for run in runs) > CHUNK:
        raise FormatError("a patch is longer than a chunk")
    return runs


def slice_runs(runs: Sequence[Run], start: int, end: int) -> list[Run]:
    """Return the runs of bytes `start` to `end` of what `runs` give."""
    found, at = [], 0
    for run in runs:
        low, high = max(start, at), min(end, at + run.length)
        if low < high:
            found.append(Run(run.source, run.offset + low - at, high - low))
        at += run.length
    return found


# ---- a snapshot ----


@dataclass(frozen=True)
class Problem:
    """One thing that went wrong with one path of a node."""

    path: str  # shown, not opened
    message: str


@dataclass(frozen=True)
class Totals:
    """What one pull did, counted."""

    files: int = 0  # in the snapshot
    folders: int = 0
    others: int = 0  # symlinks, fifos, sockets, devices
    size: int = 0  # bytes of all files
    changed: int = 0  # files read
    deleted: int = 0  # entries of the last snapshot that are gone
    sent: int = 0  # bytes received from the node
    added: int = 0  # bytes added to the packs
    failed: int = 0  # files that could not be read
    torn: int = 0  # files that kept changing
    scrambled: int = 0  # files that compressed before and no longer do


SNAPSHOT_GRADES = ("partial", "torn", "stable", "frozen")  # the worst first
ROOTS_KEPT = 1000  # roots named in a snapshot: a glob may give any number
NAME_KEPT = 4096  # characters of one, as shown
ADDRESSES_KEPT = 1000  # of a node
PROBLEMS_KEPT = 1000  # problems named in a snapshot; `failed` counts all


@dataclass(frozen=True)
class Snapshot:
    """One version of all files of one node."""

    name: str  # its UTC time, as the file is called
    folder: str  # the node's folder in the store
    sequence: int  # orders the snapshots of a node, whatever the clock did
    started: int  # ns, server's clock
    finished: int
    grade: str  # frozen, stable, torn or partial: the worst of its entries
    cut_off: str = ""  # why the pull ended early; then entries after the last one are missing
    address: str = ""
    identity: str = ""
    host: str = ""
    roots: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # what the node was told to serve and does not exist
    blocks: tuple[bytes, ...] = ()  # digests of the blocks of entries, in order
    totals: Totals = Totals()
    problems: tuple[Problem, ...] = ()
    alarm: str = ""  # why it looks as if data were lost; then the snapshots before it are held

    @property
    def good(self) -> bool:
        """Tell whether every file in it is a true copy."""
        return self.grade in ("frozen", "stable")


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Return the JSON file of a snapshot; its name and folder are the file's own."""
    fields = dict(vars(snapshot))
    del fields["name"], fields["folder"]
    fields["blocks"] = [digest.hex() for digest in snapshot.blocks]
    fields["totals"] = vars(snapshot.totals)
    fields["problems"] = [[problem.path, problem.message] for problem in snapshot.problems]
    return encode_file(fields)


def decode_snapshot(data: bytes, folder: str, name: str) -> Snapshot:
    """Return the Snapshot in a JSON file; FormatError unless it is one."""
    fields = decode_file(data, f"the snapshot {folder}/{name}")
    if fields.text("grade") not in SNAPSHOT_GRADES:
        fields.wrong("grade")
    totals = Fields.inside(fields.values.get("totals", {}), f"{fields.what}: totals")
    problems = fields.items("problems", PROBLEMS_KEPT)
    if any(type(row) is not list or len(row) != 2 for row in problems):
        fields.wrong("problems")
    return Snapshot(
        name=name,
        folder=folder,
        sequence=fields.integer("sequence"),
        started=fields.integer("started"),
        finished=fields.integer("finished"),
        grade=fields.text("grade"),
        cut_off=fields.text("cut_off", "", CHUNK),
        address=fields.text("address", ""),
        identity=fields.text("identity", ""),
        host=fields.text("host", ""),
        roots=tuple(fields.texts("roots")),
        missing=tuple(fields.texts("missing")),
        blocks=tuple(decode_digest(text) for text in fields.texts("blocks", 1 << 30)),
        totals=Totals(**{name: totals.integer(name, 0) for name in vars(Totals())}),
        problems=tuple(Problem(str(path), str(message)) for path, message in problems),
        alarm=fields.text("alarm", ""),
    )


def worst_grade(grades: Iterable[str]) -> str:
    """Return the grade of a whole whose parts have `grades`."""
    return min((grade for grade in grades if grade in SNAPSHOT_GRADES), key=SNAPSHOT_GRADES.index, default="stable")


# ---- addresses and nodes ----


@dataclass(frozen=True)
class Address:
    """Where a node may be asked."""

    host: str  # a number or a name
    port: int = PORT

    @property
    def endpoint(self) -> str:
        """The address as ZeroMQ writes it."""
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    def __str__(self) -> str:
        if self.port == PORT:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Known:
    """A node that the store has a folder for."""

    folder: str
    identity: str  # its public key; a random name where it has none; "" once it is forgotten
    name: str = ""
    addresses: tuple[str, ...] = ()  # where it answered last
    first_seen: int = 0  # ns
    last_seen: int = 0
    released: int = 0  # sequence of the last snapshot whose alarm the user has answered
    offered: str = ""  # another key that was met at its address, and waits for `trust`


def encode_known(known: Known) -> bytes:
    """Return the node.json of a node."""
    fields = dict(vars(known))
    del fields["folder"]
    return encode_file(fields)


def decode_known(data: bytes, folder: str) -> Known:
    """Return the Known in a node.json."""
    fields = decode_file(data, f"{folder}/node.json")
    return Known(
        folder=folder,
        identity=fields.text("identity"),
        name=fields.text("name", ""),
        addresses=tuple(fields.texts("addresses")),
        first_seen=fields.integer("first_seen"),
        last_seen=fields.integer("last_seen"),
        released=fields.integer("released", 0),
        offered=fields.text("offered", ""),
    )


RESERVED = (
    *(
        "packs",
        "keys",
        "aside",
        "damage",
        "lock",
        "reserve",
        "readme.txt",
        "zbackup.json",
        "verified.json",
        "drill.json",
    ),
)
INDEX_FILE = "index.sqlite"  # SQLite makes others whose names begin with it, and takes what has them for its own


def name_folder(host: str) -> str:
    """Return the folder of the node first seen at `host`: a name that any filesystem takes."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", host)
    taken = name.lower() in RESERVED or name.lower().startswith(INDEX_FILE)
    return f"node-{name}" if taken or name.startswith((".", "-")) else name


@dataclass(frozen=True)
class NodeSettings:
    """What a node was told; every field is a flag."""

    files: tuple[str, ...] = (FILE,)
    exclude: tuple[str, ...] = ()
    one_file_system: bool = False
    port: int = PORT
    bind: str = "*"
    name: str = ""
    state: str = ""  # folder of the identity and of frozen copies
    folder: str = ""  # what it would like to be called in the store
    before: str = ""
    after: str = ""
    server_key: str = ""  # public key of the one server that it answers; "" for none
    insecure: bool = False
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    level: int = LEVEL
    margin: float = MARGIN
    sessions: int = SESSIONS
    session_timeout: float = SESSION_TIMEOUT
    locked_timeout: float = LOCKED_TIMEOUT
    working_every: float = WORKING_EVERY
    heartbeat: float = HEARTBEAT


@dataclass(frozen=True)
class ServerSettings:
    """What a server was told; every field is a flag."""

    store: str = STORE
    key_file: str = ""  # of the secret key; "" for the one in the store
    strict: bool = False
    most_files: int = MOST_FILES
    most_bytes: int = MOST_BYTES
    longest: float = LONGEST
    jobs: int = JOBS
    create: bool = True
    latest: bool = True
    latest_jobs: int = 1
    checksum: bool = False
    timeout: float = HELLO_TIMEOUT
    answer_timeout: float = ANSWER_TIMEOUT
    freeze_timeout: float = FREEZE_TIMEOUT
    neighbours: int = NEIGHBOURS
    window: int = WINDOW
    tries: int = TRIES
    pause: float = PAUSE
    stale: float = STALE
    pack_size: int = PACK_SIZE
    pack_chunks: int = PACK_CHUNKS
    level: int = LEVEL
    heartbeat: float = HEARTBEAT
    reserve: int = RESERVE
    lock_wait: float = LOCK_WAIT


# ==== 4. DISK: durable writes, locks, folders that cannot be left ====

TEMPORARY = ".zbackup-tmp-"  # prefix of a file that is not complete yet
FULL = (errno.ENOSPC, errno.EDQUOT)
FICLONE = 0x40049409  # ioctl of Linux, <linux/fs.h>: share the blocks of another file
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: should it have become a fifo, do not wait for its writer.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def is_shortage(error: Exception) -> bool:
    """Tell whether there were no descriptors left: that passes, and says nothing of the file that was to be read."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def find_data(fd: int, offset: int, end: int) -> int:
    """Return where an open file has data again from `offset` on; `end` where only a hole is left.

    `offset` where the filesystem cannot tell.
    """
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except AttributeError:
        return offset
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at an offset."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def read_range(fd: int, length: int, offset: int, expected: int = -1) -> bytes:
    """Return up to `length` bytes at `offset`; fewer only at the end of the file.

    After as many as were `expected`, it is not asked once more whether that is the end.
    """
    data = os.pread(fd, length, offset)
    while 0 < len(data) < length and len(data) != expected:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def identify(path: str | int) -> tuple[int, int] | None:
    """Return what tells a file from all others of this machine; None where there is none at this path."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: str) -> None:
    """Make a private folder durably, with the folders above it; one that exists is left as it is."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(os.path.abspath(path))
    make_folder(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    sync_folder(above)


def lock_file(path: str, shared: bool, create: bool = True) -> int:
    """Return a descriptor that holds a lock on `path` until it is closed, or its process dies.

    With `create` it is made where it is not there.  Raises BlockingIOError when another process holds a lock that
    excludes this one.
    """
    import fcntl

    try:
        fd = os.open(path, os.O_RDWR | create * os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or not os.path.exists(path):
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_tree(path: str) -> None:
    """Remove a folder and all in it, however deep: each folder below is moved up first, so no path gets too long."""
    token = os.urandom(8).hex()
    folders = [path]
    for folder in folders:
        for item in list(os.scandir(folder)):
            if item.is_dir(follow_symlinks=False):
                folders.append(os.path.join(path, f"{token}-{len(folders)}"))
                os.rename(item.path, folders[-1])
            else:
                os.unlink(item.path)
    for folder in reversed(folders):
        os.rmdir(folder)


def lock_folder(fd: int) -> None:
    """Hold a lock on an open folder until it is closed; BlockingIOError when another process holds it.

    Where the filesystem has no locks for folders, as NFS, there is none.
    """
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise


def create_locked(prefix: str) -> tuple[int, str]:
    """Return the descriptor and the path of a new file whose name starts with `prefix`.

    The lock that it holds tells it from what a dead process left.
    """
    while True:
        path = prefix + os.urandom(8).hex()
        try:
            fd = lock_file(path, shared=False)
        except BlockingIOError:
            continue  # taken for a leftover just now
        if os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a filesystem without hard links


def _link_or_move(source: str | bytes, path: str | bytes, folder: int | None = None) -> bool:
    """Give a file another name that is not taken; tells whether it has the first one still."""
    try:
        os.link(source, path, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # A filesystem without hard links: the next best is to look first.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path, dir_fd=folder)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        os.rename(source, path, src_dir_fd=folder, dst_dir_fd=folder)
        return False
    return True


def publish(temporary: str | bytes, path: str | bytes, replacing: bool, folder: int | None = None) -> None:
    """Give a complete file its name in one step.

    `folder` is a file descriptor that both names are relative to.
    """
    if replacing:
        os.replace(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
    elif _link_or_move(temporary, path, folder):
        os.unlink(temporary, dir_fd=folder)


def make_durably(path: str, fill: Callable[[int], None], replacing: bool = True) -> None:
    """Put a file, filled by `fill` through its descriptor, at `path`: whole or not at all (I1).

    With `replacing` false, FileExistsError where something stands there already.
    """
    folder = os.path.dirname(path)
    fd, temporary = create_locked(os.path.join(folder, TEMPORARY))
    try:
        fill(fd)
        os.fsync(fd)
        publish(temporary, path, replacing)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    sync_folder(folder or ".")


def write_durably(path: str, data: bytes, replacing: bool = True) -> None:
    """Put `data` at `path`: whole or not at all (I1)."""
    make_durably(path, lambda fd: write_all(fd, data), replacing)


def move_durably(path: str, to: str) -> None:
    """Move a file to a free name in another folder of the same disk: at no instant is it in neither."""
    make_folder(os.path.dirname(to))
    try:
        both = _link_or_move(path, to)
    except FileExistsError:
        if not os.path.samefile(path, to):
            raise
        both = True  # an earlier move was cut off
    sync_folder(os.path.dirname(to))
    if both:
        os.unlink(path)
    sync_folder(os.path.dirname(path))


def copy_range(source: int, target: int, length: int, offset: int) -> None:
    """Copy bytes between two files at the same offset, inside the kernel where it can."""
    while length > 0:
        try:
            done = os.copy_file_range(source, target, length, offset, offset)
        except (OSError, AttributeError):
            data = read_range(source, min(length, CHUNK), offset)
            write_at(target, data, offset)
            done = len(data)
        if done == 0:
            raise FormatError("a file became shorter while it was copied")
        length, offset = length - done, offset + done


def _are_equal(path: str, other: str) -> bool:
    import filecmp

    filecmp.clear_cache()  # it goes by the times of the files
    with contextlib.suppress(OSError):  # what cannot be read is not known to be equal
        return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
    return False


def keep_durably(path: str, to: str) -> None:
    """Give a file a second name, or a copy where there are no links; FileExistsError if another file has that name."""
    make_folder(os.path.dirname(to))
    try:
        os.link(path, to, follow_symlinks=False)
    except FileExistsError:
        if not _are_equal(path, to):
            raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            make_durably(to, lambda fd: copy_range(file.fileno(), fd, size, 0), replacing=False)
    sync_folder(os.path.dirname(to))


def remove_durably(path: str) -> None:
    """Remove a file, if it is there, for good."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(os.path.dirname(path))


def allocate(fd: int, size: int) -> None:
    """Make a file of `size` bytes of zeros that really has its place on the disk."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fallocate(fd, 0, size)
        return
    for start in range(0, size, CHUNK):  # a system or a filesystem without it; a full disk says so here
        write_all(fd, bytes(min(CHUNK, size - start)))


def count_free(path: str) -> int:
    """Return the bytes that a user without special rights may still write beside `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def clone_file(source: int, target: int) -> bool:
    """Make `target` share the blocks of `source`; False where the filesystem cannot."""
    import fcntl

    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def sync_filesystem(fd: int) -> None:
    """Make all that was written to the filesystem of `fd` durable."""
    import ctypes

    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
    elif syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Syncing:
    """A sync_filesystem in a thread of its own, beside what is written meanwhile."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="sync")
        try:
            self._thread.start()
        except RuntimeError:  # there may be no more threads
            self._run()

    def _run(self) -> None:
        try:
            sync_filesystem(self._fd)
        except BaseException as error:  # whatever it is, it must not pass for a sync
            self._error = error

    def join(self) -> None:
        """Return when it has ended, well or not."""
        if self._thread.ident:
            self._thread.join()

    def wait(self) -> None:
        """Return when all that was written before is durable; raises what kept it from that."""
        self.join()
        if self._error:
            raise self._error


class Folders:
    """The folders below one folder, opened part by part without following a symlink.

    The last one stays open, since the next path most often lies in it.
    """

    def __init__(self, root: int) -> None:
        self.root = root  # file descriptor; closed with this object
        self._path = b""
        self._fd = root

    def open(self, path: bytes, create: bool = False) -> int:
        """Return a descriptor of folder `path`, valid until the next call.

        Raises OSError (ENOTDIR or ELOOP where a part is a symlink).
        """
        if path == self._path:
            return self._fd
        fd = self.root
        for part in path.split(b"/") if path else []:
            above, fd = fd, self._step(fd, part, create)
            if above != self.root:
                os.close(above)
        self._forget()
        self._path, self._fd = path, fd
        return fd

    def _step(self, fd: int, part: bytes, create: bool) -> int:
        try:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
            return os.open(part, FOLDER_FLAGS, dir_fd=fd)
        except BaseException:
            if fd != self.root:
                os.close(fd)
            raise

    def parent(self, path: bytes, create: bool = False) -> tuple[int, bytes]:
        """Return a descriptor of the folder that `path` lies in, and its last part."""
        above, _, name = path.rpartition(b"/")
        return self.open(above, create), name

    def forget(self) -> None:
        """Close what is kept open below the root: it may be removed or renamed next."""
        self._forget()
        self._path, self._fd = b"", self.root

    def _forget(self) -> None:
        if self._fd != self.root:
            os.close(self._fd)

    def close(self) -> None:
        """Close all."""
        self.forget()
        os.close(self.root)


@contextlib.contextmanager
def unless_hidden() -> Iterator[None]:
    """Go on where extended attributes are not there or not to be seen."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES, errno.ENOENT):
            raise


def list_xattrs(target: int | str) -> dict[str, str]:
    """Return the extended attributes of a descriptor or of a path not followed, base64.

    Raises OSError (E2BIG where they are longer than XATTR_LIMIT together).
    """
    if not hasattr(os, "listxattr"):
        return {}
    follow = isinstance(target, int)
    found, total = {}, 0
    with unless_hidden():
        for name in sorted(os.listxattr(target, follow_symlinks=follow)):
            with unless_hidden():  # one that has gone meanwhile says nothing of the next ones
                value = os.getxattr(target, name, follow_symlinks=follow)
                found[name] = base64.b64encode(value).decode("ascii")
                total += len(name) + len(value)
    if total > XATTR_LIMIT // 2:
        raise OSError(errno.E2BIG, f"extended attributes of {total} bytes")
    return found


def name_in(folder: int, name: bytes) -> str:
    """Return a path for calls that take no folder descriptor; Linux only."""
    return f"/proc/self/fd/{folder}/{os.fsdecode(name)}"


# ==== 5. KEYS: who a node is, and whom it trusts ====


def load_zmq() -> Any:
    """Return the module zmq; BackupError that says how to get it."""
    try:
        import zmq
    except ImportError as error:
        raise BackupError(
            f"pyzmq cannot be loaded ({error}); install it: pip install pyzmq, or apt install python3-zmq"
        ) from None
    return zmq


def load_curve() -> Any:
    """Return the module zmq; BackupError where its libzmq cannot encrypt."""
    zmq = load_zmq()
    if not zmq.has("curve"):
        raise BackupError("this pyzmq was built without CURVE, so it has no keys; install another one")
    return zmq


def find_state_folder() -> str:
    """Return the folder for what this machine must remember, as systemd or XDG name it."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.environ.get("STATE_DIRECTORY", "").split(":")[0] or os.path.join(home, "zbackup")


# ---- key pairs ----


@dataclass(frozen=True)
class KeyPair:
    """Both halves of a CURVE key, each 40 characters of Z85 (https://rfc.zeromq.org/spec/32)."""

    public: str
    secret: str = field(repr=False)


Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
KEY_LENGTH = 40  # characters: each five of them are a number of 32 bits


def is_key(text: str) -> bool:
    """Tell whether `text` is a key as Z85 writes it."""
    if len(text) != KEY_LENGTH or set(text) - set(Z85):
        return False
    numbers = [[Z85.index(character) for character in text[i : i + 5]] for i in range(0, KEY_LENGTH, 5)]
    return all(functools.reduce(lambda sum, digit: 85 * sum + digit, number) < 1 << 32 for number in numbers)


def encode_secret(secret: str) -> bytes:
    """Return the file of a key pair: the secret half, and a checksum that tells when it is damaged."""
    return f"{secret} {hashlib.sha256(secret.encode('ascii')).hexdigest()[:16]}\n".encode("ascii")


def decode_secret(data: bytes) -> str:
    """Return the secret half in the file of a key pair; FormatError where it is not what was written."""
    secret = data.decode("ascii", "replace")[:KEY_LENGTH]
    if not is_key(secret) or data != encode_secret(secret):
        raise FormatError("holds no secret key")
    return secret


def make_pair() -> KeyPair:
    """Return a new key pair; its public half begins with a letter or digit, so that it is no flag and no @FILE."""
    zmq = load_curve()
    while True:
        public, secret = (half.decode("ascii") for half in zmq.curve_keypair())
        if public[0].isalnum():
            return KeyPair(public, secret)


def _check_private(path: str, fd: int) -> None:
    """Raise BackupError when others than its owner may read a secret key, or look into its folder."""
    folder = os.path.dirname(os.path.abspath(path))
    for what, found, mode in ((path, os.fstat(fd), "600"), (folder, os.stat(folder), "700")):
        if found.st_mode & 0o077:
            raise BackupError(
                f"{show(what)} is open to other users, and {show(path)} is a secret key: if nobody has read it,"
                f" chmod {mode} {show(what)}; else remove it, and a new key is made"
            )


def load_pair(path: str, failure: type[BackupError] = BackupError) -> KeyPair:
    """Return the key pair whose secret half stands in a file, made at first use.

    Raises `failure` when it can be neither read nor made, and BackupError when it is none or others can read it.
    """
    zmq = load_curve()
    try:
        if not os.path.lexists(path):
            make_folder(os.path.dirname(os.path.abspath(path)))
            with contextlib.suppress(FileExistsError):  # another process made it at this moment
                write_durably(path, encode_secret(make_pair().secret), replacing=False)
        fd = os.open(path, FILE_FLAGS)
        try:
            _check_private(path, fd)
            secret = decode_secret(os.read(fd, 1000))
        finally:
            os.close(fd)
    except FormatError as error:
        raise BackupError(f"{show(path)} {error}; restore it, or remove it, and a new one is made") from None
    except OSError as error:
        kind = FullStore if error.errno in FULL else failure
        raise kind(f"the key {show(path)} can be neither read nor made: {explain(error)}") from None
    return KeyPair(zmq.curve_public(secret.encode("ascii")).decode("ascii"), secret)


PUBLIC_HEAD = "# A zbackup server's public key, no secret: a node that has it answers this server alone.\n"


def encode_public(key: str) -> bytes:
    """Return the file zbackup.pub: a comment and a server's public key."""
    return f"{PUBLIC_HEAD}{key}\n".encode("ascii")


def load_public(path: str) -> str:
    """Return the public key in a file; UsageError where there is none, or any user can put another one in."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            if os.fstat(file.fileno()).st_mode & 0o002:
                raise UsageError(f"{show(path)} can be written by any user, so its key proves nothing: chmod o-w it")
            lines = [line.strip() for line in file.read(10000).splitlines()]
    except OSError as error:
        raise UsageError(f"the server's key {show(path)} cannot be read: {explain(error)}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) != 1 or not is_key(keys[0]):
        raise UsageError(f"{show(path)} does not hold one public key; `zbackup.pyz key --file {PUBLIC_FILE}` makes it")
    return keys[0]


def find_public(given: str, folders: Iterable[str]) -> str:
    """Return the server's public key: the one given, or that of a file, or that of a zbackup.pub in these folders.

    "" where nothing is given and no folder has one.  Raises UsageError for what is no key.
    """
    if is_key(given):
        return given
    if given:
        return load_public(given)
    paths = [os.path.join(folder, PUBLIC_FILE) for folder in folders]
    return next((load_public(path) for path in paths if os.path.lexists(path)), "")


# ---- identities: a key, or a random name for a node without one ----


def is_identity(text: str) -> bool:
    """Tell whether `text` has the form of a random name."""
    return re.fullmatch("[0-9a-f]{32}", text) is not None


def name_short(identity: str) -> str:
    """Return eight characters that tell one identity from others and stand well in a file's name."""
    return identity[:8] if is_identity(identity) else hashlib.sha256(identity.encode("utf-8")).hexdigest()[:8]


def load_identity(folder: str) -> str:
    """Return the random name that this node made at its first start, making it at need.

    Raises BackupError when it can be neither read nor kept: without it the server would
    take this node for another one at each start.
    """
    import secrets

    path = os.path.join(folder, "identity")
    try:
        if not os.path.exists(path):
            make_folder(folder)
            with contextlib.suppress(FileExistsError):
                write_durably(path, secrets.token_hex(16).encode("ascii") + b"\n", replacing=False)
        with open(path, encoding="ascii") as file:
            identity = file.read(100).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = explain(error) if isinstance(error, OSError) else "not text"
        raise BackupError(
            f"cannot keep this node's identity in {folder}: {reason}; name another folder with --state"
        ) from None
    if not is_identity(identity):
        raise BackupError(f"{path} holds no identity; remove it, and the node makes a new one")
    return identity


# ==== 6. WIRE: sockets, kinds of message, credit ====

HELLO, OPEN, LIST, READ, CLOSE = "HELLO", "OPEN", "LIST", "READ", "CLOSE"  # asked
WORKING, ERROR = "WORKING", "ERROR"  # answers to any of them
SLICE = 200  # ms; how long a wait may go without looking whether it should end
GLANCE = 20  # ms between two looks at what a connection sends: a message without end must not fill the memory first
LAST_WORD = 300  # ms that a last question may take on its way out
MOST_SOCKETS = 32768  # of one process; libzmq closes those of one group while the next one is asked
ASIDE = 4  # requests in flight beside the window of bytes

# What a monitored connection went through, as far as libzmq tells.
CONNECTED, REFUSED, READY, FAILED, LOST = "connected", "refused", "ready", "failed", "lost"
FOREIGN = "foreign"  # the handshake failed since the node was made for another server's key
CRYPTOGRAPHIC = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC, in the event of a failed handshake
HANDSHAKES = "inproc://zeromq.zap.01"  # where libzmq asks whether to accept a key, https://rfc.zeromq.org/spec/27


@dataclass(frozen=True)
class Message:
    """One question or answer."""

    kind: str
    number: int  # an answer bears its question's
    fields: Fields
    body: bytes | memoryview = b""
    size: int = 0  # bytes as it came


def encode_message(
    kind: str, number: int, fields: Mapping[str, Any], body: bytes | memoryview = b""
) -> list[bytes | memoryview]:
    """Return the two frames of a message."""
    return [write_json({"kind": kind, "number": number, **fields}).encode("ascii"), body]


def decode_message(frames: Sequence[Any], head_limit: int = HEAD_LIMIT) -> Message:
    """Return the Message in frames as pyzmq gives them; ProtocolError unless it is one."""
    if len(frames) != 2:
        raise ProtocolError(f"sent a message of {len(frames)} frames instead of 2")
    head, body = frames[0].buffer, frames[1].buffer
    if len(head) > head_limit or len(body) > BODY_LIMIT:
        raise ProtocolError(f"sent a message of {len(head)} + {len(body)} bytes, beyond the limit")
    text = bytes(head)
    if text.count(b"[") + text.count(b"{") > NEST_LIMIT:
        raise ProtocolError("sent a message of too many parts")
    try:
        fields = Fields(text, "its message")
        kind, number = fields.text("kind", limit=20), fields.integer("number")
        return Message(kind, number, fields, body, len(text) + len(body))
    except FormatError as error:
        raise ProtocolError(f"sent what is no message: {error}") from None


def to_milliseconds(seconds: float) -> int:
    """Return a span as libzmq takes it: at least 1, and three (or ten) times it in 31 bits."""
    return max(1, min(int(seconds * 1000), 1 << 27))


class Meter:
    """Counts what a connection has sent since its last whole message; on Linux, elsewhere it counts nothing."""

    BYTES = 128, "=Q"  # where tcp_info of <linux/tcp.h> has tcpi_bytes_received

    def __init__(self, fd: int) -> None:
        self.fd = fd  # libzmq's; not duplicated, since it may be of something else already
        self._zero = 0

    @contextlib.contextmanager
    def _connection(self) -> Iterator[socket.socket]:
        import socket

        borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=self.fd)
        try:
            yield borrowed
        finally:
            borrowed.detach()

    def _count(self) -> int:
        import socket

        offset, form = self.BYTES
        try:
            with self._connection() as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            return int(struct.unpack_from(form, info, offset)[0])
        except (AttributeError, OSError, struct.error):  # not Linux, or gone
            return self._zero

    def restart(self) -> None:
        """Note that a whole message has come."""
        self._zero = self._count()

    def cut_endless(self) -> bool:
        """End the connection, and tell so, when more has come than any message may have."""
        import socket

        if self._count() - self._zero <= UNFINISHED_LIMIT:
            return False
        with contextlib.suppress(OSError), self._connection() as connection:
            connection.shutdown(socket.SHUT_RDWR)
        return True


class Doorkeeper:
    """Tells libzmq to let every key in, so that each message bears its sender's key; what it may do is SWEEP's."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.zmq = load_curve()
        self._socket = context.socket(self.zmq.REP)
        self._socket.bind(HANDSHAKES)
        self._bell = context.socket(self.zmq.REQ)  # now: at the end there may be no socket left to take
        self._thread = threading.Thread(target=self._run, daemon=True, name="doorkeeper")
        self._thread.start()

    def _run(self) -> None:
        with self._socket:
            while True:
                frames = self._socket.recv_multipart()
                if len(frames) < 2:  # from `close`
                    return
                self._socket.send_multipart(self._answer(frames))

    @staticmethod
    def _answer(frames: Sequence[bytes]) -> list[bytes]:
        from zmq.utils import z85

        version, number, *_, mechanism = frames[:6]
        if mechanism != b"CURVE" or len(frames) != 7 or len(frames[6]) != 32:
            return [version, number, b"400", b"a key is needed", b"", b""]
        return [version, number, b"200", b"OK", z85.encode(frames[6]), b""]

    def close(self) -> None:
        """End its thread."""
        with self._bell:
            self._bell.connect(HANDSHAKES)
            self._bell.send(b"")
            self._thread.join()


class Wire:
    """What all sockets of a process share: the context, the key pair, the clock, the wish to stop."""

    def __init__(self, clock: Clock, stop: threading.Event, heartbeat: float, pair: KeyPair | None = None) -> None:
        self.zmq = load_zmq()
        load_zstd()  # at once: from a .pyz that was replaced meanwhile, nothing can be loaded
        self.clock = clock
        self.stop = stop
        self.heartbeat = heartbeat
        self.pair = pair
        self.context: zmq.Context[zmq.Socket[bytes]] = self.zmq.Context()
        self.context.set(self.zmq.MAX_SOCKETS, MOST_SOCKETS)
        self._doorkeeper = Doorkeeper(self.context) if pair else None

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """Return a socket with the settings that all of ours have."""
        try:
            socket = self.context.socket(kind)
        except self.zmq.ZMQError as error:
            raise BackupError(f"no socket can be made: {error.strerror}; see ulimit -n") from None
        milliseconds = to_milliseconds(self.heartbeat)
        socket.setsockopt(self.zmq.LINGER, 0)
        socket.setsockopt(self.zmq.IPV6, 1)
        socket.setsockopt(self.zmq.MAXMSGSIZE, HEAD_LIMIT)
        socket.setsockopt(self.zmq.HEARTBEAT_IVL, milliseconds)
        socket.setsockopt(self.zmq.HEARTBEAT_TIMEOUT, 3 * milliseconds)
        # A ROUTER drops what is above its mark without a word: keep it out of the credit's reach.
        # It is also what bounds the memory that a server takes which asks and never reads.
        socket.setsockopt(self.zmq.SNDHWM, 2 * QUEUE_LIMIT)
        return socket

    def expect_nodes(self, socket: zmq.Socket[bytes]) -> None:
        """Make a connecting socket the CURVE server: it takes any key, and each message tells whose it is.

        The roles are this way round so that a node needs one public key, and no node needs another's.
        """
        if self.pair is None:
            raise BackupError("there is no key pair to meet nodes with")
        socket.setsockopt(self.zmq.CURVE_SERVER, 1)
        socket.setsockopt(self.zmq.CURVE_SECRETKEY, self.pair.secret.encode("ascii"))

    def peers_at_once(self) -> int:
        """Return how many peers there may be side by side, by descriptors and by libzmq's count of sockets."""
        try:
            import resource

            descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        except ImportError:
            descriptors = 1024
        return max(1, min((descriptors - 64) // 8, MOST_SOCKETS // 8))  # each has three, and as many that close

    def check(self) -> None:
        """Raise Interrupted when the process is to stop."""
        if self.stop.is_set():
            raise Interrupted("interrupted")

    def close(self) -> None:
        """End all sockets, also those that a dying thread left open."""
        if self._doorkeeper:
            self._doorkeeper.close()
            self._doorkeeper = None
        self.context.destroy(linger=0)


class Peer:
    """A conversation with the node at one address; belongs to one thread.

    Questions go out as the window allows, answers come back in the same order.
    """

    def __init__(self, wire: Wire, address: Address, connect_timeout: float, key: str | None = None) -> None:
        self.wire = wire
        self.address = address
        self.key = key  # the node's: "" until its first message tells it, None for a node without one
        self.received = 0  # bytes of all answers
        self.most = 1 << 63  # of them
        self.end = float("inf")  # monotonic, when the whole conversation must be over
        self.events: list[str] = []  # what the connection went through
        self._meter: Meter | None = None
        self._number = 0
        self._linger = 0  # ms
        self._owed: deque[tuple[str, int, int, Callable[[Message], None]]] = deque()
        self._cost = 0  # bytes that the owed answers may have
        zmq = wire.zmq
        self.socket = wire.socket(zmq.DEALER)
        milliseconds = to_milliseconds(connect_timeout)
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, milliseconds)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, milliseconds)
        # A second try within one hello tells nothing new.
        self.socket.setsockopt(zmq.RECONNECT_IVL, 10 * milliseconds)
        self.socket.setsockopt(zmq.RCVHWM, UNREAD_LIMIT)
        if key is not None:
            wire.expect_nodes(self.socket)
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_CONNECTED
            | zmq.EVENT_CLOSED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self.socket.connect(address.endpoint)

    def close(self) -> None:
        """Close both sockets at once."""
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=self._linger)

    def leave(self, kind: str) -> None:
        """Send a last question whose answer nobody waits for."""
        self.socket.setsockopt(self.wire.zmq.LINGER, LAST_WORD)
        with contextlib.suppress(self.wire.zmq.ZMQError):
            self.socket.send_multipart(encode_message(kind, self._number + 1, {}), self.wire.zmq.NOBLOCK)
        self._linger = LAST_WORD

    def has_room(self, cost: int, window: int) -> bool:
        """Tell whether an answer of `cost` bytes may be asked for within `window` bytes."""
        most = min(window // CHUNK + ASIDE, QUEUE_LIMIT // 2)  # beyond it the node would call it a flood
        return not self._owed or (self._cost + cost <= window and len(self._owed) < most)

    def ask(
        self,
        kind: str,
        fields: Mapping[str, Any],
        on_answer: Callable[[Message], None],
        body: bytes = b"",
        cost: int = 0,
    ) -> None:
        """Send a question; `on_answer` gets its answer during a later step."""
        self._number += 1
        self._owed.append((kind, self._number, cost, on_answer))
        self._cost += cost
        try:
            frames = encode_message(kind, self._number, fields, body)
            self.socket.send_multipart(frames, self.wire.zmq.NOBLOCK)  # a copy: else pyzmq starts a thread
        except self.wire.zmq.Again:  # libzmq has given up the connection: a blocking send would wait for ever
            raise NodeError("the connection to the node was lost", "lost") from None

    def step(self, timeout: float, longest: float) -> None:
        """Wait for the next answer and hand it on.

        `timeout` is how long (s) the node may be silent, `longest` how long it may say
        that it is still working.  Raises NodeError, ProtocolError or Interrupted.
        """
        clock = self.wire.clock
        start = clock.monotonic()
        end, quiet = start + longest, start + timeout
        signs = 0
        while True:
            message = self.receive(SLICE)
            now = clock.monotonic()
            if now > self.end:
                raise NodeError("the copy took longer than --longest allows; the next one goes on from here", "long")
            if message is None and LOST in self.events:
                raise NodeError("the connection to the node was lost", "lost")
            if message is None and now > quiet:
                raise NodeError(f"the node did not answer within {timeout:g} s", "silent")
            if message and message.kind != WORKING:
                return self._hand_on(message)
            if now > end:
                what = "was still working after" if signs or message else "did not answer within"
                raise NodeError(f"the node {what} {longest:g} s", "silent")
            if message is None:
                continue
            signs += 1
            if signs > WORKING_LIMIT * (1 + now - start):
                raise ProtocolError("floods the server with signs of work")
            quiet = now + timeout

    def _hand_on(self, message: Message) -> None:
        kind, number, cost, on_answer = self._owed.popleft() if self._owed else ("", 0, 0, lambda message: None)
        if message.number != number or message.kind not in (kind, ERROR):
            raise ProtocolError("sent an answer that nobody asked for")
        self._cost -= cost
        try:
            if message.kind == ERROR:
                raise NodeError(show(message.fields.text("message")), message.fields.text("code", limit=20))
            on_answer(message)
        except FormatError as error:
            raise ProtocolError(f"sent what does not decode: {error}") from None

    def receive(self, milliseconds: int) -> Message | None:
        """Return the next message if one comes in time; notes what the connection does."""
        self.wire.check()
        zmq = self.wire.zmq
        for _ in range(max(1, milliseconds // GLANCE)):
            if self.socket.poll(min(milliseconds, GLANCE)):
                break
            self.read_events()
            self.check_unfinished()
        else:
            return None
        try:
            frames: Any = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:  # libzmq called it readable too early
            self.read_events()
            return None
        if self._meter is None:
            self.read_events()  # where answers never have to be waited for: the meter must not start after them
        if self._meter:
            self._meter.restart()
        self.received += sum(len(frame) for frame in frames)
        self._check_sender(frames)
        return decode_message(frames)

    def check_unfinished(self) -> None:
        """Raise ProtocolError when the node sends a message that does not end."""
        if self._meter and self._meter.cut_endless():
            raise ProtocolError("sends a message without end")

    def _check_sender(self, frames: Sequence[Any]) -> None:
        if self.received > self.most:
            raise NodeError(f"sent more than the {format_size(self.most)} that --most-bytes allows", "much")
        if self.key is not None:
            key = frames[0].get("User-Id")
            if self.key not in ("", key):
                raise ProtocolError("has another key than a moment before")
            self.key = key

    def read_events(self) -> None:
        """Note what the connection went through since the last call."""
        zmq = self.wire.zmq
        names = {
            zmq.EVENT_CONNECTED: CONNECTED,
            zmq.EVENT_CLOSED: REFUSED,
            zmq.EVENT_HANDSHAKE_SUCCEEDED: READY,
            zmq.EVENT_DISCONNECTED: LOST,
        }
        while self.monitor.poll(0):
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self._meter = Meter(value) if event == zmq.EVENT_CONNECTED else self._meter
            self.events.append(names.get(event, FOREIGN if value == CRYPTOGRAPHIC else FAILED))


def find_refusing(addresses: Sequence[Address], wait: float) -> set[Address]:
    """Return the addresses whose machine refuses a connection within `wait` (s).

    libzmq tells of a failed connection, but not whether somebody refused it or nobody is there.
    """
    import select
    import socket

    poll = select.poll()
    waiting: dict[int, tuple[socket.socket, Address]] = {}
    refusing: set[Address] = set()
    try:
        for address in addresses:
            plain = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
            waiting[plain.fileno()] = plain, address
            plain.setblocking(False)
            if plain.connect_ex((address.host, address.port)) == errno.ECONNREFUSED:
                refusing.add(address)
            else:
                poll.register(plain, select.POLLOUT)
        ready = poll.poll(wait * 1000) if waiting else []
        while ready:
            for fd, _ in ready:
                plain, address = waiting[fd]
                poll.unregister(fd)
                if plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
                    refusing.add(address)
            ready = poll.poll(wait * 1000)
        return refusing
    finally:
        for plain, _ in waiting.values():
            plain.close()


def say_hello() -> dict[str, Any]:
    """Return the fields of a HELLO question."""
    return {"protocol": PROTOCOL, "program": VERSION, "codecs": list_codecs()}


@dataclass(frozen=True)
class Hello:
    """What a node says of itself; its identity is proved where it is a key."""

    identity: str
    instance: str  # of the running process: two with one identity are clones
    name: str
    program: str
    codecs: tuple[str, ...]
    roots: tuple[str, ...]
    folder: str = ""  # what it would like to be called in the store
    former: str = ""  # the random name that it had before it had a key; not proved


def decode_hello(message: Message, key: str | None = None) -> Hello:
    """Return the Hello in an answer; ProtocolError with both versions where they differ.

    `key` is the node's, as the handshake proved it; None for a node without one.
    """
    fields = message.fields
    if message.kind == ERROR:
        raise NodeError(show(fields.text("message")), fields.text("code", limit=20))
    protocol = fields.integer("protocol", 0)
    if protocol != PROTOCOL:
        sentence = f"speaks protocol {protocol}, this server {PROTOCOL}: copy the same zbackup.pyz to both"
        raise ProtocolError(sentence, "refused")
    identity = fields.text("identity", limit=100)
    if message.kind != HELLO or not is_identity(identity):
        raise ProtocolError("did not answer HELLO with an identity")
    return Hello(
        identity=key or identity,
        instance=fields.text("instance", "", 100),
        name=fields.text("name", "", 255),
        program=fields.text("program", "", 100),
        codecs=tuple(fields.texts("codecs", 20)),
        roots=tuple(fields.texts("roots")),
        folder=fields.text("folder", "", 255),
        former=identity if key else "",
    )


@dataclass(frozen=True)
class Request:
    """One question as it reached the node."""

    peer: bytes  # the ROUTER's name of the connection
    address: str  # where it came from
    message: Message


def parse_number(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a text is as a number; None for a name."""
    import ipaddress

    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def is_loopback(address: str) -> bool:
    """Tell whether a peer's address is of the machine itself."""
    found = parse_number(address)
    mapped = getattr(found, "ipv4_mapped", None) or found
    return mapped is not None and bool(mapped.is_loopback)


def can_bind_to_loopback() -> bool:
    """Tell whether this system lets a socket take connections from its own machine alone; Linux does."""
    import socket

    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    except (OSError, AttributeError):
        return False
    return True


def shuffle_routing_ids() -> None:
    """Let libzmq begin the names of connections at a number that no peer knows.

    It takes it from rand(3), never seeded, and aborts when it comes to a name that a peer has claimed.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "big"))


@dataclass(frozen=True)
class Door:
    """Whom a node's socket lets in."""

    server_key: str = ""  # public: nobody else than the server that has its secret half
    pair: KeyPair | None = None  # the node's own; needed with a server's key
    local: bool = False  # this machine alone
    handshake_timeout: float = HANDSHAKE_TIMEOUT


class Listener:
    """The node's bound socket, and the way by which sessions' threads answer through it."""

    def __init__(self, wire: Wire, endpoints: Sequence[str], door: Door, say: Callable[[str], None]) -> None:
        self.wire = wire
        self.door = door
        zmq = wire.zmq
        shuffle_routing_ids()  # which are drawn when the socket is made
        self.router = wire.socket(zmq.ROUTER)
        self._guard()
        self._meters: dict[int, Meter] = {}  # by descriptor
        self._looked = 0.0  # monotonic
        self._monitor = self.router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED)
        self.answers = wire.context.socket(zmq.PULL)
        self.answers.setsockopt(zmq.RCVHWM, 0)
        self.answers.bind("inproc://answers")
        self.poller = zmq.Poller()
        for socket in (self.router, self.answers, self._monitor):
            self.poller.register(socket, zmq.POLLIN)
        for endpoint in endpoints:
            self._bind(endpoint, say)

    def _guard(self) -> None:
        """Bound what strangers can take, and let in only whom the door says."""
        zmq, door, router = self.wire.zmq, self.door, self.router
        router.setsockopt(zmq.HANDSHAKE_IVL, to_milliseconds(door.handshake_timeout))
        router.setsockopt(zmq.MAXMSGSIZE, QUESTION_LIMIT + PAGE)  # what CURVE adds included
        router.setsockopt(zmq.RCVHWM, UNREAD_QUESTIONS)
        if door.server_key:
            if door.pair is None:
                raise BackupError("there is no key pair to prove who this node is")
            router.setsockopt(zmq.CURVE_SERVERKEY, door.server_key.encode("ascii"))
            router.setsockopt(zmq.CURVE_PUBLICKEY, door.pair.public.encode("ascii"))
            router.setsockopt(zmq.CURVE_SECRETKEY, door.pair.secret.encode("ascii"))
        elif door.local and can_bind_to_loopback():
            router.setsockopt(zmq.BINDTODEVICE, b"lo")

    def _bind(self, endpoint: str, say: Callable[[str], None]) -> None:
        """Listen at an endpoint; where its address is not there yet, as before the network is up, wait for it."""
        zmq = self.wire.zmq
        told = False
        while True:
            try:
                return self._try_to_bind(endpoint)
            except zmq.ZMQError as error:
                if error.errno == errno.EADDRINUSE:
                    port = endpoint.rpartition(":")[2]
                    raise BackupError(
                        f"port {port} is in use on this machine, perhaps by another node; choose one with --port"
                    ) from None
                if error.errno != errno.EADDRNOTAVAIL:
                    raise UsageError(f"cannot listen at {endpoint}: {error.strerror}; see --bind and --port") from None
            if not told:
                say(f"this machine does not have the address of {endpoint}, see --bind; waiting until it has")
            told = True
            self.wire.clock.sleep(SLICE / 1000)
            self.wire.check()

    def _try_to_bind(self, endpoint: str) -> None:
        try:
            self.router.bind(endpoint)
        except self.wire.zmq.ZMQError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EINVAL):
                raise
            self.router.setsockopt(self.wire.zmq.IPV6, 0)  # a kernel without IPv6
            self.router.bind(endpoint)

    def receive(self, milliseconds: int) -> Request | None:
        """Pass on what sessions answered; return the next question if one comes in time.

        Raises ProtocolError for what is no question; its sender gets no answer.
        """
        self.wire.check()
        glance = max(GLANCE, len(self._meters) // 10)  # thousands of connections must not cost all the time
        ready = dict(self.poller.poll(min(milliseconds, glance) if self._meters else milliseconds))
        self._look_after_connections(glance / 1000)
        if self.answers in ready:
            self._pass_on()
        if self.router not in ready:
            return None
        try:
            frames: Any = self.router.recv_multipart(self.wire.zmq.NOBLOCK, copy=False)
        except self.wire.zmq.Again:  # libzmq called it readable too early
            return None
        meter = self._meters.get(self._tell(frames[-1], self.wire.zmq.SRCFD))
        if meter:
            meter.restart()
        address = self._tell(frames[-1], "Peer-Address") or ""
        # Who is to be refused gets no more work done than that takes.
        most = PAGE if self.door.local and not is_loopback(str(address)) else QUESTION_LIMIT
        return Request(frames[0].bytes, str(address), decode_message(frames[1:], most))

    def _tell(self, frame: Any, name: Any) -> Any:
        """Return what libzmq knows of a frame; None where it does not, as of a connection that is gone."""
        try:
            return frame.get(name)
        except self.wire.zmq.ZMQError:
            return None

    def _look_after_connections(self, pause: float) -> None:
        """Cut off who sends a message that does not end; not sooner than `pause` (s) after the last look."""
        zmq, now = self.wire.zmq, self.wire.clock.monotonic()
        while self._monitor.poll(0):
            event, fd = struct.unpack("=HI", self._monitor.recv_multipart()[0])
            self._meters.pop(fd, None)
            if event == zmq.EVENT_ACCEPTED:
                self._meters[fd] = Meter(fd)
        if now >= self._looked + pause:
            self._looked = now
            for meter in self._meters.values():
                meter.cut_endless()

    def _pass_on(self) -> None:
        zmq = self.wire.zmq
        for _ in range(QUEUE_LIMIT):
            try:
                frames: Any = self.answers.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self.send(frames)

    def send(self, frames: Sequence[Any]) -> None:
        """Send a connection's name and two frames; a connection that is gone gets nothing."""
        zmq = self.wire.zmq
        with contextlib.suppress(zmq.ZMQError):
            self.router.send_multipart(frames, zmq.NOBLOCK, copy=False)

    def answer(self, request: Request, kind: str, fields: Mapping[str, Any]) -> None:
        """Answer a question from the listener's own thread."""
        self.send([request.peer, *encode_message(kind, request.message.number, fields)])

    def reply_socket(self) -> zmq.Socket[bytes]:
        """Return a socket for one session's thread; what it sends goes out by `receive`."""
        socket = self.wire.context.socket(self.wire.zmq.PUSH)
        socket.setsockopt(self.wire.zmq.LINGER, 0)
        socket.setsockopt(self.wire.zmq.SNDHWM, 0)
        socket.connect("inproc://answers")
        return socket


# ==== 7. STORE: packs, index, snapshots ====

STORE_README = """\
This folder is a zbackup store.  It holds every version of the files of some machines.

The newest version of each machine's files stands in <machine>/latest as plain files.
All versions are restored by `zbackup.pyz restore`; this text is for whoever has only the
folder.  Do not change anything by hand below packs/ and */snapshots.

<machine>/snapshots/TIME.json  one version.  "blocks" names chunks which, joined in order, give
    one line for each path, sorted (a "/" counts as lower than all else): a JSON object (name,
    mode, owner, times), a tab, and a JSON object of what was read.  A file's content is its
    "chunks", joined: a digest is a chunk, a number n is n chunks of zeros.  Where "lists" stands
    instead, each is the digest of a chunk that holds such a list as JSON.  Every chunk has
    1048576 bytes but a file's last, whose length follows from "size".

packs/ab/abcd....pack  chunks.  The name is the SHA-256 of the file: `sha256sum` checks it.
    After 8 bytes "zbpack1\\n" follow records; all integers are little-endian:
      head    "ZREC", kind (1 byte), codec (1 byte), 0 (2 bytes), then 4 bytes each: rows,
              bytes of the table, bytes of the data raw, bytes of the data stored; 8 zeros
      table   for each row: digest (32 bytes), length in the raw data (4 bytes);
              in kind 1 then the page hashes of all chunks
      data    codec 0 as it is, 1 zlib, 2 zstd; decompressed, the rows' bytes stand in it
    Kind 1 holds chunks.  Kind 2 holds patches, each: number of sources (2 bytes), of runs
    (4 bytes), the sources' digests, then for each run: which source (2 bytes), offset in it,
    length (4 bytes each).  The chunk is the runs' bytes, joined.  Sources are of kind 1.
    A footer (for each record: offset 8 bytes, kind, 3 zeros, number of digests 4 bytes, the
    digests) and a trailer (the footer's offset in 8 bytes, its SHA-256, "zbindex\\n") end the pack.

A chunk's digest is SHA-256(h1 h2 ...), where hi is the first 16 bytes of the SHA-256 of its
i-th 4096 bytes.

Every .json file here ends in a member "sha256": the SHA-256 of all bytes of the file before the
comma that leads to it.

index.sqlite can be deleted: it is made again from the packs.  keys/server is the server's secret
key, whose public half the machines have.  reserve holds nothing: it is given back when the disk is
full.  <machine>/trash has snapshots that were removed (NAME~WHEN.json);
aside/ has what `repair` found damaged and moved out of the way.
"""


def refuse(error: OSError, what: str) -> StoreError:
    """Return what a disk refused as a StoreError; `what` could not be done, unless the disk is full."""
    if error.errno in FULL:
        return FullStore(f"the store is full: {explain(error)}; see `prune`, which makes room also then")
    return StoreError(f"the store {what}: {explain(error)}")


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn what a disk refuses into a StoreError that says where, and whether it is full."""
    try:
        yield
    except OSError as error:
        raise refuse(error, f"cannot be written ({path})") from None


INCOMING = "incoming-"  # prefix of a pack in the making

INDEX_VERSION = 2  # PRAGMA user_version of index.sqlite; another one is rebuilt
INDEX_SCHEMA = """
CREATE TABLE packs (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE chunks (digest BLOB NOT NULL, pack INTEGER NOT NULL, record INTEGER NOT NULL,
    place INTEGER NOT NULL, PRIMARY KEY (digest, pack)) WITHOUT ROWID;
CREATE INDEX loose ON chunks (pack) WHERE place < 0
"""

# A place of -1 - n stands for a patch at n that draws from what no pack holds: it is not to be found.


class Place(NamedTuple):
    """Where a digest stands: a record of a pack, and which of its rows."""

    pack: str  # name; "" is the pack that is being written
    record: int  # offset
    place: int


def remove_index(path: str) -> None:
    """Remove an index: the log first, since another database must not meet it."""
    for end in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + end)


class Index:
    """From digest to place, in SQLite; a cache of what the packs say (I4).

    Safe to use from several threads and processes.
    """

    def __init__(self, path: str) -> None:
        import sqlite3

        self.path = path
        self._lock = threading.RLock()
        try:
            self._connection = self._open()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if re.search("locked|readonly|full|unable to open|I/O", str(error)):
                raise  # not the index's fault
            remove_index(path)
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        import sqlite3

        if self.path != ":memory:":
            with contextlib.suppress(OSError):  # SQLite would let others read it; its log has the mode that it has
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                os.chmod(self.path, 0o600)
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, INDEX_VERSION):
                raise sqlite3.DatabaseError("an index of another version")
            if version == 0:
                for statement in INDEX_SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {INDEX_VERSION}")
            connection.execute("COMMIT")
            connection.execute("SELECT digest, pack, record, place FROM chunks LIMIT 1").fetchone()
            self._names: dict[int, str] = dict(connection.execute("SELECT id, name FROM packs"))
            self._file = identify(self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import sqlite3

        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path}, the index: {error}; unless the disk is full, `verify` makes it again from the packs"
            ) from None

    def list_packs(self) -> set[str]:
        """Return the names of the packs that it knows."""
        with self._locked():
            self._names = dict(self._connection.execute("SELECT id, name FROM packs"))
            return set(self._names.values())

    def put_pack(self, name: str, rows: Iterable[tuple[bytes, int, int]]) -> None:
        """Add a durable pack: rows of digest, record, place."""
        pack = None
        with self._locked(), self._transaction():
            cursor = self._connection.execute("INSERT OR IGNORE INTO packs (name) VALUES (?)", (name,))
            if cursor.rowcount:
                pack = cursor.lastrowid
                self._connection.executemany(
                    "INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?)",
                    ((digest, pack, record, place) for digest, record, place in rows),
                )
        if pack is not None:
            self._names[pack] = name

    def count_rows(self) -> dict[str, int]:
        """Return the number of rows that it has for each pack; those of none under ""."""
        select = "SELECT name, COUNT(*) FROM chunks LEFT JOIN packs ON id = pack GROUP BY pack"
        with self._locked():
            return {name or "": count for name, count in self._connection.execute(select)}

    def list_rows(self, name: str) -> list[tuple[bytes, int, int]]:
        """Return the rows (digest, record, place) that it has for a pack."""
        where = "WHERE place >= 0 AND pack = (SELECT id FROM packs WHERE name = ?)"
        select = f"SELECT digest, record, place FROM chunks {where}"
        with self._locked():
            return self._connection.execute(select, (name,)).fetchall()

    def check(self) -> None:
        """Let SQLite look through the whole file; StoreError where it finds something amiss."""
        with self._locked():
            found = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreError(f"SQLite says of it: {found}")

    def has_rows(self, name: str, rows: Sequence[tuple[bytes, int, int]]) -> bool:
        """Tell whether it has all these rows (digest, record, place) for a pack."""
        for start in range(0, len(rows), 500):
            group = rows[start : start + 500]
            places = self._find([digest for digest, _, _ in group], "")
            for digest, record, place in group:
                there = places.get(digest, [])
                if Place(name, record, place) not in there and Place(name, record, -1 - place) not in there:
                    return False
        return True

    def list_loose(self) -> dict[str, set[bytes]]:
        """Return the patches that are not to be found, by pack."""
        select = "SELECT name, digest FROM chunks JOIN packs ON id = pack WHERE place < 0"
        found: dict[str, set[bytes]] = {}
        with self._locked():
            for name, digest in self._connection.execute(select):
                found.setdefault(name, set()).add(digest)
        return found

    def put_loose(self, name: str, digests: Set[bytes], tied: Set[bytes] = frozenset()) -> None:
        """Let patches of a pack not be found, and those that are tied again be found; durable on return."""
        update = (
            "UPDATE chunks SET place = -1 - place WHERE digest = ? AND pack = (SELECT id FROM packs WHERE name = ?)"
        )
        if digests or tied:
            with self._locked(), self._synchronous(), self._transaction():
                self._connection.executemany(update + " AND place >= 0", ((digest, name) for digest in digests))
                self._connection.executemany(update + " AND place < 0", ((digest, name) for digest in tied))

    @contextlib.contextmanager
    def _synchronous(self) -> Iterator[None]:
        if self._connection.in_transaction:
            yield
            return
        self._connection.execute("PRAGMA synchronous = FULL")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def remove_pack(self, name: str, digests: Iterable[bytes] | None = None) -> None:
        """Forget a pack, and what it held; durable on return, or a pack that is removed then would be missed.

        Without the digests that it holds, all rows are looked at.
        """
        of_pack = "pack = (SELECT id FROM packs WHERE name = ?)"
        with self._locked():
            with self._synchronous(), self._transaction():
                if digests is None:
                    self._connection.execute(f"DELETE FROM chunks WHERE {of_pack}", (name,))
                else:
                    rows = ((digest, name) for digest in digests)
                    self._connection.executemany(f"DELETE FROM chunks WHERE digest = ? AND {of_pack}", rows)
                self._connection.execute("DELETE FROM packs WHERE name = ?", (name,))
            self._names = {number: known for number, known in self._names.items() if known != name}

    def reset(self, in_memory: bool = False) -> None:
        """Begin anew with nothing, whatever state the file is in; who has it open keeps the old one.

        With `in_memory` the file is gone then, and its room free.
        """
        with self._locked():
            self._connection.close()
            remove_index(self.path)
            self.path = ":memory:" if in_memory else self.path
            self._connection = self._open()

    @property
    def is_shared(self) -> bool:
        """Tell whether another process that opens it has the same one.

        Not one in memory, for want of room on the disk, nor one that others have made anew meanwhile.
        """
        return self._file is not None and identify(self.path) == self._file

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make all changes in one step."""
        with self._locked(), self._transaction():
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._connection.in_transaction:  # of `together`
            yield
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # SQLite has ended it itself where the disk is full
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def find(self, digests: Sequence[bytes]) -> dict[bytes, Place]:
        """Return a place for each of those digests that some pack holds."""
        return {digest: places[0] for digest, places in self.find_all(digests).items()}

    def find_all(self, digests: Sequence[bytes]) -> dict[bytes, list[Place]]:
        """Return all places of each of those digests that some pack holds, the newest pack's first.

        Several packs hold one digest after pulls side by side, or when damage was mended.
        """
        return self._find(digests, "AND place >= 0")

    def _find(self, digests: Sequence[bytes], which: str) -> dict[bytes, list[Place]]:
        found: dict[bytes, list[Place]] = {}
        for start in range(0, len(digests), 500):
            group = digests[start : start + 500]
            marks = ",".join("?" * len(group))
            select = f"SELECT * FROM chunks WHERE digest IN ({marks}) {which} ORDER BY digest, pack DESC"
            with self._locked():
                rows = self._connection.execute(select, group).fetchall()
            if any(row[1] not in self._names for row in rows):
                self.list_packs()  # another process added packs
            for digest, pack, record, place in rows:
                if pack in self._names:
                    found.setdefault(digest, []).append(Place(self._names[pack], record, place))
        return found

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()


def list_packs(folder: str) -> dict[str, str]:
    """Return name and path of each pack in the packs folder."""
    found = {}
    for entry in os.scandir(folder):
        if len(entry.name) == 2 and entry.is_dir(follow_symlinks=False):
            for pack in os.scandir(entry.path):
                if re.fullmatch(r"[0-9a-f]{64}\.pack", pack.name):
                    found[pack.name[:64]] = pack.path
    return found


def read_footer(path: str) -> Iterator[tuple[int, int, list[bytes]]]:
    """Return offset, kind and digests of each record of a pack; FormatError where it is damaged."""
    with open(path, "rb") as file:
        if file.read(len(PACK_HEADER)) != PACK_HEADER:
            raise FormatError("it does not start as a pack")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER.size))
        trailer = file.read(TRAILER.size)
        if len(trailer) != TRAILER.size or not trailer.endswith(TRAILER_MAGIC):
            raise FormatError("it does not end as a pack")
        start, proof, _ = TRAILER.unpack(trailer)
        if not 0 < start <= size - TRAILER.size or size - start > 4 * RECORD_LIMIT:
            raise FormatError("its end names a place outside of it")
        file.seek(start)
        footer = file.read(size - TRAILER.size - start)
    return decode_footer(footer, proof)


def read_pack_index(path: str) -> list[tuple[bytes, int, int]]:
    """Return digest, record and place of all that a pack holds; FormatError where it is damaged."""
    return [(digest, offset, place) for offset, _, digests in read_footer(path) for place, digest in enumerate(digests)]


def load_record(fd: int, offset: int) -> Record:
    """Return the head and table of the record at an offset of a pack; FormatError where there is none."""
    head = read_range(fd, RECORD.size, offset)
    size = decode_record_head(head, offset)[3]
    return decode_record(head, read_range(fd, size, offset + RECORD.size), offset)


def load_raw(fd: int, record: Record) -> bytes:
    """Return the data of a record of a pack, decompressed."""
    return decompress(record.codec, read_range(fd, record.stored, record.data_offset), record.raw)


def list_patches(path: str) -> Iterator[tuple[bytes, tuple[Run, ...]]]:
    """Yield digest and runs of all patches of a pack; FormatError where it is damaged."""
    with open(path, "rb") as file:
        for offset, kind, _ in read_footer(path):
            if kind == PATCHES:
                record = load_record(file.fileno(), offset)
                raw = load_raw(file.fileno(), record)
                for (digest, length), start in zip(record.rows, record.starts):
                    yield digest, decode_patch(raw[start : start + length])


def find_loose(index: Index, path: str) -> set[bytes]:
    """Return the patches of a pack that draw from what no pack holds: the index must not name them.

    Content that comes back would else be taken for known.  None of a pack that cannot be read.
    """
    loose: set[bytes] = set()
    with contextlib.suppress(FormatError, OSError):
        for digest, runs in list_patches(path):
            sources = list({run.source for run in runs})
            if len(index.find(sources)) < len(sources):
                loose.add(digest)
    return loose


class PackWriter:
    """One pack in the making; belongs to one thread.

    What it holds can be read back at once, and is durable after `seal` (I2).
    """

    def __init__(self, folder: str, index: Index, codec: int, level: int) -> None:
        self.folder = folder
        self.index = index
        self.codec, self.level = codec, level
        self.added = 0  # bytes of all packs sealed, and of the one in the making
        self.distrusted: set[bytes] = set()  # digests to be stored although the store seems to have them
        self.sealed: list[str] = []  # names of the packs that are durable
        self._failure: StoreError | None = None  # after it nothing more is written: a record may be torn
        self.fd = -1
        self._path = ""
        self._start()

    def _start(self) -> None:
        self._size = 0
        self._hash = hashlib.sha256()
        self._records: list[tuple[int, int, list[bytes]]] = []
        self._places: dict[bytes, Place] = {}
        self._pieces: list[Piece] = []
        self._piece_size = 0
        self._patches: list[tuple[bytes, bytes]] = []
        self._waiting: set[bytes] = set()  # digests in _pieces and _patches

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self._failure:
            raise self._failure
        try:
            with writing(self.folder):
                yield
        except StoreError as error:
            self._failure = error
            self.abandon()
            raise

    def _open(self) -> None:
        with self._writing():
            self.fd, self._path = create_locked(os.path.join(self.folder, INCOMING))
        self._write(PACK_HEADER)

    def _write(self, data: bytes) -> None:
        with self._writing():
            write_all(self.fd, data)
        self._hash.update(data)
        self._size += len(data)
        self.added += len(data)

    @property
    def size(self) -> int:
        """Bytes in the pack and waiting for it."""
        return self._size + self._piece_size

    @property
    def count(self) -> int:
        """Digests in the pack and waiting for it."""
        return len(self._places) + len(self._waiting)

    def unknown(self, digests: Iterable[bytes]) -> set[bytes]:
        """Return those digests that neither this pack nor the store holds."""
        new = {d for d in digests if d not in self._places and d not in self._waiting}
        return new - (self.index.find(list(new)).keys() - self.distrusted) if new else new

    def find(self, digest: bytes) -> Place | None:
        """Return the place of a digest in this pack, if it holds it."""
        if digest in self._waiting:
            self.flush()
        return self._places.get(digest)

    def put_frame(self, frame: tuple[int, int, bytes | memoryview], pieces: Sequence[Piece]) -> None:
        """Put chunks whose digests have been checked (I5); `frame`, as for encode_record, is how they came.

        It is kept as it came where it is large, all of it is new and nothing else is in it.
        """
        new = self.unknown(piece.digest for piece in pieces)
        size = sum(len(piece.data) for piece in pieces)
        if size >= CHUNK // 2 and len(new) == len(pieces) and size == frame[1]:
            rows = [(piece.digest, len(piece.data)) for piece in pieces]
            self._put_record(FRAME, rows, b"".join(piece.pages for piece in pieces), frame)
            return
        for piece in pieces:
            if piece.digest in new:
                new.discard(piece.digest)
                self._put_piece(piece)

    def put_chunk(self, data: bytes) -> bytes:
        """Put one chunk; returns its digest."""
        pages = hash_pages(data)
        digest = digest_pages(pages)
        if self.unknown([digest]):
            self._put_piece(Piece(digest, pages, memoryview(data)))
        return digest

    def _put_piece(self, piece: Piece) -> None:
        # A copy: the view may hold a whole message of many pieces.
        self._pieces.append(piece._replace(data=memoryview(bytes(piece.data))))
        self._piece_size += len(piece.data)
        self._waiting.add(piece.digest)
        if self._piece_size >= CHUNK:
            self._flush_pieces()

    def put_patch(self, digest: bytes, runs: Sequence[Run]) -> None:
        """Put a chunk as runs of whole chunks that the store or this pack holds."""
        if self.unknown([digest]):
            self._patches.append((digest, encode_patch(runs)))
            self._waiting.add(digest)
            if len(self._patches) >= 512:
                self._flush_patches()

    def flush(self) -> None:
        """Write what waits, so that it can be read."""
        self._flush_pieces()
        self._flush_patches()

    def _flush_pieces(self) -> None:
        if self._pieces:
            codec, data = compress(self.codec, b"".join(piece.data for piece in self._pieces), self.level)
            rows = [(piece.digest, len(piece.data)) for piece in self._pieces]
            hashes = b"".join(piece.pages for piece in self._pieces)
            frame = (codec, self._piece_size, data)
            self._pieces, self._piece_size = [], 0
            self._put_record(FRAME, rows, hashes, frame)

    def _flush_patches(self) -> None:
        if self._patches:
            raw = b"".join(patch for _, patch in self._patches)
            codec, data = compress(self.codec, raw, self.level)
            rows = [(digest, len(patch)) for digest, patch in self._patches]
            self._patches = []
            self._put_record(PATCHES, rows, b"", (codec, len(raw), data))

    def _put_record(
        self, kind: int, rows: Sequence[tuple[bytes, int]], hashes: bytes, frame: tuple[int, int, bytes | memoryview]
    ) -> None:
        if self.fd < 0:
            self._open()
        digests = [digest for digest, _ in rows]
        for place, digest in enumerate(digests):
            self._places[digest] = Place("", self._size, place)
        self._waiting.difference_update(digests)
        self._records.append((self._size, kind, digests))
        self._write(encode_record(kind, rows, hashes, frame))

    def seal(self) -> None:
        """Make all that was put durable and known to the index, in this order (I2)."""
        if self._failure:  # what was put is lost, perhaps while a chunk was looked for, which told nobody
            raise self._failure
        self.flush()
        if self.fd < 0:
            return
        self._write(encode_footer(self._records, self._size))
        name = self._hash.hexdigest()
        folder = os.path.join(self.folder, name[:2])
        with self._writing():
            os.fsync(self.fd)
            make_folder(folder)
            os.rename(self._path, os.path.join(folder, name + ".pack"))
            sync_folder(folder)
            sync_folder(self.folder)
        self.index.put_pack(name, ((d, at, i) for at, _, digests in self._records for i, d in enumerate(digests)))
        os.close(self.fd)
        self.fd = -1
        self.sealed.append(name)
        self._start()

    def abandon(self) -> None:
        """Remove the pack in the making: nothing durable names it."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self.fd)
            self.fd = -1


def _remember(cache: OrderedDict[Any, Any], key: object, value: object, most: int) -> None:
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)


class Reader:
    """Chunks by their digests; belongs to one thread."""

    def __init__(self, packs: str, index: Index, lost: frozenset[bytes] = frozenset(), frames: int = 32) -> None:
        self.packs = packs
        self.index = index
        self.lost = lost  # digests that no pack gave when the store was repaired
        self.open_pack: PackWriter | None = None  # looked into first
        self.distrusted: set[bytes] = set()  # digests that could not be read: to be stored anew
        self._files: OrderedDict[str, int] = OrderedDict()  # descriptors of the last packs read
        self._records: OrderedDict[tuple[str, int], Record] = OrderedDict()
        self._raws: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._frames = frames  # decompressed frames kept: about 1 MiB each
        self._found: dict[bytes, list[Place]] = {}  # by look_up

    def close(self) -> None:
        """Close the packs."""
        while self._files:
            os.close(self._files.popitem()[1])

    def look_up(self, digests: Sequence[bytes]) -> None:
        """Find the places of what is read next in one step; those of the last time are forgotten."""
        self._found = {}
        with contextlib.suppress(StoreError):  # a damaged index: what is read tells it, digest by digest
            self._found = self.index.find_all(digests)

    def find(self, digest: bytes) -> list[Place]:
        """Return the places of a digest, the most trusted first; MissingChunk where there is none."""
        place = self.open_pack.find(digest) if self.open_pack else None
        known = [] if digest in self.distrusted else self._found.get(digest, [])
        known = known or self.index.find_all([digest]).get(digest, [])
        places = [place, *known] if place else known
        if not places:
            raise MissingChunk(f"the store has no chunk {digest.hex()}; a pack is lost")
        return places

    def _first(self, digest: bytes, read: Callable[[Place, bytes], Any]) -> Any:
        """Return what `read` makes of the first place of a digest that is not damaged."""
        places = self.find(digest)
        for number, place in enumerate(places, 1):
            try:
                self._check_row(self.record(place), place, digest)
                return read(place, digest)
            except (StoreError, FormatError, OSError) as error:
                if number == len(places):
                    raise self._blame(place, error) from None
        raise AssertionError("a digest without a place")

    @staticmethod
    def _blame(place: Place, error: Exception) -> Exception:
        """Return an error that names the pack at fault."""
        if isinstance(error, CodecError):
            return CodecMissing(f"pack {place.pack} is {error}")
        if isinstance(error, FormatError):
            return StoreError(f"pack {place.pack} is damaged: {error}")
        return (
            StoreError(f"pack {place.pack} cannot be read: {explain(error)}") if isinstance(error, OSError) else error
        )

    def _file(self, name: str) -> int:
        if not name and self.open_pack:
            return self.open_pack.fd
        if name not in self._files:
            try:
                fd = os.open(os.path.join(self.packs, name[:2], name + ".pack"), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StoreError(f"pack {name} cannot be opened: {explain(error)}") from None
            self._files[name] = fd
            if len(self._files) > 32:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def record(self, place: Place) -> Record:
        """Return the head and table of the record at a place."""
        key = (place.pack, place.record)
        if key not in self._records:
            record = load_record(self._file(place.pack), place.record)
            if place.pack:
                _remember(self._records, key, record, 128)
                while len(self._records) > 1 and sum(len(kept.rows) for kept in self._records.values()) > ROWS_LIMIT:
                    self._records.popitem(last=False)
            return record
        self._records.move_to_end(key)
        return self._records[key]

    def _raw(self, place: Place, record: Record) -> bytes:
        key = (place.pack, place.record)
        if key not in self._raws:
            raw = load_raw(self._file(place.pack), record)
            if place.pack:
                _remember(self._raws, key, raw, self._frames)
                while len(self._raws) > 1 and sum(map(len, self._raws.values())) > RAW_LIMIT:
                    self._raws.popitem(last=False)
            return raw
        self._raws.move_to_end(key)
        return self._raws[key]

    def _row(self, place: Place) -> tuple[Record, memoryview]:
        record = self.record(place)
        start, end = record.starts[place.place : place.place + 2]
        return record, memoryview(self._raw(place, record))[start:end]

    def runs(self, digest: bytes) -> tuple[Run, ...]:
        """Return the runs of whole chunks that a chunk consists of."""
        found: tuple[Run, ...] = self._first(digest, self._read_runs)
        return found

    def _read_runs(self, place: Place, digest: bytes) -> tuple[Run, ...]:
        record = self.record(place)
        if record.kind == FRAME:  # its table tells, without its content
            return (Run(digest, 0, record.rows[place.place][1]),)
        return decode_patch(bytes(self._row(place)[1]))

    def get(self, digest: bytes) -> bytes:
        """Return a chunk, checked; StoreError naming the pack where it is not what it was (I5)."""
        try:
            chunk: bytes = self._first(digest, self._read_chunk)
        except StoreError:
            self.distrusted.add(digest)
            raise
        return chunk

    def _read_chunk(self, place: Place, digest: bytes) -> bytes:
        record, data = self._row(place)
        runs = () if record.kind == FRAME else decode_patch(bytes(data))
        # The second time with each source checked, which tells where the damage is.
        for read in (self._whole, self._sound):
            chunk = self._assemble(runs, read) if runs else bytes(data)
            if digest_pages(hash_pages(chunk)) == digest:
                return chunk
        raise FormatError(f"chunk {digest.hex()} has other bytes than it had")

    def _check_row(self, record: Record, place: Place, digest: bytes) -> None:
        there = place.place < len(record.rows)
        if not there or record.rows[place.place][0] != digest:
            what = f"the record at byte {place.record} has {'another chunk in' if there else 'no'} row {place.place}"
            raise StoreError(
                f"{self.index.path}, the index, does not fit the packs ({what}); delete it: it is made again"
            )

    def _assemble(self, runs: Sequence[Run], read: Callable[[bytes], bytes | memoryview]) -> bytes:
        parts = []
        sources: dict[bytes, bytes | memoryview] = {}  # a patch of many versions draws from each of them many times
        for run in runs:
            try:
                data = sources[run.source] if run.source in sources else read(run.source)
            except MissingChunk:
                raise FormatError("a patch names a chunk that no pack holds") from None
            sources[run.source] = data
            if run.offset + run.length > len(data):
                raise FormatError("a patch names bytes that its source has not")
            parts.append(data[run.offset : run.offset + run.length])
        return b"".join(parts)

    def _whole(self, digest: bytes) -> memoryview:
        """Return a chunk that is kept whole, not checked."""
        found: memoryview = self._first(digest, self._read_whole)
        return found

    def _sound(self, digest: bytes) -> bytes:
        """Return a chunk that is kept whole, checked."""
        found: bytes = self._first(digest, self._read_sound)
        return found

    def _read_sound(self, place: Place, digest: bytes) -> bytes:
        data = bytes(self._read_whole(place, digest))
        if digest_pages(hash_pages(data)) != digest:
            raise FormatError(f"chunk {digest.hex()} has other bytes than it had")
        return data

    def _read_whole(self, place: Place, digest: bytes) -> memoryview:
        record, data = self._row(place)
        if record.kind != FRAME:
            raise FormatError(f"chunk {digest.hex()}, which a patch draws from, is a patch itself")
        return data

    def read_runs(self, runs: Sequence[Run]) -> bytes:
        """Return bytes of whole chunks, not checked."""
        return self._assemble(runs, self._whole)

    def pages(self, digest: bytes) -> bytes:
        """Return the page hashes of a chunk, without reading its content where they are stored."""
        pages = self._join_pages(self.runs(digest))
        return pages if digest_pages(pages) == digest else hash_pages(self.get(digest))

    def _join_pages(self, runs: Iterable[Run]) -> bytes:
        parts = []
        for run in runs:
            if run.offset % PAGE:
                break  # not made of pages: the digest tells
            start, end = run.offset // PAGE, count_pages(run.offset + run.length)
            length, pages = self._first(run.source, self._read_pages)
            stop = run.offset + run.length
            if stop > length or (stop % PAGE and stop != length):
                break  # not made of whole pages
            parts.append(pages[start * PAGE_HASH : end * PAGE_HASH])
        return b"".join(parts)

    def gives(self, digest: bytes, runs: Sequence[Run]) -> bool:
        """Tell whether runs of whole chunks give the chunk of this digest."""
        try:
            if digest_pages(self._join_pages(runs)) == digest:
                return True
            return digest_pages(hash_pages(self._assemble(runs, self._sound))) == digest
        except FullStore:
            raise
        except (StoreError, FormatError):
            return False

    def has(self, digest: bytes) -> bool:
        """Tell whether a chunk that was lost can be read again; one that cannot is to be stored anew.

        Raises CodecMissing where this Python cannot tell, FullStore where the pack in the making cannot be written.
        """
        try:
            self.get(digest)
        except (CodecMissing, FullStore):
            raise
        except (StoreError, FormatError):
            return False
        return True

    def find_sound(self, digest: bytes) -> Place | None:
        """Return the first place that gives a chunk as it was: whole ones first, since patches draw from them."""
        sound: list[tuple[bool, Place]] = []
        for place in self.find(digest):
            with contextlib.suppress(StoreError, FormatError, OSError):
                record = self.record(place)
                self._check_row(record, place, digest)
                self._read_chunk(place, digest)
                sound.append((record.kind != FRAME, place))
        return min(sound, key=lambda found: found[0])[1] if sound else None

    def _read_pages(self, place: Place, digest: bytes) -> tuple[int, bytes]:
        record = self.record(place)
        if record.kind != FRAME:
            raise FormatError(f"chunk {digest.hex()}, which a patch draws from, is a patch itself")
        return record.rows[place.place][1], record.pages(place.place)


# ---- entries in blocks, chunks in lists ----


class BlockWriter:
    """Entries in the order of their paths, cut into blocks at places that depend on the paths.

    So an unchanged stretch of entries makes the block that the last snapshot has already.
    """

    def __init__(self, writer: PackWriter) -> None:
        self.writer = writer
        self.blocks: list[bytes] = []
        self.tail: list[bytes] = []  # entries not in a block yet
        self._size = 0

    def put(self, entry: Entry) -> None:
        """Add the next entry."""
        line = entry.encode()
        if self._size + len(line) > CHUNK // 4:
            self._cut()
        self.tail.append(line)
        self._size += len(line)
        if ends_block(entry.line):
            self._cut()

    def put_known(self, digest: bytes) -> None:
        """Add a block that the store has; the last one is over."""
        self.blocks.append(digest)

    def _cut(self) -> None:
        if self.tail:
            self.blocks.append(self.writer.put_chunk(b"".join(self.tail)))
            self.tail, self._size = [], 0

    def close(self) -> tuple[bytes, ...]:
        """Return the digests of all blocks."""
        self._cut()
        return tuple(self.blocks)


OnDamage = Callable[[BackupError], None]


def list_blocks(reader: Reader, digests: Iterable[bytes], on_damage: OnDamage | None = None) -> Iterator[Block]:
    """Yield the blocks of a snapshot, in order.

    One that cannot be read raises StoreError or FormatError; with `on_damage`, that gets the
    error, and the next block follows.
    """
    for digest in digests:
        try:
            block = Block.decode(digest, reader.get(digest))
        except (StoreError, FormatError) as error:
            if on_damage is None or isinstance(error, FullStore):
                raise
            on_damage(error)
            continue
        yield block


def list_entries(reader: Reader, blocks: Iterable[bytes], on_damage: OnDamage | None = None) -> Iterator[Entry]:
    """Yield the entries of a snapshot's blocks, in order; `on_damage` as for list_blocks."""
    for block in list_blocks(reader, blocks, on_damage):
        yield from block.list_entries()


HEX_DIGEST = re.compile(rb'(?<=")[0-9a-f]{64}(?=")')
NAMED_DIGEST = re.compile(rb'(?<=[\[,]")[0-9a-f]{64}(?="[\],])')  # in a list: not what an attribute's name or value is


def load_chunk_list(reader: Reader, digest: bytes) -> tuple[bytes | int, ...]:
    """Return the chunks that a list names."""
    try:
        values = json.loads(reader.get(digest))
    except (ValueError, RecursionError):
        raise FormatError(f"the list {digest.hex()} is not JSON") from None
    if type(values) is not list or len(values) > LIST_SPAN:
        raise FormatError(f"the list {digest.hex()} is not a list")
    return decode_chunks(values)


def list_chunks(reader: Reader, content: Content) -> Iterator[bytes | int]:
    """Yield the chunks of a file, a number for that many chunks of zeros."""
    yield from content.chunks
    for digest in content.lists:
        yield from load_chunk_list(reader, digest)


def list_named(read: bytes) -> list[bytes]:
    """Return all digests in the content's half of an entry, which is not decoded."""
    return [bytes.fromhex(text.decode()) for text in NAMED_DIGEST.findall(read)]


def list_lacking(reader: Reader, blocks: Iterator[Block]) -> Iterator[tuple[Block, Set[int]]]:
    """Yield blocks, and the numbers of those of their entries of whose chunks the store lacks one.

    Lists are looked into; what a patch draws from is looked at only where `repair` found it lost.
    """
    for block in blocks:
        names = list(map(list_named, block.reads))
        for read, digests in zip(block.reads, names):
            if b'"lists"' in read:
                with contextlib.suppress(StoreError, FormatError):
                    chunks = list_chunks(reader, decode_content(read))
                    digests += [chunk for chunk in chunks if isinstance(chunk, bytes)]
        wanted = set(itertools.chain.from_iterable(names))
        lacking = wanted.difference(reader.index.find(list(wanted)))
        if reader.lost:
            lacking |= {digest for digest in wanted if digest in reader.lost and not reader.has(digest)}
        yield block, {i for i, digests in enumerate(names) if not lacking.isdisjoint(digests)} if lacking else set()


class ListWriter:
    """The chunks of one file as they come, in lists where there are many."""

    def __init__(self, writer: PackWriter) -> None:
        self.writer = writer
        self.count = 0  # chunks so far
        self._lists: list[bytes] = []
        self._span: list[bytes | int] = []

    def put(self, chunk: bytes) -> None:
        """Add the next chunk's digest."""
        self._make_room()
        self._span.append(chunk)
        self.count += 1

    def put_zeros(self, count: int) -> None:
        """Add `count` chunks of zeros."""
        while count > 0:
            self._make_room()
            step = min(count, LIST_SPAN - self.count % LIST_SPAN)
            last = self._span[-1] if self._span else b""
            if isinstance(last, int):
                self._span[-1] = last + step
            else:
                self._span.append(step)
            self.count += step
            count -= step

    def _make_room(self) -> None:
        if self._span and self.count % LIST_SPAN == 0:
            self._lists.append(self.writer.put_chunk(write_json(encode_chunks(self._span)).encode("ascii")))
            self._span = []

    def content(self, size: int, grade: str) -> Content:
        """Return the content so far."""
        if not self._lists:
            return Content(size, tuple(self._span), (), grade)
        rest = write_json(encode_chunks(self._span)).encode("ascii")
        return Content(size, (), (*self._lists, self.writer.put_chunk(rest)), grade)


def _signed(number: int) -> int:
    """Return a 64-bit number as SQLite stores one."""
    return number - (1 << 64) if number >= 1 << 63 else number


class TemporaryTable:
    """Tables for this run alone, on disk where they are large: there may be millions of rows."""

    def __init__(self, *schema: str) -> None:
        import sqlite3

        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # a private temporary file
        self.execute("PRAGMA cache_size = -32768")  # KiB: on a full disk, most stores need none of it
        for statement in (*schema, "BEGIN"):
            self.execute(statement)

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Return the cursor of one statement; BackupError where the folder for temporary files is full."""
        import sqlite3

        try:
            return self._table.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise BackupError(f"a temporary table: {error}; name a folder with room in SQLITE_TMPDIR") from None

    def close(self) -> None:
        """Forget all."""
        self._table.close()


class LinkTable(TemporaryTable):
    """What is known of files with several names."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE links (device INTEGER, inode INTEGER, value BLOB, PRIMARY KEY (device, inode))")

    def put(self, key: tuple[int, int], value: bytes) -> None:
        """Keep a value for a device and an inode."""
        self.execute("INSERT OR REPLACE INTO links VALUES (?, ?, ?)", (*map(_signed, key), value))

    def get(self, key: tuple[int, int]) -> bytes | None:
        """Return the value for a device and an inode, if there is one."""
        row = self.execute(
            "SELECT value FROM links WHERE device = ? AND inode = ?", tuple(map(_signed, key))
        ).fetchone()
        return bytes(row[0]) if row else None


class ChunkTable:
    """The chunks of a file by their number."""

    def __init__(self, reader: Reader, content: Content) -> None:
        self.reader = reader
        self.content = content
        self._span = -1
        self._chunks: list[bytes | None] = []

    def get(self, number: int) -> bytes | None:
        """Return the digest of a chunk; None for zeros and beyond the end."""
        span, place = divmod(number, LIST_SPAN)
        if span != self._span:
            self._span, self._chunks = span, []
            try:
                chunks = self._load(span)
            except (StoreError, FormatError):
                chunks = ()  # a lost list: then nothing is known, and all is sent
            for chunk in chunks:
                self._chunks.extend([None] * chunk if isinstance(chunk, int) else [chunk])
            self.reader.look_up([chunk for chunk in self._chunks if chunk])
        return self._chunks[place] if place < len(self._chunks) else None

    def _load(self, span: int) -> Sequence[bytes | int]:
        if self.content.lists:
            return load_chunk_list(self.reader, self.content.lists[span]) if span < len(self.content.lists) else ()
        return self.content.chunks if span == 0 else ()


# ---- the store as a whole, and a node's folder in it ----


@dataclass(frozen=True)
class Progress:
    """What a pull had when it was cut off: the next one need not ask for it again."""

    blocks: tuple[bytes, ...] = ()
    tail: tuple[bytes, ...] = ()  # lines of entries after the blocks
    current: Entry | None = None  # the file being read, as far as it was
    deleted: int = 0  # entries that the node no longer lists, up to there
    scrambled: int = 0  # as in Receiver
    opaque: int = 0


def encode_progress(progress: Progress) -> bytes:
    """Return the progress.json of a node."""
    fields = {
        "blocks": [digest.hex() for digest in progress.blocks],
        "tail": [line.decode("ascii") for line in progress.tail],
        "current": progress.current.encode().decode("ascii") if progress.current else "",
        "deleted": progress.deleted,
        "scrambled": progress.scrambled,
        "opaque": progress.opaque,
    }
    return encode_file(fields)


def decode_progress(data: bytes) -> Progress:
    """Return the Progress in a progress.json."""
    fields = decode_file(data, "progress.json")
    current = fields.text("current", "", ENTRY_LIMIT).encode("ascii", "replace")
    return Progress(
        blocks=tuple(decode_digest(text) for text in fields.texts("blocks", 1 << 30)),
        tail=tuple(line.encode("ascii", "replace") for line in fields.texts("tail", 1 << 20, ENTRY_LIMIT)),
        current=Entry.decode(current) if current else None,
        deleted=fields.integer("deleted", 0),
        scrambled=fields.integer("scrambled", 0),
        opaque=fields.integer("opaque", 0),
    )


@dataclass(frozen=True)
class LatestState:
    """Which snapshot the folder `latest` shows, and what else of older ones may be there."""

    snapshot: str = ""
    next: str = ""  # the snapshot that it is being made to show
    token: str = ""  # of the temporary names of the run that makes it
    older: tuple[str, ...] = ()  # snapshots whose files stay while a folder cannot be read

    @property
    def snapshots(self) -> tuple[str, ...]:
        """All snapshots whose files may be in it, the oldest first."""
        return tuple(name for name in (*self.older, self.snapshot, self.next) if name)


OLDER_KEPT = 20  # snapshots; beyond them what is left in `latest` is the user's to remove


def decode_latest(data: bytes) -> LatestState:
    """Return the LatestState in a latest.json."""
    fields = decode_file(data, "latest.json")
    snapshot, following, token = (fields.text(name, "") for name in ("snapshot", "next", "token"))
    return LatestState(snapshot, following, token, tuple(fields.texts("older", OLDER_KEPT)))


@dataclass(frozen=True)
class Trashed:
    """A snapshot that was removed and can still be brought back."""

    snapshot: Snapshot
    removed: int  # ns, server's clock
    path: str


@dataclass(frozen=True)
class Lost:
    """What `repair` could not give back: it is asked for again, and then healed, where a node still has it."""

    digests: frozenset[bytes] = frozenset()
    snapshots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # those harmed, by node


def encode_lost(lost: Lost) -> bytes:
    """Return the damage/lost.json of a store."""
    return encode_file({"digests": sorted(digest.hex() for digest in lost.digests), "snapshots": dict(lost.snapshots)})


def decode_lost(data: bytes) -> Lost:
    """Return the Lost in a damage/lost.json."""
    fields = decode_file(data, "damage/lost.json")
    snapshots = Fields.inside(fields.values.get("snapshots", {}), "damage/lost.json: snapshots")
    names = {node: tuple(snapshots.texts(node, 1 << 30)) for node in snapshots.values}
    return Lost(frozenset(map(decode_digest, fields.texts("digests", 1 << 30))), names)


def note_once(problems: list[str], sentence: str) -> None:
    """Add a sentence to a list that does not have it."""
    if sentence not in problems:
        problems.append(sentence)


class NodeFolder:
    """One node's folder: its snapshots and what is known of it."""

    def __init__(self, store: str, name: str, problems: list[str]) -> None:
        self.name = name
        self.problems = problems  # of the store: what is damaged
        self.path = os.path.join(store, name)
        self.snapshots = os.path.join(self.path, "snapshots")
        self.trash = os.path.join(self.path, "trash")

    def make(self) -> None:
        """Make the folder durably."""
        with writing(self.path):
            make_folder(self.snapshots)

    def lock(self) -> int:
        """Return a descriptor that keeps other runs off this node; StoreError if one is on it."""
        try:
            return lock_file(os.path.join(self.path, "lock"), shared=False)
        except BlockingIOError:
            raise LockedStore(f"another run is copying {self.name} at this moment") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs off this node meanwhile; StoreError if one is on it."""
        lock = self.lock()
        try:
            yield
        finally:
            os.close(lock)

    def load_known(self) -> Known:
        """Return what is known of the node."""
        with open(os.path.join(self.path, "node.json"), "rb") as file:
            return decode_known(file.read(), self.name)

    def save_known(self, known: Known) -> None:
        """Keep what is known of the node."""
        with writing(self.path):
            write_durably(os.path.join(self.path, "node.json"), encode_known(known))

    def newest(self) -> Iterator[Snapshot]:
        """Yield the snapshots from the newest on; only those asked for are decoded."""
        found = []
        for entry in os.scandir(self.snapshots):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                head = b""
                try:
                    with open(entry.path, "rb") as file:
                        head = file.read(200)
                except FileNotFoundError:
                    continue  # pruned meanwhile
                except OSError:
                    pass
                sequence = re.search(rb'"sequence": (\d+)', head)
                found.append((int(sequence[1]) if sequence else sys.maxsize, entry.name[:-5]))  # damage is told at once
        for _, name in sorted(found, reverse=True):
            try:
                yield self.load_snapshot(name)
            except (FormatError, OSError) as error:
                note_once(self.problems, f"snapshot {self.name}/{name} cannot be read: {error}")

    def list_snapshots(self) -> list[Snapshot]:
        """Return all snapshots in the order they were made; a damaged one is noted as a problem."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.snapshots)):
                if name.endswith(".json") and not name.startswith("."):
                    try:
                        found.append(self.load_snapshot(name[:-5]))
                    except (FormatError, OSError) as error:
                        note_once(self.problems, f"snapshot {self.name}/{name[:-5]} cannot be read: {error}")
        return sorted(found, key=lambda snapshot: snapshot.sequence)

    def load_snapshot(self, name: str) -> Snapshot:
        """Return one snapshot."""
        with open(os.path.join(self.snapshots, name + ".json"), "rb") as file:
            return decode_snapshot(file.read(), self.name, name)

    def save_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Keep a snapshot whose content is durable (I1); returns it as it is named.

        Two in the same second get names that differ; none is ever overwritten (I3).  Raises FormatError where it
        could not be read again.
        """
        data = encode_snapshot(snapshot)  # without its name, which is the file's
        decode_snapshot(data, self.name, snapshot.name)
        for number in itertools.count(1):
            name = snapshot.name if number == 1 else f"{snapshot.name}-{number}"
            with writing(self.path), contextlib.suppress(FileExistsError):
                write_durably(os.path.join(self.snapshots, name + ".json"), data, replacing=False)
                return replace(snapshot, name=name)
        raise AssertionError("itertools.count ended")

    def list_trash(self) -> list[Trashed]:
        """Return the snapshots that were removed, in the order they were made; a damaged one is noted."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for file in sorted(os.listdir(self.trash)):
                name, _, removed = file[: -len(".json")].partition("~")
                if file.endswith(".json") and not file.startswith("."):
                    path = os.path.join(self.trash, file)
                    try:
                        moment = parse_time(removed)
                        with open(path, "rb") as data:
                            found.append(Trashed(decode_snapshot(data.read(), self.name, name), moment, path))
                    except (FormatError, OSError) as error:
                        note_once(self.problems, f"snapshot {self.name}/trash/{file} cannot be read: {error}")
        return sorted(found, key=lambda trashed: trashed.snapshot.sequence)

    def remove_snapshot(self, name: str, now: int) -> None:
        """Move a snapshot to the trash; where an earlier move was cut off, it is finished."""
        path = os.path.join(self.snapshots, f"{name}.json")
        there = os.listdir(self.trash) if os.path.isdir(self.trash) else []
        copies = [os.path.join(self.trash, file) for file in there if file.startswith(f"{name}~")]
        again = [copy for copy in copies if os.path.samefile(copy, path)]
        first = f"{name}~{name_time(now)}"
        free = itertools.chain([f"{first}.json"], (f"{first}-{number}.json" for number in itertools.count(2)))
        named = os.path.join(self.trash, next(file for file in free if file not in there))
        with writing(self.path):
            move_durably(path, again[0] if again else named)

    def undelete_snapshot(self, trashed: Trashed) -> None:
        """Bring a snapshot back from the trash."""
        to = os.path.join(self.snapshots, f"{trashed.snapshot.name}.json")
        with writing(self.path):
            try:
                move_durably(trashed.path, to)
            except FileExistsError:
                if self.load_snapshot(trashed.snapshot.name) != trashed.snapshot:
                    raise StoreError(f"{self.name} has another snapshot {trashed.snapshot.name}") from None
                remove_durably(trashed.path)  # an earlier move was interrupted

    def load_latest(self) -> LatestState:
        """Return what the folder `latest` shows; nothing where that is not known."""
        with contextlib.suppress(OSError, FormatError), open(os.path.join(self.path, "latest.json"), "rb") as file:
            return decode_latest(file.read())
        return LatestState()

    def save_latest(self, state: LatestState) -> None:
        """Keep what the folder `latest` shows."""
        write_durably(os.path.join(self.path, "latest.json"), encode_file(vars(state)))

    def load_progress(self) -> Progress:
        """Return what the last pull had when it was cut off; nothing where it was not."""
        try:
            with open(os.path.join(self.path, "progress.json"), "rb") as file:
                return decode_progress(file.read())
        except (FileNotFoundError, FormatError):
            return Progress()  # at worst something is sent again

    def save_progress(self, progress: Progress) -> None:
        """Keep what is durable of a pull so far."""
        with writing(self.path):
            write_durably(os.path.join(self.path, "progress.json"), encode_progress(progress))

    def drop_progress(self) -> None:
        """Forget the progress of a pull that has its snapshot."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, "progress.json"))


LOST_PACK, BAD_PACK = "lost", "damaged"  # what may be noted of a pack, until `repair` has dealt with it


class Store:
    """A folder of packs and snapshots, opened and locked against deletion."""

    def __init__(self, path: str, identity: str, lock: int, index: Index) -> None:
        self.path = path
        self.identity = identity
        self.packs = os.path.join(path, "packs")
        self.damage = os.path.join(path, "damage")
        self.aside = os.path.join(path, "aside")
        self.index = index
        self.problems: list[str] = []  # what is damaged, found while opening
        self._lock = lock
        self.lost = self._load_lost()
        self.load_index()

    def close(self) -> None:
        """Give up the lock."""
        self.index.close()
        os.close(self._lock)

    def load_index(self) -> dict[str, str]:
        """Make the index say what the packs say (I4); what is damaged is noted until `repair` has seen to it.

        Returns name and path of each pack.
        """
        known = self.index.list_packs()  # first: other processes add packs meanwhile
        packs = list_packs(self.packs)
        lost, new = sorted(known - packs.keys()), sorted(packs.keys() - known)
        for name in lost:
            self.note_damage(name, LOST_PACK)
        for folder in sorted({os.path.dirname(packs[name]) for name in new} | {self.packs}) if new else ():
            with contextlib.suppress(OSError):  # a disk that is only read
                sync_folder(folder)  # another run may have put it there just now: durable before it is known (I2)
        if new or lost or self.lost.digests:
            with self.index.together():
                for name in lost:
                    self.index.remove_pack(name)  # others may hold what it held
                for name in new:
                    self._add_pack(name, packs[name])
                self._find_loose_anew({name: packs[name] for name in packs if lost or name in new})
        for name, what in self.list_damage(packs).items():
            note_once(self.problems, f"pack {name} is {what}, and with it parts of snapshots; see `repair`")
        return packs

    def _add_pack(self, name: str, path: str) -> None:
        try:
            self.index.put_pack(name, read_pack_index(path))
        except FileNotFoundError:
            return  # listed in the moment in which another run replaced it
        except (FormatError, OSError) as error:
            if is_shortage(error):
                raise
            self.note_damage(name, BAD_PACK)

    def _find_loose_anew(self, packs: Mapping[str, str]) -> None:
        """Let patches be found if what they draw from is there: those of these packs, and those that were loose."""
        before = self.index.list_loose()
        paths = {name: os.path.join(self.packs, name[:2], f"{name}.pack") for name in before}
        for name, path in {**paths, **packs}.items():
            loose = find_loose(self.index, path)
            self.index.put_loose(name, loose, before.get(name, set()) - loose)

    def note_damage(self, pack: str, what: str) -> None:
        """Remember that a pack is lost or damaged, for all runs until `repair`."""
        note_once(self.problems, f"pack {pack} is {what}, and with it parts of snapshots; see `repair`")
        with contextlib.suppress(OSError):  # a store that is full, or cannot be written: told in this run
            make_folder(self.damage)
            write_durably(os.path.join(self.damage, f"{pack}.{what}"), b"")

    def list_damage(self, packs: Mapping[str, str]) -> dict[str, str]:
        """Return what is noted of packs; not of a lost one that is back, nor of a damaged one that is gone."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for file in sorted(os.listdir(self.damage)):
                name, _, what = file.partition(".")
                if (what == LOST_PACK and name not in packs) or (what == BAD_PACK and name in packs):
                    found[name] = what
        return found

    def forget_damage(self) -> None:
        """Drop all notes on packs: `repair` has dealt with them."""
        if os.path.isdir(self.damage):
            for file in os.listdir(self.damage):
                if file.endswith((f".{LOST_PACK}", f".{BAD_PACK}")):
                    self._forget(file)

    def _forget(self, file: str) -> None:
        path = os.path.join(self.damage, file)
        with writing(path):
            remove_durably(path)

    def note_sound(self, pack: str) -> None:
        """Drop the note on a pack that has been read without fault since."""
        if os.path.exists(os.path.join(self.damage, f"{pack}.{BAD_PACK}")):
            with contextlib.suppress(StoreError):  # a store that cannot be written
                self._forget(f"{pack}.{BAD_PACK}")

    def _load_lost(self) -> Lost:
        try:
            with open(os.path.join(self.damage, "lost.json"), "rb") as file:
                return decode_lost(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return Lost()
        except (FormatError, OSError) as error:
            note_once(self.problems, f"damage/lost.json cannot be read: {error}; see `repair`")
            return Lost()

    def save_lost(self, lost: Lost) -> None:
        """Keep what could not be healed; no file where that is nothing."""
        path = os.path.join(self.damage, "lost.json")
        with writing(path):
            if lost.digests or lost.snapshots:
                make_folder(self.damage)
                write_durably(path, encode_lost(lost))
            else:
                remove_durably(path)
        self.lost = lost

    def save_reserve(self, size: int) -> bool:
        """Keep `size` bytes for the day when the disk is full; False where there is no room for that."""
        path = os.path.join(self.path, "reserve")
        there = os.path.getsize(path) if os.path.exists(path) else 0
        if there == size:
            return True
        if there > size or count_free(self.path) < 4 * size:
            self.drop_reserve()
            return size == 0
        with contextlib.suppress(FullStore), writing(path):
            make_durably(path, lambda fd: allocate(fd, size))
            return True
        return False

    def drop_reserve(self) -> None:
        """Give the reserve back to the disk."""
        with writing(self.path):
            remove_durably(os.path.join(self.path, "reserve"))

    def reader(self) -> Reader:
        """Return a Reader for one thread."""
        return Reader(self.packs, self.index, self.lost.digests)

    def node(self, name: str) -> NodeFolder:
        """Return a node's folder, which need not exist."""
        return NodeFolder(self.path, name, self.problems)

    def list_nodes(self) -> list[Known]:
        """Return all nodes that have a folder, by name."""
        return [self.load_known(name) for name in sorted(os.listdir(self.path)) if self.is_node(name)]

    def is_node(self, name: str) -> bool:
        """Tell whether a name in the store is a node's folder."""
        if os.path.exists(os.path.join(self.path, name, "node.json")):
            return True
        node = self.node(name)  # its folders are empty while another run makes them
        return any(
            os.path.isdir(folder) and any(entry.endswith(".json") for entry in os.listdir(folder))
            for folder in (node.snapshots, node.trash)
        )

    def load_known(self, name: str) -> Known:
        """Return what is known of a node: its snapshots tell too, should its node.json be lost."""
        try:
            return self.node(name).load_known()
        except (FormatError, OSError) as error:
            reason = explain(error) if isinstance(error, OSError) else error
            note_once(self.problems, f"{name}/node.json cannot be read: {reason}")
        snapshots = self.node(name).list_snapshots()
        if not snapshots:
            return Known(name, "")
        first, last = snapshots[0], snapshots[-1]
        return Known(name, last.identity, last.host, (last.address,), first.started, last.started)


STORE_NAMES = ("packs", "keys", "lock", "README.txt", "reserve", "lost+found")  # what a store may have before it is one


def encode_identity(identity: str) -> bytes:
    """Return the zbackup.json of a store; it also tells whether README.txt is what it was."""
    proof = hashlib.sha256(STORE_README.encode("ascii")).hexdigest()
    return encode_file({"id": identity, "features": list(FEATURES), "readme": proof})


def is_store(path: str) -> bool:
    """Tell whether there is a store, damaged or not."""
    return os.path.exists(os.path.join(path, "zbackup.json"))


def make_store_folder(path: str) -> None:
    """Make the folder of a store, or take one that is empty: it is private then.

    Raises StoreError where it is another folder, with what is not a store's in it.
    """
    make_folder(path)
    names = os.listdir(path)
    strange = [n for n in names if n not in STORE_NAMES and not n.startswith(TEMPORARY)]
    if strange and "zbackup.json" not in names:  # another process may make it at this moment
        what = f"not a zbackup store, and not empty (it has {show(strange[0])})"
        raise StoreError(f"{path} is {what}; name another folder with --store")
    if "zbackup.json" not in names and os.stat(path).st_uid == os.geteuid():
        os.chmod(path, 0o700)


def _create_store(path: str) -> None:
    import secrets

    make_store_folder(path)
    make_folder(os.path.join(path, "packs"))
    write_durably(os.path.join(path, "README.txt"), STORE_README.encode("ascii"))
    # Last, since its presence makes the folder a store.
    with contextlib.suppress(FileExistsError):
        write_durably(os.path.join(path, "zbackup.json"), encode_identity(secrets.token_hex(16)), replacing=False)


def _load_identity(path: str) -> str:
    try:
        with open(os.path.join(path, "zbackup.json"), "rb") as file:
            fields = decode_file(file.read(), "zbackup.json")
        unknown = set(fields.texts("features")) - set(FEATURES)
        if unknown:
            raise StoreError(
                f"the store {path} needs what this zbackup does not know ({show(sorted(unknown)[0])}): use a newer one"
            )
        return fields.text("id")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is not a zbackup store: it has no zbackup.json; is its disk mounted?") from None
    except OtherFormat as error:
        raise StoreError(f"the store {path} cannot be read: {error}") from None
    except FormatError as error:
        raise StoreError(f"the store {path} is damaged: {error}; see `repair`") from None


LITTLE = 1 << 20  # bytes: SQLite may need as much to open an index


def open_index(path: str, alone: bool = False) -> Index:
    """Return the index of the store at `path`; one in memory where the store cannot be written, or is full.

    Who is alone in the store gives the room of the file back then.  Raises StoreError where the
    file cannot be opened for another reason.
    """
    import sqlite3

    try:
        return Index(os.path.join(path, INDEX_FILE))
    except (sqlite3.OperationalError, OSError) as error:
        if alone and count_free(path) <= LITTLE:
            remove_index(os.path.join(path, INDEX_FILE))
        elif os.access(path, os.W_OK) and count_free(path) > LITTLE:
            journal = os.path.join(path, f"{INDEX_FILE}-journal")
            if os.path.isdir(journal):
                raise StoreError(f"{show(journal)} is a folder, which SQLite takes for its own: rename it") from None
            raise StoreError(f"the index of the store {path} cannot be opened: {error}") from None
        return Index(":memory:")


def lock_store(path: str, alone: bool) -> int:
    """Return a descriptor that holds the lock of the store at `path`, shared unless `alone`."""
    try:
        return lock_file(os.path.join(path, "lock"), shared=not alone)
    except BlockingIOError:
        what = "in use by another run" if alone else "locked by another run that deletes"
        raise LockedStore(f"the store {path} is {what}; try again later, or with a longer --lock-wait") from None


def open_store(path: str, create: bool = False, alone: bool = False) -> Store:
    """Return the store at `path`; with `create`, one is made in a folder that is empty or absent.

    With `alone` nobody else has it open, as deleting demands; the disk may be full then, so the
    reserve is given back.  Raises StoreError when it is no store or of a newer format,
    LockedStore when others have it open who must not.
    """
    try:
        if create and not is_store(path):
            _create_store(path)
        identity = _load_identity(path)
        lock = lock_store(path, alone)
        try:
            if alone:
                remove_durably(os.path.join(path, "reserve"))
            return Store(path, identity, lock, open_index(path, alone))
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise refuse(error, f"{path} cannot be opened") from None


# ==== 8. KEEP: what may go, what is damaged, and what is done about it ====


class DigestTable(TemporaryTable):
    """A set of digests."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def put(self, digests: Iterable[bytes]) -> list[bytes]:
        """Add digests; returns those that were not there."""
        insert = "INSERT OR IGNORE INTO digests VALUES (?)"
        return [digest for digest in digests if self.execute(insert, (digest,)).rowcount]

    def find(self, digests: Sequence[bytes]) -> set[bytes]:
        """Return those of the digests that are there."""
        found: set[bytes] = set()
        for start in range(0, len(digests), 500):
            group = digests[start : start + 500]
            select = f"SELECT digest FROM digests WHERE digest IN ({','.join('?' * len(group))})"
            found.update(row[0] for row in self.execute(select, group))
        return found

    def list_all(self) -> Iterator[bytes]:
        """Yield all digests."""
        for row in self.execute("SELECT digest FROM digests"):
            yield row[0]


# ---- leftovers of dead processes ----


@dataclass(frozen=True)
class Leftovers:
    """Files that a dead process left and nothing names."""

    paths: tuple[str, ...]


def plan_leftovers(store: Store) -> Leftovers:
    """Return the unfinished packs and other files whose writers are gone."""
    folders = [store.path, store.packs, store.damage, store.aside, os.path.join(store.path, "keys")]
    for name in os.listdir(store.path):
        node = store.node(name)
        if os.path.isdir(node.snapshots):
            folders += [node.path, node.snapshots, node.trash]
    found = []
    for folder in filter(os.path.isdir, folders):
        if not os.access(folder, os.R_OK):
            continue  # it is another user's, which keeps nobody from pruning
        for entry in os.scandir(folder):
            if entry.name.startswith((INCOMING, TEMPORARY)) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.close(lock_file(entry.path, shared=False, create=False))
                    found.append(entry.path)
    return Leftovers(tuple(sorted(found)))


def execute_leftovers(plan: Leftovers) -> None:
    """Remove them, unless they came to life."""
    for path in plan.paths:
        with contextlib.suppress(OSError):
            fd = lock_file(path, shared=False, create=False)
            try:
                os.unlink(path)
            finally:
                os.close(fd)


# ---- retention: which snapshots stay ----

BUCKETS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-W%V", "monthly": "%Y-%m", "yearly": "%Y"}
PERIODS = ("last", *BUCKETS)
Rule = tuple[str, int]  # one of PERIODS, and how many of them


@dataclass(frozen=True)
class History:
    """All snapshots of one node, and what bears on which of them may go."""

    node: str
    snapshots: tuple[Snapshot, ...]  # in the order they were made
    trash: tuple[Trashed, ...] = ()
    unread: int = 0  # snapshots, in the trash or not, that cannot be read
    harmed: frozenset[str] = frozenset()  # snapshots that have lost content
    shown: frozenset[str] = frozenset()  # snapshots that `latest` needs
    released: int = 0  # sequence of the last one whose alarm is answered

    @property
    def alarm(self) -> Snapshot | None:
        """The last snapshot that looks as if data were lost, unless the user has answered that."""
        alarms = [snapshot for snapshot in self.snapshots if snapshot.alarm and snapshot.sequence > self.released]
        return alarms[-1] if alarms else None


def count_files(folder: str) -> int:
    """Return the number of JSON files in a folder, none where it is missing."""
    with contextlib.suppress(FileNotFoundError):
        return sum(name.endswith(".json") and not name.startswith(".") for name in os.listdir(folder))
    return 0


def load_history(store: Store, name: str) -> History:
    """Return all snapshots of a node."""
    folder = store.node(name)
    snapshots, trash = folder.list_snapshots(), folder.list_trash()
    released = 0
    with contextlib.suppress(OSError, FormatError):
        released = folder.load_known().released
    return History(
        node=name,
        snapshots=tuple(snapshots),
        trash=tuple(trash),
        unread=count_files(folder.snapshots) + count_files(folder.trash) - len(snapshots) - len(trash),
        harmed=frozenset(store.lost.snapshots.get(name, ())),
        shown=frozenset(folder.load_latest().snapshots if os.path.isdir(os.path.join(folder.path, "latest")) else ()),
        released=released,
    )


def name_bucket(period: str, snapshot: Snapshot) -> str:
    """Return the hour, day, week, month or year of local time that a snapshot belongs to."""
    import datetime

    if period == "last":
        return snapshot.name
    moment = datetime.datetime.fromtimestamp(snapshot.started // 10**9)
    fold = f" {moment.fold}" if period == "hourly" else ""  # the hour that comes twice when summer ends
    return moment.strftime(BUCKETS[period]) + fold


@dataclass(frozen=True)
class Choice:
    """Whether a snapshot stays, and why."""

    snapshot: Snapshot
    keep: bool
    reason: str


def choose_by_rule(newest: Sequence[Snapshot], counted: Set[str], rule: Rule) -> dict[str, str]:
    """Return which snapshots a rule keeps and why, by name; `newest` is sorted so.

    The newest of each bucket is kept, and only counted ones fill a rule's places; another one is
    kept beside them where its bucket has none that counts.  A rule with places left keeps the oldest.
    """
    period, most = rule
    good = {name_bucket(period, snapshot) for snapshot in newest if snapshot.name in counted}
    kept: dict[str, str] = {}
    filled: set[str] = set()
    for snapshot in newest:
        bucket = name_bucket(period, snapshot)
        if snapshot.name in counted and bucket not in filled:
            if len(filled) == most:
                return kept
            filled.add(bucket)
            kept[snapshot.name] = f"{period} {len(filled)}"
        elif period != "last" and len(filled) < most and bucket not in good:
            good.add(bucket)
            kept[snapshot.name] = f"{period}, no good one there"
    oldest = next((snapshot for snapshot in reversed(newest) if snapshot.name in counted), None)
    if oldest and len(filled) < most:
        kept.setdefault(oldest.name, f"{period}, the oldest")
    return kept


def _explain_removal(snapshot: Snapshot) -> str:
    return "no rule keeps it" if snapshot.good else f"{snapshot.grade}, and a good one is newer"


def plan_history(history: History, rules: Sequence[Rule]) -> list[Choice]:
    """Return what becomes of each snapshot of a node, in their order.

    Raises UsageError when the rules would keep none of the good ones.
    """
    newest = history.snapshots[::-1]
    counted = {snapshot.name for snapshot in newest if snapshot.good and snapshot.name not in history.harmed}
    reasons: dict[str, list[str]] = {}
    for rule in rules:
        for name, reason in choose_by_rule(newest, counted, rule).items():
            reasons.setdefault(name, []).append(reason)
    if rules and counted and not counted & reasons.keys():
        raise UsageError(f"--keep would remove all {len(newest)} snapshots of {history.node}; nothing is removed")
    last_good = next((snapshot.sequence for snapshot in newest if snapshot.name in counted), -1)
    alarm = history.alarm
    for snapshot in newest:
        why = reasons.setdefault(snapshot.name, [])
        if not rules:
            why.append("no --keep is given")
        if snapshot.sequence > last_good:
            why.append("newer than the last good one" if counted else "no good one yet")
        if alarm and snapshot.sequence <= alarm.sequence:
            why.append(f"held by the alarm of {alarm.name}, until `release {history.node}`")
        if snapshot.name in history.shown:
            why.append("shown by latest")
    return [
        Choice(snapshot, bool(reasons[snapshot.name]), ", ".join(reasons[snapshot.name]) or _explain_removal(snapshot))
        for snapshot in history.snapshots
    ]


# ---- space: mark what snapshots name, sweep the rest ----


@dataclass(frozen=True)
class PackUse:
    """How much of a pack is named by snapshots."""

    name: str
    path: str
    size: int  # bytes
    live: int  # bytes, estimated inside frames


@dataclass(frozen=True)
class PrunePlan:
    """What a prune does."""

    choices: Mapping[str, Sequence[Choice]]  # by node
    to_trash: bool = True  # false where nothing stays in the trash
    expired: tuple[Trashed, ...] = ()  # in the trash for longer than it may be
    dead: tuple[PackUse, ...] = ()  # named by nothing
    sparse: tuple[PackUse, ...] = ()  # to be rewritten
    leftovers: Leftovers = Leftovers(())
    problem: str = ""  # why nothing is done


@dataclass(frozen=True)
class PruneReport:
    """What a prune did."""

    removed: int = 0  # snapshots
    purged: int = 0  # snapshots, for good
    dropped: int = 0  # packs
    rewritten: int = 0  # packs
    freed: int = 0  # bytes
    problem: str = ""


class Mark:
    """The digests that snapshots, the trash and unfinished pulls name, directly or through patches."""

    def __init__(self, store: Store, reader: Reader) -> None:
        self.store = store
        self.reader = reader
        self.live = DigestTable()
        self._opened = DigestTable()  # blocks and lists that were looked into; a file may have the bytes of one

    def close(self) -> None:
        """Forget all."""
        self.live.close()
        self._opened.close()

    def put_blocks(self, blocks: Iterable[bytes]) -> None:
        """Mark blocks, and all that their entries name; StoreError where one cannot be read."""
        for block in self._opened.put(blocks):
            self.live.put([block])
            for entry in self._read(self._list_block, block):
                self.put_entry(entry)

    def put_entry(self, entry: Entry) -> None:
        """Mark what an entry names."""
        self.live.put(list_named(entry.read))
        if b'"lists"' in entry.read:
            for digest in self._opened.put(entry.content.lists):
                chunks = self._read(self._list_chunks, digest)
                self.live.put(chunk for chunk in chunks if isinstance(chunk, bytes))

    def _list_block(self, digest: bytes) -> Sequence[Entry]:
        return list(list_entries(self.reader, [digest]))

    def _list_chunks(self, digest: bytes) -> Sequence[bytes | int]:
        return load_chunk_list(self.reader, digest)

    def _read(self, read: Callable[[bytes], Sequence[Any]], digest: bytes) -> Sequence[Any]:
        """Return what `read` gives; nothing where `repair` has told that the digest is lost."""
        try:
            return read(digest)
        except (StoreError, FormatError):
            if digest in self.store.lost.digests and not self.reader.index.find([digest]):
                return ()  # it is lost, as `repair` has told; one that a sweep has brought back must be read
            raise

    def put_progress(self, name: str) -> None:
        """Mark what a pull that was cut off has already."""
        progress = self.store.node(name).load_progress()
        for block in progress.blocks:
            with contextlib.suppress(StoreError, FormatError):  # at worst it is sent again
                self.put_blocks([block])
        for line in (*progress.tail, *([progress.current.encode()] if progress.current else [])):
            with contextlib.suppress(FormatError, StoreError):
                self.put_entry(Entry.decode(line))

    def put_sources(self, packs: Mapping[str, str]) -> None:
        """Mark what the marked patches draw from; they draw from whole chunks only."""
        for path in packs.values():
            for digest, runs in list_patches(path):
                if self.live.find([digest]):
                    self.live.put(run.source for run in runs)

    def find_loose(self, path: str) -> set[bytes]:
        """Return the patches of a pack that are not marked, and draw from what is not: it may go."""
        loose = set()
        for digest, runs in list_patches(path):
            sources = list({run.source for run in runs})
            if not self.live.find([digest]) and len(self.live.find(sources)) < len(sources):
                loose.add(digest)
        return loose

    def find_owned(self, name: str, digests: Sequence[bytes]) -> set[bytes]:
        """Return which of a pack's digests must stay in it: those marked that no sound pack has before it."""
        live = sorted(self.live.find(digests))
        places = self.reader.index.find_all(live)
        return {digest for digest in live if self._owns(name, digest, places.get(digest, []))}

    def _owns(self, name: str, digest: bytes, places: Sequence[Place]) -> bool:
        if len(places) < 2:
            return not places or places[0].pack == name
        sound = self.reader.find_sound(digest)
        return sound is None or sound.pack == name

    def measure(self, name: str, path: str) -> PackUse:
        """Return how much of a pack is marked; all of one with patches whose other half is lost, and may be back."""
        live, size = 0.0, os.path.getsize(path)
        with open(path, "rb") as file:
            for offset, _, digests in read_footer(path):
                owned = self.find_owned(name, digests)
                if len(self.reader.index.find(list(owned))) < len(owned):
                    return PackUse(name, path, size, size)
                if owned:
                    record = load_record(file.fileno(), offset)
                    share = sum(length for digest, length in record.rows if digest in owned) / max(1, record.raw)
                    live += max(1.0, share * (record.data_offset + record.stored - offset))
        return PackUse(name, path, size, round(live))


def _mark_history(mark: Mark, history: History, kept: Iterable[Choice], expired: Sequence[Trashed]) -> None:
    for choice in kept:
        mark.put_blocks(choice.snapshot.blocks)
    for trashed in history.trash:
        if trashed not in expired:
            mark.put_blocks(trashed.snapshot.blocks)


def plan_prune(mark: Mark, rules: Sequence[Rule], when: tuple[int, int], max_repack: int) -> PrunePlan:
    """Return what a prune would do; `when` is now and the grace (ns), `max_repack` in bytes.

    Raises UsageError where the rules would keep nothing of a node.
    """
    now, grace = when
    store = mark.store
    histories = [load_history(store, node.folder) for node in store.list_nodes()]
    choices = {history.node: plan_history(history, rules) for history in histories}
    expired = [t for history in histories for t in history.trash if t.removed + grace <= now]
    plan = PrunePlan(choices, grace > 0, tuple(expired), leftovers=plan_leftovers(store))
    packs = list_packs(store.packs)
    damage = store.list_damage(packs)
    if damage or any(history.unread for history in histories):
        what = f"pack {min(damage)} is {damage[min(damage)]}" if damage else "a snapshot cannot be read"
        return replace(plan, problem=f"nothing is removed while the store is damaged ({what}); `repair` it first")
    try:
        for history in histories:
            _mark_history(mark, history, [c for c in choices[history.node] if c.keep or plan.to_trash], expired)
        for history in histories:  # last: what cannot be read there is passed over, and then taken for read
            mark.put_progress(history.node)
        mark.put_sources(packs)
        uses = [mark.measure(name, path) for name, path in sorted(packs.items())]
    except (StoreError, FormatError, OSError) as error:
        reason = explain(error) if isinstance(error, OSError) else error
        return replace(plan, problem=f"nothing is removed while the store is damaged ({reason}); `repair` it first")
    dead = [use for use in uses if not use.live]
    sparse = [use for use in uses if 0 < use.live < (1 - MOST_DEAD) * use.size]
    sparse.sort(key=lambda use: use.live / use.size)
    fitting: list[PackUse] = []
    for use in sparse:
        if sum(other.size for other in fitting) + use.size <= max_repack:
            fitting.append(use)
    return replace(plan, dead=tuple(dead), sparse=tuple(fitting))


def with_index(store: Store, change: Callable[[], None]) -> None:
    """Change the index; on a disk so full that it cannot be written, go on without its file."""
    try:
        change()
    except StoreError:
        store.index.reset(in_memory=True)
        store.load_index()
        change()


def retire_pack(store: Store, name: str, path: str, end: Callable[[str], None]) -> None:
    """Take a pack out of the store by `end`, after the index has forgotten it: else it would be missed."""
    digests = None  # where its footer is damaged, whatever the index has of it
    with contextlib.suppress(FormatError, OSError):
        digests = [digest for _, _, held in read_footer(path) for digest in held]
    with_index(store, lambda: store.index.remove_pack(name, digests))
    with writing(store.packs):
        end(path)


class Repacker:
    """Copies what is live of sparse packs into new ones, then removes the old (I6)."""

    def __init__(self, mark: Mark, pack_size: int = PACK_SIZE) -> None:
        self.mark = mark
        self.pack_size = pack_size
        store = mark.store
        self.writer = PackWriter(store.packs, store.index, ZSTD if load_zstd() else ZLIB, LEVEL)
        self.rewritten = 0  # packs
        self.freed = 0  # bytes
        self._waiting: list[PackUse] = []  # packs copied, but not durably

    def put(self, use: PackUse) -> None:
        """Copy one pack; StoreError where it is damaged, and then it stays."""
        with open(use.path, "rb") as file:
            for offset, kind, digests in read_footer(use.path):
                owned = self.mark.find_owned(use.name, digests)
                if owned:
                    self.writer.distrusted = owned  # the store has them, in the pack that goes
                    record = load_record(file.fileno(), offset)
                    (self._put_frame if kind == FRAME else self._put_patches)(file.fileno(), record, owned)
        self._waiting.append(use)
        if self.writer.size >= self.pack_size:
            self.finish()

    def _put_frame(self, fd: int, record: Record, owned: Set[bytes]) -> None:
        raw = memoryview(load_raw(fd, record))
        pieces = []
        for number, (digest, length) in enumerate(record.rows):
            data = raw[record.starts[number] : record.starts[number] + length]
            pages = hash_pages(data) if digest in owned else b""
            if digest in owned and digest_pages(pages) != digest:
                raise FormatError(f"chunk {digest.hex()} has other bytes than it had")
            pieces.append(Piece(digest, pages, data))
        if all(piece.pages for piece in pieces):
            stored = read_range(fd, record.stored, record.data_offset)
            self.writer.put_frame((record.codec, record.raw, stored), pieces)
        else:
            for piece in pieces:
                if piece.pages:
                    self.writer.put_chunk(bytes(piece.data))

    def _put_patches(self, fd: int, record: Record, owned: Set[bytes]) -> None:
        raw = load_raw(fd, record)
        for (digest, length), start in zip(record.rows, record.starts):
            if digest in owned:
                runs = decode_patch(raw[start : start + length])
                if not self.mark.reader.gives(digest, runs):
                    raise FormatError(f"the patch {digest.hex()} does not give the chunk it did")
                self.writer.put_patch(digest, runs)

    def finish(self) -> None:
        """Make the copies durable and known, then remove what was copied."""
        self.writer.seal()
        self.mark.reader.close()  # an open file keeps its room on the disk
        for use in self._waiting:
            if use.name not in self.writer.sealed:
                retire_pack(self.mark.store, use.name, use.path, remove_durably)
                self.freed += use.size
                self.rewritten += 1
        self._waiting = []


def forget_loose(mark: Mark) -> None:
    """Let patches no longer be found before what they draw from goes."""
    store = mark.store
    for name, path in list_packs(store.packs).items():
        with_index(store, functools.partial(store.index.put_loose, name, mark.find_loose(path)))


def execute_prune(mark: Mark, plan: PrunePlan, now: int, pack_size: int = PACK_SIZE) -> PruneReport:
    """Do what a plan says: snapshots first, then dead packs, then sparse ones; may be interrupted at any point.

    In a damaged store nothing is done: what is left in it may be the last.
    """
    store = mark.store
    execute_leftovers(plan.leftovers)
    if plan.problem:
        return PruneReport(problem=plan.problem)
    removed = [c.snapshot for choices in plan.choices.values() for c in choices if not c.keep]
    for snapshot in removed:
        folder = store.node(snapshot.folder)
        if plan.to_trash:
            folder.remove_snapshot(snapshot.name, now)
        else:
            with writing(folder.path):
                remove_durably(os.path.join(folder.snapshots, f"{snapshot.name}.json"))
    for trashed in plan.expired:
        with writing(trashed.path):
            remove_durably(trashed.path)
    freed = 0
    if plan.dead or plan.sparse:
        forget_loose(mark)
    mark.reader.close()  # an open file keeps its room on the disk
    for use in plan.dead:
        retire_pack(store, use.name, use.path, remove_durably)
        freed += use.size
    report = PruneReport(len(removed), len(plan.expired), len(plan.dead), 0, freed)
    repacker = Repacker(mark, pack_size)
    problem = ""
    try:
        for use in plan.sparse:
            try:
                repacker.put(use)
                if count_free(store.path) < 2 * pack_size:
                    repacker.finish()  # one at a time: each gives back what the next one needs
            except CodecError as error:
                problem = f"pack {use.name} is {error}"
            except (FormatError, OSError) as error:
                if is_shortage(error):
                    raise
                store.note_damage(use.name, BAD_PACK)
                problem = f"pack {use.name} is damaged: {error}; see `repair`"
        repacker.finish()
    except FullStore as error:
        problem = f"not all packs could be rewritten: {error}"
    finally:
        repacker.writer.abandon()
    freed += repacker.freed - repacker.writer.added * bool(repacker.rewritten)
    return replace(report, rewritten=repacker.rewritten, freed=freed, problem=problem)


def undelete_snapshots(folder: NodeFolder, names: Sequence[str]) -> list[str]:
    """Bring removed snapshots back, all where none are named; returns their names.

    Raises UsageError for a name that the trash does not have.
    """
    trash = folder.list_trash()
    wanted = [trashed for trashed in trash if not names or trashed.snapshot.name in names]
    unknown = sorted(set(names) - {trashed.snapshot.name for trashed in wanted})
    if unknown:
        there = ", ".join(trashed.snapshot.name for trashed in trash) or "nothing"
        raise UsageError(f"the trash of {folder.name} has no {show(unknown[0])}; it has {there}")
    for trashed in wanted:
        folder.undelete_snapshot(trashed)
    return [trashed.snapshot.name for trashed in wanted]


def release_node(store: Store, name: str) -> Snapshot | None:
    """Answer the alarm of a node: its older snapshots may go again; returns the one with the alarm, if any."""
    folder = store.node(name)
    with folder.locked():  # a copy under way writes what is known of the node, too
        alarm = load_history(store, name).alarm
        if alarm:
            folder.save_known(replace(store.load_known(name), released=alarm.sequence))
        return alarm


# ---- verify: read what is there, and say which files and versions suffer from what is not ----


@dataclass(frozen=True)
class PackCheck:
    """What was found in one pack."""

    name: str
    size: int = 0
    problem: str = ""  # why it is not as it was
    bad: tuple[bytes, ...] = ()  # digests that it should give, and does not


def find_record(fd: int, at: int, end: int) -> int:
    """Return the offset of the next bytes that may start a record, `end` where there are none."""
    while at < end:
        data = read_range(fd, CHUNK, at)
        found = data.find(RECORD_MAGIC)
        if found >= 0:
            return at + found
        if len(data) < CHUNK:
            break
        at += CHUNK - len(RECORD_MAGIC) + 1
    return end


def scan_records(fd: int, size: int) -> Iterator[Record]:
    """Yield the records of a pack that are well formed, whatever stands between them."""
    at = find_record(fd, 0, size)
    while at < size:
        try:
            record = load_record(fd, at)
        except FormatError:
            at = find_record(fd, at + 1, size)
            continue
        yield record
        end = record.data_offset + record.stored
        # Where no record follows, its lengths may be what is damaged.
        at = end if read_range(fd, len(RECORD_MAGIC), end) == RECORD_MAGIC else find_record(fd, at + 1, size)


def split_record(fd: int, record: Record) -> list[bytes]:
    """Return the bytes of each row of a record; none where they do not decompress.

    Raises CodecError where this Python cannot tell.
    """
    try:
        raw = load_raw(fd, record)
    except CodecError:
        raise
    except FormatError:
        return []
    return [raw[start:end] for start, end in zip(record.starts, record.starts[1:])]


def list_sound(fd: int, record: Record) -> Iterator[tuple[int, bytes, tuple[Run, ...]]]:
    """Yield place and digest of what is whole in a record: chunks that their bytes prove, patches with their runs."""
    for number, data in enumerate(split_record(fd, record)):
        digest = record.rows[number][0]
        if record.kind == FRAME:
            pages = hash_pages(data)
            if digest_pages(pages) == digest and pages == record.pages(number):
                yield number, digest, ()
        else:
            with contextlib.suppress(FormatError):
                yield number, digest, decode_patch(data)


def _read_pack(reader: Reader, path: str) -> tuple[str, int, set[tuple[bytes, int, int]], list[bytes]]:
    """Return a pack's digest, size, rows that are whole, as its index has them, and patches that give nothing."""
    with open(path, "rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        proof = hashlib.sha256()
        for data in iter(functools.partial(file.read, CHUNK), b""):
            proof.update(data)
        whole: set[tuple[bytes, int, int]] = set()
        broken = []
        for record in scan_records(fd, size):
            for place, digest, runs in list_sound(fd, record):
                whole.add((digest, record.offset, place))
                if record.kind == PATCHES and not reader.gives(digest, runs):
                    broken.append(digest)
    return proof.hexdigest(), size, whole, broken


def verify_pack(reader: Reader, name: str, path: str) -> PackCheck:
    """Read a whole pack: its bytes against its name, its chunks against their digests.

    A patch that draws from what is damaged elsewhere is bad, and no problem of its own pack.
    Raises CodecMissing where this Python cannot read it.
    """
    try:
        proof, size, whole, broken = _read_pack(reader, path)
    except CodecError as error:
        raise CodecMissing(f"pack {name} is {error}") from None
    except OSError as error:
        if is_shortage(error):
            raise
        return PackCheck(
            name, 0, f"cannot be read: {explain(error)}", tuple(d for d, *_ in reader.index.list_rows(name))
        )
    try:
        held = read_pack_index(path)
        problem = "" if proof == name else "its bytes are not those that it was named after"
    except FormatError as error:
        held, problem = reader.index.list_rows(name), str(error)
    bad = [row[0] for row in held if row not in whole]
    if bad and not problem:
        problem = "it holds what it should not"
    return PackCheck(name, size, problem, (*bad, *broken))


class Harm(TemporaryTable):
    """Which files of which snapshots have lost content, found block by block."""

    def __init__(self, store: Store, reader: Reader) -> None:
        super().__init__(
            "CREATE TABLE blocks (digest BLOB PRIMARY KEY, grade TEXT) WITHOUT ROWID",
            "CREATE TABLE paths (block BLOB, path BLOB)",
            "CREATE INDEX paths_of ON paths (block)",
            "CREATE TABLE files (node TEXT, path BLOB, snapshot TEXT, PRIMARY KEY (node, path, snapshot))",
        )
        self.store = store
        self.reader = reader
        self.lost = DigestTable()  # digests that no pack gives
        self.named = DigestTable()  # those of them that a snapshot names: others are no loss
        self.new = False  # whether some of it is not what `repair` has told of
        self.problems: list[str] = []

    def close(self) -> None:
        """Forget all."""
        self.lost.close()
        self.named.close()
        super().close()

    def put_lost(self, digests: Iterable[bytes]) -> None:
        """Note those of the digests that no pack gives."""
        for digest in digests:
            try:
                self.lost.put(() if self.reader.has(digest) else (digest,))
            except CodecMissing as error:
                note_once(self.problems, str(error))

    def put_patches(self, path: str) -> None:
        """Note the patches of a pack that draw from what is lost."""
        with contextlib.suppress(FormatError, OSError):  # noted as the pack's own damage
            for digest, runs in list_patches(path):
                sources = sorted({run.source for run in runs})
                if self._find_missing(sources):
                    self.put_lost([digest])

    def _find_missing(self, digests: Sequence[bytes]) -> set[bytes]:
        return (set(digests) - self.reader.index.find(digests).keys()) | self.lost.find(digests)

    def put_snapshot(self, snapshot: Snapshot, name: str) -> None:
        """Look through a snapshot, called `name` in reports, for what is lost."""
        grades = []
        for block in snapshot.blocks:
            found = self.execute("SELECT grade FROM blocks WHERE digest = ?", (block,)).fetchone()
            grades.append(found[0] if found else self._put_block(block))
            insert = "INSERT OR IGNORE INTO files SELECT ?, path, ? FROM paths WHERE block = ?"
            self.execute(insert, (snapshot.folder, name, block))
        worst = worst_grade(grades)
        if SNAPSHOT_GRADES.index(worst) < SNAPSHOT_GRADES.index(snapshot.grade):
            self.problems.append(f"snapshot {snapshot.folder}/{name} calls itself {snapshot.grade}, and is {worst}")

    def _put_block(self, block: bytes) -> str:
        """Look through one block; returns the worst grade of its entries."""
        grades: list[str] = []
        try:
            entries = list(list_entries(self.reader, [block]))
        except CodecMissing as error:
            note_once(self.problems, str(error))
            entries = []
        except (StoreError, FormatError):
            self._note([block])
            self.execute("INSERT INTO paths VALUES (?, ?)", (block, b""))
            entries = []
        for entry in entries:
            failed = (b'"error"' in entry.line and entry.stat.error) or (
                b'"error"' in entry.read and entry.content.error
            )
            grade = GRADE_TOLD.search(entry.read)
            grades.append("partial" if failed else grade[1].decode() if grade else "")
            missing = self._find_missing(list_named(entry.read))
            if b'"lists"' in entry.read:
                missing |= self._find_missing_of_lists(entry)
            if missing:
                self._note(missing)
                self.execute("INSERT INTO paths VALUES (?, ?)", (block, entry.stat.path))
        worst = worst_grade(grades)
        self.execute("INSERT INTO blocks VALUES (?, ?)", (block, worst))
        return worst

    def _find_missing_of_lists(self, entry: Entry) -> set[bytes]:
        missing: set[bytes] = set()
        for digest in entry.content.lists:
            try:
                chunks = load_chunk_list(self.reader, digest)
                missing |= self._find_missing([chunk for chunk in chunks if isinstance(chunk, bytes)])
            except CodecMissing as error:
                note_once(self.problems, str(error))
            except (StoreError, FormatError):
                missing.add(digest)
        return missing

    def _note(self, missing: Iterable[bytes]) -> None:
        found = list(missing)
        self.lost.put(found)
        self.named.put(found)
        self.new |= any(digest not in self.store.lost.digests for digest in found)

    def list_files(self) -> Iterator[tuple[str, bytes, list[str]]]:
        """Yield node, path (b"" for all of an unreadable block) and snapshots of each harmed file."""
        rows = self.execute("SELECT node, path, snapshot FROM files ORDER BY node, path, snapshot")
        for (node, path), group in itertools.groupby(rows, key=lambda row: (row[0], row[1])):
            yield node, path, [row[2] for row in group]

    def list_snapshots(self) -> dict[str, tuple[str, ...]]:
        """Return the harmed snapshots by node."""
        found: dict[str, tuple[str, ...]] = {}
        for node, name in self.execute("SELECT DISTINCT node, snapshot FROM files ORDER BY node, snapshot"):
            found[node] = (*found.get(node, ()), name)
        return found


@dataclass(frozen=True)
class VerifyOptions:
    """How much `verify` reads."""

    share: float = 1.0  # of the bytes of all packs
    now: int = 0  # ns
    more: Callable[[], bool] = lambda: True  # whether there is time for another pack
    tick: Callable[[int, int], None] = lambda done, total: None  # bytes read, and to be read


@dataclass(frozen=True)
class VerifyReport:
    """What was found in a store."""

    packs: int  # that it has
    checked: int  # that were read
    size: int  # bytes of these
    index: str  # "" where it said what the packs say, else why it was made anew
    damaged: tuple[PackCheck, ...] = ()
    lost: tuple[str, ...] = ()  # packs that are gone
    files: tuple[tuple[str, str], ...] = ()  # other files of the store, and what is wrong with each
    problems: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Tell whether there is no damage, beside what `repair` has told of."""
        return not (self.damaged or self.lost or self.files or self.problems)


VERIFIED, DRILLED = "verified.json", "drill.json"  # when each pack was read last; when each node's drill succeeded


def load_times(store: Store, file: str) -> dict[str, int]:
    """Return the moments (ns) in a file of the store; none where it cannot be read."""
    with contextlib.suppress(OSError, FormatError), open(os.path.join(store.path, file), "rb") as found:
        times = Fields.inside(decode_file(found.read(), file).values.get("times"), f"{file}: times")
        return {name: times.integer(name) for name in times.values}
    return {}


def save_times(store: Store, file: str, times: Mapping[str, int]) -> None:
    """Keep moments (ns) in a file of the store."""
    with writing(store.path):
        write_durably(os.path.join(store.path, file), encode_file({"times": dict(times)}))


def plan_checks(packs: Mapping[str, str], times: Mapping[str, int], share: float) -> list[tuple[str, int]]:
    """Return name and size of the packs to read: the least recently read first, up to a share of all bytes."""
    sizes = {}
    for name, path in packs.items():
        with contextlib.suppress(FileNotFoundError):
            sizes[name] = os.path.getsize(path)
    order = sorted(sizes, key=lambda name: (times.get(name, 0), name))
    before = itertools.accumulate((sizes[name] for name in order), initial=0)
    most = share * sum(sizes.values())
    return [(name, sizes[name]) for name, done in zip(order, before) if done < most or share >= 1]


def verify_index(store: Store, packs: Mapping[str, str]) -> str:
    """Compare the index with the packs, and make it anew where it differs; returns why, or ""."""
    try:
        store.load_index()  # another process may have sealed one of them just now
        counts = store.index.count_rows()
        for name, path in packs.items():
            with contextlib.suppress(FormatError, OSError):  # told when the pack is read
                rows = list({row[0]: row for row in reversed(read_pack_index(path))}.values())
                if counts.get(name, len(rows)) != len(rows) or not store.index.has_rows(name, rows):
                    raise StoreError(f"it did not say what pack {name} holds")
        if counts.keys() - list_packs(store.packs).keys():  # anew: other processes add packs meanwhile
            raise StoreError("it named packs that are not there")
        store.index.check()
    except StoreError as error:
        store.index.reset()
        store.load_index()
        return str(error)
    return ""


def verify_packs(store: Store, harm: Harm, options: VerifyOptions) -> tuple[list[PackCheck], int, int]:
    """Read packs; returns those that do not give all they hold, and how many and how many bytes were read."""
    # All that is read must be known: a patch draws from chunks of its own pack, which may be sealed just now.
    packs, times = store.load_index(), load_times(store, VERIFIED)
    past = {name: moment for name, moment in times.items() if moment <= options.now}  # else a clock was wrong
    checks = plan_checks(packs, past, options.share)
    total, done, count = sum(size for _, size in checks), 0, 0
    bad: list[PackCheck] = []
    try:
        for name, size in checks:
            if count and not options.more():
                break
            try:
                check = verify_pack(harm.reader, name, packs[name])
            except CodecMissing as error:  # not damaged, and not read
                note_once(harm.problems, str(error))
                continue
            bad.append(check)
            (store.note_damage(name, BAD_PACK) if check.problem else store.note_sound(name))
            times[name] = options.now
            done, count = done + size, count + 1
            options.tick(done, total)
    finally:
        with contextlib.suppress(StoreError):  # a store that cannot be written is read all the same
            save_times(store, VERIFIED, {name: moment for name, moment in times.items() if name in packs})
    return [check for check in bad if check.problem or check.bad], count, done


def _verify_file(path: str, decode: Callable[[bytes], object]) -> str:
    try:
        with open(path, "rb") as file:
            decode(file.read())
    except FileNotFoundError:
        return "is gone" if os.path.basename(path) in ("README.txt", "node.json") else ""
    except (FormatError, OSError) as error:
        return explain(error) if isinstance(error, OSError) else str(error)
    return ""


def _decode_readme(store: Store) -> Callable[[bytes], object]:
    def decode(data: bytes) -> None:
        with open(os.path.join(store.path, "zbackup.json"), "rb") as file:
            proof = decode_file(file.read(), "zbackup.json").text("readme")
        if hashlib.sha256(data).hexdigest() != proof:
            raise FormatError("README.txt is not what it was")

    return decode


def _verify_reserve(path: str) -> str:
    try:
        with open(path, "rb") as file:
            zeros = all(data.count(0) == len(data) for data in iter(functools.partial(file.read, CHUNK), b""))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return explain(error)
    return "" if zeros else "the reserve has bytes that are not zero"


def _decode_any(name: str) -> Callable[[bytes], object]:
    return lambda data: decode_file(data, name)


def verify_files(store: Store) -> list[tuple[str, str]]:
    """Return path and problem of each file beside the packs and the index that is not what it was."""
    decoders = {"README.txt": _decode_readme(store), "damage/lost.json": decode_lost, "keys/server": decode_secret}
    decoders.update({name: _decode_any(name) for name in (VERIFIED, DRILLED)})
    paths = {os.path.join(store.path, name): decode for name, decode in decoders.items()}
    for name in sorted(os.listdir(store.path)):
        folder = store.node(name)
        if store.is_node(name):
            for file in ("node.json", "progress.json", "latest.json"):
                paths[os.path.join(folder.path, file)] = _decode_any(f"{name}/{file}")
            for place in filter(os.path.isdir, (folder.snapshots, folder.trash)):
                for file in sorted(os.listdir(place)):
                    if file.endswith(".json") and not file.startswith("."):
                        decode = functools.partial(decode_snapshot, folder=name, name=file[: -len(".json")])
                        paths[os.path.join(place, file)] = decode
    reserve = os.path.join(store.path, "reserve")
    found = [(reserve, _verify_reserve(reserve)), *((path, _verify_file(path, do)) for path, do in paths.items())]
    return [(path, problem) for path, problem in found if problem]


def verify_snapshots(store: Store, harm: Harm) -> None:
    """Look through all snapshots for what is lost."""
    for pack in store.load_index().values():
        harm.put_patches(pack)
    for node in store.list_nodes():
        folder = store.node(node.folder)
        snapshots = folder.list_snapshots()
        store.load_index()  # a run beside us may have put the packs of the last ones into an older index
        for snapshot in snapshots:
            harm.put_snapshot(snapshot, snapshot.name)
        for trashed in folder.list_trash():
            harm.put_snapshot(trashed.snapshot, f"{trashed.snapshot.name} (in the trash)")


def verify_store(store: Store, harm: Harm, options: VerifyOptions) -> VerifyReport:
    """Check index, packs, patches, snapshots, grades and all other files; damage is remembered until `repair`."""
    packs = list_packs(store.packs)
    index = verify_index(store, packs)
    files = verify_files(store)
    bad, checked, size = verify_packs(store, harm, options)
    for check in bad:
        harm.put_lost(check.bad)
    damaged = [check for check in bad if check.problem]
    verify_snapshots(store, harm)
    still = store.lost.digests & harm.named.find(sorted(store.lost.digests))
    if still != store.lost.digests and not harm.new:  # healed, or no longer in any snapshot
        with contextlib.suppress(StoreError):
            store.save_lost(Lost(still, harm.list_snapshots()))
    noted = store.list_damage(list_packs(store.packs))
    lost = [name for name, what in noted.items() if what == LOST_PACK]
    known = {check.name for check in damaged}
    earlier = [PackCheck(n, 0, "found earlier") for n, what in noted.items() if what == BAD_PACK and n not in known]
    return VerifyReport(
        max(len(packs), checked),
        checked,
        size,
        index,
        (*damaged, *earlier),
        tuple(lost),
        tuple(files),
        tuple(harm.problems),
    )


# ---- repair: what is damaged goes aside, what can be saved is saved, the rest is marked ----


@dataclass(frozen=True)
class RepairPlan:
    """What a repair does."""

    packs: tuple[PackCheck, ...]  # to be saved as far as they can be, and put aside
    lost: tuple[str, ...]  # packs that are gone, to be remembered no longer
    files: tuple[tuple[str, str], ...]  # to be made anew or put aside, and why


@dataclass(frozen=True)
class RepairReport:
    """What a repair did."""

    packs: int = 0  # put aside
    saved: int = 0  # bytes of these packs that could be saved
    aside: tuple[str, ...] = ()  # paths of what was put aside
    lost: int = 0  # digests that no pack gives


def plan_repair(report: VerifyReport) -> RepairPlan:
    """Return what is to be done about what was found."""
    return RepairPlan(report.damaged, report.lost, report.files)


def keep_aside(store: Store, path: str) -> str:
    """Keep a damaged file out of the way as well; returns where."""
    name = os.path.relpath(path, store.path).replace(os.sep, "-")
    for number in itertools.count(1):
        to = os.path.join(store.aside, name if number == 1 else f"{name}.{number}")
        with writing(path), contextlib.suppress(FileExistsError):
            keep_durably(path, to)
            return to
    raise AssertionError("itertools.count ended")


def put_aside(store: Store, path: str) -> str:
    """Move a damaged file out of the way; returns where it is now."""
    to = keep_aside(store, path)
    with writing(path):
        remove_durably(path)
    return to


def save_sound(harm: Harm, writer: PackWriter, path: str, kind: int) -> None:
    """Put what a damaged pack still gives, and nobody else does, into a new pack."""
    reader = harm.reader
    try:
        with open(path, "rb") as file:
            for record in scan_records(file.fileno(), os.fstat(file.fileno()).st_size):
                for (digest, _), data in zip(record.rows, split_record(file.fileno(), record)):
                    if record.kind == FRAME == kind:
                        found = digest_pages(hash_pages(data))  # a chunk's bytes are its name, whatever its row says
                        if found == digest or harm.lost.find([found]):
                            writer.put_chunk(data)
                    elif record.kind == PATCHES == kind:
                        with contextlib.suppress(FormatError):
                            if reader.gives(digest, decode_patch(data)):
                                writer.put_patch(digest, decode_patch(data))
    except OSError:
        return  # nothing more can be read of it


def save_patched(harm: Harm, writer: PackWriter, bad: Set[bytes]) -> None:
    """Put the chunks whole that patches make of the sound bytes of damaged ones: these go."""
    for path in list_packs(harm.store.packs).values() if bad else ():
        with contextlib.suppress(FormatError, OSError):
            for digest, runs in list_patches(path):
                if any(run.source in bad for run in runs):
                    with contextlib.suppress(StoreError):
                        data = harm.reader.get(digest)
                        writer.distrusted = {digest}
                        writer.put_chunk(data)
    writer.distrusted = set()


def repair_packs(store: Store, harm: Harm, checks: Sequence[PackCheck]) -> tuple[int, list[str]]:
    """Save what damaged packs still give, then put them aside; returns bytes saved and where the packs are."""
    packs = list_packs(store.packs)
    paths = {check.name: packs[check.name] for check in checks if check.name in packs}
    writer = PackWriter(store.packs, store.index, ZSTD if load_zstd() else ZLIB, LEVEL)
    aside = [keep_aside(store, path) for path in paths.values()]
    save_patched(harm, writer, {digest for check in checks for digest in check.bad})
    for name in paths:
        store.index.remove_pack(name)  # so that what it holds counts as missing; it is back, should this be cut off
    reader = harm.reader
    reader.open_pack = writer
    try:
        for kind in (FRAME, PATCHES):  # patches draw from chunks of any pack
            for path in paths.values():
                save_sound(harm, writer, path, kind)
                if writer.size >= PACK_SIZE:
                    writer.seal()
        writer.seal()
    finally:
        reader.open_pack = None
        reader.close()  # a pack that was open may have been replaced
        writer.abandon()
    for name, path in paths.items():
        if name not in writer.sealed:  # else all of it was sound but for its ends, and is as it was
            put_aside(store, path)
    return writer.added, aside


HEX_BLOCKS = re.compile(rb'"blocks": \[([^\]]*)')


def salvage_snapshot(reader: Reader, folder: NodeFolder, path: str) -> Snapshot | None:
    """Return what a damaged snapshot still tells, as a partial one; None where it names no block that is there."""
    name = os.path.basename(path)[: -len(".json")]
    with contextlib.suppress(FormatError):
        name = name_time(parse_time(name))  # without the -2 of an earlier repair
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:  # that may pass: put aside, it would no longer keep what it names
        raise StoreError(f"{show(path)} cannot be read: {explain(error)}") from None
    listed = HEX_BLOCKS.search(data)
    blocks = [bytes.fromhex(text.decode()) for text in HEX_DIGEST.findall(listed[1] if listed else data)]
    there = reader.index.find(blocks)
    blocks = [block for block in blocks if block in there]
    if not blocks:
        return None
    earlier = [snapshot.sequence for snapshot in folder.list_snapshots() if snapshot.name < name]
    started = 0
    with contextlib.suppress(FormatError):
        started = parse_time(name)
    problem = Problem("", "repaired: the file of this snapshot was damaged, and what it still told is here")
    return Snapshot(
        name,
        folder.name,
        max(earlier, default=0),
        started,
        started,
        "partial",
        blocks=tuple(blocks),
        problems=(problem,),
    )


def repair_file(store: Store, reader: Reader, path: str) -> list[str]:
    """Make a damaged file anew where that can be, put it aside where it may hold more; returns where it is."""
    name = os.path.basename(path)
    above = os.path.dirname(path)
    if name in ("README.txt", "reserve"):
        with writing(path):
            remove_durably(path)
            if name == "README.txt":
                write_durably(path, STORE_README.encode("ascii"))
                write_durably(os.path.join(store.path, "zbackup.json"), encode_identity(store.identity))
        return []
    if os.path.basename(above) == "snapshots":
        folder = store.node(os.path.basename(os.path.dirname(above)))
        saved = salvage_snapshot(reader, folder, path)
        there = [(snapshot.started, snapshot.blocks) for snapshot in folder.list_snapshots()]
        if saved and (saved.started, saved.blocks) not in there:  # from a repair that was cut off
            folder.save_snapshot(saved)
    aside = [put_aside(store, path)] if os.path.exists(path) else []
    if name == "node.json":
        known = store.load_known(os.path.basename(above))
        if known.identity:
            store.node(known.folder).save_known(known)
    return aside


def execute_repair(store: Store, harm: Harm, plan: RepairPlan) -> RepairReport:
    """Do what a plan says.  May be interrupted and run again; deletes nothing that may hold data."""
    saved, aside = repair_packs(store, harm, plan.packs)
    for path, _ in plan.files:
        aside += repair_file(store, harm.reader, path)
    store.load_index()
    # What is lost is looked for again: much of it has been saved.
    with contextlib.closing(store.reader()) as reader, contextlib.closing(Harm(store, reader)) as left:
        left.put_lost(harm.lost.list_all())
        verify_snapshots(store, left)
        digests = frozenset(left.named.list_all())
        store.save_lost(Lost(digests, left.list_snapshots()))
    store.forget_damage()
    return RepairReport(len(plan.packs), saved, tuple(aside), len(digests))


def repair_identity(path: str) -> bool:
    """Make the zbackup.json of a store anew where it is missing or damaged; tells whether that was so.

    Raises StoreError where there is no store, or one of another format.
    """
    import secrets

    file = os.path.join(path, "zbackup.json")
    if not os.path.isdir(os.path.join(path, "packs")):
        raise StoreError(f"{path} is not a zbackup store: it has neither zbackup.json nor packs")
    try:
        with open(file, "rb") as found:
            data = found.read()
    except OSError as error:
        lost = (errno.ENOENT, errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
        if error.errno not in lost:  # what the disk has not lost must not be made anew
            raise StoreError(f"{file} cannot be read: {explain(error)}") from None
        data = b""
    told = re.search(rb'"id": "([0-9a-f]{32})"', data)  # by it nodes know the server again
    identity = told[1].decode("ascii") if told else secrets.token_hex(16)
    if data[-SEAL_SIZE:] == seal(data[:-SEAL_SIZE]):
        return False  # as it was written, if perhaps by a newer zbackup
    lock = lock_store(path, alone=True)
    try:
        with writing(file):
            if os.path.lexists(file):
                move_durably(file, os.path.join(path, "aside", f"zbackup.json.{secrets.token_hex(4)}"))
            write_durably(file, encode_identity(identity))
    finally:
        os.close(lock)
    return True


# ==== 9. NODE: scan, freeze, read, answer ====

DATABASE_MAGIC = b"SQLite format 3\0"
DATABASE_HEAD = 100  # bytes of the header, https://www.sqlite.org/fileformat.html#the_database_header
COMPANIONS = (b"-wal", b"-shm", b"-journal")  # of a database; its frozen copy holds what they held
LOG_HEADS = {b"wal": b"\x37\x7f\x06", b"journal": bytes.fromhex("d9d505f920a163d7")}  # the same page, sections 3 and 4
ZEROS = bytes(CHUNK)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)  # of what was deleted, moved or replaced
MAPPED = 60.0  # s; a younger file may have pages that a shared map has written and the disk has not
GRAIN = 0.02  # s; file times are set in steps: of 4 ms (or 10) by kernels before 6.13
COARSE_GRAIN = 2.0  # s; the same of filesystems whose times are whole seconds: ext3, FAT
SETTLINGS = 4  # waits for a moment in which a file is not written, each of one grain
PATIENCE = 6  # tries, each after twice the pause of the last: more than --handshake-timeout in all
KIND_OF = {bits: kind for kind, bits in KIND_BITS.items()}
NEARLY = 4  # of a chunk, a fourth of the pages: with no more changed it is nearly what it was


@dataclass(frozen=True)
class Root:
    """One thing that a node was told to serve."""

    stored: bytes  # its path in snapshots: as given, without a leading slash
    real: bytes  # absolute
    inner: tuple[bytes, ...] = ()  # what was named inside it, too: neither --exclude nor --one-file-system hides it
    behind: tuple[bytes, ...] = ()  # absolute, what was named so behind a symlink: only the link is copied


def name_root(pattern: str, real: str, base: str) -> bytes:
    """Return the path under which a root is stored: relative where it was given so."""
    if not os.path.isabs(os.path.expanduser(pattern)):
        relative = os.path.relpath(real, base)
        if relative not in (".", "..") and not relative.startswith("../"):
            return os.fsencode(relative)
    return os.fsencode(os.path.abspath(real)).strip(b"/")


def find_absolute(path: str) -> str:
    """Return the absolute path of what a path leads to: `..` behind a symlink is not the folder that holds the link."""
    if ".." not in path.split(os.sep):
        return os.path.abspath(path)
    above, name = os.path.split(path)
    return os.path.realpath(path) if name in ("", ".", "..") else os.path.join(os.path.realpath(above), name)


def leads_inside(root: Root, other: Root) -> bool:
    """Tell whether a scan of a root comes to another one whose name lies in its own: no symlink is followed there."""
    beyond = os.path.dirname(other.real)[len(root.real.rstrip(b"/")) :].strip(b"/")
    real = os.path.join(os.path.realpath(root.real), beyond).rstrip(b"/")
    return not os.path.islink(root.real) and os.path.realpath(real or b"/") == (real or b"/")


def list_roots(files: Sequence[str], base: str) -> tuple[list[Root], list[str]]:
    """Return the roots that exist now, sorted, none inside another; and what matched nothing.

    `base` is the folder that relative names start from.  Raises UsageError when two different
    files would get one name.
    """
    import glob

    roots: dict[bytes, Root] = {}
    literal: set[bytes] = set()  # what was named itself, and is not one of many that match
    missing = []
    for pattern in files:
        if not pattern:
            raise UsageError("--file without a name serves nothing")
        path = os.path.join(base, os.path.expanduser(pattern))
        found = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            missing.append(pattern)
        for real in found:
            root = Root(name_root(pattern, real, base), os.fsencode(find_absolute(real)))
            if roots.setdefault(root.stored, root) != root:
                raise UsageError(f"--file {show(pattern)}: another file has the name {show(root.stored)} already")
            if real == path:
                literal.add(root.stored)
    ordered = sorted(roots.values(), key=lambda root: path_key(root.stored))
    kept: list[Root] = []
    inner: dict[bytes, list[bytes]] = {}
    behind: dict[bytes, list[bytes]] = {}
    for root in ordered:
        if not kept or not is_at_or_below(root.stored, kept[-1].stored):
            kept.append(root)
        elif not is_at_or_below(root.real, kept[-1].real.rstrip(b"/")):
            raise UsageError(
                f"--file {show(root.real)}: its name {show(root.stored)} lies in that of {show(kept[-1].real)}"
            )
        elif root.stored in literal and leads_inside(kept[-1], root):
            inner.setdefault(kept[-1].stored, []).append(root.stored)
        elif root.stored in literal:
            behind.setdefault(kept[-1].stored, []).append(root.real)
    return [
        replace(root, inner=tuple(inner.get(root.stored, ())), behind=tuple(behind.get(root.stored, ())))
        for root in kept
    ], missing


GLOB_TOKEN = re.compile(
    r"""(?P<deep>(?:^|(?<=/))\*\*/)      # **/ : any folders, or none
    | (?P<all>(?<=/)\*\*$)              # /** at the end: all that is inside
    | \[(?P<set>[!^]?\]?(?:\[:\w+:\]|\\.|[^]\\])*)\]
    | \*+ | \\. | .""",
    re.DOTALL | re.VERBOSE,
)
SET_NAMES = {
    "alpha": "a-zA-Z",
    "digit": "0-9",
    "alnum": "a-zA-Z0-9",
    "upper": "A-Z",
    "lower": "a-z",
    "space": r"\s",
    "punct": "!-/:-@\\[-`{-~",
    "xdigit": "0-9A-Fa-f",
    "blank": " \t",
}


def _translate_set(inside: str) -> str:
    """Return the regular expression of what stands between the brackets of a glob."""
    negated = inside[:1] in ("!", "^")
    parts = []
    for name, escaped, plain in re.findall(r"\[:(\w+):\]|\\(.)|(.)", inside[negated:], re.DOTALL):
        parts.append(SET_NAMES.get(name, "") if name else plain if plain == "-" else re.escape(escaped or plain))
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def translate_glob(pattern: str) -> str:
    """Return the regular expression of a gitignore pattern (gitignore(5)) without its outer slashes."""
    parts = []
    for match in GLOB_TOKEN.finditer(pattern):
        token = match.group()
        if match.group("deep"):
            parts.append("(?:.*/)?")
        elif match.group("all"):
            parts.append(".+")
        elif token[0] == "*":
            parts.append("[^/]*")
        elif token == "?":
            parts.append("[^/]")
        elif match.group("set"):
            parts.append("(?!/)" + _translate_set(match.group("set")))
        else:
            parts.append(re.escape(token[-1]))
    return "".join(parts)


class Exclude:
    """Patterns as in a .gitignore: the last one that matches decides."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._rules = [self._compile(pattern) for pattern in patterns if pattern.strip("/! ")]

    @staticmethod
    def _compile(pattern: str) -> tuple[bool, bool, re.Pattern[str]]:
        negated = pattern.startswith("!")
        pattern = pattern[1:] if negated else pattern
        body = pattern.rstrip("/")
        anchored = "/" in body
        regex = ("" if anchored else "(?:.*/)?") + translate_glob(body.lstrip("/"))
        try:
            return not negated, body != pattern, re.compile(regex, re.DOTALL)
        except re.error as error:
            raise UsageError(f"--exclude {show(pattern)}: {error}") from None

    def matches(self, path: bytes, is_folder: bool) -> bool:
        """Tell whether `path` itself is excluded; the folders above it are asked on their own."""
        if not self._rules:
            return False
        excluded = False
        text = encode_path(path)
        for verdict, only_folders, regex in self._rules:
            if excluded != verdict and (is_folder or not only_folders) and regex.fullmatch(text):
                excluded = verdict
        return excluded


def list_state(found: os.stat_result) -> list[int]:
    """Return what Stat.state has of a file that is no database with a log."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


class Spool:
    """The folder of frozen copies, and the lock that all sessions of a node share."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Closing any descriptor of a database drops this process's locks on it (fcntl(2)):
        # whoever opens one, to look or to copy, holds this.
        self.sqlite = threading.Lock()
        make_folder(path)
        found = os.stat(path)
        # Never served, by whatever way one comes to it.
        self.inode = (found.st_dev, found.st_ino)
        self.real = os.fsencode(os.path.realpath(path))
        self._clean()

    def _clean(self) -> None:
        """Remove what a node that was killed left here."""
        import shutil

        for name in os.listdir(self.path):
            if name.startswith("freeze-"):
                shutil.rmtree(os.path.join(self.path, name), ignore_errors=True)


def is_database_head(head: bytes) -> bool:
    """Tell whether a file that starts with `head` is a SQLite database that is not encrypted."""
    size = int.from_bytes(head[16:18], "big")  # of a page; 1 stands for 65536
    whole = len(head) == DATABASE_HEAD and head.startswith(DATABASE_MAGIC)
    return whole and (size == 1 or (size >= 512 and size & (size - 1) == 0)) and head[21:24] == b"\x40\x20\x20"


class Scope:
    """What of a filesystem was named, by --file, and what is excluded of it: not what was named itself."""

    def __init__(self, roots: Sequence[Root], exclude: Exclude) -> None:
        self.exclude = exclude
        self.named = {path for root in roots for path in (root.stored, *root.inner)}
        self.ways: dict[bytes, set[bytes]] = {}  # folders above an inner one, and what in them leads to it
        self._shut: set[bytes] = set()  # of these, those that a scan found to be left out but for what leads on
        for root in roots:
            for path in root.inner:
                while path != root.stored:
                    path, _, name = path.rpartition(b"/")
                    self.ways.setdefault(path, set()).add(name)

    def find_named(self, path: bytes) -> bytes:
        """Return what was named at or above a path, and next to it."""
        while path and path not in self.named:
            path = path.rpartition(b"/")[0]
        return path

    def is_hidden(self, path: bytes, is_folder: bool) -> bool:
        """Tell whether a path is not listed, the folders above it apart."""
        return self.exclude.matches(path, is_folder) and path not in self.named and path not in self.ways

    def is_way_only(self, path: bytes) -> bool:
        """Tell whether a folder is listed only as it leads to what was named: as what it lies in is, or excluded."""
        if path not in self.ways or path in self.named:
            return False
        return path.rpartition(b"/")[0] in self._shut or self.exclude.matches(path, True)

    def list_ways(self, path: bytes) -> list[bytes]:
        """Return what leads on in a folder that is left out; so are those in it."""
        if path in self.ways:
            self._shut.add(path)
        return sorted(self.ways.get(path, ()))

    def lies_in_excluded(self, path: bytes) -> bool:
        """Tell whether a folder between a path and what was named above it is excluded."""
        named = self.find_named(path)
        while path and path != named:
            path = path.rpartition(b"/")[0]
            if path != named and self.exclude.matches(path, True):
                return True
        return False


class Source:
    """The paths that one copy may read: below the roots, not excluded, no symlink followed."""

    def __init__(self, settings: NodeSettings, clock: Clock, roots: Sequence[Root], spool: Spool) -> None:
        self.settings = settings
        self.clock = clock
        self.roots = roots
        self.scope = Scope(roots, Exclude(settings.exclude))
        self.spool = spool
        self._margin = int(settings.margin * 1e9)
        self._by_name = {root.stored: root for root in roots}
        self._root: Root | None = None  # of the last path
        self._root_name = b""  # in the folder that holds it
        self._folders: Folders | None = None
        self._checked: bytes | None = None  # the last folder that a path was checked in
        self._above: bytes | None = None  # the last folder below a root that a parent was asked of, while it is open
        self._above_fd = -1
        self._owners: dict[tuple[int, int], tuple[str, str]] = {}
        self._devices: dict[bytes, int] = {}
        self._reals: dict[bytes, bytes] = {}  # of the roots: symlinks above them may be followed

    def close(self) -> None:
        """Close all folders."""
        if self._folders:
            self._folders.close()
        self._root = self._folders = self._above = None

    # -- ways to a path --

    def _root_of(self, path: bytes) -> Root:
        if self._root and is_at_or_below(path, self._root.stored):
            return self._root
        prefix = path
        while True:
            if prefix in self._by_name:
                return self._by_name[prefix]
            if not prefix:
                raise FileNotFoundError(errno.ENOENT, "not among the files that this node serves")
            prefix = prefix.rpartition(b"/")[0]

    def _enter(self, path: bytes) -> tuple[Folders, bytes]:
        """Return the folders of a path's root, and the path as they know it."""
        root = self._root_of(path)
        if root != self._root or self._folders is None:
            self.close()
            above = os.open(os.path.dirname(root.real), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._root, self._folders = root, Folders(above)
            self._root_name = os.path.basename(root.real)
        return self._folders, self._root_name + path[len(root.stored) :] if root.stored else path

    def find_real(self, path: bytes) -> bytes:
        """Return the absolute path of a path, for what cannot use descriptors."""
        root = self._root_of(path)
        return root.real + path[len(root.stored) :] if root.stored else b"/" + path

    def folder(self, path: bytes) -> int:
        """Return a descriptor of a folder, valid until the next call."""
        self._above = None
        folders, inside = self._enter(path)
        return folders.open(inside)

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """Return a descriptor of the folder that `path` lies in, and its last part."""
        above, _, name = path.rpartition(b"/")
        if above == self._above:
            return self._above_fd, name
        self._above = None
        folders, inside = self._enter(path)
        fd, name = folders.parent(inside)
        if path not in self._by_name:  # else its folder has another root's, too, which may lie elsewhere
            self._above, self._above_fd = above, fd
        return fd, name

    def check(self, path: bytes) -> None:
        """Raise FileNotFoundError when `path` lies where a scan does not go."""
        root = self._root_of(path)
        inside = path.rpartition(b"/")[0]
        if path in self.scope.named or inside == self._checked:
            return
        if self.scope.lies_in_excluded(path):
            raise FileNotFoundError(errno.ENOENT, "excluded on the node")
        folder = self.parent(path)[0]
        if root.stored not in self._reals:
            self._reals[root.stored] = os.path.realpath(root.real)
        real = os.path.join(self._reals[root.stored], path[len(root.stored) :].lstrip(b"/"))
        if self.is_elsewhere(path, folder) or is_at_or_below(real, self.spool.real):
            raise FileNotFoundError(errno.ENOENT, "not served by the node")
        self._checked = inside

    def is_elsewhere(self, path: bytes, folder: int) -> bool:
        """Tell whether an open folder is on a filesystem that --one-file-system leaves out."""
        if not self.settings.one_file_system:
            return False
        named = self.scope.find_named(path)
        if named not in self._devices:
            self._devices[named] = os.lstat(self.find_real(named)).st_dev
        return os.fstat(folder).st_dev != self._devices[named]

    def list_names(self, path: bytes, folder: int) -> list[bytes]:
        """Return what is to be looked at in an open folder; in one that is left out, the ways to what was named."""
        if self.scope.is_way_only(path) or self.is_elsewhere(path, folder):
            return self.scope.list_ways(path)
        return sorted(map(os.fsencode, os.listdir(folder)))

    # -- what a path is --

    def _owner(self, uid: int, gid: int) -> tuple[str, str]:
        """Return the names of a user and a group; "" where there is none."""
        import grp
        import pwd

        user = group = ""
        with contextlib.suppress(KeyError):
            user = pwd.getpwuid(uid).pw_name
        with contextlib.suppress(KeyError):
            group = grp.getgrgid(gid).gr_name
        self._owners[uid, gid] = user, group
        return user, group

    def stat(self, path: bytes, found: os.stat_result, fd: int = -1, name: bytes = b"") -> Stat:
        """Return the Stat of a path; `fd` and `name` say where it lies, for what only a path tells."""
        kind = KIND_OF.get(stat_bits.S_IFMT(found.st_mode), "character")
        uid, gid = found.st_uid, found.st_gid
        owned = found.st_mode & 0o7777, uid, gid, *(self._owners.get((uid, gid)) or self._owner(uid, gid))
        if kind == "file":
            return self._file_stat(path, owned, found)
        stat = Stat(path, kind, *owned, mtime=found.st_mtime_ns)
        if fd >= 0:
            stat = stat._replace(xattrs=self._xattrs(fd, name))
        if kind == "symlink" and fd >= 0:
            try:
                return stat._replace(target=os.readlink(name, dir_fd=fd))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise FileNotFoundError(errno.ENOENT, "no longer a symlink") from None
        if kind in ("block", "character"):
            return stat._replace(rdev=found.st_rdev)
        return stat

    def is_young(self, moment: int, least: float = 0.0) -> bool:
        """Tell whether a time (ns) is less than --margin, or `least` (s), ago: within it, a change need not show."""
        return moment > self.clock.now() - max(self._margin, int(least * 1e9))

    def _file_stat(self, path: bytes, owned: tuple[int, int, int, str, str], found: os.stat_result) -> Stat:
        size, mtime, ctime, links = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink
        return Stat(
            path,
            "file",
            *owned,
            size,
            mtime,
            ctime,
            found.st_ino,
            found.st_dev if links > 1 else 0,
            links,
            sparse=size > PAGE and found.st_blocks * 512 < size,
            fresh=self.is_young(ctime if ctime > mtime else mtime),
            error="is larger than 64 TiB, which no snapshot can hold" if size > FILE_LIMIT else "",
        )

    @staticmethod
    def _xattrs(fd: int, name: bytes) -> dict[str, str]:
        try:
            return list_xattrs(name_in(fd, name))
        except OSError:
            return {}

    def look(self, path: bytes) -> Stat | None:
        """Return the Stat of a path; None when it is gone, excluded or part of a database."""
        try:
            fd, name = self.parent(path)
            found = os.lstat(name, dir_fd=fd)
        except FileNotFoundError:
            return None
        kind = stat_bits.S_IFMT(found.st_mode)
        is_folder = kind == stat_bits.S_IFDIR
        if self.scope.is_hidden(path, is_folder):
            return None
        if is_folder and (found.st_dev, found.st_ino) == self.spool.inode:
            return None
        if kind == stat_bits.S_IFREG:
            if self._is_companion(fd, name):
                return None
            return self.look_at_database(self.stat(path, found), fd, name)
        try:
            return self.stat(path, found, fd, name)
        except FileNotFoundError:
            return None

    # -- databases --

    def _is_companion(self, fd: int, name: bytes) -> bool:
        base, _, end = name.rpartition(b"-")
        return name.endswith(COMPANIONS) and self._is_database(fd, base) and self._is_log(fd, name, end)

    def _is_log(self, fd: int, name: bytes, end: bytes) -> bool:
        """Tell whether what has the name of a log begins as one, or as one that is done: no other file is left out."""
        if end not in LOG_HEADS:
            return True
        try:
            with self.spool.sqlite:
                file = os.open(name, FILE_FLAGS, dir_fd=fd)
                try:
                    head = os.read(file, 8)
                finally:
                    os.close(file)
        except OSError as error:
            if is_shortage(error):
                raise
            return error.errno in GONE  # else it is listed, and told of
        return not any(head) or head.startswith(LOG_HEADS[end])

    def _is_database(self, fd: int, name: bytes) -> bool:
        try:
            with self.spool.sqlite:
                file = os.open(name, FILE_FLAGS, dir_fd=fd)
                try:
                    found = os.fstat(file)
                    whole = stat_bits.S_ISREG(found.st_mode) and found.st_size % 512 == 0
                    return whole and is_database_head(os.read(file, DATABASE_HEAD))
                finally:
                    os.close(file)
        except OSError as error:
            if is_shortage(error):
                raise  # a database must not pass for a plain file
            return False

    def look_at_database(self, stat: Stat, fd: int, name: bytes) -> Stat:
        """Return `stat` marked, with its log's state, when it is of a SQLite database."""
        # Only these sizes can be whole pages; reading the head of every file would cost a seek each.
        if not stat.size or stat.size % 512 or not self._is_database(fd, name):
            return stat
        try:
            wal = os.lstat(name + b"-wal", dir_fd=fd)
        except OSError:
            return stat._replace(database=True)
        if not wal.st_size:
            return stat._replace(database=True)
        fresh = stat.fresh or self.is_young(wal.st_mtime_ns)
        return stat._replace(database=True, wal=(wal.st_size, wal.st_mtime_ns), fresh=fresh)


def _look(source: Source, path: bytes, tries: int = PATIENCE) -> tuple[Stat | None, list[bytes]]:
    """Return a path's Stat and, for a folder to go into, the names in it."""
    stat = None
    try:
        if path:  # else it is the filesystem's own root, which has no entry
            stat = source.look(path)
            if stat is None or stat.kind != "directory":
                return stat, []
        names = source.list_names(path, source.folder(path))
        if names and len(path) + 256 > PATH_LIMIT:
            error = f"what it holds has paths too long for a snapshot ({PATH_LIMIT} bytes)"
            return (stat or Stat(path, "directory"))._replace(error=error), []
        return stat, names
    except OSError as error:
        if is_shortage(error) and tries:
            source.clock.sleep(PAUSE * 2 ** (PATIENCE - tries))
            return _look(source, path, tries - 1)
        if not path:
            raise NodeError(f"/ cannot be listed: {explain(error)}") from None
        if error.errno == errno.ENOENT:
            return None, []
        return (stat or Stat(path, "file"))._replace(error=explain(error)), []


def _scan_root(source: Source, root: Root) -> Iterator[Stat]:
    stack: list[tuple[bytes, Iterator[bytes]]] = [(b"", iter([root.stored]))]
    while stack:
        prefix, names = stack[-1]
        for name in names:
            path = prefix + name
            stat, inside = _look(source, path)
            if stat:
                yield stat
            if inside:
                stack.append((path + b"/" if path else b"", iter(inside)))
                break
        else:
            stack.pop()


def scan(source: Source) -> Iterator[Stat]:
    """Yield all that a source holds, sorted by path_key; the folders above its roots first."""
    said: set[bytes] = set()
    for root in source.roots:
        depth = root.stored.count(b"/")
        parts, real = root.stored.split(b"/"), root.real
        for level in range(depth, 0, -1):
            above = b"/".join(parts[: depth + 1 - level])
            folder = b"/".join(real.split(b"/")[:-level]) or b"/"
            if above not in said:
                said.add(above)
                with contextlib.suppress(FileNotFoundError):
                    yield source.stat(above, os.stat(folder))
        yield from _scan_root(source, root)


# ---- freezing ----

IMMUTABLE, READONLY, RECOVER = "immutable=1", "mode=ro", ""  # ways to read a database


def find_wait(clock: Clock, mtime: int, ctime: int) -> float:
    """Return how long (s) to wait until a change shows in a file's times (ns): within their grain a second is not seen.

    A program may set the first one, as to a whole second; the second one shows what the filesystem can tell.
    """
    grain, now = GRAIN if ctime % 10**9 else COARSE_GRAIN, clock.now()
    return grain if any(0 <= now - moment < grain * 1e9 for moment in (mtime, ctime)) else 0.0


def _stat_or_none(path: str) -> list[int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return list_state(found)


def stat_database(path: str) -> list[list[int] | None]:
    """Return size, times and inode of a database and of its log and journal."""
    return [_stat_or_none(path + end) for end in ("", "-wal", "-journal")]


def stat_settled(path: str, clock: Clock) -> list[list[int] | None]:
    """Return stat_database(path) from when on a change shows in it; OSError (EBUSY) where there is no such moment."""
    for _ in range(SETTLINGS):
        found = stat_database(path)
        wait = max((find_wait(clock, state[1], state[2]) for state in found if state), default=0.0)
        if not wait:
            return found
        clock.sleep(wait)
    raise OSError(errno.EBUSY, "the SQLite database is written without a pause")


def choose_way(path: str) -> str:
    """Return how to read a database without leaving a log or a log's index beside it."""
    with open(path, "rb") as file:
        logged = file.read(20)[18:19] == b"\2"
    wal, journal = (found and found[0] for found in stat_database(path)[1:])
    if not logged and not wal:
        return READONLY
    if not wal and not journal:
        return IMMUTABLE  # no program has it open, or none that has written
    return READONLY if os.path.exists(path + "-shm") else RECOVER


def restore_head(path: str, head: bytes) -> None:
    """Give a copied database the counters of its source, which the backup API sets anew.

    So the copy of a database at rest is the same bit for bit.  Where the log holds a newer first
    page, `head` is of another state, and the copy is left as it is.
    """
    with open(path, "r+b") as file:
        found = bytearray(file.read(DATABASE_HEAD))
        for start, end in ((24, 28), (40, 44), (92, 100)):  # change counter, schema cookie, valid-for and version
            found[start:end] = head[start:end]
        if found == head:
            file.seek(0)
            file.write(head)


@dataclass(frozen=True)
class Origin:
    """A live database: the name that SQLite wants, and the file that the name must lead to."""

    path: str
    fd: int  # open before SQLite opens it, and longer: closing it drops the locks that this process has on the file

    def count_open(self) -> int:
        """Return how many descriptors of this process are of the file; 0 where the system does not tell."""
        wanted, count = os.fstat(self.fd), 0
        for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
            with contextlib.suppress(OSError):
                count += os.path.samestat(os.stat(f"/proc/self/fd/{name}"), wanted)
        return count


def _backup(origin: Origin, target: str, source: sqlite3.Connection) -> None:
    import sqlite3

    try:
        copy = sqlite3.connect(target, isolation_level=None)
        try:
            copy.execute("PRAGMA journal_mode = OFF")
            copy.execute("PRAGMA synchronous = OFF")
            source.backup(copy)  # in one step: a writer cannot make it start again
        finally:
            copy.close()
        head = os.pread(origin.fd, DATABASE_HEAD, 0)
    finally:
        source.close()
    restore_head(target, head)


def make_uri(path: str) -> str:
    """Return a path as SQLite's URI, any bytes in it."""
    import urllib.parse

    return "file:" + urllib.parse.quote(os.fsencode(path))


def run_check(connection: sqlite3.Connection, check: str = "quick_check") -> str:
    """Return what quick_check or integrity_check says of a database; "" when all is well."""
    import sqlite3

    try:
        said = str(connection.execute(f"PRAGMA {check}(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        said = str(error)
        if isinstance(error, sqlite3.OperationalError) and "I/O" not in said:
            return ""  # it uses what only its own program has, as a collation: nothing can be said
    return "" if said == "ok" else said


def check_database(path: str, check: str = "quick_check") -> str:
    """Return what quick_check or integrity_check says of a database at rest; "" when all is well."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"{make_uri(path)}?{IMMUTABLE}", uri=True)) as copy:
        return run_check(copy, check)


def open_database(origin: Origin, way: str, wait: float, clock: Clock) -> sqlite3.Connection:
    """Return a connection with a read transaction, so that what is committed stays as it is.

    SQLite takes a name, and follows a symlink that was put in its place: what it has opened must
    be the file that we have open.  Raises OSError (ESTALE) where it is not.
    """
    import sqlite3

    before = origin.count_open()
    uri = f"{make_uri(origin.path)}?{way}"
    # For one thread after the other: a check goes on in a thread of its own.
    connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
    end = clock.monotonic() + wait
    while True:
        try:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if before and origin.count_open() <= before:
                raise OSError(errno.ESTALE, "replaced while it was opened")
            return connection
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or clock.monotonic() > end:
                connection.close()
                raise
            connection.execute("ROLLBACK")
            # Short and never the same: a writer without pause leaves small gaps.
            clock.sleep(0.001 * (1 + os.urandom(1)[0] % 8))
        except BaseException:
            connection.close()
            raise


def _copy_plainly(fd: int, target: str) -> None:
    at = 0
    with open(target, "wb") as file:
        while data := read_range(fd, CHUNK, at):
            file.write(data)
            at += len(data)


def recover_database(origin: Origin, target: str, clock: Clock) -> None:
    """Copy a database that a crash left in the middle of a transaction, and let SQLite mend the copy.

    Raises OSError (EBUSY when something changed it meanwhile) or sqlite3.Error.
    """
    import sqlite3

    before = stat_settled(origin.path, clock)
    _copy_plainly(origin.fd, target)
    for end, found in zip(("-wal", "-journal"), before[1:]):
        if found:
            fd = os.open(origin.path + end, FILE_FLAGS)
            try:
                _copy_plainly(fd, target + end)
            finally:
                os.close(fd)
    if before != stat_database(origin.path):
        raise OSError(errno.EBUSY, "the SQLite database changed while it was copied")
    copy = sqlite3.connect(target, isolation_level=None)
    try:
        copy.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        copy.execute("SELECT count(*) FROM sqlite_master").fetchone()
    finally:
        copy.close()


def _copy_one_way(origin: Origin, target: str, wait: float, clock: Clock) -> bool:
    """Copy a database the way that fits it now; tells whether it was so until the end."""
    import sqlite3

    way, settled = choose_way(origin.path), True
    before: list[list[int] | None] = []
    if way == IMMUTABLE:
        try:
            before = stat_settled(origin.path, clock)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            before, settled = stat_database(origin.path), False  # the copy must equal what is read once more
    try:
        if way:
            _backup(origin, target, open_database(origin, way, wait, clock))
        else:
            recover_database(origin, target, clock)
    except sqlite3.OperationalError as error:
        # A journal to be rolled back, or no right to make the log's index.
        if "readonly" not in str(error) and "unable to open" not in str(error):
            raise
        recover_database(origin, target, clock)
        return True
    same = settled or _are_equal(origin.path, target)
    return way != IMMUTABLE or (same and before == stat_database(origin.path))


def copy_database(origin: Origin, target: str, wait: float, clock: Clock) -> str:
    """Copy a live SQLite database by its backup API; returns what quick_check finds wrong.

    `wait` is how long (s) to wait for a lock.  Raises sqlite3.Error or OSError; all transactions
    that were committed before the call are in the copy, and nothing is left beside the source.
    """
    failure = OSError(errno.EBUSY, "the SQLite database is opened and closed all the time")
    for number in range(TRIES):
        clock.sleep(PAUSE * (1 << number >> 1))  # none before the first
        for end in ("", "-wal", "-shm", "-journal"):  # SQLite would mend the next copy with the log of the last one
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target + end)
        try:
            if _copy_one_way(origin, target, wait, clock):
                return check_database(target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT) or not os.path.exists(origin.path):
                raise
            failure = error if error.errno == errno.EBUSY else failure  # else its log came or went meanwhile
    raise failure


def open_at_rest(origin: Origin, clock: Clock) -> sqlite3.Connection | None:
    """Return a connection to check a database with that nobody writes, which holds no lock; None where one may.

    It has no log and no journal, and no program is writing it now: else a reader's lock, which is
    given back at once, would not be had.
    """
    import sqlite3

    before = stat_database(origin.path)
    if any(found and found[0] for found in before[1:]):
        return None
    try:
        if choose_way(origin.path) == READONLY:
            open_database(origin, READONLY, 0, clock).close()
        connection = open_database(origin, IMMUTABLE, 0, clock)
    except (sqlite3.Error, OSError):
        return None  # whoever copies it finds out what is the matter
    if before == stat_database(origin.path):
        return connection
    connection.close()
    return None


class Check:
    """SQLite's quick_check of a database, in a thread of its own while the database is read."""

    def __init__(self, connection: sqlite3.Connection, lock: threading.Lock) -> None:
        self._connection = connection
        self._lock = lock  # of the spool
        self._found = ""
        self._thread = threading.Thread(target=self._run, daemon=True, name="check")
        self._thread.start()

    def _run(self) -> None:
        self._found = run_check(self._connection)

    def result(self) -> str:
        """Wait for the end of the check; returns what it found, "" when all is well."""
        self._thread.join()
        return self._found

    def close(self) -> None:
        """End it, wherever it is."""
        while self._thread.is_alive():  # it may not have begun: then there is nothing to be interrupted yet
            self._connection.interrupt()
            self._thread.join(0.02)
        with self._lock:
            self._connection.close()


# ---- reading ----


class Handle(NamedTuple):
    """A file that is being read, chunk by chunk."""

    path: bytes
    fd: int
    stat: Stat  # from before anything was read
    size: int  # bytes to read
    grade: str  # frozen or stable
    xattrs: Mapping[str, str]
    note: str = ""  # what is wrong with it although it could be read
    check: Check | None = None  # of a database that is read where it lies
    restless: bool = False  # it is written without a pause: its times do not tell whether it changed


class Ask(NamedTuple):
    """One item of a READ."""

    path: bytes
    chunk: int
    state: list[int]  # as the server knows it
    pages: bytes  # hashes of what the server has
    tell: bool = False  # send hashes and needles first, unless it is nearly what the server has
    need: tuple[tuple[int, int], ...] = ()  # bytes of a chunk that it was told of: send these and no more


def decode_asks(message: Message) -> list[Ask]:
    """Return the items of a READ question; FormatError unless it is one."""
    asks, at = [], 0
    body = bytes(message.body)
    for value in message.fields.items("files", READ_LIMIT):
        fields = Fields.inside(value, "a file of READ")
        size = fields.integer("pages", 0, high=CHUNK // PAGE) * PAGE_HASH
        chunk = fields.integer("chunk", 0, high=FILE_LIMIT // CHUNK)
        state, need = fields.integers("state", 6, 1 << 64), tuple(decode_stretches(fields, "need", CHUNK))
        asks.append(Ask(fields.path("path"), chunk, state, body[at : at + size], fields.flag("tell"), need))
        at += size
    if at != len(body):
        raise FormatError("READ with hashes that do not add up")
    return asks


def compare_pages(pages: bytes, base: bytes, length: int, part: int = 2) -> list[list[int]] | None:
    """Return runs [first, count] of pages that differ from `base`.

    None when more than a `part`-th of the `length` bytes do: then there is something better to send.
    """
    runs = [[first, end - first] for first, end in find_stretches(base, pages)]
    changed = sum(count for _, count in runs)
    return runs if changed * PAGE * part <= max(length, part * PAGE) or not changed else None


DAMAGED = "SQLite finds damage in the database"


class Settler:
    """Sees to it that a change of a file which is about to be read will show in its times (I8)."""

    ALONE = 64  # files that are synced one by one; beyond them their filesystem is, once

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._synced: dict[int, int] = {}  # when each device was (ns)
        self._alone = 0  # files

    def settle(self, fd: int, found: os.stat_result) -> tuple[os.stat_result, bool]:
        """Return the stat of an open file from when on a change of it shows in its times, and False.

        One that is written without a pause is not waited for: then True, as there is no such moment.
        """
        for _ in range(SETTLINGS):
            if self._sync(fd, found):
                found = os.fstat(fd)
            wait = find_wait(self._clock, found.st_mtime_ns, found.st_ctime_ns)
            if not wait:
                return found, False
            self._clock.sleep(wait)
            found = os.fstat(fd)
        return found, find_wait(self._clock, found.st_mtime_ns, found.st_ctime_ns) > 0

    def _sync(self, fd: int, found: os.stat_result) -> bool:
        """Write what a file has got through a shared map: a store into a page that is not clean sets no time.

        Returns whether there was a need.
        """
        newest, now = max(found.st_mtime_ns, found.st_ctime_ns), self._clock.now()
        if now - newest >= MAPPED * 1e9 or newest < self._synced.get(found.st_dev, 0) - COARSE_GRAIN * 1e9:
            return False
        self._alone += 1
        with contextlib.suppress(OSError):  # of a disk that cannot be written nothing is mapped
            if self._alone > self.ALONE and found.st_dev not in self._synced:
                sync_filesystem(fd)
                self._synced[found.st_dev] = now
            else:
                os.fdatasync(fd)
        return True


class Files:
    """The files that one session reads; keeps the last ones open between two questions."""

    MOST = 4  # more than a server reads at once

    def __init__(self, source: Source) -> None:
        self.source = source
        self._handles: OrderedDict[bytes, Handle] = OrderedDict()
        self._cannot_clone: set[int] = set()  # devices
        self._settler = Settler(source.clock)

    def close(self) -> None:
        """Close all files; frozen copies go with their last descriptor."""
        while self._handles:
            self._close(self._handles.popitem()[1])

    def _close(self, handle: Handle) -> None:
        if handle.check is None:
            os.close(handle.fd)
            return
        handle.check.close()
        with self.source.spool.sqlite:
            os.close(handle.fd)

    def handle(self, ask: Ask) -> Handle | None:
        """Return the handle of a file: a new one for chunk 0, the same one for the next chunks."""
        if ask.chunk == 0 and not ask.need:
            old = self._handles.pop(ask.path, None)
            if old:
                self._close(old)
            self._handles[ask.path] = self._open(ask.path, again=old is not None)
            if len(self._handles) > self.MOST:
                self._close(self._handles.popitem(last=False)[1])
        return self._handles.get(ask.path)

    def _open(self, path: bytes, again: bool) -> Handle:
        stat = self._look(path)
        folder, name = self.source.parent(path)
        if not stat.database:
            return self._open_file(stat, folder, name)
        # One that is read again has changed while it was read where it lies.
        return (None if again else self._open_at_rest(stat, folder, name)) or self._freeze(stat, folder, name)

    def _look(self, path: bytes) -> Stat:
        self.source.check(path)
        stat = self.source.look(path)
        if stat is None or stat.kind != "file":
            raise FileNotFoundError(errno.ENOENT, "no longer a file")
        return stat

    def _open_file(self, stat: Stat, folder: int, name: bytes) -> Handle:
        fd = os.open(name, FILE_FLAGS, dir_fd=folder)
        try:
            found = os.fstat(fd)
            if not stat_bits.S_ISREG(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, "no longer a file")
            found, restless = self._settler.settle(fd, found)
            if stat.state != list_state(found):
                stat = self.source.stat(stat.path, found)
            handle = Handle(stat.path, fd, stat, found.st_size, "stable", list_xattrs(fd), restless=restless)
            return self._clone(handle, found.st_dev, folder)
        except BaseException:
            os.close(fd)
            raise

    def _clone(self, handle: Handle, device: int, folder: int) -> Handle:
        """Return a handle of a clone of a large file, where the filesystem can make one."""
        if handle.size <= CHUNK or device in self._cannot_clone:
            return handle
        try:
            # A file without a name, so that nothing is left behind, on the same filesystem.
            copy = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except (OSError, AttributeError):
            return handle
        if clone_file(handle.fd, copy):
            os.close(handle.fd)
            return handle._replace(fd=copy, size=os.fstat(copy).st_size, grade="frozen", restless=False)
        os.close(copy)
        self._cannot_clone.add(device)
        return handle

    def _open_at_rest(self, stat: Stat, folder: int, name: bytes) -> Handle | None:
        """Return a handle of a database itself where nobody writes it: a change would show in its times."""
        if stat.wal or self.source.is_young(max(stat.mtime, stat.ctime), MARGIN):
            return None
        lock = self.source.spool.sqlite
        with lock:
            fd = os.open(name, FILE_FLAGS, dir_fd=folder)
            try:
                handle = Handle(stat.path, fd, stat, stat.size, "stable", list_xattrs(fd))
                origin = Origin(self._find_name(stat.path, folder, name), fd)
                connection = open_at_rest(origin, self.source.clock)
                if connection and self._state(handle) == stat.state:
                    return handle._replace(check=Check(connection, lock))
                if connection:
                    connection.close()
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            return None

    def _freeze(self, stat: Stat, folder: int, name: bytes) -> Handle:
        """Return a handle of a copy of a SQLite database that holds all that is committed."""
        import shutil
        import sqlite3
        import tempfile

        work = tempfile.mkdtemp(prefix="freeze-", dir=self.source.spool.path)
        target = os.path.join(work, "copy")
        try:
            with self.source.spool.sqlite:
                plain = os.open(name, FILE_FLAGS, dir_fd=folder)
                try:
                    xattrs = list_xattrs(plain)
                    wait, clock = self.source.settings.locked_timeout, self.source.clock
                    found = copy_database(Origin(self._find_name(stat.path, folder, name), plain), target, wait, clock)
                    if {os.lstat(name, dir_fd=folder).st_ino, os.fstat(plain).st_ino} != {stat.inode}:
                        raise FileNotFoundError(errno.ENOENT, "replaced while it was copied")
                finally:
                    os.close(plain)
            note = f"{DAMAGED}: {found}" if found else ""
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            return Handle(stat.path, fd, stat, os.fstat(fd).st_size, "frozen", xattrs, note)
        except sqlite3.OperationalError as error:
            raise OSError(errno.EBUSY, f"the SQLite database cannot be copied: {error}") from None
        except sqlite3.DatabaseError as error:
            handle = self._open_file(stat._replace(database=False, wal=()), folder, name)
            return handle._replace(note=f"SQLite cannot read it ({error}); copied as a plain file")
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _find_name(self, path: bytes, folder: int, name: bytes) -> str:
        if os.path.exists("/proc/self/fd"):
            return name_in(folder, name)
        return os.fsdecode(self.source.find_real(path))

    def read(self, ask: Ask) -> tuple[dict[str, Any], list[memoryview]]:
        """Answer one item: its fields, and the bytes that travel with it."""
        try:
            handle = self.handle(ask)
            if handle is None:
                return {"status": "lost"}, []
            return self._read(ask, handle)
        except OSError as error:
            if error.errno in GONE:
                # Still there where it was replaced, or where the log of a database went away.
                return {"status": "later" if self._is_there(ask.path) else "gone"}, []
            if is_shortage(error):
                return {"status": "later"}, []
            return {"status": "error", "error": explain(error)}, []

    def _is_there(self, path: bytes) -> bool:
        try:
            self._look(path)
        except OSError as error:
            return error.errno not in GONE
        return True

    def _read(self, ask: Ask, handle: Handle) -> tuple[dict[str, Any], list[memoryview]]:
        fields: dict[str, Any] = {}
        offset = ask.chunk * CHUNK
        zeros = self._find_zeros(handle, offset)
        # Of a large file what it had when it was opened; of a small one all there is, whatever stat says.
        length = handle.size + 1 if handle.size <= CHUNK else max(0, min(CHUNK, handle.size - offset))
        data = b"" if zeros else read_range(handle.fd, length, offset, handle.size)
        if len(data) > handle.size:
            data = read_range(handle.fd, CHUNK, offset)
        size = len(data) if handle.size <= CHUNK and not zeros else handle.size
        if ask.chunk == 0 and not ask.need:
            fields.update(size=size, grade=handle.grade)
            if ask.state != handle.stat.state:
                fields["line"] = encode_stat(handle.stat).decode("ascii")
            if handle.xattrs:
                fields["xattrs"] = handle.xattrs
            # What is read twice alike has stood there meanwhile, whatever the times do not tell.
            if handle.restless and (handle.size > CHUNK or read_range(handle.fd, CHUNK, offset) != data):
                fields["restless"] = True
        note = self._note(handle, ask.chunk, offset + max(zeros, 1) * CHUNK)
        if note:
            fields["note"] = note
        fields["state"] = self._state(handle)  # after all that was read
        if zeros or (data and ZEROS.startswith(data)):
            return {**fields, "status": "zeros", "count": zeros or 1}, []
        if not data:
            return {**fields, "status": "end"}, []
        fields["length"] = len(data)
        if ask.need:
            view = memoryview(data)
            return {**fields, "status": "part"}, [view[start:end] for start, end in ask.need]
        return self._compare(fields, data, ask)

    @staticmethod
    def _note(handle: Handle, chunk: int, end: int) -> str:
        """Return what is wrong with a file: at its start or, where a check runs beside the reading, at its end."""
        if handle.check and end >= handle.size:
            found = handle.check.result()
            return f"{DAMAGED}: {found}" if found else ""
        return handle.note if chunk == 0 else ""

    @staticmethod
    def _compare(fields: dict[str, Any], data: bytes, ask: Ask) -> tuple[dict[str, Any], list[memoryview]]:
        pages = hash_pages(data)
        fields["digest"] = digest_pages(pages).hex()
        if pages == ask.pages:
            return {**fields, "status": "same"}, []
        runs = compare_pages(pages, ask.pages, len(data), NEARLY if ask.tell else 2) if ask.pages else None
        view = memoryview(data)
        if runs is None and ask.tell:
            return {**fields, "status": "pages"}, [memoryview(encode_told(data, pages))]
        if runs is None:
            return {**fields, "status": "whole"}, [view]
        return {**fields, "status": "patch", "runs": runs}, [view[f * PAGE : (f + n) * PAGE] for f, n in runs]

    @staticmethod
    def _find_zeros(handle: Handle, offset: int) -> int:
        """Return how many whole chunks from `offset` on lie in a hole."""
        if not handle.stat.sparse or offset >= handle.size:
            return 0
        return find_data(handle.fd, offset, count_chunks(handle.size) * CHUNK) // CHUNK - offset // CHUNK

    @staticmethod
    def _state(handle: Handle) -> list[int]:
        if handle.grade == "frozen":
            return handle.stat.state
        return list_state(os.fstat(handle.fd))


# ---- answering ----

BATCH = 256 << 10  # bytes of entries in one answer to LIST
OUTBOX = 4  # answers, of about 1 MiB each, that wait to be compressed and sent
HOOK_OUTPUT = 4096  # bytes of a hook's output that are kept


def run_hook(command: str, wait: bool = True) -> str:
    """Run a shell command of the node's own configuration; returns what went wrong, "" when nothing."""
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        if not wait or process.wait() == 0:
            return ""
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - HOOK_OUTPUT))
        said = show(output.read().decode("utf-8", "replace").strip().replace("\n", " | "))
    return f"ended with code {process.returncode}" + (f": {said}" if said else "")


@dataclass(frozen=True)
class Copy:
    """What one session has open."""

    codec: int
    source: Source
    files: Files
    entries: Iterator[bytes]  # lines still to be listed


@dataclass(frozen=True)
class Home:
    """What all sessions of a node share."""

    settings: NodeSettings
    wire: Wire
    listener: Listener
    spool: Spool
    base: str  # folder that relative --file names start from
    say: Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a session answers, its body not yet compressed."""

    kind: str
    number: int
    fields: dict[str, Any]
    body: bytes | memoryview | None = None
    codec: int = PLAIN


def refuse_question(number: int, code: str, sentence: str) -> Answer:
    """Return the answer to a question that cannot be answered."""
    return Answer(ERROR, number, {"code": code, "message": sentence[:4000]})


def encode_answer(answer: Answer, level: int) -> list[bytes | memoryview]:
    """Return the frames of an answer, the body compressed as far as it pays.

    That of several small files one level higher: what else each of them takes is more than that.
    """
    if answer.body is None:
        return encode_message(answer.kind, answer.number, answer.fields)
    if len(answer.fields.get("items", ())) > 1:
        level = min(level + 1, MOST_LEVEL)
    codec, data = compress(answer.codec, answer.body, level)
    fields = {**answer.fields, "codec": codec, "size": len(answer.body)}
    return encode_message(answer.kind, answer.number, fields, data)


class Outbox:
    """Compresses and sends a session's answers, in their order, while the session reads what comes next."""

    def __init__(self, home: Home, peer: bytes) -> None:
        import queue

        self._home = home
        self._peer = peer
        self._answers: queue.Queue[Answer | None] = queue.Queue(OUTBOX)
        self._thread = threading.Thread(target=self._run, daemon=True, name="outbox")
        self._thread.start()

    def put(self, answer: Answer) -> None:
        """Send an answer after those before it; waits while too many are on their way."""
        self._answers.put(answer)

    def close(self) -> None:
        """Wait until all is sent."""
        self._answers.put(None)
        self._thread.join()

    def _run(self) -> None:
        socket = self._home.listener.reply_socket()
        for answer in iter(self._answers.get, None):
            try:
                frames = encode_answer(answer, self._home.settings.level)
            except Exception as error:  # a fault of ours must not leave the server waiting
                frames = encode_answer(refuse_question(answer.number, "fault", explain_fault(error)), PLAIN)
            with contextlib.suppress(self._home.wire.zmq.ZMQError):  # the node is ending
                socket.send_multipart([self._peer, *frames], copy=False)
        socket.close(linger=1000)


class Session:
    """One server's copy of this node, in a thread of its own; answers in the order of the questions."""

    def __init__(self, home: Home, peer: bytes, before: Session | None) -> None:
        import queue

        self.home = home
        self.peer = peer
        self.before = before  # the same server's last session, to be over first: its --after is due
        self.server = ""  # which store the copy is for
        self.questions: queue.Queue[Request | None] = queue.Queue()
        self.ended = False
        self.over = False  # what waits is not to be answered
        self.number = 0  # of the question that it works on; 0 for none
        self.sign = 0.0  # when its server last had a sign of life, monotonic
        self._copy: Copy | None = None
        self._held = b""  # a line that did not fit the last answer
        self._hooked = False  # --before was begun, --after is due
        self._thread = threading.Thread(target=self._run, daemon=True, name="session")
        self._thread.start()

    def close(self, wait: float) -> None:
        """End the session and wait (s) for it; --after is started even where it does not end in time."""
        self.over = True
        self.questions.put(None)
        self._thread.join(wait)
        if self._thread.is_alive() and self.home.wire.stop.is_set():
            self._run_after(wait=False)

    def _run(self) -> None:
        import queue

        outbox = Outbox(self.home, self.peer)
        try:
            while not self.over:
                request = self.questions.get(timeout=self.home.settings.session_timeout)
                if request is None:
                    break
                message = request.message
                self.sign, self.number = self.home.wire.clock.monotonic(), message.number
                outbox.put(self._answer(message))
                self.number = 0
                if message.kind == CLOSE:
                    break
        except queue.Empty:
            self.home.say("a server went away in the middle of a copy")
        finally:
            failure = self._end(wait=not self.home.wire.stop.is_set())
            if failure:
                self.home.say(f"--after {failure}")
            outbox.close()
            self.ended = True

    def _end(self, wait: bool) -> str:
        """Close what is open and run --after; returns what went wrong with it."""
        if self._copy:
            self._copy.files.close()
            self._copy.source.close()
        self._copy = None
        return self._run_after(wait)

    def _run_after(self, wait: bool) -> str:
        hooked, self._hooked = self._hooked, False
        return run_hook(self.home.settings.after, wait) if hooked and self.home.settings.after else ""

    def _answer(self, message: Message) -> Answer:
        kinds = {LIST: self._list, READ: self._read}
        try:
            if message.kind == OPEN:
                return Answer(message.kind, message.number, self._open(message))
            if message.kind == CLOSE:
                return Answer(message.kind, message.number, self._close())
            if message.kind not in kinds:
                raise NodeError(f"this node knows no message {show(message.kind)}", "unknown")
            if self._copy is None:
                raise NodeError("no copy is open", "closed")
            fields, body = kinds[message.kind](message, self._copy)
            return Answer(message.kind, message.number, fields, body, self._copy.codec)
        except NodeError as error:
            return refuse_question(message.number, error.code, str(error))
        except BackupError as error:
            return refuse_question(message.number, "wrong", str(error))
        except OSError as error:
            return refuse_question(message.number, "failed", f"{explain(error)} on the node")
        except Exception as error:  # a fault of ours must not leave the server waiting
            return refuse_question(message.number, "fault", explain_fault(error))

    def _open(self, message: Message) -> dict[str, Any]:
        settings = self.home.settings
        names = message.fields.texts("codecs", 20)
        codec = next((CODECS[name] for name in list_codecs() if name in names), PLAIN)
        if self.before:  # here, so that the server hears WORKING meanwhile
            self.before.close(self.home.settings.session_timeout)
            self.before = None
        if self.over:
            raise NodeError("another copy for the same server has begun", "closed")
        self._end(wait=True)
        self._hooked = True
        if settings.before:
            failure = run_hook(settings.before)
            if failure:
                raise NodeError(f"--before {failure}", "hook")
        roots, missing = list_roots(settings.files, self.home.base)
        source = Source(settings, self.home.wire.clock, roots, self.home.spool)
        self._copy = Copy(codec, source, Files(source), map(encode_stat, scan(source)))
        self._held = b""
        return {"missing": missing[:ROOTS_KEPT], "roots": [encode_path(root.stored) for root in roots[:ROOTS_KEPT]]}

    def _list(self, message: Message, copy: Copy) -> tuple[dict[str, Any], bytes]:
        lines = [self._held] if self._held else []
        size, self._held, more = len(self._held), b"", True
        while size < BATCH and more:
            line = next(copy.entries, b"")
            more = bool(line)
            if size + len(line) > CHUNK and lines:
                self._held = line
                break
            if line:
                lines.append(line)
            size += len(line) + 1
        return {"more": more}, b"\n".join(lines)

    def _read(self, message: Message, copy: Copy) -> tuple[dict[str, Any], bytes | memoryview]:
        items: list[dict[str, Any]] = []
        payload: list[memoryview] = []
        size = head = 0
        for ask in decode_asks(message):
            if size >= CHUNK or head >= CHUNK:  # files have grown since they were listed
                items.append({"status": "later"})
                continue
            fields, parts = copy.files.read(ask)
            items.append(fields)
            payload.extend(parts)
            size += sum(map(len, parts))
            head += 400 + len(fields.get("line", "")) + len(str(fields.get("xattrs", "")))
        return {"items": items}, payload[0] if len(payload) == 1 else b"".join(payload)

    def _close(self) -> dict[str, Any]:
        failure = self._end(wait=True)
        return {"problem": f"--after {failure}" if failure else ""}


IDLE = 15.0  # s without a question after which a server is taken for dead where another one waits
COMPLAINTS = 100  # told in one node's life: a hostile peer must not fill the log


class Node:
    """The node's main loop: it alone uses the socket; each copy runs in its session's thread."""

    def __init__(self, settings: NodeSettings, wire: Wire, base: str, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.wire = wire
        self.say = say
        bind = re.sub(r"[^A-Za-z0-9.]", "-", settings.bind.replace("*", "any"))
        self.state = os.path.join(settings.state or find_state_folder(), f"node-{bind}-{settings.port}")
        self.identity = load_identity(self.state)
        self.pair = load_pair(os.path.join(self.state, "key")) if settings.server_key else None
        self._lock = self._lock_state()
        self.instance = os.urandom(8).hex()  # tells this process from a clone of the machine
        host = f"[{settings.bind}]" if ":" in settings.bind else settings.bind
        local = not settings.server_key and not settings.insecure
        door = Door(settings.server_key, self.pair, local, settings.handshake_timeout)
        self.listener = Listener(wire, [f"tcp://{host}:{settings.port}"], door, say)
        spool = Spool(os.path.join(self.state, "spool"))
        self.home = Home(settings, wire, self.listener, spool, base, say)
        self._sessions: dict[bytes, Session] = {}
        self._refused: set[str] = set()  # addresses, to say it once
        self._complaints = 0  # about messages that are none

    def _lock_state(self) -> int:
        try:
            return lock_file(os.path.join(self.state, "lock"), shared=False)
        except BlockingIOError:
            raise BackupError(f"another node runs with the same --bind, --port and --state ({self.state})") from None

    def serve(self) -> None:
        """Answer servers until the process is to stop; raises Interrupted then."""
        while True:
            try:
                request = self.listener.receive(SLICE)
                if request:
                    self._take(request)
            except (ProtocolError, FormatError) as error:
                self._complaints += 1
                if self._complaints <= COMPLAINTS:
                    self.say(
                        f"a peer {error}" if isinstance(error, ProtocolError) else f"a peer sent nonsense: {error}"
                    )
            self._look_after_sessions()

    def close(self) -> None:
        """End all sessions; gives them half a second."""
        for session in self._sessions.values():
            session.over = True
            session.questions.put(None)
        for session in self._sessions.values():
            session.close(0.5 / len(self._sessions))
        os.close(self._lock)

    def _take(self, request: Request) -> None:
        refusal = self._refuse(request)
        kind = request.message.kind
        if refusal:
            self.listener.answer(request, ERROR, {"code": "refused", "message": refusal})
        elif kind == HELLO:
            self.listener.answer(request, HELLO, self._hello())
        else:
            self._pass_to_session(request)

    def _refuse(self, request: Request) -> str:
        if not self.listener.door.local or is_loopback(request.address):
            return ""
        if request.address not in self._refused and len(self._refused) < COMPLAINTS:
            self._refused.add(request.address)
            address = show(request.address.replace("::ffff:", ""))
            self.say(f"refused {address}: without --server-key this node answers only its own machine")
        return "the node answers only its own machine; give it this server's public key with --server-key"

    def _hello(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "program": VERSION,
            "identity": self.identity,
            "instance": self.instance,
            "name": self.settings.name,
            "folder": self.settings.folder,
            "codecs": list_codecs(),
            "roots": list(self.settings.files[:ROOTS_KEPT]),
        }

    def _pass_to_session(self, request: Request) -> None:
        session = self._sessions.get(request.peer)
        if session is None or session.ended:
            if request.message.kind != OPEN:
                self.listener.answer(request, ERROR, {"code": "closed", "message": "no copy is open"})
                return
            server = request.message.fields.text("server", "", 100)
            same = [s for s in self._sessions.values() if server and s.server == server and not s.ended]
            last = same[-1] if same else None
            if last is None and len(self._sessions) >= self.settings.sessions:
                long_ago = self.wire.clock.monotonic() - IDLE
                idle = [
                    s for s in self._sessions.values() if not s.number and s.questions.empty() and s.sign < long_ago
                ]
                last = min(idle, key=lambda session: session.sign, default=None)
            if len(self._sessions) - bool(last) >= self.settings.sessions:
                sentence = f"the node serves {len(self._sessions)} servers already, see its --sessions"
                self.listener.answer(request, ERROR, {"code": "busy", "message": sentence})
                return
            session = self._sessions[request.peer] = Session(self.home, request.peer, last)
            session.server = server
        waiting = sum(waits.message.size for waits in list(session.questions.queue) if waits)
        if session.questions.qsize() >= QUEUE_LIMIT or waiting + request.message.size > WAITING_LIMIT:
            self.listener.answer(
                request, ERROR, {"code": "flood", "message": "more questions than are allowed at once"}
            )
            return
        session.questions.put(request)

    def _look_after_sessions(self) -> None:
        now = self.wire.clock.monotonic()
        for peer, session in list(self._sessions.items()):
            if session.ended:
                del self._sessions[peer]
                self._answer_rest(session)
            elif session.number and now - session.sign >= self.settings.working_every:
                session.sign = now
                self.listener.send([peer, *encode_message(WORKING, session.number, {})])

    def _answer_rest(self, session: Session) -> None:
        """Take up what came while a session ended."""
        while not session.questions.empty():
            request = session.questions.get()
            if request:
                self._pass_to_session(request)


# ==== 10. SWEEP: probe, pull, schedule ====

SILENT = "silent"  # no answer of any kind
STRANGER = "no node"  # the machine is there, a node is not
REFUSES = "refuses"  # a node that trusts another server, has another key than it had, or speaks another protocol
NODE = "node"
UNSURE = "unsure"  # it hung up on a handshake with keys: it may be a node without one
CLOSED = "closed"  # the connection failed: a machine refused it, or none is there


@dataclass(frozen=True)
class Probe:
    """What one address answered to HELLO."""

    address: Address
    state: str
    hello: Hello | None = None
    detail: str = ""
    owner: str = ""  # folder of the node with a key that was expected here instead


def _judge_silence(peer: Peer) -> Probe:
    peer.read_events()
    if FOREIGN in peer.events:
        detail = "runs a node that trusts another server; if it is to be this one, give it this server's key"
        return Probe(peer.address, REFUSES, None, f"{detail} with --server-key (`zbackup.pyz key` prints it)")
    if peer.key is not None and {FAILED, LOST} & set(peer.events):
        return Probe(peer.address, UNSURE)
    if READY in peer.events:
        return Probe(peer.address, STRANGER, None, "a ZeroMQ service that is no node")
    if CONNECTED in peer.events:
        return Probe(peer.address, STRANGER, None, f"port {peer.address.port} is another service")
    return Probe(peer.address, CLOSED if REFUSED in peer.events else SILENT)


def _read_hello(peer: Peer) -> Probe | None:
    """Return what a peer said, if that decides what it is."""
    try:
        message = peer.receive(0)
        if message is None:
            return _judge_silence(peer) if {REFUSED, FAILED, FOREIGN, LOST} & set(peer.events) else None
        return Probe(peer.address, NODE, decode_hello(message, peer.key))
    except NodeError as error:
        return Probe(peer.address, REFUSES if error.code == "refused" else STRANGER, None, str(error))
    except FormatError as error:
        return Probe(peer.address, STRANGER, None, f"answered what is no HELLO: {error}")


def _probe_group(wire: Wire, addresses: Sequence[Address], timeout: float, key: str | None) -> list[Probe]:
    zmq = wire.zmq
    poller = zmq.Poller()
    peers: dict[Address, Peer] = {}
    results: dict[Address, Probe] = {}
    owners: dict[object, Address] = {}
    try:
        for address in addresses:
            # Longer than the probe: what libzmq gives up on its own looks like a refusal.
            peer = peers[address] = Peer(wire, address, 10 * timeout, key)
            with contextlib.suppress(NodeError):  # refused already: its events tell
                peer.ask(HELLO, say_hello(), lambda message: None)
            for socket in (peer.socket, peer.monitor):
                poller.register(socket, zmq.POLLIN)
                owners[socket] = address
        end = wire.clock.monotonic() + timeout
        while len(results) < len(peers) and wire.clock.monotonic() < end:
            left = max(1, int((end - wire.clock.monotonic()) * 1000))
            for socket, _ in poller.poll(min(GLANCE, left)):
                address = owners[socket]
                result = _read_hello(peers[address])
                if result and address not in results:
                    results[address] = result
            for peer in peers.values():
                with contextlib.suppress(ProtocolError):  # cut off, which its events tell
                    peer.check_unfinished()
            wire.check()
        return [results.get(address) or _judge_silence(peers[address]) for address in addresses]
    except zmq.ZMQError as error:
        raise BackupError(f"{len(peers)} addresses cannot be asked at once ({error}); lower --neighbours") from None
    finally:
        for peer in peers.values():
            peer.close()


def _settle(wire: Wire, group: Sequence[Probe], timeout: float) -> Iterator[Probe]:
    """Yield the probes of a group, those that hung up asked again without keys, failed connections looked into."""
    unsure = [found.address for found in group if found.state == UNSURE]
    plain = {found.address: found for found in _probe_group(wire, unsure, timeout, None)}
    settled = [plain.get(found.address, found) for found in group]
    refusing = find_refusing([found.address for found in settled if found.state == CLOSED], min(timeout, 0.5))
    for found in settled:
        if found.address in refusing:
            hint = "" if is_loopback(found.address.host) else "; a node without a key is open to its own machine only"
            yield Probe(found.address, STRANGER, None, f"nothing listens at port {found.address.port}{hint}")
        else:
            yield replace(found, state=SILENT) if found.state == CLOSED else found


def _rest(wire: Wire, end: float) -> None:
    clock = wire.clock
    while clock.monotonic() < end:
        wire.check()
        clock.sleep(max(0.0, min(SLICE / 1000, end - clock.monotonic())))


def probe(wire: Wire, addresses: Sequence[Address], settings: ServerSettings) -> list[Probe]:
    """Ask all addresses, in the order given, at a pace that fills half of the kernel's table of neighbours."""
    found: list[Probe] = []
    most = max(1, min(settings.neighbours // 4, wire.peers_at_once()))
    key = "" if wire.pair else None
    free_at = 0.0
    for start in range(0, len(addresses), most):
        group = addresses[start : start + most]
        _rest(wire, free_at)
        distant = sum(not is_loopback(address.host) for address in group)
        free_at = wire.clock.monotonic() + NEIGHBOUR_TIME * distant / max(1, settings.neighbours // 2)
        found += _settle(wire, _probe_group(wire, group, settings.timeout, key), settings.timeout)
    return found


@dataclass(frozen=True)
class Target:
    """One node to be pulled, and where it belongs."""

    hello: Hello
    addresses: tuple[Address, ...]  # all that it answered at; the first one is used
    folder: str
    note: str = ""
    planned: str = ""  # the identity that the folder had then


def _plan_target(hello: Hello, addresses: tuple[Address, ...], taken: set[str]) -> Target:
    """Return the target of a node that is new, with a folder that is not in `taken`, which has the names in lower case.

    Its folder has the name that the node asks for, unless that is another's or looks like an address.
    """
    first = addresses[0]
    wish = name_folder(hello.folder[:100]) if hello.folder and parse_number(hello.folder) is None else ""
    plain = name_folder(first.host)
    names = [*([wish] if wish else []), plain, *([f"{plain}-{first.port}"] if first.port != PORT else [])]
    last = f"{plain}-{name_short(hello.identity)}"
    more = itertools.chain(names, [last], (f"{last}-{number}" for number in itertools.count(2)))
    folder = next(name for name in more if name.lower() not in taken)
    note = "a new node" + (f" with the key {hello.identity}" if is_key(hello.identity) else "")
    if names[0].lower() in taken:
        note = f"another node than the one whose copies are in {names[0]}; its copies go to {folder}"
    taken.add(folder.lower())
    return Target(hello, addresses, folder, note)


def _find_owner(group: Sequence[tuple[Probe, Hello]], known: Sequence[Known], present: Set[str]) -> Known | None:
    """Return the node with a key that was last met where a new one is, and did not answer elsewhere."""
    here = {str(found.address) for found, _ in group}
    away = [node for node in known if is_key(node.identity) and node.identity not in present]
    return next((node for node in away if here & set(node.addresses)), None)


def _refuse_new(found: Probe, hello: Hello, owner: Known | None, strict: bool) -> str:
    """Return why a node that is not known is not copied; "" where it may be."""
    if owner and is_key(hello.identity):
        return (
            f"has the key {hello.identity}, where the node whose copies are in {owner.folder} has {owner.identity}:"
            f" if that machine was set up anew, `zbackup.pyz trust {owner.folder}`; if this is another machine,"
            f" `zbackup.pyz trust {owner.folder} --new`"
        )
    if owner:
        return f"answers without a key, where the node whose copies are in {owner.folder} has one; see its --server-key"
    if strict and is_key(hello.identity):
        name = name_folder(hello.folder[:100] or found.address.host)
        return f"is not known, and --strict is set; to accept it: `zbackup.pyz trust {name} '{hello.identity}'`"
    return ""


def _find_known(names: tuple[str, str], known: Sequence[Known], present: Set[str]) -> Known | None:
    """Return a node by its identity, or by the name that it had before it had a key, if nobody else has that now."""
    identity, former = names
    wanted = [identity, *([former] if former and former not in present else [])]
    return next((node for name in wanted for node in known if node.identity == name), None)


def plan_targets(
    probes: Sequence[Probe], known: Sequence[Known], strict: bool = False
) -> tuple[list[Target], list[Probe]]:
    """Return the nodes to copy, each once, and the probes of those that are refused.

    Refused are clones, which must not be mixed up; who has another key than the node that was
    there before; and, with `strict`, who has no key, or one that is not known.
    """
    groups: dict[str, list[tuple[Probe, Hello]]] = {}
    for found in probes:
        if found.hello:
            groups.setdefault(found.hello.identity, []).append((found, found.hello))
    taken = {node.folder.lower() for node in known}
    formers = [group[0][1].former for group in groups.values()]
    targets: list[Target] = []
    refused: list[Probe] = []
    for identity, group in groups.items():
        former = "" if strict or formers.count(group[0][1].former) > 1 else group[0][1].former
        node = _find_known((identity, former), known, groups.keys())
        first, hello = next(((p, h) for p, h in group if node and str(p.address) in node.addresses), group[0])
        addresses = tuple(p.address for p, h in group if h.instance == hello.instance)
        owner = None if node else _find_owner(group, known, groups.keys())
        detail = "" if node else _refuse_new(first, hello, owner, strict)
        if strict and not is_key(identity):
            detail = detail or "has no key, and --strict is set; see its --server-key"
        if detail:
            refused.append(replace(first, state=REFUSES, detail=detail, owner=owner.folder if owner else ""))
            continue
        if node:
            note = f"it has a key now, {identity}" if node.identity != identity else ""
            targets.append(Target(hello, addresses, node.folder, note, node.identity))
        else:
            targets.append(_plan_target(hello, addresses, taken))
        detail = f"has the identity of the node at {first.address}, as a cloned machine does: remove its state folder"
        refused += [replace(p, state=REFUSES, detail=detail) for p, h in group if h.instance != hello.instance]
    return targets, refused


def list_offers(refused: Sequence[Probe]) -> dict[str, str]:
    """Return the keys that were met in place of known ones, by folder: `trust` may accept them."""
    met = {found.owner: found.hello.identity for found in refused if found.owner and found.hello}
    return {folder: key for folder, key in met.items() if is_key(key)}


# ---- who is known: pins, and the user's word on them ----


def _change_known(store: Store, name: str, change: Callable[[Known], Known]) -> Known:
    """Change what is known of a node, while no copy of it is under way."""
    folder = store.node(name)
    with folder.locked():
        known = change(store.load_known(name))
        folder.save_known(known)
        return known


def save_offer(store: Store, name: str, key: str) -> None:
    """Note the key that was met in place of a node's."""
    _change_known(store, name, lambda node: replace(node, offered=key))


def trust_key(store: Store, name: str, key: str, now: int) -> Known:
    """Let the node of a folder be who has `key`, or the key that was met in its place; its history goes on.

    A folder that does not exist is made, for a node that is yet to come.  Raises UsageError
    where there is no key to accept, or another node has it.
    """
    known = {node.folder: node for node in store.list_nodes()}
    offered = key or (known[name].offered if name in known else "")
    if not is_key(offered):
        raise UsageError(f"which key? None was met in place of the one of {show(name)}; name it: trust NODE KEY")
    owner = next((node for node in known.values() if node.identity == offered and node.folder != name), None)
    if owner:
        raise UsageError(f"this is the key of the node whose copies are in {owner.folder}; `forget` that one first")
    if name not in known:
        if name_folder(name) != name:
            raise UsageError(f"{show(name)} cannot be a folder's name; letters, digits and . _ - can")
        folder = store.node(name)
        folder.make()
        folder.save_known(Known(name, offered, first_seen=now, last_seen=now))
        return store.load_known(name)
    return _change_known(store, name, lambda node: replace(node, identity=offered, offered="", last_seen=now))


def trust_newcomer(store: Store, name: str, now: int) -> Known:
    """Let who was met in place of a known node be a node of its own, with a folder of its own."""
    known = store.load_known(name)
    if not known.offered:
        raise UsageError(f"no other key was met in place of the one of {show(name)}")
    made = trust_key(store, f"{name}-{name_short(known.offered)}", known.offered, now)
    _change_known(store, name, lambda node: replace(node, offered=""))
    return made


def forget_node(store: Store, name: str) -> Known:
    """Expect a node no more, and know its key no more; its copies stay.  Returns what was known."""
    before = store.load_known(name)
    _change_known(store, name, lambda node: replace(node, identity="", addresses=(), offered=""))
    return before


# ---- pull ----


NO_BLOCK = Block(b"", (b"",), (b"",))  # stands after the last one


class Base:
    """The last snapshot beside the new listing: two sorted streams, merged."""

    def __init__(self, blocks: Iterator[tuple[Block, Set[int]]], deleted: int = 0) -> None:
        self.deleted = deleted  # entries that the listing no longer has
        self.present = True  # whether the store has all of the entry that was matched last
        self._blocks = blocks
        self._block = NO_BLOCK  # that the next entry stands in
        self._lacking: Set[int] = frozenset()  # numbers of its entries that the store has not all of
        self._at = 0  # the next entry in the block
        self._next: Entry | None = None
        self._last = b""  # the last line of the listing
        self._last_key = b""  # its sort key, where it has been looked at
        self._advance()

    def _advance(self) -> None:
        self.present = self._at not in self._lacking
        self._at += 1
        while self._at >= len(self._block.lines):
            self._block, self._lacking = next(self._blocks, (NO_BLOCK, frozenset()))
            self._at = 0
        end = self._block is NO_BLOCK
        self._next = None if end else Entry(self._block.lines[self._at], self._block.reads[self._at])

    def whole_block(self) -> Block | None:
        """Return the block that begins with the next entry, if the store has all that it names."""
        return self._block if self._at == 0 and self._block.digest and not self._lacking else None

    def match_block(self) -> None:
        """Go on behind the block that whole_block gave, whose lines are the listing's next ones."""
        self._last, self._last_key = self._block.lines[-1], b""
        self._at = len(self._block.lines) - 1
        self._advance()

    def match(self, line: bytes) -> tuple[Entry | None, Stat | None]:
        """Return the last snapshot's entry for the path of the listing's next line.

        With it comes the line's Stat where the line is not what it was.  Raises ProtocolError
        unless the lines come sorted and well formed.
        """
        found = self._next
        if found and found.line == line:  # what most lines are: no need to look inside
            self._advance()
            self._last, self._last_key = line, b""
            return found, None
        try:
            stat = decode_stat(line)
            last = self._last_key or (path_key(decode_stat(self._last).path) if self._last else b"")
        except FormatError as error:
            raise ProtocolError(f"listed {error}") from None
        key = path_key(stat.path)
        if key <= last:
            raise ProtocolError("listed its files out of order")
        self._last, self._last_key = line, key
        while self._next and self._next.key < key:
            self.deleted += 1
            self._advance()
        found = self._next if self._next and self._next.key == key else None
        if found:
            self._advance()
        return found, stat

    def finish(self) -> None:
        """Count what the listing has not reached."""
        while self._next:
            self.deleted += 1
            self._advance()


class Slot:
    """One entry on its way into the snapshot; they leave in the order of the listing."""

    def __init__(self, line: bytes, old: Entry | None, stat: Stat | None) -> None:
        self.line = line
        self.old = old
        self._stat = stat
        self.entry: Entry | None = None
        self.gone = False
        self.deleted = 0  # entries before it that are no longer listed
        self.again = False  # it changed while it was read: read it on its own

    @property
    def stat(self) -> Stat:
        """The line, decoded."""
        if self._stat is None:
            self._stat = decode_stat(self.line)
        return self._stat

    def move(self, line: bytes) -> None:
        """Take the node's newer word on the file."""
        stat = decode_stat(line)
        if stat.path != self.stat.path or stat.kind != "file":
            raise FormatError("the answer to READ is about another file")
        self.line, self._stat = line, stat

    @property
    def done(self) -> bool:
        """Whether nothing more is to be asked for."""
        return self.gone or self.entry is not None

    def finish(self, content: Content) -> None:
        """Take what was read of the file, or why it was not."""
        self.entry = Entry(self.line, encode_content(content))


def covers(changed: Sequence[tuple[int, int]], length: int, base: int) -> bool:
    """Tell whether changed stretches and a base of `base` bytes give a chunk of `length` bytes.

    Page hashes alone do not tell: a short last page must not stand for a whole one.
    """
    edges = [0, *itertools.chain.from_iterable(changed), length]
    kept = [(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end]
    if any(end > base for _, end in kept):
        return False
    return not kept or kept[-1][1] < length or length == base or length % PAGE == 0


def patch_runs(base: Sequence[Run], changed: Sequence[tuple[int, int]], piece: bytes, length: int) -> list[Run]:
    """Return the runs of a chunk of `length` bytes: those of its base, but for the changed stretches.

    The changed bytes stand joined in the chunk `piece`.  The result names whole chunks only, so
    that reading never follows a chain of patches.
    """
    runs: list[Run] = []
    at = taken = 0
    for start, end in [*changed, (length, length)]:
        runs += slice_runs(base, at, start)
        if end > start:
            runs.append(Run(piece, taken, end - start))
        taken += end - start
        at = end
    return runs


def needs_whole(runs: Sequence[Run], length: int) -> bool:
    """Tell whether a patch has become so scattered that the chunk is better written whole."""
    sizes: dict[bytes, int] = {}
    for run in runs:
        sizes[run.source] = sizes.get(run.source, 0) + run.length
    largest = sum(sorted(sizes.values())[-2:])  # of two chunks, since content that moved lies across them
    return len(sizes) > MOST_SOURCES or len(runs) > MOST_RUNS or largest * 2 < length


def patch_data(base: bytes, changed: Sequence[tuple[int, int]], new: bytes | memoryview, length: int) -> bytes:
    """Return the bytes of a patched chunk."""
    data = bytearray(base[:length].ljust(length, b"\0"))
    at = 0
    for start, end in changed:
        data[start:end] = new[at : at + end - start]
        at += end - start
    return bytes(data)


# ---- content that moved within its file ----

OLD_CHUNKS = 16  # of a file's old content in memory: more than are looked through for one chunk
SCAN_LIMIT = 16 << 20  # bytes that are scanned for the pages of one chunk around one place: some ms
SCAN_NEAR = 8 << 10  # bytes to either side of where a page is expected that are scanned first
CANDIDATES = 8  # places of one needle that are looked at; one of zeros stands everywhere
ENOUGH = 0.5  # of a chunk's pages: with them found, no other place is looked around
WORTH = 0.25  # of a chunk's pages: with fewer found, the chunk is sent as a whole
IN_VAIN = 16  # chunks told of in vain, after which only each 16th is


@dataclass(frozen=True)
class OldChunk:
    """One chunk of what a file had."""

    data: bytes
    runs: tuple[Run, ...]  # none where it is zeros or lost: nothing is to be found there


class OldContent:
    """What a file had, as far as the store can give it."""

    def __init__(self, reader: Reader, content: Content) -> None:
        self.reader = reader
        self.size = content.size
        self._table = ChunkTable(reader, content)
        self._chunks: OrderedDict[int, OldChunk] = OrderedDict()

    def chunk(self, number: int) -> OldChunk:
        """Return one chunk, checked."""
        if number not in self._chunks:
            _remember(self._chunks, number, self._load(number), OLD_CHUNKS)
        self._chunks.move_to_end(number)
        return self._chunks[number]

    def _load(self, number: int) -> OldChunk:
        length = min(CHUNK, self.size - number * CHUNK)
        digest = self._table.get(number)
        if digest is not None and digest not in self.reader.distrusted:
            try:
                data, runs = self.reader.get(digest), self.reader.runs(digest)
                if len(data) == length:
                    return OldChunk(data, runs)
            except FullStore:
                raise
            except (StoreError, FormatError):
                pass  # damaged: what stood there is sent anew
        return OldChunk(bytes(length), ())

    def _cut(self, start: int, end: int) -> Iterator[tuple[OldChunk, int, int]]:
        for number in range(start // CHUNK, count_chunks(end)):
            low = number * CHUNK
            yield self.chunk(number), max(start, low) - low, min(end - low, CHUNK)

    def read(self, start: int, end: int) -> bytes:
        """Return bytes of it; b"" where one of them is lost, or beyond its ends."""
        if not 0 <= start <= end <= self.size:
            return b""
        cut = list(self._cut(start, end))
        whole = all(chunk.runs for chunk, _, _ in cut)
        return b"".join(chunk.data[low:high] for chunk, low, high in cut) if whole else b""

    def runs(self, start: int, end: int) -> list[Run]:
        """Return the runs of whole chunks that give bytes of it."""
        return [run for chunk, low, high in self._cut(start, end) for run in slice_runs(chunk.runs, low, high)]


class Window:
    """Some chunks of old content, joined, to look for pages in."""

    def __init__(self, old: OldContent, place: int) -> None:
        first, end = max(0, place // CHUNK - 1), min(count_chunks(old.size), count_chunks(place) + 2)
        self.start = first * CHUNK  # in the old content
        self._chunks = [old.chunk(number) for number in range(first, end)]
        self.data = b"".join(chunk.data for chunk in self._chunks)
        self._view = memoryview(self.data)

    def has(self, told: Told, page: int, at: int) -> bool:
        """Tell whether a page of a chunk that was told of stands at an offset."""
        end = at + told.size(page)
        if at < 0 or end > len(self.data) or not self.data.startswith(told.needle(page), at):
            return False
        if hashlib.sha256(self._view[at:end]).digest()[:PAGE_HASH] != told.hash(page):
            return False
        return all(chunk.runs for chunk in self._chunks[at // CHUNK : count_chunks(end)])


class Search:
    """The pages of one chunk, looked for in what its file had."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.places = [-1] * told.count  # where each page stands in the old content; -1 where it was not found
        self._budget = 0  # bytes that may still be scanned

    def has_found(self, share: float) -> bool:
        """Tell whether at least this share of the pages was found."""
        return self.places.count(-1) <= (1 - share) * len(self.places)

    def look(self, window: Window, place: int) -> None:
        """Look for the pages not found yet in a window, the first page of the chunk being expected at `place`."""
        self._budget, misses = SCAN_LIMIT, 0
        start = place - window.start  # of the chunk in the window
        for page in range(len(self.places)):
            if self.places[page] >= 0:
                continue
            at = start + page * PAGE
            if not window.has(self.told, page, at):
                at = self._scan(window, page, at, misses)
            misses += 1
            if at >= 0:
                misses, start = 0, at - page * PAGE
                self._take(window, page, at)

    def _scan(self, window: Window, page: int, expected: int, misses: int) -> int:
        """Return where a page stands around an offset, or -1: the longer none was found, the further now and then."""
        often = (misses + 1) & -(misses + 1)  # 1 2 1 4 1 2 1 8 …
        reach = SCAN_NEAR * often * often
        low, end = max(0, expected - reach), min(len(window.data), expected + reach + PAGE)
        needle = self.told.needle(page)
        for _ in range(CANDIDATES):
            if low >= end or self._budget <= 0:
                break
            at = window.data.find(needle, low, end)
            self._budget -= (end if at < 0 else at + PAGE) - low
            if at < 0 or window.has(self.told, page, at):
                return at
            low = at + 1
        return -1

    def _take(self, window: Window, page: int, at: int) -> None:
        """Note where a page stands; those before it stand there too, as far as they are the same."""
        self.places[page] = window.start + at
        while page and self.places[page - 1] < 0 and window.has(self.told, page - 1, at - PAGE):
            page, at = page - 1, at - PAGE
            self.places[page] = window.start + at

    def stretches(self) -> list[tuple[int, int, int]]:
        """Return start, end and old place of what stands together; the place is -1 for what was not found."""
        joined: list[tuple[int, int, int]] = []
        for page, place in enumerate(self.places):
            start = page * PAGE
            end = start + self.told.size(page)
            first, _, where = joined[-1] if joined else (0, 0, -2)
            if place == (where + start - first if where >= 0 else where):
                joined[-1] = (first, end, where)
            else:
                joined.append((start, end, place))
        return joined


def count_equal(one: bytes, other: bytes, at_end: bool = False) -> int:
    """Return how many bytes are equal at the start, or at the end, of both."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[-middle:] == other[-middle:] if at_end else one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Plan:
    """How a chunk that a node has told of comes together, of old content and of what the node is to send."""

    told: Told
    parts: tuple[tuple[int, int, int], ...]  # start, end and old place, as Search.stretches gives them
    old: OldContent
    in_place: bool = False  # what no part names stands where it stood, in the chunk that was compared with

    @property
    def need(self) -> list[tuple[int, int]]:
        """Start and end of the bytes that are needed."""
        return [(start, end) for start, end, place in self.parts if place < 0]

    @property
    def size(self) -> int:
        """The number of bytes that are needed."""
        return sum(end - start for start, end in self.need)

    @property
    def hashes(self) -> bytes:
        """The hashes of the pages that are needed."""
        size, told = PAGE_HASH, self.told
        return b"".join(told.hashes[start // PAGE * size : count_pages(end) * size] for start, end in self.need)

    def without_old(self) -> Plan:
        """Return a plan that needs the whole chunk."""
        return replace(self, parts=((0, self.told.length, -1),))

    def join(self, needed: bytes | memoryview) -> bytes:
        """Return the chunk, given what was needed; too short where old content was lost meanwhile."""
        chunk, at = [], 0
        for start, end, place in self.parts:
            if place < 0:
                chunk.append(bytes(needed[at : at + end - start]))
                at += end - start
            else:
                chunk.append(self.old.read(place, place + end - start))
        return b"".join(chunk)

    def narrow(self, chunk: bytes) -> list[tuple[int, int, int]]:
        """Return the parts, each old one as long as it can be: of a page that is new, most bytes are often old."""
        parts = list(self.parts)
        for i, (start, end, place) in enumerate(self.parts):
            if place >= 0:
                continue
            if i:
                first, _, before = parts[i - 1]
                old = self.old.read(before + start - first, min(before + end - first, self.old.size))
                start += count_equal(chunk[start:end], old)
                parts[i - 1] = (first, start, before)
            if i + 1 < len(parts):
                _, last, after = parts[i + 1]
                same = count_equal(chunk[start:end], self.old.read(max(0, after - (end - start)), after), at_end=True)
                end -= same
                parts[i + 1] = (end, last, after - same)
            parts[i] = (start, end, -1)
        return [part for part in parts if part[0] < part[1]]

    def draw(self, parts: Sequence[tuple[int, int, int]], piece: bytes) -> list[Run]:
        """Return the runs of the chunk: what is new stands joined in the chunk `piece`."""
        runs: list[Run] = []
        taken = 0
        for start, end, place in parts:
            if place < 0:
                runs.append(Run(piece, taken, end - start))
                taken += end - start
            else:
                runs += self.old.runs(place, place + end - start)
        return runs


def find_overwritten(told: Told, pages: bytes) -> list[tuple[int, int]]:
    """Return the stretches of a chunk that are new, where most of it stands where it stood, its end too; else none.

    `pages` are the hashes of what stood there.  What was put in, or taken out, would have moved the end.
    """
    new = [(first * PAGE, end * PAGE) for first, end in find_stretches(pages, told.hashes)]
    found = told.length - sum(end - start for start, end in new)
    return new if new and new[-1][1] < told.length and found >= ENOUGH * told.length else []


class Finder:
    """Finds what moved within one file, chunk after chunk."""

    def __init__(self, reader: Reader, old: Content) -> None:
        self._old = OldContent(reader, old)
        self._shift = 0  # bytes by which the last chunk's end had moved
        self._vain = 0  # chunks told of in vain, one after the other
        self._moved = False  # something stood elsewhere: so may what is beyond the old end

    def is_worth(self, number: int) -> bool:
        """Tell whether the node should tell of a chunk before it sends it: a question more, if it is in vain."""
        within = number * CHUNK < max(1, self._old.size) or self._moved
        return within and (self._vain < IN_VAIN or number % IN_VAIN == 0)

    def is_undecided(self, number: int) -> bool:
        """Tell whether a chunk is the first beyond the old end, so that answers on their way may make it worth it."""
        return number > 0 and number == count_chunks(self._old.size) and not self._moved

    def note_known(self) -> None:
        """Note that the store had a chunk that the node told of."""
        self._vain, self._moved = 0, True

    def find(self, number: int, told: Told, size: int, pages: bytes = b"") -> Plan:
        """Return the plan for a chunk of a file that now has `size` bytes; `pages` are hashes of what stood there."""
        new = find_overwritten(told, pages)
        if new:
            self._vain = self._shift = 0
            return Plan(told, tuple((start, end, -1) for start, end in new), self._old, in_place=True)
        search = Search(told)
        places: list[int] = []
        for shift in (self._shift, 0, size - self._old.size):
            place = number * CHUNK - shift
            within = -CHUNK < place < self._old.size + CHUNK
            if within and not search.has_found(ENOUGH) and all(abs(place - other) > CHUNK // 4 for other in places):
                search.look(Window(self._old, place), place)
                places.append(place)
        if not search.has_found(WORTH):
            self._vain += 1
            return Plan(told, ((0, told.length, -1),), self._old)
        self._vain = 0
        parts = search.stretches()
        start, _, place = next(part for part in reversed(parts) if part[2] >= 0)
        self._shift = number * CHUNK + start - place
        self._moved = self._moved or self._shift != 0
        return Plan(told, tuple(parts), self._old)


class Want(NamedTuple):
    """One item of a READ question, kept until its answer comes."""

    slot: Slot
    chunk: int
    base: bytes | None  # digest of the chunk that the node may answer against
    pages: bytes  # and its page hashes
    tell: bool = False  # the node should tell of the chunk before it sends it
    plan: Plan | None = None  # it has told: of the chunk, only what is needed


class Got(NamedTuple):
    """One item of a READ answer, checked and stored."""

    status: str
    fields: Fields
    chunk: bytes | int = 0  # digest, or a number of chunks of zeros
    length: int = 0
    told: Told | None = None  # what the node has told of the chunk: where the status is "pages", nothing is stored

    def is_steady(self, stat: Stat) -> bool:
        """Tell whether the file is still as `stat` says, and would not seem so had it changed (I8)."""
        return self.fields.integers("state", 6, 1 << 64) == stat.state and not self.fields.flag("restless")


def can_tell(data: bytes | memoryview) -> bool:
    """Tell whether there are enough bytes to see whether they compress."""
    return len(data) >= LOOK // 8


def looks_scrambled(data: bytes | memoryview) -> bool:
    """Tell whether bytes look encrypted: they do not compress at the start, in the middle or at the end."""
    middle = (len(data) - LOOK) // 2
    parts = (data[:LOOK], data[middle : middle + LOOK], data[-LOOK:]) if len(data) > 3 * LOOK else (data,)
    sample = b"".join(parts)
    return can_tell(data) and len(zlib.compress(sample, 1)) > SCRAMBLED * len(sample)


class Receiver:
    """Takes the answers to READ apart, checks every digest and puts what is new into the pack (I5)."""

    def __init__(self, reader: Reader, writer: PackWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.watching = False  # for files that look encrypted; needs an older snapshot to compare with
        self.scrambled = 0  # files that compressed before and no longer do
        self.opaque = 0  # files with a new name, and bytes that neither compress nor are known
        self._pieces: list[Piece] = []
        self._patches: list[tuple[bytes, list[Run], bytes | None]] = []

    def pages(self, digest: bytes | None) -> bytes:
        """Return the page hashes of a chunk to compare with; b"" where the store cannot tell."""
        if digest is None or digest in self.reader.distrusted:
            return b""  # then it is sent whole, which mends the damage
        try:
            return self.reader.pages(digest)
        except (StoreError, FormatError):
            self.reader.distrusted.add(digest)
            return b""

    def take(self, message: Message, wants: Sequence[Want]) -> list[Got]:
        """Return what each item of an answer says; all of its bytes are in the pack then."""
        codec = message.fields.integer("codec", high=255)
        size = message.fields.integer("size", high=BODY_LIMIT)
        raw = memoryview(decompress(codec, message.body, size))
        items = message.fields.items("items", READ_LIMIT)
        if len(items) != len(wants):
            raise ProtocolError(f"answered {len(items)} of {len(wants)} files")
        self._pieces, self._patches = [], []
        found = []
        for item, want in zip(items, wants):
            got, raw = self._take_item(Fields.inside(item, "an answer to READ"), want, raw)
            found.append(got)
        if raw:
            raise ProtocolError("sent more bytes than its answer names")
        self.writer.put_frame((codec, size, message.body), self._pieces)
        for digest, runs, whole in self._patches:
            if whole is None:
                self.writer.put_patch(digest, runs)
            else:
                self.writer.put_chunk(whole)
        return found

    def _take_item(self, item: Fields, want: Want, raw: memoryview) -> tuple[Got, memoryview]:
        status = item.text("status", limit=20)
        if want.plan and status in ("zeros", "end"):
            return Got("later", item), raw  # it is not what the node has told
        if status == "zeros":
            return Got(status, item, item.integer("count", low=1, high=FILE_LIMIT // CHUNK)), raw
        if status in ("gone", "error", "lost", "later", "end"):
            return Got(status, item), raw
        if want.plan and status == "part":
            return self._take_part(item, want, want.plan, raw)
        if want.tell and status == "pages":
            return self._take_told(item, raw)
        if want.plan or status not in ("same", "whole", "patch"):
            item.wrong("status")
        length, digest = item.integer("length", low=1, high=CHUNK), item.digest("digest")
        if status == "same":
            if (
                want.base is None
                or digest != want.base
                or length != sum(run.length for run in self.reader.runs(want.base))
            ):
                raise ProtocolError("called a chunk the same that is another")
        elif status == "whole":
            if len(raw) < length:
                raise ProtocolError("sent fewer bytes than its answer names")
            self._pieces.append(self._piece(raw[:length], digest))
            self._watch(want, digest, raw[:length])
            raw = raw[length:]
        else:
            size = self._take_patch(item, want, raw)
            raw = raw[size:]
            if want.base in self.reader.distrusted:
                return Got("later", item), raw  # what it patches is damaged: ask for the whole chunk
        return Got(status, item, digest, length), raw

    def _watch(self, want: Want, digest: bytes, data: memoryview) -> None:
        """Count a file whose first bytes look encrypted, and did not."""
        if not self.watching or want.chunk or not looks_scrambled(data) or not self.writer.unknown([digest]):
            return  # what is known was counted before a pull was cut off, or has another name now
        if want.slot.old is None:
            self.opaque += 1
        elif want.base:
            with contextlib.suppress(StoreError, FormatError):
                before = self.reader.get(want.base)
                self.scrambled += can_tell(before) and not looks_scrambled(before)

    @staticmethod
    def _piece(data: memoryview, digest: bytes | None = None) -> Piece:
        pages = hash_pages(data)
        found = digest_pages(pages)
        if digest not in (None, found):
            raise ProtocolError("sent bytes that do not have the digest it names")
        return Piece(found, pages, data)

    def _take_patch(self, item: Fields, want: Want, raw: memoryview) -> int:
        """Take a patch of a chunk that the store has; returns how many of the bytes were its."""
        length, digest = item.integer("length", low=1, high=CHUNK), item.digest("digest")
        if want.base is None:
            raise ProtocolError("sent a patch for a chunk that we did not have")
        changed = decode_stretches(item, "runs", length)
        size = sum(end - start for start, end in changed)
        piece = self._piece(raw[:size])
        pages = self._patch_pages(want.pages, changed, piece.pages, length)
        if len(piece.data) != size or digest_pages(pages) != digest:
            raise ProtocolError("sent a patch that does not give the digest it names")
        self._keep_patch(want.base, changed, piece, (digest, length))
        if 2 * size > length:
            self._watch(want, piece.digest, piece.data)
        return size

    def _keep_patch(
        self, base: bytes, changed: Sequence[tuple[int, int]], piece: Piece, made: tuple[bytes, int]
    ) -> None:
        """Keep what is new of a chunk; `made` is its digest, which the hashes of its pages give, and its length."""
        digest, length = made
        below = self.reader.runs(base)
        if not covers(changed, length, sum(run.length for run in below)):
            raise ProtocolError("sent a patch that leaves a part of the chunk open")
        runs = self._draw_from_whole(patch_runs(below, changed, piece.digest, length), piece.digest)
        self._pieces.append(piece)
        whole = None
        if needs_whole(runs, length) or digest in self.reader.distrusted:
            with contextlib.suppress(StoreError):  # which distrusts the base: it is not asked against again
                whole = patch_data(self.reader.get(base), changed, piece.data, length)
        if base not in self.reader.distrusted:
            self._patches.append((digest, runs, whole))

    def _take_told(self, item: Fields, raw: memoryview) -> tuple[Got, memoryview]:
        """Take what the node tells of a chunk; nothing more is to be asked for where the store has it."""
        length, digest = item.integer("length", low=1, high=CHUNK), item.digest("digest")
        size = size_told(length)
        if len(raw) < size:
            raise ProtocolError("sent fewer bytes than its answer names")
        told = decode_told(digest, length, bytes(raw[:size]))
        status = "same" if self._is_known(digest, length) else "pages"
        return Got(status, item, digest, length, told), raw[size:]

    def _is_known(self, digest: bytes, length: int) -> bool:
        if self.writer.unknown([digest]):
            return False
        try:
            known = sum(run.length for run in self.reader.runs(digest))
        except (StoreError, FormatError):
            self.reader.distrusted.add(digest)
            return False
        if known != length:
            raise ProtocolError("called a chunk the same that is another")
        return True

    def _take_part(self, item: Fields, want: Want, plan: Plan, raw: memoryview) -> tuple[Got, memoryview]:
        """Take what was needed of a chunk that the node has told of."""
        told, size = plan.told, plan.size
        if item.integer("length", low=1, high=CHUNK) != told.length:
            return Got("later", item), raw[:0]
        if len(raw) < size:
            raise ProtocolError("sent fewer bytes than its answer names")
        piece = self._piece(raw[:size])
        if piece.pages != plan.hashes:
            return Got("later", item), raw[size:]  # it has changed since the node told of it
        if size == told.length:
            self._pieces.append(piece)
            self._watch(want, told.digest, piece.data)
        elif plan.in_place and want.base:
            self._keep_patch(want.base, plan.need, piece, (told.digest, told.length))
            if want.base in self.reader.distrusted:
                return Got("later", item), raw[size:]
        elif not self.put_moved(plan, piece.data):
            return Got("later", item), raw[size:]
        return Got("part", item, told.digest, told.length), raw[size:]

    def put_moved(self, plan: Plan, needed: bytes | memoryview = b"") -> bool:
        """Put a chunk that consists of old content and of what was needed; tells whether the old one is still there."""
        told, chunk = plan.told, plan.join(needed)
        if len(chunk) != told.length:
            return False
        parts = plan.narrow(chunk)
        new = b"".join(chunk[start:end] for start, end, place in parts if place < 0)
        piece = digest_pages(hash_pages(new))
        runs = self._draw_from_whole(plan.draw(parts, piece), piece)
        if sum(run.length for run in runs) != told.length:
            return False
        if needs_whole(runs, told.length) or told.digest in self.reader.distrusted:
            self.writer.put_chunk(chunk)
            return True
        if new:
            self.writer.put_chunk(new)
        self.writer.put_patch(told.digest, runs)
        return True

    def _draw_from_whole(self, runs: list[Run], piece: bytes) -> list[Run]:
        """Return runs that name whole chunks only: what is new may be known, as a small file, and kept as a patch."""
        if self.writer.unknown([piece]):
            return runs
        try:
            below = self.reader.runs(piece)
        except (StoreError, FormatError):
            self.reader.distrusted.add(piece)  # then it is put as a whole chunk
            return runs
        cut = (slice_runs(below, run.offset, run.offset + run.length) if run.source == piece else [run] for run in runs)
        return list(itertools.chain.from_iterable(cut))

    @staticmethod
    def _patch_pages(base: bytes, changed: Sequence[tuple[int, int]], new: bytes, length: int) -> bytes:
        pages = bytearray(base[: count_pages(length) * PAGE_HASH].ljust(count_pages(length) * PAGE_HASH, b"\0"))
        at = 0
        for start, end in changed:
            first, last = start // PAGE * PAGE_HASH, count_pages(end) * PAGE_HASH
            pages[first:last] = new[at : at + last - first]
            at += last - first
        return bytes(pages)


class Tally:
    """Counts what a pull does; each field is one of Totals."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(vars(Totals()), 0)
        self.problems: list[Problem] = []
        self.grades: set[str] = set()

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        self.counts[name] += count

    def fail(self, path: bytes | str, message: str) -> None:
        """Note a file that is not in the snapshot as it should be."""
        self.counts["failed"] += 1
        self.grades.add("partial")
        self.note(path, message)

    def note(self, path: bytes | str, message: str) -> None:
        """Note what the user should know of a path."""
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(Problem(show(path)[:NAME_KEPT], show(message)[:NAME_KEPT]))

    def put(self, lines: bytes, reads: bytes, count: int) -> None:
        """Count entries of the snapshot, given their halves, joined."""
        files, folders = lines.count(b'","kind":"file"'), lines.count(b'","kind":"directory"')
        self.counts["files"] += files
        self.counts["folders"] += folders
        self.counts["others"] += count - files - folders
        self.counts["size"] += sum(map(int, SIZE_TOLD.findall(reads)))
        self.grades.update(grade.decode() for grade in GRADE_TOLD.findall(reads))


class Intake:
    """The way from one node's answers into the pack and the blocks of a snapshot."""

    def __init__(self, peer: Peer, reader: Reader, writer: PackWriter, settings: ServerSettings) -> None:
        self.peer = peer
        self.reader = reader
        self.writer = writer
        self.settings = settings
        self.tally = Tally()
        self.blocks = BlockWriter(writer)
        self.receiver = Receiver(reader, writer)
        self.deleted = 0  # entries that the node no longer lists, before the last one that was put
        self.full = False  # the disk is: what the node still lists is only counted
        self.has_before = False  # there is an older copy: a file with a new name may be in it
        self.on_seal: Callable[[Progress], None] = lambda progress: None
        self.current: Callable[[], Entry | None] = lambda: None  # the file being read, as far as it is
        reader.open_pack = writer
        writer.distrusted = reader.distrusted

    @contextlib.contextmanager
    def until_full(self) -> Iterator[None]:
        """Go on to count what is left, should the disk be full."""
        try:
            yield
        except FullStore:
            self.full = True
            self.reader.open_pack = None  # nothing more can be put into it

    def step(self) -> None:
        """Wait for the next answer."""
        self.peer.step(self.settings.answer_timeout, self.settings.freeze_timeout)

    def call(self, kind: str, fields: Mapping[str, Any]) -> Message:
        """Return the answer to one question."""
        answers: list[Message] = []
        self.peer.ask(kind, fields, answers.append)
        while not answers:
            self.step()
        return answers[0]

    def ask(self, wants: Sequence[Want], cost: int, on_got: Callable[[list[Got]], None]) -> None:
        """Send a READ as soon as the window has room; `on_got` gets what came, checked and stored."""
        while not self.peer.has_room(cost, self.settings.window):
            self.step()
        files = []
        for want in wants:
            path, state = encode_path(want.slot.stat.path), want.slot.stat.state
            fields: dict[str, Any] = {"path": path, "chunk": want.chunk, "state": state}
            if want.pages:
                fields["pages"] = len(want.pages) // PAGE_HASH
            if want.plan:
                fields["need"] = encode_stretches(want.plan.need)
            if want.tell:
                fields["tell"] = True
            files.append(fields)

        def take(message: Message) -> None:
            if not self.full:
                on_got(self.receiver.take(message, wants))

        self.peer.ask(READ, {"files": files}, take, b"".join(want.pages for want in wants), cost)

    def describe(self, slot: Slot, got: Got, chunks: tuple[bytes | int, ...] = ()) -> Content:
        """Return what the answer about chunk 0 says of the whole file, whose `chunks` it does not say."""
        line = got.fields.text("line", "", CHUNK)
        if line:
            slot.move(line.encode("ascii", "replace"))
        size, grade = got.fields.integer("size", high=FILE_LIMIT), got.fields.text("grade")
        grade = "frozen" if grade == "frozen" else "stable"
        return Content(size, chunks if size else (), (), grade, xattrs=got.fields.xattrs())

    def fail(self, slot: Slot, got: Got) -> None:
        """Note that a file was deleted after it was listed, which is its right, or cannot be read."""
        if got.status == "gone":
            slot.gone = True
            return
        reason = got.fields.text("error", "cannot be read")
        self.tally.fail(slot.stat.path, reason)
        slot.finish(Content(error=reason))

    def put(self, entries: Sequence[Entry]) -> None:
        """Add the next entries of the snapshot."""
        lines, reads = [entry.line for entry in entries], [entry.read for entry in entries]
        self.tally.put(b"\n".join(lines), b"\n".join(reads), len(entries))
        for entry in entries:
            self.blocks.put(entry)
        self.seal_if_full()

    def put_block(self, block: Block) -> None:
        """Add the next block of the snapshot, which the store has."""
        self.tally.put(*block.halves, len(block.lines))
        self.blocks.put_known(block.digest)

    def seal_if_full(self) -> None:
        """Seal a pack that has its size."""
        if self.writer.size >= self.settings.pack_size or self.writer.count >= self.settings.pack_chunks:
            self.seal()

    def seal(self) -> None:
        """Make what has arrived durable, and remember how far it goes."""
        told = self.receiver
        counts = self.deleted, told.scrambled, told.opaque
        progress = Progress(tuple(self.blocks.blocks), tuple(self.blocks.tail), self.current(), *counts)
        self.writer.seal()
        self.on_seal(progress)


TOGETHER = 8  # chunks asked for in one question at most, where those before have changed little: 0.3 ms less for each


class Reading:
    """One reading of one file, from its first chunk to its last."""

    def __init__(self, intake: Intake, slot: Slot, tables: Sequence[ChunkTable], last: bool) -> None:
        self.intake = intake
        self.slot = slot
        self.tables = tables  # what may be compared with, the best first
        self.last = last  # the last try: read on although it changes
        self.chunks = ListWriter(intake.writer)
        self.steady = True
        self.note = ""  # of the node
        self._finder = Finder(intake.reader, tables[-1].content if tables else NOTHING)
        self._content: Content | None = None
        self._next = 0  # the first chunk not asked for
        self._owed = 0
        self._together = 1  # chunks that the next question may be about
        self._again: deque[Want] = deque()  # to be asked for what is needed, now that the node has told of them
        self._ready: dict[int, Got] = {}  # answers by their chunks, until those before them are there
        self._over = False  # nothing more is to be asked for
        self._short = False  # it ended before its size said so
        self._bytes = 0  # up to the end of the last chunk

    def run(self) -> Content | None:
        """Read; returns the content, or None where there is none or the file changed."""
        self.intake.current = self._current
        self._ask_next(1)
        if self.slot.old or not self.intake.has_before:  # else what is said of the first chunk decides how to ask
            self._ask_ahead()
        while self._owed and not self._content:
            self.intake.step()
        while self._content and not self._over and self.chunks.count < self._total:
            if self._again:
                self._ask([self._again.popleft()])
            elif self._next < self._total and not (self._owed and self._finder.is_undecided(self._next)):
                self._ask_next(self._total)
            elif self._owed:
                self.intake.step()
            else:
                self._next = self.chunks.count  # one answer told of a hole, and another one of an end of it
        self._wait()
        self.intake.current = lambda: None
        if self._content is None or self.slot.done or not (self.steady or self.last):
            return None
        return self._describe()

    @property
    def _total(self) -> int:
        return count_chunks(self._content.size) if self._content else 0

    def _ask_ahead(self) -> None:
        """Ask for what the listing says is there, before the first answer: it may be one of many files of this size."""
        listed = count_chunks(self.slot.stat.size)
        while not self._content and self._owed and self._next < listed and not self._finder.is_undecided(self._next):
            self._ask_next(listed)

    @property
    def _is_whole(self) -> bool:
        """Tell whether all is there; what was asked for beyond it, as the file was listed, has only its end."""
        return self._content is not None and self.chunks.count >= max(1, self._total)

    def _describe(self) -> Content:
        whole = self._content or NOTHING
        size = whole.size if self.chunks.count == self._total and not self._short else self._bytes
        found = self.chunks.content(size, whole.grade)
        return found._replace(xattrs=whole.xattrs)

    def _ask_next(self, end: int) -> None:
        """Ask for the next chunk; where the store knows what stood there, for those up to `end` that it knows, too."""
        wants = [self._want(self._next)]
        while wants[-1].pages and len(wants) < self._together and not self._is_edge(self._next + len(wants), end):
            wants.append(self._want(self._next + len(wants)))
        if len(wants) > 1 and not wants[-1].pages:
            wants.pop()  # much may come: alone
        self._next += len(wants)
        self._ask(wants)

    def _is_edge(self, number: int, end: int) -> bool:
        return number >= end or self._finder.is_undecided(number)

    def _want(self, number: int) -> Want:
        base, pages = None, b""
        for table in self.tables:
            base = table.get(number)
            pages = self.intake.receiver.pages(base)
            if pages:
                break
        tell = (self.slot.old is not None or self.intake.has_before) and self._finder.is_worth(number)
        return Want(self.slot, number, base if pages else None, pages, tell)

    def _ask(self, wants: Sequence[Want]) -> None:
        self._owed += len(wants)
        cost = wants[0].plan.size if wants[0].plan else min(len(wants), 2) * CHUNK
        self.intake.ask(wants, cost, lambda found: self._take_all(wants, found))

    def _wait(self) -> None:
        while self._owed:
            self.intake.step()

    def _take_all(self, wants: Sequence[Want], found: Sequence[Got]) -> None:
        for want, got in zip(wants, found):
            self._owed -= 1
            little = got.status in ("same", "patch")
            self._together = min(self._together + 1, TOGETHER) if little else max(self._together // 2, 1)
            if got.status == "later" and want is not wants[0]:
                self._again.append(want)  # there was no more room in the answer
            else:
                self._take(want, got)

    def _take(self, want: Want, got: Got) -> None:
        if self._over or want.chunk < self.chunks.count:
            return  # in a hole that an earlier answer told of
        if got.status not in ("gone", "error", "lost", "later"):
            self._look(want, got)
        if got.status == "pages" and got.told:
            self._find(want, got, got.told)
        elif got.status == "later" and want.plan and self.last:
            self.steady = False
            self._again.append(want._replace(plan=None))  # it changed after it was told of: take what it is now
        else:
            if got.told:
                self._finder.note_known()
            self._arrange(want.chunk, got)
        self._over = self._over or not (self.steady or self.last)

    def _find(self, want: Want, got: Got, told: Told) -> None:
        """Look in the old content for what a node has told of; what is not there is asked for."""
        size = self._content.size if self._content else 0
        plan = self._finder.find(want.chunk, told, size, want.pages)
        if plan.need:
            self._again.append(want._replace(tell=False, plan=plan))
        elif self.intake.receiver.put_moved(plan):
            self._arrange(want.chunk, got)
        else:
            self._again.append(want._replace(tell=False, plan=plan.without_old()))

    def _arrange(self, number: int, got: Got) -> None:
        """Put what is there in order: what a node was asked for twice comes late."""
        self._ready[number] = got
        if isinstance(got.chunk, int):
            self._next = max(self._next, number + got.chunk)
        while not self._over and self.chunks.count in self._ready and not self._is_whole:
            self._put(self.chunks.count, self._ready.pop(self.chunks.count))

    def _look(self, want: Want, got: Got) -> None:
        """Take what an answer says of the whole file: of the last one, where its start was asked for anew."""
        anew = want.chunk == 0 and not self.chunks.count and "size" in got.fields.values
        if self._content is None or anew:
            self._content = self.intake.describe(self.slot, got)
        self.note = self.note or got.fields.text("note", "")
        self.steady = self.steady and got.is_steady(self.slot.stat)

    def _put(self, number: int, got: Got) -> None:
        if got.status in ("gone", "error"):
            self.intake.fail(self.slot, got)
            self._over = True
        elif got.status in ("lost", "later"):
            self._over, self.steady = True, False
        elif got.status == "end":
            self._over = self._short = True
        elif isinstance(got.chunk, int):
            self.chunks.put_zeros(min(got.chunk, self._total - number))
            self._ready = {later: ready for later, ready in self._ready.items() if later >= self.chunks.count}
            self._bytes = self.chunks.count * CHUNK
        else:
            self._put_chunk(number, got.chunk, got.length)
        self.intake.seal_if_full()

    def _put_chunk(self, number: int, chunk: bytes, length: int) -> None:
        size = self._content.size if self._content else 0
        if number * CHUNK + length > size:
            raise ProtocolError("sent more of a file than it has")
        self.chunks.put(chunk)
        self._bytes += length
        if length < CHUNK:
            self._over = True
            self._short = number * CHUNK + length < size

    def _current(self) -> Entry:
        return Entry(self.slot.line, encode_content(self.chunks.content(self.chunks.count * CHUNK, "")))


def decode_listing(answer: Message) -> tuple[bool, list[bytes]]:
    """Return whether there is more, and the lines of an answer to LIST."""
    fields = answer.fields
    try:
        more, size = fields.flag("more"), fields.integer("size", high=BODY_LIMIT)
        raw = decompress(fields.integer("codec", high=255), answer.body, size)
    except CodecError:
        raise
    except FormatError as error:
        raise ProtocolError(f"sent a listing that does not decode: {error}") from None
    if more and not raw:
        raise ProtocolError("lists nothing, without end")
    return more, raw.split(b"\n") if raw else []


class Listing:
    """The lines that a node lists; the next answer is always asked for already."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._answers: deque[Message] = deque()
        self._more = True
        self._count = 0  # of lines that came
        self._lines: list[bytes] = []
        self._at = 0  # the next of them
        intake.peer.ask(LIST, {}, self._answers.append)

    def peek(self, count: int) -> list[bytes]:
        """Return the next lines, as many as are asked for unless the listing ends before."""
        while self._more and len(self._lines) - self._at < count:
            self._fetch()
        return self._lines[self._at : self._at + count]

    def take(self, count: int) -> None:
        """Go on behind so many lines."""
        self._at += count

    def _fetch(self) -> None:
        while not self._answers:
            with self._intake.until_full():
                self._intake.step()
        self._more, lines = decode_listing(self._answers.popleft())
        if self._more:
            self._intake.peer.ask(LIST, {}, self._answers.append)
        self._count += len(lines)
        if self._count > self._intake.settings.most_files:
            raise ProtocolError(f"lists more than the {self._intake.settings.most_files} files of --most-files")
        self._lines, self._at = self._lines[self._at :] + lines, 0


def find_alarm(intake: Intake, good: Snapshot | None) -> str:
    """Return why this copy looks as if data were lost, compared with the last good one; "" where it does not."""
    if good is None:
        return ""
    counts, before, receiver = intake.tally.counts, good.totals, intake.receiver
    if "partial" not in intake.tally.grades:
        if 2 * counts["files"] < before.files:
            return f"it has {counts['files']} files, where {good.name} has {before.files}"
        if 2 * counts["size"] < before.size:
            return f"its files have {format_size(counts['size'])}, where {good.name} has {format_size(before.size)}"
    renamed = receiver.opaque if 2 * counts["deleted"] > before.files else 0
    if 2 * (receiver.scrambled + renamed) > before.files:
        count = receiver.scrambled + renamed
        return f"{count} of {before.files} files became bytes that do not compress, as if they were encrypted"
    return ""


class Pull:
    """One copy of one node, from OPEN to the blocks of its snapshot."""

    def __init__(self, intake: Intake, resumed: Entry | None) -> None:
        self.intake = intake
        self.resumed = resumed  # the file in the middle of which the last pull was cut off
        self.opened = False  # by the node, and not yet closed
        self.links = LinkTable()
        self._base = Base(iter(()))
        self._slots: deque[Slot] = deque()
        self._batch: list[Want] = []
        self._batch_size = self._batch_head = 0
        self._linked: set[tuple[int, int]] = set()  # files with several names that are on their way

    def open(self, store: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Make the node open a copy for a store; returns its roots, and those that are missing."""
        self.opened = True
        answer = self.intake.call(OPEN, {"codecs": list_codecs(), "server": store}).fields
        missing = tuple(show(path)[:NAME_KEPT] for path in answer.texts("missing", ROOTS_KEPT))
        for path in missing:
            self.intake.tally.fail(path, "does not exist on the node")
        return tuple(show(root)[:NAME_KEPT] for root in answer.texts("roots", ROOTS_KEPT)), missing

    def close(self) -> None:
        """Let the node end the copy; what --after says is noted."""
        self.opened = False
        problem = self.intake.call(CLOSE, {}).fields.text("problem", "")
        if problem:
            self.intake.tally.note("", problem)

    def leave(self) -> None:
        """Tell the node, if it is there, that no more questions come."""
        if self.opened:
            self.intake.peer.leave(CLOSE)

    def run(self, base: Base) -> tuple[bytes, ...]:
        """Pull all that the node lists; returns the blocks of the snapshot.

        Raises FullStore that says how much is left where the disk was too small.
        """
        self._base = base
        left: list[int] = []  # sizes of files for which there was no room
        listing = Listing(self.intake)
        while lines := listing.peek(1):
            if self._take_block(listing):
                continue
            line = lines[0]
            listing.take(1)
            if self.intake.full:
                left += self._measure(line)
            with self.intake.until_full():
                self._take_line(line)
            if self.intake.full and self._slots:
                left += [slot.stat.size for slot in self._slots if not slot.done]
                self._slots.clear()
        if not self.intake.full:
            with self.intake.until_full():
                self._finish_slots()
                base.finish()
                self.intake.tally.add("deleted", base.deleted)
                return self.intake.blocks.close()
        left += [slot.stat.size for slot in self._slots if not slot.done]
        self.intake.writer.abandon()
        free = format_size(count_free(self.intake.writer.folder))
        raise FullStore(
            f"the store is full: {len(left)} files of {format_size(sum(left))} are still to be copied, and {free} are"
            " free; what arrived in sealed packs is kept. Make room with `prune`, or give the store a larger disk"
        )

    def _take_block(self, listing: Listing) -> bool:
        """Take over a whole block of the last snapshot where the listing goes on with the same lines."""
        block = self._base.whole_block()
        if block is None or self._slots or self.intake.blocks.tail or self.intake.full:
            return False
        if listing.peek(len(block.lines)) != block.lines or not self._is_block_unchanged(block):
            return False
        listing.take(len(block.lines))
        self.intake.put_block(block)
        with self.intake.until_full():
            self._base.match_block()
        self.intake.deleted = self._base.deleted
        return True

    def _take_line(self, line: bytes) -> None:
        if not self.intake.full:
            slot = self._decide(line)
            self._slots.append(slot)
            if not slot.done:
                self._want(slot)
            elif len(self._slots) > 2000:
                self._send_batch()  # so that what waits behind it does not pile up
            self._emit()

    def _measure(self, line: bytes) -> list[int]:
        """Return the size of a file that there is no room for; nothing where it is in the store."""
        old, stat = self._base.match(line)
        return [stat.size] if stat and stat.kind == "file" else []

    def _decide(self, line: bytes) -> Slot:
        """Return the slot of a line: done where nothing is to be read."""
        old, stat = self._base.match(line)
        slot = Slot(line, old, stat)
        slot.deleted = self._base.deleted
        if old and old.line == line and self._base.present and self._is_unchanged(old.line, old.read):
            slot.entry = old
        elif slot.stat.error:
            self.intake.tally.fail(slot.stat.path, slot.stat.error)
            slot.finish(Content(error=slot.stat.error) if slot.stat.kind == "file" else NOTHING)
        elif slot.stat.kind != "file":
            slot.finish(NOTHING)
        elif slot.stat.link_key:
            self._decide_link(slot, slot.stat.link_key)
        return slot

    def _is_unchanged(self, line: bytes, read: bytes) -> bool:
        """Tell whether equal lines prove equal content; errs towards reading again.

        The halves may be those of one entry, or of many, joined.
        """
        if b'"error"' in line or b'"fresh"' in line or b'"torn"' in read or b'"error"' in read:
            return False
        return not self.intake.settings.checksum or b'","kind":"file"' not in line

    def _is_block_unchanged(self, block: Block) -> bool:
        """Tell the same of a block, and that it would be cut where it ends."""
        return ends_block(block.lines[-1]) and self._is_unchanged(*block.halves)

    def _decide_link(self, slot: Slot, key: tuple[int, int]) -> None:
        """Take the content of the file's other name, where that has been read in this pull."""
        if key in self._linked:
            self._finish_slots()
        known = self.links.get(key)
        if known is not None:
            line, _, read = known.partition(b"\t")
            if decode_stat(line).state == slot.stat.state:
                slot.entry = Entry(slot.line, read)
                return
        self._linked.add(key)

    def _want(self, slot: Slot) -> None:
        if slot.stat.size > CHUNK:
            self._finish_slots(but_last=True)
            self._read_file(slot)
            return
        base = ChunkTable(self.intake.reader, slot.old.content).get(0) if slot.old else None
        pages = self.intake.receiver.pages(base)
        full = self._batch_size + slot.stat.size > CHUNK or len(self._batch) >= READ_LIMIT
        if full or self._batch_head > CHUNK // 2:
            self._send_batch()
        self._batch.append(Want(slot, 0, base if pages else None, pages))
        self._batch_size += slot.stat.size
        self._batch_head += 200 + 6 * len(slot.stat.path)

    def _send_batch(self) -> None:
        if self._batch:
            wants, cost = self._batch, self._batch_size
            self._batch, self._batch_size, self._batch_head = [], 0, 0
            self.intake.ask(wants, cost, lambda found: self._take_batch(wants, found))

    def _take_batch(self, wants: Sequence[Want], found: Sequence[Got]) -> None:
        for want, got in zip(wants, found):
            slot = want.slot
            if got.status in ("gone", "error"):
                self.intake.fail(slot, got)
            elif got.status in ("later", "lost"):
                slot.again = True
            else:
                content = self.intake.describe(slot, got, (got.chunk,))
                zeros = got.chunk == 1 and content.size <= CHUNK
                whole = content.size == (0 if got.status == "end" else content.size if zeros else got.length)
                slot.again = not whole or not got.is_steady(slot.stat)
                if not slot.again:
                    self._finish(slot, content, got.fields.text("note", ""))

    def _finish(self, slot: Slot, content: Content, note: str) -> None:
        if note:
            content = content._replace(grade="torn")
            self.intake.tally.note(slot.stat.path, note)
        if content.grade == "torn":
            self.intake.tally.add("torn")
        slot.finish(content)
        if slot.entry and (slot.old is None or slot.old.read != slot.entry.read):
            self.intake.tally.add("changed")
        key = slot.stat.link_key
        if key and slot.entry:
            self.links.put(key, slot.line + b"\t" + slot.entry.read)

    def _emit(self) -> None:
        """Pass on the entries that are done, in order, and read those again that come next and need it."""
        self._put_done()
        while self._slots and self._slots[0].again:
            self._slots[0].again = False
            self._read_file(self._slots[0])
            self._put_done()

    def _put_done(self) -> None:
        done = []
        while self._slots and self._slots[0].done:
            slot = self._slots.popleft()
            if self._linked:
                self._linked.discard(slot.stat.link_key or (0, 0))
            self.intake.deleted = slot.deleted
            if slot.entry:
                done.append(slot.entry)
        if done:
            self.intake.put(done)

    def _finish_slots(self, but_last: bool = False) -> None:
        """Wait until all slots are done and passed on."""
        self._send_batch()
        self._emit()
        while len(self._slots) > but_last:
            self.intake.step()
            self._emit()

    def _read_file(self, slot: Slot) -> None:
        """Read one file chunk by chunk, again where it changes meanwhile (I8)."""
        reader, settings = self.intake.reader, self.intake.settings
        old = [slot.old.content] if slot.old else []
        if self.resumed and self.resumed.stat.path == slot.stat.path:
            old.insert(0, self.resumed.content)
        tables = [ChunkTable(reader, content) for content in old]
        for number in range(1, settings.tries + 1):
            reading = Reading(self.intake, slot, tables, last=number == settings.tries)
            content = reading.run()
            if slot.done:
                return
            if content:
                restless = "" if reading.steady else f"was changing all the time; read {number} times"
                self._finish(slot, content, "; ".join(filter(None, (restless, reading.note))))
                return
            tables = [ChunkTable(reader, reading.chunks.content(0, "")), *tables[: len(old)]]
            self.intake.peer.wire.stop.wait(settings.pause * 2 ** (number - 1))
        self.intake.fail(slot, Got("error", Fields('{"error": "changed too often to be read to its end"}', "a file")))


# ---- sweep ----


@dataclass(frozen=True)
class NodeReport:
    """What became of one address or node in one sweep."""

    address: str
    state: str  # SILENT, STRANGER, REFUSES or NODE
    addresses: tuple[str, ...] = ()  # all that the node answered at
    folder: str = ""
    snapshot: Snapshot | None = None
    problems: tuple[Problem, ...] = ()  # beyond those of the snapshot
    error: str = ""  # why there is no snapshot, or only a part of one
    note: str = ""  # what is new about it
    exit_code: int = 0
    missing: int = 0  # ns since it was seen last, for a known node that is silent


MISSING = 3  # exit code: a known node is away for longer than --stale
NOBODY = 5  # exit code: no node answered


@dataclass(frozen=True)
class SweepReport:
    """What became of all addresses in one sweep."""

    started: int  # ns
    finished: int
    nodes: tuple[NodeReport, ...]
    problems: tuple[str, ...] = ()  # of the store

    @property
    def exit_code(self) -> int:
        """The worst that happened, in the order 130, 4, 1, 3, 5, 0."""
        codes = {node.exit_code for node in self.nodes} | ({StoreError.exit_code} if self.problems else set())
        for code in (Interrupted.exit_code, StoreError.exit_code, BackupError.exit_code, MISSING):
            if code in codes:
                return code
        return 0 if any(node.state == NODE for node in self.nodes) else NOBODY


AfterPull = Callable[[NodeFolder, Reader, Snapshot], Sequence[Problem]]


@dataclass(frozen=True)
class Events:
    """What a sweep tells while it runs, from the thread that called it."""

    report: Callable[[NodeReport], None]
    tick: Callable[[], None]  # some times a second


def list_base(reader: Reader, progress: Progress, last: Snapshot | None, problems: list[str]) -> Iterator[Block]:
    """Yield what a new listing is compared with: what the last pull got to, then the last snapshot.

    What is damaged is noted and left out: it counts as new, is sent again, and so mended.
    """

    def on_damage(error: BackupError) -> None:
        if isinstance(error, CodecMissing):
            raise error  # else all would be sent and stored once more
        if isinstance(error, MissingChunk) and reader.lost:
            return  # `repair` has told of it
        note_once(problems, f"entries of the last snapshot are lost, and read anew: {error}")

    def list_progress() -> Iterator[Block]:
        yield from list_blocks(reader, progress.blocks, on_damage)
        yield Block.decode(b"", b"".join(progress.tail))

    reached = b""
    with contextlib.suppress(FormatError):
        for block in list_progress():
            reached = Entry(block.lines[-1], b"").key if block.lines else reached
            yield block
    for block in list_blocks(reader, last.blocks if last else (), on_damage):
        past = sum(entry.key <= reached for entry in block.list_entries()) if reached else 0
        if past:  # they come first
            block = Block(b"", block.lines[past:], block.reads[past:])
        elif block.lines:
            reached = b""  # all that follows is behind it, too
        yield block


def check_identity(intake: Intake, identity: str) -> None:
    """Raise NodeError unless the node at the other end is who it was when the sweep began."""
    if decode_hello(intake.call(HELLO, say_hello())).identity != identity:
        raise NodeError("another node has its address by now; the next sweep copies it", "late")


class Copier:
    """Copies one node into its folder: base, pull, snapshot."""

    def __init__(self, store: Store, wire: Wire, settings: ServerSettings, after: AfterPull) -> None:
        self.store = store
        self.wire = wire
        self.settings = settings
        self.after = after
        self.intakes: dict[str, Intake] = {}  # by folder, for whoever shows the progress

    def run(self, target: Target) -> NodeReport:
        """Copy a node; whatever goes wrong with it ends here."""
        addresses = tuple(map(str, target.addresses))
        report = NodeReport(addresses[0], NODE, addresses, target.folder, note=target.note)
        try:
            folder = self.store.node(target.folder)
            folder.make()
            with folder.locked():
                return self._copy(target, folder, report)
        except BackupError as error:
            return replace(report, error=str(error), exit_code=error.exit_code)
        except OSError as error:
            sentence = f"the store cannot be used: {explain(error)}"
            return replace(report, error=sentence, exit_code=StoreError.exit_code)
        except Exception as error:  # a fault of ours must not end the other nodes' copies, nor go unseen
            return replace(report, error=explain_fault(error), exit_code=BackupError.exit_code)

    def _copy(self, target: Target, folder: NodeFolder, report: NodeReport) -> NodeReport:
        released = self._save_known(target, folder).released
        newest = next(folder.newest(), None)
        reader = self.store.reader()
        writer = PackWriter(self.store.packs, self.store.index, ZSTD if load_zstd() else ZLIB, self.settings.level)
        identity = target.hello.identity
        key = identity if is_key(identity) else None
        peer = Peer(self.wire, target.addresses[0], self.settings.answer_timeout, key)
        peer.most, peer.end = self.settings.most_bytes, self.wire.clock.monotonic() + self.settings.longest
        try:
            intake = self.intakes[target.folder] = Intake(peer, reader, writer, self.settings)
            start = Snapshot(
                name=name_time(self.wire.clock.now()),
                folder=folder.name,
                sequence=1 + max(newest.sequence if newest else 0, released),  # whose file may be damaged by now
                started=self.wire.clock.now(),
                finished=0,
                grade="partial",
                address=str(target.addresses[0]),
                identity=identity,
                host=show(target.hello.name),
            )
            return self._pull(intake, folder, start, report)
        finally:
            self.intakes.pop(target.folder, None)
            writer.abandon()
            peer.close()
            reader.close()

    def _pull(self, intake: Intake, folder: NodeFolder, start: Snapshot, report: NodeReport) -> NodeReport:
        progress = folder.load_progress()
        intake.on_seal = folder.save_progress
        last = next((snapshot for snapshot in folder.newest() if not snapshot.cut_off), None)
        good = next((snapshot for snapshot in folder.newest() if snapshot.good), None)
        intake.receiver.watching = good is not None
        intake.has_before = last is not None
        intake.receiver.scrambled, intake.receiver.opaque = progress.scrambled, progress.opaque
        blocks = list_lacking(intake.reader, list_base(intake.reader, progress, last, self.store.problems))
        base = Base(blocks, progress.deleted)
        pull = Pull(intake, progress.current)
        try:
            if not is_key(start.identity):  # a key is proved; else another node may have its place by now
                check_identity(intake, start.identity)
            roots, missing = pull.open(self.store.identity)
            start = replace(start, roots=roots, missing=missing)
            pulled = pull.run(base)
        except (NodeError, Interrupted) as error:
            pull.leave()
            saved = self._save_part(intake, folder, replace(start, cut_off=str(error)))
            return replace(report, snapshot=saved, error=str(error), exit_code=error.exit_code)
        except BaseException:
            pull.leave()
            raise
        finally:
            pull.links.close()
        intake.writer.seal()
        whole = replace(start, blocks=pulled, grade=worst_grade(intake.tally.grades), alarm=find_alarm(intake, good))
        saved = self._save(intake, folder, whole)
        folder.drop_progress()
        try:
            pull.close()
        except NodeError as error:
            intake.tally.note("", f"the copy is complete, but the node did not end it: {error}")
        problems = intake.tally.problems[len(saved.problems) :]
        code = 0 if saved.good and not saved.alarm else BackupError.exit_code
        try:
            problems += self.after(folder, intake.reader, saved)
        except FullStore as error:  # the snapshot is complete; `latest` is not
            problems.append(Problem("latest", str(error)))
            code = error.exit_code
        if problems or saved.problems:
            code = code or BackupError.exit_code
        return replace(report, snapshot=saved, problems=tuple(problems), exit_code=code)

    def _save(self, intake: Intake, folder: NodeFolder, snapshot: Snapshot) -> Snapshot:
        counts = {**intake.tally.counts, "sent": intake.peer.received, "added": intake.writer.added}
        counts["scrambled"] = intake.receiver.scrambled + intake.receiver.opaque
        whole = replace(
            snapshot,
            finished=self.wire.clock.now(),
            totals=Totals(**counts),
            problems=tuple(intake.tally.problems),
        )
        return folder.save_snapshot(whole)

    def _save_part(self, intake: Intake, folder: NodeFolder, snapshot: Snapshot) -> Snapshot | None:
        """Keep what arrived of a pull that was cut off; no snapshot where no new file is complete."""
        blocks = intake.blocks.close()
        if blocks or intake.writer.added:
            intake.seal()
        if not intake.tally.counts["changed"]:
            return None
        return self._save(intake, folder, replace(snapshot, blocks=blocks))

    def _save_known(self, target: Target, folder: NodeFolder) -> Known:
        now = self.wire.clock.now()
        try:
            known = folder.load_known()
        except (OSError, FormatError):
            known = Known(folder.name, target.planned, first_seen=now)
        if known.identity != target.planned:
            raise NodeError("what is known of it has changed, as by `trust`; the next sweep copies it", "late")
        known = replace(known, identity=target.hello.identity, name=show(target.hello.name), offered="")
        addresses = tuple(map(str, target.addresses[:ADDRESSES_KEPT]))
        known = replace(known, addresses=addresses, last_seen=now)
        folder.save_known(known)
        return known


def report_probe(found: Probe) -> NodeReport:
    """Return the report of an address without a node to copy."""
    failed = found.state == REFUSES
    return NodeReport(str(found.address), found.state, error=found.detail, exit_code=1 if failed else 0)


def report_missing(
    probes: Sequence[Probe], targets: Sequence[Target], known: Sequence[Known], when: tuple[int, float]
) -> list[NodeReport]:
    """Return a report for each known node of these addresses that did not answer as itself.

    What did answer in its place stands in the report.  `when` is now (ns) and --stale (s).
    """
    now, stale = when
    present = {target.folder for target in targets}
    reports = []
    for node in known:
        here = [p for p in probes if p.owner == node.folder or (not p.owner and str(p.address) in node.addresses)]
        if node.folder not in present and here:
            away = now - node.last_seen
            told = min(here, key=lambda found: (REFUSES, STRANGER, SILENT, NODE).index(found.state))
            # A clock that was ahead when it was seen must not hide it until then.
            code = report_probe(told).exit_code or (MISSING if abs(away) > stale * 1e9 else 0)
            state = SILENT if told.state == NODE else told.state  # another node has its address, and is told of apart
            where = tuple(dict.fromkeys((str(told.address), *node.addresses)))
            report = NodeReport(where[0], state, where, node.folder, error=told.detail, exit_code=code, missing=away)
            reports.append(report)
    return reports


def probe_all(
    wire: Wire, addresses: Sequence[Address], known: Sequence[Known], settings: ServerSettings
) -> list[Probe]:
    """Return what each address answered; where a known node should be, it is asked twice at need.

    The known ones come first, before strange machines fill the kernel's table of neighbours.
    """
    expected = {address for node in known for address in node.addresses}
    ordered = sorted(addresses, key=lambda address: str(address) not in expected)
    found = {probed.address: probed for probed in probe(wire, ordered, settings)}
    doubtful = [probed.address for probed in found.values() if probed.state in (SILENT, STRANGER)]
    again = [address for address in doubtful if str(address) in expected]
    found.update((probed.address, probed) for probed in probe(wire, again, settings))
    return [found[address] for address in addresses]


def copy_all(copier: Copier, targets: Sequence[Target], events: Events) -> list[NodeReport]:
    """Copy the targets in threads; each report is passed on as it is ready."""
    import queue

    waiting: queue.Queue[Target] = queue.Queue()
    done: queue.Queue[NodeReport] = queue.Queue()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not copier.wire.stop.is_set():
                done.put(copier.run(waiting.get_nowait()))

    for target in targets:
        waiting.put(target)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(copier.settings.jobs, len(targets)))]
    for thread in threads:
        thread.start()
    reports: list[NodeReport] = []
    while len(reports) < len(targets) and (any(thread.is_alive() for thread in threads) or not done.empty()):
        events.tick()
        with contextlib.suppress(queue.Empty):
            reports.append(done.get(timeout=0.2))
            events.report(reports[-1])
    return reports


def sweep(copier: Copier, addresses: Sequence[Address], events: Events) -> SweepReport:
    """Probe all addresses, copy every node found, each once; up to `jobs` side by side."""
    wire, store, settings = copier.wire, copier.store, copier.settings
    started = wire.clock.now()
    execute_leftovers(plan_leftovers(store))
    known = store.list_nodes()
    probes = probe_all(wire, addresses, known, settings)
    targets, refused = plan_targets(probes, known, settings.strict)
    for name, key in list_offers(refused).items():
        with contextlib.suppress(LockedStore):  # it is being copied by another run: the next sweep meets the key again
            save_offer(store, name, key)
    instead = {found.address: found for found in refused}
    probes = [instead.get(found.address, found) for found in probes]
    missing = report_missing(probes, targets, known, (wire.clock.now(), settings.stale))
    told = {node.address for node in missing}
    absent = {address for node in missing for address in node.addresses}
    others = [p for p in probes if p.state not in (NODE, SILENT) and str(p.address) not in told]
    others += [p for p in probes if p.state == SILENT and str(p.address) not in absent]
    nodes = [*missing, *map(report_probe, others)]
    for report in nodes:
        events.report(report)
    nodes += copy_all(copier, targets, events)
    return SweepReport(started, wire.clock.now(), tuple(nodes), tuple(store.problems))


# ==== 11. RESTORE: a snapshot back to files ====

PUBLISH_FILES = 4096  # files written under temporary names before they are synced together
PUBLISH_BYTES = 64 << 20
MOST_WORKERS = 64  # processes that may be asked for
MOST_WRITERS = 4  # processes that write files, unless a flag says more; no more than there are processors
PART_CHUNKS = 16  # of a file, written by one process; a larger one is shared out
BATCH_FILES = 128  # made by one process at once, the places of their chunks looked up together
BATCH_BYTES = 4 << 20
ACLS = ("system.posix_acl_access", "system.posix_acl_default")  # acl(5): what a new file may have of its folder


# ---- processes that work beside this one ----

PR_SET_PDEATHSIG = 1  # prctl of Linux, <linux/prctl.h>: the signal to get when the parent ends
Opened = Callable[[Any], "contextlib.AbstractContextManager[Callable[[Any], Any]]"]


@dataclass(frozen=True)
class Failure:
    """Why a path could not be put, or a job not be done."""

    message: str
    damaged: bool = False  # the store is at fault
    number: int = 0  # errno


def set_process(option: int, value: int) -> bool:
    """Set something of this process or thread, as prctl of Linux does; False where the system cannot."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(option, value, 0, 0, 0) == 0


def _serve_jobs(pipe: io.BufferedRWPair, opened: Opened) -> None:
    """Do the jobs that come through a pipe, each at the place that was named last; EOFError at its end."""
    import pickle
    import signal

    place: Any = None
    with contextlib.ExitStack() as stack:
        do: Callable[[Any], Any] | None = None
        while True:
            job, there = pickle.load(pipe)
            if job is None:
                stack.close()
                place, do = there, None
                set_process(PR_SET_PDEATHSIG, signal.SIGKILL)  # not a whole job after it
                continue
            try:
                do = do or stack.enter_context(opened(place))
                result = do(job)
            except Exception as error:  # a fault: the other one says so
                result = Failure(f"{type(error).__name__}: {error}")
            pickle.dump(result, pipe, pickle.HIGHEST_PROTOCOL)
            pipe.flush()


class Workers:
    """Processes that do jobs beside this one, at one place after the other; the results come in the order of the jobs.

    They are forked: no thread may run, and no database be open, when this object is made.  They end when this process
    does, however it ends.  Where there may be no more processes they are fewer, or none.
    """

    def __init__(self, count: int, opened: Opened, flag: str) -> None:
        self._flag = flag  # that says how many
        self._pipes: deque[io.BufferedRWPair] = deque()  # the next one in turn first
        self._processes: list[int] = []
        self._busy: deque[io.BufferedRWPair] = deque()  # whose results are to come, the oldest first
        self._taken = threading.Lock()  # from begin to end
        self._failed = False
        if count > 1:  # one alone would only be waited for
            load_zstd()  # here: it is unpacked once, by what is there now
            with contextlib.suppress(OSError):
                while len(self._pipes) < count:
                    self._start(opened)

    def __bool__(self) -> bool:
        return bool(self._pipes)

    def _start(self, opened: Opened) -> None:
        import socket

        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = os.fork()
            if not process:
                self._serve(ours, theirs, opened)
            self._pipes.append(ours.makefile("rwb"))
            self._processes.append(process)

    def _serve(self, ours: socket.socket, theirs: socket.socket, opened: Opened) -> NoReturn:
        """Be one of them."""
        import signal

        try:
            for number in (signal.SIGINT, signal.SIGTERM):  # they reach all: the one that began them decides
                signal.signal(number, signal.SIG_IGN)
            ours.close()  # and those of the others: else they would not see the other end close
            for pipe in self._pipes:
                pipe.close()
            _serve_jobs(theirs.makefile("rwb"), opened)
        finally:
            os._exit(0)

    def begin(self, place: object) -> bool:
        """Have them work at a place until `end`; False where they are at another one, or cannot."""
        if not self._taken.acquire(blocking=False):
            return False
        with contextlib.suppress(RestoreError):
            for pipe in () if self._failed else self._pipes:
                self._put(pipe, (None, place))
            if self._pipes and not self._failed:
                return True
        self._taken.release()
        return False

    def end(self) -> None:
        """Have them leave the place, whose unfinished jobs are waited for: nothing is made there afterwards."""
        with contextlib.suppress(RestoreError):
            while self._busy and not self._failed:
                self._get()
            for pipe in () if self._failed else self._pipes:
                self._put(pipe, (None, None))
        if self._failed:  # the others may wait for the rest of a message
            self.close()
        self._taken.release()

    @property
    def full(self) -> bool:
        """Tell whether a result must be received before the next job is sent.

        Each has one job: with two, it and this process might wait for each other, both with more to send than fits.
        """
        return len(self._busy) == len(self._pipes)

    def send(self, job: object) -> None:
        """Give a job, which is not None, to the next process in turn."""
        pipe = self._pipes[0]
        self._pipes.rotate(-1)
        with self._noticing():  # an interruption after the job was sent, too
            self._busy.append(pipe)
            self._put(pipe, (job, None))

    def receive(self) -> Any:
        """Return the result of the oldest job; RestoreError where its process failed."""
        result = self._get()
        if isinstance(result, Failure):
            raise RestoreError(f"one of the processes that write files has failed: {result.message}")
        return result

    def _put(self, pipe: io.BufferedRWPair, message: object) -> None:
        import pickle

        with self._noticing():
            pickle.dump(message, pipe, pickle.HIGHEST_PROTOCOL)
            pipe.flush()

    def _get(self) -> Any:
        import pickle

        with self._noticing():
            return pickle.load(self._busy.popleft())

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        import pickle

        try:
            yield
        except BaseException as error:
            self._failed = True  # an interruption, too, cuts a message off
            if not isinstance(error, (EOFError, ConnectionError, pickle.UnpicklingError)):
                raise
            what = "one of the processes that write files was killed, perhaps for want of memory"
            raise RestoreError(f"{what}; try it again with {self._flag} 1") from None

    def close(self) -> None:
        """End them, when each is done with what it is at."""
        while self._pipes:
            with contextlib.suppress(OSError):  # a job for one that was killed
                self._pipes.pop().close()
        while self._processes:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._processes.pop(), 0)


# ---- how, and what of two snapshots differs ----


@dataclass(frozen=True)
class RestoreOptions:
    """How files are put back."""

    overwrite: bool = False
    private: bool = False  # as `latest` is: the owner's bits alone, no owners, no xattrs
    token: str = ""  # makes temporary names that no file has; the same one finds them again
    numeric: bool = False  # owners by number, not by name
    workers: Workers | None = None  # that make files, where there are enough of them


def open_root(path: str, options: RestoreOptions) -> int:
    """Open the folder below which files are put; `latest` as a symlink is nobody's wish."""
    return os.open(path, FOLDER_FLAGS if options.private else FOLDER_FLAGS & ~os.O_NOFOLLOW)


def compare_entries(old: Iterator[Entry], new: Iterator[Entry]) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Yield the entries of two snapshots side by side, None where one lacks the path."""
    left, right = next(old, None), next(new, None)
    while left or right:
        if left and right and (left.line == right.line or left.key == right.key):
            yield left, right
            left, right = next(old, None), next(new, None)
        elif right is None or (left and left.key < right.key):
            yield left, None
            left = next(old, None)
        else:
            yield None, right
            right = next(new, None)


def without_common(reader: Reader, old: Sequence[bytes], new: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the blocks of two snapshots but for those of both: these say the same of the same paths.

    One that tells of an error stays, as does one that cannot be read.
    """
    before, common = set(old), set()
    for digest in (digest for digest in new if digest in before):  # in their order: they share frames
        with contextlib.suppress(StoreError, FormatError):
            if b'"error"' not in reader.get(digest):
                common.add(digest)
    return [digest for digest in old if digest not in common], [digest for digest in new if digest not in common]


def find_entries(entries: Iterable[Entry], paths: Sequence[bytes], above: bool = False) -> Iterator[Entry]:
    """Yield the entries at or below `paths`, all where there are none; with `above` also the folders to them."""
    for entry in entries:
        try:
            path = entry.stat.path if paths else b""
        except FormatError:
            continue  # not of any path
        if not paths or any(is_at_or_below(path, p) or (above and is_at_or_below(p, path)) for p in paths):
            yield entry


def _write_sparse(fd: int, data: bytes, at: int) -> None:
    """Write what stands between pages of zeros."""
    view, zeros, first = memoryview(data), bytes(PAGE), 0
    for page in range(0, len(data), PAGE):
        end = min(page + PAGE, len(data))
        if data.startswith(zeros[: end - page], page):
            write_at(fd, view[first:page], at + first)
            first = end
    write_at(fd, view[first:], at + first)


@dataclass(frozen=True)
class Part:
    """Some chunks of a file, one after the other."""

    at: int  # offset of the first one
    chunks: Iterable[bytes | int]  # a number for that many chunks of zeros
    size: int  # of the whole file
    sparse: bool


def write_part(reader: Reader, part: Part, fd: int) -> int:
    """Write a part of a file, every chunk checked (I5), holes where it is sparse; returns where it ends."""
    at = part.at
    for chunk in part.chunks:
        if isinstance(chunk, int):
            at = min(at + chunk * CHUNK, part.size)  # a hole, whatever the file had there
            continue
        data = reader.get(chunk)
        if len(data) != min(CHUNK, part.size - at):
            raise StoreError(f"chunk {chunk.hex()} does not have the length that its file needs")
        if part.sparse:
            _write_sparse(fd, data, at)
        else:
            write_at(fd, data, at)
        at += len(data)
    return at


def check_end(end: int, size: int) -> None:
    """Raise StoreError where the chunks of a file of `size` bytes are not all of it."""
    if end != size:
        raise StoreError(f"the chunks of the file have {end} bytes, not {size}")


def end_content(fd: int, size: int) -> None:
    """Give a file that is written its size: there may be a hole at its end."""
    if os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)


def write_content(reader: Reader, content: Content, fd: int, sparse: bool) -> None:
    """Write a file's whole content."""
    check_end(write_part(reader, Part(0, list_chunks(reader, content), content.size, sparse), fd), content.size)
    end_content(fd, content.size)


def split_content(reader: Reader, content: Content, sparse: bool) -> Iterator[Part]:
    """Yield a file's content in parts; StoreError after the last one where they are not all of it."""
    at, chunks = 0, list_chunks(reader, content)
    while part := tuple(itertools.islice(chunks, PART_CHUNKS)):
        yield Part(at, part, content.size, sparse)
        at += CHUNK * sum(chunk if isinstance(chunk, int) else 1 for chunk in part)
        at = min(at, content.size)  # each of them as long as its place needs, or not to be written
    check_end(at, content.size)


def _read_stretches(reader: Reader, old: bytes, new: bytes, length: int) -> list[tuple[int, bytes]]:
    runs, pages = reader.runs(new), reader.pages(new)
    if sum(run.length for run in runs) != length:
        raise StoreError(f"chunk {new.hex()} does not have the length that its file needs")
    found = []
    for first, end in find_stretches(reader.pages(old), pages):
        data = reader.read_runs(slice_runs(runs, first * PAGE, end * PAGE))
        if hash_pages(data) != pages[first * PAGE_HASH : end * PAGE_HASH]:
            raise FormatError("other bytes than its pages had")
        found.append((first * PAGE, data))
    return found


def read_changes(reader: Reader, old: bytes | None, new: bytes, length: int) -> list[tuple[int, bytes]]:
    """Return offset and bytes of what chunk `new` has other than `old`, each page checked (I5)."""
    if old is not None:
        with contextlib.suppress(StoreError, FormatError):  # then whole, which tells where the damage is
            return _read_stretches(reader, old, new, length)
    data = reader.get(new)
    if len(data) != length:
        raise StoreError(f"chunk {new.hex()} does not have the length that its file needs")
    return [(0, data)]


def write_changes(reader: Reader, contents: tuple[Content, Content], base: int, fd: int) -> None:
    """Write a file's new content where its old one stands in the file `base`: only changed pages are read."""
    old, new = contents
    table = ChunkTable(reader, old)
    if not clone_file(base, fd):
        copy_range(base, fd, min(old.size, new.size), 0)
    os.ftruncate(fd, new.size)
    chunks = (
        one for c in list_chunks(reader, new) for one in (itertools.repeat(None, c) if isinstance(c, int) else (c,))
    )
    for number, chunk in enumerate(chunks):
        at = number * CHUNK
        length = min(CHUNK, new.size - at)
        if length <= 0:
            raise StoreError("the chunks of the file have more bytes than it has")
        if table.get(number) == chunk and (min(CHUNK, old.size - at) == length or (chunk is None and at >= old.size)):
            continue  # as it was, or in the hole that ftruncate has made
        changes = read_changes(reader, table.get(number), chunk, length) if chunk else [(0, bytes(length))]
        for offset, data in changes:
            write_at(fd, data, at + offset)


def _exists(folder: int, name: bytes) -> bool:
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def _safe_mode(mode: int, owned: bool) -> int:
    """Return the mode to set: never setuid or setgid for an owner who was not the file's."""
    return mode if owned else mode & ~(stat_bits.S_ISUID | stat_bits.S_ISGID)


@functools.lru_cache(maxsize=1000)
def _find_number(kind: str, name: str, number: int) -> int:
    import grp
    import pwd

    try:
        return int(pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid)
    except (KeyError, ValueError):  # nobody of this name, or no name
        return number


def find_owner(stat: Stat, numeric: bool) -> tuple[int, int]:
    """Return the user and group to set: by name where this machine has it, else by number."""
    if numeric:
        return stat.uid, stat.gid
    return _find_number("user", stat.user, stat.uid), _find_number("group", stat.group, stat.gid)


def _find_log(folder: int, name: bytes) -> bytes:
    """Return the name of a log that SQLite would play into the database `name` when it opens it; b"" where none is."""
    for end in (b"-wal", b"-journal"):
        try:
            fd = os.open(name + end, FILE_FLAGS, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError:
            return name + end  # what cannot be read is not known to be harmless
        try:
            if any(os.read(fd, 8)):  # empty, or its head overwritten with zeros: all that it held is in the database
                return name + end
        finally:
            os.close(fd)
    return b""


@contextlib.contextmanager
def unopened(folder: int, name: bytes, bits: int) -> Iterator[str]:
    """Yield a path that leads to what has a name now, of the kind of these bits, whatever gets the name meanwhile.

    Linux only.
    """
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if stat_bits.S_IFMT(os.fstat(fd).st_mode) != bits:
            raise OSError(errno.ESTALE, "replaced while it was restored")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


class Attributes:
    """Sets what a path has beside its content; counts what could not be set."""

    def __init__(self, options: RestoreOptions) -> None:
        self.options = options
        self.unset: dict[str, int] = {}  # what, and of how many paths

    def set_file(self, fd: int, stat: Stat, content: Content) -> None:
        """Set those of an open file."""
        if self.options.private:
            os.fchmod(fd, stat.mode & 0o700 | 0o400)
            os.utime(fd, ns=(stat.mtime, stat.mtime))
        else:
            self._set_open(fd, stat, content.xattrs)

    def set_folder(self, fd: int, stat: Stat) -> None:
        """Set those of an open folder, after all in it is at its place."""
        self._set_open(fd, stat, stat.xattrs)

    def _set_open(self, fd: int, stat: Stat, xattrs: Mapping[str, str]) -> None:
        owned = self._set_owner(stat, lambda u, g: os.fchown(fd, u, g))
        self._set_xattrs(fd, xattrs)
        os.fchmod(fd, _safe_mode(stat.mode, owned))
        os.utime(fd, ns=(stat.mtime, stat.mtime))

    def set_other(self, folder: int, name: bytes, stat: Stat) -> None:
        """Set those of a symlink, fifo or device, which are not opened."""
        if not self.options.private:
            owned = self._set_owner(stat, lambda u, g: os.chown(name, u, g, dir_fd=folder, follow_symlinks=False))
            if stat.kind != "symlink" and hasattr(os, "O_PATH") and os.path.exists("/proc/self/fd"):
                with unopened(folder, name, KIND_BITS[stat.kind]) as path:
                    self._set_xattrs(path, stat.xattrs)
                    os.chmod(path, _safe_mode(stat.mode, owned))
            else:
                self._set_xattrs(name_in(folder, name), stat.xattrs, follow=False)
                if stat.kind != "symlink":
                    os.chmod(name, _safe_mode(stat.mode, owned), dir_fd=folder)
        os.utime(name, ns=(stat.mtime, stat.mtime), dir_fd=folder, follow_symlinks=False)

    def _set_owner(self, stat: Stat, set_owner: Callable[[int, int], None]) -> bool:
        uid, gid = find_owner(stat, self.options.numeric)
        try:
            set_owner(uid, gid)
        except OSError:
            if (uid, gid) == (os.geteuid(), os.getegid()):
                return True
            self._count("owner")
            return False
        return True

    def _set_xattrs(self, target: int | str, xattrs: Mapping[str, str], follow: bool = True) -> None:
        there: list[str] = []
        with contextlib.suppress(OSError, AttributeError):  # no extended attributes here
            there = os.listxattr(target, follow_symlinks=follow)
        for name in there:
            if name in ACLS and name not in xattrs:  # come from the folder that it is put into
                try:
                    os.removexattr(target, name, follow_symlinks=follow)
                except OSError:
                    self._count(f"extended attribute {show(name)}")
        for name, value in xattrs.items():
            try:
                os.setxattr(target, name, base64.b64decode(value), follow_symlinks=follow)
            except (OSError, AttributeError, ValueError):  # also of base64 and of characters
                self._count(f"extended attribute {show(name)}")

    def _count(self, what: str, count: int = 1) -> None:
        self.unset[what] = self.unset.get(what, 0) + count

    def put_unset(self, unset: Mapping[str, int]) -> None:
        """Count what could not be set elsewhere."""
        for what, count in unset.items():
            self._count(what, count)


# ---- files under temporary names, made by this process or by others beside it ----


@dataclass(frozen=True)
class Making:
    """A whole file that is to be made."""

    entry: Entry
    temporary: bytes  # its name until it is complete and durable
    old: Entry | None = None  # what stands in its place, where that is known to be so

    def list_digests(self) -> list[bytes]:
        """Return what will be read, or what only looks like it."""
        return list_named(self.entry.read)


@dataclass(frozen=True)
class Filling:
    """A part that is to be written into a file which has its temporary name already."""

    path: bytes
    temporary: bytes
    part: Part

    def list_digests(self) -> list[bytes]:
        """Return what will be read."""
        return [chunk for chunk in self.part.chunks if isinstance(chunk, bytes)]


@dataclass(frozen=True)
class Ending:
    """A file whose parts are all written."""

    entry: Entry
    temporary: bytes


Step = Union[Making, Filling, Ending]


def explain_failure(error: Exception) -> Failure:
    """Return what an error means for the path that it was about."""
    if isinstance(error, (StoreError, FormatError)):
        return Failure(str(error), damaged=True)
    if isinstance(error, FileExistsError):
        return Failure("exists already and is left as it is; see --overwrite")
    if isinstance(error, OSError):
        return Failure(f"cannot be restored: {explain(error)}", number=error.errno or 0)
    return Failure(f"cannot be restored: {error}")


@dataclass(frozen=True)
class Made:
    """What became of some steps."""

    failures: Sequence[Failure | None]  # of each
    unset: Mapping[str, int]  # as in Attributes


def create_anew(temporary: bytes, folder: int) -> int:
    """Create a file, in place of what a restore left that was killed; returns its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(temporary, flags, 0o600, dir_fd=folder)
    except FileExistsError:
        os.unlink(temporary, dir_fd=folder)
        return os.open(temporary, flags, 0o600, dir_fd=folder)


class FileMaker:
    """Makes files under temporary names, below one folder."""

    def __init__(self, reader: Reader, folders: Folders, options: RestoreOptions) -> None:
        self.reader = reader
        self.folders = folders
        self._attributes = Attributes(options)

    def do(self, steps: Sequence[Making | Filling]) -> Made:
        """Take some steps, the places of all their chunks looked up together; tells which failed."""
        self.reader.look_up([digest for step in steps for digest in step.list_digests()])
        failures = [self._attempt(step) for step in steps]
        unset, self._attributes.unset = self._attributes.unset, {}
        return Made(failures, unset)

    def end(self, ending: Ending) -> Made:
        """Make a file complete whose parts are written."""
        failure = self._attempt(ending)
        unset, self._attributes.unset = self._attributes.unset, {}
        return Made([failure], unset)

    def _attempt(self, step: Step) -> Failure | None:
        try:
            if isinstance(step, Making):
                self.make(step)
            elif isinstance(step, Filling):
                self._fill(step)
            else:
                self._end(step)
        except (StoreError, FormatError, OSError, OverflowError) as error:
            return explain_failure(error)
        return None

    def make(self, making: Making) -> None:
        """Make a whole file; nothing is left of one that fails."""
        stat, content = making.entry.stat, making.entry.content
        folder, name = self.folders.parent(stat.path)
        fd = create_anew(making.temporary, folder)
        try:
            base = self._open_base(making.old, folder, name)
            if base >= 0 and making.old:
                try:
                    write_changes(self.reader, (making.old.content, content), base, fd)
                finally:
                    os.close(base)
            else:
                write_content(self.reader, content, fd, stat.sparse)
            self._attributes.set_file(fd, stat, content)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(making.temporary, dir_fd=folder)
            raise
        finally:
            os.close(fd)

    @staticmethod
    def _open_base(old: Entry | None, folder: int, name: bytes) -> int:
        """Return a descriptor of the file that stands there, if it is still what `old` says; else -1."""
        if old is None or old.stat.kind != "file" or old.content.size <= CHUNK or old.content.error or old.stat.sparse:
            return -1
        try:
            fd = os.open(name, FILE_FLAGS, dir_fd=folder)
        except OSError:
            return -1
        found = os.fstat(fd)
        if stat_bits.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (
            old.content.size,
            old.stat.mtime,
        ):
            return fd
        os.close(fd)
        return -1

    def _open(self, path: bytes, temporary: bytes) -> int:
        folder, _ = self.folders.parent(path)
        return os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)

    def _fill(self, filling: Filling) -> None:
        fd = self._open(filling.path, filling.temporary)
        try:
            write_part(self.reader, filling.part, fd)
        finally:
            os.close(fd)

    def _end(self, ending: Ending) -> None:
        stat, content = ending.entry.stat, ending.entry.content
        fd = self._open(stat.path, ending.temporary)
        try:
            end_content(fd, content.size)
            self._attributes.set_file(fd, stat, content)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Due:
    """A file that waits for its name, or a folder for its attributes."""

    path: bytes
    temporary: bytes = b""
    size: int = 0  # bytes
    folder: Stat | None = None
    step: Step | None = None  # to be taken before


@dataclass(frozen=True)
class Workplace:
    """Where files are made and from what: all that another process needs to know."""

    packs: str
    index: str
    root: str  # the folder below which they are made
    identity: tuple[int, int] | None  # of this folder
    options: RestoreOptions


@contextlib.contextmanager
def opened_maker(place: Workplace) -> Iterator[Callable[[Sequence[Making | Filling]], Made]]:
    """Open what is needed to take steps at a place."""
    with contextlib.ExitStack() as stack:
        folders = stack.enter_context(contextlib.closing(Folders(open_root(place.root, place.options))))
        if identify(folders.root) != place.identity:
            raise RestoreError(f"{show(place.root)} is another folder now")
        index = stack.enter_context(contextlib.closing(Index(place.index)))
        reader = stack.enter_context(contextlib.closing(Reader(place.packs, index, frames=MOST_SOURCES)))
        yield FileMaker(reader, folders, place.options).do


class StepQueue:
    """Has steps taken, here or by workers, and hands on what they were for in the order in which it came."""

    def __init__(
        self, maker: FileMaker, attributes: Attributes, place: str, hand_on: Callable[[Due, Failure | None], None]
    ) -> None:
        self._maker = maker
        self._place = place  # path of the folder below which files are made
        self._attributes = attributes  # which counts what could not be set
        self._hand_on = hand_on
        self._waiting: list[Due] = []
        self._size = 0  # bytes of these
        self._sent: deque[Sequence[Due]] = deque()
        self._to_ask = attributes.options.workers
        self._workers: Workers | None = None

    def put(self, due: Due) -> None:
        """Add the next one."""
        self._waiting.append(due)
        self._size += due.size
        if len(self._waiting) >= BATCH_FILES or self._size >= BATCH_BYTES:
            if self._to_ask:  # for less they do not pay
                self._ask(self._to_ask)
            self._send()

    def _ask(self, workers: Workers) -> None:
        reader, options = self._maker.reader, replace(self._attributes.options, workers=None)
        identity = identify(self._maker.folders.root)
        place = Workplace(reader.packs, reader.index.path, self._place, identity, options)
        if reader.index.is_shared and workers.begin(place):
            self._workers = workers
        self._to_ask = None

    def _send(self) -> None:
        while self._workers and self._workers.full:
            self._take(self._workers.receive())
        due, self._waiting, self._size = self._waiting, [], 0
        self._sent.append(due)
        steps = [one.step for one in due if isinstance(one.step, (Making, Filling))]
        if self._workers:
            self._workers.send(steps)
        else:
            self._take(self._maker.do(steps))

    def _take(self, made: Made) -> None:
        """Hand on what the oldest steps were for."""
        self._attributes.put_unset(made.unset)
        failures = iter(made.failures)
        for due in self._sent[0]:
            self._hand_on(due, next(failures) if isinstance(due.step, (Making, Filling)) else None)
        self._sent.popleft()

    def finish(self) -> None:
        """Hand on all."""
        self._send()
        while self._sent and self._workers:
            self._take(self._workers.receive())

    def close(self) -> Iterator[Due]:
        """Let the workers go; returns what was not handed on."""
        if self._workers:
            self._workers.end()
        return itertools.chain(*self._sent, self._waiting)


class Publisher:
    """Gives what is made its name, and folders their attributes, in their order, once it is durable."""

    def __init__(self, folders: Folders, attributes: Attributes, fail: Callable[[bytes, str], None]) -> None:
        self.folders = folders
        self.files = 0
        self.bytes = 0  # of these
        self.temporary: dict[bytes, bytes] = {}  # by path, of files with several names that are not there yet
        self.unpublished: set[bytes] = set()  # paths at which another file stands, if any
        self._attributes = attributes
        self._fail = fail
        self._due: list[Due] = []
        self._due_bytes = 0
        self._synced: list[Due] = []  # the due ones before, which `_syncing` is about
        self._syncing: Syncing | None = None

    def put(self, due: Due) -> None:
        """Add the next one, made."""
        self._due.append(due)
        self._due_bytes += due.size
        self.files += due.folder is None
        self.bytes += due.size
        if len(self._due) >= PUBLISH_FILES or self._due_bytes >= PUBLISH_BYTES:
            self._publish_synced()
            self._take_due()
            self._syncing = Syncing(self.folders.root)

    def _take_due(self) -> None:
        self._synced, self._due, self._due_bytes = self._due, [], 0

    def _publish_synced(self) -> None:
        """Give what is durable its names; a folder's time comes after all in it."""
        if self._syncing:
            self._syncing.wait()  # where it fails, nothing of it is ever published
        self._syncing = None
        for due in self._synced:
            self.temporary.pop(due.path, None)
            try:
                if due.folder:
                    self._attributes.set_folder(self.folders.open(due.path), due.folder)
                else:
                    self._publish(due.path, due.temporary)
            except OSError as error:
                what = "its owner, mode or time cannot be set" if due.folder else "cannot be put at its place"
                self._fail(due.path, f"{what}: {explain(error)}")
        self._synced = []  # at the end: what an interruption keeps from its name is removed

    def _publish(self, path: bytes, temporary: bytes) -> None:
        folder, name = self.folders.parent(path)
        try:
            publish(temporary, name, self._attributes.options.overwrite, folder)
        except BaseException:
            self.files -= 1
            self.unpublished.add(path)
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise

    def finish(self) -> None:
        """Publish all and make it durable."""
        self._publish_synced()
        sync_filesystem(self.folders.root)
        self._take_due()
        self._publish_synced()
        sync_filesystem(self.folders.root)

    def close(self) -> list[Due]:
        """End what it is at; returns what has no name yet."""
        if self._syncing:
            self._syncing.join()
        return self._synced + self._due


class FileWriter:
    """Puts entries below one folder, in their order; a file is complete there or absent."""

    def __init__(self, reader: Reader, root: str, options: RestoreOptions) -> None:
        self.reader = reader
        self.options = options
        self.folders = Folders(open_root(root, options))
        self.problems: list[Problem] = []
        self.damaged = False  # whether the store is at fault
        self.skipped = 0  # sockets, which their programs make
        self._token = options.token or os.urandom(16).hex()
        self._inside: list[Stat] = []  # the folders around the last path, whose times are set on leaving
        self._made: bytes | None = None  # the folder that was made last
        self._links = LinkTable()
        self._attributes = Attributes(options)
        self.published = Publisher(self.folders, self._attributes, self.fail)
        self._maker = FileMaker(reader, self.folders, options)
        self._queue = StepQueue(self._maker, self._attributes, root, self._hand_on)
        self._failed_parts: dict[bytes, Failure] = {}  # by path, of files whose other parts are not done yet

    def put(self, entry: Entry, old: Entry | None = None) -> None:
        """Put one entry; `old` is what stands there, where that is known to be so."""
        try:
            plain = entry.plain
            path = plain[0] if plain else entry.stat.path
        except FormatError as error:
            self.fail(b"", f"an entry is not as it should be: {error}", damaged=True)
            return
        while self._inside and not is_at_or_below(path, self._inside[-1].path):
            self._leave_folder()
        steps = self._list_due(entry, plain, old)
        while due := self._next(path, steps):
            self._queue.put(due)  # what fails here is not this path's alone

    def _next(self, path: bytes, steps: Iterator[Due]) -> Due | None:
        try:
            return next(steps, None)
        except (StoreError, FormatError, OSError, OverflowError) as error:
            self._note(path, explain_failure(error))
            return None

    def _note(self, path: bytes, failure: Failure) -> None:
        if failure.number in FULL:
            raise OSError(failure.number, os.strerror(failure.number))
        self.fail(path, failure.message, failure.damaged)

    def fail(self, path: bytes, message: str, damaged: bool = False) -> None:
        """Note what could not be put, and whether that is for damage in the store."""
        self.damaged |= damaged
        self.problems.append(Problem(show(path), show(message)))

    def _list_due(self, entry: Entry, plain: tuple[bytes, int] | None, old: Entry | None) -> Iterator[Due]:
        if plain:
            yield self._leave(entry, *plain, old)
            return
        stat, content = entry.stat, entry.content
        if stat.kind == "directory":
            self._put_folder(stat)
            if stat.error and not self.options.private:
                self.fail(stat.path, f"what is in it is not in this snapshot: {stat.error}")
        elif content.error or stat.error:
            self.fail(stat.path, f"is not in this snapshot: {content.error or stat.error}")
        elif stat.kind == "socket" or (self.options.private and stat.kind not in ("file", "symlink")):
            self.skipped += 1  # made by its program at each start; `latest` is for files
        elif stat.database and (log := self._find_log(stat.path)):
            what = f"SQLite would mix {show(log)} into it, the log of another version"
            self.fail(stat.path, f"{what}: stop what uses it, move that log away, then restore again")
        elif stat.kind != "file" or (stat.link_key and not self.options.private):
            yield self._make(entry, self._take_place(stat.path))
        elif content.size > PART_CHUNKS * CHUNK and old is None and self.options.workers:
            yield from self._list_parts(entry, self._take_place(stat.path))
        else:
            yield self._leave(entry, stat.path, content.size, old)

    def _find_log(self, path: bytes) -> bytes:
        """Return the name of a log that waits for a database at a path; b"" where none is."""
        folder, name = self.folders.parent(path, create=True)
        return b"" if self._is_new(path, name) else _find_log(folder, name)

    def _leave(self, entry: Entry, path: bytes, size: int, old: Entry | None) -> Due:
        """Leave a file to the queue."""
        temporary = self._take_place(path)
        return Due(path, temporary, size, step=Making(entry, temporary, old))

    def _take_place(self, path: bytes) -> bytes:
        """Return the temporary name for a path; FileExistsError where something stands at its place."""
        folder, name = self.folders.parent(path, create=True)
        if not (self.options.overwrite or self._is_new(path, name)) and _exists(folder, name):
            raise FileExistsError
        digest = hashlib.sha256(self._token.encode() + name).hexdigest()
        return f"{TEMPORARY}{digest[:24]}".encode("ascii")

    def _make(self, entry: Entry, temporary: bytes) -> Due:
        """Make at once what is no file, or has several names: the next one may follow."""
        stat = entry.stat
        self._unlink(stat.path, temporary)  # left by a restore that was killed
        try:
            if stat.link_key:
                self._make_linked(entry, stat.link_key, temporary)
            else:
                self._make_other(stat, temporary)
        except BaseException:
            self._unlink(stat.path, temporary)
            raise
        return Due(stat.path, temporary, entry.content.size)

    def _unlink(self, path: bytes, temporary: bytes) -> None:
        with contextlib.suppress(OSError):
            folder, _ = self.folders.parent(path)
            os.unlink(temporary, dir_fd=folder)

    def _make_other(self, stat: Stat, temporary: bytes) -> None:
        folder, _ = self.folders.parent(stat.path)
        if stat.kind == "symlink":
            os.symlink(stat.target, temporary, dir_fd=folder)
        elif stat.kind == "fifo":
            os.mkfifo(temporary, 0o600, dir_fd=folder)
        else:
            os.mknod(temporary, KIND_BITS[stat.kind] | 0o600, stat.rdev, dir_fd=folder)
        self._attributes.set_other(folder, temporary, stat)

    def _make_linked(self, entry: Entry, key: tuple[int, int], temporary: bytes) -> None:
        path = entry.stat.path
        if not self._link(entry, self._links.get(key) or b"", temporary):
            self._maker.make(Making(entry, temporary))
            self._links.put(key, path + b"\0" + entry.read)
        self.published.temporary[path] = temporary

    def _list_parts(self, entry: Entry, temporary: bytes) -> Iterator[Due]:
        """Leave a large file to the queue in parts, which are written side by side."""
        stat, content = entry.stat, entry.content
        folder, _ = self.folders.parent(stat.path)
        os.close(create_anew(temporary, folder))
        try:
            for part in split_content(self.reader, content, stat.sparse):
                filling = Filling(stat.path, temporary, part)
                yield Due(stat.path, temporary, CHUNK * len(filling.list_digests()), step=filling)
        except BaseException:
            self._unlink(stat.path, temporary)
            raise
        yield Due(stat.path, temporary, content.size, step=Ending(entry, temporary))

    def _link(self, entry: Entry, known: bytes, temporary: bytes) -> bool:
        """Make another name of a file put before; False where there is none, or of another content."""
        first, _, content = known.partition(b"\0")
        if content != entry.read or first in self.published.unpublished:
            return False
        try:
            first_folder, first_name = self.folders.parent(first)
            source = os.dup(first_folder)
            try:
                folder, _ = self.folders.parent(entry.stat.path)
                name = self.published.temporary.get(first, first_name)
                os.link(name, temporary, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(source)
        except OSError:
            return False  # a filesystem without links, or the first name cannot be reached: a file of its own
        return True

    def _put_folder(self, stat: Stat) -> None:
        folder, name = self.folders.parent(stat.path, create=True)
        existed = _exists(folder, name)
        self.folders.open(stat.path, create=True)
        if not self.options.private and (not existed or self.options.overwrite):
            self._inside.append(stat)
            self._made = self._made if existed else stat.path

    def _is_new(self, path: bytes, name: bytes) -> bool:
        """Tell whether a path lies in the folder that was made last: nothing of others is there yet."""
        return self._made is not None and path[: -len(name)] == self._made + b"/"

    def _leave_folder(self) -> None:
        stat = self._inside.pop()
        self._queue.put(Due(stat.path, folder=stat))

    # -- names --

    def _hand_on(self, due: Due, failure: Failure | None) -> None:
        """Give what is made its name later."""
        if isinstance(due.step, Filling):
            if failure:
                self._failed_parts[due.path] = failure
            return
        if isinstance(due.step, Ending):
            failure = self._failed_parts.pop(due.path, None) or self._end(due.step)
        if failure:
            self._unlink(due.path, due.temporary)
            self._note(due.path, failure)
        else:
            self.published.put(Due(due.path, due.temporary, due.size, due.folder))  # without what it was made of

    def _end(self, ending: Ending) -> Failure | None:
        made = self._maker.end(ending)
        self._attributes.put_unset(made.unset)
        return made.failures[0]

    def finish(self) -> None:
        """Publish all and make it durable."""
        while self._inside:
            self._leave_folder()
        self._queue.finish()
        self.published.finish()
        for what, count in self._attributes.unset.items():
            sentence = f"{what} of {count} paths could not be set, for want of rights or of support"
            self.problems.append(Problem("", sentence))

    def close(self) -> None:
        """Close all; what is not published is removed."""
        for due in (*self._queue.close(), *self.published.close()):
            if due.folder is None:
                self._unlink(due.path, due.temporary)
        self._links.close()
        self.folders.close()


def restore_snapshot(
    reader: Reader, snapshot: Snapshot, paths: Sequence[bytes], to: str, options: RestoreOptions
) -> FileWriter:
    """Restore the paths, or all, below the folder `to`; returns the writer with what it did.

    A path at which nothing stands is one of the writer's problems.  Raises RestoreError while another process
    restores into the same folder.
    """
    os.makedirs(to, exist_ok=True)
    if not options.token:  # the same for the same restore: it finds what a killed one left
        options = replace(options, token=f"{snapshot.identity}/{snapshot.folder}/{snapshot.name}")
    writer = FileWriter(reader, to, options)
    missing = set(paths)
    try:
        lock_folder(writer.folders.root)  # two with the same temporary names would write into each other's files
    except BlockingIOError:
        writer.close()
        raise RestoreError(f"another restore is writing to {show(to)}; wait for it, or name another --to") from None

    def on_damage(error: BackupError) -> None:
        writer.fail(b"", f"some entries are lost: {error}", damaged=True)

    try:
        entries = find_entries(list_entries(reader, snapshot.blocks, on_damage), paths, above=True)
        for entry in entries:
            writer.put(entry)
            if missing:
                missing -= {path for path in missing if is_at_or_below(entry.stat.path, path)}
        writer.finish()
    finally:
        writer.close()
    for path in sorted(missing):
        writer.fail(path, f"is not in the snapshot {snapshot.name}")
    return writer


# ---- latest: the newest version as plain files ----


def _remove_one(folders: Folders, path: bytes, kind: str) -> dict[bytes, Problem]:
    """Remove what is of this kind; returns the problem by its path."""
    try:
        folder, name = folders.parent(path)
        if stat_bits.S_IFMT(os.lstat(name, dir_fd=folder).st_mode) != KIND_BITS[kind]:
            return {}  # something else by now: of a newer snapshot, or not ours
        if kind == "directory":
            os.rmdir(name, dir_fd=folder)
            folders.forget()  # one of the same name may come
        else:
            os.unlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # gone: done in an earlier run
            return {path: Problem(show(b"latest/" + path), f"cannot be removed: {explain(error)}")}
    return {}


def _is_there(folders: Folders, path: bytes) -> bool:
    try:
        folder, name = folders.parent(path)
        os.lstat(name, dir_fd=folder)
    except OSError as error:
        return error.errno not in GONE
    return True


def _looks_equal(left: Entry, right: Entry) -> bool:
    """Tell whether two entries are the same in `latest`, which knows content, mode, time and target."""
    if left.line == right.line and left.read == right.read:
        return True
    one, two = left.stat, right.stat
    if (one.kind, one.mode, one.target) != (two.kind, two.mode, two.target):
        return False
    if one.kind == "directory":
        return True
    same = (left.content.chunks, left.content.lists, left.content.size, left.content.error)
    return one.mtime == two.mtime and same == (
        right.content.chunks,
        right.content.lists,
        right.content.size,
        right.content.error,
    )


def _hides(left: Entry | None, right: Entry) -> bool:
    """Tell whether an entry does not say what is there now: of a folder not listed, or of what could not be looked at.

    The latter is listed as a file, whatever it is.
    """
    is_folder = right.stat.kind == "directory"
    return bool(right.stat.error) and (is_folder or (left is not None and left.stat.kind != right.stat.kind))


def _thin(older: tuple[str, ...]) -> tuple[str, ...]:
    """Return the snapshots to be kept in mind: the first had most of what was not seen since, the last the rest."""
    half = OLDER_KEPT // 2
    return older if len(older) <= OLDER_KEPT else older[:half] + older[-half:]


class Latest:
    """The folder `latest` of a node, made to show one snapshot after the other."""

    def __init__(self, folder: NodeFolder, reader: Reader, workers: Workers | None = None) -> None:
        self.folder = folder
        self.reader = reader
        self.workers = workers
        self.path = os.path.join(folder.path, "latest")

    def load(self) -> LatestState:
        """Return what it shows; nothing where there is no such folder."""
        if not os.path.isdir(self.path) or os.path.islink(self.path):
            return LatestState()
        return self.folder.load_latest()

    def _blocks(self, name: str) -> tuple[bytes, ...]:
        """Return the blocks of a snapshot; none where it is lost: then all counts as new."""
        with contextlib.suppress(OSError, FormatError):
            return self.folder.load_snapshot(name).blocks if name else ()
        return ()

    def update(self, snapshot: Snapshot) -> list[Problem]:
        """Make `latest` show `snapshot`; a run that was interrupted is done again first.

        Raises FullStore where the disk has no room for it.
        """
        try:
            state = self.load()
            if state.next:
                state = self._redo(state)
            # A token that is left is of files that could not be removed: under it they are found again.
            state = replace(state, next=snapshot.name, token=state.token or os.urandom(16).hex())
            return self._apply(state, snapshot)
        except (OSError, BackupError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise refuse(error, "") from None
            reason = explain(error) if isinstance(error, OSError) else str(error)
            return [Problem("latest", f"could not be brought up to date: {reason}")]

    def _redo(self, state: LatestState) -> LatestState:
        """Finish what was interrupted, or failed, so that its files are known."""
        try:
            again = self.folder.load_snapshot(state.next)
        except (OSError, FormatError):
            return LatestState(token=state.token, older=_thin(replace(state, next="").snapshots))
        try:
            done = not self._apply(state, again)
        except OSError as error:
            if error.errno not in FULL:
                raise
            done = False  # what is newer may need less room
        if not done:  # what is there is of either: all counts as new
            return LatestState(token=state.token, older=_thin(state.snapshots))
        return replace(state, snapshot=state.next, next="", token="", older=self.load().older)

    def _apply(self, state: LatestState, snapshot: Snapshot) -> list[Problem]:
        self.folder.save_latest(state)
        make_folder(self.path)
        options = RestoreOptions(overwrite=True, private=True, token=state.token, workers=self.workers)
        writer = FileWriter(self.reader, self.path, options)
        kept: dict[bytes, Problem] = {}
        unread = False
        try:
            for name in (*state.older, state.snapshot):
                changed = without_common(self.reader, self._blocks(name), snapshot.blocks)
                found, stays = self._remove(writer, self._compare(*changed), bool(snapshot.missing))
                kept.update(found)
                unread = unread or stays
            # A folder of an older snapshot that was not empty may have gone with what a newer one had in it.
            problems = [problem for path, problem in kept.items() if _is_there(writer.folders, path)]
            due = (
                (right, left)
                for left, right in self._compare(*changed)  # with the last one, which it shows
                if right and (left is None or not _looks_equal(left, right)) and not right.content.error
            )
            for entry, old in due:
                writer.put(entry, old)
            writer.finish()
        finally:
            writer.close()
        older = _thin(tuple(filter(None, (*state.older, state.snapshot)))) if unread else ()
        problems += writer.problems
        if not problems:  # else it is tried again
            self.folder.save_latest(LatestState(snapshot.name, older=older))
        return problems

    def _compare(self, old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[tuple[Entry | None, Entry | None]]:
        # Old entries that are lost count as absent: what is new is written all the same.
        before = list_entries(self.reader, old, on_damage=lambda error: None)
        return compare_entries(before, list_entries(self.reader, new))

    def _remove(
        self, writer: FileWriter, pairs: Iterator[tuple[Entry | None, Entry | None]], everything_stays: bool
    ) -> tuple[dict[bytes, Problem], bool]:
        """Remove what the old snapshot had and the new one has not, or has as something else.

        Returns the problems by their paths, and whether there are folders that could not be listed: what they
        held is left, as is all where a root is missing, perhaps a disk that is not mounted.
        """
        problems: dict[bytes, Problem] = {}
        folders: list[bytes] = []  # emptied, innermost last
        unread = b"" if everything_stays else None
        for left, right in pairs:
            if unread != b"" and right and b'"error"' in right.line and _hides(left, right):
                unread = right.stat.path
            if left is None or (right and (right.line == left.line or right.stat.kind == left.stat.kind)):
                continue
            path = left.stat.path
            if unread is not None and is_at_or_below(path, unread):
                continue
            while folders and not is_at_or_below(path, folders[-1]):
                problems.update(_remove_one(writer.folders, folders.pop(), "directory"))
            if left.stat.kind == "directory":
                folders.append(path)
            else:
                problems.update(_remove_one(writer.folders, path, left.stat.kind))
        while folders:
            problems.update(_remove_one(writer.folders, folders.pop(), "directory"))
        return problems, unread is not None


# ---- what was restored, or stands in `latest`, compared with the store ----


def has_content(reader: Reader, content: Content, fd: int) -> bool:
    """Tell whether an open file has this content, by its digests."""
    if os.fstat(fd).st_size != content.size:
        return False
    at = 0
    for chunk in list_chunks(reader, content):
        end = min(at + chunk * CHUNK, content.size) if isinstance(chunk, int) else 0
        if end and find_data(fd, at, content.size) >= end:
            at = end
            continue
        for digest in itertools.repeat(b"", chunk) if isinstance(chunk, int) else (chunk,):
            data = read_range(fd, CHUNK, at)
            if data.count(0) != len(data) if not digest else digest_pages(hash_pages(data)) != digest:
                return False
            at += len(data)
    return at == content.size


def _differs(reader: Reader, folders: Folders, entry: Entry) -> str:
    """Return what is wrong with the file or link that stands for an entry; "" where nothing is."""
    try:
        folder, name = folders.parent(entry.stat.path)
        if entry.stat.kind == "symlink":
            return "" if os.readlink(name, dir_fd=folder) == entry.stat.target else "points elsewhere"
        fd = os.open(name, FILE_FLAGS, dir_fd=folder)
        try:
            return "" if has_content(reader, entry.content, fd) else "differs"
        finally:
            os.close(fd)
    except OSError as error:
        return f"cannot be read: {explain(error)}"


def verify_latest(folder: NodeFolder, reader: Reader, wanted: Callable[[Entry], bool]) -> list[Problem]:
    """Compare the wanted files of `latest` with the snapshot that it shows; what it does not show yet is no problem."""
    latest = Latest(folder, reader)
    state = latest.load()
    problems: list[Problem] = []
    if not state.snapshot or state.next:
        return problems
    with contextlib.suppress(OSError, FormatError):
        blocks = folder.load_snapshot(state.snapshot).blocks
        with contextlib.closing(Folders(os.open(latest.path, FOLDER_FLAGS))) as folders:
            for entry in list_entries(reader, blocks, on_damage=lambda error: None):
                if entry.stat.kind in ("file", "symlink") and not entry.content.error and wanted(entry):
                    try:
                        what = _differs(reader, folders, entry)
                    except (StoreError, FormatError):
                        continue  # the store's damage, told elsewhere
                    if what:
                        problems.append(Problem(show(entry.stat.path), f"{what}, other than in {state.snapshot}"))
    return problems if latest.load() == state else []  # a sweep has changed it meanwhile


def repair_latest(folder: NodeFolder, reader: Reader) -> list[Problem]:
    """Write all files of `latest` anew from the snapshot that it shows."""
    state = folder.load_latest()
    folder.save_latest(LatestState(older=_thin(state.snapshots)))
    return Latest(folder, reader).update(folder.load_snapshot(state.snapshot))


# ---- drill: a restore for practice ----


@dataclass(frozen=True)
class Drill:
    """What a drill did with one node."""

    node: str
    snapshot: str = ""
    files: int = 0  # restored and compared
    size: int = 0  # bytes of these
    database: str = ""  # path of the newest SQLite database, which was checked
    problems: tuple[Problem, ...] = ()
    hindered: str = ""  # why nothing could be restored, for which the store is not at fault
    succeeded: int = 0  # ns, when a drill of this node succeeded last; 0 for never


def choose_files(entries: Iterable[Entry], count: int) -> list[Entry]:
    """Return some files by chance (Vitter's algorithm R), and the database that was written last."""
    import random

    chance = random.SystemRandom()
    chosen: list[Entry] = []
    newest: Entry | None = None
    seen = 0
    for entry in entries:
        if b'","kind":"file"' in entry.line and not entry.content.error and entry.stat.kind == "file":
            seen += 1
            place = seen - 1 if seen <= count else chance.randrange(seen)
            if place < count:
                chosen[place : place + 1] = [entry]
            if entry.stat.database and (newest is None or entry.stat.mtime > newest.stat.mtime):
                newest = entry
    return [entry for entry in chosen if newest is None or entry.key != newest.key] + ([newest] if newest else [])


def _count_bytes(reader: Reader, entry: Entry) -> int:
    """Return how many bytes on the disk a file takes, at most; of one that has holes all but these."""
    if not entry.stat.sparse:
        return entry.content.size
    return CHUNK * sum(isinstance(chunk, bytes) for chunk in list_chunks(reader, entry.content))


def drill_node(reader: Reader, snapshot: Snapshot, to: str, count: int) -> Drill:
    """Restore a sample of a snapshot below the folder `to`, compare it, and check the newest database.

    Raises RestoreError where there is no room for it.
    """
    lost: list[Problem] = []
    entries = list_entries(reader, snapshot.blocks, lambda error: lost.append(Problem("", str(error))))
    chosen = choose_files(entries, count)
    paths = [entry.stat.path for entry in chosen]
    size, free = sum(_count_bytes(reader, entry) for entry in chosen), count_free(to)
    if size > free:
        raise RestoreError(f"the drill needs {format_size(size)}, {to} has {format_size(free)}; name another --to")
    if paths:
        done = restore_snapshot(reader, snapshot, paths, to, RestoreOptions(private=True))
        lost += [problem for problem in done.problems if problem.path]
        with contextlib.closing(Folders(os.open(to, FOLDER_FLAGS))) as folders:
            differing = ((entry, _differs(reader, folders, entry)) for entry in chosen)
            lost += [Problem(show(entry.stat.path), f"was restored, and {what}") for entry, what in differing if what]
    database = next((e for e in chosen[-1:] if e.stat.database and e.content.grade != "torn"), None)
    if database:
        said = check_database(os.path.join(to, os.fsdecode(database.stat.path)), "integrity_check")
        lost += [Problem(show(database.stat.path), f"integrity_check says: {said}")] if said else []
    shown = show(database.stat.path) if database else ""
    return Drill(snapshot.folder, snapshot.name, len(chosen), size, shown, tuple(lost))


# ==== 12. REPORT: records in, text and JSON out ====


def format_span(seconds: float) -> str:
    """Return a span of time as people read it, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{int(seconds)} s"


def format_time(moment: int) -> str:
    """Return a moment (ns) in local time."""
    import datetime

    return datetime.datetime.fromtimestamp(moment // 10**9).strftime("%Y-%m-%d %H:%M:%S")


def format_row(widths: Iterable[int], cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [format_row(widths, row) for row in rows]


def format_totals(totals: Totals) -> str:
    """Return what a pull did, in one phrase."""
    parts = [f"{totals.files} files ({format_size(totals.size)})", f"{totals.changed} changed"]
    if totals.others:
        parts.append(f"{totals.others} links and special files")
    if totals.deleted:
        parts.append(f"{totals.deleted} deleted")
    if totals.failed:
        parts.append(f"{totals.failed} failed")
    if totals.torn:
        parts.append(f"{totals.torn} torn")
    return ", ".join(parts) + f"; sent {format_size(totals.sent)}, stored {format_size(totals.added)}"


def tell_alarm(snapshot: Snapshot) -> str:
    """Return what the user should know of a snapshot that looks as if data were lost."""
    what = f"this looks as if data were lost: {snapshot.alarm}"
    return f"{what}; the snapshots before it are kept until `release {snapshot.folder}`"


def format_node(report: NodeReport) -> list[str]:
    """Return the lines of one node: what became of it, then its problems."""
    others = f" (also at {', '.join(report.addresses[1:])})" if len(report.addresses) > 1 else ""
    head = f"{report.address}{others}: "
    if report.missing:
        name = (
            "" if any(f"{address}:".startswith(f"{report.folder}:") for address in report.addresses) else report.folder
        )
        what = show(report.error) or "does not answer"
        seen = f"{format_span(report.missing / 1e9)} ago"
        if report.missing < 0:
            seen = f"{format_span(-report.missing / 1e9)} from now: the clock was wrong then, or is so now"
        return [f"{name}{': ' if name else ''}{head}{what}; last seen {seen}"]
    snapshot = report.snapshot
    if snapshot is None:
        return [f"{head}{show(report.error) or report.state}"]
    span = format_span((snapshot.finished - snapshot.started) / 1e9)
    head += f"{snapshot.grade}, {format_totals(snapshot.totals)} in {span}"
    if report.error:
        head += f"; cut off: {show(report.error)}"
    if report.note:
        head += f"; {report.note}"
    if snapshot.alarm:
        head += f"; {tell_alarm(snapshot)}"
    shown = [*snapshot.problems, *report.problems]
    lines = [f"  {p.path}: {p.message}" if p.path else f"  {p.message}" for p in shown[:20]]
    if len(shown) > 20:
        lines.append(f"  and {len(shown) - 20} more; all stand in {snapshot.folder}/snapshots/{snapshot.name}.json")
    return [head, *lines]


def format_sweep(report: SweepReport) -> list[str]:
    """Return the last lines of a sweep: who was there without a node, and the verdict."""
    strangers = [node for node in report.nodes if node.state == STRANGER and not node.folder]
    silent = sum(node.state == SILENT and not node.folder for node in report.nodes)
    copied = [node for node in report.nodes if node.snapshot and not node.error]
    good = sum(node.exit_code == 0 for node in copied)
    lines = [f"alive, but no node: {node.address} ({show(node.error)})" for node in strangers[:10]]
    if len(strangers) > 10:
        lines.append(f"alive, but no node: {len(strangers) - 10} more")
    lines += [f"the store: {problem}" for problem in report.problems]
    bad = sum(node.exit_code != 0 for node in report.nodes)
    phrase = f"{good} of {len(copied)} copies good" if copied else "no copy made"
    trouble = f", {bad} with problems" if bad else ""
    span = format_span((report.finished - report.started) / 1e9)
    return [*lines, f"sweep of {format_time(report.started)}: {phrase}{trouble}, {silent} silent, {span}"]


def format_prune(plan: PrunePlan) -> list[str]:
    """Return what a prune would do, or did: each snapshot with the reason why it stays or goes."""
    lines = []
    for node, choices in plan.choices.items():
        rows = [
            [choice.snapshot.name, choice.snapshot.grade, "keep" if choice.keep else "remove", choice.reason]
            for choice in choices
        ]
        lines += [f"{node}:", *(f"  {line}" for line in format_table(rows))]
    if plan.leftovers.paths:
        lines.append(f"remove {len(plan.leftovers.paths)} files that interrupted runs have left")
    lines += [f"purge from the trash: {t.snapshot.folder}/{t.snapshot.name}" for t in plan.expired]
    if plan.dead:
        lines.append(f"drop {len(plan.dead)} packs ({format_size(sum(use.size for use in plan.dead))})")
    if plan.sparse:
        sizes = [format_size(sum(getattr(use, name) for use in plan.sparse)) for name in ("size", "live")]
        lines.append(f"rewrite {len(plan.sparse)} packs ({sizes[0]}, of which {sizes[1]} are in use)")
    return lines


def format_pruned(report: PruneReport) -> str:
    """Return in one line what a prune did."""
    packs = f"{report.dropped} packs dropped, {report.rewritten} rewritten, {format_size(max(0, report.freed))} freed"
    return f"prune: {report.removed} snapshots removed, {report.purged} purged from the trash, {packs}"


def describe_prune(plan: PrunePlan, report: PruneReport) -> dict[str, Any]:
    """Return a prune for JSON."""
    return {
        "nodes": {
            node: [{"snapshot": c.snapshot.name, "keep": c.keep, "reason": c.reason} for c in choices]
            for node, choices in plan.choices.items()
        },
        "expired": [[trashed.snapshot.folder, trashed.snapshot.name] for trashed in plan.expired],
        "dead": {use.name: use.size for use in plan.dead},
        "sparse": {use.name: [use.size, use.live] for use in plan.sparse},
        **vars(report),
    }


def format_harm(harm: Harm) -> Iterator[str]:
    """Yield one line for each file of which some version is lost."""
    for node, path, snapshots in harm.list_files():
        count = f" and {len(snapshots) - 3} more" if len(snapshots) > 3 else ""
        what = show(path) if path else "all files of a block of entries"
        yield f"lost: {node}: {what}, in {', '.join(snapshots[:3])}{count}"


def format_damage(report: VerifyReport) -> list[str]:
    """Return one line for each thing that is damaged, but for the files of nodes."""
    lines = []
    for check in report.damaged:
        count = f"; {len(check.bad)} of its chunks are damaged" if check.size or check.bad else ""  # else not read now
        lines.append(f"pack {check.name}: {check.problem}{count}")
    lines += [f"pack {name} is lost" for name in report.lost]
    lines += [f"{path}: {problem}" for path, problem in report.files]
    return lines + list(report.problems)


def format_verified(report: VerifyReport) -> str:
    """Return in one line how much was read."""
    index = f"; the index was made anew: {report.index}" if report.index else ""
    return f"verify: {report.checked} of {report.packs} packs read ({format_size(report.size)}){index}"


def describe_verified(report: VerifyReport, harm: Harm) -> dict[str, Any]:
    """Return what verify found for JSON."""
    return {
        "packs": report.packs,
        "checked": report.checked,
        "size": report.size,
        "index": report.index,
        "damaged": {check.name: check.problem for check in report.damaged},
        "lost": list(report.lost),
        "files": dict(report.files),
        "problems": list(report.problems),
        "harmed": [{"node": n, "path": encode_path(p), "snapshots": names} for n, p, names in harm.list_files()],
        "marked": not harm.new,
    }


def format_repair(plan: RepairPlan) -> list[str]:
    """Return what a repair would do."""
    lines = [f"pack {check.name}: save what is sound in it, put it aside ({check.problem})" for check in plan.packs]
    lines += [f"pack {name}: mark what was in it and nowhere else as lost" for name in plan.lost]
    return lines + [f"{path}: make it anew or put it aside ({problem})" for path, problem in plan.files]


def format_repaired(report: RepairReport) -> list[str]:
    """Return what a repair did."""
    lines = [f"put aside: {path}" for path in report.aside]
    if report.lost:
        what = f"{report.lost} chunks are lost; the next copy of their nodes asks for them again"
        lines.append(f"{what}, and `verify` names the files")
    return [*lines, f"repair: {report.packs} packs mended, {format_size(report.saved)} saved from them"]


def format_drill(drill: Drill, span: float) -> list[str]:
    """Return what a drill did with one node, in `span` seconds."""
    last = f"; the last drill that succeeded was at {format_time(drill.succeeded)}" if drill.succeeded else ""
    if drill.hindered:
        return [f"drill: {drill.node}: not made: {drill.hindered}{last}"]
    if drill.problems:
        head = f"drill: {drill.node}: FAILED with {drill.snapshot}{last or '; none has succeeded yet'}"
        return [head, *(f"  {p.path}: {p.message}" if p.path else f"  {p.message}" for p in drill.problems[:20])]
    database = f", integrity_check of {drill.database} ok" if drill.database else ""
    what = f"{drill.files} files ({format_size(drill.size)}) of {drill.snapshot} restored and compared{database}"
    return [f"drill: {drill.node}: {what}, {format_span(span)}"]


def describe_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot for JSON, without its blocks."""
    return {
        "name": snapshot.name,
        "sequence": snapshot.sequence,
        "started": snapshot.started,
        "finished": snapshot.finished,
        "grade": snapshot.grade,
        "cut_off": snapshot.cut_off,
        "alarm": snapshot.alarm,
        "roots": list(snapshot.roots),
        **vars(snapshot.totals),
        "problems": [vars(problem) for problem in snapshot.problems],
    }


def describe_node(report: NodeReport) -> dict[str, Any]:
    """Return the report of a node for JSON."""
    return {
        "address": report.address,
        "addresses": list(report.addresses),
        "state": report.state,
        "folder": report.folder,
        "error": report.error,
        "note": report.note,
        "exit_code": report.exit_code,
        "missing_seconds": report.missing // 10**9,
        "snapshot": describe_snapshot(report.snapshot) if report.snapshot else None,
        "problems": [vars(problem) for problem in report.problems],
    }


def describe_sweep(report: SweepReport) -> dict[str, Any]:
    """Return the report of a sweep for JSON."""
    return {
        "started": report.started,
        "finished": report.finished,
        "exit_code": report.exit_code,
        "nodes": [describe_node(node) for node in report.nodes],
        "problems": list(report.problems),
    }


def format_mode(stat: Stat) -> str:
    """Return kind and permissions as `ls -l` shows them."""
    return stat_bits.filemode(KIND_BITS[stat.kind] | stat.mode)


def format_entry(entry: Entry) -> dict[str, str]:
    """Return the cells of one entry's line in a listing, by the names of the columns."""
    stat, content = entry.stat, entry.content
    said = content.error or stat.error
    return {
        "MODE": format_mode(stat),
        "OWNER": f"{show(stat.user) or stat.uid}:{show(stat.group) or stat.gid}",
        "SIZE": str(content.size) if stat.kind == "file" else "-",
        "TIME": format_time(stat.mtime),
        "GRADE": content.grade or "-",
        "PATH": show(stat.path)
        + (f" -> {show(stat.target)}" if stat.target else "")
        + (f" ({show(said)})" if said else ""),
    }


def describe_entry(entry: Entry) -> dict[str, str]:
    """Return the same for JSON, each thing by itself and as it is."""
    stat, said = entry.stat, entry.content.error or entry.stat.error
    more = {"TARGET": encode_path(stat.target), "ERROR": said}
    return {
        **format_entry(entry),
        "PATH": encode_path(stat.path),
        **{name: value for name, value in more.items() if value},
    }


# ---- systemd units ----

SANDBOX = (  # of both roles; systemd.exec(5)
    *("NoNewPrivileges=yes", "ProtectSystem=strict", "PrivateDevices=yes", "ProtectKernelTunables=yes"),
    *("ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectClock=yes"),
    *("ProtectHostname=yes", "ProtectProc=invisible", "ProcSubset=pid", "LockPersonality=yes"),
    *("RestrictNamespaces=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "MemoryDenyWriteExecute=yes"),
    *("RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX", "SystemCallArchitectures=native"),
    *("SystemCallFilter=@system-service", "SystemCallFilter=~@privileged @resources", "SystemCallErrorNumber=EPERM"),
    *("UMask=0077", "TasksMax=64", "RemoveIPC=yes", "CacheDirectory=zbackup", "CacheDirectoryMode=0700"),
)
ONLINE = ("Wants=network-online.target", "After=network-online.target")

TIMER_UNIT = (
    "# /etc/systemd/system/zbackup-server.timer, beside what `unit server --once ...` prints",
    *("[Unit]", "Description=zbackup: the times of the sweeps", ""),
    *("[Timer]", "OnCalendar=hourly", "RandomizedDelaySec=5min", "Persistent=yes", ""),
    *("[Install]", "WantedBy=timers.target"),
)


def quote_unit_word(word: str) -> str:
    """Return a word as ExecStart= of systemd.service(5) takes it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$").replace("\n", "\\n")
    return escaped if re.fullmatch(r"[A-Za-z0-9_./:=@,+%$-]+", escaped) else f'"{escaped}"'


@dataclass(frozen=True)
class Service:
    """What a unit starts, and where."""

    command: tuple[str, ...]
    folder: str  # where relative names start
    store: str = ""  # of a server
    once: bool = False  # a server that a timer starts


def _format_unit(service: Service, head: Sequence[str], rules: Sequence[str], target: str) -> list[str]:
    start = "ExecStart=" + " ".join(map(quote_unit_word, service.command))
    place = f"WorkingDirectory={service.folder.replace('%', '%%')}"
    install = ["", "[Install]", f"WantedBy={target}"] if target else []
    return [*head, *ONLINE, "", "[Service]", start, place, *rules, *SANDBOX, *install]


def format_node_unit(service: Service) -> list[str]:
    """Return the unit of a node: it may read all files, and write only its own state."""
    head = ["# /etc/systemd/system/zbackup-node.service", "[Unit]", "Description=zbackup node"]
    rules = ["Restart=always", "RestartSec=10", "DynamicUser=yes", "StateDirectory=zbackup", "StateDirectoryMode=0700"]
    rules += ["AmbientCapabilities=CAP_DAC_READ_SEARCH", "CapabilityBoundingSet=CAP_DAC_READ_SEARCH"]
    rules += ["ProtectHome=read-only", "MemoryMax=1G", f"LimitNOFILE={DESCRIPTORS}"]
    return _format_unit(service, head, rules, "multi-user.target")


def format_server_unit(service: Service) -> list[str]:
    """Return the unit of a server: it may write its store, and has no rights beside."""
    head = [
        "# /etc/systemd/system/zbackup-server.service; once before:",
        "#   useradd --system zbackup",
        f"#   install -d -m 700 -o zbackup {service.store}",
        *("[Unit]", "Description=zbackup server"),
        f"RequiresMountsFor={quote_unit_word(service.store).replace('$$', '$')}",
    ]
    at_home = any(
        path.startswith(("/home/", "/root/")) for path in (service.store, f"{service.folder}/", *service.command)
    )
    rules = ["Type=oneshot"] if service.once else ["Restart=always", "RestartSec=60"]
    rules += [
        "User=zbackup",
        f"ReadWritePaths={quote_unit_word(service.store).replace('$$', '$')}",
        "CapabilityBoundingSet=",
    ]
    rules += [f"ProtectHome={'read-only' if at_home else 'yes'}", "PrivateTmp=yes", "PrivateUsers=yes", "MemoryMax=2G"]
    rules += ["StateDirectory=zbackup", "StateDirectoryMode=0700", "LimitNOFILE=65536"]
    return _format_unit(service, head, rules, "" if service.once else "multi-user.target")


# ==== 13. COMMANDS: flags, signals, the clock; the only chapter that prints ====

EXAMPLES = {
    "demo": """\
see a backup and a restore of two nodes, on this machine alone:
  python zbackup.pyz demo""",
    "node": """\
serve a database and the home folders, but no temporary files:
  python zbackup.pyz node --file files/bd --file /home --exclude '*.tmp' --exclude node_modules/
make a database write its dump before each copy:
  python zbackup.pyz node --file /var/backups/db.sql --before 'pg_dump mydb > /var/backups/db.sql'""",
    "server": """\
copy what answers at 127.0.0.9 to .12, now and every hour:
  python zbackup.pyz server --range 9-12
once, from cron, with a word only when something is wrong, and old snapshots removed:
  python zbackup.pyz server --network 192.168.1 --range 9-99 --store /srv/backups --once --quiet \\
    --keep "last 3, daily 7, weekly 5, monthly 12, yearly 3\"""",
    "key": """\
print the key; write it as the file that a node looks for:
  python zbackup.pyz key --store /srv/backups
  python zbackup.pyz key --store /srv/backups --file zbackup.pub""",
    "nodes": """\
who is known, with keys:
  python zbackup.pyz nodes""",
    "trust": """\
the machine was set up anew; another machine has its address; let a machine in before --strict meets it:
  python zbackup.pyz trust 192.168.1.9
  python zbackup.pyz trust 192.168.1.9 --new
  python zbackup.pyz trust laptop 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7'""",
    "forget": """\
a machine is gone for good; its copies stay:
  python zbackup.pyz forget 192.168.1.9""",
    "unit": """\
a node that serves /home; a server that is started every hour:
  python zbackup.pyz unit node --file /home > /etc/systemd/system/zbackup-node.service
  python zbackup.pyz unit server --network 192.168.1 --range 9-99 --store /srv/backups --once --quiet
  python zbackup.pyz unit timer""",
    "list": """\
nodes; snapshots of a node; versions of a file; files of a snapshot:
  python zbackup.pyz list
  python zbackup.pyz list 127.0.0.9
  python zbackup.pyz list 127.0.0.9 files/bd
  python zbackup.pyz list 127.0.0.9 --at 3d""",
    "restore": """\
a file as it was three days ago, all files as they are in the newest snapshot:
  python zbackup.pyz restore 127.0.0.9 files/bd --to /tmp/back --at 3d
  python zbackup.pyz restore 127.0.0.9 --to /tmp/back""",
    "prune": """\
see what would go, then let it go; removed snapshots stay in the trash for 7 days:
  python zbackup.pyz prune --keep "last 3, daily 7, weekly 5, monthly 12, yearly 3" --dry-run
  python zbackup.pyz prune --keep "last 3, daily 7, weekly 5, monthly 12, yearly 3"
only free what nothing names any more:
  python zbackup.pyz prune""",
    "undelete": """\
bring one snapshot back, or all that are in the trash:
  python zbackup.pyz list 127.0.0.9 --trash
  python zbackup.pyz undelete 127.0.0.9 2026-11-23T02-23-31Z
  python zbackup.pyz undelete 127.0.0.9 --all""",
    "release": """\
the files of a node are meant to be fewer, or other ones; let its older snapshots go again:
  python zbackup.pyz release 127.0.0.9""",
    "verify": """\
read all; from cron, each night what was not read for the longest time:
  python zbackup.pyz verify
  python zbackup.pyz verify --sample 5% --max-time 1h --quiet""",
    "repair": """\
see what is to be done, then do it:
  python zbackup.pyz repair --dry-run
  python zbackup.pyz repair""",
    "drill": """\
restore 20 files and the newest database of each node for practice, and compare them:
  python zbackup.pyz drill --quiet""",
    "cat": """\
a file as it was at the end of a day:
  python zbackup.pyz cat 127.0.0.9 files/bd --at 2026-11-23 > bd""",
}

EXIT_CODES = """\
exit codes: 0 all good; 1 a node failed, or a copy is torn or partial; 2 wrong usage;
3 a known node is missing for longer than --stale; 4 the store is damaged, full or locked;
5 no node answered; 130 interrupted (what arrived is kept for the next run)"""

SPANS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
SIZES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_span(text: str) -> float:
    """Return seconds from `90s`, `1h30m`, `2d` or a bare number of seconds."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return min(float(text), 1e9)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|min|s|m|h|d|w)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise argparse.ArgumentTypeError(f"{text!r} is not a span of time such as 90s, 1h30m or 2d")
    return min(sum(float(number) * SPANS[unit] for number, unit in parts), 1e9)  # some 30 years: for ever


def write_span(seconds: float) -> str:
    """Return a span of time as parse_span reads it."""
    units = [(unit, SPANS[unit]) for unit in ("d", "h", "m", "s") if seconds % SPANS[unit] == 0]
    return f"{round(seconds / units[0][1])}{units[0][0]}" if units and seconds else f"{round(seconds * 1000)}ms"


def parse_size(text: str) -> int:
    """Return bytes from `64MiB`, `64M`, `1G` or a bare number; all in powers of 1024."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([kmgt]?)(i?b)?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512K, 64MiB or 1G")
    return int(match[1]) << 10 * SIZES[match[2]]


def write_size(size: int) -> str:
    """Return a size as parse_size reads it."""
    units = [
        (unit, size >> shift) for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20)) if size % (1 << shift) == 0
    ]
    return f"{units[0][1]}{units[0][0]}" if units and size else str(size)


def parse_count(text: str) -> int:
    """Return a whole number above zero."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_workers(text: str) -> int:
    """Return how many processes are to work side by side: each takes some 30 MB, and a few descriptors."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 0 < int(text) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes from 1 to {MOST_WORKERS}")
    return int(text)


def parse_keep(text: str) -> tuple[Rule, ...]:
    """Return the rules in `last 3, daily 7, weekly all`."""
    rules: list[Rule] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s+([0-9]{1,6}|all)\s*", part)
        if not match or match[1] not in PERIODS or match[1] in dict(rules):
            periods = ", ".join(PERIODS)
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a rule such as 'last 3, daily 7, monthly all' ({periods})"
            )
        rules.append((match[1], 1 << 30 if match[2] == "all" else int(match[2])))
    return tuple(rules)


def parse_share(text: str) -> float:
    """Return a share from `5%`."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 5% or 100%")
    return float(match[1]) / 100


def write_share(share: float) -> str:
    """Return a share as parse_share reads it."""
    return f"{share:.0%}"


def parse_level(text: str) -> int:
    """Return a level of compression."""
    if not re.fullmatch(r"[0-9]{1,2}", text) or not 0 < int(text) <= MOST_LEVEL:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level from 1 to {MOST_LEVEL}")
    return int(text)


def parse_port(text: str) -> int:
    """Return a TCP port."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def parse_range(text: str) -> list[int]:
    """Return the last parts of addresses from `9-12`, `9` or `9,12,20-30`."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > 255:
            raise argparse.ArgumentTypeError(f"{text!r} is not a range from 0 to 255 such as 9-12 or 9,12,20-30")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def parse_host(text: str) -> tuple[str, int | None]:
    """Return host and port of NAME, NAME:PORT, an IPv6 address or [IPv6]:PORT."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::(\d+))?|([^:\[\]\s]+)(?::(\d+))?|([0-9A-Fa-f:.]+(?:%\w+)?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME, NAME:PORT or [IPv6]:PORT")
    port = match[2] or match[4]
    return match[1] or match[3] or match[5], parse_port(port) if port else None


def expand_network(network: str, numbers: Sequence[int] | None) -> list[str]:
    """Return the addresses of a network: all of it, or those with these last parts.

    Raises UsageError when the network is none, or the numbers do not fit it.
    """
    import ipaddress

    prefix = re.fullmatch(r"\d{1,3}\.\d{1,3}\.\d{1,3}", network)
    try:
        block = ipaddress.ip_network(network + ".0/24" if prefix else network, strict=False)
    except ValueError:
        raise UsageError(f"--network {show(network)} is no network; write 192.168.1 or 192.168.1.0/24") from None
    if block.version != 4 or "/" not in network and not prefix or block.num_addresses > 65536:
        raise UsageError(
            f"--network {show(network)}: write an IPv4 network up to /16, such as 192.168.1.0/24, or --host for IPv6"
        )
    if numbers is None:
        return [str(address) for address in block.hosts()]
    if block.prefixlen < 24:
        raise UsageError(
            f"--range goes with a network of up to 256 addresses; {show(network)} has {block.num_addresses}"
        )
    start = int(block.network_address) & ~255
    found = [ipaddress.IPv4Address(start + number) for number in numbers]
    outside = [address for address in found if address not in block]
    if outside:
        raise UsageError(f"--range: {outside[0]} is not in the network {show(network)}")
    return [str(address) for address in found]


def list_addresses(args: argparse.Namespace) -> list[Address]:
    """Return the addresses that the flags name, each once."""
    addresses = []
    if args.range is not None or args.network is not None:
        addresses = [Address(host, args.port) for host in expand_network(args.network or NETWORK, args.range)]
    addresses += [Address(host, port or args.port) for host, port in args.host]
    if not addresses:
        raise UsageError("which machines? Name them: --range 9-12, --network 192.168.1.0/24 or --host NAME")
    return list(dict.fromkeys(addresses))


def resolve(addresses: Sequence[Address]) -> tuple[list[Address], list[NodeReport]]:
    """Return the addresses with their names as numbers, and a report for each name that has none."""
    import socket

    found, failed = [], []
    for address in addresses:
        try:
            info = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            found.append(Address(str(info[0][4][0]), address.port))
        except (OSError, UnicodeError) as error:
            reason = explain(error) if isinstance(error, OSError) else "not a name of a machine"
            failed.append(NodeReport(str(address), SILENT, error=f"this name has no address: {reason}", exit_code=1))
    return list(dict.fromkeys(found)), failed


def parse_when(text: str, now: int) -> tuple[str, int]:
    """Return a snapshot's name, or "" and the last moment (ns) that counts, from a WHEN.

    WHEN is `latest`, a name, a date, a date and time (local), or a span such as 3d ago.
    """
    import datetime

    if text == "latest":
        return "", 1 << 63
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ(-\d+)?", text):
        return text, 0
    for form, span in (
        ("%Y-%m-%d", 86400),
        ("%Y-%m-%dT%H:%M", 60),
        ("%Y-%m-%d %H:%M", 60),
        ("%Y-%m-%dT%H:%M:%S", 1),
        ("%Y-%m-%d %H:%M:%S", 1),
    ):
        with contextlib.suppress(ValueError, OverflowError):
            start = datetime.datetime.strptime(text, form)
            if span == 86400:  # or an hour more or less
                return "", int((start + datetime.timedelta(days=1)).timestamp()) * 10**9 - 1
            # A time that comes twice, when the clocks are put back, ends with its second coming.
            return "", int(max(start.replace(fold=fold).timestamp() for fold in (0, 1)) + span) * 10**9 - 1
    try:
        return "", now - int(parse_span(re.sub(r"\s*ago$", "", text)) * 1e9)
    except argparse.ArgumentTypeError:
        raise UsageError(
            f"--at {show(text)}: write latest, a snapshot's name, 2026-11-23, '2026-11-23 14:00' or 3d"
        ) from None


def find_snapshot(folder: NodeFolder, when: str, now: int) -> Snapshot:
    """Return the snapshot that a WHEN means: the newest one that is not younger, cut off ones last."""
    snapshots = folder.list_snapshots()
    name, moment = parse_when(when, now)
    if name:
        fitting = [snapshot for snapshot in snapshots if snapshot.name == name]
    else:
        fitting = [snapshot for snapshot in snapshots if snapshot.started <= moment]
    whole = [snapshot for snapshot in fitting if not snapshot.cut_off]
    if not fitting:
        times = f"; the first one is {snapshots[0].name}" if snapshots else ""
        raise UsageError(f"{folder.name} has no snapshot {'of' if name else 'at or before'} {show(when)}{times}")
    return (whole or fitting)[-1]


def find_node(store: Store, name: str) -> NodeFolder:
    """Return the folder of a node called by its folder, an address or its host's name."""
    nodes = store.list_nodes()
    for matches in (
        [node for node in nodes if node.folder == name],
        [node for node in nodes if name in node.addresses],
        [node for node in nodes if node.name == name],
    ):
        if len(matches) == 1:
            return store.node(matches[0].folder)
        if matches:
            raise UsageError(f"{show(name)} is the name of several nodes: {', '.join(node.folder for node in matches)}")
    known = ", ".join(node.folder for node in nodes) or "none yet"
    raise UsageError(f"the store has no node {show(name)}; it has: {known}")


def clean_path(text: str) -> bytes:
    """Return a path of a snapshot as a user types it."""
    path = os.fsencode(os.path.normpath(text).lstrip("/"))
    return b"" if path == b"." else path


# ---- output ----


class Output:
    """Where a role's words go: standard output, standard error, a log file."""

    def __init__(self, args: argparse.Namespace, clock: Clock) -> None:
        self.quiet = getattr(args, "quiet", False)
        self.json = getattr(args, "json", False)
        self.clock = clock
        self._progress = sys.stderr.isatty() and not self.quiet and not self.json
        self._drawn = 0.0
        self.unread = False  # a line could not be written
        try:
            name = getattr(args, "log_file", "")
            self.log = open(name, "a", encoding="utf-8", errors="backslashreplace") if name else None  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"--log-file {show(args.log_file)}: {explain(error)}") from None

    def say(self, line: str) -> None:
        """Print what is of interest; nothing under --quiet or --json."""
        self._write(line)
        if not self.quiet and not self.json:
            self._clear()
            self._print(line, sys.stdout)

    def put(self, fields: object) -> None:
        """Print JSON."""
        self._print(json.dumps(fields), sys.stdout)

    def warn(self, line: str) -> None:
        """Print what the user must know."""
        self._write(line)
        self._clear()
        self._print(line, sys.stderr)

    def _print(self, line: str, stream: TextIO) -> None:
        try:
            print(line, file=stream, flush=True)
        except OSError:  # nobody reads it, or the disk is full: no reason to end backups
            self.unread = True

    def _write(self, line: str) -> None:
        if self.log is None:
            return
        try:
            self.log.write(f"{format_time(self.clock.now())} {line}\n")
            self.log.flush()
        except OSError as error:  # no reason to end backups
            print(f"zbackup: --log-file cannot be written, and is left alone: {explain(error)}", file=sys.stderr)
            self.log = None

    def draw(self, parts: Iterable[str]) -> None:
        """Show on a terminal how far it is."""
        now = self.clock.monotonic()
        if self._progress and now - self._drawn > 0.5:
            line = "; ".join(parts)[:150]
            if line:
                self._drawn = now
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._progress and self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def make_clock() -> Clock:
    """Return the real clock."""
    import time

    return Clock(time.time_ns, time.monotonic, time.sleep)


@contextlib.contextmanager
def stopping(stop: threading.Event) -> Iterator[list[int]]:
    """Set `stop` on Ctrl-C and SIGTERM; a second one ends the process at once."""
    import signal

    caught: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        caught.append(number)
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_file_limit(most: int = 0) -> None:
    """Take as many descriptors as this process may, or `most`: each connection takes some.

    Raises BackupError where they are too few for libzmq, which ends a process that has none left.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if most and (hard == resource.RLIM_INFINITY or hard > most):
            hard = most
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if hard != resource.RLIM_INFINITY and hard < FEWEST_DESCRIPTORS:
            raise BackupError(
                f"only {hard} files can be open at once, and it takes {FEWEST_DESCRIPTORS}: see ulimit -n"
            )


# ---- rights: what is not needed is given away before anything else is done ----

PR_SET_KEEPCAPS = 8  # <linux/prctl.h>
CAPABILITY_VERSION = 0x20080522  # <linux/capability.h>
READ_ALL, BIND_LOW = 2, 10  # CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE


def keep_capabilities(numbers: Iterable[int]) -> bool:
    """Have these capabilities of Linux and no others, as all threads yet to come will; False where that fails."""
    import ctypes

    bits = sum(1 << number for number in numbers)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)(bits, bits, 0, 0, 0, 0)  # effective, permitted, inheritable; then their upper halves
    capset = getattr(ctypes.CDLL(None, use_errno=True), "capset", None)
    return capset is not None and capset(header, sets) == 0


def find_user(name: str) -> tuple[int, int, str]:
    """Return the user's number, group and home; UsageError where there is none, or this process may not become it."""
    import pwd

    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"--user: this machine has no user {show(name)}") from None
    if os.geteuid() not in (0, found.pw_uid):
        raise UsageError(f"--user {show(name)}: only root can become another user")
    return found.pw_uid, found.pw_gid, found.pw_dir


def give_folder(path: str, user: str) -> None:
    """Make a folder for `user`, private, below folders that anybody may pass; UsageError where it is another's."""
    uid, gid, _ = find_user(user)
    path = os.path.abspath(path)
    try:
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            os.mkdir(path, 0o700)
            os.chown(path, uid, gid)
        found = os.lstat(path)
    except OSError as error:
        raise UsageError(f"{show(path)} cannot be made: {explain(error)}") from None
    if not stat_bits.S_ISDIR(found.st_mode) or found.st_uid != uid:
        raise UsageError(f"{show(path)} does not belong to {user}: chown -R {user} {show(path)}")


def become_user(name: str, capabilities: Iterable[int] = ()) -> bool:
    """Give up the rights of root for those of `name`; False where the capabilities could not be kept.

    To be called before there is any thread: capabilities are each thread's own.
    """
    uid, gid, home = find_user(name)
    os.environ.update(HOME=home, USER=name, LOGNAME=name)
    if os.geteuid() != 0 or uid == 0:
        return True
    wanted = list(capabilities)
    kept = set_process(PR_SET_KEEPCAPS, int(bool(wanted)))
    os.initgroups(name, gid)
    os.setgid(gid)
    os.setuid(uid)
    if not wanted:
        return True
    if kept and keep_capabilities(wanted):
        return True
    keep_capabilities([])  # else all others would stay permitted
    return False


# ---- the commands ----

Running = tuple[Clock, threading.Event]  # the clock, and the wish to stop


def announce_node(node: Node, output: Output) -> None:
    """Say what the node serves, and to whom."""
    settings = node.settings
    roots, missing = list_roots(settings.files, node.home.base)
    for pattern in missing:
        output.warn(f"{show(pattern)} does not exist (yet); it is looked for again at each copy")
    for root in roots:
        for real in root.behind:
            output.warn(f"{show(real)} is behind a symbolic link in {show(root.real)}: name what the link points to")
        if os.path.islink(root.real):
            output.warn(f"{show(root.real)} is a symbolic link: the link alone is copied; name what it points to")
    who = f"the server with the key {settings.server_key}; this node's key is {node.pair.public}" if node.pair else ""
    if not who:
        local = f"this machine only; for the LAN, `zbackup.pyz key --file {PUBLIC_FILE}` on the server makes a file to"
        who = "any machine, without a key" if settings.insecure else f"{local} put beside zbackup.pyz here"
    names = ", ".join(show(pattern) for pattern in settings.files)
    output.say(f"serving {names} at {settings.bind}:{settings.port} to {who}")
    if settings.insecure:
        output.warn("--insecure: everyone who can reach this port can read these files")


def find_program_folder() -> str:
    """Return the folder that zbackup.pyz, or zbackup.py, lies in."""
    return os.path.dirname(os.path.abspath(sys.argv[0]))


def make_node_settings(args: argparse.Namespace, host: str) -> NodeSettings:
    """Return what the flags of `node` say, with the server's key found."""
    if args.folder and name_folder(args.folder) != args.folder:
        raise UsageError(f"--folder {show(args.folder)}: letters, digits and . _ - make a folder's name")
    key = find_public(args.server_key, [find_program_folder(), os.getcwd()])
    if args.insecure and key:
        raise UsageError(f"--insecure goes without a server's key: leave out --server-key, or move {PUBLIC_FILE} away")
    others = ("files", "exclude", "name", "server_key")
    values = {name: getattr(args, name) for name in vars(NodeSettings()) if name not in others}
    name, files = args.name or host, tuple(args.file or [FILE])
    exclude = tuple(encode_path(os.fsencode(pattern)) for pattern in args.exclude)  # paths do not follow the locale
    Exclude(exclude)  # a pattern that is none is told of now, not at the first copy
    return NodeSettings(files=files, exclude=exclude, name=name, server_key=key, **values)


SYSTEM_STATE = "/var/lib/zbackup"  # where a node that root starts as another user keeps its state


def leave_root(args: argparse.Namespace, settings: NodeSettings, output: Output) -> NodeSettings:
    """Become the user that a node is to run as, who can read all files but write only its own."""
    state = settings.state or (find_state_folder() if os.environ.get("STATE_DIRECTORY") else SYSTEM_STATE)
    give_folder(state, args.user)
    wanted = [READ_ALL, *([BIND_LOW] if settings.port < 1024 else [])]
    if not become_user(args.user, wanted):
        output.warn(f"this system lets {args.user} keep no right to read all files: only what it may read is copied")
    return replace(settings, state=state)


def run_node(args: argparse.Namespace) -> int:
    """Serve this machine's files until stopped."""
    import signal
    import socket

    raise_file_limit(DESCRIPTORS)
    clock = make_clock()
    output = Output(args, clock)
    settings = make_node_settings(args, socket.gethostname())
    if args.user:
        settings = leave_root(args, settings, output)
    stop = threading.Event()
    with stopping(stop) as caught:
        wire = Wire(clock, stop, settings.heartbeat)
        try:
            node = Node(settings, wire, os.getcwd(), output.say)
            try:
                announce_node(node, output)
                node.serve()
            finally:
                node.close()
        except Interrupted:
            output.say("stopped")
        finally:
            wire.close()
    return Interrupted.exit_code if signal.SIGINT in caught else 0


def describe_progress(intakes: Mapping[str, Intake]) -> Iterator[str]:
    """Yield how far each copy is."""
    for folder, intake in list(intakes.items()):
        yield f"{folder} {intake.tally.counts['files']} files, {format_size(intake.peer.received)}"


def open_waiting(path: str, running: Running, wait: float, create: bool = False, alone: bool = False) -> Store:
    """Return the store; LockedStore when others have it for longer than `wait` (s)."""
    clock, stop = running
    end = clock.monotonic() + wait
    while True:
        try:
            return open_store(path, create, alone)
        except LockedStore:
            if stop.is_set() or clock.monotonic() >= end:
                raise
            clock.sleep(0.2)


def open_command(args: argparse.Namespace) -> Store:
    """Return the store of a command that only reads it."""
    return open_waiting(args.store, (make_clock(), threading.Event()), args.lock_wait)


def make_after_pull(settings: ServerSettings, workers: Workers) -> AfterPull:
    """Return what is done with each new snapshot."""
    if settings.latest:
        return lambda folder, reader, snapshot: Latest(folder, reader, workers).update(snapshot)
    return lambda folder, reader, snapshot: ()


def tell_node(report: NodeReport, output: Output) -> None:
    """Print what became of a node; of other addresses only what is amiss."""
    if not report.folder and (report.state == STRANGER or (report.state == SILENT and not report.error)):
        return  # told in one line at the end
    say = output.warn if report.exit_code and not output.json else output.say
    for line in format_node(report):
        say(line)


def tell_sweep(report: SweepReport, output: Output, cut_off: bool) -> None:
    """Print the end of a sweep, which may have been cut off before all was asked."""
    if output.json:
        output.put(describe_sweep(report))
    if report.exit_code == NOBODY and not cut_off:
        output.warn("zbackup: no node answered; is `zbackup.pyz node` running there, and the port open?")
    for line in format_sweep(report):
        (output.warn if line.startswith("the store: ") else output.say)(line)


def find_key_file(store: str) -> str:
    """Return where a store's key is, unless --key-file names another place."""
    return os.path.join(store, "keys", "server")


def find_server_pair(store: str, key_file: str) -> KeyPair:
    """Return the key pair that --key-file names, or that of the store, whose failure it then is to have none."""
    return load_pair(key_file) if key_file else load_pair(find_key_file(store), StoreError)


def sweep_once(addresses: Sequence[Address], settings: ServerSettings, running: Running, output: Output) -> int:
    """Make one sweep and report it; returns its exit code.  A store that fails ends this sweep only."""
    with contextlib.ExitStack() as stack:
        # The workers first: they are forked.
        workers = Workers(settings.latest_jobs if settings.latest else 0, opened_maker, "--latest-jobs")
        stack.enter_context(contextlib.closing(workers))
        try:
            store = open_waiting(settings.store, running, settings.lock_wait, settings.create)
            stack.enter_context(contextlib.closing(store))
            wire = Wire(*running, settings.heartbeat, find_server_pair(settings.store, settings.key_file))
            stack.enter_context(contextlib.closing(wire))
            store.save_reserve(settings.reserve)
            copier = Copier(store, wire, settings, make_after_pull(settings, workers))
            events = Events(
                lambda report: tell_node(report, output), lambda: output.draw(describe_progress(copier.intakes))
            )
            numbers, failed = resolve(addresses)
            for lost in failed:
                events.report(lost)
            report = sweep(copier, numbers, events)
            report = replace(report, nodes=(*failed, *report.nodes))
            cut_off = running[1].is_set()
            tell_sweep(report, output, cut_off)
            return Interrupted.exit_code if cut_off else report.exit_code
        except BackupError as error:
            output.warn(f"zbackup: {error}")
            return error.exit_code
        except OSError as error:
            output.warn(f"zbackup: this sweep was cut off: {explain_at(error)}")
            return StoreError.exit_code


def worst_code(*codes: int) -> int:
    """Return the exit code that tells of the worst."""
    order = (Interrupted.exit_code, StoreError.exit_code, UsageError.exit_code, BackupError.exit_code, MISSING, NOBODY)
    return next((code for code in order if code in codes), 0)


def prune_store(args: argparse.Namespace, running: Running, output: Output, dry_run: bool = False) -> int:
    """Remove what --keep does not keep, and free what nothing names; returns the exit code."""
    try:
        store = open_waiting(args.store, running, args.lock_wait, alone=not dry_run)
    except StoreError as error:
        if isinstance(error, LockedStore) and args.command == "server":
            output.say(f"not pruned this time: {error}")
            return 0
        output.warn(f"zbackup: not pruned: {error}")
        return error.exit_code
    now = running[0].now()
    try:
        with contextlib.closing(store.reader()) as reader, contextlib.closing(Mark(store, reader)) as mark:
            plan = plan_prune(mark, args.keep, (now, int(args.grace * 1e9)), args.max_repack)
            changes = [c for choices in plan.choices.values() for c in choices if not c.keep]
            if dry_run or changes or args.command == "prune":
                for line in format_prune(plan):
                    output.say(line)
            report = PruneReport(problem=plan.problem) if dry_run else execute_prune(mark, plan, now)
        if not dry_run and not store.save_reserve(args.reserve):
            output.warn(f"zbackup: the disk of {show(args.store)} is nearly full: no reserve could be kept")
        if output.json and args.command == "prune":
            print(json.dumps(describe_prune(plan, report)))
        if report.problem:
            output.warn(f"zbackup: {report.problem}")
        output.say("prune: this was a dry run, nothing is changed" if dry_run else format_pruned(report))
        return StoreError.exit_code if report.problem else 0
    except BackupError as error:
        output.warn(f"zbackup: not pruned: {error}")
        return error.exit_code
    except OSError as error:
        output.warn(f"zbackup: pruning was cut off: {explain_at(error)}")
        return StoreError.exit_code
    finally:
        store.close()


def run_server(args: argparse.Namespace) -> int:
    """Sweep once, or again and again."""
    import signal

    clock = make_clock()
    output = Output(args, clock)
    addresses = list_addresses(args)
    load_zmq()  # before a store is made for nothing
    settings = ServerSettings(**{name: getattr(args, name) for name in vars(ServerSettings())})
    raise_file_limit()
    if args.user:
        if settings.create or is_store(settings.store):
            give_folder(settings.store, args.user)
        become_user(args.user)
    stop = threading.Event()
    code = 0
    with stopping(stop) as caught:
        while not stop.is_set():
            started = clock.monotonic()
            code = sweep_once(addresses, settings, (clock, stop), output)
            if code != StoreError.exit_code or is_store(settings.store):  # it has been there
                settings = replace(settings, create=False)  # when it has gone, it is on a disk that is not there
            if args.keep and not stop.is_set():
                code = worst_code(code, prune_store(args, (clock, stop), output))
            if args.once:
                break
            # Not stop.wait: a signal's handler that sets it could find it locked by this very thread.
            while not stop.is_set() and clock.monotonic() < started + args.every:
                clock.sleep(min(0.2, max(0.0, started + args.every - clock.monotonic())))
    if not caught:
        return code or (BackupError.exit_code if output.unread else 0)
    return 0 if signal.SIGTERM in caught and not args.once else Interrupted.exit_code


def run_prune(args: argparse.Namespace) -> int:
    """Remove old snapshots, and free what nothing names."""
    clock = make_clock()
    return prune_store(args, (clock, threading.Event()), Output(args, clock), args.dry_run)


def tell_damage(store: Store) -> int:
    """Print what is damaged in the store; returns the exit code."""
    for problem in store.problems:
        print(f"zbackup: {problem}", file=sys.stderr)
    return StoreError.exit_code if store.problems else 0


def run_undelete(args: argparse.Namespace) -> int:
    """Bring removed snapshots back."""
    if bool(args.snapshot) == args.all:
        raise UsageError("which snapshots? Name them, or --all; `list NODE --trash` shows what is there")
    with contextlib.closing(open_command(args)) as store:
        folder = find_node(store, args.node)
        for name in undelete_snapshots(folder, args.snapshot):
            print(f"{folder.name}/{name} is back")
        return tell_damage(store)


def run_release(args: argparse.Namespace) -> int:
    """Answer the alarm of a node."""
    with contextlib.closing(open_command(args)) as store:
        folder = find_node(store, args.node)
        alarm = release_node(store, folder.name)
        if alarm:
            print(f"{folder.name}: the alarm of {alarm.name} ({alarm.alarm}) is answered; older snapshots may go again")
        else:
            print(f"{folder.name} has no alarm")
        return tell_damage(store)


def verify_all(store: Store, harm: Harm, options: VerifyOptions) -> VerifyReport:
    """Check the store, and the plain files of each node's newest version."""
    import random

    report = verify_store(store, harm, options)
    chance = random.SystemRandom()
    problems = list(report.files)
    for node in store.list_nodes():
        folder = store.node(node.folder)
        wanted = lambda entry: options.more() and chance.random() < options.share  # noqa: E731
        found = verify_latest(folder, harm.reader, wanted)
        problems += [(os.path.join(folder.path, "latest", problem.path), problem.message) for problem in found]
    return replace(report, files=tuple(problems))


@contextlib.contextmanager
def looking(store: Store) -> Iterator[Harm]:
    """Keep a store open while it is looked through for harm."""
    with contextlib.closing(store), contextlib.closing(store.reader()) as reader:
        harm = Harm(store, reader)
        try:
            yield harm
        finally:
            harm.close()


def draw_bytes(output: Output) -> Callable[[int, int], None]:
    """Return what shows on a terminal how much has been read."""
    return lambda done, total: output.draw([f"{format_size(done)} of {format_size(total)} read"])


def run_verify(args: argparse.Namespace) -> int:
    """Read packs, index, snapshots and all else; say what is damaged, and what suffers from it."""
    clock = make_clock()
    output = Output(args, clock)
    end = clock.monotonic() + args.max_time
    options = VerifyOptions(args.sample, clock.now(), lambda: clock.monotonic() < end, draw_bytes(output))
    with looking(open_command(args)) as harm:
        report = verify_all(harm.store, harm, options)
        if args.json:
            print(json.dumps(describe_verified(report, harm)))
        for line in format_damage(report):
            output.warn(line)
        sound, harmed = report.sound and not harm.new, False
        for line in format_harm(harm):
            harmed = True
            (output.say if sound else output.warn)(line)
        output.say(format_verified(report))
        if not sound:
            whole = not (report.damaged or report.lost or report.files or harm.new)
            verdict = "there are problems" if whole else "the store is damaged; `repair` saves what can be saved"
            output.warn(f"verify: {verdict}")
            return StoreError.exit_code
        output.say("verify: no damage but what `repair` has told of" if harmed else "verify: all is well")
        return BackupError.exit_code if harmed else 0


def run_repair(args: argparse.Namespace) -> int:
    """Mend a damaged store as far as that can be."""
    clock = make_clock()
    output = Output(args, clock)
    if not args.dry_run and repair_identity(args.store):
        output.say("zbackup.json was damaged or missing, and is made anew")
    with looking(open_waiting(args.store, (clock, threading.Event()), args.lock_wait, alone=not args.dry_run)) as harm:
        store = harm.store
        report = verify_all(store, harm, VerifyOptions(now=clock.now(), tick=draw_bytes(output)))
        inside = {path: os.path.relpath(path, store.path).split(os.sep) for path, _ in report.files}
        stale = [path for path, parts in inside.items() if parts[1:2] == ["latest"]]
        plan = plan_repair(replace(report, files=tuple(row for row in report.files if row[0] not in stale)))
        for line in [*format_repair(plan), *(f"{path}: write it anew" for path in stale)]:
            output.say(line)
        if args.dry_run:
            output.say("repair: this was a dry run, nothing is changed")
            return 0 if report.sound else StoreError.exit_code
        done = execute_repair(store, harm, plan)
        code = 0
        for name in sorted({inside[path][0] for path in stale}):
            for problem in repair_latest(store.node(name), harm.reader):
                output.warn(f"{name}: {problem.path}: {problem.message}")
                code = BackupError.exit_code
        for line in format_repaired(done):
            output.say(line)
        store.save_reserve(args.reserve)
        return code


def drill_in_scratch(reader: Reader, snapshot: Snapshot, args: argparse.Namespace) -> Drill:
    """Restore a sample of a node to a folder that is removed again."""
    import tempfile

    try:
        to = tempfile.mkdtemp(prefix="zbackup-drill-", dir=args.to or None)
        try:
            return drill_node(reader, snapshot, to, args.sample)
        finally:
            remove_tree(to)
    except (StoreError, FormatError) as error:
        return Drill(snapshot.folder, snapshot.name, problems=(Problem("", str(error)),))
    except RestoreError as error:
        said = str(error)
    except OSError as error:
        said = f"{show(args.to or tempfile.gettempdir())}: {explain(error)}; name another folder with --to"
    return Drill(snapshot.folder, snapshot.name, hindered=said)  # the other nodes are drilled all the same


def find_drill_code(drills: Sequence[Drill]) -> int:
    """Return the exit code for some drills."""
    if any(drill.problems for drill in drills):
        return StoreError.exit_code
    if any(drill.hindered for drill in drills):
        return RestoreError.exit_code
    return 0 if any(drill.files for drill in drills) else NOBODY


def run_drill(args: argparse.Namespace) -> int:
    """Restore a sample of each node for practice, and compare it."""
    clock = make_clock()
    output = Output(args, clock)
    drills = []
    store = open_command(args)
    with contextlib.closing(store), contextlib.closing(store.reader()) as reader:
        times = load_times(store, DRILLED)
        for node in store.list_nodes():
            snapshot = next((s for s in store.node(node.folder).newest() if not s.cut_off), None)
            if snapshot is None:
                continue
            started = clock.monotonic()
            drill = replace(drill_in_scratch(reader, snapshot, args), succeeded=times.get(node.folder, 0))
            failed = drill.problems or drill.hindered
            for line in format_drill(drill, clock.monotonic() - started):
                (output.warn if failed else output.say)(line)
            if drill.files and not failed:
                times[node.folder] = clock.now()
            drills.append(replace(drill, succeeded=times.get(node.folder, 0)))
        save_times(store, DRILLED, times)
        if args.json:
            print(json.dumps([{**vars(d), "problems": [vars(p) for p in d.problems]} for d in drills]))
        return tell_damage(store) or find_drill_code(drills)


def print_rows(rows: Sequence[Sequence[str]], as_json: bool) -> None:
    """Print a table whose first row names its columns."""
    if as_json:
        print(json.dumps([dict(zip(rows[0], row)) for row in rows[1:]]))
    else:
        print("\n".join(format_table(rows)))


def run_key(args: argparse.Namespace) -> int:
    """Print the server's public key, or write it to a file."""
    path = args.key_file or find_key_file(args.store)
    if not args.key_file:
        make_store_folder(args.store)
    made = not os.path.lexists(path)
    pair = find_server_pair(args.store, args.key_file)
    if made:
        print(f"zbackup: a new key pair; its secret half is in {show(path)}, keep a copy of it", file=sys.stderr)
    if not args.file:
        print(pair.public)
        return 0
    write_durably(args.file, encode_public(pair.public))
    os.chmod(args.file, 0o644)
    print(f"wrote {show(args.file)}: put it beside zbackup.pyz on each machine, and start the node there")
    return 0


def run_trust(args: argparse.Namespace) -> int:
    """Accept a key."""
    if args.new and args.key:
        raise UsageError("--new takes the key that was met in place of the node's; name no other")
    if args.key and not is_key(args.key):
        raise UsageError(f"{show(args.key)} is no key: 40 characters, in single quotes")
    now = make_clock().now()
    with contextlib.closing(open_command(args)) as store:
        names = {name for node in store.list_nodes() for name in (node.folder, node.name, *node.addresses)}
        name = args.node if args.node not in names and args.key else find_node(store, args.node).name
        known = trust_newcomer(store, name, now) if args.new else trust_key(store, name, args.key or "", now)
        print(f"{known.folder} is the node with the key {known.identity}; the next sweep copies it there")
        return tell_damage(store)


def run_forget(args: argparse.Namespace) -> int:
    """Expect a node no more."""
    with contextlib.closing(open_command(args)) as store:
        known = forget_node(store, find_node(store, args.node).name)
        again = (
            f"`trust {known.folder} '{known.identity}'` takes it back" if is_key(known.identity) else "it had no key"
        )
        print(f"{known.folder} is expected no more; its copies stay; {again}")
        return tell_damage(store)


def list_known(store: Store) -> list[list[str]]:
    """Return the rows of all nodes that are known, with their keys."""
    rows = [["NODE", "HOST", "ADDRESSES", "FIRST SEEN", "LAST SEEN", "KEY", "NOTE"]]
    for node in store.list_nodes():
        times = [format_time(moment) if moment else "-" for moment in (node.first_seen, node.last_seen)]
        key = node.identity if is_key(node.identity) else "none"
        note = f"waits for `trust`: {show(node.offered)}" if node.offered else "" if node.identity else "forgotten"
        rows.append([node.folder, node.name, " ".join(node.addresses), *times, key, note])
    return rows


def run_nodes(args: argparse.Namespace) -> int:
    """List who is known."""
    with contextlib.closing(open_command(args)) as store:
        print_rows(list_known(store), args.json)
        return tell_damage(store)


def run_unit(args: argparse.Namespace) -> int:
    """Print a systemd unit."""
    words = [word for word in args.flags if word != "--"]
    if args.kind == "timer":
        if words:
            raise UsageError("unit timer takes no more words; edit OnCalendar= in what it prints")
        lines = list(TIMER_UNIT)
    else:
        role = args.parser.parse_args([args.kind, *words])  # which refuses wrong flags
        command = (sys.executable, os.path.abspath(sys.argv[0]), args.kind, *words)
        if args.kind == "node":
            lines = format_node_unit(Service(command, os.getcwd()))
        else:
            lines = format_server_unit(Service(command, os.getcwd(), os.path.abspath(role.store), role.once))
    print("\n".join(lines))
    return 0


def list_nodes(store: Store) -> list[list[str]]:
    """Return the rows of all nodes."""
    rows = [["NODE", "HOST", "ADDRESSES", "SNAPSHOTS", "LAST", "GRADE", "FILES", "SIZE"]]
    for node in store.list_nodes():
        snapshots = store.node(node.folder).list_snapshots()
        last = snapshots[-1] if snapshots else None
        what = (
            [last.name, last.grade, str(last.totals.files), format_size(last.totals.size)]
            if last
            else ["-", "-", "-", "-"]
        )
        rows.append([node.folder, node.name, " ".join(node.addresses), str(len(snapshots)), *what])
    return rows


def list_trash(folder: NodeFolder) -> list[list[str]]:
    """Return the rows of a node's removed snapshots."""
    rows = [["SNAPSHOT", "GRADE", "FILES", "SIZE", "REMOVED"]]
    for trashed in folder.list_trash():
        totals = trashed.snapshot.totals
        what = [trashed.snapshot.name, trashed.snapshot.grade, str(totals.files), format_size(totals.size)]
        rows.append([*what, format_time(trashed.removed)])
    return rows


def list_snapshots(folder: NodeFolder, harmed: Sequence[str]) -> list[list[str]]:
    """Return the rows of a node's snapshots; `harmed` are those that have lost content."""
    rows = [["SNAPSHOT", "TIME", "GRADE", "FILES", "SIZE", "CHANGED", "SENT", "STORED", "NOTE"]]
    for snapshot in folder.list_snapshots():
        totals = snapshot.totals
        sizes = [format_size(totals.sent), format_size(totals.added)]
        notes = [f"cut off: {show(snapshot.cut_off)}"] if snapshot.cut_off else []
        notes += [f"{len(snapshot.problems)} problems"] if snapshot.problems and not notes else []
        notes += ["damaged, see `verify`"] if snapshot.name in harmed else []
        notes += [f"alarm: {show(snapshot.alarm)}"] if snapshot.alarm else []
        note = "; ".join(notes)
        rows.append(
            [snapshot.name, format_time(snapshot.started), snapshot.grade, str(totals.files), format_size(totals.size)]
            + [str(totals.changed), *sizes, note]
        )
    return rows


Rows = Generator["tuple[dict[str, str], Entry]", None, None]  # entries, and what stands before each in its row


def list_snapshot(store: Store, snapshot: Snapshot, path: bytes) -> Rows:
    """Yield the entries at or below a path in one snapshot."""
    with contextlib.closing(store.reader()) as reader:
        entries = list_entries(reader, snapshot.blocks, lambda error: note_once(store.problems, str(error)))
        for entry in find_entries(entries, [path] if path else []):
            yield {}, entry


def list_versions(store: Store, folder: NodeFolder, path: bytes) -> Rows:
    """Yield the versions of one path, each with the first snapshot that has it."""
    last: tuple[object, ...] | None = None
    with contextlib.closing(store.reader()) as reader:
        for snapshot in folder.list_snapshots():
            entries = list_entries(reader, snapshot.blocks, lambda error: note_once(store.problems, str(error)))
            for entry in find_entries(entries, [path]):
                stat, content = entry.stat, entry.content
                version = (content.chunks, content.lists, content.size, content.error, stat.target, stat.kind)
                if stat.path == path and version != last:
                    last = version
                    yield {"SNAPSHOT": snapshot.name}, entry


def print_listing(make_listing: Callable[[], Rows], as_json: bool) -> None:
    """Print entries, which are never held together: there may be millions, so they are listed twice."""
    if as_json:
        print("[", end="")
        for number, (before, entry) in enumerate(make_listing()):
            print(", " * (number > 0) + json.dumps({**before, **describe_entry(entry)}), end="")
        print("]")
        return
    widths: dict[str, int] = {}
    for before, entry in make_listing():
        for name, cell in {**before, **format_entry(entry)}.items():
            widths[name] = max(widths.get(name, len(name)), len(cell))
    if widths:
        print(format_row(widths.values(), widths))
    for before, entry in make_listing():
        print(format_row(widths.values(), {**before, **format_entry(entry)}.values()))


def print_entries(args: argparse.Namespace, store: Store, folder: NodeFolder) -> None:
    """Print the entries of a snapshot, or the versions of a path."""
    path = clean_path(args.path or "")
    if args.at is None:
        if not path:
            raise UsageError(f"which path? `list {folder.name} --at latest` lists all that the last snapshot has")
        make_listing = functools.partial(list_versions, store, folder, path)
        nothing = f"no snapshot of {folder.name} has {show(path)}; see `list {folder.name} --at latest`"
    else:
        snapshot = find_snapshot(folder, args.at, make_clock().now())
        make_listing = functools.partial(list_snapshot, store, snapshot, path)
        nothing = f"{show(path)} is not in the snapshot {snapshot.name}"
    with contextlib.closing(make_listing()) as listing:
        if path and next(listing, None) is None:
            raise UsageError(nothing)
    print_listing(make_listing, args.json)


def run_list(args: argparse.Namespace) -> int:
    """List nodes, a node's snapshots, the versions of a path, or the entries of a snapshot."""
    if args.at is not None and (args.trash or args.node is None):
        raise UsageError("--at is for the files of a NODE: name one, and leave --trash out")
    with contextlib.closing(open_command(args)) as store:
        if args.node is None:
            rows = list_nodes(store)
        else:
            folder = find_node(store, args.node)
            if args.trash:
                rows = list_trash(folder)
            elif args.at is not None or args.path is not None:
                print_entries(args, store, folder)
                return tell_damage(store)
            else:
                rows = list_snapshots(folder, store.lost.snapshots.get(folder.name, ()))
        print_rows(rows, args.json)
        return tell_damage(store)


def run_restore(args: argparse.Namespace) -> int:
    """Restore files."""
    workers = Workers(args.jobs, opened_maker, "--jobs")  # before all else: they are forked
    with contextlib.closing(workers), contextlib.closing(open_command(args)) as store:
        options = RestoreOptions(overwrite=args.overwrite, numeric=args.numeric_ids, workers=workers)
        snapshot = find_snapshot(find_node(store, args.node), args.at, make_clock().now())
        reader = store.reader()
        try:
            paths = [clean_path(path) for path in args.path]
            done = restore_snapshot(reader, snapshot, [] if b"" in paths else paths, args.to, options)
        except OSError as error:
            raise RestoreError(f"{show(args.to)}: {explain(error)}") from None
        finally:
            reader.close()
        for problem in done.problems:
            print(
                f"zbackup: {problem.path}: {problem.message}" if problem.path else f"zbackup: {problem.message}",
                file=sys.stderr,
            )
        if not args.quiet:
            what = f"{done.published.files} files ({format_size(done.published.bytes)}) of {snapshot.folder}"
            print(f"restored {what} as of {format_time(snapshot.started)} to {show(args.to)}")
            if done.skipped:
                print(f"{done.skipped} sockets were left out: their programs make them")
        if not snapshot.good:
            print(f"zbackup: this snapshot is {snapshot.grade}; see `list {snapshot.folder}`", file=sys.stderr)
        incomplete = done.problems or snapshot.cut_off
        code = StoreError.exit_code if done.damaged else BackupError.exit_code if incomplete else 0
        return tell_damage(store) or code


def write_stream(reader: Reader, content: Content, stream: BinaryIO) -> None:
    """Write a file's content to a stream that cannot seek."""
    left = content.size
    for chunk in list_chunks(reader, content):
        for data in (bytes(CHUNK) for _ in range(chunk)) if isinstance(chunk, int) else (reader.get(chunk),):
            stream.write(data[:left])
            left -= len(data[:left])
    stream.flush()
    if left:
        raise StoreError(f"the chunks of the file are {left} bytes too short")


def run_cat(args: argparse.Namespace) -> int:
    """Write one file to standard output."""
    with contextlib.closing(open_command(args)) as store:
        snapshot = find_snapshot(find_node(store, args.node), args.at, make_clock().now())
        path = clean_path(args.path)
        reader = store.reader()
        try:
            entries = list_entries(reader, snapshot.blocks, lambda error: note_once(store.problems, str(error)))
            entry = next((e for e in find_entries(entries, [path]) if e.stat.path == path), None)
            if entry is None or entry.stat.kind != "file":
                raise UsageError(f"{show(path)} is not a file in the snapshot {snapshot.name}")
            if entry.content.error:
                raise RestoreError(f"{show(path)} is not in the snapshot {snapshot.name}: {show(entry.content.error)}")
            write_stream(reader, entry.content, sys.stdout.buffer)
        finally:
            reader.close()
        return tell_damage(store)


# ---- demo: two machines in a folder ----

DEMO = {"127.0.0.9": "shop", "127.0.0.10": "office"}  # a node's address, and the folder that it serves
DEMO_WAIT = 20.0  # s that a node may take to start
DEMO_FILES = """
All is well, and all of it lies in {folder}
  shop/, office/      the files of the two machines
  backups/            the store, with the newest versions in 127.0.0.9/latest and 127.0.0.10/latest
  restored/, first/   what was restored"""
DEMO_NEXT = """
The real thing: on the server make the key by which its nodes know it,
  {program} key --file zbackup.pub
copy zbackup.pyz and zbackup.pub to each machine and start a node there,
  {program} node --file /home
and on the server sweep your network every hour,
  {program} server --network 192.168.1 --range 9-99"""


def find_port(wanted: int) -> int:
    """Return the TCP port asked for; for 0 the usual one, or a free one where that is taken."""
    import socket

    for port in [wanted] if wanted else [PORT, 0, 0, 0]:
        try:
            with contextlib.ExitStack() as probes:
                for address in DEMO:
                    probe = probes.enter_context(socket.socket())
                    probe.bind((address, port))
                    port = probe.getsockname()[1]
            return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise BackupError(f"the demo needs the address {address} on this machine: {explain(error)}") from None
    raise BackupError("the port is in use on this machine; choose another one with --port")


class Demo:
    """A folder, the nodes that serve what is in it, and a program that writes there meanwhile."""

    def __init__(self, folder: str, port: int, running: Running) -> None:
        self.folder = folder
        self.clock, self.interrupted = running
        self.program = ["python3", os.path.abspath(sys.argv[0])]
        self.port = ["--port", str(port)] if port != PORT else []
        self.environment = {**os.environ, "XDG_STATE_HOME": os.path.join(folder, "state")}
        self.environment.pop("STATE_DIRECTORY", None)
        self.orders = 0  # committed to the database
        self._processes: list[Any] = []
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_orders, daemon=True, name="writer")

    def path(self, *names: str) -> str:
        """Return the path of something in the folder."""
        return os.path.join(self.folder, *names)

    def write(self, name: str, content: bytes) -> None:
        """Write a file of one of the machines."""
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as file:
            file.write(content)

    def begin(self) -> None:
        """Make the files of both machines, and start to write into the database."""
        self.write("shop/letter.txt", b"Dear customer,\nyour order is on its way.\n")
        self.write("shop/old.txt", b"not needed for long\n")
        self.write("office/photo.raw", os.urandom(3 << 20))
        self._writer.start()
        self.wait(lambda: self.orders > 10, "the database was not written")

    def change(self) -> None:
        """Change, add and remove files."""
        self.write("shop/letter.txt", b"Dear customer,\nyour order was lost.  We are sorry.\n")
        self.write("shop/new.txt", b"written since the first sweep\n")
        os.unlink(self.path("shop/old.txt"))
        with open(self.path("office/photo.raw"), "r+b") as photo:
            photo.seek(1 << 20)
            photo.write(os.urandom(PAGE))

    def _write_orders(self) -> None:
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.path("shop/orders.sqlite"))) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY, what TEXT)")
            while not self._closed.is_set():
                with database:
                    database.execute("INSERT INTO orders (what) VALUES (?)", (os.urandom(50).hex(),))
                self.orders += 1
                self.clock.sleep(0.005)

    def wait(self, condition: Callable[[], bool], failure: str, longest: float = DEMO_WAIT) -> None:
        """Wait until something is so; BackupError when it takes too long (s), Interrupted by a signal."""
        end = self.clock.monotonic() + longest
        while not condition():
            if self.interrupted.is_set():
                raise Interrupted("interrupted")
            if self.clock.monotonic() > end:
                raise BackupError(f"{failure} within {longest:g} s")
            self.clock.sleep(0.02)

    def _show(self, arguments: Sequence[str], end: str = "") -> list[str]:
        import shlex

        print(f"\n$ {shlex.join([*self.program, *arguments])}{end}", flush=True)
        return [sys.executable, *self.program[1:], *arguments]

    def start_node(self, address: str) -> None:
        """Start a node and wait until it serves."""
        import subprocess

        arguments = ["node", "--bind", address, "--server-key", PUBLIC_FILE, "--file", DEMO[address], *self.port]
        log = self.path(f"{DEMO[address]}.log")
        with open(log, "wb") as output:
            command = self._show(arguments, f" > {DEMO[address]}.log 2>&1 &")
            node = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=output, stderr=output)
        self._processes.append(node)

        def is_ready() -> bool:
            with open(log, encoding="utf-8", errors="replace") as file:
                said = file.read().strip()
            if node.poll() is not None:
                raise BackupError(f"the node of {address} did not start: {said.removeprefix('zbackup: ')}")
            return "serving" in said

        self.wait(is_ready, f"the node of {address} did not start")

    def run(self, *arguments: str) -> None:
        """Run a command in the folder, and show it; BackupError unless its exit code is 0."""
        import subprocess

        process = subprocess.Popen(self._show(arguments), cwd=self.folder, env=self.environment)
        self._processes.append(process)
        self.wait(lambda: process.poll() is not None, f"`{arguments[0]}` did not end", FREEZE_TIMEOUT)
        if process.returncode:
            raise BackupError(f"`{arguments[0]}` ended with code {process.returncode}")

    def compare(self, orders: int) -> None:
        """Raise BackupError unless what was restored is what the machines have, and had."""
        import sqlite3

        for name in ("shop/letter.txt", "shop/new.txt", "office/photo.raw"):
            with open(self.path(name), "rb") as one, open(self.path("restored", name), "rb") as other:
                if one.read() != other.read():
                    raise BackupError(f"{name} is not what was restored")
        with open(self.path("first/shop/letter.txt"), "rb") as letter:
            if b"on its way" not in letter.read() or os.path.exists(self.path("restored/shop/old.txt")):
                raise BackupError("the versions of the files are mixed up")
        with contextlib.closing(sqlite3.connect(self.path("restored/shop/orders.sqlite"))) as database:
            ((sound,),) = database.execute("PRAGMA integrity_check")
            ((count, last),) = database.execute("SELECT count(*), max(number) FROM orders")
        if sound != "ok" or not orders <= count == last <= self.orders:
            raise BackupError(f"the database has {count} of {orders} orders; SQLite says: {sound}")
        print(f"\nThe files are the same; the database is sound, with {count} orders ({orders} before the sweep).")

    def close(self) -> None:
        """End all processes, and the writer."""
        import subprocess

        self._closed.set()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._writer.is_alive():
            self._writer.join(5)


def show_demo(demo: Demo) -> None:
    """Copy two machines twice, restore, compare, verify; BackupError where something is not right."""
    print(f"Two machines in {demo.folder}: a shop at 127.0.0.9, whose database is in use, and an office at 127.0.0.10.")
    demo.begin()
    print("\nThe server's public key, which the nodes are given:")
    demo.run("key", "--file", PUBLIC_FILE)
    for address in DEMO:
        demo.start_node(address)
    sweep = ["server", "--range", "9-10", *demo.port, "--once"]
    demo.run(*sweep)
    print("\nA letter and a page of the photo change, a file is new, one is gone, the database goes on; once more:")
    demo.change()
    orders = demo.orders
    demo.run(*sweep)
    print("\nThe versions that there are now:")
    demo.run("list", "127.0.0.9")
    demo.run("list", "127.0.0.9", "shop/letter.txt")
    print("\nRestored: the newest version of both, the first version of the letter:")
    first = min(name[: -len(".json")] for name in os.listdir(demo.path("backups/127.0.0.9/snapshots")))
    for address in DEMO:
        demo.run("restore", address, "--to", "restored")
    demo.run("restore", "127.0.0.9", "shop/letter.txt", "--at", first, "--to", "first")
    demo.compare(orders)
    demo.run("verify")


def run_demo(args: argparse.Namespace) -> int:
    """Show on this machine alone what zbackup does."""
    import shlex
    import shutil
    import tempfile

    port = find_port(args.port)
    folder = os.path.abspath(args.to) if args.to else tempfile.mkdtemp(prefix="zbackup-demo-")
    if args.to:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise UsageError(f"--to {show(args.to)}: there are files in it; name a new folder")
    stop = threading.Event()
    demo = Demo(folder, port, (make_clock(), stop))
    with stopping(stop):
        try:
            show_demo(demo)
            print("\nAll is well; its files are removed." if args.temporary else DEMO_FILES.format(folder=folder))
            print(DEMO_NEXT.format(program=shlex.join(demo.program)))
            return 0
        except Interrupted:
            raise
        except BackupError as error:
            where = "its files are removed" if args.temporary else f"see {folder}"
            raise type(error)(f"the demo failed: {error}; {where}") from None
        finally:
            demo.close()
            if args.temporary:
                shutil.rmtree(folder, ignore_errors=True)


# ---- flags ----


class Parser(argparse.ArgumentParser):
    """A parser whose @FILE holds flags as on a command line, with comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return the words of one line of an @FILE."""
        import shlex

        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UsageError(f"@FILE, line {show(arg_line)}: {error}") from None


METAVARS: dict[Any, str] = {
    parse_share: "SHARE",
    parse_span: "SPAN",
    parse_size: "SIZE",
    parse_count: "N",
    parse_workers: "N",
    parse_level: "N",
    parse_port: "PORT",
}


def add_values(parser: Any, rows: Iterable[tuple[str, Callable[[str], Any], Any, str]]) -> None:
    """Add flags that take one value: name, how it is read, default, what it is."""
    for name, read, default, words in rows:
        shown = {"SPAN": write_span, "SIZE": write_size, "SHARE": write_share}.get(METAVARS[read], str)(default)
        parser.add_argument(
            name,
            type=read,
            default=default,
            metavar=METAVARS[read],
            help=f"{words} (default {shown})".replace("%", "%%"),
        )


def add_words(parser: Any, rows: Iterable[tuple[str, str, str]]) -> None:
    """Add flags that take one word, empty unless given: name, what it stands for, what it is."""
    for name, metavar, words in rows:
        parser.add_argument(name, default="", metavar=metavar, help=words)


def add_switches(parser: Any, rows: Iterable[tuple[str, str]]) -> None:
    """Add flags that take no value: name, what it does."""
    for name, words in rows:
        short = ["-q"] if name == "--quiet" else []
        parser.add_argument(name, *short, action="store_true", help=words)


NODE_HELP = "folder, address or host name of a node"
WHEN_HELP = "latest, a snapshot's name, a date, 'date time', or how long ago: 3d"

COMMON_LIMITS: list[tuple[str, Callable[[str], Any], Any, str]] = [  # of both roles
    (
        "--level",
        parse_level,
        LEVEL,
        "compression level of zstd or zlib; a node takes the next one for small files",
    ),
    ("--heartbeat", parse_span, HEARTBEAT, "pause between the pings that find a dead peer"),
]
KEY_FILE = ("--key-file", "FILE", "the server's secret key (default: keys/server in the store)")
LOG_FILE = ("--log-file", "FILE", "append all messages, with their times, to a file")


def add_node_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `node`."""
    files = f"a file, folder or 'glob' to serve; repeatable (default {FILE})"
    parser.add_argument("--file", action="append", metavar="PATH", help=files)
    excludes = "leave out what matches, as in a .gitignore, but not what --file names; repeatable"
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=excludes)
    bind = "address to listen at (default '*': all of this machine's)"
    parser.add_argument("--bind", default="*", metavar="ADDRESS", help=bind)
    add_values(parser, [("--port", parse_port, PORT, "TCP port to listen at")])
    words = [
        ("--name", "NAME", "what reports call this machine (default: its host name)"),
        ("--server-key", "KEY", f"public key of the server to answer, or its file (default: {PUBLIC_FILE}, if there)"),
        ("--folder", "NAME", "folder wished for in the store (default: the address first seen)"),
        ("--user", "NAME", "started by root: run as this user, who can read all files and write none (Linux)"),
        ("--before", "CMD", "shell command run before each copy; if it fails, so does the copy"),
        ("--after", "CMD", "shell command run after each copy, also after one that failed"),
        ("--state", "DIR", "where the identity and frozen copies are kept (default ~/.local/state/zbackup)"),
        LOG_FILE,
    ]
    add_words(parser, words)
    switches = [
        ("--one-file-system", "do not go into other filesystems mounted below a folder, but where --file names them"),
        ("--insecure", "without a server's key, answer any machine: all on the network can read the files"),
        ("--quiet", "print problems only"),
    ]
    add_switches(parser, switches)
    limits = [
        *COMMON_LIMITS,
        ("--margin", parse_span, MARGIN, "files younger than this are read again next time, whatever their times say"),
        ("--sessions", parse_count, SESSIONS, "servers served at once"),
        ("--session-timeout", parse_span, SESSION_TIMEOUT, "a server that asks nothing for so long is gone"),
        ("--locked-timeout", parse_span, LOCKED_TIMEOUT, "how long to wait for a locked SQLite database"),
        ("--handshake-timeout", parse_span, HANDSHAKE_TIMEOUT, "how long a peer may take to prove its key"),
        ("--working-every", parse_span, WORKING_EVERY, "pause between two signs that long work goes on"),
    ]
    add_values(parser.add_argument_group("limits, rarely changed"), limits)


def add_store_flag(parser: argparse.ArgumentParser) -> None:
    """Add --store, which every command of the server's side has, and how long to wait for it."""
    parser.add_argument("--store", default=STORE, metavar="DIR", help="the folder of the backups (default %(default)s)")
    add_values(parser, [("--lock-wait", parse_span, LOCK_WAIT, "how long to wait for a store that another run has")])


def add_keep_flags(parser: argparse.ArgumentParser, when: str) -> None:
    """Add the flags of retention, which `prune` and `server` have."""
    keep = f"{when}; periods: {', '.join(PERIODS)}, each with a number or 'all'"
    parser.add_argument("--keep", type=parse_keep, default=(), metavar="'last 3, daily 7'", help=keep)
    rows = [
        ("--grace", parse_span, GRACE, "how long removed snapshots stay in the trash"),
        ("--max-repack", parse_size, MAX_REPACK, "bytes of half-empty packs rewritten by one prune"),
        ("--reserve", parse_size, RESERVE, "bytes kept back for the day when the disk is full"),
    ]
    add_values(parser, rows)


def add_check_flags(parser: argparse.ArgumentParser, switches: Iterable[tuple[str, str]]) -> None:
    """Add the switches of a command that looks at the store, and where its messages go."""
    add_switches(parser, [*switches, ("--quiet", "print problems only")])
    add_words(parser, [LOG_FILE])


def add_key_commands(add: Callable[..., argparse.ArgumentParser], parser: argparse.ArgumentParser) -> None:
    """Add the commands of keys and of who is known; `parser` reads the flags that a unit is to have."""
    command = add("key", run_key, "Print the server's public key, which nodes are given; make the pair at first use.")
    add_store_flag(command)
    add_words(command, [KEY_FILE, ("--file", "FILE", f"write the key there instead, as {PUBLIC_FILE}")])
    command = add("nodes", run_nodes, "List the nodes that are known: key, addresses, first and last seen.")
    add_store_flag(command)
    add_switches(command, [("--json", "print JSON")])
    command = add("trust", run_trust, "Accept another key for a node, or the key of a node that is yet to come.")
    add_store_flag(command)
    command.add_argument("node", metavar="NODE", help=NODE_HELP)
    command.add_argument("key", nargs="?", metavar="KEY", help="the key (default: the one met in place of the node's)")
    add_switches(command, [("--new", "who was met there is another machine: it gets a folder of its own")])
    command = add("forget", run_forget, "Expect a node no more, and know its key no more; its copies stay.")
    add_store_flag(command)
    command.add_argument("node", metavar="NODE", help=NODE_HELP)
    command = add("unit", run_unit, "Print a hardened systemd unit for a role, with the flags that it is to have.")
    command.add_argument("kind", choices=["node", "server", "timer"], help="what it is for")
    command.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAG", help="flags of the role")
    command.set_defaults(parser=parser)


def add_keep_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands of KEEP."""
    command = add("prune", run_prune, "Remove the snapshots that --keep does not keep; free what nothing names.")
    add_store_flag(command)
    add_keep_flags(command, "which good snapshots of each node to keep (default: all)")
    switches = [("--dry-run", "print what would be done, with reasons, and do nothing"), ("--json", "print JSON")]
    add_check_flags(command, switches)
    command = add("undelete", run_undelete, "Bring snapshots back that were removed and are still in the trash.")
    add_store_flag(command)
    command.add_argument("node", metavar="NODE", help=NODE_HELP)
    command.add_argument("snapshot", nargs="*", metavar="SNAPSHOT", help="which ones")
    add_switches(command, [("--all", "all that the trash of this node has")])
    command = add("release", run_release, "Answer the alarm of a node whose files became much fewer, or unreadable.")
    add_store_flag(command)
    command.add_argument("node", metavar="NODE", help=NODE_HELP)


def add_check_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that look for damage, mend it, and try a restore."""
    command = add("verify", run_verify, "Check packs, index, snapshots and `latest`; name the files that are harmed.")
    add_store_flag(command)
    rows = [
        ("--sample", parse_share, 1.0, "share of all bytes to read, those first that were not read for longest"),
        ("--max-time", parse_span, 1e9, "begin no other pack after so long"),
    ]
    add_values(command, rows)
    add_check_flags(command, [("--json", "print JSON")])
    command = add("repair", run_repair, "Mend a damaged store: index, packs, snapshots; mark what is lost.")
    add_store_flag(command)
    add_values(command, [("--reserve", parse_size, RESERVE, "bytes kept back for the day when the disk is full")])
    add_check_flags(command, [("--dry-run", "print what would be done, and do nothing")])
    command = add("drill", run_drill, "Restore a sample of each node for practice, compare it, check its database.")
    add_store_flag(command)
    add_values(command, [("--sample", parse_count, DRILL_FILES, "files of each node")])
    add_words(command, [("--to", "DIR", "folder for what is restored, for as long as it takes (default: temporary)")])
    add_check_flags(command, [("--json", "print JSON")])


def count_processors() -> int:
    """Return how many processes may write files; one where they cannot be forked."""
    if not hasattr(os, "sched_getaffinity"):  # as on macOS, where forking is not safe
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_WRITERS)


TABLE_SIZE = "/proc/sys/net/ipv4/neigh/default/gc_thresh3"  # of Linux; containers do not see it


def count_neighbours() -> int:
    """Return how many addresses the kernel's table of neighbours holds, as far as it tells."""
    with contextlib.suppress(OSError, ValueError), open(TABLE_SIZE) as file:
        return int(file.read())
    return NEIGHBOURS


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `server`."""
    numbers = "last parts of the addresses: 9, 9-12 or 9,12,20-30"
    parser.add_argument("--range", type=parse_range, metavar="RANGE", help=numbers)
    parser.add_argument("--network", metavar="NET", help=f"192.168.1 or 192.168.1.0/24 (default {NETWORK})")
    hosts = "a machine by name, IPv4 or [IPv6]; repeatable"
    parser.add_argument("--host", type=parse_host, action="append", default=[], metavar="NAME[:PORT]", help=hosts)
    add_store_flag(parser)
    add_keep_flags(parser, "after each sweep, remove the good snapshots that no rule keeps (default: keep all)")
    values = [
        ("--port", parse_port, PORT, "TCP port of the nodes"),
        ("--every", parse_span, EVERY, "time from the start of one sweep to the next"),
        ("--timeout", parse_span, HELLO_TIMEOUT, "how long an address may take to say that it is alive"),
        ("--jobs", parse_count, JOBS, "nodes copied at once"),
        ("--latest-jobs", parse_workers, count_processors(), "processes that write `latest` side by side"),
        ("--stale", parse_span, STALE, "how long a known node may be missing before the exit code is 3"),
    ]
    add_values(parser, values)
    switches = [
        ("--once", "make one sweep and end with its exit code"),
        ("--strict", "copy only nodes whose keys are known, see `trust`"),
        ("--checksum", "trust no timestamps: compare the content of all files"),
        ("--quiet", "print problems only"),
        ("--json", "print one JSON object for each sweep"),
    ]
    add_switches(parser, switches)
    no_create = "make no new store: one that is not there is on a disk that is not mounted"
    parser.add_argument("--no-create", dest="create", action="store_false", help=no_create)
    no_latest = "keep no plain files of the newest version beside the packs"
    parser.add_argument("--no-latest", dest="latest", action="store_false", help=no_latest)
    add_words(parser, [KEY_FILE, ("--user", "NAME", "started by root: run as this user, who has the store"), LOG_FILE])
    limits = [
        *COMMON_LIMITS,
        ("--window", parse_size, WINDOW, "bytes asked of a node and not yet received"),
        ("--tries", parse_count, TRIES, "readings of a file that keeps changing"),
        ("--pause", parse_span, PAUSE, "pause before the second reading, then doubled"),
        ("--answer-timeout", parse_span, ANSWER_TIMEOUT, "how long a node may be mute"),
        ("--freeze-timeout", parse_span, FREEZE_TIMEOUT, "how long one question may take a node, --before included"),
        ("--neighbours", parse_count, count_neighbours(), "size of the kernel's table of neighbours"),
        ("--pack-size", parse_size, PACK_SIZE, "size of a pack file"),
        ("--pack-chunks", parse_count, PACK_CHUNKS, "chunks in a pack file at most"),
        ("--most-files", parse_count, MOST_FILES, "files that one node may list"),
        ("--most-bytes", parse_size, MOST_BYTES, "bytes that one node may send in one copy"),
        ("--longest", parse_span, LONGEST, "how long one copy may take; the next one goes on from there"),
    ]
    add_values(parser.add_argument_group("limits, rarely changed"), limits)


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `demo`."""
    add_words(parser, [("--to", "DIR", "a new folder for all that it makes (default: in the temporary one)")])
    port = f"TCP port of its nodes (default {PORT}, or a free one where that is taken)"
    parser.add_argument("--port", type=parse_port, default=0, metavar="PORT", help=port)
    add_switches(parser, [("--temporary", "remove all that it made at the end")])


def add_version_flags(parser: argparse.ArgumentParser) -> None:
    """Add what names a node's snapshot: --store, NODE and --at."""
    add_store_flag(parser)
    parser.add_argument("node", metavar="NODE", help=NODE_HELP)
    parser.add_argument("--at", default="latest", metavar="WHEN", help=f"which version: {WHEN_HELP}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="zbackup",
        formatter_class=formatter,
        description="Back up the machines of a LAN to one server, every version.",
        epilog="examples:\n" + "\n".join(EXAMPLES.values()) + "\n\n" + EXIT_CODES,
        fromfile_prefix_chars="@",
    )
    parser.add_argument("--version", action="version", version=f"zbackup {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=words,
            description=words,
            epilog=f"examples:\n{EXAMPLES[name]}\n\n{EXIT_CODES}",
            formatter_class=formatter,
            fromfile_prefix_chars="@",
        )
        command.set_defaults(run=run)
        return command

    add_server_flags(add("server", run_server, "Sweep a range of addresses and copy the nodes that answer."))
    add_node_flags(add("node", run_node, "Serve files of this machine to the backup server."))
    command = add("list", run_list, "List nodes, a node's snapshots, or the versions of a path.")
    add_store_flag(command)
    command.add_argument("node", nargs="?", metavar="NODE", help=NODE_HELP)
    command.add_argument("path", nargs="?", metavar="PATH", help="list the versions of this path")
    command.add_argument("--at", metavar="WHEN", help=f"list the files of one snapshot instead: {WHEN_HELP}")
    add_switches(command, [("--trash", "list what was removed from a node"), ("--json", "print JSON")])
    command = add("restore", run_restore, "Restore files of a node, with all that was known of them.")
    add_version_flags(command)
    command.add_argument("path", nargs="*", metavar="PATH", help="what to restore (default: all)")
    command.add_argument("--to", required=True, metavar="DIR", help="the folder to restore into; made at need")
    switches = [
        ("--overwrite", "replace files that exist"),
        ("--numeric-ids", "set owners by number, not by name"),
        ("--quiet", "print problems only"),
    ]
    add_switches(command, switches)
    add_values(command, [("--jobs", parse_workers, count_processors(), "processes that write files side by side")])
    command = add("cat", run_cat, "Write one file of a node to standard output.")
    add_version_flags(command)
    command.add_argument("path", metavar="PATH", help="the file")
    add_key_commands(add, parser)
    add_keep_commands(add)
    add_check_commands(add)
    add_demo_flags(add("demo", run_demo, "Show on this machine alone what zbackup does, in a folder of its own."))
    return parser


def open_streams() -> None:
    """Give a process that was started without standard streams those that lead nowhere.

    The lowest first, which is where each comes to lie: no file of a store may be taken for one of them.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for; paths may stand after flags, too, which argparse takes for too many."""
    parser = make_parser()
    try:
        args, rest = parser.parse_known_args(arguments)
    except RecursionError:
        raise UsageError("an @FILE names itself") from None
    if rest and not any(word.startswith("-") for word in rest):
        if isinstance(getattr(args, "path", None), list):
            args.path += rest
            rest = []
        elif getattr(args, "path", "") is None:
            args.path, *rest = rest
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(map(show, rest))}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    import signal

    open_streams()
    try:
        with contextlib.suppress(ValueError):  # not the main thread: somebody else's program
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that half files are removed
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        args = read_arguments(arguments)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BackupError as error:
        print(f"zbackup: {error}", file=sys.stderr)
        return error.exit_code
    except UnicodeDecodeError as error:
        print(f"zbackup: @FILE is not UTF-8: {error.reason}", file=sys.stderr)
        return UsageError.exit_code
    except KeyboardInterrupt:
        print("zbackup: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        # BrokenPipeError: the reader of our output went away, as `head` does; nothing to say.
        if not isinstance(error, BrokenPipeError):
            print(f"zbackup: {explain_at(error)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        return BackupError.exit_code


if __name__ == "__main__":
    sys.exit(main())
