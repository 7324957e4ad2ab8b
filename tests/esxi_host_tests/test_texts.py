"""The texts of the commands, blanks included, as they were seen on real hosts (ESXi 7.0 U3, 8.0 U1 and U2)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A host of each release."""
    from tests.esxi_host import StandIn

    folder = tmp_path_factory.mktemp("hosts")
    with StandIn(folder / "seven", release="7.0", name="esx7") as seven, StandIn(folder / "eight") as eight:
        for host in (seven, eight):
            host.add_datastore("pve-esx", kind="VMFS-5")
        yield {"7.0": seven, "8.0": eight}


def run(host, command: str) -> str:
    return host.ssh(command).stdout.decode()


def test_the_list_of_vms(pair) -> None:
    host = pair["8.0"]
    assert run(host, "vim-cmd vmsvc/getallvms") == "Vmid   Name   File   Guest OS   Version   Annotation\n"
    vm = host.add_vm("x8", disks=[1 << 20], guest="centos9-64", hardware=20)
    lines = run(host, "vim-cmd vmsvc/getallvms").splitlines()
    assert lines[0] == "Vmid   Name          File              Guest OS       Version   Annotation"
    assert lines[1].rstrip() == "1      x8     [pve-esx] x8/x8.vmx   centos9_64Guest   vmx-20"
    host.remove_vm(vm)


def test_annotations_run_over_lines_and_names_are_odd(pair) -> None:
    host = pair["7.0"]
    note = "First line of a note.\n\n   A second paragraph, indented.\n \nanother line"
    names = ["vm2", "-dash", "it's $HOME (1)", "näme [x]", "a  b"]
    vms = [host.add_vm(name, disks=[1 << 20], annotation=note if name == "vm2" else "") for name in names]
    text = run(host, "vim-cmd vmsvc/getallvms")
    assert f"vmx-19    {note}" in text
    for vm in vms:
        assert re.search(rf"^{vm.vmid} +{re.escape(vm.name)} +\[pve-esx\] ", text, re.MULTILINE), vm.name
        assert f'name = "{vm.name}"' in run(host, f"vim-cmd vmsvc/get.config {vm.vmid}")
    invalid = host.add_invalid_vm()
    assert f"Skipping invalid VM '{invalid}'\n" in run(host, "vim-cmd vmsvc/getallvms")
    for vm in vms:
        host.remove_vm(vm)


def test_lines_end_as_their_release_ends_them(pair) -> None:
    for release, comma in (("7.0", ", "), ("8.0", ",")):
        host = pair[release]
        vm = host.add_vm("lines", disks=[1 << 20])
        text = run(host, f"vim-cmd vmsvc/device.getdevices {vm.vmid}")
        assert (
            f'            label = "Hard disk 1"{comma}\n            summary = "1,024 KB"\n         }}{comma}\n'
            in text
        )
        host.remove_vm(vm)


def test_snapshots(pair) -> None:
    for release, stamp in (("7.0", r"\d+/\d+/\d{4} \d+:\d+:\d+"), ("8.0", r"\d+/\d+/\d{4} \d\d:\d\d:\d\d")):
        host = pair[release]
        vm = host.add_vm("snap", disks=[1 << 20])
        number = vm.vmid
        assert run(host, f"vim-cmd vmsvc/snapshot.get {number}") == "Get Snapshot:\n"
        assert (
            run(host, f"vim-cmd vmsvc/snapshot.create {number} snap1 'Shapshot #1' 0 0")
            == "Create Snapshot:\n"
        )
        run(host, f"vim-cmd vmsvc/snapshot.create {number} 'Corelinux running'")
        text = run(host, f"vim-cmd vmsvc/snapshot.get {number}")
        assert re.sub(stamp, "STAMP", text) == (
            "Get Snapshot:\n|-ROOT\n--Snapshot Name        : snap1\n--Snapshot Id        : 1\n"
            "--Snapshot Desciption  : Shapshot #1\n--Snapshot Created On  : STAMP\n--Snapshot State       : powered off\n"
            "--|-CHILD\n----Snapshot Name        : Corelinux running\n----Snapshot Id        : 2\n"
            "----Snapshot Desciption  : \n----Snapshot Created On  : STAMP\n----Snapshot State       : powered off\n"
        )
        assert run(host, f"vim-cmd vmsvc/snapshot.removeall {number}") == "Remove All Snapshots:\n"
        wait_idle(host, number)
        run(host, f"vim-cmd vmsvc/snapshot.create {number} again")
        assert host.vm(number).snapshots[0]["id"] == 3, "ids are not used again"
        host.remove_vm(vm)


def wait_idle(host, vmid: int) -> None:
    while host.vm(vmid).busy:
        pass


