"""The main commands from end to end: what they print for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli.commands.init import compression_level
from holdfast.errors import UsageError

Command = Callable[..., object]


def test_a_vm_goes_in_and_comes_back(done, vm, tmp_path, same) -> None:
    repo = tmp_path / "repo"
    assert "aligned, 64.0 KiB" in done("init", "-r", repo).out
    outcome = done("backup", "-r", repo, vm, "--label", "reason=nightly")
    assert re.search(r"^web1: restore point [0-9a-f]{12}, 20\d\d-", outcome.out)
    listing = done("list", "-r", repo).out.splitlines()
    assert len(listing) == 2
    assert "web1" in listing[1]
    assert listing[1].endswith("reason=nightly")
    done("restore", "-r", repo, "web1@latest", tmp_path / "back")
    assert same(vm, tmp_path / "back")
    assert done("check", "-r", repo, "--read-data").out.endswith("no damage found\n")


def test_options_of_the_program_stand_before_or_after_the_command(done, repo, monkeypatch) -> None:
    wanted = done("list", "-r", repo).out
    assert done("-r", repo, "list").out == wanted
    assert done("--repository", repo, "list").out == wanted
    assert done("-r", "/nowhere", "list", "-r", repo).out == wanted
    monkeypatch.setenv("HOLDFAST_REPOSITORY", str(repo))
    assert done("list").out == wanted
    assert done("--json", "list").out == done("list", "--json").out
    monkeypatch.setenv("HOLDFAST_REPOSITORY", "/nowhere")
    assert done("list", "-r", repo).out == wanted


def test_init_says_what_it_made(done, tmp_path) -> None:
    document = done(
        "init", "-r", tmp_path / "r", "--chunker", "fixed", "--chunk-size", "128KiB",
        "--compression", "zstd:7", "--json",
    ).document  # fmt: skip
    assert re.fullmatch("[0-9a-f]{32}", document.pop("id"))
    assert document == {
        "path": str(tmp_path / "r"),
        "encryption": "none",
        "chunker": "fixed",
        "chunk_size_bytes": 131072,
        "compression": "zstd:7",
        "segment_bytes": 16777216,
        "pack_bytes": 268435456,
    }


def test_compression_is_none_or_zstd() -> None:
    assert [compression_level(text) for text in ("none", "zstd", "zstd:1", "zstd:19")] == [0, 1, 1, 19]
    for text in ("", "zstd:0", "zstd:20", "zstd:", "lz4", "zstd:-1", "zstd:1 "):
        with pytest.raises(UsageError):
            compression_level(text)


def test_list_as_json(done, repo) -> None:
    points = done("list", "-r", repo, "--json").document["points"]
    assert [point["time"] for point in points] == ["2026-11-21T02:00:00Z", "2026-11-22T02:00:00Z"]
    point = points[0]
    assert re.fullmatch("[0-9a-f]{64}", point["id"])
    assert point["vm"] == "web1"
    assert point["vm_uuid"] == "564d8e217a904c33b215f60d48ce719a"
    assert point["kind"] == "vm"
    assert point["labels"] == {"reason": "nightly"}
    assert point["files"] == 3
    assert point["warnings"] == []
    assert point["disks"] == [
        {
            "name": "web1.vmdk",
            "size_bytes": 24 << 20,
            "label": "scsi0:0",
            "uuid": "6000c29b41d76e058f3a12c4e077a951",
            "format": "vmdk",
        }
    ]
    assert point["size_bytes"] > 24 << 20
    assert 700_000 < point["stored_bytes_added"] < 800_000
    assert 700_000 < point["bytes_new"] < 1_000_000
    assert point["duration_s"] > 0
    assert point["host"]
    assert point["received"].endswith("Z")
    assert points[1]["stored_bytes_added"] < 100_000


def test_list_of_one_vm(done, holdfast, repo, tmp_path) -> None:
    (tmp_path / "other.raw").write_bytes(bytes(range(256)) * 100)
    done("backup", "-r", repo, tmp_path / "other.raw")
    assert len(done("list", "-r", repo, "--vm", "web1", "--json").document["points"]) == 2
    assert len(done("list", "-r", repo, "--vm", "other", "--json").document["points"]) == 1
    by_uuid = done("list", "-r", repo, "--vm", "564D8E21-7a90-4c33-b215-f60d48ce719a", "--json")
    assert len(by_uuid.document["points"]) == 2
    outcome = holdfast("list", "-r", repo, "--vm", "web2")
    assert outcome.code == 14
    assert "'other', 'web1'" in outcome.err


def test_list_of_nothing(done, empty_repo) -> None:
    assert done("list", "-r", empty_repo).out == "no restore points yet\n"
    assert done("list", "-r", empty_repo, "--json").document == {"points": []}


def test_backup_as_json(done, empty_repo, vm) -> None:
    outcome = done("backup", "-r", empty_repo, vm, "--time", "2026-11-22T03:00:00+01:00", "--json")
    assert {record["type"] for record in outcome.records[:-1]} <= {"progress"}
    summary = outcome.summary
    assert re.fullmatch("[0-9a-f]{64}", summary["point"])
    assert (summary["vm"], summary["time"]) == ("web1", "2026-11-22T02:00:00Z")
    assert summary["vm_uuid"] == "564d8e217a904c33b215f60d48ce719a"
    assert summary["chunks_new"] > 0
    assert 700_000 <= summary["bytes_new"] <= summary["bytes_read"] < 1_200_000
    assert summary["bytes_stored"] > 0
    assert summary["size_bytes"] > 24 << 20
    assert summary["duration_s"] > 0
    assert summary["warnings"] == []
    assert summary["dry_run"] is False
    again = done("backup", "-r", empty_repo, vm, "--json").summary
    assert (again["chunks_new"], again["bytes_new"]) == (0, 0)
    assert again["chunks_reused"] == summary["chunks_new"] + summary["chunks_reused"]


def test_a_dry_run_stores_nothing(done, empty_repo, vm) -> None:
    outcome = done("backup", "-r", empty_repo, vm, "--dry-run")
    assert "dry run, nothing was stored" in outcome.out
    assert "would store" in outcome.out
    summary = done("backup", "-r", empty_repo, vm, "-n", "--json").summary
    assert summary["point"] is None
    assert summary["dry_run"] is True
    assert summary["bytes_new"] > 0
    assert done("list", "-r", empty_repo, "--json").document == {"points": []}


def test_several_sources_become_several_points(holdfast, done, empty_repo, vm, tmp_path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * 100_000)
    outcome = holdfast("backup", "-r", empty_repo, tmp_path / "none", vm, tmp_path / "disk.raw", "--json")
    assert outcome.code == 41
    assert outcome.error["code"] == 41
    assert [r["vm"] for r in outcome.records if r["type"] == "summary"] == ["web1", "disk"]
    assert len(done("list", "-r", empty_repo, "--json").document["points"]) == 2


def test_a_backup_with_warnings_says_so(holdfast, empty_repo, vm) -> None:
    (vm / "link").symlink_to("/etc/passwd")
    outcome = holdfast("backup", "-r", empty_repo, vm)
    assert outcome.code == 100
    assert outcome.err == "holdfast: warning: link was left out: it is a symbolic link\n"
    outcome = holdfast("backup", "-r", empty_repo, vm, "--json")
    assert outcome.code == 100
    assert outcome.summary["warnings"] == ["link was left out: it is a symbolic link"]
    assert outcome.err.startswith('{"type": "warning"')
    assert "warning: link was left out" in holdfast("show", "-r", empty_repo, "web1@latest").out


def test_show(done, repo) -> None:
    out = done("show", "-r", repo, "web1@latest~1").out
    for expected in (
        "reason=nightly",
        "scsi0:0",
        "vmdk (vmfs)",
        "web1.nvram",
        "logs/vmware.log",
        "VM folder",
    ):
        assert expected in out
    document = done("show", "-r", repo, "web1@latest", "--json").document
    assert document["parent"] == done("show", "-r", repo, "web1@latest~1", "--json").document["id"]
    assert [file["name"] for file in document["file_list"]] == [
        "logs/vmware.log", "new.log", "web1.nvram", "web1.vmx",
    ]  # fmt: skip
    assert document["files"] == 4
    assert document["file_list"][3]["mode"] == "0755"
    assert document["disks"][0]["create_type"] == "vmfs"
    assert document["disks"][0]["read"] == "full"
    listed = done("list", "-r", repo, "--json").document["points"][1]
    assert set(listed) < set(document)


def test_diff(done, repo) -> None:
    document = done("diff", "-r", repo, "web1@latest~1", "web1@latest", "--json").document
    (disk,) = document["disks"]
    assert (disk["name"], disk["change"], disk["ranges_total"]) == ("web1.vmdk", "changed", 1)
    (changed,) = disk["ranges"]
    assert changed["offset"] <= 12 << 20 < changed["offset"] + changed["length"]
    assert disk["changed_bytes"] == changed["length"] == document["changed_bytes"]
    assert [(file["name"], file["change"]) for file in document["files"]] == [
        ("new.log", "added"),
        ("web1.nvram", "changed"),
    ]
    out = done("diff", "-r", repo, "web1@latest~1", "web1@latest").out
    assert "changed" in out
    assert str(changed["offset"]) in out
    assert "is the same" in done("diff", "-r", repo, "web1@latest", "web1@latest").out


def test_diff_shows_all_ranges_if_it_is_asked(done, empty_repo, tmp_path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(bytes(8 << 20))
    done("backup", "-r", empty_repo, disk, "--time", "2026-01-01T00:00:00Z")
    with disk.open("r+b") as file:
        for number in range(20):
            file.seek(number * (400 << 10))
            file.write(b"x")
    done("backup", "-r", empty_repo, disk, "--time", "2026-01-02T00:00:00Z")
    words = ("diff", "-r", empty_repo, "d@latest~1", "d@latest")
    assert "and 12 more; --ranges shows all" in done(*words).out
    assert len(done(*words, "--ranges").out.splitlines()) == len(done(*words).out.splitlines()) + 11
    (found,) = done(*words, "--json").document["disks"]
    assert found["ranges_total"] == len(found["ranges"]) == 20
    assert found["ranges_complete"] is True


def test_diff_of_disks_that_come_and_go(done, empty_repo, vm) -> None:
    done("backup", "-r", empty_repo, vm, "--time", "2026-01-01T00:00:00Z")
    text = (vm / "web1.vmdk").read_text()
    (vm / "data.vmdk").write_text(text.replace("web1-flat", "data-flat").replace("a9 51", "a9 52"))
    (vm / "data-flat.vmdk").write_bytes(bytes(24 << 20))
    (vm / "web1.vmdk").rename(vm / "renamed.vmdk")
    (vm / "web1.vmx").write_text((vm / "web1.vmx").read_text().replace("web1.vmdk", "renamed.vmdk"))
    done("backup", "-r", empty_repo, vm, "--time", "2026-01-02T00:00:00Z")
    document = done("diff", "-r", empty_repo, "web1@latest~1", "web1@latest", "--json").document
    assert [(disk["name"], disk["change"]) for disk in document["disks"]] == [
        ("data.vmdk", "added"),
        ("renamed.vmdk", "same"),
    ]
    document = done("diff", "-r", empty_repo, "web1@latest", "web1@latest~1", "--json").document
    assert ("data.vmdk", "removed") in [(disk["name"], disk["change"]) for disk in document["disks"]]


def test_stats(done, repo) -> None:
    out = done("stats", "-r", repo).out
    assert re.search(r"^restore points +2$", out, re.MULTILINE)
    document = done("stats", "-r", repo, "--json").document
    assert (document["vms"], document["points"], document["packs"]) == (1, 2, 1)
    assert document["size_bytes"] > 48 << 20
    assert document["packs_bytes"] >= document["live_bytes"] > 700_000
    assert document["ratio"] == pytest.approx(document["size_bytes"] / document["live_bytes"], abs=0.001)
    assert document["index_records"] > 0
    assert document["index_bytes"] > 0
    assert document["oldest_verification"] is None
    done("check", "-r", repo, "--read-data")
    assert done("stats", "-r", repo, "--json").document["oldest_verification"].startswith("20")
    assert "of this VM" in done("stats", "-r", repo, "--vm", "web1").out


def test_check_as_json(done, repo) -> None:
    outcome = done("check", "-r", repo, "--read-data", "--json")
    summary = outcome.summary
    assert summary["ok"] is True
    assert (summary["packs"], summary["points"]) == (1, 2)
    assert summary["bytes_verified"] > 700_000
    assert summary["findings"] == summary["damaged"] == summary["notes"] == []
    assert summary["rebuilt"] is None
    one = done("check", "-r", repo, "web1@latest", "--json").summary
    assert one["points"] == 1


def pack_of(repo: Path) -> Path:
    (pack,) = (repo / "packs").rglob("*.pack")
    return pack


def test_check_names_what_is_damaged(holdfast, repo) -> None:
    with pack_of(repo).open("r+b") as file:
        file.seek(200_000)
        file.write(b"damage")
    assert holdfast("check", "-r", repo).code == 0  # the structure is sound
    outcome = holdfast("check", "-r", repo, "--read-data")
    assert outcome.code == 23
    damaged = [line for line in outcome.out.splitlines() if line.startswith("damaged: ")]
    assert len(damaged) == 2
    assert re.search(r"restore point [0-9a-f]{12} of web1, web1\.vmdk, bytes \d+ to \d+ \(\d", damaged[0])
    assert "2 restore points are damaged" in outcome.err
    assert "hint: run 'holdfast check --repair'" in outcome.err
    outcome = holdfast("check", "-r", repo, "--read-data", "--json")
    assert outcome.code == outcome.error["code"] == 23
    assert outcome.summary["ok"] is False
    part = outcome.summary["damaged"][0]
    assert (part["vm"], part["disk"]) == ("web1", "web1.vmdk")
    assert part["length"] > 0
    assert part["reason"]
    assert outcome.summary["findings"][0]["kind"] == "pack"


def test_a_damaged_chunk_is_never_restored(holdfast, repo, tmp_path) -> None:
    with pack_of(repo).open("r+b") as file:
        file.seek(200_000)
        file.write(b"damage")
    outcome = holdfast("restore", "-r", repo, "web1@latest", tmp_path / "back")
    assert outcome.code == 20
    assert not (tmp_path / "back").exists()


def test_the_index_is_made_anew(holdfast, done, repo) -> None:
    before = done("list", "-r", repo).out
    outcome = done("check", "-r", repo, "--rebuild-index")
    assert outcome.out.startswith("rebuilt the index: 1 pack, ")
    rebuilt = done("check", "-r", repo, "--rebuild-index", "--json").summary["rebuilt"]
    assert (rebuilt["packs"], rebuilt["points"], rebuilt["problems"]) == (1, 2, [])
    for path in (repo / "index").iterdir():
        path.unlink()
    (repo / "index").rmdir()
    outcome = holdfast("list", "-r", repo)
    assert (outcome.code, outcome.out) == (0, before)
    assert "it is rebuilt" in outcome.err


def test_version(done) -> None:
    assert re.fullmatch(r"holdfast \d+\.\d+\.\d+ \(Python 3\.\d+\.\d+\S*\)\n", done("version").out)
    assert set(done("version", "--json").document) == {"version", "python"}


def test_help(holdfast) -> None:
    outcome = holdfast("--help")
    assert outcome.code == 0
    assert "Exit codes:" in outcome.out
    assert "130  interrupted" in outcome.out
    assert holdfast("-h").out == outcome.out
    bare = holdfast()
    assert (bare.code, bare.out) == (2, "")
    assert "Backing up and restoring:" in bare.err
