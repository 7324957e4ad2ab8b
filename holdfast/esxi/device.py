"""Restoring onto a block device in place, and the choice between that and a new file.

A device is not empty, so that what a restore does not write must be zeroed for `BlockSink`'s promise
to hold: "what is never written reads as zeros afterwards". The sink notes what was written and
zeroes the gaps in `finish`. There is no way back: an aborted restore leaves the device half written.

Invariant: the written ranges are kept as two sorted arrays of maximal runs, 16 bytes per run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.disk import SECTOR_BYTES, BlockSink
from holdfast.errors import DestinationExists, StorageError, storage_error
from holdfast.esxi.names import printable
from holdfast.esxi.raw import FileSink, write_all
from holdfast.units import MIB

__all__ = ["DeviceSink", "WrittenRanges", "open_sink"]

_BLKZEROOUT: Final = 0x127F  # linux/fs.h: _IO(0x12, 127), takes two u64: start and length in bytes
_ZEROS: Final = bytes(MIB)
_STEP_BYTES: Final = 1024 * MIB


def open_sink(
    path: str, size_bytes: int, *, overwrite: bool, mode: int, mtime_ns: int | None = None
) -> BlockSink:
    """The sink that writes to `path`: a `DeviceSink` for a block device, else a `FileSink`.

    Raises:
        DestinationExists: it exists, and may not be overwritten.
        StorageError: it can not be opened.
    """
    try:
        device = stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        device = False  # FileSink says what is wrong
    if device:
        return DeviceSink(path, size_bytes, overwrite=overwrite)
    return FileSink(path, size_bytes, overwrite=overwrite, mode=mode, mtime_ns=mtime_ns)


class WrittenRanges:
    """Which bytes have been written, in memory proportional to the number of gaps. Thread-safe."""

    def __init__(self, *, batch: int = 65536) -> None:
        self._lock = threading.Lock()
        self._batch = batch
        self._pending: list[tuple[int, int]] = []
        self._starts: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, start: int, end: int) -> None:
        """Notes that the bytes [start, end) have been written."""
        with self._lock:
            self._pending.append((start, end))
            if len(self._pending) >= self._batch:
                self._merge()

    def gaps(self, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Yields `(start, end)` of what has not been written of [0, size_bytes), ascending."""
        with self._lock:
            self._merge()
            starts, ends = self._starts, self._ends
        position = 0
        for start, end in zip(starts, ends, strict=True):
            if start > position:
                yield position, int(start)
            position = int(end)
        if position < size_bytes:
            yield position, size_bytes

    def _merge(self) -> None:
        if not self._pending:
            return
        fresh = np.array(self._pending, np.int64)
        self._pending = []
        starts = np.concatenate([self._starts, fresh[:, 0]])
        ends = np.concatenate([self._ends, fresh[:, 1]])
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(ends[order])
        first = np.concatenate([[True], starts[1:] > reach[:-1]])
        self._starts = starts[first]
        self._ends = reach[np.concatenate([first[1:], [True]])]


class DeviceSink:
    """A block device that is written in place; a `BlockSink`. Bytes past `size_bytes` are left alone.

    Args:
        path: the device.
        size_bytes: how much of it will hold the disk.
        overwrite: must be true, since whatever the device holds is lost.

    Raises:
        DestinationExists: without `overwrite`.
        StorageError: the device is too small, in use (mounted) or can not be opened.
    """

    def __init__(self, path: str, size_bytes: int, *, overwrite: bool) -> None:
        if not overwrite:
            raise DestinationExists(
                f"{printable(path)} is a block device, whose content would be lost",
                hint="restore with --overwrite if that is wanted",
            )
        self._doing = f"writing {printable(path)}"
        self._size_bytes = size_bytes
        self._written = WrittenRanges()
        try:
            # Without O_CREAT, O_EXCL on a device means: not while it is mounted or part of a volume.
            self._descriptor = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            room = os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise StorageError(
                    f"{printable(path)} is in use",
                    hint="unmount it, and detach it from volume groups or RAID",
                ) from None
            raise storage_error(error, self._doing) from None
        if room < size_bytes:
            self.abort()
            raise StorageError(
                f"{printable(path)} has {room} bytes, but the disk needs {size_bytes}",
                hint="choose a device that is at least as large as the disk",
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Writes `data` at `offset` bytes. Thread-safe."""
        write_all(self._descriptor, offset, data, self._doing)
        self._written.add(offset, offset + data.nbytes)

    def finish(self) -> None:
        """Zeroes what was not written. Durability: all is on the device on return."""
        for start, end in self._written.gaps(self._size_bytes):
            self._zero(start, end)
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise storage_error(error, self._doing) from None
        self.abort()

    def abort(self) -> None:
        """Closes the device and leaves it as it is. May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _zero(self, start: int, end: int) -> None:
        """Zeroes [start, end): whole sectors by the kernel (which may offload it), the rest by writing."""
        inner_start = min(-(-start // SECTOR_BYTES) * SECTOR_BYTES, end)
        inner_end = max(end // SECTOR_BYTES * SECTOR_BYTES, inner_start)
        self._write_zeros(start, inner_start)
        for position in range(inner_start, inner_end, _STEP_BYTES):
            stop = min(position + _STEP_BYTES, inner_end)
            try:
                fcntl.ioctl(self._descriptor, _BLKZEROOUT, struct.pack("=QQ", position, stop - position))
            except OSError:
                self._write_zeros(position, stop)
        self._write_zeros(inner_end, end)

    def _write_zeros(self, start: int, end: int) -> None:
        for position in range(start, end, len(_ZEROS)):
            stop = min(position + len(_ZEROS), end)
            write_all(self._descriptor, position, memoryview(_ZEROS)[: stop - position], self._doing)
