"""The failure matrix: every operation, interrupted in every way at every step by which it changes the disk.

A driver process forks a child for each instant: the child runs the operation on a copy of a real repository with a
`Tripwire`, and is killed for good, or meets a full disk or an I/O error, or the power goes. Another child then
looks at what is left. The driver itself never opens a repository and has one thread.

`python -m rig.matrix OPERATION [--every]` runs one operation and prints its rows as JSON; `Matrix` is the other end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rig.tripwire import Fault, Tripwire

_TIMEOUT_S = 60
_HERE = Path(__file__).resolve().parent.parent

COLUMNS: dict[str, tuple[Fault, ...]] = {
    "kill -9": (Fault.KILL_BEFORE, Fault.KILL_AMID, Fault.KILL_AFTER),
    "full disk": (Fault.FULL,),
    "I/O error": (Fault.ERROR,),
    "power cut": (Fault.POWER_NOTHING, Fault.POWER_ANYTHING),
}
SAME = "the same"
BEFORE = "as before"
DONE = "done"
LATER = "as before; done with the next backup"
UNCHANGED = "unchanged"
UNFINISHED = "damaged where it was, or less"
STATES = (BEFORE, LATER, UNCHANGED, UNFINISHED, DONE)
_POWER_CUTS = 3
"""So many of the images that may be left after each step are tried."""


@dataclass(frozen=True)
class Outcome:
    """What came of one instant.

    Args:
        step: where the fault struck.
        column: what struck.
        said: exit code of the command if it lived; None if it died.
        state: `as before`, `done` (as if it had run through), or what else was found.
        lost: what of the data is gone.
        following: what works next: the same command, or the exit code with which that says that it is done.
        check: what `check --read-data` said.
        wrong: a broken promise; empty if all is well.
    """

    step: str
    column: str
    said: int | None
    state: str
    lost: str
    following: str
    check: str
    wrong: str = ""


@dataclass(frozen=True)
class Instant:
    """Where and how a fault strikes. Both repeat it exactly."""

    at: int
    step: str
    fault: Fault
    variant: int = 0


def in_child(act: Callable[[], object], errors: Path) -> tuple[int, Any]:
    """Runs `act` in a forked process; returns the signal that ended it, and what it returned or what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(_TIMEOUT_S)
        fd = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 2)
        try:
            answer = json.dumps({"value": act()})
        except BaseException:
            answer = json.dumps({"raised": traceback.format_exc()})
        data = answer.encode()
        while data:
            data = data[os.write(writer, data) :]
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (-status, None) if status else (0, json.loads(text))


def _repeatably(name: str, act: Callable[[], None]) -> None:
    """With ids and salts that are the same each time; in a process of its own."""
    own = random.Random(name)
    os.urandom = own.randbytes  # type: ignore[assignment]
    act()


