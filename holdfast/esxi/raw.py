"""Regular files and block devices as disks: `RawSource` reads one, `FileSink` writes a new file.

Bytes go from the kernel into the caller's buffer with no copy between. Holes are the file system's
own (SEEK_DATA, SEEK_HOLE). A file appears under its final name only when all of it is durable.

What this deliberately does not do: it never looks into the content. A raw image stays raw even if it
begins like a VMDK, because that beginning is written by the guest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import secrets
import stat
import threading
from collections.abc import Iterator
from typing import Final

from holdfast.direct import DirectWriter
from holdfast.disk import FileInfo
from holdfast.errors import DestinationExists, SourceChanged, StorageError, storage_error
from holdfast.esxi.handles import SharedFile, source_error
from holdfast.esxi.names import printable

__all__ = ["FileSink", "RawSource", "write_all"]

_NAME_BYTES: Final = 255


class RawSource:
    """The bytes of a regular file or block device; a `BlockSource`.

    The size is that at the time of opening: what is appended later is not seen.

    Args:
        path: the file.
        devices: whether a block device will do, too.
        follow: whether a symbolic link as the last component is followed.

    Raises:
        SourceNotFound, SourceUnsupported, SourceUnreadable: as `SharedFile` says.
    """

    def __init__(self, path: str, *, devices: bool = True, follow: bool = True) -> None:
        self.path = path
        self._file = SharedFile(path, devices=devices, follow=follow)
        try:
            self._size_bytes = self._measure()
        except BaseException:
            self._file.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Length of the file or device in bytes."""
        return self._size_bytes

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for two paths of one file."""
        return self._file.status.st_dev, self._file.status.st_ino

    def file_info(self, name: str) -> FileInfo:
        """What is stored of the file beside its bytes, under the relative path `name`."""
        status = self._file.status
        return FileInfo(
            name=name,
            size_bytes=self._size_bytes,
            mtime_ns=status.st_mtime_ns,
            mode=stat.S_IMODE(status.st_mode),
        )

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`. One range where the file system knows no holes.

        lseek with these two arguments answers from the offset it is given, and preadv from the one
        it is given, so that several threads share one descriptor without a lock.
        """
        position = start
        while position < end:
            try:
                with self._file.descriptor() as descriptor:
                    data = os.lseek(descriptor, position, os.SEEK_DATA)
                    hole = os.lseek(descriptor, data, os.SEEK_HOLE) if data < end else end
            except OSError as error:
                if error.errno == errno.ENXIO:
                    # Nothing but a hole up to the end: of the file as we know it, or of one that
                    # has been cut off meanwhile. The second must not pass for zeros.
                    self._require_length()
                    return
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    yield position, end - position
                    return
                raise source_error(error, self.path) from None
            if data >= end:
                return
            # A file that changes meanwhile may answer nonsense; go on in any case.
            hole = min(max(hole, data + 1), end)
            yield data, hole - data
            position = hole

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`.

        Raises:
            SourceChanged: the file ends before `offset + len(buffer)`.
            SourceUnreadable: the read failed.
        """
        done, wanted = 0, buffer.nbytes
        with self._file.descriptor() as descriptor:
            while done < wanted:
                try:
                    count = os.preadv(descriptor, [buffer[done:]], offset + done)
                except OSError as error:
                    raise source_error(error, self.path) from None
                if count == 0:
                    raise self._shrunk(offset + done)
                done += count

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()

    def _measure(self) -> int:
        status = self._file.status
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        try:
            with self._file.descriptor() as descriptor:
                return os.lseek(descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise source_error(error, self.path) from None

    def _require_length(self) -> None:
        with self._file.descriptor() as descriptor:
            status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size < self._size_bytes:
            raise self._shrunk(status.st_size)

    def _shrunk(self, length: int) -> SourceChanged:
        return SourceChanged(
            f"{printable(self.path)} became shorter while it was read: it now ends at byte {length}, "
            f"not {self._size_bytes}",
            hint="back up a snapshot, or when nothing writes to it",
        )


def write_all(descriptor: int, offset: int, data: memoryview, doing: str) -> None:
    """Writes all of `data` at `offset` bytes.

    Raises:
        StorageError: through `storage_error`, with the phrase `doing`.
    """
    done = 0
    while done < data.nbytes:
        try:
            count = os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise storage_error(error, doing) from None
        if count == 0:
            raise StorageError(f"nothing could be written while {doing}")
        done += count


class FileSink:
    """A new sparse file; a `BlockSink`. What is not written is a hole.

    It is written as `.<name>.holdfast-partial-<hex>` in the same folder and gets its name in
    `finish`, so that an interrupted restore never leaves a file that looks complete.

    Args:
        final_path: the file's name to be; its folder exists.
        size_bytes: its length.
        overwrite: replace what is there. A folder, device, pipe or socket is never replaced; a
            symbolic link is replaced itself, never what it points to.
        mode: permission bits; only 0o777 count, since a set-id bit out of a backup could be forged.
        mtime_ns: time of modification in ns since 1970, or None for now.

    Raises:
        DestinationExists: it exists, and may not be overwritten. Nothing has been written then.
        StorageError: the temporary file can not be made.
    """

    def __init__(
        self, final_path: str, size_bytes: int, *, overwrite: bool, mode: int, mtime_ns: int | None = None
    ) -> None:
        self._final = posixpath.abspath(final_path)
        self._overwrite = overwrite
        self._mode = mode & 0o777
        self._mtime_ns = mtime_ns
        self._folder, name = posixpath.split(self._final)
        self._doing = f"writing {printable(final_path)}"
        self._require_free()
        ending = f".holdfast-partial-{secrets.token_hex(6)}"
        kept = name.encode(errors="surrogateescape")[: _NAME_BYTES - 1 - len(ending)]
        self._temporary = posixpath.join(self._folder, f".{kept.decode(errors='ignore')}{ending}")
        self._writing = threading.Lock()
        self._direct: DirectWriter | None = None
        self._descriptor = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._temporary, flags, 0o600)
            os.ftruncate(self._descriptor, size_bytes)
        except (OSError, OverflowError) as error:
            self.abort()
            raise self._translated(error) from None
        self._direct = DirectWriter(self._temporary)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes `data` at `offset` bytes. Thread-safe.

        What can not go past the page cache is written one piece at a time: threads that write one file at
        once spin on the inode's lock in the kernel.
        """
        try:
            done = self._direct.write(offset, data) if self._direct else 0
        except OSError as error:
            raise storage_error(error, self._doing) from None
        if done < data.nbytes:
            with self._writing:
                write_all(self._descriptor, offset + done, data[done:], self._doing)

    def finish(self) -> None:
        """Gives the file its mode, time and name.

        Durability: on return, content and name are on the disk.

        Raises:
            DestinationExists: something took the name meanwhile, and may not be overwritten.
            StorageError: anything else; `abort` then removes what has been written.
        """
        try:
            if self._direct is not None:
                self._direct.close()
            os.fchmod(self._descriptor, self._mode)
            if self._mtime_ns is not None:
                os.utime(self._descriptor, ns=(self._mtime_ns, self._mtime_ns))
            os.fsync(self._descriptor)
            self._give_name()
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            _sync_folder(self._folder)
        except (OSError, OverflowError) as error:
            raise self._translated(error) from None

    def abort(self) -> None:
        """Removes what has been written so far. May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if self._direct is not None:
            self._direct.close()
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def _require_free(self) -> None:
        try:
            status = os.lstat(self._final)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError):
                raise StorageError(f"{printable(self._final)} is no possible path") from None
            raise storage_error(error, self._doing) from None
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise DestinationExists(
                f"{printable(self._final)} exists and is no regular file",
                hint="choose another destination",
            )
        if not self._overwrite:
            raise self._taken()

    def _give_name(self) -> None:
        """Renames the temporary file; without `overwrite`, only to a name that nobody has."""
        if self._overwrite:
            os.rename(self._temporary, self._final)
            return
        try:
            os.link(self._temporary, self._final, follow_symlinks=False)
        except FileExistsError:
            raise self._taken() from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
                raise
        else:
            os.unlink(self._temporary)
            return
        # No hard links here (FAT, some network file systems): look, then rename.
        if os.path.lexists(self._final):
            raise self._taken()
        os.rename(self._temporary, self._final)

    def _translated(self, error: OSError | OverflowError) -> StorageError:
        if isinstance(error, OverflowError):
            return StorageError(f"a size or time is out of range while {self._doing}")
        return storage_error(error, self._doing)

    def _taken(self) -> DestinationExists:
        return DestinationExists(
            f"{printable(self._final)} exists already",
            hint="choose another destination, or restore with --overwrite",
        )


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems can not
            raise
    finally:
        os.close(descriptor)
