"""The values of the index's tables (FORMAT.md, "Index").

Each value ends in a CRC-32 over its key and itself, so that a row that was altered, or that answers for
another key, is noticed when it is read: LMDB has no checksums of its own. CRC-32 finds every error burst
of up to 32 bits; what it misses is still caught later, since every record says who it is.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, NamedTuple

from holdfast.errors import DamagedData, DamagedIndex
from holdfast.ids import (
    ID_BYTES,
    PACK_ID_BYTES,
    SESSION_ID_BYTES,
    PackId,
    PointId,
    RecordId,
    RepositoryId,
    SessionId,
)
from holdfast.repo.format import canonical
from holdfast.repo.format.canonical import Fields
from holdfast.repo.format.record import PACK_HEADER_BYTES

__all__ = [
    "CopyRow",
    "MarkTimes",
    "PLACE_BYTES",
    "PackRow",
    "PackState",
    "Place",
    "PointRow",
    "PointsDigest",
    "SessionRow",
    "VerifiedBy",
    "check_root",
    "copy_key",
    "decode_copy_row",
    "decode_counter",
    "decode_mark_times",
    "decode_pack_row",
    "decode_place",
    "decode_point_row",
    "decode_points_digest",
    "decode_session_row",
    "encode_copy_row",
    "encode_counter",
    "encode_mark_times",
    "encode_pack_row",
    "encode_place",
    "encode_point_row",
    "encode_points_digest",
    "encode_root",
    "encode_session_row",
    "is_of_epoch",
    "pack_key",
]


class PackState(IntEnum):
    """What may happen to a pack. Other values are reserved."""

    OPEN = 1
    """Its writer's session may append; bytes past the committed length do not exist yet."""
    SEALED = 2
    """It ends in a table and never changes."""
    HOLED = 3
    """It was sealed; its table and some of its dead records have been given back to the file system."""


class VerifiedBy(IntEnum):
    """How a pack was verified last. Other values are reserved."""

    NOTHING = 0
    """It never was; or, with a time, somebody who did not say how."""
    HASHES = 1
    """Every stored byte by its strong hash, without the key."""
    CHECK = 2
    """Every stored byte by its strong hash, and every record by its id."""
    READING = 3
    """Every record that the index points to by its id, as it was read for a restore."""


class Place(NamedTuple):
    """Where a record is: the value of table `chunks`.

    A named tuple because there is one per chunk that is looked up.
    """

    pack: int
    offset: int
    stored_bytes: int
    plain_bytes: int
    epoch: int
    kind: int


@dataclass(frozen=True, slots=True)
class PackRow:
    """The value of table `packs`.

    Args:
        number: key of the row; 32 bits, given out in order.
        committed_bytes: length up to which the pack's bytes exist.
        records: how many of its records the index points to.
        dead_records: how many it does not point to.
        live_bytes: headers and payloads of records that the index points to.
        dead_bytes: of those it does not point to (stored twice by two writers, or swept).
        verified: Unix seconds of the last verification of all its bytes; 0 if there was none since it last grew.
        verified_by: kind of that verification.
    """

    number: int
    id: PackId
    state: PackState
    committed_bytes: int
    records: int
    dead_records: int
    live_bytes: int
    dead_bytes: int
    created: int
    verified: int
    verified_by: VerifiedBy = VerifiedBy.NOTHING

    @property
    def counted_bytes(self) -> int:
        """The pack's header and all records that are counted here. Behind the committed length only while an adoption goes on, or after one was cut off."""
        return PACK_HEADER_BYTES + self.live_bytes + self.dead_bytes


@dataclass(frozen=True, slots=True)
class PointRow:
    """The value of table `points`: the manifest's record itself, so that listing reads no packs.

    Args:
        hidden: forgotten, but not yet collected.
        pinned: never removed by a policy.
        pack: the pack whose id seeds the header's checksum.
        record: header and payload, as they stand in that pack.
        received_ms: when the side where the index lies took it in, Unix milliseconds; 0 if only the manifest says.
    """

    id: PointId
    hidden: bool
    pinned: bool
    pack: PackId
    record: bytes
    received_ms: int = 0


@dataclass(frozen=True, slots=True)
class CopyRow:
    """What is known of a copy of a restore point in another repository. Times are Unix seconds, 0 for never.

    Args:
        point: its id here.
        compared: when both sides were last found to list it.
        sampled: when a random share of what it needs was last proven there.
        read: when all that it needs was.
        address: of the other repository, for people.
    """

    point: PointId
    repository: RepositoryId
    compared: int
    sampled: int
    read: int
    address: str

    @property
    def proven(self) -> int:
        """When it was last proven, in whichever way."""
        return max(self.compared, self.sampled, self.read)


class MarkTimes(NamedTuple):
    """When a point was last forgotten or brought back, and pinned or unpinned; nanoseconds since 1970, or 0."""

    hidden_ns: int
    pinned_ns: int


