"""Both roles under attack over real sockets: what an attacker gets, what it costs, and who is served meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sqlite3
import stat
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
    shake_hands,
    swapped,
    watched,
)
from conftest import FOLDER, Process, World, uncovered, wait_until
from test_sweep import (
    CHANGED,
    FIRST,
    PATIENT,
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
    world.env = uncovered(world.env)  # quicker; other tests reach the same lines
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
    assert "Traceback" not in node.output and node.output.count("\n") < zbackup.COMPLAINTS + 10, node.output
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
    # Long enough that on a busy machine the first connections are not gone before the last one is made.
    node = make_nodes(world, "--handshake-timeout", "10s")[role]
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
    threads = [threading.Thread(target=lambda raw=raw: went.append(dribble(raw, greeting, 0.1, over))) for raw in raws]
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


@pytest.fixture
def clients(world: World) -> Iterator[Callable[..., Client]]:
    """Makes servers that mean ill, and closes them."""
    with contextlib.ExitStack() as held:
        yield lambda *arguments: held.enter_context(contextlib.closing(Client(world, *arguments)))


@dataclass
class Captured:
    """A keyed node, and a server that has the right secret but means ill."""

    world: World
    node: Process
    connect: Callable[[], Client]


@pytest.fixture
def captured(world: World, clients: Callable[..., Client]) -> Captured:
    (world.files / "a").write_text("data")
    (world.path / "secret").write_text("secret")
    return Captured(world, world.keyed(), lambda: clients(KEYED_AT, load_pair(world).secret))


def test_server_with_a_wrong_key_gets_nothing(captured: Captured, clients: Callable[..., Client]) -> None:
    for secret in (zbackup.make_pair().secret, ""):
        client = clients(KEYED_AT, secret)
        for kind in (HELLO, OPEN, LIST):
            client.send(kind)
        assert client.receive(0.5) is None
    check_honest(captured.world, captured.node)


def test_captured_server_asks_nonsense(captured: Captured) -> None:
    client = captured.connect()
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
    check_honest(captured.world, captured.node)


@pytest.mark.parametrize("size", [zbackup.QUESTION_LIMIT + 2 * zbackup.PAGE, zbackup.HEAD_LIMIT + 1, 50 * MIB])
def test_captured_server_sends_oversized_frames(captured: Captured, size: int) -> None:
    for frames in ([bytes(size), b""], [b'{"kind":"HELLO","number":1}', bytes(size)]):
        client = captured.connect()
        client.socket.send_multipart(frames)
        assert client.receive(0.2) is None
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
    client = captured.connect()
    paths = make_traps(captured.world)
    client.ask(OPEN)
    for path in paths:
        for chunk in (0, 1):
            answer = client.ask(READ, files=[{"path": path, "chunk": chunk, "state": []}])
            if answer.kind != ERROR:
                [item] = answer.fields.items("items", 1)
                assert item["status"] in ("gone", "lost", "error"), (path, item)
            assert b"secret" not in bytes(answer.body)
    check_honest(captured.world, captured.node)
    restored = [path for path in captured.world.restore().rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path.read_text() for path in restored] == ["data"]


def test_captured_server_asks_and_never_reads(captured: Captured) -> None:
    (captured.world.files / "big").write_bytes(os.urandom(MIB))
    client = captured.connect()
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
    wait_until(lambda: find_row(captured.world.sweep(), KEYED_AT)["snapshot"]["grade"] == "stable")
    assert read_memory(captured.node.pid) < 400 * MIB
    check_honest(captured.world, captured.node)


def test_captured_server_asks_heavy_questions(captured: Captured) -> None:
    """As many copies as a node serves at once, with questions that wait behind a slow --before."""
    captured.node.stop()
    node = captured.world.keyed("--before", "sleep 4")
    lists = b",".join([b"[]"] * 300_000)
    for number in range(zbackup.SESSIONS):
        client = captured.connect()
        client.send(OPEN, server=f"{number}")
        for question in range(8):
            client.socket.send_multipart([b'{"kind":"LIST","number":%d,"x":[%s]}' % (question, lists), b""])
    wait_until(lambda: client.socket.poll(0), 30, "a sign of work for the last")
    time.sleep(1)
    assert read_memory(node.pid) < 300 * MIB


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
def test_second_connection_with_one_routing_id_gets_no_answers(
    world: World, clients: Callable[..., Client], role: str
) -> None:
    node = make_nodes(world, "--before", "sleep 0.7")[role]
    secret = load_pair(world).secret if role == "keyed" else ""
    first = clients(ROLES[role], secret, b"the server")
    first.ask(HELLO)
    second = clients(ROLES[role], secret, b"the server")
    first.send(OPEN)
    for kind in (HELLO, OPEN, READ):
        second.send(kind)
    assert second.receive(0.3) is None, "the name is taken"
    answer = first.receive()
    assert answer and (answer.kind, answer.number) == (OPEN, 2)
    assert first.ask(LIST).kind == LIST
    assert second.receive(0.2) is None
    assert find_row(world.sweep("--range", "9-10"), ROLES[role])["snapshot"]["grade"] == "stable"
    assert node.process.poll() is None


COUNTER = 0x6B8B4567  # where the routing ids that libzmq gives out itself begin: the first rand() of a process


@pytest.mark.parametrize("role", ["keyed", "keyless"])
def test_node_outlives_a_claim_to_a_routing_id_that_is_to_come(
    world: World, clients: Callable[..., Client], role: str
) -> None:
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
            client = clients(ROLES[role], secret)
            client.send(HELLO)
            client.receive(1)
        assert node.process.poll() is None, node.output


def pour(raw: socket.socket) -> None:
    """Send 400 MiB of one message that never ends, or as much of it as the other side takes."""
    part = make_frame(bytes(MIB), 1)
    with contextlib.suppress(OSError):
        for _ in range(400):
            raw.sendall(part)


def test_node_ends_a_message_of_frames_without_end(world: World) -> None:
    node = world.node()
    with call(KEYED_AT, world.port) as raw:
        shake_hands(raw)
        pour(raw)
        assert read_memory(node.pid) < 200 * MIB
    check_honest(world, node)


# ---- the server: nodes that mean ill ----


def bomb(head: bytes) -> Callable[..., Any]:
    """Answer LIST with a head of our own making; NUMBER stands for the question's number."""
    return lambda fake, asked, body: [head.replace(b"NUMBER", b"%d" % asked["number"]), b""]


