"""Writing past the page cache (O_DIRECT): large, aligned pieces go straight to the disk.

A restore writes once what nobody reads soon. Through the page cache that costs a copy, the cache of everybody
else, and a second wait in the final fsync. Where kernel, file system, length or alignment do not allow it, the
caller writes the ordinary way; the bytes are the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import Final

__all__ = ["ALIGNMENT", "DirectWriter"]

ALIGNMENT: Final = 4096
"""Of offsets, lengths and addresses that may go past the page cache, in bytes."""
_LEAST_BYTES: Final = 1 << 20
"""Smaller pieces are better left to the kernel, which gathers them."""
_REFUSALS: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


class DirectWriter:
    """A second descriptor of a file that is being written. Thread-safe.

    Args:
        path: of an existing file.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        with contextlib.suppress(OSError):  # tmpfs, for one, has no O_DIRECT on older kernels
            self._descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)

    def write(self, offset: int, data: memoryview) -> int:
        """Writes as much from the front of `data` as can go this way; returns how many bytes that is.

        Raises:
            OSError: the disk is full or failed.
        """
        length = data.nbytes - data.nbytes % ALIGNMENT
        if self._descriptor < 0 or length < _LEAST_BYTES or offset % ALIGNMENT or not _is_aligned(data):
            return 0
        done = 0
        while done < length:
            try:
                count = os.pwrite(self._descriptor, data[done:length], offset + done)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._descriptor, refused = -1, self._descriptor
                if refused >= 0:
                    os.close(refused)
                return done
            if count <= 0 or count % ALIGNMENT:
                return done + max(count, 0)
            done += count
        return done

    def close(self) -> None:
        """Closes the descriptor. May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _is_aligned(data: memoryview) -> bool:
    """Whether the buffer's address is a multiple of the alignment; a read-only one is taken for not aligned."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(data)) % ALIGNMENT == 0
    except (TypeError, ValueError, BufferError):
        return False
