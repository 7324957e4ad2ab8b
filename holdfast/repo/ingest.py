"""From a machine's disks and files to disk trees: read, cut, hash, classify, compress, append.

Each worker takes a whole segment through all stages, a window at a time: what has just been read is still in
the processor's cache when it is cut, hashed and compressed, and the next window is read over it. Chunks that
the parent lists in the same segment are held by the session through the parent: they cost neither an index
access nor compression, and a leaf that equals the parent's costs nothing at all. None of that holds for what a
repair has found lost: segments of the parent that need it are read and stored as if there were no parent.

When other sessions write to the repository at the same time, a backup begins at another place of the disk
and goes round: two backups of similar disks then meet each other's committed chunks instead of storing
the same ones side by side.

Memory: two windows, and their compressed form, for each worker; more for chunks that are larger than that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from holdfast.chunker import Chunker
from holdfast.chunker.splice import KeptPart, NewPart, splice
from holdfast.disk import BlockSource, ChangeMap, Cutting, SegmentScanner
from holdfast.errors import IntegrityError
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.buffers import SegmentBuffers, new_buffer
from holdfast.repo.codec import Sealer
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import Leaf
from holdfast.repo.format.record import Kind
from holdfast.repo.governor import LevelGovernor
from holdfast.repo.keys import Keys
from holdfast.repo.parallel import run_parallel
from holdfast.repo.reader import DiskReader
from holdfast.repo.records import RecordReader
from holdfast.repo.scanned import Aliases, Expectations, Taken, name_leaf, take_scanned
from holdfast.repo.session import Segment
from holdfast.repo.storing import ParentLeaf, RecordAcceptor, Storing
from holdfast.repo.tree import (
    LeafTable,
    TreeReader,
    build_tree,
    segment_count,
    segment_length,
    segments_of,
    update_tree,
)
from holdfast.repo.windows import Cut, Followed, PatchReader, Window
from holdfast.units import MIB

__all__ = ["Content", "Ingest", "IngestCounters", "RecordAcceptor"]

_NODES_AT_ONCE: Final = 1024
_WAITING_WORKERS: Final = 3
"""More than usual, where the repository is far and cores are idle: each keeps a whole segment in memory."""
_WINDOW_BYTES: Final = 2 * MIB
_GOLDEN: Final = 0.6180339887498949


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
        lacking: segments of which the parent lacks something: with `changes` they are read whole.
        scanner: cuts and hashes the source where it lies, if everything is to be read.
        expected: with it, what the parent has in the place of each segment.
    """

    source: BlockSource
    parent: ContentTree | None
    changes: ChangeMap | None
    leaves: LeafTable | dict[int, NodeId]
    lacking: frozenset[int] = frozenset()
    scanner: SegmentScanner | None = None
    expected: Expectations | None = None


class _Task(NamedTuple):
    content: Content
    segment: int


