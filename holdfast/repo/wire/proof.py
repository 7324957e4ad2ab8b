"""What the far side makes sure of before an index names a record: that its bytes are there and are what its header says.

Everything that is appended over a connection is read along: pack header, records, table, footer. A record counts as
proven when its header's checksum and the strong hash of its stored bytes are right. That needs no key. A commit may name only
proven records; what was there before (the tail of a writer that died) is read back and proven then.

With `strict` (append-only connections) nothing else may be appended at all: no bytes that are no record, no marks, which
would change restore points when the index is next rebuilt, and in repositories without encryption no record whose
content does not have its id, on which other clients would come to rely.

Cost: one BLAKE3 of all that is stored; with `strict` and no encryption, decompression and another one.
Memory: about 200 bytes for each record that is not committed yet, and one record.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import blake3

from holdfast.errors import DamagedData, IntegrityError, ProtocolError, UnsupportedFormat
from holdfast.ids import PackId, RecordId, RepositoryId
from holdfast.repo.codec import Opener, strong_hash
from holdfast.repo.format.record import (
    ENCRYPTED,
    FOOTER_BYTES,
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    STRONG_HASH_BYTES,
    Kind,
    RecordHeader,
    decode_pack_footer,
    decode_pack_header,
    decode_record_header,
)
from holdfast.repo.index import NewRecord
from holdfast.repo.keys import clear_keys
from holdfast.repo.packs import PackStore
from holdfast.repo.wire.rights import Rights

__all__ = ["NoProofs", "PackProof", "Proofs", "RecordProofs"]


class Proofs(Protocol):
    """What is known of records that were appended."""

    def begin(self, pack: PackId, length: int) -> PackProof | None:
        """Reads along what is appended to a pack from `length` on; None if nobody cares."""
        ...

    def require(self, records: Sequence[NewRecord]) -> None:
        """Raises an error unless all of these are proven. They are forgotten then."""
        ...

    def unclaimed(self, pack: PackId) -> Mapping[int, RecordHeader]:
        """Proven records of a pack that no commit has named, by offset."""
        ...


class NoProofs:
    """Believes everything: for tests of what lies around it, and while an index is rebuilt."""

    def begin(self, pack: PackId, length: int) -> PackProof | None:
        """See `Proofs.begin`."""
        del pack, length
        return None

    def require(self, records: Sequence[NewRecord]) -> None:
        """See `Proofs.require`."""

    def unclaimed(self, pack: PackId) -> Mapping[int, RecordHeader]:
        """See `Proofs.unclaimed`."""
        del pack
        return {}


class _Open(NamedTuple):
    """A record whose header has come, but not all of its payload."""

    offset: int
    header: RecordHeader
    hasher: blake3.blake3
    kept: list[bytes] | None


class PackProof:
    """Reads along what is appended to one pack. Not thread-safe.

    Args:
        at: where the next byte will lie.
        found: gets the headers of proven records by offset.

    Attributes:
        whole_end: where the last whole record ends.
        created_s: what the pack's header says, if it was appended here.
    """

    def __init__(
        self, pack: PackId, repository: RepositoryId, at: int, found: dict[int, RecordHeader], *, strict: bool
    ) -> None:
        self._pack = pack
        self._repository = repository
        self._at = at
        self._found = found
        self._strict = strict
        self._opener = Opener(clear_keys())
        self._pending = b""
        self._open: _Open | None = None
        self._left = 0
        self._after_table = False
        self._broken = False
        self.whole_end = at
        self.created_s = 0

    @property
    def is_open(self) -> bool:
        """Whether nothing but whole records, and perhaps a part of one, has been appended."""
        return not self._broken and not self._after_table and self.whole_end >= PACK_HEADER_BYTES

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes in what has been appended.

        Raises:
            DamagedData, StorageDenied: it may not be appended; only with `strict`.
        """
        if self._broken:
            return
        try:
            self._feed(memoryview(data))
        except (IntegrityError, UnsupportedFormat):
            self._broken = True  # it may be stored, but no commit can name it
            if self._strict:
                raise

    def _feed(self, data: memoryview) -> None:
        while data:
            if self._open is not None:
                take = data[: self._left]
                self._open.hasher.update(take)
                if self._open.kept is not None:
                    self._open.kept.append(bytes(take))
                self._left -= len(take)
                self._at += len(take)
                data = data[len(take) :]
                if not self._left:
                    self._finish()
                continue
            wanted = self._head_bytes()
            take = data[: wanted - len(self._pending)]
            self._pending += bytes(take)
            data = data[len(take) :]
            if len(self._pending) == wanted:
                head, self._pending = self._pending, b""
                self._begin(head)

    def _head_bytes(self) -> int:
        if self._at == 0:
            return PACK_HEADER_BYTES
        return FOOTER_BYTES if self._after_table else RECORD_HEADER_BYTES

    def _begin(self, head: bytes) -> None:
        offset = self._at
        self._at += len(head)
        if offset == 0:
            header = decode_pack_header(head)
            if (header.pack_id, header.repository_id) != (self._pack, self._repository):
                raise DamagedData("a pack was begun with the header of another one")
            self.created_s = header.created_ms // 1000
            self.whole_end = self._at
            return
        if self._after_table:
            if decode_pack_footer(head, self._pack) is None:
                raise DamagedData("a pack's table is not followed by its footer")
            self.whole_end = self._at
            return
        record = decode_record_header(head, self._pack)
        if self._strict and record.kind is Kind.MARK:
            raise Rights.refusal()
        keep = self._strict and not record.flags & ENCRYPTED and record.kind is not Kind.TABLE
        self._open = _Open(offset, record, blake3.blake3(), [] if keep else None)
        self._left = record.stored_bytes
        if not self._left:
            self._finish()

    def _finish(self) -> None:
        assert self._open is not None
        offset, header, hasher, kept = self._open
        self._open = None
        if hasher.digest(STRONG_HASH_BYTES) != header.strong_hash:
            raise DamagedData("a record was appended whose bytes are not what its header says")
        if kept is not None:
            self._opener.open(header, memoryview(b"".join(kept)))  # raises if it does not have its id
        self._after_table = header.kind is Kind.TABLE
        self.whole_end = self._at
        if header.kind is not Kind.TABLE:
            self._found[offset] = header


