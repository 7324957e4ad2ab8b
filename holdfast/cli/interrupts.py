"""Telling those who wait that the user wants to stop, before the threads are waited for.

Ctrl-C interrupts the main thread, which then waits for the threads that work for it. One of them may be waiting for a host to come back.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

__all__ = ["on_interrupt"]

_REQUESTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Has `act` called at each request to stop, before what is done about it otherwise.

    Args:
        act: runs in a signal's handler: it takes no lock and raises nothing.
    """
    with contextlib.ExitStack() as stack:
        for number in _REQUESTS:
            before = signal.getsignal(number)
            if not callable(before):
                continue

            def handle(
                number: int,
                frame: FrameType | None,
                before: Callable[[int, FrameType | None], object] = before,
            ) -> None:
                act()
                before(number, frame)

            with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
                signal.signal(number, handle)
                stack.callback(signal.signal, number, before)
        yield
