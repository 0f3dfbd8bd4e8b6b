"""How the tests attack both roles: ZMTP by hand, relays that remember, and peers that have keys but no manners."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conftest import Process, World
from test_sweep import Answer, FakeNode

import zbackup

MIB = 1 << 20

# ---- ZMTP by hand, https://rfc.zeromq.org/spec/23 ----


def make_greeting(mechanism: bytes = b"NULL", version: bytes = b"\3\1", is_server: int = 0) -> bytes:
    """Return the 64 bytes that both sides begin with."""
    return b"\xff" + bytes(8) + b"\x7f" + version + mechanism.ljust(20, b"\0") + bytes([is_server]) + bytes(31)


def make_frame(data: bytes, flags: int = 0, size: int | None = None) -> bytes:
    """Return a frame with a long length; `flags`: 1 for more to come, 4 for a command; `size` may lie."""
    return struct.pack(">BQ", flags | 2, len(data) if size is None else size) + data


def make_command(name: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Return a command."""
    return make_frame(bytes([len(name)]) + name + data, 4, size)


def make_ready(kind: bytes = b"DEALER", identity: bytes = b"", name: bytes = b"READY") -> bytes:
    """Return what ends a NULL handshake: the kind of our socket, and the routing id that we claim."""
    pairs = [(b"Socket-Type", kind), (b"Identity", identity)]
    return make_command(name, b"".join(bytes([len(n)]) + n + struct.pack(">I", len(v)) + v for n, v in pairs))


def make_message(kind: str, number: int = 1, body: bytes = b"", **fields: Any) -> bytes:
    """Return one of zbackup's messages as it travels without CURVE."""
    head, body = zbackup.encode_message(kind, number, fields, body)
    return make_frame(head, 1) + make_frame(body)


