"""The tools, each as its users have it between two machines: how to begin, to copy, and to restore.

All restore on the vault, beside the store, so that none has to cross the wire: that is where zbackup restores.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trees
from lab import Command, Failed, Lab, Team, wait_for

ROOT = Path(__file__).resolve().parents[2]
PATHS = f"{os.environ.get('PATH', '/bin')}:/usr/sbin:/sbin:/usr/local/bin"
START = 60.0  # seconds that a server gets to listen


def find_program(name: str) -> str | None:
    """Return where a program is; $BENCH_BORG names a borg outside of PATH."""
    return os.environ.get(f"BENCH_{name.upper()}") or shutil.which(name, path=PATHS)


@dataclass(frozen=True)
class Yard:
    """What a tool works with: the lab, a folder of its own, the folder that is copied."""

    lab: Lab
    folder: Path
    data: Path
    versions: bool = False  # whether older versions must stay restorable, also with tools that have none
    keys: Path = Path()  # the key pairs of ssh


class Peer:
    """A tool that copies a folder of the machine into a store on the vault."""

    name = ""
    programs: tuple[str, ...] = ()

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        self.data = yard.data
        self.store = yard.folder / "store"
        yard.folder.mkdir(parents=True)
        self.team = Team(yard.lab, yard.folder / "logs")
        for side in ("machine", "vault"):
            (yard.folder / side).mkdir()

    @classmethod
    def missing(cls) -> str:
        """Return the programs that are not installed."""
        return ", ".join(p for p in cls.programs if not find_program(p))

    @classmethod
    def version(cls) -> str:
        return first_line(find_program(cls.programs[0]) or "false", "--version")

    def prepare(self) -> None:
        """Make the store and start the servers; not measured. Call `close` even when this fails."""
        self.store.mkdir(mode=0o700)

    def backup(self, number: int) -> Command:
        """Return the command that makes version `number`."""
        raise NotImplementedError

    def restore(self, number: int, to: Path) -> Command:
        """Return the command that restores version `number` into the new folder `to`."""
        raise NotImplementedError

    def root(self, to: Path) -> Path:
        """Return the folder below `to` that is now as the data was."""
        return to

    def keeps_all(self) -> bool:
        """Return whether the older versions can be restored."""
        return True

    def check(self, expected: dict[str, str]) -> list[str]:
        """Return what is wrong with files that the tool keeps besides its versions."""
        return []

    def on(self, side: str, *argv: str, **env: str) -> Command:
        """Return a command of one side, in a home of its own: no settings or caches of the user count."""
        home = self.yard.folder / side
        return Command(
            side,
            (find_program(argv[0]) or argv[0], *argv[1:]),
            self.data.parent if side == "machine" else home,
            {"PATH": PATHS, "HOME": str(home), "LANG": "C.UTF-8", "TZ": "UTC", **env},
        )

    def address(self, side: str) -> str:
        return self.yard.lab.places[side].address

    def serve(self, command: Command, address: str, port: int) -> None:
        """Start a server and wait until it listens."""
        log = self.team.seats[command.side].serve(command, f"server-{address}")
        look = self.yard.lab.places[command.side].wrap(("cat", "/proc/net/tcp", "/proc/net/tcp6"))
        wanted = re.compile(f"{socket.inet_aton(address)[::-1].hex()}:{port:04x} [0:]+ 0a ", re.IGNORECASE)

        def listens() -> bool:
            return bool(wanted.search(subprocess.run(look, capture_output=True, text=True).stdout))

        if not wait_for(listens, START):
            raise Failed(f"{command}\ndoes not listen: {log.read_text(errors='replace')}")

    def close(self) -> None:
        self.team.close()
        trees.put_away(self.yard.folder, self.yard.lab.waste)


@cache
def first_line(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    return ((done.stdout + done.stderr).splitlines() or ["?"])[0].strip()


def find_port() -> int:
    """Return a TCP port that is free here, and that the kernel gives to nobody who connects: those begin at 32,768."""
    for port in random.sample(range(31_000, 32_768), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise Failed("no port between 31,000 and 32,767 is free")


# ---- zbackup ----


class Zbackup(Peer):
    """Built as its users have it, keyed, all defaults."""

    name = "zbackup"
    flags: tuple[str, ...] = ()

    @classmethod
    def version(cls) -> str:
        pyz = sys.executable
        return f"{first_line(pyz, str(ROOT / 'zbackup.py'), '--version')}, Python {sys.version.split()[0]}"

    def program(self, side: str, *arguments: str) -> Command:
        return self.on(side, sys.executable, str(self.yard.folder / "zbackup.pyz"), *arguments)

    def prepare(self) -> None:
        pyz = self.yard.folder / "zbackup.pyz"
        build = ["sh", str(ROOT / "build_pyz.sh"), str(pyz)]
        subprocess.run(build, check=True, env={**os.environ, "PYTHON": sys.executable})
        self.port = find_port()
        self.key = str(self.yard.folder / "zbackup.pub")
        self.team.run(self.program("vault", "key", "--store", str(self.store), "--file", self.key))
        self.start_nodes()

    def start_nodes(self) -> None:
        self.start_node(self.address("machine"), self.data.name)

    def start_node(self, address: str, file: str) -> None:
        """Start a node that has its own key, and trusts the vault's."""
        state = str(self.yard.folder / f"state-{address}")
        where = ("--bind", address, "--port", str(self.port), "--server-key", self.key, "--state", state)
        self.serve(self.program("machine", "node", "--file", file, *where), address, self.port)

    def backup(self, number: int) -> Command:
        network, _, part = self.address("machine").rpartition(".")
        where = ("--network", network, "--range", part, "--port", str(self.port))
        return self.program("vault", "server", "--once", *where, "--store", str(self.store), *self.flags)

    def folder_of_node(self) -> Path:
        found = [path for path in self.store.iterdir() if (path / "snapshots").is_dir()]
        if len(found) != 1:
            raise Failed(f"the store has {len(found)} nodes, not one")
        return found[0]

    def check(self, expected: dict[str, str]) -> list[str]:
        """Compare `latest`, whose modes are the store's own: it gives other users nothing."""
        if "--no-latest" in self.flags:
            return []
        found = trees.digest_tree(self.folder_of_node() / "latest" / self.data.name)
        return trees.compare(trees.drop_modes(expected), trees.drop_modes(found))

    def restore(self, number: int, to: Path) -> Command:
        node = self.folder_of_node()
        snapshots = sorted(path.stem for path in (node / "snapshots").glob("*.json"))
        where = ("--store", str(self.store), "--to", str(to), "--at", snapshots[number])
        return self.program("vault", "restore", node.name, *where)

    def root(self, to: Path) -> Path:
        return to / self.data.name


