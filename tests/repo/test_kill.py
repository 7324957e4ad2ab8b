"""Real processes, really killed (SIGKILL) at random instants of a backup.

After each kill nothing listed is damaged, the next backup gets through, and over all runs no chunk is stored
twice: what killed runs had written is found again. How often a kill landed within the backup is counted; if
too few did, nothing was shown and the test fails.
"""

from __future__ import annotations

import filecmp
import os
import random
from pathlib import Path

import blake3
import pytest
from rig.child import Child
from rig.disks import MIB
from rig.engine import FolderWorld, Truth, assert_clean, chunk_copies, restored
from rig.files import write_noise

from holdfast.repo.repository import InitOptions, Repository

KILLS = 50 if os.environ.get("HOLDFAST_SOAK") else 12
DISK = 48 * MIB
CHANGE = 20 * MIB
OPTIONS = InitOptions(chunker="fixed", chunk_size_bytes=64 << 10, segment_bytes=MIB, pack_bytes=8 * MIB)


@pytest.fixture
def disk(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "disk.raw"
    write_noise(path, seed, DISK // 2)
    os.truncate(path, DISK)
    return path


def digest(path: Path) -> str:
    return blake3.blake3(path.read_bytes()).hexdigest()


def test_killed_backups(tmp_path: Path, disk: Path, rng: random.Random) -> None:
    world = FolderWorld(tmp_path / "repo", OPTIONS)
    Child(do="backup", path=world.path, disk=disk, name="web1").run()
    expected: dict[str, str] = {}
    with world.open() as repository:
        expected[repository.points()[0].id.hex()] = digest(disk)
    states = set(expected.values())
    landed = saved_chunks = 0
    typical_s = 0.5
    for number in range(KILLS):
        write_noise(disk, rng.randrange(2**40), CHANGE, offset=rng.randrange(0, DISK - CHANGE, MIB))
        job = {"path": world.path, "disk": disk, "name": "web1"}
        if rng.random() < 0.5:
            job["batch_bytes"] = 2 * MIB  # many commits
        victim = Child(do="backup", **job)
        victim.ready()
        victim.go()
        killed = victim.kill_after(rng.uniform(0.02, 1.0) * typical_s)
        landed += killed
        with world.open() as repository:
            listed = {point.id.hex() for point in repository.points()}
            assert expected.keys() <= listed
            assert_clean(repository.check(read_data=True))
        # A backup of a killed process may have got as far as its point; then it must be complete.
        finished = Child(do="backup", **job).run()
        typical_s = 0.5 * typical_s + 0.5 * finished["seconds"]
        fresh = CHANGE // (64 << 10)
        saved_chunks += fresh - finished["chunks_new"] if killed else 0
        expected[finished["point"]] = digest(disk)
        states.add(digest(disk))
        with world.open() as repository:
            for point in repository.points():
                if point.id.hex() == finished["point"] or number == KILLS - 1:
                    found = blake3.blake3(restored(repository, point)["disk0.raw"]).hexdigest()
                    assert found in states, f"run {number}"
                    assert found == expected.setdefault(point.id.hex(), found), f"run {number}"
    with world.open() as repository:
        assert_clean(repository.check(read_data=True))
    copies = chunk_copies(world.store)
    twice = sum(count - 1 for count in copies.values())
    print(
        f"{landed} of {KILLS} kills landed; {saved_chunks} chunks of killed runs found again; {twice} stored twice"
    )
    assert landed >= KILLS // 2, "hardly any kill landed within a backup: nothing was shown"
    assert saved_chunks > 100, "nothing of what killed runs had stored was used again"
    assert twice <= len(copies) // 20  # on a busy machine a killed writer's lock may outlive it for a moment


def test_a_restore_that_is_killed_leaves_the_repository_alone(
    tmp_path: Path, disk: Path, rng: random.Random
) -> None:
    world = FolderWorld(tmp_path / "repo", OPTIONS)
    point = Child(do="backup", path=world.path, disk=disk, name="web1").run()["point"]
    for _ in range(20):  # until one was killed amid its work
        victim = Child(do="restore", path=world.path, point=point, to=tmp_path / "out.raw")
        victim.ready()
        victim.go()
        victim.kill_after(rng.uniform(0.0, 0.15))
        with world.open() as repository:
            if repository._index().sessions():
                break
    Child(do="restore", path=world.path, point=point, to=tmp_path / "out.raw").run()
    assert filecmp.cmp(disk, tmp_path / "out.raw", shallow=False)
    with world.open() as repository:
        assert_clean(repository.check(read_data=True))
        assert len(repository._index().sessions()) >= 1, "killed restores leave their sessions to expire"


def test_an_index_is_rebuilt_after_its_rebuild_was_killed(
    tmp_path: Path, disk: Path, rng: random.Random
) -> None:
    world = FolderWorld(tmp_path / "repo", OPTIONS)
    truth = Truth()
    with world.open() as repository:
        for n in range(3):
            truth.backup(repository, [os.urandom(8 * MIB)], name=f"vm{n}")
    landed = 0
    for _ in range(6):
        world.drop_index()
        victim = Child(do="list", path=world.path, open=False)
        victim.ready()
        victim.go()
        landed += victim.kill_after(rng.uniform(0.0, 0.06))
        with Repository.open(world.path, notify=lambda _m: None) as repository:
            truth.verify(repository)
        left = [name for name in os.listdir(world.path) if name.startswith("index.")]
        assert not left, "what a killed rebuild has left is never removed"
    assert landed
