"""Which files a restore writes, and where: a plan, made from what a manifest says.

    folders, then disks, then descriptors, then the VM's files: a descriptor never stands before the
    data it names, the .vmx never before its disks

Pure: the plan is carried out by the caller. A manifest may be forged, so that every path is checked
to stay inside of the destination, and none is used twice or as both a file and a folder.

Files are restored byte for byte, the .vmx too: it is not adapted when disks are written `as_="raw"`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from holdfast.disk import SECTOR_BYTES, DiskInfo, FileInfo, MachineKind
from holdfast.errors import DamagedData, SourceFormat
from holdfast.esxi import text as texts
from holdfast.esxi.names import fault_of, free_name, parents_of, printable, stem_of
from holdfast.esxi.vmdk.descriptor import MAX_SECTORS, flat_descriptor

__all__ = [
    "DiskOutput",
    "FileOutput",
    "FolderOutput",
    "Output",
    "RestoreFormat",
    "TextOutput",
    "restore_layout",
]

RestoreFormat = Literal["original", "raw", "vmdk"]


@dataclass(frozen=True, slots=True)
class FolderOutput:
    """A folder to be made. All folders above it come before it in the plan."""

    path: str


@dataclass(frozen=True, slots=True)
class DiskOutput:
    """A disk's bytes as one flat file.

    Args:
        path: relative to the destination.
        disk: `DiskInfo.name`.
        size_bytes: length of the file; up to a sector more than the disk where a VMDK needs whole
            sectors. The rest is zeros.
    """

    path: str
    disk: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TextOutput:
    """A small file that the plan itself holds: a descriptor."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class FileOutput:
    """One of the VM's files, to be written as it was."""

    path: str
    info: FileInfo


Output: TypeAlias = FolderOutput | DiskOutput | TextOutput | FileOutput


def restore_layout(
    kind: MachineKind,
    disks: Sequence[DiskInfo],
    files: Sequence[FileInfo],
    folders: Sequence[str],
    as_: RestoreFormat | Literal["view"],
) -> tuple[Output, ...]:
    """What a restore of these disks and files writes, in order.

    Args:
        kind: a `vm` may have files and folders, a `disk` has neither.
        disks: those that are to be restored, as the manifest has them.
        files, folders: likewise; folders that hold a file need not be named.
        as_: `original`: VMDKs as descriptor and flat file, raw images as they were; `raw` and
            `vmdk`: all disks in that form; `view`: as VMDKs that any program can open where they are
            (`monolithicFlat`), raw images under their own names as well.

    Raises:
        DamagedData: the manifest names a path that leaves the destination, or one twice, or its
            values contradict each other.
    """
    if kind == "disk" and (files or folders):
        raise DamagedData("the restore point is one of a single disk, but lists files as well")
    taken = {file.name for file in files} | {disk.name for disk in disks} | {disk.flat_name for disk in disks}
    data: list[DiskOutput] = []
    descriptors: list[TextOutput] = []
    for disk in disks:
        _require_sane(disk.name, "disk")
        if not 0 <= disk.size_bytes <= MAX_SECTORS * SECTOR_BYTES:
            raise DamagedData(
                f"the disk {printable(disk.name)} has an impossible size of {disk.size_bytes} bytes"
            )
        form = disk.format if as_ == "original" else as_
        if form == "raw":
            path = disk.name if disk.format == "raw" else free_name(stem_of(disk.name), ".raw", taken)
            taken.add(path)
            data.append(DiskOutput(path, disk.name, disk.size_bytes))
            continue
        if as_ == "view" and disk.format == "raw":
            data.append(DiskOutput(disk.name, disk.name, disk.size_bytes))
        flat, descriptor = _as_vmdk(disk, taken, vmfs=as_ != "view")
        taken |= {flat.path, descriptor.path}
        data.append(flat)
        descriptors.append(descriptor)
    for file in files:
        if not 0 <= file.size_bytes < 1 << 63:
            raise DamagedData(
                f"the file {printable(file.name)} has an impossible size of {file.size_bytes} bytes"
            )
    contents: list[DiskOutput | TextOutput | FileOutput] = [
        *data,
        *descriptors,
        *(FileOutput(file.name, file) for file in files),
    ]
    return (*_folders(contents, folders), *contents)


def _as_vmdk(disk: DiskInfo, taken: set[str], *, vmfs: bool) -> tuple[DiskOutput, TextOutput]:
    stem = stem_of(disk.name)
    if disk.format == "vmdk":
        path, flat_path = disk.name, disk.flat_name
        _require_sane(flat_path, "flat file")
    else:
        path = free_name(stem, ".vmdk", taken)
        flat_path = free_name(stem_of(path), "-flat.vmdk", taken)
    folder = posixpath.dirname(path)
    if posixpath.dirname(flat_path) != folder:
        raise DamagedData(
            f"the flat file of {printable(disk.name)} lies in another folder than its descriptor"
        )
    try:
        text = flat_descriptor(
            disk.descriptor, disk.size_bytes, posixpath.basename(flat_path),
            adapter=disk.adapter, uuid=disk.uuid, geometry=disk.geometry, vmfs=vmfs,
        )  # fmt: skip
        encoded = texts.encode(text)
    except (SourceFormat, UnicodeEncodeError) as error:
        reason = error.message if isinstance(error, SourceFormat) else "it is not valid Unicode"
        raise DamagedData(
            f"the stored descriptor of {printable(disk.name)} can not be used: {reason}"
        ) from None
    whole_sectors = -(-disk.size_bytes // SECTOR_BYTES) * SECTOR_BYTES
    return DiskOutput(flat_path, disk.name, whole_sectors), TextOutput(path, encoded)


def _folders(
    contents: Iterable[DiskOutput | TextOutput | FileOutput], named: Sequence[str]
) -> list[FolderOutput]:
    """All folders that are needed, parents first, after a check of all paths."""
    used: set[str] = set()
    needed: set[str] = set()
    for output in contents:
        _require_sane(output.path, "file")
        if output.path in used:
            raise DamagedData(f"the restore point names {printable(output.path)} twice")
        used.add(output.path)
        needed.update(parents_of(output.path))
    for folder in named:
        _require_sane(folder, "folder")
        needed.update([*parents_of(folder), folder])
    for path in sorted(needed & used):
        raise DamagedData(f"the restore point names {printable(path)} both as a file and as a folder")
    return [FolderOutput(path) for path in sorted(needed)]


def _require_sane(path: str, what: str) -> None:
    fault = fault_of(path)
    if fault:
        raise DamagedData(
            f"the path '{printable(path)}' of a {what} in the restore point {fault}",
            hint="it would be written outside of the destination, or nowhere: nothing was restored",
        )
