"""What a run owes to a host, written down before it is done: the snapshot to remove, the VM to switch on again.

One small file per run and VM, in one folder. The run that wrote it holds a lock on it as long as it lives, whatever ends it;
so an entry that nobody holds was left by a run that is dead, and the next one settles it. Entries of other
installations are not here, and their snapshots are left alone.

Durability: an entry is on the disk when `note` returns, before anything is done on the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Final

from holdfast.errors import storage_error

__all__ = ["PREFIX", "Debt", "DebtEntry", "Journal", "new_snapshot_name"]

PREFIX: Final = "holdfast-"
_MAX_FILE_BYTES: Final = 1 << 16


def new_snapshot_name() -> str:
    """A name for a snapshot that no other one has."""
    return f"{PREFIX}{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class Debt:
    """What has to be put right on a host when a run ends.

    Args:
        host: name of the linked host.
        vm_id, vm_uuid, vm_name, vmx: the VM; the id may have changed since, the UUID has not.
        snapshot: name of the snapshot that has to go; empty if none was to be made.
        power_on: whether the VM was on, and has to be again.
        time: Unix seconds, by our clock.
    """

    host: str
    vm_id: int
    vm_uuid: str
    vm_name: str
    vmx: str
    snapshot: str = ""
    power_on: bool = False
    time: int = 0


class DebtEntry:
    """A debt that is written down, and locked as long as this object lives. Made by `Journal`."""

    def __init__(self, path: str, descriptor: int, debt: Debt) -> None:
        self._path = path
        self._descriptor = descriptor
        self.debt = debt

    def update(self, *, snapshot: str | None = None, power_on: bool | None = None) -> None:
        """Changes what is owed; on the disk on return.

        Raises:
            StorageError: it can not be written.
        """
        self.debt = replace(
            self.debt,
            snapshot=self.debt.snapshot if snapshot is None else snapshot,
            power_on=self.debt.power_on if power_on is None else power_on,
        )
        try:
            _write(self._descriptor, self.debt)
        except OSError as error:
            raise storage_error(error, f"writing {self._path}") from None

    def settle(self) -> None:
        """Nothing is owed any more."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self.release()

    def release(self) -> None:
        """Lets go of the entry; it stays for a later run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Journal:
    """The debts that are written down in `folder`, which need not exist yet."""

    def __init__(self, folder: str) -> None:
        self.folder: Final = folder

    def note(self, debt: Debt) -> DebtEntry:
        """Writes a debt down; on the disk on return.

        Raises:
            StorageError: it can not be written.
        """
        path = os.path.join(self.folder, f"{secrets.token_hex(8)}.json")
        descriptor = -1
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write(descriptor, debt)
            parent = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise storage_error(error, f"writing {path}") from None
        return DebtEntry(path, descriptor, debt)

    def running(self, host: str) -> tuple[Debt, ...]:
        """What runs that are alive owe to a host."""
        found = []
        for path in self._paths():
            entry = self._open(path)
            if isinstance(entry, DebtEntry):
                entry.release()
            elif entry is not None and entry.host == host:
                found.append(entry)
        return tuple(found)

    def abandoned(self, host: str) -> tuple[DebtEntry, ...]:
        """What dead runs owe to a host; locked, so that only one settles it."""
        found = []
        for path in self._paths():
            entry = self._open(path)
            if isinstance(entry, DebtEntry):
                if entry.debt.host == host:
                    found.append(entry)
                else:
                    entry.release()
        return tuple(sorted(found, key=lambda entry: entry.debt.time))

    def _paths(self) -> list[str]:
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, f"reading {self.folder}") from None
        return [os.path.join(self.folder, name) for name in names if name.endswith(".json")]

    def _open(self, path: str) -> DebtEntry | Debt | None:
        """A locked entry of a dead run, the bare debt of a living one, or None where there is nothing of use."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            free = False
        try:
            debt = Debt(**json.loads(os.pread(descriptor, _MAX_FILE_BYTES, 0)))
            if free and os.fstat(descriptor).st_nlink == 0:
                raise ValueError("settled meanwhile")
        except (OSError, ValueError, TypeError):
            if free and _is_empty(
                descriptor
            ):  # a run died before it had written anything: it did nothing, either
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(descriptor)
            return None
        if free:
            return DebtEntry(path, descriptor, debt)
        os.close(descriptor)
        return debt


def _is_empty(descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_size == 0
    except OSError:
        return False


def _write(descriptor: int, debt: Debt) -> None:
    data = json.dumps(asdict(debt)).encode().ljust(2048)
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))
    os.fsync(descriptor)
