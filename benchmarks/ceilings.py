"""What the machine allows at best: the unavoidable parts of each task, alone, on all cores.

    python -m benchmarks.ceilings WORK RESTORED IMAGE [IMAGE...]     prints one JSON object

For each image in turn (the first as a first backup, the following ones as backups of changed images):

- ideal: CPU seconds of BLAKE3 over every chunk and of zstd 1 over every chunk that was not seen before, with
  all cores at it, divided by the cores. The chunks are those of the default chunker; cutting them, reading
  the image and writing the outcome are not counted.
- read and hash: the image's data read (1 MiB at a time, so that it is hashed while it is in the cache of the
  core) and hashed with BLAKE3, nothing else: the ceiling of a backup of an unchanged image.
- decompress and write: the chunks of the image that is restored, compressed in memory beforehand, decompressed and written
  into a new sparse file, synced. Two ways of writing are tried, through the page cache (by one thread at a
  time, since several fight for the file's lock) and past it (`O_DIRECT`); the faster one is the ceiling.

Each worker is a thread; all that is timed releases the interpreter lock.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import blake3
import zstandard

from benchmarks.measure import data_extents
from holdfast.chunker import DEFAULT_CHUNKER_PARAMS, Chunker, make_chunker

__all__ = ["Ceilings", "measure_ceilings"]

_SEGMENT_BYTES = 16 << 20
_STEP_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_LEVEL = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Per image: `data_bytes`, `chunk_bytes`, `new_bytes`, `compressed_bytes`, chunk counts, and times.

    Args:
        hash_cpu_s, zstd_cpu_s, ideal_s: see the module.
        read_hash_s: wall time.
        decompress_write_s: wall time for the restored image, sync included; by the way of writing.
    """

    cores: int
    data_bytes: list[int]
    chunk_bytes: list[int]
    new_bytes: list[int]
    compressed_bytes: list[int]
    chunks: list[int]
    new_chunks: list[int]
    hash_cpu_s: list[float]
    zstd_cpu_s: list[float]
    ideal_s: list[float]
    read_hash_s: list[float]
    decompress_write_s: dict[str, float]


def _on_all_cores(tasks: Iterable[T], make_worker: Callable[[], Callable[[T], None]], cores: int) -> float:
    """Wall seconds until a worker per core has done all tasks."""
    pending, lock = iter(tasks), threading.Lock()
    failures: list[BaseException] = []

    def take() -> None:
        try:
            work = make_worker()
            while True:
                with lock:
                    task = next(pending, None)
                if task is None:
                    return
                work(task)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=take) for _ in range(cores)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - began


def _segments(path: str) -> list[int]:
    """Offsets of the segments that hold data."""
    found: dict[int, None] = {}
    for start, length in data_extents(path):
        for number in range(start // _SEGMENT_BYTES, (start + length - 1) // _SEGMENT_BYTES + 1):
            found[number * _SEGMENT_BYTES] = None
    return list(found)


def _data_bytes(path: str) -> int:
    return sum(length for _, length in data_extents(path))


class _Ideal:
    """CPU seconds of the unavoidable computations, over a sequence of images."""

    def __init__(self, chunker: Chunker, cores: int) -> None:
        self._chunker = chunker
        self._cores = cores
        self._seen: set[bytes] = set()
        self._lock = threading.Lock()

    def image(self, path: str) -> dict[str, float]:
        """The figures of one image; its chunks are known from now on."""
        total = dict.fromkeys(("chunk_bytes", "new_bytes", "compressed_bytes", "chunks", "new_chunks"), 0.0)
        total |= {"hash_cpu_s": 0.0, "zstd_cpu_s": 0.0}
        file = os.open(path, os.O_RDONLY)

        def make_worker() -> Callable[[int], None]:
            compress = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=False).compress

            def work(offset: int) -> None:
                view = memoryview(os.pread(file, _SEGMENT_BYTES, offset))
                pieces, at = [], 0
                for length in self._chunker.cut(view):
                    if length > 0:
                        pieces.append(view[at : at + length])
                    at += abs(length)
                began = time.thread_time()
                ids = [blake3.blake3(piece).digest() for piece in pieces]
                hashed = time.thread_time()
                new = []
                with self._lock:
                    for chunk, piece in zip(ids, pieces, strict=True):
                        if chunk not in self._seen:
                            self._seen.add(chunk)
                            new.append(piece)
                compressing = time.thread_time()
                compressed = sum(len(compress(piece)) for piece in new)
                done = time.thread_time()
                with self._lock:
                    total["hash_cpu_s"] += hashed - began
                    total["zstd_cpu_s"] += done - compressing
                    total["chunk_bytes"] += sum(map(len, pieces))
                    total["new_bytes"] += sum(map(len, new))
                    total["compressed_bytes"] += compressed
                    total["chunks"] += len(pieces)
                    total["new_chunks"] += len(new)

            return work

        try:
            _on_all_cores(_segments(path), make_worker, self._cores)
        finally:
            os.close(file)
        return total


