"""`holdfast umount`: the end of a mount, also of one whose process is gone."""

from __future__ import annotations

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import json_option
from holdfast.cli.output import print_json, warn
from holdfast.errors import EXIT_WARNINGS

__all__ = ["command"]


@click.command("umount")
@click.argument("folder", metavar="DIR")
@json_option
@click.pass_obj
def command(invocation: Invocation, folder: str) -> None:
    """End the mount on the folder DIR. A mount whose process was killed is cleared."""
    from holdfast.fuse.mountpoint import place_of, unmount

    goes_on = unmount(folder)
    if goes_on:
        warn(invocation, goes_on)
        invocation.exit_code = EXIT_WARNINGS
    if invocation.json:
        print_json({"type": "summary", "mount_point": place_of(folder)})
