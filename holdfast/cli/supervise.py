"""A command runs in a process of its own, so that there is always somebody left to say how it ended.

The index is a memory-mapped file that a C library reads. If it is damaged, or its disk fails under it, the
kernel may end the process by a signal that no Python code sees. The parent sees it, and says what it means.

Invariants: the parent forks before anything heavy is imported, does nothing but wait and pass signals on, and
never ends before the child; if it is killed, the child is killed with it by the kernel.

Who signals the whole process group reaches both processes, and the parent passes on what it gets: the child may
see one request twice. So the first signal interrupts the command, others within a second are the same request, and
one that comes later ends it at once. A Ctrl-C at the terminal is not passed on: the child has got it already.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

from holdfast.cli.failures import debugging, print_failure
from holdfast.errors import EXIT_INTERRUPTED, DamagedIndex

__all__ = ["supervise"]

_REQUESTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAULTS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_SAME_REQUEST_S: Final = 1.0


def supervise(command: Callable[[], int], *, json: bool) -> int:
    """Runs `command` in a child process; returns its exit code, in the child as well as in the parent.

    Args:
        json: how a sudden end of the child is reported.
    """
    parent = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    passed_on = {s for s in _REQUESTS if signal.getsignal(s) is not signal.SIG_IGN} | {signal.SIGUSR1}
    waited_for = passed_on | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = os.fork()
    if child == 0:
        _die_with(parent)
        interrupt = _Interrupt()
        for number in passed_on - {signal.SIGUSR1}:
            signal.signal(number, interrupt)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if debugging():
            import faulthandler

            faulthandler.enable()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, waited_for)
            code = command()
        except KeyboardInterrupt:  # outside of what the command itself catches
            code = EXIT_INTERRUPTED
        # The end is decided: a late copy of a request must not kill the interpreter while it shuts down.
        interrupt.over = True
        for number in passed_on:
            signal.signal(number, signal.SIG_IGN)
        return code
    return _outcome(_wait(child, waited_for), json=json)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, whatever ends it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


class _Interrupt:
    """The child's answer to a request to stop."""

    def __init__(self) -> None:
        self._first_s: float | None = None
        self.over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        now_s = time.monotonic()
        if self.over:
            return
        if self._first_s is None:
            self._first_s = now_s
            raise KeyboardInterrupt
        if now_s - self._first_s > _SAME_REQUEST_S:
            os.write(2, b"holdfast: stopped at once; unfinished files may have been left behind\n")
            os._exit(EXIT_INTERRUPTED)


def _wait(child: int, waited_for: set[signal.Signals]) -> int:
    """Waits for the child and passes signals on to it; returns its status as `waitpid` gives it."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        received = signal.sigwaitinfo(waited_for)
        typed = received.si_signo == signal.SIGINT and received.si_code > 0
        if received.si_signo != signal.SIGCHLD and not typed:  # what is typed at the terminal reaches both
            os.kill(child, received.si_signo)


def _outcome(status: int, *, json: bool) -> int:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in _FAULTS:
        error = DamagedIndex(f"the command crashed ({name}): most likely the repository's index is damaged")
        print_failure(error.message, error.exit_code, error.hint, json=json)
        return error.exit_code
    if number == signal.SIGKILL:
        hint = "if nobody did that, the system ran out of memory: use fewer --workers; what is listed was not harmed"
    else:
        hint = ""
    print_failure(f"the command was killed ({name})", 128 + number, hint, json=json)
    return 128 + number


if sys.platform != "linux":  # pragma: no cover
    raise ImportError("Holdfast runs on Linux")
