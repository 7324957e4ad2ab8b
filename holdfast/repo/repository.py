"""A repository as its users hold it: the surface that the command line and other programs work with.

    with Repository.open("/backup/repo") as repository:
        for point in repository.points():
            print(point.short_id, point.manifest.vm_name)
        with repository.open_disk(point, "web1.vmdk") as disk:
            disk.seek(1 << 20)
            data = disk.read(4096)

This module joins the parts and decides nothing that they do not: which index to open, which locks to take,
in which order things happen. Keys are asked for when they are first needed, never before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time as _time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from holdfast.chunker import ChunkerParams, make_chunker
from holdfast.disk import BlockSink, Machine
from holdfast.errors import (
    DamagedConfig,
    DamagedData,
    DamagedPoint,
    DiskFull,
    HoldfastError,
    IntegrityError,
    InternalError,
    PointNotFound,
    StorageDenied,
    StorageError,
    UnsupportedFormat,
    UsageError,
    WrongPassword,
)
from holdfast.ids import PointId, RecordId, RepositoryId, SessionId
from holdfast.repo import keys as key_slots
from holdfast.repo.codec import Opener, Sealer
from holdfast.repo.format.config import Cipher, Compression, Config, KeySlot, decode_config, encode_config
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.mark import Action, Mark, encode_mark
from holdfast.repo.format.record import Kind
from holdfast.repo.format.rows import CopyRow, PackRow, PointRow
from holdfast.repo.index import Batch, Index, IndexFigures, PointChange
from holdfast.repo.keys import Keys
from holdfast.repo.lease import Lease, new_session_row
from holdfast.repo.ledger import Budget, ReadTally, verified_at
from holdfast.repo.parallel import usable_cores
from holdfast.repo.place import Place, place_of
from holdfast.repo.points import Point, find_disk, open_point, points_of_vm, resolve_point
from holdfast.repo.reader import DiskReader
from holdfast.repo.records import RecordReader
from holdfast.repo.recover import Home, Rebuilt, adopt_strays, rebuild_index
from holdfast.repo.restore import RestoreCounters, restore_contents
from holdfast.repo.session import Session
from holdfast.repo.tree import TreeReader
from holdfast.units import MIB

if TYPE_CHECKING:
    from holdfast.repo.backup import BackupOptions, BackupSummary, Engine
    from holdfast.repo.check import Checker, CheckReport
    from holdfast.repo.copies import SeenCopies, Side
    from holdfast.repo.gc import CollectOptions, CollectReport
    from holdfast.repo.live import LivePoints
    from holdfast.repo.mirror import Gone
    from holdfast.repo.prove import Proven
    from holdfast.repo.repair import Donor, RepairReport
    from holdfast.repo.replicate import ReplicateOptions, ReplicateReport

__all__ = ["InitOptions", "Repository", "RepositoryStatistics"]

DEFAULT_SEGMENT_BYTES: Final = 16 * MIB
DEFAULT_PACK_BYTES: Final = 256 * MIB

_WAITING_WORKERS: Final = 6
"""More than one per core, where the repository is far: they wait for answers."""

Passwords = Callable[[], str]
Notify = Callable[[str], None]


def _say_on_stderr(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201 - the library's default; the command line has its own


@dataclass(frozen=True, slots=True)
class InitOptions:
    """What a new repository is like; see `Config`."""

    cipher: Cipher | None = None
    chunker: str = "aligned"
    chunk_size_bytes: int = 64 << 10
    compression_level: int = 1
    compression_auto: bool = False
    segment_bytes: int = DEFAULT_SEGMENT_BYTES
    pack_bytes: int = DEFAULT_PACK_BYTES


class _Ahead:
    """A password that is being tried in a thread: it takes a third of a second on purpose."""

    def __init__(self, config: Config, password: str) -> None:
        self._outcome: tuple[bytes, KeySlot] | HoldfastError | None = None
        self._config = config
        self._thread = threading.Thread(target=self._work, args=(password,), daemon=True)
        self._thread.start()

    def _work(self, password: str) -> None:
        try:
            self._outcome = key_slots.unlock(self._config, [password])
        except HoldfastError as error:
            self._outcome = error

    def result(self) -> tuple[bytes, KeySlot]:
        """The master key and its slot.

        Raises:
            WrongPassword, DamagedConfig: as `keys.unlock`.
        """
        self._thread.join()
        if isinstance(self._outcome, HoldfastError):
            raise self._outcome
        if self._outcome is None:
            raise InternalError("unlocking the repository failed without a reason")
        return self._outcome


@dataclass(frozen=True, slots=True)
class RepositoryStatistics:
    """Figures of a repository or of one of its VMs. All sizes in bytes.

    Args:
        size_bytes: virtual size of all points together.
        packs_bytes: length of all packs, as committed.
        live_bytes: of those, records that the index points to.
        oldest_verification: Unix seconds; 0 if some pack was never verified; None without packs.
        oldest_unverified: Unix seconds since which some byte was not verified: the oldest verification of a pack, or
            the making of one that never was; None without packs.
        verified_bytes: of all packs that were verified since they last grew.
    """

    vms: int
    points: int
    size_bytes: int
    packs: int
    packs_bytes: int
    live_bytes: int
    dead_bytes: int
    index: IndexFigures
    oldest_verification: int | None
    oldest_unverified: int | None = None
    verified_bytes: int = 0


class Repository:
    """See the module. Not thread-safe, but for the readers that it hands out."""

    def __init__(self, place: Place, config: Config, password: Passwords | None, notify: Notify) -> None:
        self._place = place
        self.config = config
        self._password = password
        self._notify = notify
        self._store = place.store
        self._index_: Index | None = None
        self._keys_: Keys | None = None
        self._master: tuple[bytes, KeySlot] | None = None
        self._records_: RecordReader | None = None
        self._trees_: TreeReader | None = None
        self._ahead: _Ahead | None = None

    # --- opening

    @classmethod
    def init(
        cls,
        path: str,
        options: InitOptions | None = None,
        *,
        password: Passwords | str | None = None,
        like: Repository | None = None,
        notify: Notify = _say_on_stderr,
    ) -> Repository:
        """Makes a new repository and opens it.

        Args:
            like: take key and chunking from this one: then records are replicated between the two as they are. Of the
                options only compression and the size of packs count.

        Durability: it is on disk on return.

        Raises:
            RepositoryExists: the place is in use.
            UsageError: an option is out of bounds, or a password is missing.
        """
        options = options or InitOptions()
        master = b""
        if like is not None:
            there = like.config
            options = replace(
                options,
                cipher=there.encryption.cipher if there.encryption else None,
                chunker=there.chunker,
                chunk_size_bytes=there.chunk_size_bytes,
                segment_bytes=there.segment_bytes,
            )
            if there.encryption is not None:
                master = like.export_key()
        params = ChunkerParams(options.chunker, options.chunk_size_bytes)
        make_chunker(params)  # refuses what it can not do
        now = int(_time.time())
        config = Config(
            id=RepositoryId(os.urandom(16)),
            created=now,
            chunker=options.chunker,
            chunk_size_bytes=options.chunk_size_bytes,
            segment_bytes=options.segment_bytes,
            pack_bytes=options.pack_bytes,
            compression=Compression(options.compression_level, options.compression_auto),
            encryption=None,
        )
        source = _password_source(password)
        if options.cipher is not None:
            master = master or key_slots.new_master_key()
            text = source() if source else ""
            config = key_slots.with_encryption(config, options.cipher, master, text, now)
        _require_readable(config)
        place = place_of(path)
        try:
            place.create(config)
        except BaseException:
            place.release()
            raise
        repository = cls(place, config, source, notify)
        if config.encryption is not None:
            repository._master = (master, config.encryption.slots[0])
        try:
            if place.own_index(lambda: place.index_exists(config.id)) and not place.index_exists(config.id):
                with place.replacing_index(config.id):  # an index is there as a whole or not at all
                    pass
            repository._index_ = place.open_index(config.id)
        except BaseException:
            repository.close()
            raise
        return repository

    @classmethod
    def open(
        cls,
        path: str,
        *,
        password: Passwords | str | None = None,
        notify: Notify = _say_on_stderr,
        place: Callable[[], Place] | None = None,
    ) -> Repository:
        """Opens a repository. Nothing but its configuration is read yet.

        Args:
            path: or the address of a repository on another host; see `place_of`.
            password: of an encrypted repository, or a function that asks for it.
            notify: receives sentences that the user should see, such as that the index is rebuilt.
            place: the place itself, where that is being reached already; it is the repository's then.

        Raises:
            NoRepository, UnsupportedFormat, DamagedConfig: as they say.
            LinkError: the other host can not be reached.
        """
        found = place_of(path) if place is None else place()
        try:
            read = found.read_config()
            if read.warning:
                notify(read.warning)
            return cls(found, read.config, _password_source(password), notify)
        except BaseException:
            found.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases everything. May be called twice."""
        if self._index_ is not None:
            self._index_.close()
            self._index_ = None
        self._store.close()
        self._place.release()

    def notify_by(self, notify: Notify) -> None:
        """Sends what the user should see somewhere else from now on."""
        self._notify = notify

    def detach(self) -> None:
        """Lets go of a connection to another host, which must not cross a fork; keys that are unlocked stay so.

        Nothing else may be done then before `attach`. A repository of this machine needs neither.
        """
        if self._place.is_far:
            self.close()
            self._records_ = self._trees_ = None

    def attach(self) -> None:
        """Connects anew after `detach`, in whichever process.

        Raises:
            LinkError: the other host can not be reached.
            NoRepository, UnsupportedFormat, DamagedConfig: as `open`.
        """
        if self._place.is_far:
            self._place = place_of(self._place.path)
            self._store = self._place.store
            self.config = self._place.read_config().config

    def use_streams(self, count: int) -> None:
        """Moves data over so many streams to another host at once, however near it is; else as many as do it good.

        Raises:
            UsageError: there may not be so many.
        """
        self._place.use_streams(count)

    @property
    def is_far(self) -> bool:
        """Whether each question to it takes a round trip over a network."""
        return self._place.is_far

    @property
    def path(self) -> str:
        """Where it is."""
        return self._place.path

    # --- parts that are opened when they are needed

    def _index(self) -> Index:
        if self._index_ is None:
            self._index_ = self._place.open_index(self.config.id)
            if self._index_ is None:
                if self._place.own_index(lambda: self._place.index_exists(self.config.id)):
                    self._notify("the repository has no index; it is rebuilt from the packs")
                    self._rebuild(lambda _done, _total: None)
                return self._index()
            if self._place.index_is_outside(self.config.id):
                self._catch_up()
                return self._index_ or self._index()
        return self._index_

    def _catch_up(self) -> None:
        """Takes into an index that lies outside of the repository what others have added to the packs."""
        index = self._index()
        known = {row.id: row for row in index.packs()}
        present = set(self._store.ids())
        if known.keys() - present:
            self._notify("packs have been removed since this index was last used; it is rebuilt")
            self._rebuild(lambda _done, _total: None)
            return
        if self._place.is_writable():
            adopt_strays(self._store, index, self._home(), int(_time.time()), grown=True)

    def unlock(self) -> Keys:
        """The keys of the repository; asks for the password if it is the first time.

        Raises:
            WrongPassword: the password opens nothing, or there is none.
        """
        if self._keys_ is None:
            if self.config.encryption is None:
                self._keys_ = key_slots.clear_keys()
            else:
                self._keys_ = key_slots.secret_keys(self.config.encryption.cipher, self._unlock_master()[0])
        return self._keys_

    def _unlock_master(self) -> tuple[bytes, KeySlot]:
        if self._master is None:
            if self._password is None:
                raise WrongPassword(
                    "the repository is encrypted and no password was given",
                    hint="set HOLDFAST_PASSWORD, HOLDFAST_PASSWORD_FILE or HOLDFAST_PASSWORD_COMMAND",
                )
            ahead = self._ahead or _Ahead(self.config, self._password())
            self._ahead = None
            self._master = ahead.result()
        return self._master

    def unlock_ahead(self) -> None:
        """Gets the password and begins to unlock in a thread; whoever needs the keys waits, and gets the errors.

        Raises:
            WrongPassword: the password can not be got.
        """
        if self.config.encryption is not None and self._master is None and self._password is not None:
            self._ahead = _Ahead(self.config, self._password())

    def _reading(self) -> tuple[RecordReader, TreeReader]:
        if self._records_ is None or self._trees_ is None:
            self._records_ = RecordReader(self._store, self._index(), Opener(self.unlock()))
            self._trees_ = TreeReader(self._records_)
        return self._records_, self._trees_

    # --- restore points

    def live(self, kind: str, cache_bytes: int, vm: str | None = None) -> LivePoints:
        """The restore points as they are at any moment, for a process that stays; see `repo.live`.

        Args:
            kind: what the process is called as a session: `mount`.
            vm: only points of this VM.

        Raises:
            DamagedIndex: the index does not hold what it should.
        """
        from holdfast.repo.live import LivePoints

        return LivePoints(
            self._store,
            self._index(),
            Opener(self.unlock()),
            kind,
            cache_bytes,
            vm,
            _time.time,
            _time.monotonic,
            self._notify,
            writable=self._place.is_writable(),
        )

    def points(self, vm: str | None = None) -> list[Point]:
        """The restore points, oldest first; of one VM if its name or UUID is given.

        Raises:
            PointNotFound: there is no such VM.
            DamagedIndex: the index does not hold what it should.
        """
        found = self._opened(row for row in self._index().points() if not row.hidden)
        return found if vm is None else points_of_vm(found, vm)

    def _opened(self, rows: Iterable[PointRow]) -> list[Point]:
        """The points of some rows, oldest first."""
        opener = Opener(self.unlock())
        found: list[Point] = []
        for row in rows:
            try:
                found.append(open_point(row, opener))
            except UnsupportedFormat as error:
                self._notify(f"restore point {row.id.hex()[:12]} is left out: {error.message}")
        return sorted(found, key=lambda p: (p.manifest.time, p.manifest.received_ms, p.id))

    def resolve(self, text: str) -> Point:
        """The point that `VM@latest`, `VM@latest~2`, `VM@TIME` or a unique id prefix names."""
        return resolve_point(self.points(), text)

    def open_disk(self, point: Point | str, disk: str) -> DiskReader:
        """A disk of a restore point as a seekable, read-only file.

        Args:
            disk: name (`web1.vmdk`) or label (`scsi0:0`).
        """
        found = self.resolve(point) if isinstance(point, str) else point
        return self.open_content(find_disk(found, disk).tree)

    def open_content(self, tree: ContentTree) -> DiskReader:
        """The content of a disk or file as a seekable, read-only file."""
        records, trees = self._reading()
        return DiskReader(records, trees, tree)

    @contextlib.contextmanager
    def holding(self, kind: str, points: Sequence[Point]) -> Iterator[None]:
        """Keeps restore points from being collected while they are read.

        Where that can not be recorded (a full disk), they are read all the same.
        """
        index = self._index()
        if not self._place.is_writable():
            yield
            return
        held = tuple(point.id for point in points)
        lease = Lease(index, new_session_row(kind, int(_time.time()), held), _time.time)
        try:
            lease.begin()
        except StorageError as error:
            self._notify(f"what is read can not be protected from garbage collection: {error.message}")
        try:
            yield
        finally:
            with contextlib.suppress(StorageError):  # it expires
                lease.end()

    def restore(
        self,
        point: Point,
        contents: Sequence[tuple[ContentTree, BlockSink]],
        *,
        workers: int | None = None,
        on_progress: Callable[[RestoreCounters], None] = lambda _counters: None,
        allow_damaged: bool = False,
    ) -> RestoreCounters:
        """Writes contents of a point into sinks. Finishing or aborting the sinks is left to the caller.

        Packs of which it has read and proven everything that is alive count as verified then.

        Args:
            allow_damaged: leave what can not be read as holes; the counters list it.

        Raises:
            DamagedData: something is missing or damaged, and that is not allowed.
        """
        index = self._index()
        tally = ReadTally(index.packs())
        records = RecordReader(self._store, index, Opener(self.unlock()), tally)
        with self.holding("restore", [point]):
            counters = restore_contents(
                records,
                TreeReader(records),
                contents,
                workers or (usable_cores() + _WAITING_WORKERS if self.is_far else None),
                on_progress,
                allow_damaged=allow_damaged,
            )
        if self._place.is_writable():
            with contextlib.suppress(
                HoldfastError
            ):  # nothing of it is needed, the manifest's pack may count too
                records.load_one(RecordId(point.id), Kind.MANIFEST)
            tally.settle(index, int(_time.time()))
        return counters

    def verified_at(self, points: Sequence[Point]) -> dict[PointId, int]:
        """For each point the Unix time of the oldest verification among what it needs; 0 if some was never verified.

        Cost: see `ledger.verified_at`.
        """
        _, trees = self._reading()
        return verified_at(trees, self._index(), points)

    def changed_ranges(self, old: ContentTree, new: ContentTree) -> Iterator[tuple[int, int]]:
        """Yields (offset, length) of what differs between two contents, by chunk borders, ascending."""
        _, trees = self._reading()
        yield from trees.differing_ranges(old, new)

    # --- keeping

    def hidden_points(self) -> list[Point]:
        """Points that were forgotten and can still be brought back, oldest first."""
        opener = Opener(self.unlock())
        found = [open_point(row, opener) for row in self._index().points() if row.hidden]
        return sorted(found, key=lambda p: (p.manifest.time, p.manifest.received_ms, p.id))

    def pinned(self) -> frozenset[PointId]:
        """The points that no policy removes."""
        return frozenset(row.id for row in self._index().points() if row.pinned)

    def forget(self, points: Sequence[Point]) -> None:
        """Hides restore points; until the next garbage collection they can be brought back.

        Durability: on disk on return. If there is no room to write it down in the packs, the index alone says so.
        """
        self._change_points("forget", points, hidden=True)

    def recall(self, points: Sequence[Point]) -> None:
        """Brings forgotten points back.

        Raises:
            DamagedPoint: something that one of them needs is gone; nothing was changed.
            PointNotFound: a garbage collection has taken one of them.
        """
        from holdfast.repo.check import missing_from

        _, trees = self._reading()
        for point in points:
            if missing_from(point.manifest, trees, self._index()):
                raise DamagedPoint(
                    f"restore point {point.short_id} can not be brought back: something that it needs is gone"
                )
        self._change_points("recall", points, hidden=False)

    def pin(self, points: Sequence[Point]) -> None:
        """Protects points from policies."""
        self._change_points("pin", points, pinned=True)

    def unpin(self, points: Sequence[Point]) -> None:
        """Takes that protection back."""
        self._change_points("unpin", points, pinned=False)

    def _change_points(
        self,
        action: Action,
        points: Sequence[Point],
        *,
        hidden: bool | None = None,
        pinned: bool | None = None,
    ) -> None:
        self._require_writable()
        now_ns = _time.time_ns()
        changes = [
            PointChange(point.id, now_ns + number, hidden, pinned) for number, point in enumerate(points)
        ]
        try:
            self._write_marks(action, [point.id for point in points], changes, now_ns)
        except DiskFull as error:
            self._notify(
                f"{error.message}; what was changed is noted in the index alone, and lost if that is lost"
            )
            self._index().commit(Batch(None, int(_time.time()), changes=changes))

    def _write_marks(
        self,
        action: Action,
        points: Sequence[PointId],
        changes: Sequence[PointChange] = (),
        now_ns: int | None = None,
    ) -> None:
        session = self._short_session(action)
        session.begin()
        try:
            first_ns = _time.time_ns() if now_ns is None else now_ns
            marks = [
                encode_mark(Mark(action, point, SessionId(os.urandom(16)), first_ns + number))
                for number, point in enumerate(points)
            ]
            session.commit_changes(marks, changes)
        finally:
            session.close(keep=False)

    def _short_session(self, kind: str) -> Session:
        keys = self.unlock()
        return Session(
            self._store,
            self._index(),
            Sealer(keys, self.config.compression.level),
            self.config.pack_bytes,
            new_session_row(kind, int(_time.time())),
            replace(self._home(), name_mark=keys.mark_id),
            _time.time,
        )

    def exclusive_bytes(self, points: Sequence[Point]) -> dict[PointId, int]:
        """For each of the points the stored bytes that nothing else needs: what removing it alone would free.

        Cost: reads each unique leaf of all points once, and the index.
        """
        from holdfast.repo.usage import exclusive_bytes

        records, trees = self._reading()
        every = self.points()
        groups = {point.id: number for number, point in enumerate(every)}
        sizes = exclusive_bytes(records, trees, self._index(), every, groups)
        return {point.id: sizes[groups[point.id]] for point in points if point.id in groups}

    def freed_bytes(self, points: Sequence[Point]) -> int:
        """The stored bytes that removing all of the points together would free. Cost: as `exclusive_bytes`."""
        if not points:
            return 0
        from holdfast.repo.usage import exclusive_bytes

        records, trees = self._reading()
        every = self.points()
        chosen = {point.id for point in points}
        groups = {point.id: 0 if point.id in chosen else 1 for point in every}
        return exclusive_bytes(records, trees, self._index(), every, groups)[0]

    def collect(self, options: CollectOptions | None = None, *, alone: bool = False) -> CollectReport:
        """Gives back the space of forgotten points; see `repo.gc`. Backups, restores and mounts may go on.

        Args:
            alone: the caller knows that no other machine uses the repository, where each has an index of its own.

        Raises:
            RepositoryBusy: another collection is at work.
            UsageError: other machines may use the repository.
            DamagedPoint: a restore point is damaged; nothing was removed.
        """
        from holdfast.repo.gc import CollectOptions, Collector  # it needs numpy, which takes time to load

        self._require_writable()
        chosen = options or CollectOptions()
        records, _ = self._reading()
        index = self._index()
        if self._place.index_is_outside(self.config.id) and not alone:
            raise UsageError(
                "the repository is on a network file system, where each machine has an index of its own, "
                "and a collection would not know of backups that other machines make at this moment",
                hint="make sure that no other machine uses it, and add --alone",
            )
        with self._place.collecting():
            if not chosen.dry_run:
                adopt_strays(self._store, index, self._home(), int(_time.time()), grown=True)
            session = self._short_session("gc")
            collector = Collector(
                self._store,
                index,
                records,
                Opener(self.unlock()),
                session,
                lambda points: self._write_marks("collect", points),
                chosen,
            )
            if chosen.dry_run:
                return collector.run()
            session.begin()
            try:
                return collector.run()
            finally:
                session.close(keep=False)

    # --- backup

    def backup(self, machine: Machine, options: BackupOptions | None = None) -> BackupSummary:
        """Backs a machine up as a new restore point.

        Durability: the point and all that it needs are on disk on return.

        Raises:
            SourceError: the machine can not be read; what was stored is found again by the next backup.
            StorageError: the repository can not be written; likewise.
        """
        from holdfast.repo.backup import BackupOptions, run_backup  # as much as all the rest

        self._require_writable()
        return run_backup(self._engine(), machine, options or BackupOptions(), self.points())

    def _engine(self) -> Engine:
        from holdfast.repo.backup import Engine

        records, trees = self._reading()
        return Engine(
            self.config,
            self.unlock(),
            self._store,
            self._index(),
            records,
            trees,
            self._home(),
            _time.time,
            self._place.is_far,
        )

    # --- replication

    def replicate(
        self, target: Repository, points: Sequence[Point], options: ReplicateOptions | None = None
    ) -> ReplicateReport:
        """Copies restore points into another repository; see `repo.replicate`.

        Durability: what the report lists is on the target's disk on return.

        Raises:
            UsageError: the target is this repository.
            DamagedData: something can not be read; the points before it have been copied.
        """
        from holdfast.repo.replicate import (
            ReplicateOptions,
            ReplicateReport,
            Targets,
            pairs_of,
            replicate,
            share_keys,
        )

        options = options or ReplicateOptions()
        if target.config.id == self.config.id:
            raise UsageError(
                "the source and the target are the same repository",
                hint="a copy of a repository's folder has its id, too: make the target with 'holdfast init'",
            )
        if not options.dry_run:
            target._require_writable()
        here, there = self._engine(), target._engine()
        same = share_keys(self.unlock(), there.keys)
        have = Targets(here, there, same_keys=same)
        if all(map(have.state, points)):
            listed = [have.state(point) for point in points].count("listed")
            pairs = pairs_of(have, points)
            return ReplicateReport(same, pairs=pairs, already=listed, forgotten=len(points) - listed)
        if not options.dry_run:
            changes = there.index.changes()
            adopt_strays(there.store, there.index, there.home, int(_time.time()), grown=True)
            if changes != there.index.changes():
                have = Targets(here, there, same_keys=same)
        with self._holding_listed("replicate", known=target) as every:
            if same:
                have.build_upon(every)
            return replicate(here, there, have, points, options)

    def points_beside(self, other: Repository) -> list[Point]:
        """The same as `points`; what both list is read in `other`, if that is here and this one is far."""
        if not self._place.is_far or other._place.is_far or self.unlock() != other.unlock():
            return self.points()
        listed = {point for point, hidden in self._index().point_states().items() if not hidden}
        rows = [row for row in other._index().points() if row.id in listed]
        missing = listed - {row.id for row in rows}
        return self._opened([*rows, *self._index().get_points(sorted(missing))])

    def copies(self) -> dict[PointId, list[CopyRow]]:
        """What is known of copies of the points in other repositories; see `repo.copies`."""
        found: dict[PointId, list[CopyRow]] = {}
        for row in self._index().copies():
            found.setdefault(row.point, []).append(row)
        return found

    def note_copies(self, target: Repository, seen: SeenCopies) -> None:
        """Notes on both sides what a replication has found; where that can not be, it is not noted. See `repo.copies`."""
        from holdfast.repo.copies import note_copies

        note_copies(self._side(), target._side(), seen, int(_time.time()))

    def _side(self) -> Side:
        from holdfast.repo.copies import Side

        return Side(self._index(), self.config.id, self.path, self.is_far, self._place.may_remove())

    def gone_from(self, target: Repository, points: Sequence[Point]) -> Gone:
        """Which of all points that the target lists this repository once had and has forgotten; see `repo.mirror`."""
        from holdfast.repo.mirror import gone_from
        from holdfast.repo.replicate import share_keys

        return gone_from(self._engine(), points, same_keys=share_keys(self.unlock(), target.unlock()))

    def require_removing(self) -> None:
        """Raises `StorageError` if restore points can not be forgotten here."""
        self._require_writable()
        if not self._place.may_remove():
            raise StorageDenied(
                f"nothing may be forgotten in {self.path}: this connection may only add restore points and read",
                hint="leave out --mirror-retention, or use another key or account, which is allowed more",
            )

    def sample(
        self,
        points: Sequence[Point],
        share: float,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> int:
        """Reads a random share of the chunks that points need; returns how many. See `repo.replicate.sample`.

        Raises:
            DamagedPoint: one of them is missing or damaged.
        """
        from holdfast.repo.replicate import sample

        with self.holding("check", points):
            return sample(self._engine(), points, share, on_progress)

    def prove(
        self,
        source: Repository,
        points: Sequence[Point],
        share: float,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Proven:
        """Has this repository, which is far, prove that it holds what points need; see `repo.prove`.

        Args:
            source: where the points were copied from.
            share: of the records, chosen at random; 1 for all.

        Raises:
            DamagedPoint: something is missing or damaged here.
        """
        from holdfast.repo.prove import prove
        from holdfast.repo.replicate import share_keys

        ours = source._index().point_states() if share_keys(self.unlock(), source.unlock()) else {}
        same = [point for point in points if point.id in ours]
        others = [point for point in points if point.id not in ours]  # sealed anew, or cut differently
        with self.holding("check", points):
            proven = prove(source._engine(), self._engine(), same, share, workers, on_progress)
            if others:
                sent = prove(None, self._engine(), others, share, workers, on_progress)
                proven.records += sent.records
                proven.fetched += sent.fetched
        return proven

    def _home(self) -> Home:
        return Home(
            self.config.id,
            self._is_complete,
            lambda: Opener(self.unlock()),
            sole_index=not self._place.index_is_outside(self.config.id),
            has_key=self.config.encryption is None or self._password is not None,
        )

    def _is_complete(self, row: PointRow) -> bool:
        """Whether a manifest found in a pack has all that it needs."""
        from holdfast.repo.check import missing_from

        try:
            _, trees = self._reading()
            return not missing_from(open_point(row, Opener(self.unlock())).manifest, trees, self._index())
        except IntegrityError:
            return False

    # --- keeping

    def check(
        self,
        points: Sequence[Point] | None = None,
        *,
        read_data: bool = False,
        budget: Budget | None = None,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> CheckReport:
        """Proves the repository's structure, and with `read_data` every byte; see `repo.check`.

        Args:
            points: check only what these need; None checks all packs and all points.
            budget: what reading all packs may cost; the packs that were not verified for longest come first.
        """
        opener: Opener | None = None
        note = ""
        if self.config.encryption is None or self._password is not None:
            opener = Opener(self.unlock())
        else:
            note = "no password was given, so restore points were not checked, and content only by the hash of what is stored"
        checker = self._checker(opener, workers, on_progress)
        if note:
            checker.report.notes.append(note)
        if points is None:
            checker.check_packs(read_data=read_data, budget=budget)
        if opener is not None:
            with self._holding_listed("check", points) as checked:
                checker.check_points(checked, read_data=read_data and points is not None)
        return checker.report

    @contextlib.contextmanager
    def _holding_listed(
        self, kind: str, points: Sequence[Point] | None = None, known: Repository | None = None
    ) -> Iterator[Sequence[Point]]:
        """Holds these points, or all that are listed, for which `known` helps; see `points_beside`."""
        with contextlib.ExitStack() as stack:
            while True:
                if points is not None:
                    wanted = points
                else:
                    wanted = self.points() if known is None else self.points_beside(known)
                try:
                    stack.enter_context(self.holding(kind, wanted))
                    break
                except PointNotFound:  # one of them was forgotten a moment ago
                    if points is not None:
                        raise
            yield wanted

    def repair(
        self,
        donor: Repository | None = None,
        *,
        budget: Budget | None = None,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> tuple[CheckReport, RepairReport]:
        """Reads and checks everything, and heals what is damaged; see `repo.repair`. Backups may go on meanwhile.

        A repository that is far away holds what it has stored against its hashes itself; nothing of that travels.

        Args:
            donor: another repository that may hold what is damaged here.
            budget: as for `check`.

        Returns:
            What the check has found, and what became of it. Damaged ranges of the first are those that are left.

        Raises:
            DamagedData: no pack is there at all; nothing was changed.
            UsageError: the donor is this repository.
        """
        from holdfast.repo.repair import Repairer

        self._require_writable()
        if donor is not None and os.path.realpath(donor.path) == os.path.realpath(self.path):
            raise UsageError(
                "the other repository is this one", hint="name one that holds copies of the same backups"
            )
        index, keys = self._index(), self.unlock()
        rows = index.packs()
        if rows and all(self._store.length(row.id) is None for row in rows):
            raise DamagedData(
                f"none of the repository's packs is in the packs/ folder of {self.path}",
                hint="is the disk mounted? Nothing was changed",
            )
        opener = Opener(keys)
        checker = self._checker(opener, workers, on_progress)
        checker.check_packs(read_data=True, budget=budget, reported=self._place.is_far)
        with contextlib.ExitStack() as stack:
            source = None if donor is None else stack.enter_context(donor.offered())
            points = stack.enter_context(self._holding_listed("repair"))
            checker.check_points(points, read_data=False)
            params = ChunkerParams(self.config.chunker, self.config.chunk_size_bytes)
            repairer = Repairer(
                self.config.id,
                self._store,
                index,
                RecordReader(self._store, index, opener),
                opener,
                keys,
                Sealer(keys, self.config.compression.level),
                self._short_session("repair"),
                make_chunker(params)
                if keys.chunker_seed is None
                else make_chunker(params, keys.chunker_seed),
                source,
            )
            repaired = repairer.run(checker, points)
        if repaired.marks:  # what they said is in the index; it is written down anew
            listed = index.points()
            self._write_marks("forget", [row.id for row in listed if row.hidden])
            self._write_marks("pin", [row.id for row in listed if row.pinned])
        return checker.report, repaired

    @contextlib.contextmanager
    def offered(self) -> Iterator[Donor]:
        """What the repair of another repository may take from this one; its points are held meanwhile."""
        from holdfast.repo.repair import Donor

        records, trees = self._reading()
        with self._holding_listed("repair") as points:
            yield Donor(self.path, self.unlock(), self._index(), records, trees, points)

    def _checker(
        self, opener: Opener | None, workers: int | None, on_progress: Callable[[int, int], None]
    ) -> Checker:
        from holdfast.repo.check import Checker, Finding

        index = self._index()
        records = RecordReader(self._store, index, opener or Opener(key_slots.clear_keys()))
        trees = TreeReader(records)
        checker = Checker(
            self.config.id,
            self._store,
            index,
            records,
            trees,
            opener,
            workers or None,
            _time.time,
            on_progress,
        )
        if not self._place.copies_agree():
            checker.report.findings.append(
                Finding("config", "the two copies of the configuration differ, or one is missing")
            )
        return checker

    def rebuild_index(self, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> Rebuilt:
        """Replaces the index by one made from the packs.

        Raises:
            RepositoryBusy: another process uses the repository.
        """
        if self._index_ is not None:
            self._index_.close()
            self._index_ = None
        self._records_ = self._trees_ = None
        return self._rebuild(on_progress)

    def _rebuild(self, on_progress: Callable[[int, int], None]) -> Rebuilt:
        if self._index_ is not None:
            self._index_.close()
            self._index_ = None
        self._place.own_index()
        try:
            with self._place.replacing_index(self.config.id) as index:
                rebuilt = rebuild_index(self._store, index, self._home(), int(_time.time()), on_progress)
        finally:
            self._place.use_index()
        for problem in rebuilt.problems:
            self._notify(f"rebuilding the index: {problem}")
        return rebuilt

    def statistics(self, vm: str | None = None) -> RepositoryStatistics:
        """Figures of the repository; counts of points are those of one VM if it is given."""
        points = self.points(vm)
        packs: list[PackRow] = self._index().packs()
        return RepositoryStatistics(
            vms=len({p.manifest.vm_uuid for p in points}),
            points=len(points),
            size_bytes=sum(p.manifest.size_bytes for p in points),
            packs=len(packs),
            packs_bytes=sum(row.committed_bytes for row in packs),
            live_bytes=sum(row.live_bytes for row in packs),
            dead_bytes=sum(row.dead_bytes for row in packs),
            index=self._index().figures(),
            oldest_verification=min((row.verified for row in packs), default=None),
            oldest_unverified=min((row.verified or row.created for row in packs), default=None),
            verified_bytes=sum(row.committed_bytes for row in packs if row.verified),
        )

    # --- keys

    def key_slots(self) -> tuple[KeySlot, ...]:
        """The passwords of the repository, without their secrets."""
        if self.config.encryption is None:
            raise UsageError("the repository is not encrypted, so it has no keys")
        return self.config.encryption.slots

    def current_slot(self) -> KeySlot:
        """The slot that the given password opens."""
        return self._unlock_master()[1]

    def add_key(self, password: str, label: str) -> KeySlot:
        """Adds a password."""
        master, _ = self._unlock_master()
        with self._fresh_config():
            self.config, slot = key_slots.add_slot(self.config, master, password, label, int(_time.time()))
            self._place.write_config(self.config)
        return slot

    def remove_key(self, slot_id: str) -> None:
        """Removes a password. Whoever has copied the configuration before can still use it."""
        master, _ = self._unlock_master()
        with self._fresh_config():
            self.config = key_slots.remove_slot(self.config, master, slot_id)
            self._place.write_config(self.config)

    def change_password(self, password: str) -> KeySlot:
        """Replaces the password that the repository was opened with."""
        master, slot = self._unlock_master()
        with self._fresh_config():
            self.config, new = key_slots.replace_slot(
                self.config, master, slot.id, password, int(_time.time())
            )
            self._place.write_config(self.config)
        self._master = (master, new)
        return new

    def export_key(self) -> bytes:
        """The master key: with it and the packs everything can be read, whatever becomes of passwords."""
        return self._unlock_master()[0]

    def import_key(self, master: bytes, password: str, label: str) -> KeySlot:
        """Adds a password by means of an exported master key, for when every password is lost.

        Raises:
            WrongPassword: the key is not this repository's.
        """
        if not key_slots.master_fits(self.config, master):
            raise WrongPassword("the exported key is not that of this repository")
        with self._fresh_config():
            self.config, slot = key_slots.add_slot(self.config, master, password, label, int(_time.time()))
            self._place.write_config(self.config)
        return slot

    @contextlib.contextmanager
    def _fresh_config(self) -> Iterator[None]:
        """Excludes other changes of the configuration, and begins with its newest state."""
        with self._place.changing_config():
            self.config = self._place.read_config().config
            self._require_writable()
            yield

    def _require_writable(self) -> None:
        if self.config.write_blocker:
            raise UnsupportedFormat(
                f"the repository uses {self.config.write_blocker}; this Holdfast can read it, but not write to it",
                hint="use a newer Holdfast",
            )


def _require_readable(config: Config) -> None:
    """Raises UsageError if a repository with that configuration could not be opened again."""
    try:
        decode_config(encode_config(config))
    except DamagedConfig as error:
        raise UsageError(f"no repository can be made with these options: {error.message}") from None


def _password_source(password: Passwords | str | None) -> Passwords | None:
    if isinstance(password, str):
        text = password
        return lambda: text
    return password
