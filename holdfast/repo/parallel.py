"""Work on all cores: threads that take tasks from one iterator.

The heavy calls of the engine (numpy, BLAKE3, zstd, reads, writes) release the interpreter lock, so threads
use all cores as long as each task is large: whole segments, whole packs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["run_parallel", "usable_cores"]

T = TypeVar("T")
_TICK_S = 0.2
_JUDGED_S = 0.5
_WAITED_S = 0.15
_IDLE_BELOW = 0.6


def usable_cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def _machine_idle_s() -> float:
    """Seconds that all processors of this machine together have had nothing to do; infinite where nobody tells."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = file.readline().split()
        return (int(ticks[4]) + int(ticks[5])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for disks
    except (OSError, ValueError, IndexError):
        return float("inf")


class _Cores:
    """Whether the cores have much of their time left: this process does not use it, and no other one does.

    Args:
        judged_s: how much time has to be looked at.
    """

    def __init__(self, judged_s: float) -> None:
        self._judged_s = judged_s
        self._wall_s, self._cpu_s = time.monotonic(), time.process_time()
        self._idle_s = _machine_idle_s()

    def are_idle(self) -> bool:
        """Whether they were, since it was asked last; False if that was only a moment ago."""
        wall_s, cpu_s = time.monotonic(), time.process_time()
        if wall_s - self._wall_s < self._judged_s:
            return False
        idle_s = _machine_idle_s()
        whole_s = (wall_s - self._wall_s) * usable_cores()
        used_s, spare_s = cpu_s - self._cpu_s, idle_s - self._idle_s
        self._wall_s, self._cpu_s, self._idle_s = wall_s, cpu_s, idle_s
        return used_s < _IDLE_BELOW * whole_s and not spare_s < (1 - _IDLE_BELOW) * whole_s


def run_parallel(
    tasks: Iterator[T],
    work: Callable[[T], None],
    workers: int | None,
    tick: Callable[[], None] = lambda: None,
    waiting: int = 0,
) -> None:
    """Calls `work` for every task; returns when all are done.

    The iterator is advanced under a lock, by whichever thread is free. The calling thread only waits and
    calls `tick` five times a second, so Ctrl-C is answered at once: running tasks are finished, no new
    one is begun.

    Args:
        workers: how many threads; None for one per core, and one more as soon as they are seen to wait for
            disks. (More threads than cores cost time where nobody waits: they fight for the interpreter lock.)
        waiting: so many more, likewise, but sooner: where workers wait for answers over a network.

    Raises:
        whatever `work`, the iterator or `tick` raised first.
    """
    lock = threading.Lock()
    failures: list[BaseException] = []
    stop = threading.Event()

    def take() -> None:
        while not stop.is_set():
            try:
                with lock:
                    task = next(tasks)
            except StopIteration:
                return
            except BaseException as error:  # noqa: BLE001 - raised again by the caller
                failures.append(error)
                stop.set()
                return
            try:
                work(task)
            except BaseException as error:  # noqa: BLE001 - raised again by the caller
                failures.append(error)
                stop.set()
                return

    threads: list[threading.Thread] = []

    def start() -> None:
        name = f"holdfast-worker-{len(threads)}"
        threads.append(threading.Thread(target=take, name=name, daemon=True))
        threads[-1].start()

    spare = 0 if workers else 1 + waiting
    cores = _Cores(_WAITED_S if waiting else _JUDGED_S)
    for _ in range(workers or usable_cores()):
        start()
    try:
        for thread in threads:  # one that is started meanwhile is waited for, too
            while thread.is_alive():
                thread.join(_TICK_S)
                tick()
                if spare and cores.are_idle():
                    spare -= 1
                    start()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
