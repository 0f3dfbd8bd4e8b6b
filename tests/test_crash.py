"""The crash matrix: what a kill -9, a power cut or a refusing disk at any instant may cost, which is nothing.

By default each test takes a random sample for a second; its seed stands in what it reports,
and ZBACKUP_CRASH_SEED repeats it.  ZBACKUP_CRASH=all tries every instant and every call, and
prints the table that the README has; beside -n it is one line for each test, shown by -rP.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Callable

import crash
import pytest
from conftest import FOLDER, World

import zbackup

ALL = os.environ.get("ZBACKUP_CRASH") == "all"
SEED = int(os.environ.get("ZBACKUP_CRASH_SEED") or time.time())
SECONDS = float(os.environ.get("ZBACKUP_CRASH_SECONDS") or 1)  # for each sample

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[crash.Result]]:
    """Collect results, and print them after a complete run."""
    results: list[crash.Result] = []
    yield results
    if ALL and results:
        capture: Any = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n\n{crash.write_table(results)}")


@pytest.fixture
def stage(world: World) -> Iterator[Callable[..., crash.Scene]]:
    """Return a function that gives a scene: a node, and room for stores."""
    made: list[crash.Scene] = []

    def make(program: ModuleType = zbackup) -> crash.Scene:
        made.append(crash.Scene(world, program))
        return made[-1]

    yield make
    for scene in made:
        scene.close()


def judge(result: crash.Result, table: list[crash.Result]) -> None:
    """Put a result into the table; fail where anything was lost."""
    table.append(result)
    print(f"{result}, seed {SEED}")
    assert not result.lost, f"{len(result.lost)} of {result.tried} lost; the first ones:\n" + "\n".join(result.lost[:5])


def effort() -> crash.Effort:
    return crash.Effort(SEED, None if ALL else SECONDS)


# ---- the matrix ----


@pytest.mark.parametrize("name", crash.CASES)
def test_crash_at_every_instant(name: str, stage: Callable[..., crash.Scene], table: list[crash.Result]) -> None:
    judge(crash.Matrix(stage(), crash.CASES[name]).crash(effort()), table)


@pytest.mark.parametrize("name", crash.CASES)
def test_crash_of_every_call(name: str, stage: Callable[..., crash.Scene], table: list[crash.Result]) -> None:
    """Each call fails in each way, once, and as a disk that stays full; then the command is run again."""
    matrix = crash.Matrix(stage(), crash.CASES[name])
    ways = [(number, False) for number in ERRORS.values()] + [(errno.ENOSPC, True)]
    if not ALL:
        ways = random.Random(f"{SEED}/{name}").sample(ways, 1)
    for number, lasting in ways:
        judge(matrix.fail(number, lasting, effort()), table)


# ---- that it can fail: each of these programs loses something, and the matrix must see it ----


def change_text(*changes: tuple[str, str]) -> Callable[[], ModuleType]:
    return lambda: crash.load_changed(*changes)


def replace_name(name: str, make: Callable[[Any], Any]) -> Callable[[], ModuleType]:
    """Return a function that gives a zbackup in which a name stands for what `make` makes of what it stood for."""

    def load() -> ModuleType:
        program = crash.load_changed()
        owner: Any = program
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, make(getattr(owner, last)))
        return program

    return load


def do_nothing(real: Any) -> Any:
    return lambda *arguments: None


def seal_last(real: Any) -> Any:
    """Return a Repacker.finish that removes the old packs before the new one is durable."""

    def finish(self: Any) -> None:
        seal, self.writer.seal = self.writer.seal, lambda: None
        try:
            real(self)
        finally:
            self.writer.seal = seal
        seal()

    return finish


PUT_PACK = "self.index.put_pack(name, ((d, at, i) for at, _, digests in self._records for i, d in enumerate(digests)))"
SYNC_PACK = "            os.fsync(self.fd)\n            make_folder(folder)\n"
SYNC_FILE = "        os.fsync(fd)\n        publish(temporary, path, replacing)\n"
SYNC_LATEST = "        sync_filesystem(self.folders.root)\n        self._take_due"
WAIT = "            self._syncing.wait()  # where it fails, nothing of it is ever published\n"
BROKEN = {
    "names are not synced": ("second pull", replace_name("sync_folder", do_nothing)),
    "packs are not synced": ("second pull", change_text((SYNC_PACK, "            make_folder(folder)\n"))),
    "files are not synced": ("second pull", change_text((SYNC_FILE, "        publish(temporary, path, replacing)\n"))),
    "index before pack": ("second pull", change_text((SYNC_PACK, f"            {PUT_PACK}\n{SYNC_PACK}"))),
    "snapshot before pack": (
        "second pull",
        change_text(
            ("        intake.writer.seal()\n", ""),
            ("        folder.drop_progress()\n", "        folder.drop_progress()\n        intake.writer.seal()\n"),
        ),
    ),
    "latest is not synced": ("pull and latest", change_text((SYNC_LATEST, "        self._take_due"))),
    "names do not wait for the sync beside the next batch": (
        "latest in batches",
        change_text((WAIT, "            pass\n")),
    ),
    "a sync counts for what was written beside it": (
        "latest in batches",
        change_text((WAIT, f"{WAIT}            self._synced, self._due = self._synced + self._due, []\n")),
    ),
    "restored files get their names before the sync": ("restore", change_text((WAIT, "            pass\n"))),
    "leftovers stay": ("second pull", replace_name("execute_leftovers", do_nothing)),
    "old packs go first": ("prune", replace_name("Repacker.finish", seal_last)),
    "removed snapshots are not synced": (
        "prune",
        replace_name("remove_durably", lambda real: lambda path: os.unlink(path)),
    ),
    "the index does not forget": ("prune", replace_name("Index.remove_pack", do_nothing)),
    "the index forgets without sync": (
        "prune",
        change_text(("PRAGMA synchronous = FULL", "PRAGMA synchronous = NORMAL")),
    ),
    "repair saves nothing": (
        "repair of a pack",
        change_text(("        writer.seal()\n    finally:\n", "    finally:\n")),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_crash_matrix_finds_what_is_broken(what: str, stage: Callable[..., crash.Scene]) -> None:
    name, make = BROKEN[what]
    result = crash.Matrix(stage(make()), crash.CASES[name]).crash(crash.Effort(SEED, first=True))
    assert result.lost, f"nothing was found in {result.tried} instants"
    print(f"{what}: found after {result.tried}: {result.lost[0]}")


def ignore_errors(real: Any) -> Any:
    """Return a write_all that does not look at errors."""

    def write(fd: int, data: bytes) -> None:
        with contextlib.suppress(OSError):
            real(fd, data)

    return write


def test_crash_matrix_finds_ignored_errors(stage: Callable[..., crash.Scene]) -> None:
    program = replace_name("write_all", ignore_errors)()
    result = crash.Matrix(stage(program), crash.CASES["second pull"]).fail(
        errno.ENOSPC, False, crash.Effort(SEED, first=True)
    )
    assert result.lost, f"nothing was found in {result.tried} calls"


# ---- what the matrix has found ----


def test_crash_repair_goes_on_after_a_move_that_was_cut_off(stage: Callable[..., crash.Scene]) -> None:
    """A kill between link and unlink leaves the damaged file at both places."""
    scene = stage()
    place = scene.folder("store")
    case = crash.CASES["repair of a snapshot"]
    case.prepare(scene, place)
    (damaged,) = ((place / "backups" / FOLDER / "snapshots" / f"{name}.json") for name in scene.free)
    aside = place / "backups" / "aside"
    aside.mkdir(0o700)
    os.link(damaged, aside / f"{FOLDER}-snapshots-{damaged.name}")
    crash.check(scene, case, place, set(scene.states) - scene.free)


def test_crash_prune_goes_on_after_a_move_that_was_cut_off(stage: Callable[..., crash.Scene]) -> None:
    """The same of a snapshot on its way to the trash, when prune is run again within the second."""
    scene = stage()
    place = scene.folder("store")
    crash.prepare_second(scene, place)
    (name,) = scene.states
    with contextlib.closing(zbackup.open_store(str(place / "backups"))) as store:
        folder = store.node(FOLDER)
        os.mkdir(folder.trash, 0o700)
        moved = os.path.join(folder.trash, f"{name}~{zbackup.name_time(crash.NOON)}.json")
        os.link(os.path.join(folder.snapshots, f"{name}.json"), moved)
        folder.remove_snapshot(name, crash.NOON)
        assert [trashed.snapshot.name for trashed in folder.list_trash()] == [name]
        assert folder.list_snapshots() == []


def test_crash_repair_that_cannot_remove_its_note(stage: Callable[..., crash.Scene]) -> None:
    """It ends with the exit code of the store, and the next one removes it."""
    matrix = crash.Matrix(stage(), crash.CASES["repair of a pack"])
    assert not matrix.fail_calls(errno.EIO, r"unlink of \w+\.damaged").lost


def test_crash_latest_removes_what_a_killed_run_left(stage: Callable[..., crash.Scene]) -> None:
    """The removal of a half file fails once, in the run after the kill: a later run must try it again."""
    matrix = crash.Matrix(stage(), crash.CASES["pull after a killed latest"])
    assert not matrix.fail_calls(errno.EIO, rf"unlink of {zbackup.TEMPORARY}\w{{24}}$").lost


def test_crash_pull_whose_key_cannot_be_made(stage: Callable[..., crash.Scene]) -> None:
    """The key lies in the store, so it is the store that fails, with its exit code."""
    matrix = crash.Matrix(stage(), crash.CASES["first pull"])
    assert not matrix.fail_calls(errno.EIO, "fsync of (backups|keys)$").lost


# ---- the model of the disk, on which all of it rests ----


def make_disk() -> crash.Disk:
    """Return a disk with the durable folder `f`."""
    disk = crash.Disk({0: crash.Inode("folder")}, (None, None, None))
    for op in (crash.Op("create", inode=1, folder=0, name="f", data="folder"), crash.Op("fsync", inode=0)):
        disk.apply(op)
    return disk


def look(disk: crash.Disk, choice: crash.Choice) -> dict[str, bytes]:
    """Return the files of a drawn tree."""
    return {path: found.data for path, found in disk.draw(choice, "").items() if found.kind == "file"}


def test_crash_model_keeps_only_what_was_synced() -> None:
    disk = make_disk()
    disk.apply(crash.Op("create", inode=2, folder=1, name="a", data="file"))
    disk.apply(crash.Op("write", inode=2, data=b"one"))
    assert look(disk, crash.Choice()) == {"f/a": b"one"}
    assert look(disk, crash.Lost()) == {}
    disk.apply(crash.Op("fsync", inode=2))
    assert look(disk, crash.Lost()) == {}, "the file is synced, its name is not"
    disk.apply(crash.Op("fsync", inode=1))
    disk.apply(crash.Op("write", inode=2, at=3, data=b"two"))
    assert look(disk, crash.Lost()) == look(disk, crash.Empty()) == {"f/a": b"one"}
    assert look(disk, crash.Zeros()) == {"f/a": b"one\0\0\0"}
    disk.apply(crash.Op("sync"))
    assert look(disk, crash.Lost()) == {"f/a": b"onetwo"}


def test_crash_model_sync_that_goes_on_keeps_only_what_was_before_it() -> None:
    """As syncfs in a thread: at its end durable is what was there at its beginning."""
    disk = make_disk()
    for op in (
        crash.Op("create", inode=2, folder=1, name="a", data="file"),
        crash.Op("write", inode=2, data=b"one"),
        crash.Op("begin_sync", at=1),
        crash.Op("write", inode=2, at=3, data=b"two"),
        crash.Op("create", inode=3, folder=1, name="b", data="file"),
        crash.Op("write", inode=3, data=b"three"),
        crash.Op("rename", folder=1, name="a", folder2=1, name2="c"),
    ):
        disk.apply(op)
    assert look(disk, crash.Lost()) == {}, "it has not ended"
    disk.apply(crash.Op("end_sync", at=1))
    assert look(disk, crash.Choice()) == {"f/b": b"three", "f/c": b"onetwo"}
    assert look(disk, crash.Lost()) == {"f/a": b"one"}
    assert look(disk, crash.Empty()) == {"f/b": b"", "f/c": b"one"}
    seen = {tuple(sorted(look(disk, crash.Torn(random.Random(seed))))) for seed in range(200)}
    names = [("f/a", "f/c"), ("f/a",), ("f/c",), ()]  # each may be lost or kept, and so may "b"
    assert seen == {tuple(sorted((*some, *more))) for some in names for more in ((), ("f/b",))}
    disk.apply(crash.Op("sync"))
    assert look(disk, crash.Lost()) == {"f/b": b"three", "f/c": b"onetwo"}


def test_crash_model_sync_that_goes_on_takes_nothing_back() -> None:
    """What was synced by itself meanwhile is newer than what it knew; of one that was overtaken nothing is known."""
    disk = make_disk()
    for op in (
        crash.Op("create", inode=2, folder=1, name="a", data="file"),
        crash.Op("begin_sync", at=1),
        crash.Op("write", inode=2, data=b"one"),
        crash.Op("fsync", inode=2),
        crash.Op("fsync", inode=1),
        crash.Op("end_sync", at=1),
    ):
        disk.apply(op)
    assert look(disk, crash.Lost()) == {"f/a": b"one"}
    for op in (
        crash.Op("begin_sync", at=2),
        crash.Op("write", inode=2, data=b"two"),
        crash.Op("begin_sync", at=3),
        crash.Op("end_sync", at=2),
    ):
        disk.apply(op)
    assert look(disk, crash.Lost()) == {"f/a": b"one"}
    disk.apply(crash.Op("end_sync", at=3))
    assert look(disk, crash.Lost()) == {"f/a": b"two"}


def test_crash_model_rename_shows_the_old_or_the_new_file() -> None:
    disk = make_disk()
    for number, name in ((2, "a"), (3, "b")):
        disk.apply(crash.Op("create", inode=number, folder=1, name=name, data="file"))
        disk.apply(crash.Op("write", inode=number, data=name.encode() * 2000))
    disk.apply(crash.Op("sync"))
    disk.apply(crash.Op("rename", folder=1, name="b", folder2=1, name2="a"))
    seen = {tuple(sorted(look(disk, crash.Torn(random.Random(seed))).items())) for seed in range(200)}
    a, b = b"a" * 2000, b"b" * 2000
    assert seen == {
        (("f/a", a), ("f/b", b)),
        (("f/a", b),),
        (("f/a", b), ("f/b", b)),
        (("f/a", a),),  # as POSIX allows: each name on its own
    }
    disk.apply(crash.Op("fsync", inode=1))
    assert {tuple(look(disk, crash.Torn(random.Random(seed))).items()) for seed in range(20)} == {(("f/a", b),)}


def test_crash_model_tears_at_sectors() -> None:
    disk = make_disk()
    disk.apply(crash.Op("create", inode=2, folder=1, name="a", data="file"))
    disk.apply(crash.Op("write", inode=2, data=b"o" * 3000))
    disk.apply(crash.Op("sync"))
    disk.apply(crash.Op("write", inode=2, data=b"n" * 3000))
    mixed = 0
    for seed in range(100):
        (data,) = look(disk, crash.Torn(random.Random(seed))).values()
        sectors = [set(data[start : start + crash.SECTOR]) for start in range(0, 3000, crash.SECTOR)]
        assert all(sector in ({ord("o")}, {ord("n")}) for sector in sectors), "half a sector was written"
        mixed += len(set(data)) == 2
    assert mixed > 10


# ---- the index, which is a cache ----


def test_crash_garbage_in_the_index(stage: Callable[..., crash.Scene]) -> None:
    """Whatever sector of it is garbage, which no crash but a bad disk leaves: `verify` at most puts it right."""
    scene = stage()
    base = scene.folder("base")
    case = crash.CASES["second pull"]
    case.prepare(scene, base)
    sectors = range((base / "backups" / crash.INDEX[0]).stat().st_size // crash.SECTOR)
    dice = random.Random(SEED)
    by_itself = 0
    for sector in sectors if ALL else dice.sample(sectors, 10):
        place = scene.folder("torn", base)
        crash.tear_index(place, sector, random.Random(f"{SEED}/{sector}"))
        try:
            crash.check(scene, case, place, set(scene.states))
            by_itself += 1
        except (crash.Loss, zbackup.BackupError):
            place = scene.folder("torn", base)
            crash.tear_index(place, sector, random.Random(f"{SEED}/{sector}"))
            crash.must(scene, place, "verify", "--quiet")
            crash.check(scene, case, place, set(scene.states))
    assert by_itself
