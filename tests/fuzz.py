"""Coverage-guided fuzzing of every decoder, with atheris (libFuzzer for Python).

    python tests/fuzz.py TARGET [CORPUS] [libFuzzer flags, such as -max_total_time=60]
    python tests/fuzz.py TARGET FILE        run one input again, such as the one that a failure left
    python tests/fuzz.py --list

A target takes any bytes, feeds them to decoders, and lets pass success or one of our errors.
Anything else is a finding: another exception, a broken promise (an assertion of the target), more
memory than MEMORY, a hang.  Each target starts from valid inputs (`seeds`), and what it breaks is
mended where a checksum would keep it out (`mend`), so that the fuzzer gets behind it.

To add a target, write a function with `@target(...)`; tests/test_fuzz.py runs all there are, and
fails while a function called decode_*, load_* or parse_* is reached by none.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, cast

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: a changed copy may stand before it

atheris: Any = None
if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["zbackup"], enable_loader_override=False):
        import zbackup as z
else:  # the inputs of the tests run without atheris
    import zbackup as z

MEMORY = 96 << 20  # bytes that one input may add to the most that the process ever had
FLAGS = ["-timeout=20", "-rss_limit_mb=1500", "-print_final_stats=1", "-max_len=65536"]
FLAGS += [f"-artifact_prefix={tempfile.gettempdir()}/zbackup-fuzz-"]  # where what fails is put
NOW = 1_800_000_000 * 10**9  # ns: the clock of all targets stands still, so that runs can be repeated


# ---- targets ----


@dataclass(frozen=True)
class Target:
    """What is fuzzed, and how its inputs are made."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]  # valid inputs
    split: Callable[[bytes], list[bytes]]  # into parts that are mutated one by one
    join: Callable[[Sequence[bytes]], bytes]
    mend: Callable[[list[bytes], random.Random], list[bytes]]  # make checksums and lengths fit again


TARGETS: dict[str, Target] = {}


def split_frames(data: bytes) -> list[bytes]:
    """Return the parts of an input of several parts, each after its length; never fails."""
    parts, at = [], 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return parts or [data]


