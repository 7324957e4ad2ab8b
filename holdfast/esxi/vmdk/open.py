"""Opening a VMDK: the descriptor and its extents become one source.

    web1.vmdk (text)           -> FLAT / VMFS / SPARSE / ZERO extents in files beside it
    web1.vmdk (KDMV)           -> itself: monolithicSparse, streamOptimized; the descriptor is inside

`extents.py` says which files a descriptor may name.

Not done here: delta disks. `_refuse_delta` is where a chain of parents will be joined; until then
all of them are refused, since their own extents are only a part of the disk.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from holdfast.disk import SECTOR_BYTES, DiskInfo, SourceDisk
from holdfast.errors import (
    EmptySource,
    HoldfastError,
    SourceError,
    SourceFormat,
    SourceUnsupported,
)
from holdfast.esxi.names import free_name, printable, stem_of
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.descriptor import (
    NO_PARENT,
    Descriptor,
    is_plain_flat,
    parse_descriptor,
)
from holdfast.esxi.vmdk.extents import CONSOLIDATE, ExtentTable, longer
from holdfast.esxi.vmdk.joined import JoinedSource, Piece
from holdfast.esxi.vmdk.kinds import VmdkKind, kind_of
from holdfast.esxi.vmdk.sparse import SparseExtent

__all__ = ["OpenedVmdk", "extent_paths", "open_vmdk"]

_LONGEST_CHAIN: Final = 64


@dataclass(frozen=True, slots=True)
class OpenedVmdk:
    """A disk, and what its opening has shown.

    Args:
        members: real paths of all files that the disk consists of, the named one first.
        warnings: sentences.
    """

    disk: SourceDisk
    members: tuple[str, ...]
    warnings: tuple[str, ...]


def open_vmdk(path: str, *, root: str | None = None) -> OpenedVmdk:
    """The disk that a descriptor or a sparse file describes.

    Args:
        path: the file; a symbolic link is followed, and extents are looked for beside its target.
        root: the VM's folder, which no extent may leave and to which `DiskInfo.name` is relative; by
            default the folder that the file is in.

    Raises:
        SourceFormat: the descriptor or an extent is malformed, missing, short or out of bounds.
        SourceUnsupported: it is a delta disk, a raw device mapping or the like.
        SourceNotFound, SourceUnreadable: the file can not be opened.
        EmptySource: the file is empty.
    """
    path = os.path.realpath(path)
    root = os.path.realpath(root) if root is not None else posixpath.dirname(path)
    where = printable(path)
    with contextlib.ExitStack() as opened:
        file = RawSource(path, devices=False)
        opened.callback(file.close)
        if file.size_bytes == 0:
            raise EmptySource(f"{where} is empty", hint="is it the right file, and complete?")
        kind = kind_of(file)
        if kind == "descriptor":
            disk = _open_described(file, path, root, opened)
        elif kind == "sparse":
            disk = _open_sparse(file, path, root)
        else:
            raise _no_disk(kind, path, where)
        opened.pop_all()
    return disk


def extent_paths(descriptor: Descriptor, path: str) -> tuple[str, ...]:
    """Real paths of the files that a descriptor at `path` names, whether or not they are allowed."""
    folder = posixpath.dirname(os.path.realpath(path))
    return tuple(
        os.path.realpath(posixpath.join(folder, e.file_name)) for e in descriptor.extents if e.file_name
    )


def _open_described(file: RawSource, path: str, root: str, opened: contextlib.ExitStack) -> OpenedVmdk:
    where = printable(path)
    data = bytearray(file.size_bytes)
    file.read_into(0, memoryview(data))
    descriptor = parse_descriptor(bytes(data), where)
    _refuse_delta(descriptor, path)
    table = ExtentTable(path, root, file.identity)
    opened.callback(table.close)
    for extent in descriptor.extents:
        table.add(extent)
    table.complete()
    file.close()
    return OpenedVmdk(
        disk=SourceDisk(_info(path, root, descriptor), JoinedSource(table.pieces)),
        members=(path, *table.paths),
        warnings=tuple(table.warnings),
    )


def _open_sparse(file: RawSource, path: str, root: str) -> OpenedVmdk:
    where = printable(path)
    extent = SparseExtent(file, where)
    descriptor = parse_descriptor(extent.descriptor_bytes(), f"{where}, embedded descriptor")
    _refuse_delta(descriptor, path)
    if len(descriptor.extents) != 1 or descriptor.extents[0].kind != "SPARSE":
        raise SourceFormat(f"{where}: the embedded descriptor names other extents than this file")
    stated, held = descriptor.sectors * SECTOR_BYTES, extent.size_bytes
    if stated > held:
        raise SourceFormat(f"{where}: the embedded descriptor states {stated} bytes, the header {held}")
    warnings = () if stated == held else (longer(where, held, stated),)
    source = JoinedSource([Piece(stated, extent)])
    return OpenedVmdk(SourceDisk(_info(path, root, descriptor), source), (path,), warnings)


def _refuse_delta(descriptor: Descriptor, path: str) -> None:
    """Refuses a disk that is only the difference from a parent.

    Raises:
        SourceUnsupported: it is one.
        SourceFormat: its chain of parents comes back to itself.
    """
    if descriptor.parent_cid == NO_PARENT:
        return
    seen = {path}
    for ancestor in _ancestors(descriptor, path):
        if ancestor in seen:
            raise SourceFormat(
                f"{printable(path)}: the chain of its parents comes back to {printable(ancestor)}"
            )
        seen.add(ancestor)
    parent = f", of '{printable(descriptor.parent_hint)}'" if descriptor.parent_hint else ""
    raise SourceUnsupported(f"{printable(path)} is a delta disk{parent}", hint=CONSOLIDATE)


def _ancestors(descriptor: Descriptor, path: str) -> Iterator[str]:
    """Yields the paths of a delta disk's parents, as far as they can be read; at most 64."""
    for _ in range(_LONGEST_CHAIN):
        if descriptor.parent_cid == NO_PARENT or not descriptor.parent_hint or "\0" in descriptor.parent_hint:
            return
        path = os.path.realpath(posixpath.join(posixpath.dirname(path), descriptor.parent_hint))
        yield path
        try:
            descriptor = _read_descriptor(path)
        except HoldfastError:
            return


