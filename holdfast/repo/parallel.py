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
_IDLE_BELOW = 0.6


def usable_cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0))


class _Cores:
    """Whether the cores have much of their time left."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.monotonic(), time.process_time()

    def are_idle(self) -> bool:
        """Whether they were, since it was asked last; False if that was only a moment ago."""
        wall_s, cpu_s = time.monotonic(), time.process_time()
        if wall_s - self._wall_s < _JUDGED_S:
            return False
        share = (cpu_s - self._cpu_s) / (wall_s - self._wall_s) / usable_cores()
        self._wall_s, self._cpu_s = wall_s, cpu_s
        return share < _IDLE_BELOW


def run_parallel(
    tasks: Iterator[T],
    work: Callable[[T], None],
    workers: int | None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Calls `work` for every task; returns when all are done.

    The iterator is advanced under a lock, by whichever thread is free. The calling thread only waits and
    calls `tick` five times a second, so Ctrl-C is answered at once: running tasks are finished, no new
    one is begun.

    Args:
        workers: how many threads; None for one per core, and one more as soon as they are seen to wait for
            disks. (More threads than cores cost time where nobody waits: they fight for the interpreter lock.)

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

    spare = 0 if workers else 1
    cores = _Cores()
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
