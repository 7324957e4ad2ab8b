"""Where a disk's partitions are: MBR with logical ones, and GPT with its copy at the end.

The answer is what Linux would show for the disk, with the same numbers, so that `3-linux.img` is `/dev/sda3`:

- GPT counts only behind a protective entry in the MBR, as for Linux and libblkid. A disk that was formatted as a
  whole often still carries an old table near its end, and that must not come back to life.
- A table with a wrong checksum is no table; then the copy counts, where the header says that it is or at the end.
- The sector size of a GPT is the one with which it checks out, 512 or 4096 bytes. An MBR counts in 512.
- A boot sector of FAT, exFAT or NTFS has the mark of an MBR too, and is told apart by its parameters.

Everything here was written by a guest. Whatever it is, nothing is raised for it, the work is bounded, and what is
returned lies inside the disk. Partitions may overlap if the table says so. Extended partitions, which only hold
others, are left out. Where a type says no more than "some file system of Windows", the partition's first sector
decides. Nested tables (BSD labels, LDM, LVM) are not looked into.

Sources: UEFI specification 2.10, chapter 5; Linux block/partitions/msdos.c and efi.c.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

__all__ = ["Partition", "boot_sector_kind", "find_partitions"]

Read = Callable[[int, int], bytes]

_MBR_SECTOR_BYTES: Final = 512
_GPT_SECTOR_SIZES: Final = (512, 4096)
_MAX_LOGICAL: Final = 256
_MAX_GPT_ENTRIES: Final = 4096
_MAX_GPT_TABLE_BYTES: Final = 1 << 20
_GPT_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_SEVERAL_SYSTEMS: Final = 0x07
_BASIC_DATA: Final = UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")

_MBR_KINDS: Final = {
    0x01: "fat12", 0x04: "fat16", 0x06: "fat16", 0x07: "ntfs", 0x0B: "fat32", 0x0C: "fat32", 0x0E: "fat16",
    0x11: "fat12", 0x14: "fat16", 0x16: "fat16", 0x17: "ntfs", 0x1B: "fat32", 0x1C: "fat32", 0x1E: "fat16",
    0x27: "winre", 0x42: "ldm", 0x82: "swap", 0x83: "linux", 0x8E: "lvm", 0xA5: "freebsd", 0xA6: "openbsd",
    0xA9: "netbsd", 0xAF: "hfs", 0xBF: "solaris", 0xEF: "efi", 0xFB: "vmfs", 0xFC: "vmkcore", 0xFD: "raid",
}  # fmt: skip

_GPT_KINDS: Final = {
    UUID(guid): kind
    for guid, kind in {
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "efi",
        "21686148-6449-6e6f-744e-656564454649": "bios",
        "0fc63daf-8483-4772-8e79-3d69d8477de4": "linux",
        "44479540-f297-41b2-9af7-d131d5f0458a": "linux",  # root, x86
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "linux",  # root, x86-64
        "b921b045-1df0-41c3-af44-4c6f280d3fae": "linux",  # root, arm64
        "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "linux",  # /home
        "3b8f8425-20e0-4f3b-907f-1a25a76f98e8": "linux",  # /srv
        "4d21b016-b534-45c2-a9fb-5c16e091fd2d": "linux",  # /var
        "bc13c2ff-59e6-4262-a352-b275fd6f7172": "linux",  # /boot
        "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "swap",
        "e6d6d379-f507-44c2-a23c-238f2a3df928": "lvm",
        "a19d880f-05fc-4d3b-a006-743f0f84911e": "raid",
        "ca7d7ccb-63ed-4c53-861c-1742536059cc": "luks",
        "e3c9e316-0b5c-4db8-817d-f92df00215ae": "msr",
        "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "winre",
        "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "ldm",
        "af9b60a0-1431-4f62-bc68-3311714a69ad": "ldm",
        "aa31e02a-400f-11db-9590-000c2911d1b8": "vmfs",
        "9d275380-40ad-11db-bf97-000c2911d1b8": "vmkcore",
        "9198effc-31c0-11db-8f78-000c2911d1b8": "vmware",
        "381cfccc-7288-11e0-92ee-000c2911d0b2": "vmware",
        "48465300-0000-11aa-aa11-00306543ecac": "hfs",
        "7c3457ef-0000-11aa-aa11-00306543ecac": "apfs",
        "516e7cb4-6ecf-11d6-8ff8-00022d09712b": "freebsd",
        "516e7cb5-6ecf-11d6-8ff8-00022d09712b": "swap",
        "516e7cb6-6ecf-11d6-8ff8-00022d09712b": "freebsd",
        "516e7cba-6ecf-11d6-8ff8-00022d09712b": "zfs",
        "6a898cc3-1dd2-11b2-99a6-080020736631": "zfs",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of a disk, inside of it and not empty.

    Args:
        number: as Linux counts, from 1; logical partitions from 5.
        kind: what it is for, in a short word of a-z, 0-9 and "-", fit for a file's name.
        start_bytes: where it begins on the disk.
        size_bytes: its length.
        name: the label that a GPT gives it, "" without; printable, otherwise as the guest wrote it.
    """

    number: int
    kind: str
    start_bytes: int
    size_bytes: int
    name: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """One of the four rows of an MBR or of a logical partition's record, in sectors."""

    type: int
    start: int
    sectors: int


