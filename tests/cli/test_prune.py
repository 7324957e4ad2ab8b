"""`holdfast prune`: what it says, what it does, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import DamagedData
from holdfast.ids import PointId
from holdfast.repo.points import Point
from holdfast.repo.repository import Repository
from holdfast.units import parse_time

NEVER = "newest point of its VM (none is verified)"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"data" * 20_000)
    return path


@pytest.fixture
def history(empty_repo: Path, disk: Path, done) -> Path:
    """Ten days of `web`, two points a day; two points of `db`, one of them with a label."""
    for day in range(1, 11):
        for hour in (2, 14):
            disk.write_bytes(bytes([day, hour]) * 40_000)
            time = f"2026-03-{day:02}T{hour:02}:00:00Z"
            done("-r", empty_repo, "backup", disk, "--vm", "web", "--time", time)
    done(
        "-r",
        empty_repo,
        "backup",
        disk,
        "--vm",
        "db",
        "--time",
        "2026-03-01T00:00:00Z",
        "--label",
        "reason=release",
    )
    done("-r", empty_repo, "backup", disk, "--vm", "db", "--time", "2026-03-02T00:00:00Z")
    return empty_repo


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture
def listed(done) -> Callable[..., list[str]]:
    """The times of a repository's points, without year and seconds."""

    def call(repo: Path, *words: str) -> list[str]:
        document = done("-r", repo, "list", *words, "--json").document
        return [point["vm"] + point["time"][4:16] for point in document["points"]]

    return call


