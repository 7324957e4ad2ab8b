"""Commands on a host, one after the other: words in, checked text out; and the few things done with small files.

A `Console` is what the rest of this package knows of a host's shell. There are two: over the shell (`shell_console`), and over
the agent where our key is limited to it (`agent_console`). Both run the same commands, as lists of words.

Faults that `vim-cmd` prints are errors, whatever the status says. Only commands that change nothing are repeated
(`look`), and only after failures that pass: a management service that restarts, memory pressure, a connection that
broke. What changes something (`act`) is run once; whoever does that looks afterwards.
"""

from __future__ import annotations

import stat as modes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from holdfast.errors import (
    DiskFull,
    LinkLost,
    SourceChanged,
    SourceError,
    SourceNotFound,
    SourceUnreadable,
    StorageError,
)
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import Answer, fault_in, is_passing

__all__ = ["Console", "HostFile", "file_error", "write_error"]

_PAUSES_S: Final = (0.3, 1.0, 3.0, 6.0)
_SHORT: Final = 400

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HostFile:
    """A file in a folder of a host."""

    name: str
    size_bytes: int
    mtime_s: int
    mode: int

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return modes.S_ISREG(self.mode)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return modes.S_ISDIR(self.mode)


class Console(ABC):
    """A host's commands. Threads may share it.

    Args:
        pause: how to wait, in seconds.
    """

    def __init__(self, *, pause: Callable[[float], None] = time.sleep) -> None:
        self.pause: Final = pause

    # Commands

    @abstractmethod
    def act(
        self, words: tuple[str, ...], doing: str, *, timeout_s: float = 600.0, together: bool = False
    ) -> Answer:
        """What a command that may change something answered. Run once, and not believed: look afterwards.

        Args:
            together: with what it prints on its standard error, in the order of both.

        Raises:
            LinkError: the connection, or its time, is over; the command may have run.
            KeyLimited: our key may not do that.
        """

    def look(self, words: tuple[str, ...], doing: str, parse: Callable[[str], _T]) -> _T:
        """What a command that changes nothing printed, parsed; it is repeated where that may help.

        Raises:
            SourceError: the host refused, or its answer can not be understood.
            LinkError: the connection is over.
        """
        return parse(self.look_at(words, doing).require(doing))

    def look_at(self, words: tuple[str, ...], doing: str, *, timeout_s: float = 120.0) -> Answer:
        """The answer to a command that changes nothing; repeated where that may help."""
        return self.repeated(lambda: self.act(words, doing, timeout_s=timeout_s))

    def repeated(self, attempt: Callable[[], Answer]) -> Answer:
        """What an attempt to look at something answered, which is made again after failures that pass."""
        for pause_s in _PAUSES_S:
            try:
                answer = attempt()
            except LinkLost:
                self.pause(pause_s)
                continue
            if not _passing(answer):
                return answer
            self.pause(pause_s)
        return attempt()

    @abstractmethod
    def python(self) -> str:
        """The version of the host's Python; empty if it has none."""

    # Files

    @abstractmethod
    def read(self, path: str, limit_bytes: int) -> bytes:
        """The content of a small file.

        Raises:
            SourceNotFound, SourceUnreadable: it can not be read.
            SourceFormat: it is longer than `limit_bytes`.
        """

    @abstractmethod
    def listing(self, folder: str) -> tuple[HostFile, ...]:
        """What a folder holds, ordered by name. Names with line ends are left out.

        Raises:
            SourceNotFound: there is no such folder.
            SourceError: it can not be listed.
        """

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is anything at that path."""

    @abstractmethod
    def make_folder(self, path: str, marker: bytes) -> None:
        """A new folder, and in it `MARKER` with that text.

        Raises:
            DiskFull, StorageError: it can not be made.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Writes a small file in a folder that holds `MARKER`.

        Raises:
            DiskFull, StorageError: it can not be written.
        """

    @abstractmethod
    def complete(self, folder: str) -> None:
        """Takes `MARKER` out of a folder, when all that was written is on the host's disk.

        Raises:
            StorageError: it can not be done.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of what it has started. May be called twice."""


def write_error(said: str, doing: str) -> StorageError:
    """The error that says why something could not be written on a host."""
    words = printable(" ".join(said.split()))
    if "No space" in words:
        return DiskFull(
            f"the datastore is full: {words}, while {doing}",
            hint="free some space there, then run the restore again",
        )
    return StorageError(f"the host failed while {doing}: {words}")


def _passing(answer: Answer) -> bool:
    """Whether asking again may help. In a long answer such words are somebody's annotation."""
    if fault_in(answer.text) is not None:
        return fault_in(answer.text).name in ("HostCommunication", "ConcurrentAccess")  # type: ignore[union-attr]
    return is_passing(answer.text) and (answer.status != 0 or len(answer.text) < _SHORT)


def file_error(where: str, said: bytes) -> SourceError:
    """The error that says why a file of a host could not be read.

    Args:
        where: the file, for people.
        said: what the command that read it printed on its standard error.
    """
    lines = [
        line
        for line in said.decode("utf-8", "replace").splitlines()
        if "records" not in line and " copied" not in line
    ]
    words = printable("; ".join(lines[-2:])) or "the command that read it ended without a word"
    if "No such file" in words:
        return SourceNotFound(
            f"{where} does not exist on the host any more", hint="was the VM moved, or its snapshot removed?"
        )
    if "resource busy" in words:
        return SourceChanged(
            f"{where} is locked by the host: {words}",
            hint="the VM was powered on or its snapshot was removed meanwhile: run the backup again",
        )
    return SourceUnreadable(f"{where} can not be read on the host: {words}")
