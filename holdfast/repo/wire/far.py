"""The far side of a connection: takes requests, carries them out, answers; one repository, one client, one process.

One thread reads, and carries out what concerns the place itself (opening, locks) before it reads on. What concerns an open pack is
carried out in the order in which it came, by one other thread; everything else by a few at once, since a question need not wait for the one before it. The reader takes no more requests than are bounded by
number and size, so a client that sends faster than the disk writes is slowed down by its own connection.

The client may have several streams for one connection (`door`). Each has a thread that reads it; requests are still taken in the order
of their numbers, so a thread that holds one of a later number waits for the others. Answers go back on the stream of their request.

What is broken is refused, once, with the reason, and the connection ends: a frame that is none, a request number that is not the next
one (something was lost, sent twice or put in), a message that is too long or not what it should be. A request that may not be
carried out is refused alone.

At the end, however it comes, packs, locks and index are let go of.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from holdfast.errors import ProtocolError
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.door import Door, hand_over
from holdfast.repo.wire.far_index import FarIndex
from holdfast.repo.wire.far_packs import FarPacks
from holdfast.repo.wire.far_place import FarPlace, Hosted
from holdfast.repo.wire.faults import failure_of
from holdfast.repo.wire.frames import Decoder, Packet, encode_frames
from holdfast.repo.wire.rights import Rights
from holdfast.version import VERSION as SOFTWARE

__all__ = ["Descriptors", "FarSide", "Read", "Write"]

_READ_BYTES: Final = 256 * 1024
_WORKERS: Final = 8
"""More than there may be cores: some wait for a disk, some for the client to take its answer."""
_MOST_WAITING: Final = 256
_MOST_WAITING_BYTES: Final = 64 << 20

_Handler = Callable[..., m.Message]

_IN_ORDER: Final[dict[type[m.Message], _Handler]] = {
    m.CreatePack: FarPacks.create,
    m.AdoptPack: FarPacks.adopt,
    m.Append: FarPacks.append,
    m.Cut: FarPacks.cut,
    m.CloseWriter: FarPacks.close_writer,
}
_ON_PACKS: Final[dict[type[m.Message], _Handler]] = {
    m.ListPacks: FarPacks.list,
    m.PackLength: FarPacks.length,
    m.ReadPack: FarPacks.read,
    m.SyncPack: FarPacks.sync,
    m.DeletePack: FarPacks.delete,
    m.FreeBytes: FarPacks.free,
    m.AllocatedBytes: FarPacks.allocated,
    m.CanPunch: FarPacks.can_punch,
    m.Punch: FarPacks.punch,
    m.SyncWriter: FarPacks.sync_writer,
    m.ListRecords: FarPacks.records,
    m.ScanPack: FarPacks.scan,
    m.Challenge: FarPacks.challenge,
}
_ON_INDEX: Final[dict[type[m.Message], _Handler]] = {
    m.Lookup: FarIndex.lookup,
    m.Commit: FarIndex.commit,
    m.ScanChunks: FarIndex.scan,
    m.ListPackRows: FarIndex.packs,
    m.ListPoints: FarIndex.points,
    m.GetPoints: FarIndex.get_points,
    m.BeginSession: FarIndex.begin_session,
    m.Heartbeat: FarIndex.heartbeat,
    m.EndSession: FarIndex.end_session,
    m.ListSessions: FarIndex.sessions,
    m.GetRoots: FarIndex.roots,
    m.GetFigures: FarIndex.figures,
    m.BeginCollection: FarIndex.begin_collection,
    m.NoteCollected: FarIndex.note_collected,
    m.WereCollected: FarIndex.collected,
    m.ListCopies: FarIndex.copies,
    m.NoteCopies: FarIndex.note_copies,
    m.Sweep: FarIndex.sweep,
    m.Drop: FarIndex.drop,
    m.ListLost: FarIndex.lost,
    m.GetAliases: FarIndex.aliases,
    m.ScanAliases: FarIndex.scan_aliases,
    m.DropAliases: FarIndex.drop_aliases,
    m.GetPackRow: FarIndex.get_pack_row,
    m.ReplacePackRow: FarIndex.replace_pack_row,
    m.RemovePack: FarIndex.remove_pack,
    m.GetChanges: FarIndex.changes,
}


class _Backlog:
    """How much has been read and not been carried out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._bytes = 0

    def enter(self, size: int) -> None:
        """Returns when there is room."""
        with self._changed:
            while self._count >= _MOST_WAITING or (self._count and self._bytes + size > _MOST_WAITING_BYTES):
                self._changed.wait()
            self._count += 1
            self._bytes += size

    def leave(self, size: int) -> None:
        """Makes room."""
        with self._changed:
            self._count -= 1
            self._bytes -= size
            self._changed.notify_all()


