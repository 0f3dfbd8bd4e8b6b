"""Data for the benchmark: made from seeds, so every tool and every run sees the same bytes."""

from __future__ import annotations

import io
import os
import random
import sqlite3
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
POOL = 32 * MIB
LETTERS = b"etaoinshrdlucmfwypvbgkjqxz"


@dataclass(frozen=True)
class Source:
    """Where bytes come from: text with the statistics of words, and noise that does not compress."""

    rng: random.Random
    pool: bytes

    def text(self, size: int) -> bytes:
        """Return `size` bytes of words: pieces of the pool from random places.

        The pieces are short, so that no chunk of any tool is there twice: with long ones, those tools that cut by
        content would find the same chunks again in data that has none.
        """
        parts = []
        while size > 0:
            piece = min(size, self.rng.randint(400, 4000))
            start = self.rng.randrange(len(self.pool) - piece)
            parts.append(self.pool[start : start + piece])
            size -= piece
        return b"".join(parts)

    def noise(self, size: int) -> bytes:
        """Return `size` random bytes, in pieces, since randbytes makes one big number of them."""
        return b"".join(self.rng.randbytes(min(MIB, size - at)) for at in range(0, size, MIB))

    def mixed(self, size: int) -> bytes:
        """Return text, or in three of ten cases noise, as pictures and archives are."""
        return self.noise(size) if self.rng.random() < 0.3 else self.text(size)

    def line(self, low: int, high: int) -> str:
        """Return text of `low` to `high` characters without quotes or newlines."""
        return self.text(self.rng.randint(low, high)).decode("ascii")


