"""Packs are damaged in every way, and `check` must name exactly the points, disks and ranges that are lost.

What is lost is computed by the test (see `rig.anatomy`). Whatever is not lost must still restore bit for bit,
and what is lost must be refused, never given back otherwise.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rig.anatomy import Found, chunk_id, records_of, touched, units_lost, units_reported
from rig.disks import UNIT, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, quiet, restored

from holdfast.errors import HoldfastError, IntegrityError
from holdfast.ids import PackId, RecordId
from holdfast.repo.check import CheckReport
from holdfast.repo.format.record import FOOTER_BYTES, Kind
from holdfast.repo.format.rows import PackState
from holdfast.repo.packs import LocalPackStore
from holdfast.repo.repository import Repository

DISKS = {
    "web1": [
        [*range(1, 49), 0, 0, 5, 6, *range(49, 76)],
        [*range(1, 30), 300, 301, 0, 0, 5, 6, *range(33, 76)],
    ],
    "db1": [[*range(400, 432), 1, 2, 3, 0, 0, 0, *range(5, 9)]],
}
"""VM -> its backups -> units; with shared and repeated content, holes, and several segments of 16 units."""


@dataclass
class Sample:
    """A repository, intact, and all that is known of it."""

    path: Path
    units: dict[str, list[int]] = field(default_factory=dict)
    records: list[Found] = field(default_factory=list)
    sealed: list[PackId] = field(default_factory=list)
    open: list[PackId] = field(default_factory=list)

    def copy(self, to: Path) -> Spoilt:
        shutil.copytree(self.path, to)
        return Spoilt(self, to)


@dataclass
class Spoilt:
    """A copy that is going to be damaged."""

    sample: Sample
    path: Path

    def pack(self, pack_id: PackId) -> Path:
        return self.path / "packs" / pack_id.hex()[:2] / f"{pack_id.hex()}.pack"

    def flip(self, pack_id: PackId, offset: int, bit: int = 0) -> None:
        with open(self.pack(pack_id), "r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)

    def check(self, *, read_data: bool = True) -> CheckReport:
        with Repository.open(str(self.path), notify=quiet) as repository:
            return repository.check(read_data=read_data)

    def verify(self, gone: list[Found], report: CheckReport) -> None:
        """Holds a check and all restores against what is really lost."""
        units = self.sample.units
        chunks_lost = units_lost(units, [r.id for r in gone if r.kind is Kind.CHUNK])
        nodes_lost = {r.id for r in gone if r.kind is Kind.NODE}
        said = units_reported(report.damaged)
        if not nodes_lost:
            assert said == chunks_lost
        manifests_lost = {r.id.hex() for r in gone if r.kind is Kind.MANIFEST}
        with Repository.open(str(self.path), notify=quiet) as repository:
            points = {p.id.hex(): p for p in repository.points()}
            assert points.keys() == units.keys()
            for point_id, point in points.items():
                try:
                    found = restored(repository, point)["disk0.raw"]
                except IntegrityError:
                    assert point_id in said, "check did not name a point that can not be restored"
                else:
                    assert found == content(units[point_id])
                    assert point_id not in said, "check named a point that is sound"
                assert chunks_lost.keys() <= said.keys()
                for at in range(len(units[point_id])):
                    if nodes_lost and at in said.get(point_id, ()):
                        with pytest.raises(IntegrityError):
                            self.read(repository, point_id, at)
        for point_id in manifests_lost:
            assert any(f.kind == "point" and point_id[:12] in f.message for f in report.findings)

    def read(self, repository: Repository, point_id: str, at: int) -> bytes:
        point = next(p for p in repository.points() if p.id.hex() == point_id)
        with repository.open_disk(point, "disk0.raw") as disk:
            disk.seek(at * UNIT)
            return disk.read(UNIT)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    made = Sample(tmp_path_factory.mktemp("damage") / "repo")
    world = FolderWorld(made.path, SMALL)
    with world.open() as repository:
        for vm, backups in DISKS.items():
            for units in backups:
                summary = repository.backup(machine_of([content(units)], name=vm), ONE_WORKER)
                assert summary.point is not None
                made.units[summary.point.hex()] = units
        for row in repository._index().packs():
            (made.sealed if row.state is PackState.SEALED else made.open).append(row.id)
    made.records = records_of(world.store)
    assert len(made.sealed) >= 3
    assert len(made.open) == 1
    kinds = {(r.kind, r.pack in made.sealed) for r in made.records}
    assert {(Kind.CHUNK, True), (Kind.CHUNK, False), (Kind.NODE, True), (Kind.NODE, False)} <= kinds
    return made


@pytest.fixture
def spoilt(sample: Sample, tmp_path: Path) -> Spoilt:
    return sample.copy(tmp_path / "repo")


def pick(sample: Sample, kind: Kind, *, sealed: bool, rng: random.Random) -> Found:
    packs = sample.sealed if sealed else sample.open
    return rng.choice([r for r in sample.records if r.kind is kind and r.pack in packs])


class TestOneByte:
    @pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "open"])
    @pytest.mark.parametrize("part", ["header", "payload"])
    @pytest.mark.parametrize("kind", [Kind.CHUNK, Kind.NODE, Kind.MANIFEST])
    def test_of_a_record(
        self, spoilt: Spoilt, kind: Kind, part: str, sealed: bool, rng: random.Random
    ) -> None:
        sample = spoilt.sample
        if not any(r.kind is kind and (r.pack in sample.sealed) is sealed for r in sample.records):
            sealed = not sealed
        record = pick(sample, kind, sealed=sealed, rng=rng)
        at = record.offset + (rng.randrange(72) if part == "header" else rng.randrange(72, record.length))
        spoilt.flip(record.pack, at, rng.randrange(8))
        report = spoilt.check()
        assert any(f.kind == "pack" for f in report.findings)
        assert not any(f.kind == "index" for f in report.findings), "the index is blamed for a pack's damage"
        spoilt.verify([record], report)
        if kind is not Kind.MANIFEST:
            assert report.damaged
        error = report.error()
        assert error is not None
        assert error.exit_code in (20, 23)

    def test_of_a_leaf_costs_exactly_its_segment(self, spoilt: Spoilt, rng: random.Random) -> None:
        leaf = pick(spoilt.sample, Kind.NODE, sealed=False, rng=rng)
        spoilt.flip(leaf.pack, leaf.offset + 80)
        said = units_reported(spoilt.check().damaged)
        assert said
        for point_id, places in said.items():
            segments = {at // 16 for at in places}
            last = len(spoilt.sample.units[point_id])
            whole = {at for s in segments for at in range(16 * s, min(16 * s + 16, last))}
            assert places == whole, "more or less than whole segments"

    def test_of_the_parts_that_no_point_needs(self, spoilt: Spoilt, rng: random.Random) -> None:
        """Pack header, table and footer: damage is found, and no point is said to suffer."""
        pack = rng.choice(spoilt.sample.sealed)
        size = spoilt.pack(pack).stat().st_size
        table = next(r for r in spoilt.sample.records if r.pack == pack and r.kind is Kind.TABLE)
        for low, high in [
            (0, 64),
            (table.offset, table.offset + 72),
            (table.offset + 72, table.end),
            (size - FOOTER_BYTES, size),
        ]:
            at = rng.randrange(low, high)
            spoilt.flip(pack, at)
            for read_data in (False, True):
                report = spoilt.check(read_data=read_data)
                assert report.findings, f"byte {at} of {size} is not missed"
                spoilt.verify([], report)
                error = report.error()
                assert error is not None
                assert error.exit_code == 20
            spoilt.flip(pack, at)
        assert spoilt.check().clean

    def test_every_committed_byte_counts(self, spoilt: Spoilt, rng: random.Random) -> None:
        """A hundred places at random over all packs: `check --read-data` misses none of them."""
        sizes = [(p, spoilt.pack(p).stat().st_size) for p in spoilt.sample.sealed + spoilt.sample.open]
        for _ in range(100):
            pack, size = rng.choices(sizes, weights=[s for _, s in sizes])[0]
            at, bit = rng.randrange(size), rng.randrange(8)
            spoilt.flip(pack, at, bit)
            assert not spoilt.check().clean, f"byte {at} of pack {pack.hex()}"
            spoilt.flip(pack, at, bit)
        assert spoilt.check().clean


class TestMuch:
    def test_a_missing_pack(self, spoilt: Spoilt) -> None:
        for pack in [spoilt.sample.sealed[0], spoilt.sample.open[0]]:
            aside = spoilt.pack(pack).rename(spoilt.path / "aside")
            gone = [r for r in spoilt.sample.records if r.pack == pack]
            for read_data in (False, True):
                spoilt.verify(gone, spoilt.check(read_data=read_data))
            aside.rename(spoilt.pack(pack))
        assert spoilt.check().clean

    @pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "open"])
    def test_a_truncated_pack(self, spoilt: Spoilt, sealed: bool, rng: random.Random) -> None:
        pack = rng.choice(spoilt.sample.sealed if sealed else spoilt.sample.open)
        whole = spoilt.pack(pack).read_bytes()
        for length in [len(whole) - 1, rng.randrange(64, len(whole)), rng.randrange(1, 64), 0]:
            spoilt.pack(pack).write_bytes(whole[:length])
            gone = touched(spoilt.sample.records, pack, length, 1 << 40)
            if length < 64:
                gone = [r for r in spoilt.sample.records if r.pack == pack]
            for read_data in (False, True):
                report = spoilt.check(read_data=read_data)
                assert report.findings
                spoilt.verify([r for r in gone if r.offset + r.length > length], report)

    def test_a_truncated_pack_that_is_damaged_before_the_cut_as_well(self, spoilt: Spoilt) -> None:
        pack = spoilt.sample.sealed[0]
        chunks = [r for r in spoilt.sample.records if r.pack == pack and r.kind is Kind.CHUNK]
        length = chunks[-1].offset + 10
        os.truncate(spoilt.pack(pack), length)
        spoilt.flip(pack, chunks[1].offset + 100)
        gone = [chunks[1], *touched(spoilt.sample.records, pack, length, 1 << 40)]
        spoilt.verify(gone, spoilt.check())

    @pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "open"])
    def test_zeroed_blocks(self, spoilt: Spoilt, sealed: bool, rng: random.Random) -> None:
        pack = rng.choice(spoilt.sample.sealed if sealed else spoilt.sample.open)
        whole = spoilt.pack(pack).read_bytes()
        for _ in range(6):
            at = rng.randrange(0, len(whole), 4096)
            size = min(4096 * rng.choice([1, 1, 2, 30]), len(whole) - at)
            spoilt.pack(pack).write_bytes(whole[:at] + bytes(size) + whole[at + size :])
            report = spoilt.check()
            assert not report.clean
            gone = touched(spoilt.sample.records, pack, at, at + size)
            spoilt.verify(gone, report)

    def test_swapped_packs(self, spoilt: Spoilt) -> None:
        one, other = spoilt.sample.sealed[0], spoilt.sample.sealed[1]
        spoilt.pack(one).rename(spoilt.path / "aside")
        spoilt.pack(other).rename(spoilt.pack(one))
        (spoilt.path / "aside").rename(spoilt.pack(other))
        gone = [r for r in spoilt.sample.records if r.pack in (one, other)]
        for read_data in (False, True):
            report = spoilt.check(read_data=read_data)
            assert any("holds pack" in f.message for f in report.findings)
            spoilt.verify(gone, report)

    def test_a_record_moved_within_its_pack(self, spoilt: Spoilt) -> None:
        """Both records are intact, but where the other one should be."""
        chunks = [
            r for r in spoilt.sample.records if r.pack == spoilt.sample.sealed[0] and r.kind is Kind.CHUNK
        ]
        one = next(r for r in chunks if sum(r.length == c.length for c in chunks) > 1)
        other = next(c for c in chunks if c.length == one.length and c is not one)
        data = bytearray(spoilt.pack(one.pack).read_bytes())
        data[one.offset : one.end], data[other.offset : other.end] = (
            data[other.offset : other.end],
            data[one.offset : one.end],
        )
        spoilt.pack(one.pack).write_bytes(data)
        report = spoilt.check()
        assert not report.clean
        spoilt.verify([one, other], report)

    def test_the_last_byte_of_a_pack_repeated(self, spoilt: Spoilt) -> None:
        """What is longer than it should be is no loss."""
        for pack in spoilt.sample.sealed + spoilt.sample.open:
            with open(spoilt.pack(pack), "ab") as file:
                file.write(b"?" * 100)
        spoilt.verify([], spoilt.check())

    def test_strangers_among_the_packs(self, spoilt: Spoilt, rng: random.Random) -> None:
        """Files that are none of our packs, or of another repository: noted, and no harm."""
        folder = spoilt.path / "packs"
        (folder / "README").write_bytes(b"?")
        (folder / "zz").write_bytes(b"?")
        (folder / "aa").mkdir(exist_ok=True)
        (folder / "aa" / ("aa" * 16 + ".pack")).write_bytes(rng.randbytes(100_000))
        (folder / "aa" / ("aa" * 15 + "ab.pack")).write_bytes(b"")
        (folder / "aa" / "core").write_bytes(b"?")
        report = spoilt.check()
        assert report.clean
        assert any("aa" * 16 in note for note in report.notes)
        spoilt.verify([], report)
        with Repository.open(str(spoilt.path), notify=quiet) as repository:
            repository.backup(machine_of([content([1, 2, 900])], name="new"), ONE_WORKER)
            assert repository.check(read_data=True).clean
            said = repository.rebuild_index()
            assert any("aa" * 16 in problem for problem in said.problems)
            assert repository.check(read_data=True).clean
            assert len(repository.points()) == 4


class TestWithoutReading:
    """`check` without `--read-data` looks at structure only; what it can see, it must name as exactly."""

    @pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "open"])
    def test_a_damaged_header(self, spoilt: Spoilt, sealed: bool, rng: random.Random) -> None:
        record = pick(spoilt.sample, Kind.CHUNK, sealed=sealed, rng=rng)
        spoilt.flip(record.pack, record.offset + rng.randrange(72))
        report = spoilt.check(read_data=False)
        if not sealed:  # its records are found by their headers, so this is structure
            assert any(f.kind == "pack" for f in report.findings)
            assert not any(f.kind == "index" for f in report.findings)
            assert units_reported(report.damaged) == units_lost(spoilt.sample.units, [record.id])

    def test_one_point_alone(self, spoilt: Spoilt, sample: Sample) -> None:
        """Only what that point needs is looked at, but that down to the bytes."""
        of_db = next(p for p, units in sample.units.items() if 400 in units)
        other = next(r for r in sample.records if r.id == chunk_id(300))
        needed = next(r for r in sample.records if r.id == chunk_id(401))
        spoilt.flip(other.pack, other.offset + 100)
        with Repository.open(str(spoilt.path), notify=quiet) as repository:
            point = next(p for p in repository.points() if p.id.hex() == of_db)
            assert repository.check([point], read_data=True).clean
            spoilt.flip(needed.pack, needed.offset + 100)
            report = repository.check([point], read_data=True)
            assert units_reported(report.damaged) == {of_db: {1}}
            assert repository.check([point]).clean


def test_damage_in_many_places_at_once(spoilt: Spoilt, rng: random.Random) -> None:
    chunks = [r for r in spoilt.sample.records if r.kind is Kind.CHUNK]
    for _ in range(5):
        gone = rng.sample(chunks, 12)
        for record in gone:
            spoilt.flip(record.pack, record.offset + 30)
        spoilt.verify(gone, spoilt.check())
        for record in gone:
            spoilt.flip(record.pack, record.offset + 30)


def test_what_a_disk_can_not_read_is_named_and_the_rest_is_checked(
    spoilt: Spoilt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector: the kernel answers EIO for one range of one pack."""
    victim = next(r for r in spoilt.sample.records if r.kind is Kind.CHUNK and r.pack in spoilt.sample.sealed)
    read = LocalPackStore.read

    def failing(self: LocalPackStore, pack_id: PackId, offset: int, length: int) -> bytes:
        if pack_id == victim.pack and offset < victim.end and victim.offset < offset + length:
            from holdfast.errors import StorageError

            raise StorageError("the disk failed to read")
        return read(self, pack_id, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPackStore, "read", failing)
        report = spoilt.check()
    assert not report.clean
    said = units_reported(report.damaged)
    for point, places in units_lost(spoilt.sample.units, [victim.id]).items():
        assert places <= said[point]


Damage = Callable[[Spoilt], None]


@pytest.mark.parametrize("state", ["open", "sealed"])
def test_after_a_rebuild_damage_is_still_named(spoilt: Spoilt, state: str, rng: random.Random) -> None:
    """The rebuilt index leaves out what it can not find, or takes a table's word for it; either way check tells."""
    record = pick(spoilt.sample, Kind.CHUNK, sealed=state == "sealed", rng=rng)
    spoilt.flip(record.pack, record.offset + 100)
    with Repository.open(str(spoilt.path), notify=quiet) as repository:
        repository.rebuild_index()
        assert len(repository.points()) == len(spoilt.sample.units)
    spoilt.verify([record], spoilt.check())


def test_a_report_does_not_grow_without_bounds(spoilt: Spoilt) -> None:
    for pack in spoilt.sample.sealed:
        spoilt.pack(pack).unlink()
    report = spoilt.check()
    assert len(report.damaged) <= 10_000
    assert isinstance(report.error(), HoldfastError)


def test_ids_of_the_test_are_those_of_the_engine(sample: Sample) -> None:
    stored = {r.id for r in sample.records if r.kind is Kind.CHUNK}
    assert stored == {RecordId(chunk_id(n)) for units in sample.units.values() for n in units if n}