Read = Callable[[int], bytes]
"""The next bytes from the client, at most so many; empty at the end."""
Write = Callable[[Sequence[bytes | bytearray | memoryview]], None]
"""Sends all of some pieces to the client, one behind the other."""


class _Stream:
    """One way to the client and back."""

    def __init__(self, read: Read, write: Write) -> None:
        self.read = read
        self._write = write
        self._writing = threading.Lock()
        self._ended = False

    def answer(self, number: int, message: m.Message) -> None:
        """Sends an answer; where the client is gone, nothing: the reader will see."""
        kind, body = m.encode_message(message)
        with self._writing, contextlib.suppress(OSError, ValueError):
            if self._ended:
                return
            self._write(encode_frames(number, kind, body))

    def end(self, close: Callable[[], None]) -> None:
        """Has its descriptors closed when nobody uses them, nor ever will: their numbers go to other files."""
        with self._writing:
            self._ended = True
            close()


class Descriptors(NamedTuple):
    """What several streams need.

    Args:
        own: descriptors of the input and the output that `read` and `write` use.
        opened: what reads and writes others; it has their ends closed by calling what it returns last.
    """

    own: tuple[int, int]
    opened: Callable[[int, int], tuple[Read, Write, Callable[[], None]]]


class _Pools(NamedTuple):
    in_order: ThreadPoolExecutor
    at_once: ThreadPoolExecutor


