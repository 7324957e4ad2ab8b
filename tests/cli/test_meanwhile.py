"""What a command imports while it waits for another host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from holdfast.cli.meanwhile import imported_meanwhile
from holdfast.errors import UsageError

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
    with imported_meanwhile(NAME, *addresses):
        pass
    assert sys.modules.pop(NAME).VALUE == 7


@pytest.mark.parametrize("addresses", [("/repo", "other/repo"), ("", None)])
def test_nothing_is_imported_where_nobody_waits(addresses: tuple[str | None, ...]) -> None:
    with imported_meanwhile(NAME, *addresses):
        pass
    assert NAME not in sys.modules


def test_no_module_is_nothing_to_import() -> None:
    with imported_meanwhile("", "ssh://nas/repo"):
        pass


def test_a_module_that_fails_is_left_to_whoever_needs_it(module: Path) -> None:
    module.write_text("raise RuntimeError('no')\n")
    with imported_meanwhile(NAME, "ssh://nas/repo"):
        pass
    assert NAME not in sys.modules


def test_an_error_within_is_passed_on_when_the_import_is_over() -> None:
    with pytest.raises(UsageError, match="the wait"), imported_meanwhile(NAME, "ssh://nas/repo"):
        raise UsageError("the wait failed")
    assert NAME in sys.modules
    del sys.modules[NAME]
