"""The rig of the failure matrix itself: it must lose what a power cut loses, and see every change of a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.matrix import Driver, in_child
from rig.tripwire import Fault, Tripwire

Act = Callable[[Path], None]


def struck(tmp_path: Path, act: Act, fault: Fault, *, seed: int = 0) -> tuple[dict[str, bytes], list[str]]:
    """What is left of a folder in which `act` was at work when the fault struck at its last step; and the steps."""
    found: list[list[str]] = []
    for number, wanted in enumerate((None, fault)):
        root, cut = tmp_path / f"{number}" / "repo", tmp_path / f"{number}-cut"
        root.mkdir(parents=True)
        (root / "old").write_bytes(b"old")

        def run(root: Path = root, cut: Path = cut, wanted: Fault | None = wanted) -> list[str]:
            wire = Tripwire(str(root), len(found[0]) if found else 0, wanted, str(cut), seed)
            wire.install()
            act(root)
            return [step for step, _ in wire.log]

        ended_by, answer = in_child(run, tmp_path / "stderr")
        assert ended_by == (signal.SIGKILL if wanted else 0), (tmp_path / "stderr").read_text()
        if not wanted:
            assert "value" in answer, answer
            found.append(answer["value"])
    left = cut / "repo" if fault in (Fault.POWER_NOTHING, Fault.POWER_ANYTHING) else root
    return {
        str(path.relative_to(left)): path.read_bytes() for path in left.rglob("*") if path.is_file()
    }, found[0]


def put(path: Path, data: bytes, *, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, data)
    if sync:
        os.fsync(fd)
    os.close(fd)


def sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def write_nothing_synced(root: Path) -> None:
    put(root / "new", b"new", sync=False)


def write_without_the_name(root: Path) -> None:
    put(root / "new", b"new", sync=True)


def write_the_name_alone(root: Path) -> None:
    put(root / "new", b"new", sync=False)
    sync(root)


def write_all_synced(root: Path) -> None:
    put(root / "new", b"new", sync=True)
    sync(root)


def replace_unsynced(root: Path) -> None:
    put(root / "new", b"new", sync=True)
    os.replace(root / "new", root / "old")


def replace_synced(root: Path) -> None:
    replace_unsynced(root)
    sync(root)


def remove_unsynced(root: Path) -> None:
    os.unlink(root / "old")


def remove_synced(root: Path) -> None:
    os.unlink(root / "old")
    sync(root)


@pytest.mark.parametrize(
    ("act", "left"),
    [
        (write_nothing_synced, {"old": b"old"}),
        (write_without_the_name, {"old": b"old"}),
        (write_the_name_alone, {"old": b"old", "new": b""}),
        (write_all_synced, {"old": b"old", "new": b"new"}),
        (replace_unsynced, {"old": b"old"}),
        (replace_synced, {"old": b"new"}),
        (remove_unsynced, {"old": b"old"}),
        (remove_synced, {}),
    ],
)
def test_a_power_cut_takes_what_was_not_synced(tmp_path: Path, act: Act, left: dict[str, bytes]) -> None:
    assert struck(tmp_path, act, Fault.POWER_NOTHING)[0] == left


def test_a_power_cut_may_leave_anything_of_it(tmp_path: Path) -> None:
    seen = set()
    for seed in range(24):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        seen.add(
            tuple(sorted(struck(folder, write_nothing_synced, Fault.POWER_ANYTHING, seed=seed)[0].items()))
        )
    assert (("old", b"old"),) in seen
    assert (("new", b"new"), ("old", b"old")) in seen
    assert (("new", b""), ("old", b"old")) in seen


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        (Fault.KILL_BEFORE, {"old": b"old", "new": b""}),
        (Fault.KILL_AMID, {"old": b"old", "new": b"ne"}),
        (Fault.KILL_AFTER, {"old": b"old", "new": b"new"}),
    ],
)
def test_a_kill_leaves_all_that_was_written(tmp_path: Path, fault: Fault, left: dict[str, bytes]) -> None:
    found, steps = struck(tmp_path, write_nothing_synced, fault)
    assert found == left
    assert steps == ["create new", "write new"]


def test_the_matrix_sees_a_sync_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be worth nothing if an engine that syncs too little got through."""
    monkeypatch.setattr("holdfast.repo.packs._LocalPackWriter.sync", lambda writer: writer._appender.drain())
    driver = Driver(tmp_path, "backup")
    cuts = [i for i in driver.instants(every=True) if i.fault is Fault.POWER_NOTHING]
    assert any(driver.run(instant).wrong for instant in cuts[-6:])


def test_a_change_that_no_step_knows_of_is_noticed(tmp_path: Path) -> None:
    def run() -> list[str]:
        root = tmp_path / "repo"
        root.mkdir()
        wire = Tripwire(str(root))
        wire.install()
        os.symlink("somewhere", root / "link")
        with open(root / "log", "a") as file:
            file.write("x")
        return wire.missed

    ended_by, answer = in_child(run, tmp_path / "stderr")
    assert not ended_by
    assert len(answer["value"]) == 2, answer
