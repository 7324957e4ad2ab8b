"""The host's objects as values: what `get.config`, `get.summary`, `device.getdevices` and their like show of a VM.

The members that programs read are there, in the order of a real host; those that nobody reads are left out, so a parser
that counts lines fails here as it would with another release.
"""

from __future__ import annotations

import os
from datetime import datetime

from tests.esxi_host.chain import descriptors
from tests.esxi_host.inventory import Inventory
from tests.esxi_host.tasks import Task
from tests.esxi_host.vmfiles import Descriptor, dashed
from tests.esxi_host.vmomi import UNSET, Obj, Ref, Seq, Value, null
from tests.esxi_host.vms import Vm

FIRST_KEYS = {"scsi": 2000, "ide": 3000, "sata": 16000, "nvme": 32000}
CONTROLLERS = {"scsi": 1000, "ide": 200, "sata": 15000, "nvme": 31000}
POWER = {"Powered on": "poweredOn", "Powered off": "poweredOff", "Suspended": "suspended"}


def stamp(moment: datetime | None) -> Value:
    """A time as the host prints it."""
    return f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z" if moment else UNSET


def task_info(task: Task) -> Obj:
    operation = task.key.split("-")[2]
    error: Value = null("vmodl.MethodFault")
    if task.error is not None:
        error = Obj(
            task.error.kind,
            {"faultCause": null("vmodl.MethodFault"), "faultMessage": UNSET, "msg": str(task.error)},
        )
    return Obj(
        "vim.TaskInfo",
        {
            "key": task.key,
            "task": Ref(f"vim.Task:{task.key}"),
            "description": null("vmodl.LocalizableMessage"),
            "name": Ref(operation),
            "descriptionId": operation.removeprefix("vim."),
            "entity": Ref(f"vim.VirtualMachine:{task.vmid}"),
            "entityName": UNSET,
            "state": task.state,
            "cancelled": False,
            "cancelable": False,
            "error": error,
            "result": UNSET,
            "progress": UNSET if task.state == "error" else task.progress,
            "reason": Obj("vim.TaskReasonUser", {"userName": "root"}),
            "queueTime": stamp(task.queued),
            "startTime": stamp(task.started),
            "completeTime": stamp(task.completed),
            "eventChainId": int(task.key.rpartition("-")[2]),
        },
    )


def config(inventory: Inventory, vm: Vm) -> Obj:
    return Obj(
        "vim.vm.ConfigInfo",
        {
            "changeVersion": stamp(inventory.now()),
            "modified": "1970-01-01T00:00:00Z",
            "name": vm.name,
            "guestFullName": "Debian GNU/Linux 12 (64-bit)",
            "version": vm.hardware,
            "uuid": dashed(vm.pairs.get("uuid.bios")),
            "instanceUuid": dashed(vm.pairs.get("vc.uuid")),
            "locationId": UNSET,
            "template": False,
            "guestId": vm.guest,
            "annotation": vm.pairs.get("annotation"),
            "files": Obj(
                "vim.vm.FileInfo",
                {
                    "vmPathName": inventory.stores.bracket(vm.vmx),
                    "snapshotDirectory": inventory.stores.bracket(vm.folder) + "/",
                    "suspendDirectory": inventory.stores.bracket(vm.folder) + "/",
                    "logDirectory": inventory.stores.bracket(vm.folder) + "/",
                },
            ),
            "hardware": Obj(
                "vim.vm.VirtualHardware",
                {
                    "numCPU": int(vm.pairs.get("numvcpus", "1")),
                    "memoryMB": int(vm.pairs.get("memSize", "0")),
                    "device": devices_list(inventory, vm),
                },
            ),
            "changeTrackingEnabled": vm.pairs.true("ctkEnabled"),
            "keyId": null("vim.encryption.CryptoKeyId"),
        },
    )


