"""Repair: what is damaged comes back from wherever there is a copy; what comes from nowhere is named exactly.

Random damage in a real repository, with and without a second one that is whole, encrypted and not, cut alike
and otherwise; then the same with a process that is killed in the middle of it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rig.anatomy import Found, chunk_id, records_of, units_lost, units_reported
from rig.child import Child
from rig.disks import MIB, UNIT, MemorySink, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, assert_clean, quiet, restored

from holdfast.disk import ChangeMap
from holdfast.errors import DamagedData, IntegrityError, UsageError
from holdfast.ids import PackId, RecordId
from holdfast.repo.backup import BackupOptions
from holdfast.repo.check import contents_of
from holdfast.repo.format.record import Kind
from holdfast.repo.format.rows import PackState
from holdfast.repo.packs import LocalPackStore
from holdfast.repo.points import Point
from holdfast.repo.repository import InitOptions, Repository

PASSWORD, OTHER_PASSWORD = "correct horse", "battery staple"
HISTORY = {
    "web1": [
        [*range(1, 150), 0, 0, 5, 6, *range(150, 180)],
        [*range(1, 100), 700, 701, 0, *range(103, 150), 0, 0, 5, 6, *range(150, 180)],
    ],
    "db1": [[*range(400, 460), 1, 2, 3, 0, 0, 0, *range(5, 9)]],
}
"""VM -> its backups -> units."""


def back_up_all(path: Path, password: str | None) -> dict[str, list[int]]:
    """All of the history; returns the units of each point."""
    made: dict[str, list[int]] = {}
    when = 1_700_000_000
    with Repository.open(str(path), password=password, notify=quiet) as repository:
        for vm, backups in HISTORY.items():
            for units in backups:
                when += 86400
                machine = machine_of([content(units)], name=vm, files={"vm.vmx": f"{vm} {when}".encode()})
                summary = repository.backup(machine, replace(ONE_WORKER, time=when))
                assert summary.point is not None
                made[summary.point.hex()] = units
    return made


@dataclass
class Pair:
    """A repository to be damaged, what is known of it, and perhaps a second one that is whole."""

    path: Path
    units: dict[str, list[int]]
    records: list[Found]
    password: str | None = None
    other: Path | None = None
    other_password: str | None = None
    damaged: list[Found] = field(default_factory=list)

    def open(self) -> Repository:
        return Repository.open(str(self.path), password=self.password, notify=quiet)

    def open_other(self) -> Repository:
        return Repository.open(str(self.other), password=self.other_password, notify=quiet)

    def pack(self, pack_id: PackId) -> Path:
        return self.path / "packs" / pack_id.hex()[:2] / f"{pack_id.hex()}.pack"

    def damage(self, records: Iterable[Found], rng: random.Random) -> None:
        for record in records:
            with open(self.pack(record.pack), "r+b") as file:
                at = record.offset + rng.randrange(record.length)
                byte = os.pread(file.fileno(), 1, at)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)
            self.damaged.append(record)

    def of_kind(self, *kinds: Kind) -> list[Found]:
        return [record for record in self.records if record.kind in kinds]

    def verify(self) -> None:
        """All points restore exactly, and a check finds nothing, with the index and after it was rebuilt."""
        with self.open() as repository:
            assert_clean(repository.check(read_data=True))
            assert {p.id.hex() for p in repository.points()} >= self.units.keys()
            for point in repository.points():
                if point.id.hex() in self.units:
                    assert restored(repository, point)["disk0.raw"] == content(self.units[point.id.hex()])
            assert_accounts_balance(repository)


def assert_accounts_balance(repository: Repository) -> None:
    """What the rows of the packs count is what the index holds."""
    index = repository._index()
    places = [place for _, place in index.scan(None, 1 << 20)]
    for row in index.packs():
        live = [place for place in places if place.pack == row.number]
        assert row.records == len(live)
        assert row.live_bytes == sum(72 + place.stored_bytes for place in live)


def salvage(
    repository: Repository, point: Point
) -> tuple[dict[str, bytes], dict[str, list[tuple[int, int]]]]:
    """Contents and lost ranges of a point, through a restore that allows for damage."""
    entries = contents_of(point.manifest)
    sinks = [MemorySink(tree.size_bytes) for _, tree in entries]
    counters = repository.restore(
        point,
        [(tree, sink) for (_, tree), sink in zip(entries, sinks, strict=True)],
        workers=2,
        allow_damaged=True,
    )
    for sink in sinks:
        sink.finish()
    assert counters.bytes_done == counters.bytes_total
    lost: dict[str, list[tuple[int, int]]] = {name: [] for name, _ in entries}
    for part in counters.lost:
        assert part.reason
        lost[entries[part.content][0]].append((part.offset, part.length))
    return {name: bytes(sink.data) for (name, _), sink in zip(entries, sinks, strict=True)}, lost


@dataclass(frozen=True)
class Model:
    """Repositories that are made once and copied for each test."""

    path: Path
    units: dict[str, list[int]]
    records: list[Found]


def make(path: Path, options: InitOptions, password: str | None) -> Model:
    FolderWorld(path, options, password)
    units = back_up_all(path, password)
    return Model(path, units, records_of(LocalPackStore(str(path / "packs"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def clear(folder: Path) -> Model:
    return make(folder / "clear", SMALL, None)


@pytest.fixture(scope="module")
def secret(folder: Path) -> Model:
    return make(folder / "secret", replace(SMALL, cipher="aes256-gcm"), PASSWORD)


@pytest.fixture(scope="module")
def other_clear(folder: Path) -> Model:
    """Another repository of the same backups, with its own packs."""
    return make(folder / "other-clear", SMALL, None)


@pytest.fixture(scope="module")
def other_secret(folder: Path) -> Model:
    """The same with another key, cut otherwise."""
    options = replace(
        SMALL, cipher="chacha20-poly1305", chunker="aligned", segment_bytes=2 * MIB, compression_level=3
    )
    return make(folder / "other-secret", options, OTHER_PASSWORD)


@pytest.fixture
def pair(clear: Model, other_clear: Model, tmp_path: Path) -> Pair:
    shutil.copytree(clear.path, tmp_path / "repo")
    return Pair(tmp_path / "repo", clear.units, clear.records, None, other_clear.path)


@pytest.fixture(params=["clear", "secret from its copy", "secret from another key", "clear from secret"])
def any_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    def model(name: str) -> Model:
        found: Model = request.getfixturevalue(name)
        return found

    here = model("clear" if request.param.startswith("clear") else "secret")
    shutil.copytree(here.path, tmp_path / "repo")
    pair = Pair(tmp_path / "repo", here.units, here.records)
    pair.password = None if request.param.startswith("clear") else PASSWORD
    if request.param == "clear":
        pair.other = model("other_clear").path
    elif "copy" in request.param:
        shutil.copytree(here.path, tmp_path / "copy")
        pair.other, pair.other_password = tmp_path / "copy", PASSWORD
    else:
        pair.other, pair.other_password = model("other_secret").path, OTHER_PASSWORD
    return pair


class TestFromASecondRepository:
    def test_a_hundred_chunks(self, any_pair: Pair, rng: random.Random) -> None:
        pair = any_pair
        pair.damage(rng.sample(pair.of_kind(Kind.CHUNK), 100), rng)
        with pair.open() as repository, pair.open_other() as other:
            assert not repository.check(read_data=True).clean
            found, repaired = repository.repair(other)
            assert repaired.complete, repaired
            assert (repaired.damaged, repaired.healed_total) == (100, 100)
            assert repaired.healed == {str(pair.other): 100}
            assert not repaired.ranges
            assert found.findings, "what was found is told"
        pair.verify()
        with pair.open() as repository:
            _, again = repository.repair()
            assert (again.damaged, again.complete) == (0, True)

    def test_nodes_too(self, any_pair: Pair, rng: random.Random) -> None:
        """All of them: what lies below shows itself as the nodes come back."""
        pair = any_pair
        chunks = rng.sample(pair.of_kind(Kind.CHUNK), 20)
        pair.damage(pair.of_kind(Kind.NODE) + chunks, rng)
        with pair.open() as repository, pair.open_other() as other:
            _, repaired = repository.repair(other)
            assert repaired.complete, repaired.error()
            assert repaired.damaged == repaired.healed_total == len(pair.damaged)
        pair.verify()

    def test_a_missing_pack_and_a_short_one(self, any_pair: Pair, rng: random.Random) -> None:
        pair = any_pair
        packs = sorted({record.pack for record in pair.records})
        gone, short = rng.sample(packs, 2)
        pair.pack(gone).unlink()
        os.truncate(pair.pack(short), rng.randrange(1, pair.pack(short).stat().st_size))
        with pair.open() as repository, pair.open_other() as other:
            _, repaired = repository.repair(other)
            assert repaired.complete, repaired.error()
            assert repaired.packs_forgotten == 1
        pair.verify()
        with pair.open() as repository:
            repository.rebuild_index()
        pair.verify()

    def test_what_is_damaged_there_as_well_stays_damaged(
        self, pair: Pair, rng: random.Random, tmp_path: Path
    ) -> None:
        shutil.copytree(pair.path, tmp_path / "copy")
        pair.other = tmp_path / "copy"
        here, both = rng.sample(pair.of_kind(Kind.CHUNK), 2)
        pair.damage([here, both], rng)
        twin = Pair(pair.other, pair.units, pair.records)
        twin.damage([both], rng)
        with pair.open() as repository, pair.open_other() as other:
            _, repaired = repository.repair(other)
        assert (repaired.damaged, repaired.healed_total, repaired.dropped) == (2, 1, 1)
        assert units_reported(repaired.ranges) == units_lost(pair.units, [both.id])

    def test_not_from_itself(self, pair: Pair) -> None:
        pair.other = pair.path
        with pair.open() as repository, pair.open_other() as other:
            with pytest.raises(UsageError):
                repository.repair(other)

    def test_nothing_is_dropped_if_the_disk_is_not_mounted(self, pair: Pair) -> None:
        (pair.path / "packs").rename(pair.path / "elsewhere")
        (pair.path / "packs").mkdir()
        with pair.open() as repository:
            with pytest.raises(DamagedData, match="none of the repository's packs"):
                repository.repair()
        (pair.path / "packs").rmdir()
        (pair.path / "elsewhere").rename(pair.path / "packs")
        pair.verify()


class TestWithin:
    def test_manifests_come_back_from_the_index(self, any_pair: Pair, rng: random.Random) -> None:
        pair = any_pair
        pair.damage(pair.of_kind(Kind.MANIFEST), rng)
        with pair.open() as repository:
            assert repository.check(read_data=True).error() is not None
            _, repaired = repository.repair()
            assert repaired.healed == {"the index": 3}
            assert repaired.complete
        pair.verify()
        with pair.open() as repository:
            repository.rebuild_index()
        pair.verify()

    def test_a_chunk_that_two_writers_have_stored(self, pair: Pair, rng: random.Random) -> None:
        """The second copy, dead until now, stands in for the first."""
        victims = rng.sample(pair.of_kind(Kind.CHUNK), 5)
        with pair.open() as repository:
            index = repository._index()
            places = {r.id: index.lookup([r.id])[0] for r in victims}
            index.drop({i: (place.pack, place.offset) for i, place in places.items() if place is not None})
            for vm, backups in HISTORY.items():
                for number, units in enumerate(backups):
                    files = {"vm.vmx": f"{vm} {1_700_000_000 + 86400 * (number + 1)}".encode()}
                    repository.backup(
                        machine_of([content(units)], name=f"again {vm}", files=files), ONE_WORKER
                    )
        lost = {r.id for r in victims}
        copies = [r for r in records_of(LocalPackStore(str(pair.path / "packs"))) if r.id in lost]
        with pair.open() as repository:
            index = repository._index()
            numbers = {row.id: row.number for row in index.packs()}
            live = [
                r
                for r in copies
                if (place := index.lookup([r.id])[0])
                and (place.pack, place.offset) == (numbers[r.pack], r.offset)
            ]
        live = [r for r in live if sum(copy.id == r.id for copy in copies) > 1]
        assert live
        pair.damage(live, rng)
        with pair.open() as repository:
            _, repaired = repository.repair()
            assert repaired.healed == {"other packs": len(live)}
            assert repaired.complete
        pair.verify()

    @pytest.mark.parametrize("part", ["header", "table", "footer"])
    def test_a_pack_whose_structure_is_damaged_is_written_anew(self, pair: Pair, part: str) -> None:
        with pair.open() as repository:
            row = next(row for row in repository._index().packs() if row.state is PackState.SEALED)
        table = next(r for r in pair.records if r.pack == row.id and r.kind is Kind.TABLE)
        at = {"header": 20, "table": table.offset + 100, "footer": row.committed_bytes - 5}[part]
        with open(pair.pack(row.id), "r+b") as file:
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
        with pair.open() as repository:
            assert not repository.check().clean
            found, repaired = repository.repair()
            assert found.findings
            assert repaired.complete
            assert (repaired.damaged, repaired.moved) == (0, row.records)
            report = repository.check(read_data=True)
            assert_clean(report)
            assert any("nothing that is needed" in note for note in report.notes)
        pair.verify()
        with pair.open() as repository:
            repository.rebuild_index()
        pair.verify()

    def test_a_healthy_repository_is_left_alone(self, pair: Pair) -> None:
        before = {path: path.read_bytes() for path in (pair.path / "packs").rglob("*.pack")}
        with pair.open() as repository, pair.open_other() as other:
            found, repaired = repository.repair(other)
        assert found.clean
        assert repaired.complete
        assert repaired.damaged == repaired.moved == repaired.dropped == 0
        assert before == {path: path.read_bytes() for path in (pair.path / "packs").rglob("*.pack")}


class TestWithoutACopy:
    def test_what_is_left_is_named_exactly_and_the_rest_restores(
        self, any_pair: Pair, rng: random.Random
    ) -> None:
        pair = any_pair
        pair.damage(rng.sample(pair.of_kind(Kind.CHUNK), 30), rng)
        with pair.open() as repository:
            check = repository.check(read_data=True)
            expected = units_reported([part for part in check.damaged if part.content == "disk0.raw"])
            if pair.password is None:
                names = {record.id for record in pair.damaged}
                assert expected == units_lost(pair.units, names)
            _, repaired = repository.repair()
            error = repaired.error()
            assert error is not None
            assert error.exit_code == 23
            assert (repaired.damaged, repaired.healed_total, repaired.dropped) == (30, 0, 30)
            assert units_reported([p for p in repaired.ranges if p.content == "disk0.raw"]) == expected
            for point in repository.points():
                self.holes_are_where_they_should_be(repository, point, pair, expected)
                if point.id.hex() in expected:
                    with pytest.raises(IntegrityError):
                        restored(repository, point)
        self.back_up_again(pair)
        pair.verify()

    def holes_are_where_they_should_be(
        self, repository: Repository, point: Point, pair: Pair, expected: dict[str, set[int]]
    ) -> None:
        found, lost = salvage(repository, point)
        units = pair.units[point.id.hex()]
        gone = expected.get(point.id.hex(), set())
        assert found["disk0.raw"] == content([0 if at in gone else n for at, n in enumerate(units)])
        said = {
            at
            for offset, length in lost["disk0.raw"]
            for at in range(offset // UNIT, (offset + length) // UNIT)
        }
        assert said == gone
        for (offset, length), (after, _) in zip(lost["disk0.raw"], lost["disk0.raw"][1:], strict=False):
            assert offset + length <= after

    def back_up_again(self, pair: Pair) -> None:
        """Everything that is gone is still on the disks of the VMs."""
        with pair.open() as repository:
            for vm, backups in HISTORY.items():
                for number, units in enumerate(backups):
                    when = next(
                        p.manifest.time
                        for p in repository.points()
                        if pair.units.get(p.id.hex()) is units or pair.units.get(p.id.hex()) == units
                    )
                    machine = machine_of([content(units)], name=vm, files={"vm.vmx": f"{vm} {when}".encode()})
                    repository.backup(machine, replace(ONE_WORKER, time=when + 10 + number))
            assert not repository._index().lost()

    def test_nodes_that_are_gone_come_back_with_a_backup(self, pair: Pair, rng: random.Random) -> None:
        pair.damage(pair.of_kind(Kind.NODE), rng)
        with pair.open() as repository:
            _, repaired = repository.repair()
            assert repaired.error() is not None
            for point in repository.points():
                found, lost = salvage(repository, point)
                size = len(content(pair.units[point.id.hex()]))
                assert found["disk0.raw"] == bytes(size)
                assert sum(length for _, length in lost["disk0.raw"]) == size
                assert lost["vm.vmx"], "a small file is a content like any other"
        self.back_up_again(pair)
        pair.verify()

    @pytest.mark.parametrize("what", ["chunk", "leaf", "root"])
    def test_a_backup_with_a_change_map_heals_as_well(
        self, pair: Pair, what: str, rng: random.Random
    ) -> None:
        """It reads what has changed, and what its parent lacks."""
        units = HISTORY["web1"][1]
        with pair.open() as repository:
            point = max(
                (p for p in repository.points() if p.manifest.vm_name == "web1"),
                key=lambda p: p.manifest.time,
            )
            tree = dict(contents_of(point.manifest))["disk0.raw"]
            _, trees = repository._reading()
            victim = {
                "chunk": chunk_id(units[50]),
                "leaf": trees.leaf_id(tree, 3),
                "root": tree.root,
            }[what]
        pair.damage([next(r for r in pair.records if r.id == victim)], rng)
        changed = (
            units if what == "root" else [*units[:20], 999, *units[21:]]
        )  # only the same content has that root
        with pair.open() as repository:
            repository.repair()
            options = BackupOptions(
                workers=1,
                changes={"disk0.raw": ChangeMap.of([(20 * UNIT, UNIT)], len(units) * UNIT)},
                base=repository.resolve(point.id.hex()),
            )
            summary = repository.backup(machine_of([content(changed)], name="web1"), options)
            assert summary.bytes_read < len(units) * UNIT or what == "root"
            assert summary.point is not None
            pair.units = {**pair.units, summary.point.hex(): changed}
        pair.verify()

    def test_a_damaged_root_that_nobody_has_noticed_costs_a_full_read(
        self, pair: Pair, rng: random.Random
    ) -> None:
        units = HISTORY["web1"][1]
        with pair.open() as repository:
            point = repository.resolve("web1@latest")
            root = dict(contents_of(point.manifest))["disk0.raw"].root
        pair.damage([next(r for r in pair.records if r.id == root)], rng)
        with pair.open() as repository:
            options = BackupOptions(
                workers=1,
                changes={"disk0.raw": ChangeMap.of([(20 * UNIT, UNIT)], len(units) * UNIT)},
                base=repository.resolve(point.id.hex()),
            )
            changed = [*units[:20], 999, *units[21:]]
            summary = repository.backup(machine_of([content(changed)], name="web1"), options)
            assert summary.bytes_read > 100 * UNIT
            assert repository.resolve("web1@latest").manifest.disks[0].read == "full"
            made = repository.resolve("web1@latest")
            assert restored(repository, made)["disk0.raw"] == content(changed)


def test_what_is_forgotten_and_pinned_stays_so(pair: Pair, rng: random.Random) -> None:
    """Damaged marks are written anew from the index, so that a rebuild says the same."""
    with pair.open() as repository:
        first, second, third = repository.points()
        repository.forget([first])
        repository.pin([second])
        marks = [r for r in records_of(LocalPackStore(str(pair.path / "packs"))) if r.kind is Kind.MARK]
    assert len(marks) == 2
    pair.damage(marks, rng)
    with pair.open() as repository:
        _, repaired = repository.repair()
        assert repaired.complete
        assert repaired.marks == 2
        assert_clean(repository.check(read_data=True))
        repository.rebuild_index()
        assert [p.id for p in repository.points()] == [second.id, third.id]
        assert repository.pinned() == {second.id}


def test_a_pack_that_was_sealed_after_its_damage_is_healed(tmp_path: Path, rng: random.Random) -> None:
    """Its table is made of the headers that are left, so that it is whole itself and names fewer records than the index."""
    path, units = tmp_path / "repo", list(range(1, 9))
    with Repository.init(str(path), SMALL, notify=quiet) as repository:
        repository.backup(machine_of([content(units)]), replace(ONE_WORKER, time=1_700_000_000))
    with Repository.init(str(tmp_path / "other"), SMALL, notify=quiet) as other:
        with Repository.open(str(path), notify=quiet) as repository:
            repository.replicate(other, repository.points())
        found = [one for one in records_of(LocalPackStore(str(path / "packs"))) if one.kind is Kind.CHUNK]
        (file,) = path.rglob("*.pack")
        data = bytearray(file.read_bytes())
        for one in rng.sample(found, 2):
            data[one.offset + rng.randrange(72)] ^= 1
        file.write_bytes(bytes(data))
        with Repository.open(str(path), notify=quiet) as repository:
            later = machine_of([content(range(100, 140))], name="later")
            repository.backup(later, replace(ONE_WORKER, time=1_700_000_001))
            row = next(row for row in repository._index().packs() if row.id.hex() == file.stem)
            assert row.state is PackState.SEALED
            for read_data in (False, True):
                report = repository.check(read_data=read_data)
                assert {finding.kind for finding in report.findings} == {"pack"}
            _, repaired = repository.repair(other)
            assert (repaired.healed_total, repaired.others) == (2, [])
            assert repaired.complete
            assert_clean(repository.check(read_data=True))


def test_repairs_that_are_killed(pair: Pair, rng: random.Random) -> None:
    """Each time something has been healed or not; in the end everything is, and nothing was lost on the way."""
    landed = 0
    typical_s = 0.2
    for _ in range(10):
        pair.damage(rng.sample(pair.of_kind(Kind.CHUNK, Kind.NODE), 60), rng)
        victim = Child(do="repair", path=pair.path, other=pair.other)
        victim.ready()
        victim.go()
        killed = victim.kill_after(rng.uniform(0.2, 1.0) * typical_s)
        landed += killed
        typical_s *= 1.1 if killed else 0.6
        with pair.open() as repository:
            for point in repository.points():
                found, lost = salvage(repository, point)
                wanted = bytearray(content(pair.units[point.id.hex()]))
                for offset, length in lost["disk0.raw"]:
                    wanted[offset : offset + length] = bytes(length)
                assert found["disk0.raw"] == wanted
    said = Child(do="repair", path=pair.path, other=pair.other).run()
    assert said["complete"], said
    pair.verify()
    assert landed >= 3, "hardly any kill landed: nothing was shown"


def test_a_backup_goes_on_beside_a_repair(pair: Pair, rng: random.Random, tmp_path: Path) -> None:
    pair.damage(rng.sample(pair.of_kind(Kind.CHUNK), 50), rng)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(content([*range(2000, 2150), *range(1, 60)]))
    repairing = Child(do="repair", path=pair.path, other=pair.other)
    backing = Child(do="backup", path=pair.path, disk=disk, name="busy")
    for child in (repairing, backing):
        child.ready()
    for child in (repairing, backing):
        child.go()
    made = backing.result()["point"]
    assert repairing.result()["complete"]
    pair.units = {**pair.units, made: [*range(2000, 2150), *range(1, 60)]}
    pair.verify()


def test_ids_are_as_the_tests_think(clear: Model) -> None:
    stored = {r.id for r in clear.records if r.kind is Kind.CHUNK}
    wanted = {RecordId(chunk_id(n)) for units in clear.units.values() for n in units if n}
    assert wanted < stored
