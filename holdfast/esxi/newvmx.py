"""The VMX of a VM that is brought back: what was stored, without what is not true any more.

Pure. Out go change tracking (its files were not stored, and a disk that names one does not open), snapshots, a suspended
state, swap files and disks that were not restored; disks get their names in the new folder; a hardware version that the host
does not know is lowered. A VM that is to be another one loses its UUIDs and generated MAC addresses, so that the host makes new ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.esxi.says.esxcli import HostVersion
from holdfast.esxi.vmx import parse_vmx
from holdfast.esxi.vmxedit import VmxText

__all__ = ["NewVmx", "hardware_limit", "make_vmx"]

_GONE: Final = re.compile(
    r"(ctkenabled|.*\.ctkenabled|checkpoint\..*|snapshot\..*|snapshot[0-9].*|.*\.redo|sched\.swap\.derivedname|migrate\..*|"
    r"vmotion\..*|cleanshutdown|softpoweroff|replay\..*)\Z"
)
_IDENTITY: Final = re.compile(
    r"(uuid\.bios|uuid\.location|vc\.uuid|ethernet\d+\.generatedaddress(offset)?|vmci0\.id)\Z"
)
_HARDWARE: Final = (
    ((9, 0, 0), 22), ((8, 0, 2), 21), ((8, 0, 0), 20), ((7, 0, 2), 19), ((7, 0, 1), 18), ((7, 0, 0), 17), ((6, 7, 0), 14),
    ((6, 5, 0), 13), ((6, 0, 0), 11),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NewVmx:
    """The new file, and sentences on what had to be changed beyond expectation."""

    data: bytes
    warnings: tuple[str, ...]


def hardware_limit(version: HostVersion) -> int:
    """The newest virtual hardware that a host knows; 0 if that is not known.

    Source: VMware's table of virtual hardware versions; not verified with hosts of all releases.
    """
    release = (version.major, version.minor, version.patch)
    return next((limit for since, limit in _HARDWARE if release >= since), 0)


def make_vmx(
    data: bytes, disks: Mapping[str, str], *, name: str, nvram: str, new_uuid: bool, version: HostVersion
) -> NewVmx:
    """The VMX for a VM that was restored.

    Args:
        data: as it was stored.
        disks: name of a disk in the stored VMX -> its name in the new folder; those that are missing here are detached.
        name: the VM's display name.
        nvram: name of the file of that kind in the new folder; empty if there is none.
        new_uuid: whether it is to be another VM.
    """
    text = VmxText(data)
    warnings: list[str] = []
    text.drop(lambda key: _GONE.match(key) is not None or (new_uuid and _IDENTITY.match(key) is not None))
    for disk in parse_vmx(data, "the stored VMX").disks:
        new = disks.get(disk.file_name)
        if new is None:
            label = f"{disk.label}."
            text.drop(lambda key, label=label: key.startswith(label))  # type: ignore[misc]
            warnings.append(f"the disk {disk.label} was detached: it was not restored")
        else:
            text.set(f"{disk.label}.fileName", new)
    for key in text.keys():  # noqa: SIM118 - it is no mapping
        if key.lower().endswith(".devicetype") and text.get(key).lower() == "cdrom-image":
            image = key[: -len("deviceType")] + "fileName"
            if text.get(image).startswith("/"):
                text.set(f"{key[: -len('deviceType')]}startConnected", "FALSE")
    text.set("displayName", name)
    if nvram:
        text.set("nvram", nvram)
    text.set("uuid.action", "create" if new_uuid else "keep")
    limit = hardware_limit(version)
    stored = text.get("virtualHW.version")
    if limit and stored.isdecimal() and int(stored) > limit:
        text.set("virtualHW.version", str(limit))
        warnings.append(
            f"the virtual hardware was lowered from version {stored} to {limit}, the newest that the host knows"
        )
    return NewVmx(text.data(), tuple(warnings))
