#!/bin/sh
# Build zbackup.pyz, one file that runs on a machine with nothing but Python 3.9 or later:
#   sh build_pyz.sh [--platform NAME]... [--python VERSION]... [--wheels DIR] [FILE]
# It carries the wheels of pyzmq and zstd that tests/wheels.lock names for the platforms asked for
# (manylinux, both x86_64 and aarch64; or the start of a name there, `all`, or `none`) and Pythons (all).
# They come from DIR, or from PyPI into build/wheels.  The same source gives the same bytes anywhere.
set -eu

fail() {
    echo "build_pyz.sh: $1" >&2
    exit "${2:-1}"
}

here=$(cd "$(dirname "$0")" && pwd)
lock=$here/tests/wheels.lock
python=${PYTHON:-python3}
platforms='' pythons='' wheels='' target='' pip=''
while [ $# -gt 0 ]; do
    case $1 in
    --platform | --python | --wheels)
        [ $# -gt 1 ] || fail "$1 needs a value" 2
        case $1 in
        --platform) platforms="$platforms $2" ;;
        --python) pythons="$pythons $2" ;;
        --wheels) wheels=$2 ;;
        esac
        shift
        ;;
    -*) fail "unknown flag $1; see the first lines of $0" 2 ;;
    *) [ -z "$target" ] || fail "one FILE at most, not $target and $1" 2 && target=$1 ;;
    esac
    shift
done
target=${target:-zbackup.pyz}

# The rows of the lock for these platforms and Pythons.  An abi3 wheel is for all later Pythons, too.
rows=$(awk -v platforms="${platforms:-manylinux}" -v pythons="$pythons" '
    BEGIN { split(platforms, asked); count = split(pythons, versions) }
    !/^#/ {
        split($2, own, "."); wanted = !count
        for (i in versions) {
            split(versions[i], other, ".")
            if (versions[i] == $2 || ($4 ~ /-abi3-/ && other[2] + 0 > own[2] + 0)) wanted = found[versions[i]] = 1
        }
        for (i in asked) if (asked[i] == "all" || index($1, asked[i]) == 1) {
            found[asked[i]] = 1
            if (wanted && !taken[$4]++) print
        }
    }
    END {
        for (i in asked) if (asked[i] != "none" && !found[asked[i]]) print "! " asked[i]
        for (i in versions) if (!found[versions[i]]) print "! " versions[i]
    }' "$lock")
case $rows in *"! "*) fail "there are no wheels for ${rows##*! }; see $lock for those there are" 2 ;; esac

offline=$wheels
wheels=${wheels:-$here/build/wheels}
work=$(mktemp -d)
trap 'rm -rf "$work" "$wheels/.$$"' EXIT
trap 'exit 130' INT TERM

