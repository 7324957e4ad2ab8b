"""Holdfast: deduplicating backups of VMware ESXi virtual machines, as a library.

    from holdfast import BackupOptions, Repository, open_machine

    with Repository.open("/backup/repo") as repository:
        machine = open_machine("/vms/web1")
        summary = repository.backup(machine, BackupOptions(labels={"reason": "nightly"}))
        machine.close()
        with repository.open_disk("web1@latest", "web1.vmdk") as disk:
            first_sector = disk.read(512)

What is named here is the library's surface; everything else may change. Importing this package is cheap:
each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from holdfast.disk import BlockSink, BlockSource, Machine
    from holdfast.errors import EXIT_CODES, HoldfastError
    from holdfast.esxi.folder import open_machine
    from holdfast.repo.backup import BackupOptions, BackupSummary
    from holdfast.repo.check import CheckReport
    from holdfast.repo.points import Point
    from holdfast.repo.reader import DiskReader
    from holdfast.repo.repository import InitOptions, Repository

    __version__: str

__all__ = [
    "EXIT_CODES",
    "BackupOptions",
    "BackupSummary",
    "BlockSink",
    "BlockSource",
    "CheckReport",
    "DiskReader",
    "HoldfastError",
    "InitOptions",
    "Machine",
    "Point",
    "Repository",
    "__version__",
    "open_machine",
]

_PLACES: Final = {
    "BackupOptions": "holdfast.repo.backup",
    "BackupSummary": "holdfast.repo.backup",
    "BlockSink": "holdfast.disk",
    "BlockSource": "holdfast.disk",
    "CheckReport": "holdfast.repo.check",
    "DiskReader": "holdfast.repo.reader",
    "EXIT_CODES": "holdfast.errors",
    "HoldfastError": "holdfast.errors",
    "InitOptions": "holdfast.repo.repository",
    "Machine": "holdfast.disk",
    "Point": "holdfast.repo.points",
    "Repository": "holdfast.repo.repository",
    "open_machine": "holdfast.esxi.folder",
}


def __getattr__(name: str) -> object:
    """The public name, loaded now (PEP 562)."""
    if name == "__version__":
        return import_module("holdfast.version").VERSION
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    value: object = getattr(import_module(place), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
