"""What a guest's file is, and how a library that reads bytes of strangers is kept in bounds.

A `Node` is a file or folder as the rest of Holdfast sees it. `Window` is the piece of a disk that a library gets to
see: it reads inside of it only. `contained` is what each call of a library runs under: it translates whatever the
library raises into `GuestError`, and ends what takes too much processor time or memory, since a forged file system
may well contain loops. Errors of the repository (a damaged chunk) pass through as they are.

File contents come as pieces: bytes, or the length of a hole as a number. Where blocks are is asked of the library;
they are read here, so that holes cost nothing and a read that ends early is an error and never a shorter file.
"""

from __future__ import annotations

import contextlib
import io
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, Protocol, TypeAlias, cast

from holdfast.errors import GuestError, HoldfastError
from holdfast.units import GIB, MIB

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Kind", "Node", "Piece", "Readable", "Run", "Window", "all_bytes", "contained", "pieces_of_runs"]

Kind = Literal["file", "folder", "link", "fifo", "socket", "device", "damaged"]
Piece: TypeAlias = bytes | int
Run: TypeAlias = tuple[int | None, int]
"""Where blocks are: (first block or None for a hole, number of blocks)."""

_PIECE_BYTES: Final = MIB
_MAX_READ_BYTES: Final = 64 * MIB
_MAX_CPU_S: Final = 30.0
_MAX_MEMORY_BYTES: Final = GIB
_BUFFER_BYTES: Final = 16 << 10


class Node(Protocol):
    """A file, folder or link of a guest."""

    @property
    def name(self) -> str:
        """As the guest wrote it: hostile. Bytes that are no UTF-8 are surrogates (`surrogateescape`)."""

    @property
    def kind(self) -> Kind:
        """What it is; `damaged` if that can not be read."""

    @property
    def size_bytes(self) -> int:
        """Length of a file's content; of no meaning for others."""

    @property
    def mode(self) -> int | None:
        """Permission bits; None where the file system has none."""

    @property
    def mtime_ns(self) -> int | None:
        """Time of the last change, nanoseconds since 1970; None if it is unknown."""

    @property
    def target(self) -> str:
        """Where a link leads; "" for others."""

    def children(self) -> list[Node]:
        """What is in a folder, without "." and "..".

        Raises:
            GuestError: it can not be read.
        """

    def pieces(self) -> Iterator[Piece]:
        """A file's content in order: bytes, or the length of a hole. Together `size_bytes`.

        Raises:
            GuestError: it can not be read.
        """


class Readable(Protocol):
    """A disk, or something that reads like one."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Moves the position, as for files."""

    def read(self, length: int = -1, /) -> bytes | None:
        """Bytes from the position on, fewer only at the end."""


class Window(io.RawIOBase):
    """A part of a disk as a file of its own. Not for several threads at once."""

    def __init__(self, disk: Readable, start_bytes: int, size_bytes: int) -> None:
        super().__init__()
        self._disk = disk
        self._start = start_bytes
        self._position = 0
        self.size_bytes = size_bytes
        self.failure: HoldfastError | None = None

    def buffered(self) -> BinaryIO:
        """The same for those who read a few bytes at a time."""
        return cast("BinaryIO", io.BufferedReader(self, _BUFFER_BYTES))

    def close(self) -> None:
        """Nothing: buffers that come and go must not close what they read."""

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position, as for files."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fills the buffer; fewer bytes only at the end."""
        view = memoryview(buffer).cast("B")
        data = self.pread(self._position, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on, fewer at the end."""
        length = max(0, min(length, self.size_bytes - offset))
        if length > _MAX_READ_BYTES:
            raise GuestError(f"the file system wants {length} bytes read at once")
        if not length:
            return b""
        try:
            self._disk.seek(self._start + offset)
            parts = []
            while length and (data := self._disk.read(length)):
                parts.append(data)
                length -= len(data)
        except HoldfastError as error:
            self.failure = error  # a library may take it for damage of the guest
            raise
        return b"".join(parts)


class _OutOfTimeError(Exception):
    """The library has computed for longer than is sensible."""


@contextlib.contextmanager
def contained(what: str, window: Window | None = None) -> Iterator[None]:
    """Runs calls of a library on bytes of strangers: whatever it raises leaves as `GuestError`.

    Processor time is limited in the main thread only, which is where commands run. Waiting for the repository does
    not count. Memory is limited beyond what is in use at the beginning. May be nested: then the outermost limits count.

    Args:
        what: what is being read, for the message.
        window: where it reads; an error of the repository in there is raised again even if the library hid it.
    """
    if window is not None:
        window.failure = None
    try:
        with _limits():
            yield
    except HoldfastError:
        raise
    except (_OutOfTimeError, MemoryError, RecursionError) as error:
        raise GuestError(
            f"{what} can not be read: reading it takes more than is sensible", hint=_HINT
        ) from error
    except Exception as error:
        if window is not None and window.failure is not None:
            raise window.failure from error
        reason = str(error).strip() or type(error).__name__
        raise GuestError(f"{what} can not be read: {reason}", hint=_HINT) from error


_HINT: Final = "the restore point holds what the guest had on its disk; restore the disk, and use the guest's own tools of repair"
_limited = threading.local()


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    if getattr(_limited, "now", False) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTimeError

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + _MAX_MEMORY_BYTES
    before = signal.signal(signal.SIGPROF, end)
    _limited.now = True
    try:
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        signal.setitimer(signal.ITIMER_PROF, _MAX_CPU_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
        _limited.now = False


def pieces_of_runs(
    window: Window, runs: Iterable[Run], block_bytes: int, size_bytes: int, valid_bytes: int | None = None
) -> Iterator[Piece]:
    """The content that runs of blocks make, cut to `size_bytes`; what they do not reach is a hole.

    Args:
        valid_bytes: what lies beyond is zeros, whatever the blocks hold (NTFS); None for all.

    Raises:
        GuestError: a run lies outside of the volume, or they are more than it holds.
    """
    valid = size_bytes if valid_bytes is None else min(valid_bytes, size_bytes)
    position = 0
    budget = 4 * window.size_bytes  # a block may be shared, but not without end
    for first, count in runs:
        if position >= valid:
            break
        if count < 0:
            raise GuestError("a file's blocks are in disorder", hint=_HINT)
        length = min(count * block_bytes, valid - position)
        position += length
        if first is None:
            if length:
                yield length
            continue
        budget -= length
        start = first * block_bytes
        if start < 0 or start + length > window.size_bytes or budget < 0:
            raise GuestError("a file's blocks lie outside of its file system", hint=_HINT)
        while length:
            data = window.pread(start, min(length, _PIECE_BYTES))
            if not data:
                raise GuestError("a file's blocks lie outside of the disk", hint=_HINT)
            yield data
            start += len(data)
            length -= len(data)
    if position < size_bytes:
        yield size_bytes - position


def all_bytes(pieces: Iterable[Piece], limit_bytes: int = _MAX_READ_BYTES) -> bytes:
    """The pieces in one.

    Raises:
        GuestError: they are more than `limit_bytes`.
    """
    whole = bytearray()
    for piece in pieces:
        length = piece if isinstance(piece, int) else len(piece)
        if len(whole) + length > limit_bytes:
            raise GuestError("a folder is larger than is sensible", hint=_HINT)
        whole += bytes(piece) if isinstance(piece, int) else piece
    return bytes(whole)
