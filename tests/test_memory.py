"""The memory of both roles stays flat, whatever the size of a file and the number of files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from conftest import World, uncovered

LIMIT = 150 << 20  # bytes, of each process
GIB = 1 << 30


def measure_node(pid: int) -> int:
    """Return the most memory that a process has taken, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def sweep_measured(world: World) -> int:
    """Make a sweep; returns the most memory that one process of the server took, in bytes."""
    code = "import resource, subprocess, sys; print(subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode,"
    code += " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    program = Path(__file__).resolve().parent.parent / "zbackup.py"
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, str(program), *world.server_flags()],
        cwd=world.path,
        env=world.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    exit_code, kilobytes = map(int, done.stdout.split())
    assert exit_code == 0, done.stderr
    return kilobytes << 10


def test_memory_of_large_files(world: World) -> None:
    world.env = uncovered(world.env)  # whose memory would be measured, too
    with open(world.files / "sparse", "wb") as sparse:
        sparse.truncate(2 * GIB)
        sparse.seek(GIB + 12345)
        sparse.write(b"in the middle")
    generator = random.Random(7)
    with open(world.files / "dense", "wb") as dense:
        for _ in range(2048):
            dense.write(generator.randbytes(1 << 20))
    node = world.node()
    assert sweep_measured(world) < LIMIT
    assert measure_node(node.pid) < LIMIT
    packs = sum(file.stat().st_size for file in (world.store / "packs").rglob("*.pack"))
    assert packs < 2.02 * GIB  # the holes cost nothing
    latest = world.store / "127.0.0.9" / "latest" / "files" / "sparse"
    assert latest.stat().st_size == 2 * GIB
    assert latest.stat().st_blocks * 512 < 10 << 20


def test_memory_of_many_files(world: World) -> None:
    world.env = uncovered(world.env)
    for folder in range(40):
        place = world.files / str(folder)
        place.mkdir()
        for number in range(1000):
            (place / f"a file with a name of some length {number}").write_bytes(b"%d" % (number * folder))
    node = world.node()
    assert sweep_measured(world) < LIMIT
    assert sweep_measured(world) < LIMIT
    assert measure_node(node.pid) < LIMIT
    assert sum(len(files) for _, _, files in os.walk(world.store / "127.0.0.9" / "latest")) == 40000
