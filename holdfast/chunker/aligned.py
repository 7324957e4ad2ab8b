"""The chunker `aligned` in numpy: content-defined cuts on 4 KiB block borders, holes for runs of zeros.

The definition is docs/chunking.md; its numbers and the selection of cuts are in `aligned_plain`, which
makes the same cuts without numpy. What is done here is the pass over the blocks: the sampled words are
gathered, so that most of a block's cache lines are never fetched, and weighed by one matrix product. Only
the few blocks whose value makes them candidates are tested for repetition, and only blocks with the
value zero are looked at in full.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.chunker import BLOCK_BYTES
from holdfast.chunker.aligned_plain import (
    REPETITION_BITS,
    REPETITION_STRIDE_BYTES,
    SAMPLE_OFFSETS,
    Limits,
    multipliers,
    select,
    threshold,
    to_bytes,
)
from holdfast.errors import UsageError

__all__ = ["AlignedChunker"]

_COLUMNS: Final = np.array([offset // 4 for offset in SAMPLE_OFFSETS])
_SLAB_BLOCKS: Final = 512

_Words = npt.NDArray[np.uint32]
_Values = npt.NDArray[np.uint64]
_Numbers = npt.NDArray[np.intp]


class AlignedChunker:
    """Cuts after blocks whose sampled words weigh enough; runs of zero blocks are holes.

    Args:
        chunk_size_bytes: a power of two from 16 KiB to 4 MiB.
        seed: 32 bytes from which the weights are derived.

    Raises:
        UsageError: the size is not possible.
    """

    name: Final = "aligned"

    def __init__(self, chunk_size_bytes: int, seed: bytes) -> None:
        try:
            self.limits: Final = Limits(chunk_size_bytes)
        except ValueError:
            raise UsageError(
                f"chunk size of {chunk_size_bytes} bytes is not possible for the chunker 'aligned'",
                hint="choose a power of two from 16KiB to 4MiB",
            ) from None
        self.chunk_size_bytes: Final = chunk_size_bytes
        self.lookahead_bytes: Final = self.limits.shortest_hole * BLOCK_BYTES
        self._weights: Final = np.array(multipliers(seed), np.uint64)
        self._threshold: Final = np.uint64(threshold(self.limits.bits))
        self._threshold_if_repetitive: Final = np.uint64(threshold(self.limits.bits + REPETITION_BITS))

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts; see `Chunker.cut`.

        Cost: fetches 11 of the 64 cache lines of most blocks; temporary memory of 1 % of the segment.
        """
        size = len(segment)
        whole = size - size % BLOCK_BYTES
        candidates, zero = self._scan(segment[:whole], 0)
        total = whole // BLOCK_BYTES
        if whole < size:  # a partial block counts as if zeros filled it up
            padded = memoryview(bytes(segment[whole:]).ljust(BLOCK_BYTES, b"\0"))
            more_candidates, more_zero = self._scan(padded, total)
            candidates += more_candidates
            zero += more_zero
            total += 1
        return to_bytes(select(total, candidates, self._holes(zero), self.limits), size)

    def _scan(self, blocks: memoryview, number: int) -> tuple[list[int], list[int]]:
        """Candidates (numbers of blocks before the cut) and numbers of the zero blocks."""
        words = np.frombuffer(blocks, dtype="<u4").reshape(-1, BLOCK_BYTES // 4)
        values = np.empty(len(words), np.uint64)
        for first in range(0, len(words), _SLAB_BLOCKS):  # numpy copies a slab that is not at an even address
            sampled = words[first : first + _SLAB_BLOCKS].take(_COLUMNS, axis=1)
            np.matmul(sampled.astype(np.uint64), self._weights, out=values[first : first + _SLAB_BLOCKS])

        candidates = np.flatnonzero(values >= self._threshold)
        doubtful = candidates[values[candidates] < self._threshold_if_repetitive]
        refused = np.zeros(len(words), np.bool_)
        refused[doubtful] = _are_repetitive(words, doubtful)
        candidates = candidates[~refused[candidates]]
        zero = _zero_blocks(blocks, np.flatnonzero(values == 0))
        return (candidates + (number + 1)).tolist(), (zero + number).tolist()

    def _holes(self, zero: list[int]) -> list[tuple[int, int]]:
        """The runs among the numbers of zero blocks that are long enough, as (first, after the last)."""
        numbers = np.array(zero, np.intp)
        return [
            (int(numbers[first]), int(numbers[last]) + 1)
            for first, last in _runs(numbers)
            if last - first + 1 >= self.limits.shortest_hole
        ]


def _are_repetitive(words: _Words, rows: _Numbers) -> npt.NDArray[np.bool_]:
    """For each of the rows, whether two of the words that are compared are equal."""
    compared = words[rows, :: REPETITION_STRIDE_BYTES // 4]
    compared.sort(axis=1)
    return np.asarray((compared[:, 1:] == compared[:, :-1]).any(axis=1))


def _runs(numbers: _Numbers) -> list[tuple[int, int]]:
    """The runs of consecutive numbers, as the places of their first and last members."""
    if not len(numbers):
        return []
    lasts = np.flatnonzero(np.diff(numbers) != 1).tolist()
    return list(zip([0, *(last + 1 for last in lasts)], [*lasts, len(numbers) - 1], strict=True))


def _zero_blocks(blocks: memoryview, suspects: _Numbers) -> _Numbers:
    """Those of the suspected blocks that hold nothing but zeros. A run of them is looked at in one go."""
    words = np.frombuffer(blocks, dtype="<u8").reshape(-1, BLOCK_BYTES // 8)
    is_zero = np.zeros(len(suspects), np.bool_)
    for first, last in _runs(suspects):
        run = words[suspects[first] : suspects[last] + 1]
        is_zero[first : last + 1] = np.bitwise_or.reduce(run, axis=1) == 0
    return suspects[is_zero]
