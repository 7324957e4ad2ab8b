"""The rate limit, with a clock of its own; the real one is tested on channels."""

from __future__ import annotations

import threading

import pytest

from holdfast.ssh.throttle import BURST_S, Throttle


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


@pytest.mark.parametrize("rate", [1, 1000, 50 << 20, 10**12])
def test_keeps_to_the_rate(rate: int) -> None:
    clock = Clock()
    throttle = Throttle(rate, clock=clock, sleep=clock.sleep)
    pieces = 400
    for _ in range(pieces):
        throttle.take(throttle.piece_bytes)
    assert clock.now_s - 1000 == pytest.approx((pieces - 1) * throttle.piece_bytes / rate, rel=0.01)


def test_unused_time_is_made_up_for_only_in_part() -> None:
    clock = Clock()
    throttle = Throttle(1_000_000, clock=clock, sleep=clock.sleep)
    clock.now_s += 3600
    begun_s = clock.now_s
    for _ in range(1000):
        throttle.take(1000)
    assert clock.now_s - begun_s == pytest.approx(1 - BURST_S, abs=0.01)


def test_threads_share_one_rate() -> None:
    lock = threading.Lock()
    waits_s: list[float] = []

    def sleep(seconds: float) -> None:
        with lock:
            waits_s.append(seconds)

    throttle = Throttle(1000, clock=lambda: 5.0, sleep=sleep)

    def taking() -> None:
        for _ in range(50):
            throttle.take(10)

    threads = [threading.Thread(target=taking) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # each piece has its own hundredth of a second, and the first had no unused time before it
    assert max(waits_s) == pytest.approx(199 * 0.01, abs=0.001)
    assert len({round(wait_s, 6) for wait_s in waits_s}) == len(waits_s)
