"""Logs of runs: what is in them, how they are called, how many there are, and that none of that can make a run fail."""

from __future__ import annotations

import os
import re
import stat
import threading
from pathlib import Path

import pytest

from holdfast.cli import run_log
from holdfast.cli.invocation import Invocation
from holdfast.cli.output import notice, warn
from holdfast.cli.run_log import RunLog, logged
from holdfast.errors import SourceError

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (note   |warning|error  ) .+")


def lines(log: RunLog) -> list[str]:
    """Kind and sentence of each line; all have their form."""
    found = Path(log.path).read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in found)
    return [line.partition(" ")[2] for line in found]


def test_what_the_user_is_told_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invocation = Invocation()
    with logged(invocation, str(tmp_path / "a" / "logs"), "backup", "esx1-web1") as log:
        log.note("a step")
        notice(invocation, "something else")
        warn(invocation, "two lines\nand \x1b[31m colour")
    assert invocation.log_path == ""
    told = lines(log)
    assert told[0].startswith("note    Holdfast ")
    assert told[1:] == [
        "note    a step",
        "note    something else",
        r"warning two lines\nand \x1b[31m colour",
        "note    done, with warnings (exit code 100)",
    ]
    assert "a step" not in capsys.readouterr().err
    assert stat.S_IMODE(os.stat(log.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "a" / "logs").st_mode) == 0o700
    notice(invocation, "of another run")
    assert lines(log) == told


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (SourceError("it broke", hint="mend it"), ["it broke (exit code 40)", "hint: mend it"]),
        (KeyboardInterrupt(), ["interrupted (exit code 130)", "hint: all is well"]),
        (BrokenPipeError(), None),
        (ZeroDivisionError("x"), None),
    ],
)
def test_a_failure_is_in_it_and_names_it(
    tmp_path: Path, error: BaseException, last: list[str] | None
) -> None:
    invocation = Invocation(if_interrupted="all is well")
    with pytest.raises(type(error)), logged(invocation, str(tmp_path), "restore", "esx1-web1"):
        raise error
    log = invocation.run_log
    assert log is not None
    assert invocation.log_path == log.path
    told = [line for line in lines(log) if line.startswith("error")]
    assert told
    if last is not None:
        assert told == [f"error   {text}" for text in last]


def test_names_sort_by_time_and_are_never_taken_twice(tmp_path: Path) -> None:
    made = [
        RunLog.create(str(tmp_path), "backup", place)
        for place in ("h-a", "h-a", "h-../../é b\0", "", "x" * 300)
    ]
    for log in made:
        log.close()
        name = os.path.basename(log.path)
        assert os.path.dirname(log.path) == str(tmp_path)
        assert re.match(r"\d{8}T\d{6}Z-backup-[\w.-]+\.log\Z", name)
        assert len(name.encode()) < 120
    assert len({log.path for log in made}) == len(made)


def test_a_folder_has_so_many_and_nothing_else_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "MAX_LOGS", 3)
    mine = [f"2026010{day}T000000Z-backup-h-{'z' if day == 1 else 'a'}.log" for day in range(1, 6)]
    others = ["20250101T000000Z-backup-h-a.txt", "20250101-restore.log", "notes.log"]
    for name in mine + others:
        (tmp_path / name).touch()
    log = RunLog.create(str(tmp_path), "restore", "h-a")
    log.close()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, *mine[-2:], os.path.basename(log.path)])


def test_it_is_bounded_but_errors_get_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_LOG_BYTES", 2000)
    log = RunLog.create(str(tmp_path), "backup", "h-a")
    threads = [threading.Thread(target=lambda: [log.note("x" * 100) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.note("it broke", "error")
    log.close()
    log.note("too late", "error")
    told = lines(log)
    assert told[-2:] == [
        "note    the log is full; from here on only errors are taken down",
        "error   it broke",
    ]
    assert os.path.getsize(log.path) < 2300


@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_without_a_log_all_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], obstacle: str
) -> None:
    folder = ""
    if obstacle == "a file":
        (tmp_path / "file").touch()
        folder = str(tmp_path / "file" / "logs")
    else:
        monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    invocation = Invocation()
    with logged(invocation, folder, "backup", "esx1-web1") as log:
        warn(invocation, "something")
    assert log.path == ""
    told = capsys.readouterr().err
    assert "no log of this run can be kept" in told
    assert "--log-dir" in told


def test_a_file_that_can_not_be_written_any_more_is_given_up(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    log = RunLog(str(tmp_path / "x"), full)
    log.note("one")
    log.note("two", "error")
    log.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(full)


def test_the_usual_folder_is_that_of_the_users_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with logged(Invocation(), "", "backup", "h-a") as log:
        pass
    assert os.path.dirname(log.path) == str(tmp_path / "holdfast" / "logs")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    with logged(Invocation(), "", "backup", "h-a") as log:
        pass
    assert os.path.dirname(log.path) == str(tmp_path / ".local" / "state" / "holdfast" / "logs")
