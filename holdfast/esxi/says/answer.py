"""What a command of an ESXi host answered: its text, its status, and the fault in it, as an error of ours.

`vim-cmd` prints faults on its standard output like results, its exit status is no proof of anything, and status 255 may
as well be that of the connection. So commands are run with a sentinel behind them, `...; echo "@@rc=$?"`: an answer
without it was cut off. Then the text decides, not the status.

Deliberately no retrying: whether a command may be run twice is known to whoever runs it; `is_passing` only
says which failures are worth it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import SourceError, SourceFormat, SourceNotFound, SourceUnreadable, SourceUnsupported
from holdfast.esxi.names import printable
from holdfast.units import MIB

__all__ = [
    "MAX_ANSWER_BYTES",
    "SENTINEL",
    "Answer",
    "Fault",
    "fault_error",
    "fault_in",
    "is_passing",
    "with_sentinel",
]

MAX_ANSWER_BYTES: Final = 16 * MIB
"""Of `get.filelayoutex` of a VM with hundreds of files; most answers are a few KiB."""

SENTINEL: Final = "@@rc="

_FAULT_CHARACTERS: Final = 64 * 1024

_SENTINEL: Final = re.compile(r"(?:\A|\n)?@@rc=([0-9]{1,3})\s*\Z")
_FAULT: Final = re.compile(r"^[ \t]*\(((?:vim|vmodl)\.fault\.(\w+))\)[ \t]*\{", re.MULTILINE)
_MESSAGE: Final = re.compile(r'^\s*msg = "(.*?)"\s*,?\s*$', re.MULTILINE | re.DOTALL)
_OBJECT: Final = re.compile(r"^\s*obj = '([^'\n]*)'", re.MULTILINE)
_EXISTING: Final = re.compile(r'^\s*name = "([^"\n]*)"', re.MULTILINE)
_PASSING: Final = re.compile(
    r"Failed to login: |SSL Exception: |std::bad_alloc|Connection reset by peer|^Killed$|Memory allocation|HostCommunication",
    re.MULTILINE,
)


def with_sentinel(command: str) -> str:
    """The shell command that runs `command` and then prints how it ended."""
    return f'{command}\necho "{SENTINEL}$?"'


@dataclass(frozen=True, slots=True)
class Answer:
    """What one command printed.

    Args:
        text: without the sentinel; what is no UTF-8 is escaped.
    """

    text: str
    status: int

    @classmethod
    def of(cls, data: bytes, doing: str) -> Answer:
        """The answer in the output of a command that was run `with_sentinel`.

        Args:
            doing: what was attempted, to follow "while".

        Raises:
            SourceError: it is too long, or cut off.
        """
        if len(data) > MAX_ANSWER_BYTES:
            raise SourceFormat(
                f"the host answered with more than {MAX_ANSWER_BYTES // MIB} MiB while {doing}"
            )
        text = data.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n")
        match = _SENTINEL.search(text)
        if match is None:
            raise SourceError(
                f"the host's answer was cut off while {doing}: {_tail(text)}",
                hint="the host may be short of memory, or the connection broke: try again",
            )
        return cls(text[: match.start()] + ("\n" if match.start() else ""), int(match[1]))

    @classmethod
    def said(cls, output: bytes, errors: bytes, status: int) -> Answer:
        """The answer of a command that has printed that; its standard error counts only if it failed and said nothing else."""
        text = output.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n")
        if status and not text.strip():
            text = errors.decode("utf-8", errors="replace")
        return cls(text, status)

    def require(self, doing: str) -> str:
        """The text, if it holds no fault and the command says that it succeeded.

        Raises:
            SourceError: what `fault_error` makes of the fault, or the last words of a command that failed.
        """
        fault = fault_in(self.text)
        if fault is not None:
            raise fault_error(fault, doing)
        if self.status:
            hint = "the host may be short of memory: try again" if is_passing(self.text) else ""
            raise SourceError(
                f"the host failed (status {self.status}) while {doing}: {_tail(self.text)}", hint=hint
            )
        return self.text


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that `vim-cmd` printed.

    Args:
        name: `NotFound`, `InvalidPowerState`, ...; without `vim.fault.`
        message: VMware's own sentence.
        about: the object or the existing name that it is about, if it says so.
    """

    name: str
    message: str
    about: str = ""


