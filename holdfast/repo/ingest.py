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
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from holdfast.chunker import Chunker
from holdfast.chunker.fixed import is_zero
from holdfast.chunker.splice import KeptPart, NewPart, splice
from holdfast.disk import BlockSource, ChangeMap
from holdfast.errors import IntegrityError
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.buffers import SegmentBuffers, new_buffer
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
_WINDOW_BYTES: Final = 2 * MIB
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
        lacking: segments of which the parent lacks something: with `changes` they are read whole.
    """

    source: BlockSource
    parent: ContentTree | None
    changes: ChangeMap | None
    leaves: LeafTable | dict[int, NodeId]
    lacking: frozenset[int] = frozenset()


class _Task(NamedTuple):
    content: Content
    segment: int


class _Cut(NamedTuple):
    """A part of a segment that has been read and cut; its pieces are valid until the next one is asked for.

    Args:
        ids: of the chunks among the parts, in order.
        pieces: the bytes of each of them; None for one that is the parent's and was not read.
        read: bytes that were read for it.
        done: bytes that this takes the backup forward.
    """

    parts: list[int]
    ids: list[ChunkId]
    pieces: list[memoryview | None]
    read: int
    done: int


class _ParentLeaf(NamedTuple):
    """The parent's leaf of one segment, with its id."""

    id: NodeId
    leaf: Leaf


class _Window:
    """The bytes of a segment, some of them at a time, in a buffer that is used over and over.

    Args:
        start: of the segment, in bytes.
        buffer: as long as the segment.
    """

    def __init__(self, source: BlockSource, start: int, buffer: memoryview) -> None:
        self._source = source
        self._start = start
        self._buffer = buffer
        self._extents = list(source.data_extents(start, start + len(buffer)))
        self._have = 0
        self.taken = 0
        self.read = 0

    @property
    def ended(self) -> bool:
        """Whether all of the segment has been taken."""
        return self.taken == len(self._buffer)

    def bytes(self) -> memoryview:
        """What is at hand."""
        return self._buffer[: self._have]

    def more(self, drop: int, size: int) -> None:
        """Lets go of the first `drop` bytes at hand, and reads up to `size` more behind the others."""
        kept = self._have - drop
        if drop and kept:
            self._buffer[:kept] = self._buffer[drop : self._have]
        size = min(size, len(self._buffer) - self.taken)
        self._have = kept + size
        self._fill(self._start + self.taken - kept, kept)
        self.taken += size

    def _fill(self, base: int, at: int) -> None:
        """Reads what the bytes from `at` on stand for; what lies outside of the extents is zeros.

        Args:
            base: what the front of the buffer stands for, in bytes from the start of the source.
        """
        end = self._have
        for offset, size in self._extents:
            low, high = max(offset - base, at), min(offset - base + size, end)
            if low >= high:
                continue
            if low > at:
                _zero(self._buffer[at:low])
            self._source.read_into(base + low, self._buffer[low:high])
            self.read += high - low
            at = high
        if at < end:
            _zero(self._buffer[at:end])


class _Followed:
    """The parts of the parent's leaf, as long as the source proves equal to them."""

    def __init__(self, leaf: Leaf, name: Callable[[memoryview], RecordId]) -> None:
        self._parts = leaf.lengths
        self._ids = leaf.ids
        self._name = name
        self._part = self._id = 0  # what has been given
        self._proven = 0  # parts after those that are known to be equal
        self._cuts: dict[int, tuple[int, int]] = {}
        self.goes_on = True

    def resume(self, offset: int) -> None:
        """Tries the parts again from `offset` bytes of the segment on, if one of them begins there."""
        if not self._cuts:
            begin = number = 0
            for part, length in enumerate(self._parts):
                self._cuts[begin] = part, number
                begin += abs(length)
                number += length > 0
        if offset in self._cuts:
            self._part, self._id = self._cuts[offset]
            self._proven = 0
            self.goes_on = True

    def follow(self, view: memoryview, cut: _Cut, lookahead: int, *, ended: bool) -> int:
        """Adds the parts that are proven and final; returns where they end in `view`.

        Args:
            view: begins where the parts that were given end.
        """
        at, part, number = 0, self._part, self._id
        while part < len(self._parts):
            length = self._parts[part]
            after = at + abs(length)
            if after > len(view):
                self.goes_on = not ended
                break
            if part >= self._part + self._proven and not self._is_equal(view[at:after], length, number):
                self.goes_on = False
                break
            number += length > 0
            at, part = after, part + 1
        else:
            self.goes_on = False
        settled = at if ended and at == len(view) else min(at - lookahead, at - 1)
        given = 0
        while self._part < part and given + abs(self._parts[self._part]) <= settled:
            length = self._parts[self._part]
            cut.parts.append(length)
            if length > 0:
                cut.ids.append(self._ids[self._id])
                cut.pieces.append(None)
                self._id += 1
            given += abs(length)
            self._part += 1
        self._proven = part - self._part
        return given

    def _is_equal(self, piece: memoryview, length: int, number: int) -> bool:
        if length > 0:
            return self._name(piece) == self._ids[number]
        return is_zero(piece)


