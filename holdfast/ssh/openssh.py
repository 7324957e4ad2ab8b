"""The link for bulk: the system's OpenSSH client, one process and one connection per channel.

The client does the cryptography in its own process and so on another core; ours spends a fifth of the processor time that
paramiko would take from it (docs/SSH.md). What it is told:

- never ask anything (there may be no terminal), never forward anything, never a shell's comfort of any kind;
- host keys must be known, always: from our own file, and with `user_config` from the user's, too;
- with `user_config`, the user's SSH configuration counts (ProxyJump, HostName, agents, certificates); without it neither that
  nor an agent does, and the connection is what stands here and nothing else;
- no compression: what we send is compressed, or hashed, or counted.

A command line is visible to all users of a machine, so nothing secret is ever part of it; passwords are paramiko's business.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from holdfast.errors import FarSideEnded, HostUnreachable, LinkError, LinkLost, LinkTimeout, UsageError
from holdfast.ssh.address import Address
from holdfast.ssh.descriptors import writing_parts
from holdfast.ssh.link import STDOUT_LIMIT_BYTES, Access, Patience, Result, far_failure, run_to_end
from holdfast.ssh.process import ClientProcess
from holdfast.ssh.throttle import Throttle
from holdfast.ssh.verdict import verdict

__all__ = ["OpenSshChannel", "OpenSshLink", "client_options"]

_LAST_WORDS_S: Final = 10.0
_FAST_CIPHERS: Final = (
    "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"  # ^: first, with all others behind them
)

_ALWAYS: Final = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "CheckHostIP=no",
    "UpdateHostKeys=no",
    "VerifyHostKeyDNS=no",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "Tunnel=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "EscapeChar=none",
    "Compression=no",
    "ConnectionAttempts=1",
    "TCPKeepAlive=yes",
    "IPQoS=throughput",
)


def client_options(access: Access, patience: Patience) -> list[str]:
    """The client's options, without the host and the command.

    Raises:
        UsageError: a file's name can not be passed to the client.
    """
    options = [*_ALWAYS, f"Ciphers={_FAST_CIPHERS}"]
    options += [
        f"ConnectTimeout={max(1, round(patience.connect_s))}",
        f"ServerAliveInterval={patience.keep_alive_s}",
        f"ServerAliveCountMax={patience.keep_alive_count}",
    ]
    known_hosts = _quoted(access.known_hosts)
    if access.user_config:
        options.append(f"UserKnownHostsFile={known_hosts} ~/.ssh/known_hosts ~/.ssh/known_hosts2")
    else:
        options += [
            f"UserKnownHostsFile={known_hosts}",
            "GlobalKnownHostsFile=/dev/null",
            "IdentityAgent=none",
            "PreferredAuthentications=publickey",
        ]
    if access.key:
        options += [f"IdentityFile={_quoted(access.key)}", "IdentitiesOnly=yes"]
    arguments = [] if access.user_config else ["-F", "none"]
    for option in options:
        arguments += ["-o", option]
    return arguments


class OpenSshChannel:
    """A command over a connection of its own. Implements `Channel`."""

    def __init__(self, process: ClientProcess, address: Address, throttle: Throttle | None) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._process = process
        self._address = address
        self._throttle = throttle
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._write_closed = False
        self._killed = False
        self._closed = False

    @property
    def wire_bytes(self) -> tuple[int, int] | None:
        """Bytes sent and received with all that SSH adds, known once the command has ended."""
        return self._process.progress.wire_bytes

    @property
    def cipher(self) -> str:
        """What both sides agreed on."""
        return self._process.progress.cipher

    @property
    def closed(self) -> bool:
        """Whether it has been let go."""
        return self._closed

    @property
    def client_pid(self) -> int:
        """The process id of the SSH client."""
        return self._process.pid

    def read(self, limit_bytes: int) -> bytes:
        """See `Channel.read`."""
        with self._reading:
            data = os.read(self._open_output(), self._piece_bytes(limit_bytes))
            self.received_bytes += len(data)
        self._taken(len(data))
        return data

    def readinto(self, buffer: memoryview) -> int:
        """See `Channel.readinto`."""
        with self._reading:
            count = os.readv(self._open_output(), [buffer[: self._piece_bytes(len(buffer))]])
            self.received_bytes += count
        self._taken(count)
        return count

    def _open_output(self) -> int:
        """What the client writes to. Called with the lock for reading held."""
        if self._closed:
            raise self._failure()
        return self._process.stdout

    def _piece_bytes(self, limit_bytes: int) -> int:
        return min(limit_bytes, self._throttle.piece_bytes) if self._throttle else limit_bytes

    def _taken(self, count: int) -> None:
        """So many bytes have been read; none: the end."""
        if count == 0:
            # The client ends with its output, so how it ended is known in no time.
            self._process.ended.wait(_LAST_WORDS_S)
            if self._process.ended.is_set() and self._process.progress.status is None:
                raise self._failure()
        elif self._throttle:
            self._throttle.take(count)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See `Channel.write`."""
        self.write_parts([data])

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """See `Channel.write_parts`."""
        with self._writing:
            if self._write_closed:
                raise FarSideEnded(f"the input of the command on {self._address} has been ended already")
            try:
                for count in writing_parts(self._process.stdin, parts, self._throttle):
                    self.sent_bytes += count
            except BrokenPipeError:
                raise self._not_taken() from None

    def close_write(self) -> None:
        """See `Channel.close_write`."""
        with self._writing:
            if not self._write_closed:
                self._write_closed = True
                self._process.close_stdin()

    def kill(self) -> None:
        """See `Channel.kill`."""
        self._killed = not self._process.ended.is_set()
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> int:
        """See `Channel.wait`."""
        if not self._process.ended.wait(timeout_s):
            raise LinkTimeout(f"the command on {self._address} still runs after {timeout_s:g} s")
        status = self._process.progress.status
        if status is None:
            raise self._failure()
        return status

    def stderr_tail(self) -> bytes:
        """See `Channel.stderr_tail`."""
        return self._process.stderr_tail()

    def close(self) -> None:
        """See `Channel.close`."""
        self.kill()
        self._process.ended.wait()
        self.close_write()
        with self._reading:
            if not self._closed:
                self._closed = True
                self._process.close_stdout()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failure(self) -> LinkError:
        if self._killed or self._closed:
            return LinkLost(f"the connection to {self._address} was ended from this side")
        return verdict(self._address, self._process.progress, b"")

    def _not_taken(self) -> LinkError:
        self._process.ended.wait(_LAST_WORDS_S)
        status = self._process.progress.status
        if status is None:
            return self._failure()
        reason = far_failure(self._address, "data was sent to it", status, self.stderr_tail())
        return FarSideEnded(reason.message, hint=reason.hint)