class Ingest:
    """Takes contents into a repository.

    Args:
        records, trees: for the parent.
        segment_bytes: what contents are cut into; a parent's tree must have the same.
        spread: number of sessions that were at work when this one began.
        governor: chooses the compression level; None leaves the sealer's as it is.
        lost: records that were dropped as damaged and are not stored, whatever the parent says.
        cutting: how the chunker cuts, for scanners; None if there are none.
        aliases: see `Index.aliases`.
        on_progress: called a few times a second from the calling thread.
        far: each question to the repository takes a round trip over a network: few are asked, for whole segments.
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
        workers: int | None,
        spread: int = 0,
        governor: LevelGovernor | None = None,
        lost: frozenset[RecordId] = frozenset(),
        cutting: Cutting | None = None,
        aliases: Callable[[Sequence[bytes]], list[RecordId | None]] = lambda names: [None] * len(names),
        on_progress: Callable[[IngestCounters], None] = lambda _counters: None,
        *,
        far: bool = False,
    ) -> None:
        self._far = far
        self._lost = lost
        self._cutting = cutting
        self._aliases = Aliases(aliases)
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
        self,
        source: BlockSource,
        parent: ContentTree | None,
        changes: ChangeMap | None = None,
        scanner: SegmentScanner | None = None,
    ) -> Content:
        """A content to pass to `run`.

        Args:
            scanner: used where there are no changes, if it knows the repository's way of cutting.
            changes: needs a parent. A disk that has another size than its parent is taken segment by
                segment too, but its last one is read whole. Where the parent's tree is damaged, everything is read.
        """
        segments = segment_count(source.size_bytes, self._segment_bytes)
        if changes is not None and parent is not None:
            with contextlib.suppress(IntegrityError):
                return self._mapped_content(source, parent, changes, segments)
        if self._cutting is None or (scanner is not None and not scanner.can_cut(self._cutting)):
            scanner = None
        table = LeafTable(segments)
        if scanner is None:
            return Content(source, parent, None, table)
        known = None if self._lost else parent  # each leaf has to be looked at if something may be lacking
        expected = Expectations(self._trees, self._keys, self._aliases, known, source.size_bytes)
        return Content(source, parent, None, table, scanner=scanner, expected=expected)

    def _mapped_content(
        self, source: BlockSource, parent: ContentTree, changes: ChangeMap, segments: int
    ) -> Content:
        """A content of which only the changed segments are read.

        Raises:
            IntegrityError: an inner node of the parent can not be read.
        """
        lacking = frozenset(self._lacking_segments(parent)) if self._lost else frozenset()
        if parent.size_bytes == source.size_bytes:
            for offset, length in changes.extents:  # these paths are made anew in the end
                for segment in range(
                    offset // self._segment_bytes, -(-(offset + length) // self._segment_bytes)
                ):
                    self._trees.leaf_id(parent, segment)
            return Content(source, parent, changes, {}, lacking)
        table = LeafTable(segments)
        for segment, leaf in self._trees.data_leaves(parent):
            if segment < segments:
                table[segment] = leaf
        return Content(source, parent, changes, table, lacking)

    def _lacking_segments(self, parent: ContentTree) -> Iterator[int]:
        """The segments of which the parent lacks something. Cost: reads all leaves; only after damage."""
        for segment, leaf in self._trees.data_leaves(parent):
            length = segment_length(parent.size_bytes, self._segment_bytes, segment)
            if self._sound_leaf(leaf, length) is None:
                yield segment

    def _sound_leaf(self, node: NodeId, length: int) -> Leaf | None:
        """A leaf of the parent; None if it can not be read, or needs something that is lost."""
        try:
            leaf = self._trees.leaf(node, length)
        except IntegrityError:
            return None
        lost = self._lost
        return None if lost and (node in lost or not lost.isdisjoint(leaf.ids)) else leaf

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
            self._tasks(contents),
            self._segment,
            self._workers,
            lambda: self._on_progress(self.counters),
            _WAITING_WORKERS if self._far else 0,
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
        extents += [
            (segment * segment_bytes, segment_length(size, segment_bytes, segment))
            for segment in content.lacking
            if segment * segment_bytes < size
        ]
        for offset, length in sorted(extents):
            last = (offset + length - 1) // segment_bytes
            for segment in range(max(following, offset // segment_bytes), last + 1):
                yield _Task(content, segment)
                following = segment + 1

    def _skipped(self, content: Content, first: int, end: int) -> None:
        if end > first:
            stop = min(end * self._segment_bytes, content.source.size_bytes)
            self.counters.bytes_done += stop - first * self._segment_bytes

    def _cuts(
        self, content: Content, segment: int, parent: ParentLeaf | None, buffer: memoryview
    ) -> Iterator[Cut]:
        """Reads a segment, cuts it and names its chunks, some of it at a time.

        As long as the parent's parts prove equal they are followed, without looking for cuts: equal bytes have
        equal cuts. Where they do not, the rest of the window is cut, and if that ends on a cut of the parent's,
        its parts are tried again from there. A cut is final once the chunker's lookahead behind it is known too;
        what comes after the last final cut is looked at again together with the next bytes.
        """
        window = Window(content.source, segment * self._segment_bytes, buffer)
        name = self._keys.namer(Kind.CHUNK)
        followed = Followed(parent.leaf, name) if parent is not None else None
        at, size = 0, _WINDOW_BYTES
        while not window.ended:
            read_before, taken_before = window.read, window.taken
            window.more(at, size)
            view = window.bytes()
            cut = Cut([], [], [], window.read - read_before, window.taken - taken_before)
            at = 0
            if followed is not None and followed.goes_on:
                at = followed.follow(view, cut, self._chunker.lookahead_bytes, ended=window.ended)
            if followed is None or not followed.goes_on:
                at = self._cut_window(view, at, cut, name, ended=window.ended)
                if followed is not None:
                    followed.resume(window.taken - len(view) + at)
            yield cut
            size = _WINDOW_BYTES if at else 2 * size

    def _cut_window(
        self,
        view: memoryview,
        at: int,
        cut: Cut,
        name: Callable[[memoryview], RecordId],
        *,
        ended: bool,
    ) -> int:
        """Adds the final parts from `at` on; returns where they end."""
        settled = len(view) if ended else min(len(view) - self._chunker.lookahead_bytes, len(view) - 1)
        for part in self._chunker.cut(view[at:]):
            after = at + abs(part)
            if after > settled:
                break
            if part > 0:
                piece = view[at:after]
                cut.pieces.append(piece)
                cut.ids.append(ChunkId(name(piece)))
            cut.parts.append(part)
            at = after
        return at

    def _patched(self, content: Content, segment: int) -> Cut | None:
        """A segment of which only the changed ranges are read; None if it has to be read whole."""
        parent, changes = content.parent, content.changes
        start = segment * self._segment_bytes
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
        if parent is None or changes is None or segment >= segments_of(parent) or segment in content.lacking:
            return None
        if segment_length(parent.size_bytes, self._segment_bytes, segment) != length:
            return None
        try:
            old = self._trees.leaf(self._trees.leaf_id(parent, segment), length)
        except IntegrityError:
            return None
        old_ids = iter(old.ids)
        ids_by_part = [next(old_ids) if part > 0 else None for part in old.lengths]
        reader = PatchReader(content.source, DiskReader(self._records, self._trees, parent), start)
        ranges = changes.within(start, start + length)
        name = self._keys.namer(Kind.CHUNK)
        cut = Cut([], [], [], 0, sum(end - first for first, end in ranges))
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

    def _segment(self, task: _Task, *, again: bool = False) -> None:
        content, segment = task
        if self._far and content.changes is None and content.scanner is None and not self._lost:
            self._whole_segment(task, again=again)
            return
        if content.scanner is not None:
            self._scanned_segment(task, content.scanner, again=again)
            return
        parent = self._parent_leaf(content, segment)
        storing = Storing(self._acceptor, self._sealer, parent, lambda: self._segment(task, again=True))
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
        taken = self._read(content, segment, length, parent, storing, again=again)
        self._settle(task, taken, storing, again=again)

    def _settle(self, task: _Task, taken: Taken, storing: Storing, *, again: bool) -> None:
        """Stores the leaf of a segment, and what has not been stored of it yet."""
        task.content.leaves[task.segment] = taken.leaf  # first: doing the segment again may replace it
        if taken.plaintext:
            storing.finish(taken.leaf, taken.plaintext)
        elif storing.needs_close:
            storing.close((taken.leaf,) if taken.leaf != HOLE_ID else ())
        self._count(taken, storing.new_chunks, storing.new_bytes, again=again)

    def _count(self, taken: Taken, new_chunks: int, new_bytes: int, *, again: bool) -> None:
        with self._lock:
            counters = self.counters
            if not again:
                counters.bytes_done += taken.done
                counters.chunks_reused += taken.chunks - new_chunks
            counters.bytes_read += taken.read
            counters.bytes_new += new_bytes
            counters.chunks_new += new_chunks

    def _whole_segment(self, task: _Task, *, again: bool) -> None:
        """Takes a segment in with as few questions as can be: none if it equals the parent's, else one.

        It is cut and named as a whole before the repository is asked, and compared with the parent's by the id of the
        leaf alone, which an inner node of the tree tells for 256 segments at once.
        """
        content, segment = task
        storing = Storing(self._acceptor, self._sealer, None, lambda: self._segment(task, again=True))
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
        buffer = new_buffer(length) if again else self._buffers.view(length)
        window = Window(content.source, segment * self._segment_bytes, buffer)
        window.more(0, length)
        cut = Cut([], [], [], window.read, length)
        self._cut_window(window.bytes(), 0, cut, self._keys.namer(Kind.CHUNK), ended=True)
        leaf, plaintext = name_leaf(self._keys, cut.parts, cut.ids, None)
        content.leaves[segment] = leaf
        if leaf not in (HOLE_ID, self._parent_id(content, segment)):
            storing.add_whole(cut.ids, cut.pieces, leaf, plaintext)
        taken = Taken(leaf, plaintext, len(cut.ids), cut.read, length)
        self._count(taken, storing.new_chunks, storing.new_bytes, again=again)

    def _parent_id(self, content: Content, segment: int) -> NodeId | None:
        """The parent's leaf of a segment of the same length; None if there is none, or it can not be told."""
        parent = content.parent
        if parent is None or segment >= segments_of(parent):
            return None
        lengths = (
            segment_length(size, self._segment_bytes, segment)
            for size in (parent.size_bytes, content.source.size_bytes)
        )
        try:
            return self._trees.leaf_id(parent, segment) if len(set(lengths)) == 1 else None
        except IntegrityError:
            return None  # build upon nothing rather than fail

    def _read(
        self,
        content: Content,
        segment: int,
        length: int,
        parent: ParentLeaf | None,
        storing: Storing,
        *,
        again: bool,
    ) -> Taken:
        """Takes a segment in that is read here."""
        parts: list[int] = []
        ids: list[ChunkId] = []
        reading_s, read, done = 0.0, 0, 0
        began = clock = time.monotonic()
        patched = self._patched(content, segment) if content.changes else None
        # Done again amid another segment's work, whose pieces are in this thread's buffer.
        buffer = new_buffer(length) if again else self._buffers.view(length)
        for cut in [patched] if patched else self._cuts(content, segment, parent, buffer):
            reading_s += time.monotonic() - clock
            parts += cut.parts
            ids += cut.ids
            read += cut.read
            done += cut.done
            storing.add(cut.ids, cut.pieces)
            clock = time.monotonic()
        if self._governor is not None:
            self._governor.note(reading_s, time.monotonic() - began - reading_s)
            self._sealer.level = self._governor.level
        leaf, plaintext = name_leaf(self._keys, parts, ids, parent)
        return Taken(leaf, plaintext, len(ids), read, done)

    def _scanned_segment(self, task: _Task, scanner: SegmentScanner, *, again: bool) -> None:
        """Takes a segment in that somebody else reads, where it lies. One that is the parent's is not asked about."""
        content, segment = task
        assert self._cutting is not None
        assert content.expected is not None
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
        scanned = scanner.scan(segment * self._segment_bytes, length, self._cutting, content.expected.digest)
        known = content.expected.of(segment)
        if known is not None and scanned.digest == known.digest:
            content.leaves[segment] = known.leaf
            self._count(Taken(known.leaf, b"", scanned.chunks, scanned.data_bytes, length), 0, 0, again=again)
            return
        parent = self._parent_leaf(content, segment)
        storing = Storing(self._acceptor, self._sealer, parent, lambda: self._segment(task, again=True))
        taken = take_scanned(scanned, length, parent, storing, self._keys, self._aliases, self._sound_leaf)
        self._settle(task, taken, storing, again=again)

    def _parent_leaf(self, content: Content, segment: int) -> ParentLeaf | None:
        """What the parent has in the place of a segment; None if that is nothing, or can not be read."""
        parent = content.parent
        if parent is None or segment >= segments_of(parent):
            return None
        length = segment_length(parent.size_bytes, self._segment_bytes, segment)
        try:
            leaf = self._trees.leaf_id(parent, segment)
        except IntegrityError:
            return None  # build upon nothing rather than fail
        if leaf == HOLE_ID:
            return None
        found = self._sound_leaf(leaf, length)
        return None if found is None else ParentLeaf(leaf, found)

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
        roots = tuple(node for node, _ in nodes)
        self._acceptor.append(Segment(records, relied, roots, lambda: self._store_nodes(nodes)), generation)
