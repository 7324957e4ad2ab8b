"""Reading through a view: right bytes or EIO, holes, what is open while its point goes, and reading ahead."""

from __future__ import annotations

import errno
import os
import random
import threading
from itertools import pairwise

import pytest
from fuserig import NOON, MemoryLibrary, make_point

from holdfast.fuse.names import time_name
from holdfast.fuse.view import View

FOLDER = f"/by-vm/web1/{time_name(NOON)}"


@pytest.fixture
def disk() -> bytes:
    made = random.Random(5)
    return made.randbytes(600_000) + bytes(400_000 + 96) + made.randbytes(500_001)


@pytest.fixture
def path(library: MemoryLibrary, disk: bytes) -> str:
    library.show(make_point(1, disks={"d.raw": disk}), d=disk)
    return FOLDER + "/d.raw"


def read(view: View, handle: int, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    return bytes(buffer[: view.read_into(handle, offset, memoryview(buffer))])


def test_any_range_has_the_right_bytes(view: View, path: str, disk: bytes) -> None:
    handle = view.open(path)
    made = random.Random(7)
    for _ in range(300):
        offset, length = made.randrange(len(disk) + 5000), made.randrange(1, 200_000)
        assert read(view, handle, offset, length) == disk[offset : offset + length]
    view.close(handle)


def test_what_lies_beyond_the_content_is_zeros(library: MemoryLibrary, log, ahead, disk: bytes) -> None:
    """A flat file has whole sectors."""
    from holdfast.fuse.files import Entry, Layout

    point = make_point(1, disks={"d.raw": disk})
    library.show(point, d=disk)
    size = -(-len(disk) // 512) * 512
    tree = point.manifest.disks[0].tree
    view = View(library, lambda _p: Layout((Entry("f", size, tree),)), ahead, log.append)
    handle = view.open(FOLDER + "/f")
    assert read(view, handle, 0, size + 10) == disk.ljust(size, b"\0")
    assert read(view, handle, len(disk) + 1, 5000) == bytes(size - len(disk) - 1)
    assert read(view, handle, size, 10) == b""
    view.close(handle)


def test_damage_is_an_error_for_that_range_and_a_line_in_the_log(
    view: View, library: MemoryLibrary, path: str, disk: bytes, log: list[str]
) -> None:
    library.damaged.append((100_000, 160_000))
    handle = view.open(path)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output") as caught:
            read(view, handle, 120_000, 4096)
        assert caught.value.errno == errno.EIO
    assert read(view, handle, 0, 100_000) == disk[:100_000]
    assert read(view, handle, 160_000, 50_000) == disk[160_000:210_000]
    assert len(log) == 1
    assert log[0] == f"{path}, bytes 120000 to 124096: damaged from 100000 to 160000"
    view.close(handle)


def test_an_open_file_survives_its_point(view: View, library: MemoryLibrary, path: str, disk: bytes) -> None:
    before = view.attributes(path)
    handle = view.open(path)
    assert library.held == [library.listed[0].id]
    library.show(d=disk)
    assert read(view, handle, 1000, 1000) == disk[1000:2000]
    assert view.attributes(path) == view.attributes("/gone", handle) == before
    with pytest.raises(FileNotFoundError):
        view.open(path)
    view.close(handle)
    assert library.held == []
    with pytest.raises(FileNotFoundError):
        view.attributes(path)


def test_files_of_the_mount_itself_hold_nothing(view: View, library: MemoryLibrary, path: str) -> None:
    handle = view.open(FOLDER + "/restore-point.json")
    assert library.held == []
    assert read(view, handle, 1, 100) == b"}\n"
    view.close(handle)
    with pytest.raises(OSError, match="Bad file"):
        read(view, handle, 0, 1)


def test_holes_are_found(view: View, path: str, disk: bytes) -> None:
    handle = view.open(path)
    data, hole = os.SEEK_DATA, os.SEEK_HOLE
    first, second = 602_112, 999_424  # blocks of 4096
    assert view.seek(handle, 0, data) == 0
    assert view.seek(handle, 5, data) == 5
    assert view.seek(handle, 0, hole) == first
    assert view.seek(handle, first, hole) == first
    assert view.seek(handle, first, data) == second
    assert view.seek(handle, second + 1, hole) == len(disk)
    for offset in (len(disk), len(disk) + 1, -1):
        with pytest.raises(OSError, match="No such device or address"):
            view.seek(handle, offset, data)
    with pytest.raises(OSError, match="Invalid"):
        view.seek(handle, 0, os.SEEK_SET)
    view.close(handle)


def test_a_hole_at_the_end_is_no_data(view: View, library: MemoryLibrary) -> None:
    disk = b"x" * 4096 + bytes(8192)
    library.show(make_point(1, disks={"d.raw": disk}), d=disk)
    handle = view.open(FOLDER + "/d.raw")
    with pytest.raises(OSError, match="No such device or address"):
        view.seek(handle, 5000, os.SEEK_DATA)
    assert view.seek(handle, 5000, os.SEEK_HOLE) == 5000
    view.close(handle)


def fetched(library: MemoryLibrary, end: int) -> list[tuple[int, int]]:
    with library.fetching:
        assert library.fetching.wait_for(lambda: any(e == end for _, e in library.fetched), timeout=30)
        return sorted(library.fetched)


def test_whoever_reads_on_is_read_ahead_for(view: View, library: MemoryLibrary) -> None:
    disk = random.Random(1).randbytes(24 << 20)
    library.show(make_point(1, disks={"d.raw": disk}), d=disk)
    handle = view.open(FOLDER + "/d.raw")
    step = 128 << 10
    for at in range(0, len(disk), step):
        assert read(view, handle, at, step) == disk[at : at + step]
    ranges = fetched(library, len(disk))
    for (_, end), (start, _) in pairwise(ranges):
        assert end == start  # nothing is fetched twice
    assert ranges[0][0] < 1 << 20
    view.close(handle)


def test_requests_out_of_order_are_still_a_reader_who_reads_on(view: View, library: MemoryLibrary) -> None:
    disk = random.Random(1).randbytes(8 << 20)
    library.show(make_point(1, disks={"d.raw": disk}), d=disk)
    handle = view.open(FOLDER + "/d.raw")
    step = 128 << 10
    order = [
        at
        for first in range(0, len(disk), 4 * step)
        for at in (first + step, first, first + 3 * step, first + 2 * step)
    ]
    for at in order:
        read(view, handle, at, step)
    fetched(library, len(disk))
    view.close(handle)


def test_nothing_is_read_ahead_for_whoever_jumps_about(view: View, library: MemoryLibrary) -> None:
    disk = random.Random(1).randbytes(64 << 20)
    library.show(make_point(1, disks={"d.raw": disk}), d=disk)
    handle = view.open(FOLDER + "/d.raw")
    made = random.Random(3)
    places = [made.randrange(16) * (4 << 20) for _ in range(200)]
    for before, at in zip([1 << 30, *places], places, strict=False):
        if at != before:
            read(view, handle, at, 4096)
    assert library.fetched == []
    view.close(handle)


def test_what_is_left_behind_is_told_of_whoever_reads_on_only(view: View, library: MemoryLibrary) -> None:
    disk = bytes(200 << 20)
    library.show(make_point(1, disks={"d.raw": disk}), d=disk)
    told: list[tuple[str, int, int]] = []
    view.leave_behind = lambda *what: told.append(what)
    path = FOLDER + "/d.raw"
    handle = view.open(path)
    for at in range(0, len(disk), 1 << 20):
        read(view, handle, at, 1 << 20)
    assert told == [(path, 0, end << 20) for end in (32, 64, 96, 128, 160)]
    told.clear()
    for at in range(0, len(disk), 1 << 20):
        read(view, handle, (at * 7 + (5 << 20)) % len(disk), 1 << 20)
    assert told == []
    for at in range(100 << 20, 170 << 20, 1 << 20):
        read(view, handle, at, 1 << 20)
    assert told == [(path, 100 << 20, 132 << 20)]
    view.close(handle)


def test_many_threads_read_one_file(view: View, path: str, disk: bytes) -> None:
    handle = view.open(path)
    wrong: list[int] = []

    def work(seed: int) -> None:
        made = random.Random(seed)
        for _ in range(100):
            offset, length = made.randrange(len(disk)), made.randrange(1, 100_000)
            if read(view, handle, offset, length) != disk[offset : offset + length]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    view.close(handle)
