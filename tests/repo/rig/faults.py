"""Faults, as wrappers around any pack store and any index: a crash, a full disk or an I/O error at will.

Every operation that reaches storage is numbered and asked about; `Faults.plan` answers with what is to go
wrong. After a crash nothing works any more, so that no cleanup of the dying process can reach storage:
`except` and `finally` blocks run, as they do not in a real crash, but they are cut off.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Collection as Collection_
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from holdfast.errors import DiskFull, HoldfastError, StorageError
from holdfast.ids import NodeId, PackId, PointId, RecordId, SessionId
from holdfast.repo.format.rows import CopyRow, PackRow, Place, PointRow, SessionRow
from holdfast.repo.index import Batch, Collection, Committed, CopiesFound, Index, IndexFigures, Swept
from holdfast.repo.packs import PackStore, PackWriter

T = TypeVar("T")


class Crash(BaseException):
    """The process is gone. Not an `Exception`: nobody handles it."""


class When(Enum):
    """When, in respect of the operation, the process dies."""

    BEFORE = "before"
    AFTER = "after"
    AMID = "amid"  # an append that was written in part; elsewhere as BEFORE


@dataclass(frozen=True)
class CrashAt:
    """Die at this operation."""

    when: When


Fault = CrashAt | HoldfastError | None


def disk_full() -> HoldfastError:
    return DiskFull("no space left (made by a test)")


def disk_error() -> HoldfastError:
    return StorageError("input/output failed (made by a test)")


class Faults:
    """Numbers operations from 1 on and applies the plan to them.

    Args:
        plan: called with the number and the name of each operation: `create`, `adopt`, `append`, `cut`,
            `sync`, `delete`, `read`, `commit`, `begin_session`, `end_session`, `heartbeat`,
            `set_verified`, `lookup`.
        counted: the names that are numbered; others pass unseen unless the process is dead.
    """

    WRITES = frozenset(
        {
            "create",
            "append",
            "cut",
            "sync",
            "delete",
            "punch",
            "commit",
            "begin_session",
            "end_session",
            "begin_collection",
            "sweep",
            "drop",
            "update_pack",
            "remove_pack",
        }
    )

    def __init__(
        self,
        plan: Callable[[int, str], Fault] = lambda _number, _name: None,
        counted: frozenset[str] = WRITES,
    ) -> None:
        self.plan = plan
        self._counted = counted
        self.log: list[str] = []
        self.dead = False
        self.fired = 0
        self._lock = threading.Lock()
        self._writers: list[PackWriter] = []

    def run(self, name: str, act: Callable[[], T], amid: Callable[[], object] | None = None) -> T:
        fault: Fault = None
        with self._lock:
            if self.dead:
                raise Crash
            if name in self._counted:
                self.log.append(name)
                fault = self.plan(len(self.log), name)
            if fault is not None:
                self.fired += 1
            if isinstance(fault, CrashAt):
                self.dead = True
        if fault is None:
            return act()
        if isinstance(fault, CrashAt):
            if fault.when is When.AFTER:
                act()
            elif fault.when is When.AMID and amid is not None:
                amid()
            raise Crash
        raise fault

    def die(self) -> None:
        """The process is killed from outside."""
        with self._lock:
            self.dead = True

    def note_writer(self, writer: PackWriter) -> None:
        self._writers.append(writer)

    def close_descriptors(self) -> None:
        """What the kernel does when a process ends."""
        assert self.dead
        for writer in self._writers:
            writer.close()


class _FaultyWriter:
    def __init__(self, writer: PackWriter, faults: Faults) -> None:
        self._writer = writer
        self._faults = faults
        faults.note_writer(writer)

    @property
    def id(self) -> PackId:
        return self._writer.id

    @property
    def length(self) -> int:
        return self._writer.length

    def append(self, parts: Sequence[bytes]) -> int:
        def amid() -> None:
            whole = b"".join(parts)
            self._writer.append([whole[: len(whole) * 2 // 3]])

        return self._faults.run("append", lambda: self._writer.append(parts), amid)

    def cut(self, length: int) -> None:
        self._faults.run("cut", lambda: self._writer.cut(length))

    def sync(self) -> None:
        self._faults.run("sync", self._writer.sync)

    def close(self) -> None:
        if not self._faults.dead:
            self._writer.close()


class FaultyPackStore:
    """Any pack store, with faults."""

    def __init__(self, store: PackStore, faults: Faults) -> None:
        self._store = store
        self._faults = faults

    def create(self, pack_id: PackId) -> PackWriter:
        return _FaultyWriter(
            self._faults.run("create", lambda: self._created(pack_id)),
            self._faults,
        )

    def _created(self, pack_id: PackId) -> PackWriter:
        writer = self._store.create(pack_id)
        self._faults.note_writer(writer)
        return writer

    def adopt(self, pack_id: PackId) -> PackWriter | None:
        writer = self._faults.run("adopt", lambda: self._store.adopt(pack_id))
        return None if writer is None else _FaultyWriter(writer, self._faults)

    def read(self, pack_id: PackId, offset: int, length: int) -> bytes:
        return self._faults.run("read", lambda: self._store.read(pack_id, offset, length))

    def length(self, pack_id: PackId) -> int | None:
        return self._store.length(pack_id)

    def sync(self, pack_id: PackId) -> None:
        self._faults.run("sync", lambda: self._store.sync(pack_id))

    def ids(self) -> Iterator[PackId]:
        return self._store.ids()

    def delete(self, pack_id: PackId) -> None:
        self._faults.run("delete", lambda: self._store.delete(pack_id))

    def free_bytes(self) -> int:
        return self._store.free_bytes()

    def allocated_bytes(self, pack_id: PackId) -> int:
        return self._store.allocated_bytes(pack_id)

    def can_punch(self) -> bool:
        return self._store.can_punch()

    def punch(self, pack_id: PackId, ranges: Sequence[tuple[int, int]]) -> None:
        self._faults.run(
            "punch",
            lambda: self._store.punch(pack_id, ranges),
            lambda: self._store.punch(pack_id, ranges[: len(ranges) // 2]),
        )

    def close(self) -> None:
        self._store.close()


class FaultyIndex:
    """Any index, with faults. Commits are all or nothing, as those of LMDB are."""

    def __init__(self, index: Index, faults: Faults) -> None:
        self._index = index
        self._faults = faults

    def lookup(self, ids: Sequence[RecordId]) -> list[Place | None]:
        return self._faults.run("lookup", lambda: self._index.lookup(ids))

    def commit(self, batch: Batch) -> Committed:
        return self._faults.run("commit", lambda: self._index.commit(batch))

    def scan(self, after: RecordId | None, limit: int) -> list[tuple[RecordId, Place]]:
        return self._index.scan(after, limit)

    def packs(self) -> list[PackRow]:
        return self._index.packs()

    def points(self) -> list[PointRow]:
        return self._index.points()

    def point_states(self) -> dict[PointId, bool]:
        return self._index.point_states()

    def get_points(self, ids: Sequence[PointId]) -> list[PointRow]:
        return self._index.get_points(ids)

    def changes(self) -> int:
        return self._index.changes()

    def begin_session(self, row: SessionRow, expire_before: int) -> int:
        return self._faults.run("begin_session", lambda: self._index.begin_session(row, expire_before))

    def heartbeat(self, session: SessionId, now: int) -> None:
        self._faults.run("heartbeat", lambda: self._index.heartbeat(session, now))

    def end_session(self, session: SessionId) -> None:
        self._faults.run("end_session", lambda: self._index.end_session(session))

    def sessions(self) -> list[SessionRow]:
        return self._index.sessions()

    def roots(self, session: SessionId) -> Iterator[NodeId]:
        return self._index.roots(session)

    def set_verified(self, number: int, when: int) -> None:
        self._faults.run("set_verified", lambda: self._index.set_verified(number, when))

    def figures(self) -> IndexFigures:
        return self._index.figures()

    def begin_collection(self) -> Collection:
        return self._faults.run("begin_collection", self._index.begin_collection)

    def note_collected(self, points: Collection_[PointId]) -> None:
        self._faults.run("note_collected", lambda: self._index.note_collected(points))

    def collected(self, ids: Sequence[PointId]) -> frozenset[PointId]:
        return self._index.collected(ids)

    def copies(self) -> list[CopyRow]:
        return self._index.copies()

    def note_copies(self, found: CopiesFound) -> None:
        self._faults.run("note_copies", lambda: self._index.note_copies(found))

    def scan_rows(self, after: RecordId | None, limit: int) -> tuple[bytes, bytes]:
        return self._index.scan_rows(after, limit)

    def aliases(self, names: Sequence[bytes]) -> list[RecordId | None]:
        return self._index.aliases(names)

    def scan_aliases(self, after: bytes, limit: int) -> list[tuple[bytes, RecordId]]:
        return self._index.scan_aliases(after, limit)

    def drop_aliases(self, names: Sequence[bytes]) -> None:
        self._faults.run("drop_aliases", lambda: self._index.drop_aliases(names))

    def sweep(self, ids: Sequence[RecordId], before: int) -> Swept:
        return self._faults.run("sweep", lambda: self._index.sweep(ids, before))

    def drop(self, ids: Sequence[RecordId]) -> Swept:
        return self._faults.run("drop", lambda: self._index.drop(ids))

    def lost(self) -> frozenset[RecordId]:
        return self._index.lost()

    def update_pack(self, number: int, update: Callable[[PackRow], PackRow]) -> PackRow | None:
        return self._faults.run("update_pack", lambda: self._index.update_pack(number, update))

    def remove_pack(self, number: int) -> bool:
        return self._faults.run("remove_pack", lambda: self._index.remove_pack(number))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._index.close()
