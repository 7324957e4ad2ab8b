"""Work on all cores: threads that take tasks from one iterator.

The heavy calls of the engine (numpy, BLAKE3, zstd, reads, writes) release the interpreter lock, so threads
use all cores as long as each task is large: whole segments, whole packs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["default_workers", "run_parallel"]

T = TypeVar("T")
_TICK_S = 0.2


def default_workers() -> int:
    """One thread per usable core, and one more that reads while the others compute."""
    return len(os.sched_getaffinity(0)) + 1


def run_parallel(
    tasks: Iterator[T],
    work: Callable[[T], None],
    workers: int,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Calls `work` for every task; returns when all are done.

    The iterator is advanced under a lock, by whichever thread is free. The calling thread only waits and
    calls `tick` five times a second, so Ctrl-C is answered at once: running tasks are finished, no new
    one is begun.

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

    threads = [
        threading.Thread(target=take, name=f"holdfast-worker-{n}", daemon=True) for n in range(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK_S)
                tick()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
