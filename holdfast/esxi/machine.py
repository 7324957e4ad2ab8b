"""A VM on a host, held still for as long as it takes to read it, as a `Machine`.

    with held_machine(session, vm, request, report) as held:
        ... back held.machine up ...

Whatever happens inside, and if nothing does: on the way out our snapshot is removed and the VM is switched on again if it was on.
What was owed is written down before (`journal`), so that a run that is killed leaves it to the next one.

What is read: of each disk the chain of descriptors that the VM ran on when the snapshot was taken, which nobody writes to as
long as the snapshot is there; of a VM that is off, the chain that it would run on. Before a restore point may be listed,
`Machine.confirm` looks once more: the snapshot still there, the VM still on top of it (or still off). If not, the bytes
that were read are of no certain moment, and the backup fails.

Left out: what is not attached to the VM, swap, logs, locks, change tracking, and what only describes snapshots or a
suspended state.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.disk import SECTOR_BYTES, DiskInfo, FileInfo, Machine, SourceDisk, SourceFile
from holdfast.errors import (
    HoldfastError,
    SourceChanged,
    SourceError,
    SourceNotFound,
    SourceUnsupported,
    UsageError,
)
from holdfast.esxi.enduring import EnduringFiles
from holdfast.esxi.host import HostSession
from holdfast.esxi.hostdisk import Link, read_chain
from holdfast.esxi.inventory import Vm, VmLook
from holdfast.esxi.journal import Debt, DebtEntry, new_snapshot_name
from holdfast.esxi.memory import BytesSource
from holdfast.esxi.names import fault_of, free_name, printable, stem_of
from holdfast.esxi.running import How, PowerSwitch
from holdfast.esxi.snapshots import Taken, attached_paths, read_vmx
from holdfast.esxi.vmdk.descriptor import is_plain_flat
from holdfast.esxi.vmx import Vmx
from holdfast.esxi.vmxedit import VmxText
from holdfast.units import MIB, format_size

__all__ = ["Held", "Request", "held_machine"]

_MAX_FILE_BYTES: Final = 64 * MIB
_LEFT_OUT: Final = re.compile(
    r"(.*\.vmdk|.*\.vswp|.*\.lck|\.lck-.*|.*\.scoreboard|.*\.log|.*\.hlog|.*\.vmx~|.*\.vms[ns]|.*\.vmem|.*-aux\.xml|\..*\.sf)\Z",
    re.IGNORECASE | re.DOTALL,
)
_NEVER_OFF: Final = ("raw device", "physical disk", "multi-writer", "SCSI bus", "encrypted")


@dataclass(frozen=True, slots=True)
class Request:
    """How a VM is to be backed up.

    Args:
        disks: labels or names of the only disks that are wanted; all if empty.
        force_off: switch the VM off if its guest does not shut down.
        shutdown_s: how long a guest may take to shut down.
    """

    how: How = "hot"
    quiesce: bool = False
    memory: bool = False
    disks: tuple[str, ...] = ()
    force_off: bool = False
    shutdown_s: float = 300.0


@dataclass(slots=True)
class Held:
    """A VM that is held still.

    Args:
        time: Unix seconds by our clock that the disks stand for.
        snapshot: name of our snapshot; empty if there is none.
    """

    machine: Machine
    time: int
    snapshot: str = ""


@dataclass(frozen=True, slots=True)
class _Disk:
    """A disk to be read: where it is attached, and its descriptors, topmost first."""

    label: str
    path: str
    links: tuple[Link, ...]


@contextlib.contextmanager
def held_machine(
    session: HostSession, vm: Vm, request: Request, files: EnduringFiles, warn: Callable[[str], None]
) -> Iterator[Held]:
    """The VM as a machine, for as long as the context lasts.

    Args:
        files: reads the host's files, and goes on only if they are still of the same moment; stays open.
        warn: told in sentences what could not be put right afterwards.

    Raises:
        SourceError: it can not be backed up, or not now.
        LinkError: the host can not be reached.
    """
    _require_alone(session, vm)
    look = session.view.look(vm)
    if look.trouble:
        raise SourceUnsupported(f"{vm.shown} can not be looked at: {look.trouble}")
    entry = session.journal.note(Debt(session.name, vm.id, vm.uuid, vm.name, vm.vmx, time=int(time.time())))
    brought: list[str] = []
    try:
        yield from _held(session, look, request, files, entry, brought)
    finally:
        _put_right(session, vm, entry, brought, warn)


def _require_alone(session: HostSession, vm: Vm) -> None:
    for debt in session.journal.running(session.name):
        if (debt.vm_uuid, debt.vmx) == (vm.uuid, vm.vmx):
            raise SourceError(
                f"another run is backing {vm.shown} up at the moment", hint="wait for it, or end it"
            )


def _held(
    session: HostSession,
    look: VmLook,
    request: Request,
    files: EnduringFiles,
    entry: DebtEntry,
    brought: list[str],
) -> Iterator[Held]:
    vm, view = look.vm, session.view
    switch = PowerSwitch(view, session.patience, shutdown_s=request.shutdown_s)
    power = view.power(vm)
    session.note(
        f"the VM is {vm.shown}, UUID {vm.uuid}, in {printable(vm.vmx)}; it is {power} and has "
        f"{sum(1 for root in look.snapshots for _ in root.walk())} snapshots of its own"
    )
    if request.how != "hot" and power == "on":
        entry.update(power_on=True)
        switch.shut_down(vm, force=request.force_off)
        session.note("it was shut down")
        power = "off"
    vmx_data, vmx = read_vmx(view, vm)
    attached = attached_paths(vm, vmx)
    too_large: list[str] = []
    small = _small_files(session, vm, too_large, has_snapshots=bool(look.snapshots))
    taken: Taken | None = None
    if power == "on" or (request.how == "warm" and entry.debt.power_on):
        entry.update(snapshot=new_snapshot_name())
        taken = session.keeper.take(
            vm,
            entry.debt.snapshot,
            memory=request.memory and power == "on",
            quiesce=request.quiesce and power == "on",
        )
        session.note(f"took the snapshot {taken.name}, which has the id {taken.id}")
        moved = attached_paths(vm, read_vmx(view, vm)[1])
        brought += [path for label, path in moved.items() if attached.get(label) != path]
        if request.how == "warm":
            switch.start(vm)
            session.note("it was started again")
            entry.update(power_on=False)
    else:
        moved = attached
    when = taken.time if taken is not None else int(time.time())
    disks, warnings = _readable(session, look, attached, moved, request, off=taken is None)
    warnings += too_large
    if power == "suspended":
        warnings.append("the VM is suspended: its memory was left out, and a restored VM starts anew")
    if look.snapshots:
        warnings.append("the VM has snapshots of its own: the present state was stored, not the earlier ones")
    confirm = files.check = _confirmation(session, vm, taken, moved, disks)
    with contextlib.ExitStack() as opened:
        sources = [_opened(vm, disk, files, opened, warnings) for disk in disks]
        for source in filter(None, sources):
            session.note(_reading(*source))
        machine = _machine(
            session,
            vm,
            vmx,
            vmx_data,
            [one for one in sources if one is not None],
            small,
            tuple(warnings),
            confirm,
        )
        if not machine.disks and disks:
            raise SourceUnsupported(
                f"none of the disks of {vm.shown} can be backed up: {'; '.join(warnings)}"
            )
        yield Held(machine, when, entry.debt.snapshot)


def _readable(
    session: HostSession,
    look: VmLook,
    attached: Mapping[str, str],
    moved: Mapping[str, str],
    request: Request,
    *,
    off: bool,
) -> tuple[list[_Disk], list[str]]:
    """The disks that can be read, and sentences on those that can not."""
    known = {disk.label: disk for disk in look.disks}
    wanted = set(request.disks)
    found: list[_Disk] = []
    warnings: list[str] = []
    for label, path in attached.items():
        if request.disks:
            names = {label, posixpath.basename(path)} & set(request.disks)
            wanted -= names
            if not names:
                warnings.append(f"the disk {label} was left out: it was not asked for")
                continue
        obstacle = known[label].obstacle if label in known else ""
        if obstacle and (not off or any(word in obstacle for word in _NEVER_OFF)):
            warnings.append(f"the disk {label} was left out: {obstacle}")
            continue
        try:
            links = read_chain(moved.get(label, path), session.console.read)
        except SourceUnsupported as error:
            warnings.append(f"the disk {label} was left out: {error.message}")
            continue
        if not off:
            if moved.get(label, path) == path or len(links) < 2:
                warnings.append(f"the disk {label} was left out: the snapshot does not cover it")
                continue
            if posixpath.basename(links[1].path) != posixpath.basename(path):
                raise SourceChanged(
                    f"the disk {label} of {look.vm.shown} runs on {printable(links[1].path)} and not on {printable(path)}: "
                    "somebody else changed its snapshots at the same moment",
                    hint="run the backup again",
                )
            links = links[1:]
        found.append(_Disk(label, path, links))
    if wanted:
        raise UsageError(
            f"{look.vm.shown} has no disk {', '.join(sorted(wanted))}", hint=f"it has {', '.join(attached)}"
        )
    if not found and attached:
        raise SourceUnsupported(
            f"none of the disks of {look.vm.shown} can be backed up: {'; '.join(warnings)}"
        )
    return found, warnings


def _opened(
    vm: Vm, disk: _Disk, files: EnduringFiles, opened: contextlib.ExitStack, warnings: list[str]
) -> tuple[_Disk, SourceDisk] | None:
    try:
        found = files.disk(disk.links)
    except SourceUnsupported as error:
        warnings.append(f"the disk {disk.label} was left out: {error.message}")
        return None
    opened.callback(found.close)
    descriptor = found.descriptor
    name = posixpath.relpath(disk.path, vm.folder)
    if fault_of(name):
        name = posixpath.basename(disk.path)
    plain = is_plain_flat(descriptor) and "/" not in descriptor.extents[0].file_name
    info = DiskInfo(
        name=name,
        size_bytes=descriptor.sectors * SECTOR_BYTES,
        format="vmdk",
        flat_name=posixpath.join(posixpath.dirname(name), descriptor.extents[0].file_name) if plain else "",
        descriptor=descriptor.text,
        create_type=descriptor.create_type,
        label=disk.label,
        uuid=descriptor.uuid,
        adapter=descriptor.adapter,
        geometry=descriptor.geometry,
    )
    return disk, SourceDisk(info, found, found.scanner)


def _reading(disk: _Disk, source: SourceDisk) -> str:
    """How a disk is read, for a log."""
    chain = " on ".join(printable(link.path) for link in disk.links)
    how = "all its bytes travel" if source.scanner is None else "the host finds out what is new"
    return f"reading the disk {disk.label} of {format_size(source.info.size_bytes)}, {chain}: {how}"


def _machine(
    session: HostSession,
    vm: Vm,
    vmx: Vmx,
    vmx_data: bytes,
    disks: list[tuple[_Disk, SourceDisk]],
    small: tuple[SourceFile, ...],
    warnings: tuple[str, ...],
    confirm: Callable[[], None],
) -> Machine:
    from dataclasses import replace

    vmx_name = posixpath.basename(vm.vmx)
    taken = {vmx_name, *(file.info.name for file in small)}
    text = VmxText(vmx_data)
    named: list[SourceDisk] = []
    for disk, source in disks:
        info = source.info
        name = info.name if info.name not in taken else free_name(stem_of(info.name), ".vmdk", taken)
        taken.add(name)
        flat = info.flat_name
        if not flat or flat in taken:
            flat = free_name(stem_of(name), "-flat.vmdk", taken)
        taken.add(flat)
        if text.get(f"{disk.label}.fileName") != name:
            text.set(f"{disk.label}.fileName", name)
        named.append(replace(source, info=replace(info, name=name, flat_name=flat)))
    data = (
        text.data()
        if any(text.get(f"{d.label}.fileName") != _written(vmx, d.label) for d, _ in disks)
        else vmx_data
    )
    now_ns = time.time_ns()
    vmx_file = SourceFile(FileInfo(vmx_name, len(data), now_ns, 0o644), BytesSource(data))
    return Machine(
        kind="vm",
        name=vm.name or vmx.display_name or stem_of(vmx_name),
        uuid=vmx.uuid or vm.instance_uuid or vm.uuid,
        origin=f"esxi://{session.name}{vm.vmx}",
        disks=tuple(sorted(named, key=lambda disk: disk.info.name)),
        files=tuple(sorted((vmx_file, *small), key=lambda file: file.info.name)),
        warnings=warnings,
        confirm=confirm,
    )


def _written(vmx: Vmx, label: str) -> str:
    return next((disk.file_name for disk in vmx.disks if disk.label == label), "")


def _small_files(
    session: HostSession, vm: Vm, warnings: list[str], *, has_snapshots: bool
) -> tuple[SourceFile, ...]:
    """The files of the VM's folder that are neither disks nor left out; the VMX is not among them."""
    found = []
    for file in session.console.listing(vm.folder):
        path = f"{vm.folder}/{file.name}"
        if not file.is_file or path == vm.vmx or _LEFT_OUT.match(file.name) or fault_of(file.name):
            continue
        if has_snapshots and file.name.lower().endswith(".vmsd"):
            continue
        if file.size_bytes > _MAX_FILE_BYTES:
            warnings.append(
                f"the file {printable(file.name)} was left out: it has {format_size(file.size_bytes)}"
            )
            continue
        try:
            data = session.console.read(path, _MAX_FILE_BYTES)
        except SourceNotFound:
            continue  # removed meanwhile
        info = FileInfo(file.name, len(data), file.mtime_s * 10**9, file.mode & 0o777)
        found.append(SourceFile(info, BytesSource(data)))
    return tuple(found)


