"""The VMs of a host: `vmsvc/getallvms`, `power.getstate`, `get.summary`, `solo/registervm`.

`getallvms` is a table made for people: its widths follow its content, annotations run over several lines, names may hold
anything. A row is recognised by its whole shape. An annotation can imitate one: so ids are only hints, and
`get.summary` of each id says what it really is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable
from holdfast.esxi.says.vmomi import Reference, parse_object

__all__ = [
    "DatastorePath",
    "PowerState",
    "VmListing",
    "VmRow",
    "VmSummary",
    "parse_datastore_path",
    "parse_getallvms",
    "parse_power_state",
    "parse_registered",
    "parse_summary",
]

PowerState = Literal["on", "off", "suspended"]

_ROW: Final = re.compile(
    r"^(\d{1,9})[ \t]+(.*?)[ \t]+\[([^\]\n]+)\] (.+?\.vmx)[ \t]+(\S+)[ \t]+(vmx-\d{1,3})(?:[ \t]+(.*))?$",
    re.IGNORECASE,
)
_SKIPPED: Final = re.compile(r"^Skipping invalid VM '(\d+)'")
_HEADER: Final = re.compile(r"^Vmid\s+Name\s+File\s+Guest OS\s+Version\s+Annotation\s*$")
_STATES: Final[dict[str, PowerState]] = {
    "powered on": "on", "powered off": "off", "suspended": "suspended",
    "poweredon": "on", "poweredoff": "off",
}  # fmt: skip
_PATH: Final = re.compile(r"\[([^\]\n]*)\] ?(.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class DatastorePath:
    """A file on a datastore: `[ds1] web1/web1.vmx`."""

    datastore: str
    path: str

    def __str__(self) -> str:
        return f"[{self.datastore}] {self.path}"


@dataclass(frozen=True, slots=True)
class VmRow:
    """A row of `getallvms`. `note` is the first line of the annotation."""

    id: int
    name: str
    file: DatastorePath
    guest: str
    hardware: str
    note: str


@dataclass(frozen=True, slots=True)
class VmListing:
    """What `getallvms` lists; `skipped` are the ids of VMs that the host itself can not read."""

    rows: tuple[VmRow, ...]
    skipped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VmSummary:
    """What `get.summary` says of a VM.

    Args:
        uuid: BIOS UUID, 32 lower-case hexadecimal digits, or empty; `instance_uuid` likewise.
    """

    id: int
    name: str
    file: DatastorePath
    power: PowerState
    uuid: str
    instance_uuid: str
    guest: str
    disks: int | None


def parse_getallvms(text: str) -> VmListing:
    """The VMs that `vim-cmd vmsvc/getallvms` lists, ordered by id.

    Raises:
        SourceFormat: it is no such table.
    """
    rows: dict[int, VmRow] = {}
    skipped: list[int] = []
    seen_header = False
    for line in text.splitlines():
        match = _SKIPPED.match(line)
        if match is not None:
            skipped.append(int(match[1]))
            continue
        seen_header = seen_header or _HEADER.match(line) is not None
        match = _ROW.match(line)
        if match is not None and seen_header:
            number = int(match[1])
            # The first one wins: an annotation comes after the row that it belongs to.
            rows.setdefault(
                number,
                VmRow(
                    number,
                    match[2],
                    DatastorePath(match[3], match[4]),
                    match[5],
                    match[6],
                    (match[7] or "").strip(),
                ),
            )
    if not seen_header:
        raise SourceFormat(f"vmsvc/getallvms printed no table, but: {printable(text.strip()[:200])}")
    return VmListing(tuple(rows[number] for number in sorted(rows)), tuple(skipped))


def parse_power_state(text: str) -> PowerState:
    """The state that `vim-cmd vmsvc/power.getstate` printed.

    Raises:
        SourceFormat: it printed none.
    """
    for line in reversed(text.splitlines()):
        state = _STATES.get(line.strip().lower())
        if state is not None:
            return state
    raise SourceFormat(f"vmsvc/power.getstate printed no power state, but: {printable(text.strip()[:200])}")


def parse_datastore_path(text: str, what: str) -> DatastorePath:
    """A path of the form `[datastore] folder/file`.

    Raises:
        SourceFormat: it has another form, or leads out of the datastore.
    """
    match = _PATH.match(text)
    if match is None or not match[1]:
        raise SourceFormat(f"{what}: '{printable(text)}' is no path on a datastore")
    path = match[2].strip("\n")
    if path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise SourceFormat(f"{what}: '{printable(text)}' leads out of its datastore")
    return DatastorePath(match[1], path)


def parse_summary(text: str) -> VmSummary:
    """What `vim-cmd vmsvc/get.summary` printed.

    Raises:
        SourceFormat: it can not be understood, or lacks what every summary has.
    """
    what = "vmsvc/get.summary"
    summary = parse_object(text, what)
    config, runtime, reference = summary.child("config"), summary.child("runtime"), summary.get("vm")
    if (
        config is None
        or runtime is None
        or not isinstance(reference, Reference)
        or not reference.id.isdecimal()
    ):
        raise SourceFormat(
            f"{what} printed no summary of a VM, but an object of type {printable(summary.type)}"
        )
    power = _STATES.get(runtime.text("powerState").lower())
    if power is None:
        raise SourceFormat(f"{what}: the power state is '{printable(runtime.text('powerState'))}'")
    return VmSummary(
        id=int(reference.id[:18]),
        name=config.text("name"),
        file=parse_datastore_path(config.text("vmPathName"), what),
        power=power,
        uuid=_digits(config.text("uuid")),
        instance_uuid=_digits(config.text("instanceUuid")),
        guest=config.text("guestId"),
        disks=config.number("numVirtualDisks"),
    )


def parse_registered(text: str) -> int | None:
    """The id of the VM that `vim-cmd solo/registervm` registered; None if it printed none (old releases).

    Raises:
        SourceFormat: it printed something else.
    """
    words = text.split()
    if not words:
        return None
    if len(words) == 1 and re.fullmatch("[0-9]{1,9}", words[0]):
        return int(words[0])
    raise SourceFormat(f"solo/registervm printed no id, but: {printable(text.strip()[:200])}")


def _digits(uuid: str) -> str:
    digits = re.sub(r"[\s-]", "", uuid).lower()
    return digits if re.fullmatch("[0-9a-f]{32}", digits) else ""
