"""From a snapshot back to files: all that was known of them, and never a byte elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import shutil
import signal
import socket
import sqlite3
import stat as stat_bits
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FOLDER, PROGRAM, World, halted, make_database, rewrite, uncovered, wait_until

import zbackup

NOON = 1_700_000_000 * 10**9
MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


# ---- stores made by hand: what no honest node would send ----


def describe(path: str | bytes, kind: str = "file", **fields: Any) -> zbackup.Stat:
    """Return the Stat of a path, of this process's user unless told otherwise."""
    mode = 0o755 if kind == "directory" else 0o644
    known = {"mode": mode, "uid": os.geteuid(), "gid": os.getegid(), "mtime": NOON, **fields}
    return zbackup.Stat(path.encode() if isinstance(path, str) else path, kind, **known)


def put_file(writer: zbackup.PackWriter, stat: zbackup.Stat, data: bytes, grade: str = "stable") -> zbackup.Entry:
    """Store a file's content; returns its entry."""
    chunks = tuple(writer.put_chunk(data[i : i + MIB]) for i in range(0, len(data), MIB))
    content = zbackup.Content(len(data), chunks, (), grade)
    stat = stat._replace(size=len(data))
    return zbackup.Entry(zbackup.encode_stat(stat), zbackup.encode_content(content))


def make_snapshot(
    path: Path,
    entries: list[tuple[zbackup.Stat, Any]],
    grade: str = "stable",
    at: int = NOON,
    node: str = FOLDER,
    **fields: Any,
) -> zbackup.Snapshot:
    """Store a snapshot of (Stat, content): bytes, a Content, a ready line as bytes of an Entry, or None."""
    with contextlib.closing(zbackup.open_store(str(path), create=True)) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.ZLIB, 1)
        blocks = zbackup.BlockWriter(writer)
        for stat, content in entries:
            if isinstance(content, bytes):
                blocks.put(put_file(writer, stat, content))
            else:
                read = zbackup.encode_content(content or zbackup.NOTHING)
                blocks.put(zbackup.Entry(zbackup.encode_stat(stat), read))
        digests = blocks.close()
        writer.seal()
        folder = store.node(node)
        folder.make()
        folder.save_known(zbackup.Known(node, "0" * 32, "host", (FOLDER,), at, at))
        sequence = 1 + len(os.listdir(folder.snapshots))
        snapshot = zbackup.Snapshot(
            zbackup.name_time(at), node, sequence, at, at, grade, blocks=digests, host="host", **fields
        )
        return folder.save_snapshot(snapshot)


def list_tree(path: Path) -> dict[str, str]:
    """Return all paths below a folder and what they are."""
    return {
        str(found.relative_to(path)): "link" if found.is_symlink() else "folder" if found.is_dir() else "file"
        for found in sorted(path.rglob("*"))
    }


