"""A disk that is put together from pieces of other sources and from zeros.

Invariants: the pieces follow each other without gap from 0 to the size; each lies inside of its
source. Owns the sources and closes them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from holdfast.disk import BlockSource

__all__ = ["JoinedSource", "Piece", "Placement"]


class Placement(NamedTuple):
    """The bytes [start, end) of a disk lie from `offset` on in `source`, or are zeros where there is none."""

    start: int
    end: int
    source: BlockSource | None
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes from byte `offset` of `source`, or zeros where there is no source."""

    length: int
    source: BlockSource | None = None
    offset: int = 0


class JoinedSource:
    """The pieces one after the other; a `BlockSource`."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = tuple(pieces)
        self._starts = [0]
        for piece in self._pieces:
            self._starts.append(self._starts[-1] + piece.length)

    @property
    def size_bytes(self) -> int:
        """The sum of the pieces."""
        return self._starts[-1]

    def placements(self, start: int, end: int) -> Iterator[Placement]:
        """Yields where the bytes [start, end) lie, ascending and without a gap."""
        for piece, low, high, inside in self._within(start, end):
            yield Placement(low, high, piece.source, inside)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`; ranges that touch across pieces become one."""
        begin, stop = start, start
        for piece, low, high, inside in self._within(start, end):
            if piece.source is None:
                continue
            shift = low - inside
            for offset, length in piece.source.data_extents(inside, inside + high - low):
                if offset + shift != stop:
                    if stop > begin:
                        yield begin, stop - begin
                    begin = offset + shift
                stop = offset + shift + length
        if stop > begin:
            yield begin, stop - begin

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`."""
        for piece, low, high, inside in self._within(offset, offset + buffer.nbytes):
            part = buffer[low - offset : high - offset]
            if piece.source is None:
                np.frombuffer(part, np.uint8)[:] = 0
            else:
                piece.source.read_into(inside, part)

    def close(self) -> None:
        """Closes all sources. May be called twice."""
        for piece in self._pieces:
            if piece.source is not None:
                piece.source.close()

    def _within(self, start: int, end: int) -> Iterator[tuple[Piece, int, int, int]]:
        """Yields each piece that meets [start, end), where it meets it, and the offset in its source."""
        index = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            piece = self._pieces[index]
            high = min(self._starts[index + 1], end)
            yield piece, start, high, piece.offset + start - self._starts[index]
            start, index = high, index + 1
