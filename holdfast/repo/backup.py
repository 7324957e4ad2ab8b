"""One backup: from a machine to a restore point, or, as a dry run, to the figures that it would have."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import blake3

from holdfast.chunker import PUBLISHED_SEED, ChunkerParams, make_chunker
from holdfast.disk import ChangeMap, Cutting, Machine
from holdfast.errors import EmptySource, PointNotFound, StorageError, UsageError
from holdfast.ids import PointId, RecordId, SessionId
from holdfast.repo.codec import Opener, Sealer
from holdfast.repo.format.config import Config
from holdfast.repo.format.manifest import (
    MAX_LABELS_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_NAME_BYTES,
    ContentTree,
    Manifest,
    PointDisk,
    PointFile,
    PointStatistics,
    ReadMode,
    encode_manifest,
)
from holdfast.repo.format.record import Kind
from holdfast.repo.governor import LevelGovernor
from holdfast.repo.idset import IdSet
from holdfast.repo.index import Index
from holdfast.repo.ingest import Content, Ingest, IngestCounters
from holdfast.repo.keys import Keys
from holdfast.repo.lease import new_session_row
from holdfast.repo.packs import PackStore
from holdfast.repo.points import Point
from holdfast.repo.records import RecordReader
from holdfast.repo.recover import Home, adopt_strays
from holdfast.repo.session import Segment, Session
from holdfast.repo.storing import RecordAcceptor
from holdfast.repo.tree import TreeReader
from holdfast.version import VERSION

__all__ = [
    "BackupOptions",
    "BackupSummary",
    "DryRun",
    "Engine",
    "build_ingest",
    "matching_contents",
    "run_backup",
    "vm_identity",
]

_TOOL: Final = f"holdfast {VERSION}"


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What the user asked for.

    Args:
        labels: free key and value pairs that the restore point carries.
        time: Unix seconds that the data stands for; None for the moment at which the backup begins.
        changes: disk name -> what may have changed since the point `base`; only that is read of these disks.
        base: a point of the same VM; needed with `changes`.
        dry_run: read and classify everything, store nothing.
        workers: threads; None for one per core, and more while cores are idle (`run_parallel`).
        on_progress: called a few times a second from the calling thread.
    """

    labels: Mapping[str, str] | None = None
    time: int | None = None
    changes: Mapping[str, ChangeMap] | None = None
    base: Point | None = None
    dry_run: bool = False
    workers: int | None = None
    on_progress: Callable[[IngestCounters], None] = lambda _counters: None


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """What a backup did. All sizes in bytes.

    Args:
        point: id of the new restore point; None after a dry run.
        bytes_read: read from the source.
        bytes_new: plaintext of chunks that the repository did not have.
        bytes_stored: what the packs grew by, manifest included.
    """

    point: PointId | None
    vm_name: str
    vm_uuid: str
    time: int
    size_bytes: int
    bytes_read: int
    bytes_new: int
    bytes_stored: int
    chunks_new: int
    chunks_reused: int
    duration_s: float
    warnings: tuple[str, ...]


class DryRun:
    """Stands in for a session: knows what the index has, counts what it has not, stores nothing."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._seen = IdSet()
        self.stored_bytes = 0
        self.duplicate_bytes = 0

    def generation(self) -> int:
        """Always the same: nothing is committed."""
        return 0

    def unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        """See `Session.unknown`."""
        unique = list(dict.fromkeys(ids))
        places = self._index.lookup(unique)
        absent = {i for i, place in zip(unique, places, strict=True) if place is None}
        return absent - self._seen.known(absent)

    def append(self, segment: Segment, generation: int) -> int:
        """Counts the segment's records."""
        del generation
        new = self._seen.add(sealed.header.id for sealed in segment.records)
        total = 0
        for sealed in segment.records:
            if sealed.header.id in new:
                self.stored_bytes += sealed.header.total_bytes
                total += sealed.header.plain_bytes if sealed.header.kind == 1 else 0
        return total

    def flush(self) -> None:
        """Nothing to do."""


def vm_identity(machine: Machine) -> str:
    """The UUID that groups a machine's restore points: its own, or one made from its name."""
    if machine.uuid:
        return machine.uuid
    return blake3.blake3(
        machine.name.encode("utf-8", "surrogateescape"),
        derive_key_context="holdfast 2026-11-22 v1 uuid of a name",
    ).hexdigest(length=16)


def check_request(machine: Machine, options: BackupOptions) -> dict[str, str]:
    """The labels, after everything that a manifest could not hold has been refused.

    Raises:
        UsageError: name, labels or time are out of bounds.
        EmptySource: the machine has neither disks nor files.
    """
    try:
        name_bytes = len(machine.name.encode())
        labels = dict(options.labels or {})
        labels_bytes = sum(len(key.encode()) + len(value.encode()) for key, value in labels.items())
    except UnicodeEncodeError:
        raise UsageError("the VM's name or a label is not valid UTF-8") from None
    if not 1 <= name_bytes <= MAX_NAME_BYTES:
        raise UsageError(
            f"the VM's name is {name_bytes} bytes long; it must have 1 to {MAX_NAME_BYTES}",
            hint="give a shorter one with --vm",
        )
    if labels_bytes > MAX_LABELS_BYTES or any(not key for key in labels):
        raise UsageError(f"labels need a key each, and at most {MAX_LABELS_BYTES} bytes together")
    if not machine.disks and not machine.files:
        raise EmptySource(f"{machine.origin} holds neither disks nor files")
    return labels


