"""KEYS: identities and key pairs are made once, kept, and never guessed or shown to others."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
import zmq
from conftest import PROGRAM, World, find_free_port, uncovered

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


@pytest.mark.parametrize("load", [z.load_identity, lambda folder: z.load_pair(f"{folder}/key")], ids=["name", "pair"])
def test_identity_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(z.BackupError, match=os.strerror(errno.ENOSPC)):
        load(str(tmp_path / "state"))
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


# ---- key pairs ----

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # of RFC 26, where its secret half is public
SECRET = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"


def get_mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_pair_is_made_once_and_private(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a/keys/server"
    before = os.umask(umask)
    try:
        made = z.load_pair(str(path))
    finally:
        os.umask(before)
    assert z.load_pair(str(path)) == made
    assert [get_mode(one) for one in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]
    assert path.read_bytes() == z.encode_secret(made.secret) and os.listdir(path.parent) == ["server"]
    assert z.is_key(made.public) and z.is_key(made.secret) and made.public != made.secret
    assert made.secret not in repr(made)  # of what a traceback or a debugger shows


def test_pair_differs_between_machines(tmp_path: Path) -> None:
    assert z.load_pair(str(tmp_path / "a")) != z.load_pair(str(tmp_path / "b"))


def test_pair_has_the_public_half_of_its_secret(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(z.encode_secret(SECRET))
    path.chmod(0o600)
    assert z.load_pair(str(path)) == z.KeyPair(KEY, SECRET)


def test_pair_whose_public_half_looks_like_a_flag_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([(b"-" + b"a" * 39, b"s" * 40), (b"@" + b"a" * 39, b"s" * 40), (b"a" * 40, b"t" * 40)])
    monkeypatch.setattr(zmq, "curve_keypair", lambda: next(made))
    assert z.make_pair() == z.KeyPair("a" * 40, "t" * 40)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o610])
def test_pair_in_a_file_open_to_others_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    z.load_pair(str(path))
    path.chmod(mode)
    with pytest.raises(z.BackupError) as caught:
        z.load_pair(str(path))
    assert str(caught.value) == (
        f"{path} is open to other users, and {path} is a secret key: if nobody has read it, chmod 600 {path};"
        " else remove it, and a new key is made"
    )
    path.chmod(0o400)
    assert z.encode_secret(z.load_pair(str(path)).secret) == path.read_bytes()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o711, 0o1777])
def test_pair_in_a_folder_open_to_others_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys/server"
    z.load_pair(str(path))
    path.parent.chmod(mode)
    with pytest.raises(z.BackupError) as caught:
        z.load_pair(str(path))
    assert str(caught.value) == (
        f"{path.parent} is open to other users, and {path} is a secret key: if nobody has read it,"
        f" chmod 700 {path.parent}; else remove it, and a new key is made"
    )


@pytest.mark.parametrize("command", [["key"], ["server", "--once", "--range", "9"]])
def test_pair_of_a_store_open_to_others_ends_the_command(world: World, command: list[str]) -> None:
    world.key()
    (world.store / "keys/server").chmod(0o644)
    done = world.run(*command, code=1)
    assert done.stdout == ""
    assert done.stderr == (
        "zbackup: backups/keys/server is open to other users, and backups/keys/server is a secret key: if nobody has"
        " read it, chmod 600 backups/keys/server; else remove it, and a new key is made\n"
    )


def test_pair_of_a_node_open_to_others_ends_the_node(world: World) -> None:
    world.keyed().stop()
    (world.path / f"state/zbackup/node-127.0.0.9-{world.port}/key").chmod(0o604)
    node = world.node("--server-key", world.key(), wait=False)
    assert node.process.wait(20) == 1
    assert "is open to other users" in node.output and node.output.count("\n") == 1


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_pair_behind_a_symbolic_link_refused(tmp_path: Path, target: str) -> None:
    z.load_pair(str(tmp_path / "elsewhere"))
    (tmp_path / "key").symlink_to(target)
    with pytest.raises(z.BackupError, match="can be neither read nor made"):
        z.load_pair(str(tmp_path / "key"))
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "key"]


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"short\n", b"a" * 39, b"a" * 41, b"a" * 39 + b"~", b"\xff" * 40, bytes(40), b"a " * 20]
)
def test_pair_file_that_holds_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(z.BackupError, match="holds no secret key; restore it, or remove it") as caught:
        z.load_pair(str(path))
    assert caught.value.exit_code == 1 and path.read_bytes() == data


def test_pair_file_that_is_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key", 0o600)
    with pytest.raises(z.BackupError):
        z.load_pair(str(tmp_path / "key"))


def test_pair_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(z.BackupError, match=f"the key {tmp_path}/file/key can be neither read nor made: Not a dir"):
        z.load_pair(str(tmp_path / "file/key"))


@pytest.mark.parametrize("command", ["key", "server"])
def test_pair_that_cannot_be_made_fails_as_what_it_lies_in(world: World, command: str) -> None:
    """In the store, the store fails with its exit code; elsewhere it is the file that --key-file names."""
    flags = world.server_flags() if command == "server" else [command]
    world.store.mkdir(0o700)
    (world.store / "keys").touch()
    (world.path / "file").touch()
    for code, *key_file in ((4,), (1, "--key-file", "file/key")):
        assert "can be neither read nor made: Not a directory" in world.run(*flags, *key_file, code=code).stderr


AS_NOBODY = """
import encodings.ascii, fcntl, os, secrets, sys, zbackup, zmq, zmq.utils.z85
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    print(zbackup.load_pair(sys.argv[1]).public)
except zbackup.BackupError as error:
    print(error)
