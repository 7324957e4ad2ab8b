"""`holdfast backup`: each SOURCE becomes a restore point."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, cast

import click

from holdfast.cli.failures import print_failure
from holdfast.cli.invocation import Invocation
from holdfast.cli.linked import is_esxi
from holdfast.cli.options import log_dir_option, repository_options, workers_option
from holdfast.cli.output import notice, print_json, say, warn
from holdfast.cli.passwords import password_is_given
from holdfast.cli.progress import progress
from holdfast.cli.progress_file import ProgressFile
from holdfast.cli.run_log import logged
from holdfast.errors import EXIT_WARNINGS, HoldfastError, LinkError, SourceError, UsageError
from holdfast.units import format_duration, format_size, format_time, parse_time

if TYPE_CHECKING:
    from holdfast.cli.hostbackup import HostBackup
    from holdfast.cli.linked import Via
    from holdfast.cli.output import Json
    from holdfast.esxi.running import How
    from holdfast.repo.backup import BackupOptions, BackupSummary
    from holdfast.repo.repository import Repository

__all__ = ["command"]

_ENGINE: Final = ("holdfast.repo.backup", "holdfast.esxi.folder", "holdfast.chunker.aligned")


def _labels(pairs: tuple[str, ...]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise UsageError(
                f"'{pair}' is no label", hint="write KEY=VALUE, for example --label reason=nightly"
            )
        if key in labels:
            raise UsageError(f"the label '{key}' is given twice")
        labels[key] = value
    return labels


@click.command("backup")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--vm", metavar="NAME", help="The VM's name, instead of the one that the source has.")
@click.option(
    "--label", metavar="KEY=VALUE", multiple=True, help="Attach this to the restore point. Repeatable."
)
@click.option("--time", metavar="ISO8601", help="The point in time that the data stands for. [default: now]")
@click.option(
    "-n", "--dry-run", is_flag=True, help="Read everything and say what would be stored; store nothing."
)
@click.option(
    "--changed-extents",
    metavar="FILE",
    help="Read only what this JSON file says has changed since an earlier restore point.",
)
@click.option("--read-all", is_flag=True, help="Read everything, whatever --changed-extents says.")
@click.option(
    "--how",
    type=click.Choice(["hot", "warm", "cold"]),
    default="hot",
    show_default=True,
    help="Of a host: from a snapshot of the running VM; shut down only for the snapshot; or shut down for the backup.",
)
@click.option("--quiesce", is_flag=True, help="Have VMware Tools quiesce the guest for the snapshot.")
@click.option("--memory", is_flag=True, help="Take the snapshot with the VM's memory (it is not stored).")
@click.option("--force-off", is_flag=True, help="Switch a VM off if its guest does not shut down.")
@click.option(
    "--shutdown-time",
    type=click.IntRange(1, 86400),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How long a guest may take to shut down.",
)
@click.option(
    "--disk", metavar="LABEL", multiple=True, help="Of a host: only this disk, such as scsi0:0. Repeatable."
)
@click.option(
    "--via",
    type=click.Choice(["agent", "stream"]),
    help="Of a host: have it find out what is new with its own Python, or read everything over the network. [default: agent, if it has a Python]",
)
@click.option("--all", "all_vms", is_flag=True, help="All VMs of the hosts that are named as esxi://HOST.")
@click.option(
    "--exclude", metavar="GLOB", multiple=True, help="With --all: not the VMs with such a name. Repeatable."
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="So many sources at once.",
)
@click.option(
    "--progress-file", metavar="FILE", default="", help="Append the progress to this file, as JSON lines."
)
@log_dir_option
@workers_option
@repository_options
@click.pass_context
def command(
    context: click.Context,
    sources: tuple[str, ...],
    vm: str | None,
    label: tuple[str, ...],
    time: str | None,
    dry_run: bool,
    changed_extents: str | None,
    read_all: bool,
    how: str,
    quiesce: bool,
    memory: bool,
    force_off: bool,
    shutdown_time: int,
    disk: tuple[str, ...],
    via: str | None,
    all_vms: bool,
    exclude: tuple[str, ...],
    parallel: int,
    progress_file: str,
    log_dir: str,
    workers: int | None,
) -> None:
    """Back up VMs of linked hosts, VM folders, disk images or block devices.

    SOURCE is esxi://HOST/VM, the folder of a VM or its .vmx, a single .vmdk, a raw image or a block device. Each one becomes
    a restore point of its own; if one can not be read, the others are backed up all the same.

    A VM is recognised by the UUID in its .vmx, whatever its name is; a source without one by its name.

    --changed-extents takes {"base": "POINT", "disks": {"web1.vmdk": [[OFFSET, LENGTH], ...]}}: all that differs from
    that point, in bytes. A wrong map makes a wrong restore point; --read-all is always right.
    """
    invocation = context.find_object(Invocation)
    assert invocation is not None
    told = invocation
    if exclude and not all_vms:
        raise UsageError("--exclude goes with --all")
    if all_vms:
        from holdfast.cli.fleet import expand_all

        sources = expand_all(sources, exclude, lambda text: notice(told, text))
    if vm is not None and len(sources) > 1:
        raise UsageError("--vm names one VM, but there are several sources", hint="back them up one by one")
    if vm == "":
        raise UsageError("--vm is empty")
    if changed_extents is not None and len(sources) > 1:
        raise UsageError("--changed-extents belongs to one source, but there are several")
    if changed_extents is not None and is_esxi(sources[0]):
        raise UsageError("--changed-extents is for files, not for the VMs of a host")
    map_file = None if read_all else changed_extents
    labels, taken = _labels(label), None if time is None else parse_time(time)
    states = ProgressFile(progress_file)
    if parallel > 1 and len(sources) > 1:
        from holdfast.cli.several import back_up_several

        back_up_several(invocation, context, sources, parallel, states)
        return
    failed: HoldfastError | None = None
    with invocation.open_repository(engine=_ENGINE) as repository:
        if repository.config.encryption is None and password_is_given(invocation):
            notice(
                invocation,
                "a password was given, but the repository is not encrypted: nothing in it is secret",
            )
        # What follows is loaded while another host is waited for; what speaks to ESXi hosts only for those who have some.
        from holdfast.repo.backup import BackupOptions

        options = BackupOptions(labels=labels, time=taken, dry_run=dry_run, workers=workers)
        held = None
        if any(map(is_esxi, sources)):
            from holdfast.cli.hostbackup import HostBackup
            from holdfast.esxi.machine import Request

            held = HostBackup(
                Request(
                    how=cast("How", how),
                    quiesce=quiesce,
                    memory=memory,
                    disks=disk,
                    force_off=force_off,
                    shutdown_s=shutdown_time,
                ),
                cast("Via | None", via),
            )
        for source in sources:
            try:
                if held is not None and is_esxi(source):
                    _back_up_held(invocation, repository, source, vm, held, options, states, log_dir)
                else:
                    _back_up(invocation, repository, source, vm, map_file, options)
            except HoldfastError as error:
                log = invocation.log_path
                states.note_failure(source, error, log)
                if len(sources) == 1 or not isinstance(error, SourceError | UsageError | LinkError):
                    raise
                failed, invocation.run_log = failed or error, None
                print_failure(error.message, error.exit_code, error.hint, json=invocation.json, log=log)
    if failed is not None:
        invocation.exit_code = failed.exit_code


def _back_up(
    invocation: Invocation,
    repository: Repository,
    source: str,
    vm: str | None,
    map_file: str | None,
    options: BackupOptions,
) -> None:
    import contextlib

    from holdfast.cli.places import refuse_overlap
    from holdfast.esxi.folder import open_machine

    refuse_overlap(repository.path, source)
    with contextlib.closing(open_machine(source, name=vm)) as machine:
        if map_file is not None:
            from holdfast.cli.changes import read_change_file

            base, changes = read_change_file(map_file, repository, machine)
            options = dataclasses.replace(options, base=base, changes=changes)
        invocation.if_interrupted = (
            ""
            if options.dry_run
            else (
                "no restore point was made; what was stored so far is found again by the next backup of this VM"
            )
        )
        with progress(invocation, f"backing up {machine.name}") as shown:
            summary = repository.backup(
                machine,
                dataclasses.replace(
                    options,
                    on_progress=lambda counters: shown.update(
                        counters.bytes_done,
                        counters.bytes_total,
                        bytes_read=counters.bytes_read,
                        bytes_new=counters.bytes_new,
                    ),
                ),
            )
        invocation.if_interrupted = ""
    if summary.warnings:
        invocation.exit_code = EXIT_WARNINGS
    for warning in summary.warnings:
        warn(invocation, warning)
    _tell(invocation, source, summary)


def _back_up_held(
    invocation: Invocation,
    repository: Repository,
    source: str,
    vm: str | None,
    held: HostBackup,
    options: BackupOptions,
    states: ProgressFile,
    log_dir: str,
) -> None:
    from holdfast.cli.hostbackup import back_up_from_host

    invocation.if_interrupted = (
        "no restore point was made; what was stored so far is found again by the next backup of this VM"
    )
    showing = states.around(source, progress(invocation, f"backing up {source}"))
    with logged(invocation, log_dir, "backup", source.partition("//")[2].replace("/", "-", 1)) as log:
        log.note(f"backing {source} up into {repository.path}: {held.shown()}")
        summary, troubles = back_up_from_host(
            invocation, repository, source, vm, held, options, showing, log.note
        )
        invocation.if_interrupted = ""
        if summary.warnings or troubles:
            invocation.exit_code = EXIT_WARNINGS
        for warning in summary.warnings:
            warn(invocation, warning)
        summary = dataclasses.replace(summary, warnings=(*summary.warnings, *troubles))
        for line in _told(summary):
            log.note(line.strip())
    states.note(source, _record(source, summary, log.path))
    _tell(invocation, source, summary, log.path)


def _record(source: str, summary: BackupSummary, log: str) -> dict[str, Json]:
    """What programs are told. Without a log, `log` is null."""
    return {
        "type": "summary",
        "source": source,
        "point": summary.point.hex() if summary.point else None,
        "vm": summary.vm_name,
        "vm_uuid": summary.vm_uuid,
        "time": format_time(summary.time),
        "size_bytes": summary.size_bytes,
        "bytes_read": summary.bytes_read,
        "bytes_new": summary.bytes_new,
        "bytes_stored": summary.bytes_stored,
        "chunks_new": summary.chunks_new,
        "chunks_reused": summary.chunks_reused,
        "duration_s": round(summary.duration_s, 3),
        "warnings": list(summary.warnings),
        "dry_run": summary.point is None,
        "log": log or None,
    }


def _tell(invocation: Invocation, source: str, summary: BackupSummary, log: str = "") -> None:
    if invocation.json:
        print_json(_record(source, summary, log))
        return
    for line in _told(summary):
        say(line)


def _told(summary: BackupSummary) -> tuple[str, str, str]:
    """What people are told."""
    what = f"restore point {summary.point.hex()[:12]}" if summary.point else "dry run, nothing was stored"
    stored = f"{'would store' if summary.point is None else 'stored'} {format_size(summary.bytes_stored)}"
    rate = summary.bytes_read / summary.duration_s if summary.duration_s > 0 else 0
    read = f"read {format_size(summary.bytes_read)} in {format_duration(summary.duration_s)} ({format_size(int(rate))}/s)"
    return (
        f"{summary.vm_name}: {what}, {format_time(summary.time)}",
        f"  size {format_size(summary.size_bytes)}, {read}",
        f"  new {format_size(summary.bytes_new)} in {summary.chunks_new} chunks, {summary.chunks_reused} chunks reused; {stored}",
    )
