from __future__ import annotations

import itertools
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DestinationExists, StorageError
from holdfast.esxi.device import DeviceSink, WrittenRanges, open_sink
from holdfast.esxi.raw import FileSink, RawSource

MIB = 1 << 20


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(1, 5)
)
def test_gaps_are_what_was_not_written(cells: list[int], rng: random.Random, batch: int) -> None:
    written = WrittenRanges(batch=batch)
    numbers = [number for number, cell in enumerate(cells) if cell]
    rng.shuffle(numbers)
    for number in numbers:
        written.add(number * 10, number * 10 + 10)
    gaps = list(written.gaps(len(cells) * 10))
    expected = bytearray(cell for cell in cells for _ in range(10))
    seen = bytearray(b"\1" * len(expected))
    for start, end in gaps:
        assert start < end
        seen[start:end] = bytes(end - start)
    assert seen == expected
    assert all(first[1] < second[0] for first, second in itertools.pairwise(gaps))


def test_a_path_that_is_no_device_gets_a_file(tmp_path: Path) -> None:
    out = open_sink(str(tmp_path / "x"), 5, overwrite=False, mode=0o600)
    assert isinstance(out, FileSink)
    out.abort()


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device of 4 MiB, full of 0xff."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * (4 * MIB))
    made = subprocess.run(
        ["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"needs loop devices and root: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
def test_a_device_is_written_in_place_and_its_gaps_become_zeros(loop_device: str) -> None:
    size = 3 * MIB + 1111
    expected = bytearray(size)
    out = open_sink(loop_device, size, overwrite=True, mode=0o600)
    assert isinstance(out, DeviceSink)
    for start, data in (
        (700, b"a" * 1000),
        (5000, b"b" * 4096),
        (2 * MIB, b"c" * 65536),
        (size - 5, b"d" * 5),
    ):
        out.write(start, memoryview(data))
        expected[start : start + len(data)] = data
    out.finish()
    source = RawSource(loop_device)
    assert source.size_bytes == 4 * MIB
    assert list(source.data_extents(0, 4 * MIB)) == [(0, 4 * MIB)]
    data = bytearray(4 * MIB)
    source.read_into(0, memoryview(data))
    source.close()
    assert data[:size] == expected
    assert data[size:] == b"\xff" * (4 * MIB - size)


@pytest.mark.root
def test_a_device_is_refused_without_overwrite_or_when_too_small(loop_device: str) -> None:
    with pytest.raises(DestinationExists, match="loop"):
        open_sink(loop_device, 1, overwrite=False, mode=0o600)
    with pytest.raises(StorageError, match="loop") as caught:
        open_sink(loop_device, 4 * MIB + 1, overwrite=True, mode=0o600)
    assert "at least" in caught.value.hint
    with pytest.raises(DestinationExists, match="no regular file"):
        FileSink(loop_device, 1, overwrite=True, mode=0o600)


@pytest.mark.root
def test_a_device_that_is_used_is_refused(loop_device: str) -> None:
    holder = os.open(loop_device, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(StorageError, match="in use"):
            open_sink(loop_device, 1, overwrite=True, mode=0o600)
    finally:
        os.close(holder)
