"""The command line: flags, words, exit codes, signals."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import AT_ONCE, FOLDER, PROGRAM, Process, World, path_before, uncovered, wait_until
from hypothesis import given
from hypothesis import strategies as st
from test_restore import NOON, describe, make_snapshot

import zbackup

COMMANDS = ["server", "node", "list", "restore", "cat", "demo", "key", "nodes", "trust", "forget", "unit"]


# ---- how flags are read ----


def refuses(parse: Callable[[str], object], text: str) -> bool:
    """Tell whether a parser refuses a text with a sentence that names it."""
    try:
        parse(text)
    except argparse.ArgumentTypeError as error:
        return repr(text) in str(error)
    return False


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("90s", 90),
        ("200ms", 0.2),
        ("2m", 120),
        ("2min", 120),
        ("1h30m", 5400),
        ("1 h 30 m", 5400),
        ("1.5h", 5400),
        ("2d", 172800),
        ("1w", 604800),
        ("1d1s", 86401),
    ],
)
def test_span_read(text: str, seconds: float) -> None:
    assert zbackup.parse_span(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "s", "-1s", "1y", "1h30", "h1", "1,5s", "1.s", "one", "1e3", "nan", "inf"])
def test_span_refused(text: str) -> None:
    assert refuses(zbackup.parse_span, text)


@given(st.integers(0, 10**6) | st.integers(0, 999_999).map(lambda seconds: 1000 * seconds))
def test_span_written_is_read_again(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert zbackup.parse_span(zbackup.write_span(seconds)) == pytest.approx(seconds, rel=1e-4)


def test_span_written_beyond_a_million_seconds() -> None:
    assert zbackup.parse_span(zbackup.write_span(1_000_001)) == 1_000_001


@pytest.mark.parametrize("text", ["9999999w", "9" * 400, "9" * 400 + "d"])
def test_span_of_ages_is_cut(text: str) -> None:
    """What no timer and no clock could take."""
    assert zbackup.parse_span(text) == 1e9


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("1k", 1024), ("1K", 1024), ("2KiB", 2048), ("64MiB", 64 << 20), ("64M", 64 << 20)]
    + [("1 GB", 1 << 30), ("1t", 1 << 40), ("5b", 5)],
)
def test_size_read(text: str, size: int) -> None:
    assert zbackup.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5M", "M", "1X", "1MM", "1 M iB x", "0x10"])
def test_size_refused(text: str) -> None:
    assert refuses(zbackup.parse_size, text)


@given(st.integers(0, 1 << 40))
def test_size_written_is_read_again(size: int) -> None:
    assert zbackup.parse_size(zbackup.write_size(size)) == size


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("9", [9]),
        ("9-12", [9, 10, 11, 12]),
        ("9,12,20-22", [9, 12, 20, 21, 22]),
        (" 9 - 10 , 10 ", [9, 10]),
        ("255", [255]),
        ("0-1", [0, 1]),
        ("12,9,9-10", [12, 9, 10]),
    ],
)
def test_range_read(text: str, numbers: list[int]) -> None:
    assert zbackup.parse_range(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "9,", "12-9", "256", "0-256", "9-", "-9", "a", "9-10-11", "1000", "9;10"])
def test_range_refused(text: str) -> None:
    assert refuses(zbackup.parse_range, text)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)).map(sorted), min_size=1, max_size=5))
def test_range_is_the_union_of_its_parts(parts: list[list[int]]) -> None:
    numbers = zbackup.parse_range(",".join(f"{low}-{high}" for low, high in parts))
    assert sorted(numbers) == sorted({n for low, high in parts for n in range(low, high + 1)})


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("nas", "nas", None),
        ("nas:4546", "nas", 4546),
        ("10.0.0.9:1", "10.0.0.9", 1),
        ("::1", "::1", None),
        ("[::1]", "::1", None),
        ("[::1]:4546", "::1", 4546),
        ("fe80::1%eth0", "fe80::1%eth0", None),
        ("[fe80::1%eth0]:5", "fe80::1%eth0", 5),
    ],
)
def test_host_read(text: str, host: str, port: int | None) -> None:
    assert zbackup.parse_host(text) == (host, port)


@pytest.mark.parametrize("text", ["", "a b", "[::1", "[nas]:5:6", "nas:port", "a:b:c:z", "[]:5"])
def test_host_refused(text: str) -> None:
    assert refuses(zbackup.parse_host, text)


@pytest.mark.parametrize("text", ["nas:0", "nas:65536", "nas:999999"])
def test_host_with_wrong_port_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a port from 1 to 65535"):
        zbackup.parse_host(text)


def test_port_count_and_level_read() -> None:
    assert (zbackup.parse_port("1"), zbackup.parse_port("65535")) == (1, 65535)
    assert (zbackup.parse_count("1"), zbackup.parse_count("999999999")) == (1, 999999999)
    assert (zbackup.parse_level("1"), zbackup.parse_level("19")) == (1, 19)


@pytest.mark.parametrize("text", ["0", "-1", "", "a", "1.5", "²", "10000000000"])
def test_port_count_and_level_refused(text: str) -> None:
    assert refuses(zbackup.parse_port, text)
    assert refuses(zbackup.parse_count, text)
    assert refuses(zbackup.parse_level, text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("latest", ("", 1 << 63)),
        ("2023-11-14T22-13-20Z", ("2023-11-14T22-13-20Z", 0)),
        ("2023-11-14T22-13-20Z-2", ("2023-11-14T22-13-20Z-2", 0)),
        ("2023-11-14", ("", 1_700_006_400 * 10**9 - 1)),
        ("2023-11-14 22:13", ("", 1_700_000_040 * 10**9 - 1)),
        ("2023-11-14T22:13:20", ("", 1_700_000_001 * 10**9 - 1)),
        ("3d", ("", NOON - 3 * 86400 * 10**9)),
        ("1h30m ago", ("", NOON - 5400 * 10**9)),
    ],
)
def test_when_read(monkeypatch: pytest.MonkeyPatch, text: str, found: tuple[str, int]) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert zbackup.parse_when(text, NOON) == found


# ---- networks ----


@pytest.mark.parametrize(
    ("network", "numbers", "first", "last", "count"),
    [
        ("127.0.0", [9, 12], "127.0.0.9", "127.0.0.12", 2),
        ("192.168.1", None, "192.168.1.1", "192.168.1.254", 254),
        ("192.168.1.0/24", None, "192.168.1.1", "192.168.1.254", 254),
        ("192.168.1.77/24", [0, 255], "192.168.1.0", "192.168.1.255", 2),
        ("192.168.1.128/25", [129], "192.168.1.129", "192.168.1.129", 1),
        ("192.168.1.4/31", None, "192.168.1.4", "192.168.1.5", 2),
        ("192.168.1.4/32", None, "192.168.1.4", "192.168.1.4", 1),
        ("10.1.0.0/16", None, "10.1.0.1", "10.1.255.254", 65534),
    ],
)
def test_network_expanded(network: str, numbers: list[int] | None, first: str, last: str, count: int) -> None:
    found = zbackup.expand_network(network, numbers)
    assert (found[0], found[-1], len(found)) == (first, last, count)


@pytest.mark.parametrize(
    ("network", "numbers", "words"),
    [
        ("lan", None, "is no network"),
        ("", None, "is no network"),
        ("300.0.0", None, "is no network"),
        ("127.0.0.0/33", None, "is no network"),
        ("10.0.0.0/8", None, "up to /16"),
        ("0.0.0.0/0", None, "up to /16"),
        ("127.0.0.9", None, "write an IPv4 network"),
        ("fe80::/64", None, "--host for IPv6"),
        ("10.1.0.0/16", [9], "--range goes with a network of up to 256 addresses"),
        ("192.168.1.128/25", [9], "192.168.1.9 is not in the network"),
    ],
)
def test_network_refused(network: str, numbers: list[int] | None, words: str) -> None:
    with pytest.raises(zbackup.UsageError, match=re.escape(words)):
        zbackup.expand_network(network, numbers)


@given(st.integers(0, 255), st.integers(24, 32))
def test_network_has_what_its_mask_says(number: int, prefix: int) -> None:
    found = zbackup.expand_network(f"10.1.2.{number}/{prefix}", None)
    size = 1 << (32 - prefix)
    assert len(found) == len(set(found)) == (size - 2 if size > 2 else size)


# ---- wrong usage ----

WRONG = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["backup"], "invalid choice: 'backup'"),
    "unknown flag": (["server", "--fast"], "unrecognized arguments: --fast"),
    "no addresses": (["server", "--once"], "which machines? Name them: --range"),
    "unknown network": (["server", "--network", "lan"], "--network lan is no network"),
    "network /8": (["server", "--network", "10.0.0.0/8"], "write an IPv4 network up to /16"),
    "empty range": (["server", "--range", ""], "'' is not a range from 0 to 255"),
    "range beyond 255": (["server", "--range", "250-256"], "'250-256' is not a range"),
    "range outside of network": (["server", "--network", "10.0.0.0/25", "--range", "200"], "10.0.0.200 is not in"),
    "bad port": (["server", "--range", "9", "--port", "0"], "'0' is not a port"),
    "bad port of host": (["server", "--host", "nas:70000"], "'70000' is not a port"),
    "bad span": (["server", "--range", "9", "--every", "often"], "'often' is not a span of time"),
    "bad size": (["server", "--range", "9", "--window", "big"], "'big' is not a size"),
    "bad level": (["node", "--level", "99"], "'99' is not a level from 1 to 19"),
    "bad processes": (
        ["restore", FOLDER, "--to", "x", "--jobs", "65"],
        "'65' is not a number of processes from 1 to 64",
    ),
    "when of no node": (["list", "--at", "latest"], "--at is for the files of a NODE"),
    "when of the trash": (["list", "NODE", "--trash", "--at", "latest"], "--at is for the files of a NODE"),
    "bad exclude": (["node", "--exclude", "[z-a]"], "--exclude [z-a]: bad character range z-a"),
    "node with port name": (["node", "--port", "http"], "'http' is not a port"),
    "log file": (["server", "--range", "9", "--log-file", "no/such/folder/log"], "--log-file no/such/folder/log: No"),
    "log file of node": (["node", "--log-file", "."], "--log-file .: Is a directory"),
    "no flags file": (["server", "@missing"], "No such file or directory: 'missing'"),
    "no --to": (["restore", FOLDER], "the following arguments are required: --to"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_usage(world: World, what: str) -> None:
    arguments, words = WRONG[what]
    port = ["--port", str(world.port)] if arguments[:1] == ["node"] and "--port" not in arguments else []
    done = world.run(*arguments, *port, code=2, stdin=subprocess.DEVNULL)
    assert done.stdout == ""
    said = done.stderr.splitlines()[-1]
    assert said.startswith("zbackup") and words in said
    assert not world.store.exists()


def test_two_files_with_one_name(world: World) -> None:
    """An absolute path is stored without its slash: a relative one may be the same."""
    absolute = world.path / "twice"
    relative = str(absolute).lstrip("/")
    (world.path / relative).parent.mkdir(parents=True)
    (world.path / relative).touch()
    absolute.touch()
    files = ["--file", str(absolute), "--file", relative]
    done = world.run("node", *files, "--port", str(world.port), code=2)
    assert done.stderr == f"zbackup: --file {relative}: another file has the name {relative} already\n"


TRACEBACKS = {
    "quote in @FILE": (["server", "@quote"], "ValueError of shlex: No closing quotation"),
    "@FILE not UTF-8": (["server", "@latin"], "UnicodeDecodeError"),
    "host with empty label": (["server", "--once", "--host", "a..b"], "UnicodeError of getaddrinfo"),
    "host too long": (["server", "--once", "--host", "x" * 70], "UnicodeError of getaddrinfo"),
    "--heartbeat 30d": (["server", "--once", "--range", "9", "--heartbeat", "30d"], "OverflowError of setsockopt"),
    "--timeout 30d": (["server", "--once", "--range", "9", "--timeout", "30d"], "OverflowError of setsockopt"),
}


@pytest.mark.parametrize("what", TRACEBACKS)
def test_odd_usage_ends_in_sentence(world: World, what: str) -> None:
    (world.path / "quote").write_text("--host nas's\n")
    (world.path / "latin").write_bytes(b"--host caf\xe9\n")
    world.run(*TRACEBACKS[what][0], code=None)


def test_empty_file_flag_serves_nothing(world: World) -> None:
    node = world.node("--file", "", wait=False)
    wait_until(lambda: "serving" in node.output or node.process.poll() is not None)
    assert node.process.poll() == 2, node.output


@pytest.mark.parametrize("host", ["999.1.1.1", "::1::2"])
def test_host_that_is_no_address(world: World, host: str) -> None:
    done = world.run(*world.server_flags("--host", host, "--timeout", "100ms"), code=None)
    assert host in done.stderr


# ---- help ----


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_each_flag(world: World, command: str) -> None:
    text = world.run(command, "--help").stdout
    parser = next(a for a in zbackup.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = [flag for action in parser.choices[command]._actions for flag in action.option_strings]
    assert len(flags) > 3 or command == "unit"
    for flag in flags:
        assert re.search(rf"(^|[ ,]){re.escape(flag)}\b", text), flag
    assert all(action.help for action in parser.choices[command]._actions)


def test_help_names_each_command_and_exit_code(world: World) -> None:
    text = world.run("--help").stdout
    assert all(re.search(rf"^    {command} +\S", text, re.M) for command in COMMANDS)
    for code in ("0", "1", "2", "3", "4", "5", "130"):
        assert re.search(rf"\b{code}\b", text.partition("exit codes")[2]), code


def test_version(world: World) -> None:
    assert world.run("--version").stdout == f"zbackup {zbackup.VERSION}\n"


def test_flags_from_file(world: World) -> None:
    """Comments, quotes and several flags in a line; what comes later wins."""
    world.node()
    (world.files / "a").write_text("a")
    (world.path / "my flags").write_text(
        f"# don't mind this\n\n--range 9 --store 'my backups'  # nor \"this\n--port {world.port}\n--port 1\n--quiet\n"
    )
    done = world.run("server", "--once", "@my flags", "--port", str(world.port))
    assert (done.stdout, done.stderr) == ("", "")
    assert (world.path / "my backups/zbackup.json").exists() and not world.store.exists()


# ---- list ----


@pytest.fixture
def history(world: World) -> World:
    """A store with two snapshots of a file that changed, one that did not, and one with a hostile name."""
    evil = describe("d/evil\x1b]0;x\x07\n", user="\x1b[31m", group="g")
    folder, same = describe("d", "directory", user="ann", group="staff"), describe("d/same", user="ann", group="staff")
    first = [(folder, None), (evil, b"e"), (describe("d/new\u202eline"), b""), (same, b"same"), (describe("f"), b"one")]
    second = [*first[:-1], (describe("f", mtime=NOON + 10**9), b"second")]
    make_snapshot(world.store, first)
    problems = (zbackup.Problem("a", "broke"),)
    make_snapshot(world.store, second, grade="torn", at=NOON + 86400 * 10**9, problems=problems)
    return world


def test_list_nodes(history: World) -> None:
    rows = history.listed()
    assert [(row["NODE"], row["HOST"], row["SNAPSHOTS"], row["GRADE"]) for row in rows] == [
        (FOLDER, "host", "2", "torn")
    ]
    lines = history.run("list").stdout.splitlines()
    assert lines[0].split() == ["NODE", "HOST", "ADDRESSES", "SNAPSHOTS", "LAST", "GRADE", "FILES", "SIZE"]
    assert lines[1].startswith(f"{FOLDER}  host  {FOLDER} ") and len(lines) == 2


def test_list_nodes_of_empty_store(world: World) -> None:
    world.sweep(code=5)
    assert world.listed() == []
    assert world.run("list").stdout.startswith("NODE")
    assert "it has: none yet" in world.run("list", FOLDER, code=2).stderr


def test_list_node_without_snapshots(world: World) -> None:
    make_snapshot(world.store, [])
    for path in (world.store / FOLDER / "snapshots").iterdir():
        path.unlink()
    assert world.listed()[0]["LAST"] == "-"
    assert world.listed(FOLDER) == []
    assert "has no snapshot at or before latest" in world.run("list", FOLDER, "--at", "latest", code=2).stderr


def test_list_snapshots(history: World) -> None:
    rows = history.listed(FOLDER)
    assert [(row["SNAPSHOT"], row["TIME"], row["GRADE"], row["NOTE"]) for row in rows] == [
        ("2023-11-14T22-13-20Z", "2023-11-14 22:13:20", "stable", ""),
        ("2023-11-15T22-13-20Z", "2023-11-15 22:13:20", "torn", "1 problems"),
    ]
    assert history.run("list", FOLDER).stdout.count("\n") == 3


def test_list_snapshots_cut_off(world: World) -> None:
    make_snapshot(world.store, [], grade="partial", cut_off="lost\x1b[2J")
    assert world.listed(FOLDER)[0]["NOTE"] == r"cut off: lost\x1b[2J"


def test_list_versions(history: World) -> None:
    rows = history.listed(FOLDER, "/f")
    assert [(row["SNAPSHOT"], row["SIZE"]) for row in rows] == [
        ("2023-11-14T22-13-20Z", "3"),
        ("2023-11-15T22-13-20Z", "6"),
    ]
    assert len(history.listed(FOLDER, "d/same")) == 1
    assert history.run("list", FOLDER, "d/").stdout.count("\n") == 2


def test_list_versions_of_nothing(history: World) -> None:
    done = history.run("list", FOLDER, "nothing", code=2)
    assert f"no snapshot of {FOLDER} has nothing" in done.stderr


def test_list_files_of_snapshot(history: World) -> None:
    rows = history.listed(FOLDER, "--at", "2023-11-14")
    assert [row["PATH"] for row in rows] == ["d", "d/evil\x1b]0;x\x07\n", "d/new\u202eline", "d/same", "f"]
    assert rows[3] == {
        "MODE": "-rw-r--r--",
        "OWNER": "ann:staff",
        "SIZE": "4",
        "TIME": "2023-11-14 22:13:20",
        "GRADE": "stable",
        "PATH": "d/same",
    }
    assert [row["PATH"] for row in history.listed(FOLDER, "d/same", "--at", "latest")] == ["d/same"]
    assert history.listed(FOLDER, "f", "--at", "latest")[0]["SIZE"] == "6"


def test_list_files_of_missing_path(history: World) -> None:
    done = history.run("list", FOLDER, "nothing", "--at", "latest", code=2)
    assert "nothing is not in the snapshot 2023-11-15T22-13-20Z" in done.stderr


@pytest.mark.parametrize("arguments", [["--at", "latest"], ["d/evil\x1b]0;x\x07\n"]])
def test_list_escapes_control_characters(history: World, arguments: list[str]) -> None:
    done = history.run("list", FOLDER, *arguments)
    assert "evil" in done.stdout
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == (6 if "--at" in arguments else 2)


def test_list_in_narrow_encoding(world: World) -> None:
    make_snapshot(world.store, [(describe("price in €"), b"")])
    world.env["PYTHONIOENCODING"] = "latin-1"
    assert "price in " in world.run("list", FOLDER, "--at", "latest").stdout


def test_list_names_damaged_pack(history: World) -> None:
    pack = next(history.store.glob("packs/*/*.pack"))
    pack.write_bytes(b"zbpack1\nnothing more")
    (history.store / "index.sqlite").unlink()
    done = history.run("list", code=4)
    assert f"pack {pack.stem} is damaged" in done.stderr and FOLDER in done.stdout


def test_list_names_damaged_snapshot(history: World) -> None:
    (history.store / FOLDER / "snapshots/2023-11-15T22-13-20Z.json").write_text("[]")
    done = history.run("list", FOLDER, code=None)
    assert "2023-11-15T22-13-20Z cannot be read" in done.stderr and "2023-11-14T22-13-20Z" in done.stdout


def test_list_nodes_names_damaged_snapshot(history: World) -> None:
    (history.store / FOLDER / "snapshots/2023-11-15T22-13-20Z.json").write_text("[]")
    done = history.run("list", code=None)
    assert done.returncode == 4 and "2023-11-15T22-13-20Z cannot be read" in done.stderr


# ---- stores ----


@pytest.mark.parametrize("command", [["list"], ["cat", FOLDER, "f"], ["restore", FOLDER, "--to", "back"]])
def test_store_missing(world: World, command: list[str]) -> None:
    done = world.run(*command, code=4)
    assert done.stderr == "zbackup: backups is not a zbackup store: it has no zbackup.json; is its disk mounted?\n"
    assert not world.store.exists() and not (world.path / "back").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 2, "id": "x"}', "is of format 2, this zbackup knows 1"),
        (zbackup.encode_file({"id": "x", "features": ["time\x1btravel"]}).decode(), r"does not know (time\x1btravel)"),
        ("{", "is damaged: zbackup.json is not JSON"),
        ('{"format": "one"}', "is damaged: zbackup.json: wrong value of format"),
        ('{"format": 1}', "is damaged: zbackup.json is damaged: it does not have the checksum"),
        (zbackup.encode_file({}).decode(), "is damaged: zbackup.json: wrong value of id"),
    ],
)
def test_store_of_another_format(history: World, text: str, words: str) -> None:
    (history.store / "zbackup.json").write_text(text)
    assert words in history.run("list", code=4).stderr
    done = history.run(*history.server_flags(), code=4)
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_store_of_another_kind(world: World) -> None:
    world.store.mkdir()
    (world.store / "my\nphotos").mkdir()
    done = world.run(*world.server_flags(), code=4)
    assert r"backups is not a zbackup store, and not empty (it has my\nphotos)" in done.stderr
    assert [path.name for path in world.store.iterdir()] == ["my\nphotos"]


def test_store_is_file(world: World) -> None:
    world.store.touch()
    assert "backups" in world.run(*world.server_flags(), code=4).stderr
    assert "backups is not a zbackup store" in world.run("list", code=4).stderr


# ---- what is said ----


def run_on_terminal(command: list[str], world: World) -> tuple[int, str]:
    """Run a command whose standard error is a terminal; returns exit code and what it drew."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *command], cwd=world.path, env=world.env, stdout=subprocess.DEVNULL, stderr=slave
    ) as process:
        os.close(slave)
        drawn = b""
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            try:
                drawn += os.read(master, 65536) if select.select([master], [], [], 0.1)[0] else b""
            except OSError:  # the other end is closed
                break
    os.close(master)
    return process.returncode, drawn.decode()


