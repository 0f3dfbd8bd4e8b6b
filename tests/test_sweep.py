"""Chapter 10, SWEEP: who is there, what is planned, what is reported; with real processes and sockets."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
import zmq
from conftest import AT_ONCE, FOLDER, PROGRAM, Process, World, path_before, uncovered, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_wire import make_program

import zbackup

Answer = Any  # (fields, body), (kind, fields, body), raw frames as a list, or None for silence


def make_line(path: str, size: int = 0, **more: Any) -> bytes:
    """Return the listing line of a plain file."""
    values = {"mode": 0o644, "size": size, "mtime": 1, "ctime": 1, "inode": 1, **more}
    return zbackup.encode_stat(zbackup.Stat(path.encode(), "file", **values))


def make_item(data: bytes, inode: int = 1) -> dict[str, Any]:
    """Return what an honest node says of the whole of a small file."""
    digest = zbackup.digest_pages(zbackup.hash_pages(data)).hex()
    state = [len(data), 1, 1, inode]
    what = {"length": len(data), "digest": digest, "status": "whole"}
    return {"size": len(data), "grade": "stable", "state": state, **what}


class FakeNode(threading.Thread):
    """A node written anew: honest, but where `answers` has something else to say for a kind of question."""

    def __init__(
        self, address: str, port: int, files: dict[str, bytes] | None = None, server: str = "", **answers: Any
    ) -> None:
        super().__init__(daemon=True)
        self.files = {"a": b"honest"} if files is None else files
        self.answers: dict[str, Callable[[FakeNode, dict[str, Any], bytes], Answer]] = answers
        self.identity = os.urandom(16).hex()
        self.working: tuple[bytes, int] | None = None  # say WORKING without end
        self.asked: list[str] = []
        self.over = threading.Event()
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        if server:
            self.router.curve_serverkey = server.encode()
            self.router.curve_publickey, self.router.curve_secretkey = zmq.curve_keypair()
        self.router.bind(f"tcp://{address}:{port}")

    def __enter__(self) -> FakeNode:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.over.set()
        self.join(10)
        self.router.close(0)
        self.context.term()

    def run(self) -> None:
        while not self.over.is_set():
            if self.router.poll(50):
                peer, head, body = self.router.recv_multipart()
                self.take(peer, json.loads(head), body)
            elif self.working:
                peer, number = self.working
                self.router.send_multipart([peer, *zbackup.encode_message("WORKING", number, {})])

    def take(self, peer: bytes, asked: dict[str, Any], body: bytes) -> None:
        kind, number = asked["kind"], asked["number"]
        self.asked.append(kind)
        answer = self.answers.get(kind, FakeNode.honest)(self, asked, body)
        if answer == "WORKING":
            self.working = (peer, number)
        elif isinstance(answer, list):
            self.router.send_multipart([peer, *answer])
        elif answer is not None:
            kind, fields, data = answer if len(answer) == 3 else (kind, *answer)
            self.router.send_multipart([peer, *zbackup.encode_message(kind, number, fields, data)])

    def honest(self, asked: dict[str, Any], body: bytes) -> Answer:
        if asked["kind"] == "HELLO":
            names = {"protocol": zbackup.PROTOCOL, "identity": self.identity, "instance": "x", "name": "fake"}
            return {**names, "program": "9", "codecs": ["plain"], "roots": ["f"]}, b""
        if asked["kind"] == "LIST":
            return listing(*(make_line(path, len(data)) for path, data in sorted(self.files.items())))
        if asked["kind"] == "READ":
            parts = [self.files[file["path"]] for file in asked["files"]]
            return reading([make_item(data) for data in parts], b"".join(parts))
        return {"missing": [], "roots": ["f"]}, b""


def listing(*lines: bytes, more: bool = False) -> Answer:
    raw = b"\n".join(lines)
    return {"more": more, "codec": zbackup.PLAIN, "size": len(raw)}, raw


def reading(items: list[dict[str, Any]], data: bytes) -> Answer:
    return {"items": items, "codec": zbackup.PLAIN, "size": len(data)}, data


def find_row(report: dict[str, Any], address: str) -> dict[str, Any]:
    """Return the one report of an address."""
    rows = [row for row in report["nodes"] if row["address"].split(":")[0] == address]
    assert len(rows) == 1, rows
    row: dict[str, Any] = rows[0]
    return row


def check_store(path: Path) -> int:
    """Read every chunk that any snapshot names; returns how many files there are."""
    store = zbackup.open_store(str(path))
    reader = store.reader()
    files = 0
    try:
        for known in store.list_nodes():
            for snapshot in store.node(known.folder).list_snapshots():
                for entry in zbackup.list_entries(reader, snapshot.blocks):
                    chunks = list(zbackup.list_chunks(reader, entry.content))
                    size = sum(
                        chunk * zbackup.CHUNK if isinstance(chunk, int) else len(reader.get(chunk)) for chunk in chunks
                    )
                    assert size >= entry.content.size, entry
                    files += 1
        assert store.problems == []
    finally:
        reader.close()
        store.close()
    return files


@pytest.fixture
def small(world: World) -> World:
    """A world whose node has two small files."""
    (world.files / "one").write_text("1")
    (world.files / "two").write_bytes(os.urandom(5000))
    return world


# ---- probe ----


def test_probe_many_refused_addresses(small: World) -> None:
    small.node()
    report = small.sweep("--range", "1-254", "--timeout", "10s")
    states = [row["state"] for row in report["nodes"]]
    assert (states.count("no node"), states.count("node")) == (253, 1)
    assert report["finished"] - report["started"] < 4e9  # a refusal is an answer: nobody waits 10 s


class SilentAddresses:
    """Sockets whose queue is full: the kernel drops what else knocks, as a machine that is off does."""

    def __init__(self, addresses: list[str], port: int) -> None:
        self.sockets = []
        for address in addresses:
            ear = socket.socket()
            ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ear.bind((address, port))
            ear.listen(0)
            self.sockets.append(ear)
            for _ in range(3):
                knock = socket.socket()
                knock.setblocking(False)
                knock.connect_ex((address, port))
                self.sockets.append(knock)

    def __enter__(self) -> SilentAddresses:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.sockets:
            one.close()


def test_probe_silent_addresses_cost_one_timeout(small: World) -> None:
    small.node()
    with SilentAddresses([f"127.0.0.{i}" for i in range(100, 200)], small.port):
        report = small.sweep("--range", "9,100-199", "--timeout", "1s")
    assert 1e9 < report["finished"] - report["started"] < 3e9
    assert [row["state"] for row in report["nodes"]].count("node") == 1


def test_probe_silent_addresses_are_called_silent(small: World) -> None:
    small.node()
    with SilentAddresses([f"127.0.0.{i}" for i in range(100, 200)], small.port):
        report = small.sweep("--range", "9,100-199", "--timeout", "300ms")
    assert [row["state"] for row in report["nodes"]].count("silent") == 100


def test_probe_in_groups(small: World) -> None:
    small.node()
    with SilentAddresses([f"127.0.0.{i}" for i in range(100, 120)], small.port):
        report = small.sweep("--range", "9,100-119", "--timeout", "500ms", "--neighbours", "28")
    assert 1.4e9 < report["finished"] - report["started"] < 3e9  # three groups


def run_in_namespace(world: World, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a network of its own, where 10.9.9.1 is this machine and no other is there."""
    network = """
        ip link set lo up
        ip link add silent0 type dummy 2>&- || ip tuntap add dev silent0 mode tun
        ip addr add 10.9.9.1/24 dev silent0
        ip link set silent0 up
        """
    try:
        subprocess.run(["unshare", "-n", "sh", "-ec", network], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace with an interface that leads nowhere here: {error}")
    command = ["unshare", "-n", "sh", "-c", network + script]
    return subprocess.run(command, cwd=world.path, env=world.env, capture_output=True, text=True, timeout=60)


def test_probe_without_sockets_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as libzmq has sockets for; where the count is wrong, a sentence, and all that was opened is closed."""
    monkeypatch.setattr(zbackup, "MOST_SOCKETS", 40)
    pair = zbackup.make_pair()
    wire = zbackup.Wire(zbackup.make_clock(), threading.Event(), 5.0, pair)
    addresses = [zbackup.Address(f"127.0.0.{number}", zbackup.PORT - 1) for number in range(100, 140)]
    settings = zbackup.ServerSettings(timeout=0.2)
    assert len(zbackup.probe(wire, addresses, settings)) == 40
    monkeypatch.setattr(zbackup.Wire, "peers_at_once", lambda self: 40)
    with pytest.raises(zbackup.BackupError, match="addresses cannot be asked at once .* lower --neighbours"):
        zbackup.probe(wire, addresses, settings)
    wire.close()


@pytest.mark.parametrize(("content", "count"), [("4096\n", 4096), ("", zbackup.NEIGHBOURS), (None, zbackup.NEIGHBOURS)])
def test_neighbours_as_the_kernel_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, count: int
) -> None:
    """In a container it does not."""
    table = tmp_path / "gc_thresh3"
    if content is not None:
        table.write_text(content)
    monkeypatch.setattr(zbackup, "TABLE_SIZE", str(table))
    assert zbackup.count_neighbours() == count


def test_probe_a_network_without_machines(world: World) -> None:
    done = run_in_namespace(
        world, f"{sys.executable} {PROGRAM} server --once --json --network 10.9.9.0/24 --timeout 1s"
    )
    assert done.returncode == 5, done.stderr
    report = json.loads(done.stdout)
    assert 1e9 < report["finished"] - report["started"] < 4e9
    assert len(report["nodes"]) == 254 and not [row for row in report["nodes"] if row["state"] == "node"]


def test_probe_node_that_refuses(world: World) -> None:
    program = f"{sys.executable} {PROGRAM}"
    script = f"""
        {sys.executable} {make_program(world, False)} node --bind 10.9.9.1 --file files > node.log & node=$!
        until grep -q serving node.log; do sleep 0.05; done
        {program} server --once --json --host 10.9.9.1
        echo $? > code; kill $node; wait"""
    done = run_in_namespace(world, script)
    assert (world.path / "code").read_text() == "1\n", done.stderr
    row = find_row(json.loads(done.stdout), "10.9.9.1")
    assert (row["state"], row["exit_code"]) == ("refuses", 1)
    assert "answers only its own machine" in row["error"] and "with --server-key" in row["error"]


def test_probe_strangers(small: World) -> None:
    small.node()
    with socket.socket() as web, socket.socket() as mute, FakeNode("127.0.0.12", small.port, HELLO=lambda *a: None):
        for one, address in ((web, "127.0.0.10"), (mute, "127.0.0.11")):
            one.bind((address, small.port))
            one.listen()

        def talk() -> None:
            with contextlib.suppress(ConnectionError), web.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        threading.Thread(target=talk, daemon=True).start()
        report = small.sweep("--range", "9-13")
    said = {row["address"].split(":")[0]: (row["state"], row["error"]) for row in report["nodes"]}
    assert said["127.0.0.9"] == ("node", "")
    assert said["127.0.0.10"] == ("no node", f"port {small.port} is another service")
    assert said["127.0.0.11"] == ("no node", f"port {small.port} is another service")
    assert said["127.0.0.12"] == ("no node", "a ZeroMQ service that is no node")
    assert said["127.0.0.13"] == ("no node", f"nothing listens at port {small.port}")


@pytest.mark.parametrize(
    "answer",
    [
        [b"{}", b""],
        [b"not JSON", b""],
        [b"one frame"],
        [b'{"kind":' + b"[" * 100000, b""],
        [b'{"kind":"HELLO","number":1,"protocol":1,"identity":"../../etc"}', b""],
        [b'{"kind":"HELLO","number":1,"protocol":1,"identity":"%s","roots":[7]}' % (b"0" * 32), b""],
        [b'{"kind":"ERROR","number":1,"message":"\\u001b[31m\\ud800","code":"odd"}', b""],
        [b'{"kind":"ERROR","number":1}', b""],
        [b'{"kind":"HELLO","number":%s}' % (b"9" * 5000), b""],
        [b"x" * (5 << 20), b""],
    ],
    ids=["empty", "text", "frames", "deep", "identity", "roots", "escape", "error", "digits", "huge"],
)
def test_probe_hello_of_something_else(small: World, answer: list[bytes]) -> None:
    small.node()
    with FakeNode("127.0.0.10", small.port, HELLO=lambda *a: answer):
        report = small.sweep("--range", "9-10")
    assert find_row(report, "127.0.0.10")["state"] == "no node"
    assert find_row(report, "127.0.0.9")["snapshot"]["grade"] == "stable"


def test_probe_other_protocol_version(small: World) -> None:
    small.node()
    with FakeNode("127.0.0.10", small.port, HELLO=lambda *a: ({"protocol": 77}, b"")):
        report = small.sweep("--range", "9-10", code=None)
        said = small.run(*small.server_flags("--range", "10"), code=None)
    error = find_row(report, "127.0.0.10")["error"]
    assert "protocol 77" in error and f"this server {zbackup.PROTOCOL}" in error
    assert "protocol 77" in said.stdout + said.stderr
    assert find_row(report, "127.0.0.9")["snapshot"]["grade"] == "stable"


def test_probe_other_protocol_version_is_a_failure(small: World) -> None:
    small.node()
    with FakeNode("127.0.0.10", small.port, HELLO=lambda *a: ({"protocol": 77}, b"")):
        report = small.sweep("--range", "9-10", code=None)
    assert find_row(report, "127.0.0.10")["state"] == "refuses"
    assert report["exit_code"] == 1


# ---- plan ----


def test_plan_node_at_several_addresses(small: World) -> None:
    small.node(address="*")
    report = small.sweep("--range", "9-12")
    assert len(report["nodes"]) == 1
    assert report["nodes"][0]["addresses"] == [f"127.0.0.{i}:{small.port}" for i in (9, 10, 11, 12)]
    assert report["nodes"][0]["folder"] == "127.0.0.9"
    assert [row["ADDRESSES"].count("127.0.0.") for row in small.listed()] == [4]
    assert "also at 127.0.0.10" in small.run(*small.server_flags("--range", "9-12")).stdout


def test_plan_two_nodes(small: World) -> None:
    (small.path / "other").mkdir()
    (small.path / "other" / "two").write_text("of the second")
    small.node()
    small.node("--file", "other", address="127.0.0.10")
    report = small.sweep("--range", "9-10")
    assert {row["folder"] for row in report["nodes"]} == {"127.0.0.9", "127.0.0.10"}
    assert (small.restore() / "files/one").read_text() == "1"
    assert (small.restore("127.0.0.10", to="second") / "other/two").read_text() == "of the second"
    assert not (small.path / "second/files").exists()


def clone_state(world: World, source: str, target: str) -> str:
    """Copy a node's state as an imaged machine has it; returns the --state for an address."""
    folder = world.path / "cloned"
    old = world.path / "state" / "zbackup" / f"node-{source}-{world.port}"
    shutil.copytree(old, folder / f"node-{target}-{world.port}")
    return str(folder)


def test_plan_cloned_identity(small: World) -> None:
    (small.path / "clone").mkdir()
    (small.path / "clone" / "secret").write_text("of the clone")
    small.node()
    small.sweep()
    state = clone_state(small, "127.0.0.9", "127.0.0.10")
    small.node("--state", state, "--file", "clone", address="127.0.0.10")
    report = small.sweep("--range", "9-10", code=1)
    clone = find_row(report, "127.0.0.10")
    assert (clone["state"], clone["snapshot"]) == ("refuses", None)
    assert f"identity of the node at 127.0.0.9:{small.port}" in clone["error"]
    assert find_row(report, "127.0.0.9")["folder"] == "127.0.0.9"
    assert not list(small.restore().rglob("secret"))


def test_plan_cloned_identity_at_a_lower_address(small: World) -> None:
    (small.path / "clone").mkdir()
    (small.path / "clone" / "secret").write_text("of the clone")
    small.node(address="127.0.0.10")
    small.sweep("--range", "10")
    state = clone_state(small, "127.0.0.10", "127.0.0.9")
    small.node("--state", state, "--file", "clone", address="127.0.0.9")
    report = small.sweep("--range", "9-10", code=1)
    assert find_row(report, "127.0.0.9")["state"] == "refuses"  # the one whose address is known goes on
    assert find_row(report, "127.0.0.10")["folder"] == "127.0.0.10"
    assert not list(small.restore("127.0.0.10").rglob("secret"))


def test_plan_new_identity_at_a_known_address(small: World) -> None:
    node = small.node()
    small.sweep()
    node.stop()
    small.node("--state", str(small.path / "reinstalled"))
    report = small.sweep(code=None)
    row = next(row for row in report["nodes"] if row["snapshot"])
    assert row["folder"] == f"127.0.0.9-{small.port}"
    assert "another node than the one whose copies are in 127.0.0.9" in row["note"] and report["exit_code"] == 0
    assert {row["NODE"]: row["SNAPSHOTS"] for row in small.listed()} == {"127.0.0.9": "1", row["folder"]: "1"}
    again = small.sweep()
    assert next(row for row in again["nodes"] if row["snapshot"])["folder"] == row["folder"]
    small.nodes[-1].stop()
    small.node("--state", str(small.path / "once more"))
    third = next(row for row in small.sweep(code=None)["nodes"] if row["snapshot"])
    assert third["folder"].startswith("127.0.0.9-") and third["folder"] != row["folder"]


def test_plan_node_that_moved(small: World) -> None:
    node = small.node()
    small.sweep("--range", "9-10")
    node.stop()
    state = clone_state(small, "127.0.0.9", "127.0.0.10")
    small.node("--state", state, address="127.0.0.10")
    report = small.sweep("--range", "9-10")
    row = find_row(report, "127.0.0.10")
    assert (row["folder"], row["snapshot"]["changed"]) == ("127.0.0.9", 0)
    assert [(row["NODE"], row["ADDRESSES"]) for row in small.listed()] == [("127.0.0.9", f"127.0.0.10:{small.port}")]


# ---- report and exit codes ----


def make_report(*nodes: tuple[str, int], problems: tuple[str, ...] = ()) -> zbackup.SweepReport:
    rows = tuple(zbackup.NodeReport("a", state, exit_code=code) for state, code in nodes)
    return zbackup.SweepReport(1, 2, rows, problems)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (make_report(("node", 0), ("silent", 0), ("no node", 0)), 0),
        (make_report(("node", 0), ("node", 1)), 1),
        (make_report(("node", 0), ("silent", 3)), 3),
        (make_report(("node", 1), ("silent", 3)), 1),
        (make_report(("node", 1), ("silent", 3), ("node", 4)), 4),
        (make_report(("node", 4), ("node", 130)), 130),
        (make_report(("node", 0), problems=("a pack is damaged",)), 4),
        (make_report(("silent", 0), ("no node", 0)), 5),
        (make_report(("silent", 3)), 3),
        (make_report(("refuses", 1)), 1),
        (make_report(), 5),
    ],
)
def test_exit_code_is_the_worst(report: zbackup.SweepReport, code: int) -> None:
    assert report.exit_code == code


