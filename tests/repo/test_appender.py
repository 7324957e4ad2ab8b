"""The end of a pack: what was appended is in the file, in order, whoever drains meanwhile."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.direct import ALIGNMENT
from holdfast.repo.appender import Appender

_BUFFER_BYTES = 4 * ALIGNMENT


class _File:
    """A file and an appender with small buffers at its end."""

    def __init__(self, path: Path, start: bytes, buffers: int) -> None:
        self.path = path
        path.write_bytes(start)
        self._fd = os.open(path, os.O_RDWR)
        self.appender = Appender(self._fd, str(path), len(start), buffer_bytes=_BUFFER_BYTES, buffers=buffers)

    def close(self) -> None:
        self.appender.close()
        os.close(self._fd)


@pytest.fixture(params=[2, 4])
def buffers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def _pieces(chance: random.Random, total: int) -> Iterator[bytes]:
    while total > 0:
        piece = chance.randbytes(
            chance.choice([1, 72, 5000, ALIGNMENT, _BUFFER_BYTES, 3 * _BUFFER_BYTES + 7])
        )
        total -= len(piece)
        yield piece


@pytest.mark.parametrize("length", [0, 1, ALIGNMENT - 1, ALIGNMENT, 3 * ALIGNMENT + 5])
def test_all_is_in_the_file_after_each_drain(tmp_path: Path, length: int, buffers: int) -> None:
    chance = random.Random(length)
    expected = chance.randbytes(length)
    file = _File(tmp_path / "pack", expected, buffers)
    try:
        for piece in _pieces(chance, 600_000):
            file.appender.append([piece[: len(piece) // 2], piece[len(piece) // 2 :]])
            expected += piece
            if chance.random() < 0.3:
                file.appender.drain()
                assert file.path.read_bytes() == expected
    finally:
        file.appender.drain()
        file.close()
    assert file.path.read_bytes() == expected


def test_draining_beside_appending_changes_nothing(tmp_path: Path, buffers: int) -> None:
    """A drain that has to wait for a buffer must not let the next bytes go where the last ones still are."""
    chance = random.Random(buffers)
    for attempt in range(6):
        file = _File(tmp_path / f"pack{attempt}", b"", buffers)
        pieces = list(_pieces(chance, 6_000_000))
        over = threading.Event()

        def drain(file: _File = file, over: threading.Event = over) -> None:
            while not over.is_set():
                file.appender.drain()

        with ThreadPoolExecutor(2) as pool:
            drains = [pool.submit(drain) for _ in range(2)]
            try:
                for piece in pieces:
                    file.appender.append([piece])
            finally:
                over.set()
            for done in drains:
                done.result()
        file.appender.drain()
        file.close()
        assert file.path.read_bytes() == b"".join(pieces), f"attempt {attempt}"


def test_what_was_appended_before_a_drain_is_in_the_file_when_it_returns(
    tmp_path: Path, buffers: int
) -> None:
    chance = random.Random(7)
    file = _File(tmp_path / "pack", b"", buffers)
    over = threading.Event()
    appended = 0
    short: list[tuple[int, int]] = []

    def drain() -> None:
        while not over.is_set():
            least = appended
            file.appender.drain()
            size = file.path.stat().st_size
            if size < least:
                short.append((size, least))

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        for piece in _pieces(chance, 6_000_000):
            file.appender.append([piece])
            appended += len(piece)
    finally:
        over.set()
        thread.join()
    file.appender.drain()
    file.close()
    assert not short


def test_after_a_failure_nothing_more_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDONLY)  # so that writing fails
    appender = Appender(fd, str(tmp_path / "missing"), 0, buffer_bytes=_BUFFER_BYTES, buffers=2)
    try:
        with pytest.raises(OSError):  # which of them meets it is a matter of time
            for _ in range(100):
                appender.append([bytes(_BUFFER_BYTES)])
            appender.drain()
        with pytest.raises(OSError):
            appender.append([b"more"])
        with pytest.raises(OSError):
            appender.drain()
    finally:
        appender.close()
        os.close(fd)
