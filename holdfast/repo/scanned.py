"""Taking in a segment that was read, cut and hashed where it lies (`SegmentScanner`): only what is unknown travels.

Somebody far away names chunks by SHA-256; the repository names them by ids of its own. The index keeps aliases, from
the one to the other, for chunks and for the leaves of whole segments. An alias is written only after the bytes were here
and were hashed both ways. A segment whose digest is known costs that digest; otherwise its parts are asked for, and of
those the chunks of which the alias or the record is missing. Losing aliases costs the bytes once more, nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from holdfast.disk import ScannedSegment, parts_digest
from holdfast.errors import SourceError
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.format.node import Leaf, encode_leaf
from holdfast.repo.format.record import Kind
from holdfast.repo.keys import Keys
from holdfast.repo.storing import ParentLeaf, Storing

__all__ = ["Aliases", "Taken", "name_leaf", "take_scanned"]

_NOTHING: Final = bytes(32)
_MOST_FRESH: Final = 100_000


class Taken(NamedTuple):
    """What has become of a segment.

    Args:
        plaintext: of the leaf, if it has to be stored; empty if it is a hole, or there already.
        chunks: how many the leaf names.
        read: bytes that were read of the source.
        done: bytes that this takes the backup forward.
    """

    leaf: NodeId
    plaintext: bytes
    chunks: int
    read: int
    done: int


class Aliases:
    """The aliases of the index, and those of this backup that have not been committed yet. Thread-safe.

    Args:
        index: see `Index.aliases`.
    """

    def __init__(self, index: Callable[[Sequence[bytes]], list[RecordId | None]]) -> None:
        self._index = index
        self.fresh: dict[bytes, RecordId] = {}

    def find(self, names: Sequence[bytes]) -> list[RecordId | None]:
        """The record that each name stands for, if it is known."""
        if len(self.fresh) > _MOST_FRESH:
            self.fresh = {}  # by far the most have been committed
        fresh = self.fresh
        return [
            record if record is not None else fresh.get(name)
            for name, record in zip(names, self._index(names), strict=True)
        ]


def name_leaf(
    keys: Keys, parts: Sequence[int], ids: Sequence[ChunkId], parent: ParentLeaf | None
) -> tuple[NodeId, bytes]:
    """The leaf of these parts, and its plaintext if it is neither a hole nor the parent's."""
    if parent is not None and (tuple(parts), tuple(ids)) == (parent.leaf.lengths, parent.leaf.ids):
        return parent.id, b""
    if not ids:
        return HOLE_ID, b""
    plaintext = encode_leaf(Leaf(tuple(parts), tuple(ids)))
    return NodeId(keys.record_id(Kind.NODE, plaintext)), plaintext


def take_scanned(
    scanned: ScannedSegment,
    length: int,
    parent: ParentLeaf | None,
    storing: Storing,
    keys: Keys,
    aliases: Aliases,
    sound_leaf: Callable[[NodeId, int], Leaf | None],
) -> Taken:
    """Adds to `storing` what the repository lacks of a segment.

    Args:
        length: of the segment, in bytes.
        sound_leaf: a leaf of the repository for a segment of that length; None if it or something of it is lost.

    Raises:
        SourceError: the segment can not be had, or what is said of it contradicts itself.
    """
    if scanned.digest == _NOTHING:
        return Taken(HOLE_ID, b"", 0, 0, length)
    alias = keys.alias(Kind.NODE, scanned.digest)
    found = aliases.find([alias])[0]
    known = NodeId(found) if found is not None else None
    if known is not None:
        if parent is not None and known == parent.id:
            return Taken(known, b"", len(parent.leaf.ids), _data_bytes(parent.leaf.lengths), length)
        leaf = sound_leaf(known, length)
        if leaf is not None and not storing.unknown([known, *dict.fromkeys(leaf.ids)]):
            return Taken(known, b"", len(leaf.ids), _data_bytes(leaf.lengths), length)
    lengths, hashes = scanned.parts()
    _require_sound(scanned.digest, lengths, hashes, length)
    ids = _stored(scanned, lengths, hashes, storing, keys, aliases)
    node, plaintext = name_leaf(keys, lengths, ids, parent)
    storing.aliases[alias] = aliases.fresh[alias] = node
    return Taken(node, plaintext, len(ids), _data_bytes(lengths), length)


def _stored(
    scanned: ScannedSegment,
    lengths: Sequence[int],
    hashes: Sequence[bytes],
    storing: Storing,
    keys: Keys,
    aliases: Aliases,
) -> list[ChunkId]:
    """The ids of all chunks of a segment, after what the repository lacks has been fetched and added."""
    sizes = [part for part in lengths if part > 0]
    unique = list(dict.fromkeys(hashes))
    names = {digest: keys.alias(Kind.CHUNK, digest) for digest in unique}
    ids: dict[bytes, ChunkId] = {
        digest: ChunkId(record)
        for digest, record in zip(unique, aliases.find([names[digest] for digest in unique]), strict=True)
        if record is not None
    }
    unknown = storing.absent(list(ids.values()))
    numbers, asked = [], set()
    for number, digest in enumerate(hashes):
        if digest not in asked and (digest not in ids or ids[digest] in unknown):
            asked.add(digest)
            numbers.append(number)
    name = keys.namer(Kind.CHUNK)
    pieces = iter(scanned.fetch(numbers) if numbers else ())
    for number in numbers:
        piece, digest = next(pieces, b""), hashes[number]
        if len(piece) != sizes[number] or hashlib.sha256(piece).digest() != digest:
            raise SourceError(
                "a chunk was sent with other bytes than were hashed; is the disk being written to?"
            )
        chunk = ids[digest] = ChunkId(name(piece))
        storing.add([chunk], [memoryview(piece)])
        storing.aliases[names[digest]] = aliases.fresh[names[digest]] = chunk
    return [ids[digest] for digest in hashes]


def _data_bytes(lengths: Sequence[int]) -> int:
    return sum(part for part in lengths if part > 0)


def _require_sound(digest: bytes, lengths: Sequence[int], hashes: Sequence[bytes], length: int) -> None:
    sound = (
        0 not in lengths
        and sum(map(abs, lengths)) == length
        and sum(part > 0 for part in lengths) == len(hashes)
        and all(len(item) == len(_NOTHING) for item in hashes)
        and parts_digest(lengths, hashes) == digest
    )
    if not sound:
        raise SourceError("the parts of a segment that was scanned elsewhere contradict each other")
