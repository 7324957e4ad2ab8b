"""Each file system, made by its own tools, is read file by file as it was filled."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
from guestrig import MIB, FileDisk, MemoryDisk, Seen, call, content, make_ext, make_xfs, of_tree, seen

from holdfast.errors import DamagedData, GuestError
from holdfast.fuse.guest.volumes import Volume, find_volumes

pytest.importorskip("dissect.extfs", reason="the extra holdfast[files] is missing")


def volume(path: Path) -> Volume:
    (found,) = find_volumes([("disk", FileDisk(path))])
    assert found.readable
    return found


def without_lost(found: dict[str, Seen]) -> dict[str, Seen]:
    return {path: what for path, what in found.items() if path != "lost+found"}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["-t", "ext2", "-b", "1024"], "ext2"),
        (["-t", "ext2", "-b", "4096", "-O", "^filetype"], "ext2"),
        (["-t", "ext3", "-b", "1024"], "ext3"),
        (["-t", "ext4"], "ext4"),
        (["-t", "ext4", "-b", "1024", "-O", "^metadata_csum"], "ext4"),
        (["-t", "ext4", "-I", "256", "-O", "inline_data"], "ext4"),
        (["-t", "ext4", "-I", "128", "-O", "^64bit"], "ext4"),
    ],
)
def test_ext(tmp_path: Path, tree: Path, options: list[str], kind: str) -> None:
    image = make_ext(tmp_path / "image", tree, *options)
    found = volume(image)
    assert found.kind == kind
    assert without_lost(seen(found.open())) == of_tree(tree)


@pytest.mark.parametrize("system", ["ext2", "ext4"])
@pytest.mark.parametrize("block", ["1024", "4096"])
def test_files_with_holes(tmp_path: Path, system: str, block: str) -> None:
    """Of all sizes at which ext2 takes another level of lists, with data here and there."""
    rng = random.Random(f"{system} {block}")
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(8):
        with (tree / f"sparse{number}").open("wb") as file:
            size = rng.choice([11, 13, 300, 5000, 70_000, 140_000]) * 1024 + rng.randrange(5000)
            for _ in range(4):
                file.seek(rng.randrange(size))
                file.write(rng.randbytes(rng.randrange(1, 9000)))
            file.truncate(size)
    image = make_ext(tmp_path / "image", tree, "-t", system, "-b", block)
    assert without_lost(seen(volume(image).open())) == of_tree(tree)


def test_the_last_inode_and_a_last_entry_of_twelve_bytes_are_shown(tmp_path: Path) -> None:
    """Both were lost by the library's own way to read a folder."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(20):
        (tree / f"f{number}").write_bytes(b"%d" % number)
    image = make_ext(tmp_path / "image", tree, "-t", "ext2", "-b", "1024", "-N", "32", size="1M")
    call("debugfs", "-w", "-R", "write /dev/null last", image)
    assert "last" in seen(volume(image).open())
    data = bytearray(image.read_bytes())
    at = data.index(b"\x02\x2e\x2e\x00\x00") - 7 - 12  # the block of the root folder
    names = [b"a%03d" % number for number in range(82)]
    sizes = [12] * 81 + [16]
    entries = [struct.pack("<IHBB4s", 12, size, 4, 1, name) for name, size in zip(names, sizes, strict=True)]
    data[at + 24 : at + 1012] = b"".join(entries) + bytes(4)
    data[at + 1012 : at + 1024] = struct.pack("<IHBB4s", 12, 12, 4, 1, b"last")
    image.write_bytes(data)
    children = {child.name for child in volume(image).open().children()}
    assert children == {name.decode() for name in names} | {"last"}


@pytest.mark.parametrize(
    "options", [[], ["-m", "crc=0,finobt=0,rmapbt=0,reflink=0"], ["-b", "size=1024", "-i", "size=512"]]
)
def test_xfs(tmp_path: Path, tree: Path, tools, options: list[str]) -> None:
    tools("xfsprogs", "mkfs.xfs")
    found = volume(make_xfs(tmp_path / "image", tree, *options))
    assert found.kind == "xfs"
    if "size=1024" in options:
        return_of = pytest.raises(GuestError, match="folders with blocks of their own size")
        with return_of:
            seen(found.open())
        return
    assert seen(found.open()) == of_tree(tree)


def test_blocks_of_xfs_that_were_reserved_and_never_written_are_zeros(tmp_path: Path, tools) -> None:
    """The disk holds other things there; mkfs makes no such file, so its extent is marked by hand."""
    tools("xfsprogs", "mkfs.xfs", "xfs_db")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "reserved").write_bytes(b"old" * 5000)
    image = make_xfs(tmp_path / "image", tree)
    assert content(next(iter(volume(image).open().children()))) == b"old" * 5000
    number = call("xfs_db", "-c", "ls /", image).split("reserved")[0].split()[-4]
    call("xfs_db", "-x", "-c", f"inode {number}", "-c", "write u3.bmx[0].extentflag 1", image)
    assert content(next(iter(volume(image).open().children()))) == bytes(15000)


