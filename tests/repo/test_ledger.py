"""The ledger of verification: what was read when and how, what comes next, and what a point may rely on."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rig.disks import MIB, UNIT, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, assert_clean, quiet, restored

from holdfast.errors import DamagedData
from holdfast.ids import PackId, RecordId
from holdfast.repo import repository as repository_module
from holdfast.repo.codec import Opener, Sealer
from holdfast.repo.format.record import Kind
from holdfast.repo.format.rows import PackRow, PackState, VerifiedBy
from holdfast.repo.index import Batch, NewRecord, PackProgress
from holdfast.repo.ledger import Budget, Reading, ReadTally
from holdfast.repo.records import RecordReader
from holdfast.repo.repository import Repository

UNITS = [*range(1, 80), 0, 0, 3, 4, *range(80, 100)]


class Clock:
    """A clock that moves when it is told to, or by a step each time it is read."""

    def __init__(self, now: float = 1_800_000_000, step: float = 0.0) -> None:
        self.now = now
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the repository."""
    made = Clock()
    monkeypatch.setattr(repository_module._time, "time", made)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "repo"
    world = FolderWorld(path, SMALL)
    with world.open() as repository:
        repository.backup(machine_of([content(UNITS)], name="web1"), ONE_WORKER)
        repository.backup(machine_of([content([*UNITS[:50], 500, *UNITS[51:]])], name="web1"), ONE_WORKER)
    return path


@pytest.fixture
def path(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "repo")
    return tmp_path / "repo"


def open_at(path: Path) -> Repository:
    return Repository.open(str(path), notify=quiet)


def pack_path(path: Path, pack_id: PackId) -> Path:
    return path / "packs" / pack_id.hex()[:2] / f"{pack_id.hex()}.pack"


class TestReading:
    def rows(self, *verified: int, size: int = 100) -> list[PackRow]:
        return [
            PackRow(number, PackId(bytes([number] * 16)), PackState.SEALED, size, 1, 0, 36, 0, 1, when)
            for number, when in enumerate(verified, start=1)
        ]

    def test_never_verified_first_then_the_oldest_then_by_number(self) -> None:
        reading = Reading(self.rows(50, 0, 20, 50, 0), Budget(), 100)
        assert [row.number for row in reading.due] == [2, 5, 3, 1, 4]

    def test_only_what_is_old_enough(self) -> None:
        reading = Reading(self.rows(50, 0, 70, 71), Budget(older_than_s=30), 100)
        assert [row.number for row in reading.due] == [2, 1, 3]

    @pytest.mark.parametrize(("limit", "taken"), [(1, 1), (100, 1), (199, 1), (200, 2), (999, 5)])
    def test_bytes(self, limit: int, taken: int) -> None:
        reading = Reading(self.rows(*[0] * 5), Budget(max_bytes=limit), 100)
        assert sum(reading.take(row) for row in reading.due) == taken
        assert len(reading.left) == 5 - taken
        assert reading.ended_by == ("bytes" if taken < 5 else "")
        assert reading.taken_bytes == 100 * taken

    def test_time(self) -> None:
        clock = Clock(0, step=1)
        reading = Reading(self.rows(*[0] * 5), Budget(max_seconds=2.5), 100, clock)
        assert [reading.take(row) for row in reading.due] == [True, True, False, False, False]
        assert reading.ended_by == "time"


class TestTally:
    def row(self, live: int) -> PackRow:
        return PackRow(1, PackId(bytes(16)), PackState.SEALED, 10_000, 1, 0, live, 0, 1, 0)

    def test_ranges_are_counted_once_in_any_order(self, rng: random.Random) -> None:
        for _ in range(200):
            borders = [64, *sorted(rng.sample(range(65, 5000), 30))]
            records = [(a, b - a) for a, b in itertools.pairwise(borders)]
            dead = set(rng.sample(range(30), rng.choice([0, 0, 3, 10])))
            live = [record for number, record in enumerate(records) if number not in dead]
            tally = ReadTally([self.row(sum(size for _, size in live))])
            calls = [sorted(rng.sample(live, rng.randrange(1, 6))) for _ in range(5)] + [[r] for r in live]
            rng.shuffle(calls)
            noted: list[int] = []

            class Index:
                def update_pack(self, number: int, update: object) -> None:
                    noted.append(number)  # noqa: B023

            tally.settle(Index(), 5)  # type: ignore[arg-type]
            assert not noted
            for call in calls[:-1]:
                tally.read(1, call)
            rest = {r for call in calls[:-1] for r in call}
            tally.settle(Index(), 5)  # type: ignore[arg-type]
            assert bool(noted) == (rest >= set(live))
            tally.read(1, calls[-1])
            tally.settle(Index(), 5)  # type: ignore[arg-type]
            assert noted


