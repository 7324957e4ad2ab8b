"""Files and datastores: `vmsvc/get.filelayoutex`, `vmsvc/get.datastores`, `esxcli storage filesystem list`.

Sizes in `get.filelayoutex` are stale: a file's length is only known from the file itself. What is taken from here is which files
there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable
from holdfast.esxi.says.esxcli import parse_csv
from holdfast.esxi.says.machines import DatastorePath, parse_datastore_path
from holdfast.esxi.says.vmomi import Items, Obj, parse_all, parse_object

__all__ = ["Datastore", "LayoutFile", "Volume", "parse_datastores", "parse_filelayoutex", "parse_volumes"]


@dataclass(frozen=True, slots=True)
class LayoutFile:
    """A file of a VM. `kind` is `config`, `nvram`, `diskDescriptor`, `diskExtent`, `snapshotList`, ..."""

    file: DatastorePath
    kind: str
    size_bytes: int | None
    accessible: bool


@dataclass(frozen=True, slots=True)
class Datastore:
    """A datastore that a VM uses. `folder` is `/vmfs/volumes/<uuid>`; the sizes may be unknown."""

    name: str
    folder: str
    kind: str
    capacity_bytes: int | None
    free_bytes: int | None
    accessible: bool


@dataclass(frozen=True, slots=True)
class Volume:
    """A file system of a host. `mount_point` is empty where it is not mounted, `name` where it has none."""

    mount_point: str
    name: str
    uuid: str
    kind: str
    mounted: bool
    size_bytes: int
    free_bytes: int


def parse_filelayoutex(text: str) -> tuple[LayoutFile, ...]:
    """The files that `vim-cmd vmsvc/get.filelayoutex` lists.

    Raises:
        SourceFormat: it can not be understood.
    """
    what = "vmsvc/get.filelayoutex"
    layout = parse_object(text, what)
    if layout.type != "vim.vm.FileLayoutEx":
        raise SourceFormat(f"{what} printed an object of type {printable(layout.type)}")
    return tuple(
        LayoutFile(
            file=parse_datastore_path(entry.text("name"), what),
            kind=entry.text("type"),
            size_bytes=entry.number("size"),
            accessible=entry.flag("accessible") is not False,
        )
        for entry in layout.children("file")
    )


def parse_datastores(text: str) -> tuple[Datastore, ...]:
    """The datastores that `vim-cmd vmsvc/get.datastores` lists, where it prints objects.

    Raises:
        SourceFormat: it prints the table of newer releases, which is not relied upon, or nothing to be understood.
    """
    what = "vmsvc/get.datastores"
    found: list[Obj] = []
    for value in parse_all(text, what):
        found += value.objects() if isinstance(value, Items) else [value] if isinstance(value, Obj) else []
    stores = [one for one in found if one.type == "vim.Datastore.Summary"]
    if not stores:
        raise SourceFormat(
            f"{what} printed no datastores, but: {printable(text.strip()[:200])}",
            hint="'esxcli storage filesystem list' tells the same in a form that is fixed",
        )
    return tuple(
        Datastore(
            name=store.text("name"),
            folder=store.text("url").rstrip("/").removeprefix("ds://"),
            kind=store.text("type"),
            capacity_bytes=store.number("capacity"),
            free_bytes=store.number("freeSpace"),
            accessible=store.flag("accessible") is not False,
        )
        for store in stores
    )


def parse_volumes(text: str) -> tuple[Volume, ...]:
    """The file systems that `esxcli --formatter=csv storage filesystem list` lists.

    Raises:
        SourceFormat: it can not be understood.
    """
    volumes = []
    for row in parse_csv(text, ("MountPoint", "VolumeName", "UUID", "Type", "Mounted", "Size", "Free")):
        size, free = row["Size"], row["Free"]
        if not (size.isdecimal() and free.isdecimal() and len(size) < 20 and len(free) < 20):
            raise SourceFormat(f"esxcli storage filesystem list: the size '{printable(size)}' is no number")
        volumes.append(
            Volume(
                mount_point=row["MountPoint"],
                name=row["VolumeName"],
                uuid=row["UUID"],
                kind=row["Type"],
                mounted=row["Mounted"].lower() == "true",
                size_bytes=int(size),
                free_bytes=int(free),
            )
        )
    return tuple(volumes)
