"""A key that is limited to the agent: all that Holdfast does goes on, and nothing else is possible with it."""

from __future__ import annotations

import filecmp
import json
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import KeyLimited
from holdfast.esxi.agent import frames
from holdfast.esxi.agent.bundle import program_hash
from holdfast.esxi.agent_console import AgentConsole
from holdfast.esxi.host import HostSession
from holdfast.esxi.hosts import HostBook

if TYPE_CHECKING:
    from tests.esxi.flow.conftest import Desk

MIB = 1 << 20
pytestmark = pytest.mark.root


def test_backup_and_restore_go_on_as_with_a_shell(desk: Desk, tmp_path: Path) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[24 * MIB], running=True, annotation="ask Miller")
    desk.link("esx1", "--restrict", "restore")
    host.keep_references()
    host.start_guest(vm, rate_bytes=2 * MIB)
    checked = desk.json("host", "check", "esx1")["hosts"][0]
    assert (checked["restrict"], checked["agent_present"], checked["warnings"]) == ("restore", True, [])
    assert desk.json("vms", "esx1")["vms"][0]["name"] == "web1"
    summary = desk.json("backup", "esxi://esx1/web1")
    host.stop_guest(vm)
    after = host.vm("web1")
    assert (summary["warnings"], after.snapshots, after.disks, desk.owed()) == ([], [], vm.disks, [])
    raw = desk.restored("web1@latest", "web1.vmdk")
    assert filecmp.cmp(raw, host.reference(vm, 1, "scsi0:0"), shallow=False)
    done = desk.json("restore", "web1@latest", "esxi://esx1/datastore1/web1 (2)", "--power-on")
    new = host.vm(done["vm_id"])
    assert (new.name, new.power) == ("web1 (2)", "Powered on")
    assert "HOLDFAST-INCOMPLETE.txt" not in new.files
    host.power(new, "off")
    host.copy_disk(new, "scsi0:0", tmp_path / "back.raw")
    assert filecmp.cmp(tmp_path / "back.raw", raw, shallow=False)
    refused = desk.run("restore", "web1@latest", "esxi://esx1/datastore1/web1 (2)", "--in-place", code=59)
    assert "HOLDFAST-INCOMPLETE.txt" in refused.stderr
    with Path(host.path(vm.vmx)).open("a") as file:
        file.write('pciPassthru0.id = "00000:003:00.0"\n')
    desk.run("backup", "esxi://esx1/web1")
    refused = desk.run("restore", "web1@latest", "esxi://esx1/datastore1/odd", "--register", code=59)
    assert "pcipassthru0.id" in refused.stderr
    assert "odd/web1.vmx on the host yourself" in refused.stderr
    desk.run("host", "capture", "esx1", str(tmp_path / "out.tar"))
    desk.link("esx1", "--restrict", "in-place")
    host.write(new, "scsi0:0", 5 * MIB, b"\xee" * 4096)
    desk.run("restore", "web1@latest~1", "esxi://esx1/datastore1/web1 (2)", "--in-place")
    host.copy_disk(new, "scsi0:0", tmp_path / "again.raw")
    assert filecmp.cmp(tmp_path / "again.raw", raw, shallow=False)


