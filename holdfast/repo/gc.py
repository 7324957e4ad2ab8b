"""Garbage collection: mark, sweep, reclaim (docs/ARCHITECTURE.md). Nothing waits for it and it waits for nobody.

Begin: one transaction begins a new epoch and takes forgotten points that nobody holds out of the list. What is
added or relied on from then on is of the new epoch.
Mark: every node of what sessions have stored, and then of every listed point, puts the ids below it into a
`LiveSet`. In this order, since a session that ends meanwhile ends in the transaction that lists its point.
Sweep: the index is read in key order; what is not marked and of an older epoch is dropped in small transactions,
each of which looks at the epoch again. A backup that comes to rely on a record in the meantime renews its epoch;
one that comes too late finds the record gone when it commits, and stores it anew.
Reclaim: packs without a live record are unlinked; of others, dead runs are given back to the file system, and
those with few live records are written anew.

Invariants: a record is dropped only if no listed point and no living session needs it; a pack's bytes are given
back only after the index has let go of all records in them; whatever is interrupted is found and done again.
A node that can not be read ends the collection before anything is dropped: nobody knows what is below it.

Memory: `LiveSet` (2 bytes per record), 16 bytes per node, one pack's table.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

import numpy as np

from holdfast.errors import (
    DamagedData,
    DamagedPoint,
    DiskFull,
    HoldfastError,
    InternalError,
    StorageError,
)
from holdfast.ids import ID_BYTES, NodeId, PackId, PointId, RecordId
from holdfast.repo.check import contents_of
from holdfast.repo.codec import Opener, Sealed, strong_hash
from holdfast.repo.format.record import (
    RECORD_HEADER_BYTES,
    Kind,
    TableEntry,
    decode_record_header,
)
from holdfast.repo.format.rows import PLACE_BYTES, PackRow, PackState, PointRow
from holdfast.repo.idset import IdSet
from holdfast.repo.index import Index
from holdfast.repo.liveset import LiveSet
from holdfast.repo.packs import PackStore, PackWriter
from holdfast.repo.points import open_point
from holdfast.repo.records import PackScanner, RecordReader
from holdfast.repo.recover import read_table
from holdfast.repo.session import Session
from holdfast.repo.walk import walk_nodes
from holdfast.units import GIB, KIB, MIB

__all__ = ["CollectOptions", "CollectReport", "Collector"]

_SCAN_ROWS: Final = 100_000
_SWEEP_IDS: Final = 4096
_ROOTS: Final = 4096
_LEAST_HOLE_BYTES: Final = 64 * KIB
_LEAST_DEAD_BYTES: Final = MIB
_LEAST_DEAD_SHARE: Final = 1 / 32
"""Looking at a pack costs a lookup for each of its records, so a little dead space is left until it is more,
unless room is scarce."""
_COPY_BYTES: Final = 8 * MIB
_SPARE_BYTES: Final = 64 * MIB
_PLENTY_BYTES: Final = 4 * GIB


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How to collect.

    Args:
        dry_run: find out what would be freed; change nothing.
        max_seconds: stop after about this time; what is left is done next time. None for no limit.
        compact_below: packs whose share of live bytes is lower are written anew.
        on_progress: called with a word for the phase, and how much of it is done of how much.
    """

    dry_run: bool = False
    max_seconds: float | None = None
    compact_below: float = 0.5
    on_progress: Callable[[str, int, int], None] = lambda _phase, _done, _total: None


@dataclass(slots=True)
class CollectReport:
    """What a collection has done, or would do.

    Args:
        points: forgotten restore points that can not be brought back any more.
        records: dropped from the index.
        dropped_bytes: their stored bytes.
        freed_bytes: given back to the file system (with `dry_run`: what would be).
        dead_bytes: of packs, that are dead and still occupy space.
        complete: False if the time was over before everything had been done.
    """

    points: int = 0
    nodes: int = 0
    records: int = 0
    dropped_bytes: int = 0
    freed_bytes: int = 0
    dead_bytes: int = 0
    packs_removed: int = 0
    packs_compacted: int = 0
    packs_holed: int = 0
    complete: bool = True
    duration_s: float = 0.0
    notes: list[str] = field(default_factory=list)


class _TimeIsUp(Exception):
    pass


