"""Options that commands share. Those of the whole program are taken before and after the command's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from holdfast.cli.invocation import Invocation

__all__ = ["json_option", "log_dir_option", "repository_options", "workers_option"]

C = TypeVar("C", bound=Callable[..., object])


def _keep(context: click.Context, parameter: click.Parameter, value: str | bool | None) -> None:
    """Puts a global option into the invocation; the one that comes last on the command line counts."""
    invocation = context.find_object(Invocation)
    if invocation is not None and value not in (None, False) and parameter.name:
        setattr(invocation, parameter.name, value)


def json_option(function: C) -> C:
    """`--json`."""
    return click.option(
        "--json", is_flag=True, expose_value=False, callback=_keep, help="Print JSON, for programs."
    )(function)


def repository_options(function: C) -> C:
    """`-r`, where its password comes from, and `--json`."""
    for option in (
        json_option,
        click.option(
            "--password-command",
            metavar="COMMAND",
            expose_value=False,
            callback=_keep,
            help="Run this; the first line of its output is the password.",
        ),
        click.option(
            "--password-file",
            metavar="FILE",
            expose_value=False,
            callback=_keep,
            help="The first line of this file is the password.",
        ),
        click.option(
            "-r",
            "--repository",
            metavar="ADDRESS",
            expose_value=False,
            callback=_keep,
            help="The repository: a path, ssh://user@host[:port]/path or host:port:/path. [env: HOLDFAST_REPOSITORY]",
        ),
    ):
        function = option(function)
    return function


def log_dir_option(function: C) -> C:
    """`--log-dir`."""
    return click.option(
        "--log-dir",
        metavar="DIR",
        default="",
        envvar="HOLDFAST_LOG_DIR",
        help="Where each run on a host leaves its log. [env: HOLDFAST_LOG_DIR; default: holdfast/logs in XDG_STATE_HOME, that is ~/.local/state]",
    )(function)


def workers_option(function: C) -> C:
    """`--workers`."""
    return click.option(
        "--workers",
        type=click.IntRange(1, 256),
        help="Threads to work with. [default: one per core, and more while cores are idle]",
    )(function)