def runtime(_inventory: Inventory, vm: Vm) -> Obj:
    return Obj(
        "vim.vm.RuntimeInfo",
        {
            "host": Ref("vim.HostSystem:ha-host"),
            "connectionState": "connected",
            "powerState": POWER[vm.power],
            "toolsInstallerMounted": False,
            "suspendTime": UNSET,
            "bootTime": stamp(vm.started),
            "question": null("vim.vm.QuestionInfo"),
            "recordReplayState": "inactive",
            "consolidationNeeded": consolidation_needed(vm),
        },
    )


def consolidation_needed(vm: Vm) -> bool:
    """Whether the VM runs on redo logs that no snapshot needs."""
    needed = {path for snapshot in vm.snapshots for path in snapshot.disks.values()}
    for disk in vm.disks().values():
        try:
            line = [path for path, _ in descriptors(disk)]
        except (OSError, ValueError):
            continue
        if any(path not in needed for path in line[1:]):
            return True
    return False


def summary(inventory: Inventory, vm: Vm) -> Obj:
    files = vm.files()
    committed = sum(os.stat(path).st_blocks * 512 for path in files)
    return Obj(
        "vim.vm.Summary",
        {
            "vm": Ref(f"vim.VirtualMachine:{vm.vmid}"),
            "runtime": Obj(
                "vim.vm.RuntimeInfo",
                {
                    "host": Ref("vim.HostSystem:ha-host"),
                    "connectionState": "connected",
                    "powerState": POWER[vm.power],
                    "bootTime": stamp(vm.started),
                    "question": null("vim.vm.QuestionInfo"),
                    "consolidationNeeded": consolidation_needed(vm),
                },
            ),
            "guest": Obj(
                "vim.vm.Summary.GuestSummary",
                {
                    "guestId": vm.guest if vm.running else UNSET,
                    "toolsStatus": "toolsOk" if vm.running else "toolsNotRunning",
                    "hostName": UNSET,
                    "ipAddress": UNSET,
                },
            ),
            "config": Obj(
                "vim.vm.Summary.ConfigSummary",
                {
                    "name": vm.name,
                    "template": False,
                    "vmPathName": inventory.stores.bracket(vm.vmx),
                    "memorySizeMB": int(vm.pairs.get("memSize", "0")),
                    "numCpu": int(vm.pairs.get("numvcpus", "1")),
                    "numEthernetCards": 1,
                    "numVirtualDisks": len(vm.disks()),
                    "uuid": dashed(vm.pairs.get("uuid.bios")),
                    "instanceUuid": dashed(vm.pairs.get("vc.uuid")),
                    "guestId": vm.guest,
                    "guestFullName": "Debian GNU/Linux 12 (64-bit)",
                    "annotation": vm.pairs.get("annotation"),
                },
            ),
            "storage": Obj(
                "vim.vm.Summary.StorageSummary",
                {
                    "committed": committed,
                    "uncommitted": 0,
                    "unshared": committed,
                    "timestamp": stamp(inventory.now()),
                },
            ),
            "quickStats": Obj("vim.vm.Summary.QuickStats", {"overallCpuUsage": 21, "uptimeSeconds": 3600}),
            "overallStatus": "green",
        },
    )


def guest(_inventory: Inventory, vm: Vm) -> Obj:
    tools = vm.running and vm.pairs.get("standin.tools", "TRUE") == "TRUE"
    return Obj(
        "vim.vm.GuestInfo",
        {
            "toolsStatus": "toolsOk" if tools else "toolsNotRunning",
            "toolsVersionStatus": "guestToolsUnmanaged",
            "toolsRunningStatus": "guestToolsRunning" if tools else "guestToolsNotRunning",
            "toolsVersion": "12352",
            "guestId": vm.guest if vm.running else UNSET,
            "hostName": UNSET,
            "ipAddress": UNSET,
            "guestState": "running" if vm.running else "notRunning",
        },
    )


def devices(inventory: Inventory, vm: Vm) -> Obj:
    return Obj(
        "vim.vm.VirtualHardware",
        {
            "numCPU": int(vm.pairs.get("numvcpus", "1")),
            "memoryMB": int(vm.pairs.get("memSize", "0")),
            "device": devices_list(inventory, vm),
        },
    )


