"""Finishing what a dead writer left behind, and rebuilding the index from the packs.

A pack that is neither sealed nor held by a writer may be longer than the index knows: its writer died
between writing and committing. The intact records of that tail are adopted, so that nothing is stored
twice, and what follows the first broken one is cut off. A manifest in a tail is adopted only if all that
it needs is there: then the backup had finished but for its last transaction.

Cutting by the index's word alone would be shorter, but an index that fell back (a copy brought back, a
damaged meta page) would then destroy committed records. Adopting can destroy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DamagedData, HoldfastError, UnsupportedFormat
from holdfast.ids import PackId, PointId
from holdfast.repo.codec import Opener, strong_hash
from holdfast.repo.format.record import (
    FOOTER_BYTES,
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
from holdfast.repo.index import Batch, Index, NewRecord, PackProgress
from holdfast.repo.packs import PackStore, PackWriter
from holdfast.repo.records import PackScanner, ScannedRecord

__all__ = ["Rebuilt", "adopt_pack", "adopt_strays", "read_pack_header", "read_table", "rebuild_index"]

_BATCH_RECORDS: Final = 50_000


def read_pack_header(packs: PackStore, pack_id: PackId) -> PackHeader:
    """The header of a pack, which must be that pack's.

    Raises:
        DamagedData: it is damaged, or another pack's.
    """
    header = decode_pack_header(packs.read(pack_id, 0, PACK_HEADER_BYTES))
    if header.pack_id != pack_id:
        raise DamagedData(f"the file of pack {pack_id.hex()} holds pack {header.pack_id.hex()}")
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
    if not PACK_HEADER_BYTES <= footer.table_offset <= length - FOOTER_BYTES - RECORD_HEADER_BYTES:
        raise DamagedData(f"the footer of pack {pack_id.hex()} points outside of the pack")
    data = memoryview(packs.read(pack_id, footer.table_offset, length - FOOTER_BYTES - footer.table_offset))
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


def adopt_pack(
    packs: PackStore,
    index: Index,
    pack_id: PackId,
    is_complete: Callable[[PointRow], bool],
    now: int,
) -> PackWriter | None:
    """Takes over an unsealed pack whose writer is gone, commits the intact records of its tail, cuts off the rest.

    Args:
        is_complete: whether all that a manifest needs is in the index.

    Returns:
        The writer, at the end of the pack; None if the pack is held by somebody, or not worth it.
    """
    writer = packs.adopt(pack_id)
    if writer is None:
        return None
    try:
        # Read only now that the pack is held: its last writer may have committed a moment ago.
        row = next((row for row in index.packs() if row.id == pack_id), None)
        if writer.length < PACK_HEADER_BYTES:
            if row is None:
                packs.delete(pack_id)  # its writer died before the first record
            writer.close()
            return None
        if row is None or row.state is PackState.OPEN:
            sealed = _adopt_tail(packs, index, writer, row.committed_bytes if row else 0, is_complete, now)
            if not sealed:
                return writer
    except (DamagedData, UnsupportedFormat):
        pass  # left as it is, for 'check'
    except BaseException:
        writer.close()
        raise
    writer.close()
    return None


def _adopt_tail(
    packs: PackStore,
    index: Index,
    writer: PackWriter,
    committed: int,
    is_complete: Callable[[PointRow], bool],
    now: int,
) -> bool:
    """Commits what lies behind `committed`; returns whether the pack turned out to be sealed.

    Raises:
        DamagedData: the pack is shorter than it should be, or its header or table is damaged.
    """
    created = read_pack_header(packs, writer.id).created_ms // 1000
    sealed = read_table(packs, writer.id, writer.length) is not None
    start = max(committed, PACK_HEADER_BYTES)
    if writer.length < start:
        raise DamagedData(f"pack {writer.id.hex()} is shorter than what was committed")
    scanner = PackScanner(packs, writer.id, writer.length, payloads=True)
    batch = Batch(None, now)
    points = []
    end = start
    for scanned in scanner.records(start, resync=False):
        end = scanned.offset + scanned.header.total_bytes
        if scanned.header.kind is not Kind.TABLE:
            batch.records.append(_new_record(scanned, writer.id))
        if scanned.header.kind is Kind.MANIFEST:
            points.append(_point_row(scanned, writer.id))
    if sealed:
        end = writer.length
    elif end < writer.length:
        writer.cut(end)
    if end == committed:
        return sealed
    writer.sync()
    state = PackState.SEALED if sealed else PackState.OPEN
    batch.packs.append(PackProgress(writer.id, end, state, created))
    index.commit(batch)
    for point in points:
        if is_complete(point):
            index.commit(Batch(None, now, point=point))
    return sealed


def adopt_strays(
    packs: PackStore,
    index: Index,
    is_complete: Callable[[PointRow], bool],
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
    for pack_id in packs.ids():
        row = known.get(pack_id)
        if row is not None:
            is_open = row.state is PackState.OPEN
            if not grown or not is_open or (packs.length(pack_id) or 0) <= row.committed_bytes:
                continue
        writer = adopt_pack(packs, index, pack_id, is_complete, now)
        if writer is not None:
            writer.close()


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
    opener: Opener,
    now: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Rebuilt:
    """Fills an empty index from the packs: from the tables of sealed ones, from the records of others.

    The packs are not changed. Restore points are listed if their manifest is intact; whether all that
    they need is intact is for `check` to say.

    Args:
        progress: called with packs done and packs in all.
    """
    problems: list[str] = []
    manifests: list[tuple[PackId, int]] = []
    ids = list(packs.ids())
    records = 0
    for done, pack_id in enumerate(ids):
        progress(done, len(ids))
        try:
            records += _rebuild_pack(packs, index, pack_id, now, manifests, problems)
        except HoldfastError as error:
            if not isinstance(error, (DamagedData, UnsupportedFormat)):
                raise
            problems.append(f"pack {pack_id.hex()}: {error.message}")
    points = 0
    for pack_id, offset in manifests:
        scanner = PackScanner(packs, pack_id, packs.length(pack_id) or 0, payloads=True)
        scanned = next(scanner.records(offset, resync=False), None)
        try:
            if scanned is None or scanned.payload is None or scanned.header.kind is not Kind.MANIFEST:
                raise DamagedData("it is damaged")
            if opener.can_open(scanned.header):
                opener.open(scanned.header, scanned.payload)
            index.commit(Batch(None, now, point=_point_row(scanned, pack_id)))
            points += 1
        except DamagedData as error:
            problems.append(f"the manifest at byte {offset} of pack {pack_id.hex()}: {error.message}")
    progress(len(ids), len(ids))
    return Rebuilt(len(ids), records, points, tuple(problems))


def _rebuild_pack(
    packs: PackStore,
    index: Index,
    pack_id: PackId,
    now: int,
    manifests: list[tuple[PackId, int]],
    problems: list[str],
) -> int:
    length = packs.length(pack_id) or 0
    if length < PACK_HEADER_BYTES:
        return 0
    created = read_pack_header(packs, pack_id).created_ms // 1000
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
        if record.kind == Kind.MANIFEST:
            manifests.append((pack_id, record.offset))
        batch.records.append(record)
        count += 1
        if len(batch.records) >= _BATCH_RECORDS:
            batch.packs.append(PackProgress(pack_id, 0, PackState.OPEN, created))
            index.commit(batch)
            batch = Batch(None, now)
    if scanner is not None and scanner.damaged:
        last, size = scanner.damaged[-1]
        if last + size == length:
            end = last  # an unfinished tail: the next writer of the pack cuts it off
        problems.extend(
            f"pack {pack_id.hex()}: {size} bytes from byte {at} on hold no intact record"
            for at, size in scanner.damaged
            if at + size != length
        )
    batch.packs.append(PackProgress(pack_id, end, state, created))
    index.commit(batch)
    return count
