"""Files and folders of a guest, written into a folder of this machine.

The guest chooses names, links and sizes, and is not trusted:

- Everything is made anew below one folder, step by step from open folders, and nothing is followed: a link that
  the guest put there can not lead the next file somewhere else. What exists is never written to.
- Names that are no names here ("..", with a slash, too long) are left out, and said.
- Files and folders belong to who runs this, and take permissions (without setuid, setgid and sticky) and times of the
  guest. Devices, pipes and sockets are left out. Hard links become files of their own. Holes stay holes.

A file that can not be read to its end is removed, said, and the others go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from holdfast.errors import DamagedData, DestinationExists, GuestError, storage_error
from holdfast.fuse.guest.port import Node

__all__ = ["Extracted", "extract"]

T = TypeVar("T")

_BLOCK_BYTES: Final = 64 << 10
_ZEROS: Final = bytes(_BLOCK_BYTES)
_MAX_DEPTH: Final = 200
_NAME_TROUBLE: Final = (
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.EEXIST,
    errno.ELOOP,
    errno.EFBIG,
)


@dataclass(slots=True)
class Extracted:
    """What was done. `left_out` names what was not, with the reason."""

    dest: str
    files: int = 0
    folders: int = 0
    links: int = 0
    size_bytes: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)


def extract(node: Node, name: str, dest: str, on_bytes: Callable[[int], None]) -> Extracted:
    """Copies a file, or a folder with all that is in it.

    Args:
        name: of the file in a destination that is a folder.
        dest: an existing folder, into which it goes under its own name, or the new name itself.

    Raises:
        DestinationExists: there is something of that name.
        StorageError: writing failed.
        GuestError: the file itself can not be read.
    """
    if dest.endswith("/") and not os.path.lexists(dest.rstrip("/") or "/"):
        _named(dest, lambda: os.makedirs(dest))
    if os.path.isdir(dest):
        raw = _file_name(name)
        if raw is None:
            raise GuestError(
                f"the guest's name '{name}' can not be a name here", hint="name the file to be written"
            )
        parent, last = dest, raw
    else:
        parent, last = os.path.split(os.path.abspath(dest))[0], os.fsencode(os.path.basename(dest))
    shown = os.path.join(parent, os.fsdecode(last))
    if os.path.lexists(shown):
        raise DestinationExists(f"{shown} exists already", hint="name a place where there is nothing yet")
    folder = _named(parent, lambda: os.open(parent, os.O_RDONLY | os.O_DIRECTORY))
    try:
        job = _Job(Extracted(shown), on_bytes)
        try:
            job.write(node, last, folder, "", 0)
        except OSError as error:
            raise storage_error(error, f"writing {shown}") from error
        if job.done.left_out and not (job.done.files or job.done.folders or job.done.links):
            raise GuestError(f"'{name}' can not be extracted: {job.done.left_out[0][1]}")
        return job.done
    finally:
        os.close(folder)


def _named(path: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        raise storage_error(error, f"opening {path}") from error


def _file_name(name: str) -> bytes | None:
    """The name as bytes; None if no file can have it."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None  # half a character, as Windows allows
    return None if raw in (b"", b".", b"..") or b"/" in raw or b"\0" in raw else raw


class _Job:
    """One run of `extract`."""

    def __init__(self, done: Extracted, on_bytes: Callable[[int], None]) -> None:
        self.done = done
        self._on_bytes = on_bytes

    def write(self, node: Node, name: bytes, folder: int, above: str, depth: int) -> None:
        """Makes `name` in the open folder. What can not be made is left out."""
        path = f"{above}/{os.fsdecode(name)}" if above else os.fsdecode(name)
        try:
            if node.kind == "file":
                self._file(node, name, folder)
                self.done.files += 1
            elif node.kind == "link":
                os.symlink(node.target.encode("utf-8", "surrogateescape"), name, dir_fd=folder)
                self.done.links += 1
            elif node.kind == "folder" and depth < _MAX_DEPTH:
                self._folder(node, name, folder, path, depth)
            else:
                reason = {"folder": "folders are nested too deeply", "damaged": "it is damaged"}
                self.done.left_out.append((path, reason.get(node.kind, f"it is a {node.kind}")))
        except (GuestError, DamagedData) as error:
            self.done.left_out.append((path, error.message))
        except (UnicodeEncodeError, ValueError):
            self.done.left_out.append((path, "the link leads to what can not be a name"))
        except OSError as error:
            if error.errno not in _NAME_TROUBLE:
                raise
            self.done.left_out.append((path, error.strerror or str(error)))

    def _folder(self, node: Node, name: bytes, above: int, path: str, depth: int) -> None:
        os.mkdir(name, 0o700, dir_fd=above)
        self.done.folders += 1
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        try:
            for child in node.children():
                raw = _file_name(child.name)
                if raw is None:
                    self.done.left_out.append((f"{path}/{child.name}", "this can not be a name here"))
                else:
                    self.write(child, raw, folder, path, depth + 1)
            _adopt(folder, node, 0o755)
        finally:
            os.close(folder)

    def _file(self, node: Node, name: bytes, folder: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        file = os.open(name, flags, 0o600, dir_fd=folder)
        try:
            size = 0
            for piece in node.pieces():
                if isinstance(piece, int):
                    size += piece
                else:
                    _write_sparse(file, piece, size)
                    size += len(piece)
                    self._on_bytes(len(piece))
            os.ftruncate(file, size)
            _adopt(file, node, 0o644)
            self.done.size_bytes += size
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise
        finally:
            os.close(file)


def _write_sparse(file: int, data: bytes, offset: int) -> None:
    """Writes what is not zeros."""
    view = memoryview(data)
    start = 0
    while start < len(data):
        end = start
        while end < len(data) and view[end : end + _BLOCK_BYTES] != _ZEROS[: len(data) - end]:
            end += _BLOCK_BYTES
        part = view[start : min(end, len(data))]
        at = offset + start
        while part:
            written = os.pwrite(file, part, at)
            part, at = part[written:], at + written
        start = end + _BLOCK_BYTES


def _adopt(file: int, node: Node, otherwise: int) -> None:
    """Permissions and times of the guest, as far as they make sense here."""
    os.fchmod(file, otherwise if node.mode is None else stat.S_IMODE(node.mode) & 0o777)
    if node.mtime_ns is not None:
        with contextlib.suppress(OSError, OverflowError):  # a time that this file system can not keep
            os.utime(file, ns=(node.mtime_ns, node.mtime_ns))
