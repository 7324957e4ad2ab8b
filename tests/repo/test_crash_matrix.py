"""Every command that changes a repository is interrupted at every step by which it does so. What that leaves is
published in docs/RELIABILITY.md, and the document is held against it here (`rig.matrix`: real folders and processes).

Then in memory, where more can be tried: a backup is killed at every single operation that reaches storage, before,
after and amid it. For each of them the promises are held against what is left: every listed point restores bit for
bit and nothing unfinished is listed, `check` finds nothing, earlier points are untouched, and the next backup finds
again what the dead one had stored. The dead process leaves everything that it wrote (kill -9), or the machine
loses what was not synced (power cut; see `rig.stores`).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, MemoryWorld, Truth, chunk_copies, restored
from rig.faults import Crash, CrashAt, Faults, When, disk_error, disk_full
from rig.matrix import run_operation
from rig.operations import OPERATIONS
from rig.reliability import DOCUMENT, Rows, parsed, rendered, rows_of

from holdfast.errors import StorageError
from holdfast.repo import session
from holdfast.repo.repository import Repository

EVERY = bool(os.environ.get("HOLDFAST_SOAK"))


@pytest.fixture(scope="module")
def published() -> dict[str, Rows]:
    """The tables of docs/RELIABILITY.md."""
    return parsed(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("operation", [operation.name for operation in OPERATIONS])
def test_every_fault_leaves_what_is_published(operation: str, published: dict[str, Rows]) -> None:
    """At every step with HOLDFAST_SOAK=1, else at some of each kind."""
    found = rows_of(run_operation(operation, every=EVERY))
    rows = published.get(operation, {})
    hint = "if that is right, 'make reliability' writes the document anew"
    assert found.keys() == rows.keys(), hint
    surprises = {row: beyond for row, what in found.items() if (beyond := what.beyond(rows[row]))}
    assert not surprises, hint


def test_the_published_matrix_is_as_it_was_written(published: dict[str, Rows]) -> None:
    """No row was written by hand, and none of them speaks of lost data."""
    assert published.keys() == {operation.name for operation in OPERATIONS}
    assert rendered(published) == DOCUMENT.read_text(encoding="utf-8")
    rows = [row for rows in published.values() for row in rows.values()]
    assert all(row.lost <= {"none", "the running backup"} for row in rows)
    assert sum(row.instants for row in rows) > 2000


FIRST = content([*range(1, 13), 0, 0, 0, 0, *range(13, 40)])
SECOND = content([*range(1, 9), 100, 101, 0, 0, *range(200, 231), 17, 18, *range(232, 256)], b"and a tail")
FILES = {"web1.vmx": b"displayName = 'web1'\n" * 40, "web1.nvram": b""}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryWorld:
    """One finished backup; the next one will commit several batches and seal several packs."""
    monkeypatch.setattr(session, "_BATCH_BYTES", 600_000)
    monkeypatch.setattr(session, "_BATCH_AGE_S", 1e9)
    made = MemoryWorld(tmp_path / "repo")
    with made.open() as repository:
        backup(repository, FIRST)
    return made


def backup(repository: Repository, disk: bytes) -> str:
    summary = repository.backup(machine_of([disk], files=FILES), ONE_WORKER)
    assert summary.point is not None
    return summary.point.hex()


def truth_of(world: MemoryWorld) -> Truth:
    """What is there before the crash, which must be there after it."""
    truth = Truth()
    with world.open() as repository:
        for point in repository.points():
            truth.points[point.id.hex()] = restored(repository, point)
    assert len(truth.points) == 1
    return truth


def operations(world: MemoryWorld) -> list[str]:
    """The operations of the second backup, in order."""
    faults = Faults()
    with world.copy().open(faults) as repository:
        backup(repository, SECOND)
    return faults.log


def is_second(found: dict[str, bytes]) -> bool:
    return found == {"disk0.raw": SECOND, **FILES}


def aftermath(world: MemoryWorld, truth: Truth, rng: random.Random, *, torn: bool = False) -> None:
    """Holds the promises against what a dead backup has left, then runs the next one.

    With `torn`, what was never synced may have holes, and is cut off from the first one on: only what was
    committed must not be stored again.
    """
    with world.open() as repository:
        truth.verify(repository, unreported=is_second)
    committed = {record_id for record_id, place in world.index.scan(None, 10**6) if place.kind == 1}
    before = chunk_copies(world.store)
    assert committed <= before.keys()
    with world.open() as repository:
        point = backup(repository, SECOND)
        truth.points[point] = {"disk0.raw": SECOND, **FILES}
        truth.verify(repository, unreported=is_second)
    after = chunk_copies(world.store)
    again = {
        record_id
        for record_id, count in (after - before).items()
        if record_id in (committed if torn else before)
    }
    assert not again, "chunks that the dead backup had stored were stored again"
    if rng.random() < 0.3:
        world.drop_index()
        with world.open() as repository:
            truth.verify(repository, unreported=is_second)


def crashed(world: MemoryWorld, at: int, when: When) -> Faults:
    faults = Faults(lambda number, _name: CrashAt(when) if number == at else None)
    repository = world.open(faults)
    with pytest.raises(Crash):
        backup(repository, SECOND)
    world.kill(repository, faults)
    assert faults.fired == 1, "no crash happened: the matrix does not cover what it should"
    return faults


def test_the_backup_under_test_does_everything_that_a_backup_can_do(world: MemoryWorld) -> None:
    counts = Counter(operations(world))
    assert counts["create"] >= 3
    assert counts["sync"] >= 4
    assert counts["commit"] >= 5
    assert counts["append"] >= 10
    assert counts["begin_session"] == 1
    assert counts["end_session"] == 1


@pytest.mark.parametrize("when", list(When))
def test_kill_at_every_operation(world: MemoryWorld, when: When, rng: random.Random) -> None:
    total = len(operations(world))
    for at in range(1, total + 1):
        spoilt = world.copy()
        crashed(spoilt, at, when)
        spoilt.store.kill()
        aftermath(spoilt, truth_of(world), rng)


@pytest.mark.parametrize("when", list(When))
def test_power_cut_at_every_operation(world: MemoryWorld, when: When, rng: random.Random) -> None:
    total = len(operations(world))
    for at in range(1, total + 1):
        dead = world.copy()
        crashed(dead, at, when)
        # What the second process finds is synced by nobody yet: a second cut may take it as well.
        for _ in range(3):
            spoilt = MemoryWorld.__new__(MemoryWorld)
            spoilt.path, spoilt.store, spoilt.index = dead.path, dead.store.copy(), dead.index.copy()
            spoilt.lose_power(rng)
            aftermath(spoilt, truth_of(world), rng, torn=True)


def test_crash_after_crash(world: MemoryWorld, rng: random.Random) -> None:
    """Recovery itself is interrupted, again and again, until one run gets through."""
    total = len(operations(world))
    truth = truth_of(world)
    for _ in range(12):
        spoilt = world.copy()
        crashes = 0
        for _ in range(6):
            at = rng.randint(1, total)
            faults = Faults(
                lambda number, _name, at=at: CrashAt(rng.choice(list(When))) if number == at else None
            )
            repository = spoilt.open(faults)
            try:
                backup(repository, SECOND)
            except Crash:
                crashes += 1
            spoilt.kill(repository, faults)
            if rng.random() < 0.5:
                spoilt.lose_power(rng)
            if rng.random() < 0.2:
                spoilt.drop_index()
        assert crashes
        fresh = Truth()
        fresh.points = dict(truth.points)
        aftermath(spoilt, fresh, rng)


def test_power_cut_after_a_rebuild(world: MemoryWorld, rng: random.Random) -> None:
    """A rebuild takes over what a killed backup never synced; what it promises must be durable then."""
    total = len(operations(world))
    for at in range(1, total + 1):
        spoilt = world.copy()
        crashed(spoilt, at, When.AFTER)
        spoilt.drop_index()
        truth = truth_of(world)
        with spoilt.open() as repository:
            truth.verify(repository, unreported=is_second)
        spoilt.lose_power(rng)
        aftermath(spoilt, truth, rng, torn=True)


@pytest.mark.parametrize("name", ["append", "sync", "commit", "create", "begin_session"])
@pytest.mark.parametrize("kind", ["full", "broken"])
def test_an_error_at_every_operation_is_reported_and_harms_nothing(
    world: MemoryWorld, name: str, kind: str, rng: random.Random
) -> None:
    """Not a crash: the process lives, reports the error, and its cleanup reaches storage."""
    make: Callable[[], StorageError] = disk_full if kind == "full" else disk_error  # type: ignore[assignment]
    log = operations(world)
    numbers = [number for number, operation in enumerate(log, 1) if operation == name]
    assert numbers
    for at in numbers:
        spoilt = world.copy()
        error = make()
        # A full disk stays full; a broken write is met once.
        faults = Faults(
            lambda number, operation, at=at, error=error: (
                error
                if number == at
                or (kind == "full" and number > at and operation in ("append", "create", "commit"))
                else None
            )
        )
        repository = spoilt.open(faults)
        with pytest.raises(type(error)):
            backup(repository, SECOND)
        repository.close()
        assert faults.fired
        held = [p for p in spoilt.store.ids() if spoilt.store._files[p].holder is not None]
        assert not held, "a failed backup still holds packs"
        aftermath(spoilt, truth_of(world), rng)


@pytest.mark.parametrize("kind", ["full", "broken"])
def test_an_error_after_the_point_is_listed_is_no_failure(world: MemoryWorld, kind: str) -> None:
    """What is left of the session can not be removed; the backup is complete all the same."""
    error = disk_full() if kind == "full" else disk_error()
    faults = Faults(lambda _number, name: error if name == "end_session" else None)
    truth = truth_of(world)
    with world.open(faults) as repository:
        point = backup(repository, SECOND)
    assert faults.fired == 1
    truth.points[point] = {"disk0.raw": SECOND, **FILES}
    with world.open() as repository:
        truth.verify(repository)
