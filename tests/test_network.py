"""Several hosts for real: namespaces joined by veth; silence, loss, pulled cables, moving addresses."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from network import Daemon, Host, Lan, call, find_obstacle, make_lan, read_neighbours

import zbackup as z

MIB = 1 << 20


@pytest.fixture(scope="session")
def obstacle() -> str:
    """Why hosts cannot be made here; "" where they can."""
    return find_obstacle()


@pytest.fixture
def lan(tmp_path: Path, obstacle: str) -> Iterator[Lan]:
    if obstacle:
        print(obstacle)
        pytest.skip(obstacle)
    with make_lan(tmp_path) as made:
        yield made


def find_row(report: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the report of a node, by its folder."""
    rows = [row for row in report["nodes"] if row["folder"] == folder]
    assert len(rows) == 1, (folder, report)
    row: dict[str, Any] = rows[0]
    return row


def read_report(server: Daemon) -> dict[str, Any]:
    """Return the JSON report that a server in the background printed."""
    report: dict[str, Any] = json.loads(next(line for line in server.output.splitlines() if line.startswith("{")))
    return report


def check_latest(server: Host, folder: str, host: Host) -> None:
    """Check that `latest` shows just the files that a host has now."""
    found = filecmp.dircmp(server.store / folder / "latest" / "files", host.files)
    assert not found.left_only and not found.right_only, (found.left_only, found.right_only)
    same, different, odd = filecmp.cmpfiles(found.left, found.right, found.common, shallow=False)
    assert sorted(same) == sorted(os.listdir(host.files)) != [] and not different and not odd, (different, odd)


def read_history(server: Host, folder: str) -> dict[str, bytes]:
    """Return all snapshots of a folder, and what its `latest` shows."""
    base = server.store / folder
    files = [*(base / "snapshots").iterdir(), *(path for path in (base / "latest").rglob("*") if path.is_file())]
    return {str(path.relative_to(base)): path.read_bytes() for path in files}


def count_packed(server: Host) -> int:
    """Return the bytes in packs, sealed or not."""
    return sum(path.stat().st_size for path in server.store.glob("packs/**/*") if path.is_file())


# ---- the machinery itself ----


def test_lan_is_removed_after_a_failure(tmp_path: Path, lan: Lan) -> None:
    host = lan.host("a", "0.9")
    node = host.node()
    lan.hole("hole", ["10.77.0.66"])
    assert host.space in call("ip", "netns", "list")
    with pytest.raises(OSError, match="eth1"), contextlib.closing(lan):
        host.call("ip", "link", "set", "eth1", "up")
    assert f"zb{os.getpid()}-" not in call("ip", "netns", "list")
    assert node.process.poll() == 0 and "stopped" in node.output


# ---- four nodes and two black holes ----


def test_hosts_beside_black_holes(lan: Lan) -> None:
    server = lan.host("server", "0.1")
    hosts = [lan.host(f"node{number}", f"0.{number}") for number in range(9, 13)]
    lan.hole("hole", ["10.77.0.66"])
    for host in hosts:
        (host.files / host.name).write_bytes(os.urandom(300_000))
        host.node("--margin", "0s")
    where = ("--network", "10.77.0", "--range", "9-13,66-67")
    report = server.sweep(*where)
    assert 1 < report["seconds"] < 30
    neighbours = {line.split()[0]: line for line in server.call("ip", "neighbour").splitlines()}
    assert "lladdr 02:77:00:00:de:ad" in neighbours["10.77.0.66"]  # this hole answered ARP, the others did not
    assert "lladdr" not in neighbours["10.77.0.13"] + neighbours["10.77.0.67"]
    states = {row["address"]: row["state"] for row in report["nodes"]}
    assert [states.pop(f"10.77.0.{number}") for number in (13, 66, 67)] == ["silent"] * 3
    assert states == {host.address: "node" for host in hosts}
    for host in hosts:
        row = find_row(report, host.address)
        assert (row["address"], row["snapshot"]["grade"], row["snapshot"]["files"]) == (host.address, "stable", 1)
        check_latest(server, host.address, host)

    report = server.sweep(*where)
    for host in hosts:
        again = find_row(report, host.address)["snapshot"]
        assert again["changed"] == 0 and again["sent"] < 2000


