"""Where packs are kept: a small Protocol, and its implementation on a local file system.

A pack has exactly one writer in its life. The writer holds it exclusively (a lock of the operating
system that ends with the process); whoever finds a pack unlocked and not sealed knows that its writer is
gone, and may adopt it to finish it. A sealed pack never changes, so it maps to one object of an object
store. This module moves bytes; what they mean is the business of `repo.format.record`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Final, Protocol, cast

from holdfast.errors import DamagedData, InternalError, StorageError, storage_error
from holdfast.ids import PACK_ID_BYTES, PackId
from holdfast.repo.appender import Appender

__all__ = ["LocalPackStore", "PackStore", "PackWriter"]

_OPEN_FILES: Final = 64
_KEEP_SIZE: Final = 1  # linux/falloc.h
_PUNCH_HOLE: Final = 2
_PACK_NAME: Final = re.compile(rf"[0-9a-f]{{{2 * PACK_ID_BYTES}}}\.pack\Z")


class PackWriter(Protocol):
    """An exclusive hold on one pack that is not sealed. Not thread-safe but for `sync`."""

    @property
    def id(self) -> PackId:
        """The pack."""
        ...

    @property
    def length(self) -> int:
        """Its length in bytes, with all that was appended."""
        ...

    def append(self, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        """Appends all parts in order and returns the offset of the first.

        Durability: none before `sync`; nobody may rely on reading it before, either.

        Raises:
            StorageError: this or something appended before can not be written. Nothing more can be appended
                or synced then; what was synced before is unharmed.
        """
        ...

    def cut(self, length: int) -> None:
        """Drops all bytes from `length` on."""
        ...

    def sync(self) -> None:
        """Makes everything appended before the call durable, and the pack's existence too.

        May run beside `append`. After a failure the pack must not be appended to any more: the
        operating system may have dropped what it could not write.
        """
        ...

    def close(self) -> None:
        """Ends the hold. May be called twice."""
        ...


class PackStore(Protocol):
    """A set of packs. Thread-safe."""

    def create(self, pack_id: PackId) -> PackWriter:
        """A new, empty pack, held exclusively."""
        ...

    def adopt(self, pack_id: PackId) -> PackWriter | None:
        """Takes over a pack whose writer is gone; None while there is one, or if there is no pack."""
        ...

    def read(self, pack_id: PackId, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on.

        Raises:
            DamagedData: the pack does not exist or ends before.
            StorageError: it can not be read.
        """
        ...

    def length(self, pack_id: PackId) -> int | None:
        """The pack's length in bytes, or None if it does not exist."""
        ...

    def sync(self, pack_id: PackId) -> None:
        """Makes a pack durable as it is now, whoever has written it.

        Raises:
            StorageError: it does not exist, or can not be made durable.
        """
        ...

    def ids(self) -> Iterator[PackId]:
        """All packs, in no particular order."""
        ...

    def delete(self, pack_id: PackId) -> None:
        """Removes a pack. It is no error if it does not exist."""
        ...

    def free_bytes(self) -> int:
        """How much more could be stored, in bytes."""
        ...

    def allocated_bytes(self, pack_id: PackId) -> int:
        """What a pack takes up, without its holes; 0 if it does not exist."""
        ...

    def can_punch(self) -> bool:
        """Whether `punch` is worth trying."""
        ...

    def punch(self, pack_id: PackId, ranges: Sequence[tuple[int, int]]) -> None:
        """Gives the bytes in the ranges (start, end) back to the file system; all of them read as zeros then.

        Durability: on disk on return. Where the file system can not, nothing happens.
        """
        ...

    def close(self) -> None:
        """Releases what is held open."""
        ...


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """The C library's function of that name, which Python does not offer with its flags."""
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate64
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", function)


