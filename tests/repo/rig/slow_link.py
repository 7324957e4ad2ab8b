"""A slow link, as a program for HOLDFAST_RSH: runs the far command here, and delays what passes in each direction.

    python slow_link.py DELAY_MS RATE_BYTES LOG HOST COMMAND

RATE_BYTES of 0 is no limit. At the end, LOG tells the bytes that passed: to the far side and from it.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

_PIECE = 1 << 16
_MOST_UNDER_WAY = 512


class Wire:
    """One direction of a link: passes no more than `rate` bytes in a second (0: any number), whoever sends them."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_s = 0.0

    def passes_s(self, count: int) -> float:
        """When the last of so many bytes has passed."""
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(self._free_s, now_s) + (count / self._rate if self._rate else 0)
            return self._free_s


class OneWay:
    """Passes bytes on, each `delay_s` after it came, as fast as the wire takes them."""

    def __init__(self, source: int, sink: int, delay_s: float, wire: Wire) -> None:
        self.passed = 0
        self._source, self._sink, self._delay_s, self._wire = source, sink, delay_s, wire
        self._under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(_MOST_UNDER_WAY)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._take, self._give)]
        for thread in self.threads:
            thread.start()

    def _take(self) -> None:
        while True:
            try:
                data = os.read(self._source, _PIECE)
            except OSError:
                data = b""
            self._under_way.put((self._wire.passes_s(len(data)) + self._delay_s, data))
            if not data:
                return

    def _give(self) -> None:
        while True:
            when_s, data = self._under_way.get()
            time.sleep(max(0.0, when_s - time.monotonic()))
            if not data:
                os.close(self._sink)
                return
            self.passed += len(data)
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(self._sink, rest) :]
            except OSError:
                return


def main() -> int:
    delay_s, rate, log = int(sys.argv[1]) / 1000, int(sys.argv[2]), Path(sys.argv[3])
    far = subprocess.Popen(
        ["sh", "-c", sys.argv[5]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert far.stdin is not None
    assert far.stdout is not None
    there = OneWay(0, os.dup(far.stdin.fileno()), delay_s, Wire(rate))
    far.stdin.close()
    back = OneWay(far.stdout.fileno(), 1, delay_s, Wire(rate))
    back.threads[1].join()
    status = far.wait()
    log.write_text(f"{there.passed} {back.passed}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
