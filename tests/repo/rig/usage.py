"""How much a repository needs, counted from its trees, and how much its index says is alive."""

from __future__ import annotations

from holdfast.ids import RecordId
from holdfast.repo.check import contents_of
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind
from holdfast.repo.repository import Repository
from holdfast.repo.walk import walk_nodes


def reachable_bytes(repository: Repository) -> int:
    """Stored bytes of all that the points and sessions need, counted from the trees."""
    records, _ = repository._reading()
    index = repository._index()
    roots = [
        c.root
        for p in [*repository.points(), *repository.hidden_points()]
        for _, c in contents_of(p.manifest)
    ]
    roots += [root for s in index.sessions() for root in index.roots(s.id)]
    needed: set[RecordId] = {RecordId(row.id) for row in index.points()}
    for node in walk_nodes(records, roots):
        needed.add(RecordId(node.id))
        needed.update(RecordId(i) for i in node.children())
    needed |= {i for i, place in index.scan(None, 10**6) if place.kind == Kind.MARK}
    return sum(
        RECORD_HEADER_BYTES + place.stored_bytes for place in index.lookup(list(needed)) if place is not None
    )


def live_bytes(repository: Repository) -> int:
    return sum(row.live_bytes for row in repository._index().packs())
