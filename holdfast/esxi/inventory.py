"""The VMs of a host with their disks and snapshots, and whether each disk can be backed up, or why not.

The table of VMs only gives hints (`says.machines`); what a VM is, its summary, its devices, its snapshots and its VMX
say. A VM that vanishes while one looks at it, or that the host itself can not read, is left out, with a note.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from holdfast.errors import SourceError, SourceNotFound, UsageError
from holdfast.esxi.console import Console
from holdfast.esxi.names import printable
from holdfast.esxi.says.devices import VmDisk, parse_devices
from holdfast.esxi.says.esxcli import HostVersion, parse_version
from holdfast.esxi.says.limits import (
    MAX_CONFIG_BYTES,
    License,
    SshdLimits,
    parse_licenses,
    parse_setting,
    parse_sshd_config,
)
from holdfast.esxi.says.machines import (
    DatastorePath,
    PowerState,
    VmListing,
    VmSummary,
    parse_getallvms,
    parse_power_state,
    parse_summary,
)
from holdfast.esxi.says.snapshots import Snapshot, parse_snapshots
from holdfast.esxi.says.storage import Volume, parse_volumes
from holdfast.esxi.says.tasks import Task, parse_task_info, parse_tasklist

__all__ = ["HostView", "Vm", "VmLook", "host_path"]

_T = TypeVar("_T")
_VOLUMES: Final = "/vmfs/volumes"


def host_path(path: DatastorePath) -> str:
    """The path of a datastore's file in the host's file system."""
    return posixpath.join(_VOLUMES, path.datastore, path.path)


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM of a host, as its summary says."""

    id: int
    name: str
    uuid: str
    instance_uuid: str
    power: PowerState
    file: DatastorePath
    guest: str

    @property
    def vmx(self) -> str:
        """Path of its VMX on the host."""
        return host_path(self.file)

    @property
    def folder(self) -> str:
        """Path of its folder on the host."""
        return posixpath.dirname(self.vmx)

    @property
    def shown(self) -> str:
        """Its name, for messages."""
        return f"{printable(self.name)} (id {self.id})"


@dataclass(frozen=True, slots=True)
class VmLook:
    """A VM with what belongs to it.

    Args:
        trouble: why it could not be looked at completely; empty if it could.
    """

    vm: Vm
    disks: tuple[VmDisk, ...]
    snapshots: tuple[Snapshot, ...]
    trouble: str = ""

    def all_snapshots(self) -> Iterator[Snapshot]:
        """All of the tree, parents first."""
        for root in self.snapshots:
            yield from root.walk()

    @property
    def obstacle(self) -> str:
        """Why nothing of it can be backed up; empty if something can."""
        if self.trouble:
            return self.trouble
        if self.disks and all(disk.obstacle for disk in self.disks):
            return "none of its disks can be backed up"
        return ""


