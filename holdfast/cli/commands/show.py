"""`holdfast show`: all about one restore point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, print_facts, print_json, print_table, say
from holdfast.cli.views import copies_json, point_details_json
from holdfast.units import format_duration, format_size, format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.repo.format.rows import CopyRow
    from holdfast.repo.points import Point

__all__ = ["command"]


@click.command("show")
@click.argument("point")
@repository_options
@click.pass_obj
def command(invocation: Invocation, point: str) -> None:
    """Show all about one restore point.

    POINT is VM@latest, VM@latest~2, VM@2026-11-22T02:00:00Z, or the beginning of an id.
    """
    with invocation.open_repository() as repository:
        found = repository.resolve(point)
        copies = repository.copies().get(found.id, [])
    if invocation.json:
        print_json({**point_details_json(found), "copies": copies_json(copies)})
        return
    _print(found)
    _print_copies(copies)
    for warning in found.manifest.warnings:
        say(f"warning: {warning}")


def _print(point: Point) -> None:
    manifest = point.manifest
    statistics = manifest.statistics
    print_facts(
        [
            ("restore point", point.id.hex()),
            ("vm", manifest.vm_name),
            ("uuid", manifest.vm_uuid),
            ("time", format_time(manifest.time)),
            ("received", _received(point)),
            ("kind", "VM folder" if manifest.kind == "vm" else "single disk"),
            ("origin", f"{manifest.origin} on {manifest.host}"),
            ("labels", " ".join(f"{key}={value}" for key, value in manifest.labels) or "none"),
            ("parent", manifest.parent[:12] or "none"),
            ("size", f"{format_size(manifest.size_bytes)} ({manifest.size_bytes} bytes)"),
            (
                "read",
                f"{format_size(statistics.bytes_read)} in {format_duration(statistics.duration_ms / 1000)}",
            ),
            ("new", f"{format_size(statistics.bytes_new)} in {statistics.chunks_new} chunks"),
            ("reused", f"{statistics.chunks_reused} chunks"),
            ("stored", format_size(statistics.bytes_stored)),
            (
                "written by",
                f"{manifest.tool}, chunker {manifest.chunker} {format_size(manifest.chunk_size_bytes)}",
            ),
        ]
    )
    if manifest.disks:
        say("")
        print_table(
            [
                Column("DISK", wide=True),
                Column("SIZE", right=True),
                Column("FORMAT", wide=True),
                Column("ATTACHED"),
                Column("READ"),
                Column("UUID", wide=True),
            ],
            [
                (
                    disk.info.name,
                    format_size(disk.info.size_bytes),
                    f"{disk.info.format} ({disk.info.create_type})"
                    if disk.info.create_type
                    else disk.info.format,
                    disk.info.label or "-",
                    disk.read,
                    disk.info.uuid or "-",
                )
                for disk in manifest.disks
            ],
        )
    if manifest.files:
        say("")
        print_table(
            [Column("FILE", wide=True), Column("SIZE", right=True), Column("MODE"), Column("MODIFIED")],
            [
                (
                    file.info.name,
                    format_size(file.info.size_bytes),
                    f"{file.info.mode:04o}",
                    _time(file.info.mtime_ns),
                )
                for file in manifest.files
            ],
        )


def _print_copies(copies: Sequence[CopyRow]) -> None:
    """In which other repositories the point is, and when that was last shown in each way."""
    if not copies:
        return
    say("")
    print_table(
        [Column("COPY IN", wide=True), Column("COMPARED"), Column("SAMPLED"), Column("READ")],
        [
            (copy.address, *(format_time(t) if t else "-" for t in (copy.compared, copy.sampled, copy.read)))
            for copy in copies
        ],
    )


def _received(point: Point) -> str:
    when = format_time(point.received_ms // 1000)
    return when if point.noted_ms else f"{when} (as the backup says: it was not noted then)"


def _time(mtime_ns: int) -> str:
    try:
        return format_time(mtime_ns // 1_000_000_000)
    except (ValueError, OverflowError, OSError):  # a file may claim any year
        return f"{mtime_ns} ns"