def find_partitions(read: Read, size_bytes: int) -> tuple[Partition, ...]:
    """The partitions of a disk in the order of their numbers; none if there is no table that makes sense.

    Args:
        read: returns `length` bytes from an offset on, fewer at the end of the disk: `read(offset, length)`.
            What it raises, because a place can not be read, passes through.
        size_bytes: the disk's length.

    Cost: one read for most disks with an MBR, three for a GPT, one more for each logical partition and for each
    of Windows; at most some hundreds, and 1 MiB at once, for tables that were made up.
    """
    sector = read(0, _MBR_SECTOR_BYTES)
    entries = _entries(sector)
    if entries is None or boot_sector_kind(sector):
        return ()
    if any(entry.type == _PROTECTIVE for entry in entries):
        return _gpt(read, size_bytes)
    return tuple(_mbr(read, entries, size_bytes))


# --- MBR -----------------------------------------------------------------------------------------


def _entries(sector: bytes) -> tuple[_Entry, ...] | None:
    """The four rows; None if this is no such sector."""
    if len(sector) < _MBR_SECTOR_BYTES or sector[510:512] != b"\x55\xaa":
        return None
    rows = [sector[start : start + 16] for start in range(446, 510, 16)]
    if any(row[0] not in (0x00, 0x80) for row in rows):
        return None
    return tuple(_Entry(row[4], *struct.unpack_from("<II", row, 8)) for row in rows)


def _mbr(read: Read, entries: tuple[_Entry, ...], size_bytes: int) -> Iterator[Partition]:
    for number, entry in enumerate(entries, 1):
        if entry.type not in _EXTENDED:
            yield from _from_entry(read, number, entry, 0, size_bytes)
    number = 5
    seen: set[int] = set()
    for extended in entries:
        if extended.type not in _EXTENDED or not extended.sectors:
            continue
        record = extended.start
        while record and record not in seen and len(seen) < _MAX_LOGICAL:
            seen.add(record)
            if (record + 1) * _MBR_SECTOR_BYTES > size_bytes:
                break
            rows = _entries(read(record * _MBR_SECTOR_BYTES, _MBR_SECTOR_BYTES)) or ()
            # The third and fourth row hold garbage on some disks; nothing writes more than a partition and a link.
            for entry in rows[:2]:
                if entry.sectors and entry.type and entry.type not in _EXTENDED:
                    yield from _from_entry(read, number, entry, record, size_bytes)
                    number += 1
            links = [row.start for row in rows if row.type in _EXTENDED and row.sectors]
            record = extended.start + links[0] if links else 0


def _from_entry(read: Read, number: int, entry: _Entry, base: int, size_bytes: int) -> Iterator[Partition]:
    start, length = (base + entry.start) * _MBR_SECTOR_BYTES, entry.sectors * _MBR_SECTOR_BYTES
    if not entry.type or not start or not length or start + length > size_bytes:
        return
    kind = _MBR_KINDS.get(entry.type, f"type-{entry.type:02x}")
    if entry.type == _SEVERAL_SYSTEMS:
        kind = boot_sector_kind(read(start, _MBR_SECTOR_BYTES)) or kind
    yield Partition(number, kind, start, length, "")


