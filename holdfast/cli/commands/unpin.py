"""`holdfast unpin`: see `pin`."""

from __future__ import annotations

import click

from holdfast.cli.commands.pin import change_pins
from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options

__all__ = ["command"]


@click.command("unpin")
@click.argument("points", metavar="POINT...", nargs=-1, required=True)
@repository_options
@click.pass_obj
def command(invocation: Invocation, points: tuple[str, ...]) -> None:
    """Take the protection of 'pin' back."""
    change_pins(invocation, points, pin=False)
