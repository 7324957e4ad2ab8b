"""Which file of which guest a path means: shared by `browse` and `extract`.

Two forms of paths (docs/FILES.md):

    /etc/hostname              in whichever file system of the restore point has it; more than one is an error
    web1.vmdk/p1/etc/hostname  on that disk and volume; the disk's name may be left out where there is one disk

Links within the path are followed inside of the guest's file system, as the guest itself would; a link can not lead
out of it. Looking for a path costs reading the folders on its way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import GuestError, GuestFileNotFound
from holdfast.fuse.guest.port import Node
from holdfast.fuse.guest.volumes import Volume, find_volumes
from holdfast.repo.points import Point, find_disk
from holdfast.repo.repository import Repository

__all__ = ["Place", "Places", "open_places"]

_MAX_LINKS: Final = 40


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder that was found.

    Args:
        path: from the root of its file system on, links resolved: "/etc/hostname".
    """

    volume: Volume
    path: str
    node: Node


class Places:
    """The volumes of one restore point that a path may lead to."""

    def __init__(self, volumes: Sequence[Volume], *, several_disks: bool) -> None:
        self.volumes = volumes
        self._several_disks = several_disks
        self._roots: dict[tuple[str, str], Node] = {}

    def address(self, volume: Volume, path: str = "") -> str:
        """How the user can name that, unambiguously."""
        before = f"{volume.disk}/" if self._several_disks else ""
        return f"{before}{volume.name}{path}"

    def find(self, path: str) -> Place | None:
        """What the path means; None if that is the list of volumes.

        Raises:
            GuestFileNotFound: nothing, or more than one thing.
            GuestError: a file system on the way is damaged.
        """
        if not path.startswith("/"):
            volumes, inside = self._named(path)
        else:
            volumes, inside = self.volumes, path
        readable = [volume for volume in volumes if volume.readable]
        if not readable and len(volumes) == 1 and (path or len(self.volumes) == 1):
            readable = list(volumes)  # opening it says what is wrong
        if not inside.strip("/") and len(readable) != 1:
            return None
        return self._search(readable, inside)

    def _named(self, path: str) -> tuple[Sequence[Volume], str]:
        """The volumes that the beginning of the path names, all if it names none, and the rest of it."""
        volumes, rest = self.volumes, path
        for disk in sorted({volume.disk for volume in volumes}, key=len, reverse=True):
            if rest == disk or rest.startswith(f"{disk}/"):
                volumes = [volume for volume in volumes if volume.disk == disk]
                rest = rest[len(disk) + 1 :]
                break
        first, _, inside = rest.partition("/")
        named = [volume for volume in volumes if volume.name == first]
        if len(named) > 1:
            raise GuestFileNotFound(
                f"'{first}' is ambiguous: several disks have it",
                hint="name one: " + ", ".join(f"{volume.disk}/{volume.name}" for volume in named),
            )
        return (named, f"/{inside}") if named else (volumes, f"/{rest}")

    def _search(self, volumes: Sequence[Volume], path: str) -> Place:
        found: list[Place] = []
        missing: list[GuestFileNotFound] = []
        damaged: list[tuple[Volume, GuestError]] = []
        for volume in volumes:
            try:
                found.append(self._resolve(volume, path))
            except GuestFileNotFound as error:
                missing.append(error)
            except GuestError as error:
                damaged.append((volume, error))
        if len(found) == 1:
            return found[0]
        if found:
            raise GuestFileNotFound(
                f"'{path}' is ambiguous: {len(found)} file systems have it",
                hint="name one: " + ", ".join(self.address(place.volume, place.path) for place in found),
            )
        if damaged and not missing:
            raise damaged[0][1]
        if len(volumes) == 1:
            raise missing[0]
        looked = (
            ", ".join(self.address(volume) for volume in volumes) or "none: there is none that can be read"
        )
        raise GuestFileNotFound(
            f"no file system of the restore point has '{path}'",
            hint=f"looked at: {looked}; 'holdfast browse POINT' without a path lists all"
            + "".join(f"; {self.address(volume)} is damaged: {error.message}" for volume, error in damaged),
        )

    def _resolve(self, volume: Volume, path: str) -> Place:
        """Walks the path; each link on it is replaced by where it leads."""
        key = (volume.disk, volume.name)
        if key not in self._roots:
            self._roots[key] = volume.open()
        way: list[tuple[str, Node]] = [("", self._roots[key])]
        todo = _parts(path)
        links = 0
        while todo:
            name = todo.pop(0)
            if name == "..":
                way = way[:-1] or way
                continue
            node = way[-1][1]
            here = "/".join(part for part, _ in way)
            if node.kind != "folder":
                raise GuestFileNotFound(f"'{here}' of {self.address(volume)} is no folder")
            child = _child(volume, node, name)
            if child is None:
                raise GuestFileNotFound(f"{self.address(volume)} has no '{here}/{name}'")
            if child.kind == "link":
                links += 1
                if links > _MAX_LINKS:
                    raise GuestFileNotFound(
                        f"'{path}' of {self.address(volume)} leads through too many links"
                    )
                target = child.target
                if target.startswith("/"):
                    way = way[:1]
                todo = [*_parts(target), *todo]
                continue
            way.append((child.name, child))
        return Place(volume, "/".join(part for part, _ in way) or "/", way[-1][1])


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _child(volume: Volume, folder: Node, name: str) -> Node | None:
    """The child of that name; where the guest does not tell large letters from small ones, nor do we."""
    children = folder.children()
    for child in children:
        if child.name == name:
            return child
    if volume.kind in ("ntfs", "fat"):
        alike = [child for child in children if child.name.casefold() == name.casefold()]
        return alike[0] if alike else None
    return None


@contextlib.contextmanager
def open_places(
    repository: Repository, point: Point, disk: str | None, partition: str | None
) -> Iterator[Places]:
    """The volumes of a restore point, which is protected from garbage collection meanwhile.

    Args:
        disk: only this disk, by name or label.
        partition: only this volume: "1", "p1", or the name of a logical one.

    Raises:
        PointNotFound: there is no such disk.
        GuestFileNotFound: there is no such volume.
    """
    disks = point.manifest.disks if disk is None else (find_disk(point, disk),)
    names = [one.info.name for one in disks]
    with repository.holding("browse", [point]):
        volumes = find_volumes([(one.info.name, repository.open_content(one.tree)) for one in disks])
        if partition is not None:
            wanted = f"p{int(partition)}" if partition.isascii() and partition.isdigit() else partition
            chosen = [volume for volume in volumes if volume.name == wanted]
            if not chosen:
                there = ", ".join(f"{volume.name} of {volume.disk}" for volume in volumes)
                raise GuestFileNotFound(f"there is no partition '{partition}'", hint=f"there are: {there}")
            volumes = chosen
        yield Places(volumes, several_disks=len(names) > 1)
