"""A short run of the harness: it measures, it checks, and it refuses wrong results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.collection import follow_change, large, one_percent, shape_of, verify
from benchmarks.compare import run_workload
from benchmarks.guests import DAY_1
from benchmarks.index_scale import one_size
from benchmarks.measure import CommandFailed, Usage, compare_files, data_extents, run, tree_size
from benchmarks.report import plots, render
from benchmarks.summary import Summary, load, summarize
from benchmarks.synthetic import Shape, make
from benchmarks.targets import verdicts
from benchmarks.tools import Copy, Tool, make_tools
from benchmarks.workloads import WORKLOADS
from holdfast.repo.repository import Repository


@pytest.fixture(scope="module")
def result(guests: Path, program: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = str(tmp_path_factory.mktemp("work"))
    tools = make_tools(["holdfast", "holdfast aes256-gcm", "cp"], work, holdfast=program)
    found = run_workload(WORKLOADS["holdfast"], tools, str(guests), work, runs=1)
    assert os.listdir(work) == []
    found["made"] = "tiny, seed 7"
    return json.loads(json.dumps(found))


def test_a_run_has_every_step_and_its_circumstances(result: dict[str, Any]) -> None:
    steps = result["rounds"][0]["tools"]["holdfast"]
    assert list(steps) == ["first", "changed", "other", "unchanged", "restore", "check"]
    for step in steps.values():
        assert step["wall_s"] > 0
        assert step["cpu_s"] > 0
        assert step["rss_peak_bytes"] > 10e6
    assert steps["unchanged"]["figures"]["bytes_new"] == 0
    assert list(result["rounds"][0]["tools"]["cp"]) == ["first", "restore"]
    assert result["machine"]["cores"] >= 1
    assert result["rounds"][0]["ceilings"]["decompress_write_s"]["page cache"] > 0


def test_a_summary_keeps_medians_and_the_range(result: dict[str, Any], tmp_path: Path) -> None:
    twice = dict(result)
    slower = json.loads(json.dumps(result["rounds"][0]))
    slower["tools"]["holdfast"]["first"]["wall_s"] += 10
    twice["rounds"] = [*result["rounds"], slower]
    (tmp_path / "result.json").write_text(json.dumps(twice))
    summary = load(tmp_path / "result.json")
    first = result["rounds"][0]["tools"]["holdfast"]["first"]["wall_s"]
    assert summary.runs == 2
    assert summary.figure("holdfast", "first") == pytest.approx(first + 5, abs=0.001)
    low, high = summary.raw["tools"]["holdfast"]["steps"]["first"]["wall_range_s"]
    assert high - low == pytest.approx(10, abs=0.01)


def with_peer(result: dict[str, Any], name: str, factor: float) -> Summary:
    """The run as if a peer had needed `factor` times what Holdfast did."""
    raw = summarize(json.loads(json.dumps(result)))
    own = json.loads(json.dumps(raw["tools"]["holdfast"]))
    for step in own["steps"].values():
        for figure in ("wall_s", "apparent_bytes", "allocated_bytes"):
            if figure in step:
                step[figure] *= factor
    raw["tools"][name] = own
    return Summary(raw)


def test_verdicts_follow_the_figures(result: dict[str, Any]) -> None:
    fast = {v.key: v.met for v in verdicts(with_peer(result, "borg fixed 1 MiB", 10.0))}
    slow = {v.key: v.met for v in verdicts(with_peer(result, "borg fixed 1 MiB", 1.0))}
    for key in ("first-borg", "changed-borg", "restore-borg"):
        assert fast[key] is True
        assert slow[key] is False
    assert fast["space-casync"] is None
    assert fast["memory"] is True
    space = {v.key: v.met for v in verdicts(with_peer(result, "casync", 0.9))}
    assert space["space-casync"] is False


def test_the_report_names_verdicts_losses_and_reasons(result: dict[str, Any]) -> None:
    run = with_peer(result, "borg fixed 1 MiB", 0.5)
    size = {"records": 1_000_000, "bytes_per_record": 105.0, "load_s": 4.0}
    scale = {"machine": result["machine"], "new_bytes": 1 << 30, "sizes": [size, size]}
    text = render([run], scale, {"first-borg": "because of a test", "index": "It grows."})
    assert "**missed**" in text
    assert "because of a test" in text
    assert "borg fixed 1 MiB" in text.partition("## Where a peer wins")[2]
    assert "| bytes per chunk | 105 | 105 |" in text
    assert "It grows." in text


def test_plots_are_small(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install '.[bench]')")
    lines = list(plots(with_peer(result, "casync", 2.0), None, tmp_path))
    assert len(lines) == 2
    for path in tmp_path.iterdir():
        assert 1000 < path.stat().st_size < 200_000


class Liar(Copy):
    """Copies, but gives back another byte."""

    def restore(self, vm: str, image: str, folder: str) -> tuple[Usage, str]:
        usage, place = super().restore(vm, image, folder)
        with open(place, "r+b") as file:
            file.seek(5000)
            file.write(bytes([file.read(1)[0] ^ 1]))
        return usage, place


def test_a_wrong_restore_fails_the_run(guests: Path, tmp_path: Path) -> None:
    tools: list[Tool] = [Liar(str(tmp_path))]
    with pytest.raises(CommandFailed, match="differ"):
        run_workload(WORKLOADS["holdfast"], tools, str(guests), str(tmp_path), runs=1)
    assert not (tmp_path / "cp").exists()


def test_a_command_is_measured(tmp_path: Path) -> None:
    code = "data = bytearray(80_000_000); data[::4096] = b'x' * len(data[::4096]); sum(range(3_000_000))"
    usage = run([sys.executable, "-c", code + "; print('done')"])
    assert usage.output == "done\n"
    assert 0.02 < usage.cpu_s < 30
    assert usage.wall_s >= usage.sync_s
    assert 80e6 < usage.rss_peak_bytes < 400e6
    with pytest.raises(CommandFailed, match="exit code 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])


def test_files_are_compared_through_holes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        with path.open("wb") as file:
            file.truncate(64 << 20)
            file.seek(32 << 20)
            file.write(b"data")
    compare_files(str(a), str(b))
    assert sum(length for _, length in data_extents(str(a))) < 1 << 20
    with b.open("r+b") as file:
        file.seek(50 << 20)
        file.write(b"x")
    with pytest.raises(CommandFailed, match="differ"):
        compare_files(str(a), str(b))
    assert tree_size(str(tmp_path))[0] == 128 << 20


def test_tools_are_known_by_name(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="unknown tools: tar"):
        make_tools(["cp", "tar"], str(tmp_path))
    assert DAY_1 in WORKLOADS["peers"].images


def test_the_index_is_measured_at_a_size(program: str, tmp_path: Path) -> None:
    figures = one_size(0.25, 1000, str(tmp_path), program, 16 << 20)
    assert figures["records"] >= 250_000 + 60_000
    assert 60 < figures["bytes_per_record"] < 250
    assert figures["lookup_hit_per_s"] > 1000
    assert figures["backup_s"] > 0


def test_collections_are_measured(result: dict[str, Any], tmp_path: Path, program: str) -> None:
    found = {
        "machine": result["machine"],
        "new_bytes": 16 << 20,
        "one": follow_change(str(tmp_path), one_percent(1, 10)),
        "large": large(str(tmp_path), shape_of(0.02, 40), 16 << 20, program),
    }
    assert found["one"]["points"] == 1
    assert found["one"]["records"] >= 180
    assert found["large"]["gc"]["records"] > 30
    text = render([with_peer(result, "casync", 2.0)], None, {"collection": "Why."}, collection=found)
    assert "## Keeping" in text
    assert "Why." in text


def test_what_a_collection_leaves_is_compared(tmp_path: Path) -> None:
    shape = Shape(1, 3, 4, 1, 1, 10)
    path = str(tmp_path / "repo")
    with Repository.init(path) as repository:
        own = repository.config.id
    made = make(path, own, shape)
    before = np.ones((1, 3), bool)
    kept = np.array([[False, True, True]])
    with pytest.raises(CommandFailed, match="has left"):
        verify(path, made, before, kept)
    with Repository.open(path) as repository:
        repository.forget(repository.points()[:1])
        assert repository.collect().records == 1 + 2 + 10
        assert len(repository.points()) == 2
    assert verify(path, made, before, kept)["left_records"] == 0
    with pytest.raises(CommandFailed, match="has dropped"):
        verify(path, made, before, before)