def read_to(raw: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes; fewer where the connection ends."""
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < count:
            part = raw.recv(count - len(data))
            if not part:
                break
            data += part
    return data


def read_frame(raw: socket.socket) -> tuple[int, bytes]:
    """Return flags and bytes of the next frame; -1 where the connection ends."""
    start = read_to(raw, 1)
    if not start:
        return -1, b""
    length = read_to(raw, 8 if start[0] & 2 else 1)
    return start[0], read_to(raw, int.from_bytes(length, "big"))


def read_rest(raw: socket.socket, patience: float) -> bytes:
    """Return all that comes until the other side closes, or is silent for `patience` s."""
    raw.settimeout(patience)
    return read_to(raw, 4 * MIB)


def shake_hands(raw: socket.socket, kind: bytes = b"DEALER", identity: bytes = b"") -> None:
    """Do the whole NULL handshake."""
    raw.sendall(make_greeting() + make_ready(kind, identity))
    assert read_to(raw, 64)[:1] == b"\xff"
    assert b"READY" in read_frame(raw)[1]


def call(address: str, port: int) -> socket.socket:
    """Return a connection to a node, by TCP alone."""
    raw = socket.create_connection((address, port), timeout=10)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def dribble(raw: socket.socket, data: bytes, pause: float, over: threading.Event) -> int:
    """Send a byte after each pause, until all are sent or the other side is tired of it; returns how many went."""
    for at in range(len(data)):
        try:
            raw.sendall(data[at : at + 1])
        except OSError:
            return at
        if over.wait(pause):
            return at
    return len(data)


class Listener(threading.Thread):
    """A TCP port where a node might be: does with each connection what `act` says, in a thread for each."""

    def __init__(self, address: str, port: int, act: Callable[[Listener, socket.socket], object]) -> None:
        super().__init__(daemon=True)
        self.act = act
        self.over = threading.Event()
        self.count = 0  # of connections
        self.server = socket.create_server((address, port), backlog=512)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.join(10)
        for raw in self._open:
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for raw in (self.server, *self._open):
            raw.close()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                raw, _ = self.server.accept()
            except OSError:
                return
            self.count += 1
            self.spawn(self._serve, self.keep(raw))

    def keep(self, raw: socket.socket) -> socket.socket:
        """Close a socket at the end."""
        raw.settimeout(20)
        self._open.append(raw)
        return raw

    def spawn(self, run: Callable[..., object], *arguments: object) -> None:
        """Run something in a thread that `close` waits for."""
        self._threads.append(threading.Thread(target=run, args=arguments, daemon=True))
        self._threads[-1].start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.act(self, raw)


class Relay(Listener):
    """A man in the middle: passes bytes on and remembers them; connection after connection to the next target."""

    def __init__(self, address: str, port: int, *targets: tuple[str, int], pause: float = 0, free: int = 0) -> None:
        super().__init__(address, port, Relay.connect)
        self.targets = list(targets)
        self.pause = pause  # s between two bytes of a node, once it has sent `free` bytes
        self.free = free
        self.asked: list[bytes] = []  # by connection: all that went to a node
        self.answered: list[bytes] = []  # and all that came from it

    @staticmethod
    def connect(listener: Listener, raw: socket.socket) -> None:
        assert isinstance(listener, Relay)
        number = len(listener.asked)
        listener.asked.append(b"")
        listener.answered.append(b"")
        far = listener.keep(call(*listener.targets[min(number, len(listener.targets) - 1)]))
        listener.spawn(listener.pump, far, raw, listener.answered, number)
        listener.pump(raw, far, listener.asked, number)

    def pump(self, source: socket.socket, target: socket.socket, memory: list[bytes], number: int) -> None:
        """Pass on what comes from one side until that ends."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                memory[number] += data
                if self.pause and memory is self.answered and len(memory[number]) > self.free:
                    dribble(target, data, self.pause, self.over)
                else:
                    target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


# ---- peers with keys ----


def load_pair(world: World) -> zbackup.KeyPair:
    """Return the key pair of the world's server, which is made at need."""
    world.key()
    return zbackup.load_pair(str(world.store / "keys" / "server"))


class HostileNode(FakeNode):
    """A fake node, with a key where it is given a server's, whose answers can reach for the socket."""

    def __init__(self, address: str, port: int, server: str = "", **answers: Any) -> None:
        super().__init__(address, port, server=server, **answers)
        self.peer = b""  # who asked last

    def take(self, peer: bytes, asked: dict[str, Any], body: bytes) -> None:
        self.peer = peer
        super().take(peer, asked, body)

    def send(self, frames: Sequence[bytes], times: int = 1) -> None:
        """Send a message out of turn."""
        for _ in range(times):
            self.router.send_multipart([self.peer, *frames])

    def flood(self, frames: Sequence[bytes], seconds: float) -> None:
        """Send a message again and again."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.over.is_set():
            self.send(frames)
            time.sleep(0.001)


def hang_up(fake: FakeNode, asked: dict[str, Any], body: bytes) -> Answer:
    """Answer a question by ending the connection, and all others."""
    fake.over.set()
    fake.router.close(0)


# ---- what a process takes ----


def read_memory(pid: int, name: str = "VmHWM") -> int:
    """Return bytes that a process takes (VmRSS) or took at most (VmHWM); 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def count_descriptors(process: Process) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


@contextlib.contextmanager
def beside(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """Let a function run in a thread until the block is over, which it is told by the event."""
    over = threading.Event()
    thread = threading.Thread(target=run, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Watch the most memory that a process takes until it ends; it stands in the list."""
    most = [0]

    def watch(over: threading.Event) -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], read_memory(pid))

    with beside(watch):
        yield most


# ---- names that change as fast as they can ----

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Let two names change their files in one step; False where the system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return function is not None and not function(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    )


def replace(one: Path, other: Path) -> None:
    """Let two names change their files, by way of a third name."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@contextlib.contextmanager
def swapped(*pairs: tuple[Path, Path]) -> Iterator[list[int]]:
    """Let the names of each pair change their files without pause; the list counts how often."""
    count = [0]
    swap = exchange if exchange(*pairs[0]) else replace

    def run(over: threading.Event) -> None:
        while not over.is_set():
            for one, other in pairs:
                swap(one, other)
                count[0] += 1

    with beside(run):
        yield count
