"""Whom a server trusts: pins, what undoes them, and what keyed nodes and hostile ones get; over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from conftest import FOLDER, Process, World, path_before, rewrite, wait_until
from test_sweep import FakeNode, SilentAddresses, clone_state, find_row

import zbackup as z

SECOND = "127.0.0.10"
CONTENT = b"what nobody else may read. " * 400


@pytest.fixture
def small(world: World) -> World:
    """A world with one file, whose node a test has yet to start."""
    (world.files / "letter").write_bytes(CONTENT)
    return world


@pytest.fixture
def pinned(small: World) -> World:
    """A world whose keyed node was copied once."""
    small.keyed()
    small.sweep()
    return small


def own_key(node: Process) -> str:
    """Return the key that a node told at its start."""
    found = re.search(r"this node's key is (\S{40})", node.output)
    assert found, node.output
    return found[1]


def replace_node(world: World, *flags: str, state: str = "anew") -> Process:
    """Stop the last node, and start another one with a state of its own at the first address."""
    world.nodes[-1].stop()
    return world.node(*flags, "--state", str(world.path / state))


def set_up_anew(world: World, state: str = "anew") -> Process:
    """Start a node with another key where the last one was."""
    return replace_node(world, "--server-key", world.key(), state=state)


def list_files(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, but what the server knows of the node."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "node.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def count_snapshots(world: World) -> dict[str, int]:
    return {row["NODE"]: int(row["SNAPSHOTS"]) for row in world.listed()}


def note_of(world: World, folder: str = FOLDER) -> str:
    """Return what `nodes` notes of a node."""
    return next(row["NOTE"] for row in world.known() if row["NODE"] == folder)


def only_row(report: dict[str, Any]) -> dict[str, Any]:
    """Return the one row of a report."""
    assert len(report["nodes"]) == 1, report["nodes"]
    row: dict[str, Any] = report["nodes"][0]
    return row


# ---- the wire ----


class Relay(threading.Thread):
    """Passes TCP connections at one address on to another, notes all bytes, and is slow where told to."""

    def __init__(self, world: World, address: str = "127.0.0.30", pause: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.seen = bytearray()
        self.pause = pause  # s for each 64 KiB
        self.target = (FOLDER, world.port)
        self.ear = socket.create_server((address, world.port))

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.ear.accept()[0]
                far = socket.create_connection(self.target)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(1 << 16):
                self.seen += data
                target.sendall(data)
                time.sleep(self.pause)
        with contextlib.suppress(OSError):  # the other thread closes it
            target.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ear.close()


@pytest.mark.parametrize("keyed", [True, False])
def test_wire_shows_nothing_to_who_listens(small: World, keyed: bool) -> None:
    small.env["PYTHONPATH"] = path_before(small.path / "hidden")  # no zstd, whose frames hide the text
    (small.files / "noise").write_bytes(os.urandom(40000))
    node = small.keyed("--name", "lieselotte") if keyed else small.node("--name", "lieselotte")
    with Relay(small) as relay:
        row = only_row(small.sweep("--range", "30"))
    assert row["snapshot"]["grade"] == "stable" and len(relay.seen) > 40000
    noise = (small.files / "noise").read_bytes()
    hidden = [b"letter", b"lieselotte", b'"kind":"OPEN"', noise[:64], noise[20000:20064]]
    assert [words in relay.seen for words in hidden] == [not keyed] * len(hidden)
    assert node.stop() == 0


def test_wire_of_a_keyed_node_gives_a_plain_client_nothing(pinned: World) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(f"tcp://{FOLDER}:{pinned.port}")
        plain.send_multipart(z.encode_message(z.HELLO, 1, z.say_hello()))
        assert plain.poll(1500) == 0
    assert only_row(pinned.sweep())["exit_code"] == 0


def test_wire_of_another_server_is_refused_by_the_node(pinned: World) -> None:
    row = only_row(pinned.sweep("--store", "other", code=1))
    assert (row["state"], row["exit_code"], row["snapshot"]) == ("refuses", 1, None)
    assert row["error"] == (
        "runs a node that trusts another server; if it is to be this one, give it this server's key with"
        " --server-key (`zbackup.pyz key` prints it)"
    )
    assert not list((pinned.path / "other").rglob("letter"))
    assert only_row(pinned.sweep())["exit_code"] == 0


def test_wire_of_a_known_node_that_trusts_another_server_now(pinned: World) -> None:
    pinned.nodes[-1].stop()
    pinned.node("--server-key", z.make_pair().public)
    row = only_row(pinned.sweep(code=1))
    assert (row["folder"], row["state"]) == (FOLDER, "refuses") and "trusts another server" in row["error"]
    said = pinned.run(*pinned.server_flags("--quiet"), code=1).stderr
    assert "trusts another server" in said and "last seen" in said


@pytest.mark.parametrize("known", [True, False])
def test_wire_of_a_cloned_key(small: World, known: bool) -> None:
    small.keyed().stop()
    if known:
        small.keyed()
        small.sweep()
    state = clone_state(small, FOLDER, SECOND)
    if not known:
        small.keyed()
    small.keyed("--state", state, address=SECOND)
    report = small.sweep("--range", "9-10", code=1)
    clone = find_row(report, SECOND)
    assert (clone["state"], clone["snapshot"]) == ("refuses", None)
    assert clone["error"] == (
        f"has the identity of the node at {FOLDER}:{small.port}, as a cloned machine does: remove its state folder"
    )
    assert find_row(report, FOLDER)["snapshot"]["grade"] == "stable"


def test_wire_of_a_node_whose_key_changes_under_way(pinned: World) -> None:
    """Another machine that answers the copy than the one that answered the hello."""
    wire = z.Wire(z.make_clock(), threading.Event(), 1.0, z.load_pair(str(pinned.store / "keys/server")))
    answers: list[z.Message] = []
    try:
        peer = z.Peer(wire, z.Address(FOLDER, pinned.port), 2.0, z.make_pair().public)
        peer.ask(z.HELLO, z.say_hello(), answers.append)
        with pytest.raises(z.ProtocolError, match="has another key than a moment before"):
            peer.step(5.0, 5.0)
        peer.close()
    finally:
        wire.close()
    assert answers == []


def test_wire_hello_proves_its_key_and_not_its_former_name(pinned: World) -> None:
    key = own_key(pinned.nodes[-1])
    fields = {"protocol": z.PROTOCOL, "identity": "0" * 32, "folder": "laptop"}
    head, body = z.encode_message(z.HELLO, 1, fields)
    message = z.decode_message([zmq.Frame(head), zmq.Frame(body)])
    keyed, plain = z.decode_hello(message, key), z.decode_hello(message)
    assert (keyed.identity, keyed.former, keyed.folder) == (key, "0" * 32, "laptop")
    assert (plain.identity, plain.former) == ("0" * 32, "")


# ---- pins ----


def test_pin_at_first_contact(small: World) -> None:
    key = own_key(small.keyed("--name", "desk"))
    report = small.sweep()
    assert only_row(report)["note"] == f"a new node with the key {key}"
    assert only_row(small.sweep())["note"] == ""
    row = small.known()[0]
    assert (row["NODE"], row["HOST"], row["ADDRESSES"]) == (FOLDER, "desk", f"{FOLDER}:{small.port}")
    assert (row["KEY"], row["NOTE"]) == (key, "")
    assert row["FIRST SEEN"] <= row["LAST SEEN"]
    assert json.loads((small.store / FOLDER / "node.json").read_text())["identity"] == key


def test_pin_keeps_out_another_key(pinned: World) -> None:
    old, before = own_key(pinned.nodes[-1]), list_files(pinned.store / FOLDER)
    new = own_key(set_up_anew(pinned))
    (pinned.files / "letter").write_bytes(b"of the intruder")
    row = only_row(pinned.sweep(code=1))
    assert (row["folder"], row["state"], row["exit_code"], row["snapshot"]) == (FOLDER, "refuses", 1, None)
    assert row["error"] == (
        f"has the key {new}, where the node whose copies are in {FOLDER} has {old}: if that machine was set up anew,"
        f" `zbackup.pyz trust {FOLDER}`; if this is another machine, `zbackup.pyz trust {FOLDER} --new`"
    )
    assert list_files(pinned.store / FOLDER) == before and count_snapshots(pinned) == {FOLDER: 1}
    assert note_of(pinned) == f"waits for `trust`: {new}"
    assert pinned.known()[0]["KEY"] == old
    said = pinned.run(*pinned.server_flags("--quiet"), code=1).stderr
    assert f"`zbackup.pyz trust {FOLDER} --new`; last seen " in said


def test_pin_is_moved_by_trust(pinned: World) -> None:
    new = own_key(set_up_anew(pinned))
    pinned.sweep(code=1)
    said = pinned.run("trust", FOLDER).stdout
    assert said == f"{FOLDER} is the node with the key {new}; the next sweep copies it there\n"
    assert only_row(pinned.sweep())["folder"] == FOLDER
    assert count_snapshots(pinned) == {FOLDER: 2} and note_of(pinned) == ""
    assert pinned.known()[0]["KEY"] == new


def test_pin_is_added_by_trust_new(pinned: World) -> None:
    old, before = own_key(pinned.nodes[-1]), list_files(pinned.store / FOLDER)
    new = own_key(set_up_anew(pinned))
    pinned.sweep(code=1)
    folder = f"{FOLDER}-{z.name_short(new)}"
    assert pinned.run("trust", FOLDER, "--new").stdout.startswith(f"{folder} is the node with the key {new}; ")
    report = pinned.sweep()
    assert [(row["folder"], row["state"]) for row in report["nodes"]] == [(FOLDER, "silent"), (folder, "node")]
    assert list_files(pinned.store / FOLDER) == before
    assert count_snapshots(pinned) == {FOLDER: 1, folder: 1} and note_of(pinned) == ""
    assert {row["NODE"]: row["KEY"] for row in pinned.known()} == {FOLDER: old, folder: new}


@pytest.mark.parametrize("flags", [[], ["--folder", "laptop"]])
def test_strict_takes_a_node_once_its_key_was_named(small: World, flags: list[str]) -> None:
    key = own_key(small.keyed(*flags))
    row = only_row(small.sweep("--strict", code=1))
    name = "laptop" if flags else FOLDER
    command = f"trust {name} '{key}'"
    assert (row["state"], row["exit_code"]) == ("refuses", 1)
    assert row["error"] == f"is not known, and --strict is set; to accept it: `zbackup.pyz {command}`"
    assert small.known() == []
    small.run(*shlex.split(command))
    known = small.known()[0]
    assert (known["NODE"], known["KEY"], known["ADDRESSES"]) == (name, key, "")
    row = only_row(small.sweep("--strict"))
    assert (row["folder"], row["snapshot"]["grade"], row["note"]) == (name, "stable", "")


@pytest.mark.parametrize("known", [True, False])
def test_strict_refuses_a_node_without_a_key(small: World, known: bool) -> None:
    small.node()
    if known:
        small.sweep()
    row = only_row(small.sweep("--strict", code=1))
    assert (row["state"], row["snapshot"]) == ("refuses", None)
    assert row["error"] == "has no key, and --strict is set; see its --server-key"


def test_strict_refuses_an_unknown_key_with_a_known_former_name(small: World) -> None:
    """The name that a node had before it had a key is told to everybody who asks."""
    small.node()
    small.sweep()
    small.nodes[-1].stop()
    small.keyed()
    assert only_row(small.sweep("--strict", code=1))["state"] == "refuses"


def test_forget(pinned: World) -> None:
    key, before = own_key(pinned.nodes[-1]), list_files(pinned.store / FOLDER)
    said = pinned.run("forget", FOLDER).stdout
    assert said == f"{FOLDER} is expected no more; its copies stay; `trust {FOLDER} '{key}'` takes it back\n"
    row = pinned.known()[0]
    assert (row["KEY"], row["ADDRESSES"], row["NOTE"]) == ("none", "", "forgotten")
    pinned.nodes[-1].stop()
    row = only_row(pinned.sweep("--stale", "0s", code=5))
    assert (row["state"], row["folder"]) == ("no node", "")
    assert list_files(pinned.store / FOLDER) == before
    pinned.run("trust", FOLDER, key)
    pinned.keyed()
    assert only_row(pinned.sweep())["folder"] == FOLDER and count_snapshots(pinned) == {FOLDER: 2}


def test_forget_leaves_the_name_to_the_copies(pinned: World) -> None:
    pinned.run("forget", FOLDER)
    row = only_row(pinned.sweep())
    assert row["folder"] == f"{FOLDER}-{pinned.port}"
    assert row["note"] == f"another node than the one whose copies are in {FOLDER}; its copies go to {row['folder']}"
    assert count_snapshots(pinned) == {FOLDER: 1, row["folder"]: 1}


def test_forget_a_node_without_a_key(small: World) -> None:
    small.node()
    assert only_row(small.sweep())["note"] == "a new node"
    assert small.run("forget", FOLDER).stdout.endswith("its copies stay; it had no key\n")
    assert note_of(small) == "forgotten"


def test_trust_of_a_key_that_another_node_has(pinned: World) -> None:
    key = own_key(pinned.keyed("--file", "files", address=SECOND))
    pinned.sweep("--range", "9-10")
    before = pinned.known()
    said = pinned.run("trust", FOLDER, key, code=2).stderr
    assert said == f"zbackup: this is the key of the node whose copies are in {SECOND}; `forget` that one first\n"
    assert pinned.known() == before
    pinned.run("forget", SECOND)
    pinned.run("trust", FOLDER, key)
    assert pinned.known()[0]["KEY"] == "none" and pinned.known()[1]["KEY"] == key


WRONG_TRUST = {
    "no offer": ([FOLDER], f"which key? None was met in place of the one of {FOLDER}; name it: trust NODE KEY"),
    "no offer of a newcomer": ([FOLDER, "--new"], f"no other key was met in place of the one of {FOLDER}"),
    "both": ([FOLDER, "a" * 40, "--new"], "--new takes the key that was met in place of the node's; name no other"),
    "no key": ([FOLDER, "a" * 39], f"{'a' * 39} is no key: 40 characters, in single quotes"),
    "key with control": ([FOLDER, "\x1b"], r"\x1b is no key"),
    "unknown": (["laptop"], f"the store has no node laptop; it has: {FOLDER}"),
    "unknown newcomer": (["laptop", "--new"], "the store has no node laptop"),
    "odd name": (["a/b", "a" * 40], "a/b cannot be a folder's name; letters, digits and . _ - can"),
    "parent": (["..", "a" * 40], ".. cannot be a folder's name"),
    "reserved": (["keys", "a" * 40], "keys cannot be a folder's name"),
}


@pytest.mark.parametrize("what", WRONG_TRUST)
def test_trust_of_nothing(pinned: World, what: str) -> None:
    arguments, words = WRONG_TRUST[what]
    before, names = pinned.known(), sorted(os.listdir(pinned.store))
    done = pinned.run("trust", *arguments, code=2)
    assert done.stdout == "" and done.stderr.startswith("zbackup: ") and words in done.stderr
    assert pinned.known() == before and sorted(os.listdir(pinned.store)) == names


@pytest.mark.parametrize("command", [["trust", FOLDER], ["forget", FOLDER], ["nodes"]])
def test_trust_needs_a_store(world: World, command: list[str]) -> None:
    assert "backups is not a zbackup store" in world.run(*command, code=4).stderr


@pytest.mark.parametrize("command", [["trust", FOLDER, "a" * 40], ["forget", FOLDER]])
def test_trust_waits_for_no_copy(pinned: World, command: list[str]) -> None:
    pinned.nodes[-1].stop()
    pinned.keyed("--before", "touch began; sleep 30")
    server = pinned.server()
    wait_until((pinned.path / "began").exists)
    before = pinned.known()
    done = pinned.run(*command, code=None)
    assert done.returncode not in (0, 2) and "another run is copying" in done.stderr
    assert pinned.known() == before
    server.kill()


# ---- addresses ----


def test_address_changes_and_the_history_goes_on(pinned: World) -> None:
    pinned.nodes[-1].stop()
    state = clone_state(pinned, FOLDER, SECOND)
    pinned.keyed("--state", state, address=SECOND)
    report = pinned.sweep("--range", "9-10")
    row = find_row(report, SECOND)
    assert (row["folder"], row["snapshot"]["changed"], row["note"]) == (FOLDER, 0, "")
    assert pinned.known()[0]["ADDRESSES"] == f"{SECOND}:{pinned.port}"
    key = own_key(pinned.keyed("--state", str(pinned.path / "newcomer")))  # where the first one was
    row = find_row(pinned.sweep("--range", "9-10"), FOLDER)
    assert (row["folder"], row["exit_code"]) == (f"{FOLDER}-{pinned.port}", 0)
    assert count_snapshots(pinned) == {FOLDER: 3, f"{FOLDER}-{pinned.port}": 1}
    assert pinned.known()[1]["KEY"] == key


def test_address_taken_while_its_node_moves(pinned: World) -> None:
    """Both at once: the one that moved is found, and the newcomer gets a folder of its own without a question."""
    pinned.nodes[-1].stop()
    pinned.keyed("--state", clone_state(pinned, FOLDER, SECOND), address=SECOND)
    pinned.keyed("--state", str(pinned.path / "newcomer"))
    report = pinned.sweep("--range", "9-10")
    assert find_row(report, SECOND)["folder"] == FOLDER
    assert find_row(report, FOLDER)["folder"] == f"{FOLDER}-{pinned.port}"
    assert count_snapshots(pinned) == {FOLDER: 2, f"{FOLDER}-{pinned.port}": 1}


def test_keyless_node_gets_a_key_and_keeps_its_folder(small: World) -> None:
    small.node()
    small.sweep()
    assert small.known()[0]["KEY"] == "none"
    small.nodes[-1].stop()
    key = own_key(small.keyed())
    row = only_row(small.sweep())
    assert (row["folder"], row["note"]) == (FOLDER, f"it has a key now, {key}")
    assert count_snapshots(small) == {FOLDER: 2} and small.known()[0]["KEY"] == key


def test_keyless_node_that_is_still_there_keeps_its_folder(small: World) -> None:
    """Who claims its name has a key, but proves nothing of the name."""
    small.node()
    small.sweep()
    small.keyed("--state", clone_state(small, FOLDER, SECOND), address=SECOND)
    report = small.sweep("--range", "9-10")
    assert [find_row(report, address)["folder"] for address in (FOLDER, SECOND)] == [FOLDER, SECOND]
    assert {row["NODE"]: row["KEY"] == "none" for row in small.known()} == {FOLDER: True, SECOND: False}


def test_keyless_pretender_does_not_keep_the_owner_out(pinned: World) -> None:
    before = list_files(pinned.store / FOLDER)
    replace_node(pinned)
    row = only_row(pinned.sweep(code=1))
    assert (row["folder"], row["state"]) == (FOLDER, "refuses")
    assert row["error"] == (
        f"answers without a key, where the node whose copies are in {FOLDER} has one; see its --server-key"
    )
    assert list_files(pinned.store / FOLDER) == before and note_of(pinned) == ""
    assert "which key?" in pinned.run("trust", FOLDER, code=2).stderr
    pinned.nodes[-1].stop()
    pinned.keyed()
    assert only_row(pinned.sweep())["snapshot"]["grade"] == "stable" and count_snapshots(pinned) == {FOLDER: 2}


def test_offer_is_over_when_the_right_node_is_back(pinned: World) -> None:
    set_up_anew(pinned)
    pinned.sweep(code=1)
    assert note_of(pinned)
    pinned.nodes[-1].stop()
    pinned.keyed()
    assert only_row(pinned.sweep())["folder"] == FOLDER
    assert note_of(pinned) == ""
    assert "which key?" in pinned.run("trust", FOLDER, code=2).stderr


def test_pin_outlives_the_loss_of_node_json(pinned: World) -> None:
    old = own_key(pinned.nodes[-1])
    (pinned.store / FOLDER / "node.json").unlink()
    set_up_anew(pinned)
    row = only_row(pinned.sweep(code=4))
    assert row["state"] == "refuses" and old in row["error"]
    (pinned.store / FOLDER / "node.json").unlink()
    pinned.nodes[-1].stop()
    pinned.keyed()
    assert only_row(pinned.sweep(code=4))["folder"] == FOLDER
    assert pinned.known()[0]["KEY"] == old and only_row(pinned.sweep())["exit_code"] == 0


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_trust_and_forget_without_node_json(pinned: World, loss: str) -> None:
    """The node's snapshots tell who it is, as they do to a sweep."""
    node_json = pinned.store / FOLDER / "node.json"
    for command in (["trust", FOLDER, "a" * 40], ["forget", FOLDER]):
        node_json.unlink() if loss == "gone" else node_json.write_bytes(b"damaged")
        done = pinned.run(*command, code=None)
        assert done.returncode in (0, 4) and "Traceback" not in done.stderr, done.stderr
        known = json.loads(node_json.read_text())
        assert known["identity"] == ("a" * 40 if command[0] == "trust" else "")
        assert known["first_seen"]


