"""A SOURCE becomes a machine: a VM's folder, its .vmx, one .vmdk, a raw image or a block device.

In a folder, every VMDK descriptor and every monolithic sparse file is a disk; the files that hold a
disk's data belong to it; all else is a file of the VM. Which disks must be there the VMX says:
one that is attached but can not be read fails the backup. One that is not attached (left over from a
snapshot, say) and can not be read is kept as plain files, with a warning. Without a VMX, or
with one that attaches nothing, all disks must be readable.

Left out on purpose: `*.vswp` (swap), `*.lck` and `.lck-*` (locks), `*-ctk.vmdk` (change tracking,
worthless after a restore), `*.scoreboard` (statistics of the running VM), `.*.holdfast-partial-*`
(unfinished restores). Left out with a warning: symbolic links, devices, pipes and sockets, and files
whose names are not UTF-8. Disks are never left out silently.

Invariant: the same folder gives the same machine; all is sorted by path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.disk import DiskInfo, Machine, SourceDisk, SourceFile
from holdfast.errors import (
    EmptySource,
    SourceChanged,
    SourceFormat,
    SourceNotFound,
    SourceUnsupported,
)
from holdfast.esxi.handles import source_error
from holdfast.esxi.names import fault_of, free_name, parents_of, printable, stem_of
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.descriptor import parse_descriptor
from holdfast.esxi.vmdk.open import OpenedVmdk, extent_paths, kind_of, open_vmdk
from holdfast.esxi.vmx import MAX_VMX_BYTES, Vmx, parse_vmx

__all__ = ["open_machine"]

_LEFT_OUT_FILES: Final = re.compile(
    r"(.*\.vswp|.*\.lck|\.lck-.*|.*-ctk\.vmdk|.*\.scoreboard|\..*\.holdfast-partial-[0-9a-f]+)\Z",
    re.IGNORECASE | re.DOTALL,
)
_LEFT_OUT_FOLDERS: Final = re.compile(r".*\.lck\Z", re.IGNORECASE | re.DOTALL)
_DEEPEST: Final = 64


def open_machine(source: str, *, name: str | None = None) -> Machine:
    """The machine that SOURCE names, with all its disks and files open for reading.

    Args:
        source: path of a VM folder, a .vmx, a .vmdk, a raw image or a block device. What does not
            end in .vmx or .vmdk is raw, whatever its content.
        name: the machine's name; by default the VMX's `displayName`, or the file's or folder's name.

    Raises:
        SourceNotFound: there is nothing at that path.
        SourceFormat: a descriptor, VMX or extent is malformed, missing or inconsistent.
        SourceUnsupported: it is of a kind that is not backed up.
        SourceUnreadable: permission is missing, or reading failed.
        EmptySource: there is nothing to back up in it.
    """
    try:
        status = os.stat(source)
    except OSError as error:
        raise source_error(error, source) from None
    except ValueError:
        raise SourceNotFound(f"{printable(source)} is no possible path") from None
    lower = source.lower()
    if stat.S_ISDIR(status.st_mode):
        return _open_folder(source, _only_vmx(source), name)
    if stat.S_ISREG(status.st_mode) and lower.endswith(".vmx"):
        folder, vmx_name = posixpath.split(os.path.abspath(source))
        return _open_folder(folder, vmx_name, name)
    if stat.S_ISREG(status.st_mode) and lower.endswith(".vmdk"):
        return _open_vmdk_alone(source, name)
    return _open_raw(source, name)


def _open_raw(source: str, name: str | None) -> Machine:
    file = RawSource(source)
    base = posixpath.basename(os.path.abspath(source))
    try:
        _require_name(base)
        if file.size_bytes == 0:
            raise EmptySource(f"{printable(source)} is empty", hint="is it the right file, and complete?")
    except BaseException:
        file.close()
        raise
    info = DiskInfo(name=base, size_bytes=file.size_bytes, format="raw")
    return Machine(
        kind="disk", name=name or stem_of(base), uuid="", origin=os.path.abspath(source),
        disks=(SourceDisk(info, file),),
    )  # fmt: skip


def _open_vmdk_alone(source: str, name: str | None) -> Machine:
    _require_name(posixpath.basename(os.path.realpath(source)))
    if os.path.getsize(source) == 0:
        raise EmptySource(f"{printable(source)} is empty", hint="is it the right file, and complete?")
    opened = open_vmdk(source)
    return Machine(
        kind="disk", name=name or stem_of(opened.disk.info.name), uuid="", origin=os.path.abspath(source),
        disks=(opened.disk,), warnings=opened.warnings,
    )  # fmt: skip


def _open_folder(folder: str, vmx_name: str, name: str | None) -> Machine:
    root = os.path.realpath(folder)
    listing = _list(root)
    vmx = _read_vmx(posixpath.join(root, vmx_name)) if vmx_name else Vmx("", "", ())
    with contextlib.ExitStack() as opened:
        warnings = [*listing.warnings]
        disks, members, disk_warnings = _open_disks(root, listing.files, vmx, opened)
        warnings += disk_warnings
        files: list[SourceFile] = []
        for path in listing.files:
            if posixpath.join(root, path) in members:
                continue
            try:
                source = RawSource(posixpath.join(root, path), devices=False, follow=False)
            except SourceNotFound:
                warnings.append(f"{printable(path)} vanished while the folder was read, and was left out")
                continue
            opened.callback(source.close)
            files.append(SourceFile(source.file_info(path), source))
        if not disks and not files:
            raise EmptySource(f"{printable(folder)} holds nothing to back up", hint="name the folder of a VM")
        opened.pop_all()
    stored = [file.info.name for file in files] + [disk.info.name for disk in disks]
    inhabited = {parent for path in stored for parent in parents_of(path)}
    fallback = stem_of(vmx_name) if vmx_name else posixpath.basename(os.path.abspath(folder))
    return Machine(
        kind="vm",
        name=name or vmx.display_name or fallback or "vm",
        uuid=vmx.uuid,
        origin=os.path.abspath(posixpath.join(folder, vmx_name) if vmx_name else folder),
        disks=tuple(disks),
        files=tuple(files),
        folders=tuple(path for path in listing.folders if path not in inhabited),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a folder holds, as sorted relative paths."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    warnings: tuple[str, ...]


def _list(root: str) -> _Listing:
    """All that is backed up of a folder.

    Raises:
        SourceUnreadable: a folder can not be listed.
        SourceUnsupported: a disk's name is not UTF-8.
    """
    files: list[str] = []
    folders: list[str] = []
    warnings: list[str] = []
    pending = [""]
    while pending:
        inside = pending.pop()
        try:
            with os.scandir(posixpath.join(root, inside)) as entries:
                found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
            for entry in found:
                path = posixpath.join(inside, entry.name)
                is_folder = entry.is_dir(follow_symlinks=False)
                if (_LEFT_OUT_FOLDERS if is_folder else _LEFT_OUT_FILES).match(entry.name):
                    continue
                kind = _oddity(entry, is_folder=is_folder)
                fault = fault_of(path)
                if fault and entry.name.lower().endswith(".vmdk"):
                    raise SourceUnsupported(
                        f"the path {printable(path)} {fault}", hint="rename the disk; its name must be UTF-8"
                    )
                if kind or fault:
                    reason = f"it is {kind}" if kind else f"its path {fault}"
                    warnings.append(f"{printable(path)} was left out: {reason}")
                elif is_folder:
                    if path.count("/") >= _DEEPEST:
                        raise SourceUnsupported(
                            f"{printable(root)} has folders nested deeper than {_DEEPEST}"
                        )
                    folders.append(path)
                    pending.append(path)
                else:
                    files.append(path)
        except OSError as error:
            raise source_error(error, posixpath.join(root, inside)) from None
    return _Listing(tuple(sorted(files)), tuple(sorted(folders)), tuple(sorted(warnings)))


def _oddity(entry: os.DirEntry[str], *, is_folder: bool) -> str:
    if is_folder or entry.is_file(follow_symlinks=False):
        return ""
    return "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"


def _only_vmx(folder: str) -> str:
    """Name of the folder's .vmx; empty if it has none.

    Raises:
        SourceFormat: there are several, or the only ones lie in folders below.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        found = [one for one in names if one.lower().endswith(".vmx") and _is_file(folder, one)]
        below = [one for one in names if os.path.isdir(posixpath.join(folder, one))] if not found else []
        nested = [
            posixpath.join(one, inner)
            for one in below
            for inner in sorted(os.listdir(posixpath.join(folder, one)))
            if inner.lower().endswith(".vmx")
        ]
    except OSError as error:
        raise source_error(error, folder) from None
    if len(found) > 1:
        raise SourceFormat(
            f"{printable(folder)} holds {len(found)} VMs: {printable(', '.join(found))}",
            hint="name the .vmx of the one that is meant",
        )
    if nested:
        raise SourceFormat(
            f"{printable(folder)} holds no .vmx itself, but {printable(nested[0])} lies below",
            hint="name the folder of one VM",
        )
    return found[0] if found else ""


