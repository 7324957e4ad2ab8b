"""A snapshot of ours: from before it is made until nothing of it is left.

The host's commands say little: whether they return before their work is done differs between releases, tasks vanish from
the list, a status of 0 proves nothing. So a command is run once, and then the host is looked at: the tree of snapshots, the
VMX, the files. What a task says is used for one thing, its error's text.

Invariants: a name is written down (`journal`) before the snapshot is asked for. Only a snapshot with exactly such a
name is removed, by its id, read from the tree just before. `remove` returns what is left over and raises only
if the host can not be reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from holdfast.errors import LinkLost, LinkTimeout, SourceError
from holdfast.esxi.agent.gate import SNAPSHOT_NOTE
from holdfast.esxi.inventory import HostView, Vm
from holdfast.esxi.journal import PREFIX
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import fault_error, fault_in
from holdfast.esxi.says.snapshots import Snapshot
from holdfast.esxi.vmx import MAX_VMX_BYTES, Vmx, parse_vmx

__all__ = ["Patience", "SnapshotKeeper", "Taken", "attached_paths", "read_vmx"]


_SEE_LOG: Final = "see vmware.log in the VM's folder; then run the backup again, without --quiesce or --memory if they were on"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a host.

    Args:
        appear_s: for a task, or its effect, to show at all after a command.
        create_s: for a snapshot to be made (with memory or quiescing that takes minutes).
        remove_s: for a snapshot to be consolidated, as long as the host works on it.
        every_s: between two looks.
    """

    appear_s: float = 20.0
    create_s: float = 1800.0
    remove_s: float = 48 * 3600.0
    every_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot of ours.

    Args:
        time: Unix seconds by our clock, of the moment after which it was there.
    """

    name: str
    id: int
    time: int


def read_vmx(view: HostView, vm: Vm) -> tuple[bytes, Vmx]:
    """The VM's VMX as it is now, and what it says."""
    data = view.console.read(vm.vmx, MAX_VMX_BYTES)
    return data, parse_vmx(data, printable(vm.vmx))


def attached_paths(vm: Vm, vmx: Vmx) -> dict[str, str]:
    """Label -> path on the host of the descriptor of each attached disk."""
    return {
        disk.label: disk.file_name if disk.file_name.startswith("/") else f"{vm.folder}/{disk.file_name}"
        for disk in vmx.disks
    }


