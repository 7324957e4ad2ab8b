"""The layers of the package: imports go one way, as pyproject.toml declares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_import_contracts_are_kept(root: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "lint-imports"
    outcome = subprocess.run(
        [command, "--cache-dir", tmp_path], cwd=root, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "0 broken" in outcome.stdout
