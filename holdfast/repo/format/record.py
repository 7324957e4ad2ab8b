"""Packs and the records in them (FORMAT.md, "Packs" and "Records").

A pack is a file header, records one behind the other, and, once sealed, a table of its records and a
footer. Every stored byte of a repository lives in a record, and every record describes itself: its
header names kind, lengths, id, and a hash of the stored bytes, so that packs alone suffice to rebuild
everything else.

Invariants: a header is accepted only if its checksum, seeded with the pack's own random id, is right
(bytes that merely look like a record, such as a backed-up repository inside of a chunk, are not
accepted); lengths are within their limits before anybody allocates for them.

This module does not compress, encrypt or hash payloads; `repo.codec` does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import xxhash

from holdfast.errors import DamagedData, UnsupportedFormat
from holdfast.ids import ID_BYTES, PACK_ID_BYTES, PackId, RecordId, RepositoryId

__all__ = [
    "ENCRYPTED",
    "FOOTER_BYTES",
    "KNOWN_FLAGS",
    "MAX_PACK_BYTES",
    "MAX_PLAIN_BYTES",
    "MAX_STORED_BYTES",
    "MAX_TABLE_ENTRIES",
    "PACK_HEADER_BYTES",
    "RECORD_HEADER_BYTES",
    "RECORD_MAGIC",
    "STRONG_HASH_BYTES",
    "TABLE_ENTRY_BYTES",
    "Codec",
    "Kind",
    "PackFooter",
    "PackHeader",
    "RecordHeader",
    "TableEntry",
    "decode_pack_footer",
    "decode_pack_header",
    "decode_record_header",
    "decode_table",
    "encode_pack_footer",
    "encode_pack_header",
    "encode_record_header",
    "encode_table",
]

PACK_MAGIC: Final = b"HOLDPACK"
PACK_VERSION: Final = 1
RECORD_MAGIC: Final = b"\xf7HFr"
FOOTER_MAGIC: Final = b"HOLDSEAL"

PACK_HEADER_BYTES: Final = 64
RECORD_HEADER_BYTES: Final = 72
FOOTER_BYTES: Final = 32
STRONG_HASH_BYTES: Final = 16

MAX_PLAIN_BYTES: Final = 32 << 20
"""No record's plaintext is longer; a header that says so is damaged or hostile."""
MAX_STORED_BYTES: Final = MAX_PLAIN_BYTES + 4096
MAX_PACK_BYTES: Final = 2**32 - 1
"""Offsets inside of a pack fit 32 bits."""
MAX_TABLE_ENTRIES: Final = 131_072
"""A pack is sealed before it holds more records, so that its table fits one record."""

ENCRYPTED: Final = 0x0001
"""Flag: the payload is nonce, ciphertext and tag (FORMAT.md, "Encryption"). Bits 8 to 15 are kept for a key's number, 0 in v1."""
KNOWN_FLAGS: Final = ENCRYPTED


class Kind(IntEnum):
    """What a record holds. 5 to 126 and 128 to 255 are reserved."""

    CHUNK = 1
    NODE = 2
    MANIFEST = 3
    MARK = 4
    TABLE = 127


class Codec(IntEnum):
    """How the plaintext was turned into the (unencrypted) payload."""

    RAW = 0
    ZSTD = 1


_PACK_HEADER: Final = struct.Struct("<8sHHI16s16sQQ")
_RECORD_HEADER: Final = struct.Struct("<4sBBHII32s16sQ")
_FOOTER: Final = struct.Struct("<8sQIIQ")
_TABLE_ENTRY: Final = struct.Struct("<32sIIIBBH")
_CHECK: Final = struct.Struct("<Q")
_KINDS: Final = {int(kind): kind for kind in Kind}
_CODECS: Final = {int(codec): codec for codec in Codec}

TABLE_ENTRY_BYTES: Final = _TABLE_ENTRY.size


