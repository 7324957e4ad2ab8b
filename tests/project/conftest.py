"""What the tests about the project itself share: its root and the files that git knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[Path]:
    """Every file that git tracks and that is there; those staged but not committed as well."""
    if not (root / ".git").exists():
        pytest.skip("needs git: this is not a clone but an unpacked archive")
    listing = subprocess.run(
        # a clone may belong to someone else than who runs the tests; reading its list of files is safe
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout
    paths = [root / name for name in listing.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]
