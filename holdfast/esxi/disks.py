"""The disks of a VM's folder: which files are disks, which belong to one, and what their flats will be called.

Every VMDK descriptor and every monolithic sparse file is a disk, unless another descriptor names it
as an extent. The VMX says which ones must be there. One that is attached but can not be read fails
the backup. One that is not attached (left over from a snapshot, say) and can not be read is kept as
plain files, with a warning. Without a VMX, or with one that attaches nothing, all must be readable.

Of a VM with snapshots the disk is the delta disk that the VM runs on, joined with its parents; the parents are
part of it and no disks of their own, unless the VMX attaches one. Other ends of the tree of snapshots are disks, too.

Invariant: no disk is dropped silently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.disk import SourceDisk
from holdfast.errors import SourceChanged, SourceFormat, SourceNotFound, SourceUnsupported
from holdfast.esxi.names import free_name, printable, stem_of
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.descriptor import NO_PARENT
from holdfast.esxi.vmdk.kinds import VmdkKind, kind_of
from holdfast.esxi.vmdk.open import OpenedVmdk, extent_paths, open_vmdk, parent_path, read_descriptor
from holdfast.esxi.vmx import Vmx

__all__ = ["FolderDisks", "open_disks"]


@dataclass(frozen=True, slots=True)
class FolderDisks:
    """The disks of a folder.

    Args:
        members: relative paths of all files that the disks consist of.
        warnings: sentences.
        with_snapshots: names of the disks that were joined with parents.
    """

    disks: tuple[SourceDisk, ...]
    members: frozenset[str]
    warnings: tuple[str, ...]
    with_snapshots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Survey:
    """What the `.vmdk` files of a folder are, as relative paths.

    Args:
        candidates: what may be a disk: a delta disk comes before its parents.
        orphans: sorted.
    """

    candidates: tuple[str, ...]
    orphans: tuple[str, ...]


def open_disks(root: str, files: Sequence[str], vmx: Vmx, opened: contextlib.ExitStack) -> FolderDisks:
    """The disks among the files of a VM's folder, open for reading.

    Args:
        root: the folder's real path.
        files: relative paths of its regular files, sorted.
        opened: gets what closes the disks.

    Raises:
        SourceFormat, SourceUnsupported: a disk that must be there is not, or can not be read.
        SourceUnreadable: permission is missing, or reading failed.
        SourceChanged: a file vanished meanwhile.
    """
    survey = _survey(root, files)
    labels = _attached(root, vmx, survey.candidates)
    found: list[OpenedVmdk] = []
    warnings = [
        f"{printable(path)} belongs to no disk of the folder, and was kept as a plain file"
        for path in survey.orphans
    ]
    inner: set[str] = set()
    for path in survey.candidates:
        if path in inner and path not in labels:
            continue
        try:
            disk = open_vmdk(posixpath.join(root, path), root=root)
        except SourceNotFound:
            raise _vanished(path) from None
        except (SourceFormat, SourceUnsupported) as error:
            if not labels or path in labels:
                raise
            warnings.append(f"{error.message}; as it is not attached, its files were kept as they are")
            continue
        opened.callback(disk.disk.source.close)
        found.append(disk)
        inner.update(posixpath.relpath(parent, root) for parent in disk.parents)
        if disk.parents and labels and path not in labels:
            warnings.append(
                f"{printable(path)} is a state of a disk that the VM does not run on (another branch of its "
                "snapshots, or left over): it was kept as a disk of its own"
            )
    found.sort(key=lambda disk: disk.disk.info.name)
    members = frozenset(posixpath.relpath(member, root) for disk in found for member in disk.members)
    taken = (set(files) - members) | {disk.disk.info.name for disk in found}
    disks = _with_flat_names([disk.disk for disk in found], taken)
    return FolderDisks(
        disks=tuple(_labelled(disk, labels.get(disk.info.name, "")) for disk in disks),
        members=members,
        warnings=(*warnings, *(warning for disk in found for warning in disk.warnings)),
        with_snapshots=tuple(disk.disk.info.name for disk in found if disk.parents),
    )


def _survey(root: str, files: Sequence[str]) -> _Survey:
    kinds: dict[str, VmdkKind] = {}
    extents: set[str] = set()
    parents: dict[str, str] = {}
    for path in files:
        if not path.lower().endswith(".vmdk"):
            continue
        full_path = posixpath.join(root, path)
        try:
            file = RawSource(full_path, devices=False, follow=False)
        except SourceNotFound:
            raise _vanished(path) from None
        with contextlib.closing(file):
            kinds[path] = kind_of(file)
        if kinds[path] in ("descriptor", "sparse"):
            # One that can not be parsed names nothing; `open_vmdk` will say what is wrong with it.
            with contextlib.suppress(SourceFormat, SourceUnsupported, ValueError):
                descriptor = read_descriptor(full_path)
                if kinds[path] == "descriptor":
                    extents.update(extent_paths(descriptor, full_path))
                if descriptor.parent_cid != NO_PARENT:
                    parents[path] = posixpath.relpath(parent_path(descriptor, full_path, root), root)
    named = {path for path in kinds if posixpath.join(root, path) in extents}
    candidates = [
        path
        for path, kind in kinds.items()
        if kind == "descriptor" or (kind == "sparse" and path not in named)
    ]
    orphans = [path for path in kinds if path not in candidates and path not in named]
    candidates.sort(key=lambda path: (-_depth(path, parents), path))
    return _Survey(tuple(candidates), tuple(orphans))


def _depth(path: str, parents: Mapping[str, str]) -> int:
    """How many parents a disk has; where they go in a circle, some number."""
    depth = 0
    while path in parents and depth <= len(parents):
        path = parents[path]
        depth += 1
    return depth


def _vanished(path: str) -> SourceChanged:
    return SourceChanged(f"{printable(path)} was removed while the folder was read")


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