def _seed(pack_id: PackId) -> int:
    return int.from_bytes(pack_id[:8], "little")


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The first 64 bytes of a pack.

    Args:
        created_ms: when the pack was begun, milliseconds since 1970.
    """

    pack_id: PackId
    repository_id: RepositoryId
    created_ms: int


class RecordHeader(NamedTuple):
    """The 72 bytes before each payload. A named tuple: one is made for every chunk.

    Args:
        stored_bytes: length of the payload in the pack.
        plain_bytes: length of the plaintext that `id` names.
        strong_hash: BLAKE3 of the payload as stored, unkeyed, first 16 bytes: whoever has the
            pack can verify it without a key.
    """

    kind: Kind
    codec: Codec
    flags: int
    stored_bytes: int
    plain_bytes: int
    id: RecordId
    strong_hash: bytes

    @property
    def total_bytes(self) -> int:
        """Header and payload."""
        return RECORD_HEADER_BYTES + self.stored_bytes

    def associated_data(self) -> bytes:
        """The header's part that encryption authenticates: all that says what the payload means."""
        return _RECORD_HEADER.pack(
            RECORD_MAGIC,
            self.kind,
            self.codec,
            self.flags,
            self.stored_bytes,
            self.plain_bytes,
            self.id,
            b"",
            0,
        )[:48]


class TableEntry(NamedTuple):
    """One record as a sealed pack's table names it. A named tuple: one is made for every chunk.

    Args:
        offset: of the record's header, from the start of the pack.
    """

    id: RecordId
    offset: int
    stored_bytes: int
    plain_bytes: int
    kind: Kind
    codec: Codec
    flags: int

    @classmethod
    def of(cls, header: RecordHeader, offset: int) -> TableEntry:
        """What a table says of a record with this header, at this offset of its pack."""
        return cls(
            header.id,
            offset,
            header.stored_bytes,
            header.plain_bytes,
            header.kind,
            header.codec,
            header.flags,
        )


@dataclass(frozen=True, slots=True)
class PackFooter:
    """The last 32 bytes of a sealed pack."""

    table_offset: int
    entries: int


def encode_pack_header(header: PackHeader) -> bytes:
    """The 64 bytes of a pack header."""
    head = _PACK_HEADER.pack(
        PACK_MAGIC,
        PACK_VERSION,
        PACK_HEADER_BYTES,
        0,
        header.pack_id,
        header.repository_id,
        header.created_ms,
        0,
    )[:-8]
    return head + _CHECK.pack(xxhash.xxh3_64_intdigest(head))


def decode_pack_header(data: bytes | memoryview) -> PackHeader:
    """The header at the start of `data`.

    Raises:
        DamagedData: it is no pack header, or fails its checksum.
        UnsupportedFormat: it is one of a later version.
    """
    if len(data) < PACK_HEADER_BYTES:
        raise DamagedData("the pack is shorter than its header")
    magic, version, length, flags, pack_id, repository_id, created_ms, check = _PACK_HEADER.unpack_from(data)
    if magic != PACK_MAGIC or xxhash.xxh3_64_intdigest(data[: PACK_HEADER_BYTES - 8]) != check:
        raise DamagedData("the pack's header is damaged")
    if version != PACK_VERSION or length != PACK_HEADER_BYTES or flags:
        raise UnsupportedFormat(
            f"the pack has version {version}, this Holdfast reads version {PACK_VERSION}",
            hint="use a newer Holdfast",
        )
    return PackHeader(PackId(pack_id), RepositoryId(repository_id), created_ms)


def encode_record_header(header: RecordHeader, pack_id: PackId) -> bytes:
    """The 72 bytes of a record header for a given pack."""
    head = _RECORD_HEADER.pack(
        RECORD_MAGIC,
        header.kind,
        header.codec,
        header.flags,
        header.stored_bytes,
        header.plain_bytes,
        header.id,
        header.strong_hash,
        0,
    )[:-8]
    return head + _CHECK.pack(xxhash.xxh3_64_intdigest(head, _seed(pack_id)))


def _unknown(kind: int, codec: int, flags: int) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"a record has kind {kind}, codec {codec} and flags {flags:#06x}, not all known to this version",
        hint="use a newer Holdfast",
    )


