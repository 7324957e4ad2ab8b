"""Finishing what a dead writer left behind, and rebuilding the index from the packs.

A pack that is neither sealed nor held by a writer may be longer than the index knows: its writer died
between writing and committing. The intact records of that tail are adopted, so that nothing is stored
twice, and what follows the first broken one is cut off. A manifest in a tail is adopted only if all that
it needs is there: then the backup had finished but for its last transaction.

Cutting by the index's word alone would be shorter, but an index that fell back (a copy brought back, a
damaged meta page) would then destroy committed records. An index of which there may be others (one that lies
outside of a repository on a network) does not even tell a torn tail from a pack that was damaged later: with
it, nothing is ever cut off.

Adoption can be interrupted like anything else: a pack's committed length passes a manifest or a mark only
when that has been dealt with, so whatever was left undone is met again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DamagedData, HoldfastError, PointNotFound, UnsupportedFormat, WrongPassword
from holdfast.ids import PackId, PointId, RecordId, RepositoryId
from holdfast.repo.codec import Opener, strong_hash
from holdfast.repo.format.manifest import decode_manifest
from holdfast.repo.format.mark import Mark, decode_mark
from holdfast.repo.format.record import (
    FOOTER_BYTES,
    MAX_PACK_BYTES,
    MAX_STORED_BYTES,
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Kind,
    PackHeader,
    TableEntry,
    decode_pack_footer,
    decode_pack_header,
    decode_record_header,
    decode_table,
    encode_record_header,
)
from holdfast.repo.format.rows import PackState, PointRow
from holdfast.repo.index import Batch, Index, NewRecord, PackProgress, PointChange
from holdfast.repo.keys import clear_keys
from holdfast.repo.packs import PackStore, PackWriter
from holdfast.repo.records import PackScanner, ScannedRecord

__all__ = ["Home", "Rebuilt", "adopt_pack", "adopt_strays", "read_pack_header", "read_table", "rebuild_index"]

_BATCH_RECORDS: Final = 50_000
_BLOCK: Final = 4096


@dataclass(frozen=True, slots=True)
class Home:
    """What adoption needs to know of the repository.

    Args:
        is_complete: whether all that a manifest needs is in the index.
        opener: asked for only when a mark or a manifest turns up.
        sole_index: the repository has no other index, so what this one does not know was never committed.
        has_key: whether `opener` can be asked without a password being missing.
        name_mark: the id of a mark's plaintext.
    """

    repository: RepositoryId
    is_complete: Callable[[PointRow], bool]
    opener: Callable[[], Opener]
    sole_index: bool = True
    has_key: bool = True
    name_mark: Callable[[bytes], RecordId] = clear_keys().mark_id


def read_pack_header(packs: PackStore, pack_id: PackId, repository: RepositoryId) -> PackHeader:
    """The header of a pack, which must be that pack's and belong to the repository.

    Raises:
        DamagedData: it is damaged, or another pack's.
    """
    header = decode_pack_header(packs.read(pack_id, 0, PACK_HEADER_BYTES))
    if header.pack_id != pack_id:
        raise DamagedData(f"the file of pack {pack_id.hex()} holds pack {header.pack_id.hex()}")
    if header.repository_id != repository:
        raise DamagedData(f"pack {pack_id.hex()} belongs to another repository")
    return header


def read_table(packs: PackStore, pack_id: PackId, length: int) -> tuple[list[TableEntry], int] | None:
    """The table of a sealed pack and the offset of its record; None if the pack is not sealed.

    Raises:
        DamagedData: the footer is there, but the table is damaged.
    """
    if length < PACK_HEADER_BYTES + RECORD_HEADER_BYTES + FOOTER_BYTES:
        return None
    footer = decode_pack_footer(packs.read(pack_id, length - FOOTER_BYTES, FOOTER_BYTES), pack_id)
    if footer is None:
        return None
    table_bytes = length - FOOTER_BYTES - footer.table_offset
    least, most = RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + MAX_STORED_BYTES
    if footer.table_offset < PACK_HEADER_BYTES or not least <= table_bytes <= most:
        raise DamagedData(f"the footer of pack {pack_id.hex()} points outside of the pack")
    data = memoryview(packs.read(pack_id, footer.table_offset, table_bytes))
    header = decode_record_header(data, pack_id)
    payload = data[RECORD_HEADER_BYTES:]
    if (
        header.kind is not Kind.TABLE
        or header.flags
        or len(payload) != header.stored_bytes
        or strong_hash(payload) != header.strong_hash
    ):
        raise DamagedData(f"the table of pack {pack_id.hex()} is damaged")
    entries = decode_table(payload)
    if len(entries) != footer.entries or (
        entries and entries[-1].offset + RECORD_HEADER_BYTES + entries[-1].stored_bytes > footer.table_offset
    ):
        raise DamagedData(f"the table of pack {pack_id.hex()} contradicts its footer")
    return entries, footer.table_offset


def _new_record(scanned: ScannedRecord, pack_id: PackId) -> NewRecord:
    header = scanned.header
    return NewRecord(
        header.id, pack_id, scanned.offset, header.stored_bytes, header.plain_bytes, int(header.kind)
    )


def _point_row(scanned: ScannedRecord, pack_id: PackId) -> PointRow:
    assert scanned.payload is not None
    record = encode_record_header(scanned.header, pack_id) + bytes(scanned.payload)
    return PointRow(PointId(scanned.header.id), hidden=False, pinned=False, pack=pack_id, record=record)


@dataclass(frozen=True, slots=True)
class _Tail:
    """What was adopted of a pack.

    Args:
        special: where its manifests and marks are, which have not been dealt with yet.
        whole: nothing follows that could not be adopted.
    """

    pack: PackId
    created: int
    end: int
    state: PackState
    special: tuple[int, ...]
    whole: bool


def adopt_pack(packs: PackStore, index: Index, pack_id: PackId, home: Home, now: int) -> PackWriter | None:
    """Takes over an unsealed pack whose writer is gone, commits the intact records of its tail, cuts off the rest.

    Returns:
        The writer, at the end of the pack; None if the pack is held by somebody, or not worth it.
    """
    writer = packs.adopt(pack_id)
    if writer is None:
        return None
    usable = False
    try:
        tail = _adopt_records(packs, index, writer, home, now)
        if tail is not None:
            _adopt_special(packs, index, [tail], home, now)
            usable = tail.whole and tail.state is PackState.OPEN
    finally:
        if not usable:
            writer.close()
    return writer if usable else None


def _adopt_records(packs: PackStore, index: Index, writer: PackWriter, home: Home, now: int) -> _Tail | None:
    """Commits the intact records behind the committed length; None if there is nothing to be done with the pack."""
    # Read only now that the pack is held: its last writer may have committed a moment ago.
    row = next((row for row in index.packs() if row.id == writer.id), None)
    if writer.length < PACK_HEADER_BYTES:
        if row is None:
            packs.delete(writer.id)  # its writer died before the first record
        return None
    if row is not None and row.state is not PackState.OPEN:
        return None
    committed = row.committed_bytes if row is not None else 0
    # An adoption that was cut off has committed its records, but not the length: they must not be counted as dead once more.
    counted = row.counted_bytes if row is not None else 0
    try:
        created = read_pack_header(packs, writer.id, home.repository).created_ms // 1000
        records, end, state = _read_tail(packs, writer, max(committed, PACK_HEADER_BYTES))
    except (DamagedData, UnsupportedFormat):
        return None  # left as it is, for 'check'
    whole = end == writer.length
    if not whole and home.sole_index:
        writer.cut(end)
        whole = True
    special = tuple(r.offset for r in records if r.kind in (Kind.MANIFEST, Kind.MARK))
    tail = _Tail(writer.id, created, end, state, special, whole)
    if end > committed:
        writer.sync()
        batch = Batch(None, now, [r for r in records if r.kind != Kind.TABLE and r.offset >= counted])
        batch.packs.append(
            PackProgress(writer.id, special[0], PackState.OPEN, created) if special else _progress(tail)
        )
        index.commit(batch)
    return tail


def _progress(tail: _Tail) -> PackProgress:
    return PackProgress(tail.pack, tail.end, tail.state, tail.created)


def _read_tail(packs: PackStore, writer: PackWriter, start: int) -> tuple[list[NewRecord], int, PackState]:
    """The intact records from `start` on, where they end, and whether they end in table and footer.

    Raises:
        DamagedData: the pack is shorter than what was committed, or its table is damaged.
        UnsupportedFormat: it holds records of a later version.
    """
    if writer.length < start:
        raise DamagedData(f"pack {writer.id.hex()} is shorter than what was committed")
    if writer.length == start:
        return [], start, PackState.OPEN
    sealed = read_table(packs, writer.id, writer.length)
    if sealed is not None:  # written when all records before it were durable
        found = [
            NewRecord(e.id, writer.id, e.offset, e.stored_bytes, e.plain_bytes, int(e.kind))
            for e in sealed[0]
            if e.offset >= start
        ]
        return found, writer.length, PackState.SEALED
    scanner = PackScanner(packs, writer.id, writer.length, payloads=True)
    records: list[NewRecord] = []
    end = start
    for scanned in scanner.records(start, resync=False):
        if scanned.header.kind is Kind.TABLE:
            break  # of a seal that was not finished
        records.append(_new_record(scanned, writer.id))
        end = scanned.offset + scanned.header.total_bytes
    if scanner.unknown:
        raise UnsupportedFormat(f"pack {writer.id.hex()} holds records of a later version")
    return records, end, PackState.OPEN


def _adopt_special(packs: PackStore, index: Index, tails: Iterable[_Tail], home: Home, now: int) -> None:
    """Lists the points of adopted manifests that are complete, and applies adopted marks.

    All records of all tails must be committed before: a manifest may need those of any pack.
    """
    waiting = [tail for tail in tails if tail.special]
    if not waiting:
        return
    points: list[tuple[PointRow, _Tail, int]] = []
    marks: list[tuple[RecordId, Mark]] = []
    for tail in waiting:
        for offset in tail.special:
            scanner = PackScanner(packs, tail.pack, tail.end, payloads=True)
            scanned = next(scanner.records(offset, resync=False), None)
            if scanned is None:
                continue  # damaged since; `check` will say so
            if scanned.header.kind is Kind.MARK:
                with suppress(
                    DamagedData, UnsupportedFormat
                ):  # forged, or of a later version: it says nothing to us
                    marks.append(_mark(scanned, home.opener()))
            else:
                points.append((_point_row(scanned, tail.pack), tail, offset))
    listed = {row.id for row in index.points()}
    collected = {mark.point for _, mark in marks if mark.action == "collect"}
    unfinished: set[PackId] = set()
    for point, tail, _ in points:
        if point.id in listed or point.id in collected:
            continue
        try:
            complete = home.is_complete(point)
        except UnsupportedFormat:  # of a later version: whoever can read it will see
            complete = True
        if complete:
            index.commit(Batch(None, now, point=point))
        elif not home.sole_index:  # what it needs may be in a pack that another writer holds just now
            unfinished.add(tail.pack)
    _apply_marks(index, marks, now)
    # A collection may have removed one of them meanwhile.
    present = {row.id for row in index.packs()}
    for tail in waiting:
        if tail.pack in present and tail.pack not in unfinished:
            index.commit(Batch(None, now, packs=[_progress(tail)]))


def _mark(scanned: ScannedRecord, opener: Opener) -> tuple[RecordId, Mark]:
    assert scanned.payload is not None
    return scanned.header.id, decode_mark(opener.open(scanned.header, scanned.payload))


def _apply_marks(index: Index, marks: list[tuple[RecordId, Mark]], now: int) -> None:
    """Brings the points that marks speak of into the state that the last of them says."""
    if not marks:
        return
    changes: dict[tuple[PointId, bool], PointChange] = {}
    for _, mark in sorted(marks, key=lambda pair: (pair[1].time_ns, pair[0])):
        if mark.action in ("forget", "recall"):
            change = PointChange(mark.point, mark.time_ns, hidden=mark.action == "forget")
            changes[mark.point, True] = change
        elif mark.action in ("pin", "unpin"):
            change = PointChange(mark.point, mark.time_ns, pinned=mark.action == "pin")
            changes[mark.point, False] = change
    for change in changes.values():
        with suppress(PointNotFound):  # never listed, or collected
            index.commit(Batch(None, now, changes=[change]))


def adopt_strays(
    packs: PackStore,
    index: Index,
    home: Home,
    now: int,
    *,
    grown: bool = False,
) -> None:
    """Adopts packs that the index does not know at all: their writers died before their first commit.

    Args:
        grown: adopt also what lies behind the committed length of packs that the index knows as open.

    Cost: one listing of the packs' folders.
    """
    known = {row.id: row for row in index.packs()}
    tails: list[_Tail] = []
    for pack_id in packs.ids():
        row = known.get(pack_id)
        if row is not None:
            is_open = row.state is PackState.OPEN
            if not grown or not is_open or (packs.length(pack_id) or 0) <= row.committed_bytes:
                continue
        writer = packs.adopt(pack_id)
        if writer is None:
            continue
        try:
            tail = _adopt_records(packs, index, writer, home, now)
        finally:
            writer.close()
        if tail is not None:
            tails.append(tail)
    with contextlib.suppress(WrongPassword):  # nobody has the key: manifests and marks are met again
        _adopt_special(packs, index, tails, home, now)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild of the index found.

    Args:
        problems: sentences on packs, or parts of packs, that could not be used.
    """

    packs: int
    records: int
    points: int
    problems: tuple[str, ...]


