"""What dead runs have left on a host is put right; what others have left is reported.

Only what stands in our own journal is touched. A snapshot that has a name like ours but is not in the journal belongs to
another installation of Holdfast, which may be reading it at this moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.errors import HoldfastError, SourceNotFound
from holdfast.esxi.host import HostSession
from holdfast.esxi.inventory import Vm
from holdfast.esxi.journal import PREFIX, Debt, DebtEntry
from holdfast.esxi.names import printable
from holdfast.esxi.running import PowerSwitch
from holdfast.esxi.snapshots import attached_paths, read_vmx

__all__ = ["Leftover", "consolidate", "leftovers", "settle_abandoned"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a run has left on a host.

    Args:
        ours: whether `--clean` removes it.
        text: a sentence.
    """

    ours: bool
    text: str


def settle_abandoned(session: HostSession, tell: Callable[[str], None]) -> tuple[str, ...]:
    """Removes the snapshots of dead runs, and starts the VMs that they had shut down.

    Args:
        tell: told what was done.

    Returns:
        Sentences on what could not be done.
    """
    trouble: list[str] = []
    for entry in session.journal.abandoned(session.name):
        try:
            trouble += _settle(session, entry, tell)
        except HoldfastError as error:
            entry.release()
            trouble.append(
                f"what an earlier run left of {printable(entry.debt.vm_name)} could not be put right: {error.message}"
            )
    return tuple(trouble)


def _settle(session: HostSession, entry: DebtEntry, tell: Callable[[str], None]) -> list[str]:
    debt = entry.debt
    vm = _vm_of(session, debt)
    if vm is None:
        tell(f"the VM {printable(debt.vm_name)} that an earlier run was backing up is gone from the host")
        entry.settle()
        return []
    left: list[str] = []
    if debt.snapshot:
        there = session.keeper.find(vm, debt.snapshot) is not None
        left += session.keeper.remove(vm, debt.snapshot)
        if session.keeper.find(vm, debt.snapshot) is not None:
            entry.release()
            return left
        if there:
            tell(
                f"removed the snapshot {debt.snapshot} of {vm.shown}, which an interrupted run had left behind"
            )
    if debt.power_on and session.view.power(vm) == "off":
        PowerSwitch(session.view, session.patience).start(vm)
        tell(f"started {vm.shown} again, which an interrupted run had shut down")
    entry.settle()
    return left


def _vm_of(session: HostSession, debt: Debt) -> Vm | None:
    """The VM of a debt: by its id if that is still the same VM, else wherever it is now."""
    try:
        vm = session.view.vm(debt.vm_id)
        if (vm.uuid, vm.vmx) == (debt.vm_uuid, debt.vmx):
            return vm
    except SourceNotFound:
        pass
    vms = session.view.vms()
    same = [vm for vm in vms if vm.vmx == debt.vmx] or [vm for vm in vms if vm.uuid == debt.vm_uuid]
    return same[0] if len(same) == 1 else None


def leftovers(session: HostSession, vms: tuple[Vm, ...]) -> tuple[Leftover, ...]:
    """What runs have left on the host, ours and others'."""
    found: list[Leftover] = []
    entries = session.journal.abandoned(session.name)
    owed = {entry.debt.snapshot for entry in entries}
    for entry in entries:
        debt = entry.debt
        entry.release()
        parts = [f"the snapshot {debt.snapshot}"] if debt.snapshot else []
        parts += ["the VM has to be started again"] if debt.power_on else []
        if parts:
            found.append(
                Leftover(True, f"an interrupted run on {printable(debt.vm_name)}: {', '.join(parts)}")
            )
    alive = {debt.snapshot for debt in session.journal.running(session.name)}
    for vm in vms:
        try:
            tree = session.view.snapshots(vm)
            names = [one.name for root in tree for one in root.walk()]
            found += [
                Leftover(
                    False, f"the snapshot {name} of {vm.shown} was made by another installation of Holdfast"
                )
                for name in names
                if name.startswith(PREFIX) and name not in owed | alive
            ]
            if not tree and not session.keeper.works_on(vm) and _on_redo_logs(session, vm):
                found.append(
                    Leftover(
                        True, f"{vm.shown} has no snapshots but runs on redo logs: it needs consolidation"
                    )
                )
        except HoldfastError as error:
            found.append(Leftover(False, f"{vm.shown} could not be looked at: {error.message}"))
    return tuple(found)


def consolidate(session: HostSession, vm: Vm) -> bool:
    """Merges the redo logs of a VM that has no snapshots but still runs on some; whether there was such a thing.

    `snapshot.removeall` is what consolidates; it is only called when the tree is empty, as it spares no snapshot.
    """
    if session.view.snapshots(vm) or session.keeper.works_on(vm) or not _on_redo_logs(session, vm):
        return False
    words = ("vim-cmd", "vmsvc/snapshot.removeall", str(vm.id))
    session.console.act(words, f"consolidating {vm.shown}", timeout_s=session.patience.remove_s)
    for _ in range(2000):
        if not session.keeper.works_on(vm) and not _on_redo_logs(session, vm):
            return True
        session.console.pause(session.patience.every_s)
    return False


def _on_redo_logs(session: HostSession, vm: Vm) -> bool:
    """Whether a disk of the VM has a parent."""
    from holdfast.esxi.hostdisk import read_chain

    _, vmx = read_vmx(session.view, vm)
    for path in attached_paths(vm, vmx).values():
        try:
            if len(read_chain(path, session.console.read)) > 1:
                return True
        except HoldfastError:
            continue
    return False
