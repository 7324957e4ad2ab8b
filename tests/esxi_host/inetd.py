"""The host's way in: accepts connections on 127.0.0.1 and gives each one a real sshd, as ESXi's inetd does.

sshd itself reads and writes the socket (`sshd -i`), so there is nothing in the road of a byte that a host would not
have. This process keeps a second descriptor of each socket: it asks the kernel how many bytes went over it, and it can cut the
connection in mid-stream. Each connection gets the configuration of the moment, so faults act on the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass

from tests.esxi_host.faults import Faults
from tests.esxi_host.layout import Layout

CONFIGURATION = """\
HostKey /etc/ssh/ssh_host_rsa_key
HostKey /etc/ssh/ssh_host_ecdsa_key
PidFile none
AuthorizedKeysFile /etc/ssh/keys-%u/authorized_keys
StrictModes no
UsePAM yes
PasswordAuthentication no
KbdInteractiveAuthentication {keyboard}
PermitRootLogin yes
Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr
MACs hmac-sha2-256,hmac-sha2-512
KexAlgorithms ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group-exchange-sha256,\
diffie-hellman-group16-sha512,diffie-hellman-group18-sha512,diffie-hellman-group14-sha256
HostKeyAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512
PubkeyAcceptedAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512
Compression no
AllowTcpForwarding no
AllowStreamLocalForwarding no
AllowAgentForwarding no
X11Forwarding no
PermitTunnel no
ClientAliveInterval 200
ClientAliveCountMax 3
MaxSessions {sessions}
MaxStartups {startups}
RekeyLimit {rekey}
PrintMotd yes
Banner {banner}
SetEnv PATH=/bin:/sbin
Subsystem sftp /usr/lib/openssh/sftp-server -f LOCAL5 -l INFO
"""
"""What `sshd -T` of an ESXi 8.0.2 says, as far as it differs from OpenSSH's own defaults."""

_TCP_BYTES = struct.Struct("=120xQQ64xQ")  # acknowledged, received; sent (Linux's struct tcp_info)
_POLL_S = 0.004
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Traffic:
    """Bytes on the wire since the start: payload of TCP, SSH's own part included."""

    connections: int = 0
    sent_bytes: int = 0
    """From the host."""
    received_bytes: int = 0
    """By the host."""


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    sshd: subprocess.Popen[bytes]
    at_cut: tuple[int, int] = (0, 0)
    """What was counted before the connection was cut: the kernel forgets it then."""

    def counted(self) -> tuple[int, int]:
        """Bytes that the host has sent and received."""
        sent, received = _counted(self.socket)
        return sent + self.at_cut[0], received + self.at_cut[1]

    def cut(self) -> None:
        """The client sees a reset at once; nothing that is on the way is delivered."""
        self.at_cut = self.counted()
        _libc.connect(
            self.socket.fileno(), bytes(16), 16
        )  # to AF_UNSPEC: that is how one takes a connection down


