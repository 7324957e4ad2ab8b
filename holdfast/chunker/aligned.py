"""The chunker `aligned` in numpy: content-defined cuts on 4 KiB block borders, holes for runs of zeros.

The definition is docs/chunking.md; parameters and selection are shared with `aligned_plain`, which makes
the same cuts without numpy. What is done here is the pass over the blocks: one strided column
per sampled word, so that most of a block's cache lines are never fetched, and a full look only at blocks
whose samples are all zero.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.chunker import BLOCK_BYTES
from holdfast.chunker.aligned_plain import SAMPLE_OFFSETS, Limits, multipliers, select, to_bytes
from holdfast.errors import UsageError

__all__ = ["AlignedChunker"]

_COLUMNS: Final = tuple(offset // 4 for offset in SAMPLE_OFFSETS)


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
        self._weights: Final = tuple(np.uint64(weight) for weight in multipliers(seed))
        self._early_threshold: Final = np.uint64(self.limits.early_threshold)
        self._late_threshold: Final = np.uint64(self.limits.late_threshold)

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts; see `Chunker.cut`.

        Cost: reads 11 of a block's 64 cache lines; temporary memory of 1 % of the segment.
        """
        size = len(segment)
        whole = size // BLOCK_BYTES * BLOCK_BYTES
        values, zero = self._scan(segment[:whole])
        if whole < size:
            tail_values, tail_zero = self._scan(memoryview(bytes(segment[whole:]).ljust(BLOCK_BYTES, b"\0")))
            values = np.concatenate((values, tail_values))
            zero = np.concatenate((zero, tail_zero + np.int64(whole // BLOCK_BYTES)))
        late = np.flatnonzero(values >= self._late_threshold)
        early = late[values[late] >= self._early_threshold]
        parts = select(len(values), (early + 1).tolist(), (late + 1).tolist(), self._holes(zero), self.limits)
        return to_bytes(parts, size)

    def _scan(self, segment: memoryview) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """The value of every block, and the numbers of the blocks that are zero."""
        words = np.frombuffer(segment, dtype="<u4").reshape(-1, BLOCK_BYTES // 4)
        values = np.zeros(len(words), np.uint64)
        product = np.empty(len(words), np.uint64)
        for column, weight in zip(_COLUMNS, self._weights, strict=True):
            np.multiply(words[:, column], weight, out=product)
            values += product
        suspects = np.flatnonzero(values == 0)
        if not len(suspects):
            return values, suspects
        # One look at each run of suspects, not at each of them: a segment of zeros is one run.
        long_words = np.frombuffer(segment, dtype="<u8").reshape(-1, BLOCK_BYTES // 8)
        breaks = (np.flatnonzero(np.diff(suspects) != 1) + 1).tolist()
        is_zero = [
            np.bitwise_or.reduce(long_words[suspects[first] : suspects[end - 1] + 1], axis=1) == 0
            for first, end in zip([0, *breaks], [*breaks, len(suspects)], strict=True)
        ]
        return values, suspects[np.concatenate(is_zero)]

    def _holes(self, zero: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """The runs of zero blocks that are long enough to be holes, as (first, end)."""
        if not len(zero):
            return []
        breaks = np.flatnonzero(np.diff(zero) != 1)
        firsts = zero[np.append(0, breaks + 1)]
        ends = zero[np.append(breaks, len(zero) - 1)] + 1
        long_enough = ends - firsts >= self.limits.shortest_hole
        return list(zip(firsts[long_enough].tolist(), ends[long_enough].tolist(), strict=True))
