"""One backup: from a machine to a restore point, or, as a dry run, to the figures that it would have."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import blake3

from holdfast.disk import Machine
from holdfast.errors import EmptySource, UsageError
from holdfast.ids import PointId, RecordId, SessionId
from holdfast.repo.format.manifest import (
    MAX_LABELS_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_NAME_BYTES,
    ContentTree,
    Manifest,
    PointDisk,
    PointFile,
    PointStatistics,
    encode_manifest,
)
from holdfast.repo.idset import IdSet
from holdfast.repo.index import Index
from holdfast.repo.ingest import IngestCounters
from holdfast.repo.points import Point
from holdfast.repo.session import Segment
from holdfast.version import VERSION

__all__ = [
    "BackupOptions",
    "BackupSummary",
    "DryRun",
    "build_manifest",
    "check_request",
    "matching_contents",
    "vm_identity",
]

_TOOL: Final = f"holdfast {VERSION}"


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What the user asked for.

    Args:
        labels: free key and value pairs that the restore point carries.
        time: Unix seconds that the data stands for; None for the moment at which the backup begins.
        dry_run: read and classify everything, store nothing.
        workers: threads; None for one per core and one more.
        on_progress: called a few times a second from the calling thread.
    """

    labels: Mapping[str, str] | None = None
    time: int | None = None
    dry_run: bool = False
    workers: int | None = None
    on_progress: Callable[[IngestCounters], None] = lambda _counters: None


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """What a backup did. All sizes in bytes.

    Args:
        point: id of the new restore point; None after a dry run.
        bytes_read: read from the source.
        bytes_new: plaintext of chunks that the repository did not have.
        bytes_stored: what the packs grew by, manifest included.
    """

    point: PointId | None
    vm_name: str
    vm_uuid: str
    time: int
    size_bytes: int
    bytes_read: int
    bytes_new: int
    bytes_stored: int
    chunks_new: int
    chunks_reused: int
    duration_s: float
    warnings: tuple[str, ...]


class DryRun:
    """Stands in for a session: knows what the index has, counts what it has not, stores nothing."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._seen = IdSet()
        self.stored_bytes = 0
        self.duplicate_bytes = 0

    def generation(self) -> int:
        """Always the same: nothing is committed."""
        return 0

    def unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        """See `Session.unknown`."""
        unique = list(dict.fromkeys(ids))
        places = self._index.lookup(unique)
        absent = {i for i, place in zip(unique, places, strict=True) if place is None}
        return absent - self._seen.known(absent)

    def append(self, segment: Segment, generation: int) -> int:
        """Counts the segment's records."""
        del generation
        new = self._seen.add(sealed.header.id for sealed in segment.records)
        total = 0
        for sealed in segment.records:
            if sealed.header.id in new:
                self.stored_bytes += sealed.header.total_bytes
                total += sealed.header.plain_bytes if sealed.header.kind == 1 else 0
        return total

    def flush(self) -> None:
        """Nothing to do."""


def vm_identity(machine: Machine) -> str:
    """The UUID that groups a machine's restore points: its own, or one made from its name."""
    if machine.uuid:
        return machine.uuid
    return blake3.blake3(
        machine.name.encode("utf-8", "surrogateescape"),
        derive_key_context="holdfast 2026-11-22 v1 uuid of a name",
    ).hexdigest(length=16)


def check_request(machine: Machine, options: BackupOptions) -> dict[str, str]:
    """The labels, after everything that a manifest could not hold has been refused.

    Raises:
        UsageError: name, labels or time are out of bounds.
        EmptySource: the machine has neither disks nor files.
    """
    try:
        name_bytes = len(machine.name.encode())
        labels = dict(options.labels or {})
        labels_bytes = sum(len(key.encode()) + len(value.encode()) for key, value in labels.items())
    except UnicodeEncodeError:
        raise UsageError("the VM's name or a label is not valid UTF-8") from None
    if not 1 <= name_bytes <= MAX_NAME_BYTES:
        raise UsageError(
            f"the VM's name is {name_bytes} bytes long; it must have 1 to {MAX_NAME_BYTES}",
            hint="give a shorter one with --vm",
        )
    if labels_bytes > MAX_LABELS_BYTES or any(not key for key in labels):
        raise UsageError(f"labels need a key each, and at most {MAX_LABELS_BYTES} bytes together")
    if not machine.disks and not machine.files:
        raise EmptySource(f"{machine.origin} holds neither disks nor files")
    return labels


def matching_contents(machine: Machine, parent: Point | None) -> Iterator[ContentTree | None]:
    """For each disk and then each file of the machine: the same content in the parent, if it has it.

    Disks are matched by their UUID where both have one, else by name.
    """
    disks = parent.manifest.disks if parent else ()
    files = {file.info.name: file.tree for file in parent.manifest.files} if parent else {}
    by_uuid = {disk.info.uuid: disk.tree for disk in disks if disk.info.uuid}
    by_name = {disk.info.name: disk.tree for disk in disks}
    for disk in machine.disks:
        yield by_uuid.get(disk.info.uuid) or by_name.get(disk.info.name)
    for file in machine.files:
        yield files.get(file.info.name)


def build_manifest(
    machine: Machine,
    trees: Sequence[ContentTree],
    labels: Mapping[str, str],
    *,
    session: SessionId,
    vm_uuid: str,
    time: int,
    received: int,
    segment_bytes: int,
    chunker: str,
    chunk_size_bytes: int,
    parent: Point | None,
    statistics: PointStatistics,
) -> bytes:
    """The encoded manifest of a machine whose contents have these trees (disks first, then files).

    Raises:
        UsageError: it would be longer than a record may be.
    """
    disks = tuple(
        PointDisk(disk.info, tree)
        for disk, tree in zip(machine.disks, trees[: len(machine.disks)], strict=True)
    )
    files = tuple(
        PointFile(file.info, tree)
        for file, tree in zip(machine.files, trees[len(machine.disks) :], strict=True)
    )
    encoded = encode_manifest(
        Manifest(
            session=session,
            kind=machine.kind,
            vm_uuid=vm_uuid,
            vm_name=machine.name,
            host=socket.gethostname(),
            origin=machine.origin,
            time=time,
            received=received,
            segment_bytes=segment_bytes,
            chunker=chunker,
            chunk_size_bytes=chunk_size_bytes,
            disks=disks,
            files=files,
            folders=machine.folders,
            labels=tuple(sorted(labels.items())),
            warnings=machine.warnings,
            parent=parent.id.hex() if parent else "",
            tool=_TOOL,
            statistics=statistics,
        )
    )
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise UsageError(
            f"{machine.origin} has too many files for one restore point ({len(machine.files)})",
            hint="back up the disks alone, or fewer files",
        )
    return encoded
