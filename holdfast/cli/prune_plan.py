"""What `holdfast prune` is about to do: which points go, why, what that frees, and how it is shown."""

from __future__ import annotations

import os
import time as _time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from holdfast.cli.invocation import Invocation
from holdfast.cli.output import Column, Json, print_table, say, warn
from holdfast.errors import EXIT_WARNINGS, IntegrityError, UsageError
from holdfast.ids import PointId
from holdfast.repo.points import Point
from holdfast.repo.repository import Repository
from holdfast.repo.retention import Candidate, Dialect, Policy, Verdict, age_key, plan_retention
from holdfast.units import format_size, format_time

__all__ = ["PrunePlan", "announce", "candidates", "make_plan", "many", "plan_json"]


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """The plan.

    Args:
        points: by VM, oldest first.
        verdicts: of each of them.
        zone: name of the zone whose days and weeks count.
        frees_each: bytes that removing a point alone frees, as far as that was asked for.
        frees: bytes that removing all that go frees; None if it was not asked for or can not be computed.
    """

    points: Sequence[Point]
    verdicts: Sequence[Verdict]
    zone: str
    frees_each: Mapping[PointId, int]
    frees: int | None

    @property
    def forgotten(self) -> list[Point]:
        """The points that go."""
        return [p for p, verdict in zip(self.points, self.verdicts, strict=True) if not verdict.kept]


def make_plan(
    invocation: Invocation,
    repository: Repository,
    policy: Policy,
    vm: str | None,
    *,
    sizes: bool,
    size_of_each: bool,
) -> PrunePlan:
    """What the policy does with the points of the repository, or of one VM.

    Raises:
        UsageError: the policy keeps nothing, or the time zone is not known.
        PointNotFound: there is no such VM.
    """
    zone, zone_name = _local_zone()
    now = int(_time.time())
    found = repository.points(vm)
    names = {point.manifest.vm_uuid: point.manifest.vm_name for point in found}  # the newest name counts
    points = sorted(found, key=lambda p: (names[p.manifest.vm_uuid], p.manifest.vm_uuid))
    verdicts = plan_retention(candidates(repository, points, policy.dialect, now), policy, now=now, zone=zone)
    plan = PrunePlan(points, verdicts, zone_name, {}, None)
    try:
        if sizes:
            plan = replace(plan, frees=repository.freed_bytes(plan.forgotten))
        if size_of_each:
            plan = replace(plan, frees_each=repository.exclusive_bytes(points))
    except IntegrityError as error:
        warn(invocation, f"what is freed can not be computed: {error.message}")
        invocation.exit_code = EXIT_WARNINGS
    return plan


def candidates(
    repository: Repository, points: Sequence[Point], dialect: Dialect, now: int
) -> list[Candidate]:
    """What retention needs to know of points; when they were verified only of the newest verified one of each VM."""
    pinned = repository.pinned()
    found = [
        Candidate(
            id=point.id,
            time=point.manifest.time,
            received=point.received_ms // 1000,
            vm_uuid=point.manifest.vm_uuid,
            pinned=point.id in pinned,
            labels=point.manifest.labels,
            received_after_ms=point.received_ms % 1000,
        )
        for point in points
    ]
    present = [pair for pair in zip(found, points, strict=True) if pair[0].time <= now]
    present.sort(key=lambda pair: age_key(pair[0], dialect), reverse=True)
    verified = _newest_verified(repository, [point for _, point in present])
    return [replace(c, verified_at=verified.get(c.id, 0)) for c in found]


def _newest_verified(repository: Repository, newest_first: Sequence[Point]) -> dict[bytes, int]:
    """The newest verified point of each VM, and when that was.

    Cost: an answer may need a walk of the point's trees, so only the newest points are asked for at first, and none
    where all packs were verified.
    """
    everything = repository.statistics().oldest_verification or 0
    pending: dict[str, list[Point]] = {}
    for point in newest_first:
        pending.setdefault(point.manifest.vm_uuid, []).append(point)
    if everything:
        return {points[0].id: everything for points in pending.values()}
    found: dict[bytes, int] = {}
    count = 1
    while pending:
        moments = repository.verified_at([point for points in pending.values() for point in points[:count]])
        for vm, points in list(pending.items()):
            verified = next((point.id for point in points[:count] if moments[point.id]), None)
            if verified is not None:
                found[verified] = moments[verified]
            pending[vm] = points[count:]
            if verified is not None or not pending[vm]:
                del pending[vm]
        count *= 8
    return found