def read_and_hash(path: str, cores: int) -> float:
    """Wall seconds to read and hash a file's data."""
    file = os.open(path, os.O_RDONLY)
    steps = [
        (at, min(_STEP_BYTES, start + length - at))
        for start, length in data_extents(path)
        for at in range(start, start + length, _STEP_BYTES)
    ]

    def make_worker() -> Callable[[tuple[int, int]], None]:
        buffer = memoryview(mmap.mmap(-1, _STEP_BYTES))

        def work(step: tuple[int, int]) -> None:
            offset, length = step
            view = buffer[:length]
            if os.preadv(file, [view], offset) != length:
                raise OSError(errno.EIO, "the image became shorter")
            blake3.blake3(view).digest()

        return work

    try:
        return _on_all_cores(steps, make_worker, cores)
    finally:
        os.close(file)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A segment, compressed: (offset in the segment, length, compressed bytes) of each chunk."""

    offset: int
    chunks: list[tuple[int, int, bytes]]


def _pack(path: str, chunker: Chunker, cores: int) -> list[_Packed]:
    file = os.open(path, os.O_RDONLY)
    packed: list[_Packed] = []

    def make_worker() -> Callable[[int], None]:
        compress = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress

        def work(offset: int) -> None:
            view = memoryview(os.pread(file, _SEGMENT_BYTES, offset))
            chunks, at = [], 0
            for length in chunker.cut(view):
                if length > 0:
                    chunks.append((at, length, compress(view[at : at + length])))
                at += abs(length)
            packed.append(_Packed(offset, chunks))

        return work

    try:
        _on_all_cores(_segments(path), make_worker, cores)
    finally:
        os.close(file)
    return sorted(packed, key=lambda segment: segment.offset)


def decompress_and_write(
    packed: Sequence[_Packed], size: int, target: str, cores: int, *, direct: bool
) -> float:
    """Wall seconds to decompress all segments and write them to a new file, synced."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    began = time.perf_counter()
    file = os.open(target, flags, 0o600)
    writing = threading.Lock()

    def write(view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(file, view, offset)
            view, offset = view[count:], offset + count

    def make_worker() -> Callable[[_Packed], None]:
        decompressor = zstandard.ZstdDecompressor()
        buffer = memoryview(mmap.mmap(-1, _SEGMENT_BYTES))

        def work(segment: _Packed) -> None:
            start = end = 0
            for at, length, data in segment.chunks:
                if at != end:
                    flush(segment.offset, start, end)
                    start = at
                reader = decompressor.stream_reader(data)
                if reader.readinto(buffer[at : at + length]) != length:
                    raise ValueError("decompression gave too little")
                end = at + length
            flush(segment.offset, start, end)

        def flush(offset: int, start: int, end: int) -> None:
            if direct and end % _BLOCK_BYTES:
                end += _BLOCK_BYTES - end % _BLOCK_BYTES  # the file's end: cut off again below
            if direct:
                write(buffer[start:end], offset + start)
            elif end > start:
                with writing:
                    write(buffer[start:end], offset + start)

        return work

    try:
        os.ftruncate(file, size)
        _on_all_cores(packed, make_worker, cores)
        os.ftruncate(file, size)
        os.fsync(file)
    finally:
        os.close(file)
    os.sync()
    took = time.perf_counter() - began
    os.unlink(target)
    return took


def measure_ceilings(work: str, restored: str, images: Sequence[str]) -> Ceilings:
    """See the module.

    Args:
        work: a folder on the file system that is restored to.
        restored: the image whose restoring has the ceiling `decompress_write_s`.
    """
    cores = len(os.sched_getaffinity(0))
    chunker = make_chunker(DEFAULT_CHUNKER_PARAMS)
    ideal = _Ideal(chunker, cores)
    computed = []
    read_hash = []
    for image in images:
        computed.append(ideal.image(image))  # reads the image, so that it is warm for what follows
        read_hash.append(read_and_hash(image, cores))
    packed = _pack(restored, chunker, cores)
    writes: dict[str, float] = {}
    target = os.path.join(work, "ceiling.raw")
    for name, direct in (("page cache", False), ("direct", True)):
        try:
            writes[name] = decompress_and_write(
                packed, os.path.getsize(restored), target, cores, direct=direct
            )
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            os.unlink(target)

    def column(name: str) -> list[float]:
        return [figures[name] for figures in computed]

    def counts(name: str) -> list[int]:
        return [int(figures[name]) for figures in computed]

    return Ceilings(
        cores=cores,
        data_bytes=[_data_bytes(image) for image in images],
        chunk_bytes=counts("chunk_bytes"),
        new_bytes=counts("new_bytes"),
        compressed_bytes=counts("compressed_bytes"),
        chunks=counts("chunks"),
        new_chunks=counts("new_chunks"),
        hash_cpu_s=column("hash_cpu_s"),
        zstd_cpu_s=column("zstd_cpu_s"),
        ideal_s=[(f["hash_cpu_s"] + f["zstd_cpu_s"]) / cores for f in computed],
        read_hash_s=read_hash,
        decompress_write_s=writes,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure_ceilings(sys.argv[1], sys.argv[2], sys.argv[3:]))))
