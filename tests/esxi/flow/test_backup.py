"""Backing up VMs of a host: what is stored is the disk at the moment of the snapshot, and the host is as it was."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.esxi.flow.conftest import Desk

MIB = 1 << 20
pytestmark = pytest.mark.root


@pytest.mark.parametrize("via", ["agent", "stream"])
def test_a_running_vm_is_stored_as_it_was_at_the_snapshot(desk: Desk, via: str) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB, 8 * MIB], running=True)
    host.keep_references()
    host.start_guest(vm, rate_bytes=4 * MIB)
    summary = desk.json("backup", "esxi://esx1/web1", "--via", via)
    after = host.vm("web1")
    host.stop_guest(vm)
    assert summary["warnings"] == []
    assert after.power == vm.power
    assert after.snapshots == []
    assert after.disks == vm.disks
    assert desk.owed() == []
    for node, disk in (("scsi0:0", "web1.vmdk"), ("scsi0:1", "web1_1.vmdk")):
        raw = desk.restored("web1@latest", disk)
        assert filecmp.cmp(raw, host.reference(vm, 1, node), shallow=False), node


def test_a_restored_folder_is_the_vms_own(desk: Desk, tmp_path: Path) -> None:
    vm = desk.host.add_vm("web1", disks=[8 * MIB], running=True)
    vmx = Path(desk.host.path(vm.vmx)).read_bytes()
    desk.run("backup", "esxi://esx1/web1", "--via", "stream")
    desk.run("restore", "web1@latest", str(tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["web1-flat.vmdk", "web1.nvram", "web1.vmdk", "web1.vmsd", "web1.vmx"]
    assert (tmp_path / "out" / "web1.vmx").read_bytes() == vmx