def fault_in(text: str) -> Fault | None:
    """The fault that an answer consists of; faults inside of an object (a task's `error`) do not count."""
    text = text[:_FAULT_CHARACTERS]
    match = _FAULT.search(text)
    if match is None or re.search(
        r"^[ \t]*\((?!(?:vim|vmodl)\.fault\.)[\w.]+\)[ \t]*[{\[]", text[: match.start()], re.MULTILINE
    ):
        return None
    body = text[match.end() :]
    message, about = _MESSAGE.search(body), _OBJECT.search(body) or _EXISTING.search(body)
    return Fault(match[2], message[1].strip() if message else "", about[1] if about else "")


def fault_error(fault: Fault, doing: str) -> SourceError:
    """The error that says what a fault means to the user."""
    kind, hint = _MEANINGS.get(fault.name, (SourceError, ""))
    words = printable(fault.message) if fault.message else f"the fault {fault.name}"
    about = f" ({printable(fault.about)})" if fault.about else ""
    return kind(f"the host refused while {doing}: {words}{about}", hint=hint)


def is_passing(text: str) -> bool:
    """Whether the failure is one of those that pass: memory pressure, a management service that restarts."""
    return _PASSING.search(text) is not None


_BUSY: Final = "something else works on the VM at the moment: try again later"
_LOCKED: Final = (
    "a running VM locks its disks, other hosts may, too: take a snapshot first, or power the VM off"
)
_MEANINGS: Final[dict[str, tuple[type[SourceError], str]]] = {
    "NotFound": (SourceNotFound, "was the VM removed or registered anew? Ids of VMs change with that"),
    "ManagedObjectNotFound": (SourceNotFound, "it was removed meanwhile, or its task is long over"),
    "FileNotFound": (SourceNotFound, "a file of the VM is missing on the datastore"),
    "AlreadyExists": (
        SourceError,
        "it is registered already, maybe as an invalid VM: unregister that one first",
    ),
    "DuplicateName": (SourceError, "choose another name"),
    "InvalidPowerState": (SourceError, "the VM has changed its power state meanwhile: look, then try again"),
    "InvalidState": (SourceError, _BUSY),
    "TaskInProgress": (SourceError, _BUSY),
    "ResourceInUse": (SourceError, _BUSY),
    "ConcurrentAccess": (SourceError, _BUSY),
    "Timedout": (SourceError, _BUSY),
    "ToolsUnavailable": (SourceError, "VMware Tools do not run in the guest: back up without quiescing"),
    "ApplicationQuiesceFault": (SourceError, "the guest could not be quiesced: back up without quiescing"),
    "SnapshotFault": (SourceError, "see the VM's own log (vmware.log) for the cause"),
    "NoDiskSpace": (SourceError, "the datastore is full: free some space there first"),
    "FileLocked": (SourceUnreadable, _LOCKED),
    "FileFault": (SourceUnreadable, _LOCKED),
    "CannotAccessFile": (SourceUnreadable, _LOCKED),
    "NoPermission": (SourceUnreadable, "use an account with the role of an administrator"),
    "InvalidLogin": (SourceUnreadable, "user name or password are wrong"),
    "RestrictedVersion": (
        SourceUnsupported,
        "the host's free licence does not allow this by its interface; use SSH",
    ),
    "NotSupported": (SourceUnsupported, "the host or this VM's virtual hardware can not do that"),
    "SnapshotNotSupported": (SourceUnsupported, "power the VM off to back it up"),
}


def _tail(text: str) -> str:
    words = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    return printable(words[-300:]) or "it said nothing"
