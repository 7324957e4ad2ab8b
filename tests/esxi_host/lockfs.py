"""The datastores as a session sees them: the real files, but for those that ESXi would not let it open.

A pass-through file system. `open` refuses with EBUSY what a running VM holds, and a write to what it holds read-only; it is
the kernel that says so to any program, whatever it was written in. Faults of the datastore (ENOSPC, EIO, EBUSY later,
slow reads) act here as well. hostd itself works on the files beside this view.

Nothing is cached but by the page cache of an open file, so a file that hostd makes, grows or removes is seen at once.
SEEK_HOLE is not passed on, and no block map is: VMFS has no such call for a shell, so holes read as zeros.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Any, NoReturn

from mfusepy import FUSE, FuseOSError, Operations  # type: ignore[import-untyped]

from tests.esxi_host.locks import Board

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_TRUNC
_STAT_FIELDS = (
    *(
        "st_mode",
        "st_nlink",
        "st_uid",
        "st_gid",
        "st_size",
        "st_ino",
        "st_dev",
        "st_rdev",
        "st_blocks",
        "st_blksize",
    ),
)
_TIMES = ("st_atime", "st_mtime", "st_ctime")


class LockView(Operations):  # type: ignore[misc]
    """A folder of volumes, with locks."""

    use_ns = True

    def __init__(self, folder: str, board: Board, ready: int) -> None:
        self._folder = folder
        self._board = board
        self._ready = ready
        self._names: dict[int, str] = {}
        self._used: dict[str, tuple[float, int]] = {}

    # --- rules

    def _real(self, path: str) -> str:
        return self._folder + path

    def _key(self, path: str) -> str:
        """The path as the rules name it: below a volume's id, never below its name."""
        volume, _, rest = path[1:].partition("/")
        link = os.path.join(self._folder, volume)
        if os.path.islink(link):
            volume = os.readlink(link)
        return f"{volume}/{rest}" if rest else volume

    def _check_open(self, path: str, *, writing: bool) -> None:
        rules = self._board.rules()
        key = self._key(path)
        if key in rules.exclusive or (writing and key in rules.read_only):
            raise FuseOSError(errno.EBUSY)

    def _check_room(self, path: str, length: int) -> None:
        rules = self._board.rules()
        volume = self._key(path).partition("/")[0]
        if volume in rules.full:
            raise FuseOSError(errno.ENOSPC)
        capacity = rules.capacities.get(volume)
        if capacity is not None and self._used_bytes(volume, length) > capacity:
            raise FuseOSError(errno.ENOSPC)

    def _used_bytes(self, volume: str, more: int) -> int:
        """Bytes in use, counted anew twice a second; what is written in between is added."""
        now = time.monotonic()
        counted_s, used = self._used.get(volume, (-1.0, 0))
        if now - counted_s > 0.5:
            counted_s, used = now, used_bytes(os.path.join(self._folder, volume))
        self._used[volume] = (counted_s, used + more)
        return used + more

    # --- files

    def init(self, path: str) -> None:
        if self._ready >= 0:
            os.write(self._ready, b"1")
            os.close(self._ready)
            self._ready = -1

    def open(self, path: str, flags: int) -> int:
        self._check_open(path, writing=bool(flags & _WRITING))
        number = os.open(self._real(path), flags & ~os.O_APPEND)
        self._names[number] = path
        return number

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._check_open(path, writing=True)
        self._check_room(path, 0)
        number = os.open(self._real(path), os.O_RDWR | os.O_CREAT, mode)
        self._names[number] = path
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        rules = self._board.rules()
        if rules.read_delay_s:
            time.sleep(rules.read_delay_s)
        if rules.read_error and path.endswith(rules.read_error):
            raise FuseOSError(errno.EIO)
        if rules.busy_at_bytes is not None and self._board.read_bytes >= rules.busy_at_bytes:
            raise FuseOSError(errno.EBUSY)
        if rules.busy_reads and self._key(path) in rules.exclusive:
            raise FuseOSError(errno.EBUSY)
        data = os.pread(fh, size, offset)
        self._board.count(len(data))
        return data

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._check_room(path, len(data))
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        self._check_open(path, writing=True)
        os.truncate(self._real(path), length)

    def flush(self, path: str, fh: int) -> None:
        pass

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        (os.fdatasync if datasync else os.fsync)(fh)

    def release(self, path: str, fh: int) -> None:
        self._names.pop(fh, None)
        os.close(fh)

    # --- names

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._real(path))
        answer: dict[str, Any] = {name: getattr(found, name) for name in _STAT_FIELDS}
        for name in _TIMES:
            answer[name] = getattr(found, name + "_ns")
        return answer

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._real(path))]

    def readlink(self, path: str) -> str:
        return os.readlink(self._real(path))

    def access(self, path: str, amode: int) -> None:
        if not os.path.lexists(self._real(path)):
            raise FuseOSError(errno.ENOENT)

    def mkdir(self, path: str, mode: int) -> None:
        self._check_room(path, 0)
        os.mkdir(self._real(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._real(path))

    def unlink(self, path: str) -> None:
        self._check_open(path, writing=True)
        os.unlink(self._real(path))

    def rename(self, old: str, new: str) -> None:
        self._check_open(old, writing=True)
        self._check_open(new, writing=True)
        os.rename(self._real(old), self._real(new))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._real(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._real(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._real(path), ns=times) if times else os.utime(self._real(path))

    def symlink(self, target: str, source: str) -> NoReturn:
        raise FuseOSError(errno.EPERM)  # VMFS has symbolic links, but nobody makes one through a shell

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._real(path))
        rules = self._board.rules()
        volume = self._key(path).partition("/")[0]
        answer = {
            name: getattr(found, name) for name in ("f_bsize", "f_frsize", "f_files", "f_ffree", "f_namemax")
        }
        capacity = rules.capacities.get(volume)
        free = found.f_bavail * found.f_frsize
        if capacity is not None:
            free = 0 if volume in rules.full else max(0, capacity - self._used_bytes(volume, 0))
        total = found.f_blocks * found.f_frsize if capacity is None else capacity
        unit = found.f_frsize
        return answer | {"f_blocks": total // unit, "f_bfree": free // unit, "f_bavail": free // unit}


def used_bytes(folder: str) -> int:
    """Bytes that the files of a volume occupy."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def serve(folder: str, mountpoint: str, board: Board, ready: int) -> None:
    """Serves the view until it is unmounted or its process ends; a byte comes over `ready` when it is there."""
    FUSE(
        LockView(folder, board, ready),
        mountpoint,
        foreground=True,
        nothreads=False,
        allow_other=True,
        default_permissions=True,
        fsname="vmfs",
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
    )
