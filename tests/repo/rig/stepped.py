"""Backups that run a step at a time, so that several can be interleaved as a test decides.

A step is one read of the source. The real `Repository.backup` runs in a thread of its own and stops at each
read until it is let through; between two steps nothing of it moves.
"""

from __future__ import annotations

import threading

from rig.disks import MemorySource, machine_of
from rig.engine import ONE_WORKER, World
from rig.faults import Crash, Faults


class SteppedBackup:
    """One process with one backup in it."""

    def __init__(self, world: World, name: str, data: bytes, password: str | None = None) -> None:
        self.name = name
        self.data = data
        self.faults = Faults()
        self.point: str | None = None
        self.error: BaseException | None = None
        self._world = world
        self._repository = world.open(self.faults, password)
        self._turn = threading.Condition()
        self._tokens = 0
        self._waiting = False
        self._over = False
        machine = machine_of([MemorySource(data, on_read=self._wait)], name=name)
        self._thread = threading.Thread(target=self._run, args=(machine,), daemon=True)
        self._thread.start()
        self._settle()

    def _run(self, machine) -> None:
        try:
            summary = self._repository.backup(machine, ONE_WORKER)
            assert summary.point is not None
            self.point = summary.point.hex()
        except BaseException as error:
            self.error = error
        with self._turn:
            self._over = True
            self._turn.notify_all()

    def _wait(self, _offset: int) -> None:
        with self._turn:
            self._waiting = True
            self._turn.notify_all()
            while not self._tokens and not self.faults.dead:
                self._turn.wait()
            if self.faults.dead:
                raise Crash
            self._tokens -= 1
            self._waiting = False

    def _settle(self) -> None:
        with self._turn:
            while not self._over and not (self._waiting and not self._tokens):
                self._turn.wait()

    @property
    def over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self._over

    def step(self, count: int = 1) -> None:
        """Lets some reads through and returns when the next one waits, or all is over."""
        with self._turn:
            self._tokens += count
            self._turn.notify_all()
        self._settle()

    def finish(self) -> str:
        """Runs it to its end; returns the point's id."""
        while not self._over:
            self.step(1000)
        self._thread.join()
        self._repository.close()
        if self.error is not None:
            raise self.error
        assert self.point is not None
        return self.point

    def kill(self) -> None:
        """The process is gone."""
        with self._turn:
            self.faults.die()
            self._turn.notify_all()
        self._thread.join()
        self._world.kill(self._repository, self.faults)
