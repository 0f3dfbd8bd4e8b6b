"""Benchmark of zbackup beside the tools that people would pick instead; see run.sh.

Each workload is a folder with several versions. In each round it is made again from the same seeds; each tool copies
each version, in an order that turns from round to round; what each stored is restored and compared with the folder.
The folder and the stores are in the page cache (warm), and all that was written before is on the disk, when a clock
starts. Nothing is dropped from the cache, so disks matter where a tool asks for them (fsync), and else do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report
import trees
from data import GIB, Sources
from fleet import FLEETS, Hall
from lab import Cost, Failed, Lab, opened_lab
from peers import PEERS, Peer, Yard, choose_peers, make_keys
from results import Record, join_rows, judge, make_record, summarise, to_json
from workloads import Maker, Step, Workload, list_workloads

# Files younger than a second or two are read again by several tools, whatever their times say (a change within one
# tick of the clock would be missed). Files in real life are older; here all wait until theirs are.
SETTLE = 3.0
HURRY = 1.1  # rdiff-backup cannot make two versions within one second


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    scale: float
    rounds: int
    peers: tuple[str, ...]
    only: tuple[str, ...]
    folder: Path
    named: bool  # the tools were named, so the big rows take them all, too
    quick: bool  # nothing waits for timestamps or disks: what it measures is worth nothing


@dataclass(frozen=True)
class Turn:
    """One workload in one round."""

    plan: Plan
    workload: Workload
    number: int
    folder: Path


class Bench:
    """Runs what was asked for, and gathers the records."""

    def __init__(self, plan: Plan, lab: Lab) -> None:
        self.plan = plan
        self.lab = lab
        self.sources = Sources(plan.scale)
        self.peers = choose_peers(list(plan.peers))
        self.records: list[Record] = []
        self.commands: dict[str, str] = {}
        self.skipped: list[str] = []
        self.failures: list[str] = []
        self.keys = plan.folder / "keys"
        if any("sshd" in peer.programs for peer in self.peers.values()):
            make_keys(self.keys)

    def run(self) -> None:
        workloads = list_workloads(self.plan.scale)
        for name in (*workloads, *FLEETS):
            workload = workloads.get(name)
            if name not in self.plan.only if self.plan.only else workload and workload.extra:
                continue
            rounds = 1 if workload and workload.long else self.plan.rounds
            for number in range(rounds):
                say(f"{name}, round {number + 1} of {rounds}")
                if workload:
                    self.run_round(workload, number)
                else:
                    self.run_fleet(name, number)

    def run_fleet(self, name: str, number: int) -> None:
        if "zbackup-no-latest" in self.peers:
            hall = Hall(self.lab, self.plan.folder / "hall", self.plan.scale, self.sources)
            try:
                self.records += FLEETS[name](hall, number)
            except Failed as problem:
                self.fail(f"{name}: {problem}")

    def fail(self, problem: str) -> None:
        """Remember what went wrong: the run goes on, and ends with exit code 1."""
        self.failures.append(problem)
        say(f"FAILED: {problem}")

    def run_round(self, workload: Workload, number: int) -> None:
        """Run a workload once, with all tools together, or with each alone where space asks for it."""
        names = [p for p in self.peers if not workload.peers or self.plan.named or p in workload.peers]
        turn = number % max(1, len(names))
        names = names[turn:] + names[:turn]
        for some in [[name] for name in names] if workload.versions else [names]:
            if self.has_room(workload, len(some)):
                folder = self.plan.folder / workload.name
                folder.mkdir()
                Round(self, Turn(self.plan, workload, number, folder), some).run()
                trees.put_away(folder, self.lab.waste)

    def has_room(self, workload: Workload, tools: int) -> bool:
        needed = self.plan.scale * (workload.store * tools + 2 * workload.data)
        free = shutil.disk_usage(self.plan.folder).free
        if free < needed:
            self.skipped.append(f"{workload.name}: needs {needed / GIB:.0f} GiB of disk, {free / GIB:.0f} are free")
            say(f"without {self.skipped[-1]}")
        return free >= needed


class Round:
    """One workload, once: all versions with some tools."""

    def __init__(self, bench: Bench, turn: Turn, names: list[str]) -> None:
        self.bench = bench
        self.turn = turn
        self.names = names
        self.data = turn.folder / "machine-files" / "data"
        self.expected: dict[int, dict[str, str]] = {}
        self.size = 0

    def run(self) -> None:
        steps = self.turn.workload.steps
        self.data.mkdir(parents=True)
        self.change(steps[0], 0)
        with self.opened_peers() as peers:
            self.each(peers, lambda peer: peer.prepare())
            for number, step in enumerate(steps):
                if number:
                    self.change(step, number)
                time.sleep(HURRY if self.turn.plan.quick else SETTLE)
                self.each(peers, partial(self.back_up, step=step, number=number))
            for row, version in self.turn.workload.restores:
                number = version % len(steps)
                self.each(peers, partial(self.restore, number=number, row=row))

    @contextlib.contextmanager
    def opened_peers(self) -> Iterator[list[Peer]]:
        """Begin with each tool; whatever happens, its servers end and its folder goes."""
        with contextlib.ExitStack() as stack:
            peers = []
            for name in self.names:
                folder = self.turn.folder / name
                yard = Yard(self.bench.lab, folder, self.data, self.turn.workload.versions, self.bench.keys)
                peers.append(PEERS[name](yard))
                stack.callback(peers[-1].close)
            yield peers

    def each(self, peers: list[Peer], do: Callable[[Peer], None]) -> None:
        """Do something with each tool; one that fails is named and takes no further part in this round."""
        for peer in list(peers):
            try:
                do(peer)
            except (Failed, OSError, LookupError) as problem:
                self.bench.fail(f"{self.turn.workload.name}, {peer.name}: {problem}")
                peers.remove(peer)

    def change(self, step: Step, number: int) -> None:
        """Make the next version of the data."""
        if step.change:
            source = self.bench.sources.seeded(self.turn.workload.name, step.seed or f"step {number}")
            step.change(self.data, Maker(self.turn.plan.scale, source))
            # The newest file of all must be a small one: borg reads those of the newest timestamp again each time,
            # and one large file in a folder of its own would be that; in real life there is always a newer one.
            time.sleep(0.05)
            (self.data / "newest").write_text(f"{step.row} {number}\n")
        if step.change or not self.expected:
            self.size = trees.measure_size(self.data).apparent
        if self.is_checked(number):
            self.expected[number] = trees.digest_tree(self.data)

    def is_checked(self, number: int) -> bool:
        """Each version is checked; of many only those that are restored in the end."""
        return self.is_checked_at_once() or number in self.restored()

    def is_checked_at_once(self) -> bool:
        return not (self.turn.workload.versions or self.turn.plan.quick)

    def restored(self) -> set[int]:
        """Return the versions that are rows of the table."""
        workload = self.turn.workload
        return {version % len(workload.steps) for _, version in workload.restores}

    def sync(self) -> None:
        """Have all on the disk that was written before."""
        if not self.turn.plan.quick:
            os.sync()

    def measure(self, peer: Peer, row: str, number: int) -> Cost:
        """Make the copy with nothing left to write from before, and all that it reads in the cache."""
        command = peer.backup(number)
        said = str(command).replace(str(self.turn.folder), "…")
        self.bench.commands.setdefault(peer.name, said)
        trees.warm(self.data)
        self.sync()
        return peer.team.measure(command, f"{row}-{number}")

    def back_up(self, peer: Peer, step: Step, number: int) -> None:
        before = trees.measure_size(peer.store).allocated
        cost = self.measure(peer, step.row, number)
        self.keep(peer, step.row, cost, before)
        if self.is_checked_at_once():
            self.restore(peer, number)
        if self.is_checked(number):
            self.complain(peer, number, peer.check(self.expected[number]))

    def complain(self, peer: Peer, number: int, differences: list[str]) -> None:
        """End the tool's part in this round if it did not keep what it was given."""
        if differences:
            raise Failed("\n".join([f"{peer.name} restores version {number} wrong:", *differences]))

    def keep(self, peer: Peer, row: str, cost: Cost, before: int) -> None:
        """Add a record; what was written must be on the disk to have its size."""
        self.sync()
        name = (row, peer.name, self.turn.number)
        size = trees.measure_size(peer.store)
        self.bench.records.append(make_record(name, cost, size, self.size, before))
        say(f"  {row} {peer.name}: {cost.wall:.2f} s")

    def restore(self, peer: Peer, number: int, row: str = "") -> None:
        """Restore a version and compare it; it is a row of the table if it has a name."""
        if number != len(self.turn.workload.steps) - 1 and not peer.keeps_all() and row:
            return
        to = self.turn.folder / "restored"
        self.sync()
        cost = peer.team.measure(peer.restore(number, to), row or "check")
        differences = trees.compare(self.expected[number], trees.digest_tree(peer.root(to)))
        trees.put_away(to, self.bench.lab.waste)
        self.complain(peer, number, differences)
        if row:
            self.keep(peer, row, cost, trees.measure_size(peer.store).allocated)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def find_processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def gather_facts(bench: Bench, took: float) -> dict[str, Any]:
    """Return what the figures depend on."""
    plan = bench.plan
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{find_processor()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "sides": bench.lab.describe(),
        "page cache": "warm; all that was written before is on the disk",
        "scale": plan.scale,
        "rounds": plan.rounds,
        "minutes": round(took / 60, 1),
        "worth": "nothing: a quick run" if plan.quick else "the targets are meant for scale 1",
        "left out": "; ".join(bench.skipped) or "nothing",
        "failed": "; ".join(problem.partition(":")[0] for problem in bench.failures) or "nothing",
        "versions": {name: peer.version() for name, peer in bench.peers.items()},
        "commands": bench.commands,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    workloads = [*list_workloads(1), *FLEETS]
    parser = argparse.ArgumentParser(description="Run zbackup and other tools side by side.")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all sizes (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="how often (default 3); the table shows medians")
    parser.add_argument("--only", action="append", metavar="NAME", choices=workloads, help=f"of {', '.join(workloads)}")
    parser.add_argument("--peers", type=lambda text: text.split(","), help=f"of {','.join(PEERS)} (default all)")
    parser.add_argument("--work", type=Path, help="folder for all data (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a picture of the wall times")
    parser.add_argument("--limit", type=float, default=7200, metavar="S", help="seconds one command may take")
    parser.add_argument("--quick", action="store_true", help="wait for nothing: for tests, not for figures")
    options = parser.parse_args(arguments)
    if not set(options.peers or ()) <= set(PEERS):
        parser.error(f"--peers: choose from {', '.join(PEERS)}")
    return options


def make_plan(options: argparse.Namespace, folder: Path) -> Plan:
    return Plan(
        options.scale,
        options.rounds,
        tuple(options.peers or PEERS),
        tuple(options.only or ()),
        folder,
        bool(options.peers),
        options.quick,
    )


def write_results(bench: Bench, options: argparse.Namespace, took: float) -> None:
    """Print the table; write the files that were asked for."""
    records = join_rows(bench.records)
    table, facts = summarise(records), gather_facts(bench, took)
    print("\n".join([report.write_facts(facts), report.write_table(table), report.write_verdicts(judge(table))]))
    if options.json:
        options.json.write_text(json.dumps(to_json(records, facts), indent=1))
    if options.svg:
        options.svg.write_text(report.write_svg(table), encoding="utf-8")


def main() -> int:
    options = parse()
    begin = time.monotonic()
    # Ended from outside, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    # Below a folder that is gone at the end; its path is resolved, since the tools store what they see.
    with tempfile.TemporaryDirectory(prefix="zbackup-bench-", dir=options.work) as folder:
        peers = tuple(options.peers or PEERS)
        place = Path(folder).resolve()
        plan = Plan(
            options.scale, options.rounds, peers, tuple(options.only or ()), place, bool(options.peers), options.quick
        )
        with opened_lab(place, options.limit) as lab:
            bench = Bench(plan, lab)
            try:
                bench.run()
            finally:
                write_results(bench, options, time.monotonic() - begin)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
