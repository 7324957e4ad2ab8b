"""A disk of a restore point as a seekable file."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from holdfast.ids import HOLE_ID, ChunkId
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.record import Kind
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader, require_length, segment_count, segment_length
from holdfast.units import MIB

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["DiskReader"]

_CACHE_BYTES: Final = 32 * MIB


class DiskReader(io.RawIOBase):
    """Read-only, seekable; `pread` may be used from several threads at once.

    Every byte that is returned has been verified. Memory: `_CACHE_BYTES` of decoded chunks.
    """

    def __init__(self, records: RecordReader, trees: TreeReader, tree: ContentTree) -> None:
        super().__init__()
        self._records = records
        self._trees = trees
        self._tree = tree
        self._position = 0
        self._cache: OrderedDict[ChunkId, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

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
        data = self.pread(self._position, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on; fewer only at the end of the disk.

        Raises:
            DamagedData: something in that range is missing or damaged.
        """
        end = min(offset + length, self.size_bytes)
        result = bytearray(max(0, end - offset))
        for start, size, chunk in self._parts(offset, end):
            if chunk is None:
                continue
            data = self._chunk(chunk, size)
            first, last = max(start, offset), min(start + size, end)
            result[first - offset : last - offset] = data[first - start : last - start]
        return bytes(result)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer, so that a stored disk can be a `BlockSource` itself."""
        buffer[:] = self.pread(offset, len(buffer))

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yields (offset, length) of what is no hole in [start, end), neighbours merged."""
        open_start = open_end = -1
        for offset, size, chunk in self._parts(start, min(end, self.size_bytes)):
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

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, ChunkId | None]]:
        """(offset, length, chunk or hole) of all parts that touch [start, end)."""
        if start >= end:
            return
        segment_bytes = self._tree.segment_bytes
        last = min((end - 1) // segment_bytes + 1, segment_count(self.size_bytes, segment_bytes))
        for segment in range(start // segment_bytes, last):
            offset = segment * segment_bytes
            length = segment_length(self.size_bytes, segment_bytes, segment)
            node = self._trees.leaf_id(self._tree, segment)
            if node == HOLE_ID:
                yield offset, length, None
                continue
            leaf = self._trees.leaf(node, length)
            ids = iter(leaf.ids)
            for part in leaf.lengths:
                chunk = next(ids) if part > 0 else None
                if offset + abs(part) > start and offset < end:
                    yield offset, abs(part), chunk
                offset += abs(part)

    def _chunk(self, chunk: ChunkId, length: int) -> bytes:
        with self._lock:
            data = self._cache.get(chunk)
            if data is not None:
                self._cache.move_to_end(chunk)
                return data
        data = self._records.load_one(chunk, Kind.CHUNK)
        require_length(len(data), length)
        with self._lock:
            if chunk not in self._cache:
                self._cache[chunk] = data
                self._cached_bytes += len(data)
            while self._cached_bytes > _CACHE_BYTES:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= len(dropped)
        return data
