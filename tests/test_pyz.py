"""The single file: how it is built, and how it starts on a machine that has nothing but Python."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import HERE, PROGRAM, find_free_port, wait_until

import zbackup

ROOT = HERE.parent
BUILD = ROOT / "build_pyz.sh"
WHEELS = ROOT / "build/wheels"
LOCK = HERE / "wheels.lock"
SYSTEM = "/usr/bin/python3"
STRANGER = 54321  # a user without a name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


# ---- what the tests share ----


def build(*arguments: str | Path, code: int = 0, root: Path = ROOT, **env: str) -> str:
    """Run build_pyz.sh; returns what it said."""
    command = ["sh", str(root / "build_pyz.sh"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **env})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@lru_cache(maxsize=1)
def list_pythons() -> list[str]:
    """Return the Pythons to build for: this one and the system's."""
    asked = [sys.executable] + [SYSTEM] * os.path.exists(SYSTEM)
    script = "import sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"
    found = [subprocess.run([p, "-c", script], capture_output=True, text=True).stdout for p in asked]
    return [version for version in dict.fromkeys(found) if version >= "3.10" or version == "3.9"]


@lru_cache(maxsize=1)
def load_start() -> ModuleType:
    """Return the module `start` of a .pyz."""
    path = Path(tempfile.mkdtemp()) / "start.pyz"
    build("--platform", "none", path)
    sys.path.insert(0, str(path))
    module = importlib.import_module("start")
    sys.path.remove(str(path))
    return module


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pyz for this machine."""
    platform = load_start().find_platform()
    if f"\n{platform} " not in LOCK.read_text():
        pytest.skip(f"there are no wheels for this machine ({platform or sys.platform})")
    path = tmp_path_factory.mktemp("pyz") / "zbackup.pyz"
    pythons = [word for version in list_pythons() for word in ("--python", version)]
    build("--platform", platform, *pythons, path)
    return path


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin/python")


class Machine:
    """A folder with a .pyz, a home, and a user's own temporary folder."""

    def __init__(self, path: Path, pyz: Path, python: list[str]) -> None:
        self.path = path
        self.pyz = path / "zbackup.pyz"
        shutil.copy(pyz, self.pyz)
        self.python = python
        self.home = path / "home"
        self.temporary = path / "temporary"
        for folder in (self.home, self.temporary):
            folder.mkdir()
        self.port = str(find_free_port())
        # Nothing of this user's environment, above all no PYTHONPATH and no XDG_…
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.temporary)}
        self.sweep = ["server", "--range", "9", "--port", self.port, "--once", "--timeout", "50ms"]

    @property
    def cache(self) -> Path:
        return self.home / ".cache/zbackup"

    def run(self, *arguments: str, code: int = 0, cwd: Path | None = None, **options: Any) -> str:
        """Run the .pyz to its end; returns what it said."""
        command = [*self.python, str(options.pop("pyz", self.pyz)), *arguments]
        done = subprocess.run(
            command, cwd=cwd or self.path, env=self.env, capture_output=True, text=True, timeout=60, **options
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def sweep_nothing(self, **options: Any) -> None:
        """Load pyzmq and use it: nobody answers."""
        assert "no node answered" in self.run(*self.sweep, code=zbackup.NOBODY, **options)

    def kinds(self) -> list[str]:
        """Return what the cache has, without digests."""
        return sorted(name.rpartition("-")[0] for name in os.listdir(self.cache)) if self.cache.exists() else []


CARRIED = ["backports_zstd", "program", "pyzmq"] if sys.version_info < (3, 14) else ["program", "pyzmq"]


@pytest.fixture
def machine(tmp_path: Path, pyz: Path, bare: str) -> Machine:
    return Machine(tmp_path, pyz, [bare, "-I", "-S"])


@pytest.fixture
def strange(pyz: Path) -> Iterator[Machine]:
    """A machine whose user is nobody of /etc/passwd, in a place that this user can reach."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to become another user")
    user = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "sh", "-c", 'exec "$@"', "sh"]
    pythons = [[*user, python, "-I", "-S"] for python in (os.path.realpath(sys.executable), SYSTEM)]
    works = (p for p in pythons if subprocess.run([*p, "-c", ""], capture_output=True, cwd="/").returncode == 0)
    python = next(works, None)
    if python is None:
        pytest.skip("another user can run no Python here")
    folder = Path(tempfile.mkdtemp(prefix="zbackup-test-"))
    folder.chmod(0o755)
    made = Machine(folder, pyz, python)
    for path in (folder, made.home, made.temporary):
        os.chown(path, STRANGER, STRANGER)
    yield made
    shutil.rmtree(folder)


# ---- how it starts ----


def test_backup_with_nothing_but_python(machine: Machine) -> None:
    (machine.path / "files").mkdir()
    (machine.path / "files/bd").write_text("my data " * 1000)
    log = machine.path / "log"
    command = [*machine.python, str(machine.pyz), "node", "--bind", "127.0.0.9", "--port", machine.port]
    with open(log, "wb") as output:
        node = subprocess.Popen(command, cwd=machine.path, env=machine.env, stdout=output, stderr=output)
    try:
        wait_until(lambda: "serving" in log.read_text() or node.poll() is not None, what="the node")
        # From here on the node has all that it needs.
        machine.pyz.rename(machine.path / "moved.pyz")
        machine.pyz.write_bytes(b"PK" * 100000)
        machine.pyz = machine.path / "moved.pyz"
        assert "1 of 1 copies good" in machine.run(*machine.sweep, "--timeout", "5s")
        machine.run("restore", "127.0.0.9", "--to", "restored")
    finally:
        node.terminate()
    assert node.wait(20) == 0, log.read_text()
    assert (machine.path / "restored/files/bd").read_text() == "my data " * 1000
    assert machine.kinds() == CARRIED
    assert stat.S_IMODE(machine.cache.stat().st_mode) == 0o700
    assert os.listdir(machine.temporary) == []


def test_help_imports_little_and_unpacks_nothing(machine: Machine) -> None:
    machine.python = [*machine.python, "-X", "importtime"]
    for _ in range(2):  # cold and warm
        said = machine.run("--help")
        modules = {line.rpartition("|")[2].strip().split(".")[0] for line in said.splitlines() if "|" in line}
        assert "argparse" in modules and not modules & {"zmq", "sqlite3", "asyncio", "zipfile", "subprocess"}
        assert machine.kinds() == ["program"]


def test_installed_pyzmq_is_used(machine: Machine) -> None:
    machine.python = [sys.executable]
    machine.sweep_nothing()
    assert machine.kinds() == ["program"]
    shown = machine.run("--version")
    assert shown == f"zbackup {zbackup.VERSION}\n"


def test_compiled_program_is_taken_only_whole(machine: Machine) -> None:
    machine.run("--version")
    (kept,) = machine.cache.iterdir()
    whole = kept.read_bytes()
    for broken in (whole[:-1], b"", whole[:40] + b"\0" + whole[41:]):
        kept.write_bytes(broken)
        assert machine.run("--version") == f"zbackup {zbackup.VERSION}\n"
        assert kept.read_bytes() == whole
    # It is used at all: one that says something else.
    text = b"def main(): print('from the cache'); return 0"
    code = load_start().marshal.dumps(compile(text, "x", "exec"))
    kept.write_bytes(load_start().hashlib.sha256(code).digest() + code)
    assert machine.run("--version") == "from the cache\n"


def test_places_of_the_archive(machine: Machine) -> None:
    """From another folder, by a relative path, through a symlink, with spaces in the path, as a program."""
    elsewhere = machine.path / "else where"
    elsewhere.mkdir()
    moved = elsewhere / "my zbackup.pyz"
    moved.write_bytes(machine.pyz.read_bytes())
    (machine.path / "link").symlink_to("else where")
    (machine.path / "link.pyz").symlink_to(moved)
    machine.sweep_nothing(pyz=moved, cwd=machine.home)
    machine.sweep_nothing(pyz="my zbackup.pyz", cwd=elsewhere)
    machine.sweep_nothing(pyz="../link/my zbackup.pyz", cwd=elsewhere)
    machine.sweep_nothing(pyz="link.pyz")
    assert machine.kinds() == CARRIED
    path = f"{Path(machine.python[0]).parent}:{os.environ['PATH']}"
    done = subprocess.run([machine.pyz, "--version"], env={**machine.env, "PATH": path}, capture_output=True, text=True)
    assert done.stdout == f"zbackup {zbackup.VERSION}\n"


@as_root
@pytest.mark.parametrize("home", ["their own", "read-only", "none", "root of the disk", "of another user"])
def test_homes(strange: Machine, home: str) -> None:
    if home == "read-only":
        os.chown(strange.home, 0, 0)
    elif home == "none":
        del strange.env["HOME"]
    elif home == "root of the disk":  # as systemd has it for DynamicUser=
        strange.env["HOME"] = "/"
    elif home == "of another user":
        os.chown(strange.home, 12345, 12345)
        strange.home.chmod(0o777)
    strange.sweep_nothing()
    assert strange.kinds() == (CARRIED if home == "their own" else [])
    assert os.listdir(strange.home) == ([".cache"] if home == "their own" else [])
    assert os.listdir(strange.temporary) == []


@as_root
def test_cache_that_systemd_names(strange: Machine) -> None:
    strange.env["CACHE_DIRECTORY"] = str(strange.path / "var")
    (strange.path / "var").mkdir(mode=0o755)
    os.chown(strange.path / "var", STRANGER, STRANGER)
    os.chown(strange.home, 0, 0)
    strange.sweep_nothing()
    assert sorted(name.rpartition("-")[0] for name in os.listdir(strange.path / "var")) == CARRIED


def test_temporary_folder_goes_with_a_signal(machine: Machine) -> None:
    machine.env["HOME"] = "relative"
    node = [*machine.python, str(machine.pyz), "node", "--port", machine.port, "--state", "state"]
    with subprocess.Popen(
        node, cwd=machine.path, env=machine.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as p:
        assert p.stdout
        wait_until(lambda: b"serving" in p.stdout.readline(), what="the node")
        assert len(os.listdir(machine.temporary)) > 0
        p.terminate()
        assert p.wait(20) == 0
    assert os.listdir(machine.temporary) == []


def test_two_versions_side_by_side(machine: Machine) -> None:
    other = machine.path / "source"
    (other / "tests").mkdir(parents=True)
    shutil.copy(BUILD, other)
    shutil.copy(LOCK, other / "tests")
    text = PROGRAM.read_text().replace(f'VERSION = "{zbackup.VERSION}"', 'VERSION = "99.9"')
    (other / "zbackup.py").write_text(text)
    build("--platform", "none", machine.path / "new.pyz", root=other)
    for _ in range(2):
        assert machine.run("--version") == f"zbackup {zbackup.VERSION}\n"
        assert machine.run("--version", pyz=machine.path / "new.pyz") == "zbackup 99.9\n"
    assert machine.kinds() == ["program", "program"]


def test_ten_starts_at_once(machine: Machine) -> None:
    command = [*machine.python, str(machine.pyz), *machine.sweep]
    starts = []
    for number in range(10):
        place = machine.path / str(number)
        place.mkdir()
        starts.append(subprocess.Popen(command, cwd=place, env=machine.env, stderr=subprocess.PIPE, text=True))
    said = [start.communicate(timeout=60)[1] for start in starts]
    assert [start.returncode for start in starts] == [zbackup.NOBODY] * 10, said
    assert machine.kinds() == CARRIED


def test_damaged_cache_is_mended(machine: Machine) -> None:
    machine.sweep_nothing()
    (library,) = machine.cache.glob("pyzmq-*/zmq/backend/cython/_zmq*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    machine.sweep_nothing()
    assert library.read_bytes() == whole
    next(machine.cache.glob("pyzmq-*/zmq/__init__.py")).write_text("")
    machine.sweep_nothing()
    shutil.rmtree(next(machine.cache.glob("pyzmq-*/pyzmq.libs")))
    machine.sweep_nothing()
    record = next(machine.cache.glob("pyzmq-*/*.dist-info/RECORD"))
    record.write_text("nonsense\n")
    machine.sweep_nothing()
    assert machine.kinds() == CARRIED


def test_what_is_in_the_way(machine: Machine) -> None:
    """Where the cache cannot take a wheel, a temporary folder does."""
    machine.sweep_nothing()
    folder = next(machine.cache.glob("pyzmq-*"))
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")
    machine.sweep_nothing()
    assert machine.kinds() == CARRIED and folder.is_dir()


@pytest.mark.parametrize("option", ["noexec", "size=1m"])
def test_disk_that_takes_no_wheel(machine: Machine, option: str) -> None:
    """A home without execution or without room: a temporary folder is used."""
    mount = f"mount -t tmpfs -o mode=700,{option} none '{machine.home}'"
    private = ["unshare", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here: needs root and unshare")
    machine.python = [
        *private,
        f'{mount} && "$@"; code=$?; ls "$HOME/.cache/zbackup"; exit $code',
        "sh",
        *machine.python,
    ]
    said = machine.run(*machine.sweep, code=zbackup.NOBODY)
    assert "no node answered" in said and "program-" in said and "pyzmq" not in said
    assert os.listdir(machine.temporary) == []


# ---- a cache that others could have written to ----


def make_unsafe(how: str, cache: Path) -> None:
    cache.mkdir(parents=True)
    above = cache.parent
    if how == "owned by another":
        os.chown(cache, STRANGER, STRANGER)
    elif how == "world-writable":
        cache.chmod(0o777)
    elif how == "group-writable":
        cache.chmod(0o770)
    elif how == "in a world-writable folder":
        above.chmod(0o777)
    elif how == "in another user's folder":
        os.chown(above, STRANGER, STRANGER)
    elif how == "a link to another user's folder":
        cache.rename(above / "theirs")
        os.chown(above / "theirs", STRANGER, STRANGER)
        cache.symlink_to("theirs")
    else:
        cache.rmdir()
        cache.write_text("a file")


WAYS = ["owned by another", "world-writable", "group-writable", "in a world-writable folder"]
WAYS += ["in another user's folder", "a link to another user's folder", "a file"]


@as_root
@pytest.mark.parametrize("how", WAYS)
def test_unsafe_cache_is_not_used(machine: Machine, how: str) -> None:
    make_unsafe(how, machine.cache)
    before = [] if machine.cache.is_file() else os.listdir(machine.cache)
    machine.sweep_nothing()
    assert ([] if machine.cache.is_file() else os.listdir(machine.cache)) == before == []
    assert os.listdir(machine.temporary) == []


def test_cache_of_others_code_is_not_run(machine: Machine) -> None:
    """What stands in a cache that became open to others is left alone, however right it looks."""
    machine.run("--version")
    (kept,) = machine.cache.iterdir()
    code = load_start().marshal.dumps(compile("raise SystemExit('stolen')", "x", "exec"))
    kept.write_bytes(load_start().hashlib.sha256(code).digest() + code)
    machine.cache.chmod(0o777)
    assert machine.run("--version") == f"zbackup {zbackup.VERSION}\n"


def test_folder_below_a_sticky_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o1777)
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(above / "mine"))
    assert load_start().find_cache() == str(above / "mine/zbackup")
    assert stat.S_IMODE((above / "mine").stat().st_mode) == 0o700


@as_root
def test_root_makes_nothing_in_the_home_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(tmp_path, STRANGER, STRANGER)
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_start().find_cache() == "" and os.listdir(tmp_path) == []


def test_no_user_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")  # Windows
    assert load_start().find_cache() == ""


def test_old_leftovers_are_removed(tmp_path: Path) -> None:
    start = load_start()
    for name in ("tmp-old", "pyzmq-old", "tmp-new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("program-old", "program-new"):
        (tmp_path / name).touch()
    for name in ("tmp-old", "pyzmq-old", "program-old"):
        os.utime(tmp_path / name, (0, 0))
    start.tidy(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["program-new", "pyzmq-old", "tmp-new"]


# ---- which wheel ----


@pytest.mark.parametrize(
    ("suffix", "glibc", "platform"),
    [
        (".cpython-311-x86_64-linux-gnu.so", True, "manylinux_x86_64"),
        (".cpython-39-aarch64-linux-gnu.so", True, "manylinux_aarch64"),
        (".cpython-39-x86_64-linux-gnu.so", False, "musllinux_x86_64"),
        (".cpython-312-aarch64-linux-musl.so", False, "musllinux_aarch64"),
        (".cpython-311-arm-linux-gnueabihf.so", True, ""),
        (".cpython-314t-x86_64-linux-gnu.so", True, ""),
        (".cpython-311-x86_64-linux-gnux32.so", True, ""),
        (".pypy39-pp73-x86_64-linux-gnu.so", True, ""),
        (".cpython-313-darwin.so", False, f"macosx_{os.uname().machine}"),
        (".cp311-win_amd64.pyd", False, "win_amd64"),
        (".cp314t-win_amd64.pyd", False, ""),
    ],
)
def test_platform(suffix: str, glibc: bool, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str:
        if not glibc:
            raise ValueError("unrecognized configuration name")
        return "glibc 2.36"

    monkeypatch.setattr(load_start(), "EXTENSION_SUFFIXES", [suffix])
    monkeypatch.setattr(os, "confstr", confstr)
    assert load_start().find_platform() == platform


def test_wheel_of_each_python(monkeypatch: pytest.MonkeyPatch) -> None:
    start = load_start()
    rows = [line.split() for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    for minor in range(9, 17):
        monkeypatch.setattr(sys, "version_info", (3, minor, 0, "final", 0))
        for platform in {row[0] for row in rows}:
            fitting = [row[3] for row in rows if row[0] == platform and start.serves(row[1], row[3])]
            tags = [name.split("-")[2] for name in fitting]
            assert tags == [f"cp3{min(minor, 12)}"] + [f"cp3{minor}"] * (minor < 14), (minor, platform)


def test_pyz_without_wheels_says_how_to_get_them(machine: Machine) -> None:
    build("--platform", "none", machine.path / "small.pyz")
    said = machine.run(*machine.sweep, pyz=machine.path / "small.pyz", code=1)
    platform = load_start().find_platform()
    assert len(said.splitlines()) == 1
    assert f"carries no pyzmq for Python {sys.version_info[0]}.{sys.version_info[1]} on {platform}" in said
    assert f"sh build_pyz.sh --platform {platform}" in said and "apt install python3-zmq" in said
    assert "the store" not in said and not (machine.path / "backups").exists()
    machine.run("list", pyz=machine.path / "small.pyz", code=4)  # needs none


def test_python_for_which_there_is_no_wheel(pyz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = load_start()
    monkeypatch.setattr(start, "EXTENSION_SUFFIXES", [".cpython-311-arm-linux-gnueabihf.so"])
    finder = start.Carried(start.zipimport.zipimporter(str(pyz)), "")
    with pytest.raises(ImportError, match="there is no wheel of pyzmq for Python .* on linux .*arm-linux"):
        finder.find_spec("zmq")
    assert finder.find_spec("json") is None


def test_wheel_that_crashes_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Musl wheels do so on old Alpine: not an exception, the end of the process."""
    start = load_start()
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("zmq/__init__.py", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        archive.writestr("x.dist-info/RECORD", "x.dist-info/RECORD,,\n")
    finder = start.Carried(start.zipimport.zipimporter(str(wheel)), str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    digest = start.hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(finder, "choose", lambda project: (digest, wheel.read_bytes()))
    with pytest.raises(ImportError, match=rf"cannot be used here: a trial ended with code -{signal.SIGSEGV:d}$"):
        finder.find_spec("zmq")
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.setattr(sys, "executable", "")  # a Python inside another program: no trial can be made
    assert finder.find_spec("zmq").origin.startswith(str(tmp_path / "cache/pyzmq-"))


def test_wheel_that_is_damaged_is_not_used(machine: Machine) -> None:
    with zipfile.ZipFile(machine.pyz) as archive:
        names = [i for i in archive.infolist() if "pyzmq" in i.filename]
    data = bytearray(machine.pyz.read_bytes())
    for name in names:
        data[name.header_offset + name.file_size // 2] ^= 1
    machine.pyz.write_bytes(data)
    said = machine.run(*machine.sweep, code=1)
    assert len(said.splitlines()) == 1 and "is damaged; copy the .pyz here again" in said
    assert machine.kinds() == ["program"]


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 15), (3, 8, 0)])
def test_old_python(pyz: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]) -> None:
    with zipfile.ZipFile(pyz) as archive:
        main = archive.read("__main__.py")
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=rf"needs Python 3.9 or newer; this is {version[0]}\.{version[1]}$"):
        exec(compile(main, "__main__.py", "exec"), {})
    assert b"->" not in main and b'f"' not in main  # Python 2 must be able to read it


