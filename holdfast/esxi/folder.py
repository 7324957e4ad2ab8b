"""A SOURCE becomes a machine: a VM's folder, its .vmx, one .vmdk, a raw image or a block device.

In a folder, `disks.py` finds the disks and the files that belong to them; all else is a file of the VM.

Left out on purpose: `*.vswp` (swap), `*.lck` and `.lck-*` (locks), `*-ctk.vmdk` (change tracking,
worthless after a restore), `*.scoreboard` (statistics of the running VM), `.*.holdfast-partial-*`
(unfinished restores). Left out with a warning: symbolic links, devices, pipes and sockets, files
whose names are not UTF-8, and of a VM with snapshots what describes only these (`*.vmsd`, `*.vmsn`, the memory that
goes with a `.vmsn`): the disks are stored as they are now, and a restored VM must not point to states that it no longer
has. Disks are never left out.

Invariant: the same folder gives the same machine; all is sorted by path.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.disk import DiskInfo, Machine, SourceDisk, SourceFile
from holdfast.errors import (
    EmptySource,
    SourceFormat,
    SourceNotFound,
    SourceUnsupported,
)
from holdfast.esxi.disks import open_disks
from holdfast.esxi.handles import source_error
from holdfast.esxi.names import fault_of, parents_of, printable, stem_of
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.open import open_vmdk
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
        return _open_folder(source, "", name)
    if stat.S_ISREG(status.st_mode) and lower.endswith(".vmx"):
        folder, vmx_name = posixpath.split(os.path.realpath(source))
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
        kind="disk", name=name or stem_of(base), uuid="", origin=printable(os.path.abspath(source)),
        disks=(SourceDisk(info, file),),
    )  # fmt: skip


def _open_vmdk_alone(source: str, name: str | None) -> Machine:
    _require_name(posixpath.basename(os.path.realpath(source)))
    opened = open_vmdk(source)
    return Machine(
        kind="disk", name=name or stem_of(opened.disk.info.name), uuid="", origin=printable(os.path.abspath(source)),
        disks=(opened.disk,), warnings=opened.warnings,
    )  # fmt: skip


def _open_folder(folder: str, vmx_name: str, name: str | None) -> Machine:
    root = os.path.realpath(folder)
    listing = _list(root)
    vmx_name = vmx_name or _only_vmx(listing, folder)
    vmx = _read_vmx(posixpath.join(root, vmx_name)) if vmx_name else Vmx("", "", ())
    with contextlib.ExitStack() as opened:
        found = open_disks(root, listing.files, vmx, opened)
        warnings = [*listing.warnings, *found.warnings]
        files: list[SourceFile] = []
        snapshot_files = _snapshot_files(listing.files) if found.with_snapshots else set()
        if found.with_snapshots:
            warnings.append(_snapshots_warning(found.with_snapshots, snapshot_files))
        for path in listing.files:
            if path in found.members or path in snapshot_files:
                continue
            try:
                source = RawSource(posixpath.join(root, path), devices=False, follow=False)
            except SourceNotFound:
                warnings.append(f"{printable(path)} vanished while the folder was read, and was left out")
                continue
            opened.callback(source.close)
            files.append(SourceFile(source.file_info(path), source))
        if not found.disks and not files:
            raise EmptySource(f"{printable(folder)} holds nothing to back up", hint="name the folder of a VM")
        opened.pop_all()
    stored = [file.info.name for file in files] + [disk.info.name for disk in found.disks]
    inhabited = {parent for path in stored for parent in parents_of(path)}
    fallback = printable(stem_of(vmx_name) if vmx_name else posixpath.basename(root))
    return Machine(
        kind="vm",
        name=name or vmx.display_name or fallback or "vm",
        uuid=vmx.uuid,
        origin=printable(posixpath.join(root, vmx_name)),
        disks=found.disks,
        files=tuple(files),
        folders=tuple(path for path in listing.folders if path not in inhabited),
        warnings=tuple(warnings),
    )


def _snapshot_files(files: Sequence[str]) -> set[str]:
    """What of a VM's files only describes its snapshots. The `.vmem` of a suspended VM is not among it."""
    states = {stem_of(path) for path in files if path.lower().endswith(".vmsn")}
    return {
        path
        for path in files
        if path.lower().endswith((".vmsd", ".vmsn"))
        or (path.lower().endswith(".vmem") and stem_of(path) in states)
    }


def _snapshots_warning(disks: Sequence[str], left_out: Collection[str]) -> str:
    sentence = f"the VM has snapshots: of {printable(', '.join(disks))} the present state was stored, not the earlier ones"
    if left_out:
        sentence += (
            f"; what describes only the snapshots was left out: {printable(', '.join(sorted(left_out)))}"
        )
    return sentence


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


def _only_vmx(listing: _Listing, folder: str) -> str:
    """Name of the folder's .vmx; empty if it has none.

    Raises:
        SourceFormat: there are several, or the only ones lie in folders below.
    """
    found = [path for path in listing.files if path.lower().endswith(".vmx")]
    own = [path for path in found if "/" not in path]
    if len(own) > 1:
        raise SourceFormat(
            f"{printable(folder)} holds {len(own)} VMs: {printable(', '.join(own))}",
            hint="name the .vmx of the one that is meant",
        )
    if found and not own:
        raise SourceFormat(
            f"{printable(folder)} holds no .vmx itself, but {printable(found[0])} lies below",
            hint="name the folder of one VM",
        )
    return own[0] if own else ""


def _read_vmx(path: str) -> Vmx:
    file = RawSource(path, devices=False)
    try:
        data = bytearray(min(file.size_bytes, MAX_VMX_BYTES + 1))
        file.read_into(0, memoryview(data))
        return parse_vmx(bytes(data), printable(path))
    finally:
        file.close()


def _require_name(base: str) -> None:
    fault = fault_of(base)
    if fault:
        raise SourceUnsupported(f"the name {printable(base)} {fault}", hint="rename the file, or link to it")
