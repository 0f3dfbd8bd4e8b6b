"""DISK: durable writes, locks between real processes, folders that cannot be left."""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import held

import zbackup as z


def failing(number: int) -> Callable[..., Any]:
    """Return a call that fails with an errno."""

    def fail(*arguments: object, **options: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# ---- writes ----


def test_write_all_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with open(tmp_path / "a", "wb") as file:
        z.write_all(file.fileno(), b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_read_range_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 3), offset))
    with open(tmp_path / "a", "rb") as file:
        assert z.read_range(file.fileno(), 8, 1) == b"12345678"
        assert z.read_range(file.fileno(), 80, 1) == b"123456789"
        assert z.read_range(file.fileno(), 5, 10) == b""


def test_make_folder_is_private_and_nested(tmp_path: Path) -> None:
    z.make_folder(str(tmp_path / "a/b/c"))
    assert stat.S_IMODE((tmp_path / "a/b/c").stat().st_mode) == 0o700
    (tmp_path / "a/b/c").chmod(0o755)
    z.make_folder(str(tmp_path / "a/b/c/"))
    assert stat.S_IMODE((tmp_path / "a/b/c").stat().st_mode) == 0o755


def test_make_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        z.make_folder(str(tmp_path / "a/b"))


def test_make_folder_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    z.make_folder("a/b")
    assert (tmp_path / "a/b").is_dir()


def test_write_durably_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"one", b"two"):
        z.write_durably(str(path), data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_write_durably_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    z.write_durably("a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_write_durably_without_replacing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    z.write_durably(str(path), b"one", replacing=False)
    with pytest.raises(FileExistsError):
        z.write_durably(str(path), b"two", replacing=False)
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_write_durably_does_not_follow_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"kept")
    (tmp_path / "a").symlink_to("victim")
    with pytest.raises(FileExistsError):
        z.write_durably(str(tmp_path / "a"), b"new", replacing=False)
    z.write_durably(str(tmp_path / "a"), b"new")
    assert (tmp_path / "victim").read_bytes() == b"kept"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_write_durably_that_fails_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(OSError) as caught:
        z.write_durably(str(tmp_path / "a"), b"new")
    monkeypatch.undo()
    assert caught.value.errno == number
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_write_durably_syncs_file_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def note_replace(*arguments: Any, **options: Any) -> None:
        steps.append("name")
        replace(*arguments, **options)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    z.write_durably(str(tmp_path / "a"), b"new")
    assert steps == ["file", "name", "folder"]


def test_write_durably_from_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "a"
    versions = [bytes([i]) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=z.write_durably, args=(str(path), data)) for data in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in versions
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_publish_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    path = tmp_path / "a"
    z.write_durably(str(path), b"one", replacing=False)
    with pytest.raises(FileExistsError):
        z.write_durably(str(path), b"two", replacing=False)
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_publish_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        z.write_durably(str(tmp_path / "a"), b"one", replacing=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("replacing", [True, False])
def test_publish_in_an_open_folder(tmp_path: Path, replacing: bool) -> None:
    (tmp_path / "tmp").write_bytes(b"one")
    fd = os.open(tmp_path, os.O_RDONLY)
    z.publish(b"tmp", b"a", replacing, fd)
    os.close(fd)
    assert os.listdir(tmp_path) == ["a"]


# ---- locks ----


@pytest.mark.parametrize(
    ("mine", "theirs", "fits"),
    [(True, "shared", True), (True, "exclusive", False), (False, "shared", False), (False, "exclusive", False)],
)
def test_lock_beside_another_process(tmp_path: Path, mine: bool, theirs: str, fits: bool) -> None:
    path = tmp_path / "lock"
    with held(path, theirs):
        if fits:
            os.close(z.lock_file(str(path), shared=mine))
        else:
            with pytest.raises(BlockingIOError):
                z.lock_file(str(path), shared=mine)


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with held(tmp_path / "lock", "exclusive") as other:
        other.kill()
        other.wait()
        os.close(z.lock_file(str(tmp_path / "lock"), shared=False))


def test_lock_that_is_refused_leaks_no_descriptor(tmp_path: Path) -> None:
    with held(tmp_path / "lock", "exclusive"):
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                z.lock_file(str(tmp_path / "lock"), shared=True)
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_lock_refuses_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(OSError) as caught:
        z.lock_file(str(tmp_path / "lock"), shared=True)
    assert caught.value.errno == errno.ELOOP
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_lock_on_a_medium_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"")
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda p, flags, *mode: failing(number)() if flags & os.O_RDWR else real(p, flags, *mode)
    )
    fd = z.lock_file(str(path), shared=True)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.close(fd)


