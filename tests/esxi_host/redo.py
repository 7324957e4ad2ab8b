"""Extents that a guest writes to: the flat file, and the redo logs that ESXi puts over it.

Written for the stand-in from the published layouts and held against `qemu-img`; the product's readers are other code,
so that each proves the other. Tables are kept in memory and written through, a place at a time, in an order that leaves a
reader of the files nothing but old or new content: data first, then the entry that leads to it.

- `Flat`: bytes at their place.
- `Cowd` (`-delta.vmdk`, VMFS 5 and NFS): grains of one sector; a directory of tables with 4096 entries of 32 bits.
- `SeSparse` (`-sesparse.vmdk`, VMFS 6): grains of 4 KiB; tables of 4096 entries of 64 bits, all of them reserved at the
  beginning; entries of their own for zeros.

Not written: the journal, free bitmap and back map of SESparse (their room is there), which readers do not need.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from typing import Protocol

SECTOR = 512


class Extent(Protocol):
    """One file of a chain. Offsets and lengths are multiples of a sector."""

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, present) for the range in order; what is not present is the parent's."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range that is present as a whole."""
        ...

    def write(self, offset: int, data: bytes) -> None: ...

    def discard(self, offset: int, length: int) -> None:
        """The range reads as zeros from now on, and takes no room where the format can say so."""
        ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Flat:
    """A flat extent."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        yield offset, length, True

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        _write_all(self._fd, data, offset)

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def data(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is not a hole, in order."""
        end = os.fstat(self._fd).st_size
        offset = 0
        while offset < end:
            try:
                start = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                return
            offset = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield start, offset - start

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Cowd:
    """A `vmfsSparse` redo log."""

    ENTRIES = 4096
    DIRECTORY_AT = 4  # sectors
    TABLE_BYTES = ENTRIES * 4

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        header = struct.unpack("<4s7I", os.pread(self._fd, 32, 0))
        assert header[0] == b"COWD", path
        self._sectors, tables = header[3], header[6]
        self._free = header[7]
        self._directory = array("I", os.pread(self._fd, tables * 4, self.DIRECTORY_AT * SECTOR))
        self._tables: dict[int, array[int]] = {}
        for number, place in enumerate(self._directory):
            if place:
                self._tables[number] = array("I", os.pread(self._fd, self.TABLE_BYTES, place * SECTOR))

    @classmethod
    def create(cls, path: str, capacity_bytes: int, parent: str) -> None:
        """An empty redo log for a disk of that size."""
        sectors = -(-capacity_bytes // SECTOR)
        tables = -(-sectors // cls.ENTRIES)
        free = cls.DIRECTORY_AT + -(-tables * 4 // SECTOR)
        header = struct.pack("<4s7I", b"COWD", 1, 3, sectors, 1, cls.DIRECTORY_AT, tables, free)
        header += os.fsencode(parent)[:1023].ljust(1024, b"\0")
        with open(path, "xb") as file:
            file.write(header)
            file.truncate(free * SECTOR)

    def _place(self, sector: int) -> int:
        table = self._tables.get(sector // self.ENTRIES)
        return table[sector % self.ENTRIES] if table is not None else 0

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        sector, end = offset // SECTOR, (offset + length) // SECTOR
        while sector < end:
            table = self._tables.get(sector // self.ENTRIES)
            stop = min(end, (sector // self.ENTRIES + 1) * self.ENTRIES)
            if table is not None:
                first = sector % self.ENTRIES
                present = table[first] != 0
                here = next(
                    (n for n in range(first + 1, first + stop - sector) if (table[n] != 0) != present), None
                )
                if here is not None:
                    stop = sector + here - first
            else:
                present = False
            yield sector * SECTOR, (stop - sector) * SECTOR, present
            sector = stop

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        for start, count, place in self._runs(offset // SECTOR, length // SECTOR):
            assert place, f"sector {start} is not in this redo log"
            parts.append(os.pread(self._fd, count * SECTOR, place * SECTOR))
        return b"".join(parts)

    def _runs(self, sector: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(sector, number of sectors, place) of neighbours that are neighbours in the file, too; place 0 for none."""
        start, first = sector, self._place(sector)
        for number in range(sector + 1, sector + count):
            place = self._place(number)
            if place != (first + number - start if first else 0):
                yield start, number - start, first
                start, first = number, place
        yield start, sector + count - start, first

    def write(self, offset: int, data: bytes) -> None:
        base = offset // SECTOR
        for start, count, place in list(self._runs(base, len(data) // SECTOR)):
            piece = data[(start - base) * SECTOR : (start - base + count) * SECTOR]
            if place:
                _write_all(self._fd, piece, place * SECTOR)
            else:
                self._append(start, piece)
        os.pwrite(self._fd, struct.pack("<I", self._free), 28)

    def _append(self, sector: int, data: bytes) -> None:
        """Sectors that this redo log does not have yet; they may belong to more than one table."""
        while data:
            number, index = divmod(sector, self.ENTRIES)
            count = min(len(data) // SECTOR, self.ENTRIES - index)
            table = self._table(number)
            place, self._free = self._free, self._free + count
            _write_all(self._fd, data[: count * SECTOR], place * SECTOR)
            entries = array("I", range(place, place + count))
            table[index : index + count] = entries
            os.pwrite(self._fd, entries.tobytes(), self._directory[number] * SECTOR + index * 4)
            sector, data = sector + count, data[count * SECTOR :]

    def _table(self, number: int) -> array[int]:
        if number not in self._tables:
            place = self._free
            self._free += self.TABLE_BYTES // SECTOR
            os.ftruncate(self._fd, self._free * SECTOR)
            self._tables[number] = array("I", bytes(self.TABLE_BYTES))
            self._directory[number] = place
            os.pwrite(self._fd, struct.pack("<I", place), self.DIRECTORY_AT * SECTOR + number * 4)
        return self._tables[number]

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class SeSparse:
    """A `seSparse` redo log."""

    GRAIN = 8 * SECTOR
    ENTRIES = 4096
    TABLE_BYTES = ENTRIES * 8
    ALLOCATED, ZERO, UNMAPPED = 3, 2, 1  # an entry's highest four bits; 0: the parent's
    _HEADER = struct.Struct("<26Q")
    _DIRECTORY_AT, _TABLES_AT = 4096, 6144  # sectors
    _AREA = 2048  # sectors: journal, free bitmap, back map
    _MAGIC, _VOLATILE_MAGIC, _VERSION = 0xCAFEBABE, 0xCAFECAFE, 0x200000001

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        header = self._HEADER.unpack(os.pread(self._fd, self._HEADER.size, 0))
        assert header[0] == self._MAGIC, path
        self._tables_at, self._grains_at = header[18] * SECTOR, header[24] * SECTOR
        count = -(-header[2] * SECTOR // (self.GRAIN * self.ENTRIES))
        directory = array("Q", os.pread(self._fd, count * 8, self._DIRECTORY_AT * SECTOR))
        self._slots = [entry & 0xFFFFFFFF if entry >> 60 == 1 else None for entry in directory]
        self._tables: dict[int, array[int]] = {}
        self._next = 0
        for number, slot in enumerate(self._slots):
            if slot is not None:
                table = array(
                    "Q", os.pread(self._fd, self.TABLE_BYTES, self._tables_at + slot * self.TABLE_BYTES)
                )
                self._tables[number] = table
                taken = [self._grain_number(entry) + 1 for entry in table if entry >> 60 == self.ALLOCATED]
                self._next = max([self._next, *taken])

    @classmethod
    def create(cls, path: str, capacity_bytes: int, _parent: str) -> None:
        """An empty redo log for a disk of that size."""
        sectors = -(-capacity_bytes // SECTOR)
        tables = -(-sectors * SECTOR // (cls.GRAIN * cls.ENTRIES))
        tables_sectors = tables * cls.TABLE_BYTES // SECTOR
        directory_sectors = max(1, -(-tables * 8 // SECTOR))
        bitmap = -(-(cls._TABLES_AT + tables_sectors) // cls._AREA) * cls._AREA
        back_map, grains = bitmap + cls._AREA, bitmap + 2 * cls._AREA
        header = (
            *(
                cls._MAGIC,
                cls._VERSION,
                sectors,
                cls.GRAIN // SECTOR,
                cls.TABLE_BYTES // SECTOR,
                0,
                0,
                0,
                0,
                0,
            ),
            *(
                1,
                1,
                2,
                2,
                cls._AREA,
                cls._AREA,
                cls._DIRECTORY_AT,
                directory_sectors,
                cls._TABLES_AT,
                tables_sectors,
            ),
            *(bitmap, cls._AREA, back_map, cls._AREA, grains, 0),
        )
        with open(path, "xb") as file:
            file.write(cls._HEADER.pack(*header).ljust(SECTOR, b"\0"))
            file.write(struct.pack("<4Q", cls._VOLATILE_MAGIC, 0, 0, 0))
            file.truncate(grains * SECTOR)

    @staticmethod
    def _grain_number(entry: int) -> int:
        """The number of the grain that an entry leads to: the low twelve bits stand above the high ones."""
        return (entry >> 48 & 0xFFF) | (entry & 0xFFFFFFFFFFFF) << 12

    def _entry(self, grain: int) -> int:
        table = self._tables.get(grain // self.ENTRIES)
        return table[grain % self.ENTRIES] if table is not None else 0

    def _set_entry(self, grain: int, entry: int) -> None:
        number, index = divmod(grain, self.ENTRIES)
        table = self._tables.get(number)
        if table is None:
            slot = len(self._tables)
            table = self._tables[number] = array("Q", bytes(self.TABLE_BYTES))
            self._slots[number] = slot
            os.pwrite(self._fd, struct.pack("<Q", 1 << 60 | slot), self._DIRECTORY_AT * SECTOR + number * 8)
            os.pwrite(self._fd, struct.pack("<Q", len(self._tables)), SECTOR + 8)
        table[index] = entry
        slot_ = self._slots[number]
        assert slot_ is not None
        os.pwrite(self._fd, struct.pack("<Q", entry), self._tables_at + slot_ * self.TABLE_BYTES + index * 8)

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        end = offset + length
        while offset < end:
            grain = offset // self.GRAIN
            table = self._tables.get(grain // self.ENTRIES)
            if table is None:
                stop, present = min(end, (grain // self.ENTRIES + 1) * self.ENTRIES * self.GRAIN), False
            else:
                present = self._entry(grain) != 0
                stop = (grain + 1) * self.GRAIN
                while stop < end and (self._entry(stop // self.GRAIN) != 0) == present:
                    stop += self.GRAIN
                stop = min(stop, end)
            yield offset, stop - offset, present
            offset = stop

    def read(self, offset: int, length: int) -> bytes:
        parts, end = [], offset + length
        while offset < end:
            grain, inner = divmod(offset, self.GRAIN)
            count = min(end - offset, self.GRAIN - inner)
            entry = self._entry(grain)
            assert entry, f"grain {grain} is not in this redo log"
            if entry >> 60 == self.ALLOCATED:
                place = self._grains_at + self._grain_number(entry) * self.GRAIN + inner
                parts.append(os.pread(self._fd, count, place))
            else:
                parts.append(bytes(count))
            offset += count
        return b"".join(parts)

    def knows(self, offset: int) -> bool:
        """Whether the grain at this offset is here, be it as zeros."""
        return self._entry(offset // self.GRAIN) != 0

    def write(self, offset: int, data: bytes) -> None:
        """Writes whole grains, or parts of grains that are here (see `knows`)."""
        position = 0
        while position < len(data):
            grain, inner = divmod(offset + position, self.GRAIN)
            piece = data[position : position + self.GRAIN - inner]
            entry = self._entry(grain)
            if entry >> 60 == self.ALLOCATED:
                place = self._grains_at + self._grain_number(entry) * self.GRAIN + inner
                _write_all(self._fd, piece, place)
            else:
                assert entry or len(piece) == self.GRAIN, "the chain fills up grains that are new here"
                number, self._next = self._next, self._next + 1
                whole = (bytes(inner) + piece).ljust(self.GRAIN, b"\0")
                _write_all(self._fd, whole, self._grains_at + number * self.GRAIN)
                tag = self.ALLOCATED << 60 | (number & 0xFFF) << 48 | number >> 12
                os.pwrite(self._fd, struct.pack("<Q", self._next * (self.GRAIN // SECTOR)), 25 * 8)
                self._set_entry(grain, tag)
            position += len(piece)

    def discard(self, offset: int, length: int) -> None:
        """Whole grains become zero entries, turn by turn of both kinds."""
        assert offset % self.GRAIN == length % self.GRAIN == 0, "the chain writes what is less than a grain"
        for grain in range(offset // self.GRAIN, (offset + length) // self.GRAIN):
            self._set_entry(grain, (self.UNMAPPED if grain % 2 else self.ZERO) << 60)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