@dataclass(frozen=True, slots=True)
class SessionRow:
    """The value of table `sessions`.

    Args:
        kind: `backup`, `restore`, ...
        heartbeat: Unix seconds of its last sign of life.
        holds: ids of the restore points that it reads or builds upon.
    """

    id: SessionId
    kind: str
    host: str
    pid: int
    started: int
    heartbeat: int
    holds: tuple[PointId, ...]

    def alive_at(self, now: int) -> SessionRow:
        """The same session with a newer sign of life."""
        return replace(self, heartbeat=now)


@dataclass(frozen=True, slots=True)
class PointsDigest:
    """Number of rows in table `points`, and the exclusive or of the keys: a lost row is noticed."""

    count: int
    xor: bytes

    def toggled(self, point: PointId, change: int) -> PointsDigest:
        """The digest after `point` was added (change 1) or removed (-1)."""
        mixed = int.from_bytes(self.xor, "little") ^ int.from_bytes(point, "little")
        return PointsDigest(self.count + change, mixed.to_bytes(ID_BYTES, "little"))


PLACE_BYTES: Final = 26
_PLACE: Final = struct.Struct("<IIIIIBBI")
_PLACE_BODY: Final = struct.Struct("<IIIIIBB")
_PACK: Final = struct.Struct("<16sBBxxIIQQQQQ")
_COUNTER: Final = struct.Struct("<Q")
_CRC: Final = struct.Struct("<I")
_MARK_TIMES: Final = struct.Struct("<QQ")
_COPY_TIMES: Final = struct.Struct("<QQQ")
_REPOSITORY_ID_BYTES: Final = 16
_NUMBER: Final = struct.Struct(">I")
_EPOCH: Final = struct.Struct("<I")
_RECEIVED: Final = 4
"""Flag of a row of `points`: it says when the point was received. Rows that were written before do not."""


def _sealed(key: bytes, body: bytes) -> bytes:
    return body + _CRC.pack(zlib.crc32(body, zlib.crc32(key)))


def _opened(key: bytes, value: bytes, what: str) -> bytes:
    body = value[:-4]
    if len(value) < 4 or _CRC.pack(zlib.crc32(body, zlib.crc32(key))) != value[-4:]:
        raise DamagedIndex(f"a row of the index ({what}) fails its checksum")
    return body


def encode_place(record_id: RecordId, place: Place) -> bytes:
    """The 26 bytes of a row of `chunks`."""
    return _sealed(
        record_id,
        _PLACE_BODY.pack(
            place.pack, place.offset, place.stored_bytes, place.plain_bytes, place.epoch, place.kind, 0
        ),
    )


def decode_place(record_id: bytes, value: bytes) -> Place:
    """The place that a row of `chunks` names.

    Raises:
        DamagedIndex: the row is damaged.
    """
    if len(value) != 26 or zlib.crc32(value[:22], zlib.crc32(record_id)) != int.from_bytes(
        value[22:], "little"
    ):
        raise DamagedIndex("a row of the index (chunks) fails its checksum")
    pack, offset, stored, plain, epoch, kind, _, _ = _PLACE.unpack(value)
    return Place(pack, offset, stored, plain, epoch, kind)


def encode_mark_times(point: PointId, times: MarkTimes) -> bytes:
    """The row of `marks`."""
    return _sealed(point, _MARK_TIMES.pack(*times))


def decode_mark_times(point: PointId, value: bytes | None) -> MarkTimes:
    """The row of `marks`; zeros if there is none.

    Raises:
        DamagedIndex: the row is damaged.
    """
    if value is None:
        return MarkTimes(0, 0)
    body = _opened(point, value, "marks")
    if len(body) != _MARK_TIMES.size:
        raise DamagedIndex("a row of the index (marks) has a wrong length")
    return MarkTimes(*_MARK_TIMES.unpack(body))


def copy_key(point: PointId, repository: RepositoryId) -> bytes:
    """The key of a row of `copies`."""
    return point + repository


def encode_copy_row(row: CopyRow) -> bytes:
    """The row of `copies`."""
    times = _COPY_TIMES.pack(row.compared, row.sampled, row.read)
    return _sealed(copy_key(row.point, row.repository), times + row.address.encode())


def decode_copy_row(key: bytes, value: bytes) -> CopyRow:
    """The row of `copies`.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "copies")
    if len(key) != ID_BYTES + _REPOSITORY_ID_BYTES or len(body) < _COPY_TIMES.size:
        raise DamagedIndex("a row of the index (copies) has a wrong length")
    address = body[_COPY_TIMES.size :].decode("utf-8", "replace")
    point, repository = PointId(RecordId(bytes(key[:ID_BYTES]))), RepositoryId(bytes(key[ID_BYTES:]))
    compared, sampled, read = _COPY_TIMES.unpack_from(body)
    return CopyRow(point, repository, compared, sampled, read, address)


def is_of_epoch(value: bytes, epoch: int) -> bool:
    """Whether a row of `chunks` has this epoch; nothing else of it is looked at."""
    return value[16:20] == _EPOCH.pack(epoch)


def pack_key(number: int) -> bytes:
    """The key of a pack's row."""
    return _NUMBER.pack(number)