# ---- a bad line ----


def test_bad_line_beside_good_ones(lan: Lan) -> None:
    """Of four nodes one has a line that loses 30 % of the frames, both ways."""
    server = lan.host("server", "0.1")
    hosts = [lan.host(f"node{number}", f"0.{number}") for number in range(9, 13)]
    for host in hosts:
        for number in range(3):
            (host.files / f"{host.name}-{number}").write_bytes(os.urandom(100_000))
        host.node("--margin", "0s")
    *good, bad = hosts
    print("the line is bad by", bad.spoil(loss=0.3, delay=0.01, seed=30))
    where = ("--network", "10.77.0", "--range", "9-12", "--timeout", "10s", "--answer-timeout", "15s")
    sent = sweeps = 0
    row: dict[str, Any] = {}
    end = time.monotonic() + 150
    while not row.get("snapshot") or row["exit_code"]:
        assert time.monotonic() < end and sweeps < 8, f"{sweeps} sweeps did not bring a copy over the bad line"
        report = server.sweep(*where, code=None, timeout=90)
        sweeps += 1
        print(f"sweep {sweeps}: {report['seconds']:.1f} s, exit code {report['exit_code']}")
        for host in good:
            snapshot = find_row(report, host.address)["snapshot"]
            assert snapshot["grade"] == "stable" and snapshot["changed"] == (3 if sweeps == 1 else 0)
        found = [row for row in report["nodes"] if row["address"] == bad.address]
        row = found[-1] if found else {}
        sent += row["snapshot"]["sent"] if row.get("snapshot") else 0
    assert row["snapshot"]["grade"] == "stable" and report["exit_code"] == 0
    assert 300_000 < sent < 310_000 + 10_000 * sweeps  # nothing that had arrived was sent again
    for host in hosts:
        check_latest(server, host.address, host)
    lost, passed = bad.count_frames()
    print(f"lost {lost} of {lost + passed} frames")
    assert lost > 20 and 0.1 < lost / (lost + passed) < 0.5


# ---- a cable ----

SIZE = 160 * MIB
IN_THE_MIDDLE = ("--pack-size", "4MiB", "--window", "1MiB")


def pull_cable(server: Host, cable: Host, process: Daemon, folder: str) -> None:
    """Pull a cable as soon as something of a node has arrived, and see that nothing comes any more."""
    wait_until(lambda: (server.store / folder / "progress.json").exists(), what="some progress")
    cable.unplug()
    assert process.process.poll() is None, process.output
    before = -1
    end = time.monotonic() + 20
    while before != count_packed(server):
        assert time.monotonic() < end, "it goes on without its cable"
        before = count_packed(server)
        time.sleep(0.5)
    assert 4 * MIB < before < SIZE - 4 * MIB


def test_cable_pulled_and_put_back_at_once(lan: Lan) -> None:
    server, host = lan.host("server", "0.1"), lan.host("a", "0.9")
    (host.files / "big").write_bytes(os.urandom(SIZE))
    host.node()
    process = server.start(*server.server_flags("--host", host.address, *IN_THE_MIDDLE, "--heartbeat", "20s"))
    pull_cable(server, host, process, host.address)
    time.sleep(1)
    assert process.process.poll() is None, process.output
    host.plug()
    assert process.wait(90) == 0, process.output
    snapshot = find_row(read_report(process), host.address)["snapshot"]
    assert snapshot["grade"] == "stable" and SIZE < snapshot["sent"] < SIZE + MIB
    check_latest(server, host.address, host)


