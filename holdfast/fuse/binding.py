"""The binding to FUSE: what the kernel asks goes to the view, what the view answers goes to the kernel.

The only module that knows mfusepy (and through it libfuse 3, or 2 where that is all there is). It decides nothing but
what FUSE lets one decide: that the kernel may keep what it has read, since a path means the same bytes for as long as
the mount lives; how long it may believe that a name is there; and that a failure has an `errno`.

libfuse calls from threads of its own, several at the same time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from holdfast.errors import MissingLibrary, MountFailed
from holdfast.fuse.behind import LeftBehind
from holdfast.fuse.mountpoint import OPEN_ATTRIBUTE, PID_ATTRIBUTE, read_in_larger_pieces
from holdfast.fuse.view import BLOCK_BYTES

if TYPE_CHECKING:
    from holdfast.fuse.view import View

__all__ = ["MountOptions", "require_libfuse", "serve"]

_LIBRARIES: Final = ("libfuse3.so.4", "libfuse3.so.3", "libfuse.so.2")
_NAME_TIMEOUT_S: Final = 1
_ATTRIBUTES_TIMEOUT_S: Final = 60
_PREFERRED_BYTES: Final = 128 << 10
_KNOWS_MAX_THREADS: Final = (3, 12)
_PYBUF_WRITE: Final = 0x200
_POINT_ATTRIBUTE: Final = "user.holdfast.point"
_ENDED_BY_SIGNAL: Final = 8
"""What `fuse_main` returns when its loop did not end by itself."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount.

    Args:
        place: the folder.
        source: what the list of mounts shows: the repository.
        shared: other users may read it.
        size_bytes: what `df` shows.
        threads: that answer the kernel. More than one beside each core only wait for each other, since one at a time
            runs Python; unless they wait for another host.
    """

    place: str
    source: str
    shared: bool = False
    size_bytes: int = 0
    threads: int = 3


def require_libfuse() -> None:
    """Loads libfuse.

    Raises:
        MissingLibrary: it is not installed.
        MountFailed: the kernel knows no FUSE.
    """
    if not os.environ.get("FUSE_LIBRARY_PATH"):
        for name in _LIBRARIES:  # by its name: looking for files, as the binding does, starts processes
            try:
                ctypes.CDLL(name)
            except OSError:
                continue
            os.environ["FUSE_LIBRARY_PATH"] = name
            break
    try:
        import mfusepy  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise MissingLibrary(f"the Python package mfusepy is not installed ({error})") from None
    except (OSError, AttributeError) as error:
        raise MissingLibrary(
            f"libfuse can not be loaded ({error})", hint="install the package fuse3 (it brings libfuse3-3)"
        ) from None
    if not os.path.exists("/dev/fuse"):
        raise MountFailed(
            "there is no /dev/fuse: the kernel of this machine (or its container) offers no FUSE",
            hint="load it with 'modprobe fuse'; a container needs the device /dev/fuse and the right to mount",
        )


class _Operations:
    """What the binding calls. Methods that read or open are in `serve`'s subclass, where they can be quicker."""

    use_ns = True

    def __init__(self, view: View, options: MountOptions, ready: Callable[[], None]) -> None:
        self.view = view
        self._options = options
        self._ready = ready
        self._owner = os.geteuid(), os.getegid()

    def init(self, path: str) -> None:
        """The kernel has answered: the mount can be used."""
        del path
        self._ready()

    def getattr(self, path: str, handle: int | None = None) -> Mapping[str, int]:
        found = self.view.attributes(path, handle)
        return {
            "st_ino": found.inode,
            "st_mode": found.mode,
            "st_nlink": 1,
            "st_size": found.size_bytes,
            "st_blocks": found.blocks,
            "st_blksize": _PREFERRED_BYTES,
            "st_uid": self._owner[0],
            "st_gid": self._owner[1],
            "st_atime": found.mtime_ns,
            "st_mtime": found.mtime_ns,
            "st_ctime": found.mtime_ns,
        }

    def readdir(self, path: str, handle: int) -> Iterator[tuple[str, dict[str, int], int]]:
        del handle
        for name in (".", ".."):
            yield name, {"st_mode": stat.S_IFDIR}, 0
        for name, inode, kind in self.view.entries(path):
            yield name, {"st_ino": inode, "st_mode": kind}, 0

    def readlink(self, path: str) -> str:
        return self.view.target(path)

    def getxattr(self, path: str, name: str, *rest: int) -> bytes:
        del rest
        if name == PID_ATTRIBUTE and path == "/":
            return str(os.getpid()).encode()
        if name == OPEN_ATTRIBUTE and path == "/":
            return str(self.view.open_files).encode()
        if name == _POINT_ATTRIBUTE:
            point = self.view.point_of(path)
            if point is not None:
                return point.id.hex().encode()
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def listxattr(self, path: str) -> list[str]:
        if path == "/":
            return [PID_ATTRIBUTE, OPEN_ATTRIBUTE]
        return [_POINT_ATTRIBUTE] if self.view.point_of(path) is not None else []

    def statfs(self, path: str) -> Mapping[str, int]:
        del path
        blocks = -(-self._options.size_bytes // BLOCK_BYTES)
        return {"f_bsize": BLOCK_BYTES, "f_frsize": BLOCK_BYTES, "f_blocks": blocks, "f_namemax": 255}

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.view.open(path)

    def release(self, path: str, handle: int) -> int:
        del path
        self.view.close(handle)
        return 0

    def read(self) -> None:
        """Asked for by name only: `serve` has what is called."""

    lseek = read


def serve(view: View, options: MountOptions, ready: Callable[[], None]) -> None:
    """Mounts, and serves until it is unmounted or the process is told to end (SIGTERM, SIGINT, SIGHUP).

    Must be called from the main thread. Whatever libfuse says on stderr until it is ready becomes part of the error.

    Args:
        ready: called once, from another thread, when the mount can be used.

    Raises:
        MountFailed: it can not be mounted.
    """
    require_libfuse()
    import mfusepy

    memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
    memory_at.restype = ctypes.py_object
    memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)

    class Fuse(mfusepy.FUSE):  # type: ignore[misc,no-any-unimported,unused-ignore]
        """Reads straight into libfuse's buffer, and answers `lseek`, which the binding declares but does not serve."""

        def open(self, path: bytes, info: Any) -> int:
            file = info.contents
            file.fh = operations.open(path.decode("utf-8", "surrogateescape"), file.flags)
            file.keep_cache = 1
            return 0

        def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
            del path
            memory = memory_at(ctypes.cast(buffer, ctypes.c_void_p), size, _PYBUF_WRITE)
            return view.read_into(info.contents.fh, offset, memory)

        def lseek(self, path: bytes | None, offset: int, whence: int, info: Any) -> int:
            del path
            return view.seek(info.contents.fh, offset, whence)

    started = False
    behind = LeftBehind(options.place)
    view.leave_behind = behind.add
    version = mfusepy.fuse_version_major, mfusepy.fuse_version_minor
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # libfuse unmounts on those that nobody else handles
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)

        def give_back() -> None:
            os.dup2(stderr, 2)
            os.close(stderr)  # it may be somebody's pipe, who waits for its end

        def now_ready() -> None:
            nonlocal started
            give_back()
            started = True
            ready()
            threading.Thread(target=read_in_larger_pieces, args=(options.place,), daemon=True).start()

        operations = _Operations(view, options, now_ready)
        os.dup2(said.fileno(), 2)
        code = 0
        try:
            Fuse(
                operations,
                options.place,
                foreground=True,
                ro=True,
                fsname=options.source.replace("\\", "\\\\").replace(",", "\\,"),
                subtype="holdfast",
                default_permissions=True,
                use_ino=True,
                entry_timeout=_NAME_TIMEOUT_S,
                negative_timeout=0,
                attr_timeout=_ATTRIBUTES_TIMEOUT_S,
                **({"allow_other": True} if options.shared else {}),
                **({"max_threads": options.threads} if version >= _KNOWS_MAX_THREADS else {}),
            )
        except RuntimeError as error:
            code = error.args[0] if error.args and isinstance(error.args[0], int) else 1
        finally:
            behind.close()
            if not started:
                give_back()
        if not started or code not in (0, _ENDED_BY_SIGNAL):
            said.seek(0)
            words = said.read().decode(errors="replace").split("\n")
            raise _failure(options, [line.strip() for line in words if line.strip()], code)


def _failure(options: MountOptions, said: list[str], code: int) -> MountFailed:
    reason = said[-1].removeprefix("fuse: ") if said else f"libfuse gave no reason (code {code})"
    hint = ""
    if "allow_other" in reason or "user_allow_other" in reason:
        hint = "write user_allow_other into /etc/fuse.conf, or mount as root"
    elif "fusermount" in reason and "No such file" in reason:
        hint = "install the package fuse3, or mount as root"
    elif "Operation not permitted" in reason or "Permission denied" in reason:
        hint = "mounting needs access to /dev/fuse; a container needs the right to mount (CAP_SYS_ADMIN)"
    return MountFailed(f"mounting on {options.place} failed: {reason}", hint=hint)