def _is_file(folder: str, name: str) -> bool:
    path = posixpath.join(folder, name)
    return os.path.isfile(path) and not os.path.islink(path)


def _read_vmx(path: str) -> Vmx:
    file = RawSource(path, devices=False)
    try:
        data = bytearray(min(file.size_bytes, MAX_VMX_BYTES + 1))
        file.read_into(0, memoryview(data))
        return parse_vmx(bytes(data), printable(path))
    finally:
        file.close()


def _open_disks(
    root: str, files: Sequence[str], vmx: Vmx, opened: contextlib.ExitStack
) -> tuple[list[SourceDisk], set[str], list[str]]:
    """The folder's disks, the real paths of all files that they consist of, and warnings.

    Raises:
        SourceFormat, SourceUnsupported: an attached disk is not there or can not be read.
    """
    candidates = _disk_candidates(root, files)
    labels = _attached(root, vmx, candidates)
    found: list[OpenedVmdk] = []
    warnings: list[str] = []
    for path in candidates:
        try:
            disk = open_vmdk(posixpath.join(root, path), root=root)
        except SourceNotFound:
            raise SourceChanged(f"{printable(path)} was removed while the folder was read") from None
        except (SourceFormat, SourceUnsupported) as error:
            if not labels or path in labels:
                raise
            warnings.append(f"{error.message}; as it is not attached, its files were kept as they are")
            continue
        opened.callback(disk.disk.source.close)
        found.append(disk)
    members = {member for disk in found for member in disk.members}
    warnings += [warning for disk in found for warning in disk.warnings]
    taken = {path for path in files if posixpath.join(root, path) not in members}
    taken |= {disk.disk.info.name for disk in found}
    disks = _with_flat_names([disk.disk for disk in found], taken)
    return [_labelled(disk, labels.get(disk.info.name, "")) for disk in disks], members, warnings


