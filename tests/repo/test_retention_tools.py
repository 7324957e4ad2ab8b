"""The dialects against the real restic and Borg: random histories and policies, `--dry-run`, the same verdicts.

Each tool gets one repository with tiny archives of set times; each of them belongs to some of the histories at random.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from holdfast.errors import UsageError
from holdfast.repo.periods import PERIODS, parse_calendar_duration
from holdfast.repo.retention import Candidate, Policy, plan_retention

ROOT = Path(__file__).parent.parent.parent
ZONE_NAME = "Europe/Berlin"
ZONE = ZoneInfo(ZONE_NAME)
HISTORIES = "abcdef"
KEEP = (("keep", "yes"),)
POLICIES = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def randomness() -> random.Random:
    seed = int(os.environ.get("HOLDFAST_SEED", "20261122"))
    print(f"seed {seed}")
    return random.Random(seed)


def environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TZ": ZONE_NAME,
        "LC_ALL": "C.UTF-8",
        "RESTIC_REPOSITORY": str(folder / "repo"),
        "RESTIC_PASSWORD": "x",
        "BORG_REPO": str(folder / "repo"),
        "BORG_BASE_DIR": str(folder),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }


def history_times(chance: random.Random, count: int) -> list[int]:
    """Times of the past, never at a full hour of now: dense ones of late, sparse ones before, some at clock changes."""
    now = int(time.time()) // 60 * 60
    autumn = int(datetime(2025, 10, 26, 0, 0, tzinfo=UTC).timestamp())
    hours = {chance.randrange(30) for _ in range(count // 4)}
    hours |= {chance.randrange(24 * 30) for _ in range(count // 4)}
    hours |= {chance.randrange(24 * 700) for _ in range(count // 4)}
    times = {now - hour * 3600 - chance.choice([1500, 1800, 2400]) for hour in hours}
    return sorted(times | {autumn + quarter * 1740 for quarter in range(4)})


def random_policies(chance: random.Random, *, ored: bool) -> Iterator[dict[str, str]]:
    """Options without `keep-`, and their values."""
    for _ in range(POLICIES):
        rules = {
            name: str(chance.choice([1, 2, 3, 5, 9])) for name in chance.sample(PERIODS, chance.randint(0, 4))
        }
        if chance.random() < 0.4 or not rules:
            rules["within"] = chance.choice(
                ["36h", "3d", "1m", "1y"] if ored else ["36H", "3d", "2w", "1m", "1y"]
            )
        if ored:
            for name in chance.sample(PERIODS[1:], chance.choice([0, 0, 1, 2])):
                rules[f"within-{name}"] = chance.choice(["20h", "5d", "1m", "2m3d", "1y2m3d4h"])
            if chance.random() < 0.3:
                rules["tag"] = "keep"
        yield rules


def our_policy(rules: dict[str, str], dialect: str) -> Policy:
    values: dict[str, object] = {
        name.replace("-", "_"): parse_calendar_duration(text) if name.startswith("within") else int(text)
        for name, text in rules.items()
        if name != "tag"
    }
    return Policy(dialect=dialect, labels=KEEP if "tag" in rules else (), **values)


def ours(points: list[Candidate], policy: Policy) -> dict[str, list[str]] | None:
    """Name -> rules that keep it; None if they keep nothing."""
    try:
        verdicts = plan_retention(points, policy, now=int(time.time()), zone=ZONE)
    except UsageError:
        return None
    kept = {
        v.point.id.decode(): [r.rule for r in v.reasons if not r.rule.startswith("newest")] for v in verdicts
    }
    return {name: rules for name, rules in kept.items() if rules}


# --- restic


@pytest.fixture(scope="module")
def restic(tmp_path_factory: pytest.TempPathFactory, randomness):
    program = shutil.which("restic")
    if program is None:
        pytest.skip("restic is not installed")
    folder = tmp_path_factory.mktemp("restic")

    def run(*words: str, stdin: bytes = b"x") -> str:
        outcome = subprocess.run(
            [program, "--no-cache", *words],
            env=environment(folder),
            input=stdin,
            capture_output=True,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stderr.decode()
        return outcome.stdout.decode()

    run("init")
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda job: run("backup", "--stdin", "--host", "vm", "--time", job[0], *job[1]),
            [
                (
                    datetime.fromtimestamp(moment, ZONE).strftime("%Y-%m-%d %H:%M:%S"),
                    [f"--tag={tag}" for tag in HISTORIES if randomness.random() < 0.6]
                    + ["--tag=keep"] * (randomness.random() < 0.2),
                )
                for moment in history_times(randomness, 24)
            ],
        ):
            pass
    return run


def test_restic(restic, randomness) -> None:
    snapshots = json.loads(restic("snapshots", "--json"))
    points = {
        tag: [
            Candidate(s["id"].encode(), seconds, seconds, "vm", labels=KEEP if "keep" in s["tags"] else ())
            for s in snapshots
            if tag in s.get("tags", ())
            for seconds in [int(datetime.fromisoformat(s["time"][:19] + s["time"][-6:]).timestamp())]
        ]
        for tag in HISTORIES
    }
    # Since 0.16 the counts keep the oldest as well, and since a later one also the rules within-*.
    version = re.search(r"restic (\d+)\.(\d+)", restic("version"))
    keeps_no_oldest = version is not None and (int(version[1]), int(version[2])) < (0, 16)
    compared = 0
    for rules in random_policies(randomness, ored=True):
        tag = randomness.choice(HISTORIES)
        expected = ours(points[tag], our_policy(rules, "restic"))
        if expected is None:
            continue
        options = [f"--keep-{name}={value}" for name, value in rules.items()]
        answer = json.loads(restic("forget", "--dry-run", "--json", "--tag", tag, "--group-by", "", *options))
        kept = {snapshot["id"] for snapshot in answer[0]["keep"] or ()}
        unless_old = {
            name
            for name, why in expected.items()
            if all("oldest" in rule and (keeps_no_oldest or "within" in rule) for rule in why)
        }
        assert expected.keys() - unless_old <= kept <= expected.keys(), (rules, tag)
        compared += 1
    assert compared > POLICIES // 2


# --- borg


@pytest.fixture(scope="module")
def borg(tmp_path_factory: pytest.TempPathFactory, randomness):
    beside = ROOT / "benchmarks" / "cache" / "borg" / "bin" / "borg"
    program = shutil.which("borg") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("borg is not installed")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    if not re.match(r"borg 1\.[2-9]", version):
        pytest.skip(f"no Borg 1.2 to 1.4 is installed, but {version.strip()}")
    folder = tmp_path_factory.mktemp("borg")

    def run(*words: str) -> str:
        outcome = subprocess.run(
            [program, *words],
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout + outcome.stderr

    run("init", "--encryption=none")
    points: dict[str, int] = {}
    (folder / "file").write_text("x")
    for number, moment in enumerate(history_times(randomness, 24)):
        member = "".join(letter for letter in HISTORIES if randomness.random() < 0.6)
        name = f"{number:02}-{member}"
        points[name] = moment
        stamp = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        run("create", "--timestamp", stamp, f"::{name}", str(folder / "file"))
    return run, points


def test_borg(borg, randomness) -> None:
    run, archives = borg
    compared = 0
    for rules in random_policies(randomness, ored=False):
        letter = randomness.choice(HISTORIES)
        points = [
            Candidate(name.encode(), moment, moment, "vm")
            for name, moment in archives.items()
            if letter in name
        ]
        expected = ours(points, our_policy(rules, "borg"))
        if expected is None:
            continue
        options = [f"--keep-{name}={value}" for name, value in rules.items()]
        answer = run("prune", "--dry-run", "--list", "--glob-archives", f"*-*{letter}*", *options)
        said = re.findall(r"^Keeping archive \(rule: (\S+ #\d+)\):\s+(\S+)", answer, re.MULTILINE)
        theirs = {name: rule for rule, name in said}
        assert theirs.keys() == expected.keys(), (rules, letter)
        for name, why in expected.items():
            if not why[0].startswith("within "):
                assert in_borgs_words(why) == theirs[name], (rules, letter, name)
        compared += 1
    assert compared > POLICIES // 2


def in_borgs_words(why: list[str]) -> str:
    """`daily 3 of 7` as `daily #3`; `last` is its `secondly`."""
    rule, number, *rest = why[0].replace("last", "secondly").split()
    return f"{rule}{'[oldest]' if '(oldest)' in rest else ''} #{number}"
