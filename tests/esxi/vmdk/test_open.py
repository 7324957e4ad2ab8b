"""Opening VMDKs, with qemu-img as the oracle for what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.disk import BlockSource
from holdfast.errors import EmptySource, SourceFormat, SourceNotFound, SourceUnsupported
from holdfast.esxi.layout import DiskOutput, TextOutput, restore_layout
from holdfast.esxi.raw import FileSink
from holdfast.esxi.vmdk.open import open_vmdk

SECTOR = 512
MIB = 1 << 20
GIB = 1 << 30
SUBFORMATS = [
    "monolithicFlat",
    "monolithicSparse",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
]


def restore(source: BlockSource, path: Path, size: int) -> None:
    """Writes the data of a source as a sparse file, the way a restore does."""
    sink = FileSink(str(path), size, overwrite=False, mode=0o600)
    for offset, length in source.data_extents(0, source.size_bytes):
        for at in range(offset, offset + length, MIB):
            data = bytearray(min(MIB, offset + length - at))
            source.read_into(at, memoryview(data))
            sink.write(at, memoryview(data))
    sink.finish()


def put(folder: Path, text: str, name: str = "web1.vmdk") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def flat(folder: Path, name: str, sectors: int, fill: bytes = b"") -> bytes:
    data = (fill * (sectors * SECTOR))[: sectors * SECTOR] if fill else bytes(sectors * SECTOR)
    (folder / name).write_bytes(data)
    return data


def header(*extents: str, **keys: str) -> str:
    values = {"version": "1", "CID": "00000001", "parentCID": "ffffffff", "createType": '"custom"', **keys}
    return "\n".join(["# Disk DescriptorFile", *(f"{k}={v}" for k, v in values.items()), *extents, ""])


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("size", [3 * MIB, 7 * MIB + 3 * SECTOR])
def test_reads_what_qemu_img_writes(subformat, size, tmp_path, qemu_img, scatter, content) -> None:
    raw = tmp_path / "disk.raw"
    scatter(raw, size, seed=len(subformat))
    qemu_img(
        "convert",
        "-O",
        "vmdk",
        "-o",
        f"subformat={subformat},adapter_type=lsilogic",
        raw,
        tmp_path / "web1.vmdk",
    )
    opened = open_vmdk(str(tmp_path / "web1.vmdk"))
    info = opened.disk.info
    assert (info.name, info.size_bytes, info.format) == ("web1.vmdk", size, "vmdk")
    assert (info.create_type, info.adapter, info.flat_name) == (subformat, "lsilogic", "web1-flat.vmdk")
    assert opened.warnings == ()
    assert {os.path.basename(path) for path in opened.members} == {p.name for p in tmp_path.iterdir()} - {
        "disk.raw"
    }
    content.check(opened.disk.source, raw.read_bytes())
    found = sum(length for _, length in opened.disk.source.data_extents(0, size))
    clusters = sum(1 for at in range(0, size, 65536) if raw.read_bytes()[at : at + 65536].strip(b"\0"))
    assert found <= clusters * 65536, "holes are said to be data"
    opened.disk.source.close()


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_large_sparse_disks_come_back_as_flat_vmdks_that_qemu_img_accepts(
    subformat: str, tmp_path: Path, qemu_img: Callable[..., str], scatter: Callable[..., None]
) -> None:
    size = 4 * GIB + 3 * MIB + SECTOR
    raw, vmdk, out = tmp_path / "disk.raw", tmp_path / "web1.vmdk", tmp_path / "restored"
    scatter(raw, size, pieces=20)
    with raw.open("r+b") as file:  # across the border of two extents of 2 GiB, and at the very end
        file.seek(2047 * MIB - 700)
        file.write(b"border" * 300)
        file.seek(size - 3)
        file.write(b"end")
    qemu_img("convert", "-O", "vmdk", "-o", f"subformat={subformat}", raw, vmdk)
    opened = open_vmdk(str(vmdk))
    source = opened.disk.source
    assert len(opened.members) == {
        "monolithicFlat": 2,
        "twoGbMaxExtentSparse": 4,
        "twoGbMaxExtentFlat": 4,
    }.get(subformat, 1)
    assert sum(length for _, length in source.data_extents(0, size)) < 8 * MIB
    out.mkdir()
    for output in restore_layout("disk", [opened.disk.info], [], [], "original"):
        if isinstance(output, DiskOutput):
            restore(source, out / output.path, output.size_bytes)
        elif isinstance(output, TextOutput):
            (out / output.path).write_bytes(output.data)
    source.close()
    assert sorted(path.name for path in out.iterdir()) == ["web1-flat.vmdk", "web1.vmdk"]
    assert (out / "web1-flat.vmdk").stat().st_blocks * 512 < 8 * MIB
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, out / "web1.vmdk")
    about = json.loads(qemu_img("info", "--output=json", out / "web1.vmdk"))
    assert about["format"] == "vmdk"
    assert about["virtual-size"] == size
    assert about["format-specific"]["data"]["create-type"] == "monolithicFlat"


def test_a_disk_of_esxi(tmp_path, vmfs_text, qemu_img, scatter, content) -> None:
    scatter(tmp_path / "web1-flat.vmdk", 2 * MIB)
    path = put(tmp_path, vmfs_text("web1-flat.vmdk", 4096))
    opened = open_vmdk(path)
    info = opened.disk.info
    assert (info.create_type, info.flat_name, info.uuid) == (
        "vmfs",
        "web1-flat.vmdk",
        "6000c295f147b6a31fb21bd9e7ae2d9c",
    )
    assert info.descriptor == (tmp_path / "web1.vmdk").read_text()
    content.check(opened.disk.source, (tmp_path / "web1-flat.vmdk").read_bytes())
    opened.disk.source.close()
    assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", "raw", path, tmp_path / "web1-flat.vmdk")
    # restored as it was, byte for byte
    disk, text = restore_layout("disk", [info], [], [], "original")
    assert disk == DiskOutput("web1-flat.vmdk", "web1.vmdk", 2 * MIB)
    assert text == TextOutput("web1.vmdk", (tmp_path / "web1.vmdk").read_bytes())


def test_extents_of_all_kinds_in_one_disk(tmp_path, sparse, content, qemu_img) -> None:
    grains = {0: b"grain" * 1000, 5: b"five" * 2000}
    (tmp_path / "s.vmdk").write_bytes(sparse.build(grains, capacity=300, descriptor=""))
    first = flat(tmp_path, "one.vmdk", 20, b"one")
    (tmp_path / "sub").mkdir()
    second = flat(tmp_path, "sub/two.vmdk", 30, b"two")
    path = put(
        tmp_path,
        header(
            'RW 5 FLAT "one.vmdk" 10',
            "RW 40 ZERO",
            'RDONLY 300 SPARSE "s.vmdk"',
            'RW 8 VMFS "one.vmdk" 0',
            'RW 30 FLAT "sub/two.vmdk" 0',
            "RW 3 ZERO",
        ),
    )
    expected = (
        first[10 * SECTOR : 15 * SECTOR]
        + bytes(40 * SECTOR)
        + sparse.content(grains, capacity=300)
        + first[: 8 * SECTOR]
        + second
        + bytes(3 * SECTOR)
    )
    opened = open_vmdk(path)
    content.check(opened.disk.source, expected)
    assert opened.disk.source.size_bytes == 386 * SECTOR
    assert [os.path.relpath(member, tmp_path) for member in opened.members] == [
        "web1.vmdk", "one.vmdk", "s.vmdk", "sub/two.vmdk",
    ]  # fmt: skip
    assert len(opened.warnings) == 1
    assert "'one.vmdk' holds 10240 bytes, but only the 7680" in opened.warnings[0]
    opened.disk.source.close()


def test_holes_of_flat_extents_stay_holes_across_extents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(4 * MIB)
    with (tmp_path / "a").open("r+b") as file:
        file.seek(4 * MIB - 4096)
        file.write(b"x" * 4096)
    with (tmp_path / "b").open("r+b") as file:
        file.write(b"x" * 4096)
    opened = open_vmdk(put(tmp_path, header('RW 8192 FLAT "a" 0', 'RW 8192 FLAT "b" 0')))
    assert list(opened.disk.source.data_extents(0, 8 * MIB)) == [(4 * MIB - 4096, 8192)]
    opened.disk.source.close()


def test_qemu_img_agrees_on_hand_written_sparse_files(tmp_path, sparse, qemu_img, content) -> None:
    """The test's own writer is held against the oracle too, or it would prove little."""
    grains = {0: b"a" * 8192, 3: b"b" * 5000, 40: b"c" * 8192}
    (tmp_path / "expected.raw").write_bytes(sparse.content(grains, capacity=1024))
    for number, options in enumerate(
        [{}, {"zeros": (4, 41)}, {"compressed": True}, {"compressed": True, "footer": True, "version": 3}]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "disk.vmdk").write_bytes(sparse.build(grains, capacity=1024, entries=512, **options))
        opened = open_vmdk(str(folder / "disk.vmdk"))
        assert content.of(opened.disk.source) == (tmp_path / "expected.raw").read_bytes()
        opened.disk.source.close()
        answer = qemu_img(
            "compare", "-f", "vmdk", "-F", "raw", folder / "disk.vmdk", tmp_path / "expected.raw"
        )
        assert "identical" in answer