def devices_list(inventory: Inventory, vm: Vm) -> Seq:
    found: list[Value] = [
        Obj(
            "vim.vm.device.VirtualIDEController",
            {"key": 200, "deviceInfo": _info("IDE 0", "IDE 0"), "busNumber": 0},
        ),
        Obj(
            "vim.vm.device.ParaVirtualSCSIController",
            {
                "key": 1000,
                "deviceInfo": _info("SCSI controller 0", "VMware paravirtual SCSI"),
                "busNumber": 0,
                "hotAddRemove": True,
                "sharedBus": vm.pairs.get("scsi0.sharedBus") or "noSharing",
                "scsiCtlrUnitNumber": 7,
            },
        ),
    ]
    for number, (node, path) in enumerate(vm.disks().items(), 1):
        found.append(_disk(inventory, vm, node, path, number))
    return Seq("vim.vm.device.VirtualDevice", found)


def _info(label: str, text: str) -> Obj:
    return Obj("vim.Description", {"label": label, "summary": text})


def _disk(inventory: Inventory, vm: Vm, node: str, path: str, number: int) -> Obj:
    bus = node.rstrip("0123456789:")
    controller, _, unit = node.removeprefix(bus).partition(":")
    per_bus = {"scsi": 16, "ide": 2, "sata": 30, "nvme": 15}[bus]
    descriptor = Descriptor.read(path)
    size_kib = descriptor.size_bytes // 1024
    return Obj(
        "vim.vm.device.VirtualDisk",
        {
            "key": FIRST_KEYS[bus] + int(controller) * per_bus + int(unit),
            "deviceInfo": _info(f"Hard disk {number}", f"{size_kib:,} KB"),
            "backing": _backing(inventory, vm, node, path),
            "connectable": null("vim.vm.device.VirtualDevice.ConnectInfo"),
            "controllerKey": CONTROLLERS[bus] + int(controller),
            "unitNumber": int(unit),
            "capacityInKB": size_kib,
            "capacityInBytes": descriptor.size_bytes,
            "shares": Obj("vim.SharesInfo", {"shares": 1000, "level": "normal"}),
            "diskObjectId": f"{vm.vmid}-{FIRST_KEYS[bus] + int(unit)}",
        },
    )


BACKINGS = {
    "SESPARSE": "SeSparseBackingInfo",
    "VMFSRDM": "RawDiskMappingVer1BackingInfo",
}


def _backing(inventory: Inventory, vm: Vm, node: str, path: str) -> Value:
    kind = "vim.vm.device.VirtualDisk."
    descriptor = Descriptor.read(path)
    store = inventory.stores.of(path)
    members: dict[str, Value] = {
        "fileName": inventory.stores.bracket(path),
        "datastore": Ref(f"vim.Datastore:{store.uuid}"),
        "backingObjectId": "",
    }
    own = kind + BACKINGS.get(descriptor.extent_type, "FlatVer2BackingInfo")
    if descriptor.extent_type == "VMFSRDM":
        physical = descriptor.create_type == "vmfsPassthroughRawDeviceMap"
        members |= {
            "lunUuid": "02000000006000c29800000000000000000000000000000000",
            "deviceName": "vml.02000000006000c298",
            "compatibilityMode": "physicalMode" if physical else "virtualMode",
            "diskMode": vm.mode(node),
            "uuid": _disk_uuid(descriptor),
        }
        return Obj(own, members)
    base = descriptors(path)[-1][1]
    members |= {
        "diskMode": vm.mode(node),
        "split": False,
        "writeThrough": False,
        "thinProvisioned": base.extra("ddb.thinProvisioned") == "1",
        "eagerlyScrub": UNSET,
        "uuid": _disk_uuid(base),
        "contentId": descriptor.extra("ddb.longContentID"),
        "changeId": UNSET,
        "parent": null(own),
        "deltaDiskFormat": UNSET,
        "digestEnabled": False,
        "deltaGrainSize": UNSET,
        "sharing": vm.pairs.get(f"{node}.sharing") or "sharingNone",
        "keyId": null("vim.encryption.CryptoKeyId"),
    }
    if descriptor.parent:
        members["parent"] = _backing(
            inventory, vm, node, os.path.join(os.path.dirname(path), descriptor.parent)
        )
        members["deltaDiskFormat"] = (
            "seSparseFormat" if descriptor.extent_type == "SESPARSE" else "redoLogFormat"
        )
    return Obj(own, members)