class FarSide:
    """See the module.

    Args:
        hosted: a repository that is open already (tests); usually the client names one.
        clock: Unix seconds, of this side.
        descriptors: None where a connection has one stream only.
    """

    def __init__(
        self,
        read: Read,
        write: Write,
        rights: Rights | None = None,
        hosted: Hosted | None = None,
        clock: Callable[[], float] = time.time,
        descriptors: Descriptors | None = None,
    ) -> None:
        self._stream = _Stream(read, write)
        self._rights = rights or Rights()
        self._place = FarPlace(self._rights, clock)
        if hosted is not None:
            self._place.hosted = hosted
        self._backlog = _Backlog()
        self._descriptors = descriptors
        self._door: Door | None = None
        self._turn = threading.Condition()  # guards what follows
        self._last = 0
        self._streams = 1
        self._heads: list[int] = []
        self._over = False
        self._greeted = False

    def run(self) -> None:
        """Serves the client until it goes. Raises nothing: what is wrong is told to the client."""
        with (
            ThreadPoolExecutor(1, "holdfast-packs") as in_order,
            ThreadPoolExecutor(_WORKERS, "holdfast-worker") as at_once,
        ):
            self._pools = _Pools(in_order, at_once)
            try:
                self._listen(self._stream)
            finally:
                self._take_no_more()
        if self._door is not None:
            self._door.close()
        self._place.close()

    def _listen(self, stream: _Stream) -> None:
        """Takes what comes on a stream until it ends."""
        decoder = Decoder()
        try:
            while data := stream.read(_READ_BYTES):
                for packet in decoder.feed(data):
                    if not self._accept(stream, packet):
                        return
            decoder.end()
        except ProtocolError as error:
            self._stream.answer(0, failure_of(error))  # there it is heard, whichever stream it is about
            self._take_no_more()
        except (OSError, ValueError):
            pass  # the client is gone

    def _take_no_more(self) -> None:
        with self._turn:
            self._over = True
            self._turn.notify_all()

    def _accept(self, stream: _Stream, packet: Packet) -> bool:
        """Has a request carried out when its turn has come; False if none will be any more.

        Raises:
            ProtocolError: no request with that number, or of that kind, may come now.
        """
        with self._turn:
            self._heads.append(packet.request)
            while packet.request > self._last + 1 and not self._over and not self._is_stuck():
                self._turn.wait()
            self._heads.remove(packet.request)
            if self._over:
                return False
            if packet.request != self._last + 1:
                raise ProtocolError(
                    f"request {packet.request} came behind {self._last}: something was lost, or sent twice"
                )
            self._last = packet.request
            try:
                return self._take(stream, packet)
            finally:
                self._turn.notify_all()

    def _is_stuck(self) -> bool:
        """Whether all streams are ahead of what has to come next, so that it never will."""
        return len(self._heads) >= self._streams and self._last + 1 not in self._heads

    def _take(self, stream: _Stream, packet: Packet) -> bool:
        """See `_accept`. Called with the lock held, so that requests are handed on in their order."""
        number, size = packet.request, packet.length
        request = m.decode_message(packet.kind, packet.body, packet.more)
        if not isinstance(request, m.Request):
            raise ProtocolError("a message is not a request")
        if not self._greeted:
            stream.answer(number, self._greet(request))
            return True
        if isinstance(request, m.Join):
            return self._join(request, number)
        self._backlog.enter(size)
        if type(request) in _IN_ORDER:
            self._pools.in_order.submit(self._carry_out, stream, number, request, size)
        elif isinstance(request, m.SyncWriter):  # behind what was appended before, beside what comes after
            self._pools.in_order.submit(
                lambda: self._pools.at_once.submit(self._carry_out, stream, number, request, size)
            )
        elif self._place.handles(request):  # what comes behind it finds it done
            self._carry_out(stream, number, request, size)
        else:
            self._pools.at_once.submit(self._carry_out, stream, number, request, size)
        return True

    # --- several streams

    def _join(self, request: m.Join, number: int) -> bool:
        """Hands the only stream over to the process that serves the connection to join; False when that is over."""
        try:
            if self._descriptors is None or number != 2:
                raise ProtocolError("this connection can not join another one")
            hand_over(request, self._rights.encode(), self._descriptors.own)
        except ProtocolError as error:
            self._stream.answer(number, failure_of(error))
            return True
        return False

    def _invite(self) -> m.Invitation:
        if self._descriptors is None:
            raise ProtocolError("no further streams can be taken here")
        with self._turn:
            if self._door is None:
                self._door = Door(self._rights.encode(), self._admit)
            return self._door.invitation

    def _admit(self, descriptor_in: int, descriptor_out: int, let_go: Callable[[], None]) -> None:
        """Takes a further stream in."""
        assert self._descriptors is not None
        read, write, close = self._descriptors.opened(descriptor_in, descriptor_out)
        stream = _Stream(read, write)

        def listen() -> None:
            try:
                self._listen(stream)
            finally:
                with self._turn:
                    self._streams -= 1
                    self._turn.notify_all()
                stream.end(close)
                let_go()

        with self._turn:
            if self._over:
                close()
                let_go()
                return
            self._streams += 1
        stream.answer(2, m.Done())
        threading.Thread(target=listen, name="holdfast-stream", daemon=True).start()

    # --- requests

    def _greet(self, request: m.Message) -> m.Message:
        if not isinstance(request, m.Hello):
            raise ProtocolError("the first message is no greeting")
        if not request.least <= m.VERSION <= request.most:
            raise ProtocolError(
                f"the client speaks versions {request.least} to {request.most} of the protocol, "
                f"Holdfast {SOFTWARE} here speaks {m.VERSION}",
                hint="use the same version of Holdfast on both sides",
            )
        self._greeted = True
        return m.Welcome(m.VERSION, f"Holdfast {SOFTWARE}", self._rights.append_only, self._rights.read_only)

    def _carry_out(self, stream: _Stream, number: int, request: m.Message, size: int) -> None:
        try:
            answer = self._outcome(request)
        except BaseException as error:  # noqa: BLE001 - whoever asked is told, and nobody else can be
            answer = failure_of(error)
        finally:
            self._backlog.leave(size)
        stream.answer(number, answer)

    def _outcome(self, request: m.Message) -> m.Message:
        self._rights.require(request)
        kind = type(request)
        if kind is m.Ping:
            return m.Done()
        if kind is m.Hello:
            raise ProtocolError("one greeting is enough")
        if kind is m.Invite:
            return self._invite()
        handler = _IN_ORDER.get(kind) or _ON_PACKS.get(kind)
        if handler is not None:
            return handler(self._place.hosted.require_packs(), request)
        handler = _ON_INDEX.get(kind)
        if handler is not None:
            return handler(self._place.hosted.require_index(), request)
        return self._place.handle(request)