class SnapshotKeeper:
    """Makes and removes snapshots of one host's VMs."""

    def __init__(self, view: HostView, patience: Patience | None = None) -> None:
        self._view = view
        self._patience: Final = patience or Patience()

    def take(self, vm: Vm, name: str, *, memory: bool = False, quiesce: bool = False) -> Taken:
        """A new snapshot of that name, which is written down already.

        Raises:
            SourceError: there is none, and why. One may still come into being: `remove` it in any case.
            LinkError: the connection is over.
        """
        doing = f"taking a snapshot of {vm.shown}"
        before = set(self._view.tasks(vm))
        words = (
            "vim-cmd", "vmsvc/snapshot.create", str(vm.id), name, SNAPSHOT_NOTE,
            str(int(memory)), str(int(quiesce)),
        )  # fmt: skip
        try:
            text = self._view.console.act(words, doing, timeout_s=self._patience.create_s).text
        except (LinkTimeout, LinkLost):  # it may have been done all the same
            text = ""
        seen: list[str] = []
        wait = _Wait(self._view, self._patience.appear_s, self._patience.create_s, self._patience.every_s)
        while True:
            found = self.find(vm, name)
            if found is not None and found.id is not None:
                return Taken(name, found.id, int(time.time()))
            if found is not None:
                raise SourceError(
                    f"{doing}: the host prints no ids of snapshots, so that it could not be removed again",
                    hint="ESX 4 is too old",
                )
            fault = fault_in(text)
            if fault is not None:
                error = fault_error(fault, doing)
                raise type(error)(error.message, hint=error.hint or _SEE_LOG)
            listed = [key for key in self._view.tasks(vm) if key not in before]
            seen += [key for key in listed if key not in seen]
            for key in seen:
                task = self._view.task(key)
                if task is not None and task.fault is not None and "snapshot" in key.lower():
                    error = fault_error(task.fault, doing)
                    raise type(error)(error.message, hint=error.hint or _SEE_LOG)
                if task is not None and task.state in ("queued", "running"):
                    wait.progress()
            if not wait.on():
                said = " ".join(text.replace("Create Snapshot:", "").split())
                raise SourceError(
                    f"the host made no snapshot of {vm.shown}"
                    + (f": {printable(said)}" if said else ", and did not say why"),
                    hint="see vmware.log in the VM's folder, and whether the datastore is full; then run the backup again",
                )

    def find(self, vm: Vm, name: str) -> Snapshot | None:
        """The VM's snapshot of that name."""
        return next((one for one in _all(self._view.snapshots(vm)) if one.name == name), None)

    def remove(self, vm: Vm, name: str, *, on: Iterable[str] = ()) -> tuple[str, ...]:
        """Sees to it that the snapshot is gone and the VM runs on what it ran on before.

        Args:
            on: paths of the descriptors that only this snapshot has brought, as far as they are known.

        Returns:
            Sentences on what is left over; none if nothing is.
        """
        doing = f"removing the snapshot {name} of {vm.shown}"
        trouble = self._wait_for_creation(vm, name)
        for _ in range(3):
            found = self.find(vm, name)
            if found is None:
                break
            if found.id is None or not name.startswith(PREFIX):
                return (f"the snapshot {name} of {vm.shown} is still there: the host prints no id for it",)
            trouble = self._remove_once(vm, found, doing)
        else:
            sentence = f"the snapshot {name} of {vm.shown} could not be removed: {trouble}"
            return (
                f"{sentence}; the next backup from this host tries again, or 'holdfast host check --clean'",
            )
        return self._left_over(vm, set(on))

    def _wait_for_creation(self, vm: Vm, name: str) -> str:
        """Waits until no snapshot can come into being any more."""
        wait = _Wait(self._view, 0.0, self._patience.create_s, self._patience.every_s)
        while self.find(vm, name) is None and self.works_on(vm, "createsnapshot"):
            wait.progress()
            if not wait.on():
                return "the host is still making it"
        return ""

    def _remove_once(self, vm: Vm, snapshot: Snapshot, doing: str) -> str:
        """Asks for the removal and waits for it; returns why it did not happen, or an empty string."""
        before = set(self._view.tasks(vm))
        words = ("vim-cmd", "vmsvc/snapshot.remove", str(vm.id), str(snapshot.id))
        try:
            text = self._view.console.act(words, doing, timeout_s=self._patience.remove_s).text
        except (LinkTimeout, LinkLost):  # it may have been done all the same
            text = ""
        fault = fault_in(text)
        trouble = fault.message if fault is not None else "the host did not say why"
        seen: list[str] = []
        wait = _Wait(self._view, self._patience.appear_s / 4, self._patience.remove_s, self._patience.every_s)
        while True:
            working = self.works_on(vm, "snapshot")
            gone = self.find(vm, snapshot.name) is None
            if gone and not working:
                return ""
            seen += [key for key in self._view.tasks(vm) if key not in before and key not in seen]
            for key in seen:
                task = self._view.task(key)
                if task is not None and task.fault is not None:
                    return printable(task.fault.message or task.fault.name)
            if working:
                wait.progress()
            if (fault is not None and not working) or not wait.on():
                return trouble

    def works_on(self, vm: Vm, word: str = "") -> bool:
        """Whether the host lists a task of the VM that has this word in its name and is not over."""
        for key in self._view.tasks(vm):
            if word in key.lower():
                task = self._view.task(key)
                if task is not None and task.state in ("queued", "running"):
                    return True
        return False

    def _left_over(self, vm: Vm, brought: set[str]) -> tuple[str, ...]:
        """What is there although the snapshot is not: descriptors that the VM still runs on, or files of them."""
        wait = _Wait(self._view, self._patience.appear_s / 4, self._patience.remove_s, self._patience.every_s)
        while True:
            _, vmx = read_vmx(self._view, vm)
            in_use = brought & set(attached_paths(vm, vmx).values())
            files = {path for path in brought if self._view.console.exists(path)}
            if not in_use and not files:
                return ()
            if self.works_on(vm, "snapshot"):
                wait.progress()
            if wait.on():
                continue
            names = printable(", ".join(sorted(path.rpartition("/")[2] for path in in_use or files)))
            if in_use:
                sentence = f"the snapshot of {vm.shown} is gone, but the host has not consolidated its redo logs ({names})"
                return (
                    f"{sentence}; 'holdfast host check --clean' has it done, if the VM has no other snapshots",
                )
            return (f"files of a removed snapshot of {vm.shown} are left on the datastore: {names}",)


class _Wait:
    """One wait: some time for anything to show at all, more while there is progress."""

    def __init__(self, view: HostView, appear_s: float, most_s: float, every_s: float) -> None:
        self._pause: Callable[[float], None] = view.console.pause
        self._appear_s = appear_s
        self._every_s = every_s
        now_s = time.monotonic()
        self._until_s = now_s + most_s
        self._quiet_until_s = now_s + appear_s

    def progress(self) -> None:
        """The host works on it."""
        self._quiet_until_s = time.monotonic() + max(self._appear_s, 2.0)

    def on(self) -> bool:
        """Waits a little; whether to go on waiting."""
        now_s = time.monotonic()
        if now_s >= min(self._until_s, self._quiet_until_s):
            return False
        self._pause(self._every_s)
        self._every_s = min(self._every_s * 1.3, 5.0)
        return True


def _all(roots: Iterable[Snapshot]) -> Iterable[Snapshot]:
    for root in roots:
        yield from root.walk()