# ---- how it is built ----


def test_same_bytes_twice(tmp_path: Path) -> None:
    platform = ["--platform", load_start().find_platform() or "none", "--python", list_pythons()[0]]
    for name, zone, umask in (("one", "UTC", "022"), ("two", "Asia/Tokyo", "077")):
        script = f'umask {umask}; exec sh "$@"'
        command = ["sh", "-c", script, "sh", str(BUILD), *platform, str(tmp_path / name)]
        subprocess.run(command, check=True, env={**os.environ, "TZ": zone, "PYTHONHASHSEED": umask})
    one = (tmp_path / "one").read_bytes()
    assert one == (tmp_path / "two").read_bytes() and one.startswith(b"#!/usr/bin/env python3\n")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("one", "two")] == [0o755, 0o755]
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    with zipfile.ZipFile(tmp_path / "one") as archive:
        names = archive.namelist()
        assert names == sorted(names) and all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        locked = {row[3]: row[2] for row in map(str.split, LOCK.read_text().splitlines())}
        for name in names:
            if name.startswith("wheels/"):
                assert load_start().hashlib.sha256(archive.read(name)).hexdigest() == locked[name[len("wheels/") :]]


def test_file_is_named_from_the_folder_that_one_is_in(tmp_path: Path) -> None:
    for arguments, made in (([], "zbackup.pyz"), (["my file"], "my file")):
        command = ["sh", os.path.relpath(BUILD, tmp_path), "--platform", "none", *arguments]
        subprocess.run(command, check=True, cwd=tmp_path)
        assert (tmp_path / made).exists()


