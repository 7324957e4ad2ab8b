"""How hard to compress: as hard as the source's slowness leaves time for (`--compression auto`).

Each worker reports, per segment, how long it waited for the source and how long it computed. While most of
the time is waiting, a higher level costs nothing that anybody would notice; when computing takes over, the
level goes back. Levels above 9 are not used: they cost much and save little on disks.
"""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["LevelGovernor"]

_LADDER: Final = (1, 3, 6, 9)
_WINDOW_S: Final = 2.0
"""Decisions are made after this much worker time, so that one slow read does not decide."""
_RAISE_ABOVE: Final = 0.60
_LOWER_BELOW: Final = 0.25


class LevelGovernor:
    """Chooses the level of zstd from the share of time spent waiting. Thread-safe.

    Args:
        lowest: the level to begin with, and never to go below.
    """

    def __init__(self, lowest: int) -> None:
        self._ladder = (lowest, *(level for level in _LADDER if level > lowest))
        self._step = 0
        self._waited_s = 0.0
        self._worked_s = 0.0
        self._lock = threading.Lock()

    @property
    def level(self) -> int:
        """The level to use now."""
        return self._ladder[self._step]

    def note(self, waited_s: float, worked_s: float) -> None:
        """Takes in one segment's times and reconsiders the level once enough has gathered."""
        with self._lock:
            self._waited_s += waited_s
            self._worked_s += worked_s
            total_s = self._waited_s + self._worked_s
            if total_s < _WINDOW_S:
                return
            share = self._waited_s / total_s
            if share > _RAISE_ABOVE and self._step + 1 < len(self._ladder):
                self._step += 1
            elif share < _LOWER_BELOW and self._step:
                self._step -= 1
            self._waited_s = self._worked_s = 0.0
