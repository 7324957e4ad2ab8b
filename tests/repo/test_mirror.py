"""Mirrored retention: what the source has forgotten is known, and nothing else goes from the target."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from rig.disks import KIB, MIB, content, machine_of
from rig.remote import all_gone, remote_repository

from holdfast.errors import StorageDenied
from holdfast.ids import PointId, RecordId
from holdfast.repo.backup import BackupOptions
from holdfast.repo.mirror import Gone, plan_mirror
from holdfast.repo.repository import InitOptions, Repository
from holdfast.repo.retention import Candidate
from holdfast.repo.wire.rights import Rights

PASSWORD = "correct horse"
NOW = 1_800_000_000


def make(path: Path, cipher: str | None, chunk: int = 64 * KIB) -> Repository:
    options = InitOptions(cipher=cipher, chunk_size_bytes=chunk, segment_bytes=MIB)  # type: ignore[arg-type]
    return Repository.init(str(path), options, password=PASSWORD if cipher else None)


def back_up(repository: Repository, number: int, name: str = "vm") -> PointId:
    machine = machine_of([content([number, number + 1])], name=name)
    made = repository.backup(machine, BackupOptions(time=1_700_000_000 + number, workers=1))
    assert made.point is not None
    return made.point


def gone(source: Repository, target: Repository) -> set[int]:
    """The times of those points of the target that the source has forgotten."""
    listed = target.points()
    found = source.gone_from(target, listed).points
    return {point.manifest.time - 1_700_000_000 for point in listed if point.id in found}


def forget(repository: Repository, *numbers: int) -> None:
    repository.forget([p for p in repository.points() if p.manifest.time - 1_700_000_000 in numbers])


# --- what the source has forgotten


@pytest.mark.parametrize(("cipher", "known_when_collected"), [(None, {1, 2}), ("aes256-gcm", {2})])
def test_what_was_forgotten_is_known_and_nothing_else(
    tmp_path: Path, cipher: str | None, known_when_collected: set[int]
) -> None:
    """With other keys a collected point has no origin any more; it stays."""
    with make(tmp_path / "a", None) as a, make(tmp_path / "b", cipher) as b:
        back_up(b, 50, "own")
        for number in range(4):
            back_up(a, number)
        a.replicate(b, a.points())
        assert gone(a, b) == set()
        forget(a, 1)
        assert gone(a, b) == {1}
        a.collect()
        forget(a, 2)
        assert gone(a, b) == known_when_collected
        a.recall(a.hidden_points())
        assert gone(a, b) == known_when_collected - {2}
        a.rebuild_index()  # the packs say what was collected
        assert gone(a, b) == known_when_collected - {2}
        found = a.gone_from(b, b.points())
        assert found.alive == {p.manifest.vm_uuid for p in a.points()}


def test_what_is_listed_under_another_id_is_not_gone(tmp_path: Path) -> None:
    with (
        make(tmp_path / "between", "aes256-gcm") as between,
        make(tmp_path / "a", None) as a,
        make(tmp_path / "b", None, 32 * KIB) as b,
    ):
        for number in range(2):
            back_up(between, number)
        for target in (a, b):
            between.replicate(target, between.points())
        forget(a, 0)
        assert gone(a, b) == {0}
        a.collect()
        assert gone(a, b) == set()  # b's copy has never been in a, as far as ids tell
        forget(b, 1)
        assert gone(b, a) == {1}
        b.recall(b.hidden_points())
        assert gone(b, a) == set()


def test_a_far_source_and_a_far_target(tmp_path: Path) -> None:
    with make(tmp_path / "a", None) as a, make(tmp_path / "b", None) as b:
        for number in range(3):
            back_up(a, number)
        a.replicate(b, a.points())
        forget(a, 0, 1)
        a.collect()
        back_up(a, 7)
        forget(a, 7)
    with (
        remote_repository(str(tmp_path / "a"), Rights(read_only=True)) as source,
        remote_repository(str(tmp_path / "b")) as target,
    ):
        target.require_removing()
        assert gone(source, target) == {0, 1}
        with pytest.raises(StorageDenied):
            source.require_removing()
    with (
        remote_repository(str(tmp_path / "b"), Rights(append_only=True)) as limited,
        pytest.raises(StorageDenied, match="only add"),
    ):
        limited.require_removing()
    all_gone()


# --- what becomes of it


def candidate(number: int, vm: str = "vm", **more: int) -> Candidate:
    time = NOW - 1000 + number
    return Candidate(point_id(number), time, time, vm, **more)  # type: ignore[arg-type]


def point_id(number: int) -> PointId:
    return PointId(RecordId(number.to_bytes(32, "big")))


def going(points: list[Candidate], alive: frozenset[str] = frozenset({"vm"})) -> dict[int, str]:
    """All are gone from the source: of each what keeps it, or nothing."""
    every = frozenset(PointId(RecordId(point.id)) for point in points)
    verdicts = plan_mirror(points, Gone(every, alive), now=NOW)
    return {
        int.from_bytes(v.point.id, "big"): ", ".join(reason.rule for reason in v.reasons) for v in verdicts
    }


def test_guards() -> None:
    unverified = "newest point of its VM (none is verified)"
    assert going([candidate(1), candidate(2)]) == {1: "", 2: unverified}
    verified = [candidate(1, verified_at=5), candidate(2, verified_at=5), candidate(3)]
    assert going(verified) == {1: "", 2: "newest verified point of its VM", 3: ""}
    assert going([candidate(1, pinned=True), candidate(2)]) == {1: "pinned", 2: unverified}
    assert going([candidate(1), candidate(5000)]) == {1: unverified, 5000: "lies in the future"}
    other = going([candidate(1), candidate(2), candidate(3, "other"), candidate(4, "other")])
    assert other[1] == ""
    assert other[3] == "the source lists no restore point of its VM"


def test_only_what_is_gone_is_judged() -> None:
    points = [candidate(1), candidate(2), candidate(3)]
    verdicts = plan_mirror(points, Gone(frozenset({point_id(1)}), frozenset({"vm"})), now=NOW)
    assert [(v.point.id, v.kept) for v in verdicts] == [(point_id(1), False)]


def test_every_vm_keeps_one_whatever_happens(rng: random.Random) -> None:
    def pick() -> bool:
        return rng.random() < 0.5

    for _ in range(200):
        points = [
            candidate(number, rng.choice("abc"), verified_at=7 * pick(), pinned=pick())
            for number in rng.sample(range(900), rng.randrange(1, 12))
        ]
        every = frozenset(PointId(RecordId(point.id)) for point in points if pick())
        verdicts = plan_mirror(points, Gone(every, frozenset("ab")), now=NOW)
        went = {v.point.id for v in verdicts if not v.kept}
        assert went <= every
        for vm in {point.vm_uuid for point in points}:
            mine = [point for point in points if point.vm_uuid == vm]
            left = [point for point in mine if point.id not in went]
            assert left
            assert any(point.verified_at for point in left) == any(point.verified_at for point in mine)
            assert all(point.id not in went for point in mine if point.pinned or vm == "c")
