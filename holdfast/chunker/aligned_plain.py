# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
# ruff: noqa: UP004, UP006, UP007, UP031, UP035, RUF005
"""The chunker `aligned` in plain Python, and the numbers of its definition.

This file runs alone on Python 3.5 or later with nothing but the standard library: its text is sent to
hypervisor hosts, which have no numpy. `holdfast.chunker.aligned` makes the same cuts much faster; it
takes the numbers and the selection from here and differs in how it looks at blocks. The definition in words,
and what led to it, is docs/chunking.md. The cuts are frozen.

In short: 16 words of each 4 KiB block are weighed with secret multipliers into one 64-bit value. Between
a minimum and a maximum length, a chunk ends after a block whose value has its uppermost bits set: few
bits, or three more if the block looks repetitive. Repetitive blocks compress to little and are not worth many
chunks; the chunks are spent where bytes are dear. A chunk also ends where a run of zero blocks
begins that is long enough to be a hole. What follows a cut depends on nothing before it.
"""

import hashlib
import struct
from bisect import bisect_left
from operator import mul
from typing import Any, Iterable, List, Tuple, Union

BLOCK_BYTES = 4096
MIN_CHUNK_SIZE_BYTES = 16 << 10
MAX_CHUNK_SIZE_BYTES = 4 << 20

# Byte offsets of the 32-bit words that are looked at. Dense at the head, because a block that is filled
# in part (the end of a file) is filled from there; then once in 512 bytes.
SAMPLE_OFFSETS = (0, 4, 12, 24, 40, 60, 124, 188, 316, 572, 1080, 1592, 2104, 2616, 3128, 3640)

# A block is repetitive if two of its 32-bit words at multiples of this many bytes are equal.
REPETITION_STRIDE_BYTES = 64

# So many more bits must be set in the value of a repetitive block.
REPETITION_BITS = 3

_VALUE_MASK = (1 << 64) - 1
_ZERO_BLOCK = bytes(BLOCK_BYTES)


