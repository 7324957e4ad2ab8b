"""`holdfast link`: the one-time key exchange with a host that holds repositories."""

from __future__ import annotations

import contextlib
import os
import shlex
from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.linking import confirmed_key, host_password
from holdfast.cli.options import json_option
from holdfast.cli.output import print_json, say
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.ssh.address import Address
    from holdfast.ssh.link import Access

__all__ = ["command"]


@click.command("link")
@click.argument("address", metavar="USER@HOST[:PORT]")
@click.option(
    "--restrict", metavar="PATH", default="", help="The folder over there that the key is for. Required."
)
@click.option("--append-only", is_flag=True, help="The key can add restore points and read, nothing else.")
@click.option("--read-only", is_flag=True, help="The key can read, nothing else.")
@click.option(
    "--program",
    metavar="COMMAND",
    default="holdfast",
    show_default=True,
    help="Holdfast over there, if it is not in the PATH of logins without a terminal.",
)
@click.option(
    "--fingerprint", metavar="SHA256:...", default="", help="The host's key, instead of being asked about it."
)
@click.option("--remove", is_flag=True, help="Take the key off the host again, and forget it here.")
@json_option
@click.pass_obj
def command(
    invocation: Invocation,
    address: str,
    restrict: str,
    append_only: bool,
    read_only: bool,
    program: str,
    fingerprint: str,
    remove: bool,
) -> None:
    """Make a key for repositories on another host: confirm its key, give the password once.

    From then on ssh:// addresses with this user, host and port use the key. It can do nothing over there but run
    'holdfast serve' for repositories in the folder --restrict. To change what it may do, link again.

    [env: HOLDFAST_HOST_PASSWORD, where nobody is there to type it]
    """
    from holdfast.repo.wire.reach import linked_access
    from holdfast.ssh.address import parse_address

    place = parse_address(address)
    if not place.user:
        raise UsageError(f"'{address}' names no user", hint="write user@host, as in the repository's address")
    access = linked_access(place)
    if remove:
        _remove(place, access)
    else:
        if not os.path.isabs(restrict):
            raise UsageError(
                "link needs the folder of the repositories", hint="with --restrict /ABSOLUTE/PATH"
            )
        if append_only and read_only:
            raise UsageError("--append-only and --read-only exclude each other")
        rights = [*["--append-only"] * append_only, *["--read-only"] * read_only]
        forced = f"{program} serve --stdio --restrict {shlex.join([restrict, *rights])}"
        _link(invocation, place, access, forced, fingerprint)
    if invocation.json:
        print_json({"address": str(place), "key": access.key, "removed": remove})
    elif remove:
        say(f"removed the link to {place}")
    else:
        say(f"linked {place}: its key runs '{forced}' there, and nothing else")


def _link(invocation: Invocation, place: Address, access: Access, forced: str, fingerprint: str) -> None:
    """Puts the key over there with its command.

    Raises:
        HostKeyUnknown, LoginRefused, LinkError: see `exchange_keys`.
    """
    from holdfast.ssh.exchange import exchange_keys

    console = "on the host's console: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub (or _ecdsa, _rsa)"
    exchange_keys(
        place,
        access,
        confirm=lambda shown: confirmed_key(invocation, str(place), shown, fingerprint, console),
        answer=host_password,
        command=forced,
        restrict=True,
        comment="holdfast",
    )


def _remove(place: Address, access: Access) -> None:
    """Takes the key off the host, by password: the key itself can run no command for that; then it is removed here.

    Raises:
        UsageError: the host is not linked.
        LinkError: it can not be done over there; nothing was removed here.
    """
    from dataclasses import replace

    from holdfast.ssh.authorized import withdraw
    from holdfast.ssh.exchange import entered
    from holdfast.ssh.keys import public_key

    if not access.key or not os.path.exists(access.key):
        raise UsageError(f"{place} is not linked", hint="'holdfast link' links it")
    with entered(place, replace(access, key=""), host_password) as link:
        withdraw(link, public_key(access.key))
    for path in (access.key, f"{access.key}.pub"):
        with contextlib.suppress(OSError):
            os.unlink(path)
