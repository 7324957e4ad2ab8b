"""Starting and ending: several at once, and nothing left of any of them, however the process that wanted them ends."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parent.parent.parent


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name the folder, or that have their root in it."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            line = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            root = os.readlink(f"/proc/{name}/root")
        except OSError:
            continue
        if f'"{folder}' in line or root.startswith(str(folder)):
            found.append(line)
    return found


def test_several_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    from tests.esxi_host import StandIn

    with StandIn(tmp_path / "a", name="a") as one, StandIn(tmp_path / "b", name="b") as two:
        assert one.port != two.port
        assert (one.ssh("hostname").stdout, two.ssh("hostname").stdout) == (b"a\n", b"b\n")
        sleeper = subprocess.Popen(
            one.ssh_command("sleep 1000"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not one.ssh("ps | grep '[s]leep 1000'").stdout:
            pass
        assert processes_of(tmp_path)
    sleeper.communicate(timeout=20)
    assert processes_of(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text(encoding="utf-8")


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from tests.esxi_host import StandIn\n"
        "host = StandIn(sys.argv[2]).start(); print(host._process.pid, flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, ROOT, tmp_path / "h"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    watched = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.communicate()
        assert select.select([watched], [], [], 10)[0], "the stand-in outlives its parent"
    finally:
        os.close(watched)
    assert processes_of(tmp_path) == []


def test_by_hand(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.esxi_host"]
    folder = tmp_path / ("long" * 30) / "h"
    folder.parent.mkdir()
    running = subprocess.Popen(
        [*command, "start", "--folder", folder, "--release", "7.0", "--vm", "db:1,2:off"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    while not (line := running.stdout.readline()).strip().startswith("ssh "):
        assert line, "it ended before it said how to log in"
    login = line.split()
    seen = subprocess.run(
        [*login, "vim-cmd vmsvc/getallvms; vmware -v"], capture_output=True, text=True, check=True
    )
    assert "VMware ESXi 7.0.3" in seen.stdout
    assert "[datastore1] db/db.vmx" in seen.stdout
    subprocess.run([*command, "fault", folder, "no_python"], cwd=ROOT, check=True)
    state = subprocess.run([*command, "state", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    assert '"no_python": true' in state.stdout
    running.terminate()
    running.communicate(timeout=20)
    assert running.returncode == 0


def test_the_password_works_by_keyboard_interactive_only(tmp_path: Path) -> None:
    import paramiko

    from tests.esxi_host import StandIn

    def connect(host: StandIn) -> paramiko.Transport:
        transport = paramiko.Transport(("127.0.0.1", host.port))
        transport.start_client(timeout=20)
        return transport

    with StandIn(tmp_path / "h", password="S3cret word") as host:
        transport = connect(host)
        with pytest.raises(paramiko.BadAuthenticationType):
            transport.auth_password("root", host.password, fallback=False)
        transport.close()
        transport = connect(host)
        transport.auth_interactive("root", lambda _title, _text, prompts: [host.password] * len(prompts))
        assert transport.is_authenticated()
        transport.close()
        transport = connect(host)
        with pytest.raises(paramiko.AuthenticationException):
            transport.auth_interactive("root", lambda _title, _text, prompts: ["wrong"] * len(prompts))
        transport.close()
