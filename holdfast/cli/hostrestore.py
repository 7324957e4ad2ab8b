"""`holdfast restore POINT esxi://HOST/DATASTORE[/NAME]`: the engine's bytes, the host's folder and VM joined."""

from __future__ import annotations

import contextlib
import posixpath
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.linked import open_session, parse_esxi
from holdfast.errors import DestinationExists, SourceNotFound, UsageError
from holdfast.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.cli.progress import Progress
    from holdfast.esxi.host import HostSession
    from holdfast.esxi.inventory import Vm
    from holdfast.repo.format.manifest import PointDisk
    from holdfast.repo.points import Point
    from holdfast.repo.repository import Repository

__all__ = ["BroughtBack", "HostRestore", "bring_back"]

_LEFT_BEHIND = (".vmx", ".vmsd", ".log", ".vmdk")


@dataclass(frozen=True, slots=True)
class HostRestore:
    """What is wanted.

    Args:
        new_uuid: None: a new one if the VM that was backed up is still registered there, else its own.
    """

    disk: str | None = None
    register: bool = False
    power_on: bool = False
    new_uuid: bool | None = None
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class BroughtBack:
    """What was done. `vm_id` is None where nothing was registered."""

    folder: str
    bytes_written: int
    size_bytes: int
    duration_s: float
    vm_id: int | None
    warnings: tuple[str, ...]


def bring_back(
    repository: Repository,
    point: Point,
    dest: str,
    wanted: HostRestore,
    progress: Progress,
    workers: int | None,
    note: Callable[[str], None],
) -> BroughtBack:
    """Restores a point to a host.

    Args:
        note: told step by step what is done, for a log.

    Raises:
        DestinationExists: the folder exists, and it was not said that it may be changed.
        StorageError: the datastore can not be written.
        IntegrityError: the repository is damaged.
        LinkError: the connection is over; the folder is marked, and the same command goes on with it.
    """
    place = parse_esxi(dest)
    store, _, name = place.rest.partition("/")
    name = name.strip("/") or _folder_name(point.manifest.vm_name)
    if not store or "/" in name or name in (".", ".."):
        raise UsageError(
            f"'{dest}' names no folder of a datastore",
            hint="write esxi://HOST/DATASTORE or esxi://HOST/DATASTORE/NEWNAME",
        )
    with open_session(place.host, note) as session:
        session.note_host()
        _require_datastore(session, store)
        folder = f"/vmfs/volumes/{store}/{name}"
        began_s = time.monotonic()
        if wanted.in_place:
            written, warnings = _in_place(repository, point, session, folder, wanted, progress)
            vm_id = None
        else:
            written, vm_id, warnings = _anew(
                repository, point, session, folder, name, wanted, progress, workers
            )
    size = sum(disk.info.size_bytes for disk in _chosen(point, wanted.disk))
    return BroughtBack(folder, written, size, time.monotonic() - began_s, vm_id, tuple(warnings))


def _anew(
    repository: Repository,
    point: Point,
    session: HostSession,
    folder: str,
    name: str,
    wanted: HostRestore,
    progress: Progress,
    workers: int | None,
) -> tuple[int, int | None, list[str]]:
    from holdfast.esxi.agented import AgentFiles
    from holdfast.esxi.bringback import HostSink, NewFolder, new_disk_names, register, write_differences
    from holdfast.esxi.newvmx import make_vmx
    from holdfast.esxi.running import PowerSwitch

    disks = _chosen(point, wanted.disk)
    names = new_disk_names([disk.info for disk in disks])
    target = NewFolder(session, folder, point.id.hex())
    target.claim()
    session.note(
        f"going on with the folder {folder}, which an interrupted run has left"
        if target.resumed
        else f"made the folder {folder}, marked incomplete"
    )
    new_uuid = (
        wanted.new_uuid if wanted.new_uuid is not None else _is_registered(session, point.manifest.vm_uuid)
    )
    total = sum(disk.info.size_bytes for disk in disks)
    written = 0
    with contextlib.closing(AgentFiles(session.bulk.start)) as files:
        flats = [(disk, target.make_disk(disk.info, names[disk.info.name])) for disk in disks]
        for disk, flat in flats:
            session.note(f"writing {disk.info.name} ({format_size(disk.info.size_bytes)}) to {flat}")
        if target.resumed:
            done = 0
            for disk, flat in flats:
                with contextlib.closing(repository.open_content(disk.tree)) as reader:
                    written += write_differences(
                        files.link,
                        files.link.open(flat, writable=True),
                        disk.info.size_bytes,
                        lambda offset, length, reader=reader: reader.pread(offset, length),  # type: ignore[misc]
                        lambda compared, new, done=done: progress.update(
                            done + compared, total, bytes_written=new
                        ),  # type: ignore[misc]
                    )
                done += disk.info.size_bytes
        elif flats:
            sinks = [HostSink(files.link, files.link.open(flat, writable=True)) for _, flat in flats]
            counters = repository.restore(
                point,
                [(disk.tree, sink) for (disk, _), sink in zip(flats, sinks, strict=True)],
                workers=workers,
                on_progress=lambda c: progress.update(c.bytes_done, total, bytes_written=c.bytes_written),
            )
            for sink in sinks:
                sink.finish()
            written = counters.bytes_written
    session.note(f"{format_size(written)} were written, read back and found right")
    for disk in disks:
        if not new_uuid:
            target.keep_disk_uuid(disk.info, names[disk.info.name])
        target.check_disk(names[disk.info.name])
    vmx_name, nvram, vmx = "", "", b""
    for file in point.manifest.files:
        base = posixpath.basename(file.info.name)
        data = _content(repository, file.tree) if file.info.size_bytes < 1 << 27 else b""
        if base.lower().endswith(".vmx"):
            vmx_name, vmx = base, data
        elif "/" not in file.info.name and not base.lower().endswith(_LEFT_BEHIND) and data:
            target.put(base, data)
            nvram = base if base.lower().endswith(".nvram") else nvram
    warnings: list[str] = []
    if vmx_name:
        given = name if name != _folder_name(point.manifest.vm_name) else point.manifest.vm_name
        made = make_vmx(
            vmx, names, name=given, nvram=nvram, new_uuid=new_uuid, version=session.view.version()
        )
        warnings += made.warnings
        target.put(vmx_name, made.data)
    target.complete()
    session.note("the folder is complete, and no longer marked")
    if not (wanted.register or wanted.power_on):
        return written, None, warnings
    if not vmx_name:
        raise UsageError(
            "the restore point is of a single disk: there is no VM to register", hint="leave --register out"
        )
    vm = register(session, f"{folder}/{vmx_name}", given)
    session.note(f"registered {vm.shown}, UUIDs {'new' if new_uuid else 'kept'}")
    if wanted.power_on:
        PowerSwitch(session.view, session.patience).start(vm, copied=new_uuid)
        session.note("it was started")
    return written, vm.id, warnings


