"""The engine against a dictionary: everything that happens to a repository, in any order.

Backups of machines that change, several at a time and interleaved; processes that are killed anywhere, the
power that goes out, storage that fails; points that are forgotten, brought back and collected, also behind a running
backup's back; the index that is deleted and made anew. After each step every restore point that was reported restores bit for bit, nothing
else is listed that is not complete, and `check --read-data` finds nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rig.disks import KIB, content, machine_of
from rig.engine import (
    ONE_WORKER,
    SMALL,
    FolderWorld,
    MemoryWorld,
    Truth,
    World,
    chunk_copies,
    contents,
)
from rig.faults import Crash, CrashAt, Faults, When, disk_error, disk_full
from rig.stepped import SteppedBackup
from rig.usage import live_bytes, reachable_bytes

from holdfast.errors import StorageError
from holdfast.ids import RecordId
from holdfast.repo import session
from holdfast.repo.gc import CollectOptions
from holdfast.repo.repository import Repository

FACTOR = 20 if os.environ.get("HOLDFAST_SOAK") else 1
VMS = st.sampled_from(["web1", "db1", "mail"])
UNITS = st.integers(0, 24)
EDITS = st.lists(
    st.tuples(st.integers(0, 39), st.lists(UNITS, min_size=1, max_size=20)), min_size=1, max_size=3
)
SIZES = st.none() | st.integers(0, 40)
TAILS = st.sampled_from([b"", b"tail", b"\0" * 5000, b"x" * 4097])
WHEN = st.sampled_from(list(When))


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    options = SMALL

    def world_at(self, path: Path) -> World:
        raise NotImplementedError

    @initialize(seed=st.integers(0, 2**32))
    def begin_all(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.urandom = os.urandom
        os.urandom = self.rng.randbytes
        self.kept = session._BATCH_BYTES, session._BATCH_AGE_S
        session._BATCH_BYTES, session._BATCH_AGE_S = 300_000, 1e9  # type: ignore[misc]
        self.folder = tempfile.mkdtemp(prefix="machine-")
        self.world = self.world_at(Path(self.folder) / "repo")
        self.truth = Truth()
        self.units: dict[str, list[int]] = {}
        self.running: list[SteppedBackup] = []
        self.unreported: list[bytes] = []
        self.forgotten: dict[str, dict[str, bytes]] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for backup in self.running:
                backup.kill()
            os.urandom = self.urandom
            session._BATCH_BYTES, session._BATCH_AGE_S = self.kept  # type: ignore[misc]
            shutil.rmtree(self.folder)

    # --- what happens in the machines that are backed up

    def changed(self, vm: str, edits, size, tail: bytes) -> bytes:
        units = self.units.setdefault(vm, [1, 2, 3, 0, 0, 4, 5, 1])
        for at, new in edits:
            units += [0] * (at - len(units))
            units[at : at + len(new)] = new
        if size is not None:
            del units[size:]
        return content(units, tail)

    # --- backups

    @rule(vm=VMS, edits=EDITS, size=SIZES, tail=TAILS)
    def back_up(self, vm, edits, size, tail) -> None:
        data = self.changed(vm, edits, size, tail)
        before = chunk_copies(self.world.store)
        with self.world.open() as repository:
            known = self.known(repository, before.keys())
            self.truth.backup(repository, [data], name=vm)
        again = chunk_copies(self.world.store) - before
        if not self.running:
            assert not again.keys() & known, "chunks that were committed were stored again"

    @rule(vm=VMS, edits=EDITS, size=SIZES, tail=TAILS, steps=st.integers(0, 3))
    @precondition(lambda self: len(self.running) < 3)
    def begin(self, vm, edits, size, tail, steps) -> None:
        backup = SteppedBackup(self.world, vm, self.changed(vm, edits, size, tail))
        backup.step(steps)
        self.running.append(backup)

    @rule(which=st.integers(0, 2), steps=st.integers(1, 3))
    @precondition(lambda self: self.running)
    def step(self, which, steps) -> None:
        self.running[which % len(self.running)].step(steps)

    @rule(which=st.integers(0, 2))
    @precondition(lambda self: self.running)
    def finish(self, which) -> None:
        backup = self.running.pop(which % len(self.running))
        point = backup.finish()
        if point not in self.forgotten:  # it may have been listed, and forgotten, before it was reported
            self.truth.points[point] = {"disk0.raw": backup.data}

    # --- disasters

    @rule(which=st.integers(0, 2))
    @precondition(lambda self: self.running)
    def kill(self, which) -> None:
        backup = self.running.pop(which % len(self.running))
        self.unreported.append(backup.data)
        backup.kill()

    @rule(vm=VMS, edits=EDITS, size=SIZES, tail=TAILS, at=st.integers(1, 40), when=WHEN, power=st.booleans())
    def crash(self, vm, edits, size, tail, at, when, power) -> None:
        data = self.changed(vm, edits, size, tail)
        faults = Faults(lambda number, _name: CrashAt(when) if number == at else None)
        repository = self.world.open(faults)
        machine = machine_of([data], name=vm)
        try:
            summary = repository.backup(machine, ONE_WORKER)
            assert summary.point is not None
            self.truth.points[summary.point.hex()] = contents(machine)
        except Crash:
            note(f"crashed {when.value} {faults.log[-1]}")
            self.unreported.append(data)
        self.world.kill(repository, faults)
        if power:
            self.lose_power()

    @rule()
    def lose_power(self) -> None:
        for backup in self.running:
            self.unreported.append(backup.data)
            backup.kill()
        self.running.clear()
        self.world.lose_power(self.rng)

    @rule(vm=VMS, edits=EDITS, tail=TAILS, at=st.integers(1, 30), full=st.booleans())
    def fail(self, vm, edits, tail, at, full) -> None:
        data = self.changed(vm, edits, None, tail)
        error = disk_full() if full else disk_error()
        faults = Faults(lambda number, _name: error if number == at or (full and number > at) else None)
        with self.world.open(faults) as repository:
            machine = machine_of([data], name=vm)
            try:
                summary = repository.backup(machine, ONE_WORKER)
                assert summary.point is not None
                self.truth.points[summary.point.hex()] = contents(machine)
            except StorageError:
                self.unreported.append(data)

    # --- keeping

    @rule()
    @precondition(lambda self: not self.running)
    def drop_index(self) -> None:
        self.world.drop_index()

    @rule(which=st.integers(0, 50))
    @precondition(lambda self: self.truth.points)
    def forget(self, which) -> None:
        with self.world.open() as repository:
            listed = sorted(self.truth.points)
            chosen = listed[which % len(listed)]
            repository.forget([repository.resolve(chosen)])
            self.forgotten[chosen] = self.truth.points.pop(chosen)

    @rule(which=st.integers(0, 50))
    @precondition(lambda self: self.forgotten)
    def recall(self, which) -> None:
        with self.world.open() as repository:
            hidden = repository.hidden_points()
            assert {point.id.hex() for point in hidden} == self.forgotten.keys()
            point = hidden[which % len(hidden)]
            repository.recall([point])
            self.truth.points[point.id.hex()] = self.forgotten.pop(point.id.hex())

    @rule(below=st.sampled_from([0.0, 0.5, 1.0]))
    def collect(self, below) -> None:
        with self.world.open() as repository:
            report = repository.collect(CollectOptions(compact_below=below))
            note(f"collected {report}")
            held = {point.hex() for owner in repository._index().sessions() for point in owner.holds}
            self.forgotten = {i: data for i, data in self.forgotten.items() if i in held}
            assert live_bytes(repository) == reachable_bytes(repository)

    @rule(at=st.integers(1, 30), when=WHEN, power=st.booleans(), below=st.sampled_from([0.0, 0.9]))
    def crash_in_collection(self, at, when, power, below) -> None:
        faults = Faults(lambda number, _name: CrashAt(when) if number == at else None)
        repository = self.world.open(faults)
        try:
            repository.collect(CollectOptions(compact_below=below))
        except Crash:
            note(f"crashed {when.value} {faults.log[-1]}")
        self.world.kill(repository, faults)
        if power:
            self.lose_power()
        with self.world.open() as repository:  # what it took can not be told from outside
            hidden = {point.id.hex() for point in repository.hidden_points()}
            self.forgotten = {i: data for i, data in self.forgotten.items() if i in hidden}

    @rule(at=st.integers(1, 30), full=st.booleans())
    def fail_in_collection(self, at, full) -> None:
        error = disk_full() if full else disk_error()
        faults = Faults(lambda number, _name: error if number == at else None)
        with self.world.open(faults) as repository:
            try:
                repository.collect()
            except StorageError:
                note(f"failed at {faults.log[-1]}")
        with self.world.open() as repository:
            hidden = {point.id.hex() for point in repository.hidden_points()}
            self.forgotten = {i: data for i, data in self.forgotten.items() if i in hidden}

    def known(self, repository: Repository, ids) -> set[RecordId]:
        asked = list(ids)
        places = repository._index().lookup(asked)
        return {i for i, place in zip(asked, places, strict=True) if place is not None}

    @invariant()
    def everything_is_as_reported(self) -> None:
        if not hasattr(self, "world"):
            return
        possible = self.unreported + [backup.data for backup in self.running if backup.over]
        with self.world.open() as repository:
            self.truth.verify(repository, unreported=lambda found: found.get("disk0.raw") in possible)


class MemoryMachine(EngineMachine):
    """In memory, where power cuts lose what was not synced."""

    def world_at(self, path: Path) -> World:
        return MemoryWorld(path, self.options)


class FolderMachine(EngineMachine):
    """In a folder, with LMDB, and with chunks that depend on content."""

    options = replace(SMALL, chunker="aligned", chunk_size_bytes=16 * KIB)

    def world_at(self, path: Path) -> World:
        return FolderWorld(path, self.options)


TestInMemory = MemoryMachine.TestCase
TestInMemory.settings = settings(max_examples=20 * FACTOR, stateful_step_count=25)

TestInAFolder = FolderMachine.TestCase
TestInAFolder.settings = settings(max_examples=8 * FACTOR, stateful_step_count=20)
