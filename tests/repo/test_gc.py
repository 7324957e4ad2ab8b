"""Garbage collection: what is not needed goes, what is needed stays, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import os
import random
import threading
from pathlib import Path

import pytest
from rig.disks import KIB, MIB, machine_of
from rig.engine import SMALL, FolderWorld, MemoryWorld, Truth, World, assert_clean
from rig.faults import Crash, CrashAt, Faults, When, disk_error, disk_full
from rig.stepped import SteppedBackup
from rig.usage import live_bytes, reachable_bytes

from holdfast.errors import DamagedPoint, HoldfastError, PointNotFound, RepositoryBusy
from holdfast.ids import PointId, RecordId
from holdfast.repo.check import contents_of
from holdfast.repo.format.rows import PackState
from holdfast.repo.gc import CollectOptions
from holdfast.repo.index import Batch, PointChange
from holdfast.repo.liveset import LiveSet
from holdfast.repo.repository import Repository


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a mebibyte are worth the trouble here."""
    monkeypatch.setattr("holdfast.repo.gc._LEAST_DEAD_BYTES", 64 * KIB)


@pytest.fixture(params=["memory", "folder"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    make = MemoryWorld if request.param == "memory" else FolderWorld
    return make(tmp_path / "repo", SMALL)


def point_id(text: str) -> PointId:
    return PointId(RecordId(bytes.fromhex(text)))


def forget(repository: Repository, truth: Truth, *ids: str) -> None:
    repository.forget([repository.resolve(i) for i in ids])
    for i in ids:
        del truth.points[i]


def history(world: World, rng: random.Random, length: int = 6) -> tuple[Truth, list[str]]:
    truth, disk, ids = Truth(), bytearray(rng.randbytes(3 * MIB)), []
    with world.open() as repository:
        for _ in range(length):
            at = rng.randrange(0, len(disk) - 300 * KIB)
            disk[at : at + 300 * KIB] = rng.randbytes(300 * KIB)
            summary = truth.backup(repository, [bytes(disk)], name=rng.choice(["web1", "db1"]))
            assert summary.point is not None
            ids.append(summary.point.hex())
    return truth, ids


def test_a_live_set_never_denies_what_was_put_in(rng: random.Random) -> None:
    live = LiveSet(5000)
    inside = [rng.randbytes(32) for _ in range(5000)]
    for first in range(0, 5000, 700):
        live.add(b"".join(inside[first : first + 700]))
    assert not live.lacks(b"".join(inside)).any()
    outside = live.lacks(b"".join(rng.randbytes(32) for _ in range(5000)))
    assert outside.mean() > 0.99
    assert not len(live.lacks(b""))


def test_space_comes_back_and_every_other_point_stays(world: World, rng: random.Random) -> None:
    truth, ids = history(world, rng)
    with world.open() as repository:
        stored = sum(world.store.allocated_bytes(i) for i in world.store.ids())
        nothing = repository.collect()
        assert (nothing.points, nothing.records, nothing.freed_bytes) == (0, 0, 0)
        forget(repository, truth, *ids[:4])
        foreseen = repository.collect(CollectOptions(dry_run=True))
        truth.verify(repository)
        report = repository.collect()
        assert report.points == foreseen.points == 4
        assert (report.records, report.dropped_bytes) == (foreseen.records, foreseen.dropped_bytes)
        assert report.dropped_bytes > 800 * KIB
        assert live_bytes(repository) == reachable_bytes(repository)
        truth.verify(repository)
        freed = stored - sum(world.store.allocated_bytes(i) for i in world.store.ids())
        assert freed >= report.dropped_bytes // 2
        with pytest.raises(PointNotFound):
            repository.resolve(ids[0])
        assert not repository.hidden_points()
    world.drop_index()
    with world.open() as repository:
        truth.verify(repository)
        assert not repository.hidden_points(), "a collected point came back with a rebuilt index"


def test_all_points_can_go(world: World, rng: random.Random) -> None:
    truth, ids = history(world, rng, 3)
    with world.open() as repository:
        forget(repository, truth, *ids)
        repository.collect()
        truth.verify(repository)
        assert live_bytes(repository) == reachable_bytes(repository) < 10 * KIB
        truth.backup(repository, [rng.randbytes(MIB)])
        truth.verify(repository)


def test_what_is_forgotten_can_be_brought_back_until_it_is_collected(
    world: World, rng: random.Random
) -> None:
    truth, ids = history(world, rng, 3)
    with world.open() as repository:
        kept = dict(truth.points)
        forget(repository, truth, ids[0], ids[1])
        truth.verify(repository)
        hidden = repository.hidden_points()
        assert {p.id.hex() for p in hidden} == set(ids[:2])
        repository.recall(hidden[:1])
        truth.points[hidden[0].id.hex()] = kept[hidden[0].id.hex()]
        truth.verify(repository)
    world.drop_index()
    with world.open() as repository:
        truth.verify(repository)
        assert [p.id for p in repository.hidden_points()] == [hidden[1].id]
        repository.collect()
        with pytest.raises(HoldfastError):
            repository.recall([hidden[1]])
        truth.verify(repository)


def test_what_was_said_last_stays_whoever_is_met_later(world: World, rng: random.Random) -> None:
    """Marks and manifests turn up late in what dead writers left behind."""
    truth, ids = history(world, rng, 3)
    with world.open() as repository:
        index = repository._index()
        row = next(row for row in index.points() if row.id.hex() == ids[0])
        forget(repository, truth, ids[0])
        index.commit(Batch(None, 1, changes=[PointChange(row.id, 1, hidden=False, pinned=True)]))
        index.commit(Batch(None, 1, point=row))
        (still,) = repository.hidden_points()
        assert (still.id, repository.pinned()) == (row.id, {row.id})
        index.commit(Batch(None, 1, changes=[PointChange(row.id, 2, pinned=False)]))
        index.commit(Batch(None, 1, changes=[PointChange(row.id, 1, pinned=True)]))
        assert not repository.pinned()
        assert repository.collect().points == 1
        index.commit(Batch(None, 1, point=row))
        assert not [one for one in index.points() if one.id == row.id], "a collected point is listed again"
        with pytest.raises(PointNotFound):
            index.commit(Batch(None, 1, changes=[PointChange(row.id, 3, hidden=False)]))
        truth.verify(repository)


def test_pins_outlive_the_index(world: World, rng: random.Random) -> None:
    _, ids = history(world, rng, 2)
    with world.open() as repository:
        repository.pin([repository.resolve(i) for i in ids])
        repository.unpin([repository.resolve(ids[0])])
    world.drop_index()
    with world.open() as repository:
        assert repository.pinned() == {point_id(ids[1])}


def test_bytes_that_removing_a_point_frees_are_what_a_collection_drops(
    world: World, rng: random.Random
) -> None:
    truth, ids = history(world, rng, 7)
    with world.open() as repository:
        together = repository.freed_bytes([repository.resolve(i) for i in ids[1:4]])
        alone = repository.exclusive_bytes(repository.points())
        assert sum(alone[point_id(i)] for i in ids[1:4]) <= together
        forget(repository, truth, *ids[1:4])
        assert repository.collect(CollectOptions(dry_run=True)).dropped_bytes == together
        assert repository.collect().dropped_bytes == together
        for i in list(truth.points):
            expected = repository.exclusive_bytes([repository.resolve(i)])[point_id(i)]
            forget(repository, truth, i)
            assert repository.collect().dropped_bytes == expected


def test_what_a_running_backup_builds_upon_stays(world: World, rng: random.Random) -> None:
    """It begins, its parent is forgotten and collected around it, and it ends."""
    truth = Truth()
    disk = bytearray(rng.randbytes(4 * MIB))
    with world.open() as repository:
        first = truth.backup(repository, [bytes(disk)])
        other = truth.backup(repository, [bytes(disk[: 2 * MIB])], name="db1")
    disk[MIB : MIB + 100 * KIB] = rng.randbytes(100 * KIB)
    backup = SteppedBackup(world, "web1", bytes(disk))
    backup.step(2)
    assert first.point is not None
    assert other.point is not None
    with world.open() as repository:
        forget(repository, truth, first.point.hex(), other.point.hex())
        report = repository.collect()
        assert report.points == 1, "the parent is held"
    backup.step(1)
    truth.points[backup.finish()] = {"disk0.raw": bytes(disk)}
    with world.open() as repository:
        truth.verify(repository)
        assert repository.collect().points == 1
        truth.verify(repository)
        assert live_bytes(repository) == reachable_bytes(repository)


def test_what_an_interrupted_backup_has_stored_stays(
    world: World, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.repo.session._BATCH_BYTES", 300_000)
    disk = rng.randbytes(6 * MIB)
    backup = SteppedBackup(world, "web1", disk)
    backup.step(3)
    backup.kill()
    truth = Truth()
    with world.open() as repository:
        before = live_bytes(repository)
        repository.collect()
        assert live_bytes(repository) >= before - 1.1 * MIB, "more than a segment that was not complete"
        summary = truth.backup(repository, [disk])
        assert summary.chunks_reused > 10
        truth.verify(repository)


def test_a_restore_holds_what_it_reads(world: World, rng: random.Random) -> None:
    truth, ids = history(world, rng, 3)
    with world.open() as repository, world.open() as other:
        point = repository.resolve(ids[0])
        expected = truth.points[ids[0]]
        with repository.holding("restore", [point]):
            forget(other, truth, ids[0])
            assert other.collect().points == 0
            with repository.open_disk(point, "disk0.raw") as disk:
                assert disk.read() == expected["disk0.raw"]
        assert other.collect().points == 1
        truth.verify(other)


def test_a_damaged_node_ends_it_before_anything_is_dropped(world: World, rng: random.Random) -> None:
    truth, ids = history(world, rng, 3)
    with world.open() as repository:
        index = repository._index()
        point = repository.resolve(ids[2])
        (root,) = [c.root for _, c in contents_of(point.manifest)]
        forget(repository, truth, ids[0])
        world.remove_records(repository, {RecordId(root)})
        before = {i for i, _ in index.scan(None, 10**6)}
        with pytest.raises(DamagedPoint):
            repository.collect()
        assert before <= {i for i, _ in index.scan(None, 10**6)}


def test_two_do_not_collect_at_once(world: World, rng: random.Random) -> None:
    history(world, rng, 1)
    with world.open() as one, world.open() as other, one._place.collecting(), pytest.raises(RepositoryBusy):
        other.collect()


def test_it_stops_when_the_time_is_over_and_goes_on_next_time(world: World, rng: random.Random) -> None:
    truth, ids = history(world, rng)
    with world.open() as repository:
        forget(repository, truth, *ids[:3])
        report = repository.collect(CollectOptions(max_seconds=0.0))
        assert not report.complete
        truth.verify(repository)
        assert repository.collect().complete
        assert live_bytes(repository) == reachable_bytes(repository)
        truth.verify(repository)


@pytest.mark.parametrize("below", [0.0, 0.5, 1.0])
def test_dead_space_is_given_back_by_holes_or_by_compaction(
    tmp_path: Path, rng: random.Random, below: float
) -> None:
    """Every second chunk of some packs dies."""
    world = FolderWorld(tmp_path / "repo", SMALL)
    truth = Truth()
    a, b = rng.randbytes(6 * MIB), rng.randbytes(6 * MIB)
    mixed = b"".join((a if n // 3 % 2 else b)[n * 64 * KIB : (n + 1) * 64 * KIB] for n in range(96))
    with world.open() as repository:
        first = truth.backup(repository, [a, b])
        truth.backup(repository, [mixed], name="db1")
        assert first.point is not None
        forget(repository, truth, first.point.hex())
        before = sum(world.store.allocated_bytes(i) for i in world.store.ids())
        report = repository.collect(CollectOptions(compact_below=below))
        after = sum(world.store.allocated_bytes(i) for i in world.store.ids())
        if below:
            assert report.packs_compacted > 0
        else:
            assert report.packs_holed > 0
            assert report.packs_compacted == 0
        assert before - after > 5 * MIB
        truth.verify(repository)
        truth.backup(repository, [a], name="again")
        truth.verify(repository)
        if not below:
            holed = next(row for row in repository._index().packs() if row.state is PackState.HOLED)
            (_, place), *_ = [p for p in repository._index().scan(None, 10**6) if p[1].pack == holed.number]
            with open(world.store.path(holed.id), "r+b") as file:
                file.seek(place.offset + 100)
                file.write(b"\xff" * 50)
            report = repository.check(read_data=True)
            packs = [finding for finding in report.findings if finding.kind == "pack"]
            assert len(packs) == 1, "holes are no damage"
            return
    world.drop_index()
    with world.open() as repository:
        truth.verify(repository)
        again = truth.backup(repository, [b], name="again")
        assert again.bytes_new > 2 * MIB, "what was given back was taken for present"
        truth.verify(repository)


FAULTS = [CrashAt(When.BEFORE), CrashAt(When.AMID), CrashAt(When.AFTER), disk_full(), disk_error()]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_whatever_interrupts_it_nothing_is_lost(tmp_path: Path, rng: random.Random, fault: int) -> None:
    """At every write, sync, transaction, punch and unlink; with and without the loss of what was not synced."""
    start = MemoryWorld(tmp_path / "repo", SMALL)
    truth, ids = history(start, rng, 4)
    a = rng.randbytes(3 * MIB)
    with start.open() as repository:
        mixed = b"".join(a[n * 64 * KIB : (n + 1) * 64 * KIB] for n in range(48) if n % 4)
        doomed = truth.backup(repository, [a], name="mixed")
        truth.backup(repository, [mixed], name="db2")
        assert doomed.point is not None
        forget(repository, truth, *ids[:2], doomed.point.hex())
    points = 0
    for number in itertools.count(1):
        world = start.copy()
        faults = Faults(lambda n, _name, number=number: FAULTS[fault] if n == number else None)
        repository = world.open(faults)
        try:
            repository.collect(CollectOptions(compact_below=0.9 if number % 2 else 0.0))
        except (Crash, HoldfastError):
            pass
        faults.plan = lambda _n, _name: None
        if faults.fired == 0:
            repository.close()
            break
        points += 1
        if isinstance(FAULTS[fault], CrashAt):
            world.kill(repository, faults)
            if number % 3 == 0:
                world.lose_power(rng)
        else:
            repository.close()
        if number % 4 == 3:
            world.drop_index()
        print(f"operation {number}: {faults.log[-1]}")
        with world.open() as after:
            truth.verify(after)
            after.collect()
            assert live_bytes(after) == reachable_bytes(after), f"fault at operation {number}"
            truth.verify(after)
    assert points > 10


def test_it_works_on_a_full_disk(tmp_path: Path, rng: random.Random) -> None:
    """Nothing can be appended or created any more; only what shrinks is allowed."""
    world = MemoryWorld(tmp_path / "repo", SMALL)
    truth, ids = history(world, rng)
    with world.open() as repository:
        forget(repository, truth, *ids[:4])
    full = Faults(lambda _n, name: disk_full() if name in ("append", "create") else None)
    before = sum(world.store.allocated_bytes(i) for i in world.store.ids())
    repository = world.open(full)
    report = repository.collect()
    repository.close()
    assert report.notes
    assert report.freed_bytes > 300 * KIB
    assert sum(world.store.allocated_bytes(i) for i in world.store.ids()) < before
    with world.open() as after:
        truth.verify(after)
    world.drop_index()
    with world.open() as after:
        truth.verify(after)


def test_beside_writers_and_forgetters_nothing_is_ever_lost(tmp_path: Path, rng: random.Random) -> None:
    world = FolderWorld(tmp_path / "repo", SMALL)
    truths = [Truth() for _ in range(2)]
    seeds = [rng.randrange(2**32) for _ in range(2)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def write(number: int) -> None:
        own = random.Random(seeds[number])
        truth, disk = truths[number], bytearray(own.randbytes(2 * MIB))
        try:
            with world.open() as repository:
                for _ in range(12):
                    at = own.randrange(0, len(disk) - 64 * KIB)
                    disk[at : at + 64 * KIB] = own.randbytes(64 * KIB)
                    truth.backup(repository, [bytes(disk)], name=f"vm{number}")
                    if len(truth.points) > 3:
                        forget(repository, truth, own.choice(sorted(truth.points)[:-1]))
        except BaseException as error:
            failures.append(error)

    def collect() -> None:
        try:
            with world.open() as repository:
                while not stop.is_set():
                    repository.collect(CollectOptions(compact_below=0.8))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    collector = threading.Thread(target=collect)
    for thread in [*threads, collector]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    collector.join()
    assert not failures, failures
    whole = Truth()
    whole.points = truths[0].points | truths[1].points
    with world.open() as repository:
        whole.verify(repository)
        repository.collect()
        assert live_bytes(repository) == reachable_bytes(repository)
        whole.verify(repository)


def test_encrypted_repositories_are_collected_as_well(tmp_path: Path, rng: random.Random) -> None:
    from dataclasses import replace

    options = replace(SMALL, cipher="aes256-gcm")
    world = FolderWorld(tmp_path / "repo", options, password="secret")
    truth = Truth()
    with world.open(password="secret") as repository:
        first = truth.backup(repository, [rng.randbytes(3 * MIB)])
        truth.backup(repository, [rng.randbytes(MIB)])
        assert first.point is not None
        forget(repository, truth, first.point.hex())
        assert repository.collect().dropped_bytes > 2 * MIB
        truth.verify(repository)
    world.drop_index()
    with world.open(password="secret") as repository:
        truth.verify(repository)
        assert machine_of([b"x"]) is not None
        assert os.path.isdir(repository.path)
        assert_clean(repository.check(read_data=True))
