"""Disks that lie on a host: descriptors, extents and redo logs become one source, wherever the bytes are read from.

The counterpart of `vmdk.open` for files that are not here. `HostFiles` opens a file as a `BlockSource`; the formats are
those of `vmdk`. A disk may lie on several datastores: its VMX and its children name files by absolute paths then, below
`/vmfs/volumes` and nowhere else. A parent must have the content id that its child remembers.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from holdfast.disk import SECTOR_BYTES, BlockSource, SegmentScanner
from holdfast.errors import SourceFormat, SourceUnsupported
from holdfast.esxi.names import printable
from holdfast.esxi.vmdk.chain import ChainSource
from holdfast.esxi.vmdk.cowd import open_cowd
from holdfast.esxi.vmdk.descriptor import NO_PARENT, Descriptor, Extent, parse_descriptor, with_inherited_ddb
from holdfast.esxi.vmdk.joined import JoinedSource, Piece
from holdfast.esxi.vmdk.redo import RedoLog
from holdfast.esxi.vmdk.sesparse import open_sesparse

__all__ = ["MAX_DESCRIPTOR_BYTES", "HostDisk", "HostFiles", "Link", "open_host_disk", "read_chain"]

MAX_DESCRIPTOR_BYTES: Final = 1 << 16
_LONGEST_CHAIN: Final = 64
_ROOT: Final = "/vmfs/volumes/"
_REDO_LOGS: Final[dict[str, Callable[[BlockSource, str], RedoLog]]] = {
    "VMFSSPARSE": open_cowd,
    "SESPARSE": open_sesparse,
}


class HostFiles(Protocol):
    """Opens the files of one host. Thread-safe."""

    def open(self, path: str) -> BlockSource:
        """The bytes of a file; closing it is the caller's business.

        Raises:
            SourceNotFound, SourceUnreadable: it can not be opened.
            SourceChanged: it is locked.
        """
        ...

    def scanner(self, source: ChainSource | JoinedSource, where: str) -> SegmentScanner | None:
        """What cuts and hashes a disk of these files on the host itself; None if it can not be done there."""
        ...

    def close(self) -> None:
        """Lets go of the host. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Link:
    """One descriptor of a chain.

    Args:
        path: of the descriptor, on the host.
    """

    path: str
    descriptor: Descriptor

    @property
    def members(self) -> tuple[str, ...]:
        """Paths of the descriptor and of its extents."""
        folder = posixpath.dirname(self.path)
        return self.path, *(
            posixpath.join(folder, extent.file_name) for extent in self.descriptor.extents if extent.file_name
        )


@dataclass(frozen=True, slots=True)
class HostDisk:
    """An open disk of a host.

    Args:
        descriptor: of the topmost link, completed from its parents.
        links: the topmost first.
    """

    source: ChainSource | JoinedSource
    descriptor: Descriptor
    links: tuple[Link, ...]


def read_chain(path: str, read: Callable[[str, int], bytes]) -> tuple[Link, ...]:
    """The descriptors of a disk, from the one at `path` down to the one without a parent.

    Args:
        read: returns the content of a small file of the host, given its path and the longest length to accept.

    Raises:
        SourceFormat: one makes no sense, or two do not belong together.
        SourceUnsupported: the disk is of a kind that is not backed up.
        SourceNotFound, SourceUnreadable: one can not be read.
    """
    links: list[Link] = []
    while True:
        where = printable(path)
        if path in [link.path for link in links]:
            raise SourceFormat(f"{where}: the chain of its parents comes back to it")
        if len(links) >= _LONGEST_CHAIN:
            raise SourceFormat(
                f"{printable(links[0].path)}: the chain of its parents is longer than {_LONGEST_CHAIN}"
            )
        descriptor = parse_descriptor(read(path, MAX_DESCRIPTOR_BYTES), where)
        if links and descriptor.cid != links[-1].descriptor.parent_cid:
            raise SourceFormat(
                f"{printable(links[-1].path)}: its parent {where} was changed after the snapshot: its content id is "
                f"{descriptor.cid:08x}, not {links[-1].descriptor.parent_cid:08x}",
                hint="the two do not make up a disk any more: see vmware.log of the VM",
            )
        links.append(Link(path, descriptor))
        if descriptor.parent_cid == NO_PARENT:
            return tuple(links)
        if not descriptor.parent_hint:
            raise SourceFormat(f"{where} is a delta disk that does not name its parent")
        path = _inside(posixpath.join(posixpath.dirname(path), descriptor.parent_hint), where)


