"""The console over the agent, for keys that can do nothing on the host but run it.

One agent for all that is asked, started when it is needed first and again after it broke off. What it may do is
decided on the host (`agent.gate`); what it refuses is a `KeyLimited` here.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from holdfast.errors import (
    LinkError,
    LinkLost,
    LinkTimeout,
    SourceChanged,
    SourceError,
    SourceFormat,
    SourceNotFound,
)
from holdfast.esxi.agent import frames
from holdfast.esxi.agent_answers import number_in, object_in
from holdfast.esxi.agent_link import AgentLink
from holdfast.esxi.console import Console, HostFile, write_error
from holdfast.esxi.names import printable
from holdfast.esxi.says.answer import MAX_ANSWER_BYTES, Answer
from holdfast.units import MIB

__all__ = ["AgentConsole"]

_PIECE_BYTES: Final = MIB
_PAUSES_S: Final = (0.3, 1.0, 3.0)
_UNREADABLE: Final = "can not be read ("

_T = TypeVar("_T")


class AgentConsole(Console):
    """A host's commands, run by the agent. Threads may share it.

    Args:
        start: a running agent of a limited key.
        pause: how to wait, in seconds.
    """

    def __init__(
        self, start: Callable[[], AgentLink], *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(pause=pause)
        self._start = start
        self._lock = threading.Lock()
        self._link: AgentLink | None = None

    @property
    def link(self) -> AgentLink:
        """The agent, which is started if it does not run.

        Raises:
            LinkError, KeyLimited: why it can not.
        """
        with self._lock:
            if self._link is None or not self._link.is_alive:
                if self._link is not None:
                    self._link.close()
                self._link = None
                self._link = self._start()
            return self._link

    def close(self) -> None:
        """See `Console.close`."""
        with self._lock:
            if self._link is not None:
                self._link.close()

    # Commands

    def act(
        self, words: tuple[str, ...], doing: str, *, timeout_s: float = 600.0, together: bool = False
    ) -> Answer:
        """See `Console.act`."""
        wanted = {"words": list(words), "timeout_s": timeout_s, "together": together}
        output, last = self._collected(frames.COMMAND, wanted, MAX_ANSWER_BYTES)
        said = object_in([last])
        if said.get("expired") is True:
            raise LinkTimeout(
                f"a command on the host did not end within {timeout_s:g} s, while {doing}",
                hint="see whether the host is overloaded or waits for something",
            )
        if output is None:
            raise SourceFormat(
                f"the host answered with more than {MAX_ANSWER_BYTES // MIB} MiB while {doing}"
            )
        status = said.get("status")
        if not isinstance(status, int):
            raise LinkError("the agent on the host does not say how a command has ended")
        return Answer.said(output, str(said.get("stderr", "")).encode(), status)

    def python(self) -> str:
        """See `Console.python`."""
        return self.link.hello.python

    # Files

    def read(self, path: str, limit_bytes: int) -> bytes:
        """See `Console.read`."""
        wanted = {"path": posixpath.normpath(path), "limit": limit_bytes}
        data, last = self._again(lambda: self._collected(frames.READ, wanted, limit_bytes))
        if data is None or number_in(object_in([last]), "size") > limit_bytes:
            raise SourceFormat(
                f"{printable(path)} is longer than {limit_bytes} bytes, which is not plausible"
            )
        if len(data) != number_in(object_in([last]), "size"):
            raise SourceChanged(f"{printable(path)} changed while it was read")
        return data

    def listing(self, folder: str) -> tuple[HostFile, ...]:
        """See `Console.listing`."""
        entries = self._again(lambda: self.link.list_folder(posixpath.normpath(folder)))
        found = [HostFile(one.name, one.size_bytes, one.mtime_s, one.mode) for one in entries]
        return tuple(sorted((one for one in found if "\n" not in one.name), key=lambda one: one.name))

    def exists(self, path: str) -> bool:
        """See `Console.exists`."""
        try:
            self._again(lambda: self.link.stat(posixpath.normpath(path)))
        except SourceNotFound:
            return False
        return True

    def make_folder(self, path: str, marker: bytes) -> None:
        """See `Console.make_folder`."""
        with _as_writing(f"making the folder {printable(path)}"):
            self._done(frames.MAKE, {"path": path, "marker": marker.decode()})

    def put(self, path: str, data: bytes) -> None:
        """See `Console.put`."""
        name = path.encode(errors="surrogateescape")
        with _as_writing(f"writing {printable(path)}"):
            for offset in range(0, max(len(data), 1), _PIECE_BYTES):
                piece = data[offset : offset + _PIECE_BYTES]
                payload = frames.PUTS.pack(offset, len(name)) + name + piece
                object_in(list(self.link.ask(frames.PUT, payload)))

    def complete(self, folder: str) -> None:
        """See `Console.complete`."""
        with _as_writing("removing the marker"):
            self._done(frames.COMPLETE, {"path": folder})

    def _done(self, kind: int, wanted: dict[str, object]) -> None:
        object_in(list(self.link.ask(kind, json.dumps(wanted).encode())))

    def _collected(
        self, kind: int, wanted: dict[str, object], limit_bytes: int
    ) -> tuple[bytes | None, bytes]:
        """What came before the last answer, joined (None if it is longer than that), and the last answer."""
        pieces: list[bytes] = []
        size, last = 0, b""
        for number, answer in enumerate(self.link.ask(kind, json.dumps(wanted).encode())):
            if number and size <= limit_bytes:
                pieces.append(last)
                size += len(last)
            last = answer
        return (b"".join(pieces) if size <= limit_bytes else None), last

    def _again(self, attempt: Callable[[], _T]) -> _T:
        """What an attempt to look at something returned; it is made again, with a new agent, after the connection broke."""
        for pause_s in _PAUSES_S:
            try:
                return attempt()
            except LinkLost:
                self.pause(pause_s)
        return attempt()


@contextlib.contextmanager
def _as_writing(doing: str) -> Iterator[None]:
    """The agent speaks of sources; here it is the destination that fails."""
    try:
        yield
    except SourceError as error:
        raise write_error(error.message.rpartition(_UNREADABLE)[2].rstrip(")"), doing) from None