def by_time(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {point["vm"] + point["time"][4:16]: point for point in summary["points"]}


# --- what it does


def test_forgets_what_no_rule_keeps(history: Path, done, listed) -> None:
    outcome = done("-r", history, "prune", "--keep-daily", 2, "--vm", "web")
    assert "forgetting 18 of 20 restore points\nforgot 18 restore points\n" in outcome.out
    assert "holdfast forget --undo" in outcome.out
    assert listed(history) == ["db-03-01T00:00", "db-03-02T00:00", "web-03-09T14:00", "web-03-10T14:00"]


def test_what_was_forgotten_can_be_brought_back(history: Path, done, listed) -> None:
    before = listed(history)
    summary = done("-r", history, "prune", "--keep-last", 1, "--json").summary
    gone = [point["id"] for point in summary["points"] if not point["kept"]]
    assert len(gone) == summary["forgotten"] == 20
    done("-r", history, "forget", "--undo", *gone)
    assert listed(history) == before


def test_gc_gives_the_space_back(history: Path, done, holdfast) -> None:
    planned = done("-r", history, "prune", "--keep-last", 1, "--dry-run", "--json").summary
    summary = done("-r", history, "prune", "--keep-last", 1, "--gc", "--json").summary
    assert planned["gc"] is None
    assert planned["frees_bytes"] > 0
    assert summary["gc"]["points"] == 20
    assert summary["gc"]["dropped_bytes"] >= planned["frees_bytes"]
    gone = next(point["id"] for point in summary["points"] if not point["kept"])
    assert holdfast("-r", history, "forget", "--undo", gone).code == 14
    assert done("-r", history, "check", "--read-data", "--json").summary["ok"]


def test_gc_runs_also_if_nothing_is_forgotten(history: Path, done) -> None:
    outcome = done("-r", history, "prune", "--keep-last", "unlimited", "--gc")
    assert re.fullmatch(r"nothing to forget: all 22 are kept\ncollected garbage: gave back .*\n", outcome.out)


def test_a_dry_run_changes_nothing(history: Path, done, listed) -> None:
    before = listed(history)
    outcome = done("-r", history, "prune", "--keep-last", 1, "--dry-run", "--gc")
    assert re.search(
        r"^would forget 20 of 22 restore points and collect garbage, which frees ", outcome.out, re.MULTILINE
    )
    assert listed(history) == before


def test_a_second_prune_does_nothing(history: Path, done) -> None:
    done("-r", history, "prune", "--keep-daily", 3)
    assert done("-r", history, "prune", "--keep-daily", 3).out == "nothing to forget: all 5 are kept\n"


def test_an_empty_repository_is_fine(empty_repo: Path, done) -> None:
    assert done("-r", empty_repo, "prune", "--keep-last", 1).out == "no restore points yet\n"
    assert done("-r", empty_repo, "prune", "--keep-last", 1, "--json").summary["points"] == []


# --- what it says


def test_a_dry_run_names_the_rules(history: Path, done) -> None:
    out = done("-r", history, "prune", "--keep-daily", 2, "--vm", "web", "-n").out
    lines = [line.split(maxsplit=4) for line in out.splitlines()]
    assert lines[0] == ["ID", "VM", "TIME", "PLAN", "WHY"]
    assert [line[1:] for line in lines[-5:-2]] == [
        ["web", "2026-03-09T14:00:00Z", "keep", "daily 2 of 2"],
        ["web", "2026-03-10T02:00:00Z", "forget", "no rule keeps it"],
        ["web", "2026-03-10T14:00:00Z", "keep", f"daily 1 of 2, {NEVER}"],
    ]
    assert out.splitlines()[-2] == "periods are those of the time zone UTC; TIME is UTC"
    assert re.fullmatch(
        r"would forget 18 of 20 restore points, which frees \S+ \S+ once gc has run", out.splitlines()[-1]
    )


def test_explain_says_when_and_how_much(history: Path, done) -> None:
    out = done("-r", history, "prune", "--keep-daily", 2, "--vm", "web", "-n", "--explain").out
    assert out.splitlines()[0].split() == ["ID", "VM", "TIME", "PLAN", "WHY", "GOES", "FREES"]
    [line] = [line for line in out.splitlines() if "03-09T14" in line]
    assert re.search(r" daily 2 of 2 +after 1 more day +[\d.]+ (B|KiB)$", line)


def test_bytes_are_computed(history: Path, done) -> None:
    """What is said to be freed by each point alone is what the repository says."""
    summary = done("-r", history, "prune", "--keep-within", "2d", "-n", "--explain", "--json").summary
    with Repository.open(str(history)) as repository:
        points = repository.points()
        exclusive = {
            point.id.hex(): size
            for point, size in zip(points, repository.exclusive_bytes(points).values(), strict=True)
        }
        gone = [p for p in points if not next(q["kept"] for q in summary["points"] if q["id"] == p.id.hex())]
        assert summary["frees_bytes"] == repository.freed_bytes(gone) > 0
    assert {point["id"]: point["frees_bytes"] for point in summary["points"]} == exclusive


def test_json_says_when(history: Path, done) -> None:
    points = by_time(done("-r", history, "prune", "--keep-within", "2d", "-n", "--json").summary)
    assert points["web-03-09T02:00"] | {"id": "", "vm_uuid": ""} == {
        "id": "",
        "vm": "web",
        "vm_uuid": "",
        "time": "2026-03-09T02:00:00Z",
        "kept": True,
        "reasons": ["within 2d"],
        "goes": "with a point of 2026-03-11T02:00:00Z or later",
        "goes_at": "2026-03-11T02:00:00Z",
        "frees_bytes": None,
    }
    assert points["web-03-08T14:00"]["reasons"] == []


def test_json_members_are_documented(history: Path, done) -> None:
    text = (Path(__file__).parents[2] / "docs" / "CLI.md").read_text(encoding="utf-8")
    described = text.partition("\n### prune\n")[2].partition("\n### ")[0]
    summary = done("-r", history, "prune", "--keep-last", 1, "-n", "--json").summary
    for member in [*summary, *summary["points"][0]]:
        assert f'"{member}"' in described, member


# --- rules and guards


def test_labels(history: Path, done, listed) -> None:
    done("-r", history, "prune", "--keep-last", 1, "--keep-label", "reason=release")
    assert listed(history) == ["db-03-01T00:00", "db-03-02T00:00", "web-03-10T14:00"]


def test_pinned_points_stay(history: Path, done, listed) -> None:
    done("-r", history, "pin", "web@2026-03-01T02:00:00Z")
    done("-r", history, "prune", "--keep-last", 1, "--vm", "web")
    assert listed(history, "--vm", "web") == ["web-03-01T02:00", "web-03-10T14:00"]


def test_points_of_the_future_stay(history: Path, disk: Path, done) -> None:
    done("-r", history, "backup", disk, "--vm", "web", "--time", "2096-01-01T00:00:00Z")
    points = by_time(done("-r", history, "prune", "--keep-last", 1, "--vm", "web", "--json").summary)
    assert points["web-01-01T00:00"]["reasons"] == ["lies in the future"]
    assert points["web-03-10T14:00"]["kept"]


def test_the_newest_verified_point_stays(history: Path, done, monkeypatch: pytest.MonkeyPatch) -> None:
    def verified_at(_: Repository, points: Sequence[Point]) -> dict[PointId, int]:
        return {point.id: int(point.manifest.time < parse_time("2026-03-05T12:00:00Z")) for point in points}

    monkeypatch.setattr(Repository, "verified_at", verified_at)
    points = by_time(done("-r", history, "prune", "--keep-last", 1, "--vm", "web", "--json").summary)
    kept = {time: point["reasons"] for time, point in points.items() if point["kept"]}
    assert kept == {
        "web-03-05T02:00": ["newest verified point of its VM"],
        "web-03-10T14:00": ["last 1 of 1"],
    }


def test_the_newest_point_is_the_newest_verified_one_after_a_full_check(history: Path, done) -> None:
    done("-r", history, "check", "--read-data")
    points = by_time(done("-r", history, "prune", "--keep-daily", 1, "--vm", "web", "-n", "--json").summary)
    kept = {time: point["reasons"] for time, point in points.items() if point["kept"]}
    assert kept == {"web-03-10T14:00": ["daily 1 of 1", "newest verified point of its VM"]}


def test_days_are_those_of_the_zone(history: Path, done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours ahead of UTC: 14:00 is the next day
    summary = done("-r", history, "prune", "--keep-daily", 1, "--vm", "web", "-n", "--json").summary
    assert summary["zone"] == "Pacific/Kiritimati"
    two = done("-r", history, "prune", "--keep-daily", 2, "--vm", "web", "-n", "--json").summary
    assert [time for time, point in by_time(two).items() if point["kept"]] == [
        "web-03-10T02:00",
        "web-03-10T14:00",
    ]


@pytest.mark.parametrize(("dialect", "kept"), [("holdfast", 4), ("restic", 4), ("borg", 5), ("pbs", 5)])
def test_dialects(history: Path, done, dialect: str, kept: int) -> None:
    summary = done(
        "-r",
        history,
        "prune",
        "--keep-last",
        2,
        "--keep-daily",
        3,
        "--vm",
        "web",
        "--dialect",
        dialect,
        "-n",
        "--json",
    ).summary
    assert (summary["dialect"], summary["kept"]) == (dialect, kept)


def test_rules_can_stand_in_the_configuration_file(history: Path, done, tmp_path: Path, monkeypatch) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('[prune]\nkeep_daily = 2\nkeep_label = "reason=release"\nvm = "web"\n')
    monkeypatch.setenv("HOLDFAST_CONFIG", str(settings))
    assert done("-r", history, "prune", "-n", "--json").summary["kept"] == 2
    assert done("-r", history, "prune", "-n", "--keep-daily", 3, "--json").summary["kept"] == 3


# --- what it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the policy is empty"),
        (["--keep-last", "0"], "the policy is empty"),
        (["--keep-label", "no=such"], "remove everything"),
        (["--keep-last", "-2"], "'-2' is no number"),
        (["--keep-last", "7d"], "'7d' is no number"),
        (["--keep-within", "7"], "'7' is no duration"),
        (["--keep-within-daily", "1x"], "'1x' is no duration"),
        (["--keep-label", "release"], "'release' is no label"),
        (["--keep-within-daily", "7d", "--dialect", "borg"], "has no rule"),
        (["--keep-last", "1", "--dialect", "duplicity"], "duplicity"),
    ],
)
def test_refuses(history: Path, holdfast, listed, words: list[str], message: str) -> None:
    before = listed(history)
    outcome = holdfast("-r", history, "prune", *words, "--json")
    assert outcome.code == outcome.error["code"] == 2
    assert message in outcome.error["message"]
    assert outcome.error["hint"]
    assert (outcome.out, listed(history)) == ("", before)


def test_refuses_a_zone_that_it_does_not_know(history: Path, holdfast, monkeypatch) -> None:
    monkeypatch.setenv("TZ", "Middle/Earth")
    outcome = holdfast("-r", history, "prune", "--keep-last", 1)
    assert outcome.code == 2
    assert "TZ is 'Middle/Earth'" in outcome.err


def test_a_vm_that_is_not_there(history: Path, holdfast) -> None:
    assert holdfast("-r", history, "prune", "--keep-last", 1, "--vm", "nobody").code == 14


def test_damage_does_not_prevent_the_plan(history: Path, holdfast, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> int:
        raise DamagedData("a node is damaged")

    monkeypatch.setattr(Repository, "freed_bytes", damaged)
    outcome = holdfast("-r", history, "prune", "--keep-last", 1, "-n", "--json")
    assert outcome.code == 100
    assert json.loads(outcome.err)["message"] == "what is freed can not be computed: a node is damaged"
    assert outcome.summary["frees_bytes"] is None
