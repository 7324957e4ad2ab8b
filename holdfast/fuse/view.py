"""A repository as a read-only file system: paths and handles in, attributes and bytes out.

It speaks the language of a file system (an `OSError` with an `errno` is an answer) and knows nothing of FUSE. What it
shows comes from a `Library`, which is all that it knows of a repository.

Invariants: no byte is returned that was not verified; a read that meets damage fails as a whole with EIO, and is a line
in the log; a file that is open has its attributes and can be read until it is closed, whatever becomes of its point.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from holdfast.errors import HoldfastError, PointNotFound
from holdfast.fuse.files import Describe, Entry, File, Link
from holdfast.fuse.partitions import find_partitions
from holdfast.fuse.reading import Content, OpenFile, ReadAhead
from holdfast.fuse.tree import Folder, NameBook, Node, PointFolders, build_tree, find_node
from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.points import Point
from holdfast.units import GIB

__all__ = ["Attributes", "Library", "View"]

BLOCK_BYTES: Final = 512
_MOST_COMPLAINTS: Final = 1000
_EXACT_BYTES: Final = 16 * GIB
"""Of partitions of larger disks no more is counted than that they can not hold more than the disk does."""


class Library(Protocol):
    """What a view needs of a repository. Thread-safe."""

    def points(self) -> Sequence[Point]:
        """The points that are listed, oldest first; the same object as long as nothing has changed."""
        ...

    def open(self, tree: ContentTree) -> Content:
        """The bytes of a disk or file."""
        ...

    def allocated_bytes(self, tree: ContentTree) -> int:
        """How much of a content is no hole."""
        ...

    def hold(self, point: Point) -> None:
        """Keeps a point from being collected until `release`.

        Raises:
            PointNotFound: it is forgotten.
        """
        ...

    def release(self, point: Point) -> None:
        """Ends one `hold`."""
        ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` tells.

    Args:
        mode: with the type.
        blocks: of 512 bytes, that hold data.
    """

    inode: int
    mode: int
    size_bytes: int
    blocks: int
    mtime_ns: int