def run_as_nobody(arguments: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command as nobody, who may not even start our Python: it is started first, then given away."""
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import ast, contextlib, importlib, multiprocessing.connection, multiprocessing.popen_fork, os, zbackup\n"
        "zbackup.load_zstd()\n"
        "for node in ast.walk(ast.parse(open(zbackup.__file__).read())):\n"
        "    for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:\n"
        "        with contextlib.suppress(ImportError): importlib.import_module(name)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(zbackup.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, str(PROGRAM.parent), *arguments]
    # Nobody may not write what coverage measures.
    env = {name: value for name, value in env.items() if not name.startswith("COVERAGE")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that nobody can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="zbackup-test-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


# ---- one copy of everything that a filesystem has ----


def make_acl(user: int) -> bytes:
    """Return the extended attribute of an ACL that lets one more user read."""
    nobody = 0xFFFFFFFF
    rows = [(1, 6, nobody), (2, 4, user), (4, 4, nobody), (0x10, 4, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


def make_zoo(files: Path) -> None:
    """Make one of each kind of thing below a folder."""
    (files / "plain").write_bytes(os.urandom(3 * MIB + 17))
    (files / "empty").touch()
    (files / "hollow").mkdir()
    (files / "hollow").chmod(0o555)
    (files / "deep/er/est").mkdir(parents=True)
    (files / "deep/er/est/leaf").write_text("leaf")
    (files / "deep/er").chmod(0o2750)
    for name, mode in (("setuid", 0o4755), ("setgid", 0o2711), ("sticky", 0o1600), ("closed", 0o000)):
        (files / name).write_text(name)
        (files / name).chmod(mode)
    (files / "first").write_text("one file, three names")
    os.link(files / "first", files / "second")
    os.link(files / "first", files / "deep/third")
    os.symlink("plain", files / "link")
    os.symlink(b"\xff\xfe nowhere", bytes(files / "odd link"))
    os.symlink("../../../etc", files / "link out")
    os.mkfifo(files / "fifo", 0o620)
    (files / "new\nline").write_text("n")
    Path(os.fsdecode(bytes(files) + b"/caf\xe9")).write_text("latin")
    (files / "été").write_text("utf-8")
    with open(files / "sparse", "wb") as sparse:
        sparse.write(b"head")
        sparse.seek(5 * MIB)
        sparse.write(b"middle")
        sparse.truncate(4 << 30)
    (files / "marked").write_text("marked")
    os.setxattr(files / "marked", "user.colour", b"blue\0\xff")
    os.setxattr(files / "marked", "system.posix_acl_access", make_acl(1))
    os.setxattr(files / "hollow", "user.of", b"folder")
    os.setxattr(files / "hollow", "system.posix_acl_default", make_acl(1))
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(files)  # a socket's path has a limit
        listener.bind("socket")
        os.chdir(here)
    if os.geteuid() == 0:
        os.mknod(files / "character", stat_bits.S_IFCHR | 0o606, os.makedev(1, 3))
        os.mknod(files / "block", stat_bits.S_IFBLK | 0o640, os.makedev(7, 123))
        (files / "owned").write_text("owned")
        os.chown(files / "owned", 1, 2)
        os.chown(files / "link", 54321, 54322, follow_symlinks=False)
        os.chown(files / "setuid", 54321, 54322)
        (files / "setuid").chmod(0o4755)
    for number, path in enumerate(sorted(files.rglob("*"), reverse=True)):
        os.utime(path, ns=(NOON, NOON + number * 1_000_000_007), follow_symlinks=False)
    os.utime(files, ns=(NOON, NOON - 1))


def picture(path: Path) -> dict[str, Any]:
    """Return all that a restore should bring back of one path."""
    found = path.lstat()
    kind = stat_bits.S_IFMT(found.st_mode)
    told: dict[str, Any] = {
        "mode": oct(found.st_mode),
        "owner": (found.st_uid, found.st_gid),
        "mtime": found.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False) for name in list_names(path)},
    }
    if kind == stat_bits.S_IFREG:
        told["size"], told["links"] = found.st_size, found.st_nlink
        told["content"] = path.read_bytes() if found.st_size < 64 * MIB else "large"
    if kind == stat_bits.S_IFLNK:
        told["target"] = os.readlink(bytes(path))
    if kind in (stat_bits.S_IFBLK, stat_bits.S_IFCHR):
        told["device"] = found.st_rdev
    return told


def list_names(path: Path) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world with one sweep over one of each kind."""
    made = World(tmp_path_factory.mktemp("zoo"))
    make_zoo(made.files)
    node = made.node()
    made.sweep("--no-latest")
    node.stop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def restored(zoo: World) -> Path:
    """The zoo, restored."""
    return zoo.restore(to="back") / "files"


@needs_root
def test_restore_all_bit_exact(zoo: World, restored: Path) -> None:
    before = {str(path.relative_to(zoo.files)): picture(path) for path in zoo.files.rglob("*")}
    after = {str(path.relative_to(restored)): picture(path) for path in restored.rglob("*")}
    del before["socket"]  # made by its program at each start
    assert after.keys() == before.keys()
    for name, told in before.items():
        assert after[name] == told, name
    assert picture(restored) == picture(zoo.files)


def test_restore_hard_links_one_inode(restored: Path) -> None:
    inodes = {(restored / name).stat().st_ino for name in ("first", "second", "deep/third")}
    assert len(inodes) == 1


def test_restore_sparse_file_keeps_holes(zoo: World, restored: Path) -> None:
    with open(restored / "sparse", "rb") as file:
        assert file.read(5) == b"head\0"
        file.seek(5 * MIB - 1)
        assert file.read(8) == b"\0middle\0"
    assert (restored / "sparse").stat().st_size == 4 << 30
    assert (restored / "sparse").stat().st_blocks * 512 < MIB


def test_restore_sparse_4_gib_is_quick(zoo: World) -> None:
    started = time.monotonic()
    zoo.restore(FOLDER, "files/sparse", to="quick")
    assert time.monotonic() - started < 5


def test_restore_leaves_no_temporary_file(restored: Path) -> None:
    assert [path.name for path in restored.parent.rglob(zbackup.TEMPORARY + "*")] == []


def test_restore_path_selection(zoo: World) -> None:
    back = zoo.restore(FOLDER, "files/deep/er", "/files/empty", to="some")
    assert list_tree(back) == {
        "files": "folder",
        "files/deep": "folder",
        "files/deep/er": "folder",
        "files/deep/er/est": "folder",
        "files/deep/er/est/leaf": "file",
        "files/empty": "file",
    }
    assert picture(back / "files/deep") == picture(zoo.files / "deep")


def test_restore_path_missing(zoo: World) -> None:
    done = zoo.run("restore", FOLDER, "files/empty", "files/nothing", "--to", "missing", code=1)
    assert "files/nothing: is not in the snapshot" in done.stderr
    assert (zoo.path / "missing/files/empty").exists()


@needs_root
def test_restore_as_nobody(zoo: World, public: Path) -> None:
    shutil.copytree(zoo.store, public / "backups")
    for path in [public / "backups", *(public / "backups").rglob("*")]:
        os.chown(path, 65534, 65534)
    done = run_as_nobody(["restore", FOLDER, "--to", "back"], public, zoo.env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "owner of " in done.stderr and "could not be set" in done.stderr
    back = public / "back/files"
    for name in ("plain", "setuid", "setgid", "owned", "deep/third"):
        assert (back / name).read_bytes() == (zoo.files / name).read_bytes(), name
        assert (back / name).stat().st_uid == 65534
    assert stat_bits.S_IMODE((back / "setuid").stat().st_mode) == 0o755
    assert stat_bits.S_IMODE((back / "setgid").stat().st_mode) == 0o711
    assert stat_bits.S_IMODE((back / "closed").stat().st_mode) == 0
    assert stat_bits.S_IMODE((back / "hollow").stat().st_mode) == 0o555
    assert not (back / "character").exists() and "files/character: cannot be restored" in done.stderr


# ---- owners ----


@needs_root
def test_restore_owner_by_name_or_number(world: World) -> None:
    """The machine that is restored to has its own numbers for the same names."""
    known = describe("known", uid=4444, gid=5555, user="daemon", group="bin", mode=0o4755)
    strange = describe("strange", uid=4444, gid=5555, user="no such user", group="no such group")
    make_snapshot(world.store, [(known, b"k"), (strange, b"s")])
    by_name, by_number = world.restore(to="name"), world.restore("--numeric-ids", to="number")
    found = {(p.name, q.name): (q.stat().st_uid, q.stat().st_gid) for p in (by_name, by_number) for q in p.iterdir()}
    assert found == {
        ("name", "known"): (1, 2),
        ("name", "strange"): (4444, 5555),
        ("number", "known"): (4444, 5555),
        ("number", "strange"): (4444, 5555),
    }
    assert stat_bits.S_IMODE((by_name / "known").stat().st_mode) == 0o4755


# ---- what is there already ----


@pytest.fixture
def small(world: World) -> World:
    """A store with a folder, a file and a link."""
    make_snapshot(
        world.store,
        [
            (describe("a", "directory", mode=0o750), None),
            (describe("a/file"), b"from the store"),
            (describe("a/link", "symlink", target=b"file"), None),
            (describe("b"), b"other"),
        ],
    )
    return world


def test_restore_leaves_existing_file(small: World) -> None:
    back = small.path / "restored"
    (back / "a").mkdir(parents=True)
    (back / "a/file").write_text("mine")
    done = small.run("restore", FOLDER, "--to", "restored", code=1)
    assert "a/file: exists already" in done.stderr and "--overwrite" in done.stderr
    assert (back / "a/file").read_text() == "mine"
    assert (back / "b").read_text() == "other"
    assert list_tree(back) == {"a": "folder", "a/file": "file", "a/link": "link", "b": "file"}


def test_restore_leaves_existing_folder_as_it_is(small: World) -> None:
    (small.path / "restored/a").mkdir(parents=True, mode=0o700)
    back = small.restore()
    assert stat_bits.S_IMODE((back / "a").stat().st_mode) == 0o700
    assert (back / "a").stat().st_mtime_ns != NOON


def test_restore_overwrite_replaces(small: World) -> None:
    back = small.path / "restored"
    (back / "a").mkdir(parents=True, mode=0o700)
    (back / "a/file").write_text("mine")
    (back / "a/own").write_text("mine")
    os.symlink("/etc/passwd", back / "b")
    small.restore("--overwrite")
    assert (back / "a/file").read_text() == "from the store"
    assert (back / "b").read_text() == "other" and not (back / "b").is_symlink()
    assert (back / "a/own").read_text() == "mine"
    assert stat_bits.S_IMODE((back / "a").stat().st_mode) == 0o750
    assert (back / "a").stat().st_mtime_ns == NOON


def test_restore_overwrite_again_is_the_same(small: World) -> None:
    first = picture(small.restore() / "a/file")
    assert picture(small.restore("--overwrite") / "a/file") == first


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_restore_folder_in_place_of_file(small: World, flags: list[str]) -> None:
    (small.path / "restored/b/inside").mkdir(parents=True)
    done = small.run("restore", FOLDER, "--to", "restored", *flags, code=1)
    assert "b: " in done.stderr
    assert list_tree(small.path / "restored/b") == {"inside": "folder"}
    assert (small.path / "restored/a/file").read_text() == "from the store"


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_restore_file_in_place_of_folder(small: World, flags: list[str]) -> None:
    (small.path / "restored").mkdir()
    (small.path / "restored/a").write_text("mine")
    done = small.run("restore", FOLDER, "--to", "restored", *flags, code=1)
    assert "a/file: cannot be restored" in done.stderr
    assert (small.path / "restored/a").read_text() == "mine"
    assert (small.path / "restored/b").read_text() == "other"


# ---- never outside of --to ----


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_restore_follows_no_symlink_of_folder(small: World, flags: list[str]) -> None:
    (small.path / "elsewhere").mkdir()
    (small.path / "restored").mkdir()
    os.symlink("../elsewhere", small.path / "restored/a")
    done = small.run("restore", FOLDER, "--to", "restored", *flags, code=1)
    assert "a/file: cannot be restored" in done.stderr
    assert list_tree(small.path / "elsewhere") == {}
    assert (small.path / "restored/a").is_symlink()


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_restore_follows_no_symlink_of_file(small: World, flags: list[str]) -> None:
    (small.path / "elsewhere").write_text("mine")
    (small.path / "restored").mkdir()
    os.symlink("../elsewhere", small.path / "restored/b")
    small.run("restore", FOLDER, "--to", "restored", *flags, code=0 if flags else 1)
    assert (small.path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("between", [0, 5000])
def test_restore_hostile_symlink_then_entry_below(world: World, flags: list[str], between: int) -> None:
    """With so many entries between them, the link is published before the file comes."""
    (world.path / "elsewhere").mkdir()
    target = bytes(world.path / "elsewhere")
    link = (describe("door", "symlink", target=target), None)
    filling = [(describe(f"door.{i:05}"), zbackup.NOTHING) for i in range(between)]
    make_snapshot(world.store, [link, *filling, (describe("door/file"), b"evil"), (describe("good"), b"good")])
    world.restore(*flags, code=1)
    assert list_tree(world.path / "elsewhere") == {}
    assert (world.path / "restored/good").read_text() == "good"


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "a//evil", "./evil", "a/", ".", "..", "a\0b", ""])
def test_restore_refuses_crafted_path(world: World, path: str) -> None:
    make_snapshot(world.store, [(describe("aaa"), b"good"), (describe("x")._replace(path=path.encode()), b"e")])
    world.run("restore", FOLDER, "--to", "inner/restored", code=None)
    assert "evil" not in "".join(list_tree(world.path))


def test_restore_crafted_path_ends_in_sentence(world: World) -> None:
    evil = describe("x")._replace(path=b"../evil")
    make_snapshot(world.store, [(describe("aaa"), b"good"), (evil, b"evil")])
    done = world.run("restore", FOLDER, "--to", "restored", code=None)
    assert done.returncode != 0
    assert "a path that is not plain: ../evil" in done.stderr


HOSTILE = {
    "user with NUL": {"user": "a\0b"},
    "user no name": {"user": "\ud800"},
    "group with NUL": {"group": "a\0b"},
    "uid too large": {"uid": 1 << 32, "user": ""},
    "device too large": {"kind": "character", "rdev": 1 << 64},
    "xattr with NUL": {"kind": "fifo", "xattrs": {"user.a\0b": "eA=="}},
    "xattr not ASCII": {"kind": "fifo", "xattrs": {"user.a": "é"}},
    "xattr not base64": {"kind": "fifo", "xattrs": {"user.a": "x"}},
    "link to nothing": {"kind": "symlink", "target": b""},
    "link too long": {"kind": "symlink", "target": b"x" * 5000},
    "name too long": {"path": b"x" * 300},
    "time far away": {"mtime": 1 << 63},
}


@needs_root
@pytest.mark.parametrize("what", HOSTILE)
def test_restore_hostile_entry_costs_only_itself(world: World, what: str) -> None:
    bad = describe("bad")._replace(**HOSTILE[what])
    make_snapshot(world.store, [(bad, b"" if bad.kind == "file" else None), (describe("good"), b"good")])
    world.run("restore", FOLDER, "--to", "restored", code=None)
    assert (world.path / "restored/good").read_text() == "good"


# ---- damage ----


def damage(path: Path, at: int) -> None:
    """Flip bits in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


def list_packs(store: Path) -> list[Path]:
    return sorted(store.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)


def make_two_packs(world: World) -> tuple[Path, Path]:
    """Store a large file in one pack and the rest in another; returns both, the large one last."""
    with contextlib.closing(zbackup.open_store(str(world.store), create=True)) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
        writer.put_chunk(random.Random(1).randbytes(MIB))
        writer.seal()
    data = random.Random(1).randbytes(MIB)
    make_snapshot(world.store, [(describe("bad"), data), (describe("good"), b"good")])
    small, large = list_packs(world.store)
    return small, large


def test_restore_damaged_pack_costs_only_its_files(world: World) -> None:
    _, pack = make_two_packs(world)
    damage(pack, MIB // 2)
    done = world.run("restore", FOLDER, "--to", "restored", code=None)
    assert done.returncode != 0
    assert pack.stem in done.stderr and "damaged" in done.stderr
    assert list_tree(world.path / "restored") == {"good": "file"}


def test_restore_lost_pack_costs_only_its_files(world: World) -> None:
    _, pack = make_two_packs(world)
    pack.unlink()
    done = world.run("restore", FOLDER, "--to", "restored", code=None)
    assert done.returncode != 0
    assert "bad: the store has no chunk" in done.stderr
    assert list_tree(world.path / "restored") == {"good": "file"}


@pytest.mark.parametrize("end", ["head", "tail"])
def test_restore_pack_cut_off(world: World, end: str) -> None:
    _, pack = make_two_packs(world)
    data = pack.read_bytes()
    pack.write_bytes(data[1000:] if end == "head" else data[: MIB // 2])
    (world.store / "index.sqlite").unlink()
    done = world.run("restore", FOLDER, "--to", "restored", code=4)
    assert f"pack {pack.stem} is damaged" in done.stderr
    assert list_tree(world.path / "restored") == {"good": "file"}


def test_restore_damaged_block_of_entries(world: World) -> None:
    small, _ = make_two_packs(world)
    _, _, _, _, _, table, _, stored = zbackup.RECORD.unpack_from(small.read_bytes(), len(zbackup.PACK_HEADER))
    damage(small, len(zbackup.PACK_HEADER) + zbackup.RECORD.size + table + stored // 2)
    done = world.run("restore", FOLDER, "--to", "restored", code=None)
    assert done.returncode != 0 and small.stem in done.stderr


def make_many_blocks(world: World) -> None:
    """Store two snapshots' worth of entries in two packs, so that one block can be damaged alone."""
    with contextlib.closing(zbackup.open_store(str(world.store), create=True)) as store:
        digests = []
        for names in (["a1", "a2"], ["b1", "b2"]):
            writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
            blocks = zbackup.BlockWriter(writer)
            for name in names:
                blocks.put(put_file(writer, describe(name), name.encode()))
            digests += blocks.close()
            writer.seal()
        folder = store.node(FOLDER)
        folder.make()
        folder.save_known(zbackup.Known(FOLDER, "0" * 32))
        snapshot = zbackup.Snapshot("2023-11-14T22-13-20Z", FOLDER, 1, NOON, NOON, "stable", blocks=tuple(digests))
        folder.save_snapshot(snapshot)


def test_restore_damaged_block_costs_only_its_entries(world: World) -> None:
    make_many_blocks(world)
    pack = next(path for path in list_packs(world.store) if b'"a1"' in path.read_bytes())
    damage(pack, pack.read_bytes().index(b'"a1"'))
    done = world.run("restore", FOLDER, "--to", "restored", code=None)
    assert done.returncode != 0 and pack.stem in done.stderr
    assert list_tree(world.path / "restored") == {"b1": "file", "b2": "file"}


def test_restore_content_of_wrong_length(world: World) -> None:
    with contextlib.closing(zbackup.open_store(str(world.store), create=True)) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.PLAIN, 1)
        digest = writer.put_chunk(b"five!")
        writer.seal()
    entries = [
        (describe("longer", size=9), zbackup.Content(9, (digest,))),
        (describe("missing", size=MIB + 5), zbackup.Content(MIB + 5, (1,))),
        (describe("shorter", size=3), zbackup.Content(3, (digest,))),
        (describe("whole", size=5), zbackup.Content(5, (digest,))),
    ]
    make_snapshot(world.store, entries)
    done = world.run("restore", FOLDER, "--to", "restored", code=4)
    assert list_tree(world.path / "restored") == {"whole": "file"}
    assert all(f"{name}: " in done.stderr for name in ("longer", "missing", "shorter"))
    done = world.run("cat", FOLDER, "longer", code=4)
    assert "4 bytes too short" in done.stderr