class ZbackupNoLatest(Zbackup):
    name = "zbackup-no-latest"
    flags = ("--no-latest",)


# ---- what goes over ssh ----


def make_keys(folder: Path) -> None:
    """Make the key pairs of a user and of both hosts, for this run only."""
    folder.mkdir(parents=True)
    for name in ("user", "machine", "vault"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)


SSHD = """\
Port {port}
ListenAddress {address}
HostKey {keys}/{side}
AuthorizedKeysFile {keys}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv HOME={home}
Subsystem sftp {sftp}
"""

SSH = """\
Host {side}
  HostName {address}
  Port {port}
  User {user}
  IdentityFile {keys}/user
  IdentitiesOnly yes
  UserKnownHostsFile {known}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
"""


class OverSsh(Peer):
    """A tool that reaches the other side through an sshd with its defaults (ciphers, no compression)."""

    host = "machine"  # the side that is logged in to

    @classmethod
    def missing(cls) -> str:
        """Return what is not installed; sshd runs its commands by the user's own shell."""
        shell = pwd.getpwuid(os.getuid()).pw_shell
        return super().missing() or ("a login shell" if shell.endswith(("nologin", "false")) else "")

    def prepare(self) -> None:
        super().prepare()
        self.config = self.yard.folder / "ssh_config"
        port = find_port()
        facts = {
            "port": port,
            "address": self.address(self.host),
            "side": self.host,
            "user": find_user(),
            "keys": self.yard.keys,
            "known": self.write_known(port),
            "home": self.yard.folder / self.host,
            "sftp": find_sftp(),
        }
        self.config.write_text(SSH.format(**facts))
        settings = self.yard.folder / "sshd_config"
        settings.write_text(SSHD.format(**facts))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd of root insists on this empty folder
        self.serve(self.on(self.host, "sshd", "-D", "-e", "-f", str(settings)), self.address(self.host), port)

    def write_known(self, port: int) -> Path:
        known = self.yard.folder / "known_hosts"
        public = (self.yard.keys / f"{self.host}.pub").read_text()
        known.write_text(f"[{self.address(self.host)}]:{port} {public}")
        return known

    def ssh(self) -> str:
        return f"ssh -F {self.config}"


