"""`holdfast diff`: what differs between two restore points, from their trees alone; no content is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, Json, print_json, print_table, say
from holdfast.units import format_size, format_time

if TYPE_CHECKING:
    from holdfast.repo.format.manifest import PointDisk
    from holdfast.repo.points import Point
    from holdfast.repo.repository import Repository

__all__ = ["DiskChange", "FileChange", "command", "compare_disks", "compare_files"]

_RANGES_FOR_PEOPLE: Final = 8
_RANGES_FOR_PROGRAMS: Final = 1000

Change = Literal["same", "changed", "added", "removed"]


@dataclass(frozen=True, slots=True)
class DiskChange:
    """What became of a disk.

    Args:
        name: in the newer of the points that have it.
        size_a, size_b: in bytes; None where the point has no such disk.
        ranges: (offset, length) of what differs, by chunk borders; perhaps only the first ones.
        ranges_total: how many there are.
    """

    name: str
    change: Change
    size_a: int | None
    size_b: int | None
    changed_bytes: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    ranges_total: int = 0


@dataclass(frozen=True, slots=True)
class FileChange:
    """What became of a file that is no disk; `metadata` is a change of mode or time alone."""

    name: str
    change: Change | Literal["metadata"]
    size_a: int | None
    size_b: int | None


@click.command("diff")
@click.argument("point_a", metavar="POINT_A")
@click.argument("point_b", metavar="POINT_B")
@click.option("--ranges", is_flag=True, help="Show all changed ranges of disks, however many.")
@repository_options
@click.pass_obj
def command(invocation: Invocation, point_a: str, point_b: str, ranges: bool) -> None:
    """Show what differs between two restore points.

    Ranges are found by comparing chunk ids, so they begin and end where chunks do. Nothing is read.
    """
    limit = None if ranges else _RANGES_FOR_PROGRAMS if invocation.json else _RANGES_FOR_PEOPLE
    with invocation.open_repository() as repository:
        a, b = repository.resolve(point_a), repository.resolve(point_b)
        with repository.holding("diff", [a, b]):
            disks = compare_disks(repository, a, b, limit)
    files = compare_files(a, b)
    if invocation.json:
        print_json(_as_json(a, b, disks, files))
    else:
        _print(a, b, disks, files)


def _pairs(a: Point, b: Point) -> list[tuple[PointDisk | None, PointDisk | None]]:
    """The disks of both points side by side: the same name belongs together, else the same UUID."""
    left = {disk.info.name: disk for disk in a.manifest.disks}
    pairs: list[tuple[PointDisk | None, PointDisk | None]] = []
    lone: list[PointDisk] = []
    for disk in b.manifest.disks:
        old = left.pop(disk.info.name, None)
        if old is None:
            lone.append(disk)
        else:
            pairs.append((old, disk))
    for disk in lone:
        twin = next(
            (name for name, old in left.items() if old.info.uuid and old.info.uuid == disk.info.uuid), ""
        )
        pairs.append((left.pop(twin) if twin else None, disk))
    return pairs + [(old, None) for old in left.values()]


def compare_disks(repository: Repository, a: Point, b: Point, limit: int | None) -> list[DiskChange]:
    """What became of each disk on the way from `a` to `b`.

    Args:
        limit: how many ranges are kept for each disk; None keeps all.
    """
    changes: list[DiskChange] = []
    for old, new in _pairs(a, b):
        if old is None or new is None:
            disk = new or old
            assert disk is not None, "a pair has at least one side"
            size = disk.info.size_bytes
            changes.append(
                DiskChange(disk.info.name, "removed", size, None)
                if new is None
                else DiskChange(disk.info.name, "added", None, size)
            )
            continue
        kept: list[tuple[int, int]] = []
        total = changed_bytes = 0
        for found in repository.changed_ranges(old.tree, new.tree):
            total += 1
            changed_bytes += found[1]
            if limit is None or total <= limit:
                kept.append(found)
        same = total == 0 and old.info.size_bytes == new.info.size_bytes
        changes.append(
            DiskChange(
                new.info.name,
                "same" if same else "changed",
                old.info.size_bytes,
                new.info.size_bytes,
                changed_bytes,
                tuple(kept),
                total,
            )
        )
    return changes


def compare_files(a: Point, b: Point) -> list[FileChange]:
    """What became of each file that is no disk; those that stayed the same are left out."""
    left = {file.info.name: file for file in a.manifest.files}
    right = {file.info.name: file for file in b.manifest.files}
    changes: list[FileChange] = []
    for name in sorted(left.keys() | right.keys()):
        old, new = left.get(name), right.get(name)
        size_a = old.info.size_bytes if old else None
        size_b = new.info.size_bytes if new else None
        if old is None or new is None:
            changes.append(FileChange(name, "removed" if new is None else "added", size_a, size_b))
        elif old.tree != new.tree:
            changes.append(FileChange(name, "changed", size_a, size_b))
        elif old.info != new.info:
            changes.append(FileChange(name, "metadata", size_a, size_b))
    return changes


def _as_json(a: Point, b: Point, disks: Sequence[DiskChange], files: Sequence[FileChange]) -> dict[str, Json]:
    return {
        "a": a.id.hex(),
        "b": b.id.hex(),
        "disks": [
            {
                "name": disk.name,
                "change": disk.change,
                "size_bytes_a": disk.size_a,
                "size_bytes_b": disk.size_b,
                "changed_bytes": disk.changed_bytes,
                "ranges": [{"offset": offset, "length": length} for offset, length in disk.ranges],
                "ranges_total": disk.ranges_total,
                "ranges_complete": len(disk.ranges) == disk.ranges_total,
            }
            for disk in disks
        ],
        "files": [
            {
                "name": file.name,
                "change": file.change,
                "size_bytes_a": file.size_a,
                "size_bytes_b": file.size_b,
            }
            for file in files
        ],
        "changed_bytes": sum(disk.changed_bytes for disk in disks),
    }


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)


def _print(a: Point, b: Point, disks: Sequence[DiskChange], files: Sequence[FileChange]) -> None:
    for letter, point in (("A", a), ("B", b)):
        say(f"{letter}  {point.short_id}  {point.manifest.vm_name}  {format_time(point.manifest.time)}")
    if disks:
        say("")
        print_table(
            [
                Column("DISK", wide=True),
                Column("CHANGE"),
                Column("SIZE A", right=True),
                Column("SIZE B", right=True),
                Column("CHANGED", right=True),
                Column("RANGES", right=True),
            ],
            [
                (
                    disk.name,
                    disk.change,
                    _size(disk.size_a),
                    _size(disk.size_b),
                    format_size(disk.changed_bytes),
                    str(disk.ranges_total),
                )
                for disk in disks
            ],
        )
    for disk in disks:
        if not disk.ranges:
            continue
        say("")
        print_table(
            [Column(disk.name, wide=True), Column("OFFSET", right=True), Column("LENGTH", right=True)],
            [("", str(offset), str(length)) for offset, length in disk.ranges],
        )
        if len(disk.ranges) < disk.ranges_total:
            say(f"and {disk.ranges_total - len(disk.ranges)} more; --ranges shows all")
    if files:
        say("")
        print_table(
            [
                Column("FILE", wide=True),
                Column("CHANGE"),
                Column("SIZE A", right=True),
                Column("SIZE B", right=True),
            ],
            [(file.name, file.change, _size(file.size_a), _size(file.size_b)) for file in files],
        )
    if not files and all(disk.change == "same" for disk in disks):
        say("the content of the two is the same")
