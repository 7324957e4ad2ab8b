"""Whether data is deflated follows from what is slower, the connection or deflating."""

from __future__ import annotations

import os
import zlib

import pytest

from holdfast.esxi.agent import frames
from holdfast.esxi.agent.deflating import Deflator, Rate

KIB = 1 << 10
MIB = 1 << 20
TEXT = b"a line of a log, number 12345\n" * 3000


def link_of(bytes_per_s: float) -> Rate:
    rate = Rate()
    rate.note(8 * MIB, 8 * MIB / bytes_per_s)
    return rate


def deflated_share(link: Rate, rounds: int = 200) -> float:
    deflator = Deflator(link, 2)
    codecs = [deflator.stored(memoryview(TEXT), frames.AUTO)[0] for _ in range(rounds)]
    return codecs.count(frames.ZLIB) / rounds


def test_a_slow_connection_is_spared() -> None:
    assert deflated_share(link_of(1e6)) == 1.0


def test_a_fast_connection_is_not_held_up() -> None:
    assert deflated_share(link_of(1e12)) < 0.4, "only to find out, and then now and again"


def test_what_is_not_known_yet_is_deflated() -> None:
    assert deflated_share(Rate(), 30) == 1.0


def test_what_does_not_shrink_travels_as_it_is() -> None:
    noise = os.urandom(64 * KIB)
    for codec in (frames.ZLIB, frames.AUTO):
        assert Deflator(link_of(1e6), 2).stored(memoryview(noise), codec) == (frames.RAW, noise)


@pytest.mark.parametrize("size", [1, 100, 4 * KIB, 8 * KIB + 1, 64 * KIB])
def test_both_ways_bring_the_same_bytes(size: int) -> None:
    data = (TEXT * 2)[:size]
    deflator = Deflator(link_of(1e6), 2)
    assert deflator.stored(memoryview(data), frames.RAW) == (frames.RAW, data)
    codec, stored = deflator.stored(memoryview(data), frames.ZLIB)
    assert (zlib.decompress(stored) if codec == frames.ZLIB else stored) == data


def test_a_rate_forgets() -> None:
    rate = Rate()
    assert rate.per_s() is None
    rate.note(100 * MIB, 1.0)
    fast = rate.per_s()
    for _ in range(20):
        rate.note(MIB, 1.0)
    slow = rate.per_s()
    assert fast is not None
    assert slow is not None
    assert slow < fast / 20
