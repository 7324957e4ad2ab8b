"""Tree nodes: round trips, frozen bytes, and shapes that are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedData, HoldfastError, UnsupportedFormat
from holdfast.ids import HOLE_ID, ChunkId, NodeId, RecordId
from holdfast.repo.format import node as n
from holdfast.repo.format.node import Inner, Leaf

Survives = Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]

HOLE_BIT = 1 << 31
A, B = ChunkId(RecordId(b"a" * 32)), ChunkId(RecordId(b"b" * 32))
LEAF = Leaf((4096, -8192, 65536), (A, B))
LEAF_BYTES = 4096 + 8192 + 65536
INNER = Inner(2, (NodeId(A), HOLE_ID, NodeId(B)))

ids = st.binary(min_size=32, max_size=32).filter(any).map(RecordId)


@st.composite
def leaves(draw: st.DrawFn) -> Leaf:
    """Parts in which at least one is a chunk and no two holes are neighbours."""
    lengths: list[int] = []
    for length in draw(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=40)):
        hole = draw(st.booleans()) and not (lengths and lengths[-1] < 0)
        lengths.append(-length if hole else length)
    if max(lengths) < 0:
        lengths.append(4096)
    return Leaf(tuple(lengths), tuple(ChunkId(draw(ids)) for length in lengths if length > 0))


def leaf_bytes(words: list[int], *chunks: bytes, kind: int = 1, level: int = 0, reserved: int = 0) -> bytes:
    head = struct.pack("<BBHI", kind, level, reserved, len(words))
    return head + struct.pack(f"<{len(words)}I", *words) + b"".join(chunks)


@given(leaves())
def test_leaf_round_trip(leaf: Leaf) -> None:
    data = n.encode_leaf(leaf)
    assert n.decode_leaf(data, sum(map(abs, leaf.lengths))) == leaf
    assert len(data) == 8 + 4 * len(leaf.lengths) + 32 * len(leaf.ids)


@given(st.integers(1, n.MAX_LEVEL), st.lists(ids | st.just(RecordId(HOLE_ID)), min_size=1, max_size=256).filter(
    lambda found: any(i != HOLE_ID for i in found)
))  # fmt: skip
def test_inner_round_trip(level: int, children: list[RecordId]) -> None:
    inner = Inner(level, tuple(NodeId(child) for child in children))
    assert n.decode_inner(n.encode_inner(inner), level, len(children)) == inner


def test_frozen_nodes() -> None:
    assert n.encode_leaf(LEAF).hex() == (
        "0100000003000000" + "00100000" + "00200080" + "00000100" + "61" * 32 + "62" * 32
    )
    assert n.encode_inner(INNER).hex() == "0202000003000000" + "61" * 32 + "00" * 32 + "62" * 32


@pytest.mark.parametrize(
    ("segments", "height"),
    [(0, 0), (1, 0), (2, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (256**5, 5), (256**5 + 1, 6)],
)
def test_height_follows_from_the_number_of_segments(segments: int, height: int) -> None:
    assert n.tree_height(segments) == height


@pytest.mark.parametrize(
    ("data", "length", "why"),
    [
        (b"", 4096, "nothing"),
        (leaf_bytes([4096], A)[:7], 4096, "half a header"),
        (leaf_bytes([4096], A)[:-1], 4096, "an id cut off"),
        (leaf_bytes([4096], A) + b"\0", 4096, "a byte too many"),
        (leaf_bytes([4096]), 4096, "no id"),
        (leaf_bytes([4096], A, B), 4096, "an id too many"),
        (leaf_bytes([4096], A), 8192, "too short for its segment"),
        (leaf_bytes([8192], A), 4096, "too long for its segment"),
        (leaf_bytes([0, 4096], A, B), 4096, "a part of no length"),
        (leaf_bytes([HOLE_BIT, 4096], A), 4096, "a hole of no length"),
        (leaf_bytes([4096 | HOLE_BIT]), 4096, "holes only"),
        (leaf_bytes([2048 | HOLE_BIT, 2048 | HOLE_BIT, 4096], A), 8192, "two holes in a row"),
        (leaf_bytes([4096], bytes(32)), 4096, "the hole's id as a chunk"),
        (leaf_bytes([4096], A, level=1), 4096, "a leaf above level 0"),
        (leaf_bytes([]), 0, "no parts"),
        (struct.pack("<BBHI", 1, 0, 0, 2**32 - 1), 4096, "a count far beyond the bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_leaves_are_damaged(data: bytes, length: int, why: str) -> None:
    with pytest.raises(DamagedData):
        n.decode_leaf(data, length)


def test_nodes_of_other_types_are_unsupported() -> None:
    for data in (leaf_bytes([4096], A, kind=3), leaf_bytes([4096], A, reserved=1), n.encode_inner(INNER)):
        with pytest.raises(UnsupportedFormat):
            n.decode_leaf(data, 4096)
    with pytest.raises(UnsupportedFormat):
        n.decode_inner(n.encode_leaf(LEAF), 1, 3)


def test_inner_nodes_of_another_shape_are_damaged() -> None:
    data = n.encode_inner(INNER)
    assert n.decode_inner(data, 2, 3) == INNER
    for level, children in ((1, 3), (3, 3), (2, 2), (2, 4), (2, 0)):
        with pytest.raises(DamagedData):
            n.decode_inner(data, level, children)
    for changed in (data[:-1], data + b"\0", data + bytes(32), data[:7]):
        with pytest.raises(DamagedData):
            n.decode_inner(changed, 2, 3)
    with pytest.raises(DamagedData):
        n.decode_inner(n.encode_inner(Inner(1, (HOLE_ID, HOLE_ID))), 1, 2)
    wide = n.encode_inner(Inner(1, (NodeId(A),) * 257))
    with pytest.raises(DamagedData):
        n.decode_inner(wide, 1, 257)


@given(st.binary(max_size=400), st.integers(0, 1 << 30))
def test_fuzz_leaf(survives: Survives, data: bytes, length: int) -> None:
    survives(lambda: n.decode_leaf(data, length), (DamagedData, UnsupportedFormat))


@given(st.data())
def test_fuzz_mutated_leaf(survives: Survives, data: st.DataObject) -> None:
    leaf = bytearray(n.encode_leaf(LEAF))
    for _ in range(data.draw(st.integers(1, 3))):
        leaf[data.draw(st.integers(0, len(leaf) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(leaf[: data.draw(st.integers(0, len(leaf)))])
    for changed in (bytes(leaf), cut):
        survives(lambda changed=changed: n.decode_leaf(changed, LEAF_BYTES), (DamagedData, UnsupportedFormat))  # type: ignore[misc]


@given(st.binary(max_size=400), st.integers(0, 6), st.integers(0, 257))
def test_fuzz_inner(survives: Survives, data: bytes, level: int, children: int) -> None:
    survives(lambda: n.decode_inner(data, level, children), (DamagedData, UnsupportedFormat))
    survives(
        lambda: n.decode_inner(
            b"\2" + bytes([level]) + b"\0\0" + children.to_bytes(4, "little") + data, level, children
        ),
        (DamagedData, UnsupportedFormat),
    )
