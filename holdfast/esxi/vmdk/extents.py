"""The extents of a descriptor become the pieces of a disk.

Descriptors come from strangers, so the files that they name must be regular files inside of the
VM's folder, links resolved; no area of a file belongs to a disk twice; a file that is shorter than
stated is refused. One that is longer is read as far as the descriptor says, with a warning.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from typing import Final

from holdfast.disk import SECTOR_BYTES, BlockSource
from holdfast.errors import SourceFormat, SourceNotFound, SourceUnsupported
from holdfast.esxi.names import printable
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.cowd import open_cowd
from holdfast.esxi.vmdk.descriptor import Extent
from holdfast.esxi.vmdk.hosted import open_hosted
from holdfast.esxi.vmdk.joined import Piece
from holdfast.esxi.vmdk.kinds import kind_of
from holdfast.esxi.vmdk.redo import RedoLog
from holdfast.esxi.vmdk.sesparse import open_sesparse
from holdfast.esxi.vmdk.sparse import SparseExtent

__all__ = ["CONSOLIDATE", "ExtentTable", "longer"]

CONSOLIDATE: Final = "consolidate or delete the VM's snapshots first"

_RAW_DEVICES: Final = ("VMFSRDM", "VMFSRAW")
_REDO_LOGS: Final[dict[str, Callable[[BlockSource, str], RedoLog]]] = {
    "VMFSSPARSE": open_cowd,
    "SESPARSE": open_sesparse,
    "SPARSE": open_hosted,
}


class ExtentTable:
    """Collects the pieces of a disk from its descriptor's extents, with all that must be checked."""

    def __init__(self, descriptor_path: str, root: str, descriptor_identity: tuple[int, int]) -> None:
        self.pieces: list[Piece] = []
        self.paths: list[str] = []
        self.warnings: list[str] = []
        self._path = descriptor_path
        self._root = root
        self._identity = descriptor_identity
        self._where = printable(descriptor_path)
        self._files: dict[tuple[int, int], RawSource] = {}
        self._sparse: set[tuple[int, int]] = set()
        self._used: list[tuple[tuple[int, int], int, int, str]] = []

    def add(self, extent: Extent) -> None:
        """Opens one extent.

        Raises:
            SourceFormat, SourceUnsupported: as `open_vmdk` says.
        """
        length = extent.sectors * SECTOR_BYTES
        self._require_accessible(extent)
        if extent.kind in ("VMFSSPARSE", "SESPARSE"):
            raise SourceFormat(
                f"{self._where}: the extent {extent.kind} is a redo log of a snapshot, but no parent is named",
                hint="the descriptor is damaged: copy it again from where it came",
            )
        if extent.kind == "ZERO":
            self.pieces.append(Piece(length))
            return
        if extent.kind not in ("FLAT", "VMFS", "SPARSE"):
            raise SourceUnsupported(
                f"{self._where}: extents of type {printable(extent.kind)} are not supported"
            )
        path = self._resolve(extent.file_name)
        file = self._open(path, extent.file_name)
        name = printable(extent.file_name)
        if extent.kind == "SPARSE":
            self._add_sparse(extent, file, name)
        else:
            self._add_flat(extent, file, name)

    def add_redo_log(self, extent: Extent) -> RedoLog:
        """Opens the extent of a delta disk.

        Raises:
            SourceFormat, SourceUnsupported: as `open_vmdk` says.
        """
        self._require_accessible(extent)
        if extent.kind not in _REDO_LOGS:
            raise SourceUnsupported(
                f"{self._where}: a delta disk with an extent of type {printable(extent.kind)} is not supported",
                hint=CONSOLIDATE,
            )
        file = self._open(self._resolve(extent.file_name), extent.file_name)
        name = printable(extent.file_name)
        log = _REDO_LOGS[extent.kind](file, f"{self._where}: extent '{name}'")
        if log.size_bytes != extent.sectors * SECTOR_BYTES:
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is a redo log for a disk of {log.size_bytes} bytes, "
                f"but {extent.sectors * SECTOR_BYTES} are stated"
            )
        return log

    def complete(self) -> None:
        """Checks what only shows when all extents are known.

        Raises:
            SourceFormat: an area of a file occurs twice in the disk.
        """
        self._used.sort()
        reached = {identity: (end, name) for identity, _, end, name in self._used}
        for identity, (end, name) in reached.items():
            held = self._files[identity].size_bytes
            if held > end:
                self.warnings.append(longer(f"{self._where}: the extent '{name}'", held, end))
        for (identity, _, end, name), (following, start, _, _) in zip(
            self._used, self._used[1:], strict=False
        ):
            if identity == following and start < end:
                raise SourceFormat(f"{self._where}: two extents overlap in {name}")

    def close(self) -> None:
        """Closes the files of all extents."""
        for file in self._files.values():
            file.close()

    def _require_accessible(self, extent: Extent) -> None:
        if extent.access == "NOACCESS":
            raise SourceUnsupported(
                f"{self._where}: an extent is marked NOACCESS, so the disk can not be read"
            )
        if extent.kind in _RAW_DEVICES:
            raise SourceUnsupported(
                f"{self._where}: the extent {extent.kind} is a raw device mapping",
                hint="back up what it maps from within the guest",
            )

    def _resolve(self, name: str) -> str:
        """The real path of an extent file.

        Raises:
            SourceFormat: the name leads out of the VM's folder.
            SourceUnsupported: it is no file name.
        """
        shown = printable(name)
        if "://" in name:
            raise SourceUnsupported(
                f"{self._where}: the extent '{shown}' is an object of a storage system, no file"
            )
        if name.startswith("/") or ".." in name.split("/"):
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' lies outside of the VM's folder",
                hint="extents must be named relative to the descriptor, without '..'",
            )
        try:
            path = os.path.realpath(posixpath.join(posixpath.dirname(self._path), name))
        except (OSError, ValueError):
            raise SourceFormat(f"{self._where}: the extent '{shown}' is no possible file name") from None
        if not path.startswith(self._root.rstrip("/") + "/"):
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' is a link that leads out of the VM's folder",
                hint="put the extent itself into the folder",
            )
        return path

    def _open(self, path: str, name: str) -> RawSource:
        shown = printable(name)
        try:
            file = RawSource(path, devices=False, follow=False)
        except SourceNotFound:
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' is missing",
                hint=f"put {printable(posixpath.basename(name))} beside the descriptor, where it belongs",
            ) from None
        except SourceUnsupported as error:
            raise SourceFormat(
                f"{self._where}: the extent '{shown}' is no regular file", hint=error.hint
            ) from None
        if file.identity == self._identity:
            file.close()
            raise SourceFormat(f"{self._where}: the descriptor names itself as its extent '{shown}', a loop")
        known = self._files.setdefault(file.identity, file)
        if known is file:
            self.paths.append(path)
        else:
            file.close()
        return known

    def _add_flat(self, extent: Extent, file: RawSource, name: str) -> None:
        start, length = extent.offset_sectors * SECTOR_BYTES, extent.sectors * SECTOR_BYTES
        if kind_of(file) == "descriptor":
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is itself a descriptor, not a disk's data"
            )
        if file.size_bytes < start + length:
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is too short: it has {file.size_bytes} bytes, "
                f"but {start + length} are stated",
                hint="the file is truncated: copy it again from where it came",
            )
        self._used.append((file.identity, start, start + length, name))
        self.pieces.append(Piece(length, file, start))

    def _add_sparse(self, extent: Extent, file: RawSource, name: str) -> None:
        length = extent.sectors * SECTOR_BYTES
        if file.identity in self._sparse:
            raise SourceFormat(f"{self._where}: the sparse extent '{name}' occurs twice")
        self._sparse.add(file.identity)
        sparse = SparseExtent(file, f"{self._where}: extent '{name}'")
        if sparse.size_bytes < length:
            raise SourceFormat(
                f"{self._where}: the extent '{name}' is too short: it holds {sparse.size_bytes} bytes, "
                f"but {length} are stated"
            )
        if sparse.size_bytes > length:
            self.warnings.append(longer(f"{self._where}: the extent '{name}'", sparse.size_bytes, length))
        self._used.append((file.identity, 0, file.size_bytes, name))
        self.pieces.append(Piece(length, sparse))


def longer(what: str, held: int, stated: int) -> str:
    """The warning that a file holds more than is used of it."""
    return (
        f"{what} holds {held} bytes, but only the {stated} that the descriptor states belong to the disk; "
        "the rest was left out"
    )
