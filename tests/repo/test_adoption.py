"""Packs whose writer or collector is gone are taken over, however often that is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, Truth, assert_clean
from rig.faults import Crash, CrashAt, Faults, When

from holdfast.repo.gc import CollectOptions


def crash_after(name: str) -> Faults:
    return Faults(lambda _number, now: CrashAt(When.AFTER) if now == name else None)


def test_what_is_counted_before_an_adoption_is_cut_off_is_not_counted_again(tmp_path: Path) -> None:
    """The pack that a collection has copied, and not yet deleted, holds what is dead there: its records are elsewhere."""
    world, truth = FolderWorld(tmp_path / "repo", SMALL), Truth()
    with world.open() as repository:
        truth.backup(repository, [content([1, 2, 3])])
        first = repository.points()[0]
        truth.backup(repository, [content([4, 5, 6, 7])])
        repository.forget([first])
        del truth.points[first.id.hex()]
    for work, name in (("collect", "remove_pack"), ("back up", "commit")):
        faults = crash_after(name)
        repository = world.open(faults)
        with pytest.raises(Crash):
            if work == "collect":
                repository.collect(CollectOptions(compact_below=1.0))
            else:
                repository.backup(machine_of([content([8])]), ONE_WORKER)
        world.kill(repository, faults)
    with world.open() as repository:
        truth.backup(repository, [content([9])])
        truth.verify(repository)
        rows = repository._index().packs()
        assert len(rows) > 1
        for row in rows:
            assert 64 + row.live_bytes + row.dead_bytes <= (world.store.length(row.id) or 0)
        assert_clean(repository.check(read_data=True))