def test_the_name_is_relative_to_the_root_and_a_link_is_followed(tmp_path: Path, vmfs_text) -> None:
    (tmp_path / "d").mkdir()
    flat(tmp_path, "d/web1-flat.vmdk", 8)
    put(tmp_path / "d", vmfs_text("web1-flat.vmdk", 8))
    opened = open_vmdk(str(tmp_path / "d" / "web1.vmdk"), root=str(tmp_path))
    assert (opened.disk.info.name, opened.disk.info.flat_name) == ("d/web1.vmdk", "d/web1-flat.vmdk")
    opened.disk.source.close()
    (tmp_path / "link.vmdk").symlink_to(tmp_path / "d" / "web1.vmdk")
    opened = open_vmdk(str(tmp_path / "link.vmdk"))
    assert opened.disk.info.name == "web1.vmdk"
    opened.disk.source.close()


# What bad input gets


@pytest.mark.parametrize(
    ("text", "words", "error"),
    [
        (header('RW 8 FLAT "absent.vmdk"'), "extent 'absent.vmdk' is missing", SourceFormat),
        (header('RW 99 FLAT "f.vmdk"'), "'f.vmdk' is too short: it has 4096 bytes, but 50688", SourceFormat),
        (header('RW 8 FLAT "f.vmdk" 1'), "'f.vmdk' is too short", SourceFormat),
        (header('RW 8 VMFS "/etc/passwd"'), "'/etc/passwd' lies outside", SourceFormat),
        (header('RW 8 FLAT "../outside.vmdk"'), "'../outside.vmdk' lies outside", SourceFormat),
        (header('RW 8 FLAT "a/../../outside.vmdk"'), "lies outside", SourceFormat),
        (header('RW 8 FLAT "link.vmdk"'), "'link.vmdk' is a link that leads out", SourceFormat),
        (header('RW 8 FLAT "dir/outside.vmdk"'), "a link that leads out", SourceFormat),
        (header('RW 8 FLAT "."'), "'.' ", SourceFormat),
        (header('RW 8 FLAT "pipe"'), "'pipe' is no regular file", SourceFormat),
        (header('RW 8 FLAT "circle"'), "'circle' ", SourceFormat),
        (header('RW 8 FLAT "web1.vmdk"'), "names itself", SourceFormat),
        (header('RW 8 FLAT "same.vmdk"'), "names itself", SourceFormat),
        (header('RW 8 FLAT "other.vmdk"'), "'other.vmdk' is itself a descriptor", SourceFormat),
        (header('RW 4 FLAT "f.vmdk" 0', 'RW 5 FLAT "f.vmdk" 3'), "two extents overlap in f.vmdk", SourceFormat),
        (header('RW 4 FLAT "f.vmdk" 0', 'RW 4 FLAT "hard.vmdk" 0'), "two extents overlap", SourceFormat),
        (header('RW 8 SPARSE "f.vmdk"'), "'f.vmdk': there is no sparse header", SourceFormat),
        (header('RW 8 SPARSE "empty"'), "'empty': the file ends within", SourceFormat),
        (header('RW 1025 SPARSE "s.vmdk"'), "'s.vmdk' is too short", SourceFormat),
        (header('RW 9 SPARSE "s.vmdk"', 'RW 9 SPARSE "s.vmdk"'), "'s.vmdk' occurs twice", SourceFormat),
        (header('RW 9 SPARSE "s.vmdk"', 'RW 8 FLAT "s.vmdk" 0'), "two extents overlap", SourceFormat),
        (header(), "names no extent", SourceFormat),
        (header('RW 8 FLAT "f.vmdk"', parentCID="1234abcd"), "does not name its parent", SourceFormat),
        (header('RW 8 VMFSSPARSE "f.vmdk"'), "VMFSSPARSE is a redo log", SourceFormat),
        (header('RW 8 SESPARSE "f.vmdk"'), "SESPARSE is a redo log", SourceFormat),
        (header('RW 8 VMFSRDM "f.vmdk"'), "VMFSRDM is a raw device mapping", SourceUnsupported),
        (header('RW 8 VMFSRAW "f.vmdk"'), "VMFSRAW is a raw device mapping", SourceUnsupported),
        (header('RW 8 MAGIC "f.vmdk"'), "type MAGIC", SourceUnsupported),
        (header('NOACCESS 8 FLAT "f.vmdk"'), "NOACCESS", SourceUnsupported),
        (header('RW 8 VMFS "vsan://6a5b"'), "object of a storage system", SourceUnsupported),
    ],
)  # fmt: skip
def test_bad_descriptors(text: str, words: str, error: type[Exception], tmp_path: Path, sparse) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    flat(folder, "f.vmdk", 8)
    os.link(folder / "f.vmdk", folder / "hard.vmdk")
    flat(tmp_path, "outside.vmdk", 8)
    (folder / "link.vmdk").symlink_to("../outside.vmdk")
    (folder / "dir").symlink_to("..")
    (folder / "circle").symlink_to("circle")
    (folder / "empty").touch()
    (folder / "s.vmdk").write_bytes(sparse.build({0: b"x"}))
    os.mkfifo(folder / "pipe")
    put(folder, header('RW 8 FLAT "web1.vmdk"'), "other.vmdk")
    path = put(folder, text)
    os.link(path, folder / "same.vmdk")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=words) as caught:
        open_vmdk(path)
    assert "web1.vmdk" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before, "files were left open"


