"""What each way of cutting 4 KiB blocks into chunks gives on a sequence of related disk images.

    LAB=FOLDER_OF_IMAGES python benchmarks/chunking_explore.py [GROUP...] [--every N] [--cache FILE]

The images (see `IMAGES`) are read once and reduced to a few numbers per block: an id of its content,
whether it is zero, whether its end is zero, whether words repeat in it, and mixed values of several choices of sampled words. Every
trial then cuts these arrays, which takes a second, and compresses the chunks that no earlier trial has
compressed. `--every N` compresses only the chunks whose digest is a multiple of N and scales up by what
the blocks of all new chunks take when each is compressed alone (a ratio estimate; good to 0.2 % at N = 8).

Columns: new MB, the same compressed by zstd level 1, chunks stored, parts in new leaves, metadata
(216 bytes per stored chunk, 36 per chunk reference, 4 per hole in new leaves), and the total of
compressed and metadata, which is what the trials are compared by.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

BLOCK = 4096
IMAGES = ("vm1-d0.raw", "vm1-d1.raw", "vm2-d0.raw")
STORED_CHUNK_BYTES = 72 + 44 + 100
REFERENCE_BYTES = 36
HOLE_BYTES = 4

SAMPLES = {
    "16 x u64 spread": (8, [i * 256 + ((i * 37) % 32) * 8 for i in range(16)]),
    "16 x u32 spread": (4, [i * 256 + ((i * 37) % 64) * 4 for i in range(16)]),
    "8 x u32 spread": (4, [i * 512 + ((i * 37) % 128) * 4 for i in range(8)]),
    "32 x u32 spread": (4, [i * 128 + ((i * 37) % 32) * 4 for i in range(32)]),
    "8 head + 8 spread u64": (8, [i * 8 for i in range(8)] + [512 * i + 264 for i in range(8)]),
    "8 head (0..28) + 8 spread u32": (4, [i * 4 for i in range(8)] + [512 * i + 264 for i in range(8)]),
    "8 head (0..56) + 8 spread u32": (4, [i * 8 for i in range(8)] + [512 * i + 264 for i in range(8)]),
    "16 falling off u32": (4, [0, 4, 12, 24, 40, 60, 124, 188, 316, 572, 1080, 1592, 2104, 2616, 3128, 3640]),
    "12 head (0..60) + 12 spread u32": (
        4,
        [0, 4, 8, 16, 20, 24, 32, 36, 40, 48, 52, 60] + [340 * i + 176 + i % 3 * 20 for i in range(12)],
    ),
    "16 head (0..60) + 16 spread u32": (4, [i * 4 for i in range(16)] + [256 * i + 136 for i in range(16)]),
    "24 falling off u32": (
        4,
        [
            0,
            4,
            8,
            16,
            24,
            32,
            44,
            60,
            92,
            124,
            156,
            188,
            252,
            316,
            444,
            572,
            828,
            1084,
            1596,
            2108,
            2620,
            3132,
            3644,
            3900,
        ],
    ),
    "8 x u64 head": (8, [i * 8 for i in range(8)]),
    "4 x u64": (8, [0, 1024, 2048, 3072]),
    "all 512 x u64": (8, [i * 8 for i in range(512)]),
}
DEFAULT_SAMPLES = "16 falling off u32"

REPETITION = {
    "16 samples": SAMPLES[DEFAULT_SAMPLES][1],
    "32 words": list(range(0, BLOCK, 128)),
    "64 words": list(range(0, BLOCK, 64)),
}

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Image:
    """One disk image as arrays over its 4 KiB blocks."""

    path: str
    ids: U64
    zero: Bools
    tail_zero: dict[int, Bools]  # bytes at the end of the block -> are they all zero
    values: dict[str, U32]  # choice of samples -> mixed value of each block
    repeated: dict[str, Bools]  # set of words -> are two of them equal
    alone: npt.NDArray[np.int64]  # running sum of the blocks' sizes, each compressed alone


def multipliers(count: int) -> U64:
    return np.random.default_rng(7).integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)


def mixed_values(blocks: npt.NDArray[np.uint8], width: int, offsets: list[int]) -> U32:
    words = blocks.view(f"<u{width}")[:, [o // width for o in offsets]].astype(np.uint64)
    weights = multipliers(len(offsets))
    if width == 8:  # the high half of a word must reach the low half of the product's upper part
        words = (words ^ (words >> np.uint64(32))) * weights
    else:
        words = words * weights
    return (words.sum(axis=1, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)


def scan(path: str, alone: dict[int, int]) -> Image:
    size = os.path.getsize(path)
    count = size // BLOCK
    ids = np.zeros(count, np.uint64)
    zero = np.ones(count, np.bool_)
    tails = {n: np.ones(count, np.bool_) for n in (4, 8, 16, 64)}
    values = {name: np.zeros(count, np.uint32) for name in SAMPLES}
    repeated = {name: np.zeros(count, np.bool_) for name in REPETITION}
    sizes = np.zeros(count + 1, np.int64)
    compress = zstandard.ZstdCompressor(level=1).compress
    step = 1024
    with open(path, "rb") as file:
        for first in range(0, count, step):
            data = file.read(step * BLOCK)
            here = slice(first, first + len(data) // BLOCK)
            if data.count(0) == len(data):
                continue
            view = memoryview(data)
            ids[here] = [xxhash.xxh3_64_intdigest(view[o : o + BLOCK]) for o in range(0, len(data), BLOCK)]
            for number, block_id in enumerate(ids[here].tolist()):
                if block_id not in alone:
                    alone[block_id] = min(BLOCK, len(compress(view[number * BLOCK : (number + 1) * BLOCK])))
                sizes[first + number + 1] = alone[block_id]
            blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCK)
            zero[here] = ~blocks.view("<u8").any(axis=1)
            for n, flags in tails.items():
                flags[here] = ~blocks[:, BLOCK - n :].any(axis=1)
            for name, (width, offsets) in SAMPLES.items():
                values[name][here] = mixed_values(blocks, width, offsets)
            for name, offsets in REPETITION.items():
                words = np.sort(blocks.view("<u4")[:, [o // 4 for o in offsets]], axis=1)
                repeated[name][here] = (words[:, 1:] == words[:, :-1]).any(axis=1)
    ids[zero] = 0
    return Image(path, ids, zero, tails, values, repeated, np.cumsum(sizes))


@dataclass(frozen=True)
class Rule:
    """A cut rule. Chances are per block; sizes in blocks.

    Below `average` the chances are `p1` (and `p1_tail` for a block whose last `tail` bytes are zero, which
    is what the end of a file looks like), from there on `p2` and `p2_tail`.
    """

    minimum: int = 8
    average: int = 16
    maximum: int = 64
    p1: float = 1 / 16
    p2: float = 1 / 16
    p1_tail: float | None = None
    p2_tail: float | None = None
    tail: int = 8
    hole: int = 1  # shortest run of zero blocks that becomes a hole; 0: no holes
    samples: str = DEFAULT_SAMPLES
    repeated: str = "64 words"  # blocks in which two of these words are equal ...
    more_bits: int = 0  # ... need so many bits more to be candidates
    segment: int = 4096


Parts = Iterator[tuple[int, int, bool]]


def next_true(flags: Bools) -> list[int]:
    """For every position, the first position not before it whose flag is set; the length if none."""
    count = len(flags)
    places = np.where(flags, np.arange(count), count)
    return np.append(np.minimum.accumulate(places[::-1])[::-1], count).tolist()


def hole_runs(zero: Bools, shortest: int) -> tuple[Bools, list[int]]:
    """Flags of blocks in zero runs of at least `shortest` blocks, and the end of the run for its start."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], zero.view(np.int8), [0]))))
    flags = np.zeros(len(zero), np.bool_)
    for start, end in edges.reshape(-1, 2):
        if shortest and end - start >= shortest:
            flags[start:end] = True
    return flags, next_true(~flags)


