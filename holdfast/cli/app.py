"""The commands and how they are found: each module is imported when its command is named."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.settings import Value, read_settings
from holdfast.errors import EXIT_CODES, UsageError

__all__ = ["COMMANDS", "app"]

_SECTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "Backing up and restoring": {
        "init": "Make a new repository.",
        "backup": "Back up VM folders, disk images or block devices.",
        "list": "List the restore points.",
        "show": "Show all about one restore point.",
        "diff": "Show what differs between two restore points.",
        "restore": "Write a restore point back to files or a device.",
        "browse": "List the files of a guest.",
        "extract": "Copy files out of a guest.",
        "mount": "Show all restore points as files in a folder.",
        "umount": "End a mount.",
    },
    "ESXi hosts": {
        "host": "Link ESXi hosts, look at them, and clean up after interrupted runs.",
        "vms": "List the VMs of a linked host.",
    },
    "Keeping the repository": {
        "forget": "Hide restore points, or bring them back.",
        "pin": "Protect restore points from policies.",
        "unpin": "Take that protection back.",
        "prune": "Forget the restore points that no rule keeps.",
        "gc": "Give back the space of what no restore point needs.",
        "check": "Prove that everything listed can be restored.",
        "replicate": "Copy restore points into another repository.",
        "stats": "Show how much is stored, and how well it is deduplicated.",
        "key": "Manage the passwords and the key of an encrypted repository.",
    },
    "Repositories on other hosts": {
        "link": "Make a limited key for repositories on another host.",
        "serve": "Be the far end of a connection to repositories here.",
    },
    "Other": {
        "bench": "Measure which settings suit your data and disks.",
        "version": "Show the version.",
    },
}
COMMANDS: Final = {name: text for section in _SECTIONS.values() for name, text in section.items()}


class _Commands(click.Group):
    """The group of all commands, which imports them one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        del ctx
        return load(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; knows what a typing error may have meant."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise UsageError(
                f"there is no command '{args[0]}'",
                hint=f"did you mean '{near[0]}'?" if near else "'holdfast --help' lists the commands",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands by section, without importing them."""
        del ctx
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the exit codes."""
        del ctx
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])
        formatter.write_paragraph()
        formatter.write_text("'holdfast COMMAND --help' explains a command.")


def load(name: str) -> click.Command:
    """The command of that name."""
    module = import_module(f"holdfast.cli.commands.{name}")
    command = module.command
    assert isinstance(command, click.Command), f"holdfast.cli.commands.{name} has no command"
    return command


@click.group(
    name="holdfast",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@repository_options
@click.pass_context
def app(context: click.Context) -> None:
    """Back up virtual machines of VMware ESXi into a deduplicating repository.

    POINT is VM@latest, VM@latest~2, VM@2026-11-22T02:00:00Z, or the beginning of an id.
    Options that stand here may also follow the command.
    """
    if context.invoked_subcommand == "version":
        return
    invocation = context.find_object(Invocation)
    assert invocation is not None
    invocation.settings = read_settings()
    context.default_map = {
        name: _checked(invocation.settings.path, name, options)
        for name, options in invocation.settings.commands.items()
    }


def _checked(path: str, name: str, options: Mapping[str, Value]) -> Mapping[str, Value]:
    """The options of a command's table, all of which the command has."""
    command = load(name) if name in COMMANDS else None
    known = {
        parameter.name: parameter
        for parameter in (command.params if command else ())
        if isinstance(parameter, click.Option) and parameter.expose_value and parameter.name
    }
    if not known:
        raise UsageError(f"unknown table '{name}' in the configuration file {path}")
    checked: dict[str, Value] = {}
    for key, value in options.items():
        option = known.get(key)
        if option is None:
            raise UsageError(
                f"unknown key '{key}' in the table '{name}' of the configuration file {path}",
                hint=f"known are {', '.join(known)}",
            )
        checked[key] = [value] if option.multiple and not isinstance(value, list) else value
        if not _fits(checked[key], option):
            raise UsageError(
                f"the key '{key}' in the configuration file {path} has a value of the wrong type"
            )
    return checked


def _fits(value: Value, option: click.Option) -> bool:
    """Whether a value of the file is of a type that an option can take; its range is looked at later."""
    values = value if isinstance(value, list) and option.multiple else [value]
    return all(isinstance(one, str | int | float) for one in values)