def fill(unit: bytes, size: int = 4 * MIB - 1000) -> Callable[..., Any]:
    """Answer LIST with a list of many small things in its head."""
    return bomb(b'{"kind":"LIST","number":NUMBER,"x":[' + b",".join([unit] * (size // (len(unit) + 1))) + b"]}")


def pack(codec: int, size: int, raw: int = 64 * MIB) -> Callable[..., Any]:
    """Answer LIST with a body that is far longer when it is decompressed than is said."""
    data = zlib.compress(bytes(raw), 9) if codec == zbackup.ZLIB else zbackup.load_zstd().compress(bytes(raw), 3)
    return lambda *_: ({"more": False, "codec": codec, "size": size}, data)


def hello(**changes: Any) -> dict[str, Callable[..., Any]]:
    """Answer HELLO as an honest node would, but for some fields."""

    def answer(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Any:
        fields, data = FakeNode.honest(fake, {"kind": HELLO}, body)
        return {**fields, **changes}, data

    return {"HELLO": answer}


def send_twice(fake: HostileNode, asked: dict[str, Any], body: bytes) -> Any:
    """Give an honest answer to LIST, and again where the next one is due."""
    fields, data = FakeNode.honest(fake, asked, body)
    frames = zbackup.encode_message(LIST, asked["number"], fields, data)
    fake.send(frames, 2)


def send_late_question_first(fake: HostileNode, asked: dict[str, Any], body: bytes) -> Any:
    """Answer the second chunk of a file after the third one."""
    number = asked["files"][0]["chunk"]
    chunk = b"x" * MIB
    item = {**make_item(chunk), "size": 8 * MIB, "state": [8 * MIB, 1, 1, 1]}
    return None if number == 1 else reading([item], chunk)


def sign_without_pause(fake: HostileNode, asked: dict[str, Any], body: bytes) -> Any:
    """Say "still working" far more often than anybody needs to know."""
    fake.send(zbackup.encode_message(WORKING, asked["number"], {}), 900)


def many(frames: int) -> Callable[..., Any]:
    return lambda *_: [b"x"] * frames


def unasked(kind: str, number: int) -> Callable[..., Any]:
    return lambda *_: zbackup.encode_message(kind, number, {})


HANGS_UP = "connection to the node was lost"
NOT_ASKED = "nobody asked for"
CUT_OFF = "cut off, or longer than its"
NOT_PLAIN = "not plain"
MUCH = "wrong value of size"
BIG_LINE = list_lines(make_line("a", 8 * MIB))
HOSTILE: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    **FIRST,
    "hangs up at OPEN": ({"OPEN": hang_up}, HANGS_UP),
    "hangs up at LIST": ({"LIST": hang_up}, HANGS_UP),
    "hangs up at READ": ({"READ": hang_up}, HANGS_UP),
    "hangs up at CLOSE": ({"CLOSE": hang_up}, HANGS_UP),
    "mute at OPEN": ({"OPEN": lambda *_: None}, "did not answer within 4 s"),
    "mute at CLOSE": ({"CLOSE": lambda *_: None}, "did not answer within 4 s"),
    "answer again": ({"LIST": send_twice}, NOT_ASKED),
    "answers in another order": ({"LIST": BIG_LINE, "READ": send_late_question_first}, NOT_ASKED),
    "answer to READ at OPEN": ({"OPEN": unasked(READ, 1)}, NOT_ASKED),
    "answer to HELLO at OPEN": ({"OPEN": unasked(HELLO, 1)}, NOT_ASKED),
    "question as an answer": ({"LIST": lambda f, asked, b: unasked(OPEN, asked["number"])()}, NOT_ASKED),
    "number below zero": ({"OPEN": lambda *_: [b'{"kind":"OPEN","number":-1}', b""]}, "number"),
    "signs of work without pause": ({"OPEN": sign_without_pause}, "floods the server with signs of work"),
    "one frame": ({"OPEN": many(1)}, "1 frames"),
    "three empty frames": ({"OPEN": lambda *_: [b""] * 3}, "3 frames"),
    "10,000 frames": ({"OPEN": many(10_000)}, "10000 frames"),
    "head is deep": ({"LIST": bomb(b'{"kind":"LIST","number":NUMBER,"x":' + b"[" * 9000 + b"]" * 9000 + b"}")}, "JSON"),
    "head is deep and long": (
        {"LIST": bomb(b'{"kind":"LIST","number":NUMBER,"x":' + b"[" * MIB + b"]" * MIB + b"}")},
        "parts",
    ),
    "head is a huge number": ({"LIST": bomb(b'{"kind":"LIST","number":' + b"9" * MIB + b"}")}, "JSON"),
    "head is not a number": ({"LIST": bomb(b'{"kind":"LIST","number":NaN}')}, "number"),
    "head is endless": ({"LIST": bomb(b'{"kind":"LIST","number":1e999}')}, "number"),
    "head says it twice": ({"LIST": bomb(b'{"kind":"LIST","number":NUMBER,"number":7}')}, NOT_ASKED),
    "head of many floats": ({"LIST": fill(b"1.5")}, MUCH),
    "size is not a number": ({"LIST": bomb(b'{"kind":"LIST","number":NUMBER,"more":false,"size":NaN}')}, MUCH),
    "more is a text": ({"LIST": bomb(b'{"kind":"LIST","number":NUMBER,"more":"no","size":0}')}, "more"),
    "bomb of zlib, small": ({"LIST": pack(zbackup.ZLIB, 100)}, CUT_OFF),
    "bomb of zlib, large": ({"LIST": pack(zbackup.ZLIB, 2 * MIB)}, CUT_OFF),
    "bomb of zlib, huge": ({"LIST": pack(zbackup.ZLIB, 64 * MIB)}, MUCH),
    "bomb of zstd, small": ({"LIST": pack(zbackup.ZSTD, 100)}, ""),
    "bomb of zstd, large": ({"LIST": pack(zbackup.ZSTD, 2 * MIB)}, ""),
    "bomb of zstd, huge": ({"LIST": pack(zbackup.ZSTD, 64 * MIB)}, MUCH),
    "two million lines": ({"LIST": lambda *_: listing(*[b""] * (2 * MIB - 1))}, "not JSON"),
    "path of a dot": ({"LIST": list_lines(make_line("./a"))}, NOT_PLAIN),
    "path that ends above": ({"LIST": list_lines(make_line("f/.."))}, NOT_PLAIN),
    "path of two slashes": ({"LIST": list_lines(make_line("f//a"))}, NOT_PLAIN),
    "path with a slash at its end": ({"LIST": list_lines(make_line("f/"))}, NOT_PLAIN),
    "path of a slash": ({"LIST": list_lines(make_line("/"))}, NOT_PLAIN),
    "path of nothing": ({"LIST": list_lines(replace_path(b'""'))}, "empty"),
    "path without end": ({"LIST": list_lines(make_line("a/" * 20_000 + "a"))}, "wrong value of path"),
    "path as number": ({"LIST": list_lines(replace_path(b"7"))}, "path"),
    "entry beyond 64 TiB": ({"LIST": list_lines(make_line("a", 1 << 47))}, "was changing all the time; read 5 times"),
    "size that is too small": ({"READ": one_item("whole", b"honest", size=3)}, "sent more of a file than it has"),
    "length beyond a chunk": ({"READ": one_item("whole", b"honest", length=MIB + 1)}, "wrong value of length"),
    "zeros without number": ({"READ": one_item("zeros")}, "wrong value of count"),
    "zeros for ever": ({"READ": one_item("zeros", count=1 << 50)}, "wrong value of count"),
    "digest of another length": ({"READ": one_item("whole", b"honest", digest="ab")}, "digest"),
    "attributes as text": ({"READ": one_item("whole", b"honest", xattrs="all")}, "extended attributes"),
    "attributes without end": ({"READ": one_item("whole", b"honest", xattrs={"user.a": "A" * MIB})}, "user.a"),
    "roots without number": ({"OPEN": lambda *_: ({"missing": [], "roots": ["x"] * 100_000}, b"")}, "roots"),
    "missing as text": ({"OPEN": lambda *_: ({"missing": "all", "roots": []}, b"")}, "missing"),
}
FIRST_ADDRESS = 40
HOSTILE_AT = {name: f"127.0.0.{FIRST_ADDRESS + i}" for i, name in enumerate([*HOSTILE, *SECOND])}


@dataclass
class Attack:
    """What became of one sweep over hostile nodes and honest ones."""

    world: World
    report: dict[str, Any]
    output: str
    memory: int  # bytes, at most

    def row(self, address: str) -> dict[str, Any]:
        return find_row(self.report, address)


def sweep_watched(world: World, *flags: str) -> Attack:
    """Make a sweep in the background, whose memory is watched."""
    server = world.server("--json", *flags)
    with watched(server.pid) as most:
        server.process.wait(90)
    assert "Traceback" not in server.output, server.output
    lines = [line for line in server.output.splitlines() if line.startswith('{"')]
    return Attack(world, json.loads(lines[-1]), server.output, most[0])


IMPATIENT = ("--answer-timeout", "1s", "--freeze-timeout", "1s")


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    """A sweep over an honest node of each kind and all that are hostile, each of which has a key."""
    world = World(tmp_path_factory.mktemp("attack"))
    world.env = uncovered(world.env)  # quicker; other tests reach the same lines
    make_nodes(world)
    key = world.key()
    fakes = {
        name: HostileNode(HOSTILE_AT[name], world.port, key, **(HOSTILE[name][0] if name in HOSTILE else {}))
        for name in HOSTILE_AT
    }
    last = FIRST_ADDRESS + len(fakes) - 1
    for name in SECOND:
        fakes[name].files = {"a": b"A" * (4 * zbackup.PAGE) + b"tail"}
    for fake in fakes.values():
        fake.start()
    try:
        world.sweep("--range", f"9-10,{last + 1 - len(SECOND)}-{last}", "--jobs", "20")
        (world.files / "a").write_text("news")
        for name, (answers, _) in SECOND.items():
            fakes[name].answers = {"LIST": list_lines(make_line("a", len(CHANGED), inode=2)), **answers}
        yield sweep_watched(world, "--range", f"9-10,{FIRST_ADDRESS}-{last}", *PATIENT, "--jobs", "16")
    finally:
        for fake in fakes.values():
            fake.close()
        world.close()


@pytest.mark.parametrize("name", HOSTILE_AT)
def test_hostile_node_with_a_key(attack: Attack, name: str) -> None:
    row = attack.row(HOSTILE_AT[name])
    said = row["error"] + json.dumps((row["snapshot"] or {}).get("problems")) + json.dumps(row["problems"])
    assert {**HOSTILE, **SECOND}[name][1] in said
    assert "fault of zbackup" not in said
    assert row["exit_code"] == 1, said
    grades = {"hangs up at CLOSE": "stable", "mute at CLOSE": "stable", "entry beyond 64 TiB": "torn"}
    assert not row["snapshot"] or row["snapshot"]["grade"] == grades.get(name, "partial")


@pytest.mark.parametrize("address", ROLES.values())
def test_honest_node_is_copied_beside_hostile_ones(attack: Attack, address: str) -> None:
    row = attack.row(address)
    assert (row["exit_code"], row["snapshot"]["grade"]) == (0, "stable")
    assert (attack.world.restore(address, to=address) / "files/a").read_text() == "news"


def test_hostile_nodes_with_keys_leave_the_store_whole(attack: Attack) -> None:
    assert attack.report["exit_code"] == 1 and attack.report["problems"] == []
    assert check_store(attack.world.store) > 0
    assert "\x1b" not in attack.output
    assert attack.memory < 600 * MIB, "16 copies at once"


NESTED = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    "answers",
    [
        {"LIST": fill(b"[]")},
        {"LIST": fill(NESTED)},
        {"LIST": pack(zbackup.ZSTD, 2 * MIB, 500 * MIB)},
        {"LIST": lambda *_: listing(*[b"{}"] * (2 * MIB // 3))},
        {"OPEN": many(100_000)},
    ],
    ids=["lists", "lists in lists", "zstd", "lines", "frames"],
)
def test_memory_of_a_server_under_one_hostile_node(world: World, answers: dict[str, Callable[..., Any]]) -> None:
    with HostileNode("127.0.0.20", world.port, world.key(), **answers):
        done = sweep_watched(world, "--range", "20", *IMPATIENT)
    assert done.row("127.0.0.20")["exit_code"] == 1
    assert done.memory < 200 * MIB, f"{done.memory / MIB:.0f} MiB"


LASTING = ["hangs up at READ", "mute at OPEN", "answer again", "10,000 frames", "bomb of zstd, large", "wrong digest"]


def test_server_that_meets_hostile_nodes_day_by_day(world: World) -> None:
    """What one sweep leaves behind would grow from sweep to sweep."""
    make_nodes(world)
    flags = ("--range", "9-10,20-25", "--every", "2s", *IMPATIENT)
    with contextlib.ExitStack() as held:
        for number, name in enumerate(LASTING):
            held.enter_context(HostileNode(f"127.0.0.{20 + number}", world.port, world.key(), **HOSTILE[name][0]))
        server = Process([flag for flag in world.server_flags(*flags) if flag != "--once"], world.path, world.env)
        world.nodes.append(server)

        def wait_for(sweeps: int) -> tuple[int, int]:
            wait_until(lambda: server.output.count("sweep of ") >= sweeps, 60, "the next sweep")
            time.sleep(0.5)
            return count_descriptors(server), read_memory(server.pid)

        descriptors, memory = wait_for(2)
        most = wait_for(4)[1]
        wait_until(lambda: count_descriptors(server) <= descriptors + 3, 30, "as few as after the second sweep")
        assert most < min(memory + 20 * MIB, 200 * MIB)
        assert server.stop() == 0
    assert "Traceback" not in server.output
    assert len(list_snapshots(world, KEYED_AT)) >= 4


# ---- the server: bytes that are no conversation ----


def say(data: bytes) -> Callable[[Listener, socket.socket], object]:
    """Say something to whoever connects, and nothing more."""

    def act(listener: Listener, raw: socket.socket) -> None:
        raw.sendall(data)
        read_rest(raw, 5)

    return act


def say_slowly(listener: Listener, raw: socket.socket) -> None:
    dribble(raw, make_greeting(b"CURVE") + make_command(b"HELLO", bytes(194)), 0.1, listener.over)


def answer_plainly(listener: Listener, raw: socket.socket, *last: bytes) -> None:
    """Be an honest node without a key up to OPEN; what is then sent is up to `last`."""
    shake_hands(raw, b"ROUTER")
    flags, head = read_frame(raw)
    while flags != 1:
        assert flags > 0
        flags, head = read_frame(raw)
    read_frame(raw)
    asked = json.loads(head)
    if asked["kind"] == HELLO:
        names = {"protocol": 1, "identity": "7" * 32, "instance": "x", "name": "n", "codecs": [], "roots": []}
        raw.sendall(make_message(HELLO, asked["number"], **names))
    for data in last if asked["kind"] == OPEN else ():
        raw.sendall(data)
    read_rest(raw, 5)


def without_keys(act: Callable[..., object]) -> Callable[[Listener, socket.socket], object]:
    """Hang up on handshakes with keys, so that the server asks again without."""

    def answer(listener: Listener, raw: socket.socket) -> None:
        if listener.count == 1:
            raw.shutdown(socket.SHUT_RDWR)
        else:
            act(listener, raw)

    return answer


SERVICES: dict[str, tuple[Callable[[Listener, socket.socket], object], str, str]] = {
    "mute": (say(b""), "no node", "another service"),
    "random bytes": (say(b"R" + os.urandom(5000)), "no node", ""),
    "HTTP": (say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "no node", "another service"),
    "SSH": (say(b"SSH-2.0-OpenSSH_9.2\r\n"), "no node", "another service"),
    "cut greeting": (say(make_greeting(b"CURVE")[:40]), "no node", "another service"),
    "greeting alone": (say(make_greeting(b"CURVE")), "no node", "another service"),
    "slow greeting": (say_slowly, "no node", "another service"),
    "ZMTP 1.0": (say(b"\1\0" + b"\x08\0HELLO\0\0"), "no node", "1 frames instead of 2"),
    "ZMTP 2.0": (say(b"\xff" + bytes(8) + b"\x7f\1\6\0\0" + make_message(HELLO)), "refuses", "protocol 0"),
    "PLAIN": (say(make_greeting(b"PLAIN") + make_command(b"HELLO", b"\0\0")), "no node", ""),
    "CURVE, hello of noise": (say(make_greeting(b"CURVE") + make_command(b"HELLO", os.urandom(194))), "", ""),
    "CURVE, hello cut off": (say(make_greeting(b"CURVE") + make_command(b"HELLO", bytes(9))), "", ""),
    "CURVE, huge hello": (say(make_greeting(b"CURVE") + make_command(b"HELLO", size=1 << 62)), "", ""),
    "CURVE, message at once": (say(make_greeting(b"CURVE") + make_command(b"MESSAGE", bytes(99))), "", ""),
    "CURVE, NULL's end": (say(make_greeting(b"CURVE") + make_ready(b"ROUTER") + make_message(HELLO)), "", ""),
    "NULL, huge frame": (
        without_keys(say(make_greeting() + make_ready(b"ROUTER") + make_frame(b"", size=1 << 62))),
        "no node",
        "",
    ),
    "NULL, answer without end": (
        without_keys(say(make_greeting() + make_ready(b"ROUTER") + make_frame(b"{}", 1, size=4 * MIB))),
        "no node",
        "no node",
    ),
    "NULL, 40 answers of 8 MiB": (
        without_keys(say(make_greeting() + make_ready(b"ROUTER") + make_frame(bytes(4 * MIB), 1) * 10)),
        "no node",
        "",
    ),
}
SERVICES_AT = {name: f"127.0.0.{40 + i}" for i, name in enumerate(SERVICES)}


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    """A sweep over honest nodes, and services that are none."""
    world = World(tmp_path_factory.mktemp("misled"))
    world.env = uncovered(world.env)  # quicker; other tests reach the same lines
    make_nodes(world)
    with contextlib.ExitStack() as held:
        held.callback(world.close)
        for name, (act, _, _) in SERVICES.items():
            held.enter_context(Listener(SERVICES_AT[name], world.port, act))
        yield sweep_watched(world, "--range", f"9-10,40-{39 + len(SERVICES)}")


@pytest.mark.parametrize("name", SERVICES)
def test_service_that_is_no_node(misled: Attack, name: str) -> None:
    row = misled.row(SERVICES_AT[name])
    _, state, sentence = SERVICES[name]
    assert row["state"] == state or not state and row["state"] in ("no node", "refuses")
    assert sentence in row["error"]
    assert row["snapshot"] is None and not row["folder"]


def test_server_is_not_misled_by_services(misled: Attack) -> None:
    assert [misled.row(address)["exit_code"] for address in ROLES.values()] == [0, 0]
    assert misled.memory < 200 * MIB
    assert sorted(path.parent.name for path in misled.world.store.glob("*/node.json")) == ["127.0.0.10", "127.0.0.9"]


def test_server_ends_a_message_of_frames_without_end(world: World) -> None:
    def act(listener: Listener, raw: socket.socket) -> None:
        answer_plainly(listener, raw, *[make_frame(bytes(MIB), 1)] * 400)

    with Listener("127.0.0.20", world.port, without_keys(act)):
        done = sweep_watched(world, "--range", "20", *IMPATIENT)
    assert done.row("127.0.0.20")["exit_code"] == 1
    assert done.memory < 200 * MIB


# ---- the server: nodes that claim to be what they are not ----

STRANGE_HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "no identity": ({"identity": ""}, "no node"),
    "a path as identity": ({"identity": "../../../../etc/passwd/aaaaaaaaa"}, "no node"),
    "a number as identity": ({"identity": 7}, "no node"),
    "a name without end": ({"name": "n" * 256}, "no node"),
    "a folder without end": ({"folder": "f" * 256}, "no node"),
    "a folder as list": ({"folder": ["a"]}, "no node"),
    "roots as numbers": ({"roots": [1, 2]}, "no node"),
    "codecs without end": ({"codecs": ["zlib" * 50] * 1000}, "no node"),
    "another protocol": ({"protocol": 2}, "refuses"),
    "a protocol as text": ({"protocol": "1"}, "no node"),
}
WISHES = [
    *("packs", "keys", "damage", "aside", "lock", "index.sqlite", "zbackup.json", "README.txt", "reserve"),
    *("../x", "..", ".", "/etc", "a/b", "a\0b", "\x1b[2J", "-x", ".hidden", "~", "PACKS", "Keys", "con", "drill.json"),
    *("127.0.0.9", "127.0.0.10", "::1", "laptop", "LAPTOP", "x" * 255, "\u202elanoitcerid", " ", ".zbackup-tmp-x"),
]
STRANGERS_AT = {name: f"127.0.0.{40 + i}" for i, name in enumerate(STRANGE_HELLOS)}
WISHES_AT = {wish: f"127.0.0.{60 + i}" for i, wish in enumerate(WISHES)}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    """A sweep over honest nodes, one of them known as `laptop`, and others that say strange things of themselves."""
    world = World(tmp_path_factory.mktemp("named"))
    world.env = uncovered(world.env)  # quicker; other tests reach the same lines
    make_nodes(world, "--folder", "laptop")
    world.sweep("--range", "9-10")
    key = world.key()
    with contextlib.ExitStack() as held:
        held.callback(world.close)
        for name, (changes, _) in STRANGE_HELLOS.items():
            held.enter_context(HostileNode(STRANGERS_AT[name], world.port, key, **hello(**changes)))
        for wish, address in WISHES_AT.items():
            held.enter_context(HostileNode(address, world.port, key, **hello(folder=wish, name=wish)))
        yield sweep_watched(world, "--range", f"9-10,40-{59 + len(WISHES)}", "--jobs", "20")


@pytest.mark.parametrize("name", STRANGE_HELLOS)
def test_node_that_says_strange_things_of_itself(named: Attack, name: str) -> None:
    row = named.row(STRANGERS_AT[name])
    assert row["state"] == STRANGE_HELLOS[name][1]
    assert row["error"] and row["snapshot"] is None


@pytest.mark.parametrize("wish", WISHES)
def test_node_that_wishes_for_a_name(named: Attack, wish: str) -> None:
    row = named.row(WISHES_AT[wish])
    assert (row["exit_code"], row["snapshot"]["grade"]) == (0, "stable")
    folder = row["folder"]
    assert zbackup.name_folder(folder) == folder and len(folder) <= 120
    assert folder.lower() not in {"laptop", "127.0.0.9", "127.0.0.10", *zbackup.RESERVED}
    assert [path.name for path in (named.world.store / folder / "latest").iterdir()] == ["a"]


def test_names_are_each_node_s_own(named: Attack) -> None:
    folders = [named.row(address)["folder"] for address in [*ROLES.values(), *WISHES_AT.values()]]
    assert len({folder.lower() for folder in folders}) == len(folders)
    assert folders[0] == "laptop", "whose it was before"
    assert sorted(path.parent.name for path in named.world.store.glob("*/node.json")) == sorted(folders)
    assert (named.world.restore("laptop") / "files/a").read_text() == "honest"
    assert "\x1b" not in named.output
    assert check_store(named.world.store) == 2 * 2 * 2 + len(WISHES)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("where", ["beside it", "in its place"])
def test_stranger_without_a_key_claims_the_identity_of_a_known_node(world: World, role: str, where: str) -> None:
    """What a node without a key says of itself proves nothing, but it never gets at what is kept already."""
    node = make_nodes(world)[role]
    address = ROLES[role]
    first = find_row(world.sweep("--range", "9-10"), address)["snapshot"]["name"]
    identity = json.loads((world.store / address / "node.json").read_text())["identity"]
    said = (Path(world.env["XDG_STATE_HOME"]) / f"zbackup/node-{address}-{world.port}/identity").read_text().strip()
    if where == "in its place":
        node.stop()
    with HostileNode(address if where == "in its place" else "127.0.0.20", world.port, **hello(identity=said)):
        report = world.sweep("--range", "9-10,20", code=None)
    if (role, where) == ("keyed", "in its place"):
        row = find_row(report, address)
        assert row["state"] == "refuses" and "answers without a key" in row["error"] and row["exit_code"] == 1
    elif (role, where) == ("keyless", "beside it"):
        assert "identity of the node at" in find_row(report, "127.0.0.20")["error"]
    elif role == "keyed":
        assert find_row(report, "127.0.0.20")["folder"] == "127.0.0.20"
    if (role, where) != ("keyless", "in its place"):
        assert json.loads((world.store / address / "node.json").read_text())["identity"] == identity
    assert (world.restore(address, "--at", first) / "files/a").read_text() == "honest"


@pytest.mark.parametrize("claim", ["key", "former"])
def test_stranger_with_a_key_claims_the_identity_of_a_node_with_a_key(world: World, claim: str) -> None:
    """A key is in none of the messages: another node's is only a text."""
    make_nodes(world)
    world.sweep("--range", "9-10")
    known = json.loads((world.store / KEYED_AT / "node.json").read_text())["identity"]
    said = (Path(world.env["XDG_STATE_HOME"]) / f"zbackup/node-{KEYED_AT}-{world.port}/identity").read_text().strip()
    world.nodes[0].stop()
    stranger = hello(identity=known if claim == "key" else said, folder=KEYED_AT)
    with HostileNode("127.0.0.20", world.port, world.key(), **stranger):
        row = find_row(world.sweep("--range", "9-10,20", code=None), "127.0.0.20")
    assert row["folder"] == ("" if claim == "key" else "127.0.0.20")
    assert json.loads((world.store / KEYED_AT / "node.json").read_text())["identity"] == known


def test_node_changes_its_key_between_hello_and_copy(world: World) -> None:
    targets = [("127.0.0.30", world.port), ("127.0.0.31", world.port)]
    with contextlib.ExitStack() as held:
        for target in targets:
            held.enter_context(HostileNode(*target, world.key()))
        held.enter_context(Relay("127.0.0.20", world.port, *targets))
        row = find_row(world.sweep("--range", "20", *IMPATIENT, code=1), "127.0.0.20")
    assert "has another key than a moment before" in row["error"]
    assert row["snapshot"] is None


def test_node_s_answers_played_again_to_a_server(world: World) -> None:
    (world.files / "a").write_text("old news")
    node = world.keyed()
    with Relay("127.0.0.20", world.port, (KEYED_AT, world.port)) as relay:
        world.sweep("--range", "20")
    node.stop()
    before = list((world.store / "127.0.0.20/snapshots").iterdir())
    for recorded in filter(None, relay.answered):
        with Listener("127.0.0.20", world.port, say(recorded)):
            row = find_row(world.sweep("--range", "20", code=None), "127.0.0.20")
        assert row["state"] != "node" and row["snapshot"] is None
    assert list((world.store / "127.0.0.20/snapshots").iterdir()) == before


def test_node_whose_answers_trickle(world: World) -> None:
    """One byte in a while is no sign of a node that owes an answer."""
    fake = HostileNode("127.0.0.30", world.port, world.key())
    fake.files = {"a": os.urandom(50_000)}
    with fake, Relay("127.0.0.20", world.port, ("127.0.0.30", world.port), pause=0.3, free=2500):
        started = time.monotonic()
        row = find_row(world.sweep("--range", "20", *IMPATIENT, code=1), "127.0.0.20")
    assert "did not answer within 1 s" in row["error"]
    assert time.monotonic() - started < 30


# ---- the server: what has no end ----


def list_for_ever(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Any:
    """List 100 files that were not listed before, and say that there are more."""
    count = len(fake.asked)
    time.sleep(0.02)
    return listing(*(make_line(f"{count:06}-{i:03}") for i in range(100)), more=True)


def read_for_ever(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Any:
    """Have whatever chunk is asked for."""
    chunk = os.urandom(64) * (MIB // 64)
    return reading([{**make_item(chunk), "size": 1 << 40, "state": [1 << 40, 1, 1, 1]}], chunk)


@pytest.mark.parametrize(
    ("flags", "answers", "sentence"),
    [
        (("--most-files", "5000"), {"LIST": list_for_ever, "READ": lambda *_: None}, "5000 files of --most-files"),
        (("--most-bytes", "20MiB"), {"LIST": list_lines(make_line("a", 1 << 40)), "READ": read_for_ever}, "20.0 MiB"),
        (("--longest", "1.5s"), {"LIST": list_lines(make_line("a", 1 << 40)), "READ": read_for_ever}, "--longest"),
    ],
    ids=["files", "bytes", "time"],
)
def test_copy_without_end_is_ended(
    world: World, flags: tuple[str, ...], answers: dict[str, Callable[..., Any]], sentence: str
) -> None:
    if flags[0] == "--most-files":
        answers["READ"] = lambda fake, asked, body: reading([{"status": "gone"}] * len(asked["files"]), b"")
    make_nodes(world)
    with HostileNode("127.0.0.20", world.port, world.key(), **answers) as fake:
        done = sweep_watched(world, "--range", "9-10,20", *flags)
        row = done.row("127.0.0.20")
        assert row["exit_code"] == 1 and sentence in row["error"]
        assert done.memory < 200 * MIB
        assert [done.row(address)["exit_code"] for address in ROLES.values()] == [0, 0]
        fake.answers = {}
        assert find_row(world.sweep("--range", "20"), "127.0.0.20")["snapshot"]["grade"] == "stable"


# ---- what a restore makes of a hostile listing ----


def list_snapshots(world: World, folder: str) -> list[str]:
    """Return the names of a node's snapshots."""
    return sorted(path.stem for path in (world.store / folder / "snapshots").glob("*.json"))


def make_other(path: str, kind: str, **more: Any) -> bytes:
    return zbackup.encode_stat(zbackup.Stat(path.encode(), kind, mtime=1, **{"mode": 0o755, **more}))


def outcome(folder: Path) -> list[str]:
    """Return all that is below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("order", ["symlink", "folder, then symlink", "symlink, then folder"])
def test_listing_with_a_symlink_for_a_folder_writes_nothing_outside(world: World, order: str) -> None:
    outside = world.path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    files = (make_line("d/kept", 6), make_line("d/new", 6))
    trap = list_lines(make_other("d", "symlink", target=os.fsencode(outside)), *files)
    folder = list_lines(make_other("d", "directory"), *files)
    rounds = {"symlink": [trap], "folder, then symlink": [folder, trap], "symlink, then folder": [trap, folder]}
    fake = HostileNode("127.0.0.20", world.port, world.key())
    fake.files = {"d/kept": b"honest", "d/new": b"honest"}
    with fake:
        for answer in rounds[order]:
            fake.answers = {"LIST": answer}
            world.sweep("--range", "20", code=None)
    names = list_snapshots(world, "127.0.0.20")
    assert len(names) == len(rounds[order])
    for name in names:
        world.restore("127.0.0.20", "--at", name, to=name, code=None)
        world.restore("127.0.0.20", "d/new", "--at", name, to=name, code=None)
        world.restore("127.0.0.20", "--at", name, "--overwrite", to=name, code=None)
    assert outcome(outside) == ["kept"]
    assert (outside / "kept").read_text() == "kept"


def test_listing_of_devices_and_rights_stays_harmless_in_latest(world: World) -> None:
    """`latest` is for everyone who owns the store: it has no file that gives rights, and none that others can read."""
    lines = [
        make_other("device", "character", rdev=os.makedev(1, 3)),
        make_other("disk", "block", rdev=os.makedev(8, 0)),
        make_other("fifo", "fifo"),
        make_other("link", "symlink", target=b"/etc/passwd"),
        make_other("open", "directory", mode=0o7777),
        make_line("open/su", 6, mode=0o7777, uid=0, gid=0),
        make_line("up", 6, mode=0o6666),
    ]
    fake = HostileNode("127.0.0.20", world.port, world.key(), LIST=list_lines(*lines))
    fake.files = {"open/su": b"honest", "up": b"honest"}
    with fake:
        world.sweep("--range", "20", code=None)
    latest = world.store / "127.0.0.20/latest"
    assert (latest / "open/su").read_text() == "honest"
    for path in [latest, *latest.rglob("*")]:
        found = path.lstat()
        assert stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), path
        assert path.is_symlink() or found.st_mode & 0o7077 == 0, (path, oct(found.st_mode))


# ---- symlinks that come and go while a node is copied ----


def make_secret(size: int) -> tuple[bytes, list[bytes]]:
    """Return bytes that are nowhere else, and samples of them."""
    secret = os.urandom(size)
    return secret, [secret[at : at + 24] for at in range(0, size - 24, max(24, size // 400))]


def find_leaks(world: World, samples: list[bytes]) -> list[Path]:
    """Return the files of the store, and of all its versions restored, that have any of the samples."""
    for name in list_snapshots(world, KEYED_AT):
        world.restore(KEYED_AT, "--at", name, to=f"back/{name}", code=None)
    files = [path for top in ("backups", "back") for path in (world.path / top).rglob("*")]
    plain = [path for path in files if path.is_file() and not path.is_symlink()]
    assert len(plain) > 10
    return [path for path in plain if any(sample in data for data in [path.read_bytes()] for sample in samples)]


def read_often(client: Client, samples: list[bytes], *paths: str, seconds: float = 1.2) -> int:
    """Ask a node for files again and again, and for what there is; returns how often something of them came."""
    came = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.ask(OPEN)
        listed = client.ask(LIST)
        codec, size = listed.fields.integer("codec"), listed.fields.integer("size")
        assert b"only-outside" not in zbackup.decompress(codec, listed.body, size)
        for path in paths:
            for chunk in (0, 1):
                answer = client.ask(READ, files=[{"path": path, "chunk": chunk, "state": []}])
                came += len(answer.body) > 0
                assert not any(sample in bytes(answer.body) for sample in samples), path
    return came


def test_files_swapped_with_symlinks_lead_nowhere(world: World, clients: Callable[..., Client]) -> None:
    """Folders, a small and a large file change places with symlinks to secrets, as fast as they can."""
    large, samples = make_secret(2 * MIB)
    small, more = make_secret(5000)
    outside = world.path / "outside"
    for folder in (outside, world.files / "folder"):
        (folder / "deep").mkdir(parents=True)
        for name, data in (("small", small), ("deep/large", large), ("deep/small", small)):
            (folder / name).write_bytes(data if folder == outside else os.urandom(len(data)))
    (outside / "only-outside").touch()
    (outside / "deep/only-outside").touch()
    (world.files / "small").write_bytes(os.urandom(5000))
    pairs = []
    for name, target in (("folder", "."), ("folder/deep", "deep"), ("small", "small")):
        pairs.append((world.files / name, world.path / f"to-{Path(name).name}"))
        pairs[-1][1].symlink_to(outside / target)
    node = world.keyed("--margin", "0s")
    client = clients(KEYED_AT, load_pair(world).secret)
    came = 0
    for chosen in (pairs[::2], pairs[1:2]):
        with swapped(*chosen) as count:
            paths = ("files/folder/small", "files/folder/deep/large", "files/folder/deep/small", "files/small")
            came += read_often(client, [*samples[::10], *more], *paths)
            done = world.sweep("--tries", "2", "--pause", "1ms", code=None)
            assert done["exit_code"] in (0, 1)
        assert count[0] > 500
    assert came > 20, "some of the readings hit the files themselves"
    assert find_leaks(world, [*samples, *more]) == []
    assert "Traceback" not in node.output
    assert world.sweep(code=None)["nodes"][0]["error"] == ""


def test_database_swapped_with_a_symlink_leads_nowhere(world: World, clients: Callable[..., Client]) -> None:
    secret, samples = make_secret(40_000)
    for path, data in ((world.path / "outside.db", secret), (world.files / "bd", os.urandom(40_000))):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)")
            rows = ((at, data[at : at + 1000]) for at in range(0, 40_000, 1000))
            connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
    (world.path / "to-db").symlink_to(world.path / "outside.db")
    world.keyed("--margin", "0s")
    client = clients(KEYED_AT, load_pair(world).secret)
    with swapped((world.files / "bd", world.path / "to-db")) as count:
        assert read_often(client, samples, *["files/bd"] * 20, seconds=2.5) > 10
        world.sweep("--checksum", "--tries", "2", "--pause", "1ms", code=None)
    assert count[0] > 500
    assert find_leaks(world, samples) == []


LONG_ROOTS = """
import sys, zbackup
real = zbackup.Session._open

def open_copy(self, message):
    return {**real(self, message), "roots": ["\\x01" * 32768], "missing": ["\\x02" * 32768]}

zbackup.Session._open = open_copy
sys.exit(zbackup.main(sys.argv[1:]))
"""


def test_names_that_grow_when_they_are_shown(world: World) -> None:
    """Of what a node serves: the snapshot can be read again, and nothing in the store is taken for damage."""
    program = world.path / "long.py"
    program.write_text(LONG_ROOTS)
    (world.files / "a").write_text("a")
    world.node(program=program)
    world.sweep(code=1)
    assert len(world.listed(FOLDER)) == 1
    world.run("verify")
    world.run("prune", "--keep", "last 1")


def test_folder_of_the_index_is_not_to_be_had(world: World) -> None:
    """A node that asks for the name of the index's journal would lock the store."""
    (world.files / "a").write_text("a")
    world.run("node", "--folder", "index.sqlite-journal", "--file", "files", code=2)
    world.node("--folder", "laptop")
    world.sweep()
    os.rename(world.store / "laptop", world.store / "index.sqlite-journal")  # as an older version let it be
    (world.store / "index.sqlite-wal").unlink(missing_ok=True)
    done = world.run("list", code=4)
    assert "index.sqlite-journal is a folder, which SQLite takes for its own: rename it" in done.stderr
    os.rename(world.store / "index.sqlite-journal", world.store / "laptop")
    world.run("verify")
