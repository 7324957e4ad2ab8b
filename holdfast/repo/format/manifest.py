"""Manifests: what a restore point is (FORMAT.md, "Manifests").

A manifest is canonical JSON in a record of kind MANIFEST; the id of that record is the id of the restore
point. It is complete in itself: with it and the records that its trees name, everything that was backed
up can be written again. Members that this version does not know are ignored on reading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, cast

from holdfast.disk import DiskFormat, DiskGeometry, DiskInfo, FileInfo, MachineKind
from holdfast.errors import DamagedData, UnsupportedFormat
from holdfast.ids import ID_BYTES, SESSION_ID_BYTES, NodeId, RecordId, SessionId
from holdfast.repo.format import canonical
from holdfast.repo.format.canonical import Fields, Json
from holdfast.repo.format.node import MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES

__all__ = [
    "MAX_LABELS_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_NAME_BYTES",
    "ContentTree",
    "Manifest",
    "PointDisk",
    "PointFile",
    "PointStatistics",
    "ReadMode",
    "decode_manifest",
    "encode_manifest",
]

MANIFEST_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 4 << 20
"""About twenty thousand files. Every listing decodes every manifest, so their size is bounded."""
MAX_NAME_BYTES: Final = 1024
"""Longest VM name, in bytes of UTF-8."""
MAX_LABELS_BYTES: Final = 64 << 10

ReadMode = Literal["full", "hash", "cbt", "audited"]
_READ_MODES: Final = ("full", "hash", "cbt", "audited")


@dataclass(frozen=True, slots=True)
class ContentTree:
    """Content as a disk tree: its length, its root, and what it was cut into before it was chunked."""

    size_bytes: int
    root: NodeId
    segment_bytes: int


@dataclass(frozen=True, slots=True)
class PointDisk:
    """One disk of a restore point.

    Args:
        read: how its content came to be known: `full` (everything was read), `hash` (hashed on the
            host), `cbt` (a change map was trusted), `audited` (a change map, and a share re-read).
        change_id: what a change map of a later backup can start from; empty if there is none.
    """

    info: DiskInfo
    tree: ContentTree
    read: ReadMode = "full"
    change_id: str = ""


@dataclass(frozen=True, slots=True)
class PointFile:
    """One file of a restore point that is no disk."""

    info: FileInfo
    tree: ContentTree


@dataclass(frozen=True, slots=True)
class PointStatistics:
    """What the backup did, in bytes of plaintext unless it says `stored`.

    Args:
        bytes_read: read from the source.
        bytes_new: plaintext of the chunks that the repository did not have.
        bytes_stored: added to packs for them and for the tree nodes, headers included.
    """

    bytes_read: int
    bytes_new: int
    bytes_stored: int
    chunks_new: int
    chunks_reused: int
    duration_ms: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A restore point.

    Args:
        session: of the backup; makes every manifest unique.
        vm_uuid: 32 hexadecimal digits; groups the points of a VM.
        time: of the VM snapshot: the moment that the data stands for, Unix seconds.
        received_ms: when the backup began by the clock of the repository's side, Unix milliseconds; puts points
            of the same second in order.
        segment_bytes: of the trees.
        parent: id of the point that the backup built upon, as hexadecimal; for information only.
    """

    session: SessionId
    kind: MachineKind
    vm_uuid: str
    vm_name: str
    host: str
    origin: str
    time: int
    received_ms: int
    segment_bytes: int
    chunker: str
    chunk_size_bytes: int
    disks: tuple[PointDisk, ...]
    files: tuple[PointFile, ...]
    folders: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    parent: str
    tool: str
    statistics: PointStatistics
    partial: bool = field(default=False)

    @property
    def size_bytes(self) -> int:
        """Virtual size of all disks and files."""
        return sum(d.tree.size_bytes for d in self.disks) + sum(f.tree.size_bytes for f in self.files)


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical JSON of a manifest."""
    disks: list[Json] = []
    for disk in manifest.disks:
        info, geometry = disk.info, disk.info.geometry
        disks.append(
            {
                "adapter": info.adapter,
                "change_id": disk.change_id,
                "create_type": info.create_type,
                "descriptor": info.descriptor,
                "flat_name": info.flat_name,
                "format": info.format,
                "geometry": None
                if geometry is None
                else {"cylinders": geometry.cylinders, "heads": geometry.heads, "sectors": geometry.sectors},
                "label": info.label,
                "name": info.name,
                "read": disk.read,
                "root": disk.tree.root.hex(),
                "size_bytes": info.size_bytes,
                "uuid": info.uuid,
            }
        )
    files: list[Json] = [
        {
            "mode": file.info.mode,
            "mtime_ns": file.info.mtime_ns,
            "name": file.info.name,
            "root": file.tree.root.hex(),
            "size_bytes": file.info.size_bytes,
        }
        for file in manifest.files
    ]
    statistics = manifest.statistics
    return canonical.encode(
        {
            "chunker": {"chunk_size_bytes": manifest.chunk_size_bytes, "name": manifest.chunker},
            "disks": disks,
            "files": files,
            "folders": list(manifest.folders),
            "host": manifest.host,
            "kind": manifest.kind,
            "labels": dict(manifest.labels),
            "origin": manifest.origin,
            "parent": manifest.parent,
            "partial": manifest.partial,
            "received_ms": manifest.received_ms,
            "segment_bytes": manifest.segment_bytes,
            "session": manifest.session.hex(),
            "statistics": {
                "bytes_new": statistics.bytes_new,
                "bytes_read": statistics.bytes_read,
                "bytes_stored": statistics.bytes_stored,
                "chunks_new": statistics.chunks_new,
                "chunks_reused": statistics.chunks_reused,
                "duration_ms": statistics.duration_ms,
            },
            "time": manifest.time,
            "tool": manifest.tool,
            "type": "restore-point",
            "version": MANIFEST_VERSION,
            "vm": {"name": manifest.vm_name, "uuid": manifest.vm_uuid},
            "warnings": list(manifest.warnings),
        }
    )


def _tree(fields: Fields, segment_bytes: int) -> ContentTree:
    root = NodeId(RecordId(fields.raw("root", ID_BYTES)))
    return ContentTree(fields.integer("size_bytes"), root, segment_bytes)


def _disk(value: Json, segment_bytes: int) -> PointDisk:
    fields = Fields(value, "a disk of the manifest")
    disk_format, read = fields.text("format"), fields.text("read")
    if disk_format not in ("raw", "vmdk") or read not in _READ_MODES:
        raise UnsupportedFormat(
            f"a disk has format '{disk_format}' and read mode '{read}'", hint="use a newer Holdfast"
        )
    shape = fields.optional_object("geometry")
    tree = _tree(fields, segment_bytes)
    info = DiskInfo(
        name=fields.text("name"),
        size_bytes=tree.size_bytes,
        format=cast("DiskFormat", disk_format),
        flat_name=fields.text("flat_name"),
        descriptor=fields.text("descriptor"),
        create_type=fields.text("create_type"),
        label=fields.text("label"),
        uuid=fields.text("uuid"),
        adapter=fields.text("adapter"),
        geometry=None
        if shape is None
        else DiskGeometry(shape.integer("cylinders"), shape.integer("heads"), shape.integer("sectors")),
    )
    return PointDisk(info, tree, cast("ReadMode", read), fields.text("change_id"))


def _file(value: Json, segment_bytes: int) -> PointFile:
    fields = Fields(value, "a file of the manifest")
    tree = _tree(fields, segment_bytes)
    info = FileInfo(
        name=fields.text("name"),
        size_bytes=tree.size_bytes,
        mtime_ns=fields.integer("mtime_ns", least=-(2**62)),
        mode=fields.integer("mode", most=0o7777),
    )
    return PointFile(info, tree)


def decode_manifest(data: bytes) -> Manifest:
    """The manifest that `data` encodes.

    Raises:
        DamagedData: it is none.
        UnsupportedFormat: it is one of a later version.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise DamagedData("a manifest is longer than any may be")
    fields = Fields(canonical.decode(data), "the manifest")
    if fields.text("type") != "restore-point":
        raise DamagedData("a manifest is not that of a restore point")
    version, kind = fields.integer("version"), fields.text("kind")
    if version != MANIFEST_VERSION or kind not in ("vm", "disk"):
        raise UnsupportedFormat(
            f"a restore point has manifest version {version} and kind '{kind}'", hint="use a newer Holdfast"
        )
    segment_bytes = fields.integer("segment_bytes", least=MIN_SEGMENT_BYTES, most=MAX_SEGMENT_BYTES)
    if segment_bytes & (segment_bytes - 1):
        raise DamagedData("the segment size of a restore point is no power of two")
    vm, chunker, statistics = fields.object("vm"), fields.object("chunker"), fields.object("statistics")
    return Manifest(
        session=SessionId(fields.raw("session", SESSION_ID_BYTES)),
        kind=cast("MachineKind", kind),
        vm_uuid=vm.raw("uuid", 16).hex(),
        vm_name=vm.text("name"),
        host=fields.text("host"),
        origin=fields.text("origin"),
        time=fields.integer("time"),
        received_ms=fields.integer("received_ms"),
        segment_bytes=segment_bytes,
        chunker=chunker.text("name"),
        chunk_size_bytes=chunker.integer("chunk_size_bytes", least=1),
        disks=tuple(_disk(value, segment_bytes) for value in fields.items("disks")),
        files=tuple(_file(value, segment_bytes) for value in fields.items("files")),
        folders=fields.texts("folders"),
        labels=tuple(sorted(fields.text_map("labels").items())),
        warnings=fields.texts("warnings"),
        parent=fields.text("parent"),
        tool=fields.text("tool"),
        statistics=PointStatistics(
            bytes_read=statistics.integer("bytes_read"),
            bytes_new=statistics.integer("bytes_new"),
            bytes_stored=statistics.integer("bytes_stored"),
            chunks_new=statistics.integer("chunks_new"),
            chunks_reused=statistics.integer("chunks_reused"),
            duration_ms=statistics.integer("duration_ms"),
        ),
        partial=fields.flag("partial"),
    )
