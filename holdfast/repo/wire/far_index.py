"""The far side's index: rows out, batches in.

What a batch says is compared with what was appended (`proof`) and with the connection's rights before the index sees it.
Nothing of a client's numbers is passed on unless it can be what it should be: an index never meets values that the engine
itself would not hand to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

from holdfast.errors import InternalError, PointNotFound, ProtocolError
from holdfast.ids import NodeId, PackId, PointId, RecordId, RepositoryId, SessionId
from holdfast.repo.format import rows
from holdfast.repo.format.record import Kind
from holdfast.repo.format.rows import PackState, Place, PointRow
from holdfast.repo.index import Batch, CopiesFound, Index, NewRecord, PackProgress, PointChange
from holdfast.repo.lease import SESSION_LIFETIME_S
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.proof import Proofs, manifest_is_proven
from holdfast.repo.wire.rights import Rights
from holdfast.units import MIB

__all__ = ["FarIndex"]

_MOST_ROWS: Final = 1 << 20
_ROOTS_AT_ONCE: Final = 16_384
_MOST_WALKS: Final = 16
_POINTS_BYTES: Final = 4 * MIB
_NO_PLACE: Final = (0, 0, 0, 0, 0, 0)
_MOST_NAME_BYTES: Final = 64
_MOST_ADDRESS_BYTES: Final = 1024
_KINDS: Final = frozenset({int(Kind.CHUNK), int(Kind.NODE), int(Kind.MANIFEST), int(Kind.MARK)})


class FarIndex:
    """See the module.

    Args:
        own: sessions that append-only connections may end: those that this one has begun.
    """

    def __init__(
        self,
        index: Index,
        proofs: Proofs,
        rights: Rights,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.index = index
        self._proofs = proofs
        self._rights = rights
        self._clock = clock
        self._own: set[SessionId] = set()
        self._walks: dict[SessionId, tuple[int, Iterator[NodeId]]] = {}
        self._points: dict[PointId, PointRow] = {}
        self._lock = threading.Lock()

    def lookup(self, request: m.Lookup) -> m.Places:
        """Answers `Lookup`."""
        found = self.index.lookup([RecordId(one) for one in request.ids])
        return m.Places(tuple(_NO_PLACE if place is None else _row_of(place) for place in found))

    def commit(self, request: m.Commit) -> m.CommitOutcome:
        """Answers `Commit`."""
        batch = self._batch(request)
        if self._rights.append_only:
            batch = self._only_adding(batch)
        if batch.point is not None and not manifest_is_proven(
            batch.point.pack, batch.point.record, RecordId(batch.point.id)
        ):
            self._require_trust("a point is listed whose manifest is damaged")
        self._proofs.require(batch.records)
        done = self.index.commit(batch)
        return m.CommitOutcome(tuple(done.gone), done.duplicates, done.duplicate_bytes)

    def _require_trust(self, why: str) -> None:
        if self._rights.append_only:
            raise ProtocolError(why)

    @staticmethod
    def _batch(request: m.Commit) -> Batch:
        try:
            packs = [
                PackProgress(PackId(pack), committed, PackState(state), created)
                for pack, committed, state, created in request.packs
            ]
            records = [
                NewRecord(RecordId(record), packs[pack].id, offset, stored, plain, kind)
                for record, pack, offset, stored, plain, kind in request.records
            ]
        except (ValueError, IndexError):
            raise ProtocolError("a batch contradicts itself") from None
        if not all(record.kind in _KINDS for record in records):
            raise ProtocolError("a batch holds a record of a kind that is never listed")
        point = request.point
        return Batch(
            session=None if request.session is None else SessionId(request.session),
            now=request.now,
            records=records,
            relied={RecordId(one) for one in request.relied},
            roots=[NodeId(RecordId(one)) for one in request.roots],
            packs=packs,
            point=None
            if point is None
            else PointRow(PointId(RecordId(point[0])), point[1], point[2], PackId(point[3]), point[4]),
            changes=[
                PointChange(
                    PointId(RecordId(one)),
                    time_ns,
                    None if hidden is None else bool(hidden),
                    None if pinned is None else bool(pinned),
                )
                for one, time_ns, hidden, pinned in request.changes
            ],
            replacing={RecordId(one): (pack, offset) for one, pack, offset in request.replacing},
            ends_session=request.ends_session,
            aliases=dict(
                zip(_names(tuple(request.aliases)), map(RecordId, request.aliases.values()), strict=True)
            ),
        )

    def _only_adding(self, batch: Batch) -> Batch:
        """The batch of a client that may only add. Its clock counts for nothing, and its aliases are not believed:
        others would take their chunks by them, and they are only a shortcut.
        """
        if batch.changes or batch.replacing or any(record.kind == Kind.MARK for record in batch.records):
            raise self._rights.refusal()
        if batch.point is not None and (batch.point.hidden or batch.point.pinned):
            raise self._rights.refusal()
        if batch.session is not None and batch.session not in self._own:
            raise self._rights.refusal()
        return replace(batch, now=int(self._clock()), aliases={})

    def scan(self, request: m.ScanChunks) -> m.ChunkRows:
        """Answers `ScanChunks`."""
        after = None if request.after is None else RecordId(request.after)
        return m.ChunkRows(*self.index.scan_rows(after, min(request.limit, _MOST_ROWS)))

    def packs(self, request: m.ListPackRows) -> m.Rows:
        """Answers `ListPackRows`."""
        del request
        found = self.index.packs()
        return m.Rows(tuple((rows.pack_key(row.number), rows.encode_pack_row(row)) for row in found))

    def points(self, request: m.ListPoints) -> m.PointStates:
        """Answers `ListPoints`."""
        del request
        found = self.index.points()
        with self._lock:
            self._points = {row.id: row for row in found}
        return m.PointStates(tuple((row.id, row.hidden | row.pinned << 1) for row in found))

    def get_points(self, request: m.GetPoints) -> m.Rows:
        """Answers `GetPoints`, from what `ListPoints` has found."""
        with self._lock:
            known = self._points
        found: list[tuple[bytes, bytes]] = []
        size = 0
        for one in request.ids:
            row = known.get(PointId(RecordId(one)))
            if row is None:
                raise PointNotFound(f"restore point {one.hex()[:12]} does not exist any more")
            found.append((row.id, rows.encode_point_row(row)))
            size += len(row.record)
            if size > _POINTS_BYTES:
                break
        return m.Rows(tuple(found))

    # --- sessions

    def begin_session(self, request: m.BeginSession) -> m.Number:
        """Answers `BeginSession`."""
        row = rows.decode_session_row(request.session, request.row)
        expire_before = request.expire_before
        if self._rights.append_only:  # it may neither outlive nor end what others need
            now = int(self._clock())
            row = replace(row, started=now, heartbeat=now)
            expire_before = min(expire_before, now - SESSION_LIFETIME_S)
            if any(one.id == row.id for one in self.index.sessions()):
                raise self._rights.refusal()
        others = self.index.begin_session(row, expire_before)
        self._own.add(row.id)
        return m.Number(others)

    def heartbeat(self, request: m.Heartbeat) -> m.Done:
        """Answers `Heartbeat`."""
        session = SessionId(request.session)
        now = request.now
        if self._rights.append_only:
            if session not in self._own:
                raise self._rights.refusal()
            now = int(self._clock())
        self.index.heartbeat(session, now)
        return m.Done()

    def end_session(self, request: m.EndSession) -> m.Done:
        """Answers `EndSession`."""
        session = SessionId(request.session)
        if self._rights.append_only and session not in self._own:
            raise self._rights.refusal()
        self.index.end_session(session)
        return m.Done()

    def sessions(self, request: m.ListSessions) -> m.Rows:
        """Answers `ListSessions`."""
        del request
        return m.Rows(tuple((row.id, rows.encode_session_row(row)) for row in self.index.sessions()))

    def roots(self, request: m.GetRoots) -> m.Ids:
        """Answers `GetRoots`."""
        session = SessionId(request.session)
        with self._lock:
            if request.page == 0:
                self._walks.pop(session, None)
                if len(self._walks) >= _MOST_WALKS:
                    self._walks.pop(next(iter(self._walks)))
                self._walks[session] = 0, self.index.roots(session)
            page, walk = self._walks.get(session, (-1, iter(())))
            if page != request.page:
                raise ProtocolError("a list is asked for in another order than it is given")
            found = tuple(islice(walk, _ROOTS_AT_ONCE))
            more = len(found) == _ROOTS_AT_ONCE
            if more:
                self._walks[session] = page + 1, walk
            else:
                del self._walks[session]
        return m.Ids(found, more)

    # --- keeping

    def figures(self, request: m.GetFigures) -> m.Figures:
        """Answers `GetFigures`."""
        del request
        found = self.index.figures()
        return m.Figures(found.records, found.packs, found.points, found.sessions, found.used_bytes)

    def changes(self, request: m.GetChanges) -> m.Number:
        """Answers `GetChanges`."""
        del request
        return m.Number(self.index.changes())

    def begin_collection(self, request: m.BeginCollection) -> m.CollectionBegun:
        """Answers `BeginCollection`."""
        del request
        begun = self.index.begin_collection()
        return m.CollectionBegun(begun.epoch, begun.removed)

    def note_collected(self, request: m.NoteCollected) -> m.Done:
        """Answers `NoteCollected`."""
        self.index.note_collected([PointId(RecordId(one)) for one in request.points])
        return m.Done()

    def collected(self, request: m.WereCollected) -> m.Ids:
        """Answers `WereCollected`."""
        return m.Ids(tuple(self.index.collected([PointId(RecordId(one)) for one in request.ids])), more=False)

    def copies(self, request: m.ListCopies) -> m.Rows:
        """Answers `ListCopies`."""
        del request
        found = [] if self._rights.append_only else self.index.copies()
        return m.Rows(
            tuple((rows.copy_key(row.point, row.repository), rows.encode_copy_row(row)) for row in found)
        )

    def note_copies(self, request: m.NoteCopies) -> m.Done:
        """Answers `NoteCopies`."""
        if len(request.address.encode()) > _MOST_ADDRESS_BYTES:
            raise ProtocolError("the address of a repository is too long")
        known: dict[bytes, list[PointId]] = {}
        for point in self.index.point_states():
            known.setdefault(point[: m.START_BYTES], []).append(point)

        def points(starts: Sequence[bytes]) -> list[PointId]:
            found = (known.get(start, []) for start in starts)
            return [fitting[0] for fitting in found if len(fitting) == 1]

        self.index.note_copies(
            CopiesFound(
                RepositoryId(request.repository),
                request.address,
                request.when,
                points(request.compared),
                points(request.sampled),
                points(request.read),
                points(request.absent),
            )
        )
        return m.Done()

    def sweep(self, request: m.Sweep) -> m.Removed:
        """Answers `Sweep`."""
        swept = self.index.sweep([RecordId(one) for one in request.ids], request.before)
        return m.Removed(swept.records, swept.bytes)

    def drop(self, request: m.Drop) -> m.Removed:
        """Answers `Drop`."""
        dropped = self.index.drop(
            {RecordId(record): (pack, offset) for record, pack, offset in request.damaged}
        )
        return m.Removed(dropped.records, dropped.bytes)

    def lost(self, request: m.ListLost) -> m.Ids:
        """Answers `ListLost`."""
        del request
        return m.Ids(tuple(self.index.lost()), more=False)

    def aliases(self, request: m.GetAliases) -> m.MaybeIds:
        """Answers `GetAliases`."""
        return m.MaybeIds(tuple(self.index.aliases(_names(request.names))))

    def scan_aliases(self, request: m.ScanAliases) -> m.Rows:
        """Answers `ScanAliases`."""
        if len(request.after) > _MOST_NAME_BYTES:
            raise ProtocolError("an alias is too long")
        return m.Rows(tuple(self.index.scan_aliases(request.after, min(request.limit, _MOST_ROWS))))

    def drop_aliases(self, request: m.DropAliases) -> m.Done:
        """Answers `DropAliases`."""
        self.index.drop_aliases(_names(request.names))
        return m.Done()

    def get_pack_row(self, request: m.GetPackRow) -> m.MaybeBytes:
        """Answers `GetPackRow`."""
        row = self.index.update_pack(request.number, lambda row: row) if self._rights.may_change else None
        if row is None:
            row = next((one for one in self.index.packs() if one.number == request.number), None)
        return m.MaybeBytes(None if row is None else rows.encode_pack_row(row))

    def replace_pack_row(self, request: m.ReplacePackRow) -> m.Truth:
        """Answers `ReplacePackRow`."""
        new = rows.decode_pack_row(rows.pack_key(request.number), request.new)
        replaced = []

        def put(row: rows.PackRow) -> rows.PackRow:
            if rows.encode_pack_row(row) != request.old:
                return row
            replaced.append(row)
            return new

        if self.index.update_pack(request.number, put) is None:
            return m.Truth(False)
        if len(replaced) > 1:
            raise InternalError("a pack's row was changed twice")
        return m.Truth(bool(replaced))

    def remove_pack(self, request: m.RemovePack) -> m.Truth:
        """Answers `RemovePack`."""
        return m.Truth(self.index.remove_pack(request.number))


def _names(names: tuple[bytes, ...]) -> list[bytes]:
    """Names of aliases, none of which is of an impossible length."""
    if not all(0 < len(name) <= _MOST_NAME_BYTES for name in names):
        raise ProtocolError("an alias is too long, or empty")
    return list(names)


def _row_of(place: Place) -> tuple[int, int, int, int, int, int]:
    return place.pack, place.offset, place.stored_bytes, place.plain_bytes, place.epoch, place.kind