MANY = random.Random(2).randbytes(2 * MIB)  # the content of each of 6 files
HOLE = zbackup.Content(zbackup.PUBLISH_BYTES, (zbackup.PUBLISH_BYTES // MIB,))  # so much that it is published at once


def interrupt_restore(world: World, number: int, event: str = "os.utime", count: int = 5) -> tuple[int, str]:
    """Restore 8 files, with a signal before something is done for the `count`th time.

    The first two are of a size that makes it sync: the first one has its name when the third is made.
    Returns exit code and standard error.
    """
    entries: list[tuple[zbackup.Stat, Any]] = [(describe("d0", "directory"), None)]
    entries += [(describe(f"d0/hole{i}", size=HOLE.size), HOLE) for i in range(2)]
    for folder in (1, 2):
        entries.append((describe(f"d{folder}", "directory"), None))
        entries += [(describe(f"d{folder}/f{i}"), MANY) for i in range(3)]
    make_snapshot(world.store, entries)
    with halted(world, event, count, "restore", FOLDER, "--to", "restored", "--jobs", "1") as process:
        assert list((world.path / "restored").rglob(zbackup.TEMPORARY + "*"))
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=60)
        return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_restore_killed_leaves_no_half_file(world: World, number: int) -> None:
    code, said = interrupt_restore(world, number)
    back = world.path / "restored"
    (whole,) = back.glob("d*/[fh]*")
    assert (whole.name, whole.stat().st_size, whole.stat().st_mtime_ns) == ("hole0", HOLE.size, NOON)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert (code, said) == (130, "zbackup: interrupted\n")
        assert list(back.rglob(zbackup.TEMPORARY + "*")) == []
    world.restore("--overwrite")
    assert [path.read_bytes() == MANY for path in back.glob("d*/f*")] == [True] * 6


def test_restore_interrupted_while_files_get_their_names(world: World) -> None:
    assert interrupt_restore(world, signal.SIGINT, "os.link", 4) == (130, "zbackup: interrupted\n")
    back = world.path / "restored"
    assert len(list(back.glob("d*/[fh]*"))) == 3
    assert list(back.rglob(zbackup.TEMPORARY + "*")) == []


def test_restore_again_removes_what_a_killed_run_left(world: World) -> None:
    interrupt_restore(world, signal.SIGKILL)
    assert list((world.path / "restored").rglob(zbackup.TEMPORARY + "*"))
    back = world.restore("--overwrite")
    assert list(back.rglob(zbackup.TEMPORARY + "*")) == []


@needs_root
def test_restore_disk_full(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), b"fits"), (describe("b"), random.Random(3).randbytes(3 * MIB))])
    small = world.path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = world.run("restore", FOLDER, "--to", "small/restored", code=1)
        assert done.stderr == "zbackup: small/restored: No space left on device\n"
        assert all(path.read_bytes() == b"fits" for path in (small / "restored").iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- grades ----


def test_restore_torn_snapshot_says_so(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), b"x")], grade="torn")
    done = world.run("restore", FOLDER, "--to", "restored", code=None)
    assert f"this snapshot is torn; see `list {FOLDER}`" in done.stderr
    assert (world.path / "restored/a").read_text() == "x"


