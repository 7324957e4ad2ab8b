"""The chunker `fastcdc`: byte-granular content-defined cuts by the library pyfastcdc.

For sources whose content moves by less than a block: archives, dumps, mail stores. For disks `aligned` finds
as much and scans several times faster.

The library is MIT licensed, typed, and comes with wheels; `pip install holdfast[fastcdc]`. Its cuts
are pinned by frozen vectors in the tests, so that a release that changed them would be noticed before it
reached a repository. It holds the interpreter lock while it scans.
"""

from __future__ import annotations

import hashlib
from typing import Final

from holdfast.chunker.fixed import is_zero
from holdfast.errors import UnsupportedFormat, UsageError

__all__ = ["FastCdcChunker"]

MIN_CHUNK_SIZE_BYTES: Final = 16 << 10
MAX_CHUNK_SIZE_BYTES: Final = 4 << 20

NORMALIZATION: Final = 2
"""Bits by which the mask is harder before the average size and easier after it."""


class FastCdcChunker:
    """Cuts by FastCDC (2020) between a quarter and four times the chunk size.

    A chunk of zeros only is a hole, and neighbouring holes are one hole.

    Args:
        chunk_size_bytes: a power of two from 16 KiB to 4 MiB.
        seed: 32 bytes; alters the gear table.

    Raises:
        UsageError: the size is not possible.
        UnsupportedFormat: the library is not installed.
    """

    name: Final = "fastcdc"

    def __init__(self, chunk_size_bytes: int, seed: bytes) -> None:
        in_range = MIN_CHUNK_SIZE_BYTES <= chunk_size_bytes <= MAX_CHUNK_SIZE_BYTES
        if not in_range or chunk_size_bytes & (chunk_size_bytes - 1):
            raise UsageError(
                f"chunk size of {chunk_size_bytes} bytes is not possible for the chunker 'fastcdc'",
                hint="choose a power of two from 16KiB to 4MiB",
            )
        try:
            from pyfastcdc import FastCDC  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise UnsupportedFormat(
                "the chunker 'fastcdc' needs the package pyfastcdc, which is not installed",
                hint="pip install 'holdfast[fastcdc]'",
            ) from None
        self.chunk_size_bytes: Final = chunk_size_bytes
        self.maximum_bytes: Final = chunk_size_bytes * 4
        self.lookahead_bytes: Final = self.maximum_bytes  # a hole ends where the next chunk is not zero
        self._library: Final = FastCDC
        # 63 bits: the library takes no more. Hashed, because the library XORs it into a public table.
        self._gear_seed: Final = int.from_bytes(hashlib.sha256(seed).digest()[:8], "little") >> 1

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts; see `Chunker.cut`, except that the interpreter lock is held."""
        # One library object per call: they may not be shared between threads, and cost 10 microseconds.
        library = self._library(
            self.chunk_size_bytes,
            min_size=self.chunk_size_bytes // 4,
            max_size=self.maximum_bytes,
            normalized_chunking=NORMALIZATION,
            seed=self._gear_seed,
        )
        parts: list[int] = []
        start = 0
        for length in [chunk.length for chunk in library.cut_buf(segment)]:
            if not is_zero(segment[start : start + length]):
                parts.append(length)
            elif parts and parts[-1] < 0:
                parts[-1] -= length
            else:
                parts.append(-length)
            start += length
        return parts
