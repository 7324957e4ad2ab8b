"""One command, measured: wall time up to durable, CPU seconds, peak memory of its process tree.

The rules are the same for every tool: its input has been read into the page cache before, the clock runs
until `sync` has returned (so that nobody profits from leaving the writing to the kernel), and CPU seconds
are those of the command and all its children (the kernel's flushing is nobody's).

Peaks of memory are those that the kernel keeps for each process, read 20 times a second and at the end from
`wait4`; the latter is never below the peak of the process that started it, so a measuring process that is
small itself (as `compare` is: standard library only) measures best.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CommandFailed", "Usage", "compare_files", "data_extents", "run", "tree_size", "warm"]

_READ_BYTES = 4 << 20
_SAMPLE_S = 0.05


class CommandFailed(Exception):
    """A command under measurement failed, or its outcome was wrong: the whole run counts for nothing."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one command took.

    Args:
        wall_s: until the command had ended and everything was synced.
        sync_s: of that, after the command's end.
        cpu_s: user and system time of its process tree.
        rss_peak_bytes: largest resident memory of any one of its processes, mapped files included.
        anon_peak_bytes: largest sum of the anonymous memory of all its processes, sampled 20 times a second;
            page cache that is mapped (an index) is not in it.
    """

    wall_s: float
    sync_s: float
    cpu_s: float
    rss_peak_bytes: int
    anon_peak_bytes: int
    output: str = ""


def data_extents(path: str) -> Iterator[tuple[int, int]]:
    """Yields (offset, length) of what is no hole in a file."""
    with open(path, "rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, at - start


def warm(paths: Sequence[str]) -> None:
    """Reads files (or whole folders) into the page cache, but for their holes."""
    buffer = memoryview(bytearray(_READ_BYTES))
    for path in _files(paths):
        with open(path, "rb", buffering=0) as file:
            for start, length in data_extents(path):
                file.seek(start)
                left = length
                while left > 0 and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
                    left -= count


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        for folder, _, names in os.walk(path):
            yield from (os.path.join(folder, name) for name in sorted(names))


def tree_size(path: str) -> tuple[int, int]:
    """Apparent and allocated bytes of all files below a folder (or of one file)."""
    apparent = allocated = 0
    for name in _files([path]):
        status = os.lstat(name)
        apparent += status.st_size
        allocated += status.st_blocks * 512
    return apparent, allocated


def compare_files(left: str, right: str) -> None:
    """Compares two files byte for byte; holes read as zeros.

    Raises:
        CommandFailed: they differ; says where.
    """
    with open(left, "rb", buffering=0) as a, open(right, "rb", buffering=0) as b:
        if os.fstat(a.fileno()).st_size != os.fstat(b.fileno()).st_size:
            raise CommandFailed(f"{left} and {right} have different lengths")
        # where both have a hole there is nothing to read
        for start, length in _merged([*data_extents(left), *data_extents(right)]):
            for at in range(start, start + length, _READ_BYTES):
                size = min(_READ_BYTES, start + length - at)
                if os.pread(a.fileno(), size, at) != os.pread(b.fileno(), size, at):
                    raise CommandFailed(f"{left} and {right} differ within {size} bytes from {at} on")


def _merged(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    end = 0
    for start, length in sorted(extents):
        first = max(start, end)
        end = max(end, start + length)
        if end > first:
            yield first, end - first


class _Sampler:
    """Watches the memory of a process tree: its anonymous memory now, and each process's peak so far."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.anon_peak_bytes = 0
        self.rss_peak_bytes = 0
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.anon_peak_bytes = max(self.anon_peak_bytes, self._look(self._pid))

    def _look(self, pid: int) -> int:
        """Anonymous bytes of a process and all its children; notes the peaks of each."""
        total = 0
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
                fields = dict(line.split(":", 1) for line in file)
            if "RssAnon" in fields:  # not a zombie
                total = int(fields["RssAnon"].split()[0]) * 1024
                self.rss_peak_bytes = max(self.rss_peak_bytes, int(fields["VmHWM"].split()[0]) * 1024)
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                    total += sum(self._look(int(child)) for child in file.read().split())
        return total

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    cores: int | None = None,
    sync: bool = True,
    accept: Sequence[int] = (0,),
) -> Usage:
    """Runs a command to its end.

    Args:
        environment: added to this process's own.
        cores: let it use only this many.
        sync: count the time until everything is on disk.
        accept: exit codes that are success.

    Raises:
        CommandFailed: any other exit code; carries the end of what it wrote.
    """
    prefix: list[str] = []
    if cores is not None:
        prefix = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **(environment or {})},
        )
        sampler = _Sampler(child.pid)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            sampler.stop()
        child.returncode = code = os.waitstatus_to_exitcode(status)
        ended = time.perf_counter()
        if sync:
            os.sync()
        synced = time.perf_counter()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code not in accept:
        raise CommandFailed(f"exit code {code}: {shlex.join(command)}\n{text[-4000:]}")
    # what wait4 reports begins with the peak of this process; below that only the samples can tell
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = usage.ru_maxrss * 1024 if usage.ru_maxrss > own else 0
    return Usage(
        wall_s=synced - began,
        sync_s=synced - ended,
        cpu_s=usage.ru_utime + usage.ru_stime,
        rss_peak_bytes=max(peak, sampler.rss_peak_bytes),
        anon_peak_bytes=sampler.anon_peak_bytes,
        output=text,
    )
