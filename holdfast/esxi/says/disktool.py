"""What `vmkfstools` prints: its progress, its successes, and its failures as errors of ours.

Its exit status is not relied upon. A clone or a new disk is complete when the last thing on its line of progress is
100 %; the checks of a disk and of a chain have each one sentence that means success.

Deliberately not here: the block map (`-t0`). Its form is only known from other programs' patterns, and a hole that is
none would be data lost without a word.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from holdfast.errors import SourceError, SourceFormat, SourceNotFound, SourceUnreadable, SourceUnsupported
from holdfast.esxi.names import printable

__all__ = ["DiskTask", "disktool_error", "parse_progress", "require_success"]

DiskTask = Literal["clone", "create", "grow", "chain", "check", "silent"]
"""`silent`: -U, -E and others that print nothing."""

_PROGRESS: Final = re.compile(r"\b(Clone|Create|Grow): (\d{1,3})% done")
_SUCCESS: Final = {
    "chain": re.compile(r"Disk chain is consistent"),
    "check": re.compile(r"Disk is error free|successfully repaired|no errors", re.IGNORECASE),
}
_WORDS: Final = {"clone": "Clone", "create": "Create", "grow": "Grow"}
_CODE: Final = re.compile(r"^(.*?\S)\s*\((\d{1,12})\)\.?\s*$", re.MULTILINE)
_CAUSES: Final[tuple[tuple[str, type[SourceError], str], ...]] = (
    ("No space left", SourceError, "the datastore is full: free some space there first"),
    (
        "Device or resource busy",
        SourceUnreadable,
        "a running VM locks it: take a snapshot first, or power the VM off",
    ),
    (
        "Failed to lock the file",
        SourceUnreadable,
        "a running VM locks it: take a snapshot first, or power the VM off",
    ),
    ("not a virtual disk", SourceFormat, "name the descriptor of a disk whose extents are beside it"),
    ("No such file", SourceNotFound, "check the path for a typing error"),
    ("could not find the file", SourceNotFound, "check the path for a typing error"),
    (
        "one or more required files",
        SourceNotFound,
        "the disk, or a parent of it, is incomplete on the datastore",
    ),
    ("already exists", SourceError, "choose another name, or remove it first"),
    ("has been modified since", SourceFormat, "base and snapshot do not belong together any more"),
    ("Permission denied", SourceUnreadable, "use an account with the role of an administrator"),
    ("is not supported", SourceUnsupported, ""),
    (
        "Function not implemented",
        SourceUnsupported,
        "the format needs: esxcli system module load -m multiextent",
    ),
)


def parse_progress(text: str) -> int | None:
    """The last percentage in what was printed so far (it rewrites its line with carriage returns)."""
    found = _PROGRESS.findall(text)
    return min(int(found[-1][1]), 100) if found else None


def require_success(text: str, task: DiskTask, doing: str) -> None:
    """Returns if `vmkfstools` says that it has done its task.

    Args:
        doing: what was attempted, to follow "while".

    Raises:
        SourceError: it does not say so; see `disktool_error`.
    """
    plain = text.replace("\r", "\n")
    if task == "silent":
        if plain.strip():
            raise disktool_error(plain, doing)
        return
    pattern = _SUCCESS.get(task)
    if pattern is not None:
        if not pattern.search(plain):
            raise disktool_error(plain, doing)
        return
    steps = [int(percent) for word, percent in _PROGRESS.findall(plain) if word == _WORDS[task]]
    if not steps or steps[-1] != 100 or "Failed to" in plain or "failed for" in plain:
        raise disktool_error(plain, doing)


def disktool_error(text: str, doing: str) -> SourceError:
    """The error that says what the words of `vmkfstools` mean to the user."""
    plain = text.replace("\r", "\n")
    lines = [line.strip() for line in plain.splitlines() if line.strip() and not _PROGRESS.search(line)]
    coded = _CODE.findall(plain)
    words = f"{coded[-1][0].strip()} ({coded[-1][1]})" if coded else lines[-1] if lines else "it said nothing"
    for cause, kind, hint in _CAUSES:
        if cause.lower() in plain.lower():
            return kind(f"vmkfstools failed while {doing}: {printable(words)}", hint=hint)
    return SourceError(f"vmkfstools failed while {doing}: {printable(words)}")
