"""Disk trees: from the leaves of a disk's segments to one root, and back (FORMAT.md, "Disk trees").

The shape of a tree follows from the disk's size, so everything here is arithmetic on segment numbers. Equal
subtrees have equal ids; walking two trees together descends only where their ids differ.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Final

from holdfast.errors import DamagedData, UsageError
from holdfast.ids import HOLE_ID, ID_BYTES, NodeId, RecordId
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.format.node import (
    FANOUT,
    MAX_LEVEL,
    Inner,
    Leaf,
    decode_inner,
    decode_leaf,
    encode_inner,
    tree_height,
)
from holdfast.repo.format.record import Kind
from holdfast.repo.keys import Keys
from holdfast.repo.records import RecordReader

__all__ = [
    "LeafTable",
    "TreeReader",
    "build_tree",
    "require_length",
    "segment_count",
    "segment_length",
    "segments_of",
    "update_tree",
]

_CACHED_NODES: Final = 256


def segment_count(size_bytes: int, segment_bytes: int) -> int:
    """How many segments a disk has; the last one may be shorter."""
    return -(-size_bytes // segment_bytes)


def segments_of(tree: ContentTree) -> int:
    """How many segments a content has."""
    return segment_count(tree.size_bytes, tree.segment_bytes)


def segment_length(size_bytes: int, segment_bytes: int, number: int) -> int:
    """Bytes of segment `number`."""
    return min(segment_bytes, size_bytes - number * segment_bytes)


def require_length(chunk_bytes: int, listed_bytes: int) -> None:
    """Raises DamagedData if a chunk is not as long as the leaf that lists it says."""
    if chunk_bytes != listed_bytes:
        raise DamagedData(f"a leaf gives a chunk {listed_bytes} bytes, but it has {chunk_bytes}")


class LeafTable:
    """The leaf ids of a disk by segment number: 32 bytes each, holes to begin with."""

    def __init__(self, segments: int) -> None:
        self._ids = bytearray(segments * ID_BYTES)

    def __len__(self) -> int:
        return len(self._ids) // ID_BYTES

    def __getitem__(self, segment: int) -> NodeId:
        return NodeId(RecordId(bytes(self._ids[segment * ID_BYTES : (segment + 1) * ID_BYTES])))

    def __setitem__(self, segment: int, leaf: NodeId) -> None:
        self._ids[segment * ID_BYTES : (segment + 1) * ID_BYTES] = leaf


def build_tree(leaves: LeafTable, keys: Keys, store: list[tuple[NodeId, bytes]]) -> NodeId:
    """The root of a disk with these leaves.

    Args:
        store: receives the id and plaintext of each inner node, children before parents.
    """
    if not len(leaves):
        return HOLE_ID
    children = [leaves[segment] for segment in range(len(leaves))]
    level = 0
    while len(children) > 1:
        level += 1
        parents = []
        for first in range(0, len(children), FANOUT):
            group = tuple(children[first : first + FANOUT])
            node = HOLE_ID
            if any(child != HOLE_ID for child in group):
                plaintext = encode_inner(Inner(level, group))
                node = NodeId(keys.record_id(Kind.NODE, plaintext))
                store.append((node, plaintext))
            parents.append(node)
        children = parents
    return children[0]


def update_tree(
    trees: TreeReader,
    old: ContentTree,
    changed: Mapping[int, NodeId],
    keys: Keys,
    store: list[tuple[NodeId, bytes]],
) -> NodeId:
    """The root of a disk that differs from `old` only in the leaves of some segments.

    Args:
        changed: segment number -> new leaf. The disk's size is that of `old`.
        store: receives the id and plaintext of each new inner node, children before parents.

    Cost: follows the number of changed segments: only the paths to them are read and made anew.
    """
    ordered = sorted(changed)

    def rebuilt(node: NodeId, level: int, first: int) -> NodeId:
        span = FANOUT**level
        at = bisect_left(ordered, first)
        if at == len(ordered) or ordered[at] >= first + span:
            return node
        if not level:
            return changed[first]
        before = trees.children(old, node, level, first)
        step = span // FANOUT
        after = tuple(rebuilt(child, level - 1, first + number * step) for number, child in enumerate(before))
        if after == before:
            return node
        if all(child == HOLE_ID for child in after):
            return HOLE_ID
        plaintext = encode_inner(Inner(level, after))
        made = NodeId(keys.record_id(Kind.NODE, plaintext))
        store.append((made, plaintext))
        return made

    return rebuilt(old.root, trees.height(old), 0)


class TreeReader:
    """Reads disk trees. Thread-safe; keeps a small cache of decoded inner nodes."""

    def __init__(self, records: RecordReader) -> None:
        self._records = records
        self._inner = lru_cache(maxsize=_CACHED_NODES)(self._load_inner)

    def _load_inner(self, node: NodeId, level: int, children: int) -> Inner:
        return decode_inner(self._records.load_one(node, Kind.NODE), level, children)

    def height(self, tree: ContentTree) -> int:
        """Level of the root.

        Raises:
            DamagedData: the size is beyond what a tree may have.
        """
        height = tree_height(segments_of(tree))
        if height > MAX_LEVEL:
            raise DamagedData(f"a disk of {tree.size_bytes} bytes is beyond the limit of the format")
        return height

    def leaf_id(self, tree: ContentTree, segment: int) -> NodeId:
        """The id of the leaf of one segment."""
        level = self.height(tree)
        node, first = tree.root, 0
        total = segments_of(tree)
        while level and node != HOLE_ID:
            span = FANOUT ** (level - 1)
            covered = min(total - first, span * FANOUT)
            child = (segment - first) // span
            node = self._inner(node, level, -(-covered // span)).children[child]
            first += child * span
            level -= 1
        return node

    def children(self, tree: ContentTree, node: NodeId, level: int, first: int) -> tuple[NodeId, ...]:
        """The children of the inner node whose subtree begins at segment `first`."""
        span = FANOUT ** (level - 1)
        covered = min(segments_of(tree) - first, span * FANOUT)
        count = -(-covered // span)
        return (HOLE_ID,) * count if node == HOLE_ID else self._inner(node, level, count).children

    def leaf(self, node: NodeId, length: int) -> Leaf:
        """The leaf of a segment of `length` bytes."""
        if node == HOLE_ID:
            return Leaf((-length,), ())
        return decode_leaf(self._records.load_one(node, Kind.NODE), length)

    def data_leaves(self, tree: ContentTree) -> Iterator[tuple[int, NodeId]]:
        """Yields segment number and leaf id of each segment that is no hole, in order."""
        total = segments_of(tree)
        if total:
            yield from self._descend(tree.root, self.height(tree), 0, total)

    def _descend(self, node: NodeId, level: int, first: int, total: int) -> Iterator[tuple[int, NodeId]]:
        if node == HOLE_ID:
            return
        if not level:
            yield first, node
            return
        span = FANOUT ** (level - 1)
        covered = min(total - first, span * FANOUT)
        for number, child in enumerate(self._inner(node, level, -(-covered // span)).children):
            yield from self._descend(child, level - 1, first + number * span, total)

    def differing_leaves(self, old: ContentTree, new: ContentTree) -> Iterator[tuple[int, NodeId, NodeId]]:
        """Yields (segment, old leaf, new leaf) wherever two disks differ, in order.

        Where one disk ends, the other is compared with holes. Subtrees with equal ids are not read.
        """
        if self.height(old) != self.height(new):
            yield from self._differing_flat(old, new)
            return
        totals = (
            segments_of(old),
            segments_of(new),
        )
        if max(totals):
            yield from self._differing(old.root, new.root, self.height(old), 0, totals)

    def _differing(
        self, old: NodeId, new: NodeId, level: int, first: int, totals: tuple[int, int]
    ) -> Iterator[tuple[int, NodeId, NodeId]]:
        if old == new:
            return
        if not level:
            yield first, old, new
            return
        span = FANOUT ** (level - 1)
        sides: list[tuple[NodeId, ...]] = []
        for node, total in zip((old, new), totals, strict=True):
            children = -(-min(total - first, span * FANOUT) // span)
            if children <= 0 or node == HOLE_ID:
                sides.append((HOLE_ID,) * FANOUT)
            else:
                found = self._inner(node, level, children).children
                sides.append(found + (HOLE_ID,) * (FANOUT - len(found)))
        for number, (left, right) in enumerate(zip(*sides, strict=True)):
            yield from self._differing(left, right, level - 1, first + number * span, totals)

    def _differing_flat(self, old: ContentTree, new: ContentTree) -> Iterator[tuple[int, NodeId, NodeId]]:
        """For trees of different height: two merged walks over all their leaves."""
        left, right = self.data_leaves(old), self.data_leaves(new)
        a, b = next(left, None), next(right, None)
        while a is not None or b is not None:
            if b is None or (a is not None and a[0] < b[0]):
                assert a is not None
                yield a[0], a[1], HOLE_ID
                a = next(left, None)
            elif a is None or b[0] < a[0]:
                yield b[0], HOLE_ID, b[1]
                b = next(right, None)
            else:
                if a[1] != b[1]:
                    yield a[0], a[1], b[1]
                a, b = next(left, None), next(right, None)

    def differing_ranges(self, old: ContentTree, new: ContentTree) -> Iterator[tuple[int, int]]:
        """Yields (offset, length) of what differs between two disks, by chunk borders, ascending, merged.

        Raises:
            UsageError: they were cut into segments of different sizes.
        """
        if old.segment_bytes != new.segment_bytes:
            raise UsageError(
                "the two contents were cut differently, so they can not be compared by their trees"
            )
        open_start = open_end = -1
        for segment, left, right in self.differing_leaves(old, new):
            for start, end in self._differing_parts(old, new, segment, left, right):
                if start == open_end:
                    open_end = end
                    continue
                if open_end > open_start:
                    yield open_start, open_end - open_start
                open_start, open_end = start, end
        if open_end > open_start:
            yield open_start, open_end - open_start

    def _differing_parts(
        self, old: ContentTree, new: ContentTree, segment: int, left: NodeId, right: NodeId
    ) -> Iterator[tuple[int, int]]:
        before = self._parts(old, segment, left)
        after = self._parts(new, segment, right)
        borders = sorted(before.keys() | after.keys())
        a = b = (0, RecordId(HOLE_ID))
        for start, end in pairwise(borders):
            a, b = before.get(start, a), after.get(start, b)
            if a != b:
                yield start, end

    def _parts(self, tree: ContentTree, segment: int, node: NodeId) -> dict[int, tuple[int, RecordId]]:
        """Start of each part -> (start, chunk), with holes as `HOLE_ID` and an entry at the end."""
        start = segment * tree.segment_bytes
        end = start + tree.segment_bytes
        parts: dict[int, tuple[int, RecordId]] = {}
        if start < tree.size_bytes:
            leaf = self.leaf(node, segment_length(tree.size_bytes, tree.segment_bytes, segment))
            ids = iter(leaf.ids)
            for length in leaf.lengths:
                parts[start] = (start, next(ids)) if length > 0 else (0, HOLE_ID)
                start += abs(length)
        if start < end:
            parts[start] = (0, HOLE_ID)
        parts[end] = (0, HOLE_ID)
        return parts
