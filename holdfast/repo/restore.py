"""From disk trees to sinks: read packs in order, decompress on all cores, verify every chunk, write.

Holes are never written; nothing is written that has not been proven against its id.
A segment is put together in memory and written in as few pieces as its holes allow.
Segments are written by a thread of their own: the disk is busy while the next ones are put together.
What can not be read ends the restore, or, if that is wanted, stays a hole and is listed.
Memory: one segment for each worker, and two that wait to be written.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from holdfast.disk import BlockSink
from holdfast.errors import DamagedData, StorageError
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.buffers import new_buffer
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import FANOUT, Leaf
from holdfast.repo.format.record import Kind
from holdfast.repo.parallel import run_parallel, usable_cores
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader, require_length, segment_length

__all__ = ["LostRange", "RestoreCounters", "restore_contents"]

_AHEAD: Final = 2
_UNREADABLE: Final = (DamagedData, StorageError)
"""What reading the repository may fail with. Sinks are written elsewhere: their errors are never met here."""


@dataclass(frozen=True, slots=True, order=True)
class LostRange:
    """A part of a content that could not be read, and was left a hole.

    Args:
        content: number of the content, in the order in which they were given.
    """

    content: int
    offset: int
    length: int
    reason: str


@dataclass(slots=True)
class RestoreCounters:
    """What has been done so far.

    Args:
        bytes_total: virtual size of all contents.
        bytes_done: of which this much is known to be in place, holes included.
        bytes_written: to the sinks.
        lost: what could not be read, in order; neighbours with the same reason are one.
    """

    bytes_total: int = 0
    bytes_done: int = 0
    bytes_written: int = 0
    began: float = field(default_factory=time.monotonic)
    lost: list[LostRange] = field(default_factory=list)


class _Task(NamedTuple):
    content: int
    tree: ContentTree
    sink: BlockSink
    segment: int
    leaf: NodeId


def restore_contents(
    records: RecordReader,
    trees: TreeReader,
    contents: Sequence[tuple[ContentTree, BlockSink]],
    workers: int | None,
    on_progress: Callable[[RestoreCounters], None] = lambda _counters: None,
    *,
    allow_damaged: bool = False,
) -> RestoreCounters:
    """Writes all contents into their sinks; finishing or aborting the sinks is left to the caller.

    Args:
        allow_damaged: leave what can not be read as holes.

    Raises:
        DamagedData: a record is missing or damaged, and that is not allowed.
        StorageError: a sink can not be written.
    """
    counters = RestoreCounters(bytes_total=sum(tree.size_bytes for tree, _ in contents))
    lock = threading.Lock()

    def tasks() -> Iterator[_Task]:
        for number, (tree, sink) in enumerate(contents):
            following = 0
            leaves = _readable_leaves(trees, number, tree, lost) if allow_damaged else trees.data_leaves(tree)
            for segment, leaf in leaves:
                with lock:
                    counters.bytes_done += (segment - following) * tree.segment_bytes
                following = segment + 1
                yield _Task(number, tree, sink, segment, leaf)
            with lock:
                counters.bytes_done += max(0, tree.size_bytes - following * tree.segment_bytes)

    def lost(content: int, offset: int, length: int, reason: str) -> None:
        with lock:
            counters.lost.append(LostRange(content, offset, length, reason))

    def written(length: int, runs: Sequence[tuple[int, int]]) -> None:
        with lock:
            counters.bytes_done += length
            counters.bytes_written += sum(end - start for start, end in runs)

    longest = max((min(tree.segment_bytes, tree.size_bytes) for tree, _ in contents), default=1)
    threads = workers or usable_cores() + 1
    with _Writing(threads + _AHEAD, longest, written) as writing:

        def work(task: _Task) -> None:
            tree = task.tree
            length = segment_length(tree.size_bytes, tree.segment_bytes, task.segment)
            start = task.segment * tree.segment_bytes
            try:
                leaf = trees.leaf(task.leaf, length)
            except _UNREADABLE as error:
                if not allow_damaged:
                    raise
                lost(task.content, start, length, error.message)
                leaf = Leaf((-length,), ())
            buffer = writing.take_buffer()
            try:
                try:
                    runs = _put_together(records, leaf, buffer)
                except _UNREADABLE:
                    if not allow_damaged:
                        raise
                    runs = _put_together_anyway(
                        records,
                        leaf,
                        buffer,
                        lambda at, size, reason: lost(task.content, start + at, size, reason),
                    )
            except BaseException:
                writing.give_back(buffer)
                raise
            writing.write(_Written(task.sink, start, length, runs, buffer))

        run_parallel(tasks(), work, workers, lambda: on_progress(counters))
    counters.lost = _merged(counters.lost)
    on_progress(counters)
    return counters


def _merged(ranges: Sequence[LostRange]) -> list[LostRange]:
    """The ranges in order, neighbours with the same reason as one."""
    merged: list[LostRange] = []
    for found in sorted(ranges):
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.content, last.reason) == (found.content, found.reason)
            and last.offset + last.length == found.offset
        ):
            merged[-1] = LostRange(last.content, last.offset, last.length + found.length, last.reason)
        else:
            merged.append(found)
    return merged


def _readable_leaves(
    trees: TreeReader, content: int, tree: ContentTree, lost: Callable[[int, int, int, str], None]
) -> Iterator[tuple[int, NodeId]]:
    """As `TreeReader.data_leaves`; subtrees that can not be read are passed over, and told to `lost`."""

    def below(node: NodeId, level: int, first: int) -> Iterator[tuple[int, NodeId]]:
        if node == HOLE_ID:
            return
        if not level:
            yield first, node
            return
        try:
            children = trees.children(tree, node, level, first)
        except _UNREADABLE as error:
            start = first * tree.segment_bytes
            end = min(start + FANOUT**level * tree.segment_bytes, tree.size_bytes)
            lost(content, start, end - start, error.message)
            return
        step = FANOUT ** (level - 1)
        for number, child in enumerate(children):
            yield from below(child, level - 1, first + number * step)

    if not tree.size_bytes:
        return
    try:
        height = trees.height(tree)
    except DamagedData as error:
        lost(content, 0, tree.size_bytes, error.message)
        return
    yield from below(tree.root, height, 0)


def _put_together(records: RecordReader, leaf: Leaf, buffer: memoryview) -> list[tuple[int, int]]:
    """Fills a buffer with a segment's chunks; returns the runs (start, end) between its holes."""
    places = _places(leaf)
    targets = {RecordId(chunk): buffer[at : at + size] for chunk, ((at, size), *_) in places.items()}
    records.load_into(targets, Kind.CHUNK)
    for (first, size), *others in places.values():
        for start, other_size in others:
            require_length(size, other_size)
            buffer[start : start + size] = buffer[first : first + size]
    return _runs(places)


