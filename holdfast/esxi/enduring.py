"""Reading a host goes on when its connection breaks, or its agent is killed: another one is started, and what was asked for is asked again.

What a connection has given out (handles of files, grain tables, scans under way) dies with it and is never carried over: a
*life* is an agent with disks that were opened by it, and what belongs to one life never meets another one. So a disk is opened anew
from its descriptors, which a snapshot keeps as they are, and a handle can not come to mean another file.

Invariants: nothing goes on before `check` has found that the bytes are still those of the same moment. How often a life may follow
another is bounded: by attempts to begin one, by lives in a row that brought nothing, and altogether. Then everybody who
reads gets the error that the connection broke with, and so does whoever asks later.

Deliberately not here: commands that change something on the host (`console`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from holdfast.disk import Cutting, Expect, ScannedSegment, SegmentScanner
from holdfast.errors import (
    FarSideEnded,
    HoldfastError,
    HostUnreachable,
    LinkError,
    LinkLost,
    LinkTimeout,
    SourceChanged,
)
from holdfast.esxi.hostdisk import HostDisk, HostFiles, Link, open_host_disk

__all__ = ["LOST", "Endurance", "EnduringDisk", "EnduringFiles"]

LOST: Final = (LinkLost, LinkTimeout, FarSideEnded)
"""What a connection that is gone, or an agent that is, looks like. An agent that breaks the protocol is not among them."""

_STEP_S: Final = 0.2
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Endurance:
    """How much is borne.

    Args:
        pauses_s: before each attempt to begin again; as many attempts as there are pauses.
        most_barren: so many lives in a row may end without having brought anything.
        most: so many times a run may begin again.
    """

    pauses_s: tuple[float, ...] = (1.0, 5.0, 15.0, 40.0, 60.0)
    most_barren: int = 3
    most: int = 100


class EnduringFiles:
    """The files of a host, over as many lives as it takes. Thread-safe.

    Args:
        begin: a new life; it is closed when it is over.
        tell: told in sentences that a connection broke, and that it goes on.

    Raises:
        LinkError: the first life does not begin.
    """

    def __init__(
        self,
        begin: Callable[[], HostFiles],
        tell: Callable[[str], None],
        endurance: Endurance | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._begin = begin
        self._tell = tell
        self._endurance: Final = endurance or Endurance()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._ended = False
        self._failure: HoldfastError | None = None
        self._barren = 0
        self._files = begin()
        self._number = 0
        self.check: Callable[[], None] = lambda: None
        """Raises if reading must not go on: the bytes would not be those of the same moment any more."""

    @property
    def interruptions(self) -> int:
        """How often it was begun again so far."""
        return self._number

    def disk(self, links: tuple[Link, ...]) -> EnduringDisk:
        """The disk whose descriptors are `links`. Raises as `open_host_disk`."""
        return EnduringDisk(self, links)

    def now(self) -> tuple[int, HostFiles]:
        """The number of the present life, and its files.

        Raises:
            HoldfastError: there will be none any more.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            return self._number, self._files

    def note_success(self, number: int) -> None:
        """A life has brought something."""
        if number == self._number:
            self._barren = 0

    def begin_again(self, number: int, error: HoldfastError) -> None:
        """There is another life than that one, on return.

        Raises:
            SourceChanged: reading must not go on.
            HoldfastError: the host does not come back; mostly `error`.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if number != self._number:
                return
            self._files.close()
            self._barren += 1
            try:
                if self._barren > self._endurance.most_barren or self._number >= self._endurance.most:
                    raise error
                self._files = self._another(error)
            except BaseException as failure:
                self._failure = failure if isinstance(failure, HoldfastError) else error
                raise
            self._number += 1
            self._tell("connected again; it goes on where it broke off")

    def interrupt(self) -> None:
        """Whoever waits for the host gives up soon. May be called from a signal's handler: it takes no lock."""
        self._ended = True

    def close(self) -> None:
        """Lets go of the host. Nobody must be reading. May be called twice."""
        self._ended = True
        self._files.close()

    def _another(self, error: HoldfastError) -> HostFiles:
        for pause_s in self._endurance.pauses_s:
            if self._ended:
                raise error
            self._tell(f"{error.message}; trying again in {pause_s:g} s")
            self._pause(pause_s, error)
            try:
                self.check()
                return self._begin()
            except LinkError as again:
                # An agent that does not start may do so a little later; a host that refuses us will go on refusing.
                if not isinstance(again, (*LOST, HostUnreachable)) and type(again) is not LinkError:
                    raise
                error = again
        raise error

    def _pause(self, pause_s: float, error: HoldfastError) -> None:
        until_s = time.monotonic() + pause_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self._ended:
                raise error
            self._sleep(min(left_s, _STEP_S))


