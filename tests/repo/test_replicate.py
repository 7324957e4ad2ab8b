"""Copies between repositories: exact, complete, only what is missing, and whole points or none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rig.disks import KIB, MIB, content, machine_of
from rig.engine import restored

from holdfast.errors import DamagedData, StorageError, UsageError
from holdfast.ids import PointId
from holdfast.repo.backup import BackupOptions
from holdfast.repo.format.manifest import encode_manifest
from holdfast.repo.format.record import Kind
from holdfast.repo.replicate import ReplicateOptions
from holdfast.repo.repository import InitOptions, Repository

PASSWORD = "correct horse"
Pair = tuple[Repository, Repository]


def options(cipher: str | None, chunk: int = 64 * KIB) -> InitOptions:
    return InitOptions(cipher=cipher, chunk_size_bytes=chunk, segment_bytes=MIB)  # type: ignore[arg-type]


def make(path: Path, cipher: str | None, chunk: int = 64 * KIB) -> Repository:
    return Repository.init(str(path), options(cipher, chunk), password=PASSWORD if cipher else None)


@pytest.fixture(params=["clear", "other keys", "encrypting", "decrypting", "cut otherwise"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    ciphers: dict[str, tuple[str | None, str | None]] = {
        "clear": (None, None),
        "other keys": ("aes256-gcm", "aes256-gcm"),
        "encrypting": (None, "aes256-gcm"),
        "decrypting": ("aes256-gcm", None),
        "cut otherwise": ("aes256-gcm", None),
    }
    one, other = ciphers[request.param]
    chunk = 32 * KIB if request.param == "cut otherwise" else 64 * KIB
    with make(tmp_path / "a", one) as source, make(tmp_path / "b", other, chunk) as target:
        yield source, target


@pytest.fixture
def alike(tmp_path: Path) -> Iterator[Pair]:
    with make(tmp_path / "a", None) as source, make(tmp_path / "b", None) as target:
        yield source, target


def back_up(repository: Repository, units: list[int], name: str = "vm", when: int = 1_700_000_000) -> None:
    machine = machine_of([content(units)], name=name, files={"a.vmx": name.encode()})
    repository.backup(machine, BackupOptions(time=when))


def same(source: Repository, target: Repository) -> None:
    """Every point of the source is in the target, with equal contents."""
    there = {(p.manifest.vm_uuid, p.manifest.time, p.manifest.session): p for p in target.points()}
    for point in source.points():
        manifest = point.manifest
        copy = there[manifest.vm_uuid, manifest.time, manifest.session]
        assert restored(target, copy) == restored(source, point)
        assert (copy.manifest.vm_name, copy.manifest.labels) == (manifest.vm_name, manifest.labels)
    assert target.check(read_data=True).clean


def test_points_are_copied_exactly_and_once(pair: Pair, rng: random.Random) -> None:
    source, target = pair
    units = [rng.randrange(0, 400) for _ in range(200)]
    for number in range(4):
        back_up(source, units, when=1_700_000_000 + number)
        back_up(source, units[::-1], "other", when=1_700_000_000 + number)
        units[rng.randrange(200)] = 1000 + number
    first = source.replicate(target, source.points())
    assert len(first.copied) == 8
    same(source, target)
    again = source.replicate(target, source.points())
    assert (again.copied, again.already) == ([], 8)
    units[7] = 5000
    back_up(source, units, when=1_700_000_100)
    third = source.replicate(target, source.points())
    assert len(third.copied) == 1
    assert third.stored_bytes < 400 * KIB
    same(source, target)


def test_records_travel_as_they_are_where_keys_are_the_same(alike: Pair, rng: random.Random) -> None:
    source, target = alike
    back_up(source, [rng.randrange(1, 100) for _ in range(64)])
    report = source.replicate(target, source.points())
    assert report.same_keys
    (copied,) = report.copied
    assert copied.target_id == copied.id
    assert len(copied.proof) == 32
    assert [point.id for point in target.points()] == [point.id for point in source.points()]


def test_a_dry_run_says_what_a_real_one_copies(alike: Pair, rng: random.Random) -> None:
    source, target = alike
    units = [rng.randrange(1, 500) for _ in range(300)]
    back_up(source, units, when=1_700_000_000)
    units[3] = 9000
    back_up(source, units, when=1_700_000_001)
    foreseen = source.replicate(target, source.points(), ReplicateOptions(dry_run=True))
    assert target.points() == []
    real = source.replicate(target, source.points())
    assert len(foreseen.copied) == len(real.copied) == 2
    assert foreseen.copied[0].stored_bytes == real.copied[0].stored_bytes


def test_what_the_target_has_forgotten_stays_so(pair: Pair) -> None:
    source, target = pair
    back_up(source, [1, 2, 3])
    source.replicate(target, source.points())
    target.forget(target.points())
    report = source.replicate(target, source.points())
    assert (report.copied, report.forgotten) == ([], 1)
    assert target.points() == []


@pytest.mark.parametrize("ack", ["chunk", "batch", "point"])
def test_every_kind_of_acknowledgement(alike: Pair, ack: str, rng: random.Random) -> None:
    source, target = alike
    back_up(source, [rng.randrange(1, 300) for _ in range(200)])
    source.replicate(target, source.points(), ReplicateOptions(ack=ack))  # type: ignore[arg-type]
    same(source, target)


class _Cut(Exception):
    pass


@pytest.mark.parametrize("cipher", [None, "aes256-gcm"])
def test_cut_off_anywhere_it_goes_on(tmp_path: Path, cipher: str | None, rng: random.Random) -> None:
    with make(tmp_path / "a", None) as source, make(tmp_path / "b", cipher) as target:
        units = [rng.randrange(1, 5000) for _ in range(400)]
        for number in range(3):
            back_up(source, units, when=1_700_000_000 + number)
            for _ in range(20):
                units[rng.randrange(400)] = rng.randrange(6000, 9000)
        listed = 0
        for stop in range(30):
            left = [stop]

            def pace(_size: int, left: list[int] = left) -> None:
                if not left[0]:
                    raise _Cut
                left[0] -= 1

            try:
                source.replicate(target, source.points(), ReplicateOptions(pace=pace, workers=1))
                break
            except _Cut:
                assert len(target.points()) >= listed
                listed = len(target.points())
                assert target.check().clean
        source.replicate(target, source.points())
        same(source, target)


def test_damage_in_the_source_ends_it_and_lists_nothing_half(alike: Pair, tmp_path: Path) -> None:
    source, target = alike
    back_up(source, list(range(1, 100)), when=1_700_000_000)
    source.replicate(target, source.points())
    back_up(source, [*range(1, 90), *range(500, 520)], when=1_700_000_001)
    for pack in (tmp_path / "a" / "packs").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[-200_000] ^= 1
        pack.write_bytes(bytes(data))
    with pytest.raises((DamagedData, StorageError)):
        source.replicate(target, source.points())
    assert len(target.points()) == 1
    assert target.check(read_data=True).clean


def test_a_base_that_the_source_has_not_is_no_base(alike: Pair) -> None:
    source, target = alike
    units = list(range(1, 200))
    back_up(source, units, when=1_700_000_000)
    source.replicate(target, source.points())
    source.forget(source.points())
    source.collect()
    units[5] = 999
    back_up(source, units, when=1_700_000_001)
    source.replicate(target, source.points())
    same(source, target)
    assert len(target.points()) == 2


def test_three_ways(tmp_path: Path) -> None:
    with (
        make(tmp_path / "a", None) as a,
        make(tmp_path / "b", None) as b,
        make(tmp_path / "c", None) as c,
    ):
        back_up(a, [1, 2, 3], "one")
        back_up(b, [3, 4, 5], "two")
        for source, target in ((a, b), (b, c), (c, a), (b, a)):
            source.replicate(target, source.points())
        same(a, b)
        same(b, c)
        same(c, a)


@pytest.mark.parametrize("state", ["listed", "forgotten"])
def test_what_came_sealed_anew_on_another_way_is_not_copied_again(tmp_path: Path, state: str) -> None:
    """Two repositories of one key have both got it through one of another key, cut in different ways."""
    with (
        make(tmp_path / "between", "aes256-gcm") as between,
        make(tmp_path / "a", None) as a,
        make(tmp_path / "b", None, 32 * KIB) as b,
    ):
        back_up(between, list(range(1, 80)), when=1_700_000_000)
        back_up(between, list(range(40, 120)), when=1_700_000_001)
        for target in (a, b):
            between.replicate(target, between.points())
        assert {point.id for point in a.points()}.isdisjoint(point.id for point in b.points())
        if state == "forgotten":
            b.forget(b.points())
        back_up(a, [1, 2, 3], when=1_700_000_002)
        report = a.replicate(b, a.points())
        assert report.same_keys
        assert (len(report.copied), report.already + report.forgotten) == (1, 2)
        assert len(b.points()) == (3 if state == "listed" else 1)
        if state == "listed":
            same(a, b)
            again = b.replicate(a, b.points())
            assert (again.copied, again.already) == ([], 3)


def test_a_point_of_another_vm_is_no_copy_though_it_names_the_same_session(alike: Pair) -> None:
    """Somebody who may add to the target keeps nothing out of it with another VM's point."""
    source, target = alike
    back_up(source, [1, 2, 3])
    (good,) = source.points()
    back_up(target, [9, 9, 9], "other")
    (other,) = target.points()
    forged = encode_manifest(replace(other.manifest, session=good.manifest.session))
    forged_id = PointId(target.unlock().record_id(Kind.MANIFEST, forged))
    session = target._short_session("backup")
    session.begin()
    session.commit_point(forged_id, forged)
    session.close(keep=False)
    assert len(target.points()) == 2
    assert len(source.replicate(target, source.points()).copied) == 1
    same(source, target)


def test_into_itself_is_refused(alike: Pair) -> None:
    source, _ = alike
    back_up(source, [1])
    with pytest.raises(UsageError, match="same repository"):
        source.replicate(source, source.points())


def test_collections_on_both_sides_meanwhile(alike: Pair, rng: random.Random) -> None:
    """What the target collects between two batches is copied again before the point is listed."""
    source, target = alike
    units = [rng.randrange(1, 3000) for _ in range(300)]
    back_up(source, units, when=1_700_000_000)
    source.replicate(target, source.points())
    target.forget(target.points())  # all that the next copy relies on is garbage now
    units[0] = 7777
    back_up(source, units, when=1_700_000_001)
    collected = []

    def pace(_size: int) -> None:
        if not collected:
            collected.append(target.collect())

    newest = source.points()[-1:]
    source.replicate(target, newest, ReplicateOptions(pace=pace, workers=1))
    assert collected
    (copy,) = target.points()
    assert restored(target, copy) == restored(source, newest[0])
    assert target.check(read_data=True).clean