def _in_place(
    repository: Repository,
    point: Point,
    session: HostSession,
    folder: str,
    wanted: HostRestore,
    progress: Progress,
) -> tuple[int, list[str]]:
    from holdfast.esxi.agented import AgentFiles
    from holdfast.esxi.bringback import write_differences
    from holdfast.esxi.hostdisk import read_chain

    vm = _registered_in(session, folder)
    _require_still(session, vm)
    disks = _chosen(point, wanted.disk)
    flats = []
    for disk, path in _matched(session, vm, disks):
        links = read_chain(path, session.console.read)
        extents = links[0].descriptor.extents
        if len(links) > 1 or len(extents) != 1 or extents[0].kind not in ("VMFS", "FLAT"):
            raise DestinationExists(
                f"{path} can not be written in place: it has snapshots, or several extents"
            )
        if extents[0].sectors * 512 != disk.info.size_bytes:
            raise DestinationExists(
                f"{path} has {extents[0].sectors * 512} bytes, and the disk of the restore point {disk.info.size_bytes}",
                hint="restore it into a new folder",
            )
        flats.append((disk, posixpath.join(posixpath.dirname(path), extents[0].file_name)))
    for disk, flat in flats:
        session.note(f"writing what differs in {flat} of {vm.shown} from {disk.info.name}")
    total, done, written = sum(disk.info.size_bytes for disk, _ in flats), 0, 0
    with contextlib.closing(AgentFiles(session.bulk.start)) as files:
        for disk, flat in flats:
            with contextlib.closing(repository.open_content(disk.tree)) as reader:
                written += write_differences(
                    files.link,
                    files.link.open(flat, writable=True),
                    disk.info.size_bytes,
                    lambda offset, length, reader=reader: reader.pread(offset, length),  # type: ignore[misc]
                    lambda compared, new, done=done: progress.update(
                        done + compared, total, bytes_written=new
                    ),  # type: ignore[misc]
                )
            done += disk.info.size_bytes
    _require_still(session, vm)
    return written, []


def _matched(session: HostSession, vm: Vm, disks: list[PointDisk]) -> list[tuple[PointDisk, str]]:
    """The descriptor on the host that each disk of the point belongs to."""
    from holdfast.esxi.snapshots import attached_paths, read_vmx

    attached = attached_paths(vm, read_vmx(session.view, vm)[1])
    by_name = {posixpath.basename(path): path for path in attached.values()}
    found = []
    for disk in disks:
        path = attached.get(disk.info.label) or by_name.get(posixpath.basename(disk.info.name))
        if path is None:
            raise SourceNotFound(
                f"{vm.shown} has no disk for {disk.info.name} ({disk.info.label})",
                hint="attach one of the same size, or restore into a new folder",
            )
        found.append((disk, path))
    return found


def _require_still(session: HostSession, vm: Vm) -> None:
    if session.view.power(vm) != "off":
        raise DestinationExists(
            f"{vm.shown} is not off", hint="shut it down before its disks are written in place"
        )
    if session.view.snapshots(vm):
        raise DestinationExists(
            f"{vm.shown} has snapshots", hint="remove them first, or restore into a new folder"
        )


def _registered_in(session: HostSession, folder: str) -> Vm:
    for vm in session.view.vms():
        if vm.folder == folder:
            return vm
    raise SourceNotFound(
        f"no VM is registered in {folder}",
        hint="--in-place is for a VM that is there; leave it out to make a new one",
    )


def _is_registered(session: HostSession, uuid: str) -> bool:
    return any(uuid in (vm.uuid, vm.instance_uuid) for vm in session.view.vms())


def _require_datastore(session: HostSession, store: str) -> None:
    volumes = session.view.volumes()
    if all(store not in (volume.name, volume.uuid) or not volume.mounted for volume in volumes):
        known = ", ".join(volume.name for volume in volumes if volume.mounted and volume.name)
        raise SourceNotFound(f"the host has no datastore '{store}'", hint=f"it has {known}")


def _chosen(point: Point, disk: str | None) -> list[PointDisk]:
    from holdfast.repo.points import find_disk

    return [find_disk(point, disk)] if disk else list(point.manifest.disks)


def _content(repository: Repository, tree: object) -> bytes:
    with contextlib.closing(repository.open_content(tree)) as reader:  # type: ignore[arg-type]
        return reader.read()


def _folder_name(name: str) -> str:
    """A VM's name as that of a folder."""
    return re.sub(r"[/\0\\\x00-\x1f]", "_", name).strip(". ")[:80] or "vm"
