"""Linking a host: its fingerprint is confirmed, the password given once, a key exchanged, and the host looked at."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from holdfast.cli.linked import host_book
from holdfast.cli.output import notice
from holdfast.cli.passwords import at_terminal
from holdfast.errors import (
    DestinationExists,
    FarCommandMissing,
    HoldfastError,
    KeyLimited,
    LinkError,
    LoginRefused,
)

if TYPE_CHECKING:
    from holdfast.cli.invocation import Invocation
    from holdfast.esxi.agent.bundle import Level
    from holdfast.esxi.hosts import HostBook, HostRecord
    from holdfast.ssh.known_hosts import HostKey
    from holdfast.ssh.link import Link

__all__ = ["authorized_keys_of", "confirmed_key", "host_password", "link_host", "unlink_host"]

_PASSWORD_VARIABLE: Final = "HOLDFAST_HOST_PASSWORD"  # noqa: S105 - its name
_CONSOLE: Final = "on the host's console: ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub (or _ecdsa_key.pub)"


def authorized_keys_of(user: str) -> str:
    """Where ESXi looks for the keys that a user may log in with."""
    return f"/etc/ssh/keys-{user or 'root'}/authorized_keys"


def link_host(
    invocation: Invocation,
    name: str,
    address_text: str,
    *,
    key: str,
    restrict: Level | None,
    fingerprint: str,
) -> HostRecord:
    """A host that accepts our key and stands in the list.

    Args:
        restrict: what to limit the key to; None for one that has a shell.

    Raises:
        DestinationExists: the name is taken by another address.
        HostKeyUnknown: its key was not confirmed.
        LoginRefused: the password is wrong, or there was none.
        LinkError: the key was to be limited, and the host can not do that.
    """
    from dataclasses import replace

    from holdfast.esxi.agent.bundle import pinned_command, program_hash
    from holdfast.esxi.hosts import HostRecord, require_host_name
    from holdfast.ssh.address import parse_address
    from holdfast.ssh.exchange import exchange_keys

    require_host_name(name)
    book = host_book()
    address = parse_address(address_text)
    if not address.user:
        address = replace(address, user="root")
    known = next((one for one in book.all() if one.name == name), None)
    if known is not None and known.address != address:
        raise DestinationExists(
            f"a host called '{name}' is linked already, at {known.address}",
            hint=f"choose another name, or 'holdfast host remove {name}' first",
        )
    record = HostRecord(name, address, os.path.abspath(key) if key else book.key_file(name), own_key=not key)
    if restrict:
        record = replace(record, restrict=restrict, agent=program_hash())
    exchange_keys(
        address,
        book.access(record),
        confirm=lambda shown: confirmed_key(invocation, str(record.address), shown, fingerprint, _CONSOLE),
        answer=host_password,
        place=authorized_keys_of(address.user),
        command=pinned_command(restrict) if restrict else "",
        restrict=restrict is not None,
        renew=known is not None and (bool(known.restrict) or _has_no_shell(book, known)),
        prove=(lambda link: _require_runs(link, name, restrict)) if restrict else None,
        attest=(lambda: _require_limited(book, record)) if restrict else None,
        comment=f"holdfast {name}",
    )
    book.put(record)
    return record


def _has_no_shell(book: HostBook, record: HostRecord) -> bool:
    """Whether the host limits a key that is not known here to be limited: somebody else may have linked it."""
    from holdfast.esxi.host import HostSession

    try:
        with HostSession(book, record) as session:
            session.console.python()
    except KeyLimited:
        return True
    except HoldfastError:
        return False  # the key is not accepted, or the host not there: linking it will tell
    return False


def _require_runs(link: Link, name: str, level: Level) -> None:
    """Returns if the command that the key is to be bound to runs on the host.

    Raises:
        FarCommandMissing, LinkError: it does not.
    """
    from holdfast.esxi.agent.bundle import pinned_command
    from holdfast.esxi.agent_link import AgentLink
    from holdfast.esxi.shell_console import ShellConsole

    hint = "link it without --restrict; nothing was changed on the host"
    if not ShellConsole(link).python():
        raise FarCommandMissing(
            f"{name} has no python3, which the agent needs: a key for it can not be limited to the agent",
            hint=hint,
        )
    try:
        AgentLink.start(link.start(pinned_command(level))).close()
    except LinkError as error:
        raise type(error)(
            f"{name} does not run the agent, so that a key for it can not be limited to that: {error.message}",
            hint=hint,
        ) from None


def _require_limited(book: HostBook, record: HostRecord) -> None:
    """Returns if the host lets the key run the agent, and nothing else.

    Raises:
        KeyLimited, LinkError: it does not.
    """
    from holdfast.esxi.host import HostSession

    with HostSession(book, record) as session:
        session.console.python()


def unlink_host(invocation: Invocation, name: str) -> None:
    """Takes a host off the list; its key is taken off the host, if that can be reached, and removed here.

    A key that is limited to the agent can not take itself off; that needs the password.

    Raises:
        SourceNotFound: no host is called so.
    """
    from dataclasses import replace

    from holdfast.ssh.authorized import withdraw
    from holdfast.ssh.exchange import entered
    from holdfast.ssh.keys import public_key
    from holdfast.ssh.known_hosts import KnownHosts
    from holdfast.ssh.paramiko_link import ParamikoLink

    book = host_book()
    record = book.get(name)
    if record.own_key:
        try:
            access = book.access(record)
            with (
                entered(record.address, replace(access, key=""), host_password)
                if record.restrict
                else ParamikoLink(record.address, access)
            ) as link:
                withdraw(link, public_key(record.key), authorized_keys_of(record.address.user))
        except HoldfastError as error:
            notice(
                invocation,
                f"the key could not be taken off the host ({error.message}); remove the line 'holdfast {name}' from "
                f"{authorized_keys_of(record.address.user)} there",
            )
    book.remove(name)
    if all(other.address.known_as != record.address.known_as for other in book.all()):
        KnownHosts(book.known_hosts).forget(record.address)
    if record.own_key:
        for path in (record.key, f"{record.key}.pub"):
            with contextlib.suppress(OSError):
                os.unlink(path)


def confirmed_key(
    invocation: Invocation, address: str, shown: HostKey, fingerprint: str, console: str
) -> bool:
    """Whether the user says that this is the host's key.

    Args:
        fingerprint: what it must be, so that nobody has to be asked.
        console: where it can be looked up.
    """
    if fingerprint:
        return shown.fingerprint == fingerprint
    if not at_terminal():
        return False
    notice(invocation, f"{address} shows the key {shown}")
    notice(invocation, console)
    return input("Is that the host's key? [yes/no] ").strip().lower() == "yes"


def host_password(question: str, shown: bool) -> str:
    """What the user answers to a question of the host, the password most often."""
    given = os.environ.get(_PASSWORD_VARIABLE)
    if given is not None:
        return given
    if not at_terminal():
        raise LoginRefused(
            "the host asks for a password, and there is nobody to type it",
            hint=f"run this at a terminal, set {_PASSWORD_VARIABLE}, or use a key that the host accepts",
        )
    if shown:
        return input(f"{question} ")
    from getpass import getpass

    return getpass(f"{question.strip() or 'Password:'} ")
