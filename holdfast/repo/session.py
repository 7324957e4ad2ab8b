"""A backup's session: the one road by which records enter a repository (FORMAT.md, "Write order").

`append` takes the records of one finished segment. They go into the session's own pack at once; every
now and then all that has gathered is committed: the pack is synced, then one index transaction makes the
batch visible. One batch is committed while the next one gathers.

Invariants:
- A leaf becomes a root of the session in the transaction that commits its chunks, never before; an inner node in
  the one that commits it. So a collection that begins between two batches finds all that was committed before.
- What a batch does not store itself it relies on, even what the batch before it has just stored: a collection may
  begin between the two.
- The transaction verifies that every record the batch relies on still exists. If one is gone (collected
  meanwhile), the segments that relied on it are done again, and store it again.
- The manifest is written when everything it needs has been committed.
- A failed sync is final: the session refuses to go on, since the kernel may have dropped the pages.

Memory: the ids of the records of at most two batches.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import blake3

from holdfast.errors import HoldfastError, InternalError
from holdfast.ids import NodeId, PackId, PointId, RecordId
from holdfast.repo.codec import Sealed, Sealer, strong_hash
from holdfast.repo.format.record import (
    MAX_TABLE_ENTRIES,
    PACK_HEADER_BYTES,
    Codec,
    Kind,
    PackFooter,
    PackHeader,
    RecordHeader,
    TableEntry,
    encode_pack_footer,
    encode_pack_header,
    encode_record_header,
    encode_table,
)
from holdfast.repo.format.rows import PackState, PointRow, SessionRow
from holdfast.repo.index import Batch, Committed, Index, NewRecord, PackProgress, PointChange
from holdfast.repo.lease import Lease
from holdfast.repo.packs import PackStore, PackWriter
from holdfast.repo.records import records_of
from holdfast.repo.recover import Home, adopt_pack
from holdfast.units import MIB

__all__ = ["Segment", "Session"]

_BATCH_BYTES: Final = 96 * MIB
_BATCH_AGE_S: Final = 2.0
_MOST_ADOPTIONS: Final = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """What a finished piece of work adds.

    Args:
        records: that the index did not know.
        relied: ids that it did know.
        roots: nodes that become roots of the session: the leaf, or inner nodes.
        redo: does the work again, from the source, and appends its outcome anew.
        aliases: names of records among those that it stores or relies on; see `Batch`.
    """

    records: Sequence[Sealed]
    relied: frozenset[RecordId]
    roots: tuple[NodeId, ...]
    redo: Callable[[], None]
    aliases: Mapping[bytes, RecordId] = field(default_factory=dict)


@dataclass(slots=True)
class _OpenPack:
    """The pack that is being appended to.

    Args:
        entries: of the records that this session appended.
        from_offset: where they begin: what lies before was there when the pack was adopted.
    """

    writer: PackWriter
    created: int
    from_offset: int
    entries: list[TableEntry]
    earlier: int


@dataclass(slots=True)
class _Gathering:
    """A batch that is not committed yet."""

    began: float
    bytes: int = 0
    records: list[NewRecord] = field(default_factory=list)
    ids: set[RecordId] = field(default_factory=set)
    segments: list[Segment] = field(default_factory=list)
    replacing: dict[RecordId, tuple[int, int]] = field(default_factory=dict)
    changes: list[PointChange] = field(default_factory=list)
    sealed: list[_OpenPack] = field(default_factory=list)


class Session:
    """See the module. `unknown`, `append` and `flush` may be called from several threads.

    Args:
        row: recorded in the index by `begin`.
        pack_bytes: a pack that reaches this size is sealed.
        home: for the adoption of packs.
        clock: Unix seconds.
    """

    def __init__(
        self,
        packs: PackStore,
        index: Index,
        sealer: Sealer,
        pack_bytes: int,
        row: SessionRow,
        home: Home,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._packs = packs
        self._index = index
        self._sealer = sealer
        self._pack_bytes = pack_bytes
        self._home = home
        self._clock = clock
        self.row = row
        self._lock = threading.Lock()  # guards the pack and the gathering batch
        self._commit_lock = threading.Lock()  # held by whoever commits
        self._gathering = _Gathering(time.monotonic())
        self._committing: set[RecordId] = set()
        self._generation = 0
        self._pack: _OpenPack | None = None
        self._failure: BaseException | None = None
        self._lease = Lease(index, row, clock, self._lost)
        self.stored_bytes = 0
        self.duplicate_bytes = 0

    # --- life

    def begin(self) -> int:
        """Records the session, and keeps it alive from now on.

        Returns:
            How many other sessions of its kind there were.

        Raises:
            PointNotFound: a point that it should hold is gone.
        """
        return self._lease.begin()

    def _lost(self, error: HoldfastError) -> None:
        self._failure = self._failure or error

    def close(self, *, keep: bool) -> None:
        """Ends the session's work; a pack that is not full stays open for the next writer.

        Args:
            keep: commit what was appended, and leave the session in the index, so that what it has stored
                stays alive until its successor has found it (an interrupted backup).
        """
        try:
            if keep and self._failure is None:
                self.flush()
            if keep:
                self._lease.stop()
            else:
                self._lease.end()
        finally:
            self._lease.stop()
            for pack in self._gathering.sealed:
                pack.writer.close()
            if self._pack is not None:
                self._pack.writer.close()
                self._pack = None

    # --- adding records

    def generation(self) -> int:
        """Grows with each commit; see `append`."""
        return self._generation

    def unknown(self, ids: Iterable[RecordId]) -> set[RecordId]:
        """Those of the ids that neither the index nor this session has."""
        with self._lock:
            gathering, committing = self._gathering.ids, self._committing
            rest = [i for i in dict.fromkeys(ids) if i not in gathering and i not in committing]
        if not rest:
            return set()
        return {i for i, place in zip(rest, self._index.lookup(rest), strict=True) if place is None}

    def append(self, segment: Segment, generation: int) -> int:
        """Adds a finished segment.

        Args:
            generation: as it was before the segment's ids were looked up.

        Returns:
            Plaintext bytes of the records that were really new (others may have stored some meanwhile).

        Raises:
            StorageError: nothing was added.
        """
        self._raise_failure()
        records, relied = segment.records, segment.relied
        if generation != self._generation and records:
            missing = self.unknown([sealed.header.id for sealed in records])
            relied |= {sealed.header.id for sealed in records} - missing
            records = [sealed for sealed in records if sealed.header.id in missing]
        new_bytes = 0
        with self._lock:
            batch = self._gathering
            known = batch.ids
            fresh = []
            for sealed in records:
                record_id = sealed.header.id
                if record_id in self._committing:
                    relied |= {record_id}
                elif record_id not in known:
                    known.add(record_id)
                    fresh.append(sealed)
                    new_bytes += sealed.header.plain_bytes if sealed.header.kind is Kind.CHUNK else 0
            try:
                self._write(fresh)
            except BaseException as error:
                known.difference_update(sealed.header.id for sealed in fresh)
                self._failure = self._failure or error
                raise
            batch.segments.append(replace(segment, records=(), relied=relied - known))
            due = batch.bytes >= _BATCH_BYTES or time.monotonic() - batch.began >= _BATCH_AGE_S
        if due and (batch.bytes >= 2 * _BATCH_BYTES or not self._commit_lock.locked()):
            self._commit()
        return new_bytes

    def rewrite(self, records: Sequence[Sealed], replacing: Mapping[RecordId, tuple[int, int]]) -> None:
        """Appends records that take the place of others in the index when they are committed.

        Args:
            replacing: of each record where it is now (number of the pack, offset); if it has been moved or
                dropped by then, it stays so.

        Raises:
            StorageError: as `append`.
        """
        self._raise_failure()
        with self._lock:
            try:
                self._write(records)
            except BaseException as error:
                self._failure = self._failure or error
                raise
            self._gathering.replacing.update(replacing)
            due = self._gathering.bytes >= _BATCH_BYTES
        if due:
            self._commit()

    def _write(self, records: Sequence[Sealed]) -> None:
        """Appends to the pack. Called with the lock held."""
        batch = self._gathering
        first = 0
        while first < len(records):
            pack = self._pack_for_writing()
            room = max(1, self._pack_bytes - pack.writer.length)
            last, size = first, 0
            most = MAX_TABLE_ENTRIES - pack.earlier - len(pack.entries)
            while last < len(records) and size < room and last - first < most:
                size += records[last].header.total_bytes
                last += 1
            parts: list[bytes | bytearray | memoryview] = []
            pack_id = pack.writer.id
            for sealed in records[first:last]:
                parts.append(encode_record_header(sealed.header, pack_id))
                parts.append(sealed.payload)
            offset = pack.writer.append(parts)
            for sealed in records[first:last]:
                header = sealed.header
                kind = int(header.kind)
                batch.records.append(
                    NewRecord(header.id, pack_id, offset, header.stored_bytes, header.plain_bytes, kind)
                )
                pack.entries.append(TableEntry.of(header, offset))
                offset += header.total_bytes
            batch.bytes += size
            self.stored_bytes += size
            first = last
            if (
                pack.writer.length >= self._pack_bytes
                or pack.earlier + len(pack.entries) >= MAX_TABLE_ENTRIES
            ):
                self._seal(pack)

    # --- packs

    def _pack_for_writing(self) -> _OpenPack:
        if self._pack is None:
            self._pack = self._adopted_pack() or self._new_pack()
        return self._pack

    def _new_pack(self) -> _OpenPack:
        now_s = self._clock()
        pack_id = PackId(os.urandom(16))
        writer = self._packs.create(pack_id)
        try:
            writer.append([encode_pack_header(PackHeader(pack_id, self._home.repository, int(now_s * 1000)))])
        except BaseException:
            writer.close()
            raise
        return _OpenPack(writer, int(now_s), PACK_HEADER_BYTES, [], 0)

    def _adopted_pack(self) -> _OpenPack | None:
        """A pack that an earlier session left open, with room in it."""
        tries = 0
        for row in self._index.packs():
            whole = row.committed_bytes == row.counted_bytes
            if row.state is not PackState.OPEN or not whole or tries >= _MOST_ADOPTIONS:
                continue  # a pack that holds more than its records was damaged once: leave it alone
            tries += 1
            writer = adopt_pack(self._packs, self._index, row.id, self._home, int(self._clock()))
            if writer is None:
                continue
            now = next(now for now in self._index.packs() if now.id == row.id)  # with its adopted tail
            pack = _OpenPack(writer, row.created, writer.length, [], now.records + now.dead_records)
            if writer.length < self._pack_bytes and pack.earlier < MAX_TABLE_ENTRIES:
                return pack
            self._seal(pack)
        return None

    def _seal(self, pack: _OpenPack) -> None:
        """Leaves a full pack to the next commit, which ends it. Called with the lock held."""
        self._gathering.sealed.append(pack)
        self._pack = None

    def _end_pack(self, pack: _OpenPack) -> None:
        """Appends table and footer.

        Durability: all of the pack is on disk on return. Its records were before its footer was written, so
        that a footer proves them: a table need not be doubted after a crash.
        """
        pack.writer.sync()
        entries = pack.entries
        if pack.from_offset > PACK_HEADER_BYTES:
            entries = [*records_of(self._packs, pack.writer.id, pack.from_offset), *entries]
        plaintext = encode_table(entries)
        table_id = RecordId(blake3.blake3(plaintext).digest())
        header = RecordHeader(
            Kind.TABLE, Codec.RAW, 0, len(plaintext), len(plaintext), table_id, strong_hash(plaintext)
        )
        offset = pack.writer.length
        footer = PackFooter(offset, len(entries))
        pack.writer.append(
            [
                encode_record_header(header, pack.writer.id),
                plaintext,
                encode_pack_footer(footer, pack.writer.id),
            ]
        )
        pack.writer.sync()

    # --- committing

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Commits everything that was appended before the call.

        A commit may find that segments have to be done again; those are committed too.
        """
        while True:
            self._commit()
            with self._lock:
                if not self._gathering.records and not self._gathering.segments:
                    return

    def _commit(self, point: PointRow | None = None) -> None:
        with self._commit_lock:
            self._raise_failure()
            try:
                redo = self._commit_gathered(point)
            except BaseException as error:
                self._failure = self._failure or error
                raise
        for segment in redo:
            segment.redo()

    def _commit_gathered(self, point: PointRow | None) -> list[Segment]:
        with self._lock:
            batch, self._gathering = self._gathering, _Gathering(time.monotonic())
            self._committing = batch.ids
            open_pack = self._pack
            open_bytes = open_pack.writer.length if open_pack is not None else 0
        try:
            if not (batch.records or batch.segments or batch.sealed or batch.changes) and point is None:
                return []
            for pack in batch.sealed:
                self._end_pack(pack)
            progress = [
                PackProgress(pack.writer.id, pack.writer.length, PackState.SEALED, pack.created)
                for pack in batch.sealed
            ]
            if open_pack is not None:
                if batch.records:
                    open_pack.writer.sync()
                progress.append(
                    PackProgress(open_pack.writer.id, open_bytes, PackState.OPEN, open_pack.created)
                )
            return self._commit_batch(batch, progress, point)
        finally:
            with self._lock:
                self._generation += 1
                self._committing = set()
            for pack in batch.sealed:
                pack.writer.close()

    def _commit_batch(
        self, batch: _Gathering, progress: list[PackProgress], point: PointRow | None
    ) -> list[Segment]:
        """Commits; returns the segments that have to be done again since what they relied on is gone."""
        segments = batch.segments
        redo: list[Segment] = []
        while True:
            committed = self._index.commit(
                Batch(
                    session=self.row.id,
                    now=int(self._clock()),
                    records=batch.records,
                    relied={i for segment in segments for i in segment.relied},
                    replacing=batch.replacing,
                    changes=batch.changes,
                    roots=[root for segment in segments for root in segment.roots],
                    packs=progress,
                    point=None if redo else point,
                    ends_session=point is not None and not redo,
                    aliases={
                        name: record for segment in segments for name, record in segment.aliases.items()
                    },
                )
            )
            if not committed.gone:
                self._count(committed)
                return redo
            if point is not None:
                raise InternalError("a manifest was written before what it relies on was committed")
            redo += [segment for segment in segments if segment.relied & committed.gone]
            segments = [segment for segment in segments if not segment.relied & committed.gone]

    def _count(self, committed: Committed) -> None:
        self.duplicate_bytes += committed.duplicate_bytes

    def commit_changes(self, marks: Sequence[bytes], changes: Sequence[PointChange]) -> None:
        """Changes the state of points, and writes down what was changed.

        Args:
            marks: plaintexts of records of that kind; none where there is no room for them.

        Durability: both are on disk on return.

        Raises:
            PointNotFound: one of the points is not listed any more; nothing was changed.
        """
        sealed = [self._sealer.seal(Kind.MARK, self._home.name_mark(text), text) for text in marks]
        with self._lock:
            self._write(sealed)
            self._gathering.changes += changes
        self._commit()

    def commit_point(self, point_id: PointId, manifest: bytes) -> None:
        """Writes the manifest and lists the restore point. The session is over on success.

        Durability: the point and all that it needs are on disk on return.
        """
        self.flush()
        sealed = self._sealer.seal(Kind.MANIFEST, RecordId(point_id), manifest)
        with self._lock:
            self._write([sealed])
            pack = self._gathering.records[-1].pack
        record = encode_record_header(sealed.header, pack) + sealed.payload
        self._commit(PointRow(point_id, hidden=False, pinned=False, pack=pack, record=record))