# ---- the plan, without sockets ----


def make_hello(identity: str, folder: str = "", former: str = "", instance: str = "x") -> z.Hello:
    return z.Hello(identity, instance, "host", "1", (), (), folder, former)


def make_probe(hello: z.Hello, host: str = "10.0.0.1") -> z.Probe:
    return z.Probe(z.Address(host, z.PORT), z.NODE, hello)


KEYS = [letter * 40 for letter in "abc"]


@pytest.mark.parametrize(
    ("wish", "folder"),
    [("laptop", "laptop"), ("Laptop.2_x-y", "Laptop.2_x-y"), ("", "10.0.0.1"), ("10.0.0.9", "10.0.0.1")]
    + [
        ("::1", "10.0.0.1"),
        ("127.0.0.1", "10.0.0.1"),
        ("packs", "node-packs"),
        ("KEYS", "node-KEYS"),
        ("index.sqlite-journal", "node-index.sqlite-journal"),
    ]
    + [("../../etc", "node-..-..-etc"), (".hidden", "node-.hidden"), ("a b\x1b/é", "a-b---"), ("x" * 255, "x" * 100)],
)
def test_folder_wished_for(wish: str, folder: str) -> None:
    targets, refused = z.plan_targets([make_probe(make_hello(KEYS[0], wish))], [])
    assert ([target.folder for target in targets], refused) == ([folder], [])
    assert targets[0].note == f"a new node with the key {KEYS[0]}"


