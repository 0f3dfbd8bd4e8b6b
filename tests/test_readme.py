"""Every command in the README is run, or, where it needs another machine, at least understood."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, find_free_port, wait_until

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
        ["sh", "-ec", script], cwd=place, env=environment(place), capture_output=True, text=True, timeout=280
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
        code = node.wait(20)
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
    for name in ("build_pyz.sh", "zbackup.py", "tests/wheels.lock"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes((HERE.parent / name).read_bytes())
    (place / "build").symlink_to(HERE.parent / "build")  # the wheels that are there already
    said = run(f"export TMPDIR='{place}'\n{command[1]}", place)
    assert said.count("2 of 2 copies good") == 2 and "The files are the same; the database is sound" in said
    assert "verify: all is well" in said
    (folder,) = place.glob("zbackup-demo-*")
    assert f"all of it lies in {folder}" in said
    assert (folder / "backups/127.0.0.10/latest/office/photo.raw").read_bytes() == (
        folder / "restored/office/photo.raw"
    ).read_bytes()


IN_ITS_OWN_CRON = """
mount -t tmpfs none /run && mount -t tmpfs none /etc/cron.d && mount -t tmpfs none /var/spool/cron/crontabs &&
mount --bind /dev/null /etc/crontab && cp "$1" /var/spool/cron/crontabs/root &&
chmod 600 /var/spool/cron/crontabs/root && exec cron -f
"""  # no other job of this machine runs, and nothing is left behind


def test_readme_cron_lines_work_as_written(place: Path) -> None:
    """Run by a real cron; at its start, so that nobody waits for the hour that they name."""
    private = ["unshare", "--mount", "sh", "-c"]
    if os.geteuid() != 0 or not shutil.which("cron") or not os.path.exists("/usr/bin/python3"):
        pytest.skip("needs root, cron (apt-get install cron) and the system's own python3")
    if subprocess.run([*private, "mount -t tmpfs none /run"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount, and its own cron is to be left alone")
    (place / "files").mkdir()
    (place / "files/bd").write_text("my data")
    port = str(find_free_port())
    text = README.replace("/usr/local/bin", str(place)).replace("/srv/backups", f"{place}/backups")
    text = text.replace("--network 192.168.1", f"--port {port}")
    rows = re.findall(r"^    ([0-9]+ [0-9*]+ \* \* [0-9*])  (.*)$", text, re.MULTILINE)
    assert [row[1].split()[2] for row in rows] == ["server", "verify", "drill"]
    lines = [line for _, line in rows] + [rows[0][1] + " --port 1"]  # where nobody is
    table = [f"XDG_CACHE_HOME={place}/cache", *map("  ".join, rows)]  # cron takes all lines or none
    for number, line in enumerate(lines):
        table.append(f"@reboot  {{ {line}; }} > {place}/{number}.said 2>&1; echo $? > {place}/{number}.code")
    (place / "crontab").write_text("\n".join(table) + "\n")
    codes = [place / f"{number}.code" for number in range(len(lines))]
    node = ["python3", "zbackup.pyz", "node", "--port", port]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(place / "log", "wb"))
        started = {"cwd": place, "env": environment(place), "stdout": output, "stderr": output}
        for command in (node, [*private, IN_ITS_OWN_CRON, "sh", str(place / "crontab")]):
            process = stack.enter_context(subprocess.Popen(command, **started))  # type: ignore[call-overload]
            stack.callback(process.terminate)
            if command is node:
                wait_until(lambda: "serving" in (place / "log").read_text(), what="the node")
                run(f"python3 zbackup.pyz server --range 9-12 --once --port {port}", place)
        done = "\n" * len(lines)
        wait_until(lambda: "".join(c.read_text()[-1:] for c in codes if c.exists()) == done, 60, "cron")
    said = [(place / f"{number}.said").read_text() for number in range(len(lines))]
    assert said[:3] == [""] * 3 and [code.read_text() for code in codes] == ["0\n"] * 3 + [f"{zbackup.NOBODY}\n"]
    assert said[3].startswith("zbackup: no node answered") and len(said[3].splitlines()) == 1
    assert len(list((place / "backups/127.0.0.9/snapshots").iterdir())) >= 2


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
