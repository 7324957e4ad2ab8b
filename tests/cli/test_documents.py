"""docs/CLI.md and the README say what the commands do: no option, variable or JSON member is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from holdfast.cli.app import COMMANDS, app, load

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docs" / "CLI.md").read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    return text.partition(f"\n### {name}\n")[2].partition("\n### ")[0]


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from (*parameter.opts, *parameter.secondary_opts)


def subcommands(command: click.Command) -> list[click.Command]:
    return list(command.commands.values()) if isinstance(command, click.Group) else []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(text: str, name: str) -> None:
    described = section(text, name)
    assert described, f"no section on {name}"
    common = set(options(app)) | {"-h", "--help"}
    for command in (load(name), *subcommands(load(name))):
        for option in set(options(command)) - common:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", described), f"{name} {option}"
        if command is not load(name):
            assert f"holdfast {name} {command.name}" in described
    for option in common:
        assert f"`{option}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help(name: str) -> None:
    for command in (load(name), *subcommands(load(name))):
        assert command.help
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help


def test_nothing_is_documented_that_is_not_there(text: str) -> None:
    real = {
        option for name in COMMANDS for c in (load(name), *subcommands(load(name))) for option in options(c)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= real | {"--help"}
    assert set(re.findall(r"^### (\S+)$", text, re.MULTILINE)) == set(COMMANDS)


def test_every_variable_is_documented(text: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "holdfast").rglob("*.py"))
    assert set(re.findall(r"HOLDFAST_[A-Z_]*[A-Z]", code)) <= set(re.findall(r"HOLDFAST_[A-Z_]*[A-Z]", text))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("list", ["list"]),
        ("show", ["show", "web1@latest"]),
        ("diff", ["diff", "web1@latest~1", "web1@latest"]),
        ("stats", ["stats"]),
        ("check", ["check"]),
        ("restore", ["restore", "web1@latest", "DEST", "--dry-run"]),
        ("backup", ["backup", "VM", "--dry-run"]),
    ],
)
def test_every_json_member_is_documented(
    text: str, done, repo, vm, tmp_path, name: str, words: list[str]
) -> None:
    places = {"DEST": str(tmp_path / "dest"), "VM": str(vm)}
    outcome = done("-r", repo, *[places.get(word, word) for word in words], "--json")
    described = section(text, name) + (section(text, "list") if name == "show" else "")

    def members(value: object) -> Iterator[str]:
        if isinstance(value, list):
            for entry in value:
                yield from members(entry)
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield key
                yield from members(entry) if key != "labels" else ()

    for member in members(outcome.records[-1]):
        assert f'"{member}"' in described, member


def test_the_readme_shows_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ {4}\$ holdfast (\S+)", readme, re.MULTILINE)
    assert set(shown) <= set(COMMANDS)
    assert {"init", "backup", "list", "diff", "restore", "check", "stats", "key"} <= set(shown)
    assert "make demo" in readme
    assert "make test" in readme
