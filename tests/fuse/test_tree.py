"""The tree: what is where, and that a path and an inode number keep their meaning."""

from __future__ import annotations

import posixpath
import stat

import pytest
from fuserig import DAY, NOON, MemoryLibrary, make_point

from holdfast.fuse.names import time_name
from holdfast.fuse.view import View
from holdfast.ids import PointId

DISK = b"one disk" * 1000


def names(view: View, path: str) -> set[str]:
    return {name for name, _, _ in view.entries(path)}


def resolve(view: View, path: str) -> str:
    """The path behind a link."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), view.target(path)))


def read(view: View, path: str) -> bytes:
    handle = view.open(path)
    try:
        buffer = bytearray(view.attributes(path).size_bytes)
        assert view.read_into(handle, 0, memoryview(buffer)) == len(buffer)
        return bytes(buffer)
    finally:
        view.close(handle)


def test_an_empty_repository_is_three_empty_folders(view: View) -> None:
    assert names(view, "/") == {"by-vm", "by-id", "by-label"}
    for name in names(view, "/"):
        assert names(view, "/" + name) == set()


def test_a_point_is_found_by_vm_by_id_and_by_label(view: View, library: MemoryLibrary) -> None:
    old = make_point(1, time=NOON, disks={"d.raw": DISK}, labels={"reason": "nightly", "a/b": ""})
    new = make_point(2, time=NOON + DAY, disks={"d.raw": DISK})
    library.show(old, new, d=DISK)
    folder = f"/by-vm/web1/{time_name(NOON)}"
    assert names(view, "/by-vm/web1") == {time_name(NOON), time_name(NOON + DAY), "latest"}
    assert names(view, folder) == {"d.raw", "d.raw.partitions", "logs", "empty", "restore-point.json"}
    assert names(view, folder + "/logs") == {"vm.log"}
    assert names(view, folder + "/empty") == names(view, folder + "/d.raw.partitions") == set()
    assert resolve(view, "/by-vm/web1/latest") == f"/by-vm/web1/{time_name(NOON + DAY)}"
    assert resolve(view, f"/by-id/{old.id.hex()}") == folder
    assert names(view, "/by-label") == {"reason", "a%2Fb"}
    assert names(view, "/by-label/a%2Fb") == {"%"}
    link = f"/by-label/reason/nightly/web1@{time_name(NOON)}"
    assert resolve(view, link) == folder
    assert read(view, folder + "/d.raw") == DISK
    assert read(view, folder + "/logs/vm.log") == b"hello"
    assert read(view, folder + "/restore-point.json") == b"{}\n"


def test_what_is_not_there_is_not_there(view: View, library: MemoryLibrary) -> None:
    library.show(make_point(1, disks={"d.raw": DISK}), d=DISK)
    folder = f"/by-vm/web1/{time_name(NOON)}"
    for path in (
        "/by",
        "/by-vm/web2",
        folder + "/x",
        folder + "/d.raw/x",
        folder + "/logs/vm.log/x",
        "/by-vm/latest",
    ):
        with pytest.raises(FileNotFoundError):
            view.attributes(path)
    with pytest.raises(NotADirectoryError):
        view.entries(folder + "/d.raw")
    with pytest.raises(IsADirectoryError):
        view.open(folder)
    with pytest.raises(OSError, match="Invalid"):
        view.target(folder)


def test_attributes_are_those_of_the_point(view: View, library: MemoryLibrary) -> None:
    data = bytes(64 << 10) + b"x" * 4096
    library.show(make_point(1, disks={"d.raw": data}), d=data)
    disk = view.attributes("/by-vm/web1/latest".replace("latest", time_name(NOON)) + "/d.raw")
    assert (disk.size_bytes, disk.blocks, disk.mtime_ns) == (len(data), 8, NOON * 10**9)
    assert disk.mode == stat.S_IFREG | 0o400
    log = view.attributes(f"/by-vm/web1/{time_name(NOON)}/logs/vm.log")
    assert log.mtime_ns == 1_700_000_000_123_456_789
    assert stat.S_ISDIR(view.attributes("/by-vm/web1").mode)
    assert stat.S_ISLNK(view.attributes("/by-vm/web1/latest").mode)


def test_inode_numbers_are_the_same_in_every_mount_and_nowhere_twice(
    view: View, library: MemoryLibrary, log: list[str], ahead
) -> None:
    from fuserig import describe

    library.show(
        *(make_point(n, time=NOON + n, disks={"d.raw": DISK}, labels={"n": str(n)}) for n in range(5)), d=DISK
    )

    def walk(seen: View, path: str = "") -> dict[str, int]:
        found = {path: seen.attributes(path or "/").inode}
        for name, inode, kind in seen.entries(path or "/"):
            found[f"{path}/{name}"] = inode
            assert seen.attributes(f"{path}/{name}").inode == inode
            if kind == stat.S_IFDIR:
                found |= walk(seen, f"{path}/{name}")
        return found

    first = walk(view)
    assert len(set(first.values())) == len(first)
    assert walk(View(library, describe, ahead, log.append)) == first
    library.show(*library.listed, make_point(9, time=NOON + 99), d=DISK)
    assert first.items() <= walk(view).items()


def test_vms_of_one_name_are_told_apart(view: View, library: MemoryLibrary) -> None:
    library.show(
        make_point(1, vm="web", uuid="1" * 32),
        make_point(2, vm="web", uuid="2" * 32),
        make_point(3, vm="web~11111111", uuid="3" * 32),
    )
    assert names(view, "/by-vm") == {"web~11111111", "web~22222222", "web%7E11111111"}


def test_a_renamed_vm_is_one_folder_with_its_new_name(view: View, library: MemoryLibrary) -> None:
    library.show(
        make_point(1, vm="old", uuid="1" * 32), make_point(2, vm="new", uuid="1" * 32, time=NOON + 1)
    )
    assert names(view, "/by-vm") == {"new"}
    assert len(names(view, "/by-vm/new")) == 3


def test_points_of_one_second_have_names_of_their_own(view: View, library: MemoryLibrary) -> None:
    first, second = make_point(1), make_point(2)
    library.show(first, second)
    plain = time_name(NOON)
    assert names(view, "/by-vm/web1") == {plain, f"{plain}~{second.id.hex()[:8]}", "latest"}
    assert resolve(view, f"/by-id/{first.id.hex()}") == f"/by-vm/web1/{plain}"


def test_a_path_never_comes_to_mean_other_bytes(view: View, library: MemoryLibrary) -> None:
    """The kernel keeps what it has read of a path."""
    first, second = make_point(1, disks={"d.raw": DISK}), make_point(2, disks={"d.raw": DISK[::-1]})
    library.show(first, a=DISK, b=DISK[::-1])
    path = f"/by-vm/web1/{time_name(NOON)}/d.raw"
    assert read(view, path) == DISK
    library.show(second, a=DISK, b=DISK[::-1])
    with pytest.raises(FileNotFoundError):
        view.attributes(path)
    assert read(view, f"/by-vm/web1/{time_name(NOON)}~{second.id.hex()[:8]}/d.raw") == DISK[::-1]
    library.show(first, a=DISK, b=DISK[::-1])
    assert read(view, path) == DISK


def test_points_come_and_go(view: View, library: MemoryLibrary) -> None:
    one, two = make_point(1), make_point(2, time=NOON + DAY)
    library.show(one)
    assert names(view, "/by-id") == {one.id.hex()}
    library.show(one, two)
    assert names(view, "/by-id") == {one.id.hex(), two.id.hex()}
    library.show()
    assert names(view, "/by-id") == names(view, "/by-vm") == set()


def test_ids_are_those_of_the_points(view: View, library: MemoryLibrary) -> None:
    point = make_point(1, disks={"d.raw": DISK})
    library.show(point, d=DISK)
    found = view.point_of(f"/by-vm/web1/{time_name(NOON)}/d.raw")
    assert found is not None
    assert PointId(found.id) == point.id
    assert view.point_of("/by-vm") is None
