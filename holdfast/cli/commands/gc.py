"""`holdfast gc`: gives back the space of what no restore point needs."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Json, print_json, say
from holdfast.cli.progress import progress
from holdfast.units import format_size

if TYPE_CHECKING:
    from holdfast.repo.gc import CollectReport

_NICE: Final = 10

__all__ = ["collect", "command", "report_json"]


@click.command("gc")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be freed; change nothing.")
@click.option(
    "--max-time", metavar="TIME", help="Stop after about this time (90s, 10m, 2h); the rest is for next time."
)
@click.option(
    "--compact-below",
    metavar="SHARE",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Write packs anew of which less than this share is still needed.",
)
@click.option(
    "--alone",
    is_flag=True,
    help="No other machine uses the repository (asked for where it lies on a network file system).",
)
@repository_options
@click.pass_obj
def command(
    invocation: Invocation, dry_run: bool, max_time: str | None, compact_below: float, alone: bool
) -> None:
    """Collect garbage: give back the space of what no restore point needs any more.

    Forgotten points can not be brought back afterwards. Backups, restores and mounts may go on meanwhile; what they
    hold is kept. It works on a full disk, and can be interrupted at any time.
    """
    from holdfast.units import parse_duration

    seconds = None if max_time is None else parse_duration(max_time)
    report = collect(
        invocation, dry_run=dry_run, max_seconds=seconds, compact_below=compact_below, alone=alone
    )
    if invocation.json:
        print_json({"type": "summary", **report_json(report, dry_run=dry_run)})
    else:
        _print(report, dry_run=dry_run)


def collect(
    invocation: Invocation,
    *,
    dry_run: bool = False,
    max_seconds: float | None = None,
    compact_below: float = 0.5,
    alone: bool = False,
) -> CollectReport:
    """Runs a collection with its progress shown."""
    from holdfast.repo.gc import CollectOptions

    with contextlib.suppress(OSError):
        os.nice(_NICE)  # backups come first
    with invocation.open_repository() as repository:
        invocation.if_interrupted = "what was done stands; the next 'holdfast gc' does the rest"
        with progress(invocation, "collecting", unit="records") as bar:
            return repository.collect(
                CollectOptions(
                    dry_run=dry_run,
                    max_seconds=max_seconds,
                    compact_below=compact_below,
                    on_progress=lambda phase, done, total: (
                        bar.update(done, total) if phase == "sweep" else None
                    ),
                ),
                alone=alone,
            )


def report_json(report: CollectReport, *, dry_run: bool) -> dict[str, Json]:
    """A collection's report as JSON."""
    return {
        "dry_run": dry_run,
        "complete": report.complete,
        "points": report.points,
        "records": report.records,
        "dropped_bytes": report.dropped_bytes,
        "freed_bytes": report.freed_bytes,
        "dead_bytes": report.dead_bytes,
        "packs_removed": report.packs_removed,
        "packs_compacted": report.packs_compacted,
        "packs_holed": report.packs_holed,
        "duration_s": round(report.duration_s, 3),
        "notes": list(report.notes),
    }


def _print(report: CollectReport, *, dry_run: bool) -> None:
    for note in report.notes:
        say(f"note: {note}")
    points = f"{report.points} forgotten restore point{'' if report.points == 1 else 's'}"
    if dry_run:
        say(
            f"would collect {points}: {report.records} records, and give back up to {format_size(report.freed_bytes)}"
        )
        return
    say(
        f"collected {points}: {report.records} records of {format_size(report.dropped_bytes)} are not needed any more"
    )
    say(
        f"gave back {format_size(report.freed_bytes)}: {report.packs_removed} packs removed, "
        f"{report.packs_compacted} written anew, {report.packs_holed} with holes"
    )
    if report.dead_bytes:
        say(f"{format_size(report.dead_bytes)} of dead data stay in packs that are mostly alive")
    if not report.complete:
        say("the time was over before all was done; the next 'holdfast gc' does the rest")
