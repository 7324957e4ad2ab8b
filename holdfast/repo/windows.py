"""A segment's bytes on their way through the chunker, some of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from holdfast.chunker.fixed import is_zero
from holdfast.disk import BlockSource
from holdfast.errors import IntegrityError
from holdfast.ids import ChunkId, RecordId
from holdfast.repo.buffers import write_zeros
from holdfast.repo.format.node import Leaf
from holdfast.repo.reader import DiskReader

__all__ = ["Cut", "Followed", "PatchReader", "Window"]


class Cut(NamedTuple):
    """A part of a segment that has been read and cut; its pieces are valid until the next one is asked for.

    Args:
        ids: of the chunks among the parts, in order.
        pieces: the bytes of each of them; None for one that is the parent's and was not read.
        read: bytes that were read for it.
        done: bytes that this takes the backup forward.
    """

    parts: list[int]
    ids: list[ChunkId]
    pieces: list[memoryview | None]
    read: int
    done: int


class Window:
    """The bytes of a segment, some of them at a time, in a buffer that is used over and over.

    Args:
        start: of the segment, in bytes.
        buffer: as long as the segment.
    """

    def __init__(self, source: BlockSource, start: int, buffer: memoryview) -> None:
        self._source = source
        self._start = start
        self._buffer = buffer
        self._extents = list(source.data_extents(start, start + len(buffer)))
        self._have = 0
        self.taken = 0
        self.read = 0

    @property
    def ended(self) -> bool:
        """Whether all of the segment has been taken."""
        return self.taken == len(self._buffer)

    def bytes(self) -> memoryview:
        """What is at hand."""
        return self._buffer[: self._have]

    def more(self, drop: int, size: int) -> None:
        """Lets go of the first `drop` bytes at hand, and reads up to `size` more behind the others."""
        kept = self._have - drop
        if drop and kept:
            self._buffer[:kept] = self._buffer[drop : self._have]
        size = min(size, len(self._buffer) - self.taken)
        self._have = kept + size
        self._fill(self._start + self.taken - kept, kept)
        self.taken += size

    def _fill(self, base: int, at: int) -> None:
        """Reads what the bytes from `at` on stand for; what lies outside of the extents is zeros.

        Args:
            base: what the front of the buffer stands for, in bytes from the start of the source.
        """
        end = self._have
        for offset, size in self._extents:
            low, high = max(offset - base, at), min(offset - base + size, end)
            if low >= high:
                continue
            if low > at:
                write_zeros(self._buffer[at:low])
            self._source.read_into(base + low, self._buffer[low:high])
            self.read += high - low
            at = high
        if at < end:
            write_zeros(self._buffer[at:end])


class Followed:
    """The parts of the parent's leaf, as long as the source proves equal to them."""

    def __init__(self, leaf: Leaf, name: Callable[[memoryview], RecordId]) -> None:
        self._parts = leaf.lengths
        self._ids = leaf.ids
        self._name = name
        self._part = self._id = 0  # what has been given
        self._proven = 0  # parts after those that are known to be equal
        self._cuts: dict[int, tuple[int, int]] = {}
        self.goes_on = True

    def resume(self, offset: int) -> None:
        """Tries the parts again from `offset` bytes of the segment on, if one of them begins there."""
        if not self._cuts:
            begin = number = 0
            for part, length in enumerate(self._parts):
                self._cuts[begin] = part, number
                begin += abs(length)
                number += length > 0
        if offset in self._cuts:
            self._part, self._id = self._cuts[offset]
            self._proven = 0
            self.goes_on = True

    def follow(self, view: memoryview, cut: Cut, lookahead: int, *, ended: bool) -> int:
        """Adds the parts that are proven and final; returns where they end in `view`.

        Args:
            view: begins where the parts that were given end.
        """
        at, part, number = 0, self._part, self._id
        while part < len(self._parts):
            length = self._parts[part]
            after = at + abs(length)
            if after > len(view):
                self.goes_on = not ended
                break
            if part >= self._part + self._proven and not self._is_equal(view[at:after], length, number):
                self.goes_on = False
                break
            number += length > 0
            at, part = after, part + 1
        else:
            self.goes_on = False
        settled = at if ended and at == len(view) else min(at - lookahead, at - 1)
        given = 0
        while self._part < part and given + abs(self._parts[self._part]) <= settled:
            length = self._parts[self._part]
            cut.parts.append(length)
            if length > 0:
                cut.ids.append(self._ids[self._id])
                cut.pieces.append(None)
                self._id += 1
            given += abs(length)
            self._part += 1
        self._proven = part - self._part
        return given

    def _is_equal(self, piece: memoryview, length: int, number: int) -> bool:
        if length > 0:
            return self._name(piece) == self._ids[number]
        return is_zero(piece)


class PatchReader:
    """Gives `splice` the bytes it needs: new ones from the source, others from the repository.

    Where the repository's are damaged, the source has them too.
    """

    def __init__(self, source: BlockSource, old: DiskReader, base: int) -> None:
        self._source = source
        self._old = old
        self._base = base
        self.bytes_read = 0

    def read_changed(self, start: int, end: int) -> memoryview:
        """The source's bytes in [start, end) of the segment."""
        view = memoryview(bytearray(end - start))
        for offset, size in self._source.data_extents(self._base + start, self._base + end):
            first = offset - self._base - start
            self._source.read_into(offset, view[first : first + size])
            self.bytes_read += size
        return view

    def read_unchanged(self, start: int, end: int) -> bytes | memoryview:
        """The same of bytes that have not changed."""
        try:
            return self._old.pread(self._base + start, end - start)
        except IntegrityError:
            return self.read_changed(start, end)
