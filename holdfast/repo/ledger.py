"""What is known of when each pack was verified last, and how: the ledger of verification.

It is a time and a kind in each pack's row of the index (FORMAT.md, "Index"). A check writes them as soon as it
is done with a pack; so does a restore that happens to have read and proven everything that is alive in one. A
pack that grows, or in which damage is found, counts as never verified.

`Reading` decides which packs a check reads: those never verified first, then the oldest, until its budget is used
up. `ReadTally` gathers what a restore has read. `verified_at` turns the ledger from packs to restore points.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from holdfast.errors import IntegrityError, StorageError
from holdfast.ids import HOLE_ID, NodeId, PointId, RecordId
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import FANOUT
from holdfast.repo.format.rows import PackRow, VerifiedBy
from holdfast.repo.index import Index
from holdfast.repo.points import Point
from holdfast.repo.tree import TreeReader, segment_length

__all__ = ["Budget", "ReadTally", "Reading", "forget_verification", "note_verified", "verified_at"]

_MOST_RANGES: Final = 500_000
_NODE_KEY: Final = 16


def note_verified(index: Index, row: PackRow, by: VerifiedBy, when: int) -> None:
    """Records that a pack was verified, unless it has changed since `row` was read.

    Where that can not be written (a full disk, a read-only place), it is not: it is only a note.
    """

    def noted(now: PackRow) -> PackRow:
        return replace(now, verified=when, verified_by=by) if _same(now, row) else now

    with contextlib.suppress(StorageError):
        index.update_pack(row.number, noted)


def forget_verification(index: Index, row: PackRow) -> None:
    """Records that damage was found in a pack: it counts as never verified."""
    if row.verified:
        with contextlib.suppress(StorageError):
            index.update_pack(
                row.number, lambda now: replace(now, verified=0, verified_by=VerifiedBy.NOTHING)
            )


def _same(one: PackRow, other: PackRow) -> bool:
    """Whether two rows speak of the same bytes of a pack, and of the same records among them."""
    return replace(one, verified=0, verified_by=VerifiedBy.NOTHING) == replace(
        other, verified=0, verified_by=VerifiedBy.NOTHING
    )


# --- which packs a check reads


@dataclass(frozen=True, slots=True)
class Budget:
    """What a check may cost.

    Args:
        max_seconds: no pack is begun after that; one that was begun is finished.
        max_bytes: no more bytes of packs are read, but one pack always is, so that each check gets on.
        older_than_s: packs that were verified within that time are not read.
    """

    max_seconds: float | None = None
    max_bytes: int | None = None
    older_than_s: float | None = None


class Reading:
    """Which packs a check reads: never verified ones first, then the oldest, in the order of their numbers.

    `take` may be called from several threads.

    Args:
        now: Unix seconds.
        clock: monotonic seconds; the budget of time runs from now on.
    """

    def __init__(
        self,
        rows: Sequence[PackRow],
        budget: Budget,
        now: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limit = sys.maxsize if budget.older_than_s is None else now - budget.older_than_s
        self.due = sorted(
            (row for row in rows if row.verified <= limit), key=lambda row: (row.verified, row.number)
        )
        self._budget = budget
        self._clock = clock
        self._deadline = None if budget.max_seconds is None else clock() + budget.max_seconds
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self.taken_bytes = 0
        self.ended_by = ""

    def take(self, row: PackRow) -> bool:
        """Whether this pack is to be read now; then it has been counted."""
        with self._lock:
            if not self.ended_by:
                most = self._budget.max_bytes
                if self.time_is_up:
                    self.ended_by = "time"
                elif most is not None and self._taken and self.taken_bytes + row.committed_bytes > most:
                    self.ended_by = "bytes"
            if self.ended_by:
                return False
            self._taken.add(row.number)
            self.taken_bytes += row.committed_bytes
            return True

    @property
    def time_is_up(self) -> bool:
        """Whether the budget of time is used up."""
        return self._deadline is not None and self._clock() >= self._deadline

    @property
    def total_bytes(self) -> int:
        """What will be read if nothing ends it but its limits."""
        total = sum(row.committed_bytes for row in self.due)
        return total if self._budget.max_bytes is None else min(total, self._budget.max_bytes)

    @property
    def left(self) -> list[PackRow]:
        """The packs that are due and were not taken."""
        return [row for row in self.due if row.number not in self._taken]


# --- what else verifies


class _Ranges:
    """Disjoint ranges of bytes, merged where they touch."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.bytes = 0

    def add(self, start: int, end: int, *, room: bool) -> int:
        """Adds a range; returns by how many the ranges have become more.

        Args:
            room: whether they may become more; otherwise what does not touch another range is passed over.
        """
        first = bisect_left(self.ends, start)
        last = first
        low, high = start, end
        while last < len(self.starts) and self.starts[last] <= end:
            low, high = min(low, self.starts[last]), max(high, self.ends[last])
            self.bytes -= self.ends[last] - self.starts[last]
            last += 1
        if first == last and not room:
            return 0
        self.starts[first:last] = [low]
        self.ends[first:last] = [high]
        self.bytes += high - low
        return 1 - (last - first)