# Download one wheel of the lock: python, sha256, file name.
fetch() {
    mkdir -p "$wheels"
    tags=${3%.whl}
    version=${3#*-}
    abi=${tags%-*}
    printf '%s==%s --hash=sha256:%s\n' "${3%%-*}" "${version%%-*}" "$2" >"$work/requirement"
    if [ -z "$pip" ]; then
        pip=$python
        "$pip" -m pip --version >"$work/log" 2>&1 || # Debian has it in a package of its own
            { "$python" -m venv "$work/venv" >"$work/log" 2>&1 && pip=$work/venv/bin/python; } ||
            fail "$python has no pip to get wheels with; install it (apt install python3-pip), or see --wheels"
    fi
    echo "getting $3" >&2
    "$pip" -m pip download --quiet --retries 1 --no-deps --only-binary=:all: --require-hashes \
        --python-version "$1" --implementation cp --abi "${abi##*-}" --platform "${tags##*[.-]}" \
        --requirement "$work/requirement" --dest "$wheels/.$$" >"$work/log" 2>&1 ||
        fail "PyPI gave no $3 with the right hash ($(sed -n 's/^ERROR: //p' "$work/log" | tail -n 1)); where there \
is no network, --wheels DIR takes wheels from a folder, and --platform none makes a .pyz that needs an installed pyzmq"
    mv "$wheels/.$$/$3" "$wheels/$3"
    rmdir "$wheels/.$$"
}

while read -r _ version sha256 name; do
    if [ -n "$name" ] && [ ! -f "$wheels/$name" ]; then
        [ -z "$offline" ] || fail "$wheels has no $name, which tests/wheels.lock names; see --platform and --python"
        fetch "$version" "$sha256" "$name" </dev/null
    fi
done <<ROWS
$rows
ROWS

cat >"$work/__main__.py" <<'PYTHON'
import os
import sys

if sys.version_info < (3, 9):
    sys.exit("zbackup needs Python 3.9 or newer; this is %d.%d" % sys.version_info[:2])
sys.path[0] = os.path.abspath(sys.path[0])  # so that the archive is found from any folder, later too

from start import start

sys.exit(start())
PYTHON

cat >"$work/start.py" <<'PYTHON'
"""Start zbackup from its .pyz, and keep in the user's cache what a zip cannot give.

Compiled modules cannot be loaded from a zip: where pyzmq or zstd is not installed, its wheel is
unpacked, once.  A zip has no compiled Python: the compiled zbackup.py is kept.  All of it is
code, so it is taken only from a folder that no other user can have written to.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import re
import stat
import sys
import zipimport
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from types import CodeType, ModuleType
from typing import Callable

PROJECTS = {"zmq": "pyzmq", "backports": "backports_zstd", "backports.zstd": "backports_zstd"}
UNFINISHED, PROGRAM = "tmp-", "program-"  # how the names of the cache start, beside the projects
OLD = 30 * 86400  # s
TRIALS = {
    "pyzmq": "import sys; sys.path.insert(0, sys.argv[1]); import zmq",
    "backports_zstd": "import sys; sys.path.insert(0, sys.argv[1]); import backports.zstd",
}


def is_guarded(folder: str, user: int) -> bool:
    """Tell whether nobody but a user and root can put another folder in the place of this one."""
    found = os.lstat(folder)
    open_to_all = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, user) or open_to_all:
        return False
    above = os.path.dirname(folder)
    return above == folder or is_guarded(above, user)


def is_private(folder: str, user: int) -> bool:
    """Tell whether nobody but a user (and root) can have written into a folder."""
    found = os.lstat(folder)
    return found.st_uid == user and not found.st_mode & 0o022 and is_guarded(folder, user)


def make_private(folder: str, user: int) -> None:
    """Make a folder at need, and those above it, unless somebody else could meddle with it."""
    if not os.path.isdir(folder):
        above = os.path.dirname(folder)
        make_private(above, user)
        if is_guarded(above, user):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)


def find_cache() -> str:
    """Return the folder of this user's cache, made at need; "" where there is none that is safe."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    named = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]  # set by systemd
    folder = named or os.path.join(base, "zbackup")
    if not os.path.isabs(folder) or not hasattr(os, "geteuid"):
        return ""
    folder, user = os.path.realpath(folder), os.geteuid()
    try:
        make_private(folder, user)
        return folder if is_private(folder, user) else ""
    except OSError:
        return ""


def make_temporary() -> str:
    """Return a folder that is removed when the process ends."""
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="zbackup-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def find_platform() -> str:
    """Return this Python's platform as wheels.lock names it; "" for one that has no wheels."""
    suffix = EXTENSION_SUFFIXES[0]  # knows the processor that Python was built for, which uname may not
    match = re.fullmatch(r"\.cpython-3\d+-(\w+)-linux-(?:gnu|musl)\.so", suffix)
    if match:
        try:  # Python 3.9 and 3.10 say "gnu" on musl, too
            return ("manylinux_" if os.confstr("CS_GNU_LIBC_VERSION") else "musllinux_") + match[1]
        except (OSError, ValueError):
            return "musllinux_" + match[1]
    if re.fullmatch(r"\.cpython-3\d+-darwin\.so", suffix):
        return "macosx_" + os.uname().machine
    match = re.fullmatch(r"\.cp3\d+-(win_\w+)\.pyd", suffix)
    return match[1] if match else ""


def serves(python: str, wheel: str) -> bool:
    """Tell whether a wheel of wheels.lock is for this version of Python."""
    own, other = sys.version_info[:2], tuple(map(int, python.split(".")))
    return own == other or (own > other and "-abi3-" in wheel)


def is_whole(folder: str) -> bool:
    """Tell whether a wheel is unpacked here with no file missing or cut off."""
    try:
        (info,) = [name for name in os.listdir(folder) if name.endswith(".dist-info")]
        with open(os.path.join(folder, info, "RECORD"), encoding="utf-8") as record:
            rows = [line.rstrip("\n").rsplit(",", 2) for line in record]
        return all(os.stat(os.path.join(folder, row[0])).st_size == int(row[2]) for row in rows if row[2])
    except (OSError, ValueError, IndexError):
        return False


def try_import(folder: str, project: str) -> None:
    """Raise ImportError unless a child can import a project; a wheel that does not fit may crash its process."""
    import subprocess

    command = [sys.executable or "", "-I", "-c", TRIALS[project], folder]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError:
        return  # no child can be started: the import itself will tell
    said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if done.returncode:
        raise ImportError(said or f"a trial ended with code {done.returncode}")


def tidy(cache: str) -> None:
    """Remove what dead processes left unfinished, and programs compiled long ago."""
    import shutil
    import time

    for name in os.listdir(cache):
        path = os.path.join(cache, name)
        with contextlib.suppress(OSError):
            if name.startswith((UNFINISHED, PROGRAM)) and os.lstat(path).st_mtime < time.time() - OLD:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def put_wheel(data: bytes, folder: str, project: str) -> None:
    """Unpack a wheel at a folder in one step; raises OSError or ImportError where it cannot be used."""
    import io
    import shutil
    import tempfile
    import zipfile

    work = tempfile.mkdtemp(prefix=UNFINISHED, dir=os.path.dirname(folder))
    new, mask = os.path.join(work, "new"), os.umask(0o077)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            wheel.extractall(new)
        try_import(new, project)
        with contextlib.suppress(OSError):  # another start was quicker than this one
            if os.path.lexists(folder) and not is_whole(folder):
                os.rename(folder, os.path.join(work, "damaged"))
            os.rename(new, folder)
        if not is_whole(folder):
            raise OSError(f"{folder} is in the way")
    finally:
        os.umask(mask)
        shutil.rmtree(work, ignore_errors=True)


def read(archive: zipimport.zipimporter, name: str) -> bytes:
    """Return a file of the archive."""
    return archive.get_data(os.path.join(archive.archive, *name.split("/")))


class Carried:
    """The finder that Python asks last: it unpacks what the .pyz carries and nobody has installed."""

    def __init__(self, archive: zipimport.zipimporter, cache: str) -> None:
        self.archive = archive
        self.cache = cache
        self.folders: dict[str, str] = {}  # where each project is unpacked

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return where a module is, as the import system asks."""
        project = PROJECTS.get(name)
        if project is None:
            return None
        if project not in self.folders:
            self.folders[project] = self.unpack(project)
        return PathFinder.find_spec(name, [os.path.join(self.folders[project], *name.split(".")[:-1])])

    def choose(self, project: str) -> tuple[str, bytes]:
        """Return digest and bytes of the wheel of a project for this Python; ImportError where there is none."""
        platform = find_platform()
        rows = [line.split() for line in read(self.archive, "wheels.lock").decode().splitlines()]
        rows = [row for row in rows if row[0] == platform and row[3].startswith(project) and serves(row[1], row[3])]
        here = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform or sys.platform}"
        if not rows:
            raise ImportError(f"there is no wheel of {project} for {here} ({EXTENSION_SUFFIXES[0]})")
        try:
            return rows[0][2], read(self.archive, f"wheels/{rows[0][3]}")
        except OSError:
            build = f"sh build_pyz.sh --platform {platform}"
            raise ImportError(f"this .pyz carries no {project} for {here}; build one that does: {build}") from None

    def unpack(self, project: str) -> str:
        """Return the folder of an unpacked project: in the cache, else in a temporary place."""
        digest, data = self.choose(project)
        name, reasons = f"{project}-{digest[:32]}", []
        if self.cache and is_whole(os.path.join(self.cache, name)):
            return os.path.join(self.cache, name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ImportError(f"the {project} in this .pyz is damaged; copy the .pyz here again")
        ways: list[Callable[[], str]] = [lambda: self.cache, make_temporary]
        for find in ways:
            try:
                place = find()
                if place:
                    put_wheel(data, os.path.join(place, name), project)
                    return os.path.join(place, name)
            except (OSError, ImportError) as error:
                reasons.append(str(error))
        raise ImportError(f"the {project} in this .pyz cannot be used here: {'; '.join(dict.fromkeys(reasons))}")


def keep(path: str, data: bytes) -> None:
    """Write a file of the cache, with a digest before it, in one step."""
    temporary = os.path.join(os.path.dirname(path), UNFINISHED + os.urandom(8).hex())
    try:
        with open(temporary, "xb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def load_program(archive: zipimport.zipimporter, cache: str) -> CodeType:
    """Return zbackup.py compiled: as the cache has it, or made and kept there."""
    source = read(archive, "zbackup.py")
    key = hashlib.sha256(source + f"{sys.version} {sys.flags.optimize}".encode()).hexdigest()
    path = os.path.join(cache, f"{PROGRAM}{key[:32]}")
    with contextlib.suppress(OSError), open(path if cache else os.devnull, "rb") as file:
        digest, data = file.read(32), file.read()
        if hashlib.sha256(data).digest() == digest:
            kept: CodeType = marshal.loads(data)
            return kept
    made = compile(source, "zbackup.pyz/zbackup.py", "exec", dont_inherit=True)
    with contextlib.suppress(OSError):
        if cache:
            tidy(cache)
            keep(path, marshal.dumps(made))
    return made


def start() -> int:
    """Run zbackup with the arguments of the process; returns its exit code."""
    archive, cache = zipimport.zipimporter(sys.path[0]), find_cache()
    sys.meta_path.append(Carried(archive, cache))
    program = ModuleType("zbackup")
    program.__file__, program.__loader__ = os.path.join(sys.path[0], "zbackup.py"), archive
    sys.modules["zbackup"] = program
    exec(load_program(archive, cache), program.__dict__)
    code: int = program.main()
    return code
PYTHON

echo "$rows" | "$python" -c '
import hashlib
import os
import sys
import zipfile

target, source, work, lock, wheels = sys.argv[1:]
files = {name: os.path.join(work, name) for name in ("__main__.py", "start.py")}
files.update({"zbackup.py": source, "wheels.lock": lock})
digests = {}
for row in filter(None, sys.stdin.read().splitlines()):
    _, _, digest, name = row.split()
    files["wheels/" + name] = os.path.join(wheels, name)
    digests["wheels/" + name] = digest
temporary = "%s.%d.tmp" % (target, os.getpid())
try:
    with open(temporary, "wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(files):
                with open(files[name], "rb") as file:
                    data = file.read()
                if digests.get(name, hashlib.sha256(data).hexdigest()) != hashlib.sha256(data).hexdigest():
                    sys.exit("build_pyz.sh: %s is not the wheel that tests/wheels.lock names" % files[name])
                # Fixed date, mode and system, so that the bytes depend on the source alone.
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                info.create_system = 3
                info.external_attr = 0o100644 << 16
                archive.writestr(info, data)
    os.chmod(temporary, 0o755)
    os.replace(temporary, target)
except OSError as error:
    sys.exit("build_pyz.sh: %s cannot be made: %s" % (target, error.strerror))
finally:
    if os.path.exists(temporary):
        os.unlink(temporary)
' "$target" "$here/zbackup.py" "$work" "$lock" "$wheels"
