"""The far side's packs: what a connection holds open, and in which order things happen to it.

Requests on one writer are carried out in the order in which they came. Their end is the connection's: whatever it held is
let go of, however it ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Final

from holdfast.errors import DamagedData, HoldfastError, ProtocolError
from holdfast.ids import PackId, RecordId
from holdfast.repo.challenge import MOST_IDS, OwnAnswers
from holdfast.repo.codec import Opener
from holdfast.repo.format.record import (
    MAX_PACK_BYTES,
    MAX_TABLE_ENTRIES,
    PACK_HEADER_BYTES,
    Kind,
    encode_table,
)
from holdfast.repo.format.rows import PackState
from holdfast.repo.index import Batch, Index, NewRecord, PackProgress
from holdfast.repo.keys import clear_keys
from holdfast.repo.packs import PackStore, PackWriter
from holdfast.repo.records import PackScanner, RecordReader, records_of
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.fields import Pieces
from holdfast.repo.wire.proof import PackProof, Proofs
from holdfast.repo.wire.rights import Rights

__all__ = ["FarPacks"]

_MOST_WRITERS: Final = 1024
_MOST_SCANNED: Final = 16_384
_MOST_SCANNED_BYTES: Final = 64 << 20


class _Writer:
    """A writer of the connection.

    Args:
        floor: append-only connections cut nothing off below that.
    """

    def __init__(self, writer: PackWriter, proof: PackProof | None, floor: int) -> None:
        self.writer = writer
        self.proof = proof
        self.floor = floor


class FarPacks:
    """See the module."""

    def __init__(self, store: PackStore, proofs: Proofs, rights: Rights) -> None:
        self._store = store
        self._proofs = proofs
        self._rights = rights
        self._writers: dict[int, _Writer] = {}
        self._lock = threading.Lock()
        self._answers: tuple[Index, OwnAnswers] | None = None
        self.index: Index | None = None

    def list(self, request: m.ListPacks) -> m.PackIds:
        """Answers `ListPacks`."""
        del request
        return m.PackIds(tuple(self._store.ids()))

    def length(self, request: m.PackLength) -> m.MaybeNumber:
        """Answers `PackLength`."""
        return m.MaybeNumber(self._store.length(PackId(request.pack)))

    def read(self, request: m.ReadPack) -> m.Bytes:
        """Answers `ReadPack`."""
        if request.length > m.MOST_READ_BYTES or request.offset > 1 << 62:
            raise ProtocolError("more of a pack is asked for than may be at once")
        return m.Bytes(self._store.read(PackId(request.pack), request.offset, request.length))

    def sync(self, request: m.SyncPack) -> m.Done:
        """Answers `SyncPack`."""
        self._store.sync(PackId(request.pack))
        return m.Done()

    def delete(self, request: m.DeletePack) -> m.Done:
        """Answers `DeletePack`."""
        self._store.delete(PackId(request.pack))
        return m.Done()

    def free(self, request: m.FreeBytes) -> m.Number:
        """Answers `FreeBytes`."""
        del request
        return m.Number(self._store.free_bytes())

    def allocated(self, request: m.AllocatedBytes) -> m.Number:
        """Answers `AllocatedBytes`."""
        return m.Number(self._store.allocated_bytes(PackId(request.pack)))

    def can_punch(self, request: m.CanPunch) -> m.Truth:
        """Answers `CanPunch`."""
        del request
        return m.Truth(self._rights.may_change and self._store.can_punch())

    def punch(self, request: m.Punch) -> m.Done:
        """Answers `Punch`."""
        self._store.punch(PackId(request.pack), request.ranges)
        return m.Done()

    def records(self, request: m.ListRecords) -> m.Bytes:
        """Answers `ListRecords`."""
        if not PACK_HEADER_BYTES <= request.end <= MAX_PACK_BYTES:
            raise ProtocolError("a pack can not end there")
        entries = records_of(self._store, PackId(request.pack), request.end)
        if len(entries) > MAX_TABLE_ENTRIES:
            raise DamagedData("a pack holds more records than packs may hold")
        return m.Bytes(encode_table(entries))

    def scan(self, request: m.ScanPack) -> m.Scanned:
        """Answers `ScanPack`."""
        if not PACK_HEADER_BYTES <= request.start <= request.end <= MAX_PACK_BYTES:
            raise ProtocolError("a pack can not be scanned there")
        scanner = PackScanner(self._store, PackId(request.pack), request.end, payloads=request.payloads)
        found: list[tuple[bytes, int, int, int, int, int, int]] = []
        read, end = 0, request.end
        for offset, header, _ in scanner.records(request.start):
            found.append(
                (
                    header.id,
                    offset,
                    header.stored_bytes,
                    header.plain_bytes,
                    header.kind,
                    header.codec,
                    header.flags,
                )
            )
            read += header.total_bytes if request.payloads else 0
            if read >= _MOST_SCANNED_BYTES or len(found) == _MOST_SCANNED:
                end = offset + header.total_bytes
                break
        return m.Scanned(tuple(found), tuple(scanner.damaged), end)

    def challenge(self, request: m.Challenge) -> m.Answers:
        """Answers `Challenge`."""
        if len(request.ids) > MOST_IDS:
            raise ProtocolError("more records are to be proven than may be at once")
        index = self.index
        if index is None:
            raise ProtocolError("no index is open on this connection")
        known = self._answers
        if known is None or known[0] is not index:
            reader = RecordReader(self._store, index, Opener(clear_keys()))  # stored bytes need no key
            known = self._answers = index, OwnAnswers(reader, index)
        return m.Answers(tuple(known[1].some(request.nonce, [RecordId(one) for one in request.ids])))

    # --- writers

    def _room(self, number: int) -> None:
        if number in self._writers or len(self._writers) >= _MOST_WRITERS:
            raise ProtocolError("a writer has the number of another one, or there are too many")

    def _writer(self, number: int) -> _Writer:
        with self._lock:
            found = self._writers.get(number)
        if found is None:
            raise ProtocolError("there is no writer of that number")
        return found

    def create(self, request: m.CreatePack) -> m.Done:
        """Answers `CreatePack`."""
        self._room(request.writer)
        pack = PackId(request.pack)
        writer = self._store.create(pack)
        with self._lock:
            self._writers[request.writer] = _Writer(writer, self._proofs.begin(pack, 0), 0)
        return m.Done()

    def adopt(self, request: m.AdoptPack) -> m.MaybeNumber:
        """Answers `AdoptPack`. Append-only connections get none whose end is not what the index knows."""
        self._room(request.writer)
        pack = PackId(request.pack)
        writer = self._store.adopt(pack)
        if writer is None:
            return m.MaybeNumber(None)
        if self._rights.append_only and not self._ends_as_known(writer):
            writer.close()
            return m.MaybeNumber(None)
        proof = self._proofs.begin(pack, writer.length)
        with self._lock:
            self._writers[request.writer] = _Writer(writer, proof, writer.length)
        return m.MaybeNumber(writer.length)

    def _ends_as_known(self, writer: PackWriter) -> bool:
        known = self.index.packs() if self.index is not None else []
        return any(row.id == writer.id and row.committed_bytes == writer.length for row in known)

    def append(self, request: m.Append) -> m.Done:
        """Answers `Append`."""
        held = self._writer(request.writer)
        if held.writer.length != request.offset:
            raise ProtocolError("bytes of a pack came out of order")
        if request.offset + len(request.data) > MAX_PACK_BYTES:
            raise ProtocolError("a pack would become longer than packs may be")
        parts = request.data.parts if isinstance(request.data, Pieces) else [request.data]
        if held.proof is not None:
            for part in parts:
                held.proof.feed(part)
        held.writer.append(parts)
        return m.Done()

    def cut(self, request: m.Cut) -> m.Done:
        """Answers `Cut`."""
        held = self._writer(request.writer)
        if request.length > held.writer.length:
            raise ProtocolError("a pack can not be cut to more than it holds")
        if self._rights.append_only and request.length < held.floor:
            raise self._rights.refusal()
        held.writer.cut(request.length)
        held.proof = self._proofs.begin(held.writer.id, request.length)
        return m.Done()

    def sync_writer(self, request: m.SyncWriter) -> m.Done:
        """Answers `SyncWriter`; may run beside `append`."""
        self._writer(request.writer).writer.sync()
        return m.Done()

    def close_writer(self, request: m.CloseWriter) -> m.Done:
        """Answers `CloseWriter`."""
        with self._lock:
            held = self._writers.pop(request.writer, None)
        if held is not None:
            held.writer.close()
        return m.Done()

    def _settle(self, held: _Writer) -> None:
        """Commits what a client that is gone has appended: proven records, up to the first one that takes its key.

        Whoever comes next need not read them back over the wire. What is torn is cut off; what else there may be
        behind the last commit is left for adoption (`repo.recover`).
        """
        if self.index is None or held.proof is None or not held.proof.is_open:
            return
        pack = held.writer.id
        row = next((one for one in self.index.packs() if one.id == pack), None)
        committed = PACK_HEADER_BYTES if row is None else row.committed_bytes
        records: list[NewRecord] = []
        end = committed
        for offset, header in sorted(self._proofs.unclaimed(pack).items()):
            if offset < committed:
                continue
            if offset != end or header.kind not in (Kind.CHUNK, Kind.NODE):
                break
            end += header.total_bytes
            records.append(
                NewRecord(header.id, pack, offset, header.stored_bytes, header.plain_bytes, int(header.kind))
            )
        if end > held.proof.whole_end or (row is None and not records):
            return
        if held.proof.whole_end < held.writer.length:
            held.writer.cut(held.proof.whole_end)
        if records:
            held.writer.sync()
            created = held.proof.created_s if row is None else row.created
            progress = PackProgress(pack, end, PackState.OPEN, created)
            self.index.commit(Batch(None, int(time.time()), records, packs=[progress]))

    def close(self) -> None:
        """Lets go of everything."""
        with self._lock:
            writers, self._writers = self._writers, {}
        for held in writers.values():
            with contextlib.suppress(HoldfastError):
                self._settle(held)
            with contextlib.suppress(HoldfastError):
                held.writer.close()
        self._store.close()
