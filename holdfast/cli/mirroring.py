"""`replicate --mirror-retention`: what goes from the target because the source has forgotten it, and how that is shown."""

from __future__ import annotations

import time as _time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.output import Json, say
from holdfast.cli.prune_plan import candidates, many
from holdfast.repo.mirror import plan_mirror
from holdfast.repo.points import Point
from holdfast.repo.retention import Candidate, Verdict
from holdfast.units import format_time

if TYPE_CHECKING:
    from holdfast.repo.repository import Repository

__all__ = ["MirrorPlan", "announce_mirror", "mirror_json", "mirror_plan"]


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """Points of the target that the source has forgotten, and what becomes of each."""

    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def forgotten(self) -> list[Point]:
        """Those that go."""
        return [p for p, verdict in zip(self.points, self.verdicts, strict=True) if not verdict.kept]


def mirror_plan(
    source: Repository, target: Repository, wanted: Callable[[Point], bool], coming: Sequence[Point]
) -> MirrorPlan:
    """What goes from the target.

    Args:
        wanted: tells which points are meant at all.
        coming: points that a dry run would have copied.
    """
    now = int(_time.time())
    there = target.points_beside(source)
    gone = source.gone_from(target, there)
    if not gone.points:
        return MirrorPlan((), ())
    known = candidates(target, there, "holdfast", now)
    known += [Candidate(point.id, point.manifest.time, now, point.manifest.vm_uuid) for point in coming]
    by_id: dict[bytes, Point] = {point.id: point for point in there}
    verdicts = tuple(v for v in plan_mirror(known, gone, now=now) if wanted(by_id[v.point.id]))
    return MirrorPlan(tuple(by_id[verdict.point.id] for verdict in verdicts), verdicts)


def announce_mirror(plan: MirrorPlan, *, dry_run: bool) -> None:
    """Says what was forgotten in the target, or would be, and what is kept there all the same."""
    verb = "would forget" if dry_run else "forgot"
    for point, verdict in zip(plan.points, plan.verdicts, strict=True):
        name = f"{point.short_id} {point.manifest.vm_name} {format_time(point.manifest.time)}"
        if verdict.kept:
            why = ", ".join(reason.rule for reason in verdict.reasons)
            say(f"kept {name}, which the source has forgotten: {why}")
        else:
            say(f"{verb} {name}, as the source has")
    count = len(plan.forgotten)
    if not count:
        say("nothing to forget in the target")
        return
    then = "" if dry_run else "; until 'holdfast gc' runs there, 'holdfast forget --undo' brings them back"
    say(f"{verb} {many(count)} of the target{then}")


def mirror_json(plan: MirrorPlan) -> list[Json]:
    """The plan as JSON (docs/CLI.md describes it)."""
    return [
        {
            "id": point.id.hex(),
            "vm": point.manifest.vm_name,
            "time": format_time(point.manifest.time),
            "forgotten": not verdict.kept,
            "reasons": [reason.rule for reason in verdict.reasons],
        }
        for point, verdict in zip(plan.points, plan.verdicts, strict=True)
    ]
