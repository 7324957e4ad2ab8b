"""Sizes, durations and times as people write and read them.

Sizes are binary (KiB = 1024). Times are UTC inside the program: nanosecond-free whole seconds as
`int`, ISO 8601 with a trailing `Z` on the outside.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from holdfast.errors import UsageError

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "TIB",
    "format_age",
    "format_duration",
    "format_size",
    "format_time",
    "parse_duration",
    "parse_rate",
    "parse_share",
    "parse_size",
    "parse_time",
]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

_FACTORS: Final = {
    "": 1, "b": 1,
    "k": KIB, "kb": 1000, "kib": KIB,
    "m": MIB, "mb": 1000**2, "mib": MIB,
    "g": GIB, "gb": 1000**3, "gib": GIB,
    "t": TIB, "tb": 1000**4, "tib": TIB,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d{1,18})(?:\.(\d{1,6}))?\s*([A-Za-z]{0,3})\s*\Z")


_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION: Final = re.compile(r"(\d{1,9}[smhdw])+\Z")
_DURATION_PART: Final = re.compile(r"(\d+)([smhdw])")


def parse_size(text: str) -> int:
    """Bytes that a size such as `64KiB`, `1.5G`, `4096` or `10MB` stands for.

    Raises:
        UsageError: the text is no size.
    """
    match = _SIZE.match(text)
    factor = _FACTORS.get(match[3].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"'{text}' is not a size", hint="write for example 64KiB, 512MiB or 2GiB")
    fraction = match[2] or ""
    return int(match[1]) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def parse_rate(text: str) -> int:
    """Bytes per second that a rate such as `50MiB/s` or `800k` stands for.

    Raises:
        UsageError: the text is no rate, or nothing would ever pass.
    """
    rate = parse_size(re.sub(r"\s*/\s*s\Z", "", text.strip()))
    if not rate:
        raise UsageError("a rate of nothing lets nothing through", hint="write for example 50MiB/s")
    return rate


def parse_share(text: str) -> float:
    """The share that `1%`, `0.5%` or `0.01` stands for: more than 0, at most 1.

    Raises:
        UsageError: the text is no such share.
    """
    number, percent = (text.strip()[:-1], 100.0) if text.strip().endswith("%") else (text, 1.0)
    try:
        share = float(number) / percent
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"'{text}' is not a share", hint="write for example 1% or 0.01")
    return share


def format_size(size_bytes: int) -> str:
    """A size with three significant digits: `0 B`, `512 B`, `1.50 GiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1000 or unit == "PiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size_bytes} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def parse_duration(text: str) -> float:
    """Seconds that a duration such as `90s`, `10m`, `2h`, `30d` or `1h30m` stands for.

    Raises:
        UsageError: the text is no duration.
    """
    if not _DURATION.match(text.lower()):
        raise UsageError(f"'{text}' is not a duration", hint="write for example 90s, 10m, 2h or 30d")
    return float(sum(int(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(text.lower())))


def format_duration(seconds: float) -> str:
    """A duration for people: `0.42 s`, `12 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_age(seconds: float) -> str:
    """About how long ago something was, in a few characters: `1 min`, `5 h`, `12 d`."""
    if seconds < 3600:
        return f"{int(seconds // 60)} min"
    return f"{int(seconds // 3600)} h" if seconds < 2 * 86400 else f"{int(seconds // 86400)} d"


def format_time(unix_s: int) -> str:
    """ISO 8601 in UTC with seconds: `2026-11-22T02:00:00Z`."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> int:
    """Unix seconds of an ISO 8601 time. A time without a zone is local time.

    Raises:
        UsageError: the text is no such time, or lies outside the years 1970 to 9999.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
        unix_s = int(moment.timestamp())
        if unix_s < 0:
            raise ValueError(text)
        format_time(unix_s)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"'{text}' is not a time", hint="write ISO 8601, for example 2026-11-22T02:00:00Z"
        ) from None
    return unix_s
