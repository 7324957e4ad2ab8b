"""Retention: the rules by hand, its invariants by hypothesis, clocks that jump, guards, refusals, durations."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.repo.periods import Duration, before, falls_out, parse_calendar_duration
from holdfast.repo.retention import DIALECTS, LATE_S, Candidate, Policy, Verdict, plan_retention

BERLIN, KATHMANDU, LORD_HOWE = (
    ZoneInfo("Europe/Berlin"),
    ZoneInfo("Asia/Kathmandu"),
    ZoneInfo("Australia/Lord_Howe"),
)
ZONES = [UTC, BERLIN, KATHMANDU, LORD_HOWE]
DAY, HOUR = 86400, 3600
NOW = int(datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp())


def at(text: str, zone=UTC, fold: int = 0) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp())


def point(time_s: int, name: str = "", **others: object) -> Candidate:
    values = {"received": time_s, "vm_uuid": "vm"} | others
    return Candidate((name or str(time_s)).encode(), time_s, **values)


def points_at(*texts: str, zone=UTC) -> list[Candidate]:
    return [point(at(text, zone), text) for text in texts]


def plan(points, policy: Policy, now: int = NOW, zone=UTC) -> tuple[Verdict, ...]:
    return plan_retention(points, policy, now=now, zone=zone)


def kept(points, policy: Policy, now: int = NOW, zone=UTC) -> list[str]:
    return [v.point.id.decode() for v in plan(points, policy, now, zone) if v.kept]


def by_rules(verdict: Verdict) -> bool:
    """Whether a rule keeps it, and not only a guard."""
    return any(not reason.rule.startswith(("newest", "pinned", "lies")) for reason in verdict.reasons)


def daily(count: int, last: int = NOW) -> list[Candidate]:
    return [point(last - number * DAY, f"day-{number}") for number in range(count)]


# --- rules


def test_rules_are_ored_and_say_why() -> None:
    verdicts = plan(daily(40), Policy(daily=7, weekly=2))
    assert [v.point.id.decode() for v in verdicts if v.kept] == [
        f"day-{n}" for n in range(8)
    ]  # a Sunday is day-7
    newest, second = verdicts[0], verdicts[1]
    assert [r.rule for r in newest.reasons] == [
        "daily 1 of 7",
        "weekly 1 of 2",
        "newest point of its VM (none is verified)",
    ]
    assert newest.goes == "after at most 7 more days and after at most 2 more weeks and with a newer point"
    assert (second.goes, second.goes_at) == ("after 6 more days", None)
    assert (verdicts[-1].kept, verdicts[-1].goes, verdicts[-1].reasons) == (False, "now", ())


def test_the_newest_of_a_period_is_kept() -> None:
    points = points_at("2026-11-20T02:00", "2026-11-20T23:59", "2026-11-21T00:00", "2026-11-21T23:00")
    assert kept(points, Policy(daily=2)) == ["2026-11-20T23:59", "2026-11-21T23:00"]


def test_the_oldest_is_kept_while_a_count_is_left() -> None:
    points = points_at("2026-11-20T02:00", "2026-11-20T12:00", "2026-11-20T23:59")
    verdicts = plan(points, Policy(daily=2))
    assert [r.rule for r in verdicts[0].reasons] == ["daily 2 of 2 (oldest)"]
    assert not verdicts[1].kept


def test_weeks_are_those_of_iso_8601() -> None:
    points = points_at("2020-12-27T12:00", "2020-12-28T12:00", "2021-01-03T12:00", "2021-01-04T12:00")
    assert kept(points, Policy(weekly=2)) == ["2021-01-03T12:00", "2021-01-04T12:00"]


def test_within_reaches_back_from_the_newest_point_and_not_from_now() -> None:
    points = points_at("2024-01-01T00:00", "2024-01-14T00:00", "2024-01-15T00:00", "2024-01-28T00:00")
    verdicts = plan(points, Policy(within=Duration(days=14)))
    assert [v.kept for v in verdicts] == [False, False, True, True]
    assert verdicts[2].goes == "with a point of 2024-01-29T00:00:00Z or later"
    assert verdicts[2].goes_at == at("2024-01-29T00:00")


def test_labels_keep_without_a_count() -> None:
    points = [replace(p, labels=(("reason", "release"),)) if n == 30 else p for n, p in enumerate(daily(40))]
    verdicts = plan(points, Policy(last=1, labels=(("reason", "release"),)))
    assert [v.point.id.decode() for v in verdicts if v.kept] == ["day-0", "day-30"]
    assert verdicts[30].goes == "never"


def test_each_vm_is_judged_alone_whatever_its_name() -> None:
    points = [*daily(5), *(replace(p, id=b"b" + p.id, vm_uuid="other") for p in daily(5))]
    assert kept(points, Policy(last=2)) == ["day-0", "day-1", "bday-0", "bday-1"]


def test_unlimited_keeps_all_periods() -> None:
    points = [point(NOW - n * 6 * HOUR) for n in range(41)]
    verdicts = plan(points, Policy(daily=-1))
    assert sum(v.kept for v in verdicts) == 12  # 11 days, and the oldest
    assert plan(points, Policy(last=-1))[20].goes == "never"


def test_durations_by_the_calendar() -> None:
    zone = UTC
    for start, text, end in [
        ("2026-03-31T12:00", "1m", "2026-03-03T12:00"),
        ("2024-03-31T12:00", "1m", "2024-03-02T12:00"),
        ("2024-02-29T00:00", "1y", "2023-03-01T00:00"),
        ("2026-11-22T02:00", "1y2m3d4h", "2025-09-18T22:00"),
        ("2026-01-15T00:00", "14m", "2024-11-15T00:00"),
    ]:
        assert before(at(start), parse_calendar_duration(text), zone) == at(end)
    assert before(at("2026-01-01T00:00"), parse_calendar_duration("9999y"), zone) < -(1 << 60)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("14d", Duration(days=14)),
        ("36h", Duration(hours=36)),
        ("36H", Duration(hours=36)),
        ("2w", Duration(days=14)),
        ("6m", Duration(months=6)),
        ("1y2m3d4h", Duration(1, 2, 3, 4)),
        ("1w1d", Duration(days=8)),
        (" 1y ", Duration(years=1)),
        ("4h3d", Duration(days=3, hours=4)),
    ],
)
def test_parse_duration(text: str, duration: Duration) -> None:
    assert parse_calendar_duration(text) == duration
    assert parse_calendar_duration(str(duration)) == duration


@pytest.mark.parametrize(
    "text",
    [
        "",
        "14",
        "d",
        "-1d",
        "1.5d",
        "1d1d",
        "1D",
        "1M",
        "1d 2h",
        "0d",
        "0y0h",
        "1s",
        "1d,",
        "9999999d",
        "\u0661d",
    ],
)
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration") as caught:
        parse_calendar_duration(text)
    assert caught.value.hint


# --- refusals


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_empty_policy_is_refused(dialect) -> None:
    for policy in ({}, {"last": 0}, {"daily": 0, "weekly": None}):
        with pytest.raises(UsageError, match="empty"):
            Policy(dialect=dialect, **policy)


def test_a_policy_that_would_remove_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="remove everything"):
        plan(daily(5), Policy(labels=(("a", "b"),)))
    with pytest.raises(UsageError, match="remove everything"):
        plan(daily(5, last=NOW - 100 * DAY), Policy(within=Duration(days=14), dialect="borg"))
    assert plan([], Policy(last=1)) == ()


def test_counts_below_minus_one_are_refused() -> None:
    with pytest.raises(UsageError, match="-2"):
        Policy(daily=-2)


@pytest.mark.parametrize(
    ("dialect", "rule"),
    [
        ("borg", {"within_daily": Duration(days=1)}),
        ("pbs", {"within_yearly": Duration(days=1)}),
        ("pbs", {"within": Duration(days=1)}),
        ("borg", {"labels": (("a", "b"),)}),
        ("pbs", {"labels": (("a", "b"),)}),
    ],
)
def test_rules_that_a_dialect_does_not_have_are_refused(dialect, rule) -> None:
    with pytest.raises(UsageError, match="has no rule 'keep-"):
        Policy(last=1, dialect=dialect, **rule)


# --- guards


@pytest.mark.parametrize("dialect", DIALECTS)
def test_guards_hold_in_every_dialect(dialect) -> None:
    points = daily(10)
    points[5] = replace(points[5], verified_at=NOW)
    points[6] = replace(points[6], verified_at=NOW)
    points[8] = replace(points[8], pinned=True)
    points.append(point(NOW + 1, "future"))
    verdicts = plan(points, Policy(last=2, dialect=dialect))
    assert [v.point.id.decode() for v in verdicts if v.kept] == ["day-0", "day-1", "day-5", "day-8", "future"]
    assert [verdicts[n].reasons[-1].rule for n in (5, 8, 10)] == [
        "newest verified point of its VM",
        "pinned",
        "lies in the future",
    ]
    assert [verdicts[n].goes for n in (5, 8, 10)] == [
        "with a newer verified point",
        "never",
        "not before 2026-11-22T12:00:01Z",
    ]


def test_pinned_points_count_where_the_tool_knows_no_pins() -> None:
    points = daily(4)
    points[0] = replace(points[0], pinned=True)
    assert kept(points, Policy(last=2)) == ["day-0", "day-1", "day-2"]
    assert kept(points, Policy(last=2, dialect="pbs")) == ["day-0", "day-1", "day-2"]
    assert kept(points, Policy(last=2, dialect="restic")) == ["day-0", "day-1"]
    assert kept(points, Policy(last=2, dialect="borg")) == ["day-0", "day-1"]


@pytest.mark.parametrize("dialect", ["holdfast", "restic", "borg", "pbs"])
def test_of_two_points_of_one_second_the_one_that_came_later_is_newer(dialect: str) -> None:
    earlier = point(NOW - HOUR, "zzz", received_after_ms=20)
    later = point(NOW - HOUR, "aaa", received_after_ms=950)
    for points in ([earlier, later], [later, earlier]):
        assert kept(points, Policy(last=1, dialect=dialect)) == ["aaa"]


def test_points_from_the_future_do_not_count() -> None:
    points = [*daily(5), *(point(NOW + n * DAY, f"future-{n}") for n in range(1, 9))]
    assert kept(points, Policy(daily=2))[:2] == ["day-0", "day-1"]
    assert kept(points, Policy(within=Duration(days=1, hours=1)))[:2] == ["day-0", "day-1"]


def test_a_time_after_receipt_counts_as_the_receipt() -> None:
    """Somebody claims that a point received on day 30 is of today."""
    points = [*daily(3), point(NOW, "liar", received=NOW - 30 * DAY)]
    assert kept(points, Policy(last=2)) == ["day-0", "day-1"]
    assert "liar" in kept(points, Policy(last=2, dialect="restic"))


def test_late_points_do_not_push_out_those_that_came_in_time() -> None:
    """A client floods a week with points of chosen times, each the last of its day."""
    good = daily(30)
    flood = [point(p.time + HOUR, f"junk-{n}", received=NOW) for n, p in enumerate(good) if n > 1]
    policy = Policy(last=3, daily=7, weekly=4, monthly=6)
    alone = set(kept(good, policy))
    assert alone <= set(kept([*good, *flood], policy))
    assert not alone <= set(kept([*good, *flood], replace(policy, dialect="restic")))


def test_imported_history_is_judged_like_any_other() -> None:
    """All points late: the rules act among them, nothing is kept for being late."""
    history = [replace(p, received=NOW) for p in daily(60, last=NOW - 2 * DAY)]
    assert kept(history, Policy(daily=7)) == [f"day-{n}" for n in range(7)]


# --- clocks


@pytest.mark.parametrize(
    ("zone", "before_jump", "after_jump"),
    [
        (BERLIN, "2026-10-24T23:30", "2026-10-25T00:30"),  # a day of 25 hours follows
        (BERLIN, "2026-03-28T23:30", "2026-03-29T00:30"),  # a day of 23 hours follows
        (KATHMANDU, "2026-06-30T23:30", "2026-07-01T00:30"),
        (LORD_HOWE, "2026-04-04T23:30", "2026-04-05T00:30"),
    ],
)
def test_days_begin_at_local_midnight(zone, before_jump: str, after_jump: str) -> None:
    points = points_at(before_jump, after_jump, zone=zone)
    assert kept(points, Policy(daily=1), zone=zone) == [after_jump]
    assert kept(points, Policy(daily=2), zone=zone) == [before_jump, after_jump]


def test_a_day_of_25_hours_is_one_day() -> None:
    points = [point(at("2026-10-25T00:00", BERLIN) + n * HOUR, str(n)) for n in range(25)]
    assert kept(points, Policy(daily=1), zone=BERLIN) == ["24"]
    assert len(kept(points, Policy(daily=5), zone=BERLIN)) == 2  # and the oldest


def test_a_day_of_23_hours_is_one_day() -> None:
    start = at("2026-03-29T00:00", BERLIN)
    points = [point(start + n * HOUR, str(n)) for n in range(24)]
    assert kept(points, Policy(daily=2), zone=BERLIN) == ["22", "23"]


def test_the_hour_that_comes_twice_is_two_hours_for_us_alone() -> None:
    first, second = at("2026-10-25T02:30", BERLIN), at("2026-10-25T02:30", BERLIN, fold=1)
    assert second - first == HOUR
    points = [point(first - 2 * HOUR, "a"), point(first, "b"), point(second, "c"), point(second + HOUR, "d")]
    assert kept(points, Policy(hourly=3), zone=BERLIN) == ["b", "c", "d"]
    for dialect in ("restic", "borg", "pbs"):
        assert kept(points, Policy(hourly=3, dialect=dialect), zone=BERLIN) == ["a", "c", "d"]


def test_hours_of_a_zone_with_an_odd_offset() -> None:
    points = points_at("2026-06-30T10:59", "2026-06-30T11:00", "2026-06-30T11:59", zone=KATHMANDU)
    assert kept(points, Policy(hourly=2), zone=KATHMANDU) == ["2026-06-30T10:59", "2026-06-30T11:59"]


def test_days_of_a_duration_are_days_of_the_calendar() -> None:
    """From 2 o'clock to 2 o'clock it is 25 hours over the end of summer time."""
    newest = at("2026-10-25T12:00", BERLIN)
    points = [point(newest - 24 * HOUR - HOUR // 2, "a"), point(newest, "b")]
    assert kept(points, Policy(within=Duration(days=1)), zone=BERLIN) == ["a", "b"]
    assert kept(points, Policy(within=Duration(hours=24)), zone=BERLIN) == ["b"]


# --- properties

TIMES = st.integers(NOW - 800 * DAY, NOW + 3 * DAY)
COUNTS = st.one_of(st.none(), st.integers(-1, 12))
DURATIONS = st.one_of(
    st.none(),
    st.builds(Duration, st.integers(0, 1), st.integers(0, 14), st.integers(0, 40), st.integers(1, 50)),
)


@st.composite
def candidates(draw: st.DrawFn, prefix: str = "") -> Candidate:
    time_s = draw(TIMES)
    received = draw(st.one_of(st.just(time_s), TIMES.map(lambda t: min(t, NOW))))
    return Candidate(
        f"{prefix}{draw(st.integers(0, 1 << 40))}".encode(),
        time_s,
        received,
        draw(st.sampled_from(["a", "b"])),
        draw(st.sampled_from([False] * 9 + [True])),
        draw(st.sampled_from([0, 0, 0, NOW])),
        draw(st.sampled_from([(), (), (("k", "v"),)])),
    )


HISTORIES = st.lists(candidates(), max_size=40, unique_by=lambda p: p.id)


@st.composite
def policies(draw: st.DrawFn, dialects=DIALECTS) -> Policy:
    dialect = draw(st.sampled_from(dialects))
    ored = dialect in ("holdfast", "restic")
    rules: dict[str, object] = {
        name: draw(COUNTS) for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    }
    if dialect != "pbs":
        rules["within"] = draw(DURATIONS)
    if ored:
        for name in ("hourly", "daily", "weekly", "monthly", "yearly"):
            rules[f"within_{name}"] = draw(DURATIONS)
        rules["labels"] = draw(st.sampled_from([(), (("k", "v"),)]))
    try:
        return Policy(dialect=dialect, **rules)
    except UsageError:
        return Policy(dialect=dialect, last=1)


def planned(points, policy: Policy, zone) -> tuple[Verdict, ...] | None:
    """The plan; None if it is refused."""
    try:
        return plan(points, policy, zone=zone)
    except UsageError:
        return None


@given(HISTORIES, policies(), st.sampled_from(ZONES))
def test_guards_hold_for_every_history_and_policy(points, policy: Policy, zone) -> None:
    verdicts = planned(points, policy, zone)
    if verdicts is None:
        return
    assert [v.point for v in verdicts] == points
    for vm in {p.vm_uuid for p in points}:
        mine = [v for v in verdicts if v.point.vm_uuid == vm]
        assert any(v.kept for v in mine)
        present = [v for v in mine if v.point.time <= NOW]
        verified = [v for v in present if v.point.verified_at]

        def counts(v: Verdict) -> tuple[int, int, bytes]:
            claimed = v.point.time
            return (
                min(claimed, v.point.received) if policy.dialect == "holdfast" else claimed,
                v.point.received,
                v.point.id,
            )

        if verified or present:
            assert max(verified or present, key=counts).kept
    for verdict in verdicts:
        if verdict.point.pinned or verdict.point.time > NOW:
            assert verdict.kept
        assert (verdict.goes == "now") == (not verdict.kept)
        assert all(reason.rule for reason in verdict.reasons)


@given(HISTORIES, policies(), st.sampled_from(ZONES), st.randoms())
def test_the_order_of_the_input_does_not_matter(points, policy: Policy, zone, random) -> None:
    shuffled = list(points)
    random.shuffle(shuffled)
    one, other = planned(points, policy, zone), planned(shuffled, policy, zone)
    if one is None or other is None:
        assert one == other
        return
    assert {v.point.id: v for v in one} == {v.point.id: v for v in other}


@given(HISTORIES, policies(["holdfast", "restic"]), st.sampled_from(ZONES))
def test_a_second_prune_removes_nothing_more(points, policy: Policy, zone) -> None:
    once = planned(points, policy, zone)
    if once is None:
        return
    left = [v.point for v in once if v.kept]
    again = planned(left, policy, zone)
    if again is None:  # guards alone keep what is left
        assert not any(by_rules(v) for v in once)
        return
    assert all(v.kept for v in again)


@given(HISTORIES, policies(["holdfast"]), st.sampled_from(ZONES), st.data())
def test_nobody_pushes_good_points_out_by_the_choice_of_times(points, policy: Policy, zone, data) -> None:
    """Points added now, with times in the future or more than a day ago, or pinned, change no verdict of the others."""
    lies = st.one_of(st.integers(NOW + 1, NOW + 900 * DAY), st.integers(NOW - 900 * DAY, NOW - LATE_S - 1))
    added = [
        replace(p, id=b"junk" + p.id, time=data.draw(lies), received=NOW, verified_at=0)
        for p in data.draw(st.lists(candidates(), max_size=20))
    ]
    in_time = [p for p in points if p.received - p.time <= LATE_S]
    alone = planned(in_time, policy, zone)
    together = planned([*in_time, *added], policy, zone)
    if alone is None or together is None:
        return
    for one, other in zip(alone, together, strict=False):
        assert [r for r in one.reasons if "newest" not in r.rule] == [
            r for r in other.reasons if "newest" not in r.rule
        ]


@given(HISTORIES, policies(["holdfast", "restic"]), st.sampled_from(ZONES))
def test_more_rules_never_keep_less(points, policy: Policy, zone) -> None:
    fewer = planned(points, policy, zone)
    more = planned(points, replace(policy, last=-1), zone)
    if fewer is not None and more is not None:
        assert {v.point.id for v in fewer if v.kept} <= {v.point.id for v in more if v.kept}


@given(
    HISTORIES, st.integers(1, 12), st.sampled_from(["last", "hourly", "daily", "weekly", "monthly", "yearly"])
)
def test_a_count_keeps_at_most_so_many_of_a_vm(points, count: int, rule: str) -> None:
    plain = [replace(p, received=p.time, pinned=False) for p in points]
    for dialect in DIALECTS:
        verdicts = planned(plain, Policy(dialect=dialect, **{rule: count}), BERLIN)
        for vm in {p.vm_uuid for p in plain}:
            assert sum(by_rules(v) for v in verdicts or () if v.point.vm_uuid == vm) <= count


@given(st.integers(0, NOW), DURATIONS.filter(bool), st.sampled_from(ZONES))
def test_points_fall_out_at_the_first_instant_at_which_they_are_no_longer_within(
    time_s: int, span, zone
) -> None:
    out = falls_out(time_s, span, zone)
    assert out is not None
    assert before(out, span, zone) >= time_s
    assert before(out - 1, span, zone) < time_s
    assert all(
        before(out - step * 1801, span, zone) < time_s
        for step in range(1, 100)
        if out - step * 1801 >= time_s
    )


@given(
    st.lists(TIMES.filter(lambda t: t <= NOW), min_size=1, max_size=30, unique=True),
    st.integers(1, 9),
    st.sampled_from(ZONES),
)
def test_what_is_said_of_days_comes_true(times: list[int], count: int, zone) -> None:
    """Add one point a day: each kept point goes exactly after as many as it was said."""
    points = [point(t) for t in times]
    newest = max(times)
    noon = datetime.fromtimestamp(newest, zone).replace(hour=12, minute=0, second=0, fold=0)
    policy = Policy(daily=count)
    verdicts = plan(points, policy, now=NOW + 30 * DAY, zone=zone)
    for days in range(1, count + 1):
        added = [point(int((noon + timedelta(days=d)).timestamp()), f"new-{d}") for d in range(1, days + 1)]
        later = plan([*points, *added], policy, now=NOW + 30 * DAY, zone=zone)
        for one, other in zip(verdicts, later, strict=False):
            said = [r.ends for r in one.reasons if r.rule.startswith("daily")]
            if said:
                number = int("".join(c for c in said[0] if c.isdigit()))
                assert other.kept == (days < number), (said, days)


def test_a_thousand_points_are_planned_in_no_time() -> None:
    points = [point(NOW - n * 5 * HOUR) for n in range(1000)]
    spans = {
        f"within_{name}": Duration(months=9, hours=5)
        for name in ("hourly", "daily", "weekly", "monthly", "yearly")
    }
    policy = Policy(5, 48, 30, 20, 24, -1, Duration(months=6), **spans)
    best = 1.0
    for _ in range(3):
        began = time.process_time()
        plan(points, policy, zone=BERLIN)
        best = min(best, time.process_time() - began)
    assert best < 0.2
