"""What the tests of the engine share. The rig (stores that crash, a model of the index, generated disks)
is the package `rig` beside this file.

Random tests take their seed from HOLDFAST_TEST_SEED, or draw one; pytest shows it when a test fails.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile(
    "engine",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("engine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes minutes and gigabytes, unless it is asked for (`make soak`)."""
    if os.environ.get("HOLDFAST_SOAK"):
        return
    soaking = [item for item in items if item.get_closest_marker("soak")]
    if soaking:
        config.hook.pytest_deselected(items=soaking)
        items[:] = [item for item in items if item not in soaking]


@pytest.fixture
def seed() -> int:
    """The seed of this test's random choices."""
    text = os.environ.get("HOLDFAST_TEST_SEED", "")
    chosen = int(text) if text else random.SystemRandom().randrange(2**32)
    print(f"seed: {chosen} (repeat with HOLDFAST_TEST_SEED={chosen})")
    return chosen


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Random choices that one seed repeats."""
    return random.Random(seed)


@pytest.fixture(autouse=True)
def no_index_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is in the repository unless a test says otherwise."""
    monkeypatch.delenv("HOLDFAST_INDEX_DIR", raising=False)


@pytest.fixture(scope="session")
def memory_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory if there is one with room, for tests to which nothing matters but speed."""
    if os.path.isdir("/dev/shm"):
        status = os.statvfs("/dev/shm")
        if status.f_bavail * status.f_frsize > 1 << 30 and os.access("/dev/shm", os.W_OK):
            with tempfile.TemporaryDirectory(prefix="holdfast-test-", dir="/dev/shm") as path:
                yield Path(path)
            return
    yield tmp_path_factory.mktemp("memory")
