"""What the tests of guests' file systems share; images are made by `guestrig`, beside this file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from guestrig import make_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "root")


@pytest.fixture(scope="session")
def tools() -> Callable[..., None]:
    """Skips the test unless these programs are there."""

    def need(package: str, *programs: str) -> None:
        for program in programs:
            if shutil.which(program) is None:
                pytest.skip(f"{program} (Debian package {package}) is missing")

    return need
