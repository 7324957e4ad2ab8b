"""A disk of a restore point as a seekable file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from holdfast.ids import ChunkId
from holdfast.repo.buffers import write_zeros
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.readcache import ReadCache
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader, segment_length, segments_of
from holdfast.units import MIB

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["DiskReader"]

_CACHE_BYTES: Final = 32 * MIB
_TOGETHER_BYTES: Final = 4 * MIB
"""How much is decoded together: enough for whoever reads packs, little enough for memory."""


class DiskReader(io.RawIOBase):
    """Read-only, seekable; `pread` and what else takes an offset may be used from several threads at once.

    Every byte that is returned has been verified.

    Args:
        cache: what it shares with other readers; None for one of its own, of `_CACHE_BYTES`.
    """

    def __init__(
        self, records: RecordReader, trees: TreeReader, tree: ContentTree, cache: ReadCache | None = None
    ) -> None:
        super().__init__()
        self._cache = ReadCache(records, trees, _CACHE_BYTES) if cache is None else cache
        self._tree = tree
        self._position = 0

    @property
    def size_bytes(self) -> int:
        """The disk's virtual size."""
        return self._tree.size_bytes

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position, as for files."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fills the buffer from the position on; fewer bytes only at the end of the disk.

        Raises:
            DamagedData: something in that range is missing or damaged.
        """
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size_bytes - self._position))
        self.read_into(self._position, view[:length])
        self._position += length
        return length

    def pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on; fewer only at the end of the disk.

        Raises:
            DamagedData: something in that range is missing or damaged.
        """
        result = bytearray(max(0, min(length, self.size_bytes - offset)))
        self.read_into(offset, memoryview(result))
        return bytes(result)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole buffer from `offset` on, so that a stored disk can be a `BlockSource` itself.

        All of it must lie inside of the disk. What is in the buffer after an error is undefined.

        Raises:
            DamagedData: something in that range is missing or damaged.
        """
        end = offset + len(buffer)
        together: list[tuple[int, int, ChunkId]] = []
        together_bytes = 0
        for start, size, chunk in self.parts(offset, end):
            if chunk is None:
                write_zeros(buffer[max(start, offset) - offset : min(start + size, end) - offset])
                continue
            together.append((start, size, chunk))
            together_bytes += size
            if together_bytes >= _TOGETHER_BYTES:
                self._copy(together, offset, buffer)
                together, together_bytes = [], 0
        if together:
            self._copy(together, offset, buffer)

    def _copy(self, parts: Sequence[tuple[int, int, ChunkId]], offset: int, buffer: memoryview) -> None:
        """Writes what these chunks hold of the range that begins at `offset` into its buffer."""
        data = self._cache.chunks([(chunk, size) for _, size, chunk in parts])
        for start, size, chunk in parts:
            first, last = max(start, offset), min(start + size, offset + len(buffer))
            buffer[first - offset : last - offset] = memoryview(data[chunk])[first - start : last - start]

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yields (offset, length) of what is no hole in [start, end), neighbours merged."""
        open_start = open_end = -1
        for offset, size, chunk in self.parts(start, min(end, self.size_bytes)):
            if chunk is None:
                continue
            first, last = max(offset, start), min(offset + size, end)
            if first == open_end:
                open_end = last
                continue
            if open_end > open_start:
                yield open_start, open_end - open_start
            open_start, open_end = first, last
        if open_end > open_start:
            yield open_start, open_end - open_start

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, ChunkId | None]]:
        """Yields (offset, length, chunk or None for a hole) of all parts that touch [start, end)."""
        if start >= end:
            return
        tree = self._tree
        segment_bytes = tree.segment_bytes
        last = min((end - 1) // segment_bytes + 1, segments_of(tree))
        for number in range(start // segment_bytes, last):
            base = number * segment_bytes
            found = self._cache.segment(tree, number)
            if found is None:
                yield base, segment_length(tree.size_bytes, segment_bytes, number), None
                continue
            for offset, size, chunk in found.parts(max(0, start - base), end - base):
                yield base + offset, size, chunk

    def fetch(self, start: int, end: int) -> None:
        """Reads what a later read of [start, end) will need. Errors are left to that."""
        self._cache.fetch([chunk for _, _, chunk in self.parts(start, end) if chunk is not None])
