"""What backups from a host and restores to it leave in their logs, and where these are named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.esxi.flow.conftest import Desk

MIB = 1 << 20
pytestmark = pytest.mark.root


def in_order(log: Path, *parts: str) -> None:
    """Each part is in a line of its own behind that of the part before."""
    lines = iter(log.read_text().splitlines())
    for part in parts:
        assert any(part in line for line in lines), (
            f"{part!r} is missing, or not there in this order:\n{log.read_text()}"
        )


def test_a_log_tells_what_was_done_and_is_named(desk: Desk) -> None:
    desk.host.add_vm("web1", disks=[8 * MIB], running=True)
    desk.host.add_vm("db 1", disks=[8 * MIB], running=True)
    summary = desk.json("backup", "esxi://esx1/web1", "--log-dir", str(desk.folder / "mine"))
    (log,) = (desk.folder / "mine").iterdir()
    assert summary["log"] == str(log)
    assert log.name.endswith("Z-backup-esx1-web1.log")
    in_order(
        log,
        "Holdfast ",
        "backing esxi://esx1/web1 up into ",
        "ESXi 8.0",
        "the VM is ",
        "took the snapshot holdfast-",
        "reading the disk scsi0:0 of 8.00 MiB, ",
        " is gone",
        "restore point ",
        "done",
    )
    assert desk.logs() == []

    desk.host.faults.set("snapshot_create_fails", "Failed to quiesce the virtual machine", times=1)
    states = desk.folder / "progress.jsonl"
    told = desk.run(
        "backup", "esxi://esx1", "--all", "--parallel", "2", "--progress-file", str(states), "--json", code=40
    )
    assert len(desk.logs()) == 2
    error = next(one for one in map(json.loads, told.stderr.splitlines()) if one["type"] == "error")
    (failed,) = [one for one in desk.logs() if "(exit code 40)" in one.read_text()]
    assert error["log"] == str(failed)
    last = json.loads((desk.folder / "progress.jsonl.last").read_text())["sources"]
    assert {one["log"] for one in last} == {str(one) for one in desk.logs()}
    assert {one["type"] for one in last} == {"error", "summary"}
    assert all({"bytes_new", "warnings", "at"} <= one.keys() for one in last if one["type"] == "summary")
    again = desk.run("backup", "esxi://nowhere/web1", code=41)
    assert f"\n  log: {desk.logs()[-1]}" in again.stderr

    back = desk.json("restore", "web1@latest", "esxi://esx1/datastore1/back", "--register")
    assert back["log"] == str(desk.logs()[-1])
    in_order(
        desk.logs()[-1],
        "made the folder /vmfs/volumes/datastore1/back, marked incomplete",
        "writing web1.vmdk",
        "read back and found right",
        "no longer marked",
        "registered ",
        "size 8.0",
        "done",
    )
