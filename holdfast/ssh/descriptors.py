"""Pipes to and from other processes: fewer and larger system calls, whoever is at the other end."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from typing import Final

from holdfast.ssh.throttle import Throttle

__all__ = ["widen_pipe", "writing_parts"]

_MOST_PARTS: Final = 1024
"""Of one system call (IOV_MAX)."""


def widen_pipe(descriptor: int, size_bytes: int) -> None:
    """Lets more lie in a pipe, so that neither end waits for the other one as often. Anything else stays as it is.

    Args:
        size_bytes: Linux gives 64 KiB unasked, and up to 1 MiB to anybody (fs.pipe-max-size); all pipes of a user who is not
            root share 64 MiB (fs.pipe-user-pages-soft).
    """
    with contextlib.suppress(OSError):  # no pipe, or the user's share is used up
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, size_bytes)


def writing_parts(
    descriptor: int, parts: Sequence[bytes | bytearray | memoryview], throttle: Throttle | None = None
) -> Iterator[int]:
    """Writes all of some pieces, one behind the other, and yields how many bytes each system call has taken.

    Raises:
        OSError: of the system call.
    """
    rest = [view for part in parts if (view := memoryview(part).cast("B"))]
    first = 0
    while first < len(rest):
        if throttle is None:
            left = count = os.writev(descriptor, rest[first : first + _MOST_PARTS])
        else:
            left = count = os.write(descriptor, rest[first][: throttle.piece_bytes])
            throttle.take(count)
        while left and left >= len(rest[first]):
            left -= len(rest[first])
            first += 1
        if left:
            rest[first] = rest[first][left:]
        yield count
