"""`holdfast host capture`: what a host prints, with names replaced, so that it can be shown to strangers.

Read-only. Each name, address and UUID becomes a word of its own, the same everywhere, so that the texts still fit
together; blanks and line ends stay as they are, since they are what parsers stumble over.
"""

from __future__ import annotations

import io
import re
import shlex
import tarfile
from functools import partial
from typing import TYPE_CHECKING, Final

from holdfast.errors import DestinationExists, HoldfastError, storage_error
from holdfast.esxi.vmx import MAX_VMX_BYTES
from holdfast.esxi.vmxedit import VmxText

if TYPE_CHECKING:
    from holdfast.esxi.host import HostSession
    from holdfast.esxi.inventory import Vm

__all__ = ["Disguise", "capture_host"]

_HOST_COMMANDS: Final = tuple(
    tuple(command.split())
    for command in (
        "vmware -vl", "uname -a", "python3 -V", "date -u", "esxcli system version get", "esxcli storage filesystem list",
        "esxcli --formatter=csv storage filesystem list", "esxcli vm process list", "vim-cmd vmsvc/getallvms",
        "vim-cmd vmsvc/snapshot.create", "vim-cmd vmsvc/snapshot.remove", "vim-cmd solo/registervm",
        "ls -la /bin /usr/bin", "busybox --help", "df",
    )
)  # fmt: skip
_VM_COMMANDS: Final = (
    "get.summary", "get.config", "get.runtime", "get.filelayoutex", "get.datastores", "device.getdevices",
    "snapshot.get", "power.getstate", "get.tasklist",
)  # fmt: skip
_MAX_VMSD_BYTES: Final = 1 << 20
_SHORTEST_NOTE: Final = 4  # a shorter line of a note would be found in the middle of words
_PATTERNS: Final = (
    ("uuid", re.compile(r"\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b")),
    ("uuid", re.compile(r"\b(?:[0-9a-fA-F]{2} ){7}[0-9a-fA-F]{2}[- ](?:[0-9a-fA-F]{2} ){7}[0-9a-fA-F]{2}\b")),
    ("volume", re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{12}\b")),
    ("mac", re.compile(r"\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b")),
    ("ip", re.compile(r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b")),
    ("ip6", re.compile(r"\b(?:[0-9a-fA-F]{1,4}:){3,7}[0-9a-fA-F]{1,4}\b")),
)


class Disguise:
    """Replaces names, the same one always by the same word.

    Args:
        names: (kind, name) of what is known to be a name.
    """

    def __init__(self, names: list[tuple[str, str]]) -> None:
        self._words: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        for kind, name in names:
            if len(name) > 1:
                self._word(kind, name)
        known = sorted(self._words, key=len, reverse=True)
        self._known = re.compile("|".join(re.escape(name) for name in known)) if known else None

    def apply(self, text: str) -> str:
        """The text with every name replaced."""
        if self._known is not None:
            text = self._known.sub(lambda match: self._words[match[0]], text)
        text = re.sub(r'(annotation = )".*?"(?=,? ?\n)', r'\1"note"', text, flags=re.DOTALL)
        for kind, pattern in _PATTERNS:
            text = pattern.sub(lambda match, kind=kind: self._word(kind, match[0]), text)  # type: ignore[misc]
        return text

    def _word(self, kind: str, name: str) -> str:
        if name not in self._words:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._words[name] = f"{kind}-{self._counts[kind]}"
        return self._words[name]


def capture_host(session: HostSession, out: str) -> int:
    """Writes the file; how many commands were run.

    Raises:
        DestinationExists: there is something already.
        StorageError: it can not be written.
    """
    vms = session.view.vms()
    disguise = Disguise(_names_of(session, vms))
    commands = list(_HOST_COMMANDS)
    files = []
    for vm in vms:
        commands += [("vim-cmd", f"vmsvc/{verb}", str(vm.id)) for verb in _VM_COMMANDS]
        commands.append(("ls", "-la", vm.folder))
        files += [
            (vm.vmx, MAX_VMX_BYTES),
            *((path, _MAX_VMSD_BYTES) for path in _snapshot_lists(session, vm)),
        ]
    attempts = [(shlex.join(words), partial(_printed, session, words)) for words in commands]
    attempts += [
        (f"cat {shlex.quote(path)}", partial(_content, session, path, limit)) for path, limit in files
    ]
    try:
        with open(out, "xb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            for number, (shown, attempt) in enumerate(attempts):
                try:
                    body = attempt()
                except HoldfastError as error:
                    body = f"--- {error.message}\n"
                data = disguise.apply(f"$ {shown}\n{body}").encode()
                info = tarfile.TarInfo(f"capture/{number:04d}.txt")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    except FileExistsError:
        raise DestinationExists(f"{out} exists already", hint="name a new file") from None
    except OSError as error:
        raise storage_error(error, f"writing {out}") from None
    return len(attempts)


def _names_of(session: HostSession, vms: tuple[Vm, ...]) -> list[tuple[str, str]]:
    """(kind, name) of all that is called somehow on the host."""
    names = [("vm", vm.name) for vm in vms] + [("vm", vm.folder.rpartition("/")[2]) for vm in vms]
    names += [("vm", vm.vmx.rpartition("/")[2].removesuffix(".vmx")) for vm in vms]
    names += [("datastore", volume.name) for volume in session.view.volumes() if volume.name]
    for vm in vms:
        names += [
            ("snapshot", one.name) for root in session.view.snapshots(vm) for one in root.walk() if one.name
        ]
    for words in (("hostname",), ("hostname", "-s")):
        names += [("host", word) for word in session.console.act(words, "asking for its name").text.split()]
    names += [("note", row.note) for row in session.view.listing().rows if len(row.note) >= _SHORTEST_NOTE]
    for vm in vms:
        note = VmxText(session.console.read(vm.vmx, MAX_VMX_BYTES)).get("annotation")
        names += [("note", line.strip()) for line in note.splitlines() if len(line.strip()) >= _SHORTEST_NOTE]
    return names


def _snapshot_lists(session: HostSession, vm: Vm) -> list[str]:
    files = session.console.listing(vm.folder)
    return [f"{vm.folder}/{file.name}" for file in files if file.name.lower().endswith(".vmsd")]


def _printed(session: HostSession, words: tuple[str, ...]) -> str:
    answer = session.console.act(words, "capturing")
    return f"{answer.text}\n--- status {answer.status}\n"


def _content(session: HostSession, path: str, limit_bytes: int) -> str:
    return session.console.read(path, limit_bytes).decode("utf-8", "backslashreplace")
