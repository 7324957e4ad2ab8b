"""Repair: what a check has found damaged is looked for elsewhere and stored anew; what is nowhere is let go of.

Where a record is looked for, in this order:
1. a manifest in the index, which has a copy of each;
2. in other packs: two backups that ran at the same time may both have stored it;
3. in another repository: by id if both name things alike (neither is encrypted, or both have the same key), else
   by place: what another point of the same VM holds there, if it is what is looked for. A leaf is made anew from
   the content of its segment.

What is found is appended as a fresh record by a session like any backup's, and the index points to it from the
transaction that commits it. Healed nodes show what lies below them, so it goes on until nothing more is found.
What was not found is dropped from the index in the end: then the next backup of the same content stores it.
Records of a pack whose header, table or footer is damaged are written anew as well, since a rebuild of the index
would not find them.

Invariants: nothing is removed from any pack; a record that can be read and proven is never let go of; one that can
not be read for an I/O error is not either. Whenever it is killed, whatever was committed stands, and the rest
is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast.chunker import Chunker
from holdfast.errors import (
    DamagedData,
    DamagedIndex,
    DamagedPoint,
    HoldfastError,
    IntegrityError,
    StorageError,
    UnsupportedFormat,
)
from holdfast.ids import HOLE_ID, ChunkId, NodeId, PackId, RecordId, RepositoryId
from holdfast.repo.check import Checker, DamagedRange, Need, contents_of
from holdfast.repo.codec import Opener, Sealed, Sealer
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import FANOUT, Inner, Leaf, encode_inner, encode_leaf
from holdfast.repo.format.record import (
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Kind,
    decode_record_header,
)
from holdfast.repo.format.rows import PackState, Place
from holdfast.repo.index import Index
from holdfast.repo.keys import Keys
from holdfast.repo.packs import PackStore
from holdfast.repo.points import Point
from holdfast.repo.reader import DiskReader
from holdfast.repo.records import RecordReader, scanner_of
from holdfast.repo.recover import read_pack_header, read_table
from holdfast.repo.session import Session
from holdfast.repo.tree import TreeReader, segment_length, segments_of

__all__ = ["Donor", "RepairReport", "Repairer"]

_REWRITE_BYTES: Final = 8 << 20
_LOOKUP_AT_ONCE: Final = 4096
_MOST_CANDIDATES: Final = 16
_DROP_AT_ONCE: Final = 4096
_FROM_INDEX: Final = "the index"
_FROM_PACKS: Final = "other packs"


@dataclass(frozen=True, slots=True)
class Donor:
    """Another repository, from which records may be taken.

    Args:
        name: as the user wrote it.
    """

    name: str
    keys: Keys
    index: Index
    records: RecordReader
    trees: TreeReader
    points: Sequence[Point]


@dataclass(slots=True)
class RepairReport:
    """What a repair has done. Numbers are of records.

    Args:
        damaged: that were damaged or missing.
        healed: by where they were found.
        dropped: that were nowhere to be found; a later backup of the same content stores them.
        unreadable: that the storage failed to read; they are left as they are.
        moved: intact ones, out of packs that are damaged themselves.
        ranges: what can still not be restored.
        marks: of those that were dropped, how many say what became of a restore point.
        manifests: restore points whose manifest is still damaged in its pack.
        others: findings that a repair does not mend.
    """

    damaged: int = 0
    healed: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    marks: int = 0
    unreadable: int = 0
    moved: int = 0
    packs_forgotten: int = 0
    ranges: list[DamagedRange] = field(default_factory=list)
    manifests: int = 0
    others: list[str] = field(default_factory=list)

    @property
    def healed_total(self) -> int:
        """How many were healed."""
        return sum(self.healed.values())

    @property
    def complete(self) -> bool:
        """Whether every restore point is whole again, and nothing else is wrong."""
        return self.error() is None

    def error(self) -> IntegrityError | None:
        """The error that what is left amounts to; None if nothing is."""
        if self.ranges or self.manifests:
            count = len({part.point for part in self.ranges}) or self.manifests
            return DamagedPoint(
                f"{count} restore point{'s stay' if count != 1 else ' stays'} damaged: "
                f"{self.damaged - self.healed_total} of {self.damaged} damaged records were found nowhere else",
                hint="--from names another repository to heal from; a new backup of the same VM stores anew what its "
                "disks still hold; 'holdfast restore --allow-damaged' restores the rest",
            )
        if self.unreadable:
            return DamagedData(
                f"the storage failed to read {self.unreadable} records; no restore point needs them now, "
                "and they were left as they are"
            )
        if self.others:
            return DamagedIndex(f"repair does not mend this: {self.others[0]}")
        return None


class Repairer:
    """One repair.

    Args:
        records: of the repository, by its key.
        session: not begun; begun when there is something to write, and closed.
        chunker: as the repository's own backups cut.
        on_progress: called with a word, and records healed of records to heal.
    """

    def __init__(
        self,
        repository: RepositoryId,
        packs: PackStore,
        index: Index,
        records: RecordReader,
        opener: Opener,
        keys: Keys,
        sealer: Sealer,
        session: Session,
        chunker: Chunker,
        donor: Donor | None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._repository = repository
        self._packs = packs
        self._index = index
        self._records = records
        self._opener = opener
        self._keys = keys
        self._sealer = sealer
        self._session = session
        self._chunker = chunker
        self._donor = donor
        self._on_progress = on_progress
        self._begun = False
        self._batch: list[Sealed] = []
        self._replacing: dict[RecordId, tuple[int, int]] = {}
        self._batch_bytes = 0
        self._healed: dict[RecordId, str] = {}
        self._places: dict[RecordId, Place | None] = {}
        self._unreadable: set[RecordId] = set()
        self._readers: dict[tuple[RecordId, str], DiskReader] = {}
        self.report = RepairReport()

    def run(self, checker: Checker, points: Sequence[Point]) -> RepairReport:
        """Heals what a check has found.

        Args:
            checker: that has checked all packs and these points.

        Raises:
            StorageError: the repository can not be written; what was healed until then is.
        """
        try:
            self._heal_all(checker, points)
            self._empty_packs(checker.unsound)
            if self._begun:
                self._write()
                self._session.flush()
        finally:
            if self._begun:
                with contextlib.suppress(StorageError):
                    self._session.close(keep=False)
        self._let_go()
        self._forget_packs(checker.unsound)
        report = self.report
        report.ranges = list(checker.report.damaged)
        report.manifests = sum(finding.kind == "point" for finding in checker.report.findings)
        report.others = [f.message for f in checker.report.findings if f.kind in ("index", "config")]
        report.unreadable = len(self._unreadable - self._healed.keys())
        return report

    def _heal_all(self, checker: Checker, points: Sequence[Point]) -> None:
        damaged: set[RecordId] = set()
        tried: set[RecordId] = set()
        placed: set[RecordId] = set()  # of which it was known where they belong
        while found := (checker.bad.keys() | checker.needs.keys()) - tried | (checker.needs.keys() - placed):
            tried |= found
            placed |= checker.needs.keys()
            wanted = self._really_damaged(found - self._healed.keys())
            self.report.damaged += len(wanted.keys() - damaged)
            damaged |= wanted.keys()
            self._heal(wanted, checker.needs)
            self._write()
            if self._begun:
                self._session.flush()
            checker.recheck_points(points, [i for i in tried if i in self._healed or i not in self._places])

    def _really_damaged(self, ids: Iterable[RecordId]) -> dict[RecordId, Kind | None]:
        """Those that can not be read now either, with their kind if the index knows it."""
        found: dict[RecordId, Kind | None] = {}
        ordered = sorted(ids)
        for record_id, place in zip(ordered, self._index.lookup(ordered), strict=True):
            if place is None:
                self._places[record_id] = None
                found[record_id] = None
                continue
            try:
                self._records.load_one(record_id, Kind(place.kind))
            except StorageError:
                self._unreadable.add(record_id)
            except IntegrityError:
                pass
            else:
                continue
            self._places[record_id] = place
            found[record_id] = Kind(place.kind)
        return found

    # --- where to look

    def _heal(self, wanted: dict[RecordId, Kind | None], needs: dict[RecordId, list[Need]]) -> None:
        left = dict(wanted)
        sources: list[tuple[str, Callable[[], Iterator[Sealed]]]] = [
            (_FROM_INDEX, lambda: self._from_index(left)),
            (_FROM_PACKS, lambda: self._from_packs(left)),
        ]
        donor = self._donor
        if donor is not None:
            if donor.keys.id_keys == self._keys.id_keys:
                sources.append((donor.name, lambda: self._by_id(donor, left)))
            sources.append((donor.name, lambda: self._by_place(donor, left, needs)))
        for name, source in sources:
            if not left:
                return
            for sealed in source():
                record_id = sealed.header.id
                if record_id not in left:
                    continue
                del left[record_id]
                self._healed[record_id] = name
                self.report.healed[name] = self.report.healed.get(name, 0) + 1
                self._add(sealed)
                self._on_progress(len(self._healed), self.report.damaged)

    def _from_index(self, wanted: dict[RecordId, Kind | None]) -> Iterator[Sealed]:
        for row in self._index.points():
            if RecordId(row.id) not in wanted:
                continue
            with contextlib.suppress(DamagedData, UnsupportedFormat):
                header = decode_record_header(row.record, row.pack)
                payload = row.record[RECORD_HEADER_BYTES:]
                if header.kind is Kind.MANIFEST and header.id == row.id:
                    self._opener.open(header, payload)
                    yield Sealed(header, payload)

    def _from_packs(self, wanted: dict[RecordId, Kind | None]) -> Iterator[Sealed]:
        """Every intact copy in a pack, wherever the index points to."""
        rows = {row.id: row for row in self._index.packs()}
        for pack_id in self._packs.ids():
            if not wanted:
                return
            with contextlib.suppress(DamagedData, UnsupportedFormat, StorageError):
                length = self._packs.length(pack_id) or 0
                row = rows.get(pack_id)
                if row is not None and row.state is not PackState.OPEN:
                    length = min(length, row.committed_bytes)
                if length <= PACK_HEADER_BYTES:
                    continue
                read_pack_header(self._packs, pack_id, self._repository)
                for record_id, offset, size in self._entries(pack_id, length):
                    if record_id in wanted:
                        sealed = self._copy(pack_id, offset, size)
                        if sealed is not None and sealed.header.id == record_id:
                            yield sealed

    def _entries(self, pack_id: PackId, length: int) -> Iterator[tuple[RecordId, int, int]]:
        """Id, offset and stored bytes of the records of a pack, as its table or else its headers say."""
        with contextlib.suppress(DamagedData):
            table = read_table(self._packs, pack_id, length)
            if table is not None:
                yield from ((entry.id, entry.offset, entry.stored_bytes) for entry in table[0])
                return
        for found in scanner_of(self._packs, pack_id, length, payloads=False, reported=True).records():
            yield found.header.id, found.offset, found.header.stored_bytes

    def _copy(self, pack_id: PackId, offset: int, stored: int) -> Sealed | None:
        """A record as it stands in a pack; None if it is not intact."""
        try:
            data = self._packs.read(pack_id, offset, RECORD_HEADER_BYTES + stored)
            header = decode_record_header(data, pack_id)
            payload = data[RECORD_HEADER_BYTES:]
            if header.stored_bytes != stored:
                return None
            self._opener.open(header, payload)
        except (DamagedData, UnsupportedFormat, StorageError):
            return None
        return Sealed(header, payload)

    def _by_id(self, donor: Donor, wanted: dict[RecordId, Kind | None]) -> Iterator[Sealed]:
        ids = sorted(wanted)
        for record_id, place in zip(ids, donor.index.lookup(ids), strict=True):
            if place is None or Kind(place.kind) in (Kind.MANIFEST, Kind.MARK):
                continue
            with contextlib.suppress(IntegrityError, StorageError):
                kind = Kind(place.kind)
                plaintext = donor.records.load_one(record_id, kind)
                yield self._sealer.seal(kind, record_id, plaintext)

    def _by_place(
        self, donor: Donor, wanted: dict[RecordId, Kind | None], needs: dict[RecordId, list[Need]]
    ) -> Iterator[Sealed]:
        for record_id in list(wanted):
            for plaintext, kind in self._candidates(donor, needs.get(record_id, [])):
                if self._keys.record_id(kind, plaintext) == record_id:
                    yield self._sealer.seal(kind, record_id, plaintext)
                    break

    def _candidates(self, donor: Donor, needs: Sequence[Need]) -> Iterator[tuple[bytes, Kind]]:
        """What the donor holds in the places of a record, best guess first."""
        for need in needs:
            if need.tree is None:
                continue
            for point in _nearest(donor.points, need.point):
                tree = _same_content(need, point)
                if tree is None or need.offset + need.length > tree.size_bytes:
                    continue
                if need.level > 0 and point.manifest.time != need.point.manifest.time:
                    continue  # an inner node stands for gigabytes: only the point that most likely has them
                with contextlib.suppress(IntegrityError, StorageError):
                    reader = self._reader(donor, point, need.content, tree)
                    if need.kind is Kind.CHUNK:
                        yield reader.pread(need.offset, need.length), Kind.CHUNK
                    else:
                        first = need.offset // need.tree.segment_bytes
                        _, text = self._node(reader, need.tree, need.level, first)
                        yield text, Kind.NODE

    def _reader(self, donor: Donor, point: Point, content: str, tree: ContentTree) -> DiskReader:
        key = RecordId(point.id), content
        if key not in self._readers:
            if len(self._readers) >= _MOST_CANDIDATES:
                self._readers.clear()
            self._readers[key] = DiskReader(donor.records, donor.trees, tree)
        return self._readers[key]

    def _node(self, reader: DiskReader, tree: ContentTree, level: int, first: int) -> tuple[NodeId, bytes]:
        """Id and plaintext of the node that this content has in a place, made from the content itself."""
        if not level:
            start = first * tree.segment_bytes
            data = memoryview(reader.pread(start, segment_length(tree.size_bytes, tree.segment_bytes, first)))
            parts: list[int] = []
            ids: list[ChunkId] = []
            at = 0
            for part in self._chunker.cut(data):
                parts.append(part)
                if part > 0:
                    ids.append(ChunkId(self._keys.record_id(Kind.CHUNK, data[at : at + part])))
                at += abs(part)
            if not ids:
                return HOLE_ID, b""
            text = encode_leaf(Leaf(tuple(parts), tuple(ids)))
        else:
            step = FANOUT ** (level - 1)
            count = -(-min(segments_of(tree) - first, step * FANOUT) // step)
            children = tuple(
                self._node(reader, tree, level - 1, first + number * step)[0] for number in range(count)
            )
            if all(child == HOLE_ID for child in children):
                return HOLE_ID, b""
            text = encode_inner(Inner(level, children))
        return NodeId(self._keys.record_id(Kind.NODE, text)), text

    # --- what becomes of it

    def _add(self, sealed: Sealed) -> None:
        record_id = sealed.header.id
        place = self._places.get(record_id)
        if place is not None:
            self._replacing[record_id] = place.pack, place.offset
        self._batch.append(sealed)
        self._batch_bytes += sealed.header.total_bytes
        if self._batch_bytes >= _REWRITE_BYTES:
            self._write()

    def _write(self) -> None:
        if not self._batch:
            return
        if not self._begun:
            self._session.begin()
            self._begun = True
        batch, replacing = self._batch, self._replacing
        self._batch, self._replacing, self._batch_bytes = [], {}, 0
        self._session.rewrite(batch, replacing)

    def _empty_packs(self, unsound: dict[int, str]) -> None:
        """Writes the intact records of damaged packs anew."""
        ids = {row.number: row.id for row in self._index.packs() if row.number in unsound}
        after: RecordId | None = None
        while ids and (page := self._index.scan(after, _LOOKUP_AT_ONCE)):
            for record_id, place in page:
                if place.pack not in ids or record_id in self._healed:
                    continue
                sealed = self._copy(ids[place.pack], place.offset, place.stored_bytes)
                if sealed is not None and sealed.header.id == record_id:
                    self._places[record_id] = place
                    self._add(sealed)
                    self.report.moved += 1
            after = page[-1][0]
        self._write()
        if self._begun:
            self._session.flush()

    def _let_go(self) -> None:
        """Drops from the index what was nowhere to be found; manifests stay, since the index has them."""
        doomed = {
            record_id: (place.pack, place.offset)
            for record_id, place in self._places.items()
            if place is not None
            and record_id not in self._healed
            and record_id not in self._unreadable
            and Kind(place.kind) is not Kind.MANIFEST
        }
        for record_id in list(doomed):  # once more: nothing that can be read is let go of
            with contextlib.suppress(HoldfastError):
                self._records.load_one(record_id, self._kind_of(record_id))
                del doomed[record_id]
        self.report.marks = sum(self._kind_of(record_id) == Kind.MARK for record_id in doomed)
        ids = sorted(doomed)
        for first in range(0, len(ids), _DROP_AT_ONCE):
            part = {record_id: doomed[record_id] for record_id in ids[first : first + _DROP_AT_ONCE]}
            self.report.dropped += self._index.drop(part).records

    def _kind_of(self, record_id: RecordId) -> Kind:
        place = self._places[record_id]
        assert place is not None
        return Kind(place.kind)

    def _forget_packs(self, unsound: dict[int, str]) -> None:
        """Takes packs out of the index that do not exist and hold nothing that is needed."""
        for row in self._index.packs():
            if row.number in unsound and not row.records and self._packs.length(row.id) is None:
                self.report.packs_forgotten += self._index.remove_pack(row.number)


def _nearest(points: Sequence[Point], wanted: Point) -> list[Point]:
    """The points of the same VM, those nearest in time first."""
    of_vm = [point for point in points if point.manifest.vm_uuid == wanted.manifest.vm_uuid]
    of_vm.sort(key=lambda point: abs(point.manifest.time - wanted.manifest.time))
    return of_vm[:_MOST_CANDIDATES]


def _same_content(need: Need, point: Point) -> ContentTree | None:
    """The disk or file of another point that stands for the same one."""
    uuid = next((disk.info.uuid for disk in need.point.manifest.disks if disk.info.name == need.content), "")
    if uuid:
        for disk in point.manifest.disks:
            if disk.info.uuid == uuid:
                return disk.tree
    return dict(contents_of(point.manifest)).get(need.content)
