"""Opening a VMDK: the descriptor and its extents become one source.

    web1.vmdk (text)           -> FLAT / VMFS / SPARSE / ZERO extents in files beside it
    web1.vmdk (KDMV)           -> itself: monolithicSparse, streamOptimized; the descriptor is inside

Descriptors come from strangers, so the files that they name must be regular files inside of the
VM's folder, links resolved; no area of a file belongs to a disk twice; a file that is shorter than
stated is refused. One that is longer is read as far as the descriptor says, as ESXi does, with a
warning.

Not done here: delta disks. `_refuse_delta` is where a chain of parents will be joined; until then
all of them are refused, since their own extents are only a part of the disk.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from holdfast.disk import SECTOR_BYTES, BlockSource, DiskInfo, SourceDisk
from holdfast.errors import (
    EmptySource,
    HoldfastError,
    SourceError,
    SourceFormat,
    SourceNotFound,
    SourceUnsupported,
)
from holdfast.esxi.names import free_name, printable, stem_of
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.descriptor import (
    MAX_DESCRIPTOR_BYTES,
    NO_PARENT,
    Descriptor,
    Extent,
    is_plain_flat,
    looks_like_descriptor,
    parse_descriptor,
)
from holdfast.esxi.vmdk.joined import JoinedSource, Piece
from holdfast.esxi.vmdk.sparse import SPARSE_MAGIC, SparseExtent

__all__ = ["OpenedVmdk", "VmdkKind", "extent_paths", "kind_of", "open_vmdk"]

VmdkKind = Literal["descriptor", "sparse", "sparse extent", "redo log", "data"]
"""What a `.vmdk` file is by its first bytes; `data` may be a flat extent or anything else."""

_COWD_MAGIC: Final = b"COWD"
_SESPARSE_MAGIC: Final = b"\xbe\xba\xfe\xca\x00\x00\x00\x00"
_UNSUPPORTED_KINDS: Final = {
    "VMFSSPARSE": "a redo log of a snapshot",
    "SESPARSE": "a redo log of a snapshot",
    "VMFSRDM": "a raw device mapping",
    "VMFSRAW": "a raw device mapping",
}
_CONSOLIDATE: Final = (
    "delta disks are not supported in this version: consolidate or delete the VM's snapshots first"
)
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


def kind_of(file: BlockSource) -> VmdkKind:
    """What the file is by its content.

    A flat extent's content is the guest's, who could write the beginning of a descriptor there: a
    text of more than a descriptor's size is data.

    Raises:
        SourceError: it can not be read.
    """
    head = bytearray(min(file.size_bytes, SECTOR_BYTES))
    file.read_into(0, memoryview(head))
    if head.startswith(SPARSE_MAGIC):
        return "sparse" if _has_descriptor(file, bytes(head)) else "sparse extent"
    if head.startswith((_COWD_MAGIC, _SESPARSE_MAGIC)):
        return "redo log"
    if looks_like_descriptor(bytes(head)) and file.size_bytes <= MAX_DESCRIPTOR_BYTES:
        return "descriptor"
    return "data"


def _has_descriptor(file: BlockSource, head: bytes) -> bool:
    """Whether a sparse extent has a descriptor inside. The parts of a split disk have none, or an empty one.

    A header that makes no sense counts as that of a whole disk, so that opening it says what is wrong.
    """
    if len(head) < SECTOR_BYTES:
        return True
    offset = int.from_bytes(head[28:36], "little") * SECTOR_BYTES
    if not 0 < offset < file.size_bytes:
        return offset > 0
    text = bytearray(min(SECTOR_BYTES, file.size_bytes - offset))
    file.read_into(offset, memoryview(text))
    return any(text)


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
    table = _ExtentTable(path, root, file.identity)
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
    warnings = () if stated == held else (_longer(where, held, stated),)
    source = JoinedSource([Piece(stated, extent)])
    return OpenedVmdk(SourceDisk(_info(path, root, descriptor), source), (path,), warnings)


class _ExtentTable:
    """Collects the pieces of a disk from its descriptor's extents, with all that must be checked."""

    def __init__(self, descriptor_path: str, root: str, descriptor_identity: tuple[int, int]) -> None:
        self.pieces: list[Piece] = []
        self.paths: list[str] = []
        self.warnings: list[str] = []
        self._path = descriptor_path
        self._root = root
        self._identity = descriptor_identity
        self._where = printable(descriptor_path)
        self._files: dict[tuple[int, int], RawSource] = {}
        self._sparse: set[tuple[int, int]] = set()
        self._used: list[tuple[tuple[int, int], int, int, str]] = []

    def add(self, extent: Extent) -> None:
        """Opens one extent.

        Raises:
            SourceFormat, SourceUnsupported: as `open_vmdk` says.
        """
        length = extent.sectors * SECTOR_BYTES
        if extent.access == "NOACCESS":
            raise SourceUnsupported(
                f"{self._where}: an extent is marked NOACCESS, so the disk can not be read"
            )
        if extent.kind in _UNSUPPORTED_KINDS:
            what = _UNSUPPORTED_KINDS[extent.kind]
            hint = _CONSOLIDATE if "SPARSE" in extent.kind else "back up what it maps from within the guest"
            raise SourceUnsupported(f"{self._where}: the extent {extent.kind} is {what}", hint=hint)
        if extent.kind == "ZERO":
            self.pieces.append(Piece(length))
            return
        if extent.kind not in ("FLAT", "VMFS", "SPARSE"):
            raise SourceUnsupported(
                f"{self._where}: extents of type {printable(extent.kind)} are not supported"
            )
        path = self._resolve(extent.file_name)
        file = self._open(path, extent.file_name)
        name = printable(extent.file_name)
        if extent.kind == "SPARSE":
            self._add_sparse(extent, file, name)
        else:
            self._add_flat(extent, file, name)

    def complete(self) -> None:
        """Checks what only shows when all extents are known.

        Raises:
            SourceFormat: an area of a file occurs twice in the disk.
        """
        self._used.sort()
        reached = {identity: (end, name) for identity, _, end, name in self._used}
        for identity, (end, name) in reached.items():
            held = self._files[identity].size_bytes
            if held > end:
                self.warnings.append(_longer(f"{self._where}: the extent '{name}'", held, end))
        for (identity, _, end, name), (following, start, _, _) in zip(
            self._used, self._used[1:], strict=False
        ):
            if identity == following and start < end:
                raise SourceFormat(f"{self._where}: two extents overlap in {name}")

    def close(self) -> None:
        """Closes the files of all extents."""
        for file in self._files.values():
            file.close()

    def _resolve(self, name: str) -> str:
        """The real path of an extent file.

        Raises:
            SourceFormat: the name leads out of the VM's folder.
            SourceUnsupported: it is no file name.
        """
        shown = printable(name)
        if "://" in name:
            raise SourceUnsupported(
                f"{self._where}: the extent '{shown}' is an object of a storage system, no file"
            )
        if name.startswith("/") or ".." in name.split("/"):
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' lies outside of the VM's folder",
                hint="extents must be named relative to the descriptor, without '..'",
            )
        try:
            path = os.path.realpath(posixpath.join(posixpath.dirname(self._path), name))
        except (OSError, ValueError):
            raise SourceFormat(f"{self._where}: the extent '{shown}' is no possible file name") from None
        if not path.startswith(self._root.rstrip("/") + "/"):
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' is a link that leads out of the VM's folder",
                hint="put the extent itself into the folder",
            )
        return path

    def _open(self, path: str, name: str) -> RawSource:
        shown = printable(name)
        try:
            file = RawSource(path, devices=False, follow=False)
        except SourceNotFound:
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' is missing",
                hint=f"put {printable(posixpath.basename(name))} beside the descriptor, where it belongs",
            ) from None
        except SourceUnsupported as error:
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' is no regular file", hint=error.hint
            ) from None
        if file.identity == self._identity:
            file.close()
            raise SourceFormat(f"{self._where}: the descriptor names itself as its extent '{shown}', a loop")
        known = self._files.setdefault(file.identity, file)
        if known is file:
            self.paths.append(path)
        else:
            file.close()
        return known

    def _add_flat(self, extent: Extent, file: RawSource, name: str) -> None:
        start, length = extent.offset_sectors * SECTOR_BYTES, extent.sectors * SECTOR_BYTES
        if kind_of(file) == "descriptor":
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is itself a descriptor, not a disk's data"
            )
        if file.size_bytes < start + length:
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is too short: it has {file.size_bytes} bytes, "
                f"but {start + length} are stated",
                hint="the file is truncated: copy it again from where it came",
            )
        self._used.append((file.identity, start, start + length, name))
        self.pieces.append(Piece(length, file, start))

    def _add_sparse(self, extent: Extent, file: RawSource, name: str) -> None:
        length = extent.sectors * SECTOR_BYTES
        if file.identity in self._sparse:
            raise SourceFormat(f"{self._where}: the sparse extent '{name}' occurs twice")
        self._sparse.add(file.identity)
        sparse = SparseExtent(file, f"{self._where}: extent '{name}'")
        if sparse.size_bytes < length:
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is too short: it holds {sparse.size_bytes} bytes, "
                f"but {length} are stated"
            )
        if sparse.size_bytes > length:
            self.warnings.append(_longer(f"{self._where}: the extent '{name}'", sparse.size_bytes, length))
        self._used.append((file.identity, 0, file.size_bytes, name))
        self.pieces.append(Piece(length, sparse))


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
    raise SourceUnsupported(f"{printable(path)} is a delta disk{parent}", hint=_CONSOLIDATE)


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


def _longer(what: str, held: int, stated: int) -> str:
    return (
        f"{what} holds {held} bytes, but only the {stated} that the descriptor states belong to the disk; "
        "the rest was left out"
    )


def _no_disk(kind: VmdkKind, path: str, where: str) -> SourceError:
    if kind == "redo log":
        return SourceUnsupported(f"{where} is the redo log of a snapshot", hint=_CONSOLIDATE)
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