@pytest.mark.parametrize("flags", [[], ["--quiet"], ["--json"]])
def test_progress_on_terminal(world: World, flags: list[str]) -> None:
    world.node("--before", "sleep 1")
    (world.files / "a").write_text("a")
    code, drawn = run_on_terminal(world.server_flags(*flags), world)
    assert code == 0
    if flags:
        assert drawn == ""
    else:
        assert re.search(rf"\r\x1b\[K{FOLDER} 0 files, \d+ B", drawn)
        assert drawn.endswith("\r\x1b[K")


def test_progress_not_in_file(world: World) -> None:
    world.node("--before", "sleep 1")
    (world.files / "a").write_text("a")
    done = world.run(*world.server_flags())
    assert done.stderr == "" and "\r" not in done.stdout
    assert done.stdout.startswith(f"{FOLDER}:{world.port}: stable, 1 files (1 B), 1 changed; sent ")


def test_log_file_gets_all_lines(world: World) -> None:
    world.node("--log-file", "node.log", "--quiet", "--insecure", wait=False)
    wait_until(
        lambda: "--insecure" in (world.path / "node.log").read_text() if (world.path / "node.log").exists() else 0
    )
    (world.files / "a").write_text("a")
    world.run(*world.server_flags("--log-file", "server.log", "--quiet"))
    done = world.run(*world.server_flags("--log-file", "server.log"))
    lines = (world.path / "server.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    assert [line[20:] for line in lines[-2:]] == done.stdout.splitlines()
    assert len(lines) == 4
    assert "serving files at" in (world.path / "node.log").read_text()


def test_quiet_sweep_says_problems_only(world: World) -> None:
    world.node("--name", "n")
    (world.files / "a").write_text("a")
    assert world.run(*world.server_flags("--quiet")).stderr == ""
    world.nodes[0].stop()
    done = world.run(*world.server_flags("--quiet"), code=None)
    assert done.stdout == "" and "no node answered" in done.stderr


def test_stale_node_makes_exit_code_3(world: World) -> None:
    world.node()
    other = world.node(address="127.0.0.10")
    (world.files / "a").write_text("a")
    world.sweep("--range", "9-10")
    other.stop()
    assert world.sweep("--range", "9-10")["exit_code"] == 0
    report = world.sweep("--range", "9-10", "--stale", "0ms", code=3)
    assert [node["address"] for node in report["nodes"] if node["exit_code"]] == [f"127.0.0.10:{world.port}"]
    assert {"no node", "node"} == {node["state"] for node in report["nodes"]}
    assert {node["folder"] for node in report["nodes"]} == {"127.0.0.9", "127.0.0.10"}


def test_json_is_one_object_and_nothing_else(world: World) -> None:
    world.node()
    (world.files / "a").write_text("a")
    done = world.run(*world.server_flags("--json"))
    assert done.stderr == "" and json.loads(done.stdout)["nodes"][0]["snapshot"]["files"] == 1


def test_host_without_address(world: World) -> None:
    done = world.run(*world.server_flags("--host", "no-such-host.invalid"), code=1)
    assert "no-such-host.invalid" in done.stderr and "this name has no address" in done.stderr


def test_host_and_range_of_one_node(world: World) -> None:
    """A node that is reached by two ways is copied once."""
    world.node(address="127.0.0.1")
    (world.files / "a").write_text("a")
    report = world.sweep("--host", "localhost", "--host", "127.0.0.1", "--range", "1")
    assert len(report["nodes"]) == 1


# ---- signals ----


def test_every_sweeps_again_until_stopped(world: World) -> None:
    world.node()
    (world.files / "a").write_text("a")
    server = world.server("--every", "300ms")
    server.stop()
    flags = [flag for flag in world.server_flags("--every", "300ms") if flag != "--once"]
    command = [sys.executable, str(PROGRAM), *flags]
    with subprocess.Popen(command, cwd=world.path, env=world.env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(4):
            assert process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 0
    assert len(world.listed(FOLDER)) >= 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_sweep_interrupted(world: World, number: int, code: int) -> None:
    world.node("--before", "touch began; sleep 15")
    server = world.server()
    wait_until((world.path / "began").exists)
    began = time.monotonic()
    assert server.stop(number) == code
    assert time.monotonic() - began < AT_ONCE
    assert "interrupted" in server.output and "Traceback" not in server.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_node_stopped(world: World, number: int, code: int) -> None:
    node = world.node()
    began = time.monotonic()
    assert node.stop(number) == code
    assert time.monotonic() - began < AT_ONCE
    assert node.output.endswith("stopped\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_node_stopped_in_the_middle_of_a_copy(world: World, number: int, code: int) -> None:
    """It ends at once, --after is begun, the server says what happened and the next copy is whole."""
    (world.files / "a").write_text("a")
    hooks = ("--before", "touch began; test -e again || sleep 15", "--after", "touch after")
    node = world.node(*hooks)
    server = world.server()
    wait_until((world.path / "began").exists)
    began = time.monotonic()
    assert node.stop(number) == code
    assert time.monotonic() - began < AT_ONCE
    assert node.output.endswith("stopped\n") and "Traceback" not in node.output
    assert server.process.wait(20) == 1 and "the connection to the node was lost" in server.output
    wait_until((world.path / "after").exists, what="--after")
    (world.path / "again").touch()
    world.node(*hooks)
    assert world.sweep()["nodes"][0]["snapshot"]["grade"] == "stable"


def test_second_interrupt_ends_at_once() -> None:
    script = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import zbackup
stop = threading.Event()
with zbackup.stopping(stop) as caught:
    os.kill(os.getpid(), signal.SIGINT)
    sys.stdout.write(f"{stop.is_set()} {caught == [signal.SIGINT]}")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGINT)
    sys.stdout.write("still here")
"""
    done = subprocess.run([sys.executable, "-c", script, str(PROGRAM.parent)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "True True")


def test_stopping_puts_the_old_handlers_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with zbackup.stopping(zbackup.threading.Event()):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- demo ----

RUNNING = (zbackup.make_clock(), threading.Event())


def list_demo_nodes(folder: Path) -> list[str]:
    """Return the processes that still work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd").startswith(str(folder)):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def test_demo(world: World) -> None:
    said = world.run("demo", "--to", "demo", "--port", str(world.port)).stdout
    assert said.count("2 of 2 copies good") == 2 and "the database is sound" in said and "verify: all is well" in said
    assert f"all of it lies in {world.path}/demo" in said
    for word in ("key --file zbackup.pub", "node --file /home", "server --network 192.168.1 --range 9-99"):
        assert f"{PROGRAM} {word}" in said
    assert (world.path / "demo/backups/127.0.0.9/latest/shop/new.txt").exists()
    assert not (world.path / "state").exists()  # nothing of it touches the user's own
    assert list_demo_nodes(world.path) == []
    done = world.run("demo", "--to", "demo", code=2)
    assert "there are files in it" in done.stderr
    # What it shows can be typed again.
    commands = [line[2:] for line in said.splitlines() if line.startswith("$ ")]
    assert len(commands) == 11
    again = next(c for c in commands if c.endswith("list 127.0.0.9")).replace("python3", shlex.quote(sys.executable))
    done = subprocess.run(again, shell=True, cwd=world.path / "demo", env=world.env, capture_output=True, text=True)
    assert done.returncode == 0 and "SNAPSHOT" in done.stdout


def test_demo_takes_a_free_port_and_removes_its_files(world: World) -> None:
    world.env["TMPDIR"] = str(world.path)
    with contextlib.ExitStack() as stack:
        for address in zbackup.DEMO:
            taken = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # it may be taken for good on this machine
                taken.bind((address, zbackup.PORT))
        said = world.run("demo", "--temporary").stdout
    assert "--port" in said and "its files are removed" in said
    assert list(world.path.glob("zbackup-demo-*")) == []


def test_demo_on_a_taken_port(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.10", world.port))
        done = world.run("demo", "--port", str(world.port), "--to", "demo", code=1)
    assert "the port is in use" in done.stderr and not (world.path / "demo").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted(world: World, number: int) -> None:
    demo = Process(["demo", "--to", "demo", "--port", str(world.port)], world.path, uncovered(world.env))
    wait_until(lambda: "server --range" in demo.output, what="the first sweep")
    assert demo.stop(number) == 130
    assert demo.output.endswith("zbackup: interrupted\n") and "Traceback" not in demo.output
    assert list_demo_nodes(world.path) == []


def test_demo_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that fails ends the nodes, and the sentence says where to look."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM)])
    monkeypatch.chdir(world.path)
    monkeypatch.setattr(zbackup.Demo, "change", lambda demo: shutil.rmtree(demo.path("shop")))
    with pytest.raises(zbackup.BackupError, match=r"the demo failed: `server` ended with code 1; see .*/demo$"):
        zbackup.run_demo(zbackup.make_parser().parse_args(["demo", "--to", "demo", "--port", str(world.port)]))
    assert list_demo_nodes(world.path / "demo") == []


def test_demo_whose_node_does_not_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    program = world.path / "program"
    program.write_text("raise SystemExit('no, said the test')")
    monkeypatch.setattr(sys, "argv", [str(program)])
    demo = zbackup.Demo(str(world.path), world.port, RUNNING)
    with pytest.raises(zbackup.BackupError, match="the node of 127.0.0.9 did not start: no, said the test$"):
        demo.start_node("127.0.0.9")
    demo.close()


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("restored/office/photo.raw", b"other", "office/photo.raw is not what was restored"),
        ("first/shop/letter.txt", b"other", "mixed up"),
        ("restored/shop/orders.sqlite", None, "the database has 0 of 5 orders"),
    ],
)
def test_demo_sees_what_is_wrong(tmp_path: Path, path: str, content: bytes | None, words: str) -> None:
    demo = zbackup.Demo(str(tmp_path), 4545, RUNNING)
    for name in ("shop/letter.txt", "shop/new.txt", "office/photo.raw"):
        demo.write(name, b"same")
        demo.write(f"restored/{name}", b"same")
    demo.write("first/shop/letter.txt", b"on its way")
    with contextlib.closing(sqlite3.connect(tmp_path / "restored/shop/orders.sqlite")) as database:
        database.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY)")
        if content is not None:
            database.executemany("INSERT INTO orders VALUES (?)", [(number,) for number in range(1, 6)])
        database.commit()
    if content is not None:
        demo.write(path, content)
    with pytest.raises(zbackup.BackupError, match=words):
        demo.compare(5)


