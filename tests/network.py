"""Several machines on one: network namespaces joined by a bridge, cables that can be pulled, bad lines.

Each host is a namespace with one interface, `eth0`, whose other end is a port of a bridge in a
namespace of its own, the switch.  Nothing leads out: no packet leaves what a test made.

This file is also the program of two processes inside: `network.py hole DEVICE ADDRESS...` answers
ARP for addresses and swallows whatever else comes, `network.py relay DEVICE DEVICE LOSS DELAY
SEED` passes frames on as a bad line does, where the kernel has no netem.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PROGRAM = HERE.parent.parent / "zbackup.py"
PREFIX = "10.77"  # of all addresses; they exist inside the namespaces alone
BITS = 22  # 10.77.0.0 to 10.77.3.255
LONGEST = 300  # s that a process of a test may live, whatever happens to the test


# ---- the machine: what it allows, and what others left ----


def call(*command: str, timeout: float = 30) -> str:
    """Run a command to its end; returns its output, raises OSError with its complaint where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def find_obstacle() -> str:
    """Return why hosts cannot be made here, "" where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are of Linux alone"
    if not shutil.which("ip"):
        return "there is no `ip` here (iproute2)"
    name = f"zb{os.getpid()}-probe"
    try:
        call("ip", "netns", "add", name)
        try:
            call("ip", "-n", name, "link", "add", "bridge0", "type", "bridge")
            call("ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
            call("ip", "netns", "exec", name, sys.executable, str(HERE), "probe", "one")
        finally:
            call("ip", "netns", "del", name)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no network namespaces joined by veth can be made here: {error}"
    return ""


def remove_leftovers() -> None:
    """Remove the namespaces of test runs that were killed, and what runs in them."""
    for line in call("ip", "netns", "list").splitlines():
        name = line.split(" ")[0]
        owner = name[2:].partition("-")[0]
        if name.startswith("zb") and owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            with contextlib.suppress(OSError):
                for pid in call("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                call("ip", "netns", "del", name)


def read_neighbours() -> dict[str, int]:
    """Return the kernel's counts of its neighbour table, which all namespaces share; {} where it hides them."""
    try:
        names, *rows = Path("/proc/net/stat/arp_cache").read_text().splitlines()
    except (OSError, ValueError):
        return {}
    columns = list(zip(*([int(value, 16) for value in row.split()] for row in rows)))
    counts = {name: sum(column) for name, column in zip(names.split(), columns)}
    counts["entries"] = max(columns[0])  # of the table, repeated in each row
    return counts


# ---- processes ----