def _confirmation(
    session: HostSession, vm: Vm, taken: Taken | None, moved: Mapping[str, str], disks: list[_Disk]
) -> Callable[[], None]:
    """What has to hold after the last byte was read for the bytes to be of one moment."""
    console = session.console
    extents = [member for disk in disks for link in disk.links for member in link.members]
    before = _stamps(session, extents) if taken is None else ()

    def confirm() -> None:
        again = "the bytes that were read are of no certain moment, so that no restore point was made"
        hint = "see who works on the VM at the same time, and run the backup again"
        if taken is None:
            if session.view.power(vm) == "on" or _stamps(session, extents) != before:
                raise SourceChanged(
                    f"{vm.shown} was started, or its disks were written to, while it was read: {again}",
                    hint=hint,
                )
            return
        there = session.keeper.find(vm, taken.name)
        now = attached_paths(vm, read_vmx(session.view, vm)[1])
        if there is None or there.id != taken.id:
            raise SourceChanged(
                f"somebody removed the snapshot of {vm.shown} while it was read: {again}", hint=hint
            )
        for disk in disks:
            links = read_chain(now.get(disk.label, disk.path), console.read)
            if moved.get(disk.label) not in [link.path for link in links]:
                raise SourceChanged(
                    f"the disk {disk.label} of {vm.shown} was reverted while it was read: {again}", hint=hint
                )

    return confirm


