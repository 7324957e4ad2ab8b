"""What a user means by `root@10.0.0.5:22`, `[::1]:22`, `ssh://nas/backup` or `nas:22:/backup`.

Two questions are answered here: which host is meant (`parse_address`), and whether the name of a repository is
one of a folder on this machine or on another one (`parse_place`). The second never looks at the disk, since a
typing error must not decide it: **what has a colon before its first slash is not local**. A local folder with such
a name is written `./name:x`. Forms that other programs take, and that could be meant either way, are refused.

Nothing that could be read as an option by the SSH client, or as a word by a shell, passes as a host or user.
Does not resolve names, and does not know defaults: an absent user or port stays absent, for SSH's configuration.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import UsageError

__all__ = ["DEFAULT_PORT", "Address", "Place", "parse_address", "parse_place"]

DEFAULT_PORT: Final = 22
MAX_LENGTH: Final = 4096

_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})\Z")
_USER: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._@+\\-]{0,126}[A-Za-z0-9._@+$-])?\Z")
_ZONE: Final = re.compile(r"[A-Za-z0-9._-]{1,32}\Z")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FORMS: Final = "write for example root@10.0.0.5, nas:2222 or [fd00::5]:22"
_PLACE_FORMS: Final = "write ssh://user@host:port/path or host:port:/path; a folder here is ./name or /path"


@dataclass(frozen=True, slots=True)
class Address:
    """A host, and how to knock at its door.

    Args:
        host: a name, an IPv4 or an IPv6 address (without brackets).
        user: empty: whatever SSH's configuration says.
        port: 0: whatever SSH's configuration says, in the end 22.
    """

    host: str
    user: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    @property
    def known_as(self) -> str:
        """The host's name in a known_hosts file."""
        host = self.host.lower()
        return host if self.port in (0, DEFAULT_PORT) else f"[{host}]:{self.port}"


@dataclass(frozen=True, slots=True)
class Place:
    """A path on another host; the path is absolute."""

    address: Address
    path: str

    def __str__(self) -> str:
        return f"ssh://{self.address}{self.path}"


def parse_address(text: str) -> Address:
    """The host that a text such as `root@10.0.0.5:22`, `[::1]:22` or `ssh://nas` names.

    Raises:
        UsageError: it names none, or a path besides.
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _address(text, text)
    _require_ssh(scheme[1], text)
    rest = text[scheme.end() :]
    rest = rest.removesuffix("/")
    return _address(rest, text)


def parse_place(text: str) -> Place | None:
    """The path on another host that a text names, or None if it is a path on this machine.

    Raises:
        UsageError: it is neither, or could be meant either way.
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        first, slash, _ = text.partition("/")
        if ":" not in first:
            return None
        # host:port:/path; the colons of an IPv6 address are in brackets
        host_and_port, colon, between = first.rpartition(":")
        if not slash or not colon or between or not re.search(r":\d+\Z", host_and_port):
            raise UsageError(f"'{text}' can be meant as a folder here or on another host", hint=_PLACE_FORMS)
        return _place(_address(host_and_port, text), text[len(first) :], text)
    _require_ssh(scheme[1], text)
    authority, slash, path = text[scheme.end() :].partition("/")
    address = _address(authority, text)
    if not path.strip("/"):
        raise UsageError(f"'{text}' names a host, but no folder on it", hint=_PLACE_FORMS)
    return _place(address, slash + path, text)


def _place(address: Address, path: str, text: str) -> Place:
    if len(path) > MAX_LENGTH or any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise UsageError(f"the path in {text[:MAX_LENGTH]!r} is not a possible one")
    return Place(address, path)


def _require_ssh(scheme: str, text: str) -> None:
    if scheme.lower() != "ssh":
        raise UsageError(f"'{text}': Holdfast can not speak {scheme}", hint=_PLACE_FORMS)


def _address(authority: str, text: str) -> Address:
    port: str | None
    user, at, rest = authority.rpartition("@")
    if at and not _USER.match(user):
        raise UsageError(f"'{text}': {user!r} is no user name", hint=_FORMS)
    if rest.startswith("["):
        host, bracket, behind = rest[1:].partition("]")
        if not bracket or (behind and not behind.startswith(":")) or not _is_ipv6(host):
            raise UsageError(f"'{text}': what stands in brackets is no IPv6 address", hint=_FORMS)
        port = behind[1:] if behind else None
    else:
        host, colon, behind = rest.partition(":")
        if ":" in behind:
            raise UsageError(f"'{text}': an IPv6 address needs brackets around it", hint=_FORMS)
        port = behind if colon else None
        if not _HOST.match(host):
            raise UsageError(f"'{text}' names no host", hint=_FORMS)
    return Address(host, user, 0 if port is None else _port(port, text))


def _is_ipv6(host: str) -> bool:
    address, percent, zone = host.partition("%")
    if percent and not _ZONE.match(zone):
        return False
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def _port(port: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(f"'{text}': {port!r} is no port (1 to 65535)", hint=_FORMS)
    return int(port)
