"""Tasks of a host: `vmsvc/get.tasklist` and `vimsvc/task_info`.

Whether a command such as `snapshot.create` returns before its work is done differs between releases, and a
task may vanish from the list once it is over. So: what a task says is a hint, the state of the VM is the proof.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import Fault
from holdfast.esxi.says.vmomi import Reference, parse_object

__all__ = ["Task", "TaskState", "parse_task_info", "parse_tasklist"]

TaskState = Literal["queued", "running", "success", "error"]

_STATES: Final[dict[str, TaskState]] = {
    "queued": "queued", "running": "running", "success": "success", "error": "error",
}  # fmt: skip
_TASK: Final = re.compile(r"'vim\.Task:([^'\s]{1,300})'")


@dataclass(frozen=True, slots=True)
class Task:
    """A task as `task_info` describes it.

    Args:
        progress: percent, if it says so.
        fault: why it failed.
        result: id of the object that it made (a snapshot's, such as `12-snapshot-3`), or empty.
    """

    key: str
    state: TaskState
    progress: int | None
    fault: Fault | None
    result: str


def parse_tasklist(text: str) -> tuple[str, ...]:
    """The keys of the tasks (`haTask-512-vim.VirtualMachine.powerOn-2826`) of a VM, in the order of the list.

    Raises:
        SourceFormat: it is no such list.
    """
    if not re.search(r"\(ManagedObjectReference\)\s*\[", text):
        raise SourceFormat(f"vmsvc/get.tasklist printed no list, but: {printable(text.strip()[:200])}")
    return tuple(_TASK.findall(text))


def parse_task_info(text: str) -> Task:
    """What `vim-cmd vimsvc/task_info` printed.

    Raises:
        SourceFormat: it can not be understood.
    """
    info = parse_object(text, "vimsvc/task_info")
    state = _STATES.get(info.text("state"))
    if info.type != "vim.TaskInfo" or state is None:
        raise SourceFormat(
            f"vimsvc/task_info printed no task, but an object of type {printable(info.type)} "
            f"with the state '{printable(info.text('state'))}'"
        )
    error, result = info.child("error"), info.get("result")
    fault = None
    if error is not None:
        fault = Fault(error.type.rpartition(".")[2], error.text("msg") or info.text("description"))
    return Task(
        key=info.text("key"),
        state=state,
        progress=info.number("progress"),
        fault=fault,
        result=result.id if isinstance(result, Reference) else "",
    )