def test_restore_partial_snapshot_says_what_lacks(world: World) -> None:
    lacks = zbackup.Content(error="Permission denied")
    make_snapshot(world.store, [(describe("a"), lacks), (describe("b"), b"x")], grade="partial")
    done = world.run("restore", FOLDER, "--to", "restored", code=1)
    assert "a: is not in this snapshot: Permission denied" in done.stderr
    assert "this snapshot is partial" in done.stderr
    assert list_tree(world.path / "restored") == {"b": "file"}


def test_restore_torn_snapshot_says_so_if_quiet(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), b"x")], grade="torn")
    assert "torn" in world.run("restore", FOLDER, "--to", "restored", "--quiet", code=None).stderr


def test_restore_prefers_whole_to_cut_off_snapshot(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), b"whole")])
    make_snapshot(world.store, [(describe("a"), b"cut")], grade="partial", at=NOON + 10**9, cut_off="lost")
    assert (world.restore() / "a").read_text() == "whole"


def test_restore_escapes_words_of_node(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), zbackup.Content(error="\x1b[2Jgone"))], grade="partial")
    assert "\x1b" not in world.run("restore", FOLDER, "--to", "restored", code=1).stderr


def test_restore_escapes_names(world: World) -> None:
    make_snapshot(world.store, [(describe("a\x1b[2J"), zbackup.Content(error="unread"))], grade="partial")
    done = world.run("restore", FOLDER, "--to", "restored", code=1)
    assert "\x1b" not in done.stderr and r"a\x1b[2J: " in done.stderr


# ---- --to ----


def test_restore_to_file(small: World) -> None:
    (small.path / "taken").write_text("mine")
    assert small.run("restore", FOLDER, "--to", "taken", code=1).stderr == "zbackup: taken: File exists\n"
    assert small.run("restore", FOLDER, "--to", "taken/below", code=1).stderr == (
        "zbackup: taken/below: Not a directory\n"
    )


@needs_root
def test_restore_to_without_permission(small: World, public: Path) -> None:
    shutil.copytree(small.store, public / "backups")
    for path in [public / "backups", *(public / "backups").rglob("*")]:
        os.chown(path, 65534, 65534)
    (public / "closed").mkdir(mode=0o755)
    done = run_as_nobody(["restore", FOLDER, "--to", "closed/below"], public, small.env)
    assert (done.returncode, done.stderr) == (1, "zbackup: closed/below: Permission denied\n")
    done = run_as_nobody(["restore", FOLDER, "--to", "closed"], public, small.env)
    assert done.returncode == 1
    assert "b: cannot be restored: Permission denied" in done.stderr and "Traceback" not in done.stderr


def test_restore_quiet(small: World) -> None:
    done = small.run("restore", FOLDER, "--to", "restored", "-q")
    assert (done.stdout, done.stderr) == ("", "")


def test_restore_says_what_it_did(small: World) -> None:
    done = small.run("restore", FOLDER, "--to", "restored")
    assert done.stdout == f"restored 3 files (19 B) of {FOLDER} as of 2023-11-14 22:13:20 to restored\n"