class Collector:
    """One collection.

    Args:
        session: not begun; it writes what is compacted, and keeps others from collecting at the same time.
        mark_collected: makes it known in the packs that points were collected.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        packs: PackStore,
        index: Index,
        records: RecordReader,
        opener: Opener,
        session: Session,
        mark_collected: Callable[[Sequence[PointId]], None],
        options: CollectOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._packs = packs
        self._index = index
        self._records = records
        self._opener = opener
        self._session = session
        self._mark_collected = mark_collected
        self._options = options
        self._clock = clock
        self._deadline = None if options.max_seconds is None else clock() + options.max_seconds
        self.report = CollectReport()

    def run(self) -> CollectReport:
        """Collects.

        Raises:
            DamagedPoint: a node of a listed point can not be read; nothing was dropped.
            StorageError, DamagedIndex: what had been done until then stands.
        """
        began = self._clock()
        try:
            self._run()
        except _TimeIsUp:
            self.report.complete = False
        self.report.dead_bytes = sum(row.dead_bytes for row in self._index.packs())
        self.report.duration_s = self._clock() - began
        return self.report

    def _run(self) -> None:
        if self._options.dry_run:
            self._foresee()
            return
        collection = self._index.begin_collection()
        self.report.points = len(collection.removed)
        if collection.removed:
            # A rebuilt index would list them again, hidden, though what they need is gone. They were forgotten, so
            # at least they stay hidden if there is no room for this.
            try:
                self._mark_collected(collection.removed)
            except DiskFull as error:
                self.report.notes.append(f"collected points could not be noted in the packs: {error.message}")
        live = self._mark(self._index.points)
        for doomed in self._unmarked(live, collection.epoch):
            for first in range(0, len(doomed), _SWEEP_IDS):
                self._check_time()
                swept = self._index.sweep(doomed[first : first + _SWEEP_IDS], collection.epoch)
                self.report.records += swept.records
                self.report.dropped_bytes += swept.bytes
        self._drop_aliases(live)
        del live
        self._reclaim()

    def _foresee(self) -> None:
        """What a collection would do now."""
        held = {point for session in self._index.sessions() for point in session.holds}
        listed = self._index.points()
        kept = [row for row in listed if not row.hidden or row.id in held]
        self.report.points = len(listed) - len(kept)
        live = self._mark(lambda: kept)
        dead = {row.number: row.dead_bytes for row in self._index.packs()}
        for doomed in self._unmarked(live, 2**32):
            for place in self._index.lookup(doomed):
                if place is not None:
                    size = RECORD_HEADER_BYTES + place.stored_bytes
                    dead[place.pack] = dead.get(place.pack, 0) + size
                    self.report.records += 1
                    self.report.dropped_bytes += size
        self.report.freed_bytes = sum(dead.values())

    def _check_time(self) -> None:
        if self._deadline is not None and self._clock() > self._deadline:
            raise _TimeIsUp

    # --- mark

    def _mark(self, list_points: Callable[[], Sequence[PointRow]]) -> LiveSet:
        live = LiveSet(self._index.figures().records)
        seen = IdSet()
        for session in self._index.sessions():
            roots = iter(self._index.roots(session.id))
            while some := list(islice(roots, _ROOTS)):
                seen = self._mark_roots(live, seen, some)
        points = list_points()
        for done, row in enumerate(points):
            self._options.on_progress("mark", done, len(points))
            live.add(row.id)
            try:
                manifest = open_point(row, self._opener).manifest
                self._mark_below(live, seen, [content.root for _, content in contents_of(manifest)])
            except DamagedData as error:
                raise DamagedPoint(
                    f"restore point {row.id.hex()[:12]} is damaged, so nobody knows what it needs ({error.message}); "
                    "nothing was removed",
                    hint="run 'holdfast check --repair', or forget the damaged restore point",
                ) from error
        self._options.on_progress("mark", len(points), len(points))
        return live

    def _mark_roots(self, live: LiveSet, seen: IdSet, roots: list[NodeId]) -> IdSet:
        """Marks what is below roots of sessions; returns the nodes that need not be read again.

        What is below one that can not be read is lost with it; the session's successor will store it anew.
        """
        with contextlib.suppress(DamagedData):
            self._mark_below(live, seen, roots)
            return seen
        for root in roots:
            with contextlib.suppress(DamagedData):
                self._mark_below(live, IdSet(), [root])
        return IdSet()  # the other one names nodes that were not read

    def _mark_below(self, live: LiveSet, seen: IdSet, roots: list[NodeId]) -> None:
        gathered: list[bytes] = []
        size = 0
        for node in walk_nodes(self._records, roots, seen):
            self.report.nodes += 1
            gathered += (node.id, node.ids)
            size += len(node.ids)
            if size > 2 * MIB:
                self._check_time()
                live.add(b"".join(gathered))
                gathered, size = [], 0
        live.add(b"".join(gathered))

    # --- sweep

    def _unmarked(self, live: LiveSet, before: int) -> Iterator[list[RecordId]]:
        """Pages of ids that nothing needs and that were not touched since the epoch began."""
        total = self._index.figures().records
        after: RecordId | None = None
        done = 0
        while True:
            self._check_time()
            keys, values = self._index.scan_rows(after, _SCAN_ROWS)
            if not keys:
                return
            rows = np.frombuffer(values, np.uint8).reshape(-1, PLACE_BYTES)
            epochs = rows[:, 16:20].copy().view("<u4").ravel()
            doomed = live.lacks(keys) & (epochs < before) & (rows[:, 20] != Kind.MARK)
            yield [
                RecordId(keys[at * ID_BYTES : (at + 1) * ID_BYTES]) for at in np.flatnonzero(doomed).tolist()
            ]
            after = RecordId(keys[-ID_BYTES:])
            done += len(rows)
            self._options.on_progress("sweep", done, total)

    def _drop_aliases(self, live: LiveSet) -> None:
        """Lets go of the names of records that are no more."""
        after = b""
        while page := self._index.scan_aliases(after, _SCAN_ROWS):
            self._check_time()
            after = page[-1][0]
            # A name that is a record's id itself is that of a leaf, and stands for a digest.
            records = [RecordId(name) if len(name) == ID_BYTES else record for name, record in page]
            lacking = live.lacks(b"".join(records))
            asked = np.flatnonzero(lacking).tolist()  # new records are not marked
            places = self._index.lookup([records[at] for at in asked])
            gone = [page[at][0] for at, place in zip(asked, places, strict=True) if place is None]
            for first in range(0, len(gone), _SWEEP_IDS):
                self._index.drop_aliases(gone[first : first + _SWEEP_IDS])

    # --- reclaim

    def _reclaim(self) -> None:
        """The order works on a full disk: unlink first, then give back, and copy only what there is room for."""
        self._remove_dead()
        rows = [row for row in self._index.packs() if row.records and row.dead_bytes]
        sparse = sorted(
            (row for row in rows if self._share(row) < self._options.compact_below), key=self._share
        )
        chosen: set[int] = set()
        if sparse:
            room = self._packs.free_bytes() - _SPARE_BYTES
            for row in sparse:
                if row.live_bytes > room:
                    continue
                room -= row.live_bytes
                chosen.add(row.number)
        share = _LEAST_DEAD_SHARE if self._packs.free_bytes() > _PLENTY_BYTES else 0.0
        for row in rows:
            if row.number not in chosen and row.dead_bytes >= max(_LEAST_DEAD_BYTES, share * row.live_bytes):
                self._check_time()
                self._give_back(row)
        try:
            for done, row in enumerate(row for row in sparse if row.number in chosen):
                self._check_time()
                self._options.on_progress("compact", done, len(chosen))
                self._compact(row)
            self._session.flush()
        except DiskFull as error:
            self.report.notes.append(f"packs could not be written anew: {error.message}")
            for row in rows:
                if row.number in chosen and row.dead_bytes >= _LEAST_DEAD_BYTES:
                    self._check_time()
                    self._give_back(row)
        finally:
            with contextlib.suppress(StorageError):
                self._remove_dead()

    @staticmethod
    def _share(row: PackRow) -> float:
        return row.live_bytes / max(1, row.live_bytes + row.dead_bytes)

    def _remove_dead(self) -> None:
        rows = [row for row in self._index.packs() if not row.records]
        for done, row in enumerate(rows):
            self._check_time()
            self._options.on_progress("remove", done, len(rows))
            writer = self._packs.adopt(row.id)
            if writer is None and self._packs.length(row.id) is not None:
                continue  # somebody appends to it
            try:
                # Held meanwhile, so that nobody takes the file for one that the index has yet to learn of.
                freed = self._packs.allocated_bytes(row.id)
                if self._index.remove_pack(row.number):
                    self._packs.delete(row.id)
                    self.report.packs_removed += 1
                    self.report.freed_bytes += freed
            finally:
                if writer is not None:
                    writer.close()

    def _entries(self, row: PackRow) -> list[TableEntry] | None:
        """The records of a pack by offset; None if that is not known for certain."""
        if row.state is PackState.SEALED:
            try:
                sealed = read_table(self._packs, row.id, row.committed_bytes)
            except HoldfastError:
                return None
            return sealed[0] if sealed is not None else None
        scanner = PackScanner(self._packs, row.id, row.committed_bytes, payloads=False)
        return [
            TableEntry.of(r.header, r.offset) for r in scanner.records() if r.header.kind is not Kind.TABLE
        ]

    def _live(self, row: PackRow, entries: list[TableEntry]) -> list[bool]:
        """For each entry whether the index points to it."""
        alive: list[bool] = []
        for first in range(0, len(entries), _SWEEP_IDS):
            part = entries[first : first + _SWEEP_IDS]
            alive += [
                place is not None and (place.pack, place.offset) == (row.number, entry.offset)
                for entry, place in zip(part, self._index.lookup([e.id for e in part]), strict=True)
            ]
        return alive

    @contextlib.contextmanager
    def _held(self, row: PackRow) -> Iterator[tuple[PackWriter, PackRow] | None]:
        """Holds a pack, so that nobody appends to it meanwhile; with it goes its row as it is then.

        None if somebody else holds it, if it is gone, or if its adoption is not done yet: what is behind the committed
        length would be cut off.
        """
        writer = self._packs.adopt(row.id)
        if writer is None:
            yield None
            return
        try:
            now = next((now for now in self._index.packs() if now.number == row.number), None)
            if now is not None and now.state is PackState.OPEN and now.counted_bytes > now.committed_bytes:
                now = None
            yield None if now is None else (writer, now)
        finally:
            writer.close()

    def _compact(self, row: PackRow) -> None:
        """Writes the live records of a pack anew; the old pack has none when that has been committed."""
        with self._held(row) as held:
            if held is not None:
                self._copy_live(held[1])

    def _copy_live(self, row: PackRow) -> None:
        entries = self._entries(row)
        if entries is None:
            return  # damaged: left as it is, for 'check'
        batch: list[Sealed] = []
        old: dict[RecordId, tuple[int, int]] = {}
        size = 0
        for entry, alive in zip(entries, self._live(row, entries), strict=True):
            if not alive:
                continue
            try:
                sealed = self._sealed(row.id, entry)
            except DamagedData as error:
                self.report.notes.append(f"pack {row.id.hex()} was not compacted: {error.message}")
                return
            batch.append(sealed)
            old[entry.id] = row.number, entry.offset
            size += entry.stored_bytes
            if size >= _COPY_BYTES:
                self._session.rewrite(batch, old)
                batch, old, size = [], {}, 0
        if batch:
            self._session.rewrite(batch, old)
        self.report.packs_compacted += 1

    def _sealed(self, pack_id: PackId, entry: TableEntry) -> Sealed:
        data = self._packs.read(pack_id, entry.offset, RECORD_HEADER_BYTES + entry.stored_bytes)
        header = decode_record_header(data, pack_id)
        payload = data[RECORD_HEADER_BYTES:]
        if header.id != entry.id or strong_hash(payload) != header.strong_hash:
            raise DamagedData(f"record {entry.id.hex()[:16]} is damaged")
        return Sealed(header, payload)

    def _give_back(self, row: PackRow) -> None:
        """Punches holes where the dead records of a pack are. Nobody appends to it any more.

        A table would name records that are not there any more, so the table goes first: whoever reads the pack
        without an index then looks at each record. The index knows of it before anything happens.
        """
        if not self._packs.can_punch():
            return
        with self._held(row) as held:
            if held is not None:
                self._punch(*held)

    def _punch(self, writer: PackWriter, row: PackRow) -> None:
        entries = self._entries(row)
        if entries is None:
            return
        runs, gone_records, gone_bytes = _dead_runs(entries, self._live(row, entries))
        if sum(end - start for start, end in runs) < _LEAST_DEAD_BYTES:
            return
        end = row.committed_bytes
        if row.state is PackState.SEALED:
            sealed = read_table(self._packs, row.id, row.committed_bytes)
            if sealed is None:
                raise InternalError("a sealed pack has lost its table")
            end = sealed[1]
        if row.state is not PackState.HOLED:
            self._index.update_pack(
                row.number, lambda now: replace(now, state=PackState.HOLED, committed_bytes=end)
            )
        if writer.length > end:  # also if a collection was interrupted here
            writer.cut(end)
            writer.sync()
        before = self._packs.allocated_bytes(row.id)
        self._packs.punch(row.id, runs)
        self._index.update_pack(
            row.number,
            lambda now: replace(
                now,
                dead_records=max(0, now.dead_records - gone_records),
                dead_bytes=max(0, now.dead_bytes - gone_bytes),
            ),
        )
        self.report.packs_holed += 1
        self.report.freed_bytes += max(0, before - self._packs.allocated_bytes(row.id))


def _dead_runs(
    entries: Sequence[TableEntry], alive: Sequence[bool]
) -> tuple[list[tuple[int, int]], int, int]:
    """The ranges (start, end) that hold nothing alive; the number of records in them, and their bytes."""
    runs: list[tuple[int, int]] = []
    records = 0
    at = 0
    while at < len(entries):
        if alive[at]:
            at += 1
            continue
        first = at
        while at < len(entries) and not alive[at]:
            at += 1
        start = entries[first].offset
        end = entries[at - 1].offset + RECORD_HEADER_BYTES + entries[at - 1].stored_bytes
        if end - start >= _LEAST_HOLE_BYTES and end - start == _total(entries[first:at]):
            runs.append((start, end))
            records += at - first
    return runs, records, sum(end - start for start, end in runs)


def _total(entries: Sequence[TableEntry]) -> int:
    return sum(RECORD_HEADER_BYTES + entry.stored_bytes for entry in entries)