class TestCheck:
    def test_what_was_read_is_remembered_with_its_kind(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            assert all(row.verified == 0 for row in repository._index().packs())
            assert repository.statistics().oldest_verification == 0
            assert repository.statistics().verified_bytes == 0
            assert_clean(repository.check())
            assert all(row.verified == 0 for row in repository._index().packs()), "nothing was read"
            report = repository.check(read_data=True)
            rows = repository._index().packs()
            assert {(row.verified, row.verified_by) for row in rows} == {(int(clock.now), VerifiedBy.CHECK)}
            assert report.reading is not None
            assert report.reading.left_packs == 0
            assert report.reading.verified_bytes == report.reading.total_bytes
            figures = repository.statistics()
            assert figures.oldest_verification == figures.oldest_unverified == int(clock.now)
            assert figures.verified_bytes == figures.packs_bytes

    def test_budgets_get_through_everything_and_begin_anew(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            packs = len(repository._index().packs())
            assert packs > 5
            seen: list[int] = []
            for day in range(1, 2 * packs):
                clock.now += 86400
                report = repository.check(
                    read_data=True, budget=Budget(max_bytes=2 * MIB + 200_000), workers=1
                )
                assert_clean(report)
                assert report.reading is not None
                read = [row for row in repository._index().packs() if row.verified == int(clock.now)]
                assert 1 <= len(read) <= 2
                assert report.reading.packs == len(read)
                seen += [row.number for row in read]
                if day == 1:
                    assert report.reading.ended_by == "bytes"
                    assert report.reading.left_packs == packs - len(read)
            assert seen[:packs] == sorted(seen[:packs]), "in the order of the packs"
            assert set(seen[:packs]) == set(range(1, packs + 1)), "all of them before one comes again"

    def test_time_is_up(self, path: Path) -> None:
        with open_at(path) as repository:
            report = repository.check(read_data=True, budget=Budget(max_seconds=0))
            assert_clean(report)
            assert report.reading is not None
            assert (report.reading.packs, report.reading.ended_by) == (0, "time")
            assert any("1 of 2 restore points were not looked at" in note for note in report.notes)

    def test_a_pack_in_which_damage_is_found_counts_as_never_verified(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            repository.check(read_data=True)
            row = repository._index().packs()[2]
        with pack_path(path, row.id).open("r+b") as file:
            file.seek(5000)
            file.write(b"damage")
        with open_at(path) as repository:
            clock.now += 100
            assert not repository.check(read_data=True).clean
            assert [r.number for r in repository._index().packs() if not r.verified] == [row.number]
            assert repository.statistics().oldest_verification == 0
            assert repository.statistics().oldest_unverified == row.created

    def test_a_pack_that_grows_counts_as_never_verified(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            repository.check(read_data=True)
            repository.backup(machine_of([content([1, 2, 3000])], name="db1"), ONE_WORKER)
            assert repository.statistics().oldest_verification == 0
            unverified = [row for row in repository._index().packs() if not row.verified]
            assert unverified
            report = repository.check(read_data=True, budget=Budget(older_than_s=3600))
            assert report.reading is not None
            assert report.reading.packs == len(unverified), "only that is read again"

    def test_without_the_key(self, tmp_path: Path, clock: Clock) -> None:
        options = replace(SMALL, cipher="chacha20-poly1305")
        world = FolderWorld(tmp_path / "secret", options, "pw")
        with world.open(password="pw") as repository:
            repository.backup(machine_of([content([1, 2, 3])]), ONE_WORKER)
        with world.open() as repository:
            assert_clean(repository.check(read_data=True))
            assert [row.verified_by for row in repository._index().packs()] == [VerifiedBy.HASHES]

    def test_holes_of_a_collected_pack_are_no_damage(self, path: Path, clock: Clock) -> None:
        """What garbage collection gives back reads as zeros; a damaged live record beside it is still found."""
        with open_at(path) as repository:
            index = repository._index()
            row = next(row for row in index.packs() if row.state is PackState.SEALED)
            places = [
                (i, p) for i, p in index.scan(None, 10_000) if p.pack == row.number and p.kind == Kind.CHUNK
            ]
            places.sort(key=lambda found: found[1].offset)
            (dead_id, dead), (_, live) = places[3], places[5]
            index.drop({dead_id: (dead.pack, dead.offset)})
            table_at = max(p.offset + 72 + p.stored_bytes for _, p in places)
            with pack_path(path, row.id).open("r+b") as file:
                for start, end in [
                    (dead.offset, dead.offset + 72 + dead.stored_bytes),
                    (table_at, row.committed_bytes),
                ]:
                    os.pwrite(file.fileno(), bytes(end - start), start)
            index.update_pack(row.number, lambda now: replace(now, state=PackState.HOLED))
            report = repository.check(read_data=True)
            assert not report.findings
            assert next(r for r in index.packs() if r.number == row.number).verified == int(clock.now)
            with pack_path(path, row.id).open("r+b") as file:
                os.pwrite(file.fileno(), b"damage", live.offset + 100)
            report = repository.check(read_data=True)
            assert any(row.id.hex() in finding.message for finding in report.findings)


class TestRestore:
    def test_a_restore_verifies_what_it_reads(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            first, second = repository.points()
            restored(repository, first)
            rows = repository._index().packs()
            whole = [row for row in rows if row.verified]
            assert len(whole) >= len(rows) - 2, "all packs that only this point uses"
            assert {(row.verified, row.verified_by) for row in whole} == {
                (int(clock.now), VerifiedBy.READING)
            }
            clock.now += 50
            restored(repository, second)
            assert sum(row.verified == int(clock.now) for row in repository._index().packs()) < len(rows)

    def test_a_partial_restore_vouches_for_nothing_that_it_did_not_read(self, tmp_path: Path) -> None:
        world = FolderWorld(tmp_path / "repo", SMALL)
        with world.open() as repository:
            disks = [content([*range(1, 4)]), content([*range(10, 14)])]
            repository.backup(machine_of(disks), ONE_WORKER)
            point = repository.points()[0]
            from rig.disks import MemorySink

            tree = point.manifest.disks[0].tree
            repository.restore(point, [(tree, MemorySink(tree.size_bytes))])
            assert [row.verified for row in repository._index().packs()] == [0]
            restored(repository, point)
            assert all(row.verified for row in repository._index().packs())

    def test_damage_vouches_for_nothing(self, path: Path) -> None:
        with open_at(path) as repository:
            row = repository._index().packs()[0]
            with pack_path(path, row.id).open("r+b") as file:
                os.pwrite(file.fileno(), b"damage", 5000)
            with pytest.raises(DamagedData):
                restored(repository, repository.points()[0])
            assert all(row.verified == 0 for row in repository._index().packs())


class TestOfPoints:
    def test_the_oldest_pack_counts(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            points = repository.points()
            assert repository.verified_at(points) == {point.id: 0 for point in points}
            index = repository._index()
            for number, row in enumerate(index.packs()):
                index.set_verified(row.number, 1000 + number)
            expected = {}
            records, trees = repository._reading()
            del records
            for point in points:
                ids = [RecordId(point.id)]
                for disk in point.manifest.disks:
                    ids.append(disk.tree.root)
                    for segment, leaf in trees.data_leaves(disk.tree):
                        length = min(MIB, disk.tree.size_bytes - segment * MIB)
                        ids += [leaf, *trees.leaf(leaf, length).ids]
                expected[point.id] = min(999 + place.pack for place in index.lookup(ids) if place is not None)
            assert repository.verified_at(points) == expected
            assert len(set(expected.values())) <= 2

    def test_a_point_of_holes_depends_on_its_manifest_alone(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            made = repository.backup(machine_of([bytes(50 * UNIT)], name="empty"), ONE_WORKER)
            index = repository._index()
            point = repository.resolve("empty@latest")
            assert made.point == point.id
            place = index.lookup([RecordId(point.id)])[0]
            assert place is not None
            assert repository.verified_at([point]) == {point.id: 0}
            index.set_verified(place.pack, 77)
            assert repository.verified_at([point]) == {point.id: 77}

    def test_what_is_damaged_was_never_verified(self, path: Path, clock: Clock) -> None:
        with open_at(path) as repository:
            repository.check(read_data=True)
            points = repository.points()
            assert set(repository.verified_at(points).values()) == {int(clock.now)}
            index = repository._index()
            leaf = points[0].manifest.disks[0].tree.root
            place = index.lookup([leaf])[0]
            assert place is not None
            index.drop({RecordId(leaf): (place.pack, place.offset)})
            assert repository.verified_at(points)[points[0].id] == 0


class TestMovedRecords:
    """Garbage collection and repair move records; a reader that has looked a place up before must not fail."""

    def moved(self, repository: Repository, ids: list[RecordId]) -> None:
        """Puts records into a new pack, spoils their old places, and points the index to the new ones."""
        index, store, keys = repository._index(), repository._store, repository.unlock()
        from holdfast.repo.format.record import PackHeader, encode_pack_header

        opener, sealer = Opener(keys), Sealer(keys, 1)
        reader = RecordReader(store, index, opener)
        pack_id = PackId(os.urandom(16))
        writer = store.create(pack_id)
        writer.append([encode_pack_header(PackHeader(pack_id, repository.config.id, 5000))])
        batch = Batch(None, 7)
        replacing = {}
        numbers = {row.number: row.id for row in index.packs()}
        for record_id, place in zip(ids, index.lookup(ids), strict=True):
            assert place is not None
            sealed = sealer.seal(Kind.CHUNK, record_id, reader.load_one(record_id, Kind.CHUNK))
            at = writer.append([sealed.to_bytes(pack_id)])
            batch.records.append(
                NewRecord(record_id, pack_id, at, sealed.header.stored_bytes, sealed.header.plain_bytes, 1)
            )
            replacing[record_id] = (place.pack, place.offset)
            with pack_path(Path(repository.path), numbers[place.pack]).open("r+b") as file:
                os.pwrite(file.fileno(), bytes(72 + place.stored_bytes), place.offset)
        writer.sync()
        batch.packs.append(PackProgress(pack_id, writer.length, PackState.OPEN, 5))
        batch.replacing = replacing
        writer.close()
        index.commit(batch)

    @pytest.mark.parametrize("gone", [False, True], ids=["spoilt", "unlinked"])
    @pytest.mark.parametrize("how", ["each", "load_into"])
    def test_are_found_in_their_new_places(self, path: Path, how: str, gone: bool) -> None:
        with open_at(path) as repository:
            index = repository._index()
            first = [(i, p) for i, p in index.scan(None, 10_000) if p.pack == 1 and p.kind == Kind.CHUNK]
            ids = [record_id for record_id, _ in first]
            expected = RecordReader(repository._store, index, Opener(repository.unlock())).load(
                ids, Kind.CHUNK
            )
            moving = ids if gone else ids[::3]

            class LateIndex:
                """Tells old places once, and then moves what is there."""

                def __init__(self) -> None:
                    self.done = False

                def lookup(self, asked: list[RecordId]) -> list:
                    found = index.lookup(asked)
                    if not self.done:
                        self.done = True
                        test.moved(repository, moving)
                        if gone:
                            repository._store.close()
                            pack_path(path, pack).unlink()
                    return found

                def packs(self) -> list[PackRow]:
                    return index.packs()

            test = self
            pack = index.packs()[0].id
            reader = RecordReader(repository._store, LateIndex(), Opener(repository.unlock()))  # type: ignore[arg-type]
            if how == "each":
                assert dict(reader.each(ids, Kind.CHUNK)) == expected
            else:
                buffers = {i: bytearray(len(data)) for i, data in expected.items()}
                reader.load_into({i: memoryview(buffer) for i, buffer in buffers.items()}, Kind.CHUNK)
                assert {i: bytes(buffer) for i, buffer in buffers.items()} == expected

    def test_what_is_damaged_where_it_is_stays_damaged(self, path: Path) -> None:
        with open_at(path) as repository:
            index = repository._index()
            record_id, place = next((i, p) for i, p in index.scan(None, 100) if p.kind == Kind.CHUNK)
            row = next(row for row in index.packs() if row.number == place.pack)
            with pack_path(path, row.id).open("r+b") as file:
                os.pwrite(file.fileno(), b"damage", place.offset + 90)
            reader, _ = repository._reading()
            with pytest.raises(DamagedData):
                reader.load_one(record_id, Kind.CHUNK)
            index.drop({record_id: (place.pack, place.offset)})
            with pytest.raises(DamagedData, match="in no pack"):
                reader.load_one(record_id, Kind.CHUNK)
