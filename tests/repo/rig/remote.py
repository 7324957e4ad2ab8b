"""Far sides for tests, in this process, over a pair of sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from holdfast.errors import FarSideEnded, LinkError, LinkLost
from holdfast.repo.index import Index
from holdfast.repo.packs import PackStore
from holdfast.repo.repository import Repository
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.far import Descriptors, FarSide, Read, Write
from holdfast.repo.wire.far_index import FarIndex
from holdfast.repo.wire.far_packs import FarPacks
from holdfast.repo.wire.far_place import Hosted
from holdfast.repo.wire.frames import Decoder, encode_frames
from holdfast.repo.wire.near import Connection
from holdfast.repo.wire.proof import NoProofs, Proofs
from holdfast.repo.wire.remote_place import RemotePlace
from holdfast.repo.wire.rights import Rights
from holdfast.repo.wire.stream import Stream
from holdfast.ssh.address import parse_place
from holdfast.ssh.descriptors import writing_parts

__all__ = [
    "InRounds",
    "SocketStream",
    "all_gone",
    "answering",
    "hosted_connection",
    "in_rounds",
    "remote_repository",
    "served",
    "served_by_descriptors",
    "wire_of",
]


class SocketStream:
    """A socket as a stream of the near side."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def read(self, limit_bytes: int) -> bytes:
        try:
            return self._socket.recv(limit_bytes)
        except OSError as error:
            raise LinkLost(f"the socket broke ({error})") from None

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        try:
            self._socket.sendall(b"".join(parts))
        except OSError as error:
            raise FarSideEnded(f"the socket takes no more ({error})") from None

    def close_write(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def ended(self) -> LinkError:
        return LinkLost("the far side of the socket has ended")

    def close(self) -> None:
        self._socket.close()


class InRounds(SocketStream):
    """A connection on which no answer comes before all of its round was asked: so who asks in fewer rounds has waited less often.

    Args:
        rounds: names of the requests, round by round.
    """

    def __init__(self, end: socket.socket, rounds: Sequence[Sequence[str]]) -> None:
        super().__init__(end)
        self.asked: list[str] = []
        self._ends = [sum(map(len, rounds[: number + 1])) for number in range(len(rounds))]
        self._changed = threading.Condition()
        self._requests, self._answers = Decoder(), Decoder()

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        super().write(parts)
        with self._changed:
            for packet in self._requests.feed(b"".join(parts)):
                self.asked.append(type(m.decode_message(*packet[1:])).__name__)
            self._changed.notify_all()

    def read(self, limit_bytes: int) -> bytes:
        data = super().read(limit_bytes)
        answered = max((packet.request for packet in self._answers.feed(data)), default=0)
        needed = next((end for end in self._ends if answered <= end), 0) if answered else 0
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.asked) >= needed, 20):
                raise LinkLost(f"an answer is waited for behind {self.asked}")
        return data


_FAR_SIDES: list[threading.Thread] = []


def all_gone() -> None:
    """Returns when every far side has ended: one that is cut off has something left to do."""
    while _FAR_SIDES:
        thread = _FAR_SIDES.pop()
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def answering(answer: m.Message) -> Iterator[Connection]:
    """A connection to a far side that greets, and gives the same answer to the one question that it waits for."""
    near, far = socket.socketpair()

    def speak() -> None:
        welcome = m.Welcome(1, "x", append_only=False, read_only=False)
        for number, message in enumerate((welcome, answer), 1):
            far.recv(1000)
            far.sendall(b"".join(encode_frames(number, *m.encode_message(message))))

    thread = threading.Thread(target=speak)
    thread.start()
    connection = Connection(SocketStream(near), "far")
    try:
        yield connection
    finally:
        connection.close()
        thread.join()
        far.close()


def served(
    rights: Rights | None = None, hosted: Hosted | None = None, clock: Callable[[], float] = time.time
) -> tuple[socket.socket, threading.Thread]:
    """The near end of a socket at whose other end a far side listens, and the thread that it is."""
    near, far = socket.socketpair()

    def read(limit: int) -> bytes:
        return far.recv(limit)

    def work() -> None:
        FarSide(read, lambda parts: far.sendall(b"".join(parts)), rights, hosted, clock).run()
        far.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _FAR_SIDES.append(thread)
    return near, thread


def served_by_descriptors(rights: Rights | None = None) -> socket.socket:
    """The near end of a socket at whose other end a far side listens that takes, and may become, further streams."""
    near, far = socket.socketpair()

    def opened(source: int, sink: int) -> tuple[Read, Write, Callable[[], None]]:
        def write(parts: Sequence[bytes | bytearray | memoryview]) -> None:
            for _ in writing_parts(sink, parts):
                pass

        def close() -> None:
            os.close(source)
            os.close(sink)

        return (lambda limit: os.read(source, limit)), write, close

    def work() -> None:
        ends = far.fileno(), far.fileno()
        FarSide(
            far.recv,
            lambda parts: far.sendall(b"".join(parts)),
            rights,
            descriptors=Descriptors(ends, opened),
        ).run()
        far.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _FAR_SIDES.append(thread)
    return near


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


def remote_repository(
    path: str,
    rights: Rights | None = None,
    password: str | None = None,
    wrap: Callable[[SocketStream], Stream] = lambda stream: stream,
    clock: Callable[[], float] = time.time,
) -> Repository:
    """A repository of this machine, opened through a far side.

    Args:
        wrap: puts a fault between both.
        clock: that of the far side.
    """
    near, _ = served(rights, clock=clock)
    place = RemotePlace(Connection(wrap(SocketStream(near)), "far"), f"ssh://far{path}", path)
    try:
        config = place.read_config().config
    except BaseException:
        place.release()
        raise
    return Repository(place, config, None if password is None else lambda: password, lambda _message: None)


@contextlib.contextmanager
def in_rounds(path: str, rounds: Sequence[Sequence[str]]) -> Iterator[Repository]:
    """A repository of this machine, opened through a far side as commands do it; what is asked must be asked in these rounds."""
    near, _ = served()
    stream = InRounds(near, rounds)
    address = parse_place(f"ssh://far{path}")
    assert address is not None
    place = RemotePlace.opened(stream, address, index=True)
    with Repository.open(path, notify=lambda _message: None, place=lambda: place) as repository:
        yield repository
    assert stream.asked == [name for one in rounds for name in one]


def wire_of(repository: Repository) -> Connection:
    """The connection of such a repository."""
    place = repository._place
    assert isinstance(place, RemotePlace)
    return place.connection
