"""What the host has: datastores, VMs, tasks; and what can be done to them, with the faults that may strike.

Every change ends by telling the view of the datastores what is locked now, so a command that has returned has its locks in
force. Commands and tests go through the same functions.
"""

from __future__ import annotations

import os
import random
import threading
import time
from datetime import datetime

from tests.esxi_host.datastores import Datastores
from tests.esxi_host.faults import Faults
from tests.esxi_host.guest import Guest
from tests.esxi_host.layout import Layout
from tests.esxi_host.lockfs import used_bytes
from tests.esxi_host.locks import Board, Rules
from tests.esxi_host.options import Options
from tests.esxi_host.tasks import Task, TaskError, Tasks, host_clock
from tests.esxi_host.vmfiles import Pairs, vm_uuid
from tests.esxi_host.vms import Snapshot, Vm

GIB = 1 << 30
QUESTION = 27


class Inventory:
    """The state of one stand-in."""

    def __init__(self, layout: Layout, options: Options, faults: Faults) -> None:
        self.layout = layout
        self.options = options
        self.faults = faults
        self.rng = random.Random(options.seed * 1000 + sum(options.name.encode()))
        self.stores = Datastores(layout.volumes, self.rng)
        self.tasks = Tasks(self.now, lambda: bool(faults.get("tasks_forgotten")))
        self.vms: dict[int, Vm] = {}
        self.invalid: set[int] = set()
        self.guests: dict[int, Guest] = {}
        self.board = Board(layout.locks)
        self.references = False
        """Whether each snapshot leaves a raw copy of the disks as they were."""
        self._next_vmid = 1
        self._next_world = 527610
        self._lock = threading.RLock()
        self._busy_at_bytes: int | None = None

    @property
    def release(self) -> str:
        return self.options.release

    def now(self) -> datetime:
        return host_clock(self.faults.number("clock_offset_s"))

    def stop(self) -> None:
        for guest in self.guests.values():
            guest.stop()

    # --- locks

    def publish(self) -> None:
        """The view of the datastores acts by what is locked, and which faults are on, now."""
        with self._lock:
            rules = Rules()
            for vm in self.vms.values():
                exclusive, read_only = vm.held_files()
                rules.exclusive += [self.stores.key(path) for path in exclusive]
                rules.read_only += [self.stores.key(path) for path in read_only]
            rules.busy_reads = bool(self.faults.get("busy_reads"))
            busy_after = self.faults.get("busy_after_mib")
            if busy_after is None:
                self._busy_at_bytes = None
            elif self._busy_at_bytes is None:
                self._busy_at_bytes = self.board.read_bytes + int(float(busy_after) * (1 << 20))
            rules.busy_at_bytes = self._busy_at_bytes
            rules.read_error = str(self.faults.get("read_error") or "")
            rules.read_delay_s = self.faults.number("read_delay_ms") / 1000
            full = self.faults.get("datastore_full")
            rules.full = [store.uuid for store in self.stores.all if full in ("*", store.name)]
            rules.capacities = {store.uuid: store.capacity_bytes for store in self.stores.all}
            self.board.publish(rules)

    def locked(self, real: str, *, writing: bool = False) -> bool:
        """Whether a file can not be opened, for commands that work beside the view."""
        for vm in self.vms.values():
            exclusive, read_only = vm.held_files()
            if real in exclusive or (writing and real in read_only):
                return self.options.locks
        return False

    def free_bytes(self, uuid: str) -> int:
        store = self.stores.named(uuid)
        if self.faults.get("datastore_full") in ("*", store.name):
            return 0
        return max(0, store.capacity_bytes - used_bytes(store.real))

    # --- VMs

    def vm(self, vmid: int) -> Vm:
        found = self.vms.get(vmid)
        if found is None:
            raise KeyError(vmid)
        return found

    def register(self, vmx: str) -> Vm:
        """The VM of a configuration file, with a new id. Raises FileNotFoundError, and FileExistsError with the old id."""
        with self._lock:
            for vm in self.vms.values():
                if vm.vmx == vmx:
                    raise FileExistsError(str(vm.vmid))
            if not os.path.isfile(vmx):
                raise FileNotFoundError(vmx)
            vm = Vm(self._next_vmid, vmx, self.stores, self.rng)
            vm.load()
            self._load_snapshots(vm)
            self.vms[vm.vmid] = vm
            self._next_vmid += 1
            self.publish()
            return vm

    def _load_snapshots(self, vm: Vm) -> None:
        """The tree as the .vmsd tells it."""
        path = os.path.splitext(vm.vmx)[0] + ".vmsd"
        if not os.path.exists(path):
            return
        said = Pairs.read(path)
        for position in range(int(said.get("snapshot.numSnapshots", "0"))):
            own = f"snapshot{position}"
            disks = {
                said.get(f"{own}.disk{n}.node"): vm.disk_path(said.get(f"{own}.disk{n}.fileName"))
                for n in range(int(said.get(f"{own}.numDisks", "0")))
            }
            created = (int(said.get(f"{own}.createTimeHigh", "0")) << 32) + int(
                said.get(f"{own}.createTimeLow", "0")
            )
            parent = said.get(f"{own}.parent")
            vm.snapshots.append(
                Snapshot(
                    int(said.get(f"{own}.uid", "0")),
                    said.get(f"{own}.displayName"),
                    said.get(f"{own}.description"),
                    datetime.fromtimestamp(created / 1_000_000, self.now().tzinfo),
                    "powered off",
                    disks,
                    int(parent) if parent else None,
                )
            )
        vm.next_snapshot = int(said.get("snapshot.lastUID", "0")) + 1

    def unregister(self, vm: Vm) -> None:
        with self._lock:
            if vm.running:
                raise TaskError(
                    "The attempted operation cannot be performed in the current state (Powered on).",
                    "vim.fault.InvalidPowerState",
                )
            self.stop_guest(vm.vmid)
            del self.vms[vm.vmid]
            self.publish()

    # --- power

    def power_on(self, vm: Vm) -> Task:
        def work() -> None:
            with vm.lock:
                if vm.running:
                    raise TaskError(
                        "The attempted operation cannot be performed in the current state (Powered on).",
                        "vim.fault.InvalidPowerState",
                    )
                vm.load()
                vm.open_disks()
                self._tell_late(vm)
                vm.power, vm.started = "Powered on", self.now()
                vm.world, self._next_world = self._next_world, self._next_world + 1201
                vm.side_files(running=True)
                vm.note_sizes()
            self.publish()

        return self.tasks.start("vim.VirtualMachine.powerOn", vm.vmid, work)

    def asks(self, vm: Vm) -> bool:
        """Whether the VM wants to know if it was moved or copied before it runs."""
        said = vm.pairs.get("uuid.location")
        known = self.location_of(vm)
        strange = (
            bool(said) and said != known and vm.pairs.get("uuid.action") not in ("create", "keep", "change")
        )
        return strange or bool(self.faults.take("question_on_power_on"))

    def location_of(self, vm: Vm) -> str:
        """What `uuid.location` is for a VM at its place."""
        return vm_uuid(random.Random(self.options.name + vm.vmx))

    def answered(self, vm: Vm, *, copied: bool) -> None:
        """The question about moving or copying is answered, and the configuration says so."""
        with vm.lock:
            if copied:
                vm.pairs.set("uuid.bios", vm_uuid(self.rng))
            vm.pairs.set("uuid.location", self.location_of(vm))
            vm.pairs.write(vm.vmx)
            vm.question = None

    def power_off(
        self, vm: Vm, operation: str = "vim.VirtualMachine.powerOff", to: str = "Powered off"
    ) -> Task:
        def work() -> None:
            with vm.lock:
                if vm.power == to or (to == "Suspended" and not vm.running):
                    raise TaskError(
                        f"The attempted operation cannot be performed in the current state ({vm.power}).",
                        "vim.fault.InvalidPowerState",
                    )
                self._tell_late(vm)
                vm.close_disks()
                vm.power, vm.started, vm.question = to, None, None
                vm.side_files(running=False)
                suspended = os.path.splitext(vm.vmx)[0] + "-suspended.vmss"
                if to == "Suspended":
                    with open(suspended, "wb") as file:
                        file.truncate(1 << 20)
                elif os.path.exists(suspended):
                    os.unlink(suspended)
            self.publish()

        return self.tasks.start(operation, vm.vmid, work)

    def _tell_late(self, vm: Vm) -> None:
        late_s = self.faults.number("state_late_s")
        vm.told_power = (vm.power, time.monotonic() + late_s) if late_s else None

    def told_power(self, vm: Vm) -> str:
        """What the host says about the VM's power."""
        if vm.told_power and time.monotonic() < vm.told_power[1]:
            return vm.told_power[0]
        return vm.power

    # --- snapshots

    def create_snapshot(
        self, vm: Vm, name: str, description: str = "", *, memory: bool = False
    ) -> Task | None:
        """The task; None where the host has lost it."""
        if self.faults.take("snapshot_create_vanishes"):
            return None
        failure = self.faults.take("snapshot_create_fails")

        def work() -> None:
            if failure:
                raise TaskError(f"An error occurred while taking a snapshot: {failure}.")
            with vm.lock:
                for path in vm.disks().values():
                    if self.free_bytes(self.stores.of(path).uuid) < 1 << 20:
                        raise TaskError(
                            "An error occurred while taking a snapshot: There is not enough space on the file system "
                            "for the selected operation.",
                            "vim.fault.NoDiskSpace",
                        )
                before = {node: vm.disks()[node] for node in vm.snapshot_disks()}
                made = vm.snapshot(name, description, self.now(), memory=memory)
                if self.references:
                    self._keep_reference(vm, made, before)
                if guest := self.guests.get(vm.vmid):
                    guest.mark(made.number)
            self.publish()

        delay_s = self.faults.number("snapshot_create_async_s")
        return self.tasks.start("vim.VirtualMachine.createSnapshot", vm.vmid, work, delay_s)

    def _keep_reference(self, vm: Vm, snapshot: Snapshot, disks: dict[str, str]) -> None:
        """Raw copies of the disks as they are at this snapshot. The VM stands still meanwhile."""
        from tests.esxi_host.chain import Chain

        for node, path in disks.items():
            chain = Chain.open(path)
            try:
                chain.copy_to(self.reference(vm.vmid, snapshot.number, node))
            finally:
                chain.close()

    def reference(self, vmid: int, snapshot: int, node: str) -> str:
        return os.path.join(self.layout.references, f"{vmid}-{snapshot}-{node.replace(':', '_')}.raw")

    def remove_snapshots(self, vm: Vm, numbers: list[int] | None = None) -> Task:
        """Removes some snapshots, or all of them with whatever redo logs are left over."""
        failure = self.faults.take("snapshot_remove_fails")
        leftover = self.faults.take("consolidation_leftover") if not failure else None
        everything = numbers is None
        chosen = [one for one in vm.snapshots if everything or one.number in (numbers or [])]

        def work() -> None:
            try:
                with vm.lock:
                    if failure:
                        raise TaskError(f"An error occurred while consolidating disks: {failure}.")
                    for snapshot in chosen:
                        if snapshot not in vm.snapshots:
                            continue  # somebody else was faster
                        disks = dict(snapshot.disks)
                        vm.drop_from_tree(snapshot)
                        if not leftover:
                            vm.merge_children(disks)
                    if everything and not leftover:
                        vm.consolidate_all()
                    if leftover:
                        raise TaskError(
                            "An error occurred while consolidating disks: msg.snapshot.error-CONSOLIDATE: "
                            "Failed to lock the file."
                        )
            finally:
                vm.consolidating = False
                self.publish()

        vm.consolidating = vm.running
        self.publish()
        delay_s = self.faults.number("snapshot_remove_s", 0.1)
        operation = "vim.VirtualMachine.removeAllSnapshots" if everything else "vim.vm.Snapshot.remove"
        task = self.tasks.start(operation, vm.vmid, work, delay_s)
        if self.faults.get("snapshot_remove_waits"):
            task.done.wait()
        return task

    # --- guests

    def start_guest(self, vm: Vm, *, rate_bytes: float, seed: int, span_bytes: int, log: bool) -> None:
        self.stop_guest(vm.vmid)
        path = os.path.join(self.layout.log, f"guest-{vm.vmid}.jsonl") if log else None
        guest = Guest(vm, rate_bytes=rate_bytes, seed=seed, span_bytes=span_bytes, log=path)
        self.guests[vm.vmid] = guest
        guest.start()

    def stop_guest(self, vmid: int) -> None:
        guest = self.guests.pop(vmid, None)
        if guest is not None:
            guest.stop()
