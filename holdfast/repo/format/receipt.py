"""Receipts: when a repository took restore points in, as its file `packs/receipts` says (FORMAT.md, "Receipts").

An entry has a fixed length and a checksum that depends on the repository, so that a torn one is noticed, one of another
repository is none, and what lies behind a damaged one can still be read. Entries are only ever appended.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

from holdfast.ids import HOLE_ID, PointId, RepositoryId

__all__ = ["BEGINNING", "RECEIPT_BYTES", "ReadReceipts", "decode_receipts", "encode_receipt"]

BEGINNING: Final = PointId(HOLE_ID)
"""Stands for no point: what was listed before receipts were kept is above this entry; since then none is missing."""

_ENTRY: Final = struct.Struct("<32sQ")
_CRC: Final = struct.Struct("<I")
RECEIPT_BYTES: Final = _ENTRY.size + _CRC.size


@dataclass(slots=True)
class ReadReceipts:
    """What some entries say.

    Args:
        received_ms: of each point Unix milliseconds; 0: it was there before receipts were kept. Of a point that has
            several entries the first one counts.
        damaged: how many entries are.
        sound_bytes: up to the end of the last one that is not.
    """

    received_ms: dict[PointId, int] = field(default_factory=dict)
    damaged: int = 0
    sound_bytes: int = 0


def encode_receipt(repository: RepositoryId, point: PointId, received_ms: int) -> bytes:
    """One entry."""
    body = _ENTRY.pack(point, received_ms)
    return body + _CRC.pack(_check(repository, body))


def decode_receipts(repository: RepositoryId, data: bytes) -> ReadReceipts:
    """What entries say that lie one behind the other; the rest of a last one that is cut off counts as damaged."""
    read = ReadReceipts()
    for at in range(0, len(data), RECEIPT_BYTES):
        entry = data[at : at + RECEIPT_BYTES]
        body = entry[: _ENTRY.size]
        if len(entry) < RECEIPT_BYTES or _CRC.unpack(entry[_ENTRY.size :])[0] != _check(repository, body):
            read.damaged += 1
            continue
        point, received_ms = _ENTRY.unpack(body)
        read.received_ms.setdefault(point, received_ms)
        read.sound_bytes = at + RECEIPT_BYTES
    return read


def _check(repository: RepositoryId, body: bytes) -> int:
    return zlib.crc32(repository + body)
