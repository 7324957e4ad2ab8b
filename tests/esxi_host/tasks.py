"""The host's tasks: what `get.tasklist` and `task_info` tell of, and what makes things happen later.

A task runs its work in a thread of its own, after a delay if it has one. A worker's exception is the task's error. Tasks stay in
the list for some seconds after their end, as on a host, unless the host is told to forget them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

KEPT_S = 600.0


class TaskError(Exception):
    """A fault of the host: its type, and its text."""

    def __init__(self, message: str, kind: str = "vim.fault.GenericVmConfigFault") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Task:
    """One task of one VM."""

    key: str
    vmid: int
    queued: datetime
    state: str = "running"
    progress: int = 0
    started: datetime | None = None
    completed: datetime | None = None
    ended_s: float = 0.0
    error: TaskError | None = None
    forgotten: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Tasks:
    """All tasks since the start."""

    def __init__(self, clock: Callable[[], datetime], forget: Callable[[], bool]) -> None:
        self._clock = clock
        self._forget = forget
        self._numbers = itertools.count(2826, 17)
        self._lock = threading.Lock()
        self._all: dict[str, Task] = {}

    def start(self, operation: str, vmid: int, work: Callable[[], None], delay_s: float = 0.0) -> Task:
        """A task that does its work after the delay. `operation` is such as `vim.VirtualMachine.powerOn`."""
        now = self._clock()
        task = Task(f"haTask-{vmid}-{operation}-{next(self._numbers)}", vmid, now, started=now)
        with self._lock:
            self._all[task.key] = task
        if delay_s <= 0:
            self._run(task, work)
        else:
            threading.Thread(
                target=self._later, args=(task, work, delay_s), name=task.key, daemon=True
            ).start()
        return task

    def _later(self, task: Task, work: Callable[[], None], delay_s: float) -> None:
        until = time.monotonic() + delay_s
        while (left := until - time.monotonic()) > 0:
            task.progress = min(95, int(100 * (1 - left / delay_s)))
            time.sleep(min(left, 0.05))
        self._run(task, work)

    def _run(self, task: Task, work: Callable[[], None]) -> None:
        try:
            work()
            task.state, task.progress = "success", 100
        except TaskError as error:
            task.state, task.error = "error", error
        except OSError as error:
            task.state, task.error = "error", TaskError(error.strerror or str(error), "vim.fault.FileFault")
        except Exception as error:
            task.state, task.error = "error", TaskError(str(error))
        task.completed = self._clock()
        task.ended_s = time.monotonic()
        task.forgotten = self._forget()
        task.done.set()

    def of(self, vmid: int) -> list[Task]:
        """The tasks that the host tells of for one VM, oldest first."""
        return [task for task in self.listed() if task.vmid == vmid]

    def listed(self) -> list[Task]:
        now = time.monotonic()
        with self._lock:
            found = list(self._all.values())
        return [
            task
            for task in found
            if not task.forgotten and (not task.done.is_set() or now - task.ended_s < KEPT_S)
        ]

    def find(self, key: str) -> Task | None:
        return next((task for task in self.listed() if task.key == key), None)

    def busy(self, vmid: int) -> bool:
        with self._lock:
            return any(task.vmid == vmid and not task.done.is_set() for task in self._all.values())


def host_clock(offset_s: float) -> datetime:
    """The time that the host believes in."""
    return datetime.now(UTC) + timedelta(seconds=offset_s)
