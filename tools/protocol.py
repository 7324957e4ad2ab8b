#!/usr/bin/env python3
"""Writes the tables of docs/PROTOCOL.md from the messages in the code, or tells whether they are in step.

python tools/protocol.py            exit code 1 if the document is out of step
python tools/protocol.py --write    writes it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from holdfast.repo.wire.faults import classes
from holdfast.repo.wire.messages import Request, layouts

DOCUMENT = Path(__file__).parent.parent / "docs" / "PROTOCOL.md"
MARK = "<!-- Generated from holdfast/repo/wire/messages.py; `python tools/protocol.py --write` -->\n"


def generated() -> str:
    """Everything behind the mark."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    for title, requests in (("Answers", False), ("Requests", True)):
        yield f"\n### {title}\n"
        yield "| number | message | fields |" + (" answer |" if requests else "")
        yield "|---|---|---|" + ("---|" if requests else "")
        for cls, (number, layout) in layouts().items():
            if issubclass(cls, Request) is not requests:
                continue
            listed = "; ".join(
                f"{name}: {item.name}" for name, item in zip(cls.__slots__, layout, strict=True)
            )
            meaning = " ".join((cls.__doc__ or "").split())
            answer = f" `{cls.answer.__name__}` |" if issubclass(cls, Request) else ""
            yield f"| {number} | `{cls.__name__}` | {listed or '(none)'}<br>{meaning} |{answer}"
    yield "\n### Failures\n"
    yield "The near side raises the class that the code names; a code that it does not know is a `RepositoryError`.\n"
    yield "| code | class |"
    yield "|---|---|"
    for number, error in classes().items():
        yield f"| {number} | `{error.__name__}` |"


def main() -> int:
    """0 if the document is in step, or was written."""
    head, found, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    if not found:
        sys.stderr.write(f"{DOCUMENT} has lost its mark\n")
        return 1
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(head + MARK + generated(), encoding="utf-8")
        return 0
    if rest != generated():
        sys.stderr.write(f"{DOCUMENT} is out of step; run: python tools/protocol.py --write\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
