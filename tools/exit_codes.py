#!/usr/bin/env python3
"""Writes docs/EXIT_CODES.md from `holdfast.errors.EXIT_CODES`, or tells whether it is in step.

    python tools/exit_codes.py            exit code 1 if the document is out of step
    python tools/exit_codes.py --write    writes it

The table in the errors is the only source; the help text prints it too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.errors import EXIT_CODES

DOCUMENT = Path(__file__).parent.parent / "docs" / "EXIT_CODES.md"

HEAD = """\
# Exit codes

Every command ends with one of these. With `--json` an error is also one JSON object on stderr, with the
code, the sentence and, where there is something to do, a hint.

Codes come in groups, so that a script can act on the kind of failure: 10 to 19 the repository as a whole,
20 to 29 integrity (stored bytes are not what was written), 30 to 39 storage (reading or writing failed),
40 to 49 the source, 50 to 59 the connection to another host, 60 to 69 a guest's file system. Damage is never reported as an input/output error, nor the other way round.

<!-- Generated from holdfast/errors.py by `make docs`; a test holds the two in step. -->

| code | meaning |
|-----:|---------|
"""


def rendered() -> str:
    """The whole document."""
    return HEAD + "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items())


def main(arguments: list[str]) -> int:
    """Exit code 0 if the document is (now) in step with the errors, else 1."""
    if arguments == ["--write"]:
        DOCUMENT.write_text(rendered(), encoding="utf-8")
        return 0
    if DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == rendered():
        return 0
    sys.stderr.write(f"{DOCUMENT.name} is out of step with holdfast/errors.py: run 'make docs'\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
