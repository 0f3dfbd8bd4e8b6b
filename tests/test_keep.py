"""KEEP: what a dead process left is removed, what a living one holds is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENV

import zbackup as z

WRITE = """
import os, sys, zbackup
store = zbackup.open_store(sys.argv[1])
writer = zbackup.PackWriter(store.packs, store.index, zbackup.ZLIB, 1)
writer.put_chunk(b"half done")
writer.flush()
print("written", flush=True)
sys.stdin.readline()
writer.seal()
print("sealed", flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[z.Store]:
    made = z.open_store(str(tmp_path / "backups"), create=True)
    yield made
    made.close()


def start_writer(store: z.Store) -> subprocess.Popen[str]:
    """Let another process have a pack in the making."""
    other = subprocess.Popen(
        [sys.executable, "-c", WRITE, store.path], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout
    assert other.stdout.readline() == "written\n"
    return other


def test_leftovers_of_an_empty_store(store: z.Store) -> None:
    assert z.plan_leftovers(store) == z.Leftovers(())


def test_leftover_of_a_killed_writer_is_removed(store: z.Store) -> None:
    with start_writer(store) as other:
        other.kill()
    plan = z.plan_leftovers(store)
    assert [os.path.dirname(path) for path in plan.paths] == [store.packs]
    assert all(os.path.exists(path) for path in plan.paths)  # a plan alone changes nothing
    z.execute_leftovers(plan)
    assert os.listdir(store.packs) == []
    z.execute_leftovers(plan)  # what is gone is no error


def test_pack_of_a_living_writer_stays(store: z.Store) -> None:
    with start_writer(store) as other:
        (name,) = os.listdir(store.packs)
        assert z.plan_leftovers(store).paths == ()
        z.execute_leftovers(z.Leftovers((os.path.join(store.packs, name),)))
        assert os.listdir(store.packs) == [name]
        said, _ = other.communicate("\n", timeout=60)
    assert said == "sealed\n"
    reader = store.reader()
    assert reader.get(z.digest_pages(z.hash_pages(b"half done"))) == b"half done"
    reader.close()


def test_leftover_between_plan_and_execution(store: z.Store) -> None:
    path = os.path.join(store.packs, "incoming-00")
    Path(path).write_bytes(b"")
    plan = z.plan_leftovers(store)
    assert plan.paths == (path,)
    lock = z.lock_file(path, shared=False)  # it comes to life
    z.execute_leftovers(plan)
    assert os.path.exists(path)
    os.close(lock)


def test_what_is_not_recognised_stays(store: z.Store) -> None:
    strange = Path(store.packs) / "notes.txt"
    strange.write_text("mine")
    z.execute_leftovers(z.plan_leftovers(store))
    assert strange.read_text() == "mine"


def test_plan_leaves_no_lock_behind(store: z.Store) -> None:
    (Path(store.packs) / "incoming-00").write_bytes(b"")
    z.plan_leftovers(store)
    assert len(z.plan_leftovers(store).paths) == 1


def test_temporary_of_a_killed_process_is_removed(store: z.Store) -> None:
    folder = store.node("here")
    folder.make()
    killed = (
        "import os, sys, signal, zbackup\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "zbackup.write_durably(sys.argv[1], b'half')\n"
    )
    subprocess.run([sys.executable, "-c", killed, os.path.join(folder.snapshots, "a.json")], env=ENV, timeout=60)
    z.execute_leftovers(z.plan_leftovers(store))
    assert os.listdir(folder.snapshots) == []


@pytest.mark.parametrize("folder", ["keys", "aside"])
def test_leftover_of_a_key_or_of_a_repair_is_removed(store: z.Store, folder: str) -> None:
    """A server that was killed while it made its key left a secret that nothing names, and no sweep removed it."""
    (Path(store.path) / folder).mkdir(0o700)
    (Path(store.path) / folder / "server").write_text("the key")
    (Path(store.path) / folder / f"{z.TEMPORARY}00").write_text("half a key")
    z.execute_leftovers(z.plan_leftovers(store))
    assert os.listdir(os.path.join(store.path, folder)) == ["server"]