class RecordProofs:
    """The proofs of one connection. Thread-safe.

    Args:
        store: to read back what others have appended.
    """

    def __init__(self, repository: RepositoryId, store: PackStore, *, strict: bool) -> None:
        self._repository = repository
        self._store = store
        self._strict = strict
        self._found: dict[PackId, dict[int, RecordHeader]] = {}
        self._lock: Final = threading.Lock()

    def begin(self, pack: PackId, length: int) -> PackProof | None:
        """See `Proofs.begin`."""
        with self._lock:
            found = self._found.setdefault(pack, {})
        return PackProof(pack, self._repository, length, found, strict=self._strict)

    def require(self, records: Sequence[NewRecord]) -> None:
        """See `Proofs.require`."""
        for record in records:
            with self._lock:
                header = self._found.get(record.pack, {}).pop(record.offset, None)
            if header is None:
                header = self._read_back(record)
            said = (record.id, record.stored_bytes, record.plain_bytes, record.kind)
            if said != (header.id, header.stored_bytes, header.plain_bytes, int(header.kind)):
                raise ProtocolError("a commit names a record otherwise than its header does")

    def unclaimed(self, pack: PackId) -> Mapping[int, RecordHeader]:
        """See `Proofs.unclaimed`."""
        with self._lock:
            return dict(self._found.get(pack, {}))

    def _read_back(self, record: NewRecord) -> RecordHeader:
        size = RECORD_HEADER_BYTES + record.stored_bytes
        data = memoryview(self._store.read(record.pack, record.offset, size))
        header = decode_record_header(data, record.pack)
        payload = data[RECORD_HEADER_BYTES:]
        if header.stored_bytes != len(payload) or strong_hash(payload) != header.strong_hash:
            raise DamagedData("a commit names a record whose bytes are not what its header says")
        if self._strict and not header.flags & ENCRYPTED:
            Opener(clear_keys()).open(header, payload)
        return header


def manifest_is_proven(pack: PackId, record: bytes, point: RecordId) -> bool:
    """Whether a record of a point's row is an intact manifest with that id."""
    try:
        header = decode_record_header(record, pack)
    except (IntegrityError, UnsupportedFormat):
        return False
    payload = record[RECORD_HEADER_BYTES:]
    return (
        header.kind is Kind.MANIFEST
        and header.id == point
        and header.stored_bytes == len(payload)
        and header.strong_hash == strong_hash(payload)
    )
