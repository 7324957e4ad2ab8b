"""Walks over the nodes of many disk trees at once, each node once, in the order in which packs are best read.

Trees share most of their nodes, so the cost follows the unique nodes, not the number of points.
Memory: 16 bytes per node, and the nodes of one batch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from holdfast.errors import DamagedData
from holdfast.ids import HOLE_ID, ID_BYTES, NodeId, RecordId
from holdfast.repo.format.record import Kind
from holdfast.repo.idset import IdSet

__all__ = ["Node", "NodeReader", "read_node", "walk_nodes"]

_HEADER: Final = struct.Struct("<BBHI")
_LEAF: Final = 1
_HOLE_BIT: Final = 1 << 31
_AT_ONCE: Final = 2048


class Node(NamedTuple):
    """What a node names.

    Args:
        ids: of the chunks of a leaf, or of an inner node's children that are no holes; 32 bytes each.
    """

    id: NodeId
    is_leaf: bool
    ids: bytes

    def children(self) -> list[NodeId]:
        """The ids one by one."""
        return [NodeId(RecordId(self.ids[at : at + ID_BYTES])) for at in range(0, len(self.ids), ID_BYTES)]


def read_node(node: NodeId, data: bytes) -> Node:
    """What the plaintext of a node names, whatever its place in a tree is.

    Raises:
        DamagedData: it is no node.
    """
    if len(data) < _HEADER.size:
        raise DamagedData("a tree node is cut off")
    kind, _, _, count = _HEADER.unpack_from(data)
    if kind == _LEAF:
        at = _HEADER.size + 4 * count
        if len(data) < at:
            raise DamagedData("a leaf of a disk tree has a broken length")
        import numpy as np  # it takes long to load, and a replication without anything to do meets no leaf

        chunks = int((np.frombuffer(data, "<u4", count, _HEADER.size) < _HOLE_BIT).sum())
        if len(data) != at + chunks * ID_BYTES:
            raise DamagedData("a leaf of a disk tree has a broken length")
        return Node(node, True, data[at:])
    if len(data) != _HEADER.size + count * ID_BYTES:
        raise DamagedData("an inner node of a disk tree has a broken length")
    ids = data[_HEADER.size :]
    if bytes(HOLE_ID) in ids:
        kept = (ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES))
        ids = b"".join(child for child in kept if child != HOLE_ID)
    return Node(node, False, ids)


class NodeReader(Protocol):
    """Where nodes come from: `RecordReader`, and what is like it."""

    def each(self, ids: Sequence[RecordId], kind: Kind) -> Iterator[tuple[RecordId, bytes]]:
        """See `RecordReader.each`."""
        ...


def walk_nodes(records: NodeReader, roots: Iterable[NodeId], seen: IdSet | None = None) -> Iterator[Node]:
    """Yields every node below the roots, and the roots, each once.

    Args:
        seen: nodes that need not be looked at; receives those that are.

    Raises:
        DamagedData: a node is missing or damaged.
    """
    seen = IdSet() if seen is None else seen
    pending = [root for root in roots if root != HOLE_ID]
    while pending:
        batch = [NodeId(i) for i in seen.add(pending[-_AT_ONCE:])]
        del pending[-_AT_ONCE:]
        for node_id, data in records.each(batch, Kind.NODE):
            node = read_node(NodeId(node_id), data)
            yield node
            if not node.is_leaf:
                pending += node.children()
