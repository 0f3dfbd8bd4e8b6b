"""Rights: what a process of either role keeps that root started with --user, and the systemd units."""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from conftest import FOLDER, PROGRAM, Process, World, uncovered, wait_until
from hypothesis import given
from hypothesis import strategies as st

import zbackup as z

USER = "nobody"
UID = pwd.getpwnam(USER).pw_uid
GID = pwd.getpwnam(USER).pw_gid
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def become_nobody() -> None:
    """What a child does before it starts its program."""
    os.setgroups([])
    os.setgid(GID)
    os.setuid(UID)


@lru_cache(maxsize=1)
def find_python() -> str:
    """Return a Python that another user can run, with pyzmq; skips the test where there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import zmq, sqlite3, sys; sys.exit(not zmq.has('curve'))"]
        try:
            if not subprocess.run(command, capture_output=True, cwd="/", preexec_fn=become_nobody).returncode:
                return python
        except OSError:
            continue
    pytest.skip(f"no Python here that {USER} can run has a pyzmq with CURVE")


@pytest.fixture
def shared() -> Iterator[World]:
    """A world that other users can look into, and in which they can write nothing; without coverage's files."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        made = World(Path(folder))
        shutil.copy(PROGRAM, made.path / "zbackup.py")
        made.env = uncovered(made.env)
        (made.files / "secret").write_text("for root alone")
        (made.files / "secret").chmod(0o600)
        made.files.chmod(0o700)
        yield made
        made.close()


