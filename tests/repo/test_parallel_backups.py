"""Several processes at work on one repository at the same time: all correct, and deduplicated across them."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import pytest
from rig.child import Child
from rig.disks import MIB, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, MemoryWorld, Truth, assert_clean, restored
from rig.files import write_noise
from rig.stepped import SteppedBackup

from holdfast.repo.format.rows import PackState
from holdfast.repo.repository import InitOptions

OPTIONS = InitOptions(chunker="fixed", chunk_size_bytes=64 << 10, segment_bytes=MIB, pack_bytes=16 * MIB)
DISK = 96 * MIB
COMMIT = 2 * MIB
"""Commits are made this often, as they are in proportion with larger disks."""
LOST = 0.75
"""At most this share of what could be shared may be stored twice. On a machine with nothing else to do it is
0.1 to 0.25; how the processes are scheduled decides, so the bound leaves room."""


def packs_bytes(world: FolderWorld) -> int:
    return sum(world.store.length(pack_id) or 0 for pack_id in world.store.ids())


@pytest.fixture
def disk(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "one.raw"
    write_noise(path, seed, DISK)
    assert os.path.getsize(path) == DISK
    return path


@pytest.mark.parametrize("count", [2, 3])
def test_identical_disks_started_at_the_very_same_moment(tmp_path: Path, disk: Path, count: int) -> None:
    """The worst case: nothing is known when they begin, and each is as fast as the others."""
    world = FolderWorld(tmp_path / "repo", OPTIONS)
    children = [
        Child(do="backup", path=world.path, disk=disk, name=f"vm{n}", batch_bytes=COMMIT, workers=1)
        for n in range(count)
    ]
    for child in children:
        child.ready()
    for child in children:
        child.go()
    results = [child.result() for child in children]
    stored = packs_bytes(world)
    ratio = stored / DISK
    print(
        f"{count} at once stored {stored / MIB:.0f} MiB of {DISK / MIB:.0f} MiB: {ratio:.2f} of one, {count}.00 is all"
    )
    with world.open() as repository:
        points = repository.points()
        assert len(points) == count
        for point in points:
            assert restored(repository, point)["disk0.raw"] == disk.read_bytes()
        assert_clean(repository.check(read_data=True))
    assert sum(r["bytes_stored"] for r in results) <= 1.02 * stored
    assert ratio < 1 + LOST * (count - 1)


def test_two_backups_and_a_restore_and_a_check_meanwhile(tmp_path: Path, disk: Path, seed: int) -> None:
    world = FolderWorld(tmp_path / "repo", OPTIONS)
    earlier = tmp_path / "earlier.raw"
    write_noise(earlier, seed + 1, 32 * MIB)
    first = Child(do="backup", path=world.path, disk=earlier, name="earlier").run()["point"]
    other = tmp_path / "two.raw"
    write_noise(other, seed, DISK)
    write_noise(other, seed + 2, DISK // 4, offset=DISK // 8)
    jobs = [
        Child(do="backup", path=world.path, disk=disk, name="one", batch_bytes=COMMIT, workers=1),
        Child(do="backup", path=world.path, disk=other, name="two", batch_bytes=COMMIT, workers=1),
        Child(do="restore", path=world.path, point=first, to=tmp_path / "out.raw"),
        Child(do="check", path=world.path),
    ]
    for job in jobs:
        job.ready()
    before = packs_bytes(world)
    for job in jobs:
        job.go()
    one, two, _, checked = [job.result() for job in jobs]
    assert checked["clean"], checked["findings"]
    assert filecmp.cmp(earlier, tmp_path / "out.raw", shallow=False)
    unique = DISK + DISK // 4
    stored = packs_bytes(world) - before
    print(
        f"{stored / MIB:.0f} MiB stored for {unique / MIB:.0f} MiB of unique content, {2 * DISK / MIB:.0f} MiB in all"
    )
    assert stored < unique + LOST * (2 * DISK - unique)
    assert one["chunks_reused"] + two["chunks_reused"] > 0
    for point, original in [(one["point"], disk), (two["point"], other), (first, earlier)]:
        Child(do="restore", path=world.path, point=point, to=tmp_path / "out.raw").run()
        assert filecmp.cmp(original, tmp_path / "out.raw", shallow=False)
    assert Child(do="check", path=world.path).run()["clean"]


def test_many_small_backups_at_once(tmp_path: Path) -> None:
    """Eight processes, each with its own and with common content; packs are handed on, none is lost."""
    world = FolderWorld(tmp_path / "repo", OPTIONS)
    rounds = 2
    for round_ in range(rounds):
        children = []
        for n in range(8):
            path = tmp_path / f"{n}.raw"
            write_noise(path, 7, 4 * MIB)
            write_noise(path, 100 + 10 * round_ + n, MIB, offset=4 * MIB)
            children.append(Child(do="backup", path=world.path, disk=path, name=f"vm{n}"))
        for child in children:
            child.ready()
        for child in children:
            child.go()
        results = [child.result() for child in children]
        assert all("point" in result for result in results), results
    with world.open() as repository:
        assert len(repository.points()) == 8 * rounds
        assert_clean(repository.check(read_data=True))
        packs = repository._index().packs()
    assert len(packs) < 8 * rounds, "every backup made a pack of its own"
    assert len([row for row in packs if row.state is PackState.OPEN]) <= 8


@pytest.mark.parametrize("kind", [MemoryWorld, FolderWorld])
def test_interleaved_backups_share_what_is_committed(
    kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step: what one has committed the other finds, whatever their order."""
    monkeypatch.setattr("holdfast.repo.session._BATCH_BYTES", 200_000)
    world = kind(tmp_path / "repo", SMALL)
    disk = content(range(1, 161))
    one, two = SteppedBackup(world, "one", disk), SteppedBackup(world, "two", disk)
    while not (one.over and two.over):
        one.step()
        two.step()
    truth = Truth()
    for backup in (one, two):
        truth.points[backup.finish()] = {"disk0.raw": disk}
    with world.open() as repository:
        truth.verify(repository)
        stored = sum(row.live_bytes for row in repository._index().packs())
        dead = sum(row.dead_bytes for row in repository._index().packs())
    print(f"{dead} bytes stored twice, {stored} once")
    assert dead < stored // 3


