"""Disks in files, holes and all, without the adapters of `holdfast.esxi`: the engine is tested alone."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

from holdfast.errors import SourceChanged


class FileSource:
    """A file as a `BlockSource`; its holes are those of the file system."""

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size

    @property
    def size_bytes(self) -> int:
        return self._size

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        at = start
        while at < end:
            try:
                data = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if data >= end:
                return
            hole = min(os.lseek(self._fd, data, os.SEEK_HOLE), end)
            yield data, hole - data
            at = hole

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if not count:
                raise SourceChanged("the file has become shorter")
            done += count

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileSink:
    """A file as a `BlockSink`: sparse, written in any order."""

    def __init__(self, path: str | Path, size_bytes: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.truncate(self._fd, size_bytes)

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count

    def finish(self) -> None:
        os.close(self._fd)

    def abort(self) -> None:
        os.close(self._fd)


def write_noise(path: str | Path, seed: int, size_bytes: int, *, offset: int = 0) -> None:
    """Writes bytes that do not compress, and that `seed` repeats, into a file at an offset."""
    made = random.Random(seed)
    with open(path, "r+b" if os.path.exists(path) else "w+b") as file:
        file.seek(offset)
        file.writelines(
            made.randbytes(min(1 << 20, size_bytes - start)) for start in range(0, size_bytes, 1 << 20)
        )
