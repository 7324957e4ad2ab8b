"""Processes that work on one repository at the same time until they are stopped or killed: writers, a collector, a watcher.

`Thrash` starts one server that has imported everything and forks a child for each job: a child that is killed is
replaced within milliseconds. Each child writes a journal outside of the repository: what it is about to do, and
what was reported done. A line is one write, so a killed child leaves a whole journal; what it was about to do
may then have happened or not. `Known` is what the journal of a writer proves.

Run as a program it is the server; jobs and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3

from rig.disks import KIB, MemorySource, content, machine_of
from rig.served import Served

UNITS = 48
POOL = 160
"""Units that all writers draw from: they are shared, die, and come back."""
MOST_POINTS = 5


def digest(data: bytes) -> str:
    return blake3.blake3(data).hexdigest()


def vm_of(number: int) -> str:
    """The VM that a writer backs up."""
    return f"vm{number}"


class Thrash(Served):
    """Starts the server and talks to it. `start` and `kill` are for any number of children at once."""

    def __init__(self) -> None:
        super().__init__("rig.thrash")

    def start(self, do: str, **job: object) -> int:
        """The process id of a new child."""
        return self._ask(do=do, **job)

    def kill(self, pid: int) -> bool:
        """Kills a child; returns whether it was still at work. It fails if the child had failed before."""
        return self._ended(self._ask(do="kill", pid=pid)) == -signal.SIGKILL

    def wait(self, pid: int) -> None:
        """Waits for the end of a child that has been told to stop."""
        self._ended(self._ask(do="wait", pid=pid))

    @staticmethod
    def _ended(status: int) -> int:
        assert status in (0, -signal.SIGKILL), f"a child ended with {status}; see what it has printed"
        return status

    def _ask(self, **job: object) -> int:
        return int(self.ask(job))


class Journal:
    """Lines of JSON that outlive whoever writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, *entry: object) -> None:
        line = json.dumps(entry).encode() + b"\n"
        assert os.write(self._fd, line) == len(line)


def entries(path: Path) -> list[list[Any]]:
    """What a journal says; nothing if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Known:
    """What the journal of a writer proves about its points, which have ids in hexadecimal.

    Args:
        tried: digests of all contents of which a backup was begun.
        units: those of the last of them.
        listed: points that must be listed, with what they hold.
        hidden: points that must not be.
        open: points of which it is not known, with what they hold, since their writer was killed meanwhile.
        pinned: points that must be pinned.
        counts: how often each kind of entry occurs.
    """

    tried: set[str] = field(default_factory=set)
    units: list[int] = field(default_factory=list)
    listed: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Known:
        known = cls()
        for entry in entries(path):
            known._take(*entry)
        return known

    def _take(self, what: str, *rest: Any) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if what == "try":
            self.tried.add(rest[0])
            self.units = rest[1]
        elif what == "point":
            self.listed[rest[0]] = rest[1]
        elif what == "forget":
            self.open[rest[0]] = self.listed.pop(rest[0])
        elif what == "recall":
            self.open[rest[0]] = self.hidden.pop(rest[0])
        elif what in ("forgotten", "gone"):
            self.hidden[rest[0]] = self.open.pop(rest[0])
        elif what == "recalled":
            self.listed[rest[0]] = self.open.pop(rest[0])
        elif what == "pinned":
            self.pinned.add(rest[0])
        elif what == "unpin":
            self.pinned.discard(rest[0])


# --- the children


class _Writer:
    """Backs one VM up over and over, and forgets, brings back, pins and restores its points."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._rng = random.Random(job["seed"])
        self._path = Path(job["journals"]) / f"writer-{job['number']}"
        self._known = Known.of(self._path)
        self._journal = Journal(self._path)
        self._pins_done: set[str] = set()

    def _note(self, *entry: Any) -> None:
        self._journal.note(*entry)
        self._known._take(*entry)

    def step(self) -> None:
        from holdfast.repo.repository import Repository
        from rig.engine import quiet

        with Repository.open(self._job["path"], notify=quiet) as repository:
            for _ in range(self._rng.randrange(1, 8)):
                acts: list[Callable[[Repository], None]] = [self._backup] * 4
                if self._known.listed:
                    acts += [self._restore, self._pin]
                if len(self._known.listed) > 2:
                    acts += [self._forget] * (1 if len(self._known.listed) < MOST_POINTS else 6)
                if self._known.hidden:
                    acts += [self._recall]
                self._rng.choice(acts)(repository)

    def _backup(self, repository: Any) -> None:
        from holdfast.repo.backup import BackupOptions

        rng = self._rng
        units = self._known.units or [rng.randrange(POOL) for _ in range(UNITS)]
        for _ in range(rng.randrange(12)):
            units[rng.randrange(UNITS)] = rng.randrange(POOL) if rng.random() < 0.8 else rng.randrange(2**40)
        data = content(units, b"tail" * rng.randrange(3))
        self._note("try", digest(data), units)
        delay_s = rng.choice([0.0, 0.0, 0.002, 0.02])
        source = MemorySource(data, on_read=lambda _offset: time.sleep(delay_s))
        machine = machine_of([source], name=vm_of(self._job["number"]))
        point = repository.backup(machine, BackupOptions(workers=rng.choice([1, 2]))).point
        self._note("point", point.hex(), digest(data))

    def _choice(self, of: dict[str, str]) -> str:
        return self._rng.choice(sorted(of))

    def _forget(self, repository: Any) -> None:
        chosen = self._choice(self._known.listed)
        self._note("forget", chosen)
        repository.forget([repository.resolve(chosen)])
        self._note("forgotten", chosen)

    def _recall(self, repository: Any) -> None:
        from holdfast.errors import DamagedPoint, PointNotFound

        chosen = list(self._known.hidden)[-1]
        found = [point for point in repository.hidden_points() if point.id.hex() == chosen]
        self._note("recall", chosen)
        try:
            repository.recall(found)
            self._note("recalled" if found else "gone", chosen)
        except (DamagedPoint, PointNotFound):  # it was collected a moment ago
            self._note("gone", chosen)

    def _pin(self, repository: Any) -> None:
        chosen = self._choice(self._known.listed)
        if chosen in self._known.pinned:
            self._note("unpin", chosen)
            repository.unpin([repository.resolve(chosen)])
        else:
            repository.pin([repository.resolve(chosen)])
            self._note("pinned", chosen)

    def _restore(self, repository: Any) -> None:
        from rig.engine import restored

        chosen = self._choice(self._known.listed)
        found = digest(restored(repository, repository.resolve(chosen))["disk0.raw"])
        assert found == self._known.listed[chosen], f"point {chosen[:12]} came back otherwise"
        self._note("restored", chosen)


