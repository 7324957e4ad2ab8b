"""Mirrored retention: restore points that the source of a replication once had and has forgotten go from its target, too.

Only by explicit wish, and after what is new has been copied. It takes two steps, as everywhere: what is forgotten here
can be brought back until garbage is collected in the target.

Invariants:
- A point that the source never had stays. So does one whose backup the source lists under another id.
- Of a VM of which the source lists no point at all, nothing goes: the VM may have moved, or the source be emptied.
- The guards of retention hold: pinned points stay, those of the future, and the newest verified point of each VM.

Where keys differ, points are the same by their origin. A point that the source has collected has none any more: then
only what the source has forgotten and not yet collected is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from holdfast.errors import PointNotFound
from holdfast.ids import PointId
from holdfast.repo.backup import Engine
from holdfast.repo.points import Point, open_point
from holdfast.repo.replicate import Origin
from holdfast.repo.retention import Candidate, Reason, Verdict, age_key

__all__ = ["Gone", "gone_from", "plan_mirror"]


@dataclass(frozen=True, slots=True)
class Gone:
    """What a source has forgotten.

    Args:
        points: of the target.
        alive: VMs of which the source lists points.
    """

    points: frozenset[PointId]
    alive: frozenset[str]


def gone_from(source: Engine, points: Sequence[Point], *, same_keys: bool) -> Gone:
    """Which of the target's points the source once had and has forgotten.

    Args:
        points: all that the target lists.

    Cost: asks the source for its ids, and for the manifests of those points that the target does not list.
    """
    ours = {point.id for point in points}
    states, others = _beside(source, ours if same_keys else frozenset())
    strangers = [point.id for point in points if point.id not in states]
    collected = source.index.collected(strangers) if same_keys else frozenset()
    origins: dict[bool, set[Origin]] = {False: set(), True: set()}
    for point in [*points, *others]:
        if point.id in states:
            origins[states[point.id]].add(Origin.of(point))
    listed, forgotten = origins[False], origins[True]
    gone = {
        point.id
        for point in points
        if (point.id in collected or Origin.of(point) in forgotten) and Origin.of(point) not in listed
    }
    return Gone(frozenset(gone), frozenset(origin.vm_uuid for origin in listed))


def _beside(source: Engine, known: AbstractSet[PointId]) -> tuple[dict[PointId, bool], list[Point]]:
    """The ids of the source's points, whether each is hidden, and the points that are not known."""
    while True:
        states = source.index.point_states()
        try:
            rows = source.index.get_points(sorted(states.keys() - known))
        except PointNotFound:  # a collection has taken one a moment ago
            continue
        return states, [open_point(row, source.opener) for row in rows]


def plan_mirror(points: Sequence[Candidate], gone: Gone, *, now: int) -> tuple[Verdict, ...]:
    """What becomes of the points that the source has forgotten; those that stay have a reason.

    Args:
        points: all that the target lists, or will list by then.
        now: Unix seconds.
    """
    reasons: dict[bytes, list[Reason]] = {point.id: [] for point in points}
    groups: dict[str, list[Candidate]] = {}
    for point in points:
        if point.time > now:
            reasons[point.id].append(Reason("lies in the future"))
        else:
            groups.setdefault(point.vm_uuid, []).append(point)
        if point.pinned:
            reasons[point.id].append(Reason("pinned"))
        if point.vm_uuid not in gone.alive:
            reasons[point.id].append(Reason("the source lists no restore point of its VM"))
    for group in groups.values():
        group.sort(key=lambda point: age_key(point, "holdfast"), reverse=True)
        verified = next((point for point in group if point.verified_at), None)
        if verified is not None:
            reasons[verified.id].append(Reason("newest verified point of its VM"))
        else:
            reasons[group[0].id].append(Reason("newest point of its VM (none is verified)"))
    return tuple(Verdict(point, tuple(reasons[point.id])) for point in points if point.id in gone.points)
