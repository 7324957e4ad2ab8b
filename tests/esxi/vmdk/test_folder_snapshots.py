"""Folders of VMs with snapshots, copied while the VM was off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.errors import SourceFormat
from holdfast.esxi.folder import open_machine

SECTOR = 512


@pytest.fixture
def snapshots(tmp_path: Path, redo_logs):
    """A VM folder: base, two snapshots in a row, and a branch from the first one; and what each holds."""
    folder = tmp_path / "vm"
    folder.mkdir()
    sectors = 2 * 4096 * 8
    base = bytes(4096) + b"base" * 1024 + bytes(sectors * SECTOR - 8192)
    (folder / "vm-flat.vmdk").write_bytes(base)
    (folder / "vm.vmdk").write_text(redo_logs.descriptor("VMFS", "vm-flat.vmdk", sectors, 0x10))
    states = {"vm.vmdk": base}
    for number, parent, cid, parent_cid in ((1, "vm.vmdk", 0x11, 0x10), (2, "vm-000001.vmdk", 0x12, 0x11),
                                            (3, "vm-000001.vmdk", 0x13, 0x11)):  # fmt: skip
        name, log = f"vm-00000{number}.vmdk", f"vm-00000{number}-sesparse.vmdk"
        grain = bytes([number]) * 4096
        (folder / log).write_bytes(redo_logs.sesparse(sectors, {number: grain}))
        (folder / name).write_text(redo_logs.descriptor("SESPARSE", log, sectors, cid, parent_cid, parent))
        state = states[parent]
        states[name] = state[: number * 4096] + grain + state[(number + 1) * 4096 :]
    for name in (
        "vm.vmsd",
        "vm-Snapshot1.vmsn",
        "vm-Snapshot1.vmem",
        "vm-5a6b.vmem",
        "vm-5a6b.vmss",
        "vm.nvram",
    ):
        (folder / name).write_bytes(b"x" * 600)
    attach(folder, "vm-000002.vmdk")
    return folder, states


def attach(folder: Path, *names: str) -> None:
    lines = ['displayName = "Web One"']
    for number, name in enumerate(names):
        lines += [f'scsi0:{number}.present = "TRUE"', f'scsi0:{number}.fileName = "{name}"']
    (folder / "vm.vmx").write_text("\n".join(lines) + "\n")


def test_the_state_that_the_vm_runs_on(snapshots, content) -> None:
    folder, states = snapshots
    (folder / "vm-000003.vmdk").unlink()
    (folder / "vm-000003-sesparse.vmdk").unlink()
    machine = open_machine(str(folder))
    (disk,) = machine.disks
    assert (disk.info.name, disk.info.label, disk.info.adapter) == ("vm-000002.vmdk", "scsi0:0", "pvscsi")
    assert disk.info.flat_name == "vm-000002-flat.vmdk"
    assert content.of(disk.source) == states["vm-000002.vmdk"]
    assert [file.info.name for file in machine.files] == [
        "vm-5a6b.vmem",
        "vm-5a6b.vmss",
        "vm.nvram",
        "vm.vmx",
    ]
    (warning,) = machine.warnings
    assert warning == (
        "the VM has snapshots: of vm-000002.vmdk the present state was stored, not the earlier ones; what describes "
        "only the snapshots was left out: vm-Snapshot1.vmem, vm-Snapshot1.vmsn, vm.vmsd"
    )
    machine.close()


def test_another_branch_is_a_disk_of_its_own(snapshots, content) -> None:
    folder, states = snapshots
    machine = open_machine(str(folder))
    assert [disk.info.name for disk in machine.disks] == ["vm-000002.vmdk", "vm-000003.vmdk"]
    for disk in machine.disks:
        assert content.of(disk.source) == states[disk.info.name]
    assert "vm-000003.vmdk is a state of a disk that the VM does not run on" in machine.warnings[0]
    machine.close()


@pytest.mark.parametrize("attached", [("vm.vmdk",), ("vm-000001.vmdk", "vm-000003.vmdk")])
def test_an_attached_parent_is_a_disk_as_well(attached, snapshots, content) -> None:
    folder, states = snapshots
    attach(folder, *attached)
    machine = open_machine(str(folder))
    assert {disk.info.name for disk in machine.disks} == {*attached, "vm-000002.vmdk", "vm-000003.vmdk"}
    for disk in machine.disks:
        assert content.of(disk.source) == states[disk.info.name]
        assert bool(disk.info.label) == (disk.info.name in attached)
    machine.close()


def test_without_a_vmx_the_ends_of_the_tree_are_the_disks(snapshots) -> None:
    folder, _ = snapshots
    (folder / "vm.vmx").unlink()
    machine = open_machine(str(folder))
    assert [disk.info.name for disk in machine.disks] == ["vm-000002.vmdk", "vm-000003.vmdk"]
    machine.close()


def test_a_stale_branch_is_kept_as_files(snapshots, content) -> None:
    """The base was written to after the branch was made: what is attached is read, the rest is no disk any more."""
    folder, states = snapshots
    attach(folder, "vm.vmdk")
    text = (folder / "vm.vmdk").read_text()
    (folder / "vm.vmdk").write_text(text.replace("CID=00000010", "CID=00000099"))
    machine = open_machine(str(folder))
    (disk,) = machine.disks
    assert content.of(disk.source) == states["vm.vmdk"]
    names = {file.info.name for file in machine.files}
    assert {"vm-000002.vmdk", "vm-000002-sesparse.vmdk", "vm-000003-sesparse.vmdk", "vm.vmsd"} < names
    assert sum("was changed after the snapshot" in warning for warning in machine.warnings) == 3
    machine.close()


@pytest.mark.parametrize("missing", ["vm.vmdk", "vm-flat.vmdk", "vm-000001.vmdk", "vm-000001-sesparse.vmdk"])
def test_a_broken_chain_fails_the_backup(missing, snapshots) -> None:
    folder, _ = snapshots
    (folder / missing).unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceFormat, match="is missing"):
        open_machine(str(folder))
    assert len(os.listdir("/proc/self/fd")) == before


def test_parents_that_go_in_a_circle(snapshots) -> None:
    folder, _ = snapshots
    text = (folder / "vm-000001.vmdk").read_text()
    (folder / "vm-000001.vmdk").write_text(
        text.replace('"vm.vmdk"', '"vm-000002.vmdk"').replace("=00000010", "=00000012")
    )
    with pytest.raises(SourceFormat, match="comes back to"):
        open_machine(str(folder))


def test_backup_and_restore_by_command(snapshots, tmp_path, qemu_img) -> None:
    folder, states = snapshots

    def holdfast(*arguments: str) -> int:
        return subprocess.run(
            [sys.executable, "-m", "holdfast", "-r", str(tmp_path / "repo"), *arguments],
            check=False, capture_output=True, text=True,
        ).returncode  # fmt: skip

    assert holdfast("init") == 0
    assert holdfast("backup", str(folder)) == 100
    assert holdfast("restore", "Web One@latest", str(tmp_path / "out")) == 0
    for name in ("vm-000002.vmdk", "vm-000003.vmdk"):
        (tmp_path / "expected.raw").write_bytes(states[name])
        (path,) = (tmp_path / "out").rglob(name)
        assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", "raw", path, tmp_path / "expected.raw")
        assert "parentFileNameHint" not in path.read_text()
