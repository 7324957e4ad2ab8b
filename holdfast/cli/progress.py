"""How far a long command has come: a bar on a terminal, JSON lines for programs, one line on SIGUSR1.

Driven by the engine's callbacks a few times a second; has no thread or timer of its own.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final, Protocol

from holdfast.cli.output import as_json
from holdfast.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from holdfast.cli.invocation import Invocation

__all__ = ["Pace", "Progress", "progress"]

_JSON_EVERY_S: Final = 0.5
_MEMORY_S: Final = 15.0


class Pace:
    """Rate and time left, from how far things had come at some moments of the last seconds.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._seen: list[tuple[float, int]] = [(self._began_s, 0)]
        self.done = 0
        self.total = 0

    def note(self, done: int, total: int) -> None:
        """Takes down how much is done now."""
        now_s = self._clock()
        self.done, self.total = done, total
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and self._seen[0][0] < now_s - _MEMORY_S:
            self._seen.pop(0)

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began_s

    @property
    def rate(self) -> float:
        """Units a second, lately."""
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    @property
    def left_s(self) -> float | None:
        """Estimated seconds until all is done; None while that can not be told."""
        if self.total <= 0 or self.rate <= 0:
            return None
        return max(0, self.total - self.done) / self.rate


class Progress(Protocol):
    """Is told how far the work has come."""

    def update(self, done: int, total: int, **details: int) -> None:
        """Takes note.

        Args:
            done, total: bytes, or packs when an index is rebuilt.
            details: further figures for the JSON lines.
        """
        ...


class _Silent:
    """Shows nothing, but answers SIGUSR1."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._asked = False
        self.pace = Pace()

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGUSR1: has the next update print a line."""
        del number, frame
        self._asked = True

    def update(self, done: int, total: int, **details: int) -> None:
        """See `Progress`."""
        self.pace.note(done, total)
        if self._asked:
            self._asked = False
            self.tell(f"{self._what}: {self.line() or 'nothing to count yet'}")
        self.show(details)

    def tell(self, line: str) -> None:
        """Puts the status line on stderr."""
        print(f"holdfast: {line}", file=sys.stderr, flush=True)

    def show(self, details: dict[str, int]) -> None:
        """What the kinds of progress do differently."""

    def line(self) -> str:
        """How far it is, in words; empty where that can not be counted."""
        pace = self.pace
        if not pace.total:
            return ""
        size = format_size if self._unit == "bytes" else str
        words = [f"{size(pace.done)} of {size(pace.total)}"]
        if self._unit == "bytes":
            words.append(f"{format_size(int(pace.rate))}/s")
        if pace.left_s is not None:
            words.append(f"{_rounded(pace.left_s)} left")
        return ", ".join(words)


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 10 else format_duration(seconds)


class _JsonLines(_Silent):
    """Lines on stdout, some a second at most. A reader that went away does not stop the work."""

    _next_s = 0.0

    def tell(self, line: str) -> None:
        """See `_Silent`."""
        print(as_json({"type": "notice", "message": line}), file=sys.stderr, flush=True)

    def show(self, details: dict[str, int]) -> None:
        """See `_Silent`."""
        elapsed_s = self.pace.elapsed_s
        if elapsed_s < self._next_s:
            return
        self._next_s = elapsed_s + _JSON_EVERY_S
        left_s = self.pace.left_s
        value = {
            "type": "progress",
            "doing": self._what,
            f"{self._unit}_done": self.pace.done,
            f"{self._unit}_total": self.pace.total,
            **details,
            "rate_per_s": round(self.pace.rate),
            "elapsed_s": round(elapsed_s, 1),
            "left_s": None if left_s is None else round(left_s),
        }
        try:
            print(as_json(value), flush=True)
        except BrokenPipeError:
            self._next_s = float("inf")


class _Bar(_Silent):
    """A bar on the terminal, drawn by rich."""

    def __init__(self, what: str, unit: str, bar: RichProgress, task: TaskID) -> None:
        super().__init__(what, unit)
        self._bar = bar
        self._task = task

    def show(self, details: dict[str, int]) -> None:
        """See `_Silent`."""
        del details
        self._bar.update(
            self._task, completed=self.pace.done, total=self.pace.total or None, figures=self.line()
        )
        self._bar.refresh()


@contextlib.contextmanager
def progress(invocation: Invocation, what: str, unit: str = "bytes") -> Iterator[Progress]:
    """Progress of one piece of work, in the form that fits where the output goes."""
    with contextlib.ExitStack() as stack:
        shown: _Silent
        if invocation.json:
            shown = _JsonLines(what, unit)
        elif sys.stderr is not None and sys.stderr.isatty():
            shown = stack.enter_context(_bar(what, unit))
        else:
            shown = _Silent(what, unit)
        before = signal.getsignal(signal.SIGUSR1)
        with contextlib.suppress(ValueError):  # not in the main thread: then there is no status line
            signal.signal(signal.SIGUSR1, shown.ask)
            stack.callback(signal.signal, signal.SIGUSR1, before)
        yield shown


@contextlib.contextmanager
def _bar(what: str, unit: str) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        yield _Bar(what, unit, bar, bar.add_task(what, total=None, figures=""))
