"""A repository on another host, from end to end: real commands, and a real `holdfast serve` over pipes."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import LinkError
from holdfast.repo.repository import Repository


def far_command(*options: str) -> str:
    return " ".join([sys.executable, "-m", "holdfast", "serve", "--stdio", *options])


@pytest.fixture
def run(holdfast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command in this process; its far side is another process of this machine."""
    program = tmp_path / "rsh"
    program.write_text('#!/bin/sh\nexec sh -c "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("HOLDFAST_RSH", str(program))

    def call(*words: object, code: int = 0, far: str = "", password: str = "") -> Any:
        monkeypatch.setenv("HOLDFAST_REMOTE_COMMAND", far or far_command())
        monkeypatch.setenv("HOLDFAST_PASSWORD", password)
        outcome = holdfast(*words)
        assert outcome.code == code, outcome.err
        return outcome

    return call


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "web1.raw"
    path.write_bytes(random.Random(1).randbytes(3_000_000) + bytes(40 << 20) + b"end")
    return path


def far(folder: Path) -> str:
    return f"ssh://far.example{folder}"


@pytest.mark.parametrize("encryption", ["none", "aes256-gcm"])
def test_a_disk_goes_over_and_comes_back(run, tmp_path: Path, disk: Path, encryption: str) -> None:
    there = far(tmp_path / "repo")
    settings = {"password": "secret"}
    run("-r", there, "init", "--encryption", encryption, **settings)
    run("-r", there, "backup", disk, **settings)
    with disk.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"changed")
    run("-r", there, "backup", disk, **settings)
    assert run("-r", there, "list", **settings).out.count("web1") == 2
    run("-r", there, "restore", "web1@latest", tmp_path / "out", **settings)
    assert (tmp_path / "out").read_bytes() == disk.read_bytes()
    run("-r", there, "check", "--read-data", **settings)
    run("-r", there, "prune", "--keep-last", "1", **settings)
    run("-r", there, "gc", **settings)
    # and it is a repository like any other, over there
    run("-r", tmp_path / "repo", "check", "--read-data", **settings)
    run("-r", tmp_path / "repo", "restore", "web1@latest", tmp_path / "again", **settings)
    assert (tmp_path / "again").read_bytes() == disk.read_bytes()


def test_a_lost_index_is_made_anew_from_afar(run, tmp_path: Path, disk: Path) -> None:
    there = far(tmp_path / "repo")
    run("-r", there, "init", "--encryption", "aes256-gcm", password="x")
    run("-r", there, "backup", disk, password="x")
    for path in (tmp_path / "repo" / "index").iterdir():
        path.unlink()
    assert "rebuilt" in run("-r", there, "list", password="x").err
    run("-r", there, "check", "--read-data", password="x")
    run("-r", there, "check", "--rebuild-index", password="x")
    run("-r", tmp_path / "repo", "check", "--read-data", password="x")


def test_keys_are_changed_from_afar(run, tmp_path: Path) -> None:
    there = far(tmp_path / "repo")
    run("-r", there, "init", "--encryption", "aes256-gcm", password="old")
    (tmp_path / "new").write_text("new\n")
    run("-r", there, "key", "change-password", "--new-password-file", tmp_path / "new", password="old")
    run("-r", there, "list", password="old", code=12)
    run("-r", there, "list", password="new")


def test_what_is_missing_over_there_is_said(run, tmp_path: Path) -> None:
    there = far(tmp_path / "repo")
    assert "does not exist" in run("-r", there, "list", code=10).err
    assert "install Holdfast" in run("-r", there, "list", far="holdfast-is-not-here", code=55).err
    noisy = run("-r", there, "list", far="echo Welcome to this fine machine", code=58).err
    assert "Welcome to this fine machine" in noisy
    assert "loads of words" in run("-r", there, "list", far="echo loads of words >&2; exit 3", code=57).err