def _local_zone() -> tuple[tzinfo, str]:
    """The zone that TZ names, or the system's, and its name.

    Raises:
        UsageError: TZ names no zone that the system knows.
    """
    name = os.environ.get("TZ")
    if name is None:
        place = os.path.realpath("/etc/localtime")
        key = place.partition("/zoneinfo/")[2] or "this system's time zone"
    else:
        name = name.removeprefix(":") or "UTC"
        place, key = (name if os.path.isabs(name) else ""), name
    try:
        if place:
            with open(place, "rb") as file:
                return ZoneInfo.from_file(file, key=key), key
        return ZoneInfo(key), key
    except (ZoneInfoNotFoundError, OSError, ValueError):
        if name in (None, "UTC"):
            return UTC, "UTC"
        raise UsageError(
            f"TZ is '{name}', which is no time zone of this system",
            hint="set it to a name such as Europe/Berlin or UTC, or unset it",
        ) from None


# --- how it is shown


def many(count: int) -> str:
    """So many restore points."""
    return f"{count} restore point{'' if count == 1 else 's'}"


def announce(plan: PrunePlan, *, explain: bool, dry_run: bool, collect: bool) -> None:
    """Says what will be done, before it is."""
    total, count = len(plan.points), len(plan.forgotten)
    if not total:
        say("no restore points yet")
        return
    if explain or dry_run:
        _print_reasons(plan, explain=explain)
    elif count:
        print_table(_COLUMNS, [_cells(point) for point in plan.forgotten])
    if not count:
        say(f"nothing to forget: {'it is' if total == 1 else f'all {total} are'} kept")
        return
    then = " and collect garbage" if collect and dry_run else ""
    frees = ""
    if plan.frees is not None:
        frees = f", which frees {format_size(plan.frees)}{'' if collect else ' once gc has run'}"
    say(f"{'would forget' if dry_run else 'forgetting'} {count} of {many(total)}{then}{frees}")


_COLUMNS = (Column("ID"), Column("VM", wide=True), Column("TIME"))


def _cells(point: Point) -> tuple[str, ...]:
    return (point.short_id, point.manifest.vm_name, format_time(point.manifest.time))


def _print_reasons(plan: PrunePlan, *, explain: bool) -> None:
    columns = [*_COLUMNS, Column("PLAN"), Column("WHY", wide=True)]
    if explain:
        columns += [Column("GOES", wide=True), Column("FREES", right=True)]
    rows: list[tuple[str, ...]] = []
    for point, verdict in zip(plan.points, plan.verdicts, strict=True):
        why = ", ".join(reason.rule for reason in verdict.reasons) or "no rule keeps it"
        row = (*_cells(point), "keep" if verdict.kept else "forget", why)
        if explain:
            size = plan.frees_each.get(point.id)
            row += (verdict.goes, "?" if size is None else format_size(size))
        rows.append(row)
    print_table(columns, rows)
    say(f"periods are those of the time zone {plan.zone}; TIME is UTC")


def plan_json(plan: PrunePlan, policy: Policy) -> dict[str, Json]:
    """The plan as JSON (docs/CLI.md describes it)."""
    return {
        "dialect": policy.dialect,
        "zone": plan.zone,
        "points": [
            {
                "id": point.id.hex(),
                "vm": point.manifest.vm_name,
                "vm_uuid": point.manifest.vm_uuid,
                "time": format_time(point.manifest.time),
                "kept": verdict.kept,
                "reasons": [reason.rule for reason in verdict.reasons],
                "goes": verdict.goes,
                "goes_at": None if verdict.goes_at is None else format_time(verdict.goes_at),
                "frees_bytes": plan.frees_each.get(point.id),
            }
            for point, verdict in zip(plan.points, plan.verdicts, strict=True)
        ],
        "kept": len(plan.points) - len(plan.forgotten),
        "forgotten": len(plan.forgotten),
        "frees_bytes": plan.frees,
    }
