"""From plaintext to a record's stored bytes and back: identity, compression, encryption, hashes.

`Sealer` makes records, `Opener` reads them. Both may be used from several threads at once.

Nonces (FORMAT.md, "Encryption"): each `Sealer` draws 16 random bytes (the salt) when it is made and numbers its
records. Key of a record = keyed BLAKE3, under the data key, of salt and associated data; nonce = the number.
The number is taken before the encryption and never given back, and a process that forks or starts anew draws a
new salt. Even if a whole machine is set back to an earlier state while it writes, and repeats a salt and a number
for another plaintext, the key is another one, since the associated data holds the id of the plaintext.
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import Final, NamedTuple

import blake3
import zstandard

from holdfast.errors import DamagedData, InternalError
from holdfast.ids import PackId, RecordId
from holdfast.repo.format.record import (
    ENCRYPTED,
    MAX_PLAIN_BYTES,
    STRONG_HASH_BYTES,
    Codec,
    Kind,
    RecordHeader,
    encode_record_header,
)
from holdfast.repo.keys import Aead, Keys, aead

__all__ = ["NONCE_BYTES", "Opener", "Sealed", "Sealer", "strong_hash"]

NONCE_BYTES: Final = 24
TAG_BYTES: Final = 16
_SALT_BYTES: Final = 16
_MOST_STREAMED_BYTES: Final = 4 << 20


def strong_hash(stored: bytes | bytearray | memoryview) -> bytes:
    """The unkeyed hash of stored bytes that a record's header carries."""
    return blake3.blake3(stored).digest(length=STRONG_HASH_BYTES)


class Sealed(NamedTuple):
    """A record that is ready to be appended to any pack."""

    header: RecordHeader
    payload: bytes | bytearray | memoryview

    def to_bytes(self, pack_id: PackId) -> bytes:
        """Header and payload for a pack."""
        return encode_record_header(self.header, pack_id) + self.payload


class _Compressors(threading.local):
    """zstd contexts, one per thread: they are not safe to share, and costly to make."""

    def __init__(self) -> None:
        self.by_level: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        found = self.by_level.get(level)
        if found is None:
            found = zstandard.ZstdCompressor(level=level, write_content_size=False, write_checksum=False)
            self.by_level[level] = found
        return found


_CONTEXTS: Final = _Compressors()


def _record_aead(keys: Keys, salt: bytes, associated_data: bytes) -> Aead:
    if keys.cipher is None:
        raise InternalError("encryption without a key")
    return aead(keys.cipher, blake3.blake3(salt + associated_data, key=keys.data_key).digest())


class Sealer:
    """Makes records out of plaintexts.

    Args:
        keys: of the repository.
        level: of zstd; 0 stores payloads uncompressed. It may be set anew at any time.
    """

    def __init__(self, keys: Keys, level: int) -> None:
        self._keys = keys
        self.level = level
        self._pid = os.getpid()
        self._salt = os.urandom(_SALT_BYTES)
        self._numbers = itertools.count()

    def seal(self, kind: Kind, record_id: RecordId, plaintext: bytes | memoryview) -> Sealed:
        """The record of a plaintext whose id is known.

        Compression is kept only if it saves at least 1/32 of the bytes.
        """
        size = len(plaintext)
        codec = Codec.RAW
        payload: bytes | memoryview = plaintext
        if self.level:
            compressed = _CONTEXTS.compressor(self.level).compress(plaintext)
            if len(compressed) <= size - (size >> 5):
                payload, codec = compressed, Codec.ZSTD
        if self._keys.cipher is None:
            payload = bytes(payload)
            header = RecordHeader(kind, codec, 0, len(payload), size, record_id, strong_hash(payload))
            return Sealed(header, payload)
        if os.getpid() != self._pid:
            raise InternalError("a record sealer crossed a fork")
        number = next(self._numbers)  # atomic: one call into C
        stored_bytes = NONCE_BYTES + len(payload) + TAG_BYTES
        header = RecordHeader(kind, codec, ENCRYPTED, stored_bytes, size, record_id, b"")
        nonce = self._salt + number.to_bytes(8, "little")
        associated = header.associated_data()
        stored = bytearray(stored_bytes)
        stored[:NONCE_BYTES] = nonce
        _record_aead(self._keys, self._salt, associated).encrypt_into(
            b"\0\0\0\0" + nonce[_SALT_BYTES:], payload, associated, memoryview(stored)[NONCE_BYTES:]
        )
        return Sealed(
            RecordHeader(kind, codec, ENCRYPTED, stored_bytes, size, record_id, strong_hash(stored)), stored
        )


