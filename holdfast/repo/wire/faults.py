"""Errors on the wire: a number for each class, and the words.

Whoever receives an error gets the same class back, so that the engine acts on a far repository's troubles as on a
near one's. The words of the other side are shown to the user, so nothing in them that a terminal would obey gets through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from holdfast import errors
from holdfast.errors import HoldfastError, InternalError
from holdfast.repo.wire.messages import Failure

__all__ = ["classes", "failure_of", "raised_by"]

_CLASSES: Final[dict[int, type[HoldfastError]]] = {
    1: errors.InternalError,
    2: errors.UsageError,
    10: errors.RepositoryError,
    11: errors.NoRepository,
    12: errors.RepositoryBusy,
    13: errors.WrongPassword,
    14: errors.UnsupportedFormat,
    15: errors.PointNotFound,
    16: errors.SessionGone,
    17: errors.RepositoryExists,
    20: errors.IntegrityError,
    21: errors.DamagedData,
    22: errors.DamagedIndex,
    23: errors.DamagedConfig,
    24: errors.DamagedPoint,
    30: errors.StorageError,
    31: errors.DiskFull,
    32: errors.StorageDenied,
    58: errors.ProtocolError,
}
_NUMBERS: Final = {cls: number for number, cls in _CLASSES.items()}
_MOST_CHARACTERS: Final = 2000


def classes() -> Mapping[int, type[HoldfastError]]:
    """What each code stands for."""
    return _CLASSES


def failure_of(error: BaseException) -> Failure:
    """What is said of an error; one that is none of ours is a defect, and only its name is told."""
    if not isinstance(error, HoldfastError):
        return Failure(1, f"{type(error).__name__} on the far side", "")
    for cls in type(error).__mro__:
        if cls in _NUMBERS:
            return Failure(_NUMBERS[cls], error.message, error.hint)
    return Failure(10, error.message, error.hint)


def raised_by(failure: Failure, place: str) -> HoldfastError:
    """The error that a failure stands for.

    Args:
        place: where it came from, as the user knows it.
    """
    from holdfast.ssh.link import printable  # the far side has no use for all that comes with it

    cls = _CLASSES.get(failure.code, errors.RepositoryError)
    message = f"{place}: {printable(failure.message, _MOST_CHARACTERS)}"
    if cls is InternalError:
        return InternalError(message.replace("internal error: ", "", 1))
    return cls(message, hint=printable(failure.hint, _MOST_CHARACTERS))