def join_frames(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def split_lines(data: bytes) -> list[bytes]:
    """Return lines, and what stands between tabs in them, with their separators as parts."""
    return re.split(rb"([\t\n])", data)


def target(
    seeds: Callable[[], Iterable[bytes]],
    split: Callable[[bytes], list[bytes]] = lambda data: [data],
    join: Callable[[Sequence[bytes]], bytes] = b"".join,
    mend: Callable[[list[bytes], random.Random], list[bytes]] = lambda parts, chance: parts,
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Make a function from bytes a target, called as the function is."""

    def add(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[run.__name__] = Target(run, seeds, split, join, mend)
        return run

    return add


@contextlib.contextmanager
def ours(*more: type[BaseException]) -> Iterator[None]:
    """Let one of our errors pass as an answer; `more` are those that a decoder documents besides."""
    with contextlib.suppress(z.BackupError, *more):
        yield


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail when the process comes to need much more memory than it ever had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert taken < MEMORY, f"took {taken >> 20} MiB for one input"


@functools.lru_cache(maxsize=1)
def workplace() -> str:
    """Return a folder of this process, in memory where that can be had."""
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=os.environ.get("TMPDIR") or best_temporary())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def best_temporary() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


CLOCK = z.Clock(lambda: NOW, lambda: 0.0, lambda seconds: None)


# ---- mutation ----

ODD_NUMBERS = [0, 1, -1, 2, 7, 255, 256, 1023, 1024, 1025, z.PAGE, z.CHUNK - 1, z.CHUNK, z.CHUNK + 1, 1 << 31]
ODD_NUMBERS += [(1 << 32) - 1, z.FILE_LIMIT, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, 1 << 64, -(1 << 63), 10**40]
ODD_TEXTS = ["", "a", "/", "..", ".", "a/../b", "\0", "\x1b[2J", "é", "\udce9", "\udcc3\udca9", "\ud800", "\U0001f600"]
ODD_TEXTS += ["x" * 300, "٣", "0" * 64, "same", "whole", "patch", "zeros", "end", "gone", "lost", "later", "error"]
ODD_VALUES = ["null", "true", "false", "1.5", "1e300", "NaN", "Infinity", "[]", "{}", "[[]]", "[0,1]", "[[0,1]]"]
NEST = "a deep nest stands here"


def slots_of(value: Any) -> list[tuple[Any, Any]]:
    """Return all places in a JSON value, as the container and the key or number in it."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    return found


def change_slot(holder: Any, key: Any, slots: list[tuple[Any, Any]], chance: random.Random) -> None:
    """Change one place of a JSON value."""
    old = holder[key]
    other, name = chance.choice(slots)
    how = chance.randrange(9)
    if how == 0:
        del holder[key]
    elif how == 1:
        copied = json.dumps(other[name])  # a copy: no value may come to hold itself
        holder[key] = json.loads(copied) if len(copied) < 10_000 else None
    elif how == 2 and isinstance(holder, list):
        many = 1 if isinstance(old, (dict, list)) else 300
        holder[key:key] = [json.loads(json.dumps(old)) for _ in range(chance.choice([1, 1, 2, many]))]
    elif how == 2:
        holder[chance.choice(["size", "xattrs", "line", "error", "wal", "chunks", "lists", "a"])] = None
    elif how == 3 and type(old) is int:
        holder[key] = old + chance.choice([-z.CHUNK, -z.PAGE, -1, 1, z.PAGE, z.CHUNK])
    elif how == 4 and isinstance(old, str) and old:
        at = chance.randrange(len(old))
        holder[key] = old[:at] + chance.choice(["", "0", "f", "/", "é", "\udcff", "\\", old]) + old[at + 1 :]
    elif how == 5:
        holder[key] = NEST
    elif how == 6:
        holder[key] = chance.choice(ODD_TEXTS)
    elif how == 7:
        holder[key] = chance.choice(ODD_NUMBERS)
    else:
        holder[key] = json.loads(chance.choice(ODD_VALUES))


def change_json(data: bytes, chance: random.Random) -> bytes:
    """Return JSON with some places changed; ValueError where it is none."""
    value = json.loads(data)
    if not isinstance(value, (dict, list)):
        raise ValueError
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        slots = slots_of(value)
        if slots:
            change_slot(*chance.choice(slots), slots, chance)
    text = z.write_json(value)
    depth = chance.choice([1, 5, 400, 930, 990, 5000])
    return text.replace(f'"{NEST}"', "[" * depth + "]" * depth, 1).encode("ascii")


def change_lines(data: bytes, chance: random.Random) -> bytes:
    """Return text with its lines in another order, one twice or one less."""
    lines = data.split(b"\n")
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    how = chance.randrange(3)
    if how == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif how == 1:
        lines[one:one] = [lines[other]]
    else:
        del lines[one]
    return b"\n".join(lines)


def mutate(goal: Target, data: bytes, most: int, seed: int, change: Callable[[bytes, int], bytes]) -> bytes:
    """Return a changed input: one of its parts by its meaning or by `change`, then mended."""
    chance = random.Random(seed)
    parts = goal.split(data)
    for _ in range(chance.choice([1, 1, 2])):
        which = chance.randrange(len(parts))
        how = chance.random()
        if how < 0.05 and len(parts) > 1:
            parts[which] = chance.choice(parts)
        elif how < 0.08:
            parts[which:which] = [parts[which]]
        elif how < 0.1 and len(parts) > 1:
            del parts[which]
        elif how < 0.3 and b"\n" in parts[which]:
            parts[which] = change_lines(parts[which], chance)
        elif how < 0.6:
            try:
                parts[which] = change_json(parts[which], chance)
            except (ValueError, RecursionError):
                parts[which] = change(parts[which], most)
        else:
            parts[which] = change(parts[which], most)
        if not parts:
            return data
    if chance.random() < 0.9:
        parts = goal.mend(parts, chance)
    changed = goal.join(parts)
    return changed if len(changed) <= most else data


# ---- bytes that several targets use ----


def noise(length: int, seed: str = "") -> bytes:
    """Return bytes that do not shrink, the same for the same seed."""
    return hashlib.shake_128(seed.encode()).digest(length)


def digest_of(data: bytes | memoryview) -> bytes:
    return z.digest_pages(z.hash_pages(data))


def unpack(codec: object, data: bytes, most: int = 4 << 20) -> bytes:
    """Return what a frame holds, whatever size it says; b"" where that cannot be told."""
    try:
        if codec == z.ZLIB:
            return zlib.decompressobj().decompress(data, most)
        if codec == z.ZSTD:
            return bytes(z.load_zstd().ZstdDecompressor().decompress(data, most))
    except Exception:
        return b""
    return data


STATS = [
    z.Stat(b"d", "directory", 0o755, 1000, 1000, "u", "g", mtime=5, xattrs={"user.a": "YQ=="}),
    z.Stat(b"d/a", "file", 0o644, 1, 2, "é", "", 5000, 1, 2, 3, links=2, device=7, sparse=True, fresh=True),
    z.Stat(b"d/b\xff", "symlink", 0o777, target=b"../\xfe"),
    z.Stat(b"d/c.db", "file", size=8192, inode=9, database=True, wal=(4096, 77), error="permission denied"),
    z.Stat(b"d/n", "block", rdev=0x801),
    z.Stat("d/ö".encode(), "file", size=3 << 30),
]
CONTENTS = [
    z.NOTHING,
    z.Content(5000, (digest_of(b"x" * 5000),), (), "stable", xattrs={"user.b": "Yg=="}),
    z.Content(3 << 20, (digest_of(b"x"), 1, digest_of(b"y")), (), "frozen"),
    z.Content(error="gone"),
    z.NOTHING,
    z.Content(3 << 30, (), (digest_of(b"1"), digest_of(b"2"), digest_of(b"3")), "torn"),
]


def put_file(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


# ---- codecs ----


def codec_seeds() -> Iterator[bytes]:
    for codec in (z.PLAIN, z.ZLIB, z.ZSTD):
        for data, said in ((b"", 0), (b"text " * 900, 4500), (noise(300), 300), (b"ab", 3), (bytes(64 << 20), 1000)):
            if len(data) < z.CHUNK or codec != z.PLAIN:
                packed = data if codec == z.PLAIN else z._compress(codec, data, 1)
                yield bytes([codec]) + said.to_bytes(4, "big") + packed


@target(codec_seeds)
def codec(data: bytes) -> None:
    """A frame of any codec: what it says of its size is what it takes."""
    size = min(int.from_bytes(data[1:5], "big"), z.RECORD_LIMIT)
    with ours():
        assert len(z.decompress(data[0] if data else 0, memoryview(data)[5:], size)) == size


# ---- a record of a pack, its parts one by one ----


def record_seeds() -> Iterator[bytes]:
    rows = [(digest_of(b"a" * 5000), 5000), (digest_of(b""), 0)]
    framed = z.encode_record(z.FRAME, rows, z.hash_pages(b"a" * 5000), (z.PLAIN, 5000, b"a" * 5000))
    yield b"r" + framed[: 32 + 36 * 2 + 32]
    patch = z.encode_patch([z.Run(rows[0][0], 0, 4096), z.Run(rows[1][0], 4096, 10), z.Run(rows[0][0], 1, 1)])
    yield b"p" + patch
    yield b"r" + z.encode_record(z.PATCHES, [(digest_of(b"q"), len(patch))], b"", (z.PLAIN, len(patch), b""))
    yield b"f" + z.encode_footer([(8, 1, [digest for digest, _ in rows]), (900, 2, []), (950, 1, [bytes(32)])], 9)


@target(record_seeds)
def record(data: bytes) -> None:
    """The head and table of a record, a patch, a footer; what decodes encodes to the same."""
    kind, data = data[:1], data[1:]
    with ours():
        if kind == b"p":
            runs = z.decode_patch(data)
            assert sum(run.length for run in runs) <= z.CHUNK
            assert z.decode_patch(z.encode_patch(runs)) == runs
        elif kind == b"f":
            footer = data[: -z.TRAILER.size]
            proof = hashlib.sha256(footer).digest()
            assert sum(len(digests) for _, _, digests in z.decode_footer(footer, proof)) <= len(footer) // z.DIGEST
        else:
            head, rest = data[: z.RECORD.size], data[z.RECORD.size :]
            size = z.decode_record_head(head, 8)[3]
            found = z.decode_record(head, rest[:size], 8)
            assert found.starts[-1] == found.raw
            for place in range(min(len(found.rows), 100)):
                found.pages(place)


# ---- whole packs, read through an index ----

BASE = b"".join(bytes([65 + i]) * z.PAGE for i in range(6)) + b"tail"  # a chunk whose pages differ


def make_pack(records: Sequence[tuple[int, int, Sequence[tuple[bytes, bytes]], bytes]]) -> bytes:
    """Return a pack of records: kind, codec, (digest, data) rows, and what to put before the hashes."""
    pack, places = z.PACK_HEADER, []
    for kind, codec, rows, extra in records:
        raw = b"".join(data for _, data in rows)
        hashes = b"".join(z.hash_pages(data) for _, data in rows) if kind == z.FRAME else b""
        stored = raw if codec not in (z.ZLIB, z.ZSTD) else z._compress(codec, raw, 1)
        table = [(digest, len(data)) for digest, data in rows]
        places.append((len(pack), kind, [digest for digest, _ in rows]))
        pack += z.encode_record(kind, table, extra + hashes, (codec, len(raw), stored))
    return pack + z.encode_footer(places, len(pack))


def take_apart(pack: bytes) -> list[tuple[int, int, list[tuple[bytes, bytes]], bytes]]:
    """Return the records of a pack for make_pack; ValueError or struct.error where it is too broken."""
    found, at = [], len(z.PACK_HEADER)
    while pack[at : at + 4] == z.RECORD_MAGIC:
        _, kind, codec, _, count, table, _, stored = z.RECORD.unpack_from(pack, at)
        at += z.RECORD.size
        rows = [z.TABLE_ROW.unpack_from(pack, at + i * z.TABLE_ROW.size) for i in range(min(count, 1000))]
        raw = unpack(codec, pack[at + table : at + table + stored])
        at += table + stored
        parts, start = [], 0
        for digest, length in rows:
            parts.append((digest, raw[start : start + length]))
            start += length
        found.append((kind, codec, parts, b""))
    return found


def change_pack(pack: bytes, chance: random.Random) -> bytes:
    """Return a pack with one thing changed and all lengths and proofs right."""
    records = take_apart(pack)
    if not records:
        raise ValueError
    which = chance.randrange(len(records))
    kind, codec, rows, extra = records[which]
    how = chance.randrange(7)
    if how == 0:
        codec = chance.choice([z.PLAIN, z.ZLIB, z.ZSTD, 3])
    elif how == 1:
        kind = chance.choice([z.FRAME, z.PATCHES])
    elif how == 2:
        records[which:which] = [records[which]]
    elif how == 3:
        extra = bytes(chance.choice([1, 16, 36]))
    elif rows:
        row = chance.randrange(len(rows))
        digest, data = rows[row]
        others = [other for _, _, some, _ in records for other in some]
        if how == 4:
            rows[row:row] = [(digest, data)]
        elif how == 5:
            rows[row] = (chance.choice(others)[0], data)  # one digest in two places, with two contents
        elif data:
            at = chance.randrange(len(data))
            rows[row] = (digest, data[:at] + chance.choice(others)[0] + data[at + chance.choice([1, 32]) :])
    records[which] = (kind, codec, rows, extra)
    return make_pack(records)


def mend_pack(parts: list[bytes], chance: random.Random) -> list[bytes]:
    """Make the trailers prove the footers again."""
    mended = []
    for pack in parts:
        if chance.random() < 0.5:
            with contextlib.suppress(ValueError, struct.error):
                mended.append(change_pack(pack, chance))
                continue
        start = int.from_bytes(pack[-48:-40], "little")
        footer = pack[start:-48] if 0 < start < len(pack) else b""
        mended.append(pack[:-40] + hashlib.sha256(footer).digest() + z.TRAILER_MAGIC if len(pack) > 60 else pack)
    return mended[:6]


def pack_seeds() -> Iterator[bytes]:
    small, middle = noise(300), b"text " * 2000
    patched = BASE[:8192] + small + BASE[8192 : 8192 + 500]
    patch = z.encode_patch([z.Run(digest_of(BASE), 0, 8192), z.Run(digest_of(small), 0, 300)])
    patch += b""
    whole = z.encode_patch(
        [z.Run(digest_of(BASE), 0, 8192), z.Run(digest_of(small), 0, 300), z.Run(digest_of(BASE), 8192, 500)]
    )
    for codec in (z.PLAIN, z.ZLIB, z.ZSTD):
        frame = [(digest_of(data), data) for data in (BASE, small, middle, b"")]
        first = (z.FRAME, codec, frame, b"")
        second = (z.PATCHES, codec, [(digest_of(patched), whole), (digest_of(b"?"), patch)], b"")
        yield join_frames([make_pack([first, second])])
        yield join_frames([make_pack([first]), make_pack([second, first])])
        yield join_frames([make_pack([first, second]), make_pack([second]), make_pack([])])


def put_pack(folder: str, index: z.Index, data: bytes) -> list[bytes]:
    """Put a pack into a folder and, unless that is damaged, its own index into an index; returns its digests."""
    name = hashlib.sha256(data).hexdigest()
    path = os.path.join(folder, name[:2], name + ".pack")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    put_file(path, data)
    rows = z.read_pack_index(path)
    index.put_pack(name, rows)
    return [digest for digest, _, _ in rows]


@target(pack_seeds, split_frames, join_frames, mend_pack)
def pack(data: bytes) -> None:
    """Whole packs in a folder: all that their indexes name is read, and is what its digest says."""
    folder = os.path.join(workplace(), "packs")
    index = z.Index(":memory:")
    reader = z.Reader(folder, index)
    digests: dict[bytes, None] = {}
    try:
        for part in split_frames(data)[:6]:
            with ours():
                digests.update(dict.fromkeys(put_pack(folder, index, part)[:200]))
        sound = True
        for name, path in z.list_packs(folder).items():
            with ours():
                list(z.list_patches(path))
            checked = z.verify_pack(reader, name, path)
            sound = sound and not checked.problem and not checked.bad
        for digest in list(digests)[:200]:
            read_chunk(reader, digest, sound)
    finally:
        reader.close()
        index.close()
        shutil.rmtree(folder, ignore_errors=True)


def read_chunk(reader: z.Reader, digest: bytes, sound: bool) -> None:
    """Read a chunk in each way there is; of packs that `verify` finds sound, each way must give it."""
    with ours():
        assert reader.gives(digest, reader.runs(digest)) in (True, False)
    with ours():
        assert z.digest_pages(reader.pages(digest)) == digest
    place = reader.find_sound(digest)
    assert (place is not None) == reader.has(digest), "found by one way, not found by another"
    assert place or not sound, "verify finds all packs sound, and they are not"
    with ours():
        assert digest_of(reader.get(digest)) == digest


# ---- the store's JSON files ----


@functools.lru_cache(maxsize=1)
def store() -> z.Store:
    """Return a store with one pack, two snapshots and a node called n."""
    made = z.open_store(os.path.join(workplace(), "store"), create=True)
    made.save_reserve(4096)
    writer = z.PackWriter(made.packs, made.index, z.ZLIB, 1)
    blocks = z.BlockWriter(writer)
    entries = [z.Entry(z.encode_stat(stat), z.encode_content(content)) for stat, content in zip(STATS, CONTENTS)]
    for entry in sorted(entries, key=lambda entry: entry.key):
        blocks.put(entry)
    writer.put_chunk(BASE)
    writer.put_chunk(noise(5000))
    writer.put_chunk(noise(300))
    names = blocks.close()
    writer.seal()
    node = made.node("n")
    node.make()
    node.save_known(z.Known("n", "0" * 32, "host", ("127.0.0.9",), 1, NOW))
    for sequence in (1, 2):
        node.save_snapshot(make_snapshot(sequence, names))
    node.save_progress(z.Progress(names, (entries[0].encode(),), entries[1]))
    return made


def make_snapshot(sequence: int, blocks: tuple[bytes, ...]) -> z.Snapshot:
    return z.Snapshot(
        f"2026-11-2{sequence}T00-00-00Z",
        "n",
        sequence,
        NOW,
        NOW + 5,
        "torn",
        cut_off="lost",
        address="127.0.0.9",
        identity="0" * 32,
        host="höst",
        roots=("d",),
        missing=("e",),
        blocks=blocks,
        totals=z.Totals(6, 1, 2, 3),
        problems=(z.Problem("d/a", "kept changing"),),
    )


def json_files() -> dict[str, str]:
    """Return the JSON files of the store that are fuzzed: name and path."""
    made = store()
    node = made.node("n")
    if not os.path.exists(node.trash):
        made.save_lost(z.Lost(frozenset([digest_of(b"lost")]), {"n": ("2026-11-21T00-00-00Z",)}))
        node.save_latest(z.LatestState("a", "b", "c", ("d", "e")))
        node.remove_snapshot(node.save_snapshot(make_snapshot(3, ())).name, NOW)
        z.save_times(made, z.VERIFIED, {"0" * 64: NOW})
    return {
        "snapshot": os.path.join(node.snapshots, "2026-11-22T00-00-00Z.json"),
        "trash": os.path.join(node.trash, os.listdir(node.trash)[0]),
        "known": os.path.join(node.path, "node.json"),
        "progress": os.path.join(node.path, "progress.json"),
        "latest": os.path.join(node.path, "latest.json"),
        "lost": os.path.join(made.damage, "lost.json"),
        "times": os.path.join(made.path, z.VERIFIED),
        "store": os.path.join(made.path, "zbackup.json"),
    }


def snapshot_seeds() -> Iterator[bytes]:
    for name, path in json_files().items():
        yield join_frames([name.encode(), Path(path).read_bytes()])


SEAL = len(',\n "sha256": "') + 64 + len('"\n}\n')


def seal(body: bytes) -> bytes:
    """Return a JSON file of the store, as its README.txt describes it."""
    return body + b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode("ascii")


def mend_seal(parts: list[bytes], chance: random.Random) -> list[bytes]:
    """Make the checksum at the end of a JSON file right again."""
    name, data = [*parts, b"", b""][:2]
    try:
        fields = json.loads(data)
        fields.pop("sha256", None)
        return [name, seal(json.dumps(fields, indent=1)[:-2].encode("ascii"))]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return [name, seal(data[:-SEAL])]


@target(snapshot_seeds, split_frames, join_frames, mend_seal)
def snapshot(data: bytes) -> None:
    """The JSON files of a store: snapshots, what is known of a node, progress, damage and so on."""
    name, content = [*split_frames(data), b"", b""][:2]
    path = json_files().get(name.decode("latin-1"))
    if path is None:
        return
    before = Path(path).read_bytes()
    reader = store().reader()
    put_file(path, content)
    try:
        with ours():
            assert z.decode_file(content, "it") is None or seal(content[:-SEAL]) == content
        READ_FILE[name](store().node("n"), reader, content)
        damaged = {told for told, _ in z.verify_files(store())}
        assert path in damaged or seal(content[:-SEAL]) == content or name == b"store", "verify does not see it"
    finally:
        reader.close()
        put_file(path, before)
        store().problems.clear()


def read_known(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    with ours():
        known = node.load_known()
        assert z.decode_known(z.encode_known(known), "n") == known
    assert [one.folder for one in store().list_nodes()] == ["n"]
    z.list_nodes(store())


def read_progress(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    progress = node.load_progress()
    assert z.decode_progress(z.encode_progress(progress)) == progress
    with ours():
        for _ in z.list_lacking(reader, z.list_base(reader, progress, None, [])):
            pass


def read_latest(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    state = node.load_latest()
    assert len(state.snapshots) <= z.OLDER_KEPT + 2
    assert z.decode_latest(z.encode_file(vars(state))) == state


def read_trash(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    assert len(node.list_trash()) + len(node.problems) == 1, "neither listed nor noted as damaged"


def read_lost(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    lost = store()._load_lost()
    assert z.decode_lost(z.encode_lost(lost)) == lost


def read_times(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    assert all(moment >= 0 for moment in z.load_times(store(), z.VERIFIED).values())


def read_store(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    with ours():
        z._load_identity(store().path)


def read_snapshot(node: z.NodeFolder, reader: z.Reader, data: bytes) -> None:
    name = "2026-11-22T00-00-00Z"
    with ours():
        found = z.decode_snapshot(data, "n", name)
        assert z.decode_snapshot(z.encode_snapshot(found), "n", name) == found
        z.write_json(z.describe_snapshot(found))
        z.format_totals(found.totals)
    listed = node.list_snapshots()
    assert len(listed) + len(node.problems) == 2, "a snapshot is neither listed nor noted as damaged"
    assert [one.name for one in node.newest()] == [one.name for one in listed[::-1]]
    history = z.load_history(store(), "n")
    for rules in ((), (("last", 1),), (("daily", 2), ("yearly", 1 << 30))):
        with ours():
            choices = z.plan_history(history, rules)
            assert len(choices) == len(listed)
            assert any(choice.keep for choice in choices) or not listed
    z.list_snapshots(node, ())
    for when in ("latest", name, "2026-11-21", "1d"):
        with ours():
            z.find_snapshot(node, when, NOW)


READ_FILE: dict[bytes, Callable[[z.NodeFolder, z.Reader, bytes], None]] = {
    b"snapshot": read_snapshot,
    b"trash": read_trash,
    b"known": read_known,
    b"progress": read_progress,
    b"latest": read_latest,
    b"lost": read_lost,
    b"times": read_times,
    b"store": read_store,
}


# ---- listings ----


def listing_seeds() -> Iterator[bytes]:
    yield b"".join(z.Entry(z.encode_stat(s), z.encode_content(c)).encode() for s, c in zip(STATS, CONTENTS))
    for stat, content in zip(STATS, CONTENTS):
        yield z.Entry(z.encode_stat(stat), z.encode_content(content)).encode()
    yield b'{"path":"a","kind":"file"}\t{"chunks":[1,"' + b"0" * 64 + b'"],"lists":["' + b"1" * 64 + b'"]}\n'


@target(listing_seeds, split_lines)
def listing(data: bytes) -> None:
    """Lines of entries, as a node lists them and as blocks hold them, beside an older listing."""
    lines = data.split(b"\n")[:200]
    for line in lines:
        with ours():
            stat = z.decode_stat(line.partition(b"\t")[0])
            assert z.encode_stat(stat) == line.partition(b"\t")[0]
            assert b".." not in stat.path.split(b"/"), "a way out of the root"
            assert not stat.path.startswith(b"/"), "a way out of the root"
        with ours():
            content = z.decode_content(line.partition(b"\t")[2])
            assert z.decode_content(z.encode_content(content)) == content
        with ours():
            entry = z.Entry.decode(line)
            assert entry.encode().rstrip(b"\n") == line.rstrip(b"\n")
            z.format_entry(entry)
            z._looks_equal(entry, entry)
    listed = [z.encode_stat(stat) for stat in STATS]
    for old, new in ((listed, lines), (lines, listed), (lines, lines)):
        match_all(old, new)


def make_block(entries: Sequence[z.Entry]) -> z.Block:
    """Return entries as a part of a block."""
    return z.Block(b"", [entry.line for entry in entries], [entry.read for entry in entries])


def match_all(old: Sequence[bytes], new: Sequence[bytes]) -> None:
    """Let a listing be merged with an older one."""
    with ours():
        before = [z.Entry.decode(line if b"\t" in line else line + b"\t{}") for line in old]
        base = z.Base(iter([(make_block(before), frozenset())]))
        matched = 0
        for line in new:
            found, stat = base.match(line.partition(b"\t")[0])
            matched += found is not None
            assert stat is not None or found is not None
        base.finish()
        assert matched + base.deleted == len(before)


def list_seeds() -> Iterator[bytes]:
    yield z.write_json(z.encode_chunks([bytes(32), 5, b"\xff" * 32, 1000])).encode()
    yield z.write_json(z.encode_chunks([z.LIST_SPAN])).encode()
    yield b"[]"


@target(list_seeds)
def chunklist(data: bytes) -> None:
    """A list of a large file's chunks."""
    reader: Any = SimpleNamespace(get=lambda digest: data, look_up=lambda digests: None)
    content = z.Content(5 << 30, (), (bytes(32), bytes(32)))
    with ours():
        chunks = z.load_chunk_list(reader, bytes(32))
        assert z.decode_chunks(json.loads(z.write_json(z.encode_chunks(chunks)))) == chunks
    with ours():
        assert len(list(z.list_chunks(reader, content))) <= 2 * z.LIST_SPAN
    table = z.ChunkTable(reader, content)
    for number in (0, 1, 1023, 1024, 2047, 2048, 1 << 40):
        found = table.get(number)
        assert found is None or len(found) == z.DIGEST


# ---- messages ----


def frame(data: bytes) -> Any:
    """Return bytes as pyzmq gives a frame."""
    return SimpleNamespace(buffer=memoryview(data), bytes=data)


def message_of(head: bytes, body: bytes = b"") -> z.Message:
    return z.decode_message([frame(head), frame(body)])


HELLO_FIELDS = {"protocol": z.PROTOCOL, "program": "0.1", "identity": "0" * 32, "instance": "ab", "name": "höst"}


def hello_seeds() -> Iterator[bytes]:
    fields = {**HELLO_FIELDS, "codecs": ["zstd", "plain"], "roots": ["files"]}
    heads = [z.encode_message(z.HELLO, 1, {**fields, "identity": digit * 32})[0] for digit in "0011"]
    yield join_frames(heads)
    refusal = {"code": "refused", "message": "the node answers only its own machine"}
    yield join_frames([heads[0], z.encode_message(z.ERROR, 1, refusal)[0]])
    wishes = ["laptop", "LAPTOP", "packs", "10.0.0.7", "../up", "", "laptop"]
    many = [{"identity": f"{i:032x}", "folder": wish, "instance": f"{i % 3}"} for i, wish in enumerate(wishes)]
    yield join_frames([z.encode_message(z.HELLO, 1, {**fields, **more})[0] for more in many])


HELLO_KEYS = (None, "a" * 40, "c" * 40, "d" * 40, "b" * 40, "a" * 40)  # as handshakes proved them, in turn
HELLO_KNOWN = [
    z.Known("10.0.0.1", "1" * 32, "", ("10.0.0.1:4546",)),
    z.Known("10.0.0.2", "f" * 32),
    z.Known("laptop", "a" * 40, "", ("10.0.0.2:4547",)),
    z.Known("Desk", "b" * 40, "", ("10.0.0.3:4548", "10.0.0.6:4551"), offered="c" * 40),
]


@target(hello_seeds, split_frames, join_frames)
def hello(data: bytes) -> None:
    """Answers to HELLO, and the folders that they lead to."""
    probes = []
    for number, head in enumerate(split_frames(data)[:20]):
        with ours():
            found = z.decode_hello(message_of(head), HELLO_KEYS[number % len(HELLO_KEYS)])
            probes.append(z.Probe(z.Address(f"10.0.0.{number % 9}", 4545 + number), z.NODE, found))
    for strict in (False, True):
        check_plan(probes, strict)


def check_plan(probes: list[z.Probe], strict: bool) -> None:
    """Fail where a plan mixes nodes up, or forgets one."""
    targets, refused = z.plan_targets(probes, HELLO_KNOWN, strict)
    folders = [one.folder for one in targets]
    formers = [one.hello.former for one in targets if one.hello.former]
    assert len({name.lower() for name in folders}) == len(folders) or len(set(formers)) < len(formers), "mixed up"
    assert not [name for name in folders if "/" in name or name.startswith(".") or name.lower() in z.RESERVED]
    identities = {one.hello.identity for one in targets}
    turned_away = {one.hello.identity for one in refused if one.hello}
    answers = [one.hello.identity for one in probes if one.hello]
    assert identities | turned_away == set(answers), "somebody is forgotten"
    told = [one.hello.identity for one in refused if one.hello and one.hello.identity in identities]
    assert sum(len(one.addresses) for one in targets) + len(told) == sum(one in identities for one in answers)
    pins = {node.folder: node.identity for node in HELLO_KNOWN if z.is_key(node.identity)}
    assert [one for one in targets if pins.get(one.folder, one.hello.identity) != one.hello.identity] == []
    assert not strict or all(map(z.is_key, identities)), "who has no key was taken"
    offers = z.list_offers(refused)
    assert offers.keys() <= pins.keys() and not set(offers.values()) & set(pins.values())


# ---- keys in files ----


def key_seeds() -> Iterator[bytes]:
    secret = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"
    yield secret.encode() + b"\n"
    yield z.encode_public("rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7")
    yield b"# a note\n\n" + b"a" * 40


@target(key_seeds)
def key(data: bytes) -> None:
    """Files that should hold a key, and identities."""
    folder = Path(tempfile.mkdtemp(dir=workplace()))
    (folder / "key").write_bytes(data)
    (folder / "key").chmod(0o600)
    (folder / z.PUBLIC_FILE).write_bytes(data)
    with ours(z.load_zmq().ZMQError):  # until is_key refuses what is no number in base 85
        pair = z.load_pair(str(folder / "key"))
        assert z.is_key(pair.public) and pair.secret.encode() == data[:100].strip()
    with ours():
        found = z.find_public("", [str(folder)])
        assert z.is_key(found) and found.encode() in data
        assert z.load_public(str(folder / z.PUBLIC_FILE)) == found
    assert (folder / "key").read_bytes() == data
    shutil.rmtree(folder)


# ---- answers to READ ----

SMALL, PATCHED = noise(5000), BASE[:8192] + noise(300) + BASE[8192:9000]
OLD_NOISE = noise(9 * 4096 + 5)
MOVED = noise(77) + OLD_NOISE
SLOT_STAT = z.Stat(b"d/a", "file", size=len(BASE), mtime=1, ctime=2, inode=3)


@functools.lru_cache(maxsize=1)
def wants_of() -> list[z.Want]:
    """Return what may be asked for, each kind of base once; the store holds them."""
    made = store()
    writer = z.PackWriter(made.packs, made.index, z.ZLIB, 1)
    writer.put_patch(
        digest_of(PATCHED),
        [z.Run(digest_of(BASE), 0, 8192), z.Run(digest_of(noise(300)), 0, 300), z.Run(digest_of(BASE), 8192, 808)],
    )
    writer.put_chunk(OLD_NOISE)
    writer.seal()
    slot = z.Slot(z.encode_stat(SLOT_STAT), None, None)
    bases = [None, BASE, SMALL, PATCHED, None, b"lost"]
    wants = [
        z.Want(slot, 0, None, b"") if base is None else z.Want(slot, 0, digest_of(base), z.hash_pages(base))
        for base in bases
    ]
    reader = made.reader()
    plan = make_finder(reader).find(0, tell(MOVED), len(MOVED))
    reader.close()
    assert 0 < plan.size < len(MOVED)
    return [*wants, z.Want(slot, 0, None, b"", tell=True), z.Want(slot, 0, None, b"", plan=plan)]


def make_finder(reader: z.Reader) -> z.Finder:
    return z.Finder(reader, z.Content(len(OLD_NOISE), (digest_of(OLD_NOISE),)))


def tell(data: bytes) -> z.Told:
    """Return what a node tells of a chunk."""
    return z.decode_told(digest_of(data), len(data), z.encode_told(data, z.hash_pages(data)))


def base_of(want: z.Want) -> bytes:
    return next((data for data in (BASE, SMALL, PATCHED) if digest_of(data) == want.base), b"")


def make_reply(items: Sequence[dict[str, Any]], raw: bytes, codec: int) -> bytes:
    body = raw if codec == z.PLAIN else z._compress(codec, raw, 1)
    return join_frames(z.encode_message(z.READ, 1, {"items": items, "codec": codec, "size": len(raw)}, body))


def reply_seeds() -> Iterator[bytes]:
    start = {"size": len(BASE), "grade": "stable", "state": SLOT_STAT.state, "xattrs": {"user.a": "YQ=="}}
    line = z.encode_stat(SLOT_STAT._replace(size=7)).decode()
    new = BASE[:4096] + b"n" * 4096 + BASE[8192:]
    longer = SMALL + b"more" * 2000
    items = [
        {**start, "status": "whole", "length": 700, "digest": digest_of(b"w" * 700).hex(), "line": line},
        {**start, "status": "patch", "length": len(new), "digest": digest_of(new).hex(), "runs": [[1, 1]]},
        {**start, "status": "patch", "length": 13000, "digest": digest_of(longer).hex(), "runs": [[1, 3]]},
        {**start, "status": "same", "length": len(PATCHED), "digest": digest_of(PATCHED).hex()},
        {**start, "status": "zeros", "count": 3},
        {"status": "error", "error": "gone bad"},
        {**start, "status": "pages", "length": len(MOVED), "digest": digest_of(MOVED).hex()},
        {"state": SLOT_STAT.state, "status": "part", "length": len(MOVED)},
    ]
    told = z.encode_told(MOVED, z.hash_pages(MOVED))
    part = b"".join(MOVED[first:end] for first, end in cast("z.Plan", wants_of()[-1].plan).need)
    raw = b"w" * 700 + new[4096:8192] + longer[4096:13000] + told + part
    for codec in (z.PLAIN, z.ZLIB, z.ZSTD):
        yield make_reply(items, raw, codec)
    yield make_reply([{"status": name} for name in ("gone", "lost", "later", "end", "error")], b"", z.PLAIN)
    large = bytes([7]) * z.CHUNK
    yield make_reply([{"status": "whole", "length": z.CHUNK, "digest": digest_of(large).hex()}], large, z.ZLIB)


def mend_reply(parts: list[bytes], chance: random.Random) -> list[bytes]:
    """Make sizes and digests of one answer to READ right again."""
    head, body = [*parts, b"", b""][:2]
    try:
        fields = json.loads(head)
        raw = unpack(fields["codec"], body)
        if chance.random() < 0.2:
            fields["codec"], body = z.PLAIN, raw
        fields["size"] = len(raw)
        rest = raw
        for item, want in zip(fields["items"], wants_of() * 50):
            rest = mend_item(item, want, rest)
        if rest and chance.random() < 0.5 and fields["codec"] == z.PLAIN:
            body = body[: len(body) - len(rest)]
            fields["size"] = len(body)
        return [z.write_json(fields).encode("ascii"), body]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, z.BackupError):
        return [head, body]


def mend_item(item: dict[str, Any], want: z.Want, raw: bytes) -> bytes:
    """Give an item the digest of the bytes that are its; returns the bytes after them."""
    length = item.get("length")
    if item.get("status") == "whole":
        item["digest"] = digest_of(raw[:length]).hex()
        return raw[length:]
    if item.get("status") == "patch":
        changed = z.decode_stretches(z.Fields.inside(item, "an item"), "runs", length)
        size = sum(end - start for start, end in changed)
        item["digest"] = digest_of(z.patch_data(base_of(want), changed, raw[:size], min(length, z.CHUNK))).hex()
        return raw[size:]
    if item.get("status") == "pages":
        item["digest"] = z.digest_pages(raw[: z.count_pages(length) * z.PAGE_HASH]).hex()
        return raw[z.size_told(int(length)) :]
    if item.get("status") == "part" and want.plan:
        return raw[want.plan.size :]
    return raw


@target(reply_seeds, split_frames, join_frames, mend_reply)
def reply(data: bytes) -> None:
    """An answer to READ: what is taken can be read back, and is what it says it is."""
    head, body = [*split_frames(data), b"", b""][:2]
    made = store()
    wants = wants_of()
    reader = made.reader()
    writer = z.PackWriter(made.packs, made.index, z.ZLIB, 1)
    reader.open_pack = writer
    writer.distrusted = reader.distrusted
    try:
        with ours():
            message = message_of(head, body)
            count = len(message.fields.items("items", z.READ_LIMIT))
            asked = (wants * (count // len(wants) + 1))[:count]
            receiver = z.Receiver(reader, writer)
            for want in wants:
                receiver.pages(want.base)
            for got in receiver.take(message, asked):
                if got.status in ("same", "whole", "patch", "part"):
                    check_got(reader, got)
                if got.status == "pages" and got.told:
                    plan = make_finder(reader).find(0, got.told, got.length)
                    if not plan.need and receiver.put_moved(plan):
                        check_got(reader, got)
                intake: Any = SimpleNamespace()
                with ours():
                    slot = z.Slot(asked[0].slot.line, None, None)
                    content = z.Intake.describe(intake, slot, got)
                    assert z.decode_content(z.encode_content(content)) == content
    finally:
        writer.abandon()
        reader.close()


def check_got(reader: z.Reader, got: z.Got) -> None:
    """Check that what was taken is kept (I5), outside of what may raise an error of ours."""
    assert isinstance(got.chunk, bytes)
    try:
        chunk = reader.get(got.chunk)
    except z.BackupError as error:
        raise AssertionError(f"a chunk was taken that cannot be read: {error}") from None
    assert len(chunk) == got.length
    assert z.digest_pages(reader.pages(got.chunk)) == got.chunk


# ---- a whole conversation, the server's side ----


class Mute:
    """A socket that sends nothing, but tells its peer of what it should send."""

    def __init__(self, peer: Script) -> None:
        self.peer = peer

    def send_multipart(self, frames: Sequence[Any], *flags: object, **options: object) -> None:
        self.peer.on_question(frames)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


class Script(z.Peer):
    """A peer whose answers stand written; all the rest is the real one."""

    def __init__(self, answers: Iterable[tuple[bytes, bytes]]) -> None:
        stop = SimpleNamespace(wait=lambda seconds: None, is_set=lambda: False)
        wire: Any = SimpleNamespace(clock=CLOCK, stop=stop, zmq=z.load_zmq(), socket=lambda kind: Mute(self))
        super().__init__(wire, z.Address("127.0.0.9"), 1.0)
        self.answers = iter(answers)

    def on_question(self, frames: Sequence[Any]) -> None:
        """Take a question, whose answer stands written already."""

    def leave(self, kind: str) -> None:
        """Send a last question."""

    def receive(self, milliseconds: int) -> z.Message | None:
        head, body = next(self.answers, (b"", b""))
        if not head:
            raise z.NodeError("the script ends", "lost")
        return message_of(head, body)


class Recorded(Script):
    """A peer whose answers come from a real session, and are noted."""

    def __init__(self, session: z.Session) -> None:
        super().__init__(())
        self.session = session
        self.waiting: list[tuple[bytes, bytes]] = []
        self.said: list[bytes] = []

    def on_question(self, frames: Sequence[Any]) -> None:
        head, body = z.encode_answer(self.session._answer(message_of(frames[0], frames[1])), 1)
        self.waiting.append((head, body))
        self.said += [head, body]

    def receive(self, milliseconds: int) -> z.Message | None:
        return message_of(*self.waiting.pop(0))


@functools.lru_cache(maxsize=1)
def session() -> z.Session:
    """Return a real session over a small folder; nothing but its socket is made up."""
    base = os.path.join(workplace(), "served")
    files = os.path.join(base, "files")
    os.makedirs(os.path.join(files, "folder"))
    Path(base, "secret").write_bytes(b"not to be served")
    Path(files, "a.txt").write_bytes(b"text\n" * 300)
    Path(files, "empty").write_bytes(b"")
    Path(files, "large").write_bytes(BASE * 45 + b"end")
    Path(files, "folder", "b.tmp").write_bytes(b"left out, not to be served")
    Path(files, "folder", "zeros").write_bytes(bytes(9000))
    with open(os.path.join(files, "hole"), "wb") as file:
        file.truncate((3 << 20) + 10)
    os.symlink("../secret", os.path.join(files, "link"))
    os.symlink("..", os.path.join(files, "up"))
    os.mkfifo(os.path.join(files, "pipe"))
    os.link(os.path.join(files, "a.txt"), os.path.join(files, "folder", "same"))
    for found in Path(files).rglob("*"):
        os.utime(found, ns=(5, 5), follow_symlinks=False)
    sent: Any = SimpleNamespace(send_multipart=lambda frames, copy=True: None, close=lambda linger: None)
    wire: Any = SimpleNamespace(
        clock=CLOCK, stop=threading.Event(), zmq=SimpleNamespace(ZMQError=type("ZMQError", (Exception,), {}))
    )
    listener: Any = SimpleNamespace(reply_socket=lambda: sent)
    settings = z.NodeSettings(files=("files",), exclude=("*.tmp",), session_timeout=1e6, margin=0.0)
    spool = z.Spool(os.path.join(workplace(), "spool"))
    return z.Session(z.Home(settings, wire, listener, spool, base, print), b"peer", None)


def start_pull(peer: Script) -> tuple[z.Pull, z.Intake]:
    made = store()
    reader = made.reader()
    writer = z.PackWriter(made.packs, made.index, z.ZLIB, 1)
    # Little is read twice, so that a script need not say everything five times.
    intake = z.Intake(peer, reader, writer, z.ServerSettings(tries=2))
    return z.Pull(intake, None), intake


def end_pull(pull: z.Pull, intake: z.Intake) -> None:
    pull.links.close()
    intake.writer.abandon()
    intake.reader.close()


@functools.lru_cache(maxsize=1)
def conversation() -> tuple[list[bytes], list[z.Entry]]:
    """Return what a real session says in one copy, and the entries that the copy gives."""
    peer = Recorded(session())
    pull, intake = start_pull(peer)
    entries: list[z.Entry] = []
    put = intake.put
    intake.put = lambda done: (entries.extend(done), put(done))[1]  # type: ignore[method-assign,func-returns-value]
    try:
        pull.open("id")
        pull.run(z.Base(iter(())))
        pull.close()
    finally:
        end_pull(pull, intake)
    assert any(entry.stat.path == b"files/large" and entry.content.size > z.CHUNK for entry in entries)
    return peer.said, entries


def pull_seeds() -> Iterator[bytes]:
    whole, _ = conversation()
    others = b"\n".join(z.encode_stat(stat) for stat in STATS if stat.kind != "file")
    listed = z.encode_message(z.LIST, 2, {"more": False, "codec": z.PLAIN, "size": len(others)}, others)
    yield join_frames([b"new", *whole[:2], *listed, *z.encode_message(z.CLOSE, 3, {})])
    for first, said in itertools.product((b"new", b"old"), (whole, make_plain(whole))):
        yield join_frames([first, *said])
        yield join_frames([first, *said[:6]])
        yield join_frames([first, *said[:4], *z.encode_message(z.ERROR, 3, {"code": "failed", "message": "no"})])
        yield join_frames([first, *said[:2], *z.encode_message(z.WORKING, 2, {}), *said[2:]])


def make_plain(said: Sequence[bytes]) -> list[bytes]:
    """Return messages with nothing compressed, so that the fuzzer sees what they say."""
    plain = []
    for head, body in zip(said[::2], said[1::2]):
        fields = json.loads(head)
        raw = unpack(fields.get("codec"), body)
        if "codec" in fields and len(raw) < 20_000:
            fields["codec"], body = z.PLAIN, raw
        plain += [z.write_json(fields).encode("ascii"), body]
    return plain


def mend_pull(parts: list[bytes], chance: random.Random) -> list[bytes]:
    """Make the answers bear the numbers of their questions, and the sizes of their bodies."""
    mended, number = parts[:1], 0
    for head, body in zip(parts[1::2], parts[2::2]):
        try:
            fields = json.loads(head)
            number += fields["kind"] != z.WORKING
            fields["number"] = number
            if "codec" in fields:
                raw = unpack(fields["codec"], body)
                if chance.random() < 0.2:
                    fields["codec"], body = z.PLAIN, raw
                fields["size"] = len(raw)
                for item in fields.get("items", ()):
                    if item.get("status") == "whole":
                        item["digest"] = digest_of(raw[: item["length"]]).hex()
                        raw = raw[item["length"] :]
            mended += [z.write_json(fields).encode("ascii"), body]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            mended += [head, body]
    return mended


@target(pull_seeds, split_frames, join_frames, mend_pull)
def pull(data: bytes) -> None:
    """A whole copy from a node that says anything: what ends well can be restored in full."""
    first, *said = split_frames(data)
    _, before = conversation()
    base = z.Base(iter([(make_block(before), frozenset())] if first == b"old" else []))
    under_way, intake = start_pull(Script(zip(said[::2], said[1::2])))
    entries: list[z.Entry] = []
    put = intake.put
    intake.put = lambda done: (entries.extend(done), put(done))[1]  # type: ignore[method-assign,func-returns-value]
    try:
        with ours():
            roots, missing = under_way.open("id")
            assert all(text.isprintable() for text in (*roots, *missing))
            blocks = under_way.run(base)
            check_pull(intake, blocks, entries, before if first == b"old" else [])
            under_way.close()
    finally:
        end_pull(under_way, intake)


def check_pull(intake: z.Intake, blocks: Sequence[bytes], entries: list[z.Entry], before: list[z.Entry]) -> None:
    """Check that a snapshot of what came would be whole."""
    try:
        found = list(z.list_entries(intake.reader, blocks))
        assert found == entries
        keys = [entry.key for entry in found]
        assert keys == sorted(set(keys)), "entries out of order"
        z.worst_grade(intake.tally.grades)
        with tempfile.TemporaryFile(dir=workplace()) as file:
            for entry in found:
                # Those of the last snapshot have chunks which this store need not have.
                if entry not in before and not entry.content.error:
                    z.write_content(intake.reader, entry.content, file.fileno(), True)
                    file.truncate(0)
    except z.BackupError as error:
        raise AssertionError(f"a snapshot that cannot be restored: {error}") from error


# ---- questions, the node's side ----


def question_seeds() -> Iterator[bytes]:
    opened = z.encode_message(z.OPEN, 1, {"codecs": ["zlib", "plain"], "server": "id"})
    listed = z.encode_message(z.LIST, 2, {})
    state = [1500, 5, 5, 5]
    files = [{"path": "files/a.txt", "chunk": 0, "state": state, "pages": 1}, {"path": "files/hole", "chunk": 1}]
    files += [{"path": "files/large", "chunk": number, "state": state} for number in (0, 1, 2)]
    others = ("files/pipe", "files/link", "secret", "files/up/secret", "files/folder/b.tmp")
    files += [{"path": path} for path in others]
    files += [{"path": "files/large", "tell": True}, {"path": "files/large", "chunk": 1, "need": [[0, 1], [9, 2]]}]
    read = z.encode_message(z.READ, 3, {"files": files}, z.hash_pages(b"text\n" * 300))
    closed = z.encode_message(z.CLOSE, 4, {})
    yield join_frames([*opened, *listed, *read, *closed])
    yield join_frames([*opened, *read])
    yield join_frames([*listed, *z.encode_message("NONSENSE", 1, {})])
    yield join_frames(z.encode_message(z.HELLO, 1, z.say_hello()))


@target(question_seeds, split_frames, join_frames)
def question(data: bytes) -> None:
    """Questions to a node: it answers each one within the limits, and serves nothing but its roots."""
    parts = split_frames(data)[:24]
    served = session()
    try:
        for head, body in zip(parts[::2], parts[1::2]):
            with ours():
                asked = message_of(head, body)
                with ours():
                    asked.fields.text("server", "", 100)
                    z.decode_asks(asked)
                answer = message_of(*z.encode_answer(served._answer(asked), 1))
                assert answer.number == asked.number
                check_answer(answer)
    finally:
        served._end(wait=True)


def check_answer(answer: z.Message) -> None:
    """Check what a node says; message_of has checked the limits."""
    fields = answer.fields
    if answer.kind == z.ERROR:
        assert fields.text("code", limit=20) != "fault", fields.text("message")
    elif answer.kind in (z.LIST, z.READ):
        raw = z.decompress(fields.integer("codec"), answer.body, fields.integer("size", high=z.BODY_LIMIT))
        assert b"not to be served" not in raw


# ---- restore: what a snapshot says becomes files ----

OLDER = BASE * 45 + b"end"  # of more than one chunk, so that only changed chunks are written anew


def restore_seeds() -> Iterator[bytes]:
    put = store_contents()
    first = [
        (z.Stat(b"d", "directory", 0o755, 1000, 1000, "u", "g", mtime=5, xattrs={"user.a": "YQ=="}), z.NOTHING),
        (z.Stat(b"d/a", "file", 0o4711, 1, 2, "root", "", 5000, 1, 2, 3, links=2, device=7), put["small"]),
        (z.Stat(b"d/b", "file", 0o4711, 1, 2, "root", "", 5000, 1, 2, 3, links=2, device=7), put["small"]),
        (z.Stat(b"d/big", "file", 0o644, size=len(OLDER), mtime=7, sparse=False), put["large"]),
        (z.Stat(b"d/hole", "file", 0o644, size=3 << 20, sparse=True), z.Content(3 << 20, (3,), (), "stable")),
        (z.Stat(b"d/up", "symlink", 0o777, mtime=5, target=b".."), z.NOTHING),
        (z.Stat(b"p", "fifo", 0o600), z.NOTHING),
        (z.Stat(b"s", "socket", 0o600), z.NOTHING),
    ]
    changed = [(stat, put["larger"] if stat.path == b"d/big" else content) for stat, content in first]
    through = [first[5], (z.Stat(b"d/up/evil", "file", size=5000), put["small"]), first[6]]
    lists = [[z.Entry(z.encode_stat(s), z.encode_content(c)).encode() for s, c in rows] for rows in (first, changed)]
    for flag in (b"", b"latest"):
        yield flag + b"\n" + b"".join(lists[0]) + b"--\n" + b"".join(lists[1])
        yield flag + b"\n" + b"".join(z.Entry(z.encode_stat(s), z.encode_content(c)).encode() for s, c in through)


@functools.lru_cache(maxsize=1)
def store_contents() -> dict[str, z.Content]:
    """Return contents whose chunks the store has."""
    writer = z.PackWriter(store().packs, store().index, z.ZLIB, 1)
    found = {}
    for name, data in (("small", noise(5000)), ("large", OLDER), ("larger", OLDER[: z.CHUNK] + noise(9000))):
        chunks = [writer.put_chunk(data[at : at + z.CHUNK]) for at in range(0, len(data), z.CHUNK)]
        found[name] = z.Content(len(data), tuple(chunks), (), "stable")
    writer.seal()
    return found


@target(restore_seeds, split_lines)
def restore(data: bytes) -> None:
    """Two versions restored one over the other: nothing is put outside of the folder, whatever they say."""
    flag, _, rest = data.partition(b"\n")
    above = os.path.join(workplace(), "restored")
    inside = os.path.join(above, "inside", "root")
    store_contents()
    os.makedirs(inside)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))  # a disk that is soon full
    old: dict[bytes, z.Entry] = {}
    try:
        for version in rest.split(b"--\n")[:2]:
            entries = []
            for line in version.split(b"\n")[:20]:
                with ours():
                    entries.append(z.Entry.decode(line))
            old = restore_version(inside, entries, old if flag == b"latest" else None)
        assert os.listdir(above) == ["inside"], "restored outside of the folder"
        assert os.listdir(os.path.join(above, "inside")) == ["root"], "restored outside of the folder"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        shutil.rmtree(above)


def restore_version(folder: str, entries: Sequence[z.Entry], old: dict[bytes, z.Entry] | None) -> dict[bytes, z.Entry]:
    """Restore entries over what stands in a folder; returns those that went well, by path."""
    reader = store().reader()
    options = z.RestoreOptions(overwrite=True, private=old is not None, numeric=old is None, token="token")
    writer = z.FileWriter(reader, str(folder), options)
    good = {}
    try:
        with ours():
            for entry in entries:
                problems = len(writer.problems)
                before = None
                with ours():
                    before = (old or {}).get(entry.stat.path)
                writer.put(entry, before)
                if len(writer.problems) == problems:
                    good[entry.stat.path] = entry
            writer.finish()
        for path, entry in good.items():
            if entry.stat.kind == "file" and not writer.problems:
                assert os.lstat(os.path.join(os.fsencode(folder), path)).st_size == entry.content.size
    finally:
        writer.close()
        reader.close()
    return good


# ---- keys: who a node is ----


def key_seeds() -> Iterator[bytes]:
    yield b"0123456789abcdef" * 2 + b"\n"
    yield b"0123456789abcdef" * 2
    yield b" \t" + b"f" * 32 + b"\n\n"
    yield b""


@target(key_seeds)
def keys(data: bytes) -> None:
    """The file of a node's identity."""
    folder = os.path.join(workplace(), "keys")
    os.makedirs(folder, exist_ok=True)
    put_file(os.path.join(folder, "identity"), data)
    with ours():
        identity = z.load_identity(folder)
        assert z.is_identity(identity)
        assert len(identity) == 32


# ---- what a user writes ----


def pattern_seeds() -> Iterator[bytes]:
    for pattern in ("*.tmp", "a/**/b", "!/x/", "[[:alpha:]a-z]?", "[!a]/**", r"\*\?", "**/q", "[]", "[z-a]", "#a"):
        yield pattern.encode() + b"\na/b/c.tmp"


@target(pattern_seeds)
def patterns(data: bytes) -> None:
    """Patterns of --exclude, and paths that they are held against."""
    pattern, _, path = data.partition(b"\n")
    text = pattern.decode("utf-8", "surrogateescape")
    if pattern.count(b"*") + pattern.count(b"?") > 6 or len(pattern) > 200:
        return  # many stars take long, as in any glob; they are the user's own
    with ours():
        exclude = z.Exclude([text, "*.o", "!" + text])
        for is_folder in (False, True):
            assert exclude.matches(path[:60], is_folder) in (False, True)
    z.is_loopback(text)


FLAG_TEXTS = ["1h30m", "90s", "64MiB", "512k", "12", "19", "9-12,20", "127.0.0.1:45", "[::1]:9", "fe80::1%eth0"]
FLAG_TEXTS += ["2026-11-23", "2026-11-23 14:00", "0001-01-01", "9999-12-31", "3d ago", "latest", "192.168.1.0/24"]
FLAG_TEXTS += ["2026-11-23T02-23-31Z-2", "--port 1 # c", "'a b", "\u0663", "10.0.0.0/33", "::/0", "a/../b"]
FLAG_TEXTS += ["last 3, hourly 24, daily 7, weekly 5, monthly 12, yearly 3", "5%", "0.5%"]


@target(lambda: [text.encode() for text in FLAG_TEXTS])
def flags(data: bytes) -> None:
    """All that turns words of a command line into values."""
    text = data.decode("utf-8", "surrogateescape")
    for name in dir(z):
        if name.startswith("parse_") and name != "parse_when":
            with ours(argparse.ArgumentTypeError):
                getattr(z, name)(text)
    with ours():
        z.parse_when(text, NOW)
    for numbers in (None, [0], [9, 255]):
        with ours():
            z.expand_network(text, numbers)
    with ours():
        z.Parser().convert_arg_line_to_args(text)
    z.clean_path(text)
    z.name_folder(text)
    assert z.show(text).isprintable()


# ---- the run ----


def main(arguments: Sequence[str]) -> None:
    """Fuzz one target until libFuzzer ends; the folder that it works in is removed."""
    if not arguments or arguments[0] not in TARGETS:
        print(*TARGETS, sep="\n")
        sys.exit(0 if list(arguments) == ["--list"] else 2)
    name, *rest = arguments
    workplace()
    child = os.fork()  # since libFuzzer's end is abrupt
    if child == 0:
        fuzz(TARGETS[name], rest)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            status = os.waitpid(child, 0)[1]
            break
    sys.exit(os.waitstatus_to_exitcode(status))


def fuzz(goal: Target, rest: list[str]) -> None:
    """Give a target to libFuzzer, which ends the process."""

    def run(data: bytes) -> None:
        with bounded():
            goal.run(data)

    folders = [word for word in rest if not word.startswith("-")]
    if not folders or not os.path.isfile(folders[0]):
        folder = folders[0] if folders else os.path.join(workplace(), "corpus")
        rest += [] if folders else [folder]
        os.makedirs(folder, exist_ok=True)
        for seed in goal.seeds():
            run(seed)
            Path(folder, hashlib.sha1(seed).hexdigest()).write_bytes(seed)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        return mutate(goal, data, most, seed, atheris.Mutate)

    atheris.Setup([sys.argv[0], *FLAGS, *rest], run, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