def test_a_record_that_is_gone_is_stored_again(tmp_path: Path) -> None:
    """Garbage collection takes rows away between the lookup of a session and its commit."""
    world = MemoryWorld(tmp_path / "repo", SMALL)
    disk = content(range(1, 65))
    killed = SteppedBackup(world, "killed", disk)
    killed.step(3)
    killed.kill()
    world.open().backup(machine_of([content([999])], name="other"), ONE_WORKER)  # adopts what it left
    garbage = {record_id for record_id, place in world.index.scan(None, 10**6) if place.kind == 1}
    with world.open() as repository:
        needed = {c for p in repository.points() for c in _chunks(repository, p)}
    garbage -= needed
    assert len(garbage) >= 16
    backup = SteppedBackup(world, "web1", disk)
    backup.step(2)
    with world.open() as repository:
        world.remove_records(repository, garbage)
    point = backup.finish()
    with world.open() as repository:
        truth = Truth()
        truth.points[point] = {"disk0.raw": disk}
        other = next(p for p in repository.points() if p.manifest.vm_name == "other")
        truth.points[other.id.hex()] = {"disk0.raw": content([999])}
        truth.verify(repository)
    assert garbage & {record_id for record_id, place in world.index.scan(None, 10**6)}


def _chunks(repository, point):
    _, trees = repository._reading()
    tree = point.manifest.disks[0].tree
    for _, leaf in trees.data_leaves(tree):
        yield from trees.leaf(leaf, min(tree.segment_bytes, tree.size_bytes)).ids
