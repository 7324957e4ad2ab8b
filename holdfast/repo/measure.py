"""What settings give on a user's own data and disks: the engine behind `holdfast bench`.

The source is sampled in whole segments, spread evenly over its data. Chunkers and compression levels are
tried on each segment while it is in memory, so the source is read once; then the sample is backed up into a
temporary repository and read back, with different numbers of threads, by the engine itself.

Deduplication found inside of a sample is a lower bound of what the whole gives. Nothing is written but below
the temporary folder, which the caller removes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import blake3
import zstandard

from holdfast.chunker import Chunker, ChunkerParams, make_chunker
from holdfast.disk import BlockSource, DiskInfo, Machine, SourceDisk
from holdfast.errors import EmptySource, storage_error
from holdfast.ids import RecordId
from holdfast.repo.backup import BackupOptions
from holdfast.repo.format.record import RECORD_HEADER_BYTES, TABLE_ENTRY_BYTES
from holdfast.repo.idset import IdSet
from holdfast.repo.parallel import usable_cores
from holdfast.repo.repository import DEFAULT_SEGMENT_BYTES, InitOptions, Repository
from holdfast.units import GIB, KIB, MIB

__all__ = [
    "INDEX_BYTES_PER_CHUNK",
    "ChunkingResult",
    "LevelResult",
    "Measurement",
    "SampledSource",
    "ThreadsResult",
    "measure",
    "recommend",
]

INDEX_BYTES_PER_CHUNK: Final = 116
"""Measured with a million chunks; see docs/BENCHMARKS.md."""
_LEAF_ENTRY_BYTES: Final = 36
_METADATA_PER_CHUNK: Final = RECORD_HEADER_BYTES + TABLE_ENTRY_BYTES + INDEX_BYTES_PER_CHUNK
DEFAULT_SAMPLE_BYTES: Final = 1 * GIB
LEVELS: Final = (1, 3, 6, 9)
CHUNKINGS: Final = (
    ChunkerParams("aligned", 32 * KIB),
    ChunkerParams("aligned", 64 * KIB),
    ChunkerParams("aligned", 128 * KIB),
    ChunkerParams("aligned", 256 * KIB),
    ChunkerParams("fixed", 64 * KIB),
    ChunkerParams("fixed", 1 * MIB),
)
_LEVEL_SAMPLE_BYTES: Final = 64 * MIB
_MONTH_BACKUPS: Final = 30
_WRITE_TEST_BYTES: Final = 256 * MIB


@dataclass(frozen=True, slots=True)
class ChunkingResult:
    """What one chunker with one chunk size gives on the sample. Rates are bytes per second on one core.

    Args:
        unique_bytes: of the chunks that are left when equal ones are kept once.
        stored_bytes: of those, as zstd level 1 makes of them.
        metadata_bytes: headers, tables, leaves and index for them.
    """

    chunker: ChunkerParams
    chunks: int
    unique_chunks: int
    unique_bytes: int
    stored_bytes: int
    metadata_bytes: int
    cut_rate: float
    hash_rate: float


@dataclass(frozen=True, slots=True)
class LevelResult:
    """What one zstd level gives. Rates are bytes of plaintext per second on one core."""

    level: int
    ratio: float
    compress_rate: float
    decompress_rate: float


@dataclass(frozen=True, slots=True)
class ThreadsResult:
    """What a number of threads gives, in bytes of plaintext per second."""

    threads: int
    backup_rate: float
    unchanged_rate: float
    restore_rate: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """All figures of one run.

    Args:
        data_bytes: data of the source, holes left out.
        sample_bytes: of it, how much was sampled.
        read_rate: of the source, as found (its caches may have been warm).
        write_rate: to the temporary folder, synced.
    """

    data_bytes: int
    sample_bytes: int
    cores: int
    read_rate: float
    write_rate: float
    chunkings: tuple[ChunkingResult, ...]
    levels: tuple[LevelResult, ...]
    threads: tuple[ThreadsResult, ...]

    @property
    def scale(self) -> float:
        """From the sample to the whole source."""
        return self.data_bytes / self.sample_bytes

    def projected_index_bytes(self, result: ChunkingResult) -> int:
        """Size of the index for one backup of the whole source."""
        return int(result.unique_chunks * self.scale) * INDEX_BYTES_PER_CHUNK

    def month_bytes(self, result: ChunkingResult) -> int:
        """Stored bytes, metadata counted, of the sample's first backup and 30 more.

        A model, not a measurement: every one of the 30 finds one changed place in each segment, which
        costs one chunk of average size and the segment's leaf. Small chunks make changes cheap, large
        ones compress better and need less metadata; this is where the two meet.
        """
        segments = -(-self.sample_bytes // DEFAULT_SEGMENT_BYTES)
        first = result.stored_bytes + result.metadata_bytes
        chunk = first / max(result.unique_chunks, 1)
        leaf = result.chunks / segments * _LEAF_ENTRY_BYTES + _METADATA_PER_CHUNK
        return int(first + _MONTH_BACKUPS * segments * (chunk + leaf))

    @property
    def projected_restore_rate(self) -> float:
        """What a restore to a disk like the temporary folder's would reach."""
        return min(max(result.restore_rate for result in self.threads), self.write_rate)


