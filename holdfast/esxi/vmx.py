"""VMX files: the VM's name, its UUID and the disks that are attached to it.

Lines of `key = "value"`, keys in any case, `|22` for a quote and `|0A` for a newline within values.
Pure. What else a VMX says is not looked at: the file is stored as it is, byte for byte.

Tolerated: lines that are no assignment. Nothing is lost by that, as the disks of the folder are
found by looking into it; the VMX only adds where they are attached, and which ones must be there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import SourceFormat
from holdfast.esxi import text as texts
from holdfast.units import MIB

__all__ = ["MAX_VMX_BYTES", "AttachedDisk", "Vmx", "parse_vmx"]

MAX_VMX_BYTES: Final = MIB

_LINE: Final = re.compile(r"[ \t\ufeff]*([^\s=#]+)[ \t]*=[ \t]*(?:\"([^\"]*)\"|(\S*))", re.ASCII)
_NEWLINE: Final = re.compile(r"\r\n|\r|\n")
_ESCAPE: Final = re.compile(r"\|([0-9A-Fa-f]{2})")
_DEVICE: Final = re.compile(r"((?:scsi|sata|nvme|ide)[0-9]{1,3}:[0-9]{1,3})\.filename\Z")
_UUID: Final = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """A disk of the VM.

    Args:
        label: `scsi0:0`.
        file_name: as written: relative to the VMX, or absolute.
        mode: lower case: `persistent`, `independent-persistent`, ...; empty if not given.
    """

    label: str
    file_name: str
    mode: str = ""


@dataclass(frozen=True, slots=True)
class Vmx:
    """What a VMX says of the VM.

    Args:
        uuid: `vc.uuid` (the instance UUID), or else `uuid.bios`, as 32 lower-case hexadecimal
            digits; empty if neither is there.
        disks: ordered by label; CD-ROM drives, floppies and absent devices are no disks.
    """

    display_name: str
    uuid: str
    disks: tuple[AttachedDisk, ...]


def parse_vmx(data: bytes, where: str) -> Vmx:
    """What the VMX in `data` says.

    Args:
        where: the file's name, for messages.

    Raises:
        SourceFormat: it is longer than 1 MiB, or holds no assignment at all.
    """
    if len(data) > MAX_VMX_BYTES:
        raise SourceFormat(f"{where} is longer than 1 MiB, which no VMX file is")
    settings = _settings(texts.decode(data))
    if not settings:
        raise SourceFormat(f'{where} is no VMX file: it holds no line of the form key = "value"')
    uuids = (_uuid(settings.get(key, "")) for key in ("vc.uuid", "uuid.bios"))
    return Vmx(
        display_name=settings.get("displayname", "").strip(),
        uuid=next((uuid for uuid in uuids if uuid), ""),
        disks=_disks(settings),
    )


def _settings(text: str) -> dict[str, str]:
    """Key in lower case -> value; the last one of several wins, as with VMware."""
    settings: dict[str, str] = {}
    for line in _NEWLINE.split(text):
        match = _LINE.match(line)
        if match:
            value = match[2] if match[2] is not None else match[3]
            settings[match[1].lower()] = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), value)
    return settings


def _uuid(value: str) -> str:
    digits = re.sub(r"[\s-]", "", value).lower()
    return digits if _UUID.match(digits) else ""


def _disks(settings: dict[str, str]) -> tuple[AttachedDisk, ...]:
    found: list[AttachedDisk] = []
    for key, file_name in settings.items():
        match = _DEVICE.match(key)
        if match is None or not file_name:
            continue
        label = match[1]
        if settings.get(f"{label}.present", "").lower() != "true":
            continue
        if "cdrom" in settings.get(f"{label}.devicetype", "").lower():
            continue
        found.append(AttachedDisk(label, file_name, settings.get(f"{label}.mode", "").lower()))
    return tuple(sorted(found, key=lambda disk: _order(disk.label)))


def _order(label: str) -> tuple[str, int, int]:
    bus, _, unit = label.partition(":")
    kind = bus.rstrip("0123456789")
    return kind, int(bus[len(kind) :]), int(unit)
