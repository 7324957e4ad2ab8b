"""What holds for every chunker, and what holds for each."""

from __future__ import annotations

import array
import math
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.chunker import BLOCK_BYTES, PUBLISHED_SEED, Chunker, ChunkerParams, make_chunker
from holdfast.chunker.aligned import AlignedChunker
from holdfast.chunker.aligned_plain import (
    REPETITION_STRIDE_BYTES,
    SAMPLE_OFFSETS,
    PlainAlignedChunker,
    multipliers,
)

Disk = Callable[[str, int], bytes]
KIB, MIB = 1 << 10, 1 << 20
SECRET = bytes(range(32))


@st.composite
def segments(draw: st.DrawFn) -> bytes:
    """A few runs of blocks: random, zero, constant, nearly zero, filled in part; and any length of tail."""
    runs = []
    for _ in range(draw(st.integers(0, 6))):
        count = draw(st.integers(1, 90))
        kind = draw(st.sampled_from(["random", "random", "zero", "constant", "nearly", "part"]))
        number = draw(st.integers(0, 5))
        if kind == "random":
            runs.append(_random(number, count * BLOCK_BYTES))
        elif kind == "zero":
            runs.append(bytes(count * BLOCK_BYTES))
        elif kind == "constant":
            runs.append(bytes([number + 1]) * (count * BLOCK_BYTES))
        elif kind == "nearly":
            runs.append((bytes(draw(st.integers(0, 4095))) + b"\x01").ljust(BLOCK_BYTES, b"\0") * count)
        else:
            runs.append(_random(number, draw(st.integers(0, 4095))).ljust(BLOCK_BYTES, b"\0") * count)
    whole = b"".join(runs)
    return whole[: len(whole) - draw(st.sampled_from([0, 0, 1, 512, 4095, 5000]))]


def _random(number: int, size: int) -> bytes:
    from hashlib import shake_128

    return shake_128(b"%d" % number).digest(size)


def check_parts(data: bytes, parts: list[int]) -> None:
    assert sum(map(abs, parts)) == len(data)
    assert all(parts)
    place = 0
    for number, part in enumerate(parts):
        if part < 0:
            assert not any(data[place : place - part])
            assert number == 0 or parts[number - 1] > 0
        place += abs(part)


@pytest.fixture(params=["aligned 64", "aligned 16", "aligned 4096", "fixed 4", "fixed 64", "fastcdc 16"])
def chunker(request: pytest.FixtureRequest) -> Chunker:
    name, size = request.param.split()
    if name == "fastcdc":
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
    return make_chunker(ChunkerParams(name, int(size) * KIB), SECRET)


def test_parts_cover_the_segment(chunker: Chunker, disk: Disk) -> None:
    for size in (1, 511, 4095, 4096, 4097, 65536, 65537, 3 * MIB, 3 * MIB + 700):
        data = disk(f"cover {size}", size)
        parts = chunker.cut(memoryview(data))
        check_parts(data, parts)
        assert parts == chunker.cut(memoryview(data)), "cuts are a function of the bytes"


def test_any_buffer_at_any_address(chunker: Chunker, disk: Disk) -> None:
    data = disk("buffers", 2 * MIB + 77)
    parts = chunker.cut(memoryview(data))
    for shift in (1, 2, 4, 7):
        assert chunker.cut(memoryview(bytes(shift) + data)[shift:]) == parts
    assert chunker.cut(memoryview(bytearray(data))) == parts
    assert chunker.cut(memoryview(array.array("B", data))) == parts


def test_zeros_are_one_hole(chunker: Chunker) -> None:
    # 16 MiB: the longest minimum of a hole is a quarter of the largest chunk size
    for size in (16 * MIB, 16 * MIB - 4096, 16 * MIB - 1):
        assert chunker.cut(memoryview(bytes(size))) == [-size]


