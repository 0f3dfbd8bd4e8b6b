"""The benchmark at a tiny size: what is stored restores right, what it writes can be read. It never judges a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, uncovered

BENCH = HERE / "bench"
sys.path.insert(0, str(BENCH))

import data  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import trees  # noqa: E402


@pytest.fixture(scope="module")
def sources() -> data.Sources:
    return data.Sources(0.001)


def run_bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = ["--work", str(folder), "--json", str(folder / "out.json"), "--svg", str(folder / "out.svg")]
    return subprocess.run(
        [sys.executable, str(BENCH / "bench.py"), "--quick", "--scale", "0.001", "--rounds", "1", *files, *arguments],
        env=uncovered({**os.environ}),
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_lines(text: str) -> list[list[str]]:
    """Return the cells of all tables; each line of a table has as many as its head."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    for table in tables:
        assert len({len(line) for line in table}) <= 1, table
    return [line for table in tables for line in table]


def test_tools_that_are_here_store_what_restores_right(tmp_path: Path) -> None:
    """Each installed tool copies two versions, a fleet is copied; the harness itself compares what comes back."""
    done = run_bench(tmp_path, "--only", "smoke", "--only", "nodes-50")
    assert done.returncode == 0, done.stdout + done.stderr
    installed = [name for name, peer in peers.PEERS.items() if not peer.missing()]
    for name in set(peers.PEERS) - set(installed):
        print(f"not tested: {name} is not installed")
        assert f"without {name}: not installed" in done.stdout
    lines = check_lines(done.stdout)
    assert sum(line == list(report.COLUMNS) for line in lines) == 6
    wanted = {"zbackup", "zbackup-no-latest", *installed}
    assert wanted <= {line[0] for line in lines}
    check_json(json.loads((tmp_path / "out.json").read_text()), wanted)
    check_picture(tmp_path / "out.svg")
    assert not list(tmp_path.glob("zbackup-bench-*"))


def check_json(found: dict[str, Any], wanted: set[str]) -> None:
    assert {record["peer"] for record in found["records"]} == wanted
    assert {"smoke-older", "smoke-restore", "nodes-50"} <= {record["row"] for record in found["records"]}
    for record in found["records"]:
        assert set(record) == {"row", "peer", "round", *results.MEASURES}
        assert record["wall"] > 0 and record["disk"] > 0 and record["peak_vault"] >= 0
        if record["row"] in ("smoke-first", "smoke-change", "nodes-50", "nodes-one"):
            assert record["wire"] > 0
    for target in found["targets"]:
        assert target["met"] == (target["value"] <= target["bound"])


def check_picture(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    kinds = {child.tag.rpartition("}")[2] for child in root.iter()}
    assert {"title", "desc", "text"} <= kinds


# ---- the parts ----


def test_the_same_seed_makes_the_same_data(tmp_path: Path, sources: data.Sources) -> None:
    for name in ("one", "two"):
        data.make_files(tmp_path / name / "files", sources.seeded("s"), 300, 500)
        data.make_dump(tmp_path / name / "dump", sources.seeded("s"), 50_000)
        data.change_dump(tmp_path / name / "dump", sources.seeded("t"), 0.05, 3)
        data.make_image(tmp_path / name / "image", sources.seeded("s"), data.MIB)
        data.make_sqlite(tmp_path / name / "bd", sources.seeded("s"), 50_000)
        data.change_sqlite(tmp_path / name / "bd", sources.seeded("t"), 0.1)
    one, two = (trees.digest_tree(tmp_path / name) for name in ("one", "two"))
    assert one == two and any(value.startswith("link") for value in one.values())


def test_a_change_of_one_byte_mode_or_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 10)
    os.symlink("file", tmp_path / "link")
    before = trees.digest_tree(tmp_path)
    (tmp_path / "file").write_bytes(b"a" * 9 + b"b")
    assert [line.split(":")[0] for line in trees.compare(before, trees.digest_tree(tmp_path))] == ["file"]
    (tmp_path / "file").write_bytes(b"a" * 10)
    (tmp_path / "file").chmod(0o600)
    assert len(trees.compare(before, trees.digest_tree(tmp_path))) == 1
    (tmp_path / "link").unlink()
    assert len(trees.compare(before, trees.digest_tree(tmp_path))) == 2


