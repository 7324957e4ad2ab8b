"""The disks of a VM, as `vmsvc/device.getdevices` and `vmsvc/get.config` print them, and which can be backed up.

A VM snapshot does not cover every disk: independent disks, raw device mappings in physical mode, disks on shared buses or
with several writers are left out of it by ESXi. Such a disk has `obstacle`: why, and what can be done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable
from holdfast.esxi.says.machines import DatastorePath, parse_datastore_path
from holdfast.esxi.says.vmomi import Items, Obj, parse_all

__all__ = ["Controller", "VmDevices", "VmDisk", "parse_devices"]

_WHAT: Final = "vmsvc/device.getdevices"
_DISK: Final = "vim.vm.device.VirtualDisk"
_BUSES: Final = (("SCSI", "scsi"), ("IDE", "ide"), ("AHCI", "sata"), ("SATA", "sata"), ("NVME", "nvme"))
_SCSI_TYPES: Final = ("LsiLogic", "BusLogic", "ParaVirtual")
_MAX_KIB: Final = 1 << 37


@dataclass(frozen=True, slots=True)
class Controller:
    """What disks are attached to.

    Args:
        bus: `scsi`, `ide`, `sata`, `nvme`.
        shared: `noSharing`, `virtualSharing`, `physicalSharing`; empty for buses that know no sharing.
    """

    key: int
    type: str
    bus: str
    number: int
    shared: str


@dataclass(frozen=True, slots=True)
class VmDisk:
    """A disk of a VM.

    Args:
        label: `scsi0:1`, as in the VMX; empty if its controller is not in the list.
        title: as in VMware's own interface: `Hard disk 1`.
        file: the descriptor; the one of the newest redo log if the VM has snapshots.
        backing: such as `FlatVer2BackingInfo`.
        mode: `persistent`, `independent_persistent`, ...
        sharing: `sharingNone`, `sharingMultiWriter`.
        uuid: 32 lower-case hexadecimal digits, or empty.
        chain: the descriptors below `file`, newest first, where the host says so.
        obstacle: why it can not be backed up by a VM snapshot, as a clause; empty if it can.
    """

    key: int
    label: str
    title: str
    size_bytes: int | None
    file: DatastorePath
    backing: str
    mode: str
    sharing: str
    uuid: str
    change_id: str
    thin: bool | None
    chain: tuple[DatastorePath, ...]
    obstacle: str


@dataclass(frozen=True, slots=True)
class VmDevices:
    """Disks and the controllers that they are attached to, each ordered by key."""

    disks: tuple[VmDisk, ...]
    controllers: tuple[Controller, ...]


def parse_devices(text: str, what: str = _WHAT) -> VmDevices:
    """The disks in what `device.getdevices` or `get.config` printed.

    Raises:
        SourceFormat: it can not be understood, or a disk lacks what every disk has.
    """
    found: dict[int, Obj] = {}
    values = parse_all(text, what)
    if not values:
        raise SourceFormat(f"{what} printed no devices, but: {printable(text.strip()[:200])}")
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, Items):
            pending.extend(value.objects())
        elif isinstance(value, Obj):
            if value.type == _DISK or value.number("busNumber") is not None:
                key = value.number("key")
                if key is None:
                    raise SourceFormat(f"{what}: a device of type {printable(value.type)} has no key")
                found.setdefault(key, value)
            pending.extend(child for _, child in value.fields if isinstance(child, Obj | Items))
    controllers = tuple(_controller(found[key]) for key in sorted(found) if found[key].type != _DISK)
    by_key = {controller.key: controller for controller in controllers}
    disks = tuple(_disk(found[key], by_key, what) for key in sorted(found) if found[key].type == _DISK)
    return VmDevices(disks, controllers)


def _controller(device: Obj) -> Controller:
    kind = device.type.rpartition(".")[2]
    upper = kind.upper()
    bus = next((bus for word, bus in _BUSES if word in upper), "")
    if not bus and any(word in kind for word in _SCSI_TYPES):
        bus = "scsi"
    return Controller(
        device.number("key") or 0, kind, bus, device.number("busNumber") or 0, device.text("sharedBus")
    )


def _disk(device: Obj, controllers: dict[int, Controller], what: str) -> VmDisk:
    backing = device.child("backing")
    if backing is None:
        raise SourceFormat(f"{what}: the disk with the key {device.number('key')} has no backing")
    info = device.child("deviceInfo")
    controller = controllers.get(device.number("controllerKey") or 0)
    unit = device.number("unitNumber")
    label = (
        f"{controller.bus}{controller.number}:{unit}"
        if controller and controller.bus and unit is not None
        else ""
    )
    size_bytes, size_kib = device.number("capacityInBytes"), device.number("capacityInKB")
    if size_bytes is None and size_kib is not None:
        size_bytes = size_kib * 1024
    if size_bytes is not None and not 0 < size_bytes <= _MAX_KIB * 1024:
        size_bytes = None
    kind = backing.type.rpartition(".")[2]
    return VmDisk(
        key=device.number("key") or 0,
        label=label,
        title=info.text("label") if info else "",
        size_bytes=size_bytes,
        file=parse_datastore_path(backing.text("fileName"), what),
        backing=kind,
        mode=backing.text("diskMode"),
        sharing=backing.text("sharing"),
        uuid=_digits(backing.text("uuid")),
        change_id=backing.text("changeId"),
        thin=backing.flag("thinProvisioned"),
        chain=_chain(backing, what),
        obstacle=_obstacle(backing, kind, controller),
    )


def _chain(backing: Obj, what: str) -> tuple[DatastorePath, ...]:
    chain: list[DatastorePath] = []
    parent = backing.child("parent")
    while parent is not None:
        chain.append(parse_datastore_path(parent.text("fileName"), what))
        parent = parent.child("parent")
    return tuple(chain)


def _obstacle(backing: Obj, kind: str, controller: Controller | None) -> str:
    mode, sharing = backing.text("diskMode"), backing.text("sharing")
    if kind.startswith("RawDiskMapping"):
        if backing.text("compatibilityMode") == "virtualMode":
            return ""
        return "it is a raw device mapping in physical mode, which a VM snapshot leaves out: back up from within the guest"
    if kind.startswith(("RawDisk", "Partitioned")):
        return "it is a physical disk, not a file on a datastore: back up from within the guest"
    if mode.startswith("independent"):
        return f"it is independent ({mode}), so that a VM snapshot leaves it out: change its mode, or power the VM off"
    if mode not in ("persistent", ""):
        return f"its mode is {printable(mode)}, so that a VM snapshot leaves it out: change its mode"
    if sharing not in ("", "sharingNone"):
        return "several VMs may write to it (multi-writer), so that no VM snapshot is possible: power the VMs off"
    if controller is not None and controller.shared not in ("", "noSharing"):
        return "its SCSI bus is shared with other VMs, so that no VM snapshot is possible: power the VMs off"
    if backing.child("keyId") is not None:
        return "it is encrypted by the host, so that only encrypted bytes could be read: back up from within the guest"
    return ""


def _digits(uuid: str) -> str:
    digits = re.sub(r"[\s-]", "", uuid).lower()
    return digits if re.fullmatch("[0-9a-f]{32}", digits) else ""
