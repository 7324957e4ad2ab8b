"""Every fault: the VM and its snapshots are as before, the message names cause and cure, the next run succeeds."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from tests.esxi.flow.conftest import Desk

MIB = 1 << 20
pytestmark = [pytest.mark.root, pytest.mark.slow]


class Case(NamedTuple):
    """A fault, how the backup ends, and a word that the user reads."""

    fault: str
    value: str | float
    code: int
    says: str = ""
    options: tuple[str, ...] = ()
    times: int | None = None


CASES = [
    Case("refuse_connections", True, 51, "is the host not overloaded"),
    Case("drop_after_bytes", 400_000, 0, "goes on where it broke off"),
    Case("drop_after_bytes", 12 * MIB, 0, "goes on where it broke off", ("--via", "stream")),
    Case("no_python", True, 0, "no python3"),
    Case("session_noise", "WARNING: post-quantum\n", 0),
    Case("banner", "Welcome to a host\n", 0),
    Case("kill_agent_after_mib", 4, 0, "goes on where it broke off"),
    Case("agent_memory_mib", 20, 54, "short of memory"),
    Case("tmp_full", True, 0),
    Case("clock_offset_s", 7200, 0, "clock of esx1 is off"),
    Case("datastore_full", "*", 40, "free some space"),
    Case("busy_after_mib", 4, 43, "busy"),
    Case("busy_after_mib", 4, 42, "run the backup again", ("--via", "stream")),
    Case("read_error", "-flat.vmdk", 43, "Input/output error"),
    Case("vim_cmd_dies", "login", 40, "try again"),
    Case("vim_cmd_dies", "killed", 0, times=1),
    Case("vim_cmd_dies", "bad_alloc", 0, times=1),
    Case("vim_cmd_dies", "ssl", 0, times=1),
    Case("exit_codes_lie", True, 0),
    Case("invalid_vm", "77", 0),
    Case("state_late_s", 2, 0, options=("--how", "cold")),
    Case("shutdown_ignored", True, 40, "--force-off", ("--how", "cold", "--shutdown-time", "2")),
    Case("shutdown_ignored", True, 0, "", ("--how", "cold", "--shutdown-time", "2", "--force-off")),
    Case("question_on_power_on", True, 0, "", ("--how", "cold")),
    Case("question_on_power_on", True, 0, "", ("--how", "warm")),
    Case("snapshot_create_fails", "Failed to quiesce the virtual machine", 40, "Failed to quiesce", times=1),
    Case("snapshot_create_async_s", 2, 0),
    Case("snapshot_create_vanishes", True, 40, "made no snapshot", times=1),
    Case("snapshot_remove_fails", "Insufficient permission", 0, times=1),
    Case("snapshot_remove_s", 2, 0),
    Case("snapshot_remove_waits", True, 0),
    Case("tasks_forgotten", True, 0),
    Case("max_sessions", 1, 0),
    Case("remove_snapshots_after_mib", 1, 42, "somebody removed the snapshot"),
    Case("power_off_after_mib", 1, 0),
    Case("rekey_limit", "1M", 0),
    Case("busy_reads", True, 0),
    Case("slow_commands_s", 0.2, 0),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case.fault, *case.options]).replace("--", "")
)
def test_the_host_is_as_before_and_the_next_run_succeeds(desk: Desk, case: Case) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB], running=True)
    host.snapshot(vm, "somebody's")
    vm = host.vm("web1")
    host.faults.set(case.fault, case.value, times=case.times)
    if case.fault == "remove_snapshots_after_mib":  # so that there is a middle for it to strike in
        host.faults.set("read_delay_ms", 50)
    told = desk.run("backup", "esxi://esx1/web1", *case.options, code=case.code or 100)
    assert case.says in told.stderr
    host.faults.clear()
    if case.fault == "busy_after_mib":  # the host is in trouble while it is put right; the next run does it
        desk.run("host", "check", "--clean")
    after = host.vm("web1")
    others = [one for one in vm.snapshots if case.fault != "remove_snapshots_after_mib"]
    assert after.power == ("Powered off" if case.fault == "power_off_after_mib" else vm.power)
    assert [one["name"] for one in after.snapshots] == [one["name"] for one in others]
    assert desk.owed() == []
    if case.fault != "remove_snapshots_after_mib":
        assert after.disks == vm.disks
    next_run = desk.run("backup", "esxi://esx1/web1", code=100 if others else 0)
    assert "has snapshots of its own" in next_run.stderr or not others
    desk.run("check", "--read-data")


@pytest.mark.skipif(not os.environ.get("HOLDFAST_SOAK"), reason="waits for a minute; run by `make soak`")
def test_a_connection_that_falls_silent_is_given_up_and_begun_anew(desk: Desk) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB], running=True)
    host.faults.set("hang_after_bytes", MIB)
    told = desk.run("backup", "esxi://esx1/web1")
    assert "not responding" in told.stderr
    assert "goes on where it broke off" in told.stderr
    assert (host.vm("web1").snapshots, host.vm("web1").disks, desk.owed()) == ([], vm.disks, [])
    desk.run("check", "--read-data")


def test_what_can_not_be_removed_is_said_and_removed_by_the_next_run(desk: Desk) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[8 * MIB], running=True)
    host.faults.set("snapshot_remove_fails", "Insufficient permission", times=3)
    told = desk.run("backup", "esxi://esx1/web1", code=100)
    assert "Insufficient permission" in told.stderr
    assert len(host.vm("web1").snapshots) == len(desk.owed()) == 1
    checked = desk.run("host", "check", code=100)
    assert "host check --clean" in checked.stderr
    cleaned = desk.run("host", "check", "--clean")
    assert "removed the snapshot" in cleaned.stderr
    assert host.vm("web1").disks == vm.disks
    assert desk.owed() == []


def test_redo_logs_without_a_snapshot_are_said_and_consolidated(desk: Desk) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[8 * MIB], running=True)
    host.faults.set("consolidation_leftover", True, times=1)
    told = desk.run("backup", "esxi://esx1/web1", code=100)
    assert "has not consolidated" in told.stderr
    desk.run("backup", "esxi://esx1/web1")
    desk.run("host", "check", "--clean")
    assert host.vm("web1").disks == vm.disks


@pytest.mark.parametrize("how", ["hot", "cold"])
def test_a_run_that_is_killed_is_settled_by_the_next(desk: Desk, how: str) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB], running=True)
    host.faults.set("read_delay_ms", 200)
    process = desk.start("backup", "esxi://esx1/web1", "--how", how)
    until_s = time.monotonic() + 60
    while not (host.vm("web1").snapshots if how == "hot" else host.vm("web1").power == "Powered off"):
        assert time.monotonic() < until_s
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    host.faults.clear()
    assert len(desk.owed()) == 1
    told = desk.run("backup", "esxi://esx1/web1")
    assert "an interrupted run had" in told.stderr
    after = host.vm("web1")
    assert (after.power, after.disks, after.snapshots) == (vm.power, vm.disks, [])
    assert desk.owed() == []


def test_ctrl_c_removes_the_snapshot(desk: Desk) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB], running=True)
    host.faults.set("read_delay_ms", 200)
    process = desk.start("backup", "esxi://esx1/web1")
    until_s = time.monotonic() + 60
    while not host.vm("web1").snapshots:
        assert time.monotonic() < until_s
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    after = host.vm("web1")
    assert (after.power, after.disks, after.snapshots) == (vm.power, vm.disks, [])
    assert desk.owed() == []


def test_another_installations_snapshot_is_left_alone(desk: Desk) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[8 * MIB], running=True)
    host.snapshot(vm, "holdfast-0123456789ab")
    told = desk.run("host", "check", "--clean", code=100)
    assert "another installation" in told.stderr
    desk.run("backup", "esxi://esx1/web1", code=100)
    assert [one["name"] for one in host.vm("web1").snapshots] == ["holdfast-0123456789ab"]
