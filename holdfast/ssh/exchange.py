"""The one-time key exchange: afterwards the host knows our key, and we know the host's.

The host's key is fetched first and shown to the user; nothing of ours goes to a host that the user has not confirmed. Then a
key is made here, the host is entered once with the user's password, the key is put in its place over there, and it is
tried. What does not work then is taken back. The password is used for that one login, and neither kept nor passed to another process.

Each step that has been done already is skipped, so an interrupted exchange is simply done again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from holdfast.errors import HostKeyUnknown, LinkError, LoginRefused
from holdfast.ssh.address import Address
from holdfast.ssh.authorized import USUAL_PLACE, admit, knows_restrict, withdraw
from holdfast.ssh.keys import DEFAULT_BITS, PublicKey, make_key
from holdfast.ssh.known_hosts import HostKey, KnownHosts
from holdfast.ssh.link import Access, Link, Patience
from holdfast.ssh.paramiko_link import ParamikoLink
from holdfast.ssh.paramiko_login import Answer, connect, host_key

__all__ = ["Exchange", "entered", "exchange_keys", "fetch_host_key"]

_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Exchange:
    """What has been agreed on.

    Args:
        host: the key by which the host is known from now on.
        ours: the key that it accepts.
        changed: whether the host's authorized_keys had to be changed.
    """

    host: HostKey
    ours: PublicKey
    changed: bool


def fetch_host_key(address: Address, known_hosts: KnownHosts, patience: Patience | None = None) -> HostKey:
    """The key that whoever answers there has shown. Nothing of ours was sent but that we speak SSH.

    Raises:
        HostUnreachable, LinkError: nobody answers.
    """
    kinds = [key.kind for key in known_hosts.keys(address.known_as)]
    transport = connect(address, patience or Patience(), kinds)
    try:
        return host_key(transport)
    finally:
        transport.close()


def exchange_keys(
    address: Address,
    access: Access,
    *,
    confirm: Callable[[HostKey], bool],
    answer: Answer,
    place: str = USUAL_PLACE,
    command: str = "",
    restrict: bool = False,
    renew: bool = False,
    prove: Callable[[Link], None] | None = None,
    attest: Callable[[], None] | None = None,
    comment: str = "holdfast",
    bits: int = DEFAULT_BITS,
    patience: Patience | None = None,
) -> Exchange:
    """A host that is known, and accepts our key.

    Args:
        access: our file of known hosts, and the file of our key, which is made if it is not there.
        confirm: shown the host's key if it is not known yet; whether it is the right one.
        answer: the user's answers to the host's questions, the password most often.
        place: the authorized_keys file over there (ESXi: /etc/ssh/keys-root/authorized_keys).
        command, restrict: what the key may be used for; see `PublicKey.line`.
        renew: write the line anew although the key is accepted already; it may be limited otherwise than now wanted.
        prove: given the link by password, before anything is changed; raises if the host can not do what the key is for.
        attest: called when the key is accepted; raises if it can not do, or can do more than, what it is for. Then it is taken out.

    Raises:
        HostKeyUnknown: not confirmed.
        HostKeyChanged: another key than the recorded one; nobody is asked.
        LoginRefused: the password was wrong three times, or the host does not accept keys.
        LinkError, StorageError: something else failed.
    """
    known_hosts = KnownHosts(access.known_hosts)
    shown = fetch_host_key(address, known_hosts, patience)
    try:
        known_hosts.judge(address, shown)
    except HostKeyUnknown:
        if not confirm(shown):
            raise
        known_hosts.record(address, shown)
    ours = make_key(access.key, comment, bits=bits)
    if not command and not restrict and not renew and _accepted(address, access, patience):
        return Exchange(shown, ours, changed=False)
    with entered(address, replace(access, key=""), answer, patience) as link:
        if prove is not None:
            prove(link)
        spelled_out = not knows_restrict(link.server)
        changed = admit(link, ours, place, command=command, restrict=restrict, spelled_out=spelled_out)
        if not _accepted(address, access, patience):
            with contextlib.suppress(LinkError):
                withdraw(link, ours, place)
            raise LoginRefused(
                f"{address} does not accept the new key, although it is in {place} now; it was taken out again",
                hint="look at the permissions of that file and its folders over there, and at AuthorizedKeysFile "
                "and PubkeyAcceptedAlgorithms of its sshd_config",
            )
        if attest is not None:
            try:
                attest()
            except BaseException:
                with contextlib.suppress(LinkError):
                    withdraw(link, ours, place)
                raise
    return Exchange(shown, ours, changed)


def entered(
    address: Address, access: Access, answer: Answer, patience: Patience | None = None
) -> ParamikoLink:
    """A link by password; a wrong one is asked for again."""
    for tries_left in reversed(range(_TRIES)):
        link = ParamikoLink(address, access, patience=patience, answer=answer)
        try:
            link.log_in()
            return link
        except LoginRefused:
            if not tries_left:
                raise
    raise AssertionError


def _accepted(address: Address, access: Access, patience: Patience | None) -> bool:
    """Whether the host lets us in by key. No command is run: the key may have one of its own."""
    with ParamikoLink(address, access, patience=patience) as link:
        try:
            link.log_in()
        except LoginRefused:
            return False
    return True