class HostView:
    """Looks at a host; changes nothing. Threads may share it."""

    def __init__(self, console: Console) -> None:
        self.console: Final = console

    def version(self) -> HostVersion:
        """Which ESXi it is.

        Raises:
            SourceFormat: it is none.
        """
        return self.console.look(("vmware", "-vl"), "asking for the version", parse_version)

    def volumes(self) -> tuple[Volume, ...]:
        """Its file systems."""
        words = ("esxcli", "--formatter=csv", "storage", "filesystem", "list")
        return self.console.look(words, "listing the datastores", parse_volumes)

    def clock_s(self) -> int:
        """What its clock says, in Unix seconds."""
        return self.console.look(("date", "-u", "+%s"), "reading the clock", _whole)

    def licenses(self) -> tuple[License, ...]:
        """Its licences. A key that is limited to the agent can not ask for them, nor for what the next two do."""
        return self.console.look(
            ("vim-cmd", "vimsvc/license", "--show"), "asking for the licence", parse_licenses
        )

    def sshd_limits(self) -> SshdLimits:
        """The limits of its sshd, as far as the file of its settings tells them."""
        data = self.console.read("/etc/ssh/sshd_config", MAX_CONFIG_BYTES)
        return parse_sshd_config(data.decode("utf-8", "replace"))

    def shell_setting(self, name: str) -> int:
        """A number of its `UserVars`, such as `ESXiShellTimeOut`."""
        words = ("esxcli", "system", "settings", "advanced", "list", "-o", f"/UserVars/{name}")
        return self.console.look(words, f"asking for {name}", parse_setting)

    def python(self) -> str:
        """The version of its Python; empty if it has none."""
        return self.console.python()

    def listing(self) -> VmListing:
        """The table of VMs."""
        return self.console.look(("vim-cmd", "vmsvc/getallvms"), "listing the VMs", parse_getallvms)

    def vms(self, note: Callable[[str], None] = lambda _text: None) -> tuple[Vm, ...]:
        """All VMs, ordered by id.

        Args:
            note: told of VMs that are left out.
        """
        listing = self.listing()
        found = []
        for row in listing.rows:
            try:
                found.append(self.vm(row.id))
            except SourceNotFound:
                note(f"the VM with the id {row.id} vanished while the host was looked at")
            except SourceError as error:
                note(f"the VM {printable(row.name)} (id {row.id}) is left out: {error.message}")
        for number in listing.skipped:
            note(f"the host itself can not read the VM with the id {number}: its files may be gone")
        return tuple(found)

    def vm(self, number: int) -> Vm:
        """The VM with this id, as it is now.

        Raises:
            SourceNotFound: there is none.
        """
        return _vm(self._ask("get.summary", number, parse_summary))

    def find(self, name: str) -> Vm:
        """The VM of that name, or else with that id or UUID.

        Raises:
            SourceNotFound: there is none.
            UsageError: there are several.
        """
        vms = self.vms()
        digits = name.replace("-", "").replace(" ", "").lower()
        found = (
            [vm for vm in vms if vm.name == name]
            or [vm for vm in vms if len(digits) == 32 and digits in (vm.uuid, vm.instance_uuid)]
            or [vm for vm in vms if str(vm.id) == name]
        )
        if not found:
            near = [printable(vm.name) for vm in vms if vm.name.lower() == name.lower()]
            hint = f"did you mean '{near[0]}'?" if near else "'holdfast vms HOST' lists them"
            raise SourceNotFound(f"the host has no VM '{printable(name)}'", hint=hint)
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} VMs are called '{printable(name)}'",
                hint="name one by its id: " + ", ".join(f"{vm.id} ({printable(vm.vmx)})" for vm in found),
            )
        return found[0]

    def look(self, vm: Vm) -> VmLook:
        """The VM with its disks and snapshots; what could not be found out is its `trouble`."""
        try:
            return VmLook(vm, self.disks(vm), self.snapshots(vm))
        except SourceError as error:
            return VmLook(vm, (), (), trouble=error.message)

    def disks(self, vm: Vm) -> tuple[VmDisk, ...]:
        """Its disks, ordered by key."""
        return self._ask("device.getdevices", vm.id, parse_devices).disks

    def snapshots(self, vm: Vm) -> tuple[Snapshot, ...]:
        """The topmost snapshots of its tree."""
        return self._ask("snapshot.get", vm.id, parse_snapshots)

    def power(self, vm: Vm) -> PowerState:
        """Whether it runs now."""
        return self._ask("power.getstate", vm.id, parse_power_state)

    def tasks(self, vm: Vm) -> tuple[str, ...]:
        """The keys of the tasks that the host lists for it."""
        return self._ask("get.tasklist", vm.id, parse_tasklist)

    def task(self, key: str) -> Task | None:
        """A task as it is now; None if the host knows it no more."""
        words = ("vim-cmd", "vimsvc/task_info", key)
        try:
            return self.console.look(words, "looking at a task", parse_task_info)
        except SourceError:
            return None

    def _ask(self, verb: str, number: int, parse: Callable[[str], _T]) -> _T:
        doing = f"asking for {verb} of the VM with the id {number}"
        return self.console.look(("vim-cmd", f"vmsvc/{verb}", str(number)), doing, parse)


def _vm(summary: VmSummary) -> Vm:
    return Vm(
        summary.id,
        summary.name,
        summary.uuid,
        summary.instance_uuid,
        summary.power,
        summary.file,
        summary.guest,
    )


def _whole(text: str) -> int:
    word = text.strip()
    if not word.isdecimal() or len(word) > 12:
        raise SourceError(f"the host's clock says '{printable(word)}', which is no time")
    return int(word)
