"""The command starts quickly: what a command does not need is not imported."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from holdfast.version import VERSION

RUNS = 7
LIMIT_S = 0.2
HEAVY = {"numpy", "rich", "cryptography", "lmdb", "zstandard", "blake3", "paramiko"}


def environment() -> dict[str, str]:
    """The user's: with compiled modules kept, whatever this test run was told."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def cpu_s() -> float:
    """Processor seconds of all ended children, those of their children included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_version_is_printed_in_no_time() -> None:
    command = Path(sys.executable).parent / "holdfast"
    times_s = []
    for _ in range(RUNS):
        started = cpu_s()
        outcome = subprocess.run(
            [command, "version"], env=environment(), capture_output=True, text=True, check=True
        )
        times_s.append(cpu_s() - started)
        assert VERSION in outcome.stdout
    # Processor time, and of the run that was disturbed least: other tests keep the cores busy meanwhile.
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
