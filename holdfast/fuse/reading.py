"""An open file of a mount, and reading ahead for those who read one from front to back.

Whoever reads on where the last read ended will read on. So a few threads decode what comes next into the cache
that all readers share, along the disk tree: the further the longer somebody has read on, and never more than the cache
can keep. Whoever jumps about costs nothing but what is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections.abc import Iterator
from typing import Final, Protocol

from holdfast.errors import HoldfastError
from holdfast.fuse.files import File
from holdfast.units import KIB, MIB

__all__ = ["Content", "OpenFile", "ReadAhead"]

_LEAST_STEP_BYTES: Final = MIB
"""How much one task decodes at first, so that nobody waits long for it; a quarter of the window later."""
_MOST_AHEAD_BYTES: Final = 16 * MIB
_SLACK_BYTES: Final = MIB
_SLACK_REQUESTS: Final = 4
"""The kernel sends several requests at once, and they arrive in any order."""
_SURE_AFTER_BYTES: Final = 256 * KIB
_LEFT_BEHIND_BYTES: Final = 32 * MIB
_STILL_NEAR_BYTES: Final = 32 * MIB


class Content(Protocol):
    """What a file shows a part of."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole buffer from `offset` on."""
        ...

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yields (offset, length) of what is no hole in [start, end), neighbours merged."""
        ...

    def fetch(self, start: int, end: int) -> None:
        """Reads what a later read of [start, end) will need."""
        ...


class ReadAhead:
    """Threads that fetch. Thread-safe.

    Args:
        cache_bytes: what the cache of the contents may hold.
    """

    def __init__(self, threads: int, cache_bytes: int) -> None:
        self.window_bytes = min(_MOST_AHEAD_BYTES, cache_bytes // 4)
        self._tasks: queue.SimpleQueue[tuple[Content, int, int] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name="holdfast-ahead", daemon=True) for _ in range(threads)
        ]

    def start(self) -> None:
        """Starts the threads. They do not survive a fork."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends them."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def fetch(self, content: Content, start: int, end: int) -> None:
        """Leaves a range to the threads."""
        self._tasks.put((content, start, end))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            content, start, end = task
            with contextlib.suppress(HoldfastError, OSError):  # whoever reads it will hear of it
                content.fetch(start, end)


class OpenFile:
    """A file that somebody has open. Thread-safe.

    Args:
        content: None for a file whose text is all of it.
    """

    def __init__(self, file: File, content: Content | None, ahead: ReadAhead) -> None:
        self.file = file
        self._content = content
        self._ahead = ahead
        self._lock = threading.Lock()
        self._expected = 0
        self._run_bytes = 0
        self._fetched_to = 0
        self._began = self._left_to = 0

    def left_behind(self) -> tuple[int, int] | None:
        """The range that somebody who reads this file from front to back has left behind, once it is long enough.

        It will hardly be read again, so that it need not be kept anywhere. Later ranges contain the earlier ones: the page
        cache does not give up everything the first time.
        """
        with self._lock:
            end = self._expected - _STILL_NEAR_BYTES
            if self._run_bytes == 0 or end - self._left_to < _LEFT_BEHIND_BYTES:
                return None
            self._left_to = end
            return self._began, end

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills the buffer from `offset` on as far as the file goes; returns how many bytes that are.

        Raises:
            DamagedData, StorageError: something in that range can not be read.
        """
        length = max(0, min(len(buffer), self.file.size_bytes - offset))
        source = self.file.source
        if source is None or self._content is None:
            buffer[:length] = self.file.text[offset : offset + length]
            return length
        stored = max(0, min(length, source.length - offset))
        if stored:
            self._look_ahead(offset, offset + stored)
            self._content.read_into(source.start + offset, buffer[:stored])
        if stored < length:
            buffer[stored:length] = bytes(length - stored)
        return length

    def seek(self, offset: int, whence: int) -> int:
        """Where the next data, or the next hole, begins; as `lseek` with SEEK_DATA and SEEK_HOLE.

        Raises:
            OSError: ENXIO: there is none; EINVAL: it is another question.
        """
        size = self.file.size_bytes
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        if self.file.source is None or self._content is None:
            return offset if whence == os.SEEK_DATA else size
        start = self.file.source.start
        stored = self.file.source.length
        for found, length in self._content.data_extents(start + offset, start + stored):
            if whence == os.SEEK_DATA:
                return found - start
            if found - start > offset:
                return offset
            return min(found - start + length, size)
        if whence == os.SEEK_DATA:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset

    def _look_ahead(self, start: int, end: int) -> None:
        """Has fetched what comes next, if this file is read from front to back."""
        source = self.file.source
        assert source is not None
        assert self._content is not None
        with self._lock:
            if abs(start - self._expected) > max(_SLACK_BYTES, _SLACK_REQUESTS * (end - start)):
                self._run_bytes = 0
                self._began = self._left_to = start
                self._expected = self._fetched_to = end
                return
            self._run_bytes += end - start
            self._expected = max(self._expected, end)
            if self._run_bytes < _SURE_AFTER_BYTES:
                return
            first = max(self._fetched_to, self._expected)
            window = min(self._ahead.window_bytes, 4 * self._run_bytes)
            step = max(window // 4, _LEAST_STEP_BYTES)
            last = min(source.length, self._expected + window)
            if last - first < min(step, window // 2) and last < source.length:
                return
            self._fetched_to = max(first, last)
        for at in range(first, last, step):
            self._ahead.fetch(self._content, source.start + at, source.start + min(at + step, last))
