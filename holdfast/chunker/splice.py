"""New parts of a segment of which only some ranges changed, without reading all of it.

The result is what chunking the whole new segment would give. That is possible because a chunker forgets
everything at a cut and looks at most `lookahead_bytes` beyond it (see `Chunker`):

- A cut of the old parts that lies at least the lookahead before the first change is a cut of the new parts
  too, so chunking starts at the last such cut.
- Once a new cut falls on an old one beyond the change, with nothing changed within the lookahead after it,
  all that follows up to the next change is as it was.

In between, new bytes are needed: changed ones from the source, unchanged neighbours from the repository.
Bytes of old holes that did not change are zeros and are not asked for. Pure: reading is the caller's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from holdfast.chunker import BLOCK_BYTES, Chunker

__all__ = ["KeptPart", "NewPart", "SegmentReader", "splice"]


class SegmentReader(Protocol):
    """Bytes of one segment. Both methods return exactly `end - start` bytes; offsets count from the segment's start.

    Ranges come in ascending order, except that up to a lookahead before a later change may be asked for again.
    """

    def read_changed(self, start: int, end: int) -> bytes | bytearray | memoryview:
        """New bytes of a range within one of the changed ranges: from the source."""
        ...

    def read_unchanged(self, start: int, end: int) -> bytes | bytearray | memoryview:
        """Bytes of a range that did not change and that no hole overlaps: from the repository."""
        ...


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A part that is taken over from the old parts, unread.

    Args:
        start: offset in the segment, in bytes.
        length: as in `Chunker.cut`, negative for a hole.
        number: its place among the old parts.
    """

    start: int
    length: int
    number: int


@dataclass(frozen=True, slots=True)
class NewPart:
    """A part that was cut anew; its bytes may still be those of an old one.

    Args:
        start: offset in the segment, in bytes.
        length: as in `Chunker.cut`, negative for a hole.
        data: the part's bytes; empty for a hole.
    """

    start: int
    length: int
    data: memoryview


def splice(
    chunker: Chunker,
    old_parts: Sequence[int],
    changed: Iterable[tuple[int, int]],
    reader: SegmentReader,
) -> Iterator[KeptPart | NewPart]:
    """The parts of the changed segment, in order; their lengths are those that `chunker.cut` would give.

    Args:
        chunker: the one that made the old parts.
        old_parts: all parts of the segment before the change, as from `Chunker.cut`. The segment has the same length
            as before; one that grew or shrank is chunked from scratch.
        changed: ranges (start, end) that cover every byte that changed, in any order; they may overlap and
            cover more than what changed.
        reader: gives the bytes that are needed.

    Cost: reads the changed ranges, and around each the rest of the old parts that it touches, the lookahead, and
    what it takes for the cuts to fall into step again, most often one or two parts.
    """
    old = _OldSegment.of(old_parts, changed)
    number = 0  # old parts before this one are dealt with, and its start is a cut of the new segment
    range_number = 0
    while range_number < len(old.changed):
        first_change = old.changed[range_number][0]
        first = max(number, bisect_right(old.borders, first_change - chunker.lookahead_bytes) - 1)
        yield from old.kept(number, first)
        number = yield from _recut(chunker, old, first, range_number, reader)
        range_number = bisect_left(old.changed, (old.borders[number], 0))
    yield from old.kept(number, len(old.parts))


@dataclass(frozen=True, slots=True)
class _OldSegment:
    """The old parts and what is known to have changed since.

    Args:
        parts: as from `Chunker.cut`.
        borders: offsets of the cuts, the segment's start and end included.
        changed: ascending ranges with unchanged bytes between them.
    """

    parts: Sequence[int]
    borders: list[int]
    changed: list[tuple[int, int]]

    @classmethod
    def of(cls, parts: Sequence[int], changed: Iterable[tuple[int, int]]) -> _OldSegment:
        borders = list(accumulate((abs(length) for length in parts), initial=0))
        merged: list[tuple[int, int]] = []
        for start, end in sorted(changed):
            assert 0 <= start <= end <= borders[-1], "a changed range lies outside the segment"
            if start == end:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return cls(parts, borders, merged)

    def kept(self, first: int, end: int) -> Iterator[KeptPart]:
        """The old parts from `first` up to, not including, `end`."""
        for number in range(first, end):
            yield KeptPart(self.borders[number], self.parts[number], number)

    def read(self, start: int, end: int, reader: SegmentReader, into: memoryview) -> None:
        """Fills `into`, which is zero, with the new bytes of a range."""
        place = start
        range_number = bisect_right(self.changed, (start, self.borders[-1])) - 1
        if range_number < 0 or self.changed[range_number][1] <= start:
            range_number += 1
        while place < end:
            change = self.changed[range_number] if range_number < len(self.changed) else (end, end)
            if place < change[0]:
                stop = min(change[0], end)
                self._read_unchanged(place, stop, reader, into[place - start : stop - start])
            else:
                stop = min(change[1], end)
                into[place - start : stop - start] = reader.read_changed(place, stop)
                range_number += 1
            place = stop

    def _read_unchanged(self, start: int, end: int, reader: SegmentReader, into: memoryview) -> None:
        """Fills in the parts of the range that are not holes, with one read for each run of chunks."""
        number = bisect_right(self.borders, start) - 1
        place = start
        while place < end:
            is_hole = self.parts[number] < 0
            while self.borders[number + 1] < end and (self.parts[number + 1] < 0) == is_hole:
                number += 1
            stop = min(self.borders[number + 1], end)
            if not is_hole:
                into[place - start : stop - start] = reader.read_unchanged(place, stop)
            place = stop
            number += 1


def _recut(
    chunker: Chunker, old: _OldSegment, first: int, range_number: int, reader: SegmentReader
) -> Generator[NewPart, None, int]:
    """New parts from the start of the old part `first` until the cuts are in step with the old ones again.

    Returns:
        The number of the old part before which they are.
    """
    size = old.borders[-1]
    border_set = frozenset(old.borders)
    lookahead = chunker.lookahead_bytes
    start = old.borders[first]
    data = bytearray()
    wanted_end = old.changed[range_number][1]
    while True:
        # One more old border than before comes into view, together with what it takes to settle it.
        border = old.borders[bisect_left(old.borders, max(wanted_end, start + len(data) - lookahead + 1))]
        end = min(start + -(-(border - start + lookahead) // BLOCK_BYTES) * BLOCK_BYTES, size)
        data, have = bytearray(end - start), data
        view = memoryview(data)
        view[: len(have)] = have
        old.read(start + len(have), end, reader, view[len(have) :])

        settled = end if end == size else end - lookahead
        place = start
        for length in chunker.cut(view):
            after = place + abs(length)
            if after > settled:
                break
            yield NewPart(place, length, view[place - start : after - start] if length > 0 else view[:0])
            place = after
            while range_number < len(old.changed) and old.changed[range_number][1] <= place:
                range_number += 1
            if place == size:
                return len(old.parts)
            if place in border_set:
                next_change = old.changed[range_number][0] if range_number < len(old.changed) else size
                if next_change >= min(place + lookahead, size):
                    return bisect_left(old.borders, place)
                # Too near to stop here: the lookahead would be read twice.
                wanted_end = max(wanted_end, old.changed[range_number][1])
        data = data[place - start :]
        start = place
