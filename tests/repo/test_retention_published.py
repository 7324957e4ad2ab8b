"""The dialects against cases that restic, Borg and Proxmox Backup Server have published, as tables of data.

Sources: restic `internal/data/snapshot_policy_test.go` with its golden files, and `doc/060_forget.rst`; Borg 1.4
`docs/misc/prune-example.txt` and `src/borg/testsuite`; Proxmox Backup Server `tests/prune.rs`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from holdfast.repo.periods import parse_calendar_duration
from holdfast.repo.retention import Candidate, Policy, plan_retention


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def kept_by_rules(texts: list[str], now: str, dialect: str, rules: dict[str, object]) -> dict[str, list[str]]:
    """Time -> the rules that keep it; what only a guard keeps is left out."""
    points = [Candidate(str(n).encode(), seconds(t), seconds(t), "vm") for n, t in enumerate(texts)]
    policy = Policy(
        dialect=dialect,
        **{
            name: parse_calendar_duration(rule) if isinstance(rule, str) else rule
            for name, rule in rules.items()
        },
    )
    verdicts = plan_retention(points, policy, now=seconds(now), zone=UTC)
    return {
        text: rules
        for text, verdict in zip(texts, verdicts, strict=True)
        if (rules := [r.rule for r in verdict.reasons if not r.rule.startswith("newest")])
    }


def kept_times(texts: list[str], now: str, dialect: str, rules: dict[str, object]) -> set[str]:
    return set(kept_by_rules(texts, now, dialect, rules))


# --- restic


def _restic_history() -> list[str]:
    """The list that restic's tests work on. (Two of its points are a tenth of a second after another; here a second.)"""
    day_lists = {
        "2014-08": [8, 10, 12, 13, 15, 18, 20, 21, 22],
        "2014-09": [1, 2, 5, 6, 8, 9, 10, 11, 20, 22],
        "2014-10": [1, 2, 5, 6, 8, 9, 10, 11, 20, 22],
        "2014-11": [8, 10, 12, 13, 15, 18, 20, 21, 22],
    }
    days = [f"{month}-{day:02}" for month, numbers in day_lists.items() for day in numbers]
    days += [day.replace("2014", "2015") for day in days]
    times = [f"{day} 10:20:30" for day in days]
    times += [f"{day} 10:20:31" for day in days if day.endswith(("08-13", "11-13"))]
    times += [
        f"2016-01-{text}:03"
        for text in (
            "01 01:02", "01 01:03", "01 07:08", "03 07:02", "04 10:23", "04 11:23", "04 12:23", "04 12:24",
            "04 12:28", "04 12:30", "04 16:23", "05 09:02", "06 08:02", "07 10:02", "08 20:02", "09 21:02",
            "12 21:02", "12 21:08", "18 12:02",
        )
    ]  # fmt: skip
    return times


JANUARY_DAYS = ["18 12:02", "12 21:08", "09 21:02", "08 20:02", "07 10:02", "06 08:02", "05 09:02", "04 16:23", "03 07:02", "01 07:08"]  # fmt: skip
JANUARY = [*JANUARY_DAYS, "12 21:02", "04 12:30", "04 12:28", "04 12:24", "04 12:23", "04 11:23", "04 10:23", "01 01:03", "01 01:02"]  # fmt: skip
MONTHS_2015 = ["2015-11-22", "2015-10-22", "2015-09-22", "2015-08-22"]
MONTHS_2014 = ["2014-11-22", "2014-10-22", "2014-09-22", "2014-08-22"]
OLDEST = "2014-08-08"

