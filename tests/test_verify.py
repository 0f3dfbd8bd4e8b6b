"""Verify: whatever is damaged in a store is found, and what suffers from it is named rightly."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import pty
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FOLDER, PROGRAM, World, held, make_database, uncovered, wait_until

import zbackup as z

Restored = dict[tuple[str, str, str], tuple[bytes, bytes]]  # of read_all
COMPLETE = os.environ.get("ZBACKUP_VERIFY") == "all"  # every byte, not a sample of them
WAYS = ("one bit", "all bits", "removed", "cut off")  # what happens to a byte


# ---- what the tests of verify, repair and drill share ----


def command(store: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process; returns exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = z.main([*arguments, "--store", str(store)])
    return code, out.getvalue(), err.getvalue()


def verify(store: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run verify in this process; returns its exit code and JSON report, with what it said under "said"."""
    code, out, err = command(store, "verify", "--json", *arguments)
    report: dict[str, Any] = json.loads(out) if out else {}
    return code, {**report, "said": err}


def find_packs(store: Path) -> list[Path]:
    """Return the packs of a store."""
    return sorted((store / "packs").rglob("*.pack"))


def has_patches(pack: Path) -> bool:
    """Tell whether a pack holds patches."""
    return any(kind == z.PATCHES for _, kind, _ in z.read_footer(str(pack)))


def break_byte(path: Path, at: int, way: str = "one bit", bit: int = 0) -> None:
    """Do something to one byte of a file."""
    data = bytearray(path.read_bytes())
    if way == "removed":
        del data[at]
    elif way == "cut off":
        del data[at:]
    else:
        data[at] ^= 1 << bit if way == "one bit" else 255
    path.write_bytes(data)


