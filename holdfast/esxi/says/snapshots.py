"""The tree of a VM's snapshots, as `vmsvc/snapshot.get` (and `.create`, `.remove`) prints it.

    Get Snapshot:
    |-ROOT
    --Snapshot Name        : before update
    --Snapshot Id        : 1
    --Snapshot Desciption  :
    --Snapshot Created On  : 10/4/2026 19:0:52
    --Snapshot State       : powered off
    --|-CHILD

Depth is the number of dashes. "Desciption" is VMware's spelling, not on all releases; ESX 4 prints no ids; a
description may run over several lines, and could imitate a field: of each field the first one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable

__all__ = ["Snapshot", "parse_snapshots"]

_HEADINGS: Final = (
    "Get Snapshot:",
    "Create Snapshot:",
    "Remove Snapshot:",
    "Remove All Snapshots:",
    "Revert Snapshot:",
)
_NODE: Final = re.compile(r"^(-*)\|-(ROOT|CHILD)\s*$")
_FIELD: Final = re.compile(r"^(-+)Snapshot (Name|Id|Desciption|Description|Created On|State)\s*:[ ]?(.*)$")
_DEEPEST: Final = 200


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of a VM.

    Args:
        id: what `snapshot.remove` takes; None on releases that print none.
        created: as the host prints it, in its own zone.
        state: `powered on`, `powered off`, `suspended`.
    """

    name: str
    id: int | None
    description: str
    created: str
    state: str
    children: tuple[Snapshot, ...] = ()

    def walk(self) -> Iterator[Snapshot]:
        """Yields this one and all below it, parents first."""
        pending = [self]
        while pending:
            one = pending.pop()
            yield one
            pending.extend(reversed(one.children))


@dataclass(slots=True)
class _Draft:
    depth: int
    fields: dict[str, str] = field(default_factory=dict)
    children: list[_Draft] = field(default_factory=list)

    def finished(self) -> Snapshot:
        number = self.fields.get("Id", "").strip()
        return Snapshot(
            name=self.fields["Name"],
            id=int(number) if re.fullmatch("[0-9]{1,9}", number) else None,
            description=self.fields.get("Description", ""),
            created=self.fields.get("Created On", "").strip(),
            state=self.fields.get("State", "").strip(),
            children=tuple(child.finished() for child in self.children),
        )


def parse_snapshots(text: str) -> tuple[Snapshot, ...]:
    """The topmost snapshots of the tree; empty if the VM has none.

    Raises:
        SourceFormat: it is no such tree.
    """
    roots: list[_Draft] = []
    path: list[_Draft] = []
    open_text: tuple[_Draft, str] | None = None
    lines = text.splitlines()
    if not any(line.strip() in _HEADINGS for line in lines) and text.strip():
        raise SourceFormat(f"vmsvc/snapshot.get printed no tree, but: {printable(text.strip()[:200])}")
    for line in lines:
        match = _NODE.match(line)
        if match is not None:
            draft = _Draft(len(match[1]) + 2)
            while path and path[-1].depth >= draft.depth:
                path.pop()
            if len(path) >= _DEEPEST:
                raise SourceFormat("vmsvc/snapshot.get printed a tree that is too deep")
            (path[-1].children if path else roots).append(draft)
            path.append(draft)
            open_text = None
            continue
        match = _FIELD.match(line)
        if match is not None and path and len(match[1]) == path[-1].depth:
            name = match[2].replace("Desciption", "Description")
            path[-1].fields.setdefault(name, match[3])
            open_text = (path[-1], name) if name in ("Description", "Name") else None
        elif open_text is not None:
            draft, name = open_text
            draft.fields[name] += f"\n{line}"
    for draft in _all(roots):
        if "Name" not in draft.fields:
            raise SourceFormat("vmsvc/snapshot.get printed a snapshot without a name")
    return tuple(root.finished() for root in roots)


def _all(drafts: list[_Draft]) -> Iterator[_Draft]:
    for draft in drafts:
        yield draft
        yield from _all(draft.children)