def _stamps(session: HostSession, paths: list[str]) -> tuple[tuple[str, int, int], ...]:
    found = []
    for folder in sorted({posixpath.dirname(path) for path in paths}):
        names = {posixpath.basename(path) for path in paths if posixpath.dirname(path) == folder}
        found += [
            (f"{folder}/{file.name}", file.size_bytes, file.mtime_s)
            for file in session.console.listing(folder)
            if file.name in names
        ]
    return tuple(found)


def _put_right(
    session: HostSession, vm: Vm, entry: DebtEntry, brought: list[str], warn: Callable[[str], None]
) -> None:
    """Removes the snapshot and starts the VM again; what can not be done stays written down."""
    debt, settled = entry.debt, True
    try:
        if debt.snapshot:
            left = session.keeper.remove(vm, debt.snapshot, on=brought)
            for sentence in left:
                warn(sentence)
            settled = session.keeper.find(vm, debt.snapshot) is None
            session.note(f"the snapshot {debt.snapshot} is {'gone' if settled else 'still there'}")
        if debt.power_on:
            PowerSwitch(session.view, session.patience).start(vm)
            session.note("it was started again")
            entry.update(power_on=False)
    except HoldfastError as error:
        settled = False
        warn(
            f"{vm.shown} could not be put back as it was: {error.message}; the next backup from this host, or "
            "'holdfast host check --clean', tries again"
        )
    if settled:
        entry.settle()
    else:
        entry.release()
