"""STORE: packs, index, snapshots; written by several, read after damage, and from README.txt alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import ENV, held, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

import zbackup as z

QUICK = settings(max_examples=60, deadline=None)
SNAPSHOT = z.Snapshot("2026-11-23T02-23-31Z", "here", 1, 1, 2, "frozen")


def noise(length: int, seed: str = "") -> bytes:
    """Return bytes that do not shrink, the same for the same seed."""
    return hashlib.shake_128(seed.encode()).digest(length)


def digest_of(data: bytes) -> bytes:
    return z.digest_pages(z.hash_pages(data))


def piece_of(data: bytes) -> z.Piece:
    return z.Piece(digest_of(data), z.hash_pages(data), memoryview(data))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "backups")


@pytest.fixture
def store(path: str) -> Iterator[z.Store]:
    made = z.open_store(path, create=True)
    yield made
    made.close()


@pytest.fixture
def writer(store: z.Store) -> Iterator[z.PackWriter]:
    made = make_writer(store)
    yield made
    made.abandon()


@pytest.fixture
def reader(store: z.Store) -> Iterator[z.Reader]:
    made = store.reader()
    yield made
    made.close()


def make_writer(store: z.Store, codec: int = z.ZLIB) -> z.PackWriter:
    return z.PackWriter(store.packs, store.index, codec, 1)


def fill(path: str, chunks: Sequence[bytes], codec: int = z.ZLIB) -> list[bytes]:
    """Put chunks into one new pack of the store at `path`; returns their digests."""
    with contextlib.closing(z.open_store(path, create=True)) as store:
        writer = make_writer(store, codec)
        digests = [writer.put_chunk(chunk) for chunk in chunks]
        writer.seal()
    return digests


def read_all(path: str, digests: Sequence[bytes]) -> list[bytes]:
    """Read chunks from the store at `path`, opened anew."""
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert store.problems == []
        return [reader.get(digest) for digest in digests]


def packs_of(path: str) -> list[Path]:
    return sorted(Path(path, "packs").glob("??/*.pack"))


def drop_index(path: str) -> None:
    for found in Path(path).glob("index.sqlite*"):
        found.unlink()


def failing(number: int) -> Callable[..., Any]:
    """Return a call that fails with an errno."""

    def fail(*arguments: object, **options: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def run_child(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, zbackup as z\n" + code, *arguments],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Imports first what nobody may read, where Python is installed for root alone.
AS_NOBODY = """
import ctypes, fcntl, os, secrets, sqlite3
z.load_zstd()
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
assert os.getuid() != 0
"""


# ---- a reader of packs written from the store's README.txt alone ----


def parse_pack(data: bytes) -> dict[bytes, bytes | list[tuple[bytes, int, int]]]:
    """Return each digest's chunk, or its runs (source, offset, length) where it is patched."""
    found: dict[bytes, Any] = {}
    start, proof, magic = struct.unpack("<Q32s8s", data[-48:])
    assert data[:8] == b"zbpack1\n"
    assert magic == b"zbindex\n"
    assert hashlib.sha256(data[start:-48]).digest() == proof
    at = 8
    in_records = []
    while at < start:
        head, kind, codec, zero, rows, table, raw, stored, zeros = struct.unpack("<4sBBHIIII8s", data[at : at + 32])
        assert (head, zero, zeros) == (b"ZREC", 0, bytes(8))
        pairs = [struct.unpack_from("<32sI", data, at + 32 + 36 * i) for i in range(rows)]
        in_records.append((at, kind, [digest for digest, _ in pairs]))
        at += 32 + table
        packed = data[at : at + stored]
        at += stored
        joined = zlib.decompress(packed) if codec == 1 else z.load_zstd().decompress(packed) if codec == 2 else packed
        assert len(joined) == raw
        for digest, length in pairs:
            found[digest], joined = joined[:length], joined[length:]
            if kind == 2:
                found[digest] = parse_patch(found[digest])
    in_footer, at = [], start
    while at < len(data) - 48:
        offset, kind, count = struct.unpack_from("<QB3xI", data, at)
        in_footer.append((offset, kind, [data[i : i + 32] for i in range(at + 16, at + 16 + 32 * count, 32)]))
        at += 16 + 32 * count
    assert in_footer == in_records
    return found


def parse_patch(data: bytes) -> list[tuple[bytes, int, int]]:
    sources, runs = struct.unpack_from("<HI", data)
    named = [data[6 + 32 * i : 38 + 32 * i] for i in range(sources)]
    body = data[6 + 32 * sources :]
    assert len(body) == 10 * runs
    return [(named[which], offset, length) for which, offset, length in struct.iter_unpack("<HII", body)]


def parse_store(path: str) -> dict[bytes, bytes]:
    """Return all chunks of a store, patches assembled."""
    found: dict[bytes, Any] = {}
    for pack in packs_of(path):
        found.update(parse_pack(pack.read_bytes()))
    return {
        digest: chunk
        if isinstance(chunk, bytes)
        else b"".join(found[source][offset : offset + length] for source, offset, length in chunk)
        for digest, chunk in found.items()
    }


@pytest.mark.parametrize("codec", [z.PLAIN, z.ZLIB, z.ZSTD])
def test_pack_can_be_read_from_the_readme(store: z.Store, codec: int) -> None:
    chunks = [b"", b"a", b"text " * 3000, noise(4096), noise(z.CHUNK), bytes(5000), noise(700_000, "more")]
    writer = make_writer(store, codec)
    digests = [writer.put_chunk(chunk) for chunk in chunks]
    patched = chunks[3] + chunks[4][4096:8192]
    writer.put_patch(digest_of(patched), [z.Run(digests[3], 0, 4096), z.Run(digests[4], 4096, 4096)])
    writer.seal()
    (pack,) = packs_of(store.path)
    summed = subprocess.run(["sha256sum", str(pack)], capture_output=True, text=True, check=True).stdout
    assert pack.name == summed.split()[0] + ".pack"
    assert pack.parent.name == pack.name[:2]
    parsed = parse_store(store.path)
    assert parsed == {digest_of(chunk): chunk for chunk in [*chunks, patched]}
    for digest, chunk in parsed.items():  # the digest, too, as the README says it
        hashes = [hashlib.sha256(chunk[i : i + 4096]).digest()[:16] for i in range(0, len(chunk), 4096)]
        assert hashlib.sha256(b"".join(hashes)).digest() == digest


def test_readme_stands_in_the_store(store: z.Store) -> None:
    assert Path(store.path, "README.txt").read_text() == z.STORE_README


def test_snapshot_can_be_read_from_the_readme(store: z.Store, writer: z.PackWriter) -> None:
    data = {b"a": b"one", b"big": noise(z.CHUNK) + bytes(z.CHUNK) + b"end"}
    blocks = z.BlockWriter(writer)
    for name, content in data.items():
        listed = z.ListWriter(writer)
        for start in range(0, len(content), z.CHUNK):
            chunk = content[start : start + z.CHUNK]
            listed.put(writer.put_chunk(chunk)) if chunk.strip(b"\0") else listed.put_zeros(1)
        stat = z.Stat(name, "file", size=len(content))
        blocks.put(z.Entry(z.encode_stat(stat), z.encode_content(listed.content(len(content), "stable"))))
    snapshot = replace(SNAPSHOT, blocks=blocks.close())
    writer.seal()
    folder = store.node("here")
    folder.make()
    folder.save_snapshot(snapshot)

    chunks = parse_store(store.path)
    saved = json.loads(Path(store.path, "here/snapshots", SNAPSHOT.name + ".json").read_bytes())
    found = {}
    for line in b"".join(chunks[bytes.fromhex(name)] for name in saved["blocks"]).splitlines():
        head, read = map(json.loads, line.split(b"\t"))
        parts = [bytes(c << 20) if isinstance(c, int) else chunks[bytes.fromhex(c)] for c in read["chunks"]]
        found[head["path"].encode()] = b"".join(parts)[: read["size"]]
    assert found == data


