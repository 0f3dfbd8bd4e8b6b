"""KEYS: a node's identity is made once, kept, and never guessed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM

import zbackup as z

ENV = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
LOAD = """
import encodings.ascii, os, secrets, sys, zbackup
if os.getuid() == 0:
    os.setuid(65534)
print(zbackup.load_identity(sys.argv[1]))
"""


def test_identity_is_made_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "state/zbackup")
    first = z.load_identity(folder)
    assert z.is_identity(first)
    assert z.load_identity(folder) == first
    assert os.listdir(folder) == ["identity"]


def test_identity_differs_between_machines(tmp_path: Path) -> None:
    assert z.load_identity(str(tmp_path / "a")) != z.load_identity(str(tmp_path / "b"))


def test_identity_made_by_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(z.load_identity, [str(tmp_path / "state")] * 16))
    assert len(found) == 1


@pytest.mark.parametrize("data", [b"", b"short\n", b"G" * 32, b"0" * 31, b"0" * 33, b"0" * 200, b"A" * 32])
def test_identity_file_that_holds_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "identity").write_bytes(data)
    with pytest.raises(z.BackupError, match="holds no identity"):
        z.load_identity(str(tmp_path))
    assert (tmp_path / "identity").read_bytes() == data


def test_identity_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "identity").write_bytes(b"\xff" * 32)
    with pytest.raises(z.BackupError, match="not text"):
        z.load_identity(str(tmp_path))


def test_identity_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(z.BackupError, match="--state"):
        z.load_identity(str(tmp_path / "file/state"))


def test_identity_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(z.BackupError, match=os.strerror(errno.ENOSPC)):
        z.load_identity(str(tmp_path / "state"))
    monkeypatch.undo()
    assert os.listdir(tmp_path / "state") == []


def test_identity_in_a_folder_that_is_read_only() -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to other users
        identity = z.load_identity(folder)
        os.chmod(folder, 0o555)
        os.chmod(os.path.join(folder, "identity"), 0o444)
        done = subprocess.run([sys.executable, "-c", LOAD, folder], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == identity, done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a"}, "/var/lib/a"),
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x"}, "/x/zbackup"),
        ({"XDG_STATE_HOME": "", "HOME": "/home/u"}, "/home/u/.local/state/zbackup"),
        ({"HOME": "/home/u"}, "/home/u/.local/state/zbackup"),
    ],
)
def test_state_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert z.find_state_folder() == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("0123456789abcdef" * 2, True), ("0" * 32 + "\n", False), ("A" * 32, False), ("", False)]
)
def test_is_identity(text: str, expected: bool) -> None:
    assert z.is_identity(text) is expected
