"""XFS, versions 4 and 5.

Of the library: superblock, inodes, extent trees, folders. Done here: blocks that are reserved but were never written
(databases and VM images have many) are holes; the library (3.13) would give what was on the disk there before.

Not read: files on a realtime device, and folders of file systems with folder blocks larger than blocks.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

from holdfast.errors import GuestError
from holdfast.fuse.guest.ext import KINDS
from holdfast.fuse.guest.port import Kind, Node, Piece, Run, Window, contained, pieces_of_runs

__all__ = ["open_xfs"]

_REALTIME: Final = 1
_MAX_TARGET_BYTES: Final = 4096


def open_xfs(window: Window) -> Node:
    """The root folder.

    Raises:
        GuestError: this is no such file system, or it is damaged.
    """
    from dissect.xfs.xfs import XFS

    with contained("the XFS file system", window):
        system = XFS(window.buffered())
        if not stat.S_ISDIR(system.root.inode.di_mode):
            raise GuestError("the XFS file system has no root folder")
        return _XfsNode(window, system, system.root, "")


class _XfsNode:
    """A file of an XFS file system."""

    def __init__(self, window: Window, system: Any, inode: Any, name: str) -> None:
        self._window = window
        self._system = system
        self._inode = inode
        self.name = name

    @cached_property
    def kind(self) -> Kind:
        try:
            with contained(self._what, self._window):
                return KINDS.get(stat.S_IFMT(self._inode.inode.di_mode), "damaged")
        except GuestError:
            return "damaged"

    @property
    def _what(self) -> str:
        return f"inode {self._inode.inum} of the XFS file system"

    @property
    def size_bytes(self) -> int:
        return int(self._inode.size) if self.kind == "file" else 0

    @property
    def mode(self) -> int | None:
        return None if self.kind == "damaged" else stat.S_IMODE(self._inode.inode.di_mode)

    @property
    def mtime_ns(self) -> int | None:
        return None if self.kind == "damaged" else int(self._inode.mtime_ns)

    @cached_property
    def target(self) -> str:
        if self.kind != "link":
            return ""
        with contained(self._what, self._window):
            if int(self._inode.size) > _MAX_TARGET_BYTES:
                raise GuestError("the link's target is longer than is possible")
            return str(self._inode.link)

    def children(self) -> list[Node]:
        with contained(self._what, self._window):
            if self._system.sb.sb_dirblklog:
                raise GuestError("folders with blocks of their own size are not supported")
            return [
                _XfsNode(self._window, self._system, inode, inode.filename)
                for inode in self._inode.iterdir()
                if inode.filename not in (".", "..")
            ]

    def pieces(self) -> Iterator[Piece]:
        with contained(self._what, self._window):
            if self._inode.inode.di_flags & _REALTIME:
                raise GuestError("files on a realtime device are not supported")
            size = int(self._inode.size)
            runs = list(self._runs())
            return pieces_of_runs(self._window, runs, self._system.block_size, size)

    def _runs(self) -> Iterator[Run]:
        at = 0
        sb = self._system.sb
        for offset, block, count, unwritten in self._inode._iter_blocks():  # noqa: SLF001 - it keeps what `dataruns` drops
            if offset < at:
                raise GuestError("a file's blocks are in disorder")
            if offset > at:
                yield None, offset - at
            group, inside = block >> sb.sb_agblklog, block & ((1 << sb.sb_agblklog) - 1)
            yield (None if unwritten else group * sb.sb_agblocks + inside), count
            at = offset + count