@pytest.mark.parametrize(
    ("taken", "folder"),
    [(["laptop"], "10.0.0.1"), (["LAPTOP"], "10.0.0.1")]
    + [(["laptop", "10.0.0.1"], f"10.0.0.1-{z.name_short(KEYS[0])}"), (["10.0.0.1"], "laptop")],
)
def test_folder_wished_for_that_another_has(taken: list[str], folder: str) -> None:
    known = [z.Known(name, KEYS[1]) for name in taken]
    targets, refused = z.plan_targets([make_probe(make_hello(KEYS[0], "laptop"))], known)
    assert ([target.folder for target in targets], refused) == ([folder], [])
    other = f"another node than the one whose copies are in laptop; its copies go to {folder}"
    assert targets[0].note == (f"a new node with the key {KEYS[0]}" if folder == "laptop" else other)


def test_folder_wished_for_by_two(small: World) -> None:
    small.keyed("--folder", "laptop")
    small.keyed("--folder", "Laptop", address=SECOND)
    report = small.sweep("--range", "9-10")
    assert [find_row(report, address)["folder"] for address in (FOLDER, SECOND)] == ["laptop", SECOND]
    assert count_snapshots(small) == {SECOND: 1, "laptop": 1}
    assert (small.store / "laptop/latest/files/letter").read_bytes() == CONTENT


