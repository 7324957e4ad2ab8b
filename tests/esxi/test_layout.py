from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.disk import DiskInfo, FileInfo
from holdfast.errors import DamagedData
from holdfast.esxi.layout import DiskOutput, FileOutput, FolderOutput, TextOutput, restore_layout
from holdfast.esxi.names import fault_of
from holdfast.esxi.vmdk.descriptor import parse_descriptor

SPARSE = (
    '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'
    'RW 8 SPARSE "web1.vmdk"\nddb.adapterType = "lsilogic"\n'
)
VMDK = DiskInfo("web1.vmdk", 4096, "vmdk", "web1-flat.vmdk", SPARSE, "monolithicSparse")
RAW = DiskInfo("web1.img", 5000, "raw")


def file(name: str, size: int = 3) -> FileInfo:
    return FileInfo(name, size, 0, 0o644)


def test_a_vm_comes_back_as_it_was() -> None:
    files = [file("logs/old/a.log"), file("web1.vmx")]
    disk = DiskInfo("d/two.vmdk", 512, "vmdk", "d/two-flat.vmdk")
    plan = restore_layout("vm", [VMDK, disk], files, ["empty/inner"], "original")
    assert [output.path for output in plan] == [
        "d", "empty", "empty/inner", "logs", "logs/old",
        "web1-flat.vmdk", "d/two-flat.vmdk", "web1.vmdk", "d/two.vmdk", "logs/old/a.log", "web1.vmx",
    ]  # fmt: skip
    assert plan[0] == FolderOutput("d")
    assert plan[5] == DiskOutput("web1-flat.vmdk", "web1.vmdk", 4096)
    assert plan[-1] == FileOutput("web1.vmx", files[1])
    text = plan[8]
    assert isinstance(text, TextOutput)
    assert parse_descriptor(text.data, "x").extents[0].file_name == "two-flat.vmdk"


def test_raw_images() -> None:
    assert restore_layout("disk", [RAW], [], [], "original") == (DiskOutput("web1.img", "web1.img", 5000),)
    assert restore_layout("disk", [RAW], [], [], "raw") == (DiskOutput("web1.img", "web1.img", 5000),)
    flat, text = restore_layout("disk", [RAW], [], [], "vmdk")
    assert flat == DiskOutput("web1-flat.vmdk", "web1.img", 5120)
    assert isinstance(text, TextOutput)
    assert text.path == "web1.vmdk"
    assert parse_descriptor(text.data, "x").sectors == 10


def test_a_vmdk_as_raw_takes_a_free_name() -> None:
    plan = restore_layout("vm", [VMDK], [file("web1.raw")], [], "raw")
    assert plan[0] == DiskOutput("web1-2.raw", "web1.vmdk", 4096)
    assert restore_layout("vm", [VMDK], [], [], "raw") == (DiskOutput("web1.raw", "web1.vmdk", 4096),)


def test_a_raw_image_as_vmdk_takes_free_names() -> None:
    plan = restore_layout("vm", [RAW], [file("web1.vmdk"), file("web1-2-flat.vmdk")], [], "vmdk")
    assert [output.path for output in plan[:2]] == ["web1-2-flat-2.vmdk", "web1-2.vmdk"]


def test_names_that_need_care() -> None:
    raw = DiskInfo('a"b\n' + "ü" * 120 + ".img", 512, "raw")
    flat, text = restore_layout("disk", [raw], [], [], "vmdk")
    assert isinstance(text, TextOutput)
    assert parse_descriptor(text.data, "x").extents[0].file_name == flat.path
    assert '"' not in flat.path
    assert len(flat.path.encode()) <= 255


BAD = ["/etc/passwd", "../x", "a/../../x", "", "a//b", "a/./b", "a\0b", "x" * 256, "\ud800"]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("as_", ["original", "raw", "vmdk"])
def test_no_path_leaves_the_destination(name: str, as_) -> None:
    for disks, files, folders in (
        ([DiskInfo(name, 512, "raw")], [], []),
        ([DiskInfo(name, 512, "vmdk", "f-flat.vmdk")], [], []),
        ([], [file(name)], []),
        ([], [], [name]),
    ):
        with pytest.raises(DamagedData, match="path"):
            restore_layout("vm", disks, files, folders, as_)
    if as_ == "original":
        with pytest.raises(DamagedData):
            restore_layout("vm", [DiskInfo("a.vmdk", 512, "vmdk", name)], [], [], as_)


@pytest.mark.parametrize(
    ("disks", "files", "folders", "words"),
    [
        ([VMDK, VMDK], [], [], "twice"),
        ([VMDK], [file("web1.vmdk")], [], "twice"),
        ([VMDK], [file("web1-flat.vmdk")], [], "twice"),
        ([], [file("a"), file("a")], [], "twice"),
        ([], [file("a"), file("a/b")], [], "both as a file and as a folder"),
        ([], [file("a")], ["a"], "both as a file and as a folder"),
        ([], [file("a")], ["a/b"], "both as a file and as a folder"),
        ([], [file("a", -1)], [], "impossible size"),
        ([], [file("a", 1 << 63)], [], "impossible size"),
        ([DiskInfo("a", -1, "raw")], [], [], "impossible size"),
        ([DiskInfo("a", 1 << 60, "raw")], [], [], "impossible size"),
        ([DiskInfo("a.vmdk", 512, "vmdk", "d/a-flat.vmdk")], [], [], "another folder"),
        ([DiskInfo("a.vmdk", 512, "vmdk", 'a"-flat.vmdk')], [], [], "can not be used"),
        ([DiskInfo("a.vmdk", 512, "vmdk", "a-flat.vmdk", "nonsense")], [], [], "can not be used"),
        (
            [DiskInfo("a.vmdk", 512, "vmdk", "a-flat.vmdk", 'RW 1 FLAT "x"\nddb.x="\ud800"')],
            [],
            [],
            "Unicode",
        ),
    ],
)
def test_contradictions_are_refused(disks, files, folders, words: str) -> None:
    with pytest.raises(DamagedData, match=words):
        restore_layout("vm", disks, files, folders, "original")


def test_a_single_disk_has_no_files() -> None:
    with pytest.raises(DamagedData, match="single disk"):
        restore_layout("disk", [RAW], [file("a")], [], "original")


NAMES = st.lists(st.sampled_from(["a", "b", "..", ".", "", "a.vmdk", "a-flat.vmdk", "\0"]), max_size=3).map(
    "/".join
)
DISKS = st.builds(
    DiskInfo, name=NAMES, size_bytes=st.integers(-1, 5000), format=st.sampled_from(["raw", "vmdk"]), flat_name=NAMES,
    descriptor=st.sampled_from(["", SPARSE, "junk"]),
)  # fmt: skip


@given(
    st.lists(DISKS, max_size=3),
    st.lists(NAMES.map(file), max_size=3),
    st.lists(NAMES, max_size=2),
    st.sampled_from(["original", "raw", "vmdk"]),
)
def test_any_manifest_gives_a_safe_plan_or_is_refused(disks, files, folders, as_) -> None:
    try:
        plan = restore_layout("vm", disks, files, folders, as_)
    except DamagedData:
        return
    paths = [output.path for output in plan]
    assert len(set(paths)) == len(paths)
    assert not any(fault_of(path) for path in paths)
    made: set[str] = {""}
    for output in plan:
        assert output.path.rpartition("/")[0] in made
        if isinstance(output, FolderOutput):
            made.add(output.path)
    assert {output.disk for output in plan if isinstance(output, DiskOutput)} == {disk.name for disk in disks}