@pytest.mark.parametrize("end", ["node", "server"])
def test_cable_pulled_until_the_sweep_ends(lan: Lan, end: str) -> None:
    server, host, other = lan.host("server", "0.1"), lan.host("a", "0.9"), lan.host("b", "0.10")
    (host.files / "a").write_text("first")  # so that there is something complete to keep
    (host.files / "big").write_bytes(os.urandom(SIZE))
    (other.files / "b").write_text("of the other node")
    for one in (host, other):
        one.node("--margin", "0s")
    where = ("--network", "10.77.0", "--range", "9-10", *IN_THE_MIDDLE, "--heartbeat", "1s", "--answer-timeout", "10s")
    cable = host if end == "node" else server
    process = server.start(*server.server_flags(*where))
    pull_cable(server, cable, process, host.address)
    assert process.wait(60) == 1, process.output
    report = read_report(process)
    row = find_row(report, host.address)
    cut = row["snapshot"]
    assert row["error"] and cut["cut_off"] == row["error"] and cut["grade"] == "partial" and cut["files"] == 1
    assert 4 * MIB < cut["sent"] < SIZE
    assert find_row(report, other.address)["snapshot"]["grade"] == "stable"

    report = server.sweep(*where, code=0 if end == "node" else 5, timeout=60)
    assert report["seconds"] < 30
    away = find_row(report, host.address)
    assert (away["state"], away["snapshot"]) == ("silent", None) and away["missing_seconds"] > 0
    assert find_row(report, other.address)["state"] == ("node" if end == "node" else "silent")

    cable.plug()
    report = server.sweep(*where, timeout=90)
    snapshot = find_row(report, host.address)["snapshot"]
    print(f"sent {cut['sent'] / MIB:.1f} MiB, then {snapshot['sent'] / MIB:.1f} of {SIZE / MIB:.0f}")
    assert snapshot["grade"] == "stable" and snapshot["files"] == 2
    assert SIZE < cut["sent"] + snapshot["sent"] < SIZE + MIB  # what had arrived was not sent again
    for one in (host, other):
        check_latest(server, one.address, one)


# ---- addresses that move ----


def list_paths(server: Host, folder: str) -> set[str]:
    """Return the paths in all snapshots of a folder."""
    with contextlib.closing(z.open_store(str(server.store))) as store, contextlib.closing(store.reader()) as reader:
        snapshots = store.node(folder).list_snapshots()
        return {z.show(e.stat.path) for snapshot in snapshots for e in z.list_entries(reader, snapshot.blocks)}


def test_address_of_a_node_changes(lan: Lan) -> None:
    """DHCP gave it another one, first while it ran, then while it was off."""
    server, host = lan.host("server", "0.1"), lan.host("a", "0.9")
    (host.files / "large").write_bytes(os.urandom(3 * MIB))
    node = host.node("--margin", "0s")
    where = ("--network", "10.77.0", "--range", "9-31")
    assert find_row(server.sweep(*where), "10.77.0.9")["snapshot"]["sent"] > 3 * MIB
    for number, address in enumerate(["10.77.0.30", "10.77.0.31"]):
        if number:
            node.stop()
        host.move(address)
        if number:
            host.node("--margin", "0s")
        (host.files / f"new{number}").write_text("new")
        report = server.sweep(*where)
        row = find_row(report, "10.77.0.9")
        assert (row["state"], row["address"], row["addresses"]) == ("node", address, [address])
        assert (row["snapshot"]["changed"], row["snapshot"]["sequence"]) == (1, 2 + number)
        assert row["snapshot"]["sent"] < 10_000
        assert not [other for other in report["nodes"] if other["folder"] and other != row]
    assert [path.name for path in server.store.iterdir() if path.name.startswith("10.")] == ["10.77.0.9"]
    assert len(list((server.store / "10.77.0.9/snapshots").glob("*.json"))) == 3
    check_latest(server, "10.77.0.9", host)


def test_addresses_of_two_nodes_are_swapped(lan: Lan) -> None:
    server, one, two = lan.host("server", "0.1"), lan.host("one", "0.9"), lan.host("two", "0.10")
    for host in (one, two):
        (host.files / host.name).write_bytes(os.urandom(MIB))
        host.node("--margin", "0s")
    where = ("--network", "10.77.0", "--range", "9-10")
    server.sweep(*where)
    one.move("")
    two.move("10.77.0.9")
    one.move("10.77.0.10")
    report = server.sweep(*where)
    for host, folder in ((one, "10.77.0.9"), (two, "10.77.0.10")):
        row = find_row(report, folder)
        assert row["address"] == host.address != folder
        assert row["snapshot"]["changed"] == 0 and row["snapshot"]["sent"] < 2000
        assert list_paths(server, folder) == {"files", f"files/{host.name}"}
        check_latest(server, folder, host)


