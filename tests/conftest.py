"""What the tests share: real processes of both roles, on addresses of this machine."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "zbackup.py"
AT_ONCE = 5.0  # s that what is done at once may take on a busy machine; what it must not wait for takes far longer
sys.path.insert(0, str(HERE.parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: fills a table of the kernel; not run beside other tests")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell that starts the tests in the background (`tests/run.sh &`) tells them to ignore Ctrl-C, and each
        # process that they start would inherit that: what a test sends it would then do nothing.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def uncovered(env: dict[str, str]) -> dict[str, str]:
    """Return an environment without coverage, whose own locks a Ctrl-C in the wrong moment leaves locked."""
    return {name: value for name, value in env.items() if not name.startswith("COVERAGE_")}


def wait_until(condition: Any, timeout: float = 20.0, what: str = "the condition") -> None:
    """Wait until `condition()` is true; fail the test when it never is."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true within {timeout} s"
        time.sleep(0.02)


def path_before(*folders: Path) -> str:
    """Return a PYTHONPATH with folders before that of zbackup.py."""
    return os.pathsep.join(map(str, (*folders, PROGRAM.parent)))


def command(program: Path = PROGRAM) -> list[str]:
    """Return what starts a program; zbackup.py as a module, which Python compiles once and not at each start."""
    return [sys.executable, *(["-m", "zbackup"] if program == PROGRAM else [str(program)])]


class Process:
    """A zbackup process in the background."""

    def __init__(self, arguments: list[str], cwd: Path, env: dict[str, str], program: Path = PROGRAM) -> None:
        self.log = cwd / f"process-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([*command(program), *arguments], cwd=cwd, env=env, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)

    def kill(self) -> None:
        """End it as a power cut would, as far as the process goes."""
        self.stop(signal.SIGKILL)


class World:
    """A folder with a store, nodes and a port of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.port = find_free_port()
        self.store = path / "backups"
        self.files = path / "files"
        self.files.mkdir()
        self.env = {**os.environ, "XDG_STATE_HOME": str(path / "state"), "PYTHONUNBUFFERED": "1", "TZ": "UTC"}
        self.env["PYTHONPATH"] = path_before()
        self.nodes: list[Process] = []

    def run(self, *arguments: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; checks its exit code and that it shows no traceback."""
        done = subprocess.run(
            [*command(), *arguments],
            cwd=self.path,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            errors="surrogateescape",
            **options,
        )
        said = f"{arguments}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in said, said
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}, not {code}: {said}"
        return done

    def node(self, *arguments: str, address: str = "127.0.0.9", wait: bool = True, program: Path = PROGRAM) -> Process:
        """Start a node and wait until it serves."""
        flags = ["node", "--bind", address, "--port", str(self.port), *arguments]
        if "--file" not in arguments:
            flags += ["--file", "files"]
        node = Process(flags, self.path, self.env, program)
        self.nodes.append(node)
        if wait:
            wait_until(lambda: "serving" in node.output or node.process.poll() is not None, what="the node")
            assert node.process.poll() is None, node.output
        return node

    def key(self, *arguments: str) -> str:
        """Return the public key of the server, made at need; with arguments what `key` prints with them."""
        path = self.store / "keys/server"
        if arguments or not path.exists():
            return self.run("key", *arguments).stdout.strip()
        import zbackup

        return zbackup.load_pair(str(path)).public

    def keyed(self, *arguments: str, address: str = "127.0.0.9") -> Process:
        """Start a node that answers this world's server alone."""
        return self.node("--server-key", self.key(), *arguments, address=address)

    def server_flags(self, *arguments: str) -> list[str]:
        """Return the flags of one sweep over 127.0.0.9 unless the arguments name addresses.

        By one process, unless they say otherwise: others cost the measuring of coverage much, and crash.py sees one.
        """
        where = [] if {"--range", "--host", "--network"} & set(arguments) else ["--range", "9"]
        return ["server", "--once", "--port", str(self.port), "--latest-jobs", "1", *where, *arguments]

    def sweep(self, *arguments: str, code: int | None = 0) -> dict[str, Any]:
        """Make one sweep; returns its JSON report."""
        done = self.run(*self.server_flags("--json", *arguments), code=code)
        report: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        report["stderr"] = done.stderr
        return report

    def server(self, *arguments: str) -> Process:
        """Start one sweep in the background."""
        server = Process(self.server_flags(*arguments), self.path, self.env)
        self.nodes.append(server)
        return server

    def known(self) -> list[dict[str, str]]:
        """Return the rows of `nodes`, without a process of its own."""
        import zbackup

        with contextlib.closing(zbackup.open_store(str(self.store))) as store:
            head, *rows = zbackup.list_known(store)
        return [dict(zip(head, row)) for row in rows]

    def listed(self, *arguments: str) -> list[dict[str, str]]:
        """Return the rows of `list`."""
        rows: list[dict[str, str]] = json.loads(self.run("list", *arguments, "--json").stdout)
        return rows

    def restore(self, *arguments: str, to: str = "restored", code: int | None = 0) -> Path:
        """Restore node 127.0.0.9 or what the arguments name; returns the folder."""
        names = list(arguments) if arguments and not arguments[0].startswith("-") else [FOLDER, *arguments]
        self.run("restore", "--jobs", "1", *names, "--to", to, code=code)
        return self.path / to

    def close(self) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.terminate()
        for node in self.nodes:
            try:
                node.process.wait(5)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()


