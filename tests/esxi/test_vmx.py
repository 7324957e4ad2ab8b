from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import SourceFormat
from holdfast.esxi.vmx import AttachedDisk, parse_vmx

FULL = """#!/usr/bin/vmware
.encoding = "UTF-8"
config.version = "8"
displayName = "Büro |22A|22|0Aline"
uuid.bios = "56 4d 89 0e 68 65 d4 86-22 78 80 af 60 16 e0 e0"
vc.uuid = "52 AB f5 21 86 ad f2 ff-5b ef c0 f2 3b 53 eb 3b"
SCSI0:10.PRESENT = "true"
SCSI0:10.FILENAME = "ten.vmdk"
scsi0:2.present = "TRUE"
scsi0:2.fileName = "/vmfs/volumes/ds 1/web1/two.vmdk"
scsi0:2.deviceType = "scsi-hardDisk"
scsi0:2.mode = "Independent-persistent"
ide1:0.present = "TRUE"
ide1:0.fileName = "/iso/debian.iso"
ide1:0.deviceType = "cdrom-image"
sata0:1.present = "TRUE"
sata0:1.deviceType = "atapi-cdrom"
sata0:1.fileName = "auto detect"
nvme0:0.present = "TRUE"
nvme0:0.fileName = "n.vmdk"
scsi0:5.present = "FALSE"
scsi0:5.fileName = "gone.vmdk"
scsi0:6.fileName = "never.vmdk"
scsi0:7.present = "TRUE"
floppy0.fileName = "f.flp"
this is no assignment
"""


def test_a_full_vmx() -> None:
    vmx = parse_vmx(FULL.encode(), "web1.vmx")
    assert vmx.display_name == 'Büro "A"\nline'
    assert vmx.uuid == "52abf52186adf2ff5befc0f23b53eb3b"
    assert vmx.disks == (
        AttachedDisk("nvme0:0", "n.vmdk"),
        AttachedDisk("scsi0:2", "/vmfs/volumes/ds 1/web1/two.vmdk", "independent-persistent"),
        AttachedDisk("scsi0:10", "ten.vmdk"),
    )


def test_crlf_and_bom_and_windows_encoding() -> None:
    data = b'\xef\xbb\xbfdisplayName="a"\r\nuuid.bios="short"\r\n'
    assert parse_vmx(data, "x").display_name == "a"
    assert parse_vmx(data, "x").uuid == ""
    data = '.encoding = "windows-1252"\ndisplayName = "Büro"\n'.encode("cp1252")
    assert parse_vmx(data, "x").display_name == "Büro"


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"just words\n", b"x" * ((1 << 20) + 1)])
def test_what_is_no_vmx_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(SourceFormat, match=r"web1\.vmx"):
        parse_vmx(data, "web1.vmx")


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    try:
        parse_vmx(data, "x")
    except SourceFormat:
        pass


@given(st.lists(st.tuples(st.integers(0, len(FULL.encode()) - 1), st.integers(0, 255)), max_size=12))
def test_mutated_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(FULL.encode())
    for place, value in changes:
        data[place] = value
    vmx = parse_vmx(bytes(data), "x")
    assert len(vmx.disks) <= 8
