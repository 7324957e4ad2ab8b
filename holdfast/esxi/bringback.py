"""A VM is brought back to a host: a folder with thin disks, filled by the agent and checked.

    folder, with a file in it that says that it is incomplete
    disks by the host's own tool, thin; only what is not zeros is written
    every byte that was written is read back there and its hash compared; the host's checks of chain and disk
    small files, the VMX last; then the file of incompleteness goes
    registered, started if wanted

Invariants: nothing that exists is overwritten, but by `write_differences`, and by going on with a restore of the same point that
died. As long as the marker is there, the folder is not a VM to be trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from holdfast.disk import SECTOR_BYTES, DiskInfo
from holdfast.errors import DestinationExists, DiskFull, SourceError, StorageError, UsageError
from holdfast.esxi import text as texts
from holdfast.esxi.agent.gate import MARKER
from holdfast.esxi.agent_link import AgentLink, FarFile
from holdfast.esxi.host import HostSession
from holdfast.esxi.names import fault_of, free_name, printable, stem_of
from holdfast.esxi.says.disktool import DiskTask, require_success
from holdfast.units import KIB, MIB

__all__ = ["MARKER", "HostSink", "NewFolder", "new_disk_names", "write_differences"]

_PIECE_BYTES: Final = MIB
_BLOCK_BYTES: Final = 64 * KIB
_CHECK_EVERY_BYTES: Final = 32 * MIB
_MAX_MARKER_BYTES: Final = 4096
_DELTA: Final = re.compile(r"-\d{6}(?=\.vmdk\Z)")


def new_disk_names(disks: Sequence[DiskInfo]) -> dict[str, str]:
    """Name of each disk in the restore point -> its name in the new folder: flat, and not called like a snapshot's."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for disk in disks:
        base = _DELTA.sub("", posixpath.basename(disk.name))
        if not base.lower().endswith(".vmdk"):
            base = f"{stem_of(base)}.vmdk"
        name = free_name(stem_of(base), ".vmdk", taken)
        names[disk.name] = name
        taken |= {name, f"{stem_of(name)}-flat.vmdk"}
    return names