FOLDER = "127.0.0.9"  # where the copies of a node at the first address are


ENV = uncovered({**os.environ, "PYTHONPATH": str(HERE.parent)})  # of a process that helps a test and imports zbackup

HOLD = """
import sys, zbackup
fd = zbackup.lock_file(sys.argv[1], shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.readline()
"""


HALT = """
import os, signal, sys, zbackup
event, count = sys.argv.pop(1), int(sys.argv.pop(1))

def look(name, arguments):
    global count
    count -= name == event
    if name == event and not count:
        os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(look)
sys.exit(zbackup.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def halted(world: World, event: str, count: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command that stops itself, as SIGSTOP does, before it does something for the `count`th time.

    `event` is what an audit hook calls it (https://docs.python.org/3/library/audit_events.html).  A signal sent then
    comes in the middle of the work, however busy this machine is.
    """
    with subprocess.Popen(
        [sys.executable, "-c", HALT, event, str(count), *arguments],
        cwd=world.path,
        env=uncovered({**world.env, "PYTHONPATH": str(HERE.parent)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert found and found.si_code == os.CLD_STOPPED, process.communicate()
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            if process.poll() is None:
                process.kill()


@contextlib.contextmanager
def held(path: Path | str, how: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold a lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how],
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


# The kernel gives ports from 32,768 up to whoever connects, so one found free there may be taken the moment after.
# Each process of pytest has 2,000 below those to itself, and begins somewhere in them.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw9").removeprefix("gw")) % 10
_ports = itertools.cycle(range(11_000 + 2_000 * _worker, 13_000 + 2_000 * _worker))
for _ in range(os.getpid() % 2_000):
    next(_ports)


def find_free_port() -> int:
    """Return a TCP port that nobody listens at, and that no other test is given."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise AssertionError("unreachable: the ports have no end")


def rewrite(path: Path, **changes: object) -> None:
    """Change members of a JSON file of the store, so that its checksum is right."""
    import zbackup

    fields = {**json.loads(path.read_text()), **changes}
    fields.pop("sha256", None)
    path.write_bytes(zbackup.encode_file(fields))


def make_database(path: Path, rows: int = 1000, wal: bool = False) -> sqlite3.Connection:
    """Make a SQLite database with a table t(a, b); returns the open connection."""
    connection = sqlite3.connect(path, timeout=30)
    if wal:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", ((i, os.urandom(100)) for i in range(rows)))
    connection.commit()
    return connection


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()