def multipliers(seed: bytes) -> List[int]:
    """The odd 64-bit weights of the sampled words: SHA-256 of the seed and a counter, four at a time."""
    stream = b"".join(
        hashlib.sha256(seed + struct.pack("<I", counter)).digest()
        for counter in range((len(SAMPLE_OFFSETS) + 3) // 4)
    )
    return [word | 1 for word in struct.unpack("<%dQ" % len(SAMPLE_OFFSETS), stream)]


def threshold(bits: int) -> int:
    """The smallest 64-bit value whose `bits` uppermost bits are all set."""
    return (1 << 64) - (1 << (64 - bits))


class Limits(object):
    """The numbers that follow from a chunk size; lengths are in blocks.

    Raises:
        ValueError: the size is not a power of two from 16 KiB to 4 MiB.
    """

    def __init__(self, chunk_size_bytes: int) -> None:
        in_range = MIN_CHUNK_SIZE_BYTES <= chunk_size_bytes <= MAX_CHUNK_SIZE_BYTES
        if not in_range or chunk_size_bytes & (chunk_size_bytes - 1):
            raise ValueError("the chunk size must be a power of two from 16 KiB to 4 MiB")
        blocks = chunk_size_bytes // BLOCK_BYTES
        self.minimum = (blocks * 3 + 7) // 8
        self.maximum = blocks * 8
        self.shortest_hole = blocks // 4
        self.bits = max(1, blocks.bit_length() - 3)  # log2 - 2: one block in blocks / 4


def select(total: int, candidates: List[int], holes: List[Tuple[int, int]], limits: Limits) -> List[int]:
    """The parts in blocks, holes negative, from the places where a chunk may end.

    Args:
        total: number of blocks.
        candidates: numbers of blocks before the places, ascending.
        holes: the runs of zero blocks that are holes, as (first block, first block after it), ascending.
        limits: the chunk size's numbers.
    """
    parts = []  # type: List[int]
    candidates = candidates + [total + limits.maximum]  # beyond reach: there is always a next one
    i = start = 0
    for hole, after in holes + [(total, total)]:
        while start < hole:
            i = bisect_left(candidates, start + limits.minimum, i)
            end = min(candidates[i], start + limits.maximum, hole)
            parts.append(end - start)
            start = end
        if after > hole:
            parts.append(hole - after)
            start = after
    return parts


def to_bytes(parts: List[int], size_bytes: int) -> List[int]:
    """Parts in blocks as parts in bytes: the last block ends where the data does."""
    lengths = [part * BLOCK_BYTES for part in parts]
    missing = -size_bytes % BLOCK_BYTES
    if missing:
        lengths[-1] += missing if lengths[-1] < 0 else -missing
    return lengths


def words_struct(offsets: Iterable[int]) -> struct.Struct:
    """A structure as long as a block that yields the 32-bit words at the offsets and skips the rest."""
    layout = "<"
    place = 0
    for offset in offsets:
        layout += "%dxI" % (offset - place)
        place = offset + 4
    return struct.Struct(layout + "%dx" % (BLOCK_BYTES - place))


def _all_differ(words: Tuple[Any, ...]) -> bool:
    """Whether no two of the words are equal."""
    return len(set(words)) == len(words)


class PlainAlignedChunker(object):
    """The chunker `aligned` without numpy; the same cuts as `AlignedChunker`.

    Args:
        chunk_size_bytes: a power of two from 16 KiB to 4 MiB.
        seed: 32 bytes.

    Raises:
        ValueError: the size is not possible.
    """

    name = "aligned"

    def __init__(self, chunk_size_bytes: int, seed: bytes) -> None:
        self.limits = Limits(chunk_size_bytes)
        self.lookahead_bytes = self.limits.shortest_hole * BLOCK_BYTES
        self._multipliers = multipliers(seed)
        self._samples = words_struct(SAMPLE_OFFSETS)
        self._repetition = words_struct(range(0, BLOCK_BYTES, REPETITION_STRIDE_BYTES))

    def cut(self, segment: Union[bytes, bytearray, memoryview]) -> List[int]:
        """The lengths of the segment's parts in bytes, in order; a hole's length is negative."""
        view = memoryview(segment)
        size = len(view)
        whole = size - size % BLOCK_BYTES
        candidates, zero = self._scan(view[:whole], 0)
        total = whole // BLOCK_BYTES
        if whole < size:  # a partial block counts as if zeros filled it up
            padding = bytes(BLOCK_BYTES - (size - whole))
            more_candidates, more_zero = self._scan(memoryview(bytes(view[whole:]) + padding), total)
            candidates += more_candidates
            zero += more_zero
            total += 1
        return to_bytes(select(total, candidates, self._holes(zero), self.limits), size)

    def _scan(self, blocks: memoryview, number: int) -> Tuple[List[int], List[int]]:
        """Candidates (numbers of blocks before the cut) and numbers of the zero blocks.

        Args:
            blocks: whole blocks.
            number: the number of the first of them.
        """
        weights = self._multipliers
        candidate_from = threshold(self.limits.bits)
        candidate_if_repetitive_from = threshold(self.limits.bits + REPETITION_BITS)
        repetition_words = self._repetition.unpack_from
        candidates = []  # type: List[int]
        zero = []  # type: List[int]
        place = 0
        for words in self._samples.iter_unpack(blocks):
            value = sum(map(mul, words, weights)) & _VALUE_MASK
            if value >= candidate_from:
                if value >= candidate_if_repetitive_from or _all_differ(repetition_words(blocks, place)):
                    candidates.append(number + 1)
            elif value == 0 and bytes(blocks[place : place + BLOCK_BYTES]) == _ZERO_BLOCK:
                zero.append(number)
            number += 1
            place += BLOCK_BYTES
        return candidates, zero

    def _holes(self, zero: List[int]) -> List[Tuple[int, int]]:
        """The runs among the numbers of zero blocks that are long enough, as (first, after the last)."""
        holes = []  # type: List[Tuple[int, int]]
        first = after = -1
        for block in zero + [-1]:
            if block != after:
                if after - first >= self.limits.shortest_hole:
                    holes.append((first, after))
                first = block
            after = block + 1
        return holes
