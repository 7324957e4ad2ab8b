"""The index: where each record is, which packs, restore points and sessions there are.

It is derivable from the packs and never the only copy of anything. This module holds the Protocol and
its value types; `repo.lmdb_index` implements it. Every method is one short transaction; no transaction
is held between calls, so nothing here ever waits for somebody's I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Collection_
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from holdfast.ids import NodeId, PackId, PointId, RecordId, RepositoryId, SessionId
from holdfast.repo.format.rows import CopyRow, PackRow, PackState, Place, PointRow, SessionRow

__all__ = [
    "Batch",
    "Collection",
    "Committed",
    "CopiesFound",
    "Index",
    "IndexFigures",
    "NewRecord",
    "PackProgress",
    "PointChange",
    "Swept",
]


class NewRecord(NamedTuple):
    """A record that has become durable in a pack. A named tuple: there is one per chunk of a batch."""

    id: RecordId
    pack: PackId
    offset: int
    stored_bytes: int
    plain_bytes: int
    kind: int


@dataclass(frozen=True, slots=True)
class PackProgress:
    """How far a pack has come. What the index knows already stays: no pack gets shorter, or open again."""

    id: PackId
    committed_bytes: int
    state: PackState
    created: int


@dataclass(frozen=True, slots=True)
class PointChange:
    """What becomes of a listed point; None leaves it as it is.

    Args:
        time_ns: of the mark that says so, nanoseconds since 1970. What a later one has said stays.
    """

    id: PointId
    time_ns: int
    hidden: bool | None = None
    pinned: bool | None = None


@dataclass(slots=True)
class Batch:
    """What becomes visible in one transaction.

    Args:
        session: whose batch it is; None for recovery, which has none.
        relied: ids that were found in the index, and that the batch's leaves build upon.
        roots: leaves that are complete with this batch.
        point: the restore point that this batch finishes. One that is listed already, or was collected, stays so.
        changes: of points that are listed; if one is not, nothing is committed.
        replacing: records among `records` that take the place of one elsewhere, if it is still there:
            id -> (number of the pack, offset) of the old one.
        ends_session: the session is over when the batch is in.
        aliases: name -> record: hashes made elsewhere, of records that the batch stores or relies on.
    """

    session: SessionId | None
    now: int
    records: list[NewRecord] = field(default_factory=list)
    relied: set[RecordId] = field(default_factory=set)
    roots: list[NodeId] = field(default_factory=list)
    packs: list[PackProgress] = field(default_factory=list)
    point: PointRow | None = None
    changes: list[PointChange] = field(default_factory=list)
    replacing: Mapping[RecordId, tuple[int, int]] = field(default_factory=dict)
    ends_session: bool = False
    aliases: Mapping[bytes, RecordId] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Committed:
    """What came of a batch.

    Args:
        gone: relied-on ids that no longer exist. If there are any, nothing was committed.
        duplicate_bytes: stored bytes of records that another writer had committed first.
    """

    gone: frozenset[RecordId] = frozenset()
    duplicates: int = 0
    duplicate_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Collection:
    """The beginning of a garbage collection.

    Args:
        epoch: what is added or relied on from now on has this epoch.
        removed: points that were hidden and held by nobody; they are not listed any more.
    """

    epoch: int
    removed: tuple[PointId, ...]


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep took out of the index; bytes are stored ones, headers included."""

    records: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CopiesFound:
    """What a replication has found of copies of our points in another repository.

    Args:
        repository, address: the other one.
        when: Unix seconds.
        compared: points that both list.
        sampled, read: those among them that were proven there, in part or as a whole.
        absent: points that are not listed there.
    """

    repository: RepositoryId
    address: str
    when: int
    compared: Sequence[PointId]
    sampled: Sequence[PointId] = ()
    read: Sequence[PointId] = ()
    absent: Sequence[PointId] = ()


@dataclass(frozen=True, slots=True)
class IndexFigures:
    """Size of the index, for statistics and benchmarks."""

    records: int
    packs: int
    points: int
    sessions: int
    used_bytes: int


