"""Many nodes: sweeps over networks with few of them alive, and fifty copied at once. zbackup alone does this."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trees
from data import MIB, Sources
from lab import NETWORK, Command, Failed, Lab, inside
from peers import Yard, ZbackupNoLatest
from results import Record, make_record
from workloads import SMALLEST

TABLE = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3")


@dataclass(frozen=True)
class Sweep:
    """What one sweep goes over."""

    row: str
    addresses: tuple[str, ...]
    where: tuple[str, ...]
    one: bool = False  # one node serves all folders


class Fleet(ZbackupNoLatest):
    """Some nodes at addresses of the machine, one folder each."""

    plan: Sweep

    def start_nodes(self) -> None:
        """The addresses come first, see `start`."""

    def start(self, plan: Sweep) -> None:
        self.plan = plan
        for i, address in enumerate(plan.addresses):
            self.add_address(address)
            self.start_node(address, self.data.name if plan.one else f"{self.data.name}/{i:02}")

    def add_address(self, address: str) -> None:
        """Give the machine one more address; loopback has all of 127.0.0.0/8 already."""
        place = self.yard.lab.places["machine"]
        if place.holder and address != place.address:
            inside(place.holder, f"ip address replace {address}/16 dev zb")

    def backup(self, number: int) -> Command:
        where = (*self.plan.where, "--port", str(self.port))
        return self.program("vault", "server", "--once", *where, "--store", str(self.store), *self.flags)

    def check_all(self, to: Path) -> None:
        """Restore each node and compare it with its folder."""
        for i, address in enumerate(self.plan.addresses):
            source = self.data if self.plan.one else self.data / f"{i:02}"
            self.team.run(self.program("vault", "restore", address, "--store", str(self.store), "--to", str(to)))
            restored = to / source.relative_to(self.data.parent)
            differences = trees.compare(trees.digest_tree(source), trees.digest_tree(restored))
            trees.put_away(to, self.yard.lab.waste)
            if differences:
                raise Failed("\n".join([f"{self.plan.row}: {address} came back different:", *differences]))


@dataclass(frozen=True)
class Hall:
    """Where a fleet is run."""

    lab: Lab
    folder: Path
    scale: float
    sources: Sources


def run_sweep(hall: Hall, plan: Sweep, size: int, number: int) -> Record:
    """Make a folder for each node, sweep once, check what arrived."""
    source = hall.sources.seeded(plan.row.rpartition("-")[0])
    count = max(len(plan.addresses), fleet_size(hall.scale) if plan.one else 0)
    for i in range(count):
        folder = hall.folder / "data" / f"{i:02}"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(source.mixed(max(1, size // count)))
    fleet = Fleet(Yard(hall.lab, hall.folder / Fleet.name, hall.folder / "data"))
    try:
        fleet.prepare()
        fleet.start(plan)
        trees.warm(fleet.data)
        cost = fleet.team.measure(fleet.backup(0), plan.row)
        fleet.check_all(hall.folder / "restored")
        return make_record((plan.row, fleet.name, number), cost, trees.measure_size(fleet.store), size)
    finally:
        fleet.close()
        trees.put_away(hall.folder / "data", hall.lab.waste)


def fleet_size(scale: float) -> int:
    return 50 if scale >= SMALLEST else 2


@contextlib.contextmanager
def larger_table(size: int) -> Iterator[int]:
    """Let the kernel's table of neighbours hold `size` addresses, as the README tells whoever sweeps a /16."""
    before = TABLE.read_text() if TABLE.exists() else ""
    try:
        if before:
            TABLE.write_text(str(size))
        yield size
    except PermissionError:
        raise Failed("the kernel's table of neighbours can only be made larger by root") from None
    finally:
        with contextlib.suppress(OSError):
            TABLE.write_text(before)


def run_sweeps(hall: Hall, number: int) -> list[Record]:
    """Sweep a /24 with 4 nodes alive and a /16 with 16; the other addresses are silent, nothing answers for them."""
    if not hall.lab.joined:
        print("without sweep-24 and sweep-16: they need network namespaces", flush=True)
        return []
    few = tuple(f"{NETWORK}.0.{9 + 60 * i}" for i in range(4))
    some = tuple(f"{NETWORK}.{16 * i}.9" for i in range(16))
    records = [run_sweep(hall, Sweep("sweep-24", few, ("--network", f"{NETWORK}.0.0/24")), MIB, number)]
    if hall.scale >= SMALLEST:
        with larger_table(16384) as size:
            where = ("--network", f"{NETWORK}.0.0/16", "--neighbours", str(size))
            records.append(run_sweep(hall, Sweep("sweep-16", some, where), MIB, number))
    return records


def run_fifty(hall: Hall, number: int) -> list[Record]:
    """Copy fifty nodes, eight at a time, and the same bytes from one node."""
    count = fleet_size(hall.scale)
    first = hall.lab.places["machine"].address.rpartition(".")[0]
    many = tuple(f"{first}.{100 + i}" for i in range(count))
    where = ("--network", first, "--range", f"100-{99 + count}", "--jobs", "8")
    one = Sweep("nodes-one", many[:1], ("--network", first, "--range", "100", "--jobs", "8"), one=True)
    size = max(count * 4096, int(1000 * MIB * hall.scale))
    return [run_sweep(hall, plan, size, number) for plan in (Sweep("nodes-50", many, where), one)]


FLEETS: dict[str, Callable[[Hall, int], list[Record]]] = {"sweep-24": run_sweeps, "nodes-50": run_fifty}