class _Storing:
    """One segment on its way into the repository.

    Args:
        parent: what the parent has in its place. The session holds it, so nobody asks the index for its chunks.
        redo: does the segment again; see `Segment`.
    """

    def __init__(
        self,
        acceptor: RecordAcceptor,
        sealer: Sealer,
        parent: _ParentLeaf | None,
        redo: Callable[[], None],
    ) -> None:
        self._acceptor = acceptor
        self._sealer = sealer
        self._held: AbstractSet[RecordId] = frozenset(parent.leaf.ids) if parent is not None else frozenset()
        self._redo = redo
        self._relied: set[RecordId] = set()
        self._sealed: set[RecordId] = set()
        self._staged: list[Sealed] = []
        self._staged_bytes = 0
        self._generation = 0
        self.new_bytes = 0
        self.new_chunks = 0

    def _unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        if not self._staged:
            self._generation = self._acceptor.generation()
        self._relied.update(ids)
        return self._acceptor.unknown(ids)

    def add(self, ids: Sequence[ChunkId], pieces: Sequence[memoryview | None]) -> None:
        """Stores those chunks that the repository does not have.

        Args:
            pieces: None for what was taken over from the parent unread.
        """
        held = self._held
        fresh = {
            chunk: piece
            for chunk, piece in zip(ids, pieces, strict=True)
            if piece is not None and chunk not in held and chunk not in self._sealed
        }
        if not fresh:
            return
        unknown = self._unknown(list(fresh))
        for chunk, piece in fresh.items():
            if chunk not in unknown or piece is None:
                continue
            sealed = self._sealer.seal(Kind.CHUNK, chunk, piece)
            self.new_chunks += 1
            self._sealed.add(chunk)
            self._staged.append(sealed)
            self._staged_bytes += len(sealed.payload)
            if self._staged_bytes >= _STAGE_BYTES:
                # While it is in the processor's cache. Should a commit come before the leaf, the leaf relies
                # on these chunks like on any others.
                self._append(frozenset(), ())

    def finish(self, leaf: NodeId, plaintext: bytes) -> None:
        """Stores the leaf, and what has not been stored yet."""
        if leaf in self._unknown([leaf]):
            self._staged.append(self._sealer.seal(Kind.NODE, leaf, plaintext))
        self._append(frozenset(self._relied) - {sealed.header.id for sealed in self._staged}, (leaf,))

    def _append(self, relied: frozenset[RecordId], roots: tuple[NodeId, ...]) -> None:
        segment = Segment(self._staged, relied, roots, self._redo)
        self._staged, self._staged_bytes = [], 0
        self.new_bytes += self._acceptor.append(segment, self._generation)


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
        lost: records that were dropped as damaged and are not stored, whatever the parent says.
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
        workers: int | None,
        spread: int = 0,
        governor: LevelGovernor | None = None,
        lost: frozenset[RecordId] = frozenset(),
        on_progress: Callable[[IngestCounters], None] = lambda _counters: None,
    ) -> None:
        self._lost = lost
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
                segment too, but its last one is read whole. Where the parent's tree is damaged, everything is read.
        """
        segments = segment_count(source.size_bytes, self._segment_bytes)
        if changes is not None and parent is not None:
            with contextlib.suppress(IntegrityError):
                return self._mapped_content(source, parent, changes, segments)
        return Content(source, parent, None, LeafTable(segments))

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
        self, content: Content, segment: int, parent: _ParentLeaf | None, buffer: memoryview
    ) -> Iterator[_Cut]:
        """Reads a segment, cuts it and names its chunks, some of it at a time.

        As long as the parent's parts prove equal they are followed, without looking for cuts: equal bytes have
        equal cuts. Where they do not, the rest of the window is cut, and if that ends on a cut of the parent's,
        its parts are tried again from there. A cut is final once the chunker's lookahead behind it is known too;
        what comes after the last final cut is looked at again together with the next bytes.
        """
        window = _Window(content.source, segment * self._segment_bytes, buffer)
        name = self._keys.namer(Kind.CHUNK)
        followed = _Followed(parent.leaf, name) if parent is not None else None
        at, size = 0, _WINDOW_BYTES
        while not window.ended:
            read_before, taken_before = window.read, window.taken
            window.more(at, size)
            view = window.bytes()
            cut = _Cut([], [], [], window.read - read_before, window.taken - taken_before)
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
        cut: _Cut,
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

    def _patched(self, content: Content, segment: int) -> _Cut | None:
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
        reader = _PatchReader(content.source, DiskReader(self._records, self._trees, parent), start)
        ranges = changes.within(start, start + length)
        name = self._keys.namer(Kind.CHUNK)
        cut = _Cut([], [], [], 0, sum(end - first for first, end in ranges))
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
        parent = self._parent_leaf(content, segment)
        storing = _Storing(self._acceptor, self._sealer, parent, lambda: self._segment(task, again=True))
        parts: list[int] = []
        ids: list[ChunkId] = []
        reading_s, read, done = 0.0, 0, 0
        began = clock = time.monotonic()
        patched = self._patched(content, segment) if content.changes else None
        length = segment_length(content.source.size_bytes, self._segment_bytes, segment)
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
        leaf, plaintext = HOLE_ID, b""
        if parent is not None and (tuple(parts), tuple(ids)) == (parent.leaf.lengths, parent.leaf.ids):
            leaf = parent.id
        elif ids:
            plaintext = encode_leaf(Leaf(tuple(parts), tuple(ids)))
            leaf = NodeId(self._keys.record_id(Kind.NODE, plaintext))
        content.leaves[segment] = leaf  # before it is stored: doing the segment again may replace it
        if plaintext:
            storing.finish(leaf, plaintext)
        if self._governor is not None:
            self._governor.note(reading_s, time.monotonic() - began - reading_s)
            self._sealer.level = self._governor.level
        with self._lock:
            counters = self.counters
            if not again:
                counters.bytes_done += done
            counters.bytes_read += read
            counters.bytes_new += storing.new_bytes
            counters.chunks_new += storing.new_chunks
            counters.chunks_reused += 0 if again else len(ids) - storing.new_chunks

    def _parent_leaf(self, content: Content, segment: int) -> _ParentLeaf | None:
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
        return None if found is None else _ParentLeaf(leaf, found)

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


def _zero(view: memoryview) -> None:
    """Fills a view with zeros, without making as many first."""
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
