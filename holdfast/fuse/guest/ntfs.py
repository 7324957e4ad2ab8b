"""NTFS: files, folders, links; compressed and sparse ones too.

Of the library: boot sector, file table, attributes, runs, decompression, index entries. Done here: folders are walked
along their tree, since the library (3.16) also lists what is left in index blocks that are no longer in use; and what
lies beyond a file's valid length is zeros, and not what was on the disk there before.

Not shown: other streams than a file's content, and NTFS's own files ($MFT and the like). Refused: what Windows has
encrypted (EFS), and contents that lie elsewhere (deduplicated, in a cloud, compressed by CompactOS): they would be
read as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

from holdfast.errors import GuestError
from holdfast.fuse.guest.port import Kind, Node, Piece, Window, contained, pieces_of_runs
from holdfast.units import MIB

__all__ = ["open_ntfs"]

_OWN_FILES: Final = 24
_ROOT: Final = 5
_ENCRYPTED: Final = 0x4000
_COMPRESSED: Final = 0x00FF
_MAX_INDEX_DEPTH: Final = 64


def open_ntfs(window: Window) -> Node:
    """The root folder.

    Raises:
        GuestError: this is no such file system, or it is damaged.
    """
    from dissect.ntfs.ntfs import NTFS

    with contained("the NTFS file system", window):
        system = NTFS(window.buffered())
        if system.cluster_size <= 0 or system._record_size <= 0:  # noqa: SLF001
            raise GuestError("the NTFS file system has clusters without a size")
        if not system.mft.get(_ROOT).is_dir():
            raise GuestError("the NTFS file system has no root folder")
        return _NtfsNode(window, system, _ROOT, "")


class _NtfsNode:
    """A file of an NTFS file system."""

    mode: int | None = None

    def __init__(self, window: Window, system: Any, number: int, name: str) -> None:
        self._window = window
        self._system = system
        self._number = number
        self.name = name

    @property
    def _what(self) -> str:
        return f"record {self._number} of the NTFS file system"

    @cached_property
    def _record(self) -> Any:
        return self._system.mft.get(self._number)

    @cached_property
    def kind(self) -> Kind:
        try:
            with contained(self._what, self._window):
                if not self._record.header.Flags & 1:
                    return "damaged"  # a record that is not in use
                if self._record.is_symlink() or self._record.is_mount_point():
                    return "link"
                return "folder" if self._record.is_dir() else "file"
        except GuestError:
            return "damaged"

    @cached_property
    def size_bytes(self) -> int:
        if self.kind != "file":
            return 0
        try:
            with contained(self._what, self._window):
                return int(self._record.size()) if self._record.has_stream() else 0
        except GuestError:
            return 0

    @cached_property
    def mtime_ns(self) -> int | None:
        try:
            with contained(self._what, self._window):
                return int(self._record.attributes.STANDARD_INFORMATION.last_modification_time_ns)
        except GuestError:
            return None

    @cached_property
    def target(self) -> str:
        """As a path of Unix where it is relative; else as Windows writes it."""
        if self.kind != "link":
            return ""
        with contained(self._what, self._window):
            text = str(self._record.reparse_point_name or self._record.reparse_point_substitute_name)
            return text.replace("\\", "/")

    def children(self) -> list[Node]:
        with contained(self._what, self._window):
            found: dict[str, _NtfsNode] = {}
            for entry in self._index_entries():
                attribute = entry.attribute
                if attribute is None or attribute.flags == 2:  # a short name of DOS beside the real one
                    continue
                reference = entry.header.FileReference
                number = reference.SegmentNumberLowPart | reference.SegmentNumberHighPart << 32
                if number >= _OWN_FILES or self._number != _ROOT:
                    name = str(attribute.file_name)
                    found[name] = _NtfsNode(self._window, self._system, number, name)
            return list(found.values())

    def _index_entries(self) -> Iterator[Any]:
        """The entries of the folder's index, by walking its tree."""
        index = self._record.index("$I30")
        seen: set[int] = set()

        def walk(entries: Any, depth: int) -> Iterator[Any]:
            for entry in entries:
                if entry.is_node:
                    block = int(entry.node_vcn)
                    if block in seen or depth > _MAX_INDEX_DEPTH:
                        raise GuestError("a folder's index is in disorder")
                    seen.add(block)
                    yield from walk(list(index.index_buffer(block).entries()), depth + 1)
                if not entry.is_end:
                    yield entry

        return walk(list(index.root.entries()), 0)

    def pieces(self) -> Iterator[Piece]:
        with contained(self._what, self._window):
            if self._record.is_reparse_point():
                raise GuestError(
                    "the file's content is kept elsewhere (deduplicated, in a cloud, or compressed by the system)"
                )
            if not self._record.has_stream():
                return iter(())
            from dissect.ntfs.c_ntfs import ATTRIBUTE_TYPE_CODE

            attributes = self._record.attributes.find("", ATTRIBUTE_TYPE_CODE.DATA)
            header = attributes.header
            if header.flags & _ENCRYPTED:
                raise GuestError("the file is encrypted by the guest")
            if header.resident:
                return iter([bytes(header.open().read())])
            size = self.size_bytes
            first = min((a.header for a in attributes if not a.header.resident), key=lambda h: h.lowest_vcn)
            valid = int(first.header.Form.Nonresident.ValidDataLength)
            if header.flags & _COMPRESSED:
                return self._decompressed(attributes.open(), min(size, max(0, valid)), size)
            return pieces_of_runs(
                self._window, attributes.dataruns(), self._system.cluster_size, size, max(0, valid)
            )

    def _decompressed(self, stream: Any, valid: int, size: int) -> Iterator[Piece]:
        position = 0
        while position < valid:
            with contained(self._what, self._window):
                data = bytes(stream.read(min(MIB, valid - position)))
            if not data:
                raise GuestError(f"{self._what} can not be read: its content ends early")
            yield data
            position += len(data)
        if position < size:
            yield size - position