def test_ntfs(tmp_path: Path, tree: Path, tools) -> None:
    tools("ntfs-3g", "mkntfs", "ntfscp")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    call("mkntfs", "-F", "-q", "-Q", "-T", image)
    wanted = {}
    for path in [*(tree / "usr").glob("size-*"), *list((tree / "many").iterdir())[:60]]:
        call("ntfscp", "-q", image, path, f"A {path.name}")
        wanted[f"A {path.name}"] = Seen("file", path.stat().st_size, path.read_bytes())
    found = volume(image)
    assert found.kind == "ntfs"
    assert seen(found.open()) == wanted


def test_what_lies_beyond_the_valid_length_in_ntfs_is_zeros(tmp_path: Path, tools) -> None:
    tools("ntfs-3g", "mkntfs", "ntfscp")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    call("mkntfs", "-F", "-q", "-Q", image)
    (tmp_path / "file").write_bytes(b"stale" * 4000)
    call("ntfscp", "-q", image, tmp_path / "file", "file")
    data = bytearray(image.read_bytes())
    lengths = struct.pack("<QQ", 20000, 20000)  # length and valid length of the one file that has these
    assert data.count(lengths) == 1
    at = data.index(lengths)
    data[at + 8 : at + 16] = struct.pack("<Q", 7)
    image.write_bytes(data)
    (node,) = volume(image).open().children()
    assert content(node) == b"stalest" + bytes(19993)


@pytest.mark.parametrize(("bits", "size"), [("12", 2), ("16", 16), ("32", 64)])
def test_fat(tmp_path: Path, tree: Path, tools, bits: str, size: int) -> None:
    tools("dosfstools", "mkfs.vfat")
    tools("mtools", "mcopy")
    image = tmp_path / "image"
    call("mkfs.vfat", "-F", bits, "-C", image, str(size * 1024))
    call("mmd", "-i", image, "::Long folder name", "::SHORT")
    wanted = {"Long folder name": Seen("folder"), "SHORT": Seen("folder")}
    for path in [*(tree / "usr").glob("size-*"), *list((tree / "many").iterdir())[:40]]:
        call("mcopy", "-i", image, path, f"::Long folder name/{path.name} \u00e4.text")
        wanted[f"Long folder name/{path.name} \u00e4.text"] = Seen(
            "file", path.stat().st_size, path.read_bytes()
        )
    call("mcopy", "-i", image, tree / "etc" / "hostname", "::small.txt")
    wanted["small.txt"] = Seen("file", 5, b"web1\n")
    assert seen(volume(image).open()) == wanted


def test_a_small_fat32_is_told_by_its_boot_sector(tmp_path: Path, tools) -> None:
    """Of fewer clusters than the specification allows: many boot partitions are like that, and mtools refuses them."""
    tools("dosfstools", "mkfs.vfat")
    image = tmp_path / "image"
    call("mkfs.vfat", "-F", "32", "-s", "8", "-C", image, "34816")
    raw = bytearray(image.read_bytes())
    reserved, sectors = struct.unpack_from("<H", raw, 14)[0], struct.unpack_from("<I", raw, 36)[0]
    data = (reserved + raw[16] * sectors) * 512
    raw[data : data + 32] = struct.pack("<11sB8xH4xHI", b"HELLO   TXT", 0x20, 0, 3, 5)
    raw[data + 4096 : data + 4101] = b"small"
    struct.pack_into("<I", raw, reserved * 512 + 3 * 4, 0x0FFFFFFF)
    image.write_bytes(raw)
    assert seen(volume(image).open()) == {"HELLO.TXT": Seen("file", 5, b"small")}


def test_clusters_in_descending_order(tmp_path: Path, tools) -> None:
    tools("dosfstools", "mkfs.vfat")
    tools("mtools", "mcopy")
    image = tmp_path / "image"
    call("mkfs.vfat", "-F", "16", "-s", "4", "-S", "512", "-C", image, "16384")
    data = random.Random(1).randbytes(3 * 2048)
    (tmp_path / "file").write_bytes(data)
    call("mcopy", "-i", image, tmp_path / "file", "::file")
    raw = bytearray(image.read_bytes())
    reserved, copies, sectors = (
        struct.unpack_from("<H", raw, 14)[0],
        raw[16],
        struct.unpack_from("<H", raw, 22)[0],
    )
    first_data = reserved * 512 + copies * sectors * 512 + struct.unpack_from("<H", raw, 17)[0] * 32
    chain = struct.unpack_from("<3H", raw, reserved * 512 + 2 * 2)
    assert chain[:2] == (3, 4)
    struct.pack_into("<3H", raw, reserved * 512 + 2 * 2, 0xFFFF, 2, 3)  # 4 -> 3 -> 2
    entry = raw.index(b"FILE       ")
    struct.pack_into("<H", raw, entry + 26, 4)
    clusters = [data[at : at + 2048] for at in range(0, len(data), 2048)]
    raw[first_data : first_data + 3 * 2048] = b"".join(reversed(clusters))
    image.write_bytes(raw)
    (node,) = volume(image).open().children()
    assert content(node) == data


