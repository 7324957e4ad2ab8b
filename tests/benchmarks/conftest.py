"""The benchmarks are no part of the package: they are imported from the project's root."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three images of the smallest size."""
    from benchmarks.guests import SIZES, make_guests

    folder = tmp_path_factory.mktemp("guests")
    make_guests(str(folder), SIZES["tiny"], seed=7)
    return folder


@pytest.fixture(scope="session")
def program() -> str:
    """The command line of Holdfast in this environment."""
    return str(Path(sys.executable).parent / "holdfast")