class OpenSshLink:
    """Commands on one host, each over a connection of its own. Implements `Link`.

    Args:
        throttle: limits the sum of all channels, in both directions.
        program: the client.
    """

    def __init__(
        self,
        address: Address,
        access: Access,
        *,
        patience: Patience | None = None,
        throttle: Throttle | None = None,
        program: str = "ssh",
    ) -> None:
        self._address = address
        self._patience = patience or Patience()
        self._throttle = throttle
        self._program = program
        self._options = [*client_options(access, self._patience), "-T"]
        if address.user:
            self._options += ["-l", address.user]
        if address.port:
            self._options += ["-p", str(address.port)]
        self._lock = threading.Lock()
        self._channels: set[OpenSshChannel] = set()

    @property
    def address(self) -> Address:
        """See `Link.address`."""
        return self._address

    def start(self, command: str) -> OpenSshChannel:
        """See `Link.start`."""
        arguments = ["-o", "LogLevel=DEBUG1", "-o", "ControlMaster=no", "-o", "ControlPath=none"]
        process = ClientProcess(
            self._program, [*arguments, *self._options, "--", self._address.host, _one_argument(command)]
        )
        channel = OpenSshChannel(process, self._address, self._throttle)
        try:
            self._await_start(process)
        except BaseException:
            channel.close()
            raise
        with self._lock:
            self._channels = {one for one in self._channels if not one.closed}
            self._channels.add(channel)
        return channel

    def run(
        self,
        command: str,
        stdin: bytes = b"",
        *,
        timeout_s: float = 60.0,
        limit_bytes: int = STDOUT_LIMIT_BYTES,
        sentinel: bool = False,
    ) -> Result:
        """See `Link.run`."""
        return run_to_end(
            self, command, stdin, timeout_s=timeout_s, limit_bytes=limit_bytes, sentinel=sentinel
        )

    def close(self) -> None:
        """See `Link.close`."""
        with self._lock:
            channels, self._channels = self._channels, set()
        for channel in channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await_start(self, process: ClientProcess) -> None:
        if not process.moved.wait(self._patience.connect_s):
            raise HostUnreachable(
                f"{self._address} did not let us in within {self._patience.connect_s:g} s",
                hint="check the network, and whether the host is overloaded",
            )
        if not process.progress.started:
            raise verdict(self._address, process.progress, process.stderr_tail())


def _quoted(path: str) -> str:
    """A file's name as the client's configuration wants it."""
    if not path or any(part in path for part in ('"', "\\", "${", "\n")):
        raise UsageError(f"the SSH client can not use a file with the name {path!r}")
    return '"' + path.replace("%", "%%") + '"'


def _one_argument(command: str) -> str:
    if "\0" in command:
        raise UsageError("a command for another host holds a NUL character")
    return command
