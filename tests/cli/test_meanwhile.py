"""What a command imports while it waits for another host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli.meanwhile import imported_meanwhile, reached_meanwhile
from holdfast.errors import FarSideEnded, UsageError
from holdfast.repo.repository import Repository

NAME = "imported_in_a_test"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that can be imported, and is forgotten after the test."""
    path = tmp_path / f"{NAME}.py"
    path.write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return path


@pytest.mark.parametrize("addresses", [("/repo", "ssh://nas/repo"), ("nas:22:/repo", None)])
def test_it_is_there_behind_the_wait_for_another_host(addresses: tuple[str | None, ...]) -> None:
    with imported_meanwhile([NAME], *addresses):
        pass
    assert sys.modules.pop(NAME).VALUE == 7


@pytest.mark.parametrize("addresses", [("/repo", "other/repo"), ("", None)])
def test_nothing_is_imported_where_nobody_waits(addresses: tuple[str | None, ...]) -> None:
    with imported_meanwhile([NAME], *addresses):
        pass
    assert NAME not in sys.modules


def test_no_module_is_nothing_to_import() -> None:
    with imported_meanwhile([], "ssh://nas/repo"):
        pass


def test_a_module_that_fails_is_left_to_whoever_needs_it(module: Path) -> None:
    module.write_text("raise RuntimeError('no')\n")
    with imported_meanwhile([NAME], "ssh://nas/repo"):
        pass
    assert NAME not in sys.modules


def test_an_error_within_is_passed_on_when_the_import_is_over() -> None:
    with pytest.raises(UsageError, match="the wait"), imported_meanwhile([NAME], "ssh://nas/repo"):
        raise UsageError("the wait failed")
    assert NAME in sys.modules
    del sys.modules[NAME]


@pytest.fixture
def far_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Far sides are processes of this machine, started by a command; what it returns is the address of a repository there."""
    program = tmp_path / "rsh"
    program.write_text('#!/bin/sh\nexec sh -c "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("HOLDFAST_RSH", str(program))
    Repository.init(str(tmp_path / "repo"), notify=lambda _message: None).close()

    def use(command: str) -> str:
        monkeypatch.setenv("HOLDFAST_REMOTE_COMMAND", command)
        return f"ssh://far{tmp_path / 'repo'}"

    return use


SERVE = f"{sys.executable} -m holdfast serve --stdio"


def test_a_place_is_reached_and_opened_meanwhile(far_side: Callable[[str], str], tmp_path: Path) -> None:
    address = far_side(SERVE)
    with reached_meanwhile(address, index=True) as place:
        repository = Repository.open(address, place=place)
    with repository:
        assert repository.is_far
        assert repository.points() == []


def test_nothing_is_reached_for_a_folder_here(tmp_path: Path) -> None:
    with reached_meanwhile(str(tmp_path), index=True) as place:
        assert place is None


def test_whoever_wants_the_place_is_told_why_there_is_none(far_side: Callable[[str], str]) -> None:
    address = far_side("echo loads of words >&2; exit 3")
    with (
        reached_meanwhile(address, index=False) as place,
        pytest.raises(FarSideEnded, match="loads of words"),
    ):
        Repository.open(address, place=place)


def test_a_place_that_nobody_has_taken_is_let_go_of(far_side: Callable[[str], str], tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    os.mkfifo(ended)
    address = far_side(f"{SERVE}; echo ended > {ended}")
    with pytest.raises(UsageError, match="something else"), reached_meanwhile(address, index=True):
        raise UsageError("something else failed")
    assert ended.read_text() == "ended\n"
