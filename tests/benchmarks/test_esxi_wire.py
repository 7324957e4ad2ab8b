"""The benchmark of bytes over the wire counts and proves what it says, on a disk of some megabytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MIB = 1 << 20
pytestmark = [pytest.mark.slow, pytest.mark.root]


def test_a_second_disk_shares_all_but_a_twentieth_of_its_data(tmp_path: Path) -> None:
    from benchmarks.esxi_wire import make_disk

    one, two = tmp_path / "one", tmp_path / "two"
    make_disk(one, 40 * MIB, seed=1)
    make_disk(two, 40 * MIB, seed=2, like=one)
    left, right = one.read_bytes(), two.read_bytes()
    assert len(left) == len(right) == 40 * MIB
    pieces = [(left[at : at + MIB], right[at : at + MIB]) for at in range(0, 40 * MIB, MIB)]
    assert sum(a != bytes(MIB) for a, _ in pieces) == 30
    assert sum(a != b for a, b in pieces) == 1


def test_every_backup_is_counted_and_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("the stand-in host needs root")
    from benchmarks.esxi_wire import measure, section

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    result = measure(tmp_path, 16 * MIB, 1)
    wire = {(moved["name"], moved["via"]): moved["wire_bytes"] for moved in result["moved"]}
    assert wire["unchanged", "agent"] < wire["1 % changed", "agent"] < wire["first", "agent"]
    assert wire["second VM", "agent"] < wire["first", "agent"]
    assert wire["first", "stream"] > 16 * MIB
    assert "unchanged | agent" in "\n".join(section([result]))
