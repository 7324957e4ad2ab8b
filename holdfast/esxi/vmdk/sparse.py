"""Hosted sparse extents (magic `KDMV`): monolithic, split, and streamOptimized with compressed grains.

    header, 512 bytes -> grain directory: u32 sector of each grain table
                      -> grain table: u32 sector of each grain (0: not allocated, 1: zeros)
                      -> grain, 64 KiB as a rule; in streamOptimized a marker and a zlib stream

Memory is bounded at any size of disk: the directory (4 bytes per 32 MiB as a rule) stays in memory,
tables are read when needed and a few are kept.

Invariants: every offset is checked against the file's length before it is used; a grain never
inflates to more than its size; whatever the bytes say, reading ends with data or a `SourceFormat`.

Not done here: writing, redo logs of ESXi (COWD, SESparse), looking up a parent.

Source: VMware, "Virtual Disk Format 5.0", "Hosted Sparse Extents" and "Stream-Optimized
Compressed Sparse Extents".
"""

from __future__ import annotations

import itertools
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.disk import SECTOR_BYTES, BlockSource
from holdfast.errors import SourceFormat, SourceUnsupported
from holdfast.esxi.vmdk.descriptor import MAX_DESCRIPTOR_BYTES, MAX_SECTORS
from holdfast.units import MIB, TIB

__all__ = ["SPARSE_MAGIC", "SparseExtent", "SparseHeader", "parse_header"]

SPARSE_MAGIC: Final = b"KDMV"

_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
_MARKER: Final = struct.Struct("<QI")
_NEWLINES: Final = b"\n \r\n"
_GD_AT_END: Final = 0xFFFFFFFFFFFFFFFF

_FLAG_NEWLINES: Final = 1 << 0
_FLAG_ZERO_GRAINS: Final = 1 << 2
_FLAG_COMPRESSED: Final = 1 << 16
_FLAG_MARKERS: Final = 1 << 17
_DEFLATE: Final = 1

_MAX_GRAIN_SECTORS: Final = 16 * MIB // SECTOR_BYTES
_MAX_TABLE_ENTRIES: Final = 4096
_MAX_TABLES: Final = 1 << 22  # 16 MiB of directory
_TABLES_KEPT: Final = 64

