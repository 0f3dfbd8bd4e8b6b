"""Chapter 6, WIRE: messages, a server's side against bad nodes, a node against bad servers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from conftest import AT_ONCE, PROGRAM, Process, World, make_database, path_before, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import zbackup
from zbackup import (
    CHUNK,
    CLOSE,
    ERROR,
    HELLO,
    LIST,
    OPEN,
    PAGE_HASH,
    READ,
    WORKING,
    Address,
    Interrupted,
    Message,
    NodeError,
    Peer,
    ProtocolError,
    UsageError,
    Wire,
)

# ---- messages ----


def decode(frames: Sequence[bytes]) -> Message:
    return zbackup.decode_message([zmq.Frame(frame) for frame in frames])


@given(
    st.text(max_size=20),
    st.integers(0, 1 << 63),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.lists(st.booleans())),
    st.binary(max_size=100),
)
def test_message_comes_out_as_it_went_in(kind: str, number: int, fields: dict[str, Any], body: bytes) -> None:
    fields = {name: value for name, value in fields.items() if name not in ("kind", "number")}
    message = decode(zbackup.encode_message(kind, number, fields, body))
    assert (message.kind, message.number, bytes(message.body)) == (kind, number, body)
    assert message.fields.values == {"kind": kind, "number": number, **fields}


@settings(max_examples=400)
@given(st.data())
def test_mutated_message_is_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    head, body = zbackup.encode_message(READ, 7, {"files": [{"path": "a", "chunk": 0, "state": [1, 2]}]}, b"body")
    wrong = bytearray(head)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wrong) - 1))
        wrong[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        message = decode([bytes(wrong), body])
    except ProtocolError:
        return
    assert 0 <= message.number <= 1 << 63
    assert len(message.kind) <= 20
    with contextlib.suppress(zbackup.FormatError):
        zbackup.decode_asks(message)
    with contextlib.suppress(zbackup.FormatError, NodeError):
        zbackup.decode_hello(message)


NO_MESSAGES: dict[str, list[bytes]] = {
    "nothing": [],
    "one frame": [b'{"kind":"HELLO","number":1}'],
    "three frames": [b'{"kind":"HELLO","number":1}', b"", b""],
    "no JSON": [b"\0\xff", b""],
    "a list": [b'["HELLO",1]', b""],
    "no number": [b'{"kind":"HELLO"}', b""],
    "number as text": [b'{"kind":"HELLO","number":"1"}', b""],
    "number as truth": [b'{"kind":"HELLO","number":true}', b""],
    "number below zero": [b'{"kind":"HELLO","number":-1}', b""],
    "number with a fraction": [b'{"kind":"HELLO","number":1.0}', b""],
    "number beyond 64 bits": [b'{"kind":"HELLO","number":%d}' % (1 << 64), b""],
    "number of 10,000 digits": [b'{"kind":"HELLO","number":' + b"9" * 10000 + b"}", b""],
    "endless kind": [b'{"kind":"' + b"X" * 21 + b'","number":1}', b""],
    "kind as list": [b'{"kind":["HELLO"],"number":1}', b""],
    "deep": [b'{"kind":' + b"[" * 100000 + b"]" * 100000 + b',"number":1}', b""],
    "long body": [b'{"kind":"HELLO","number":1}', bytes(zbackup.BODY_LIMIT + 1)],
}


@pytest.mark.parametrize("frames", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_no_message_is_a_protocol_error(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


@pytest.mark.parametrize("depth", range(850, 1001, 10))
def test_nesting_near_the_interpreters_limit(depth: int) -> None:
    head = b'{"kind":' + b"[" * depth + b"]" * depth + b',"number":1}'
    with pytest.raises(ProtocolError):
        decode([head, b""])


def answer_hello(**changes: Any) -> Message:
    fields = {"protocol": 1, "identity": "0" * 32, "instance": "1", "name": "n", "codecs": ["zlib"], "roots": ["a"]}
    kind = changes.pop("kind", HELLO)
    return decode(zbackup.encode_message(kind, 1, {**fields, **changes}))


def test_hello_with_another_protocol_names_both() -> None:
    with pytest.raises(ProtocolError, match="protocol 9, this server 1"):
        zbackup.decode_hello(answer_hello(protocol=9))


def test_hello_that_is_none_refused() -> None:
    assert zbackup.decode_hello(answer_hello()).identity == "0" * 32
    for changes in ({"kind": "OPEN"}, {"identity": "no"}, {"identity": "0" * 31 + "/"}):
        with pytest.raises(ProtocolError):
            zbackup.decode_hello(answer_hello(**changes))
    for changes in ({"identity": 1}, {"name": "x" * 256}, {"codecs": "zlib"}, {"roots": [1]}):
        with pytest.raises(zbackup.FormatError):
            zbackup.decode_hello(answer_hello(**changes))
    with pytest.raises(NodeError, match="go away") as caught:
        zbackup.decode_hello(answer_hello(kind=ERROR, code="refused", message="go away"))
    assert caught.value.code == "refused"


# ---- a server's side: Peer against a node that is none ----

Act = Callable[["FakeNode", list[bytes], dict[str, Any]], None]


class FakeNode:
    """A raw ROUTER in a thread, which does with each question what `act` says."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.questions: list[dict[str, Any]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.is_set():
            if self.router.poll(10):
                frames = self.router.recv_multipart()
                self.questions.append(json.loads(frames[1]))
                self.act(self, frames, self.questions[-1])

    def say(self, peer: bytes, kind: str, number: int, **fields: Any) -> None:
        self.router.send_multipart([peer, *zbackup.encode_message(kind, number, fields)])

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.context.destroy(linger=0)


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire(zbackup.make_clock(), threading.Event(), heartbeat=1.0)
    yield made
    made.close()


