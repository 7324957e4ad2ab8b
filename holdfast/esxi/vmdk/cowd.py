"""COWD: the redo logs of VMFS 5 and NFS, `vm-000001-delta.vmdk`, called `vmfsSparse` by descriptors.

    header, 2048 bytes -> grain directory: u32 sector of each grain table, 0 where there is none
                       -> grain table: 4096 x u32 sector of each grain (0: the parent's, 1: zeros)
                       -> grain, one sector as a rule

All numbers are little-endian. An entry 1 can not be data, since sectors 0 to 3 are the header.

Source: libyal/libvmdk, "VMware Virtual Disk (VMDK) format specification", "COWD sparse extent data file"; read
against qemu-img, which does not know entries 1.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from holdfast.disk import SECTOR_BYTES, BlockSource
from holdfast.errors import SourceFormat, SourceUnsupported
from holdfast.esxi.vmdk.redo import FROM_PARENT, ZEROS, Places, RedoLog, RedoShape, bytes_of

__all__ = ["COWD_MAGIC", "open_cowd"]

COWD_MAGIC: Final = b"COWD"

_HEADER: Final = struct.Struct("<4sIIIIIII")
_HEADER_BYTES: Final = 2048
_TABLE_ENTRIES: Final = 4096
_MAX_GRAIN_SECTORS: Final = 128
_ZERO_GRAIN: Final = 1


def open_cowd(file: BlockSource, where: str) -> RedoLog:
    """The redo log in `file`, which it closes.

    Raises:
        SourceFormat: header or directory make no sense, or lie outside of the file.
        SourceUnsupported: the version is unknown.
    """
    head = bytes_of(file, where, "the header", 0, _HEADER_BYTES)
    magic, version, _, capacity, grain, directory_at, directory_entries, _ = _HEADER.unpack_from(head)
    if magic != COWD_MAGIC:
        raise SourceFormat(f"{where}: there is no header of a redo log (COWD) where one belongs")
    if version != 1:
        raise SourceUnsupported(f"{where}: redo logs (COWD) of version {version} are not supported")
    if capacity == 0:
        raise SourceFormat(f"{where}: the redo log states a capacity of 0")
    if not 0 < grain <= _MAX_GRAIN_SECTORS or grain & (grain - 1):
        raise SourceFormat(f"{where}: the redo log states grains of {grain} sectors")
    if directory_at * SECTOR_BYTES < _HEADER_BYTES:
        raise SourceFormat(f"{where}: the grain directory is said to lie in the header")
    tables = -(-capacity // (grain * _TABLE_ENTRIES))
    if directory_entries < tables:
        raise SourceFormat(
            f"{where}: the grain directory has {directory_entries} entries, where the capacity needs {tables}"
        )
    end_of_directory = directory_at * SECTOR_BYTES + tables * 4
    raw = bytes_of(file, where, "the grain directory", directory_at * SECTOR_BYTES, tables * 4)
    directory = np.frombuffer(raw, "<u4").astype(np.int64) * SECTOR_BYTES
    if directory[directory > 0].min(initial=end_of_directory) < end_of_directory:
        raise SourceFormat(f"{where}: a grain table is said to lie in the grain directory")

    def read_table(number: int, offset: int) -> Places:
        entries = bytes_of(file, where, f"grain table {number}", offset, _TABLE_ENTRIES * 4)
        sectors = np.frombuffer(entries, "<u4").astype(np.int64)
        return np.where(
            sectors == 0,
            FROM_PARENT,
            np.where(sectors == _ZERO_GRAIN, ZEROS, sectors * SECTOR_BYTES),
        )

    shape = RedoShape(capacity * SECTOR_BYTES, grain * SECTOR_BYTES, _TABLE_ENTRIES, end_of_directory)
    return RedoLog(file, where, shape, directory, read_table)
