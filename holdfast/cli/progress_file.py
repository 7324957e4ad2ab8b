"""`--progress-file`: how far a backup is, for other programs.

    FILE         one JSON object per line, appended: progress some times a second at most, and how each VM ended
    FILE.last    the last state of each source, one JSON document, replaced in one step

A file that can not be written ends the command before it begins, and is given up without a word later: a backup does not fail for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from holdfast.cli.failures import failure_record
from holdfast.cli.output import as_json
from holdfast.errors import storage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from holdfast.cli.output import Json
    from holdfast.cli.progress import Progress
    from holdfast.errors import HoldfastError

__all__ = ["ProgressFile"]

_PROGRESS: Final = ("type", "bytes_done", "bytes_total", "bytes_read", "bytes_new")

_EVERY_S: Final = 0.5


class ProgressFile:
    """Takes down what happens. Threads may share it.

    Args:
        path: empty for none.

    Raises:
        StorageError: it can not be written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._last: dict[str, Json] = {}
        self._next_s: dict[str, float] = {}
        if path:
            try:
                with open(path, "a", encoding="utf-8"):
                    pass
            except OSError as error:
                raise storage_error(error, f"writing {path}") from None

    def note(self, source: str, state: dict[str, Json], *, always: bool = True) -> None:
        """Takes a state down.

        Args:
            always: False for one of many, of which some may be left out.
        """
        now_s = time.monotonic()
        with self._lock:
            if not self._path or (not always and now_s < self._next_s.get(source, 0.0)):
                return
            self._next_s[source] = now_s + _EVERY_S
            value: dict[str, Json] = {"source": source, "at": round(time.time(), 1), **state}
            self._last[source] = value
            temporary = f"{self._path}.{os.getpid()}.tmp"
            with contextlib.suppress(OSError):
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(f"{as_json(value)}\n")
                with open(temporary, "w", encoding="utf-8") as file:
                    file.write(f"{as_json({'sources': list(self._last.values())})}\n")
                os.replace(temporary, f"{self._path}.last")

    def note_progress(self, source: str, value: Mapping[str, Json]) -> None:
        """Takes progress down, of which some may be left out, as may members that are not of everybody's."""
        self.note(source, {name: value[name] for name in _PROGRESS if name in value}, always=False)

    def note_failure(self, source: str, error: HoldfastError, log: str) -> None:
        """Takes down that a source failed, and the path of the log of that; empty if there is none."""
        self.note(source, failure_record(error.message, error.exit_code, error.hint, log))

    @contextlib.contextmanager
    def around(self, source: str, shown: contextlib.AbstractContextManager[Progress]) -> Iterator[Progress]:
        """The progress of a source, taken down besides being shown."""
        with shown as inner:
            yield _Both(self, source, inner)


class _Both:
    """Shows progress and takes it down."""

    def __init__(self, file: ProgressFile, source: str, inner: Progress) -> None:
        self._file = file
        self._source = source
        self._inner = inner

    def update(self, done: int, total: int, **details: int) -> None:
        """See `Progress`."""
        self._inner.update(done, total, **details)
        self._file.note_progress(
            self._source, {"type": "progress", "bytes_done": done, "bytes_total": total, **details}
        )