def test_a_tree_that_is_put_away_keeps_its_inodes(tmp_path: Path) -> None:
    for _ in range(2):
        root = tmp_path / "tree"
        (root / "folder").mkdir(parents=True)
        (root / "folder/file").write_bytes(b"a" * 10_000)
        os.symlink("/dev/full", root / "link")
        before = trees.measure_size(root)
        inode = (root / "folder/file").stat().st_ino
        trees.put_away(root, tmp_path / "waste")
        assert not root.exists() and before.apparent > 10_000
        assert inode in {path.stat().st_ino for path in (tmp_path / "waste").glob("*/folder/file")}
    assert trees.measure_size(tmp_path / "waste").apparent < before.apparent + 10_000


def test_holes_are_zeros_and_places_count(tmp_path: Path) -> None:
    hole, dense, moved = (tmp_path / name for name in ("hole", "dense", "moved"))
    with open(hole, "wb") as out:
        out.seek(5 * data.MIB)
        out.write(b"end")
    dense.write_bytes(bytes(5 * data.MIB) + b"end")
    moved.write_bytes(bytes(4 * data.MIB) + b"end" + bytes(data.MIB))
    digests = [trees.digest_file(str(path)) for path in (hole, dense, moved)]
    assert digests[0] == digests[1] != digests[2]


def record(row: str, peer: str, wall: float, number: int = 0) -> results.Record:
    return results.Record(row, peer, number, wall, 1, 1, 5, 5, 10, 20, 20, 7, 100)


def test_medians_and_verdicts_follow_from_what_was_measured() -> None:
    walls = {"zbackup": (1.0, 9.0, 2.0), "rsync-ssh": (2.5, 2.0, 2.0)}
    records = [record("sqlite-first", peer, wall, i) for peer, some in walls.items() for i, wall in enumerate(some)]
    table = results.summarise(records)
    assert table["sqlite-first"]["zbackup"]["wall"] == results.Middle(2.0, 1.0, 9.0)
    verdict = next(v for v in results.judge(table) if v.target.against == "rsync-ssh")
    assert (verdict.value, verdict.bound, verdict.met) == (2.0, 2.0, True)
    slower = results.summarise([record("sqlite-first", "zbackup", 2.1), record("sqlite-first", "rsync-ssh", 2.0)])
    assert not results.judge(slower)[0].met
    assert "NO" in report.write_verdicts(results.judge(slower))


def test_a_row_of_several_copies_adds_up() -> None:
    joined = results.join_rows([record("versions-20", "restic", 1.0), record("versions-20", "restic", 2.0)])
    assert [(r.wall, r.added, r.disk, r.peak_vault) for r in joined] == [(3.0, 14, 20, 5)]


def test_a_tool_that_restores_wrong_fails_the_run(tmp_path: Path) -> None:
    """A copy that is not what was there must never become a row that looks well."""
    liar = "import bench, peers, sys\n"
    liar += "peers.Mirror.restore = lambda self, number, to: self.on('vault', 'mkdir', str(to))\n"
    liar += "sys.exit(bench.main())\n"
    if peers.PEERS["rsyncd"].missing():
        pytest.skip("rsync is not installed")
    flags = ["--quick", "--scale", "0.0001", "--rounds", "1", "--only", "smoke", "--peers", "rsyncd"]
    done = subprocess.run(
        [sys.executable, "-c", liar, *flags],
        env=uncovered({**os.environ, "PYTHONPATH": str(BENCH), "TMPDIR": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "restores version 1 wrong" in done.stderr, done.stderr
