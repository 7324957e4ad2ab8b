"""`backup --changed-extents`: only what the map names is read; a bad map is refused before anything is stored."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from holdfast.cli.entry import run

SIZE = 40 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(2).randbytes(SIZE))
    return path


def last(capfd: pytest.CaptureFixture[str]) -> dict[str, object]:
    summary: dict[str, object] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return summary


def test_reads_only_the_changes(disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    repository, map_file = str(tmp_path / "repo"), tmp_path / "map.json"
    run(["init", "-r", repository])
    assert run(["backup", "-r", repository, str(disk)]) == 0
    with disk.open("r+b") as file:
        file.seek(20_000_000)
        file.write(b"changed")
    map_file.write_text(json.dumps({"base": "disk@latest", "disks": {"disk.raw": [[19_999_744, 4096]]}}))
    capfd.readouterr()
    backup = ["backup", "-r", repository, str(disk), "--json", "--changed-extents", str(map_file)]
    assert run([*backup, "--dry-run"]) == 0
    assert last(capfd)["bytes_read"] == 4096
    assert run(backup) == 0
    summary = last(capfd)
    assert summary["bytes_read"] == 4096
    assert run(["restore", "-r", repository, "disk@latest", str(tmp_path / "back.raw")]) == 0
    assert (tmp_path / "back.raw").read_bytes() == disk.read_bytes()
    capfd.readouterr()
    assert run(["show", "-r", repository, "disk@latest", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["disks"][0]["read"] == "cbt"
    assert run([*backup, "--read-all"]) == 0
    assert last(capfd)["bytes_read"] == SIZE


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"base": "disk@latest"}',
        '{"base": 5, "disks": {}}',
        '{"base": "disk@latest", "disks": {"other.raw": []}}',
        '{"base": "disk@latest", "disks": {"disk.raw": [[1]]}}',
        '{"base": "disk@latest", "disks": {"disk.raw": [[0, true]]}}',
        '{"base": "disk@latest", "disks": {"disk.raw": [[-4096, 4096]]}}',
        '{"base": "disk@latest", "disks": {"disk.raw": [[41943040, 1]]}}',
        '{"base": "disk@latest", "disks": {"disk.raw": [[0, 1.5]]}}',
        '{"base": "disk@latest", "disks": {}, "more": 1}',
        '{"base": "other@latest", "disks": {"disk.raw": []}}',
    ],
)
def test_refuses_bad_maps(disk: Path, tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    repository, map_file, other = str(tmp_path / "repo"), tmp_path / "map.json", tmp_path / "other.raw"
    other.write_bytes(bytes(1000))
    run(["init", "-r", repository])
    run(["backup", "-r", repository, str(disk)])
    run(["backup", "-r", repository, str(other)])
    map_file.write_text(text)
    assert run(["backup", "-r", repository, str(disk), "--changed-extents", str(map_file)]) == 2
    assert run(["backup", "-r", repository, str(disk), "--changed-extents", str(tmp_path / "none")]) == 2
    capfd.readouterr()
    run(["list", "-r", repository, "--json"])
    assert len(json.loads(capfd.readouterr().out)["points"]) == 2
