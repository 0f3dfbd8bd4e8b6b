"""From records to text and JSON."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zbackup

NOON = 1_700_000_000 * 10**9


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def make_snapshot(**fields: Any) -> zbackup.Snapshot:
    known = {"name": "2023-11-14T22-13-20Z", "folder": "127.0.0.9", "sequence": 1, "grade": "stable"}
    return zbackup.Snapshot(**{**known, "started": NOON, "finished": NOON + 1_500_000_000, **fields})


def make_node(**fields: Any) -> zbackup.NodeReport:
    return zbackup.NodeReport(**{"address": "127.0.0.9", "state": zbackup.NODE, "folder": "127.0.0.9", **fields})


# ---- figures ----


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_size_as_people_read_it(size: int, text: str) -> None:
    assert zbackup.format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_size_is_near(size: int) -> None:
    number, unit = zbackup.format_size(size).split()
    power = ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    assert abs(float(number) * 1024**power - size) <= 0.051 * 1024**power


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (119.9, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172799, "47 h"),
        (172800, "2 d"),
        (1e9, "11574 d"),
    ],
)
def test_span_as_people_read_it(seconds: float, text: str) -> None:
    assert zbackup.format_span(seconds) == text


def test_time_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zbackup.format_time(NOON + 999) == "2023-11-14 22:13:20"
    monkeypatch.setenv("TZ", "CET-1CEST")
    time.tzset()
    assert zbackup.format_time(NOON) == "2023-11-14 23:13:20"


@pytest.mark.parametrize("moment", [0, -1, -(1 << 63), 1 << 63])
def test_time_of_any_file(moment: int) -> None:
    assert len(zbackup.format_time(moment)) == 19


def test_time_is_cut_not_rounded() -> None:
    assert zbackup.format_time(NOON + 999_999_999) == "2023-11-14 22:13:20"
    assert zbackup.name_time(NOON + 999_999_999) == "2023-11-14T22-13-20Z"


# ---- tables ----


def test_table_aligned() -> None:
    assert zbackup.format_table([["A", "LONG", "C"], ["aaa", "b", ""], ["a", "b", "c"]]) == [
        "A    LONG  C",
        "aaa  b",
        "a    b     c",
    ]


def test_table_empty() -> None:
    assert zbackup.format_table([]) == []


@given(st.lists(st.tuples(*[st.text("abc", max_size=5)] * 3), min_size=1, max_size=5))
def test_table_cells_stand_in_columns(rows: list[tuple[str, str, str]]) -> None:
    lines = zbackup.format_table(rows)
    start = max(len(row[0]) for row in rows) + 2
    assert all(line.ljust(start)[:start].rstrip() == row[0] for line, row in zip(lines, rows))
    assert all(line[start:].startswith(row[1]) for line, row in zip(lines, rows))


# ---- what a pull did ----


def test_totals_name_only_what_happened() -> None:
    some = zbackup.Totals(files=3, size=2048, changed=2, sent=100, added=50)
    assert zbackup.format_totals(some) == "3 files (2.0 KiB), 2 changed; sent 100 B, stored 50 B"
    more = zbackup.replace(some, deleted=1, failed=2, torn=3)
    assert zbackup.format_totals(more).startswith("3 files (2.0 KiB), 2 changed, 1 deleted, 2 failed, 3 torn;")


def test_node_copied() -> None:
    line = "127.0.0.9: stable, 0 files (0 B), 0 changed; sent 0 B, stored 0 B in 1.5 s"
    assert zbackup.format_node(make_node(snapshot=make_snapshot())) == [line]


def test_node_with_several_addresses() -> None:
    node = make_node(addresses=("127.0.0.9", "10.0.0.9", "::1"), error="broke")
    assert zbackup.format_node(node) == ["127.0.0.9 (also at 10.0.0.9, ::1): broke"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"addresses": ("127.0.0.9",)}, "127.0.0.9: does not answer"),
        ({"addresses": ("127.0.0.9", "::1")}, "127.0.0.9 (also at ::1): does not answer"),
        ({"addresses": ("127.0.0.9",), "folder": "laptop"}, "laptop: 127.0.0.9: does not answer"),
        ({"addresses": ("127.0.0.9",), "error": "has another key\x1b"}, r"127.0.0.9: has another key\x1b"),
    ],
)
def test_node_missing(fields: dict[str, Any], line: str) -> None:
    node = make_node(state=zbackup.SILENT, missing=3 * 86400 * 10**9, **fields)
    assert zbackup.format_node(node) == [f"{line}; last seen 3 d ago"]


def test_node_failed() -> None:
    assert zbackup.format_node(make_node(error="went\x1b[2J away")) == [r"127.0.0.9: went\x1b[2J away"]
    assert zbackup.format_node(make_node(state=zbackup.REFUSES)) == ["127.0.0.9: refuses"]


def test_node_cut_off() -> None:
    lines = zbackup.format_node(make_node(snapshot=make_snapshot(grade="partial"), error="lost\n"))
    assert lines[0].endswith(r"in 1.5 s; cut off: lost\n") and len(lines) == 1


def test_node_problems() -> None:
    snapshot = make_snapshot(problems=(zbackup.Problem("a", "broke"), zbackup.Problem("", "a word")))
    lines = zbackup.format_node(make_node(snapshot=snapshot, problems=(zbackup.Problem("latest", "stuck"),)))
    assert lines[1:] == ["  a: broke", "  a word", "  latest: stuck"]


@pytest.mark.parametrize(("count", "shown"), [(20, 20), (21, 21), (100, 21)])
def test_node_with_many_problems(count: int, shown: int) -> None:
    problems = tuple(zbackup.Problem(f"p{i}", "broke") for i in range(count))
    lines = zbackup.format_node(make_node(snapshot=make_snapshot(problems=problems)))
    assert len(lines) == 1 + shown
    if count > 20:
        assert lines[-1] == f"  and {count - 20} more; all stand in 127.0.0.9/snapshots/2023-11-14T22-13-20Z.json"


# ---- what a sweep did ----


def make_sweep(*nodes: zbackup.NodeReport, **fields: Any) -> zbackup.SweepReport:
    return zbackup.SweepReport(NOON, NOON + 2 * 10**9, nodes, **fields)


def make_silent(count: int) -> list[zbackup.NodeReport]:
    return [make_node(address=f"10.0.0.{i}", state=zbackup.SILENT, folder="") for i in range(count)]


def test_sweep_verdict() -> None:
    good = make_node(snapshot=make_snapshot())
    bad = make_node(snapshot=make_snapshot(grade="torn"), exit_code=1)
    failed = make_node(error="broke", exit_code=1)
    lines = zbackup.format_sweep(make_sweep(good, good, bad, failed, *make_silent(7)))
    assert lines == ["sweep of 2023-11-14 22:13:20: 2 of 3 copies good, 2 with problems, 7 silent, 2.0 s"]


def test_sweep_without_copies() -> None:
    lines = zbackup.format_sweep(make_sweep(*make_silent(1), problems=("pack x is damaged",)))
    assert lines == ["the store: pack x is damaged", "sweep of 2023-11-14 22:13:20: no copy made, 1 silent, 2.0 s"]


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (10, 10), (11, 11), (50, 11)])
def test_sweep_with_strangers(count: int, lines: int) -> None:
    strange = {"state": zbackup.STRANGER, "error": "\x1b"}
    strangers = [make_node(address=f"10.0.0.{i}", folder="", **strange) for i in range(count)]
    said = zbackup.format_sweep(make_sweep(make_node(**strange), *strangers))  # a known node is told of apart
    assert said[0] == r"alive, but no node: 10.0.0.0 (\x1b)"
    assert len(said) == lines + 1
    assert count <= 10 or said[-2] == f"alive, but no node: {count - 10} more"


def test_sweep_exit_code_is_the_worst() -> None:
    good, code = make_node(snapshot=make_snapshot()), zbackup.replace
    for codes, worst in (((), 0), ((1,), 1), ((3,), 3), ((1, 3), 1), ((1, 4), 4), ((4, 130), 130)):
        nodes = [code(good, exit_code=one) for one in codes]
        assert make_sweep(good, *nodes).exit_code == worst
    assert make_sweep(*make_silent(3)).exit_code == 5
    assert make_sweep(good, problems=("damage",)).exit_code == 4


# ---- JSON ----


def test_json_of_sweep_keeps_all() -> None:
    problems = (zbackup.Problem("a", "broke"),)
    snapshot = make_snapshot(roots=("files",), problems=problems, totals=zbackup.Totals(files=5), blocks=(b"x" * 32,))
    node = make_node(addresses=("127.0.0.9",), snapshot=snapshot, problems=problems, exit_code=1)
    missing = make_node(state=zbackup.SILENT, missing=90 * 10**9, error="no\udcff")
    told = json.loads(json.dumps(zbackup.describe_sweep(make_sweep(node, missing, problems=("p",)))))
    assert (told["started"], told["finished"], told["exit_code"], told["problems"]) == (
        NOON,
        NOON + 2 * 10**9,
        4,
        ["p"],
    )
    wanted = {
        "address": "127.0.0.9",
        "addresses": ["127.0.0.9"],
        "state": "node",
        "folder": "127.0.0.9",
        "error": "",
        "exit_code": 1,
        "missing_seconds": 0,
        "snapshot": zbackup.describe_snapshot(snapshot),
        "problems": [{"path": "a", "message": "broke"}],
    }
    assert {name: told["nodes"][0][name] for name in wanted} == wanted
    assert told["nodes"][1]["missing_seconds"] == 90 and told["nodes"][1]["snapshot"] is None
    told = told["nodes"][0]["snapshot"]
    assert (told["files"], told["grade"], told["roots"]) == (5, "stable", ["files"]) and "blocks" not in told


# ---- entries ----


@pytest.mark.parametrize(
    ("kind", "mode", "text"),
    [
        ("file", 0o644, "-rw-r--r--"),
        ("file", 0o4755, "-rwsr-xr-x"),
        ("file", 0, "----------"),
        ("directory", 0o1777, "drwxrwxrwt"),
        ("symlink", 0o777, "lrwxrwxrwx"),
        ("fifo", 0o600, "prw-------"),
        ("socket", 0o755, "srwxr-xr-x"),
        ("block", 0o660, "brw-rw----"),
        ("character", 0o666, "crw-rw-rw-"),
    ],
)
def test_mode_as_ls_shows_it(kind: str, mode: int, text: str) -> None:
    assert zbackup.format_mode(zbackup.Stat(b"x", kind, mode)) == text


def make_entry(content: zbackup.Content = zbackup.NOTHING, **fields: Any) -> zbackup.Entry:
    stat = zbackup.Stat(**{"path": b"x", "kind": "file", "mode": 0o600, "mtime": NOON, **fields})
    return zbackup.Entry(zbackup.encode_stat(stat), zbackup.encode_content(content))


def list_cells(entry: zbackup.Entry) -> list[str]:
    """Return the cells of an entry's line."""
    return list(zbackup.format_entry(entry).values())


