"""`holdfast key`: the passwords of an encrypted repository, and the master key that they open."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Final

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, Json, print_json, print_table, say
from holdfast.cli.passwords import new_password
from holdfast.errors import DestinationExists, UsageError, storage_error
from holdfast.units import format_time

if TYPE_CHECKING:
    from holdfast.repo.format.config import KeySlot

__all__ = ["command", "parse_master_key"]

_MASTER_KEY: Final = re.compile(r"[0-9a-f]{64}\Z")

_new_password_option = click.option(
    "--new-password-file",
    metavar="FILE",
    help="The first line of this file is the new password. [env: HOLDFAST_NEW_PASSWORD_FILE, HOLDFAST_NEW_PASSWORD]",
)
_label_option = click.option("--label", metavar="TEXT", default="", help="What to call the key, for people.")


@click.group("key")
@repository_options
def command() -> None:
    """Manage the passwords and the key of an encrypted repository.

    Everything is encrypted under one master key; each password opens a copy of it. Changing passwords does not
    encrypt anything anew: whoever knew an old password and has a copy of config.json still has the master key.
    """


def _slot_json(slot: KeySlot) -> dict[str, Json]:
    return {"id": slot.id, "label": slot.label, "created": format_time(slot.created)}


@command.command("list")
@repository_options
@click.pass_obj
def list_keys(invocation: Invocation) -> None:
    """List the passwords, by id and label. Needs no password."""
    with invocation.open_repository("later") as repository:
        slots = repository.key_slots()
    if invocation.json:
        print_json({"keys": [_slot_json(slot) for slot in slots]})
        return
    print_table(
        [Column("ID"), Column("CREATED"), Column("LABEL", wide=True)],
        [(slot.id, format_time(slot.created), slot.label) for slot in slots],
    )


@command.command("add")
@_new_password_option
@_label_option
@repository_options
@click.pass_obj
def add(invocation: Invocation, new_password_file: str | None, label: str) -> None:
    """Add a password; those that exist stay valid."""
    with invocation.open_repository() as repository:
        repository.key_slots()
        slot = repository.add_key(new_password(new_password_file), label)
    _tell(invocation, slot, "added key")


@command.command("remove")
@click.argument("key_id", metavar="ID")
@repository_options
@click.pass_obj
def remove(invocation: Invocation, key_id: str) -> None:
    """Remove a password. ID is that of 'key list', or its beginning. The last one can not be removed."""
    with invocation.open_repository() as repository:
        found = [slot.id for slot in repository.key_slots() if slot.id.startswith(key_id.lower())]
        if len(found) > 1 or not key_id:
            raise UsageError(f"the key '{key_id}' is ambiguous", hint="'holdfast key list' shows the keys")
        removed = found[0] if found else key_id
        repository.remove_key(removed)
    if invocation.json:
        print_json({"removed": removed})
    else:
        say(f"removed key {removed}")


@command.command("change-password")
@_new_password_option
@repository_options
@click.pass_obj
def change_password(invocation: Invocation, new_password_file: str | None) -> None:
    """Replace the password that is given by a new one. Its key gets a new id."""
    with invocation.open_repository() as repository:
        repository.key_slots()
        slot = repository.change_password(new_password(new_password_file))
    _tell(invocation, slot, "changed the password; its key is now")


@command.command("export")
@click.option("-o", "--output", metavar="FILE", help="Write to this new file, instead of to stdout.")
@repository_options
@click.pass_obj
def export(invocation: Invocation, output: str | None) -> None:
    """Print the master key, to be kept in a safe place.

    With it and the repository everything can be read, even if all passwords are lost: see 'key import'.
    """
    with invocation.open_repository() as repository:
        repository.key_slots()
        master = repository.export_key().hex()
        repository_id = repository.config.id.hex()
    text = f"# Master key of the Holdfast repository {repository_id}. Whoever has it can read all backups.\n{master}\n"
    if output is not None:
        _write_secret(output, text)
    if invocation.json:
        print_json({"repository": repository_id, "output": output, "master_key": None if output else master})
    elif output is None:
        print(text, end="")
    else:
        say(f"wrote the master key to {output}; keep it secret, and apart from the repository")


def _write_secret(path: str, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except FileExistsError:
        raise DestinationExists(f"{path} exists already", hint="name a new file") from None
    except OSError as error:
        raise storage_error(error, f"writing {path}") from None


@command.command("import")
@click.argument("file", metavar="FILE")
@_new_password_option
@_label_option
@repository_options
@click.pass_obj
def import_key(invocation: Invocation, file: str, new_password_file: str | None, label: str) -> None:
    """Add a password by means of an exported master key, when no password is known any more.

    FILE is what 'key export' wrote; - stands for stdin.
    """
    master = parse_master_key(_read(file), file)
    with invocation.open_repository("later") as repository:
        repository.key_slots()
        slot = repository.import_key(master, new_password(new_password_file), label)
    _tell(invocation, slot, "added key")


def _read(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read(65536)
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(65536)
    except OSError as error:
        raise UsageError(f"{path} can not be read ({error.strerror})") from None


def parse_master_key(text: str, where: str) -> bytes:
    """The 32 bytes of an exported key.

    Raises:
        UsageError: there is none in the text.
    """
    lines = [line.strip() for line in text.splitlines()]
    found = [line.lower() for line in lines if line and not line.startswith("#")]
    if len(found) != 1 or not _MASTER_KEY.match(found[0]):
        raise UsageError(f"{where} holds no exported key", hint="it is one line of 64 hexadecimal digits")
    return bytes.fromhex(found[0])


def _tell(invocation: Invocation, slot: KeySlot, what: str) -> None:
    if invocation.json:
        print_json({"key": _slot_json(slot)})
    else:
        say(f"{what} {slot.id}")
