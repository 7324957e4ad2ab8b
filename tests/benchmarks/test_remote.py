"""The benchmark of repositories on other hosts proves what it measures, with an image of some megabytes."""

from __future__ import annotations

from pathlib import Path

import pytest

MIB = 1 << 20
pytestmark = pytest.mark.slow


def test_everything_that_arrives_is_proven_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.remote import Moved, measure, section

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = measure(tmp_path, 4 * MIB, runs=1, points=50, clients=2, rates=(20_000_000,))
    moved = [Moved(**each) for each in result["moved"]]
    assert {each.what for each in moved} == {"copy-there", "copy-here", "push", "pull", "backup"}
    assert all(each.data_bytes >= 4 * MIB for each in moved)
    assert all(each.wire_bytes > each.data_bytes for each in moved if each.link_bytes_per_s)
    assert result["unchanged"]["points"] == 50
    assert 0 < result["unchanged"]["wire_bytes"] < 64 << 10
    text = "\n".join(section([result]))
    assert "| 20 MB/s | push |" in text
    assert "2 clients at once" in text
