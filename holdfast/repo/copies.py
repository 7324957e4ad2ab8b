"""Copies of restore points in other repositories: what is known of them, and from when.

After a replication each side notes which of its points the other one lists too, and what was proven of them there:

- compared: both list the point. Where keys are the same its id names all of its content, so both have the same roots.
- sampled: a random share of what it needs was read and hashed over there (`--challenge`).
- read: all of it was (`--verify`).

It is knowledge like that of the ledger of verification: it stands in the index alone, is lost with it, and is learned
again by the next replication. A side that may not be written to, or only be added to, is not noted; it is no fault.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import StorageError
from holdfast.ids import PointId, RepositoryId
from holdfast.repo.index import CopiesFound, Index

__all__ = ["SeenCopies", "Side", "note_copies"]

_DAY_S: Final = 86_400
"""A far side is told of what it knows by the first replication of each day only: the beginnings of ids travel for it."""


@dataclass(frozen=True, slots=True)
class SeenCopies:
    """What a replication has found.

    Args:
        pairs: points that both list: the id in the source, and that in the target.
        absent: points of the source that the target has forgotten.
        proven: ids, in the target, of points that were verified there.
        whole: all that these need was read, not a share of it.
    """

    pairs: Sequence[tuple[PointId, PointId]]
    absent: Sequence[PointId] = ()
    proven: Collection[PointId] = frozenset()
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two repositories.

    Args:
        path: what the user calls it.
        noted: whether anything may be noted there.
    """

    index: Index
    id: RepositoryId
    path: str
    is_far: bool
    noted: bool

    @property
    def address(self) -> str:
        """Where it is, for somebody who may be on another host."""
        if self.is_far:
            return self.path
        return f"{socket.gethostname()}:{os.path.abspath(self.path)}"


def note_copies(source: Side, target: Side, seen: SeenCopies, when: int) -> None:
    """Notes in the source what the target has, and the other way round.

    Cost: 8 bytes for each point travel to a side that is far, once a day if nothing was proven and nothing is new.
    """
    proven = [pair for pair in seen.pairs if pair[1] in seen.proven]
    known = _is_known(source, target, seen, when) or _is_known(target, source, _turned(seen), when)
    for side, other, which in ((source, target, 0), (target, source, 1)):
        if not side.noted or (side.is_far and known and not proven):
            continue
        read = [pair[which] for pair in proven] if which == 0 else []
        found = CopiesFound(
            other.id,
            other.address,
            when,
            [pair[which] for pair in seen.pairs],
            sampled=[] if seen.whole else read,
            read=read if seen.whole else [],
            absent=seen.absent if which == 0 else (),
        )
        with contextlib.suppress(StorageError):
            side.index.note_copies(found)


def _turned(seen: SeenCopies) -> SeenCopies:
    return SeenCopies([(there, here) for here, there in seen.pairs])


def _is_known(side: Side, other: Side, seen: SeenCopies, when: int) -> bool:
    """Whether a side that is here says that all of this was noted on the same day (of UTC)."""
    if side.is_far or not side.noted:
        return False
    rows = {row.point: row for row in side.index.copies() if row.repository == other.id}
    recent = {point for point, row in rows.items() if row.compared // _DAY_S == when // _DAY_S}
    return {here for here, _ in seen.pairs} <= recent and rows.keys().isdisjoint(seen.absent)