def test_an_endless_chain_of_clusters_is_an_error(tmp_path: Path, tools) -> None:
    tools("dosfstools", "mkfs.vfat")
    tools("mtools", "mcopy")
    image = tmp_path / "image"
    call("mkfs.vfat", "-F", "16", "-s", "4", "-S", "512", "-C", image, "16384")
    (tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    call("mcopy", "-i", image, tmp_path / "file", "::file")
    raw = bytearray(image.read_bytes())
    reserved = struct.unpack_from("<H", raw, 14)[0]
    struct.pack_into("<2H", raw, reserved * 512 + 2 * 2, 3, 2)
    image.write_bytes(raw)
    (node,) = volume(image).open().children()
    with pytest.raises(GuestError, match="no end"):
        content(node)


def test_logical_volumes(tmp_path: Path, tree: Path) -> None:
    """A physical volume written by hand: label, header, metadata, and one volume in two pieces out of order."""
    image = make_ext(tmp_path / "inner", tree, size="8M")
    inner = image.read_bytes()
    text = """vg0 {
id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
seqno = 1
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 8192
max_lv = 0
max_pv = 0
metadata_copies = 0
physical_volumes {
pv0 {
id = "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb"
device = "/dev/sda1"
status = ["ALLOCATABLE"]
flags = []
dev_size = 32768
pe_start = 2048
pe_count = 3
}
}
logical_volumes {
root {
id = "cccccc-cccc-cccc-cccc-cccc-cccc-cccccc"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 2
segment1 {
start_extent = 0
extent_count = 1
type = "striped"
stripe_count = 1
stripes = [
"pv0", 2
]
}
segment2 {
start_extent = 1
extent_count = 1
type = "striped"
stripe_count = 1
stripes = [
"pv0", 0
]
}
}
}
}
contents = "Text Format Volume Group"
version = 1
description = ""
creation_host = "host"
creation_time = 1700000000
\0"""
    disk = bytearray(16 * MIB)
    disk[512:544] = struct.pack("<8sQII8s", b"LABELONE", 1, 0, 32, b"LVM2 001")
    header = b"b" * 32 + struct.pack("<Q", len(disk)) + struct.pack("<QQQQ", MIB, 0, 0, 0)
    header += struct.pack("<QQQQ", 4096, MIB - 4096, 0, 0)
    disk[544 : 544 + len(header)] = header
    area = struct.pack("<I16sIQQ", 0, b" LVM2 x[5A%r0N*>", 1, 4096, MIB - 4096)
    area += struct.pack("<QQII", 512, len(text), 0, 0) + bytes(24)
    disk[4096 : 4096 + len(area)] = area
    disk[4096 + 512 : 4096 + 512 + len(text)] = text.encode()
    half = 4 * MIB
    disk[MIB + 2 * half : MIB + 3 * half] = inner[:half]
    disk[MIB : MIB + half] = inner[half:]
    volumes = find_volumes([("a", MemoryDisk(disk))])
    assert [(v.name, v.kind) for v in volumes] == [("disk", "lvm"), ("vg0-root", "ext4")]
    assert without_lost(seen(volumes[1].open())) == of_tree(tree)


def test_damage_of_the_repository_stays_what_it_is(tmp_path: Path, tree: Path) -> None:
    disk = MemoryDisk(make_ext(tmp_path / "image", tree).read_bytes())
    (found,) = find_volumes([("disk", disk)])
    root = found.open()

    def broken(length: int = -1) -> bytes:
        raise DamagedData("a chunk is damaged")

    disk.read = broken  # type: ignore[method-assign]
    with pytest.raises(DamagedData):
        root.children()


def test_a_guest_that_ends_early_is_an_error_and_no_shorter_file(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(3 * MIB))
    image = make_ext(tmp_path / "image", tree, size="8M")
    (at,) = {int(word) for word in call("debugfs", "-R", "blocks file", image).split()[-1:]}
    block = int(next(
        line.split()[-1] for line in call("dumpe2fs", "-h", image).splitlines() if line.startswith("Block size")
    ))  # fmt: skip
    os.truncate(image, at * block + 1)
    (node,) = [child for child in volume(image).open().children() if child.name == "file"]
    with pytest.raises(GuestError, match="outside"):
        content(node)


def test_encrypted_and_unknown(tmp_path: Path) -> None:
    disk = bytearray(MIB)
    disk[:6] = b"LUKS\xba\xbe"
    (found,) = find_volumes([("disk", MemoryDisk(disk))])
    assert (found.kind, found.readable) == ("luks", False)
    with pytest.raises(GuestError, match="luks"):
        found.open()
    assert find_volumes([("disk", MemoryDisk(bytes(MIB)))])[0].kind == "unknown"
    assert find_volumes([("disk", MemoryDisk(b""))])[0].kind == "unknown"


def test_the_judge_itself_finds_the_images_sound(tmp_path: Path, tree: Path) -> None:
    image = make_ext(tmp_path / "image", tree, "-t", "ext3")
    assert subprocess.run(["e2fsck", "-fn", image], check=False, capture_output=True).returncode == 0
