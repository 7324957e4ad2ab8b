"""Change maps from files: `backup --changed-extents FILE`.

The file is JSON: {"base": "POINT", "disks": {"web1.vmdk": [[OFFSET, LENGTH], ...], ...}}. `base` is the restore
point that the extents are relative to, in any form that the command line takes; offsets and lengths are bytes.
A disk that the file does not name is read whole.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from holdfast.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.disk import ChangeMap, Machine
    from holdfast.repo.points import Point
    from holdfast.repo.repository import Repository

__all__ = ["read_change_file"]

_MOST_BYTES: Final = 256 << 20
_FORM: Final = 'write {"base": "VM@latest", "disks": {"web1.vmdk": [[OFFSET, LENGTH], ...]}}'


def read_change_file(
    path: str, repository: Repository, machine: Machine
) -> tuple[Point, Mapping[str, ChangeMap]]:
    """The restore point and the change maps that a file names.

    Raises:
        UsageError: it can not be read, is malformed, or does not fit the machine's disks.
        PointNotFound: its base does not exist.
    """
    from holdfast.disk import ChangeMap

    value = _load(path)
    base, disks = value.get("base"), value.get("disks")
    unknown = sorted(value.keys() - {"base", "disks"})
    if unknown or not isinstance(base, str) or not isinstance(disks, dict):
        raise UsageError(f"'{path}' is no change map", hint=_FORM)
    sizes = {disk.info.name: disk.source.size_bytes for disk in machine.disks}
    maps = {}
    for name, extents in disks.items():
        if name not in sizes:
            raise UsageError(
                f"'{path}' speaks of a disk '{name}' that {machine.name!r} does not have",
                hint=f"its disks: {', '.join(sizes)}",
            )
        maps[name] = ChangeMap.of(_extents(path, name, extents), sizes[name])
    return repository.resolve(base), maps


def _load(path: str) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"'{path}' can not be read ({error.strerror})") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"'{path}' is longer than a change map may be")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is no JSON text ({str(error)[:80]})", hint=_FORM) from None
    if not isinstance(value, dict):
        raise UsageError(f"'{path}' is no change map", hint=_FORM)
    return value


def _extents(path: str, name: str, extents: object) -> list[tuple[int, int]]:
    if isinstance(extents, list):
        pairs = [pair for pair in extents if isinstance(pair, list) and len(pair) == 2]
        numbers = all(type(number) is int for pair in pairs for number in pair)
        if numbers and len(pairs) == len(extents):
            return [(offset, length) for offset, length in pairs]
    raise UsageError(f"the extents of disk '{name}' in '{path}' are no list of [OFFSET, LENGTH]", hint=_FORM)
