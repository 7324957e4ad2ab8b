"""The two processes: signals, sudden ends, and that neither outlives the other. All with real processes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 30


@pytest.fixture(scope="session")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "slow.raw"
    source.write_bytes(base64.b64encode(random.Random(3).randbytes(27 << 20)))
    return source


@pytest.fixture
def slow(done, slow_source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A repository and a source whose backup takes some seconds: compression is what makes it slow."""
    done("init", "-r", tmp_path / "repo", "--compression", "zstd:14")
    return tmp_path / "repo", slow_source


@pytest.fixture
def begin(program) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command in a process group of its own, as a shell does."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **others: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            program(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **({"stdin": subprocess.DEVNULL} | others),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def slow_backup(begin, slow, *, stored: bool = False, **others: Any) -> subprocess.Popen[str]:
    """A backup that is at work; with `stored`, some of the source is in the repository already."""
    repo, source = slow
    process = begin("backup", "-r", repo, source, "--json", "--workers", "1", **others)
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        assert record["type"] == "progress", "the backup was over too soon"
        if record["bytes_done"] < record["bytes_total"] and (record["bytes_new"] or not stored):
            return process
    raise AssertionError(process.communicate()[1])


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], TIMEOUT_S)[0])


@pytest.mark.parametrize("how", ["Ctrl-C", "whole group", "parent", "child"])
def test_an_interrupted_backup_says_so(begin, slow, how: str) -> None:
    terminal, theirs = pty.openpty()
    process = slow_backup(
        begin, slow, stdin=theirs, preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    )
    os.close(theirs)
    if how == "Ctrl-C":
        os.write(terminal, b"\x03")
    elif how == "whole group":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "parent":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(child_of(process.pid), signal.SIGHUP)
    out, err = process.communicate(timeout=TIMEOUT_S)
    os.close(terminal)
    assert process.returncode == 130
    error = json.loads(err)
    assert (error["code"], error["message"]) == (130, "interrupted")
    assert "found again by the next backup" in error["hint"]
    assert '"summary"' not in out


def test_an_interrupted_backup_is_taken_up_by_the_next(begin, slow, execute) -> None:
    process = slow_backup(begin, slow, stored=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    repo, source = slow
    assert execute("list", "-r", repo, "--json").document == {"points": []}
    summary = execute("backup", "-r", repo, source, "--json").summary
    assert summary["chunks_reused"] > 0
    assert summary["bytes_new"] < summary["size_bytes"]
    assert execute("check", "-r", repo, "--read-data").code == 0


def test_whoever_kills_the_parent_kills_the_child(begin, slow, execute) -> None:
    process = slow_backup(begin, slow)
    child = child_of(process.pid)
    pidfd = os.pidfd_open(child)
    try:
        process.kill()
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert has_ended(pidfd)
    finally:
        os.close(pidfd)
    assert execute("check", "-r", slow[0], "--read-data").code == 0


def test_a_killed_child_is_reported(begin, slow) -> None:
    process = slow_backup(begin, slow)
    os.kill(child_of(process.pid), signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 137
    assert json.loads(err)["code"] == 137
    assert "SIGKILL" in err
    assert "memory" in err


def test_a_second_request_ends_it_at_once(begin, slow) -> None:
    """Within the first second another signal is the same request: that of a terminal comes twice."""
    process = slow_backup(begin, slow)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130


def test_an_ignored_hangup_stays_ignored(program, slow) -> None:
    repo, source = slow
    process = subprocess.Popen(
        ["nohup", *program("backup", "-r", repo, source, "--json", "--workers", "1")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGHUP)
        process.stdout.readline()
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_status_line_on_request(begin, slow) -> None:
    process = slow_backup(begin, slow)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    notice = json.loads(process.stderr.readline())
    assert notice["type"] == "notice"
    assert notice["message"].startswith("backing up slow: ")
    assert " of 36.0 MiB" in notice["message"]


ENDS = """
import os, signal, sys
from holdfast.cli.supervise import supervise
sys.exit(supervise(lambda: {body}, json={json}))
"""


def supervised(body: str, *, json: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ENDS.format(body=body, json=json)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT"])
def test_a_crash_inside_of_a_library_is_a_damaged_index(name: str) -> None:
    body = f"os.kill(os.getpid(), signal.{name}) or 0"
    outcome = supervised(body)
    assert outcome.returncode == 21
    assert name in outcome.stderr
    assert "index is damaged" in outcome.stderr
    assert "hint: the packs hold everything: run 'holdfast check --rebuild-index'" in outcome.stderr
    error = json.loads(supervised(body, json=True).stderr)
    assert (error["type"], error["code"]) == ("error", 21)


def test_other_signals_are_named() -> None:
    outcome = supervised("os.kill(os.getpid(), signal.SIGUSR2) or 0")
    assert outcome.returncode == 128 + signal.SIGUSR2
    assert "SIGUSR2" in outcome.stderr


@pytest.mark.parametrize("code", [0, 1, 23, 100, 130])
def test_the_exit_code_is_the_childs(code: int) -> None:
    assert supervised(str(code)).returncode == code


def test_the_child_is_told_to_die_with_its_parent() -> None:
    body = "print(__import__('ctypes').CDLL(None).prctl(2, __import__('ctypes').byref(n := __import__('ctypes').c_int())), n.value) or 0"
    assert supervised(body).stdout == f"0 {signal.SIGKILL.value}\n"


def test_a_cut_off_index_is_no_crash_for_the_user(execute, repo, done) -> None:
    data = repo / "index" / "data.mdb"
    before = done("list", "-r", repo).out
    os.truncate(data, 2 * os.sysconf("SC_PAGE_SIZE"))
    outcome = execute("list", "-r", repo, "--json")
    assert outcome.code == outcome.error["code"] == 21
    assert "--rebuild-index" in outcome.error["hint"]
    assert execute("check", "-r", repo, "--rebuild-index", "--read-data").code == 0
    assert execute("list", "-r", repo).out == before


def test_a_reader_that_goes_away_is_no_error(program, repo) -> None:
    words = " ".join(f"'{word}'" for word in program("list", "-r", repo, "--json"))
    outcome = subprocess.run(
        ["bash", "-c", f"{words} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert outcome.stderr == ""
    assert outcome.stdout.strip() in ("0", "141")


def test_a_full_disk_under_stdout_is_told(execute, repo) -> None:
    with open("/dev/full", "w") as full:
        outcome = execute("list", "-r", repo, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert outcome.code == 31
    assert "no space left" in outcome.err


def test_closed_streams_do_no_harm(program, repo) -> None:
    words = " ".join(f"'{word}'" for word in program("list", "-r", repo))
    for redirection in (">&-", "2>&-", ">&- 2>&- <&-"):
        outcome = subprocess.run(
            ["bash", "-c", f"{words} {redirection}"], capture_output=True, text=True, check=False
        )
        assert outcome.returncode == 0, redirection
        assert "Traceback" not in outcome.stderr
