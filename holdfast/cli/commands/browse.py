"""`holdfast browse`: what files a guest had, without restoring or mounting anything."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, Json, print_json, print_table, say
from holdfast.units import format_size, format_time

if TYPE_CHECKING:
    from holdfast.cli.browse import Place, Places
    from holdfast.fuse.guest.port import Node
    from holdfast.repo.points import Point

__all__ = ["command"]

_LETTERS = {
    "file": "-", "folder": "d", "link": "l", "fifo": "p", "socket": "s", "device": "c", "damaged": "?"
}  # fmt: skip


@click.command("browse")
@click.argument("point")
@click.argument("path", default="")
@click.option("--disk", metavar="NAME", help="Only this disk, by name or by where it is attached (scsi0:0).")
@click.option(
    "--partition", metavar="N", help="Only this partition, by number, or this logical volume, by name."
)
@repository_options
@click.pass_obj
def command(invocation: Invocation, point: str, path: str, disk: str | None, partition: str | None) -> None:
    """List a folder of a guest's file system (ext2/3/4, XFS, NTFS, FAT).

    PATH is a path of the guest, such as /etc, if just one of its file systems has it; or web1.vmdk/p1/etc, on that
    disk and partition. Without PATH: the root folder if there is one file system, else all disks and partitions.
    """
    from holdfast.cli.browse import open_places
    from holdfast.fuse.guest.volumes import require_library

    require_library()
    with invocation.open_repository() as repository:
        found = repository.resolve(point)
        with open_places(repository, found, disk, partition) as places:
            place = places.find(path)
            if place is None:
                _tell_volumes(invocation, found, places)
                return
            folder = place.node.kind == "folder"
            nodes = sorted(place.node.children(), key=lambda node: node.name) if folder else [place.node]
            _tell_nodes(invocation, found, places, place, nodes)


def _tell_volumes(invocation: Invocation, point: Point, places: Places) -> None:
    if invocation.json:
        print_json(
            {
                "point": point.id.hex(),
                "vm": point.manifest.vm_name,
                "volumes": [
                    {
                        "path": places.address(volume),
                        "disk": volume.disk,
                        "volume": volume.name,
                        "kind": volume.kind,
                        "size_bytes": volume.size_bytes,
                        "label": volume.label,
                        "readable": volume.readable,
                    }
                    for volume in places.volumes
                ],
            }
        )
        return
    print_table(
        [
            Column("PATH", wide=True),
            Column("KIND"),
            Column("SIZE", right=True),
            Column("FILES"),
            Column("LABEL"),
        ],
        [
            (
                places.address(volume),
                volume.kind,
                format_size(volume.size_bytes),
                "yes" if volume.readable else "no",
                volume.label,
            )
            for volume in places.volumes
        ],
    )


def _tell_nodes(
    invocation: Invocation, point: Point, places: Places, place: Place, nodes: list[Node]
) -> None:
    if invocation.json:
        print_json(
            {
                "point": point.id.hex(),
                "vm": point.manifest.vm_name,
                "disk": place.volume.disk,
                "volume": place.volume.name,
                "kind": place.volume.kind,
                "path": place.path,
                "entries": [_as_json(node) for node in nodes],
            }
        )
        return
    if not nodes:
        say(f"{places.address(place.volume, place.path)} is empty")
        return
    print_table(
        [Column("MODE"), Column("SIZE", right=True), Column("CHANGED"), Column("NAME", wide=True)],
        [
            (
                _LETTERS[node.kind] + ("" if node.mode is None else stat.filemode(node.mode)[1:]),
                format_size(node.size_bytes) if node.kind == "file" else "",
                "" if node.mtime_ns is None else _time(node.mtime_ns),
                node.name + (f" -> {node.target}" if node.kind == "link" else ""),
            )
            for node in nodes
        ],
    )


def _time(mtime_ns: int) -> str:
    try:
        return format_time(mtime_ns // 1_000_000_000)
    except (ValueError, OverflowError, OSError):
        return "?"


def _as_json(node: Node) -> dict[str, Json]:
    return {
        "name": node.name,
        "type": node.kind,
        "size_bytes": node.size_bytes,
        "mode": node.mode,
        "mtime_ns": node.mtime_ns,
        "target": node.target if node.kind == "link" else None,
    }
