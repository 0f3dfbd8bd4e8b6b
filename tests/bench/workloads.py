"""The rows of the table: what is made, what changes, what is restored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import data
from data import GIB, KIB, MIB, Source

SMALLEST = 0.01  # below this scale versions and nodes are fewer, too: such a run only shows that all works


@dataclass(frozen=True)
class Maker:
    """What a step makes its change with."""

    scale: float
    source: Source

    def size(self, full: float) -> int:
        """Return a size at this scale; at least two chunks of the tools, where the full one has them."""
        return max(1, int(full * self.scale))


Change = Callable[[Path, Maker], None]


@dataclass(frozen=True)
class Step:
    """One version: how it differs from the last one, and the row that its copy counts in."""

    row: str
    change: Change | None  # None: nothing changes
    seed: str = ""  # another step's source, where the same content is to be made again


@dataclass(frozen=True)
class Workload:
    """A folder with its versions."""

    name: str
    steps: tuple[Step, ...]
    restores: tuple[tuple[str, int], ...]  # row and version (negative: from the last one)
    data: float  # bytes at full scale on the disk
    store: float  # the same of the store of one tool, at most
    versions: bool = False  # older versions must be restorable; each tool has its turn alone, for want of space
    peers: tuple[str, ...] = ()  # the tools, where all would take a day
    long: bool = False  # one round is enough: it takes long, or adds up many copies
    extra: bool = False  # only run when it is named


OWN = ("zbackup", "zbackup-no-latest")


def first_sqlite(root: Path, make: Maker) -> None:
    data.make_sqlite(root / "bd", make.source, make.size(968 * MIB))


def next_sqlite(root: Path, make: Maker) -> None:
    data.change_sqlite(root / "bd", make.source, 0.01)


def first_small(root: Path, make: Maker) -> None:
    data.make_files(root, make.source, make.size(90_000), int(12.2 * KIB))


def first_dump(root: Path, make: Maker) -> None:
    data.make_dump(root / "dump.sql", make.source, make.size(500 * MIB))


def scatter_dump(root: Path, make: Maker) -> None:
    data.change_dump(root / "dump.sql", make.source, 0.01, 1)


def cluster_dump(root: Path, make: Maker) -> None:
    data.change_dump(root / "dump.sql", make.source, 0.01, 500)


def make_tar(share: float) -> Change:
    def change(root: Path, make: Maker) -> None:
        data.make_tar(root / "files.tar", make.source, make.size(500 * MIB), share)

    return change


def first_log(root: Path, make: Maker) -> None:
    data.make_log(root / "app.log", make.source, make.size(200 * MIB))


def append_log(root: Path, make: Maker) -> None:
    data.append_log(root / "app.log", make.source, make.size(10 * MIB))


def rotate_log(root: Path, make: Maker) -> None:
    data.rotate_log(root / "app.log", make.source, make.size(10 * MIB))


def prepend_log(root: Path, make: Maker) -> None:
    data.prepend_log(root / "app.log.1", make.source, make.size(10 * MIB))


def first_image(root: Path, make: Maker) -> None:
    data.make_image(root / "vm.img", make.source, make.size(4 * GIB))


def next_image(root: Path, make: Maker) -> None:
    data.change_image(root / "vm.img", make.source, 0.02)


def make_many(count: int) -> Change:
    def change(root: Path, make: Maker) -> None:
        data.make_files(root, make.source, make.size(count), KIB)

    return change


def first_big(root: Path, make: Maker) -> None:
    data.make_sparse(root / "big", make.source, make.size(64 * GIB))


def fill_big(root: Path, make: Maker) -> None:
    data.fill_sparse(root / "big", make.source, 1 / 16)


def first_smoke(root: Path, make: Maker) -> None:
    first_small(root / "files", make)
    first_sqlite(root, make)


# Those that show memory and growth come last: they take longest.
WORKLOADS = (
    Workload(
        "sqlite",
        (Step("sqlite-first", first_sqlite), Step("sqlite-1%", next_sqlite), Step("sqlite-same", None)),
        (("sqlite-restore", -1),),
        GIB,
        2 * GIB,
    ),
    Workload(
        "small",
        (Step("small-first", first_small), Step("small-same", None)),
        (("small-restore", -1),),
        1.4 * GIB,
        2 * GIB,
    ),
    Workload(
        "dump",
        (Step("dump-first", first_dump), Step("dump-insert", scatter_dump), Step("dump-runs", cluster_dump)),
        (("dump-restore", -1),),
        GIB,
        1.5 * GIB,
    ),
    Workload(
        "tar",
        (Step("tar-first", make_tar(0), "tar"), Step("tar-change", make_tar(0.01), "tar")),
        (("tar-restore", -1),),
        GIB / 2,
        GIB,
    ),
    Workload(
        "log",
        (
            Step("log-first", first_log),
            Step("log-append", append_log),
            Step("log-rotate", rotate_log),
            Step("log-prepend", prepend_log),
        ),
        (("log-restore", -1),),
        GIB / 2,
        GIB,
    ),
    Workload(
        "vm-image",
        (Step("vm-first", first_image), Step("vm-changed", next_image)),
        (("vm-restore", -1),),
        3 * GIB,
        5 * GIB,
    ),
    Workload(
        "versions-20",
        (
            Step("versions-20", first_sqlite),
            *[Step("versions-20", next_sqlite)] * 19,
        ),
        (("versions-first", 0), ("versions-last", -1)),
        GIB,
        21 * GIB,
        versions=True,
        long=True,
    ),
    Workload(
        "quarter-million-files",
        (Step("quarter-first", make_many(250_000)), Step("quarter-same", None)),
        (("quarter-restore", -1),),
        1.2 * GIB,
        2 * GIB,
        peers=OWN,
        long=True,
    ),
    Workload(
        "million-files",
        (Step("million-first", make_many(1_000_000)), Step("million-same", None)),
        (("million-restore", -1),),
        4.5 * GIB,
        7 * GIB,
        peers=OWN,
        long=True,
    ),
    Workload(
        "big-file-64g",
        (Step("big-sparse", first_big), Step("big-dense", fill_big)),
        (("big-restore", -1),),
        4 * GIB,
        9 * GIB,
        peers=OWN,
        long=True,
    ),
    Workload(
        "smoke",
        (Step("smoke-first", first_smoke), Step("smoke-change", next_sqlite)),
        (("smoke-older", 0), ("smoke-restore", -1)),
        GIB,
        3 * GIB,
        extra=True,
    ),
)


def list_workloads(scale: float) -> dict[str, Workload]:
    """Return all workloads by name; with fewer versions where the run only shows that all works."""
    if scale >= SMALLEST:
        return {workload.name: workload for workload in WORKLOADS}
    return {workload.name: replace(workload, steps=workload.steps[:4]) for workload in WORKLOADS}
