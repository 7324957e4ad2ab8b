"""A session's sign of life: its row in the index, renewed by a thread until the work is over.

Backups, restores and mounts hold what they read or build upon this way; garbage collection takes
everything that a living session holds as live (FORMAT.md, "Sessions").
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Final

from holdfast.errors import HoldfastError
from holdfast.ids import PointId, SessionId
from holdfast.repo.format.rows import SessionRow
from holdfast.repo.index import Index

__all__ = ["SESSION_LIFETIME_S", "Lease", "new_session_row"]

SESSION_LIFETIME_S: Final = 72 * 3600
"""A session without a sign of life for this long is dropped: time enough for an interrupted nightly backup
to be followed by the next one."""
_HEARTBEAT_S: Final = 60


def new_session_row(kind: str, now: int, holds: tuple[PointId, ...] = ()) -> SessionRow:
    """A session of this process."""
    return SessionRow(SessionId(os.urandom(16)), kind, socket.gethostname(), os.getpid(), now, now, holds)


class Lease:
    """Keeps one session alive.

    Args:
        clock: Unix seconds.
        on_lost: called once, from the renewing thread, when the session can not be renewed.
    """

    def __init__(
        self,
        index: Index,
        row: SessionRow,
        clock: Callable[[], float],
        on_lost: Callable[[HoldfastError], None] = lambda _error: None,
    ) -> None:
        self.row = row
        self._index = index
        self._clock = clock
        self._on_lost = on_lost
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> int:
        """Records the session, drops those that have expired, and starts renewing.

        Returns:
            How many other sessions of its kind there were.

        Raises:
            PointNotFound: a point that it should hold is gone.
        """
        others = self._index.begin_session(self.row, int(self._clock()) - SESSION_LIFETIME_S)
        self._thread = threading.Thread(target=self._renew, name="holdfast-heartbeat", daemon=True)
        self._thread.start()
        return others

    def _renew(self) -> None:
        while not self._over.wait(_HEARTBEAT_S):
            try:
                self._index.heartbeat(self.row.id, int(self._clock()))
            except HoldfastError as error:
                self._on_lost(error)
                return

    def stop(self) -> None:
        """Stops renewing; the session stays until it expires."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def end(self) -> None:
        """Stops renewing and drops the session."""
        self.stop()
        self._index.end_session(self.row.id)