class View:
    """See the module. Thread-safe.

    Args:
        describe: what is in the folder of a point.
        notify: receives a line for the log.
        shared: whether other users than the one who has mounted it may read it.

    Attributes:
        leave_behind: called with the path of a file and a range (start, end) that a reader from front to back needs no more.
    """

    def __init__(
        self,
        library: Library,
        describe: Describe,
        ahead: ReadAhead,
        notify: Callable[[str], None],
        *,
        shared: bool = False,
    ) -> None:
        self._library = library
        self._ahead = ahead
        self._notify = notify
        self._folder_mode = stat.S_IFDIR | (0o555 if shared else 0o500)
        self._file_mode = stat.S_IFREG | (0o444 if shared else 0o400)
        self._book = NameBook()
        self._folders = PointFolders(describe, self._partitions)
        self._points: Sequence[Point] | None = None
        self._root: Folder | None = None
        self._tree_lock = threading.Lock()
        self._lock = threading.Lock()
        self._open: dict[int, tuple[str, OpenFile]] = {}
        self._next_handle = 1
        self._told: set[str] = set()
        self.leave_behind: Callable[[str, int, int], None] | None = None

    # --- folders

    def attributes(self, path: str, handle: int | None = None) -> Attributes:
        """What `stat` tells of a path; of an open file if a handle is given."""
        with self._lock:
            opened = None if handle is None else self._open.get(handle)
        node = self._node(path) if opened is None else opened[1].file
        if isinstance(node, Folder):
            return Attributes(node.inode, self._folder_mode, 0, 0, node.mtime_ns)
        if isinstance(node, Link):
            size = len(node.target.encode())
            return Attributes(node.inode, stat.S_IFLNK | 0o777, size, 0, node.mtime_ns)
        blocks = -(-self._allocated_bytes(path, node) // BLOCK_BYTES)
        return Attributes(node.inode, self._file_mode, node.size_bytes, blocks, node.mtime_ns)

    def entries(self, path: str) -> list[tuple[str, int, int]]:
        """(name, inode, type as in a mode) of all that is in a folder."""
        node = self._node(path)
        if not isinstance(node, Folder):
            raise _answer(errno.ENOTDIR)
        with self._explaining(path):
            children = node.children()
        return [(name, child.inode, _type_of(child)) for name, child in children.items()]

    def target(self, path: str) -> str:
        """Where a symbolic link leads."""
        node = self._node(path)
        if not isinstance(node, Link):
            raise _answer(errno.EINVAL)
        return node.target

    def point_of(self, path: str) -> Point | None:
        """The restore point that a file's bytes are from."""
        node = self._node(path)
        return node.source.point if isinstance(node, File) and node.source is not None else None

    def _node(self, path: str) -> Node:
        with self._explaining(path):
            node = find_node(self._current(), path)
        if node is None:
            with self._lock:
                for opened_path, opened in self._open.values():
                    if opened_path == path:
                        return opened.file
            raise _answer(errno.ENOENT)
        return node

    def _current(self) -> Folder:
        """The root of the tree, made anew if points have come or gone."""
        points = self._library.points()
        with self._tree_lock:
            if self._root is None or points is not self._points:
                self._folders.keep(points)
                self._root = build_tree(points, self._book, self._folders)
                self._points = points
            return self._root

    def _allocated_bytes(self, path: str, file: File) -> int:
        source = file.source
        if source is None:
            return file.size_bytes
        with self._explaining(path):
            whole = self._library.allocated_bytes(source.tree)
            if (source.start, source.length) == (0, source.tree.size_bytes):
                return whole
            if whole > _EXACT_BYTES:  # of a partition of a large disk no more is known without reading much
                return min(whole, source.length)
            content = self._library.open(source.tree)
            end = source.start + source.length
            return sum(length for _, length in content.data_extents(source.start, end))

    def _partitions(self, entry: Entry) -> Iterable[tuple[str, int, int]]:
        """What `ListPartitions` says."""
        assert entry.content is not None
        tree = entry.content
        content = self._library.open(tree)

        def read(offset: int, length: int) -> bytes:
            buffer = bytearray(max(0, min(length, tree.size_bytes - offset)))
            content.read_into(offset, memoryview(buffer))
            return bytes(buffer)

        for part in find_partitions(read, tree.size_bytes):
            if 0 <= part.start_bytes < tree.size_bytes:
                length = min(part.size_bytes, tree.size_bytes - part.start_bytes)
                yield f"{part.number}-{part.kind}.img", part.start_bytes, length

    # --- files

    def open(self, path: str) -> int:
        """A handle for reading; the file's point is held until `close`."""
        node = self._node(path)
        if isinstance(node, Folder):
            raise _answer(errno.EISDIR)
        if isinstance(node, Link):
            raise _answer(errno.ELOOP)
        content = None
        with self._explaining(path):
            if node.source is not None:
                try:
                    self._library.hold(node.source.point)
                except PointNotFound:
                    raise _answer(errno.ENOENT) from None
                content = self._library.open(node.source.tree)
        with self._lock:
            handle = self._next_handle
            self._next_handle += 1
            self._open[handle] = path, OpenFile(node, content, self._ahead)
        return handle

    @property
    def open_files(self) -> int:
        """How many files are open."""
        return len(self._open)

    def close(self, handle: int) -> None:
        """Ends what `open` began."""
        with self._lock:
            _, opened = self._open.pop(handle)
        if opened.file.source is not None:
            self._library.release(opened.file.source.point)

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Fills the buffer; returns how many bytes there were before the end of the file."""
        path, opened = self._opened(handle)
        with self._explaining(path, offset, len(buffer)):
            count = opened.read_into(offset, buffer)
        left = opened.left_behind()
        if left is not None and self.leave_behind is not None:
            self.leave_behind(path, *left)
        return count

    def seek(self, handle: int, offset: int, whence: int) -> int:
        """As `lseek` with SEEK_DATA and SEEK_HOLE."""
        path, opened = self._opened(handle)
        with self._explaining(path):
            return opened.seek(offset, whence)

    def _opened(self, handle: int) -> tuple[str, OpenFile]:
        with self._lock:
            found = self._open.get(handle)
        if found is None:
            raise _answer(errno.EBADF)
        return found

    # --- errors

    def _explaining(self, path: str, offset: int = 0, length: int = 0) -> _Explaining:
        return _Explaining(self, path, offset, length)

    def complain(self, path: str, offset: int, length: int, error: HoldfastError) -> None:
        """Puts a failure into the log; the same one only once."""
        where = f", bytes {offset} to {offset + length}" if length else ""
        text = f"{path}{where}: {error.message}"
        known = f"{path}: {error.message}"
        with self._lock:
            if known in self._told or len(self._told) >= _MOST_COMPLAINTS:
                return
            self._told.add(known)
        self._notify(text)


class _Explaining:
    """Turns our errors into EIO, and a line in the log."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: View, path: str, offset: int, length: int) -> None:
        self._view = view
        self._at = path, offset, length

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HoldfastError):
            self._view.complain(*self._at, error)
            raise _answer(errno.EIO) from error


def _answer(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _type_of(node: Node) -> int:
    if isinstance(node, Folder):
        return stat.S_IFDIR
    return stat.S_IFLNK if isinstance(node, Link) else stat.S_IFREG