# ---- without pyzmq ----


@pytest.fixture
def without_zmq(world: World) -> World:
    fake = world.path / "fake/zmq"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('no module, said the test')")
    world.env["PYTHONPATH"] = path_before(fake.parent)
    return world


@pytest.mark.parametrize("command", [["server", "--once", "--range", "9"], ["node"]])
def test_pyzmq_missing(without_zmq: World, command: list[str]) -> None:
    done = without_zmq.run(*command, code=1)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "pip install pyzmq" in done.stderr and "apt install python3-zmq" in done.stderr
    assert "no module, said the test" in done.stderr


def test_restore_needs_no_pyzmq(without_zmq: World) -> None:
    make_snapshot(without_zmq.store, [(describe("f"), b"content")])
    assert without_zmq.run("cat", FOLDER, "f").stdout == "content"
    assert len(without_zmq.listed()) == 1
    assert (without_zmq.restore() / "f").read_text() == "content"


def test_pyzmq_missing_makes_no_store(without_zmq: World) -> None:
    without_zmq.run("server", "--once", "--range", "9", code=1)
    assert not without_zmq.store.exists()


# ---- what a node says ----


def test_node_says_what_it_serves(world: World) -> None:
    os.symlink("files", world.path / "link")
    os.symlink("../files", world.files / "inside")
    (world.files / "a").touch()
    node = world.node(
        "--file", "files", "--file", "files/inside/a", "--file", "link", "--file", "later\x1b", "--insecure"
    )
    said = node.output
    assert r"later\x1b does not exist (yet)" in said
    assert "link is a symbolic link: the link alone is copied" in said
    assert f"files/inside/a is behind a symbolic link in {world.files}: name what the link points to" in said
    assert r"serving files, files/inside/a, link, later\x1b at" in said and "to any machine, without a key" in said
    wait_until(lambda: "--insecure: everyone" in node.output)


