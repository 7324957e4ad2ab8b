"""Locks and faults: what a session meets when the host is busy, full, killed for memory or cut off."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

FLAT = "/vmfs/volumes/datastore1/web1/web1-flat.vmdk"


@pytest.fixture(autouse=True)
def quiet(host):
    """Each test leaves the host as it was."""
    yield
    host.faults.clear()
    vm = host.vm("web1")
    host.stop_guest(vm)
    host.remove_snapshot(vm)
    if host.vm("web1").power != "Powered on":
        host.power(vm, "on")


def text(host, command: str) -> str:
    outcome = host.ssh(command)
    return (outcome.stdout + outcome.stderr).decode()


def test_the_disk_of_a_running_vm_is_busy_until_it_has_a_snapshot(host) -> None:
    vm = host.vm("web1")
    assert "Device or resource busy" in text(host, f"head -c 1 {FLAT}")
    assert "CID=" in text(host, "cat /vmfs/volumes/datastore1/web1/web1.vmdk")
    number = host.snapshot(vm, "s")
    assert host.ssh(f"sha256sum {FLAT}").returncode == 0
    assert "Device or resource busy" in text(host, f"echo x >> {FLAT}")
    assert "Device or resource busy" in text(host, f"rm {FLAT}")
    assert "busy" in text(host, "cat /vmfs/volumes/datastore1/web1/web1-000001-sesparse.vmdk")
    host.remove_snapshot(vm, number)
    assert "busy" in text(host, f"head -c 1 {FLAT}")
    host.power(vm, "off")
    assert host.ssh(f"head -c 1 {FLAT}").returncode == 0


def test_a_disk_under_a_writing_guest_is_known_at_its_snapshot(host, tmp_path: Path) -> None:
    vm = host.vm("web1")
    host.keep_references()
    host.start_guest(vm, rate_bytes=0, log=True)
    while host.vm("web1").guest_writes < 20:
        pass
    number = host.snapshot(vm, "s")
    seen = host.vm("web1").guest_writes
    copied = host.ssh(f"cat {FLAT}").stdout
    while host.vm("web1").guest_writes < seen + 20:
        pass
    assert copied == Path(host.reference(vm, number)).read_bytes()
    host.stop_guest(vm)
    assert host.vm("web1").guest_error is None
    host.copy_disk(vm, "scsi0:0", tmp_path / "now.raw")
    chain = host.path(host.vm("web1").disks["scsi0:0"])
    subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "vmdk", tmp_path / "now.raw", chain], check=True
    )
    host.remove_snapshot(vm, number)
    merged = host.path(host.vm("web1").disks["scsi0:0"])
    assert merged.endswith("/web1.vmdk")
    subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "vmdk", tmp_path / "now.raw", merged], check=True
    )
    host.keep_references(on=False)


def test_a_connection_is_cut_in_mid_stream_and_the_next_one_is_not(host) -> None:
    host.snapshot(host.vm("web1"), "s")
    before = host.traffic()
    host.faults.set("drop_after_bytes", 200_000)
    outcome = host.ssh(f"while :; do cat {FLAT}; done")
    assert outcome.returncode == 255
    assert host.faults.struck()["drop_after_bytes"] == 1
    assert host.traffic().sent_bytes - before.sent_bytes >= 150_000
    assert host.ssh("true").returncode == 0


def test_bytes_on_the_wire_are_counted(host) -> None:
    before = host.traffic()
    assert len(host.ssh("head -c 1000000 /dev/zero").stdout) == 1_000_000
    after = host.traffic()
    assert 1_000_000 < after.sent_bytes - before.sent_bytes < 1_100_000
    assert after.connections == before.connections + 1


def test_an_agent_is_killed_for_what_it_reads_or_holds(host) -> None:
    host.snapshot(host.vm("web1"), "s")
    host.faults.set("kill_agent_after_mib", 4)
    reader = f"while True:\n with open('{FLAT}','rb') as f:\n  while f.read(65536): pass"
    outcome = host.ssh(f'python3 -c "{reader}"')
    assert outcome.returncode in (137, 255)
    host.faults.set("agent_memory_mib", 60, times=1)
    outcome = host.ssh("python3 -c \"x = bytearray(b'1') * (80 << 20)\nwhile True: pass\"")
    assert outcome.returncode in (137, 255)
    assert host.faults.struck()["agent_memory_mib"] == 1


def test_a_host_without_python_still_has_its_commands(host) -> None:
    host.faults.set("no_python")
    assert "not found" in text(host, "python3 -c 1; python -c 1")
    assert "Powered on" in text(host, f"vim-cmd vmsvc/power.getstate {host.vm('web1').vmid}")
    host.faults.clear("no_python")
    assert host.ssh("python3 -c 1").returncode == 0


def test_no_room(host) -> None:
    host.faults.set("tmp_full")
    assert "No space left on device" in text(host, "echo 1 > /tmp/x")
    host.faults.set("datastore_full", "datastore1")
    assert "No space left on device" in text(host, "echo 1 > /vmfs/volumes/datastore1/x")
    assert "Create snapshot failed" in text(host, f"vim-cmd vmsvc/snapshot.create {host.vm('web1').vmid} s")
    assert "No space left on device (1835017)" in text(
        host, "vmkfstools -c 1G /vmfs/volumes/datastore1/d.vmdk"
    )
    host.faults.clear()
    assert text(host, "echo 1 > /tmp/x && cat /tmp/x") == "1\n"


def test_reads_that_fail_later(host) -> None:
    host.snapshot(host.vm("web1"), "s")
    host.faults.set("busy_after_mib", 2)
    assert "busy" in text(host, f"cat {FLAT} > /dev/null")
    host.faults.clear()
    host.faults.set("read_error", "-flat.vmdk")
    assert "Input/output error" in text(host, f"cat {FLAT} > /dev/null")


def test_the_snapshot_goes_away_under_a_reader(host) -> None:
    host.snapshot(host.vm("web1"), "s")
    host.faults.set("busy_reads")
    host.faults.set("remove_snapshots_after_mib", 1)
    assert "busy" in text(host, f"while cat {FLAT}; do :; done > /dev/null")


def test_a_vm_is_switched_off_in_the_middle(host) -> None:
    host.snapshot(host.vm("web1"), "s")
    host.faults.set("power_off_after_mib", 1)
    assert host.ssh(f"cat {FLAT}").returncode == 0
    while host.vm("web1").power == "Powered on":
        pass


def test_the_clock_is_off(host) -> None:
    host.faults.set("clock_offset_s", -86400)
    seen = [
        int(float(line))
        for line in text(host, "date +%s; python3 -c 'import time; print(time.time())'").split()
    ]
    for moment in seen:
        assert abs(time.time() - 86400 - moment) < 10
    host.faults.clear()
    assert abs(time.time() - int(text(host, "date +%s"))) < 10


def test_snapshots_that_come_late_fail_or_vanish(host) -> None:
    number = host.vm("web1").vmid
    create, tasks = f"vim-cmd vmsvc/snapshot.create {number} s", f"vim-cmd vmsvc/get.tasklist {number}"
    host.faults.set("snapshot_create_async_s", 0.4)
    assert text(host, create) == "Create Snapshot:\n"
    assert host.vm("web1").snapshots == []
    assert "createSnapshot" in text(host, tasks)
    while host.vm("web1").busy:
        pass
    assert len(host.vm("web1").snapshots) == 1
    host.faults.clear()
    host.faults.set("snapshot_create_fails", "the disk is angry", times=1)
    host.faults.set("exit_codes_lie")
    assert host.ssh(create).returncode == 0
    assert len(host.vm("web1").snapshots) == 1
    key = re.findall(r"haTask-\S+createSnapshot-\d+", text(host, tasks))[-1]
    assert "the disk is angry" in text(host, f"vim-cmd vimsvc/task_info {key}")
    host.faults.set("snapshot_create_vanishes", times=1)
    before = text(host, tasks)
    assert text(host, create) == "Create Snapshot:\n"
    assert text(host, tasks) == before
    host.faults.set("tasks_forgotten")
    host.snapshot(host.vm("web1"), "t")
    assert text(host, tasks) == before


def test_consolidation_that_leaves_redo_logs(host) -> None:
    vm = host.vm("web1")
    number = host.snapshot(vm, "s")
    host.faults.set("consolidation_leftover", times=1)
    text(host, f"vim-cmd vmsvc/snapshot.remove {vm.vmid} {number}")
    while host.vm("web1").busy:
        pass
    state = host.vm("web1")
    assert state.snapshots == []
    assert state.disks["scsi0:0"].endswith("web1-000001.vmdk")
    assert "consolidationNeeded = true" in text(host, f"vim-cmd vmsvc/get.runtime {vm.vmid}")
    host.remove_snapshot(vm)
    assert host.vm("web1").disks["scsi0:0"].endswith("/web1.vmdk")


def test_the_daemon_dies(host) -> None:
    host.faults.set("vim_cmd_dies", "login", times=1)
    host.faults.set("vim_cmd_dies_in", "vmsvc/get")
    number = host.vm("web1").vmid
    assert "Powered on" in text(host, f"vim-cmd vmsvc/power.getstate {number}")
    outcome = host.ssh("vim-cmd vmsvc/getallvms")
    assert (outcome.returncode, outcome.stdout) == (255, b"Failed to login: Connection reset by peer\n")
    assert host.ssh("vim-cmd vmsvc/getallvms").returncode == 0


def test_noise(host) -> None:
    host.faults.set("banner", "Authorized use only")
    host.faults.set("session_noise", "WARNING: the shell is enabled")
    outcome = host.ssh("echo clean")
    assert outcome.stdout == b"clean\n"
    assert outcome.stderr.decode().splitlines() == ["Authorized use only", "WARNING: the shell is enabled"]


def test_a_disk_grows(host) -> None:
    vm = host.vm("web1")
    host.grow_disk(vm, "scsi0:0", 20 << 20)
    assert "20,480 KB" in text(host, f"vim-cmd vmsvc/device.getdevices {vm.vmid}")


def test_the_table_is_in_the_manual() -> None:
    from tests.esxi_host.faults import TABLE

    manual = (Path(__file__).parent.parent.parent / "docs" / "STANDIN.md").read_text(encoding="utf-8")
    switches = manual.partition("## Fault switches")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", switches, re.MULTILINE))
    assert rows == TABLE


def test_connections_that_are_refused_or_fall_silent(host) -> None:
    host.faults.set("refuse_connections", times=1)
    assert host.ssh("true").returncode == 255
    host.faults.set("hang_after_bytes", 100_000)
    patience = ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1"]
    outcome = host.ssh("cat /dev/zero", options=patience)
    assert outcome.returncode == 255
    assert b"not responding" in outcome.stderr
    host.faults.set("no_password")
    command = host.ssh_command("true", options=["-o", "PubkeyAuthentication=no"])
    assert b"denied (publickey)" in subprocess.run(command, capture_output=True, check=False).stderr


def test_keys_are_made_anew_under_load_when_the_host_wants_it(host) -> None:
    host.faults.set("rekey_limit", "1M")
    outcome = host.ssh("head -c 8000000 /dev/zero", options=["-v"])
    assert len(outcome.stdout) == 8_000_000
    assert outcome.stderr.count(b"SSH2_MSG_NEWKEYS received") > 3


def test_power_that_is_told_late_and_guests_that_do_not_listen(host) -> None:
    number = host.vm("web1").vmid
    host.faults.set("shutdown_ignored", times=1)
    text(host, f"vim-cmd vmsvc/power.shutdown {number}")
    assert not host.vm("web1").busy
    host.faults.set("state_late_s", 0.5)
    text(host, f"vim-cmd vmsvc/power.off {number}")
    assert host.vm("web1").power == "Powered off"
    assert "Powered on" in text(host, f"vim-cmd vmsvc/power.getstate {number}")
    while "Powered off" not in text(host, f"vim-cmd vmsvc/power.getstate {number}"):
        pass


def test_a_snapshot_that_does_not_go(host) -> None:
    vm = host.vm("web1")
    number = host.snapshot(vm, "s")
    host.faults.set("snapshot_remove_fails", "locked by a proxy", times=1)
    host.faults.set("snapshot_remove_waits")
    outcome = host.ssh(f"vim-cmd vmsvc/snapshot.remove {vm.vmid} {number}")
    assert (outcome.returncode, outcome.stdout) == (1, b"Remove Snapshot:\nRemove snapshot failed\n")
    assert len(host.vm("web1").snapshots) == 1


def test_waits_that_a_switch_adds(host) -> None:
    host.snapshot(host.vm("web1"), "s")
    for name, value, command in (
        ("slow_commands_s", 0.3, f"vim-cmd vmsvc/power.getstate {host.vm('web1').vmid}"),
        ("read_delay_ms", 300, f"head -c 1 {FLAT} | wc -c"),
    ):
        host.faults.set(name, value)
        began_s = time.monotonic()
        text(host, command)
        assert time.monotonic() - began_s > 0.3
        host.faults.clear()


def test_a_question_stands_in_the_way_of_power(host) -> None:
    vm = host.vm("web1")
    host.power(vm, "off")
    host.faults.set("question_on_power_on", times=1)
    asking = subprocess.Popen(host.ssh_command(f"vim-cmd vmsvc/power.on {vm.vmid}"), stdout=subprocess.PIPE)
    while host.vm("web1").question is None:
        assert asking.poll() is None
    assert "msg.uuid.altered" in text(host, f"vim-cmd vmsvc/message {vm.vmid}")
    assert host.vm("web1").power == "Powered off"
    found = re.search(r"(\d+)\. I Moved It", text(host, f"vim-cmd vmsvc/message {vm.vmid}"))
    assert found
    text(host, f"vim-cmd vmsvc/message {vm.vmid} {host.vm('web1').question} {found[1]}")
    asking.communicate(timeout=20)
    assert (host.vm("web1").power, host.vm("web1").uuid) == ("Powered on", vm.uuid)


def test_disks_that_no_snapshot_covers(host) -> None:
    from tests.esxi_host import Disk

    host.add_datastore("second", kind="VMFS-5")
    kinds = [
        Disk(1 << 20, datastore="second"),
        Disk(1 << 20, mode="independent_persistent"),
        Disk(1 << 20, kind="rdmp"),
    ]
    vm = host.add_vm("many", disks=[1 << 20, *kinds], running=True)
    number = host.snapshot(vm, "s")
    moved = {node: path.rpartition("/")[2] for node, path in host.vm("many").disks.items()}
    assert moved == {
        "scsi0:0": "many-000001.vmdk",
        "scsi0:1": "many_1-000001.vmdk",
        "scsi0:2": "many_2.vmdk",
        "scsi0:3": "many_3.vmdk",
    }
    files = text(host, "ls /vmfs/volumes/second/many /vmfs/volumes/datastore1/many")
    assert "many_1-000001-delta.vmdk" in files
    assert "many-000001-sesparse.vmdk" in files
    devices = text(host, f"vim-cmd vmsvc/device.getdevices {vm.vmid}")
    assert 'compatibilityMode = "physicalMode"' in devices
    assert 'diskMode = "independent_persistent"' in devices
    host.remove_snapshot(vm, number)
    host.remove_vm(vm)
