"""Which restore points a policy keeps, why, and when each of them will go (docs/RETENTION.md).

Pure: the clock and the time zone are arguments, nothing is read or written. Points are judged by VM, newest first.

Invariants, whatever the policy and the dialect:

- Pinned points, points whose time lies in the future, and the newest verified point of each VM are kept.
- In the dialect `holdfast` a point of the future, a pinned one, and one that claims to be more than a day older than
  its receipt never change what becomes of any other point: who can add points can not choose times that push
  good points out.
- A policy that is empty, or whose rules keep no point at all, is refused.

Other dialects count exactly as the tools that they are named after. Which points are verified, and removing the
others, is somebody else's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from typing import Final, Literal, TypeAlias, cast

from holdfast.errors import UsageError
from holdfast.repo.periods import PERIODS, Duration, Period, before, falls_out, period_of
from holdfast.units import format_time

__all__ = [
    "DIALECTS",
    "LATE_S",
    "UNLIMITED",
    "Candidate",
    "Dialect",
    "Policy",
    "Reason",
    "Verdict",
    "age_key",
    "plan_retention",
]

Dialect: TypeAlias = Literal["holdfast", "restic", "borg", "pbs"]

DIALECTS: Final[tuple[Dialect, ...]] = ("holdfast", "restic", "borg", "pbs")
UNLIMITED: Final = -1
LATE_S: Final = 86400
"""A point that claims to be older than its receipt by more is late: it does not count against the others."""

_NOUNS: Final[Mapping[Period, str]] = {
    "last": "point",
    "hourly": "hour",
    "daily": "day",
    "weekly": "week",
    "monthly": "month",
    "yearly": "year",
}
_HOUR_S: Final = 3600


# --- what goes in


@dataclass(frozen=True, slots=True)
class Candidate:
    """What retention needs to know of a restore point.

    Args:
        id: tells it from the others; breaks ties.
        time: Unix seconds that its data stands for, as whoever made it claims.
        received: Unix seconds at which the repository took it in.
        vm_uuid: groups the points.
        verified_at: Unix seconds at which all of it was verified; 0 for never.
        received_after_ms: milliseconds from `received` on; of two points of the same second the later one is newer.
    """

    id: bytes
    time: int
    received: int
    vm_uuid: str
    pinned: bool = False
    verified_at: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    received_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, any of which keeps a point. A count may be UNLIMITED; None and 0 are no rule.

    Args:
        last: so many points.
        hourly, daily, weekly, monthly, yearly: the newest point of each of so many periods that have one.
        within: all points that are less than this older than the newest.
        within_hourly, within_daily, within_weekly, within_monthly, within_yearly: of those, the newest of each period.
        labels: points with any of these.

    Raises:
        UsageError: it is empty, a count is out of bounds, or the dialect knows no such rule.
    """

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None
    within: Duration | None = None
    within_hourly: Duration | None = None
    within_daily: Duration | None = None
    within_weekly: Duration | None = None
    within_monthly: Duration | None = None
    within_yearly: Duration | None = None
    labels: tuple[tuple[str, str], ...] = ()
    dialect: Dialect = "holdfast"

    def __post_init__(self) -> None:
        for period in PERIODS:
            if self.count(period) < UNLIMITED:
                raise UsageError(f"'{period}' is {self.count(period)}", hint="give a number, or -1 for all")
        foreign = [f"within-{period}" for period in PERIODS if period != "last" and self.span(period)]
        if self.within and self.dialect == "pbs":
            foreign.append("within")
        if self.labels:
            foreign.append("label")
        if foreign and self.dialect in ("borg", "pbs"):
            raise UsageError(
                f"the dialect '{self.dialect}' has no rule 'keep-{foreign[0]}'",
                hint="leave out the rule or the dialect",
            )
        if not (
            self.within or self.labels or any(self.count(period) or self.span(period) for period in PERIODS)
        ):
            raise UsageError(
                "the policy is empty: it would keep nothing",
                hint="say what to keep, for example --keep-daily 7 --keep-weekly 4",
            )

    def count(self, period: Period) -> int:
        """How many the rule keeps; 0 if there is no such rule."""
        return cast("int | None", getattr(self, period)) or 0

    def span(self, period: Period) -> Duration | None:
        """How far `within_PERIOD` reaches."""
        return None if period == "last" else cast("Duration | None", getattr(self, f"within_{period}"))


