"""Writing pieces into pipes: everything arrives, in order, however much a pipe takes at a time."""

from __future__ import annotations

import fcntl
import os
import random
import threading

import pytest

from holdfast.ssh.descriptors import widen_pipe, writing_parts
from holdfast.ssh.throttle import Throttle


def _through_a_pipe(
    parts: list[bytes | bytearray | memoryview], throttle: Throttle | None
) -> tuple[bytes, list[int]]:
    """What arrives, and what each system call has taken; the reader takes a little at a time."""
    source, sink = os.pipe()
    arrived: list[bytes] = []

    def read() -> None:
        while data := os.read(source, 5000):
            arrived.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    counts = list(writing_parts(sink, parts, throttle))
    os.close(sink)
    thread.join()
    os.close(source)
    return b"".join(arrived), counts


@pytest.mark.parametrize("throttle", [None, Throttle(1 << 30, sleep=lambda _s: None)])
def test_all_pieces_arrive_in_order(throttle: Throttle | None) -> None:
    chance = random.Random(7)
    parts: list[bytes | bytearray | memoryview] = [
        chance.randbytes(chance.choice([0, 1, 72, 4096, 100_000])) for _ in range(200)
    ]
    parts += [b"", bytearray(b"last"), memoryview(b"of all"), b""]
    arrived, counts = _through_a_pipe(parts, throttle)
    assert arrived == b"".join(parts)
    assert sum(counts) == len(arrived)
    assert all(counts)


def test_more_pieces_than_a_system_call_takes() -> None:
    parts: list[bytes | bytearray | memoryview] = [bytes([number % 251]) for number in range(5000)]
    arrived, counts = _through_a_pipe(parts, None)
    assert arrived == b"".join(parts)
    assert len(counts) >= 5


def test_a_piece_that_is_taken_in_part_is_not_sent_from_its_front_again() -> None:
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    with pytest.raises(BlockingIOError):
        list(writing_parts(sink, [b"a" * 50_000, b"b" * 50_000]))
    os.close(sink)
    assert os.read(source, 100_000) == b"a" * 50_000 + b"b" * 15_536
    os.close(source)


def test_nothing_to_write_needs_no_system_call() -> None:
    assert list(writing_parts(-1, [])) == []
    assert list(writing_parts(-1, [b"", bytearray()])) == []


def test_a_reader_that_is_gone_is_an_error() -> None:
    source, sink = os.pipe()
    os.close(source)
    with pytest.raises(BrokenPipeError):
        list(writing_parts(sink, [b"x"]))
    os.close(sink)


def test_pipes_become_wider_and_anything_else_stays() -> None:
    source, sink = os.pipe()
    widen_pipe(sink, 1 << 17)
    assert fcntl.fcntl(source, fcntl.F_GETPIPE_SZ) == 1 << 17
    os.close(source)
    widen_pipe(sink, 1 << 17)
    os.close(sink)
    widen_pipe(sink, 1 << 17)  # closed: no error
    nothing = os.open(os.devnull, os.O_RDWR)
    widen_pipe(nothing, 1 << 17)
    os.close(nothing)