def _disk_uuid(descriptor: Descriptor) -> str:
    text = descriptor.extra("ddb.uuid").replace(" ", "").replace("-", "")
    parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
    return "-".join((parts[0].upper(), *parts[1:]))


def file_layout(inventory: Inventory, vm: Vm) -> Obj:
    bracket = inventory.stores.bracket
    disks: list[Value] = []
    for number, path in enumerate(vm.disks().values()):
        chain = [bracket(place) for place, _ in reversed(descriptors(path))]
        disks.append(
            Obj("vim.vm.FileLayout.DiskLayout", {"key": 2000 + number, "diskFile": Seq("string", chain)})
        )
    names = [os.path.basename(path) for path in vm.files()]
    return Obj(
        "vim.vm.FileLayout",
        {
            "configFile": Seq("string", [name for name in names if name.endswith((".nvram", ".vmsd"))]),
            "logFile": Seq("string", [name for name in names if name.endswith(".log")]),
            "disk": Seq("vim.vm.FileLayout.DiskLayout", disks),
            "snapshot": Seq("vim.vm.FileLayout.SnapshotLayout", []),
            "swapFile": UNSET,
        },
    )


def file_layout_ex(inventory: Inventory, vm: Vm) -> Obj:
    """Sizes are those of the VM's last change: a host does not look again."""
    files: list[Value] = []
    for key, path in enumerate(sorted(vm.files(), key=lambda path: (path != vm.vmx, path))):
        size = vm.layout_sizes.get(path, 0)
        files.append(
            Obj(
                "vim.vm.FileLayoutEx.FileInfo",
                {
                    "key": key,
                    "name": inventory.stores.bracket(path),
                    "type": _file_kind(path),
                    "size": size,
                    "uniqueSize": size,
                    "backingObjectId": UNSET,
                    "accessible": True,
                },
            )
        )
    return Obj(
        "vim.vm.FileLayoutEx",
        {"file": Seq("vim.vm.FileLayoutEx.FileInfo", files), "timestamp": stamp(inventory.now())},
    )


def _file_kind(path: str) -> str:
    name = os.path.basename(path)
    if name.endswith(".vmdk"):
        extents = ("-flat.vmdk", "-delta.vmdk", "-sesparse.vmdk", "-rdm.vmdk", "-rdmp.vmdk")
        return "diskExtent" if name.endswith(extents) else "diskDescriptor"
    kinds = {
        ".vmx": "config",
        ".nvram": "nvram",
        ".vmsd": "snapshotList",
        ".vmsn": "snapshotData",
        ".vmem": "snapshotMemory",
        ".log": "log",
        ".vswp": "swap",
        ".vmss": "suspend",
    }
    return kinds.get(os.path.splitext(name)[1], "extendedConfig")


def datastores(inventory: Inventory, vm: Vm) -> Seq:
    used = dict.fromkeys(inventory.stores.of(path) for path in (vm.vmx, *vm.disks().values()))
    return Seq(
        "vim.Datastore.Summary",
        [
            Obj(
                "vim.Datastore.Summary",
                {
                    "datastore": Ref(f"vim.Datastore:{store.uuid}"),
                    "name": store.name,
                    "url": store.path,
                    "capacity": store.capacity_bytes,
                    "freeSpace": inventory.free_bytes(store.uuid),
                    "uncommitted": 0,
                    "accessible": True,
                    "multipleHostAccess": UNSET,
                    "type": "NFS" if store.kind == "NFS" else "VMFS",
                    "maintenanceMode": "normal",
                },
            )
            for store in used
        ],
    )