def boot_sector_kind(sector: bytes) -> str:
    """The file system of Windows that this sector begins; "" if it begins none."""
    if len(sector) < _MBR_SECTOR_BYTES:
        return ""
    named = {b"NTFS    ": "ntfs", b"EXFAT   ": "exfat", b"-FVE-FS-": "bitlocker"}.get(sector[3:11])
    if named:
        return named
    sector_bytes, cluster_sectors, reserved, copies = struct.unpack_from("<HBHB", sector, 11)
    is_fat = (
        sector[0] in (0xEB, 0xE9)
        and sector_bytes in (512, 1024, 2048, 4096)
        and cluster_sectors.bit_count() == 1
        and reserved > 0
        and copies in (1, 2)
        and sector[21] in (0xF0, *range(0xF8, 0x100))
    )
    return "fat" if is_fat else ""


# --- GPT -----------------------------------------------------------------------------------------


def _gpt(read: Read, size_bytes: int) -> tuple[Partition, ...]:
    for sector_bytes in _GPT_SECTOR_SIZES:
        last = size_bytes // sector_bytes - 1
        primary = _header(read, 1, last, sector_bytes)
        places = [1, last] if primary is None else [1, primary.other_lba, last]
        for lba in dict.fromkeys(places):
            header = primary if lba == 1 else _header(read, lba, last, sector_bytes)
            table = None if header is None else _gpt_table(read, header, size_bytes, sector_bytes)
            if header is not None and table is not None:
                return tuple(_gpt_partitions(read, header, table, size_bytes, sector_bytes))
    return ()


@dataclass(frozen=True, slots=True)
class _Header:
    """What matters of a GPT header whose checksum is right."""

    other_lba: int
    table_lba: int
    entries: int
    entry_bytes: int
    table_crc: int


def _header(read: Read, lba: int, last: int, sector_bytes: int) -> _Header | None:
    if not 1 <= lba <= last:
        return None
    sector = read(lba * sector_bytes, sector_bytes)
    if len(sector) < sector_bytes or sector[:8] != b"EFI PART":
        return None
    _, _, length, crc, _, own_lba, other_lba, _, _, _, table_lba, entries, entry_bytes, table_crc = (
        _GPT_HEADER.unpack_from(sector)
    )
    if not _GPT_HEADER.size <= length <= sector_bytes or own_lba != lba:
        return None
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:length]) != crc:
        return None
    return _Header(other_lba, table_lba, entries, entry_bytes, table_crc)


def _gpt_table(read: Read, header: _Header, size_bytes: int, sector_bytes: int) -> bytes | None:
    """The rows that the header speaks of; None if they are not what it says."""
    length = header.entries * header.entry_bytes
    start = header.table_lba * sector_bytes
    if header.entry_bytes < 128 or header.entries > _MAX_GPT_ENTRIES or length > _MAX_GPT_TABLE_BYTES:
        return None
    if not start or start + length > size_bytes:
        return None
    table = read(start, length)
    return table if len(table) == length and zlib.crc32(table) == header.table_crc else None


def _gpt_partitions(
    read: Read, header: _Header, table: bytes, size_bytes: int, sector_bytes: int
) -> Iterator[Partition]:
    for index in range(header.entries):
        row = table[index * header.entry_bytes : (index + 1) * header.entry_bytes]
        guid = UUID(bytes_le=row[:16])
        first, last = struct.unpack_from("<QQ", row, 32)
        start, length = first * sector_bytes, (last + 1 - first) * sector_bytes
        if not guid.int or not start or length <= 0 or start + length > size_bytes:
            continue
        kind = _GPT_KINDS.get(guid, f"type-{guid.hex[:8]}")
        if guid == _BASIC_DATA:
            kind = boot_sector_kind(read(start, _MBR_SECTOR_BYTES)) or "data"
        name = row[56:128].decode("utf-16-le", "replace").split("\0", 1)[0]
        yield Partition(
            index + 1, kind, start, length, "".join(c if c.isprintable() else "\ufffd" for c in name)
        )
