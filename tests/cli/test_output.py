"""Tables, progress and JSON: in a terminal, in a pipe, and with names that mean harm."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Callable

import pytest

from holdfast.cli import output
from holdfast.cli.invocation import Invocation
from holdfast.cli.output import Column, as_json, print_table, shown
from holdfast.cli.progress import Pace, progress

COLUMNS = [Column("NAME", wide=True), Column("SIZE", right=True)]


def test_piped_tables_are_aligned_and_complete(capsys) -> None:
    print_table(COLUMNS, [("a" * 200, "1"), ("虚拟机", "22"), ("e\u0301", "3"), ("", "")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NAME" + " " * 198 + "SIZE"
    assert lines[1] == "a" * 200 + "     1"
    assert lines[2] == "虚拟机" + " " * 194 + "    22"
    assert lines[3] == "e\u0301" + " " * 199 + "     3"
    assert lines[4] == ""


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert shown("a\nb\x1b[2J\x00\x7f\u202e\udcff\u200b") == r"a\nb\x1b[2J\x00\x7f\u202e\udcff\u200b"
    assert shown("größe 虚拟机 🦊") == "größe 虚拟机 🦊"
    assert as_json({"name": "\x1b\u202e\udcffü"}).isascii()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert (pace.rate, pace.left_s) == (0, None)
    for second in range(1, 101):
        clock.now_s = 100.0 + second
        pace.note(second * 10 if second <= 50 else 500 + (second - 50) * 20, 3000)
    assert pace.rate == pytest.approx(20)  # of late, not since the beginning
    assert pace.left_s == pytest.approx(75)
    assert pace.elapsed_s == 100


def test_pace_of_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.note(0, 0)
    clock.now_s += 1
    pace.note(0, 0)
    assert pace.left_s is None


def test_json_progress_is_rare(capsys) -> None:
    with progress(Invocation(json=True), "testing") as shown_progress:
        for done in range(1000):
            shown_progress.update(done, 1000, bytes_new=done)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 1 <= len(lines) <= 3
    assert set(lines[0]) == {
        "type", "doing", "bytes_done", "bytes_total", "bytes_new", "rate_per_s", "elapsed_s", "left_s",
    }  # fmt: skip


def test_progress_is_silent_in_pipes_but_answers_a_signal(capsys) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with progress(Invocation(), "testing") as shown_progress:
        shown_progress.update(1 << 20, 4 << 20)
        assert capsys.readouterr() == ("", "")
        os.kill(os.getpid(), signal.SIGUSR1)
        shown_progress.update(2 << 20, 4 << 20)
    text = capsys.readouterr().err
    assert re.fullmatch(r"holdfast: testing: 2\.00 MiB of 4\.00 MiB, \S+ \S+/s, \d+ s left\n", text)
    assert signal.getsignal(signal.SIGUSR1) == before


def in_terminal(words: list[str], width: int, environment: dict[str, str] | None = None) -> str:
    """What a command shows on a terminal of that width."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    settings = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")
    }
    settings |= {"TERM": "xterm-256color"} | (environment or {})
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=settings, start_new_session=True
    )
    os.close(theirs)
    chunks: list[bytes] = []
    while select.select([ours], [], [], 30)[0]:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    assert process.wait(30) == 0
    return b"".join(chunks).decode()


PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_shows_everything_at_any_width(
    program: Callable[..., list[str]], repo, done, width: int
) -> None:
    shown_text = in_terminal(program("list", "-r", repo), width)
    assert "\x1b[1m" in shown_text  # headings stand out
    plain = PLAIN.sub("", shown_text)
    assert "…" not in plain
    for point in done("list", "-r", repo, "--json").document["points"]:
        assert point["id"][:12] in plain
        assert point["time"] in plain.replace("\r\n", "")
    assert "\x1b" not in in_terminal(program("list", "-r", repo), width, {"NO_COLOR": "1", "TERM": "dumb"})


def test_a_terminal_shows_progress(program, repo, tmp_path) -> None:
    source = tmp_path / "big.raw"
    source.write_bytes(os.urandom(40 << 20))
    text = in_terminal(program("backup", "-r", repo, source), 100)
    assert "backing up big" in text
    assert "MiB/s" in text
    assert "restore point" in PLAIN.sub("", text)


def test_names_can_not_paint_on_the_terminal(program, empty_repo, done, tmp_path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    done("backup", "-r", empty_repo, disk, "--vm", "\x1b[31mred[bold]x[/bold]\r\n")
    for command in (["list"], ["show", "\x1b[31mred[bold]x[/bold]\r\n@latest"], ["check"]):
        text = in_terminal(program("-r", empty_repo, *command), 120)
        assert "\x1b[31m" not in text
        if command != ["check"]:
            assert r"\x1b[31mred[bold]x[/bold]\r\n" in PLAIN.sub("", text)


def test_output_is_utf_8_whatever_the_locale(execute, empty_repo, done, tmp_path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    done("backup", "-r", empty_repo, disk, "--vm", "größe")
    environment = {**os.environ, "LC_ALL": "C"}
    assert "größe" in execute("list", "-r", empty_repo, env=environment, encoding="utf-8").out
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert "gr\\xf6\\xdfe" in execute("list", "-r", empty_repo, env=environment).out


def test_on_terminal_without_stdout(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert not output.on_terminal()
