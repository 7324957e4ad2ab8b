"""Nodes of a disk tree (FORMAT.md, "Disk trees").

A disk is cut into segments of a fixed size. A leaf lists the parts of one segment in order: chunks and
holes. Inner nodes list the ids of up to 256 children. A subtree that holds only zeros has no record: its
id is `HOLE_ID`. The shape of a tree follows from the disk's size alone, so a node does not say where it
belongs, and equal content has equal nodes wherever it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from holdfast.errors import DamagedData, UnsupportedFormat
from holdfast.ids import HOLE_ID, ID_BYTES, ChunkId, NodeId, RecordId

__all__ = [
    "FANOUT",
    "MAX_LEVEL",
    "MAX_SEGMENT_BYTES",
    "MIN_SEGMENT_BYTES",
    "Inner",
    "Leaf",
    "decode_inner",
    "decode_leaf",
    "encode_inner",
    "encode_leaf",
    "tree_height",
]

FANOUT: Final = 256
MIN_SEGMENT_BYTES: Final = 1 << 20
MAX_SEGMENT_BYTES: Final = 1 << 30
MAX_LEVEL: Final = 5
"""256^5 segments of 1 MiB are an exbibyte."""

_HEADER: Final = struct.Struct("<BBHI")
_LEAF: Final = 1
_INNER: Final = 2
_HOLE_BIT: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Leaf:
    """The parts of one segment.

    Args:
        lengths: bytes of each part in order, negative for a hole, as a chunker gives them.
        ids: of the parts that are no holes, in order.
    """

    lengths: tuple[int, ...]
    ids: tuple[ChunkId, ...]


@dataclass(frozen=True, slots=True)
class Inner:
    """The children of one inner node.

    Args:
        level: 1 if the children are leaves.
    """

    level: int
    children: tuple[NodeId, ...]


def tree_height(segments: int) -> int:
    """Level of the root for a number of segments: 0 if one leaf is the whole tree."""
    level = 0
    while segments > 1:
        segments = -(-segments // FANOUT)
        level += 1
    return level


def encode_leaf(leaf: Leaf) -> bytes:
    """The plaintext of a leaf."""
    count = len(leaf.lengths)
    words = [length if length > 0 else -length | _HOLE_BIT for length in leaf.lengths]
    return _HEADER.pack(_LEAF, 0, 0, count) + struct.pack(f"<{count}I", *words) + b"".join(leaf.ids)


def encode_inner(inner: Inner) -> bytes:
    """The plaintext of an inner node."""
    return _HEADER.pack(_INNER, inner.level, 0, len(inner.children)) + b"".join(inner.children)


def _header(data: bytes, node_type: int) -> tuple[int, int]:
    if len(data) < _HEADER.size:
        raise DamagedData("a tree node is cut off")
    found, level, reserved, count = _HEADER.unpack_from(data)
    if found != node_type or reserved:
        raise UnsupportedFormat(
            f"a tree node has type {found}, expected {node_type}", hint="use a newer Holdfast"
        )
    return level, count


def decode_leaf(data: bytes, segment_bytes: int) -> Leaf:
    """The leaf that `data` encodes.

    Args:
        segment_bytes: length of the segment that it must describe exactly.

    Raises:
        DamagedData: the bytes are no well-formed leaf of such a segment.
        UnsupportedFormat: they are a node of another type.
    """
    level, count = _header(data, _LEAF)
    ids_at = _HEADER.size + 4 * count
    if level or len(data) < ids_at:
        raise DamagedData("a leaf of a disk tree has a broken length")
    words = struct.unpack_from(f"<{count}I", data, _HEADER.size)
    lengths = tuple(-(word ^ _HOLE_BIT) if word & _HOLE_BIT else word for word in words)
    if not all(lengths) or sum(map(abs, lengths)) != segment_bytes:
        raise DamagedData("a leaf of a disk tree does not cover its segment")
    if max(lengths, default=0) <= 0 or any(a < 0 and b < 0 for a, b in pairwise(lengths)):
        raise DamagedData("a leaf of a disk tree has holes where it may not")
    chunks = sum(1 for length in lengths if length > 0)
    if len(data) != ids_at + chunks * ID_BYTES:
        raise DamagedData("a leaf of a disk tree has a broken length")
    ids = tuple(
        ChunkId(RecordId(data[at : at + ID_BYTES]))
        for at in range(ids_at, ids_at + chunks * ID_BYTES, ID_BYTES)
    )
    if any(bytes(chunk) == bytes(HOLE_ID) for chunk in ids):
        raise DamagedData("a leaf of a disk tree names a hole as a chunk")
    return Leaf(lengths, ids)


def decode_inner(data: bytes, level: int, children: int) -> Inner:
    """The inner node that `data` encodes.

    Args:
        level: the level that it must have.
        children: the number of children that it must have.

    Raises:
        DamagedData: the bytes are no well-formed inner node of that shape.
        UnsupportedFormat: they are a node of another type.
    """
    found, count = _header(data, _INNER)
    if found != level or count != children or len(data) != _HEADER.size + count * ID_BYTES or count > FANOUT:
        raise DamagedData("an inner node of a disk tree has a wrong shape")
    at = _HEADER.size
    ids = tuple(NodeId(RecordId(data[at + i * ID_BYTES : at + (i + 1) * ID_BYTES])) for i in range(count))
    if all(child == HOLE_ID for child in ids):
        raise DamagedData("an inner node of a disk tree has only holes")
    return Inner(level, ids)