RESTIC_CASES = [
    ({"daily": 3}, JANUARY_DAYS[:3], []),
    ({"daily": 10}, JANUARY_DAYS, []),
    ({"monthly": 6}, ["18 12:02"], [*MONTHS_2015, "2014-11-22"]),
    ({"daily": 2, "weekly": 2, "monthly": 6}, ["18 12:02", "12 21:08"], [*MONTHS_2015, "2014-11-22"]),
    ({"yearly": 10}, ["18 12:02"], ["2015-11-22", "2014-11-22", OLDEST]),
    ({"within": "1d"}, ["18 12:02"], []),
    ({"within": "2d"}, ["18 12:02"], []),
    ({"within": "7d"}, ["18 12:02", "12 21:08", "12 21:02"], []),
    ({"within": "1m"}, JANUARY, []),
    ({"within": "1m14d"}, JANUARY, []),
    ({"within_monthly": "1y2m3d3h"}, ["18 12:02"], [*MONTHS_2015, "2014-11-22"]),
    (
        {
            "within": "1h",
            "within_hourly": "1d",
            "within_daily": "7d",
            "within_weekly": "1m",
            "within_monthly": "1y",
            "within_yearly": "9999y",
        },
        ["18 12:02", "12 21:08", "09 21:02", "03 07:02"],
        [*MONTHS_2015, "2014-11-22", OLDEST],
    ),
    (
        {"daily": 3, "weekly": 2, "monthly": -1, "yearly": -1},
        ["18 12:02", "12 21:08", "09 21:02"],
        [*MONTHS_2015, *MONTHS_2014, OLDEST],
    ),
    ({"monthly": 5}, ["18 12:02"], MONTHS_2015),
]


@pytest.mark.parametrize("dialect", ["restic", "holdfast"])
@pytest.mark.parametrize(
    ("rules", "january", "days"), RESTIC_CASES, ids=[str(case[0]) for case in RESTIC_CASES]
)
def test_restic(dialect: str, rules: dict[str, object], january: list[str], days: list[str]) -> None:
    history = _restic_history()
    expected = {f"2016-01-{text}:03" for text in january} | {f"{day} 10:20:30" for day in days}
    assert kept_times(history, "2016-02-01 00:00:00", dialect, rules) == expected


@pytest.mark.parametrize("dialect", ["restic", "holdfast"])
def test_restic_says_oldest(dialect: str) -> None:
    kept = kept_by_rules(
        _restic_history(),
        "2016-02-01 00:00:00",
        dialect,
        {"monthly": -1, "yearly": 10, "within_yearly": "9999y"},
    )
    assert kept["2014-08-08 10:20:30"] == [
        "monthly 10 (oldest)",
        "yearly 4 of 10 (oldest)",
        "yearly within 9999y (oldest)",
    ]


def test_restic_sundays() -> None:
    """The documented example: with a backup each Sunday four days are four weeks."""
    sundays = [str(datetime.fromisoformat("2019-09-01 11:00") + timedelta(weeks=n)) for n in range(12)]
    assert kept_times(sundays, "2019-11-18 00:00:00", "restic", {"daily": 4}) == set(sundays[-4:])


# --- Borg


def test_borg_documented_example() -> None:
    """A backup on each day of 2015 but 19 December, judged on 1 January 2016."""
    days = [str(datetime.fromisoformat("2015-01-01 12:00") + timedelta(days=n)) for n in range(365)]
    days.remove("2015-12-19 12:00:00")
    kept = kept_by_rules(days, "2016-01-01 00:00:00", "borg", {"daily": 14, "monthly": 6, "yearly": 1})
    daily = [17, 18, *range(20, 32)]
    monthly = ["06-30", "07-31", "08-31", "09-30", "10-31", "11-30"]
    assert kept == {
        "2015-01-01 12:00:00": ["yearly 1 of 1 (oldest)"],
        **{f"2015-{day} 12:00:00": [f"monthly {6 - n} of 6"] for n, day in enumerate(monthly)},
        **{f"2015-12-{day} 12:00:00": [f"daily {14 - n} of 14"] for n, day in enumerate(daily)},
    }