# ---- writing packs ----


@QUICK
@given(st.lists(st.binary(max_size=3000) | st.integers(0, 30_000).map(bytes), max_size=12), st.sampled_from([0, 1, 2]))
def test_chunks_round_trip(chunks: list[bytes], codec: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        digests = fill(folder + "/backups", chunks, codec)
        assert read_all(folder + "/backups", digests) == chunks


def test_chunk_is_readable_before_the_seal(writer: z.PackWriter, reader: z.Reader) -> None:
    reader.open_pack = writer
    digest = writer.put_chunk(b"text")
    writer.put_patch(digest_of(b"ex"), [z.Run(digest, 1, 2)])
    assert reader.get(digest_of(b"ex")) == b"ex"
    assert reader.get(digest) == b"text"
    writer.seal()
    assert reader.get(digest) == b"text"


def test_chunk_is_stored_once(store: z.Store, writer: z.PackWriter) -> None:
    data = noise(1000)
    writer.put_chunk(data)
    writer.put_chunk(data)
    writer.put_patch(digest_of(data), [z.Run(bytes(32), 0, 5)])  # known already: no patch is written
    writer.seal()
    writer.put_chunk(data)
    writer.seal()
    assert writer.count == 0
    (pack,) = packs_of(store.path)
    assert parse_pack(pack.read_bytes()) == {digest_of(data): data}
    assert writer.added == pack.stat().st_size


def test_seal_of_nothing_makes_no_pack(store: z.Store, writer: z.PackWriter) -> None:
    writer.seal()
    assert os.listdir(store.packs) == []


def test_abandon_removes_the_pack(store: z.Store, writer: z.PackWriter) -> None:
    digest = writer.put_chunk(b"text")
    writer.flush()
    assert len(os.listdir(store.packs)) == 1
    writer.abandon()
    assert os.listdir(store.packs) == []
    assert store.index.find([digest]) == {}


def test_frame_is_kept_as_it_came(store: z.Store, writer: z.PackWriter) -> None:
    pieces = [piece_of(noise(300_000, seed)) for seed in "ab"]
    raw = b"".join(piece.data for piece in pieces)
    packed = zlib.compress(raw, 9)
    writer.put_frame((z.ZLIB, len(raw), memoryview(packed)), pieces)
    assert (writer.count, len(packed) < writer.size < len(packed) + 20_000) == (2, True)
    writer.seal()
    (pack,) = packs_of(store.path)
    assert packed in pack.read_bytes()
    assert read_all(store.path, [piece.digest for piece in pieces]) == [bytes(piece.data) for piece in pieces]


@pytest.mark.parametrize("case", ["small", "partly known", "twice the same", "more than the pieces"])
def test_frame_is_regrouped(store: z.Store, writer: z.PackWriter, case: str) -> None:
    size = 1000 if case == "small" else 300_000
    pieces = [piece_of(noise(size, seed)) for seed in "ab"]
    if case == "partly known":
        writer.put_chunk(bytes(pieces[0].data))
    if case == "twice the same":
        pieces.append(pieces[0])
    raw = b"".join(piece.data for piece in pieces) + (b"told" if case == "more than the pieces" else b"")
    packed = zlib.compress(raw)
    writer.put_frame((z.ZLIB, len(raw), packed), pieces)
    assert writer.count == 2
    writer.seal()
    (pack,) = packs_of(store.path)
    assert packed not in pack.read_bytes()
    assert parse_pack(pack.read_bytes()) == {piece.digest: bytes(piece.data) for piece in pieces}


def test_small_chunks_share_frames(store: z.Store, writer: z.PackWriter) -> None:
    for i in range(3000):
        writer.put_chunk(noise(1000, str(i)))
    writer.seal()
    (pack,) = packs_of(store.path)
    assert pack.read_bytes().count(z.RECORD_MAGIC) == 3  # of about 1 MiB each


def test_patches_share_records(writer: z.PackWriter, reader: z.Reader, store: z.Store) -> None:
    base = noise(4000)
    source = writer.put_chunk(base)
    wanted = {digest_of(base[i : i + 20]): base[i : i + 20] for i in range(1200)}
    for i, digest in enumerate(wanted):
        writer.put_patch(digest, [z.Run(source, i, 20)])
    writer.seal()
    assert {digest: reader.get(digest) for digest in wanted} == wanted
    (pack,) = packs_of(store.path)
    kinds = [kind for _, kind, _ in itertools.takewhile(lambda row: row[0], read_footer(pack))]
    assert kinds.count(z.PATCHES) == 3


def read_footer(pack: Path) -> list[tuple[int, int, int]]:
    data = pack.read_bytes()
    at, rows = struct.unpack("<Q", data[-48:-40])[0], []
    while at < len(data) - 48:
        rows.append(struct.unpack_from("<QB3xI", data, at))
        at += 16 + 32 * rows[-1][2]
    return rows


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_pack_on_a_disk_that_fails(
    store: z.Store, writer: z.PackWriter, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    digest = writer.put_chunk(b"text")
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(z.StoreError, match="cannot be written" if number == errno.EIO else "is full") as caught:
        writer.seal()
    assert caught.value.exit_code == 4
    monkeypatch.undo()
    writer.abandon()
    assert list(Path(store.packs).rglob("incoming-*")) == packs_of(store.path) == []
    assert store.index.find([digest]) == {}


def test_pack_taken_for_a_leftover_before_its_lock(
    store: z.Store, writer: z.PackWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = z.lock_file, []

    def lock(path: str, shared: bool) -> int:
        seen.append(path)
        if len(seen) == 1:
            raise BlockingIOError  # another run tries the lock at this moment
        fd = real(path, shared)
        if len(seen) == 2:
            os.unlink(path)  # another run has removed it
        return fd

    monkeypatch.setattr(z, "lock_file", lock)
    digest = writer.put_chunk(b"text")
    writer.seal()
    assert len(set(seen)) == 3
    assert read_all(store.path, [digest]) == [b"text"]


def test_pack_is_durable_before_the_index_knows_it(writer: z.PackWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: steps.append(name) or real(*a))
    monkeypatch.setattr(z, "sync_folder", lambda path: steps.append("folder"))
    real_put = writer.index.put_pack
    monkeypatch.setattr(writer.index, "put_pack", lambda *a: steps.append("index") or real_put(*a))
    writer.put_chunk(b"text")
    writer.seal()
    assert [step for step in steps if step != "folder"] == ["fsync", "rename", "index"]
    assert steps[steps.index("rename") + 1 :] == ["folder", "folder", "index"]


def test_pack_of_another_run_is_durable_before_the_index_knows_it(
    store: z.Store, writer: z.PackWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been put in its place just now: what is built on it must not outlive it in a power cut."""
    with contextlib.closing(z.Index(":memory:")) as other:
        writer.index = other
        writer.put_chunk(b"text")
        writer.seal()
    (name,) = writer.sealed
    steps = []
    monkeypatch.setattr(z, "sync_folder", lambda path: steps.append(os.path.basename(path)))
    real_put = store.index.put_pack
    monkeypatch.setattr(store.index, "put_pack", lambda *a: steps.append("index") or real_put(*a))
    store.load_index()
    assert sorted(steps[:2]) == sorted([name[:2], "packs"]) and steps[2:] == ["index"]


# ---- patches ----

page_runs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7), st.integers(1, 8)), min_size=1, max_size=10)


@QUICK
@given(page_runs, st.booleans())
def test_pages_of_a_patch(picked: list[tuple[int, int, int]], ragged: bool) -> None:
    bases = [noise(8 * z.PAGE - 100 * i, str(i)) for i in range(3)]
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(z.open_store(folder, create=True)) as store:
        writer, reader = make_writer(store), store.reader()
        sources = [writer.put_chunk(base) for base in bases]
        runs = []
        for which, page, count in picked:
            start = page * z.PAGE + 5 * ragged
            runs.append(z.Run(sources[which], start, min(count * z.PAGE, len(bases[which]) - start)))
        wanted = b"".join(bases[sources.index(run.source)][run.offset : run.offset + run.length] for run in runs)
        writer.put_patch(digest_of(wanted), runs)
        writer.seal()
        assert reader.get(digest_of(wanted)) == wanted
        assert reader.pages(digest_of(wanted)) == z.hash_pages(wanted)
        reader.close()


def test_pages_of_a_patch_of_pages_reads_no_content(writer: z.PackWriter, reader: z.Reader) -> None:
    base = noise(8 * z.PAGE)
    source = writer.put_chunk(base)
    wanted = base[2 * z.PAGE : 4 * z.PAGE] + base[: z.PAGE]
    writer.put_patch(digest_of(wanted), [z.Run(source, 2 * z.PAGE, 2 * z.PAGE), z.Run(source, 0, z.PAGE)])
    writer.seal()
    reader.get = None  # type: ignore[assignment, method-assign]
    assert reader.pages(digest_of(wanted)) == z.hash_pages(wanted)
    assert reader.pages(source) == z.hash_pages(base)


def test_runs_and_pages_of_a_whole_chunk_read_no_content(
    store: z.Store, reader: z.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (digest,) = fill(store.path, [noise(z.CHUNK)])
    monkeypatch.setattr(z, "load_raw", failing(errno.EIO))
    assert reader.runs(digest) == (z.Run(digest, 0, z.CHUNK),)
    assert reader.pages(digest) == z.hash_pages(noise(z.CHUNK))


def test_runs_of_a_whole_chunk_and_of_a_patch(writer: z.PackWriter, reader: z.Reader) -> None:
    source = writer.put_chunk(b"some text")
    runs = (z.Run(source, 5, 4), z.Run(source, 0, 4))
    writer.put_patch(digest_of(b"textsome"), runs)
    writer.seal()
    assert reader.runs(source) == (z.Run(source, 0, 9),)
    assert reader.runs(digest_of(b"textsome")) == runs


@pytest.mark.parametrize("run", ["beyond", "of a patch"])
def test_patch_that_names_what_is_not_there(writer: z.PackWriter, reader: z.Reader, run: str) -> None:
    source = writer.put_chunk(b"some text")
    writer.put_patch(digest_of(b"text"), [z.Run(source, 5, 4)])
    wrong = z.Run(source, 5, 5) if run == "beyond" else z.Run(digest_of(b"text"), 0, 4)
    writer.put_patch(digest_of(b"wrong"), [wrong])
    writer.seal()
    (pack,) = packs_of(os.path.dirname(writer.folder))
    for read in (reader.get, reader.pages):
        with pytest.raises(z.StoreError, match=pack.stem):
            read(digest_of(b"wrong"))


# ---- damaged packs ----


def make_small_pack(path: str, codec: int) -> dict[bytes, bytes]:
    """Make a pack of a frame of two chunks, and of a patch; returns all by digest."""
    with contextlib.closing(z.open_store(path, create=True)) as store:
        writer = make_writer(store, codec)
        one, two = b"one " * 20, b"two " * 20
        source = writer.put_chunk(one)
        writer.put_chunk(two)
        writer.put_patch(digest_of(one[:16] + two[:8]), [z.Run(source, 0, 16), z.Run(digest_of(two), 0, 8)])
        writer.seal()
    return {digest_of(data): data for data in (one, two, one[:16] + two[:8])}


def flip_each_byte(path: str, start: int, end: int) -> Iterator[tuple[Path, z.Reader]]:
    """Yield a new reader for each byte of the only pack that is changed, and mend it again."""
    (pack,) = packs_of(path)
    with contextlib.closing(z.open_store(path)) as store, open(pack, "r+b") as file:
        for at, bit in itertools.product(range(start, end), (1, 128)):
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ bit]), at)
            with contextlib.closing(store.reader()) as reader:
                yield pack, reader
            os.pwrite(file.fileno(), byte, at)


@pytest.mark.parametrize("codec", [z.PLAIN, z.ZLIB, z.ZSTD])
def test_flipped_byte_never_gives_other_bytes(path: str, codec: int) -> None:
    chunks = make_small_pack(path, codec)
    (pack,) = packs_of(path)
    for _, reader in flip_each_byte(path, 0, pack.stat().st_size):
        for digest, chunk in chunks.items():
            for read, right in ((reader.get, chunk), (reader.pages, z.hash_pages(chunk))):
                with contextlib.suppress(z.StoreError):
                    assert read(digest) == right


def test_flipped_byte_of_the_data_is_found(path: str) -> None:
    chunks = make_small_pack(path, z.PLAIN)
    (pack,) = packs_of(path)
    for data in list(chunks.values())[:2]:
        start = pack.read_bytes().index(data)
        for damaged, reader in flip_each_byte(path, start, start + len(data)):
            with pytest.raises(z.StoreError, match=damaged.stem):
                reader.get(digest_of(data))


def test_flipped_byte_of_a_patch_names_its_pack(path: str) -> None:
    *_, digest = make_small_pack(path, z.PLAIN)
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        record = reader.record(reader.find(digest)[0])
    for damaged, reader in flip_each_byte(path, record.data_offset, record.data_offset + record.stored):
        with pytest.raises(z.StoreError, match=damaged.stem):
            reader.get(digest)


@pytest.mark.parametrize("read", ["get", "pages"])
def test_damage_is_laid_to_the_pack_that_has_it(path: str, read: str) -> None:
    (source,) = fill(path, [b"text " * 100])
    (damaged,) = packs_of(path)
    with contextlib.closing(z.open_store(path)) as store:
        writer = make_writer(store)
        writer.put_patch(digest_of(b"ext"), [z.Run(source, 1, 3)])
        writer.seal()
    data = bytearray(damaged.read_bytes())
    data[data.index(z.RECORD_MAGIC) + z.RECORD.size + z.TABLE_ROW.size + z.PAGE_HASH] ^= 1
    damaged.write_bytes(data)
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        with pytest.raises(z.StoreError) as caught:
            getattr(reader, read)(digest_of(b"ext"))
        assert damaged.stem in str(caught.value)


def test_pack_cut_off_while_it_is_known(path: str) -> None:
    digests = fill(path, [noise(5000)])
    (pack,) = packs_of(path)
    for size in (0, 8, 20, 39, 60, 5000):
        os.truncate(pack, size)
        with pytest.raises(z.StoreError, match=pack.stem):
            read_all(path, digests)


def test_index_that_names_a_row_that_is_not_there_in_a_record_read_before(path: str) -> None:
    first, second = fill(path, [b"one", b"two"])
    with contextlib.closing(sqlite3.connect(path + "/index.sqlite")) as index, index:
        index.execute("UPDATE chunks SET place = 7 WHERE digest = ?", (second,))
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert reader.get(first) == b"one"
        with pytest.raises(z.StoreError, match="no row 7"):
            reader.get(second)


def test_index_that_names_a_row_that_is_not_there(path: str) -> None:
    digests = fill(path, [b"text"])
    with contextlib.closing(sqlite3.connect(path + "/index.sqlite")) as index, index:
        index.execute("UPDATE chunks SET place = 7")
    with pytest.raises(z.StoreError, match="no row 7"):
        read_all(path, digests)


def test_pack_on_a_bad_sector(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = fill(path, [b"text"])
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with pytest.raises(z.StoreError, match=packs_of(path)[0].stem):
        read_all(path, digests)


@pytest.mark.parametrize("what", ["start", "end", "cut off", "empty", "footer", "outside"])
def test_pack_whose_index_is_damaged(path: str, what: str) -> None:
    kept = fill(path, [b"kept"])
    whole = set(packs_of(path))
    lost = fill(path, [b"lost"])
    (pack,) = set(packs_of(path)) - whole
    data = pack.read_bytes()
    (start,) = struct.unpack("<Q", data[-48:-40])
    pack.write_bytes(
        {
            "start": b"ZBPACK" + data[6:],
            "end": data + b"x",
            "cut off": data[:-1],
            "empty": data[:8],
            "footer": data[:start] + b"x" + data[start + 1 :],
            "outside": data[:-48] + struct.pack("<Q", len(data)) + data[-40:],
        }[what]
    )
    drop_index(path)
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        (problem,) = store.problems
        assert pack.stem in problem
        assert reader.get(kept[0]) == b"kept"
        with pytest.raises(z.MissingChunk):
            reader.get(lost[0])


def test_pack_that_is_gone(path: str) -> None:
    kept = fill(path, [b"kept"])
    whole = set(packs_of(path))
    lost = fill(path, [b"lost"])
    (pack,) = set(packs_of(path)) - whole
    pack.unlink()
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert store.index.list_packs() == {found.stem for found in whole}
        assert reader.get(kept[0]) == b"kept"
        with pytest.raises(z.MissingChunk) as caught:
            reader.get(lost[0])
        assert caught.value.exit_code == 4


def test_pack_that_goes_while_the_store_is_open(store: z.Store, reader: z.Reader) -> None:
    (digest,) = fill(store.path, [b"text"])
    packs_of(store.path)[0].unlink()
    with pytest.raises(z.StoreError, match="cannot be opened"):
        reader.get(digest)


def test_reader_of_many_packs_keeps_few_open(store: z.Store, reader: z.Reader) -> None:
    writer, wanted = make_writer(store), {}
    for i in range(40):
        data = b"chunk %d" % i
        wanted[writer.put_chunk(data)] = data
        writer.seal()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert {digest: reader.get(digest) for digest in wanted} == wanted
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_reader_keeps_few_frames(store: z.Store) -> None:
    writer = make_writer(store)
    digests = [writer.put_chunk(noise(z.CHUNK, str(i))) for i in range(4)]
    writer.seal()
    reader = z.Reader(store.packs, store.index, frames=2)
    for digest in [*digests, *reversed(digests), digests[0], digests[0]]:
        assert digest_of(reader.get(digest)) == digest
    assert sum(map(len, reader._raws.values())) <= 2 * z.CHUNK
    reader.close()


# ---- the index ----


def write_index(path: str, data: bytes) -> None:
    drop_index(path)
    Path(path, "index.sqlite").write_bytes(data)


def test_index_that_is_deleted_is_made_again(path: str) -> None:
    chunks = [noise(2000, str(i)) for i in range(50)]
    digests = fill(path, chunks[:25]) + fill(path, chunks[25:])
    drop_index(path)
    assert read_all(path, digests) == chunks


@pytest.mark.parametrize("data", [b"", b"x", b"SQLite format 3\0", noise(10_000), bytes(4096)], ids=len)
def test_index_that_is_no_database_is_made_again(path: str, data: bytes) -> None:
    digests = fill(path, [b"text"])
    write_index(path, data)
    assert read_all(path, digests) == [b"text"]


def test_index_cut_off_anywhere_is_made_again(path: str) -> None:
    chunks = [noise(300, str(i)) for i in range(500)]
    digests = fill(path, chunks)
    whole = Path(path, "index.sqlite").read_bytes()
    for size in [100, 4095, *range(4096, len(whole), 4096)]:
        write_index(path, whole[:size])
        assert read_all(path, digests) == chunks


def test_index_of_another_version_is_made_again(path: str) -> None:
    digests = fill(path, [b"text"])
    with contextlib.closing(sqlite3.connect(path + "/index.sqlite")) as index:
        index.execute("PRAGMA user_version = 99")
    assert read_all(path, digests) == [b"text"]
    with contextlib.closing(sqlite3.connect(path + "/index.sqlite")) as index:
        assert index.execute("PRAGMA user_version").fetchone() == (z.INDEX_VERSION,)


def damage_page(path: str, page: int, filling: bytes) -> None:
    damaged = bytearray(Path(path, "index.sqlite").read_bytes())
    damaged[page * 4096 : (page + 1) * 4096] = filling
    write_index(path, bytes(damaged))


@pytest.mark.parametrize("page", [0, 2, 3, 4])
@pytest.mark.parametrize("filling", [bytes(4096), noise(4096)], ids=["zeros", "noise"])
def test_index_with_a_damaged_page_is_made_again(path: str, page: int, filling: bytes) -> None:
    chunks = [noise(300, str(i)) for i in range(500)]
    digests = fill(path, chunks)
    damage_page(path, page, filling)
    assert read_all(path, digests) == chunks


def test_index_with_a_damaged_list_of_packs_is_made_again(path: str) -> None:
    digests = fill(path, [b"text"])
    damage_page(path, 1, bytes(4096))
    assert read_all(path, digests) == [b"text"]


def test_index_that_names_another_row_is_not_laid_to_the_pack(path: str) -> None:
    digests = fill(path, [b"one", b"two"])
    with contextlib.closing(sqlite3.connect(path + "/index.sqlite")) as index, index:
        index.execute("UPDATE chunks SET place = 0")
    try:
        assert read_all(path, digests) == [b"one", b"two"]
    except z.StoreError as error:
        assert "index" in str(error)


def test_index_with_a_flipped_bit_in_a_pack_name(path: str) -> None:
    digests = fill(path, [b"text"])
    (pack,) = packs_of(path)
    damaged = bytearray(Path(path, "index.sqlite").read_bytes())
    while pack.stem.encode() in damaged:
        damaged[damaged.index(pack.stem.encode()) + 5] ^= 128
    write_index(path, bytes(damaged))
    assert read_all(path, digests) == [b"text"]


def test_index_with_a_flipped_bit_in_its_schema_is_made_again(path: str) -> None:
    digests = fill(path, [b"text"])
    whole = Path(path, "index.sqlite").read_bytes()
    start = whole.index(b"CREATE TABLE chunks")
    for at in range(start, start + 120, 5):
        write_index(path, whole[:at] + bytes([whole[at] ^ 128]) + whole[at + 1 :])
        assert read_all(path, digests) == [b"text"]


def test_index_with_other_tables_is_made_again(path: str) -> None:
    digests = fill(path, [b"text"])
    drop_index(path)
    with contextlib.closing(sqlite3.connect(path + "/index.sqlite")) as index, index:
        index.execute("CREATE TABLE packs (something)")
    assert read_all(path, digests) == [b"text"]


def test_index_that_cannot_be_made(path: str) -> None:
    fill(path, [b"text"])
    drop_index(path)
    Path(path, "index.sqlite").mkdir()
    with pytest.raises(z.StoreError, match="the index of the store") as caught:
        z.open_store(path)
    assert caught.value.exit_code == 4


def test_index_that_breaks_while_it_is_used(store: z.Store) -> None:
    with contextlib.closing(sqlite3.connect(store.path + "/index.sqlite")) as other, other:
        other.execute("DROP TABLE chunks")
    with pytest.raises(z.StoreError, match="`verify` makes it again"):
        store.index.find([bytes(32)])
    with pytest.raises(z.StoreError, match="`verify` makes it again"):
        store.index.put_pack("0" * 64, [(bytes(32), 8, 0)])
    assert store.index.list_packs() == set()  # nothing of it is kept


def test_index_finds_many_at_once(store: z.Store) -> None:
    digests = [hashlib.sha256(b"%d" % i).digest() for i in range(1700)]
    store.index.put_pack("0" * 64, [(digest, 8, i) for i, digest in enumerate(digests[:1500])])
    assert store.index.find(digests) == {d: z.Place("0" * 64, 8, i) for i, d in enumerate(digests[:1500])}
    store.index.reset()
    assert store.index.find(digests) == {}


def test_reader_looks_many_up_at_once(
    store: z.Store, writer: z.PackWriter, reader: z.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {writer.put_chunk(data): data for data in (b"one", b"two", b"three")}
    writer.seal()
    asked: list[int] = []
    real = store.index.find_all
    monkeypatch.setattr(store.index, "find_all", lambda digests: (asked.append(len(digests)), real(digests))[1])
    reader.look_up([*wanted, bytes(32)])
    assert {digest: reader.get(digest) for digest in wanted} == wanted
    assert asked == [4]
    later = writer.put_chunk(b"later")
    writer.seal()
    assert reader.get(later) == b"later"
    with pytest.raises(z.MissingChunk):
        reader.get(bytes(32))


def test_reader_that_cannot_look_up_says_so_chunk_by_chunk(store: z.Store, reader: z.Reader) -> None:
    (digest,) = fill(store.path, [b"text"])
    store.index.close()
    reader.look_up([digest])
    with pytest.raises(z.StoreError, match="the index"):
        reader.get(digest)


def test_index_used_from_many_threads(store: z.Store) -> None:
    def put_and_find(number: int) -> bool:
        digests = [hashlib.sha256(b"%d.%d" % (number, i)).digest() for i in range(50)]
        store.index.put_pack(f"{number:064}", [(digest, 8, i) for i, digest in enumerate(digests)])
        return set(store.index.find(digests)) == set(digests)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(put_and_find, range(40)))
    assert len(store.index.list_packs()) == 40


def test_chunk_of_two_packs_survives_the_loss_of_one(path: str) -> None:
    with contextlib.closing(z.open_store(path, create=True)) as store:
        writers = [make_writer(store), make_writer(store)]  # as two nodes that are copied side by side
        for writer, more in zip(writers, (b"a", b"b")):
            writer.put_chunk(b"text")
            writer.put_chunk(more)
        for writer in writers:
            writer.seal()
        place = store.index.find([digest_of(b"text")])[digest_of(b"text")]
    (lost,) = [pack for pack in packs_of(path) if pack.stem == place.pack]
    lost.unlink()
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert len(store.problems) == 1 and f"pack {lost.stem} is lost" in store.problems[0]
        assert reader.get(digest_of(b"text")) == b"text"


def test_index_names_the_right_pack_after_another_process_made_it_again(store: z.Store) -> None:
    store.index.put_pack("0" * 64, [(bytes(32), 8, 0)])
    other = z.Index(store.index.path)
    other.remove_pack("0" * 64)
    other.put_pack("1" * 64, [(b"1" * 32, 8, 0)])
    other.close()
    assert store.index.find([b"1" * 32]) == {b"1" * 32: z.Place("1" * 64, 8, 0)}


# ---- several at one store ----


def test_two_writers_of_one_process(store: z.Store, reader: z.Reader) -> None:
    writers = [make_writer(store), make_writer(store)]
    wanted = {}
    for i, writer in enumerate(writers):
        for data in (b"the same", b"own %d" % i):
            wanted[writer.put_chunk(data)] = data
        writer.flush()
    for writer in writers:
        writer.seal()
    assert {digest: reader.get(digest) for digest in wanted} == wanted
    assert len(packs_of(store.path)) == 2


def test_two_writers_of_the_same_pack(store: z.Store, reader: z.Reader) -> None:
    writers = [make_writer(store), make_writer(store)]
    for writer in writers:
        writer.put_chunk(b"the same")
    for writer in writers:
        writer.seal()
    assert len(packs_of(store.path)) == 1
    assert reader.get(digest_of(b"the same")) == b"the same"


WRITE_MANY = """
store = z.open_store(sys.argv[1])
writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
for pack in range(5):
    for i in range(20):
        writer.put_chunk(f"{sys.argv[2]} {pack} {i}".encode())
        writer.put_chunk(f"the same {pack} {i}".encode())
    writer.seal()
print("done")
"""


def test_writers_of_several_processes(path: str, store: z.Store, reader: z.Reader) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda name: run_child(WRITE_MANY, path, name), "abc")) == ["done"] * 3
    wanted = [f"{w} {p} {i}".encode() for w in ["a", "b", "c", "the same"] for p in range(5) for i in range(20)]
    assert [reader.get(digest_of(data)) for data in wanted] == wanted  # of a store opened before
    assert read_all(path, [digest_of(data) for data in wanted]) == wanted


def test_pack_sealed_while_another_process_opens_the_store(
    store: z.Store, writer: z.PackWriter, reader: z.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = writer.put_chunk(b"text")
    real = z.list_packs

    def list_then_seal(folder: str) -> dict[str, str]:
        found = real(folder)
        writer.seal()
        return found

    monkeypatch.setattr(z, "list_packs", list_then_seal)
    z.open_store(store.path).close()
    assert reader.get(digest) == b"text"


def test_store_made_by_two_processes_at_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = z.make_folder

    def make_when_the_other_is_done(folder: str) -> None:
        monkeypatch.setattr(z, "make_folder", real)
        z.open_store(path, create=True).close()
        real(folder)

    monkeypatch.setattr(z, "make_folder", make_when_the_other_is_done)
    z.open_store(path, create=True).close()


# ---- entries in blocks, chunks in lists ----


def make_entries(count: int, changed: int = -1) -> list[z.Entry]:
    found = []
    for i in range(count):
        content = z.Content(size=1 if i == changed else 2, grade="stable")
        found.append(
            z.Entry(z.encode_stat(z.Stat(b"dir/%05d" % i, "file", size=content.size)), z.encode_content(content))
        )
    return found


def write_blocks(writer: z.PackWriter, entries: Sequence[z.Entry]) -> tuple[bytes, ...]:
    blocks = z.BlockWriter(writer)
    for entry in entries:
        blocks.put(entry)
    return blocks.close()


def test_blocks_round_trip(writer: z.PackWriter, reader: z.Reader) -> None:
    entries = make_entries(3000)
    blocks = write_blocks(writer, entries)
    writer.seal()
    assert 3 < len(blocks) < 40
    assert list(z.list_entries(reader, blocks)) == entries
    assert write_blocks(writer, []) == ()


@pytest.mark.parametrize("changed", [0, 1500, 2999])
def test_changed_entry_changes_one_block(writer: z.PackWriter, changed: int) -> None:
    before, after = (write_blocks(writer, make_entries(3000, which)) for which in (-1, changed))
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after)) == 1


@pytest.mark.parametrize("change", ["added", "removed"])
def test_added_or_removed_entry_changes_few_blocks(writer: z.PackWriter, change: str) -> None:
    entries = make_entries(3000)
    before = set(write_blocks(writer, entries))
    added = z.Entry(z.encode_stat(z.Stat(b"dir/01500x", "file")), b"{}")
    other = [*entries[:1500], added, *entries[1500:]] if change == "added" else entries[:1500] + entries[1501:]
    assert len(before ^ set(write_blocks(writer, other))) <= 4


def test_blocks_of_large_entries_stay_small(writer: z.PackWriter, reader: z.Reader) -> None:
    xattrs = {"user.a": "A" * 60_000}
    entries = [z.Entry(z.encode_stat(z.Stat(b"%d" % i, "directory", xattrs=xattrs)), b"{}") for i in range(30)]
    blocks = write_blocks(writer, entries)
    writer.seal()
    assert all(len(reader.get(block)) <= z.CHUNK // 4 for block in blocks)
    assert list(z.list_entries(reader, blocks)) == entries


def test_block_that_is_none(writer: z.PackWriter, reader: z.Reader) -> None:
    good = write_blocks(writer, make_entries(1))
    blocks = [bytes(32), writer.put_chunk(b"no tab here\n"), *good]
    writer.seal()
    for block, kind in zip(blocks, (z.MissingChunk, z.FormatError)):
        with pytest.raises(kind):
            list(z.list_entries(reader, [block]))
    errors: list[z.BackupError] = []
    assert list(z.list_entries(reader, blocks, errors.append)) == make_entries(1)
    assert [type(error) for error in errors] == [z.MissingChunk, z.FormatError]


SPAN = z.LIST_SPAN
RUNS_OF_CHUNKS = [  # a positive number: so many chunks of zeros; a negative: so many digests
    [],
    [-1],
    [5],
    [-SPAN],
    [SPAN],
    [-SPAN, -1],
    [SPAN + 1],
    [-(SPAN - 1), 1],
    [-(SPAN - 1), 2],
    [-(SPAN - 1), 2 * SPAN + 1],
    [-1, 3 * SPAN, -1],
    [2 * SPAN],
    [SPAN, SPAN],
    [SPAN - 1, 1, 1],
    [-2 * SPAN],
    [-SPAN, 1, -1, SPAN - 2, -1],
    [3, 0, 4],
]


@pytest.mark.parametrize("plan", RUNS_OF_CHUNKS, ids=str)
def test_lists_of_chunks(writer: z.PackWriter, reader: z.Reader, plan: list[int]) -> None:
    expected: list[bytes | None] = []
    listed = z.ListWriter(writer)
    for step in plan:
        if step < 0:
            for _ in range(-step):
                expected.append(hashlib.sha256(b"%d" % len(expected)).digest())
                listed.put(expected[-1] or b"")
        else:
            expected += [None] * step
            listed.put_zeros(step)
    content = listed.content(len(expected) << 20, "stable")
    writer.seal()
    assert listed.count == len(expected)
    assert len(content.lists) == (z.count_pages(len(expected) * z.PAGE // SPAN) if len(expected) > SPAN else 0)
    assert not (content.chunks and content.lists)
    assert z.decode_content(z.encode_content(content)) == content
    flat = [
        c for chunk in z.list_chunks(reader, content) for c in ([None] * chunk if isinstance(chunk, int) else [chunk])
    ]
    assert flat == expected
    for digest in content.lists[:-1]:
        assert sum(c if isinstance(c, int) else 1 for c in z.load_chunk_list(reader, digest)) == SPAN
    table = z.ChunkTable(reader, content)
    for number in [0, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, 10 * SPAN, len(expected) - 1, len(expected)]:
        assert table.get(max(0, number)) == dict(enumerate(expected)).get(max(0, number))


@QUICK
@given(st.lists(st.integers(-2 * SPAN, 3 * SPAN), max_size=5))
def test_lists_of_any_chunks(plan: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(z.open_store(folder, create=True)) as store:
        writer, reader = make_writer(store), store.reader()
        listed, expected = z.ListWriter(writer), b""
        for step in plan:
            for _ in range(-step):
                listed.put(b"d" * 32)
            listed.put_zeros(step)
            expected += b"d" * -step + b"0" * step
        content = listed.content(0, "stable")
        writer.seal()
        found = b"".join(b"0" * c if isinstance(c, int) else b"d" for c in z.list_chunks(reader, content))
        assert found == expected
        reader.close()


def test_lists_are_shared_where_nothing_changed(writer: z.PackWriter) -> None:
    contents = []
    for changed in (-1, 5 * SPAN // 2):
        listed = z.ListWriter(writer)
        for i in range(4 * SPAN):
            listed.put(hashlib.sha256(b"%d.%d" % (i, i == changed)).digest())
        contents.append(listed.content(0, "stable"))
    assert [a == b for a, b in zip(contents[0].lists, contents[1].lists)] == [True, True, False, True]


@pytest.mark.parametrize("data", [b"", b"{}", b"7", b"\xff", b'["00"]', b"[0]", b"[1025]", b"[" + b"1," * 1024 + b"1]"])
def test_list_that_is_none(writer: z.PackWriter, reader: z.Reader, data: bytes) -> None:
    digest = writer.put_chunk(data)
    writer.seal()
    with pytest.raises(z.FormatError):
        z.load_chunk_list(reader, digest)


def test_list_that_is_nested(writer: z.PackWriter, reader: z.Reader) -> None:
    digest = writer.put_chunk(b"[" * 100_000)
    writer.seal()
    with pytest.raises(z.FormatError):
        z.load_chunk_list(reader, digest)


def test_links_of_64_bits() -> None:
    table = z.LinkTable()
    keys = [(device, inode) for device in (0, 1 << 63, (1 << 64) - 1) for inode in (1, (1 << 63) - 1, (1 << 64) - 2)]
    for key in keys:
        table.put(key, b"old")
        table.put(key, b"%d.%d" % key)
    assert [table.get(key) for key in keys] == [b"%d.%d" % key for key in keys]
    assert table.get((5, 5)) is None
    table.close()


# ---- a node's folder ----


@pytest.fixture
def folder(store: z.Store) -> z.NodeFolder:
    made = store.node("here")
    made.make()
    return made


def test_snapshots_of_one_second_do_not_overwrite(folder: z.NodeFolder) -> None:
    saved = [folder.save_snapshot(replace(SNAPSHOT, sequence=i)) for i in range(3)]
    assert [snapshot.name for snapshot in saved] == [SNAPSHOT.name + end for end in ("", "-2", "-3")]
    assert folder.list_snapshots() == saved
    assert [folder.load_snapshot(snapshot.name) for snapshot in saved] == saved
    assert not [name for name in os.listdir(folder.snapshots) if name.startswith(".")]


def test_snapshots_come_in_the_order_they_were_made(folder: z.NodeFolder) -> None:
    for sequence, name in [(1, "2030"), (2, "2020"), (11, "2025"), (10, "2026")]:  # the clock went astray
        folder.save_snapshot(replace(SNAPSHOT, name=name, sequence=sequence))
    assert [snapshot.name for snapshot in folder.list_snapshots()] == ["2030", "2020", "2026", "2025"]


def test_snapshots_of_a_node_without_any(store: z.Store) -> None:
    assert store.node("nowhere").list_snapshots() == []


@pytest.mark.parametrize("data", [b"", b"{}", b"\0" * 100, b'{"format":99}'], ids=len)
def test_damaged_snapshot_does_not_hide_the_others(folder: z.NodeFolder, data: bytes) -> None:
    good = folder.save_snapshot(SNAPSHOT)
    Path(folder.snapshots, "bad.json").write_bytes(data)
    Path(folder.snapshots, "gone.json").symlink_to("nowhere")
    Path(folder.snapshots, ".zbackup-tmp-x.json").write_bytes(b"half")
    Path(folder.snapshots, "notes.txt").write_bytes(b"mine")
    for _ in range(2):
        assert folder.list_snapshots() == [good]
    assert [sentence.split()[1] for sentence in folder.problems] == ["here/bad", "here/gone"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_snapshot_on_a_disk_that_fails(folder: z.NodeFolder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(z.StoreError, match="is full" if number == errno.ENOSPC else "cannot be written"):
        folder.save_snapshot(SNAPSHOT)
    assert os.listdir(folder.snapshots) == []


def test_snapshot_without_hard_links(folder: z.NodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    names = [folder.save_snapshot(SNAPSHOT).name for _ in range(2)]
    assert names == [SNAPSHOT.name, SNAPSHOT.name + "-2"]


SAVE = "print(z.NodeFolder(sys.argv[1], 'here', []).save_snapshot(z.Snapshot('now', 'here', 1, 1, 2, 'frozen')).name)"


def test_snapshots_of_several_processes(folder: z.NodeFolder, path: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: run_child(SAVE, path), range(4)))
    assert sorted(names) == ["now", "now-2", "now-3", "now-4"]
    assert len(folder.list_snapshots()) == 4


progresses = st.builds(
    z.Progress,
    blocks=st.lists(st.binary(min_size=32, max_size=32), max_size=4).map(tuple),
    tail=st.integers(0, 5).map(lambda n: tuple(entry.encode() for entry in make_entries(n))),
    current=st.none() | st.just(make_entries(1)[0]),
)


@QUICK
@given(progresses)
def test_progress_round_trip(progress: z.Progress) -> None:
    assert z.decode_progress(z.encode_progress(progress)) == progress


def test_progress_is_kept_and_dropped(folder: z.NodeFolder) -> None:
    assert folder.load_progress() == z.Progress()
    progress = z.Progress((bytes(32),), tuple(entry.encode() for entry in make_entries(2)), make_entries(3)[2])
    folder.save_progress(progress)
    assert folder.load_progress() == progress
    folder.drop_progress()
    folder.drop_progress()
    assert folder.load_progress() == z.Progress()


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"blocks":["00"]}', b'{"current":"no tab"}', b'{"tail":7}', noise(500)], ids=len
)
def test_progress_that_is_damaged_is_ignored(folder: z.NodeFolder, data: bytes) -> None:
    Path(folder.path, "progress.json").write_bytes(data)
    assert folder.load_progress() == z.Progress()


def test_node_is_locked_for_one_run(folder: z.NodeFolder, store: z.Store, path: str) -> None:
    lock = folder.lock()
    child = (
        "try:\n    z.NodeFolder(sys.argv[1], 'here', []).lock()\nexcept z.StoreError as e:\n    print(e.exit_code, e)"
    )
    assert run_child(child, path).startswith("4 another run is copying here")
    os.close(lock)
    assert run_child(child, path) == ""


def test_nodes_are_listed_by_name(store: z.Store) -> None:
    nodes = [z.Known(name, "0" * 32, name, ("127.0.0.9",), 1, 2) for name in ("a", "b")]
    for known in reversed(nodes):
        store.node(known.folder).make()
        store.node(known.folder).save_known(known)
    Path(store.path, "strange").mkdir()
    assert store.list_nodes() == nodes
    assert store.problems == []


@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_node_whose_description_is_gone_is_listed_by_its_snapshots(
    folder: z.NodeFolder, store: z.Store, damage: str
) -> None:
    if damage == "damaged":
        Path(folder.path, "node.json").write_bytes(b"{")
    # Without either, it is a folder that another run makes at this moment.
    assert store.list_nodes() == ([z.Known("here", "")] if damage == "damaged" else [])
    for sequence, started in ((1, 10), (2, 20)):
        folder.save_snapshot(
            replace(SNAPSHOT, sequence=sequence, started=started, identity="0" * 32, host="box", address="127.0.0.9")
        )
    assert store.list_nodes() == [z.Known("here", "0" * 32, "box", ("127.0.0.9",), 10, 20)]
    (problem,) = store.problems
    assert "here/node.json" in problem


# ---- the store as a whole ----


def refused(path: str, words: str, create: bool = False) -> None:
    """Check that a store is refused with exit code 4, and that nothing stays locked."""
    with pytest.raises(z.StoreError, match=words) as caught:
        z.open_store(path, create)
    assert caught.value.exit_code == 4


def test_store_is_made_once(path: str) -> None:
    with contextlib.closing(z.open_store(path, create=True)) as first:
        assert len(first.identity) == 32
        assert os.stat(path).st_mode & 0o077 == 0
    for create in (True, False):
        with contextlib.closing(z.open_store(path, create)) as again:
            assert again.identity == first.identity


def test_store_that_was_half_made(path: str) -> None:
    os.makedirs(path + "/packs")
    Path(path, "README.txt").write_bytes(b"half")
    Path(path, z.TEMPORARY + "zbackup.json-1-1").write_bytes(b"{")
    z.open_store(path, create=True).close()
    assert Path(path, "README.txt").read_text() == z.STORE_README


def test_store_that_is_none(path: str) -> None:
    refused(path, "not a zbackup store")
    os.mkdir(path)
    refused(path, "not a zbackup store")
    Path(path, "photo.jpg").write_bytes(b"mine")
    refused(path, "not empty.*photo.jpg", create=True)
    assert os.listdir(path) == ["photo.jpg"]
    refused(path + "/photo.jpg", "not a zbackup store")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": z.FORMAT + 1}, f"format {z.FORMAT + 1}"),
        ({"features": ["holograms"]}, "holograms"),
        ({"features": "holograms"}, "damaged"),
        ({"format": "1"}, "damaged"),
        ({"id": None}, "damaged"),
    ],
)
def test_store_of_another_kind(path: str, fields: dict[str, object], words: str) -> None:
    fill(path, [b"text"])
    config = Path(path, "zbackup.json")
    rewrite(config, **fields)
    for create in (True, False):
        refused(path, words, create)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
def test_store_whose_description_is_damaged(path: str, data: bytes) -> None:
    fill(path, [b"text"])
    Path(path, "zbackup.json").write_bytes(data)
    refused(path, "damaged", create=True)


def test_store_without_its_packs(path: str) -> None:
    fill(path, [b"text"])
    shutil.rmtree(path + "/packs")
    refused(path, "cannot be opened")


def test_store_locked_by_a_run_that_deletes(path: str) -> None:
    fill(path, [b"text"])
    with held(path + "/lock", "exclusive"):
        refused(path, "locked by another run")
        refused(path, "locked by another run", create=True)
    z.open_store(path).close()


def test_store_that_is_open_cannot_be_locked_to_delete(store: z.Store, path: str) -> None:
    with contextlib.closing(z.open_store(path)), pytest.raises(BlockingIOError):
        z.lock_file(path + "/lock", shared=False)
    store.close()
    os.close(z.lock_file(path + "/lock", shared=False))
    store._lock = os.open(path, os.O_RDONLY)  # for the fixture to close


def test_store_that_fails_to_open_stays_unlocked(path: str) -> None:
    fill(path, [b"text"])
    shutil.rmtree(path + "/packs")
    refused(path, "cannot be opened")
    os.close(z.lock_file(path + "/lock", shared=False))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_store_made_on_a_disk_that_fails(path: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    refused(path, "is full" if number == errno.ENOSPC else "cannot be opened", create=True)
    monkeypatch.undo()
    z.open_store(path, create=True).close()


READ = """
store = z.open_store(sys.argv[1])
print(store.reader().get(bytes.fromhex(sys.argv[2])).decode(), store.index.path, store.problems)
try:
    writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
    writer.put_chunk(b"new")
    writer.seal()
except z.StoreError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("index", ["there", "lost"])
def test_store_that_may_only_be_read(index: str) -> None:
    with tempfile.TemporaryDirectory() as above:  # tmp_path is closed to other users
        os.chmod(above, 0o755)
        path = above + "/backups"
        (digest,) = fill(path, [b"text"])
        if index == "lost":
            drop_index(path)
        for folder, _, names in os.walk(path):
            os.chmod(folder, 0o555)
            for name in names:
                os.chmod(os.path.join(folder, name), 0o444)
        said = run_child(AS_NOBODY + READ, path, digest.hex()).splitlines()
    assert said[0].startswith("text ")
    assert said[0].endswith(" []")
    assert said[1].startswith("4 the store cannot be written")


def test_store_that_may_not_even_be_read() -> None:
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        fill(above + "/backups", [b"text"])
        os.chmod(above + "/backups", 0)
        code = "try:\n    z.open_store(sys.argv[1])\nexcept z.StoreError as error:\n    print(error.exit_code, error)"
        said = run_child(AS_NOBODY + code, above + "/backups")
    assert said == f"4 the store {above}/backups cannot be opened: Permission denied"


def test_strange_files_among_the_packs_are_no_packs(path: str) -> None:
    digests = fill(path, [b"text"])
    for name in ("notes.txt", "3f", "zz/notes.pack", "00/" + "0" * 63 + ".pack", "incoming-5", "aa"):
        Path(path, "packs", name).parent.mkdir(exist_ok=True)
        Path(path, "packs", name).write_bytes(b"strange")
    assert read_all(path, digests) == [b"text"]
    assert list(z.list_packs(path + "/packs")) == [packs_of(path)[0].stem] or len(packs_of(path)) > 1


def test_damage_of_random_bytes_in_a_footer_is_seen(path: str) -> None:
    fill(path, [b"one", b"two"])
    (pack,) = packs_of(path)
    data = pack.read_bytes()
    (start,) = struct.unpack("<Q", data[-48:-40])
    for at in random.Random(1).sample(range(start, len(data)), 30):
        changed = bytearray(data)
        changed[at] ^= 4
        pack.write_bytes(changed)
        with pytest.raises(z.FormatError):
            z.read_pack_index(str(pack))


def test_reader_keeps_the_tables_of_a_bounded_number_of_rows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(z, "ROWS_LIMIT", 3)
    chunks = [bytes([number]) * z.CHUNK for number in range(1, 9)]
    digests = fill(path, chunks)
    with contextlib.closing(z.open_store(path)) as store, contextlib.closing(store.reader()) as reader:
        assert [reader.get(digest) for digest in digests] == chunks
        assert 0 < sum(len(record.rows) for record in reader._records.values()) <= 3


# ---- what was put, and is lost, is not known ----


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_pack_that_was_lost_unheard_is_not_sealed(
    store: z.Store, writer: z.PackWriter, reader: z.Reader, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Looking for a chunk writes it; where the disk refuses that, nothing that waits may count as durable."""
    reader.open_pack = writer
    digest = writer.put_chunk(b"a chunk")
    monkeypatch.setattr(z, "write_all", failing(number))
    if number == errno.ENOSPC:  # the same for every chunk: not a fault of this one
        with pytest.raises(z.FullStore):
            reader.has(digest)
    else:
        assert not reader.has(digest)
    monkeypatch.undo()
    with pytest.raises(z.StoreError):
        writer.seal()
    assert not store.index.find([digest]) and not packs_of(store.path)


def test_full_disk_while_a_patch_is_compared_is_told(
    writer: z.PackWriter, reader: z.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.open_pack = writer
    base = writer.put_chunk(noise(z.CHUNK))
    writer.put_chunk(b"waits")
    monkeypatch.setattr(z, "write_all", failing(errno.ENOSPC))
    with pytest.raises(z.FullStore):
        reader.gives(bytes(32), [z.Run(base, 0, z.PAGE), z.Run(digest_of(b"waits"), 0, 5)])


def test_index_on_a_disk_that_gets_full_says_so(store: z.Store) -> None:
    """SQLite has ended the transaction then, and what it says of that is not what went wrong."""
    pages = store.index._connection.execute("PRAGMA page_count").fetchone()[0]
    store.index._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    rows = [(hashlib.sha256(b"%d" % number).digest(), number, 0) for number in range(20_000)]
    with pytest.raises(z.StoreError, match="full"):
        store.index.put_pack("0" * 64, rows)
    assert not store.index._connection.in_transaction


# ---- what only looks like a digest ----


def test_attributes_that_look_like_digests_name_nothing() -> None:
    """Anybody can give a file of his such ones."""
    digests = tuple(digest_of(bytes([number])) for number in range(3))
    fake = digest_of(b"fake").hex()
    for lists in ((), digests[1:]):
        content = z.Content(3 << 20, digests[:1], lists, xattrs={fake: fake, f"user.[{fake}]": fake, "user.z": fake})
        assert z.list_named(z.encode_content(content)) == [*digests[:1], *lists]


def test_attributes_that_look_like_digests_are_no_damage(path: str, store: z.Store, writer: z.PackWriter) -> None:
    fake = digest_of(b"fake").hex()
    content = z.Content(5, (writer.put_chunk(b"12345"),), (), "stable", xattrs={"user.note": fake})
    blocks = z.BlockWriter(writer)
    blocks.put(z.Entry(z.encode_stat(z.Stat(b"a", "file", size=5)), z.encode_content(content)))
    digests = blocks.close()
    writer.seal()
    folder = store.node("here")
    folder.make()
    folder.save_known(z.Known("here", "0" * 32))
    folder.save_snapshot(z.replace(SNAPSHOT, blocks=digests, grade="stable"))
    assert z.main(["verify", "--store", path]) == 0