def run_as_other(shared: World, *arguments: str, code: int, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with a Python that other users can run."""
    command = [find_python(), str(shared.path / "zbackup.py"), *arguments]
    done = subprocess.run(
        command, cwd=shared.path, env=shared.env, capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def read_threads(pid: int) -> list[dict[str, str]]:
    """Return what the kernel says of the rights of each thread."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = (line.partition(":") for line in path.read_text().splitlines())
        found.append({name: " ".join(value.split()) for name, _, value in lines})
    return found


def check_rights(pid: int, capabilities: int, least: int = 3) -> None:
    """Fail unless all threads are the user's, with these capabilities and no others."""
    threads = read_threads(pid)
    assert len(threads) >= least
    for thread in threads:
        assert thread["Uid"].split() == [str(UID)] * 4 and thread["Gid"].split() == [str(GID)] * 4
        assert set(thread["Groups"].split()) <= {str(GID)}
        sets = [int(thread[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")]
        assert sets == [capabilities, capabilities, 0, 0]


# ---- a node ----


def start_node(shared: World, *flags: str) -> Process:
    return shared.node("--user", USER, "--state", "state/node", "--server-key", shared.key(), *flags)


@root_only
def test_user_of_a_node_reads_all_and_is_nobody_else(shared: World) -> None:
    (shared.path / "open").mkdir()
    (shared.path / "open").chmod(0o777)
    hook = "! touch files/made; grep -h Cap /proc/self/status > open/rights; sleep 2"
    node = start_node(shared, "--before", hook)
    check_rights(node.pid, 1 << 2)
    server = shared.server("--json")
    wait_until((shared.path / "open/rights").exists)
    check_rights(node.pid, 1 << 2, 4)  # the thread of the copy, too
    assert server.process.wait(30) == 0, server.output
    assert (shared.restore() / "files/secret").read_text() == "for root alone"
    assert os.listdir(shared.files) == ["secret"]
    rights = dict(line.split() for line in (shared.path / "open/rights").read_text().splitlines())
    assert int(rights["CapEff:"], 16) == int(rights["CapPrm:"], 16) == 0  # its hooks may do less
    assert (shared.path / "open/rights").stat().st_uid == UID


@root_only
def test_user_of_a_node_has_its_key_and_keeps_it(shared: World) -> None:
    told = []
    for _ in range(2):
        node = start_node(shared)
        told.append(re.findall(r"this node's key is (\S+)", node.output))
        assert node.stop() == 0
    assert told[0] == told[1] != []
    state = shared.path / "state/node"
    modes = {str(path.relative_to(state)): path.lstat() for path in (state, *state.rglob("*"))}
    assert {found.st_uid for found in modes.values()} == {UID}
    assert {stat.S_IMODE(found.st_mode) & 0o077 for found in modes.values() if stat.S_ISDIR(found.st_mode)} == {0}
    assert stat.S_IMODE(modes[f"node-{FOLDER}-{shared.port}/key"].st_mode) == 0o600
    assert (shared.path / "state").stat().st_uid == os.geteuid()  # what leads there is not given away


@root_only
def test_user_of_a_node_at_a_low_port(shared: World) -> None:
    for port in range(1023, 500, -1):
        with socket.socket() as probe:
            if probe.connect_ex((FOLDER, port)):
                break
    shared.port = port
    node = start_node(shared)
    check_rights(node.pid, 1 << 2 | 1 << 10)
    assert shared.sweep()["nodes"][0]["snapshot"]["grade"] == "stable"


@root_only
@pytest.mark.parametrize("variable", [True, False])
def test_user_of_a_node_without_a_state_folder_named(tmp_path: Path, monkeypatch: Any, variable: bool) -> None:
    monkeypatch.setattr(z, "SYSTEM_STATE", str(tmp_path / "system/state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    if variable:
        monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "given"))
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "x")  # so that it is undone
    output: Any = Namespace(warn=pytest.fail)
    settings = z.leave_root(Namespace(user="root"), z.NodeSettings(), output)
    where = tmp_path / ("given" if variable else "system/state")
    assert (settings.state, os.environ["USER"], where.stat().st_mode & 0o777) == (str(where), "root", 0o700)
    assert [path.stat().st_mode & 0o777 for path in [where.parent] if not variable] == [0o755] * (not variable)


WITHOUT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 2, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


def start_without_the_right(shared: World) -> subprocess.Popen[str]:
    """Start a node from a root that may not read all files itself, as in a container."""
    arguments = ["node", "--user", USER, "--state", "state", "--bind", FOLDER, "--port", str(shared.port)]
    command = [sys.executable, "-c", WITHOUT, find_python(), "zbackup.py", *arguments, "--file", "files"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=shared.path, env=shared.env, **pipes)


@root_only
def test_user_of_a_node_where_the_right_cannot_be_kept(shared: World) -> None:
    shared.files.chmod(0o755)
    with start_without_the_right(shared) as node:
        assert node.stdout
        said = [node.stdout.readline() for _ in range(2)]
        row = shared.sweep(code=1)["nodes"][0]
        node.terminate()
    assert said[0] == f"this system lets {USER} keep no right to read all files: only what it may read is copied\n"
    assert said[1].startswith("serving files at ")
    assert [problem["path"] for problem in row["snapshot"]["problems"]] == ["files/secret"]


@root_only
def test_user_of_a_node_where_the_right_cannot_be_kept_keeps_no_other(shared: World) -> None:
    with start_without_the_right(shared) as node:
        assert node.stdout and node.stdout.readline() and node.stdout.readline()
        threads = read_threads(node.pid)
        node.terminate()
    assert {int(thread["CapPrm"], 16) for thread in threads} == {0}


KEPT = """
import os, sys, zbackup
done = zbackup.become_user(sys.argv[1], [int(number) for number in sys.argv[2:]])
status = open("/proc/self/status").read()
sys.stdout.write(f"{done} {os.environ['USER']} {os.environ['HOME']} {os.getresuid()} {os.getresgid()}\\n{status}")
"""


@root_only
def test_become_user_keeps_what_is_asked_for() -> None:
    """CAP_DAC_OVERRIDE is among it, so that coverage can write what it saw."""
    command = [sys.executable, "-c", KEPT, USER, "1", "2"]
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    ids = f"{(UID,) * 3} {(GID,) * 3}"
    assert done.stdout.splitlines()[0] == f"True {USER} {pwd.getpwnam(USER).pw_dir} {ids}"
    found = dict(re.findall(r"^(Cap\w+):\s+(\w+)$", done.stdout, re.M))
    assert {name: int(found[name], 16) for name in ("CapEff", "CapPrm", "CapInh")} == {
        "CapEff": 6,
        "CapPrm": 6,
        "CapInh": 0,
    }


def test_become_user_that_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "x")
    before = os.getresuid(), os.getgroups()
    me = pwd.getpwuid(os.geteuid())
    assert z.become_user(me.pw_name, [2]) is True
    assert (os.getresuid(), os.getgroups()) == before
    assert (os.environ["HOME"], os.environ["LOGNAME"]) == (me.pw_dir, me.pw_name)


def test_capabilities_where_libc_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: Namespace())
    assert z.keep_capabilities([2]) is False


# ---- a server ----


@root_only
def test_user_of_a_server_owns_the_store_and_has_no_rights(shared: World) -> None:
    shared.key()
    flags = ["--port", str(shared.port), "--range", "9", "--user", USER, "--store", "srv/backups"]
    said = run_as_other(shared, "server", "--once", *flags, "--store", "backups", code=2).stderr
    command = f"chown -R {USER} {shared.store}"
    assert said == f"zbackup: {shared.store} does not belong to {USER}: {command}\n"
    subprocess.run(shlex.split(command), check=True)
    shared.node("--server-key", shared.key())
    run_as_other(shared, "server", "--once", *flags, "--store", "backups", code=0)
    assert {path.lstat().st_uid for path in (shared.store, *shared.store.rglob("*"))} == {UID}
    assert (shared.store / FOLDER / "latest/files/secret").read_text() == "for root alone"
    # A store that is yet to be made, and a server that goes on.
    log = open(shared.path / "server.log", "wb")
    with (
        log,
        subprocess.Popen(
            [find_python(), "zbackup.py", "server", *flags], cwd=shared.path, env=shared.env, stdout=log, stderr=log
        ) as server,
    ):
        wait_until(lambda: "sweep of" in (shared.path / "server.log").read_text(), what="a sweep")
        check_rights(server.pid, 0, 1)
        server.terminate()
    modes = {path: path.lstat() for path in (shared.path / "srv/backups", *(shared.path / "srv/backups").rglob("*"))}
    assert {(found.st_uid, found.st_mode & 0o077) for found in modes.values()} == {(UID, 0)}
    assert len(modes) > 5


@root_only
def test_user_that_one_is_already(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--user", "root", "--state", "new/state")
    assert world.sweep("--user", "root", "--store", "srv/backups")["nodes"][0]["snapshot"]["grade"] == "stable"
    assert [(world.path / name).stat().st_mode & 0o777 for name in ("new/state", "srv/backups")] == [0o700, 0o700]


# ---- what is refused ----


@root_only
@pytest.mark.parametrize("what", ["folder", "file", "link"])
@pytest.mark.parametrize("role", ["node", "server"])
def test_user_whose_folder_is_anothers(world: World, role: str, what: str) -> None:
    path = world.path / "place"
    (world.path / "own").mkdir()
    os.chown(world.path / "own", UID, GID)
    if what == "folder":
        path.mkdir()
    elif what == "file":
        path.touch()
    else:
        path.symlink_to("own")
    flags = (
        ["--state", "place", "--file", "files"] if role == "node" else ["--store", "place", "--once", "--range", "9"]
    )
    done = world.run(role, "--user", USER, "--port", str(world.port), *flags, code=2)
    assert done.stderr == f"zbackup: {path} does not belong to {USER}: chown -R {USER} {path}\n"
    assert path.lstat().st_uid == 0 and os.listdir(world.path / "own") == []


@root_only
def test_user_whose_folder_cannot_be_made(world: World) -> None:
    (world.path / "file").touch()
    done = world.run("node", "--user", USER, "--state", "file/state", "--file", "files", code=2)
    assert done.stderr == f"zbackup: {world.path}/file/state cannot be made: File exists\n"


@pytest.mark.parametrize("role", [["node", "--file", "files"], ["server", "--once", "--range", "9"]])
@pytest.mark.parametrize("name", ["no-such-user", "0\x1b"])
def test_user_that_does_not_exist(world: World, role: list[str], name: str) -> None:
    done = world.run(*role, "--user", name, code=2)
    assert done.stderr == f"zbackup: --user: this machine has no user {z.show(name)}\n"
    assert not world.store.exists() and not (world.path / "state").exists()


@root_only
def test_user_that_only_root_can_become(shared: World) -> None:
    arguments = ["node", "--file", "files", "--port", str(shared.port), "--user", "root", "--state", "s"]
    done = run_as_other(shared, *arguments, code=2, preexec_fn=become_nobody)
    assert done.stderr == "zbackup: --user root: only root can become another user\n"
    os.seteuid(UID)
    try:
        with pytest.raises(z.UsageError, match="--user root: only root can become another user"):
            z.find_user("root")
        assert z.find_user(USER) == (UID, GID, pwd.getpwnam(USER).pw_dir)
    finally:
        os.seteuid(0)


# ---- descriptors ----


@pytest.mark.parametrize(("most", "limit"), [(0, 900), (500, 500), (5000, 900)])
def test_file_limit_is_raised_to_what_is_allowed(most: int, limit: int) -> None:
    script = """
import resource, sys, zbackup
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900))
zbackup.raise_file_limit(int(sys.argv[1]))
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    done = subprocess.run([sys.executable, "-c", script, str(most)], env=env, capture_output=True, text=True)
    assert done.stdout == f"{limit} {limit}\n", done.stderr


@pytest.mark.parametrize("role", [["server", "--once", "--range", "9"], ["node", "--file", "files"]])
def test_too_few_descriptors_for_libzmq(world: World, role: list[str]) -> None:
    """It ends the process where it gets none: said before."""
    command = f"ulimit -n 40; exec {sys.executable} -m zbackup {shlex.join(role)}"
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    done = subprocess.run(["sh", "-c", command], env=env, cwd=world.path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "zbackup: only 40 files can be open at once, and it takes 64: see ulimit -n\n"


# ---- units ----


def split_unit_line(line: str) -> list[str]:
    """Split what follows ExecStart= as systemd.service(5) says: quotes, backslashes, then % and $."""
    words = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line, re.S)
    escapes = {"n": "\n", "t": "\t"}
    plain = [re.sub(r"\\(.)", lambda match: escapes.get(match[1], match[1]), a or b, flags=re.S) for a, b in words]
    assert all("%" not in word.replace("%%", "") and "$" not in word.replace("$$", "") for word in plain)
    return [word.replace("%%", "%").replace("$$", "$") for word in plain]


def print_unit(world: World, *arguments: str) -> tuple[str, dict[str, str]]:
    """Return what `unit` prints, and its settings; of one that stands several times the last."""
    text = world.run("unit", *arguments).stdout
    return text, dict(line.split("=", 1) for line in text.splitlines() if re.match("[A-Z][A-Za-z]+=", line))


AWKWARD = ["--file", "/home/my files", "--exclude", '50% of $HOME "q" \\ \' ;', "--name", "a;b", "--before", "x; y | z"]
AWKWARD += ["--server-key", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"]


@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_unit_has_the_words_that_were_given(world: World, dashes: list[str]) -> None:
    text, settings = print_unit(world, "node", *dashes, *AWKWARD)
    assert split_unit_line(settings["ExecStart"]) == [sys.executable, str(PROGRAM), "node", *AWKWARD]
    assert "[Install]\nWantedBy=multi-user.target\n" in text
    assert settings["AmbientCapabilities"] == settings["CapabilityBoundingSet"] == "CAP_DAC_READ_SEARCH"
    assert (settings["DynamicUser"], settings["ProtectSystem"]) == ("yes", "strict")


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1))
def test_unit_word_is_read_as_it_was(word: str) -> None:
    assert split_unit_line(z.quote_unit_word(word)) == [word]


def test_unit_word_has_no_line_end() -> None:
    assert "\n" not in z.quote_unit_word("a\nUser=root")


@pytest.mark.parametrize("once", [["--once"], []])
@pytest.mark.parametrize("store", ["/srv/my backups", "/home/u/backups"])
def test_unit_of_a_server(world: World, once: list[str], store: str) -> None:
    flags = ["--range", "9", "--store", store, *once]
    text, settings = print_unit(world, "server", *flags)
    assert split_unit_line(settings["ExecStart"]) == [sys.executable, str(PROGRAM), "server", *flags]
    assert split_unit_line(settings["ReadWritePaths"]) == [store]
    assert (settings["User"], settings["CapabilityBoundingSet"]) == ("zbackup", "")
    assert (settings.get("Type"), "[Install]" in text) == (("oneshot", False) if once else (None, True))
    assert settings["ProtectHome"] == ("read-only" if store.startswith("/home") else "yes")


def test_unit_of_a_server_writes_where_it_may(world: World) -> None:
    settings = print_unit(world, "server", "--range", "9")[1]
    words = split_unit_line(settings["ExecStart"])
    store = words[words.index("--store") + 1] if "--store" in words else z.STORE
    assert os.path.join(settings.get("WorkingDirectory", "/"), store) == settings["ReadWritePaths"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["node", "--fiel", "/home"], "unrecognized arguments: --fiel"),
        (["node", "--port", "0"], "'0' is not a port"),
        (["server", "--once", "--every", "often"], "'often' is not a span of time"),
        (["timer", "--once"], "unit timer takes no more words; edit OnCalendar="),
        (["clock"], "invalid choice: 'clock'"),
        ([], "required: "),
    ],
)
def test_unit_with_wrong_flags(world: World, arguments: list[str], words: str) -> None:
    done = world.run("unit", *arguments, code=2)
    assert done.stdout == "" and words in done.stderr


UNITS = {
    "zbackup-node.service": ["node", *AWKWARD],
    "zbackup-server.service": ["server", "--range", "9", "--store", "/srv/my 50% backups", "--once"],
    "zbackup-loop.service": ["server", "--range", "9", "--store", "/srv/backups"],
    "zbackup-server.timer": ["timer"],
}


@pytest.fixture
def units(world: World) -> Path:
    """A folder with all units; skips where systemd's own check is missing."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed here")
    for name, arguments in UNITS.items():
        (world.path / name).write_text(world.run("unit", *arguments).stdout)
    return world.path


def test_unit_files_are_valid(units: Path) -> None:
    for name in UNITS:
        done = subprocess.run(["systemd-analyze", "verify", f"./{name}"], cwd=units, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), name


def test_unit_files_expose_little(units: Path) -> None:
    figures = {}
    for name in UNITS:
        if name.endswith(".service"):
            command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"./{name}"]
            done = subprocess.run(command, cwd=units, capture_output=True, text=True)
            if "unrecognized option" in done.stderr:
                pytest.skip("this systemd-analyze cannot judge a file")
            found = re.search(rf"Overall exposure level for {name}: ([\d.]+)", done.stdout)
            assert found, done.stdout + done.stderr
            figures[name] = float(found[1])
    assert len(figures) == 3 and max(figures.values()) < 2.5, figures


def test_units_start_both_roles_as_systemd_would(world: World) -> None:
    """Without a home, with the folders that systemd makes, from the folder that the unit names."""
    (world.files / "a").write_text("of a machine with systemd")
    flags = ["--port", str(world.port)]
    units = {
        "node": print_unit(world, "node", "--bind", "127.0.0.9", *flags, "--server-key", world.key())[1],
        "server": print_unit(world, "server", "--range", "9", "--once", *flags, "--store", "backups")[1],
    }
    state = world.path / "var"
    state.mkdir(mode=0o700)
    env = {"PATH": world.env["PATH"], "STATE_DIRECTORY": str(state), "CACHE_DIRECTORY": str(state)}
    start = {role: (split_unit_line(unit["ExecStart"]), unit["WorkingDirectory"]) for role, unit in units.items()}
    (world.path / "files/bd").write_text("what a node serves where no --file says another thing")
    with subprocess.Popen(
        start["node"][0], cwd=start["node"][1], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as node:
        try:
            assert node.stdout and "serving files/bd at 127.0.0.9" in node.stdout.readline()
            done = subprocess.run(start["server"][0], cwd=start["server"][1], env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        finally:
            node.terminate()
            node.communicate(timeout=20)
    assert (node.returncode, sorted(path.name for path in state.iterdir())) == (0, [f"node-127.0.0.9-{world.port}"])
    assert (world.store / "127.0.0.9/latest/files/bd").exists()
