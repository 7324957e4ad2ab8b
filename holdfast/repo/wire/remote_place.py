"""A repository on another host, as the engine sees it: `Place` over one connection.

The password and the keys stay here: what goes over is the configuration as it stands in the repository, with its wrapped keys.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Final, Self

from holdfast.errors import UsageError
from holdfast.ids import RepositoryId
from holdfast.repo.folder import ReadConfig
from holdfast.repo.format.config import Config, decode_config, encode_config
from holdfast.repo.index import Index
from holdfast.repo.packs import PackStore
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.near import Connection, Further
from holdfast.repo.wire.reach import reach
from holdfast.repo.wire.remote_index import RemoteIndex
from holdfast.repo.wire.remote_store import RemotePackStore
from holdfast.repo.wire.stream import Stream
from holdfast.ssh.address import Place as FarAddress

__all__ = ["RemotePlace"]

_CONFIG_LOCK: Final = 1
_COLLECTING_LOCK: Final = 2
_STREAMS: Final = 4
_MOST_STREAMS: Final = 16
"""Each is a login, and two processes over there."""


def _further(far: FarAddress) -> Further:
    """How to get more streams: as many as `HOLDFAST_CONNECTIONS` says, or as do it good.

    Raises:
        UsageError: it says no number.
    """
    said = os.environ.get("HOLDFAST_CONNECTIONS", "")
    if not said:
        return Further(lambda: reach(far), _STREAMS, eager=False)
    if not (said.isascii() and said.isdecimal()):
        raise UsageError(f"HOLDFAST_CONNECTIONS is no number of connections: {said!r}")
    return Further(lambda: reach(far), _checked(int(said)), eager=True)


def _checked(streams: int) -> int:
    if not 1 <= streams <= _MOST_STREAMS:
        raise UsageError(f"{streams} connections to one host can not be: there may be 1 to {_MOST_STREAMS}")
    return streams


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
        self._opening: Future[m.Opened] | None = None
        self._index_opening: Future[m.Truth] | None = None

    @classmethod
    def opened(cls, stream: Stream, far: FarAddress, *, index: bool) -> Self:
        """The place at the end of a stream. It is being opened: one round trip for all.

        Args:
            index: have its index opened, too.

        Raises:
            LinkError: the far side does not greet.
        """
        first: list[m.Request[m.Opened] | m.Request[m.Truth]] = [m.Open(far.path)]
        if index:
            first.append(m.OpenIndex())
        connection = Connection(stream, str(far.address), first, further=_further(far))
        place = cls(connection, f"ssh://{far.address}{far.path}", far.path)
        place._opening, place._index_opening = (*connection.opening, None)[:2]
        return place

    @classmethod
    def reached(cls, far: FarAddress) -> Self:
        """The place at an address.

        Raises:
            LinkError: see `reach`.
        """
        further = _further(far)
        connection = Connection(reach(far), str(far.address), further=further)
        return cls(connection, f"ssh://{far.address}{far.path}", far.path)

    def use_streams(self, count: int) -> None:
        """See `Place.use_streams`."""
        self.connection.use_streams(_checked(count))

    def create(self, config: Config) -> None:
        """See `Place.create`."""
        self._opened = self.connection.ask(m.Create(self._folder, encode_config(config)))

    def _state(self, *, fresh: bool = False) -> m.Opened:
        if self._opened is None:
            opening, self._opening = self._opening, None
            self._opened = (opening or self.connection.begin(m.Open(self._folder))).result()
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
        self._index_opening = None  # the far side closes it for that
        return self.connection.ask(m.OwnIndex(needless is not None)).value

    def index_is_outside(self, repository: RepositoryId) -> bool:
        """See `Place.index_is_outside`."""
        del repository
        return self._state().outside

    def index_exists(self, repository: RepositoryId) -> bool:
        """See `Place.index_exists`."""
        del repository
        return self.connection.ask(m.IndexExists()).value

    def open_index(self, repository: RepositoryId) -> Index | None:
        """See `Place.open_index`."""
        del repository
        opening, self._index_opening = self._index_opening, None
        there = (opening or self.connection.begin(m.OpenIndex())).result().value
        return RemoteIndex(self.connection) if there else None

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