class Driver:
    """Runs the instants of one operation in a folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        from rig.operations import OPERATIONS, TEMPLATES, set_up

        set_up()
        (self.operation,) = (operation for operation in OPERATIONS if operation.name == name)
        self._folder = folder
        self._errors = folder / "stderr"
        self._template = folder / "template"
        self._template.mkdir()
        template = TEMPLATES[self.operation.template]
        self._well(lambda: _repeatably("template", lambda: template(self._template)))
        self.before = self._well(lambda: self._states(self._template))
        work = self._fresh()
        self.steps: list[tuple[str, bool]] = self._well(lambda: self._traced(work))
        self.after = self._well(lambda: self._states(work))

    def _states(self, folder: Path) -> list[str]:
        from rig.operations import state_of

        return state_of(folder, self.operation)

    def _well(self, act: Callable[[], object]) -> Any:
        ended_by, answer = in_child(act, self._errors)
        assert not ended_by, f"ended by signal {ended_by}"
        assert "value" in answer, answer["raised"]
        return answer["value"]

    def _fresh(self) -> Path:
        work = self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self._template, work)
        return work

    def _traced(self, work: Path) -> list[tuple[str, bool]]:
        wire = Tripwire(str(work / "repo"))
        wire.install()
        _repeatably(self.operation.name, lambda: self.operation.run(work))
        assert not wire.missed, f"changes of files that the matrix does not know: {wire.missed}"
        return wire.log

    def instants(self, *, every: bool) -> Iterator[Instant]:
        """All, or for each kind of step and each fault a few that are spread evenly."""
        numbers: dict[str, list[int]] = {}
        for number, (step, _) in enumerate(self.steps, 1):
            numbers.setdefault(step, []).append(number)
        for kind, (step, found) in enumerate(numbers.items()):
            for column, faults in enumerate(COLUMNS.values()):
                candidates = [
                    Instant(number, step, fault, variant)
                    for number in found
                    for fault in faults
                    if fault is not Fault.KILL_AMID or self.steps[number - 1][1]
                    for variant in range(_POWER_CUTS if fault is Fault.POWER_ANYTHING else 1)
                ]
                if every:
                    yield from candidates
                else:
                    yield candidates[(7 * kind + 3 * column) * 5 % len(candidates)]

    def run(self, instant: Instant) -> Outcome:
        """Lets the fault strike and looks at what is left."""
        work = self._fresh()
        cut = self._folder / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        ended_by, answer = in_child(lambda: self._strike(work, cut, instant), self._errors)
        column = next(name for name, faults in COLUMNS.items() if instant.fault in faults)
        said: int | None = None
        wrong = ""
        if column in ("kill -9", "power cut"):
            if ended_by != signal.SIGKILL:
                wrong = f"it was not killed: {ended_by} {answer}"
        elif ended_by:
            wrong = f"it was ended by signal {ended_by}"
        elif "raised" in answer:
            wrong = answer["raised"]
        else:
            said, fired, step = answer["value"]
            if not fired or step != instant.step:
                wrong = f"the fault struck at {step!r}"
        if column == "power cut" and not wrong:
            shutil.rmtree(work)
            cut.rename(work)
        return self._judged(work, instant, column, said, wrong)

    def _strike(self, work: Path, cut: Path, instant: Instant) -> tuple[int, bool, str]:
        from holdfast.errors import HoldfastError

        seed = zlib.crc32(f"{self.operation.name} {instant}".encode())
        wire = Tripwire(str(work / "repo"), instant.at, instant.fault, str(cut), seed)
        wire.install()
        code = 0
        try:
            _repeatably(self.operation.name, lambda: self.operation.run(work))
        except HoldfastError as error:
            code = error.exit_code
        step = wire.log[instant.at - 1][0] if len(wire.log) >= instant.at else "no step"
        return code, wire.fired, step

    def _judged(self, work: Path, instant: Instant, column: str, said: int | None, wrong: str) -> Outcome:
        from rig.operations import judge, judge_again

        twin = self._folder / "twin"
        shutil.rmtree(twin, ignore_errors=True)
        found: list[dict[str, Any]] = []
        if not wrong:
            shutil.copytree(work, twin)
        for folder, look in ((work, judge), (twin, judge_again)):
            if not wrong:
                ended_by, answer = in_child(lambda f=folder, j=look: j(f, self.operation), self._errors)
                if ended_by:
                    wrong = f"{look.__name__} was ended by signal {ended_by}"
                elif "raised" in answer:
                    wrong = answer["raised"]
                else:
                    found.append(answer["value"])
        if wrong:
            return Outcome(instant.step, column, said, "", "", "", "", f"{instant}: {wrong}")
        first, second = found
        state = self._named(first)
        wrong = self._broken_promise(first, second, state, column, said)
        again = second["again"]
        following = SAME if again == "done" else again.split()[-1]
        lost = "none"
        if self.operation.adds is not None and state == BEFORE:
            lost = "the running backup"
        return Outcome(
            instant.step,
            column,
            said,
            state,
            lost,
            following,
            first["check"] or "-",
            f"{instant}: {wrong}" if wrong else "",
        )

    def _broken_promise(
        self, first: dict[str, Any], second: dict[str, Any], state: str, column: str, said: int | None
    ) -> str:
        """A sentence on the first promise that was not kept; empty if all were."""
        again = second["again"]
        if again.startswith("fails"):
            return f"the same command {again}"
        if again != "done" and state == BEFORE and self.before != self.after:
            return f"the same command says {again}, but it was not done"
        without = [entry for entry in second["state"] if entry != "next"]
        if sorted(set(without)) != sorted(set(self.after)):
            return f"after the same command there is {without}"
        if again == "done" and second["check"] != "clean":
            return f"after the same command check says {second['check']}"
        if again == "done" and second["left over"]:
            return f"nothing removes {second['left over']}"
        if state not in STATES:
            return f"there is {state}"
        if said == 0 and state not in (DONE, UNCHANGED):
            return "it said that it was done, and it was not"
        expected = {"full disk": 31, "I/O error": 30}.get(column)
        if said and said != expected:
            return f"it ended with exit code {said}"
        return ""

    def _named(self, found: dict[str, Any]) -> str:
        state, then = found["state"], [entry for entry in found["then"] if entry != "next"]
        if self.operation.heals:
            return DONE if state == self.after and found["check"] == "clean" else UNFINISHED
        if state == then == self.after:
            return UNCHANGED if self.before == self.after else DONE
        if state == self.before:
            return BEFORE if then == self.before else LATER if then == self.after else f"{state}, then {then}"
        return f"{state}, then {then}"


def run_operation(name: str, *, every: bool) -> list[Outcome]:
    """All outcomes of one operation, in a process of its own; raises if a promise was broken."""
    paths = [str(_HERE.parent.parent), str(_HERE), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-m", "rig.matrix", name, *(["--every"] if every else [])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [Outcome(**row) for row in json.loads(done.stdout)]


def main() -> None:
    name, every = sys.argv[1], "--every" in sys.argv
    os.environ.pop("HOLDFAST_INDEX_DIR", None)
    memory = "/dev/shm"
    base = memory if os.path.isdir(memory) and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="holdfast-matrix-", dir=base) as folder:
        driver = Driver(Path(folder), name)
        outcomes = [driver.run(instant) for instant in driver.instants(every=every)]
    for outcome in outcomes:
        if outcome.wrong:
            sys.stderr.write(f"{name}: {outcome.column} at '{outcome.step}': {outcome.wrong}\n\n")
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
    if any(outcome.wrong for outcome in outcomes) and "--keep-going" not in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()
