"""Checking: is everything that is listed really there, and is it what was written?

Three questions, in this order, none of which needs exclusive access:
1. packs against index, both ways: every record of a pack's table is found in the index at its place, and
   the index has no row that points anywhere else;
2. with `read_data`, every stored byte against its strong hash, and with the key every record against its id;
3. every restore point's trees: all nodes and chunks present, and none of them among the damaged ones.

What a check sees is the state at its beginning; backups may go on beside it.
Memory: 16 bytes per tree node, and one object per damaged record.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from holdfast.errors import (
    DamagedData,
    DamagedIndex,
    DamagedPoint,
    HoldfastError,
    IntegrityError,
    StorageError,
    UnsupportedFormat,
)
from holdfast.ids import HOLE_ID, NodeId, RecordId, RepositoryId
from holdfast.repo.codec import Opener
from holdfast.repo.format.manifest import ContentTree, Manifest
from holdfast.repo.format.node import FANOUT
from holdfast.repo.format.record import (
    FOOTER_BYTES,
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Kind,
    TableEntry,
)
from holdfast.repo.format.rows import PackRow, PackState, Place
from holdfast.repo.idset import IdSet
from holdfast.repo.index import Index
from holdfast.repo.packs import PackStore
from holdfast.repo.parallel import run_parallel
from holdfast.repo.points import Point
from holdfast.repo.records import PackScanner, RecordReader, ScannedRecord
from holdfast.repo.recover import read_pack_header, read_table
from holdfast.repo.tree import TreeReader, segment_length, segments_of

__all__ = ["CheckReport", "Checker", "DamagedRange", "Finding", "missing_from"]

_LOOKUP_AT_ONCE: Final = 4096
_MOST_RANGES: Final = 10_000

FindingKind = Literal["pack", "index", "config", "point"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: FindingKind
    message: str


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


@dataclass(slots=True)
class CheckReport:
    """What a check has looked at and found."""

    packs: int = 0
    records: int = 0
    points: int = 0
    bytes_verified: int = 0
    findings: list[Finding] = field(default_factory=list)
    damaged: list[DamagedRange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
                hint="back the same VM up again: content that is still there is stored anew",
            )
        if "pack" in kinds:
            return DamagedData(
                "packs are damaged, but no restore point that was checked needs the damaged parts"
            )
        if kinds:
            return DamagedIndex("the index or the configuration is damaged; the packs are intact")
        return None


class _Broken(NamedTuple):
    """A pack in which records are missing: which of them, is told by the index alone."""

    found: AbstractSet[int]
    reason: str


class Checker:
    """One run of `check`.

    Args:
        opener: None if there is no key: then only stored bytes are verified, and no trees.
        on_progress: called with bytes verified so far and bytes to verify.
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
        self._repository = repository
        self._packs = packs
        self._index = index
        self._records = records
        self._trees = trees
        self._opener = opener
        self._workers = workers
        self._now = now
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._bad: dict[RecordId, str] = {}
        self._broken: dict[int, _Broken] = {}
        self._sound = IdSet()
        self.report = CheckReport()

    def _find(self, kind: FindingKind, message: str) -> None:
        with self._lock:
            self.report.findings.append(Finding(kind, message))

    # --- packs

    def check_packs(self, *, read_data: bool) -> None:
        """Questions 1 and 2."""
        before = self._index.figures()
        rows = self._index.packs()
        after = self._index.figures()
        total = sum(row.committed_bytes for row in rows)

        def work(row: PackRow) -> None:
            self._check_pack(row, read_data=read_data)
            with self._lock:
                self.report.packs += 1

        run_parallel(
            iter(rows), work, self._workers, lambda: self._on_progress(self.report.bytes_verified, total)
        )
        self._on_progress(self.report.bytes_verified, total)
        self._mark_missing()
        expected = sum(row.records for row in rows)
        if before.records == after.records and expected != before.records:
            self._find("index", f"the index holds {before.records} records, its packs count {expected}")
        self._strays({row.id for row in rows})

    def _strays(self, known: set[bytes]) -> None:
        for pack_id in self._packs.ids():
            if pack_id in known or pack_id in {row.id for row in self._index.packs()}:
                continue
            self.report.notes.append(
                f"pack {pack_id.hex()} is not in the index yet: a backup is writing it, or one was "
                "interrupted; the next backup takes over what it holds"
            )

    def _check_pack(self, row: PackRow, *, read_data: bool) -> None:
        """Checks one pack against the index; what the index has in it that is not there is left to `_mark_missing`."""
        name = row.id.hex()
        length = self._packs.length(row.id)
        if length is None:
            self._find("pack", f"pack {name} is missing")
            self._broken[row.number] = _Broken(frozenset(), f"pack {name} is missing")
            return
        # An interrupted adoption leaves rows behind the committed length.
        end = max(row.committed_bytes, PACK_HEADER_BYTES + row.live_bytes + row.dead_bytes)
        sound = length >= end
        if not sound:
            self._find(
                "pack", f"pack {name} is {length} bytes long, but {row.committed_bytes} were committed"
            )
            end = length
        try:
            read_pack_header(self._packs, row.id, self._repository)
        except (DamagedData, UnsupportedFormat) as error:
            sound = False
            self._find("pack", f"pack {name}: {error.message}")
        table = self._table(row) if sound and row.state is PackState.SEALED else None
        sound &= row.state is PackState.OPEN or table is not None
        scanned = PackScanner(self._packs, row.id, max(end, PACK_HEADER_BYTES), payloads=False)
        entries = table if table is not None else [_entry(r) for r in scanned.records()]
        here = self._in_index(
            row, [e for e in entries if e.kind is not Kind.TABLE], trusted=table is not None
        )
        missing = row.records - len(here)
        if scanned.damaged and not self._is_old_gap(row, missing, scanned.damaged):
            sound = False
            if not read_data:
                self._find_damaged(row, scanned.damaged)
        if missing:
            self._broken[row.number] = _Broken(here.keys(), f"pack {name} has no intact record there")
            if sound:
                sound = False
                self._find(
                    "index", f"the index counts {row.records} records in pack {name}, {len(here)} are there"
                )
        if read_data and length:
            sound &= self._read(row, end, here, missing)
            if sound:
                with contextlib.suppress(StorageError):  # read-only, or full: it is only a note
                    self._index.set_verified(row.number, int(self._now()))

    def _table(self, row: PackRow) -> list[TableEntry] | None:
        try:
            sealed = read_table(self._packs, row.id, row.committed_bytes)
            if sealed is None:
                raise DamagedData(f"the footer of pack {row.id.hex()} is damaged")
        except (DamagedData, UnsupportedFormat) as error:
            self._find("pack", f"{error.message} (the records before it may be intact)")
            return None
        return sealed[0]

    def _in_index(self, row: PackRow, entries: list[TableEntry], *, trusted: bool) -> dict[int, RecordId]:
        """Offset -> id of the records that the index has at that place.

        Args:
            trusted: the entries are from a table; otherwise from headers, behind which anything may be.
        """
        here: dict[int, RecordId] = {}
        lost = elsewhere = 0
        for entry, place in zip(entries, self._lookup([e.id for e in entries]), strict=True):
            if place is None:
                lost += trusted or self._is_intact(row, entry)
            elif place.pack == row.number and place.offset == entry.offset:
                here[entry.offset] = entry.id
                if (place.stored_bytes, place.plain_bytes, place.kind) != (
                    entry.stored_bytes,
                    entry.plain_bytes,
                    entry.kind,
                ):
                    self._find("index", f"the index gives record {entry.id.hex()[:16]} wrong lengths")
            else:
                elsewhere += 1
        with self._lock:
            self.report.records += len(here)
        if lost and lost + elsewhere > row.dead_records:
            self._find("index", f"the index does not find {lost} records of pack {row.id.hex()}")
        return here

    def _lookup(self, ids: Sequence[RecordId]) -> Iterator[Place | None]:
        for first in range(0, len(ids), _LOOKUP_AT_ONCE):
            yield from self._index.lookup(ids[first : first + _LOOKUP_AT_ONCE])

    def _is_intact(self, row: PackRow, entry: TableEntry) -> bool:
        end = entry.offset + RECORD_HEADER_BYTES + entry.stored_bytes
        scanner = PackScanner(self._packs, row.id, end, payloads=True)
        return next(scanner.records(entry.offset, resync=False), None) is not None

    @staticmethod
    def _is_old_gap(row: PackRow, missing: int, damaged: list[tuple[int, int]]) -> bool:
        """Whether no record that the index counts can be in the damaged parts.

        A rebuild of the index passes over bytes in which there is no record: the torn end of a killed backup, or
        damage, whose loss shows itself in the points that need it.
        """
        gap = row.committed_bytes - PACK_HEADER_BYTES - row.live_bytes - row.dead_bytes
        return row.state is PackState.OPEN and not missing and sum(size for _, size in damaged) <= gap

    def _find_damaged(self, row: PackRow, damaged: list[tuple[int, int]]) -> None:
        for offset, length in damaged:
            self._find("pack", f"pack {row.id.hex()}: {length} damaged bytes from byte {offset} on")

    def _mark_missing(self) -> None:
        """Marks the records that the index has in broken packs and that were not found there. Cost: one scan."""
        after: RecordId | None = None
        while self._broken and (page := self._index.scan(after, _LOOKUP_AT_ONCE)):
            for record_id, place in page:
                broken = self._broken.get(place.pack)
                if broken is not None and place.offset not in broken.found:
                    self._mark(record_id, f"{broken.reason} (byte {place.offset})")
            after = page[-1][0]

    def _mark(self, record_id: RecordId, reason: str) -> None:
        with self._lock:
            self._bad.setdefault(record_id, reason)

    def _read(self, row: PackRow, end: int, here: Mapping[int, RecordId], missing: int) -> bool:
        """Verifies every stored byte of a pack; returns whether all of them are sound.

        Args:
            here: what the index has in it, as offset -> id.
            missing: how many more records the index has in it.
        """
        name = row.id.hex()
        if row.state is PackState.SEALED and end == row.committed_bytes:
            end -= FOOTER_BYTES
        scanner = PackScanner(self._packs, row.id, max(end, PACK_HEADER_BYTES), payloads=True)
        sound = True
        seen: dict[int, RecordId] = {}
        reason = ""
        try:
            for record in scanner.records():
                seen[record.offset] = record.header.id
                if self._opener is not None and record.header.kind is not Kind.TABLE:
                    assert record.payload is not None
                    try:
                        self._opener.open(record.header, record.payload)
                    except DamagedData as error:
                        sound = False
                        self._find("pack", f"pack {name}, byte {record.offset}: {error.message}")
                        self._mark(record.header.id, error.message)
                with self._lock:
                    self.report.bytes_verified += record.header.total_bytes
        except HoldfastError as error:
            sound = False
            reason = error.message
            self._find("pack", f"pack {name}: {error.message}")
        lost = [(offset, record_id) for offset, record_id in here.items() if seen.get(offset) != record_id]
        for offset, record_id in lost:
            self._mark(record_id, reason or f"damaged at byte {offset} of pack {name}")
        if scanner.damaged and not self._is_old_gap(row, missing + len(lost), scanner.damaged):
            self._find_damaged(row, scanner.damaged)
        elif lost and not reason:
            self._find("pack", f"pack {name} holds {len(lost)} records in places that are not theirs")
        return sound and not scanner.damaged and not lost

    # --- restore points

    def check_points(self, points: Sequence[Point], *, read_data: bool) -> None:
        """Question 3; with `read_data`, every chunk of these points is loaded and proven as well."""
        for point in points:
            self.report.points += 1
            bad = self._bad.get(RecordId(point.id))
            if bad is None:
                try:
                    self._records.load_one(RecordId(point.id), Kind.MANIFEST)
                except IntegrityError as error:
                    bad = error.message
            if bad is not None:
                self._find(
                    "point", f"the manifest of restore point {point.short_id} is damaged in its pack: {bad}"
                )
            for name, tree in contents_of(point.manifest):
                self._check_tree(point, name, tree, read_data=read_data)

    def _check_tree(self, point: Point, name: str, tree: ContentTree, *, read_data: bool) -> None:
        def damaged(offset: int, length: int, reason: str) -> None:
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
        damaged: Callable[[int, int, str], None],
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
        reason = self._bad.get(node)
        if reason is not None:
            damaged(start, length, reason)
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
            damaged(start, length, error.message)
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
        damaged: Callable[[int, int, str], None],
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
                reason = self._bad.get(chunk, "")
                if place is None:
                    reason = "a chunk is in no pack that the index knows"
                elif place.plain_bytes != part:
                    reason = "a chunk has another length than the tree says"
                elif not reason and read_data:
                    try:
                        self._records.load_one(chunk, Kind.CHUNK)
                    except IntegrityError as error:
                        reason = error.message
                        self._mark(chunk, reason)
                if reason:
                    sound = False
                    damaged(offset, part, reason)
            offset += abs(part)
        return sound


def _entry(record: ScannedRecord) -> TableEntry:
    header = record.header
    return TableEntry(
        header.id,
        record.offset,
        header.stored_bytes,
        header.plain_bytes,
        header.kind,
        header.codec,
        header.flags,
    )


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