BORG_HISTORY = [
    "2015-01-01 10:00:00", "2016-01-01 10:00:00", "2017-01-01 10:00:00", "2017-02-01 10:00:00",
    "2017-03-01 10:00:00", "2017-03-02 10:00:00", "2017-03-03 10:00:00", "2017-03-04 10:00:00",
    "2017-10-01 09:45:00", "2017-10-01 09:55:00", "2017-10-01 10:00:01", "2017-10-01 10:00:03", "2017-10-01 10:00:05",
]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "numbers"),
    [
        ({"yearly": 3}, [13, 2, 1]),
        ({"monthly": 3}, [13, 8, 4]),
        ({"weekly": 2}, [13, 8]),
        ({"daily": 3}, [13, 8, 7]),
        ({"hourly": 3}, [13, 10, 8]),
        ({"last": 4}, [13, 12, 11, 10]),
    ],
)
def test_borg_splits(rules: dict[str, object], numbers: list[int]) -> None:
    expected = {BORG_HISTORY[number - 1] for number in numbers}
    assert kept_times(BORG_HISTORY, "2018-01-01 00:00:00", "borg", rules) == expected


def test_borg_keeps_the_oldest_if_a_rule_misses_its_target() -> None:
    history = ["2018-01-01 10:00:00", "2018-12-30 10:00:00", "2018-12-31 10:00:00", "2019-12-31 10:00:00"]
    now = "2020-01-01 00:00:00"
    assert kept_times(history, now, "borg", {"yearly": 3}) == {history[0], history[2], history[3]}
    assert kept_times(history, now, "borg", {"yearly": 2}) == {history[2], history[3]}


def test_borg_retains_and_expires_the_oldest() -> None:
    """A backup each day from September on, pruned each day."""
    kept = ["2020-09-01 11:15:00"]
    for day in range(37):
        moment = datetime.fromisoformat("2020-09-01 12:00") + timedelta(days=day)
        before = kept_by_rules([*kept, str(moment)], str(moment), "borg", {"daily": 7, "monthly": 1})
        if day == 35:
            assert before["2020-09-01 11:15:00"] == ["monthly 1 of 1 (oldest)"]
        kept = list(before)
    assert "2020-09-01 11:15:00" not in kept
    assert before["2020-09-30 12:00:00"] == ["monthly 1 of 1"]


@pytest.mark.parametrize(
    ("within", "count"), [("1H", 1), ("2H", 2), ("3H", 3), ("24H", 4), ("26H", 5), ("2d", 5), ("50H", 6), ("3d", 6), ("1w", 6), ("1m", 6), ("1y", 6)]
)  # fmt: skip
def test_borg_within(within: str, count: int) -> None:
    now = datetime.fromisoformat("2020-06-01 12:00")
    history = [str(now - timedelta(minutes=m)) for m in (1, 90, 150, 210, 25 * 60, 49 * 60)]
    assert kept_times(history, str(now), "borg", {"within": within}) == set(history[:count])


def test_borg_months_have_31_days() -> None:
    now = datetime.fromisoformat("2020-03-01 12:00")
    history = [str(now), str(now - timedelta(days=30, hours=23)), str(now - timedelta(days=31))]
    assert kept_times(history, str(now), "borg", {"within": "1m"}) == set(history[:2])
    assert kept_times(history, str(now), "restic", {"within": "1m"}) == set(history[:1])


# --- Proxmox Backup Server

PBS_HOURS = [f"2019-11-15 {text}:15" for text in ("09:39", "10:49", "10:59", "11:39", "11:49", "11:59")]
PBS_DAYS = [
    f"{day} 11:59:15"
    for day in ("2018-11-15", "2019-11-15", "2019-11-21", "2019-11-22", "2019-11-29", "2019-12-01", "2019-12-02", "2019-12-03", "2019-12-04")
]  # fmt: skip
PBS_WEEK = ["2019-12-02 11:59:15", "2019-12-03 11:59:15", "2019-12-04 11:59:15", "2019-12-04 12:59:15"]