"""


def test_pair_in_a_folder_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        path = os.path.join(folder, "key")
        command = [sys.executable, "-c", AS_NOBODY, path]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"the key {path} can be neither read nor made: Permission denied\n", done.stderr
        assert os.listdir(folder) == []


def test_pair_made_by_many_at_once(tmp_path: Path) -> None:
    script = "import sys, zbackup; sys.stdin.readline(); print(zbackup.load_pair(sys.argv[1]).public)"
    command = [sys.executable, "-c", script, str(tmp_path / "keys/server")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=ENV, **pipes) for _ in range(16)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate(timeout=60)[0] for process in processes}
    assert len(found) == 1 and z.is_key(found.pop().strip())
    assert os.listdir(tmp_path / "keys") == ["server"]


@pytest.mark.parametrize("raced", [True, False])
def test_pair_that_another_process_makes_at_this_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raced: bool
) -> None:
    """Between the look for the file and its making."""
    path = tmp_path / "key"
    if raced:
        path.write_bytes(z.encode_secret(SECRET))
        path.chmod(0o600)
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
    assert (z.load_pair(str(path)).public == KEY) is raced


def test_pyzmq_without_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda what: what != "curve")
    with pytest.raises(z.BackupError, match="built without CURVE"):
        z.load_curve()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(KEY, True), (SECRET, True), (KEY[1:], False), (KEY + "a", False), (KEY[:-1] + "\n", False), ("", False)]
    + [(KEY[:-1] + wrong, False) for wrong in "\"',;|_~` \\é"],
)
def test_is_key(text: str, expected: bool) -> None:
    assert z.is_key(text) is expected


BEYOND = "a" * 35 + "#####"  # its last five characters are a number beyond 32 bits, which Z85 has none for


@pytest.mark.parametrize("use", ["text", "file", "node", "trust"])
def test_key_beyond_the_numbers_of_z85(world: World, use: str) -> None:
    if use == "text":
        assert not z.is_key(BEYOND)
    elif use == "file":
        world.key()
        (world.store / "keys/server").write_text(BEYOND)
        assert "holds no secret key" in world.run("key", code=1).stderr
    elif use == "node":
        world.run("node", "--port", str(world.port), "--file", "files", "--server-key", BEYOND, code=2)
    else:
        world.sweep(code=5)
        assert "is no key" in world.run("trust", "laptop", BEYOND, code=2).stderr


def test_name_short_stands_well_in_a_file_name() -> None:
    assert z.name_short("0123456789abcdef" * 2) == "01234567"
    names = {z.name_short(KEY), z.name_short(SECRET)}
    assert len(names) == 2 and all(re.fullmatch("[0-9a-f]{8}", name) for name in names)


# ---- public keys, and where a node looks for them ----


@pytest.mark.parametrize("text", [f"{KEY}\n", KEY, f"# note\n\n  {KEY} \n#\n", z.encode_public(KEY).decode()])
def test_public_file_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "zbackup.pub").write_text(text)
    assert z.load_public(str(tmp_path / "zbackup.pub")) == KEY


@pytest.mark.parametrize(
    "data",
    [b"", b"# only\n", KEY.encode() + b"\n" + SECRET.encode(), b"rubbish", b"\xff" * 40, b"x" * 20000, bytes(40)],
)
def test_public_file_that_holds_no_key(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "zbackup.pub"
    path.write_bytes(data)
    with pytest.raises(z.UsageError) as caught:
        z.load_public(str(path))
    assert str(caught.value) == f"{path} does not hold one public key; `zbackup.pyz key --file zbackup.pub` makes it"


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o646])
def test_public_file_that_any_user_can_write_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "zbackup.pub"
    path.write_bytes(z.encode_public(KEY))
    path.chmod(mode)
    with pytest.raises(z.UsageError) as caught:
        z.load_public(str(path))
    assert str(caught.value) == f"{path} can be written by any user, so its key proves nothing: chmod o-w it"


@pytest.mark.parametrize(("where", "reason"), [("absent", "No such file"), (".", "Is a directory")])
def test_public_file_that_cannot_be_read(tmp_path: Path, where: str, reason: str) -> None:
    with pytest.raises(z.UsageError, match=f"the server's key {tmp_path / where} cannot be read: {reason}"):
        z.load_public(str(tmp_path / where))


def test_public_key_is_found_in_order(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "ab"]
    for folder in folders:
        os.mkdir(folder)
    assert z.find_public("", folders) == ""
    (tmp_path / "b/zbackup.pub").write_text(SECRET)
    assert z.find_public("", folders) == SECRET
    (tmp_path / "a/zbackup.pub").write_text(KEY)
    assert z.find_public("", folders) == KEY
    assert z.find_public(str(tmp_path / "b/zbackup.pub"), folders) == SECRET
    assert z.find_public("a" * 40, folders) == "a" * 40
    (tmp_path / "a/zbackup.pub").unlink()
    (tmp_path / "a/zbackup.pub").symlink_to("nowhere")  # something is amiss: not to be passed over
    with pytest.raises(z.UsageError, match="No such file"):
        z.find_public("", folders)


# ---- the command ----


def test_key_prints_the_key(world: World) -> None:
    first, second = world.run("key"), world.run("key")
    assert re.fullmatch(r"[0-9A-Za-z]\S{39}\n", first.stdout) and z.is_key(first.stdout.strip())
    assert first.stdout == second.stdout and second.stderr == ""
    where = "its secret half is in backups/keys/server, keep a copy of it"
    assert first.stderr == f"zbackup: a new key pair; {where}\n"
    assert [get_mode(world.store / name) for name in ("", "keys", "keys/server")] == [0o700, 0o700, 0o600]


def test_key_file_is_what_a_node_takes(world: World) -> None:
    said = world.run("key", "--file", "zbackup.pub").stdout
    assert said == "wrote zbackup.pub: put it beside zbackup.pyz on each machine, and start the node there\n"
    assert (world.path / "zbackup.pub").read_bytes() == z.encode_public(world.key())
    assert get_mode(world.path / "zbackup.pub") == 0o644
    (world.files / "a").write_text("a")
    node = world.node()
    assert f"to the server with the key {world.key()}; this node's key is " in node.output
    assert world.sweep()["nodes"][0]["snapshot"]["grade"] == "stable"


def test_key_of_a_store_that_is_none(world: World) -> None:
    (world.files / "a").touch()
    done = world.run("key", "--store", "files", code=4)
    assert "files is not a zbackup store, and not empty (it has a)" in done.stderr
    assert os.listdir(world.files) == ["a"]


def test_key_makes_the_folder_that_becomes_a_store(world: World) -> None:
    key = world.key()
    assert os.listdir(world.store) == ["keys"]
    world.keyed()
    world.sweep()
    assert world.key() == key and (world.store / "zbackup.json").exists() and len(world.listed()) == 1


def test_key_file_elsewhere(world: World) -> None:
    flags = ("--key-file", "safe/secret")
    key = world.key(*flags)
    assert not world.store.exists() and get_mode(world.path / "safe/secret") == 0o600
    world.node("--server-key", key)
    report = world.sweep(*flags)
    assert report["nodes"][0]["snapshot"]["grade"] == "stable" and not (world.store / "keys").exists()
    assert world.sweep(code=1)["nodes"][0]["state"] == "refuses"  # by default the store has a key of its own


# ---- the node's side ----


def read_node(world: World, address: str = "127.0.0.9") -> tuple[str, Path]:
    """Return the public key that the last node told, and the file of its secret half."""
    told = re.search(r"this node's key is (\S+)\n", world.nodes[-1].output)
    assert told and z.is_key(told[1])
    return told[1], world.path / f"state/zbackup/node-{address}-{world.port}/key"


def copy_program(world: World) -> Path:
    """Return a copy of the program in a folder of its own; coverage would miss its source at the end."""
    program = world.path / "tool/zbackup.py"
    program.parent.mkdir()
    shutil.copy(PROGRAM, program)
    world.env = uncovered(world.env)
    return program


@pytest.mark.parametrize("given", ["KEY", "FILE", "here", "program"])
def test_node_finds_the_servers_key(world: World, given: str) -> None:
    key, program = world.key(), copy_program(world)
    (world.path / "some.key").write_text(key)
    if given in ("here", "program"):
        where = world.path if given == "here" else program.parent
        (where / "zbackup.pub").write_bytes(z.encode_public(key))
    flags = {"KEY": ["--server-key", key], "FILE": ["--server-key", "some.key"]}.get(given, [])
    node = world.node(*flags, program=program)
    assert re.fullmatch(
        rf"serving files at 127.0.0.9:{world.port} to the server with the key {re.escape(key)};"
        r" this node's key is [0-9A-Za-z]\S{39}\n",
        node.output,
    )
    assert world.sweep()["nodes"][0]["exit_code"] == 0


def test_node_takes_the_key_beside_the_program_before_that_of_the_folder(world: World) -> None:
    program = copy_program(world)
    (world.path / "zbackup.pub").write_bytes(z.encode_public(KEY))
    (program.parent / "zbackup.pub").write_bytes(z.encode_public(world.key()))
    node = world.node(program=program)
    assert world.key() in node.output and KEY not in node.output


def test_node_without_a_key_says_what_to_do(world: World) -> None:
    assert world.node().output == (
        f"serving files at 127.0.0.9:{world.port} to this machine only; for the LAN, `zbackup.pyz key --file"
        " zbackup.pub` on the server makes a file to put beside zbackup.pyz here\n"
    )


WRONG_NODE = {
    "open to all": (["--server-key", "open.pub"], "open.pub can be written by any user, so its key proves nothing"),
    "in the folder": ([], "zbackup.pub can be written by any user"),
    "garbage": (["--server-key", "garbage"], "garbage does not hold one public key"),
    "no file": (["--server-key", "absent"], "the server's key absent cannot be read: No such file or directory"),
    "insecure": (["--server-key", KEY, "--insecure"], "--insecure goes without a server's key: leave out --server-key"),
    "folder": (
        ["--server-key", KEY, "--folder", "a/b"],
        "--folder a/b: letters, digits and . _ - make a folder's name",
    ),
    "reserved folder": (["--folder", "packs"], "--folder packs: letters, digits"),
    "hidden folder": (["--folder", ".x"], "--folder .x: letters, digits"),
    "odd folder": (["--folder", "né\x1b"], r"--folder né\x1b: letters, digits"),
}


@pytest.mark.parametrize("what", WRONG_NODE)
def test_node_with_wrong_flags_of_keys(world: World, what: str) -> None:
    arguments, words = WRONG_NODE[what]
    (world.path / "garbage").write_text("garbage\n")
    for name in ["open.pub", *(["zbackup.pub"] if what == "in the folder" else [])]:
        (world.path / name).write_bytes(z.encode_public(KEY))
        (world.path / name).chmod(0o666)
    done = world.run("node", "--file", "files", "--port", str(world.port), *arguments, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("zbackup: ") and words in done.stderr
    assert not (world.path / "state").exists()


def test_node_insecure_where_a_key_lies_about_refused(world: World) -> None:
    world.run("key", "--file", "zbackup.pub")
    done = world.run("node", "--file", "files", "--port", str(world.port), "--insecure", code=2)
    assert "leave out --server-key, or move zbackup.pub away" in done.stderr


def test_node_keeps_its_key(world: World) -> None:
    world.keyed()
    told, path = read_node(world)
    secret = path.read_bytes()
    assert (get_mode(path), get_mode(path.parent)) == (0o600, 0o700)
    assert secret.decode().strip() not in world.nodes[0].output
    world.nodes[0].stop()
    world.keyed()
    assert read_node(world) == (told, path) and path.read_bytes() == secret
    world.keyed(address="127.0.0.10")  # a node at another address is another node
    other, elsewhere = read_node(world, "127.0.0.10")
    assert other != told and get_mode(elsewhere) == 0o600
    world.sweep("--range", "9-10")
    assert {row["NODE"]: row["KEY"] for row in world.known()} == {"127.0.0.9": told, "127.0.0.10": other}


# ---- who a node's socket lets in ----


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("fe80::1", False), ("", False), ("localhost", False)],
)
def test_is_loopback(address: str, expected: bool) -> None:
    assert z.is_loopback(address) is expected


def test_loopback_where_the_system_cannot_bind_to_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_BINDTODEVICE", raising=False)
    assert z.can_bind_to_loopback() is False


def test_socket_needs_a_pair_for_keys() -> None:
    wire = z.Wire(z.make_clock(), z.threading.Event(), 1.0)
    try:
        with pytest.raises(z.BackupError, match="no key pair to meet nodes with"):
            z.Peer(wire, z.Address("127.0.0.9", find_free_port()), 1.0, "")
        with pytest.raises(z.BackupError, match="no key pair to prove who this node is"):
            z.Listener(wire, ["tcp://127.0.0.1:*"], z.Door(server_key=KEY), print)
    finally:
        wire.close()


@pytest.mark.parametrize("frames", [6, 8])
@pytest.mark.parametrize("mechanism", [b"CURVE", b"NULL", b"PLAIN"])
def test_doorkeeper_lets_in_whole_keys_of_curve_alone(frames: int, mechanism: bytes) -> None:
    asked = [b"1.0", b"7", b"domain", b"10.0.0.9", b"", mechanism, *([b"k" * 32] * (frames - 6))]
    assert z.Doorkeeper._answer(asked)[:3] == [b"1.0", b"7", b"400"]
    good = [*asked[:6], b"k" * 32]
    assert z.Doorkeeper._answer(good)[2] == (b"200" if mechanism == b"CURVE" else b"400")
    assert z.Doorkeeper._answer([*good[:6], b"k" * 31])[2] == b"400"
