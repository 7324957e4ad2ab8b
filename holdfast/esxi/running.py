"""Whether a VM runs while it is backed up: it is shut down and started as asked, and ends as it was.

    hot    a VM that runs is read from a snapshot; one that is off is read as it is
    warm   the guest is shut down, a snapshot taken, the VM started, and the snapshot read
    cold   the guest is shut down, the disks read, the VM started

A guest is asked to shut down and given time; it is switched off only if that was allowed. Commands are not believed:
the power state is read until it is what it should be. That a VM has to be started again is written down before it
is shut down, so that a later run does it if this one dies.
"""

from __future__ import annotations

import re
import threading
import time
from typing import Final, Literal

from holdfast.errors import HoldfastError, SourceError
from holdfast.esxi.inventory import HostView, Vm
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import fault_error, fault_in
from holdfast.esxi.says.machines import PowerState
from holdfast.esxi.snapshots import Patience

__all__ = ["How", "PowerSwitch"]

How = Literal["hot", "warm", "cold"]

_MESSAGE: Final = re.compile(r"^Virtual machine message (\S+):", re.MULTILINE)
_CHOICE: Final = re.compile(r"^\s*(\d+)\.\s*(.*)$", re.MULTILINE)
_SWITCH_S: Final = 180.0


class PowerSwitch:
    """Switches the VMs of one host on and off.

    Args:
        shutdown_s: how long a guest may take to shut down.
    """

    def __init__(
        self, view: HostView, patience: Patience | None = None, *, shutdown_s: float = 300.0
    ) -> None:
        self._view = view
        self._patience = patience or Patience()
        self._shutdown_s = shutdown_s

    def shut_down(self, vm: Vm, *, force: bool) -> None:
        """The VM is off.

        Args:
            force: switch it off if the guest does not shut down.

        Raises:
            SourceError: it still runs.
        """
        doing = f"shutting the guest of {vm.shown} down"
        answer = self._view.console.act(("vim-cmd", "vmsvc/power.shutdown", str(vm.id)), doing)
        fault = fault_in(answer.text)
        if fault is None and self._becomes(vm, "off", self._shutdown_s):
            return
        if not force:
            if self._view.power(vm) == "off":
                return
            if fault is not None:
                error = fault_error(fault, doing)
                raise SourceError(
                    error.message,
                    hint="VMware Tools have to run in the guest; --force-off switches it off as a power failure would",
                )
            raise SourceError(
                f"the guest of {vm.shown} did not shut down within {self._shutdown_s:g} s; it was left running",
                hint="--force-off switches it off as a power failure would, or back it up with --how hot",
            )
        self._view.console.act(("vim-cmd", "vmsvc/power.off", str(vm.id)), f"switching {vm.shown} off")
        if not self._becomes(vm, "off", _SWITCH_S):
            raise SourceError(f"{vm.shown} can not be switched off; it is {self._view.power(vm)}")

    def start(self, vm: Vm, *, copied: bool = False) -> None:
        """The VM runs.

        Args:
            copied: how the question whether it was moved or copied is answered, should the host ask.

        Raises:
            SourceError: it does not start.
        """
        if self._view.power(vm) == "on":
            return
        doing = f"starting {vm.shown}"
        said: list[str] = []

        def switch() -> None:
            try:
                said.append(self._view.console.act(("vim-cmd", "vmsvc/power.on", str(vm.id)), doing).text)
            except HoldfastError as error:
                said.append(error.message)

        # The command waits for as long as the host has a question, so that somebody else has to answer it.
        switching = threading.Thread(target=switch, name="power-on", daemon=True)
        switching.start()
        until_s = time.monotonic() + _SWITCH_S
        while time.monotonic() < until_s:
            if self._view.power(vm) == "on":
                switching.join(30.0)
                return
            self._answer(vm, copied=copied)
            if not switching.is_alive():
                break
            self._view.console.pause(self._patience.every_s)
        fault = fault_in(said[0]) if said else None
        if fault is not None and fault.name != "InvalidPowerState":
            raise fault_error(fault, doing)
        if self._becomes(vm, "on", 30.0):
            return
        words = " ".join(said[0].split()) if said else "it waits for something"
        raise SourceError(
            f"{vm.shown} does not start: {printable(words)}",
            hint="see vmware.log in the VM's folder, then start it yourself",
        )

    def _becomes(self, vm: Vm, state: PowerState, limit_s: float) -> bool:
        until_s = time.monotonic() + limit_s
        every_s = self._patience.every_s
        while True:
            if self._view.power(vm) == state:
                return True
            if time.monotonic() >= until_s:
                return False
            self._view.console.pause(every_s)
            every_s = min(every_s * 1.3, 3.0)

    def _answer(self, vm: Vm, *, copied: bool) -> None:
        """Answers the question whether the VM was moved or copied, if the host asks it; no other one."""
        ask = ("vim-cmd", "vmsvc/message", str(vm.id))
        text = self._view.console.look(ask, "looking for a question of the host", str)
        message = _MESSAGE.search(text)
        if message is None or "uuid.altered" not in text:
            return
        word = "Copied" if copied else "Moved"
        choices = [number for number, label in _CHOICE.findall(text) if word.lower() in label.lower()]
        if choices:
            self._view.console.act((*ask, message[1], choices[0]), "answering the host's question")