# --- what comes out


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a point is kept.

    Args:
        rule: for people, such as `daily 3 of 7`.
        ends: when that will be over; empty for never.
        ends_at: the same in Unix seconds, where it is a matter of time alone.
    """

    rule: str
    ends: str = ""
    ends_at: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a point, and why."""

    point: Candidate
    reasons: tuple[Reason, ...]

    @property
    def kept(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)

    @property
    def goes(self) -> str:
        """What must have happened before it goes: `now`, `never`, or all of what is joined by `and`."""
        if not self.reasons:
            return "now"
        if not all(reason.ends for reason in self.reasons):
            return "never"
        return " and ".join(dict.fromkeys(reason.ends for reason in self.reasons))

    @property
    def goes_at(self) -> int | None:
        """Unix seconds at which it goes, if that is a matter of time alone.

        For the rules `within` it is the time that the VM's newest point must have; in the dialect `borg` it is
        the time of day.
        """
        moments = [reason.ends_at for reason in self.reasons if reason.ends_at is not None]
        return max(moments) if moments and len(moments) == len(self.reasons) else None


# --- the plan


@dataclass(slots=True)
class _Entry:
    """A point while it is judged. `time` is what counts, `local` the same on the clocks of the zone."""

    point: Candidate
    time: int
    local: datetime
    reasons: list[Reason] = field(default_factory=list)

    @property
    def late(self) -> bool:
        return self.point.received - self.point.time > LATE_S


_Kept: TypeAlias = Iterator[tuple[_Entry, Reason]]


def plan_retention(
    points: Sequence[Candidate], policy: Policy, *, now: int, zone: tzinfo
) -> tuple[Verdict, ...]:
    """What the policy does with each of the points, in the order in which they were given.

    Args:
        points: all of the VMs that are meant; a part of a VM's points would be judged wrongly.
        now: Unix seconds.
        zone: where days, weeks, months and years begin.

    Raises:
        UsageError: no rule keeps any point.

    Cost: linear but for sorting; a thousand points take hundredths of a second.
    """
    reasons: dict[int, list[Reason]] = {}
    groups: dict[str, list[tuple[int, Candidate]]] = {}
    for number, point in enumerate(points):
        groups.setdefault(point.vm_uuid, []).append((number, point))
    judged = 0
    kept = False
    for group in groups.values():
        entries: dict[int, _Entry] = {}
        for number, point in group:
            if point.time > now:
                lies = Reason("lies in the future", f"not before {_time_text(point.time)}")
                reasons[number] = [lies]
                continue
            time = age_key(point, policy.dialect)[0]
            entries[number] = _Entry(point, time, datetime.fromtimestamp(time, zone))
        ordered = sorted(entries.values(), key=lambda e: age_key(e.point, policy.dialect), reverse=True)
        for entry, reason in _RULES[policy.dialect](ordered, policy, now, zone):
            entry.reasons.append(reason)
            kept = True
        judged += sum(not entry.point.pinned for entry in ordered)
        _guard(ordered)
        reasons.update((number, entry.reasons) for number, entry in entries.items())
    if judged and not kept:
        raise UsageError(
            f"the policy would remove everything: no rule keeps any of {judged} restore points",
            hint="add a rule that keeps some, for example --keep-last 3",
        )
    return tuple(Verdict(point, tuple(reasons[number])) for number, point in enumerate(points))


def age_key(point: Candidate, dialect: Dialect) -> tuple[int, int, int, bytes]:
    """What orders the points of a VM, oldest first. Its first part is the time that counts: for us at most that of the receipt."""
    time = min(point.time, point.received) if dialect == "holdfast" else point.time
    return (time, point.received, point.received_after_ms, point.id)


