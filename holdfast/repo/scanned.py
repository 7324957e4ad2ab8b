"""Taking in a segment that was read, cut and hashed where it lies (`SegmentScanner`): only what is unknown travels.

Somebody far away names chunks by SHA-256; the repository names them by ids of its own. The index keeps aliases, from
the one to the other, for chunks and for the leaves of whole segments. An alias is written only after the bytes were here
and were hashed both ways. A segment whose digest is known costs that digest; otherwise its parts are asked for, and of
those the chunks of which the alias or the record is missing. Losing aliases costs the bytes once more, nothing else.

For leaves the index keeps the way back, too: under the leaf's id the digest of its parts. So whoever scans can be told
what to expect where the parent has a certain leaf, and a segment that is as expected costs a word and no question.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from holdfast.disk import ScannedSegment, parts_digest
from holdfast.errors import IntegrityError, SourceChanged, SourceError
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import FANOUT, Leaf, encode_leaf
from holdfast.repo.format.record import Kind
from holdfast.repo.keys import Keys
from holdfast.repo.storing import ParentLeaf, Storing
from holdfast.repo.tree import TreeReader, segment_length, segments_of
from holdfast.units import MIB

__all__ = ["Aliases", "Expectations", "Taken", "name_leaf", "take_scanned"]

_NOTHING: Final = bytes(32)
_MOST_FRESH: Final = 100_000
_MOST_GROUPS: Final = 8
_GROUP_BYTES: Final = MIB


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


class Expected(NamedTuple):
    """The leaf that the parent has in the place of a segment, and the digest of its parts."""

    leaf: NodeId
    digest: bytes


class Expectations:
    """What the segments of a content are if nothing has changed since the parent. Thread-safe.

    Asks once for as many segments as an inner node has leaves: over a network that is one round trip.

    Args:
        parent: None if there is none, or if it can not be relied on.
        size_bytes: of the content.
    """

    def __init__(
        self, trees: TreeReader, keys: Keys, aliases: Aliases, parent: ContentTree | None, size_bytes: int
    ) -> None:
        self._trees = trees
        self._keys = keys
        self._aliases = aliases
        self._parent = parent
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, dict[int, Expected]] = OrderedDict()

    def of(self, segment: int) -> Expected | None:
        """What a segment is expected to be, if that is known."""
        if self._parent is None or segment >= segments_of(self._parent):
            return None
        number = segment // FANOUT
        with self._lock:
            if number not in self._groups:
                self._groups[number] = self._group(self._parent, number)
                while len(self._groups) > _MOST_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[number].get(segment)

    def digest(self, offset: int, length: int) -> bytes | None:
        """See `disk.Expect`."""
        parent = self._parent
        if parent is None or length != segment_length(
            self._size_bytes, parent.segment_bytes, offset // parent.segment_bytes
        ):
            return None
        found = self.of(offset // parent.segment_bytes)
        return None if found is None else found.digest

    def _group(self, parent: ContentTree, number: int) -> dict[int, Expected]:
        first = number * FANOUT
        leaves: dict[int, NodeId] = {}
        try:
            for segment in range(first, min(first + FANOUT, segments_of(parent))):
                lengths = {
                    segment_length(size, parent.segment_bytes, segment)
                    for size in (parent.size_bytes, self._size_bytes)
                }
                leaf = self._trees.leaf_id(parent, segment)
                if leaf != HOLE_ID and len(lengths) == 1:
                    leaves[segment] = leaf
        except IntegrityError:
            return {}  # expect nothing rather than fail
        hidden = self._aliases.find(list(leaves.values()))
        return {
            segment: Expected(leaf, self._keys.hidden_digest(leaf, digest))
            for (segment, leaf), digest in zip(leaves.items(), hidden, strict=True)
            if digest is not None
        }


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

    def learn(leaf: NodeId) -> None:
        names = {alias: leaf, leaf: RecordId(keys.hidden_digest(leaf, scanned.digest))}
        storing.aliases.update(names)
        aliases.fresh.update(names)

    if known is not None:
        if parent is not None and known == parent.id:
            learn(known)  # or it would have been expected, and never come here
            return Taken(known, b"", len(parent.leaf.ids), _data_bytes(parent.leaf.lengths), length)
        leaf = sound_leaf(known, length)
        if leaf is not None and not storing.unknown([known, *dict.fromkeys(leaf.ids)]):
            learn(known)
            return Taken(known, b"", len(leaf.ids), _data_bytes(leaf.lengths), length)
    lengths, hashes = scanned.parts()
    _require_sound(scanned.digest, lengths, hashes, length)
    ids = _stored(scanned, lengths, hashes, storing, keys, aliases)
    node, plaintext = name_leaf(keys, lengths, ids, parent)
    learn(node)
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
    for group in _groups(numbers, sizes):
        chunks: list[ChunkId] = []
        views: list[memoryview] = []
        for number in group:
            piece, digest = next(pieces, b""), hashes[number]
            if len(piece) != sizes[number] or hashlib.sha256(piece).digest() != digest:
                raise SourceChanged(
                    "a disk has changed between being hashed and being sent: somebody writes to what a snapshot should protect",
                    hint="see who removed or reverted snapshots of the VM, and run the backup again",
                )
            ids[digest] = ChunkId(name(piece))
            chunks.append(ids[digest])
            views.append(memoryview(piece))
        storing.add(chunks, views)
        learned: dict[bytes, RecordId] = {names[hashes[number]]: ids[hashes[number]] for number in group}
        storing.aliases.update(learned)
        aliases.fresh.update(learned)
    return [ids[digest] for digest in hashes]


def _groups(numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of chunks, a megabyte at a time: the index is asked, and locks are taken, once for all of them."""
    group: list[int] = []
    held_bytes = 0
    for number in numbers:
        group.append(number)
        held_bytes += sizes[number]
        if held_bytes >= _GROUP_BYTES:
            yield group
            group, held_bytes = [], 0
    if group:
        yield group


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
