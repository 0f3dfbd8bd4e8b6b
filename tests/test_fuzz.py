"""No input gives anything but success or one of our errors, in bounded memory: the targets of fuzz.py.

ZBACKUP_FUZZ_TIME is how long (s) all targets together are fuzzed with atheris.  A finding is
kept as an input in FOUND, which is run in every test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import fuzz
import pytest
from conftest import ENV, PROGRAM, World

import zbackup as z

HERE = Path(__file__).resolve().parent
TIME = float(os.environ.get("ZBACKUP_FUZZ_TIME", "20"))
EACH = max(1, round(TIME / len(fuzz.TARGETS)))  # s; libFuzzer takes whole ones
guided = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris has no wheel for this Python; see tests/requirements.txt",
)


@pytest.fixture
def quick_folder() -> Iterator[str]:
    """Return a folder in memory, removed whatever becomes of the process that works in it."""
    folder = tempfile.mkdtemp(dir=fuzz.best_temporary())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run_fuzzer(
    target: str, tmp_path: Path, folder: str, seconds: int, module: Path = PROGRAM.parent
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Fuzz a target of the zbackup.py in the folder `module`; returns how it ended, and the corpus."""
    corpus = tmp_path / "corpus"
    # Counting the lines of another tool's run would make it several times slower.
    env = {name: value for name, value in ENV.items() if not name.startswith("COVERAGE_")}
    flags = [str(corpus), f"-max_total_time={seconds}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), target, *flags],
        env={**env, "TMPDIR": folder, "PYTHONPATH": str(module)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 120,
    )
    return done, corpus


def describe_failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a fuzzer found, with the input that shows it."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("#", "INFO", "NEW_FUNC"))]
    said = [f"exit code {done.returncode}", done.stdout[-4000:], *lines[-20:]]
    for path in re.findall(r"Test unit written to (\S+)", done.stderr):
        with contextlib.suppress(OSError):
            data = Path(path).read_bytes()
            packed = zlib.compress(data, 9)
            what = "bytes in hex" if len(data) <= 2000 else "bytes compressed by zlib, in hex"
            said.append(f"{path}, its {what}: {(data if len(data) <= 2000 else packed).hex()}")
    return "\n".join(said)


# ---- what the fuzzer found ----


def make_circle() -> bytes:
    """Return a damaged chunk in one pack, and in another a patch of the same digest that draws from itself."""
    digest = fuzz.digest_of(b"right")
    damaged = fuzz.make_pack([(z.FRAME, z.PLAIN, [(digest, b"wrong")], b"")])
    patch = z.encode_patch([z.Run(digest, 0, 5)])
    return fuzz.join_frames([damaged, fuzz.make_pack([(z.PATCHES, z.PLAIN, [(digest, patch)], b"")])])


def make_far_record() -> bytes:
    """Return a pack whose footer, with a right proof, names a record at a byte that no file has."""
    pack = z.PACK_HEADER + z.encode_footer([(1 << 63, z.FRAME, [bytes(32)])], len(z.PACK_HEADER))
    return fuzz.join_frames([pack])


def make_embedded_pack() -> bytes:
    """Return a pack with a damaged chunk, and after it a chunk which is itself a pack that has the sound one."""
    sound = z.encode_record(z.FRAME, [(fuzz.digest_of(b"right"), 5)], z.hash_pages(b"right"), (z.PLAIN, 5, b"right"))
    rows = [(fuzz.digest_of(b"right"), b"wrong"), (fuzz.digest_of(sound), sound)]
    return fuzz.join_frames([fuzz.make_pack([(z.FRAME, z.PLAIN, rows, b"")])])


def make_short_end() -> bytes:
    """Return a copy in which a large file has one byte less than its size, as files of some filesystems do."""
    said, _ = fuzz.conversation()
    changed = []
    for head in said[::2]:
        fields = json.loads(head)
        for item in fields.get("items", ()):
            item["size"] = item.get("size", 0) + (item.get("size", 0) > z.CHUNK)
        changed.append(z.write_json(fields).encode("ascii"))
    return fuzz.join_frames([b"new", *itertools.chain.from_iterable(zip(changed, said[1::2]))])


def make_file_of_more_than_it_has() -> bytes:
    """Return a large file, and a newer version of it whose chunks reach beyond its end."""
    stat = z.Stat(b"big", "file", 0o644, size=len(fuzz.OLDER), mtime=7)
    old, new = fuzz.store_contents()["large"], z.Content(10, (5,), (), "stable")
    versions = [z.Entry(z.encode_stat(stat), z.encode_content(content)).encode() for content in (old, new)]
    return b"latest\n" + b"--\n".join(versions)


FOUND: list[tuple[str, Callable[[], bytes]]] = [
    ("pack", make_circle),
    ("pack", make_far_record),
    ("pack", make_embedded_pack),
    ("pull", make_short_end),
    ("restore", make_file_of_more_than_it_has),
]


@pytest.mark.parametrize(("target", "make"), FOUND)
def test_input_that_once_failed(target: str, make: Callable[[], bytes]) -> None:
    fuzz.TARGETS[target].run(make())


# ---- memory: the worst that a limit lets through ----

MOST = 400 << 20  # bytes
READ_FRAMES = """
import resource, sys
import fuzz, zbackup as z
folder, size = sys.argv[1], 16 << 20
frames = [(z.FRAME, z.ZLIB, [(bytes([i]) * 32, bytes(size))], b"") for i in range(24)]
index = z.Index(":memory:")
for number, frame in enumerate(frames):
    fuzz.put_pack(folder, index, fuzz.make_pack([frame]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = z.Reader(folder, index)
for i in range(24):
    reader.runs(bytes([i]) * 32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_large_frames_take_bounded_memory(quick_folder: str) -> None:
    """A frame of ours has about 1 MiB; the format lets each one have 64."""
    env = {**ENV, "PYTHONPATH": f"{HERE}{os.pathsep}{PROGRAM.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", READ_FRAMES, quick_folder], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 << 20


def test_large_questions_that_wait_take_bounded_memory(world: World) -> None:
    """A peer asks much while the node cannot answer yet; nobody asked it who it is."""
    node = world.node("--before", "sleep 60")
    zmq = z.load_zmq()
    head = b'{"kind":"LIST","number":2,"x":[%s{}]}' % (b"{}," * (z.QUESTION_LIMIT // 3 - 100))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.9:{world.port}")
        socket.send_multipart(z.encode_message(z.OPEN, 1, {"codecs": []}))
        for _ in range(10):
            socket.send_multipart([head, b""])
        socket.send_multipart(z.encode_message(z.HELLO, 3, z.say_hello()))
        kinds = set()
        while z.HELLO not in kinds:  # answered after all that came before it was taken
            assert socket.poll(60_000), "no answer"
            kinds.add(json.loads(socket.recv_multipart()[0])["kind"])
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{node.pid}/status").read_text())
    assert peak
    assert int(peak[1]) << 10 < MOST


# ---- fuzzing ----


@guided
@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_fuzzer_finds_nothing(target: str, tmp_path: Path, quick_folder: str) -> None:
    done, corpus = run_fuzzer(target, tmp_path, quick_folder, EACH)
    assert done.returncode == 0, describe_failure(done)
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert runs, done.stderr
    assert int(runs[1]) > 10 * EACH, "too few runs to find anything"
    seeds = len(set(fuzz.TARGETS[target].seeds()))
    assert len(list(corpus.iterdir())) > seeds, "no new way through the code: the fuzzer does not see what it covers"


PLANTED = {  # target, what stands in zbackup.py, what is put in its place
    "an exception that is not ours": ("record", "except (struct.error, IndexError):", "except struct.error:"),
    "a digest that is not checked": ("reply", "if digest not in (None, found):", "if not found:"),
    "a size that does not bound": ("codec", "decoder.decompress(data, size + 1)", "decoder.decompress(data)"),
    "a form that is not checked": ("listing", "if canonical != line or stat.kind", "if False and stat.kind"),
}


@guided
@pytest.mark.parametrize("name", list(PLANTED))
def test_fuzzer_finds_a_planted_fault(name: str, tmp_path: Path, quick_folder: str) -> None:
    target, right, wrong = PLANTED[name]
    source = PROGRAM.read_text()
    assert source.count(right) == 1, f"zbackup.py no longer has {right}: plant another fault"
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "zbackup.py").write_text(source.replace(right, wrong))
    done, _ = run_fuzzer(target, tmp_path, quick_folder, 120, changed)
    assert done.returncode != 0, f"not found in 120 s: {done.stderr[-2000:]}"
    assert "Error" in describe_failure(done)


REACHED = r"""
import ast, re, sys
import fuzz, zbackup
names, reached = {}, set()
for node in ast.walk(ast.parse(open(zbackup.__file__).read())):
    if isinstance(node, ast.FunctionDef) and re.match("decode$|_?(decode|load|parse)_", node.name):
        names[min([node.lineno, *(one.lineno for one in node.decorator_list)])] = node.name
def look(frame, event, value):
    if event == "call" and frame.f_code.co_filename == zbackup.__file__:
        reached.add(frame.f_code.co_firstlineno)
sys.setprofile(look)
for target in fuzz.TARGETS.values():
    for seed in target.seeds():
        target.run(seed)
sys.setprofile(None)
print(len(names), *sorted({name for line, name in names.items() if line not in reached}))
"""


def test_every_decoder_is_reached_by_a_target(quick_folder: str) -> None:
    env = {**ENV, "TMPDIR": quick_folder, "PYTHONPATH": f"{HERE}{os.pathsep}{PROGRAM.parent}"}
    done = subprocess.run([sys.executable, "-c", REACHED], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, *missed = done.stdout.split()
    assert int(count) > 30  # they were found at all
    assert not missed, "give fuzz.py a target, or a seed, that reaches them"


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    """Remove the folder in which the targets work in this process."""
    yield
    shutil.rmtree(fuzz.workplace(), ignore_errors=True)


def flip(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with a small change, where atheris has better ones."""
    at = chance.randrange(len(data) + 1)
    return data[:at] + bytes([chance.randrange(256)]) + data[at + chance.randrange(3) :]


@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_changed_valid_inputs(target: str) -> None:
    """Also where atheris cannot be had: valid inputs, and the same few hundred changes of them in each run."""
    goal = fuzz.TARGETS[target]
    chance = random.Random(target)
    seeds = [seed for seed in goal.seeds() if len(seed) < 50_000]
    assert seeds
    changed = set()
    for number in range(300):
        data = seeds[number % len(seeds)]
        for _ in range(chance.choice([0, 1, 1, 3])):
            data = fuzz.mutate(goal, data, 1 << 16, chance.randrange(1 << 30), lambda part, most: flip(part, chance))
        goal.run(data)
        changed.add(data)
    assert len(changed) > 100
