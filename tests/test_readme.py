"""Every command in the README is run, or, where it needs another machine, at least understood."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, wait_until

import zbackup

README = (HERE.parent / "README.md").read_text()


def blocks() -> dict[str, str]:
    """Return the shell blocks that are marked for this test."""
    return dict(re.findall(r"<!-- test: (\w+) -->\n```sh\n(.*?)```", README, re.DOTALL))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder with zbackup.pyz in it, and a `python` on the path."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python", "python3"):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (tools / name).chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["sh", str(HERE.parent / "build_pyz.sh"), str(home / "zbackup.pyz")], check=True)
    return home


def environment(place: Path) -> dict[str, str]:
    path = f"{place.parent / 'bin'}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return {**kept, "PATH": path, "HOME": str(place), "PYTHONUNBUFFERED": "1"}


def run(script: str, place: Path) -> str:
    """Run a block as a user would who stops at the first error."""
    done = subprocess.run(
        ["sh", "-ec", script], cwd=place, env=environment(place), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_first_backup_works_as_written(place: Path) -> None:
    script = blocks()
    log = place / "node.log"
    with open(log, "wb") as output:
        node = subprocess.Popen(
            ["sh", "-ec", "exec 2>&1\n" + script["node"].replace("python zbackup.pyz", "exec python zbackup.pyz")],
            cwd=place,
            env=environment(place),
            stdout=output,
        )
    try:
        wait_until(lambda: "serving" in log.read_text() or node.poll() is not None, what="the node")
        assert node.poll() is None, log.read_text()
        assert "127.0.0.9 (also at 127.0.0.10, 127.0.0.11, 127.0.0.12): stable" in run(script["server"], place)
        assert (place / "backups/127.0.0.9/latest/files/bd").read_text() == "my data\n"
        listed = run(script["list"], place)
        assert listed.count("files/bd") == 2  # two versions
        run(script["restore"], place)
        assert (place / "bd.copy").read_text() == "my changed data\n"
        assert (place / "yesterday/files/bd").read_text() == "my changed data\n"
        assert "1 files (16 B)" in run(script["drill"], place)
        assert "127.0.0.9/20" in run(script["prune"], place)
        assert len(list((place / "backups/127.0.0.9/snapshots").iterdir())) == 2
        assert "verify: all is well" in run(script["verify"], place)
        assert "none" in run(script["nodes"], place)
        assert "wrote zbackup.pub" in run(script["key"], place)
    finally:
        node.terminate()
        code = node.wait(10)
    assert code == 0


def test_readme_units_are_what_systemd_takes(place: Path) -> None:
    run(blocks()["unit"], place)
    units = sorted(path.name for path in place.iterdir() if path.suffix in (".service", ".timer"))
    assert units == ["zbackup-node.service", "zbackup-server.service", "zbackup-server.timer"]
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this machine")
    for name in units:
        done = subprocess.run(["systemd-analyze", "verify", f"./{name}"], cwd=place, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_readme_first_command_works_as_written(place: Path) -> None:
    command = re.search(r"```sh\n(sh build_pyz.sh && .*)\n```", README)
    assert command
    for name in ("build_pyz.sh", "zbackup.py"):
        (place / name).write_bytes((HERE.parent / name).read_bytes())
    assert "127.0.0.9 (also at 127.0.0.10, 127.0.0.11, 127.0.0.12): stable" in run(command[1], place)
    assert (place / "backups/127.0.0.9/latest/files/bd").read_bytes() == (place / "files/bd").read_bytes()


def test_readme_commands_are_understood() -> None:
    lines = [line.strip() for line in README.splitlines() if "zbackup.pyz " in line and not line.startswith("A ")]
    lines = [line for line in lines if "python" in line and "`" not in line and "&&" not in line]
    commands = [re.sub(r".*?zbackup\.pyz ", "", line) for line in lines]
    assert len(commands) > 10
    for command in commands:
        words = [word for word in shlex.split(command) if not word.startswith("@")]
        if words == ["--help"]:
            continue
        cut = next((i for i, word in enumerate(words) if word in (">", "&")), len(words))
        assert zbackup.make_parser().parse_args(words[:cut]).command == words[0]


def test_readme_exit_codes_are_those_of_the_program() -> None:
    codes = set(re.findall(r"^\| (\d+) \|", README, re.MULTILINE))
    assert codes == set(re.findall(r"(?:^|; |: |\n)(\d+) ", zbackup.EXIT_CODES))


def test_pyz_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    targets = [tmp_path / "one.pyz", tmp_path / "two.pyz"]
    for target, zone in zip(targets, ("UTC", "Asia/Tokyo")):
        script = ["sh", "-c", f"umask {'022' if zone == 'UTC' else '077'}; sh '{HERE.parent}/build_pyz.sh' '{target}'"]
        subprocess.run(script, check=True, env={**os.environ, "TZ": zone})
    assert targets[0].read_bytes() == targets[1].read_bytes()
    assert targets[0].stat().st_mode & 0o777 == 0o755
