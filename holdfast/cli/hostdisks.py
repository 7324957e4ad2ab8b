"""The disks of a restore point are written to files of a host, over as many connections as it takes.

When the connection breaks, or the host kills the agent, another one is started and goes on: what the files hold by then is
compared with the restore point, and what differs is written. That needs no memory of what arrived, and an agent of before
that still has something to write writes the same bytes to the same places. Compared parts are not compared twice.

Bounded as backups are (`esxi.enduring`); then the error is that of the connection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.interrupts import on_interrupt
from holdfast.cli.linked import host_files
from holdfast.esxi.names import printable
from holdfast.units import format_size

if TYPE_CHECKING:
    from holdfast.cli.progress import Progress
    from holdfast.esxi.agent_link import AgentLink
    from holdfast.esxi.host import HostSession
    from holdfast.repo.format.manifest import PointDisk
    from holdfast.repo.points import Point
    from holdfast.repo.repository import Repository

__all__ = ["DiskWriter", "Target", "unfinished"]


@dataclass(frozen=True, slots=True)
class Target:
    """A disk of the restore point, and the path of the flat file that it is written to."""

    disk: PointDisk
    flat: str

    @property
    def shown(self) -> str:
        """The disk, for a log."""
        return f"{printable(self.disk.info.name)} ({format_size(self.disk.info.size_bytes)})"


class DiskWriter:
    """Writes disks of a restore point to a host. Used once.

    Args:
        targets: files that exist and are as long as their disks.
        tell: told in sentences that a connection broke, and that it goes on.
        check: raises if it must not go on after a connection broke.
    """

    def __init__(
        self,
        repository: Repository,
        point: Point,
        targets: Sequence[Target],
        progress: Progress,
        *,
        workers: int | None = None,
        tell: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._repository = repository
        self._point = point
        self._targets = tuple(targets)
        self._progress = progress
        self._workers = workers
        self._tell = tell
        self._check = check
        self._total = sum(target.disk.info.size_bytes for target in targets)
        self._done = dict.fromkeys(range(len(self._targets)), 0)
        self._written = 0

    def write(self, session: HostSession, *, empty: bool) -> int:
        """The files are equal to the disks, read back and compared on the host; how many bytes were written.

        Args:
            empty: the files hold nothing but zeros, so that only what is none has to be written, and nothing compared.

        Raises:
            StorageError: a file can not be written.
            IntegrityError: the repository is damaged.
            LinkError: the connection is over, and did not come back.
        """
        from holdfast.esxi.agented import AgentFiles
        from holdfast.esxi.enduring import LOST

        if not self._targets:
            return 0
        with contextlib.ExitStack() as stack:
            files = host_files(session, "agent", self._tell)
            stack.callback(files.close)
            stack.enter_context(on_interrupt(files.interrupt))
            files.check = self._check
            while True:
                number, life = files.now()
                assert isinstance(life, AgentFiles), "an agent was asked for"
                try:
                    self._over(life.link, lambda number=number: files.note_success(number), empty=empty)  # type: ignore[misc]
                except LOST as error:
                    empty = False
                    files.begin_again(number, error)
                else:
                    return self._written

    def _over(self, link: AgentLink, note_success: Callable[[], None], *, empty: bool) -> None:
        if empty:
            self._stream(link, note_success)
            return
        for place in range(len(self._targets)):
            self._compare(link, place, note_success)

    def _stream(self, link: AgentLink, note_success: Callable[[], None]) -> None:
        from holdfast.esxi.bringback import HostSink

        def show(done: int, written: int) -> None:
            if written > self._written:
                note_success()
            self._written = written
            self._progress.update(done, self._total, bytes_written=written)

        sinks = [HostSink(link, link.open(target.flat, writable=True)) for target in self._targets]
        self._repository.restore(
            self._point,
            [(target.disk.tree, sink) for target, sink in zip(self._targets, sinks, strict=True)],
            workers=self._workers,
            on_progress=lambda counters: show(counters.bytes_done, counters.bytes_written),
        )
        for sink in sinks:
            sink.finish()

    def _compare(self, link: AgentLink, place: int, note_success: Callable[[], None]) -> None:
        from holdfast.esxi.bringback import write_differences

        target, before = self._targets[place], self._written
        size = target.disk.info.size_bytes

        def show(done: int, written: int) -> None:
            note_success()
            self._done[place], self._written = done, before + written
            self._progress.update(sum(self._done.values()), self._total, bytes_written=self._written)

        if self._done[place] >= size:
            return
        with contextlib.closing(self._repository.open_content(target.disk.tree)) as reader:
            write_differences(
                link,
                link.open(target.flat, writable=True),
                range(self._done[place], size),
                reader.pread,
                show,
            )


@contextlib.contextmanager
def unfinished(state: str) -> Iterator[None]:
    """Says of an error in what state it leaves what is on the host."""
    from holdfast.errors import HoldfastError

    try:
        yield
    except HoldfastError as error:
        error.hint = f"{error.hint}; {state}" if error.hint else state
        raise