def cut_blocks(image: Image, rule: Rule) -> Iterator[list[tuple[int, int, bool]]]:
    """The parts of each segment as (first block, end block, is a hole)."""
    value = image.values[rule.samples].astype(np.float64) / 2**32
    if rule.more_bits:
        value = np.where(image.repeated[rule.repeated], value * 2**rule.more_bits, value)
    tail = image.tail_zero[rule.tail]

    def chances(plain: float, at_tail: float | None) -> list[int]:
        limit = np.where(tail, plain if at_tail is None else at_tail, plain)
        return next_true((value < limit) & ~image.zero)

    count = len(value)
    early = chances(rule.p1, rule.p1_tail)
    late = chances(rule.p2, rule.p2_tail)
    in_hole, data_again = hole_runs(image.zero, rule.hole)
    next_hole = next_true(in_hole)
    for segment in range(0, count, rule.segment):
        stop = min(segment + rule.segment, count)
        parts: list[tuple[int, int, bool]] = []
        start = segment
        while start < stop:
            if in_hole[start]:
                end = min(data_again[start], stop)
                parts.append((start, end, True))
                start = end
                continue
            limit = min(start + rule.maximum, stop, next_hole[start])
            end = early[start + rule.minimum - 1] + 1 if start + rule.minimum - 1 < count else limit
            if end >= start + rule.average:
                # the block that makes the chunk exactly `average` long is judged by the late chance
                place = start + max(rule.minimum, rule.average) - 1
                end = late[place] + 1 if place < count else limit
            end = min(end, limit)
            parts.append((start, end, False))
            start = end
        yield parts


