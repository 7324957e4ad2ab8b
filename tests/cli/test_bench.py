"""`holdfast bench`: figures that add up, a recommendation, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from holdfast.cli.entry import run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    rng = random.Random(1)
    path = tmp_path / "disk.raw"
    words = [rng.randbytes(5) * 3 for _ in range(500)]
    with path.open("wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 17 << 20, 40 << 20):
            file.seek(offset)
            file.write(b"".join(rng.choice(words) for _ in range(100_000)))
    return path


def test_measures_and_recommends(disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert run(["bench", str(disk), "--json", "--folder", str(place)]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["type"] == "summary"
    assert summary["disk"] == "disk.raw"
    assert summary["data_bytes"] == 3 * (16 << 20)
    for chunker in summary["chunkers"]:
        assert 0 < chunker["stored_bytes"] < chunker["unique_bytes"] <= 8 << 20
        assert chunker["chunks"] >= chunker["unique_chunks"] > 0
    assert [level["level"] for level in summary["compression"]] == [1, 3, 6, 9]
    assert summary["threads"][0]["threads"] == 1
    flags = summary["recommended"]["flags"]
    assert run(["init", "-r", str(tmp_path / "repo"), *flags]) == 0, "the recommendation can be typed in"
    assert os.listdir(place) == []


def test_measures_the_newest_point_of_a_repository(
    disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    repository = str(tmp_path / "repo")
    assert run(["init", "-r", repository]) == 0
    assert run(["backup", "-r", repository, str(disk)]) == 0
    before = sorted(os.listdir(tmp_path))
    capfd.readouterr()
    assert run(["bench", "-r", repository, "--sample", "16MiB"]) == 0
    out = capfd.readouterr().out
    assert "Recommended: holdfast init" in out
    assert "16.0 MiB" in out
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["bench"], 2),
        (["bench", "{empty}"], 46),
        (["bench", "{missing}"], 41),
        (["bench", "{disk}", "--sample", "x"], 2),
    ],
)
def test_refuses(disk: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    empty = tmp_path / "empty.raw"
    with empty.open("wb") as file:
        file.truncate(1 << 20)
    names = {"empty": str(empty), "missing": str(tmp_path / "no"), "disk": str(disk)}
    assert run([argument.format(**names) for argument in arguments]) == code


def test_bench_finds_the_repository_wherever_it_is_named(holdfast, repo, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_REPOSITORY", str(repo))
    outcome = holdfast("bench", "--sample", "1MiB", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.summary["disk"] == "web1.vmdk"
