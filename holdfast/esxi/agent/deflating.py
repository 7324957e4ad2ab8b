# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""Whether data is deflated before it is sent.

Deflating takes more of the host's processors than all else that the agent does. It is worth that where the connection
is the slower one of the two; where all workers together deflate slower than the connection takes bytes, data is sent as
it is. Both rates are measured all the time, from what is done anyway, and a few records are deflated to keep them true.
"""

import threading
import time
import zlib
from typing import Any, Optional, Tuple

from holdfast.esxi.agent import frames

_ENOUGH_BYTES = 1 << 20
_MEMORY_S = 2.0
_SAMPLE_EVERY = 32
_PROBE_BYTES = 4096


class Rate(object):
    """Bytes per second of something that is done now and then; what is long ago counts less and less."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0.0
        self._seconds = 0.0

    def note(self, count: int, seconds: float) -> None:
        """Says that so many bytes took so long."""
        with self._lock:
            self._bytes += count
            self._seconds += seconds
            if self._seconds > _MEMORY_S:
                self._bytes /= 2
                self._seconds /= 2

    def per_s(self) -> Optional[float]:
        """The rate; None as long as too little was seen of it."""
        with self._lock:
            if self._bytes < _ENOUGH_BYTES:
                return None
            return self._bytes / max(self._seconds, 1e-6)


class Deflator(object):
    """Makes of data what is sent. Threads share it.

    Args:
        link: how fast the connection takes bytes.
        workers: how many threads deflate at the same time.
    """

    def __init__(self, link: Rate, workers: int) -> None:
        self._link = link
        self._workers = workers
        self._deflating = Rate()
        self._count = 0

    def stored(self, view: memoryview, codec: int) -> Tuple[int, bytes]:
        """Codec and bytes of data as it is sent.

        Args:
            codec: RAW: as it is; ZLIB: deflated if that makes it smaller; AUTO: the same, if it is worth the time.
        """
        if codec == frames.RAW or (codec == frames.AUTO and not self._is_worth_it()):
            return frames.RAW, bytes(view)
        began = time.monotonic()
        middle = len(view) // 2
        sample = view[middle : middle + _PROBE_BYTES]
        if len(view) > 2 * _PROBE_BYTES and len(zlib.compress(sample, 1)) >= _PROBE_BYTES * 9 // 10:
            return frames.RAW, bytes(view)
        small = zlib.compress(view, 1)
        self._deflating.note(len(view), time.monotonic() - began)
        if len(small) < len(view) * 19 // 20:
            return frames.ZLIB, small
        return frames.RAW, bytes(view)

    def _is_worth_it(self) -> bool:
        self._count += 1
        link, deflating = self._link.per_s(), self._deflating.per_s()  # type: Any, Any
        if link is None or deflating is None or self._count % _SAMPLE_EVERY == 0:
            return True
        return bool(self._workers * deflating > link)