def decode_record_header(data: bytes | memoryview, pack_id: PackId) -> RecordHeader:
    """The record header at the start of `data`.

    Raises:
        DamagedData: too short, wrong magic or checksum, or lengths out of bounds.
        UnsupportedFormat: intact, but of a kind, codec or flag that this version does not know.
    """
    if len(data) < RECORD_HEADER_BYTES:
        raise DamagedData("a record header is cut off")
    magic, kind, codec, flags, stored, plain, record_id, strong, check = _RECORD_HEADER.unpack_from(data)
    if magic != RECORD_MAGIC:
        raise DamagedData("there is no record header where one should be")
    if xxhash.xxh3_64_intdigest(data[: RECORD_HEADER_BYTES - 8], _seed(pack_id)) != check:
        raise DamagedData("a record header fails its checksum")
    if stored > MAX_STORED_BYTES or plain > MAX_PLAIN_BYTES:
        raise DamagedData(f"a record header claims {stored} stored and {plain} plain bytes, beyond the limit")
    if kind not in _KINDS or codec not in _CODECS or flags & ~KNOWN_FLAGS:
        raise _unknown(kind, codec, flags)
    return RecordHeader(_KINDS[kind], _CODECS[codec], flags, stored, plain, RecordId(record_id), strong)


def encode_table(entries: Sequence[TableEntry]) -> bytes:
    """The plaintext of a table record."""
    pack = _TABLE_ENTRY.pack
    return b"".join(pack(*entry) for entry in entries)


def decode_table(data: bytes | memoryview) -> list[TableEntry]:
    """The entries of a table record's plaintext, in the order of their offsets.

    Raises:
        DamagedData: the length is no multiple of an entry's, or an entry is impossible.
        UnsupportedFormat: an entry has a kind, codec or flag that this version does not know.
    """
    if len(data) % TABLE_ENTRY_BYTES:
        raise DamagedData("a pack's table has a broken length")
    entries = []
    end = PACK_HEADER_BYTES
    for record_id, offset, stored, plain, kind, codec, flags in _TABLE_ENTRY.iter_unpack(data):
        if (
            offset < end
            or offset + RECORD_HEADER_BYTES + stored > MAX_PACK_BYTES
            or stored > MAX_STORED_BYTES
            or plain > MAX_PLAIN_BYTES
        ):
            raise DamagedData("a pack's table has an impossible entry")
        if kind not in _KINDS or codec not in _CODECS or flags & ~KNOWN_FLAGS:
            raise _unknown(kind, codec, flags)
        end = offset + RECORD_HEADER_BYTES + stored
        entries.append(
            TableEntry(RecordId(record_id), offset, stored, plain, _KINDS[kind], _CODECS[codec], flags)
        )
    return entries


def encode_pack_footer(footer: PackFooter, pack_id: PackId) -> bytes:
    """The 32 bytes that end a sealed pack."""
    head = _FOOTER.pack(FOOTER_MAGIC, footer.table_offset, footer.entries, 0, 0)[:-8]
    return head + _CHECK.pack(xxhash.xxh3_64_intdigest(head, _seed(pack_id)))


def decode_pack_footer(data: bytes | memoryview, pack_id: PackId) -> PackFooter | None:
    """The footer, or None if these 32 bytes are none: the pack is not sealed, or its end is damaged."""
    if len(data) != FOOTER_BYTES:
        return None
    magic, table_offset, entries, reserved, check = _FOOTER.unpack(data)
    if magic != FOOTER_MAGIC or reserved or xxhash.xxh3_64_intdigest(data[:-8], _seed(pack_id)) != check:
        return None
    return PackFooter(table_offset, entries)


assert _PACK_HEADER.size == PACK_HEADER_BYTES
assert _RECORD_HEADER.size == RECORD_HEADER_BYTES
assert _FOOTER.size == FOOTER_BYTES
assert _TABLE_ENTRY.size == 48
assert ID_BYTES == 32
assert PACK_ID_BYTES == 16
