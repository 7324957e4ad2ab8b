"""Hosted sparse extents (`KDMV`) as redo logs: the snapshots of Workstation and Player, and what qemu-img writes.

An entry 0 of a grain table is the parent's, an entry 1 zeros where the header says so. Those with compressed
grains have no parent in practice and are refused. The header and the disks that have no parent are `sparse.py`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from holdfast.disk import SECTOR_BYTES, BlockSource
from holdfast.errors import SourceUnsupported
from holdfast.esxi.vmdk.redo import FROM_PARENT, ZEROS, Places, RedoLog, RedoShape, bytes_of
from holdfast.esxi.vmdk.sparse import parse_header

__all__ = ["open_hosted"]

_GD_AT_END: Final = 0xFFFFFFFFFFFFFFFF


def open_hosted(file: BlockSource, where: str) -> RedoLog:
    """The redo log in `file`, which it closes.

    Raises:
        SourceFormat: header or directory make no sense, or lie outside of the file.
        SourceUnsupported: the version is unknown, or the grains are compressed.
    """
    header = parse_header(bytes(bytes_of(file, where, "the header", 0, SECTOR_BYTES)), where)
    if header.compressed or header.directory_at == _GD_AT_END:
        raise SourceUnsupported(f"{where}: a delta disk with compressed grains is not supported")
    raw = bytes_of(file, where, "the grain directory", header.directory_at * SECTOR_BYTES, header.tables * 4)
    directory = np.frombuffer(raw, "<u4").astype(np.int64) * SECTOR_BYTES
    entries = header.table_entries

    def read_table(number: int, offset: int) -> Places:
        table = bytes_of(file, where, f"grain table {number}", offset, entries * 4)
        sectors = np.frombuffer(table, "<u4").astype(np.int64)
        places = np.where(sectors == 0, FROM_PARENT, sectors * SECTOR_BYTES)
        return np.where((sectors == 1) & header.zero_grains, ZEROS, places)

    shape = RedoShape(header.capacity * SECTOR_BYTES, header.grain * SECTOR_BYTES, entries, SECTOR_BYTES)
    return RedoLog(file, where, shape, directory, read_table)
