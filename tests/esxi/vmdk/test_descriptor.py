from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.disk import DiskGeometry
from holdfast.errors import SourceFormat
from holdfast.esxi.text import encode
from holdfast.esxi.vmdk.descriptor import (
    MAX_DESCRIPTOR_BYTES,
    DdbEntry,
    Extent,
    flat_descriptor,
    looks_like_descriptor,
    parse_descriptor,
    parse_descriptor_text,
)

HOSTED = """\
# Disk DescriptorFile
version=3
encoding="windows-1252"
CID=fffffffe
parentCID=ffffffff
isNativeSnapshot="no"
createType="custom"

# Extent description
RW 4192256 SPARSE "b\u00fcro-s001.vmdk"
rw\t100   flat "b\u00fcro f001.vmdk" 128
RDONLY 63 ZERO
NOACCESS 5 VMFSRDM "x y.vmdk"
RW 1 VMFS "a.vmdk"  0  something after

# Change Tracking File
changeTrackPath="x-ctk.vmdk"

#DDB
ddb.adapterType = "buslogic"
ddb.geometry.cylinders = "10"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.uuid = "60 00 C2 95 f1 47 b6 a3-1f b2 1b d9 e7 ae 2d 9c"
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", " \t\r\n"])
@pytest.mark.parametrize("codec", ["cp1252", "utf-8-sig"])
def test_a_descriptor_with_everything(newline: str, codec: str) -> None:
    if codec == "utf-8-sig":
        data = HOSTED.replace("windows-1252", "UTF-8").replace("\n", newline).encode(codec)
    else:
        data = HOSTED.replace("\n", newline).encode(codec)
    found = parse_descriptor(data + bytes(700), "x.vmdk")
    assert looks_like_descriptor(data[:512])
    assert found.extents == (
        Extent("RW", 4192256, "SPARSE", "b\u00fcro-s001.vmdk"),
        Extent("RW", 100, "FLAT", "b\u00fcro f001.vmdk", 128),
        Extent("RDONLY", 63, "ZERO"),
        Extent("NOACCESS", 5, "VMFSRDM", "x y.vmdk"),
        Extent("RW", 1, "VMFS", "a.vmdk"),
    )
    assert found.sectors == 4192256 + 100 + 63 + 5 + 1
    assert (found.cid, found.parent_cid, found.create_type) == (0xFFFFFFFE, 0xFFFFFFFF, "custom")
    assert found.change_track_path == "x-ctk.vmdk"
    assert found.adapter == "buslogic"
    assert found.geometry == DiskGeometry(10, 16, 63)
    assert found.uuid == "6000c295f147b6a31fb21bd9e7ae2d9c"
    assert found.ddb[0] == DdbEntry("ddb.adapterType", "buslogic")
    if newline != "\r":  # an encoding line is looked for at line ends that editors write
        assert encode(found.text) == data


def header(*lines: str) -> str:
    return "\n".join(["# Disk DescriptorFile", "version=1", "CID=00000001", *lines, ""])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (header(), "names no extent"),
        (header('RW 0 FLAT "x"'), "out of range"),
        (header('RW 99999999999999999999 FLAT "x"'), "out of range"),
        (header('RW 1 FLAT "x" 99999999999999999999'), "out of range"),
        (header('RW -1 FLAT "x"'), "line 4.*can not be understood"),
        (header("RW 1 FLAT"), "names no file"),
        (header('RW 1 FLAT ""'), "names no file"),
        (header("RW 1 FLAT x.vmdk"), "names no file"),
        (header('RO 1 FLAT "x"'), "line 4.*can not be understood"),
        (header("RW"), "can not be understood"),
        (header('RW 137438953472 FLAT "x"', 'RW 1 FLAT "y"'), "add up to more than 64 TiB"),
        (header('RW 1 FLAT "x"', "parentCID=nonsense"), "parentCID is 'nonsense'"),
        (header('RW 1 FLAT "x"', "CID=00000002"), "'CID' is given twice"),
        (header('RW 1 FLAT "x"', "stray words"), "line 5.*'stray words'"),
        (header('RW 1 FLAT "x"', "= 5"), "line 5"),
    ],
)
def test_malformed_descriptors_are_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(SourceFormat, match=words) as caught:
        parse_descriptor(text.encode(), "web1.vmdk")
    assert caught.value.message.startswith("web1.vmdk")


def test_a_descriptor_is_small() -> None:
    text = header(*['RW 1 FLAT "x"'] * 30_000)
    with pytest.raises(SourceFormat, match="longer than 256 KiB"):
        parse_descriptor(text.encode(), "web1.vmdk")
    assert len(text) > MAX_DESCRIPTOR_BYTES


def test_missing_keys_have_defaults() -> None:
    found = parse_descriptor_text('RW 8 FLAT "x"\nddb.uuid = "short"\nddb.geometry.heads = "9"', "x")
    assert (found.cid, found.parent_cid, found.create_type) == (0xFFFFFFFE, 0xFFFFFFFF, "")
    assert (found.uuid, found.adapter, found.geometry) == ("", "", None)


# What a restore writes


def test_a_flat_disk_keeps_its_descriptor_byte_for_byte(vmfs_text) -> None:
    text = vmfs_text("web1-flat.vmdk", 128)
    assert flat_descriptor(text, 128 * 512, "web1-flat.vmdk") == text
    text = text.replace("\n", "\r\n")
    assert flat_descriptor(text, 128 * 512, "web1-flat.vmdk") == text


@pytest.mark.parametrize(
    ("extra", "name", "size"),
    [
        ({"changeTrackPath": "web1-ctk.vmdk"}, "web1-flat.vmdk", 128 * 512),
        ({"parentFileNameHint": "web0.vmdk"}, "web1-flat.vmdk", 128 * 512),
        ({}, "other-flat.vmdk", 128 * 512),
        ({}, "web1-flat.vmdk", 129 * 512),
    ],
)
def test_what_no_longer_holds_is_rewritten(extra: dict[str, str], name: str, size: int, vmfs_text) -> None:
    original = parse_descriptor_text(vmfs_text("web1-flat.vmdk", 128, **extra), "x")
    text = flat_descriptor(original.text, size, name)
    found = parse_descriptor_text(text, "x")
    assert found.extents == (Extent("RW", size // 512, "VMFS", name),)
    assert (found.cid, found.ddb, found.create_type) == (original.cid, original.ddb, "vmfs")
    assert found.change_track_path == found.parent_hint == ""
    assert "ctk" not in text
    assert flat_descriptor(text, size, name) == text


def test_other_kinds_become_one_flat_extent() -> None:
    text = flat_descriptor(HOSTED, 1000, "b\u00fcro-flat.vmdk")
    found = parse_descriptor(encode(text), "x")
    assert found.extents == (Extent("RW", 2, "FLAT", "b\u00fcro-flat.vmdk"),)
    assert (found.create_type, found.cid) == ("monolithicFlat", 0xFFFFFFFE)
    assert found.ddb == parse_descriptor_text(HOSTED, "x").ddb


def test_a_disk_without_descriptor_gets_one() -> None:
    uuid = "6000c295f147b6a31fb21bd9e7ae2d9c"
    text = flat_descriptor("", 42949672960, "a-flat.vmdk", uuid=uuid)
    found = parse_descriptor_text(text, "x")
    assert found.geometry == DiskGeometry(5221, 255, 63)  # what ESXi writes for 40 GiB
    assert (found.adapter, found.uuid) == ("lsilogic", uuid)
    assert {e.key: e.value for e in found.ddb}["ddb.longContentID"].endswith(f"{found.cid:08x}")
    assert flat_descriptor("", 42949672960, "a-flat.vmdk", uuid=uuid) == text
    small = parse_descriptor_text(
        flat_descriptor("", 1, "a", adapter="ide", geometry=DiskGeometry(1, 2, 3)), "x"
    )
    assert (small.sectors, small.adapter, small.geometry) == (1, "ide", DiskGeometry(1, 2, 3))


@pytest.mark.parametrize("name", ["", 'a"b', "a\nb", "a\rb"])
def test_a_name_that_can_not_be_quoted_is_refused(name: str) -> None:
    with pytest.raises(SourceFormat):
        flat_descriptor("", 512, name)


WORDS = st.sampled_from(
    ["RW", "RDONLY", " ", " ", "1", "512", "FLAT", "VMFS", "ZERO", '"x"', '"', "=", "\n", "\r\n", "ddb.uuid", "CID",
     "parentCID", "ffffffff", "createType", "encoding", "gbk", "\0", "\x85", "\u2028", "#", "\ufeff", "ſ", "9" * 25]
)  # fmt: skip


@given(
    st.one_of(
        st.binary(max_size=400), st.lists(WORDS, max_size=60).map(lambda words: "".join(words).encode())
    )
)
@example(b"RW 1 " + b" " * 60_000 + b"!")
@example(b'RW 1 FLAT "x" ' + b"1 " * 60_000 + b"\x00")
def test_any_bytes(data: bytes) -> None:
    try:
        found = parse_descriptor(data, "x")
    except SourceFormat:
        return
    assert found.extents
    text = flat_descriptor(found.text, found.sectors * 512, "x-flat.vmdk")
    again = parse_descriptor_text(text, "x")
    assert (again.sectors, again.ddb, again.cid) == (found.sectors, found.ddb, found.cid)
