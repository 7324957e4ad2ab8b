"""A disk as the guest sees it: the extents from the top redo log down to the flat file.

Writes go to the top, reads to whichever file of the chain has the sector. `Chain.open` follows the descriptors, so a chain is
always what the files say, never what somebody remembers. Merging and reference copies work on open chains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.esxi_host.redo import SECTOR, Cowd, Extent, Flat, SeSparse
from tests.esxi_host.vmfiles import Descriptor

MIB = 1 << 20
EXTENTS: dict[str, Callable[[str], Extent]] = {"VMFS": Flat, "VMFSSPARSE": Cowd, "SESPARSE": SeSparse}


@dataclass(slots=True)
class Link:
    """One disk of a chain."""

    path: str
    """Its descriptor."""
    descriptor: Descriptor
    extent: Extent

    @property
    def extent_path(self) -> str:
        return os.path.join(os.path.dirname(self.path), self.descriptor.extent)


def descriptors(path: str) -> list[tuple[str, Descriptor]]:
    """The descriptors of a chain from the top to the base. Raises ValueError and OSError for what is broken."""
    found: list[tuple[str, Descriptor]] = []
    while path:
        descriptor = Descriptor.read(path)
        found.append((path, descriptor))
        if len(found) > 260:
            raise ValueError(f"{path} is in a chain without end")
        path = os.path.join(os.path.dirname(path), descriptor.parent) if descriptor.parent else ""
    return found


class Chain:
    """An open disk. Not safe for several threads: the VM's lock is."""

    def __init__(self, links: list[Link]) -> None:
        self.links = links
        self.size_bytes = links[0].descriptor.size_bytes

    @classmethod
    def open(cls, path: str) -> Chain:
        links: list[Link] = []
        try:
            for place, descriptor in descriptors(path):
                kind = EXTENTS.get(descriptor.extent_type)
                if kind is None:
                    raise ValueError(
                        f"{place}: the stand-in can not write extents of type {descriptor.extent_type}"
                    )
                links.append(
                    Link(place, descriptor, kind(os.path.join(os.path.dirname(place), descriptor.extent)))
                )
        except BaseException:
            for link in links:
                link.extent.close()
            raise
        return cls(links)

    def below(self) -> Chain:
        """The chain of the parent; its files are shared with this one."""
        return Chain(self.links[1:])

    def read(self, offset: int, length: int, level: int = 0) -> bytes:
        extent = self.links[level].extent
        parts = []
        for start, count, present in extent.spans(offset, length):
            if present:
                parts.append(extent.read(start, count))
            elif level + 1 < len(self.links):
                parts.append(self.read(start, count, level + 1))
            else:
                parts.append(bytes(count))
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """The guest's write; whole sectors."""
        assert offset % SECTOR == len(data) % SECTOR == 0
        assert offset + len(data) <= self.size_bytes
        top = self.links[0].extent
        if isinstance(top, SeSparse):
            offset, data = self._whole_grains(top, offset, data)
        top.write(offset, data)

    def _whole_grains(self, top: SeSparse, offset: int, data: bytes) -> tuple[int, bytes]:
        """The write, grown to whole grains where the top has none of theirs yet."""
        grain = SeSparse.GRAIN
        lead = offset % grain
        if lead and not top.knows(offset):
            data = self.read(offset - lead, lead) + data
            offset -= lead
        end = offset + len(data)
        rest = -end % grain
        if rest and not top.knows(end):
            there = min(rest, self.size_bytes - end)
            data += self.read(end, there) + bytes(rest - there)
        return offset, data

    def discard(self, offset: int, length: int) -> None:
        """The range reads as zeros from now on."""
        top = self.links[0].extent
        if isinstance(top, SeSparse):
            grain = SeSparse.GRAIN
            first, last = -(-offset // grain) * grain, (offset + length) // grain * grain
            if first < last:
                top.discard(first, last - first)
                self._zeros(offset, first - offset)
                self._zeros(last, offset + length - last)
                return
        self._zeros(offset, length)

    def _zeros(self, offset: int, length: int) -> None:
        for start in range(offset, offset + length, MIB):
            self.write(start, bytes(min(MIB, offset + length - start)))

    def pieces(self, level: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of what one extent of the chain holds, a megabyte at most at a time."""
        extent = self.links[level].extent
        if isinstance(extent, Flat):
            ranges: Iterator[tuple[int, int]] = extent.data()
        else:
            ranges = ((start, count) for start, count, present in extent.spans(0, self.size_bytes) if present)
        for start, count in ranges:
            stop = min(start + count, self.size_bytes)
            for place in range(start, stop, MIB):
                length = min(MIB, stop - place)
                yield place, extent.read(place, length)

    def merge_top(self) -> None:
        """What the top holds is written to its parent; the top stays as it is."""
        parent = self.below()
        for offset, data in self.pieces():
            parent.write(offset, data)
        parent.links[0].extent.sync()

    def copy_to(self, path: str) -> None:
        """A sparse raw copy of the disk as it is now."""
        with open(path + "~", "wb") as file:
            file.truncate(self.size_bytes)
            for level in reversed(range(len(self.links))):
                for offset, data in self.pieces(level):
                    os.pwrite(file.fileno(), data, offset)
        os.rename(path + "~", path)

    def sync(self) -> None:
        self.links[0].extent.sync()

    def close(self) -> None:
        for link in self.links:
            link.extent.close()
