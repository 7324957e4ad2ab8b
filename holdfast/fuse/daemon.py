"""A process that goes on in the background once its work has begun well, and whose failure to begin is told.

The caller forks. The child begins its work and reports through a pipe: that it is ready, or what went wrong; a child
that ends without a word has crashed. Only then does the caller go on, so that its exit code says what became of it.

Nothing that must not cross a fork (an index, a thread) may be open in the caller.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

from holdfast.errors import HoldfastError, InternalError

__all__ = ["run_in_background"]

_MOST_REPORT_BYTES: Final = 64 << 10


def run_in_background(work: Callable[[Callable[[], None]], None]) -> None:
    """Runs `work` in a process of its own, and returns when it says that it is ready.

    In the child this never returns: its process ends with `work`.

    Args:
        work: receives a function to be called, from any thread, when it is ready. Its output is closed then.

    Raises:
        HoldfastError: what the child reported; with the same exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_begin(work, writing))
    os.close(writing)
    try:
        report = _read_all(reading)
    except BaseException:
        os.kill(child, signal.SIGTERM)
        raise
    finally:
        os.close(reading)
    if report == b"{}":
        return
    _, status = os.waitpid(child, 0)
    if not report:
        raise InternalError(
            f"the process in the background ended before it was ready ({_how(os.waitstatus_to_exitcode(status))})"
        )
    told = json.loads(report)
    error = HoldfastError(told["message"], hint=told["hint"])
    error.exit_code = told["code"]
    raise error


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _read_all(fd: int) -> bytes:
    found = b""
    while data := os.read(fd, _MOST_REPORT_BYTES):
        found += data
        if len(found) > _MOST_REPORT_BYTES:
            break
    return found


def _begin(work: Callable[[Callable[[], None]], None], writing: int) -> int:
    told = False

    def tell(report: bytes) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writing, report)
            os.close(writing)

    def ready() -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        os.close(nothing)
        tell(b"{}")

    try:
        os.setsid()
        os.chdir("/")
        work(ready)
    except HoldfastError as error:
        code = error.exit_code
        tell(json.dumps({"code": code, "message": error.message, "hint": error.hint}).encode())
        return code
    except BaseException as error:  # noqa: BLE001 - this is where the process ends
        internal = InternalError(f"{type(error).__name__}: {error}")
        tell(json.dumps({"code": 1, "message": internal.message, "hint": internal.hint}).encode())
        return 1
    tell(b"")
    return 0