def test_nothing_is_carried_over_a_cut(chunker: Chunker, disk: Disk) -> None:
    data = disk("state", 4 * MIB)
    parts = chunker.cut(memoryview(data))
    borders = list(accumulate(map(abs, parts), initial=0))
    for number in range(0, len(parts), max(1, len(parts) // 12)):
        assert chunker.cut(memoryview(data)[borders[number] :]) == parts[number:]


def test_a_cut_is_settled_by_its_lookahead(chunker: Chunker, disk: Disk) -> None:
    data = disk("lookahead", 6 * MIB)
    parts = chunker.cut(memoryview(data))
    borders = list(accumulate(map(abs, parts), initial=0))
    for number in range(1, len(parts), max(1, len(parts) // 12)):
        seen = -(-(borders[number] + chunker.lookahead_bytes) // BLOCK_BYTES) * BLOCK_BYTES
        for beyond in (b"", bytes(8 * MIB), disk("other", MIB)):
            assert chunker.cut(memoryview(data[:seen] + beyond))[:number] == parts[:number]


def moved_chunks(chunker: Chunker, before: bytes, after: bytes) -> int:
    def chunks(data: bytes) -> set[bytes]:
        borders = list(accumulate(map(abs, chunker.cut(memoryview(data))), initial=0))
        return {data[a:b] for a, b in pairwise(borders)}

    return len(chunks(after) - chunks(before))


@pytest.mark.parametrize("name", ["aligned", "fastcdc"])
def test_insertion_makes_few_new_chunks(name: str, disk: Disk) -> None:
    if name == "fastcdc":
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
    chunker = make_chunker(ChunkerParams(name, 64 * KIB))
    data = _random(11, 8 * MIB)
    inserted = _random(12, 3 * BLOCK_BYTES)
    few = 6  # of more than 100: the one that is hit, and some until the cuts are in step again
    for place in range(MIB, 8 * MIB, MIB):
        at = place + 5 * BLOCK_BYTES
        assert moved_chunks(chunker, data, data[:at] + inserted + data[at:]) <= few
        assert moved_chunks(chunker, data, data[:at] + data[at + 9 * BLOCK_BYTES :]) <= few
    assert len(chunker.cut(memoryview(data))) > 50


def test_equal_blocks_are_few_chunks() -> None:
    """Chunks of the maximum, whatever the block: one of them, and what is left at the end."""
    chunker = AlignedChunker(64 * KIB, PUBLISHED_SEED)
    for pattern in (b"\xff", b"\x01\x02\x03\x04", b"holdfast", _random(3, 64), _random(4, 256)):
        data = (pattern * BLOCK_BYTES)[:BLOCK_BYTES] * (5 * MIB // BLOCK_BYTES)
        parts = chunker.cut(memoryview(data))
        assert len({*parts}) <= 2
        assert len(parts) <= 5 * MIB // (24 * KIB) + 1
    # Blocks that repeat as a whole but not within themselves are all candidates or none.
    for number in range(20):
        data = _random(100 + number, BLOCK_BYTES) * (5 * MIB // BLOCK_BYTES)
        assert len({*chunker.cut(memoryview(data))}) <= 2


class TestAligned:
    @pytest.mark.parametrize("size", [16 * KIB, 64 * KIB, 256 * KIB, 4 * MIB])
    def test_lengths(self, size: int, disk: Disk) -> None:
        data = disk(f"lengths {size}", 24 * MIB + 5)
        parts = AlignedChunker(size, SECRET).cut(memoryview(data))
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            assert part <= 8 * size
            if part > 0:
                assert part >= size * 3 // 8 or is_last or parts[number + 1] < 0
                assert part % BLOCK_BYTES == 0 or is_last
            else:
                assert -part > size // 4 - BLOCK_BYTES
                assert part % BLOCK_BYTES == 0 or is_last

    def test_mean_of_dear_and_of_cheap_bytes(self) -> None:
        """Bytes that do not compress are cut to 9/16 of the chunk size, repetitive ones to 2.3 times."""
        chunker = AlignedChunker(64 * KIB, SECRET)
        dear = _random(1, 24 * MIB)
        assert 34 < len(dear) / len(chunker.cut(memoryview(dear))) / KIB < 38
        cheap = b"".join(
            dear[n : n + 8] + dear[n : n + BLOCK_BYTES - 8] for n in range(0, 24 * MIB, BLOCK_BYTES)
        )
        cheap = b"".join(cheap[n : n + 64] * 64 for n in range(0, 24 * MIB, BLOCK_BYTES))
        assert 130 < len(cheap) / len(chunker.cut(memoryview(cheap))) / KIB < 165

    def test_short_zero_runs_stay_in_their_chunk(self) -> None:
        chunker = AlignedChunker(64 * KIB, SECRET)
        data = b"\1" * (4 * KIB)
        assert chunker.cut(memoryview(data + bytes(12 * KIB) + data)) == [20 * KIB]
        assert chunker.cut(memoryview(data + bytes(16 * KIB) + data)) == [4 * KIB, -16 * KIB, 4 * KIB]
        assert chunker.cut(memoryview(data + bytes(12 * KIB + 1))) == [4 * KIB, -(12 * KIB + 1)]
        assert chunker.cut(memoryview(bytes(12 * KIB))) == [12 * KIB]

    def test_the_seed_decides(self, disk: Disk) -> None:
        data = disk("seed", 4 * MIB)
        one = AlignedChunker(64 * KIB, SECRET).cut(memoryview(data))
        other = AlignedChunker(64 * KIB, SECRET[:-1] + b"x").cut(memoryview(data))
        assert one != other

    def test_an_unsampled_change_moves_no_cut(self, disk: Disk) -> None:
        data = bytearray(_random(5, 4 * MIB))
        chunker = AlignedChunker(64 * KIB, SECRET)
        parts = chunker.cut(memoryview(data))
        for block in range(0, len(data), BLOCK_BYTES):
            data[block + 2052 : block + 2055] = b"new"
        assert chunker.cut(memoryview(data)) == parts


class TestOneDefinition:
    @settings(max_examples=150, deadline=None)
    @given(segments(), st.sampled_from([16, 32, 64, 256]), st.sampled_from([PUBLISHED_SEED, SECRET]))
    @example(b"", 64, SECRET)
    def test_with_numpy_and_without(self, data: bytes, size_kib: int, seed: bytes) -> None:
        parts = AlignedChunker(size_kib * KIB, seed).cut(memoryview(data))
        check_parts(data, parts)
        assert PlainAlignedChunker(size_kib * KIB, seed).cut(data) == parts
        assert PlainAlignedChunker(size_kib * KIB, seed).cut(memoryview(data)) == parts

    @settings(max_examples=60, deadline=None)
    @given(segments(), st.sampled_from([16, 64]))
    def test_as_the_document_says(self, data: bytes, size_kib: int) -> None:
        assert AlignedChunker(size_kib * KIB, SECRET).cut(memoryview(data)) == as_documented(
            data, size_kib * KIB, SECRET
        )

    def test_on_a_disk(self, disk: Disk) -> None:
        for number in range(3):
            data = disk(f"both {number}", 12 * MIB + number * 1000)
            for size in (16 * KIB, 64 * KIB, MIB):
                parts = AlignedChunker(size, SECRET).cut(memoryview(data))
                assert PlainAlignedChunker(size, SECRET).cut(data) == parts
                assert as_documented(data, size, SECRET) == parts

    def test_same_lookahead(self) -> None:
        for size in (16 * KIB, 64 * KIB, 4 * MIB):
            assert (
                AlignedChunker(size, SECRET).lookahead_bytes
                == PlainAlignedChunker(size, SECRET).lookahead_bytes
            )


def as_documented(data: bytes, chunk_size: int, seed: bytes) -> list[int]:
    """docs/chunking.md, step by step, with no thought of speed: the third opinion."""
    blocks = [data[at : at + 4096].ljust(4096, b"\0") for at in range(0, len(data), 4096)]
    average = chunk_size // 4096
    bits = max(1, average.bit_length() - 1 - 2)
    weights = multipliers(seed)

    def may_end_chunk(block: bytes) -> bool:
        value = 0
        for weight, offset in zip(weights, SAMPLE_OFFSETS, strict=True):
            value += weight * int.from_bytes(block[offset : offset + 4], "little")
        words = [block[at : at + 4] for at in range(0, 4096, REPETITION_STRIDE_BYTES)]
        needed = bits if len(words) == len(set(words)) else bits + 3
        return (value % 2**64) >> (64 - needed) == 2**needed - 1

    zero = [not any(block) for block in blocks]
    run_before = [0]  # length of the run of zero blocks that ends before each block
    for is_zero in zero:
        run_before.append(run_before[-1] + 1 if is_zero else 0)
    run_from = [0] * (len(blocks) + 1)  # length of the run of zero blocks that starts at each block
    for number in reversed(range(len(blocks))):
        run_from[number] = run_from[number + 1] + 1 if zero[number] else 0

    parts: list[int] = []
    start = 0
    while start < len(blocks):
        hole = max(1, average // 4)
        if run_from[start] >= hole and (start == 0 or not zero[start - 1] or run_before[start] < hole):
            parts.append(-run_from[start])
            start += run_from[start]
            continue
        end = start + 1
        while end < len(blocks) and end - start < average * 8:
            if run_from[end] >= hole and not zero[end - 1]:
                break
            if end - start >= math.ceil(average * 3 / 8) and may_end_chunk(blocks[end - 1]):
                break
            end += 1
        parts.append(end - start)
        start = end
    lengths = [part * 4096 for part in parts]
    if lengths and len(data) % 4096:
        short = 4096 - len(data) % 4096
        lengths[-1] += short if lengths[-1] < 0 else -short
    return lengths


class TestFixed:
    def test_lengths(self, disk: Disk) -> None:
        data = disk("fixed", 3 * MIB + 100)
        parts = make_chunker(ChunkerParams("fixed", 64 * KIB)).cut(memoryview(data))
        assert all(part % (64 * KIB) == 0 for part in parts[:-1])
        assert max(parts) == 64 * KIB

    def test_holes(self) -> None:
        chunker = make_chunker(ChunkerParams("fixed", 4 * KIB))
        block = b"\1".rjust(4 * KIB, b"\0")
        assert chunker.cut(memoryview(bytes(8 * KIB) + block + bytes(4 * KIB) + block)) == [
            -8 * KIB,
            4 * KIB,
            -4 * KIB,
            4 * KIB,
        ]
        assert chunker.cut(memoryview(block + bytes(5))) == [4 * KIB, -5]


class TestFastCdc:
    def test_lengths(self, disk: Disk) -> None:
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
        data = disk("fastcdc", 12 * MIB + 3)
        parts = make_chunker(ChunkerParams("fastcdc", 64 * KIB), SECRET).cut(memoryview(data))
        assert all(16 * KIB <= part <= 256 * KIB for part in parts[:-1] if part > 0)
        assert any(part % 512 for part in parts[:-1])
