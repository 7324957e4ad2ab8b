"""Restore points as a process that stays sees them: they come and go, are held, share a cache, and count as verified."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig.disks import KIB, MIB, UNIT, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, quiet

from holdfast.errors import DamagedData, PointNotFound
from holdfast.ids import PointId, RecordId
from holdfast.repo import live as live_module
from holdfast.repo.format.record import Kind
from holdfast.repo.format.rows import VerifiedBy
from holdfast.repo.holds import Holds
from holdfast.repo.live import LivePoints
from holdfast.repo.readcache import ReadCache, SegmentMap
from holdfast.repo.reader import DiskReader
from holdfast.repo.repository import Repository

UNITS = [*range(1, 40), *[0] * 20, 3, 4, *range(40, 60)]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(live_module, "_LOOK_S", 0)  # each look is a look
    world = FolderWorld(tmp_path / "repo", SMALL)
    with world.open() as repository:
        repository.backup(machine_of([content(UNITS)], name="web1"), ONE_WORKER)
        repository.backup(machine_of([content([*UNITS[:30], 500, *UNITS[31:]])], name="web1"), ONE_WORKER)
    return tmp_path / "repo"


@contextmanager
def opened(
    path: Path, vm: str | None = None, cache_bytes: int = 4 * MIB
) -> Iterator[tuple[Repository, LivePoints]]:
    with Repository.open(str(path), notify=quiet) as repository:
        live = repository.live("mount", cache_bytes, vm)
        try:
            yield repository, live
        finally:
            live.close()


class TestPoints:
    def test_they_come_and_go(self, path: Path) -> None:
        with opened(path) as (repository, live):
            before = live.points()
            assert [p.id for p in before] == [p.id for p in repository.points()]
            assert live.points() is before
            repository.backup(machine_of([content([7, 8])], name="other"), ONE_WORKER)
            assert [p.manifest.vm_name for p in live.points()] == ["web1", "web1", "other"]
            repository.forget([before[0]])
            assert before[0] not in live.points()
            repository.recall([before[0]])
            assert before[0] in live.points()

    def test_of_one_vm_only(self, path: Path) -> None:
        with opened(path, "web1") as (repository, live):
            repository.backup(machine_of([content([7, 8])], name="other"), ONE_WORKER)
            assert {p.manifest.vm_name for p in live.points()} == {"web1"}
            repository.forget(live.points())
            assert live.points() == ()
        with Repository.open(str(path), notify=quiet) as repository, pytest.raises(PointNotFound):
            repository.live("mount", MIB, "nobody")


class TestReading:
    def test_the_bytes_are_right_and_the_cache_stays_within_its_limit(
        self, path: Path, rng: random.Random
    ) -> None:
        limit = 5 * (UNIT + 300)
        with opened(path, cache_bytes=limit) as (_, live):
            disks = [live.open(point.manifest.disks[0].tree) for point in live.points()]
            truths = [content(UNITS), content([*UNITS[:30], 500, *UNITS[31:]])]
            for _ in range(300):
                which = rng.randrange(2)
                offset, length = rng.randrange(len(truths[which])), rng.randrange(1, 300 * KIB)
                assert disks[which].pread(offset, length) == truths[which][offset : offset + length]
                assert live._cache.chunks_bytes <= limit

    def test_many_threads_read_each_chunk_once(self, path: Path) -> None:
        truth = content(UNITS)
        with opened(path) as (_, live):
            loads: list[int] = []
            each = live._records.each

            def counted(ids, kind):
                loads.extend([1] * len(ids) if kind is Kind.CHUNK else [])
                return each(ids, kind)

            live._records.each = counted  # type: ignore[method-assign]
            disk = live.open(live.points()[0].manifest.disks[0].tree)
            wrong: list[int] = []
            start = threading.Barrier(6)

            def work() -> None:
                start.wait()
                step = 100 * KIB
                wrong.extend(
                    at for at in range(0, len(truth), step) if disk.pread(at, step) != truth[at : at + step]
                )

            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
            assert len(loads) == len({u for u in UNITS if u})

    def test_fetching_ahead_leaves_errors_to_the_reader(self, path: Path) -> None:
        with opened(path) as (repository, live):
            point = live.points()[0]
            disk = live.open(point.manifest.disks[0].tree)
            gone = next(chunk for _, _, chunk in disk.parts(10 * UNIT, 11 * UNIT) if chunk is not None)
            place = repository._index().lookup([gone])[0]
            assert place is not None
            repository._index().drop({RecordId(gone): (place.pack, place.offset)})
            disk.fetch(0, 20 * UNIT)
            with pytest.raises(DamagedData):
                disk.pread(10 * UNIT + 5, 10)
            truth = content(UNITS)
            assert disk.pread(0, 10 * UNIT) == truth[: 10 * UNIT]
            assert disk.pread(11 * UNIT, 10 * UNIT) == truth[11 * UNIT : 21 * UNIT]

    def test_how_much_is_no_hole(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with opened(path) as (_, live):
            tree = live.points()[0].manifest.disks[0].tree
            assert live.allocated_bytes(tree) == sum(1 for u in UNITS if u) * UNIT
            assert live.allocated_bytes(tree) == sum(1 for u in UNITS if u) * UNIT
        monkeypatch.setattr(live_module, "_EXACT_LEAVES", 1)
        with opened(path) as (_, live):
            taken = {at // (MIB // UNIT) for at, u in enumerate(UNITS) if u}
            last = len(UNITS) * UNIT % MIB or MIB
            assert live.allocated_bytes(tree) == (len(taken) - 1) * MIB + last

    def test_a_map_that_is_used_for_another_length_is_damage(self, path: Path) -> None:
        with opened(path) as (_, live):
            tree = live.points()[0].manifest.disks[0].tree
            _, leaf = next(live._trees.data_leaves(tree))
            assert live._cache.leaf(leaf, MIB).data_bytes == MIB
            with pytest.raises(DamagedData):
                live._cache.leaf(leaf, 2 * MIB)

    def test_a_reader_of_its_own_is_as_before(self, path: Path) -> None:
        with opened(path) as (_, live):
            tree = live.points()[0].manifest.disks[0].tree
            with DiskReader(live._records, live._trees, tree) as disk:
                assert disk.read() == content(UNITS)


class TestHolds:
    def sessions(self, repository: Repository) -> list[tuple[PointId, ...]]:
        return [row.holds for row in repository._index().sessions() if row.kind == "mount"]

    def test_a_held_point_survives_forget_and_gc(self, path: Path) -> None:
        with opened(path) as (repository, live):
            point = live.points()[-1]
            live.hold(point)
            live.hold(point)
            assert self.sessions(repository) == [(point.id,)]
            repository.forget([point])
            repository.collect()
            disk = live.open(point.manifest.disks[0].tree)
            assert disk.pread(0, 1 << 30) == content([*UNITS[:30], 500, *UNITS[31:]])
            with pytest.raises(DamagedData):  # the model: without a hold it is gone
                live.release(point)
                live.release(point)
                live.close()
                repository.collect()
                ReadCache(live._records, live._trees, MIB).chunks([(disk_chunk(disk, 30), UNIT)])

    def test_they_are_let_go_of_a_moment_after_their_last_user(self, path: Path) -> None:
        now = [0.0]
        with Repository.open(str(path), notify=quiet) as repository:
            point = repository.points()[0]
            holds = Holds(
                repository._index(), "mount", lambda: 1_800_000_000, lambda: now[0], quiet, protect=True
            )
            holds.take(point.id)
            holds.release(point.id)
            holds.tend(heartbeat=True)
            assert self.sessions(repository) == [(point.id,)]
            now[0] = 4
            holds.take(point.id)
            now[0] = 100
            holds.tend(heartbeat=True)
            assert self.sessions(repository) == [(point.id,)]
            holds.release(point.id)
            now[0] = 106
            holds.tend(heartbeat=False)
            assert self.sessions(repository) == []

    def test_what_is_forgotten_can_not_be_held(self, path: Path) -> None:
        with opened(path) as (repository, live):
            point = live.points()[0]
            repository.forget([point])
            with pytest.raises(PointNotFound):
                live.hold(point)
            assert self.sessions(repository) == []

    def test_closing_ends_all(self, path: Path) -> None:
        with opened(path) as (repository, live):
            for point in live.points():
                live.hold(point)
            live.start()
            assert len(self.sessions(repository)) == 2
            live.close()
            assert self.sessions(repository) == []


def disk_chunk(disk: DiskReader, number: int):
    return next(chunk for _, _, chunk in disk.parts(number * UNIT, (number + 1) * UNIT))


def test_what_was_read_counts_as_verified(path: Path) -> None:
    with opened(path) as (repository, live):
        assert not any(row.verified for row in repository._index().packs())
        for point in live.points():
            live.hold(point)
            live.open(point.manifest.disks[0].tree).pread(0, 1 << 30)
            live.release(point)
        live.close()
        rows = repository._index().packs()
        assert rows
        assert all(row.verified_by is VerifiedBy.READING for row in rows)


def test_a_map_finds_every_part() -> None:
    lengths = [4096, -8192, 100, -1, 5000]
    ids = [RecordId(bytes([n]) * 32) for n in range(3)]
    made = SegmentMap(lengths, ids)  # type: ignore[arg-type]
    everything = [
        (0, 4096, ids[0]),
        (4096, 8192, None),
        (12288, 100, ids[1]),
        (12388, 1, None),
        (12389, 5000, ids[2]),
    ]
    assert list(made.parts(0, 99999)) == everything
    for start in range(0, 17389, 37):
        for end in (start + 1, start + 200, start + 9000):
            assert list(made.parts(start, end)) == [
                p for p in everything if p[0] < end and p[0] + p[1] > start
            ]
    assert made.data_bytes == 4096 + 100 + 5000
