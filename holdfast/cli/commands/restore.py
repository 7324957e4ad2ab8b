"""`holdfast restore`: a restore point becomes files again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.linked import is_esxi, parse_esxi
from holdfast.cli.options import log_dir_option, repository_options, workers_option
from holdfast.cli.output import Column, Json, notice, print_json, print_table, say, warn
from holdfast.cli.progress import progress
from holdfast.cli.run_log import logged
from holdfast.errors import EXIT_WARNINGS, DamagedData, UsageError
from holdfast.units import format_duration, format_size

if TYPE_CHECKING:
    from holdfast.cli.hostrestore import BroughtBack, HostRestore
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
@click.option("--register", is_flag=True, help="To a host: register the VM.")
@click.option("--power-on", is_flag=True, help="To a host: register the VM and start it.")
@click.option(
    "--keep-uuid/--new-uuid",
    default=None,
    help="To a host: the VM's UUIDs. [default: new ones if it is registered there]",
)
@click.option(
    "--in-place",
    is_flag=True,
    help="To a host: write what differs into the disks of a VM that is there and off.",
)
@log_dir_option
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
    register: bool,
    power_on: bool,
    keep_uuid: bool | None,
    in_place: bool,
    log_dir: str,
    workers: int | None,
) -> None:
    """Write a restore point back.

    DEST esxi://HOST/DATASTORE or esxi://HOST/DATASTORE/NEWNAME makes a VM's folder on a linked host, with thin disks. A restore to a
    host that is interrupted leaves a folder that is marked incomplete; the same command goes on with it.

    A VM is written into the folder DEST, which is made if need be. A single disk is written to the file or
    block device DEST, or into DEST if that is a folder or ends in '/'. No file shows under its name before it is
    complete, and nothing is left behind by a restore that fails.

    With --allow-damaged, what can not be read of a damaged restore point is zeros in the files; the list of these
    ranges is printed, and the exit code is 100.
    """
    from holdfast.cli.hostrestore import HostRestore
    from holdfast.cli.restore_plan import plan_restore
    from holdfast.cli.restoring import carry_out

    if is_esxi(dest):
        if as_ != "original" or overwrite or allow_damaged or dry_run:
            raise UsageError(
                "--as, --overwrite, --allow-damaged and --dry-run are not for restores to a host"
            )
        if in_place and (register or power_on or keep_uuid is not None):
            raise UsageError(
                "--in-place writes the disks of a VM that is registered already; --register, --power-on and UUIDs do not go with it"
            )
        wanted = HostRestore(
            disk=disk,
            register=register,
            power_on=power_on,
            new_uuid=None if keep_uuid is None else not keep_uuid,
            in_place=in_place,
        )
        _to_host(invocation, point, dest, wanted, workers, log_dir)
        return
    if register or power_on or keep_uuid is not None or in_place:
        raise UsageError(
            "--register, --power-on, --keep-uuid, --new-uuid and --in-place are for restores to a host",
            hint="DEST is then esxi://HOST/DATASTORE",
        )
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


def _to_host(
    invocation: Invocation, point: str, dest: str, wanted: HostRestore, workers: int | None, log_dir: str
) -> None:
    from holdfast.cli.hostrestore import bring_back

    with contextlib.ExitStack() as stack:
        repository = stack.enter_context(invocation.open_repository())
        found = repository.resolve(point)
        name = found.manifest.vm_name
        log = stack.enter_context(logged(invocation, log_dir, "restore", f"{parse_esxi(dest).host}-{name}"))
        log.note(f"restoring {name}, restore point {found.id.hex()} of {repository.path}, to {dest}")
        invocation.if_interrupted = (
            "disks may be partly old and partly new: run it again before the VM is started"
            if wanted.in_place
            else "a folder on the host that was begun is marked incomplete; the same command goes on with it"
        )
        with progress(invocation, f"restoring {found.manifest.vm_name} to {dest}") as shown:
            done = bring_back(
                repository,
                found,
                dest,
                wanted,
                shown,
                workers,
                log.note,
                lambda text: notice(invocation, text),
            )
        invocation.if_interrupted = ""
        for warning in done.warnings:
            warn(invocation, warning)
        if done.warnings:
            invocation.exit_code = EXIT_WARNINGS
        log.note(_figures(done))
    if invocation.json:
        print_json(
            {
                "type": "summary",
                "point": found.id.hex(),
                "vm": found.manifest.vm_name,
                "dest": done.folder,
                "size_bytes": done.size_bytes,
                "bytes_written": done.bytes_written,
                "duration_s": round(done.duration_s, 3),
                "vm_id": done.vm_id,
                "warnings": list(done.warnings),
                "log": log.path or None,
            }
        )
        return
    say(f"restored {found.manifest.vm_name} (restore point {found.short_id}) to {dest}: {done.folder}")
    say(f"  {_figures(done)}")


def _figures(done: BroughtBack) -> str:
    registered = "" if done.vm_id is None else f"; registered with the id {done.vm_id}"
    return (
        f"size {format_size(done.size_bytes)}, written and read back {format_size(done.bytes_written)} "
        f"in {format_duration(done.duration_s)}{registered}"
    )


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