def find_user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def find_sftp() -> str:
    places = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/libexec/sftp-server")
    return next((place for place in places if os.path.exists(place)), "internal-sftp")


# ---- mirrors ----


class Mirror(Peer):
    """rsync: one copy in plain files, or, where older versions must stay, one folder each with hard links."""

    def target(self, number: int) -> Path:
        return self.store / f"v{number}" if self.yard.versions else self.store / "copy"

    def source(self) -> tuple[str, ...]:
        raise NotImplementedError

    def backup(self, number: int) -> Command:
        link = ("--link-dest", str(self.target(number - 1))) if self.yard.versions and number else ()
        return self.on("vault", "rsync", "-a", "--delete", *link, *self.source(), f"{self.target(number)}/")

    def restore(self, number: int, to: Path) -> Command:
        return self.on("vault", "cp", "-a", str(self.target(number)), str(to))

    def keeps_all(self) -> bool:
        return self.yard.versions


class RsyncDaemon(Mirror):
    name = "rsyncd"
    programs = ("rsync",)

    def prepare(self) -> None:
        super().prepare()
        self.port = find_port()
        config = self.yard.folder / "rsyncd.conf"
        user = f"uid = {os.getuid()}\ngid = {os.getgid()}\n" if os.geteuid() == 0 else ""
        config.write_text(f"use chroot = no\nread only = yes\n{user}[data]\npath = {self.data}\n")
        address = self.address("machine")
        flags = ("--daemon", "--no-detach", "--config", str(config), "--address", address, "--port", str(self.port))
        self.serve(self.on("machine", "rsync", *flags), address, self.port)

    def source(self) -> tuple[str, ...]:
        return (f"rsync://{self.address('machine')}:{self.port}/data/",)


class RsyncSsh(OverSsh, Mirror):
    name = "rsync-ssh"
    programs = ("rsync", "ssh", "sshd")

    def source(self) -> tuple[str, ...]:
        return ("-e", self.ssh(), f"machine:{self.data}/")


# ---- stores ----


class Restic(OverSsh):
    name = "restic"
    programs = ("restic", "ssh", "sshd")
    host = "vault"

    @classmethod
    def version(cls) -> str:
        return first_line(find_program("restic") or "false", "version")

    def call(self, side: str, *arguments: str) -> Command:
        where = str(self.store) if side == "vault" else f"sftp:vault:{self.store}"
        sftp = () if side == "vault" else ("-o", f"sftp.command={self.ssh()} vault -s sftp")
        return self.on(side, "restic", *sftp, *arguments, RESTIC_REPOSITORY=where, RESTIC_PASSWORD="bench")

    def prepare(self) -> None:
        super().prepare()
        self.team.run(self.call("machine", "init"))

    def backup(self, number: int) -> Command:
        return self.call("machine", "backup", str(self.data))

    def restore(self, number: int, to: Path) -> Command:
        names = {}
        for path in (self.store / "snapshots").iterdir():
            names[path.stat().st_mtime_ns] = path.name
        return self.call("vault", "restore", names[sorted(names)[number]], "--target", str(to))

    def root(self, to: Path) -> Path:
        return to / self.data.relative_to("/")


