"""Every fault of a host while a VM is restored to it: what is there is clearly complete or not, the message says what to do, the next run succeeds."""

from __future__ import annotations

import filecmp
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.esxi.flow.conftest import Desk

if TYPE_CHECKING:
    from tests.esxi_host.standin import VmState

MIB = 1 << 20
MARKER = "HOLDFAST-INCOMPLETE.txt"
pytestmark = [pytest.mark.root, pytest.mark.slow]


class Place(NamedTuple):
    """A desk with a VM that is backed up, and its disk as it was."""

    desk: Desk
    vm: VmState
    disk: Path

    def files(self, folder: str) -> set[str]:
        """What is in a folder of the datastore; empty if there is none."""
        path = self.path(folder)
        return set(os.listdir(path)) if path.exists() else set()

    def path(self, folder: str) -> Path:
        return Path(self.desk.host.path(f"{self.vm.folder.rpartition('/')[0]}/{folder}"))

    def is_same(self, folder: str) -> bool:
        """Whether the disk in a folder is the one that was backed up."""
        return filecmp.cmp(self.disk, self.path(folder) / "web1-flat.vmdk", shallow=False)

    def others(self) -> list[tuple[str, str]]:
        return [(vm["name"], vm["power"]) for vm in self.desk.host.state()["vms"].values()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One for all: each test restores into a folder of its own."""
    if os.geteuid() != 0:
        pytest.skip("the stand-in host needs root")
    from tests.esxi_host import StandIn

    folder = tmp_path_factory.mktemp("desk")
    with StandIn(folder / "esx", release="8.0") as host:
        host.add_datastore("datastore1")
        desk = Desk(host, folder)
        desk.run("init")
        desk.link()
        vm = host.add_vm("web1", disks=[40 * MIB])
        vmx = Path(host.path(vm.vmx))
        vmx.write_text(vmx.read_text().replace('virtualHW.version = "', 'virtualHW.version = "9'))
        host.copy_disk(vm, "scsi0:0", folder / "disk.raw")
        desk.run("backup", "esxi://esx1/web1")
        yield Place(desk, vm, folder / "disk.raw")


@pytest.fixture(autouse=True)
def no_faults_left(place: Place) -> Iterator[None]:
    """A test that fails must not take those after it along."""
    yield
    place.desk.host.faults.clear()


class Case(NamedTuple):
    """Faults, how the restore ends, what the user reads, and whether the folder is there then: whole, marked, or not at all."""

    faults: dict[str, str | float]
    code: int | tuple[int, ...]
    says: str
    left: str
    options: tuple[str, ...] = ()
    times: int | None = None


MARKED = "is marked incomplete; the same command goes on with it"
CASES = {
    "no python": Case({"no_python": 1}, 55, "no python3 that works", "nothing"),
    "full": Case({"datastore_full": "*"}, 31, "free some space", "nothing"),
    "unreachable": Case({"refuse_connections": 1}, 51, "is the host not overloaded", "nothing"),
    "daemon, once": Case({"vim_cmd_dies": "killed"}, 0, "", "whole", times=1),
    "not registered, once": Case(
        {"vim_cmd_dies_in": "solo/registervm", "vim_cmd_dies": "ssl"}, 0, "", "whole", times=1
    ),
    "not registered": Case(
        {"vim_cmd_dies_in": "solo/registervm", "vim_cmd_dies": "login"},
        40,
        "the VM is complete in its folder: register",
        "whole",
    ),
    "question": Case({"question_on_power_on": 1, "state_late_s": 1}, 0, "", "whole", ("--power-on",)),
    "connection": Case({"drop_after_bytes": 3 * MIB}, 0, "it goes on where it broke off", "whole"),
    "agent": Case({"kill_agent_after_mib": 4}, 0, "it goes on where it broke off", "whole"),
    # The agent is killed before its first words, after them, or while it is sent something.
    "agent, memory": Case({"agent_memory_mib": 5}, (50, 54, 57), MARKED, "marked"),
    "slow, odd": Case(
        {"slow_commands_s": 0.1, "tmp_full": 1, "exit_codes_lie": 1, "session_noise": "hello\n", "invalid_vm": "77"},
        0,
        "",
        "whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_fault_leaves_is_clear_and_the_next_run_succeeds(place: Place, name: str) -> None:
    case, host = CASES[name], place.desk.host
    before, folder = place.others(), name.replace(" ", "-")
    command = ("restore", "web1@latest", f"esxi://esx1/datastore1/{folder}", "--register")
    for fault, value in case.faults.items():
        host.faults.set(fault, value, times=None if fault == "vim_cmd_dies_in" else case.times)
    told = place.desk.run(*command, *case.options, code=case.code or 100)  # the hardware version was lowered
    host.faults.clear()
    assert case.says in told.stderr
    files = place.files(folder)
    left = "nothing" if not files else "marked" if MARKER in files else "whole"
    assert left == case.left, files
    if case.code == 0:
        assert "the virtual hardware was lowered" in told.stderr
    elif left == "whole":
        refused = place.desk.run(*command, code=33)
        assert "already" in refused.stderr
    else:
        assert place.others() == before
        place.desk.run(*command, code=100)
    assert MARKER not in place.files(folder)
    assert place.is_same(folder)
    now = {name: power for name, power in place.others() if name != folder}
    assert now == dict(before)


def test_a_datastore_that_fills_up_in_the_middle(place: Place) -> None:
    host = place.desk.host
    host.add_datastore("small", capacity_bytes=24 * MIB)
    full = Path(host.path("/vmfs/volumes/small/iso"))
    full.write_bytes(os.urandom(21 * MIB))
    command = ("restore", "web1@latest", "esxi://esx1/small/back")
    told = place.desk.run(*command, code=31)
    assert "the datastore is full" in told.stderr
    assert "free some space" in told.stderr
    assert MARKED in told.stderr
    folder = full.parent / "back"
    assert {MARKER, "web1-flat.vmdk"} <= set(os.listdir(folder))
    full.unlink()
    place.desk.run(*command, code=100)
    assert MARKER not in os.listdir(folder)
    flat = folder / "web1-flat.vmdk"
    assert filecmp.cmp(place.disk, flat, shallow=False)
    assert flat.stat().st_blocks * 512 < flat.stat().st_size / 3, "it is not thin any more"


def test_what_can_not_be_read_back_is_an_error(place: Place) -> None:
    host, command = place.desk.host, ("restore", "web1@latest", "esxi://esx1/datastore1/unread")
    host.faults.set("kill_agent_after_mib", 4)
    # What was just written is in the stand-in's memory, until it is opened anew.
    host.faults.set("read_error", "-flat.vmdk")
    told = place.desk.run(*command, code=30)
    host.faults.clear()
    assert "Input/output error" in told.stderr
    assert MARKED in told.stderr
    assert MARKER in place.files("unread")
    place.desk.run(*command, code=100)
    assert place.is_same("unread")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_restore_that_is_ended_goes_on(place: Place, number: signal.Signals) -> None:
    host, folder = place.desk.host, f"ended{number}"
    command = ("restore", "web1@latest", f"esxi://esx1/datastore1/{folder}")
    host.faults.set("slow_commands_s", 0.2)
    process = place.desk.start(*command)
    until_s = time.monotonic() + 60
    while "web1-flat.vmdk" not in place.files(folder):
        assert time.monotonic() < until_s
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    host.faults.clear()
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    assert ("marked incomplete" in told) == (number == signal.SIGINT)
    assert MARKER in place.files(folder)
    other = place.desk.run(
        "restore", "web1@latest", f"esxi://esx1/datastore1/{folder}", "--in-place", code=41
    )
    assert "no VM is registered" in other.stderr
    place.desk.run(*command, code=100)
    assert MARKER not in place.files(folder)
    assert place.is_same(folder)


def test_a_name_that_is_registered_is_refused_before_anything_is_made(place: Place) -> None:
    host = place.desk.host
    host.add_datastore("datastore2")
    told = place.desk.run("restore", "web1@latest", "esxi://esx1/datastore2", "--register", code=33)
    assert "a VM called web1 already" in told.stderr
    assert os.listdir(host.path("/vmfs/volumes/datastore2")) == []


def test_in_place_a_drop_is_survived_too(place: Place) -> None:
    host = place.desk.host
    other = host.add_vm("other", disks=[40 * MIB])
    place.desk.run("backup", "esxi://esx1/other")
    flat = Path(host.path(other.disks["scsi0:0"].replace(".vmdk", "-flat.vmdk")))
    host.copy_disk(other, "scsi0:0", place.disk.with_name("other.raw"))
    with flat.open("r+b") as file:
        file.write(os.urandom(12 * MIB))
        file.seek(39 * MIB)
        file.write(b"where there were zeros")
    host.faults.set("drop_after_bytes", 600_000)
    command = ("restore", "other@latest", "esxi://esx1/datastore1/other", "--in-place")
    told = place.desk.run(*command)
    assert host.faults.struck()["drop_after_bytes"] >= 1
    assert "it goes on where it broke off" in told.stderr
    assert filecmp.cmp(place.disk.with_name("other.raw"), flat, shallow=False)
    host.faults.set("no_python", 1)
    refused = place.desk.run(*command, code=55)
    host.faults.clear()
    assert "no python3 that works" in refused.stderr
