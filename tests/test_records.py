"""RECORDS: what is encoded decodes to the same, and what is not raises FormatError and nothing else."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import pickle
import random
import sys
import tracemalloc
import types
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zbackup as z

QUICK = settings(max_examples=75, deadline=None)

digests = st.binary(min_size=z.DIGEST, max_size=z.DIGEST)
words = st.text(max_size=30)  # surrogates are not among them
paths = (
    st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=4)
    .map(b"/".join)
    .filter(lambda p: b"\0" not in p and not any(part in (b"", b".", b"..") for part in p.split(b"/")))
)
times = st.integers(-(1 << 62), 1 << 62)
counts = st.integers(0, 1 << 62)
ids = st.integers(0, (1 << 32) - 2)
inodes = st.integers(0, (1 << 64) - 1)
attributes = st.dictionaries(words, st.binary(max_size=20).map(lambda b: base64.b64encode(b).decode()), max_size=3)
others = st.fixed_dictionaries(
    {
        "path": paths,
        "kind": st.sampled_from([kind for kind in z.KIND_BITS if kind != "file"]),
        "mode": st.integers(0, 0o7777),
        "uid": ids,
        "gid": ids,
        "user": words,
        "group": words,
        "mtime": times,
        "target": st.binary(max_size=30).filter(lambda b: b"\0" not in b),
        "rdev": inodes,
        "links": st.integers(0, 5),
        "xattrs": attributes,
        "error": words,
    }
)
files = st.fixed_dictionaries(
    {
        "path": paths,
        "kind": st.just("file"),
        "mode": st.integers(0, 0o7777),
        "user": words,
        "size": counts,
        "mtime": times,
        "ctime": times,
        "inode": inodes,
        "device": inodes,
        "links": st.integers(1, 5),
        "sparse": st.booleans(),
        "database": st.booleans(),
        "wal": st.lists(counts, max_size=2).map(tuple),
        "fresh": st.booleans(),
        "error": words,
    }
)
stats = (others | files).map(lambda fields: z.Stat(**fields))
chunks = st.lists(digests | st.integers(1, z.LIST_SPAN), max_size=6).map(tuple)
contents = st.builds(
    z.Content,
    size=counts,
    chunks=chunks,
    lists=st.lists(digests, max_size=4).map(tuple),
    grade=st.sampled_from(z.GRADES),
    error=words,
    xattrs=attributes,
)
snapshots = st.builds(
    z.Snapshot,
    name=words,
    folder=words,
    sequence=counts,
    started=counts,
    finished=counts,
    grade=st.sampled_from(["frozen", "stable", "torn", "partial"]),
    cut_off=words,
    address=words,
    identity=words,
    host=words,
    roots=st.lists(words, max_size=3).map(tuple),
    blocks=st.lists(digests, max_size=3).map(tuple),
    totals=st.builds(z.Totals, **dict.fromkeys(vars(z.Totals()), counts)),
    problems=st.lists(st.builds(z.Problem, words, words), max_size=3).map(tuple),
)
known_nodes = st.builds(
    z.Known,
    folder=words,
    identity=words,
    name=words,
    addresses=st.lists(words, max_size=3).map(tuple),
    first_seen=counts,
    last_seen=counts,
)
runs = st.lists(st.builds(z.Run, digests, st.integers(0, z.CHUNK), st.integers(0, 1000)), max_size=8).map(tuple)

STAT = z.Stat(b"files/a", "file", 0o644, size=5, mtime=1, ctime=2, inode=3)
CONTENT = z.Content(5, (b"\1" * z.DIGEST, 3), (), "stable")
SNAPSHOT = z.Snapshot("2026-11-23T02-23-31Z", "here", 7, 1, 2, "frozen", problems=(z.Problem("a", "b"),))
KNOWN = z.Known("here", "0" * 32, "host", ("127.0.0.9",), 1, 2)
RUNS = (z.Run(b"a" * z.DIGEST, 0, 10), z.Run(b"b" * z.DIGEST, 4096, 20), z.Run(b"a" * z.DIGEST, 0, 30))


def change(data: bytes, **fields: Any) -> bytes:
    """Return a JSON object with other fields, in the same order."""
    return json.dumps({**json.loads(data), **fields}, separators=(",", ":")).encode("ascii")


# ---- paths ----


@QUICK
@given(paths)
def test_path_round_trip(path: bytes) -> None:
    assert z.decode_path(z.encode_path(path)) == path
    json.dumps(z.encode_path(path)).encode("ascii")


@pytest.mark.parametrize("path", [b"caf\xe9", b"caf\xc3\xa9", b"line\nbreak", b"a/ b/\xff\xfe", b"...", b"-", b"\\"])
def test_path_of_odd_names(path: bytes) -> None:
    assert z.decode_path(z.encode_path(path)) == path


@pytest.mark.parametrize("text", ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a\0b", "\ud800"])
def test_path_that_could_lead_out(text: str) -> None:
    with pytest.raises(z.FormatError):
        z.decode_path(text)


def test_path_limit() -> None:
    assert len(z.decode_path("a" * z.PATH_LIMIT)) == z.PATH_LIMIT
    with pytest.raises(z.FormatError, match="too long"):
        z.decode_path("a" * (z.PATH_LIMIT + 1))


def test_path_key_puts_content_behind_its_folder() -> None:
    assert sorted([b"a.b", b"a", b"a/c", b"a-"], key=z.path_key) == [b"a", b"a/c", b"a-", b"a.b"]


def test_show_escapes_what_a_terminal_would_obey() -> None:
    assert z.show(b"plain caf\xc3\xa9") == "plain café"
    assert z.show("a\x1b[31m\n") == "a\\x1b[31m\\n"
    assert z.show(b"\xff").isprintable()


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [(b"a/b", b"a", True), (b"a", b"a", True), (b"ab", b"a", False), (b"a", b"a/b", False), (b"a", b"", True)],
)
def test_is_at_or_below(path: bytes, folder: bytes, expected: bool) -> None:
    assert z.is_at_or_below(path, folder) is expected


# ---- fields ----


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"7", b"\xff", b'"a"', b"[" * 100000, b'{"a":' * 100000], ids=len)
def test_fields_of_no_object(data: bytes) -> None:
    with pytest.raises(z.FormatError):
        z.Fields(data, "it")


@pytest.mark.parametrize(
    "take",
    [
        lambda f: f.integer("text"),
        lambda f: f.integer("true"),
        lambda f: f.integer("absent"),
        lambda f: f.integer("five", high=4),
        lambda f: f.integer("five", low=6),
        lambda f: f.text("five"),
        lambda f: f.text("absent"),
        lambda f: f.text("text", limit=3),
        lambda f: f.flag("five"),
        lambda f: f.items("text", 5),
        lambda f: f.items("list", 1),
        lambda f: f.texts("list"),
        lambda f: f.texts("texts", length=1),
        lambda f: f.integers("texts", 5),
        lambda f: f.integers("list", 5, high=1),
        lambda f: f.path("up"),
        lambda f: f.digest("text"),
        lambda f: z.Fields.inside(f.values["list"], "the list"),
    ],
)
def test_fields_with_a_wrong_value(take: Callable[[z.Fields], object]) -> None:
    fields = z.Fields(
        '{"text":"abcd","true":true,"five":5,"list":[1,-2],"texts":["ab","c"],"up":"../a"}', "the message"
    )
    with pytest.raises(z.FormatError):
        take(fields)


def test_fields_of_memoryview() -> None:
    digest = hashlib.sha256(b"x").digest()
    data = json.dumps({"d": digest.hex(), "p": "a/b", "yes": True, "n": [-1, 2]}).encode()
    fields = z.Fields(memoryview(data), "it")
    assert fields.digest("d") == digest
    assert fields.path("p") == b"a/b"
    assert fields.flag("yes")
    assert not fields.flag("no")
    assert fields.integers("n", 2) == [-1, 2]


@pytest.mark.parametrize("value", ["", "00", "zz" * 32, "00" * 33, 5, None, b"0" * 64, ["00" * 32]])
def test_digest_that_is_none(value: object) -> None:
    with pytest.raises(z.FormatError):
        z.decode_digest(value)


# ---- digests ----


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 3 * 4096, 10000])
def test_digest_is_as_the_readme_says(length: int) -> None:
    data = hashlib.shake_128(b"seed").digest(length)
    joined = b""
    for start in range(0, length, 4096):
        joined += hashlib.sha256(data[start : start + 4096]).digest()[:16]
    assert z.hash_pages(data) == z.hash_pages(memoryview(data)) == joined
    assert z.digest_pages(joined) == hashlib.sha256(joined).digest()
    assert z.count_pages(length) * 16 == len(joined)


@QUICK
@given(st.binary(min_size=1, max_size=40), st.integers(1, z.PAGE))
def test_told(filling: bytes, end: int) -> None:
    data = b"".join(bytes([byte]) * z.PAGE for byte in filling)[: (len(filling) - 1) * z.PAGE + end]
    hashes = z.hash_pages(data)
    said = z.encode_told(data, hashes)
    assert len(said) == z.size_told(len(data))
    told = z.decode_told(z.digest_pages(hashes), len(data), said)
    assert told.count == len(filling) and sum(map(told.size, range(told.count))) == len(data)
    for page in range(told.count):
        content = data[page * z.PAGE : (page + 1) * z.PAGE]
        assert told.needle(page) == content[: z.NEEDLE]
        assert told.hash(page) == z.hash_pages(content)
    for wrong in (said[:-1], said + b"x", b"x" + said[1:] if said[:1] != b"x" else b"y" + said[1:]):
        with pytest.raises(z.FormatError):
            z.decode_told(z.digest_pages(hashes), len(data), wrong)


@QUICK
@given(st.sets(st.integers(0, 255)), st.integers(1, z.CHUNK))
def test_stretches(pages: set[int], length: int) -> None:
    stretches: list[tuple[int, int]] = []
    for page in sorted(pages):
        start, end = page * z.PAGE, min((page + 1) * z.PAGE, length)
        if stretches and stretches[-1][1] == start < end:
            stretches[-1] = (stretches[-1][0], end)
        elif start < end:
            stretches.append((start, end))
    fields = z.Fields(json.dumps({"need": z.encode_stretches(stretches)}), "a question")
    assert z.decode_stretches(fields, "need", length) == stretches


# ---- codecs ----

RANDOM = hashlib.shake_128(b"random").digest(200_000)
CODECS = [z.ZLIB, z.ZSTD]


@QUICK
@given(st.sampled_from([z.PLAIN, *CODECS]), st.binary(max_size=5000) | st.integers(0, 300_000).map(bytes))
def test_codec_round_trip(codec: int, data: bytes) -> None:
    used, packed = z.compress(codec, data, 1)
    assert used in (codec, z.PLAIN)
    assert len(packed) <= len(data)
    assert z.decompress(used, memoryview(packed), len(data)) == data


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("data", [RANDOM, RANDOM[:1000], b""], ids=len)
def test_codec_keeps_what_does_not_shrink(codec: int, data: bytes) -> None:
    assert z.compress(codec, data, 1) == (z.PLAIN, data)


@pytest.mark.parametrize("codec", CODECS)
def test_codec_tries_a_sample_first(codec: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = z._compress
    monkeypatch.setattr(z, "_compress", lambda c, data, level: tried.append(len(data)) or real(c, data, level))
    assert z.compress(codec, RANDOM, 1)[0] == z.PLAIN
    assert tried == [z.SAMPLE]


@pytest.mark.parametrize("length", [0, 1, z.PAGE - 1, z.PAGE, z.PAGE + 1, 30 * z.PAGE, 30 * z.PAGE + 5])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_page_hashes_of_pages_of_zeros(length: int, share: float) -> None:
    """They are not hashed one by one, nor are those that only begin with zeros taken for them."""
    chance = random.Random(length)
    pages = [bytes(z.PAGE) if chance.random() < share else chance.randbytes(z.PAGE) for _ in range(31)]
    pages[3] = bytes(z.PAGE - 1) + b"!"
    data = b"".join(pages)[:length]
    cut = [data[at : at + z.PAGE] for at in range(0, length, z.PAGE)]
    wanted = b"".join(hashlib.sha256(page).digest()[: z.PAGE_HASH] for page in cut)
    assert z.hash_pages(data) == z.hash_pages(memoryview(data)) == wanted


@pytest.mark.parametrize("first", [0, 1, 2])
def test_compress_finds_what_shrinks_behind_what_does_not(first: int) -> None:
    parts = [random.Random(number).randbytes(300_000) for number in range(3)]
    parts[first] = b"some words " * 27_000
    codec, packed = z.compress(z.ZLIB, b"".join(parts), 1)
    assert codec == z.ZLIB and len(packed) < 700_000


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [0, 1, 99_999, 100_001, 1 << 40])
def test_codec_with_another_size(codec: int, size: int) -> None:
    packed = z.compress(codec, bytes(100_000), 1)[1]
    with pytest.raises(z.FormatError):
        z.decompress(codec, packed, size)


@pytest.mark.parametrize("codec", CODECS)
def test_codec_stops_a_bomb(codec: int) -> None:
    bomb = z.compress(codec, bytes(64 << 20), 9)[1]
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(z.FormatError):
        z.decompress(codec, bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("codec", CODECS)
def test_codec_cut_off_or_with_garbage(codec: int) -> None:
    data = b"some words " * 100
    packed = z.compress(codec, data, 1)[1]
    for wrong in [packed[:end] for end in range(len(packed))] + [packed + b"x", packed + packed]:
        with pytest.raises(z.FormatError):
            z.decompress(codec, wrong, len(data))


@QUICK
@given(st.sampled_from([z.PLAIN, *CODECS, 3, 255]), st.binary(max_size=100), st.integers(0, 1000))
def test_codec_of_any_bytes(codec: int, data: bytes, size: int) -> None:
    with contextlib.suppress(z.FormatError):
        assert len(z.decompress(codec, data, size)) == size


def test_codec_unknown() -> None:
    with pytest.raises(z.FormatError, match="unknown codec 3"):
        z.decompress(3, b"", 0)


def test_codecs_without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert z.list_codecs() == ["zstd", "zlib", "plain"]
    packed = z.compress(z.ZSTD, bytes(1000), 1)[1]
    for name in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, name, None)
    z.load_zstd.cache_clear()
    try:
        assert z.list_codecs() == ["zlib", "plain"]
        with pytest.raises(z.CodecError, match="install backports.zstd"):
            z.decompress(z.ZSTD, packed, 1000)
    finally:
        z.load_zstd.cache_clear()


def test_codecs_of_a_python_that_has_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    compression = types.ModuleType("compression")
    compression.zstd = types.ModuleType("zstd")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compression", compression)
    z.load_zstd.cache_clear()
    try:
        assert z.load_zstd() is compression.zstd  # type: ignore[attr-defined]
    finally:
        z.load_zstd.cache_clear()


def test_codec_zlib_is_plain_zlib() -> None:
    assert z.decompress(z.ZLIB, zlib.compress(b"text"), 4) == b"text"


# ---- entries ----


@QUICK
@given(stats)
def test_stat_round_trip(stat: z.Stat) -> None:
    line = z.encode_stat(stat)
    line.decode("ascii")
    assert b"\n" not in line
    assert b"\t" not in line
    assert z.decode_stat(line) == stat


@QUICK
@given(stats, st.integers(0, 400), st.integers(0, 255))
def test_stat_has_one_form_only(stat: z.Stat, at: int, byte: int) -> None:
    line = bytearray(z.encode_stat(stat))
    line[at % len(line)] = byte
    with contextlib.suppress(z.FormatError):
        assert z.encode_stat(z.decode_stat(bytes(line))) == bytes(line)


@pytest.mark.parametrize(
    "line",
    [
        b" " + z.encode_stat(STAT),
        z.encode_stat(STAT) + b"\n",
        change(z.encode_stat(STAT), strange=1),
        change(z.encode_stat(STAT), links=1),
        change(z.encode_stat(STAT), kind="door"),
        change(z.encode_stat(STAT), path="../a"),
        change(z.encode_stat(STAT), mode=0o10000),
        change(z.encode_stat(STAT), mode=True),
        change(z.encode_stat(STAT), size=-1),
        change(z.encode_stat(STAT), mtime=1 << 64),
        change(z.encode_stat(STAT), inode=-1),
        change(z.encode_stat(STAT), wal=[1, 2, 3]),
        change(z.encode_stat(STAT), xattrs=[]),
        change(z.encode_stat(STAT), xattrs={"user.a": 5}),
        change(z.encode_stat(STAT), xattrs={}),
        change(z.encode_stat(STAT), target="a\0b"),
        change(z.encode_stat(STAT), target="\ud800"),
        change(z.encode_stat(STAT), path="\ud800"),
        change(z.encode_stat(STAT), path="\udcc3\udca9"),  # two escapes for one letter
        b'{"kind":"file","path":"a","mode":0,"uid":0,"gid":0,"user":"","group":"","mtime":0}',
    ],
)
def test_stat_not_in_its_form(line: bytes) -> None:
    with pytest.raises(z.FormatError):
        z.decode_stat(line)


@pytest.mark.parametrize("name", ["uid", "gid"])
def test_stat_with_an_owner_that_no_machine_has(name: str) -> None:
    with pytest.raises(z.FormatError):
        z.decode_stat(change(z.encode_stat(STAT), **{name: 1 << 32}))


def test_stat_says_what_must_not_change() -> None:
    database = STAT._replace(database=True, wal=(8, 9), links=2, device=4)
    assert database.state == [5, 1, 2, 3, 8, 9]
    assert database.link_key == (4, 3)
    assert STAT.link_key is None
    assert STAT._replace(kind="directory", links=2).link_key is None


@QUICK
@given(contents)
def test_content_round_trip(content: z.Content) -> None:
    assert z.decode_content(z.encode_content(content)) == content


def test_content_of_nothing_is_an_empty_object() -> None:
    assert z.encode_content(z.NOTHING) == b"{}"
    assert z.decode_content(b"{}") == z.NOTHING


@pytest.mark.parametrize(
    "fields",
    [
        {"grade": "perfect"},
        {"chunks": [0]},
        {"chunks": [z.LIST_SPAN + 1]},
        {"chunks": [True]},
        {"chunks": ["00"]},
        {"chunks": [1] * (z.LIST_SPAN + 1)},
        {"lists": [1]},
        {"lists": ["00"]},
        {"xattrs": 1},
        {"size": "5"},
    ],
)
def test_content_with_a_wrong_value(fields: dict[str, object]) -> None:
    with pytest.raises(z.FormatError):
        z.decode_content(json.dumps(fields).encode())


@QUICK
@given(stats, contents)
def test_entry_round_trip(stat: z.Stat, content: z.Content) -> None:
    entry = z.Entry.decode(z.Entry(z.encode_stat(stat), z.encode_content(content)).encode())
    assert (entry.stat, entry.content) == (stat, content)
    assert entry.key == z.path_key(stat.path)


PLAIN = z.Stat(b"a/file", "file", 0o644, 1, 2, "user", "group", 70, -5, 6, 7)
ONE_CHUNK = z.Content(70, (bytes(32),), (), "stable")


def make_entry(stat: z.Stat, content: z.Content) -> z.Entry:
    return z.Entry(z.encode_stat(stat), z.encode_content(content))


@QUICK
@given(paths, words, st.integers(1, z.CHUNK))
def test_entry_that_is_plain_says_what_it_says_decoded(path: bytes, name: str, size: int) -> None:
    entry = make_entry(PLAIN._replace(path=path, user=name), ONE_CHUNK._replace(size=size))
    assert entry.plain in (None, (path, size))


def test_entry_is_plain_where_nothing_is_rare() -> None:
    assert make_entry(PLAIN, ONE_CHUNK).plain == (b"a/file", 70)
    rare = dict(zip(z.RARE, (b"x", 1, 1, True, True, (1, 2), True, {"user.a": "YQ=="}, "unreadable")))
    strange = [{name: value} for name, value in rare.items()]
    strange += [{"links": 2}, {"kind": "fifo"}, {"path": b'"'}, {"path": b"\\"}, {"path": "ü".encode()}, {"user": '"'}]
    for fields in strange:
        assert make_entry(PLAIN._replace(**fields), ONE_CHUNK).plain is None, fields
    for fields in (
        {"chunks": ()},
        {"chunks": (1,)},
        {"chunks": (bytes(32), bytes(32))},
        {"error": "gone"},
        {"grade": ""},
    ):
        assert make_entry(PLAIN, ONE_CHUNK._replace(**fields)).plain is None, fields


def test_entry_that_is_plain_but_leads_elsewhere() -> None:
    line = z.encode_stat(PLAIN).replace(b"a/file", b"../file")
    with pytest.raises(z.FormatError, match="not plain"):
        print(z.Entry(line, z.encode_content(ONE_CHUNK)).plain)


def test_entry_goes_to_another_process_undecoded() -> None:
    entry = make_entry(PLAIN, ONE_CHUNK)
    assert entry.stat == PLAIN and entry.content == ONE_CHUNK
    again = pickle.loads(pickle.dumps(entry))
    assert again == entry and set(vars(again)) == {"line", "read"}


def test_entry_without_content() -> None:
    with pytest.raises(z.FormatError):
        z.Entry.decode(z.encode_stat(STAT) + b"\n")


# ---- packs ----


@st.composite
def records(draw: st.DrawFn) -> tuple[int, list[tuple[bytes, int]], bytes, tuple[int, int, bytes]]:
    kind = draw(st.sampled_from([z.FRAME, z.PATCHES]))
    rows = draw(st.lists(st.tuples(digests, st.integers(0, 20000)), max_size=5))
    raw = sum(length for _, length in rows)
    pages = sum(z.count_pages(length) for _, length in rows) if kind == z.FRAME else 0
    hashes = hashlib.shake_128(b"h").digest(pages * z.PAGE_HASH)
    return kind, rows, hashes, (draw(st.integers(0, 255)), raw, draw(st.binary(max_size=30)))


Encoded = tuple[int, "list[tuple[bytes, int]]", bytes, "tuple[int, int, bytes]"]


@QUICK
@given(records(), st.integers(0, 1 << 40))
def test_record_round_trip(encoded: Encoded, offset: int) -> None:
    kind, rows, hashes, (codec, raw, data) = encoded
    written = z.encode_record(*encoded)
    table = len(written) - z.RECORD.size - len(data)
    record = z.decode_record(written[:32], written[32 : 32 + table], offset)
    assert (record.kind, record.codec, record.raw, record.stored) == (kind, codec, raw, len(data))
    assert (record.offset, record.rows, record.hashes) == (offset, tuple(rows), hashes)
    assert written[record.data_offset - offset :] == data
    if kind == z.FRAME:
        assert b"".join(map(record.pages, range(len(rows)))) == hashes
    assert record.starts == [sum(length for _, length in rows[:i]) for i in range(len(rows) + 1)]


@QUICK
@given(records(), st.integers(0, 1000), st.integers(0, 255))
def test_record_with_a_changed_byte(encoded: Encoded, at: int, byte: int) -> None:
    written = bytearray(z.encode_record(*encoded))
    table = len(written) - z.RECORD.size - len(encoded[3][2])
    written[at % len(written)] = byte
    try:
        record = z.decode_record(bytes(written[:32]), bytes(written[32 : 32 + table]), 0)
    except z.FormatError:
        return
    assert record.starts[-1] == record.raw


@QUICK
@given(st.binary(max_size=40), st.binary(max_size=100))
def test_record_of_any_bytes(head: bytes, table: bytes) -> None:
    with pytest.raises(z.FormatError):
        z.decode_record(head, table, 0)


def test_record_that_does_not_add_up() -> None:
    head = z.RECORD.pack(z.RECORD_MAGIC, z.FRAME, 0, 0, 1, 36 + 16, 5, 5)
    row = z.TABLE_ROW.pack(bytes(32), 5)
    assert z.decode_record(head, row + bytes(16), 0).raw == 5
    for wrong in (row, row + bytes(17), z.TABLE_ROW.pack(bytes(32), 6) + bytes(16)):
        with pytest.raises(z.FormatError):
            z.decode_record(head, wrong, 0)


@pytest.mark.parametrize(
    "fields",
    [
        (b"ZREX", 1, 0, 0, 0, 0, 0, 0),
        (z.RECORD_MAGIC, 3, 0, 0, 0, 0, 0, 0),
        (z.RECORD_MAGIC, 1, 0, 1, 0, 0, 0, 0),
        (z.RECORD_MAGIC, 1, 0, 0, 0, z.RECORD_LIMIT + 1, 0, 0),
        (z.RECORD_MAGIC, 1, 0, 0, 0, 0, z.RECORD_LIMIT + 1, 0),
        (z.RECORD_MAGIC, 1, 0, 0, 0, 0, 0, z.RECORD_LIMIT + 1),
        (z.RECORD_MAGIC, 1, 0, 0, 2, 71, 0, 0),
    ],
)
def test_record_head_that_is_none(fields: tuple[Any, ...]) -> None:
    with pytest.raises(z.FormatError):
        z.decode_record_head(z.RECORD.pack(*fields), 0)


footers = st.lists(st.tuples(counts, st.sampled_from([1, 2]), st.lists(digests, max_size=4)), max_size=5)


@QUICK
@given(footers, st.integers(0, 1 << 40))
def test_footer_round_trip(rows: list[tuple[int, int, list[bytes]]], offset: int) -> None:
    written = z.encode_footer(rows, offset)
    start, proof, magic = z.TRAILER.unpack(written[-z.TRAILER.size :])
    assert (start, magic) == (offset, b"zbindex\n")
    assert list(z.decode_footer(written[: -z.TRAILER.size], proof)) == rows


@QUICK
@given(st.binary(max_size=100))
def test_footer_without_its_proof(footer: bytes) -> None:
    with pytest.raises(z.FormatError):
        list(z.decode_footer(footer, bytes(32)))


@pytest.mark.parametrize(
    "footer",
    [z.FOOTER_ROW.pack(8, 1, 2) + bytes(40), z.FOOTER_ROW.pack(8, 1, 0) + b"rest"],
    ids=["cut off", "longer than it says"],
)
def test_footer_that_is_proven_but_malformed(footer: bytes) -> None:
    with pytest.raises(z.FormatError):
        list(z.decode_footer(footer, hashlib.sha256(footer).digest()))


@QUICK
@given(runs)
def test_patch_round_trip(given_runs: tuple[z.Run, ...]) -> None:
    assert z.decode_patch(z.encode_patch(given_runs)) == given_runs


def test_patch_names_each_source_once() -> None:
    assert z.encode_patch(RUNS).count(b"a" * z.DIGEST) == 1


@QUICK
@given(st.binary(max_size=150))
@example(z.PATCH_HEAD.pack(1, 1) + bytes(32) + z.PATCH_RUN.pack(1, 0, 0))
def test_patch_of_any_bytes(data: bytes) -> None:
    try:
        decoded = z.decode_patch(data)
    except z.FormatError:
        return
    assert all(len(run.source) == z.DIGEST for run in decoded)


def test_patch_cut_off_or_longer() -> None:
    data = z.encode_patch(RUNS)
    for wrong in [data[:end] for end in range(len(data))] + [data + b"x", data + bytes(z.PATCH_RUN.size)]:
        with pytest.raises(z.FormatError):
            z.decode_patch(wrong)


def test_patch_larger_than_a_chunk() -> None:
    half = z.Run(bytes(32), 0, z.CHUNK // 2)
    assert len(z.decode_patch(z.encode_patch([half, half]))) == 2
    with pytest.raises(z.FormatError):
        z.decode_patch(z.encode_patch([half, half, replace(half, length=1)]))


def test_patch_without_its_sources() -> None:
    with pytest.raises(z.FormatError):
        z.decode_patch(z.PATCH_HEAD.pack(5, 0))


# ---- snapshots and nodes ----


@QUICK
@given(snapshots)
def test_snapshot_round_trip(snapshot: z.Snapshot) -> None:
    assert z.decode_snapshot(z.encode_snapshot(snapshot), snapshot.folder, snapshot.name) == snapshot


@QUICK
@given(known_nodes)
def test_known_round_trip(known: z.Known) -> None:
    assert z.decode_known(z.encode_known(known), known.folder) == known


@pytest.mark.parametrize(
    "fields",
    [
        {"format": z.FORMAT + 1},
        {"format": "1"},
        {"totals": []},
        {"totals": {"files": -1}},
        {"problems": [["a"]]},
        {"problems": ["ab"]},
        {"problems": [["a", "b"]] * (z.PROBLEMS_KEPT + 1)},
        {"blocks": ["00"]},
        {"blocks": [1]},
        {"sequence": None},
        {"grade": 1},
        {"roots": [1]},
    ],
)
def test_snapshot_with_a_wrong_value(fields: dict[str, object]) -> None:
    with pytest.raises(z.FormatError):
        z.decode_snapshot(change(z.encode_snapshot(SNAPSHOT), **fields), "here", "now")


def test_snapshot_of_an_unknown_grade() -> None:
    with pytest.raises(z.FormatError):
        z.decode_snapshot(change(z.encode_snapshot(SNAPSHOT), grade="perfect"), "here", "now")


def test_known_of_a_newer_format() -> None:
    with pytest.raises(z.FormatError):
        z.decode_known(change(z.encode_known(KNOWN), format=z.FORMAT + 1), "here")


def test_snapshot_cut_off_for_a_long_reason() -> None:
    # As NodeError(show(message)) makes of the 4000 characters that a node may send, if many are escaped.
    long = replace(SNAPSHOT, cut_off=z.show("\n" * 4000))
    assert z.decode_snapshot(z.encode_snapshot(long), long.folder, long.name).cut_off.startswith("\\n")


def test_snapshot_is_good_only_when_all_is_copied() -> None:
    good = [replace(SNAPSHOT, grade=grade).good for grade in ("frozen", "stable", "torn", "partial")]
    assert good == [True, True, False, False]


@pytest.mark.parametrize(
    ("grades", "worst"),
    [
        ([], "stable"),
        (["", ""], "stable"),
        (["frozen", ""], "frozen"),
        (["frozen", "stable"], "stable"),
        (["stable", "torn", "frozen"], "torn"),
        (["torn", "partial"], "partial"),
    ],
)
def test_worst_grade(grades: list[str], worst: str) -> None:
    assert z.worst_grade(grades) == worst


NAMES = ["stat", "content", "snapshot", "known", "patch", "progress"]
DECODERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (z.decode_stat, z.encode_stat(STAT)),
    (z.decode_content, z.encode_content(CONTENT)),
    (lambda data: z.decode_snapshot(data, "here", "now"), z.encode_snapshot(SNAPSHOT)),
    (lambda data: z.decode_known(data, "here"), z.encode_known(KNOWN)),
    (z.decode_patch, z.encode_patch(RUNS)),
    (z.decode_progress, z.encode_progress(z.Progress((bytes(32),), (b"a\tb\n",), z.Entry(b"c", b"d")))),
]


@pytest.mark.parametrize(("decode", "good"), DECODERS, ids=NAMES)
@QUICK
@given(data=st.data())
def test_decoder_of_changed_bytes(decode: Callable[[bytes], object], good: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 4)))
    wrong = good[:start] + data.draw(st.binary(max_size=6)) + good[end:]
    try:
        decode(wrong)
    except z.FormatError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(("decode", "good"), DECODERS, ids=NAMES)
@QUICK
@given(data=st.data())
def test_decoder_of_changed_values(decode: Callable[[bytes], object], good: bytes, data: st.DataObject) -> None:
    if not good.startswith(b"{"):
        return
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
    value = data.draw(st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3)))
    name = data.draw(st.sampled_from(sorted({*json.loads(good), "xattrs", "target", "wal", "lists"})))
    with contextlib.suppress(z.FormatError):
        decode(change(good, **{name: value}))


@pytest.mark.parametrize(("decode", "good"), DECODERS, ids=NAMES)
@QUICK
@given(wrong=st.binary(max_size=100))
@example(wrong=b"[" * 100_000)
@example(wrong=b'{"problems":' + b"[" * 100_000)
@example(wrong=b'{"format":1' + b"0" * 10_000 + b"}")
def test_decoder_of_any_bytes(decode: Callable[[bytes], object], good: bytes, wrong: bytes) -> None:
    if wrong != good:
        with contextlib.suppress(z.FormatError):
            decode(wrong)


# ---- addresses ----


@pytest.mark.parametrize(
    ("host", "port", "text", "endpoint"),
    [
        ("10.0.0.1", z.PORT, "10.0.0.1", f"tcp://10.0.0.1:{z.PORT}"),
        ("10.0.0.1", 7, "10.0.0.1:7", "tcp://10.0.0.1:7"),
        ("fe80::1", z.PORT, "fe80::1", f"tcp://[fe80::1]:{z.PORT}"),
        ("fe80::1", 7, "[fe80::1]:7", "tcp://[fe80::1]:7"),
    ],
)
def test_address_as_text(host: str, port: int, text: str, endpoint: str) -> None:
    assert str(z.Address(host, port)) == text
    assert z.Address(host, port).endpoint == endpoint


@pytest.mark.parametrize(
    "host", ["packs", "PACKS", "lock", "zbackup.json", "README.txt", "index.sqlite", ".", "..", "-x"]
)
def test_folder_name_of_a_host_that_is_taken(host: str) -> None:
    assert z.name_folder(host) == f"node-{host}"


@QUICK
@given(st.text(min_size=1, max_size=20))
def test_folder_name_of_any_host(host: str) -> None:
    name = z.name_folder(host)
    assert z.decode_path(name) == name.encode("ascii")
    assert "/" not in name
    assert not name.startswith(".")
    assert name.lower() not in z.RESERVED


# ---- errors ----


def test_explain_drops_number_and_path() -> None:
    assert z.explain(OSError(28, "No space left on device", "/a")) == "No space left on device"
    assert z.explain(OSError("words")) == "words"
    assert z.explain(OSError()) == "OSError"


def test_errors_carry_their_exit_code() -> None:
    classes = [z.UsageError, z.FormatError, z.StoreError, z.MissingChunk, z.RestoreError, z.Interrupted]
    assert [made("a sentence").exit_code for made in classes] == [2, 1, 4, 4, 1, 130]
    error = z.ProtocolError("a sentence", "refused")
    assert (error.exit_code, error.code, str(error)) == (1, "refused", "a sentence")
    assert z.NodeError("a sentence").code == "failed"


def test_explain_fault_names_where_it_was() -> None:
    try:
        z.show(None)  # type: ignore[arg-type]
    except AttributeError as error:
        raised = error
    number = int(z.explain_fault(raised).partition("at line ")[2].partition(":")[0])
    assert ".isprintable()" in Path(z.__file__).read_text().splitlines()[number - 1]
    assert "at line 0" in z.explain_fault(ValueError("never raised"))


def test_patch_that_says_it_has_millions_of_runs() -> None:
    """Refused before one of them is made."""
    many = z.PATCH_HEAD.pack(1, 6_000_000) + bytes(32) + bytes(6_000_000 * z.PATCH_RUN.size)
    tracemalloc.start()
    with pytest.raises(z.FormatError, match="longer or shorter"):
        z.decode_patch(many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < z.CHUNK


def test_grade_that_is_none_counts_for_nothing() -> None:
    assert z.worst_grade(["stable", "R2l2ZW4=", ""]) == "stable"