class Daemon:
    """A process in the background; its input ends with the test, which those of this file watch."""

    def __init__(self, command: Sequence[str], cwd: Path, env: dict[str, str]) -> None:
        self.log = cwd / f"process-{time.monotonic_ns()}.log"
        self.asked = False  # to stop
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def ask_to_stop(self) -> None:
        """Send one SIGTERM: a second one would end a zbackup process at once."""
        if not self.asked and self.process.poll() is None:
            self.asked = True
            self.process.terminate()

    def wait(self, timeout: float) -> int:
        """Return the exit code; fails the test when the process does not end in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.output}") from None

    def wait_for(self, word: str, timeout: float = 20) -> None:
        """Wait until it has said a word."""
        end = time.monotonic() + timeout
        while word not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, f"{word!r} was not said within {timeout} s: {self.output}"
            time.sleep(0.02)

    def stop(self) -> int:
        """End the process, whether it wants or not; returns its exit code."""
        self.ask_to_stop()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)
        finally:
            assert self.process.stdin
            self.process.stdin.close()


class Host:
    """A machine of the Lan: its namespace, its cable, its address, its folder."""

    def __init__(self, lan: Lan, name: str, address: str, number: int) -> None:
        self.lan, self.name, self.address = lan, name, address
        self.space = lan.name_space(name)
        self.port = f"p{number}"  # the other end of its cable
        self.path = lan.path / name
        self.files = self.path / "files"
        self.store = self.path / "backups"
        self.files.mkdir(parents=True)
        self.env = {**os.environ, "XDG_STATE_HOME": str(self.path / "state"), "PYTHONUNBUFFERED": "1", "TZ": "UTC"}
        self.relay: Daemon | None = None  # where its line is bad by a relay of our own
        call("ip", "netns", "add", self.space)
        lan.spaces.append(self.space)
        cable = [self.port, "type", "veth", "peer", "name", "eth0", "netns", self.space]
        lan.switch("ip", "link", "add", *cable)
        lan.switch("ip", "link", "set", self.port, "master", "bridge0", "up")
        self.call("ip", "link", "set", "lo", "up")
        self.call("ip", "link", "set", "eth0", "up")
        if address:
            self.call("ip", "address", "add", f"{address}/{BITS}", "dev", "eth0")

    # -- its network --

    def call(self, *command: str) -> str:
        """Run a command of the system on this machine."""
        return call("ip", "netns", "exec", self.space, *command)

    def unplug(self) -> None:
        """Pull the cable out of the switch."""
        self.lan.switch("ip", "link", "set", self.port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        self.lan.switch("ip", "link", "set", self.port, "up")

    def move(self, address: str) -> None:
        """Take another address, as DHCP does, or none at all: ""; the others' caches forget the old one."""
        self.call("ip", "address", "flush", "dev", "eth0", "scope", "global")
        if address:
            self.call("ip", "address", "add", f"{address}/{BITS}", "dev", "eth0")
        self.address = address
        for host in self.lan.hosts.values():  # a DHCP client says it by a gratuitous ARP
            host.call("ip", "neighbour", "flush", "dev", "eth0")

    def spoil(self, loss: float, delay: float, seed: int) -> str:
        """Lose a share of the frames and delay the rest (s), both ways; returns by what, netem or a relay."""
        ends = [(self.lan.space, self.port), (self.space, "eth0")]
        netem = ["root", "netem", "loss", f"{100 * loss:g}%", "delay", f"{1000 * delay:g}ms"]
        with contextlib.suppress(OSError):  # netem would lose, and count as one, what TCP hands over in one piece
            self.call("ip", "link", "set", "eth0", "gso_max_segs", "1")
        try:
            for space, device in ends:
                call("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device, *netem)
            return "netem"
        except OSError as error:
            for space, device in ends:
                with contextlib.suppress(OSError):
                    call("ip", "netns", "exec", space, "tc", "qdisc", "del", "dev", device, "root")
            reason = str(error)
        # cable - port - relay - other port - bridge
        inner, outer = f"{self.port}a", f"{self.port}b"
        self.lan.switch("ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
        self.lan.switch("ip", "link", "set", self.port, "nomaster")
        self.lan.switch("ip", "link", "set", outer, "master", "bridge0", "up")
        self.lan.switch("ip", "link", "set", inner, "up")
        self.call(sys.executable, str(HERE), "plain", "eth0")
        self.lan.switch(sys.executable, str(HERE), "plain", outer)
        self.relay = self.lan.help(self, self.lan.space, "relay", self.port, inner, str(loss), str(delay), str(seed))
        return f"a relay of our own ({reason})"

    def count_frames(self) -> tuple[int, int]:
        """Return how many frames its bad line has lost and passed."""
        if self.relay:
            time.sleep(1.2)  # it says its counts each second
            return tuple(json.loads(self.relay.output.splitlines()[-1]))
        lost = passed = 0
        for space, device in [(self.lan.space, self.port), (self.space, "eth0")]:
            shown = call("ip", "netns", "exec", space, "tc", "-s", "-j", "qdisc", "show", "dev", device, "root")
            for row in json.loads(shown):
                lost += row["drops"]
                passed += row["packets"]
        return lost, passed

    # -- zbackup on it --

    def run(self, *arguments: str, code: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run one command of zbackup to its end; checks its exit code and that it shows no traceback."""
        command = ["ip", "netns", "exec", self.space, sys.executable, str(PROGRAM), *arguments]
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.env,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
        )
        said = f"{self.name}: {arguments}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in said, said
        assert code is None or done.returncode == code, f"exit code {done.returncode}, not {code}: {said}"
        return done

    def start(self, *arguments: str) -> Daemon:
        """Start a zbackup process on this machine."""
        return self.lan.start(self.space, [sys.executable, str(PROGRAM), *arguments], self.path, self.env)

    def node(self, *arguments: str) -> Daemon:
        """Start a node that serves this machine's `files`, and wait until it does."""
        node = self.start("node", "--file", "files", "--name", self.name, *self.lan.node_flags(), *arguments)
        node.wait_for("serving")
        return node

    def server_flags(self, *arguments: str) -> list[str]:
        """Return the flags of one sweep; the arguments name its addresses."""
        return ["server", "--once", "--json", "--key-file", str(self.lan.key_file), *arguments]

    def sweep(self, *arguments: str, code: int | None = 0, timeout: float = 120) -> dict[str, Any]:
        """Make one sweep; returns its JSON report, and how long it took (s)."""
        start = time.monotonic()
        done = self.run(*self.server_flags(*arguments), code=code, timeout=timeout)
        report: dict[str, Any] = json.loads(done.stdout)
        report["seconds"] = time.monotonic() - start
        return report


class Lan:
    """Machines at one switch; `close` removes all of it, whatever happened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hosts: dict[str, Host] = {}
        self.spaces: list[str] = []
        self.processes: list[Daemon] = []
        self.helpers: list[Daemon] = []  # those of the processes that are programs of this file
        self.space = self.name_space("switch")
        self._numbers = itertools.count(1)
        self.key_file = path / "keys/server"
        self.key = call(sys.executable, str(PROGRAM), "key", "--key-file", str(self.key_file)).strip()
        remove_leftovers()
        try:
            call("ip", "netns", "add", self.space)
            self.spaces.append(self.space)
            self.switch("ip", "link", "add", "bridge0", "type", "bridge")
            self.switch("ip", "link", "set", "bridge0", "up")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def name_space(name: str) -> str:
        """Return the name of a namespace, with the process that it ends with."""
        return f"zb{os.getpid()}-{name}"

    def switch(self, *command: str) -> str:
        """Run a command in the switch."""
        return call("ip", "netns", "exec", self.space, *command)

    def node_flags(self) -> list[str]:
        """Return what lets a node answer the server of this Lan."""
        return ["--server-key", self.key]

    def host(self, name: str, address: str = "") -> Host:
        """Add a machine; `address` is the end of 10.77.x.y, as "0.9"."""
        made = Host(self, name, f"{PREFIX}.{address}" if address else "", next(self._numbers))
        self.hosts[name] = made
        return made

    def hole(self, name: str, addresses: Sequence[str]) -> None:
        """Add a machine that answers ARP for addresses and swallows all that comes."""
        host = self.host(name)
        self.help(host, host.space, "hole", "eth0", *addresses)

    def start(self, space: str, command: Sequence[str], cwd: Path, env: dict[str, str]) -> Daemon:
        """Start a process in a namespace."""
        process = Daemon(["ip", "netns", "exec", space, *command], cwd, env)
        self.processes.append(process)
        return process

    def help(self, host: Host, space: str, *words: str) -> Daemon:
        """Start one of the programs of this file, which must run until the end."""
        env = {name: value for name, value in host.env.items() if not name.startswith("COVERAGE_")}
        helper = self.start(space, [sys.executable, str(HERE), *words], host.path, env)
        self.helpers.append(helper)
        helper.wait_for("ready")
        return helper

    def close(self) -> None:
        """End the processes and remove the namespaces, each even where another one fails."""
        errors: list[Exception] = []
        for helper in self.helpers:
            if helper.process.poll() is not None:
                errors.append(RuntimeError(f"a helper of the test failed: {helper.output}"))
        for process in self.processes:
            process.ask_to_stop()
        for process in self.processes:
            try:
                process.stop()
            except Exception as error:
                errors.append(error)
        for space in reversed(self.spaces):
            try:
                call("ip", "netns", "del", space)
            except (OSError, subprocess.TimeoutExpired) as error:
                errors.append(error)
        self.processes, self.helpers, self.spaces = [], [], []
        if errors:
            raise errors[0]


@contextlib.contextmanager
def make_lan(path: Path) -> Iterator[Lan]:
    """Make a Lan for as long as a block lasts."""
    lan = Lan(path)
    try:
        yield lan
    finally:
        lan.close()


# ---- programs inside the namespaces ----

ARP = 0x0806
ALL = 0x0003  # every kind of frame
OUTGOING = 4  # what a packet socket calls the frames that its own machine sends
SIOCETHTOOL, SET_CHECKSUMS = 0x8946, 0x17


def open_device(device: str, kind: int) -> socket.socket:
    """Return a socket for the raw frames of a device."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    opened.bind((device, kind))
    opened.setblocking(False)
    return opened


def turn_plain(device: str) -> None:
    """Let the kernel send real frames through a device: with their checksums, none above the MTU."""
    value = array.array("B", struct.pack("=II", SET_CHECKSUMS, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sQ", device.encode(), value.buffer_info()[0]))


def is_over(started: float) -> bool:
    """Tell whether the test has ended: our input did."""
    over = bool(select.select([0], [], [], 0)[0]) and not os.read(0, 100)
    return over or time.monotonic() > started + LONGEST


def run_hole(device: str, addresses: Sequence[str]) -> None:
    """Answer ARP for addresses, and nothing else."""
    ours = {socket.inet_aton(address) for address in addresses}
    mac = bytes.fromhex("02770000dead")
    started = time.monotonic()
    with open_device(device, ARP) as frames:
        print("ready", flush=True)
        while not is_over(started):
            select.select([frames], [], [], 0.5)
            with contextlib.suppress(OSError):  # no more for now
                for _ in range(1000):
                    frame, place = frames.recvfrom(2048)
                    asked = frame[20:22] == b"\0\1" and frame[38:42] in ours
                    if asked and place[2] != OUTGOING:
                        head = frame[6:12] + mac + frame[12:20] + b"\0\2"
                        frames.send(head + mac + frame[38:42] + frame[22:28] + frame[28:32])


def run_relay(devices: Sequence[str], loss: float, delay: float, seed: int) -> None:
    """Pass frames between two devices, but for a share of them, each some time (s) later; says how many."""
    chance = random.Random(seed)
    started = said = time.monotonic()
    lost = passed = 0
    late: list[tuple[float, int, socket.socket, bytes]] = []
    number = itertools.count()
    with open_device(devices[0], ALL) as one, open_device(devices[1], ALL) as two:
        others = {one: two, two: one}
        print("ready", flush=True)
        while not is_over(started):
            wait = min(0.5, max(0.0, late[0][0] - time.monotonic())) if late else 0.5
            for source in select.select([one, two], [], [], wait)[0]:
                with contextlib.suppress(OSError):  # no more for now, or the cable is out
                    for _ in range(100):
                        frame, place = source.recvfrom(65536)
                        if place[2] == OUTGOING:
                            continue
                        if chance.random() < loss:
                            lost += 1
                        else:
                            passed += 1
                            heapq.heappush(late, (time.monotonic() + delay, next(number), others[source], frame))
            while late and late[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(late)
                with contextlib.suppress(OSError):  # a port that is down, a queue that is full
                    target.send(frame)
            if time.monotonic() > said + 1:
                said = time.monotonic()
                print(json.dumps([lost, passed]), flush=True)


def main(words: Sequence[str]) -> None:
    """Be one of the programs inside."""
    program, *rest = words
    if program == "hole":
        run_hole(rest[0], rest[1:])
    elif program == "relay":
        run_relay(rest[:2], float(rest[2]), float(rest[3]), int(rest[4]))
    elif program == "plain":
        turn_plain(rest[0])
    elif program == "probe":
        turn_plain(rest[0])
        open_device(rest[0], ALL).close()
    else:
        raise SystemExit(f"no program {program}")


if __name__ == "__main__":
    main(sys.argv[1:])
