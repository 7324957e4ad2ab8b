"""A real OpenSSH server on 127.0.0.1 for tests, with keys that are made for it and a folder of its own.

    with Sshd(tmp_path / "sshd") as sshd:
        link = OpenSshLink(sshd.address, sshd.access)

It never touches the system's service, its keys or the user's own SSH files. `esxi_like=True` gives it the methods that
ESXi 8 has (no ed25519, no chacha20, no forwarding, no passwords). Needs no root, but logs in as whoever runs it.

Other tests use it as `from tests.ssh.sshd import Sshd`, with the project's root in `sys.path`.
"""

from __future__ import annotations

import getpass
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from holdfast.ssh.address import Address
from holdfast.ssh.link import Access

BASE = """\
ListenAddress 127.0.0.1
Port {port}
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
PrintMotd no
LogLevel VERBOSE
Subsystem sftp internal-sftp
"""

ESXI = """\
Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr
MACs hmac-sha2-256,hmac-sha2-512
KexAlgorithms ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group-exchange-sha256,diffie-hellman-group16-sha512,diffie-hellman-group18-sha512,diffie-hellman-group14-sha256
HostKeyAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512
PubkeyAcceptedAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512
Compression no
AllowTcpForwarding no
AllowStreamLocalForwarding no
X11Forwarding no
ClientAliveInterval 200
ClientAliveCountMax 3
MaxStartups 10:30:100
RekeyLimit 1G 1H
"""


def make_key(path: Path, kind: str = "ecdsa") -> Path:
    """A new key pair without a password."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "test", "-f", path],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return path


def public_part(path: Path) -> str:
    """Type and key of a pair, as they stand in known_hosts and authorized_keys."""
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    """`SHA256:...`, as OpenSSH itself computes it."""
    return subprocess.run(
        ["ssh-keygen", "-lf", f"{path}.pub"], check=True, capture_output=True, text=True
    ).stdout.split()[1]


class Sshd:
    """A running server.

    Args:
        folder: of its own; made if need be.
        host_keys: kinds of host keys that it has; None: ed25519 and rsa, or ecdsa and rsa if like ESXi.
        extra: more lines of configuration. They come first, and in sshd the first one counts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        esxi_like: bool = False,
        host_keys: Sequence[str] | None = None,
        extra: str = "",
        port: int = 0,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kinds = host_keys or (("ecdsa", "rsa") if esxi_like else ("ed25519", "rsa"))
        self.host_keys = {kind: folder / f"host_{kind}" for kind in kinds}
        for kind, path in self.host_keys.items():
            if not path.exists():
                make_key(path, kind)
        self.key = folder / "id_ecdsa"
        self.authorized_keys = folder / "authorized_keys"
        if not self.key.exists():
            make_key(self.key)
            self.authorized_keys.write_text(public_part(self.key) + "\n")
        self.port = port or _free_port()
        self.address = Address("127.0.0.1", getpass.getuser(), self.port)
        self.known_hosts = folder / "known_hosts"
        self.know(self.known_hosts)
        self.access = Access(str(self.known_hosts), str(self.key))
        config = extra + "\n" + BASE.format(port=self.port, folder=folder) + (ESXI if esxi_like else "")
        config += "".join(f"HostKey {path}\n" for path in self.host_keys.values())
        self._config = folder / "sshd_config"
        self._config.write_text(config)
        self._log = folder / "sshd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def know(self, known_hosts: Path, kind: str = "") -> Path:
        """Records the host's keys (or only one) in a known_hosts file."""
        known_hosts.write_text(
            "".join(
                f"{self.address.known_as} {public_part(path)}\n"
                for name, path in self.host_keys.items()
                if kind in ("", name)
            )
        )
        return known_hosts

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text()

    def start(self) -> Self:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # the service would make it
        program = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        assert program, "openssh-server is missing; tools/setup installs it"
        log = self._log.open("wb")
        self._process = subprocess.Popen(
            [program, "-D", "-e", "-f", str(self._config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=True,
        )  # fmt: skip
        log.close()
        while True:
            if self._process.poll() is not None:
                raise AssertionError(f"sshd did not start: {self.log()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    probe.recv(64)  # its banner: it is up, and has noticed that we were there
                    return self

    def connections(self) -> list[int]:
        """The processes that serve one connection each."""
        return _children(self.pid)

    def drop(self) -> int:
        """Breaks all connections; how many there were."""
        pids = self.connections()
        for pid in pids:
            for one in [pid, *_children(pid)]:
                _kill(one, signal.SIGKILL)
        return len(pids)

    def silence(self) -> None:
        """Makes all connections stop answering, without closing them."""
        for pid in self.connections():
            for one in [*_children(pid), pid]:
                _kill(one, signal.SIGSTOP)

    def stop(self) -> None:
        if self._process is None:
            return
        self.drop()
        self._process.terminate()
        self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def processes_with(text: str) -> list[int]:
    """Processes whose command line contains `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in line and state != "Z" and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def await_end(pids: Sequence[int], timeout_s: float = 10.0) -> list[int]:
    """Waits until the processes have ended; those that have not."""
    alive = []
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], timeout_s)[0]:
                alive.append(pid)
        finally:
            os.close(descriptor)
    return alive


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
