"""Checking packs: each against the index, and if it is to be read, every stored byte of it.

What matters is what the index points to. Damage in bytes that nothing points to (a record that was stored twice,
swept, or dropped by a repair; the torn end of a killed backup; the holes of a pack that garbage collection has
given back a part of) is no finding.

Packs change while they are checked: backups append, garbage collection sweeps, compacts and unlinks. A pack in
which something seems to be wrong is looked at again if its row in the index has changed meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from holdfast.errors import DamagedData, HoldfastError, UnsupportedFormat
from holdfast.ids import RecordId, RepositoryId
from holdfast.repo.codec import Opener
from holdfast.repo.format.record import (
    FOOTER_BYTES,
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Kind,
    TableEntry,
)
from holdfast.repo.format.rows import PackRow, PackState, Place, VerifiedBy
from holdfast.repo.index import Index
from holdfast.repo.ledger import Reading, forget_verification, note_verified
from holdfast.repo.packs import PackStore
from holdfast.repo.parallel import run_parallel
from holdfast.repo.records import PackScanner, scanner_of
from holdfast.repo.recover import read_pack_header, read_table
from holdfast.units import MIB

__all__ = ["Finding", "FindingKind", "PackChecker"]

_LOOKUP_AT_ONCE: Final = 4096
_MOST_TRIES: Final = 4

FindingKind = Literal["pack", "index", "config", "point"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: FindingKind
    message: str


class _Broken(NamedTuple):
    """A pack in which records are missing: which of them, is told by the index alone."""

    found: AbstractSet[int]
    reason: str


@dataclass(slots=True)
class _Look:
    """What one look at a pack has shown.

    Args:
        sound: everything that the index points to is there and, if it was read, intact.
        unsound: what is wrong with the pack itself (its header, table, footer or length); empty if nothing is.
        harmless_bytes: damaged, and nothing points to them.
    """

    findings: list[Finding] = field(default_factory=list)
    bad: dict[RecordId, str] = field(default_factory=dict)
    broken: _Broken | None = None
    records: int = 0
    bytes_verified: int = 0
    sound: bool = True
    unsound: str = ""
    harmless_bytes: int = 0

    def find(self, kind: FindingKind, message: str) -> None:
        self.sound = False
        self.findings.append(Finding(kind, message))


class PackChecker:
    """Checks all packs.

    Args:
        opener: None if there is no key: then only stored bytes are verified.
        now: Unix seconds.
        on_progress: called with bytes read so far and bytes to read.

    After `run`: `findings`, `notes`, counts, `bad` (records that the index points to in vain, with the reason) and
    `unsound` (numbers of packs whose own structure is damaged, with what is wrong).
    """

    def __init__(
        self,
        repository: RepositoryId,
        packs: PackStore,
        index: Index,
        opener: Opener | None,
        workers: int | None,
        now: Callable[[], float],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._repository = repository
        self._packs = packs
        self._index = index
        self._opener = opener
        self._workers = workers
        self._now = now
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._broken: dict[int, _Broken] = {}
        self._harmless: dict[int, int] = {}
        self._needless = 0
        self._reported = False
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.bad: dict[RecordId, str] = {}
        self.unsound: dict[int, str] = {}
        self.packs = self.records = self.bytes_verified = self.packs_read = 0

    def run(self, rows: Sequence[PackRow], reading: Reading | None, *, reported: bool = False) -> None:
        """Checks packs; reads those that `reading` allows.

        Args:
            reported: have a store that is far away verify stored bytes itself, even if there is a key here.
        """
        self._reported = reported or self._opener is None
        before = self._index.figures()
        due = list(reading.due) if reading is not None else []
        numbers = {row.number for row in due}
        total = reading.total_bytes if reading is not None else 0

        def work(row: PackRow) -> None:
            read = row.number in numbers and reading is not None and reading.take(row)
            self._check(row, read_data=read)
            with self._lock:
                self.packs += 1
                self.packs_read += read

        run_parallel(
            iter(due + [row for row in rows if row.number not in numbers]),
            work,
            self._workers,
            lambda: self._on_progress(self._read_bytes, total),
        )
        self._on_progress(self._read_bytes, total)
        self._mark_missing()
        expected = sum(row.records for row in rows)
        if before.records == self._index.figures().records and expected != before.records:
            now = (
                self._index.packs()
            )  # a collection may have taken as many records away as a backup has added
            if sum(row.records for row in now) != self._index.figures().records:
                self.findings.append(
                    Finding("index", f"the index holds {before.records} records, its packs count {expected}")
                )
        self._note_strays({row.id for row in rows})
        self._note_harmless()

    def _note_strays(self, known: set[bytes]) -> None:
        for pack_id in self._packs.ids():
            if pack_id in known or pack_id in {row.id for row in self._index.packs()}:
                continue
            if self._packs.length(pack_id) is None:
                continue
            self.notes.append(
                f"pack {pack_id.hex()} is not in the index yet: a backup is writing it, or one was "
                "interrupted; the next backup takes over what it holds"
            )

    def _note_harmless(self) -> None:
        if self._needless:
            packs = "1 damaged pack holds" if self._needless == 1 else f"{self._needless} damaged packs hold"
            self.notes.append(f"{packs} nothing that is needed; 'holdfast gc' removes what is left of that")
        if self._harmless:
            packs = "1 pack is" if len(self._harmless) == 1 else f"{len(self._harmless)} packs are"
            self.notes.append(
                f"{packs} damaged in parts that nothing needs ({sum(self._harmless.values())} bytes)"
            )

    # --- one pack

    def _check(self, row: PackRow, *, read_data: bool) -> None:
        for tries in range(_MOST_TRIES):
            look = self._look(row, read_data=read_data)
            if not look.findings and look.broken is None and not look.bad:
                break
            fresh = next((now for now in self._index.packs() if now.number == row.number), None)
            if fresh is None:
                return  # collected meanwhile
            if fresh == row or tries == _MOST_TRIES - 1:
                break
            row = fresh
        needed = row.records > 0
        if not needed and look.unsound:
            look.findings = [finding for finding in look.findings if finding.kind != "pack"]
        with self._lock:
            self._needless += not needed and bool(look.unsound)
            self.findings += look.findings
            self.records += look.records
            self.bytes_verified += look.bytes_verified
            for record_id, reason in look.bad.items():
                self.bad.setdefault(record_id, reason)
            if look.broken is not None:
                self._broken[row.number] = look.broken
            if look.unsound and needed:
                self.unsound[row.number] = look.unsound
            if look.harmless_bytes and look.sound and row.state is not PackState.HOLED:
                self._harmless[row.number] = look.harmless_bytes
        if not look.sound:
            forget_verification(self._index, row)
        elif read_data and not look.unsound:
            by = VerifiedBy.HASHES if self._reported else VerifiedBy.CHECK
            note_verified(self._index, row, by, int(self._now()))

    def _look(self, row: PackRow, *, read_data: bool) -> _Look:
        """Checks one pack against the index; what the index has in it that is not there is left to `_mark_missing`."""
        look = _Look()
        name = row.id.hex()
        length = self._packs.length(row.id)
        if length is None:
            look.unsound = f"pack {name} is missing"
            look.find("pack", look.unsound)
            look.broken = _Broken(frozenset(), look.unsound)
            return look
        # An interrupted adoption leaves rows behind the committed length.
        end = max(row.committed_bytes, row.counted_bytes)
        if row.state is PackState.HOLED:
            end = row.committed_bytes
        if length < end:
            look.unsound = f"pack {name} is {length} bytes long, but {row.committed_bytes} were committed"
            look.find("pack", look.unsound)
            end = length
        try:
            read_pack_header(self._packs, row.id, self._repository)
        except (DamagedData, UnsupportedFormat) as error:
            look.unsound = f"pack {name}: {error.message}"
            look.find("pack", look.unsound)
        table = None
        if row.state is PackState.SEALED and not look.unsound:
            table = self._table(row, look)
        scan_end = max(end if table is None else end - FOOTER_BYTES, PACK_HEADER_BYTES)
        scanned = scanner_of(self._packs, row.id, scan_end, payloads=False, reported=True)
        entries = (
            table if table is not None else [TableEntry.of(r.header, r.offset) for r in scanned.records()]
        )
        here = self._in_index(row, [e for e in entries if e.kind is not Kind.TABLE], table is not None, look)
        missing = row.records - len(here)
        if missing:
            if table is not None:  # it may have been made after the damage, of what was left
                for _ in scanned.records():
                    pass
            look.broken = _Broken(here.keys(), f"pack {name} has no intact record there")
            if scanned.damaged and not read_data:
                _find_damaged(self._packs, look, row, scanned.damaged)
            elif look.sound and not scanned.damaged:
                look.find(
                    "index", f"the index counts {row.records} records in pack {name}, {len(here)} are there"
                )
            look.sound = False
        if read_data and length:
            self._read(row, end, here, missing, look)
        return look

    def _table(self, row: PackRow, look: _Look) -> list[TableEntry] | None:
        try:
            sealed = read_table(self._packs, row.id, row.committed_bytes)
            if sealed is None:
                raise DamagedData(f"the footer of pack {row.id.hex()} is damaged")
        except (DamagedData, UnsupportedFormat) as error:
            look.unsound = error.message
            look.find("pack", f"{error.message} (the records before it may be intact)")
            return None
        return sealed[0]

    def _in_index(
        self, row: PackRow, entries: list[TableEntry], trusted: bool, look: _Look
    ) -> dict[int, RecordId]:
        """Offset -> id of the records that the index has at that place.

        Args:
            trusted: the entries are from a table; otherwise from headers, behind which anything may be.
        """
        here: dict[int, RecordId] = {}
        lost = 0
        elsewhere: list[TableEntry] = []
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
                    look.find("index", f"the index gives record {entry.id.hex()[:16]} wrong lengths")
            else:
                elsewhere.append(entry)
        look.records = len(here)
        if lost and lost + len(elsewhere) > row.dead_records:
            dead = sum(trusted or self._is_intact(row, entry) for entry in elsewhere)
            if lost + dead > row.dead_records:
                look.find("index", f"the index does not find {lost} records of pack {row.id.hex()}")
        return here

    def _lookup(self, ids: Sequence[RecordId]) -> Iterator[Place | None]:
        for first in range(0, len(ids), _LOOKUP_AT_ONCE):
            yield from self._index.lookup(ids[first : first + _LOOKUP_AT_ONCE])

    def _is_intact(self, row: PackRow, entry: TableEntry) -> bool:
        end = entry.offset + RECORD_HEADER_BYTES + entry.stored_bytes
        scanner = PackScanner(self._packs, row.id, end, payloads=True)
        return next(scanner.records(entry.offset, resync=False), None) is not None

    def _mark_missing(self) -> None:
        """Marks the records that the index has in broken packs and that were not found there. Cost: one scan."""
        after: RecordId | None = None
        while self._broken and (page := self._index.scan(after, _LOOKUP_AT_ONCE)):
            for record_id, place in page:
                broken = self._broken.get(place.pack)
                if broken is not None and place.offset not in broken.found:
                    self.bad.setdefault(record_id, f"{broken.reason} (byte {place.offset})")
            after = page[-1][0]

    def _read(self, row: PackRow, end: int, here: Mapping[int, RecordId], missing: int, look: _Look) -> None:
        """Verifies every stored byte of a pack.

        Args:
            here: what the index has in it, as offset -> id.
            missing: how many more records the index has in it.
        """
        name = row.id.hex()
        if row.state is PackState.SEALED and end == row.committed_bytes:
            end -= FOOTER_BYTES
        scanner = scanner_of(
            self._packs, row.id, max(end, PACK_HEADER_BYTES), payloads=True, reported=self._reported
        )
        seen: dict[int, RecordId] = {}
        reason = ""
        try:
            for record in scanner.records():
                seen[record.offset] = record.header.id
                here_too = here.get(record.offset) == record.header.id
                if self._opener is not None and record.payload is not None and here_too:
                    try:
                        self._opener.open(record.header, record.payload)
                    except DamagedData as error:
                        look.find("pack", f"pack {name}, byte {record.offset}: {error.message}")
                        look.bad[record.header.id] = error.message
                look.bytes_verified += record.header.total_bytes
                with self._lock:
                    self._read_bytes += record.header.total_bytes
        except HoldfastError as error:
            reason = error.message
            look.find("pack", f"pack {name}: {error.message}")
        lost = [(offset, record_id) for offset, record_id in here.items() if seen.get(offset) != record_id]
        for offset, record_id in lost:
            look.bad.setdefault(record_id, reason or f"damaged at byte {offset} of pack {name}")
        if scanner.damaged and (lost or missing):
            _find_damaged(self._packs, look, row, scanner.damaged)
        elif lost and not reason:
            look.find("pack", f"pack {name} holds {len(lost)} records in places that are not theirs")
        elif not lost and not missing:
            gap = row.committed_bytes - row.counted_bytes
            known = (
                gap if row.state is PackState.OPEN else 0
            )  # an old torn end that a rebuild has passed over
            look.harmless_bytes = max(0, sum(size for _, size in scanner.damaged) - known)
        look.sound &= not lost and not missing and not reason


def _find_damaged(packs: PackStore, look: _Look, row: PackRow, damaged: Sequence[tuple[int, int]]) -> None:
    for offset, length in damaged:
        if row.state is PackState.HOLED and _are_zeros(packs, row, offset, length):
            continue  # a hole: given back by a collection
        look.find("pack", f"pack {row.id.hex()}: {length} damaged bytes from byte {offset} on")


def _are_zeros(packs: PackStore, row: PackRow, offset: int, length: int) -> bool:
    try:
        for at in range(offset, offset + length, MIB):
            if packs.read(row.id, at, min(MIB, offset + length - at)).strip(b"\0"):
                return False
    except HoldfastError:
        return False
    return True