def test_power_and_tasks(pair) -> None:
    host = pair["8.0"]
    vm = host.add_vm("power", disks=[1 << 20])
    number = vm.vmid
    assert run(host, f"vim-cmd vmsvc/get.tasklist {number}") == "(ManagedObjectReference) []\n"
    state = f"vim-cmd vmsvc/power.getstate {number}"
    assert run(host, state) == "Retrieved runtime info\nPowered off\n"
    assert run(host, f"vim-cmd vmsvc/power.on {number}") == "Powering on VM:\n"
    assert run(host, state) == "Retrieved runtime info\nPowered on\n"
    tasks = run(host, f"vim-cmd vmsvc/get.tasklist {number}")
    key = re.fullmatch(
        rf"\(ManagedObjectReference\) \[\n   'vim.Task:(haTask-{number}-vim.VirtualMachine.powerOn-\d+)'\n\]\n",
        tasks,
    )
    assert key
    assert 'state = "success",\n' in run(host, f"vim-cmd vimsvc/task_info {key[1]}")
    assert run(host, "vim-cmd vimsvc/task_info haTask-9").startswith(
        "(vmodl.fault.ManagedObjectNotFound) {\n"
    )
    assert run(host, f"vim-cmd vmsvc/power.suspend {number}") == "Suspending VM:\n"
    assert run(host, state).endswith("Suspended\n")
    assert (
        run(host, f"vim-cmd vmsvc/power.on {number}; vim-cmd vmsvc/power.shutdown {number}")
        == "Powering on VM:\n"
    )
    while host.vm(number).power != "Powered off":
        pass
    assert run(host, f"vim-cmd vmsvc/power.off {number}") == "Powering off VM:\nPower off failed\n"
    host.remove_vm(vm)


def test_register_and_the_question_about_moving(pair) -> None:
    host = pair["8.0"]
    vm = host.add_vm("moved", disks=[1 << 20])
    assert f"'{vm.vmid}' already exists" in run(host, f"vim-cmd solo/registervm {vm.vmx}")
    assert "could not be found" in run(host, "vim-cmd solo/registervm /vmfs/volumes/pve-esx/no/no.vmx")
    run(host, f"cp -r {vm.folder} /vmfs/volumes/pve-esx/copy")
    copy = run(host, "vim-cmd solo/registervm /vmfs/volumes/pve-esx/copy/moved.vmx").strip()
    assert int(copy) == vm.vmid + 1
    text = run(
        host,
        f"vim-cmd vmsvc/power.on {copy} >/dev/null 2>&1 & until vim-cmd vmsvc/message {copy} | grep msg.uuid.altered; do :; done; "
        f"vim-cmd vmsvc/message {copy}",
    )
    found = re.search(
        r"Virtual machine message (\d+):\nmsg.uuid.altered:This virtual machine may have been moved", text
    )
    assert found
    choice = re.search(r"(\d+)\. I Copied It", text)
    assert choice
    run(host, f"vim-cmd vmsvc/message {copy} {found[1]} {choice[1]}")
    while host.vm(int(copy)).power != "Powered on":
        pass
    assert host.vm(int(copy)).uuid != vm.uuid
    host.remove_vm(host.vm(int(copy)))
    host.remove_vm(vm)


def test_disks_from_the_command_line(pair) -> None:
    host = pair["8.0"]
    script = "cd /vmfs/volumes/pve-esx; mkdir d; cd d; "
    assert run(host, script + "vmkfstools -c 15M -d eagerzeroedthick t.vmdk") == (
        "Creating disk 't.vmdk' and zeroing it out...\nCreate: 100% done.\n"
    )
    script = "cd /vmfs/volumes/pve-esx/d; "
    assert run(host, script + "vmkfstools -i t.vmdk u.vmdk -d thin") == (
        "Destination disk format: VMFS thin-provisioned\nCloning disk 't.vmdk'...\n"
        "Clone: 10% done.\rClone: 55% done.\rClone: 100% done.\n"
    )
    assert run(host, script + "vmkfstools -e u.vmdk") == "Disk chain is consistent.\n"
    assert run(host, script + "vmkfstools -x check u.vmdk") == "Disk is error free\n"
    assert (
        run(host, script + "vmkfstools -X 20M u.vmdk; stat -c %s u-flat.vmdk")
        == "Grow: 100% done.\n20971520\n"
    )
    assert run(host, script + "vmkfstools -q u.vmdk") == "u.vmdk is not an rdm\n"
    assert (
        run(host, script + "vmkfstools -E u.vmdk v.vmdk; vmkfstools -U t.vmdk; ls") == "v-flat.vmdk\nv.vmdk\n"
    )
    failed = host.ssh(script + "vmkfstools -i v-flat.vmdk w.vmdk -d thin")
    assert failed.returncode == 255
    assert b"The file specified is not a virtual disk (15)." in failed.stderr + failed.stdout


def test_versions(pair) -> None:
    assert run(pair["8.0"], "esxcli system version get") == (
        "   Product: VMware ESXi\n   Version: 8.0.2\n   Build: Releasebuild-22380479\n   Update: 2\n   Patch: 0\n"
    )
    assert run(pair["7.0"], "vmware -vl") == "VMware ESXi 7.0.3 build-21686933\nVMware ESXi 7.0 Update 3\n"


def test_file_systems(pair) -> None:
    lines = run(pair["7.0"], "esxcli storage filesystem list").splitlines()
    assert re.fullmatch(r"Mount Point +Volume Name +UUID +Mounted  Type   +Size +Free", lines[0])
    assert set(lines[1]) == {"-", " "}
    assert re.match(r"/vmfs/volumes/[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{12}  pve-esx ", lines[2])
    assert {len(line) for line in lines[:3]} == {len(lines[0])}