def _guard(entries: Sequence[_Entry]) -> None:
    """Adds the reasons that no policy overrules. Entries are those of one VM, newest first."""
    for entry in entries:
        if entry.point.pinned:
            entry.reasons.append(Reason("pinned"))
    verified = next((entry for entry in entries if entry.point.verified_at), None)
    if verified is not None:
        verified.reasons.append(Reason("newest verified point of its VM", "with a newer verified point"))
    elif entries:
        entries[0].reasons.append(Reason("newest point of its VM (none is verified)", "with a newer point"))


# --- the dialects: each yields the points that rules keep, with the reasons. Entries are newest first.


def _holdfast(entries: Sequence[_Entry], policy: Policy, now: int, zone: tzinfo) -> _Kept:
    """Rules are ORed. Pinned points do not count; late ones count among all, but not against the others."""
    del now
    counted = [entry for entry in entries if not entry.point.pinned]
    yield from _ored([entry for entry in counted if not entry.late], policy, zone)
    for entry, reason in _ored(counted, policy, zone):
        if entry.late:
            yield entry, reason


def _restic(entries: Sequence[_Entry], policy: Policy, now: int, zone: tzinfo) -> _Kept:
    del now
    yield from _ored(entries, policy, zone)


def _ored(entries: Sequence[_Entry], policy: Policy, zone: tzinfo) -> _Kept:
    """Every rule looks at all points. While it has counts left, it also keeps the oldest.

    Source: restic, doc/060_forget.rst.
    """
    if not entries:
        return
    for entry in entries:
        for key, value in policy.labels:
            if (key, value) in entry.point.labels:
                yield entry, Reason(f"label {key}={value}")
    if policy.within:
        cutoff = before(entries[0].time, policy.within, zone)
        for entry in entries:
            if entry.time > cutoff:
                yield entry, _within(f"within {policy.within}", entry, policy.within, zone)
    for period in PERIODS:
        count = policy.count(period)
        for used, (number, oldest) in enumerate(_newest_of_each(entries, period, policy), 1):
            if count in (0, used - 1):
                break
            newest = number == 0
            yield entries[number], _counted(period, used, count, newest=newest, oldest=oldest)
    for period in PERIODS:
        span = policy.span(period)
        if span is None:
            continue
        cutoff = before(entries[0].time, span, zone)
        for number, oldest in _newest_of_each(entries, period, policy):
            entry = entries[number]
            if entry.time > cutoff:
                rule = f"{period} within {span}{' (oldest)' if oldest else ''}"
                yield entry, _within(rule, entry, span, zone, newest=_NOUNS[period] if number == 0 else "")


def _newest_of_each(entries: Sequence[_Entry], period: Period, policy: Policy) -> Iterator[tuple[int, bool]]:
    """Yields the number of the newest entry of each period; at the end the oldest of all, and then True if it is no newest."""
    previous: tuple[int, ...] | None = None
    for number, entry in enumerate(entries):
        current = _key(period, entry, number, policy)
        if current != previous:
            yield number, False
        elif number == len(entries) - 1:
            yield number, True
        previous = current


def _borg(entries: Sequence[_Entry], policy: Policy, now: int, zone: tzinfo) -> _Kept:
    """Rules from fine to coarse; what one keeps does not count for the next. Durations have fixed lengths.

    Source: borg 1.4, docs/usage/prune.
    """
    del zone
    kept: set[int] = set()
    if policy.within:
        span = policy.within
        hours = span.hours + 24 * (span.days + 31 * span.months + 365 * span.years)
        for number, entry in enumerate(entries):
            if entry.time > now - hours * _HOUR_S:
                kept.add(number)
                out = entry.time + hours * _HOUR_S
                yield entry, Reason(f"within {span}", f"at {_time_text(out)}", out)
    for period in PERIODS:
        count, used = policy.count(period), 0
        previous: tuple[int, ...] | None = None
        for number, entry in enumerate(entries):
            if used == count:
                break
            current = _key(period, entry, number, policy)
            if current != previous and number not in kept:
                used += 1
                kept.add(number)
                yield entry, _in_turn(period, used, count)
            previous = current
        last = len(entries) - 1
        if entries and used < count and last not in kept:
            kept.add(last)
            yield entries[last], _in_turn(period, used + 1, count, " (oldest)")


