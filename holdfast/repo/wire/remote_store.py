"""Packs of a repository on another host: `PackStore` and `PackWriter` over a connection.

What is appended is sent at once and not waited for; the offsets are known here, and the far side compares them with its
own. Only `sync` waits, for the word that everything before it is durable. An append that failed over there is
raised by whatever is called next, as a local writer does it that writes behind its caller's back.

Memory: nothing is kept here; how much may be under way at a time is bounded, for the far side's sake and for latency.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Final

from holdfast.errors import HoldfastError, InternalError, ProtocolError, StorageError
from holdfast.ids import PackId, RecordId
from holdfast.repo.challenge import MOST_IDS, Answer, State
from holdfast.repo.format.record import Codec, Kind, RecordHeader, TableEntry, decode_table
from holdfast.repo.packs import PackWriter
from holdfast.repo.records import ScannedPiece, ScannedRecord
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.fields import Pieces
from holdfast.repo.wire.near import Connection
from holdfast.units import MIB

__all__ = ["RemotePackStore"]

_PIECE_BYTES: Final = 1024 * 1024 - 4096
_WINDOW_BYTES: Final = 32 * MIB


class _RemotePackWriter:
    def __init__(self, connection: Connection, number: int, pack_id: PackId, length: int) -> None:
        self._connection = connection
        self._number = number
        self._id = pack_id
        self._length = length
        self._changed = threading.Condition()
        self._under_way = 0
        self._failure: HoldfastError | None = None
        self._closed = False

    @property
    def id(self) -> PackId:
        return self._id

    @property
    def length(self) -> int:
        return self._length

    def append(self, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        self._require_usable()
        start = self._length
        for piece in _pieces(parts):
            self._wait_for_room(len(piece))
            self._connection.begin(
                m.Append(self._number, self._length, piece),
                partial(self._answered, size=len(piece)),
                weight=len(piece),
            )
            self._length += len(piece)
        return start

    def _wait_for_room(self, size: int) -> None:
        with self._changed:
            while self._under_way and self._under_way + size > _WINDOW_BYTES and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            self._under_way += size

    def _answered(self, future: Future[m.Done], *, size: int) -> None:
        error = future.exception()
        with self._changed:
            self._under_way -= size
            if isinstance(error, HoldfastError):
                self._failure = self._failure or error
            self._changed.notify_all()

    def _require_usable(self) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
        if self._closed:
            raise InternalError("a pack was written to after it was closed")

    def cut(self, length: int) -> None:
        self._require_usable()
        self._connection.ask(m.Cut(self._number, length))
        self._length = length

    def sync(self) -> None:
        self._require_usable()
        try:
            self._connection.ask(m.SyncWriter(self._number))
        except StorageError as error:
            with self._changed:
                self._failure = self._failure or error
            raise
        with self._changed:  # answers come in the order of what was done, so earlier failures are known
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._connection.ask(m.CloseWriter(self._number))
            except HoldfastError:
                return  # the far side has let go of it, or will when it notices that we are gone


def _pieces(parts: Sequence[bytes | bytearray | memoryview]) -> Iterator[Pieces]:
    """What lies in some parts, in pieces of equal size, the last one apart."""
    gathered: list[memoryview] = []
    size = 0
    for part in parts:
        left = memoryview(part)
        while left:
            take = left[: _PIECE_BYTES - size]
            gathered.append(take)
            size += len(take)
            left = left[len(take) :]
            if size == _PIECE_BYTES:
                yield Pieces(gathered)
                gathered, size = [], 0
    if gathered:
        yield Pieces(gathered)


class RemotePackStore:
    """See the module.

    Args:
        connection: of an open repository; it is closed by whoever made it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._writers = itertools.count(1)
        self._can_punch: bool | None = None

    def create(self, pack_id: PackId) -> PackWriter:
        """See `PackStore.create`."""
        number = next(self._writers)
        self._connection.ask(m.CreatePack(number, pack_id))
        return _RemotePackWriter(self._connection, number, pack_id, 0)

    def adopt(self, pack_id: PackId) -> PackWriter | None:
        """See `PackStore.adopt`."""
        number = next(self._writers)
        length = self._connection.ask(m.AdoptPack(number, pack_id)).value
        return None if length is None else _RemotePackWriter(self._connection, number, pack_id, length)

    def read(self, pack_id: PackId, offset: int, length: int) -> bytes:
        """See `PackStore.read`. Long ones are asked for in several pieces at once."""
        if length <= m.MOST_READ_BYTES:
            answer = self._connection.begin(m.ReadPack(pack_id, offset, length), weight=length).result()
            return self._checked(answer.data, length)
        sizes = [min(m.MOST_READ_BYTES, length - at) for at in range(0, length, m.MOST_READ_BYTES)]
        answers = [
            self._connection.begin(
                m.ReadPack(pack_id, offset + number * m.MOST_READ_BYTES, size), weight=size
            )
            for number, size in enumerate(sizes)
        ]
        return b"".join(
            self._checked(answer.result().data, size) for answer, size in zip(answers, sizes, strict=True)
        )

    def _checked(self, data: bytes | Pieces, length: int) -> bytes:
        if len(data) != length:
            raise StorageError(
                f"{self._connection.name} sent {len(data)} bytes of a pack instead of {length}"
            )
        return bytes(data)

    def records_of(self, pack_id: PackId, end: int) -> list[TableEntry]:
        """See `records.RecordLister`."""
        return decode_table(bytes(self._connection.ask(m.ListRecords(pack_id, end)).data))

    def scan(self, pack_id: PackId, start: int, end: int, *, payloads: bool) -> ScannedPiece:
        """See `records.PackReporter`."""
        answer = self._connection.ask(m.ScanPack(pack_id, start, end, payloads))
        if not start < answer.end <= end:
            raise ProtocolError(f"{self._connection.name} scanned another part of a pack than it was to")
        try:
            found = [
                ScannedRecord(
                    offset,
                    RecordHeader(Kind(kind), Codec(codec), flags, stored, plain, RecordId(record_id), b""),
                    None,
                )
                for record_id, offset, stored, plain, kind, codec, flags in answer.records
            ]
        except ValueError:
            raise ProtocolError(
                f"{self._connection.name} names records of kinds that there are not"
            ) from None
        return ScannedPiece(found, list(answer.damaged), answer.end)

    def challenge(self, nonce: bytes, ids: Sequence[RecordId]) -> list[Answer]:
        """See `challenge.Answerer`."""
        found: list[Answer] = []
        while len(found) < len(ids):
            asked = ids[len(found) : len(found) + MOST_IDS]
            answers = self._connection.ask(m.Challenge(nonce, tuple(asked))).answers
            if not 0 < len(answers) <= len(asked):
                raise ProtocolError(
                    f"{self._connection.name} answered for {len(answers)} records of {len(asked)}"
                )
            try:
                found += [Answer(State(state), strong_hash, proof) for state, strong_hash, proof in answers]
            except ValueError:
                raise ProtocolError(f"{self._connection.name} gave a record a state that none has") from None
        return found

    def length(self, pack_id: PackId) -> int | None:
        """See `PackStore.length`."""
        return self._connection.ask(m.PackLength(pack_id)).value

    def sync(self, pack_id: PackId) -> None:
        """See `PackStore.sync`."""
        self._connection.ask(m.SyncPack(pack_id))

    def ids(self) -> Iterator[PackId]:
        """See `PackStore.ids`."""
        return iter([PackId(pack) for pack in self._connection.ask(m.ListPacks()).ids])

    def delete(self, pack_id: PackId) -> None:
        """See `PackStore.delete`."""
        self._connection.ask(m.DeletePack(pack_id))

    def free_bytes(self) -> int:
        """See `PackStore.free_bytes`."""
        return self._connection.ask(m.FreeBytes()).value

    def allocated_bytes(self, pack_id: PackId) -> int:
        """See `PackStore.allocated_bytes`."""
        return self._connection.ask(m.AllocatedBytes(pack_id)).value

    def can_punch(self) -> bool:
        """See `PackStore.can_punch`."""
        if self._can_punch is None:
            self._can_punch = self._connection.ask(m.CanPunch()).value
        return self._can_punch

    def punch(self, pack_id: PackId, ranges: Sequence[tuple[int, int]]) -> None:
        """See `PackStore.punch`."""
        if ranges:
            self._connection.ask(m.Punch(pack_id, tuple(ranges)))
            self._can_punch = None

    def close(self) -> None:
        """See `PackStore.close`."""
