"""A VM whose folder is complete becomes known to its host.

Nothing is believed: the VM is registered when the host lists it. An attempt whose answer was lost may be made again, since the host
refuses what is registered already. When it can not be done, the error says that the folder is whole, so that nobody restores anew.
"""

from __future__ import annotations

import posixpath

from holdfast.errors import HoldfastError, SourceError
from holdfast.esxi.host import HostSession
from holdfast.esxi.inventory import Vm
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import fault_in
from holdfast.esxi.says.machines import parse_registered

__all__ = ["register"]


def register(session: HostSession, vmx: str, name: str) -> Vm:
    """The VM, registered with the host.

    It is tried again after failures that pass: what is registered already is refused, and found in the list.

    Raises:
        SourceError: the host refuses, or does not list it afterwards.
        KeyLimited: our key may not register it.
        LinkError: the connection is over.
    """
    doing = f"registering {printable(vmx)}"
    named = () if name.startswith("-") else (name,)  # it would be an option; the VMX says the name as well
    tail = posixpath.join(*vmx.split("/")[-2:])
    try:
        answer = session.console.repeated(
            lambda: session.console.act(("vim-cmd", "solo/registervm", vmx, *named), doing)
        )
        fault = fault_in(answer.text)
        is_there = fault is not None and fault.name == "AlreadyExists"
        number = None if is_there else parse_registered(answer.require(doing))
        for vm in session.view.vms():
            if vm.id == number or (number is None and vm.file.path == tail):
                return vm
        answer.require(doing)
        raise SourceError("the host has registered the VM, but does not list it")
    except HoldfastError as error:
        hint = f"the VM is complete in its folder: register {printable(vmx)} on the host yourself"
        raise type(error)(error.message, hint=hint) from None
