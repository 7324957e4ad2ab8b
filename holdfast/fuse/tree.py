"""The folders of a mount, made from a list of restore points. Pure: nothing is read here but by the functions passed in.

    by-vm/<vm>/<time>/...           the folder of a restore point
    by-vm/<vm>/latest               -> the newest one
    by-id/<id>                      -> ../by-vm/<vm>/<time>
    by-label/<key>/<value>/<vm>@<time>   -> ../../../by-vm/<vm>/<time>

Invariants: a path means the same bytes for as long as the mount lives, so that whoever caches by path (the kernel
does) never sees wrong ones; inode numbers follow from what is named and are the same in every mount; a tree never
changes: when points come or go, there is a new one.
"""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from holdfast.fuse.files import Describe, Entry, File, Layout, Link, Source, inode_of
from holdfast.fuse.names import distinct, safe_name, time_name
from holdfast.ids import PointId
from holdfast.repo.points import Point

__all__ = ["Folder", "ListPartitions", "NameBook", "Node", "PointFolders", "build_tree", "find_node"]

ROOT_INODE: Final = 1
PARTITIONS_SUFFIX: Final = ".partitions"


class Folder:
    """A folder of the tree. What is in it is made when it is looked at."""

    __slots__ = ("_children", "_lock", "_make", "inode", "mtime_ns")

    def __init__(self, inode: int, mtime_ns: int, make: Callable[[], Mapping[str, Node]]) -> None:
        self.inode = inode
        self.mtime_ns = mtime_ns
        self._make = make
        self._children: Mapping[str, Node] | None = None
        self._lock = threading.Lock()

    def children(self) -> Mapping[str, Node]:
        """What is in it, by name."""
        with self._lock:
            if self._children is None:
                self._children = self._make()
            return self._children


Node: TypeAlias = Folder | File | Link
ListPartitions: TypeAlias = Callable[[Entry], Iterable[tuple[str, int, int]]]
"""(file name, first byte, length) of each partition of a disk; it reads what it needs."""


class NameBook:
    """The names of points' folders: one that was ever used stays with its point as long as the mount lives."""

    def __init__(self) -> None:
        self._owners: dict[tuple[str, str], PointId] = {}

    def name(self, vm: str, point: Point) -> str:
        """The name of a point in the folder of its VM."""
        plain = time_name(point.manifest.time)
        marked = f"{plain}~{point.id.hex()[:8]}"
        for name in (plain, marked, f"{plain}~{point.id.hex()}"):
            if self._owners.setdefault((vm, name), point.id) == point.id:
                return name
        raise AssertionError("two restore points have the same id")


class PointFolders:
    """The folders of points. They are made once, whatever becomes of the tree around them.

    Args:
        partitions: None if disks shall have no partitions beside them.
    """

    def __init__(self, describe: Describe, partitions: ListPartitions | None) -> None:
        self._describe = describe
        self._partitions = partitions
        self._folders: dict[PointId, Folder] = {}

    def keep(self, points: Iterable[Point]) -> None:
        """Lets go of all others."""
        wanted = {point.id for point in points}
        self._folders = {key: folder for key, folder in self._folders.items() if key in wanted}

    def of(self, point: Point) -> Folder:
        """The folder of a point."""
        found = self._folders.get(point.id)
        if found is None:
            found = self._folders[point.id] = Folder(
                inode_of("point", point.id), point.manifest.time * 10**9, lambda: self._contents(point)
            )
        return found

    def _contents(self, point: Point) -> Mapping[str, Node]:
        layout = self._describe(point)
        paths: dict[str, Entry] = {entry.path: entry for entry in layout.entries}
        return self._level(point, layout, paths, "")

    def _level(
        self, point: Point, layout: Layout, paths: Mapping[str, Entry], above: str
    ) -> Mapping[str, Node]:
        """What is in the folder `above` of a point; that is empty for the point's own."""
        found: dict[str, Node] = {}
        for path in (*paths, *layout.folders):
            if above and not path.startswith(above + "/"):
                continue
            name, deeper, _ = path[len(above) + 1 if above else 0 :].partition("/")
            full = posixpath.join(above, name)
            entry = None if deeper else paths.get(full)
            if entry is not None:
                found[name] = self._file(point, entry)
                if entry.disk and self._partitions is not None:
                    folder = posixpath.basename(entry.disk) + PARTITIONS_SUFFIX
                    found.setdefault(folder, self._disk_folder(point, entry))
            elif name not in found:
                found[name] = Folder(
                    inode_of("folder", point.id, full),
                    point.manifest.time * 10**9,
                    lambda full=full: self._level(point, layout, paths, full),  # type: ignore[misc]
                )
        return found

    def _file(self, point: Point, entry: Entry) -> File:
        source = None
        if entry.content is not None:
            source = Source(point, entry.content, 0, min(entry.size_bytes, entry.content.size_bytes))
        mtime_ns = point.manifest.time * 10**9 if entry.mtime_ns is None else entry.mtime_ns
        return File(inode_of("file", point.id, entry.path), entry.size_bytes, mtime_ns, source, entry.text)

    def _disk_folder(self, point: Point, entry: Entry) -> Folder:
        mtime_ns = point.manifest.time * 10**9

        def make() -> Mapping[str, Node]:
            assert self._partitions is not None
            assert entry.content is not None
            tree = entry.content
            return {
                name: File(
                    inode_of("partition", point.id, entry.disk, name),
                    length,
                    mtime_ns,
                    Source(point, tree, start, min(length, max(0, tree.size_bytes - start))),
                )
                for name, start, length in self._partitions(entry)
            }

        return Folder(inode_of("partitions", point.id, entry.disk), mtime_ns, make)


