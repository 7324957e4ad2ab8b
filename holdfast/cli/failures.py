"""The end of a command that did not go well: what the user is told, and the exit code.

A sentence on stderr, and a hint below it where there is one; with `--json` one JSON object instead. A
traceback only with HOLDFAST_DEBUG=1.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final

from holdfast.errors import EXIT_INTERRUPTED, HoldfastError, InternalError, UsageError, storage_error

if TYPE_CHECKING:
    from holdfast.cli.invocation import Invocation
    from holdfast.cli.output import Json

__all__ = ["EXIT_BROKEN_PIPE", "debugging", "explained", "failure_record", "print_failure", "report"]

EXIT_BROKEN_PIPE: Final = 141
"""What a shell reports of a program that SIGPIPE ended; no failure of ours."""


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("HOLDFAST_DEBUG", "") not in ("", "0")


def report(error: BaseException, invocation: Invocation) -> int:
    """Tells the user what ended the command; returns the exit code."""
    if debugging() and not isinstance(error, BrokenPipeError | SystemExit):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    code, message, hint = explained(error, invocation)
    if message:
        print_failure(message, code, hint, json=invocation.json, log=invocation.log_path)
    return code


def explained(error: BaseException, invocation: Invocation) -> tuple[int, str, str]:
    """The exit code, the sentence and the hint of what ended a command; no sentence if nothing is to be said."""
    if isinstance(error, HoldfastError):
        return error.exit_code, error.message, error.hint
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted", invocation.if_interrupted
    if isinstance(error, OSError):
        place = f"using {error.filename}" if isinstance(error.filename, str) else "running the command"
        translated = storage_error(error, place)
        return translated.exit_code, translated.message, translated.hint
    if isinstance(error, MemoryError):
        return 1, "there is not enough memory", "close other programs, or use fewer --workers"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 1), "", ""
    explained = _of_click(error, invocation)
    if explained is not None:
        return explained
    internal = InternalError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    return internal.exit_code, internal.message, f"{internal.hint} (HOLDFAST_DEBUG=1 shows where it happened)"


def _of_click(error: BaseException, invocation: Invocation) -> tuple[int, str, str] | None:
    """What an exception of the library that reads the command line means."""
    if not type(error).__module__.startswith("click"):
        return None
    import click

    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, "", ""
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and invocation.json:
        return UsageError.exit_code, "no command was given", "'holdfast --help' lists the commands"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        with contextlib.suppress(BrokenPipeError):
            print(error.ctx.get_help() if error.ctx else error.format_message(), file=sys.stderr)
        return UsageError.exit_code, "", ""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "holdfast"
        message = error.format_message().rstrip(".")
        return (
            UsageError.exit_code,
            message[:1].lower() + message[1:],
            f"'{command} --help' shows what is possible",
        )
    if isinstance(error, click.ClickException):
        return UsageError.exit_code, error.format_message(), ""
    if isinstance(error, click.Abort):
        return EXIT_INTERRUPTED, "interrupted", ""
    return None


def failure_record(message: str, code: int, hint: str, log: str = "") -> dict[str, Json]:
    """A failure for programs. What has no log says nothing of one."""
    record: dict[str, Json] = {"type": "error", "code": code, "message": message, "hint": hint}
    return record | {"log": log} if log else record


def print_failure(message: str, code: int, hint: str, *, json: bool, log: str = "") -> None:
    """Puts a failure on stderr.

    Args:
        log: path of the log of the run that failed; empty if it has none.
    """
    from holdfast.cli.output import as_json, shown

    if json:
        text = as_json(failure_record(message, code, hint, log))
    else:
        # behind the ^C that a terminal shows
        before = "\n" if code == EXIT_INTERRUPTED and sys.stderr is not None and sys.stderr.isatty() else ""
        text = f"{before}holdfast: {shown(message)}" + (f"\n  hint: {shown(hint)}" if hint else "")
        text += f"\n  log: {shown(log)}" if log else ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)