class SampledSource:
    """Some segments of a source, one behind the other, as a source of its own."""

    def __init__(self, source: BlockSource, segments: Sequence[int], segment_bytes: int) -> None:
        self._source = source
        self._segments = segments
        self._segment_bytes = segment_bytes
        last = segments[-1] if segments else 0
        tail = min(segment_bytes, source.size_bytes - last * segment_bytes)
        self._size = max(0, len(segments) - 1) * segment_bytes + (tail if segments else 0)

    @property
    def size_bytes(self) -> int:
        """Bytes of all sampled segments."""
        return self._size

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """See `BlockSource.data_extents`."""
        for offset, length, shift in self._pieces(start, end):
            for at, size in self._source.data_extents(offset, offset + length):
                yield at - shift, size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `BlockSource.read_into`."""
        for at, length, shift in self._pieces(offset, offset + len(buffer)):
            first = at - shift - offset
            self._source.read_into(at, buffer[first : first + length])

    def close(self) -> None:
        """Nothing of its own is open."""

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the source, length, offset in the source minus offset here) of [start, end)."""
        while start < end:
            number = start // self._segment_bytes
            inside = start - number * self._segment_bytes
            length = min(self._segment_bytes - inside, end - start)
            offset = self._segments[number] * self._segment_bytes + inside
            yield offset, length, offset - start
            start += length


class _NullSink:
    """Takes a restore and keeps nothing: what is measured is reading, decompressing, verifying."""

    def write(self, offset: int, data: memoryview) -> None:
        del offset, data

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


class _Trial:
    """One chunker at work on one segment after the other."""

    def __init__(self, params: ChunkerParams) -> None:
        self.params = params
        self.chunker: Chunker = make_chunker(params)
        self.seen = IdSet()
        self.chunks = self.unique_bytes = self.stored_bytes = self.bytes = 0
        self.cut_s = self.hash_s = 0.0

    def take(self, view: memoryview, compressor: zstandard.ZstdCompressor) -> None:
        began = time.perf_counter()
        parts = self.chunker.cut(view)
        cut = time.perf_counter()
        at = 0
        pieces: dict[RecordId, memoryview] = {}
        for part in parts:
            if part > 0:
                pieces[RecordId(blake3.blake3(view[at : at + part]).digest())] = view[at : at + part]
                self.chunks += 1
            at += abs(part)
        self.hash_s += time.perf_counter() - cut
        self.cut_s += cut - began
        self.bytes += len(view)
        for new in self.seen.add(pieces):
            piece = pieces[new]
            self.unique_bytes += len(piece)
            self.stored_bytes += min(len(piece), len(compressor.compress(piece)))

    def result(self) -> ChunkingResult:
        unique = len(self.seen)
        return ChunkingResult(
            self.params,
            self.chunks,
            unique,
            self.unique_bytes,
            self.stored_bytes,
            unique * _METADATA_PER_CHUNK + self.chunks * _LEAF_ENTRY_BYTES,
            self.bytes / max(self.cut_s, 1e-9),
            self.bytes / max(self.hash_s, 1e-9),
        )


