"""Proves that a repository far away holds what restore points need, without having it sent.

The far side is challenged (`repo.challenge`): it reads and hashes its records, and we do the same with ours and compare. What is
equal is what we have, byte for byte, and restores as ours does. The trees are walked here; nothing travels but ids and hashes.

What can not be compared is fetched and opened with the key: records that the far side stores in another form (it has them from a
backup of its own), those that are damaged or gone here, and all of them where the keys differ.

Invariants: a record counts as proven only by bytes of ours that are whole, or by its own bytes, held against its id. A far
side that says anything else than the truth of a record has it counted as damaged, or must send it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import blake3

from holdfast.errors import DamagedData, DamagedPoint
from holdfast.ids import RecordId
from holdfast.repo.backup import Engine
from holdfast.repo.challenge import MOST_IDS, NONCE_BYTES, Answer, Answerer, OwnAnswers, State
from holdfast.repo.check import contents_of
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind
from holdfast.repo.idset import IdSet
from holdfast.repo.parallel import run_parallel
from holdfast.repo.points import Point
from holdfast.repo.walk import walk_nodes
from holdfast.units import MIB

__all__ = ["Proven", "prove"]

_BATCH_BYTES: Final = 16 * MIB
_LEAST_WORKERS: Final = 4  # they wait for answers
_FETCHED_AT_ONCE: Final = 256
_MOST_REMEMBERED: Final = 8_000_000
_MOST_DAMAGED: Final = 1000

Batch = list[tuple[RecordId, Kind]]


@dataclass(slots=True)
class Proven:
    """What was proven.

    Args:
        records: that the target holds, whichever way that was shown.
        stored_bytes: of those that were compared, headers included.
        fetched: those among them that had to be sent.
        not_here: those among the fetched that the source should have and has not, or not whole.
    """

    records: int = 0
    stored_bytes: int = 0
    fetched: int = 0
    not_here: int = 0


def prove(
    source: Engine | None,
    target: Engine,
    points: Sequence[Point],
    share: float,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Proven:
    """Has the target prove that it holds what points need.

    Args:
        source: has the same records, under the same keys; None if there is no such repository.
        points: of the target.
        share: of the records to ask for, chosen at random; 1 for all.
        on_progress: called with bytes compared so far, and 0.

    Cost: both sides read and hash the records. About 81 bytes travel for each, and those that must be fetched.
    Memory: at most 128 MiB to remember what was asked for.

    Raises:
        DamagedPoint: something that the points need is missing or damaged there.
    """
    proving = _Proving(source, target)
    proven = proving.proven
    run_parallel(
        _batches(proving.wanted(points, _Coin(share)), source),
        proving.batch,
        max(_LEAST_WORKERS, workers or 0),
        lambda: on_progress(proven.stored_bytes, 0),
    )
    if proving.damaged:
        raise _verdict(proving.damaged)
    return proven


class _Coin:
    """Falls for a record always on the same side, wherever its id turns up, and nobody knows before on which."""

    def __init__(self, share: float) -> None:
        self._secret = os.urandom(32)
        self._below = int(share * 2**64)

    def falls(self, record_id: RecordId) -> bool:
        """Whether a record is among the chosen ones."""
        if self._below >= 2**64:
            return True
        digest = blake3.blake3(record_id, key=self._secret).digest(8)
        return int.from_bytes(digest, "little") < self._below


class _NearestNodes:
    """Nodes from the source, and from the target those that can not be had from there."""

    def __init__(self, source: Engine | None, target: Engine) -> None:
        self._readers = [engine.records for engine in (source, target) if engine is not None]

    def each(self, ids: Sequence[RecordId], kind: Kind) -> Iterator[tuple[RecordId, bytes]]:
        """See `RecordReader.each`."""
        for reader in self._readers[:-1]:
            try:
                yield from list(reader.each(ids, kind))
            except DamagedData:
                continue
            return
        yield from self._readers[-1].each(ids, kind)


def _batches(wanted: Iterator[tuple[RecordId, Kind]], source: Engine | None) -> Iterator[Batch]:
    """Records in pieces that are answered for at once, by what the source says of their lengths."""
    while some := [one for _, one in zip(range(MOST_IDS), wanted, strict=False)]:
        if source is None:
            yield from (some[at : at + _FETCHED_AT_ONCE] for at in range(0, len(some), _FETCHED_AT_ONCE))
            continue
        batch: Batch = []
        size = 0
        for one, place in zip(some, source.index.lookup([record_id for record_id, _ in some]), strict=True):
            batch.append(one)
            size += place.stored_bytes if place is not None else 0
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


class _Proving:
    """See `prove`. `damaged` gets the reasons, of the first thousand records."""

    def __init__(self, source: Engine | None, target: Engine) -> None:
        self._target = target
        self._nodes = _NearestNodes(source, target)
        self._theirs = _answerer(target)
        self._source = source
        self._ours = None if source is None else _answerer(source)
        self._lock = threading.Lock()
        self.proven = Proven()
        self.damaged: dict[RecordId, str] = {}

    def wanted(self, points: Sequence[Point], coin: _Coin) -> Iterator[tuple[RecordId, Kind]]:
        """Yields the chosen records that the points need: manifests, nodes and chunks, almost all of them once."""
        yield from ((RecordId(point.id), Kind.MANIFEST) for point in points if coin.falls(RecordId(point.id)))
        roots = [tree.root for point in points for _, tree in contents_of(point.manifest)]
        seen = IdSet()
        for node in walk_nodes(self._nodes, roots):
            if coin.falls(node.id):
                yield node.id, Kind.NODE
            if not node.is_leaf:
                continue
            if len(seen) > _MOST_REMEMBERED:
                seen = IdSet()
            chosen: list[RecordId] = [chunk for chunk in node.children() if coin.falls(chunk)]
            new = seen.add(chosen)
            yield from ((chunk, Kind.CHUNK) for chunk in dict.fromkeys(chosen) if chunk in new)

    def batch(self, batch: Batch) -> None:
        """Asks for some records, and compares."""
        ids = [record_id for record_id, _ in batch]
        if self._ours is None:
            self._fetch(batch)
            return
        nonce = os.urandom(NONCE_BYTES)
        theirs = self._theirs.challenge(nonce, ids)
        ours = self._ours.challenge(nonce, ids)
        left: Batch = []
        same: list[RecordId] = []
        not_here = 0
        for (record_id, kind), their, our in zip(batch, theirs, ours, strict=True):
            reason = _reason(their, our)
            if reason:
                self._blame(record_id, kind, reason)
            elif our.state is State.WHOLE and their.proof == our.proof:
                same.append(record_id)
            else:
                left.append((record_id, kind))
                not_here += our.state is not State.WHOLE
        self._count(same, not_here)
        if left:
            self._fetch(left)

    def _count(self, same: list[RecordId], not_here: int) -> None:
        assert self._source is not None
        places = self._source.index.lookup(same)
        size = sum(RECORD_HEADER_BYTES + place.stored_bytes for place in places if place is not None)
        with self._lock:
            self.proven.records += len(same)
            self.proven.stored_bytes += size
            self.proven.not_here += not_here

    def _fetch(self, batch: Batch) -> None:
        """Has records sent, and holds them against their ids."""
        records = self._target.records
        for wanted in Kind:
            ids = [record_id for record_id, kind in batch if kind is wanted]
            try:
                found = sum(1 for _ in records.each(ids, wanted))
            except DamagedData:  # which of them, each is asked alone
                found = sum(self._fetch_alone(record_id, wanted) for record_id in ids)
            with self._lock:
                self.proven.records += found
                self.proven.fetched += found

    def _fetch_alone(self, record_id: RecordId, kind: Kind) -> bool:
        try:
            self._target.records.load_one(record_id, kind)
        except DamagedData as error:
            self._blame(record_id, kind, error.message)
            return False
        return True

    def _blame(self, record_id: RecordId, kind: Kind, reason: str) -> None:
        said = (
            reason
            if record_id.hex()[:16] in reason
            else f"{kind.name.lower()} {record_id.hex()[:16]} {reason}"
        )
        with self._lock:
            if len(self.damaged) < _MOST_DAMAGED:
                self.damaged.setdefault(record_id, said)


def _answerer(engine: Engine) -> Answerer:
    store = engine.store
    return store if isinstance(store, Answerer) else OwnAnswers(engine.records, engine.index)


def _reason(their: Answer, our: Answer) -> str:
    """What is wrong with an answer; empty if nothing is, or if only the bytes can tell."""
    if their.state is State.ABSENT:
        return "is in no pack that the index knows"
    if their.state is State.DAMAGED:
        return "is damaged in its pack"
    if our.state is State.WHOLE and their.strong_hash == our.strong_hash and their.proof != our.proof:
        return "is said to be there, but the proof for it is wrong"
    return ""


def _verdict(damaged: dict[RecordId, str]) -> DamagedPoint:
    count = str(len(damaged)) if len(damaged) < _MOST_DAMAGED else f"at least {_MOST_DAMAGED}"
    records = (
        "record that restore points need is" if len(damaged) == 1 else "records that restore points need are"
    )
    return DamagedPoint(
        f"{count} {records} missing or damaged in the target: {next(iter(damaged.values()))}",
        hint="run 'holdfast check --repair' there, or 'holdfast replicate --repair'",
    )
