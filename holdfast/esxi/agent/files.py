# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""The files that the agent has open, and reading ranges of disks that are spread over them.

A disk with snapshots lies in several files; the near side has read its grain tables and says for each range which bytes
are where. Holes are the file system's own, where it tells (SEEK_DATA). Files are opened read-only unless they are to be
written to, and never created: nothing comes into being on the host but through its own tools.
"""

import errno
import os
import stat
import threading
from typing import Any, Callable, Dict, List, Tuple

_SEEK_DATA = getattr(os, "SEEK_DATA", None)
_SEEK_HOLE = getattr(os, "SEEK_HOLE", None)
_PREADV = getattr(os, "preadv", None)  # since Python 3.7
_STEP_BYTES = 512 << 10
_ZEROS = bytes(_STEP_BYTES)
_NO_HOLES = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE)

MAX_OPEN = 256


def as_bytes(path: str) -> bytes:
    """A path as the host has it. Python 3.5 and 3.6 encode it as ASCII where a session has no language set."""
    return path.encode("utf-8", "surrogateescape")


def as_text(path: bytes) -> str:
    """A path of the host, or a name, as it is sent."""
    return path.decode("utf-8", "surrogateescape")


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """All of it is in the file, from `offset` on; the host may take it piece by piece."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        offset += count
        data = data[count:]


def _ignored(_: int) -> None:
    """Does nothing."""


class File(object):
    """An open file.

    Args:
        follow: whether the path may be that of a link.
    """

    def __init__(self, path: str, writable: bool, follow: bool = True) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
        flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
        self.path = path
        self.descriptor = os.open(as_bytes(path), flags)
        status = os.fstat(self.descriptor)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            os.close(self.descriptor)
            raise OSError(errno.EINVAL, "not a file", path)
        self.size = status.st_size
        if stat.S_ISBLK(status.st_mode):
            self.size = os.lseek(self.descriptor, 0, os.SEEK_END)
        self.knows_holes = _SEEK_DATA is not None

    def require_length(self, end: int) -> None:
        """Raises OSError if the file does not reach up to `end`."""
        if end > self.size or (end > os.fstat(self.descriptor).st_size and self._is_regular()):
            raise OSError(errno.ENODATA, "the file ends before byte %d" % end, self.path)

    def data(self, start: int, end: int) -> List[Tuple[int, int]]:
        """The (start, end) of the ranges that may hold data; the rest are zeros."""
        if not self.knows_holes:
            return [(start, end)]
        found = []  # type: List[Tuple[int, int]]
        position = start
        while position < end:
            try:
                low = os.lseek(self.descriptor, position, _SEEK_DATA or 0)
                high = os.lseek(self.descriptor, low, _SEEK_HOLE or 0) if low < end else end
            except OSError as error:
                if error.errno == errno.ENXIO:
                    self.require_length(end)
                    break
                if error.errno not in _NO_HOLES:
                    raise
                self.knows_holes = False
                return [(start, end)]
            if low >= end:
                break
            position = min(max(high, low + 1), end)
            found.append((low, position))
        return found

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills the view with the bytes at `offset`."""
        done = 0
        while done < len(view):
            if _PREADV is not None:
                count = _PREADV(self.descriptor, [view[done:]], offset + done)
            else:
                data = os.pread(self.descriptor, min(_STEP_BYTES, len(view) - done), offset + done)
                count = len(data)
                view[done : done + count] = data
            if not count:
                raise OSError(errno.ENODATA, "the file ends at byte %d" % (offset + done), self.path)
            done += count

    def _is_regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self.descriptor).st_mode)


class Files(object):
    """The open files by their handles, small numbers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files = {}  # type: Dict[int, File]
        self._next = 0

    def open(self, path: str, writable: bool, follow: bool = True) -> Tuple[int, File]:
        """Opens a file and returns its handle and itself. Arguments are those of `File`."""
        with self._lock:
            if len(self._files) >= MAX_OPEN:
                raise OSError(errno.EMFILE, "too many files are open in the agent", path)
            file = File(path, writable, follow)
            while self._next in self._files:
                self._next = (self._next + 1) % 60000
            handle = self._next
            self._next = (self._next + 1) % 60000
            self._files[handle] = file
            return handle, file

    def get(self, handle: int) -> File:
        """The file with this handle; OSError if there is none."""
        with self._lock:
            file = self._files.get(handle)
        if file is None:
            raise OSError(errno.EBADF, "no file is open with the handle %d" % handle)
        return file

    def close(self, handle: int) -> None:
        """Closes the file with this handle. Nobody may be reading it."""
        file = self.get(handle)
        with self._lock:
            del self._files[handle]
        os.close(file.descriptor)

    def read(
        self,
        runs: List[Tuple[int, int, int]],
        view: memoryview,
        zeros: int,
        filled: Callable[[int], None] = _ignored,
    ) -> bool:
        """Fills the view with what the runs say; False if all of it is a hole, and then nothing was filled.

        Args:
            zeros: the handle that means zeros.
            filled: told now and then up to where the view is filled.
        """
        todo = []  # type: List[Tuple[int, Any, int, int]]
        position = 0
        for length, handle, offset in runs:
            if handle != zeros:
                file = self.get(handle)
                file.require_length(offset + length)
                shift = position - offset
                todo.extend(
                    (low + shift, file, low, high) for low, high in file.data(offset, offset + length)
                )
            position += length
        if not todo:
            return False
        done = 0
        for place, file, low, high in todo:
            _clear(view, done, place)
            done = place + high - low
            for start in range(place, done, _STEP_BYTES):
                stop = min(start + _STEP_BYTES, done)
                file.read_into(low + start - place, view[start:stop])
                filled(stop)
        _clear(view, done, position)
        return True


def _clear(view: memoryview, start: int, end: int) -> None:
    for place in range(start, end, _STEP_BYTES):
        stop = min(place + _STEP_BYTES, end)
        view[place:stop] = _ZEROS[: stop - place]
