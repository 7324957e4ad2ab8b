"""Large buffers that are made once per thread and used again for every segment."""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress
from typing import Final

from holdfast.units import MIB

__all__ = ["SegmentBuffers", "new_buffer", "write_zeros"]

_ZEROS: Final = memoryview(bytes(MIB))


def new_buffer(size_bytes: int) -> memoryview:
    """A writable buffer that begins at a page, on huge pages where the kernel gives them."""
    area = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


class SegmentBuffers(threading.local):
    """One writable buffer per thread.

    Args:
        size_bytes: of each buffer, to begin with.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._view: memoryview | None = None

    def view(self, length: int) -> memoryview:
        """The first `length` bytes of this thread's buffer; whatever was in it is still there."""
        if self._view is None or len(self._view) < length:
            self._size_bytes = max(self._size_bytes, length)
            self._view = new_buffer(self._size_bytes)
        return self._view[:length]


def write_zeros(view: memoryview) -> None:
    """Fills a view with zeros, without making as many first."""
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