def _read_descriptor(path: str) -> Descriptor:
    """The descriptor at `path`, of either kind.

    Raises:
        SourceError: there is none.
    """
    file = RawSource(path, devices=False)
    try:
        where = printable(path)
        kind = kind_of(file)
        if kind == "sparse":
            return parse_descriptor(SparseExtent(file, where).descriptor_bytes(), where)
        if kind != "descriptor":
            raise _no_disk(kind, path, where)
        data = bytearray(file.size_bytes)
        file.read_into(0, memoryview(data))
        return parse_descriptor(bytes(data), where)
    finally:
        file.close()


def _info(path: str, root: str, descriptor: Descriptor) -> DiskInfo:
    name = posixpath.relpath(path, root)
    if is_plain_flat(descriptor) and "/" not in descriptor.extents[0].file_name:
        flat_name = posixpath.join(posixpath.dirname(name), descriptor.extents[0].file_name)
    else:
        flat_name = free_name(stem_of(name), "-flat.vmdk", (name,))
    return DiskInfo(
        name=name,
        size_bytes=descriptor.sectors * SECTOR_BYTES,
        format="vmdk",
        flat_name=flat_name,
        descriptor=descriptor.text,
        create_type=descriptor.create_type,
        uuid=descriptor.uuid,
        adapter=descriptor.adapter,
        geometry=descriptor.geometry,
    )


def _no_disk(kind: VmdkKind, path: str, where: str) -> SourceError:
    if kind == "redo log":
        return SourceUnsupported(f"{where} is the redo log of a snapshot", hint=CONSOLIDATE)
    if kind == "sparse extent":
        return SourceFormat(
            f"{where} is one extent of a split disk",
            hint="name the descriptor, the small .vmdk file beside it",
        )
    if path.endswith("-flat.vmdk"):
        descriptor = posixpath.basename(path).removesuffix("-flat.vmdk") + ".vmdk"
        return SourceFormat(
            f"{where} is the data of a disk without its descriptor",
            hint=f"name the descriptor instead: {printable(descriptor)}",
        )
    return SourceFormat(
        f"{where} is neither a VMDK descriptor nor a sparse disk",
        hint="name the descriptor, the small text file; for a raw image use a name that does not end in .vmdk",
    )