def build_tree(points: Sequence[Point], book: NameBook, folders: PointFolders) -> Folder:
    """The root of the tree that shows these points.

    Args:
        points: oldest first.
    """
    of_vm: dict[str, list[Point]] = {}
    for point in points:
        of_vm.setdefault(point.manifest.vm_uuid, []).append(point)
    vm_names = distinct({uuid: safe_name(found[-1].manifest.vm_name) for uuid, found in of_vm.items()})
    by_vm: dict[str, Node] = {}
    places: dict[PointId, str] = {}
    for uuid, found in of_vm.items():
        vm = vm_names[uuid]
        inside: dict[str, Node] = {}
        for point in found:
            name = book.name(vm, point)
            inside[name] = folders.of(point)
            places[point.id] = f"{vm}/{name}"
        newest = found[-1]
        mtime_ns = newest.manifest.time * 10**9
        inside["latest"] = Link(inode_of("latest", uuid), posixpath.basename(places[newest.id]), mtime_ns)
        by_vm[vm] = _fixed(("vm", uuid), mtime_ns, inside)
    by_id: dict[str, Node] = {
        point.id.hex(): Link(
            inode_of("id", point.id), f"../by-vm/{places[point.id]}", point.manifest.time * 10**9
        )
        for point in points
    }
    newest_ns = max((point.manifest.time for point in points), default=0) * 10**9
    top: dict[str, Node] = {
        "by-vm": _fixed(("by-vm",), newest_ns, by_vm),
        "by-id": _fixed(("by-id",), newest_ns, by_id),
        "by-label": _fixed(("by-label",), newest_ns, _by_label(points, places, newest_ns)),
    }
    return Folder(ROOT_INODE, newest_ns, lambda: top)


def _by_label(points: Sequence[Point], places: Mapping[PointId, str], mtime_ns: int) -> Mapping[str, Node]:
    keys: dict[str, dict[str, dict[str, Node]]] = {}
    for point in points:
        place = places[point.id]
        for key, value in point.manifest.labels:
            links = keys.setdefault(safe_name(key), {}).setdefault(safe_name(value), {})
            links[place.replace("/", "@")] = Link(
                inode_of("label", key, value, point.id),
                f"../../../by-vm/{place}",
                point.manifest.time * 10**9,
            )
    return {
        key: _fixed(
            ("key", key),
            mtime_ns,
            {value: _fixed(("value", key, value), mtime_ns, links) for value, links in values.items()},
        )
        for key, values in keys.items()
    }


def _fixed(identity: tuple[str, ...], mtime_ns: int, children: Mapping[str, Node]) -> Folder:
    return Folder(inode_of(*identity), mtime_ns, lambda: children)


def find_node(root: Folder, path: str) -> Node | None:
    """What has this path (absolute, as the kernel gives it), or None. Links are not followed."""
    node: Node | None = root
    for name in path.split("/"):
        if not name:
            continue
        if not isinstance(node, Folder):
            return None
        node = node.children().get(name)
    return node
