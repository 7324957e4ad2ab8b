"""The index as dictionaries: the oracle that `LmdbIndex` is held against, and the index of the rig's engine."""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Collection_
from dataclasses import dataclass, field, replace

from holdfast.errors import PointNotFound, SessionGone
from holdfast.ids import NodeId, PackId, PointId, RecordId, RepositoryId, SessionId
from holdfast.repo.format.record import RECORD_HEADER_BYTES
from holdfast.repo.format.rows import (
    CopyRow,
    PackRow,
    PackState,
    Place,
    PointRow,
    SessionRow,
    VerifiedBy,
    encode_place,
)
from holdfast.repo.index import Batch, Collection, Committed, CopiesFound, IndexFigures, Swept


@dataclass
class _State:
    chunks: dict[RecordId, Place] = field(default_factory=dict)
    packs: dict[int, PackRow] = field(default_factory=dict)
    points: dict[PointId, PointRow] = field(default_factory=dict)
    sessions: dict[SessionId, SessionRow] = field(default_factory=dict)
    roots: set[tuple[SessionId, NodeId]] = field(default_factory=set)
    lost: set[RecordId] = field(default_factory=set)
    collected: set[PointId] = field(default_factory=set)
    marked: dict[tuple[PointId, str], int] = field(default_factory=dict)
    aliases: dict[bytes, RecordId] = field(default_factory=dict)
    copies: dict[tuple[PointId, RepositoryId], CopyRow] = field(default_factory=dict)
    next_pack: int = 1
    epoch: int = 1


def swept(row: PackRow, place: Place) -> PackRow:
    """A pack's row after the index has let go of one of its records."""
    size = RECORD_HEADER_BYTES + place.stored_bytes
    return replace(
        row,
        records=row.records - 1,
        dead_records=row.dead_records + 1,
        live_bytes=row.live_bytes - size,
        dead_bytes=row.dead_bytes + size,
    )


