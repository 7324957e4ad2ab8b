"""`holdfast list`: the restore points, oldest first."""

from __future__ import annotations

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, print_json, print_table, say
from holdfast.cli.views import point_json
from holdfast.units import format_size, format_time

__all__ = ["command"]


@click.command("list")
@click.option("--vm", metavar="NAME", help="Only those of this VM, by name or UUID.")
@repository_options
@click.pass_obj
def command(invocation: Invocation, vm: str | None) -> None:
    """List the restore points, oldest first."""
    with invocation.open_repository() as repository:
        points = repository.points(vm)
    if invocation.json:
        print_json({"points": [point_json(point) for point in points]})
        return
    if not points:
        say("no restore points yet")
        return
    columns = [
        Column("ID"),
        Column("VM", wide=True),
        Column("TIME"),
        Column("SIZE", right=True),
        Column("NEW", right=True),
        Column("STORED", right=True),
        Column("LABELS", wide=True),
    ]
    print_table(
        columns,
        [
            (
                point.short_id,
                point.manifest.vm_name,
                format_time(point.manifest.time),
                format_size(point.manifest.size_bytes),
                format_size(point.manifest.statistics.bytes_new),
                format_size(point.manifest.statistics.bytes_stored),
                " ".join(f"{key}={value}" for key, value in point.manifest.labels),
            )
            for point in points
        ],
    )