class Opener:
    """Turns stored bytes back into plaintexts, and believes nothing that it has not verified."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def can_open(self, header: RecordHeader) -> bool:
        """Whether the keys at hand are of the kind that the record needs."""
        return bool(header.flags & ENCRYPTED) == (self._keys.cipher is not None)

    def open(self, header: RecordHeader, payload: bytes | memoryview) -> bytes:
        """The plaintext of a record, proven to be what its id names.

        Cost: decryption, decompression (bounded by the header's plain length) and one BLAKE3.

        Raises:
            DamagedData: the payload is damaged, forged, or not what the header says.
        """
        plaintext = self._decompress(header, self._decrypt(header, payload))
        if self._keys.record_id(header.kind, plaintext) != header.id:
            raise DamagedData(self._verdict(header, payload))
        return plaintext

    def open_into(self, header: RecordHeader, payload: bytes | memoryview, target: memoryview) -> None:
        """Writes the plaintext of a record into `target`, and proves that it is what the record's id names.

        What is in `target` is of no use to anybody if this fails.

        Raises:
            DamagedData: as `open`, or the plaintext has not the target's length.
        """
        if len(target) != header.plain_bytes:
            raise DamagedData(
                f"{header.kind.name.lower()} {header.id.hex()[:16]} has {header.plain_bytes} bytes, "
                f"but {len(target)} are expected in its place"
            )
        compressed = self._decrypt(header, payload)
        if header.codec is Codec.RAW or header.plain_bytes > _MOST_STREAMED_BYTES or not len(target):
            target[:] = self._decompress(header, compressed)
        else:
            try:
                with _CONTEXTS.decompressor.stream_reader(compressed) as stream:
                    # In one call, which leaves the interpreter lock alone; what follows must be the end.
                    if stream.readinto(target) != len(target) or stream.read(1):
                        raise DamagedData(self._verdict(header, payload))
            except zstandard.ZstdError:
                raise DamagedData(self._verdict(header, payload)) from None
        if self._keys.record_id(header.kind, target) != header.id:
            raise DamagedData(self._verdict(header, payload))

    def _decrypt(self, header: RecordHeader, payload: bytes | memoryview) -> bytes | memoryview:
        if len(payload) != header.stored_bytes:
            raise DamagedData("a record is cut off")
        if not header.flags & ENCRYPTED:
            if self._keys.cipher is not None:
                raise DamagedData("a record is not encrypted in an encrypted repository")
            return payload
        if self._keys.cipher is None:
            raise DamagedData("a record is encrypted in a repository that is not")
        if len(payload) < NONCE_BYTES + TAG_BYTES:
            raise DamagedData("an encrypted record is too short")
        from cryptography.exceptions import InvalidTag

        nonce = bytes(payload[:NONCE_BYTES])
        associated = header.associated_data()
        try:
            return _record_aead(self._keys, nonce[:_SALT_BYTES], associated).decrypt(
                b"\0\0\0\0" + nonce[_SALT_BYTES:], payload[NONCE_BYTES:], associated
            )
        except InvalidTag:
            raise DamagedData(self._verdict(header, payload)) from None

    def _decompress(self, header: RecordHeader, payload: bytes | memoryview) -> bytes:
        if header.plain_bytes > MAX_PLAIN_BYTES:
            raise DamagedData("a record claims to be longer than any may be")
        if header.codec is Codec.RAW:
            plaintext = bytes(payload)
        else:
            try:
                if zstandard.frame_content_size(payload) not in (-1, header.plain_bytes):
                    raise DamagedData(self._verdict(header, payload))
                plaintext = _CONTEXTS.decompressor.decompress(
                    payload, max_output_size=header.plain_bytes, allow_extra_data=False
                )
            except zstandard.ZstdError:
                raise DamagedData(self._verdict(header, payload)) from None
        if len(plaintext) != header.plain_bytes:
            raise DamagedData(self._verdict(header, payload))
        return plaintext

    @staticmethod
    def _verdict(header: RecordHeader, payload: bytes | memoryview) -> str:
        name = f"{header.kind.name.lower()} {header.id.hex()[:16]}"
        if len(payload) == header.stored_bytes and strong_hash(payload) == header.strong_hash:
            return f"{name} is stored as it was written, but is not what its id says (wrong key, or forged)"
        return f"{name} is damaged in its pack"