def _put_together_anyway(
    records: RecordReader, leaf: Leaf, buffer: memoryview, lost: Callable[[int, int, str], None]
) -> list[tuple[int, int]]:
    """As `_put_together`, but chunk by chunk; those that can not be read are in no run, and told to `lost`."""
    intact: dict[ChunkId, list[tuple[int, int]]] = {}
    for chunk, places in _places(leaf).items():
        for start, size in places:
            try:
                records.load_into({RecordId(chunk): buffer[start : start + size]}, Kind.CHUNK)
            except _UNREADABLE as error:
                lost(start, size, error.message)
            else:
                intact.setdefault(chunk, []).append((start, size))
    return _runs(intact)


def _places(leaf: Leaf) -> dict[ChunkId, list[tuple[int, int]]]:
    """For each chunk of a leaf (start, length) of each place in the segment."""
    places: dict[ChunkId, list[tuple[int, int]]] = {}
    at = 0
    ids = iter(leaf.ids)
    for part in leaf.lengths:
        if part > 0:
            places.setdefault(next(ids), []).append((at, part))
        at += abs(part)
    return places


def _runs(places: dict[ChunkId, list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The runs (start, end) that these places make up, in order."""
    runs: list[tuple[int, int]] = []
    for start, size in sorted(place for found in places.values() for place in found):
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], start + size
        else:
            runs.append((start, start + size))
    return runs


class _Written(NamedTuple):
    """A segment that is ready to be written.

    Args:
        start: of the segment in the sink, in bytes.
        runs: (start, end) in `buffer` of what is no hole.
    """

    sink: BlockSink
    start: int
    length: int
    runs: list[tuple[int, int]]
    buffer: memoryview


class _Writing:
    """A thread that writes segments while others are put together, and the buffers that go round.

    Leaving the context waits until everything is written.

    Args:
        buffers: how many; they are made when they are needed.
        written: called with a segment's length and runs once it is in its sink.

    Raises:
        StorageError: from `take_buffer`, or when the context is left: a sink could not be written.
    """

    def __init__(
        self, buffers: int, buffer_bytes: int, written: Callable[[int, Sequence[tuple[int, int]]], None]
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._written = written
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put(None)
        self._ready: queue.SimpleQueue[_Written | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="holdfast-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        self._ready.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def take_buffer(self) -> memoryview:
        """A buffer that nobody else uses; its content is of the past."""
        buffer = self._free.get()
        if self._failure is not None:
            self._free.put(buffer)
            raise self._failure
        return new_buffer(self._buffer_bytes) if buffer is None else buffer

    def give_back(self, buffer: memoryview) -> None:
        """Returns a buffer that was not used."""
        self._free.put(buffer)

    def write(self, segment: _Written) -> None:
        """Leaves a segment to the thread."""
        self._ready.put(segment)

    def _work(self) -> None:
        while (segment := self._ready.get()) is not None:
            if self._failure is None:
                try:
                    for start, end in segment.runs:
                        segment.sink.write(segment.start + start, segment.buffer[start:end])
                    self._written(segment.length, segment.runs)
                except BaseException as error:  # noqa: BLE001 - raised again by whoever comes next
                    self._failure = error
            self._free.put(segment.buffer)