@contextlib.contextmanager
def talking(wire: Wire, act: Act) -> Iterator[tuple[FakeNode, Peer]]:
    """A fake node and a Peer that is connected to it."""
    node = FakeNode(act)
    peer = Peer(wire, Address("127.0.0.1", node.port), 2.0)
    try:
        yield node, peer
    finally:
        peer.close()
        node.close()


def ask(peer: Peer, timeout: float, longest: float = 20.0) -> list[Message]:
    """Ask one question and wait for its answer."""
    answers: list[Message] = []
    peer.ask(LIST, {}, answers.append)
    peer.step(timeout, longest)
    return answers


def stay_silent(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
    """A node that says nothing."""


def test_answers_come_in_order(wire: Wire) -> None:
    def echo(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        node.say(frames[0], LIST, question["number"], double=2 * question["value"])

    with talking(wire, echo) as (_, peer):
        found: list[int] = []
        for value in range(50):
            peer.ask(LIST, {"value": value}, lambda message: found.append(message.fields.integer("double")), cost=10)
        for _ in range(50):
            peer.step(5, 5)
        assert found == list(range(0, 100, 2))
        assert peer.received > 50 * 20


def test_node_that_is_always_faster_than_the_server_sends_no_endless_message(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that came before the first wait for an answer was taken for one message that does not end."""
    monkeypatch.setattr(zbackup, "UNFINISHED_LIMIT", 1 << 20)

    def pad(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        node.say(frames[0], LIST, question["number"], padding="x" * (1 << 18))

    with talking(wire, pad) as (node, peer):
        answers: list[Message] = []
        for _ in range(12):
            peer.ask(LIST, {}, answers.append)
        wait_until(lambda: len(node.questions) == 12, what="12 questions answered")
        time.sleep(0.3)  # until they wait here
        for _ in range(12):
            peer.step(5, 5)
        assert len(answers) == 12
        assert peer.receive(100) is None


def test_silent_node_ends_the_wait(wire: Wire) -> None:
    with talking(wire, stay_silent) as (_, peer):
        started = time.monotonic()
        with pytest.raises(NodeError, match="did not answer within 0.5 s") as caught:
            ask(peer, 0.5)
        assert caught.value.code == "silent"
        assert 0.5 <= time.monotonic() - started < AT_ONCE


def test_working_keeps_the_wait_alive(wire: Wire) -> None:
    def work(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        for _ in range(10):
            node.say(frames[0], WORKING, question["number"])
            time.sleep(0.2)
        node.say(frames[0], LIST, question["number"])

    with talking(wire, work) as (_, peer):
        assert [message.kind for message in ask(peer, 1.5)] == [LIST]


def test_working_is_not_believed_for_ever(wire: Wire) -> None:
    def work(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        while not node.ended.wait(0.05):
            node.say(frames[0], WORKING, question["number"])

    with talking(wire, work) as (_, peer):
        started = time.monotonic()
        with pytest.raises(NodeError, match="still working after 1 s"):
            ask(peer, 0.5, longest=1.0)
        assert time.monotonic() - started < AT_ONCE


@pytest.mark.parametrize("shift", [-1, 1])
def test_answer_with_a_wrong_number(wire: Wire, shift: int) -> None:
    def shifted(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        node.say(frames[0], LIST, question["number"] + shift)

    with talking(wire, shifted) as (_, peer), pytest.raises(ProtocolError, match="nobody asked for"):
        ask(peer, 5)


def test_second_answer_to_one_question(wire: Wire) -> None:
    def twice(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        for _ in range(2):
            node.say(frames[0], LIST, question["number"])

    with talking(wire, twice) as (_, peer):
        assert len(ask(peer, 5)) == 1
        with pytest.raises(ProtocolError, match="nobody asked for"):
            peer.step(5, 5)


def test_error_answer_is_raised_with_its_code(wire: Wire) -> None:
    def refuse(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        node.say(frames[0], ERROR, question["number"], code="busy", message="no\x1b[2J")

    with talking(wire, refuse) as (_, peer):
        with pytest.raises(NodeError, match=r"no\\x1b\[2J") as caught:
            ask(peer, 5)
        assert caught.value.code == "busy"


def test_error_answer_of_wrong_types(wire: Wire) -> None:
    def refuse(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        node.say(frames[0], ERROR, question["number"], code=["busy"], message=7)

    with talking(wire, refuse) as (_, peer), pytest.raises(NodeError):
        ask(peer, 5)


def test_answer_that_is_no_message(wire: Wire) -> None:
    def babble(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        node.router.send_multipart([frames[0], b"junk"])

    with talking(wire, babble) as (_, peer), pytest.raises(ProtocolError, match="1 frames"):
        ask(peer, 5)


def test_answer_beyond_the_limit_ends_the_connection(wire: Wire) -> None:
    huge = bytes(zbackup.HEAD_LIMIT + 1)
    with talking(wire, lambda node, frames, question: node.router.send_multipart([frames[0], huge, b""])) as (_, peer):
        with pytest.raises(NodeError) as caught:
            ask(peer, 5)
        assert caught.value.code == "lost"


def test_node_that_was_killed_is_noticed_at_once(world: World, wire: Wire) -> None:
    node = world.node("--before", "sleep 30")
    peer = Peer(wire, Address("127.0.0.9", world.port), 2.0)
    try:
        peer.ask(OPEN, {"codecs": []}, lambda message: None)
        assert peer.receive(1500) is not None, "it says that it is working"
        node.kill()
        started = time.monotonic()
        with pytest.raises(NodeError, match="connection to the node was lost"):
            peer.step(30, 30)
        assert time.monotonic() - started < AT_ONCE
    finally:
        peer.close()


def test_nobody_listening_is_noted(wire: Wire) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        peer = Peer(wire, Address("127.0.0.1", taken.getsockname()[1]), 0.5)
        try:
            with pytest.raises(NodeError, match="did not answer"):
                ask(peer, 0.5)
            assert zbackup.REFUSED in peer.events
        finally:
            peer.close()


def test_stop_interrupts_a_wait(wire: Wire) -> None:
    with talking(wire, stay_silent) as (_, peer):
        threading.Timer(0.2, wire.stop.set).start()
        started = time.monotonic()
        with pytest.raises(Interrupted):
            ask(peer, 30)
        assert time.monotonic() - started < AT_ONCE


def test_window_bounds_what_is_asked_for(wire: Wire) -> None:
    def answer_late(node: FakeNode, frames: list[bytes], question: dict[str, Any]) -> None:
        if len(node.questions) == 5:
            for number in range(1, 6):
                node.say(frames[0], READ, number)

    with talking(wire, answer_late) as (_, peer):
        window = 4 * CHUNK
        assert peer.has_room(100 * CHUNK, window), "one answer may always be asked for"
        for _ in range(4):
            assert peer.has_room(CHUNK, window)
            peer.ask(READ, {}, lambda message: None, cost=CHUNK)
        assert not peer.has_room(1, window)
        assert peer.has_room(0, window)
        peer.ask(READ, {}, lambda message: None)
        peer.step(5, 5)
        assert peer.has_room(CHUNK, window)
        for _ in range(4):
            peer.step(5, 5)
        for _ in range(4 + zbackup.ASIDE):
            assert peer.has_room(0, window)
            peer.ask(READ, {}, lambda message: None)
        assert not peer.has_room(0, window), "questions without a cost are bounded too"


def test_missing_pyzmq_said_in_one_sentence(world: World) -> None:
    (world.path / "zmq.py").write_text("raise ImportError('no libzmq')")
    world.env["PYTHONPATH"] = path_before(world.path)
    said = world.run("node", "--file", "files", code=1).stderr
    assert "pip install pyzmq" in said
    assert said.count("\n") == 1


# ---- a node's side: the real process against a raw DEALER ----


class Client:
    """A server that may send anything; has a secret key and claims a routing id where they are given."""

    def __init__(self, world: World, address: str = "127.0.0.9", secret: str = "", name: bytes = b"") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        if secret:
            self.socket.curve_server = 1
            self.socket.curve_secretkey = secret.encode()
        if name:
            self.socket.routing_id = name
        self.socket.connect(f"tcp://{address}:{world.port}")
        self.number = 0

    def send(self, kind: str, body: bytes = b"", **fields: Any) -> int:
        self.number += 1
        self.socket.send_multipart(zbackup.encode_message(kind, self.number, fields, body))
        return self.number

    def receive(self, timeout: float = 5.0) -> Message | None:
        """Return the next answer that is not WORKING."""
        while self.socket.poll(timeout * 1000):
            message = decode(self.socket.recv_multipart())
            if message.kind != WORKING:
                return message
        return None

    def ask(self, kind: str, body: bytes = b"", **fields: Any) -> Message:
        number = self.send(kind, body, **fields)
        message = self.receive()
        assert message is not None, f"no answer to {kind}"
        assert message.number == number
        return message

    def error(self, kind: str, body: bytes = b"", **fields: Any) -> str:
        """Return the code of the error that a question is answered with."""
        message = self.ask(kind, body, **fields)
        assert message.kind == ERROR, message.fields.values
        assert message.fields.text("message")
        return message.fields.text("code")

    def items(self, *files: dict[str, Any], body: bytes = b"") -> list[dict[str, Any]]:
        answer = self.ask(READ, body, files=[{"state": [], **file} for file in files])
        found: list[dict[str, Any]] = answer.fields.items("items", 256)
        return found

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    """A raw client of the world's node, which is still to be started."""
    made = Client(world)
    yield made
    made.close()


def check_honest(world: World, node: Process) -> None:
    """Check that a node which was treated badly still serves, that nothing in it broke, and that it ends well."""
    if not any(world.files.iterdir()):
        (world.files / "a").write_text("data")
    report = world.sweep()
    assert report["nodes"][0]["snapshot"]["grade"] in ("stable", "frozen")
    assert "fault of zbackup" not in node.output + json.dumps(report)
    assert node.stop() == 0
    assert "Traceback" not in node.output, node.output


def test_copy_step_by_step(world: World, client: Client) -> None:
    (world.files / "a").write_bytes(b"data")
    node = world.node("--name", "me")
    hello = client.ask(HELLO, protocol=1, codecs=["zlib"])
    assert zbackup.decode_hello(hello).name == "me"
    opened = client.ask(OPEN, codecs=["zlib"])
    assert opened.fields.values["roots"] == ["files"]
    listed = client.ask(LIST)
    lines = zbackup.decompress(listed.fields.integer("codec"), listed.body, listed.fields.integer("size"))
    assert [zbackup.decode_stat(line).path for line in lines.split(b"\n")] == [b"files", b"files/a"]
    assert not listed.fields.flag("more")
    [item] = client.items({"path": "files/a"})
    assert (item["status"], item["length"], item["size"]) == ("whole", 4, 4)
    assert client.ask(CLOSE).fields.text("problem") == ""
    check_honest(world, node)


def test_questions_out_of_turn(world: World, client: Client) -> None:
    node = world.node()
    for kind in (LIST, READ, CLOSE, "NOTHING", ERROR, WORKING, ""):
        assert client.error(kind) == "closed"
    client.ask(OPEN)
    for kind in ("NOTHING", ERROR, WORKING, "open", "__class__", "\x1b[2J"):
        assert client.error(kind) == "unknown"
    client.ask(LIST)
    assert not client.ask(LIST).fields.flag("more"), "a listing that has ended stays ended"
    client.ask(OPEN)
    assert client.ask(LIST).fields.integer("size"), "OPEN begins again"
    check_honest(world, node)


def test_answers_in_the_order_of_the_questions(world: World, client: Client) -> None:
    (world.files / "a").write_text("data")
    world.node()
    kinds = [OPEN, LIST, READ, "NOTHING", OPEN, READ, CLOSE]
    for kind in kinds:
        client.send(kind)
    found = [client.receive() for _ in kinds]
    assert [message and message.number for message in found] == list(range(1, 8))


def test_question_right_behind_close_is_answered(world: World, client: Client) -> None:
    world.node("--before", "true", "--after", "sleep 0.3")
    for kind in (OPEN, CLOSE, OPEN):
        client.send(kind)
    numbers = []
    while len(numbers) < 3:
        message = client.receive(2)
        assert message is not None, f"only {numbers} were answered"
        numbers.append(message.number)


def test_no_messages_leave_a_node_serving(world: World, client: Client) -> None:
    node = world.node()
    wrong = [frames for frames in NO_MESSAGES.values() if frames]
    for frames in wrong:
        if max(map(len, frames)) < zbackup.QUESTION_LIMIT:
            client.socket.send_multipart(frames)
    assert client.ask(HELLO).kind == HELLO
    client.ask(OPEN)
    for frames in wrong:
        if max(map(len, frames)) < zbackup.QUESTION_LIMIT:
            client.socket.send_multipart(frames)
    assert client.ask(LIST).kind == LIST
    check_honest(world, node)


@pytest.mark.parametrize("place", [0, 1])
def test_question_beyond_the_limit_costs_its_connection_alone(world: World, client: Client, place: int) -> None:
    node = world.node()
    client.ask(OPEN)
    with contextlib.closing(Client(world)) as other:
        assert other.ask(HELLO).kind == HELLO
        events = other.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        frames = [b'{"kind":"HELLO","number":2}', b""]
        frames[place] = bytes(zbackup.QUESTION_LIMIT + zbackup.PAGE + 1)
        other.socket.send_multipart(frames)
        assert events.poll(5000), "the connection is still there"
        other.socket.disable_monitor()
        events.close()
    assert client.ask(LIST).kind == LIST
    client.ask(CLOSE)
    check_honest(world, node)


WRONG_READS: dict[str, dict[str, Any]] = {
    "files as text": {"files": "files/a"},
    "file as text": {"files": ["files/a"]},
    "no path": {"files": [{"chunk": 0}]},
    "path as number": {"files": [{"path": 1}]},
    "chunk below zero": {"files": [{"path": "files/a", "chunk": -1}]},
    "chunk as text": {"files": [{"path": "files/a", "chunk": "0"}]},
    "chunk far too high": {"files": [{"path": "files/a", "chunk": 1 << 62}]},
    "state as text": {"files": [{"path": "files/a", "state": "1"}]},
    "state too long": {"files": [{"path": "files/a", "state": [1] * 7}]},
    "state beyond 64 bits": {"files": [{"path": "files/a", "state": [1 << 70]}]},
    "hashes missing": {"files": [{"path": "files/a", "pages": 2}]},
    "more hashes than pages": {"files": [{"path": "files/a", "pages": 257}]},
    "tell as number": {"files": [{"path": "files/a", "tell": 1}]},
    "need as text": {"files": [{"path": "files/a", "need": "0"}]},
    "need of texts": {"files": [{"path": "files/a", "need": [["0", "1"]]}]},
    "need of one number": {"files": [{"path": "files/a", "need": [[0]]}]},
    "need of no pages": {"files": [{"path": "files/a", "need": [[0, 0]]}]},
    "need below zero": {"files": [{"path": "files/a", "need": [[-1, 1]]}]},
    "need twice": {"files": [{"path": "files/a", "need": [[0, 2], [1, 1]]}]},
    "need beyond the chunk": {"files": [{"path": "files/a", "need": [[256, 1]]}]},
    "257 files": {"files": [{"path": "files/a"}] * 257},
    "up": {"files": [{"path": "files/../secret"}]},
    "up at the start": {"files": [{"path": "../secret"}]},
    "dot": {"files": [{"path": "files/./a"}]},
    "absolute": {"files": [{"path": "/etc/passwd"}]},
    "two slashes": {"files": [{"path": "files//a"}]},
    "slash at the end": {"files": [{"path": "files/a/"}]},
    "empty": {"files": [{"path": ""}]},
    "NUL": {"files": [{"path": "files/a\0"}]},
    "surrogates": {"files": [{"path": "files/\ud800"}]},
    "endless": {"files": [{"path": "a/" * 20000 + "a"}]},
}


def test_wrong_reads_are_errors(world: World, client: Client) -> None:
    (world.files / "a").write_text("data")
    (world.path / "secret").write_text("secret")
    node = world.node()
    client.ask(OPEN)
    assert {name: client.error(READ, **fields) for name, fields in WRONG_READS.items()} == dict.fromkeys(
        WRONG_READS, "wrong"
    )
    assert client.error(READ, bytes(PAGE_HASH), files=[{"path": "files/a"}]) == "wrong", "hashes of nothing"
    assert client.error(OPEN, codecs="zlib") == "wrong"
    assert client.error(OPEN, codecs=[1]) == "wrong"
    [item] = client.items({"path": "files/a", "pages": 1}, body=bytes(PAGE_HASH))
    assert (item["status"], item["runs"]) == ("patch", [[0, 1]])
    check_honest(world, node)


def test_read_of_the_highest_chunk_is_no_fault(world: World, client: Client) -> None:
    (world.files / "a").write_text("data")
    world.node()
    client.ask(OPEN)
    client.items({"path": "files/a"})
    highest = zbackup.FILE_LIMIT // CHUNK
    assert client.items({"path": "files/a", "chunk": highest})[0]["status"] in ("end", "error")
    assert client.error(READ, files=[{"path": "files/a", "chunk": highest + 1}]) == "wrong"


def test_read_of_256_files(world: World, client: Client) -> None:
    for number in range(256):
        (world.files / f"{number}").write_text(f"{number}")
    world.node()
    client.ask(OPEN)
    answer = client.ask(READ, files=[{"path": f"files/{number}", "state": []} for number in range(256)])
    raw = zbackup.decompress(answer.fields.integer("codec"), answer.body, answer.fields.integer("size"))
    assert raw.decode() == "".join(f"{number}" for number in range(256))


def test_read_of_more_than_a_message_holds_is_answered_later(world: World, client: Client) -> None:
    for name in "abc":
        (world.files / name).write_bytes(os.urandom(CHUNK - 1))
    world.node()
    client.ask(OPEN)
    answer = client.ask(READ, files=[{"path": f"files/{name}", "state": []} for name in "abc"])
    assert [item["status"] for item in answer.fields.items("items", 3)] == ["whole", "whole", "later"]
    assert len(answer.body) == 2 * CHUNK - 2


def test_listing_of_long_lines_comes_in_batches(world: World, client: Client) -> None:
    folder = world.files
    for _ in range(12):
        folder = folder / ("\x01" * 250)
    folder.mkdir(parents=True)
    for number in range(300):
        (folder / f"{number}").touch()
    world.node()
    client.ask(OPEN, codecs=["plain"])
    count, more = 0, True
    while more:
        answer = client.ask(LIST)
        assert len(answer.body) <= CHUNK
        more = answer.fields.flag("more")
        count += len(bytes(answer.body).split(b"\n")) if answer.body else 0
    assert count == 313


def test_flood_without_reading(world: World, client: Client) -> None:
    (world.files / "a").write_bytes(os.urandom(CHUNK))
    node = world.node()
    client.socket.sndhwm = client.socket.rcvhwm = 1
    client.ask(OPEN)
    for _ in range(1000):
        with contextlib.suppress(zmq.Again):
            client.socket.send_multipart(
                zbackup.encode_message(READ, 1, {"files": [{"path": "files/a", "state": []}]}), zmq.NOBLOCK
            )
    check_honest(world, node)


def test_more_questions_than_may_wait(world: World, client: Client) -> None:
    node = world.node("--before", "sleep 0.5")
    for _ in range(zbackup.QUEUE_LIMIT + 10):
        client.send(OPEN if client.number == 0 else LIST)
    codes = []
    for _ in range(zbackup.QUEUE_LIMIT + 10):
        message = client.receive()
        assert message is not None
        codes.append(message.fields.text("code", ""))
    assert 1 <= codes.count("flood") <= 10
    assert codes.count("") == len(codes) - codes.count("flood")
    client.ask(CLOSE)
    check_honest(world, node)


def test_wide_window_is_no_flood(world: World) -> None:
    with open(world.files / "a", "wb") as file:
        for number in range(200):
            file.write(bytes([number + 1]) * CHUNK)
    world.node()
    world.sweep("--window", "150M", "--no-latest")


def test_oversized_frames_end_only_their_connection(world: World, client: Client) -> None:
    node = world.node()
    client.socket.send_multipart([bytes(zbackup.HEAD_LIMIT + 1), b""])
    client.socket.send_multipart([b"{}", bytes(100 << 20)])
    other = Client(world)
    assert other.ask(HELLO).kind == HELLO
    other.close()
    check_honest(world, node)


def test_garbage_and_half_open_connections(world: World) -> None:
    node = world.node()
    with contextlib.ExitStack() as held:
        for number in range(200):
            raw = held.enter_context(socket.create_connection(("127.0.0.9", world.port)))
            if number % 4 == 1:
                raw.sendall(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")
            elif number % 4 == 2:
                raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
            elif number % 4 == 3:
                raw.sendall(os.urandom(500))
        check_honest(world, node)


def test_connections_beyond_the_descriptors_of_a_node(world: World) -> None:
    node = world.node()
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (100, 100))
    with contextlib.ExitStack() as held:
        for _ in range(120):
            held.enter_context(socket.create_connection(("127.0.0.9", world.port)))
        time.sleep(0.3)
    wait_until(lambda: len(os.listdir(f"/proc/{node.pid}/fd")) < 60, what="the end of the connections")
    check_honest(world, node)


def test_server_killed_in_the_middle_of_a_copy(world: World) -> None:
    with held_database(world) as spool:
        node = world.node("--session-timeout", "0.5s", "--sessions", "1")
        server = world.server()
        wait_until(lambda: os.listdir(spool), what="a frozen copy")
        server.kill()
    wait_until(lambda: "went away in the middle" in node.output, what="the end of the session")
    check_honest(world, node)


# ---- who is answered ----


def find_own_address() -> str:
    """Return an address of this machine that is not loopback, or skip."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.200", 9))  # sends nothing
        address = str(probe.getsockname()[0])
        if not zbackup.is_loopback(address):
            return address
    pytest.skip("this machine has no address beside loopback")


WITHOUT_BINDING = """
import sys
sys.path.insert(0, {folder!r})
import zbackup
zbackup.can_bind_to_loopback = lambda: False
sys.exit(zbackup.main())
"""


def make_program(world: World, binds: bool) -> Path:
    """Return the program, or one for a system that cannot bind a socket to the loopback interface."""
    if binds:
        if not zbackup.can_bind_to_loopback():
            pytest.skip("this system cannot bind a socket to the loopback interface")
        return PROGRAM
    program = world.path / "program.py"
    program.write_text(WITHOUT_BINDING.format(folder=str(PROGRAM.parent)))
    return program


@pytest.mark.parametrize("bind", ["*", "own"])
def test_other_machines_refused_unless_insecure(world: World, bind: str) -> None:
    address = find_own_address()
    (world.files / "a").write_text("data")
    node = world.node(address=address if bind == "own" else bind, program=make_program(world, False))
    with contextlib.closing(Client(world, address)) as client:
        for kind in (HELLO, OPEN, LIST, "NOTHING"):
            assert client.error(kind) == "refused"
    assert len([line for line in node.output.split("\n") if "refused" in line and address in line]) == 1, "said once"
    row = world.sweep("--host", address, code=1)["nodes"][0]
    assert (row["state"], row["snapshot"]) == ("refuses", None)
    assert "answers only its own machine; give it this server's public key with --server-key" in row["error"]
    node.stop()
    world.node("--insecure", address=address if bind == "own" else bind)
    assert world.sweep("--host", address)["nodes"][0]["snapshot"]["grade"] == "stable"


@pytest.mark.parametrize("bind", ["*", "own"])
def test_other_machines_reach_no_socket_of_a_node_without_a_key(world: World, bind: str) -> None:
    address = find_own_address()
    node = world.node(address=address if bind == "own" else bind, program=make_program(world, True))
    with contextlib.closing(Client(world, address)) as client:
        client.send(HELLO)
        assert client.receive(1.0) is None
    row = world.sweep("--host", address, code=5)["nodes"][0]
    assert (row["state"], row["snapshot"]) in [("silent", None), ("no node", None)]
    assert node.output.count("\n") == 1  # what its system keeps away, it need not refuse
    if bind == "*":
        assert world.sweep("--range", "1")["nodes"][0]["state"] == "node"


@contextlib.contextmanager
def other_machine() -> Iterator[tuple[list[str], str]]:
    """A network namespace: how to run a command there, and our address as it sees it."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("ip is not installed, or this is not root")
    name, link = f"zb{os.getpid()}", f"zb{os.getpid() % 100000}"
    steps = [
        f"ip netns add {name}",
        f"ip link add {link} type veth peer name far netns {name}",
        f"ip addr add 198.51.100.1/30 dev {link}",
        f"ip link set {link} up",
        f"ip -n {name} addr add 198.51.100.2/30 dev far",
        f"ip -n {name} link set far up",
    ]
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"cannot {step}: {done.stderr.strip()}")
        yield ["ip", "netns", "exec", name], "198.51.100.1"
    finally:
        subprocess.run(["ip", "link", "del", link], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("binds", [True, False])
def test_server_on_another_machine(world: World, binds: bool) -> None:
    (world.files / "a").write_text("data")
    with other_machine() as (there, address):
        server = [*there, sys.executable, str(PROGRAM), *world.server_flags("--host", address, "--json")]

        def sweep() -> subprocess.CompletedProcess[str]:
            return subprocess.run(server, cwd=world.path, env=world.env, capture_output=True, text=True, timeout=60)

        node = world.node(address="*", program=make_program(world, binds))
        said = sweep().stdout
        if binds:
            assert f"nothing listens at port {world.port}; a node without a key is open to its own machine only" in said
        else:
            assert "--server-key" in said and "refused 198.51.100.2:" in node.output
        for flags in (["--insecure"], ["--server-key", world.key()]):
            world.nodes[-1].stop()
            world.node(*flags, address="*")
            done = sweep()
            assert done.returncode == 0, done.stdout + done.stderr


def test_loopback_addresses() -> None:
    for address in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.9"):
        assert zbackup.is_loopback(address)
    for address in ("192.0.2.1", "::", "0.0.0.0", "::ffff:192.0.2.1", "fe80::1", "", "localhost", "127.0.0.1.evil"):
        assert not zbackup.is_loopback(address)


def test_node_at_an_ipv6_address(world: World) -> None:
    (world.files / "a").write_text("data")
    world.node(address="::1")
    assert world.sweep("--host", "::1")["nodes"][0]["snapshot"]["grade"] == "stable"


# ---- a node's life ----


def test_busy_port(world: World) -> None:
    with socket.create_server(("127.0.0.9", world.port)):
        node = world.node(wait=False)
        assert node.process.wait(20) == 1
    assert node.output.count("\n") == 1
    assert f"port {world.port} is in use" in node.output


def test_address_of_another_machine(world: World) -> None:
    node = world.node(address="no-such-host.invalid", wait=False)
    assert node.process.wait(20) == UsageError.exit_code
    assert "cannot listen" in node.output


def test_address_that_is_there_only_later(world: World, monkeypatch: pytest.MonkeyPatch, wire: Wire) -> None:
    plain, tried, said = zmq.Socket.bind, [], []

    def bind(self: zmq.Socket[bytes], endpoint: str) -> Any:
        if endpoint.startswith("tcp"):
            tried.append(endpoint)
            if len(tried) < 4:
                raise zmq.ZMQError(errno.EADDRNOTAVAIL)
        return plain(self, endpoint)

    monkeypatch.setattr(zmq.Socket, "bind", bind)
    endpoint = f"tcp://127.0.0.9:{world.port}"
    zbackup.Listener(wire, [endpoint], zbackup.Door(), said.append)
    assert tried == [endpoint] * 4 and len(said) == 1 and endpoint in said[0]


def test_second_node_with_the_same_state_refused(world: World) -> None:
    first = world.node()
    second = world.node(wait=False)
    assert second.process.wait(20) == 1
    assert "another node runs" in second.output
    first.kill()
    world.node()


def test_kernel_without_ipv6(world: World, monkeypatch: pytest.MonkeyPatch, wire: Wire) -> None:
    tried: list[int] = []
    plain = zmq.Socket.bind

    def bind(self: zmq.Socket[bytes], endpoint: str) -> Any:
        if endpoint.startswith("tcp"):
            tried.append(self.getsockopt(zmq.IPV6))
            if tried[-1]:
                raise zmq.ZMQError(97)  # EAFNOSUPPORT
        return plain(self, endpoint)

    monkeypatch.setattr(zmq.Socket, "bind", bind)
    zbackup.Listener(wire, [f"tcp://*:{world.port}"], zbackup.Door(), print)
    assert tried == [1, 0]


def test_more_servers_than_sessions(world: World, client: Client) -> None:
    node = world.node("--sessions", "1")
    client.ask(OPEN)
    other = Client(world)
    assert other.error(OPEN) == "busy"
    assert other.ask(HELLO).kind == HELLO
    client.ask(CLOSE)
    wait_until(lambda: other.ask(OPEN).kind == OPEN, what="a free session")
    other.ask(CLOSE)
    other.close()
    check_honest(world, node)


def test_server_that_went_away(world: World, client: Client) -> None:
    node = world.node(
        "--session-timeout", "0.5s", "--before", "true", "--after", "echo done >> after", "--sessions", "1"
    )
    client.ask(OPEN)
    client.close()
    wait_until(lambda: (world.path / "after").exists(), what="--after")
    assert "went away in the middle of a copy" in node.output
    check_honest(world, node)
    assert (world.path / "after").read_text() == "done\ndone\n"


def test_failing_after_of_a_server_that_went_away_is_said(world: World, client: Client) -> None:
    node = world.node("--session-timeout", "0.3s", "--before", "true", "--after", "touch after; echo broken; exit 3")
    client.ask(OPEN)
    wait_until(lambda: (world.path / "after").exists(), what="--after")
    wait_until(lambda: "broken" in node.output, what="the word about it")


def test_hooks_run_around_a_copy(world: World) -> None:
    (world.files / "a").write_text("data")
    world.node("--before", "echo before >> log; cp log files/made", "--after", "echo after >> log")
    assert world.sweep()["nodes"][0]["snapshot"]["grade"] == "stable"
    assert (world.path / "log").read_text() == "before\nafter\n"
    assert (world.restore() / "files/made").read_text() == "before\n"


def test_after_without_before(world: World) -> None:
    (world.files / "a").write_text("data")
    world.node("--after", "touch after")
    world.sweep()
    assert (world.path / "after").exists()


def test_failing_before_is_reported_with_its_output(world: World, client: Client) -> None:
    node = world.node("--before", "echo no disk; exit 3", "--after", "echo after >> log")
    assert client.error(OPEN) == "hook"
    assert client.error(LIST) == "closed"
    report = world.sweep(code=1)
    assert "--before ended with code 3: no disk" in report["nodes"][0]["error"]
    client.ask(CLOSE)
    wait_until(lambda: (world.path / "log").exists(), what="--after")
    assert "Traceback" not in node.output


def test_failing_after_is_reported_and_the_copy_kept(world: World) -> None:
    (world.files / "a").write_text("data")
    world.node("--before", "true", "--after", "echo sorry; exit 4")
    node = world.sweep(code=1)["nodes"][0]
    assert node["snapshot"]["grade"] == "stable"
    assert "--after ended with code 4: sorry" in json.dumps(node)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("busy", [False, True])
def test_signal_ends_a_node_at_once(world: World, client: Client, number: int, code: int, busy: bool) -> None:
    node = world.node("--before", "sleep 20" if busy else "true", "--working-every", "100ms", "--after", "touch after")
    client.send(OPEN)
    if busy:
        assert client.socket.poll(5000), "WORKING"
    else:
        assert client.receive() is not None
    started = time.monotonic()
    assert node.stop(number) == code
    assert time.monotonic() - started < AT_ONCE
    assert "Traceback" not in node.output
    if not busy:
        wait_until(lambda: (world.path / "after").exists(), what="--after")


def test_after_is_run_when_a_node_is_stopped_during_before(world: World, client: Client) -> None:
    node = world.node("--before", "sleep 1.2", "--working-every", "100ms", "--after", "touch after")
    client.send(OPEN)
    assert client.socket.poll(5000), "WORKING"
    node.stop()
    wait_until(lambda: (world.path / "after").exists(), what="--after")


@contextlib.contextmanager
def held_database(world: World) -> Iterator[Path]:
    """A database whose writer lets nobody read it; gives the spool of the node, to be started inside."""
    make_database(world.files / "bd").close()
    holder = sqlite3.connect(world.files / "bd", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield world.path / f"state/zbackup/node-127.0.0.9-{world.port}/spool"
    finally:
        holder.close()


def test_spool_emptied_after_kill(world: World, client: Client) -> None:
    with held_database(world) as spool:
        node = world.node()
        client.ask(OPEN)
        client.send(READ, files=[{"path": "files/bd", "state": []}])
        wait_until(lambda: os.listdir(spool), what="a frozen copy")
        node.kill()
    assert os.listdir(spool)
    node = world.node()
    assert os.listdir(spool) == []
    check_honest(world, node)


def test_working_said_while_a_database_is_locked(world: World, client: Client) -> None:
    with held_database(world):
        world.node("--working-every", "100ms", "--locked-timeout", "500ms")
        client.ask(OPEN)
        number = client.send(READ, files=[{"path": "files/bd", "state": []}])
        kinds = []
        while READ not in kinds:
            assert client.socket.poll(5000)
            message = decode(client.socket.recv_multipart())
            assert message.number == number
            kinds.append(message.kind)
    assert kinds.count(WORKING) >= 2
    assert message.fields.items("items", 1)[0]["status"] == "error"