def _disk_candidates(root: str, files: Sequence[str]) -> list[str]:
    """Relative paths of all descriptors and monolithic sparse files that are no extent of another."""
    kinds = {}
    extents: set[str] = set()
    for path in files:
        if not path.lower().endswith(".vmdk"):
            continue
        full_path = posixpath.join(root, path)
        file = RawSource(full_path, devices=False, follow=False)
        try:
            kinds[path] = kind_of(file)
            if kinds[path] == "descriptor":
                data = bytearray(file.size_bytes)
                file.read_into(0, memoryview(data))
                # One that can not be parsed names nothing; `open_vmdk` will say what is wrong with it.
                with contextlib.suppress(SourceFormat, ValueError):
                    extents.update(extent_paths(parse_descriptor(bytes(data), path), full_path))
        finally:
            file.close()
    return [
        path
        for path, kind in kinds.items()
        if kind == "descriptor" or (kind == "sparse" and posixpath.join(root, path) not in extents)
    ]


def _attached(root: str, vmx: Vmx, candidates: Sequence[str]) -> dict[str, str]:
    """Relative path -> label of the disks that the VMX attaches.

    Raises:
        SourceFormat: one of them is not among the candidates.
    """
    labels: dict[str, str] = {}
    for disk in vmx.disks:
        shown = printable(disk.file_name)
        try:
            full_path = os.path.realpath(posixpath.join(root, disk.file_name))
        except (OSError, ValueError):
            raise SourceFormat(
                f"the disk '{shown}', attached as {disk.label}, is no possible file name"
            ) from None
        path = posixpath.relpath(full_path, root)
        if path in candidates:
            labels.setdefault(path, disk.label)
        elif path.startswith("../"):
            raise SourceFormat(
                f"the disk '{shown}', attached as {disk.label}, lies outside of the VM's folder",
                hint="move it into the folder, or detach it and back it up by itself",
            )
        elif os.path.exists(full_path):
            raise SourceFormat(
                f"the disk '{shown}', attached as {disk.label}, is no VMDK descriptor or sparse disk"
            )
        else:
            raise SourceFormat(
                f"the disk '{shown}', attached as {disk.label}, is missing from the VM's folder",
                hint="a backup without it would be incomplete: put it there, or detach it",
            )
    return labels


def _with_flat_names(disks: Sequence[SourceDisk], taken: set[str]) -> list[SourceDisk]:
    """The disks with names of flat files that collide with nothing in the restored folder.

    Those that have a flat file keep its name, if another disk does not share the file.
    """
    named: dict[str, SourceDisk] = {}
    in_use = set(taken)
    by_need = sorted(disks, key=lambda disk: disk.info.create_type.lower() not in ("vmfs", "monolithicflat"))
    for disk in by_need:
        info = disk.info
        flat_name = info.flat_name
        if flat_name in in_use:
            flat_name = free_name(stem_of(info.name), "-flat.vmdk", in_use)
        in_use.add(flat_name)
        named[info.name] = SourceDisk(dataclasses.replace(info, flat_name=flat_name), disk.source)
    return [named[disk.info.name] for disk in disks]


def _labelled(disk: SourceDisk, label: str) -> SourceDisk:
    return SourceDisk(dataclasses.replace(disk.info, label=label), disk.source)


def _require_name(base: str) -> None:
    fault = fault_of(base)
    if fault:
        raise SourceUnsupported(f"the name {printable(base)} {fault}", hint="rename the file, or link to it")
