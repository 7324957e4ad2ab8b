"""The stand-in host is no part of the package: it is imported from the project's root."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.esxi_host import StandIn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A stand-in of release 8.0 with one running VM; tests of a module share it."""
    from tests.esxi_host import StandIn

    with StandIn(tmp_path_factory.mktemp("host") / "esx1") as running:
        running.add_vm("web1", disks=[16 << 20], running=True)
        yield running
