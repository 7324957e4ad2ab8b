"""What is where in a repository, found without the engine's index: the truth that `check` is compared with.

Records are found by reading packs from front to back; what they mean to restore points follows from how the
disks were made: with the chunker `fixed` and chunks of one unit, the chunk at a place is the BLAKE3 of the
unit there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import blake3

from holdfast.ids import PackId, RecordId
from holdfast.repo.check import DamagedRange
from holdfast.repo.format.record import PACK_HEADER_BYTES, Kind
from holdfast.repo.packs import PackStore
from holdfast.repo.records import PackScanner
from rig.disks import UNIT, unit


@dataclass(frozen=True)
class Found:
    """A record in a pack."""

    pack: PackId
    offset: int
    length: int
    kind: Kind
    id: RecordId

    @property
    def end(self) -> int:
        return self.offset + self.length


def records_of(store: PackStore) -> list[Found]:
    """All records of all packs of an intact repository."""
    return [
        Found(pack_id, r.offset, r.header.total_bytes, r.header.kind, r.header.id)
        for pack_id in store.ids()
        for r in PackScanner(store, pack_id, store.length(pack_id) or 0, payloads=True).records()
    ]


def touched(records: Iterable[Found], pack: PackId, start: int, end: int) -> list[Found]:
    """The records of a pack that share a byte with [start, end)."""
    return [r for r in records if r.pack == pack and r.offset < end and start < r.end]


Disks = Mapping[str, Sequence[int]]
"""Point id -> the units of its only disk."""


def chunk_id(number: int) -> RecordId:
    return RecordId(blake3.blake3(unit(number)).digest())


def units_lost(disks: Disks, lost: Iterable[RecordId]) -> dict[str, set[int]]:
    """Point -> numbers of the disk's units whose chunk is lost; points without loss are left out."""
    gone = set(lost)
    numbers = {n for units in disks.values() for n in units if n}
    lost_numbers = {n for n in numbers if chunk_id(n) in gone}
    found = {point: {at for at, n in enumerate(units) if n in lost_numbers} for point, units in disks.items()}
    return {point: places for point, places in found.items() if places}


def units_reported(damaged: Iterable[DamagedRange]) -> dict[str, set[int]]:
    """What a check says, in the same form. Ranges must be whole units."""
    found: dict[str, set[int]] = defaultdict(set)
    for entry in damaged:
        assert entry.offset % UNIT == 0
        assert entry.length % UNIT == 0
        assert entry.length > 0
        places = set(range(entry.offset // UNIT, (entry.offset + entry.length) // UNIT))
        assert not places & found[entry.point], "a range is reported twice"
        found[entry.point] |= places
    return dict(found)


def first_record(records: Iterable[Found], kind: Kind, pack: PackId) -> Found:
    return next(r for r in records if r.kind is kind and r.pack == pack)


assert PACK_HEADER_BYTES == 64
