"""The plan of a restore: a value that names every file to be written, and has been checked.

What exists already, what lies inside of the repository and what is no folder where one is needed is found here,
before anything is written. Nothing here writes.

Disks are written readable by their owner alone, as ESXi does; files get the mode and time they had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.cli.places import is_inside
from holdfast.errors import DestinationExists, UsageError, storage_error
from holdfast.esxi.layout import DiskOutput, FileOutput, FolderOutput, TextOutput, restore_layout
from holdfast.repo.points import find_disk

if TYPE_CHECKING:
    from holdfast.disk import DiskInfo
    from holdfast.esxi.layout import RestoreFormat
    from holdfast.repo.format.manifest import ContentTree
    from holdfast.repo.points import Point

__all__ = ["PlannedFile", "RestorePlan", "plan_restore"]

_DISK_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file to be written.

    Args:
        path: where.
        content: from the repository; None if `text` is the content.
        size_bytes: its length, which may be more than the content's: the rest is zeros.
    """

    path: str
    size_bytes: int
    mode: int
    mtime_ns: int | None
    content: ContentTree | None
    text: bytes = b""


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore writes.

    Args:
        root: folder or file that was asked for.
        folders: to be made if they are not there, parents first.
        outputs: in the order in which they get their names.
    """

    root: str
    folders: tuple[str, ...]
    outputs: tuple[PlannedFile, ...]
    overwrite: bool

    @property
    def size_bytes(self) -> int:
        """Length of all files together."""
        return sum(output.size_bytes for output in self.outputs)


def plan_restore(
    repository: str, point: Point, dest: str, *, disk: str | None, as_: RestoreFormat, overwrite: bool
) -> RestorePlan:
    """The plan of a restore. Nothing is written.

    Args:
        repository: its path; nothing is ever restored into it.
        disk: name or label of the only disk that is wanted.

    Raises:
        PointNotFound: there is no such disk.
        DestinationExists: a file is there already, or something that can not be replaced by one.
        UsageError: the destination lies in the repository, or can not hold what is asked for.
        DamagedData: the restore point names impossible paths.
    """
    if not dest or "\0" in dest:
        raise UsageError("the destination is no path")
    manifest = point.manifest
    trees = {entry.info.name: entry.tree for entry in manifest.disks}
    if manifest.kind == "vm" and disk is None:
        outputs = restore_layout(
            "vm",
            [entry.info for entry in manifest.disks],
            [file.info for file in manifest.files],
            manifest.folders,
            as_,
        )
        root = folder = dest
    else:
        chosen = find_disk(point, disk) if disk is not None else manifest.disks[0]
        folder, name = _place_of_disk(chosen.info, dest, as_)
        info = (
            _renamed(chosen.info, name, as_)
            if name
            else dataclasses.replace(
                chosen.info,
                name=posixpath.basename(chosen.info.name),
                flat_name=posixpath.basename(chosen.info.flat_name),
            )
        )
        trees = {info.name: chosen.tree}
        outputs = restore_layout("disk", [info], (), (), as_)
        root = dest
    files = {file.info.name: file.tree for file in manifest.files}
    plan = RestorePlan(
        root=root,
        folders=(
            folder or ".",
            *(os.path.join(folder, o.path) for o in outputs if isinstance(o, FolderOutput)),
        ),
        outputs=tuple(
            _planned(folder, output, trees, files)
            for output in outputs
            if not isinstance(output, FolderOutput)
        ),
        overwrite=overwrite,
    )
    _require_possible(plan, repository)
    return plan


def _place_of_disk(info: DiskInfo, dest: str, as_: RestoreFormat) -> tuple[str, str]:
    """The folder that a single disk goes to, and its name there; an empty one means its own."""
    if dest.endswith("/") or os.path.isdir(dest):
        return dest, ""
    folder, name = os.path.split(dest)
    form = info.format if as_ == "original" else as_
    with contextlib.suppress(OSError):
        if form == "vmdk" and stat.S_ISBLK(os.stat(dest).st_mode):
            raise UsageError(
                f"{dest} is a block device, which can not hold a .vmdk", hint="restore with --as raw"
            )
    return folder, name


def _renamed(info: DiskInfo, name: str, as_: RestoreFormat) -> DiskInfo:
    """The disk's description, such that it is written under exactly this name."""
    form = info.format if as_ == "original" else as_
    flat_name = "" if form == "raw" else f"{posixpath.splitext(name)[0]}-flat.vmdk"
    return dataclasses.replace(info, name=name, format=form, flat_name=flat_name)


def _planned(
    folder: str,
    output: DiskOutput | TextOutput | FileOutput,
    disks: dict[str, ContentTree],
    files: dict[str, ContentTree],
) -> PlannedFile:
    path = os.path.join(folder, output.path)
    if isinstance(output, TextOutput):
        return PlannedFile(path, len(output.data), _DISK_MODE, None, None, output.data)
    if isinstance(output, DiskOutput):
        return PlannedFile(path, output.size_bytes, _DISK_MODE, None, disks[output.disk])
    info = output.info
    return PlannedFile(path, info.size_bytes, info.mode, info.mtime_ns, files[info.name])


def _require_possible(plan: RestorePlan, repository: str) -> None:
    """Finds what stands in the way, before anything is written."""
    for path in (*plan.folders, *(output.path for output in plan.outputs)):
        if is_inside(path, repository):
            raise UsageError(
                f"the destination {path} lies inside of the repository", hint="restore to another place"
            )
    for number, path in enumerate(plan.folders):
        status = _status(
            path, follow=number == 0
        )  # the destination itself may be a link, what is below may not
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise DestinationExists(f"{path} exists and is no folder", hint="choose another destination")
    for output in plan.outputs:
        status = _status(output.path, follow=False)
        if status is None or stat.S_ISBLK((_status(output.path, follow=True) or status).st_mode):
            continue
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise DestinationExists(
                f"{output.path} exists and is no regular file", hint="choose another destination"
            )
        if not plan.overwrite:
            raise DestinationExists(
                f"{output.path} exists already",
                hint="choose another destination, or restore with --overwrite",
            )


def _status(path: str, *, follow: bool) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise DestinationExists(f"{path} can not be made: a file is in the way") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            raise UsageError(f"{path} is no possible path") from None
        raise storage_error(error, f"looking for {path}") from None
