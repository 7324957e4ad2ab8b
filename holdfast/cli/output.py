"""What goes to stdout and stderr: JSON for programs, tables on terminals, aligned text into pipes.

Names come from strangers: whatever is no printable character is escaped before it reaches a terminal. Piped
text has no colours and no boxes, and nothing in it is ever cut off.
"""

from __future__ import annotations

import json as _json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from holdfast.cli.invocation import Invocation

__all__ = [
    "Column",
    "Json",
    "as_json",
    "notice",
    "on_terminal",
    "print_facts",
    "print_json",
    "print_table",
    "say",
    "shown",
    "warn",
]

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

_GAP: Final = "  "
_LEAST_WIDE: Final = 10


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Args:
        right: numbers are aligned on the right.
        wide: may be broken into lines where a terminal is narrow.
    """

    title: str
    right: bool = False
    wide: bool = False


def shown(text: str) -> str:
    """The text on one line and without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_json(value: Json) -> str:
    """The value as one line of ASCII."""
    return _json.dumps(value)


def print_json(value: Json) -> None:
    """One JSON document, or one line of a stream of them, on stdout."""
    print(as_json(value), flush=True)


def say(text: str) -> None:
    """A line for people on stdout."""
    print(shown(text))


def notice(invocation: Invocation, message: str) -> None:
    """Something that the user should know while the command goes on, on stderr."""
    if invocation.run_log is not None:
        invocation.run_log.note(message)
    if invocation.json:
        print(as_json({"type": "notice", "message": message}), file=sys.stderr, flush=True)
    else:
        print(f"holdfast: {shown(message)}", file=sys.stderr, flush=True)


def warn(invocation: Invocation, message: str) -> None:
    """Something that did not go as it should, on stderr."""
    if invocation.run_log is not None:
        invocation.run_log.note(message, "warning")
    if invocation.json:
        print(as_json({"type": "warning", "message": message}), file=sys.stderr, flush=True)
    else:
        print(f"holdfast: warning: {shown(message)}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def _cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table. Cells are escaped here."""
    cells = [[shown(cell) for cell in row] for row in rows]
    lines = [[column.title for column in columns], *cells]
    widths = [max(_cells(line[number]) for line in lines) for number in range(len(columns))]
    if on_terminal():
        _print_rich(columns, cells, widths)
        return
    for line in lines:
        padded = [
            " " * (width - _cells(cell)) + cell if column.right else cell + " " * (width - _cells(cell))
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        print(_GAP.join(padded).rstrip())


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style="bold")
    least = 0
    for column, width in zip(columns, widths, strict=True):
        narrowest = min(width, _LEAST_WIDE) if column.wide else width
        least += narrowest + len(_GAP)
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not column.wide,
            min_width=narrowest,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A terminal that is too narrow even so breaks the lines itself, which is better than losing their ends.
    console = Console()
    Console(width=max(console.width, least)).print(table, crop=False)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}{_GAP}{shown(value)}".rstrip())
