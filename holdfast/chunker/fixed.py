"""Chunks of one fixed size, counted from the start of the segment; all-zero chunks are holes.

For sources that report changes in that same granularity. Content that moves is not found again; in
exchange a change touches exactly the chunks that it falls into.
"""

from __future__ import annotations

from typing import Final

from holdfast.errors import UsageError

__all__ = ["FixedChunker", "is_zero"]

MIN_CHUNK_SIZE_BYTES: Final = 4 << 10
MAX_CHUNK_SIZE_BYTES: Final = 16 << 20

_PROBE_BYTES: Final = 16


class FixedChunker:
    """Cuts every `chunk_size_bytes`; the last chunk of a segment may be shorter.

    A chunk of zeros only is a hole, and neighbouring holes are one hole.

    Args:
        chunk_size_bytes: a power of two from 4 KiB to 16 MiB.

    Raises:
        UsageError: the size is not one of these.
    """

    name: Final = "fixed"

    def __init__(self, chunk_size_bytes: int) -> None:
        in_range = MIN_CHUNK_SIZE_BYTES <= chunk_size_bytes <= MAX_CHUNK_SIZE_BYTES
        if not in_range or chunk_size_bytes & (chunk_size_bytes - 1):
            raise UsageError(
                f"chunk size of {chunk_size_bytes} bytes is not possible for the chunker 'fixed'",
                hint="choose a power of two from 4KiB to 16MiB",
            )
        self.chunk_size_bytes: Final = chunk_size_bytes
        self.lookahead_bytes: Final = chunk_size_bytes

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts; see `Chunker.cut`.

        Cost: data is probed at the head of each chunk; only what looks like a hole is read.
        """
        parts: list[int] = []
        hole = 0
        for start in range(0, len(segment), self.chunk_size_bytes):
            chunk = segment[start : start + self.chunk_size_bytes]
            if is_zero(chunk):
                hole += len(chunk)
                continue
            if hole:
                parts.append(-hole)
                hole = 0
            parts.append(len(chunk))
        if hole:
            parts.append(-hole)
        return parts


def is_zero(chunk: memoryview) -> bool:
    """Whether the chunk holds nothing but zeros."""
    if any(chunk[:_PROBE_BYTES]):
        return False
    import numpy as np

    # The maximum of bytes is a vectorised pass at memory speed, without a copy and without the interpreter lock.
    return not np.frombuffer(chunk, np.uint8).max()
