from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from holdfast.esxi.vmdk.joined import JoinedSource, Piece

PIECES = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 20)), min_size=1, max_size=8)


@given(parts=PIECES, data=st.data())
def test_any_range_of_any_pieces(
    parts: list[tuple[int, bool, int]], data: st.DataObject, memory, content
) -> None:
    pieces, expected = [], b""
    for number, (length, zeros, offset) in enumerate(parts):
        if zeros:
            pieces.append(Piece(length))
            expected += bytes(length)
        else:
            text = bytes(1 + (number * 50 + at) % 255 for at in range(offset + length + 3))
            pieces.append(Piece(length, memory(text), offset))
            expected += text[offset : offset + length]
    joined = JoinedSource(pieces)
    assert joined.size_bytes == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(start, len(expected)))
    assert content.of(joined, start, end) == expected[start:end]
    content.check_extents(joined, expected, start, end)
    ranges = list(joined.data_extents(start, end))
    assert sum(length for _, length in ranges) == sum(1 for byte in expected[start:end] if byte)
    assert all(first[0] + first[1] < second[0] for first, second in itertools.pairwise(ranges))
    joined.close()
