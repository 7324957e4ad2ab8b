"""Every error that Holdfast reports, and the one table of exit codes.

Two levels: `HoldfastError`, then one class per cause, grouped by what the user has to look at
(usage, repository, integrity, storage, source, link). Each class carries its exit code; each instance
carries a sentence for the user and, where there is something to do, a hint.

Corruption is never an I/O error and an I/O error is never corruption. Data from outside never
trips an assertion: it raises one of these. Third-party exceptions are translated into these once,
at the edge that calls the library.
"""

from __future__ import annotations

import errno
from typing import Final

__all__ = [
    "EXIT_CODES",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_WARNINGS",
    "DamagedConfig",
    "DamagedData",
    "DamagedIndex",
    "DamagedPoint",
    "DestinationExists",
    "DiskFull",
    "EmptySource",
    "FarCommandMissing",
    "FarSideEnded",
    "GuestError",
    "GuestFileNotFound",
    "HoldfastError",
    "HostKeyChanged",
    "HostKeyRefused",
    "HostKeyUnknown",
    "HostUnreachable",
    "IntegrityError",
    "InternalError",
    "KeyLimited",
    "LinkError",
    "LinkLost",
    "LinkTimeout",
    "LoginRefused",
    "MissingLibrary",
    "MountFailed",
    "NoRepository",
    "PointNotFound",
    "ProtocolError",
    "RepositoryBusy",
    "RepositoryError",
    "RepositoryExists",
    "SessionGone",
    "SourceChanged",
    "SourceError",
    "SourceFormat",
    "SourceNotFound",
    "SourceUnreadable",
    "SourceUnsupported",
    "StorageDenied",
    "StorageError",
    "UnsupportedFormat",
    "UsageError",
    "WrongPassword",
    "storage_error",
]

EXIT_OK: Final = 0
EXIT_WARNINGS: Final = 100
EXIT_INTERRUPTED: Final = 130


class HoldfastError(Exception):
    """The base of all reported errors.

    Args:
        message: one sentence (or clause) for the user, naming the thing that failed.
        hint: what the user can do next; empty where nothing sensible can be said.
    """

    exit_code: int = 1
    code_meaning: str = "failed for a reason without a code of its own"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InternalError(HoldfastError):
    """One of our own invariants is broken: a defect of Holdfast, not of the user's data."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"internal error: {message}",
            hint="this is a defect of Holdfast; please report it with the command that led to it",
        )


class UsageError(HoldfastError):
    """The command line, an option or a configuration value can not be understood."""

    exit_code = 2
    code_meaning = "wrong usage"


class RepositoryError(HoldfastError):
    """The repository as a whole can not be used this way."""

    exit_code = 10
    code_meaning = "no repository at that place"


class NoRepository(RepositoryError):
    """There is no repository at the given path."""


class RepositoryBusy(RepositoryError):
    """Another process holds the repository in a way that excludes this command."""

    exit_code = 11
    code_meaning = "the repository is busy"


class WrongPassword(RepositoryError):
    """No key slot of the repository opens with the given password."""

    exit_code = 12
    code_meaning = "wrong password, or none given"


class UnsupportedFormat(RepositoryError):
    """The repository was written by a newer Holdfast, or needs a feature that this one lacks."""

    exit_code = 13
    code_meaning = "repository format not supported by this version"


class PointNotFound(RepositoryError):
    """No restore point, or more than one, answers to the given name."""

    exit_code = 14
    code_meaning = "restore point or disk not found, or its name is ambiguous"


class SessionGone(RepositoryError):
    """The session of a running backup has expired; what it relied upon may have been collected."""

    exit_code = 16
    code_meaning = "the backup's session expired before it could finish"


class RepositoryExists(RepositoryError):
    """`init` met a repository, or a folder that is not empty."""

    exit_code = 15
    code_meaning = "the place for a new repository is already in use"


class IntegrityError(HoldfastError):
    """Stored bytes are not what they were when they were written."""

    exit_code = 20
    code_meaning = "damaged data in a pack"


class DamagedData(IntegrityError):
    """A record of a pack is missing, truncated or fails its hash."""


class DamagedIndex(IntegrityError):
    """The index contradicts itself or the packs. It can be rebuilt from the packs."""

    exit_code = 21
    code_meaning = "damaged index"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(
            message,
            hint=hint or "the packs hold everything: run 'holdfast check --rebuild-index'",
        )


class DamagedConfig(IntegrityError):
    """Both copies of the repository's configuration are damaged or missing."""

    exit_code = 22
    code_meaning = "damaged configuration"


class DamagedPoint(IntegrityError):
    """`check` found restore points that can not be restored completely."""

    exit_code = 23
    code_meaning = "check found damage (of restore points, packs or the index)"


class StorageError(HoldfastError):
    """Reading from or writing to the repository's or the destination's storage failed."""

    exit_code = 30
    code_meaning = "input/output error of the storage"


class DiskFull(StorageError):
    """No space (or quota) is left where something had to be written."""

    exit_code = 31
    code_meaning = "the disk is full"


class StorageDenied(StorageError):
    """The place is read-only or permission is missing."""

    exit_code = 32
    code_meaning = "the place is read-only or permission is denied"


