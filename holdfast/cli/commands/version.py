"""`holdfast version`. Loads nothing heavy: it answers at once."""

from __future__ import annotations

import platform

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import json_option
from holdfast.cli.output import print_json, say
from holdfast.version import VERSION

__all__ = ["command"]


@click.command("version")
@json_option
@click.pass_obj
def command(invocation: Invocation) -> None:
    """Show the version."""
    if invocation.json:
        print_json({"version": VERSION, "python": platform.python_version()})
    else:
        say(f"holdfast {VERSION} (Python {platform.python_version()})")
