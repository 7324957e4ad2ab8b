"""What reading contents at random places keeps in memory: decoded chunks, and where each chunk of a segment is.

One cache serves any number of readers and threads. Its invariants: nothing is in it that has not been proven
against its id; chunks take no more than the limit in bytes, but for those that are being read at this moment; what
several threads want at the same time is read once. No lock is held while something is read.

Ids name content, so nothing in here ever becomes stale: what is in the cache can be read even if a garbage
collection has taken it meanwhile.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from holdfast.errors import HoldfastError, StorageError
from holdfast.ids import HOLE_ID, ID_BYTES, ChunkId, NodeId, RecordId
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.record import Kind
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader, require_length, segment_length
from holdfast.units import MIB

__all__ = ["ReadCache", "SegmentMap"]

_ENTRY_BYTES: Final = 200
"""What a cached chunk costs besides its bytes."""
_MAPS_BYTES: Final = 16 * MIB


class SegmentMap:
    """The parts of one segment, in a form that is small and quick to search."""

    __slots__ = ("_chunks", "_ids", "_starts")

    def __init__(self, lengths: Sequence[int], ids: Sequence[ChunkId]) -> None:
        self._starts = array("I", [0])  # of each part, and the end
        self._chunks = array("i")  # number of the chunk in `_ids`, or -1 for a hole
        at = number = 0
        for length in lengths:
            at += abs(length)
            self._starts.append(at)
            self._chunks.append(number if length > 0 else -1)
            number += length > 0
        self._ids = b"".join(ids)

    @property
    def memory_bytes(self) -> int:
        """About what it takes up."""
        return len(self._ids) + 8 * len(self._starts) + _ENTRY_BYTES

    @property
    def data_bytes(self) -> int:
        """How much of the segment is no hole."""
        return sum(length for _, length, chunk in self.parts(0, self._starts[-1]) if chunk is not None)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, ChunkId | None]]:
        """Yields (offset, length, chunk or None for a hole) of all parts that touch [start, end)."""
        starts = self._starts
        for number in range(bisect_right(starts, start) - 1, len(self._chunks)):
            first = starts[number]
            if first >= end:
                return
            chunk = self._chunks[number]
            yield (
                first,
                starts[number + 1] - first,
                None
                if chunk < 0
                else ChunkId(RecordId(self._ids[chunk * ID_BYTES : (chunk + 1) * ID_BYTES])),
            )


class _Loading:
    """Chunks that a thread is reading for everybody who wants them."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = threading.Event()


class ReadCache:
    """See the module. Thread-safe.

    Args:
        limit_bytes: for decoded chunks, with what it costs to keep them; maps of segments take up to 16 MiB more.
    """

    def __init__(self, records: RecordReader, trees: TreeReader, limit_bytes: int) -> None:
        self._records = records
        self._trees = trees
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[ChunkId, bytes] = OrderedDict()
        self._chunks_bytes = 0
        self._maps: OrderedDict[NodeId, SegmentMap] = OrderedDict()
        self._maps_bytes = 0
        self._loading: dict[ChunkId, _Loading] = {}

    @property
    def chunks_bytes(self) -> int:
        """What the cached chunks take up."""
        return self._chunks_bytes

    # --- maps of segments

    def segment(self, tree: ContentTree, number: int) -> SegmentMap | None:
        """Where the chunks of a segment are; None if all of it is a hole.

        Raises:
            DamagedData: the tree is damaged on the way there.
        """
        node = self._trees.leaf_id(tree, number)
        return (
            None
            if node == HOLE_ID
            else self.leaf(node, segment_length(tree.size_bytes, tree.segment_bytes, number))
        )

    def leaf(self, node: NodeId, length: int) -> SegmentMap:
        """The map of a segment of `length` bytes with that leaf.

        Raises:
            DamagedData: the leaf is missing or damaged.
        """
        with self._lock:
            found = self._maps.get(node)
            if found is not None:
                self._maps.move_to_end(node)
        if found is not None:
            if found._starts[-1] != length:  # noqa: SLF001 - of the same module
                self._trees.leaf(node, length)  # it does not fit there, and says so
            return found
        leaf = self._trees.leaf(node, length)
        made = SegmentMap(leaf.lengths, leaf.ids)
        with self._lock:
            if node not in self._maps:
                self._maps[node] = made
                self._maps_bytes += made.memory_bytes
            while self._maps_bytes > _MAPS_BYTES and len(self._maps) > 1:
                self._maps_bytes -= self._maps.popitem(last=False)[1].memory_bytes
        return made

    # --- chunks

    def chunks(self, wanted: Sequence[tuple[ChunkId, int]]) -> dict[ChunkId, bytes]:
        """The plaintexts of some chunks; neighbours that are not here yet are read together.

        Args:
            wanted: (chunk, its length as the leaf that lists it says).

        Raises:
            DamagedData: one of them is missing, damaged, or of another length.
            StorageError: one of them can not be read.
        """
        found: dict[ChunkId, bytes] = {}
        while len(missing := [chunk for chunk, _ in wanted if chunk not in found]) > 0:
            ours, waiting = self._claim(missing, found)
            if ours:
                found.update(self._load(ours))
            elif waiting is not None:
                waiting.done.wait()
        for chunk, length in wanted:
            require_length(len(found[chunk]), length)
        return found

    def fetch(self, wanted: Sequence[ChunkId]) -> None:
        """Reads those chunks that are not here yet, ahead of their use.

        What can not be read is left out: whoever wants it will hear of it.
        """
        ours, _ = self._claim(wanted, None)
        if not ours:
            return
        try:
            self._load(ours)
        except (HoldfastError, OSError):
            return

    def _claim(
        self, wanted: Sequence[ChunkId], found: dict[ChunkId, bytes] | None
    ) -> tuple[list[ChunkId], _Loading | None]:
        """Those chunks that are neither here nor being read, which the caller must load now; one that is being read."""
        ours: dict[ChunkId, None] = {}
        waiting: _Loading | None = None
        with self._lock:
            for chunk in wanted:
                data = self._chunks.get(chunk)
                if data is not None:
                    self._chunks.move_to_end(chunk)
                    if found is not None:
                        found[chunk] = data
                elif chunk in self._loading:
                    waiting = self._loading[chunk]
                else:
                    ours[chunk] = None
            if ours:
                loading = _Loading()
                self._loading.update(dict.fromkeys(ours, loading))
        return list(ours), waiting

    def _load(self, ours: Sequence[ChunkId]) -> dict[ChunkId, bytes]:
        """Reads claimed chunks; whatever comes of it, nobody waits for them any more afterwards."""
        loaded: dict[ChunkId, bytes] = {}
        loading = self._loading[ours[0]]
        try:
            for chunk, data in self._records.each(ours, Kind.CHUNK):
                loaded[ChunkId(chunk)] = data
        except MemoryError:
            raise StorageError("there is not enough memory to read on") from None
        finally:
            with self._lock:
                for chunk in ours:
                    del self._loading[chunk]
                for chunk, data in loaded.items():
                    self._chunks[chunk] = data
                    self._chunks_bytes += len(data) + _ENTRY_BYTES
                while self._chunks_bytes > self._limit_bytes and self._chunks:
                    _, dropped = self._chunks.popitem(last=False)
                    self._chunks_bytes -= len(dropped) + _ENTRY_BYTES
            loading.done.set()
        return loaded
