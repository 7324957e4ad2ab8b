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


def imported_by(*words: object) -> set[str]:
    """The modules that a command imports."""
    command = Path(sys.executable).parent / "holdfast"
    outcome = subprocess.run(
        [sys.executable, "-X", "importtime", command, *map(str, words)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}


def test_version_imports_none_of_the_heavy_libraries() -> None:
    imported = imported_by("version")
    assert "holdfast.cli.entry" in imported
    assert not HEAVY & imported


def test_a_far_side_imports_only_what_serves() -> None:
    imported = imported_by("serve", "--stdio")
    assert "holdfast.repo.wire.far" in imported
    assert not {"numpy", "rich", "cryptography", "paramiko", "subprocess"} & imported
    assert not {
        name
        for name in imported
        if name.startswith(("holdfast.chunker", "holdfast.esxi", "holdfast.ssh.link"))
    }
    assert not {"holdfast.repo.backup", "holdfast.repo.repository", "holdfast.repo.wire.near"} & imported


def test_a_backup_of_files_imports_nothing_for_hosts(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    repository = tmp_path / "repository"
    imported_by("-r", repository, "init")
    imported = imported_by("-r", repository, "backup", disk)
    assert "holdfast.repo.backup" in imported
    assert not {"rich", "cryptography", "paramiko", "asyncio", "ssl", "holdfast.esxi.host"} & imported


def test_a_replication_without_anything_to_do_imports_no_numpy(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        imported_by("-r", path, "init")
    imported = imported_by("-r", one, "replicate", "--to", other)
    assert "holdfast.repo.replicate" in imported
    assert not HEAVY - {"lmdb", "zstandard", "blake3"} & imported
