"""Open files for reading, with a bound on how many are open at a time.

A VM folder may hold thousands of files, and a disk of 2 TiB a thousand extents of 2 GiB, while a
process may hold 1024 files open. So a file that has not been read for a while is closed, and opened
again when it is read next.

Invariants: a lent descriptor stays open until it is given back; a file that is opened again is the
same one (device and inode), or reading it fails with `SourceChanged`. Does not read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from holdfast.errors import (
    InternalError,
    SourceChanged,
    SourceError,
    SourceNotFound,
    SourceUnreadable,
    SourceUnsupported,
)
from holdfast.esxi.names import printable

__all__ = ["FilePool", "SharedFile", "source_error"]

_OPEN_FILES: Final = 256
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def source_error(error: OSError, path: str) -> SourceError:
    """The error that says what an `OSError` on reading `path` means to the user."""
    reason = error.strerror or str(error)
    if error.errno in _ABSENT:
        return SourceNotFound(f"{printable(path)} does not exist", hint="check the path for a typing error")
    hint = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "run the backup as a user that may read it"
    elif error.errno in (errno.EBUSY, errno.ETXTBSY):
        hint = "a running VM locks its disks: take a snapshot first, or power the VM off"
    return SourceUnreadable(f"{printable(path)} can not be read ({reason})", hint=hint)


class FilePool:
    """Keeps at most about `limit` files open; those in use are never closed."""

    def __init__(self, limit: int = _OPEN_FILES) -> None:
        self.lock = threading.Lock()
        self._limit = limit
        self._open: OrderedDict[SharedFile, None] = OrderedDict()

    def note_use(self, file: SharedFile) -> None:
        """Marks `file` as the most recently used, and closes the oldest idle ones beyond the limit."""
        self._open[file] = None
        self._open.move_to_end(file)
        if len(self._open) > self._limit:
            self.close_idle(len(self._open) - self._limit)

    def forget(self, file: SharedFile) -> None:
        """Takes `file` out, because it has been closed."""
        self._open.pop(file, None)

    def close_idle(self, count: int) -> None:
        """Closes up to `count` files that nobody reads at the moment, the longest unused first."""
        for file in [one for one in self._open if one.idle][:count]:
            file.release_descriptor()
            del self._open[file]


_POOL: Final = FilePool()


class SharedFile:
    """One file, opened for reading now and again later if it must be.

    Args:
        path: what to open.
        devices: whether a block device will do, too.
        follow: whether a symbolic link as the last component is followed.
        pool: shared with all others whose number is to be bounded together.

    Raises:
        SourceNotFound: there is nothing.
        SourceUnsupported: it is a folder, pipe, socket or character device (or a block device where
            none is allowed). A pipe is never waited for.
        SourceUnreadable: any other failure to open it.
    """

    def __init__(
        self, path: str, *, devices: bool = True, follow: bool = True, pool: FilePool = _POOL
    ) -> None:
        self.path = path
        self._pool = pool
        self._devices = devices
        self._flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        if not follow:
            self._flags |= os.O_NOFOLLOW
        self._users = 0
        self._closed = False
        try:
            # Before opening: merely opening a tape or a watchdog device has effects.
            self._require_kind(os.stat(path, follow_symlinks=follow))
        except (OSError, ValueError) as error:
            raise _translated(error, path) from None
        with pool.lock:
            self._descriptor = self._open()
            self.status: Final = os.fstat(self._descriptor)
            pool.note_use(self)

    @property
    def idle(self) -> bool:
        """Whether nobody holds the descriptor at the moment."""
        return self._users == 0

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """Lends an open descriptor. Several threads may hold it at once; nobody may rely on its position.

        Raises:
            SourceChanged: the file was replaced or removed since it was opened first.
            SourceUnreadable: it can not be opened again.
        """
        with self._pool.lock:
            if self._closed:
                raise InternalError(f"{self.path} is read after it was closed")
            if self._descriptor < 0:
                self._descriptor = self._open_again()
            self._users += 1
            self._pool.note_use(self)
        try:
            yield self._descriptor
        finally:
            self._give_back()

    def close(self) -> None:
        """Closes the file as soon as nobody reads it any more. May be called twice."""
        with self._pool.lock:
            self._closed = True
            self._pool.forget(self)
            if self._users == 0:
                self.release_descriptor()

    def release_descriptor(self) -> None:
        """Closes the descriptor (with the pool's lock held); `descriptor()` opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _give_back(self) -> None:
        with self._pool.lock:
            self._users -= 1
            if self._closed and self._users == 0:
                self.release_descriptor()

    def _open(self) -> int:
        try:
            descriptor = self._open_making_room()
        except (OSError, ValueError) as error:
            raise _translated(error, self.path) from None
        try:
            self._require_kind(os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_making_room(self) -> int:
        try:
            return os.open(self.path, self._flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._pool.close_idle(_OPEN_FILES)
        return os.open(self.path, self._flags)

    def _open_again(self) -> int:
        try:
            descriptor = self._open()
        except SourceNotFound:
            raise SourceChanged(f"{printable(self.path)} was removed while it was read") from None
        now = os.fstat(descriptor)
        if (now.st_dev, now.st_ino) != (self.status.st_dev, self.status.st_ino):
            os.close(descriptor)
            raise SourceChanged(f"{printable(self.path)} was replaced by another file while it was read")
        return descriptor

    def _require_kind(self, status: os.stat_result) -> None:
        mode = status.st_mode
        if stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and self._devices):
            return
        raise SourceUnsupported(
            f"{printable(self.path)} is {_kind_of(mode)}",
            hint="name a VM folder, a .vmx, a .vmdk, a raw image or a block device",
        )


def _kind_of(mode: int) -> str:
    for test, words in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISLNK, "a symbolic link"),
    ):
        if test(mode):
            return f"{words}, which is not read here"
    return "neither a file nor a block device"


def _translated(error: OSError | ValueError, path: str) -> SourceError:
    if isinstance(error, OSError):
        return source_error(error, path)
    return SourceNotFound(f"{printable(path)} is no possible path")  # a NUL character