def open_host_disk(links: tuple[Link, ...], files: HostFiles) -> HostDisk:
    """The disk whose descriptors are `links`, open for reading.

    Raises:
        SourceUnsupported: it is a raw device mapping, an object of vSAN, or the like.
        SourceFormat, SourceNotFound, SourceUnreadable, SourceChanged: it can not be read.
    """
    *deltas, base = links
    with contextlib.ExitStack() as opened:
        joined = JoinedSource(_pieces(base, files, opened))
        logs: list[RedoLog] = []
        for link in deltas:
            extent = _sole_extent(link)
            file = files.open(_extent_path(link, extent))
            opened.callback(file.close)
            log = _REDO_LOGS[extent.kind](file, printable(link.path))
            if log.size_bytes != extent.sectors * SECTOR_BYTES:
                raise SourceFormat(
                    f"{printable(link.path)}: its extent is a redo log for a disk of {log.size_bytes} bytes, but "
                    f"{extent.sectors * SECTOR_BYTES} are stated"
                )
            logs.append(log)
        source = ChainSource(logs, joined) if logs else joined
        opened.pop_all()
    descriptor = with_inherited_ddb(links[0].descriptor, [link.descriptor for link in links[1:]])
    return HostDisk(source, descriptor, links)


def _pieces(base: Link, files: HostFiles, opened: contextlib.ExitStack) -> list[Piece]:
    where = printable(base.path)
    pieces: list[Piece] = []
    known: dict[str, BlockSource] = {}
    for extent in base.descriptor.extents:
        length, start = extent.sectors * SECTOR_BYTES, extent.offset_sectors * SECTOR_BYTES
        if extent.kind == "ZERO":
            pieces.append(Piece(length))
            continue
        _require_plain(extent, where)
        path = _extent_path(base, extent)
        if path not in known:
            known[path] = files.open(path)
            opened.callback(known[path].close)
        if known[path].size_bytes < start + length:
            raise SourceFormat(
                f"{where}: the extent '{printable(extent.file_name)}' is too short: it has {known[path].size_bytes} bytes, "
                f"but {start + length} are stated"
            )
        pieces.append(Piece(length, known[path], start))
    return pieces


def _require_plain(extent: Extent, where: str) -> None:
    kind = printable(extent.kind)
    if kind.startswith("VMFSR"):
        raise SourceUnsupported(
            f"{where} is a raw device mapping ({kind})", hint="back up what it maps from within the guest"
        )
    if "://" in extent.file_name:
        raise SourceUnsupported(
            f"{where}: '{printable(extent.file_name)}' is an object of a storage system, no file"
        )
    if extent.access == "NOACCESS" or kind not in ("VMFS", "FLAT"):
        raise SourceUnsupported(f"{where}: extents of type {extent.access} {kind} can not be read on a host")


def _sole_extent(link: Link) -> Extent:
    extents = link.descriptor.extents
    if len(extents) != 1 or extents[0].kind not in _REDO_LOGS:
        kinds = ", ".join(printable(extent.kind) for extent in extents)
        raise SourceUnsupported(
            f"{printable(link.path)} is a delta disk with extents of type {kinds}, which is not supported",
            hint="consolidate or delete the VM's snapshots first",
        )
    return extents[0]


def _extent_path(link: Link, extent: Extent) -> str:
    return _inside(posixpath.join(posixpath.dirname(link.path), extent.file_name), printable(link.path))


def _inside(path: str, where: str) -> str:
    """The path in its shortest form, if it is a file of a datastore."""
    short = posixpath.normpath(path)
    if not short.startswith(_ROOT) or "\0" in short or short.count("/") < 4:
        raise SourceFormat(f"{where} names '{printable(path)}', which is no file of a datastore")
    return short