def make_pool(size: int = POOL) -> bytes:
    """Return text of invented words, the frequent ones short (Zipf), from a seed of its own."""
    rng = random.Random("pool")
    words = [bytes(rng.choices(LETTERS, range(26, 0, -1), k=2 + i % 9)) for i in range(6000)]
    weights = [1 / (i + 3) for i in range(len(words))]
    return b" ".join(rng.choices(words, weights, k=size // 6))[:size]


class Sources:
    """Makes the source of each step; the pool is made once."""

    def __init__(self, scale: float) -> None:
        # A small run does not wait for the whole pool; the pool only has to be large beside one window of zstd.
        self.pool = make_pool(POOL if scale >= 0.1 else POOL // 32)

    def seeded(self, *names: object) -> Source:
        return Source(random.Random("/".join(str(name) for name in names)), self.pool)


# ---- SQLite ----


def rows_of(source: Source, count: int) -> Iterator[tuple[int, int, str, str, bytes]]:
    for i in range(count):
        yield i, 1_600_000_000 + i, source.line(20, 60), source.line(150, 700), source.noise(32)


def make_sqlite(path: Path, source: Source, size: int) -> None:
    """Make a database of about `size` bytes, at rest: a table as a mail or job queue has it, 4 KiB pages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA page_size = 4096")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, made INTEGER, name TEXT, body TEXT, token BLOB)")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", rows_of(source, max(20, size // 573)))
    connection.execute("COMMIT")
    connection.close()


def change_sqlite(path: Path, source: Source, share: float) -> None:
    """Change `share` of the pages at random: one row of about that many pages, so the database stays sound."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    pages = int(connection.execute("PRAGMA page_count").fetchone()[0])
    rows = int(connection.execute("SELECT max(id) FROM t").fetchone()[0])
    connection.execute("BEGIN")
    ids = source.rng.sample(range(rows), min(rows, max(1, int(pages * share))))
    connection.executemany("UPDATE t SET token = ? WHERE id = ?", ((source.noise(32), i) for i in ids))
    connection.execute("COMMIT")
    connection.close()


# ---- many files ----


def make_files(root: Path, source: Source, count: int, mean: int) -> None:
    """Make `count` files of `mean` bytes on average (log-normal sizes), with several modes, and some symlinks."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        folder = root / f"d{i // 2500:03}" / f"e{i // 100 % 25:02}"
        if i % 100 == 0:
            folder.mkdir(parents=True, exist_ok=True)
        size = min(2 * MIB, int(mean * source.rng.lognormvariate(-0.72, 1.2)))
        write_file(folder / f"f{i:07}", source.mixed(size), (0o644, 0o644, 0o600, 0o755)[i % 4])
        if i % 200 == 199:
            os.symlink(f"f{i:07}", folder / f"l{i:07}")


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, content)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


# ---- content that shifts: dump, tar, log ----


def insert_of(source: Source, number: int) -> bytes:
    """Return one line of an SQL dump, about 310 bytes."""
    name, body, token = source.line(20, 60), source.line(60, 280), source.noise(16).hex()
    return f"INSERT INTO t VALUES ({number}, '{name}', '{body}', '{token}');\n".encode()


def make_dump(path: Path, source: Source, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = number = 0
    with open(path, "wb") as out:
        while written < size:
            number += 1
            written += out.write(insert_of(source, number))


def change_dump(path: Path, source: Source, share: float, run: int) -> None:
    """Delete and insert `share` of the rows each, in runs of `run` rows (1: scattered), as a new dump would."""
    old = path.with_suffix(".old")
    path.rename(old)
    start, number, skip = share / run, 10**9, 0
    with open(old, "rb") as lines, open(path, "wb") as out:
        for line in lines:
            chance = source.rng.random()
            if chance < start:
                skip = run
            elif chance < 2 * start:
                out.writelines(insert_of(source, number + i) for i in range(run))
                number += run
            if skip > 0:
                skip -= 1
                continue
            out.write(line)
    old.unlink()


def make_tar(path: Path, source: Source, size: int, share: float) -> None:
    """Make a tar of about `size` bytes; `share` of its members is left out and as many new ones stand between.

    The same source gives the same members, whatever the share.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    choose = random.Random(f"tar/{share}")
    with tarfile.open(path, "w") as archive:
        for i in range(max(10, size // (40 * KIB))):
            content = source.mixed(int(source.rng.uniform(KIB, 78 * KIB)))
            chance = choose.random()
            if chance >= share:
                add_member(archive, f"m{i:06}", content)
            if share <= chance < 2 * share:
                add_member(archive, f"n{i:06}", choose.randbytes(40_000))


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), 1_600_000_000
    archive.addfile(member, io.BytesIO(content))


def lines_of(source: Source, size: int) -> Iterator[bytes]:
    """Yield lines of a log, about `size` bytes."""
    written = 0
    while written < size:
        at = source.rng.randrange(10**9)
        line = f"2026-11-{1 + at % 28:02} host app[{at % 997}]: {source.line(40, 160)} id={at}\n".encode()
        written += len(line)
        yield line


def make_log(path: Path, source: Source, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.writelines(lines_of(source, size))


def append_log(path: Path, source: Source, size: int) -> None:
    with open(path, "ab") as out:
        out.writelines(lines_of(source, size))


def rotate_log(path: Path, source: Source, size: int) -> None:
    """Move the log aside and begin a new one, as logrotate does."""
    path.rename(path.with_name(path.name + ".1"))
    make_log(path, source, size)


def prepend_log(path: Path, source: Source, size: int) -> None:
    """Put new lines before all others, as change logs and some mail boxes have them."""
    old = path.read_bytes()
    with open(path, "wb") as out:
        out.writelines(lines_of(source, size))
        out.write(old)


# ---- images ----


def make_image(path: Path, source: Source, size: int) -> None:
    """Make an image of a disk, half of it holes: runs of 64 KiB to 4 MiB of content, then as much of nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        at = 0
        while at < size:
            run = min(size - at, source.rng.randint(1, 64) * 64 * KIB)
            out.seek(at)
            out.write(source.mixed(run))
            at += 2 * run
        out.truncate(size)


def change_image(path: Path, source: Source, share: float) -> None:
    """Write `share` of the image's bytes anew, in runs of 64 to 512 KiB that begin at 4 KiB boundaries."""
    size = path.stat().st_size
    left = int(size * share)
    with open(path, "r+b") as out:
        while left > 0:
            run = min(left, source.rng.randint(1, 8) * 64 * KIB)
            out.seek(source.rng.randrange(max(1, size - run)) // 4096 * 4096)
            out.write(source.mixed(run))
            left -= run
        out.truncate(size)


def make_sparse(path: Path, source: Source, size: int) -> None:
    """Make a file of holes with 64 KiB of content at each end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.write(source.mixed(64 * KIB))
        out.seek(max(64 * KIB, size - 64 * KIB))
        out.write(source.mixed(64 * KIB))


def fill_sparse(path: Path, source: Source, share: float) -> None:
    """Fill `share` of the file with content in runs of 4 MiB."""
    size = path.stat().st_size
    run = max(4096, min(4 * MIB, size // 64))
    with open(path, "r+b") as out:
        for _ in range(max(1, int(size * share / run))):
            out.seek(source.rng.randrange(max(1, size - run)) // 4096 * 4096)
            out.write(source.mixed(run))
