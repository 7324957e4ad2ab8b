"""Restoring to a host: the disks are those of the restore point, the VM starts, nothing that exists is overwritten."""

from __future__ import annotations

import filecmp
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.esxi.flow.conftest import Desk

MIB = 1 << 20
pytestmark = pytest.mark.root


def test_a_vm_comes_back_as_a_new_one_and_starts(desk: Desk, tmp_path: Path) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB, 8 * MIB], running=True)
    host.keep_references()
    host.start_guest(vm, rate_bytes=4 * MIB)
    desk.run("backup", "esxi://esx1/web1")
    host.stop_guest(vm)
    done = desk.json("restore", "web1@latest", "esxi://esx1/datastore1/web1 (2)", "--power-on")
    new = host.vm(done["vm_id"])
    assert (new.name, new.power) == ("web1 (2)", "Powered on")
    assert new.uuid != vm.uuid, "the VM that was backed up is registered still"
    assert "HOLDFAST-INCOMPLETE.txt" not in new.files
    host.power(new, "off")
    for node in ("scsi0:0", "scsi0:1"):
        host.copy_disk(new, node, tmp_path / "back.raw")
        reference = host.reference(vm, 1, node)
        assert filecmp.cmp(tmp_path / "back.raw", reference, shallow=False), node
        flat = Path(host.path(new.disks[node].replace(".vmdk", "-flat.vmdk")))
        compared = subprocess.run(
            ["qemu-img", "compare", reference, flat], check=False, capture_output=True, text=True
        )
        assert compared.returncode == 0, compared.stdout
        assert flat.stat().st_blocks * 512 < flat.stat().st_size, "it is not thin"
    again = desk.run("restore", "web1@latest", "esxi://esx1/datastore1/web1 (2)", code=33)
    assert "exists" in again.stderr


def test_a_lost_vm_comes_back_as_itself(desk: Desk) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[8 * MIB])
    desk.run("backup", "esxi://esx1/web1")
    host.remove_vm(vm)
    subprocess.run(["rm", "-rf", host.path(vm.folder)], check=True)
    done = desk.json("restore", "web1@latest", "esxi://esx1/datastore1", "--register")
    new = host.vm(done["vm_id"])
    assert (new.name, new.uuid, new.power) == ("web1", vm.uuid, "Powered off")
    second = desk.json("backup", "esxi://esx1/web1")
    assert second["vm_uuid"] == desk.json("show", "web1@latest~1")["vm_uuid"]
    assert second["bytes_new"] < 100_000


def test_in_place_writes_only_what_differs(desk: Desk, tmp_path: Path) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[16 * MIB])
    host.copy_disk(vm, "scsi0:0", tmp_path / "before.raw")
    desk.run("backup", "esxi://esx1/web1")
    host.write(vm, "scsi0:0", 5 * MIB, b"\xee" * 4096)
    done = desk.json("restore", "web1@latest", "esxi://esx1/datastore1/web1", "--in-place")
    assert 0 < done["bytes_written"] <= MIB
    host.copy_disk(vm, "scsi0:0", tmp_path / "after.raw")
    assert filecmp.cmp(tmp_path / "before.raw", tmp_path / "after.raw", shallow=False)
    host.power(vm, "on")
    refused = desk.run("restore", "web1@latest", "esxi://esx1/datastore1/web1", "--in-place", code=33)
    assert "is not off" in refused.stderr
