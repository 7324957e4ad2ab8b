"""What the tests of the format share: docs/FORMAT.md as data, the example, and ways to spoil bytes."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from holdfast.errors import HoldfastError

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs" / "FORMAT.md"

Rows = list[dict[str, str]]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _tables(text: str) -> dict[str, Rows]:
    """The tables that follow a `<!-- held: name -->`, each row by its column names."""
    found: dict[str, Rows] = {}
    for match in re.finditer(r"<!-- held: ([\w-]+) -->\n((?:\|.*\n)+)", text):
        lines = match[2].splitlines()
        names = _cells(lines[0])
        found[match[1]] = [dict(zip(names, _cells(line), strict=True)) for line in lines[2:]]
    return found


@pytest.fixture(scope="session")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tables(document: str) -> dict[str, Rows]:
    return _tables(document)


@pytest.fixture(scope="session")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("format_example", HERE / "example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def survives() -> Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]:
    """Whether a decoder accepts its input; anything but the documented errors fails the test."""

    def decoded(decode: Callable[[], object], documented: tuple[type[HoldfastError], ...]) -> bool:
        try:
            decode()
        except HoldfastError as error:
            if type(error) not in documented:
                raise
            return False
        return True

    return decoded
