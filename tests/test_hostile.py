"""Both roles under attack over real sockets: what an attacker gets, what it costs, and who is served meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import sqlite3
import stat
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import pytest
from attack import (
    MIB,
    HostileNode,
    Listener,
    Relay,
    call,
    count_descriptors,
    dribble,
    hang_up,
    load_pair,
    make_command,
    make_frame,
    make_greeting,
    make_message,
    make_ready,
    read_frame,
    read_memory,
    read_rest,
    read_to,
    shake_hands,
    swapped,
    watched,
)
from conftest import Process, World, wait_until
from test_sweep import (
    CHANGED,
    FIRST,
    SECOND,
    FakeNode,
    check_store,
    find_row,
    list_lines,
    listing,
    make_item,
    make_line,
    one_item,
    reading,
    replace_path,
)
from test_wire import NO_MESSAGES, WRONG_READS, Client, check_honest

import zbackup
from zbackup import CLOSE, ERROR, HELLO, LIST, OPEN, READ, WORKING

PLAIN_AT, KEYED_AT = "127.0.0.10", "127.0.0.9"
ROLES = {"keyed": KEYED_AT, "keyless": PLAIN_AT}
ENDLESS = "libzmq keeps all frames of a message until its last has come, and has no option that bounds them"

# ---- the node: bytes that are no conversation ----

CURVE = make_greeting(b"CURVE", is_server=1)
RAW: dict[str, bytes] = {  # to both kinds of node
    "random bytes": os.urandom(3000),
    "zeros": bytes(3000),
    "HTTP": b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
    "TLS": b"\x16\3\1\2\0\1\0\1\xfc\3\3" + os.urandom(200),
    "cut signature": make_greeting()[:5],
    "cut greeting": make_greeting()[:40],
    "greeting alone": make_greeting(),
    "version 0": make_greeting(version=b"\0\0") + make_ready() + make_message(OPEN),
    "version 9": make_greeting(version=b"\x09\0")[:64] + b"\xff" * 300,
    "PLAIN": make_greeting(b"PLAIN") + make_command(b"HELLO", b"\4root\0"),
    "GSSAPI": make_greeting(b"GSSAPI") + make_command(b"INITIATE", bytes(100)),
    "unknown mechanism": make_greeting(b"BANANA"),
    "mechanism of noise": make_greeting(os.urandom(20)),
    "CURVE, then NULL's end": CURVE + make_ready() + make_message(OPEN),
    "CURVE, welcome of noise": CURVE + make_command(b"WELCOME", os.urandom(160)),
    "CURVE, welcome cut off": CURVE + make_command(b"WELCOME", os.urandom(20)),
    "CURVE, ready of noise": CURVE + make_command(b"READY", os.urandom(100)),
    "CURVE, hello of a client": CURVE + make_command(b"HELLO", os.urandom(194)),
    "CURVE, message at once": CURVE + make_command(b"MESSAGE", os.urandom(500)),
    "CURVE, error": CURVE + make_command(b"ERROR", b"\x03300"),
    "CURVE, huge command": CURVE + make_command(b"WELCOME", size=1 << 62),
    "CURVE, huge frame": CURVE + make_frame(b"", size=(1 << 63) - 1),
    "CURVE, length of all ones": CURVE + b"\x02" + b"\xff" * 8,
    "CURVE, name beyond the command": CURVE + make_frame(b"\xffWELCOME", 4),
    "CURVE, empty command": CURVE + make_frame(b"", 4),
    "CURVE, ping": CURVE + make_command(b"PING", b"\0\1" + b"x" * 16),
    "NULL, ready of noise": make_greeting() + make_command(b"READY", os.urandom(100)),
    "NULL, huge ready": make_greeting() + make_command(b"READY", size=1 << 60),
    "NULL, length of a property": make_greeting() + make_command(b"READY", b"\x01a\xff\xff\xff\xff"),
    "NULL, routing id of 300 bytes": make_greeting() + make_ready(identity=bytes(300)) + make_message(OPEN),
    "NULL, a PUB": make_greeting() + make_ready(b"PUB") + make_message(OPEN),
    "NULL, huge frame": make_greeting() + make_ready() + make_frame(b"{}", 1, size=1 << 62),
    "NULL, frame beyond the limit": make_greeting() + make_ready() + make_frame(b"{}", 1, size=100 * MIB),
    "NULL, frame without end": make_greeting() + make_ready() + make_frame(b"{}", 1, size=MIB),
    "NULL, 5000 frames": make_greeting() + make_ready() + make_frame(b"x", 1) * 5000 + make_frame(b"x"),
    "NULL, unknown commands": make_greeting() + make_ready() + make_command(b"BANANA", b"x" * 300) * 50,
    "NULL, pings": make_greeting() + make_ready() + make_command(b"PING", b"\0\1" + b"x" * 16) * 500,
    "NULL, no JSON": make_greeting() + make_ready() + make_frame(b"\xff", 1) + make_frame(b""),
}
WELL_FORMED: dict[str, bytes] = {  # a right conversation, for which a node with a key wants proof
    "NULL": make_greeting() + make_ready() + make_message(HELLO) + make_message(OPEN, 2) + make_message(LIST, 3),
    "ZMTP 1.0": b"\1\0" + b"\x1a\1" + make_message(HELLO)[9:20] + b"\1\0",
    "ZMTP 2.0": b"\xff" + bytes(8) + b"\x7f\1\5\0\0" + make_message(HELLO),
    "NULL under the name of CURVE": CURVE + make_ready() + make_message(HELLO) + make_message(OPEN, 2),
}
FIRST_WORD = 64 + 2 + 200  # bytes that a node with a key says to anyone: its greeting, and a HELLO of CURVE


@dataclass
class Storm:
    """Two nodes to which all of RAW was said at once, each on a connection of its own, and a sweep meanwhile."""

    world: World
    nodes: dict[str, Process]
    said: dict[tuple[str, str], bytes] = field(default_factory=dict)  # what came back
    report: dict[str, Any] = field(default_factory=dict)
    descriptors: dict[str, tuple[int, int]] = field(default_factory=dict)  # before and after


def make_nodes(world: World, *flags: str) -> dict[str, Process]:
    """Start a node with a key and one without."""
    (world.files / "a").write_text("honest")
    return {"keyed": world.keyed(*flags, address=KEYED_AT), "keyless": world.node(*flags, address=PLAIN_AT)}


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    world = World(tmp_path_factory.mktemp("storm"))
    made = Storm(world, make_nodes(world, "--handshake-timeout", "2s"))
    before = {role: count_descriptors(node) for role, node in made.nodes.items()}
    try:
        with contextlib.ExitStack() as held:
            raws = {}
            for role, address in ROLES.items():
                for name, data in {**RAW, **(WELL_FORMED if role == "keyed" else {})}.items():
                    raws[role, name] = held.enter_context(call(address, world.port))
                    with contextlib.suppress(OSError):  # it may hang up in the middle
                        raws[role, name].sendall(data)
            made.report = world.sweep("--range", "9-10")
            made.said = {which: read_rest(raw, 0.02) for which, raw in raws.items()}
        for role, node in made.nodes.items():
            with contextlib.suppress(AssertionError):
                wait_until(lambda node=node, role=role: count_descriptors(node) <= before[role] + 2, 10)
            made.descriptors[role] = before[role], count_descriptors(node)
        yield made
    finally:
        world.close()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", RAW)
def test_node_gives_nothing_to_raw_bytes(storm: Storm, role: str, name: str) -> None:
    said = storm.said[role, name]
    assert b"identity" not in said and b"honest" not in said
    assert role == "keyless" or len(said) <= FIRST_WORD


@pytest.mark.parametrize("name", WELL_FORMED)
def test_node_with_a_key_gives_nothing_to_who_has_none(storm: Storm, name: str) -> None:
    said = storm.said["keyed", name]
    assert len(said) <= FIRST_WORD
    assert b"identity" not in said and b'"number"' not in said


@pytest.mark.parametrize(("role", "address"), ROLES.items())
def test_node_is_copied_amid_raw_bytes(storm: Storm, role: str, address: str) -> None:
    row = find_row(storm.report, address)
    assert (row["exit_code"], row["snapshot"]["grade"]) == (0, "stable")
    node = storm.nodes[role]
    assert node.process.poll() is None
    assert "Traceback" not in node.output and node.output.count("\n") < 20, node.output
    before, after = storm.descriptors[role]
    assert after <= before + 2, "the descriptors of the dead connections are given back"
    assert read_memory(node.pid) < 150 * MIB


def count_possible(wanted: int) -> int:
    """Return how many sockets this process can open, up to `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + 300:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted + 300), hard))
    return min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 300)


BEGINNINGS = {
    "keyed": [b"", make_greeting()[:11], CURVE, CURVE + make_frame(b"\7WEL", 4, size=168)],
    "keyless": [b"", make_greeting()[:11], make_greeting(), make_greeting() + make_ready()[:20]],
}


@pytest.mark.parametrize("role", ROLES)
def test_node_under_half_open_connections(world: World, role: str) -> None:
    node = make_nodes(world, "--handshake-timeout", "4s")[role]
    before, memory = count_descriptors(node), read_memory(node.pid)
    with contextlib.ExitStack() as held:
        for number in range(count_possible(2500)):
            raw = held.enter_context(call(ROLES[role], world.port))
            raw.sendall(BEGINNINGS[role][number % 4])
            if number % 25 == 24:  # no faster than they are taken: this is no flood of SYN packets
                wait_until(lambda number=number: count_descriptors(node) > number - 20, what="the connections")
        assert count_descriptors(node) > count_possible(2500)
        report = world.sweep("--range", "9-10")
        assert find_row(report, ROLES[role])["snapshot"]["grade"] == "stable"
        wait_until(lambda: count_descriptors(node) <= before + 5, 60, "the end of those that prove nothing")
    assert read_memory(node.pid) - memory < 100 * MIB
    assert node.process.poll() is None and "Traceback" not in node.output


@pytest.mark.parametrize("role", ROLES)
def test_node_ends_connections_that_trickle(world: World, role: str) -> None:
    node = make_nodes(world, "--handshake-timeout", "1s")[role]
    before = count_descriptors(node)
    over = threading.Event()
    greeting = make_greeting(b"CURVE" if role == "keyed" else b"NULL")
    went: list[int] = []
    raws = [call(ROLES[role], world.port) for _ in range(40)]
    threads = [
        threading.Thread(target=lambda raw=raw: went.append(dribble(raw, greeting, 0.1, over))) for raw in raws
    ]
    for thread in threads:
        thread.start()
    try:
        assert find_row(world.sweep("--range", "9-10"), ROLES[role])["snapshot"]["grade"] == "stable"
        wait_until(lambda: count_descriptors(node) <= before + 2, 30, "the end of the connections")
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for raw in raws:
            raw.close()
    assert len(went) == 40 and max(went) < len(greeting)


def test_node_ends_a_connection_that_answers_no_ping(world: World) -> None:
    """After a handshake, where a message that never gets ready could hold a connection for ever."""
    node = world.node("--heartbeat", "200ms")
    with call(KEYED_AT, world.port) as raw:
        shake_hands(raw)
        over = threading.Event()
        started = time.monotonic()
        assert dribble(raw, make_frame(b"{" * 1000), 0.1, over) < 1000
        assert time.monotonic() - started < 30
    check_honest(world, node)


# ---- the node: messages of who may speak to it ----


@dataclass
class Captured:
    """A keyed node, and a server that has the right secret but means ill."""

    world: World
    node: Process
    secret: str

    def client(self, name: bytes = b"") -> Client:
        return Client(self.world, secret=self.secret, name=name)


@pytest.fixture
def captured(world: World) -> Captured:
    (world.files / "a").write_text("data")
    (world.path / "secret").write_text("secret")
    return Captured(world, world.keyed(), load_pair(world).secret)


def test_server_with_a_wrong_key_gets_nothing(captured: Captured) -> None:
    for secret in (zbackup.make_pair().secret, ""):
        client = Client(captured.world, secret=secret)
        for kind in (HELLO, OPEN, LIST):
            client.send(kind)
        assert client.receive(0.5) is None
        client.close()
    check_honest(captured.world, captured.node)


def test_captured_server_asks_nonsense(captured: Captured) -> None:
    client = captured.client()
    for kind in (LIST, READ, CLOSE, "NOTHING", ERROR, WORKING, ""):
        assert client.error(kind) == "closed"
    opened = client.ask(OPEN)
    for kind in ("NOTHING", ERROR, WORKING, "open", "__class__", "\x1b[2J"):
        assert client.error(kind) == "unknown"
    assert {name: client.error(READ, **fields) for name, fields in WRONG_READS.items()} == dict.fromkeys(
        WRONG_READS, "wrong"
    )
    small = [frames for frames in NO_MESSAGES.values() if frames and sum(map(len, frames)) < zbackup.QUESTION_LIMIT]
    for frames in [*small, [b"x"] * 1000, [b""] * 3]:
        client.socket.send_multipart(frames)
    client.number = opened.number  # a question that was asked before is a question like others
    assert client.ask(LIST).kind == LIST
    client.close()
    check_honest(captured.world, captured.node)


@pytest.mark.parametrize("size", [zbackup.QUESTION_LIMIT + 2 * zbackup.PAGE, zbackup.HEAD_LIMIT + 1, 50 * MIB])
def test_captured_server_sends_oversized_frames(captured: Captured, size: int) -> None:
    for frames in ([bytes(size), b""], [b'{"kind":"HELLO","number":1}', bytes(size)]):
        client = captured.client()
        client.socket.send_multipart(frames)
        assert client.receive(0.2) is None
        client.close()
    assert read_memory(captured.node.pid) < 150 * MIB
    check_honest(captured.world, captured.node)


def make_traps(world: World) -> list[str]:
    """Put what leads out of a root into it; returns the paths that a READ may try."""
    outside = world.path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (world.files / "folder").symlink_to(outside)
    (world.files / "leaf").symlink_to(outside / "secret")
    (world.files / "chain").symlink_to("folder")
    (world.files / "up").symlink_to("..")
    (world.files / "proc").symlink_to("/proc/self")
    os.mkfifo(world.files / "fifo")
    inside = ["folder/secret", "leaf", "chain/secret", "up/secret", "up/files/a", "proc/environ", "fifo", "a/b", ""]
    return [
        *(f"files/{path}".rstrip("/") for path in inside),
        "files/folder/../a/../../secret",
        "files/a\0/../../secret",
        "/proc/self/environ",
        "proc/self/environ",
        "etc/passwd",
        str(world.path / "secret"),
        str(world.path / "secret").strip("/"),
        "secret",
        "filesystem",
        "files\udcff",
        "files/\ud800\udc00",
        f"state/zbackup/node-127.0.0.9-{world.port}/key",
    ]


def test_captured_server_reads_beyond_the_roots(captured: Captured) -> None:
    client = captured.client()
    paths = make_traps(captured.world)
    client.ask(OPEN)
    for path in paths:
        for chunk in (0, 1):
            answer = client.ask(READ, files=[{"path": path, "chunk": chunk, "state": []}])
            if answer.kind != ERROR:
                [item] = answer.fields.items("items", 1)
                assert item["status"] in ("gone", "lost", "error"), (path, item)
            assert b"secret" not in bytes(answer.body)
    client.close()
    check_honest(captured.world, captured.node)
    restored = [path for path in captured.world.restore().rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path.read_text() for path in restored] == ["data"]


def test_captured_server_asks_and_never_reads(captured: Captured) -> None:
    (captured.world.files / "big").write_bytes(os.urandom(MIB))
    client = captured.client()
    client.socket.sndhwm = client.socket.rcvhwm = 1
    client.ask(OPEN)
    question = zbackup.encode_message(READ, 1, {"files": [{"path": "files/big", "state": []}]})
    sent = 0
    for _ in range(1500):
        if client.socket.poll(20, zbackup.load_zmq().POLLOUT):
            client.socket.send_multipart(question)
            sent += 1
        elif sent > 100:
            break
    assert sent > 50
    check_honest(captured.world, captured.node)
    assert read_memory(captured.node.pid) < 400 * MIB or captured.node.process.poll() is not None
    client.close()


@pytest.mark.parametrize("role", ROLES)
def test_conversation_played_again_gets_nothing(world: World, role: str) -> None:
    node = make_nodes(world)[role]
    number = 40 + list(ROLES).index(role)
    with Relay(f"127.0.0.{number}", world.port, (ROLES[role], world.port)) as relay:
        assert world.sweep("--range", f"{number}", "--store", "other", "--key-file", "backups/keys/server")["nodes"]
    (world.files / "a").write_text("news")
    recorded = [asked for asked in relay.asked if asked]
    assert len(recorded) >= 2 and (role == "keyed" or any(b"files/a" in asked for asked in recorded))
    for asked in recorded:
        for pieces in ([asked], [asked[:64], asked[64:]], [asked[i : i + 50] for i in range(0, len(asked), 50)]):
            with call(ROLES[role], world.port) as raw, contextlib.suppress(OSError):
                for piece in pieces:
                    raw.sendall(piece)
                    time.sleep(0.002)
                said = read_rest(raw, 0.3)
                assert role == "keyless" or len(said) <= FIRST_WORD
                assert role == "keyless" or b"news" not in said
    check_honest(world, node) if role == "keyed" else world.sweep("--range", "10")


@pytest.mark.parametrize("role", ROLES)
def test_second_connection_with_one_routing_id_gets_no_answers(world: World, role: str) -> None:
    node = make_nodes(world, "--before", "sleep 0.7")[role]
    secret = load_pair(world).secret if role == "keyed" else ""
    first, second = (Client(world, ROLES[role], secret, b"the server") for _ in range(2))
    first.ask(HELLO)
    first.send(OPEN)
    for kind in (HELLO, OPEN, READ):
        second.send(kind)
    assert second.receive(0.3) is None, "the name is taken"
    answer = first.receive()
    assert answer and (answer.kind, answer.number) == (OPEN, 2)
    assert first.ask(LIST).kind == LIST
    assert second.receive(0.2) is None
    for client in (first, second):
        client.close()
    assert find_row(world.sweep("--range", "9-10"), ROLES[role])["snapshot"]["grade"] == "stable"
    assert node.process.poll() is None


COUNTER = 0x6B8B4567  # where the routing ids that libzmq gives out itself begin: the first rand() of a process


@pytest.mark.parametrize(
    "role",
    [
        "keyed",
        pytest.param(
            "keyless",
            marks=pytest.mark.xfail(
                strict=True, reason="libzmq 4.3.5 aborts where it gives out a routing id that a peer has claimed"
            ),
        ),
    ],
)
def test_node_outlives_a_claim_to_a_routing_id_that_is_to_come(world: World, role: str) -> None:
    node = make_nodes(world)[role]
    with contextlib.ExitStack() as held:
        for number in range(40):
            raw = held.enter_context(call(ROLES[role], world.port))
            identity = b"\0" + (COUNTER + number).to_bytes(4, "big")
            with contextlib.suppress(OSError):
                raw.sendall(make_greeting(b"CURVE" if role == "keyed" else b"NULL") + make_ready(identity=identity))
        time.sleep(0.3)
        secret = load_pair(world).secret if role == "keyed" else ""
        for _ in range(3):
            client = Client(world, ROLES[role], secret)
            client.send(HELLO)
            client.receive(1)
            client.close()
    assert node.process.poll() is None, node.output


def pour(raw: socket.socket) -> None:
    """Send 400 MiB of one message that never ends, or as much of it as the other side takes."""
    part = make_frame(bytes(MIB), 1)
    with contextlib.suppress(OSError):
        for _ in range(400):
            raw.sendall(part)


@pytest.mark.xfail(strict=True, reason=ENDLESS)
def test_node_ends_a_message_of_frames_without_end(world: World) -> None:
    node = world.node()
    with call(KEYED_AT, world.port) as raw:
        shake_hands(raw)
        pour(raw)
        assert read_memory(node.pid) < 200 * MIB
    check_honest(world, node)
