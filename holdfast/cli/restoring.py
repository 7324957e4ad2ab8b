"""The execution of a restore: all that the plan says, or nothing.

All sinks are opened, the engine fills them, and the files get their names at the end: descriptors after their data,
the VM's files after its disks. If anything fails, whatever was made is removed: unfinished files, finished ones that
were not there before, and folders.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.errors import storage_error
from holdfast.esxi.device import open_sink

if TYPE_CHECKING:
    from holdfast.cli.progress import Progress
    from holdfast.cli.restore_plan import PlannedFile, RestorePlan
    from holdfast.disk import BlockSink
    from holdfast.repo.format.manifest import ContentTree
    from holdfast.repo.points import Point
    from holdfast.repo.repository import Repository
    from holdfast.repo.restore import LostRange, RestoreCounters

__all__ = ["Restored", "RestoredHole", "carry_out"]

_FILES_KEPT_FREE: Final = 128
"""File descriptors that are left for the repository and everything else."""


@dataclass(frozen=True, slots=True)
class RestoredHole:
    """A part of a restored file that is zeros because it could not be read.

    Args:
        content: name of the disk or file in the restore point.
        path: where it was written.
    """

    content: str
    path: str
    offset: int
    length: int
    reason: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did."""

    bytes_written: int
    duration_s: float
    damaged: tuple[RestoredHole, ...] = ()


def carry_out(
    repository: Repository,
    point: Point,
    plan: RestorePlan,
    progress: Progress,
    workers: int | None,
    *,
    allow_damaged: bool = False,
) -> Restored:
    """Writes what the plan says.

    Durability: all is on disk on return.

    Args:
        allow_damaged: write zeros where something is damaged.

    Raises:
        IntegrityError: something is damaged in the repository. Nothing is left behind.
        StorageError: the destination can not be written. Nothing is left behind.
    """
    began_s = time.monotonic()
    written = done = 0
    made: list[str] = []
    damaged: list[RestoredHole] = []
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, made)
        _make_folders(plan.folders, made)
        for batch in _batches(plan.outputs):
            counters = _restore_batch(
                repository, point, plan, batch, made, progress, done, workers, allow_damaged=allow_damaged
            )
            written += counters.bytes_written
            done += counters.bytes_total
            damaged += _holes(point, batch, counters.lost)
        undo.pop_all()
    return Restored(written, time.monotonic() - began_s, tuple(damaged))


def _holes(point: Point, batch: Sequence[PlannedFile], lost: Sequence[LostRange]) -> Iterator[RestoredHole]:
    """What was lost, by the names that the restore point and the destination have for it."""
    outputs = [output for output in batch if output.content is not None]
    names = [(disk.info.name, disk.tree) for disk in point.manifest.disks]
    names += [(file.info.name, file.tree) for file in point.manifest.files]
    for part in lost:
        output = outputs[part.content]
        name = next((name for name, tree in names if tree is output.content), output.path)
        yield RestoredHole(name, output.path, part.offset, part.length, part.reason)


def _batches(outputs: Sequence[PlannedFile]) -> Iterator[Sequence[PlannedFile]]:
    """The outputs in groups that can be open at the same time. Nearly always there is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        wanted = len(outputs) + _FILES_KEPT_FREE
        if soft < wanted and soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    size = max(16, soft - _FILES_KEPT_FREE) if soft > 0 else len(outputs)
    for first in range(0, len(outputs), size):
        yield outputs[first : first + size]


def _restore_batch(
    repository: Repository,
    point: Point,
    plan: RestorePlan,
    batch: Sequence[PlannedFile],
    made: list[str],
    progress: Progress,
    done: int,
    workers: int | None,
    *,
    allow_damaged: bool,
) -> RestoreCounters:
    sinks: list[BlockSink] = []
    with contextlib.ExitStack() as undo:
        contents: list[tuple[ContentTree, BlockSink]] = []
        for output in batch:
            sink = open_sink(
                output.path,
                output.size_bytes,
                overwrite=plan.overwrite,
                mode=output.mode,
                mtime_ns=output.mtime_ns,
            )
            undo.callback(sink.abort)
            sinks.append(sink)
            if output.content is not None:
                contents.append((output.content, sink))
            elif output.text:
                sink.write(0, memoryview(output.text))
        counters = repository.restore(
            point,
            contents,
            workers=workers,
            on_progress=lambda counters: progress.update(
                done + counters.bytes_done, plan.size_bytes, bytes_written=counters.bytes_written
            ),
            allow_damaged=allow_damaged,
        )
        for output, sink in zip(batch, sinks, strict=True):
            new = not os.path.lexists(output.path)
            sink.finish()
            if new:
                made.append(output.path)
        undo.pop_all()
    return counters


def _make_folders(folders: Sequence[str], made: list[str]) -> None:
    for folder in folders:
        missing: list[str] = []
        path = os.path.abspath(folder)
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        try:
            for one in reversed(missing):
                os.mkdir(one)
                made.append(one)
            os.listdir(folder)
        except OSError as error:
            raise storage_error(error, f"making the folder {folder}") from None


def _remove(made: Sequence[str]) -> None:
    """Takes back what this restore made, as far as nobody else put something there."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            if os.path.isdir(path) and not os.path.islink(path):
                os.rmdir(path)
            else:
                os.unlink(path)