# ---- copies ----


def test_clone_file_where_the_filesystem_cannot(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    with open(tmp_path / "a", "rb") as source, open("/dev/shm/zbackup-test", "wb") as target:
        os.unlink("/dev/shm/zbackup-test")
        assert z.clone_file(source.fileno(), target.fileno()) is False  # of another filesystem


def test_clone_file_gives_the_bytes_or_says_no(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one" * 5000)
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "wb") as target:
        cloned = z.clone_file(source.fileno(), target.fileno())
    assert (tmp_path / "b").read_bytes() == (b"one" * 5000 if cloned else b"")


def test_clone_file_where_the_filesystem_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *arguments: asked.append(arguments))
    assert z.clone_file(3, 4) is True
    assert asked == [(4, z.FICLONE, 3)]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copy_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV), raising=False)
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "wb") as target:
        z.copy_range(source.fileno(), target.fileno(), (2 << 20) + 5, 1000)
    copied = (tmp_path / "b").read_bytes()
    assert copied == bytes(1000) + data[1000 : 1000 + (2 << 20) + 5]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copy_range_of_a_file_that_shrank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)  # as on Python for other systems
    (tmp_path / "a").write_bytes(b"short")
    with (
        open(tmp_path / "a", "rb") as source,
        open(tmp_path / "b", "wb") as target,
        pytest.raises(z.FormatError, match="shorter"),
    ):
        z.copy_range(source.fileno(), target.fileno(), 100, 0)


def test_sync_filesystem(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        z.sync_filesystem(file.fileno())
    with pytest.raises(OSError) as caught:
        z.sync_filesystem(-1)
    assert caught.value.errno == errno.EBADF


def test_sync_filesystem_where_libc_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    done = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: object())
    monkeypatch.setattr(os, "sync", lambda: done.append(True))
    z.sync_filesystem(-1)
    assert done


# ---- folders that cannot be left ----


@pytest.fixture
def root(tmp_path: Path) -> Iterator[z.Folders]:
    (tmp_path / "root").mkdir()
    made = z.Folders(os.open(tmp_path / "root", z.FOLDER_FLAGS))
    yield made
    made.close()


def same(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), path.stat())


def test_folders_open_part_by_part(root: z.Folders, tmp_path: Path) -> None:
    (tmp_path / "root/a/b").mkdir(parents=True)
    for name in ("a/b", "a", "", "a/b", "a/b"):
        assert same(root.open(name.encode()), tmp_path / "root" / name)


def test_folders_create(root: z.Folders, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        root.open(b"a/\xff/c")
    fd, name = root.parent(b"a/\xff/c", create=True)
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    assert os.path.isfile(os.fsencode(tmp_path) + b"/root/a/\xff/c")
    assert stat.S_IMODE((tmp_path / "root/a").stat().st_mode) == 0o700
    assert root.parent(b"top") == (root.root, b"top")


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("path", [b"link", b"link/b", b"a/link/b", b"a/dangling/b", b"a/file/b"])
def test_folders_refuse_a_symlink(root: z.Folders, tmp_path: Path, path: bytes, create: bool) -> None:
    (tmp_path / "outside/b").mkdir(parents=True)
    (tmp_path / "root/a").mkdir()
    (tmp_path / "root/a/file").write_bytes(b"")
    (tmp_path / "root/a/dangling").symlink_to(tmp_path / "nowhere")
    for link in ("root/link", "root/a/link"):
        (tmp_path / link).symlink_to(tmp_path / "outside")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught:
        root.open(path, create)
    assert caught.value.errno in (errno.ENOTDIR, errno.ELOOP)
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path / "outside/b") == []
    assert not (tmp_path / "nowhere").exists()


