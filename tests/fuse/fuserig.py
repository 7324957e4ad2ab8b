"""A library that needs no repository, real mounts by the real command, and disks for both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from holdfast.disk import DiskInfo, FileInfo
from holdfast.errors import DamagedData, PointNotFound
from holdfast.fuse.files import Entry, Layout
from holdfast.ids import NodeId, PointId, RecordId, SessionId
from holdfast.repo.format.manifest import ContentTree, Manifest, PointDisk, PointFile, PointStatistics
from holdfast.repo.points import Point
from holdfast.units import format_time

DAY = 86_400
NOON = 1_780_000_000


# --- a library that needs no repository


def make_point(
    number: int,
    *,
    vm: str = "web1",
    uuid: str = "",
    time: int = NOON,
    disks: Mapping[str, bytes] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Point:
    """A restore point; equal numbers have equal ids."""

    def tree(data: bytes) -> ContentTree:
        return ContentTree(
            len(data), NodeId(RecordId(hashlib.blake2b(data, digest_size=32).digest())), 1 << 20
        )

    manifest = Manifest(
        session=SessionId(bytes(16)), kind="vm", vm_uuid=uuid or hashlib.md5(vm.encode()).hexdigest(), vm_name=vm,
        host="", origin="", time=time, received_ms=time * 1000 + number, segment_bytes=1 << 20, chunker="aligned",
        chunk_size_bytes=65536,
        disks=tuple(
            PointDisk(DiskInfo(name=name, size_bytes=len(data), format="raw"), tree(data))
            for name, data in (disks or {}).items()
        ),
        files=(PointFile(FileInfo("logs/vm.log", 5, 1_700_000_000_123_456_789, 0o644), tree(b"hello")),),
        folders=("empty",), labels=tuple(sorted((labels or {}).items())), warnings=(), parent="", tool="test",
        statistics=PointStatistics(0, 0, 0, 0, 0, 0),
    )  # fmt: skip
    return Point(PointId(RecordId(hashlib.blake2b(b"%d" % number, digest_size=32).digest())), manifest)


class MemoryContent:
    """Bytes, some of which may be damaged."""

    def __init__(self, data: bytes, library: MemoryLibrary) -> None:
        self._data = data
        self._library = library

    def read_into(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        assert 0 <= offset <= end <= len(self._data)
        self._library.reads.append((offset, len(buffer)))
        for start, stop in self._library.damaged:
            if offset < stop and end > start:
                raise DamagedData(f"damaged from {start} to {stop}")
        buffer[:] = self._data[offset:end]

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        step = 4096
        found = -1
        for at in range(start // step * step, min(end, len(self._data)), step):
            first, last = max(at, start), min(at + step, end, len(self._data))
            if any(self._data[first:last]):
                found = first if found < 0 else found
            elif found >= 0:
                yield found, first - found
                found = -1
        if found >= 0:
            yield found, min(end, len(self._data)) - found

    def fetch(self, start: int, end: int) -> None:
        with self._library.fetching:
            self._library.fetched.append((start, end))
            self._library.fetching.notify_all()


@dataclass
class MemoryLibrary:
    """See `holdfast.fuse.view.Library`."""

    listed: Sequence[Point] = ()
    contents: dict[NodeId, bytes] = field(default_factory=dict)
    held: list[PointId] = field(default_factory=list)
    damaged: list[tuple[int, int]] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    fetched: list[tuple[int, int]] = field(default_factory=list)
    fetching: threading.Condition = field(default_factory=threading.Condition)

    def show(self, *points: Point, **disks: bytes) -> None:
        self.listed = tuple(points)
        for data in (*disks.values(), b"hello"):
            self.contents[NodeId(RecordId(hashlib.blake2b(data, digest_size=32).digest()))] = data

    def points(self) -> Sequence[Point]:
        return self.listed

    def open(self, tree: ContentTree) -> MemoryContent:
        return MemoryContent(self.contents[tree.root], self)

    def allocated_bytes(self, tree: ContentTree) -> int:
        return sum(length for _, length in self.open(tree).data_extents(0, tree.size_bytes))

    def hold(self, point: Point) -> None:
        if point.id not in {one.id for one in self.listed}:
            raise PointNotFound("it is gone")
        self.held.append(point.id)

    def release(self, point: Point) -> None:
        self.held.remove(point.id)


def describe(point: Point) -> Layout:
    """Disks and files as they are, and a text."""
    return Layout(
        (
            *(
                Entry(disk.info.name, disk.info.size_bytes, disk.tree, disk=disk.info.name)
                for disk in point.manifest.disks
            ),
            *(
                Entry(file.info.name, file.info.size_bytes, file.tree, mtime_ns=file.info.mtime_ns)
                for file in point.manifest.files
            ),
            Entry("restore-point.json", 3, text=b"{}\n"),
        ),
        point.manifest.folders,
    )


# --- real ones


Holdfast = Callable[..., subprocess.CompletedProcess[str]]


def why_no_mount() -> str:
    """Why nothing can be mounted here; empty if it can."""
    if not os.path.exists("/dev/fuse"):
        return "needs /dev/fuse"
    if not os.access("/dev/fuse", os.W_OK):
        return "needs access to /dev/fuse"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "needs root or fusermount3"
    return ""


needs_fuse = pytest.mark.skipif(bool(why_no_mount()), reason=why_no_mount() or "none")


@dataclass
class Mount:
    """A mount of a real repository."""

    place: Path
    holdfast: Holdfast

    @property
    def pid(self) -> int:
        return int(os.getxattr(self.place, "user.holdfast.pid"))

    def point(self, vm: str, name: str = "latest") -> Path:
        return self.place / "by-vm" / vm / name

    def kill(self) -> None:
        """Ends the process as a crash would, and waits until it is gone."""
        pid = self.pid
        waiting = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(waiting)
        os.close(waiting)

    def end(self) -> None:
        self.holdfast("umount", self.place)


def wait_for_end(pidfd: int) -> None:
    """Until the process has ended."""
    import select

    assert select.select([pidfd], [], [], 30)[0], "it did not end"


MountIt = Callable[..., Mount]


def patterned(size_bytes: int, seed: int) -> bytes:
    """Data with holes: of each MiB a part is noise, a part text and a part zeros."""
    made = random.Random(seed)
    out = bytearray()
    while len(out) < size_bytes:
        out += made.randbytes(made.randrange(100_000, 700_000))
        out += b"%d lines of text\n" % made.randrange(10**6) * made.randrange(1000, 9000)
        out += bytes(made.randrange(1, 80) * 4096)
        out += bytes(-len(out) % 4096)
    return bytes(out[:size_bytes])


def write_sparse(path: Path, data: bytes) -> None:
    """The data as a file with holes where it is zeros."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            block = data[at : at + 4096]
            if any(block):
                file.seek(at)
                file.write(block)


def back_up(holdfast: Holdfast, repo: Path, image: Path, name: str, time: int, *options: object) -> str:
    """Backs an image up as a VM `name`; returns the id of the restore point."""
    outcome = holdfast(
        "-r", repo, "backup", image, "--vm", name, "--time", format_time(time), "--json", *options
    )
    return str(json.loads(outcome.stdout.splitlines()[-1])["point"])


@contextlib.contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process beside the test, which has ended when the block does."""
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