def test_exclude_is_not_of_the_locale() -> None:
    """Its bytes are those of the file names, whatever the letters are that the locale makes of them."""
    code = (
        "import sys, zbackup; args = zbackup.make_parser().parse_args(sys.argv[1:]);"
        "print(ascii(zbackup.make_node_settings(args, 'h').exclude))"
    )
    plain = {**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, "node", "--exclude", "\N{LATIN SMALL LETTER U WITH DIAERESIS}*"]
    done = subprocess.run(command, cwd=PROGRAM.parent, env=plain, capture_output=True, text=True, check=True)
    assert done.stdout == "('\\xfc*',)\n"


def test_node_port_taken(world: World) -> None:
    world.node()
    done = world.run("node", "--bind", FOLDER, "--port", str(world.port), "--state", "other", "--file", "files", code=1)
    assert f"port {world.port} is in use on this machine" in done.stderr and "--port" in done.stderr


def test_node_bind_to_what_is_no_address(world: World) -> None:
    done = world.run("node", "--bind", "no-such-host.invalid", "--port", str(world.port), "--file", "files", code=2)
    assert "cannot listen at tcp://no-such-host.invalid" in done.stderr and "--bind" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_node_waits_for_its_address_until_stopped(world: World, number: int, code: int) -> None:
    node = world.node(address="203.0.113.9", wait=False)
    wait_until(lambda: node.output, what="the line")
    time.sleep(0.5)
    began = time.monotonic()
    assert node.stop(number) == code
    assert time.monotonic() - began < AT_ONCE
    told = f"this machine does not have the address of tcp://203.0.113.9:{world.port}, see --bind; waiting until it has"
    assert node.output.splitlines() == [told, "stopped"]


