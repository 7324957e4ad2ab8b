"""Disks and machines made by rule, and a sink that remembers what was written to it.

A disk is a list of units of 64 KiB, each named by a number: unit 0 is zeros (a hole), any other number
stands for the same 64 KiB wherever it occurs. So tests say what is shared, repeated or changed, and know
what a restore must give without asking the engine.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from holdfast.disk import BlockSource, DiskInfo, FileInfo, Machine, SourceDisk, SourceFile
from holdfast.errors import SourceUnreadable

KIB = 1024
MIB = 1024 * KIB
UNIT = 64 * KIB


@lru_cache(maxsize=512)
def unit(number: int) -> bytes:
    """The 64 KiB that a number stands for; an eighth of it compresses."""
    if number == 0:
        return bytes(UNIT)
    made = random.Random(number)
    noise = made.randbytes(UNIT * 7 // 8)
    text = (b"unit %d of a generated disk; " % number) * (UNIT // 8 // 24 + 1)
    return noise + text[: UNIT // 8]


def content(units: Sequence[int], tail: bytes = b"") -> bytes:
    """The bytes of a disk."""
    return b"".join(map(unit, units)) + tail


class MemorySource:
    """Bytes as a `BlockSource`.

    Args:
        sparse: report zero blocks of 4 KiB as holes; otherwise everything is one extent.
        fail_at: reading this byte fails, as a bad sector would.
        on_read: called before each read with its offset.
    """

    def __init__(
        self,
        data: bytes,
        *,
        sparse: bool = True,
        fail_at: int = -1,
        on_read: Callable[[int], None] = lambda _offset: None,
    ) -> None:
        self.data = data
        self._sparse = sparse
        self._fail_at = fail_at
        self._on_read = on_read

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        assert 0 <= start <= end <= len(self.data)
        if not self._sparse:
            if start < end:
                yield start, end - start
            return
        zeros = bytes(4 * KIB)
        open_at = -1
        at = start
        while at < end:
            stop = min(end, (at // (4 * KIB) + 1) * 4 * KIB)
            is_hole = self.data[at:stop] == zeros[: stop - at]
            if is_hole and open_at >= 0:
                yield open_at, at - open_at
                open_at = -1
            elif not is_hole and open_at < 0:
                open_at = at
            at = stop
        if open_at >= 0:
            yield open_at, end - open_at

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert buffer.nbytes
        assert offset + buffer.nbytes <= len(self.data)
        self._on_read(offset)
        if offset <= self._fail_at < offset + buffer.nbytes:
            raise SourceUnreadable(f"byte {self._fail_at} of the source can not be read")
        buffer[:] = self.data[offset : offset + buffer.nbytes]

    def close(self) -> None:
        pass


class MemorySink:
    """A `BlockSink` in memory; holds writers to their contract."""

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes)
        self._ranges: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        assert data.nbytes
        assert 0 <= offset <= offset + data.nbytes <= len(self.data)
        with self._lock:
            self._ranges.append((offset, offset + data.nbytes))
            self.data[offset : offset + data.nbytes] = data

    def finish(self) -> None:
        ranges = sorted(self._ranges)
        for (_, end), (start, _) in pairwise(ranges):
            assert end <= start, "two writes overlap"

    def abort(self) -> None:
        self.data[:] = bytes(len(self.data))


def machine_of(
    disks: Sequence[BlockSource | bytes],
    *,
    name: str = "web1",
    uuid: str = "",
    files: dict[str, bytes] | None = None,
) -> Machine:
    """A machine with these disks (`disk0.raw`, `disk1.raw`, ...) and small files."""
    sources = [MemorySource(disk) if isinstance(disk, bytes) else disk for disk in disks]
    return Machine(
        kind="vm",
        name=name,
        uuid=uuid,
        origin=f"a generated machine named {name}",
        disks=tuple(
            SourceDisk(DiskInfo(f"disk{number}.raw", source.size_bytes, "raw"), source)
            for number, source in enumerate(sources)
        ),
        files=tuple(
            SourceFile(FileInfo(file, len(data), 1_700_000_000_000_000_000, 0o640), MemorySource(data))
            for file, data in (files or {}).items()
        ),
    )
