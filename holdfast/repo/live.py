"""The restore points of a repository as they are at this moment, for a process that stays (a mount).

    live = repository.live("mount", cache_bytes=256 << 20)
    for point in live.points(): ...
    reader = live.open(point, point.manifest.disks[0].tree)

It follows the index without asking much of it: as long as nothing was committed, a look costs one number, and after
that only manifests of new points are decoded. No transaction is held between calls. All readers share one cache, and
what was read counts as verified (see `repo.ledger`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from holdfast.errors import HoldfastError, UnsupportedFormat
from holdfast.ids import NodeId, PointId, RecordId
from holdfast.repo.codec import Opener
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.record import Kind
from holdfast.repo.format.rows import PointRow
from holdfast.repo.holds import Holds
from holdfast.repo.index import Index
from holdfast.repo.ledger import ReadTally
from holdfast.repo.points import Point, open_point, points_of_vm
from holdfast.repo.readcache import ReadCache
from holdfast.repo.reader import DiskReader
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader, segment_length

if TYPE_CHECKING:
    from holdfast.repo.packs import PackStore

__all__ = ["LivePoints"]

_LOOK_S: Final = 0.5
_TALLY_S: Final = 24 * 3600
_KNOWN_NODES: Final = 100_000
_EXACT_LEAVES: Final = 1024
"""Up to so many leaves are read to say how much of a content is no hole; of larger ones whole segments are counted."""


class LivePoints:
    """See the module. Thread-safe.

    Args:
        vm: only points of this VM, by name or UUID.
        cache_bytes: for decoded chunks.
        clock: Unix seconds.
        monotonic: seconds that never go back.
        notify: receives sentences that the user should see.
    """

    def __init__(
        self,
        packs: PackStore,
        index: Index,
        opener: Opener,
        kind: str,
        cache_bytes: int,
        vm: str | None,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        notify: Callable[[str], None],
        *,
        writable: bool,
    ) -> None:
        self._index = index
        self._opener = opener
        self._clock = clock
        self._monotonic = monotonic
        self._notify = notify
        self._writable = writable
        packs_now = index.packs()
        self.stored_bytes = sum(row.committed_bytes for row in packs_now)
        self._tally = ReadTally(packs_now)
        self._tally_since = int(clock())
        self._records = RecordReader(packs, index, opener, self)
        self._trees = TreeReader(self._records)
        self._cache = ReadCache(self._records, self._trees, cache_bytes)
        self._holds = Holds(index, kind, clock, monotonic, notify, protect=writable)
        self._lock = threading.Lock()
        self._seen: int | None = None
        self._looked_s = -_LOOK_S
        self._first = (
            index.changes(),
            index.points(),
        )  # what is damaged shows at once; the rest is decoded later
        self._by_id: dict[PointId, Point | None] = {}
        self._points: tuple[Point, ...] = ()
        self._allocated: OrderedDict[bytes, int] = OrderedDict()
        self._read: set[PointId] = set()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._vm_uuid = ""
        if vm is not None:
            self._vm_uuid = points_of_vm(self.points(), vm)[0].manifest.vm_uuid
            self._seen = None

    def start(self) -> None:
        """Starts the threads that renew holds. They do not survive a fork."""
        for body in (lambda: self._holds.work(self._over), self._settle_daily):
            thread = threading.Thread(target=body, name="holdfast-live", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Ends the holds, and notes what was verified by reading."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._holds.close()
        self._settle()

    # --- points

    def points(self) -> tuple[Point, ...]:
        """The points that are listed now, or were half a second ago; the same object as long as nothing has changed.

        Raises:
            DamagedIndex: the index does not hold what it should.
        """
        with self._lock:
            now_s = self._monotonic()
            if now_s - self._looked_s >= _LOOK_S or self._seen is None:
                changes = self._index.changes()
                if changes != self._seen:
                    at, rows = self._first
                    self._follow(rows if at == changes and rows else self._index.points())
                    self._first = at, []
                    self._seen = changes
                self._looked_s = now_s
            return self._points

    def _follow(self, rows: list[PointRow]) -> None:
        shown = {row.id: row for row in rows if not row.hidden}
        if shown.keys() == self._by_id.keys() and self._seen is not None:
            return
        for gone in self._by_id.keys() - shown.keys():
            del self._by_id[gone]
        for point_id in shown.keys() - self._by_id.keys():
            try:
                self._by_id[point_id] = open_point(shown[point_id], self._opener)
            except UnsupportedFormat as error:
                self._by_id[point_id] = None
                self._notify(f"restore point {point_id.hex()[:12]} is left out: {error.message}")
        found = [point for point in self._by_id.values() if point is not None]
        if self._vm_uuid:
            found = [point for point in found if point.manifest.vm_uuid == self._vm_uuid]
        self._points = tuple(sorted(found, key=lambda p: (p.manifest.time, p.manifest.received_ms, p.id)))

    def hold(self, point: Point) -> None:
        """Keeps a point from being collected until `release`.

        Raises:
            PointNotFound: it is forgotten.
        """
        self._holds.take(point.id)
        with self._lock:
            self._read.add(point.id)

    def release(self, point: Point) -> None:
        """Ends one `hold`."""
        self._holds.release(point.id)

    # --- contents

    def open(self, tree: ContentTree) -> DiskReader:
        """A content as a file; all readers share the cache."""
        return DiskReader(self._records, self._trees, tree, self._cache)

    def allocated_bytes(self, tree: ContentTree) -> int:
        """How much of a content is no hole; of large ones, in whole segments.

        Cost: the inner nodes, and up to a thousand leaves, that were not met before.

        Raises:
            DamagedData: a node is missing or damaged.
        """
        if not tree.size_bytes:
            return 0
        with self._lock:
            known = self._allocated.get(_known_as(tree.root, tree.size_bytes))
        if known is not None:
            return known
        data = list(self._trees.data_leaves(tree))
        lengths = [segment_length(tree.size_bytes, tree.segment_bytes, segment) for segment, _ in data]
        total = (
            sum(self._leaves_bytes([leaf for _, leaf in data], lengths))
            if len(data) <= _EXACT_LEAVES
            else sum(lengths)
        )
        self._remember(tree.root, tree.size_bytes, total)
        return total

    def _leaves_bytes(self, leaves: list[NodeId], lengths: list[int]) -> list[int]:
        with self._lock:
            known = [self._allocated.get(_known_as(*leaf)) for leaf in zip(leaves, lengths, strict=True)]
        found = []
        for leaf, length, remembered in zip(leaves, lengths, known, strict=True):
            size = self._cache.leaf(leaf, length).data_bytes if remembered is None else remembered
            if remembered is None:
                self._remember(leaf, length, size)
            found.append(size)
        return found

    def _remember(self, node: NodeId, length: int, size: int) -> None:
        with self._lock:
            self._allocated[_known_as(node, length)] = size
            while len(self._allocated) > _KNOWN_NODES:
                self._allocated.popitem(last=False)

    # --- the ledger of verification

    def read(self, pack: int, records: Sequence[tuple[int, int]]) -> None:
        """See `ReadNotes`."""
        self._tally.read(pack, records)

    def _settle_daily(self) -> None:
        while not self._over.wait(_TALLY_S):
            self._settle()

    def _settle(self) -> None:
        """Notes packs as verified; as of when the first of what was read may have been read."""
        if self._writable:
            with self._lock:
                read, self._read = self._read, set()
            for point in read:  # nothing of it is needed, but the pack that it is in may count, too
                with contextlib.suppress(HoldfastError):
                    self._records.load_one(RecordId(point), Kind.MANIFEST)
            with contextlib.suppress(HoldfastError):
                fresh = ReadTally(self._index.packs())
                settled, self._tally = self._tally, fresh
                since, self._tally_since = self._tally_since, int(self._clock())
                settled.settle(self._index, since)


def _known_as(node: NodeId, length: int) -> bytes:
    return node[:16] + length.to_bytes(8, "little")
