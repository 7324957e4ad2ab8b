"""What is pure, or on this machine alone: changed VMX files, the journal, disguised captures."""

from __future__ import annotations

import re
import tarfile
from typing import TYPE_CHECKING

import pytest

from holdfast.cli.hostcapture import Disguise
from holdfast.errors import SourceNotFound
from holdfast.esxi.hosts import HostBook, HostRecord
from holdfast.esxi.journal import Debt, Journal
from holdfast.esxi.newvmx import hardware_limit, make_vmx
from holdfast.esxi.says.esxcli import HostVersion
from holdfast.esxi.vmxedit import VmxText
from holdfast.ssh.address import Address

if TYPE_CHECKING:
    from pathlib import Path

    from tests.esxi.flow.conftest import Desk

VMX = b"""\
.encoding = "UTF-8"
displayName = "web1"
virtualHW.version = "21"
nvram = "web1.nvram"
uuid.bios = "56 4d fd b5 23 5d 72 20-7e e1 f7 90 57 53 7f 47"
vc.uuid = "56 4d fd b5 23 5d 72 20-7e e1 f7 90 57 53 7f 47"
ethernet0.generatedAddress = "00:0c:29:00:00:01"
ethernet0.address = "00:50:56:00:00:01"
ctkEnabled = "TRUE"
scsi0:0.ctkEnabled = "TRUE"
scsi0:0.fileName = "web1-000002.vmdk"
scsi0:0.present = "TRUE"
scsi0:1.fileName = "data.vmdk"
scsi0:1.present = "TRUE"
scsi0:10.fileName = "more.vmdk"
scsi0:10.present = "TRUE"
checkpoint.vmState = "web1-0001.vmss"
sched.swap.derivedName = "/vmfs/volumes/x/web1.vswp"
"""


def test_a_vmx_that_comes_back_speaks_of_nothing_that_is_not_there() -> None:
    disks = {"web1-000002.vmdk": "web1.vmdk", "more.vmdk": "more.vmdk"}
    made = make_vmx(
        VMX, disks, name='a "new" one', nvram="web1.nvram", new_uuid=True, version=HostVersion(7, 0, 3, 1)
    )
    text = made.data.decode()
    assert not re.search(
        r"ctk|checkpoint|swap|data\.vmdk|000002|generatedAddress|vc\.uuid|uuid\.bios|scsi0:1\.", text
    )
    new = VmxText(made.data)
    assert new.get("scsi0:0.fileName") == "web1.vmdk"
    assert new.get("SCSI0:10.filename") == "more.vmdk"
    assert new.get("displayName") == 'a "new" one'
    assert new.get("virtualHW.version") == "19"
    assert new.get("ethernet0.address") == "00:50:56:00:00:01"
    assert [warning[:9] for warning in made.warnings] == ["the disk ", "the virtu"]


def test_a_vm_that_is_to_be_itself_keeps_what_it_is_known_by() -> None:
    disks = {name: name for name in ("web1-000002.vmdk", "data.vmdk", "more.vmdk")}
    made = make_vmx(VMX, disks, name="web1", nvram="", new_uuid=False, version=HostVersion(8, 0, 2, 1))
    assert made.warnings == ()
    assert VmxText(made.data).get("vc.uuid").startswith("56 4d fd b5")
    assert VmxText(made.data).get("uuid.action") == "keep"


def test_hardware_versions_rise_with_releases() -> None:
    releases = [
        HostVersion(*release, 1)
        for release in ((6, 5, 0), (6, 7, 0), (7, 0, 0), (7, 0, 3), (8, 0, 1), (8, 0, 3))
    ]
    limits = [hardware_limit(release) for release in releases]
    assert limits == sorted(limits)
    assert hardware_limit(HostVersion(5, 5, 0, 1)) == 0


def test_a_vmx_that_is_not_changed_stays_as_it_is() -> None:
    assert VmxText(VMX).data() == VMX


def test_debts_of_the_living_are_not_touched(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "runs"))
    debt = Debt("esx1", 1, "u", "web1", "/vmfs/volumes/d/web1/web1.vmx", snapshot="holdfast-1")
    entry = journal.note(debt)
    assert journal.running("esx1") == (debt,)
    assert journal.abandoned("esx1") == ()
    entry.update(power_on=True)
    entry.release()
    assert journal.running("esx1") == ()
    (found,) = journal.abandoned("esx1")
    assert (found.debt.snapshot, found.debt.power_on) == ("holdfast-1", True)
    assert journal.abandoned("esx1") == (), "one settles it"
    found.settle()
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_entry_that_was_never_written_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    (tmp_path / "torn.json").write_text('{"host": "es')
    assert Journal(str(tmp_path)).abandoned("esx1") == ()
    assert not (tmp_path / "empty.json").exists()


def test_hosts_are_kept_for_their_owner_only(tmp_path: Path) -> None:
    book = HostBook(str(tmp_path / "config"))
    book.put(HostRecord("esx1", Address("::1", "root", 2222), "/k"))
    assert book.get("esx1").address == Address("::1", "root", 2222)
    assert (tmp_path / "config" / "hosts.json").stat().st_mode & 0o077 == 0
    book.remove("esx1")
    with pytest.raises(SourceNotFound, match="esx1"):
        book.get("esx1")


def test_a_disguise_replaces_the_same_name_by_the_same_word() -> None:
    disguise = Disguise([("vm", "payroll"), ("vm", "payroll-old"), ("datastore", "ds1")])
    shown = disguise.apply(
        "[ds1] payroll-old/payroll-old.vmx 10.1.2.3 payroll 10.1.2.3\n   00:0c:29:aa:bb:cc"
    )
    assert shown == "[datastore-1] vm-2/vm-2.vmx ip-1 vm-1 ip-1\n   mac-1"


@pytest.mark.root
def test_a_capture_names_nobody(desk: Desk) -> None:
    vm = desk.host.add_vm("payroll", disks=[8 << 20], running=True, annotation="ask Miller")
    desk.run("host", "capture", "esx1", str(desk.folder / "out.tar"))
    with tarfile.open(desk.folder / "out.tar") as archive:
        files = [archive.extractfile(member) for member in archive.getmembers()]
        text = "".join(file.read().decode() for file in files if file is not None)
    assert "vim.vm.Summary" in text
    for word in ("payroll", "Miller", "datastore1", vm.uuid):
        assert word not in text, word
    assert desk.host.vm("payroll") == vm
