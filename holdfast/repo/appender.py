"""Appends to a pack's file in large pieces, which go past the page cache and are written by a thread of their own.

A backup writes what nobody reads soon: through the page cache that costs a copy into fresh memory, everybody
else's cache, and a long wait in each sync. Here the bytes are gathered, while they are in the processor's cache,
in a few buffers that are used over and over; the disk takes them from there while the next one fills.

What is appended is in the file after `drain`, and on the disk when that file has been synced as well. After the
first error nothing more is written. Memory: `_BUFFERS` times `_BUFFER_BYTES`, once that much has been appended.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from holdfast.direct import ALIGNMENT, DirectWriter
from holdfast.repo.buffers import new_buffer
from holdfast.units import MIB

__all__ = ["Appender"]

_BUFFER_BYTES: Final = 4 * MIB
_BUFFERS: Final = 4


class Appender:
    """The end of a file. `append` is for one thread at a time; `drain` may run beside it.

    Args:
        fd: of the file, opened for reading and writing; it stays the caller's.
        length: of the file, in bytes.
        buffer_bytes: of each buffer; a multiple of `ALIGNMENT`.
        buffers: how many there are at most; at least two.
    """

    def __init__(
        self, fd: int, path: str, length: int, *, buffer_bytes: int = _BUFFER_BYTES, buffers: int = _BUFFERS
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._buffers = buffers
        self._fd = fd
        self._path = path
        self._changed = threading.Condition()
        self._buffer: memoryview | None = None
        self._base = length - length % ALIGNMENT  # where the buffer's front belongs in the file
        self._fill = length - self._base
        self._clean = self._fill  # so much of the buffer's front is in the file already
        self._made = 0
        self._free: list[memoryview] = []
        self._pending: deque[tuple[memoryview, int, int]] = deque()
        self._submitted = self._written = 0
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        self._direct: DirectWriter | None = None

    def append(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Takes all parts in order.

        Raises:
            OSError: an earlier piece could not be written.
        """
        with self._changed:
            self._raise_error()
            for part in parts:
                rest = memoryview(part)
                while rest:
                    buffer = self._with_room()
                    size = min(len(rest), self._buffer_bytes - self._fill)
                    buffer[self._fill : self._fill + size] = rest[:size]
                    self._fill += size
                    rest = rest[size:]

    def drain(self) -> None:
        """Returns when everything that was appended before the call is in the file.

        Raises:
            OSError: some of it could not be written.
        """
        with self._changed:
            self._raise_error()
            while self._buffer is not None and self._fill > self._clean:
                whole = self._fill - self._fill % ALIGNMENT
                if whole and not self._is_spare():
                    self._wait()
                    continue
                tail = bytes(self._buffer[whole : self._fill])
                if whole:
                    self._hand_over(whole)
                    self._buffer[: len(tail)] = tail
                    self._fill = len(tail)
                self._write_tail(tail)
                self._clean = self._fill
            ticket = self._submitted
            while self._written < ticket:
                self._wait()

    def close(self) -> None:
        """Ends the thread; what was not drained may be lost. May be called twice."""
        with self._changed:
            self._error = self._error or OSError(0, "closed")
            self._pending.clear()
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        if self._direct is not None:
            self._direct.close()
        self._buffer = None
        self._free.clear()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        """Lets the thread, and whoever else appends or drains, go on: all may be different afterwards."""
        self._changed.wait()
        self._raise_error()

    def _with_room(self) -> memoryview:
        """The buffer that is being filled; it is not full."""
        if self._buffer is None:
            self._buffer = self._spare()
            self._buffer[: self._fill] = os.pread(self._fd, self._fill, self._base)
        while self._fill == self._buffer_bytes:
            if self._is_spare():
                self._hand_over(self._buffer_bytes)
            else:
                self._wait()
        return self._buffer

    def _is_spare(self) -> bool:
        return bool(self._free) or self._made < self._buffers

    def _spare(self) -> memoryview:
        """A buffer that nobody uses; there is one."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return new_buffer(self._buffer_bytes)

    def _hand_over(self, length: int) -> None:
        """Leaves the buffer's first `length` bytes to the thread and begins the next buffer, empty.

        It does not wait, so that nobody ever sees the buffer that is handed over beside the next one's fill.
        """
        assert self._buffer is not None
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="holdfast-appender", daemon=True)
            self._thread.start()
        self._pending.append((self._buffer, length, self._base))
        self._submitted += 1
        self._changed.notify_all()
        self._buffer = self._spare()
        self._base += length
        self._fill = self._clean = 0

    def _write_tail(self, tail: bytes) -> None:
        """Less than a block, which the next piece will hold once more."""
        try:
            self._write(memoryview(tail), self._base)
        except OSError as error:
            self._error = error
            raise

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._pending and self._error is None:
                    self._changed.wait()
                if self._error is not None:
                    return
                buffer, length, offset = self._pending[0]
            error = None
            try:
                if self._direct is None:
                    self._direct = DirectWriter(self._path)
                piece = buffer[:length]
                done = self._direct.write(offset, piece)
                self._write(piece[done:], offset + done)
            except OSError as raised:
                error = raised
            with self._changed:
                if self._pending:
                    self._pending.popleft()
                self._free.append(buffer)
                self._written += 1
                self._error = self._error or error
                self._changed.notify_all()

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            if count <= 0:
                raise OSError(5, "nothing could be written")
            data = data[count:]
            offset += count
