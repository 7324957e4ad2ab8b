"""SESparse: the redo logs of VMFS 6, `vm-000001-sesparse.vmdk`, called `seSparse` by descriptors.

    constant header  -> where everything is, in sectors
    volatile header  -> whether the journal has to be replayed
    grain directory: u64, its uppermost 4 bits 1 if there is a table, the lower 32 its number
    grain tables, all alike: u64 per grain of 4 KiB, its uppermost 4 bits say what it is:
        0 the parent's | 1 unmapped by the guest: zeros | 2 zeros | 3 in this file

All numbers are little-endian. The number of a grain has its lower 12 bits in bits 48 to 59 of the entry and
its upper 48 bits in bits 0 to 47. Free bitmap and back map are for writers, and are not read.

A log whose journal is not empty is refused: its tables do not yet say what the guest has written.

Source: the format as QEMU (`block/vmdk.c`) and dissect.hypervisor read it, and qemu-img as the judge. They differ on
entries of kind 1; QEMU and Xen Orchestra read them as zeros, as SCSI UNMAP promises, and so does this.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from holdfast.disk import SECTOR_BYTES, BlockSource
from holdfast.errors import SourceFormat, SourceUnsupported
from holdfast.esxi.vmdk.descriptor import MAX_SECTORS
from holdfast.esxi.vmdk.redo import FROM_PARENT, ZEROS, Places, RedoLog, RedoShape, bytes_of

__all__ = ["SESPARSE_MAGIC", "open_sesparse"]

SESPARSE_MAGIC: Final = b"\xbe\xba\xfe\xca\x00\x00\x00\x00"

_HEADER: Final = struct.Struct("<26Q")
_VERSION: Final = 0x2_0000_0001
_VOLATILE: Final = struct.Struct("<4Q")
_VOLATILE_MAGICS: Final = (0xCAFECAFE, 0xCAFEBABE)  # the second is dissect's reading
_GRAIN_SECTORS: Final = 8
_TABLE_SECTORS: Final = 64
_MAX_PLACE: Final = 1 << 62

_KIND: Final = np.uint64(60)
_NO_TABLE, _TABLE = 0, 1
_PARENT, _UNMAPPED, _ZERO, _ALLOCATED = 0, 1, 2, 3


def open_sesparse(file: BlockSource, where: str) -> RedoLog:
    """The redo log in `file`, which it closes.

    Raises:
        SourceFormat: a header or the directory make no sense, lie outside of the file, or the journal is not empty.
        SourceUnsupported: the version is unknown.
    """
    fields = _HEADER.unpack_from(bytes_of(file, where, "the header", 0, SECTOR_BYTES))
    magic, version, capacity, grain, table_sectors = fields[:5]
    volatile_at, directory_at, tables_at, grains_at = fields[10], fields[16], fields[18], fields[24]
    if magic != int.from_bytes(SESPARSE_MAGIC, "little"):
        raise SourceFormat(f"{where}: there is no header of a redo log (SESparse) where one belongs")
    if version != _VERSION:
        raise SourceUnsupported(f"{where}: redo logs (SESparse) of version {version:#x} are not supported")
    if not 0 < capacity <= MAX_SECTORS:
        raise SourceFormat(f"{where}: the redo log states a capacity of {capacity} sectors")
    if (grain, table_sectors) != (_GRAIN_SECTORS, _TABLE_SECTORS):
        raise SourceUnsupported(
            f"{where}: redo logs with grains of {grain} and tables of {table_sectors} sectors are not supported"
        )
    for name, sector in (("directory", directory_at), ("tables", tables_at), ("grains", grains_at)):
        if not 0 < sector * SECTOR_BYTES < _MAX_PLACE:
            raise SourceFormat(f"{where}: the {name} are said to lie at sector {sector}")
    _require_clean(file, where, volatile_at * SECTOR_BYTES)
    entries = table_sectors * SECTOR_BYTES // 8
    shape = RedoShape(capacity * SECTOR_BYTES, grain * SECTOR_BYTES, entries, grains_at * SECTOR_BYTES)
    directory = _directory(file, where, directory_at * SECTOR_BYTES, shape, tables_at * SECTOR_BYTES)

    def read_table(number: int, offset: int) -> Places:
        raw = bytes_of(file, where, f"grain table {number}", offset, entries * 8)
        return _places(np.frombuffer(raw, "<u8"), shape, f"{where}: grain table {number}")

    return RedoLog(file, where, shape, directory, read_table)


def _require_clean(file: BlockSource, where: str, offset: int) -> None:
    """Refuses a log with a journal that is not empty.

    Raises:
        SourceFormat: it is not, or the header that would say so is none.
    """
    magic, _, _, replay = _VOLATILE.unpack(
        bytes_of(file, where, "the volatile header", offset, _VOLATILE.size)
    )
    if magic not in _VOLATILE_MAGICS:
        raise SourceFormat(f"{where}: there is no volatile header where one belongs")
    if replay:
        raise SourceFormat(
            f"{where}: the redo log was not closed properly, its journal has yet to be replayed",
            hint="power the VM on and off again on its host, which does that, then copy the file anew",
        )


def _directory(file: BlockSource, where: str, offset: int, shape: RedoShape, tables_at: int) -> Places:
    raw = bytes_of(file, where, "the grain directory", offset, shape.tables * 8)
    entries = np.frombuffer(raw, "<u8")
    kinds = entries >> _KIND
    numbers = (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)
    strange = np.flatnonzero(
        (entries != 0) & ((kinds != _TABLE) | (entries >> np.uint64(32) != _TABLE << 28))
    )
    if strange.size:
        raise SourceFormat(f"{where}: entry {int(strange[0])} of the grain directory makes no sense")
    places = tables_at + numbers * (shape.table_entries * 8)
    return np.where(entries == _NO_TABLE, 0, places)


def _places(entries: np.ndarray[tuple[int, ...], np.dtype[np.uint64]], shape: RedoShape, what: str) -> Places:
    kinds = entries >> _KIND
    low = (entries >> np.uint64(48)) & np.uint64(0xFFF)
    high = entries & np.uint64((1 << 48) - 1)
    strange = (kinds > _ALLOCATED) | ((kinds == _PARENT) & (entries != 0))
    # Such a number is past the end of any file, and would not fit when multiplied.
    strange |= (kinds == _ALLOCATED) & (high >= 1 << 36)
    found = np.flatnonzero(strange)
    if found.size:
        raise SourceFormat(
            f"{what}: entry {int(found[0])} makes no sense",
            hint="the file is damaged: copy it again from where it came",
        )
    # Of unmapped entries the number is that of a grain that is no longer used; nothing is computed from it.
    numbers = np.where(kinds == _ALLOCATED, low | high << np.uint64(12), 0).astype(np.int64)
    data = shape.lowest_place + numbers * shape.grain_bytes
    inside = np.where(kinds == _PARENT, FROM_PARENT, ZEROS)
    return np.where(kinds == _ALLOCATED, data, inside).astype(np.int64)