def in_own_network(command: Sequence[str]) -> list[str]:
    """Return a command run in a network of its own, with loopback alone; skips the test where there can be none."""
    own = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("unshare") or not shutil.which("ip") or subprocess.run([*own, "true"]).returncode:
        pytest.skip("no network namespace of its own can be made here: needs root, unshare and ip")
    return [*own, *command]


def test_node_waits_for_its_address_until_it_is_there(world: World) -> None:
    (world.files / "a").write_text("a")
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(PROGRAM))}"
    script = f"""
{program} node --bind 203.0.113.9 --file files --insecure &
while ! grep -q waiting log; do sleep 0.05; done
ip address add 203.0.113.9/32 dev lo
while ! grep -q serving log; do sleep 0.05; done
{program} server --host 203.0.113.9 --once
code=$?
kill $!
wait $! && exit $code"""
    with open(world.path / "log", "w") as log:
        command = in_own_network(["sh", "-c", script])
        done = subprocess.run(command, cwd=world.path, env=world.env, stdout=log, stderr=log, timeout=30)
    said = (world.path / "log").read_text()
    assert done.returncode == 0 and said.count("waiting until it has") == 1, said
    assert (world.store / "203.0.113.9/latest/files/a").read_text() == "a"


def test_main_reads_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert zbackup.main(["list"]) == 4
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (
        capsys.readouterr().err
        == "zbackup: backups is not a zbackup store: it has no zbackup.json; is its disk mounted?\n"
    )


