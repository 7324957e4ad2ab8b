"""Reading records: from ids to verified plaintexts, and from a pack's bytes to its records.

Every plaintext that leaves this module has been proven against its id. Reads are sorted by place and
neighbouring records are read in one piece.

Garbage collection and repair move records while others read: a record that is not where the index said a moment
ago, or is damaged there, is looked up once more, and damaged only if it is still said to be there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar, runtime_checkable

from holdfast.errors import DamagedData, InternalError, UnsupportedFormat
from holdfast.ids import PackId, RecordId
from holdfast.repo.codec import Opener, Sealed, strong_hash
from holdfast.repo.format.record import (
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Kind,
    RecordHeader,
    TableEntry,
    decode_record_header,
)
from holdfast.repo.format.rows import Place
from holdfast.repo.index import Index
from holdfast.repo.packs import PackStore
from holdfast.units import KIB, MIB

__all__ = [
    "PackScanner",
    "RecordLister",
    "ReadNotes",
    "RecordReader",
    "PackReporter",
    "ReportedScan",
    "ScannedPiece",
    "ScannedRecord",
    "records_of",
    "scanner_of",
]

T = TypeVar("T")

_MOST_GAP_BYTES: Final = 64 * KIB
_MOST_READ_BYTES: Final = 2 * MIB
_SCAN_BYTES: Final = 4 * MIB


class _Run(NamedTuple):
    """Records that lie near each other in one pack.

    Args:
        records: (number of the pack, offset, stored bytes, id) of each, by offset.
        start, end: all of them, in bytes of the pack.
    """

    records: list[tuple[int, int, int, RecordId]]
    start: int
    end: int


class ReadNotes(Protocol):
    """Hears of everything that was read and proven against its id."""

    def read(self, pack: int, records: Sequence[tuple[int, int]]) -> None:
        """Some records of a pack, by offset: (offset, bytes with header) of each. Called from several threads."""
        ...


class RecordReader:
    """Loads records by id. Thread-safe.

    Args:
        notes: is told of all that is read.
    """

    def __init__(
        self, packs: PackStore, index: Index, opener: Opener, notes: ReadNotes | None = None
    ) -> None:
        self._packs = packs
        self._index = index
        self._opener = opener
        self._notes = notes
        self._pack_ids: dict[int, PackId] = {}
        self._lock = threading.Lock()

    def pack_id(self, number: int) -> PackId:
        """The id of the pack that the index calls by a number.

        Raises:
            DamagedData: there is no such pack.
        """
        found = self._pack_ids.get(number)
        if found is None:
            with self._lock:
                self._pack_ids = {row.number: row.id for row in self._index.packs()}
            found = self._pack_ids.get(number)
            if found is None:
                raise DamagedData(f"the index names pack number {number}, which it does not list")
        return found

    def load_one(self, record_id: RecordId, kind: Kind) -> bytes:
        """The plaintext of one record.

        Raises:
            DamagedData: it is missing or damaged.
        """
        return self.load([record_id], kind)[record_id]

    def load(self, ids: Sequence[RecordId], kind: Kind) -> dict[RecordId, bytes]:
        """The plaintexts of some records, by id.

        Cost: memory for all plaintexts, and `_MOST_READ_BYTES` for the reading.

        Raises:
            DamagedData: one of them is missing or damaged.
        """
        return dict(self.each(ids, kind))

    def each(self, ids: Sequence[RecordId], kind: Kind) -> Iterator[tuple[RecordId, bytes]]:
        """Yields the plaintexts of some records, each once, in the order in which packs are best read.

        Cost: memory for one plaintext, and `_MOST_READ_BYTES` for the reading.

        Raises:
            DamagedData: one of them is missing or damaged.
        """
        for run in self._runs(list(dict.fromkeys(ids)), kind):
            yield from self._read(run, kind, self._opener.open)

    def load_into(self, targets: Mapping[RecordId, memoryview], kind: Kind) -> None:
        """Writes the plaintext of each record into its place in memory; each must have just its length.

        Nobody may use what is in the targets before this returns.

        Raises:
            DamagedData: one of them is missing, damaged, or of another length.
        """

        def use(header: RecordHeader, payload: memoryview) -> None:
            self._opener.open_into(header, payload, targets[header.id])

        for run in self._runs(list(targets), kind):
            for _ in self._read(run, kind, use):
                pass

    def sealed(self, ids: Sequence[RecordId], kind: Kind) -> Iterator[Sealed]:
        """Yields some records as they are stored, each once, in the order in which packs are best read.

        What is stored is held against its strong hash; no key is needed. Payloads are views of what was read in one piece:
        whoever keeps one keeps all of that.

        Raises:
            DamagedData: one of them is missing or damaged.
        """

        def use(header: RecordHeader, payload: memoryview) -> Sealed:
            if strong_hash(payload) != header.strong_hash:
                raise DamagedData(f"{kind.name.lower()} {header.id.hex()[:16]} is damaged in its pack")
            return Sealed(header, payload)

        for run in self._runs(list(dict.fromkeys(ids)), kind):
            for _, sealed in self._read(run, kind, use):
                yield sealed

    def _runs(self, unique: Sequence[RecordId], kind: Kind) -> Iterator[_Run]:
        """The places of records, by runs that are best read in one piece."""
        wanted: list[tuple[int, int, int, RecordId]] = []
        for record_id, place in zip(unique, self._index.lookup(unique), strict=True):
            if place is None:
                raise _absent(kind, record_id)
            wanted.append((place.pack, place.offset, place.stored_bytes, record_id))
        wanted.sort()
        first = 0
        while first < len(wanted):
            pack, start, stored, _ = wanted[first]
            end = start + RECORD_HEADER_BYTES + stored
            last = first + 1
            while (
                last < len(wanted)
                and wanted[last][0] == pack
                and wanted[last][1] - end <= _MOST_GAP_BYTES
                and wanted[last][1] + wanted[last][2] - start <= _MOST_READ_BYTES
            ):
                end = wanted[last][1] + RECORD_HEADER_BYTES + wanted[last][2]
                last += 1
            yield _Run(wanted[first:last], start, end)
            first = last

    def _read(
        self, run: _Run, kind: Kind, use: Callable[[RecordHeader, memoryview], T]
    ) -> Iterator[tuple[RecordId, T]]:
        """What `use` makes of each record of a run; it raises DamagedData if the payload is damaged."""
        number = run.records[0][0]
        try:
            pack_id = self.pack_id(number)
            data = memoryview(self._packs.read(pack_id, run.start, run.end - run.start))
        except DamagedData as error:  # the pack is missing, or too short: that is no matter of all of them
            for _, offset, stored, record_id in run.records:
                try:
                    yield record_id, self._read_alone(number, offset, stored, record_id, kind, use)
                except DamagedData:
                    yield record_id, self._read_again(number, offset, record_id, kind, use, error)
            return
        sound = True
        for _, offset, stored, record_id in run.records:
            at = offset - run.start
            try:
                used = use(*_record_at(data[at:], pack_id, offset, stored, record_id, kind))
            except DamagedData as error:
                used = self._read_again(number, offset, record_id, kind, use, error)
                sound = False
            yield record_id, used
        if self._notes is not None and sound:
            self._notes.read(
                number, [(offset, stored + RECORD_HEADER_BYTES) for _, offset, stored, _ in run.records]
            )

    def _read_alone(
        self,
        number: int,
        offset: int,
        stored: int,
        record_id: RecordId,
        kind: Kind,
        use: Callable[[RecordHeader, memoryview], T],
    ) -> T:
        pack_id = self.pack_id(number)
        data = memoryview(self._packs.read(pack_id, offset, RECORD_HEADER_BYTES + stored))
        return use(*_record_at(data, pack_id, offset, stored, record_id, kind))

    def _read_again(
        self,
        number: int,
        offset: int,
        record_id: RecordId,
        kind: Kind,
        use: Callable[[RecordHeader, memoryview], T],
        error: DamagedData,
    ) -> T:
        """The same, of a record that could not be had from a place, if the index names another one by now."""
        place: Place | None = self._index.lookup([record_id])[0]
        if place is None:
            raise _absent(kind, record_id) from error
        if (place.pack, place.offset) == (number, offset):
            raise error
        return self._read_alone(place.pack, place.offset, place.stored_bytes, record_id, kind, use)


def _absent(kind: Kind, record_id: RecordId) -> DamagedData:
    return DamagedData(f"{kind.name.lower()} {record_id.hex()[:16]} is in no pack that the index knows")


def _record_at(
    data: memoryview, pack_id: PackId, offset: int, stored: int, record_id: RecordId, kind: Kind
) -> tuple[RecordHeader, memoryview]:
    """Header and payload of the record that must be at the front of `data`.

    Raises:
        DamagedData: there is another one, or none.
    """
    header = decode_record_header(data[:RECORD_HEADER_BYTES], pack_id)
    if header.id != record_id or header.stored_bytes != stored or header.kind is not kind:
        raise DamagedData(
            f"pack {pack_id.hex()} holds another record at byte {offset} than the index says",
            hint="run 'holdfast check --rebuild-index'",
        )
    return header, data[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + stored]


class ScannedRecord(NamedTuple):
    """A record that a scan came upon. A named tuple: there is one per record of a pack."""

    offset: int
    header: RecordHeader
    payload: memoryview | None


class PackScanner:
    """Reads a pack from front to back without the index.

    Args:
        end: where to stop, in bytes.
        payloads: read payloads too, and yield only records whose strong hash is right; otherwise headers
            are believed by their checksum and payloads are skipped over.

    After the scan, `damaged` lists the byte ranges (offset, length) that held no acceptable record, and
    `unknown` the offsets of intact records of kinds that this version does not know.
    """

    def __init__(self, packs: PackStore, pack_id: PackId, end: int, *, payloads: bool) -> None:
        self._packs = packs
        self._pack_id = pack_id
        self._end = end
        self._payloads = payloads
        self._buffer = b""
        self._buffer_at = 0
        self._last_bytes = 0
        self.damaged: list[tuple[int, int]] = []
        self.unknown: list[int] = []

    def _bytes(self, offset: int, length: int) -> memoryview:
        """Up to `length` bytes; fewer at the end."""
        length = min(length, self._end - offset)
        if offset < self._buffer_at or offset + length > self._buffer_at + len(self._buffer):
            # Without payloads, the next header alone where records are large, and many of them where they are small.
            ahead = _SCAN_BYTES if self._payloads else 64 * KIB if self._last_bytes < 16 * KIB else 4 * KIB
            size = min(max(length, ahead), self._end - offset)
            self._buffer = self._packs.read(self._pack_id, offset, size)
            self._buffer_at = offset
        at = offset - self._buffer_at
        return memoryview(self._buffer)[at : at + length]

    def records(self, start: int = PACK_HEADER_BYTES, *, resync: bool = True) -> Iterator[ScannedRecord]:
        """Yields the acceptable records from `start` on.

        Args:
            resync: after damage, look for the next record; otherwise stop there, having noted the rest
                of the range as damaged.
        """
        if start < PACK_HEADER_BYTES:
            raise InternalError("a pack scan began inside of the pack's header")
        offset = start
        while offset < self._end:
            record = self._record(offset)
            if record is not None:
                yield record
                self._last_bytes = record.header.total_bytes
                offset += record.header.total_bytes
                continue
            if not resync:
                self.damaged.append((offset, self._end - offset))
                return
            following = self._search(offset + 1)
            self.damaged.append((offset, following - offset))
            offset = following

    def _record(self, offset: int) -> ScannedRecord | None:
        try:
            header = decode_record_header(self._bytes(offset, RECORD_HEADER_BYTES), self._pack_id)
        except UnsupportedFormat:
            self.unknown.append(offset)
            return None
        except DamagedData:
            return None
        if offset + header.total_bytes > self._end:
            return None
        if not self._payloads:
            return ScannedRecord(offset, header, None)
        payload = self._bytes(offset, header.total_bytes)[RECORD_HEADER_BYTES:]
        if strong_hash(payload) != header.strong_hash:
            return None
        return ScannedRecord(offset, header, payload)

    def _search(self, offset: int) -> int:
        """Where the next intact header begins, or the end."""
        while offset < self._end:
            window = bytes(self._bytes(offset, MIB))
            found = window.find(RECORD_MAGIC)
            while found >= 0:
                try:
                    decode_record_header(self._bytes(offset + found, RECORD_HEADER_BYTES), self._pack_id)
                except UnsupportedFormat:
                    return offset + found
                except DamagedData:
                    found = window.find(RECORD_MAGIC, found + 1)
                else:
                    return offset + found
            if len(window) <= len(RECORD_MAGIC):
                break
            offset += len(window) - len(RECORD_MAGIC) + 1
        return self._end


class ScannedPiece(NamedTuple):
    """What a scan of a part of a pack has shown.

    Args:
        end: up to where the scan has come; the next one begins there.
    """

    records: list[ScannedRecord]
    damaged: list[tuple[int, int]]
    end: int


@runtime_checkable
class PackReporter(Protocol):
    """A pack store that can scan its packs itself, so that nobody need read them from afar."""

    def scan(self, pack_id: PackId, start: int, end: int, *, payloads: bool) -> ScannedPiece:
        """What `PackScanner` finds from `start` on, without the payloads, as far as it has come in one go."""
        ...


class ReportedScan:
    """What `PackScanner` would find, as the store itself reports it; records have neither payload nor strong hash."""

    def __init__(self, packs: PackReporter, pack_id: PackId, end: int, *, payloads: bool) -> None:
        self._packs = packs
        self._pack_id = pack_id
        self._end = end
        self._payloads = payloads
        self.damaged: list[tuple[int, int]] = []

    def records(self) -> Iterator[ScannedRecord]:
        """See `PackScanner.records`."""
        at = PACK_HEADER_BYTES
        while at < self._end:
            piece = self._packs.scan(self._pack_id, at, self._end, payloads=self._payloads)
            self.damaged += piece.damaged
            yield from piece.records
            at = piece.end


def scanner_of(
    packs: PackStore, pack_id: PackId, end: int, *, payloads: bool, reported: bool
) -> PackScanner | ReportedScan:
    """Scans a pack from front to back, or has the store do it.

    Args:
        reported: believe the store, if it can.
    """
    if reported and isinstance(packs, PackReporter):
        return ReportedScan(packs, pack_id, end, payloads=payloads)
    return PackScanner(packs, pack_id, end, payloads=payloads)


@runtime_checkable
class RecordLister(Protocol):
    """A pack store that can say itself what is in a pack, so that nobody need read it from afar."""

    def records_of(self, pack_id: PackId, end: int) -> list[TableEntry]:
        """See `records_of`."""
        ...


def records_of(packs: PackStore, pack_id: PackId, end: int) -> list[TableEntry]:
    """What a pack's table would say of its records up to `end`, by their headers."""
    if isinstance(packs, RecordLister):
        return packs.records_of(pack_id, end)
    scanner = PackScanner(packs, pack_id, end, payloads=False)
    return [TableEntry.of(r.header, r.offset) for r in scanner.records() if r.header.kind is not Kind.TABLE]
