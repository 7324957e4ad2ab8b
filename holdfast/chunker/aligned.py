"""Content-defined chunks whose cuts lie on 4 KiB block borders (provisional parameters)."""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from holdfast.errors import UsageError

__all__ = ["AlignedChunker"]

BLOCK_BYTES: Final = 4096


class AlignedChunker:
    """Cuts after blocks whose sampled words mix to a chosen value; runs of zero blocks are holes."""

    name: Final = "aligned"
    lookahead_bytes: Final = BLOCK_BYTES

    def __init__(self, chunk_size_bytes: int, seed: bytes) -> None:
        if not 16 << 10 <= chunk_size_bytes <= 4 << 20 or chunk_size_bytes & (chunk_size_bytes - 1):
            raise UsageError(
                f"chunk size of {chunk_size_bytes} bytes is not possible for the chunker 'aligned'",
                hint="choose a power of two from 16KiB to 4MiB",
            )
        average = chunk_size_bytes // BLOCK_BYTES
        self._minimum = max(1, average // 2)
        self._maximum = average * 4
        self._mask = np.uint64(average - 1)
        stream = b"".join(hashlib.sha256(seed + bytes([i])).digest() for i in range(4))
        self._weights = np.frombuffer(stream, "<u8") | np.uint64(1)
        self._words = np.array([(i * 256 + ((i * 37) % 32) * 8) // 8 for i in range(16)])

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts; see `Chunker.cut`."""
        size = len(segment)
        padded = bytes(segment) + bytes(-size % BLOCK_BYTES)
        blocks = np.frombuffer(padded, dtype="<u8").reshape(-1, 512)
        mixed = blocks[:, self._words] * self._weights
        mixed ^= mixed >> np.uint64(29)
        values = mixed.sum(axis=1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        candidate = np.asarray((values >> np.uint64(40)) & self._mask == 0).tolist()
        zero = np.asarray(~blocks.any(axis=1)).tolist()
        parts: list[int] = []
        start = 0
        total = len(candidate)
        while start < total:
            end = start + 1
            if zero[start]:
                while end < total and zero[end]:
                    end += 1
                parts.append(-(end - start) * BLOCK_BYTES)
            else:
                while end < total and not zero[end] and end - start < self._maximum:
                    if end - start >= self._minimum and candidate[end - 1]:
                        break
                    end += 1
                parts.append((end - start) * BLOCK_BYTES)
            start = end
        if parts and size % BLOCK_BYTES:
            shrink = BLOCK_BYTES - size % BLOCK_BYTES
            parts[-1] += shrink if parts[-1] < 0 else -shrink
        return parts