def test_folder_of_two_that_claim_one_former_name() -> None:
    """Two keys with one former name, which nobody has any more: one folder is not for two nodes."""
    probes = [make_probe(make_hello(key, former="0" * 32), f"10.0.0.{i}") for i, key in enumerate(KEYS[:2])]
    targets, refused = z.plan_targets(probes, [z.Known("old", "0" * 32)])
    folders = [target.folder for target in targets]
    assert len(set(folders)) == len(folders) and len(folders) + len(refused) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_plan_knows_a_key_under_any_wish(strict: bool) -> None:
    hello = make_hello(KEYS[0], "other", former="1" * 32)
    known = [z.Known("mine", KEYS[0]), z.Known("other", KEYS[1]), z.Known("keyless", "1" * 32)]
    targets, refused = z.plan_targets([make_probe(hello)], known, strict)
    assert ([(target.folder, target.note) for target in targets], refused) == ([("mine", "")], [])


def test_plan_offers_no_key_of_who_has_none() -> None:
    known = [z.Known("mine", KEYS[0], addresses=("10.0.0.1",)), z.Known("yours", KEYS[1], addresses=("10.0.0.2",))]
    probes = [make_probe(make_hello("0" * 32)), make_probe(make_hello(KEYS[2]), "10.0.0.2")]
    targets, refused = z.plan_targets(probes, known)
    assert targets == [] and [found.owner for found in refused] == ["mine", "yours"]
    assert z.list_offers(refused) == {"yours": KEYS[2]}