# ---- what argparse, Python and the clock do not expect ----


def test_paths_after_flags(history: World) -> None:
    assert (history.restore(FOLDER, "--quiet", "f") / "f").exists()
    history.run("restore", FOLDER, "--to", "one", "f", "d")
    assert sorted(os.listdir(history.path / "one")) == ["d", "f"]
    assert history.run("list", FOLDER, "--json", "f").stdout == history.run("list", FOLDER, "f", "--json").stdout
    for wrong in (
        ["list", FOLDER, "--json", "f", "g"],
        ["verify", "f"],
        ["restore", FOLDER, "--to", "two", "f", "--no"],
    ):
        assert "unrecognized arguments" in history.run(*wrong, code=2).stderr


def test_flags_in_a_file_that_names_itself(world: World) -> None:
    (world.path / "flags").write_text("--quiet\n@flags\n")
    assert world.run("verify", "@flags", code=2).stderr == "zbackup: an @FILE names itself\n"


@pytest.mark.parametrize("closed", [1, 2])
def test_commands_without_a_standard_stream(history: World, closed: int) -> None:
    """As from a daemon that closed them: the work is done, and no file of the store takes their place."""
    for name, code in (("list", 0), ("verify", 0), ("restore", 0), ("cat", 0), ("server", 5)):
        more = {"restore": [FOLDER, "--to", f"to{closed}"], "cat": [FOLDER, "f"]}.get(name, [])
        flags = history.server_flags() if name == "server" else [name, *more]
        done = history.run(*flags, code=code, preexec_fn=lambda: os.close(closed))
        assert (done.stderr if closed == 2 else done.stdout) == ""
    assert (history.path / f"to{closed}/f").exists()
    history.run("verify")


