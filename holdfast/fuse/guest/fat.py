"""FAT12, FAT16 and FAT32, with long names.

Of the library: boot sector, folders, names, the table of clusters. Done here: joining clusters to runs (the library,
3.13, takes two clusters in descending order for neighbours in ascending order), and telling a small FAT32 by
its boot sector, as Linux does, and not by its number of clusters alone. Times are the guest's local ones, and are
taken for UTC.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from typing import Any

from holdfast.errors import GuestError
from holdfast.fuse.guest.port import Kind, Node, Piece, Run, Window, contained, pieces_of_runs

__all__ = ["open_fat"]


def open_fat(window: Window) -> Node:
    """The root folder.

    Raises:
        GuestError: this is no such file system, or it is damaged.
    """
    from dissect.fat.c_fat import Fattype, c_fat
    from dissect.fat.fat import FAT, FATFS

    with contained("the FAT file system", window):
        system = FATFS(window.buffered())
        if not system.bpb.BPB_FATSz16 and system.type != Fattype.FAT32:
            system.type = Fattype.FAT32
            system.bpb_ext = c_fat.Bpb32(window.pread(len(c_fat.Bpb), len(c_fat.Bpb32)))
            system.fat = FAT(system.fat.fh, system.type)
        return _FatNode(window, system, system.root, "")


class _FatNode:
    """A file of a FAT file system."""

    mode: int | None = None
    target = ""

    def __init__(self, window: Window, system: Any, entry: Any, name: str) -> None:
        self._window = window
        self._system = system
        self._entry = entry
        self.name = name

    @property
    def kind(self) -> Kind:
        return "folder" if self._entry.is_directory() else "file"

    @property
    def size_bytes(self) -> int:
        return 0 if self.kind == "folder" else int(self._entry.size)

    @property
    def mtime_ns(self) -> int | None:
        if self._entry is self._system.root:
            return None
        try:
            return int(self._entry.mtime.replace(tzinfo=UTC).timestamp()) * 1_000_000_000
        except (ValueError, OverflowError):
            return None  # a date like the 0th of a month

    def children(self) -> list[Node]:
        with contained("a folder of the FAT file system", self._window):
            if self._entry.cluster or self._entry is not self._system.root:
                self._entry._runlist = self._runs()  # noqa: SLF001 - so that folders are read with right runs too
            return [
                _FatNode(self._window, self._system, entry, _name(entry))
                for entry in self._entry.iterdir()
                if not entry.is_volume_id() and entry.short_name not in (".", "..")
            ]

    def pieces(self) -> Iterator[Piece]:
        with contained("a file of the FAT file system", self._window):
            runs = self._runs()
            have = sum(count for _, count in runs) * self._system.cluster_size
            if have < self.size_bytes:
                raise GuestError("a file's chain of clusters is shorter than the file")
            shift = self._system.first_data_sector * self._system.sector_size
            data = _Shifted(self._window, shift)
            return pieces_of_runs(data, runs, self._system.cluster_size, self.size_bytes)

    def _runs(self) -> list[Run]:
        first = self._entry.cluster
        if not first:
            return []
        runs: list[tuple[int, int]] = []
        for length, cluster in enumerate(self._system.fat.chain(first)):
            if length > self._system.fat.entry_count:
                raise GuestError("a chain of clusters has no end")
            if runs and runs[-1][0] + runs[-1][1] == cluster - 2:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((cluster - 2, 1))
        return list(runs)


def _name(entry: Any) -> str:
    """The long name; else the short one, in small letters where two bits say so (as Windows NT began to do)."""
    if entry.ldirents:
        return str(entry.name)
    base, dot, extension = str(entry.short_name).partition(".")
    flags = entry.dirent.DIR_NTRes
    return (base.lower() if flags & 0x08 else base) + dot + (extension.lower() if flags & 0x10 else extension)


class _Shifted(Window):
    """The window from some offset on."""

    def __init__(self, window: Window, shift: int) -> None:
        super().__init__(window, shift, max(0, window.size_bytes - shift))
