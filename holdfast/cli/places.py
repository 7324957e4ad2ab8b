"""Which folders must not overlap: a repository, what is backed up into it, and what is restored from it."""

from __future__ import annotations

import os

from holdfast.errors import UsageError

__all__ = ["is_inside", "refuse_overlap"]


def is_inside(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies somewhere below it, whatever links lead there."""
    real_path, real_folder = os.path.realpath(path), os.path.realpath(folder)
    return real_path == real_folder or real_path.startswith(real_folder.rstrip("/") + "/")


def refuse_overlap(repository: str, source: str) -> None:
    """Makes sure that a backup does not read what it writes.

    Raises:
        UsageError: it would.
    """
    try:
        holds = os.path.isdir(source) and is_inside(repository, source)
        if not holds and not is_inside(source, repository):
            return
    except (OSError, ValueError):
        return  # opening the source says what is wrong with it
    raise UsageError(
        f"the source {source} and the repository {repository} overlap",
        hint="a repository can not be backed up into itself: keep it outside of the VM's folder",
    )
