"""The index of a repository on another host: `Index` over a connection.

Each method is one question, so it costs one round trip; long lists come in pages. Rows travel as they stand in the
tables, with their checksums. Rows of restore points do not change but for two bits, so each is fetched once.

`update_pack` takes a function, which can not travel: the row is fetched, changed here, and put back if it is still the
same over there; if it is not, once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from holdfast.errors import ProtocolError
from holdfast.ids import ID_BYTES, NodeId, PointId, RecordId, SessionId
from holdfast.repo.format import rows
from holdfast.repo.format.rows import PLACE_BYTES, CopyRow, PackRow, Place, PointRow, SessionRow
from holdfast.repo.index import Batch, Committed, CopiesFound, IndexFigures, Swept
from holdfast.repo.index import Collection as Collected
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.near import Connection

__all__ = ["RemoteIndex"]

_AT_ONCE: Final = 16_384


class RemoteIndex:
    """See the module.

    Args:
        connection: whose repository's index is open; it is closed by whoever made it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._points: dict[PointId, PointRow] = {}
        self._listed: frozenset[bytes] = frozenset()  # what the far side answers questions about points from

    def lookup(self, ids: Sequence[RecordId]) -> list[Place | None]:
        """See `Index.lookup`; of more than some thousand ids not from one snapshot."""
        answers = [
            (self._connection.begin(m.Lookup(tuple(ids[at : at + _AT_ONCE]))), len(ids[at : at + _AT_ONCE]))
            for at in range(0, len(ids), _AT_ONCE)
        ]
        places: list[Place | None] = []
        for answer, count in answers:
            found = answer.result().places
            if len(found) != count:
                raise ProtocolError(f"{self._connection.name} named {len(found)} places for {count} records")
            places += [Place(*place) if place[0] else None for place in found]
        return places

    def commit(self, batch: Batch) -> Committed:
        """See `Index.commit`."""
        answer = self._connection.ask(commit_request(batch))
        return Committed(frozenset(map(RecordId, answer.gone)), answer.duplicates, answer.duplicate_bytes)

    def scan(self, after: RecordId | None, limit: int) -> list[tuple[RecordId, Place]]:
        """See `Index.scan`."""
        keys, values = self.scan_rows(after, limit)
        found = []
        for number in range(len(keys) // ID_BYTES):
            key = RecordId(keys[number * ID_BYTES : (number + 1) * ID_BYTES])
            value = values[number * PLACE_BYTES : (number + 1) * PLACE_BYTES]
            found.append((key, rows.decode_place(key, value)))
        return found

    def scan_rows(self, after: RecordId | None, limit: int) -> tuple[bytes, bytes]:
        """See `Index.scan_rows`."""
        answer = self._connection.ask(m.ScanChunks(after, limit))
        count, odd = divmod(len(answer.keys), ID_BYTES)
        if odd or len(answer.values) != count * PLACE_BYTES or count > limit:
            raise ProtocolError(f"{self._connection.name} sent rows of impossible lengths")
        return answer.keys, answer.values

    def packs(self) -> list[PackRow]:
        """See `Index.packs`."""
        return [
            rows.decode_pack_row(key, value) for key, value in self._connection.ask(m.ListPackRows()).rows
        ]

    def points(self) -> list[PointRow]:
        """See `Index.points`."""
        states = self._list()
        while missing := [one for one, _ in states if one not in self._points][:_AT_ONCE]:
            if not self._fetch(missing):  # they have been collected meanwhile
                states = self._list()
                if [one for one, _ in states if one not in self._points][:_AT_ONCE] == missing:
                    raise ProtocolError(f"{self._connection.name} lists points that it does not have")
        listed = {PointId(RecordId(one)): bits for one, bits in states}
        self._points = {point: self._points[point] for point in listed}
        return [
            replace(self._points[point], hidden=bool(bits & 1), pinned=bool(bits & 2))
            for point, bits in listed.items()
        ]

    def _list(self) -> tuple[tuple[bytes, int], ...]:
        """Ids and states of all points."""
        states = self._connection.ask(m.ListPoints()).points
        self._listed = frozenset(one for one, _ in states)
        return states

    def _fetch(self, missing: Sequence[bytes]) -> int:
        """Asks for rows of points; how many came: as many as the far side puts into one answer."""
        known = len(self._points)
        for key, value in self._connection.ask(m.GetPoints(tuple(missing))).rows:
            row = rows.decode_point_row(key, value)
            self._points[row.id] = row
        return len(self._points) - known

    def point_states(self) -> dict[PointId, bool]:
        """See `Index.point_states`: 33 bytes for each point travel."""
        return {PointId(RecordId(one)): bool(bits & 1) for one, bits in self._list()}

    def get_points(self, ids: Sequence[PointId]) -> list[PointRow]:
        """See `Index.get_points`; whether one is hidden or pinned is as old as its row."""
        if not self._listed.issuperset(one for one in ids if one not in self._points):
            self._list()
        while missing := [one for one in ids if one not in self._points][:_AT_ONCE]:
            if not self._fetch(missing):
                raise ProtocolError(f"{self._connection.name} does not send the points that it was asked for")
        return [self._points[one] for one in ids]

    def changes(self) -> int:
        """See `Index.changes`; it costs a round trip here."""
        return self._connection.ask(m.GetChanges()).value

    def begin_session(self, row: SessionRow, expire_before: int) -> int:
        """See `Index.begin_session`."""
        request = m.BeginSession(row.id, rows.encode_session_row(row), expire_before)
        return self._connection.ask(request).value

    def heartbeat(self, session: SessionId, now: int) -> None:
        """See `Index.heartbeat`."""
        self._connection.ask(m.Heartbeat(session, now))

    def end_session(self, session: SessionId) -> None:
        """See `Index.end_session`."""
        self._connection.ask(m.EndSession(session))

    def sessions(self) -> list[SessionRow]:
        """See `Index.sessions`."""
        found = self._connection.ask(m.ListSessions()).rows
        return [rows.decode_session_row(key, value) for key, value in found]

    def roots(self, session: SessionId) -> Iterator[NodeId]:
        """See `Index.roots`."""
        page, more = 0, True
        while more:
            answer = self._connection.ask(m.GetRoots(session, page))
            yield from (NodeId(RecordId(root)) for root in answer.ids)
            page, more = page + 1, answer.more

    def set_verified(self, number: int, when: int) -> None:
        """See `Index.set_verified`."""
        self.update_pack(number, lambda row: replace(row, verified=when))

    def figures(self) -> IndexFigures:
        """See `Index.figures`."""
        found = self._connection.ask(m.GetFigures())
        return IndexFigures(found.records, found.packs, found.points, found.sessions, found.used_bytes)

    # --- keeping

    def begin_collection(self) -> Collected:
        """See `Index.begin_collection`."""
        answer = self._connection.ask(m.BeginCollection())
        return Collected(answer.epoch, tuple(PointId(RecordId(point)) for point in answer.removed))

    def note_collected(self, points: Collection[PointId]) -> None:
        """See `Index.note_collected`."""
        self._connection.ask(m.NoteCollected(tuple(points)))

    def collected(self, ids: Sequence[PointId]) -> frozenset[PointId]:
        """See `Index.collected`."""
        found: set[PointId] = set()
        for at in range(0, len(ids), _AT_ONCE):
            asked = ids[at : at + _AT_ONCE]
            answer = self._connection.ask(m.WereCollected(tuple(asked)))
            found.update(PointId(RecordId(one)) for one in answer.ids)
        return frozenset(found.intersection(ids))

    def copies(self) -> list[CopyRow]:
        """See `Index.copies`."""
        found = self._connection.ask(m.ListCopies()).rows
        return [rows.decode_copy_row(key, value) for key, value in found]

    def note_copies(self, found: CopiesFound) -> None:
        """See `Index.note_copies`."""
        request = m.NoteCopies(
            found.repository,
            found.address,
            found.when,
            *(
                tuple(point[: m.START_BYTES] for point in points)
                for points in (found.compared, found.sampled, found.read, found.absent)
            ),
        )
        self._connection.ask(request)

    def sweep(self, ids: Sequence[RecordId], before: int) -> Swept:
        """See `Index.sweep`."""
        answer = self._connection.ask(m.Sweep(tuple(ids), before))
        return Swept(answer.records, answer.bytes)

    def drop(self, damaged: Mapping[RecordId, tuple[int, int]]) -> Swept:
        """See `Index.drop`."""
        request = m.Drop(tuple((record, pack, offset) for record, (pack, offset) in damaged.items()))
        answer = self._connection.ask(request)
        return Swept(answer.records, answer.bytes)

    def lost(self) -> frozenset[RecordId]:
        """See `Index.lost`."""
        return frozenset(map(RecordId, self._connection.ask(m.ListLost()).ids))

    def aliases(self, names: Sequence[bytes]) -> list[RecordId | None]:
        """See `Index.aliases`."""
        answer = self._connection.ask(m.GetAliases(tuple(names)))
        if len(answer.ids) != len(names):
            raise ProtocolError(
                f"{self._connection.name} answered for {len(answer.ids)} of {len(names)} names"
            )
        return [None if one is None else RecordId(one) for one in answer.ids]

    def scan_aliases(self, after: bytes, limit: int) -> list[tuple[bytes, RecordId]]:
        """See `Index.scan_aliases`."""
        found = self._connection.ask(m.ScanAliases(after, limit)).rows
        return [(name, RecordId(record)) for name, record in found]

    def drop_aliases(self, names: Sequence[bytes]) -> None:
        """See `Index.drop_aliases`."""
        self._connection.ask(m.DropAliases(tuple(names)))

    def update_pack(self, number: int, update: Callable[[PackRow], PackRow]) -> PackRow | None:
        """See `Index.update_pack`."""
        key = rows.pack_key(number)
        while True:
            old = self._connection.ask(m.GetPackRow(number)).data
            if old is None:
                return None
            row = update(rows.decode_pack_row(key, old))
            new = rows.encode_pack_row(row)
            if new == old or self._connection.ask(m.ReplacePackRow(number, old, new)).value:
                return row

    def remove_pack(self, number: int) -> bool:
        """See `Index.remove_pack`."""
        return self._connection.ask(m.RemovePack(number)).value

    def close(self) -> None:
        """See `Index.close`. The far side closes its own when another is opened or made, and when the connection ends."""


def commit_request(batch: Batch) -> m.Commit:
    """A batch as it travels."""
    numbers = {progress.id: number for number, progress in enumerate(batch.packs)}
    point = batch.point
    return m.Commit(
        session=batch.session,
        now=batch.now,
        packs=tuple((one.id, one.committed_bytes, int(one.state), one.created) for one in batch.packs),
        records=tuple(
            (one.id, numbers[one.pack], one.offset, one.stored_bytes, one.plain_bytes, one.kind)
            for one in batch.records
        ),
        relied=tuple(batch.relied),
        roots=tuple(batch.roots),
        point=None if point is None else (point.id, point.hidden, point.pinned, point.pack, point.record),
        changes=tuple(
            (
                change.id,
                change.time_ns,
                None if change.hidden is None else int(change.hidden),
                None if change.pinned is None else int(change.pinned),
            )
            for change in batch.changes
        ),
        replacing=tuple((record, pack, offset) for record, (pack, offset) in batch.replacing.items()),
        ends_session=batch.ends_session,
        aliases=batch.aliases,
    )