def measure(
    source: BlockSource,
    folder: str,
    *,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    chunkings: Sequence[ChunkerParams] = CHUNKINGS,
    on_step: Callable[[str, float], None] = lambda _what, _share: None,
) -> Measurement:
    """Measures what settings give for a source.

    Args:
        folder: temporary; on the disk whose writing is to be measured.
        sample_bytes: about how much of the source to look at.
        on_step: told what is being measured, and the share of it that is done.

    Raises:
        EmptySource: the source holds no data.
    """
    segment_bytes = DEFAULT_SEGMENT_BYTES
    every = _data_segments(source, segment_bytes)
    if not every:
        raise EmptySource("the source holds nothing but holes", hint="name a disk with data")
    wanted = max(1, sample_bytes // segment_bytes)
    step = max(1.0, len(every) / wanted)
    chosen = sorted({every[int(number * step)] for number in range(min(wanted, len(every)))})
    sample = SampledSource(source, chosen, segment_bytes)
    trials = [_Trial(params) for params in chunkings]
    levels, read_s = _try_in_memory(sample, segment_bytes, trials, on_step)
    on_step("writing to the temporary folder", 0.0)
    write_rate = _write_rate(folder)
    threads = []
    counts = sorted({1, usable_cores(), usable_cores() + 1})
    for number, count in enumerate(counts):
        on_step("backing the sample up and reading it back", number / len(counts))
        threads.append(_run_engine(sample, os.path.join(folder, f"threads-{count}"), count))
    return Measurement(
        data_bytes=min(len(every) * segment_bytes, source.size_bytes),
        sample_bytes=sample.size_bytes,
        cores=len(os.sched_getaffinity(0)),
        read_rate=sample.size_bytes / max(read_s, 1e-9),
        write_rate=write_rate,
        chunkings=tuple(trial.result() for trial in trials),
        levels=levels,
        threads=tuple(threads),
    )


def _data_segments(source: BlockSource, segment_bytes: int) -> list[int]:
    found: list[int] = []
    for offset, length in source.data_extents(0, source.size_bytes):
        first, last = offset // segment_bytes, (offset + length - 1) // segment_bytes
        found.extend(n for n in range(first, last + 1) if not found or n > found[-1])
    return found


def _try_in_memory(
    sample: SampledSource,
    segment_bytes: int,
    trials: Sequence[_Trial],
    on_step: Callable[[str, float], None],
) -> tuple[tuple[LevelResult, ...], float]:
    buffer = memoryview(bytearray(min(segment_bytes, sample.size_bytes)))
    first = zstandard.ZstdCompressor(level=1)
    pieces: list[bytes] = []
    read_s = 0.0
    for start in range(0, sample.size_bytes, segment_bytes):
        on_step("trying chunkers", start / sample.size_bytes)
        view = buffer[: min(segment_bytes, sample.size_bytes - start)]
        began = time.perf_counter()
        sample.read_into(start, view)
        read_s += time.perf_counter() - began
        for trial in trials:
            trial.take(view, first)
        share = max(64 * KIB, _LEVEL_SAMPLE_BYTES * segment_bytes // max(sample.size_bytes, segment_bytes))
        at = 0
        for part in make_chunker(CHUNKINGS[1]).cut(view):
            if part > 0 and share > 0:
                pieces.append(bytes(view[at : at + part]))
                share -= part
            at += abs(part)
    levels = []
    for number, level in enumerate(LEVELS):
        on_step("trying compression levels", number / len(LEVELS))
        levels.append(_try_level(level, pieces))
    return tuple(levels), read_s


def _try_level(level: int, pieces: Sequence[bytes]) -> LevelResult:
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    total = sum(map(len, pieces))
    began = time.perf_counter()
    packed = [compressor.compress(piece) for piece in pieces]
    compressed = time.perf_counter()
    for piece in packed:
        decompressor.decompress(piece)
    done = time.perf_counter()
    stored = sum(min(len(a), len(b)) for a, b in zip(packed, pieces, strict=True))
    return LevelResult(
        level, total / max(stored, 1), total / (compressed - began), total / (done - compressed)
    )


def _write_rate(folder: str) -> float:
    path = os.path.join(folder, "write-test")
    block = os.urandom(4 * MIB)
    try:
        began = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for _ in range(_WRITE_TEST_BYTES // len(block)):
                os.write(fd, block)
            os.fdatasync(fd)
        finally:
            os.close(fd)
            os.unlink(path)
        return _WRITE_TEST_BYTES / (time.perf_counter() - began)
    except OSError as error:
        raise storage_error(error, f"measuring how fast {folder} can be written") from error


def _run_engine(sample: SampledSource, path: str, threads: int) -> ThreadsResult:
    info = DiskInfo(name="sample", size_bytes=sample.size_bytes, format="raw")
    machine = Machine("disk", "sample", "", "the sample", (SourceDisk(info, sample),))
    options = BackupOptions(workers=threads)
    with Repository.init(path, InitOptions()) as repository:
        rates = []
        for _ in range(2):
            began = time.perf_counter()
            repository.backup(machine, options)
            rates.append(sample.size_bytes / (time.perf_counter() - began))
        point = repository.points()[-1]
        began = time.perf_counter()
        repository.restore(point, [(point.manifest.disks[0].tree, _NullSink())], workers=threads)
        return ThreadsResult(threads, rates[0], rates[1], sample.size_bytes / (time.perf_counter() - began))


def recommend(measurement: Measurement) -> tuple[InitOptions, str]:
    """The settings that suit the source best, and one sentence with the reason.

    The chunk size is the largest whose `month_bytes` come within 2 % of the smallest: fewer chunks mean a
    smaller index and faster restores. The level is the highest that still compresses as fast as the source
    can be read, on all cores.
    """
    totals = {r.chunker: measurement.month_bytes(r) for r in measurement.chunkings}
    least = min(totals.values())
    good = [params for params, total in totals.items() if total <= 1.02 * least]
    chosen = max(good, key=lambda params: (params.chunk_size_bytes, params.name == "aligned"))
    first = measurement.levels[0]
    level = 0
    why_level = f"the data does not shrink (ratio {first.ratio:.2f}), so compressing it is wasted time"
    if first.ratio >= 1.05:
        level = 1
        why_level = f"zstd level 1 already gives a ratio of {first.ratio:.2f} and every higher level would be the bottleneck"
        for result in measurement.levels[1:]:
            fast_enough = result.compress_rate * measurement.cores >= measurement.read_rate
            if fast_enough and result.ratio >= 1.02 * first.ratio:
                level = result.level
                why_level = (
                    f"zstd level {level} (ratio {result.ratio:.2f}) still keeps up with reading the source"
                )
    reason = (
        f"{chosen.name} with {chosen.chunk_size_bytes // KIB} KiB needs the least space for a first backup and "
        f"{_MONTH_BACKUPS} that each change one place per 16 MiB (or within 2 % of it, with fewer chunks); {why_level}."
    )
    return InitOptions(
        chunker=chosen.name, chunk_size_bytes=chosen.chunk_size_bytes, compression_level=level
    ), reason
