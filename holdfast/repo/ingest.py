"""From a machine's disks and files to disk trees: read, cut, hash, classify, compress, append.

Each worker takes a whole segment through all stages, so that the heavy calls run on all cores and a
segment's plaintext stays in one thread's buffer. A leaf that equals the parent's at the same place costs
neither an index access nor compression.

When other sessions write to the repository at the same time, a backup begins at another place of the disk
and goes round: two backups of similar disks then meet each other's committed chunks instead of storing
the same ones side by side.

Memory: one segment, and its compressed form, for each worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from holdfast.chunker import Chunker
from holdfast.chunker.splice import KeptPart, NewPart, splice
from holdfast.disk import BlockSource, ChangeMap
from holdfast.errors import IntegrityError
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.buffers import SegmentBuffers
from holdfast.repo.codec import Sealed, Sealer
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import Leaf, encode_leaf
from holdfast.repo.format.record import Kind
from holdfast.repo.governor import LevelGovernor
from holdfast.repo.keys import Keys
from holdfast.repo.parallel import run_parallel
from holdfast.repo.reader import DiskReader
from holdfast.repo.records import RecordReader
from holdfast.repo.session import Segment
from holdfast.repo.tree import (
    LeafTable,
    TreeReader,
    build_tree,
    segment_count,
    segment_length,
    segments_of,
    update_tree,
)
from holdfast.units import MIB

__all__ = ["Content", "Ingest", "IngestCounters", "RecordAcceptor"]

_NODES_AT_ONCE: Final = 1024
_WINDOW_BYTES: Final = 4 * MIB
_STAGE_BYTES: Final = 512 * 1024
_ZEROS: Final = memoryview(bytes(1 * MIB))
_GOLDEN: Final = 0.6180339887498949


class RecordAcceptor(Protocol):
    """Where records go: a `Session`, or a dry run that only counts."""

    def generation(self) -> int:
        """See `Session.generation`."""
        ...

    def unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        """See `Session.unknown`."""
        ...

    def append(self, segment: Segment, generation: int) -> int:
        """See `Session.append`."""
        ...

    def flush(self) -> None:
        """See `Session.flush`."""
        ...


@dataclass(slots=True)
class IngestCounters:
    """What has been done so far; see `PointStatistics` for the meaning of each."""

    bytes_total: int = 0
    bytes_done: int = 0
    bytes_read: int = 0
    bytes_new: int = 0
    chunks_new: int = 0
    chunks_reused: int = 0
    began: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Content:
    """One disk or file on its way in.

    Args:
        parent: the same content in the point that the backup builds upon.
        changes: what may differ from the parent; None if everything is to be read.
        leaves: what has become of the segments; with `changes`, of those that were looked at.
    """

    source: BlockSource
    parent: ContentTree | None
    changes: ChangeMap | None
    leaves: LeafTable | dict[int, NodeId]


class _Task(NamedTuple):
    content: Content
    segment: int


class _Cut(NamedTuple):
    """A segment that has been read and cut.

    Args:
        done: bytes that this takes the backup forward.
        pieces: the bytes of each chunk in `ids`; None for one that is the parent's and was not read.
    """

    done: int
    parts: list[int]
    ids: list[ChunkId]
    pieces: list[memoryview | None]
    read: int


class _PatchReader:
    """Gives `splice` the bytes it needs: new ones from the source, others from the repository.

    Where the repository's are damaged, the source has them too.
    """

    def __init__(self, source: BlockSource, old: DiskReader, base: int) -> None:
        self._source = source
        self._old = old
        self._base = base
        self.bytes_read = 0

    def read_changed(self, start: int, end: int) -> memoryview:
        view = memoryview(bytearray(end - start))
        for offset, size in self._source.data_extents(self._base + start, self._base + end):
            first = offset - self._base - start
            self._source.read_into(offset, view[first : first + size])
            self.bytes_read += size
        return view

    def read_unchanged(self, start: int, end: int) -> bytes | memoryview:
        try:
            return self._old.pread(self._base + start, end - start)
        except IntegrityError:
            return self.read_changed(start, end)


class Ingest:
    """Takes contents into a repository.

    Args:
        records, trees: for the parent.
        segment_bytes: what contents are cut into; a parent's tree must have the same.
        spread: number of sessions that were at work when this one began.
        governor: chooses the compression level; None leaves the sealer's as it is.
        on_progress: called a few times a second from the calling thread.
    """

    def __init__(
        self,
        acceptor: RecordAcceptor,
        keys: Keys,
        sealer: Sealer,
        chunker: Chunker,
        records: RecordReader,
        trees: TreeReader,
        segment_bytes: int,
        workers: int,
        spread: int = 0,
        governor: LevelGovernor | None = None,
        on_progress: Callable[[IngestCounters], None] = lambda _counters: None,
    ) -> None:
        self._acceptor = acceptor
        self._keys = keys
        self._sealer = sealer
        self._chunker = chunker
        self._records = records
        self._trees = trees
        self._segment_bytes = segment_bytes
        self._workers = workers
        self._spread = spread
        self._governor = governor
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._buffers = SegmentBuffers(segment_bytes)
        self.counters = IngestCounters()

    def content(
        self, source: BlockSource, parent: ContentTree | None, changes: ChangeMap | None = None
    ) -> Content:
        """A content to pass to `run`.

        Args:
            changes: needs a parent. A disk that has another size than its parent is taken segment by
                segment too, but its last one is read whole.
        """
        segments = segment_count(source.size_bytes, self._segment_bytes)
        if changes is None or parent is None:
            return Content(source, parent, None, LeafTable(segments))
        if parent.size_bytes == source.size_bytes:
            return Content(source, parent, changes, {})
        table = LeafTable(segments)
        for segment, leaf in self._trees.data_leaves(parent):
            if segment < segments:
                table[segment] = leaf
        return Content(source, parent, changes, table)

    def run(self, contents: Sequence[Content]) -> list[ContentTree]:
        """Takes all contents in and returns their trees, in order.

        Raises:
            SourceError, StorageError: as the source and the session raise them.
        """
        self.counters.bytes_total = sum(
            content.changes.changed_bytes if content.changes else content.source.size_bytes
            for content in contents
        )
        run_parallel(
            self._tasks(contents), self._segment, self._workers, lambda: self._on_progress(self.counters)
        )
        self._acceptor.flush()  # segments that have to be done again are done before the trees are built
        trees = [ContentTree(c.source.size_bytes, self._finish(c), self._segment_bytes) for c in contents]
        self._on_progress(self.counters)
        return trees

    def _tasks(self, contents: Sequence[Content]) -> Iterator[_Task]:
        for content in contents:
            if content.changes is not None:
                yield from self._changed_segments(content, content.changes)
                continue
            first = int(len(content.leaves) * (self._spread * _GOLDEN % 1.0))
            yield from self._data_segments(content, first, len(content.leaves))
            yield from self._data_segments(content, 0, first)

    def _data_segments(self, content: Content, first: int, end: int) -> Iterator[_Task]:
        """The segments in [first, end) that may hold data."""
        size, segment_bytes = content.source.size_bytes, self._segment_bytes
        following = first
        start, stop = first * segment_bytes, min(end * segment_bytes, size)
        if start >= stop:
            return
        for offset, length in content.source.data_extents(start, stop):
            last = (offset + length - 1) // segment_bytes
            for segment in range(max(following, offset // segment_bytes), last + 1):
                self._skipped(content, following, segment)
                yield _Task(content, segment)
                following = segment + 1
        self._skipped(content, following, end)

    def _changed_segments(self, content: Content, changes: ChangeMap) -> Iterator[_Task]:
        """The segments that a change map touches, and those whose length is another than the parent's."""
        size, segment_bytes = content.source.size_bytes, self._segment_bytes
        assert content.parent is not None
        following = 0
        extents = list(changes.extents)
        if content.parent.size_bytes != size:
            odd = min(content.parent.size_bytes, size) // segment_bytes * segment_bytes
            extents.append((odd, size - odd))
        for offset, length in sorted(extents):
            last = (offset + length - 1) // segment_bytes
            for segment in range(max(following, offset // segment_bytes), last + 1):
                yield _Task(content, segment)
                following = segment + 1

    def _skipped(self, content: Content, first: int, end: int) -> None:
        if end > first:
            stop = min(end * self._segment_bytes, content.source.size_bytes)
            self.counters.bytes_done += stop - first * self._segment_bytes

    def _take(self, content: Content, segment: int) -> _Cut:
        """Reads a segment, cuts it and names its chunks, some of it at a time.

        What has just been read is still in the processor's cache when it is hashed. A cut is final once
        the chunker's lookahead behind it has been read too; what comes after the last final cut is cut
        again with the next bytes.
        """
        start = segment * self._segment_bytes
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
        view = self._buffers.view(length)
        extents = list(content.source.data_extents(start, start + length))
        cut = _Cut(length, [], [], [], sum(size for _, size in extents))
        name = self._keys.namer(Kind.CHUNK)
        began = done = 0
        window = _WINDOW_BYTES
        while done < length:
            end = min(length, done + window)
            self._fill(content.source, extents, start, view, done, end)
            done = end
            settled = done if done == length else min(done - self._chunker.lookahead_bytes, done - 1)
            first = began
            for part in self._chunker.cut(view[began:done]):
                after = began + abs(part)
                if after > settled:
                    break
                if part > 0:
                    piece = view[began:after]
                    cut.pieces.append(piece)
                    cut.ids.append(ChunkId(name(piece)))
                cut.parts.append(part)
                began = after
            window = _WINDOW_BYTES if began > first else 2 * window
        return cut

    def _patched(self, content: Content, segment: int) -> _Cut | None:
        """A segment of which only the changed ranges are read; None if it has to be read whole."""
        parent, changes = content.parent, content.changes
        start = segment * self._segment_bytes
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
        if parent is None or changes is None or segment >= segments_of(parent):
            return None
        if segment_length(parent.size_bytes, self._segment_bytes, segment) != length:
            return None
        try:
            old = self._trees.leaf(self._trees.leaf_id(parent, segment), length)
        except IntegrityError:
            return None
        old_ids = iter(old.ids)
        ids_by_part = [next(old_ids) if part > 0 else None for part in old.lengths]
        reader = _PatchReader(content.source, DiskReader(self._records, self._trees, parent), start)
        ranges = changes.within(start, start + length)
        name = self._keys.namer(Kind.CHUNK)
        cut = _Cut(sum(end - first for first, end in ranges), [], [], [], 0)
        for part in splice(self._chunker, old.lengths, ranges, reader):
            cut.parts.append(part.length)
            if part.length < 0:
                continue
            kept = ids_by_part[part.number] if isinstance(part, KeptPart) else None
            if isinstance(part, NewPart):
                kept = ChunkId(name(part.data))
            assert kept is not None
            cut.ids.append(kept)
            cut.pieces.append(part.data if isinstance(part, NewPart) else None)
        return cut._replace(read=reader.bytes_read)

    @staticmethod
    def _fill(
        source: BlockSource, extents: list[tuple[int, int]], base: int, view: memoryview, first: int, end: int
    ) -> None:
        """Reads what `view[first:end]` stands for; what lies outside of the extents is zeros."""
        at = first
        for offset, size in extents:
            low, high = max(offset - base, first), min(offset - base + size, end)
            if low >= high:
                continue
            if low > at:
                _zero(view[at:low])
            source.read_into(base + low, view[low:high])
            at = high
        if at < end:
            _zero(view[at:end])

    def _segment(self, task: _Task, *, again: bool = False) -> None:
        content, segment = task
        began = time.monotonic()
        cut = self._patched(content, segment) if content.changes else None
        length, parts, ids, pieces, read = cut or self._take(content, segment)
        have_read = time.monotonic()
        leaf, plaintext = HOLE_ID, b""
        new_bytes = new_chunks = 0
        if ids:
            plaintext = encode_leaf(Leaf(tuple(parts), tuple(ids)))
            leaf = NodeId(self._keys.record_id(Kind.NODE, plaintext))
        content.leaves[segment] = leaf  # before it is stored: doing the segment again may replace it
        if leaf not in (HOLE_ID, self._parent_leaf(content, segment)):
            new_bytes, new_chunks = self._store(task, ids, pieces, leaf, plaintext)
        if self._governor is not None:
            self._governor.note(have_read - began, time.monotonic() - have_read)
            self._sealer.level = self._governor.level
        with self._lock:
            counters = self.counters
            if not again:
                counters.bytes_done += length
            counters.bytes_read += read
            counters.bytes_new += new_bytes
            counters.chunks_new += new_chunks
            counters.chunks_reused += 0 if again else len(ids) - new_chunks

    def _store(
        self, task: _Task, ids: list[ChunkId], pieces: list[memoryview | None], leaf: NodeId, plaintext: bytes
    ) -> tuple[int, int]:
        def again() -> None:
            self._segment(task, again=True)

        generation = self._acceptor.generation()
        # What was taken over unread is held by the session through the parent, so nobody asks for it.
        every: list[RecordId] = [i for i, piece in zip(ids, pieces, strict=True) if piece is not None]
        every.append(leaf)
        unknown = self._acceptor.unknown(every)
        records: list[Sealed] = []
        staged_bytes = new_bytes = new_chunks = 0
        for chunk, piece in zip(ids, pieces, strict=True):
            if piece is None or chunk not in unknown:
                continue
            unknown.discard(chunk)
            records.append(self._sealer.seal(Kind.CHUNK, chunk, piece))
            new_chunks += 1
            staged_bytes += len(records[-1].payload)
            if staged_bytes >= _STAGE_BYTES:
                # While it is in the processor's cache. Should a commit come before the leaf, the leaf relies
                # on these chunks like on any others.
                new_bytes += self._acceptor.append(Segment(records, frozenset(), None, again), generation)
                records, staged_bytes = [], 0
        if leaf in unknown:
            records.append(self._sealer.seal(Kind.NODE, leaf, plaintext))
        relied = frozenset(every) - {sealed.header.id for sealed in records}
        new_bytes += self._acceptor.append(Segment(records, relied, leaf, again), generation)
        return new_bytes, new_chunks

    def _parent_leaf(self, content: Content, segment: int) -> NodeId | None:
        parent = content.parent
        if parent is None or segment >= segments_of(parent):
            return None
        try:
            return self._trees.leaf_id(parent, segment)
        except IntegrityError:
            content.parent = None  # the parent is damaged: build upon nothing rather than fail
            return None

    def _finish(self, content: Content) -> NodeId:
        nodes: list[tuple[NodeId, bytes]] = []
        if isinstance(content.leaves, LeafTable):
            root = build_tree(content.leaves, self._keys, nodes)
        else:
            assert content.parent is not None
            root = update_tree(self._trees, content.parent, content.leaves, self._keys, nodes)
        for first in range(0, len(nodes), _NODES_AT_ONCE):
            self._store_nodes(nodes[first : first + _NODES_AT_ONCE])
        return root

    def _store_nodes(self, nodes: list[tuple[NodeId, bytes]]) -> None:
        generation = self._acceptor.generation()
        unknown = self._acceptor.unknown([node for node, _ in nodes])
        records = [self._sealer.seal(Kind.NODE, node, text) for node, text in nodes if node in unknown]
        relied = frozenset(RecordId(node) for node, _ in nodes) - unknown
        self._acceptor.append(Segment(records, relied, None, lambda: self._store_nodes(nodes)), generation)


def _zero(view: memoryview) -> None:
    """Fills a view with zeros, without making as many first."""
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
