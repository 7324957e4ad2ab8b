"""Cutting a segment into chunks. Pure: bytes in, cut lengths out; no I/O, clock, randomness, threads.

A chunker sees one whole segment at a time (FORMAT.md, "Segments") and names its parts in order.
The cuts depend on nothing but the bytes of the segment and the chunker's parameters, so segments
are chunked in parallel and re-chunked alone. Cut points are part of the repository format: they
are frozen by test vectors, and a change of them is a new chunker name.

Every chunker forgets everything at a cut: what follows a cut depends on the bytes after it alone.
And a cut is settled by the bytes before it and at most `lookahead_bytes` after it. These two rules
are what makes `splice` possible: re-chunking a changed area without reading the whole segment.

Importing this package is cheap: numpy and the libraries behind the chunkers come with the first
`make_chunker` that needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from holdfast.errors import UnsupportedFormat

__all__ = [
    "BLOCK_BYTES",
    "CHUNKER_NAMES",
    "DEFAULT_CHUNKER_PARAMS",
    "PUBLISHED_SEED",
    "SEED_BYTES",
    "Chunker",
    "ChunkerParams",
    "make_chunker",
]

BLOCK_BYTES: Final = 4096
"""The unit of `aligned` cuts and of holes."""

SEED_BYTES: Final = 32
"""The length of a chunker's seed."""

PUBLISHED_SEED: Final = b"Holdfast aligned chunker, seed 1"
"""The seed of repositories that are not encrypted: 32 bytes of plain text, so that nobody need wonder."""


class Chunker(Protocol):
    """Cuts segments. Stateless: one instance may be used by any number of threads at once."""

    @property
    def name(self) -> str:
        """The name that the repository's configuration records."""
        ...

    @property
    def lookahead_bytes(self) -> int:
        """How far beyond a cut the bytes reach that can decide whether the cut is made.

        A cut at offset c of a segment is the same in every segment that agrees with this one in
        the bytes before c + `lookahead_bytes`. See `holdfast.chunker.splice`.
        """
        ...

    def cut(self, segment: memoryview) -> list[int]:
        """The lengths of the segment's parts, in order, in bytes; a hole's length is negative.

        The absolute values sum to `len(segment)`. A hole covers only zero bytes; two holes are never
        neighbours. An empty segment has no parts.

        Args:
            segment: contiguous bytes (format "B") of any length, at any address.

        Cost: one pass; temporary memory under a tenth of the segment. The interpreter lock is released
        for the pass over the bytes, so threads cut segments side by side (not so in `fastcdc`).
        """
        ...


@dataclass(frozen=True, slots=True)
class ChunkerParams:
    """What a repository's configuration records of its chunker; with the seed it fixes every cut.

    Args:
        name: one of `CHUNKER_NAMES`.
        chunk_size_bytes: the size that is aimed at: the average for content-defined chunkers.
    """

    name: str
    chunk_size_bytes: int


CHUNKER_NAMES: Final = ("aligned", "fixed", "fastcdc")

DEFAULT_CHUNKER_PARAMS: Final = ChunkerParams(name="aligned", chunk_size_bytes=64 << 10)


def make_chunker(params: ChunkerParams, seed: bytes = PUBLISHED_SEED) -> Chunker:
    """The chunker that a repository's configuration names.

    Args:
        params: name and chunk size.
        seed: 32 bytes: a secret of the repository when it is encrypted, else `PUBLISHED_SEED`.

    Raises:
        UnsupportedFormat: the name is not known to this version, or its library is not installed.
        UsageError: the chunk size is not possible for that chunker.
    """
    assert len(seed) == SEED_BYTES, "a chunker's seed has 32 bytes"
    if params.name == "aligned":
        from holdfast.chunker.aligned import AlignedChunker

        return AlignedChunker(params.chunk_size_bytes, seed)
    if params.name == "fixed":
        from holdfast.chunker.fixed import FixedChunker

        return FixedChunker(params.chunk_size_bytes)
    if params.name == "fastcdc":
        from holdfast.chunker.fastcdc import FastCdcChunker

        return FastCdcChunker(params.chunk_size_bytes, seed)
    raise UnsupportedFormat(
        f"unknown chunker {params.name!r}",
        hint=f"this version of Holdfast knows {', '.join(CHUNKER_NAMES)}; a newer one may be needed",
    )
