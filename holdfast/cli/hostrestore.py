"""`holdfast restore POINT esxi://HOST/DATASTORE[/NAME]`: the engine's bytes, the host's folder and VM joined."""

from __future__ import annotations

import contextlib
import posixpath
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.hostdisks import DiskWriter, Target, unfinished
from holdfast.cli.linked import open_session, parse_esxi
from holdfast.errors import DestinationExists, FarCommandMissing, SourceNotFound, UsageError
from holdfast.esxi.names import printable
from holdfast.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdfast.cli.progress import Progress
    from holdfast.esxi.bringback import NewFolder
    from holdfast.esxi.host import HostSession
    from holdfast.esxi.inventory import Vm
    from holdfast.esxi.says.esxcli import HostVersion
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
    tell: Callable[[str], None],
) -> BroughtBack:
    """Restores a point to a host.

    Args:
        note: told step by step what is done, for a log.
        tell: told in sentences that a connection broke, and that it goes on.

    Raises:
        FarCommandMissing: the host has no Python to write with; nothing was made there.
        DestinationExists: the folder exists, and it was not said that it may be changed.
        StorageError: the datastore can not be written.
        IntegrityError: the repository is damaged.
        LinkError: the connection is over and does not come back; the folder is marked, and the same command goes on with it.
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
        _require_python(session)
        folder = f"/vmfs/volumes/{store}/{name}"
        began_s = time.monotonic()
        if wanted.in_place:
            written, warnings = _in_place(repository, point, session, folder, wanted, progress, tell)
            vm_id = None
        else:
            written, vm_id, warnings = _anew(
                repository, point, session, folder, wanted, progress, workers, tell
            )
    size = sum(disk.info.size_bytes for disk in _chosen(point, wanted.disk))
    return BroughtBack(folder, written, size, time.monotonic() - began_s, vm_id, tuple(warnings))


def _anew(
    repository: Repository,
    point: Point,
    session: HostSession,
    folder: str,
    wanted: HostRestore,
    progress: Progress,
    workers: int | None,
    tell: Callable[[str], None],
) -> tuple[int, int | None, list[str]]:
    from holdfast.esxi.bringback import NewFolder, new_disk_names
    from holdfast.esxi.registering import register
    from holdfast.esxi.running import PowerSwitch

    # Whatever only looks comes first, so that a host that can not be written leaves nothing behind.
    vm_name, name = point.manifest.vm_name, posixpath.basename(folder)
    given = name if name != _folder_name(vm_name) else vm_name
    version, vms = session.view.version(), session.view.vms()
    if wanted.register or wanted.power_on:
        _require_registrable(point, vms, given)
    new_uuid = wanted.new_uuid
    if new_uuid is None:
        new_uuid = any(point.manifest.vm_uuid in (vm.uuid, vm.instance_uuid) for vm in vms)
    disks = _chosen(point, wanted.disk)
    names = new_disk_names([disk.info for disk in disks])
    target = NewFolder(session, folder, point.id.hex())
    target.claim()
    session.note(
        f"going on with the folder {folder}, which an interrupted run has left"
        if target.resumed
        else f"made the folder {folder}, marked incomplete"
    )
    with unfinished(f"{printable(folder)} is marked incomplete; the same command goes on with it"):
        targets = [Target(disk, target.make_disk(disk.info, names[disk.info.name])) for disk in disks]
        for one in targets:
            session.note(f"writing {one.shown} to {one.flat}")
        writer = DiskWriter(repository, point, targets, progress, workers=workers, tell=tell)
        written = writer.write(session, empty=not target.resumed)
        session.note(f"{format_size(written)} were written, read back and found right")
        for disk in disks:
            if not new_uuid:
                target.keep_disk_uuid(disk.info, names[disk.info.name])
            target.check_disk(names[disk.info.name])
        vmx_name, warnings = _put_files(repository, point, target, names, given, new_uuid, version)
        target.complete()
    session.note("the folder is complete, and no longer marked")
    if not (wanted.register or wanted.power_on):
        return written, None, warnings
    vm = register(session, f"{folder}/{vmx_name}", given)
    session.note(f"registered {vm.shown}, UUIDs {'new' if new_uuid else 'kept'}")
    if wanted.power_on:
        with unfinished(f"it is complete and registered with the id {vm.id}"):
            PowerSwitch(session.view, session.patience).start(vm, copied=new_uuid)
        session.note("it was started")
    return written, vm.id, warnings


def _put_files(
    repository: Repository,
    point: Point,
    target: NewFolder,
    names: dict[str, str],
    given: str,
    new_uuid: bool,
    version: HostVersion,
) -> tuple[str, list[str]]:
    """Writes the small files, the VMX last; its name, which is empty if there is none, and what had to be changed."""
    from holdfast.esxi.newvmx import make_vmx

    vmx_name, nvram, vmx = "", "", b""
    for file in point.manifest.files:
        base = posixpath.basename(file.info.name)
        data = _content(repository, file.tree) if file.info.size_bytes < 1 << 27 else b""
        if base.lower().endswith(".vmx"):
            vmx_name, vmx = base, data
        elif "/" not in file.info.name and not base.lower().endswith(_LEFT_BEHIND) and data:
            target.put(base, data)
            nvram = base if base.lower().endswith(".nvram") else nvram
    if not vmx_name:
        return "", []
    made = make_vmx(vmx, names, name=given, nvram=nvram, new_uuid=new_uuid, version=version)
    target.put(vmx_name, made.data)
    return vmx_name, list(made.warnings)


def _in_place(
    repository: Repository,
    point: Point,
    session: HostSession,
    folder: str,
    wanted: HostRestore,
    progress: Progress,
    tell: Callable[[str], None],
) -> tuple[int, list[str]]:
    from holdfast.esxi.hostdisk import read_chain

    vm = _registered_in(session, folder)
    _require_still(session, vm)
    targets = []
    for disk, path in _matched(session, vm, _chosen(point, wanted.disk)):
        links = read_chain(path, session.console.read)
        extents = links[0].descriptor.extents
        if len(links) > 1 or len(extents) != 1 or extents[0].kind not in ("VMFS", "FLAT"):
            raise DestinationExists(
                f"{path} can not be written in place: it has snapshots, or several extents",
                hint="restore it into a new folder",
            )
        if extents[0].sectors * 512 != disk.info.size_bytes:
            raise DestinationExists(
                f"{path} has {extents[0].sectors * 512} bytes, and the disk of the restore point {disk.info.size_bytes}",
                hint="restore it into a new folder",
            )
        targets.append(Target(disk, posixpath.join(posixpath.dirname(path), extents[0].file_name)))
    for one in targets:
        session.note(f"writing what differs in {one.flat} of {vm.shown} from {one.shown}")
    writer = DiskWriter(
        repository, point, targets, progress, tell=tell, check=lambda: _require_still(session, vm)
    )
    with unfinished("the disks are partly old and partly new: run it again before the VM is started"):
        written = writer.write(session, empty=False)
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


def _require_registrable(point: Point, vms: Sequence[Vm], name: str) -> None:
    if not any(file.info.name.lower().endswith(".vmx") for file in point.manifest.files):
        raise UsageError(
            "the restore point is of a single disk: there is no VM to register",
            hint="leave --register and --power-on out",
        )
    for vm in vms:
        if vm.name == name:
            raise DestinationExists(
                f"the host has a VM called {printable(name)} already: {vm.shown}, in {printable(vm.folder)}",
                hint="name another folder, and the VM is called like it: esxi://HOST/DATASTORE/NEWNAME",
            )


def _require_python(session: HostSession) -> None:
    """Writing only non-zeros, reading back and comparing there are the agent's. A shell has nothing that does the same as safely."""
    if not session.view.python():
        raise FarCommandMissing(
            f"{session.name} has no python3 that works, and nothing can be written there without one; nothing was made",
            hint="restore to another host, or into a folder of this machine and copy it over (scp), then register the .vmx",
        )


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
