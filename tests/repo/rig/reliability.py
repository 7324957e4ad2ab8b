"""docs/RELIABILITY.md: written from what the failure matrix found, and read back to be held against it.

    make reliability                runs the whole matrix and writes the document; minutes
    make reliability ARGS=gc        only that command; the others' rows stay

No row is written by hand: `parsed` reads the document's tables, and `rendered` of what it has read is the document.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rig.matrix import COLUMNS, SAME, Outcome, run_operation
from rig.operations import OPERATIONS

DOCUMENT = Path(__file__).parents[3] / "docs" / "RELIABILITY.md"

HEAD = """\
# Reliability

What is left when a command is killed, meets a full disk or an I/O error, or the power goes: for every command that
changes a repository, at every single step by which it does.

<!-- Written by `make reliability` from what the tests found; tests/repo/test_crash_matrix.py holds it against them. -->

## What is promised

- Every restore point that was listed before is listed after, and restores bit for bit (unless it was the one to go).
- Nothing unfinished is ever listed. At most the backup that was running is lost; what it had committed is found
  again by the next one.
- No damage: `check --read-data` finds nothing, but that the two copies of `config.json` differ, where that is so; either
  of them is valid.
- No special command is needed: the next backup gets through right away, and the same command, given again, either
  does it or says that it had been done. If it does it, nothing is left over after that: no file, nothing in what
  `check` says, and after a collection no byte that no restore point needs.
- A full disk ends the command with exit code 31, an I/O error with 30. If it says 0, it has done what it was to do. A
  command that ended otherwise may have done it all the same: that is known only when the last transaction is.

## How it is tested

Each command runs on a real repository in a folder, in a process of its own, in which all calls that change files are
numbered: creating, writing, syncing, cutting, renaming and removing files and folders, punching holes, and the end of
each of LMDB's write transactions. A call that changes the folder in a way that is not numbered fails the test. At one
of these steps a fault strikes:

| fault | what happens |
|---|---|
| kill -9 | a real SIGKILL: before the step, after it, and, if the step is a write, in the middle |
| full disk | ENOSPC at the step (a write is done in part first), and from then on wherever room is needed, until the command has ended |
| I/O error | EIO at the step, once (a write is done in part first) |
| power cut | after the step; what was not synced is gone, or, drawn by lot, any part of it is left: entries of folders one by one, contents torn and with blocks of zeros. A file's sync does not vouch for its name; its folder's does. LMDB's promise that a committed transaction is durable is taken for granted |

Then one process looks at what is left, restores and compares every point, reads and checks everything, makes a
backup of another VM, and looks again. Another one, on a copy, gives the same command again first. Every instant can
be repeated: faults, ids and what survives a power cut follow from its number.

`make reliability` tries every step and writes this document. `make test` tries for each row at least one, and fails if it
finds a row, a state, an exit code or a sentence of `check` that is not below; `make soak` does so with every step.
The same at random instants with real processes: tests/repo/test_kill.py; below the page cache in memory, and crash
upon crash: tests/repo/test_crash_matrix.py; full file systems: tests/repo/test_full_disk.py.
"""

READING = """\
## How to read the tables

