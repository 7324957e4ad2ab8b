"""Checking: is everything that is listed really there, and is it what was written?

Three questions, in this order, none of which needs exclusive access:
1. packs against index, both ways: every record of a pack's table is found in the index at its place, and
   the index has no row that points anywhere else;
2. for the packs that are to be read, every stored byte against its strong hash, and with the key every record
   against its id; both of these are `repo.scrub`;
3. every restore point's trees: all nodes and chunks present, and none of them among the damaged ones.

What a check sees is the state at its beginning; backups may go on beside it.
Memory: 16 bytes per tree node, and one object per damaged record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from holdfast.errors import (
    DamagedData,
    DamagedIndex,
    DamagedPoint,
    IntegrityError,
)
from holdfast.ids import HOLE_ID, NodeId, RecordId, RepositoryId
from holdfast.repo.codec import Opener
from holdfast.repo.format.manifest import ContentTree, Manifest
from holdfast.repo.format.node import FANOUT
from holdfast.repo.format.record import Kind
from holdfast.repo.idset import IdSet
from holdfast.repo.index import Index
from holdfast.repo.ledger import Budget, Reading
from holdfast.repo.packs import PackStore
from holdfast.repo.points import Point
from holdfast.repo.records import RecordReader
from holdfast.repo.scrub import Finding, PackChecker
from holdfast.repo.tree import TreeReader, segment_length, segments_of

__all__ = ["CheckReport", "Checker", "DamagedRange", "Finding", "Need", "ReadSoFar", "missing_from"]

_MOST_RANGES: Final = 10_000
_MOST_NEEDS: Final = 3


@dataclass(frozen=True, slots=True)
class DamagedRange:
    """A part of a restore point that can not be restored.

    Args:
        content: name of the disk or file.
    """

    point: str
    vm: str
    content: str
    offset: int
    length: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReadSoFar:
    """How far the reading of packs has come, over this check and the ones before.

    Args:
        packs: that this check has read.
        left_packs, left_bytes: that were due, and are left for the next check.
        ended_by: `time` or `bytes` if a budget ended the reading; else empty.
        verified_bytes: of all packs that have been verified at least once.
        oldest: Unix seconds of the oldest verification of a pack; 0 if one never was.
    """

    packs: int
    left_packs: int
    left_bytes: int
    ended_by: str
    verified_bytes: int
    total_bytes: int
    oldest: int


@dataclass(slots=True)
class CheckReport:
    """What a check has looked at and found.

    Args:
        reading: None if no packs were read.
    """

    packs: int = 0
    records: int = 0
    points: int = 0
    bytes_verified: int = 0
    findings: list[Finding] = field(default_factory=list)
    damaged: list[DamagedRange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reading: ReadSoFar | None = None

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings and not self.damaged

    def error(self) -> IntegrityError | None:
        """The error that the findings amount to, the gravest first; None if there are none."""
        kinds = {finding.kind for finding in self.findings}
        if self.damaged or "point" in kinds:
            count = len({d.point for d in self.damaged}) or 1
            if "index" in kinds and "pack" not in kinds:
                return DamagedIndex(
                    f"the index is damaged, and {count} restore point{'s' if count > 1 else ''} can not be read through it"
                )
            return DamagedPoint(
                f"{count} restore point{'s are' if count > 1 else ' is'} damaged",
                hint="run 'holdfast check --repair', with --from OTHER_REPOSITORY if there is one; after it, a backup of the "
                "same VM stores anew what is still there",
            )
        if "pack" in kinds:
            return DamagedData(
                "packs are damaged, but no restore point that was checked needs the damaged parts"
            )
        if kinds:
            return DamagedIndex("the index or the configuration is damaged; the packs are intact")
        return None


class _Damaged(Protocol):
    """Takes note of a damaged range, and of the record that is to blame: a node of some level, or a chunk (-1)."""

    def __call__(
        self, offset: int, length: int, reason: str, record_id: RecordId | None = None, level: int = -1
    ) -> None: ...


class Need(NamedTuple):
    """A place of a restore point that can not be restored for lack of a record.

    Args:
        content: name of the disk or file; empty for the manifest.
        level: of a node; 0 for a leaf.
        offset, length: in the content, in bytes.
    """

    point: Point
    content: str
    tree: ContentTree | None
    kind: Kind
    level: int
    offset: int
    length: int


class Checker:
    """One run of `check`.

    Args:
        opener: None if there is no key: then only stored bytes are verified, and no trees.
        on_progress: called with bytes verified so far and bytes to verify.

    After it: `bad`, the records that the index points to in vain, with the reason; `unsound`, the packs whose own
    structure is damaged; `needs`, what restore points lack.
    """

    def __init__(
        self,
        repository: RepositoryId,
        packs: PackStore,
        index: Index,
        records: RecordReader,
        trees: TreeReader,
        opener: Opener | None,
        workers: int | None,
        now: Callable[[], float],
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._index = index
        self._records = records
        self._trees = trees
        self._now = now
        self._scrub = PackChecker(repository, packs, index, opener, workers, now, on_progress)
        self._reading: Reading | None = None
        self._sound = IdSet()
        self.bad: dict[RecordId, str] = {}
        self.unsound: dict[int, str] = {}
        self.needs: dict[RecordId, list[Need]] = {}
        self.report = CheckReport()

    def _find(self, message: str) -> None:
        self.report.findings.append(Finding("point", message))

    # --- packs

    def check_packs(self, *, read_data: bool, budget: Budget | None = None, reported: bool = False) -> None:
        """Questions 1 and 2.

        Args:
            budget: of the reading; None for all packs.
            reported: see `PackChecker.run`.
        """
        rows = self._index.packs()
        reading = Reading(rows, budget or Budget(), self._now()) if read_data else None
        scrub, report = self._scrub, self.report
        scrub.run(rows, reading, reported=reported)
        report.packs, report.records = scrub.packs, scrub.records
        report.bytes_verified = scrub.bytes_verified
        report.findings += scrub.findings
        report.notes += scrub.notes
        self.bad.update(scrub.bad)
        self.unsound.update(scrub.unsound)
        if reading is not None:
            self._reading = reading
            now = self._index.packs()
            report.reading = ReadSoFar(
                packs=scrub.packs_read,
                left_packs=len(reading.left),
                left_bytes=sum(row.committed_bytes for row in reading.left),
                ended_by=reading.ended_by,
                verified_bytes=sum(row.committed_bytes for row in now if row.verified),
                total_bytes=sum(row.committed_bytes for row in now),
                oldest=min((row.verified for row in now), default=0),
            )

    # --- restore points

    def check_points(self, points: Sequence[Point], *, read_data: bool) -> None:
        """Question 3; with `read_data`, every chunk of these points is loaded and proven as well.

        When a check's budget of time is used up and no damage has been found, the other points are left out.
        """
        for done, point in enumerate(points):
            if self._reading is not None and self._reading.time_is_up and not self.bad and done:
                self.report.notes.append(
                    f"the time was over: the trees of {len(points) - done} of {len(points)} restore points were "
                    "not looked at"
                )
                return
            self.report.points += 1
            bad = self.bad.get(RecordId(point.id))
            if bad is None:
                try:
                    self._records.load_one(RecordId(point.id), Kind.MANIFEST)
                except IntegrityError as error:
                    bad = error.message
            if bad is not None:
                self._find(f"the manifest of restore point {point.short_id} is damaged in its pack: {bad}")
                self._need(RecordId(point.id), Need(point, "", None, Kind.MANIFEST, 0, 0, 0))
            for name, tree in contents_of(point.manifest):
                self._check_tree(point, name, tree, read_data=read_data)

    def recheck_points(self, points: Sequence[Point], healed: Sequence[RecordId]) -> None:
        """Answers question 3 anew after some records have been healed; `needs` and what the report says of points too.

        What was found sound before is not read again.
        """
        for record_id in healed:
            self.bad.pop(record_id, None)
        self.needs = {}
        report = self.report
        report.points = 0
        report.damaged = []
        report.findings = [finding for finding in report.findings if finding.kind != "point"]
        self.check_points(points, read_data=False)

    def _need(self, record_id: RecordId, need: Need) -> None:
        needs = self.needs.setdefault(record_id, [])
        if len(needs) < _MOST_NEEDS:
            needs.append(need)

    def _check_tree(self, point: Point, name: str, tree: ContentTree, *, read_data: bool) -> None:
        def damaged(
            offset: int, length: int, reason: str, record_id: RecordId | None = None, level: int = -1
        ) -> None:
            if record_id is not None:
                kind = Kind.CHUNK if level < 0 else Kind.NODE
                self._need(record_id, Need(point, name, tree, kind, level, offset, length))
            report = self.report.damaged
            if len(report) < _MOST_RANGES:
                last = report[-1] if report else None
                same = last and (last.point, last.content, last.reason) == (point.id.hex(), name, reason)
                if last and same and last.offset + last.length == offset:
                    offset, length = last.offset, last.length + length
                    report.pop()
                report.append(
                    DamagedRange(point.id.hex(), point.manifest.vm_name, name, offset, length, reason)
                )

        try:
            height = self._trees.height(tree)
        except DamagedData as error:
            damaged(0, tree.size_bytes, error.message)
            return
        if tree.size_bytes:
            self._walk(tree, tree.root, height, 0, damaged, read_data=read_data)

    def _walk(
        self,
        tree: ContentTree,
        node: NodeId,
        level: int,
        first: int,
        damaged: _Damaged,
        *,
        read_data: bool,
    ) -> bool:
        """Checks a subtree; returns whether it is sound. Sound subtrees are remembered, and met once."""
        if node == HOLE_ID or node in self._sound:
            return True
        segment_bytes = tree.segment_bytes
        start = first * segment_bytes
        span = FANOUT**level
        length = min(span * segment_bytes, tree.size_bytes - start)
        reason = self.bad.get(node)
        if reason is not None:
            damaged(start, length, reason, node, level)
            return False
        try:
            if level:
                children = self._trees.children(tree, node, level, first)
            else:
                sound = self._check_leaf(tree, node, first, damaged, read_data=read_data)
                if sound:
                    self._sound.add([node])
                return sound
        except IntegrityError as error:
            damaged(start, length, error.message, node, level)
            return False
        sound = True
        step = FANOUT ** (level - 1)
        for number, child in enumerate(children):
            sound &= self._walk(tree, child, level - 1, first + number * step, damaged, read_data=read_data)
        if sound:
            self._sound.add([node])
        return sound

    def _check_leaf(
        self,
        tree: ContentTree,
        node: NodeId,
        segment: int,
        damaged: _Damaged,
        *,
        read_data: bool,
    ) -> bool:
        leaf = self._trees.leaf(node, segment_length(tree.size_bytes, tree.segment_bytes, segment))
        places = iter(self._index.lookup(leaf.ids))
        ids = iter(leaf.ids)
        offset = segment * tree.segment_bytes
        sound = True
        for part in leaf.lengths:
            if part > 0:
                chunk, place = next(ids), next(places)
                reason = self.bad.get(chunk, "")
                if place is None:
                    reason = "a chunk is in no pack that the index knows"
                elif place.plain_bytes != part:
                    reason = "a chunk has another length than the tree says"
                elif not reason and read_data:
                    try:
                        self._records.load_one(chunk, Kind.CHUNK)
                    except IntegrityError as error:
                        reason = error.message
                        self.bad.setdefault(chunk, reason)
                if reason:
                    sound = False
                    damaged(offset, part, reason, chunk)
            offset += abs(part)
        return sound


def contents_of(manifest: Manifest) -> list[tuple[str, ContentTree]]:
    """Name and tree of all disks and files of a point."""
    return [(disk.info.name, disk.tree) for disk in manifest.disks] + [
        (file.info.name, file.tree) for file in manifest.files
    ]


def missing_from(manifest: Manifest, trees: TreeReader, index: Index) -> bool:
    """Whether anything that a manifest needs is not in the index, or its nodes can not be read."""
    try:
        for _, tree in contents_of(manifest):
            if segments_of(tree) == 0:
                continue
            for segment, node in trees.data_leaves(tree):
                leaf = trees.leaf(node, segment_length(tree.size_bytes, tree.segment_bytes, segment))
                if any(place is None for place in index.lookup(leaf.ids)):
                    return True
    except IntegrityError:
        return True
    return False