def test_time_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks were put back at 01:00 UTC: from 02:00 to 03:00 every time came twice."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        _, moment = zbackup.parse_when("2026-10-25 02:10:00", NOON)
        _, before = zbackup.parse_when("2026-10-25 01:59:59", NOON)
        _, skipped = zbackup.parse_when("2026-03-29 02:30:00", NOON)  # never came
    finally:
        monkeypatch.undo()
        time.tzset()
    assert zbackup.name_time(moment) == "2026-10-25T01-10-00Z"
    assert zbackup.name_time(before) == "2026-10-24T23-59-59Z"
    assert zbackup.name_time(skipped) == "2026-03-29T01-30-00Z"


def test_log_file_of_a_name_that_is_not_text(world: World) -> None:
    name = os.fsdecode(b"store\xff")
    make_snapshot(world.path / name, [(describe("f"), b"content")])
    for path in (world.path / name).rglob("2023*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    world.run("verify", "--store", name, "--log-file", "log", code=4)
    assert "store\\udcff" in (world.path / "log").read_text()


def test_list_in_json_tells_all_apart(world: World) -> None:
    """Each path is as `cat` takes it; target and error stand by themselves."""
    entries = [
        (describe(b"caf\xe9"), b"1"),
        (describe("gone"), zbackup.Content(error="Permission denied")),
        (describe("link", "symlink", target=b"there"), None),
        (describe("tab\tx"), b"2"),
        (describe(r"tab\tx"), b"3"),
    ]
    make_snapshot(world.store, entries)
    rows = world.listed(FOLDER, "--at", "latest")
    assert [world.run("cat", FOLDER, rows[number]["PATH"]).stdout for number in (0, 3, 4)] == ["1", "2", "3"]
    assert (rows[1]["PATH"], rows[1]["ERROR"]) == ("gone", "Permission denied")
    assert (rows[2]["PATH"], rows[2]["TARGET"]) == ("link", "there")
    assert [row.keys() & {"TARGET", "ERROR"} for row in rows] == [set(), {"ERROR"}, {"TARGET"}, set(), set()]


def test_list_of_nothing(world: World) -> None:
    make_snapshot(world.store, [])
    assert world.listed(FOLDER, "--at", "latest") == []
    assert world.run("list", FOLDER, "--at", "latest").stdout == ""


def test_list_of_versions_of_which_some_are_lost(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), b"1"), (describe("b"), b"unrelated")])
    lost = list(world.store.rglob("*.pack"))
    make_snapshot(world.store, [(describe("a"), b"2")], at=NOON + 10**9)
    for pack in lost:
        pack.unlink()
    done = world.run("list", FOLDER, "a", code=4)
    assert "2023-11-14T22-13-21Z" in done.stdout and "2023-11-14T22-13-20Z" not in done.stdout
    assert "a pack is lost" in done.stderr
