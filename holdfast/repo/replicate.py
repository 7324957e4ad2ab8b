"""Copies restore points from one repository into another: only what that one lacks, and each point as a whole.

Where both repositories name records by the same keys, stored records travel as they are: a point's tree is compared
with that of a point of the same VM that the target has already, and only where they differ nodes are read; of what
they name, what the target's index lacks is copied. Records enter the target by a session, as a backup's do, so an
interrupted copy is found again by the next one, and the point is listed with the last transaction.

Where keys differ (another password does not make them differ), contents are read, cut and sealed anew with the target's.

Invariants: a record's strong hash is verified before it is appended; nothing is ever removed from the target (`repo.mirror` may do so afterwards); a point
that the target has (or had, and has forgotten) is not copied again. After each point both indexes are asked for the
plain length of every record that was looked at, and must agree (`proof`).
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple, Self

import blake3

from holdfast.disk import Machine, SourceDisk, SourceFile
from holdfast.errors import DamagedData, DamagedPoint, HoldfastError, PointNotFound, StorageError
from holdfast.ids import HOLE_ID, ID_BYTES, NodeId, PointId, RecordId, SessionId
from holdfast.repo.backup import BackupOptions, DryRun, Engine, build_ingest, matching_contents
from holdfast.repo.check import contents_of
from holdfast.repo.codec import Sealed, Sealer
from holdfast.repo.format.manifest import ContentTree, encode_manifest
from holdfast.repo.format.node import FANOUT
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind
from holdfast.repo.format.rows import PointRow
from holdfast.repo.idset import IdSet
from holdfast.repo.ingest import Content, Ingest
from holdfast.repo.keys import Keys
from holdfast.repo.lease import new_session_row
from holdfast.repo.parallel import run_parallel
from holdfast.repo.points import Point, open_manifest, open_point
from holdfast.repo.reader import DiskReader
from holdfast.repo.session import Segment, Session
from holdfast.repo.tree import TreeReader, segments_of
from holdfast.repo.walk import read_node, walk_nodes
from holdfast.units import MIB

__all__ = [
    "Ack",
    "Origin",
    "ReplicateOptions",
    "ReplicateReport",
    "ReplicatedPoint",
    "Targets",
    "pairs_of",
    "replicate",
    "sample",
    "share_keys",
]

Ack = Literal["chunk", "batch", "point"]
"""When the target has made durable what it was given: after each piece, with each batch, or with the point."""

_LEAVES_AT_ONCE: Final = 16
_FAR_LEAVES_AT_ONCE: Final = 2
"""Where one side is far, so that small disks, too, give many workers something to wait for."""
_WAITING_WORKERS: Final = 5
"""More than usual, where one side is far and cores are idle: they wait for answers."""
_APPEND_BYTES: Final = 4 * MIB
_NODES_AT_ONCE: Final = 1024
_SAMPLE_AT_ONCE: Final = 4096


@dataclass(frozen=True, slots=True)
class ReplicateOptions:
    """How to copy.

    Args:
        dry_run: find out what would be copied.
        ack: when what was copied is durable; whatever it is, a point is listed only when all of it is.
        workers: threads; None for one per core, and more while cores are idle.
        pace: called with the number of bytes before they are copied; it may wait.
        on_progress: called with bytes copied so far, now and then, from any thread.
    """

    dry_run: bool = False
    ack: Ack = "batch"
    workers: int | None = None
    pace: Callable[[int], None] = lambda _bytes: None
    on_progress: Callable[[int], None] = lambda _bytes: None


@dataclass(frozen=True, slots=True)
class ReplicatedPoint:
    """One point that was copied.

    Args:
        id: in the source.
        target_id: in the target: another one if keys differ; None after a dry run.
        records, stored_bytes: what was copied for it, headers included.
        proof: BLAKE3 over ids and plain lengths of what was looked at, the same from both indexes; empty if keys differ.
    """

    id: PointId
    target_id: PointId | None
    vm_name: str
    time: int
    records: int
    stored_bytes: int
    proof: bytes


@dataclass(slots=True)
class ReplicateReport:
    """What a replication did.

    Args:
        pairs: of all points that both sides list now, the id in the source and that in the target.
        already: points that the target had.
        forgotten: points that the target has forgotten; they stay so.
        same_keys: whether records travelled as they are.
    """

    same_keys: bool
    copied: list[ReplicatedPoint] = field(default_factory=list)
    pairs: list[tuple[PointId, PointId]] = field(default_factory=list)
    already: int = 0
    forgotten: int = 0
    duration_s: float = 0.0

    @property
    def records(self) -> int:
        """How many were copied."""
        return sum(point.records for point in self.copied)

    @property
    def stored_bytes(self) -> int:
        """How many bytes were copied, headers included."""
        return sum(point.stored_bytes for point in self.copied)


def share_keys(one: Keys, other: Keys) -> bool:
    """Whether two repositories name and encrypt records in the same way."""
    return (one.cipher, one.data_key, one.id_keys) == (other.cipher, other.data_key, other.id_keys)


def replicate(
    source: Engine, target: Engine, have: Targets, points: Sequence[Point], options: ReplicateOptions
) -> ReplicateReport:
    """Copies points, oldest first.

    Args:
        have: what the target holds.
        points: of the source, which somebody holds meanwhile, as well as what `have` may build upon.

    Durability: what the report lists as copied is on the target's disk.

    Raises:
        DamagedData: something of a point can not be read; the points before it have been copied.
        StorageError: as the repositories raise it.
    """
    began = time.monotonic()
    same = share_keys(source.keys, target.keys)
    report = ReplicateReport(same)
    for point in sorted(points, key=lambda p: (p.manifest.time, p.manifest.received_ms, p.id)):
        state = have.state(point)
        if state == "listed":
            report.already += 1
            report.pairs += pairs_of(have, [point])
            continue
        if state == "forgotten":
            report.forgotten += 1
            continue
        copy = _copy_point if same else _translate_point
        made = copy(source, target, have, point, options)
        report.copied.append(made)
        if made.target_id is not None:
            report.pairs.append((point.id, made.target_id))
    report.duration_s = time.monotonic() - began
    return report


def pairs_of(have: Targets, points: Sequence[Point]) -> list[tuple[PointId, PointId]]:
    """Of those points that the target lists the id of each in the source, and in the target."""
    return [(point.id, copy) for point in points if (copy := have.copy_of(point)) is not None]


class Origin(NamedTuple):
    """Which backup made a point; all its copies have that in common, however they are cut and sealed."""

    session: SessionId
    vm_uuid: str
    time: int

    @classmethod
    def of(cls, point: Point) -> Self:
        """That of a point."""
        return cls(point.manifest.session, point.manifest.vm_uuid, point.manifest.time)


class Targets:
    """The target's points, and what has been added to them.

    Where keys are the same, ids tell which points the target has. Only for a point whose id it has not, the manifests
    of those points of the target travel that the source has not: one of them may be the same point, sealed anew on its
    way through a repository with other keys. Where keys differ, each copy has another id than its original.
    """

    def __init__(self, source: Engine, target: Engine, *, same_keys: bool) -> None:
        self.points: list[Point] = []
        self._source = source
        self._target = target
        self._states: dict[object, str] = {}
        self._listed: dict[Origin, PointId] = {}
        self._unread: set[PointId] | None = None
        if same_keys:
            states = target.index.point_states()
            self._unread = set(states)
            for point_id, hidden in states.items():
                self._states[point_id] = "forgotten" if hidden else "listed"
            return
        for row in target.index.points():
            point = self._learn(row)
            if not row.hidden:
                self.points.append(point)

    def _learn(self, row: PointRow) -> Point:
        """Notes the origin of a point of the target; one that is listed counts more than one that was forgotten."""
        point = open_point(row, self._target.opener)
        state = "forgotten" if row.hidden else "listed"
        self._states[row.id] = state
        if self._states.get(Origin.of(point)) != "listed":
            self._states[Origin.of(point)] = state
        if not row.hidden:
            self._listed[Origin.of(point)] = row.id
        return point

    def _learn_origins(self, listed: set[PointId]) -> None:
        known = self._source.index.point_states().keys()
        while True:
            try:
                rows = self._target.index.get_points(sorted(listed - known))
                break
            except PointNotFound:  # a collection has taken one a moment ago
                listed = set(self._target.index.point_states())
        for row in rows:
            # What can not be read here keeps nothing from being copied.
            with contextlib.suppress(HoldfastError):
                self._learn(row)

    def state(self, point: Point) -> str | None:
        """Whether the target lists a point, has forgotten it, or has none such."""
        known = self._states.get(point.id)
        if known is None and self._unread is not None:
            listed, self._unread = self._unread, None
            self._learn_origins(listed)
        return known or self._states.get(Origin.of(point))

    def copy_of(self, point: Point) -> PointId | None:
        """The id that a point has in the target; None if that does not list it."""
        if self._states.get(point.id) == "listed":
            return point.id
        return self._listed.get(Origin.of(point))

    def build_upon(self, points: Sequence[Point]) -> None:
        """Names points of the source that the target may have, too: what they need is not looked at again."""
        self.points += [point for point in points if self._states.get(point.id) == "listed"]

    def add(self, point: Point) -> None:
        """Notes a point that was copied."""
        self._states[point.id] = self._states[Origin.of(point)] = "listed"
        self.points.append(point)

    def base(self, point: Point) -> Point | None:
        """The newest point of the same VM, cut alike."""
        manifest = point.manifest
        fitting = [
            known
            for known in self.points
            if (known.manifest.vm_uuid, known.manifest.segment_bytes)
            == (manifest.vm_uuid, manifest.segment_bytes)
        ]
        return max(fitting, key=lambda p: (p.manifest.time, p.manifest.received_ms), default=None)


@contextlib.contextmanager
def _session(target: Engine, have: Targets, base: Point | None) -> Iterator[tuple[Session, Point | None]]:
    """A session of the target that holds `base`, or a sooner one without it if it is gone."""
    sealer = Sealer(target.keys, target.config.compression.level)
    while True:
        row = new_session_row("replicate", int(target.clock()), (base.id,) if base else ())
        session = Session(
            target.store, target.index, sealer, target.config.pack_bytes, row, target.home, target.clock
        )
        try:
            session.begin()
            break
        except PointNotFound:
            assert base is not None
            have.points.remove(base)
            base = None
    try:
        yield session, base
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            session.close(keep=True)
        raise
    with contextlib.suppress(StorageError):  # the point is listed; what is left of the session expires
        session.close(keep=False)


# --- the same keys: records as they are


class _Copy:
    """Copies what one point needs.

    Args:
        session: of the target; None to count only.
    """

    def __init__(
        self, source: Engine, target: Engine, session: Session | None, options: ReplicateOptions
    ) -> None:
        self._source = source
        self._target = target
        self._session = session
        self._options = options
        self._lock = threading.Lock()
        self._counted = IdSet()
        self._is_far = source.far or target.far
        self.records = 0
        self.stored_bytes = 0
        self.nodes: list[NodeId] = []

    def run(self, pairs: Sequence[tuple[ContentTree | None, ContentTree]]) -> None:
        """Copies what the new trees need and the old ones, which the target holds, do not."""
        inner: list[NodeId] = []
        run_parallel(
            self._batches(pairs, inner),
            self._leaves,
            self._options.workers,
            lambda: self._options.on_progress(self.stored_bytes),
            _WAITING_WORKERS if self._is_far else 0,
        )
        if self._session is not None:
            self._session.flush()  # leaves are there before what names them
        for first in range(0, len(inner), _NODES_AT_ONCE):
            self._nodes(inner[first : first + _NODES_AT_ONCE])

    def _batches(
        self, pairs: Sequence[tuple[ContentTree | None, ContentTree]], inner: list[NodeId]
    ) -> Iterator[list[NodeId]]:
        """Leaves, some at a time; inner nodes go to `inner`, children before parents."""
        seen = IdSet()
        batch: list[NodeId] = []
        most = _FAR_LEAVES_AT_ONCE if self._is_far else _LEAVES_AT_ONCE
        for old, new in pairs:
            for level, node in new_nodes(self._source.trees, old, new):
                if not seen.add([node]):
                    continue
                self.nodes.append(node)
                if level:
                    inner.append(node)
                    continue
                batch.append(node)
                if len(batch) == most:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _leaves(self, leaves: list[NodeId]) -> None:
        found = self._source.records.load([RecordId(leaf) for leaf in leaves], Kind.NODE)
        chunks: dict[RecordId, None] = {}
        for leaf in leaves:
            ids = read_node(leaf, found[leaf]).ids
            chunks |= {RecordId(ids[at : at + ID_BYTES]): None for at in range(0, len(ids), ID_BYTES)}
        self._take(list(chunks), leaves, lambda: self._leaves(leaves))
        if self._options.ack == "chunk" and self._session is not None:
            self._session.flush()

    def _nodes(self, nodes: list[NodeId]) -> None:
        self._take([], nodes, lambda: self._nodes(nodes))

    def _take(self, chunks: list[RecordId], nodes: list[NodeId], redo: Callable[[], None]) -> None:
        """Copies those of some chunks, and of the nodes, that the target lacks."""
        wanted = [*chunks, *nodes]
        session = self._session
        if session is None:
            self._count(wanted)
            return
        generation = session.generation()
        unknown = session.unknown(wanted)
        staged: list[Sealed] = []
        size = 0
        for kind, ids in ((Kind.CHUNK, chunks), (Kind.NODE, nodes)):
            for sealed in self._source.records.sealed([i for i in ids if i in unknown], kind):
                staged.append(sealed)
                size += sealed.header.total_bytes
                if size >= _APPEND_BYTES:
                    self._append(session, Segment(staged, frozenset(), (), redo), generation, size)
                    staged, size = [], 0
                    generation = session.generation()
        last = {sealed.header.id for sealed in staged}
        relied = frozenset(i for i in wanted if i not in last)
        self._append(session, Segment(staged, relied, tuple(nodes), redo), generation, size)

    def _append(self, session: Session, segment: Segment, generation: int, size: int) -> None:
        self._options.pace(size)
        session.append(segment, generation)
        with self._lock:  # two threads may have met the same chunk; the session stores it once
            new = self._counted.add(sealed.header.id for sealed in segment.records)
            self.records += len(new)
            self.stored_bytes += sum(
                sealed.header.total_bytes for sealed in segment.records if sealed.header.id in new
            )

    def _count(self, wanted: list[RecordId]) -> None:
        absent = [
            i for i, place in zip(wanted, self._target.index.lookup(wanted), strict=True) if place is None
        ]
        with self._lock:
            absent = list(self._counted.add(absent))
            for place in self._source.index.lookup(absent):
                if place is not None:
                    self.records += 1
                    self.stored_bytes += RECORD_HEADER_BYTES + place.stored_bytes

    def proof(self) -> bytes:
        """What both indexes say of all records that were looked at.

        Raises:
            DamagedData: they do not say the same.
        """
        digests = [blake3.blake3(), blake3.blake3()]
        nearer = self._target if self._source.far else self._source  # both have the nodes by now
        for first in range(0, len(self.nodes), 256):
            some = [RecordId(node) for node in self.nodes[first : first + 256]]
            texts = nearer.records.load(some, Kind.NODE)
            ids = dict.fromkeys(some)
            for node in some:
                found = read_node(NodeId(node), texts[node])
                if found.is_leaf:
                    ids |= dict.fromkeys(
                        RecordId(found.ids[at : at + ID_BYTES]) for at in range(0, len(found.ids), ID_BYTES)
                    )
            for engine, digest in zip((self._source, self._target), digests, strict=True):
                for record_id, place in zip(ids, engine.index.lookup(list(ids)), strict=True):
                    plain = -1 if place is None else place.plain_bytes
                    digest.update(record_id + plain.to_bytes(8, "little", signed=True))
        one, other = (digest.digest() for digest in digests)
        if one != other:
            raise DamagedData(
                "the two repositories do not agree on what they hold of a restore point",
                hint="run 'holdfast check' on both of them",
            )
        return one


def new_nodes(trees: TreeReader, old: ContentTree | None, new: ContentTree) -> Iterator[tuple[int, NodeId]]:
    """Yields (level, id) of the nodes of a tree that stand elsewhere, or not at all, in an older one.

    Children come before parents. What is equal in the same place is not read.
    """
    total = segments_of(new)
    if not total:
        return
    height = trees.height(new)
    if old is not None and (trees.height(old) != height or old.segment_bytes != new.segment_bytes):
        old = None

    def below(before: NodeId, node: NodeId, level: int, first: int) -> Iterator[tuple[int, NodeId]]:
        if node in (HOLE_ID, before):
            return
        if level:
            children = trees.children(new, node, level, first)
            others: tuple[NodeId, ...] = ()
            span = FANOUT ** (level - 1)
            if old is not None and before != HOLE_ID and first < segments_of(old):
                others = trees.children(old, before, level, first)
            for number, child in enumerate(children):
                other = others[number] if number < len(others) else HOLE_ID
                yield from below(other, child, level - 1, first + number * span)
        yield level, node

    yield from below(old.root if old is not None and segments_of(old) else HOLE_ID, new.root, height, 0)


def _copy_point(
    source: Engine, target: Engine, have: Targets, point: Point, options: ReplicateOptions
) -> ReplicatedPoint:
    if options.dry_run:
        pairs = _pairs(point, have.base(point))
        counting = _Copy(source, target, None, options)
        counting.run(pairs)
        have.add(point)
        return _replicated(point, None, counting, b"")
    with _session(target, have, have.base(point)) as (session, base):
        copy = _Copy(source, target, session, options)
        copy.run(_pairs(point, base))
        session.flush()
        proof = copy.proof()
        (row,) = source.index.get_points([point.id])
        session.commit_point(point.id, open_manifest(row, source.opener))
    have.add(point)
    return _replicated(point, point.id, copy, proof)


def _pairs(point: Point, base: Point | None) -> list[tuple[ContentTree | None, ContentTree]]:
    """For each content of a point the same content of the base, if there is one."""
    disks = {disk.info.uuid or disk.info.name: disk.tree for disk in base.manifest.disks} if base else {}
    files = {file.info.name: file.tree for file in base.manifest.files} if base else {}
    return [
        *((disks.get(disk.info.uuid or disk.info.name), disk.tree) for disk in point.manifest.disks),
        *((files.get(file.info.name), file.tree) for file in point.manifest.files),
    ]


def _replicated(point: Point, target_id: PointId | None, copy: _Copy, proof: bytes) -> ReplicatedPoint:
    manifest = point.manifest
    return ReplicatedPoint(
        point.id, target_id, manifest.vm_name, manifest.time, copy.records, copy.stored_bytes, proof
    )


# --- other keys: contents are read and sealed anew


def _translate_point(
    source: Engine, target: Engine, have: Targets, point: Point, options: ReplicateOptions
) -> ReplicatedPoint:
    manifest = point.manifest
    machine = Machine(
        kind=manifest.kind,
        name=manifest.vm_name,
        uuid=manifest.vm_uuid,
        origin=manifest.origin,
        disks=tuple(
            SourceDisk(disk.info, DiskReader(source.records, source.trees, disk.tree))
            for disk in manifest.disks
        ),
        files=tuple(
            SourceFile(file.info, DiskReader(source.records, source.trees, file.tree))
            for file in manifest.files
        ),
        folders=manifest.folders,
        warnings=manifest.warnings,
    )
    asked = BackupOptions(workers=options.workers)
    sealer = Sealer(target.keys, target.config.compression.level)
    if options.dry_run:
        dry = DryRun(target.index)
        ingest = build_ingest(target, dry, sealer, 0, asked)
        ingest.run(_contents(ingest, target, machine, have.base(point)))
        have.add(point)
        return _translated(point, None, ingest, dry.stored_bytes)
    with _session(target, have, have.base(point)) as (session, base):
        ingest = build_ingest(target, session, sealer, 0, asked)
        trees = ingest.run(_contents(ingest, target, machine, base))
        made = replace(
            manifest,
            segment_bytes=target.config.segment_bytes,
            chunker=target.config.chunker,
            chunk_size_bytes=target.config.chunk_size_bytes,
            disks=tuple(replace(disk, tree=tree) for disk, tree in zip(manifest.disks, trees, strict=False)),
            files=tuple(
                replace(file, tree=tree)
                for file, tree in zip(manifest.files, trees[len(manifest.disks) :], strict=True)
            ),
            parent="",
        )
        encoded = encode_manifest(made)
        target_id = PointId(target.keys.record_id(Kind.MANIFEST, encoded))
        session.commit_point(target_id, encoded)
    have.add(Point(target_id, made))
    return _translated(point, target_id, ingest, session.stored_bytes)


def _contents(ingest: Ingest, target: Engine, machine: Machine, base: Point | None) -> list[Content]:
    parents = matching_contents(machine, base if base and _cut_alike(target, base) else None)
    sources = [*(disk.source for disk in machine.disks), *(file.source for file in machine.files)]
    return [ingest.content(source, parent) for source, parent in zip(sources, parents, strict=True)]


def _translated(
    point: Point, target_id: PointId | None, ingest: Ingest, stored_bytes: int
) -> ReplicatedPoint:
    manifest = point.manifest
    chunks = ingest.counters.chunks_new
    return ReplicatedPoint(point.id, target_id, manifest.vm_name, manifest.time, chunks, stored_bytes, b"")


def _cut_alike(target: Engine, point: Point) -> bool:
    manifest, config = point.manifest, target.config
    return (manifest.segment_bytes, manifest.chunker, manifest.chunk_size_bytes) == (
        config.segment_bytes,
        config.chunker,
        config.chunk_size_bytes,
    )


def sample(
    engine: Engine,
    points: Sequence[Point],
    share: float,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Reads a random share of the chunks that points need, and hashes them.

    Returns:
        How many chunks were read.

    Raises:
        DamagedPoint: a node, or one of the chunks that were chosen, is missing or damaged.
    """
    chance = random.SystemRandom()
    chosen: dict[RecordId, None] = {}
    roots = [tree.root for point in points for _, tree in contents_of(point.manifest)]
    done = 0
    try:
        for node in walk_nodes(engine.records, roots):
            if node.is_leaf:
                chosen |= {RecordId(chunk): None for chunk in node.children() if chance.random() < share}
            if len(chosen) >= _SAMPLE_AT_ONCE:
                done += _read_all(engine, chosen)
                on_progress(done, 0)
                chosen = {}
        return done + _read_all(engine, chosen)
    except DamagedData as error:
        raise DamagedPoint(
            f"what was asked for at random is damaged: {error.message}",
            hint="run 'holdfast check --repair' there, or 'holdfast replicate --repair'",
        ) from error


def _read_all(engine: Engine, chosen: dict[RecordId, None]) -> int:
    return sum(1 for _ in engine.records.each(list(chosen), Kind.CHUNK))
