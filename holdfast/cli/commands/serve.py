"""`holdfast serve`: the far end of a connection, started over SSH by the near end, or as the forced command of a key."""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Final, Self

import click

from holdfast.errors import UsageError
from holdfast.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdfast.ssh.throttle import Throttle

__all__ = ["command"]

_QUIET_S: Final = 300.0
"""A client says something every half minute; one that says nothing for so long is lost."""
_PIPE_BYTES: Final = 1 << 18
"""As much as is read at a time; a server has many clients, whose pipes count together."""


def rate(text: str) -> int:
    """Bytes per second that `50MiB/s` or `50MiB` stands for.

    Raises:
        UsageError: it is no rate.
    """
    size = parse_size(text.removesuffix("/s"))
    if size < 1024:
        raise UsageError(f"'{text}' is less than a connection needs", hint="write for example 50MiB/s")
    return size


class _Descriptors:
    """Two descriptors, as a stream to the client and back.

    Args:
        quiet_s: a client that says nothing for so long is lost; None: however long.
    """

    def __init__(self, source: int, sink: int, throttle: Throttle | None, quiet_s: float | None) -> None:
        from holdfast.ssh.descriptors import widen_pipe

        self.ends = source, sink
        for end in self.ends:
            widen_pipe(end, _PIPE_BYTES)
        self._readable = select.poll()
        self._readable.register(source, select.POLLIN)
        self._throttle = throttle
        self._quiet_s = quiet_s

    @classmethod
    def standard(cls, throttle: Throttle | None) -> Self:
        """Standard input and output, which nobody else in this process uses any more."""
        found = cls(os.dup(0), os.dup(1), throttle, _QUIET_S)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(2, 1)  # whatever prints something by mistake does not spoil the stream
        os.close(nothing)
        return found

    def read(self, limit_bytes: int) -> bytes:
        """The next bytes; empty at the end, and when the client has been silent for too long."""
        source, _ = self.ends
        if self._throttle is not None:
            limit_bytes = min(limit_bytes, self._throttle.piece_bytes)
        if self._quiet_s is not None and not self._readable.poll(self._quiet_s * 1000):
            print("the client has been silent for too long", file=sys.stderr)
            return b""
        data = os.read(source, limit_bytes)
        if self._throttle is not None:
            self._throttle.take(len(data))
        return data

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Sends all of some pieces."""
        from holdfast.ssh.descriptors import writing_parts

        _, sink = self.ends
        for _ in writing_parts(sink, parts, self._throttle):
            pass

    def close(self) -> None:
        """Lets go of both."""
        for one in self.ends:
            os.close(one)


@click.command("serve")
@click.option(
    "--stdio", is_flag=True, help="Speak over standard input and output; there is no other way yet."
)
@click.option("--restrict", metavar="PATH", default="", help="Only repositories in this folder, or below it.")
@click.option("--append-only", is_flag=True, help="Let clients add restore points and read, nothing else.")
@click.option("--read-only", is_flag=True, help="Let clients read, nothing else.")
@click.option(
    "--max-rate",
    metavar="RATE",
    default="",
    help="No more than this per second, such as 50MiB/s, both ways together.",
)
def command(stdio: bool, restrict: str, append_only: bool, read_only: bool, max_rate: str) -> None:
    """Be the far end of a connection to repositories of this machine.

    This is what a client runs over SSH; as a forced command in authorized_keys it limits what that
    key may do, whatever the client asks for. Passwords are never asked for: keys stay with the client.
    """
    from holdfast.repo.wire.far import Descriptors, FarSide, Read, Write
    from holdfast.repo.wire.rights import Rights
    from holdfast.ssh.throttle import Throttle

    if not stdio:
        raise UsageError("serve needs --stdio", hint="it is run by clients, over SSH: see docs/REMOTE.md")
    if restrict and not os.path.isdir(restrict):
        raise UsageError(f"--restrict: {restrict} is no folder")
    if os.isatty(0):
        raise UsageError("serve speaks to a program, not to a terminal", hint="see docs/REMOTE.md")
    throttle = Throttle(rate(max_rate)) if max_rate else None
    first = _Descriptors.standard(throttle)

    def further(source: int, sink: int) -> tuple[Read, Write, Callable[[], None]]:
        stream = _Descriptors(source, sink, throttle, None)
        return stream.read, stream.write, stream.close

    rights = Rights(append_only, read_only, os.path.abspath(restrict) if restrict else "")
    FarSide(first.read, first.write, rights, descriptors=Descriptors(first.ends, further)).run()
