"""The link for control: paramiko, in our own process, all channels over one connection.

It can do what the client in `openssh` can not or should not: log in with a password, ask for a host's key without
trusting it, and run many short commands without a handshake for each. It is not for bulk: what it
moves costs time of our own interpreter, five times as much as over the client (docs/SSH.md).

A connection is made when it is needed first, and again after it broke; a command is never repeated.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import paramiko

from holdfast.errors import FarSideEnded, LinkError, LinkLost, LinkTimeout
from holdfast.ssh.address import Address
from holdfast.ssh.known_hosts import KnownHosts
from holdfast.ssh.link import (
    KILLED,
    STDERR_TAIL_BYTES,
    STDOUT_LIMIT_BYTES,
    Access,
    Patience,
    Result,
    far_failure,
    run_to_end,
)
from holdfast.ssh.paramiko_login import Answer, connect, log_in
from holdfast.ssh.throttle import Throttle
from holdfast.ssh.verdict import Progress, verdict

__all__ = ["ParamikoChannel", "ParamikoLink"]

_WINDOW_BYTES: Final = 4 << 20
_PIECE_BYTES: Final = 1 << 18
_LAST_WORDS_S: Final = 2.0
_FREED_S: Final = 1.0


class ParamikoChannel:
    """A command on the shared connection. Implements `Channel`."""

    def __init__(
        self,
        transport: paramiko.Transport,
        channel: paramiko.Channel,
        address: Address,
        throttle: Throttle | None,
    ) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._transport = transport
        self._channel = channel
        self._address = address
        self._throttle = throttle
        self._writing = threading.Lock()
        self._write_closed = False
        self._killed = False
        self._stderr = bytearray()
        self._stderr_lock = threading.Lock()
        # Unread, standard error would fill its window and hold up the command.
        self._listener = threading.Thread(target=self._listen, name="ssh-stderr", daemon=True)
        self._listener.start()

    def read(self, limit_bytes: int) -> bytes:
        """See `Channel.read`."""
        if self._throttle:
            limit_bytes = min(limit_bytes, self._throttle.piece_bytes)
        try:
            data: bytes = self._channel.recv(min(limit_bytes, _PIECE_BYTES))
        except (OSError, EOFError, paramiko.SSHException):
            raise self._failure() from None
        if not data:
            if not self._channel.eof_received and self._status() is None:
                raise self._failure()
            return b""
        self.received_bytes += len(data)
        if self._throttle:
            self._throttle.take(len(data))
        return data

    def readinto(self, buffer: memoryview) -> int:
        """See `Channel.readinto`."""
        data = self.read(buffer.nbytes)
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See `Channel.write`."""
        rest = memoryview(data).cast("B")
        with self._writing:
            if self._write_closed:
                raise FarSideEnded(f"the input of the command on {self._address} has been ended already")
            while rest.nbytes:
                piece = rest[: self._throttle.piece_bytes if self._throttle else _PIECE_BYTES]
                try:
                    count = self._channel.send(bytes(piece))
                except (OSError, EOFError, paramiko.SSHException):
                    count = 0
                if count == 0 or not self._transport.is_active():
                    raise self._not_taken()
                self.sent_bytes += count
                rest = rest[count:]
                if self._throttle:
                    self._throttle.take(count)

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """See `Channel.write_parts`."""
        for part in parts:
            self.write(part)

    def close_write(self) -> None:
        """See `Channel.close_write`."""
        with self._writing:
            if not self._write_closed:
                self._write_closed = True
                with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                    self._channel.shutdown_write()

    def kill(self) -> None:
        """See `Channel.kill`."""
        if not self._channel.closed:
            self._killed = self._channel.exit_status == KILLED
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self._channel.close()

    def wait(self, timeout_s: float | None = None) -> int:
        """See `Channel.wait`."""
        if not self._channel.status_event.wait(timeout_s):
            raise LinkTimeout(f"the command on {self._address} still runs after {timeout_s:g} s")
        status = self._status()
        if status is None:
            raise self._failure()
        return status

    def stderr_tail(self) -> bytes:
        """See `Channel.stderr_tail`."""
        if self._channel.status_event.is_set():
            self._listener.join(_LAST_WORDS_S)  # the status may come before the last words are taken in
        with self._stderr_lock:
            return bytes(self._stderr)

    def close(self) -> None:
        """See `Channel.close`."""
        self.kill()
        self.close_write()
        self._listener.join(_LAST_WORDS_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while piece := self._channel.recv_stderr(STDERR_TAIL_BYTES):
                with self._stderr_lock:
                    self._stderr += piece
                    del self._stderr[:-STDERR_TAIL_BYTES]

    def _status(self) -> int | None:
        """How the command ended; None if that will never be known, since the connection is gone."""
        self._channel.status_event.wait(_LAST_WORDS_S)
        if self._channel.exit_status != KILLED:
            return int(self._channel.exit_status)
        if self._killed:
            return None
        # Closed without a status: by a signal, unless the whole connection is just ending.
        self._transport.join(_LAST_WORDS_S)
        return KILLED if self._transport.is_active() and self._channel.closed else None

    def _failure(self) -> LinkError:
        if self._killed:
            return LinkLost(f"the connection to {self._address} was ended from this side")
        progress = Progress(started=True)
        reason = self._transport.get_exception()
        progress.lines.append(str(reason) if reason else "the host closed it")
        return verdict(self._address, progress, b"")

    def _not_taken(self) -> LinkError:
        status = None if self._killed else self._status()
        if status is None:
            return self._failure()
        reason = far_failure(self._address, "data was sent to it", status, self.stderr_tail())
        return FarSideEnded(reason.message, hint=reason.hint)


class ParamikoLink:
    """Commands on one host, all over one connection. Implements `Link`.

    Args:
        throttle: limits the sum of all channels, in both directions.
        answer: answers the host's questions (passwords); None: only the key counts.
    """

    def __init__(
        self,
        address: Address,
        access: Access,
        *,
        patience: Patience | None = None,
        throttle: Throttle | None = None,
        answer: Answer | None = None,
    ) -> None:
        self._address = address
        self._access = access
        self._known_hosts = KnownHosts(access.known_hosts)
        self._patience = patience or Patience()
        self._throttle = throttle
        self._answer = answer
        self._lock = threading.Lock()
        self._transport: paramiko.Transport | None = None
        self._ended = threading.Event()

    @property
    def address(self) -> Address:
        """See `Link.address`."""
        return self._address

    def log_in(self) -> None:
        """Returns when we are in. `start` and `run` do this by themselves.

        Raises:
            HostUnreachable, HostKeyUnknown, HostKeyChanged, LoginRefused, LinkError: why we are not.
        """
        self._connected()

    @property
    def server(self) -> str:
        """What the host's SSH server calls itself, such as `SSH-2.0-OpenSSH_9.2`.

        Raises: as `log_in`.
        """
        return str(self._connected().remote_version)

    def start(self, command: str) -> ParamikoChannel:
        """See `Link.start`."""
        transport = self._connected()
        try:
            channel = self._session(transport)
            channel.exec_command(command)
        except paramiko.ChannelException as error:  # the connection is there, and goes on
            raise LinkError(
                f"{self._address} does not let us run one more command on a connection that is there ({error.text})",
                hint="see MaxSessions in sshd_config over there: 10, as usual, is enough",
            ) from None
        except (paramiko.SSHException, OSError, EOFError) as error:
            progress = Progress(started=not transport.is_active())
            progress.lines.append(str(error) or "the host closed it")
            raise verdict(self._address, progress, b"") from None
        return ParamikoChannel(transport, channel, self._address, self._throttle)

    def _session(self, transport: paramiko.Transport) -> paramiko.Channel:
        """What a command can run in. Where the server allows few, it may take a moment to count one that has just ended no more."""
        until_s = time.monotonic() + _FREED_S
        while True:
            try:
                return transport.open_session(window_size=_WINDOW_BYTES, timeout=self._patience.connect_s)
            except paramiko.ChannelException:
                if time.monotonic() >= until_s:
                    raise
            time.sleep(_FREED_S / 20)

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
            transport, self._transport = self._transport, None
            self._ended.set()
        if transport:
            transport.close()
            transport.join(_LAST_WORDS_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connected(self) -> paramiko.Transport:
        with self._lock:
            if self._transport is None or not self._transport.is_active():
                self._ended.set()
                kinds = [key.kind for key in self._known_hosts.keys(self._address.known_as)]
                transport = connect(self._address, self._patience, kinds)
                try:
                    log_in(transport, self._address, self._known_hosts, self._access.key, self._answer)
                except BaseException:
                    transport.close()
                    raise
                self._transport, self._ended = transport, threading.Event()
                threading.Thread(
                    target=self._keep_alive, args=(transport, self._ended), name="ssh-alive", daemon=True
                ).start()
            return self._transport

    def _keep_alive(self, transport: paramiko.Transport, ended: threading.Event) -> None:
        """Asks the host whether it still lives, and closes the connection if it does not answer."""
        answered = threading.Event()

        def give_up() -> None:
            limit_s = self._patience.keep_alive_s * self._patience.keep_alive_count
            while not answered.wait(limit_s):
                transport.close()
                return

        while not ended.wait(self._patience.keep_alive_s) and transport.is_active():
            answered.clear()
            judge = threading.Thread(target=give_up, name="ssh-judge", daemon=True)
            judge.start()
            with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
                transport.global_request("keepalive@openssh.com", wait=True)
            answered.set()
            judge.join()
