"""`check` with budgets and `--repair`, and `restore --allow-damaged`, as users meet them."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

VMDK = "web1-flat.vmdk"


@pytest.fixture
def many(tmp_path: Path, done) -> Path:
    """A repository of several packs, and a copy beside it."""
    from holdfast.repo.repository import InitOptions, Repository

    Repository.init(
        str(tmp_path / "many"), InitOptions(chunker="fixed", segment_bytes=1 << 20, pack_bytes=1 << 20)
    ).close()
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(5).randbytes(6 << 20))
    done("backup", "-r", tmp_path / "many", disk, "--vm", "db1")
    shutil.copytree(tmp_path / "many", tmp_path / "copy")
    return tmp_path / "many"


def spoil(repo: Path, *places: int, number: int = 0) -> None:
    """Damages a pack at these places."""
    pack = sorted((repo / "packs").rglob("*.pack"), key=lambda path: -path.stat().st_size)[number]
    with pack.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"damage")


class TestBudgets:
    def test_a_check_goes_on_where_the_last_one_ended(self, done, many: Path) -> None:
        total = done("check", "-r", many, "--json").summary["packs"]
        assert total > 4
        left = []
        for _ in range(total):
            summary = done(
                "check", "-r", many, "--read-data", "--max-bytes", "1KiB", "--older-than", "1d", "--json"
            ).summary
            reading = summary["reading"]
            assert reading["packs"] <= 1
            left.append(reading["left_packs"])
        assert left == list(range(total - 1, -1, -1))
        assert reading["verified_bytes"] == reading["total_bytes"]
        assert reading["oldest_verification"].startswith("20")
        summary = done("check", "-r", many, "--read-data", "--older-than", "1d", "--json").summary
        assert summary["reading"]["packs"] == 0
        assert summary["bytes_verified"] == 0

    def test_it_says_how_far_it_is(self, done, many: Path) -> None:
        out = done("check", "-r", many, "--read-data", "--max-bytes", "2MiB").out
        assert re.search(r"^[\d.]+ MiB of [\d.]+ MiB have been verified$", out, re.MULTILINE)
        assert re.search(
            r"^the number of bytes is used up: .* in \d+ packs are left for the next check$",
            out,
            re.MULTILINE,
        )
        assert out.endswith("no damage found so far\n")
        out = done("check", "-r", many, "--read-data", "--max-time", "0s").out
        assert "the time is over: " in out
        out = done("check", "-r", many, "--read-data", "--max-time", "1h").out
        assert "left for the next check" not in out
        assert out.endswith("no damage found\n")

    def test_stats_know_the_oldest_unverified_byte(self, done, many: Path) -> None:
        document = done("stats", "-r", many, "--json").document
        assert document["verified_bytes"] == 0
        assert 0 <= document["oldest_unverified_age_s"] < 600
        assert "holdfast check --read-data" in done("stats", "-r", many).out
        done("check", "-r", many, "--read-data")
        document = done("stats", "-r", many, "--json").document
        assert document["verified_bytes"] == document["packs_bytes"]
        assert re.search(
            r"^verified +all, the oldest byte .* ago", done("stats", "-r", many).out, re.MULTILINE
        )

    def test_a_restore_counts(self, done, many: Path, tmp_path: Path) -> None:
        done("restore", "-r", many, "db1@latest", tmp_path / "back.raw")
        assert done("stats", "-r", many, "--json").document["verified_bytes"] > 0

    @pytest.mark.parametrize(
        "words",
        [
            ["--max-time", "1h"],
            ["--max-bytes", "1G"],
            ["--older-than", "1d"],
            ["--read-data", "--max-time", "soon"],
            ["--read-data", "--max-bytes", "much"],
            ["--read-data", "--max-bytes", "1G", "db1@latest"],
            ["--from", "elsewhere"],
            ["--repair", "db1@latest"],
            ["--repair", "--from-password-file", "f"],
        ],
    )
    def test_what_makes_no_sense_is_refused(self, holdfast, many: Path, words: list[str]) -> None:
        assert holdfast("check", "-r", many, *words).code == 2


class TestRepair:
    def test_from_a_copy(self, holdfast, done, many: Path, tmp_path: Path, same) -> None:
        spoil(many, 100_000, 300_000)
        spoil(many, 100_000, number=1)
        outcome = holdfast("check", "-r", many, "--read-data")
        assert outcome.code == 23
        assert "--repair" in outcome.err
        out = done("check", "-r", many, "--repair", "--from", tmp_path / "copy").out
        assert f"healed 3 records from {tmp_path / 'copy'}" in out
        assert out.endswith("all is healed: 3 damaged records\n")
        assert "still damaged" not in out
        out = done("check", "-r", many, "--read-data").out
        assert "damaged in parts that nothing needs" in out
        done("restore", "-r", many, "db1@latest", tmp_path / "back.raw")
        assert same(tmp_path / "back.raw", tmp_path / "disk.raw")
        assert done("check", "-r", many, "--repair").out.endswith("nothing had to be repaired\n")

    def test_as_json(self, holdfast, done, many: Path, tmp_path: Path) -> None:
        spoil(many, 100_000, 300_000)
        shutil.copytree(many, tmp_path / "alone")
        summary = done("check", "-r", many, "--repair", "--from", tmp_path / "copy", "--json").summary
        assert summary["ok"] is True
        assert summary["findings"]
        assert summary["damaged"] == []
        assert summary["repaired"] == {
            "damaged_records": 2,
            "healed_records": 2,
            "healed_from": [{"source": str(tmp_path / "copy"), "records": 2}],
            "moved_records": 0,
            "dropped_records": 0,
            "unreadable_records": 0,
        }
        outcome = holdfast("check", "-r", tmp_path / "alone", "--repair", "--json")
        assert outcome.code == outcome.error["code"] == 23
        summary = outcome.summary
        assert summary["ok"] is False
        assert len(summary["damaged"]) == 2
        assert summary["repaired"]["dropped_records"] == 2

    def test_alone_then_a_backup_heals(self, holdfast, done, many: Path, tmp_path: Path) -> None:
        spoil(many, 100_000)
        outcome = holdfast("check", "-r", many, "--repair")
        assert outcome.code == 23
        assert re.search(
            r"^still damaged: restore point \w+ of db1, disk\.raw, bytes \d+ to \d+ \(",
            outcome.out,
            re.MULTILINE,
        )
        assert "1 damaged record was taken out of the index" in outcome.out
        assert "1 restore point stays damaged: 1 of 1 damaged records" in outcome.err
        assert "restore --allow-damaged" in outcome.err
        done("backup", "-r", many, tmp_path / "disk.raw", "--vm", "db1")
        done("check", "-r", many, "--read-data")
        done("restore", "-r", many, "db1@latest~1", tmp_path / "back.raw")

    def test_another_password(self, holdfast, done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other repository has a key of its own: what is needed is found by its place."""
        (tmp_path / "one").write_text("first password\n")
        (tmp_path / "two").write_text("second password\n")
        disk = tmp_path / "disk.raw"
        disk.write_bytes(random.Random(6).randbytes(1 << 20))
        for name, words in [("one", ["--chunk-size", "64KiB"]), ("two", ["--chunker", "fixed"])]:
            place = ["-r", tmp_path / f"repo-{name}", "--password-file", tmp_path / name]
            done("init", *place, "--encryption", "aes256-gcm", *words)
            done("backup", *place, disk, "--vm", "db1", "--time", "2026-11-22T02:00:00Z")
        spoil(tmp_path / "repo-one", 300_000)
        words = ["check", "-r", tmp_path / "repo-one", "--password-file", tmp_path / "one", "--repair"]
        assert holdfast(*words, "--from", tmp_path / "repo-two").code == 12
        out = done(*words, "--from", tmp_path / "repo-two", "--from-password-file", tmp_path / "two").out
        assert "all is healed: 1 damaged record\n" in out
        assert holdfast("check", "-r", tmp_path / "repo-one", "--repair").code == 12, "needs the key"

    def test_from_nowhere_and_from_itself(self, holdfast, many: Path, tmp_path: Path) -> None:
        assert holdfast("check", "-r", many, "--repair", "--from", tmp_path / "nowhere").code == 10
        assert holdfast("check", "-r", many, "--repair", "--from", many).code == 2


