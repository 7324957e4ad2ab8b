"""Files and disks of a host, read by the agent that runs there (`agent`): a `HostFiles`, and the scanner of its disks.

A disk is a chain of files; the grain tables of its redo logs are read from here, and the agent is told for each segment
which bytes are where. It then cuts and hashes, and sends chunks when it is asked for them. What it states is checked: bytes are
hashed here before they are believed.

Scanning runs ahead: segments are asked for in ascending order, some dozens before they are needed. Workers take what is
there, and the one whose segment comes next waits for it. A jump (backups begin somewhere, and wrap around) starts anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from holdfast.disk import BlockSource, Cutting, Expect
from holdfast.errors import LinkError, SourceChanged, SourceError, SourceFormat
from holdfast.esxi.agent.bundle import bootstrap_command
from holdfast.esxi.agent.frames import Piece
from holdfast.esxi.agent_answers import Found, Run, runs_of
from holdfast.esxi.agent_link import AgentLink, FarFile
from holdfast.esxi.names import printable
from holdfast.esxi.ranges import ReaderSource
from holdfast.esxi.vmdk.chain import ChainSource
from holdfast.esxi.vmdk.joined import JoinedSource
from holdfast.ssh.link import Channel

__all__ = ["AgentFiles", "AgentScanner", "AgentSource"]

_AHEAD: Final = 64
_NOTHING: Final = bytes(32)
_LOOK: Final = "see the host's log (vmkernel.log) for its storage"


class AgentSource(ReaderSource):
    """A file of a host, read by the agent."""

    def __init__(self, file: FarFile) -> None:
        super().__init__(file, file.path)
        self.file: Final = file


class AgentFiles:
    """The files of a host. Implements `HostFiles`.

    Args:
        start: starts a command on the host.

    Raises:
        LinkError: the host has no Python that can run the agent, or the connection is over.
    """

    def __init__(self, start: Callable[[str], Channel]) -> None:
        self.link: Final = AgentLink.start(start(bootstrap_command()))

    def open(self, path: str) -> AgentSource:
        """See `HostFiles.open`."""
        return AgentSource(self.link.open(path))

    def scanner(self, source: ChainSource | JoinedSource, where: str) -> AgentScanner:
        """See `HostFiles.scanner`."""
        return AgentScanner(self.link, source, where)

    def close(self) -> None:
        """Ends the agent. May be called twice."""
        self.link.close()


class AgentScanner:
    """Scans one disk on the host. Implements `SegmentScanner`.

    Args:
        source: the disk, made of `AgentSource`s.
        where: its descriptor, for messages.
    """

    def __init__(self, link: AgentLink, source: ChainSource | JoinedSource, where: str) -> None:
        self._link = link
        self._where = printable(where)
        self._source = source
        self._cutters: dict[Cutting, int] = {}
        self._found: dict[tuple[int, int], Found] = {}
        self._looking = threading.Lock()
        self._pulling = threading.Lock()
        self._stream: Iterator[Found] | None = None
        self._coming: list[tuple[int, int]] = []
        self._plan: tuple[int, Cutting] | None = None
        self._next = 0

    def can_cut(self, cutting: Cutting) -> bool:
        """See `SegmentScanner.can_cut`."""
        return cutting.name in self._link.hello.chunkers

    def scan(self, offset: int, length: int, cutting: Cutting, expect: Expect) -> AgentSegment:
        """See `SegmentScanner.scan`."""
        wanted = (offset, length)
        found = self._taken(wanted)
        while found is None:
            with self._pulling:
                found = self._taken(wanted)
                if found is None:
                    self._pull(wanted, cutting, expect)
                    found = self._taken(wanted)
        return AgentSegment(self._link, self._source, self._cutters[cutting], (offset, length), found)

    def _taken(self, wanted: tuple[int, int]) -> Found | None:
        with self._looking:
            return self._found.pop(wanted, None)

    def _pull(self, wanted: tuple[int, int], cutting: Cutting, expect: Expect) -> None:
        """Gets results until the wanted one is there. Called by one thread at a time."""
        if self._stream is None or not self._will_come(wanted, cutting):
            self._begin(wanted, cutting, expect)
        assert self._stream is not None
        while True:
            try:
                result = next(self._stream, None)
            except SourceError as error:
                self._stream = None
                raise type(error)(f"{self._where}: {error.message}", hint=error.hint or _LOOK) from None
            except LinkError:
                self._stream = None  # whoever comes next must not take its end for an answer that is missing
                raise
            if result is None:
                self._stream = None
                raise SourceError("the agent on the host did not answer for a segment that it was asked for")
            key = self._coming.pop(0)
            with self._looking:
                self._found[key] = result
            if key == wanted:
                return

    def _will_come(self, wanted: tuple[int, int], cutting: Cutting) -> bool:
        """Whether the running scan gets there soon."""
        if self._plan is None or self._plan[1] != cutting:
            return False
        step = self._plan[0]
        ahead = wanted[0] - (self._coming[0][0] if self._coming else self._next)
        is_last = sum(wanted) == self._source.size_bytes
        return 0 <= ahead <= _AHEAD * step and ahead % step == 0 and (wanted[1] == step or is_last)

    def _begin(self, wanted: tuple[int, int], cutting: Cutting, expect: Expect) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]
        with self._looking:
            while len(self._found) > _AHEAD:
                del self._found[next(iter(self._found))]
        if cutting not in self._cutters:
            self._cutters[cutting] = self._link.cutter(cutting.name, cutting.size_bytes, cutting.seed)
        self._coming = []
        self._next = wanted[0]
        self._plan = (wanted[1], cutting)
        self._stream = self._link.scan(self._cutters[cutting], self._pieces(wanted[1], expect))

    def _pieces(self, length: int, expect: Expect) -> Iterator[Piece]:
        number = 0
        while self._next < self._source.size_bytes:
            size = min(length, self._source.size_bytes - self._next)
            runs = _runs(self._source, self._next, size)
            piece = Piece(number, runs, expect(self._next, size))
            self._coming.append((self._next, size))
            self._next += size
            number += 1
            yield piece


class AgentSegment:
    """A segment that the agent has cut and hashed. Implements `ScannedSegment`."""

    def __init__(
        self,
        link: AgentLink,
        source: ChainSource | JoinedSource,
        cutter: int,
        place: tuple[int, int],
        found: Found,
    ) -> None:
        self._link = link
        self._source = source
        self._cutter = cutter
        self._place = place
        self._found = found

    @property
    def digest(self) -> bytes:
        """See `ScannedSegment.digest`."""
        return self._found.digest if self._found.chunks else _NOTHING

    @property
    def chunks(self) -> int:
        """See `ScannedSegment.chunks`."""
        return self._found.chunks

    @property
    def data_bytes(self) -> int:
        """See `ScannedSegment.data_bytes`."""
        return self._found.data_bytes

    def parts(self) -> tuple[Sequence[int], Sequence[bytes]]:
        """See `ScannedSegment.parts`. Scans once more what was only said to be as expected."""
        if self._found.same:
            (again,) = self._link.scan(self._cutter, [Piece(0, _runs(self._source, *self._place))])
            if again.digest != self._found.digest:
                raise _changed()
            self._found = again
        return self._found.parts, self._found.hashes

    def fetch(self, numbers: Sequence[int]) -> Iterator[bytes | memoryview]:
        """See `ScannedSegment.fetch`."""
        places: list[tuple[int, int]] = []
        lengths, _ = self.parts()
        at = self._place[0]
        for part in lengths:
            if part > 0:
                places.append((at, part))
            at += abs(part)
        pieces = [Piece(label, _runs(self._source, *places[number])) for label, number in enumerate(numbers)]
        for number, data in zip(numbers, self._link.fetch(pieces), strict=True):
            if len(data) != places[number][1]:
                raise _changed()
            yield data


def _changed() -> SourceChanged:
    return SourceChanged(
        "a disk has changed between being hashed and being sent: somebody writes to what a snapshot should protect",
        hint="see who removed or reverted snapshots of the VM, and run the backup again",
    )


def _runs(source: ChainSource | JoinedSource, offset: int, length: int) -> list[Run]:
    """Where the bytes of a range of a disk are, as the agent is told."""
    return runs_of(source.placements(offset, offset + length), _handle)


def _handle(source: BlockSource) -> int:
    if not isinstance(source, AgentSource):
        raise SourceFormat(f"{printable(str(source))} is no file that the agent has open")
    return source.file.handle
