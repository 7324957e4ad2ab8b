"""Redo logs: the part of a disk that was written since a snapshot, whatever the format.

    grain directory: place of each grain table -> grain table: place of each grain -> grain

A grain that has a place is in the log, one that is marked as zeros reads as zeros, all else is the parent's.
What differs between formats (`cowd.py`, `sesparse.py`, `hosted.py`) is how directory and tables are written; here
they have become numbers: a byte offset in the log's file, `ZEROS` or `FROM_PARENT`.

Memory is bounded at any size of disk: the directory stays (8 bytes per 2 to 32 MiB of disk), of the tables a few.

Invariants: every place is checked against the file's length before it is used; whatever the bytes say, an
answer is complete and in order, or a `SourceFormat`. Does not read data, and does not know the parent: see `chain.py`.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from holdfast.disk import BlockSource
from holdfast.errors import SourceFormat

__all__ = ["FROM_PARENT", "ZEROS", "Places", "RedoLog", "RedoShape", "Run", "bytes_of"]

ZEROS: Final = -1
FROM_PARENT: Final = -2

_TABLES_KEPT: Final = 64

Places = npt.NDArray[np.int64]
"""Byte offsets in the file of a redo log, or `ZEROS`, or `FROM_PARENT`."""


class Run(NamedTuple):
    """The bytes [start, end) of the disk lie from `place` on in the log's file, or are `ZEROS` or `FROM_PARENT`."""

    start: int
    end: int
    place: int


@dataclass(frozen=True, slots=True)
class RedoShape:
    """The measures of a redo log.

    Args:
        capacity_bytes: of the disk.
        lowest_place: no grain lies before this byte of the file, since that is where the log's own tables are.
    """

    capacity_bytes: int
    grain_bytes: int
    table_entries: int
    lowest_place: int

    @property
    def table_bytes(self) -> int:
        """How much of the disk one table describes."""
        return self.grain_bytes * self.table_entries

    @property
    def tables(self) -> int:
        """Number of tables that the disk needs."""
        return -(-self.capacity_bytes // self.table_bytes)


class RedoLog:
    """Where each byte of a disk is, as far as one redo log can say. Thread-safe.

    Args:
        file: the log's file; closed by `close`.
        where: the file's name, for messages.
        directory: byte offset of each grain table in the file, 0 where there is none.
        read_table: the places in the table with this number, at this byte offset.
    """

    def __init__(
        self,
        file: BlockSource,
        where: str,
        shape: RedoShape,
        directory: Places,
        read_table: Callable[[int, int], Places],
    ) -> None:
        assert len(directory) == shape.tables, "a directory has one entry per table"
        self.file: Final = file
        self.where: Final = where
        self._shape = shape
        self._directory = directory
        self._read_table = read_table
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, Places] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """The capacity of the disk."""
        return self._shape.capacity_bytes

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """Yields where the bytes [start, end) are, ascending and without a gap.

        Raises:
            SourceFormat: a table makes no sense.
            SourceError: the file can not be read.
        """
        if start >= end:
            return
        table_bytes = self._shape.table_bytes
        first, last = start // table_bytes, -(-end // table_bytes)
        position = start
        for index in np.flatnonzero(self._directory[first:last]).tolist():
            number = first + index
            low, high = max(number * table_bytes, start), min((number + 1) * table_bytes, end)
            if low > position:
                yield Run(position, low, FROM_PARENT)
            yield from self._runs_of_table(number, low, high)
            position = high
        if position < end:
            yield Run(position, end, FROM_PARENT)

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self.file.close()

    def _runs_of_table(self, number: int, start: int, end: int) -> Iterator[Run]:
        grain_bytes = self._shape.grain_bytes
        base = number * self._shape.table_bytes
        first, last = (start - base) // grain_bytes, -(-(end - base) // grain_bytes)
        places = self._table(number)[first:last]
        step = np.where(places[:-1] < 0, 0, grain_bytes)
        borders = [0, *(np.flatnonzero(places[1:] != places[:-1] + step) + 1).tolist(), last - first]
        for low, high in itertools.pairwise(borders):
            begin = max(base + (first + low) * grain_bytes, start)
            stop = min(base + (first + high) * grain_bytes, end)
            place = int(places[low])
            if place >= 0:
                place += begin - (base + (first + low) * grain_bytes)
            yield Run(begin, stop, place)

    def _table(self, number: int) -> Places:
        with self._lock:
            table = self._tables.get(number)
            if table is not None:
                self._tables.move_to_end(number)
                return table
        table = self._read_table(number, int(self._directory[number]))
        self._check(number, table)
        with self._lock:
            self._tables[number] = table
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return table

    def _check(self, number: int, table: Places) -> None:
        """Refuses a table with a grain that is not inside of the file. Entries past the capacity mean nothing.

        Raises:
            SourceFormat: there is one.
        """
        shape = self._shape
        starts = (
            number * shape.table_bytes + np.arange(shape.table_entries, dtype=np.int64) * shape.grain_bytes
        )
        table[starts >= shape.capacity_bytes] = FROM_PARENT
        needed = np.minimum(shape.grain_bytes, shape.capacity_bytes - starts)
        # Written so that no sum can leave the range of the type.
        outside = (table > self.file.size_bytes - needed) | (table < shape.lowest_place)
        wrong = np.flatnonzero((table >= 0) & outside)
        if wrong.size:
            entry = int(wrong[0])
            raise SourceFormat(
                f"{self.where}: the grain at byte {int(starts[entry])} of the disk is said to lie at byte "
                f"{int(table[entry])} of the file, which is not where its data is",
                hint="the file is truncated or damaged: copy it again from where it came",
            )


def bytes_of(file: BlockSource, where: str, what: str, offset: int, length: int) -> memoryview:
    """Returns `length` bytes of the file, writable.

    Raises:
        SourceFormat: they are not inside of the file.
        SourceError: they can not be read.
    """
    if offset < 0 or offset + length > file.size_bytes:
        raise SourceFormat(
            f"{where}: {what} is said to lie at byte {offset}, past the end of the file",
            hint="the file is truncated or damaged: copy it again from where it came",
        )
    data = memoryview(bytearray(length))
    file.read_into(offset, data)
    return data