def test_missing_node(small: World) -> None:
    small.node()
    small.node("--state", str(small.path / "two"), address="127.0.0.10")
    small.sweep("--range", "9-10")
    small.nodes[0].stop()
    report = small.sweep("--range", "9-10")
    row = next(row for row in report["nodes"] if row["folder"] == "127.0.0.9")
    assert (row["state"], row["exit_code"], row["snapshot"]) == ("no node", 0, None)
    assert (row["address"], row["error"]) == (f"127.0.0.9:{small.port}", f"nothing listens at port {small.port}")
    quiet = small.run(*small.server_flags("--range", "9-10", "--quiet"))
    assert quiet.stdout + quiet.stderr == ""
    late = small.run(*small.server_flags("--range", "9-10", "--quiet", "--stale", "0s"), code=3)
    assert f"127.0.0.9:{small.port}: nothing listens at port {small.port}; last seen" in late.stderr
    small.sweep("--range", "10", "--stale", "0s")  # its address was not asked for


def test_missing_node_that_is_silent_is_asked_again(small: World) -> None:
    small.node()
    small.sweep()
    small.nodes[0].stop()
    with SilentAddresses([f"127.0.0.{i}" for i in (9, *range(100, 200))], small.port):
        report = small.sweep("--range", "9,100-199", "--timeout", "1s", "--stale", "0s", code=3)
        said = small.run(*small.server_flags("--timeout", "100ms", "--quiet", "--stale", "0s"), code=3).stderr
    assert report["finished"] - report["started"] > 2e9  # two hellos
    row = next(row for row in report["nodes"] if row["folder"])
    assert (row["state"], row["error"], row["exit_code"]) == ("silent", "", 3)
    assert f"127.0.0.9:{small.port}: does not answer; last seen" in said


