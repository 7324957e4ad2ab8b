"""The demo holds what it tells: it ends with 0 when all is equal, and with 1 when it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BESIDE_PYTHON = Path(sys.executable).parent


def run_demo(root: Path, place: Path, *first_in_path: Path) -> subprocess.CompletedProcess[str]:
    folders = [*map(str, first_in_path), str(BESIDE_PYTHON), os.environ["PATH"]]
    return subprocess.run(
        [root / "demo" / "run"],
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
