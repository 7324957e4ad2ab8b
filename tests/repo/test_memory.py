"""Resident memory of real processes with a disk of 200 GiB, most of it holes.

The short run has some hundred MiB of data in it; the soak run has 4 GiB, as large machines do.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from rig.child import Child
from rig.disks import MIB
from rig.files import write_noise

from holdfast.repo.repository import InitOptions, Repository
from holdfast.units import GIB

DISK = 200 * GIB
LIMIT_KIB = 300_000
WORKERS = 3
"""As on a machine of two cores: every further worker costs a buffer of one segment."""


def spread(path: Path, data_bytes: int, seed: int) -> list[int]:
    """A sparse file with pieces of 1 MiB all over it."""
    rng = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(DISK)
    offsets = sorted(rng.sample(range(0, DISK, MIB), data_bytes // MIB))
    for offset in offsets:
        write_noise(path, offset, MIB, offset=offset)
    return offsets


def same(path: Path, offsets: list[int]) -> bool:
    """Whether the file has the pieces at these places, and holes elsewhere."""
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            if file.read(MIB) != random.Random(offset).randbytes(MIB):
                return False
        allocated = os.fstat(file.fileno()).st_blocks * 512
    return os.path.getsize(path) == DISK and allocated < (len(offsets) + 64) * 2 * MIB


def run(tmp_path: Path, data_bytes: int, seed: int) -> None:
    disk, out, repo = tmp_path / "disk.raw", tmp_path / "out.raw", tmp_path / "repo"
    offsets = spread(disk, data_bytes, seed)
    Repository.init(str(repo), InitOptions(), notify=lambda _m: None).close()
    jobs = [
        ("first backup", {"do": "backup", "disk": disk, "name": "big"}),
        ("second backup", {"do": "backup", "disk": disk, "name": "big"}),
        ("check", {"do": "check", "read_data": False}),
        ("check of all bytes", {"do": "check", "read_data": True}),
        ("restore", {"do": "restore", "point": "big@latest", "to": out}),
    ]
    peaks = {}
    for what, job in jobs:
        said = Child(path=repo, workers=WORKERS, **job).run()
        assert "code" not in said, said
        assert said.get("clean", True), said
        peaks[what] = said["rss_kib"]
        if what == "second backup":
            assert said["chunks_new"] == 0
    print({what: f"{peak // 1024} MiB" for what, peak in peaks.items()})
    assert same(out, offsets)
    assert max(peaks.values()) < LIMIT_KIB, peaks


def test_a_sparse_disk_of_200_gib(tmp_path: Path, seed: int) -> None:
    run(tmp_path, 300 * MIB, seed)


@pytest.mark.soak
def test_a_sparse_disk_of_200_gib_with_4_gib_of_data(tmp_path: Path, seed: int) -> None:
    run(tmp_path, 4 * GIB, seed)
