"""The hosts that are linked: what `holdfast host add` has agreed on, in a folder beside the configuration.

    hosts.json       name, address, key file of each host; no secret
    known_hosts      the hosts' keys, in OpenSSH's format
    keys/NAME        the private key that a host accepts (and .pub), one per host
    runs/            what running backups owe to a host (`journal`)

Durability: `hosts.json` is replaced in one step and is on the disk on return; all files are their owner's only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from holdfast.errors import SourceError, SourceNotFound, UsageError, storage_error
from holdfast.esxi.agent.bundle import program_hash
from holdfast.ssh.address import Address, parse_address
from holdfast.ssh.known_hosts import replace_file
from holdfast.ssh.link import Access

__all__ = ["HostBook", "HostRecord", "require_host_name"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_MAX_FILE_BYTES: Final = 1 << 20
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A linked host.

    Args:
        name: what the user calls it.
        key: file of the private key that it accepts.
        own_key: whether that key was made for this host, so that it goes with it.
        restrict: the level of the agent that the key is limited to; empty if it has a shell.
        agent: hash of the program that the host runs for the key, if it is limited.
    """

    name: str
    address: Address
    key: str
    own_key: bool = True
    restrict: str = ""
    agent: str = ""

    @property
    def agent_present(self) -> bool:
        """Whether the host runs the agent of this version, as far as is known here."""
        return not self.restrict or self.agent == program_hash()


def require_host_name(name: str) -> None:
    """Returns if that can be a host's name.

    Raises:
        UsageError: it can not.
    """
    if not _NAME.match(name):
        raise UsageError(
            f"'{name}' is no name for a host",
            hint="letters, digits, '.', '_' and '-', beginning with a letter",
        )


class HostBook:
    """The linked hosts in `folder`, which need not exist yet."""

    def __init__(self, folder: str) -> None:
        self.folder: Final = folder
        self.known_hosts: Final = os.path.join(folder, "known_hosts")
        self.runs_folder: Final = os.path.join(folder, "runs")
        self._path = os.path.join(folder, "hosts.json")

    def all(self) -> tuple[HostRecord, ...]:
        """All hosts, ordered by name.

        Raises:
            SourceError: the file makes no sense.
            StorageError: it can not be read.
        """
        try:
            with open(self._path, "rb") as file:
                data = file.read(_MAX_FILE_BYTES)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise storage_error(error, f"reading {self._path}") from None
        try:
            document = json.loads(data)
            if document["version"] != _VERSION:
                raise ValueError(f"it has the version {document['version']}")
            found = [
                HostRecord(
                    str(one["name"]),
                    parse_address(one["address"]),
                    str(one["key"]),
                    bool(one["own_key"]),
                    str(one.get("restrict", "")),
                    str(one.get("agent", "")),
                )
                for one in document["hosts"]
            ]
        except (ValueError, KeyError, TypeError, UsageError) as error:
            raise SourceError(
                f"the list of hosts {self._path} can not be understood ({error})",
                hint="remove it, and link the hosts again",
            ) from None
        return tuple(sorted(found, key=lambda host: host.name))

    def get(self, name: str) -> HostRecord:
        """The host of that name.

        Raises:
            SourceNotFound: there is none.
        """
        hosts = self.all()
        for host in hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in hosts)
        raise SourceNotFound(
            f"no host is called '{name}'" + (f"; linked are {known}" if known else ""),
            hint=f"link it first: holdfast host add {name if _NAME.match(name) else 'NAME'} root@ADDRESS",
        )

    def key_file(self, name: str) -> str:
        """Where the key that is made for a host lies."""
        require_host_name(name)
        return os.path.join(self.folder, "keys", name)

    def access(self, host: HostRecord) -> Access:
        """How to get into the host: by its key alone."""
        return Access(known_hosts=self.known_hosts, key=host.key)

    def put(self, host: HostRecord) -> None:
        """Records a host, in place of one of the same name."""
        require_host_name(host.name)
        with self.changing():
            self._write([*(one for one in self.all() if one.name != host.name), host])

    def remove(self, name: str) -> HostRecord:
        """Takes a host off the list, and returns what it was. Its key file stays.

        Raises:
            SourceNotFound: there is none of that name.
        """
        with self.changing():
            host = self.get(name)
            self._write([one for one in self.all() if one.name != name])
        return host

    def _write(self, hosts: list[HostRecord]) -> None:
        entries = [
            {"name": host.name, "address": str(host.address), "key": host.key, "own_key": host.own_key,
             "restrict": host.restrict, "agent": host.agent}
            for host in sorted(hosts, key=lambda host: host.name)
        ]  # fmt: skip
        text = json.dumps({"version": _VERSION, "hosts": entries}, indent=2)
        replace_file(self._path, f"{text}\n".encode())

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Keeps other processes from changing the list meanwhile."""
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            descriptor = os.open(
                os.path.join(self.folder, "hosts.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise storage_error(error, f"writing {self._path}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
