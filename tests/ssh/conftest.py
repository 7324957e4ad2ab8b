"""What the tests of `holdfast.ssh` share: servers, and both kinds of links."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "repo"))  # `rig` makes disks

from tests.ssh.sshd import Sshd  # noqa: E402


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A server that all tests of a process share; nobody may break it for the others."""
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def own_sshd(tmp_path: Path) -> Iterator[Sshd]:
    """A server of one test's own, to drop connections or change its keys."""
    with Sshd(tmp_path / "sshd") as server:
        yield server


@pytest.fixture(scope="session")
def esxi_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A server with the methods of ESXi 8, shared like `sshd`."""
    with Sshd(tmp_path_factory.mktemp("esxi"), esxi_like=True) as server:
        yield server