def test_entry_of_file() -> None:
    entry = make_entry(zbackup.Content(5, (1,), (), "frozen"), user="ann", group="staff")
    assert list_cells(entry) == ["-rw-------", "ann:staff", "5", "2023-11-14 22:13:20", "frozen", "x"]


def test_entry_of_others() -> None:
    assert list_cells(make_entry(kind="directory", uid=7, gid=8))[1:3] == ["7:8", "-"]
    assert list_cells(make_entry(kind="symlink", target=b"a\nb"))[4:] == ["-", r"x -> a\nb"]


def test_entry_that_was_not_read() -> None:
    assert list_cells(make_entry(zbackup.Content(error="denied")))[-1] == "x (denied)"
    assert list_cells(make_entry(error="no\x07"))[-1] == r"x (no\x07)"


@given(st.binary(min_size=1, max_size=20).filter(lambda path: b"\0" not in path), st.text(max_size=10))
def test_entry_never_controls_a_terminal(path: bytes, name: str) -> None:
    entry = zbackup.Entry(b"", b"")
    stat = zbackup.Stat(path, "symlink", user=name, group=name, target=path, error=name, mtime=NOON)
    entry.__dict__.update(stat=stat, content=zbackup.Content(error=name))
    assert all(cell.isprintable() for cell in list_cells(entry))