def test_nobody_answered(world: World) -> None:
    said = world.run(*world.server_flags("--range", "9-12"), code=5)
    assert "no node answered" in said.stderr
    quiet = world.run(*world.server_flags("--range", "9-12", "--quiet"), code=5)
    assert quiet.stdout == "" and "no node answered" in quiet.stderr


def test_report_as_json(small: World) -> None:
    small.node()
    done = small.run(*small.server_flags("--json", "--range", "9-10"))
    report = json.loads(done.stdout)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert set(report) == {"started", "finished", "exit_code", "nodes", "problems"}
    keys = {
        "address",
        "addresses",
        "state",
        "folder",
        "error",
        "note",
        "exit_code",
        "missing_seconds",
        "snapshot",
        "problems",
    }
    assert all(set(row) == keys for row in report["nodes"])
    snapshot = find_row(report, "127.0.0.9")["snapshot"]
    assert (snapshot["files"], snapshot["folders"], snapshot["size"]) == (2, 1, 5001)
    assert (snapshot["changed"], snapshot["grade"], snapshot["cut_off"]) == (2, "stable", "")
    assert report["started"] <= snapshot["started"] <= snapshot["finished"] <= report["finished"]
    assert snapshot["sent"] > 5001 and snapshot["added"] > 5001


def test_report_quiet(small: World) -> None:
    small.node("--file", "files", "--file", "absent")
    bad = small.run(*small.server_flags("--quiet", "--range", "9-10"), code=1)
    assert bad.stdout == "" and "absent: does not exist on the node" in bad.stderr
    (small.path / "absent").write_text("here")
    good = small.run(*small.server_flags("--quiet", "--range", "9-10"))
    assert good.stdout + good.stderr == ""
    assert "2 of 2" not in good.stdout


def test_report_as_text(small: World) -> None:
    small.node()
    said = small.run(*small.server_flags("--range", "9-25")).stdout.splitlines()
    assert said[0].startswith(f"127.0.0.9:{small.port}: stable, 2 files (4.9 KiB), 2 changed; sent ")
    assert sum(line.startswith("alive, but no node: 127.0.0.") for line in said) == 10
    assert said[-2] == "alive, but no node: 6 more"
    assert "1 of 1 copies good, 0 silent" in said[-1]


# ---- schedule and signals ----


def start_loop(world: World, *flags: str) -> Process:
    arguments = ["server", "--port", str(world.port), "--range", "9", "--every", "600ms", *flags]
    server = Process(arguments, world.path, world.env)
    world.nodes.append(server)
    return server


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_schedule_until_a_signal(small: World, number: int, code: int) -> None:
    small.node()
    server = start_loop(small)
    wait_until(lambda: server.output.count("sweep of") == 2, what="two sweeps")
    began = time.monotonic()
    assert server.stop(number) == code
    assert time.monotonic() - began < AT_ONCE and "Traceback" not in server.output
    assert len(small.listed("127.0.0.9")) == 2


def test_schedule_goes_on_after_a_bad_sweep(small: World) -> None:
    server = start_loop(small)
    wait_until(lambda: "no node answered" in server.output, what="a sweep without a node")
    small.node()
    wait_until(lambda: "1 of 1 copies good" in server.output, what="a good sweep")
    assert server.stop() == 0


