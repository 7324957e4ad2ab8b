"""A log of each run on a host: what was done and when, for whoever has to find out later what happened.

    20261126T021500Z-backup-esx1-web1.log    a line for each event: time (UTC), kind, sentence

Kinds are `note`, `warning` and `error`. What the user is told is in it, too, and what only matters afterwards: versions, how each disk is
read, the snapshot's name and id.

Invariants: a run does not fail, nor end with another exit code, because its log can not be written. No byte of a disk and no secret gets in.
A log has at most `MAX_LOG_BYTES` and some lines, a folder at most `MAX_LOGS`; only files with such names are ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import threading
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from holdfast.cli.failures import explained
from holdfast.cli.output import notice, shown
from holdfast.errors import EXIT_WARNINGS
from holdfast.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.cli.invocation import Invocation

__all__ = ["MAX_LOGS", "MAX_LOG_BYTES", "Kind", "RunLog", "logged"]

MAX_LOGS: Final = 1000
MAX_LOG_BYTES: Final = 4 << 20
_MAX_WORD_BYTES: Final = 80
_MOST_ALIKE: Final = 100
_NAME: Final = re.compile(r"\d{8}T\d{6}Z-(backup|restore)-.+\.log\Z")

Kind: TypeAlias = Literal["note", "warning", "error"]


class RunLog:
    """The log of one run. Threads may share it.

    Attributes:
        path: where it is; empty if there is none.
        warnings: how many were taken down.

    Args:
        path: a file that was made for it.
        descriptor: of that file, which is closed by `close`.
    """

    def __init__(self, path: str = "", descriptor: int | None = None) -> None:
        self.path: Final = path
        self.warnings = 0
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._left_bytes = MAX_LOG_BYTES

    @classmethod
    def create(cls, folder: str, doing: str, place: str) -> RunLog:
        """A new log, whose name begins with the time; the oldest ones are removed.

        Args:
            doing: `backup` or `restore`.
            place: host and VM, as parts of the name.

        Raises:
            OSError: it can not be made.
        """
        os.makedirs(folder, mode=0o700, exist_ok=True)
        _remove_oldest(folder)
        begin = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{doing}-{_word(place)}"
        for number in range(1, _MOST_ALIKE + 1):
            path = os.path.join(folder, f"{begin}{'' if number == 1 else f'.{number}'}.log")
            with contextlib.suppress(FileExistsError):
                return cls(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), begin)

    def note(self, text: str, kind: Kind = "note") -> None:
        """Takes a sentence down. Does nothing after `close`, and gives up on a file that can not be written any more."""
        now_s = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now_s))}.{int(now_s * 1000) % 1000:03d}Z"
        line = f"{stamp} {kind:<7} {shown(text)}\n".encode(errors="backslashreplace")
        with self._lock:
            self.warnings += kind == "warning"
            if self._left_bytes < 0 and kind != "error":
                return
            self._left_bytes -= len(line)
            if self._left_bytes < 0 and kind != "error":
                line = f"{stamp} note    the log is full; from here on only errors are taken down\n".encode()
            self._write(line)

    def close(self) -> None:
        """Ends it. May be called twice."""
        with self._lock:
            if self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            return
        try:
            os.write(self._descriptor, line)
        except OSError:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def logged(invocation: Invocation, folder: str, doing: str, place: str) -> Iterator[RunLog]:
    """The log of a run, into which all goes that the user is told meanwhile, and how the run ends.

    After a failure it stays with the invocation, so that it can be named beside the error; who deals with the failure takes it from there.

    Args:
        folder: what the user asked for; empty for the usual one.
    """
    log = _begun(invocation, folder, doing, place)
    invocation.run_log = log
    system = os.uname()
    log.note(
        f"Holdfast {VERSION}, Python {platform.python_version()}, {system.sysname} {system.release}, "
        f"process {os.getpid()}"
    )
    try:
        yield log
    except BaseException as error:
        code, message, hint = explained(error, invocation)
        log.note(f"{message or type(error).__name__} (exit code {code})", "error")
        if hint:
            log.note(f"hint: {hint}", "error")
        log.close()
        raise
    log.note(f"done{f', with warnings (exit code {EXIT_WARNINGS})' if log.warnings else ''}")
    log.close()
    invocation.run_log = None


def _begun(invocation: Invocation, folder: str, doing: str, place: str) -> RunLog:
    folder = os.path.abspath(folder) if folder else _usual_folder()
    try:
        if not folder:
            raise OSError(errno.ENOENT, "this user has no home folder")
        return RunLog.create(folder, doing, place)
    except OSError as error:
        where = f" in {folder}" if folder else ""
        reason = error.strerror or str(error)
        notice(invocation, f"no log of this run can be kept{where} ({reason}); see --log-dir")
        return RunLog()


def _usual_folder() -> str:
    """Where logs are kept if nobody says otherwise; empty if there is no such place."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "holdfast", "logs") if os.path.isabs(base) else ""


def _remove_oldest(folder: str) -> None:
    """Makes room for one more."""
    names = sorted(name for name in os.listdir(folder) if _NAME.match(name))
    for name in names[: max(0, len(names) - MAX_LOGS + 1)]:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, name))


def _word(text: str) -> str:
    """A text as part of a file's name."""
    word = re.sub(r"[^\w.-]+", "_", text).strip("._")
    return word.encode(errors="replace")[:_MAX_WORD_BYTES].decode(errors="ignore") or "vm"
