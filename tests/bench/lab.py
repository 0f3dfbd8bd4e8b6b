"""Two machines on one: two network namespaces joined by a veth pair, and a control group for each tool on each.

`machine` has the files, `vault` has the store. Both need root; without it both are the loopback interface, and the
processes are found by their parents. What is measured is the same.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.78"  # exists in the namespaces that the lab makes, and nowhere else
TICK = os.sysconf("SC_CLK_TCK")
SAMPLE = 0.05  # seconds between two looks at the memory; more often would cost CPU that the tools want
LEFTOVERS = 3.0  # seconds that the processes behind a command (an sshd's child) get to end by themselves
PLAIN = ("PATH", "HOME", "LANG", "TZ")
# The shell puts itself into the group, then becomes the command: nothing of it runs outside.
ENTER = 'echo $$ > "$0/cgroup.procs"; exec "$@"'


@dataclass(frozen=True)
class Command:
    """A program to run on one side."""

    side: str
    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Show it as one would type it, with the settings that are not of every command."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.env.items() if name not in PLAIN]
        return f"{self.side}$ {' '.join(settings + [shlex.quote(word) for word in self.argv])}"


class Failed(Exception):
    """A command of the benchmark did not do its work."""


# ---- which processes belong together ----


class ControlGroup:
    """The processes of one tool on one side, in a control group (version 2), which misses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def wrap(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        return ("sh", "-c", ENTER, str(self.path), *argv)

    def pids(self) -> set[int]:
        return {int(pid) for pid in (self.path / "cgroup.procs").read_text().split()}

    def cpu(self) -> float:
        """Return the seconds of CPU that all its processes have had, the ended ones too."""
        return int((self.path / "cpu.stat").read_text().split()[1]) / 1e6

    def add(self, pid: int) -> None:
        """The process has added itself."""

    def ended(self, pid: int, seconds: float) -> None:
        """The group has counted it."""

    def close(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.pids(), 5.0)
        with contextlib.suppress(OSError):
            self.path.rmdir()


class Family:
    """The processes of one tool on one side, found as the children of those that the lab started."""

    def __init__(self) -> None:
        self.roots: set[int] = set()
        self.past = 0.0

    def wrap(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        return argv

    def pids(self) -> set[int]:
        found: set[int] = set()
        todo = list(self.roots)
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                found.add(pid)
        return found

    def cpu(self) -> float:
        """Return the seconds of the roots and of those of their children that have ended."""
        return self.past + sum(cpu_of(pid) for pid in self.roots)

    def add(self, pid: int) -> None:
        self.roots.add(pid)

    def ended(self, pid: int, seconds: float) -> None:
        self.roots.discard(pid)
        self.past += seconds

    def close(self) -> None:
        """The lab ends the roots."""


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU of a process and of its children that were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICK


def find_unified() -> Path | None:
    """Return the folder of the control groups of version 2, if there is one that may be written."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2" and os.geteuid() == 0 and os.access(path, os.W_OK):
            return Path(path)
    return None


# ---- the two sides ----


@dataclass(frozen=True)
class Place:
    """One of the two machines."""

    name: str
    address: str
    holder: int  # the process whose network namespace it is; 0: that of the benchmark

    def wrap(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{self.holder}/ns/net", "--", *argv) if self.holder else argv

    def count_bytes(self) -> int:
        """Return the bytes, both ways, that its interface to the other side has seen."""
        name = "zb" if self.holder else "lo"
        for line in Path(f"/proc/{self.holder or 'self'}/net/dev").read_text().splitlines():
            interface, _, counts = line.partition(":")
            if interface.strip() == name:
                fields = counts.split()
                return int(fields[0]) + (int(fields[8]) if self.holder else 0)
        return 0


class Lab:
    """Makes the two places, and ends all that was started in them."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.waste = folder / "waste"  # what is over, see trees.put_away
        self.limit = limit
        self.unified = find_unified()
        self.holders: list[subprocess.Popen[bytes]] = []
        self.groups = 0
        self.places = self.join() or self.share()

    def join(self) -> dict[str, Place]:
        """Make two namespaces with a cable between them; nothing when that is not allowed."""
        try:
            for _ in range(2):
                self.holders.append(hold_namespace())
            one, two = (holder.pid for holder in self.holders)
            inside(one, f"ip link add zb type veth peer name zb netns {two}")
            for pid, part in ((one, 2), (two, 1)):
                inside(pid, "sysctl -qw net.ipv6.conf.zb.disable_ipv6=1 || true")
                inside(pid, f"ip address add {NETWORK}.0.{part}/16 dev zb && ip link set zb up && ip link set lo up")
        except (OSError, subprocess.SubprocessError) as reason:
            print(f"no network namespaces ({reason}): both sides are on loopback", flush=True)
            self.close()
            return {}
        return {
            "machine": Place("machine", f"{NETWORK}.0.2", one),
            "vault": Place("vault", f"{NETWORK}.0.1", two),
        }

    def share(self) -> dict[str, Place]:
        return {"machine": Place("machine", "127.0.0.2", 0), "vault": Place("vault", "127.0.0.1", 0)}

    @property
    def joined(self) -> bool:
        """Whether the sides have namespaces of their own."""
        return bool(self.places["vault"].holder)

    def group(self, name: str) -> ControlGroup | Family:
        if self.unified is None:
            return Family()
        self.groups += 1
        return ControlGroup(self.unified / f"zbackup-bench-{os.getpid()}-{self.groups}-{name}")

    def describe(self) -> str:
        net = "two network namespaces joined by a veth pair" if self.joined else "loopback"
        return f"{net}; processes by {'control groups' if self.unified else 'parents'}"

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()
        self.holders.clear()


def hold_namespace() -> subprocess.Popen[bytes]:
    """Start a process that has a network namespace of its own; it ends with the benchmark (its standard input)."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    if not holder.stdout.readline():
        raise OSError("unshare --net failed")
    return holder


def inside(pid: int, script: str) -> None:
    argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-c", script]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until `condition()`; returns whether it came true."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---- one tool's processes, and what they cost ----


@dataclass(frozen=True)
class Cost:
    """What one command cost, in seconds and bytes."""

    wall: float
    cpu_machine: float
    cpu_vault: float
    peak_machine: int
    peak_vault: int
    wire: int


class Seat:
    """One tool on one side."""

    def __init__(self, lab: Lab, side: str, logs: Path) -> None:
        self.place = lab.places[side]
        self.group = lab.group(side)
        self.logs = logs
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self, command: Command, name: str) -> subprocess.Popen[bytes]:
        with open(self.logs / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                self.group.wrap(self.place.wrap(command.argv)),
                cwd=command.cwd,
                env=dict(command.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.group.add(process.pid)
        return process

    def serve(self, command: Command, name: str) -> Path:
        """Start a server that runs until the seat is closed; returns its log."""
        self.daemons.append(self.start(command, name))
        return self.logs / f"{name}.log"

    def settle(self, before: set[int]) -> None:
        """Wait for what is still ending, so that its CPU time is counted; it is outside of the wall time."""
        wait_for(lambda: self.group.pids() <= before, LEFTOVERS)

    def peak(self) -> int:
        """Return the highest memory of each living process, added up; what they share counts for each."""
        return sum(high_water(pid) for pid in self.group.pids())

    def forget_peaks(self) -> None:
        for pid in self.group.pids():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.group.close()


def high_water(pid: int) -> int:
    """Return the most memory (resident set) that a process ever had, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Team:
    """One tool: its seats on both sides."""

    def __init__(self, lab: Lab, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.lab = lab
        self.seats = {side: Seat(lab, side, logs) for side in ("machine", "vault")}

    def run(self, command: Command, name: str = "setup") -> str:
        """Run a command to its end without measuring; returns what it said."""
        self.finish(command, name)
        return (self.seats[command.side].logs / f"{name}.log").read_text(errors="replace")

    def finish(self, command: Command, name: str) -> float:
        """Run a command to its end; returns the seconds it took."""
        seat = self.seats[command.side]
        begin = time.perf_counter()
        process = seat.start(command, name)
        killer = threading.Timer(self.lab.limit, os.kill, (process.pid, signal.SIGKILL))
        killer.daemon = True
        killer.start()
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - begin
        killer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        seat.group.ended(process.pid, usage.ru_utime + usage.ru_stime)
        if process.returncode:
            said = (seat.logs / f"{name}.log").read_text(errors="replace")[-2000:]
            raise Failed(f"{command}\nended with {process.returncode}\n{said}")
        return took

    def measure(self, command: Command, name: str) -> Cost:
        """Run a command to its end and say what it cost both sides."""
        seats = self.seats
        before = {side: (seat.group.pids(), seat.group.cpu()) for side, seat in seats.items()}
        for seat in seats.values():
            seat.forget_peaks()
        wire = seats["vault"].place.count_bytes()
        with Sampler(seats) as sampler:
            wall = self.finish(command, name)
        for side, seat in seats.items():
            seat.settle(before[side][0])
        cpu = {side: seat.group.cpu() - before[side][1] for side, seat in seats.items()}
        sent = seats["vault"].place.count_bytes() - wire
        return Cost(wall, cpu["machine"], cpu["vault"], sampler.peaks["machine"], sampler.peaks["vault"], sent)

    def close(self) -> None:
        for seat in self.seats.values():
            seat.close()


class Sampler:
    """Looks at the memory of both sides until it is left."""

    def __init__(self, seats: dict[str, Seat]) -> None:
        self.seats = seats
        self.peaks = dict.fromkeys(seats, 0)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def look(self) -> None:
        for side, seat in self.seats.items():
            self.peaks[side] = max(self.peaks[side], seat.peak())

    def watch(self) -> None:
        # The first looks come quickly, so that a command of a few milliseconds is seen at all.
        pause = 0.004
        while not self.done.wait(pause):
            self.look()
            pause = min(SAMPLE, pause * 1.5)

    def __enter__(self) -> Sampler:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


@contextlib.contextmanager
def opened_lab(folder: Path, limit: float) -> Iterator[Lab]:
    lab = Lab(folder, limit)
    try:
        yield lab
    finally:
        lab.close()
