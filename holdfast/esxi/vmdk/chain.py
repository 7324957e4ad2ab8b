"""A disk with snapshots: redo logs over a base, read as one.

    vm-000002-sesparse.vmdk   what was written since the second snapshot
    vm-000001-sesparse.vmdk   what was written since the first
    vm-flat.vmdk              what was there before

A byte is the topmost redo log's that has it (or says that it is zero), else the base's. `placements` tells for a
range where each byte lies: reading, finding holes and the map for a host's agent are all made of it.

Invariants: all have the same size; owns redo logs and base and closes them. Which files belong together is not
decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from holdfast.errors import SourceFormat
from holdfast.esxi.vmdk.joined import JoinedSource, Placement
from holdfast.esxi.vmdk.redo import FROM_PARENT, ZEROS, RedoLog

__all__ = ["ChainSource"]


class ChainSource:
    """Redo logs over a base; a `BlockSource`.

    Args:
        redo_logs: the newest first.
        base: the disk as it was before the first snapshot.

    Raises:
        SourceFormat: their sizes differ.
    """

    def __init__(self, redo_logs: Sequence[RedoLog], base: JoinedSource) -> None:
        self._redo_logs = tuple(redo_logs)
        self._base = base
        for log in self._redo_logs:
            if log.size_bytes != base.size_bytes:
                raise SourceFormat(
                    f"{log.where}: the redo log is for a disk of {log.size_bytes} bytes, "
                    f"but its parent has {base.size_bytes}",
                    hint="the disk was resized while it had snapshots, or the files do not belong together",
                )

    @property
    def size_bytes(self) -> int:
        """The size of the disk."""
        return self._base.size_bytes

    def placements(self, start: int, end: int) -> Iterator[Placement]:
        """Yields where the bytes [start, end) of the disk lie, ascending and without a gap.

        Raises:
            SourceFormat: a redo log makes no sense.
            SourceError: a redo log can not be read.
        """
        return self._placements(0, start, end)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`; ranges that touch become one."""
        begin, stop = start, start
        for placement in self.placements(start, end):
            if placement.source is None:
                continue
            shift = placement.start - placement.offset
            inside = placement.offset, placement.offset + placement.end - placement.start
            for offset, length in placement.source.data_extents(*inside):
                if offset + shift != stop:
                    if stop > begin:
                        yield begin, stop - begin
                    begin = offset + shift
                stop = offset + shift + length
        if stop > begin:
            yield begin, stop - begin

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`.

        Cost: one read per run of neighbouring grains.
        """
        for placement in self.placements(offset, offset + buffer.nbytes):
            part = buffer[placement.start - offset : placement.end - offset]
            if placement.source is None:
                np.frombuffer(part, np.uint8)[:] = 0
            else:
                placement.source.read_into(placement.offset, part)

    def close(self) -> None:
        """Closes redo logs and base. May be called twice."""
        for log in self._redo_logs:
            log.close()
        self._base.close()

    def _placements(self, depth: int, start: int, end: int) -> Iterator[Placement]:
        """As `placements`, of the disk as it is without the first `depth` redo logs."""
        if depth == len(self._redo_logs):
            yield from self._base.placements(start, end)
            return
        log = self._redo_logs[depth]
        for run in log.runs(start, end):
            if run.place == FROM_PARENT:
                yield from self._placements(depth + 1, run.start, run.end)
            elif run.place == ZEROS:
                yield Placement(run.start, run.end, None, 0)
            else:
                yield Placement(run.start, run.end, log.file, run.place)
