"""When a repository took each restore point in, by the clock of the side where it lies: the file `packs/receipts`.

A manifest says when its backup began, but by the clock of whoever made it, and that may be a hostile client. So whoever
lists a point in the index, and so `serve` for all of its clients, notes here when that was, and puts it into the point's
row. The file outlives the index: a rebuild reads it.

Invariants:
- An entry is on disk before its point is listed. A point that is listed a second time (by another machine's index, after
  a crash, by a rebuild) keeps the receipt of its first time.
- What was listed before there was such a file has the receipt 0, and its manifest's claim counts. Whatever a rebuild finds
  besides was never listed (somebody has appended it): it is received now, and not when it claims.
- An entry can not be chosen, altered or removed over a connection.

If there is no room for an entry, the row alone has the receipt: a full disk must not keep a collection from going on.
Where the file is lost or damaged, nothing but receipts is: claims count again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from holdfast.errors import DiskFull, storage_error
from holdfast.ids import PointId, RepositoryId
from holdfast.repo.format.receipt import BEGINNING, ReadReceipts, decode_receipts, encode_receipt
from holdfast.repo.packs import sync_folder

__all__ = ["RECEIPTS_FILE", "ReceiptFile", "Receipts"]

RECEIPTS_FILE: Final = "receipts"
"""Beside the packs, so that a copy of these has it too."""

Listed = Callable[[], Iterable[tuple[PointId, int]]]
"""The points that are listed, each with the receipt that its row has."""


class Receipts(Protocol):
    """Where receipts are kept."""

    def receive(self, point: PointId, listed: Listed) -> int:
        """When a point was taken in, which is now if it never was: Unix milliseconds; 0 if only its manifest says.

        Durability: it is noted on disk on return, but where there is no room.

        Raises:
            StorageError: it can not be noted.
        """
        ...


class ReceiptFile:
    """See the module. Thread-safe, and safe between processes.

    Args:
        folder: of the packs.
        clock: Unix seconds, of this side.
        writable: otherwise nothing is noted.
        rebuilding: the index is being filled; nothing that was there before receipts were kept is received now.
    """

    def __init__(
        self,
        folder: str,
        repository: RepositoryId,
        clock: Callable[[], float] = time.time,
        *,
        writable: bool = True,
        rebuilding: bool = False,
    ) -> None:
        self._path = os.path.join(folder, RECEIPTS_FILE)
        self._repository = repository
        self._clock = clock
        self._writable = writable
        self._rebuilding = rebuilding
        self._known = ReadReceipts()
        self._known_bytes = 0
        self._lock = threading.Lock()

    def receive(self, point: PointId, listed: Listed) -> int:
        """See `Receipts.receive`."""
        with self._lock, self._held() as fd:
            if fd is None:
                return 0
            known = self._read(fd)
            if point in known.received_ms:
                return known.received_ms[point]
            if self._rebuilding and (BEGINNING not in known.received_ms or known.damaged):
                return 0
            now_ms = int(self._clock() * 1000)
            if self._writable:
                with contextlib.suppress(DiskFull):
                    self._append(fd, known, point, now_ms, listed)
            return now_ms

    @contextlib.contextmanager
    def _held(self) -> Iterator[int | None]:
        """The file, locked against other writers; None if there is none, and none is to be made now."""
        mode = os.O_RDWR | os.O_APPEND if self._writable else os.O_RDONLY
        make = os.O_CREAT if self._writable and not self._rebuilding else 0
        try:
            fd = os.open(self._path, mode | make | os.O_CLOEXEC, 0o640)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise storage_error(error, f"opening {self._path}") from error
        try:
            if self._writable:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX)  # whoever has it appends, syncs, and waits for nobody
                except OSError as error:
                    raise storage_error(error, f"locking {self._path}") from error
            yield fd
        finally:
            os.close(fd)

    def _read(self, fd: int) -> ReadReceipts:
        """What the file says; read anew only if it has changed."""
        try:
            size = os.fstat(fd).st_size
            if size != self._known_bytes:
                data = b""
                while len(data) < size and (piece := os.pread(fd, size - len(data), len(data))):
                    data += piece
                self._known = decode_receipts(self._repository, data)
                self._known_bytes = len(data)
        except OSError as error:
            raise storage_error(error, f"reading {self._path}") from error
        return self._known

    def _append(self, fd: int, known: ReadReceipts, point: PointId, now_ms: int, listed: Listed) -> None:
        """Adds an entry, behind all that the file should have and has not."""
        entries: list[tuple[PointId, int]] = []
        beginning = BEGINNING not in known.received_ms
        if beginning or known.damaged:
            entries += [entry for entry in listed() if entry[0] not in known.received_ms]
        if beginning:
            entries.append((BEGINNING, now_ms))
        entries.append((point, now_ms))
        data = memoryview(b"".join(encode_receipt(self._repository, *entry) for entry in entries))
        self._known_bytes = -1  # until all of it is there
        try:
            if known.sound_bytes < os.fstat(fd).st_size:  # torn: its writer died, and listed nothing
                os.ftruncate(fd, known.sound_bytes)
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
            if beginning:
                sync_folder(os.path.dirname(self._path))
        except OSError as error:
            raise storage_error(error, f"writing {self._path}") from error
