"""The tools that are compared: Holdfast and what users would pick instead, each behind the same few steps.

Every tool gets what makes the comparison fair and what its manual advises for disk images: zstd 1 where it
can be chosen, no encryption where it can be left out, sparse files where it can make them, and no cache
that would let it skip reading. What a tool can not do is in its `remark`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.measure import CommandFailed, Usage, run

__all__ = ["TOOLS", "Backup", "Tool", "make_tools"]

_PASSWORD = "benchmark"
_ALL = frozenset({"first", "changed", "other", "unchanged", "restore", "check"})


@dataclass(frozen=True, slots=True)
class Backup:
    """The outcome of one backup.

    Args:
        figures: what the tool itself says (Holdfast only): bytes and chunks, to be checked.
    """

    usage: Usage
    figures: dict[str, int] | None = None


class Tool(Protocol):
    """One tool, or one way to use it, with one repository."""

    @property
    def name(self) -> str:
        """Short, for tables."""
        ...

    @property
    def remark(self) -> str:
        """What a reader must know to judge its figures."""
        ...

    @property
    def steps(self) -> frozenset[str]:
        """The steps of a workload that it is worth running through; see `benchmarks.workloads`."""
        ...

    @property
    def repository(self) -> str:
        """The folder (or file) whose size is the space that the tool takes."""
        ...

    def version(self) -> str:
        """As it calls itself."""
        ...

    def init(self) -> None:
        """Makes the repository, which must not exist."""
        ...

    def backup(self, image: str, vm: str) -> Backup:
        """Backs a disk image up as a new restore point of `vm`, reading all of it."""
        ...

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        """Restores the newest point of `vm` into an empty folder; returns where the image is now.

        Args:
            image: what the image was called when it was backed up.
        """
        ...

    def check(self) -> Usage | None:
        """Reads and verifies everything that is stored; None if the tool has nothing of the kind."""
        ...


def _version_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().partition("\n")[0]


class Holdfast:
    """Holdfast by its command line."""

    def __init__(
        self,
        work: str,
        program: str,
        name: str = "holdfast",
        cipher: str = "none",
        cores: int | None = None,
    ) -> None:
        self.name = name
        self.repository = os.path.join(work, name.replace(" ", "-"))
        self.remark = "its defaults: aligned chunks of 64 KiB, zstd 1"
        if cipher != "none":
            self.remark += f", encrypted with {cipher}"
        if cores is not None:
            self.remark += f", on {cores} core"
        self._program = program
        self.encrypted = cipher != "none"
        self._cipher = cipher
        self._cores = cores
        self.steps = _ALL if cores is None else frozenset({"first"})
        self._environment = {"HOLDFAST_PASSWORD": _PASSWORD} if cipher != "none" else {}

    def version(self) -> str:
        return _version_of(self._program, "version")

    def _run(self, *arguments: str) -> Usage:
        return run([self._program, *arguments], environment=self._environment, cores=self._cores)

    def init(self) -> None:
        self._run("init", "-r", self.repository, "--encryption", self._cipher)

    def backup(self, image: str, vm: str) -> Backup:
        usage = self._run("backup", "-r", self.repository, image, "--vm", vm, "--json")
        summary = _last_json(usage.output)
        wanted = ("bytes_read", "bytes_new", "bytes_stored", "chunks_new", "chunks_reused")
        return Backup(usage, {key: int(str(summary[key])) for key in wanted})

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        target = os.path.join(folder, os.path.basename(image))
        return self._run("restore", "-r", self.repository, f"{vm}@latest", target), target

    def check(self) -> Usage:
        return self._run("check", "-r", self.repository, "--read-data")


def _last_json(output: str) -> dict[str, object]:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("type") == "summary":
                return found
    raise CommandFailed(f"no summary in the output:\n{output[-2000:]}")


class Borg:
    """Borg 1.4 with one way of cutting chunks; Borg can make sparse files only with fixed chunks."""

    steps = _ALL

    def __init__(self, work: str, program: str, name: str, parameters: str | None) -> None:
        self.name = name
        self.repository = os.path.join(work, name.replace(" ", "-"))
        self._program = program
        self._base = os.path.join(work, "borg-base")
        self._parameters = parameters
        self._archives: dict[str, list[str]] = {}
        chunks = (
            f"fixed chunks of {int(parameters.split(',')[1]) >> 10} KiB"
            if parameters
            else "its default chunker (2 MiB)"
        )
        self.remark = f"{chunks}, zstd 1, no encryption, no files cache; one thread by design"
        self._environment = {
            "BORG_BASE_DIR": self._base,
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }

    def version(self) -> str:
        return _version_of(self._program, "--version")

    def _run(self, *arguments: str, folder: str | None = None) -> Usage:
        return run([self._program, *arguments], environment=self._environment, folder=folder)

    def init(self) -> None:
        self._run("init", "--encryption", "none", self.repository)

    def backup(self, image: str, vm: str) -> Backup:
        archives = self._archives.setdefault(vm, [])
        archive = f"{vm}-{len(archives)}"
        options = ["-C", "zstd,1", "--files-cache=disabled"]
        if self._parameters:
            options += ["--chunker-params", self._parameters, "--sparse"]
        folder, file = os.path.split(os.path.abspath(image))
        usage = self._run("create", *options, f"{self.repository}::{archive}", file, folder=folder)
        archives.append(archive)
        return Backup(usage)

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        usage = self._run(
            "extract", "--sparse", f"{self.repository}::{self._archives[vm][-1]}", folder=folder
        )
        return usage, os.path.join(folder, os.path.basename(image))

    def check(self) -> Usage:
        return self._run("check", "--verify-data", self.repository)


class Restic:
    """restic as the distribution has it."""

    name = "restic"
    steps = _ALL

    def __init__(self, work: str, program: str) -> None:
        self.repository = os.path.join(work, "restic")
        self._program = program
        self._environment = {
            "RESTIC_PASSWORD": _PASSWORD,
            "RESTIC_CACHE_DIR": os.path.join(work, "restic-cache"),
        }
        self._sparse = (
            "--sparse"
            in subprocess.run(
                [program, "restore", "--help"], capture_output=True, text=True, check=False
            ).stdout
        )
        self.remark = "its defaults (chunks of about 1 MiB, zstd by its own library); it always encrypts"
        if not self._sparse:
            self.remark += "; this version writes holes out on restore"

    def version(self) -> str:
        return _version_of(self._program, "version")

    def _run(self, *arguments: str) -> Usage:
        return run([self._program, "-r", self.repository, *arguments], environment=self._environment)

    def init(self) -> None:
        self._run("init")

    def backup(self, image: str, vm: str) -> Backup:
        return Backup(self._run("backup", "--force", "--host", vm, "--tag", vm, os.path.abspath(image)))

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        sparse = ["--sparse"] if self._sparse else []
        usage = self._run("restore", "latest", "--host", vm, "--target", folder, *sparse)
        return usage, os.path.join(folder, os.path.abspath(image).lstrip("/"))

    def check(self) -> Usage:
        return self._run("check", "--read-data")


class Casync:
    """casync: chunks as files."""

    name = "casync"
    steps = _ALL - {"check"}

    def __init__(self, work: str, program: str) -> None:
        self.repository = os.path.join(work, "casync")
        self._program = program
        self._indexes: dict[str, list[str]] = {}
        self.remark = "its defaults: chunks of 64 KiB on average, a file each, zstd 3; one thread"

    def version(self) -> str:
        return _version_of(self._program, "--version")

    def init(self) -> None:
        os.makedirs(os.path.join(self.repository, "store.castr"))

    def _store(self) -> str:
        return "--store=" + os.path.join(self.repository, "store.castr")

    def backup(self, image: str, vm: str) -> Backup:
        indexes = self._indexes.setdefault(vm, [])
        index = os.path.join(self.repository, f"{vm}-{len(indexes)}.caibx")
        usage = run([self._program, "make", self._store(), index, os.path.abspath(image)])
        indexes.append(index)
        return Backup(usage)

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        target = os.path.join(folder, os.path.basename(image))
        return run([self._program, "extract", self._store(), self._indexes[vm][-1], target]), target

    def check(self) -> None:
        return None


class Zstd:
    """The floor: compression alone, on all cores."""

    steps = frozenset({"first", "restore"})

    def __init__(self, work: str, program: str) -> None:
        self._threads = len(os.sched_getaffinity(0))
        self.name = f"zstd -1 -T{self._threads}"
        self.repository = os.path.join(work, "zstd")
        self._program = program
        self.remark = "one compressed stream of the whole image; decompression has one thread"

    def version(self) -> str:
        return _version_of(self._program, "--version").strip("* ")

    def init(self) -> None:
        os.makedirs(self.repository)

    def _file(self, vm: str) -> str:
        return os.path.join(self.repository, f"{vm}.zst")

    def backup(self, image: str, vm: str) -> Backup:
        return Backup(
            run([self._program, "-q", "-f", "-1", f"-T{self._threads}", image, "-o", self._file(vm)])
        )

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        target = os.path.join(folder, os.path.basename(image))
        return run([self._program, "-q", "-d", "--sparse", self._file(vm), "-o", target]), target

    def check(self) -> Usage:
        files = sorted(str(path) for path in Path(self.repository).glob("*.zst"))
        return run([self._program, "-q", "-t", *files])


class Copy:
    """The floor without any work: a sparse copy."""

    name = "cp"
    remark = "cp --sparse=always --reflink=never"
    steps = frozenset({"first", "restore"})

    def __init__(self, work: str) -> None:
        self.repository = os.path.join(work, "cp")

    def version(self) -> str:
        return _version_of("cp", "--version")

    def init(self) -> None:
        os.makedirs(self.repository)

    def _copy(self, source: str, target: str) -> Usage:
        return run(["cp", "--sparse=always", "--reflink=never", source, target])

    def backup(self, image: str, vm: str) -> Backup:
        return Backup(self._copy(image, os.path.join(self.repository, vm)))

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        target = os.path.join(folder, os.path.basename(image))
        return self._copy(os.path.join(self.repository, vm), target), target

    def check(self) -> None:
        return None


TOOLS = (
    "holdfast",
    "holdfast aes256-gcm",
    "holdfast chacha20-poly1305",
    "holdfast 1 core",
    "borg fixed 1 MiB",
    "borg fixed 64 KiB",
    "borg default",
    "restic",
    "casync",
    "zstd",
    "cp",
)


def make_tools(
    names: Sequence[str], work: str, *, holdfast: str | None = None, borg: str = "borg"
) -> list[Tool]:
    """The named tools (see `TOOLS`), with repositories below `work`.

    Raises:
        CommandFailed: a name or a program is not known.
    """
    program = holdfast or os.path.join(os.path.dirname(sys.executable), "holdfast")
    makers: dict[str, Callable[[], Tool]] = {
        "holdfast": lambda: Holdfast(work, program),
        "holdfast aes256-gcm": lambda: Holdfast(work, program, "holdfast aes256-gcm", "aes256-gcm"),
        "holdfast chacha20-poly1305": lambda: Holdfast(
            work, program, "holdfast chacha20-poly1305", "chacha20-poly1305"
        ),
        "holdfast 1 core": lambda: Holdfast(work, program, "holdfast 1 core", cores=1),
        "borg fixed 1 MiB": lambda: Borg(work, borg, "borg fixed 1 MiB", "fixed,1048576"),
        "borg fixed 64 KiB": lambda: Borg(work, borg, "borg fixed 64 KiB", "fixed,65536"),
        "borg default": lambda: Borg(work, borg, "borg default", None),
        "restic": lambda: Restic(work, _required("restic")),
        "casync": lambda: Casync(work, _required("casync")),
        "zstd": lambda: Zstd(work, _required("zstd")),
        "cp": lambda: Copy(work),
    }
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise CommandFailed(f"unknown tools: {', '.join(unknown)}; there are: {', '.join(TOOLS)}")
    return [makers[name]() for name in names]


def _required(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise CommandFailed(
            f"{program} is not installed; 'make bench-peers' installs it where it runs as root"
        )
    return found
