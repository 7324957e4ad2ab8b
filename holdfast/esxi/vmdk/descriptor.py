"""VMDK descriptors: text to values, and the text of a descriptor that a restore writes.

A descriptor says of which extents a disk is made and how the VM sees it. Pure: no file is touched.

Tolerated: any case, CRLF, trailing blanks, comments, a byte order mark, the encodings of `text.py`,
unknown keys, NUL padding. Refused: a line that is neither a comment, `key = value` nor an extent,
because an extent that is not understood would be a disk with a part missing.

Source: VMware, "Virtual Disk Format 5.0", "The Descriptor File".
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from holdfast.disk import SECTOR_BYTES, DiskGeometry
from holdfast.errors import SourceFormat
from holdfast.esxi import text as texts
from holdfast.esxi.names import printable
from holdfast.units import KIB, TIB

__all__ = [
    "MAX_DESCRIPTOR_BYTES",
    "MAX_SECTORS",
    "NO_PARENT",
    "Access",
    "DdbEntry",
    "Descriptor",
    "Extent",
    "flat_descriptor",
    "is_plain_flat",
    "looks_like_descriptor",
    "parse_descriptor",
    "parse_descriptor_text",
    "with_inherited_ddb",
]

MAX_DESCRIPTOR_BYTES: Final = 256 * KIB
"""A thousand extents of 2 GiB with long names come to 150 KiB; a single one to 600 bytes."""

MAX_SECTORS: Final = 64 * TIB // SECTOR_BYTES
"""ESXi's limit is 62 TiB."""

NO_PARENT: Final = 0xFFFFFFFF
_HEADING: Final = "# disk descriptorfile"

Access = Literal["RW", "RDONLY", "NOACCESS"]
_ACCESS: Final[dict[str, Access]] = {"RW": "RW", "RDONLY": "RDONLY", "NOACCESS": "NOACCESS"}

_EXTENT_START: Final = re.compile(r"(?:RW|RDONLY|NOACCESS)(?:\s|\Z)", re.ASCII | re.IGNORECASE)
_EXTENT: Final = re.compile(
    r"(RW|RDONLY|NOACCESS)\s+([0-9]{1,20})\s+([A-Z0-9]+)(?:\s+\"([^\"]+)\"(?:\s+([0-9]{1,20}))?)?(?:\s+\S.*)?\Z",
    re.ASCII | re.IGNORECASE,
)
_NEWLINE: Final = re.compile(r"\r\n|\r|\n")
_CID: Final = re.compile(r"[0-9a-f]{1,8}\Z", re.ASCII | re.IGNORECASE)
_UUID: Final = re.compile(r"[0-9a-f]{32}\Z")
_NO_FILE: Final = "ZERO"
_FLAT_KINDS: Final = ("FLAT", "VMFS")


@dataclass(frozen=True, slots=True)
class Extent:
    """One line of the extent description.

    Args:
        kind: upper case: `FLAT`, `VMFS`, `ZERO`, `SPARSE`, or one that is not supported.
        file_name: as written; empty for `ZERO`.
        offset_sectors: where the extent begins in a flat file.
    """

    access: Access
    sectors: int
    kind: str
    file_name: str = ""
    offset_sectors: int = 0


@dataclass(frozen=True, slots=True)
class DdbEntry:
    """One line of the disk data base: `ddb.adapterType = "lsilogic"`."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says. `text` is all of it, as found."""

    text: str
    cid: int
    parent_cid: int
    create_type: str
    parent_hint: str
    change_track_path: str
    extents: tuple[Extent, ...]
    ddb: tuple[DdbEntry, ...]

    @property
    def sectors(self) -> int:
        """The disk's size."""
        return sum(extent.sectors for extent in self.extents)

    @property
    def adapter(self) -> str:
        """`ddb.adapterType`, or empty."""
        return self._ddb_value("ddb.adaptertype")

    @property
    def uuid(self) -> str:
        """`ddb.uuid` as 32 lower-case hexadecimal digits, or empty."""
        digits = re.sub(r"[\s-]", "", self._ddb_value("ddb.uuid")).lower()
        return digits if _UUID.match(digits) else ""

    @property
    def geometry(self) -> DiskGeometry | None:
        """The BIOS geometry, if it is complete and sane."""
        values = [self._ddb_value(f"ddb.geometry.{part}") for part in ("cylinders", "heads", "sectors")]
        if not all(re.fullmatch("[0-9]{1,9}", value) for value in values):
            return None
        return DiskGeometry(*map(int, values))

    def _ddb_value(self, key: str) -> str:
        return next((entry.value for entry in self.ddb if entry.key.lower() == key), "")


