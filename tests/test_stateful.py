"""A real store against a simple model: what is listed can be restored, whatever was done and cut off before.

The model is a dict from snapshot to files.  ZBACKUP_STATEFUL_EXAMPLES is how many histories are tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fuzz import best_temporary
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import zbackup as z

EXAMPLES = int(os.environ.get("ZBACKUP_STATEFUL_EXAMPLES", "30"))
START = 1_800_000_000 * 10**9  # ns
SECOND, DAY = 10**9, 86400 * 10**9  # ns
NODES = ("one", "two")
PATHS = (b"a", b"folder/b", b"folder/c.db", b"z")
RULES = ("daily 2", "last 1, hourly 3, weekly 1", "monthly all", "yearly 1, daily 1")
SIZES = (0, 1, 4096, 5000, 40_000, 300_000, z.CHUNK, z.CHUNK + 1, 2 * z.CHUNK + 777)

nodes = st.sampled_from(NODES)
paths = st.sampled_from(PATHS)
numbers = st.integers(0, 1 << 16)


def make_content(kind: str, seed: int, size: int) -> bytes:
    """Return the content of a file: bytes that compress or not, pages that repeat, zeros."""
    if kind == "zeros":
        return bytes(size)
    if kind == "text":
        return (b"line %d of a text\n" % seed * (size // 10 + 1))[:size]
    if kind == "holes":  # whole chunks of zeros inside
        return (hashlib.shake_128(b"%d" % seed).digest(5000) + bytes(size))[:size]
    return random.Random(seed).randbytes(size)


contents = st.builds(
    make_content, st.sampled_from(["zeros", "text", "holes", "noise"]), st.integers(0, 3), st.sampled_from(SIZES)
)


Edit = tuple  # path, what is done to it, where, and with what; of Python 3.9
edits = st.tuples(paths, st.sampled_from(["put", "touch", "touch", "touch", "grow", "remove"]), numbers, contents)


@dataclass
class Made:
    """What the model knows of one snapshot."""

    files: dict[bytes, bytes]
    snapshot: z.Snapshot
    removed: int = 0  # ns; 0 while it is listed


@dataclass
class Model:
    """What the model knows of one node."""

    files: dict[bytes, bytes] = field(default_factory=dict)  # as they are on the node now
    chunks: dict[bytes, list[bytes]] = field(default_factory=dict)  # digests of the last copy, to patch against
    listed: dict[str, Made] = field(default_factory=dict)
    trash: list[Made] = field(default_factory=list)
    progress: dict[bytes, bytes] = field(default_factory=dict)  # files of a copy that was cut off
    sequence: int = 0
    released: int = 0

    def choose(self, last: int) -> set[str]:
        """Return the snapshots that --keep 'last N' keeps; written from the README, not from the program."""
        found = sorted(self.listed.values(), key=lambda made: made.snapshot.sequence)
        good = [made for made in found if made.snapshot.good]
        kept = {made.snapshot.name for made in good[-last:]}
        newest_good = good[-1].snapshot.sequence if good else -1
        kept |= {made.snapshot.name for made in found if made.snapshot.sequence > newest_good}
        alarms = [s.sequence for s in (made.snapshot for made in found) if s.alarm and s.sequence > self.released]
        return kept | {made.snapshot.name for made in found if alarms and made.snapshot.sequence <= alarms[-1]}


class Machine(RuleBasedStateMachine):
    """The store and its model, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.work = tempfile.mkdtemp(prefix="stateful-", dir=best_temporary())
        self.path = os.path.join(self.work, "store")
        self.now = START
        self.models = {name: Model() for name in NODES}
        self.packs: dict[str, tuple[int, int, int]] = {}  # as they were when they were first seen
        self.count = 0  # folders made
        self.store: z.Store | None = None
        self.before = z.make_clock, z.LIST_SPAN, signal.getsignal(signal.SIGTERM)
        z.LIST_SPAN = 2  # chunks: so that files of 3 MiB have lists, as else those of 1 GiB
        # The clock is what cannot be had otherwise: days pass in no time.
        z.make_clock = lambda: z.Clock(lambda: self.now, time.monotonic, lambda seconds: None)

    @initialize(one=st.dictionaries(paths, contents, min_size=1), two=st.dictionaries(paths, contents))
    def start(self, one: dict[bytes, bytes], two: dict[bytes, bytes]) -> None:
        self.store = z.open_store(self.path, create=True)
        self.models["one"].files, self.models["two"].files = one, two

    def teardown(self) -> None:
        try:
            if self.store:
                self.check_all()
                self.run("verify", "--quiet")
                self.store.close()
        finally:
            z.make_clock, z.LIST_SPAN, handler = self.before
            signal.signal(signal.SIGTERM, handler)
            shutil.rmtree(self.work)

    # ---- help ----

    def run(self, command: str, *arguments: str, code: int = 0) -> str:
        """Run a command, with the store closed meanwhile; returns what it printed."""
        assert self.store
        self.store.close()
        self.store = None
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                found = z.main([command, "--store", self.path, "--lock-wait", "0s", *arguments])
            finally:
                self.store = z.open_store(self.path)
        assert found == code, f"{command} {arguments}: exit code {found}, not {code}: {output.getvalue()}"
        return output.getvalue()

    def folder(self) -> str:
        self.count += 1
        return os.path.join(self.work, f"folder-{self.count}")

    def read_files(self, reader: z.Reader, blocks: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return path and content of all files that blocks name."""
        found = {}
        for entry in z.list_entries(reader, blocks):
            parts = []
            for chunk in z.list_chunks(reader, entry.content):
                parts.append(bytes(chunk * z.CHUNK) if isinstance(chunk, int) else reader.get(chunk))
            found[entry.stat.path] = b"".join(parts)[: entry.content.size]
        return found

    def check_all(self) -> None:
        """Check that all that is listed, in the trash or kept of a copy that was cut off can be read."""
        assert self.store
        with contextlib.closing(self.store.reader()) as reader:
            for name, model in self.models.items():
                for made in (*model.listed.values(), *model.trash):
                    assert self.read_files(reader, made.snapshot.blocks) == made.files
                progress = self.store.node(name).load_progress()
                assert self.read_files(reader, progress.blocks) == (model.progress if progress.blocks else {})

    # ---- the node's files ----

    @rule(node=nodes, changes=st.lists(edits, min_size=1, max_size=4))
    def edit(self, node: str, changes: Sequence[Edit]) -> None:
        """Change files of a node."""
        files = self.models[node].files
        for path, how, where, content in changes:
            old = files.get(path, b"")
            if how == "remove":
                files.pop(path, None)
            elif how == "grow":
                files[path] = (old + content)[: 3 * z.CHUNK]
            elif how == "touch" and old:  # a few bytes, so that it is kept as a patch
                at = where * 37 % len(old)
                new = random.Random(where).randbytes(1 + where % 6000)
                files[path] = (old[:at] + new + old[at + len(new) :])[: max(len(old), 2)]
            else:
                files[path] = content

    # ---- copies ----

    def put_chunk(self, writer: z.PackWriter, reader: z.Reader, data: bytes, base: bytes | None) -> bytes:
        """Put a chunk as a pull does: as a patch where most of it is what it was."""
        if base is None:
            return writer.put_chunk(data)
        pages = z.hash_pages(data)
        try:
            runs = z.compare_pages(pages, reader.pages(base), len(data))
            below = reader.runs(base)
        except z.StoreError:  # pruned since
            return writer.put_chunk(data)
        changed = [(first * z.PAGE, min((first + count) * z.PAGE, len(data))) for first, count in runs or ()]
        if not changed or not z.covers(changed, len(data), sum(run.length for run in below)):
            return writer.put_chunk(data)
        piece = writer.put_chunk(b"".join(data[start:end] for start, end in changed))
        patch = z.patch_runs(below, changed, piece, len(data))
        if z.needs_whole(patch, len(data)):
            return writer.put_chunk(data)
        digest = z.digest_pages(pages)
        writer.put_patch(digest, patch)
        return digest

    def put_files(self, writer: z.PackWriter, reader: z.Reader, model: Model, grade: str) -> z.BlockWriter:
        """Put the files of a node; returns their blocks."""
        blocks = z.BlockWriter(writer)
        for path, data in sorted(model.files.items(), key=lambda file: z.path_key(file[0])):
            listed = z.ListWriter(writer)
            bases = dict(enumerate(model.chunks.get(path, ())))
            model.chunks[path] = []
            for number, start in enumerate(range(0, len(data), z.CHUNK)):
                chunk = data[start : start + z.CHUNK]
                digest = b""
                if chunk.count(0) == len(chunk):
                    listed.put_zeros(1)
                else:
                    digest = self.put_chunk(writer, reader, chunk, bases.get(number) or None)
                    listed.put(digest)
                model.chunks[path].append(digest)
            stat = z.Stat(path, "file", 0o644, size=len(data), mtime=self.now)
            blocks.put(z.Entry(z.encode_stat(stat), z.encode_content(listed.content(len(data), grade))))
        return blocks

    @contextlib.contextmanager
    def writing(self, codec: int) -> Iterator[tuple[z.PackWriter, z.Reader]]:
        assert self.store
        writer = z.PackWriter(self.store.packs, self.store.index, codec, 1)
        reader = self.store.reader()
        reader.open_pack = writer
        try:
            yield writer, reader
        finally:
            writer.abandon()
            reader.close()

    codecs = st.sampled_from([z.PLAIN, z.ZLIB, z.ZSTD])

    @rule(
        node=nodes,
        codec=codecs,
        grade=st.sampled_from(["frozen", "frozen", "stable", "torn", "partial"]),
        alarm=st.sampled_from(["", "", "", "half of the files are gone"]),
        how=st.sampled_from(["", "entries in a pack of their own", "side by side"]),
    )
    def save_snapshot(self, node: str, codec: int, grade: str, alarm: str, how: str) -> None:
        assert self.store
        model, folder = self.models[node], self.store.node(node)
        folder.make()
        with self.writing(codec) as (writer, reader), self.writing(z.PLAIN) as (other, beside):
            graded = "stable" if grade == "partial" else grade
            if how == "side by side":  # another run copies the same: two packs have it then
                self.put_files(other, beside, replace(model, chunks=dict(model.chunks)), graded)
                other.flush()
            blocks = self.put_files(writer, reader, model, graded)
            if how.startswith("entries"):
                writer.seal()
            names = blocks.close()
            writer.seal()
            other.seal()
        model.sequence += 1
        if not model.files and grade == "frozen":
            grade = "stable"  # as a pull calls a copy without files, and `verify` expects it
        snapshot = z.Snapshot(
            z.name_time(self.now), node, model.sequence, self.now, self.now, grade, blocks=names, alarm=alarm
        )
        saved = folder.save_snapshot(snapshot)
        assert saved.name not in model.listed, "a snapshot was overwritten"
        folder.save_known(z.Known(node, hashlib.md5(node.encode()).hexdigest(), node, released=model.released))
        folder.drop_progress()
        model.listed[saved.name] = Made(dict(model.files), saved)
        model.progress = {}

    @rule(node=nodes, changes=st.lists(edits, min_size=1, max_size=3), codec=codecs)
    def spend_a_day(self, node: str, changes: Sequence[Edit], codec: int) -> None:
        """Do what happens most: a day goes by, some files are changed, and copied."""
        self.now += DAY
        self.edit(node, changes)
        self.save_snapshot(node, codec, "frozen", "", "")

    @rule(node=nodes, codec=codecs, how=st.sampled_from(["open", "flushed", "sealed", "progress"]))
    def crash_in_a_copy(self, node: str, codec: int, how: str) -> None:
        """End a copy as a kill does: what is written stays, nothing is removed."""
        assert self.store
        model, folder = self.models[node], self.store.node(node)
        folder.make()
        folder.save_known(z.Known(node, hashlib.md5(node.encode()).hexdigest(), node, released=model.released))
        before = {path: list(chunks) for path, chunks in model.chunks.items()}
        with self.writing(codec) as (writer, reader):
            blocks = self.put_files(writer, reader, model, "frozen")
            names = blocks.close()
            if how != "open":
                writer.flush()
            if how in ("sealed", "progress"):
                writer.seal()
            if how == "progress":
                folder.save_progress(z.Progress(names))
                model.progress = dict(model.files)
            if writer.fd >= 0:
                os.close(writer.fd)
                writer.fd = -1
        Path(folder.snapshots, z.TEMPORARY + "half").write_bytes(b'{"format": 1, "se')
        model.chunks = before
        self.reopen()

    @rule()
    def power_cut(self) -> None:
        """Go on with what stood on the disk while a pack was being written."""
        assert self.store
        with self.writing(z.ZLIB) as (writer, _):
            writer.put_chunk(random.Random(self.count).randbytes(3000))
            writer.flush()
            path = self.folder()
            shutil.copytree(self.path, path)
        self.store.close()
        shutil.rmtree(self.path)
        self.path = path
        self.packs.clear()
        self.store = z.open_store(self.path)

    # ---- the store ----

    def reopen(self) -> None:
        assert self.store
        self.store.close()
        self.store = z.open_store(self.path)

    @rule(
        how=st.sampled_from(
            ["reopen", "lose the index", "lose the index while it is open", "lose its log", "power cut"]
        )
    )
    def interrupt(self, how: str) -> None:
        """Open the store again, after something happened to it or not."""
        assert self.store
        if how == "power cut":  # what stood on the disk while a pack was being written
            with self.writing(z.ZLIB) as (writer, _):
                writer.put_chunk(random.Random(self.count).randbytes(3000))
                writer.flush()
                path = self.folder()
                shutil.copytree(self.path, path)
            self.store.close()
            shutil.rmtree(self.path)
            self.path = path
            self.packs.clear()
            self.store = z.open_store(self.path)
            return
        if how == "lose the index":
            self.store.close()
        for end in {"reopen": (), "lose its log": ("-wal", "-shm")}.get(how, ("", "-wal", "-shm")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, f"index.sqlite{end}"))
        if how != "lose the index":
            self.store.close()
        self.store = z.open_store(self.path)

    # ---- what deletes ----

    @rule(
        days=st.sampled_from([0, 0, 1, 6]),
        last=st.sampled_from([0, 1, 1, 2, 3]),
        grace=st.sampled_from([0, 0, 5]),
        repack=st.sampled_from(["0", "300K", "1G", "1G", "1G"]),
        cut_off=st.sampled_from(["", "", *NODES]),
    )
    def prune(self, days: int, last: int, grace: int, repack: str, cut_off: str) -> None:
        """Prune with `last N`, or without a rule where that is 0; the model knows what that does.

        A copy of the node `cut_off` came to its end just before: what it had must stay.
        """
        if cut_off:
            self.crash_in_a_copy(cut_off, z.ZLIB, "progress")
        self.now += days * DAY + SECOND
        keep = ["--keep", f"last {last}"] if last else []
        flags = [*keep, "--grace", f"{grace}d", "--max-repack", repack, "--reserve", "4096", "--json"]
        report = json.loads(self.run("prune", *flags).splitlines()[-1])
        assert not report["problem"]
        removed = 0
        for model in self.models.values():
            model.trash = [made for made in model.trash if made.removed + grace * DAY > self.now]
            kept = model.choose(last) if last else set(model.listed)
            gone = [made for name, made in model.listed.items() if name not in kept]
            removed += len(gone)
            model.listed = {name: made for name, made in model.listed.items() if name in kept}
            if grace:
                model.trash += [replace(made, removed=self.now) for made in gone]
        assert report["removed"] == removed
        self.check_lists()
        self.check_all()
        if repack == "1G":
            again = json.loads(
                self.run("prune", "--reserve", "4096", "--grace", f"{grace}d", "--json").splitlines()[-1]
            )
            assert (again["dead"], again["dropped"]) == ({}, 0), "a second prune finds what the first one left"

    @precondition(lambda self: any(model.trash for model in self.models.values()))
    @rule(which=numbers)
    def undelete(self, which: int) -> None:
        """Bring a snapshot back, unless another one has its name by now."""
        found = [(node, made) for node, model in self.models.items() for made in model.trash]
        node, made = found[which % len(found)]
        model, name = self.models[node], made.snapshot.name
        same = [other for other in model.trash if other.snapshot.name == name]
        taken = name in model.listed or len(same) > 1
        self.run("undelete", node, name, code=4 if taken else 0)
        listed = {snapshot.name for snapshot in self.store.node(node).list_snapshots()} if self.store else set()
        if not taken:
            model.trash.remove(made)
            model.listed[name] = made
        elif name in listed and name not in model.listed:  # one of several of one name came back
            snapshot = self.store.node(node).load_snapshot(name) if self.store else None
            (back,) = [other for other in same if other.snapshot == snapshot]
            model.trash.remove(back)
            model.listed[name] = back

    @precondition(lambda self: any(model.sequence for model in self.models.values()))
    @rule(which=numbers)
    def release(self, which: int) -> None:
        """Answer a node's alarm."""
        found = [node for node, model in self.models.items() if model.sequence]
        model = self.models[found[which % len(found)]]
        self.run("release", found[which % len(found)])
        alarms = [made.snapshot.sequence for made in model.listed.values() if made.snapshot.alarm]
        model.released = max([model.released, *alarms])

    # ---- what changes nothing ----

    @rule(how=st.sampled_from(["verify", "repair", "undelete", *RULES]), node=nodes)
    def look(self, how: str, node: str) -> None:
        """Run what changes nothing, or nothing where nothing is damaged."""
        before = sorted((str(path), path.stat().st_ino) for path in Path(self.path).rglob("*.json"))
        packs = dict(self.packs)
        if how == "undelete":
            self.run("undelete", node, "2020-01-01T00-00-00Z", code=2)
        elif how == "verify":
            self.run("verify", "--quiet")
        elif how == "repair":
            self.run("repair", "--quiet", "--reserve", "4096")
        else:
            self.try_rules(how)
        after = sorted((str(path), path.stat().st_ino) for path in Path(self.path).rglob("*.json"))
        unlike = {Path(path).name for path, _ in {*before} ^ {*after}}
        assert unlike <= {z.VERIFIED}
        self.packs_are_what_they_were()
        assert self.packs == packs

    def try_rules(self, text: str) -> None:
        """Let a dry run tell of each snapshot; no rule removes the newest good one."""
        report = json.loads(self.run("prune", "--keep", text, "--dry-run", "--json").splitlines()[-1])
        for name, model in self.models.items():
            rows = report["nodes"].get(name, [])
            assert {row["snapshot"] for row in rows} == set(model.listed)
            kept = {row["snapshot"] for row in rows if row["keep"]}
            assert model.choose(1) <= kept

    # ---- what reads ----

    @precondition(lambda self: any(model.listed for model in self.models.values()))
    @rule(which=numbers)
    def restore(self, which: int) -> None:
        """Restore one snapshot, and compare it byte for byte."""
        found = [(node, name) for node, model in self.models.items() for name in model.listed]
        node, name = found[which % len(found)]
        to = self.folder()
        self.run("restore", node, "--at", name, "--to", to, "--quiet")
        restored = {
            os.fsencode(path.relative_to(to)): path.read_bytes() for path in Path(to).rglob("*") if path.is_file()
        }
        assert restored == self.models[node].listed[name].files

    # ---- what is always so ----

    def check_lists(self) -> None:
        assert self.store
        for name, model in self.models.items():
            folder = self.store.node(name)
            listed = [made.snapshot for made in model.listed.values()]
            assert folder.list_snapshots() == sorted(listed, key=lambda snapshot: snapshot.sequence)
            trash = sorted((made.snapshot.sequence, made.snapshot.name) for made in model.trash)
            assert sorted((t.snapshot.sequence, t.snapshot.name) for t in folder.list_trash()) == trash
        assert self.store.problems == []

    @invariant()
    def lists_are_right(self) -> None:
        if self.store:
            self.check_lists()

    @invariant()
    def packs_are_what_they_were(self) -> None:
        """No pack is ever changed in its place (I3): each is named after its bytes."""
        found = {path: path.stat() for path in Path(self.path, "packs").glob("*/*.pack")}
        seen = {path.name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}
        for path in found:
            if self.packs.get(path.name) != seen[path.name]:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        self.packs = seen


@pytest.mark.timeout(max(300, 20 * EXAMPLES))
def test_store_against_a_model() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=checks),
    )