def sync_folder(path: str) -> None:
    """Makes the entries of a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _LocalPackWriter:
    """A pack file, open for appending and locked."""

    def __init__(self, pack_id: PackId, path: str, fd: int, length: int, *, new: bool) -> None:
        self._id = pack_id
        self._path = path
        self._fd = fd
        self._length = length
        self._new = new
        self._failure: StorageError | None = None
        self._appender = Appender(fd, path, length)

    @property
    def id(self) -> PackId:
        return self._id

    @property
    def length(self) -> int:
        return self._length

    def append(self, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        self._require_usable()
        start = self._length
        try:
            self._appender.append(parts)
        except OSError as error:
            raise self._failed(error, "writing") from error
        self._length += sum(map(len, parts))
        return start

    def _require_usable(self) -> None:
        if self._failure is not None:  # another thread may have met it first; it is still the storage's
            raise self._failure
        if self._fd < 0:
            raise InternalError("a pack was written to after it was closed")

    def _failed(self, error: OSError, doing: str) -> StorageError:
        self._failure = self._failure or storage_error(error, f"{doing} {self._path}")
        return self._failure

    def cut(self, length: int) -> None:
        self._require_usable()
        try:
            self._appender.drain()
            self._appender.close()
            os.ftruncate(self._fd, length)
        except OSError as error:
            raise self._failed(error, "shortening") from error
        self._appender = Appender(self._fd, self._path, length)
        self._length = length

    def sync(self) -> None:
        self._require_usable()
        try:
            self._appender.drain()
            os.fdatasync(self._fd)
            if self._new:
                folder = os.path.dirname(self._path)
                sync_folder(folder)
                sync_folder(os.path.dirname(folder))
                self._new = False
        except OSError as error:
            raise self._failed(error, "syncing") from error

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._appender.drain()
            self._appender.close()
            os.close(self._fd)
            self._fd = -1


class LocalPackStore:
    """Packs as files `ab/<id>.pack` below a folder, `ab` being the id's first byte.

    Args:
        folder: must exist.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._readers: OrderedDict[PackId, int] = OrderedDict()
        self._busy: dict[int, int] = {}
        self._can_punch = True
        self._lock = threading.Lock()

    def path(self, pack_id: PackId) -> str:
        """Where a pack is, or would be."""
        name = pack_id.hex()
        return os.path.join(self._folder, name[:2], name + ".pack")

    def create(self, pack_id: PackId) -> PackWriter:
        """See `PackStore.create`."""
        path = self.path(pack_id)
        while True:
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(os.path.dirname(path))
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            except OSError as error:
                raise storage_error(error, f"creating {path}") from error
            # Until it is locked, another process may take the empty file for one whose writer has died.
            if self._lock_file(fd, path, wait=True):
                return _LocalPackWriter(pack_id, path, fd, 0, new=True)

    @staticmethod
    def _lock_file(fd: int, path: str, *, wait: bool) -> bool:
        """Locks a pack's file; False (and closed) if another holds it, or it is not at its path any more."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            os.close(fd)
            raise storage_error(error, f"locking {path}") from error
        os.close(fd)
        return False

    def adopt(self, pack_id: PackId) -> PackWriter | None:
        """See `PackStore.adopt`."""
        path = self.path(pack_id)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error
        if not self._lock_file(fd, path, wait=False):
            return None
        return _LocalPackWriter(pack_id, path, fd, os.fstat(fd).st_size, new=True)

    @contextlib.contextmanager
    def _reader(self, pack_id: PackId) -> Iterator[int]:
        """A descriptor for reading; it stays open while in use even if the cache drops it."""
        with self._lock:
            fd = self._readers.get(pack_id, -1)
            if fd < 0:
                try:
                    fd = os.open(self.path(pack_id), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise DamagedData(f"pack {pack_id.hex()} is missing") from None
                except OSError as error:
                    raise storage_error(error, f"opening {self.path(pack_id)}") from error
                self._readers[pack_id] = fd
            self._readers.move_to_end(pack_id)
            self._busy[fd] = self._busy.get(fd, 0) + 1
        try:
            yield fd
        finally:
            with self._lock:
                self._busy[fd] -= 1
                self._trim()

    def _trim(self) -> None:
        for pack_id in list(self._readers)[: max(0, len(self._readers) - _OPEN_FILES)]:
            fd = self._readers[pack_id]
            if not self._busy.get(fd):
                self._busy.pop(fd, None)
                del self._readers[pack_id]
                os.close(fd)

    def read(self, pack_id: PackId, offset: int, length: int) -> bytes:
        """See `PackStore.read`."""
        with self._reader(pack_id) as fd:
            try:
                data = os.pread(fd, length, offset)
                while len(data) < length:
                    more = os.pread(fd, length - len(data), offset + len(data))
                    if not more:
                        raise DamagedData(
                            f"pack {pack_id.hex()} ends at byte {offset + len(data)}, more was expected"
                        )
                    data += more
            except OSError as error:
                if error.errno == errno.EIO:
                    raise StorageError(
                        f"the disk failed to read pack {pack_id.hex()} at byte {offset} ({error.strerror})",
                        hint="look at the kernel's log and the disk's health",
                    ) from error
                raise storage_error(error, f"reading {self.path(pack_id)}") from error
        return data

    def length(self, pack_id: PackId) -> int | None:
        """See `PackStore.length`."""
        try:
            return os.stat(self.path(pack_id)).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, f"looking at {self.path(pack_id)}") from error

    def sync(self, pack_id: PackId) -> None:
        """See `PackStore.sync`."""
        path = self.path(pack_id)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
            sync_folder(os.path.dirname(path))
            sync_folder(self._folder)
        except OSError as error:
            raise storage_error(error, f"syncing {path}") from error

    def ids(self) -> Iterator[PackId]:
        """See `PackStore.ids`. Files with other names are none of our packs and passed over."""
        try:
            for folder in sorted(os.listdir(self._folder)):
                if len(folder) != 2:
                    continue
                try:
                    names = sorted(os.listdir(os.path.join(self._folder, folder)))
                except NotADirectoryError:
                    continue
                for name in names:
                    if _PACK_NAME.match(name) and name[:2] == folder:
                        yield PackId(bytes.fromhex(name[: 2 * PACK_ID_BYTES]))
        except OSError as error:
            raise storage_error(error, f"listing {self._folder}") from error

    def delete(self, pack_id: PackId) -> None:
        """See `PackStore.delete`."""
        with self._lock:
            fd = self._readers.get(pack_id, -1)
            if fd >= 0 and not self._busy.get(fd):
                self._busy.pop(fd, None)
                del self._readers[pack_id]
                os.close(fd)
        try:
            os.unlink(self.path(pack_id))
            sync_folder(os.path.dirname(self.path(pack_id)))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, f"removing {self.path(pack_id)}") from error

    def free_bytes(self) -> int:
        """See `PackStore.free_bytes`."""
        try:
            status = os.statvfs(self._folder)
        except OSError as error:
            raise storage_error(error, f"looking at {self._folder}") from error
        return status.f_bavail * status.f_frsize

    def allocated_bytes(self, pack_id: PackId) -> int:
        """See `PackStore.allocated_bytes`."""
        try:
            return os.stat(self.path(pack_id)).st_blocks * 512
        except OSError:
            return 0

    def can_punch(self) -> bool:
        """See `PackStore.can_punch`."""
        return self._can_punch and _fallocate() is not None

    def punch(self, pack_id: PackId, ranges: Sequence[tuple[int, int]]) -> None:
        """See `PackStore.punch`."""
        fallocate = _fallocate()
        if fallocate is None or not ranges:
            return
        path = self.path(pack_id)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                for start, end in ranges:
                    if fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, start, end - start):
                        code = ctypes.get_errno()
                        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                            self._can_punch = False
                            return
                        raise OSError(code, os.strerror(code))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(error, f"giving back a part of {path}") from error

    def close(self) -> None:
        """See `PackStore.close`."""
        with self._lock:
            for fd in self._readers.values():
                os.close(fd)
            self._readers.clear()
            self._busy.clear()
