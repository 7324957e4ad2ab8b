"""The folder that is mounted on: whether it can be, what is mounted there now, and how that is ended.

What the kernel says (`/proc/self/mountinfo`) is what counts; no file of ours remembers a mount. A mount whose process
was killed is still there, and every use of it fails with ENOTCONN: it is recognised by that, and can be ended like
any other.

A mount can be in several places at once: whoever has begun a mount namespace since (a container, `unshare`) has a copy of it, and
`mount --bind` makes others. The process that serves it ends with the last of them, so copies that nobody uses are cut off.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from holdfast.errors import MountFailed, StorageError, UsageError, storage_error

__all__ = [
    "FS_TYPE",
    "OPEN_ATTRIBUTE",
    "PID_ATTRIBUTE",
    "Mounted",
    "mounted_at",
    "place_of",
    "read_in_larger_pieces",
    "require_mountable",
    "unmount",
]

FS_TYPE: Final = "fuse.holdfast"
PID_ATTRIBUTE: Final = "user.holdfast.pid"
"""Extended attribute of a mount's root: the process that serves it."""
OPEN_ATTRIBUTE: Final = "user.holdfast.open"
"""Another one: how many files are open."""

_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_MNT_DETACH: Final = 2  # linux/fs.h
_UMOUNT_NOFOLLOW: Final = 8
_END_WAIT_S: Final = 30
_BY_ITSELF_S: Final = 1.0
_CONNECTIONS: Final = "/sys/fs/fuse/connections"
_READ_AHEAD_KIB: Final = 1024
_BUSY_PAUSES: Final = 5
_BUSY_PAUSE_S: Final = 0.1


class MountInUse(MountFailed):
    """A program uses what is to be unmounted."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """Something that is mounted.

    Args:
        fs_type: as the kernel calls it.
        source: what it calls itself; of ours the path of the repository.
        device: its number, `major:minor`.
    """

    fs_type: str
    source: str
    device: str = ""


def place_of(path: str) -> str:
    """The absolute path of a mount point, without links. The last part is not asked for anything: it may be stale."""
    whole = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))


def mounted_at(place: str) -> Mounted | None:
    """What is mounted on a folder (the topmost, if there are several), or None."""
    found = None
    for where, mounted in _mounts():
        if where == place:
            found = mounted
    return found


def _mounts() -> Iterator[tuple[str, Mounted]]:
    """All mounts of this namespace, and where they are."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                left, _, right = line.rstrip("\n").partition(" - ")
                fields, rest = left.split(" "), right.split(" ")
                if len(fields) > 4 and len(rest) > 1:
                    yield _plain(fields[4]), Mounted(rest[0], _plain(rest[1]), fields[2])
    except OSError as error:
        raise storage_error(error, "reading the list of mounts") from error


def _plain(field: str) -> str:
    data = _OCTAL.sub(lambda m: chr(int(m[1], 8)), field)
    return (
        data.encode("latin-1", "surrogateescape").decode("utf-8", "surrogateescape")
        if data != field
        else data
    )


def require_mountable(path: str, repository: str) -> str:
    """The place to be mounted on, if that is possible.

    Raises:
        UsageError: it is no folder, not empty, or in the repository.
        MountFailed: a mount whose process was killed is still there.
    """
    place = place_of(path)
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        raise UsageError(
            f"the mount point {path} does not exist", hint=f"make it with: mkdir {path}"
        ) from None
    except NotADirectoryError:
        raise UsageError(f"the mount point {path} is no folder", hint="name an empty folder") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountFailed(
                f"{path} is still mounted, but the process that served it is gone",
                hint=f"clear it with: holdfast umount {path}",
            ) from None
        raise storage_error(error, f"looking into the mount point {path}") from error
    real, inside = os.path.realpath(place), os.path.realpath(repository)
    if real == inside or real.startswith(inside.rstrip("/") + "/"):
        raise UsageError(
            f"the mount point {path} lies in the repository", hint="name an empty folder outside of it"
        )
    there = mounted_at(real)
    if there is not None and there.fs_type == FS_TYPE:
        raise UsageError(
            f"on {path} the repository {there.source} is mounted already",
            hint=f"'holdfast umount {path}' ends that",
        )
    if names:
        raise UsageError(f"the mount point {path} is not empty", hint="name an empty folder")
    return real


