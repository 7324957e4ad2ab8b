"""What is backed up and what is restored to, in words that every part shares.

Adapters (`holdfast.esxi`) implement `BlockSource` and `BlockSink` and describe a machine with
`Machine`; the engine (`holdfast.repo`) reads and writes through them. Neither knows the other.

Invariants of a `BlockSource`: its size is fixed for its life; reading is positional, may be done
from several threads at once and is repeatable as far as the underlying storage is.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

from holdfast.errors import UsageError

__all__ = [
    "SECTOR_BYTES",
    "BlockSink",
    "BlockSource",
    "ChangeMap",
    "Cutting",
    "DiskFormat",
    "DiskGeometry",
    "DiskInfo",
    "Expect",
    "FileInfo",
    "Machine",
    "MachineKind",
    "ScannedSegment",
    "SegmentScanner",
    "SourceDisk",
    "SourceFile",
    "parts_digest",
]

SECTOR_BYTES: Final = 512

DiskFormat = Literal["raw", "vmdk"]
MachineKind = Literal["vm", "disk"]


class BlockSource(Protocol):
    """Random-access bytes of a disk (or of a file that is stored like one)."""

    @property
    def size_bytes(self) -> int:
        """The virtual size; need not be a multiple of anything."""
        ...

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yields `(offset, length)` of the ranges in [start, end) that may hold data, ascending.

        Ranges do not overlap, are not empty and lie inside [start, end). Everything outside of them
        reads as zeros. A source that knows nothing of holes yields one range.

        Raises:
            SourceError: the underlying storage can not tell.
        """
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole (writable, contiguous) buffer with the bytes that start at `offset`.

        Thread-safe. `offset + len(buffer)` never exceeds `size_bytes`.

        Raises:
            SourceChanged: the source has become shorter than `size_bytes`.
            SourceError: any other failure to read.
        """
        ...

    def close(self) -> None:
        """Releases what is held open. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a repository cuts segments: all that somebody far away needs to cut them in the same way.

    Args:
        name: of the chunker.
        size_bytes: the chunk size that is aimed at.
        seed: 32 bytes.
    """

    name: str
    size_bytes: int
    seed: bytes


def parts_digest(lengths: Sequence[int], hashes: Sequence[bytes]) -> bytes:
    """What stands for the parts of a segment: SHA-256 of their lengths (i32 each, little-endian) and then their hashes."""
    return hashlib.sha256(struct.pack(f"<{len(lengths)}i", *lengths) + b"".join(hashes)).digest()


Expect: TypeAlias = Callable[[int, int], bytes | None]
"""Offset and length of a segment -> the digest of its parts if nothing has changed there; None if that is not known."""


class ScannedSegment(Protocol):
    """A segment that was read, cut and hashed where it lies."""

    @property
    def digest(self) -> bytes:
        """`parts_digest` of its parts, 32 bytes; all zeros if it holds nothing but zeros."""
        ...

    @property
    def chunks(self) -> int:
        """How many of its parts are no holes."""
        ...

    @property
    def data_bytes(self) -> int:
        """What they come to."""
        ...

    def parts(self) -> tuple[Sequence[int], Sequence[bytes]]:
        """The lengths of its parts, those of holes negative, and the SHA-256 of each chunk.

        Raises:
            SourceError: they can not be had, or do not fit the digest.
        """
        ...

    def fetch(self, numbers: Sequence[int]) -> Iterator[bytes | memoryview]:
        """Yields the bytes of some chunks (numbered without the holes, ascending), in that order.

        Whoever takes them has to hold them against length and hash: the disk may have changed meanwhile.

        Raises:
            SourceChanged: they are not as long any more.
            SourceError: they can not be had.
        """
        ...


class SegmentScanner(Protocol):
    """Cuts and hashes the segments of one source where it lies, so that only what is unknown has to travel."""

    def can_cut(self, cutting: Cutting) -> bool:
        """Whether it knows that way of cutting."""
        ...

    def scan(self, offset: int, length: int, cutting: Cutting, expect: Expect) -> ScannedSegment:
        """Scans a segment. Thread-safe; quickest in ascending order.

        Args:
            offset, length: in bytes; inside of the source.
            expect: a segment that is as expected need not say what its parts are. It may be asked for segments that
                are likely to be scanned soon, too.

        Raises:
            SourceError: it can not be read.
        """
        ...


class BlockSink(Protocol):
    """Where a disk (or a file) is restored to. What is never written reads as zeros afterwards."""

    def write(self, offset: int, data: memoryview) -> None:
        """Writes all of `data` at `offset` bytes. Thread-safe; ranges never overlap.

        Raises:
            StorageError: it can not be written.
        """
        ...

    def finish(self) -> None:
        """Makes the content durable and visible under its final name."""
        ...

    def abort(self) -> None:
        """Removes what has been written so far. May follow anything but a successful `finish`."""
        ...


@dataclass(frozen=True, slots=True)
class ChangeMap:
    """What may have changed in a disk since an earlier restore point of it.

    Invariant: the extents ascend, do not touch and are not empty.

    Args:
        extents: (offset, length) in bytes. They cover every byte that differs, and may cover more.
    """

    extents: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, extents: Iterable[tuple[int, int]], size_bytes: int) -> ChangeMap:
        """A change map of extents in any order, overlapping or not.

        Raises:
            UsageError: an extent is negative, or reaches beyond the disk.
        """
        merged: list[tuple[int, int]] = []
        for offset, length in sorted(extents):
            if offset < 0 or length < 0 or offset + length > size_bytes:
                raise UsageError(
                    f"a changed extent of {length} bytes at {offset} is not inside of the disk of {size_bytes} bytes",
                    hint="is the change map that of this disk?",
                )
            if merged and offset <= sum(merged[-1]):
                end = max(sum(merged[-1]), offset + length)
                merged[-1] = (merged[-1][0], end - merged[-1][0])
            elif length:
                merged.append((offset, length))
        return cls(tuple(merged))

    @property
    def changed_bytes(self) -> int:
        """Bytes of all extents."""
        return sum(length for _, length in self.extents)

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The (start, end) of the changed ranges in [start, end), counted from `start`."""
        first = bisect_left(self.extents, (start, 0))
        if first and sum(self.extents[first - 1]) > start:
            first -= 1
        found = []
        for offset, length in self.extents[first:]:
            if offset >= end:
                break
            found.append((max(offset, start) - start, min(offset + length, end) - start))
        return found