def encode_pack_row(row: PackRow) -> bytes:
    """The row of a pack."""
    body = _PACK.pack(
        row.id,
        row.state,
        row.verified_by,
        row.records,
        row.dead_records,
        row.committed_bytes,
        row.live_bytes,
        row.dead_bytes,
        row.created,
        row.verified,
    )
    return _sealed(pack_key(row.number), body)


def decode_pack_row(key: bytes, value: bytes) -> PackRow:
    """The row of a pack.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "packs")
    if len(key) != 4 or len(body) != _PACK.size:
        raise DamagedIndex("a row of the index (packs) has a wrong length")
    pack_id, state, by, records, dead_records, committed, live, dead, created, verified = _PACK.unpack(body)
    try:
        known, verified_by = PackState(state), VerifiedBy(by)
    except ValueError:
        raise DamagedIndex(f"a pack of the index has the unknown state {state}, {by}") from None
    return PackRow(
        _NUMBER.unpack(key)[0],
        PackId(pack_id),
        known,
        committed,
        records,
        dead_records,
        live,
        dead,
        created,
        verified,
        verified_by,
    )


def encode_point_row(row: PointRow) -> bytes:
    """The row of a restore point."""
    flags = row.hidden | row.pinned << 1 | (_RECEIVED if row.received_ms else 0)
    received = _COUNTER.pack(row.received_ms) if row.received_ms else b""
    return _sealed(row.id, bytes([flags]) + row.pack + received + row.record)


def decode_point_row(key: bytes, value: bytes) -> PointRow:
    """The row of a restore point.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "points")
    start = 1 + PACK_ID_BYTES
    record = start + (_COUNTER.size if body and body[0] & _RECEIVED else 0)
    if len(key) != ID_BYTES or len(body) < record:
        raise DamagedIndex("a row of the index (points) has a wrong length")
    return PointRow(
        PointId(RecordId(bytes(key))),
        bool(body[0] & 1),
        bool(body[0] & 2),
        PackId(body[1:start]),
        body[record:],
        int(_COUNTER.unpack(body[start:record])[0]) if record > start else 0,
    )


def encode_session_row(row: SessionRow) -> bytes:
    """The row of a session."""
    body = canonical.encode(
        {
            "heartbeat": row.heartbeat,
            "holds": [point.hex() for point in row.holds],
            "host": row.host,
            "kind": row.kind,
            "pid": row.pid,
            "started": row.started,
        }
    )
    return _sealed(row.id, body)


def decode_session_row(key: bytes, value: bytes) -> SessionRow:
    """The row of a session.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "sessions")
    try:
        fields = Fields(canonical.decode(body), "a session")
        holds = tuple(PointId(RecordId(bytes.fromhex(text))) for text in fields.texts("holds"))
        if len(key) != SESSION_ID_BYTES or any(len(point) != ID_BYTES for point in holds):
            raise DamagedData("wrong length")
        return SessionRow(
            id=SessionId(bytes(key)),
            kind=fields.text("kind"),
            host=fields.text("host"),
            pid=fields.integer("pid"),
            started=fields.integer("started"),
            heartbeat=fields.integer("heartbeat"),
            holds=holds,
        )
    except (DamagedData, ValueError) as error:
        raise DamagedIndex(f"a session of the index is damaged ({error})") from None


def encode_alias(key: bytes, record_id: RecordId) -> bytes:
    """The row of an alias: the record that it stands for."""
    return _sealed(key, record_id)


def decode_alias(key: bytes, value: bytes) -> RecordId:
    """The record that an alias stands for.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "aliases")
    if len(body) != ID_BYTES:
        raise DamagedIndex("a row of the index (aliases) has a wrong length")
    return RecordId(bytes(body))


def encode_root(key: bytes) -> bytes:
    """The row of a session's root: its key says everything, the value vouches for it."""
    return _sealed(key, b"")


def check_root(key: bytes, value: bytes) -> None:
    """Raises DamagedIndex if a root's row is damaged."""
    if _opened(key, value, "roots"):
        raise DamagedIndex("a row of the index (roots) has a wrong length")


def encode_counter(key: bytes, number: int) -> bytes:
    """A number in table `meta`."""
    return _sealed(key, _COUNTER.pack(number))


def decode_counter(key: bytes, value: bytes) -> int:
    """A number from table `meta`.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "meta")
    if len(body) != 8:
        raise DamagedIndex("a row of the index (meta) has a wrong length")
    return int(_COUNTER.unpack(body)[0])


def encode_points_digest(key: bytes, digest: PointsDigest) -> bytes:
    """The digest of table `points`."""
    return _sealed(key, _COUNTER.pack(digest.count) + digest.xor)


def decode_points_digest(key: bytes, value: bytes) -> PointsDigest:
    """The digest of table `points`.

    Raises:
        DamagedIndex: the row is damaged.
    """
    body = _opened(key, value, "meta")
    if len(body) != 8 + ID_BYTES:
        raise DamagedIndex("a row of the index (meta) has a wrong length")
    return PointsDigest(int(_COUNTER.unpack(body[:8])[0]), body[8:])