def test_a_link_inside_the_folder_is_followed(tmp_path: Path, content) -> None:
    data = flat(tmp_path, "f.vmdk", 8, b"x")
    (tmp_path / "link.vmdk").symlink_to("f.vmdk")
    opened = open_vmdk(put(tmp_path, header('RW 8 FLAT "link.vmdk"')))
    assert content.of(opened.disk.source) == data
    opened.disk.source.close()


@pytest.mark.parametrize("hint", ["web1.vmdk", "b.vmdk", "./b.vmdk"])
def test_a_chain_of_parents_that_loops(hint: str, tmp_path: Path) -> None:
    extent = 'RW 8 VMFSSPARSE "x-delta.vmdk"'
    put(tmp_path, header(extent, parentCID="00000001", parentFileNameHint='"web1.vmdk"'), "b.vmdk")
    path = put(tmp_path, header(extent, parentCID="00000001", parentFileNameHint=f'"{hint}"'))
    with pytest.raises(SourceFormat, match=r"web1\.vmdk: the chain of its parents comes back"):
        open_vmdk(path)


@pytest.mark.parametrize(
    ("name", "data", "words", "error"),
    [
        ("web1.vmdk", b"", "is empty", EmptySource),
        ("web1.vmdk", b"\0" * 5000, "neither a VMDK descriptor nor", SourceFormat),
        ("web1.vmdk", b"KDMV", "ends within the sparse header", SourceFormat),
        ("web1.vmdk", b"KDMV" + bytes(508), "one extent of a split disk", SourceFormat),
        ("web1.vmdk", b"COWD" + bytes(3000), "redo log", SourceUnsupported),
        ("web1.vmdk", b"\xbe\xba\xfe\xca" + bytes(3000), "redo log", SourceUnsupported),
        (
            "web1.vmdk",
            b"# Disk DescriptorFile\n" + b"#" * 300_000,
            "neither a VMDK descriptor nor",
            SourceFormat,
        ),
        ("web1-flat.vmdk", b"\0" * 5000, "without its descriptor", SourceFormat),
    ],
)
def test_files_that_are_no_disk(
    name: str, data: bytes, words: str, error: type[Exception], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=words) as caught:
        open_vmdk(str(tmp_path / name))
    assert name in str(caught.value)
    assert caught.value.hint or data == b"KDMV"  # type: ignore[attr-defined]


def test_embedded_descriptors_that_contradict_their_file(tmp_path: Path, sparse) -> None:
    path = tmp_path / "web1.vmdk"
    path.write_bytes(sparse.build({0: b"x"}, descriptor=sparse.descriptor(2000)))
    with pytest.raises(SourceFormat, match="states 1024000 bytes, the header 524288"):
        open_vmdk(str(path))
    path.write_bytes(sparse.build({0: b"x"}, descriptor=sparse.descriptor(1000)))
    opened = open_vmdk(str(path))
    assert opened.disk.source.size_bytes == 1000 * SECTOR
    assert "524288" in opened.warnings[0]
    opened.disk.source.close()
    path.write_bytes(sparse.build({0: b"x"}, descriptor=header('RW 1024 FLAT "other.vmdk"')))
    with pytest.raises(SourceFormat, match="names other extents"):
        open_vmdk(str(path))
    path.write_bytes(sparse.build({0: b"x"}, descriptor=header('RW 1024 SPARSE "web1.vmdk"', parentCID="1")))
    with pytest.raises(SourceFormat, match="delta disk that does not name its parent"):
        open_vmdk(str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        open_vmdk(str(tmp_path / "absent.vmdk"))
