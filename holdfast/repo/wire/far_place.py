"""The far side's place: one repository for one connection, its configuration, its locks and its index.

What the near side does step by step with a repository of its own machine, it does here by the same steps. The locks are the
operating system's and belong to this process, so they end with the connection, however it ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from holdfast.errors import ProtocolError
from holdfast.repo.folder import RepositoryFolder
from holdfast.repo.format.config import MAX_CONFIG_BYTES, decode_config, encode_config
from holdfast.repo.index import Index
from holdfast.repo.place import LocalPlace
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.far_index import FarIndex
from holdfast.repo.wire.far_packs import FarPacks
from holdfast.repo.wire.proof import NoProofs, Proofs, RecordProofs
from holdfast.repo.wire.rights import Rights

__all__ = ["FarPlace", "Hosted"]

_CONFIG_LOCK: Final = 1
_COLLECTING_LOCK: Final = 2


@dataclass(slots=True)
class Hosted:
    """The parts of a repository that is open for a connection. What is None is not open yet."""

    packs: FarPacks | None = None
    index: FarIndex | None = None

    def require_packs(self) -> FarPacks:
        """Raises `ProtocolError` if no repository is open."""
        if self.packs is None:
            raise ProtocolError("no repository is open on this connection")
        return self.packs

    def require_index(self) -> FarIndex:
        """Raises `ProtocolError` if no index is open."""
        if self.index is None:
            raise ProtocolError("no index is open on this connection")
        return self.index

    def use_index(self, index: FarIndex | None) -> None:
        """What requests on the index are about from now on."""
        self.index = index
        if self.packs is not None:
            self.packs.index = None if index is None else index.index


class FarPlace:
    """See the module. Requests are handled one at a time.

    Args:
        clock: Unix seconds, of this side: nothing that a client says of time is believed.
    """

    def __init__(self, rights: Rights, clock: Callable[[], float] = time.time) -> None:
        self._rights = rights
        self._clock = clock
        self._place: LocalPlace | None = None
        self._proofs: Proofs = NoProofs()
        self._locks: dict[int, contextlib.ExitStack] = {}
        self._rebuilding: contextlib.ExitStack | None = None
        self._lock = threading.Lock()
        self.hosted = Hosted()
        self._handlers: dict[type[m.Message], Callable[[m.Message], m.Message]] = {
            m.Open: self._open,
            m.Create: self._create,
            m.ReadConfig: self._read_config,
            m.WriteConfig: self._write_config,
            m.Lock: self._take_lock,
            m.Unlock: self._let_go,
            m.UseIndex: self._use_index,
            m.OwnIndex: self._own_index,
            m.IndexExists: self._index_exists,
            m.OpenIndex: self._open_index,
            m.BeginRebuild: self._begin_rebuild,
            m.EndRebuild: self._end_rebuild,
        }

    def handles(self, request: m.Message) -> bool:
        """Whether a request is about the place."""
        return type(request) in self._handlers

    def handle(self, request: m.Message) -> m.Message:
        """The answer to any request about the place."""
        handler = self._handlers.get(type(request))
        if handler is None:
            raise ProtocolError("a message is not a request")
        with self._lock:
            return handler(request)

    # --- opening

    def _open(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.Open)
        self._require_unused()
        return self._opened(LocalPlace(RepositoryFolder(self._rights.path(request.path)), self._clock))

    def _create(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.Create)
        self._require_unused()
        if len(request.config) > MAX_CONFIG_BYTES:
            raise ProtocolError("the configuration is too long")
        place = LocalPlace(RepositoryFolder(self._rights.path(request.path)), self._clock)
        place.create(decode_config(request.config))
        return self._opened(place)

    def _require_unused(self) -> None:
        if self._place is not None:
            raise ProtocolError("a repository is open on this connection already")

    def _opened(self, place: LocalPlace) -> m.Opened:
        answer = self._state(place)
        config = decode_config(answer.config)
        self._place = place
        self._proofs = RecordProofs(config.id, place.store, strict=self._rights.append_only)
        self.hosted.packs = FarPacks(place.store, self._proofs, self._rights)
        return answer

    def _state(self, place: LocalPlace) -> m.Opened:
        read = place.read_config()
        return m.Opened(
            encode_config(read.config),
            read.warning,
            place.copies_agree(),
            place.is_writable() and not self._rights.read_only,
            place.index_is_outside(read.config.id),
        )

    def _required(self) -> LocalPlace:
        if self._place is None:
            raise ProtocolError("no repository is open on this connection")
        return self._place

    def _read_config(self, request: m.Message) -> m.Message:
        del request
        return self._state(self._required())

    def _write_config(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.WriteConfig)
        if _CONFIG_LOCK not in self._locks or len(request.config) > MAX_CONFIG_BYTES:
            raise ProtocolError("the configuration is changed only under its lock")
        place, config = self._required(), decode_config(request.config)
        if config.id != place.read_config().config.id:
            raise ProtocolError("that is the configuration of another repository")
        place.write_config(config)
        return m.Done()

    # --- locks

    def _take_lock(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.Lock)
        place = self._required()
        if request.which in self._locks or request.which not in (_CONFIG_LOCK, _COLLECTING_LOCK):
            raise ProtocolError("there is no such lock, or it is held already")
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                place.changing_config() if request.which == _CONFIG_LOCK else place.collecting()
            )
            self._locks[request.which] = stack.pop_all()
        return m.Done()

    def _let_go(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.Unlock)
        lock = self._locks.pop(request.which, None)
        if lock is not None:
            lock.close()
        return m.Done()

    # --- the index

    def _use_index(self, request: m.Message) -> m.Message:
        del request
        self._required().use_index()
        return m.Done()

    def _own_index(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.OwnIndex)
        place = self._required()
        self._close_index()
        if request.unless_there:
            repository = place.read_config().config.id
            return m.Truth(place.own_index(lambda: place.index_exists(repository)))
        return m.Truth(place.own_index())

    def _index_exists(self, request: m.Message) -> m.Message:
        del request
        place = self._required()
        return m.Truth(place.index_exists(place.read_config().config.id))

    def _open_index(self, request: m.Message) -> m.Message:
        del request
        place = self._required()
        if self._rebuilding is not None:
            raise ProtocolError("the index is being rebuilt")
        self._close_index()
        index = place.open_index(place.read_config().config.id, read_only=self._rights.read_only)
        if index is not None:
            self.hosted.use_index(FarIndex(index, self._proofs, self._rights, self._clock))
        return m.Truth(index is not None)

    def _close_index(self) -> None:
        found = self.hosted.index
        self.hosted.use_index(None)
        if found is not None:
            found.index.close()

    def _begin_rebuild(self, request: m.Message) -> m.Message:
        del request
        place = self._required()
        if self._rebuilding is not None:
            raise ProtocolError("the index is being rebuilt already")
        self._close_index()
        with contextlib.ExitStack() as stack:
            index: Index = stack.enter_context(place.replacing_index(place.read_config().config.id))
            self._rebuilding = stack.pop_all()
        self.hosted.use_index(FarIndex(index, NoProofs(), self._rights, self._clock))
        return m.Done()

    def _end_rebuild(self, request: m.Message) -> m.Message:
        assert isinstance(request, m.EndRebuild)
        stack, self._rebuilding = self._rebuilding, None
        if stack is None:
            raise ProtocolError("no index is being rebuilt")
        self.hosted.use_index(None)
        if request.keep:
            stack.close()
        else:
            _abandon(stack)
        return m.Done()

    def close(self) -> None:
        """Lets go of everything."""
        with self._lock:
            if self._rebuilding is not None:
                self.hosted.use_index(None)
                _abandon(self._rebuilding)
                self._rebuilding = None
            if self.hosted.packs is not None:
                self.hosted.packs.close()  # it may have something to commit
            self._close_index()
            for lock in self._locks.values():
                lock.close()
            self._locks.clear()
            if self._place is not None:
                self._place.release()


class _Abandoned(Exception):
    """Ends a block that is not to be finished."""


def _abandon(stack: contextlib.ExitStack) -> None:
    with contextlib.suppress(_Abandoned), stack:
        raise _Abandoned