_U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class SparseHeader:
    """The fields of a sparse header that matter; offsets and sizes in sectors."""

    capacity: int
    grain: int
    descriptor_at: int
    descriptor_length: int
    table_entries: int
    directory_at: int
    zero_grains: bool
    compressed: bool
    markers: bool

    @property
    def tables(self) -> int:
        """Number of entries of the grain directory."""
        return -(-self.capacity // (self.grain * self.table_entries))


def parse_header(data: bytes, where: str) -> SparseHeader:
    """The header in the first 512 bytes of an extent (or in its footer).

    Raises:
        SourceFormat: a field has a value that makes no sense.
        SourceUnsupported: the version is unknown.
    """
    if len(data) < SECTOR_BYTES:
        raise SourceFormat(f"{where}: the file ends within the sparse header")
    fields = _HEADER.unpack_from(data)
    magic, version, flags, capacity, grain, descriptor_at, descriptor_length, table_entries = fields[:8]
    directory_at, newlines, algorithm = fields[9], fields[12], fields[13]
    if magic != SPARSE_MAGIC:
        raise SourceFormat(f"{where}: there is no sparse header where one belongs")
    if version not in (1, 2, 3):
        raise SourceUnsupported(f"{where}: sparse extents of version {version} are not supported")
    if flags & _FLAG_NEWLINES and newlines != _NEWLINES:
        raise SourceFormat(
            f"{where}: line ends were converted within the file, so its data is damaged",
            hint="it was probably copied by FTP in text mode: copy it again as binary",
        )
    if not 0 < capacity <= MAX_SECTORS:
        raise _nonsense(where, "capacity", f"{capacity} sectors, which is not between 1 and 64 TiB")
    if not 0 < grain <= _MAX_GRAIN_SECTORS or grain & (grain - 1):
        raise _nonsense(where, "grainSize", f"{grain} sectors, which is no power of two up to 16 MiB")
    if not 0 < table_entries <= _MAX_TABLE_ENTRIES:
        raise _nonsense(where, "numGTEsPerGT", f"{table_entries}, which is not between 1 and 4096")
    if flags & _FLAG_COMPRESSED and algorithm != _DEFLATE:
        raise _nonsense(where, "compressAlgorithm", f"{algorithm}, which is unknown")
    if descriptor_at and descriptor_length * SECTOR_BYTES > MAX_DESCRIPTOR_BYTES:
        raise _nonsense(where, "descriptorSize", f"{descriptor_length} sectors, which is too much")
    header = SparseHeader(
        capacity=capacity,
        grain=grain,
        descriptor_at=descriptor_at,
        descriptor_length=descriptor_length,
        table_entries=table_entries,
        directory_at=directory_at,
        zero_grains=bool(flags & _FLAG_ZERO_GRAINS),
        compressed=bool(flags & _FLAG_COMPRESSED),
        markers=bool(flags & _FLAG_MARKERS),
    )
    if header.tables > _MAX_TABLES:
        raise _nonsense(
            where, "capacity", f"{capacity} sectors, which needs too many tables of that grain size"
        )
    return header


class SparseExtent:
    """A hosted sparse extent; a `BlockSource`.

    Args:
        file: the extent's file; closed by `close`.
        where: the file's name, for messages.

    Raises:
        SourceFormat: header or directory make no sense, or lie outside of the file.
        SourceUnsupported: the version is unknown.
    """

    def __init__(self, file: BlockSource, where: str) -> None:
        self._file = file
        self._where = where
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, _U32] = OrderedDict()
        self._inflated: tuple[int, bytes] = (-1, b"")
        first = parse_header(self._bytes(0, min(SECTOR_BYTES, file.size_bytes), "the header"), where)
        self._descriptor_place = (first.descriptor_at, first.descriptor_length)
        self._header = self._footer(first) if first.directory_at == _GD_AT_END else first
        header = self._header
        if header.directory_at == 0:
            raise _nonsense(where, "gdOffset", "0, so that there is no grain directory")
        self._directory = self._entries(header.directory_at, header.tables, "the grain directory")
        self._grain_bytes = header.grain * SECTOR_BYTES
        self._first_grain_entry = 2 if header.zero_grains else 1

    @property
    def size_bytes(self) -> int:
        """The extent's capacity."""
        return self._header.capacity * SECTOR_BYTES

    def descriptor_bytes(self) -> bytes:
        """The embedded descriptor, up to its padding; empty if there is none (a part of a split disk).

        Raises:
            SourceFormat: it lies outside of the file.
        """
        at, length = self._descriptor_place
        if at == 0 or length == 0:
            return b""
        return self._bytes(at * SECTOR_BYTES, length * SECTOR_BYTES, "the descriptor").partition(b"\0")[0]

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`: the allocated grains, adjacent ones as one range."""
        table_bytes = self._grain_bytes * self._header.table_entries
        first, last = start // table_bytes, -(-end // table_bytes)
        begin, stop = -1, -1
        for index in np.flatnonzero(self._directory[first:last]).tolist():
            number = first + index
            allocated = np.zeros(self._header.table_entries + 2, np.int8)
            allocated[1:-1] = self._table(number) >= self._first_grain_entry
            edges = np.flatnonzero(np.diff(allocated)).reshape(-1, 2) * self._grain_bytes
            for low, high in (edges + number * table_bytes).tolist():
                if low == stop:
                    stop = high
                    continue
                if max(begin, start) < min(stop, end):
                    yield max(begin, start), min(stop, end) - max(begin, start)
                begin, stop = low, high
        if max(begin, start) < min(stop, end):
            yield max(begin, start), min(stop, end) - max(begin, start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`.

        Raises:
            SourceFormat: a table or grain lies outside of the file, or a grain does not inflate.
        """
        table_bytes = self._grain_bytes * self._header.table_entries
        done = 0
        while done < buffer.nbytes:
            number, inside = divmod(offset + done, table_bytes)
            count = min(buffer.nbytes - done, table_bytes - inside)
            part = buffer[done : done + count]
            if self._directory[number] == 0:
                _clear(part)
            else:
                self._read_of_table(number, inside, part)
            done += count

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()

    def _read_of_table(self, number: int, inside: int, buffer: memoryview) -> None:
        """Reads what lies `inside` bytes into the area of one table, runs of adjacent grains at once."""
        header, grain_bytes = self._header, self._grain_bytes
        first, last = inside // grain_bytes, (inside + buffer.nbytes - 1) // grain_bytes + 1
        sectors = self._table(number)[first:last].astype(np.int64)
        step = 0 if header.compressed else header.grain
        hole = sectors < self._first_grain_entry
        same = np.where(hole[1:], hole[:-1], ~hole[:-1] & (sectors[1:] == sectors[:-1] + step))
        if header.compressed:
            same &= hole[1:]
        borders = [0, *(np.flatnonzero(~same) + 1).tolist(), last - first]
        for low, high in itertools.pairwise(borders):
            begin = max((first + low) * grain_bytes, inside)
            end = min((first + high) * grain_bytes, inside + buffer.nbytes)
            part = buffer[begin - inside : end - inside]
            if hole[low]:
                _clear(part)
            elif header.compressed:
                grain = number * header.table_entries + first + low
                skip = begin - (first + low) * grain_bytes
                part[:] = self._inflate(grain, int(sectors[low]))[skip : skip + part.nbytes]
            else:
                self._file.read_into(
                    int(sectors[low]) * SECTOR_BYTES + begin - (first + low) * grain_bytes, part
                )

    def _table(self, number: int) -> _U32:
        """The grain table `number`, with every entry checked to point into the file."""
        with self._lock:
            table = self._tables.get(number)
            if table is not None:
                self._tables.move_to_end(number)
                return table
        header = self._header
        table = self._entries(int(self._directory[number]), header.table_entries, f"grain table {number}")
        # Entries past the capacity mean nothing.
        grains_left = -(-header.capacity // header.grain) - number * header.table_entries
        table[max(grains_left, 0) :] = 0
        self._check_entries(number, table)
        with self._lock:
            self._tables[number] = table
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return table

    def _check_entries(self, number: int, table: _U32) -> None:
        header = self._header
        used = table >= self._first_grain_entry
        begin = table.astype(np.int64) * SECTOR_BYTES
        if header.compressed:
            needed = np.full(table.size, _MARKER.size if header.markers else 1, np.int64)
        else:
            grains = number * header.table_entries + np.arange(table.size, dtype=np.int64)
            needed = np.minimum(header.grain, header.capacity - grains * header.grain) * SECTOR_BYTES
        wrong = np.flatnonzero(used & (begin + needed > self._file.size_bytes))
        if wrong.size:
            entry = int(wrong[0])
            raise SourceFormat(
                f"{self._where}: grain {number * header.table_entries + entry} is said to lie at sector "
                f"{int(table[entry])}, past the end of the file",
                hint="the file is truncated or damaged: copy it again from where it came",
            )

    def _inflate(self, grain: int, sector: int) -> bytes:
        """The content of a compressed grain, at least as long as the disk needs it."""
        with self._lock:
            number, content = self._inflated
        if number == grain:
            return content
        header = self._header
        at = sector * SECTOR_BYTES
        what = f"grain {grain}"
        if header.markers:
            first_sector, length = _MARKER.unpack(self._bytes(at, _MARKER.size, what))
            at += _MARKER.size
            if first_sector != grain * header.grain:
                raise SourceFormat(f"{self._where}: the data of {what} belongs to sector {first_sector}")
            if not 0 < length <= 2 * self._grain_bytes + SECTOR_BYTES:
                raise SourceFormat(f"{self._where}: {what} has a compressed size of {length} bytes")
        else:
            length = min(2 * self._grain_bytes + SECTOR_BYTES, self._file.size_bytes - at)
        needed = min(self._grain_bytes, self.size_bytes - grain * self._grain_bytes)
        inflater = zlib.decompressobj()
        try:
            content = inflater.decompress(self._bytes(at, length, what), self._grain_bytes)
            surplus = b"" if inflater.eof else inflater.decompress(inflater.unconsumed_tail, 1)
        except zlib.error as error:
            raise SourceFormat(f"{self._where}: {what} can not be inflated ({error})") from None
        if surplus or not inflater.eof or len(content) < needed:
            raise SourceFormat(f"{self._where}: {what} does not inflate to the size of a grain")
        with self._lock:
            self._inflated = (grain, content)
        return content

    def _footer(self, header: SparseHeader) -> SparseHeader:
        """The header at the end, which a stream that was written in one go has."""
        at = self._file.size_bytes - 2 * SECTOR_BYTES
        if at < SECTOR_BYTES:
            raise SourceFormat(f"{self._where}: the file ends before its footer")
        try:
            footer = parse_header(self._bytes(at, SECTOR_BYTES, "the footer"), f"{self._where}, footer")
        except SourceFormat as error:
            raise SourceFormat(
                error.message, hint="the file is probably truncated: copy it again from where it came"
            ) from None
        if footer.directory_at == _GD_AT_END:
            raise _nonsense(f"{self._where}, footer", "gdOffset", "again that of a footer")
        if (footer.capacity, footer.grain) != (header.capacity, header.grain):
            raise SourceFormat(f"{self._where}: header and footer contradict each other on the capacity")
        return footer

    def _entries(self, sector: int, count: int, what: str) -> _U32:
        entries = np.empty(count, "<u4")
        self._require(sector * SECTOR_BYTES, entries.nbytes, what)
        self._file.read_into(sector * SECTOR_BYTES, entries.data.cast("B"))
        return entries.astype(np.uint32, copy=False)

    def _bytes(self, offset: int, length: int, what: str) -> bytes:
        self._require(offset, length, what)
        data = bytearray(length)
        self._file.read_into(offset, memoryview(data))
        return bytes(data)

    def _require(self, offset: int, length: int, what: str) -> None:
        if offset + length > self._file.size_bytes:
            raise SourceFormat(
                f"{self._where}: {what} is said to lie at byte {offset}, past the end of the file",
                hint="the file is truncated or damaged: copy it again from where it came",
            )


def _clear(buffer: memoryview) -> None:
    np.frombuffer(buffer, np.uint8)[:] = 0


def _nonsense(where: str, field: str, value: str) -> SourceFormat:
    return SourceFormat(
        f"{where}: the header field {field} is {value}",
        hint=f"the file is damaged; no sparse disk reaches {MAX_SECTORS * SECTOR_BYTES // TIB} TiB",
    )
