"""`holdfast pin` and `holdfast unpin`: protect restore points from policies."""

from __future__ import annotations

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_json, say
from holdfast.cli.views import point_json
from holdfast.units import format_time

__all__ = ["change_pins", "command"]


def change_pins(invocation: Invocation, texts: tuple[str, ...], *, pin: bool) -> None:
    """Pins or unpins the points that the texts name, and says so."""
    with invocation.open_repository() as repository:
        points = list(dict.fromkeys(repository.resolve(text) for text in texts))
        if pin:
            repository.pin(points)
        else:
            repository.unpin(points)
    if invocation.json:
        print_json(
            {
                "type": "summary",
                "action": "pin" if pin else "unpin",
                "points": [point_json(point) for point in points],
            }
        )
        return
    for point in points:
        done = "pinned" if pin else "unpinned"
        say(f"{done} {point.short_id} of {point.manifest.vm_name}, {format_time(point.manifest.time)}")


@click.command("pin")
@click.argument("points", metavar="POINT...", nargs=-1, required=True)
@repository_options
@click.pass_obj
def command(invocation: Invocation, points: tuple[str, ...]) -> None:
    """Protect restore points: no policy removes them, and 'forget' refuses to, until 'unpin'."""
    change_pins(invocation, points, pin=True)
