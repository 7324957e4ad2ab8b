"""Where the `holdfast` command begins and ends: one command in, one exit code out.

Nothing escapes from here: every exception becomes a sentence and an exit code (`failures`). `main` runs the
command in a process of its own under a supervisor; `run` does so in this process, for tests and programs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from holdfast.cli.failures import report
from holdfast.cli.invocation import Invocation

__all__ = ["main", "run"]

_M_TRIM_THRESHOLD: Final = -1  # malloc.h of the GNU C library
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 32 << 20


def main() -> int:
    """Runs the command that the process was started with; returns its exit code."""
    from holdfast.cli.supervise import supervise

    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy's linear algebra is not used; its threads would spin
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    return supervise(lambda: _tuned(arguments), json="--json" in arguments)


def _tuned(arguments: Sequence[str]) -> int:
    """Runs a command with the process set up for it: few collections, and freed memory kept for the next chunk."""
    import ctypes
    import gc

    gc.set_threshold(50_000, 20, 20)
    with contextlib.suppress(AttributeError, OSError):  # not every C library has it
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    code = run(arguments)
    gc.freeze()  # what is loaded goes with the process; looking through it for rubbish at the end takes longer
    return code


def run(arguments: Sequence[str]) -> int:
    """Runs one command in this process; returns its exit code, and raises nothing.

    Args:
        arguments: what follows the program's name.
    """
    invocation = Invocation(json="--json" in arguments)
    try:
        code = _run(list(arguments), invocation)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - this is the place where everything ends
        code = report(error, invocation)
        if isinstance(error, BrokenPipeError):
            _give_stdout_up()
    return code


def _run(arguments: list[str], invocation: Invocation) -> int:
    from holdfast.cli.app import app

    with app.make_context("holdfast", arguments, obj=invocation) as context:
        app.invoke(context)
    return invocation.exit_code


def _give_stdout_up() -> None:
    """Nobody reads it any more; the interpreter must not fail on it again when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
