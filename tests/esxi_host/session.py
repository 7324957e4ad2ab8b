"""One command of a session, as the daemon sees it: what was typed, and where the answer goes."""

from __future__ import annotations

import contextlib
import posixpath
import socket
from dataclasses import dataclass, field


@dataclass(slots=True)
class Session:
    """A command that waits for its answer. Texts are UTF-8; bytes that are not survive as surrogates."""

    connection: socket.socket
    release: str
    program: str
    folder: str
    """The working folder, in the host."""
    arguments: list[str] = field(default_factory=list)

    @classmethod
    def receive(cls, connection: socket.socket, release: str) -> Session | None:
        """What `client.py` sends; None if it went away."""
        stream = connection.makefile("rb")
        length = int.from_bytes(stream.read(4), "big")
        parts = [part.decode("utf-8", "surrogateescape") for part in stream.read(length).split(b"\0")]
        if len(parts) < 2:
            return None
        return cls(connection, release, parts[0], parts[1], parts[2:])

    def print(self, text: str = "", end: str = "\n") -> None:
        """Text goes to the command's standard output."""
        self._send(1, (text + end).encode("utf-8", "surrogateescape"))

    def complain(self, text: str) -> None:
        """Text goes to the command's standard error."""
        self._send(2, (text + "\n").encode("utf-8", "surrogateescape"))

    def finish(self, code: int) -> None:
        with contextlib.suppress(OSError):
            self._send(0, str(code).encode())

    def absolute(self, path: str) -> str:
        """A path of the command line, in the host, as seen from the command's folder."""
        return posixpath.normpath(posixpath.join(self.folder, path))

    @property
    def alive(self) -> bool:
        """Whether somebody waits for the answer."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _send(self, kind: int, data: bytes) -> None:
        self.connection.sendall(bytes([kind]) + len(data).to_bytes(4, "big") + data)
