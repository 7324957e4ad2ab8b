"""The far side of a connection: takes requests, carries them out, answers; one repository, one client, one process.

One thread reads, and carries out what concerns the place itself (opening, locks) before it reads on. What concerns an open pack is
carried out in the order in which it came, by one other thread; everything else by a few at once, since a question need not wait for the one before it. The reader takes no more requests than are bounded by
number and size, so a client that sends faster than the disk writes is slowed down by its own connection.

What is broken is refused, once, with the reason, and the connection ends: a frame that is none, a request number that is not the next
one (something was lost, sent twice or put in), a message that is too long or not what it should be. A request that may not be
carried out is refused alone.

At the end, however it comes, packs, locks and index are let go of.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from holdfast.errors import ProtocolError
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.far_index import FarIndex
from holdfast.repo.wire.far_packs import FarPacks
from holdfast.repo.wire.far_place import FarPlace, Hosted
from holdfast.repo.wire.faults import failure_of
from holdfast.repo.wire.frames import Decoder, Packet, encode_frames
from holdfast.repo.wire.rights import Rights
from holdfast.version import VERSION as SOFTWARE

__all__ = ["FarSide"]

_READ_BYTES: Final = 256 * 1024
_WORKERS: Final = 4
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


class FarSide:
    """See the module.

    Args:
        read: the next bytes from the client; empty at the end.
        write: sends all bytes to the client.
        hosted: a repository that is open already (tests); usually the client names one.
        clock: Unix seconds, of this side.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        write: Callable[[bytes | bytearray | memoryview], None],
        rights: Rights | None = None,
        hosted: Hosted | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._write = write
        self._rights = rights or Rights()
        self._place = FarPlace(self._rights, clock)
        if hosted is not None:
            self._place.hosted = hosted
        self._writing = threading.Lock()
        self._backlog = _Backlog()
        self._last = 0
        self._greeted = False

    def run(self) -> None:
        """Serves the client until it goes. Raises nothing: what is wrong is told to the client."""
        decoder = Decoder()
        with (
            ThreadPoolExecutor(1, "holdfast-packs") as in_order,
            ThreadPoolExecutor(_WORKERS, "holdfast-worker") as at_once,
        ):
            try:
                while data := self._read(_READ_BYTES):
                    for packet in decoder.feed(data):
                        self._accept(packet, in_order, at_once)
                decoder.end()
            except ProtocolError as error:
                self._answer(0, failure_of(error))
            except (OSError, ValueError):
                pass  # the client is gone
        self._place.close()

    def _accept(self, packet: Packet, in_order: ThreadPoolExecutor, at_once: ThreadPoolExecutor) -> None:
        if packet.request != self._last + 1:
            raise ProtocolError(
                f"request {packet.request} came behind {self._last}: something was lost, or sent twice"
            )
        self._last = packet.request
        request = m.decode_message(packet.kind, packet.body)
        if not isinstance(request, m.Request):
            raise ProtocolError("a message is not a request")
        if not self._greeted:
            self._answer(packet.request, self._greet(request))
            return
        size = len(packet.body)
        self._backlog.enter(size)
        if type(request) in _IN_ORDER:
            in_order.submit(self._carry_out, packet.request, request, size)
        elif isinstance(request, m.SyncWriter):  # behind what was appended before, beside what comes after
            number = packet.request
            in_order.submit(lambda: at_once.submit(self._carry_out, number, request, size))
        elif self._place.handles(request):  # what comes behind it finds it done
            self._carry_out(packet.request, request, size)
        else:
            at_once.submit(self._carry_out, packet.request, request, size)

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

    def _carry_out(self, number: int, request: m.Message, size: int) -> None:
        try:
            answer = self._outcome(request)
        except BaseException as error:  # noqa: BLE001 - whoever asked is told, and nobody else can be
            answer = failure_of(error)
        finally:
            self._backlog.leave(size)
        self._answer(number, answer)

    def _outcome(self, request: m.Message) -> m.Message:
        self._rights.require(request)
        kind = type(request)
        if kind is m.Ping:
            return m.Done()
        if kind is m.Hello:
            raise ProtocolError("one greeting is enough")
        handler = _IN_ORDER.get(kind) or _ON_PACKS.get(kind)
        if handler is not None:
            return handler(self._place.hosted.require_packs(), request)
        handler = _ON_INDEX.get(kind)
        if handler is not None:
            return handler(self._place.hosted.require_index(), request)
        return self._place.handle(request)

    def _answer(self, number: int, message: m.Message) -> None:
        kind, body = m.encode_message(message)
        with (
            self._writing,
            contextlib.suppress(OSError, ValueError),
        ):  # the client is gone; the reader will see
            for piece in encode_frames(number, kind, body):
                self._write(piece)