class NewFolder:
    """The folder that a VM is restored into.

    Args:
        path: on the host: `/vmfs/volumes/DATASTORE/NAME`.
        point: id of the restore point, for the marker.
    """

    def __init__(self, session: HostSession, path: str, point: str) -> None:
        self._console = session.console
        self.path: Final = path
        self._point = point
        self.resumed = False

    def claim(self) -> None:
        """Makes the folder, or takes up the one of a restore of the same point that died.

        Raises:
            DestinationExists: there is something else.
            StorageError: it can not be made.
        """
        where = printable(self.path)
        if self._console.exists(self.path):
            if not self._console.exists(f"{self.path}/{MARKER}"):
                raise DestinationExists(
                    f"{where} exists on the host already",
                    hint="name another folder: esxi://HOST/DATASTORE/NEWNAME",
                )
            text = self._console.read(f"{self.path}/{MARKER}", _MAX_MARKER_BYTES).decode("utf-8", "replace")
            if self._point not in text:
                raise DestinationExists(
                    f"{where} is what an unfinished restore of another point has left",
                    hint="finish that one, or remove the folder on the host, or name another one",
                )
            self.resumed = True
            return
        marker = (
            "This folder is being restored by Holdfast and is not complete. Do not use it.\n"
            f"To go on, run the same restore again. {json.dumps({'point': self._point})}\n"
        ).encode()
        self._console.make_folder(self.path, marker)
        self._require_written(f"{self.path}/{MARKER}", marker)

    def complete(self) -> None:
        """The folder is a whole VM from now on."""
        self._console.complete(self.path)

    def put(self, name: str, data: bytes) -> None:
        """Writes a small file, and reads it back.

        Raises:
            StorageError: it can not be written, or is not what was written.
        """
        if fault_of(name) or "/" in name:
            raise UsageError(f"'{printable(name)}' can not be the name of a file of a VM")
        path = f"{self.path}/{name}"
        self._console.put(path, data)
        self._require_written(path, data)

    def make_disk(self, info: DiskInfo, name: str) -> str:
        """The flat file of a new thin disk, or of the one that is there already if the restore goes on."""
        path = f"{self.path}/{name}"
        flat = f"{self.path}/{stem_of(name)}-flat.vmdk"
        size = -(-info.size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        if self.resumed and self._console.exists(path):
            sizes = {file.name: file.size_bytes for file in self._console.listing(self.path)}
            if sizes.get(posixpath.basename(flat)) == size:
                return flat
            self.tool("silent", f"removing the unfinished disk {name}", "-U", path)
        self.tool(
            "create", f"making the disk {name}", "-c", str(size), "-d", "thin", "-a", _adapter(info), path
        )
        return flat

    def keep_disk_uuid(self, info: DiskInfo, name: str) -> None:
        """Gives the new disk's descriptor the UUID that the disk had."""
        if not info.uuid:
            return
        pairs = [info.uuid[i : i + 2] for i in range(0, 32, 2)]
        value = f"{' '.join(pairs[:8])}-{' '.join(pairs[8:])}"
        text = texts.decode(self._console.read(f"{self.path}/{name}", 1 << 16))
        lines = [line for line in text.splitlines() if not line.startswith("ddb.uuid")]
        self.put(name, texts.encode("\n".join([*lines, f'ddb.uuid = "{value}"']) + "\n"))

    def check_disk(self, name: str) -> None:
        """Has the host check the disk.

        Raises:
            SourceError: it finds fault with it.
        """
        path = f"{self.path}/{name}"
        self.tool("chain", f"checking the disk {name}", "-e", path)
        self.tool("check", f"checking the disk {name}", "-x", "check", path)

    def tool(self, task: DiskTask, doing: str, *words: str) -> None:
        """Runs the host's tool for disks."""
        answer = self._console.act(("vmkfstools", *words), doing, timeout_s=3600.0, together=True)
        try:
            require_success(answer.text, task, doing)
        except SourceError as error:
            if "full" in error.hint:
                raise DiskFull(error.message, hint=error.hint) from None
            raise

    def _require_written(self, path: str, data: bytes) -> None:
        if self._console.read(path, max(len(data), 1)) != data:
            raise StorageError(
                f"{printable(path)} is not what was written to it", hint="is the datastore full, or damaged?"
            )


class HostSink:
    """A disk on a host as a `BlockSink`: what is written is read back there in good time.

    Args:
        file: opened for writing.
    """

    def __init__(self, link: AgentLink, file: FarFile) -> None:
        self._link = link
        self._file = file
        self._lock = threading.Lock()
        self._unchecked: list[tuple[int, int, bytes]] = []
        self._unchecked_bytes = 0

    def write(self, offset: int, data: memoryview) -> None:
        """See `BlockSink.write`."""
        with self._lock, _as_storage(self._file.path):
            for start in range(0, data.nbytes, _PIECE_BYTES):
                piece = bytes(data[start : start + _PIECE_BYTES])
                self._file.write(offset + start, piece)
                self._unchecked.append((offset + start, len(piece), hashlib.sha256(piece).digest()))
                self._unchecked_bytes += len(piece)
            if self._unchecked_bytes >= _CHECK_EVERY_BYTES:
                self._check()

    def check(self) -> None:
        """All that was written so far is on the host's disk, and was read back there.

        Raises:
            StorageError: it is not.
        """
        with self._lock, _as_storage(self._file.path):
            self._check()

    def finish(self) -> None:
        """See `BlockSink.finish`."""
        with self._lock, _as_storage(self._file.path):
            self._file.sync()  # what an interrupted run wrote, and this one has found to be right, too
            self._check()
            self._file.close()

    def abort(self) -> None:
        """See `BlockSink.abort`: what was written stays, in a folder that is marked."""
        with contextlib.suppress(Exception):
            self._file.close()

    def _check(self) -> None:
        if not self._unchecked:
            return
        self._file.sync()
        pieces = [
            self._file.piece(label, offset, length)
            for label, (offset, length, _) in enumerate(self._unchecked)
        ]
        for (offset, length, wanted), found in zip(self._unchecked, self._link.hashes(pieces), strict=True):
            if wanted != found:
                raise StorageError(
                    f"{printable(self._file.path)}: {length} bytes at {offset} read back differently than they were written",
                    hint="the datastore, or the way to it, is damaged",
                )
        self._unchecked.clear()
        self._unchecked_bytes = 0


def write_differences(
    link: AgentLink,
    file: FarFile,
    where: range,
    read: Callable[[int, int], bytes],
    on_progress: Callable[[int, int], None],
) -> int:
    """Makes a part of a file of the host equal to what `read` returns, and writes only what differs; how many bytes that were.

    Args:
        file: opened for writing, and at least so long; closed on return.
        where: from one offset up to another.
        read: returns the bytes at an offset.
        on_progress: told up to where it is equal, which is read back, and how many bytes were written.

    Raises:
        StorageError: it can not be written.
    """
    written = 0
    sink = HostSink(link, file)

    def write(offset: int, wanted: bytes, *, zeros: bool) -> int:
        count = 0
        for low in range(0, len(wanted), _BLOCK_BYTES):
            block = wanted[low : low + _BLOCK_BYTES]
            if (block.count(0) == len(block)) == zeros:
                sink.write(offset + low, memoryview(block))
                count += len(block)
        return count

    def differing(offsets: Sequence[int], end: int) -> Iterator[tuple[int, bytes]]:
        pieces = [file.piece(n, offset, min(_PIECE_BYTES, end - offset)) for n, offset in enumerate(offsets)]
        with _as_storage(file.path):
            found = list(link.hashes(pieces))
        for offset, there in zip(offsets, found, strict=True):
            wanted = read(offset, min(_PIECE_BYTES, end - offset))
            if hashlib.sha256(wanted).digest() != there:
                yield offset, wanted

    for start in range(where.start, where.stop, _CHECK_EVERY_BYTES):
        end = min(start + _CHECK_EVERY_BYTES, where.stop)
        changed = []
        for offset, wanted in differing(range(start, end, _PIECE_BYTES), end):
            written += write(offset, wanted, zeros=False)
            changed.append(offset)
        sink.check()
        # A thin disk that was begun mostly is right by now, and stays thin; zeros are only written over what is none.
        for offset, wanted in differing(changed, end):
            written += write(offset, wanted, zeros=True)
        sink.check()
        on_progress(end, written)
    sink.finish()
    return written


def _adapter(info: DiskInfo) -> str:
    return info.adapter if info.adapter in ("lsilogic", "buslogic", "ide", "pvscsi") else "lsilogic"


@contextlib.contextmanager
def _as_storage(path: str) -> Iterator[None]:
    """The agent speaks of sources; here it is the destination that fails."""
    try:
        yield
    except SourceError as error:
        if "No space" in error.message:
            raise DiskFull(
                f"the datastore is full: no space is left for {printable(path)}",
                hint="free some space there, then run the restore again",
            ) from None
        raise StorageError(
            f"{printable(path)} can not be written and read back: {error.message}", hint=error.hint
        ) from None