def unmount(path: str) -> str:
    """Ends a mount of ours, and waits until its process has ended. One that is stale is cleared.

    Returns:
        Why its process goes on although nothing is mounted there any more; empty if it does not.

    Raises:
        UsageError: nothing of ours is mounted there.
        MountFailed: it is in use, or may not be unmounted by this user.
    """
    place = place_of(path)
    found = mounted_at(place) or mounted_at(os.path.realpath(place))
    if found is None:
        raise UsageError(f"nothing is mounted on {path}", hint="'mount -t fuse.holdfast' lists what is")
    if found.fs_type != FS_TYPE:
        raise UsageError(f"what is mounted on {path} ({found.fs_type}) is no mount of Holdfast")
    if mounted_at(place) is None:
        place = os.path.realpath(place)
    stale = is_stale(place)
    server = -1 if stale else _server(place)
    in_use = server >= 0 and _open_files(place) > 0
    try:
        for pauses_left in reversed(range(_BUSY_PAUSES + 1)):
            try:
                _unmount(place, lazy=stale)
                break
            except MountInUse:
                if not pauses_left:
                    raise
                # Our own process for what is left behind may have a file open for a moment.
                time.sleep(_BUSY_PAUSE_S)
        if server < 0 or _ended(server, _BY_ITSELF_S):
            return ""
        return _end_elsewhere(server, found.device, in_use=in_use)
    finally:
        if server >= 0:
            os.close(server)


def _end_elsewhere(server: int, device: str, *, in_use: bool) -> str:
    """Ends what is gone from its place and has copies in others; see `unmount`.

    Args:
        in_use: files of it are open. Whoever has them is in another namespace, or it could not have been unmounted.
    """
    copies = [where for where, mounted in _mounts() if mounted.device == device]
    if copies:
        return f"it is mounted on {copies[0]} as well, and served until that is unmounted, too"
    if in_use:
        return (
            "programs in another mount namespace (a container) have files of it open; "
            "it is served until that namespace ends"
        )
    minor = device.rpartition(":")[2]
    # It may have come to its end meanwhile, or there is no such file system here.
    with contextlib.suppress(OSError), open(f"{_CONNECTIONS}/{minor}/abort", "w", encoding="ascii") as file:
        file.write("1")
    if _ended(server, _END_WAIT_S):
        return ""
    return "its process goes on: another mount namespace (a container) may have a copy of the mount"


def _ended(server: int, within_s: float) -> bool:
    with select.epoll() as waiting:
        waiting.register(server, select.EPOLLIN)
        return bool(waiting.poll(within_s))


def _open_files(place: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(os.getxattr(place, OPEN_ATTRIBUTE))
    return 0


def read_in_larger_pieces(place: str) -> None:
    """Has the kernel ask for up to 1 MiB at once when a file is read from front to back, instead of 128 KiB.

    That needs root; without it all works the same with more requests (20 s instead of 12 s were measured for 8 GiB).
    Must be called while the mount is served by other threads.
    """
    with contextlib.suppress(OSError, StorageError):
        os.stat(place)  # when this is answered, the kernel has set its own value
        found = mounted_at(place)
        if found is not None:
            with open(f"/sys/class/bdi/{found.device}/read_ahead_kb", "w", encoding="ascii") as file:
                file.write(str(_READ_AHEAD_KIB))


def is_stale(place: str) -> bool:
    """Whether a mount is there that nobody serves any more."""
    try:
        os.stat(place)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _server(place: str) -> int:
    """A descriptor of the process that serves a mount, which becomes readable when it ends; or -1."""
    with contextlib.suppress(OSError, ValueError):
        return os.pidfd_open(int(os.getxattr(place, PID_ATTRIBUTE)))
    return -1


def _unmount(place: str, *, lazy: bool) -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if libc.umount2(os.fsencode(place), flags) == 0:
            return
        if ctypes.get_errno() == errno.EBUSY:
            raise _in_use(place)
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise MountFailed(
            "neither fusermount3 nor fusermount is installed, and only root can unmount without it",
            hint="install the package fuse3, or unmount as root",
        )
    outcome = subprocess.run(
        [program, "-uz" if lazy else "-u", "--", place], check=False, capture_output=True, text=True
    )
    if outcome.returncode == 0:
        return
    message = " ".join(outcome.stderr.split())
    if "busy" in message.lower():
        raise _in_use(place)
    raise MountFailed(f"{place} can not be unmounted: {message or f'exit code {outcome.returncode}'}")


def _in_use(place: str) -> MountInUse:
    return MountInUse(
        f"{place} is in use: a program has a file of it open, or stands in one of its folders",
        hint=f"'fuser -vm {place}' shows which one",
    )
