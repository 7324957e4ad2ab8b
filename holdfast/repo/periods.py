"""Hours, days, weeks, months and years by the clocks of a zone, and durations in them.

Pure. Times are Unix seconds; what a zone's clocks show comes from its `tzinfo`, so that days of 23 and of 25 hours
are days.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, datetime, tzinfo
from typing import Final, Literal, TypeAlias

from holdfast.errors import UsageError

__all__ = ["PERIODS", "Duration", "Period", "before", "falls_out", "parse_calendar_duration", "period_of"]

Period: TypeAlias = Literal["last", "hourly", "daily", "weekly", "monthly", "yearly"]

PERIODS: Final[tuple[Period, ...]] = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
"""From fine to coarse. `last` is the period of a single point."""

_UNITS: Final = {"y": "years", "m": "months", "w": "weeks", "d": "days", "h": "hours"}
_PART: Final = re.compile(r"([0-9]{1,6})([ymwdhH])")
_DAY_S: Final = 86400
_HOUR_S: Final = 3600
_EPOCH: Final = date(1970, 1, 1).toordinal()
_ALWAYS: Final = -(1 << 62)


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of time; years, months and days are those of the calendar."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    def __str__(self) -> str:
        parts = ((self.years, "y"), (self.months, "m"), (self.days, "d"), (self.hours, "h"))
        return "".join(f"{number}{unit}" for number, unit in parts if number)


def parse_calendar_duration(text: str) -> Duration:
    """The duration that `14d`, `36h`, `2w` or `1y2m3d4h` stands for; `m` are months.

    Raises:
        UsageError: the text is none, or is no longer than nothing.
    """
    parts = _PART.findall(text.strip())
    given = {_UNITS[unit.lower()]: int(number) for number, unit in parts}
    if "".join(number + unit for number, unit in parts) != text.strip() or len(given) != len(parts):
        given = {}
    if not any(given.values()):
        raise UsageError(
            f"'{text}' is no duration",
            hint="write for example 14d, 36h, 2w, 6m (months) or 1y2m3d4h",
        )
    days = given.get("days", 0) + 7 * given.get("weeks", 0)
    return Duration(given.get("years", 0), given.get("months", 0), days, given.get("hours", 0))


def period_of(
    period: Literal["hourly", "daily", "weekly", "monthly", "yearly"],
    local: datetime,
    *,
    split_hours: bool = False,
) -> tuple[int, ...]:
    """What two moments of the same period have in common. Weeks are those of ISO 8601.

    Args:
        split_hours: the hour that clocks show twice when they are set back is two hours.
    """
    match period:
        case "hourly":
            return (local.year, local.month, local.day, local.hour, _offset_s(local) if split_hours else 0)
        case "daily":
            return (local.year, local.month, local.day)
        case "weekly":
            return tuple(local.isocalendar()[:2])
        case "monthly":
            return (local.year, local.month)
        case "yearly":
            return (local.year,)


def _offset_s(local: datetime) -> int:
    offset = local.utcoffset()
    assert offset is not None, "a datetime without a zone"
    return offset.days * _DAY_S + offset.seconds


def _instant(wall_s: int, zone: tzinfo) -> int:
    """Unix seconds at which clocks of the zone show that time; in an hour that they skip or repeat, one of the two answers."""
    near = wall_s - _offset_s(datetime.fromtimestamp(wall_s, zone))
    return wall_s - _offset_s(datetime.fromtimestamp(near, zone))


def _shifted(unix_s: int, sign: Literal[-1, 1], span: Duration, zone: tzinfo) -> tuple[int, int]:
    """Day (since 1970) and second of the day, by the zone's clocks, years, months and days earlier or later.

    A day that a month does not have is counted on into the next one: 31 March less a month is 3 March.
    """
    local = datetime.fromtimestamp(unix_s, zone)
    year, month = divmod(local.year * 12 + local.month - 1 + sign * (span.years * 12 + span.months), 12)
    day = date(year, month + 1, 1).toordinal() - _EPOCH + local.day - 1 + sign * span.days
    return day, local.hour * _HOUR_S + local.minute * 60 + local.second


def before(unix_s: int, span: Duration, zone: tzinfo) -> int:
    """The time that lies so long before; what would be before the calendar begins is before everything."""
    try:
        day, second = _shifted(unix_s, -1, span, zone)
        return _instant(day * _DAY_S + second, zone) - span.hours * _HOUR_S
    except (ValueError, OverflowError, OSError):
        return _ALWAYS


def falls_out(unix_s: int, span: Duration, zone: tzinfo) -> int | None:
    """The first time of a newest point for which this one is no longer within the span; None beyond the calendar.

    It is the inverse of `before`, which jumps at midnight where months differ in length.
    """
    try:
        day, second = _shifted(unix_s + span.hours * _HOUR_S, 1, span, zone)
        likely = _instant(day * _DAY_S + second, zone)
        jumps = (span.months or span.years) and not 5 <= date.fromordinal(day + _EPOCH).day <= 28
        if not jumps and before(likely, span, zone) >= unix_s > before(likely - 1, span, zone):
            return likely
        for begins in range(day - 4, day + 5):
            if before(_instant((begins + 1) * _DAY_S, zone) - 1, span, zone) < unix_s:
                continue
            wall = _instant(begins * _DAY_S + second, zone)
            near = [wall + shift for shift in (-_HOUR_S, 0, _HOUR_S)]  # where clocks jump
            candidates = [_instant(begins * _DAY_S, zone), *near, *(moment // 1800 * 1800 for moment in near)]
            fitting = [m for m in candidates if m >= unix_s and before(m, span, zone) >= unix_s]
            if fitting:
                return min(fitting)
        return None
    except (ValueError, OverflowError, OSError):
        return None