def break_content(pack: Path, number: int = 0) -> None:
    """Turn a bit in the middle of the stored data of a record of a pack."""
    with open(pack, "rb") as file:
        record = list(z.scan_records(file.fileno(), pack.stat().st_size))[number]
    break_byte(pack, record.data_offset + record.stored // 2)


def list_snapshots(store: z.Store) -> Iterator[tuple[z.Snapshot, str]]:
    """Yield all snapshots that can be read, those in the trash too, and how verify calls them."""
    for name in sorted(os.listdir(store.path)):
        node = store.node(name)
        if os.path.isdir(node.snapshots):
            for snapshot in node.list_snapshots():
                yield snapshot, snapshot.name
            for trashed in node.list_trash():
                yield trashed.snapshot, f"{trashed.snapshot.name} (in the trash)"


def read_all(path: Path) -> Restored:
    """Return what restores now: by node, snapshot and path, its block, and its entry's line and content."""
    found = {}
    with contextlib.closing(z.open_store(str(path))) as store, contextlib.closing(store.reader()) as reader:
        for snapshot, name in list_snapshots(store):
            for block in snapshot.blocks:
                for entry in z.list_entries(reader, [block], on_damage=lambda error: None):
                    with contextlib.suppress(z.StoreError, z.FormatError):
                        data = entry.line
                        for chunk in z.list_chunks(reader, entry.content):
                            data += reader.get(chunk) if isinstance(chunk, bytes) else b"%d chunks of zeros" % chunk
                        found[snapshot.folder, name, z.encode_path(entry.stat.path)] = (block, data)
    return found


def save_tree(path: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a store, links aside."""
    files = (p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def load_tree(path: Path, tree: dict[str, bytes]) -> None:
    """Make the files of a store what they were."""
    for file, data in save_tree(path).items():
        if file not in tree:
            (path / file).unlink()
        elif data != tree[file]:
            (path / file).write_bytes(tree[file])
    for file in tree.keys() - save_tree(path).keys():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(tree[file])


def find_lost(before: Restored, path: Path) -> set[tuple[str, str, str]]:
    """Return what restored before, and does not now; what restores must be what it was."""
    now = read_all(path)
    assert all(now[key] == before[key] for key in now.keys() & before.keys())
    return before.keys() - now.keys()


def list_harmed(report: dict[str, Any], before: Restored, path: Path) -> set[tuple[str, str, str]]:
    """Return node, snapshot and path of all that verify calls harmed; "" stands for all of a lost block."""
    found = set()
    with contextlib.closing(z.open_store(str(path))) as store, contextlib.closing(store.reader()) as reader:
        for row in report["harmed"]:
            for snapshot in row["snapshots"]:
                paths = {row["path"]}
                if not row["path"]:
                    there = {key[2]: block for key, (block, _) in before.items() if key[:2] == (row["node"], snapshot)}
                    bad = {block for block in there.values() if not reader.has(block)}
                    assert bad, f"a block of {snapshot} is said to be lost, and none is"
                    paths = {path for path, block in there.items() if block in bad}
                found |= {(row["node"], snapshot, path) for path in paths}
    return found


def make_small_store(world: World) -> None:
    """Make a store of a few kilobytes that has every kind of file: by real sweeps of a real node."""
    files = world.files
    (files / "text").write_text("to be, or not to be, that is the question\n" * 4)
    (files / "folder").mkdir()
    (files / "folder/inner").write_bytes(os.urandom(50))
    (files / "folder/same").write_bytes((files / "text").read_bytes())
    (files / "link").symlink_to("folder/inner")
    (files / "zeros").write_bytes(bytes(100))
    (files / "empty").touch()
    connection = sqlite3.connect(files / "base.db", isolation_level=None)
    connection.execute("PRAGMA page_size = 1024")
    connection.execute("CREATE TABLE t (a)")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.execute("CREATE TABLE filler AS SELECT zeroblob(6000)")  # of its pages of 4 KiB one changes
    node = world.node()
    world.sweep("--reserve", "64")
    connection.execute("INSERT INTO t VALUES ('second')")
    world.sweep("--reserve", "64")
    connection.execute("INSERT INTO t VALUES ('third')")
    connection.close()
    (files / "text").write_text("whether 'tis nobler\n" * 5)
    world.sweep("--reserve", "64")
    world.run("prune", "--keep", "last 2", "--reserve", "64")
    world.run("drill")
    world.run("verify")
    with contextlib.closing(z.open_store(str(world.store))) as store:
        folder = store.node(FOLDER)
        (last,) = list(folder.newest())[:1]
        folder.save_progress(z.Progress(last.blocks))
    node.stop()


@functools.cache
def make_small_world() -> World:
    """Make the small store once; all tests of a process begin with copies of its folder."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    world = World(folder)
    try:
        make_small_store(world)
    finally:
        world.close()
    return world


def copy_small_world(world: World) -> World:
    """Give a world the files and the store of the small one."""
    small = make_small_world()
    for name in ("files", "state", "backups"):
        shutil.copytree(small.path / name, world.path / name, symlinks=True, dirs_exist_ok=True)
    world.port = small.port  # where the store knows the node
    return world


@pytest.fixture
def small(world: World) -> World:
    return copy_small_world(world)


# ---- every byte of a store ----


class Trial:
    """A store in memory that is damaged, looked at and made whole again, many thousand times."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.tree = save_tree(store)
        self.before = read_all(store)
        self.args = z.make_parser().parse_args(["verify", "--json", "--store", str(store)])
        self.count = 0
        self.misses: list[str] = []

    def list_files(self, kind: str) -> list[str]:
        """Return the files of one kind that have bytes."""

        def name_kind(file: str) -> str:
            if file.startswith(("packs/", "index.", "keys/")):
                return file[:5].rstrip("/")
            return "latest" if "/latest/" in file else "others"

        return sorted(file for file, data in self.tree.items() if data and name_kind(file) == kind)

    def verify(self) -> tuple[int, dict[str, Any]]:
        """Do what the command does, but for reading its flags, which takes longest."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: int = self.args.run(self.args)
            except z.BackupError as error:
                return error.exit_code, {"said": str(error)}
        return code, {**json.loads(out.getvalue()), "said": err.getvalue()}

    def mend(self, *files: str) -> None:
        """Make the store what it was; these files, what verify remembers and the index have changed."""
        for end in ("-wal", "-shm"):
            (self.store / f"index.sqlite{end}").unlink(missing_ok=True)
        for name in {*files, "verified.json", "index.sqlite"}:
            (self.store / name).write_bytes(self.tree[name])
        for note in (self.store / "damage").glob("*"):
            note.unlink()

    def check(self, file: str, at: int, way: str, bit: int) -> str:
        """Damage one byte and verify; returns what is wrong with what it says."""
        break_byte(self.store / file, at, way, bit)
        if (self.store / file).read_bytes() == self.tree[file]:
            return ""
        code, report = self.verify()
        if file == "zbackup.json":
            return "" if code == 4 and "zbackup.json" in report["said"] else f"{code} {report}"
        lost = find_lost(self.before, self.store)
        if file == "index.sqlite":
            return f"lost {lost}" if lost else "" if code in (0, 4) else f"{code} {report}"
        harmed = list_harmed(report, self.before, self.store)
        if file.startswith("packs/"):
            named = Path(file).stem in report["damaged"]
        else:  # a snapshot that cannot be read is named by its file; what it names is lost with it
            named = str(self.store / file) in report["files"] and list(report["files"]) == [str(self.store / file)]
            name = re.sub("~.*", " (in the trash)", Path(file).stem)
            lost = {key for key in lost if key[1] != name}
        if code != 4 or not named or harmed != lost:
            return f"{code}, named {named}, harmed and is not {harmed - lost}, is and is not called so {lost - harmed}"
        return ""

    def try_all(self, files: list[str], ways: tuple[str, ...], most: int) -> None:
        """Damage the bytes of files one after the other; no more than `most`, chosen by chance."""
        seed = int(os.environ.get("ZBACKUP_SEED", time.time_ns() % 10**6))
        chance = random.Random(seed)
        instants = [(file, at, way) for file in files for at in range(len(self.tree[file])) for way in ways]
        if not COMPLETE and most < len(instants):  # of each file the same share, and its first byte
            instants = chance.sample(instants, most) + [(file, 0, way) for file in files for way in ways]
        for file, at, way in instants:
            try:
                what = self.check(file, at, way, chance.randrange(8))
                self.count += 1
                if what:
                    self.misses.append(f"{file}, byte {at}, {way}: {what}")
            finally:
                self.mend(file)
            if self.count % 500 == 1:  # nothing else has changed
                now = save_tree(self.store)
                assert {name: data for name, data in now.items() if not name.startswith("damage/")} == self.tree
        print(f"seed {seed}: {self.count} instants, {len(self.misses)} misses")
        assert not self.misses, "\n".join(self.misses[:20])
        assert self.count > 0


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """One small store for all; in memory where that can be, since each look at it writes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as memory:
        shutil.copytree(make_small_world().store, Path(memory, "backups"), symlinks=True)
        yield Trial(Path(memory, "backups"))


def test_small_store_has_all_that_a_store_may_have(trial: Trial) -> None:
    """Else the tests that follow prove less than they say."""
    files = " ".join(trial.tree)
    for name in ("README.txt", "reserve", "verified.json", "drill.json", "progress.json", "latest.json", "/trash/"):
        assert name in files
    assert len(find_packs(trial.store)) == 3
    assert any(map(has_patches, find_packs(trial.store)))
    assert len({key[1] for key in trial.before}) == 3
    assert trial.verify()[0] == 0


@pytest.mark.parametrize("kind, most", [("packs", 250), ("others", 200), ("latest", 60), ("index", 120)])
def test_every_damaged_byte_is_found(trial: Trial, kind: str, most: int) -> None:
    """One bit turned, all bits turned, removed, cut off there: found, and what it harms is named, no more and no less.

    ZBACKUP_VERIFY=all tries every byte, as has been done; else as many as there is time for.
    """
    trial.misses, trial.count = [], 0
    files = [file for file in trial.list_files(kind) if file not in ("verified.json", "reserve")]
    trial.try_all(files, WAYS, most)


def test_every_damaged_byte_of_the_key_is_found(trial: Trial) -> None:
    trial.misses, trial.count = [], 0
    trial.try_all(["keys/server"], WAYS, 20)


def test_every_damaged_byte_of_the_reserve_is_found(trial: Trial) -> None:
    """It holds nothing but zeros."""
    trial.misses, trial.count = [], 0
    trial.try_all(["reserve"], WAYS[:2], 20)


def test_every_damaged_byte_of_verified_json_is_found(trial: Trial) -> None:
    trial.misses, trial.count = [], 0
    trial.try_all(["verified.json"], WAYS, 20)


def test_shortened_reserve_is_made_whole_by_the_next_sweep(small: World) -> None:
    """Verify cannot know how long it should be; whoever asks for it does."""
    break_byte(small.store / "reserve", 20, "cut off")
    small.run("verify")
    small.node()
    small.sweep("--reserve", "64")
    assert (small.store / "reserve").read_bytes() == bytes(64)


# ---- a larger store, damaged by chance ----


def make_larger_store(world: World) -> None:
    """Make a store of several packs, with patches, a file whose chunks stand in lists, and three snapshots."""
    chance = random.Random(7)
    for number in range(30):
        size = chance.randrange(1, 60_000)
        data = chance.randbytes(size) if number % 2 else f"line {number}\n".encode() * (size // 7)
        (world.files / f"file {number}").write_bytes(data)
    (world.files / "big").write_bytes(chance.randbytes(2 << 20))
    with open(world.files / "sparse", "wb") as file:
        file.truncate((z.LIST_SPAN + 70) << 20)
        file.write(b"a start, and zeros for more chunks than an entry names")
    make_database(world.files / "base.db", 500).close()
    node = world.node("--margin", "0")
    flags = ("--no-latest", "--reserve", "4KiB", "--pack-size", "256KiB")
    world.sweep(*flags)
    for turn in range(2):
        with open(world.files / "big", "r+b") as big:
            for place in range(3):
                big.seek(500_000 * place + 5000 * turn)
                big.write(b"changed")
        (world.files / f"file {turn}").write_bytes(chance.randbytes(10_000))
        with contextlib.closing(sqlite3.connect(world.files / "base.db")) as connection:
            connection.execute("INSERT INTO t (b) VALUES ('more')")
            connection.commit()
        world.sweep(*flags)
    world.run("verify")
    world.run("drill")
    node.stop()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    world = World(tmp_path_factory.mktemp("larger"))
    try:
        make_larger_store(world)
    finally:
        world.close()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as memory:
        shutil.copytree(world.store, Path(memory, "backups"), symlinks=True)
        yield Trial(Path(memory, "backups"))


@pytest.mark.parametrize("ways", [WAYS[:2], WAYS[2:3], WAYS[3:]], ids=" or ".join)
def test_damage_by_chance_is_found_and_its_harm_named(larger: Trial, ways: tuple[str, ...]) -> None:
    """Several packs, patches, lists: what verify calls harmed is what does not restore."""
    assert any(map(has_patches, find_packs(larger.store)))
    assert len(find_packs(larger.store)) > 5
    seed = int(os.environ.get("ZBACKUP_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    chance = random.Random(seed)
    packs = larger.list_files("packs")
    others = [file for file in larger.list_files("others") if file not in ("reserve", "verified.json")]
    for turn in range(500 if COMPLETE else 30):
        file = chance.choice(packs if turn % 8 != 7 else others)
        at = chance.randrange(1, len(larger.tree[file])) if turn >= len(packs) else 1
        way = chance.choice(ways)
        try:
            what = larger.check(file, at, way, chance.randrange(8))
            larger.count += 1
            assert not what, f"{file}, byte {at}, {way}: {what}"
        finally:
            larger.mend(file)


def test_bad_packs_do_not_stop_the_reading_of_good_ones(larger: Trial) -> None:
    """Every second pack is damaged, each in another way; all are read, and what is whole restores."""
    packs = find_packs(larger.store)
    bad = packs[::2]
    try:
        for number, pack in enumerate(bad):
            if number == 0:
                pack.write_bytes(b"no pack at all")
            elif number == 1:
                pack.unlink()
                pack.mkdir()  # opens, and cannot be read
            else:
                break_byte(pack, pack.stat().st_size // 2, WAYS[number % 4])
        code, report = larger.verify()
        assert code == 4
        assert report["checked"] == len(packs)
        assert set(report["damaged"]) >= {pack.stem for pack in bad}
        assert list_harmed(report, larger.before, larger.store) == find_lost(larger.before, larger.store) != set()
    finally:
        bad[1].rmdir()
        larger.mend(*(str(pack.relative_to(larger.store)) for pack in bad))


# ---- what verify reads, and when ----


def load_verified(store: Path) -> dict[str, int]:
    """Return when each pack was read last."""
    times: dict[str, int] = json.loads((store / "verified.json").read_text())["times"]
    return times


def test_sample_reads_what_was_not_read_for_longest(larger: Trial) -> None:
    """Samples of a third, one after the other, come round all packs before any is read again."""
    store, packs = larger.store, {pack.stem: pack.stat().st_size for pack in find_packs(larger.store)}
    (store / "verified.json").unlink()
    total, turns = sum(packs.values()), 0
    read: list[str] = []
    while not packs.keys() <= set(read):
        before = dict.fromkeys(packs, 0)
        if read:
            before.update(load_verified(store))
        code, report = verify(store, "--sample", "33%")
        now = {name for name, moment in load_verified(store).items() if moment != before[name]}
        assert code == 0
        assert report["checked"] == len(now)
        assert report["size"] == sum(packs[name] for name in now)
        assert total * 0.33 <= report["size"] < total * 0.33 + max(packs.values())
        assert max(before[name] for name in now) <= min((before[n] for n in packs.keys() - now), default=0)
        read += now
        turns += 1
    assert 2 <= turns <= 4  # 2 where a large pack comes last in the first of them
    assert verify(store, "--sample", "100%")[1]["checked"] == len(packs)
    larger.mend()


def test_sample_finds_damage_once_its_turn_comes_and_remembers_it(larger: Trial) -> None:
    """A pack found bad is told of by each later run too, also where that does not read it."""
    (pack, *_) = find_packs(larger.store)
    try:
        break_byte(pack, 2000, "all bits")
        codes = []
        while 4 not in codes:
            code, report = verify(larger.store, "--sample", "10%")
            codes.append(code)
            assert len(codes) < 15
        assert codes[:-1] == [0] * (len(codes) - 1)
        assert list(report["damaged"]) == [pack.stem]
        code, report = verify(larger.store, "--sample", "1%")
        assert (code, list(report["damaged"])) == (4, [pack.stem])
        assert report["damaged"][pack.stem] == "found earlier"
        code, _, err = command(larger.store, "list")
        assert code == 4
        assert f"pack {pack.stem} is damaged" in err
    finally:
        larger.mend(str(pack.relative_to(larger.store)))


def test_max_time_ends_the_reading_and_the_next_run_goes_on(larger: Trial) -> None:
    """No time at all: one pack is read all the same, each time another one."""
    (larger.store / "verified.json").unlink()
    for turn in (1, 2, 3):
        code, report = verify(larger.store, "--max-time", "0s")
        assert (code, report["checked"]) == (0, 1)
        assert len(load_verified(larger.store)) == turn
    assert verify(larger.store, "--max-time", "1h")[1]["checked"] == report["packs"]
    larger.mend()


def test_verified_json_forgets_packs_that_are_gone(larger: Trial) -> None:
    (larger.store / "verified.json").write_bytes(z.encode_file({"times": {"0" * 64: 5}}))
    assert verify(larger.store)[0] == 0
    assert load_verified(larger.store).keys() == {pack.stem for pack in find_packs(larger.store)}
    larger.mend()


@pytest.mark.parametrize(
    "flag, value", [("--sample", "0"), ("--sample", "101%"), ("--sample", "x"), ("--max-time", "x")]
)
def test_wrong_flags_of_verify(world: World, flag: str, value: str) -> None:
    assert flag in world.run("verify", flag, value, code=2).stderr


def test_report_in_text_and_json(small: World) -> None:
    """All is well: one line of JSON with these members, or text that says so; --quiet says nothing."""
    done = small.run("verify", "--json")
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    sizes = sum(pack.stat().st_size for pack in find_packs(small.store))
    assert report == {
        **{"packs": 3, "checked": 3, "size": sizes, "index": "", "damaged": {}, "lost": [], "files": {}},
        **{"problems": [], "harmed": [], "marked": True},
    }
    assert small.run("verify").stdout.splitlines()[-1] == "verify: all is well"
    assert small.run("verify", "--quiet").stdout == ""
    (pack,) = (pack for pack in find_packs(small.store) if not has_patches(pack))
    break_content(pack)
    done = small.run("verify", "--quiet", code=4)
    assert done.stdout == ""
    assert f"pack {pack.stem}: its bytes are not those that it was named after" in done.stderr
    assert re.search(r"^lost: 127\.0\.0\.9: .+, in 2\d+-", done.stderr, re.MULTILINE)
    (harmed, *_) = json.loads(small.run("verify", "--json", code=4).stdout)["harmed"]
    assert harmed.keys() == {"node", "path", "snapshots"}


def test_exit_codes_of_verify(small: World) -> None:
    """0 all is well, 4 damage, 1 once repair has told what is lost."""
    small.run("verify", code=0)
    find_packs(small.store)[0].unlink()
    small.run("verify", code=4)
    small.run("verify", code=4)
    small.run("repair", code=0)
    done = small.run("verify", code=1)
    assert "verify: no damage but what `repair` has told of" in done.stdout
    assert "lost: 127.0.0.9: " in done.stdout
    assert json.loads(small.run("verify", "--json", code=1).stdout)["marked"] is True
    find_packs(small.store)[0].unlink()
    small.run("verify", code=4)
    shutil.rmtree(small.store)
    assert "not a zbackup store" in small.run("verify", code=4).stderr


def test_verify_shows_on_a_terminal_how_far_it_is(small: World) -> None:
    """Bytes read of bytes to be read; the line is cleared before the result."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "verify"], cwd=small.path, env=small.env, stdout=slave, stderr=slave
    ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(master, 4096):
                shown += data
        assert process.wait(20) == 0
    os.close(master)
    assert re.search(rb"\r\x1b\[K[\d.]+ \w+ of [\d.]+ \w+ read", shown)
    assert re.search(rb"read\r\x1b\[Kverify: 3 of 3 packs read", shown)


def test_verify_waits_for_who_deletes(small: World) -> None:
    with held(small.store / "lock", "exclusive"):
        done = small.run("verify", "--lock-wait", "0s", code=4)
    assert "locked by another run that deletes" in done.stderr


def test_verify_runs_beside_a_sweep(world: World) -> None:
    """Packs, snapshots and `latest` come and change while it reads: nothing of that is damage."""
    for number in range(40):
        (world.files / f"file {number}").write_bytes(os.urandom(100_000))
    world.node("--margin", "0")
    world.sweep("--pack-size", "200KiB")
    codes = []
    for turn in range(3):
        for number in range(40):
            (world.files / f"file {number}").write_bytes(os.urandom(100_000))
        server = world.server("--pack-size", "200KiB", "--window", "200KiB")
        while server.process.poll() is None:
            done = world.run("verify", "--json", code=None)
            codes.append((done.returncode, json.loads(done.stdout)["index"], done.stderr))
        assert server.process.returncode == 0, server.output
        assert turn < 3
    assert len(codes) > 3
    assert set(codes) == {(0, "", "")}
    assert json.loads(world.run("verify", "--json").stdout)["index"] == ""
    wait_until(lambda: len(world.listed(FOLDER)) == 4, what="the snapshots")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[z.Store, z.Harm]]:
    """Open a store, with what is found harmed in it."""
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(z.open_store(str(path))))
        reader = stack.enter_context(contextlib.closing(store.reader()))
        yield store, stack.enter_context(contextlib.closing(z.Harm(store, reader)))


