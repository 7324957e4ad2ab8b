"""Files that answer "these bytes from there", as sources: what a host holds is read like what is here.

A reader over a network (SSH, HTTPS) has one verb. `ReaderSource` makes a `BlockSource` of it, so that the readers
of VMDK formats do not know where their files are. Answers come from strangers: one that is shorter or longer
than was asked for is refused, and no request is larger than `MAX_READ_BYTES`.

Deliberately no cache: grain tables are kept by those who read them, data is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from holdfast.errors import SourceChanged, SourceFormat
from holdfast.esxi.names import printable
from holdfast.units import MIB

__all__ = ["MAX_READ_BYTES", "RangeReader", "ReaderSource"]

MAX_READ_BYTES: Final = 4 * MIB


class RangeReader(Protocol):
    """A file that can be read at any place. Thread-safe."""

    @property
    def size_bytes(self) -> int:
        """Its length when it was opened."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Returns the `length` bytes at `offset`; fewer only where the file has ended.

        Raises:
            SourceError: it can not be read.
        """
        ...

    def close(self) -> None:
        """Lets go of the file. May be called twice."""
        ...


class ReaderSource:
    """The bytes of a `RangeReader`; a `BlockSource` that knows nothing of holes.

    Args:
        reader: closed by `close`.
        where: the file's name, for messages.
    """

    def __init__(self, reader: RangeReader, where: str) -> None:
        self._reader = reader
        self._where = printable(where)
        self._size_bytes = reader.size_bytes

    @property
    def size_bytes(self) -> int:
        """The file's length when it was opened."""
        return self._size_bytes

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`: one range."""
        if start < end:
            yield start, end - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`.

        Raises:
            SourceChanged: the file ends before `offset + len(buffer)`.
            SourceFormat: the reader answers with more than was asked for.
        """
        done = 0
        while done < buffer.nbytes:
            wanted = min(buffer.nbytes - done, MAX_READ_BYTES)
            data = self._reader.read(offset + done, wanted)
            if len(data) > wanted:
                raise SourceFormat(
                    f"{self._where}: {len(data)} bytes were sent where {wanted} were asked for"
                )
            if not data:
                raise SourceChanged(
                    f"{self._where} became shorter while it was read: it now ends at byte {offset + done}, "
                    f"not {self._size_bytes}",
                    hint="back up a snapshot, or when nothing writes to it",
                )
            buffer[done : done + len(data)] = data
            done += len(data)

    def close(self) -> None:
        """Closes the reader. May be called twice."""
        self._reader.close()
