"""ext2, ext3 and ext4.

Of the library: superblock, groups, inodes, extents, times, attributes. Done here, because the library (3.15) does it
in ways that lose or invent bytes: the block lists of files without extents (a missing second-level list of a sparse
file is a hole; it would read block 0 as a list), content that is kept in the inode beyond 60 bytes, and the entries of
folders (it leaves out one that ends a block exactly, and the file system's last inode).

Files and folders that the guest has encrypted are refused: their names and contents are noise.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

from holdfast.errors import GuestError
from holdfast.fuse.guest.port import Kind, Node, Piece, Run, Window, all_bytes, contained, pieces_of_runs

__all__ = ["KINDS", "open_ext"]

KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip
_ENCRYPTED: Final = 0x800
_EXTENTS: Final = 0x80000
_INLINE: Final = 0x10000000
_DIRECT: Final = 12
_INLINE_BYTES: Final = 60
_MAX_TARGET_BYTES: Final = 4096


def open_ext(window: Window) -> Node:
    """The root folder.

    Raises:
        GuestError: this is no such file system, or it is damaged.
    """
    from dissect.extfs.extfs import ExtFS

    with contained("the ext file system", window):
        system = ExtFS(window.buffered())
        if not stat.S_ISDIR(system.root.inode.i_mode):
            raise GuestError("the ext file system has no root folder")
        return _ExtNode(window, system, system.root, "")


class _ExtNode:
    """A file of an ext file system."""

    def __init__(self, window: Window, system: Any, inode: Any, name: str) -> None:
        self._window = window
        self._system = system
        self._inode = inode
        self.name = name

    @cached_property
    def kind(self) -> Kind:
        try:
            with contained(self._what, self._window):
                return KINDS.get(stat.S_IFMT(self._inode.inode.i_mode), "damaged")
        except GuestError:
            return "damaged"

    @property
    def _what(self) -> str:
        return f"inode {self._inode.inum} of the ext file system"

    @property
    def size_bytes(self) -> int:
        return int(self._inode.size) if self.kind == "file" else 0

    @property
    def mode(self) -> int | None:
        return None if self.kind == "damaged" else stat.S_IMODE(self._inode.inode.i_mode)

    @property
    def mtime_ns(self) -> int | None:
        if self.kind == "damaged":
            return None
        raw = self._inode.inode
        large = self._system.sb.s_inode_size > 128
        seconds = struct.unpack("<i", struct.pack("<I", raw.i_mtime))[0]
        more = raw.i_mtime_extra if large else 0
        return int((seconds + ((more & 3) << 32)) * 1_000_000_000 + min(more >> 2, 999_999_999))

    @cached_property
    def target(self) -> str:
        if self.kind != "link":
            return ""
        with contained(self._what, self._window):
            size, flags = int(self._inode.size), int(self._inode.inode.i_flags)
            if flags & _ENCRYPTED:
                raise GuestError("the link is encrypted by the guest")
            if flags & _INLINE or (size < _INLINE_BYTES and not flags & _EXTENTS):
                data = self._inline(size)
            else:
                data = all_bytes(self._content(), _MAX_TARGET_BYTES)
        return data.decode("utf-8", "surrogateescape")

    def children(self) -> list[Node]:
        with contained(self._what, self._window):
            if self._inode.inode.i_flags & _ENCRYPTED:
                raise GuestError("the folder is encrypted by the guest")
            if self._inode.inode.i_flags & _INLINE:
                data = self._inline(int(self._inode.size))
                return [*self._entries(data[4:_INLINE_BYTES]), *self._entries(data[_INLINE_BYTES:])]
            data = all_bytes(self._content())
            block = self._system.block_size
            return [
                node for at in range(0, len(data), block) for node in self._entries(data[at : at + block])
            ]

    def _entries(self, block: bytes) -> Iterator[Node]:
        at = 0
        while at + 8 <= len(block):
            number, length, name_length = struct.unpack_from("<IHB", block, at)
            if length < 8 or length % 4 or at + length > len(block) or 8 + name_length > length:
                if length in (0, 0xFFFF) and len(block) >= 1 << 16:
                    length = len(block) - at  # how a block of 64 KiB without entries is written
                    if number:
                        raise GuestError("a folder's entries are in disorder")
                else:
                    raise GuestError("a folder's entries are in disorder")
            name = block[at + 8 : at + 8 + name_length]
            if number and name not in (b".", b".."):
                inode = self._system.get_inode(number)
                yield _ExtNode(self._window, self._system, inode, name.decode("utf-8", "surrogateescape"))
            at += length

    def pieces(self) -> Iterator[Piece]:
        with contained(self._what, self._window):
            raw = self._inode.inode
            if raw.i_flags & _ENCRYPTED:
                raise GuestError("the file is encrypted by the guest")
            if raw.i_flags & _INLINE:
                return iter([self._inline(int(self._inode.size))])
            return self._content()

    def _content(self) -> Iterator[Piece]:
        size = int(self._inode.size)
        if self._inode.inode.i_flags & _EXTENTS:
            runs = self._inode.dataruns()
        else:
            runs = self._mapped(-(-size // self._system.block_size))
        return pieces_of_runs(self._window, runs, self._system.block_size, size)

    def _inline(self, size: int) -> bytes:
        """Content that is kept in the inode, and in an attribute of it."""
        data = bytes(self._inode.inode.i_block)
        if size > len(data):
            data += next((bytes(x.value) for x in self._inode.xattr if x.name == "system.data"), b"")
        if len(data) < size:
            raise GuestError("the content of a small file is incomplete")
        return data[:size]

    def _mapped(self, blocks: int) -> list[Run]:
        """Runs from the lists of blocks of a file without extents."""
        numbers = struct.unpack("<15I", bytes(self._inode.inode.i_block))
        per_block = int(self._system.block_size) // 4
        runs: list[Run] = []

        def add(block: int, count: int) -> None:
            if runs and not block and runs[-1][0] is None:
                runs[-1] = (None, runs[-1][1] + count)
            elif runs and block and runs[-1][0] is not None and runs[-1][0] + runs[-1][1] == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((block or None, count))

        def descend(block: int, level: int, wanted: int) -> int:
            """Adds what the list at `block` maps, up to `wanted` blocks; returns how many it covers."""
            covers = min(wanted, int(per_block**level))
            if level == 0 or not block:
                add(block, covers)
                return covers
            data = self._window.pread(block * self._system.block_size, self._system.block_size)
            if len(data) < self._system.block_size:
                raise GuestError("a file's list of blocks lies outside of the disk")
            left = covers
            for number in struct.unpack(f"<{per_block}I", data):
                if not left:
                    break
                left -= descend(number, level - 1, left)
            return covers

        for place, number in enumerate(numbers):
            if not blocks:
                break
            blocks -= descend(number, max(0, place - _DIRECT + 1), blocks)
        return runs
