"""The console over a host's shell, for keys that have one.

Every argument is quoted for the shell over there; nothing is ever put into a command line as it is. Each command is
followed by a mark with its status, so that an answer that was cut off is not taken for a short one.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Final

from holdfast.errors import KeyLimited, LinkLost, SourceFormat, SourceNotFound
from holdfast.esxi.agent.bundle import REFUSAL
from holdfast.esxi.agent.gate import MARKER
from holdfast.esxi.console import Console, HostFile, file_error, write_error
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import MAX_ANSWER_BYTES, Answer
from holdfast.ssh.link import Link, Result

__all__ = ["ShellConsole"]

_PAUSES_S: Final = (0.3, 1.0, 3.0, 6.0, None)
_STATUS_OF_NOTHING: Final = 44


class ShellConsole(Console):
    """The shell of a host. Threads may share it.

    Args:
        link: closed by whoever made it.
        pause: how to wait, in seconds.
    """

    def __init__(self, link: Link, *, pause: Callable[[float], None] = time.sleep) -> None:
        super().__init__(pause=pause)
        self.link: Final = link

    def run(self, script: str, *, timeout_s: float = 120.0, stdin: bytes = b"") -> Answer:
        """What a shell script answered, whatever it was; run once.

        Raises:
            LinkError: the connection, or its time, is over.
            KeyLimited: the key has no shell.
        """
        result = self._run(script, stdin, timeout_s=timeout_s, limit_bytes=MAX_ANSWER_BYTES)
        return Answer.said(result.stdout, result.stderr, result.status)

    def look_script(self, script: str) -> Answer:
        """The answer to a script that changes nothing; repeated where that may help."""
        return self.repeated(lambda: self.run(script))

    def act(
        self, words: tuple[str, ...], doing: str, *, timeout_s: float = 600.0, together: bool = False
    ) -> Answer:
        """See `Console.act`."""
        del doing
        return self.run(shlex.join(words) + " 2>&1" * together, timeout_s=timeout_s)

    def python(self) -> str:
        """See `Console.python`."""
        answer = self.look_script("python3 -V 2>&1")
        words = answer.text.split()
        return words[1] if answer.status == 0 and len(words) == 2 and words[0] == "Python" else ""

    def read(self, path: str, limit_bytes: int) -> bytes:
        """See `Console.read`."""
        where = printable(path)
        script = f"[ -e {shlex.quote(path)} ] || exit {_STATUS_OF_NOTHING}; head -c {limit_bytes + 1} {shlex.quote(path)}"
        for pause_s in _PAUSES_S:
            try:
                result = self._run(script, limit_bytes=limit_bytes + 64)
                if result.status in (0, _STATUS_OF_NOTHING) or pause_s is None:
                    break
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
        """See `Console.listing`."""
        script = (
            f"cd {shlex.quote(folder)} 2>/dev/null || exit {_STATUS_OF_NOTHING}; "
            'for f in * .[!.]*; do if [ -e "$f" ]; then stat -c "%s %Y %f %n" "./$f"; fi; done 2>/dev/null; true'
        )
        answer = self.look_script(script)
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
        """See `Console.exists`."""
        answer = self.look_script(f"if [ -e {shlex.quote(path)} ]; then echo yes; else echo no; fi")
        return answer.text.strip() == "yes"

    def make_folder(self, path: str, marker: bytes) -> None:
        """See `Console.make_folder`."""
        self._change(f"mkdir {shlex.quote(path)}", f"making the folder {printable(path)}")
        self.put(f"{path}/{MARKER}", marker)

    def put(self, path: str, data: bytes) -> None:
        """See `Console.put`."""
        self._change(f"cat > {shlex.quote(path)}", f"writing {printable(path)}", data)

    def complete(self, folder: str) -> None:
        """See `Console.complete`."""
        self._change(f"sync; rm -f {shlex.quote(f'{folder}/{MARKER}')}", "removing the marker")

    def close(self) -> None:
        """See `Console.close`: nothing is held."""

    def _run(self, script: str, stdin: bytes = b"", *, timeout_s: float = 120.0, limit_bytes: int) -> Result:
        try:
            return self.link.run(script, stdin, timeout_s=timeout_s, limit_bytes=limit_bytes, sentinel=True)
        except LinkLost as error:
            if REFUSAL not in error.message:
                raise
            raise KeyLimited(
                "the host runs nothing but the agent for our key, which is not what was agreed on",
                hint="somebody has linked it with --restrict for the same key: link it from here again, as you want it",
            ) from None

    def _change(self, script: str, doing: str, data: bytes = b"") -> None:
        answer = self.run(f"{{ {script}; }} 2>&1", stdin=data)
        if answer.status:
            raise write_error(answer.text, doing)
