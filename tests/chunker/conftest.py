"""Bytes that look like a disk, from a number alone: the same on every machine and Python version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

BLOCK = 4096


def stream(label: str, size_bytes: int) -> bytes:
    return hashlib.shake_128(label.encode()).digest(size_bytes)


def run_of_blocks(label: str, kind: int, count: int) -> bytes:
    if kind <= 2:
        return stream(label, count * BLOCK)
    if kind == 3:
        return bytes(count * BLOCK)
    if kind == 4:
        return b"\xff" * (count * BLOCK)
    if kind == 5:  # text: lines with a counter
        lines = b"".join(b"%08d served %s in 17 ms\n" % (n, label.encode()) for n in range(count * 128))
        return lines[: count * BLOCK].ljust(count * BLOCK, b"\n")
    if kind == 6:  # files shorter than a block
        return b"".join(
            stream(f"{label} {n}", 1 + n * 641 % (BLOCK - 1)).ljust(BLOCK, b"\0") for n in range(count)
        )
    # nearly zero: one byte in each block, most often where no sample looks
    return b"".join((bytes(n * 911 % BLOCK) + b"\x01").ljust(BLOCK, b"\0") for n in range(count))


def disk_bytes(label: str, size_bytes: int) -> bytes:
    """Runs of 1 to 64 blocks of different kinds, cut off at the size."""
    dice = iter(stream(f"dice {label}", size_bytes // BLOCK * 2 + 4))
    runs = []
    size = 0
    while size < size_bytes:
        kind = next(dice) % 8
        runs.append(run_of_blocks(f"{label} {size}", kind, 1 + next(dice) % 64))
        size += len(runs[-1])
    return b"".join(runs)[:size_bytes]


@pytest.fixture(scope="session")
def disk() -> Callable[[str, int], bytes]:
    return disk_bytes
