"""The command starts quickly: what a command does not need is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from holdfast.version import VERSION

RUNS = 7
LIMIT_S = 0.2
HEAVY = {"numpy", "rich", "cryptography", "lmdb", "zstandard", "blake3"}


def environment() -> dict[str, str]:
    """The user's: with compiled modules kept, whatever this test run was told."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_version_is_printed_in_no_time() -> None:
    command = Path(sys.executable).parent / "holdfast"
    times_s = []
    for _ in range(RUNS):
        started = time.perf_counter()
        outcome = subprocess.run(
            [command, "version"], env=environment(), capture_output=True, text=True, check=True
        )
        times_s.append(time.perf_counter() - started)
        assert VERSION in outcome.stdout
    # the fastest run is the one that other work on this machine disturbed least
    assert min(times_s) < LIMIT_S


def test_version_imports_none_of_the_heavy_libraries() -> None:
    command = Path(sys.executable).parent / "holdfast"
    outcome = subprocess.run(
        [sys.executable, "-X", "importtime", command, "version"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}
    assert "holdfast.cli.entry" in imported
    assert not HEAVY & imported
