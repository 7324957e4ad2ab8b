"""Splicing gives what chunking the whole new segment gives, and reads little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import shake_128
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.chunker import BLOCK_BYTES, Chunker, ChunkerParams, make_chunker
from holdfast.chunker.splice import KeptPart, NewPart, splice

Disk = Callable[[str, int], bytes]
KIB, MIB = 1 << 10, 1 << 20
SECRET = bytes(range(32))
NAMES = ["aligned 16", "aligned 64", "fixed 4", "fixed 64", "fastcdc 16"]


def chunker_of(text: str) -> Chunker:
    name, size = text.split()
    if name == "fastcdc":
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
    return make_chunker(ChunkerParams(name, int(size) * KIB), SECRET)


@dataclass
class Reader:
    """Serves the new bytes, and notes what it was asked for; refuses what it must not be asked."""

    old: bytes
    new: bytes
    changed: list[tuple[int, int]]
    old_parts: list[int]
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def read_changed(self, start: int, end: int) -> bytes:
        self.asked.append(("changed", start, end))
        covered = [False] * (end - start)
        for a, b in self.changed:
            for at in range(max(a, start), min(b, end)):
                covered[at - start] = True
        assert start < end
        assert all(covered), "asked the source for something that did not change"
        return self.new[start:end]

    def read_unchanged(self, start: int, end: int) -> memoryview:
        self.asked.append(("unchanged", start, end))
        assert start < end
        assert not any(a < end and start < b for a, b in self.changed), (
            "asked for old bytes of a changed range"
        )
        borders = accumulate(map(abs, self.old_parts), initial=0)
        for border, part in zip(borders, self.old_parts, strict=False):
            assert part > 0 or not (border < end and start < border - part), "asked for the bytes of a hole"
        return memoryview(self.old)[start:end]

    @property
    def asked_bytes(self) -> int:
        return sum(end - start for _, start, end in self.asked)


def check(chunker: Chunker, old: bytes, new: bytes, changed: list[tuple[int, int]]) -> Reader:
    old_parts = chunker.cut(memoryview(old))
    reader = Reader(old, new, changed, old_parts)
    parts = list(splice(chunker, old_parts, changed, reader))
    assert [part.length for part in parts] == chunker.cut(memoryview(new))
    place = 0
    for part in parts:
        assert part.start == place
        place += abs(part.length)
        if isinstance(part, KeptPart):
            assert old_parts[part.number] == part.length
            assert old[part.start : place] == new[part.start : place]
        else:
            assert isinstance(part, NewPart)
            assert part.data == (new[part.start : place] if part.length > 0 else b"")
    return reader


RANDOM = shake_128(b"splice").digest(2 * MIB)


@st.composite
def changes(draw: st.DrawFn) -> tuple[bytes, bytes, list[tuple[int, int]]]:
    """An old segment, a new one of the same length, and ranges that cover the changes."""
    runs = []
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 60))
        kind = draw(st.sampled_from(["random", "random", "zero", "constant"]))
        if kind == "random":
            at = draw(st.integers(0, 40)) * 1000
            runs.append(RANDOM[at : at + count * BLOCK_BYTES])
        else:
            runs.append(bytes([kind == "constant"]) * (count * BLOCK_BYTES))
    old = b"".join(runs)
    old = old[: len(old) - draw(st.sampled_from([0, 0, 1, 700, 4095]))]
    new = bytearray(old)
    changed = []
    for _ in range(draw(st.integers(0, 4))):
        unit = draw(st.sampled_from([1, 512, 4096, 4096]))
        start = min(draw(st.integers(0, len(old) // unit)) * unit, len(old))
        length = draw(st.sampled_from([1, 7, 512, 4096, 8192, 40960, 300_000]))
        end = min(start + length, len(old))
        what = draw(st.sampled_from(["random", "zero", "one", "nothing"]))
        if what == "random":
            new[start:end] = RANDOM[MIB + start % 977 :][: end - start]
        elif what == "zero":
            new[start:end] = bytes(end - start)
        elif what == "one" and end > start:
            new[start] ^= 1
        over = draw(st.sampled_from([0, 0, 1, 512, 4096, 70_000]))
        changed.append((max(0, start - over), min(len(old), end + over)))
    return old, bytes(new), changed


@pytest.mark.parametrize("name", NAMES)
def test_equals_chunking_from_scratch(name: str) -> None:
    chunker = chunker_of(name)

    @settings(max_examples=150, deadline=None)
    @given(changes())
    def holds(change: tuple[bytes, bytes, list[tuple[int, int]]]) -> None:
        check(chunker, *change)

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_on_a_disk(name: str, disk: Disk) -> None:
    """Many changes of real sizes in longer segments, at both ends too."""
    chunker = chunker_of(name)
    for number in range(6):
        old = disk(f"splice {number}", 4 * MIB + 4096 * number + number % 2 * 999)
        dice = shake_128(f"{name} {number}".encode()).digest(64)
        new = bytearray(old)
        changed = []
        for place, what in zip(dice[:32:2], dice[1:32:2], strict=True):
            start = len(old) * place // 255 // BLOCK_BYTES * BLOCK_BYTES
            end = min(start + (1 + what % 9) * BLOCK_BYTES, len(old))
            new[start:end] = bytes(end - start) if what % 3 == 0 else RANDOM[what * 999 :][: end - start]
            changed.append((start, end))
        check(chunker, old, bytes(new), changed)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changed_reads_nothing(name: str, disk: Disk) -> None:
    data = disk("nothing", 2 * MIB)
    assert check(chunker_of(name), data, data, []).asked == []
    assert check(chunker_of(name), data, data, [(5, 5)]).asked == []


@pytest.mark.parametrize("name", NAMES)
def test_all_changed(name: str, disk: Disk) -> None:
    old, new = disk("all old", 2 * MIB), disk("all new", 2 * MIB)
    reader = check(chunker_of(name), old, new, [(0, 2 * MIB)])
    assert reader.asked == [("changed", 0, 2 * MIB)]


def test_an_empty_segment() -> None:
    check(chunker_of("aligned 64"), b"", b"", [])


@pytest.mark.parametrize(("name", "most"), [("aligned 64", 4), ("fixed 64", 3)])
def test_reads_little(name: str, most: int) -> None:
    """One changed block of 16 MiB costs a few chunks around it."""
    chunker = chunker_of(name)
    old = shake_128(b"little").digest(16 * MIB)
    asked = []
    for place in range(0, 16 * MIB, 1021 * KIB):
        at = place // BLOCK_BYTES * BLOCK_BYTES
        new = old[:at] + RANDOM[:BLOCK_BYTES] + old[at + BLOCK_BYTES :]
        asked.append(check(chunker, old, new, [(at, at + BLOCK_BYTES)]).asked_bytes)
    assert sum(asked) / len(asked) < most * 64 * KIB


def test_a_block_in_a_hole_reads_that_block(disk: Disk) -> None:
    chunker = chunker_of("aligned 64")
    new = bytearray(16 * MIB)
    new[9 * MIB : 9 * MIB + 4096] = RANDOM[:4096]
    reader = check(chunker, bytes(16 * MIB), bytes(new), [(9 * MIB, 9 * MIB + 4096)])
    assert reader.asked == [("changed", 9 * MIB, 9 * MIB + 4096)]


def test_a_hole_appears_and_goes(disk: Disk) -> None:
    for name in NAMES:
        chunker = chunker_of(name)
        full = shake_128(b"hole").digest(3 * MIB)
        holed = full[:MIB] + bytes(MIB) + full[2 * MIB :]
        check(chunker, full, holed, [(MIB, 2 * MIB)])
        check(chunker, holed, full, [(MIB, 2 * MIB)])


def test_a_range_outside_is_refused() -> None:
    chunker = chunker_of("aligned 64")
    with pytest.raises(AssertionError):
        check(chunker, bytes(8192), bytes(8192), [(0, 8193)])
