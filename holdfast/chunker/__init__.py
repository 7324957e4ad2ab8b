"""Cutting a segment into chunks. Pure: bytes in, cut lengths out; no I/O, clock, randomness, threads.

A chunker sees one whole segment at a time (FORMAT.md, "Segments") and names its parts in order.
The cuts depend on nothing but the bytes of the segment and the chunker's parameters, so segments
are chunked in parallel and re-chunked alone. Cut points are part of the repository format: they
are frozen by test vectors, and a change of them is a new chunker name.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["BLOCK_BYTES", "Chunker"]

BLOCK_BYTES = 4096
"""The unit of `aligned` cuts and of holes."""


class Chunker(Protocol):
    """Cuts segments."""

    @property
    def name(self) -> str:
        """The name that the repository's configuration records."""
        ...

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts, in order, in bytes; a hole's length is negative.

        The absolute values sum to `len(segment)`. A hole covers only zero bytes; two holes are never
        neighbours. An empty segment has no parts.
        """
        ...
