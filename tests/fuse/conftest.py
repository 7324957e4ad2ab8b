"""Restore points out of nothing for the view; real repositories, and real mounts of them by the real command.

What they are made of is in the module `fuserig` beside this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuserig import Holdfast, MemoryLibrary, Mount, MountIt, describe, patterned, write_sparse

from holdfast.fuse.mountpoint import mounted_at
from holdfast.fuse.reading import ReadAhead
from holdfast.fuse.view import View


@pytest.fixture
def library() -> MemoryLibrary:
    return MemoryLibrary()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    made = ReadAhead(2, 64 << 20)
    made.start()
    yield made
    made.close()


@pytest.fixture
def view(library: MemoryLibrary, log: list[str], ahead: ReadAhead) -> View:
    return View(library, describe, ahead, log.append)


@pytest.fixture(autouse=True)
def no_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's environment or configuration reaches a test."""
    for name in list(os.environ):
        if name.startswith("HOLDFAST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))


@pytest.fixture
def holdfast() -> Holdfast:
    """Runs a real command."""

    def call(*words: object, check: bool = True, **others: object) -> subprocess.CompletedProcess[str]:
        outcome = subprocess.run(
            [sys.executable, "-m", "holdfast", *map(str, words)],
            check=False, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, **others,
        )  # fmt: skip
        assert not check or outcome.returncode == 0, outcome.stderr
        assert "Traceback" not in outcome.stderr
        return outcome

    return call


@pytest.fixture
def mount(tmp_path: Path, holdfast: Holdfast) -> Iterator[MountIt]:
    """Mounts a repository with the real command; what is still mounted at the end is unmounted."""
    places: list[Path] = []

    def call(repo: Path, *options: object, name: str = "mounted", **others: object) -> Mount:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        places.append(place)
        holdfast("-r", repo, "mount", place, *options, **others)
        return Mount(place, holdfast)

    yield call
    for place in places:
        if mounted_at(str(place)) is not None:
            outcome = holdfast("umount", place, check=False)
            if outcome.returncode != 0:
                subprocess.run(["umount", "--lazy", place], check=False)
                raise AssertionError(outcome.stderr)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two states of a disk of 24 MiB, `day1.raw` and `day2.raw`, and one of an odd length, `odd.raw`."""
    folder = tmp_path_factory.mktemp("images")
    first = bytearray(patterned(24 << 20, 1))
    write_sparse(folder / "day1.raw", bytes(first))
    first[17 << 20 : 18 << 20] = patterned(1 << 20, 2)
    write_sparse(folder / "day2.raw", bytes(first))
    write_sparse(folder / "odd.raw", patterned((17 << 20) + 1234, 3))
    return folder
