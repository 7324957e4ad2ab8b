"""A guest that writes: random pieces at random places of its VM's disks, at a given rate, for as long as the VM runs.

It writes through whatever the VM runs on, flat file or redo log, under the VM's lock, a piece at a time: so a snapshot falls
between two writes, and the disk at that moment is known byte for byte (references, or a replay of the log over the state
before). Data follows from the seed and the write's number.
"""

from __future__ import annotations

import json
import random
import threading
import time

from tests.esxi_host.redo import SECTOR
from tests.esxi_host.vms import Vm


class Guest:
    """One writing guest.

    Args:
        rate_bytes: per second; 0 for as fast as it goes.
        span_bytes: it writes to the first that many bytes of each disk; 0 for all of it.
        log: a file that gets a line of JSON for each write and each snapshot.
    """

    def __init__(self, vm: Vm, *, rate_bytes: float, seed: int, span_bytes: int, log: str | None) -> None:
        self._vm = vm
        self._rate_bytes = rate_bytes
        self._seed = seed
        self._span_bytes = span_bytes
        self._log = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115 (closed by stop)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"guest-{vm.vmid}", daemon=True)
        self.writes = 0
        self.written_bytes = 0
        self.error: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self._log is not None:
            self._log.close()

    def mark(self, snapshot: int) -> None:
        """A snapshot was taken now; the VM's lock is held."""
        self._note({"time": time.time(), "snapshot": snapshot})

    def _note(self, line: dict[str, object]) -> None:
        if self._log is not None:
            self._log.write(json.dumps(line) + "\n")

    def _run(self) -> None:
        began_s = time.monotonic()
        while not self._stopping.is_set():
            with self._vm.lock:
                written = self._write() if self._vm.chains else 0
            self.written_bytes += written
            if not written:
                self._stopping.wait(0.02)
            elif self._rate_bytes:
                ahead_s = self.written_bytes / self._rate_bytes - (time.monotonic() - began_s)
                if ahead_s > 0:
                    self._stopping.wait(ahead_s)
                elif ahead_s < -1:  # the VM stood still; the time is not made up for
                    began_s = time.monotonic() - self.written_bytes / self._rate_bytes

    def _write(self) -> int:
        rng = random.Random(self._seed << 32 | self.writes)
        node = rng.choice(sorted(self._vm.chains))
        chain = self._vm.chains[node]
        span = min(self._span_bytes or chain.size_bytes, chain.size_bytes) // SECTOR
        sectors = min(span, rng.choice([1, 8, 8, 8, 16, 64, 128]))
        offset = rng.randrange(span - sectors + 1)
        if sectors >= 8 and rng.random() < 0.9:
            offset -= offset % 8  # file systems keep to their blocks, mostly
        place, length = offset * SECTOR, sectors * SECTOR
        discard = rng.random() < 0.05
        try:
            if discard:
                chain.discard(place, length)
            else:
                chain.write(place, rng.randbytes(length))
        except OSError as error:
            self.error = str(error)
            return 0
        line: dict[str, object] = {"time": time.time(), "node": node, "offset": place, "length": length}
        self._note(line | {"write": self.writes, "zeros": discard})
        self.writes += 1
        return length
