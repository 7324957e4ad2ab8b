"""Far sides for tests, in this process, over a pair of sockets."""

from __future__ import annotations

import contextlib
import socket
import threading

from holdfast.errors import FarSideEnded, LinkError, LinkLost
from holdfast.repo.index import Index
from holdfast.repo.packs import PackStore
from holdfast.repo.wire.far import FarSide
from holdfast.repo.wire.far_index import FarIndex
from holdfast.repo.wire.far_packs import FarPacks
from holdfast.repo.wire.far_place import Hosted
from holdfast.repo.wire.near import Connection
from holdfast.repo.wire.proof import NoProofs, Proofs
from holdfast.repo.wire.rights import Rights

__all__ = ["SocketStream", "hosted_connection", "served"]


class SocketStream:
    """A socket as a stream of the near side."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def read(self, limit_bytes: int) -> bytes:
        try:
            return self._socket.recv(limit_bytes)
        except OSError as error:
            raise LinkLost(f"the socket broke ({error})") from None

    def write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise FarSideEnded(f"the socket takes no more ({error})") from None

    def close_write(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def ended(self) -> LinkError:
        return LinkLost("the far side of the socket has ended")

    def close(self) -> None:
        self._socket.close()


def served(
    rights: Rights | None = None, hosted: Hosted | None = None
) -> tuple[socket.socket, threading.Thread]:
    """The near end of a socket at whose other end a far side listens, and the thread that it is."""
    near, far = socket.socketpair()

    def read(limit: int) -> bytes:
        return far.recv(limit)

    def work() -> None:
        FarSide(read, far.sendall, rights, hosted).run()
        far.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return near, thread


def hosted_connection(
    store: PackStore, index: Index | None = None, rights: Rights | None = None, proofs: Proofs | None = None
) -> Connection:
    """A connection to a far side that has these open already."""
    rights, proofs = rights or Rights(), proofs or NoProofs()
    hosted = Hosted(FarPacks(store, proofs, rights))
    if index is not None:
        hosted.use_index(FarIndex(index, proofs, rights))
    near, _ = served(rights, hosted)
    return Connection(SocketStream(near), "far")
