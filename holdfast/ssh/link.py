"""What a connection to another host can do: run a command to its end, or start one and talk to it.

A `Link` is one way to one host, a `Channel` one running command on it, with its standard input and output as two
streams of bytes. `openssh` and `paramiko_link` implement both and pass the same tests, so that their users need not
know which one they have.

Invariants:

- A host is verified and we are logged in before `start` returns; what prevents that is raised there.
- The end of a stream is only reported when the far side has ended it. A connection that breaks raises `LinkLost`,
  however complete the bytes before it look, so that nobody takes a torn-off stream for a whole one.
- The status is the far command's own: a host that refuses us, and a command that ends with 255, are not confused.
- What is kept of a far side's answers is bounded: `Result.stdout` by the caller's limit, stderr to its last 64 KiB.
- Ending our process, or `kill`, closes the connection. The far command then finds its standard input at its end; whether it ends
  as well is its own business (SSH has no way to insist), so what we start over there must watch its standard input.

Does not retry: whether a command may run twice, only its caller knows.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

from holdfast.errors import FarCommandMissing, FarSideEnded, LinkError, LinkLost, LinkTimeout
from holdfast.ssh.address import Address
from holdfast.units import MIB, format_size

__all__ = [
    "KILLED",
    "STDERR_TAIL_BYTES",
    "Access",
    "Channel",
    "Link",
    "Patience",
    "Result",
    "far_failure",
    "printable",
    "run_to_end",
]

KILLED: Final = -1
"""The status of a far command that a signal ended (SSH's implementations do not all say which one)."""

STDERR_TAIL_BYTES: Final = 64 * 1024
STDOUT_LIMIT_BYTES: Final = 8 * MIB
NOT_FOUND: Final = 127  # of a shell
READ_BYTES: Final = 128 * 1024


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a host.

    Args:
        connect_s: until it has let us in.
        keep_alive_s: a silent host is asked that often whether it still lives,
        keep_alive_count: and given up after so many questions without an answer.
    """

    connect_s: float = 20.0
    keep_alive_s: int = 15
    keep_alive_count: int = 3


@dataclass(frozen=True, slots=True)
class Access:
    """How to get into a host, and how to know it.

    Args:
        known_hosts: our own file of host keys, in OpenSSH's format.
        key: file of a private key; empty: what the SSH configuration or an agent offers.
        user_config: whether the user's SSH configuration, agent and known hosts count (repositories), or only what
            stands here (ESXi hosts).
    """

    known_hosts: str
    key: str = ""
    user_config: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and what it said.

    Args:
        status: its exit status, or `KILLED`.
        stderr: the last 64 KiB of it.
    """

    address: Address
    status: int
    stdout: bytes
    stderr: bytes

    def checked(self, doing: str) -> Result:
        """This result, if the command succeeded.

        Args:
            doing: what was attempted, to follow "while": "listing the VMs".

        Raises:
            FarCommandMissing: the shell over there does not know the command.
            LinkError: it ended with another status than 0.
        """
        if self.status == 0:
            return self
        raise far_failure(self.address, doing, self.status, self.stderr or self.stdout)


class Channel(Protocol):
    """A command that runs on the other host.

    One thread may read while another one writes; any thread may `kill`. Closing kills what still runs.
    """

    @property
    def sent_bytes(self) -> int:
        """What was written into the channel so far; SSH adds about 0.1 % to it on the wire."""

    @property
    def received_bytes(self) -> int:
        """What was read from the channel so far, likewise."""

    def read(self, limit_bytes: int) -> bytes:
        """The next bytes of the command's output, at most `limit_bytes`; empty at its end.

        Raises:
            LinkLost: the connection broke.
        """

    def readinto(self, buffer: memoryview) -> int:
        """How many bytes of output were put into `buffer`; 0 at its end. Raises as `read`."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends all of `data` to the command's input; waits while the far side is slow.

        Raises:
            FarSideEnded: the command ended, or takes no more input.
            LinkLost: the connection broke.
        """

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Sends all of some pieces, one behind the other, as `write` does."""

    def close_write(self) -> None:
        """Ends the command's input. May be called twice."""

    def kill(self) -> None:
        """Breaks the connection of this channel at once. Readers and writers that wait get `LinkLost`."""

    def wait(self, timeout_s: float | None = None) -> int:
        """The status of the command when it has ended. All of its output should have been read before.

        Raises:
            LinkTimeout: it still runs.
            LinkLost: the connection broke before the status was known.
        """

    def stderr_tail(self) -> bytes:
        """The last 64 KiB of what the command has said on its standard error so far."""

    def close(self) -> None:
        """Lets go of the channel; what still runs is killed. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Link(Protocol):
    """A way to one host. Threads may share it."""

    @property
    def address(self) -> Address:
        """Where it leads."""

    def start(self, command: str) -> Channel:
        """A command that has begun to run, in the login shell over there.

        Raises:
            HostUnreachable, HostKeyUnknown, HostKeyChanged, LoginRefused, LinkError: why it could not.
        """

    def run(
        self,
        command: str,
        stdin: bytes = b"",
        *,
        timeout_s: float = 60.0,
        limit_bytes: int = STDOUT_LIMIT_BYTES,
        sentinel: bool = False,
    ) -> Result:
        """How a command ended that was given `stdin`, and what it said.

        Args:
            timeout_s: for the command itself, without connecting.
            limit_bytes: an answer that is longer than this is an error.
            sentinel: have the shell over there print the status behind the output, for hosts whose SSH server or
                wrapper does not pass it on, and as a proof that the output is complete.

        Raises:
            LinkTimeout: it took longer than `timeout_s`.
            LinkLost: the connection broke, or the sentinel is missing.
            HostUnreachable, HostKeyUnknown, HostKeyChanged, LoginRefused, LinkError: as `start`.
        """

    def close(self) -> None:
        """Ends the connection, and what runs over it. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def run_to_end(
    link: Link, command: str, stdin: bytes, *, timeout_s: float, limit_bytes: int, sentinel: bool
) -> Result:
    """`Link.run`, on top of `Link.start`."""
    mark = secrets.token_hex(8) if sentinel else ""
    with link.start(_marked(command, mark) if sentinel else command) as channel:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            channel.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        feeder = threading.Thread(target=_feed, args=(channel, stdin), daemon=True)
        feeder.start()
        try:
            stdout = _read_all(channel, limit_bytes + len(mark) + 16, link.address)
            status = channel.wait()
        except LinkLost:
            if not expired.is_set():
                raise
            raise LinkTimeout(
                f"a command on {link.address} did not end within {timeout_s:g} s{_said(channel.stderr_tail())}",
                hint="see whether the host is overloaded or waits for something",
            ) from None
        finally:
            timer.cancel()
            channel.kill()
            feeder.join()
        result = Result(link.address, status, stdout, channel.stderr_tail())
    return _unmarked(result, mark) if sentinel else result


def far_failure(address: Address, doing: str, status: int, said: bytes) -> LinkError:
    """The error that says what it means that a far command has ended with `status`.

    Args:
        doing: what was attempted, to follow "while": "listing the VMs".
        said: what the command said, best its standard error.
    """
    if status == NOT_FOUND:
        return FarCommandMissing(
            f"{address} does not know the command that is needed while {doing}{_said(said)}",
            hint="install it there, or see to it that it stands in the PATH of logins without a terminal",
        )
    how = "was killed by a signal" if status == KILLED else f"ended with status {status}"
    return LinkError(f"the command on {address} {how} while {doing}{_said(said)}")


def printable(text: bytes | str, limit: int = 400) -> str:
    """The end of what a host said, on one line and without anything that a terminal would obey."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    line = "; ".join(part.strip() for part in re.split(r"[\r\n]+", text) if part.strip())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit else "... " + line[-limit:]


def _said(stderr: bytes) -> str:
    text = printable(stderr)
    return f": {text}" if text else ""


def _feed(channel: Channel, stdin: bytes) -> None:
    # A command need not read what it is given; whether it succeeded, its status tells.
    with contextlib.suppress(FarSideEnded, LinkLost):
        if stdin:
            channel.write(stdin)
        channel.close_write()


def _read_all(channel: Channel, limit_bytes: int, address: Address) -> bytes:
    pieces: list[bytes] = []
    length = 0
    while piece := channel.read(READ_BYTES):
        pieces.append(piece)
        length += len(piece)
        if length > limit_bytes:
            raise LinkError(
                f"a command on {address} answered with more than {format_size(limit_bytes)}, which is not plausible"
            )
    return b"".join(pieces)


def _marked(command: str, mark: str) -> str:
    return f'( {command}\n)\necho "@@{mark} rc=$?"'


def _unmarked(result: Result, mark: str) -> Result:
    stdout, found, status = result.stdout.rpartition(f"@@{mark} rc=".encode())
    if not found or not re.fullmatch(rb"[0-9]{1,3}\n", status):
        raise LinkLost(
            f"the answer of a command on {result.address} is not complete{_said(result.stderr)}",
            hint="its shell was ended before the command was; see the host's log for the reason",
        )
    return Result(result.address, int(status), stdout, result.stderr)
