"""Commands on a host, one after the other: words in, checked text out.

Every argument is quoted for the shell over there; nothing is ever put into a command line as it is. Each command is
followed by a mark with its status, so that an answer that was cut off is not taken for a short one. Faults that
`vim-cmd` prints are errors, whatever the status says.

Only commands that change nothing are repeated (`look`), and only after failures that pass: a management service
that restarts, memory pressure, a connection that broke. What changes something (`act`) is run once; whoever does that looks afterwards.
"""

from __future__ import annotations

import shlex
import stat as modes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from holdfast.errors import (
    LinkLost,
    LinkTimeout,
    SourceChanged,
    SourceError,
    SourceFormat,
    SourceNotFound,
    SourceUnreadable,
)
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import MAX_ANSWER_BYTES, Answer, fault_in, is_passing
from holdfast.ssh.link import Link

__all__ = ["Console", "HostFile", "file_error"]

_PAUSES_S: Final = (0.3, 1.0, 3.0, 6.0)
_SHORT: Final = 400
_STATUS_OF_NOTHING: Final = 44

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


class Console:
    """The shell of a host. Threads may share it.

    Args:
        link: closed by whoever made it.
        pause: how to wait, in seconds.
    """

    def __init__(self, link: Link, *, pause: Callable[[float], None] = time.sleep) -> None:
        self.link: Final = link
        self.pause: Final = pause

    def run(self, script: str, doing: str, *, timeout_s: float = 120.0, stdin: bytes = b"") -> Answer:
        """What a shell script answered, whatever it was; run once.

        Raises:
            LinkError: the connection, or its time, is over.
        """
        del doing
        result = self.link.run(
            script, stdin, timeout_s=timeout_s, limit_bytes=MAX_ANSWER_BYTES, sentinel=True
        )
        text = result.stdout.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n")
        if result.status and not text.strip():
            text = result.stderr.decode("utf-8", errors="replace")
        return Answer(text, result.status)

    def act(self, words: tuple[str, ...], doing: str, *, timeout_s: float = 600.0) -> Answer:
        """What a command that changes something answered. Run once, and not believed: look afterwards.

        Raises:
            LinkError: the connection, or its time, is over; the command may have run.
        """
        return self.run(shlex.join(words), doing, timeout_s=timeout_s)

    def look(self, words: tuple[str, ...], doing: str, parse: Callable[[str], _T]) -> _T:
        """What a command that changes nothing printed, parsed; it is repeated where that may help.

        Raises:
            SourceError: the host refused, or its answer can not be understood.
            LinkError: the connection is over.
        """
        return parse(self.look_script(shlex.join(words), doing).require(doing))

    def look_script(self, script: str, doing: str, *, timeout_s: float = 120.0) -> Answer:
        """The answer to a script that changes nothing; repeated where that may help."""
        for pause_s in _PAUSES_S:
            try:
                answer = self.run(script, doing, timeout_s=timeout_s)
            except LinkTimeout:
                raise
            except LinkLost:
                self.pause(pause_s)
                continue
            if not _passing(answer):
                return answer
            self.pause(pause_s)
        return self.run(script, doing, timeout_s=timeout_s)

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The content of a small file.

        Raises:
            SourceNotFound, SourceUnreadable: it can not be read.
            SourceFormat: it is longer than `limit_bytes`.
        """
        where = printable(path)
        script = f"[ -e {shlex.quote(path)} ] || exit {_STATUS_OF_NOTHING}; head -c {limit_bytes + 1} {shlex.quote(path)}"
        for pause_s in (*_PAUSES_S, None):
            try:
                result = self.link.run(script, timeout_s=120.0, limit_bytes=limit_bytes + 64, sentinel=True)
                if result.status in (0, _STATUS_OF_NOTHING) or pause_s is None:
                    break
            except LinkTimeout:
                raise
            except LinkLost:
                if pause_s is None:
                    raise
            self.pause(pause_s)
        if result.status == _STATUS_OF_NOTHING:
            raise SourceNotFound(f"{where} does not exist on the host")
        if result.status:
            raise file_error(where, result.stderr)
        if len(result.stdout) > limit_bytes:
            raise SourceFormat(f"{where} is longer than {limit_bytes} bytes, which is not plausible")
        return result.stdout

    def listing(self, folder: str) -> tuple[HostFile, ...]:
        """What a folder holds, ordered by name. Names with line ends are left out.

        Raises:
            SourceNotFound: there is no such folder.
            SourceError: it can not be listed.
        """
        script = (
            f"cd {shlex.quote(folder)} 2>/dev/null || exit {_STATUS_OF_NOTHING}; "
            'for f in * .[!.]*; do if [ -e "$f" ]; then stat -c "%s %Y %f %n" "./$f"; fi; done 2>/dev/null; true'
        )
        answer = self.look_script(script, f"listing {printable(folder)}")
        if answer.status == _STATUS_OF_NOTHING:
            raise SourceNotFound(f"the folder {printable(folder)} does not exist on the host")
        found = []
        for line in answer.require(f"listing {printable(folder)}").splitlines():
            words = line.split(" ", 3)
            if (
                len(words) == 4
                and words[3].startswith("./")
                and words[0].isdecimal()
                and words[1].lstrip("-").isdecimal()
            ):
                found.append(HostFile(words[3][2:], int(words[0]), int(words[1]), int(words[2], 16)))
        return tuple(sorted(found, key=lambda file: file.name))

    def exists(self, path: str) -> bool:
        """Whether there is anything at that path."""
        answer = self.look_script(
            f"if [ -e {shlex.quote(path)} ]; then echo yes; else echo no; fi", "looking"
        )
        return answer.text.strip() == "yes"


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
