"""Restore points that are kept from collection while somebody reads them: one session for each, one thread for all.

For processes that stay (mounts): points are held and let go of at any time, from several threads, and a point that
is held by many is one session. A hold outlives its last user by a moment, so that a program that opens and closes
files all the time does not write to the index each time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from holdfast.errors import HoldfastError, StorageError
from holdfast.ids import PointId, SessionId
from holdfast.repo.index import Index
from holdfast.repo.lease import SESSION_LIFETIME_S, new_session_row

__all__ = ["Holds"]

_HEARTBEAT_S: Final = 60
_LINGER_S: Final = 5


@dataclass(slots=True)
class _Held:
    """A point that is held.

    Args:
        session: None if it could not be recorded.
        idle_since_s: of the monotonic clock; None while somebody uses it.
    """

    session: SessionId | None
    users: int
    idle_since_s: float | None = None


class Holds:
    """See the module. Thread-safe.

    Args:
        kind: of the sessions.
        clock: Unix seconds.
        monotonic: seconds that never go back.
        notify: hears once of each cause why points can not be protected.
        protect: False where nothing can be written to the repository: nothing is recorded then.
    """

    def __init__(
        self,
        index: Index,
        kind: str,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        notify: Callable[[str], None],
        *,
        protect: bool,
    ) -> None:
        self._index = index
        self._kind = kind
        self._clock = clock
        self._monotonic = monotonic
        self._notify = notify
        self._protect = protect
        self._held: dict[PointId, _Held] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def take(self, point: PointId) -> None:
        """Keeps a point until `release`.

        Durability: recorded on return. Where that is not possible, the point can be read all the same, and is as
        safe as one that nobody reads.

        Raises:
            PointNotFound: it does not exist any more, or is forgotten.
        """
        with self._lock:
            held = self._held.get(point)
            if held is None:
                held = self._held[point] = _Held(self._begin(point), 0)
            held.users += 1
            held.idle_since_s = None

    def _begin(self, point: PointId) -> SessionId | None:
        if not self._protect:
            return None
        now = int(self._clock())
        row = new_session_row(self._kind, now, (point,))
        try:
            self._index.begin_session(row, now - SESSION_LIFETIME_S)
        except StorageError as error:
            self._tell(error)
            return None
        return row.id

    def release(self, point: PointId) -> None:
        """Ends one `take`."""
        with self._lock:
            held = self._held[point]
            held.users -= 1
            if not held.users:
                held.idle_since_s = self._monotonic()

    def tend(self, *, heartbeat: bool) -> None:
        """Lets go of what nobody has used for a moment; with `heartbeat`, renews the others."""
        now_s = self._monotonic()
        with self._lock:
            idle = [
                point
                for point, held in self._held.items()
                if held.idle_since_s is not None and now_s - held.idle_since_s >= _LINGER_S
            ]
            ended = [self._held.pop(point).session for point in idle]
            renewed = [held.session for held in self._held.values()] if heartbeat else []
        for session in ended:
            self._end(session)
        for session in renewed:
            if session is not None:
                try:
                    self._index.heartbeat(session, int(self._clock()))
                except HoldfastError as error:
                    self._tell(error)

    def work(self, over: threading.Event) -> None:
        """Tends until `over`: the body of a thread."""
        next_beat_s = self._monotonic() + _HEARTBEAT_S
        while not over.wait(_LINGER_S):
            beat = self._monotonic() >= next_beat_s
            if beat:
                next_beat_s += _HEARTBEAT_S
            self.tend(heartbeat=beat)

    def close(self) -> None:
        """Ends all sessions."""
        with self._lock:
            sessions = [held.session for held in self._held.values()]
            self._held.clear()
        for session in sessions:
            self._end(session)

    def _end(self, session: SessionId | None) -> None:
        if session is not None:
            with contextlib.suppress(StorageError):  # it expires
                self._index.end_session(session)

    def _tell(self, error: HoldfastError) -> None:
        if error.message not in self._told:
            self._told.add(error.message)
            self._notify(f"what is read can not be protected from garbage collection: {error.message}")