@dataclass
class Store:
    """What would be stored: digests seen, and the compressed size of every chunk ever asked for."""

    every: int
    sizes: dict[int, int] = field(default_factory=dict)

    def compressed(self, digest: int, data: Callable[[], memoryview]) -> int:
        size = self.sizes.get(digest)
        if size is None:
            plain = data()
            size = min(len(plain), len(zstandard.ZstdCompressor(level=1).compress(plain)))
            self.sizes[digest] = size
        return size


@dataclass
class Tally:
    name: str
    new_bytes: list[int] = field(default_factory=list)
    compressed_bytes: float = 0
    chunks: int = 0
    references: int = 0
    holes: int = 0
    scan_s: float = 0

    @property
    def metadata_bytes(self) -> int:
        return self.chunks * STORED_CHUNK_BYTES + self.references * REFERENCE_BYTES + self.holes * HOLE_BYTES

    def row(self) -> str:
        new = " + ".join(f"{n / 1e6:.0f}" for n in self.new_bytes)
        return (
            f"| {self.name} | {new} = {sum(self.new_bytes) / 1e6:.0f} | {self.compressed_bytes / 1e6:.0f} "
            f"| {self.chunks / 1e3:.1f} k | {self.references / 1e3:.0f} k + {self.holes / 1e3:.0f} k "
            f"| {self.metadata_bytes / 1e6:.1f} | {(self.compressed_bytes + self.metadata_bytes) / 1e6:.0f} |"
        )


HEADER = (
    "| trial | new, MB | zstd 1, MB | chunks | references + holes | metadata, MB | total, MB |\n"
    "|---|---|---|---|---|---|---|"
)

Segments = Iterator[list[tuple[int, int, bool, int]]]
"""Per segment: (first byte, end byte, is a hole, digest)."""