def looks_like_descriptor(head: bytes) -> bool:
    """Whether a file that begins with these bytes (some hundred will do) is a descriptor."""
    plain = head.removeprefix(b"\xef\xbb\xbf").decode("latin-1").lstrip().lower()
    return plain.startswith(_HEADING)


def parse_descriptor(data: bytes, where: str) -> Descriptor:
    """What the descriptor in `data` says.

    Args:
        where: the file's name, for messages.

    Raises:
        SourceFormat: it is too long, or malformed.
    """
    if len(data) > MAX_DESCRIPTOR_BYTES:
        raise SourceFormat(
            f"{where}: the descriptor is longer than {MAX_DESCRIPTOR_BYTES // KIB} KiB",
            hint="a descriptor is a small text file; is this a disk's data?",
        )
    return parse_descriptor_text(texts.decode(data.partition(b"\0")[0]), where)


def parse_descriptor_text(text: str, where: str) -> Descriptor:
    """As `parse_descriptor`, from text that has been decoded.

    Raises:
        SourceFormat: it is malformed.
    """
    extents: list[Extent] = []
    ddb: list[DdbEntry] = []
    header: dict[str, str] = {}
    for number, raw_line in enumerate(_NEWLINE.split(text.removeprefix("\ufeff")), start=1):
        line = raw_line.strip()
        if not line or line.startswith("#"):
            continue
        if _EXTENT_START.match(line):
            extents.append(_extent(line, f"{where}, line {number}"))
            continue
        key, equals, value = line.partition("=")
        key, value = key.strip(), _unquoted(value.strip())
        if not equals or not key:
            raise SourceFormat(f"{where}, line {number}: '{printable(line)}' can not be understood")
        if key.lower().startswith("ddb."):
            ddb.append(DdbEntry(key, value))
        elif header.setdefault(key.lower(), value) != value:
            raise SourceFormat(f"{where}, line {number}: '{printable(key)}' is given twice and differs")
    if not extents:
        raise SourceFormat(f"{where}: the descriptor names no extent")
    if sum(extent.sectors for extent in extents) > MAX_SECTORS:
        raise SourceFormat(
            f"{where}: the extents add up to more than {MAX_SECTORS * SECTOR_BYTES // TIB} TiB"
        )
    return Descriptor(
        text=text,
        cid=_content_id(header.get("cid", "fffffffe"), "CID", where),
        parent_cid=_content_id(header.get("parentcid", "ffffffff"), "parentCID", where),
        create_type=header.get("createtype", ""),
        parent_hint=header.get("parentfilenamehint", ""),
        change_track_path=header.get("changetrackpath", ""),
        extents=tuple(extents),
        ddb=tuple(ddb),
    )


def with_inherited_ddb(descriptor: Descriptor, ancestors: Iterable[Descriptor]) -> Descriptor:
    """The descriptor of a delta disk, with what its disk data base leaves to its parents.

    ESXi writes adapter, geometry and UUID into the base only. What identifies a content is never inherited.

    Args:
        ancestors: the parent first.
    """
    known = {entry.key.lower() for entry in descriptor.ddb} | {"ddb.longcontentid"}
    inherited: list[DdbEntry] = []
    for ancestor in ancestors:
        fresh = [entry for entry in ancestor.ddb if entry.key.lower() not in known]
        known.update(entry.key.lower() for entry in fresh)
        inherited += fresh
    if not inherited:
        return descriptor
    lines = ["", "# From the parent", *(f'{entry.key} = "{entry.value}"' for entry in inherited), ""]
    text = descriptor.text.rstrip("\r\n") + "\n" + "\n".join(lines)
    return dataclasses.replace(descriptor, text=text, ddb=(*descriptor.ddb, *inherited))


def is_plain_flat(descriptor: Descriptor) -> bool:
    """Whether the disk is one flat extent from the start of one file, without parent, and is called so."""
    if len(descriptor.extents) != 1 or descriptor.parent_cid != NO_PARENT:
        return False
    if descriptor.create_type.lower().startswith("twogb"):
        return False
    extent = descriptor.extents[0]
    return extent.kind in _FLAT_KINDS and extent.offset_sectors == 0 and extent.access != "NOACCESS"


