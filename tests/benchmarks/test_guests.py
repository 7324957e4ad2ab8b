"""The generated guests: real file systems, and a second day that is a change of the first."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.guests import BLOCK_BYTES, DAY_0, DAY_1, OTHER, PAGE_BYTES, SIZES


def debugfs(image: Path, command: str) -> bytes:
    return subprocess.run(["debugfs", "-R", command, image], check=True, capture_output=True).stdout


def blocks(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]


def test_all_three_are_clean_file_systems(guests: Path) -> None:
    for name in (DAY_0, DAY_1, OTHER):
        done = subprocess.run(["e2fsck", "-f", "-n", guests / name], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout


def test_day_1_overwrites_pages_of_databases_in_place(guests: Path) -> None:
    size = SIZES["tiny"]
    per_page = PAGE_BYTES // BLOCK_BYTES
    for path in ("/var/lib/db/random.dat", "/var/lib/db/rows.dat"):
        assert debugfs(guests / DAY_0, f"blocks {path}") == debugfs(guests / DAY_1, f"blocks {path}")
        before, after = debugfs(guests / DAY_0, f"cat {path}"), debugfs(guests / DAY_1, f"cat {path}")
        assert len(before) == len(after) == size.database
        changed = [
            at
            for at in range(0, len(before), PAGE_BYTES)
            if before[at : at + PAGE_BYTES] != after[at : at + PAGE_BYTES]
        ]
        assert len(changed) == size.pages
        assert per_page == 2


def test_day_1_rotates_the_log_and_brings_files(guests: Path) -> None:
    old = debugfs(guests / DAY_0, "cat /var/log/app.log")
    assert debugfs(guests / DAY_1, "cat /var/log/app.log.1") == old
    new = debugfs(guests / DAY_1, "cat /var/log/app.log")
    assert len(new) == len(old) == SIZES["tiny"].log
    assert new != old
    assert b"day1" in debugfs(guests / DAY_1, "ls /opt")
    assert b"day1" not in debugfs(guests / DAY_0, "ls /opt")


def test_machines_share_software_and_days_share_most(guests: Path) -> None:
    day0, day1, other = (set(blocks(guests / name)) for name in (DAY_0, DAY_1, OTHER))
    shared = SIZES["tiny"].shared / BLOCK_BYTES
    assert len(day0 & day1) > 0.9 * len(day0)
    assert len(day0 & other) > 0.5 * shared
    assert len(other - day0) > 0.5 * SIZES["tiny"].own / BLOCK_BYTES