def _pbs(entries: Sequence[_Entry], policy: Policy, now: int, zone: tzinfo) -> _Kept:
    """Rules from fine to coarse; each skips periods of which an earlier one has kept a point. The oldest is not special.

    A point that is not the newest of a period that a rule keeps is lost for the later rules too.
    Source: Proxmox Backup Server, docs/prune-simulator and docs/maintenance.
    """
    del now, zone
    counted = [entry for entry in entries if not entry.point.pinned]
    decided: dict[int, bool] = {}
    for period in PERIODS:
        count = policy.count(period)
        periods = [_key(period, entry, number, policy) for number, entry in enumerate(counted)]
        done = {periods[number] for number, kept in decided.items() if kept}
        mine: set[tuple[int, ...]] = set()
        for number, entry in enumerate(counted):
            current = periods[number]
            if number in decided or current in done:
                continue
            if current not in mine and len(mine) == count:
                break
            decided[number] = current not in mine
            if decided[number]:
                mine.add(current)
                yield entry, _in_turn(period, len(mine), count)


_RULES: Final[Mapping[Dialect, Callable[[Sequence[_Entry], Policy, int, tzinfo], _Kept]]] = {
    "holdfast": _holdfast,
    "restic": _restic,
    "borg": _borg,
    "pbs": _pbs,
}


def _key(period: Period, entry: _Entry, number: int, policy: Policy) -> tuple[int, ...]:
    """What two entries of the same period have in common, as the dialect sees it."""
    if period == "last":  # borg's is its rule `secondly`
        second = (entry.local.hour, entry.local.minute, entry.local.second)
        return (*period_of("daily", entry.local), *second) if policy.dialect == "borg" else (number,)
    return period_of(period, entry.local, split_hours=policy.dialect == "holdfast")


# --- reasons


def _counted(period: Period, used: int, count: int, *, newest: bool, oldest: bool) -> Reason:
    """A count of the ORed dialects. The newest point may yet be replaced by one of the same period."""
    replaced = newest and period != "last"
    rule = f"{period} {used}{'' if count == UNLIMITED else f' of {count}'}{' (oldest)' if oldest else ''}"
    if count == UNLIMITED:
        return Reason(rule, f"with a newer point of the same {_NOUNS[period]}" if replaced else "")
    left = count - used + 1
    many = f"{left} more {_NOUNS[period]}{'' if left == 1 else 's'}"
    return Reason(rule, f"after {'at most ' if replaced else ''}{many}")


def _in_turn(period: Period, used: int, count: int, oldest: str = "") -> Reason:
    """A count of a dialect in which rules act one after the other."""
    if count == UNLIMITED:
        return Reason(f"{period} {used}")
    left = count - used + 1
    return Reason(
        f"{period} {used} of {count}{oldest}",
        f"after {left} newer point{'' if left == 1 else 's'} kept by {period}",
    )


def _within(rule: str, entry: _Entry, span: Duration, zone: tzinfo, newest: str = "") -> Reason:
    out = falls_out(entry.time, span, zone)
    if out is None:
        return Reason(rule, f"with a newer point of the same {newest}" if newest else "")
    when = f"with a point of {_time_text(out)} or later"
    return Reason(rule, f"{when}, or of the same {newest}" if newest else when, None if newest else out)


def _time_text(unix_s: int) -> str:
    try:
        return format_time(unix_s)
    except (ValueError, OverflowError, OSError):
        return f"second {unix_s}"