*struck by*: the faults, how many instants of each were tried (steps of the same kind are taken together), and in
brackets the exit codes of commands that lived. *state after*: **as before**, the command has changed nothing that
can be seen; **done**, as if it had run through (of a collection: the forgotten points can not be brought back any
more; how much space has come back already is not looked at); **unchanged**, there is no difference between the two; **as before; done
with the next backup**, what the command had written takes effect when the next writer adopts it; **damaged where it
was, or less**, a repair has healed some of it. Where several are possible they are separated by a slash. *next*: commands that were tried and work at once.
*The running backup* is lost in so far as it has to be run again.
"""

_CHECKS = {
    "the two copies of the configuration differ, or one is missing": "the copies of config.json differ"
}


@dataclass
class Row:
    """What a fault at a kind of step has left, over all instants that were tried."""

    instants: int = 0
    codes: set[str] = field(default_factory=set)
    states: set[str] = field(default_factory=set)
    checks: set[str] = field(default_factory=set)
    following: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        self.instants += 1
        if outcome.said is not None:
            self.codes.add(str(outcome.said))
        self.states.add(outcome.state)
        self.checks.add(_CHECKS.get(outcome.check, outcome.check))
        self.following.add(_following(outcome))
        self.lost.add(outcome.lost)

    def beyond(self, published: Row) -> list[str]:
        """What was found here and is not published."""
        names = ("codes", "states", "checks", "following", "lost")
        return [
            f"{name}: {sorted(extra)}"
            for name in names
            if (extra := getattr(self, name) - getattr(published, name))
        ]


Rows = dict[tuple[str, str], Row]
"""Kind of step and fault -> what was found."""


def _following(outcome: Outcome) -> str:
    if outcome.check == "-":
        return "the same"
    if outcome.following == SAME:
        return "the same; a backup"
    return f"a backup (the same ends with exit code {outcome.following}, since it is done)"


def rows_of(outcomes: Iterable[Outcome]) -> Rows:
    rows: Rows = {}
    for outcome in outcomes:
        rows.setdefault((outcome.step, outcome.column), Row()).add(outcome)
    return rows


def _cell(values: set[str]) -> str:
    return " / ".join(sorted(values))


def _uncell(cell: str) -> set[str]:
    return set(cell.split(" / "))


TABLE = """\
| step | struck by | state after | check says | next | data lost |
|---|---|---|---|---|---|
"""


def _table(rows: Rows) -> str:
    lines: list[str] = []
    for step in dict.fromkeys(step for step, _ in rows):
        groups: dict[tuple[str, ...], list[str]] = {}
        for column in COLUMNS:
            row = rows.get((step, column))
            if row is None:
                continue
            codes = f" ({_cell(row.codes)})" if row.codes else ""
            key = tuple(map(_cell, (row.states, row.checks, row.following, row.lost)))
            groups.setdefault(key, []).append(f"{column} ×{row.instants}{codes}")
        lines += [f"| {' | '.join([step, ', '.join(struck), *key])} |\n" for key, struck in groups.items()]
    return TABLE + "".join(lines)


def _summary(matrix: dict[str, Rows]) -> str:
    lines = [
        "## Summary\n\n| command | kinds of steps | instants | state after | data lost |\n|---|---:|---:|---|---|\n"
    ]
    total = losing = 0
    for operation in OPERATIONS:
        rows = matrix.get(operation.name, {})
        instants = sum(row.instants for row in rows.values())
        total += instants
        states = {state for row in rows.values() for state in row.states}
        lost = {text for row in rows.values() for text in row.lost}
        losing += lost > {"none", "the running backup"}
        lines.append(
            f"| `{operation.command}` | {len({step for step, _ in rows})} | {instants} | {_cell(states)} | {_cell(lost)} |\n"
        )
    lines.append(
        f"\n**{total} instants of {len(matrix)} commands. Data lost that had been backed up: "
        f"{'none' if not losing else f'in {losing} commands'}.**\n"
    )
    return "".join(lines)


def rendered(matrix: dict[str, Rows]) -> str:
    """The whole document."""
    sections = [
        f"## {operation.name}\n\n`{operation.command}`\n\n{_table(matrix[operation.name])}"
        for operation in OPERATIONS
        if operation.name in matrix
    ]
    return "\n".join([HEAD, _summary(matrix), READING, *sections])


def parsed(text: str) -> dict[str, Rows]:
    """The tables of the document."""
    matrix: dict[str, Rows] = {}
    for operation in OPERATIONS:
        _, found, rest = text.partition(f"\n## {operation.name}\n")
        if not found:
            continue
        rows = matrix[operation.name] = {}
        body = rest.partition("\n## ")[0].partition(TABLE)[2]
        for line in body.splitlines():
            step, struck, *cells = (cell.strip() for cell in line.strip().strip("|").split(" | "))
            states, checks, following, lost = map(_uncell, cells)
            for each in struck.split(", "):
                match = re.fullmatch(r"(.+) ×(\d+)(?: \((.+)\))?", each)
                assert match, each
                rows[step, match[1]] = Row(
                    int(match[2]), _uncell(match[3]) if match[3] else set(), states, checks, following, lost
                )
    return matrix


def main(arguments: list[str]) -> int:
    """Runs what is named, or everything, a process per core; what was not run stays as it is in the document."""
    chosen = [operation.name for operation in OPERATIONS if operation.name in arguments or not arguments]
    matrix = parsed(DOCUMENT.read_text(encoding="utf-8")) if arguments else {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda name: rows_of(run_operation(name, every=True)), chosen)
        matrix.update(zip(chosen, found, strict=True))
    DOCUMENT.write_text(rendered(matrix), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
