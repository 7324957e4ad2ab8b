"""The texts beside a VM's disks: descriptors, .vmx and .vmsd, written as ESXi writes them, and read back.

Only what the stand-in itself needs is understood; a line that it does not know is kept. Texts are UTF-8.
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass, field

_PAIR = re.compile(r'^\s*([^#=\s][^=]*?)\s*=\s*"?(.*?)"?\s*$')
_EXTENT = re.compile(r'^(RW|RDONLY|NOACCESS)\s+(\d+)\s+(\S+)(?:\s+"(.*?)")?')


@dataclass(slots=True)
class Pairs:
    """`name = "value"` lines in their order, as in .vmx and .vmsd. Names are looked up without regard to case."""

    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Pairs:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            found = (_PAIR.match(line) for line in file)
            return cls({match[1]: _unquote(match[2]) for match in found if match})

    def write(self, path: str) -> None:
        """The file is replaced as a whole."""
        with open(path + "~", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f'{name} = "{_quote(value)}"\n' for name, value in self.values.items())
        os.rename(path + "~", path)

    def get(self, name: str, default: str = "") -> str:
        if name in self.values:
            return self.values[name]
        low = name.lower()
        return next((value for key, value in self.values.items() if key.lower() == low), default)

    def set(self, name: str, value: str) -> None:
        low = name.lower()
        self.values[next((key for key in self.values if key.lower() == low), name)] = value

    def true(self, name: str) -> bool:
        return self.get(name).lower() == "true"


def _quote(value: str) -> str:
    return "".join(f"|{ord(char):02X}" if char in '|"\n\r#' else char for char in value)


def _unquote(value: str) -> str:
    return re.sub(r"\|([0-9A-Fa-f]{2})", lambda match: chr(int(match[1], 16)), value)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A disk descriptor's facts."""

    create_type: str
    extent_type: str
    extent: str
    sectors: int
    cid: str
    parent_cid: str = "ffffffff"
    parent: str = ""
    extras: tuple[tuple[str, str], ...] = ()
    """Lines of the disk database, in order."""

    @property
    def size_bytes(self) -> int:
        return self.sectors * 512

    @classmethod
    def read(cls, path: str) -> Descriptor:
        """The descriptor in a file. Raises ValueError if there is none."""
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        text = head.decode("utf-8", "surrogateescape")
        if not text.startswith("# Disk DescriptorFile"):
            raise ValueError(f"{path} is no disk descriptor")
        values, extents, extras = {}, [], []
        for line in text.splitlines():
            if found := _EXTENT.match(line):
                extents.append(found)
            elif pair := _PAIR.match(line):
                if pair[1].startswith("ddb."):
                    extras.append((pair[1], pair[2]))
                else:
                    values[pair[1]] = pair[2]
        if len(extents) != 1:
            raise ValueError(f"{path} has {len(extents)} extents; the stand-in knows disks of one")
        return cls(
            values.get("createType", ""),
            extents[0][3],
            extents[0][4] or "",
            int(extents[0][2]),
            values.get("CID", ""),
            values.get("parentCID", "ffffffff"),
            values.get("parentFileNameHint", ""),
            tuple(extras),
        )

    def write(self, path: str) -> None:
        hint = f'parentFileNameHint="{self.parent}"\n' if self.parent else ""
        extras = "".join(f'{name} = "{value}"\n' for name, value in self.extras)
        text = (
            f'# Disk DescriptorFile\nversion={4 if self.create_type == "seSparse" else 1}\nencoding="UTF-8"\n'
            f"CID={self.cid}\nparentCID={self.parent_cid}\n"
            f'createType="{self.create_type}"\n{hint}\n# Extent description\n'
            f'RW {self.sectors} {self.extent_type} "{self.extent}"\n\n# The Disk Data Base \n#DDB\n\n{extras}'
        )
        with open(path + "~", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.rename(path + "~", path)

    def extra(self, name: str) -> str:
        return dict(self.extras).get(name, "")


def base_extras(
    size_bytes: int, rng: random.Random, *, thin: bool, hardware: str
) -> tuple[tuple[str, str], ...]:
    """The disk database of a new base disk."""
    lines = [
        ("ddb.adapterType", "lsilogic"),
        ("ddb.geometry.cylinders", str(max(1, size_bytes // (255 * 63 * 512)))),
        ("ddb.geometry.heads", "255"),
        ("ddb.geometry.sectors", "63"),
        ("ddb.longContentID", f"{rng.getrandbits(128):032x}"),
        ("ddb.thinProvisioned", "1"),
        ("ddb.uuid", disk_uuid(rng)),
        ("ddb.virtualHWVersion", hardware),
    ]
    return tuple(pair for pair in lines if thin or pair[0] != "ddb.thinProvisioned")


def disk_uuid(rng: random.Random) -> str:
    """A disk's identity as descriptors write it."""
    parts = ["60", "00", "C2", f"9{rng.randrange(16):x}", *(f"{rng.randrange(256):02x}" for _ in range(12))]
    return " ".join(parts[:8]) + "-" + " ".join(parts[8:])


def vm_uuid(rng: random.Random) -> str:
    """A VM's identity as .vmx files write it."""
    parts = ["56", "4d", *(f"{rng.randrange(256):02x}" for _ in range(14))]
    return " ".join(parts[:8]) + "-" + " ".join(parts[8:])


def dashed(uuid: str) -> str:
    """The same identity as the host's objects print it."""
    digits = re.sub(r"[^0-9a-fA-F]", "", uuid)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def new_vmx(
    name: str, *, guest: str, hardware: str, uuid: str, location: str, annotation: str, memory_mib: int
) -> Pairs:
    """A VM's configuration without disks, as a host writes it."""
    return Pairs(
        {
            ".encoding": "UTF-8",
            "config.version": "8",
            "virtualHW.version": hardware,
            "nvram": f"{name}.nvram",
            "svga.present": "TRUE",
            "vmci0.present": "TRUE",
            "hpet0.present": "TRUE",
            "floppy0.present": "FALSE",
            "memSize": str(memory_mib),
            "powerType.powerOff": "default",
            "powerType.suspend": "soft",
            "tools.upgrade.policy": "manual",
            "scsi0.virtualDev": "pvscsi",
            "scsi0.present": "TRUE",
            "ethernet0.virtualDev": "vmxnet3",
            "ethernet0.networkName": "VM Network",
            "ethernet0.addressType": "generated",
            "ethernet0.present": "TRUE",
            "displayName": name,
            "guestOS": guest,
            "uuid.bios": uuid,
            "uuid.location": location,
            "vc.uuid": uuid,
            "annotation": annotation,
            "sched.scsi0:0.throughputCap": "off",
            "numvcpus": "1",
        }
    )
