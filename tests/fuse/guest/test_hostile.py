"""File systems with changed bytes: an error or some other file, but no crash, no hang, nothing without bounds."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guestrig import MIB, FileDisk, MemoryDisk, call, make_ext, make_xfs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.errors import GuestError
from holdfast.fuse.guest.port import Node, Window, contained
from holdfast.fuse.guest.volumes import find_volumes

pytest.importorskip("dissect.extfs", reason="the extra holdfast[files] is missing")

SYSTEMS = ("ext2", "ext4", "xfs", "ntfs", "fat")


def explore(root: Node, budget: int = 400) -> int:
    """Looks at everything, up to some number of nodes; a hostile system may have no end."""
    count = 0
    todo = [root]
    while todo and count < budget:
        node = todo.pop()
        count += 1
        assert node.size_bytes >= 0
        assert node.kind
        assert node.mtime_ns is None or isinstance(node.mtime_ns, int)
        try:
            assert isinstance(node.target, str)
            if node.kind == "folder":
                todo += node.children()[:100]
            elif node.kind == "file":
                length = 0
                for piece in node.pieces():
                    length += piece if isinstance(piece, int) else len(piece)
                    if length > 8 * MIB:
                        break
        except GuestError:
            continue
    return count


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, tools: Callable[..., None]) -> dict[str, Path]:
    """One small image of each kind, those whose tools are here."""
    folder = tmp_path_factory.mktemp("hostile")
    tree = folder / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    rng = random.Random(7)
    for number in range(12):
        (tree / "a" / f"file-number-{number}").write_bytes(rng.randbytes(rng.choice([10, 3000, 20_000])))
    (tree / "a" / "link").symlink_to("b")
    made = {
        "ext2": make_ext(folder / "ext2", tree, "-t", "ext2", "-b", "1024", size="1M"),
        "ext4": make_ext(folder / "ext4", tree, "-t", "ext4", "-b", "1024", "-O", "^has_journal", size="1M"),
    }
    tools("xfsprogs", "mkfs.xfs")
    tools("ntfs-3g", "mkntfs", "ntfscp")
    tools("dosfstools", "mkfs.vfat")
    tools("mtools", "mcopy")
    made["xfs"] = make_xfs(folder / "xfs", tree)
    made["ntfs"] = folder / "ntfs"
    with made["ntfs"].open("wb") as file:
        file.truncate(2 * MIB)
    call("mkntfs", "-F", "-q", "-Q", made["ntfs"])
    call("mkfs.vfat", "-C", folder / "fat", "1024")
    made["fat"] = folder / "fat"
    call("mmd", "-i", folder / "fat", "::a")
    for number in range(12):
        call("ntfscp", "-q", folder / "ntfs", tree / "a" / f"file-number-{number}", f"file {number}")
        call("mcopy", "-i", folder / "fat", tree / "a" / f"file-number-{number}", f"::a/file-number-{number}")
    return made


def interesting(path: Path) -> list[int]:
    """Sectors near the beginning with something in them: flipping zeros far from everything shows little."""
    with path.open("rb") as file:
        image = file.read(16 * MIB)
    return [at for at in range(0, len(image), 512) if image[at : at + 512].strip(b"\0")]


@pytest.fixture(scope="module")
def places(images: dict[str, Path]) -> dict[str, list[int]]:
    return {name: interesting(path)[:600] for name, path in images.items()}


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes(images: dict[str, Path], places: dict[str, list[int]], system: str, data) -> None:
    sectors = places[system]
    changes = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, min(40, len(sectors) - 1)) | st.integers(0, len(sectors) - 1),
                st.integers(0, 511),
                st.sampled_from([b"\xff", b"\x00", b"\x01", b"\x80", b"\xff\xff\xff\x7f", b"\xff" * 8]),
            ),
            min_size=1,
            max_size=6,
        )
    )
    disk = FileDisk(images[system])
    for sector, at, value in changes:
        start = sectors[sector] + at
        if start + len(value) <= disk.size_bytes:
            disk.data[start : start + len(value)] = value
    began = time.process_time()
    try:
        for volume in find_volumes([("disk", disk)]):
            if volume.readable:
                explore(volume.open())
    except GuestError:
        pass
    assert time.process_time() - began < 60


def test_the_images_are_read_before_they_are_changed(images: dict[str, Path]) -> None:
    for name, path in images.items():
        (volume,) = find_volumes([("disk", FileDisk(path))])
        assert explore(volume.open()) >= 13, name


def test_a_loop_in_the_library_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.fuse.guest.port._MAX_CPU_S", 0.3)
    with pytest.raises(GuestError, match="more than is sensible"), contained("it"):
        while True:
            pass
    with contained("it"):
        deadline = time.process_time() + 0.1
        while time.process_time() < deadline:
            pass  # the clock of the one before does not tick on


def test_memory_without_end_is_refused() -> None:
    with pytest.raises(GuestError, match="more than is sensible"), contained("it"):
        bytes(8 << 30)
    assert len(bytes(2 << 30)) == 2 << 30


def test_one_read_is_bounded() -> None:
    window = Window(MemoryDisk(b""), 0, 1 << 50)
    with pytest.raises(GuestError, match="at once"):
        window.pread(0, 1 << 40)


def test_a_file_of_exabytes_is_one_hole(images: dict[str, Path]) -> None:
    """Its size is forged; reading it takes no time and no memory."""
    disk = FileDisk(images["ext4"])
    (volume,) = find_volumes([("disk", disk)])
    (folder,) = [child for child in volume.open().children() if child.name == "a"]
    (node,) = [child for child in folder.children() if child.name == "file-number-1"]
    before = node.size_bytes
    where = [at for at in range(0, MIB, 128) if disk.data[at + 4 : at + 8] == struct.pack("<I", before)
             and disk.data[at + 40 : at + 42] == b"\x0a\xf3"]  # fmt: skip
    for at in where:
        struct.pack_into("<I", disk.data, at + 108, 0x0FFFFFFF)
    (volume,) = find_volumes([("disk", disk)])
    (folder,) = [child for child in volume.open().children() if child.name == "a"]
    (node,) = [child for child in folder.children() if child.name == "file-number-1"]
    assert node.size_bytes == (0x0FFFFFFF << 32) + before
    assert [piece for piece in node.pieces() if isinstance(piece, int)][-1] > 1 << 59
