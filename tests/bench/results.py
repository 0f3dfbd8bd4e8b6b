"""What was measured: records, their medians, and the targets they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lab import Cost
from trees import Size


@dataclass(frozen=True)
class Record:
    """One row of one tool in one round; seconds and bytes."""

    row: str
    peer: str
    round: int
    wall: float
    cpu_machine: float
    cpu_vault: float
    peak_machine: int
    peak_vault: int
    wire: int
    store: int  # as the files say
    disk: int  # as the disk has given
    added: int  # to `disk`, by this row
    data: int  # bytes of the source, as its files say


SUMMED = ("wall", "cpu_machine", "cpu_vault", "wire", "added")
MEASURES = (*SUMMED, "peak_machine", "peak_vault", "store", "disk", "data")


def make_record(name: tuple[str, str, int], cost: Cost, size: Size, data: int, before: int = 0) -> Record:
    """Return the record of a row, tool and round; `before` is what the store had on the disk."""
    row, peer, number = name
    costs = asdict(cost)
    sizes = {"store": size.apparent, "disk": size.allocated, "added": size.allocated - before, "data": data}
    return Record(row=row, peer=peer, round=number, **costs, **sizes)


def add_up(one: Record, two: Record) -> Record:
    """Join two records of a row that has several copies: times add up, the highest memory and the last size count."""
    a, b = asdict(one), asdict(two)
    peaks = {name: max(a[name], b[name]) for name in ("peak_machine", "peak_vault")}
    return Record(**{**b, **peaks, **{name: a[name] + b[name] for name in SUMMED}})


def join_rows(records: Iterable[Record]) -> list[Record]:
    """Return one record for each row, tool and round, in the order in which they were made."""
    joined: dict[tuple[str, str, int], Record] = {}
    for record in records:
        key = (record.row, record.peer, record.round)
        joined[key] = add_up(joined[key], record) if key in joined else record
    return list(joined.values())


@dataclass(frozen=True)
class Middle:
    """The median of all rounds, with the extremes."""

    median: float
    least: float
    most: float


Table = dict[str, dict[str, dict[str, Middle]]]  # row, tool, measure


def summarise(records: list[Record]) -> Table:
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        cells = table.setdefault(record.row, {}).setdefault(record.peer, {})
        for name in MEASURES:
            cells.setdefault(name, []).append(getattr(record, name))
    return {
        row: {peer: {name: middle_of(values) for name, values in cells.items()} for peer, cells in peers.items()}
        for row, peers in table.items()
    }


def middle_of(values: list[float]) -> Middle:
    return Middle(statistics.median(values), min(values), max(values))


# ---- targets ----


@dataclass(frozen=True)
class Target:
    """A bound on a measure of zbackup: `limit` times that of another tool, or row, or the data; or a plain figure."""

    row: str
    measure: str
    limit: float
    against: str = ""  # a tool, "row NAME", "data"; nothing: the limit itself


MIB = 1 << 20
RESTORED = ("sqlite", "small", "dump", "tar", "log", "vm")
LARGE = ("quarter-first", "million-first", "million-same", "big-sparse", "big-dense")

TARGETS = (
    Target("sqlite-first", "wall", 1.0, "rsync-ssh"),
    Target("sqlite-first", "wall", 0.5, "borg"),
    Target("sqlite-1%", "wall", 0.6, "rsync-ssh"),
    Target("sqlite-1%", "added", 0.012, "data"),
    Target("sqlite-same", "wall", 1.0, "restic"),
    Target("small-first", "wall", 0.7, "restic"),
    Target("small-first", "disk", 1.0, "restic"),
    Target("small-same", "wall", 1.5, "rsync-ssh"),
    Target("small-same", "wall", 0.4, "restic"),
    Target("dump-insert", "added", 1.2, "borg"),
    Target("dump-runs", "added", 1.2, "borg"),
    Target("vm-first", "wall", 0.5, "borg"),
    Target("vm-changed", "wall", 0.5, "borg"),
    Target("versions-20", "disk", 0.3, "restic"),
    Target("versions-first", "wall", 1.0, "restic"),
    Target("versions-last", "wall", 1.0, "restic"),
    *(Target(f"{name}-restore", "wall", 1.0, "restic") for name in RESTORED),
    Target("sweep-24", "wall", 60),
    Target("sweep-16", "wall", 60),
    *(
        Target(f"{row}-first", f"peak_{side}", 200 * MIB)
        for row in ("quarter", "million")
        for side in ("machine", "vault")
    ),
    # Four times the files; a tenth more is for what noise the machine has.
    Target("million-first", "wall", 4.4, "row quarter-first"),
    Target("million-same", "wall", 4.4, "row quarter-same"),
    *(
        Target(f"big-{what}", f"peak_{side}", 200 * MIB)
        for what in ("sparse", "dense")
        for side in ("machine", "vault")
    ),
    Target("nodes-50", "wall", 1.0, "row nodes-one"),
)


@dataclass(frozen=True)
class Verdict:
    """A target, held against what one form of zbackup did."""

    target: Target
    peer: str
    value: float
    bound: float

    @property
    def met(self) -> bool:
        return self.value <= self.bound


def judge(table: Table) -> list[Verdict]:
    """Return a verdict for each target and each form of zbackup of which both sides were measured."""
    found = []
    for target in TARGETS:
        for peer, cells in table.get(target.row, {}).items():
            bound = bound_of(target, peer, table)
            if peer.startswith("zbackup") and bound is not None:
                found.append(Verdict(target, peer, cells[target.measure].median, bound))
    return found


def bound_of(target: Target, peer: str, table: Table) -> float | None:
    """Return the figure that a target allows, or None when what it refers to was not measured."""
    if not target.against:
        return target.limit
    row, other, measure = target.row, target.against, target.measure
    if other.startswith("row "):
        row, other = other[4:], peer
    elif other == "data":
        other, measure = peer, "data"
    cells = table.get(row, {}).get(other)
    return target.limit * cells[measure].median if cells else None


def to_json(records: list[Record], facts: dict[str, Any]) -> dict[str, Any]:
    """Return all that was measured and judged, for a file."""
    verdicts = [
        {**asdict(v.target), "peer": v.peer, "value": v.value, "bound": v.bound, "met": v.met}
        for v in judge(summarise(records))
    ]
    return {"facts": facts, "records": [asdict(record) for record in records], "targets": verdicts}
