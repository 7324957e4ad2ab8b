"""Several VMs at once, into one repository: one that fails stops no other."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.esxi_host import Disk  # the stand-in is found by conftest.py

if TYPE_CHECKING:
    from tests.esxi.flow.conftest import Desk

MIB = 1 << 20
pytestmark = pytest.mark.root


def test_all_vms_in_parallel_and_one_of_them_fails(desk: Desk) -> None:
    host = desk.host
    host.add_vm("web1", disks=[16 * MIB], running=True)
    host.add_vm("it's (2) $HOME", disks=[16 * MIB], running=True)
    host.add_vm("test-1", disks=[8 * MIB])
    host.add_vm("cluster", disks=[Disk(8 * MIB, mode="independent_persistent")], running=True)
    host.faults.set("max_startups", "1:30:100")
    host.faults.set("shell_timeout_s", 900)
    checked = desk.json("host", "check", "esx1")["hosts"][0]
    assert (checked["max_sessions"], checked["max_startups"]) == (10, 1)
    assert checked["licenses"][0]["free"] is True
    assert (checked["shell_timeout_s"], checked["shell_idle_timeout_s"]) == (900, 0)
    assert len(checked["hints"]) == 2
    log = desk.folder / "progress.jsonl"
    told = desk.run(
        "backup",
        "esxi://esx1",
        "--all",
        "--exclude",
        "test-*",
        "--parallel",
        "2",
        "--progress-file",
        str(log),
        code=45,
    )
    assert "2 of 3 backed up" in told.stdout
    assert "independent" in told.stderr
    assert "use --parallel 1" in told.stderr
    assert {point["vm"] for point in desk.json("list")["points"]} == {"web1", "it's (2) $HOME"}
    assert all(not vm["snapshots"] for vm in host.state()["vms"].values())
    last = json.loads((desk.folder / "progress.jsonl.last").read_text())["sources"]
    assert sorted(one["type"] for one in last) == ["error", "summary", "summary"]
    assert desk.owed() == []


def test_a_disk_that_can_not_be_read_is_left_out_and_the_point_says_so(desk: Desk) -> None:
    desk.host.add_vm(
        "web1",
        disks=[8 * MIB, Disk(8 * MIB, mode="independent_persistent"), Disk(8 * MIB, kind="rdmp")],
        running=True,
    )
    told = desk.run("backup", "esxi://esx1/web1", code=100)
    assert "scsi0:1 was left out: it is independent" in told.stderr
    point = desk.json("show", "web1@latest")
    assert [disk["label"] for disk in point["disks"]] == ["scsi0:0"]
    assert len(point["warnings"]) == 2
    restored = desk.run("restore", "web1@latest", "esxi://esx1/datastore1/part", "--power-on", code=100)
    assert "scsi0:1 was detached" in restored.stderr
    assert list(desk.host.vm("part").disks) == ["scsi0:0"]


@pytest.mark.slow
def test_an_interruption_reaches_all_of_them(desk: Desk) -> None:
    host = desk.host
    for name in ("web1", "web2"):
        host.add_vm(name, disks=[24 * MIB], running=True)
    host.faults.set("read_delay_ms", 200)
    process = desk.start("backup", "esxi://esx1", "--all", "--parallel", "2")
    until_s = time.monotonic() + 60
    while not all(vm["snapshots"] for vm in host.state()["vms"].values()):
        assert time.monotonic() < until_s
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert not any(vm["snapshots"] for vm in host.state()["vms"].values())
    assert desk.owed() == []
