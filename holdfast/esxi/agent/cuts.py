# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""Cutting on the host, without numpy: the chunkers `aligned` and `fixed`, with the same cuts as the near side's.

`aligned` takes its numbers from `holdfast.chunker.aligned_plain`, which is sent along and handed over as a module; the rest is
done in another way, because plain Python spends its time on single numbers. Blocks are weighed together: one
sampled word of each becomes a large integer with a lane of 128 bits per block, and one multiplication weighs all of
them. 16 products of 32 and 64 bits fit into a lane, so none spills into the next. And blocks are tested for
repetition only where a cut depends on it. Tests hold the cuts equal.
"""

import sys
from bisect import bisect_left
from operator import mul
from typing import Any, List, Tuple, cast

_LANE_BYTES = 16
_BLOCK_BYTES = 4096
_BLOCK_WORDS = _BLOCK_BYTES // 4
_SLAB_BYTES = 512 << 10
_ZEROS = bytes(64 << 10)


class AlignedCutter(object):
    """The chunker `aligned`.

    Args:
        plain: the module `aligned_plain`.

    Raises:
        ValueError: the chunk size is not possible.
    """

    def __init__(self, plain: Any, chunk_size_bytes: int, seed: bytes) -> None:
        self._plain = plain
        self._limits = plain.Limits(chunk_size_bytes)
        self.shortest_hole_bytes = self._limits.shortest_hole * plain.BLOCK_BYTES
        self._weights = plain.multipliers(seed)
        self._samples = [(offset // 4, weight) for offset, weight in zip(plain.SAMPLE_OFFSETS, self._weights)]
        self._repetition = plain.words_struct(range(0, plain.BLOCK_BYTES, plain.REPETITION_STRIDE_BYTES))
        self.candidate_from = plain.threshold(self._limits.bits)
        self.sure_from = plain.threshold(self._limits.bits + plain.REPETITION_BITS)
        least = self.candidate_from >> 56
        self.worth_a_look = bytes(int(top == 0 or top >= least) for top in range(256))

    def begin(self, segment: memoryview) -> "AlignedPass":
        """A pass over a segment that is still to be filled."""
        return AlignedPass(self, segment)

    def cut(self, segment: memoryview) -> List[int]:
        """The lengths of the segment's parts in bytes, in order; a hole's length is negative."""
        return self.begin(segment).finish()

    def weigh(self, blocks: memoryview) -> bytes:
        """The weights of whole blocks: the first 8 bytes of a lane of 16 for each, little-endian."""
        if sys.byteorder != "little":
            samples = self._plain.words_struct(self._plain.SAMPLE_OFFSETS).iter_unpack(blocks)
            return b"".join(
                sum(map(mul, words, self._weights)).to_bytes(_LANE_BYTES, "little") for words in samples
            )
        words = blocks.cast("I")
        count = len(words) // _BLOCK_WORDS
        lanes = bytearray(_LANE_BYTES * count)
        lane_words = memoryview(lanes).cast("I")[0 :: _LANE_BYTES // 4]
        total = 0
        for word, weight in self._samples:
            lane_words[:] = words[word::_BLOCK_WORDS]
            total += int.from_bytes(lanes, "little") * weight
        return total.to_bytes(len(lanes) + _LANE_BYTES, "little")

    def select(
        self, segment: memoryview, candidates: List[int], sure: List[bool], zero: List[int]
    ) -> List[int]:
        """The lengths of the segment's parts: `select` of the plain twin, but only those blocks are tested for repetition whose
        outcome matters, one or two for each chunk.

        Args:
            candidates: numbers of blocks before the places where a chunk may end, ascending.
            sure: for each of them, whether it is one even if its block is repetitive.
            zero: numbers of the zero blocks, ascending.
        """
        limits, size = self._limits, len(segment)
        total = -(-size // _BLOCK_BYTES)
        parts = []  # type: List[int]
        candidates.append(total + limits.maximum)  # beyond reach: there is always a next one
        i = start = 0
        for hole, after in [*_runs(zero, limits.shortest_hole), (total, total)]:
            while start < hole:
                limit = min(start + limits.maximum, hole)
                i = bisect_left(candidates, start + limits.minimum, i)
                while (
                    candidates[i] < limit and not sure[i] and self._is_repetitive(segment, candidates[i] - 1)
                ):
                    i += 1
                end = min(candidates[i], limit)
                parts.append(end - start)
                start = end
            if after > hole:
                parts.append(hole - after)
                start = after
        return cast("List[int]", self._plain.to_bytes(parts, size))

    def _is_repetitive(self, segment: memoryview, block: int) -> bool:
        words = self._repetition.unpack_from(segment, block * _BLOCK_BYTES)
        return len(set(words)) < len(words)


class AlignedPass(object):
    """Weighs the blocks of a segment as they arrive, while they are still in the processor's cache."""

    def __init__(self, cutter: AlignedCutter, segment: memoryview) -> None:
        self._cutter = cutter
        self._segment = segment
        self._done = 0
        self._candidates = []  # type: List[int]
        self._sure = []  # type: List[bool]
        self._zero = []  # type: List[int]

    def upto(self, end: int) -> None:
        """Says that the segment is filled up to `end` bytes."""
        while end - self._done >= _SLAB_BYTES:
            self._weigh(self._segment[self._done : self._done + _SLAB_BYTES])

    def finish(self) -> List[int]:
        """The lengths of the segment's parts, all of which is filled."""
        size = len(self._segment)
        whole = size - size % _BLOCK_BYTES
        self.upto(whole)
        if self._done < whole:
            self._weigh(self._segment[self._done : whole])
        if whole < size:  # a partial block counts as if zeros filled it up
            self._weigh(memoryview(bytes(self._segment[whole:]) + bytes(_BLOCK_BYTES - (size - whole))))
        return self._cutter.select(self._segment, self._candidates, self._sure, self._zero)

    def _weigh(self, blocks: memoryview) -> None:
        weights = self._cutter.weigh(blocks)
        least, sure = self._cutter.candidate_from, self._cutter.sure_from
        count = len(blocks) // _BLOCK_BYTES
        # By its highest byte most of the blocks are sorted out; no number is made of their weights.
        looks = weights[7 : count * _LANE_BYTES : _LANE_BYTES].translate(self._cutter.worth_a_look)
        first = self._done // _BLOCK_BYTES
        block = looks.find(1)
        while block >= 0:
            weight = int.from_bytes(weights[block * _LANE_BYTES : block * _LANE_BYTES + 8], "little")
            if weight >= least:
                self._candidates.append(first + block + 1)
                self._sure.append(weight >= sure)
            elif not weight and is_zero(blocks[block * _BLOCK_BYTES : (block + 1) * _BLOCK_BYTES]):
                self._zero.append(first + block)
            block = looks.find(1, block + 1)
        self._done += len(blocks)


