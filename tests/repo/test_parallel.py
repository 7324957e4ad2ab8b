"""How many threads work: as many as there are cores, and more only while nobody uses these."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from holdfast.repo import parallel
from holdfast.repo.parallel import run_parallel, usable_cores


def _most_at_once(seconds: float, workers: int | None, waiting: int) -> int:
    """How many tasks that only wait were under way at a time, at most."""
    lock = threading.Lock()
    most = now = 0
    end_s = time.monotonic() + seconds

    def work(_task: int) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    run_parallel(
        itertools.takewhile(lambda _n: time.monotonic() < end_s, itertools.count()),
        work,
        workers,
        waiting=waiting,
    )
    return most


@pytest.fixture
def idle_share(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What share of the time of the cores this machine says that it has left."""
    share = [1.0]
    began_s = time.monotonic()
    monkeypatch.setattr(
        parallel, "_machine_idle_s", lambda: (time.monotonic() - began_s) * usable_cores() * share[0]
    )
    return share


@pytest.mark.parametrize("waiting", [0, 3])
def test_more_while_the_machine_is_idle(idle_share: list[float], waiting: int) -> None:
    assert _most_at_once(2.0, None, waiting) == usable_cores() + 1 + waiting


def test_no_more_where_others_use_the_cores(idle_share: list[float]) -> None:
    idle_share[0] = 0.1
    assert _most_at_once(1.5, None, 3) == usable_cores()


def test_as_many_as_were_asked_for(idle_share: list[float]) -> None:
    assert _most_at_once(1.0, 2, 3) == 2


def test_a_machine_that_does_not_tell_counts_as_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_machine_idle_s", lambda: float("inf"))
    assert _most_at_once(1.5, None, 0) == usable_cores() + 1


def test_the_machine_tells_how_long_it_was_idle() -> None:
    before = parallel._machine_idle_s()
    assert 0 <= before <= parallel._machine_idle_s() < float("inf")
