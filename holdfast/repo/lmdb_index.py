"""The index on LMDB (FORMAT.md, "Index").

Rules that LMDB asks for, kept here so that nobody else has to know them: one environment per file and
process (shared and counted), never across a fork, no transaction held between calls, keys sorted within
a batch (random single insertions would dirty a page each).

LMDB has no checksums. Each row has one (`format.rows`), table `points` has a digest, and the file `head`
beside it remembers the newest transaction that changed a point, so that an index that fell back to an
older state is noticed. Damage that is noticed is always `DamagedIndex`, and the packs can replace the index.

The map is reserved at a fixed 256 GiB of address space (no memory, no disk): room for 2.5 thousand million
records. Growing it while threads read would be unsafe in LMDB.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Collection_
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import lmdb

from holdfast.errors import (
    DamagedIndex,
    DiskFull,
    HoldfastError,
    InternalError,
    PointNotFound,
    SessionGone,
    StorageError,
    storage_error,
)
from holdfast.ids import (
    ID_BYTES,
    SESSION_ID_BYTES,
    NodeId,
    PackId,
    PointId,
    RecordId,
    RepositoryId,
    SessionId,
)
from holdfast.repo.format import rows
from holdfast.repo.format.record import RECORD_HEADER_BYTES
from holdfast.repo.format.rows import (
    CopyRow,
    PackRow,
    PackState,
    Place,
    PointRow,
    PointsDigest,
    SessionRow,
    VerifiedBy,
)
from holdfast.repo.index import Batch, Collection, Committed, CopiesFound, IndexFigures, PointChange, Swept
from holdfast.repo.receipts import Receipts
from holdfast.units import GIB, KIB, MIB

__all__ = ["LmdbIndex"]

DATA_FILE: Final = "data.mdb"
LOCK_FILE: Final = "lock.mdb"
HEAD_FILE: Final = "head"
_MAP_BYTES: Final = 256 * GIB
_SMALL_MAP_BYTES: Final = 8 * GIB
_MOST_READERS: Final = 1024
_LOCK_BYTES: Final = 72 * KIB
"""A little more than that many readers take."""
_TABLES: Final = ("chunks", "packs", "points", "sessions", "roots", "meta")
_NEXT_PACK: Final = b"next_pack"
_EPOCH: Final = b"epoch"
_HEAD: Final = b"head"
_VERSION: Final = b"version"
INDEX_VERSION: Final = 2
"""Of the tables and their rows; an index of another version is rebuilt from the packs."""
_VERSIONS: Final = (1, INDEX_VERSION)
"""That are read. In an index of version 1 no row of `points` says when its point was received."""
_DIGEST: Final = b"points"
_COLLECTED: Final = "collected"
_MARKS: Final = "marks"
_LOST: Final = "lost"
_ALIASES: Final = "aliases"
_COPIES: Final = "copies"
_LATER_TABLES: Final = (_LOST, _COLLECTED, _MARKS, _ALIASES, _COPIES)
"""Tables that read-only media may lack."""
_REPOSITORY: Final = b"repository"
_SCAN_ROWS: Final = 10_000
_MOST_OVERTAKEN: Final = 20
"""How often a reader without locks looks again when writers were too fast for it."""


@dataclass
class _Shared:
    """An environment and how many in this process use it."""

    env: lmdb.Environment
    pid: int
    users: int
    tables: dict[str, lmdb._Database]


_OPEN: dict[tuple[int, int], _Shared] = {}
_OPEN_LOCK: Final = threading.Lock()


@contextlib.contextmanager
def _translated(doing: str, folder: str = "") -> Iterator[None]:
    """LMDB's exceptions as ours.

    Args:
        folder: where it writes, if it does: LMDB reports a write that was cut short by a full disk as EIO.
    """
    try:
        yield
    except lmdb.MapFullError as error:
        raise DiskFull(f"the index has no room left while {doing} ({error})") from error
    except lmdb.ReadersFullError as error:
        raise StorageError(f"too many processes read the index at once while {doing}") from error
    except lmdb.Error as error:
        code = getattr(error, "code", 0)
        if 0 < code < 200:  # an errno of the operating system
            if code == errno.EIO and folder and _is_full(folder):
                code = errno.ENOSPC
            raise storage_error(OSError(code, os.strerror(code)), f"{doing} (index)") from error
        raise DamagedIndex(f"the index is damaged, found while {doing} ({error})") from error
    except MemoryError as error:
        raise DamagedIndex(f"the index is damaged, found while {doing} (impossible size)") from error


def _is_full(folder: str) -> bool:
    with contextlib.suppress(OSError):
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize < MIB
    return False


def _make_lock_file(folder: str) -> None:
    """Gives the lock file its blocks before LMDB maps it: writing to a hole of it on a full disk ends the process."""
    fd = os.open(os.path.join(folder, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if os.fstat(fd).st_size < _LOCK_BYTES:
            os.posix_fallocate(fd, 0, _LOCK_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(fd)


def _open_environment(folder: str, *, read_only: bool) -> lmdb.Environment:
    if not read_only:
        _make_lock_file(folder)
    for map_bytes in (_MAP_BYTES, _SMALL_MAP_BYTES):
        try:
            return lmdb.open(
                folder,
                map_size=map_bytes,
                max_dbs=len(_TABLES) + len(_LATER_TABLES) + 1,
                max_readers=_MOST_READERS,
                mode=0o640,
                readonly=read_only,
                lock=not read_only,
                create=not read_only,
                readahead=False,
                lib_version=0,
            )
        except lmdb.Error as error:
            if getattr(error, "code", 0) != errno.ENOMEM:
                raise
            if map_bytes == _SMALL_MAP_BYTES:  # garbage in its first pages may ask for any size
                raise DamagedIndex(
                    "the index can not be mapped: it is damaged, or this process may have less than 8 GiB of address space"
                ) from error
    raise InternalError("unreachable")


def _open_tables(env: lmdb.Environment, *, create: bool, read_only: bool) -> dict[str, lmdb._Database]:
    """The tables of an environment that nobody else in this process uses yet.

    Only then: the binding waits for the writer while it holds the interpreter's lock, and LMDB wants tables opened
    one at a time.

    Raises:
        DamagedIndex: one is missing.
    """
    tables: dict[str, lmdb._Database] = {}
    for name in _TABLES:
        try:
            tables[name] = env.open_db(name.encode(), create=create)
        except lmdb.NotFoundError:
            raise DamagedIndex("the index lacks a table") from None
    for name in _LATER_TABLES:
        with contextlib.suppress(lmdb.NotFoundError):
            tables[name] = env.open_db(name.encode(), create=False)
        if name not in tables and not read_only:
            tables[name] = env.open_db(name.encode(), create=True)
    return tables


def _with_dead(row: PackRow, count: int, size: int) -> PackRow:
    """The row of a pack in which some live records have died."""
    return replace(
        row,
        records=row.records - count,
        dead_records=row.dead_records + count,
        live_bytes=row.live_bytes - size,
        dead_bytes=row.dead_bytes + size,
    )


class LmdbIndex:
    """See `repo.index.Index`.

    Args:
        folder: of the environment; made if `create`.
        repository: whose index it must be.
        read_only: for media that can not be written: no locks, no changes.
        receipts: tells when each point that is listed was received; None: its row says.
    """

    def __init__(
        self,
        folder: str,
        repository: RepositoryId,
        *,
        create: bool = False,
        read_only: bool = False,
        receipts: Receipts | None = None,
    ) -> None:
        self._folder = folder
        self._read_only = read_only
        self._receipts = receipts
        self._pid = os.getpid()
        self._closed = False
        self._known_packs: dict[PackId, int] = {}
        try:
            if create:
                os.makedirs(folder, mode=0o750, exist_ok=True)
            with _OPEN_LOCK, _translated("opening it", self._folder):
                self._acquire(create=create)
        except OSError as error:
            raise storage_error(error, f"opening the index {folder}") from error
        try:
            with _translated("opening it", self._folder):
                self._prepare(repository, create=create)
        except BaseException:
            self.close()
            raise

    def _acquire(self, *, create: bool) -> None:
        path = os.path.join(self._folder, DATA_FILE)
        shared = None
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            shared = _OPEN.get((status.st_dev, status.st_ino))
            if shared is not None and shared.pid != self._pid:
                raise InternalError("a repository that was open before a fork was opened in the child")
        if shared is None:
            env = _open_environment(self._folder, read_only=self._read_only)
            status = os.stat(path)
            try:
                tables = _open_tables(env, create=create, read_only=self._read_only)
            except BaseException:
                env.close()
                raise
            shared = _OPEN[status.st_dev, status.st_ino] = _Shared(env, self._pid, 0, tables)
            if not self._read_only:
                env.reader_check()
        shared.users += 1
        self._key = (status.st_dev, status.st_ino)
        self._env = shared.env
        self._chunks, self._packs, self._points, self._sessions, self._roots, self._meta = (
            shared.tables[name] for name in _TABLES
        )
        self._lost = shared.tables.get(_LOST)
        self._collected = shared.tables.get(_COLLECTED)
        self._marks = shared.tables.get(_MARKS)
        self._aliases = shared.tables.get(_ALIASES)
        self._copies = shared.tables.get(_COPIES)

    def _prepare(self, repository: RepositoryId, *, create: bool) -> None:
        env = self._env
        if create:
            with env.begin(write=True) as txn:
                meta = self._meta
                if txn.get(_REPOSITORY, db=meta) is None:
                    txn.put(_REPOSITORY, repository, db=meta)
                    txn.put(_VERSION, rows.encode_counter(_VERSION, INDEX_VERSION), db=meta)
                    txn.put(_NEXT_PACK, rows.encode_counter(_NEXT_PACK, 1), db=meta)
                    txn.put(_EPOCH, rows.encode_counter(_EPOCH, 1), db=meta)
                    empty = PointsDigest(0, bytes(32))
                    txn.put(_DIGEST, rows.encode_points_digest(_DIGEST, empty), db=meta)
        head = self._head()  # before the transaction: somebody may commit a point and write it in between
        with env.begin() as txn:
            if txn.get(_REPOSITORY, db=self._meta) != repository:
                raise DamagedIndex("the index belongs to another repository, or is damaged")
            version = rows.decode_counter(_VERSION, txn.get(_VERSION, b"", db=self._meta))
            if version not in _VERSIONS:
                raise DamagedIndex(
                    f"the index has version {version}, this Holdfast uses version {INDEX_VERSION}"
                )
            newest = txn.id()
        if head > newest:
            raise DamagedIndex("the index is older than the repository's newest restore point")

    def _begin(self, *, write: bool = False) -> lmdb.Transaction[bytes]:
        self._require_usable()
        return self._env.begin(write=write)

    def _require_usable(self) -> None:
        if os.getpid() != self._pid:
            raise InternalError("the index crossed a fork")
        if self._closed:
            raise InternalError("the index was used after it was closed")

    # --- lookups

    def lookup(self, ids: Sequence[RecordId]) -> list[Place | None]:
        """See `Index.lookup`."""
        for left in reversed(range(_MOST_OVERTAKEN)):
            with _translated("looking up records"), self._begin() as txn:
                found = dict(txn.cursor(self._chunks).getmulti(ids))
                if not self._is_overtaken(txn) or not left:
                    break
        decode = rows.decode_place
        return [decode(key, value) if (value := found.get(key)) is not None else None for key in ids]

    def _is_overtaken(self, txn: lmdb.Transaction[bytes]) -> bool:
        """Whether writers may have reused pages that a transaction has read: nobody waits for readers without locks.

        A writer leaves alone what the newest two states of the index need (LMDB's `mdb_find_oldest`).
        """
        return self._read_only and bool(self._env.info()["last_txnid"] >= txn.id() + 2)

    def scan(self, after: RecordId | None, limit: int) -> list[tuple[RecordId, Place]]:
        """See `Index.scan`."""
        result: list[tuple[RecordId, Place]] = []
        previous = after or b""
        with _translated("scanning records"), self._begin() as txn:
            cursor = txn.cursor(self._chunks)
            more = cursor.set_range(after) if after is not None else cursor.first()
            if more and after is not None and cursor.key() == after:
                more = cursor.next()
            while more and len(result) < limit:
                key = cursor.key()
                if key <= previous or len(key) != 32:
                    raise DamagedIndex("the keys of the index are out of order")
                result.append((RecordId(key), rows.decode_place(key, cursor.value())))
                previous = key
                more = cursor.next()
        return result

    def packs(self) -> list[PackRow]:
        """See `Index.packs`."""
        with _translated("listing packs"), self._begin() as txn:
            return [rows.decode_pack_row(key, value) for key, value in self._ordered(txn, self._packs)]

    def points(self) -> list[PointRow]:
        """See `Index.points`."""
        with _translated("listing restore points"), self._begin() as txn:
            found = [rows.decode_point_row(key, value) for key, value in self._ordered(txn, self._points)]
            digest = PointsDigest(0, bytes(32))
            for row in found:
                digest = digest.toggled(row.id, 1)
            if digest != self._digest(txn):
                raise DamagedIndex("the index does not list all restore points that it should")
        return found

    def point_states(self) -> dict[PointId, bool]:
        """See `Index.point_states`."""
        return {row.id: row.hidden for row in self.points()}

    def get_points(self, ids: Sequence[PointId]) -> list[PointRow]:
        """See `Index.get_points`."""
        found: list[PointRow] = []
        with _translated("reading restore points"), self._begin() as txn:
            for point in ids:
                value = txn.get(point, db=self._points)
                if value is None:
                    raise PointNotFound(f"restore point {point.hex()[:12]} does not exist any more")
                found.append(rows.decode_point_row(point, value))
        return found

    def changes(self) -> int:
        """See `Index.changes`."""
        with _translated("looking for changes"):
            self._require_usable()
            return int(self._env.info()["last_txnid"])

    def sessions(self) -> list[SessionRow]:
        """See `Index.sessions`."""
        with _translated("listing sessions"), self._begin() as txn:
            return [rows.decode_session_row(key, value) for key, value in self._ordered(txn, self._sessions)]

    def roots(self, session: SessionId) -> Iterator[NodeId]:
        """See `Index.roots`."""
        after = bytes(session)
        while True:
            with _translated("listing roots"), self._begin() as txn:
                page = []
                for key, _ in self._range(txn, session, after):
                    page.append(key)
                    if len(page) == _SCAN_ROWS:
                        break
            for key in page:
                yield NodeId(RecordId(key[len(session) :]))
            if len(page) < _SCAN_ROWS:
                return
            after = page[-1] + b"\0"

    def _range(
        self, txn: lmdb.Transaction[bytes], prefix: bytes, start: bytes
    ) -> Iterator[tuple[bytes, bytes]]:
        cursor = txn.cursor(self._roots)
        more = cursor.set_range(start)
        previous = b""
        while more:
            key = bytes(cursor.key())
            if not key.startswith(prefix):
                return
            if key <= previous:
                raise DamagedIndex("the keys of the index are out of order")
            previous = key
            value = bytes(cursor.value())
            rows.check_root(key, value)
            yield key, value
            more = cursor.next()

    @staticmethod
    def _ordered(txn: lmdb.Transaction[bytes], table: lmdb._Database) -> Iterator[tuple[bytes, bytes]]:
        """All rows; a tree with broken pointers shows itself by keys that do not grow."""
        previous = b""
        for key, value in txn.cursor(table):
            if key <= previous:
                raise DamagedIndex("the keys of the index are out of order")
            previous = key
            yield key, value

    def figures(self) -> IndexFigures:
        """See `Index.figures`."""
        with _translated("counting"), self._begin() as txn:
            chunks, packs, points, sessions = (
                txn.stat(table)["entries"]
                for table in (self._chunks, self._packs, self._points, self._sessions)
            )
            used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        return IndexFigures(chunks, packs, points, sessions, used)

    # --- changes

    def commit(self, batch: Batch) -> Committed:
        """See `Index.commit`."""
        self._check_not_replaced()
        if batch.point is not None and self._receipts is not None:
            batch = replace(batch, point=self._received(batch.point, self._receipts))
        with _translated("committing", self._folder), self._begin(write=True) as txn:
            try:
                committed = self._apply(txn, batch)
            except HoldfastError:
                txn.abort()
                raise
            if committed.gone:
                txn.abort()
                return committed
            number = txn.id()
        if batch.point is not None or batch.changes:
            self._write_head(number)
        return committed

    def _received(self, point: PointRow, receipts: Receipts) -> PointRow:
        """The row with the time of receipt. Outside of the transaction: it is synced before that begins."""
        with _translated("listing a restore point"), self._begin() as txn:
            if txn.get(point.id, db=self._points) is not None:
                return point
        noted_ms = receipts.receive(
            point.id, lambda: [(row.id, row.received_ms) for row in self.points() if row.id != point.id]
        )
        return replace(point, received_ms=noted_ms)

    def _apply(self, txn: lmdb.Transaction[bytes], batch: Batch) -> Committed:
        if batch.session is not None:
            self._beat(txn, batch.session, batch.now)
        gone = self._refresh(txn, sorted(batch.relied))
        if gone:
            return Committed(gone=gone)
        packs = {progress.id: self._pack_row(txn, progress.id, progress.created) for progress in batch.packs}
        live: dict[PackId, int] = dict.fromkeys(packs, 0)
        dead: dict[PackId, int] = dict.fromkeys(packs, 0)
        counts: dict[PackId, int] = dict.fromkeys(packs, 0)
        dead_counts: dict[PackId, int] = dict.fromkeys(packs, 0)
        replaced: dict[int, tuple[int, int]] = {}
        duplicates = self._insert(txn, batch, packs, live, dead, counts, dead_counts, replaced)
        for progress in batch.packs:
            row = packs[progress.id]
            # One with holes was cut off; an adoption that began before that comes too late.
            holed = row.state is PackState.HOLED
            length = row.committed_bytes if holed else max(row.committed_bytes, progress.committed_bytes)
            if length > row.committed_bytes:
                row = replace(row, verified=0, verified_by=VerifiedBy.NOTHING)
            row = replace(
                row,
                state=max(row.state, progress.state),  # a sealed pack is never open again
                committed_bytes=length,
                records=row.records + counts[row.id],
                dead_records=row.dead_records + dead_counts[row.id],
                live_bytes=row.live_bytes + live[row.id],
                dead_bytes=row.dead_bytes + dead[row.id],
            )
            txn.put(rows.pack_key(row.number), rows.encode_pack_row(row), db=self._packs)
        if batch.session is not None:
            for leaf in sorted(set(batch.roots)):
                key = batch.session + leaf
                txn.put(key, rows.encode_root(key), db=self._roots)
        for number, (count, size) in replaced.items():
            self._update_pack(txn, number, lambda row, n=count, b=size: _with_dead(row, n, b))  # type: ignore[misc]
        if batch.point is not None:
            self._add_point(txn, batch.point)
        for change in batch.changes:
            self._change_point(txn, change)
        for name, record_id in sorted(batch.aliases.items()):
            txn.put(name, rows.encode_alias(name, record_id), db=self._aliases)
        if batch.ends_session and batch.session is not None:
            txn.delete(batch.session, db=self._sessions)
        return Committed(duplicates=duplicates, duplicate_bytes=sum(dead.values()))

    def _refresh(self, txn: lmdb.Transaction[bytes], ids: Sequence[RecordId]) -> frozenset[RecordId]:
        """Renews the epoch of records that are relied on; returns those that no longer exist."""
        if not ids:
            return frozenset()
        epoch = rows.decode_counter(_EPOCH, txn.get(_EPOCH, b"", db=self._meta))
        found = dict(txn.cursor(self._chunks).getmulti(ids))
        if len(found) < len(ids):
            return frozenset(record_id for record_id in ids if record_id not in found)
        for key, value in found.items():
            if rows.is_of_epoch(
                value, epoch
            ):  # most are; what they say was verified when they were looked up
                continue
            place = rows.decode_place(key, value)
            txn.put(key, rows.encode_place(RecordId(key), place._replace(epoch=epoch)), db=self._chunks)
        return frozenset()

    def _insert(
        self,
        txn: lmdb.Transaction[bytes],
        batch: Batch,
        packs: dict[PackId, PackRow],
        live: dict[PackId, int],
        dead: dict[PackId, int],
        counts: dict[PackId, int],
        dead_counts: dict[PackId, int],
        replaced: dict[int, tuple[int, int]],
    ) -> int:
        epoch = rows.decode_counter(_EPOCH, txn.get(_EPOCH, b"", db=self._meta))
        duplicates = 0
        put, encode = txn.put, rows.encode_place
        lost = self._lost_ids(txn)
        for record_id, pack, offset, stored, plain, kind in sorted(batch.records):
            place = Place(packs[pack].number, offset, stored, plain, epoch, kind)
            size = RECORD_HEADER_BYTES + stored
            if put(record_id, encode(record_id, place), overwrite=False, db=self._chunks):
                live[pack] += size
                counts[pack] += 1
                if record_id in lost and self._lost is not None:
                    txn.delete(record_id, db=self._lost)
                continue
            there = rows.decode_place(record_id, txn.get(record_id, b"", db=self._chunks))
            if there.epoch != epoch:
                put(record_id, encode(record_id, there._replace(epoch=epoch)), db=self._chunks)
            if batch.replacing.get(record_id) == (there.pack, there.offset):
                put(record_id, encode(record_id, place), db=self._chunks)
                live[pack] += size
                counts[pack] += 1
                count, old = replaced.get(there.pack, (0, 0))
                replaced[there.pack] = count + 1, old + RECORD_HEADER_BYTES + there.stored_bytes
                continue
            if (there.pack, there.offset) != (place.pack, offset):
                dead[pack] += size
                dead_counts[pack] += 1
                duplicates += 1
        return duplicates

    def _pack_row(self, txn: lmdb.Transaction[bytes], pack_id: PackId, created: int) -> PackRow:
        number = self._numbers(txn).get(pack_id)
        if number is not None:
            key = rows.pack_key(number)
            value = txn.get(key, db=self._packs)
            if value is not None:
                return rows.decode_pack_row(key, value)
            del self._known_packs[pack_id]  # it was removed, and has come back
        number = rows.decode_counter(_NEXT_PACK, txn.get(_NEXT_PACK, b"", db=self._meta))
        if number >= 2**32:
            raise StorageError("the repository has used up its pack numbers")
        txn.put(_NEXT_PACK, rows.encode_counter(_NEXT_PACK, number + 1), db=self._meta)
        return PackRow(number, pack_id, PackState.OPEN, 0, 0, 0, 0, 0, created, 0)

    def _numbers(self, txn: lmdb.Transaction[bytes]) -> dict[PackId, int]:
        """Pack id -> number. Rows are only ever added at the end, so what is known is read once."""
        cursor = txn.cursor(self._packs)
        more = cursor.set_range(rows.pack_key(max(self._known_packs.values(), default=0) + 1))
        while more:
            row = rows.decode_pack_row(cursor.key(), cursor.value())
            self._known_packs[row.id] = row.number
            more = cursor.next()
        return self._known_packs

    def _add_point(self, txn: lmdb.Transaction[bytes], point: PointRow) -> None:
        if txn.get(point.id, db=self._points) is not None:
            return  # somebody else has listed it, and may have changed its state since
        if self._collected is not None and txn.get(point.id, db=self._collected) is not None:
            return
        digest = self._digest(txn).toggled(point.id, 1)
        txn.put(_DIGEST, rows.encode_points_digest(_DIGEST, digest), db=self._meta)
        if point.received_ms:  # programs that do not know such rows refuse the index from now on
            txn.put(_VERSION, rows.encode_counter(_VERSION, INDEX_VERSION), db=self._meta)
        txn.put(point.id, rows.encode_point_row(point), db=self._points)

    def _change_point(self, txn: lmdb.Transaction[bytes], change: PointChange) -> None:
        value = txn.get(change.id, db=self._points)
        if value is None:
            raise PointNotFound(f"restore point {change.id.hex()[:12]} does not exist any more")
        row = rows.decode_point_row(change.id, value)
        times = rows.decode_mark_times(change.id, txn.get(change.id, db=self._marks))
        if change.hidden is not None and change.time_ns >= times.hidden_ns:
            row, times = replace(row, hidden=change.hidden), times._replace(hidden_ns=change.time_ns)
        if change.pinned is not None and change.time_ns >= times.pinned_ns:
            row, times = replace(row, pinned=change.pinned), times._replace(pinned_ns=change.time_ns)
        txn.put(row.id, rows.encode_point_row(row), db=self._points)
        txn.put(row.id, rows.encode_mark_times(row.id, times), db=self._marks)

    def _digest(self, txn: lmdb.Transaction[bytes]) -> PointsDigest:
        return rows.decode_points_digest(_DIGEST, txn.get(_DIGEST, b"", db=self._meta))

    def begin_session(self, row: SessionRow, expire_before: int) -> int:
        """See `Index.begin_session`."""
        with _translated("beginning a session", self._folder):
            for session_id in self._dead_sessions(expire_before):
                self.end_session(session_id)
            with self._begin(write=True) as txn:
                others = sum(
                    rows.decode_session_row(key, value).kind == row.kind
                    for key, value in self._ordered(txn, self._sessions)
                )
                for point in row.holds:
                    value = txn.get(point, db=self._points)
                    if value is None or rows.decode_point_row(point, value).hidden:
                        txn.abort()
                        raise PointNotFound(f"restore point {point.hex()[:12]} does not exist any more")
                txn.put(row.id, rows.encode_session_row(row), db=self._sessions)
        return others

    def _dead_sessions(self, expire_before: int) -> list[SessionId]:
        """Sessions without a sign of life, and those that died between their point and the end of their roots."""
        with self._begin() as txn:
            found = [rows.decode_session_row(key, value) for key, value in self._ordered(txn, self._sessions)]
            dead = [session.id for session in found if session.heartbeat < expire_before]
            listed = {session.id for session in found}
            cursor = txn.cursor(self._roots)
            more = cursor.first()
            previous = b""
            while more:
                owner = SessionId(bytes(cursor.key()[:SESSION_ID_BYTES]))
                if owner <= previous:
                    raise DamagedIndex("the keys of the index are out of order")
                previous = owner
                if owner not in listed:
                    dead.append(owner)
                more = cursor.set_range(owner + b"\xff" * (ID_BYTES + 1))
        return dead

    def heartbeat(self, session: SessionId, now: int) -> None:
        """See `Index.heartbeat`."""
        with _translated("renewing a session", self._folder), self._begin(write=True) as txn:
            self._beat(txn, session, now)

    def _beat(self, txn: lmdb.Transaction[bytes], session: SessionId, now: int) -> None:
        value = txn.get(session, db=self._sessions)
        if value is None:
            raise SessionGone(
                "the session of this command has expired or was ended by somebody else",
                hint="run the command again; what was stored is found again",
            )
        txn.put(
            session,
            rows.encode_session_row(rows.decode_session_row(session, value).alive_at(now)),
            db=self._sessions,
        )

    def end_session(self, session: SessionId) -> None:
        """See `Index.end_session`."""
        with _translated("ending a session", self._folder):
            with self._begin(write=True) as txn:
                txn.delete(session, db=self._sessions)
            while True:
                with self._begin(write=True) as txn:
                    page = []
                    for key, _ in self._range(txn, session, bytes(session)):
                        page.append(key)
                        if len(page) == _SCAN_ROWS:
                            break
                    for key in page:
                        txn.delete(key, db=self._roots)
                if len(page) < _SCAN_ROWS:
                    return

    def set_verified(self, number: int, when: int) -> None:
        """See `Index.set_verified`."""
        self.update_pack(number, lambda row: replace(row, verified=when))

    # --- keeping

    def begin_collection(self) -> Collection:
        """See `Index.begin_collection`."""
        with _translated("beginning a collection", self._folder), self._begin(write=True) as txn:
            epoch = rows.decode_counter(_EPOCH, txn.get(_EPOCH, b"", db=self._meta)) + 1
            if epoch >= 2**32:
                raise StorageError("the repository has used up its epochs", hint="rebuild the index")
            txn.put(_EPOCH, rows.encode_counter(_EPOCH, epoch), db=self._meta)
            held = {
                point
                for key, value in self._ordered(txn, self._sessions)
                for point in rows.decode_session_row(key, value).holds
            }
            removed = []
            for key, value in self._ordered(txn, self._points):
                row = rows.decode_point_row(key, value)
                if row.hidden and row.id not in held:
                    removed.append(row.id)
            digest = self._digest(txn)
            for point in removed:
                txn.delete(point, db=self._points)
                txn.delete(point, db=self._marks)
                self._drop_copies(txn, point)
                txn.put(point, rows.encode_root(point), db=self._collected)
                digest = digest.toggled(point, -1)
            txn.put(_DIGEST, rows.encode_points_digest(_DIGEST, digest), db=self._meta)
            number = txn.id()
        if removed:
            self._write_head(number)
        return Collection(epoch, tuple(removed))

    def note_collected(self, points: Collection_[PointId]) -> None:
        """See `Index.note_collected`."""
        with _translated("noting collected points", self._folder), self._begin(write=True) as txn:
            for point in sorted(points):
                txn.put(point, rows.encode_root(point), db=self._collected)

    def collected(self, ids: Sequence[PointId]) -> frozenset[PointId]:
        """See `Index.collected`."""
        if self._collected is None:
            return frozenset()
        with _translated("looking up collected points"), self._begin() as txn:
            return frozenset(point for point in ids if txn.get(point, db=self._collected) is not None)

    def copies(self) -> list[CopyRow]:
        """See `Index.copies`."""
        if self._copies is None:
            return []
        with _translated("listing copies"), self._begin() as txn:
            return [rows.decode_copy_row(key, value) for key, value in self._ordered(txn, self._copies)]

    def note_copies(self, found: CopiesFound) -> None:
        """See `Index.note_copies`."""
        sampled, read = frozenset(found.sampled), frozenset(found.read)
        with _translated("noting copies", self._folder), self._begin(write=True) as txn:
            for point in sorted(found.absent):
                txn.delete(rows.copy_key(point, found.repository), db=self._copies)
            for point in sorted(found.compared):
                if txn.get(point, db=self._points) is None:
                    continue
                key = rows.copy_key(point, found.repository)
                value = txn.get(key, db=self._copies)
                known = rows.decode_copy_row(key, value) if value is not None else None
                row = CopyRow(
                    point,
                    found.repository,
                    found.when,
                    found.when if point in sampled else known.sampled if known else 0,
                    found.when if point in read else known.read if known else 0,
                    found.address,
                )
                txn.put(key, rows.encode_copy_row(row), db=self._copies)

    def _drop_copies(self, txn: lmdb.Transaction[bytes], point: PointId) -> None:
        cursor = txn.cursor(self._copies)
        while cursor.set_range(point) and cursor.key().startswith(point):
            cursor.delete()

    def scan_rows(self, after: RecordId | None, limit: int) -> tuple[bytes, bytes]:
        """See `Index.scan_rows`."""
        with _translated("scanning records"), self._begin() as txn:
            cursor = txn.cursor(self._chunks)
            more = cursor.set_range(after) if after is not None else cursor.first()
            if more and after is not None and cursor.key() == after:
                more = cursor.next()
            found = list(islice(cursor.iternext(), limit)) if more else []
        keys, values = b"".join([key for key, _ in found]), b"".join([value for _, value in found])
        if len(keys) != ID_BYTES * len(found) or len(values) != rows.PLACE_BYTES * len(found):
            raise DamagedIndex("a row of the index (chunks) has a wrong length")
        if found and after is not None and found[0][0] <= after:
            raise DamagedIndex("the keys of the index are out of order")
        return keys, values

    def sweep(self, ids: Sequence[RecordId], before: int) -> Swept:
        """See `Index.sweep`."""
        return self._take_out("sweeping", ids, lambda _id, place: place.epoch < before, remember=False)

    def drop(self, damaged: Mapping[RecordId, tuple[int, int]]) -> Swept:
        """See `Index.drop`."""
        return self._take_out(
            "dropping damaged records",
            list(damaged),
            lambda record_id, place: damaged[record_id] == (place.pack, place.offset),
            remember=True,
        )

    def _take_out(
        self,
        doing: str,
        ids: Sequence[RecordId],
        wanted: Callable[[RecordId, Place], bool],
        *,
        remember: bool,
    ) -> Swept:
        by_pack: dict[int, tuple[int, int]] = {}
        with _translated(doing, self._folder), self._begin(write=True) as txn:
            for record_id in sorted(set(ids)):
                value = txn.get(record_id, db=self._chunks)
                if value is None:
                    continue
                place = rows.decode_place(record_id, value)
                if not wanted(record_id, place):  # somebody has come to rely on it, or has put it elsewhere
                    continue
                txn.delete(record_id, db=self._chunks)
                if remember and self._lost is not None:
                    txn.put(record_id, rows.encode_root(record_id), db=self._lost)
                count, size = by_pack.get(place.pack, (0, 0))
                by_pack[place.pack] = count + 1, size + RECORD_HEADER_BYTES + place.stored_bytes
            for number, (count, size) in by_pack.items():
                self._update_pack(txn, number, lambda row, n=count, b=size: _with_dead(row, n, b))  # type: ignore[misc]
        return Swept(sum(count for count, _ in by_pack.values()), sum(size for _, size in by_pack.values()))

    def lost(self) -> frozenset[RecordId]:
        """See `Index.lost`."""
        with _translated("listing lost records"), self._begin() as txn:
            # A writer that began before the table was made does not know of it, and stores without striking off.
            return frozenset(i for i in self._lost_ids(txn) if txn.get(i, db=self._chunks) is None)

    def _lost_ids(self, txn: lmdb.Transaction[bytes]) -> frozenset[RecordId]:
        if self._lost is None:
            return frozenset()
        return frozenset(RecordId(bytes(key)) for key, _ in self._ordered(txn, self._lost))

    def aliases(self, names: Sequence[bytes]) -> list[RecordId | None]:
        """See `Index.aliases`."""
        if self._aliases is None:
            return [None] * len(names)
        with _translated("looking up aliases"), self._begin() as txn:
            found = dict(txn.cursor(self._aliases).getmulti(names))
        return [
            rows.decode_alias(name, value) if (value := found.get(name)) is not None else None
            for name in names
        ]

    def scan_aliases(self, after: bytes, limit: int) -> list[tuple[bytes, RecordId]]:
        """See `Index.scan_aliases`."""
        result: list[tuple[bytes, RecordId]] = []
        if self._aliases is None:
            return result
        with _translated("scanning aliases"), self._begin() as txn:
            cursor = txn.cursor(self._aliases)
            more = cursor.set_range(after + b"\0")
            while more and len(result) < limit:
                name = bytes(cursor.key())
                if result and name <= result[-1][0]:
                    raise DamagedIndex("the keys of the index are out of order")
                result.append((name, rows.decode_alias(name, bytes(cursor.value()))))
                more = cursor.next()
        return result

    def drop_aliases(self, names: Sequence[bytes]) -> None:
        """See `Index.drop_aliases`."""
        with _translated("dropping aliases", self._folder), self._begin(write=True) as txn:
            for name in sorted(names):
                txn.delete(name, db=self._aliases)

    def update_pack(self, number: int, update: Callable[[PackRow], PackRow]) -> PackRow | None:
        """See `Index.update_pack`."""
        with _translated("changing a pack's row", self._folder), self._begin(write=True) as txn:
            return self._update_pack(txn, number, update)

    def _update_pack(
        self, txn: lmdb.Transaction[bytes], number: int, update: Callable[[PackRow], PackRow]
    ) -> PackRow | None:
        key = rows.pack_key(number)
        value = txn.get(key, db=self._packs)
        if value is None:
            return None
        row = update(rows.decode_pack_row(key, value))
        txn.put(key, rows.encode_pack_row(row), db=self._packs)
        return row

    def remove_pack(self, number: int) -> bool:
        """See `Index.remove_pack`."""
        key = rows.pack_key(number)
        with _translated("forgetting a pack", self._folder), self._begin(write=True) as txn:
            value = txn.get(key, db=self._packs)
            if value is None or rows.decode_pack_row(key, value).records:
                return False
            txn.delete(key, db=self._packs)
            return True

    # --- the head file

    def _head(self) -> int:
        """The newest transaction that changed a point, as far as is known; 0 if nothing is known."""
        try:
            with open(os.path.join(self._folder, HEAD_FILE), "rb") as file:
                return rows.decode_counter(_HEAD, file.read(64))
        except (FileNotFoundError, HoldfastError):
            return 0
        except OSError as error:
            raise storage_error(error, "reading the index's head") from error

    def _write_head(self, transaction: int) -> None:
        with self._begin() as txn:  # one that changed nothing has left no trace
            transaction = min(transaction, txn.id())
        path = os.path.join(self._folder, HEAD_FILE)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with contextlib.suppress(OSError):  # it only helps to notice damage; the commit stands
            with open(temporary, "wb") as file:
                file.write(rows.encode_counter(_HEAD, transaction))
            os.replace(temporary, path)

    def _check_not_replaced(self) -> None:
        try:
            status = os.stat(os.path.join(self._folder, DATA_FILE))
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._key:
            raise DamagedIndex("the index was removed or replaced while it was in use")

    def close(self) -> None:
        """See `Index.close`."""
        if self._closed:
            return
        self._closed = True
        with _OPEN_LOCK:
            shared = _OPEN.get(self._key)
            if shared is not None and shared.env is self._env:
                shared.users -= 1
                if not shared.users:
                    del _OPEN[self._key]
                    if os.getpid() == self._pid:
                        shared.env.close()