def tally(name: str, trial: Callable[[Image], Segments], images: list[Image], store: Store) -> Tally:
    result = Tally(name)
    seen: set[int] = set()
    alone_all = alone_sampled = 0
    leaves: set[bytes] = set()
    for image in images:
        new = 0
        alone = image.alone.tolist()
        data = memoryview(np.memmap(image.path, np.uint8, "r"))
        for parts in trial(image):
            leaf = xxhash.xxh3_128_digest(repr([(e - s, h, d) for s, e, h, d in parts]).encode())
            if leaf not in leaves:
                leaves.add(leaf)
                holes = sum(h for _, _, h, _ in parts)
                result.holes += holes
                result.references += len(parts) - holes
            for start, end, hole, digest in parts:
                if hole or digest in seen:
                    continue
                seen.add(digest)
                new += end - start
                result.chunks += 1
                weight = alone[-(-end // BLOCK)] - alone[start // BLOCK]
                alone_all += weight
                if digest % store.every == 0:
                    alone_sampled += weight
                    result.compressed_bytes += store.compressed(
                        digest, lambda data=data, start=start, end=end: data[start:end]
                    )
        result.new_bytes.append(new)
    if store.every > 1:
        result.compressed_bytes *= alone_all / alone_sampled
    return result


def block_trial(rule: Rule) -> Callable[[Image], Segments]:
    def trial(image: Image) -> Segments:
        ids = memoryview(image.ids.tobytes())
        for parts in cut_blocks(image, rule):
            yield [
                (s * BLOCK, e * BLOCK, h, 0 if h else xxhash.xxh3_64_intdigest(ids[s * 8 : e * 8]))
                for s, e, h in parts
            ]

    return trial


def byte_trial(
    cut: Callable[[memoryview], list[int]], segment: int = 16 << 20
) -> Callable[[Image], Segments]:
    """A chunker that needs the bytes: `cut` gives the lengths of a segment's chunks."""

    def trial(image: Image) -> Segments:
        data = memoryview(np.memmap(image.path, np.uint8, "r"))
        for first in range(0, len(data), segment):
            view = data[first : first + segment]
            if image.zero[first // BLOCK : (first + segment) // BLOCK].all():
                yield [(first, first + len(view), True, 0)]
                continue
            parts = []
            place = 0
            for length in cut(view):
                digest = xxhash.xxh3_64_intdigest(view[place : place + length], seed=1)
                parts.append((first + place, first + place + length, False, digest))
                place += length
            yield parts

    return trial


def fastcdc_library(average: int) -> Callable[[memoryview], list[int]]:
    import fastcdc

    return lambda view: [
        c.length for c in fastcdc.fastcdc(view, min_size=average // 4, avg_size=average, max_size=average * 4)
    ]


def pyfastcdc_library(average: int, normalization: int) -> Callable[[memoryview], list[int]]:
    from pyfastcdc import FastCDC

    chunker = FastCDC(
        avg_size=average, min_size=average // 4, max_size=average * 4, normalized_chunking=normalization
    )
    return lambda view: [c.length for c in chunker.cut_buf(view)]


def implementation(chunk_size_bytes: int, seed: bytes) -> Callable[[Image], Segments]:
    """`AlignedChunker` itself on the bytes, rather than the model of it."""
    from holdfast.chunker.aligned import AlignedChunker

    chunker = AlignedChunker(chunk_size_bytes, seed)

    def trial(image: Image) -> Segments:
        data = memoryview(np.memmap(image.path, np.uint8, "r"))
        ids = memoryview(image.ids.tobytes())
        for first in range(0, len(data), 16 << 20):
            place = first
            parts = []
            for length in chunker.cut(data[first : first + (16 << 20)]):
                end = place + abs(length)
                digest = xxhash.xxh3_64_intdigest(ids[place // BLOCK * 8 : end // BLOCK * 8])
                parts.append((place, end, length < 0, digest))
                place = end
            yield parts

    return trial


def implementations() -> Iterator[tuple[str, Callable[[Image], Segments]]]:
    from holdfast.chunker import PUBLISHED_SEED

    for kib in (16, 32, 64, 128, 256, 1024, 4096):
        yield f"aligned {kib} KiB", implementation(kib << 10, PUBLISHED_SEED)
    for number in range(3):
        yield f"aligned 64 KiB, secret seed {number}", implementation(64 << 10, bytes([number]) * 32)


def references() -> Iterator[tuple[str, Callable[[Image], Segments]]]:
    yield "fixed 64 KiB", block_trial(Rule(minimum=16, average=16, maximum=16, p1=0, p2=0, hole=0))
    yield "fastcdc 64 KiB", byte_trial(fastcdc_library(65536))
    for normalization in (1, 2):
        name = f"pyfastcdc 64 KiB, normalization {normalization}"
        yield name, byte_trial(pyfastcdc_library(65536, normalization))


GROUPS: dict[str, dict[str, Rule]] = {}


def normal(minimum: int, average: int, maximum: int, p1: float, p2: float, **more: object) -> Rule:
    return replace(Rule(minimum, average, maximum, 1 / p1, 1 / p2), **more)  # type: ignore[arg-type]


def tails(minimum: int, average: int, maximum: int, p1: float, t1: float, p2: float, t2: float) -> Rule:
    return Rule(minimum, average, maximum, 1 / p1, 1 / p2, 1 / t1, 1 / t2)


def single(minimum: int, maximum: int, p: float, words: str, more_bits: int, **more: object) -> Rule:
    return normal(minimum, minimum, maximum, p, p, repeated=words, more_bits=more_bits, hole=4, **more)


CHOSEN = single(6, 128, 4, "64 words", 3)


GROUPS["chosen"] = {
    "chosen: 6/128, p 1/4, repeated 1/32": CHOSEN,
    "chosen, minimum 7": replace(CHOSEN, minimum=7, average=7),
    "chosen, minimum 8": replace(CHOSEN, minimum=8, average=8),
    "chosen, segments of 8 MiB": replace(CHOSEN, segment=2048),
    "chosen, segments of 32 MiB": replace(CHOSEN, segment=8192),
    "chosen, maximum 64": replace(CHOSEN, maximum=64),
    "chosen, holes from 1 block": replace(CHOSEN, hole=1),
    "chosen, holes from 16 blocks": replace(CHOSEN, hole=16),
    "chosen, samples 16 x u32 spread": replace(CHOSEN, samples="16 x u32 spread"),
    "chosen, samples all 512 x u64": replace(CHOSEN, samples="all 512 x u64"),
}
GROUPS["repetition"] = {
    "8/64, p 1/16": Rule(hole=4),
    "8/20/64, p 1/32, 1/8": normal(8, 20, 64, 32, 8, hole=4),
    "16 samples repeat: 3 bits; 8/10/128, p 1/32, 1/8": normal(
        8, 10, 128, 32, 8, hole=4, repeated="16 samples", more_bits=3
    ),
    "16 samples repeat: never; 8/12/128, p 1/32, 1/8": normal(
        8, 12, 128, 32, 8, hole=4, repeated="16 samples", more_bits=40
    ),
    "32 words repeat: 3 bits; 8/128, p 1/4": single(8, 128, 4, "32 words", 3),
    "32 words repeat: 4 bits; 8/128, p 1/4": single(8, 128, 4, "32 words", 4),
    "32 words repeat: 4 bits; 8/12/128, p 1/16, 1/4": normal(
        8, 12, 128, 16, 4, hole=4, repeated="32 words", more_bits=4
    ),
    "64 words repeat: 2 bits; 12/128, p 1/4": single(12, 128, 4, "64 words", 2),
    "64 words repeat: 3 bits; 8/128, p 1/4": single(8, 128, 4, "64 words", 3),
    "64 words repeat: 4 bits; 8/128, p 1/4": single(8, 128, 4, "64 words", 4),
    "64 words repeat: 3 bits; 8/128, p 1/8": single(8, 128, 8, "64 words", 3),
    "64 words repeat: 3 bits; 4/8/128, p 1/16, 1/4": normal(4, 8, 128, 16, 4, hole=4, more_bits=3),
}
GROUPS["samples"] = {f"8/64, p 1/16, {name}": Rule(samples=name) for name in SAMPLES}
GROUPS["holes"] = {f"8/64, p 1/16, holes from {h} blocks": Rule(hole=h) for h in (0, 1, 2, 4, 8, 16)}
GROUPS["normal"] = {
    "4/64, p 1/20": normal(4, 4, 64, 20, 20),
    "8/16/64, p 1/32, 1/8": normal(8, 16, 64, 32, 8),
    "8/24/64, p 1/32, 1/8": normal(8, 24, 64, 32, 8),
    "10/20/64, p 1/32, 1/8": normal(10, 20, 64, 32, 8),
    "12/20/64, p 1/64, 1/4": normal(12, 20, 64, 64, 4),
    "8/256, p 1/16": normal(8, 8, 256, 16, 16),
}
GROUPS["tails"] = {
    "8/64, p 1/32, end of file 1/4": tails(8, 8, 64, 32, 4, 32, 4),
    "8/64, p 1/32, end of file 1/2": tails(8, 8, 64, 32, 2, 32, 2),
    "8/64, p 1/32, end of file 1": tails(8, 8, 64, 32, 1, 32, 1),
    "16/64, p 1/64, end of file 1": tails(16, 16, 64, 64, 1, 64, 1),
    "8/20/64, p 1/64 and 1/16, then 1/8 and 1/4": tails(8, 20, 64, 64, 16, 8, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--cache", default="")
    arguments = parser.parse_args()
    lab = os.environ["LAB"]
    images: list[Image] = []
    sizes: dict[int, int] = {}
    if arguments.cache and os.path.exists(arguments.cache):
        with open(arguments.cache, "rb") as file:
            images, sizes = pickle.load(file)
    if not images or set(images[0].values) != set(SAMPLES):
        began = time.perf_counter()
        alone: dict[int, int] = {}
        images = [scan(os.path.join(lab, name), alone) for name in IMAGES]
        if arguments.cache:
            with open(arguments.cache, "wb") as file:
                pickle.dump((images, sizes), file)
        print(f"scanned in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    store = Store(arguments.every, sizes)
    print(HEADER, flush=True)
    for group in arguments.groups or ["references", "implementation", *GROUPS]:
        trials = (
            references()
            if group == "references"
            else implementations()
            if group == "implementation"
            else ((name, block_trial(rule)) for name, rule in GROUPS[group].items())
        )
        for name, trial in trials:
            print(tally(name, trial, images, store).row(), flush=True)
    if arguments.cache:
        with open(arguments.cache, "wb") as file:
            pickle.dump((images, store.sizes), file)


if __name__ == "__main__":
    main()
