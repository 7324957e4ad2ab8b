"""File names: which relative paths are safe, how a path is shown, and how a free name is found.

Relative paths use `/`, are never absolute and have no `.` or `..`; that is checked on both ways,
since names come from folders of strangers and from manifests that may be forged. Nothing here
touches a file system.
"""

from __future__ import annotations

import posixpath
from collections.abc import Container
from typing import Final

__all__ = ["fault_of", "free_name", "parents_of", "printable", "stem_of"]

_NAME_BYTES: Final = 255
_PATH_BYTES: Final = 4096


def printable(path: str) -> str:
    """The path as it can be put into a sentence: one line, valid Unicode, at most 300 characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)
    return shown if len(shown) <= 300 else f"{shown[:140]}...{shown[-140:]}"


def fault_of(path: str) -> str:
    """What is wrong with a relative path, as a phrase that can follow "the path"; empty if nothing."""
    if not path:
        return "is empty"
    if "\0" in path:
        return "contains a NUL character"
    if path.startswith("/"):
        return "is absolute"
    try:
        if len(path.encode()) >= _PATH_BYTES:
            return "is longer than 4095 bytes"
    except UnicodeEncodeError:
        return "is not valid Unicode"
    for part in path.split("/"):
        if part == "":
            return "has an empty component"
        if part in (".", ".."):
            return f"has the component '{part}'"
        if len(part.encode()) > _NAME_BYTES:
            return "has a component of more than 255 bytes"
    return ""


def parents_of(path: str) -> list[str]:
    """All folders above a relative path, outermost first: `a/b/c` gives `a`, `a/b`."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def stem_of(path: str) -> str:
    """The path without its last suffix: `disks/web1.vmdk` gives `disks/web1`."""
    return posixpath.splitext(path)[0]


def free_name(stem: str, suffix: str, taken: Container[str]) -> str:
    """A path `<stem><suffix>` that is not taken, numbered where it is: `web1-flat-2.vmdk`.

    The last component is shortened to fit into 255 bytes, and what a VMDK descriptor can not
    express between its quotes (a quote, control characters) becomes `_`.

    Args:
        stem: relative path without suffix.
        suffix: such as `-flat.vmdk`; the number goes before its last dot.
    """
    folder, name = posixpath.split(stem)
    name = "".join("_" if c == '"' or not c.isprintable() else c for c in name)
    middle, dot, last = suffix.rpartition(".")
    number = 1
    while True:
        ending = f"{middle}{dot}{last}" if number == 1 else f"{middle}-{number}{dot}{last}"
        room = _NAME_BYTES - len(ending.encode())
        path = posixpath.join(folder, name.encode()[:room].decode(errors="ignore") + ending)
        if path not in taken:
            return path
        number += 1