class ReadTally:
    """What of each pack was read and proven by one restore (a mount, a replication). Thread-safe.

    A restore reads packs mostly from front to back, so what it has read of each is a few ranges.
    Memory: at most half a million ranges; beyond that, what touches no other range is not counted.

    Args:
        rows: the packs as they are before the first read.
    """

    def __init__(self, rows: Sequence[PackRow]) -> None:
        self._rows = {row.number: row for row in rows}
        self._read: dict[int, _Ranges] = {}
        self._count = 0
        self._lock = threading.Lock()

    def read(self, pack: int, records: Sequence[tuple[int, int]]) -> None:
        """See `ReadNotes`."""
        with self._lock:
            ranges = self._read.get(pack)
            if ranges is None:
                ranges = self._read[pack] = _Ranges()
            start = end = -1
            for offset, size in records:
                if offset != end:
                    if end > start:
                        self._count += ranges.add(start, end, room=self._count < _MOST_RANGES)
                    start = offset
                end = offset + size
            if end > start:
                self._count += ranges.add(start, end, room=self._count < _MOST_RANGES)

    def settle(self, index: Index, when: int) -> int:
        """Notes those packs as verified of which everything alive was read; returns how many these are."""
        with self._lock:
            whole = [
                row
                for number, ranges in self._read.items()
                if (row := self._rows.get(number)) is not None and ranges.bytes == row.live_bytes
            ]
        for row in whole:
            note_verified(index, row, VerifiedBy.READING, when)
        return len(whole)


# --- from packs to restore points


def verified_at(trees: TreeReader, index: Index, points: Sequence[Point]) -> dict[PointId, int]:
    """For each point the Unix time of the oldest verification among the packs that it needs; 0 if one never was.

    Cost: reads each node that the points do not share once, and looks its chunks up; a point is given up at the
    first pack that was never verified. Memory: about 100 bytes for each node that was read.
    """
    return _Verifications(trees, index).of(points)


class _Verifications:
    def __init__(self, trees: TreeReader, index: Index) -> None:
        self._trees = trees
        self._index = index
        self._packs = {row.number: row.verified for row in index.packs()}
        self._known: dict[bytes, int] = {}

    def of(self, points: Sequence[Point]) -> dict[PointId, int]:
        found: dict[PointId, int] = {}
        for point in points:
            try:
                found[point.id] = self._of_point(point)
            except IntegrityError:
                found[point.id] = 0
        return found

    def _of_point(self, point: Point) -> int:
        oldest = self._of_records([RecordId(point.id)])
        manifest = point.manifest
        for tree in [disk.tree for disk in manifest.disks] + [file.tree for file in manifest.files]:
            if oldest and tree.size_bytes:
                oldest = min(oldest, self._of_node(tree, tree.root, self._trees.height(tree), 0))
        return oldest

    def _of_records(self, ids: Sequence[RecordId]) -> int:
        return min(
            self._packs.get(place.pack, 0) if place is not None else 0 for place in self._index.lookup(ids)
        )

    def _of_node(self, tree: ContentTree, node: NodeId, level: int, first: int) -> int:
        if node == HOLE_ID:
            return sys.maxsize
        oldest = self._known.get(node[:_NODE_KEY])
        if oldest is not None:
            return oldest
        if level:
            oldest = self._of_records([node])
            step = FANOUT ** (level - 1)
            for number, child in enumerate(self._trees.children(tree, node, level, first)):
                if oldest:
                    oldest = min(oldest, self._of_node(tree, child, level - 1, first + number * step))
        else:
            leaf = self._trees.leaf(node, segment_length(tree.size_bytes, tree.segment_bytes, first))
            oldest = self._of_records([node, *leaf.ids])
        self._known[node[:_NODE_KEY]] = oldest
        return oldest