def test_the_key_is_good_for_nothing_else(desk: Desk, tmp_path: Path) -> None:
    host = desk.host
    vm = host.add_vm("web1", disks=[8 * MIB], running=True)
    desk.link("esx1", "--restrict")
    desk.run("backup", "esxi://esx1/web1")
    refused = desk.run("restore", "web1@latest", "esxi://esx1/datastore1/back", code=59)
    assert "level 'restore'" in refused.stderr
    refused = desk.run("backup", "esxi://esx1/web1", "--via", "stream", code=59)
    assert "--via stream" in refused.stderr
    listed = desk.config / "hosts.json"  # as one that does not know that another one has linked it since
    listed.write_text(listed.read_text().replace('"restrict": "backup"', '"restrict": ""'))
    assert "link it from here again" in desk.run("vms", "esx1", code=59).stderr
    desk.link("esx1")
    desk.run("vms", "esx1")
    desk.link("esx1", "--restrict")
    # Whoever speaks the agent's language.
    host.snapshot(vm, "by hand")
    number = str(host.vm("web1").snapshots[0]["id"])
    book = HostBook(str(desk.config))
    with HostSession(book, book.get("esx1")) as session:
        assert isinstance(session.console, AgentConsole)
        for words in (
            ("vim-cmd", "vmsvc/snapshot.remove", str(vm.vmid), number),
            ("vim-cmd", "vmsvc/snapshot.removeall", str(vm.vmid)), ("vim-cmd", "vmsvc/destroy", str(vm.vmid)),
            ("sh", "-c", "id"), ("vim-cmd", "solo/registervm", vm.vmx),
        ):  # fmt: skip
            with pytest.raises(KeyLimited):
                session.console.act(words, "stealing")
        for path in (
            "/etc/shadow",
            f"{vm.folder}/../../../../etc/shadow",
            "/vmfs/volumes/datastore1/../../../etc/shadow",
        ):
            with pytest.raises(KeyLimited):
                list(
                    session.console.link.ask(frames.READ, json.dumps({"path": path, "limit": 9999}).encode())
                )
        with pytest.raises(KeyLimited):
            session.console.link.open(f"{vm.folder}/web1-flat.vmdk", writable=True)
    assert [one["name"] for one in host.vm("web1").snapshots] == ["by hand"]
    # Whoever has the key and nothing else of ours.
    key = desk.config / "keys" / "esx1"
    known = tmp_path / "known_hosts"
    known.write_text(host.known_hosts)
    options = ["-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
               "-o", f"UserKnownHostsFile={known}", "-o", "ExitOnForwardFailure=yes"]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = "root@127.0.0.1"
    for attempt in (
        ["ssh", *options, "-p", str(host.port), at],
        ["ssh", *options, "-tt", "-p", str(host.port), at],
        ["ssh", *options, "-p", str(host.port), at, "touch /tmp/stolen; id"],
        ["ssh", *options, "-p", str(host.port), "-R", f"{port}:127.0.0.1:22", at, "id"],
        ["scp", *options, "-P", str(host.port), "/etc/hostname", f"{at}:/tmp/stolen"],
        ["scp", *options, "-O", "-P", str(host.port), f"{at}:/etc/shadow", str(tmp_path / "shadow")],
        ["sftp", *options, "-P", str(host.port), f"{at}:/etc/shadow", str(tmp_path / "shadow")],
    ):
        done = subprocess.run(attempt, input=b"id\n", capture_output=True, timeout=60, check=False)
        assert done.returncode != 0, attempt
        assert b"uid=" not in done.stdout, attempt
    forward = ["ssh", *options, "-p", str(host.port), "-W", "127.0.0.1:443", at]
    assert b"prohibited" in subprocess.run(forward, capture_output=True, timeout=60, check=False).stderr
    assert not (tmp_path / "shadow").exists()
    assert not Path(host.path("/tmp/stolen")).exists()
    # It can not even take itself off: that needs the password.
    desk.run("host", "remove", "esx1", HOLDFAST_HOST_PASSWORD=host.password)
    assert "holdfast esx1" not in Path(host.authorized_keys).read_text()


def test_another_version_has_to_be_linked_again(desk: Desk) -> None:
    host = desk.host
    host.add_vm("web1", disks=[8 * MIB])
    desk.link("esx1", "--restrict")
    place = Path(host.authorized_keys)
    place.write_text(place.read_text().replace(program_hash(), "0" * 64))
    listed = desk.config / "hosts.json"
    listed.write_text(listed.read_text().replace(program_hash(), "0" * 64))
    refused = desk.run("backup", "esxi://esx1/web1", code=59)
    assert "another version" in refused.stderr
    assert f"holdfast host add esx1 root@127.0.0.1:{host.port} --restrict backup" in refused.stderr
    table = desk.run("host", "list")
    assert "backup, another agent" in table.stdout
    checked = desk.json("host", "check", "esx1", code=100)["hosts"][0]
    assert (checked["restrict"], checked["agent_present"]) == ("backup", False)
    desk.link("esx1", "--restrict")
    desk.run("backup", "esxi://esx1/web1")
    listed.write_text(listed.read_text().replace('"restrict": "backup"', '"restrict": "restore"'))
    assert "not 'restore' as was agreed on" in desk.run("host", "check", "esx1", code=100).stderr
    # Somebody has given it a shell again: that is told, and not used.
    place.write_text(re.sub(r'restrict,command="(?:[^"\\]|\\.)*" ', "", place.read_text()))
    refused = desk.run("vms", "esx1", code=59)
    assert "lets our key run anything" in refused.stderr
    desk.link("esx1")
    assert json.loads(listed.read_text())["hosts"][0]["restrict"] == ""
    assert "command=" not in place.read_text()
    desk.run("vms", "esx1")


def test_a_host_that_can_not_limit_a_key_is_left_as_it_is(desk: Desk) -> None:
    before = Path(desk.host.authorized_keys).read_text()
    desk.host.faults.set("no_python", True)
    refused = desk.run(
        "host", "add", "esx1", f"root@127.0.0.1:{desk.host.port}", "--restrict", "restore", code=55,
        HOLDFAST_HOST_PASSWORD=desk.host.password,
    )  # fmt: skip
    assert "no python3" in refused.stderr
    assert Path(desk.host.authorized_keys).read_text() == before
    assert desk.json("host", "list")["hosts"][0]["restrict"] == ""
