"""What joins a repository, the knowledge of VMDK, and a mount: the commands `mount` and `umount` are made of this."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.cli.output import shown
from holdfast.cli.views import point_details_json
from holdfast.errors import DamagedData
from holdfast.esxi.layout import DiskOutput, FileOutput, FolderOutput, TextOutput, restore_layout
from holdfast.esxi.names import free_name
from holdfast.fuse.files import Entry, Layout

if TYPE_CHECKING:
    from holdfast.repo.points import Point
    from holdfast.repo.repository import Repository

__all__ = ["MountPlan", "describe", "log_to_stderr", "log_to_system", "serve_mount"]

_POINT_FILE: Final = "restore-point"
_M_ARENA_MAX: Final = -8  # malloc.h of the GNU C library


_WAITING_THREADS = 6
"""More than one per core, where the repository is far: they wait for answers."""


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What is to be mounted.

    Args:
        place: the folder, checked.
        vm: only this one.
    """

    place: str
    vm: str | None
    shared: bool
    cache_bytes: int


def describe(point: Point) -> Layout:
    """What is in the folder of a restore point."""
    manifest = point.manifest
    text = json.dumps(point_details_json(point), indent=2).encode() + b"\n"
    try:
        planned = restore_layout(
            manifest.kind,
            [disk.info for disk in manifest.disks],
            [file.info for file in manifest.files],
            manifest.folders,
            "view",
        )
    except DamagedData:  # a forged manifest; what it says of itself can be read all the same
        return Layout((Entry(f"{_POINT_FILE}.json", len(text), text=text),))
    disks = {disk.info.name: disk.tree for disk in manifest.disks}
    files = {file.info.name: file.tree for file in manifest.files}
    entries: list[Entry] = []
    folders: list[str] = []
    for output in planned:
        if isinstance(output, FolderOutput):
            folders.append(output.path)
        elif isinstance(output, DiskOutput):
            entries.append(Entry(output.path, output.size_bytes, disks[output.disk], disk=output.disk))
        elif isinstance(output, TextOutput):
            entries.append(Entry(output.path, len(output.data), text=output.data))
        else:
            assert isinstance(output, FileOutput)
            info = output.info
            entries.append(Entry(output.path, info.size_bytes, files[info.name], mtime_ns=info.mtime_ns))
    taken = {entry.path for entry in entries} | set(folders)
    name = free_name(_POINT_FILE, ".json", taken)
    return Layout((*entries, Entry(name, len(text), text=text)), tuple(folders))


def serve_mount(
    repository: Repository, plan: MountPlan, log: Callable[[str], None], ready: Callable[[], None]
) -> None:
    """Mounts, and returns when that is over. Nothing of the repository but its configuration may be open yet.

    Raises:
        MountFailed: it can not be mounted.
        IntegrityError, RepositoryError: the repository can not be read.
    """
    from holdfast.fuse.binding import MountOptions, require_libfuse, serve
    from holdfast.fuse.reading import ReadAhead
    from holdfast.fuse.view import View

    require_libfuse()
    _keep_memory_together()
    repository.notify_by(log)
    live = repository.live("mount", plan.cache_bytes, plan.vm)
    threads = (os.cpu_count() or 1) + (_WAITING_THREADS if repository.is_far else 0)
    options = MountOptions(plan.place, repository.path, plan.shared, live.stored_bytes, threads + 1)
    ahead = ReadAhead(threads, plan.cache_bytes)
    view = View(live, describe, ahead, log, shared=plan.shared)

    def begun() -> None:
        live.start()
        ahead.start()
        ready()

    try:
        serve(view, options, begun)
    finally:
        ahead.close()
        live.close()
        repository.close()


def _keep_memory_together() -> None:
    """Has all threads take memory from one place.

    What one thread decodes another one drops from the cache. With a heap for each thread, as the C library would have
    it, that leaves twice the cache's size in pieces that nobody can use, and reads take half as long again (measured).
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # not every C library has it
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def log_to_stderr(line: str) -> None:
    """A line of the log, where somebody watches the process."""
    print(f"holdfast: {shown(line)}", file=sys.stderr, flush=True)


def log_to_system(line: str) -> None:
    """A line of the log, where nobody does."""
    import syslog

    syslog.openlog("holdfast", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, shown(line))