def test_schedule_goes_on_while_the_store_is_locked(small: World) -> None:
    small.node()
    small.sweep()
    with open(small.store / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = start_loop(small, "--lock-wait", "0s")
        wait_until(lambda: "locked by another run" in server.output, what="a sweep that is locked out")
    wait_until(lambda: "1 of 1 copies good" in server.output, what="a good sweep")
    assert server.stop() == 0


def test_signal_while_probing(small: World) -> None:
    with SilentAddresses(["127.0.0.9"], small.port):
        server = small.server("--timeout", "15s")
        wait_until(lambda: (small.store / "lock").exists(), what="the store")
        time.sleep(0.3)
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 130
    assert time.monotonic() - began < AT_ONCE
    assert "Traceback" not in server.output and "interrupted" in server.output


def find_incoming(store: Path) -> int:
    """Return the bytes in packs that are not sealed."""
    with_size = (path.stat().st_size for path in (store / "packs").glob("incoming-*"))
    return sum(with_size) if (store / "packs").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_middle_of_a_copy(world: World, number: int) -> None:
    (world.files / "a").write_text("small")
    (world.files / "big").write_bytes(os.urandom(64 << 20))
    node = world.node()
    server = world.server("--window", "1MiB")
    wait_until(lambda: find_incoming(world.store) > 6 << 20, what="some bytes")
    node.process.send_signal(signal.SIGSTOP)  # now it cannot be done before the signal
    began = time.monotonic()
    assert server.stop(number) == 130
    assert time.monotonic() - began < AT_ONCE and "Traceback" not in server.output
    node.process.send_signal(signal.SIGCONT)
    rows = world.listed("127.0.0.9")
    assert [(row["GRADE"], row["NOTE"]) for row in rows] == [("partial", "cut off: interrupted")]
    assert find_incoming(world.store) == 0
    report = world.sweep()
    assert report["nodes"][0]["snapshot"]["sent"] < 60 << 20
    assert (world.restore() / "files/big").read_bytes() == (world.files / "big").read_bytes()


# ---- the store in the way ----


def test_store_locked_by_a_run_that_deletes(small: World) -> None:
    small.node()
    small.sweep()
    holder = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(small.store / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        said = small.run(*small.server_flags("--lock-wait", "2s"), code=4)
        other.kill()
    assert said.stderr.count("\n") == 1 and "locked by another run" in said.stderr
    small.sweep()


def test_store_is_another_folder(small: World) -> None:
    said = small.run(*small.server_flags("--store", "files"), code=4)
    assert "not a zbackup store, and not empty" in said.stderr
    assert sorted(os.listdir(small.files)) == ["one", "two"]


@pytest.fixture
def disk(world: World) -> Iterator[Path]:
    """A filesystem of 8 MiB."""
    path = world.path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small filesystem can be mounted here: {done.stderr}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("pack_size", ["64MiB", "1MiB"])
def test_store_full(world: World, disk: Path, pack_size: str) -> None:
    (world.files / "a").write_text("small")
    (world.files / "big").write_bytes(os.urandom(20 << 20))
    flags = ("--store", str(disk / "store"), "--no-latest", "--pack-size", pack_size)
    world.node()
    said = world.run(*world.server_flags(*flags), code=4)
    lines = [line for line in said.stderr.splitlines() if not line.startswith("sweep of")]
    assert len(lines) == 1 and "full" in lines[0], said.stderr
    assert list((disk / "store/packs").glob("incoming-*")) == []
    again = world.run(*world.server_flags(*flags), code=4)
    assert "full" in again.stderr
    subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
    report = world.sweep(*flags)
    assert report["nodes"][0]["snapshot"]["grade"] == "stable"
    back = world.restore("127.0.0.9", "--store", str(disk / "store"))
    assert (back / "files/big").read_bytes() == (world.files / "big").read_bytes()
    assert check_store(disk / "store") >= 3


def test_store_full_before_it_is_made(world: World, disk: Path) -> None:
    (world.files / "a").write_text("small")
    world.node()
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, (8 << 20) - 4096 * 2)
    said = world.run(*world.server_flags("--store", str(disk / "store")), code=4)
    assert "full" in said.stderr
    (disk / "ballast").unlink()
    world.sweep("--store", str(disk / "store"))


def test_store_with_files_of_limited_size(world: World) -> None:
    (world.files / "big").write_bytes(os.urandom(6 << 20))
    world.node()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    said = world.run(*world.server_flags(), code=4, preexec_fn=limit)
    assert "cannot be written" in said.stderr and "too large" in said.stderr
    world.sweep()


def finish(server: Process) -> int:
    """Wait for a server in the background."""
    return server.process.wait(60)


def test_two_servers_at_once_on_one_node(world: World) -> None:
    (world.files / "big").write_bytes(os.urandom(40 << 20))
    world.node()
    servers = [world.server("--json"), world.server("--json")]
    codes = sorted(finish(server) for server in servers)
    assert codes in ([0, 0], [0, 4]), [server.output for server in servers]
    if 4 in codes:
        assert any("another run is copying 127.0.0.9" in server.output for server in servers)
    assert (world.restore() / "files/big").read_bytes() == (world.files / "big").read_bytes()
    assert check_store(world.store) >= 2


def test_two_servers_at_once_on_two_nodes(world: World) -> None:
    (world.path / "more").mkdir()
    world.node()
    world.node("--file", "more", address="127.0.0.10")
    world.sweep("--range", "9-10")
    for name in ("files", "more"):
        (world.path / name / "big").write_bytes(os.urandom(20 << 20))
    flags = ("--pack-size", "2MiB")  # so that both often write to the index
    servers = [world.server("--range", number, *flags) for number in ("9", "10")]
    assert [finish(server) for server in servers] == [0, 0], [server.output for server in servers]
    for folder, name in (("127.0.0.9", "files"), ("127.0.0.10", "more")):
        back = world.restore(folder, to=folder)
        assert (back / name / "big").read_bytes() == (world.path / name / "big").read_bytes()


def test_two_servers_at_once_one_has_just_made_a_folder(small: World) -> None:
    """What a first copy does first, seen by another run, or left by one that was killed there."""
    small.node()
    small.sweep()
    (small.store / "127.0.0.77" / "snapshots").mkdir(parents=True)
    assert small.sweep()["problems"] == []


# ---- hostile nodes: each costs only itself ----

PAGE = zbackup.PAGE
BASE = {"a": b"A" * (4 * PAGE) + b"tail"}  # what the nodes of the second round have honestly sent before


BOMB = {"more": False, "codec": zbackup.ZLIB, "size": 1 << 20}, zlib.compress(bytes(100 << 20), 9)


def one_item(status: str, data: bytes = b"", **more: Any) -> Callable[..., Answer]:
    return lambda *_: reading([{**make_item(b"honest"), "status": status, **more}], data)


def give_error(*_: Any) -> Answer:
    return "ERROR", {"code": "failed", "message": "the disk\n is \x1b[31mon fire"}, b""


def list_lines(*lines: bytes) -> Callable[..., Answer]:
    return lambda *_: listing(*lines)


def replace_path(path: bytes) -> bytes:
    return make_line("PATH").replace(b'"PATH"', path)


# How long a node may be silent; a handshake, too, takes long where 60 of them share a busy machine.
PATIENT = ("--answer-timeout", "4s", "--freeze-timeout", "4s")
FIRST: dict[str, tuple[dict[str, Callable[..., Answer]], str]] = {
    "working without end": ({"OPEN": lambda *_: "WORKING"}, "still working after 4 s"),
    "working in READ": ({"READ": lambda *_: "WORKING"}, "still working after 4 s"),
    "silence after OPEN": ({"LIST": lambda *_: None}, "did not answer within 4 s"),
    "silence at READ": ({"READ": lambda *_: None}, "did not answer within 4 s"),
    "wrong digest": ({"READ": one_item("whole", b"h0nest")}, "do not have the digest"),
    "short": ({"READ": one_item("whole", b"hone")}, "fewer bytes than its answer"),
    "same without base": ({"READ": one_item("same")}, "called a chunk the same"),
    "patch without base": ({"READ": one_item("patch", b"x", runs=[[0, 1]])}, "a patch for a chunk that we did not"),
    "bomb in LIST": ({"LIST": lambda *_: BOMB}, "longer than its 1048576 bytes"),
    "bomb in READ": (
        {"READ": lambda *_: ({"items": [make_item(b"honest")], **BOMB[0]}, BOMB[1])},
        "longer than its 1048576 bytes",
    ),
    "size beyond the limit": ({"LIST": lambda *_: ({"more": False, "codec": 1, "size": 1 << 40}, b"")}, "size"),
    "unknown codec": ({"LIST": lambda *_: ({"more": False, "codec": 9, "size": 3}, b"abc")}, "codec"),
    "out of order": ({"LIST": list_lines(make_line("b"), make_line("a"))}, "out of order"),
    "twice": ({"LIST": list_lines(make_line("a"), make_line("a"))}, "out of order"),
    "parent path": ({"LIST": list_lines(make_line("../a"))}, "not plain"),
    "inner parent path": ({"LIST": list_lines(make_line("f/../../a"))}, "not plain"),
    "absolute path": ({"LIST": list_lines(make_line("/etc/passwd"))}, "not plain"),
    "path with NUL": ({"LIST": list_lines(replace_path(b'"a\\u0000b"'))}, "NUL"),
    "path of a surrogate": ({"LIST": list_lines(replace_path(b'"a\\ud800"'))}, "characters that no file name has"),
    "not canonical": ({"LIST": list_lines(make_line("a").replace(b'":', b'": '))}, "not in its one right form"),
    "two keys": ({"LIST": list_lines(make_line("a")[:-1] + b',"size":5}')}, "not in its one right form"),
    "empty line": ({"LIST": list_lines(make_line("a"), b"", make_line("b"))}, "not JSON"),
    "too many items": (
        {"READ": lambda *_: reading([make_item(b"honest")] * 2, b"honest" * 2)},
        "answered 2 of 1 files",
    ),
    "no items": ({"READ": lambda *_: reading([], b"")}, "answered 0 of 1 files"),
    "too many bytes": ({"READ": lambda *_: reading([make_item(b"honest")], b"honest and more")}, "more bytes"),
    "body beyond the limit": ({"READ": lambda *_: reading([make_item(b"honest")], bytes(3 << 20))}, "beyond the limit"),
    "message beyond all limits": ({"READ": lambda *_: reading([make_item(b"honest")], bytes(5 << 20))}, "lost"),
    "length zero": ({"READ": one_item("whole", length=0)}, "wrong value of length"),
    "another file's line": ({"READ": one_item("whole", b"honest", line=make_line("b").decode())}, "another file"),
    "state of text": ({"READ": one_item("whole", b"honest", state=["x"])}, "wrong value of state"),
    "three frames": ({"LIST": lambda *_: [b"{}", b"", b""]}, "3 frames"),
    "head of garbage": ({"LIST": lambda *_: [b"\xff\xfe", b""]}, "no message"),
    "answer to nothing": ({"LIST": lambda *_: zbackup.encode_message("LIST", 99, {})}, "nobody asked for"),
    "error at OPEN": ({"OPEN": give_error}, "the disk\\n is \\x1b[31mon fire"),
    "error at LIST": ({"LIST": give_error}, "on fire"),
    "error at READ": ({"READ": give_error}, "on fire"),
    "unknown status": ({"READ": one_item("banana")}, "status"),
    "zstd of nothing": ({"LIST": lambda *_: ({"more": False, "codec": 2, "size": 3}, b"abc")}, ""),
}


def patch_item(data: bytes, runs: list[list[int]], new: bytes) -> Callable[..., Answer]:
    """Answer a patch of BASE that claims to give `new`."""
    return lambda *_: reading([{**make_item(new), "status": "patch", "runs": runs}], data)


def patch_of_hashes(count: int) -> dict[str, Callable[..., Answer]]:
    """Answer a patch without bytes to a file that has grown: its digest is of page hashes that no content has."""
    pages = zbackup.hash_pages(BASE["a"]) + bytes(zbackup.PAGE_HASH * count)
    length = len(pages) // zbackup.PAGE_HASH * PAGE
    what = {"digest": zbackup.digest_pages(pages).hex(), "status": "patch", "runs": []}
    item = {**make_item(bytes(length), inode=2), **what}
    return {"LIST": list_lines(make_line("a", length, inode=2)), "READ": lambda *_: reading([item], b"")}


CHANGED = b"B" * PAGE + BASE["a"][PAGE:]
SECOND: dict[str, tuple[dict[str, Callable[..., Answer]], str]] = {
    "patch with other bytes": ({"READ": patch_item(b"C" * PAGE, [[0, 1]], CHANGED)}, "does not give the digest"),
    "patch at another page": ({"READ": patch_item(b"B" * PAGE, [[1, 1]], CHANGED)}, "does not give the digest"),
    "patch with few bytes": ({"READ": patch_item(b"B" * 9, [[0, 1]], CHANGED)}, "does not give the digest"),
    "patch with many bytes": ({"READ": patch_item(b"B" * PAGE * 2, [[0, 1]], CHANGED)}, "more bytes"),
    "patch beyond the end": ({"READ": patch_item(b"B" * PAGE, [[9, 1]], CHANGED)}, "wrong value of runs"),
    "patch that overlaps": (
        {"READ": patch_item(b"B" * PAGE * 2, [[0, 2], [1, 1]], CHANGED)},
        "wrong value of runs",
    ),
    "patch backwards": ({"READ": patch_item(b"B" * PAGE, [[0, -1]], CHANGED)}, "wrong value of runs"),
    "same as another": ({"READ": lambda *_: reading([{**make_item(CHANGED), "status": "same"}], b"")}, "the same"),
    "same but longer": (
        {"READ": lambda *_: reading([{**make_item(BASE["a"]), "status": "same", "length": 99}], b"")},
        "the same",
    ),
}
ADDRESSES = {name: f"127.0.0.{20 + i}" for i, name in enumerate([*FIRST, *SECOND])}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, dict[str, Any]]]:
    """A store after a sweep over an honest node and all of the hostile ones, and that sweep's report."""
    world = World(tmp_path_factory.mktemp("attacked"))
    (world.files / "one").write_bytes(os.urandom(3 << 20))
    world.node()
    fakes = {name: FakeNode(ADDRESSES[name], world.port, **answers) for name, (answers, _) in FIRST.items()}
    for name in SECOND:
        fakes[name] = FakeNode(ADDRESSES[name], world.port, files=dict(BASE))
    for fake in fakes.values():
        fake.start()
    try:
        numbers = f"9,{20 + len(FIRST)}-{19 + len(FIRST) + len(SECOND)}"
        world.sweep("--range", numbers, "--jobs", "20", "--no-latest")
        (world.files / "one").write_bytes(os.urandom(3 << 20))
        for name, (answers, _) in SECOND.items():
            fakes[name].answers = {"LIST": list_lines(make_line("a", len(CHANGED), inode=2)), **answers}
        flags = (*PATIENT, "--jobs", "60")
        report = world.sweep("--range", f"9,20-{19 + len(fakes)}", *flags, code=None)
        yield world, report
    finally:
        for fake in fakes.values():
            fake.close()
        world.close()