class TestAllowDamaged:
    def test_all_that_is_intact_comes_back(self, holdfast, many: Path, tmp_path: Path) -> None:
        spoil(many, 100_000, 300_000)
        plain = holdfast("restore", "-r", many, "db1@latest", tmp_path / "back.raw")
        assert plain.code == 20
        assert "--allow-damaged" in plain.err
        assert not (tmp_path / "back.raw").exists()
        outcome = holdfast("restore", "-r", many, "db1@latest", tmp_path / "back.raw", "--allow-damaged")
        assert outcome.code == 100
        found = re.findall(
            r"^damaged: disk\.raw, bytes (\d+) to (\d+) \(.*\) are zeros in (\S+): ",
            outcome.out,
            re.MULTILINE,
        )
        assert [path for _, _, path in found] == [str(tmp_path / "back.raw")] * 2
        expected = bytearray((tmp_path / "disk.raw").read_bytes())
        for start, end, _ in found:
            assert int(end) - int(start) == 64 << 10
            expected[int(start) : int(end)] = bytes(int(end) - int(start))
        assert (tmp_path / "back.raw").read_bytes() == expected
        assert "128 KiB could not be restored" in outcome.out

    def test_as_json(self, holdfast, done, many: Path, tmp_path: Path) -> None:
        dry = done(
            "restore", "-r", many, "db1@latest", tmp_path / "x", "--allow-damaged", "-n", "--json"
        ).summary
        assert dry["damaged"] == []
        spoil(many, 100_000)
        outcome = holdfast(
            "restore", "-r", many, "db1@latest", tmp_path / "back.raw", "--allow-damaged", "--json"
        )
        assert outcome.code == 100
        (part,) = outcome.summary["damaged"]
        assert (part["disk"], part["path"], part["length"]) == (
            "disk.raw",
            str(tmp_path / "back.raw"),
            64 << 10,
        )
        assert part["reason"]

    def test_of_an_intact_point_it_changes_nothing(
        self, done, repo: Path, vm: Path, tmp_path: Path, same
    ) -> None:
        done("restore", "-r", repo, "web1@latest~1", tmp_path / "back", "--allow-damaged")
        assert same(tmp_path / "back" / VMDK, vm / VMDK)

    def test_small_files_of_a_vm(self, holdfast, repo: Path, vm: Path, tmp_path: Path) -> None:
        """Everything in the pack is damaged: what is left are files of the right size, and a list."""
        pack = next((repo / "packs").rglob("*.pack"))
        size = pack.stat().st_size
        spoil(repo, *range(1000, size - 1000, 5000))
        outcome = holdfast(
            "restore", "-r", repo, "web1@latest~1", tmp_path / "back", "--allow-damaged", "--json"
        )
        assert outcome.code == 100
        parts = outcome.summary["damaged"]
        assert any(part["disk"] == "web1.vmdk" for part in parts)
        restored = (tmp_path / "back" / VMDK).read_bytes()
        expected = bytearray((vm / VMDK).read_bytes())
        for part in parts:
            if part["disk"] == "web1.vmdk":
                expected[part["offset"] : part["offset"] + part["length"]] = bytes(part["length"])
        assert restored == expected
        for path in ("web1.vmx", "web1.nvram", "logs/vmware.log"):
            assert (tmp_path / "back" / path).stat().st_size == (vm / path).stat().st_size


def test_a_check_that_is_killed_has_remembered_what_it_was_done_with(done, tmp_path: Path) -> None:
    from holdfast.repo.repository import InitOptions, Repository

    Repository.init(
        str(tmp_path / "repo"), InitOptions(chunker="fixed", segment_bytes=1 << 20, pack_bytes=1 << 20)
    ).close()
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(7).randbytes(64 << 20))
    done("backup", "-r", tmp_path / "repo", disk, "--vm", "db1")
    words = [
        sys.executable,
        "-m",
        "holdfast",
        "-r",
        str(tmp_path / "repo"),
        "check",
        "--read-data",
        "--workers",
        "1",
    ]
    for _ in range(20):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            out = json.loads(done("stats", "-r", tmp_path / "repo", "--json").out)
            if out["verified_bytes"]:
                process.kill()
                break
        process.wait()
        out = json.loads(done("stats", "-r", tmp_path / "repo", "--json").out)
        assert out["verified_bytes"] > 0
        if process.returncode == -9:
            return
    pytest.fail("no kill landed")
