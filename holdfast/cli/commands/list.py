"""`holdfast list`: the restore points, oldest first."""

from __future__ import annotations

import time

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, print_json, print_table, say
from holdfast.cli.views import copies_cell, copies_json, point_json
from holdfast.units import format_size, format_time

__all__ = ["command"]


@click.command("list")
@click.option("--vm", metavar="NAME", help="Only those of this VM, by name or UUID.")
@click.option("--forgotten", is_flag=True, help="Those that were forgotten and can still be brought back.")
@repository_options
@click.pass_obj
def command(invocation: Invocation, vm: str | None, forgotten: bool) -> None:
    """List the restore points, oldest first."""
    from holdfast.repo.points import points_of_vm

    with invocation.open_repository() as repository:
        if forgotten:
            points = repository.hidden_points()
            if vm is not None and points:
                points = points_of_vm(points, vm)
        else:
            points = repository.points(vm)
        copies = repository.copies() if points else {}
    if invocation.json:
        found = [{**point_json(point), "copies": copies_json(copies.get(point.id, []))} for point in points]
        print_json({"points": [*found]})
        return
    if not points:
        say("no forgotten restore points" if forgotten else "no restore points yet")
        return
    now = time.time()
    columns = [
        Column("ID"),
        Column("VM", wide=True),
        Column("TIME"),
        Column("SIZE", right=True),
        Column("NEW", right=True),
        Column("STORED", right=True),
        Column("COPIES"),
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
                copies_cell(copies.get(point.id, []), now),
                " ".join(f"{key}={value}" for key, value in point.manifest.labels),
            )
            for point in points
        ],
    )
