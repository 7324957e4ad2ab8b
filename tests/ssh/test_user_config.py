"""Repositories: the user's SSH configuration counts, with jump hosts; ESXi hosts: it does not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from holdfast.errors import HostKeyUnknown, HostUnreachable, LinkError, LoginRefused, UsageError
from holdfast.ssh.address import Address
from holdfast.ssh.link import Access, Patience
from holdfast.ssh.openssh import OpenSshLink, client_options
from tests.ssh.sshd import Sshd, await_end, processes_with


def client_with(config: str, folder: Path) -> str:
    """The client, with another file for the user's configuration: the real one's place can not be changed for it."""
    (folder / "config").write_text(config)
    program = folder / "ssh-with-config"
    program.write_text(f'#!/bin/sh\nexec ssh -F "{folder}/config" "$@"\n')
    program.chmod(0o755)
    return str(program)


def through(jump: Sshd, inner: Sshd, known: Path) -> str:
    return (
        f"Host inner\n HostName 127.0.0.1\n Port {inner.port}\n User {inner.address.user}\n"
        f" IdentityFile {inner.key}\n ProxyJump jump\n"
        f"Host jump\n HostName 127.0.0.1\n Port {jump.port}\n User {jump.address.user}\n"
        f" IdentityFile {jump.key}\n UserKnownHostsFile {known}\n StrictHostKeyChecking yes\n BatchMode yes\n"
    )


def test_a_jump_host_of_the_configuration_is_used(sshd: Sshd, own_sshd: Sshd, tmp_path: Path) -> None:
    program = client_with(through(sshd, own_sshd, sshd.known_hosts), tmp_path)
    access = Access(str(own_sshd.known_hosts), user_config=True)
    data = os.urandom(3 << 20)
    with OpenSshLink(Address("inner"), access, program=program) as link:
        assert link.run("cat", data).stdout == data
        channel = link.start("cat")
        pids = processes_with(f"{tmp_path}/config")
        assert len(pids) >= 2  # the client, and the jump host's
        channel.kill()
        assert await_end(pids) == []


def test_an_unknown_jump_host_is_refused(sshd: Sshd, own_sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    program = client_with(through(sshd, own_sshd, tmp_path / "empty"), tmp_path)
    with OpenSshLink(
        Address("inner"), Access(str(own_sshd.known_hosts), user_config=True), program=program
    ) as link:
        with pytest.raises(HostKeyUnknown):
            link.run("true")


def test_a_jump_host_that_refuses_us_is_named_in_the_message(
    sshd: Sshd, own_sshd: Sshd, tmp_path: Path
) -> None:
    config = through(sshd, own_sshd, sshd.known_hosts).replace(
        f"IdentityFile {sshd.key}", "IdentityFile none"
    )
    program = client_with(config, tmp_path)
    with OpenSshLink(
        Address("inner"), Access(str(own_sshd.known_hosts), user_config=True), program=program
    ) as link:
        with pytest.raises(LoginRefused):
            link.run("true")


def test_without_it_an_alias_is_just_a_name(sshd: Sshd) -> None:
    with OpenSshLink(Address("no-such-alias.invalid", "root"), sshd.access) as link:
        with pytest.raises(HostUnreachable):
            link.run("true")


def test_an_agent_counts_only_with_the_users_configuration(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline()  # it prints where it listens, once it does
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", sshd.key], check=True, capture_output=True)
        with OpenSshLink(sshd.address, Access(str(sshd.known_hosts), user_config=True)) as link:
            assert link.run("echo in").stdout == b"in\n"
        with OpenSshLink(sshd.address, Access(str(sshd.known_hosts))) as link:
            with pytest.raises(LoginRefused):
                link.run("echo in")
    finally:
        agent.terminate()
        agent.wait()
        assert agent.stdout is not None
        agent.stdout.close()


def test_options_that_a_configuration_could_not_loosen() -> None:
    for user_config in (False, True):
        options = client_options(Access("/k", user_config=user_config), Patience())
        for option in (
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
            "ForwardAgent=no",
            "PermitLocalCommand=no",
        ):
            assert (
                option in options
            )  # the client takes the first value it meets, and these come before any file


@pytest.mark.parametrize("path", ['a"b', "a${HOME}", "a\nb", "a\\b", ""])
def test_names_of_files_that_the_client_would_misread(path: str) -> None:
    with pytest.raises(UsageError, match="can not use a file"):
        client_options(Access(path), Patience())


def test_a_client_that_is_missing(sshd: Sshd) -> None:
    with OpenSshLink(sshd.address, sshd.access, program="/nonexistent/ssh") as link:
        with pytest.raises(LinkError, match="no SSH client '/nonexistent/ssh'") as caught:
            link.run("true")
    assert "openssh-client" in caught.value.hint