# ---- reports ----


def test_nodes_as_table(pinned: World) -> None:
    pinned.node(address=SECOND)
    pinned.sweep("--range", "9-10")
    lines = pinned.run("nodes").stdout.splitlines()
    assert lines[0].split() == ["NODE", "HOST", "ADDRESSES", "FIRST", "SEEN", "LAST", "SEEN", "KEY", "NOTE"]
    assert [line.split()[0] for line in lines[1:]] == [SECOND, FOLDER]
    assert " none" in lines[1] and own_key(pinned.nodes[0]) in lines[2]
    rows = json.loads(pinned.run("nodes", "--json").stdout)
    assert rows == pinned.known()
    assert list(rows[0]) == ["NODE", "HOST", "ADDRESSES", "FIRST SEEN", "LAST SEEN", "KEY", "NOTE"]


def test_nodes_without_times_and_with_odd_words(pinned: World) -> None:
    node_json = pinned.store / FOLDER / "node.json"
    rewrite(node_json, first_seen=0, last_seen=0, offered="\x1b[31m")
    row = pinned.known()[0]
    assert (row["FIRST SEEN"], row["LAST SEEN"], row["NOTE"]) == ("-", "-", r"waits for `trust`: \x1b[31m")


def test_four_states_of_an_address(pinned: World) -> None:
    pinned.node("--server-key", z.make_pair().public, address=SECOND)
    changed = own_key(pinned.keyed(address="127.0.0.11"))
    pinned.sweep("--range", "11")
    pinned.nodes[-1].stop()
    pinned.keyed("--state", str(pinned.path / "anew"), address="127.0.0.11")
    with SilentAddresses(["127.0.0.12"], pinned.port):
        report = pinned.sweep("--range", "9-13", code=1)
        done = pinned.run(*pinned.server_flags("--range", "9-13"), code=1)
    rows = {row["address"].split(":")[0]: row for row in report["nodes"]}
    states = {address: row["state"] for address, row in rows.items()}
    assert states == {
        FOLDER: "node",
        SECOND: "refuses",
        "127.0.0.11": "refuses",
        "127.0.0.12": "silent",
        "127.0.0.13": "no node",
    }
    assert "trusts another server" in rows[SECOND]["error"] and changed in rows["127.0.0.11"]["error"]
    assert "`zbackup.pyz trust 127.0.0.11`" in rows["127.0.0.11"]["error"]
    said = done.stdout + done.stderr
    port = pinned.port
    assert f"{FOLDER}:{port}: stable, 1 files" in said
    assert f"{SECOND}:{port}: runs a node that trusts another server" in said
    assert f"127.0.0.11:{port}: has the key " in said
    assert f"alive, but no node: 127.0.0.13:{port} (nothing listens at port {port})" in said
    assert "1 of 1 copies good, 2 with problems, 1 silent" in said