def test_wheels_by_platform(tmp_path: Path) -> None:
    """Which wheels are asked for, told by those that an empty folder lacks."""
    rows = [line.split() for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    for row in rows:
        (tmp_path / row[3]).touch()
    cases = {
        (): [r for r in rows if r[0].startswith("manylinux")],
        ("--platform", "all"): rows,
        ("--platform", "musllinux_x86_64", "--platform", "win"): [
            r for r in rows if r[0] in ("musllinux_x86_64", "win_amd64")
        ],
        ("--platform", "macosx_arm64", "--python", "3.13"): [
            r for r in rows if r[0] == "macosx_arm64" and (r[1] == "3.13" or (r[1] == "3.12" and "pyzmq" in r[3]))
        ],
        ("--platform", "macosx_arm64", "--python", "3.15"): [
            r for r in rows if r[0] == "macosx_arm64" and r[1] == "3.12" and "pyzmq" in r[3]
        ],
    }
    for flags, wanted in cases.items():
        for row in wanted:
            (tmp_path / row[3]).unlink(missing_ok=True)
            said = build(*flags, "--wheels", tmp_path, tmp_path / "x", code=1)
            assert f"has no {row[3]}, which tests/wheels.lock names" in said, (flags, row)
            (tmp_path / row[3]).touch()
            if wanted is rows:
                break


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--platform", "amiga"], "no wheels for amiga"),
        (["--python", "3.8"], "no wheels for 3.8"),
        (["--wheel", "x"], "unknown flag --wheel"),
        (["--platform"], "--platform needs a value"),
        (["one", "two"], "one FILE at most"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in build(*arguments, code=2)
    assert not (tmp_path / "one").exists()


def test_file_that_cannot_be_made(tmp_path: Path) -> None:
    said = build("--platform", "none", tmp_path / "no folder/x.pyz", code=1)
    assert said == f"build_pyz.sh: {tmp_path}/no folder/x.pyz cannot be made: No such file or directory\n"


def test_hash_that_is_wrong(tmp_path: Path, pyz: Path) -> None:
    flags = ["--platform", load_start().find_platform(), "--python", list_pythons()[0]]
    with zipfile.ZipFile(pyz) as archive:
        for name in archive.namelist():
            if name.startswith("wheels/"):
                (tmp_path / Path(name).name).write_bytes(archive.read(name))
    build(*flags, "--wheels", tmp_path, tmp_path / "good.pyz")
    wheel = next(tmp_path.glob("pyzmq-*"))
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    said = build(*flags, "--wheels", tmp_path, tmp_path / "bad.pyz", code=1)
    assert f"{wheel} is not the wheel that tests/wheels.lock names" in said
    assert sorted(path.name for path in tmp_path.glob("*.pyz*")) == ["good.pyz"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source that has no wheels yet."""
    folder = tmp_path / "my source"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(BUILD, folder)
    shutil.copy(PROGRAM, folder)
    shutil.copy(LOCK, folder / "tests")
    return folder


def test_wheels_are_fetched_once_and_checked(source: Path, pyz: Path) -> None:
    """With pip, from a folder in the place of PyPI."""
    index = source.parent / "index"
    with zipfile.ZipFile(pyz) as archive:
        archive.extractall(index)
    flags = ["--platform", load_start().find_platform(), "--python", list_pythons()[0], source / "x.pyz"]
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    said = build(*flags, root=source, **offline)
    assert "getting pyzmq-" in said
    again = build(*flags, root=source, **{**offline, "PIP_FIND_LINKS": "/nowhere"})
    assert again == ""
    assert not list((source / "build/wheels").glob(".*"))
    shutil.rmtree(source / "build")
    wheel = next((index / "wheels").glob("pyzmq-*"))
    wheel.write_bytes(wheel.read_bytes() + b"x")
    said = build(*flags, root=source, code=1, **offline)
    assert "with the right hash" in said and not list((source / "build/wheels").iterdir())


def test_without_a_network(source: Path) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    said = build(source / "x.pyz", root=source, code=1, **offline).splitlines()
    assert "where there is no network, --wheels DIR" in said[-1] and "--platform none" in said[-1]
    assert len(said) == 2 and said[0].startswith("getting ")
    assert not (source / "x.pyz").exists()


def test_without_pip(source: Path, bare: str) -> None:
    """A Python without pip makes itself one in a virtual environment; without that, too, it says so."""
    fake = source / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *venv*) exit 1 ;; *) exec {bare} "$@" ;; esac\n')
    fake.chmod(0o755)
    said = build(source / "x.pyz", root=source, code=1, PYTHON=str(fake))
    assert len(said.splitlines()) == 1 and "has no pip" in said and "apt install python3-pip" in said


def test_build_is_shellcheck_clean() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    for script in (BUILD, HERE / "run.sh", ROOT / ".ci/run"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_start_keeps_the_rules_of_the_house(tmp_path: Path) -> None:
    load_start()
    build("--platform", "none", tmp_path / "x.pyz")
    with zipfile.ZipFile(tmp_path / "x.pyz") as archive:
        archive.extractall(tmp_path / "x")
    script = str(tmp_path / "x/start.py")
    ast.parse(Path(script).read_text(), feature_version=(3, 9))
    for command in (
        ["ruff", "check", "--config", str(ROOT / ".ruff.toml"), script],
        ["ruff", "format", "--check", "--config", str(ROOT / ".ruff.toml"), script],
        ["mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), script],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- the plain script ----


def back_up(world_path: Path, python: list[str]) -> None:
    """Make a backup with both roles run by `python zbackup.py`."""
    (world_path / "files").mkdir()
    (world_path / "files/bd").write_text("my data")
    port = ["--port", str(find_free_port())]
    env = {**os.environ, "XDG_STATE_HOME": str(world_path / "state"), "PYTHONUNBUFFERED": "1"}
    log = world_path / "log"
    with open(log, "wb") as output:
        node = subprocess.Popen([*python, "node", *port], cwd=world_path, env=env, stdout=output, stderr=output)
    try:
        wait_until(lambda: "serving" in log.read_text() or node.poll() is not None, timeout=60, what="the node")
        server = [*python, "server", "--range", "9", "--once", *port]
        done = subprocess.run(server, cwd=world_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "1 of 1 copies good" in done.stdout, done.stderr + log.read_text()
    finally:
        node.terminate()
    assert node.wait(20) == 0
    assert (world_path / "backups/127.0.0.9/latest/files/bd").read_text() == "my data"


def test_script_with_the_pyzmq_of_the_system(tmp_path: Path) -> None:
    """Debian's python3-zmq is older than that of the other tests."""
    script = "import zmq, sys; sys.exit(sys.version_info < (3, 9)); "
    if subprocess.run([SYSTEM, "-c", script], capture_output=True).returncode:
        pytest.skip(f"{SYSTEM} has no pyzmq: apt-get install python3-zmq")
    back_up(tmp_path, [SYSTEM, "-I", str(PROGRAM)])


def test_script_run_by_uv(tmp_path: Path) -> None:
    """By the metadata at the head of the script (PEP 723)."""
    uv = shutil.which("uv")
    if not uv:
        pytest.skip("uv is not installed: pip install uv")
    back_up(tmp_path, [uv, "run", "--quiet", "--python", os.path.realpath(sys.executable), str(PROGRAM)])


def test_metadata_of_the_script() -> None:
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", PROGRAM.read_text(), re.MULTILINE)
    assert block and 'requires-python = ">=3.9"' in block[1]
    assert '"pyzmq>=24"' in block[1] and "backports.zstd; python_version < '3.14'" in block[1]
