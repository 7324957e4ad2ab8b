"""The demo and its ESXi tour hold what they tell: they end with 0 when all is equal, and with 1 when it is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BESIDE_PYTHON = Path(sys.executable).parent
TOUR = (sys.executable, "-m", "demo.esxi_tour")


def run_demo(
    root: Path, place: Path, *first_in_path: Path, command: Sequence[str] = ("demo/run",)
) -> subprocess.CompletedProcess[str]:
    folders = [*map(str, first_in_path), str(BESIDE_PYTHON), os.environ["PATH"]]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PATH": ":".join(folders), "TMPDIR": str(place)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    if not shutil.which("debugfs", path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
        pytest.skip("needs e2fsprogs")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_demo_succeeds_and_leaves_nothing_behind(root: Path, place: Path) -> None:
    outcome = run_demo(root, place)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stdout.count("every file of the VM is equal, byte for byte") == 2
    assert "\x1b" not in outcome.stdout  # colour is for terminals
    assert not list(place.iterdir())


def test_demo_fails_when_restored_bytes_differ(root: Path, place: Path, tmp_path: Path) -> None:
    spoiling = tmp_path / "holdfast"
    spoiling.write_text(
        "#!/bin/sh\n"
        f'"{BESIDE_PYTHON}/holdfast" "$@" || exit\n'
        'if [ "$1" = restore ]; then\n'
        '    printf spoiled | dd of="$5/web1-flat.vmdk" bs=1 seek=123456789 conv=notrunc status=none\n'
        "fi\n",
        encoding="utf-8",
    )
    spoiling.chmod(0o755)
    outcome = run_demo(root, place, tmp_path)
    assert outcome.returncode == 1
    assert "differ" in outcome.stdout + outcome.stderr
    assert not list(place.iterdir())


@pytest.fixture
def host_place(place: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("the stand-in host needs root")
    return place


@pytest.mark.root
def test_tour_succeeds_and_leaves_nothing_behind(root: Path, host_place: Path) -> None:
    outcome = run_demo(root, host_place, command=TOUR)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    if "is left out: " in outcome.stdout:
        pytest.skip(outcome.stdout.strip())
    assert outcome.stdout.count("Images are identical.") == 5
    assert "\x1b" not in outcome.stdout
    assert not list(host_place.iterdir())
    assert str(host_place) not in Path("/proc/mounts").read_text(encoding="utf-8")


@pytest.mark.root
def test_tour_fails_when_the_disk_is_not_as_at_the_snapshot(
    root: Path, host_place: Path, tmp_path: Path
) -> None:
    spoiling = tmp_path / "holdfast"
    spoiling.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = mount ]; then\n'
        "    printf spoiled | dd of=esx/references/1-2-scsi0_0.raw bs=1 seek=12345678 conv=notrunc status=none\n"
        "fi\n"
        f'exec "{BESIDE_PYTHON}/holdfast" "$@"\n',
        encoding="utf-8",
    )
    spoiling.chmod(0o755)
    outcome = run_demo(root, host_place, tmp_path, command=TOUR)
    if "is left out: " in outcome.stdout:
        pytest.skip(outcome.stdout.strip())
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert "Content mismatch" in outcome.stdout
    assert not list(host_place.iterdir())
    assert str(host_place) not in Path("/proc/mounts").read_text(encoding="utf-8")


def test_tour_says_why_it_is_left_out(root: Path, place: Path, tmp_path: Path) -> None:
    """With nothing in PATH it can not go on, as root or not."""
    outcome = subprocess.run(
        [*TOUR], cwd=root, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert re.search(
        r"left out: (it needs root|packages of the system are missing: .*busybox)", outcome.stdout
    )
    assert not list(place.iterdir())