# ---- limits of one copy ----


def test_limit_of_files(small: World) -> None:
    for number in range(20):
        (small.files / f"{number:02}").write_bytes(os.urandom(100))
    small.keyed()
    row = only_row(small.sweep("--most-files", "10", code=1))
    assert "lists more than the 10 files of --most-files" in row["error"]
    assert only_row(small.sweep("--most-files", "22"))["snapshot"]["files"] == 21


def cut_off(world: World, *flags: str) -> tuple[str, int]:
    """Make a sweep that a limit ends; returns its error and how many bytes came."""
    for number in range(8):
        (world.files / f"{number}").write_bytes(os.urandom(1 << 20))
    world.keyed()
    row = only_row(world.sweep("--range", "30", "--window", "1MiB", *flags, code=1))
    assert (row["snapshot"]["grade"], row["snapshot"]["cut_off"]) == ("partial", row["error"])
    assert 0 < row["snapshot"]["files"] < 9
    return row["error"], row["snapshot"]["sent"]


def test_limit_of_bytes(small: World) -> None:
    with Relay(small):
        error, sent = cut_off(small, "--most-bytes", "4MiB")
        again = only_row(small.sweep("--range", "30", "--most-bytes", "8MiB"))["snapshot"]
    assert error == "sent more than the 4.0 MiB that --most-bytes allows" and sent < 7 << 20
    assert (again["files"], again["grade"]) == (9, "stable") and again["sent"] < 7 << 20


