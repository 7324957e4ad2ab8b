"""Where a repository is: what the engine needs of its place, be that a folder of this machine or one of another.

A place has the configuration, the locks, the packs and the index. `LocalPlace` is a folder here; `wire.remote_place` is one
over there. `place_of` chooses by the address, and is the only one who looks at it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from holdfast.ids import RepositoryId
from holdfast.repo.folder import ReadConfig, RepositoryFolder
from holdfast.repo.format.config import Config
from holdfast.repo.index import Index
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.packs import LocalPackStore, PackStore
from holdfast.repo.receipts import ReceiptFile

__all__ = ["LocalPlace", "Place", "place_of"]


class Place(Protocol):
    """See the module. Not thread-safe, but for its store and its index."""

    path: str
    """What the user calls it."""

    is_far: bool
    """Whether each question to it takes a round trip over a network."""

    store: PackStore

    def use_streams(self, count: int) -> None:
        """Moves data over so many streams to another host at once; nothing changes where it is this one.

        Raises:
            UsageError: there may not be so many.
        """
        ...

    def create(self, config: Config) -> None:
        """See `RepositoryFolder.create`."""
        ...

    def read_config(self) -> ReadConfig:
        """See `RepositoryFolder.read_config`."""
        ...

    def copies_agree(self) -> bool:
        """See `RepositoryFolder.copies_agree`."""
        ...

    def write_config(self, config: Config) -> None:
        """See `RepositoryFolder.write_config`."""
        ...

    def changing_config(self) -> AbstractContextManager[None]:
        """See `RepositoryFolder.changing_config`."""
        ...

    def collecting(self) -> AbstractContextManager[None]:
        """See `RepositoryFolder.collecting`."""
        ...

    def is_writable(self) -> bool:
        """See `RepositoryFolder.is_writable`."""
        ...

    def may_remove(self) -> bool:
        """Whether what is there may be changed and removed, too: a far side may let us only add, or only read."""
        ...

    def use_index(self) -> None:
        """See `RepositoryFolder.use_index`."""
        ...

    def own_index(self, needless: Callable[[], bool] = lambda: False) -> bool:
        """See `RepositoryFolder.own_index`. A place that is far asks only whether an index is there by now."""
        ...

    def index_is_outside(self, repository: RepositoryId) -> bool:
        """Whether the index lies outside of the repository, so that it may not know what other machines did."""
        ...

    def index_exists(self, repository: RepositoryId) -> bool:
        """Whether there is an index."""
        ...

    def open_index(self, repository: RepositoryId) -> Index | None:
        """Takes part in the use of the index as `use_index` does, and opens it; None if there is none."""
        ...

    def replacing_index(self, repository: RepositoryId) -> AbstractContextManager[Index]:
        """An empty index that takes the index's place if the block ends well. Within `own_index`."""
        ...

    def release(self) -> None:
        """Lets go of everything. May be called twice."""
        ...


class LocalPlace:
    """A folder of this machine.

    Args:
        clock: Unix seconds; tells when restore points are received.
    """

    is_far = False

    def __init__(self, folder: RepositoryFolder, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self.path = folder.path
        self.store: PackStore = LocalPackStore(folder.packs)
        self.create = folder.create
        self.read_config = folder.read_config
        self.copies_agree = folder.copies_agree
        self.write_config = folder.write_config
        self.changing_config = folder.changing_config
        self.collecting = folder.collecting
        self.is_writable = folder.is_writable
        self.use_index = folder.use_index
        self.own_index = folder.own_index

    def use_streams(self, count: int) -> None:
        """See `Place.use_streams`."""

    def index_is_outside(self, repository: RepositoryId) -> bool:
        """See `Place.index_is_outside`."""
        return self._folder.index_folder(repository)[1]

    def index_exists(self, repository: RepositoryId) -> bool:
        """See `Place.index_exists`."""
        return self._folder.index_exists(self._folder.index_folder(repository)[0])

    def may_remove(self) -> bool:
        """See `Place.may_remove`."""
        return self._folder.is_writable()

    def open_index(self, repository: RepositoryId, *, read_only: bool = False) -> Index | None:
        """See `Place.open_index`."""
        self._folder.use_index()
        path, outside = self._folder.index_folder(repository)
        if not self._folder.index_exists(path):
            return None
        writable = not read_only and (outside or self._folder.is_writable())
        receipts = self._receipts(repository) if writable else None
        return LmdbIndex(path, repository, read_only=not writable, receipts=receipts)

    def _receipts(self, repository: RepositoryId, *, rebuilding: bool = False) -> ReceiptFile:
        writable = self._folder.is_writable()
        return ReceiptFile(
            self._folder.packs, repository, self._clock, writable=writable, rebuilding=rebuilding
        )

    @contextlib.contextmanager
    def replacing_index(self, repository: RepositoryId) -> Iterator[Index]:
        """See `Place.replacing_index`."""
        path, _ = self._folder.index_folder(repository)
        with self._folder.replacing_index(path) as fresh:
            receipts = self._receipts(repository, rebuilding=True)
            index = LmdbIndex(fresh, repository, create=True, receipts=receipts)
            try:
                yield index
            finally:
                index.close()

    def release(self) -> None:
        """See `Place.release`."""
        self.store.close()
        self._folder.release()


def place_of(address: str) -> Place:
    """The place that an address names: a path, `ssh://user@host[:port]/path` or `host:port:/path`.

    Raises:
        UsageError: it names none.
        LinkError: the other host can not be reached, or has no Holdfast.
    """
    from holdfast.ssh.address import parse_place  # a far side, which needs the rest of this, has no addresses

    far = parse_place(address)
    if far is None:
        return LocalPlace(RepositoryFolder(address))
    from holdfast.repo.wire.remote_place import RemotePlace  # only those who need it pay for it

    return RemotePlace.reached(far)
