"""How a further stream reaches the process that serves a connection already: it is handed over, and read there.

Each stream that a client opens starts a process of its own on the far side. The one that serves the connection opens
a door, a socket that only processes of this machine can reach, and tells the client its name and a secret. The process at the end of a
further stream is told both by the client, goes through the door, and hands its standard input and output over; from then
on it waits for the end, since the SSH server ends a stream with its process.

Who is let in: a process of the same account with the secret and the same rights. Names of doors are of one form, so a client can
not have a process knock anywhere else.

The socket has no name in the file system (Linux's abstract names), so nothing is left behind, whatever happens.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from holdfast.errors import ProtocolError
from holdfast.repo.wire.messages import SECRET_BYTES, Invitation, Join

__all__ = ["Door", "hand_over"]

_NAME: Final = re.compile(r"holdfast-[0-9a-f]{32}")
_PATIENCE_S: Final = 20.0
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_WELCOME: Final = b"+"
_MOST_GUESTS: Final = 32


class Door:
    """Lets further streams in.

    Args:
        rights: what this side was started with; who comes must have been started with the same.
        admit: gets input and output of each stream that has come in, and what to call when it is not needed any more.
    """

    def __init__(self, rights: bytes, admit: Callable[[int, int, Callable[[], None]], None]) -> None:
        self.invitation: Final = Invitation(f"holdfast-{secrets.token_hex(16)}", os.urandom(SECRET_BYTES))
        self._rights = rights
        self._admit = admit
        self._guests: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind("\0" + self.invitation.door)
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise ProtocolError(f"no further streams can be taken here ({error.strerror})") from None
        threading.Thread(target=self._wait, name="holdfast-door", daemon=True).start()

    def _wait(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while len(self._guests) < _MOST_GUESTS:
                guest = self._listener.accept()[0]
                descriptors: list[int] = []
                try:
                    descriptors = self._let_in(guest)
                    source, sink = descriptors
                except (OSError, ValueError):  # it is not one of ours, or has gone already
                    for one in descriptors:
                        os.close(one)
                    guest.close()
                    continue
                self._guests.append(guest)
                self._admit(source, sink, guest.close)

    def _let_in(self, guest: socket.socket) -> list[int]:
        """What a guest hands over; nothing if it may not come in."""
        guest.settimeout(_PATIENCE_S)
        if _account(guest) != os.geteuid():
            return []
        wanted = self.invitation.secret + self._rights
        said, descriptors, _, _ = socket.recv_fds(guest, len(wanted) + 1, 2)
        if hmac.compare_digest(said, wanted):
            with contextlib.suppress(OSError):  # it has gone; its stream will be found to have ended
                guest.sendall(_WELCOME)
            return descriptors
        for one in descriptors:
            os.close(one)
        return []

    def close(self) -> None:
        """Lets nobody in any more, and all go who have come. May be called twice."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for guest in self._guests:
            with contextlib.suppress(OSError):
                guest.shutdown(socket.SHUT_RDWR)
            guest.close()


def hand_over(request: Join, rights: bytes, descriptors: tuple[int, int]) -> None:
    """Hands input and output of this process over; returns when they are not needed any more.

    Raises:
        ProtocolError: nobody takes them.
    """
    if not _NAME.fullmatch(request.door):
        raise ProtocolError("a connection to join is not named as they are here")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.settimeout(_PATIENCE_S)
        try:
            door.connect("\0" + request.door)
            if _account(door) != os.geteuid():
                raise ProtocolError("the connection to join belongs to another account")
            socket.send_fds(door, [request.secret + rights], descriptors)
            welcome = door.recv(1)
        except OSError:
            welcome = b""
        if welcome != _WELCOME:
            raise ProtocolError("the connection to join is not there, or may do other things than this one")
        door.settimeout(None)
        with contextlib.suppress(OSError):
            door.recv(1)


def _account(peer: socket.socket) -> int:
    """Whose process is at the other end."""
    _, account, _ = _CREDENTIALS.unpack(
        peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return int(account)