class Inetd:
    """Listens from the beginning, serves when `start` is called, and ends with its process."""

    def __init__(self, layout: Layout, faults: Faults, port: int) -> None:
        self._layout = layout
        self._faults = faults
        self._traffic = Traffic()
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, name="inetd", daemon=True).start()

    @property
    def traffic(self) -> Traffic:
        """What went over all connections, those that are open included."""
        with self._lock:
            sent, received = self._traffic.sent_bytes, self._traffic.received_bytes
            for connection in self._connections:
                out, came = connection.counted()
                sent, received = sent + out, received + came
            return Traffic(self._traffic.connections, sent, received)

    def drop_all(self) -> int:
        """The number of connections that were cut by a reset, now."""
        with self._lock:
            for connection in self._connections:
                connection.cut()
            return len(self._connections)

    def _accept(self) -> None:
        while True:
            accepted, _ = self._listener.accept()
            if self._faults.take("refuse_connections"):
                accepted.close()
                continue
            threading.Thread(target=self._serve, args=(accepted,), name="connection", daemon=True).start()

    def _configuration(self) -> str:
        """The path, in the host, of a configuration as the faults of the moment want it."""
        banner = "/etc/issue" if self._faults.get("banner") else "none"
        if banner != "none":
            with open(os.path.join(self._layout.root, "etc/issue"), "w", encoding="utf-8") as file:
                file.write(str(self._faults.get("banner")) + "\n")
        text = CONFIGURATION.format(
            banner=banner,
            rekey=self._faults.get("rekey_limit") or "1G 1H",
            keyboard="no" if self._faults.get("no_password") else "yes",
            sessions=int(self._faults.get("max_sessions") or 10),
            startups=self._faults.get("max_startups") or "10:30:100",
        )
        noise = self._faults.get("session_noise")
        if noise:
            with open(os.path.join(self._layout.root, "etc/noise"), "w", encoding="utf-8") as file:
                file.write(str(noise) + "\n")
            text += (
                "ForceCommand cat /etc/noise >&2; "
                'if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec sh -c "$SSH_ORIGINAL_COMMAND"; else exec sh -l; fi\n'
            )
        name = f"sshd_config.{abs(hash(text)):x}"
        path = os.path.join(self._layout.root, "etc/ssh", name)
        if not os.path.exists(path):
            with open(path + ".new", "w", encoding="utf-8") as file:
                file.write(text)
            os.rename(path + ".new", path)
        shown = os.path.join(self._layout.root, "etc/ssh/sshd_config")  # for those who look
        if not os.path.exists(shown) or not os.path.samefile(shown, path):
            with contextlib.suppress(OSError):  # another connection does the same
                os.symlink(name, f"{shown}.{threading.get_ident()}")
                os.replace(f"{shown}.{threading.get_ident()}", shown)
        return f"/etc/ssh/{name}"

    def _serve(self, accepted: socket.socket) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        command = [
            shutil.which("chroot") or "/usr/sbin/chroot",
            self._layout.root,
            "/usr/sbin/sshd",
            "-i",
            "-f",
            self._configuration(),
        ]
        sshd = subprocess.Popen(
            [*command, "-E", "/var/log/auth.log"],
            stdin=accepted.fileno(),
            stdout=accepted.fileno(),
            stderr=subprocess.DEVNULL,
            env={"PATH": "/bin:/sbin"},
        )
        connection = _Connection(accepted, sshd)
        with self._lock:
            self._traffic.connections += 1
            self._connections.append(connection)
        self._watch(connection)
        with self._lock:
            self._connections.remove(connection)
            sent, received = connection.counted()
            self._traffic.sent_bytes += sent
            self._traffic.received_bytes += received
        accepted.close()

    def _watch(self, connection: _Connection) -> None:
        """Returns when sshd has ended. Cuts or freezes the connection when a fault says so."""
        exited = os.pidfd_open(connection.sshd.pid)
        poll = select.poll()
        poll.register(exited, select.POLLIN)
        frozen = False
        try:
            while True:
                armed = self._faults.get("drop_after_bytes") or self._faults.get("hang_after_bytes")
                if poll.poll(_POLL_S * 1000 if armed else 50):
                    break
                moved = sum(connection.counted())
                limit = self._faults.get("drop_after_bytes")
                if limit and moved >= int(limit) and self._faults.take("drop_after_bytes"):
                    connection.cut()
                limit = self._faults.get("hang_after_bytes")
                if not frozen and limit and moved >= int(limit) and self._faults.take("hang_after_bytes"):
                    frozen = True
                    for pid in family(os.path.join(self._layout.root, "proc"), connection.sshd.pid):
                        os.kill(pid, signal.SIGSTOP)
            connection.sshd.wait()
        finally:
            os.close(exited)


def _counted(connection: socket.socket) -> tuple[int, int]:
    """Bytes that the host has sent and received on a connection."""
    try:
        answer = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0, 0
    acknowledged, received, sent = _TCP_BYTES.unpack_from(answer.ljust(_TCP_BYTES.size, b"\0"))
    return sent or acknowledged, received


def family(proc: str, pid: int) -> list[int]:
    """A process and all that descend from it. `proc` is where /proc of this namespace is mounted."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/stat", encoding="utf-8", errors="replace") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(name))
    found = [pid]
    for member in found:
        found.extend(parents.get(member, []))
    return found
