"""`replicate`, `init --like` and `check --repair` with repositories on another host: real commands, a real far process."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig.disks import machine_of

from holdfast.repo.backup import BackupOptions
from holdfast.repo.repository import InitOptions, Repository

FAR = "ssh://far.example"
RSH = """\
#!{python} -IS
# Runs the far command here. Counts what goes through its pipes; kills it when it has been given FUSE bytes.
import os, subprocess, sys, threading
far = subprocess.Popen(["sh", "-c", "exec " + sys.argv[2]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
fuse = int(os.environ.get("FUSE", "0"))
given = taken = 0
def answers():
    global taken
    while data := os.read(far.stdout.fileno(), 65536):
        taken += len(data)
        os.write(1, data)
    with open({count!r}, "w") as file:
        file.write(str(given + taken))
    os.close(1)  # now we may be killed
thread = threading.Thread(target=answers)
thread.start()
while data := os.read(0, 65536):
    if fuse and given + len(data) >= fuse:
        os.write(far.stdin.fileno(), data[: fuse - given])
        far.kill()
        break
    given += len(data)
    try:
        os.write(far.stdin.fileno(), data)
    except BrokenPipeError:
        break
far.stdin.close()
thread.join()
sys.exit(far.wait() and 1)
"""


@pytest.fixture
def count(tmp_path: Path) -> Path:
    """How many bytes the last command has sent and received."""
    return tmp_path / "count"


@pytest.fixture(autouse=True)
def far_side(tmp_path: Path, count: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Far sides are processes of this machine; what it returns sets the options of the next ones."""
    program = tmp_path / "rsh"
    program.write_text(RSH.format(python=sys.executable, count=str(count)))
    program.chmod(0o755)
    monkeypatch.setenv("HOLDFAST_RSH", str(program))

    def use(*options: str, fuse: int = 0) -> None:
        command = [sys.executable, "-m", "holdfast", "serve", "--stdio", *options]
        monkeypatch.setenv("HOLDFAST_REMOTE_COMMAND", " ".join(command))
        monkeypatch.setenv("FUSE", str(fuse))

    use()
    return use


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "web1.raw"
    path.write_bytes(random.Random(5).randbytes(3 << 20))
    return path


@pytest.fixture
def a(tmp_path: Path, disk: Path, done: Callable[..., Any]) -> Path:
    """A repository with two points of a VM."""
    path = tmp_path / "a"
    done("init", "-r", path)
    for day in (1, 2):
        disk.write_bytes(disk.read_bytes()[:-4096] + bytes([day]) * 4096)
        done("backup", "-r", path, disk, "--vm", "web", "--time", f"2026-03-0{day}T00:00:00Z")
    return path


def copied(outcome: Any) -> int:
    return len(outcome.summary["copied"])


def rotten(repository: Path) -> None:
    """Every pack of a repository with a byte of its first chunk changed."""
    for pack in (repository / "packs").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[300] ^= 1
        pack.write_bytes(bytes(data))


def test_push_pull_and_a_third_site(
    a: Path, tmp_path: Path, disk: Path, done: Callable[..., Any], far_side: Callable[..., None]
) -> None:
    b, c = tmp_path / "b", tmp_path / "c"
    done("init", "-r", f"{FAR}{b}", "--like", a)
    far_side("--append-only")  # is enough for pushing
    assert copied(done("replicate", "-r", a, "--to", f"{FAR}{b}", "--json")) == 2
    far_side("--read-only")  # is enough for pulling
    done("init", "-r", c, "--like", f"{FAR}{b}")
    pulled = done("replicate", "-r", c, "--from", f"{FAR}{b}", "--verify", "--json")
    assert (copied(pulled), pulled.summary["same_keys"], pulled.summary["verified_points"]) == (2, True, 2)
    far_side()
    assert copied(done("replicate", "-r", f"{FAR}{a}", "--to", f"{FAR}{c}", "--json")) == 0
    done("backup", "-r", c, disk, "--vm", "db")
    assert copied(done("replicate", "-r", f"{FAR}{c}", "--to", f"{FAR}{a}", "--json")) == 1
    done("check", "-r", b, "--read-data")
    out = tmp_path / "out"
    done("restore", "-r", c, "web@latest", out)
    assert out.read_bytes() == disk.read_bytes()


def test_a_far_repository_with_another_key(a: Path, tmp_path: Path, done: Callable[..., Any]) -> None:
    password, b = tmp_path / "password", f"{FAR}{tmp_path / 'b'}"
    password.write_text("secret\n")
    done("init", "-r", b, "--encryption", "aes256-gcm", "--password-file", password)
    push = ("replicate", "-r", a, "--to", b, "--other-password-file", password, "--json")
    first = done(*push)
    assert (copied(first), first.summary["same_keys"]) == (2, False)
    again = done(*push, "--verify")
    assert (copied(again), again.summary["already"], again.summary["verified_points"]) == (0, 2, 2)


def test_an_unchanged_repository_costs_ids_only(
    tmp_path: Path, count: Path, done: Callable[..., Any]
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    points = 50
    with (
        Repository.init(str(a), InitOptions(cipher=None)) as one,
        Repository.init(str(b), InitOptions(cipher=None)) as other,
    ):
        for number in range(points):
            one.backup(machine_of([bytes(4096)], name="n" * 200), BackupOptions(time=1_700_000_000 + number))
        assert len(one.replicate(other, one.points()).copied) == points
    for words in (("-r", a, "--to", f"{FAR}{b}"), ("-r", b, "--from", f"{FAR}{a}")):
        unchanged = done("replicate", *words, "--json").summary
        assert (unchanged["copied"], unchanged["already"]) == ([], points)
        assert int(count.read_text()) < 4096 + 40 * points  # so 1000 points are below 64 KiB


def test_cut_off_anywhere_it_goes_on(
    a: Path, tmp_path: Path, done: Callable[..., Any], holdfast: Any, far_side: Any
) -> None:
    b = f"{FAR}{tmp_path / 'b'}"
    done("init", "-r", b, "--like", a)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cuts = sorted(chance.randrange(200, 3 << 20) for _ in range(3))
    for cut in cuts:
        far_side(fuse=cut)
        outcome = holdfast("replicate", "-r", a, "--to", b, "--ack", "chunk")
        assert outcome.code == 0 or 50 <= outcome.code <= 58, outcome.err
    far_side()
    done("replicate", "-r", a, "--to", b)
    assert "0 copied, 2 there already" in done("replicate", "-r", a, "--to", b).out
    assert "no damage" in done("check", "-r", tmp_path / "b", "--read-data").out


def test_what_was_sent_before_a_cut_is_not_sent_again(
    tmp_path: Path, count: Path, done: Callable[..., Any], holdfast: Any, far_side: Any
) -> None:
    a, b = tmp_path / "a", f"{FAR}{tmp_path / 'b'}"
    with Repository.init(str(a), InitOptions(cipher=None, segment_bytes=1 << 20)) as repository:
        repository.backup(machine_of([random.Random(6).randbytes(40 << 20)]), BackupOptions())
    done("init", "-r", b, "--like", a)
    push = ("replicate", "-r", a, "--to", b, "--ack", "chunk", "--workers", "1")
    far_side("--append-only", fuse=36 << 20)
    assert 50 <= holdfast(*push).code <= 58
    far_side("--append-only")
    assert copied(done(*push, "--json")) == 1
    assert int(count.read_text()) < 24 << 20


def test_what_is_verified_over_there_is_not_sent_back(
    a: Path, tmp_path: Path, count: Path, done: Callable[..., Any], holdfast: Any, far_side: Any
) -> None:
    b = f"{FAR}{tmp_path / 'b'}"
    done("init", "-r", b, "--like", a)
    far_side("--append-only")
    done("replicate", "-r", a, "--to", b)
    for option in (("--verify",), ("--challenge", "100%")):
        summary = done("replicate", "-r", a, "--to", b, *option, "--json").summary
        assert summary["verified_points"] == 2
        assert summary["proven_records"] > 40
        assert summary["fetched_records"] == 0
        assert int(count.read_text()) < 16 << 10
    said = done("replicate", "-r", a, "--to", b, "--challenge", "50%").out
    assert "read and hashed on both sides" in said
    rotten(a)
    half = holdfast("replicate", "-r", a, "--to", b, "--verify")
    assert half.code == 100
    assert "1 sent here and opened" in half.out
    assert "1 of the records that were compared could not be had from the source" in half.err


def test_copies_are_noted_where_that_is_allowed(
    a: Path, tmp_path: Path, disk: Path, done: Callable[..., Any], far_side: Callable[..., None]
) -> None:
    b = tmp_path / "b"
    done("init", "-r", b, "--like", a)

    def known(repository: Path | str) -> list[str]:
        points = done("list", "-r", repository, "--json").document["points"]
        return [copy["address"] for point in points for copy in point["copies"]]

    push = ("replicate", "-r", a, "--to", f"{FAR}{b}")
    far_side("--append-only")
    done(*push)
    assert known(a) == [f"{FAR}{b}"] * 2
    assert known(b) == []
    far_side()
    done("backup", "-r", a, disk, "--vm", "web", "--time", "2026-03-03T00:00:00Z")
    done(*push, "--challenge", "50%")
    assert known(b) == [f"{socket.gethostname()}:{a}"] * 3
    far_side("--append-only")
    assert known(f"{FAR}{b}") == []  # where else copies are is not for such a client
    far_side("--read-only")
    done("replicate", "-r", b, "--from", f"{FAR}{a}")
    assert len(known(f"{FAR}{b}")) == 3


def test_mirroring_needs_the_right_to_forget(
    a: Path, tmp_path: Path, done: Callable[..., Any], holdfast: Any, far_side: Any
) -> None:
    b = f"{FAR}{tmp_path / 'b'}"
    done("init", "-r", b, "--like", a)
    push = ("replicate", "-r", a, "--to", b, "--mirror-retention")
    far_side("--append-only")
    refused = holdfast(*push)
    assert refused.code == 32
    assert "may only add restore points and read" in refused.err
    assert "leave out --mirror-retention" in refused.err
    assert done("list", "-r", b, "--json").document["points"] == []
    far_side()
    done(*push)
    done("forget", "-r", a, "web@latest~1")
    mirrored = done(*push, "--json").summary["mirrored"]
    assert [one["forgotten"] for one in mirrored] == [True]


def test_damage_on_either_side_is_found_and_healed_from_the_other(
    a: Path, tmp_path: Path, done: Callable[..., Any], holdfast: Any
) -> None:
    b = f"{FAR}{tmp_path / 'b'}"
    done("init", "-r", b, "--like", a)
    done("replicate", "-r", a, "--to", b)
    rotten(tmp_path / "b")
    for option in (("--verify",), ("--challenge", "100%")):
        found = holdfast("replicate", "-r", a, "--to", b, *option)
        assert 20 <= found.code <= 29, found.err
    healed = done("replicate", "-r", a, "--to", b, "--repair", "--verify")
    assert "healed 1 damaged record" in healed.out
    rotten(a)
    assert holdfast("check", "-r", a, "--read-data").code >= 20
    assert "healed 1 record from" in done("check", "-r", a, "--repair", "--from", b).out
    done("check", "-r", a, "--read-data")