class DestinationExists(StorageError):
    """A restore would overwrite something and was not told to."""

    exit_code = 33
    code_meaning = "the destination exists already"


class MountFailed(StorageError):
    """A folder can not be mounted, or not be unmounted."""

    exit_code = 34
    code_meaning = "mounting or unmounting is not possible"


class SourceError(HoldfastError):
    """What was to be backed up can not be read as it should."""

    exit_code = 40
    code_meaning = "the source can not be used"


class SourceNotFound(SourceError):
    """The source does not exist."""

    exit_code = 41
    code_meaning = "the source does not exist"


class SourceChanged(SourceError):
    """The source became shorter, or otherwise changed its shape, while it was read."""

    exit_code = 42
    code_meaning = "the source changed while it was read"


class SourceUnreadable(SourceError):
    """Reading the source failed (permission, I/O error)."""

    exit_code = 43
    code_meaning = "the source can not be read"


class SourceFormat(SourceError):
    """A descriptor, a VMX file or a sparse extent is malformed or inconsistent."""

    exit_code = 44
    code_meaning = "the source is malformed"


class SourceUnsupported(SourceError):
    """The source is of a kind that Holdfast does not back up."""

    exit_code = 45
    code_meaning = "the source is of an unsupported kind"


class EmptySource(SourceError):
    """The source holds nothing to back up."""

    exit_code = 46
    code_meaning = "the source is empty"


class LinkError(HoldfastError):
    """Another host can not be reached, does not let us in, or the connection to it failed."""

    exit_code = 50
    code_meaning = "the connection to another host failed"


class HostUnreachable(LinkError):
    """No connection came about: unknown name, refused, no route, or no answer in time."""

    exit_code = 51
    code_meaning = "the other host can not be reached"


class HostKeyRefused(LinkError):
    """The host did not prove that it is the one we know. Nothing was sent to it, no password either."""

    exit_code = 52
    code_meaning = "the other host's key is unknown or has changed"


class HostKeyUnknown(HostKeyRefused):
    """No key is recorded for this host."""


class HostKeyChanged(HostKeyRefused):
    """Another key is recorded for this host than the one that it showed."""


class LoginRefused(LinkError):
    """The host takes neither our key nor our password."""

    exit_code = 53
    code_meaning = "the other host refused the login"


class LinkLost(LinkError):
    """A connection that stood is gone, or its far side has stopped answering."""

    exit_code = 54
    code_meaning = "the connection to another host broke off"


class FarCommandMissing(LinkError):
    """The host does not know the command that was to run there."""

    exit_code = 55
    code_meaning = "a command is missing on the other host"


class LinkTimeout(LinkError):
    """A command on the other host took longer than it was given."""

    exit_code = 56
    code_meaning = "a command on the other host took too long"


class FarSideEnded(LinkError):
    """The command on the other host ended before it had taken all that was sent to it."""

    exit_code = 57
    code_meaning = "a command on the other host ended too early"


class KeyLimited(LinkError):
    """Our key is limited over there, and that does not allow what was wanted, or not to this version of Holdfast."""

    exit_code = 59
    code_meaning = "the key is limited on the other host, and does not allow that"


class GuestError(HoldfastError):
    """A guest's file system, as it stands in the backup, can not be read: damaged, or of a kind that is not read.

    The restore point itself is as it was backed up.
    """

    exit_code = 60
    code_meaning = "the guest's file system is damaged, or of an unsupported kind"


class GuestFileNotFound(GuestError):
    """No file or file system of the guest, or more than one, answers to the given path."""

    exit_code = 61
    code_meaning = "file not found in the guest, or its path is ambiguous"


class MissingLibrary(HoldfastError):
    """What was asked for needs a library that is not installed."""

    exit_code = 3
    code_meaning = "an optional part of Holdfast is not installed"


class ProtocolError(LinkError):
    """The other side said something that Holdfast's protocol does not allow, or nothing that belongs to it."""

    exit_code = 58
    code_meaning = "another host does not keep to Holdfast's protocol"


def _table() -> dict[int, str]:
    table = {EXIT_OK: "done"}
    pending: list[type[HoldfastError]] = [HoldfastError]
    while pending:
        cls = pending.pop()
        table.setdefault(cls.exit_code, cls.code_meaning)
        pending.extend(cls.__subclasses__())
    table[EXIT_WARNINGS] = "done, with warnings"
    table[EXIT_INTERRUPTED] = "interrupted (Ctrl-C or SIGTERM)"
    return dict(sorted(table.items()))


EXIT_CODES: Final = _table()
"""Exit code -> meaning, for the help text and the documents. Built from the classes above."""


def storage_error(error: OSError, doing: str) -> StorageError:
    """The storage error that says what an `OSError` means to the user.

    Args:
        error: what the operating system answered.
        doing: the attempted action, as a phrase that can follow "while": "writing /b/x.pack".
    """
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no space left while {doing} ({reason})",
            hint="free some space there and run the command again; nothing listed was harmed",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageDenied(
            f"not permitted while {doing} ({reason})",
            hint="check the permissions, and whether the file system is mounted read-only",
        )
    return StorageError(f"input/output failed while {doing} ({reason})")
