"""What happens to the host from outside while somebody works on it: files that vanish, processes that are killed, others' acts.

Switches that change how the host looks (no Python, a full /tmp, a wrong clock) act when they are set. Those that strike in the
middle of something are watched by a thread, which looks every few milliseconds and only while such a switch is set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from tests.esxi_host import rootfs
from tests.esxi_host.faults import Faults
from tests.esxi_host.inventory import Inventory
from tests.esxi_host.layout import PYTHON, Layout

WATCHED = ("kill_agent_after_mib", "agent_memory_mib", "power_off_after_mib", "remove_snapshots_after_mib")
MIB = 1 << 20
_POLL_S = 0.004

CLOCK = """\
# The host's clock is off, if /etc/clock-offset says so.
try:
    with open("/etc/clock-offset") as _file:
        _offset = float(_file.read())
    import time as _time
    _real, _real_ns = _time.time, _time.time_ns
    _time.time = lambda: _real() + _offset
    _time.time_ns = lambda: _real_ns() + int(_offset * 1e9)
except OSError:
    pass
"""


class Mischief:
    """Carries out the switches that are not a matter of one command."""

    def __init__(self, layout: Layout, faults: Faults, inventory: Inventory) -> None:
        self._layout = layout
        self._faults = faults
        self._inventory = inventory
        self._proc = os.path.join(layout.root, "proc")  # this namespace's; /proc itself is the machine's
        self._wake = threading.Event()
        self._read_at: dict[str, int] = {}
        faults.changed = self._changed

    def start(self) -> None:
        version = os.path.basename(os.path.realpath(PYTHON))
        folder = os.path.join(self._layout.root, "etc", version)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "sitecustomize.py"), "w", encoding="utf-8") as file:
            file.write(CLOCK)
        self._clock()
        self._python()
        threading.Thread(target=self._watch, name="mischief", daemon=True).start()

    def _changed(self, name: str) -> None:
        match name:
            case "no_python":
                self._python()
            case "tmp_full":
                rootfs.fill_tmp(self._layout, full=bool(self._faults.get(name)))
            case "clock_offset_s":
                self._clock()
            case _ if name in WATCHED:
                self._read_at[name] = self._inventory.board.read_bytes
                self._wake.set()
            case "datastore_full" | "busy_reads" | "busy_after_mib" | "read_error" | "read_delay_ms":
                self._inventory.publish()

    def _python(self) -> None:
        for name in rootfs.PYTHON_LINKS:
            link = os.path.join(self._layout.root, "bin", name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            if not self._faults.get("no_python"):
                os.symlink(os.path.realpath(PYTHON), link)

    def _clock(self) -> None:
        offset_s = self._faults.number("clock_offset_s")
        note = os.path.join(self._layout.root, "etc/clock-offset")
        date = os.path.join(self._layout.root, "bin/date")
        os.unlink(date)
        if not offset_s:
            os.symlink("busybox", date)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(note)
            return
        with open(note, "w", encoding="utf-8") as file:
            file.write(str(offset_s))
        with open(date, "w", encoding="utf-8") as file:
            file.write(
                f'#!/bin/sh\nexec busybox date -d "@$(( $(busybox date +%s) + {int(offset_s)} ))" "$@"\n'
            )
        os.chmod(date, 0o755)

    # --- what strikes in the middle

    def _watch(self) -> None:
        while True:
            armed = [name for name in WATCHED if self._faults.get(name)]
            if not armed:
                self._wake.wait()
                self._wake.clear()
                continue
            for name in armed:
                self._try(name)
            time.sleep(_POLL_S)

    def _try(self, name: str) -> None:
        limit = self._faults.number(name) * MIB
        if name == "kill_agent_after_mib":
            for pid in self._pythons():
                if _read_chars(f"{self._proc}/{pid}") >= limit and self._faults.take(name):
                    _kill(pid)
                    return
        elif name == "agent_memory_mib":
            for pid in self._pythons():
                if _resident_bytes(f"{self._proc}/{pid}") > limit and self._faults.take(name):
                    _kill(pid)
        elif self._inventory.board.read_bytes - self._read_at.get(name, 0) >= limit and self._faults.take(
            name
        ):
            if name == "power_off_after_mib":
                self._power_off()
            else:
                for vm in list(self._inventory.vms.values()):
                    self._inventory.remove_snapshots(vm)

    def _power_off(self) -> None:
        wanted = self._faults.get("power_off_vm")
        for vm in list(self._inventory.vms.values()):
            if vm.running and wanted in (None, vm.name):
                self._inventory.power_off(vm)
                return

    def _pythons(self) -> list[int]:
        """Processes that sessions started and that are Python programs, the host's own commands not among them."""
        found = []
        for name in os.listdir(self._proc):
            if not name.isdigit() or int(name) <= 3:
                continue
            try:
                with open(f"{self._proc}/{name}/cmdline", "rb") as file:
                    program = file.read().partition(b"\0")[0]
                root = os.readlink(f"{self._proc}/{name}/root")
            except OSError:
                continue
            ours = program.startswith(b"/usr/libexec/standin")
            if root == self._layout.root and os.path.basename(program).startswith(b"python") and not ours:
                found.append(int(name))
        return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _read_chars(process: str) -> int:
    try:
        with open(f"{process}/io", encoding="ascii") as file:
            return int(file.readline().split()[1])
    except (OSError, IndexError):
        return 0


def _resident_bytes(process: str) -> int:
    try:
        with open(f"{process}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0
