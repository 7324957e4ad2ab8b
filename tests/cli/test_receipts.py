"""A hostile client that may only add, with whatever clock it likes: `prune` keeps what came in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rig.disks import content, machine_of
from rig.engine import SMALL, quiet
from rig.remote import all_gone, remote_repository

from holdfast.repo.backup import BackupOptions, run_backup
from holdfast.repo.repository import Repository
from holdfast.repo.wire.rights import Rights

DAY_S = 86_400


@pytest.fixture
def flooded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, set[str]]:
    """A repository with a good point of each of ten days, and junk that claims to be the last of a day."""
    monkeypatch.setenv("TZ", "UTC")
    path = tmp_path / "repo"
    Repository.init(str(path), SMALL, notify=quiet).close()
    first = (int(time.time()) // DAY_S - 10) * DAY_S
    far_clock = [0.0]

    def client() -> Repository:
        return remote_repository(str(path), Rights(append_only=True), clock=lambda: far_clock[0])

    def add(claimed: int, number: int) -> str:
        with client() as repository:
            engine = replace(repository._engine(), clock=lambda: claimed)  # the client's own clock
            options = BackupOptions(time=claimed, workers=1)
            made = run_backup(engine, machine_of([content([number])]), options, repository.points())
            assert made.point is not None
            return made.point.hex()

    good = set()
    for day in range(10):
        far_clock[0] = first + day * DAY_S + 7200
        good.add(add(int(far_clock[0]), 1 + day))
    for day in range(8):  # what claims to be of today or yesterday may well be
        add(first + day * DAY_S + 86_000, 100 + day)
    all_gone()
    return path, good


def test_junk_with_chosen_times_pushes_nothing_out(
    flooded: tuple[Path, set[str]], done: Callable[..., Any]
) -> None:
    path, good = flooded
    for rules in (("--keep-daily", "5"), ("--keep-within", "5d"), ("--keep-last", "5")):
        plan = done("prune", "-r", path, *rules, "--dry-run", "--json").summary["points"]
        kept = [point["id"] for point in plan if point["kept"]]
        assert len(good.intersection(kept)) >= 5, rules
    done("check", "-r", path, "--rebuild-index")
    again = done("prune", "-r", path, "--keep-last", "5", "--dry-run", "--json").summary["points"]
    assert [point["id"] for point in again if point["kept"]] == kept
    listed = done("list", "-r", path, "--json").document["points"]
    received = {point["id"]: point["received"] for point in listed}
    together = list(received.values()).count(max(received.values()))
    assert together == 9  # the junk, and the good one of that day
    shown = done("show", "-r", path, min(good)).out
    assert f"received       {received[min(good)]}\n" in shown
