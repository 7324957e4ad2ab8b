"""A repository's folder: its configuration file, its locks, and where its index is.

Locks are those of the operating system (`flock`) and end with the process that holds them:
- on the folder `packs/`: shared by whoever uses the index, exclusive for replacing the index;
- on the repository's folder: exclusive for changing the configuration.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from holdfast.errors import (
    DamagedConfig,
    NoRepository,
    RepositoryBusy,
    RepositoryExists,
    StorageDenied,
    UsageError,
    storage_error,
)
from holdfast.ids import RepositoryId
from holdfast.repo.format.config import MAX_CONFIG_BYTES, Config, decode_config, encode_config
from holdfast.repo.lmdb_index import DATA_FILE
from holdfast.repo.packs import sync_folder

__all__ = ["ReadConfig", "RepositoryFolder"]

CONFIG_FILE: Final = "config.json"
COPY_FILE: Final = "config.json.copy"
_README_FILE: Final = "README.txt"
_INDEX_FOLDER: Final = "index"
_LOCK_WAIT_S: Final = 10.0
_COLLECTING: Final = "gc.lock"
_UNFINISHED: Final = re.compile(r"\.config\.json(\.copy)?\.\d+\Z")
"""What a killed process was about to put into the place of a copy of the configuration."""
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "fuse.sshfs",
        "fuse.rclone",
        "fuse.s3fs",
        "glusterfs",
    }
)

_README: Final = """This folder is a Holdfast backup repository.

config.json        what init decided: format version, chunker, compression, wrapped keys
config.json.copy   the same once more
packs/             all stored data, in files of which nothing is ever rewritten
index/             where each piece is; derived from packs/, rebuilt by: holdfast check --rebuild-index

To list and restore:  holdfast -r THIS_FOLDER list;  holdfast -r THIS_FOLDER restore POINT DESTINATION
Without Holdfast:     python rescue.py THIS_FOLDER --list;  python rescue.py THIS_FOLDER --restore POINT DESTINATION
                      rescue.py is one file of Holdfast's sources; it needs Python 3.8 or later with the packages
                      blake3 and zstandard (and cryptography, if "encryption" in config.json is not null). It reads
                      packs/ alone, and of an encrypted repository config.json. Keep a copy of it.