@dataclass(frozen=True, slots=True)
class _Opened:
    """A disk as one life has opened it."""

    number: int
    disk: HostDisk
    scanner: SegmentScanner | None


class EnduringDisk:
    """A disk of a host. Implements `BlockSource`.

    Attributes:
        descriptor: of the topmost link, completed from its parents.
        scanner: cuts and hashes it on the host; None if that can not be done there.

    Args:
        links: its descriptors, the topmost first.
    """

    def __init__(self, files: EnduringFiles, links: tuple[Link, ...]) -> None:
        self._files = files
        self._links = links
        self._lock = threading.Lock()
        self._now: _Opened | None = None
        first = self.attempt(lambda opened: opened)
        self.descriptor: Final = first.disk.descriptor
        self._size_bytes = first.disk.source.size_bytes
        self.scanner: Final = EnduringScanner(files, self) if first.scanner is not None else None

    @property
    def size_bytes(self) -> int:
        """The size of the disk."""
        return self._size_bytes

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`."""
        yield from self.attempt(lambda opened: list(opened.disk.source.data_extents(start, end)))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`."""
        self.attempt(lambda opened: opened.disk.source.read_into(offset, buffer))

    def close(self) -> None:
        """Closes what is open. May be called twice."""
        with self._lock:
            if self._now is not None:
                self._now.disk.source.close()

    def attempt(self, act: Callable[[_Opened], _T]) -> _T:
        """What `act` returns with the disk of the present life; once more with that of the next one if the connection breaks.

        Raises:
            SourceError, LinkError: it can not be done, in no life.
        """
        while True:
            number, files = self._files.now()
            try:
                found = act(self._opened(number, files))
            except LOST as error:
                self._files.begin_again(number, error)
                continue
            self._files.note_success(number)
            return found

    def _opened(self, number: int, files: HostFiles) -> _Opened:
        with self._lock:
            if self._now is None or self._now.number != number:
                disk = open_host_disk(self._links, files)
                before, self._now = (
                    self._now,
                    _Opened(number, disk, files.scanner(disk.source, self._links[0].path)),
                )
                if before is not None:
                    before.disk.source.close()
                    if disk.source.size_bytes != before.disk.source.size_bytes:
                        raise SourceChanged(
                            f"{self._links[0].path} has another size than before the connection broke",
                            hint="run the backup again",
                        )
            return self._now


class EnduringScanner:
    """Scans a disk on the host. Implements `SegmentScanner`."""

    def __init__(self, files: EnduringFiles, disk: EnduringDisk) -> None:
        self._files = files
        self._disk = disk

    def can_cut(self, cutting: Cutting) -> bool:
        """See `SegmentScanner.can_cut`."""
        return self._disk.attempt(lambda opened: _scanner(opened).can_cut(cutting))

    def scan(self, offset: int, length: int, cutting: Cutting, expect: Expect) -> EnduringSegment:
        """See `SegmentScanner.scan`."""

        def scanned() -> tuple[int, ScannedSegment]:
            return self._disk.attempt(
                lambda opened: (opened.number, _scanner(opened).scan(offset, length, cutting, expect))
            )

        return EnduringSegment(self._files, scanned)


class EnduringSegment:
    """A segment that was scanned in one life, and is scanned again if it is needed in another one. Implements `ScannedSegment`.

    Args:
        scan: scans it in the present life, and returns the life's number and the segment.
    """

    def __init__(self, files: EnduringFiles, scan: Callable[[], tuple[int, ScannedSegment]]) -> None:
        self._files = files
        self._scan = scan
        self._number, self._segment = scan()
        self.digest: Final = self._segment.digest
        self.chunks: Final = self._segment.chunks
        self.data_bytes: Final = self._segment.data_bytes

    def parts(self) -> tuple[Sequence[int], Sequence[bytes]]:
        """See `ScannedSegment.parts`."""
        while True:
            try:
                return self._segment.parts()
            except LOST as error:
                self._scan_again(error)

    def fetch(self, numbers: Sequence[int]) -> Iterator[bytes | memoryview]:
        """See `ScannedSegment.fetch`."""
        done = 0
        while True:
            try:
                for data in self._segment.fetch(numbers[done:]):
                    self._files.note_success(self._number)
                    done += 1
                    yield data
                return
            except LOST as error:
                self._scan_again(error)

    def _scan_again(self, error: HoldfastError) -> None:
        self._files.begin_again(self._number, error)
        self._number, self._segment = self._scan()
        if self._segment.digest != self.digest:
            raise SourceChanged(
                "a disk has other bytes than before the connection broke: somebody writes to what a snapshot should protect",
                hint="see who removed or reverted snapshots of the VM, and run the backup again",
            )


def _scanner(opened: _Opened) -> SegmentScanner:
    assert opened.scanner is not None, "a disk that was scanned can be scanned in every life"
    return opened.scanner
