"""Small files that were read already, as sources."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["BytesSource"]


class BytesSource:
    """Some bytes as a `BlockSource`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size_bytes(self) -> int:
        """How many bytes they are."""
        return len(self._data)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`: one range."""
        if start < end:
            yield start, end - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`."""
        buffer[:] = self._data[offset : offset + buffer.nbytes]

    def close(self) -> None:
        """Nothing is held open."""