@pytest.mark.parametrize("name", ADDRESSES)
def test_hostile_node(attacked: tuple[World, dict[str, Any]], name: str) -> None:
    row = find_row(attacked[1], ADDRESSES[name])
    said = row["error"] + json.dumps((row["snapshot"] or {}).get("problems")) + json.dumps(row["problems"])
    assert {**FIRST, **SECOND}[name][1] in said
    assert row["exit_code"] == 1, said
    assert not row["snapshot"] or row["snapshot"]["grade"] == "partial"


def test_hostile_nodes_leave_the_others_alone(attacked: tuple[World, dict[str, Any]]) -> None:
    world, report = attacked
    row = find_row(report, "127.0.0.9")
    assert (row["exit_code"], row["snapshot"]["grade"]) == (0, "stable")
    assert (world.restore() / "files/one").read_bytes() == (world.files / "one").read_bytes()
    assert {row["exit_code"] for row in report["nodes"]} == {0, 1}
    assert report["exit_code"] == 1


def test_hostile_nodes_leave_the_store_whole(attacked: tuple[World, dict[str, Any]]) -> None:
    assert check_store(attacked[0].store) > 0
    assert "\x1b" not in json.dumps(attacked[1])


@pytest.mark.parametrize("count", [1, 100])
def test_hostile_node_patches_to_no_content(world: World, count: int) -> None:
    with FakeNode("127.0.0.9", world.port, files=dict(BASE)) as fake:
        world.sweep()
        fake.answers = patch_of_hashes(count)
        row = world.sweep(code=None)["nodes"][0]
    assert (row["snapshot"] or {}).get("grade") != "stable"
    assert row["exit_code"] == 1
    check_store(world.store)


# ---- content that moved ----

CHUNK = zbackup.CHUNK
Twist = Callable[[dict[str, Any], dict[str, Any], bytes], Answer]  # file asked for, item and bytes -> what is said


