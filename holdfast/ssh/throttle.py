"""A rate limit that any number of channels share (`--max-rate`).

Who wants to send reserves the next piece of time in which its bytes fit, and waits until it begins. So the sum over
all threads keeps to the rate without anyone being starved, and nobody holds the lock while waiting. Up to
`BURST_S` of unused time is made up for, so that a pause of the disk does not cost throughput.

On the receiving side a throttle works by being slow to read: SSH's own window then holds the sender.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["BURST_S", "Throttle"]

BURST_S: Final = 0.1
_LARGEST_PIECE_BYTES: Final = 1 << 18
_SMALLEST_PIECE_BYTES: Final = 1 << 10


class Throttle:
    """Lets through `rate` bytes per second on average.

    Args:
        rate: bytes per second, at least 1.
        clock: seconds that only grow.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        rate: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert rate > 0
        self.rate: Final = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at_s = clock()

    @property
    def piece_bytes(self) -> int:
        """How much to take at a time, at most: what passes in a twentieth of a second."""
        return max(_SMALLEST_PIECE_BYTES, min(_LARGEST_PIECE_BYTES, self.rate // 20))

    def take(self, count: int) -> None:
        """Returns when `count` bytes may pass."""
        with self._lock:
            now_s = self._clock()
            begins_s = max(self._free_at_s, now_s - BURST_S)
            self._free_at_s = begins_s + count / self.rate
        if begins_s > now_s:
            self._sleep(begins_s - now_s)