class FixedCutter(object):
    """The chunker `fixed`.

    Raises:
        ValueError: the chunk size is not possible.
    """

    def __init__(self, chunk_size_bytes: int) -> None:
        if not 4 << 10 <= chunk_size_bytes <= 16 << 20 or chunk_size_bytes & (chunk_size_bytes - 1):
            raise ValueError("the chunk size must be a power of two from 4 KiB to 16 MiB")
        self._size = chunk_size_bytes
        self.shortest_hole_bytes = 1

    def begin(self, segment: memoryview) -> "FixedPass":
        """A pass over a segment that is still to be filled."""
        return FixedPass(self, segment)

    def cut(self, segment: memoryview) -> List[int]:
        """The lengths of the segment's parts in bytes, in order; a hole's length is negative."""
        parts = []  # type: List[int]
        for start in range(0, len(segment), self._size):
            chunk = segment[start : start + self._size]
            if not is_zero(chunk):
                parts.append(len(chunk))
            elif parts and parts[-1] < 0:
                parts[-1] -= len(chunk)
            else:
                parts.append(-len(chunk))
        return parts


class FixedPass(object):
    """Nothing can be done early."""

    def __init__(self, cutter: FixedCutter, segment: memoryview) -> None:
        self._cutter = cutter
        self._segment = segment

    def upto(self, end: int) -> None:
        """Says that the segment is filled up to `end` bytes."""

    def finish(self) -> List[int]:
        """The lengths of the segment's parts, all of which is filled."""
        return self._cutter.cut(self._segment)


def is_zero(data: memoryview) -> bool:
    """Whether there is nothing but zeros."""
    if any(data[:16]):
        return False
    for start in range(0, len(data), len(_ZEROS)):
        piece = bytes(data[start : start + len(_ZEROS)])
        if piece != (_ZEROS if len(piece) == len(_ZEROS) else bytes(len(piece))):
            return False
    return True


def _runs(zero: List[int], shortest: int) -> List[Tuple[int, int]]:
    """The runs among ascending numbers that are long enough, as (first, after the last)."""
    runs = []  # type: List[Tuple[int, int]]
    first = after = -1
    for number in [*zero, -1]:
        if number != after:
            if after - first >= shortest:
                runs.append((first, after))
            first = number
        after = number + 1
    return runs
