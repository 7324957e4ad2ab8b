"""The rig itself works: both worlds take a backup and give it back."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig.disks import content
from rig.engine import FolderWorld, MemoryWorld, Truth


@pytest.mark.parametrize("kind", [MemoryWorld, FolderWorld])
def test_a_world_takes_a_backup_and_gives_it_back(kind, tmp_path: Path) -> None:
    world = kind(tmp_path / "repo")
    truth = Truth()
    with world.open() as repository:
        truth.backup(repository, [content([1, 2, 0, 0, 3] * 8)])
        truth.verify(repository)
    world.drop_index()
    with world.open() as repository:
        truth.verify(repository)
        truth.backup(repository, [content([1, 2, 4, 0, 3] * 8, b"tail")])
        truth.verify(repository)
