"""Which file systems there are on the disks of a restore point: on partitions, on whole disks, in LVM.

A volume is named by what it is on its disk: `p1` for the first partition, `disk` for a disk without partitions,
`group-name` for a logical volume (as below /dev/mapper), which belongs to the disk that its group begins on. What is
there but can not be read is listed too, so that users see why their file is not found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from holdfast.errors import GuestError, MissingLibrary
from holdfast.fuse.guest.port import Node, Readable, Window, contained
from holdfast.fuse.partitions import boot_sector_kind, find_partitions

__all__ = ["Disk", "Volume", "find_volumes", "require_library"]

_READABLE: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "ntfs", "fat"})
_HEAD_BYTES: Final = 68 << 10
_LVM_NAME: Final = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}")


class Disk(Readable, Protocol):
    """What is needed of a stored disk."""

    @property
    def size_bytes(self) -> int:
        """Its virtual size."""

    def pread(self, offset: int, length: int, /) -> bytes:
        """Up to `length` bytes from an offset on."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A place where a file system is, or could be.

    Args:
        disk: name of the disk.
        name: what it is called on that disk: "p1", "disk", "group-name".
        kind: "ext2" to "ext4", "xfs", "ntfs", "fat", or what else is there: "swap", "luks", "lvm", "unknown", ...
        label: the partition's name; as the guest wrote it.
    """

    disk: str
    name: str
    kind: str
    size_bytes: int
    label: str
    window: Window

    @property
    def readable(self) -> bool:
        """Whether its files can be read."""
        return self.kind in _READABLE

    def open(self) -> Node:
        """Its root folder.

        Raises:
            GuestError: it is damaged, or of a kind that is not read.
            MissingLibrary: the extra is not installed.
        """
        require_library()
        from holdfast.fuse.guest.ext import open_ext
        from holdfast.fuse.guest.fat import open_fat
        from holdfast.fuse.guest.ntfs import open_ntfs
        from holdfast.fuse.guest.xfs import open_xfs

        openers = {f"ext{n}": open_ext for n in (2, 3, 4)} | {
            "xfs": open_xfs,
            "ntfs": open_ntfs,
            "fat": open_fat,
        }
        if self.kind not in openers:
            raise GuestError(f"{self.name} of {self.disk} has no file system that can be read ({self.kind})")
        return openers[self.kind](self.window)


def require_library() -> None:
    """Makes sure that the extra is installed.

    Raises:
        MissingLibrary: it is not.
    """
    try:
        import dissect.extfs
        import dissect.fat
        import dissect.ntfs
        import dissect.volume
        import dissect.xfs  # noqa: F401
    except ImportError as error:
        raise MissingLibrary(
            "reading files out of guests needs libraries that are not installed",
            hint="install them with: pip install 'holdfast[files]'",
        ) from error


def find_volumes(disks: Sequence[tuple[str, Disk]]) -> list[Volume]:
    """All volumes of the disks, in the order of disks and partitions, logical volumes last."""
    volumes = []
    for name, disk in disks:
        partitions = find_partitions(disk.pread, disk.size_bytes)
        for partition in partitions:
            window = Window(disk, partition.start_bytes, partition.size_bytes)
            kind = _kind(window, partition.kind)
            volumes.append(
                Volume(name, f"p{partition.number}", kind, partition.size_bytes, partition.name, window)
            )
        if not partitions:
            window = Window(disk, 0, disk.size_bytes)
            volumes.append(Volume(name, "disk", _kind(window, "unknown"), disk.size_bytes, "", window))
    return volumes + _logical([volume for volume in volumes if volume.kind == "lvm"])


def _kind(window: Window, otherwise: str) -> str:
    """What the first bytes say; `otherwise` if they say nothing, unless that promises a file system."""
    head = window.pread(0, _HEAD_BYTES)
    windows = boot_sector_kind(head[:512])
    if head[1080:1082] == b"\x53\xef":
        journal, extents = head[1024 + 0x5C] & 0x04, head[1024 + 0x60] & 0x40
        return "ext4" if extents else "ext3" if journal else "ext2"
    if head[:4] == b"XFSB":
        return "xfs"
    if windows:
        return windows
    if any(head[at : at + 8] == b"LABELONE" for at in range(0, 2048, 512)):
        return "lvm"
    if head[:6] == b"LUKS\xba\xbe":
        return "luks"
    if head[65600:65608] == b"_BHRfS_M":
        return "btrfs"
    if head[4086:4096] == b"SWAPSPACE2":
        return "swap"
    return "unknown" if otherwise in ("lvm", "ntfs", "linux") or otherwise.startswith("fat") else otherwise


def _logical(physical: Sequence[Volume]) -> list[Volume]:
    """The logical volumes of all groups that the physical ones make."""
    if not physical:
        return []
    require_library()
    from dissect.volume.lvm.physical import LVM2Device

    groups: dict[str, list[tuple[Volume, Any]]] = {}
    for volume in physical:
        try:
            with contained(f"LVM on {volume.name} of {volume.disk}", volume.window):
                device = LVM2Device(volume.window.buffered())
                for value in (device.metadata or {}).values():
                    if isinstance(value, dict):
                        groups.setdefault(str(value.get("id")), []).append((volume, device))
        except GuestError:
            continue  # the physical volume is in the list, as "lvm"
    return [volume for members in groups.values() for volume in _of_group(members)]


def _of_group(members: Sequence[tuple[Volume, Any]]) -> list[Volume]:
    from dissect.volume.lvm.lvm2 import LVM2

    first = members[0][0]
    volumes = []
    try:
        with contained(f"LVM on {first.name} of {first.disk}", first.window):
            group = LVM2([device for _, device in members]).vg
            names = [(lv, f"{group.name}-{lv.name}") for lv in group.lv if lv.is_visible]
    except GuestError:
        return []
    for lv, name in names:
        if not _LVM_NAME.fullmatch(name):
            continue
        try:
            with contained(f"the logical volume {name}", first.window):
                stream = lv.open()
                size = sum(segment.extent_count for segment in lv.segments) * group.extent_size * 512
                window = Window(stream, 0, int(size))
                volumes.append(Volume(first.disk, name, _kind(window, "unknown"), int(size), "", window))
        except GuestError:
            volumes.append(Volume(first.disk, name, "unsupported lvm", 0, "", Window(first.window, 0, 0)))
    return volumes