def rebuild_index(
    packs: PackStore,
    index: Index,
    home: Home,
    now: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Rebuilt:
    """Fills an empty index from the packs: from the tables of sealed ones, from the records of others.

    The packs are not changed. Restore points are listed if their manifest is intact, and authentic as far as
    there is a key to tell; whether all that they need is intact is for `check` to say. Marks are applied; a
    collected point is not listed.

    Args:
        progress: called with packs done and packs in all.

    Raises:
        WrongPassword: there are marks, and no key to read them with.
    """
    problems: list[str] = []
    special: list[tuple[PackId, int]] = []
    ids = list(packs.ids())
    records = 0
    for done, pack_id in enumerate(ids):
        progress(done, len(ids))
        try:
            records += _rebuild_pack(packs, index, pack_id, home, now, special, problems)
        except HoldfastError as error:
            if not isinstance(error, (DamagedData, UnsupportedFormat)):
                raise
            problems.append(f"pack {pack_id.hex()}: {error.message}")
    found: list[PointRow] = []
    marks: list[tuple[RecordId, Mark]] = []
    for pack_id, offset in special:
        scanner = PackScanner(packs, pack_id, packs.length(pack_id) or 0, payloads=True)
        scanned = next(scanner.records(offset, resync=False), None)
        try:
            if scanned is None or scanned.payload is None:
                raise DamagedData("it is damaged")
            if scanned.header.kind is Kind.MARK:
                marks.append(_mark(scanned, home.opener()))
            else:
                if home.has_key:
                    with suppress(UnsupportedFormat):  # of a later version, but authentic
                        decode_manifest(home.opener().open(scanned.header, scanned.payload))
                found.append(_point_row(scanned, pack_id))
        except (DamagedData, UnsupportedFormat) as error:
            problems.append(f"the manifest or mark at byte {offset} of pack {pack_id.hex()}: {error.message}")
    collected = {mark.point for _, mark in marks if mark.action == "collect"}
    points = 0
    for row in found:
        if row.id not in collected:
            index.commit(Batch(None, now, point=row))
            points += 1
    if collected:
        index.note_collected(collected)
    _apply_marks(index, marks, now)
    progress(len(ids), len(ids))
    return Rebuilt(len(ids), records, points, tuple(problems))


def _was_given_back(packs: PackStore, pack_id: PackId, offset: int, size: int) -> bool:
    """Whether dead records were in a range that was given back to the file system: its middle reads as zeros."""
    middle = (offset + size // 2) // _BLOCK * _BLOCK
    return size >= 4 * _BLOCK and not any(packs.read(pack_id, middle, _BLOCK))


def _rebuild_pack(
    packs: PackStore,
    index: Index,
    pack_id: PackId,
    home: Home,
    now: int,
    special: list[tuple[PackId, int]],
    problems: list[str],
) -> int:
    length = packs.length(pack_id) or 0
    if length < PACK_HEADER_BYTES:
        return 0
    if length > MAX_PACK_BYTES:
        problems.append(f"pack {pack_id.hex()} is longer than any may be; its end was not read")
        length = MAX_PACK_BYTES
    packs.sync(pack_id)  # a writer that was killed has not done it, and the index will rely on what is there
    created = read_pack_header(packs, pack_id, home.repository).created_ms // 1000
    found: Iterable[NewRecord]
    end = length
    sealed = None
    try:
        sealed = read_table(packs, pack_id, length)
    except DamagedData as error:
        problems.append(f"{error.message}; its records were read one by one")
    scanner = None
    if sealed is not None:
        found = (
            NewRecord(e.id, pack_id, e.offset, e.stored_bytes, e.plain_bytes, int(e.kind)) for e in sealed[0]
        )
    else:
        scanner = PackScanner(packs, pack_id, length, payloads=True)
        found = (_new_record(scanned, pack_id) for scanned in scanner.records())
    state = PackState.OPEN if sealed is None else PackState.SEALED
    count = 0
    batch = Batch(None, now)
    for record in found:
        if record.kind == Kind.TABLE:
            continue
        if record.kind in (Kind.MANIFEST, Kind.MARK):
            special.append((pack_id, record.offset))
        batch.records.append(record)
        count += 1
        if len(batch.records) >= _BATCH_RECORDS:
            batch.packs.append(PackProgress(pack_id, 0, PackState.OPEN, created))
            _prefer_intact(packs, index, batch)
            index.commit(batch)
            batch = Batch(None, now)
    if scanner is not None and scanner.damaged:
        last, size = scanner.damaged[-1]
        if last + size == length:
            end = last  # an unfinished tail: the next writer of the pack cuts it off
        problems.extend(
            f"pack {pack_id.hex()}: {size} bytes from byte {at} on hold no intact record"
            for at, size in scanner.damaged
            if at + size != length and not _was_given_back(packs, pack_id, at, size)
        )
    batch.packs.append(PackProgress(pack_id, end, state, created))
    _prefer_intact(packs, index, batch)
    index.commit(batch)
    return count


def _prefer_intact(packs: PackStore, index: Index, batch: Batch) -> None:
    """Has a batch take the places of those of its records that are known already, but damaged where they are.

    A table names the records that were damaged since; what a repair has stored anew is in another pack.
    """
    replacing: dict[RecordId, tuple[int, int]] = {}
    names: dict[int, PackId] = {}
    for record, place in zip(batch.records, index.lookup([r.id for r in batch.records]), strict=True):
        if place is None:
            continue
        names = names or {row.number: row.id for row in index.packs()}
        end = place.offset + RECORD_HEADER_BYTES + place.stored_bytes
        scanner = PackScanner(packs, names[place.pack], end, payloads=True)
        try:
            there = next(scanner.records(place.offset, resync=False), None)
        except HoldfastError:
            there = None
        if there is None or there.header.id != record.id:
            replacing[record.id] = place.pack, place.offset
    batch.replacing = replacing
