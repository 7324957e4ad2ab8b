"""`replicate` and `init --like` as their users run them."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path

import pytest

from holdfast.repo.repository import Repository


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(5).randbytes(3 << 20))
    return path


@pytest.fixture
def pair(tmp_path: Path, disk: Path, done) -> tuple[Path, Path]:
    """A repository with two VMs, two points each, and an empty one."""
    a, b = tmp_path / "a", tmp_path / "b"
    done("init", "-r", a)
    done("init", "-r", b, "--like", a)
    for day in (1, 2):
        disk.write_bytes(disk.read_bytes()[:-4096] + bytes([day]) * 4096)
        for vm, label in (("web", "tier=1"), ("db", "tier=2")):
            moment = f"2026-03-0{day}T00:00:00Z"
            done("backup", "-r", a, disk, "--vm", vm, "--time", moment, "--label", label)
    return a, b


def rotten(repository: Path) -> None:
    """Every pack of a repository with a byte of its first chunk changed."""
    for pack in (repository / "packs").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[300] ^= 1
        pack.write_bytes(bytes(data))


def test_to_and_from_are_the_same(pair: tuple[Path, Path], tmp_path: Path, done) -> None:
    a, b = pair
    c = tmp_path / "c"
    done("init", "-r", c)
    to = done("replicate", "-r", a, "--to", b, "--verify", "--json").summary
    pulled = done("replicate", "-r", c, "--from", a, "--json").summary
    assert [point["id"] for point in to["copied"]] == [point["id"] for point in pulled["copied"]]
    assert (len(to["copied"]), to["verified_points"], to["same_keys"]) == (4, 4, True)
    assert done("check", "-r", b, "--read-data").code == 0
    again = done("replicate", "-r", a, "--to", b)
    assert "0 copied, 4 there already" in again.out


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (("--vm", "web"), 2),
        (("--vm", "web", "--vm", "db"), 4),
        (("--label", "tier=2"), 2),
        (("--label", "tier=2", "--label", "tier=1"), 0),
        (("--last", "1"), 2),
        (("--since", "2026-03-02T00:00:00Z"), 2),
        (("--vm", "db", "--last", "1"), 1),
    ],
)
def test_which_points(pair: tuple[Path, Path], chosen: tuple[str, ...], count: int, done) -> None:
    a, b = pair
    foreseen = done("replicate", "-r", a, "--to", b, *chosen, "-n")
    assert foreseen.out.count("would copy") == count
    assert done("list", "-r", b, "--json").document["points"] == []
    assert len(done("replicate", "-r", a, "--to", b, *chosen, "--json").summary["copied"]) == count
    assert len(done("list", "-r", b, "--json").document["points"]) == count


def test_damage_in_the_target_is_found_and_healed(pair: tuple[Path, Path], done, holdfast) -> None:
    a, b = pair
    done("replicate", "-r", a, "--to", b)
    rotten(b)
    for option in (("--verify",), ("--challenge", "100%")):
        found = holdfast("replicate", "-r", a, "--to", b, *option)
        assert 20 <= found.code <= 29
        assert "damaged" in found.err
    healed = holdfast("replicate", "-r", a, "--to", b, "--repair", "--verify")
    assert healed.code == 0, healed.err
    assert "healed 1 damaged record" in healed.out


def test_an_encrypted_repository_like_another(tmp_path: Path, disk: Path, done, holdfast) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("first password\n")
    two.write_text("second password\n")
    a, b = tmp_path / "a", tmp_path / "b"
    done(
        "init", "-r", a, "--encryption", "chacha20-poly1305", "--chunk-size", "32KiB", "--password-file", one
    )
    done("init", "-r", b, "--like", a, "--password-file", two, "--like-password-file", one)
    done("backup", "-r", a, disk, "--password-file", one)
    copied = done(
        "replicate",
        "-r",
        a,
        "--password-file",
        one,
        "--to",
        b,
        "--other-password-file",
        two,
        "--verify",
        "--json",
    )
    assert copied.summary["same_keys"] is True
    with Repository.open(str(b), password="second password") as repository:
        assert repository.config.chunk_size_bytes == 32 << 10
        (point,) = repository.points()
        with repository.open_disk(point, "disk.raw") as copy:
            assert copy.read() == disk.read_bytes()
    wrong = holdfast("init", "-r", tmp_path / "c", "--like", a, "--password-file", two)
    assert wrong.code == 12
    assert not (tmp_path / "c" / "config.json").exists()
    refused = holdfast(
        "init", "-r", tmp_path / "c", "--like", a, "--chunker", "fixed", "--password-file", one
    )
    assert refused.code == 2


def test_a_rate_is_kept(pair: tuple[Path, Path], done) -> None:
    a, b = pair
    began = time.monotonic()
    done("replicate", "-r", a, "--to", b, "--max-rate", "3MiB/s")
    assert time.monotonic() - began > 0.7


def test_copies_are_listed_with_their_proofs(pair: tuple[Path, Path], tmp_path: Path, done) -> None:
    a, b = pair
    c = tmp_path / "c"
    done("init", "-r", c)
    assert done("list", "-r", a, "--json").document["points"][0]["copies"] == []
    done("replicate", "-r", a, "--to", b, "--vm", "web", "--verify")
    done("replicate", "-r", c, "--from", a, "--challenge", "50%")

    def copies(repository: Path) -> dict[str, list[tuple[str, bool, bool]]]:
        """Of the newest point of each VM: where it is, and whether it was sampled or read there."""
        points = done("list", "-r", repository, "--json").document["points"]
        found = {}
        for point in points:
            assert all(one["compared"] for one in point["copies"])
            told = [
                (one["address"].rpartition("/")[2], bool(one["sampled"]), bool(one["read"]))
                for one in point["copies"]
            ]
            found[point["vm"]] = sorted(told)
        return found

    assert copies(a) == {"web": [("b", False, True), ("c", True, False)], "db": [("c", True, False)]}
    assert copies(b) == {"web": [("a", False, False)]}
    assert copies(c) == {"web": [("a", False, False)], "db": [("a", False, False)]}
    listed = done("list", "-r", a).out.splitlines()
    assert "COPIES" in listed[0]
    assert ["2, 0 min" in line for line in listed[1:]] == [" web " in line for line in listed[1:]]
    shown = done("show", "-r", a, "web@latest").out
    assert "COPY IN" in shown
    assert f":{b}  2" in shown
    stats = done("stats", "-r", a, "--json").document
    assert stats["points_without_copy"] == 0
    assert sorted(one["points"] for one in stats["copies"]) == [2, 4]
    assert f"2 of 4 in {socket.gethostname()}:{b}, the oldest proof 0 min ago" in done("stats", "-r", a).out

    done("forget", "-r", b, "web@latest")
    done("replicate", "-r", a, "--to", b)
    assert copies(a)["web"] == [("c", True, False)]
    assert done("check", "-r", a, "--rebuild-index").code == 0
    assert copies(a) == {"web": [], "db": []}
    done("replicate", "-r", a, "--to", c)
    assert copies(a) == {"web": [("c", False, False)], "db": [("c", False, False)]}


def test_mirrored_retention(pair: tuple[Path, Path], done, holdfast) -> None:
    a, b = pair
    copy = ("replicate", "-r", a, "--to", b)
    done(*copy)
    points = done("list", "-r", a, "--json").document["points"]
    first = {point["vm"]: point["id"] for point in points if point["time"].startswith("2026-03-01")}
    for vm in ("web", "db"):
        done("forget", "-r", a, f"{vm}@latest~1")
    done("gc", "-r", a)
    assert done(*copy, "--json").summary["mirrored"] is None
    assert len(done("list", "-r", b, "--json").document["points"]) == 4

    done("pin", "-r", b, first["db"])
    planned = done(*copy, "--mirror-retention", "-n")
    assert f"would forget {first['web'][:12]} web 2026-03-01T00:00:00Z, as the source has" in planned.out
    assert (
        f"kept {first['db'][:12]} db 2026-03-01T00:00:00Z, which the source has forgotten: pinned"
        in planned.out
    )
    assert len(done("list", "-r", b, "--json").document["points"]) == 4
    other = done(*copy, "--mirror-retention", "--vm", "db", "--json").summary["mirrored"]
    assert [(one["vm"], one["forgotten"], one["reasons"]) for one in other] == [("db", False, ["pinned"])]
    told = done(*copy, "--mirror-retention")
    assert "forgot 1 restore point of the target; until 'holdfast gc' runs there" in told.out
    done("forget", "-r", b, "--undo", first["web"])
    assert len(done("list", "-r", b, "--json").document["points"]) == 4
    again = done(*copy, "--mirror-retention", "--json").summary["mirrored"]
    assert [one["id"] for one in again if one["forgotten"]] == [first["web"]]
    assert "nothing to forget in the target" in done(*copy, "--mirror-retention", "--vm", "db").out


def test_a_source_without_points_of_a_vm_takes_none(pair: tuple[Path, Path], done) -> None:
    a, b = pair
    done("replicate", "-r", a, "--to", b)
    for point in ("web@latest", "web@latest"):
        done("forget", "-r", a, point)
    (one, other) = done("replicate", "-r", a, "--to", b, "--mirror-retention", "--json").summary["mirrored"]
    assert not one["forgotten"]
    assert one["reasons"][0] == other["reasons"][0] == "the source lists no restore point of its VM"
    assert len(done("list", "-r", b, "--json").document["points"]) == 4


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--to", "B", "--from", "B"),
        ("--to", "B", "-n", "--verify"),
        ("--to", "B", "--challenge", "0%"),
        ("--to", "B", "--challenge", "many"),
        ("--to", "B", "--max-rate", "0"),
        ("--to", "B", "--label", "nothing"),
        ("--to", "A"),
    ],
)
def test_what_is_refused(pair: tuple[Path, Path], options: tuple[str, ...], holdfast) -> None:
    a, b = pair
    names = {"A": str(a), "B": str(b)}
    outcome = holdfast("replicate", "-r", a, *(names.get(option, option) for option in options))
    assert outcome.code == 2
    assert outcome.err
