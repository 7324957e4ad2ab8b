"""The way in: a real sshd that is as choosy as ESXi's, and what a session sees."""

from __future__ import annotations

import subprocess

import pytest

pytestmark = pytest.mark.root


def test_an_rsa_key_gets_in(host) -> None:
    outcome = host.ssh("vim-cmd vmsvc/getallvms")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(b"Vmid   Name")


def test_an_ed25519_key_does_not(host, tmp_path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    with open(host.authorized_keys, "a", encoding="utf-8") as file:
        file.write((tmp_path / "key.pub").read_text(encoding="utf-8"))
    command = host.ssh_command("true")
    command[command.index(host.key_file)] = str(tmp_path / "key")
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 255
    assert "Permission denied (publickey,keyboard-interactive)" in outcome.stderr


def test_a_session_sees_the_host_and_not_this_machine(host) -> None:
    outcome = host.ssh(
        'echo "$HOME $PATH"; pwd; which rsync zstd split; truncate -s 1 /tmp/x; ls -d /home /root; for d in /vmfs/volumes/*; do echo $d; done'
    )
    lines = outcome.stdout.decode().splitlines()
    assert lines[:2] == ["/ /bin:/sbin", "/"]
    assert "/vmfs/volumes/datastore1" in lines
    assert b"truncate: not found" in outcome.stderr
    assert not any("rsync" in line or line in ("/home", "/root") for line in lines)


def test_python_runs_from_the_command_line(host) -> None:
    outcome = host.ssh("python3 -c 'import hashlib, zlib; print(hashlib.sha256(b\"\").hexdigest()[:8])'")
    assert outcome.stdout == b"e3b0c442\n", outcome.stderr
