"""Large buffers that are made once per thread and used again for every segment."""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

__all__ = ["SegmentBuffers"]


class SegmentBuffers(threading.local):
    """One writable buffer per thread, on huge pages where the kernel gives them.

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
            area = mmap.mmap(-1, self._size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError, AttributeError):
                area.madvise(mmap.MADV_HUGEPAGE)
            self._view = memoryview(area)
        return self._view[:length]