def test_restricted_far_sides_refuse(run, tmp_path: Path, disk: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    restricted = far_command("--restrict", str(inside))
    run("-r", far(inside / "repo"), "init", far=restricted)
    run("-r", far(outside), "init", far=restricted, code=32)
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    run("-r", far(inside / "link" / "repo"), "init", far=restricted, code=32)
    run("-r", far(inside / ".." / "outside" / "repo"), "init", far=restricted, code=32)
    assert not list(outside.iterdir())
    add = far_command("--append-only")
    run("-r", far(inside / "repo"), "backup", disk, far=add)
    run("-r", far(inside / "repo"), "backup", disk, far=add)
    for words in (["forget", "web1@latest"], ["gc"], ["pin", "web1@latest"], ["check", "--rebuild-index"]):
        assert "append-only" in run("-r", far(inside / "repo"), *words, far=add, code=32).err
    read = far_command("--read-only")
    run("-r", far(inside / "repo"), "restore", "web1@latest", tmp_path / "out", far=read)
    assert "--read-only" in run("-r", far(inside / "repo"), "backup", disk, far=read, code=32).err
    run("-r", far(inside / "repo"), "check", "--read-data", far=read)
    run("-r", inside / "repo", "check", "--read-data")


def test_a_repository_is_let_go_of_for_a_fork_and_taken_up_again(run, tmp_path: Path, disk: Path) -> None:
    there = far(tmp_path / "repo")
    run("-r", there, "init", "--encryption", "aes256-gcm", password="x")
    run("-r", there, "backup", disk, password="x")
    asked = []
    with Repository.open(there, password=lambda: asked.append(1) or "x") as repository:
        before = repository.points()
        repository.detach()
        with pytest.raises(LinkError):
            repository.points()
        repository.attach()
        assert repository.points() == before
        assert len(asked) == 1  # the keys have stayed
        repository.detach()


def test_a_slow_link_carries_little_for_an_unchanged_disk(
    run, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, log = far(tmp_path / "repo"), tmp_path / "log"
    program = Path(__file__).parent.parent / "repo" / "rig" / "slow_link.py"
    monkeypatch.setenv("HOLDFAST_RSH", f"{sys.executable} {program} 25 0 {log}")
    run("-r", there, "init")
    run("-r", there, "backup", disk)
    assert sum(map(int, log.read_text().split())) > 3_000_000
    run("-r", there, "backup", disk)
    assert sum(map(int, log.read_text().split())) < 64 << 10


@pytest.mark.parametrize("rights", ["", "--append-only"])
def test_several_connections_share_the_far_sides_rate_and_rights(
    run, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, rights: str
) -> None:
    starts = tmp_path / "starts"
    program = tmp_path / "counting"
    program.write_text(f"#!/bin/sh\necho >> '{starts}'\nexec sh -c \"$2\"\n")
    program.chmod(0o755)
    repo = tmp_path / "repo"
    run("-r", repo, "init")
    monkeypatch.setenv("HOLDFAST_RSH", str(program))
    monkeypatch.setenv("HOLDFAST_CONNECTIONS", "3")
    limited = far_command("--max-rate", "2MiB/s", "--restrict", str(tmp_path), *rights.split())
    began_s = time.monotonic()
    run("-r", far(repo), "backup", disk, far=limited)
    assert time.monotonic() - began_s > 1.2, "3 MB have passed faster than at 2 MiB/s"
    assert len(starts.read_text()) == 3
    monkeypatch.delenv("HOLDFAST_CONNECTIONS")
    run("-r", repo, "check", "--read-data")
    run("-r", repo, "restore", "web1@latest", tmp_path / "back.raw", "--as", "raw")
    assert (tmp_path / "back.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_replication_over_several_connections(run, tmp_path: Path, disk: Path, parallel: int) -> None:
    here, there, back = (tmp_path / name for name in ("here", "there", "back"))
    run("-r", here, "init")
    run("-r", here, "backup", disk)
    for folder in (there, back):
        run("-r", folder, "init", "--like", here)
    run("-r", here, "replicate", "--to", far(there), "--parallel", parallel, "--verify")
    run("-r", back, "replicate", "--from", far(there), "--parallel", parallel, "--verify")
    run("-r", back, "restore", "web1@latest", tmp_path / "back.raw", "--as", "raw")
    assert (tmp_path / "back.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("said", ["0", "17", "-1", "many", "1.5", "\u0663"])
def test_a_number_of_connections_that_can_not_be(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    run("-r", tmp_path / "repo", "init")
    monkeypatch.setenv("HOLDFAST_CONNECTIONS", said)
    assert said in run("-r", far(tmp_path / "repo"), "list", code=2).err


def test_more_connections_than_there_may_be(run, tmp_path: Path) -> None:
    for name in ("here", "there"):
        run("-r", tmp_path / name, "init")
    words = ("-r", tmp_path / "here", "replicate", "--to", far(tmp_path / "there"), "--parallel")
    assert "1 to 16" in run(*words, 17, code=2).err
    run(*words, 0, code=2)