@dataclass(frozen=True, slots=True)
class DiskGeometry:
    """The BIOS geometry that a VMDK descriptor records."""

    cylinders: int
    heads: int
    sectors: int


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """What is known of a disk beside its bytes.

    Args:
        name: unique in its machine; the path, relative to the machine's folder with `/` as
            separator, of the descriptor or of the raw image: `web1.vmdk`, `web1.raw`.
        size_bytes: virtual size.
        format: how the disk was found, and so how `restore --as original` writes it.
        flat_name: relative path of the flat extent that a restore writes beside a descriptor;
            empty for `raw`.
        descriptor: text of the VMDK descriptor as found (or as embedded in a sparse extent);
            empty for `raw`.
        create_type: `createType` as found: `vmfs`, `monolithicSparse`, ...; empty for `raw`.
        label: where the VM has it attached, such as `scsi0:0`; empty if unknown.
        uuid: `ddb.uuid`, as 32 lower-case hexadecimal digits; empty if unknown.
        adapter: `ddb.adapterType`; empty if unknown.
    """

    name: str
    size_bytes: int
    format: DiskFormat
    flat_name: str = ""
    descriptor: str = ""
    create_type: str = ""
    label: str = ""
    uuid: str = ""
    adapter: str = ""
    geometry: DiskGeometry | None = None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One of the VM's files that is no disk: .vmx, .nvram, logs.

    Args:
        name: path relative to the machine's folder, `/` as separator, never absolute, no `..`.
        mode: permission bits (0o7777).
    """

    name: str
    size_bytes: int
    mtime_ns: int
    mode: int


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """A disk that can be read.

    Args:
        scanner: reads the same bytes as `source`, where they are; None if they are here.
    """

    info: DiskInfo
    source: BlockSource
    scanner: SegmentScanner | None = None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that can be read."""

    info: FileInfo
    source: BlockSource


@dataclass(frozen=True, slots=True)
class Machine:
    """One unit of backup: a VM with its disks and files, or a single disk image.

    Args:
        kind: `vm` is restored as a folder, `disk` (one disk, no files) as an image.
        name: display name.
        uuid: the VM's own UUID as 32 lower-case hexadecimal digits, or empty if it has none.
        origin: where it was read from, for people.
        folders: relative paths of folders that hold no file, parents first.
        warnings: sentences on what was left out; a backup with any ends with exit code 100.
        confirm: called when the last byte was read and before a restore point is listed; raises `SourceChanged` if the
            bytes may be of more than one moment.
    """

    kind: MachineKind
    name: str
    uuid: str
    origin: str
    disks: tuple[SourceDisk, ...]
    files: tuple[SourceFile, ...] = ()
    folders: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    confirm: Callable[[], None] = field(default=lambda: None)

    def close(self) -> None:
        """Closes all sources."""
        for disk in self.disks:
            disk.source.close()
        for file in self.files:
            file.source.close()