Do not change, add or remove files here by hand. A copy of config.json and packs/ is a complete backup of the
repository (of an encrypted one only together with a password). The format is described in docs/FORMAT.md of
Holdfast.
"""


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """The configuration, and a sentence if one of its two copies is damaged."""

    config: Config
    warning: str


def _mount_type(path: str) -> str:
    """The type of the file system that holds `path`, as the kernel calls it; empty if it can not be told."""
    best, kind = "", ""
    target = os.path.realpath(path)
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                point = left.split()[4].encode().decode("unicode_escape")
                inside = point in ("/", target) or target.startswith(point + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, right.split()[0]
    return kind


class RepositoryFolder:
    """A repository on a path of this machine."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.packs = os.path.join(self.path, "packs")
        self._lock_fd = -1

    # --- making

    def create(self, config: Config) -> None:
        """Lays a new repository out.

        Durability: it is complete on disk on return; `config.json` comes last, so that a folder with
        one is a repository.

        Raises:
            RepositoryExists: there is one, or something else is in the folder. What an interrupted `create` has
                left is taken over.
        """
        try:
            if os.path.exists(self.path) and not os.path.isdir(self.path):
                raise RepositoryExists(f"{self.path} exists and is no folder")
            above = [os.path.dirname(self.path)]
            while not os.path.isdir(above[-1]):
                above.append(os.path.dirname(above[-1]))
            os.makedirs(self.path, mode=0o750, exist_ok=True)
            with self.changing_config():
                self._require_unused()
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.packs, 0o750)
                with open(os.path.join(self.path, _README_FILE), "w", encoding="utf-8") as file:
                    file.write(_README)
                self._write_config(config)
                for folder in above:
                    sync_folder(folder)
        except OSError as error:
            raise storage_error(error, f"making the repository {self.path}") from error

    def _require_unused(self) -> None:
        """Raises `RepositoryExists` if the folder holds more than an interrupted `create` leaves.

        A copy of the configuration alone makes a repository: it may be all that is left of its keys.
        """
        names = set(os.listdir(self.path))
        if names & {CONFIG_FILE, COPY_FILE}:
            raise RepositoryExists(f"{self.path} is a repository already")
        others = {name for name in names - {"packs", _README_FILE} if not _UNFINISHED.match(name)}
        if others or ("packs" in names and (not os.path.isdir(self.packs) or os.listdir(self.packs))):
            raise RepositoryExists(
                f"the folder {self.path} is not empty",
                hint="name a folder that does not exist yet, or an empty one",
            )

    # --- configuration

    def read_config(self) -> ReadConfig:
        """The configuration, from whichever copy is intact.

        Raises:
            NoRepository: there is none.
            DamagedConfig: both copies are damaged.
            UnsupportedFormat: it is of a later version.
        """
        first = self._read(CONFIG_FILE)
        second = self._read(COPY_FILE)
        if first is None and second is None:
            if os.path.isdir(self.path):
                looks = os.path.isdir(self.packs)
                raise NoRepository(
                    f"{self.path} is no repository: it has no {CONFIG_FILE}",
                    hint="its packs/ folder is there, but the configuration is lost; bring config.json back from a copy"
                    if looks
                    else f"'holdfast init -r {self.path}' makes one in an empty folder",
                )
            if os.path.exists(self.path):
                raise NoRepository(
                    f"{self.path} is a file, not a repository", hint="name the repository's folder"
                )
            raise NoRepository(
                f"{self.path} does not exist", hint=f"'holdfast init -r {self.path}' makes a new repository"
            )
        if first is not None:
            with contextlib.suppress(DamagedConfig):
                return ReadConfig(decode_config(first), "")
        state = "damaged" if first is not None else "missing"
        if second is not None:
            with contextlib.suppress(DamagedConfig):
                return ReadConfig(
                    decode_config(second),
                    f"{CONFIG_FILE} of the repository is {state}; its copy was used. "
                    f"Bring it back with: cp {COPY_FILE} {CONFIG_FILE} (in {self.path})",
                )
        raise DamagedConfig(
            f"{CONFIG_FILE} of the repository {self.path} is {state}, and its copy is no better",
            hint="bring config.json back from a copy of the repository",
        )

    def _read(self, name: str) -> bytes | None:
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read(MAX_CONFIG_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error(error, f"reading {os.path.join(self.path, name)}") from error

    def copies_agree(self) -> bool:
        """Whether both copies of the configuration are there and the same."""
        first, second = self._read(CONFIG_FILE), self._read(COPY_FILE)
        return first is not None and first == second

    def write_config(self, config: Config) -> None:
        """Replaces the configuration, each copy atomically, the copy first. Called within `changing_config`.

        Durability: on disk on return.
        """
        try:
            self._write_config(config)
        except OSError as error:
            raise storage_error(error, f"writing the configuration of {self.path}") from error

    def _write_config(self, config: Config) -> None:
        data = encode_config(config)
        for name in os.listdir(self.path):
            if _UNFINISHED.match(name):  # it may hold a key that is removed now
                os.unlink(os.path.join(self.path, name))
        for name in (COPY_FILE, CONFIG_FILE):
            temporary = os.path.join(self.path, f".{name}.{os.getpid()}")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
                os.replace(temporary, os.path.join(self.path, name))
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            finally:
                os.close(fd)
            sync_folder(self.path)

    # --- locks

    @contextlib.contextmanager
    def changing_config(self) -> Iterator[None]:
        """Excludes other changes of the configuration."""
        fd = self._open_folder(self.path)
        try:
            self._flock(fd, fcntl.LOCK_EX, "another command is changing the repository's keys")
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Excludes other garbage collections, as long as this process lives.

        Raises:
            RepositoryBusy: there is one.
        """
        path = os.path.join(self.path, _COLLECTING)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise RepositoryBusy(
                "a garbage collection is at work already", hint="let it finish; its work is not lost"
            ) from None
        except OSError as error:
            os.close(fd)
            raise storage_error(error, "locking the repository") from error
        try:
            yield
        finally:
            os.close(fd)

    def use_index(self) -> None:
        """Takes part in the use of the index until `release`.

        Raises:
            RepositoryBusy: the index is being replaced.
        """
        if self._lock_fd < 0:
            self._lock_fd = self._open_folder(self.packs)
        self._flock(self._lock_fd, fcntl.LOCK_SH, "the repository's index is being rebuilt")

    def own_index(self, needless: Callable[[], bool] = lambda: False) -> bool:
        """Excludes every other use of the index until `use_index` or `release`.

        Args:
            needless: asked while waiting: whether somebody else has done meanwhile what it was wanted for.

        Returns:
            Whether the index is ours alone now; False if that has become needless.

        Raises:
            RepositoryBusy: somebody uses it.
        """
        if self._lock_fd < 0:
            self._lock_fd = self._open_folder(self.packs)
        why = "the repository is in use, so its index can not be rebuilt now"
        return self._flock(self._lock_fd, fcntl.LOCK_EX, why, needless)

    def release(self) -> None:
        """Ends the use of the index. May be called twice."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _open_folder(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoRepository(
                f"{self.path} lacks its folder packs/",
                hint="without it there is no data; bring it back from a copy",
            ) from None
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error

    @staticmethod
    def _flock(fd: int, mode: int, why: str, needless: Callable[[], bool] = lambda: False) -> bool:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, mode | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if needless():
                    return False
                if time.monotonic() > deadline:
                    raise RepositoryBusy(why, hint="wait for the other command and try again") from None
                time.sleep(0.05)
            except OSError as error:
                raise storage_error(error, "locking the repository") from error

    # --- the index

    def is_writable(self) -> bool:
        """Whether this process may write to the repository."""
        return os.access(self.packs, os.W_OK) and not os.statvfs(self.packs).f_flag & os.ST_RDONLY

    def index_folder(self, repository: RepositoryId) -> tuple[str, bool]:
        """Where the index is, and whether that is outside of the repository.

        On network file systems LMDB's shared memory does not work, so the index is kept on a local
        disk: below `HOLDFAST_INDEX_DIR`, else below the user's cache folder.
        """
        override = os.environ.get("HOLDFAST_INDEX_DIR", "")
        if not override and _mount_type(self.path) in _NETWORK_FILE_SYSTEMS:
            cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
            override = os.path.join(cache, "holdfast", "index")
        if not override:
            return os.path.join(self.path, _INDEX_FOLDER), False
        if not os.path.isabs(override):
            raise UsageError("HOLDFAST_INDEX_DIR is no absolute path")
        return os.path.join(override, repository.hex()), True

    def index_exists(self, folder: str) -> bool:
        """Whether there is an index in that folder."""
        return os.path.exists(os.path.join(folder, DATA_FILE))

    @contextlib.contextmanager
    def replacing_index(self, folder: str) -> Iterator[str]:
        """A new folder that takes the index's place, atomically, if the block ends well.

        Must be called while `own_index` holds. What earlier calls left behind when they were killed is removed.
        """
        if not self.is_writable() and folder == os.path.join(self.path, _INDEX_FOLDER):
            raise StorageDenied(
                "the index must be rebuilt, but the repository is read-only",
                hint="set HOLDFAST_INDEX_DIR to a folder where the index may be put",
            )
        fresh = f"{folder}.new-{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            for name in os.listdir(os.path.dirname(folder)):
                if name.startswith((f"{os.path.basename(folder)}.new-", f"{os.path.basename(folder)}.old-")):
                    _remove_tree(os.path.join(os.path.dirname(folder), name))
            yield fresh
            old = f"{folder}.old-{os.getpid()}"
            if os.path.lexists(folder):
                os.rename(folder, old)
            os.rename(fresh, folder)
            sync_folder(os.path.dirname(folder))
            _remove_tree(old)
        except OSError as error:
            raise storage_error(error, f"replacing the index {folder}") from error
        finally:
            with contextlib.suppress(OSError):
                _remove_tree(fresh)


def _remove_tree(path: str) -> None:
    """Removes a folder of files, if it is there, or whatever has taken its place."""
    with contextlib.suppress(FileNotFoundError):
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