@pytest.mark.parametrize(
    ("history", "rules", "numbers"),
    [
        (PBS_HOURS, {"hourly": 3}, [0, 2, 5]),
        (PBS_HOURS, {"hourly": 2}, [2, 5]),
        (PBS_DAYS, {"daily": 1}, [8]),
        (PBS_DAYS, {"last": 1, "daily": 1}, [7, 8]),
        (PBS_DAYS, {"daily": 1, "weekly": 1}, [5, 8]),
        (PBS_DAYS, {"daily": 1, "weekly": 1, "monthly": 1}, [3, 5, 8]),
        (PBS_DAYS, {"monthly": 1, "yearly": 1}, [0, 8]),
        (PBS_WEEK, {"last": 4}, [0, 1, 2, 3]),
        (PBS_WEEK, {"last": 3}, [1, 2, 3]),
        (PBS_WEEK, {"last": 2}, [2, 3]),
        (PBS_WEEK, {"last": 1}, [3]),
        (PBS_WEEK, {"last": 2, "daily": 2}, [0, 1, 2, 3]),
        (PBS_WEEK, {"daily": 3}, [0, 1, 3]),
        (PBS_WEEK, {"daily": 2}, [1, 3]),
        (PBS_WEEK, {"weekly": 5}, [3]),
        (PBS_WEEK, {"daily": 1, "weekly": 5}, [3]),
        (PBS_WEEK, {"monthly": 6}, [3]),
        (PBS_WEEK, {"yearly": 7}, [3]),
        (PBS_WEEK, {"weekly": 5, "monthly": 6, "yearly": 7}, [3]),
    ],
)
def test_pbs(history: list[str], rules: dict[str, object], numbers: list[int]) -> None:
    assert kept_times(history, "2020-01-01 00:00:00", "pbs", rules) == {history[n] for n in numbers}


# --- where they differ


@pytest.mark.parametrize(
    ("history", "rules", "counts", "differing"),
    [
        (
            [str(datetime.fromisoformat("2026-11-22 02:00") - timedelta(days=n)) for n in range(400)],
            {"daily": 7, "weekly": 4, "monthly": 6, "yearly": 1},
            (15, 18, 18),
            {
                "2026-10-31 02:00:00": ("monthly", "monthly", ""),
                "2026-10-25 02:00:00": ("", "weekly", "weekly"),
                "2026-05-31 02:00:00": ("", "monthly", "monthly"),
                "2026-04-30 02:00:00": ("", "", "monthly"),
                "2025-12-31 02:00:00": ("", "yearly", "yearly"),
            },
        ),
        (
            [str(datetime.fromisoformat("2026-11-22 02:00") - timedelta(hours=6 * n)) for n in range(160)],
            {"last": 3, "daily": 5, "weekly": 2, "monthly": 2},
            (8, 12, 11),
            {
                "2026-11-17 20:00:00": ("", "daily", "daily"),
                "2026-11-16 20:00:00": ("", "daily", "daily"),
                "2026-11-08 20:00:00": ("", "weekly", "weekly"),
                "2026-10-13 08:00:00": ("", "monthly", ""),
            },
        ),
        (
            [f"2026-{day} 02:00:00" for day in ("11-02", "11-01", "10-31", "10-15", "09-30", "09-01")],
            {"last": 2, "monthly": 2},
            (3, 4, 4),
            {"2026-09-30 02:00:00": ("", "monthly", "monthly")},
        ),
    ],
)
def test_the_table_of_differences(history, rules, counts, differing) -> None:
    """The table in docs/RETENTION.md: restic, borg, pbs."""
    kept = [
        kept_by_rules(history, "2026-11-22 12:00:00", dialect, rules) for dialect in ("restic", "borg", "pbs")
    ]
    assert tuple(len(one) for one in kept) == counts
    for text, expected in differing.items():
        assert tuple(" ".join(rule.split()[0] for rule in one.get(text, [])) for one in kept) == expected
