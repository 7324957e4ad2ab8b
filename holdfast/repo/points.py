"""Restore points as users see and name them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DamagedData, DamagedIndex, HoldfastError, PointNotFound, UsageError
from holdfast.ids import ID_BYTES, PointId
from holdfast.repo.codec import Opener
from holdfast.repo.format.manifest import Manifest, PointDisk, decode_manifest
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind, decode_record_header
from holdfast.repo.format.rows import PointRow
from holdfast.units import format_time, parse_time

__all__ = ["Point", "find_disk", "open_manifest", "open_point", "points_of_vm", "resolve_point"]

_LEAST_PREFIX: Final = 4
_RELATIVE: Final = re.compile(r"latest(?:~(\d{1,6}))?\Z")
_PREFIX: Final = re.compile(rf"[0-9a-f]{{{_LEAST_PREFIX},{2 * ID_BYTES}}}\Z")
_TIME_START: Final = re.compile(r"\d{4}-\d\d")


@dataclass(frozen=True, slots=True)
class Point:
    """A restore point: its id and its manifest.

    Args:
        noted_ms: see `PointRow.received_ms`.
    """

    id: PointId
    manifest: Manifest
    noted_ms: int = 0

    @property
    def received_ms(self) -> int:
        """When the repository took it in, Unix milliseconds: by its own clock if it has noted that, else as the backup claims."""
        return self.noted_ms or self.manifest.received_ms

    @property
    def short_id(self) -> str:
        """The first 12 hexadecimal digits of the id."""
        return self.id.hex()[:12]


def open_point(row: PointRow, opener: Opener) -> Point:
    """The point that a row of the index holds.

    Raises:
        DamagedIndex: the row's copy of the manifest is damaged.
        UnsupportedFormat: the manifest is of a later version.
    """
    text = open_manifest(row, opener)
    try:
        return Point(row.id, decode_manifest(text), row.received_ms)
    except DamagedData as error:
        raise _damaged(row, error) from None


def open_manifest(row: PointRow, opener: Opener) -> bytes:
    """The plaintext of the manifest that a row of the index holds.

    Raises:
        DamagedIndex: the row's copy of the manifest is damaged.
    """
    try:
        header = decode_record_header(row.record, row.pack)
        if header.kind is not Kind.MANIFEST or header.id != row.id:
            raise DamagedData("it is another record")
        return opener.open(header, row.record[RECORD_HEADER_BYTES:])
    except DamagedData as error:
        raise _damaged(row, error) from None


def _damaged(row: PointRow, error: DamagedData) -> DamagedIndex:
    return DamagedIndex(f"the index's copy of restore point {row.id.hex()[:12]} is damaged: {error.message}")


def _age_key(point: Point) -> tuple[int, int, bytes]:
    return (point.manifest.time, point.manifest.received_ms, point.id)


def points_of_vm(points: Sequence[Point], vm: str) -> list[Point]:
    """The points of the VM with that name or UUID, oldest first.

    Raises:
        PointNotFound: there is no such VM, or several have that name.
    """
    wanted = vm.replace("-", "").lower()
    found = [p for p in points if p.manifest.vm_uuid == wanted] or [
        p for p in points if p.manifest.vm_name == vm
    ]
    uuids = sorted({p.manifest.vm_uuid for p in found})
    if not found:
        names = sorted({p.manifest.vm_name for p in points})
        known = ", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise PointNotFound(
            f"there is no VM {vm!r} in the repository",
            hint=f"it holds: {known}" if names else "it holds no restore points yet",
        )
    if len(uuids) > 1:
        raise PointNotFound(f"several VMs are named {vm!r}", hint=f"name one by its UUID: {', '.join(uuids)}")
    # A renamed VM keeps its UUID: all of its points belong together.
    return sorted((p for p in points if p.manifest.vm_uuid == uuids[0]), key=_age_key)


def resolve_point(points: Sequence[Point], text: str) -> Point:
    """The point that `VM@latest`, `VM@latest~2`, `VM@TIME`, or a unique id prefix names.

    Raises:
        PointNotFound: none, or more than one, answers to it.
        UsageError: the text has none of these forms.
    """
    vm, at, which = text.rpartition("@")
    if not at:
        return _by_prefix(points, text)
    if not vm:
        raise UsageError(f"'{text}' names no VM", hint="write VM@latest, VM@TIME or an id")
    history = points_of_vm(points, vm)
    relative = _RELATIVE.match(which)
    if relative:
        back = int(relative[1] or 0)
        if back >= len(history):
            raise PointNotFound(
                f"VM {vm!r} has {len(history)} restore points, '{text}' would be number {back + 1} from the end"
            )
        return history[-1 - back]
    if not _TIME_START.match(which):
        raise UsageError(
            f"'{which}' is neither 'latest', 'latest~N' nor a time", hint="write for example VM@latest~1"
        )
    moment = parse_time(which)
    exact = [p for p in history if p.manifest.time == moment]
    if len(exact) > 1:
        ids = ", ".join(p.short_id for p in exact)
        raise PointNotFound(
            f"VM {vm!r} has several restore points of that time", hint=f"name one by its id: {ids}"
        )
    if not exact:
        nearest = min(history, key=lambda p: abs(p.manifest.time - moment))
        raise PointNotFound(
            f"VM {vm!r} has no restore point of {format_time(moment)}",
            hint=f"the nearest one is of {format_time(nearest.manifest.time)}",
        )
    return exact[0]


def _by_prefix(points: Sequence[Point], text: str) -> Point:
    prefix = text.lower()
    if not _PREFIX.match(prefix):
        try:
            vm_points = points_of_vm(points, text)
        except HoldfastError:
            vm_points = []
        raise PointNotFound(
            f"'{text}' is no restore point",
            hint=f"for the newest point of that VM write {text}@latest"
            if vm_points
            else f"write VM@latest, VM@TIME, or at least {_LEAST_PREFIX} digits of an id; 'holdfast list' shows them",
        )
    found = [p for p in points if p.id.hex().startswith(prefix)]
    if not found:
        raise PointNotFound(
            f"no restore point has an id that begins with '{text}'", hint="'holdfast list' shows the ids"
        )
    if len(found) > 1:
        ids = ", ".join(p.short_id for p in found[:5]) + (", ..." if len(found) > 5 else "")
        raise PointNotFound(
            f"'{text}' is ambiguous: {len(found)} ids begin with it", hint=f"write more digits: {ids}"
        )
    return found[0]


def find_disk(point: Point, name: str) -> PointDisk:
    """The disk of a point with that name or label.

    Raises:
        PointNotFound: it has no such disk.
    """
    disks = point.manifest.disks
    for disk in disks:
        if name in (disk.info.name, disk.info.label):
            return disk
    known = ", ".join(disk.info.name for disk in disks)
    raise PointNotFound(f"restore point {point.short_id} has no disk {name!r}", hint=f"its disks: {known}")