def test_folders_stay_usable_after_a_failure(root: z.Folders, tmp_path: Path) -> None:
    (tmp_path / "root/a").mkdir()
    fd = root.open(b"a")
    with pytest.raises(FileNotFoundError):
        root.open(b"b")
    assert root.open(b"a") == fd
    assert same(fd, tmp_path / "root/a")


def test_folders_keep_few_descriptors(root: z.Folders, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        root.open(b"a/b%d/c" % i, create=True)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    root.forget()
    assert len(os.listdir("/proc/self/fd")) == before


def test_folders_deeper_than_a_path_may_be_long(root: z.Folders) -> None:
    path = b"/".join([b"x" * 200] * 40)
    fd = root.open(path, create=True)
    assert os.listdir(fd) == []


def test_folders_forget_one_that_was_replaced(root: z.Folders, tmp_path: Path) -> None:
    root.open(b"a", create=True)
    root.forget()
    (tmp_path / "root/a").rename(tmp_path / "root/old")
    (tmp_path / "root/a").mkdir()
    assert same(root.open(b"a"), tmp_path / "root/a")


# ---- extended attributes ----


def test_xattrs_of_a_file_and_of_a_symlink(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    try:
        os.setxattr(path, "user.colour", b"red\xff")
    except OSError:
        pytest.skip("this filesystem has no extended attributes")
    (tmp_path / "link").symlink_to("a")
    expected = {"user.colour": base64.b64encode(b"red\xff").decode()}
    assert z.list_xattrs(str(path)) == expected
    assert z.list_xattrs(str(tmp_path / "link")) == {}
    with open(path) as file:
        assert z.list_xattrs(file.fileno()) == expected


def test_xattrs_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listxattr", lambda *a, **o: ["user.a", "user.b"])
    monkeypatch.setattr(os, "getxattr", lambda *a, **o: bytes(z.XATTR_LIMIT // 4))
    with pytest.raises(OSError) as caught:
        z.list_xattrs(str(tmp_path))
    assert caught.value.errno == errno.E2BIG


def test_xattrs_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listxattr", failing(errno.ENOTSUP))
    assert z.list_xattrs(str(tmp_path)) == {}
    monkeypatch.setattr(os, "listxattr", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        z.list_xattrs(str(tmp_path))
    monkeypatch.delattr(os, "listxattr")
    assert z.list_xattrs(str(tmp_path)) == {}


def test_name_in_reaches_a_name_that_is_not_text(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with open(z.name_in(fd, b"\xff"), "wb") as file:
        file.write(b"one")
    os.close(fd)
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff"]


# ---- folders ----


def test_remove_tree_deeper_than_python_recurses(tmp_path: Path) -> None:
    """And deeper than a path can say; symlinks are not followed."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "tree").mkdir()
    fd = os.open(tmp_path / "tree", os.O_RDONLY)
    for _ in range(3000):
        os.symlink(tmp_path, "link", dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("folder", dir_fd=fd)
        above, fd = fd, os.open("folder", os.O_RDONLY, dir_fd=fd)
        os.close(above)
    os.close(fd)
    z.remove_tree(str(tmp_path / "tree"))
    assert os.listdir(tmp_path) == ["kept"]


def test_lock_of_a_folder_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EBADF))
    z.lock_folder(-1)


def test_syncing_without_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done at once, and says when it fails."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with open(tmp_path / "a", "wb") as file:
        z.Syncing(file.fileno()).wait()
    syncing = z.Syncing(-1)
    syncing.join()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        syncing.wait()


@pytest.mark.parametrize("number", [errno.ENODATA, errno.EACCES, errno.ENOENT])
def test_xattr_that_has_gone_does_not_hide_the_next_one(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def get(target: object, name: str, **options: object) -> bytes:
        if name == "user.b":
            raise OSError(number, os.strerror(number))
        return name.encode()

    monkeypatch.setattr(os, "listxattr", lambda *a, **o: ["user.c", "user.b", "user.a"])
    monkeypatch.setattr(os, "getxattr", get)
    assert list(z.list_xattrs("any")) == ["user.a", "user.c"]
