"""`vim-cmd`: the host's daemon from the shell. The texts are those that were seen on real hosts, blanks included.

Faults go to standard output, and the exit code is not to be trusted; both as on real hosts. Objects are in `objects.py`, commands
that change something end in a task.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from tests.esxi_host import objects
from tests.esxi_host.inventory import QUESTION, Inventory
from tests.esxi_host.session import Session
from tests.esxi_host.tasks import Task
from tests.esxi_host.vmomi import Ref, Seq, Value, fault, text
from tests.esxi_host.vms import Vm

DEATHS = {
    "login": "Failed to login: Connection reset by peer",
    "ssl": "SSL Exception: The SSL handshake timed out local: 127.0.0.1:32146 peer: 127.0.0.1:443",
    "bad_alloc": "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\nAborted",
    "killed": "Killed",
}

Command = Callable[[Inventory, Session, list[str]], int]
VmCommand = Callable[[Inventory, Session, Vm, list[str]], int]


def run(inventory: Inventory, session: Session) -> int:
    """The exit code of `vim-cmd`."""
    arguments = session.arguments
    name = arguments[0] if arguments else ""
    if _dies(inventory, name):
        session.print(DEATHS[str(inventory.faults.take("vim_cmd_dies"))])
        return 255
    code = _dispatch(inventory, session, name.lstrip("/"), arguments[1:])
    return 0 if inventory.faults.get("exit_codes_lie") else code


def _dies(inventory: Inventory, name: str) -> bool:
    wanted = str(inventory.faults.get("vim_cmd_dies_in") or "")
    return bool(inventory.faults.get("vim_cmd_dies")) and name.startswith(wanted)


def _dispatch(inventory: Inventory, session: Session, name: str, rest: list[str]) -> int:
    if name in COMMANDS:
        return COMMANDS[name](inventory, session, rest)
    if name in VM_COMMANDS:
        if not rest:
            session.print(
                f"Insufficient arguments.\nUsage: {name.rpartition('/')[2]} {USAGES.get(name, 'vmid')}\n"
            )
            return 1
        vm = inventory.vms.get(int(rest[0])) if rest[0].isdigit() else None
        if vm is None or vm.vmid in inventory.invalid:
            message = f'Unable to find a VM corresponding to "{rest[0]}"'
            session.print(fault("vim.fault.NotFound", message, session.release))
            return 255
        return VM_COMMANDS[name](inventory, session, vm, rest[1:])
    if name in ("", "help"):
        session.print("Commands available under /:\nhbrsvc/       internalsvc/  solo/         vmsvc/        ")
        session.print("hostsvc/      proxysvc/     vimsvc/       help          ")
        return 0
    session.print(f"Invalid command '{name}'.")
    return 1


# --- lists


def _getallvms(inventory: Inventory, session: Session, _rest: list[str]) -> int:
    rows = [("Vmid", "Name", "File", "Guest OS", "Version", "Annotation")]
    skipped = {int(number) for number in str(inventory.faults.get("invalid_vm") or "").split(",") if number}
    for vm in sorted(inventory.vms.values(), key=lambda vm: str(vm.vmid)):
        if vm.vmid in inventory.invalid or vm.vmid in skipped:
            session.print(f"Skipping invalid VM '{vm.vmid}'")
            continue
        place = inventory.stores.bracket(vm.vmx)
        rows.append((str(vm.vmid), vm.name, place, vm.guest, vm.hardware, vm.pairs.get("annotation")))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    heads = [rows[0][0].ljust(widths[0])] + [
        _centred(head, width) for head, width in zip(rows[0][1:5], widths[1:], strict=True)
    ]
    session.print("   ".join([*heads, "Annotation"]))
    for row in rows[1:]:
        cells = [cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)]
        session.print("   ".join([*cells, row[5].ljust(len("Annotation"))]))
    return 0


def _centred(head: str, width: int) -> str:
    before = (width - len(head)) // 2
    return (" " * before + head).ljust(width)


def _tasklist(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    refs = [Ref(f"vim.Task:{task.key}") for task in inventory.tasks.of(vm.vmid)]
    session.print(text(Seq("ManagedObjectReference", refs), "8.0"))
    return 0


def _task_list(inventory: Inventory, session: Session, _rest: list[str]) -> int:
    refs = [Ref(f"vim.Task:{task.key}") for task in inventory.tasks.listed()]
    session.print(text(Seq("ManagedObjectReference", refs), "8.0"))
    return 0


def _task_info(inventory: Inventory, session: Session, rest: list[str]) -> int:
    if not rest:
        session.print("Insufficient arguments.\nUsage: task_info task_id\n")
        return 1
    key = rest[0].removeprefix("vim.Task:")
    task = inventory.tasks.find(key)
    if task is None:
        message = "The object has already been deleted or has not been completely created"
        obj = Ref(f"vim.Task:{key}")
        session.print(fault("vmodl.fault.ManagedObjectNotFound", message, session.release, obj=obj))
        return 255
    session.print(text(objects.task_info(task), session.release))
    return 0


def _task_cancel(inventory: Inventory, session: Session, rest: list[str]) -> int:
    return _task_info(inventory, session, rest)


def _license(_inventory: Inventory, session: Session, rest: list[str]) -> int:
    if rest != ["--show"]:
        session.print("Insufficient arguments.")
        return 1
    major = session.release.partition(".")[0]
    session.print(
        "[200] Sending request for installed licenses...[200] Complete, result is:\n"
        "   serial: 00000-00000-00000-00000-00000\n   vmodl key: esx.hypervisor.cpuPackageCoreLimited\n"
        f"   name: vSphere {major} Hypervisor\n   total: 0\n   used: 1\n   unit: cpuPackage:32core\n   Properties:\n"
        f"     [ProductName] = VMware ESX Server\n     [ProductVersion] = {major}.0\n"
        "     [count_disabled] = This license is unlimited\n"
        '     [feature] = vsmp:8 ("Up to 8-way virtual SMP")'
    )
    return 0


# --- what a VM is


def _print(head: str, build: Callable[[Inventory, Vm], Value]) -> VmCommand:
    def command(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
        with vm.lock:
            value = build(inventory, vm)
        session.print(head + text(value, session.release))
        return 0

    return command


def _get_state(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    session.print("Retrieved runtime info")
    session.print(inventory.told_power(vm))
    return 0


# --- power


def _power_on(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    session.print("Powering on VM:")
    if not vm.running and inventory.asks(vm):
        vm.question = QUESTION
        while vm.question is not None:
            if not session.alive:
                return 1
            time.sleep(0.02)
    return _told(session, inventory.power_on(vm), "Power on failed")


def _power_off(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    session.print("Powering off VM:")
    return _told(session, inventory.power_off(vm), "Power off failed")


def _suspend(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    session.print("Suspending VM:")
    task = inventory.power_off(vm, "vim.VirtualMachine.suspend", "Suspended")
    return _told(session, task, "Suspend failed")


def _shutdown(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    """The guest is asked; it goes down some time later, or not."""
    if not vm.running:
        message = f"The attempted operation cannot be performed in the current state ({vm.power})."
        session.print(fault("vim.fault.InvalidPowerState", message, session.release))
        return 255
    if vm.pairs.get("standin.tools", "TRUE") != "TRUE":
        message = "Cannot complete operation because VMware Tools is not running in this virtual machine."
        session.print(fault("vim.fault.ToolsUnavailable", message, session.release))
        return 255
    if not inventory.faults.take("shutdown_ignored"):
        inventory.tasks.start("vim.VirtualMachine.guestShutdown", vm.vmid, lambda: _down(inventory, vm), 0.2)
    return 0


def _down(inventory: Inventory, vm: Vm) -> None:
    if vm.running:
        inventory.power_off(vm)


def _told(session: Session, task: Task, failure: str) -> int:
    task.done.wait()
    if task.error is None:
        return 0
    session.print(failure)
    return 1


# --- snapshots


def _snapshot_get(_inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    session.print("Get Snapshot:")
    _tree(session, vm)
    return 0


def _tree(session: Session, vm: Vm) -> None:
    with vm.lock:
        for depth, snapshot in enumerate(vm.snapshots):
            lead = "--" * depth
            session.print(f"{lead}|-{'ROOT' if depth == 0 else 'CHILD'}")
            lead += "--"
            when = snapshot.created
            if session.release == "7.0":
                stamp = f"{when.month}/{when.day}/{when.year} {when.hour}:{when.minute}:{when.second}"
            else:
                stamp = f"{when.month}/{when.day}/{when.year} {when:%H:%M:%S}"
            session.print(f"{lead}Snapshot Name        : {snapshot.name}")
            session.print(f"{lead}Snapshot Id        : {snapshot.number}")
            session.print(f"{lead}Snapshot Desciption  : {snapshot.description}")
            session.print(f"{lead}Snapshot Created On  : {stamp}")
            session.print(f"{lead}Snapshot State       : {snapshot.state}")


def _snapshot_create(inventory: Inventory, session: Session, vm: Vm, rest: list[str]) -> int:
    session.print("Create Snapshot:")
    name, description = ([*rest, "", ""])[:2]
    memory = len(rest) > 2 and rest[2] not in ("0", "false")
    if vm.power == "Suspended" and vm.snapshots and not vm.chains:
        message = "Snapshot not taken since the state of the virtual machine has not changed since the last snapshot operation."
        session.print("Create snapshot failed\n" + message)
        return 1
    task = inventory.create_snapshot(vm, name, description, memory=memory)
    if task is not None and task.done.is_set() and task.error is not None:
        session.print("Create snapshot failed")
        return 1
    return 0


def _snapshot_remove(inventory: Inventory, session: Session, vm: Vm, rest: list[str]) -> int:
    if not rest:
        session.print(f"Insufficient arguments.\nUsage: snapshot.remove {USAGES['vmsvc/snapshot.remove']}\n")
        return 1
    session.print("Remove Snapshot:")
    known = {snapshot.number for snapshot in vm.snapshots}
    if not rest[0].isdigit() or int(rest[0]) not in known:
        session.print(
            fault(
                "vim.fault.NotFound",
                f'Unable to find a snapshot corresponding to "{rest[0]}"',
                session.release,
            )
        )
        return 255
    numbers = [int(rest[0])]
    if len(rest) > 1 and rest[1] in ("1", "true"):
        numbers += [one.number for one in vm.snapshots if one.number > int(rest[0])]
    task = inventory.remove_snapshots(vm, numbers)
    if task.done.is_set() and task.error is not None:
        session.print("Remove snapshot failed")
        return 1
    _tree(session, vm)
    return 0


def _snapshot_removeall(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    session.print("Remove All Snapshots:")
    task = inventory.remove_snapshots(vm)
    if task.done.is_set() and task.error is not None:
        session.print("Remove all snapshots failed")
        return 1
    return 0


# --- inventory, questions


def _registervm(inventory: Inventory, session: Session, rest: list[str]) -> int:
    if not rest:
        session.print(
            "Insufficient arguments.\nUsage: registervm vm_path name(optional) resource_pool(optional)\n"
        )
        return 1
    try:
        vm = inventory.register(inventory.stores.real(rest[0]))
    except FileNotFoundError:
        message = "The object or item referred to could not be found."
        session.print(fault("vim.fault.NotFound", message, session.release))
        return 255
    except FileExistsError as error:
        message = f"The specified key, name, or identifier '{error}' already exists."
        session.print(fault("vim.fault.AlreadyExists", message, session.release, name=str(error)))
        return 255
    if len(rest) > 1 and rest[1]:
        vm.pairs.set("displayName", rest[1])
        vm.pairs.write(vm.vmx)
    session.print(str(vm.vmid))
    return 0


def _unregister(inventory: Inventory, session: Session, vm: Vm, _rest: list[str]) -> int:
    if vm.running:
        message = f"The attempted operation cannot be performed in the current state ({vm.power})."
        session.print(fault("vim.fault.InvalidPowerState", message, session.release))
        return 255
    inventory.unregister(vm)
    return 0


def _reload(_inventory: Inventory, _session: Session, vm: Vm, _rest: list[str]) -> int:
    with vm.lock:
        if os.path.exists(vm.vmx):
            vm.load()
    return 0


def _message(inventory: Inventory, session: Session, vm: Vm, rest: list[str]) -> int:
    if vm.question is None:
        session.print("No message.")
        return 0
    choices = _choices(vm)
    if not rest:
        session.print(f"Virtual machine message {vm.question}:")
        session.print("msg.uuid.altered:This virtual machine may have been moved or copied.")
        session.print(
            "In order to configure certain management and networking features, VMware ESX needs to know which.\n"
        )
        session.print('If you don\'t know, answer "I Copied It".')
        for number, choice in choices.items():
            default = " [default]" if "Copied" in choice else ""
            session.print(f"   {number}. {choice} ({choice}){default}")
        return 0
    if len(rest) < 2 or rest[0] != str(vm.question) or not rest[1].isdigit() or int(rest[1]) not in choices:
        session.print(
            fault("vmodl.fault.InvalidArgument", "A specified parameter was not correct: ", session.release)
        )
        return 255
    choice = choices[int(rest[1])]
    if choice == "Cancel":
        vm.question = None
    else:
        inventory.answered(vm, copied="Copied" in choice)
    return 0


def _choices(vm: Vm) -> dict[int, str]:
    """The numbers differ from VM to VM, as they do between releases."""
    first = vm.vmid % 2
    return {first + number: choice for number, choice in enumerate(("Cancel", "I Moved It", "I Copied It"))}


COMMANDS: dict[str, Command] = {
    "vmsvc/getallvms": _getallvms,
    "vimsvc/task_info": _task_info,
    "vimsvc/task_list": _task_list,
    "vimsvc/task_cancel": _task_cancel,
    "solo/registervm": _registervm,
    "vimsvc/license": _license,
}

VM_COMMANDS: dict[str, VmCommand] = {
    "vmsvc/power.getstate": _get_state,
    "vmsvc/power.on": _power_on,
    "vmsvc/power.off": _power_off,
    "vmsvc/power.suspend": _suspend,
    "vmsvc/power.shutdown": _shutdown,
    "vmsvc/snapshot.get": _snapshot_get,
    "vmsvc/snapshot.create": _snapshot_create,
    "vmsvc/snapshot.remove": _snapshot_remove,
    "vmsvc/snapshot.removeall": _snapshot_removeall,
    "vmsvc/get.tasklist": _tasklist,
    "vmsvc/get.summary": _print("Listsummary:\n\n", objects.summary),
    "vmsvc/get.config": _print("Configuration:\n\n", objects.config),
    "vmsvc/get.runtime": _print("Runtime information\n\n", objects.runtime),
    "vmsvc/get.guest": _print("Guest information:\n\n", objects.guest),
    "vmsvc/device.getdevices": _print("Devices:\n\n", objects.devices),
    "vmsvc/get.filelayout": _print("File layout:\n\n", objects.file_layout),
    "vmsvc/get.filelayoutex": _print("File layout:\n\n", objects.file_layout_ex),
    "vmsvc/get.datastores": _print("Datastores:\n\n", objects.datastores),
    "vmsvc/unregister": _unregister,
    "vmsvc/reload": _reload,
    "vmsvc/message": _message,
}

USAGES = {
    "vmsvc/snapshot.create": "vmid [snapshotName] [snapshotDescription] [includeMemory] [quiesced]",
    "vmsvc/snapshot.remove": "vmid snapshotId [removeChildren]",
    "vmsvc/snapshot.removeall": "vmid",
    "vmsvc/message": "vmid [messageId] [messageChoice]",
}