def flat_descriptor(
    original_text: str,
    size_bytes: int,
    flat_name: str,
    *,
    adapter: str = "",
    uuid: str = "",
    geometry: DiskGeometry | None = None,
    vmfs: bool = True,
) -> str:
    """The text of a descriptor for a disk that lies in one flat file.

    The original comes back unchanged if it says just that. Otherwise its CID and disk data base are
    kept, and what no longer holds (other extents, a parent, a change tracking file) is dropped. A
    disk of VMFS stays one; all else becomes `monolithicFlat`.

    Args:
        original_text: the descriptor as it was found; empty for a disk that had none.
        size_bytes: virtual size; rounded up to whole sectors.
        flat_name: the flat file's path, relative to the descriptor's folder.
        adapter, uuid, geometry: used only where there is no original.
        vmfs: False if it will not lie on VMFS: then it is `monolithicFlat` in any case.

    Raises:
        SourceFormat: the original is malformed, or `flat_name` can not be put between quotes.
    """
    if '"' in flat_name or _NEWLINE.search(flat_name) or not flat_name:
        raise SourceFormat(f"'{printable(flat_name)}' can not be the name of an extent")
    sectors = -(-size_bytes // SECTOR_BYTES)
    if not original_text:
        ddb = _new_ddb(sectors, flat_name, adapter=adapter, uuid=uuid, geometry=geometry)
        long_id = next(entry.value for entry in ddb if entry.key == "ddb.longContentID")
        return _compose(int(long_id[-8:], 16), sectors, flat_name, ddb, on_vmfs=False)
    original = parse_descriptor_text(original_text, "the stored descriptor")
    on_vmfs = original.create_type.lower().startswith(("vmfs", "sesparse"))
    if (
        (vmfs or not on_vmfs)
        and is_plain_flat(original)
        and not original.change_track_path
        and not original.parent_hint
    ):
        extent = original.extents[0]
        if (extent.sectors, extent.file_name) == (sectors, flat_name):
            return original_text
    return _compose(original.cid, sectors, flat_name, original.ddb, on_vmfs=on_vmfs and vmfs)


def _extent(line: str, where: str) -> Extent:
    match = _EXTENT.match(line)
    if match is None:
        raise SourceFormat(f"{where}: the extent '{printable(line)}' can not be understood")
    extent = Extent(
        access=_ACCESS[match[1].upper()],
        sectors=int(match[2]),
        kind=match[3].upper(),
        file_name=match[4] or "",
        offset_sectors=int(match[5] or 0),
    )
    if extent.sectors == 0 or extent.sectors > MAX_SECTORS or extent.offset_sectors > MAX_SECTORS:
        raise SourceFormat(f"{where}: the extent's size or offset is out of range in '{printable(line)}'")
    if extent.kind != _NO_FILE and not extent.file_name:
        raise SourceFormat(f"{where}: the extent '{printable(line)}' names no file")
    return extent


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] == '"' else value


def _content_id(value: str, key: str, where: str) -> int:
    if not _CID.match(value):
        raise SourceFormat(f"{where}: {key} is '{printable(value)}', not a number of 8 hexadecimal digits")
    return int(value, 16)


def _compose(cid: int, sectors: int, flat_name: str, ddb: tuple[DdbEntry, ...], *, on_vmfs: bool) -> str:
    extent = f'RW {sectors} VMFS "{flat_name}"' if on_vmfs else f'RW {sectors} FLAT "{flat_name}" 0'
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid:08x}",
        f"parentCID={NO_PARENT:08x}",
        f'createType="{"vmfs" if on_vmfs else "monolithicFlat"}"',
        "",
        "# Extent description",
        extent,
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        *(f'{entry.key} = "{entry.value}"' for entry in ddb),
        "",
    ]
    return "\n".join(lines)


def _new_ddb(
    sectors: int, flat_name: str, *, adapter: str, uuid: str, geometry: DiskGeometry | None
) -> tuple[DdbEntry, ...]:
    """A disk data base for a disk that had none. The same arguments give the same text."""
    shape = geometry or _usual_geometry(sectors)
    long_id = hashlib.sha256(f"{sectors} {uuid} {flat_name}".encode()).hexdigest()[:32]
    if int(long_id[-8:], 16) >= NO_PARENT - 1:  # stand for "no parent" and "no content yet"
        long_id = f"{long_id[:-8]}00000001"
    entries = [
        DdbEntry("ddb.adapterType", adapter or "lsilogic"),
        DdbEntry("ddb.geometry.cylinders", str(shape.cylinders)),
        DdbEntry("ddb.geometry.heads", str(shape.heads)),
        DdbEntry("ddb.geometry.sectors", str(shape.sectors)),
        DdbEntry("ddb.longContentID", long_id),
    ]
    if _UUID.match(uuid):
        pairs = [uuid[at : at + 2] for at in range(0, 32, 2)]
        entries.append(DdbEntry("ddb.uuid", f"{' '.join(pairs[:8])}-{' '.join(pairs[8:])}"))
    entries.append(DdbEntry("ddb.virtualHWVersion", "14"))
    return tuple(entries)


def _usual_geometry(sectors: int) -> DiskGeometry:
    """What VMware's SCSI adapters assume for a disk of that size."""
    gib = 1024**3 // SECTOR_BYTES
    heads, per_track = (64, 32) if sectors < gib else (128, 32) if sectors < 2 * gib else (255, 63)
    return DiskGeometry(max(1, sectors // (heads * per_track)), heads, per_track)
