"""A repository on another host, as the engine sees it: `Place` over one connection.

The password and the keys stay here: what goes over is the configuration as it stands in the repository, with its wrapped keys.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Self

from holdfast.errors import UsageError
from holdfast.ids import RepositoryId
from holdfast.repo.folder import ReadConfig
from holdfast.repo.format.config import Config, decode_config, encode_config
from holdfast.repo.index import Index
from holdfast.repo.packs import PackStore
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.near import Connection, Further
from holdfast.repo.wire.remote_index import RemoteIndex
from holdfast.repo.wire.remote_store import RemotePackStore
from holdfast.repo.wire.stream import PipeStream, SshStream, Stream
from holdfast.ssh.address import Address
from holdfast.ssh.address import Place as FarAddress
from holdfast.ssh.link import Access
from holdfast.ssh.openssh import OpenSshLink

__all__ = ["MOST_STREAMS", "RemotePlace", "linked_access", "reach"]

_FAR_COMMAND: Final = "holdfast serve --stdio"
_CONFIG_LOCK: Final = 1
_COLLECTING_LOCK: Final = 2
_STREAMS: Final = 4
MOST_STREAMS: Final = 16
"""An SSH server refuses more logins at a time by default (MaxStartups)."""


def reach(far: FarAddress) -> Stream:
    """A far side that has been started.

    `HOLDFAST_REMOTE_COMMAND` is the command over there; `HOLDFAST_RSH` a program that is run instead of the SSH client, with the
    host and that command as its last two arguments; `HOLDFAST_SSH_KEY` the file of the private key; else it is that of `holdfast link`, or what SSH's configuration says.

    Raises:
        LinkError: the host can not be reached, or does not let us in.
    """
    command = os.environ.get("HOLDFAST_REMOTE_COMMAND") or _FAR_COMMAND
    program = os.environ.get("HOLDFAST_RSH", "")
    if program:
        return PipeStream([*shlex.split(program), str(far.address), command], str(far.address))
    linked = linked_access(far.address)
    key = os.environ.get("HOLDFAST_SSH_KEY") or (linked.key if os.path.exists(linked.key) else "")
    link = OpenSshLink(far.address, replace(linked, key=key, user_config=True))
    try:
        return SshStream(link, link.start(command))
    except BaseException:
        link.close()
        raise


def _streams_wanted() -> tuple[int, bool]:
    """How many streams a connection may have, and whether somebody has said so: `HOLDFAST_CONNECTIONS`."""
    said = os.environ.get("HOLDFAST_CONNECTIONS", "")
    if not said:
        return _STREAMS, False
    if not said.isdecimal() or not 1 <= int(said) <= MOST_STREAMS:
        raise UsageError(f"HOLDFAST_CONNECTIONS is no number from 1 to {MOST_STREAMS}: {said!r}")
    return int(said), True


def linked_access(address: Address) -> Access:
    """Our own known hosts, and where `holdfast link` puts the key for this user, host and port."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    folder = os.path.join(config, "holdfast")
    name = f"{address.user}@{address.known_as.replace('/', '_')}"
    return Access(os.path.join(folder, "known_hosts"), os.path.join(folder, "repository-keys", name))


class RemotePlace:
    """See the module.

    Args:
        path: what the user calls the repository.
        folder: its path over there.
    """

    is_far = True

    def __init__(self, connection: Connection, path: str, folder: str) -> None:
        self.path = path
        self.connection = connection
        self.store: PackStore = RemotePackStore(connection)
        self._folder = folder
        self._opened: m.Opened | None = None

    @classmethod
    def reached(cls, far: FarAddress) -> Self:
        """The place at an address.

        Raises:
            LinkError: see `reach`.
        """
        further = Further(lambda: reach(far), *_streams_wanted())
        connection = Connection(reach(far), str(far.address), further)
        return cls(connection, f"ssh://{far.address}{far.path}", far.path)

    def use_streams(self, count: int) -> None:
        """See `Place.use_streams`."""
        self.connection.use_streams(count)

    def create(self, config: Config) -> None:
        """See `Place.create`."""
        self._opened = self.connection.ask(m.Create(self._folder, encode_config(config)))

    def _state(self, *, fresh: bool = False) -> m.Opened:
        if self._opened is None:
            self._opened = self.connection.ask(m.Open(self._folder))
        elif fresh:
            self._opened = self.connection.ask(m.ReadConfig())
        return self._opened

    def read_config(self) -> ReadConfig:
        """See `Place.read_config`."""
        state = self._state(fresh=True)
        return ReadConfig(decode_config(state.config), state.warning)

    def copies_agree(self) -> bool:
        """See `Place.copies_agree`."""
        return self._state(fresh=True).copies_agree

    def write_config(self, config: Config) -> None:
        """See `Place.write_config`."""
        self.connection.ask(m.WriteConfig(encode_config(config)))

    @contextlib.contextmanager
    def _locked(self, which: int) -> Iterator[None]:
        self.connection.ask(m.Lock(which))
        try:
            yield
        finally:
            self.connection.ask(m.Unlock(which))

    def changing_config(self) -> contextlib.AbstractContextManager[None]:
        """See `Place.changing_config`."""
        return self._locked(_CONFIG_LOCK)

    def collecting(self) -> contextlib.AbstractContextManager[None]:
        """See `Place.collecting`."""
        return self._locked(_COLLECTING_LOCK)

    def is_writable(self) -> bool:
        """See `Place.is_writable`; as it was when the configuration was last read."""
        return self._state().writable

    def may_remove(self) -> bool:
        """See `Place.may_remove`."""
        welcome = self.connection.welcome
        return self.is_writable() and not welcome.append_only and not welcome.read_only

    def use_index(self) -> None:
        """See `Place.use_index`."""
        self.connection.ask(m.UseIndex())

    def own_index(self, needless: Callable[[], bool] | None = None) -> bool:
        """See `Place.own_index`."""
        return self.connection.ask(m.OwnIndex(needless is not None)).value

    def index_is_outside(self, repository: RepositoryId) -> bool:
        """See `Place.index_is_outside`."""
        del repository
        return self._state().outside

    def index_exists(self, repository: RepositoryId) -> bool:
        """See `Place.index_exists`."""
        del repository
        return self.connection.ask(m.IndexExists()).value

    def open_index(self, repository: RepositoryId) -> Index:
        """See `Place.open_index`."""
        del repository
        self.connection.ask(m.OpenIndex())
        return RemoteIndex(self.connection)

    @contextlib.contextmanager
    def replacing_index(self, repository: RepositoryId) -> Iterator[Index]:
        """See `Place.replacing_index`."""
        del repository
        self.connection.ask(m.BeginRebuild())
        kept = False
        try:
            yield RemoteIndex(self.connection)
            kept = True
        finally:
            self.connection.ask(m.EndRebuild(kept))

    def release(self) -> None:
        """See `Place.release`."""
        self.connection.close()