class _Collector:
    def __init__(self, job: dict[str, Any]) -> None:
        self._path = job["path"]
        self._rng = random.Random(job["seed"])
        self._journal = Journal(Path(job["journals"]) / "collector")

    def step(self) -> None:
        from holdfast.repo.gc import CollectOptions
        from holdfast.repo.repository import Repository
        from rig.engine import quiet

        with Repository.open(self._path, notify=quiet) as repository:
            self._journal.note("collect")
            options = CollectOptions(compact_below=self._rng.choice([0.0, 0.5, 0.95]))
            report = repository.collect(options)
            assert not report.notes, report.notes
            assert report.complete
            self._journal.note("collected", report.points, report.records, report.freed_bytes)


class _Watcher:
    """Restores whatever is listed; it must be what a writer has begun to back up."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._rng = random.Random(job["seed"])
        self._journals = Path(job["journals"])
        self._journal = Journal(self._journals / "watcher")

    def step(self) -> None:
        from holdfast.errors import PointNotFound
        from holdfast.repo.repository import Repository
        from rig.engine import quiet, restored

        with Repository.open(self._job["path"], notify=quiet) as repository:
            points = repository.points()
            if not points:
                return
            point = self._rng.choice(points)
            try:
                found = digest(restored(repository, point)["disk0.raw"])
            except PointNotFound:  # forgotten a moment ago
                return
            name = point.manifest.vm_name
            tried = Known.of(self._journals / f"writer-{name.removeprefix('vm')}").tried
            assert found in tried, f"point {point.short_id} came back otherwise"
            self._journal.note("watched", point.id.hex())


_KINDS = {"write": _Writer, "collect": _Collector, "watch": _Watcher}


def _work(job: dict[str, Any]) -> None:
    from holdfast.repo import gc, session

    rng = random.Random(job["seed"])
    session._BATCH_BYTES = rng.choice([64, 1024, 100_000]) * KIB  # type: ignore[misc]
    gc._LEAST_DEAD_BYTES = 64 * KIB  # type: ignore[misc]
    gc._SWEEP_IDS = rng.choice([16, 4096])  # type: ignore[misc]
    worker = _KINDS[job["do"]](job)
    stop = Path(job["journals"]) / "stop"
    while not stop.exists():
        worker.step()


def _serve() -> None:
    import numpy as np  # noqa: F401 - imported once, before all forks

    from holdfast.repo import backup, check, gc, restore  # noqa: F401
    from rig import engine  # noqa: F401

    running: set[int] = set()
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "kill":
            os.kill(job["pid"], signal.SIGKILL)
        if job["do"] in ("kill", "wait"):
            answer = os.waitstatus_to_exitcode(os.waitpid(job["pid"], 0)[1])
            running.discard(job["pid"])
        else:
            answer = os.fork()
            if not answer:
                code = 1
                try:
                    _work(job)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            running.add(answer)
        print(answer, flush=True)
    for pid in running:  # the test has failed, or is gone
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _serve()