class ModelIndex:
    """See `holdfast.repo.index.Index`. Commits survive every crash; nothing else is kept."""

    def __init__(self) -> None:
        self._state = _State()
        self._lock = threading.RLock()

    def lookup(self, ids: Sequence[RecordId]) -> list[Place | None]:
        with self._lock:
            return [self._state.chunks.get(i) for i in ids]

    def commit(self, batch: Batch) -> Committed:
        with self._lock:
            state = copy.copy(self._state)
            state.chunks, state.packs = dict(state.chunks), dict(state.packs)
            state.points, state.sessions = dict(state.points), dict(state.sessions)
            state.roots, state.lost = set(state.roots), set(state.lost)
            state.marked, state.aliases = dict(state.marked), dict(state.aliases)
            committed = self._apply(state, batch)
            if not committed.gone:
                self._state = state
            return committed

    def _apply(self, state: _State, batch: Batch) -> Committed:
        if batch.session is not None:
            if batch.session not in state.sessions:
                raise SessionGone("the session is gone")
            state.sessions[batch.session] = state.sessions[batch.session].alive_at(batch.now)
        gone = frozenset(i for i in batch.relied if i not in state.chunks)
        if gone:
            return Committed(gone=gone)
        for record_id in batch.relied:
            state.chunks[record_id] = state.chunks[record_id]._replace(epoch=state.epoch)
        rows = {row.id: row for row in state.packs.values()}
        for progress in batch.packs:
            if progress.id not in rows:
                number, state.next_pack = state.next_pack, state.next_pack + 1
                rows[progress.id] = PackRow(
                    number, progress.id, PackState.OPEN, 0, 0, 0, 0, 0, progress.created, 0
                )
        duplicates = duplicate_bytes = 0
        for record in sorted(batch.records):
            row = rows[record.pack]
            size = RECORD_HEADER_BYTES + record.stored_bytes
            there = state.chunks.get(record.id)
            if there is None:
                state.chunks[record.id] = Place(
                    row.number,
                    record.offset,
                    record.stored_bytes,
                    record.plain_bytes,
                    state.epoch,
                    record.kind,
                )
                rows[record.pack] = replace(row, records=row.records + 1, live_bytes=row.live_bytes + size)
                state.lost.discard(record.id)
                continue
            if batch.replacing.get(record.id) == (there.pack, there.offset):
                old = next(r for r in rows.values() if r.number == there.pack)
                rows[old.id] = swept(old, there)
                row = rows[record.pack]
                rows[record.pack] = replace(row, records=row.records + 1, live_bytes=row.live_bytes + size)
                state.chunks[record.id] = Place(
                    row.number,
                    record.offset,
                    record.stored_bytes,
                    record.plain_bytes,
                    state.epoch,
                    record.kind,
                )
                continue
            state.chunks[record.id] = there._replace(epoch=state.epoch)
            if (there.pack, there.offset) != (row.number, record.offset):
                rows[record.pack] = replace(
                    row, dead_records=row.dead_records + 1, dead_bytes=row.dead_bytes + size
                )
                duplicates += 1
                duplicate_bytes += size
        for row in rows.values():
            state.packs[row.number] = row
        for progress in batch.packs:
            row = rows[progress.id]
            length = row.committed_bytes
            if row.state is not PackState.HOLED:
                length = max(length, progress.committed_bytes)
            if length > row.committed_bytes:
                row = replace(row, verified=0, verified_by=VerifiedBy.NOTHING)
            state.packs[row.number] = replace(
                row, state=max(row.state, progress.state), committed_bytes=length
            )
        if batch.session is not None:
            state.roots |= {(batch.session, leaf) for leaf in batch.roots}
        state.aliases.update(batch.aliases)
        if batch.point is not None and batch.point.id not in state.collected:
            state.points.setdefault(batch.point.id, batch.point)
        for change in batch.changes:
            if change.id not in state.points:
                raise PointNotFound("the point is gone")
            for name in ("hidden", "pinned"):
                value = getattr(change, name)
                if value is not None and change.time_ns >= state.marked.get((change.id, name), 0):
                    state.marked[change.id, name] = change.time_ns
                    state.points[change.id] = replace(state.points[change.id], **{name: value})
        if batch.ends_session and batch.session is not None:
            del state.sessions[batch.session]
        return Committed(duplicates=duplicates, duplicate_bytes=duplicate_bytes)

    def scan(self, after: RecordId | None, limit: int) -> list[tuple[RecordId, Place]]:
        with self._lock:
            rows = sorted(self._state.chunks.items())
        return [row for row in rows if after is None or row[0] > after][:limit]

    def packs(self) -> list[PackRow]:
        with self._lock:
            return [row for _, row in sorted(self._state.packs.items())]

    def points(self) -> list[PointRow]:
        with self._lock:
            return [row for _, row in sorted(self._state.points.items())]

    def point_states(self) -> dict[PointId, bool]:
        return {row.id: row.hidden for row in self.points()}

    def get_points(self, ids: Sequence[PointId]) -> list[PointRow]:
        with self._lock:
            if missing := set(ids) - self._state.points.keys():
                raise PointNotFound(f"{len(missing)} points are gone")
            return [self._state.points[one] for one in ids]

    def changes(self) -> int:
        with self._lock:
            return zlib.crc32(repr(self._state).encode())

    def begin_session(self, row: SessionRow, expire_before: int) -> int:
        with self._lock:
            for session in list(self._state.sessions.values()):
                if session.heartbeat < expire_before:
                    self.end_session(session.id)
            living = self._state.sessions.keys()
            self._state.roots = {root for root in self._state.roots if root[0] in living}
            for point in row.holds:
                if point not in self._state.points or self._state.points[point].hidden:
                    raise PointNotFound("a held point is gone")
            others = sum(session.kind == row.kind for session in self._state.sessions.values())
            self._state.sessions[row.id] = row
            return others

    def heartbeat(self, session: SessionId, now: int) -> None:
        with self._lock:
            if session not in self._state.sessions:
                raise SessionGone("the session is gone")
            self._state.sessions[session] = self._state.sessions[session].alive_at(now)

    def end_session(self, session: SessionId) -> None:
        with self._lock:
            self._state.sessions.pop(session, None)
            self._state.roots = {root for root in self._state.roots if root[0] != session}

    def sessions(self) -> list[SessionRow]:
        with self._lock:
            return [row for _, row in sorted(self._state.sessions.items())]

    def roots(self, session: SessionId) -> Iterator[NodeId]:
        with self._lock:
            return iter(sorted(leaf for owner, leaf in self._state.roots if owner == session))

    def set_verified(self, number: int, when: int) -> None:
        with self._lock:
            if number in self._state.packs:
                self._state.packs[number] = replace(self._state.packs[number], verified=when)

    def figures(self) -> IndexFigures:
        with self._lock:
            state = self._state
            return IndexFigures(
                len(state.chunks), len(state.packs), len(state.points), len(state.sessions), 0
            )

    # --- keeping

    def begin_collection(self) -> Collection:
        with self._lock:
            self._state.epoch += 1
            held = {point for session in self._state.sessions.values() for point in session.holds}
            gone = [row.id for row in self.points() if row.hidden and row.id not in held]
            self._state.points = {i: row for i, row in self._state.points.items() if i not in gone}
            self._state.collected = self._state.collected | set(gone)
            self._state.copies = {key: row for key, row in self._state.copies.items() if key[0] not in gone}
            return Collection(self._state.epoch, tuple(gone))

    def note_collected(self, points: Collection_[PointId]) -> None:
        with self._lock:
            self._state.collected = self._state.collected | set(points)

    def collected(self, ids: Sequence[PointId]) -> frozenset[PointId]:
        return frozenset(self._state.collected.intersection(ids))

    def copies(self) -> list[CopyRow]:
        return [self._state.copies[key] for key in sorted(self._state.copies)]

    def note_copies(self, found: CopiesFound) -> None:
        with self._lock:
            for point in found.absent:
                self._state.copies.pop((point, found.repository), None)
            for point in set(found.compared) & self._state.points.keys():
                key = point, found.repository
                known = self._state.copies.get(key)
                self._state.copies[key] = CopyRow(
                    point,
                    found.repository,
                    found.when,
                    found.when if point in found.sampled else known.sampled if known else 0,
                    found.when if point in found.read else known.read if known else 0,
                    found.address,
                )

    def scan_rows(self, after: RecordId | None, limit: int) -> tuple[bytes, bytes]:
        found = self.scan(after, limit)
        return b"".join(i for i, _ in found), b"".join(encode_place(i, place) for i, place in found)

    def sweep(self, ids: Sequence[RecordId], before: int) -> Swept:
        with self._lock:
            doomed = {
                i: self._state.chunks[i]
                for i in ids
                if i in self._state.chunks and self._state.chunks[i].epoch < before
            }
            self.remove_records(set(doomed))
            return Swept(
                len(doomed), sum(RECORD_HEADER_BYTES + place.stored_bytes for place in doomed.values())
            )

    def drop(self, damaged: Mapping[RecordId, tuple[int, int]]) -> Swept:
        with self._lock:
            places = {i: self._state.chunks[i] for i in damaged if i in self._state.chunks}
            doomed = [i for i, place in places.items() if damaged[i] == (place.pack, place.offset)]
            self._state.lost |= set(doomed)
            return self.sweep(doomed, 2**32)

    def lost(self) -> frozenset[RecordId]:
        with self._lock:
            return frozenset(self._state.lost)

    def aliases(self, names: Sequence[bytes]) -> list[RecordId | None]:
        with self._lock:
            return [self._state.aliases.get(name) for name in names]

    def scan_aliases(self, after: bytes, limit: int) -> list[tuple[bytes, RecordId]]:
        with self._lock:
            return sorted(item for item in self._state.aliases.items() if item[0] > after)[:limit]

    def drop_aliases(self, names: Sequence[bytes]) -> None:
        with self._lock:
            for name in names:
                self._state.aliases.pop(name, None)

    def update_pack(self, number: int, update: Callable[[PackRow], PackRow]) -> PackRow | None:
        with self._lock:
            if number not in self._state.packs:
                return None
            self._state.packs = {**self._state.packs, number: update(self._state.packs[number])}
            return self._state.packs[number]

    def remove_pack(self, number: int) -> bool:
        with self._lock:
            if number not in self._state.packs or self._state.packs[number].records:
                return False
            self._state.packs = {n: row for n, row in self._state.packs.items() if n != number}
            return True

    def close(self) -> None:
        pass

    # --- what only tests do

    def copy(self) -> ModelIndex:
        """The same rows once more."""
        other = ModelIndex()
        with self._lock:
            other._state = copy.deepcopy(self._state)
        return other

    def remove_records(self, ids: set[RecordId]) -> None:
        """Takes records out, as garbage collection will."""
        with self._lock:
            chunks, packs = dict(self._state.chunks), dict(self._state.packs)
            for record_id in ids & chunks.keys():
                place = chunks.pop(record_id)
                packs[place.pack] = swept(packs[place.pack], place)
            self._state.chunks, self._state.packs = chunks, packs

    def pack_id(self, number: int) -> PackId:
        return self._state.packs[number].id
