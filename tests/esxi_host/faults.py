"""The switches that make the stand-in misbehave as real hosts do, and the table of them.

A switch that is not set is off. A switch may be set for a number of times: each time that it strikes, `take` counts
down, and at nothing it is off again. docs/STANDIN.md shows the same table, and a test holds it against this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

Value = str | int | float | bool

TABLE: dict[str, str] = {
    # the connection
    "refuse_connections": "connections are closed before sshd speaks",
    "drop_after_bytes": "a connection is reset when that many bytes went over it; strikes once unless `times` says more",
    "hang_after_bytes": "a connection goes silent for good when that many bytes went over it; strikes once",
    "no_password": "no keyboard-interactive either: only keys are let in",
    "max_sessions": "sshd's MaxSessions (ESXi: 10)",
    "max_startups": "sshd's MaxStartups (ESXi: `10:30:100`), as its settings tell it; not applied",
    "shell_timeout_s": "`UserVars.ESXiShellTimeOut`, as `esxcli` tells it; not applied",
    "rekey_limit": "sshd's RekeyLimit, such as `16M` (ESXi: `1G 1H`)",
    "banner": "this text is sent before authentication",
    "session_noise": "each session begins with this text on stderr",
    # what runs on the host
    "no_python": "`python` and `python3` are not there",
    "kill_agent_after_mib": "SIGKILL for a Python that a session runs, when it has read that much; strikes once",
    "agent_memory_mib": "SIGKILL for each Python of a session that has more resident memory",
    "tmp_full": "/tmp has no room for a byte",
    "clock_offset_s": "the host's clock is off: `date`, times of snapshots and tasks, and `time.time` of its Python",
    # the datastores
    "datastore_full": "writes to this datastore (its name, or `*`) end with ENOSPC, and snapshots fail",
    "busy_reads": "reads on open files end with EBUSY as soon as the host has locked the file",
    "busy_after_mib": "reads end with EBUSY when that much was read from the datastores since; strikes once",
    "read_error": "reads of files whose name ends so end with EIO",
    "read_delay_ms": "each read from a datastore takes that much longer",
    # the host's daemon
    "vim_cmd_dies": "`vim-cmd` ends as it does in need: `login`, `ssl`, `bad_alloc` or `killed`",
    "vim_cmd_dies_in": "... but only commands that begin so, such as `vmsvc/get`",
    "slow_commands_s": "each command of the host takes that much longer",
    "exit_codes_lie": "`vim-cmd` ends with 0 whatever happened",
    "invalid_vm": "`getallvms` says `Skipping invalid VM` for this number, and goes on",
    "state_late_s": "`power.getstate` tells a new power state only after that time",
    "shutdown_ignored": "the guest does nothing when it is asked to shut down",
    "question_on_power_on": "powering on waits for an answer about moving or copying",
    # tasks
    "snapshot_create_fails": "the task ends in an error with this text; there is no snapshot",
    "snapshot_create_async_s": "`snapshot.create` returns at once, and the snapshot is there after that time",
    "snapshot_create_vanishes": "`snapshot.create` says what it always says; neither task nor snapshot is ever seen",
    "snapshot_remove_fails": "the task ends in an error with this text; the snapshot stays",
    "snapshot_remove_s": "consolidation takes that long (0.1 s if not set)",
    "snapshot_remove_waits": "`snapshot.remove` returns when the consolidation is done, not before",
    "consolidation_leftover": "the snapshot leaves the tree, but the VM goes on running on its redo logs",
    "tasks_forgotten": "tasks leave `get.tasklist` and `task_info` when they end",
    # what others do in the middle of it
    "power_off_after_mib": "the VM named by `power_off_vm` (or the first) is powered off when that much was read; once",
    "power_off_vm": "see `power_off_after_mib`",
    "remove_snapshots_after_mib": "somebody removes all snapshots of all VMs when that much was read; strikes once",
}

ONCE = {
    *(
        "drop_after_bytes",
        "hang_after_bytes",
        "kill_agent_after_mib",
        "busy_after_mib",
        "power_off_after_mib",
    ),
    "remove_snapshots_after_mib",
}
"""Switches that are set for one time unless the caller says otherwise."""


@dataclass(slots=True)
class _Set:
    value: Value
    left: int | None


class Faults:
    """The switches of one stand-in. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set: dict[str, _Set] = {}
        self._struck: dict[str, int] = {}
        self.changed: Callable[[str], None] = lambda _name: None
        """Called after a switch was set, cleared or used up."""

    def set(self, name: str, value: Value = True, *, times: int | None = None) -> None:
        if name not in TABLE:
            raise ValueError(f"there is no fault {name!r}; the switches are: {', '.join(TABLE)}")
        if times is None and name in ONCE:
            times = 1
        with self._lock:
            self._set[name] = _Set(value, times)
        self.changed(name)

    def clear(self, *names: str) -> None:
        """Those switches, or all of them, are off."""
        with self._lock:
            gone = [name for name in (names or tuple(self._set)) if self._set.pop(name, None)]
        for name in gone:
            self.changed(name)

    def get(self, name: str) -> Value | None:
        """The switch's value; None if it is off. Does not count as a strike."""
        assert name in TABLE, name
        with self._lock:
            found = self._set.get(name)
            return found.value if found else None

    def take(self, name: str) -> Value | None:
        """The switch's value, and that counts as a strike."""
        assert name in TABLE, name
        with self._lock:
            found = self._set.get(name)
            if found is None:
                return None
            self._struck[name] = self._struck.get(name, 0) + 1
            if found.left is not None:
                found.left -= 1
                if found.left <= 0:
                    del self._set[name]
        self.changed(name)
        return found.value

    def number(self, name: str, default: float = 0.0) -> float:
        """The switch's value as a number."""
        value = self.get(name)
        return default if value is None else float(value)

    def struck(self) -> dict[str, int]:
        """How often each switch has struck, so that a test can tell a passed trial from one that never happened."""
        with self._lock:
            return dict(self._struck)

    def all(self) -> dict[str, Value]:
        with self._lock:
            return {name: found.value for name, found in self._set.items()}
