"""Opening a VMDK: the descriptor and its extents become one source.

    web1.vmdk (text)           -> FLAT / VMFS / SPARSE / ZERO extents in files beside it
    web1.vmdk (KDMV)           -> itself: monolithicSparse, streamOptimized; the descriptor is inside

    web1-000001.vmdk (text)    -> a redo log, and web1.vmdk as its parent: a chain, see `chain.py`

`extents.py` says which files a descriptor may name. A parent must be in the VM's folder and have the content id
that its child remembers, or the two are not put together.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from dataclasses import dataclass
from typing import Final

from holdfast.disk import SECTOR_BYTES, DiskInfo, SourceDisk
from holdfast.errors import (
    EmptySource,
    SourceError,
    SourceFormat,
    SourceNotFound,
    SourceUnsupported,
)
from holdfast.esxi.names import free_name, printable, stem_of
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.chain import ChainSource
from holdfast.esxi.vmdk.descriptor import (
    NO_PARENT,
    Descriptor,
    Extent,
    is_plain_flat,
    parse_descriptor,
    with_inherited_ddb,
)
from holdfast.esxi.vmdk.extents import CONSOLIDATE, ExtentTable, longer
from holdfast.esxi.vmdk.hosted import open_hosted
from holdfast.esxi.vmdk.joined import JoinedSource, Piece
from holdfast.esxi.vmdk.kinds import VmdkKind, kind_of
from holdfast.esxi.vmdk.redo import RedoLog
from holdfast.esxi.vmdk.sparse import SparseExtent

__all__ = ["OpenedVmdk", "extent_paths", "open_vmdk", "parent_path", "read_descriptor"]

_LONGEST_CHAIN: Final = 64


@dataclass(frozen=True, slots=True)
class OpenedVmdk:
    """A disk, and what its opening has shown.

    Args:
        members: real paths of all files that the disk consists of, the named one first.
        warnings: sentences.
        parents: real paths of the descriptors below the named one, if it is a delta disk; the nearest first.
    """

    disk: SourceDisk
    members: tuple[str, ...]
    warnings: tuple[str, ...]
    parents: tuple[str, ...] = ()


def open_vmdk(path: str, *, root: str | None = None) -> OpenedVmdk:
    """The disk that a descriptor or a sparse file describes.

    Args:
        path: the file; a symbolic link is followed, and extents are looked for beside its target.
        root: the VM's folder, which no extent may leave and to which `DiskInfo.name` is relative; by
            default the folder that the file is in.

    Raises:
        SourceFormat: the descriptor or an extent is malformed, missing, short or out of bounds, or its
            parents are.
        SourceUnsupported: it is a raw device mapping or the like.
        SourceNotFound, SourceUnreadable: the file can not be opened.
        EmptySource: the file is empty.
    """
    path = os.path.realpath(path)
    root = os.path.realpath(root) if root is not None else posixpath.dirname(path)
    *deltas, base = _chain(_read_link(path), root)
    with contextlib.ExitStack() as opened:
        source, table = _open_base(base, root, opened)
        members, warnings = [base.path, *table.paths], list(table.warnings)
        logs: list[RedoLog] = []
        for link in reversed(deltas):
            log, table = _open_redo_log(link, root, opened)
            logs.insert(0, log)
            members[:0] = [link.path, *table.paths]
        descriptor = with_inherited_ddb(
            (*deltas, base)[0].descriptor, [link.descriptor for link in (*deltas, base)[1:]]
        )
        disk = SourceDisk(_info(path, root, descriptor), ChainSource(logs, source) if logs else source)
        opened.pop_all()
    return OpenedVmdk(disk, tuple(members), tuple(warnings), tuple(link.path for link in (*deltas, base)[1:]))


def extent_paths(descriptor: Descriptor, path: str) -> tuple[str, ...]:
    """Real paths of the files that a descriptor at `path` names, whether or not they are allowed."""
    folder = posixpath.dirname(os.path.realpath(path))
    return tuple(
        os.path.realpath(posixpath.join(folder, e.file_name)) for e in descriptor.extents if e.file_name
    )


def read_descriptor(path: str) -> Descriptor:
    """The descriptor at `path`, of either kind.

    Raises:
        SourceError: there is none, or it makes no sense.
    """
    return _read_link(os.path.realpath(path)).descriptor


def parent_path(descriptor: Descriptor, path: str, root: str) -> str:
    """Real path of the parent that the delta disk at `path` names; it may be missing.

    A parent that is named where it was on its host, by an absolute path, is looked for beside the delta disk: the
    content ids of the two tell whether it is the right one.

    Raises:
        SourceFormat: no parent is named, or one that is not in the VM's folder `root`.
    """
    hint, folder = descriptor.parent_hint, posixpath.dirname(path)
    where, shown = printable(path), printable(hint)
    if not hint:
        raise SourceFormat(f"{where} is a delta disk that does not name its parent", hint=CONSOLIDATE)
    inside = root.rstrip("/") + "/"
    try:
        named = os.path.realpath(posixpath.join(folder, hint))
        beside = os.path.realpath(posixpath.join(folder, posixpath.basename(hint)))
        candidates = [one for one in (named, beside) if one.startswith(inside)]
        found = next((one for one in candidates if os.path.exists(one)), "")
    except (OSError, ValueError):
        raise SourceFormat(f"{where}: its parent '{shown}' is no possible file name") from None
    if found or (candidates and candidates[0] == named):
        return found or named
    raise SourceFormat(
        f"{where}: its parent '{shown}' lies outside of the VM's folder",
        hint="put the parent and its extents into the folder",
    )


@dataclass(frozen=True, slots=True)
class _Link:
    """One descriptor of a chain. `is_sparse`: it lies in a hosted sparse file, which is its own only extent."""

    path: str
    identity: tuple[int, int]
    descriptor: Descriptor
    is_sparse: bool


def _read_link(path: str) -> _Link:
    with contextlib.closing(RawSource(path, devices=False)) as file:
        where = printable(path)
        if file.size_bytes == 0:
            raise EmptySource(f"{where} is empty", hint="is it the right file, and complete?")
        kind = kind_of(file)
        if kind == "sparse":
            text = SparseExtent(file, where).descriptor_bytes()
            descriptor = parse_descriptor(text, f"{where}, embedded descriptor")
        elif kind == "descriptor":
            data = bytearray(file.size_bytes)
            file.read_into(0, memoryview(data))
            descriptor = parse_descriptor(bytes(data), where)
        else:
            raise _no_disk(kind, path, where)
        return _Link(path, file.identity, descriptor, kind == "sparse")


def _chain(top: _Link, root: str) -> list[_Link]:
    """The disk and its parents, down to the one that has none.

    Raises:
        SourceFormat: the chain comes back to itself, is too long, or two of it do not belong together.
    """
    links = [top]
    while links[-1].descriptor.parent_cid != NO_PARENT:
        child = links[-1]
        path = parent_path(child.descriptor, child.path, root)
        if path in [link.path for link in links]:
            raise SourceFormat(
                f"{printable(top.path)}: the chain of its parents comes back to {printable(path)}"
            )
        if len(links) >= _LONGEST_CHAIN:
            raise SourceFormat(
                f"{printable(top.path)}: the chain of its parents is longer than {_LONGEST_CHAIN}"
            )
        try:
            parent = _read_link(path)
        except SourceNotFound:
            raise SourceFormat(
                f"{printable(child.path)}: its parent '{printable(child.descriptor.parent_hint)}' is missing",
                hint="the disk is incomplete without it: copy the whole folder of the VM",
            ) from None
        if parent.descriptor.cid != child.descriptor.parent_cid:
            raise SourceFormat(
                f"{printable(child.path)}: its parent {printable(path)} was changed after the snapshot: its content "
                f"id is {parent.descriptor.cid:08x}, not {child.descriptor.parent_cid:08x}",
                hint="the two do not make up a disk any more: copy the VM's folder again while the VM is off",
            )
        links.append(parent)
    return links


def _open_base(link: _Link, root: str, opened: contextlib.ExitStack) -> tuple[JoinedSource, ExtentTable]:
    """A disk without a parent. Its source is closed by whoever gets it; `opened` does so until then."""
    table = ExtentTable(link.path, root, link.identity)
    opened.callback(table.close)
    if link.is_sparse:
        _open_sparse(link, table, opened)
    else:
        for extent in link.descriptor.extents:
            table.add(extent)
        table.complete()
    return JoinedSource(table.pieces), table


def _open_sparse(link: _Link, table: ExtentTable, opened: contextlib.ExitStack) -> None:
    where = printable(link.path)
    file = RawSource(link.path, devices=False)
    opened.callback(file.close)
    extent = SparseExtent(file, where)
    stated, held = _sole_sparse(link).sectors * SECTOR_BYTES, extent.size_bytes
    if stated > held:
        raise SourceFormat(f"{where}: the embedded descriptor states {stated} bytes, the header {held}")
    if stated < held:
        table.warnings.append(longer(where, held, stated))
    table.pieces.append(Piece(stated, extent))


def _open_redo_log(link: _Link, root: str, opened: contextlib.ExitStack) -> tuple[RedoLog, ExtentTable]:
    table = ExtentTable(link.path, root, link.identity)
    opened.callback(table.close)
    if link.is_sparse:
        file = RawSource(link.path, devices=False)
        opened.callback(file.close)
        log = open_hosted(file, printable(link.path))
        stated = _sole_sparse(link).sectors * SECTOR_BYTES
        if stated != log.size_bytes:
            raise SourceFormat(
                f"{log.where}: the embedded descriptor states {stated} bytes, the header {log.size_bytes}"
            )
        return log, table
    if len(link.descriptor.extents) != 1:
        raise SourceUnsupported(
            f"{printable(link.path)} is a delta disk in {len(link.descriptor.extents)} extents, which is not supported",
            hint=CONSOLIDATE,
        )
    return table.add_redo_log(link.descriptor.extents[0]), table


def _sole_sparse(link: _Link) -> Extent:
    extents = link.descriptor.extents
    if len(extents) != 1 or extents[0].kind != "SPARSE":
        raise SourceFormat(
            f"{printable(link.path)}: the embedded descriptor names other extents than this file"
        )
    return extents[0]


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
        return SourceUnsupported(
            f"{where} is the redo log of a snapshot, without its descriptor",
            hint="name the descriptor instead, the small .vmdk file beside it",
        )
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