def test_limit_of_time(small: World) -> None:
    with Relay(small, pause=0.05) as relay:
        error, sent = cut_off(small, "--longest", "3s")
        relay.pause = 0.0
        again = only_row(small.sweep("--range", "30"))["snapshot"]
    assert error == "the copy took longer than --longest allows; the next one goes on from here"
    assert (again["files"], again["grade"]) == (9, "stable") and again["sent"] < 8 << 20


def test_limit_of_signs_of_work(world: World) -> None:
    def flood(fake: FakeNode, asked: dict[str, Any], body: bytes) -> None:
        peer = fake.peer
        for _ in range(10 * z.WORKING_LIMIT):
            fake.router.send_multipart([peer, *z.encode_message("WORKING", asked["number"], {})])

    class Flooding(FakeNode):
        peer = b""

        def take(self, peer: bytes, asked: dict[str, Any], body: bytes) -> None:
            self.peer = peer
            super().take(peer, asked, body)

    with Flooding(FOLDER, world.port, OPEN=flood):
        row = only_row(world.sweep("--freeze-timeout", "20s", code=1))
    assert "floods the server with signs of work" in row["error"]


# ---- a store for its owner alone ----


def list_modes(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each path of a store, and its mode."""
    for one in (path, *path.rglob("*")):
        yield str(one.relative_to(path)), one.lstat().st_mode & 0o7777


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_store_is_private(small: World, umask: int, there: bool) -> None:
    (small.files / "program").write_text("#!/bin/sh\n")
    (small.files / "program").chmod(0o4755)
    (small.files / "folder").mkdir(0o777)
    if there:
        small.store.mkdir(0o755)
        small.store.chmod(0o755)
    small.keyed()
    for _ in range(2):
        small.run(*small.server_flags(), preexec_fn=lambda: os.umask(umask))
        (small.files / "letter").write_bytes(os.urandom(len(CONTENT)))
    before = os.umask(umask)
    try:
        with contextlib.closing(z.open_store(str(small.store))) as store:
            store.node(FOLDER)
            modes = dict(list_modes(small.store))
    finally:
        os.umask(before)
    assert {"index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "keys/server", f"{FOLDER}/node.json"} <= set(modes)
    assert {mode & 0o077 for mode in modes.values()} == {0}
    kept = {name: mode for name, mode in modes.items() if "/latest/" not in name}
    folders = {name for name in kept if (small.store / name).is_dir()}
    assert {kept[name] for name in folders} == {0o700}
    assert {name: oct(kept[name]) for name in kept.keys() - folders if kept[name] != 0o600} == {}
    assert modes[f"{FOLDER}/latest/files/program"] == 0o700


def test_store_of_before_keys_is_left_as_its_owner_made_it(pinned: World) -> None:
    """Who opened a store to a group on purpose has it so."""
    pinned.store.chmod(0o750)
    pinned.sweep()
    assert pinned.store.stat().st_mode & 0o777 == 0o750
    shutil.rmtree(pinned.store / "keys")
    pinned.key()
    assert pinned.store.stat().st_mode & 0o777 == 0o750


# ---- what changes while a node waits for its turn ----


@pytest.fixture
def queued(small: World) -> Iterator[World]:
    """A world in which the node at the second address waits until the file `slow` is gone."""
    slow = small.path / "slow"
    slow.touch()
    small.keyed("--before", f"while [ -e {slow} ]; do sleep 0.1; done")
    yield small
    slow.unlink(missing_ok=True)


def let_on(world: World, server: Process) -> None:
    """Let the first node go on; waits for the end of the sweep."""
    (world.path / "slow").unlink()
    server.process.wait(20)


def begin_sweep(world: World, *flags: str) -> Process:
    """Start a sweep over both addresses; returns when the first node is being copied."""
    server = world.server("--range", "9-10", "--jobs", "1", *flags)
    wait_until(lambda: (world.store / FOLDER / "node.json").exists(), what="the first copy")
    return server


@pytest.mark.parametrize("command", ["trust", "forget"])
def test_word_on_a_node_that_waits_for_its_turn_stands(queued: World, command: str) -> None:
    queued.keyed(address=SECOND)
    (queued.path / "slow").unlink()
    queued.sweep("--range", "9-10")
    (queued.path / "slow").touch()
    (queued.store / FOLDER / "node.json").unlink()
    server = begin_sweep(queued)
    queued.run(command, SECOND, *([KEYS[0]] if command == "trust" else []))
    let_on(queued, server)
    row = next(row for row in queued.known() if row["NODE"] == SECOND)
    assert (row["KEY"], row["NOTE"]) == ((KEYS[0], "") if command == "trust" else ("none", "forgotten"))
    assert f"{SECOND}:{queued.port}: what is known of it has changed" in server.output
    assert count_snapshots(queued)[SECOND] == 1


def test_two_servers_do_not_mix_two_nodes(queued: World) -> None:
    """Both new, with a wish for one name: a folder is of the one who came first."""
    queued.keyed("--folder", "laptop", address=SECOND)
    queued.keyed("--folder", "laptop", address="127.0.0.11")
    server = begin_sweep(queued)
    queued.sweep("--range", "11")
    let_on(queued, server)
    first = next(row for row in queued.known() if row["NODE"] == "laptop")
    assert first["ADDRESSES"] == f"127.0.0.11:{queued.port}"
    queued.sweep("--range", "9-11")
    assert count_snapshots(queued) == {FOLDER: 2, SECOND: 1, "laptop": 2}


def test_keyless_node_whose_address_another_one_takes_meanwhile(queued: World) -> None:
    queued.nodes[-1].stop()
    slow = queued.path / "slow"
    queued.node("--before", f"while [ -e {slow} ]; do sleep 0.1; done")
    second = queued.node("--state", "second", address=SECOND)
    server = begin_sweep(queued)
    second.stop()
    queued.node("--state", "third", address=SECOND)
    let_on(queued, server)
    assert "another node has its address by now; the next sweep copies it" in server.output
    assert count_snapshots(queued)[FOLDER] == 1 and not list((queued.store / SECOND / "snapshots").iterdir())


def test_plan_gives_each_node_a_folder_of_its_own() -> None:
    """Also where the short forms of their names are the same."""
    probes = [make_probe(make_hello("deadbeef" + letter * 24)) for letter in "0123"]
    targets, refused = z.plan_targets(probes, [])
    assert [target.folder for target in targets] == [
        "10.0.0.1",
        *("10.0.0.1-deadbeef" + end for end in ("", "-2", "-3")),
    ]


def test_node_at_very_many_addresses(small: World) -> None:
    """As behind a translator of addresses; the store can read what it has written."""
    folder = z.open_store(str(small.store), create=True).node(FOLDER)
    folder.make()
    hello, clock = make_hello("0" * 32), z.Clock(time.time_ns, time.monotonic, time.sleep)
    target = z.Target(hello, tuple(z.Address(f"10.0.{i >> 8}.{i & 255}", 4545) for i in range(5000)), FOLDER)
    copier = z.Copier(None, SimpleNamespace(clock=clock), z.ServerSettings(), lambda *a: ())  # type: ignore[arg-type]
    copier._save_known(target, folder)
    assert len(folder.load_known().addresses) == z.ADDRESSES_KEPT