def serve_chunks(data: bytes, twist: Twist | None = None) -> dict[str, Callable[..., Answer]]:
    """Return the answers of an honest node with one large file, but for what `twist` makes of each."""

    def answer_one(file: dict[str, Any]) -> Answer:
        chunk = data[file["chunk"] * CHUNK : (file["chunk"] + 1) * CHUNK]
        item, raw = {**make_item(chunk), "size": len(data), "state": [len(data), 1, 1, 2]}, chunk
        if "need" in file:
            item["status"], raw = "part", b"".join(chunk[f * PAGE : (f + n) * PAGE] for f, n in file["need"])
        elif file.get("tell"):
            item["status"], raw = "pages", zbackup.encode_told(chunk, zbackup.hash_pages(chunk))
        return twist(file, item, raw) if twist else ([item], raw)

    def answer(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Answer:
        said = [answer_one(file) for file in asked["files"]]
        return reading([item for items, _ in said for item in items], b"".join(raw for _, raw in said))

    return {"LIST": list_lines(make_line("a", len(data), inode=2)), "READ": answer}


def twist_told(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Twist:
    """Change what is told of a chunk."""

    def twist(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        item, raw = change(item, raw) if item["status"] == "pages" else (item, raw)
        return [item], raw

    return twist


def twist_part(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Twist:
    """Change the part that was needed."""

    def twist(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        item, raw = change(item, raw) if item["status"] == "part" else (item, raw)
        return [item], raw

    return twist


MOVED = os.urandom(2 * CHUNK + 999)
LATER = b"in front" + MOVED
KNOWN = {"digest": make_item(MOVED[:CHUNK])["digest"], "length": CHUNK - 1}
TWISTS: dict[str, tuple[Twist, str]] = {
    "told too little": (twist_told(lambda item, raw: (item, raw[:-1])), "fewer bytes than its answer"),
    "told too much": (twist_told(lambda item, raw: (item, raw + b"x")), "more bytes than its answer"),
    "told nothing": (twist_told(lambda item, raw: (item, b"")), "fewer bytes than its answer"),
    "told hashes of other pages": (
        twist_told(lambda item, raw: (item, bytes([raw[0] ^ 1]) + raw[1:])),
        "do not give the digest",
    ),
    "told another digest": (
        twist_told(lambda item, raw: ({**item, "digest": "00" * 32}, raw)),
        "do not give the digest",
    ),
    "told a length beyond a chunk": (
        twist_told(lambda item, raw: ({**item, "length": CHUNK + 1}, raw)),
        "wrong value of length",
    ),
    "told a known chunk of another length": (
        twist_told(lambda item, raw: ({**item, **KNOWN}, zbackup.encode_told(MOVED, zbackup.hash_pages(MOVED))[:8192])),
        "called a chunk the same",
    ),
    "a part that nobody needs": (twist_told(lambda item, raw: ({**item, "status": "part"}, raw)), "status"),
    "told again": (twist_part(lambda item, raw: ({**item, "status": "pages"}, raw)), "wrong value of status"),
    "whole where a part is needed": (twist_part(lambda item, raw: ({**item, "status": "whole"}, raw)), "status"),
    "same where a part is needed": (twist_part(lambda item, raw: ({**item, "status": "same"}, b"")), "status"),
    "patch where a part is needed": (twist_part(lambda item, raw: ({**item, "status": "patch"}, b"")), "status"),
    "part too short": (twist_part(lambda item, raw: (item, raw[:-1])), "fewer bytes than its answer"),
    "part too long": (twist_part(lambda item, raw: (item, raw + b"x")), "more bytes than its answer"),
    "part without a length": (
        twist_part(lambda item, raw: ({k: v for k, v in item.items() if k != "length"}, raw)),
        "wrong value of length",
    ),
}


@pytest.mark.parametrize("name", TWISTS)
def test_hostile_node_tells_wrongly(world: World, name: str) -> None:
    with FakeNode("127.0.0.9", world.port, **serve_chunks(MOVED)) as fake:
        world.sweep("--no-latest")
        fake.answers = {**serve_chunks(LATER, TWISTS[name][0]), "LIST": list_lines(make_line("a", len(LATER), inode=2))}
        row = world.sweep("--no-latest", "--answer-timeout", "2s", code=1)["nodes"][0]
    assert TWISTS[name][1] in row["error"]
    assert check_store(world.store) >= 1


def test_hostile_node_tells_unasked(world: World) -> None:
    def twist(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        return [{**item, "status": "pages"}], zbackup.encode_told(raw, zbackup.hash_pages(raw))

    with FakeNode("127.0.0.9", world.port, **serve_chunks(MOVED, twist)):
        row = world.sweep("--no-latest", code=1)["nodes"][0]
    assert "wrong value of status" in row["error"]


def test_node_tells_of_what_moved(world: World) -> None:
    needed: list[Any] = []

    def watch(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        needed.append(file.get("need", file.get("tell")))
        return [item], raw

    with FakeNode("127.0.0.9", world.port, **serve_chunks(MOVED, watch)) as fake:
        world.sweep("--no-latest")
        fake.answers = serve_chunks(LATER, watch)
        world.sweep("--no-latest")
    assert needed[:3] == [None] * 3  # nothing is asked for twice at the first copy
    assert sorted(needed[3:], key=str) == [True, True, True, [[0, 1]]]
    assert (world.restore() / "a").read_bytes() == LATER


@pytest.mark.parametrize("how", ["other bytes", "shorter", "zeros", "end", "later", "lost"])
def test_node_changes_a_file_after_it_has_told_of_it(world: World, how: str) -> None:
    changed: list[str] = []

    def twist(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        if item["status"] != "part" or changed:
            return [item], raw
        changed.append(how)
        if how == "other bytes":
            return [item], raw[:-1] + bytes([raw[-1] ^ 1])
        if how == "shorter":
            return [{**item, "length": 3}], b"abc"
        return [{**item, "status": how, "count": 1}], b""

    with FakeNode("127.0.0.9", world.port, **serve_chunks(MOVED)) as fake:
        world.sweep("--no-latest")
        fake.answers = serve_chunks(LATER, twist)
        snapshot = world.sweep("--no-latest", "--pause", "10ms")["nodes"][0]["snapshot"]
    assert changed and snapshot["grade"] == "stable"
    assert (world.restore() / "a").read_bytes() == LATER
    check_store(world.store)


def test_node_changes_a_file_each_time_it_has_told_of_it(world: World) -> None:
    twist = twist_part(lambda item, raw: (item, raw[:-1] + bytes([raw[-1] ^ 1])))
    with FakeNode("127.0.0.9", world.port, **serve_chunks(MOVED)) as fake:
        world.sweep("--no-latest")
        fake.answers = serve_chunks(LATER, twist)
        snapshot = world.sweep("--no-latest", "--pause", "10ms", code=1)["nodes"][0]["snapshot"]
    assert snapshot["grade"] == "torn"  # asked for plainly in the end, so that all of it is there
    assert (world.restore(code=None) / "a").read_bytes() == LATER
    check_store(world.store)


def test_answers_come_late_and_holes_between_them(world: World) -> None:
    """What is asked for twice arrives after what follows it, a hole of several chunks among that."""
    data = os.urandom(CHUNK) + bytes(3 * CHUNK) + os.urandom(2 * CHUNK + 9)
    later = os.urandom(CHUNK // 2) + data[: CHUNK // 2] + data[CHUNK:] + b"x"

    def twist(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        zeros = {1: 2, 2: 1, 3: 1}.get(file["chunk"])  # one answer covers what the next ones tell of, too
        return ([{**item, "status": "zeros", "count": zeros}], b"") if zeros else ([item], raw)

    with FakeNode("127.0.0.9", world.port, **serve_chunks(data, twist)) as fake:
        world.sweep("--no-latest")
        fake.answers = serve_chunks(later, twist)
        assert world.sweep("--no-latest")["nodes"][0]["snapshot"]["grade"] == "stable"
    assert (world.restore() / "a").read_bytes() == later


def test_answers_tell_of_a_hole_and_of_an_end_of_it(world: World) -> None:
    """What one answer said of the chunks behind it is overtaken by a later one, about the chunk before it."""
    start = os.urandom(7 * CHUNK)  # the hole begins with the last chunk of one question, and the next has one chunk
    old = start + os.urandom(3 * CHUNK) + bytes(CHUNK) + os.urandom(3 * CHUNK)
    data = start + b"moved" + old[7 * CHUNK : 8 * CHUNK - 5] + bytes(3 * CHUNK) + old[11 * CHUNK :] + b"end"
    asked: list[int] = []

    def twist(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        asked.append(file["chunk"])
        if item["status"] == "part":
            return [item], bytes(len(raw))
        if file["chunk"] == 7 and not file.get("tell"):
            return [{**item, "status": "zeros", "count": 2}], b""
        zeros = {8: 3, 9: 1, 10: 1}.get(file["chunk"])
        return ([{**item, "status": "zeros", "count": zeros}], b"") if zeros else ([item], raw)

    def twist_old(file: dict[str, Any], item: dict[str, Any], raw: bytes) -> Answer:
        return ([{**item, "status": "zeros", "count": 1}], b"") if file["chunk"] == 10 else ([item], raw)

    with FakeNode("127.0.0.9", world.port, **serve_chunks(old, twist_old)) as fake:
        world.sweep("--no-latest")
        fake.answers = serve_chunks(data, twist)
        flags = ("--no-latest", "--tries", "1", "--window", "2MiB")
        assert world.sweep(*flags, code=1)["nodes"][0]["snapshot"]["grade"] == "torn"
    assert asked.count(7) == 3 and asked.index(11) < asked.index(10)
    assert (world.restore(code=None) / "a").read_bytes() == start + bytes(2 * CHUNK) + data[9 * CHUNK :]


# ---- the search for it ----


@contextlib.contextmanager
def open_reader(path: Path) -> Iterator[zbackup.Receiver]:
    """Yield what takes chunks into a new store."""
    with contextlib.closing(zbackup.open_store(str(path), create=True)) as store:
        reader, writer = store.reader(), zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
        reader.open_pack = writer
        yield zbackup.Receiver(reader, writer)
        writer.abandon()
        reader.close()


def tell(chunk: bytes) -> zbackup.Told:
    """Return what a node tells of a chunk."""
    hashes = zbackup.hash_pages(chunk)
    return zbackup.decode_told(zbackup.digest_pages(hashes), len(chunk), zbackup.encode_told(chunk, hashes))


def find_all(receiver: zbackup.Receiver, old: bytes, new: bytes) -> int:
    """Look for the chunks of new content in an old one; checks what is put, and returns the bytes that were needed."""
    chunks = tuple(receiver.writer.put_chunk(old[at : at + CHUNK]) for at in range(0, len(old), CHUNK))
    finder = zbackup.Finder(receiver.reader, zbackup.Content(len(old), chunks))
    needed = 0
    for number in range(zbackup.count_chunks(len(new))):
        chunk = new[number * CHUNK : (number + 1) * CHUNK]
        told = tell(chunk)
        plan = finder.find(number, told, len(new))
        assert plan.hashes == b"".join(zbackup.hash_pages(chunk[start:end]) for start, end in plan.need)
        assert receiver.put_moved(plan, b"".join(chunk[start:end] for start, end in plan.need))
        assert receiver.reader.get(told.digest) == chunk
        needed += plan.size
    return needed


PARTS = st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 40_000), st.integers(0, 6)), max_size=6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 9), st.integers(1, 2 * CHUNK + 50_000), PARTS)
def test_search_gives_exactly_the_bytes(seed: int, size: int, parts: list[tuple[int, int, int]]) -> None:
    choice = random.Random(seed)
    few = [choice.randbytes(50) for _ in range(3)] + [bytes(4096), b" " * 900]
    old = choice.randbytes(size) if seed % 2 else b"".join(choice.choices(few, k=1 + size // 1000))[:size]
    new = old
    for at, count, how in parts:  # inserted, deleted, or put elsewhere
        piece = choice.randbytes(count) if how < 3 else new[at : at + count] if how < 5 else b""
        new = new[:at] + piece + new[at + (0 if how in (0, 3) else count) :]
    with tempfile.TemporaryDirectory() as folder, open_reader(Path(folder) / "store") as receiver:
        find_all(receiver, old, new or b"x")


def test_search_finds_nothing_in_lost_content(tmp_path: Path) -> None:
    data = os.urandom(CHUNK)
    with open_reader(tmp_path / "store") as receiver:
        for chunk in (b"lost".ljust(zbackup.DIGEST), 1):
            finder = zbackup.Finder(receiver.reader, zbackup.Content(CHUNK, (chunk,)))
            assert finder.find(0, tell(data), CHUNK).need == [(0, CHUNK)]
            assert finder.find(0, tell(bytes(CHUNK)), CHUNK).need == [(0, CHUNK)]  # no chunk to draw zeros from


def test_search_whose_old_content_is_lost_meanwhile(tmp_path: Path) -> None:
    old = os.urandom(2 * CHUNK)
    with open_reader(tmp_path / "store") as receiver:
        chunks = tuple(receiver.writer.put_chunk(old[at : at + CHUNK]) for at in (0, CHUNK))
        finder = zbackup.Finder(receiver.reader, zbackup.Content(len(old), chunks))
        plan = finder.find(0, tell(old[9 : CHUNK + 9]), len(old) - 9)
        assert not plan.need
        plan.old._chunks.clear()
        receiver.reader.distrusted.add(chunks[1])
        assert not receiver.put_moved(plan)
        assert plan.without_old().need == [(0, CHUNK)]


def fail(error: Exception) -> Callable[..., Any]:
    """Return a function that raises."""

    def run(*_: Any) -> Any:
        raise error

    return run


def test_moved_chunk_whose_old_content_is_lost_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.urandom(2 * CHUNK)
    with open_reader(tmp_path / "store") as receiver:
        chunks = tuple(receiver.writer.put_chunk(old[at : at + CHUNK]) for at in (0, CHUNK))
        intake: Any = SimpleNamespace(reader=receiver.reader, writer=receiver.writer, receiver=receiver)
        slot = zbackup.Slot(make_line("a", len(old)), None, None)
        table = zbackup.ChunkTable(receiver.reader, zbackup.Content(len(old), chunks))
        reading = zbackup.Reading(intake, slot, [table], last=False)
        told = tell(old[9 : CHUNK + 9])
        monkeypatch.setattr(zbackup.OldContent, "runs", lambda *_: [])
        want, got = zbackup.Want(slot, 0, None, b"", tell=True), zbackup.Got("pages", zbackup.Fields("{}", "x"))
        reading._find(want, got, told)
        [again] = reading._again
        assert again.plan and again.plan.need == [(0, CHUNK)] and not again.tell
        part = tell(old[9 : CHUNK // 2] + os.urandom(CHUNK // 2))
        plan = zbackup.Finder(receiver.reader, table.content).find(0, part, CHUNK)
        item = zbackup.Fields(json.dumps({"length": part.length}), "x")
        needed = memoryview(b"".join((old[9 : CHUNK // 2] + bytes(CHUNK))[start:end] for start, end in plan.need))
        assert receiver._take_part(item, want, plan, needed)[0].status == "later"


def test_told_digest_that_cannot_be_read_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(5000)
    with open_reader(tmp_path / "store") as receiver:
        digest = receiver.writer.put_chunk(data)
        assert receiver._is_known(digest, len(data))
        with monkeypatch.context() as patched:
            patched.setattr(receiver.reader, "runs", fail(zbackup.StoreError("damaged")))
            runs = [zbackup.Run(digest, 0, 9)]
            assert receiver._draw_from_whole(runs, digest) == runs
            assert digest in receiver.reader.distrusted
            receiver.reader.distrusted.clear()
            assert not receiver._is_known(digest, len(data))
        assert digest in receiver.reader.distrusted


def test_overwritten_pages_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing old is read for a chunk most of which stands where it stood, its end too."""
    old, page = os.urandom(CHUNK), zbackup.PAGE

    def find(*changed: tuple[int, int]) -> zbackup.Plan:
        new = bytearray(old)
        for start, end in changed:
            new[start:end] = os.urandom(end - start)
        finder = zbackup.Finder(receiver.reader, zbackup.Content(CHUNK, (digest,)))
        return finder.find(0, tell(bytes(new)), CHUNK, zbackup.hash_pages(old))

    with open_reader(tmp_path / "store") as receiver:
        digest = receiver.writer.put_chunk(old)
        with monkeypatch.context() as patched:
            patched.setattr(receiver.reader, "get", fail(AssertionError("read")))
            for changed in ([(0, 9 * page)], [(3 * page, 5 * page), (9 * page, 120 * page)]):
                plan = find(*changed)
                assert plan.in_place and plan.need == changed
        for start, end in ((255 * page, CHUNK), (0, 160 * page)):
            plan = find((start, end))
            assert not plan.in_place and plan.need == [(start, end)]


def test_search_ends_where_the_store_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_reader(tmp_path / "store") as receiver:
        digest = receiver.writer.put_chunk(os.urandom(5000))
        finder = zbackup.Finder(receiver.reader, zbackup.Content(5000, (digest,)))
        monkeypatch.setattr(receiver.reader, "get", fail(zbackup.FullStore("full")))
        with pytest.raises(zbackup.FullStore):
            finder.find(0, tell(b"x" * 9000), 9000)


@pytest.mark.parametrize("unit", [b"\0" * 15 + b"\1", b"a" * 16, b"ab" * 8, b"0123456789abcdef"])
def test_search_for_needles_that_stand_everywhere_ends_soon(tmp_path: Path, unit: bytes) -> None:
    old = unit * (3 * CHUNK // 16)
    new = b"".join(unit + os.urandom(8) + unit * 254 + b"12345678" for _ in range(256))
    with open_reader(tmp_path / "store") as receiver:
        began = time.process_time()
        find_all(receiver, old, new)
        assert time.process_time() - began < 2  # some 0.1 s for the search


def test_search_gives_up_on_new_content(tmp_path: Path) -> None:
    with open_reader(tmp_path / "store") as receiver:
        chunk = receiver.writer.put_chunk(os.urandom(CHUNK))
        finder = zbackup.Finder(receiver.reader, zbackup.Content(60 * CHUNK, (chunk, 59)))
        told = tell(os.urandom(CHUNK))
        worth = []
        for number in range(60):
            worth.append(finder.is_worth(number))
            if worth[-1]:
                finder.find(number, told, 60 * CHUNK)
        assert [number for number in range(60) if worth[number]] == [*range(17), 32, 48]
        assert not finder.is_worth(64)  # beyond the old end, and nothing has moved
        finder.note_known()
        assert finder.is_worth(33) and finder.is_worth(64)


@pytest.mark.parametrize("at_end", [False, True])
def test_count_equal(at_end: bool) -> None:
    for one, other in ((b"", b"a"), (b"abc", b"abd"), (b"abc", b"xbc"), (b"aaaa", b"aa"), (b"same", b"same")):
        same = [n for n in range(5) if n <= min(len(one), len(other))]
        cut = (lambda b, n: b[len(b) - n :]) if at_end else (lambda b, n: b[:n])
        assert zbackup.count_equal(one, other, at_end) == max(n for n in same if cut(one, n) == cut(other, n))


# ---- more hostile nodes ----


def sweep_against(world: World, fake: FakeNode) -> int:
    """Sweep over a hostile node with little memory and no patience; returns the exit code."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    with fake:
        command = [
            sys.executable,
            str(PROGRAM),
            *world.server_flags("--freeze-timeout", "1s", "--answer-timeout", "1s"),
        ]
        done = subprocess.run(command, cwd=world.path, env=world.env, capture_output=True, timeout=60, preexec_fn=limit)
    assert b"Traceback" not in done.stderr
    return done.returncode


def test_hostile_node_lists_nothing_without_end(world: World) -> None:
    assert sweep_against(world, FakeNode("127.0.0.9", world.port, LIST=lambda *_: listing(more=True))) == 1


def test_hostile_node_has_zeros_without_end(world: World) -> None:
    state = [1 << 62, 1, 1, 1]
    item = {"size": 1 << 62, "grade": "stable", "state": state, "status": "zeros", "count": 1 << 42}
    answers = {"LIST": list_lines(make_line("a", 1 << 62)), "READ": lambda *_: reading([item], b"")}
    assert sweep_against(world, FakeNode("127.0.0.9", world.port, **answers)) == 1


def test_hostile_node_does_not_keep_the_server_from_ending(world: World) -> None:
    def answer(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Answer:
        return listing(make_line(f"{len(fake.asked):09}"), more=True)

    with FakeNode("127.0.0.9", world.port, LIST=answer) as fake:
        server = world.server()
        wait_until(lambda: fake.asked.count("LIST") > 100, what="a conversation without end")
        assert server.stop() == 130


def test_node_ends_the_copy_badly(world: World) -> None:
    with FakeNode("127.0.0.9", world.port, CLOSE=give_error):
        report = world.sweep(code=1)
    row = report["nodes"][0]
    assert row["snapshot"]["grade"] == "stable"
    assert "did not end it: the disk" in row["problems"][0]["message"]


def test_node_busy_with_other_servers(small: World) -> None:
    (small.files / "big").write_bytes(os.urandom(30 << 20))
    node = small.node("--sessions", "1")
    first = small.server("--store", "first", "--window", "1MiB")
    wait_until(lambda: find_incoming(small.path / "first") > 1 << 20, what="the first copy")
    first.process.send_signal(signal.SIGSTOP)
    report = small.sweep(code=1)
    assert "serves 1 servers already" in report["nodes"][0]["error"]
    assert report["nodes"][0]["snapshot"] is None
    first.process.send_signal(signal.SIGCONT)
    assert finish(first) == 0 and node.process.poll() is None


def hide_zstd(world: World) -> dict[str, str]:
    """Return an environment in which Python has no zstd."""
    for package in ("backports", "compression"):
        (world.path / "hidden" / package).mkdir(parents=True)
        (world.path / "hidden" / package / "__init__.py").touch()
        (world.path / "hidden" / package / "zstd.py").write_text("raise ImportError('hidden')")
    return {**world.env, "PYTHONPATH": path_before(world.path / "hidden")}


def test_hostile_node_sends_a_codec_that_the_server_has_not(world: World) -> None:
    world.env = hide_zstd(world)
    with FakeNode("127.0.0.9", world.port, LIST=FIRST["zstd of nothing"][0]["LIST"]):
        row = world.sweep(code=None)["nodes"][0]
    assert row["error"] and row["exit_code"] == 1  # the node's fault, not the store's


# ---- honest nodes whose files move under the reading ----


def in_turn(*answers: Callable[..., Answer]) -> Callable[..., Answer]:
    """Give one answer after the other, and the last one from then on."""
    waiting = list(answers)
    return lambda *asked: (waiting.pop(0) if len(waiting) > 1 else waiting[0])(*asked)


@pytest.mark.parametrize("status", ["later", "lost"])
def test_node_puts_a_file_off(world: World, status: str) -> None:
    with FakeNode("127.0.0.9", world.port, READ=in_turn(one_item(status), one_item(status), FakeNode.honest)):
        row = world.sweep("--pause", "10ms")["nodes"][0]
    assert (row["snapshot"]["files"], row["snapshot"]["grade"]) == (1, "stable")
    assert (world.restore() / "a").read_bytes() == b"honest"


def test_node_puts_a_file_off_for_ever(world: World) -> None:
    with FakeNode("127.0.0.9", world.port, READ=one_item("later")) as fake:
        row = world.sweep("--pause", "10ms", code=1)["nodes"][0]
    assert row["snapshot"]["problems"] == [{"path": "a", "message": "changed too often to be read to its end"}]
    assert row["snapshot"]["grade"] == "partial" and fake.asked.count("READ") == 6


def test_node_deletes_a_file_that_it_listed(world: World) -> None:
    files = {"a": b"1", "b": b"2"}

    def answer(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Answer:
        return reading([{"status": "gone"}, make_item(b"2")], b"2")

    with FakeNode("127.0.0.9", world.port, files, READ=answer):
        snapshot = world.sweep()["nodes"][0]["snapshot"]
    assert (snapshot["files"], snapshot["failed"], snapshot["grade"]) == (1, 0, "stable")
    assert sorted(os.listdir(world.restore())) == ["b"]


@pytest.mark.parametrize("status", ["gone", "error"])
def test_node_loses_a_large_file_in_the_middle(world: World, status: str) -> None:
    size = 3 << 20
    state = [size, 1, 1, 1]
    first = {**make_item(b"x" * (1 << 20)), "size": size, "state": state}
    answers = {
        "LIST": list_lines(make_line("a", size)),
        "READ": in_turn(lambda *_: reading([first], b"x" * (1 << 20)), one_item(status, error="it burnt")),
    }
    with FakeNode("127.0.0.9", world.port, **answers):
        snapshot = world.sweep("--window", "1MiB", code=int(status == "error"))["nodes"][0]["snapshot"]
    assert [problem["message"] for problem in snapshot["problems"]] == ["it burnt"] * (status == "error")
    assert snapshot["files"] == int(status == "error")  # named as unreadable, or gone as it may


def test_node_has_a_file_that_shrank(world: World) -> None:
    size = 3 << 20
    first = {**make_item(b"x" * (1 << 20)), "size": size, "state": [size, 1, 1, 1]}
    end = {"status": "end", "state": [size, 1, 1, 1]}
    answers = {
        "LIST": list_lines(make_line("a", size)),
        "READ": in_turn(lambda *_: reading([first], b"x" * (1 << 20)), lambda *_: reading([end], b"")),
    }
    with FakeNode("127.0.0.9", world.port, **answers):
        world.sweep("--window", "1MiB", code=None)
    assert (world.restore(code=None) / "a").stat().st_size == 1 << 20


def test_node_finds_fault_with_a_file(world: World) -> None:
    with FakeNode("127.0.0.9", world.port, READ=one_item("whole", b"honest", note="half of it is damaged")):
        snapshot = world.sweep(code=1)["nodes"][0]["snapshot"]
    assert (snapshot["grade"], snapshot["torn"]) == ("torn", 1)
    assert snapshot["problems"] == [{"path": "a", "message": "half of it is damaged"}]


# ---- a server that runs for weeks ----


@pytest.mark.parametrize("keyed", [True, False])
def test_schedule_makes_no_new_store_where_the_disk_went_away(small: World, keyed: bool) -> None:
    """The mount point of a disk that is not mounted is an empty folder."""
    small.run("key", "--store", "elsewhere")
    small.node()
    server = start_loop(small, *([] if keyed else ["--key-file", "elsewhere/keys/server"]))
    wait_until(lambda: "1 of 1 copies good" in server.output, what="a good sweep")
    small.store.rename(small.path / "away")
    small.store.mkdir()
    wait_until(lambda: "is not a zbackup store" in server.output, what="a sweep without the disk")
    assert os.listdir(small.store) == [] and "is its disk mounted?" in server.output
    small.store.rmdir()
    (small.path / "away").rename(small.store)
    before = server.output.count("1 of 1 copies good")
    wait_until(lambda: server.output.count("1 of 1 copies good") > before, what="a good sweep again")
    assert server.stop() == 0


def test_sweep_that_may_make_no_store(small: World) -> None:
    small.node()
    done = small.run(*small.server_flags("--no-create"), code=4)
    assert "it has no zbackup.json; is its disk mounted?" in done.stderr and not small.store.exists()
    small.sweep()
    small.sweep("--no-create")


def test_schedule_makes_a_store_that_could_not_be_made_at_first(small: World) -> None:
    small.node()
    small.store.write_text("in the way")
    server = start_loop(small)
    wait_until(lambda: "cannot be opened" in server.output or "Not a directory" in server.output, what="a failed sweep")
    small.store.unlink()
    wait_until(lambda: "1 of 1 copies good" in server.output, what="a good sweep")
    assert server.stop() == 0


def test_no_create_makes_no_folder_for_another_user_either(small: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    arguments = zbackup.read_arguments(
        [
            "server",
            "--no-create",
            "--user",
            "nobody",
            "--once",
            "--range",
            "9",
            "--store",
            str(small.path / "media/disk/backups"),
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zbackup, "become_user", lambda user: True)
        assert zbackup.run_server(arguments) == 4
    assert not (small.path / "media").exists()


FAULT = """
import errno, os, sys, zbackup
name, path, most = sys.argv[1:4]
count = 0

def look(event, arguments):
    global count
    if event == name and os.fsdecode(arguments[0] or "") == path:
        count += 1
        if count == int(most):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

sys.addaudithook(look)
sys.exit(zbackup.main(sys.argv[4:]))
"""


@pytest.mark.parametrize("number", [2, 5])
def test_schedule_goes_on_after_a_fault_of_the_disk(small: World, number: int) -> None:
    """Of a call that no copy makes."""
    small.node()
    small.sweep()
    flags = ["server", "--port", str(small.port), "--range", "9", "--every", "600ms", "--latest-jobs", "1"]
    with open(small.path / "log", "wb") as log:
        command = [sys.executable, "-c", FAULT, "os.listdir", "backups", str(number), *flags, "--keep", "last 1"]
        server = subprocess.Popen(command, cwd=small.path, env=uncovered(small.env), stdout=log, stderr=log)
    try:
        read = (small.path / "log").read_text
        wait_until(lambda: "Input/output error" in read(), what="the fault")
        before = read().count("1 of 1 copies good")
        wait_until(lambda: read().count("1 of 1 copies good") > before, what="a good sweep")
    finally:
        server.terminate()
        assert server.wait(20) == 0
    assert "Traceback" not in read() and "cut off: Input/output error" in read()


def test_reports_that_cannot_be_written_end_no_copy(small: World) -> None:
    small.node()
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(PROGRAM), *small.server_flags()]
        done = subprocess.run(command, cwd=small.path, env=small.env, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1  # and not 0: who reads the reports must know that one is lacking
    assert len(small.listed(FOLDER)) == 1


def test_missing_node_that_was_seen_by_a_wrong_clock() -> None:
    """Ten years ahead: it must not pass for one that was just here until then."""
    known = [zbackup.Known(FOLDER, "0" * 32, addresses=(FOLDER,), last_seen=10 * 365 * 86400 * 10**9)]
    silent = [zbackup.Probe(zbackup.Address(FOLDER, 4545), zbackup.SILENT, None, "")]
    for day, code in ((1, 3), (3640, 3), (3648, 0), (3650, 0), (3652, 0), (3654, 3)):
        (report,) = zbackup.report_missing(silent, [], known, (day * 86400 * 10**9, 3 * 86400.0))
        assert report.exit_code == code, day
        (line,) = zbackup.format_node(report) if report.missing else ("",)
        assert ("the clock was wrong" in line) == (day < 3650)


def test_signal_while_probing_blames_no_node(small: World) -> None:
    """Those that were not asked yet may be there."""
    with SilentAddresses(["127.0.0.9"], small.port):
        server = small.server("--timeout", "15s")
        wait_until(lambda: (small.store / "lock").exists(), what="the store")
        time.sleep(0.3)
        assert server.stop(signal.SIGINT) == 130
    assert "no node answered" not in server.output