class Borg(OverSsh):
    name = "borg"
    programs = ("borg", "ssh", "sshd")
    host = "vault"

    def call(self, side: str, *arguments: str) -> Command:
        where = str(self.store) if side == "vault" else f"ssh://vault{self.store}"
        return self.on(
            side,
            "borg",
            *arguments,
            BORG_REPO=where,
            BORG_RSH=self.ssh(),
            BORG_REMOTE_PATH=find_program("borg") or "borg",
            BORG_PASSPHRASE="bench",
            BORG_RELOCATED_REPO_ACCESS_IS_OK="yes",  # restored beside the store, by its path there
        )

    def prepare(self) -> None:
        super().prepare()
        self.team.run(self.call("machine", "init", "--encryption", "repokey"))

    def backup(self, number: int) -> Command:
        return self.call("machine", "create", f"::v{number}", self.data.name)

    def restore(self, number: int, to: Path) -> Command:
        to.mkdir()
        command = self.call("vault", "extract", f"::v{number}")
        return Command("vault", command.argv, to, command.env)

    def root(self, to: Path) -> Path:
        return to / self.data.name


class RdiffBackup(OverSsh):
    name = "rdiff-backup"
    programs = ("rdiff-backup", "ssh", "sshd")

    def prepare(self) -> None:
        super().prepare()
        self.made = 0

    def backup(self, number: int) -> Command:
        self.made = number + 1
        # -C is what its own default has; only the settings of ssh are named in addition.
        schema = f"ssh -C -F {self.config} {{h}} rdiff-backup server"
        where = (f"machine::{self.data}", str(self.store))
        return self.on("vault", "rdiff-backup", "--remote-schema", schema, "backup", *where)

    def restore(self, number: int, to: Path) -> Command:
        when = "now" if number == self.made - 1 else f"{self.made - 1 - number}B"
        return self.on("vault", "rdiff-backup", "restore", "--at", when, str(self.store), str(to))


RSNAPSHOT = """\
config_version	1.2
snapshot_root	{store}/
cmd_rsync	{rsync}
cmd_ssh	{ssh}
cmd_cp	{cp}
cmd_rm	{rm}
ssh_args	-F {config}
retain	alpha	30
lockfile	{folder}/rsnapshot.pid
backup	{user}@machine:{data}/	machine/
"""


class Rsnapshot(OverSsh):
    name = "rsnapshot"
    programs = ("rsnapshot", "rsync", "ssh", "sshd")

    @classmethod
    def version(cls) -> str:
        return first_line(find_program("rsnapshot") or "false", "version")

    def prepare(self) -> None:
        super().prepare()
        self.made = 0
        programs = {name: find_program(name) for name in ("rsync", "ssh", "cp", "rm")}
        facts = {
            "config": self.config,
            "folder": self.yard.folder,
            "data": self.data,
            "user": find_user(),
        }
        text = RSNAPSHOT.format(store=self.store, **facts, **programs)
        (self.yard.folder / "rsnapshot.conf").write_text(text)

    def backup(self, number: int) -> Command:
        self.made = number + 1
        return self.on("vault", "rsnapshot", "-c", str(self.yard.folder / "rsnapshot.conf"), "alpha")

    def restore(self, number: int, to: Path) -> Command:
        version = self.store / f"alpha.{self.made - 1 - number}"
        return self.on("vault", "cp", "-a", f"{version}/machine{self.data}", str(to))


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Zbackup, ZbackupNoLatest, RsyncDaemon, RsyncSsh, Restic, Borg, RdiffBackup, Rsnapshot)
}


def choose_peers(names: list[str]) -> dict[str, type[Peer]]:
    """Return those of the named tools that are installed; says which are not."""
    chosen = {}
    for name in names:
        missing = PEERS[name].missing()
        if missing:
            print(f"without {name}: not installed: {missing}", flush=True)
        else:
            chosen[name] = PEERS[name]
    return chosen
