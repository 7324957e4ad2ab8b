"""`holdfast extract`: single files and folders out of a guest, without restoring or mounting its disk."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_json, say, warn
from holdfast.cli.places import is_inside
from holdfast.errors import EXIT_WARNINGS, GuestFileNotFound, UsageError
from holdfast.units import format_duration, format_size

if TYPE_CHECKING:
    from holdfast.cli.extracting import Extracted
    from holdfast.repo.points import Point

__all__ = ["command"]


@click.command("extract")
@click.argument("point")
@click.argument("path")
@click.argument("dest")
@click.option("--disk", metavar="NAME", help="Only this disk, by name or by where it is attached (scsi0:0).")
@click.option(
    "--partition", metavar="N", help="Only this partition, by number, or this logical volume, by name."
)
@repository_options
@click.pass_obj
def command(
    invocation: Invocation, point: str, path: str, dest: str, disk: str | None, partition: str | None
) -> None:
    """Copy a file or folder out of a guest's file system (ext2/3/4, XFS, NTFS, FAT).

    PATH is as for 'holdfast browse'. If DEST is a folder, or ends in '/', the copy goes into it under its own name;
    else DEST is the copy's name, and must not exist.

    Nothing that exists is overwritten. What can not be copied (devices, damaged files) is named, and the exit code
    is then 100.
    """
    from holdfast.cli.browse import open_places
    from holdfast.cli.extracting import extract
    from holdfast.fuse.guest.volumes import require_library

    require_library()
    started = time.monotonic()
    with invocation.open_repository() as repository:
        if is_inside(os.path.dirname(os.path.abspath(dest)), repository.path):
            raise UsageError(f"{dest} lies in the repository", hint="name a place outside of it")
        found = repository.resolve(point)
        with open_places(repository, found, disk, partition) as places:
            place = places.find(path)
            if place is None:
                there = ", ".join(places.address(volume) for volume in places.volumes if volume.readable)
                raise GuestFileNotFound(
                    f"'{path}' names no single file system", hint=f"name one: {there or 'there is none'}"
                )
            invocation.if_interrupted = "what was copied until now is complete, but for the last file"
            asked = os.path.basename(path.rstrip("/"))
            name = (
                asked if asked not in ("", ".", "..") else os.path.basename(place.path) or place.volume.name
            )
            done = extract(place.node, name, dest, lambda _length: None)
    _tell(invocation, found, done, time.monotonic() - started)
    if done.left_out:
        invocation.exit_code = EXIT_WARNINGS


def _tell(invocation: Invocation, point: Point, done: Extracted, duration_s: float) -> None:
    for path, reason in done.left_out:
        warn(invocation, f"left out {path}: {reason}")
    if invocation.json:
        print_json(
            {
                "type": "summary",
                "point": point.id.hex(),
                "vm": point.manifest.vm_name,
                "dest": done.dest,
                "files": done.files,
                "folders": done.folders,
                "links": done.links,
                "size_bytes": done.size_bytes,
                "left_out": [{"path": path, "reason": reason} for path, reason in done.left_out],
                "duration_s": round(duration_s, 3),
            }
        )
        return
    what = f"{done.files} file{'' if done.files == 1 else 's'}"
    if done.folders:
        what += f", {done.folders} folder{'' if done.folders == 1 else 's'}"
    if done.links:
        what += f", {done.links} link{'' if done.links == 1 else 's'}"
    say(f"extracted {what}, {format_size(done.size_bytes)} in {format_duration(duration_s)}, to {done.dest}")