def seal_beside(store: z.Store) -> z.Snapshot:
    """Seal a pack that the index does not know yet, with a patch of a chunk of its own; returns what will name it."""
    folder = store.node(FOLDER)
    last = next(folder.newest())
    with contextlib.closing(z.Index(":memory:")) as index:
        writer = z.PackWriter(store.packs, index, z.ZLIB, 1)
        data = os.urandom(3 * z.PAGE)
        source, digest = writer.put_chunk(data), z.digest_pages(z.hash_pages(data[z.PAGE :]))
        writer.put_patch(digest, [z.Run(source, z.PAGE, 2 * z.PAGE)])
        blocks = z.BlockWriter(writer)
        content = z.Content(2 * z.PAGE, (digest,), (), "stable")
        blocks.put(z.Entry(z.encode_stat(z.Stat(b"new", "file", size=content.size)), z.encode_content(content)))
        new = z.replace(last, blocks=blocks.close(), name="2040-01-01T00-00-00Z", sequence=99, grade="stable")
        writer.seal()
    return new


def test_pack_sealed_in_the_moment_in_which_packs_are_read(small: World) -> None:
    """It stands in its place, and the run beside us has not put it into the index yet: no damage."""
    with opened(small.store) as (store, harm):
        seal_beside(store)
        assert z.verify_packs(store, harm, z.VerifyOptions())[0] == []