class Index(Protocol):
    """The ordered tables of a repository. Thread-safe, and safe between processes."""

    def lookup(self, ids: Sequence[RecordId]) -> list[Place | None]:
        """The place of each id, in order, from one snapshot.

        Raises:
            DamagedIndex: a row is damaged.
        """
        ...

    def commit(self, batch: Batch) -> Committed:
        """Makes a batch visible, all or nothing.

        Durability: the batch is on disk on return. Everything it names must be durable before.

        Raises:
            SessionGone: the session has expired; nothing was committed.
            StorageError, DamagedIndex: nothing was committed.
        """
        ...

    def scan(self, after: RecordId | None, limit: int) -> list[tuple[RecordId, Place]]:
        """Up to `limit` rows of `chunks` in key order, beginning behind `after`."""
        ...

    def packs(self) -> list[PackRow]:
        """All packs by number. One row of about 200 bytes for each pack."""
        ...

    def points(self) -> list[PointRow]:
        """All restore points, the hidden ones too, by id.

        Raises:
            DamagedIndex: a row is damaged, or one is missing.
        """
        ...

    def point_states(self) -> dict[PointId, bool]:
        """The ids of all restore points, and whether each is hidden: what `points` costs without its manifests."""
        ...

    def get_points(self, ids: Sequence[PointId]) -> list[PointRow]:
        """Some restore points, in the order of `ids`.

        Raises:
            PointNotFound: one of them does not exist any more.
            DamagedIndex: a row is damaged.
        """
        ...

    def changes(self) -> int:
        """A number that is another one whenever something was committed, by whichever process. Costs nothing."""
        ...

    def begin_session(self, row: SessionRow, expire_before: int) -> int:
        """Records a session and drops those whose heartbeat is older than `expire_before`.

        Returns:
            How many sessions of its kind there were before it: no two that begin at the same moment get the
            same answer.

        Raises:
            PointNotFound: a point that it holds does not exist or is hidden.
        """
        ...

    def heartbeat(self, session: SessionId, now: int) -> None:
        """Records a sign of life.

        Raises:
            SessionGone: the session has expired.
        """
        ...

    def end_session(self, session: SessionId) -> None:
        """Drops a session and its roots. It is no error if there is none."""
        ...

    def sessions(self) -> list[SessionRow]:
        """All sessions."""
        ...

    def roots(self, session: SessionId) -> Iterator[NodeId]:
        """The leaves that a session has completed."""
        ...

    def set_verified(self, number: int, when: int) -> None:
        """Records that all bytes of a pack have been verified. When a pack grows, that is forgotten."""
        ...

    def figures(self) -> IndexFigures:
        """Counts and size."""
        ...

    # --- keeping

    def begin_collection(self) -> Collection:
        """Begins a new epoch and takes hidden points that no session holds out of the list.

        Durability: on disk on return.
        """
        ...

    def note_collected(self, points: Collection_[PointId]) -> None:
        """Remembers points as collected: they are never listed again, whoever finds their manifests."""
        ...

    def collected(self, ids: Sequence[PointId]) -> frozenset[PointId]:
        """Those among some ids that belong to points which were collected."""
        ...

    def copies(self) -> list[CopyRow]:
        """What is known of copies of the points in other repositories, by point."""
        ...

    def note_copies(self, found: CopiesFound) -> None:
        """Remembers copies of points that are listed or hidden here; of others nothing is noted.

        Only a note: an index that is rebuilt has lost it.
        """
        ...

    def scan_rows(self, after: RecordId | None, limit: int) -> tuple[bytes, bytes]:
        """Up to `limit` rows of `chunks` in key order, behind `after`: the keys (32 bytes each), the values (26 each).

        The values have not been verified; see `rows.decode_place`.
        """
        ...

    def sweep(self, ids: Sequence[RecordId], before: int) -> Swept:
        """Drops those records that are of an epoch before `before`; their bytes in the packs are dead then.

        One short transaction: callers pass some thousand ids at a time.
        """
        ...

    def drop(self, damaged: Mapping[RecordId, tuple[int, int]]) -> Swept:
        """Drops records that are damaged, and remembers them as lost until they are stored again.

        Args:
            damaged: id -> (number of the pack, offset) of what is damaged. A record that is elsewhere by now stays.
        """
        ...

    def lost(self) -> frozenset[RecordId]:
        """Records that were dropped as damaged and have not been stored again."""
        ...

    def aliases(self, names: Sequence[bytes]) -> list[RecordId | None]:
        """The record that each name stands for, in order, if it is known. It may have been collected since.

        A name that is the id of a leaf stands for the digest of its parts.
        """
        ...

    def scan_aliases(self, after: bytes, limit: int) -> list[tuple[bytes, RecordId]]:
        """Up to `limit` names behind `after`, in order, with their records."""
        ...

    def drop_aliases(self, names: Sequence[bytes]) -> None:
        """Forgets names. One short transaction."""
        ...

    def update_pack(self, number: int, update: Callable[[PackRow], PackRow]) -> PackRow | None:
        """Changes the row of a pack; returns it, or None if there is no such pack."""
        ...

    def remove_pack(self, number: int) -> bool:
        """Forgets a pack in which no record is live; False if there are some, or no such pack."""
        ...

    def close(self) -> None:
        """Releases it. May be called twice."""
        ...
