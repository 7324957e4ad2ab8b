"""`init` that did not get through: the next one takes over what it has left, and nothing else."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, assert_clean, quiet

from holdfast.errors import RepositoryExists, UsageError
from holdfast.repo import keys
from holdfast.repo.repository import InitOptions, Repository

LEFT = {
    "an empty folder": [],
    "packs/": ["packs/"],
    "a part of the readme": ["packs/", "README.txt"],
    "an unfinished copy": ["packs/", "README.txt", ".config.json.copy.4711"],
}


def lay_out(path: Path, names: list[str]) -> None:
    path.mkdir()
    for name in names:
        if name.endswith("/"):
            (path / name).mkdir()
        else:
            (path / name).write_text("{")


@pytest.mark.parametrize("left", LEFT)
def test_it_is_taken_up_again(tmp_path: Path, left: str) -> None:
    lay_out(tmp_path / "repo", LEFT[left])
    with Repository.init(str(tmp_path / "repo"), SMALL, notify=quiet) as repository:
        repository.backup(machine_of([content([1, 2, 3])]), ONE_WORKER)
        assert_clean(repository.check(read_data=True))
    assert sorted(os.listdir(tmp_path / "repo")) == [
        "README.txt", "config.json", "config.json.copy", "index", "packs",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["packs/ab/", "packs/x", "letter.txt", "config.json", "config.json.copy", "index/", ".config.json.x"],
)
def test_what_may_be_of_use_to_somebody_is_left_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "repo"
    lay_out(path, ["packs/", "README.txt", name])
    before = sorted(path.rglob("*"))
    with pytest.raises(RepositoryExists):
        Repository.init(str(path), SMALL, notify=quiet)
    assert sorted(path.rglob("*")) == before


def test_of_several_at_once_one_gets_through(tmp_path: Path) -> None:
    path = str(tmp_path / "repo")
    outcomes: list[str] = []

    def init() -> None:
        try:
            Repository.init(path, SMALL, notify=quiet).close()
            outcomes.append("done")
        except RepositoryExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=init) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["done", *["exists"] * 5]
    with Repository.open(path, notify=quiet) as repository:
        repository.backup(machine_of([content([1, 2, 3])]), ONE_WORKER)
        assert_clean(repository.check(read_data=True))


def test_a_key_that_a_killed_command_was_about_to_add_goes_with_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password that is removed must open nothing that is left in the folder."""
    monkeypatch.setattr(keys, "SCRYPT_N", 16)
    path = tmp_path / "repo"
    options = replace(SMALL, cipher="aes256-gcm")
    with Repository.init(str(path), options, password="one", notify=quiet) as repository:
        slot = repository.add_key("two", "second")
        unfinished = [path / ".config.json.1", path / ".config.json.copy.99999"]
        for file in unfinished:
            file.write_bytes((path / "config.json").read_bytes())
        repository.remove_key(slot.id)
    assert not any(file.exists() for file in unfinished)


@pytest.mark.parametrize(
    "options",
    [
        InitOptions(segment_bytes=256 << 10),
        InitOptions(segment_bytes=3 << 20),
        InitOptions(pack_bytes=1000),
        InitOptions(compression_level=30),
    ],
)
def test_what_could_not_be_opened_again_is_not_made(tmp_path: Path, options: InitOptions) -> None:
    with pytest.raises(UsageError, match="no repository can be made with these options"):
        Repository.init(str(tmp_path / "repo"), options)
    assert not (tmp_path / "repo").exists()