def test_snapshot_saved_after_the_packs_were_read(small: World) -> None:
    """Its pack went into an index that this run has put aside: it is found all the same, and nothing is lost."""
    with opened(small.store) as (store, harm):
        new: list[z.Snapshot] = []

        def tick(done: int, total: int) -> None:
            if done == total:
                new.append(seal_beside(store))
                store.node(FOLDER).save_snapshot(new[0])

        report = z.verify_store(store, harm, z.VerifyOptions(tick=tick))
        assert len(new) == 1 and report.sound and list(harm.list_files()) == []


# ---- what cannot be read here, or may not be written ----


def test_pack_of_a_codec_that_this_python_lacks_is_not_damaged(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be read here: that is said, nothing is noted, and where zstd is, all is well."""
    if not z.load_zstd():
        pytest.skip("this Python has no zstd, so that the store has none either")
    with monkeypatch.context() as patch:
        patch.setattr(z, "load_zstd", lambda: None)
        code, _, err = command(small.store, "verify")
        assert "which this Python lacks: install backports.zstd" in err
        assert "damaged" not in err
        assert code == 4
    assert not list(small.store.glob("damage/*"))
    assert verify(small.store)[0] == 0


@pytest.mark.parametrize("call", ["_read_pack", "read_pack_index"])
def test_sound_pack_while_there_are_no_descriptors(small: World, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The moment says nothing of the pack: noted as damaged, it would be until `repair`."""

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(z, call, fail)
    with contextlib.closing(z.open_store(str(small.store))) as store:
        name, path = next(iter(z.list_packs(store.packs).items()))
        with pytest.raises(OSError, match="Too many open files"):
            if call == "_read_pack":
                z.verify_pack(store.reader(), name, path)
            else:
                store.index.remove_pack(name)
                store.load_index()
        monkeypatch.undo()
        assert store.list_damage(store.load_index()) == {}


def test_damaged_pack_beside_one_that_cannot_be_read_here(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this Python cannot decompress must not stop the reading of what it can."""
    if not z.load_zstd():
        pytest.skip("this Python has no zstd, so that the store has none either")
    with contextlib.closing(z.open_store(str(small.store))) as store:
        for number in range(8):  # more than the others, so that some come before and after them
            writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
            writer.put_chunk(b"zlib %d" % number * 100)
            writer.seal()
            (name,) = writer.sealed
            break_byte(Path(store.packs, name[:2], f"{name}.pack"), 150)
    monkeypatch.setattr(z, "load_zstd", lambda: None)
    code, out, err = command(small.store, "verify")
    assert code == 4
    assert len(re.findall(r"^pack \w+: ", err, re.MULTILINE)) == 8


def test_verify_of_a_store_that_may_not_be_written(small: World) -> None:
    """Nothing can be remembered, all can be read: damage is found, and nothing is changed."""
    if os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("root needs unshare to have a store that it may not write")
    (small.store / "verified.json").unlink()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = 'mount --bind -o ro backups backups && exec "$@"' if os.geteuid() == 0 else 'exec "$@"'
        how = ["unshare", "-m", "sh", "-c", script, "sh"] if os.geteuid() == 0 else []
        return subprocess.run(
            [*how, sys.executable, str(PROGRAM), *arguments],
            cwd=small.path,
            env=small.env,
            capture_output=True,
            text=True,
        )

    if os.geteuid():
        for folder in (small.store, small.store / "packs", small.store / FOLDER):
            folder.chmod(0o500)
    try:
        done = run("verify")
        assert (done.returncode, done.stderr) == (0, "")
        tree = save_tree(small.store)
        done = run("repair")
        assert done.returncode == 4, done
        assert "Traceback" not in done.stderr
        assert save_tree(small.store) == tree
        break_byte(find_packs(small.store)[0], 100)
        tree = save_tree(small.store)
        done = run("verify")
        assert done.returncode == 4
        assert "lost: 127.0.0.9" in done.stderr
        assert save_tree(small.store) == tree
    finally:
        if os.geteuid():
            for folder in (small.store, small.store / "packs", small.store / FOLDER):
                folder.chmod(0o700)


# ---- what is gone, not changed ----


def test_lost_pack_is_found_and_its_harm_named(larger: Trial) -> None:
    """Each pack in turn is gone: named, with what does not restore."""
    for pack in find_packs(larger.store)[:6]:
        pack.unlink()
        try:
            for index in (True, False):
                if not index:
                    (larger.store / "index.sqlite").unlink()
                code, report = larger.verify()
                assert (code, report["lost"]) == (4, [pack.stem])
                assert list_harmed(report, larger.before, larger.store) == find_lost(larger.before, larger.store)
        finally:
            larger.mend(str(pack.relative_to(larger.store)))


def test_empty_pack_is_found(small: World) -> None:
    """Whichever of them was read last."""
    tree = save_tree(small.store)
    for pack in find_packs(small.store):
        pack.write_bytes(b"")
        code, report = verify(small.store)
        assert (code, list(report["damaged"])) == (4, [pack.stem])
        load_tree(small.store, tree)


def test_pack_whose_patches_draw_from_a_lost_one_is_not_damaged(small: World) -> None:
    """Its bytes are those that it is named after: what it names may be put back."""
    (pack,) = (pack for pack in find_packs(small.store) if not has_patches(pack))
    pack.rename(small.path / "elsewhere")
    code, report = verify(small.store)
    assert (code, report["lost"]) == (4, [pack.stem])
    assert report["damaged"] == {}


def test_pack_without_an_index_at_its_end_is_told_of_by_each_sample(small: World) -> None:
    """The store could not even open it: every other command says so."""
    tree = save_tree(small.store)
    for pack in find_packs(small.store):
        break_byte(pack, pack.stat().st_size - 1)
        (small.store / "index.sqlite").unlink()
        code, report = verify(small.store, "--sample", "1%")
        assert code == 4
        assert pack.stem in str(report["damaged"]) + str(report["problems"])
        load_tree(small.store, tree)


def test_file_that_is_gone_from_latest_is_found(small: World) -> None:
    latest = small.store / FOLDER / "latest/files"
    (latest / "folder/inner").unlink()
    (latest / "link").unlink()
    (latest / "link").symlink_to("elsewhere")
    code, report = verify(small.store)
    assert code == 4
    assert set(report["files"]) == {str(latest / "folder/inner"), str(latest / "link")}


def test_latest_that_is_gone_is_no_damage(small: World) -> None:
    """Who wants its room may remove it by hand; nothing is lost."""
    shutil.rmtree(small.store / FOLDER / "latest")
    code, report = verify(small.store)
    assert (code, report["files"]) == (0, {})


def test_node_json_that_is_gone_is_found(small: World) -> None:
    (small.store / FOLDER / "node.json").unlink()
    code, report = verify(small.store)
    assert code == 4
    assert "node.json" in str(report["files"]) + str(report["problems"])


def test_readme_that_is_gone_is_found(small: World) -> None:
    (small.store / "README.txt").unlink()
    code, report = verify(small.store)
    assert code == 4
    assert "README.txt" in str(report["files"])


def test_grade_that_is_better_than_its_entries_is_found(small: World) -> None:
    """A snapshot that calls itself stable, made of entries of a torn file."""
    with contextlib.closing(z.open_store(str(small.store))) as store:
        folder = store.node(FOLDER)
        last = next(folder.newest())
        writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
        blocks = z.BlockWriter(writer)
        with contextlib.closing(store.reader()) as reader:
            for entry in z.list_entries(reader, last.blocks):
                blocks.put(z.Entry(entry.line, entry.read.replace(b'"grade":"stable"', b'"grade":"torn"')))
        new = z.replace(last, blocks=blocks.close(), name="2030-01-01T00-00-00Z", sequence=9, grade="stable")
        writer.seal()
        folder.save_snapshot(new)
    code, report = verify(small.store)
    assert code == 4
    assert report["problems"] == [f"snapshot {FOLDER}/2030-01-01T00-00-00Z calls itself stable, and is torn"]


# ---- the index ----


@pytest.mark.parametrize("what", ["gone", "empty", "garbage", "half", "other store", "old", "rows moved", "extra rows"])
def test_wrong_index_is_noticed_and_made_anew(small: World, what: str) -> None:
    """Whatever the index says, in the end it says what the packs say, and no file is called lost."""
    path, before = small.store / "index.sqlite", read_all(small.store)
    data = path.read_bytes()
    if what == "gone":
        path.unlink()
    elif what in ("empty", "garbage", "half"):
        path.write_bytes({"empty": b"", "garbage": os.urandom(5000), "half": data[: len(data) // 2]}[what])
    elif what == "other store":
        with contextlib.closing(z.open_store(str(small.path / "other"), create=True)) as other:
            writer = z.PackWriter(other.packs, other.index, z.ZLIB, 1)
            writer.put_chunk(b"of another store")
            writer.seal()
        shutil.copy(small.path / "other/index.sqlite", path)
    else:
        statement = {
            "old": "PRAGMA user_version = 99",
            "rows moved": "UPDATE chunks SET place = place + 1",
            "extra rows": "INSERT INTO chunks SELECT zeroblob(32), pack, record, place FROM chunks LIMIT 1",
        }[what]
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(statement)
    code, report = verify(small.store)
    assert (code == 0) != (what == "other store")  # a pack of which only the index knows counts as lost
    assert (report["index"] != "") == (what in ("rows moved", "extra rows"))
    assert report["harmed"] == []
    assert read_all(small.store) == before
    if code:
        small.run("repair")
    code, report = verify(small.store)
    assert (code, report["index"]) == (0, "")


def test_row_that_bears_the_digest_of_another_is_found(tmp_path: Path) -> None:
    """The index leads to each of them, and to read either must give the chunk."""
    short, long = os.urandom(300), os.urandom(10_000)
    digest = z.digest_pages(z.hash_pages(short))
    rows = [(digest, len(short)), (digest, len(long))]
    hashes = z.hash_pages(short) + z.hash_pages(long)
    body = z.PACK_HEADER
    body += z.encode_record(z.FRAME, rows, hashes, (z.PLAIN, 10_300, short + long))
    body += z.encode_footer([(len(z.PACK_HEADER), z.FRAME, [digest, digest])], len(body))
    name = hashlib.sha256(body).hexdigest()
    (tmp_path / name[:2]).mkdir()
    path = tmp_path / name[:2] / f"{name}.pack"
    path.write_bytes(body)
    reader = z.Reader(str(tmp_path), z.Index(":memory:"))
    found = z.verify_pack(reader, name, str(path))
    assert (found.problem, found.bad) == ("it holds what it should not", (digest,))
    reader.close()


# ---- what only looks like damage ----


def test_names_that_look_like_words_of_the_format(world: World) -> None:
    """A symlink to `error`, beside what an error is called."""
    (world.files / "a").write_text("a")
    os.symlink("error", world.files / "last")
    world.node()
    world.sweep()
    assert world.run("verify").stdout.endswith("verify: all is well\n")


def test_pack_that_was_read_in_the_future_is_read_again(small: World) -> None:
    """A clock that was ahead must not spare it for years."""
    packs = {pack.stem: str(pack) for pack in find_packs(small.store)}
    with contextlib.closing(z.open_store(str(small.store))) as store:
        first = min(packs)
        now = time.time_ns()
        z.save_times(store, z.VERIFIED, {name: now + 10**18 if name == first else now for name in packs})
    code, report = verify(small.store, "--sample", "0.1%")
    assert (code, report["checked"]) == (0, 1)
    with contextlib.closing(z.open_store(str(small.store))) as store:
        assert z.load_times(store, z.VERIFIED)[first] < now + 10**12


BARE = """
import sys, zbackup
zbackup.load_zstd = lambda: None
sys.exit(zbackup.main(sys.argv[1:]))
"""


def test_lists_that_this_python_cannot_read_are_not_lost(world: World) -> None:
    with open(world.files / "big", "wb") as file:
        file.write(os.urandom(100))
        file.truncate((1 << 30) + z.CHUNK)
    world.node()
    world.sweep("--no-latest")
    with contextlib.closing(z.open_store(str(world.store))) as store, contextlib.closing(store.reader()) as reader:
        (entry,) = (e for e in z.list_entries(reader, store.node(FOLDER).list_snapshots()[0].blocks) if e.content.size)
        assert entry.content.lists
    other = world.path / "other"  # of another node, whose entries this Python can read
    other.mkdir()
    os.link(world.files / "big", other / "big")
    world.node("--file", "other", address="127.0.0.10")
    flags = world.server_flags("--no-latest", "--range", "10")
    for arguments, code in ((flags, 0), (["verify"], 4)):
        command = [sys.executable, "-c", BARE, *arguments]
        done = subprocess.run(command, cwd=world.path, env=uncovered(world.env), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "lost:" not in done.stderr and "zstd" in done.stderr
    assert world.run("verify").stdout.endswith("verify: all is well\n")
