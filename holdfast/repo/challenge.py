"""Challenges: whoever holds records shows that it does, without sending them and without a key.

The asker draws a nonce and names records; the holder reads each of them from its pack, compares it with its strong hash, and
answers with a hash of the stored bytes under the nonce. Whoever has the same stored bytes computes the same and compares.

The nonce is BLAKE3's key, so it enters every block of the input. Put in front of the bytes it would enter the first block only, and
a holder could keep the inner hashes of the rest and throw the bytes away. Who has not got the bytes can not answer, then, whatever
else it has kept; but it may have asked somebody else who has.

Does not decide what an answer is worth; `repo.prove` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple, Protocol, runtime_checkable

import blake3

from holdfast.errors import DamagedData, UnsupportedFormat
from holdfast.ids import RecordId
from holdfast.repo.codec import Sealed
from holdfast.repo.format.record import STRONG_HASH_BYTES, Kind
from holdfast.repo.index import Index
from holdfast.repo.records import RecordReader
from holdfast.units import MIB

__all__ = ["MOST_IDS", "NONCE_BYTES", "PROOF_BYTES", "Answer", "Answerer", "OwnAnswers", "State", "proof_of"]

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
MOST_IDS: Final = 4096
"""That may be asked about at once."""
_MOST_BYTES: Final = 64 * MIB


class State(IntEnum):
    """How a holder finds a record."""

    ABSENT = 0
    WHOLE = 1
    DAMAGED = 2


class Answer(NamedTuple):
    """What a holder says of one record. A named tuple: there is one for every chunk.

    Args:
        strong_hash: of the stored bytes, so that another form of the same content is told from a wrong answer.
        proof: see `proof_of`. Both are zeros unless the record is whole.
    """

    state: State
    strong_hash: bytes
    proof: bytes


_ABSENT: Final = Answer(State.ABSENT, bytes(STRONG_HASH_BYTES), bytes(PROOF_BYTES))
_DAMAGED: Final = Answer(State.DAMAGED, bytes(STRONG_HASH_BYTES), bytes(PROOF_BYTES))


@runtime_checkable
class Answerer(Protocol):
    """A store of packs that answers challenges itself, so that nobody need read it from afar."""

    def challenge(self, nonce: bytes, ids: Sequence[RecordId]) -> list[Answer]:
        """One answer for each id, in order."""
        ...


def proof_of(nonce: bytes, sealed: Sealed) -> bytes:
    """BLAKE3, under the nonce, of what the header says of a record and of its stored bytes (PROTOCOL.md, "Challenges")."""
    hasher = blake3.blake3(sealed.header.associated_data(), key=nonce)
    hasher.update(sealed.payload)
    return hasher.digest()


class OwnAnswers:
    """Answers from an index and packs of this machine. Thread-safe."""

    def __init__(self, records: RecordReader, index: Index) -> None:
        self._records = records
        self._index = index

    def challenge(self, nonce: bytes, ids: Sequence[RecordId]) -> list[Answer]:
        """See `Answerer`."""
        found: list[Answer] = []
        while len(found) < len(ids):
            found += self.some(nonce, ids[len(found) : len(found) + MOST_IDS])
        return found

    def some(self, nonce: bytes, ids: Sequence[RecordId]) -> list[Answer]:
        """Answers for the first of some ids, as many as a moment's work allows, and for one at least.

        Cost: reads and hashes twice what it answers for, 64 MiB or one record.
        """
        kinds: dict[RecordId, int] = {}
        size = asked = 0
        for record_id, place in zip(ids, self._index.lookup(ids), strict=True):
            if place is not None and record_id not in kinds:
                size += place.stored_bytes
                if size > _MOST_BYTES and asked:
                    break
                kinds[record_id] = place.kind
            asked += 1
        answers = dict(self._each(nonce, kinds))
        return [answers.get(record_id, _ABSENT) for record_id in ids[:asked]]

    def _each(self, nonce: bytes, kinds: dict[RecordId, int]) -> Iterator[tuple[RecordId, Answer]]:
        for kind in sorted(set(kinds.values())):
            wanted = [record_id for record_id, one in kinds.items() if one == kind]
            try:
                yield from self._whole(nonce, wanted, Kind(kind))
            except (DamagedData, UnsupportedFormat):  # one of them is to blame: each is asked for alone
                for record_id in wanted:
                    yield record_id, self._alone(nonce, record_id, Kind(kind))

    def _whole(self, nonce: bytes, ids: Sequence[RecordId], kind: Kind) -> Iterator[tuple[RecordId, Answer]]:
        for sealed in self._records.sealed(ids, kind):
            header = sealed.header
            yield header.id, Answer(State.WHOLE, header.strong_hash, proof_of(nonce, sealed))

    def _alone(self, nonce: bytes, record_id: RecordId, kind: Kind) -> Answer:
        try:
            ((_, answer),) = self._whole(nonce, [record_id], kind)
        except (DamagedData, UnsupportedFormat):
            return _DAMAGED
        return answer
