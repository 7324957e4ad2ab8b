"""`holdfast restore`: a restore point becomes files again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options, workers_option
from holdfast.cli.output import Column, Json, print_json, print_table, say
from holdfast.cli.progress import progress
from holdfast.errors import EXIT_WARNINGS, DamagedData
from holdfast.units import format_duration, format_size

if TYPE_CHECKING:
    from holdfast.cli.restore_plan import RestorePlan
    from holdfast.cli.restoring import Restored, RestoredHole
    from holdfast.esxi.layout import RestoreFormat
    from holdfast.repo.points import Point

__all__ = ["command"]


@click.command("restore")
@click.argument("point")
@click.argument("dest")
@click.option("--disk", metavar="NAME", help="Only this disk, by name or by where it is attached (scsi0:0).")
@click.option(
    "--as",
    "as_",
    type=click.Choice(["original", "raw", "vmdk"]),
    default="original",
    show_default=True,
    help="How disks are written: as they were, as raw images, or as descriptor and flat .vmdk.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist, or write onto a block device.")
@click.option("--allow-damaged", is_flag=True, help="Leave holes where something is damaged, and list them.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@workers_option
@repository_options
@click.pass_obj
def command(
    invocation: Invocation,
    point: str,
    dest: str,
    disk: str | None,
    as_: str,
    overwrite: bool,
    allow_damaged: bool,
    dry_run: bool,
    workers: int | None,
) -> None:
    """Write a restore point back.

    A VM is written into the folder DEST, which is made if need be. A single disk is written to the file or
    block device DEST, or into DEST if that is a folder or ends in '/'. No file shows under its name before it is
    complete, and nothing is left behind by a restore that fails.

    With --allow-damaged, what can not be read of a damaged restore point is zeros in the files; the list of these
    ranges is printed, and the exit code is 100.
    """
    from holdfast.cli.restore_plan import plan_restore
    from holdfast.cli.restoring import carry_out

    with invocation.open_repository() as repository:
        found = repository.resolve(point)
        plan = plan_restore(
            repository.path, found, dest, disk=disk, as_=cast("RestoreFormat", as_), overwrite=overwrite
        )
        if dry_run:
            _tell_plan(invocation, found, plan)
            return
        invocation.if_interrupted = "unfinished files were removed"
        with _hinting(point), progress(invocation, f"restoring {found.manifest.vm_name}") as shown:
            restored = carry_out(repository, found, plan, shown, workers, allow_damaged=allow_damaged)
    _tell(invocation, found, plan, restored)
    if restored.damaged:
        invocation.exit_code = EXIT_WARNINGS


@contextlib.contextmanager
def _hinting(point: str) -> Iterator[None]:
    """Says of damage what can be done in spite of it."""
    try:
        yield
    except DamagedData as error:
        raise DamagedData(
            error.message,
            hint="'holdfast check --repair' heals what it can; --allow-damaged restores all that is intact, and lists "
            f"the rest (as 'holdfast check --read-data {point}' does)",
        ) from error


def _tell_plan(invocation: Invocation, point: Point, plan: RestorePlan) -> None:
    if invocation.json:
        print_json(
            {
                "type": "summary",
                "point": point.id.hex(),
                "vm": point.manifest.vm_name,
                "dest": plan.root,
                "files": [{"path": o.path, "size_bytes": o.size_bytes} for o in plan.outputs],
                "size_bytes": plan.size_bytes,
                "bytes_written": 0,
                "duration_s": 0.0,
                "damaged": [],
                "dry_run": True,
            }
        )
        return
    say(f"would restore {point.manifest.vm_name} (restore point {point.short_id}):")
    print_table(
        [Column("FILE", wide=True), Column("SIZE", right=True)],
        [(output.path, format_size(output.size_bytes)) for output in plan.outputs],
    )


def _tell(invocation: Invocation, point: Point, plan: RestorePlan, restored: Restored) -> None:
    if invocation.json:
        print_json(
            {
                "type": "summary",
                "point": point.id.hex(),
                "vm": point.manifest.vm_name,
                "dest": plan.root,
                "files": [{"path": o.path, "size_bytes": o.size_bytes} for o in plan.outputs],
                "size_bytes": plan.size_bytes,
                "bytes_written": restored.bytes_written,
                "duration_s": round(restored.duration_s, 3),
                "damaged": [_as_json(part) for part in restored.damaged],
                "dry_run": False,
            }
        )
        return
    count = len(plan.outputs)
    where = plan.outputs[0].path if count == 1 else plan.root
    rate = restored.bytes_written / restored.duration_s if restored.duration_s > 0 else 0
    say(f"restored {point.manifest.vm_name} (restore point {point.short_id}) to {where}")
    say(
        f"  {count} file{'' if count == 1 else 's'}, size {format_size(plan.size_bytes)}, written "
        f"{format_size(restored.bytes_written)} in {format_duration(restored.duration_s)} ({format_size(int(rate))}/s)"
    )
    for part in restored.damaged:
        say(
            f"damaged: {part.content}, bytes {part.offset} to {part.offset + part.length} "
            f"({format_size(part.length)}) are zeros in {part.path}: {part.reason}"
        )
    if restored.damaged:
        lost = sum(part.length for part in restored.damaged)
        say(f"  {format_size(lost)} could not be restored")


def _as_json(part: RestoredHole) -> dict[str, Json]:
    return {
        "disk": part.content,
        "path": part.path,
        "offset": part.offset,
        "length": part.length,
        "reason": part.reason,
    }