def test_restore_from_store_that_cannot_be_written(small: World, public: Path) -> None:
    """A store on read-only media has no index that can be opened for writing."""
    shutil.copytree(small.store, public / "backups")
    (public / "backups/index.sqlite").unlink()
    for path in [*(public / "backups").rglob("*"), public / "backups"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (public / "to").mkdir()
    (public / "to").chmod(0o777)
    done = run_as_nobody(["restore", FOLDER, "b", "--to", "to"], public, small.env)
    assert (public / "to/b").read_text() == "other", done.stderr


# ---- --at ----


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A store with three snapshots, in the middle of three days."""
    world = World(tmp_path_factory.mktemp("history"))
    for day in range(3):
        make_snapshot(world.store, [(describe("f"), b"day %d" % day)], at=NOON + day * 86400 * 10**9)
    return world


@pytest.mark.parametrize(
    ("when", "day"),
    [
        ("latest", 2),
        ("2023-11-14T22-13-20Z", 0),
        ("2023-11-15T22-13-20Z", 1),
        ("2023-11-14", 0),
        ("2023-11-15", 1),
        ("2030-01-01", 2),
        ("2023-11-15 22:13", 1),
        ("2023-11-15 22:12", 0),
        ("2023-11-15T22:13", 1),
        ("2023-11-15T22:13:19", 0),
        ("2023-11-15 22:13:20", 1),
        ("0s", 2),
        ("1h30m ago", 2),
        ("90", 2),
    ],
)
def test_at_chooses(history: World, when: str, day: int) -> None:
    assert history.run("cat", FOLDER, "f", "--at", when).stdout == f"day {day}"


@pytest.mark.parametrize(
    "when", ["yesterday", "2023-13-01", "3 moons", "-3d", "2023-11-14T22-13-20", "2023-11-15T25:00", "ago"]
)
def test_at_wrong_form(history: World, when: str) -> None:
    done = history.run("cat", FOLDER, "f", f"--at={when}", code=2)
    assert done.stdout == "" and "write latest, a snapshot's name, 2026-11-23" in done.stderr


def test_at_empty(history: World) -> None:
    history.run("cat", FOLDER, "f", "--at=", code=2)


@pytest.mark.parametrize("when", ["2000-01-01", "100000d", "2001-01-01T00-00-00Z"])
def test_at_before_all(history: World, when: str) -> None:
    done = history.run("cat", FOLDER, "f", "--at", when, code=2)
    assert f"{FOLDER} has no snapshot" in done.stderr and "the first one is 2023-11-14T22-13-20Z" in done.stderr


@pytest.mark.parametrize("when", ["9999-12-31", "9" * 400 + "d"])
def test_at_beyond_all_times(history: World, when: str) -> None:
    history.run("cat", FOLDER, "f", "--at", when, code=None)


def test_at_orders_by_sequence_not_by_clock(world: World) -> None:
    """I7: a clock that was set back makes no snapshot older than those before it."""
    make_snapshot(world.store, [(describe("f"), b"first")], at=NOON + 10**12)
    make_snapshot(world.store, [(describe("f"), b"second")], at=NOON)
    assert world.run("cat", FOLDER, "f").stdout == "second"


def test_damaged_snapshot_is_named_and_the_one_before_taken(world: World) -> None:
    make_snapshot(world.store, [(describe("f"), b"old")])
    bad = make_snapshot(world.store, [(describe("f"), b"new")], at=NOON + 10**9)
    (world.store / FOLDER / "snapshots" / f"{bad.name}.json").write_text("{")
    done = world.run("cat", FOLDER, "f", code=None)
    assert done.stdout == "old" and f"snapshot {FOLDER}/{bad.name} cannot be read" in done.stderr


def test_damaged_snapshot_shows_in_exit_code(world: World) -> None:
    make_snapshot(world.store, [(describe("f"), b"old")])
    bad = make_snapshot(world.store, [(describe("f"), b"new")], at=NOON + 10**9)
    (world.store / FOLDER / "snapshots" / f"{bad.name}.json").write_text("{")
    world.run("restore", FOLDER, "--to", "restored", code=4)


@pytest.mark.parametrize("text", ["{", None])
def test_restore_without_node_json(world: World, text: str | None) -> None:
    make_snapshot(world.store, [(describe("f"), b"x")])
    known = world.store / FOLDER / "node.json"
    known.unlink()
    if text:
        known.write_text(text)
    world.run("restore", FOLDER, "--to", "restored", code=None)
    assert (world.path / "restored/f").read_text() == "x"


# ---- cat ----


def run_cat(world: World, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(PROGRAM), "cat", *arguments]
    return subprocess.run(command, cwd=world.path, env=world.env, stderr=subprocess.PIPE, **options)


def test_cat_binary_exact(zoo: World) -> None:
    done = run_cat(zoo, FOLDER, "files/plain", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (zoo.files / "plain").read_bytes()
    assert run_cat(zoo, FOLDER, "files/empty", stdout=subprocess.PIPE).stdout == b""


def test_cat_non_utf8_name(zoo: World) -> None:
    done = run_cat(zoo, FOLDER, os.fsdecode(b"files/caf\xe9"), stdout=subprocess.PIPE)
    assert done.stdout == b"latin", done.stderr


def test_cat_closed_pipe(zoo: World) -> None:
    command = f"{sys.executable} {PROGRAM} cat {FOLDER} files/sparse | head -c 4"
    done = subprocess.run(["bash", "-c", command], cwd=zoo.path, env=zoo.env, capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"head", b"")


@pytest.mark.parametrize("command", [["cat", FOLDER, "files/plain"], ["list", FOLDER]])
def test_output_disk_full(zoo: World, command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        run = [sys.executable, str(PROGRAM), *command]
        done = subprocess.run(run, cwd=zoo.path, env=zoo.env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("path", ["files/nothing", "files/deep", "files", "files/fifo", "files/link", "", "/"])
def test_cat_no_file(zoo: World, path: str) -> None:
    done = zoo.run("cat", FOLDER, path, code=2)
    assert done.stdout == "" and "is not a file in the snapshot" in done.stderr


def test_cat_file_not_read(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), zbackup.Content(error="\x1bdenied"))], grade="partial")
    done = world.run("cat", FOLDER, "a", code=1)
    assert r"a is not in the snapshot" in done.stderr and r"\x1bdenied" in done.stderr


def test_cat_damaged_pack(world: World) -> None:
    _, pack = make_two_packs(world)
    damage(pack, MIB // 2)
    done = world.run("cat", FOLDER, "bad", code=4)
    assert done.stdout == "" and f"pack {pack.stem} is damaged" in done.stderr


def test_node_unknown(small: World) -> None:
    done = small.run("restore", "nobody", "--to", "restored", code=2)
    assert done.stderr == f"zbackup: the store has no node nobody; it has: {FOLDER}\n"
    assert not (small.path / "restored").exists()


def test_node_by_host_name(small: World) -> None:
    assert small.run("cat", "host", "b").stdout == "other"


def test_node_name_of_several(small: World) -> None:
    other = small.store / "127.0.0.10"
    shutil.copytree(small.store / FOLDER, other)
    rewrite(other / "node.json", addresses=["127.0.0.10"])
    done = small.run("cat", "host", "b", code=2)
    assert done.stderr == "zbackup: host is the name of several nodes: 127.0.0.10, 127.0.0.9\n"
    assert small.run("cat", "127.0.0.10", "b").stdout == "other"


# ---- larger contents ----


@pytest.mark.parametrize("pages", ["", "a", "ab", "abc", "abcdefgh"])
def test_stretches_of_changed_pages(pages: str) -> None:
    old = b"".join(page.encode() * zbackup.PAGE_HASH for page in pages)
    for mask in range(1 << (len(pages) + 1)):
        changed = [number for number in range(len(pages) + 1) if mask >> number & 1 or number == len(pages)]
        new = old + b"z" * zbackup.PAGE_HASH
        for number in changed:
            new = new[: number * 16] + b"!" * 16 + new[number * 16 + 16 :]
        found = list(zbackup.find_stretches(old, new))
        assert [number for first, end in found for number in range(first, end)] == changed
        assert all(end < first for (_, end), (first, _) in zip(found, found[1:]))
    assert list(zbackup.find_stretches(old, old)) == []


def test_restore_file_with_lists(world: World) -> None:
    """A file of more chunks than one list names: zeros, a chunk at either end, a gap between."""
    with contextlib.closing(zbackup.open_store(str(world.store), create=True)) as store:
        writer = zbackup.PackWriter(store.packs, store.index, zbackup.ZLIB, 1)
        table = zbackup.ListWriter(writer)
        table.put(writer.put_chunk(b"x" * MIB))
        table.put_zeros(2 * zbackup.LIST_SPAN)
        table.put(writer.put_chunk(b"end"))
        size = (2 * zbackup.LIST_SPAN + 1) * MIB + 3
        content = table.content(size, "stable")
        writer.seal()
    assert len(content.lists) == 3
    make_snapshot(world.store, [(describe("f", size=size, sparse=True), content)])
    found = world.restore() / "f"
    with open(found, "rb") as file:
        assert file.read(MIB + 1) == b"x" * MIB + b"\0"
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"\0end"
    assert found.stat().st_size == size and found.stat().st_blocks * 512 < 2 * MIB


def test_restore_chunks_of_zeros_take_no_space(world: World) -> None:
    content = zbackup.Content(3 * MIB + 5, (4,))
    make_snapshot(world.store, [(describe("f", size=content.size), content)])
    found = world.restore() / "f"
    assert found.read_bytes() == bytes(content.size)
    assert found.stat().st_blocks * 512 < MIB


def test_restore_more_files_than_are_synced_at_once(world: World) -> None:
    entries = [(describe(f"f{i:04}"), zbackup.NOTHING) for i in range(zbackup.PUBLISH_FILES + 3)]
    make_snapshot(world.store, entries)
    assert len(list(world.restore().iterdir())) == len(entries)


def test_restore_database_of_two_versions(world: World) -> None:
    connection = make_database(world.files / "bd", rows=20000)
    world.node()
    name = world.sweep("--no-latest")["nodes"][0]["snapshot"]["name"]
    first = (world.files / "bd").read_bytes()
    connection.execute("UPDATE t SET b = 'x' WHERE a % 1000 = 5")
    connection.commit()
    world.sweep("--no-latest")
    assert (world.restore("--at", name, to="one") / "files/bd").read_bytes() == first
    assert (world.restore(to="two") / "files/bd").read_bytes() == (world.files / "bd").read_bytes()


def test_restore_file_called_like_a_temporary_one(world: World) -> None:
    """A folder that was backed up with the leftover of a killed restore in it."""
    leftover = zbackup.TEMPORARY + zbackup.hashlib.sha256(b"x").hexdigest()[:16]
    make_snapshot(world.store, [(describe(leftover), b"leftover"), (describe("x"), b"right")])
    back = world.restore("--overwrite", code=None)
    assert (back / "x").read_text() == "right"


def test_restore_looks_chunks_up_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(world.store, [(describe(f"f{i:04}"), b"%d" % i) for i in range(600)])
    looks: list[int] = []
    real = zbackup.Index.find_all
    monkeypatch.setattr(zbackup.Index, "find_all", lambda index, digests: (looks.append(1), real(index, digests))[1])
    opened = contextlib.closing(zbackup.open_store(str(world.store)))
    with opened as store, contextlib.closing(store.reader()) as reader:
        options = zbackup.RestoreOptions()
        done = zbackup.restore_snapshot(reader, snapshot, [], str(world.path / "restored"), options)
    assert done.problems == [] and done.published.files == 600
    assert len(looks) < 20
    assert all((world.path / f"restored/f{i:04}").read_bytes() == b"%d" % i for i in range(600))


def restore_in_batches(world: World, monkeypatch: pytest.MonkeyPatch, sync: Any) -> zbackup.FileWriter:
    """Restore ten files, three synced together, with another sync_filesystem."""
    snapshot = make_snapshot(world.store, [(describe(f"f{i}"), b"%d" % i) for i in range(10)])
    monkeypatch.setattr(zbackup, "PUBLISH_FILES", 3)
    monkeypatch.setattr(zbackup, "sync_filesystem", sync)
    opened = contextlib.closing(zbackup.open_store(str(world.store)))
    with opened as store, contextlib.closing(store.reader()) as reader:
        options = zbackup.RestoreOptions()
        return zbackup.restore_snapshot(reader, snapshot, [], str(world.path / "restored"), options)


def test_restore_publishes_only_what_was_synced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    back = world.path / "restored"
    published: list[list[str]] = []
    beside: list[bool] = []

    def sync(fd: int) -> None:
        published.append(sorted(path.name for path in back.glob("f*")))
        beside.append(threading.current_thread() is not threading.main_thread())
        time.sleep(0.1)  # what is published too early would be there by now
        assert sorted(path.name for path in back.glob("f*")) == published[-1]

    done = restore_in_batches(world, monkeypatch, sync)
    names = [f"f{i}" for i in range(10)]
    assert (done.problems, done.published.files) == ([], 10)
    assert published == [[], names[:3], names[:6], names[:9], names]
    assert beside == [True, True, True, False, False]
    assert list_tree(back) == dict.fromkeys(names, "file")


@pytest.mark.parametrize("error", [OSError(zbackup.errno.EIO, "of the disk"), RuntimeError("of the disk")])
def test_restore_publishes_nothing_whose_sync_failed(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[int] = []

    def sync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:  # of the second three, beside the third
            raise error

    with pytest.raises(type(error), match="of the disk"):
        restore_in_batches(world, monkeypatch, sync)
    assert list_tree(world.path / "restored") == {"f0": "file", "f1": "file", "f2": "file"}
    assert len(calls) == 2


def test_restore_leaves_what_comes_into_a_folder_that_it_made(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    back = small.path / "restored"
    real = zbackup.sync_filesystem

    def sync(fd: int) -> None:
        if not (back / "a/file").exists():
            (back / "a/file").write_text("mine")
        real(fd)

    monkeypatch.setattr(zbackup, "sync_filesystem", sync)
    with contextlib.closing(zbackup.open_store(str(small.store))) as store:
        snapshot = store.node(FOLDER).list_snapshots()[-1]
        with contextlib.closing(store.reader()) as reader:
            done = zbackup.restore_snapshot(reader, snapshot, [], str(back), zbackup.RestoreOptions())
    assert [problem.path for problem in done.problems] == ["a/file"]
    assert (back / "a/file").read_text() == "mine"
    assert list_tree(back) == {"a": "folder", "a/file": "file", "a/link": "link", "b": "file"}


def test_restore_says_that_sockets_are_left_out(world: World) -> None:
    make_snapshot(world.store, [(describe("s", kind="socket"), None)])
    assert "1 sockets were left out" in world.run("restore", FOLDER, "--to", "restored").stdout
    assert not (world.path / "restored/s").exists()


def test_sweep_says_that_there_are_special_files(world: World) -> None:
    os.mkfifo(world.files / "fifo")
    (world.files / "link").symlink_to("fifo")
    world.node()
    assert "2 links and special files" in world.run(*world.server_flags()).stdout


@pytest.mark.parametrize("what", ["--x-", "x--x", "x-xx-xxy", "--", "-x-y", "y", "---y", "x"])
def test_restore_writes_a_sparse_file_between_its_pages_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    pages = {"-": bytes(zbackup.PAGE), "x": b"x" * zbackup.PAGE, "y": b"\0" * 70 + b"y"}
    data = b"".join(pages[page] for page in what)
    calls: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, part, at: (calls.append(at), real(fd, part, at))[1])
    with open(tmp_path / "file", "w+b") as out:
        zbackup._write_sparse(out.fileno(), data, zbackup.PAGE)
        os.ftruncate(out.fileno(), zbackup.PAGE + len(data))
        assert os.pread(out.fileno(), len(data) + 1, zbackup.PAGE) == data
        written = out.seek(0, os.SEEK_END) and os.fstat(out.fileno()).st_blocks * 512
    assert len(calls) == len([run for run in what.replace("y", "x").split("-") if run])
    assert written <= zbackup.PAGE * len(what.replace("-", ""))


# ---- several processes ----

PART = zbackup.PART_CHUNKS * MIB


def describe_crowd() -> list[tuple[zbackup.Stat, Any]]:
    """Return entries for more than one batch: small files, files of several parts, links, folders, holes."""
    noise = random.Random(5).randbytes(PART + MIB + 5)
    hole = (zbackup.PART_CHUNKS + 3, 1)
    entries: list[tuple[zbackup.Stat, Any]] = [(describe("a", "directory"), None)]
    entries += [(describe(f"a/f{i:03}", mtime=NOON + i), b"%d" % i) for i in range(300)]
    entries += [
        (describe("a/links", "directory", mode=0o555), None),
        (describe("a/links/one", links=2, device=1, inode=7), b"the same"),
        (describe("a/links/other", links=2, device=1, inode=7), b"the same"),
        (describe("a/links/to", "symlink", target=b"one"), None),
        (describe("large"), noise),
        (describe("large2", mode=0o4755), noise[::-1]),
        (describe("nothing"), b""),
        (describe("sparse", size=sum(hole) * MIB - 9, sparse=True), zbackup.Content(sum(hole) * MIB - 9, hole)),
        (describe("zeros"), bytes(PART) + noise[: MIB + 1]),
    ]
    return entries


def look_at(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a restore should bring back, of all paths below a folder."""
    return {str(found.relative_to(path)): picture(found) for found in path.rglob("*")}


def restore_crowd(world: World, snapshot: zbackup.Snapshot, jobs: int = 2) -> zbackup.FileWriter:
    """Restore it in this process and some that it forks."""
    workers = zbackup.Workers(jobs, zbackup.opened_maker, "--jobs")
    opened = contextlib.closing(zbackup.open_store(str(world.store)))
    with contextlib.closing(workers), opened as store, contextlib.closing(store.reader()) as reader:
        options = zbackup.RestoreOptions(workers=workers)
        return zbackup.restore_snapshot(reader, snapshot, [], str(world.path / "restored"), options)


def list_makers(monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    """Have each process that makes files write its number to a file; returns this file."""
    real = zbackup.FileMaker.do

    def do(maker: zbackup.FileMaker, steps: Any) -> Any:
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n" * bool(steps))
        return real(maker, steps)

    monkeypatch.setattr(zbackup.FileMaker, "do", do)
    return path


def count_children() -> int:
    return len(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


@pytest.mark.parametrize("jobs", [2, 3])
def test_restore_by_several_processes_is_the_same(world: World, jobs: int) -> None:
    make_snapshot(world.store, describe_crowd())
    one = look_at(world.restore("--jobs", "1", to="one"))
    assert len(one) == 310 and one["a/links/one"]["links"] == 2
    assert one["a"]["mtime"] == NOON and one["a/f017"]["mtime"] == NOON + 17  # a folder's time, after all in it
    assert look_at(world.restore("--jobs", str(jobs), to="some")) == one
    assert (world.path / "some/sparse").stat().st_blocks == 0


def test_restore_by_several_processes_has_them_do_the_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(world.store, describe_crowd())
    owners = list_makers(monkeypatch, world.path / "owners")
    done = restore_crowd(world, snapshot)
    assert (done.problems, done.published.files) == ([], 308)
    found = owners.read_text().split()
    assert len(set(found)) == 2 and str(os.getpid()) not in found
    assert count_children() == 0


@pytest.mark.parametrize("jobs, count", [(2, 90), (1, 310)])
def test_restore_of_few_files_is_made_by_one_process(
    world: World, monkeypatch: pytest.MonkeyPatch, jobs: int, count: int
) -> None:
    snapshot = make_snapshot(world.store, describe_crowd()[:count])
    real, makers = zbackup.FileMaker.do, []
    monkeypatch.setattr(zbackup.FileMaker, "do", lambda maker, steps: [makers.append(maker), real(maker, steps)][1])
    assert restore_crowd(world, snapshot, jobs).problems == []
    assert len(set(makers)) == 1


@pytest.mark.parametrize("allowed", [0, 1])
def test_restore_where_no_more_processes_may_be(world: World, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    snapshot = make_snapshot(world.store, describe_crowd())
    real, forks = os.fork, []

    def fork() -> int:
        forks.append(1)
        if len(forks) > allowed:
            raise OSError(zbackup.errno.EAGAIN, "no more")
        return real()

    monkeypatch.setattr(os, "fork", fork)
    done = restore_crowd(world, snapshot)
    assert (done.problems, done.published.files, len(forks)) == ([], 308, allowed + 1)
    assert count_children() == 0


def test_restore_by_several_processes_names_what_is_damaged(world: World) -> None:
    entries = describe_crowd()
    lost = bytes(32)
    size = PART + 2 * MIB
    known = zbackup.Content(size, (*[1] * zbackup.PART_CHUNKS, lost, 1))
    early = zbackup.Content(size, (lost, *[1] * (zbackup.PART_CHUNKS + 1)))
    short = zbackup.Content(size, (*[1] * zbackup.PART_CHUNKS, 1))
    listless = zbackup.Content(size, (), (lost,))
    entries[5] = entries[5][0], zbackup.Content(4, (lost,))
    for name, content in (("w1", known), ("w2", early), ("w3", short), ("w4", listless)):
        entries.append((describe(name, size=size), content))
    entries.append((describe("z"), b"after all of them"))
    make_snapshot(world.store, entries)
    said = [world.run("restore", FOLDER, "--to", f"back{jobs}", "--jobs", jobs, code=4).stderr for jobs in "12"]
    assert sorted(said[1].splitlines()) == sorted(said[0].splitlines())
    for name in ("a/f004", "w1", "w2", "w4"):
        assert f"zbackup: {name}: the store has no chunk {lost.hex()}" in said[1]
    assert f"zbackup: w3: the chunks of the file have {PART + MIB} bytes, not {size}" in said[1]
    back = world.path / "back2"
    assert look_at(back) == look_at(world.path / "back1")
    assert (back / "z").read_bytes() == b"after all of them" and not list(back.rglob(zbackup.TEMPORARY + "*"))


def test_restore_whose_helper_is_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(world.store, describe_crowd())
    monkeypatch.setattr(zbackup.FileMaker, "do", lambda maker, steps: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(zbackup.RestoreError, match="was killed, perhaps for want of memory; try it again with --jobs"):
        restore_crowd(world, snapshot)
    assert set(list_tree(world.path / "restored").values()) == {"folder"}
    assert count_children() == 0


def test_restore_whose_helper_has_a_fault(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(world.store, describe_crowd())
    monkeypatch.setattr(zbackup.FileMaker, "do", lambda maker, steps: steps[1 << 20])
    with pytest.raises(zbackup.RestoreError, match="has failed: IndexError: list index out of range"):
        restore_crowd(world, snapshot)
    assert count_children() == 0


def test_restore_interrupted_in_the_middle_of_a_job(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(world.store, describe_crowd())
    real, own, jobs = pickle.dump, os.getpid(), []

    def dump(message: Any, pipe: Any, protocol: int) -> None:
        if os.getpid() == own:
            jobs.append(message[0] is not None)
        if sum(jobs) < 3:
            return real(message, pipe, protocol)
        data = pickle.dumps(message, protocol)
        pipe.write(data[: len(data) // 2])
        pipe.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(pickle, "dump", dump)
    with pytest.raises(KeyboardInterrupt):
        restore_crowd(world, snapshot)
    assert sum(jobs) == 3 and count_children() == 0
    assert list((world.path / "restored").rglob(f"{zbackup.TEMPORARY}*")) == []


def test_restore_interrupted_when_a_job_is_given(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(world.store, describe_crowd())
    real, jobs = zbackup.Workers._put, []

    def put(workers: zbackup.Workers, pipe: Any, message: Any) -> None:
        real(workers, pipe, message)
        jobs.append(message[0] is not None)
        if sum(jobs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(zbackup.Workers, "_put", put)
    with pytest.raises(KeyboardInterrupt):
        restore_crowd(world, snapshot)
    time.sleep(0.2)
    assert sum(jobs) == 2 and count_children() == 0
    assert list((world.path / "restored").rglob(f"{zbackup.TEMPORARY}*")) == []


def test_restore_by_several_processes_to_a_relative_symlink(world: World) -> None:
    make_snapshot(world.store, describe_crowd())
    (world.path / "elsewhere").mkdir()
    (world.path / "link").symlink_to("elsewhere")
    world.run("restore", FOLDER, "--to", "link", "--jobs", "2")
    assert len(look_at(world.path / "elsewhere")) == 310


def test_workers_refuse_a_folder_that_was_replaced(tmp_path: Path) -> None:
    options = zbackup.RestoreOptions()
    place = zbackup.Workplace(str(tmp_path), str(tmp_path / "index"), str(tmp_path), (1, 1), options)
    with pytest.raises(zbackup.RestoreError, match="is another folder now"), zbackup.opened_maker(place):
        pass


def test_workers_that_are_ended_are_lent_to_nobody() -> None:
    workers = zbackup.Workers(2, zbackup.opened_maker, "--jobs")
    assert workers
    workers.close()
    assert not workers and not workers.begin("a place") and not workers.begin("a place")


def test_restore_killed_ends_its_processes_in_the_middle_of_a_job(world: World) -> None:
    make_snapshot(world.store, describe_crowd())
    code = (
        "import os, sys, time, zbackup\n"
        "def do(maker, steps):\n"
        "    os.write(1, b'at work\\n')\n"
        "    time.sleep(60)\n"
        "zbackup.FileMaker.do = do\n"
        "sys.exit(zbackup.main(sys.argv[1:]))\n"
    )
    arguments = ["restore", FOLDER, "--to", "restored", "--jobs", "2"]
    env = uncovered({**world.env, "PYTHONPATH": str(Path(zbackup.__file__).parent)})
    with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=world.path, env=env, stdout=-1) as process:
        assert process.stdout and process.stdout.readline() == b"at work\n"
        helpers = list_helpers(process.pid)
        process.kill()
        wait_until(lambda: not any(map(is_running, helpers)), timeout=10, what="the end of the helpers")
    assert len(helpers) == 2


def list_helpers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_restore_by_several_processes_ends_with_all_of_them(world: World, number: int) -> None:
    make_snapshot(world.store, describe_crowd())
    with halted(world, "os.link", 3, "restore", FOLDER, "--to", "restored", "--jobs", "2") as process:
        helpers = list_helpers(process.pid)
        assert len(helpers) == 2
        for pid in [*helpers, process.pid] if number == signal.SIGINT else [process.pid]:  # as a terminal does
            os.kill(pid, number)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=60)
        wait_until(lambda: not any(map(is_running, helpers)), what="the end of the helpers")
    back = world.path / "restored"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, said) == (130, "zbackup: interrupted\n")
        assert list(back.rglob(zbackup.TEMPORARY + "*")) == []
    whole = look_at(world.restore("--jobs", "2", to="whole"))
    there = {name: found for name, found in look_at(back).items() if "content" in found}
    named = {name: found for name, found in there.items() if zbackup.TEMPORARY not in name}
    assert named and named == {name: whole[name] for name in named}
    assert look_at(world.restore("--jobs", "2", "--overwrite")) == whole


@needs_root
@pytest.mark.parametrize("what", ["many", "large"])
def test_restore_by_several_processes_disk_full(world: World, what: str) -> None:
    noise = random.Random(6).randbytes(6 * MIB)
    files = {"large": [(describe("b"), noise * 4)], "many": [(describe(f"b{i:03}"), noise) for i in range(200)]}
    make_snapshot(world.store, [(describe("a"), b"fits"), *files[what]])
    small = world.path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(small)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = world.run("restore", FOLDER, "--to", "small/restored", "--jobs", "2", code=1)
        assert done.stderr == "zbackup: small/restored: No space left on device\n"
        left = [path for path in (small / "restored").iterdir() if path.name != "a"]
        assert all(path.read_bytes() == noise for path in left)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- what stands there already, or is made meanwhile ----

LEAVE = """
import sqlite3, os
c = sqlite3.connect("live/bd", isolation_level=None)
c.execute("PRAGMA journal_mode = {mode}")
c.execute("PRAGMA cache_size = 5")
c.execute("BEGIN")
c.execute("DELETE FROM t WHERE a >= 10")
if {commit}:
    c.execute("COMMIT")
os._exit(9)
"""


@pytest.mark.parametrize("flags", [["--overwrite"], []])
@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_database_beside_the_log_of_another_version(world: World, mode: str, flags: list[str]) -> None:
    """SQLite would play the log of a killed program into what was restored."""
    live = world.path / "live"
    live.mkdir()
    make_database(live / "bd", 5000).close()
    make_snapshot(world.store, [(describe("bd", database=True), (live / "bd").read_bytes())], grade="frozen")
    subprocess.run([sys.executable, "-c", LEAVE.format(mode=mode, commit=mode == "wal")], cwd=world.path)
    if not flags:
        (live / "bd").unlink()
    before = {path.name: path.read_bytes() for path in live.iterdir()}
    log = "bd-wal" if mode == "wal" else "bd-journal"
    assert before[log]
    done = world.run("restore", FOLDER, "--to", "live", *flags, code=1)
    assert f"bd: SQLite would mix {log} into it" in done.stderr
    assert {path.name: path.read_bytes() for path in live.iterdir()} == before
    (live / log).unlink()
    world.run("restore", FOLDER, "--to", "live", *flags)
    with contextlib.closing(sqlite3.connect(live / "bd")) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (5000,)


@pytest.mark.parametrize("log", [b"", bytes(512)])
def test_database_beside_a_log_that_is_done(world: World, log: bytes) -> None:
    (world.path / "live").mkdir()
    (world.path / "live/bd-journal").write_bytes(log)
    make_snapshot(world.store, [(describe("bd", database=True), b"content")])
    assert (world.restore("--overwrite", to="live") / "bd").read_bytes() == b"content"


def test_database_beside_a_log_that_cannot_be_read(world: World) -> None:
    (world.path / "live").mkdir()
    os.symlink("elsewhere", world.path / "live/bd-wal")
    make_snapshot(world.store, [(describe("bd", database=True), b"content")])
    world.restore("--overwrite", to="live", code=1)
    assert not (world.path / "live/bd").exists()


HOLD_FOLDER = """
import os, sys, zbackup
zbackup.lock_folder(os.open(sys.argv[1], os.O_RDONLY))
print("held", flush=True)
sys.stdin.readline()
"""


def test_two_restores_into_one_folder(world: World) -> None:
    """They would give their files the same temporary names."""
    make_snapshot(world.store, [(describe("a"), b"content")])
    (world.path / "to").mkdir()
    hold = [sys.executable, "-c", HOLD_FOLDER, str(world.path / "to")]
    with subprocess.Popen(hold, env=world.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        done = world.run("restore", FOLDER, "--to", "to", code=1)
        assert done.stderr == "zbackup: another restore is writing to to; wait for it, or name another --to\n"
        assert os.listdir(world.path / "to") == []
        other.kill()
    assert (world.restore(to="to") / "a").read_bytes() == b"content"


@pytest.mark.parametrize("where", [".", "d"])
def test_acl_of_the_folder_is_not_taken_over(world: World, where: str) -> None:
    """A file is not readable by more than it was, because of where it is put."""
    entries = [
        (describe("d", "directory"), None),
        (describe("d/fifo", "fifo", mode=0o640), None),
        (describe("d/secret", mode=0o640), b"secret"),
    ]
    make_snapshot(world.store, entries)
    (world.path / "to/d").mkdir(parents=True)
    try:
        os.setxattr(world.path / "to" / where, "system.posix_acl_default", make_acl(65534))
    except OSError:
        pytest.skip("no ACLs here")
    if where == ".":
        (world.path / "to/d").rmdir()
    restored = world.restore("--overwrite", to="to")
    for path in ("d", "d/fifo", "d/secret"):
        assert os.listxattr(restored / path) == [], path
    assert (restored / "d/secret").stat().st_mode & 0o777 == 0o640


def test_acl_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that more may read than before is not as it was."""
    path = tmp_path / "secret"
    path.touch()
    try:
        os.setxattr(path, "system.posix_acl_access", make_acl(65534))
    except OSError:
        pytest.skip("no ACLs here")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "removexattr", fail)
    attributes = zbackup.Attributes(zbackup.RestoreOptions())
    with open(path, "r+b") as file:
        attributes.set_file(
            file.fileno(), zbackup.decode_stat(zbackup.encode_stat(zbackup.Stat(b"secret", "file"))), zbackup.Content()
        )
    assert attributes.unset == {"extended attribute system.posix_acl_access": 1}


def test_symlink_in_place_of_a_fifo_is_not_followed(tmp_path: Path) -> None:
    """Put there by another user in the moment before the mode is set."""
    (tmp_path / "victim").write_text("data")
    (tmp_path / "victim").chmod(0o600)
    (tmp_path / "fifo").symlink_to("victim")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="replaced while it was restored"):
            zbackup.Attributes(zbackup.RestoreOptions()).set_other(
                folder, b"fifo", zbackup.Stat(b"fifo", "fifo", 0o666)
            )
    finally:
        os.close(folder)
    assert (tmp_path / "victim").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("xattrs", [{}, {"trusted.a": "eA=="}])
def test_fifo_where_there_is_no_proc(world: World, xattrs: dict[str, str]) -> None:
    """As in a rescue system, or a chroot: what only a path leads to cannot be set, and is not passed over."""
    stat = describe("fifo", "fifo", mode=0o640, xattrs=xattrs)
    make_snapshot(world.store, [(stat, None)])
    script = f"umount -l /proc && exec {sys.executable} -m zbackup restore {FOLDER} --to to"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=world.path, env=world.env, capture_output=True)
    if b"unshare" in done.stderr or b"umount" in done.stderr:
        pytest.skip(f"/proc cannot be taken away: {done.stderr.decode()}")
    assert done.returncode == (1 if xattrs else 0), done.stderr
    assert (b"extended attribute trusted.a of 1 paths could not be set" in done.stderr) == bool(xattrs)
    assert stat_bits.S_IMODE((world.path / "to/fifo").stat().st_mode) == 0o640


def test_folder_that_was_not_read_is_told(world: World) -> None:
    make_snapshot(world.store, [(describe("d", "directory", error="Permission denied"), None)], grade="partial")
    done = world.run("restore", FOLDER, "--to", "to", code=1)
    assert "d: what is in it is not in this snapshot: Permission denied" in done.stderr
    assert (world.path / "to/d").is_dir()


def test_snapshot_that_was_cut_off_is_not_all(world: World) -> None:
    make_snapshot(world.store, [(describe("a"), b"content")], grade="partial", cut_off="the node went away")
    assert (world.restore(code=1) / "a").read_bytes() == b"content"


LATE = """
import sys, zbackup
real, made = zbackup.publish, []

def publish(*arguments):
    if not made:
        made.append(open("restored/a", "w").write("of another program"))
    real(*arguments)

zbackup.publish = publish
sys.exit(zbackup.main(sys.argv[1:]))
"""
SEVERAL = {"links": 2, "device": 5, "inode": 77}  # of a file with two names
HOLES = zbackup.Content(zbackup.PUBLISH_BYTES, (zbackup.PUBLISH_BYTES // MIB,), (), "stable")


def make_far_names(store: Path, first: str, *before: tuple[zbackup.Stat, Any]) -> None:
    """Make a snapshot of a file with two names, the first of which is published before the second one's turn."""
    between = [(describe(f"h{i}", size=HOLES.size, sparse=True), HOLES) for i in range(4)]
    make_snapshot(
        store, [*before, (describe(first, **SEVERAL), b"mine"), *between, (describe("z", **SEVERAL), b"mine")]
    )


def test_name_of_a_file_that_another_program_made(world: World) -> None:
    make_far_names(world.store, "a")
    command = [sys.executable, "-c", LATE, "restore", FOLDER, "--jobs", "1", "--to", "restored"]
    done = subprocess.run(command, cwd=world.path, env=uncovered(world.env), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "zbackup: a: cannot be put at its place: File exists\n"
    assert (world.path / "restored/a").read_text() == "of another program"
    assert (world.path / "restored/z").read_text() == "mine"


@needs_root
def test_name_of_a_file_in_a_folder_that_was_closed(world: World, public: Path) -> None:
    make_far_names(public / "backups", "d/a", (describe("d", "directory", mode=0), None))
    for path in (public, *public.rglob("*")):
        os.chown(path, 65534, 65534)
    done = run_as_nobody(["restore", FOLDER, "--jobs", "1", "--to", "to"], public, world.env)
    assert done.returncode == 1 and "z:" not in done.stderr
    assert (public / "to/z").read_text() == "mine"
