"""How restore points appear as JSON (docs/CLI.md describes it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.units import format_age, format_time

if TYPE_CHECKING:
    from holdfast.cli.output import Json
    from holdfast.repo.format.manifest import PointDisk
    from holdfast.repo.format.rows import CopyRow
    from holdfast.repo.points import Point

__all__ = ["copies_cell", "copies_json", "disk_json", "point_details_json", "point_json"]


def disk_json(disk: PointDisk) -> dict[str, Json]:
    """One disk of a restore point."""
    info = disk.info
    return {
        "name": info.name,
        "size_bytes": info.size_bytes,
        "label": info.label,
        "uuid": info.uuid,
        "format": info.format,
    }


def point_json(point: Point) -> dict[str, Json]:
    """A restore point, as lists have it."""
    manifest = point.manifest
    statistics = manifest.statistics
    return {
        "id": point.id.hex(),
        "vm": manifest.vm_name,
        "vm_uuid": manifest.vm_uuid,
        "kind": manifest.kind,
        "time": format_time(manifest.time),
        "received": format_time(point.received_ms // 1000),
        "host": manifest.host,
        "labels": dict(manifest.labels),
        "disks": [disk_json(disk) for disk in manifest.disks],
        "files": len(manifest.files),
        "size_bytes": manifest.size_bytes,
        "bytes_new": statistics.bytes_new,
        "stored_bytes_added": statistics.bytes_stored,
        "duration_s": statistics.duration_ms / 1000,
        "warnings": list(manifest.warnings),
    }


def copies_json(copies: Sequence[CopyRow]) -> list[Json]:
    """The copies of a restore point in other repositories."""
    return [
        {
            "repository": copy.repository.hex(),
            "address": copy.address,
            "compared": _moment(copy.compared),
            "sampled": _moment(copy.sampled),
            "read": _moment(copy.read),
        }
        for copy in copies
    ]


def _moment(unix_s: int) -> str | None:
    return format_time(unix_s) if unix_s else None


def copies_cell(copies: Sequence[CopyRow], now: float) -> str:
    """How many copies there are, and how long ago one of them was proven last, in whichever way."""
    if not copies:
        return "-"
    age_s = max(0.0, now - max(copy.proven for copy in copies))
    return f"{len(copies)}, {format_age(age_s)}"


def point_details_json(point: Point) -> dict[str, Json]:
    """A restore point with all that is known of it."""
    manifest = point.manifest
    statistics = manifest.statistics
    return {
        **point_json(point),
        "disks": [
            {
                **disk_json(disk),
                "create_type": disk.info.create_type,
                "adapter": disk.info.adapter,
                "flat_name": disk.info.flat_name,
                "read": disk.read,
            }
            for disk in manifest.disks
        ],
        "file_list": [
            {
                "name": file.info.name,
                "size_bytes": file.info.size_bytes,
                "mtime_ns": file.info.mtime_ns,
                "mode": f"{file.info.mode:04o}",
            }
            for file in manifest.files
        ],
        "folders": list(manifest.folders),
        "origin": manifest.origin,
        "parent": manifest.parent or None,
        "tool": manifest.tool,
        "chunker": manifest.chunker,
        "chunk_size_bytes": manifest.chunk_size_bytes,
        "bytes_read": statistics.bytes_read,
        "chunks_new": statistics.chunks_new,
        "chunks_reused": statistics.chunks_reused,
    }