def matching_contents(machine: Machine, parent: Point | None) -> Iterator[ContentTree | None]:
    """For each disk and then each file of the machine: the same content in the parent, if it has it.

    Disks are matched by their UUID where both have one, else by name.
    """
    disks = parent.manifest.disks if parent else ()
    files = {file.info.name: file.tree for file in parent.manifest.files} if parent else {}
    by_uuid = {disk.info.uuid: disk.tree for disk in disks if disk.info.uuid}
    by_name = {disk.info.name: disk.tree for disk in disks}
    for disk in machine.disks:
        yield by_uuid.get(disk.info.uuid) or by_name.get(disk.info.name)
    for file in machine.files:
        yield files.get(file.info.name)


def build_manifest(
    machine: Machine,
    trees: Sequence[ContentTree],
    labels: Mapping[str, str],
    *,
    session: SessionId,
    vm_uuid: str,
    when: int,
    received_ms: int,
    config: Config,
    parent: Point | None,
    modes: Mapping[str, ReadMode],
    statistics: PointStatistics,
) -> bytes:
    """The encoded manifest of a machine whose contents have these trees (disks first, then files).

    Args:
        modes: how each disk was read, by name.

    Raises:
        UsageError: it would be longer than a record may be.
    """
    disks = tuple(
        PointDisk(disk.info, tree, modes[disk.info.name])
        for disk, tree in zip(machine.disks, trees[: len(machine.disks)], strict=True)
    )
    files = tuple(
        PointFile(file.info, tree)
        for file, tree in zip(machine.files, trees[len(machine.disks) :], strict=True)
    )
    encoded = encode_manifest(
        Manifest(
            session=session,
            kind=machine.kind,
            vm_uuid=vm_uuid,
            vm_name=machine.name,
            host=socket.gethostname(),
            origin=machine.origin,
            time=when,
            received_ms=received_ms,
            segment_bytes=config.segment_bytes,
            chunker=config.chunker,
            chunk_size_bytes=config.chunk_size_bytes,
            disks=disks,
            files=files,
            folders=machine.folders,
            labels=tuple(sorted(labels.items())),
            warnings=machine.warnings,
            parent=parent.id.hex() if parent else "",
            tool=_TOOL,
            statistics=statistics,
        )
    )
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise UsageError(
            f"{machine.origin} has too many files for one restore point ({len(machine.files)})",
            hint="back up the disks alone, or fewer files",
        )
    return encoded


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an open repository that a backup works with.

    Args:
        clock: Unix seconds.
        far: see `Place.is_far`.
    """

    config: Config
    keys: Keys
    store: PackStore
    index: Index
    records: RecordReader
    trees: TreeReader
    home: Home
    clock: Callable[[], float]
    far: bool = False

    @property
    def opener(self) -> Opener:
        """Opens its records."""
        return Opener(self.keys)


def run_backup(
    engine: Engine, machine: Machine, options: BackupOptions, points: Sequence[Point]
) -> BackupSummary:
    """Backs a machine up, or finds out what that would store.

    Args:
        points: all restore points; the backup builds upon the newest one of the same VM.
    """
    labels = check_request(machine, options)
    began, began_ms = time.monotonic(), int(engine.clock() * 1000)
    now = began_ms // 1000
    vm_uuid = vm_identity(machine)
    parent = _base(engine.config, points, vm_uuid, options)
    sealer = Sealer(engine.keys, engine.config.compression.level)
    if options.dry_run:
        dry = DryRun(engine.index)
        ingest = build_ingest(engine, dry, sealer, 0, options)
        _take_in(ingest, machine, parent, options)
        machine.confirm()
        return _summary(machine, vm_uuid, options.time or now, ingest.counters, dry.stored_bytes, began, None)
    adopt_strays(engine.store, engine.index, engine.home, now, grown=True)
    session, others, parent = _begin_session(engine, sealer, now, parent)
    try:
        ingest = build_ingest(engine, session, sealer, others, options)
        trees, modes = _take_in(ingest, machine, parent, options)
        machine.confirm()
        manifest = build_manifest(
            machine,
            trees,
            labels,
            session=session.row.id,
            vm_uuid=vm_uuid,
            when=now if options.time is None else options.time,
            received_ms=began_ms,
            config=engine.config,
            parent=parent,
            modes=modes,
            statistics=PointStatistics(
                bytes_read=ingest.counters.bytes_read,
                bytes_new=ingest.counters.bytes_new,
                bytes_stored=session.stored_bytes,
                chunks_new=ingest.counters.chunks_new,
                chunks_reused=ingest.counters.chunks_reused,
                duration_ms=int((time.monotonic() - began) * 1000),
            ),
        )
        point = PointId(engine.keys.record_id(Kind.MANIFEST, manifest))
        session.commit_point(point, manifest)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            session.close(keep=True)
        raise
    with contextlib.suppress(StorageError):  # the point is listed; what is left of the session expires
        session.close(keep=False)
    when = now if options.time is None else options.time
    return _summary(machine, vm_uuid, when, ingest.counters, session.stored_bytes, began, point)


def _fits(config: Config, point: Point, vm_uuid: str) -> bool:
    """Whether a backup can build upon a point: the same VM, cut the same way as it would be now."""
    manifest = point.manifest
    return (manifest.vm_uuid, manifest.segment_bytes, manifest.chunker, manifest.chunk_size_bytes) == (
        vm_uuid,
        config.segment_bytes,
        config.chunker,
        config.chunk_size_bytes,
    )


def _base(config: Config, points: Sequence[Point], vm_uuid: str, options: BackupOptions) -> Point | None:
    """The point to build upon: the one that a change map is relative to, else the newest.

    Raises:
        UsageError: the change map's point is not one that this backup can build upon.
    """
    if options.changes is not None:
        if options.base is None or not _fits(config, options.base, vm_uuid):
            raise UsageError(
                "the change map is relative to a restore point of another VM, or to none",
                hint="name a point of this VM in the map's 'base', or back up without the map",
            )
        return options.base
    fitting = [point for point in points if _fits(config, point, vm_uuid)]
    return max(fitting, key=lambda p: (p.manifest.received_ms, p.manifest.time), default=None)


def build_ingest(
    engine: Engine, acceptor: RecordAcceptor, sealer: Sealer, others: int, options: BackupOptions
) -> Ingest:
    """What takes contents into a repository.

    Args:
        others: number of sessions that were at work when this one began.
    """
    config, seed = engine.config, engine.keys.chunker_seed
    params = ChunkerParams(config.chunker, config.chunk_size_bytes)
    return Ingest(
        acceptor,
        engine.keys,
        sealer,
        make_chunker(params, seed or PUBLISHED_SEED),
        engine.records,
        engine.trees,
        config.segment_bytes,
        options.workers,
        others,
        LevelGovernor(config.compression.level) if config.compression.auto else None,
        engine.index.lost(),
        Cutting(config.chunker, config.chunk_size_bytes, seed or PUBLISHED_SEED),
        engine.index.aliases,
        options.on_progress,
        far=engine.far,
    )


def _begin_session(
    engine: Engine, sealer: Sealer, now: int, parent: Point | None
) -> tuple[Session, int, Point | None]:
    """A session, how many there were before it, and the parent if the session could take hold of it."""
    holds = (parent.id,) if parent else ()
    row = new_session_row("backup", now, holds)
    session = Session(
        engine.store, engine.index, sealer, engine.config.pack_bytes, row, engine.home, engine.clock
    )
    try:
        return session, session.begin(), parent
    except PointNotFound:  # forgotten a moment ago: build upon nothing
        return _begin_session(engine, sealer, now, None)


def _take_in(
    ingest: Ingest, machine: Machine, parent: Point | None, options: BackupOptions
) -> tuple[list[ContentTree], dict[str, ReadMode]]:
    """The trees of all contents, and how each disk was read, by name."""
    changes = options.changes or {}
    unknown = changes.keys() - {disk.info.name for disk in machine.disks}
    if unknown:
        raise UsageError(
            f"the change map speaks of disks that {machine.name!r} does not have: {', '.join(sorted(unknown))}"
        )
    parents = matching_contents(machine, parent)
    contents = [
        ingest.content(disk.source, tree, changes.get(disk.info.name), disk.scanner)
        for disk, tree in zip(machine.disks, parents, strict=False)
    ]
    contents += [ingest.content(file.source, tree) for file, tree in zip(machine.files, parents, strict=True)]
    disks = zip(machine.disks, contents, strict=False)
    modes = {disk.info.name: _read_mode(content) for disk, content in disks}
    return ingest.run(contents), modes


def _read_mode(content: Content) -> ReadMode:
    if content.changes is not None:
        return "cbt"
    return "full" if content.scanner is None else "hash"


def _summary(
    machine: Machine,
    vm_uuid: str,
    when: int,
    counters: IngestCounters,
    stored_bytes: int,
    began: float,
    point: PointId | None,
) -> BackupSummary:
    return BackupSummary(
        point=point,
        vm_name=machine.name,
        vm_uuid=vm_uuid,
        time=when,
        size_bytes=sum(disk.source.size_bytes for disk in machine.disks)
        + sum(file.source.size_bytes for file in machine.files),
        bytes_read=counters.bytes_read,
        bytes_new=counters.bytes_new,
        bytes_stored=stored_bytes,
        chunks_new=counters.chunks_new,
        chunks_reused=counters.chunks_reused,
        duration_s=time.monotonic() - began,
        warnings=machine.warnings,
    )
