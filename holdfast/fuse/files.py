"""What is in the folder of a restore point: plain values, which say where bytes come from and read none.

How a point is laid out is not decided here: whoever joins the parts passes a function in that makes a `Layout` of a
point (descriptors are the business of those who know VMDK).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from holdfast.repo.format.manifest import ContentTree
from holdfast.repo.points import Point

__all__ = ["Describe", "Entry", "File", "Layout", "Link", "Source", "inode_of"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a restore point.

    Args:
        path: relative to the point's folder, `/` as separator.
        size_bytes: of the file; what is beyond the end of its content is zeros.
        content: from the repository; None if `text` is all of it.
        mtime_ns: None for the time of the point.
        disk: name of the disk whose bytes these are from the first to the last; empty for anything else.
    """

    path: str
    size_bytes: int
    content: ContentTree | None = None
    text: bytes = b""
    mtime_ns: int | None = None
    disk: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """All that is in a restore point's folder.

    Args:
        folders: that hold no file; others need not be named.
    """

    entries: tuple[Entry, ...]
    folders: tuple[str, ...] = ()


Describe: TypeAlias = Callable[[Point], Layout]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a file come from: `length` bytes of a content from `start` on."""

    point: Point
    tree: ContentTree
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class File:
    """A file of the tree.

    Args:
        source: None if `text` is all of it.
    """

    inode: int
    size_bytes: int
    mtime_ns: int
    source: Source | None
    text: bytes = b""


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link within the tree."""

    inode: int
    target: str
    mtime_ns: int


_LEAST_INODE: Final = 16
"""The small ones are taken: 1 is the root."""


def inode_of(*identity: str | bytes) -> int:
    """A number for what is named by these; the same in every mount of the repository."""
    digest = hashlib.blake2b(digest_size=8)
    for part in identity:
        data = part if isinstance(part, bytes) else part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1 | _LEAST_INODE
