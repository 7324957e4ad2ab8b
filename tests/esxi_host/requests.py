"""What tests ask of a stand-in over its control socket: VMs, disks, faults, and what others do on the host.

One method for each request; `StandIn` (and `python -m tests.esxi_host`) are the other side.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tests.esxi_host.faults import Faults, Value
from tests.esxi_host.inetd import Inetd
from tests.esxi_host.inventory import GIB, Inventory
from tests.esxi_host.tasks import Task
from tests.esxi_host.vmfiles import Descriptor, base_extras, new_vmx, vm_uuid
from tests.esxi_host.vms import Vm

MIB = 1 << 20
DEFAULT_STORE = ("datastore1", "VMFS-6", 100 * GIB)


class Requests:
    """The answers. A dictionary goes out as JSON."""

    def __init__(self, inventory: Inventory, inetd: Inetd, faults: Faults) -> None:
        self._inventory = inventory
        self._inetd = inetd
        self._faults = faults

    def answer(self, operation: str, arguments: dict[str, Any]) -> Any:
        method: Callable[..., Any] | None = (
            None if operation.startswith("_") else getattr(self, operation, None)
        )
        if method is None or operation == "answer":
            raise ValueError(f"there is no request {operation!r}")
        return method(**arguments)

    # --- faults, traffic, state

    def set_fault(self, name: str, value: Value, times: int | None) -> None:
        self._faults.set(name, value, times=times)

    def clear_faults(self, names: list[str]) -> None:
        self._faults.clear(*names)

    def struck(self) -> dict[str, int]:
        return self._faults.struck()

    def traffic(self) -> dict[str, int]:
        return asdict(self._inetd.traffic) | {"read_bytes": self._inventory.board.read_bytes}

    def drop_connections(self) -> int:
        return self._inetd.drop_all()

    def state(self) -> dict[str, Any]:
        """Everything that a test compares before and after a run."""
        return {
            "vms": {str(vm.vmid): self._vm_state(vm) for vm in self._inventory.vms.values()},
            "datastores": [
                {
                    "name": store.name,
                    "uuid": store.uuid,
                    "kind": store.kind,
                    "capacity_bytes": store.capacity_bytes,
                }
                for store in self._inventory.stores.all
            ],
            "faults": self._faults.all(),
            "tasks": [{"key": task.key, "state": task.state} for task in self._inventory.tasks.listed()],
        }

    def _vm_state(self, vm: Vm) -> dict[str, Any]:
        with vm.lock:
            stores = self._inventory.stores
            guest = self._inventory.guests.get(vm.vmid)
            return {
                "vmid": vm.vmid,
                "name": vm.name,
                "vmx": stores.host_path(vm.vmx),
                "power": vm.power,
                "uuid": vm.pairs.get("uuid.bios"),
                "question": vm.question,
                "disks": {node: stores.host_path(path) for node, path in vm.disks().items()},
                "snapshots": [
                    {"id": one.number, "name": one.name, "parent": one.parent, "description": one.description}
                    for one in vm.snapshots
                ],
                "files": sorted(os.listdir(vm.folder)) if os.path.isdir(vm.folder) else [],
                "busy": self._inventory.tasks.busy(vm.vmid),
                "guest_writes": guest.writes if guest else 0,
                "guest_error": guest.error if guest else None,
            }

    # --- datastores and VMs

    def add_datastore(self, name: str, kind: str, capacity_bytes: int) -> str:
        store = self._inventory.stores.add(name, kind, capacity_bytes)
        self._inventory.publish()
        return store.uuid

    def add_vm(
        self,
        name: str,
        disks: list[dict[str, Any]],
        running: bool,
        datastore: str,
        folder: str | None,
        annotation: str,
        guest: str,
        hardware: int,
        memory_mib: int,
        extra: dict[str, str],
    ) -> dict[str, Any]:
        """Makes the files of a VM as a host would and registers it."""
        inventory = self._inventory
        rng = inventory.rng
        if not inventory.stores.all:
            inventory.stores.add(*DEFAULT_STORE)
        store = inventory.stores.named(datastore or inventory.stores.all[0].name)
        place = os.path.join(store.real, folder or name)
        os.makedirs(place)
        vmx = os.path.join(place, f"{name}.vmx")
        pairs = new_vmx(
            name,
            guest=guest,
            hardware=str(hardware),
            uuid=vm_uuid(rng),
            location=vm_uuid(random.Random(inventory.options.name + vmx)),
            annotation=annotation,
            memory_mib=memory_mib,
        )
        for number, disk in enumerate(disks):
            node = disk.get("node") or f"scsi0:{number + (number >= 7)}"
            pairs.set(f"{node}.deviceType", "scsi-hardDisk" if node.startswith("scsi") else "disk")
            pairs.set(f"{node}.fileName", self._make_disk(place, name, number, disk))
            pairs.set(f"{node}.present", "TRUE")
            if disk.get("mode"):
                pairs.set(f"{node}.mode", disk["mode"])
        for key, value in extra.items():
            pairs.set(key, value)
        pairs.write(vmx)
        with open(os.path.join(place, f"{name}.nvram"), "wb") as file:
            file.write(b"MRVN" + rng.randbytes(8680))
        with open(os.path.join(place, "vmware.log"), "w", encoding="utf-8") as log:
            log.write(
                f"2026-01-01T00:00:00.000Z In(05) vmx - Log for VMware ESX version={inventory.release}\n" * 20
            )
        with open(os.path.join(place, f"{name}.vmsd"), "w", encoding="utf-8"):
            pass
        vm = inventory.register(vmx)
        if running:
            _raise_error(inventory.power_on(vm))
        return self._vm_state(vm)

    def _make_disk(self, place: str, name: str, number: int, disk: dict[str, Any]) -> str:
        """The `fileName` of a new disk."""
        inventory = self._inventory
        stem = disk.get("name") or (name if number == 0 else f"{name}_{number}")
        elsewhere = disk.get("datastore")
        folder = place
        if elsewhere:
            folder = os.path.join(inventory.stores.named(elsewhere).real, os.path.basename(place))
            os.makedirs(folder, exist_ok=True)
        raw = disk.get("raw")
        size_bytes = int(disk.get("size_bytes") or os.path.getsize(str(raw)))
        assert size_bytes % 512 == 0, "disks are whole sectors"
        flat = os.path.join(folder, f"{stem}-flat.vmdk")
        kind = disk.get("kind", "flat")
        if kind in ("rdm", "rdmp"):
            create_type = "vmfsRawDeviceMap" if kind == "rdm" else "vmfsPassthroughRawDeviceMap"
            flat = os.path.join(folder, f"{stem}-{kind}.vmdk")
            with open(flat, "xb") as file:
                file.truncate(size_bytes)
            extent_type = "VMFSRDM"
        else:
            create_type, extent_type = "vmfs", "VMFS"
            if raw:
                _copy_sparse(raw, flat)
                os.truncate(flat, size_bytes)
            else:
                with open(flat, "xb") as file:
                    file.truncate(size_bytes)
                if disk.get("seed") is not None:
                    _scatter(flat, size_bytes, random.Random(disk["seed"]))
        thin = bool(disk.get("thin", True))
        Descriptor(
            create_type,
            extent_type,
            os.path.basename(flat),
            size_bytes // 512,
            f"{inventory.rng.getrandbits(32):08x}",
            extras=base_extras(size_bytes, inventory.rng, thin=thin, hardware="14"),
        ).write(os.path.join(folder, f"{stem}.vmdk"))
        path = os.path.join(folder, f"{stem}.vmdk")
        return inventory.stores.host_path(path) if elsewhere else f"{stem}.vmdk"

    def remove_vm(self, vmid: int) -> None:
        """The VM and its folder are gone, as somebody would delete them."""
        vm = self._inventory.vm(vmid)
        if vm.running:
            _raise_error(self._inventory.power_off(vm))
        self._inventory.unregister(vm)
        shutil.rmtree(vm.folder)

    def rename_vm(self, vmid: int, name: str) -> None:
        vm = self._inventory.vm(vmid)
        with vm.lock:
            vm.pairs.set("displayName", name)
            vm.pairs.write(vm.vmx)

    def power(self, vmid: int, to: str) -> None:
        vm = self._inventory.vm(vmid)
        if to == "on":
            _raise_error(self._inventory.power_on(vm))
        else:
            _raise_error(
                self._inventory.power_off(vm, to="Suspended" if to == "suspended" else "Powered off")
            )

    def snapshot(self, vmid: int, name: str, description: str, memory: bool) -> int:
        """Somebody takes a snapshot."""
        vm = self._inventory.vm(vmid)
        task = self._inventory.create_snapshot(vm, name, description, memory=memory)
        if task is not None:
            _raise_error(task)
        return vm.snapshots[-1].number

    def remove_snapshot(self, vmid: int, snapshot: int | None) -> None:
        vm = self._inventory.vm(vmid)
        _raise_error(self._inventory.remove_snapshots(vm, None if snapshot is None else [snapshot]))

    def grow_disk(self, vmid: int, node: str, size_bytes: int) -> None:
        """The disk of a VM without snapshots is larger from now on."""
        vm = self._inventory.vm(vmid)
        with vm.lock:
            path = vm.disks()[node]
            grow(path, size_bytes)
            vm.reopen_disks()

    def guest(
        self, vmid: int, rate_bytes: float, seed: int, span_bytes: int, log: bool, running: bool
    ) -> None:
        if not running:
            self._inventory.stop_guest(vmid)
            return
        self._inventory.start_guest(
            self._inventory.vm(vmid), rate_bytes=rate_bytes, seed=seed, span_bytes=span_bytes, log=log
        )

    def write(self, vmid: int, node: str, offset: int, data: str) -> None:
        """The guest writes bytes (in hexadecimal) to its disk, running or not."""
        from tests.esxi_host.chain import Chain

        vm = self._inventory.vm(vmid)
        with vm.lock:
            if node in vm.chains:
                vm.chains[node].write(offset, bytes.fromhex(data))
                return
            chain = Chain.open(vm.disks()[node])
            chain.write(offset, bytes.fromhex(data))
            chain.close()

    def copy_disk(self, vmid: int, node: str, target: str) -> None:
        """A raw copy of the disk as the guest sees it now."""
        from tests.esxi_host.chain import Chain

        vm = self._inventory.vm(vmid)
        with vm.lock:
            chain = Chain.open(vm.disks()[node])
            try:
                chain.copy_to(target)
            finally:
                chain.close()

    def keep_references(self, on: bool) -> None:
        self._inventory.references = on

    def add_invalid_vm(self) -> int:
        """An entry of the inventory whose configuration is gone."""
        inventory = self._inventory
        store = inventory.stores.all[0]
        place = os.path.join(store.real, f"gone{inventory.rng.getrandbits(16):04x}")
        os.makedirs(place)
        vmx = os.path.join(place, "gone.vmx")
        new_vmx(
            "gone",
            guest="other",
            hardware="13",
            uuid=vm_uuid(inventory.rng),
            location="",
            annotation="",
            memory_mib=64,
        ).write(vmx)
        vm = inventory.register(vmx)
        shutil.rmtree(place)
        inventory.invalid.add(vm.vmid)
        return vm.vmid


def grow(path: str, size_bytes: int) -> None:
    """The descriptor and the flat file of a base disk are larger from now on."""
    old = Descriptor.read(path)
    if old.parent:
        raise ValueError("a disk with snapshots does not grow")
    if size_bytes < old.size_bytes:
        raise ValueError("a disk does not shrink")
    os.truncate(os.path.join(os.path.dirname(path), old.extent), size_bytes)
    Descriptor(
        old.create_type,
        old.extent_type,
        old.extent,
        size_bytes // 512,
        old.cid,
        old.parent_cid,
        extras=old.extras,
    ).write(path)


def _copy_sparse(source: str, target: str) -> None:
    """A copy of a file that has its holes."""
    with open(source, "rb") as old, open(target, "xb") as new:
        end = os.fstat(old.fileno()).st_size
        new.truncate(end)
        offset = 0
        while offset < end:
            try:
                start = os.lseek(old.fileno(), offset, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                return
            offset = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            while start < offset:
                data = os.pread(old.fileno(), min(MIB, offset - start), start)
                start += os.pwrite(new.fileno(), data, start)


def _scatter(path: str, size_bytes: int, rng: random.Random) -> None:
    """Random data in about an eighth of the file, in pieces of a guest's file sizes."""
    with open(path, "r+b") as file:
        left = size_bytes // 8
        while left > 0:
            length = min(size_bytes, rng.choice([4096, 8192, 65536, 262144, MIB]))
            file.seek(rng.randrange(0, size_bytes - length + 1, 512) // 4096 * 4096)
            file.write(rng.randbytes(length))
            left -= length
        file.truncate(size_bytes)


def _raise_error(task: Task) -> None:
    task.done.wait()
    if task.error is not None:
        raise task.error
