"""Chapter 9, NODE, its first half: roots, exclusion, the listing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import World, make_database

import zbackup
from zbackup import Ask, Clock, Exclude, Files, NodeSettings, Source, Spool, Stat, UsageError

ROOT = os.geteuid() == 0
NOBODY = 65534


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="zbackup-test-", dir="/tmp"))
    path.chmod(0o755)
    (path / "files").mkdir()
    yield path
    shutil.rmtree(path)


def make_source(base: Path, *files: str, clock: Clock | None = None, **settings: Any) -> Source:
    """Return a Source of `files` (default: all of base/files)."""
    told = NodeSettings(files=files or ("files",), **settings)
    roots, _ = zbackup.list_roots(told.files, str(base))
    return Source(told, clock or zbackup.make_clock(), roots, Spool(str(base / "spool")))


def scan(base: Path, *files: str, **settings: Any) -> dict[bytes, Stat]:
    """Scan, check what holds for every listing, and return it by path."""
    source = make_source(base, *files, **settings)
    stats = list(zbackup.scan(source))
    source.close()
    keys = [zbackup.path_key(stat.path) for stat in stats]
    assert all(a < b for a, b in zip(keys, keys[1:])), "not strictly sorted"
    for stat in stats:
        assert zbackup.decode_stat(zbackup.encode_stat(stat)) == stat
    return {stat.path: stat for stat in stats}


def read(base: Path, path: bytes, *files: str, **settings: Any) -> dict[str, Any]:
    """Return the fields that answer a READ of the first chunk of `path`."""
    source = make_source(base, *files, **settings)
    reader = Files(source)
    try:
        return reader.read(Ask(path, 0, [], b""))[0]
    finally:
        reader.close()
        source.close()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root's rights for a while; another user has none to drop."""
    import grp  # noqa: F401  # nobody might not reach this Python's modules
    import pwd  # noqa: F401

    if ROOT:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if ROOT:
            os.seteuid(0)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Mount a tmpfs, or skip the test."""
    done = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


# ---- roots ----


def names_of(base: Path, *files: str) -> list[bytes]:
    return [root.stored for root in zbackup.list_roots(files, str(base))[0]]


def test_roots_named_as_given(tree: Path) -> None:
    (tree / "files/bd").touch()
    inside = os.fsencode(tree).strip(b"/")
    for given, stored in {
        "files/bd": b"files/bd",
        "./files//bd": b"files/bd",
        "files/": b"files",
        "files/../files/bd": b"files/bd",
        str(tree / "files/bd"): inside + b"/files/bd",
        ".": inside,
        "..": os.fsencode(tree.parent).strip(b"/"),
        f"../{tree.name}/files": b"files",
        "/": b"",
    }.items():
        roots, missing = zbackup.list_roots([given], str(tree))
        assert ([root.stored for root in roots], missing) == ([stored], []), given
        assert os.path.samefile(roots[0].real, tree / given), given


def test_root_whose_name_starts_with_two_dots(tree: Path) -> None:
    (tree / "..data").touch()
    assert names_of(tree, "..data") == [b"..data"]


def test_root_below_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names_of(tree.parent, "~/files") == [os.fsencode(tree / "files").strip(b"/")]


def test_roots_from_globs(tree: Path) -> None:
    for name in ("a.db", "b.db", "c.txt", "[x].db", "x.db"):
        (tree / "files" / name).touch()
    (tree / "files/deep/er").mkdir(parents=True)
    (tree / "files/deep/er/d.db").touch()
    assert names_of(tree, "files/[ab].db") == [b"files/a.db", b"files/b.db"]
    assert names_of(tree, "files/[x].db") == [b"files/[x].db"], "what exists by that name is meant"
    assert names_of(tree, "files/**/d.db") == [b"files/deep/er/d.db"]
    assert names_of(tree, "fil?s/*.db", "files/a.db")[:2] == [b"files/[x].db", b"files/a.db"]


def test_roots_nested_in_another_dropped(tree: Path) -> None:
    for name in ("files/a", "files/a/b", "files-2", "files.x"):
        (tree / name).mkdir()
    found = names_of(tree, "files/a/b", "files-2", "files", "files/a", "files.x")
    assert found == [b"files", b"files-2", b"files.x"]
    assert names_of(tree, "files", "/") == [b""]


def test_roots_missing_reported(tree: Path) -> None:
    (tree / "dangling").symlink_to("nowhere")
    roots, missing = zbackup.list_roots(["files", "no", "files/*.no", "/no/such", "dangling"], str(tree))
    assert [root.stored for root in roots] == [b"dangling", b"files"]
    assert missing == ["no", "files/*.no", "/no/such"]


def test_roots_with_one_name_refused(tree: Path) -> None:
    absolute = tree / "files"
    twin = tree / str(absolute).strip("/")
    twin.mkdir(parents=True)
    with pytest.raises(UsageError, match="another file has the name"):
        zbackup.list_roots([str(absolute), str(twin.relative_to(tree))], str(tree))
    assert len(names_of(tree, "files", "files")) == 1


# ---- exclusion ----

PATHS = (
    b"a a.tmp .a.tmp b A c/a c/a.tmp c/b/a c/b/x.tmp c/d/e/f x/y/z x/q/z x/z xz foo foo/bar foo/bar/baz foobar "
    b"barfoo q/foo q/foobar/a [x] #c !n a\\b a-b ab a^b a]b aXb w/a/b w/a-b w/a+b w/axb 1 2 z".split()
)
PATTERNS = """
a|a.tmp|*.tmp|/a|/*.tmp|c/|c|/c/|c/a|/c/a|c/*|c/**|c/*/a|**/a|**/x.tmp|c/**/a|c/**/f|x/**/z|x/?/z|x/*/z
foo|foo/|/foo|foo/bar|foo*|*foo|foo/*|foo/**|**/foo|**/foo/bar|f?o|fo[no]|[a-c]|[!a-c]|[^a-c]|[a-]b|a[-x]b|a[]X]b
\\#c|\\!n|\\a|a\\\\b|a[X^]b|*|**|*/|/*|/**|**/|?|??|x?|a*b|a**b|c/d/**/f|**/d/**|c/**/|*/*|*/*/*|w/a?b|w/a*b
*,!a|*.tmp,!a.tmp|*.tmp,!/a.tmp|/*,!/c|foo/*,!foo/bar|foo,!foo/bar|c/*,!c/b/|*,!*/,!*.tmp|a,!a,a|!a,a|!a|c/**,!c/a
A|[A-Z]|[1-2]|c/b/|x/y/|*z|/x/*|x//z|a b|w/a[!x]b|nothing
""".replace("\n", "|").strip("|")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch repository in which all PATHS exist."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    top = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", top], check=True)
    for path in sorted(PATHS, key=len, reverse=True):
        place = os.path.join(os.fsencode(top), path)
        if not os.path.exists(place):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            open(place, "wb").close()
    return top


def ignored_by_git(repository: Path, patterns: list[str]) -> set[bytes]:
    (repository / ".gitignore").write_text("".join(f"{pattern}\n" for pattern in patterns))
    done = subprocess.run(
        ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index", "-z", "--stdin"],
        cwd=repository,
        input=b"\0".join(PATHS),
        stdout=subprocess.PIPE,
    )
    return set(done.stdout.split(b"\0")) - {b""}


def ignored_by_us(repository: Path, patterns: list[str]) -> set[bytes]:
    exclude, found = Exclude(patterns), set()
    for path in PATHS:
        parts = path.split(b"/")
        for depth in range(1, len(parts) + 1):
            above = b"/".join(parts[:depth])
            if exclude.matches(above, os.path.isdir(os.path.join(os.fsencode(repository), above))):
                found.add(path)
                break
    return found


def test_exclude_as_git_does(repository: Path) -> None:
    wrong = {}
    for line in PATTERNS.split("|"):
        patterns = line.split(",")
        ours, gits = ignored_by_us(repository, patterns), ignored_by_git(repository, patterns)
        if ours != gits:
            wrong[line] = {"only ours": sorted(ours - gits), "only git's": sorted(gits - ours)}
    assert not wrong


@pytest.mark.parametrize("pattern", ["w/a[^x]b", "w/a[*-9]b"])
def test_exclude_class_never_matches_a_slash(repository: Path, pattern: str) -> None:
    assert ignored_by_us(repository, [pattern]) == ignored_by_git(repository, [pattern])


@pytest.mark.parametrize("pattern", ["a[[:upper:]]b", "a[!]x]b", "a[X\\-]b", "a[\\]]b"])
def test_exclude_rare_classes(repository: Path, pattern: str) -> None:
    assert ignored_by_us(repository, [pattern]) == ignored_by_git(repository, [pattern])


@pytest.mark.parametrize("pattern", ["[z-a]", "[^]"])
def test_exclude_class_that_is_none(pattern: str) -> None:
    with contextlib.suppress(UsageError):
        assert not Exclude([pattern]).matches(b"m", False)


def test_exclude_any_bytes_and_lines() -> None:
    assert Exclude(["*.tmp"]).matches(b"a/b\nc\xff.tmp", False)
    assert not Exclude(["*.tmp"]).matches(b"a.tmp\n", False)
    assert Exclude([os.fsdecode(b"\xff*")]).matches(b"\xff1", False)
    assert not Exclude(["", "/", "!", "  "]).matches(b"a", True)


def test_excluded_neither_listed_nor_readable(tree: Path) -> None:
    for name in ("keep", "cache/a", "cache/deep/b", "x.tmp", "sub/x.tmp", "sub/keep"):
        (tree / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "files" / name).write_text("data")
    patterns = ("cache/", "*.tmp")
    listed = scan(tree, exclude=patterns)
    assert set(listed) == {b"files", b"files/keep", b"files/sub", b"files/sub/keep"}
    for path in (b"files/cache/a", b"files/cache/deep/b", b"files/x.tmp", b"files/sub/x.tmp"):
        assert read(tree, path, exclude=patterns) == {"status": "gone"}
    assert read(tree, b"files/sub/keep", exclude=patterns)["status"] == "whole"


def test_root_that_a_pattern_matches_is_served(tree: Path) -> None:
    (tree / "files/bd").write_text("data")
    assert set(scan(tree, "files/bd", exclude=["bd"])) == {b"files", b"files/bd"}
    assert read(tree, b"files/bd", "files/bd", exclude=["bd"])["status"] == "whole"


# ---- the listing ----


def test_scan_order_where_a_name_starts_with_a_folders(tree: Path) -> None:
    names = ["a/x", "a!", "a-b", "a.b", "a0", "a\x01", "b"]
    for name in names:
        (tree / "files" / name).parent.mkdir(exist_ok=True)
        (tree / "files" / name).touch()
    listed = [path.removeprefix(b"files/") for path in scan(tree)]
    assert listed == [b"files", b"a", b"a/x", b"a\x01", b"a!", b"a-b", b"a.b", b"a0", b"b"]


def test_scan_lists_the_folders_above_roots_once(tree: Path) -> None:
    (tree / "files/a/b").mkdir(parents=True)
    (tree / "files/a").chmod(0o2751)
    for name in ("files/a/b/1", "files/a/b/2", "files/a/z", "files/hidden"):
        (tree / name).write_text(name)
    listed = scan(tree, "files/a/b/2", "files/a/z", "files/a/b/1")
    assert list(listed) == [b"files", b"files/a", b"files/a/b", b"files/a/b/1", b"files/a/b/2", b"files/a/z"]
    assert (listed[b"files/a"].kind, listed[b"files/a"].mode) == ("directory", 0o2751)
    assert read(tree, b"files/hidden", "files/a/z") == {"status": "gone"}


def test_scan_says_what_stat_says(tree: Path) -> None:
    path = tree / "files/a"
    path.write_bytes(b"x" * 5000)
    path.chmod(0o4711)
    os.utime(path, ns=(1, -1_500_000_001))
    found, stat = path.stat(), scan(tree)[b"files/a"]
    assert (stat.kind, stat.mode, stat.size, stat.mtime) == ("file", 0o4711, 5000, -1_500_000_001)
    assert (stat.ctime, stat.inode, stat.uid, stat.gid) == (
        found.st_ctime_ns,
        found.st_ino,
        found.st_uid,
        found.st_gid,
    )
    assert (stat.user, stat.device, stat.links, stat.sparse) == (path.owner(), 0, 1, False)


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_scan_owner_without_a_name(tree: Path) -> None:
    (tree / "files/a").touch()
    os.chown(tree / "files/a", 4123456, 4123457)
    stat = scan(tree)[b"files/a"]
    assert (stat.uid, stat.gid, stat.user, stat.group) == (4123456, 4123457, "", "")


def test_scan_does_not_follow_symlinks(tree: Path) -> None:
    (tree / "secret").mkdir()
    (tree / "secret/key").write_text("secret")
    (tree / "files/folder").symlink_to(tree / "secret")
    (tree / "files/file").symlink_to("../secret/key")
    (tree / "files/odd").symlink_to(b"\xff\n")
    (tree / "link").symlink_to("secret")
    listed = scan(tree, "files", "link")
    assert set(listed) == {b"files", b"files/folder", b"files/file", b"files/odd", b"link"}
    assert {listed[path].kind for path in listed} == {"directory", "symlink"}
    assert (listed[b"files/odd"].target, listed[b"link"].target) == (b"\xff\n", b"secret")
    for path in (b"files/folder/key", b"files/file", b"link/key", b"link"):
        assert read(tree, path, "files", "link") == {"status": "gone"}


def test_scan_lists_special_files_without_waiting(tree: Path) -> None:
    os.mkfifo(tree / "files/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tree / "files/socket"))
    kinds = {b"files/fifo": "fifo", b"files/socket": "socket"}
    if ROOT:
        os.mknod(tree / "files/block", 0o600 | 0o060000, os.makedev(7, 99))
        os.mknod(tree / "files/null", 0o600 | 0o020000, os.makedev(1, 3))
        kinds.update({b"files/block": "block", b"files/null": "character"})
    listed = scan(tree)
    assert {path: listed[path].kind for path in kinds} == kinds
    if ROOT:
        assert listed[b"files/block"].rdev == os.makedev(7, 99)
    for path in kinds:
        assert read(tree, path) == {"status": "gone"}


def test_scan_any_file_name(tree: Path) -> None:
    names = [
        b"new\nline",
        b"\xff\xfe",
        "ümläut".encode(),
        b"\x01\x7f\x1b[31m",
        b" ",
        b"...",
        b"\t",
        b"a\\b",
        b"x" * 255,
    ]
    for name in names:
        with open(os.path.join(os.fsencode(tree), b"files", name), "wb") as file:
            file.write(b"data")
    listed = scan(tree)
    assert set(listed) == {b"files"} | {b"files/" + name for name in names}
    assert {read(tree, b"files/" + name)["status"] for name in names} == {"whole"}


def make_deep(folder: Path, levels: int, name: str) -> None:
    """Make folders in each other, deeper than one path can say, and a file in the last one."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        above, fd = fd, os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(above)
    file = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(file, b"data")
    os.close(file)
    os.close(fd)


def test_scan_deeper_than_a_path_can_say(tree: Path) -> None:
    make_deep(tree / "files", 1200, "abcd")
    try:
        listed = scan(tree)
        deepest = b"files/" + b"abcd/" * 1200 + b"file"
        assert len(listed) == 1202
        assert listed[deepest].size == 4
        assert read(tree, deepest)["status"] == "whole"
    finally:
        subprocess.run(["rm", "-rf", tree / "files"], check=True)


def test_path_beyond_the_limit_costs_only_itself(world: World) -> None:
    (world.files / "good").write_text("data")
    make_deep(world.files, 150, "x" * 250)
    try:
        world.node()
        report = world.sweep("--no-latest", code=1)
        assert "too long" in json.dumps(report["nodes"][0]["snapshot"]["problems"])
        assert world.listed("127.0.0.9", "files/good")
    finally:
        subprocess.run(["rm", "-rf", world.files], check=True)


def test_scan_folder_of_20000_entries(tree: Path) -> None:
    numbers = list(range(20000))
    random.shuffle(numbers)
    folder = os.open(tree / "files", os.O_RDONLY)
    for number in numbers:
        os.close(os.open(f"{number}", os.O_CREAT, dir_fd=folder))
    os.close(folder)
    assert len(scan(tree)) == 20001


def test_scan_what_may_not_be_read(open_folder: Path) -> None:
    files = open_folder / "files"
    (files / "closed").mkdir()
    (files / "closed/a").write_text("data")
    (files / "blind").mkdir()
    (files / "blind/a").write_text("data")
    (files / "secret").write_text("data")
    (files / "good").write_text("data")
    (files / "secret").chmod(0)
    (files / "closed").chmod(0)
    (files / "blind").chmod(0o444)
    if ROOT:
        (open_folder / "spool").mkdir(0o700)
        os.chown(open_folder / "spool", NOBODY, NOBODY)
    with as_nobody():
        listed = scan(open_folder)
        secret, good = read(open_folder, b"files/secret"), read(open_folder, b"files/good")
        closed = read(open_folder, b"files/closed/a")
    for name in ("closed", "blind"):
        (files / name).chmod(0o755)
    assert listed[b"files/closed"].kind == "directory"
    assert listed[b"files/closed"].error == "Permission denied"
    assert listed[b"files/blind/a"].error == "Permission denied"
    assert listed[b"files/good"].error == ""
    assert (secret, closed) == ({"status": "error", "error": "Permission denied"},) * 2
    assert good["status"] == "whole"


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_scan_one_file_system(tree: Path) -> None:
    (tree / "files/mount").mkdir()
    with mounted(tree / "files/mount"):
        (tree / "files/mount/a").write_text("data")
        listed = scan(tree, one_file_system=True)
        assert b"files/mount/a" in scan(tree)
    assert listed[b"files/mount"].kind == "directory"
    assert b"files/mount/a" not in listed


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_read_one_file_system(tree: Path) -> None:
    (tree / "files/mount").mkdir()
    with mounted(tree / "files/mount"):
        (tree / "files/mount/a").write_text("data")
        assert read(tree, b"files/mount/a", one_file_system=True) == {"status": "gone"}


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_root_that_is_a_mount_is_entered(tree: Path) -> None:
    with mounted(tree / "files"):
        (tree / "files/a").write_text("data")
        assert b"files/a" in scan(tree, one_file_system=True)


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_mount_named_beside_a_folder_above_it(tree: Path) -> None:
    for name in ("mount", "other"):
        (tree / "files" / name).mkdir()
    with mounted(tree / "files/mount"), mounted(tree / "files/other"):
        (tree / "files/mount/deep").mkdir()
        (tree / "files/mount/deep/a").write_text("data")
        (tree / "files/other/b").write_text("data")
        named = ("files", "files/mount")
        listed = scan(tree, *named, one_file_system=True)
        assert read(tree, b"files/mount/deep/a", *named, one_file_system=True)["status"] == "whole"
        assert read(tree, b"files/other/b", *named, one_file_system=True) == {"status": "gone"}
        inside = scan(tree, "files", "files/mount/deep", one_file_system=True)
    assert b"files/mount/deep/a" in listed
    assert b"files/other" in listed and b"files/other/b" not in listed
    assert set(inside) == {b"files", b"files/mount", b"files/mount/deep", b"files/other"} | {b"files/mount/deep/a"}


def test_named_inside_what_is_excluded(tree: Path) -> None:
    """As one that is named alone: a pattern does not hide it, but what lies beside it."""
    for name in ("cache/keep/a", "cache/keep/x.tmp", "cache/b", "b"):
        (tree / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "files" / name).write_text("data")
    named, patterns = ("files", "files/cache/keep"), ["cache", "*.tmp"]
    listed = scan(tree, *named, exclude=patterns)
    above = {b"files", b"files/cache", b"files/cache/keep"}
    assert set(listed) == above | {b"files/b", b"files/cache/keep/a"}
    assert read(tree, b"files/cache/keep/a", *named, exclude=patterns)["status"] == "whole"
    for path in (b"files/cache/b", b"files/cache/keep/x.tmp"):
        assert read(tree, path, *named, exclude=patterns) == {"status": "gone"}


def test_named_deep_inside_what_is_excluded(tree: Path) -> None:
    """What lies beside the way to it stays out, on every level."""
    for name in ("cache/x/keep/k", "cache/x/secret", "cache/x/deep/er/secret", "cache/no", "a"):
        (tree / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "files" / name).write_text("data")
    listed = scan(tree, "files", "files/cache/x/keep", exclude=["cache"])
    above = {b"files", b"files/cache", b"files/cache/x", b"files/cache/x/keep"}
    assert set(listed) == above | {b"files/a", b"files/cache/x/keep/k"}


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_named_behind_a_mount_on_a_folder_of_the_first_filesystem(tree: Path) -> None:
    (tree / "files/mount").mkdir()
    (tree / "else/x/keep").mkdir(parents=True)
    (tree / "else/x/keep/k").touch()
    (tree / "else/secret").touch()
    with mounted(tree / "files/mount"):
        (tree / "files/mount/back").mkdir()
        subprocess.run(["mount", "--bind", tree / "else", tree / "files/mount/back"], check=True)
        try:
            listed = scan(tree, "files", "files/mount/back/x/keep", one_file_system=True)
        finally:
            subprocess.run(["umount", tree / "files/mount/back"], check=True)
    assert b"files/mount/back/x/keep/k" in listed
    assert b"files/mount/back/secret" not in listed


def test_many_that_match_are_not_named_one_by_one(tree: Path) -> None:
    """A pattern that finds what lies in a folder which it finds, too, says nothing against --exclude."""
    for name in ("a", "a.tmp", "sub/b.tmp", "sub/c"):
        (tree / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "files" / name).write_text("data")
    (tree / "files/link").symlink_to("sub")
    roots, missing = zbackup.list_roots(["files/**"], str(tree))
    assert ([(root.stored, root.inner) for root in roots], missing) == ([(b"files", ())], [])
    listed = scan(tree, "files/**", exclude=["*.tmp"])
    assert set(listed) == {b"files", b"files/a", b"files/link", b"files/sub", b"files/sub/c"}


def test_named_behind_a_symlink_is_told_of(tree: Path) -> None:
    """The folder above it copies the link alone."""
    (tree / "real").mkdir()
    (tree / "real/a").touch()
    (tree / "files/link").symlink_to(tree / "real")
    (tree / "files/sub").mkdir()
    (tree / "files/sub/b").touch()
    roots, missing = zbackup.list_roots(["files", "files/link/a", "files/sub/b", "files/link"], str(tree))
    assert [(root.stored, root.inner) for root in roots] == [(b"files", (b"files/link", b"files/sub/b"))]
    assert (roots[0].behind, missing) == ((os.fsencode(tree / "files/link/a"),), [])
    assert set(scan(tree, "files", "files/link")) == {b"files", b"files/link", b"files/sub", b"files/sub/b"}
    (root,), _ = zbackup.list_roots(["files/link", "files/link/a"], str(tree))
    assert root.behind == (os.fsencode(tree / "files/link/a"),)


def test_named_inside_the_whole_filesystem(tree: Path) -> None:
    (tree / "files/a").touch()
    roots, missing = zbackup.list_roots(["/", str(tree / "files/a")], "/")
    assert (roots[0].stored, roots[0].inner, missing) == (b"", (os.fsencode(tree / "files/a").strip(b"/"),), [])


def test_root_that_went_away_after_it_was_listed(tree: Path) -> None:
    (tree / "files/a").touch()
    (tree / "files/b").touch()
    source = make_source(tree, "files/a", "files/b")
    (tree / "files/a").unlink()
    assert [stat.path for stat in zbackup.scan(source)] == [b"files", b"files/b"]


def test_root_that_went_away_with_one_file_system(tree: Path) -> None:
    (tree / "files/a").touch()
    (tree / "files/b").touch()
    source = make_source(tree, "files/a", "files/b", one_file_system=True)
    (tree / "files/a").unlink()
    assert [stat.path for stat in zbackup.scan(source)] == [b"files", b"files/b"]


def test_own_spool_not_listed(tree: Path) -> None:
    (tree / "spool").mkdir()
    (tree / "spool/freeze-1").mkdir()
    (tree / "files/a").touch()
    listed = scan(tree, ".")
    inside = os.fsencode(tree).strip(b"/")
    assert inside + b"/files/a" in listed
    assert inside + b"/spool" not in listed
    assert not (tree / "spool/freeze-1").exists(), "what an earlier node left is removed"


def test_own_spool_not_readable(tree: Path) -> None:
    (tree / "spool").mkdir()
    (tree / "spool/copy").write_text("data")
    assert read(tree, os.fsencode(tree).strip(b"/") + b"/spool/copy", ".") == {"status": "gone"}


def test_scan_hard_links(tree: Path) -> None:
    (tree / "files/a").write_text("data")
    os.link(tree / "files/a", tree / "files/b")
    (tree / "files/c").write_text("data")
    listed = scan(tree)
    assert listed[b"files/a"].link_key == listed[b"files/b"].link_key is not None
    assert (listed[b"files/a"].links, listed[b"files/c"].link_key) == (2, None)


def test_xattrs_and_acl(tree: Path) -> None:
    acl = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff")
    try:
        os.setxattr(tree / "files", "user.color", b"\0blue\xff")
        os.setxattr(tree / "files", "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"the filesystem has no extended attributes: {error}")
    (tree / "files/a").write_text("data")
    os.setxattr(tree / "files/a", "user.empty", b"")
    folder = scan(tree)[b"files"].xattrs
    assert folder["user.color"] == "AGJsdWX/"
    assert "system.posix_acl_default" in folder
    found = read(tree, b"files/a")["xattrs"]
    assert found["user.empty"] == ""
    assert "system.posix_acl_access" in found, "what the folder's default made"


@pytest.mark.skipif(not ROOT, reason="only root can give a symlink an attribute")
def test_xattrs_of_a_symlink_are_its_own(tree: Path) -> None:
    (tree / "files/a").write_text("data")
    (tree / "files/link").symlink_to("a")
    os.setxattr(tree / "files/a", "trusted.of", b"file")
    os.setxattr(tree / "files/link", "trusted.of", b"link", follow_symlinks=False)
    assert scan(tree)[b"files/link"].xattrs == {"trusted.of": "bGluaw=="}


def test_sparse_flag(tree: Path) -> None:
    with open(tree / "files/holes", "wb") as file:
        file.truncate(1 << 20)
    (tree / "files/full").write_bytes(os.urandom(1 << 20))
    (tree / "files/small").write_bytes(b"x" * 100)
    listed = scan(tree)
    assert [listed[b"files/" + name].sparse for name in (b"holes", b"full", b"small")] == [True, False, False]


def test_fresh_mark(tree: Path) -> None:
    (tree / "files/a").touch()
    now = (tree / "files/a").stat().st_ctime_ns

    def is_fresh(at: int) -> bool:
        clock = Clock(lambda: at, time.monotonic, time.sleep)
        return scan(tree, clock=clock, margin=2.0)[b"files/a"].fresh

    assert [is_fresh(now + late) for late in (0, 1_999_999_999, 2_000_000_000, 5_000_000_000)] == [
        True,
        True,
        False,
        False,
    ]
    os.utime(tree / "files/a", ns=(0, now + 3600 * 10**9))
    assert is_fresh(now + 5_000_000_000), "its time lies in the future"


def test_fresh_mark_of_a_database_from_its_log(tree: Path) -> None:
    connection = make_database(tree / "files/bd", wal=True)
    wal = tree / "files/bd-wal"
    old = (tree / "files/bd").stat().st_ctime_ns
    os.utime(wal, ns=(0, old + 100 * 10**9))
    clock = Clock(lambda: old + 101 * 10**9, time.monotonic, time.sleep)
    stat = scan(tree, clock=clock)[b"files/bd"]
    connection.close()
    assert (stat.fresh, stat.wal[1]) == (True, old + 100 * 10**9)


def test_scan_while_the_tree_changes(tree: Path) -> None:
    ended = threading.Event()

    def change() -> None:
        for number in range(1500):
            folder = tree / f"files/{number % 7}"
            with contextlib.suppress(OSError):
                folder.mkdir()
            (folder / f"{number}").write_text("data")
            if number % 5 == 0:
                shutil.rmtree(tree / f"files/{number % 11}", ignore_errors=True)
        ended.set()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        while not ended.is_set():
            assert not [stat for stat in scan(tree).values() if stat.error]
    finally:
        thread.join()


def test_root_of_the_filesystem(tree: Path) -> None:
    (tree / "files/a").write_text("data")
    inside = os.fsencode(tree / "files/a").strip(b"/")
    patterns, above = [], ""
    for part in os.fsdecode(inside).split("/"):  # nothing but the way to that file
        patterns += [f"{above}/*", f"!{above}/{part}"]
        above += f"/{part}"
    listed = scan(tree, "/", exclude=patterns)
    assert list(listed) == [b"/".join(inside.split(b"/")[:depth]) for depth in range(1, inside.count(b"/") + 2)]
    assert read(tree, inside, "/", exclude=patterns)["status"] == "whole"
    assert read(tree, b"etc/passwd", "/", exclude=patterns) == {"status": "gone"}


def test_filesystem_root_that_cannot_be_listed_is_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a copy of nothing that calls itself good."""

    def fail(path: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(zbackup.NodeError, match="/ cannot be listed: Input/output error"):
        zbackup._look(SimpleNamespace(folder=fail, list_names=None), b"")  # type: ignore[arg-type]


def test_root_behind_a_symlink_and_back(tmp_path: Path) -> None:
    """`..` leads to where the link leads, as `ls` says, and not to the folder that holds the link."""
    (tmp_path / "disk/data").mkdir(parents=True)
    (tmp_path / "disk/mail").mkdir()
    (tmp_path / "mail").mkdir()
    os.symlink("disk/data", tmp_path / "data")
    for given in ("data/../mail", "data/../mail/../mail", "data/.."):
        (root,), missing = zbackup.list_roots([given], str(tmp_path))
        assert os.path.samefile(root.real, tmp_path / given) and not missing
