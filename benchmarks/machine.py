"""What a result has to be read with: the machine, the versions, the commit, the date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

__all__ = ["PROJECT", "describe"]

PROJECT = Path(__file__).resolve().parent.parent
_LIBRARIES = ("blake3", "zstandard", "numpy", "lmdb", "xxhash", "cryptography")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown"
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _file_system(folder: str) -> str:
    return _first_line("findmnt", "--noheadings", "--output", "FSTYPE", "--target", folder) or "unknown"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "absent"


def describe(work: str) -> dict[str, object]:
    """The circumstances of a run.

    Args:
        work: the folder that repositories and restored files are put into.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _first_line("git", "-c", "safe.directory=*", "rev-parse", "--short=12", "HEAD"),
        "uncommitted": bool(
            _first_line(
                "git", "-c", "safe.directory=*", "status", "--porcelain", "--untracked-files=no", "holdfast"
            )
        ),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes(),
        "kernel": platform.release(),
        "file_system": _file_system(work),
        "python": sys.version.split()[0],
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "load_before": os.getloadavg()[0],
    }