def test_address_taken_by_another_machine(lan: Lan) -> None:
    """First while its old owner is off, then while that has come back elsewhere."""
    server, owner, newcomer = lan.host("server", "0.1"), lan.host("owner", "0.9"), lan.host("newcomer")
    (owner.files / "mine").write_bytes(os.urandom(MIB))
    (newcomer.files / "foreign").write_text("of the newcomer")
    owner.node("--margin", "0s")
    where = ("--network", "10.77.0", "--range", "9,30")
    server.sweep(*where)
    before = read_history(server, "10.77.0.9")
    assert len(before) == 2

    owner.unplug()
    newcomer.move("10.77.0.9")
    newcomer.node("--margin", "0s")
    report = server.sweep(*where, code=1)
    row = find_row(report, "10.77.0.9")
    assert (row["address"], row["state"]) == ("10.77.0.9", "refuses")
    assert "`zbackup.pyz trust 10.77.0.9 --new`" in row["error"]
    assert read_history(server, "10.77.0.9") == before

    owner.move("10.77.0.30")
    owner.plug()
    (owner.files / "later").write_text("later")
    report = server.sweep(*where)  # the newcomer gets a folder of its own now
    row = find_row(report, "10.77.0.9")
    assert row["address"] == "10.77.0.30" and row["snapshot"]["changed"] == 1 and row["snapshot"]["sent"] < 10_000
    after = read_history(server, "10.77.0.9")
    assert {name for name in after if name.startswith("snapshots/")} > {
        name for name in before if name.startswith("snapshots/")
    }
    assert all(after[name] == before[name] for name in before)
    assert list_paths(server, "10.77.0.9") == {"files", "files/mine", "files/later"}
    check_latest(server, "10.77.0.9", owner)


# ---- many silent addresses ----


@contextlib.contextmanager
def watching_neighbours() -> Iterator[list[int]]:
    """Note how many neighbours the kernel has in its table, some times a second."""
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            seen.append(read_neighbours().get("entries", 0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_addresses_without_a_machine_are_silent(lan: Lan) -> None:
    """Also when the kernel has given up on them, which libzmq tells as it tells of a refusal."""
    server, refusing = lan.host("server", "0.1"), lan.host("refusing", "0.9")
    report = server.sweep("--network", "10.77.0", "--range", "9,20-22", "--timeout", "4s", code=5)
    assert "a node without a key is open to its own machine only" in str(report["nodes"])
    states = {row["address"]: row["state"] for row in report["nodes"]}
    assert states.pop(refusing.address) == "no node"
    assert states == {f"10.77.0.{number}": "silent" for number in (20, 21, 22)}
    server.call("ip", "link", "set", "eth0", "down")
    report = server.sweep("--network", "10.77.0", "--range", "9,20", code=5)
    assert [row["state"] for row in report["nodes"]] == ["silent", "silent"]


@pytest.mark.alone
@pytest.mark.parametrize("flags", [(), ("--timeout", "300ms")], ids=["default", "impatient"])
def test_nodes_among_a_thousand_silent_addresses(lan: Lan, flags: tuple[str, ...]) -> None:
    """Each silent address holds a place in the neighbour table, of 1,024 by default, which all namespaces share."""
    server = lan.host("server", "0.1")
    hosts = [lan.host(f"node{number}", address) for number, address in enumerate(["0.9", "1.100", "2.200", "3.250"])]
    for host in hosts:
        (host.files / host.name).write_text(host.name)
        host.node()
    lan.hole("hole", [f"10.77.0.{number}" for number in range(64, 192)])
    before = read_neighbours()
    with watching_neighbours() as seen:
        report = server.sweep("--network", "10.77.0.0/22", *flags)
    after = read_neighbours()
    counts = {name: after[name] - before[name] for name in after if name in ("allocs", "res_failed", "table_fulls")}
    print(f"{report['seconds']:.1f} s, {max(seen, default=0)} neighbours at most, {counts}")
    assert {row["address"] for row in report["nodes"] if row["state"] == "node"} == {host.address for host in hosts}
    assert [row["state"] for row in report["nodes"]].count("silent") == 1017
    assert report["seconds"] < 60
    if before and before["entries"] < 64:
        assert max(seen) > 250 and counts["table_fulls"] == 0, (max(seen), counts)
    for host in hosts:
        check_latest(server, host.address, host)
