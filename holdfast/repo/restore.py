"""From disk trees to sinks: read packs in order, decompress on all cores, verify every chunk, write.

Holes are never written; nothing is written that has not been proven against its id.
A segment is put together in memory and written in as few pieces as its holes allow.
Memory: one segment for each worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.disk import BlockSink
from holdfast.ids import ChunkId, NodeId
from holdfast.repo.buffers import SegmentBuffers
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.record import Kind
from holdfast.repo.parallel import run_parallel
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader, segment_length

__all__ = ["RestoreCounters", "restore_contents"]


@dataclass(slots=True)
class RestoreCounters:
    """What has been done so far.

    Args:
        bytes_total: virtual size of all contents.
        bytes_done: of which this much is known to be in place, holes included.
        bytes_written: to the sinks.
    """

    bytes_total: int = 0
    bytes_done: int = 0
    bytes_written: int = 0
    began: float = field(default_factory=time.monotonic)


class _Task(NamedTuple):
    tree: ContentTree
    sink: BlockSink
    segment: int
    leaf: NodeId


def restore_contents(
    records: RecordReader,
    trees: TreeReader,
    contents: Sequence[tuple[ContentTree, BlockSink]],
    workers: int,
    on_progress: Callable[[RestoreCounters], None] = lambda _counters: None,
) -> RestoreCounters:
    """Writes all contents into their sinks; finishing or aborting the sinks is left to the caller.

    Raises:
        DamagedData: a record is missing or damaged.
        StorageError: a sink can not be written.
    """
    counters = RestoreCounters(bytes_total=sum(tree.size_bytes for tree, _ in contents))
    lock = threading.Lock()

    def tasks() -> Iterator[_Task]:
        for tree, sink in contents:
            following = 0
            for segment, leaf in trees.data_leaves(tree):
                with lock:
                    counters.bytes_done += (segment - following) * tree.segment_bytes
                following = segment + 1
                yield _Task(tree, sink, segment, leaf)
            with lock:
                counters.bytes_done += max(0, tree.size_bytes - following * tree.segment_bytes)

    buffers = SegmentBuffers(max((tree.segment_bytes for tree, _ in contents), default=1))

    def work(task: _Task) -> None:
        tree = task.tree
        length = segment_length(tree.size_bytes, tree.segment_bytes, task.segment)
        leaf = trees.leaf(task.leaf, length)
        places: dict[ChunkId, list[tuple[int, int]]] = {}
        runs: list[tuple[int, int]] = []
        at = 0
        ids = iter(leaf.ids)
        for part in leaf.lengths:
            if part > 0:
                places.setdefault(next(ids), []).append((at, part))
                start = runs.pop()[0] if runs and runs[-1][1] == at else at
                runs.append((start, at + part))
            at += abs(part)
        view = buffers.view(length)
        for chunk, data in records.each(leaf.ids, Kind.CHUNK):
            for start, size in places[ChunkId(chunk)]:
                trees.require_length(data, size)
                view[start : start + size] = data
        base = task.segment * tree.segment_bytes
        for start, end in runs:
            task.sink.write(base + start, view[start:end])
        with lock:
            counters.bytes_done += length
            counters.bytes_written += sum(end - start for start, end in runs)

    run_parallel(tasks(), work, workers, lambda: on_progress(counters))
    on_progress(counters)
    return counters
