"""`holdfast forget`: hides restore points, or brings them back."""

from __future__ import annotations

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_json, say
from holdfast.cli.views import point_json
from holdfast.units import format_time

__all__ = ["command"]


@click.command("forget")
@click.argument("points", metavar="POINT...", nargs=-1, required=True)
@click.option("--undo", is_flag=True, help="Bring forgotten points back, as long as 'gc' has not run.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@repository_options
@click.pass_obj
def command(invocation: Invocation, points: tuple[str, ...], undo: bool, dry_run: bool) -> None:
    """Forget restore points: they are not listed any more, and 'gc' gives their space back.

    Until then --undo brings them back; 'list --forgotten' shows them. What other restore points need is never
    touched. A pinned point is forgotten only after 'unpin'.
    """
    from holdfast.errors import UsageError
    from holdfast.repo.points import resolve_point

    with invocation.open_repository() as repository:
        among = repository.hidden_points() if undo else repository.points()
        chosen = list(dict.fromkeys(resolve_point(among, text) for text in points))
        pinned = repository.pinned()
        for point in chosen:
            if not undo and point.id in pinned:
                raise UsageError(
                    f"restore point {point.short_id} is pinned",
                    hint=f"'holdfast unpin {point.short_id}' allows it to be forgotten",
                )
        if not dry_run:
            if undo:
                repository.recall(chosen)
            else:
                repository.forget(chosen)
    if invocation.json:
        print_json(
            {
                "type": "summary",
                "action": "recall" if undo else "forget",
                "dry_run": dry_run,
                "points": [point_json(point) for point in chosen],
            }
        )
        return
    done = (
        ("would bring back" if undo else "would forget")
        if dry_run
        else ("brought back" if undo else "forgot")
    )
    for point in chosen:
        say(f"{done} {point.short_id} of {point.manifest.vm_name}, {format_time(point.manifest.time)}")
    if not undo and not dry_run:
        say("'holdfast gc' gives their space back; until then 'holdfast forget --undo' brings them back")
